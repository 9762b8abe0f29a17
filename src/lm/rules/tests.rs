//! Every rule by its number: what it accepts and what it refuses.

use ruma::user_id;
use serde_json::json;

use super::*;

const ALICE: &str = "@alice:hub.example";
const BOB: &str = "@bob:other.example";
const CREATE: Slot<'_> = Slot { kind: "m.room.create", state_key: "" };

/// One event and the room before it; each test changes what its rule is about.
struct Case {
    kind: &'static str,
    sender: &'static str,
    state_key: Option<&'static str>,
    content: Value,
    signed_by_sender: bool,
    signed_by_hub: Option<bool>,
    has_prev_events: bool,
    auth_events: Vec<Slot<'static>>,
    room_id: &'static str,
    follows_create: bool,
    power_levels: Option<Value>,
    join_rule: Option<&'static str>,
    sender_is: Option<&'static str>,
    target_is: Option<&'static str>,
    signed_by_next_hub: bool,
    hub: &'static str,
    was_handed_over: bool,
    next_hub_is_in: bool,
}

fn message() -> Case {
    Case {
        kind: "m.room.message",
        sender: ALICE,
        state_key: None,
        content: json!({}),
        signed_by_sender: true,
        signed_by_hub: None,
        has_prev_events: true,
        auth_events: vec![CREATE],
        room_id: "!room:hub.example",
        follows_create: false,
        power_levels: None,
        join_rule: None,
        sender_is: Some("join"),
        target_is: None,
        signed_by_next_hub: false,
        hub: "hub.example",
        was_handed_over: false,
        next_hub_is_in: false,
    }
}

fn create() -> Case {
    Case {
        kind: "m.room.create",
        state_key: Some(""),
        content: json!({ "room_version": "I.1" }),
        has_prev_events: false,
        auth_events: Vec::new(),
        sender_is: None,
        ..message()
    }
}

fn member(sender: &'static str, target: &'static str, membership: &str) -> Case {
    Case {
        kind: "m.room.member",
        sender,
        state_key: Some(target),
        content: json!({ "membership": membership }),
        ..message()
    }
}

/// A join of Bob's own.
fn join(rule: &'static str, membership: Option<&'static str>) -> Case {
    Case { join_rule: Some(rule), sender_is: membership, target_is: membership, ..member(BOB, BOB, "join") }
}

fn levels(old: Value, new: Value) -> Case {
    Case { kind: "m.room.power_levels", state_key: Some(""), content: new, power_levels: Some(old), ..message() }
}

/// Changes power levels as a user with level 50, who may send them.
fn levels_at_50(old: Value, new: Value) -> Case {
    let add = |mut levels: Value| {
        let users = &mut levels.as_object_mut().unwrap().entry("users").or_insert(json!({}));
        users.as_object_mut().unwrap().entry(ALICE).or_insert(json!(50));
        levels
    };
    levels(add(old), add(new))
}

impl Case {
    fn judge(&self) -> Result<(), Refusal> {
        let empty = Object::new();
        let join_rules = self.join_rule.map(|rule| json!({ "join_rule": rule }));
        let creator = user_id!("@alice:hub.example");
        check(&Judged {
            version: RoomVersion::LmI1,
            room_id: self.room_id.try_into().unwrap(),
            sender: self.sender.try_into().unwrap(),
            kind: self.kind,
            state_key: self.state_key,
            content: self.content.as_object().unwrap_or(&empty),
            signed_by_sender: self.signed_by_sender,
            signed_by_hub: self.signed_by_hub,
            signed_by_next_hub: self.signed_by_next_hub,
            has_prev_events: self.has_prev_events,
            auth_events: &self.auth_events,
            before: Before {
                creator: Some(creator),
                follows_create: self.follows_create,
                power_levels: self.power_levels.as_ref().map(|levels| levels.as_object().unwrap()),
                join_rules: join_rules.as_ref().map(|rules| rules.as_object().unwrap()),
                sender_membership: self.sender_is,
                target_membership: self.target_is,
                hub: Some(self.hub.try_into().unwrap()),
                was_handed_over: self.was_handed_over,
                next_hub_is_in: self.next_hub_is_in,
            },
        })
    }

