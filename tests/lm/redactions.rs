//! What was redacted in a log is given to nobody any more, in whatever way it is asked for, and each server reads the same log.

use std::collections::BTreeMap;

use isthmus::event::{Object, Pdu, Redaction, VerifyKey, canonical_json};
use isthmus::lm::{Appended, Sent};
use isthmus::seam::Draft;
use ruma::{EventId, OwnedEventId, RoomId, ServerName, UserId};
use serde_json::{Value, json};

use super::world::{Node, World, draft, member, message};

fn redaction(sender: &UserId, target: &EventId) -> Draft {
    draft(sender, "m.room.redaction", None, json!({ "redacts": target, "reason": "spam" }))
}

async fn append(hub: &Node, room: &RoomId, draft: Draft) -> OwnedEventId {
    match hub.send(room, draft).await.unwrap() {
        Sent::Appended(event) => event.event.event_id.clone(),
        Sent::Queued { .. } => panic!("not the hub"),
    }
}

/// Says something through a participant; the event as the participant has it back.
async fn said(part: &Node, room: &RoomId, draft: Draft) -> OwnedEventId {
    let Sent::Queued { lpdu_id } = part.send(room, draft).await.unwrap() else { panic!("not a participant") };
    let log = part.wait(room, "the echo", |log| log.iter().any(|event| is_of(event, &lpdu_id))).await;
    log.iter().find(|event| is_of(event, &lpdu_id)).unwrap().event.event_id.clone()
}

fn is_of(event: &Appended, lpdu_id: &EventId) -> bool {
    event.event.lpdu_id.as_deref() == Some(lpdu_id)
}

/// An event as the hub serves it to a server.
async fn served(hub: &Node, to: &ServerName, event_id: &EventId) -> Object {
    let Value::Object(event) = hub.lm.get_event(to, event_id).await.unwrap() else { panic!("no object") };
    let pdu = Pdu::parse(event.clone(), Redaction::Draft).unwrap();
    assert_eq!(pdu.event_id, event_id, "a redacted event has the ID that it had");
    if pdu.sender.server_name() == hub.name {
        let key = VerifyKey::from_base64(&hub.context.signing_key.public_base64()).unwrap();
        let of_hub = BTreeMap::from([(hub.context.signing_key.id().to_owned(), key)]);
        pdu.verify_signatures(&[(hub.name.clone(), of_hub)].into(), Redaction::Draft).unwrap();
    }
    event
}

fn texts(log: &[Appended]) -> Vec<Vec<u8>> {
    log.iter().map(|event| canonical_json(&event.event.json)).collect()
}

async fn head(node: &Node, room: &RoomId) -> Vec<Appended> {
    node.log(room).await
}

