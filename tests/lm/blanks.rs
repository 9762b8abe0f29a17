//! Events whose content a hub leaves out: of which it may be said that it rewrote them, and of which not.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use isthmus::lm::{Appended, Sent};
use isthmus::store::lm as stored;
use ruma::{EventId, OwnedEventId, OwnedRoomId, RoomId};
use serde_json::{Value, json};

use super::hostile_hub::{give, room_of};
use super::hub_transfer::{hand_over, hub_at, on};
use super::log_hub::respond;
use super::world::{Node, World, draft, member};

/// A room of the hub's with `@alice` of the participant and `@carol` of a third server, whose log reaches the participant by a test's
/// hands alone; and how many events it has.
async fn by_hand(hub: &Node, part: &Node, third: &Node) -> (OwnedRoomId, usize) {
    let room = room_of(hub, part).await;
    third.join(&room, "carol", hub).await;
    let known = hub.log(&room).await.len();
    part.wait(&room, "the join", |log| log.len() == known).await;
    part.meddle(|request, next| async move {
        match request.uri().path().contains("/send/") {
            true => axum::response::IntoResponse::into_response(http::StatusCode::SERVICE_UNAVAILABLE),
            false => next.run(request).await,
        }
    });
    (room, known)
}

/// Gives the participant the hub's log from an event on, these events without their content.
async fn give_from(part: &Node, hub: &Node, room: &RoomId, from: usize, blank: &[&str]) {
    for event in hub.log(room).await.iter().skip(from) {
        let body = event.event.content().get("body").and_then(Value::as_str).unwrap_or_default();
        let json = match blank.contains(&body) {
            true => isthmus::event::redact(&event.event.json, isthmus::event::Redaction::Draft),
            false => event.event.json.clone(),
        };
        assert_eq!(give(part, hub, &json).await.result, Ok(()));
    }
}

async fn until(wanted: impl AsyncFn() -> bool) {
    let waiting = async {
        while !wanted().await {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), waiting).await.unwrap();
}

/// Which events came without content and are not explained yet.
async fn blanks(part: &Node, room: &RoomId) -> usize {
    stored::blanks(&part.context.store, room, i64::MAX, 100).await.unwrap().len()
}

async fn id_of(hub: &Node, room: &RoomId, body: &str) -> OwnedEventId {
    let log = hub.wait_for_body(room, body).await;
    let is_it = |event: &&Appended| event.event.content().get("body").and_then(Value::as_str) == Some(body);
    log.iter().find(is_it).unwrap().event.event_id.clone()
}

/// What a redaction redacts is given so by every hub; what nothing redacts is kept from the participants, whoever said it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_30_a_hub_that_leaves_out_what_was_said_is_found_out() {
    let (_world, [hub, part, third]) = World::new(["hub.example", "part.example", "third.example"]).await;
    let (room, known) = by_hand(&hub, &part, &third).await;
    part.lm.hasten_looks(50);
    let mut rewritten = Vec::new();
    for (node, user) in [(&third, "carol"), (&part, "alice")] {
        for what in ["redacted", "blanked"] {
            node.say(&room, user, &format!("{what} {user}")).await;
            let said = id_of(&hub, &room, &format!("{what} {user}")).await;
            match what {
                "redacted" => drop(redact(&hub, &room, "bot", &said).await),
                _ => rewritten.push(said.to_string()),
            }
        }
    }
    third.say(&room, "carol", "left").await;
    hub.wait_for_body(&room, "left").await;
    let blank = ["redacted carol", "blanked carol", "redacted alice", "blanked alice"];
    give_from(&part, &hub, &room, known, &blank).await;
    until(async || part.fault_kinds(&room).await.len() >= 2).await;
    let (_, faults) = stored::faults(&part.context.store, &room, 10).await.unwrap();
    let mut found: Vec<_> = faults.iter().map(|fault| (fault.kind.as_str(), fault.event_id.as_str())).collect();
    found.sort();
    rewritten.sort();
    assert_eq!(found, rewritten.iter().map(|id| ("rewritten", id.as_str())).collect::<Vec<_>>());
}

async fn redact(node: &Node, room: &RoomId, user: &str, target: &EventId) -> Sent {
    let redaction = draft(&node.user(user), "m.room.redaction", None, json!({ "redacts": target }));
    node.send(room, redaction).await.unwrap()
}

