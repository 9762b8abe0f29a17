//! Hubs whose logs fork, that forget, and that lose what they took.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::body::to_bytes;
use axum::extract::Request;
use http::StatusCode;
use isthmus::event::{Completion, Object, Pdu};
use isthmus::lm::{Appended, Sent};
use isthmus::seam::Outgoing;
use isthmus::store::lm::{faults, faults_since, lost_since, taken_lpdus, taken_since};
use ruma::{OwnedEventId, RoomId};
use serde_json::{Value, json};

use super::log_hub::{Manners, deafen, respond};
use super::world::{Node, World, bodies, draft, ids, member, raw};

/// How much faster all is looked after.
const HASTE: u32 = 20;

/// A message of the hub's `@bot` that follows an event of the hub's choice.
fn said(hub: &Node, room: &RoomId, log: &[Appended], body: &str, prev: &OwnedEventId) -> Pdu {
    let id = |kind: &str| log.iter().rev().find(|event| event.event.kind == kind).unwrap().event.event_id.clone();
    let auth_events = vec![id("m.room.create"), id("m.room.power_levels"), log[1].event.event_id.clone()];
    event(hub, room, "m.room.message", None, json!({ "msgtype": "m.text", "body": body }), (auth_events, prev))
}

fn event(
    hub: &Node,
    room: &RoomId,
    kind: &str,
    state_key: Option<&str>,
    content: Value,
    (auth_events, prev): (Vec<OwnedEventId>, &OwnedEventId),
) -> Pdu {
    let draft = draft(&hub.user("bot"), kind, state_key, content);
    let mut template = json!({ "type": kind, "room_id": room, "sender": draft.sender, "content": draft.content,
        "origin_server_ts": draft.origin_server_ts });
    if let Some(state_key) = state_key {
        template["state_key"] = json!(state_key);
    }
    let completion = Completion { auth_events, prev_event: Some(prev.clone()) };
    Pdu::build(template.as_object().unwrap().clone(), completion, &hub.name, &hub.context.signing_key).unwrap()
}

