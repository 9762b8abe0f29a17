//! Users of another server join, leave, knock and are invited through the gateway.

use isthmus::event::RoomVersion;
use isthmus::identity::Side;
use isthmus::seam::{Membership, Stage};
use serde_json::json;

use super::peer::{Peer, own};
use super::*;

#[tokio::test]
async fn a_server_joins_speaks_and_leaves() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    for version in VERSIONS {
        let room = gateway.room(version, "public").await;
        let alice = peer.user("alice");
        let mut view = peer.join(&gateway, &room, &alice).await.unwrap();
        let join = view.tips[0].clone();
        assert_eq!(view.state.len(), 6, "{:?}", view.state);
        let (hello, event) = view.say(&peer, &alice, "hello");
        assert!(peer.put(&gateway.dag, &[&event]).await[0].result.is_ok());
        assert_eq!(gateway.inbox(&room).await, [join.clone(), hello.clone()]);
        let stages: Vec<Stage> = gateway.between.gates.lock().unwrap().drain(..).map(|h| h.stage).collect();
        assert_eq!(stages, [Stage::Make, Stage::Send]);
        // The same again changes nothing.
        assert!(peer.put(&gateway.dag, &[&event]).await[0].result.is_ok());
        assert_eq!(gateway.inbox(&room).await.len(), 2);

        let reply = gateway.send(&room, message(&bot(), "hi")).await.unwrap();
        assert_eq!(gateway.dag.event(&reply).await.unwrap().unwrap().prev_events, [hello]);
        assert!(gateway.dag.joined(&room).await.unwrap().contains(&alice));
        let made = gateway.dag.make_leave(&peer.name, &room, &alice).await.unwrap();
        let (id, leave) = peer.sign(version, made["event"].clone());
        gateway.dag.send_leave(&peer.name, &room, &id, leave).await.unwrap();
        assert_eq!(gateway.membership(&room, &alice).await.as_deref(), Some("leave"));
        let refused = peer.join(&gateway, &room, &alice).await;
        assert!(refused.is_ok());
        gateway.between.gates.lock().unwrap().clear();
    }
}

#[tokio::test]
async fn who_joins_while_something_is_said_is_led_to_it() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    for version in VERSIONS {
        let room = gateway.room(version, "public").await;
        let alice = peer.user("alice");
        let versions = [version.as_str().to_owned()];
        let made = gateway.dag.make_join(&peer.name, &room, &alice, &versions).await.unwrap();
        let said = gateway.send(&room, message(&bot(), "meanwhile")).await.unwrap();
        let (join_id, join) = peer.sign(version, made["event"].clone());
        gateway.dag.send_join(&peer.name, &room, &join_id, join, false).await.unwrap();
        // Both branches end in one event, of which the newcomer hears.
        let next = gateway.send(&room, message(&bot(), "next")).await.unwrap();
        let tie = gateway.dag.event(&next).await.unwrap().unwrap().prev_events.clone();
        let [tie] = tie.as_slice() else { panic!("{tie:?}") };
        let mut tied = gateway.dag.event(tie).await.unwrap().unwrap().prev_events.clone();
        tied.sort();
        let mut branches = [said, join_id.clone()];
        branches.sort();
        assert_eq!(tied, branches);
        // What it is led to it may ask for.
        let body = json!({ "earliest_events": [join_id], "latest_events": [tie], "limit": 10, "min_depth": 1000 });
        let missing = gateway.dag.get_missing_events(&peer.name, &room, object(body)).await.unwrap();
        let contents: Vec<_> =
            missing["events"].as_array().unwrap().iter().map(|event| &event["content"]["body"]).collect();
        assert!(contents.contains(&&json!("meanwhile")), "{missing}");
    }
}

