//! What a participant takes from a hub that misbehaves: what is forged or not allowed is not taken, and is remembered.

use isthmus::event::{Completion, Lpdu, Object, Pdu, VerifyKey, VerifyKeys};
use isthmus::identity::{SigningKey, Validity};
use isthmus::lm::Appended;
use isthmus::refusal::Refusal;
use isthmus::seam::{Draft, Received};
use ruma::{OwnedEventId, OwnedRoomId, RoomId};
use serde_json::{Value, json};

use super::world::{Node, World, bodies, draft, ids, member, message, raw};

pub async fn room_of(hub: &Node, part: &Node) -> OwnedRoomId {
    let room = hub.create_room("public").await;
    part.join(&room, "alice", hub).await;
    room
}

pub async fn give(part: &Node, origin: &Node, event: &Object) -> Received {
    part.lm.receive(&origin.name, vec![raw(event)]).await.pop().unwrap()
}

async fn complaints(part: &Node, room: &RoomId) -> Vec<String> {
    part.lm.room(room).await.unwrap().unwrap().complaints
}

/// An event as the hub could make it of anything, on the end of its log.
pub fn finished(hub: &Node, room: &RoomId, log: &[Appended], draft: &Draft, auth: &[&str]) -> Pdu {
    let named = |kind: &&str| log.iter().rev().find(|event| event.event.kind == **kind).unwrap().event.event_id.clone();
    let completion = Completion {
        auth_events: auth.iter().map(named).collect(),
        prev_event: Some(log.last().unwrap().event.event_id.clone()),
    };
    let template = template(room, draft);
    Pdu::build(template, completion, &hub.name, &hub.context.signing_key).unwrap()
}

