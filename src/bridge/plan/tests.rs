//! Repairs by the states of both rooms: Matrix leads, LM follows.

use ruma::{server_name, user_id};

use super::*;
use crate::bridge::power::tests::state as room;

const BOT: &str = "@isthmus:g";

fn users(side: Side) -> Known {
    let pairs = [
        ("@alice:h", "@mx_alice_h:g", Side::Matrix),
        ("@eve:denied.example", "@mx_eve_denied.example:g", Side::Matrix),
        ("@bob:l", "@lm_bob_l:g", Side::Lm),
    ];
    let mut known = Known::from([(user_id!("@isthmus:g").to_owned(), Who::Bot)]);
    for (user, ghost, home) in pairs {
        let (user, ghost): (ruma::OwnedUserId, ruma::OwnedUserId) =
            (user.try_into().unwrap(), ghost.try_into().unwrap());
        match side == home {
            true => known.insert(user, Who::Native { ghost }),
            false => known.insert(ghost, Who::Ghost { user }),
        };
    }
    known
}

fn rooms(leading: &[(&str, &str, &str, Value)], following: &[(&str, &str, &str, Value)]) -> (State, State) {
    let with = |own: &[(&'static str, &'static str, &'static str, Value)], more: &[(&str, &str, &str, Value)]| {
        let all: Vec<(&str, &str, &str, Value)> = own.iter().cloned().chain(more.iter().cloned()).collect();
        room(&all)
    };
    let rest = |bot: Value| {
        vec![
            ("m.room.create", "", BOT, json!({"room_version": "11"})),
            (
                POWER_LEVELS,
                "",
                BOT,
                json!({"users": {BOT: bot}, "events": {"m.room.encryption": super::super::power::BOT_LEVEL}}),
            ),
            ("m.room.join_rules", "", BOT, json!({"join_rule": "public"})),
            ("m.room.history_visibility", "", BOT, json!({"history_visibility": "shared"})),
            (MEMBER, BOT, BOT, json!({"membership": "join"})),
        ]
    };
    let mut followed = rest(json!(9_000));
    followed[1].3 = json!({"users": {BOT: 9_000}, "events": {}});
    (with(&rest(json!(8_000)), leading), with(&followed, following))
}

fn media() -> MediaNames {
    MediaNames::new(server_name!("g").to_owned(), &[7; 32])
}

fn fixes(leading: &[(&str, &str, &str, Value)], following: &[(&str, &str, &str, Value)]) -> Vec<Fix> {
    let (leading, following) = rooms(leading, following);
    plan(&Plan {
        authority: Side::Matrix,
        owns_leading: true,
        lets_in: true,
        replaceable: true,
        leading: &leading,
        following: &following,
        leading_users: &users(Side::Matrix),
        following_users: &users(Side::Lm),
        bot: user_id!("@isthmus:g"),
        media: &media(),
        pins: &Counterparts::new(),
        aliases: Aliases { own: server_name!("g"), homeserver: None, address: None },
        spared: &|_, _| false,
        denied: &|_, user| user.server_name() == "denied.example",
        barred: &|_, user| user.server_name() == "denied.example",
        now_ms: 5,
    })
}

/// Side, sender, type or membership, state key.
fn brief(fixes: &[Fix]) -> Vec<(&'static str, String, String, String)> {
    fixes
        .iter()
        .map(|fix| {
            let draft = &fix.draft;
            let marked = &draft.content[REPAIR];
            assert!(*marked == json!(true) || marked["event_id"].is_string(), "{marked}");
            let what = draft.content.get("membership").and_then(Value::as_str).unwrap_or(&draft.kind);
            (fix.side.as_str(), draft.sender.to_string(), what.to_owned(), draft.state_key.clone().unwrap_or_default())
        })
        .collect()
}

fn fix(side: &'static str, sender: &str, what: &str, state_key: &str) -> (&'static str, String, String, String) {
    (side, sender.to_owned(), what.to_owned(), state_key.to_owned())
}

fn is(membership: &str) -> Value {
    json!({ "membership": membership })
}

#[test]
fn rooms_in_step_need_no_repair() {
    let alice = [(MEMBER, "@alice:h", "@alice:h", is("join")), (MEMBER, "@lm_bob_l:g", "@lm_bob_l:g", is("join"))];
    let ghosts = [(MEMBER, "@mx_alice_h:g", "@mx_alice_h:g", is("join")), (MEMBER, "@bob:l", "@bob:l", is("join"))];
    assert_eq!(brief(&fixes(&alice, &ghosts)), []);
    let name = [("m.room.name", "", "@alice:h", json!({"name": "Tea"}))];
    let image = [("m.room.name", "", "@mx_alice_h:g", json!({"name": "Tea", "im.isthmus.source": {}}))];
    assert_eq!(brief(&fixes(&name, &image)), []);
}

#[test]
fn hc_45_state_is_set_to_what_the_authority_has() {
    let name = |name: &str| [("m.room.name", "", BOT, json!({ "name": name }))];
    let found = fixes(&name("Tea"), &name("Coffee"));
    assert_eq!(brief(&found), [fix("lm", BOT, "m.room.name", "")]);
    assert_eq!(found[0].draft.content["name"], json!("Tea"));
    let found = fixes(&[], &name("Coffee"));
    assert_eq!(found[0].draft.content["name"], json!(""));
    assert_eq!(brief(&fixes(&[], &name(""))), []);
    let rule = [("m.room.join_rules", "", BOT, json!({"join_rule": "restricted"}))];
    assert_eq!(fixes(&rule, &[])[0].draft.content["join_rule"], json!("invite"));
}

#[test]
fn a_repair_says_from_which_event_of_the_room_across_it_follows() {
    let alice = [(MEMBER, "@alice:h", "@alice:h", is("leave")), ("m.room.name", "", BOT, json!({ "name": "Tea" }))];
    let ghost = "@mx_alice_h:g";
    let there = [(MEMBER, ghost, ghost, is("join")), (MEMBER, "@bob:l", "@bob:l", is("join"))];
    let (leading, following) = rooms(&alice, &there);
    let found = fixes(&alice, &there);
    assert_eq!(found.len(), 3, "{found:?}");
    for fix in found {
        let (kind, key) = (fix.draft.kind.as_str(), fix.draft.state_key.as_deref().unwrap());
        let of = match (kind, key) {
            (MEMBER, "@lm_bob_l:g") => following.member(user_id!("@bob:l")),
            (MEMBER, _) => leading.member(user_id!("@alice:h")),
            _ => leading.get(kind, ""),
        };
        assert_eq!(fix.draft.content[REPAIR], json!({ "event_id": of.unwrap().event_id }), "{fix:?}");
    }
    // Nothing is there from which it follows.
    let found = fixes(&[], &[("m.room.name", "", BOT, json!({ "name": "Tea" })), (MEMBER, ghost, ghost, is("join"))]);
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found.iter().all(|fix| fix.draft.content[REPAIR] == json!(true)), "{found:?}");
}