#[tokio::test]
async fn a_large_room_is_joined_without_its_members_first() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    let room = gateway.room(RoomVersion::V12, "public").await;
    let count = |value: &serde_json::Value, key: &str| value[key].as_array().unwrap().len();
    let [alice, early] = ["alice", "early"].map(|name| peer.user(name));
    // Where there are few they are there at once, so that nothing has to be had later.
    let made = gateway.dag.make_join(&peer.name, &room, &early, &["12".to_owned()]).await.unwrap();
    let (id, join) = peer.sign(RoomVersion::V12, made["event"].clone());
    let whole = gateway.dag.send_join(&peer.name, &room, &id, join, true).await.unwrap();
    assert_eq!((&whole["members_omitted"], &whole["servers_in_room"]), (&json!(false), &json!(null)));
    assert_eq!(count(&whole, "state"), 5);
    for number in 0..200 {
        let user = ghost(&format!("u{number}"));
        let join = draft(&user, "m.room.member", Some(user.as_str()), json!({ "membership": "join" }));
        gateway.send(&room, join).await.unwrap();
    }
    let made = gateway.dag.make_join(&peer.name, &room, &alice, &["12".to_owned()]).await.unwrap();
    let (id, join) = peer.sign(RoomVersion::V12, made["event"].clone());
    let partial = gateway.dag.send_join(&peer.name, &room, &id, join.clone(), true).await.unwrap();
    assert_eq!(partial["members_omitted"], true);
    assert_eq!(partial["servers_in_room"].as_array().unwrap().len(), 2);
    assert_eq!(count(&partial, "state"), 4);
    let ids = gateway.dag.get_state(&peer.name, &room, &id, true).await.unwrap();
    assert_eq!(count(&ids, "pdu_ids"), 206);
    let whole = gateway.dag.get_state(&peer.name, &room, &id, false).await.unwrap();
    assert_eq!(count(&whole, "pdus"), 206);
    // Asked again, it answers again, and the other side is not asked again.
    let again = gateway.dag.send_join(&peer.name, &room, &id, join, false).await.unwrap();
    assert_eq!(count(&again, "state"), 206);
    assert_eq!(gateway.between.gates.lock().unwrap().len(), 4);
}

#[tokio::test]
async fn the_other_side_can_refuse() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    let room = gateway.room(RoomVersion::V12, "public").await;
    let alice = peer.user("alice");
    let made = gateway.dag.make_join(&peer.name, &room, &alice, &["12".to_owned()]).await.unwrap();
    let why = Refusal::LmRule { rule: "4.3", problem: "not there".to_owned() };
    *gateway.between.closed.lock().unwrap() = Some(why);
    let (id, join) = peer.sign(RoomVersion::V12, made["event"].clone());
    let refused = gateway.dag.send_join(&peer.name, &room, &id, join, false).await.unwrap_err();
    assert_eq!(refused.code(), "lm_rule");
    assert_eq!(gateway.membership(&room, &alice).await, None);
    assert!(gateway.inbox(&room).await.is_empty());
    assert!(gateway.dag.make_join(&peer.name, &room, &alice, &["12".to_owned()]).await.is_err());
}

#[tokio::test]
async fn who_may_not_join_is_told_so_before_the_other_side_is_asked() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    let alice = peer.user("alice");
    let versions = ["11".to_owned(), "12".to_owned()];
    let closed = gateway.room(RoomVersion::V12, "invite").await;
    let open = gateway.room(RoomVersion::V11, "public").await;
    let old = gateway.room(RoomVersion::V10, "public").await;
    let ban = state("m.room.member", alice.as_str(), json!({ "membership": "ban" }));
    gateway.send(&open, ban).await.unwrap();
    let restricted = json!({ "join_rule": "restricted",
        "allow": [{ "type": "m.room_membership", "room_id": open }] });
    let restricted = gateway.room_with(RoomVersion::V12, vec![state("m.room.join_rules", "", restricted)]).await;
    for (room, code) in [
        (&closed, "matrix_rule"),
        (&open, "matrix_rule"),
        (&restricted, "unable_to_authorise_join"),
        (&old, "incompatible_room_version"),
    ] {
        let refused = gateway.dag.make_join(&peer.name, room, &alice, &versions).await.unwrap_err();
        assert_eq!(refused.code(), code, "{refused}");
    }
    // So the joining server knows that it may ask others. Who is banned may not.
    let refused = gateway.dag.make_join(&peer.name, &restricted, &alice, &versions).await.unwrap_err();
    assert_eq!((refused.errcode(), refused.status().as_u16()), ("M_UNABLE_TO_AUTHORISE_JOIN", 400));
    assert!(refused.to_string().contains("restricted") && refused.to_string().contains(alice.as_str()), "{refused}");
    gateway.send(&restricted, state("m.room.member", alice.as_str(), json!({ "membership": "ban" }))).await.unwrap();
    let refused = gateway.dag.make_join(&peer.name, &restricted, &alice, &versions).await.unwrap_err();
    assert_eq!(refused.code(), "matrix_rule", "{refused}");
    let other: OwnedUserId = "@alice:other.example".try_into().unwrap();
    let refused = gateway.dag.make_join(&peer.name, &open, &other, &versions).await.unwrap_err();
    assert_eq!(refused.code(), "forbidden");
    let unknown = RoomId::parse("!unknown:x").unwrap();
    assert_eq!(
        gateway.dag.make_join(&peer.name, &unknown, &alice, &versions).await.unwrap_err().code(),
        "unknown_room"
    );
    assert!(gateway.between.gates.lock().unwrap().is_empty());
}