fn template(room: &RoomId, draft: &Draft) -> Object {
    let mut template = json!({
        "type": draft.kind,
        "room_id": room,
        "sender": draft.sender,
        "content": draft.content,
        "origin_server_ts": draft.origin_server_ts,
    });
    if let Some(state_key) = &draft.state_key {
        template["state_key"] = json!(state_key);
    }
    template.as_object().unwrap().clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forged_event_is_dropped_and_complained_of() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = room_of(&hub, &part).await;
    let log = hub.log(&room).await;
    // In the name of the participant's user, with the hub's signature alone.
    let draft = message(&part.user("alice"), "forged");
    let forged = finished(&hub, &room, &log, &draft, &["m.room.create", "m.room.power_levels", "m.room.member"]);
    let refused = give(&part, &hub, &forged.json).await;
    assert!(matches!(refused.result, Err(Refusal::BadSignature { .. })), "{refused:?}");
    assert_eq!(bodies(&part.log(&room).await), Vec::<String>::new());
    assert_eq!(complaints(&part, &room).await.len(), 1);
    // An event's ID does not cover its signatures: with the right ones it is another matter.
    let draft = message(&hub.user("bot"), "good");
    let good = finished(&hub, &room, &log, &draft, &["m.room.create", "m.room.power_levels"]);
    let mut bad = good.json.clone();
    bad["signatures"]["hub.example"] = forged.json["signatures"]["hub.example"].clone();
    let refused = give(&part, &hub, &bad).await;
    assert!(matches!(refused.result, Err(Refusal::BadSignature { .. })), "{refused:?}");
    assert_eq!(give(&part, &hub, &good.json).await.result, Ok(()));
    assert_eq!(bodies(&part.log(&room).await), ["good"]);
    // Signed with a key that is not the hub's.
    let other = SigningKey::generate();
    let completion = Completion { auth_events: Vec::new(), prev_event: None };
    let draft = message(&hub.user("bot"), "other key");
    let forged = Pdu::build(template(&room, &draft), completion, &hub.name, &other).unwrap();
    assert!(give(&part, &hub, &forged.json).await.result.is_err());
    assert_eq!(bodies(&part.log(&room).await), ["good"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_41_an_event_that_the_rules_forbid_is_not_taken_and_complained_of() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = room_of(&hub, &part).await;
    let log = hub.log(&room).await;
    let bot = hub.user("bot");
    let create_levels_member = ["m.room.create", "m.room.power_levels", "m.room.member"];
    let ghost = message(&hub.user("ghost"), "I never joined");
    let not_joined = finished(&hub, &room, &log, &ghost, &["m.room.create", "m.room.power_levels"]);
    let no_create = finished(&hub, &room, &log, &message(&bot, "x"), &["m.room.power_levels"]);
    let rules = finished(&hub, &room, &log, &message(&bot, "x"), &["m.room.create", "m.room.join_rules"]);
    let mut unknown = finished(&hub, &room, &log, &message(&bot, "x"), &create_levels_member);
    let completion = Completion {
        auth_events: vec![OwnedEventId::try_from(format!("${}", "a".repeat(43))).unwrap()],
        prev_event: Some(log.last().unwrap().event.event_id.clone()),
    };
    unknown = Pdu::build(unknown.json, completion, &hub.name, &hub.context.signing_key).unwrap();
    for (event, number) in [(not_joined, "6"), (no_create, "4.3"), (rules, "4.2"), (unknown, "4.2")] {
        let refused = give(&part, &hub, &event.json).await;
        assert!(matches!(&refused.result, Err(Refusal::LmRule { rule, .. }) if *rule == number), "{refused:?}");
        // Sent again it is known, and nothing more is made of it.
        assert_eq!(give(&part, &hub, &event.json).await.result, Ok(()));
    }
    assert_eq!(bodies(&part.log(&room).await), Vec::<String>::new());
    assert_eq!(part.fault_kinds(&room).await, ["forbidden"; 4]);
    // What follows is taken, though it stands on what was not.
    hub.say(&room, "bot", "honest").await;
    part.wait_for_body(&room, "honest").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_30_a_hub_that_changes_what_it_finishes_is_found_out() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = room_of(&hub, &part).await;
    part.say(&room, "alice", "mine").await;
    let log = hub.wait_for_body(&room, "mine").await;
    let echo = log.last().unwrap().event.clone();
    part.wait_for_body(&room, "mine").await;
    // The same LPDU with other content: the sender's signature still holds, its hash does not.
    let lpdu = part.lpdu(&room, &hub.name, &message(&part.user("alice"), "original"));
    let mut json = lpdu.json.clone();
    json["content"]["body"] = json!("changed by the hub");
    json.insert("auth_events".to_owned(), json!(echo.auth_events));
    json.insert("prev_events".to_owned(), json!([echo.event_id]));
    let hash = isthmus::event::content_hash(&json);
    json["hashes"]["sha256"] = json!(hash);
    let mut signed = isthmus::event::redact(&json, isthmus::event::Redaction::Draft);
    isthmus::event::sign_object(&mut signed, hub.name.as_str(), &hub.context.signing_key);
    json.insert("signatures".to_owned(), signed["signatures"].clone());
    assert_eq!(give(&part, &hub, &json).await.result, Ok(()));
    let taken = part.log(&room).await.pop().unwrap();
    assert_eq!(taken.event.lpdu_id.as_ref(), Some(&lpdu.lpdu_id));
    assert_eq!(taken.event.content(), &Object::new(), "only the redacted copy is kept");
    assert_eq!(part.fault_kinds(&room).await, ["rewritten"]);
    // A field that the hub adds, changed after it signed.
    let mut tampered = echo.json.clone();
    tampered["prev_events"] = json!([]);
    let refused = give(&part, &hub, &tampered).await;
    assert!(matches!(refused.result, Err(Refusal::BadSignature { .. })), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_18_a_hub_that_puts_into_its_log_what_is_no_event_is_found_out() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = room_of(&hub, &part).await;
    let log = hub.log(&room).await;
    let auth = ["m.room.create", "m.room.power_levels", "m.room.member"];
    let mut large = finished(&hub, &room, &log, &message(&hub.user("bot"), "large"), &auth).json;
    large["content"]["body"] = json!("x".repeat(65_536));
    for _ in 0..2 {
        let given = give(&part, &hub, &large).await;
        assert!(!matches!(given.result, Err(ref refusal) if refusal.is_transient()), "{given:?}");
    }
    assert_eq!(part.fault_kinds(&room).await, ["forbidden"]);
    hub.say(&room, "bot", "fits").await;
    assert_eq!(bodies(&part.wait_for_body(&room, "fits").await), ["fits"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_31_an_event_finished_by_another_hub_is_refused() {
    let (_world, [hub, part, other]) = World::new(["hub.example", "part.example", "other.example"]).await;
    let room = room_of(&hub, &part).await;
    other.join(&room, "o", &hub).await;
    let log = hub.log(&room).await;
    part.wait(&room, "the join", |theirs| theirs.last().unwrap().event.event_id == log.last().unwrap().event.event_id)
        .await;
    // An LPDU that names another hub, finished by that one, and brought by the right one.
    let lpdu = part.lpdu(&room, &other.name, &message(&part.user("alice"), "astray"));
    let keys =
        part.context.keyring.keys_for_event(&lpdu.json, std::slice::from_ref(&part.name), Validity::Now).await.unwrap();
    let completion =
        Completion { auth_events: Vec::new(), prev_event: Some(log.last().unwrap().event.event_id.clone()) };
    let pdu = Pdu::complete(lpdu.verify(&keys).unwrap(), completion, &other.name, &other.context.signing_key).unwrap();
    let refused = give(&part, &hub, &pdu.json).await;
    assert!(matches!(refused.result, Err(Refusal::WrongHub { .. })), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_32_a_fork_is_taken_in_the_order_in_which_it_came_and_complained_of() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = room_of(&hub, &part).await;
    let log = hub.log(&room).await;
    let auth = ["m.room.create", "m.room.power_levels"];
    let bot_join = log[1].event.event_id.clone();
    for body in ["one", "two"] {
        let mut pdu = finished(&hub, &room, &log, &message(&hub.user("bot"), body), &auth);
        let mut auth_events = pdu.auth_events.clone();
        auth_events.push(bot_join.clone());
        let completion = Completion { auth_events, prev_event: pdu.prev_events.first().cloned() };
        pdu = Pdu::build(pdu.json, completion, &hub.name, &hub.context.signing_key).unwrap();
        assert_eq!(give(&part, &hub, &pdu.json).await.result, Ok(()));
    }
    assert_eq!(bodies(&part.log(&room).await), ["one", "two"]);
    assert_eq!(part.fault_kinds(&room).await, ["forked"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_33_only_the_hub_brings_events() {
    let (_world, [hub, part, spoke]) = World::new(["hub.example", "part.example", "spoke.example"]).await;
    let room = room_of(&hub, &part).await;
    spoke.join(&room, "s", &hub).await;
    hub.say(&room, "bot", "marker").await;
    part.wait_for_body(&room, "marker").await;
    let before = part.log(&room).await;
    // An LPDU that goes astray is dropped, a finished event is refused, whoever made it.
    let lpdu = spoke.lpdu(&room, &hub.name, &message(&spoke.user("s"), "to the wrong place")).json;
    assert_eq!(give(&part, &spoke, &lpdu).await.result, Ok(()));
    let log = hub.log(&room).await;
    let auth = ["m.room.create", "m.room.power_levels"];
    let pdu = finished(&hub, &room, &log, &message(&hub.user("bot"), "relayed"), &auth);
    let refused = give(&part, &spoke, &pdu.json).await;
    assert!(matches!(refused.result, Err(Refusal::WrongOrigin { .. })), "{refused:?}");
    assert_eq!(ids(&part.log(&room).await), ids(&before));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_35_what_the_hub_repeats_is_passed_over() {
    let (world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = room_of(&hub, &part).await;
    hub.say(&room, "bot", "once").await;
    let log = part.wait_for_body(&room, "once").await;
    let again: Vec<_> = log.iter().map(|event| raw(&event.event.json)).collect();
    assert!(part.lm.receive(&hub.name, again).await.iter().all(|received| received.result == Ok(())));
    let part = world.restart(part).await;
    let again: Vec<_> = log.iter().map(|event| raw(&event.event.json)).collect();
    assert!(part.lm.receive(&hub.name, again).await.iter().all(|received| received.result == Ok(())));
    assert_eq!(ids(&part.log(&room).await), ids(&log));
    assert_eq!(complaints(&part, &room).await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_that_names_what_allows_it_twice_is_refused() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = room_of(&hub, &part).await;
    hub.say(&room, "bot", "once").await;
    part.wait_for_body(&room, "once").await;
    let last = hub.log(&room).await.pop().unwrap().event;
    let auth_events = [last.auth_events.clone(), last.auth_events[1..].to_vec()].concat();
    let completion = Completion { auth_events, prev_event: Some(last.event_id.clone()) };
    let template = template(&room, &message(&hub.user("bot"), "twice"));
    let twice = Pdu::build(template, completion, &hub.name, &hub.context.signing_key).unwrap();
    let refused = give(&part, &hub, &twice.json).await.result;
    assert!(matches!(refused, Err(Refusal::LmRule { rule: "4.1", .. })), "{refused:?}");
    assert_eq!(bodies(&part.log(&room).await), ["once"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_37_what_is_sent_while_the_hub_is_silent_arrives_once_in_order() {
    let (world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = room_of(&hub, &part).await;
    part.context.outbound.stop().await;
    for number in 0..60 {
        part.say(&room, "alice", &number.to_string()).await;
    }
    assert_eq!(bodies(&hub.log(&room).await), Vec::<String>::new());
    let part = world.restart(part).await;
    let log = hub.wait(&room, "everything", |log| bodies(log).len() >= 60).await;
    let expected: Vec<String> = (0..60).map(|number: u32| number.to_string()).collect();
    assert_eq!(bodies(&log), expected);
    part.wait_for_body(&room, "59").await;
    assert_eq!(bodies(&part.log(&room).await), expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_of_another_server_is_not_sent_for() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = room_of(&hub, &part).await;
    for (node, draft) in [
        (&part, message(&hub.user("bot"), "x")),
        (&hub, message(&part.user("alice"), "x")),
        (&part, member(&hub.user("bot"), &hub.user("bot"), "leave")),
    ] {
        let refused = node.send(&room, draft).await;
        assert!(matches!(refused, Err(Refusal::WrongOrigin { .. })), "{refused:?}");
    }
}

/// An invite for one of our users is signed only when all of it is right.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_39_an_invite_is_signed_only_for_whom_it_may_be() {
    let (_world, [hub, part, evil]) = World::new(["hub.example", "part.example", "evil.example"]).await;
    let room = hub.create_room("invite").await;
    let log = hub.log(&room).await;
    let auth = ["m.room.create", "m.room.power_levels"];
    let alice = part.user("alice");
    let good = finished(&hub, &room, &log, &member(&hub.user("bot"), &alice, "invite"), &auth).json;
    let body = |event: &Object, version: &str| {
        let body = json!({ "event": event, "room_version": version, "invite_room_state": [1, {}, { "type": "x" }] });
        body.as_object().unwrap().clone()
    };
    const VERSION: &str = "org.matrix.i-d.ralston-mimi-linearized-matrix.02";
    let with = |key: &str, value: Value| {
        let mut event = good.clone();
        event.insert(key.to_owned(), value);
        event
    };
    let finish = |draft: &Draft| finished(&hub, &room, &log, draft, &auth).json;
    for (origin, body) in [
        (&evil, body(&good, VERSION)),
        (&hub, body(&good, "11")),
        (&hub, body(&good, "")),
        (&hub, body(&with("content", json!({ "membership": "invite", "reason": "changed" })), VERSION)),
        (&hub, body(&with("state_key", json!("@other:part.example")), VERSION)),
        (&hub, body(&finish(&member(&hub.user("bot"), &alice, "ban")), VERSION)),
        (&hub, body(&finish(&member(&hub.user("bot"), &evil.user("e"), "invite")), VERSION)),
        (&hub, body(&finish(&member(&part.user("p"), &alice, "invite")), VERSION)),
        (&hub, Object::new()),
    ] {
        let refused = part.lm.invited(&origin.name, body.clone()).await;
        assert!(refused.is_err(), "signed: {body:?}");
    }
    assert!(part.watcher.invites.lock().unwrap().is_empty());
    let signed = part.lm.invited(&hub.name, body(&good, VERSION)).await.unwrap();
    assert!(signed["signatures"].get("part.example").is_some());
    // Of a room that is known here, only the hub may ask: nobody else keeps that log.
    let room = room_of(&hub, &part).await;
    let made = member(&evil.user("e"), &part.user("bob"), "invite");
    let completion = Completion { auth_events: Vec::new(), prev_event: None };
    let forged = Pdu::build(template(&room, &made), completion, &evil.name, &evil.context.signing_key).unwrap();
    let refused = part.lm.invited(&evil.name, body(&forged.json, VERSION)).await.map(drop).unwrap_err();
    assert!(matches!(&refused, Refusal::WrongOrigin { expected, .. } if expected == "hub.example"), "{refused}");
}

/// Who makes others wait for a third server takes away nobody's place who does not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn invites_that_hang_hold_up_no_other_request() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("invite").await;
    let log = hub.log(&room).await;
    *part.watcher.before_signing.lock().unwrap() = Some(Box::new(|| Box::pin(std::future::pending())));
    let mut asking = tokio::task::JoinSet::new();
    for number in 0..60 {
        let invite = member(&hub.user("bot"), &part.user(&format!("user{number}")), "invite");
        let event = finished(&hub, &room, &log, &invite, &["m.room.create", "m.room.power_levels"]).json;
        let version = "org.matrix.i-d.ralston-mimi-linearized-matrix.02";
        let body = json!({ "event": event, "room_version": version, "invite_room_state": [] });
        let call = isthmus::federation::Call::post(
            format!("/_matrix/federation/v3/invite/{number}"),
            body.as_object().unwrap().clone(),
        );
        let (client, name) = (hub.context.client.clone(), part.name.clone());
        asking.spawn(async move { client.call(&name, call, false).await });
    }
    for _ in 0..10 {
        let refused = asking.join_next().await.unwrap().unwrap().unwrap_err();
        assert!(refused.to_string().contains("M_LIMIT_EXCEEDED"), "{refused}");
    }
    hub.get(&part, "/_matrix/federation/v1/query/profile?user_id=@user1:part.example").await.unwrap();
}

/// Has a hub answer joins with what a test makes of its answer.
fn change_join(hub: &Node, change: impl Fn(&mut Value) + Send + Sync + 'static) {
    let change = std::sync::Arc::new(change);
    hub.meddle(move |request, next| {
        let change = change.clone();
        async move {
            let is_join = request.uri().path().contains("/send_join/");
            let response = next.run(request).await;
            if !is_join {
                return response;
            }
            let body = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
            let mut answer = serde_json::from_slice(&body).unwrap();
            change(&mut answer);
            super::log_hub::respond(http::StatusCode::OK, answer)
        }
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_room_begins_with_an_event_that_follows_nothing() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    let first = hub.log(&room).await.remove(0).event;
    let before = OwnedEventId::try_from(format!("${}", "a".repeat(43))).unwrap();
    for (completion, what) in [
        (Completion { auth_events: Vec::new(), prev_event: Some(before.clone()) }, "prev_events"),
        (Completion { auth_events: vec![before.clone()], prev_event: None }, "auth_events"),
    ] {
        let create = draft(&first.sender, "m.room.create", Some(""), Value::Object(first.content().clone()));
        let create = Pdu::build(template(&room, &create), completion, &hub.name, &hub.context.signing_key).unwrap();
        let json = create.json.clone();
        change_join(&hub, move |answer| {
            for list in ["state", "auth_chain"] {
                for event in answer[list].as_array_mut().unwrap() {
                    if event["type"] == "m.room.create" {
                        *event = json!(json);
                    }
                }
            }
        });
        let joined = part.lm.join(&room, &part.user("alice"), std::slice::from_ref(&hub.name), Object::new()).await;
        let refusal = joined.map(drop).unwrap_err();
        assert!(refusal.to_string().contains(what), "{refusal}");
        assert!(part.lm.room(&room).await.unwrap().is_none(), "nothing of it is believed");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_state_that_comes_with_a_join_obeys_the_rules() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let user = hub.user("nobody");
    let create = json!({ "room_version": "org.matrix.i-d.ralston-mimi-linearized-matrix.02" });
    let levels = json!({ "users": { user.clone(): 100 } });
    let topic = json!({ "topic": "mine" });
    for (kind, content, fails) in
        [("m.room.create", create, true), ("m.room.power_levels", levels, true), ("m.room.topic", topic, false)]
    {
        let room = hub.create_room("public").await;
        hub.send(&room, member(&user, &user, "join")).await.unwrap();
        let log = hub.log(&room).await;
        let draft = draft(&user, kind, Some(""), content);
        // By somebody who is in the room and may not send such events.
        let auth: &[&str] = match kind {
            "m.room.create" => &[],
            _ => &["m.room.create", "m.room.power_levels", "m.room.member"],
        };
        let forbidden = finished(&hub, &room, &log, &draft, auth);
        let json = forbidden.json.clone();
        change_join(&hub, move |answer| answer["state"].as_array_mut().unwrap().push(json!(json)));
        let joined = part.lm.join(&room, &part.user("alice"), std::slice::from_ref(&hub.name), Object::new()).await;
        if fails {
            let refusal = joined.map(drop).unwrap_err();
            assert!(refusal.to_string().contains(kind), "{refusal}");
            assert!(part.lm.room(&room).await.unwrap().is_none(), "nothing of it is believed");
        } else {
            joined.unwrap();
            assert!(part.lm.state(&room).await.unwrap().get(kind, "").is_none());
            let complaints = complaints(&part, &room).await;
            assert!(
                complaints.iter().any(|complaint| complaint.contains(forbidden.event_id.as_str())),
                "{complaints:?}"
            );
            assert_eq!(part.fault_kinds(&room).await, ["forbidden"]);
        }
    }
}

/// What a join is answered with is that join, and one that the state which comes with it allows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_join_is_the_one_that_was_sent_and_is_allowed_by_the_state_that_comes_with_it() {
    let (_world, [hub, part, third]) = World::new(["hub.example", "part.example", "third.example"]).await;
    let via = std::slice::from_ref(&hub.name);
    let alice = part.user("alice");
    // Another's join, which is right in itself.
    let room = hub.create_room("public").await;
    let other = json!(third.join(&room, "carol", &hub).await.event.json);
    change_join(&hub, move |answer| answer["event"] = other.clone());
    let refusal = part.lm.join(&room, &alice, via, Object::new()).await.map(drop).unwrap_err();
    assert!(refusal.to_string().contains("was answered with another event"), "{refusal}");
    assert!(part.lm.room(&room).await.unwrap().is_none(), "nothing of it is believed");
    // The hub's own rules, by which nobody comes in without an invite.
    let room = hub.create_room("public").await;
    let log = hub.log(&room).await;
    let closed = draft(&hub.user("bot"), "m.room.join_rules", Some(""), json!({ "join_rule": "invite" }));
    let closed = finished(&hub, &room, &log, &closed, &["m.room.create", "m.room.power_levels", "m.room.member"]);
    let closed = json!(closed.json);
    change_join(&hub, move |answer| {
        let state = answer["state"].as_array_mut().unwrap();
        state.retain(|event| event["type"] != "m.room.join_rules");
        state.push(closed.clone());
    });
    let refusal = part.lm.join(&room, &alice, via, Object::new()).await.map(drop).unwrap_err();
    assert!(matches!(refusal, Refusal::LmRule { .. }), "{refusal}");
    assert!(part.lm.room(&room).await.unwrap().is_none(), "nothing of it is believed");
}

/// Who keeps a log is proved by who made the room, and by each hub that gave it on: whoever is in the room cannot say that it is the hub.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_room_is_not_joined_at_a_server_that_has_made_itself_the_hub() {
    let (_world, [hub, evil, part]) = World::new(["hub.example", "evil.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    evil.join(&room, "eve", &hub).await;
    let log = hub.log(&room).await;
    let change = draft(&evil.user("eve"), "m.room.hub", Some(""), json!({ "hub_server": evil.name }));
    let change = finished(&evil, &room, &log, &change, &["m.room.create", "m.room.power_levels", "m.room.member"]);
    let mut state: Vec<Value> = log.iter().map(|event| json!(event.event.json)).collect();
    state.push(json!(change.json));
    let alice = part.user("alice");
    let keys = VerifyKey::from_base64(&part.context.signing_key.public_base64()).unwrap();
    let keys = [(part.context.signing_key.id().to_owned(), keys)].into();
    let keys: VerifyKeys = [(part.name.clone(), keys)].into();
    let (name, key, template) = (evil.name.clone(), evil.context.signing_key.clone(), member(&alice, &alice, "join"));
    let template = self::template(&room, &template);
    let kinds = ["m.room.create", "m.room.power_levels", "m.room.join_rules"];
    let allows = log.iter().filter(|event| kinds.contains(&event.event.kind.as_str()));
    let auth_events: Vec<OwnedEventId> = allows.map(|event| event.event.event_id.clone()).collect();
    let before = change.event_id.clone();
    let answering = std::sync::Arc::new(move |request: axum::extract::Request| {
        let (name, key, template, keys) = (name.clone(), key.clone(), template.clone(), keys.clone());
        let (state, auth_events, before) = (state.clone(), auth_events.clone(), before.clone());
        async move {
            if request.uri().path().contains("/make_join/") {
                let version = "org.matrix.i-d.ralston-mimi-linearized-matrix.02";
                let mut answer = json!(template);
                (answer["event"], answer["room_version"]) = (json!(template), json!(version));
                return answer;
            }
            let body = axum::body::to_bytes(request.into_body(), 1 << 20).await.unwrap();
            let lpdu = Lpdu::parse(serde_json::from_slice(&body).unwrap()).unwrap().verify(&keys).unwrap();
            let completion = Completion { auth_events, prev_event: Some(before) };
            let event = Pdu::complete(lpdu, completion, &name, &key).unwrap();
            json!({ "event": event.json, "state": state, "auth_chain": [], "origin": name })
        }
    });
    evil.meddle(move |request, next| {
        let answering = answering.clone();
        async move {
            let path = request.uri().path();
            if path.contains("/make_join/") || path.contains("/send_join/") {
                return super::log_hub::respond(http::StatusCode::OK, answering(request).await);
            }
            next.run(request).await
        }
    });
    // Nobody comes in by the hub itself now.
    hub.meddle(|request, next| async move {
        match request.uri().path().contains("/make_join/") {
            true => super::log_hub::respond(http::StatusCode::SERVICE_UNAVAILABLE, json!({})),
            false => next.run(request).await,
        }
    });
    let joined = part.lm.join(&room, &alice, std::slice::from_ref(&evil.name), Object::new()).await;
    let refusal = joined.map(drop).unwrap_err();
    assert!(refusal.to_string().contains("nothing proves that it keeps the log"), "{refusal}");
    assert!(part.lm.room(&room).await.unwrap().is_none(), "nothing of it is believed");
}

/// Without the power levels everything after the join would be judged by others than at the hub.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_join_waits_for_the_keys_of_who_made_the_power_levels_but_not_of_who_made_the_topic() {
    let (world, [hub, mut part, third]) = World::new(["hub.example", "part.example", "third.example"]).await;
    let carol = third.user("carol");
    let mut rooms = Vec::new();
    for kind in ["m.room.power_levels", "m.room.topic"] {
        let levels = json!({ "users": { hub.user("bot"): 100, carol.clone(): 100 } });
        let room = hub.create_room_with("public", levels.clone()).await;
        third.join(&room, "carol", &hub).await;
        let content = if kind == "m.room.topic" { json!({ "topic": "x" }) } else { levels };
        third.send(&room, draft(&carol, kind, Some(""), content)).await.unwrap();
        hub.wait(&room, kind, |log| {
            log.last().unwrap().event.sender == carol && log.last().unwrap().event.kind == kind
        })
        .await;
        rooms.push((room, kind));
    }
    // Now it is away for everybody who does not know its keys yet.
    third.meddle(|_, _| async { super::log_hub::respond(http::StatusCode::SERVICE_UNAVAILABLE, json!({})) });
    for (room, kind) in &rooms {
        let (room, kind) = (room.clone(), *kind);
        let joined = part.lm.join(&room, &part.user("alice"), std::slice::from_ref(&hub.name), Object::new()).await;
        if kind == "m.room.power_levels" {
            let refusal = joined.map(drop).unwrap_err();
            assert!(refusal.is_transient(), "{refusal}");
            let text = refusal.to_string();
            assert!(text.contains(kind) && text.contains("third.example"), "{text}");
            assert!(part.lm.room(&room).await.unwrap().is_none());
        } else {
            joined.unwrap();
            assert!(part.lm.state(&room).await.unwrap().get(kind, "").is_none());
        }
    }
    // The topic, and that carol is a member, are taken when her server is back, whatever happened here meanwhile.
    let (room, kind) = rooms.pop().unwrap();
    part = world.restart(part).await;
    third.meddle(|request, next| next.run(request));
    part.wait(&room, "the topic", |log| log.iter().any(|event| event.event.kind == kind)).await;
    let (here, there) = (part.lm.state(&room).await.unwrap(), hub.lm.state(&room).await.unwrap());
    for (kind, state_key) in [(kind, ""), ("m.room.member", carol.as_str())] {
        let id = |state: &isthmus::lm::State| state.get(kind, state_key).map(|event| event.event_id.clone());
        assert!(id(&here).is_some() && id(&here) == id(&there), "{kind}");
    }
}

/// A hub that does not give what is missing is asked for its state, which is judged like the rest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_state_that_is_taken_instead_of_what_is_missing_obeys_the_rules() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = room_of(&hub, &part).await;
    let (bot, user) = (hub.user("bot"), hub.user("nobody"));
    let levels = |users: Value| draft(&user, "m.room.power_levels", Some(""), json!({ "users": users }));
    hub.send(&room, member(&user, &user, "join")).await.unwrap();
    // It was somebody once.
    for users in [json!({ bot.clone(): 100, user.clone(): 99 }), json!({ bot.clone(): 100 })] {
        hub.send(&room, draft(&bot, "m.room.power_levels", Some(""), json!({ "users": users }))).await.unwrap();
    }
    let log = hub.log(&room).await;
    part.wait(&room, "all of it", |copy| copy.len() == log.len()).await;
    let allowed = ["m.room.create", "m.room.power_levels", "m.room.member"];
    let create = json!({ "room_version": "org.matrix.i-d.ralston-mimi-linearized-matrix.02" });
    let mine = json!({ user.clone(): 99 });
    let before_demoted = &log[..log.len() - 1];
    let last = Some(log.last().unwrap().event.event_id.clone());
    let unknown = OwnedEventId::try_from(format!("${}", "a".repeat(43))).unwrap();
    let build = |draft: &Draft, auth_events: Vec<OwnedEventId>, prev: Option<OwnedEventId>| {
        let completion = Completion { auth_events, prev_event: prev };
        Pdu::build(template(&room, draft), completion, &hub.name, &hub.context.signing_key).unwrap()
    };
    let forbidden = [
        finished(&hub, &room, &log, &draft(&user, "m.room.create", Some(""), create), &[]),
        finished(&hub, &room, &log, &levels(mine.clone()), &allowed),
        finished(&hub, &room, before_demoted, &levels(mine.clone()), &allowed),
        build(&levels(mine), vec![unknown.clone()], last.clone()),
    ];
    let of_bot = |kind: &&str| {
        let found = log.iter().rev().find(|event| event.event.kind == *kind && event.event.sender == bot);
        found.unwrap().event.event_id.clone()
    };
    let auth_events: Vec<_> = allowed.iter().map(of_bot).collect();
    let topic = build(&draft(&bot, "m.room.topic", Some(""), json!({ "topic": "x" })), auth_events.clone(), last);
    let after = build(&message(&bot, "after"), auth_events, Some(unknown));
    let given: Vec<Object> = forbidden.iter().chain([&topic]).map(|event| event.json.clone()).collect();
    hub.meddle(move |request, next| {
        let (path, given) = (request.uri().path().to_owned(), given.clone());
        async move {
            if path.contains("/backfill/") {
                return super::log_hub::respond(http::StatusCode::NOT_FOUND, json!({ "errcode": "M_NOT_FOUND" }));
            }
            match path.contains("/state/") {
                true => super::log_hub::respond(http::StatusCode::OK, json!({ "pdus": given, "auth_chain": [] })),
                false => next.run(request).await,
            }
        }
    });
    let before = part.lm.state(&room).await.unwrap();
    assert_eq!(give(&part, &hub, &after.json).await.result, Ok(()));
    let now = part.lm.state(&room).await.unwrap();
    for kind in ["m.room.create", "m.room.power_levels"] {
        let id = |state: &isthmus::lm::State| state.get(kind, "").unwrap().event_id.clone();
        assert_eq!(id(&now), id(&before), "{kind}");
    }
    assert_eq!(now.get("m.room.topic", "").unwrap().event_id, topic.event_id);
    let (complaints, log) = (complaints(&part, &room).await, part.log(&room).await);
    for event in &forbidden {
        assert!(complaints.iter().any(|complaint| complaint.contains(event.event_id.as_str())), "{complaints:?}");
        assert!(!ids(&log).contains(&event.event_id));
    }
    assert_eq!(bodies(&log), ["after"]);
    assert_eq!(part.fault_kinds(&room).await, ["forbidden", "forbidden", "forbidden", "forbidden", "skipped"]);
}