    #[track_caller]
    fn passes(self) {
        assert_eq!(self.judge(), Ok(()));
    }

    #[track_caller]
    fn breaks(self, number: &str) {
        match self.judge() {
            Err(Refusal::LmRule { rule, .. }) => assert_eq!(rule, number),
            other => panic!("expected rule {number} to refuse it, got {other:?}"),
        }
    }
}

#[test]
fn rule_1_signed_by_the_senders_server() {
    message().passes();
    Case { signed_by_sender: false, ..message() }.breaks("1");
    Case { signed_by_sender: false, ..create() }.breaks("1");
}

#[test]
fn rule_2_signed_by_the_hub_when_there_is_a_hub_server() {
    Case { signed_by_hub: Some(true), ..message() }.passes();
    Case { signed_by_hub: Some(false), ..message() }.breaks("2");
}

#[test]
fn rule_3_1_create_has_no_prev_events() {
    create().passes();
    Case { has_prev_events: true, ..create() }.breaks("3.1");
}

#[test]
fn rule_3_2_create_is_of_the_rooms_domain() {
    Case { room_id: "!room:elsewhere.example", ..create() }.breaks("3.2");
}

#[test]
fn rule_3_3_create_names_the_version() {
    Case { content: json!({}), ..create() }.breaks("3.3");
    Case { content: json!({ "room_version": "10" }), ..create() }.breaks("3.3");
    Case { content: json!({ "room_version": 1 }), ..create() }.breaks("3.3");
}

#[test]
fn rule_3_4_create_needs_no_membership() {
    Case { sender_is: None, ..create() }.passes();
}

#[test]
fn rule_4_1_no_auth_event_twice() {
    Case { auth_events: vec![CREATE, CREATE], ..message() }.breaks("4.1");
}

#[test]
fn rule_4_2_only_selected_auth_events() {
    let slot = |kind, state_key| Slot { kind, state_key };
    let with = |slot, case| Case { auth_events: vec![CREATE, slot], ..case };
    with(slot("m.room.member", ALICE), message()).passes();
    with(slot("m.room.power_levels", ""), message()).passes();
    with(slot("m.room.topic", ""), message()).breaks("4.2");
    with(slot("m.room.member", BOB), message()).breaks("4.2");
    with(slot("m.room.member", BOB), member(ALICE, BOB, "invite")).passes();
    with(slot("m.room.join_rules", ""), member(ALICE, BOB, "invite")).passes();
    with(slot("m.room.join_rules", ""), member(ALICE, BOB, "ban")).breaks("4.2");
    // The draft does not select them for a knock, which stands on them all the same.
    with(slot("m.room.join_rules", ""), member(BOB, BOB, "knock")).breaks("5.6.1");
    with(slot("m.room.join_rules", ""), message()).breaks("4.2");
}

#[test]
fn rule_4_3_create_is_among_the_auth_events() {
    Case { auth_events: Vec::new(), ..message() }.breaks("4.3");
}

#[test]
fn rule_5_1_member_has_state_key_and_membership() {
    Case { state_key: None, ..member(ALICE, ALICE, "join") }.breaks("5.1");
    Case { content: json!({}), ..member(ALICE, ALICE, "join") }.breaks("5.1");
    Case { content: json!({ "membership": 1 }), ..member(ALICE, ALICE, "join") }.breaks("5.1");
}

#[test]
fn rule_5_2_1_creator_joins_after_create() {
    let first = || Case { follows_create: true, sender_is: None, ..member(ALICE, ALICE, "join") };
    first().passes();
    Case { follows_create: false, ..first() }.breaks("5.2.6");
    Case { sender: BOB, state_key: Some(BOB), ..first() }.breaks("5.2.6");
}

#[test]
fn rule_5_2_2_nobody_joins_for_another() {
    Case { join_rule: Some("public"), ..member(ALICE, BOB, "join") }.breaks("5.2.2");
}