#[test]
fn members_follow_the_authority_as_far_as_the_gateway_can() {
    let alice = |membership: &str| [(MEMBER, "@alice:h", "@alice:h", is(membership))];
    let alice_ghost = |membership: &str, by: &'static str| [(MEMBER, "@mx_alice_h:g", by, is(membership))];
    let bob = |membership: &str| [(MEMBER, "@bob:l", "@bob:l", is(membership))];
    let bob_ghost = |membership: &str, by: &'static str| [(MEMBER, "@lm_bob_l:g", by, is(membership))];
    let ghost = "@mx_alice_h:g";
    for (leading, following, expected) in [
        (&alice("join")[..], &[][..], vec![fix("lm", ghost, "join", ghost)]),
        (&alice("leave"), &alice_ghost("join", ghost), vec![fix("lm", ghost, "leave", ghost)]),
        (&alice("ban"), &alice_ghost("join", ghost), vec![fix("lm", BOT, "ban", ghost)]),
        (&alice("leave"), &alice_ghost("ban", BOT), vec![fix("lm", BOT, "leave", ghost)]),
        (&[], &alice_ghost("join", ghost), vec![fix("lm", ghost, "leave", ghost)]),
        // A resolution has taken her join back, and left her invite or her knock.
        (&alice("invite"), &alice_ghost("join", ghost), vec![fix("lm", ghost, "leave", ghost)]),
        (&alice("knock"), &alice_ghost("join", ghost), vec![fix("lm", ghost, "leave", ghost)]),
        (&alice("invite"), &alice_ghost("invite", BOT), vec![]),
        (&[], &alice_ghost("leave", ghost), vec![]),
        // Nor is anybody banned whom the authority does not ban.
        (&[], &alice_ghost("ban", BOT), vec![fix("lm", BOT, "leave", ghost)]),
        (&alice("invite"), &alice_ghost("ban", BOT), vec![fix("lm", BOT, "leave", ghost)]),
        // The authority has removed Bob's ghost: Bob goes. Bob is there and his ghost not yet: it joins.
        (&bob_ghost("ban", "@alice:h"), &bob("join"), vec![fix("lm", BOT, "ban", "@bob:l")]),
        (&bob_ghost("leave", "@alice:h"), &bob("join"), vec![fix("lm", BOT, "leave", "@bob:l")]),
        (&bob_ghost("leave", "@lm_bob_l:g"), &bob("join"), vec![fix("matrix", "@lm_bob_l:g", "join", "@lm_bob_l:g")]),
        (&bob_ghost("knock", "@lm_bob_l:g"), &bob("join"), vec![fix("matrix", "@lm_bob_l:g", "join", "@lm_bob_l:g")]),
        (&[], &bob("join"), vec![fix("matrix", "@lm_bob_l:g", "join", "@lm_bob_l:g")]),
        // A join is never forged: the ghost of one who is not there leaves.
        (&bob_ghost("join", "@lm_bob_l:g"), &bob("leave"), vec![fix("matrix", "@lm_bob_l:g", "leave", "@lm_bob_l:g")]),
        (&bob_ghost("join", "@lm_bob_l:g"), &bob("invite"), vec![fix("matrix", "@lm_bob_l:g", "leave", "@lm_bob_l:g")]),
        (&bob_ghost("join", "@lm_bob_l:g"), &bob("join"), vec![]),
        (&bob_ghost("invite", "@alice:h"), &bob("invite"), vec![]),
    ] {
        assert_eq!(brief(&fixes(leading, following)), expected, "{leading:?} {following:?}");
    }
    // Who is kept out by the policy is kicked, also where the gateway made both rooms.
    let eve = [(MEMBER, "@eve:denied.example", "@eve:denied.example", is("join"))];
    assert_eq!(brief(&fixes(&eve, &[])), [fix("matrix", BOT, "leave", "@eve:denied.example")]);
    let found = fixes(&[], &bob("join"));
    assert_eq!(found[0].instead.as_ref().map(|draft| draft.sender.as_str()), Some(BOT), "who may not join is kicked");
    let banned = fixes(&alice("join"), &alice_ghost("ban", BOT));
    assert_eq!(banned[0].before.len(), 1, "the ban is taken back first");
}

#[test]
fn what_closes_the_following_room_alone_is_taken_back() {
    let closed = |by: &'static str, content: Value| (TOMBSTONE, "", by, content);
    let moved = || json!({ "body": "moved", "replacement_room": "!x:l" });
    let taken_back = fixes(&[], &[closed("@bob:l", moved())]);
    assert_eq!(brief(&taken_back), [fix("lm", "@isthmus:g", TOMBSTONE, "")]);
    // Not by the bot itself, nor twice, nor where the other room is closed too.
    assert!(fixes(&[], &[closed("@isthmus:g", moved())]).is_empty());
    assert!(fixes(&[], &[closed("@bob:l", json!({}))]).is_empty());
    assert!(fixes(&[closed("@alice:h", moved())], &[closed("@bob:l", moved())]).is_empty());
}