/// Whether a server reads what was said, in each of the ways in which it may ask.
async fn reads(hub: &Node, reader: &ServerName, room: &RoomId, event_id: &EventId) -> bool {
    let shown = |event: &Value| event["content"].get("body").is_some() || event["content"].get("name").is_some();
    let alone = shown(&Value::Object(served(hub, reader, event_id).await));
    let last = head(hub, room).await.last().unwrap().event.event_id.clone();
    let filled = hub.lm.backfill(reader, room, &last, 100).await.unwrap();
    let id = |event: &Value| Pdu::parse(event.as_object().unwrap().clone(), Redaction::Draft).unwrap().event_id;
    let found = filled["pdus"].as_array().unwrap().iter().find(|event| id(event) == event_id).unwrap();
    assert_eq!(shown(found), alone, "backfill and event say the same");
    let state = hub.lm.get_state(reader, room, None, false).await.unwrap();
    for event in state["pdus"].as_array().unwrap().iter().filter(|event| id(event) == event_id) {
        assert_eq!(shown(event), alone, "state and event say the same");
    }
    alone
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_34_hc_49_who_may_redact_is_decided_when_the_redaction_is_accepted() {
    let (world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    let other = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    part.join(&room, "bob", &hub).await;
    let (bot, alice, bob) = (hub.user("bot"), part.user("alice"), part.user("bob"));
    let reader = part.name.clone();

    let own = said(&part, &room, message(&alice, "own")).await;
    assert!(reads(&hub, &reader, &room, &own).await);
    // Of the same server, but not the sender, and without the level.
    said(&part, &room, redaction(&bob, &own)).await;
    assert!(reads(&hub, &reader, &room, &own).await, "a neighbour is nobody special");
    let by_alice = said(&part, &room, redaction(&alice, &own)).await;
    assert!(!reads(&hub, &reader, &room, &own).await);

    let foreign = said(&part, &room, message(&alice, "foreign")).await;
    append(&hub, &room, redaction(&bot, &foreign)).await;
    assert!(!reads(&hub, &reader, &room, &foreign).await, "who has the level");

    // Of another room: neither by the same sender nor with power there.
    let elsewhere = append(&hub, &other, message(&bot, "elsewhere")).await;
    append(&hub, &room, redaction(&bot, &elsewhere)).await;
    let found = hub.lm.event(&elsewhere).await.unwrap().unwrap();
    assert_eq!(found.event.content()["body"], "elsewhere");

    // What is redacted stays so when its redaction is redacted, which changes nothing.
    append(&hub, &room, redaction(&bot, &by_alice)).await;
    assert_eq!(served(&hub, &reader, &by_alice).await["content"]["redacts"], json!(own));
    assert!(!reads(&hub, &reader, &room, &own).await);

    // The level that counts is the one at that time.
    let late = append(&hub, &room, message(&bot, "late")).await;
    said(&part, &room, redaction(&alice, &late)).await;
    let levels = json!({ "users": { bot.clone(): 100, alice.clone(): 50 } });
    append(&hub, &room, draft(&bot, "m.room.power_levels", Some(""), levels)).await;
    assert!(reads(&hub, &reader, &room, &late).await);
    // Another event than the first one, which is known.
    let again = Draft { origin_server_ts: 1_700_000_000_001, ..redaction(&alice, &late) };
    said(&part, &room, again).await;
    assert!(!reads(&hub, &reader, &room, &late).await);

    // Neither a state event of that type, nor what names no event, is a redaction.
    let kept = append(&hub, &room, message(&bot, "kept")).await;
    append(&hub, &room, draft(&bot, "m.room.redaction", Some(""), json!({ "redacts": kept }))).await;
    for odd in [json!({}), json!({ "redacts": 1 }), json!({ "redacts": "$" }), json!({ "redacts": [kept] })] {
        append(&hub, &room, draft(&bot, "m.room.redaction", None, odd)).await;
    }
    let nowhere = ruma::event_id!("$Rqnc-F-dvnEYJTyHq_iKxU2bZ1CI92-kuZq3a5lr5Zg");
    append(&hub, &room, redaction(&bot, nowhere)).await;
    assert!(reads(&hub, &reader, &room, &kept).await);

    // All of it is so after a restart, and each server reads the same.
    let before = head(&hub, &room).await;
    let end = &before.last().unwrap().event.event_id;
    let log = part.wait(&room, "all", |log| log.last().is_some_and(|last| last.event.event_id == *end)).await;
    let at_hub = texts(&before);
    assert!(texts(&log).iter().all(|event| at_hub.contains(event)), "the participant reads another log");
    let hub = world.restart(hub).await;
    assert_eq!(texts(&head(&hub, &room).await), texts(&before));
    assert!(!reads(&hub, &reader, &room, &own).await);
    assert!(reads(&hub, &reader, &room, &kept).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_34_of_state_that_is_redacted_stays_what_the_rules_go_by() {
    let (world, [hub, part, late]) = World::new(["hub.example", "part.example", "late.example"]).await;
    let bot = hub.user("bot");
    let levels = json!({ "users": { bot.clone(): 100 }, "ban": 60, "notifications": { "room": 20 } });
    let room = hub.create_room_with("public", levels).await;
    part.join(&room, "alice", &hub).await;
    let of_kind = async |node: &Node, kind: &str| {
        node.lm.state_event(&room, kind, "").await.unwrap().unwrap_or_else(|| panic!("no {kind}"))
    };
    let name = append(&hub, &room, draft(&bot, "m.room.name", Some(""), json!({ "name": "secret" }))).await;
    let list = json!({ "allow": ["*"], "deny": ["evil.example"] });
    let acl = append(&hub, &room, draft(&bot, "m.room.server_acl", Some(""), list.clone())).await;
    let commit = append(&hub, &room, draft(&bot, "m.mls.commit", None, json!({ "commit": "AAAA" }))).await;
    let hub_list = json!({ "membership": "join", "displayname": "Bot" });
    let named = append(&hub, &room, draft(&bot, "m.room.member", Some(bot.as_str()), hub_list)).await;
    let levels = of_kind(&hub, "m.room.power_levels").await.event_id.clone();
    let create = of_kind(&hub, "m.room.create").await.event_id.clone();
    let rules = of_kind(&hub, "m.room.join_rules").await.event_id.clone();
    let before = of_kind(&hub, "m.room.create").await.content().clone();
    for target in [&name, &acl, &commit, &named, &levels, &create, &rules] {
        append(&hub, &room, redaction(&bot, target)).await;
    }
    let reader = part.name.clone();
    let content = async |event_id: &EventId| served(&hub, &reader, event_id).await["content"].clone();
    assert_eq!(content(&name).await, json!({}));
    assert_eq!(content(&acl).await, list, "an empty list would deny everybody");
    assert_eq!(content(&commit).await, json!({ "commit": "AAAA" }), "nobody finds into the group without it");
    assert_eq!(content(&named).await, json!({ "membership": "join" }));
    assert_eq!(content(&levels).await, json!({ "users": { bot.clone(): 100 }, "ban": 60 }));
    assert_eq!(content(&create).await, Value::Object(before));
    assert_eq!(content(&rules).await, json!({ "join_rule": "public" }));

    // The room goes on, who comes later gets the same state, and the hub itself reads it so, also after a restart.
    assert_eq!(of_kind(&hub, "m.room.name").await.content(), &Object::new());
    late.join(&room, "carol", &hub).await;
    let hub = world.restart(hub).await;
    for kind in ["m.room.name", "m.room.server_acl", "m.room.power_levels", "m.room.join_rules"] {
        let (here, there, latest) = (of_kind(&hub, kind).await, of_kind(&part, kind).await, of_kind(&late, kind).await);
        assert_eq!(here.json, latest.json, "{kind}");
        part.wait(&room, kind, |_| true).await;
        assert_eq!(here.event_id, there.event_id);
    }
    assert_eq!(late.lm.room(&room).await.unwrap().unwrap().complaints, Vec::<String>::new());
    hub.send(&room, member(&bot, &late.user("carol"), "leave")).await.unwrap();
    hub.say(&room, "bot", "still here").await;
    part.wait_for_body(&room, "still here").await;
    assert_eq!(of_kind(&part, "m.room.name").await.content(), &Object::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_1_a_server_that_was_away_is_not_sent_what_was_redacted_meanwhile() {
    let (world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    hub.say(&room, "bot", "first").await;
    part.wait_for_body(&room, "first").await;
    // Nothing reaches it, and what does goes through the test's hands.
    let seen = std::sync::Arc::new(std::sync::Mutex::new((true, String::new())));
    let through = seen.clone();
    part.meddle(move |request, next| {
        let through = through.clone();
        async move {
            use axum::response::IntoResponse as _;
            let (parts, body) = request.into_parts();
            let body = axum::body::to_bytes(body, 1 << 24).await.unwrap();
            let away = {
                let mut seen = through.lock().unwrap();
                if !seen.0 {
                    seen.1.push_str(&String::from_utf8_lossy(&body));
                }
                seen.0
            };
            if away {
                return http::StatusCode::BAD_GATEWAY.into_response();
            }
            next.run(axum::extract::Request::from_parts(parts, axum::body::Body::from(body))).await
        }
    });
    let bot = hub.user("bot");
    let secret = append(&hub, &room, message(&bot, "the password is 1234")).await;
    let name = append(&hub, &room, draft(&bot, "m.room.name", Some(""), json!({ "name": "offensive" }))).await;
    append(&hub, &room, redaction(&bot, &secret)).await;
    append(&hub, &room, redaction(&bot, &name)).await;
    let before = head(&hub, &room).await;
    let hub = world.restart(hub).await;
    seen.lock().unwrap().0 = false;
    hub.context.outbound.retry(&part.name);
    hub.say(&room, "bot", "last").await;
    let log = part.wait_for_body(&room, "last").await;
    let all = texts(&head(&hub, &room).await);
    assert_eq!(all[..before.len()], texts(&before));
    assert_eq!(texts(&log), all[all.len() - log.len()..], "each reads the same log");
    assert_eq!(part.lm.room(&room).await.unwrap().unwrap().complaints, Vec::<String>::new());
    let sent = seen.lock().unwrap().1.clone();
    assert!(sent.contains("last") && !sent.contains("1234") && !sent.contains("offensive"), "{sent}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_the_world_reads_what_is_world_readable_and_nobody_else_what_is_not() {
    let (_world, [hub, part, out]) = World::new(["hub.example", "part.example", "out.example"]).await;
    let room = hub.create_room("public").await;
    let (bot, alice) = (hub.user("bot"), part.user("alice"));
    part.join(&room, "alice", &hub).await;
    let see = async |visibility: &str| {
        let content = json!({ "history_visibility": visibility });
        append(&hub, &room, draft(&bot, "m.room.history_visibility", Some(""), content)).await
    };
    let shared = append(&hub, &room, message(&bot, "shared")).await;
    let commit = append(&hub, &room, draft(&bot, "m.mls.commit", None, json!({ "commit": "AAAA" }))).await;
    for closed in ["shared", "invited", "joined"] {
        see(closed).await;
        // Neither who was never there, nor who is only invited, has a reason to know of it.
        let invite = isthmus::seam::Outgoing { draft: member(&bot, &out.user("dave"), "invite"), effect: None };
        if closed == "invited" {
            hub.lm.invite(&room, invite).await.unwrap();
        }
        for event in [&shared, &commit] {
            assert!(hub.lm.get_event(&out.name, event).await.is_err(), "{closed}");
        }
        assert!(hub.lm.get_state(&out.name, &room, None, false).await.is_err(), "{closed}");
    }
    hub.send(&room, member(&bot, &alice, "ban")).await.unwrap();
    let after = append(&hub, &room, message(&bot, "after the ban")).await;
    assert!(hub.lm.get_event(&part.name, &after).await.is_err());
    assert!(hub.lm.get_event(&part.name, &shared).await.is_ok());
    see("world_readable").await;
    let open = append(&hub, &room, message(&bot, "open")).await;
    for reader in [&out.name, &part.name] {
        assert!(reads(&hub, reader, &room, &open).await);
        assert_eq!(served(&hub, reader, &commit).await["content"], json!({ "commit": "AAAA" }));
        let state = hub.lm.get_state(reader, &room, Some(&open), false).await.unwrap();
        assert!(state["pdus"].as_array().unwrap().len() > 5);
        // What was not for all the world keeps its content for those who were there.
        assert_eq!(reads(&hub, reader, &room, &shared).await, reader == &part.name);
        assert!(!reads(&hub, reader, &room, &after).await);
    }
    append(&hub, &room, redaction(&bot, &open)).await;
    assert!(!reads(&hub, &out.name, &room, &open).await);
    see("shared").await;
    assert!(hub.lm.get_event(&out.name, &open).await.is_err());
    assert!(hub.lm.get_event(&part.name, &open).await.is_err());
}