/// A hub that does not tell its log's end may have what redacts an event, and not be able to send it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_30_a_hub_that_falls_silent_is_not_accused_of_leaving_anything_out() {
    let (world, [hub, part, third]) = World::new(["hub.example", "part.example", "third.example"]).await;
    let (room, known) = by_hand(&hub, &part, &third).await;
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    hub.meddle(move |request, next| {
        count.fetch_add(usize::from(request.uri().path().contains("/make_join/")), Ordering::SeqCst);
        next.run(request)
    });
    third.say(&room, "carol", "blanked").await;
    hub.wait_for_body(&room, "blanked").await;
    // What takes five minutes takes 100 ms, and two looks are 10 ms apart.
    part.lm.hasten_looks(3_000);
    give_from(&part, &hub, &room, known, &["blanked"]).await;
    let looked_for_long = async |part: &Node| {
        let before = asked.load(Ordering::SeqCst);
        until(async || {
            part.lm.resume().await.unwrap();
            asked.load(Ordering::SeqCst) >= before + 30
        })
        .await;
    };
    looked_for_long(&part).await;
    assert_eq!((part.fault_kinds(&room).await, blanks(&part, &room).await), (Vec::new(), 1));
    let part = world.restart(part).await;
    part.lm.hasten_looks(3_000);
    looked_for_long(&part).await;
    assert_eq!((part.fault_kinds(&room).await, blanks(&part, &room).await), (Vec::new(), 1));
    third.say(&room, "carol", "later").await;
    hub.wait_for_body(&room, "later").await;
    hub.context.outbound.retry(&part.name);
    part.wait_for_body(&room, "later").await;
    until(async || part.fault_kinds(&room).await == ["rewritten"]).await;
    assert_eq!(blanks(&part, &room).await, 0);
}

/// The draft leaves open who may redact what: a hub goes by its own rules.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_redaction_names_that_does_not_redact_by_our_rules_is_no_fault_of_the_hub() {
    let (_world, [hub, part, third]) = World::new(["hub.example", "part.example", "third.example"]).await;
    let (room, known) = by_hand(&hub, &part, &third).await;
    third.join(&room, "dave", &hub).await;
    third.say(&room, "carol", "redacted by a neighbour").await;
    let said = id_of(&hub, &room, "redacted by a neighbour").await;
    redact(&third, &room, "dave", &said).await;
    third.say(&room, "carol", "later").await;
    hub.wait_for_body(&room, "later").await;
    part.lm.hasten_looks(3_000);
    give_from(&part, &hub, &room, known, &["redacted by a neighbour"]).await;
    until(async || blanks(&part, &room).await == 0).await;
    assert_eq!(part.fault_kinds(&room).await, Vec::<String>::new());
}

/// What redacts an event after we have left is told to others alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_came_without_content_before_we_were_out_is_no_fault_of_the_hub() {
    let (_world, [hub, part, third]) = World::new(["hub.example", "part.example", "third.example"]).await;
    let (room, known) = by_hand(&hub, &part, &third).await;
    third.say(&room, "carol", "redacted later").await;
    let said = id_of(&hub, &room, "redacted later").await;
    give_from(&part, &hub, &room, known, &["redacted later"]).await;
    assert_eq!(blanks(&part, &room).await, 1);
    hub.send(&room, member(&hub.user("bot"), &part.user("alice"), "leave")).await.unwrap();
    give_from(&part, &hub, &room, known + 1, &[]).await;
    assert_eq!(blanks(&part, &room).await, 0);
    redact(&hub, &room, "bot", &said).await;
    part.meddle(|request, next| next.run(request));
    part.lm.hasten_looks(3_000);
    let invite =
        isthmus::seam::Outgoing { draft: member(&hub.user("bot"), &part.user("alice"), "invite"), effect: None };
    hub.lm.invite(&room, invite).await.unwrap();
    part.join(&room, "alice", &hub).await;
    third.say(&room, "carol", "later").await;
    hub.wait_for_body(&room, "later").await;
    hub.context.outbound.retry(&part.name);
    part.wait_for_body(&room, "later").await;
    assert_eq!((part.fault_kinds(&room).await, blanks(&part, &room).await), (Vec::new(), 0));
}

