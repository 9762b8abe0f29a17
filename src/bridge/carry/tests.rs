//! What becomes of events, by the states of both rooms. The near side is Matrix, `g` the gateway.

use ruma::{event_id, room_id, server_name, user_id};

use super::*;
use crate::bridge::power::tests::state as room;

const ALICE: &str = "@alice:h";
const ALICE_GHOST: &str = "@mx_alice_h:g";
const BOB: &str = "@bob:l";
const BOB_GHOST: &str = "@lm_bob_l:g";
const BOT: &str = "@isthmus:g";

fn users() -> Known {
    Known::from([
        (user_id!("@alice:h").to_owned(), Who::Native { ghost: user_id!("@mx_alice_h:g").to_owned() }),
        (user_id!("@carol:h").to_owned(), Who::Native { ghost: user_id!("@mx_carol_h:g").to_owned() }),
        (user_id!("@lm_bob_l:g").to_owned(), Who::Ghost { user: user_id!("@bob:l").to_owned() }),
        (user_id!("@isthmus:g").to_owned(), Who::Bot),
        (user_id!("@_isthmus:h").to_owned(), Who::Appservice),
        (user_id!("@x:g").to_owned(), Who::Stranger),
    ])
}

/// A room: who is what in it (membership, and by whom), its join rule, and who has which level.
fn state_of(members: &[(&str, &str, &str)], rule: &str, levels: Value) -> State {
    let mut entries = vec![
        ("m.room.create", "", BOT, json!({"room_version": "11"})),
        (POWER_LEVELS, "", BOT, json!({"users": levels})),
        ("m.room.join_rules", "", BOT, json!({"join_rule": rule})),
        ("m.room.name", "", BOT, json!({"name": "Tea", "im.isthmus.source": {}})),
    ];
    for (user, membership, by) in members {
        entries.push((MEMBER, user, by, json!({"membership": membership, "displayname": user})));
    }
    room(&entries)
}

fn near() -> State {
    let members = [(ALICE, "join", ALICE), (BOB_GHOST, "join", BOB_GHOST), (BOT, "join", BOT)];
    state_of(&members, "public", json!({BOT: 100, ALICE: 50}))
}

fn far(members: &[(&str, &str, &str)], rule: &str, levels: Value) -> State {
    let mut all = vec![(BOT, "join", BOT)];
    all.extend(members);
    state_of(&all, rule, levels)
}

fn event(kind: &str, state_key: Option<&str>, sender: &str, content: Value) -> Event {
    Event {
        event_id: event_id!("$source").to_owned(),
        lpdu_id: None,
        room_id: room_id!("!near:h").to_owned(),
        sender: sender.try_into().unwrap(),
        kind: kind.to_owned(),
        state_key: state_key.map(str::to_owned),
        origin_server_ts: 1_000,
        content: content.as_object().unwrap().clone(),
        redacts: content.get("redacts").and_then(Value::as_str).map(|id| id.try_into().unwrap()),
        order: 1,
    }
}

fn member(target: &str, sender: &str, membership: &str) -> Event {
    event(MEMBER, Some(target), sender, json!({"membership": membership, "displayname": target, "reason": "why"}))
}

struct Setting {
    authority: Side,
    far: State,
    settled: bool,
    ahead: HashMap<OwnedUserId, Coming>,
    redacted: Option<Event>,
    is_elsewhere: bool,
}

fn setting(far: State) -> Setting {
    Setting { authority: Side::Matrix, far, settled: true, ahead: HashMap::new(), redacted: None, is_elsewhere: false }
}

impl Setting {
    fn of(&self, event: &Event) -> Outcome {
        outcome(&Case {
            event,
            source: Side::Matrix,
            authority: self.authority,
            lets_in: true,
            bot_is_there: true,
            asks: false,
            is_elsewhere: self.is_elsewhere,
            replaceable: true,
            far_users: &Known::new(),
            near: &near(),
            far: &self.far,
            settled: self.settled,
            ahead: &self.ahead,
            users: &users(),
            events: &HashMap::from([(event_id!("$known").to_owned(), event_id!("$image").to_owned())]),
            pins: &Counterparts::new(),
            aliases: Aliases { own: server_name!("g"), homeserver: None, address: None },
            redacted: self.redacted.as_ref(),
            far_room: room_id!("!far:g"),
            bot: user_id!("@isthmus:g"),
            media: &MediaNames::new(server_name!("g").to_owned(), &[7; 32]),
            now_ms: 500,
        })
    }

    fn crossing(&self, event: &Event) -> Crossing {
        match self.of(event) {
            Outcome::Cross(crossing) => *crossing,
            other => panic!("{other:?}"),
        }
    }

