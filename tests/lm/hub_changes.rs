//! Changes of a log's hub that are said again, said at another place than they were signed for, or missed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::to_bytes;
use axum::response::IntoResponse as _;
use http::StatusCode;
use isthmus::event::{Object, Redaction, reference_hash};
use isthmus::refusal::Refusal;
use isthmus::seam::Outgoing;
use ruma::OwnedRoomId;
use serde_json::{Value, json};

use super::hub_transfer::{
    cut, hand_over, hub_at, hub_event, hurry, on, one_log, room_of, three, transfers, wait_for_hub,
};
use super::world::{Node, World, draft, ids, member, raw};

/// Who gave a log back says again that it has it, to one that has come since then and has not heard of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_change_of_the_hub_that_is_said_again_hands_nothing_over() {
    let (_world, [a, b, c]) = three().await;
    let room = a.create_room_with("public", json!({ "users": { a.user("bot"): 100, b.user("bob"): 100 } })).await;
    b.join(&room, "bob", &a).await;
    hand_over(&a, &room, "bot", &b).await.unwrap();
    wait_for_hub(&b, &room, &b).await;
    hand_over(&b, &room, "bob", &a).await.unwrap();
    wait_for_hub(&a, &room, &a).await;
    let log = a.log(&room).await;
    let old = log.iter().find(|event| event.event.kind == "m.room.hub").unwrap().event.clone();
    let id = old.event_id.clone();
    // A hub that gives the current state alone.
    a.meddle(move |request, next| {
        let (id, joins) = (id.clone(), request.uri().path().contains("/send_join/"));
        async move {
            let response = next.run(request).await;
            if !joins {
                return response;
            }
            let (parts, body) = response.into_parts();
            let mut answer: Object = serde_json::from_slice(&to_bytes(body, 1 << 20).await.unwrap()).unwrap();
            let is_old =
                |event: &Value| reference_hash(event.as_object().unwrap(), Redaction::Draft) == id.as_str()[1..];
            answer["state"].as_array_mut().unwrap().retain(|event| !is_old(event));
            (parts.status, axum::Json(answer)).into_response()
        }
    });
    c.join(&room, "carol", &a).await;
    assert_eq!(old.new_hub(), Some(&*b.name));
    let before = ids(&c.log(&room).await);
    assert!(!before.contains(&old.event_id));
    let again = async |from: &Node| c.lm.receive(&from.name, vec![raw(&old.json)]).await.pop().unwrap().result;
    let refused = again(&b).await.unwrap_err();
    assert!(matches!(refused, Refusal::WrongOrigin { .. }), "{refused}");
    assert_eq!((ids(&c.log(&room).await), hub_at(&c, &room).await), (before, "a.example".to_owned()));
    // The hub itself cannot say it again either.
    let Err(Refusal::LmRule { rule, .. }) = again(&a).await else { panic!("taken") };
    assert_eq!(rule, "hub.7");
    for node in [&a, &b, &c] {
        assert_eq!(hub_at(node, &room).await, "a.example");
    }
    c.say(&room, "carol", "still here").await;
    a.wait_for_body(&room, "still here").await;
    b.wait_for_body(&room, "still here").await;
}

/// A hub collects a signature and keeps it for later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_signed_for_one_place_of_the_log_hands_nothing_over_at_another() {
    let (_world, [a, b, c]) = three().await;
    let room = room_of(&a, &b, &c).await;
    let to_b = draft(&a.user("bot"), "m.room.hub", Some(""), json!({ "hub_server": b.name }));
    let kept = hub_event(&room, &a.log(&room).await, &to_b, &a, &[&b]);
    a.say(&room, "bot", "later").await;
    for node in [&b, &c] {
        node.wait_for_body(&room, "later").await;
        let result = node.lm.receive(&a.name, vec![raw(&kept.json)]).await.pop().unwrap().result;
        let Err(Refusal::LmRule { rule, .. }) = result else { panic!("{}: {result:?}", node.name) };
        assert_eq!(rule, "hub.7");
        assert_eq!((hub_at(node, &room).await, transfers(&node.log(&room).await)), ("a.example".to_owned(), 0));
    }
    // At the end of the log it would have been one.
    let right = hub_event(&room, &a.log(&room).await, &to_b, &a, &[&b]);
    assert_eq!(c.lm.receive(&a.name, vec![raw(&right.json)]).await.pop().unwrap().result, Ok(()));
    assert_eq!(hub_at(&c, &room).await, "b.example");
}