#[test]
fn rule_5_2_3_banned_users_do_not_join() {
    join("public", Some("ban")).breaks("5.2.3");
}

#[test]
fn rule_5_2_4_invited_users_join() {
    for rule in ["invite", "knock"] {
        join(rule, Some("invite")).passes();
        join(rule, Some("join")).passes();
        join(rule, Some("knock")).breaks("5.2.6");
        join(rule, None).breaks("5.2.6");
    }
}

#[test]
fn rule_5_2_5_anybody_joins_a_public_room() {
    join("public", None).passes();
    join("public", Some("leave")).passes();
}

#[test]
fn rule_5_2_6_no_other_join_rule_lets_in() {
    join("restricted", Some("invite")).breaks("5.2.6");
    Case { join_rule: None, ..join("public", Some("invite")) }.breaks("5.2.6");
}

#[test]
fn rule_5_3_1_only_members_invite() {
    Case { sender_is: Some("invite"), ..member(ALICE, BOB, "invite") }.breaks("5.3.1");
    Case { sender_is: None, ..member(ALICE, BOB, "invite") }.breaks("5.3.1");
}

#[test]
fn rule_5_3_2_members_and_banned_users_are_not_invited() {
    Case { target_is: Some("join"), ..member(ALICE, BOB, "invite") }.breaks("5.3.2");
    Case { target_is: Some("ban"), ..member(ALICE, BOB, "invite") }.breaks("5.3.2");
    Case { target_is: Some("knock"), ..member(ALICE, BOB, "invite") }.passes();
}

#[test]
fn rule_5_3_3_and_5_3_4_inviting_needs_its_level() {
    let at = |level| Case {
        power_levels: Some(json!({ "invite": 10, "users": { ALICE: level } })),
        ..member(ALICE, BOB, "invite")
    };
    at(10).passes();
    at(9).breaks("5.3.4");
    Case { power_levels: None, ..member(ALICE, BOB, "invite") }.passes();
}

#[test]
fn rule_5_4_1_leaving_ends_a_membership() {
    for membership in ["knock", "join", "invite"] {
        Case { sender_is: Some(membership), ..member(BOB, BOB, "leave") }.passes();
    }
    Case { sender_is: Some("ban"), ..member(BOB, BOB, "leave") }.breaks("5.4.1");
    Case { sender_is: None, ..member(BOB, BOB, "leave") }.breaks("5.4.1");
}

#[test]
fn rule_5_4_2_only_members_kick() {
    Case { sender_is: Some("leave"), target_is: Some("join"), ..member(ALICE, BOB, "leave") }.breaks("5.4.2");
}

#[test]
fn rule_5_4_3_lifting_a_ban_needs_the_level_to_ban() {
    let at = |level| Case {
        power_levels: Some(json!({ "ban": 60, "kick": 50, "users": { ALICE: level } })),
        target_is: Some("ban"),
        ..member(ALICE, BOB, "leave")
    };
    at(59).breaks("5.4.3");
    at(60).passes();
}

#[test]
fn rule_5_4_4_and_5_4_5_kicking_needs_its_level_and_more_than_the_target() {
    let at = |own, other| Case {
        power_levels: Some(json!({ "users": { ALICE: own, BOB: other } })),
        target_is: Some("join"),
        ..member(ALICE, BOB, "leave")
    };
    at(50, 49).passes();
    at(50, 50).breaks("5.4.5");
    at(49, 0).breaks("5.4.5");
}

#[test]
fn rule_5_5_1_only_members_ban() {
    Case { sender_is: None, ..member(ALICE, BOB, "ban") }.breaks("5.5.1");
}

#[test]
fn rule_5_5_2_and_5_5_3_banning_needs_its_level_and_more_than_the_target() {
    let at = |own, other| Case {
        power_levels: Some(json!({ "users": { ALICE: own, BOB: other } })),
        ..member(ALICE, BOB, "ban")
    };
    at(50, 49).passes();
    at(50, 50).breaks("5.5.3");
    at(49, 0).breaks("5.5.3");
}