    fn refusal(&self, event: &Event) -> &'static str {
        match self.of(event) {
            Outcome::Refuse(refusal) => refusal.code(),
            other => panic!("{other:?}"),
        }
    }
}

/// Who does what to whom: sender, state key, membership.
fn act(draft: &Draft) -> (String, String, String) {
    let membership = draft.content.get("membership").and_then(Value::as_str).unwrap_or(&draft.kind);
    (draft.sender.to_string(), draft.state_key.clone().unwrap_or_default(), membership.to_owned())
}

fn acts(crossing: &Crossing) -> Vec<(String, String, String)> {
    crossing.before.iter().map(|before| &before.draft).chain([&crossing.image]).map(act).collect()
}

fn did(sender: &str, target: &str, membership: &str) -> (String, String, String) {
    (sender.to_owned(), target.to_owned(), membership.to_owned())
}

#[test]
fn a_message_is_sent_by_the_ghost_and_never_in_the_future() {
    let setting = setting(far(&[(ALICE_GHOST, "join", ALICE_GHOST)], "public", json!({})));
    let crossing = setting.crossing(&event("m.room.message", None, ALICE, json!({"body": "hi"})));
    assert_eq!(acts(&crossing), [did(ALICE_GHOST, "", "m.room.message")]);
    assert_eq!(crossing.image.origin_server_ts, 500);
    assert_eq!(crossing.image.content[SOURCE]["sender"], json!(ALICE));
    assert_eq!(setting.refusal(&event("m.room.message", None, "@x:g", json!({"body": "hi"}))), "forbidden");
    let by_appservice = event("m.room.message", None, "@_isthmus:h", json!({"body": "hi"}));
    assert!(matches!(setting.of(&by_appservice), Outcome::Nothing(_)));
}

#[test]
fn hc_48_a_ghost_joins_before_it_speaks() {
    let message = event("m.room.message", None, ALICE, json!({"body": "hi"}));
    let said = did(ALICE_GHOST, "", "m.room.message");
    let joined = did(ALICE_GHOST, ALICE_GHOST, "join");
    let crossing = setting(far(&[], "public", json!({}))).crossing(&message);
    assert_eq!(acts(&crossing), [joined.clone(), said.clone()]);
    assert_eq!(crossing.before[0].draft.content["displayname"], json!(ALICE));
    assert!(crossing.before[0].source.is_some(), "the join is the image of its user's member event");
    let crossing = setting(far(&[], "invite", json!({}))).crossing(&message);
    assert_eq!(acts(&crossing), [did(BOT, ALICE_GHOST, "invite"), joined.clone(), said.clone()]);
    let crossing = setting(far(&[(ALICE_GHOST, "invite", BOT)], "invite", json!({}))).crossing(&message);
    assert_eq!(acts(&crossing), [joined, said]);
    // Whom somebody removed does not come back by speaking; nor does one who is not in the room any more.
    for (membership, by) in [("leave", BOB), ("ban", BOB)] {
        assert_eq!(setting(far(&[(ALICE_GHOST, membership, by)], "public", json!({}))).refusal(&message), "forbidden");
    }
    let left = event("m.room.message", None, "@carol:h", json!({"body": "hi"}));
    assert_eq!(setting(far(&[], "public", json!({}))).refusal(&left), "forbidden");
}

#[test]
fn hc_49_a_redaction_needs_the_targets_sender_or_the_level_on_both_sides() {
    let redaction = event("m.room.redaction", None, ALICE, json!({"redacts": "$known"}));
    let joined = [(ALICE_GHOST, "join", ALICE_GHOST)];
    let mut own = setting(far(&joined, "public", json!({})));
    own.redacted = Some(event("m.room.message", None, ALICE, json!({"body": "x"})));
    assert_eq!(own.crossing(&redaction).image.content["redacts"], json!("$image"));

    let mut other = setting(far(&joined, "public", json!({ALICE_GHOST: 49})));
    other.redacted = Some(event("m.room.message", None, BOB_GHOST, json!({"body": "x"})));
    assert_eq!(other.refusal(&redaction), "forbidden");
    other.far = far(&joined, "public", json!({ALICE_GHOST: 50}));
    assert_eq!(other.crossing(&redaction).image.content["redacts"], json!("$image"));
    // Carol has no level on her own side, whatever she has across.
    let by_carol = event("m.room.redaction", None, "@carol:h", json!({"redacts": "$known"}));
    assert_eq!(other.refusal(&by_carol), "forbidden");
    let unknown = event("m.room.redaction", None, ALICE, json!({"redacts": "$unknown"}));
    assert_eq!(own.refusal(&unknown), "not_bridged");
}