#[tokio::test]
async fn hc_38_a_template_that_was_changed_is_refused() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    let room = gateway.room(RoomVersion::V12, "public").await;
    let elsewhere = gateway.room(RoomVersion::V12, "public").await;
    let alice = peer.user("alice");
    let made = gateway.dag.make_join(&peer.name, &room, &alice, &["12".to_owned()]).await.unwrap();
    let cases = [
        ("sender", json!("@mallory:other.example")),
        ("state_key", json!(peer.user("mallory"))),
        ("type", json!("m.room.message")),
        ("room_id", json!(elsewhere)),
        ("content", json!({ "membership": "leave" })),
        ("content", json!({ "membership": "invite" })),
        ("content", json!({ "membership": "join", "join_authorised_via_users_server": bot() })),
        ("auth_events", json!([])),
        ("prev_events", json!([])),
        ("depth", json!(-1)),
        ("origin_server_ts", json!(-1)),
    ];
    for (field, value) in cases {
        let mut event = made["event"].clone();
        event[field] = value;
        let (id, event) = peer.sign(RoomVersion::V12, event);
        let refused = gateway.dag.send_join(&peer.name, &room, &id, event, false).await;
        assert!(refused.is_err(), "{field}");
    }
    let (_, event) = peer.sign(RoomVersion::V12, made["event"].clone());
    let (other, _) = peer.sign(
        RoomVersion::V12,
        json!({ "type": "x", "content": {}, "sender": alice,
        "room_id": room, "depth": 1, "prev_events": [], "auth_events": [], "origin_server_ts": 1 }),
    );
    assert!(gateway.dag.send_join(&peer.name, &room, &other, event, false).await.is_err());
    assert_eq!(gateway.membership(&room, &alice).await, None);
}

#[tokio::test]
async fn hc_39_a_banned_user_cannot_join_with_an_old_template() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    let room = gateway.room(RoomVersion::V11, "public").await;
    let alice = peer.user("alice");
    let made = gateway.dag.make_join(&peer.name, &room, &alice, &["11".to_owned()]).await.unwrap();
    let (id, event) = peer.sign(RoomVersion::V11, made["event"].clone());
    gateway.send(&room, state("m.room.member", alice.as_str(), json!({ "membership": "ban" }))).await.unwrap();
    let refused = gateway.dag.send_join(&peer.name, &room, &id, event, false).await.unwrap_err();
    assert_eq!(refused.code(), "matrix_rule");
    assert_eq!(gateway.membership(&room, &alice).await.as_deref(), Some("ban"));
}

#[tokio::test]
async fn a_knock_is_taken_and_answered_with_the_rooms_face() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    let room = gateway.room(RoomVersion::V11, "knock").await;
    let alice = peer.user("alice");
    let made = gateway.dag.make_knock(&peer.name, &room, &alice, &["11".to_owned()]).await.unwrap();
    let (id, event) = peer.sign(RoomVersion::V11, made["event"].clone());
    let answer = gateway.dag.send_knock(&peer.name, &room, &id, event).await.unwrap();
    assert!(answer["knock_room_state"].as_array().unwrap().iter().any(|event| event["type"] == "m.room.create"));
    assert_eq!(gateway.membership(&room, &alice).await.as_deref(), Some("knock"));
}

#[tokio::test]
async fn an_invite_into_a_room_that_is_here_is_judged_before_it_is_signed() {
    let (peer, stranger) = (Peer::start("peer.example").await, Peer::start("stranger.example").await);
    let gateway = Gateway::start(&[&peer, &stranger]).await;
    for version in VERSIONS {
        let room = gateway.room(version, "public").await;
        let view = peer.join(&gateway, &room, &peer.user("alice")).await.unwrap();
        let bob = ghost("bob");
        let invite = async |from: &Peer, user: &OwnedUserId| {
            let event = view.next(user, "m.room.member", Some(bob.as_str()), json!({ "membership": "invite" }));
            let (id, event) = from.sign(version, event);
            let body = object(json!({ "room_version": version.as_str(), "event": event, "invite_room_state": [] }));
            gateway.dag.invited(&from.name, &room, &id, body).await
        };
        let refused = invite(&stranger, &stranger.user("mallory")).await.unwrap_err();
        assert_eq!(refused.code(), "matrix_rule", "{refused}");
        assert!(gateway.between.invites.lock().unwrap().is_empty());
        let answer = invite(&peer, &peer.user("alice")).await.unwrap();
        assert!(answer["event"]["signatures"].get(OWN).is_some());
        assert_eq!(gateway.between.invites.lock().unwrap().pop().unwrap().target, bob);
        assert_eq!(gateway.dag.decline(&room, &bob, None).await.unwrap_err().code(), "not_found", "it is kept twice");
    }
}