fn knock(rule: &'static str, membership: Option<&'static str>) -> Case {
    Case { join_rule: Some(rule), sender_is: membership, ..member(BOB, BOB, "knock") }
}

#[test]
fn rule_5_6_1_knocking_needs_the_join_rule() {
    knock("knock", None).passes();
    knock("invite", None).breaks("5.6.1");
    Case { join_rule: None, ..knock("knock", None) }.breaks("5.6.1");
}

#[test]
fn rule_5_6_2_nobody_knocks_for_another() {
    Case { join_rule: Some("knock"), ..member(ALICE, BOB, "knock") }.breaks("5.6.2");
}

#[test]
fn rule_5_6_3_and_5_6_4_members_and_banned_users_do_not_knock() {
    knock("knock", Some("leave")).passes();
    knock("knock", Some("invite")).passes();
    knock("knock", Some("join")).breaks("5.6.4");
    knock("knock", Some("ban")).breaks("5.6.4");
}

#[test]
fn rule_5_7_no_other_membership() {
    member(ALICE, ALICE, "lurk").breaks("5.7");
}

#[test]
fn rule_6_only_members_send() {
    for membership in [None, Some("invite"), Some("leave"), Some("ban"), Some("knock")] {
        Case { sender_is: membership, ..message() }.breaks("6");
    }
}

#[test]
fn rule_7_sending_needs_its_level() {
    let at =
        |state_key, levels: Value| Case { state_key, kind: "m.room.topic", power_levels: Some(levels), ..message() };
    at(None, json!({})).passes();
    at(Some(""), json!({})).breaks("7");
    at(Some(""), json!({ "users_default": 50 })).passes();
    at(Some(""), json!({ "state_default": 0 })).passes();
    at(Some(""), json!({ "events": { "m.room.topic": 0 } })).passes();
    at(None, json!({ "events_default": 1 })).breaks("7");
    at(None, json!({ "events": { "m.room.topic": 1 } })).breaks("7");
    at(None, json!({ "events": { "m.room.topic": 1 }, "users": { ALICE: 1 } })).passes();
    Case { state_key: Some(""), kind: "m.room.topic", ..message() }.passes();
    Case { state_key: Some(""), kind: "m.room.topic", sender: BOB, ..message() }.breaks("7");
}

#[test]
fn rule_8_state_keys_of_others() {
    let with = |state_key| Case { state_key: Some(state_key), kind: "org.example.state", ..message() };
    with(ALICE).passes();
    with("other").passes();
    with(BOB).breaks("8");
}

#[test]
fn hc_43_rule_9_1_fields_are_integers() {
    for field in ["users_default", "events_default", "state_default", "ban", "redact", "kick", "invite"] {
        for value in [json!("50"), json!(50.5), Value::Null, json!([50]), json!(1u64 << 53)] {
            let new = json!({ field: value });
            Case { power_levels: None, ..levels(json!({}), new) }.breaks("9.1");
        }
        Case { power_levels: None, ..levels(json!({}), json!({ field: -5 })) }.passes();
    }
}

#[test]
fn hc_43_rule_9_2_events_are_integers() {
    let first = |new| Case { power_levels: None, ..levels(json!({}), new) };
    first(json!({ "events": [] })).breaks("9.2");
    first(json!({ "events": { "m.room.name": "50" } })).breaks("9.2");
    first(json!({ "events": { "m.room.name": 50 } })).passes();
}

#[test]
fn hc_43_rule_9_3_users_are_user_ids_and_integers() {
    let first = |new| Case { power_levels: None, ..levels(json!({}), new) };
    first(json!({ "users": 1 })).breaks("9.3");
    first(json!({ "users": { ALICE: null } })).breaks("9.3");
    first(json!({ "users": { "alice": 1 } })).breaks("9.3");
    first(json!({ "users": { ALICE: 1 } })).passes();
}

#[test]
fn rule_9_4_the_first_power_levels() {
    Case { power_levels: None, ..levels(json!({}), json!({ "users": { BOB: 1000 } })) }.passes();
}