#[test]
fn what_was_redacted_before_its_turn_does_not_cross_nor_does_its_redaction() {
    let joined = [(ALICE_GHOST, "join", ALICE_GHOST)];
    let mut there = setting(far(&joined, "public", json!({})));
    let gone = event("m.room.message", None, ALICE, json!({}));
    assert!(matches!(there.of(&gone), Outcome::Nothing(_)));
    let redaction = event("m.room.redaction", None, ALICE, json!({"redacts": "$source"}));
    there.redacted = Some(gone);
    assert!(matches!(there.of(&redaction), Outcome::Nothing(_)));
    // What has crossed is redacted across, though nothing is left of it here.
    let redaction = event("m.room.redaction", None, ALICE, json!({"redacts": "$known"}));
    there.redacted = Some(Event { event_id: event_id!("$known").to_owned(), ..there.redacted.unwrap() });
    assert_eq!(there.crossing(&redaction).image.content["redacts"], json!("$image"));
    // State without content says something.
    let name = event("m.room.name", Some(""), ALICE, json!({}));
    assert!(!matches!(there.of(&name), Outcome::Nothing(_)));
}

#[test]
fn state_is_sent_by_the_ghost_with_the_level_else_by_the_bot_where_the_far_side_follows() {
    let name = event("m.room.name", Some(""), ALICE, json!({"name": "Coffee"}));
    let joined = [(ALICE_GHOST, "join", ALICE_GHOST)];
    let mighty = setting(far(&joined, "public", json!({ALICE_GHOST: 50})));
    let crossing = mighty.crossing(&name);
    assert_eq!(crossing.image.sender, ALICE_GHOST);
    assert_eq!(crossing.instead.unwrap().sender, BOT);
    let mut weak = setting(far(&joined, "public", json!({BOT: 100})));
    assert_eq!(weak.crossing(&name).image.sender, BOT);
    weak.authority = Side::Lm;
    assert_eq!(weak.refusal(&name), "forbidden");

    let same = event("m.room.name", Some(""), ALICE, json!({"name": "Tea"}));
    assert!(matches!(mighty.of(&same), Outcome::Nothing(_)));
    // While LPDUs are under way, what the far room has now may be about to change.
    let unsettled = Setting { settled: false, ..mighty };
    assert!(matches!(unsettled.of(&same), Outcome::Cross(_)));
}

#[test]
fn the_bots_level_is_kept_and_never_crosses() {
    let setting = setting(far(&[(ALICE_GHOST, "join", ALICE_GHOST)], "public", json!({BOT: 1_000, ALICE_GHOST: 100})));
    let levels = event(POWER_LEVELS, Some(""), ALICE, json!({"users": {BOT: 7, ALICE: 100, BOB_GHOST: 5, "@x:g": 9}}));
    let users = setting.crossing(&levels).image.content["users"].clone();
    // Only users who were looked up are known; the others are nobody across.
    assert_eq!(users, json!({BOT: 1_000, ALICE_GHOST: 100, BOB: 5}));
}

#[test]
fn what_a_user_does_to_itself_its_ghost_does() {
    let joined = far(&[(ALICE_GHOST, "join", ALICE_GHOST)], "public", json!({}));
    let out = far(&[], "public", json!({}));
    let crossing = setting(out.clone()).crossing(&member(ALICE, ALICE, "join"));
    assert_eq!(acts(&crossing), [did(ALICE_GHOST, ALICE_GHOST, "join")]);
    assert_eq!(crossing.image.content["displayname"], json!(ALICE));
    let crossing = setting(joined.clone()).crossing(&member(ALICE, ALICE, "leave"));
    assert_eq!(acts(&crossing), [did(ALICE_GHOST, ALICE_GHOST, "leave")]);
    assert!(matches!(setting(out.clone()).of(&member(ALICE, ALICE, "leave")), Outcome::Nothing(_)));
    let crossing = setting(out).crossing(&member("@carol:h", "@carol:h", "knock"));
    assert_eq!(acts(&crossing), [did("@mx_carol_h:g", "@mx_carol_h:g", "knock")]);
    let knocked = far(&[("@mx_carol_h:g", "knock", "@mx_carol_h:g")], "knock", json!({}));
    assert!(matches!(setting(knocked).of(&member("@carol:h", "@carol:h", "knock")), Outcome::Adopt(_)));
    // What the gate has done already is the image.
    let mut event = member(ALICE, ALICE, "join");
    event.content = json!({"membership": "join", "displayname": ALICE_GHOST}).as_object().unwrap().clone();
    assert!(matches!(setting(joined).of(&event), Outcome::Adopt(_)));
    assert_eq!(setting(far(&[], "public", json!({}))).refusal(&member(ALICE, "@carol:h", "join")), "malformed");
}