#[tokio::test]
async fn a_user_of_the_gateway_is_invited_elsewhere() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    let bob = ghost("bob");
    let room: OwnedRoomId = "!there:peer.example".try_into().unwrap();
    let template = json!({ "type": "m.room.member", "sender": peer.user("alice"), "state_key": bob, "room_id": room,
        "content": { "membership": "invite" }, "depth": 5, "origin_server_ts": NOW,
        "prev_events": [format!("${}", "a".repeat(43))], "auth_events": [format!("${}", "b".repeat(43))] });
    let (id, event) = peer.sign(RoomVersion::V11, template.clone());
    let body = |version: &str, event: &Object| {
        object(json!({ "room_version": version, "event": event, "invite_room_state": [{ "type": "m.room.name" }, 7] }))
    };
    let answer = gateway.dag.invited(&peer.name, &room, &id, body("11", &event)).await.unwrap();
    assert!(answer["event"]["signatures"].get(OWN).is_some());
    assert!(answer["event"]["signatures"].get(peer.name.as_str()).is_some());
    let invite = gateway.between.invites.lock().unwrap().pop().unwrap();
    assert_eq!((invite.side, invite.target, invite.stripped_state.len()), (Side::Matrix, bob, 1));

    // The ghost declines: its leave is made where the invite came from.
    peer.memory.leaves.lock().unwrap().clear();
    gateway.dag.decline(&room, &ghost("bob"), Some("encrypted")).await.unwrap();
    let leave = peer.memory.leaves.lock().unwrap().pop().unwrap();
    assert_eq!(leave["content"], json!({ "membership": "leave", "reason": "encrypted" }));
    assert_eq!((&leave["sender"], &leave["depth"]), (&json!(ghost("bob")), &json!(7)));
    assert!(leave["signatures"].get(OWN).is_some());
    assert_eq!(gateway.dag.decline(&room, &ghost("bob"), None).await.unwrap_err().code(), "not_found");

    for (field, value) in [
        ("state_key", json!("@bob:elsewhere.example")),
        ("sender", json!("@alice:elsewhere.example")),
        ("content", json!({ "membership": "join" })),
        ("room_id", json!("!other:peer.example")),
    ] {
        let mut changed = template.clone();
        changed[field] = value;
        let (id, event) = peer.sign(RoomVersion::V11, changed);
        assert!(gateway.dag.invited(&peer.name, &room, &id, body("11", &event)).await.is_err(), "{field}");
    }
    for version in ["99", "I.1", ""] {
        let refused = gateway.dag.invited(&peer.name, &room, &id, body(version, &event)).await.unwrap_err();
        assert_eq!(refused.code(), "incompatible_room_version");
    }
    let mut forged = event.clone();
    forged["signatures"][peer.name.as_str()][peer.key.id()] = json!("AAAA");
    assert!(gateway.dag.invited(&peer.name, &room, &id, body("11", &forged)).await.is_err());
    assert!(gateway.between.invites.lock().unwrap().is_empty());
    assert_ne!(own(), peer.name);
    assert_eq!(Membership::parse("invite"), Some(Membership::Invite));
}

#[tokio::test]
async fn hc_24_of_a_malformed_stripped_state_is_kept_what_can_be_and_no_more() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    let room: OwnedRoomId = "!there:peer.example".try_into().unwrap();
    let odd = json!([null, 1, "x", [], {}, { "type": 7, "state_key": [], "content": "x", "sender": null }]);
    let long = Value::Array(vec![json!({ "type": "m.room.name", "content": { "name": "x" } }); 1_000]);
    for (index, (stripped, kept)) in
        [(json!(null), 0), (json!("x"), 0), (json!({ "type": "m.room.create" }), 0), (odd, 2), (long, 100)]
            .into_iter()
            .enumerate()
    {
        let bob = ghost(&format!("bob{index}"));
        let template = json!({ "type": "m.room.member", "sender": peer.user("alice"), "state_key": bob,
            "room_id": room, "content": { "membership": "invite" }, "depth": 5, "origin_server_ts": NOW,
            "prev_events": [format!("${}", "a".repeat(43))], "auth_events": [format!("${}", "b".repeat(43))] });
        let (id, event) = peer.sign(RoomVersion::V11, template);
        let body = json!({ "room_version": "11", "event": event, "invite_room_state": stripped });
        gateway.dag.invited(&peer.name, &room, &id, object(body)).await.unwrap();
        let invite = gateway.between.invites.lock().unwrap().pop().unwrap();
        assert_eq!((invite.target, invite.stripped_state.len()), (bob, kept));
    }
}