#[test]
fn rule_9_5_1_fields_above_the_sender_stay() {
    levels_at_50(json!({ "ban": 60 }), json!({ "ban": 50 })).breaks("9.5.1");
    levels_at_50(json!({ "ban": 60 }), json!({})).breaks("9.5.1");
    levels_at_50(json!({ "ban": 60 }), json!({ "ban": 60 })).passes();
    levels_at_50(json!({ "ban": 50 }), json!({ "ban": 40 })).passes();
}

#[test]
fn rule_9_5_2_fields_are_not_raised_above_the_sender() {
    levels_at_50(json!({ "kick": 50 }), json!({ "kick": 51 })).breaks("9.5.2");
    levels_at_50(json!({}), json!({ "kick": 51 })).breaks("9.5.2");
    levels_at_50(json!({}), json!({ "kick": 50 })).passes();
}

#[test]
fn rule_9_6_1_events_above_the_sender_stay() {
    levels_at_50(json!({ "events": { "a": 60 } }), json!({ "events": { "a": 1 } })).breaks("9.6.1");
    levels_at_50(json!({ "events": { "a": 60 } }), json!({ "events": {} })).breaks("9.6.1");
    levels_at_50(json!({ "events": { "a": 60 } }), json!({})).breaks("9.6.1");
    levels_at_50(json!({ "events": { "a": 50 } }), json!({})).passes();
}

#[test]
fn rule_9_7_1_events_are_not_raised_above_the_sender() {
    levels_at_50(json!({}), json!({ "events": { "a": 51 } })).breaks("9.7.1");
    levels_at_50(json!({ "events": { "a": 1 } }), json!({ "events": { "a": 51 } })).breaks("9.7.1");
    levels_at_50(json!({}), json!({ "events": { "a": 50 } })).passes();
}

#[test]
fn rule_9_8_1_users_above_the_sender_stay() {
    levels_at_50(json!({ "users": { BOB: 51 } }), json!({ "users": { BOB: 0 } })).breaks("9.8.1");
    levels_at_50(json!({ "users": { BOB: 51 } }), json!({})).breaks("9.8.1");
    levels_at_50(json!({ "users": { BOB: 50 } }), json!({})).passes();
    levels_at_50(json!({}), json!({ "users": { ALICE: 0 } })).passes();
}

#[test]
fn rule_9_9_1_users_are_not_raised_above_the_sender() {
    levels_at_50(json!({}), json!({ "users": { BOB: 51 } })).breaks("9.9.1");
    levels_at_50(json!({}), json!({ "users": { ALICE: 51 } })).breaks("9.9.1");
    levels_at_50(json!({}), json!({ "users": { BOB: 50 } })).passes();
}

#[test]
fn hc_43_levels_that_are_no_integers_count_as_absent() {
    let content = json!({ "users": { ALICE: "100", BOB: 7.5 }, "users_default": 3, "ban": null });
    let levels = Levels::new(content.as_object(), None);
    assert_eq!(levels.of_user(user_id!("@alice:hub.example")), 3);
    assert_eq!(levels.of_user(user_id!("@bob:other.example")), 3);
    assert_eq!(levels.to_do(Action::Ban), 50);
}

#[test]
fn selection_follows_the_drafts_order() {
    let kinds = |kind, state_key, membership: &str| -> Vec<(String, String)> {
        let content = json!({ "membership": membership });
        selected_slots(kind, user_id!("@alice:hub.example"), state_key, content.as_object().unwrap())
            .into_iter()
            .map(|slot| (slot.kind.to_owned(), slot.state_key.to_owned()))
            .collect()
    };
    let slot = |kind: &str, key: &str| (kind.to_owned(), key.to_owned());
    let base = || vec![slot("m.room.create", ""), slot("m.room.power_levels", ""), slot("m.room.member", ALICE)];
    assert_eq!(kinds("m.room.create", Some(""), ""), vec![]);
    assert_eq!(kinds("m.room.message", None, "join"), base());
    let mut invite = base();
    invite.extend([slot("m.room.member", BOB), slot("m.room.join_rules", "")]);
    assert_eq!(kinds("m.room.member", Some(BOB), "invite"), invite);
    let mut join = base();
    join.push(slot("m.room.join_rules", ""));
    assert_eq!(kinds("m.room.member", Some(ALICE), "join"), join);
    let mut kick = base();
    kick.push(slot("m.room.member", BOB));
    assert_eq!(kinds("m.room.member", Some(BOB), "leave"), kick);
}