#[test]
fn who_removes_a_user_removes_its_ghost_or_the_bot_does_or_the_ghost_leaves() {
    let all = [(ALICE_GHOST, "join", ALICE_GHOST), ("@mx_carol_h:g", "join", "@mx_carol_h:g")];
    for (membership, levels, by, becomes) in [
        ("leave", json!({ALICE_GHOST: 50, BOT: 100}), ALICE_GHOST, "leave"),
        ("ban", json!({ALICE_GHOST: 50, BOT: 100}), ALICE_GHOST, "ban"),
        ("leave", json!({BOT: 100}), BOT, "leave"),
        ("ban", json!({BOT: 100, ALICE_GHOST: 50, "@mx_carol_h:g": 50}), BOT, "ban"),
        ("leave", json!({}), "@mx_carol_h:g", "leave"),
        ("ban", json!({}), "@mx_carol_h:g", "leave"),
    ] {
        let crossing = setting(far(&all, "public", levels)).crossing(&member("@carol:h", ALICE, membership));
        assert_eq!(acts(&crossing), [did(by, "@mx_carol_h:g", becomes)], "{membership}");
        assert_eq!(crossing.image.content["reason"], json!("why"));
    }
    let out = setting(far(&[], "public", json!({BOT: 100})));
    assert!(matches!(out.of(&member("@carol:h", ALICE, "leave")), Outcome::Nothing(_)));
    let banned = [("@mx_carol_h:g", "ban", BOT)];
    let crossing = setting(far(&banned, "public", json!({BOT: 100}))).crossing(&member("@carol:h", ALICE, "leave"));
    assert_eq!(acts(&crossing), [did(BOT, "@mx_carol_h:g", "leave")], "a ban is taken back");
}

#[test]
fn what_is_done_to_a_ghost_is_done_to_its_user() {
    let bob = [(BOB, "join", BOB), (ALICE_GHOST, "join", ALICE_GHOST)];
    let mighty = setting(far(&bob, "public", json!({ALICE_GHOST: 50})));
    assert_eq!(acts(&mighty.crossing(&member(BOB_GHOST, ALICE, "ban"))), [did(ALICE_GHOST, BOB, "ban")]);
    assert_eq!(acts(&mighty.crossing(&member(BOB_GHOST, ALICE, "leave"))), [did(ALICE_GHOST, BOB, "leave")]);
    // No ghost leaves in a real user's stead.
    let weak = setting(far(&bob, "public", json!({})));
    assert_eq!(weak.refusal(&member(BOB_GHOST, ALICE, "leave")), "forbidden");

    let empty = setting(far(&[], "invite", json!({})));
    let crossing = empty.crossing(&member(BOB_GHOST, ALICE, "invite"));
    assert_eq!(acts(&crossing), [did(BOT, BOB, "invite")]);
    assert!(crossing.asks_server);
    assert!(matches!(mighty.of(&member(BOB_GHOST, ALICE, "invite")), Outcome::Nothing(_)));
    assert_eq!(
        setting(far(&[(BOB, "ban", BOT)], "public", json!({}))).refusal(&member(BOB_GHOST, ALICE, "invite")),
        "forbidden"
    );
}

#[test]
fn an_invite_of_a_user_invites_its_ghost_and_nobody_else_is_touched() {
    let crossing = setting(far(&[], "invite", json!({}))).crossing(&member("@carol:h", ALICE, "invite"));
    assert_eq!(acts(&crossing), [did(BOT, "@mx_carol_h:g", "invite")]);
    assert!(!crossing.asks_server);
    let setting = setting(far(&[], "public", json!({})));
    assert!(matches!(setting.of(&member("@_isthmus:h", ALICE, "invite")), Outcome::Nothing(_)));
    assert_eq!(setting.refusal(&member("@x:g", ALICE, "invite")), "forbidden");
}

#[test]
fn hc_63_the_bots_removal_suspends_the_portal() {
    let setting = setting(far(&[], "public", json!({})));
    for membership in ["leave", "ban"] {
        assert!(
            matches!(setting.of(&member(BOT, ALICE, membership)), Outcome::Suspend(reason) if reason.contains(ALICE))
        );
    }
}

#[test]
fn who_has_the_level_on_both_sides_closes_both_rooms() {
    let of = |level: i64, is_elsewhere: bool| {
        let far = far(&[(ALICE_GHOST, "join", ALICE_GHOST)], "public", json!({BOT: 100, ALICE_GHOST: level}));
        let stone = event(TOMBSTONE, Some(""), ALICE, json!({ "replacement_room": "!x:h" }));
        Setting { is_elsewhere, ..setting(far) }.of(&stone)
    };
    let Outcome::Refuse(refusal) = of(40, false) else { panic!("it takes the level across") };
    assert!(refusal.to_string().contains("40"), "{refusal}");
    assert_eq!(of(40, true), Outcome::Nothing("it moves the portal on"));
    assert_eq!(of(50, false), Outcome::Nothing("it moves the portal on"));
}