/// Has a hub give a log of a test's making, ten events at once, the newest first.
fn keeps(hub: &Node, log: Vec<(OwnedEventId, Object)>) {
    let log = Arc::new(log);
    hub.meddle(move |request, next| {
        let log = log.clone();
        async move {
            let uri = request.uri().clone();
            if !uri.path().contains("/backfill/") {
                return next.run(request).await;
            }
            let asked = uri.query().unwrap_or_default().replace("%24", "$");
            let Some(at) = log.iter().position(|(id, _)| asked.contains(id.as_str())) else {
                return respond(StatusCode::NOT_FOUND, json!({ "errcode": "M_NOT_FOUND", "error": "no such event" }));
            };
            let page: Vec<&Object> = log[..=at].iter().rev().take(10).map(|(_, event)| event).collect();
            respond(StatusCode::OK, json!({ "pdus": page }))
        }
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_32_what_did_not_arrive_of_a_log_that_forks_is_found_by_the_hubs_order() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    hub.say(&room, "bot", "before the join").await;
    part.join(&room, "alice", &hub).await;
    part.lm.hasten_looks(HASTE);
    let log = hub.log(&room).await;
    // All of them follow the same event, but for the last, which follows the last of them. Some are lost on the way here: the
    // second topic is not, which is newer than the first.
    let before = log.last().unwrap().event.event_id.clone();
    let mut siblings: Vec<Pdu> = (0..30).map(|n| said(&hub, &room, &log, &n.to_string(), &before)).collect();
    let auth = siblings[0].auth_events.clone();
    let topic =
        |text: &str| event(&hub, &room, "m.room.topic", Some(""), json!({ "topic": text }), (auth.clone(), &before));
    siblings.insert(5, topic("old"));
    siblings.insert(25, topic("new"));
    let end = said(&hub, &room, &log, "end", &siblings[31].event_id);
    let all: Vec<&Pdu> = siblings.iter().chain([&end]).collect();
    let at_hub = log.iter().map(|event| (event.event.event_id.clone(), event.event.json.clone()));
    let made = all.iter().map(|pdu| (pdu.event_id.clone(), pdu.json.clone()));
    keeps(&hub, at_hub.chain(made).collect());
    for event in all.iter().skip(20) {
        let received = part.lm.receive(&hub.name, vec![raw(&event.json)]).await.pop().unwrap();
        assert_eq!(received.result, Ok(()));
    }
    let copy = part.wait(&room, "all of them", |log| bodies(log).len() >= 31).await;
    // Those that were late stand behind what had come by then, in their order.
    let is_late = |body: &String| body.parse::<usize>().is_ok_and(|number| number < 19);
    let (late, found): (Vec<String>, Vec<String>) = bodies(&copy).into_iter().partition(is_late);
    assert_eq!(late, (0..19).map(|n| n.to_string()).collect::<Vec<_>>());
    assert_eq!(found.last().unwrap(), "end");
    assert_eq!(found.iter().collect::<BTreeSet<_>>().len(), found.len());
    assert!(!found.contains(&"before the join".to_owned()));
    let state = part.lm.state(&room).await.unwrap();
    assert_eq!(state.get("m.room.topic", "").unwrap().content()["topic"], "new");
    let (count, newest) = faults(&part.context.store, &room, 5).await.unwrap();
    assert!(count > 0 && newest.iter().all(|fault| fault.kind == "forked"), "{newest:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_36_what_a_hub_took_and_lost_is_sent_again() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    let (loses, manners) = (Arc::new(AtomicUsize::new(1)), Manners::new(&hub.context, &hub.lm, true));
    let kept = loses.clone();
    hub.meddle(move |request, next| {
        let (loses, manners) = (kept.clone(), manners.clone());
        async move {
            if !request.uri().path().contains("/send/") {
                return manners.answer(request, next).await;
            }
            let (parts, body) = request.into_parts();
            let body = to_bytes(body, 1 << 20).await.unwrap();
            let is_it = String::from_utf8_lossy(&body).contains("lost?");
            if is_it && loses.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok() {
                return respond(StatusCode::OK, json!({}));
            }
            manners.answer(Request::from_parts(parts, body.into()), next).await
        }
    });
    part.join(&room, "alice", &hub).await;
    part.lm.hasten_looks(HASTE);
    part.say(&room, "alice", "lost?").await;
    part.say(&room, "alice", "next").await;
    hub.wait_for_body(&room, "next").await;
    let log = hub.wait_for_body(&room, "lost?").await;
    assert_eq!(bodies(&log), ["next", "lost?"]);
    part.wait_for_body(&room, "lost?").await;
    assert_eq!(loses.load(Ordering::SeqCst), 0);
    assert_eq!(faults(&part.context.store, &room, 5).await.unwrap().0, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_36_the_last_that_was_lost_by_a_hub_that_does_not_tell_its_logs_end_is_sent_again() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    let (sent, asked) = (Arc::new(Mutex::new(Vec::<Value>::new())), Arc::new(AtomicUsize::new(0)));
    let (kept, count) = (sent.clone(), asked.clone());
    hub.meddle(move |request, next| {
        let (sent, asked) = (kept.clone(), count.clone());
        async move {
            if request.uri().path().contains("/make_join/") {
                // As the draft has it: who asks does not see from it where the log ends.
                let made = to_bytes(next.run(request).await.into_body(), 1 << 20).await.unwrap();
                let made: Value = serde_json::from_slice(&made).unwrap();
                assert!(!made.to_string().contains("prev_events"), "{made}");
                asked.fetch_add(1, Ordering::SeqCst);
                return respond(StatusCode::OK, made);
            }
            if !request.uri().path().contains("/send/") {
                return next.run(request).await;
            }
            let (parts, body) = request.into_parts();
            let body = to_bytes(body, 1 << 20).await.unwrap();
            let pdus = serde_json::from_slice::<Value>(&body).unwrap()["pdus"][0].clone();
            if pdus.to_string().contains("lost?") {
                let first = {
                    let mut sent = sent.lock().unwrap();
                    sent.push(pdus);
                    sent.len() == 1
                };
                if first {
                    return respond(StatusCode::OK, json!({ "failed_pdus": {} }));
                }
            }
            next.run(Request::from_parts(parts, body.into())).await
        }
    });
    // What takes five minutes takes five seconds.
    part.lm.hasten_looks(60);
    let begun = std::time::Instant::now();
    part.say(&room, "alice", "lost?").await;
    let log = hub.wait_for_body(&room, "lost?").await;
    assert!(
        begun.elapsed() >= std::time::Duration::from_secs(5),
        "it might have been on its way: {:?}",
        begun.elapsed()
    );
    assert_eq!(bodies(&log), ["lost?"]);
    part.wait_for_body(&room, "lost?").await;
    assert_eq!(taken_since(&part.context.store, &room).await.unwrap(), None);
    let sent = sent.lock().unwrap();
    assert_eq!((sent.len(), &sent[0]), (2, &sent[1]), "the same LPDU");
    // Each 30 s it would be ten times.
    assert!((1..=4).contains(&asked.load(Ordering::SeqCst)), "{asked:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_36_a_hub_that_forgets_the_room_is_found_out_and_gets_all_in_order_when_it_remembers() {
    let (world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    let (forgets, manners) = (Arc::new(AtomicBool::new(false)), Manners::new(&hub.context, &hub.lm, true));
    let dropped = Arc::new(Mutex::new(Vec::<String>::new()));
    let (kept, kept_dropped) = (forgets.clone(), dropped.clone());
    hub.meddle(move |request, next| {
        let (forgets, dropped, manners) = (kept.clone(), kept_dropped.clone(), manners.clone());
        async move {
            let path = request.uri().path().to_owned();
            if !forgets.load(Ordering::SeqCst) || path.contains("/key/") {
                return manners.answer(request, next).await;
            }
            if path.contains("/send/") {
                let body = to_bytes(request.into_body(), 1 << 20).await.unwrap();
                dropped.lock().unwrap().push(String::from_utf8(body.to_vec()).unwrap());
                return respond(StatusCode::OK, json!({}));
            }
            respond(StatusCode::NOT_FOUND, json!({ "errcode": "M_NOT_FOUND", "error": "Unknown room" }))
        }
    });
    part.join(&room, "alice", &hub).await;
    part.lm.hasten_looks(HASTE);
    forgets.store(true, Ordering::SeqCst);
    part.say(&room, "alice", "one").await;
    part.say(&room, "alice", "two").await;
    let store = &part.context.store;
    let lost =
        async || lost_since(store, &room).await.unwrap().is_some() && faults(store, &room, 1).await.unwrap().0 > 0;
    tokio::time::timeout(std::time::Duration::from_secs(30), async {
        while !lost().await {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await
    .unwrap();
    let (count, newest) = faults(&part.context.store, &room, 5).await.unwrap();
    assert_eq!((count, newest[0].kind.as_str()), (1, "went_back"));
    let sent = dropped.lock().unwrap().len();
    part.say(&room, "alice", "three").await;
    let part = world.restart(part).await;
    part.lm.hasten_looks(HASTE);
    part.say(&room, "alice", "four").await;
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    assert_eq!(dropped.lock().unwrap().len(), sent, "nothing more is said into the void");
    forgets.store(false, Ordering::SeqCst);
    hub.wait(&room, "everything", |log| bodies(log).len() >= 4).await;
    part.wait(&room, "everything", |log| bodies(log).len() >= 4).await;
    assert_eq!(part.bodies(&room).await, ["one", "two", "three", "four"]);
    assert_eq!(hub.bodies(&room).await, ["one", "two", "three", "four"]);
    assert_eq!(lost_since(&part.context.store, &room).await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_room_that_its_hub_has_forgotten_is_no_trouble_any_more_when_all_have_left_it() {
    let (world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    part.lm.hasten_looks(HASTE);
    let (dropped, asked) = (Arc::new(Mutex::new(String::new())), Arc::new(AtomicUsize::new(0)));
    let (kept, count) = (dropped.clone(), asked.clone());
    hub.meddle(move |request, next| {
        let (dropped, asked) = (kept.clone(), count.clone());
        async move {
            let path = request.uri().path().to_owned();
            asked.fetch_add(usize::from(path.contains("/make_join/")), Ordering::SeqCst);
            if path.contains("/key/") {
                return next.run(request).await;
            }
            if path.contains("/send/") {
                let body = to_bytes(request.into_body(), 1 << 20).await.unwrap();
                dropped.lock().unwrap().push_str(&String::from_utf8_lossy(&body));
                return respond(StatusCode::OK, json!({}));
            }
            respond(StatusCode::NOT_FOUND, json!({ "errcode": "M_NOT_FOUND", "error": "Unknown room" }))
        }
    });
    let store = &part.context.store;
    let becomes = async |lost: bool| {
        let waiting = async {
            while lost_since(store, &room).await.unwrap().is_some() != lost {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(30), waiting).await.unwrap();
    };
    part.say(&room, "alice", "one").await;
    becomes(true).await;
    part.lm.leave(&room, &part.user("alice"), &[]).await.unwrap();
    becomes(false).await;
    let waiting = async {
        while !dropped.lock().unwrap().contains(r#""membership":"leave""#) {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), waiting).await.unwrap();
    let part = asked_again(&world, part, &asked).await;
    assert_eq!(
        (part.fault_kinds(&room).await, faults_since(&part.context.store, 0).await.unwrap().lost),
        (vec!["went_back".to_owned()], 0)
    );
}

/// A server that is started again and looks at a hub several times, with nothing kept in memory of what it sent.
async fn asked_again(world: &World, part: Node, asked: &AtomicUsize) -> Node {
    let part = world.restart(part).await;
    part.lm.hasten_looks(1_000);
    let before = asked.load(Ordering::SeqCst);
    let waiting = async {
        while asked.load(Ordering::SeqCst) < before + 4 {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), waiting).await.expect("the hub is asked");
    part
}

/// As a hub does that goes by who is in the room: it sends nothing to who has left it, and gives them nothing but a template where
/// anybody may join.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_that_tells_nothing_to_who_has_left_a_public_room_has_not_gone_back() {
    for tells_its_end in [true, false] {
        let (world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
        let room = hub.create_room("public").await;
        part.join(&room, "alice", &hub).await;
        let (shut, asked, manners) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicUsize::new(0)),
            Manners::new(&hub.context, &hub.lm, true),
        );
        let (kept, count) = (shut.clone(), asked.clone());
        hub.meddle(move |request, next| {
            let (shut, asked, manners) = (kept.clone(), count.clone(), manners.clone());
            async move {
                let path = request.uri().path().to_owned();
                asked.fetch_add(usize::from(path.contains("/make_join/")), Ordering::SeqCst);
                let is_log = ["/state/", "/state_ids/", "/backfill/", "/event/"].iter().any(|part| path.contains(part));
                if shut.load(Ordering::SeqCst) && is_log {
                    return respond(StatusCode::FORBIDDEN, json!({ "errcode": "M_FORBIDDEN", "error": "not in it" }));
                }
                match tells_its_end {
                    true => manners.answer(request, next).await,
                    false => next.run(request).await,
                }
            }
        });
        hears_nothing(&part);
        part.lm.hasten_looks(1_000);
        shut.store(true, Ordering::SeqCst);
        part.lm.leave(&room, &part.user("alice"), &[]).await.unwrap();
        hub.wait(&room, "the leave", |log| log.last().is_some_and(is_leave)).await;
        // The participant has the hub's answer, and the hub has nothing more to say.
        let over = async {
            while taken_since(&part.context.store, &room).await.unwrap().is_none()
                || !hub.context.outbound.status().await.unwrap().is_empty()
            {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(30), over).await.unwrap();
        let part = asked_again(&world, part, &asked).await;
        let store = &part.context.store;
        assert_eq!(part.fault_kinds(&room).await, Vec::<String>::new(), "{tells_its_end}");
        assert_eq!(lost_since(store, &room).await.unwrap(), None);
        // Whoever shows the leave later ends it.
        hears_nothing(&part);
        shut.store(false, Ordering::SeqCst);
        if tells_its_end {
            part.wait(&room, "the leave", |log| log.last().is_some_and(is_leave)).await;
            assert_eq!(part.fault_kinds(&room).await, Vec::<String>::new());
        }
    }
}

fn is_leave(event: &Appended) -> bool {
    event.event.content().get("membership") == Some(&json!("leave"))
}

/// Nothing that is sent to a server arrives, though it is told to have.
fn hears_nothing(node: &Node) {
    node.meddle(|request, next| async move {
        match request.uri().path().contains("/send/") {
            true => respond(StatusCode::OK, json!({})),
            false => next.run(request).await,
        }
    });
}

/// It goes on sending to who has left: it has the leave no more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leave_that_its_hub_took_and_lost_is_sent_again_when_more_comes() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    let loses = Arc::new(AtomicBool::new(true));
    let kept = loses.clone();
    hub.meddle(move |request, next| {
        let loses = kept.clone();
        async move {
            let is_send = request.uri().path().contains("/send/");
            match is_send && loses.swap(false, Ordering::SeqCst) {
                true => respond(StatusCode::OK, json!({})),
                false => next.run(request).await,
            }
        }
    });
    // What takes five minutes takes half a second.
    part.lm.hasten_looks(600);
    part.lm.leave(&room, &part.user("alice"), &[]).await.unwrap();
    let said = async {
        for number in 0.. {
            hub.say(&room, "bot", &number.to_string()).await;
            tokio::time::sleep(std::time::Duration::from_millis(700)).await;
            if hub.log(&room).await.iter().any(is_leave) {
                return;
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), said).await.expect("the leave comes to the hub");
    part.wait(&room, "the leave", |log| log.iter().any(is_leave)).await;
    assert_eq!(part.fault_kinds(&room).await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_36_a_hub_that_leaves_out_the_event_from_which_it_is_asked_has_not_gone_back() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    part.say(&room, "alice", "here").await;
    part.wait_for_body(&room, "here").await;
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    hub.meddle(move |request, next| {
        let count = count.clone();
        async move {
            if !request.uri().path().contains("/backfill/") {
                return next.run(request).await;
            }
            let from = request.uri().query().unwrap_or_default().replace("%24", "$");
            let body = to_bytes(next.run(request).await.into_body(), 1 << 20).await.unwrap();
            let mut page: Value = serde_json::from_slice(&body).unwrap();
            let before = |event: &Value| {
                let id = isthmus::event::reference_hash(event.as_object().unwrap(), isthmus::event::Redaction::Draft);
                !from.contains(&id)
            };
            page["pdus"].as_array_mut().unwrap().retain(before);
            assert!(!page["pdus"].as_array().unwrap().is_empty());
            count.fetch_add(1, Ordering::SeqCst);
            respond(StatusCode::OK, page)
        }
    });
    part.lm.hasten_looks(HASTE);
    part.lm.resume().await.unwrap();
    let looked = async {
        while asked.load(Ordering::SeqCst) < 2 {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            part.lm.resume().await.unwrap();
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), looked).await.expect("the hub is asked");
    assert_eq!(lost_since(&part.context.store, &room).await.unwrap(), None);
    assert_eq!(faults(&part.context.store, &room, 5).await.unwrap().0, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_36_what_a_hub_does_in_the_wrong_order_or_without_links_is_taken_and_noted() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    let log = hub.log(&room).await;
    let mut end = log.last().unwrap().event.event_id.clone();
    let mut made: Vec<(OwnedEventId, Object)> =
        log.iter().map(|event| (event.event.event_id.clone(), event.event.json.clone())).collect();
    let kind_of = async |event: &Pdu| {
        let (_, found) = faults(&part.context.store, &room, 20).await.unwrap();
        found.into_iter().find(|fault| fault.event_id == event.event_id.as_str()).map(|fault| fault.kind)
    };
    let give = async |event: &Pdu| {
        let received = part.lm.receive(&hub.name, vec![raw(&event.json)]).await.pop().unwrap();
        assert_eq!(received.result, Ok(()));
    };
    let next = |body: &str, end: &mut OwnedEventId| {
        let event = said(&hub, &room, &log, body, end);
        *end = event.event_id.clone();
        event
    };

    let right = next("right", &mut end);
    give(&right).await;
    assert_eq!(kind_of(&right).await, None);
    // It names a part of what allows it.
    let (mut auth, content) = (right.auth_events.clone(), json!({ "msgtype": "m.text", "body": "incomplete" }));
    auth.remove(1);
    let incomplete = event(&hub, &room, "m.room.message", None, content, (auth, &end));
    give(&incomplete).await;
    assert_eq!(kind_of(&incomplete).await.as_deref(), Some("incomplete"));
    // It follows nothing.
    let mut template = right.json.clone();
    template.retain(|key, _| !["auth_events", "prev_events", "hashes", "signatures"].contains(&key.as_str()));
    template.insert("content".to_owned(), json!({ "msgtype": "m.text", "body": "unlinked" }));
    let completion = Completion { auth_events: right.auth_events.clone(), prev_event: None };
    let unlinked = Pdu::build(template, completion, &hub.name, &hub.context.signing_key).unwrap();
    give(&unlinked).await;
    assert_eq!(kind_of(&unlinked).await.as_deref(), Some("unlinked"));
    end = unlinked.event_id.clone();

    // The second is given before the first, which the hub has by then.
    let (first, second) = (next("first", &mut end), next("second", &mut end));
    let given = [&right, &incomplete, &unlinked, &first, &second];
    made.extend(given.iter().map(|event| (event.event_id.clone(), event.json.clone())));
    keeps(&hub, made.clone());
    give(&second).await;
    assert_eq!(kind_of(&first).await, None, "it may have been lost on the way");
    give(&first).await;
    assert_eq!(kind_of(&first).await.as_deref(), Some("reordered"));

    // Its log is in an order that what follows what contradicts.
    let [one, two, three, four] = ["one", "two", "three", "four"].map(|body| next(body, &mut end));
    made.extend([&two, &one, &three, &four].map(|event| (event.event_id.clone(), event.json.clone())));
    keeps(&hub, made);
    give(&four).await;
    let mut kinds = Vec::new();
    for event in [&one, &two, &three] {
        kinds.extend(kind_of(event).await);
    }
    assert_eq!(kinds, ["reordered"]);
    let taken = bodies(&part.log(&room).await);
    assert_eq!(taken, ["right", "incomplete", "unlinked", "first", "second", "one", "two", "three", "four"]);
}

/// Has a hub give the state of its rooms to everybody; how many transactions with leaves it got.
fn shows_its_state(hub: &Node) -> Arc<AtomicUsize> {
    let (lm, leaves) = (hub.lm.clone(), Arc::new(AtomicUsize::new(0)));
    let count = leaves.clone();
    hub.meddle(move |request, next| {
        let (lm, leaves) = (lm.clone(), count.clone());
        async move {
            let path = request.uri().path().to_owned();
            if let Some((_, room)) = path.split_once("/v1/state/") {
                let room = room.replace("%21", "!").replace("%3A", ":");
                let state = lm.state(&RoomId::parse(room).unwrap()).await.unwrap();
                let pdus: Vec<Object> = state.iter().map(|(_, _, event)| event.json.clone()).collect();
                return respond(StatusCode::OK, json!({ "pdus": pdus, "auth_chain": [] }));
            }
            let (parts, body) = request.into_parts();
            let body = to_bytes(body, 1 << 20).await.unwrap();
            if path.contains("/send/") && String::from_utf8_lossy(&body).contains(r#""membership":"leave""#) {
                leaves.fetch_add(1, Ordering::SeqCst);
            }
            next.run(Request::from_parts(parts, body.into())).await
        }
    });
    leaves
}

/// As hubs do that send events to those alone who are in the room after them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_left_is_out_though_the_hub_does_not_say_so() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("invite").await;
    let users = ["alice", "carol"].map(|name| part.user(name));
    for user in &users {
        let invite = Outgoing { draft: member(&hub.user("bot"), user, "invite"), effect: None };
        hub.lm.invite(&room, invite).await.unwrap();
        part.join(&room, user.localpart(), &hub).await;
    }
    let leaves = shows_its_state(&hub);
    part.meddle(|request, next| async move {
        let (parts, body) = request.into_parts();
        let body = to_bytes(body, 1 << 20).await.unwrap();
        let text = String::from_utf8_lossy(&body);
        if text.contains(r#""membership":"leave""#) && text.contains("@alice") {
            return respond(StatusCode::OK, json!({}));
        }
        next.run(Request::from_parts(parts, body.into())).await
    });
    part.lm.hasten_looks(HASTE);
    for user in users.iter().rev() {
        part.send(&room, member(user, user, "leave")).await.unwrap();
    }
    let is_out = |log: &[Appended], user: &ruma::UserId| {
        log.iter().any(|event| {
            event.event.state_key.as_deref() == Some(user.as_str())
                && event.event.content().get("membership") == Some(&json!("leave"))
        })
    };
    let log = part.wait(&room, "both leaves", |log| users.iter().all(|user| is_out(log, user))).await;
    assert_eq!(ids(&log).last(), ids(&hub.log(&room).await).last());
    assert_eq!(leaves.load(Ordering::SeqCst), 2, "each was said once");
    // There is nothing to wait for any more, and a new invite is a new invite.
    let invite = Outgoing { draft: member(&hub.user("bot"), &users[0], "invite"), effect: None };
    hub.lm.invite(&room, invite).await.unwrap();
    part.meddle(|request, next| next.run(request));
    part.join(&room, "alice", &hub).await;
    part.say(&room, "alice", "back").await;
    part.wait_for_body(&room, "back").await;
    assert_eq!(taken_since(&part.context.store, &room).await.unwrap(), None);
}

async fn until(what: &str, wanted: impl AsyncFn() -> bool) {
    let waiting = async {
        while !wanted().await {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    assert!(tokio::time::timeout(std::time::Duration::from_secs(30), waiting).await.is_ok(), "in vain: {what}");
}

/// The invite that it answers comes here late, and is older.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_join_that_the_hub_has_is_waited_for_though_the_invite_before_it_comes_after() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    part.say(&room, "alice", "in").await;
    part.wait_for_body(&room, "in").await;
    let (store, at) = (part.context.store.clone(), room.clone());
    part.meddle(move |request, next| {
        let (store, at) = (store.clone(), at.clone());
        async move {
            if request.uri().path().contains("/send/") {
                // Until the hub has the join.
                while taken_since(&store, &at).await.unwrap().is_none() {
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                }
            }
            next.run(request).await
        }
    });
    let carol = part.user("carol");
    hub.send(&room, member(&hub.user("bot"), &carol, "ban")).await.unwrap();
    hub.send(&room, member(&hub.user("bot"), &carol, "leave")).await.unwrap();
    part.join(&room, "carol", &hub).await;
    assert_eq!(taken_since(&part.context.store, &room).await.unwrap(), None);
    assert_eq!(ids(&part.log(&room).await).last(), ids(&hub.log(&room).await).last());
}

/// Sent again it would end the stay that has begun since.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leave_that_was_lost_is_not_said_again_of_who_has_come_since() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    let loses = Arc::new(AtomicBool::new(true));
    let kept = loses.clone();
    hub.meddle(move |request, next| {
        let loses = kept.clone();
        async move {
            let (parts, body) = request.into_parts();
            let body = to_bytes(body, 1 << 20).await.unwrap();
            let is_leave = String::from_utf8_lossy(&body).contains(r#""membership":"leave""#);
            if is_leave && parts.uri.path().contains("/send/") && loses.load(Ordering::SeqCst) {
                return respond(StatusCode::OK, json!({}));
            }
            next.run(Request::from_parts(parts, body.into())).await
        }
    });
    for user in ["alice", "stays"] {
        part.join(&room, user, &hub).await;
    }
    let alice = part.user("alice");
    let store = &part.context.store;
    let Sent::Queued { lpdu_id } = part.send(&room, member(&alice, &alice, "leave")).await.unwrap() else {
        panic!("a participant queues")
    };
    until("that it is taken", async || taken_lpdus(store, &room, 9).await.unwrap().len() == 1).await;
    part.lm.join(&room, &alice, &[], Object::new()).await.unwrap();
    assert_eq!(taken_lpdus(store, &room, 9).await.unwrap(), [], "nothing is to be said again");
    until("that its sender is told", async || {
        part.watcher.refused.lock().unwrap().iter().any(|(id, _)| *id == lpdu_id)
    })
    .await;
    loses.store(false, Ordering::SeqCst);
    part.lm.hasten_looks(HASTE);
    part.say(&room, "alice", "here").await;
    part.wait_for_body(&room, "here").await;
    let state = hub.lm.state(&room).await.unwrap();
    assert_eq!(state.get("m.room.member", alice.as_str()).unwrap().content()["membership"], "join");
}

/// There are hubs that do not tell those of it whom they put out, and give them nothing from then on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_that_puts_us_out_without_a_word_is_not_said_to_have_gone_back() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    let hides = Arc::new(AtomicBool::new(false));
    let kept = hides.clone();
    hub.meddle(move |request, next| {
        let path = request.uri().path();
        let hides =
            kept.load(Ordering::SeqCst) && ["/backfill/", "/event/", "/state"].iter().any(|what| path.contains(what));
        async move {
            match hides {
                true => {
                    respond(StatusCode::FORBIDDEN, json!({ "errcode": "M_FORBIDDEN", "error": "you are not in it" }))
                }
                false => next.run(request).await,
            }
        }
    });
    deafen(&part);
    hides.store(true, Ordering::SeqCst);
    hub.send(&room, member(&hub.user("bot"), &part.user("alice"), "leave")).await.unwrap();
    part.lm.hasten_looks(HASTE);
    until("a word about it", async || {
        part.lm.resume().await.unwrap();
        !part.lm.room(&room).await.unwrap().unwrap().complaints.is_empty()
    })
    .await;
    assert_eq!(part.fault_kinds(&room).await, [""; 0]);
    assert_eq!(lost_since(&part.context.store, &room).await.unwrap(), None);
    // What is said now is refused, and not kept for ever.
    let Sent::Queued { lpdu_id } = part.say(&room, "alice", "hello?").await else { panic!("a participant queues") };
    until("the verdict", async || part.watcher.refused.lock().unwrap().iter().any(|(id, _)| *id == lpdu_id)).await;
}