/// Servers that name each other, or themselves, as the hub are each asked once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_joins_follows_the_way_to_the_hub_and_never_in_circles() {
    let (_world, [a, b, c]) = three().await;
    let room = a.create_room("public").await;
    let asked = Arc::new(AtomicUsize::new(0));
    for (node, other) in [(&a, &b), (&b, &a)] {
        let (asked, other) = (asked.clone(), other.name.clone());
        node.meddle(move |request, next| {
            let (asked, other) = (asked.clone(), other.clone());
            async move {
                if !request.uri().path().contains("/make_join/") {
                    return next.run(request).await;
                }
                asked.fetch_add(1, Ordering::SeqCst);
                let error = json!({ "errcode": "M_WRONG_SERVER", "error": "not here", "hub_server": other });
                (StatusCode::BAD_REQUEST, axum::Json(error)).into_response()
            }
        });
    }
    let refused = c.lm.join(&room, &c.user("carol"), std::slice::from_ref(&a.name), Object::new()).await;
    assert!(refused.is_err());
    assert_eq!(asked.load(Ordering::SeqCst), 2);
}

async fn four() -> (World, [Node; 4]) {
    World::handing_over([("a.example", on()), ("b.example", on()), ("c.example", on()), ("d.example", on())]).await
}

/// A room of `a`'s that everybody is in, and that went on to `b` and to `c` while nothing came to `d`.
async fn handed_on_twice(a: &Node, b: &Node, c: &Node, d: &Node) -> (OwnedRoomId, Arc<AtomicBool>) {
    let levels = json!({ "users": { a.user("bot"): 100, b.user("bob"): 100 } });
    let room = a.create_room_with("public", levels).await;
    for (node, user) in [(b, "bob"), (c, "carol"), (d, "dora")] {
        node.join(&room, user, a).await;
    }
    a.say(&room, "bot", "one").await;
    one_log(&[a, b, c, d], &room, 1).await;
    let away = cut(d, "/send/");
    hand_over(a, &room, "bot", b).await.unwrap();
    wait_for_hub(b, &room, b).await;
    wait_for_hub(c, &room, b).await;
    b.say(&room, "bob", "two").await;
    c.wait_for_body(&room, "two").await;
    hand_over(b, &room, "bob", c).await.unwrap();
    wait_for_hub(c, &room, c).await;
    wait_for_hub(a, &room, c).await;
    c.say(&room, "carol", "three").await;
    a.wait_for_body(&room, "three").await;
    b.context.outbound.stop().await;
    assert_eq!(hub_at(d, &room).await, "a.example");
    (room, away)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_was_away_while_a_log_was_handed_on_twice_is_told_by_who_keeps_it_now() {
    let (_world, [a, b, c, d]) = four().await;
    let (room, away) = handed_on_twice(&a, &b, &c, &d).await;
    a.context.outbound.stop().await;
    let _gone = (cut(&a, "/"), cut(&b, "/"));
    d.say(&room, "dora", "four").await;
    away.store(false, Ordering::SeqCst);
    c.say(&room, "carol", "five").await;
    hurry(&[&c, &d]);
    wait_for_hub(&d, &room, &c).await;
    hurry(&[&c, &d]);
    let mut said = one_log(&[&c, &d], &room, 5).await;
    said.sort();
    assert_eq!(said, ["five", "four", "one", "three", "two"]);
    assert_eq!(d.lm.room(&room).await.unwrap().unwrap().complaints, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_was_away_while_a_log_was_handed_on_twice_asks_when_the_old_hub_has_it_no_more() {
    let (_world, [a, b, c, d]) = four().await;
    let (room, away) = handed_on_twice(&a, &b, &c, &d).await;
    let _gone = cut(&b, "/");
    // Nothing comes from whoever keeps it now.
    d.say(&room, "dora", "four").await;
    wait_for_hub(&d, &room, &c).await;
    c.wait_for_body(&room, "four").await;
    away.store(false, Ordering::SeqCst);
    hurry(&[&a, &c, &d]);
    assert_eq!(one_log(&[&a, &c, &d], &room, 4).await, ["one", "two", "three", "four"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_nobody_shows_who_keeps_a_log_now_that_is_said() {
    let (_world, [a, b, c, d]) = four().await;
    let (room, _away) = handed_on_twice(&a, &b, &c, &d).await;
    let _gone = (cut(&b, "/"), cut(&c, "/ready/"));
    // The old hub says that it is not, and does not show it.
    let _silent = cut(&a, "/ready/");
    d.say(&room, "dora", "four").await;
    let complained = async {
        loop {
            let complaints = d.lm.room(&room).await.unwrap().unwrap().complaints;
            if let Some(complaint) = complaints.first() {
                return complaint.clone();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let complaint = tokio::time::timeout(Duration::from_secs(30), complained).await.unwrap();
    assert!(complaint.contains("a.example") && complaint.contains("c.example"), "{complaint}");
    assert_eq!(hub_at(&d, &room).await, "a.example");
    assert_eq!(d.fault_kinds(&room).await, ["moved"]);
}

/// The server that is to keep the log has signed for it, and the event comes to everybody but to it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_that_has_not_heard_that_it_is_one_learns_it_of_those_who_have() {
    let (_world, [a, b, c]) = three().await;
    let room = room_of(&a, &b, &c).await;
    let other = b.create_room("public").await;
    c.join(&other, "carol", &b).await;
    one_log(&[&a, &b, &c], &room, 0).await;
    b.meddle(|request, next| async move {
        let by = request.headers().get("authorization").and_then(|header| header.to_str().ok()).unwrap_or_default();
        if by.contains("origin=\"a.example\"") && request.uri().path().contains("/send/") {
            return http::StatusCode::BAD_GATEWAY.into_response();
        }
        next.run(request).await
    });
    let given = hand_over(&a, &room, "bot", &b).await.unwrap();
    assert!(!given.taken, "it does not know");
    wait_for_hub(&c, &room, &b).await;
    // And the hub before is gone.
    let _gone = cut(&a, "/");
    assert_eq!(hub_at(&b, &room).await, "a.example");
    c.say(&room, "carol", "is anybody there?").await;
    c.say(&other, "carol", "not held up").await;
    b.wait_for_body(&other, "not held up").await;
    wait_for_hub(&b, &room, &b).await;
    let log = c.wait_for_body(&room, "is anybody there?").await;
    b.say(&room, "bob", "yes").await;
    c.wait_for_body(&room, "yes").await;
    assert_eq!(ids(&b.log(&room).await)[..log.len()], ids(&log));
    assert_eq!(c.fault_kinds(&room).await, [""; 0]);
}

/// It had the log before, and has given it away: who comes to it as the hub may be late, or know more than it does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_that_has_not_heard_that_its_log_came_back_learns_it_of_those_who_have() {
    let (_world, [a, b, c]) = three().await;
    let room = room_of(&a, &b, &c).await;
    hand_over(&a, &room, "bot", &b).await.unwrap();
    wait_for_hub(&b, &room, &b).await;
    wait_for_hub(&c, &room, &b).await;
    one_log(&[&a, &b, &c], &room, 0).await;
    a.meddle(|request, next| async move {
        let by = request.headers().get("authorization").and_then(|header| header.to_str().ok()).unwrap_or_default();
        if by.contains("origin=\"b.example\"") && request.uri().path().contains("/send/") {
            return http::StatusCode::BAD_GATEWAY.into_response();
        }
        next.run(request).await
    });
    let given = hand_over(&b, &room, "bob", &a).await.unwrap();
    assert!(!given.taken, "it does not know");
    wait_for_hub(&c, &room, &a).await;
    // And the hub before is gone.
    let _gone = cut(&b, "/");
    assert_eq!(hub_at(&a, &room).await, "b.example");
    c.say(&room, "carol", "is anybody there?").await;
    wait_for_hub(&a, &room, &a).await;
    c.wait_for_body(&room, "is anybody there?").await;
    a.say(&room, "bot", "yes").await;
    c.wait_for_body(&room, "yes").await;
}

/// What the hub said before it gave the log away comes late, when it has the log again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_gets_a_log_back_is_not_blamed_for_what_the_other_gave_in_between() {
    let (_world, [a, b, c]) = three().await;
    let room = room_of(&a, &b, &c).await;
    one_log(&[&a, &b, &c], &room, 0).await;
    let away = Arc::new(AtomicBool::new(true));
    let switch = away.clone();
    c.meddle(move |request, next| {
        let by = request.headers().get("authorization").and_then(|header| header.to_str().ok()).unwrap_or_default();
        let is_from_a = by.contains("origin=\"a.example\"") && request.uri().path().contains("/send/");
        let refuse = is_from_a && switch.load(Ordering::SeqCst);
        async move { if refuse { StatusCode::SERVICE_UNAVAILABLE.into_response() } else { next.run(request).await } }
    });
    a.say(&room, "bot", "one").await;
    a.say(&room, "bot", "two").await;
    hand_over(&a, &room, "bot", &b).await.unwrap();
    wait_for_hub(&b, &room, &b).await;
    wait_for_hub(&c, &room, &b).await;
    hand_over(&b, &room, "bob", &a).await.unwrap();
    wait_for_hub(&a, &room, &a).await;
    wait_for_hub(&c, &room, &a).await;
    away.store(false, Ordering::SeqCst);
    hurry(&[&a, &b, &c]);
    a.say(&room, "bot", "three").await;
    assert_eq!(one_log(&[&a, &b, &c], &room, 3).await, ["one", "two", "three"]);
    assert_eq!(c.fault_kinds(&room).await, [""; 0]);
}

/// It says so once, and is the hub all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_5_what_a_hub_left_because_it_was_none_it_is_given_again_though_nobody_speaks() {
    let (_world, [a, b, _c]) = three().await;
    let room = a.create_room("public").await;
    b.join(&room, "bob", &a).await;
    b.lm.hasten_looks(50);
    let left = Arc::new(AtomicUsize::new(0));
    let count = left.clone();
    a.meddle(move |request, next| {
        let is_none = request.uri().path().contains("/send/") && count.load(Ordering::SeqCst) < 3;
        let count = count.clone();
        async move {
            if !is_none {
                return next.run(request).await;
            }
            count.fetch_add(1, Ordering::SeqCst);
            let body = json!({ "errcode": "M_WRONG_SERVER", "error": "not the hub", "hub_server": "b.example" });
            (StatusCode::BAD_REQUEST, axum::Json(body)).into_response()
        }
    });
    b.say(&room, "bob", "to whom?").await;
    a.wait_for_body(&room, "to whom?").await;
    assert_eq!(left.load(Ordering::SeqCst), 3);
}

/// Waits until the log at `node` ends a user's story so.
async fn wait_for_membership(node: &Node, room: &ruma::RoomId, user: &ruma::UserId, membership: &str) {
    let is_so = |log: &[isthmus::lm::Appended]| {
        let last = log.iter().rev().find(|event| event.event.state_key.as_deref() == Some(user.as_str()));
        last.is_some_and(|event| event.event.content()["membership"] == membership)
    };
    node.wait(room, membership, is_so).await;
}

/// What it knows of the room is old: it has not heard who keeps the log since.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_left_before_a_log_was_handed_over_comes_to_the_hub_of_now_by_every_way() {
    let (_world, [a, b, c]) = three().await;
    let room = room_of(&a, &b, &c).await;
    let carol = c.user("carol");
    c.lm.leave(&room, &carol, &[]).await.unwrap();
    wait_for_membership(&a, &room, &carol, "leave").await;
    hand_over(&a, &room, "bot", &b).await.unwrap();
    wait_for_hub(&a, &room, &b).await;
    wait_for_hub(&b, &room, &b).await;
    assert_eq!(hub_at(&c, &room).await, "a.example");
    // Invited by the hub of now, for its own user and for a participant's.
    for (node, user, guest, invites) in [(&b, "bob", "carol", 1), (&a, "bot", "dave", 2)] {
        let draft = member(&node.user(user), &c.user(guest), "invite");
        node.lm.invite(&room, Outgoing { draft, effect: None }).await.unwrap();
        assert_eq!(c.watcher.invites.lock().unwrap().len(), invites);
    }
    // Declined, and asked for an invite, by way of the one that was the hub.
    c.lm.leave(&room, &c.user("dave"), std::slice::from_ref(&a.name)).await.unwrap();
    wait_for_membership(&b, &room, &c.user("dave"), "leave").await;
    let knocks = draft(&b.user("bob"), "m.room.join_rules", Some(""), json!({ "join_rule": "knock" }));
    b.send(&room, knocks).await.unwrap();
    c.lm.knock(&room, &c.user("erin"), std::slice::from_ref(&a.name), Object::new()).await.unwrap();
    wait_for_membership(&b, &room, &c.user("erin"), "knock").await;
    c.lm.join(&room, &carol, std::slice::from_ref(&a.name), Object::new()).await.unwrap();
    assert_eq!(hub_at(&c, &room).await, "b.example");
    c.say(&room, "carol", "back again").await;
    b.wait_for_body(&room, "back again").await;
}

/// It is in the room and has not heard of the change, since nothing reaches it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_participant_that_has_missed_a_change_of_the_hub_invites_through_the_hub_of_now() {
    let servers = [("a.example", on()), ("b.example", on()), ("c.example", on()), ("d.example", on())];
    let (_world, [a, b, c, d]) = World::handing_over(servers).await;
    let levels = json!({ "users": { a.user("bot"): 100, c.user("carol"): 100 } });
    let room = a.create_room_with("public", levels).await;
    b.join(&room, "bob", &a).await;
    c.join(&room, "carol", &a).await;
    one_log(&[&a, &b, &c], &room, 0).await;
    let away = cut(&c, "/send/");
    hand_over(&a, &room, "bot", &b).await.unwrap();
    wait_for_hub(&b, &room, &b).await;
    assert_eq!(hub_at(&c, &room).await, "a.example");
    let draft = member(&c.user("carol"), &d.user("dora"), "invite");
    c.lm.invite(&room, Outgoing { draft, effect: None }).await.unwrap();
    assert_eq!(d.watcher.invites.lock().unwrap()[0].target, d.user("dora"));
    assert_eq!(hub_at(&c, &room).await, "b.example");
    away.store(false, Ordering::SeqCst);
    hurry(&[&a, &b]);
    wait_for_membership(&c, &room, &d.user("dora"), "invite").await;
}