/// A hub may redact redactions, of which nothing is left that says what they redact.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_redacted_redaction_may_name_is_no_fault_of_the_hub() {
    let (_world, [hub, part, third]) = World::new(["hub.example", "part.example", "third.example"]).await;
    let (room, known) = by_hand(&hub, &part, &third).await;
    third.say(&room, "carol", "redacted").await;
    let said = id_of(&hub, &room, "redacted").await;
    give_from(&part, &hub, &room, known, &["redacted"]).await;
    assert_eq!(blanks(&part, &room).await, 1);
    redact(&hub, &room, "bot", &said).await;
    let redaction = hub.log(&room).await.pop().unwrap().event.json.clone();
    let copy = isthmus::event::redact(&redaction, isthmus::event::Redaction::Draft);
    assert_ne!(copy, redaction);
    assert_eq!(give(&part, &hub, &copy).await.result, Ok(()));
    assert_eq!((part.fault_kinds(&room).await, blanks(&part, &room).await), (Vec::new(), 0));
}

/// What the hub before kept back, or redacted and did not tell any more, is not the next one's fault.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_came_without_content_before_the_log_was_handed_over_is_no_fault_of_the_new_hub() {
    let names = ["hub.example", "part.example", "third.example"];
    let (_world, [hub, part, third]) = World::handing_over(names.map(|name| (name, on()))).await;
    let (room, known) = by_hand(&hub, &part, &third).await;
    third.say(&room, "carol", "blanked").await;
    hub.wait_for_body(&room, "blanked").await;
    give_from(&part, &hub, &room, known, &["blanked"]).await;
    assert_eq!(blanks(&part, &room).await, 1);
    let known = hub.log(&room).await.len();
    third.wait_for_body(&room, "blanked").await;
    hand_over(&hub, &room, "bot", &third).await.unwrap();
    give_from(&part, &hub, &room, known, &[]).await;
    assert_eq!((hub_at(&part, &room).await.as_str(), blanks(&part, &room).await), ("third.example", 0));
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    third.meddle(move |request, next| {
        count.fetch_add(usize::from(request.uri().path().contains("/make_join/")), Ordering::SeqCst);
        next.run(request)
    });
    part.meddle(|request, next| next.run(request));
    part.lm.hasten_looks(3_000);
    third.say(&room, "carol", "later").await;
    third.context.outbound.retry(&part.name);
    part.wait_for_body(&room, "later").await;
    until(async || {
        part.lm.resume().await.unwrap();
        asked.load(Ordering::SeqCst) >= 10
    })
    .await;
    assert_eq!(part.fault_kinds(&room).await, Vec::<String>::new());
}

/// In what a hub does not give may be what redacts an event.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_30_of_a_log_with_a_hole_nothing_is_said_about_events_without_content_until_it_is_filled() {
    let (world, [hub, part, third]) = World::new(["hub.example", "part.example", "third.example"]).await;
    let (room, known) = by_hand(&hub, &part, &third).await;
    let (refuses, asked) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicUsize::new(0)));
    let (switch, count) = (refuses.clone(), asked.clone());
    hub.meddle(move |request, next| {
        let path = request.uri().path();
        count.fetch_add(usize::from(path.contains("/make_join/")), Ordering::SeqCst);
        let refuse = switch.load(Ordering::SeqCst) && path.contains("/backfill/");
        async move {
            match refuse {
                true => respond(http::StatusCode::FORBIDDEN, json!({ "errcode": "M_FORBIDDEN", "error": "not now" })),
                false => next.run(request).await,
            }
        }
    });
    third.say(&room, "carol", "blanked").await;
    hub.wait_for_body(&room, "blanked").await;
    give_from(&part, &hub, &room, known, &["blanked"]).await;
    assert_eq!(blanks(&part, &room).await, 1);
    hub.say(&room, "bot", "not given").await;
    let Sent::Appended(last) = hub.say(&room, "bot", "last").await else { panic!("a hub appends") };
    assert_eq!(give(&part, &hub, &last.event.json).await.result, Ok(()));
    assert_eq!(part.bodies(&room).await, ["last"]);
    part.lm.hasten_looks(3_000);
    until(async || {
        part.lm.resume().await.unwrap();
        asked.load(Ordering::SeqCst) >= 30
    })
    .await;
    assert_eq!((part.fault_kinds(&room).await, blanks(&part, &room).await), (vec!["skipped".to_owned()], 1));
    refuses.store(false, Ordering::SeqCst);
    let part = world.restart(part).await;
    part.lm.hasten_looks(3_000);
    part.wait_for_body(&room, "not given").await;
    until(async || {
        part.lm.resume().await.unwrap();
        part.fault_kinds(&room).await == ["rewritten", "skipped"]
    })
    .await;
}