/// Alice, who made the room, hands its log over to Bob's server.
fn hand_over() -> Case {
    Case {
        kind: "m.room.hub",
        state_key: Some(""),
        content: json!({ "hub_server": "other.example" }),
        signed_by_next_hub: true,
        next_hub_is_in: true,
        ..message()
    }
}

#[test]
fn rule_hub_1_only_the_hub_hands_its_log_over() {
    hand_over().passes();
    let levels = || Some(json!({ "users": { ALICE: 100, BOB: 100 } }));
    let by_bob = || Case { sender: BOB, power_levels: levels(), ..hand_over() };
    by_bob().breaks("hub.1");
    let back = json!({ "hub_server": "hub.example" });
    Case { hub: "other.example", was_handed_over: true, content: back, ..by_bob() }.passes();
    Case { hub: "other.example", ..hand_over() }.breaks("hub.1");
}

#[test]
fn rule_hub_2_no_lpdu_hands_a_log_over() {
    Case { signed_by_hub: Some(true), ..hand_over() }.breaks("hub.2");
}

#[test]
fn rule_hub_3_the_state_key_is_empty() {
    Case { state_key: None, ..hand_over() }.breaks("hub.3");
    Case { state_key: Some("x"), ..hand_over() }.breaks("hub.3");
}

#[test]
fn rule_hub_4_it_names_another_server_that_is_in_the_room() {
    for named in [json!({}), json!({ "hub_server": 1 }), json!({ "hub_server": "no name" })] {
        Case { content: named, ..hand_over() }.breaks("hub.4");
    }
    Case { content: json!({ "hub_server": "hub.example" }), ..hand_over() }.breaks("hub.4");
    Case { next_hub_is_in: false, ..hand_over() }.breaks("hub.4");
}

#[test]
fn rule_hub_5_the_next_hub_has_signed_it() {
    Case { signed_by_next_hub: false, ..hand_over() }.breaks("hub.5");
}

#[test]
fn rule_hub_6_after_that_nobody_but_the_hub_speaks_without_hub_server() {
    let bob = || Case { sender: BOB, ..message() };
    bob().passes();
    Case { was_handed_over: true, ..bob() }.breaks("hub.6");
    Case { was_handed_over: true, signed_by_hub: Some(true), ..bob() }.passes();
    Case { was_handed_over: true, hub: "other.example", ..bob() }.passes();
    Case { was_handed_over: true, ..message() }.passes();
}

#[test]
fn handing_a_log_over_needs_a_level_of_its_own() {
    let with = |levels| Case { power_levels: Some(levels), ..hand_over() };
    with(json!({ "users": { ALICE: 100 } })).passes();
    with(json!({ "users": { ALICE: 99 }, "state_default": 0 })).breaks("7");
    with(json!({ "users": { ALICE: 100 }, "state_default": 101 })).breaks("7");
    with(json!({ "users": { ALICE: 50 }, "events": { "m.room.hub": 50 } })).passes();
    with(json!({ "users": { ALICE: 100 }, "events": { "m.room.hub": 101 } })).breaks("7");
    Case { sender_is: Some("leave"), ..hand_over() }.breaks("6");
}

#[test]
fn a_change_of_the_hub_names_the_one_before_it() {
    let slot = Slot { kind: "m.room.hub", state_key: "" };
    Case { auth_events: vec![CREATE, slot], ..hand_over() }.passes();
    Case { auth_events: vec![CREATE, slot], ..message() }.breaks("4.2");
}
