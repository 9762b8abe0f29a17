//! What a server gives of a log that it has taken over: of its copy what is the log, in the log's order, and nothing else.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::to_bytes;
use axum::extract::Request;
use axum::response::IntoResponse as _;
use http::StatusCode;
use isthmus::federation::RemoteError;
use isthmus::lm::{Appended, HandedOver, Sent};
use isthmus::store::lm::{lost_since, missing};
use ruma::{OwnedEventId, OwnedRoomId, RoomId};
use serde_json::{Value, json};

use super::hub_transfer::{cut, hand_over, hurry, on, one_log, room_of, three, wait_for_hub};
use super::log_hub::respond;
use super::world::{Node, World, bodies, draft};

const PATIENCE: Duration = Duration::from_secs(30);
const UNSTABLE: &str = "/_matrix/federation/unstable/org.matrix.i-d.ralston-mimi-linearized-matrix.02";

/// Has a server answer to all that is sent to it, and take nothing of it, while the switch is on; and what that was.
fn swallow(node: &Node) -> (Arc<AtomicBool>, Arc<Mutex<String>>) {
    let (on, swallowed) = (Arc::new(AtomicBool::new(true)), Arc::new(Mutex::new(String::new())));
    let (switch, kept) = (on.clone(), swallowed.clone());
    node.meddle(move |request, next| {
        let (swallows, kept) = (switch.load(Ordering::SeqCst), kept.clone());
        async move {
            if !swallows || !request.uri().path().contains("/send/") {
                return next.run(request).await;
            }
            let body = to_bytes(request.into_body(), 1 << 20).await.unwrap();
            kept.lock().unwrap().push_str(&String::from_utf8_lossy(&body));
            respond(StatusCode::OK, json!({}))
        }
    });
    (on, swallowed)
}

async fn until(what: &str, wanted: impl AsyncFn() -> bool) {
    let waiting = async {
        while !wanted().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, waiting).await.is_ok(), "waited in vain for {what}");
}

/// Hands a log over as soon as nothing of it is missing at the other server.
async fn hand_over_in_time(from: &Node, room: &RoomId, to: &Node) -> HandedOver {
    let giving = async {
        loop {
            match hand_over(from, room, "bot", to).await {
                Ok(given) => return given,
                Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        }
    };
    tokio::time::timeout(PATIENCE, giving).await.expect("it is taken")
}

/// What a server gives of a log up to an event, four events at once, to the last that it gives.
async fn read_back(reader: &Node, of: &Node, room: &RoomId, from: &OwnedEventId) -> Vec<Value> {
    let (mut all, mut next) = (Vec::new(), Some(from.to_string()));
    while let Some(from) = next {
        let page = match reader.get(of, &format!("{UNSTABLE}/backfill/{room}?v={from}&limit=4")).await {
            Ok(answer) => answer["pdus"].as_array().unwrap().clone(),
            Err(RemoteError::Status { status: StatusCode::NOT_FOUND, .. }) => break,
            Err(error) => panic!("{error}"),
        };
        next = page[0]["prev_events"][0].as_str().map(str::to_owned);
        all.splice(0..0, page);
    }
    all
}

/// The log from the last join of a user on, up to an event.
fn stretch(log: &[Appended], user: &str, until: &OwnedEventId) -> Vec<Value> {
    let is_join = |event: &Appended| {
        event.event.state_key.as_deref() == Some(user) && event.event.content()["membership"] == "join"
    };
    let last = log.iter().position(|event| event.event.event_id == *until).unwrap();
    let first = log[..last].iter().rposition(is_join).unwrap();
    log[first..=last].iter().map(|event| Value::Object(event.event.json.clone())).collect()
}

fn id_of(log: &[Appended], body: &str) -> OwnedEventId {
    let is_it = |event: &&Appended| event.event.content().get("body").and_then(Value::as_str) == Some(body);
    log.iter().find(is_it).unwrap().event.event_id.clone()
}

/// A room of `a`'s, of which `b` has got two events late: its copy ends with them.
async fn with_a_late_part(world: &World, [a, b, c]: [Node; 3], hidden: bool) -> ([Node; 3], OwnedRoomId) {
    let levels = json!({ "users": { a.user("bot"): 100, b.user("bob"): 100 } });
    let room = a.create_room_with("public", levels).await;
    if hidden {
        let content = json!({ "history_visibility": "joined" });
        a.send(&room, draft(&a.user("bot"), "m.room.history_visibility", Some(""), content)).await.unwrap();
    }
    b.join(&room, "bob", &a).await;
    c.join(&room, "carol", &a).await;
    a.say(&room, "bot", "before").await;
    b.wait_for_body(&room, "before").await;
    let (swallows, swallowed) = swallow(&b);
    let refuses = cut_off(&a, "/backfill/");
    for body in ["missed one", "missed two"] {
        a.say(&room, "bot", body).await;
    }
    until("the messages that get lost", async || swallowed.lock().unwrap().contains("missed two")).await;
    swallows.store(false, Ordering::SeqCst);
    a.say(&room, "bot", "after").await;
    b.wait_for_body(&room, "after").await;
    refuses.store(false, Ordering::SeqCst);
    let b = world.restart(b).await;
    b.wait_for_body(&room, "missed two").await;
    assert_eq!(b.bodies(&room).await, ["before", "after", "missed one", "missed two"]);
    ([a, b, c], room)
}

/// The same, and it has taken the log over.
async fn taken_over_with_a_late_part(
    world: &World,
    nodes: [Node; 3],
    hidden: bool,
) -> ([Node; 3], OwnedRoomId, HandedOver) {
    let ([a, b, c], room) = with_a_late_part(world, nodes, hidden).await;
    // From here on the copy is in order again.
    a.say(&room, "bot", "end").await;
    b.wait_for_body(&room, "end").await;
    assert_eq!(b.bodies(&room).await, ["before", "after", "missed one", "missed two", "end"]);
    let given = hand_over_in_time(&a, &room, &b).await;
    for node in [&b, &c] {
        wait_for_hub(node, &room, &b).await;
    }
    ([a, b, c], room, given)
}

/// Has a server refuse this for good while the switch is on.
fn cut_off(node: &Node, what: &'static str) -> Arc<AtomicBool> {
    let refuses = Arc::new(AtomicBool::new(true));
    let switch = refuses.clone();
    node.meddle(move |request, next| {
        let refuse = switch.load(Ordering::SeqCst) && request.uri().path().contains(what);
        async move {
            match refuse {
                true => respond(StatusCode::FORBIDDEN, json!({ "errcode": "M_FORBIDDEN", "error": "not now" })),
                false => next.run(request).await,
            }
        }
    });
    refuses
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_ends_with_what_came_late_can_be_gone_on_with() {
    let (world, nodes) = three().await;
    let ([a, b, c], room) = with_a_late_part(&world, nodes, false).await;
    let end = id_of(&a.log(&room).await, "after");
    let given = hand_over_in_time(&a, &room, &b).await;
    for node in [&b, &c] {
        wait_for_hub(node, &room, &b).await;
    }
    let handed = a.log(&room).await.into_iter().find(|event| event.event.event_id == given.event_id).unwrap();
    assert_eq!(handed.event.prev_events, [end]);
    for (node, user, body) in [(&a, "bot", "a"), (&b, "bob", "b"), (&c, "carol", "c")] {
        node.say(&room, user, body).await;
    }
    let said = one_log(&[&a, &c], &room, 7).await;
    assert_eq!(said[..4], ["before", "missed one", "missed two", "after"]);
    b.wait_for_body(&room, "c").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_came_late_into_a_copy_is_given_where_it_stands_in_the_log() {
    let (world, nodes) = three().await;
    let ([a, b, c], room, given) = taken_over_with_a_late_part(&world, nodes, false).await;
    let log = a.log(&room).await;
    assert_eq!(bodies(&log), ["before", "missed one", "missed two", "after", "end"]);
    let stay = stretch(&log, "@bob:b.example", &given.event_id);
    assert_eq!(read_back(&c, &b, &room, &given.event_id).await, stay);
    // In the middle of it too, and each by itself.
    let late = id_of(&log, "missed two");
    let of_late = stretch(&log, "@bob:b.example", &late);
    assert_eq!(read_back(&c, &b, &room, &late).await, of_late);
    assert!(c.get(&b, &format!("{UNSTABLE}/event/{late}")).await.is_ok());
    // The state there is not what stands before it here.
    let state = |at: &OwnedEventId| format!("/_matrix/federation/v1/state/{room}?event_id={at}");
    let refused = c.get(&b, &state(&late)).await;
    assert!(matches!(refused, Err(RemoteError::Status { status: StatusCode::NOT_FOUND, .. })), "{refused:?}");
    assert!(c.get(&b, &state(&given.event_id)).await.is_ok());
    // The hub before still has it.
    assert!(c.get(&a, &state(&late)).await.is_ok());
    // And so it is after a restart.
    let b = world.restart(b).await;
    assert_eq!(read_back(&c, &b, &room, &given.event_id).await, stay);
    for (node, user, body) in [(&a, "bot", "a"), (&b, "bob", "b"), (&c, "carol", "c")] {
        node.say(&room, user, body).await;
    }
    one_log(&[&a, &c], &room, 8).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_came_late_is_not_given_where_who_sees_what_hangs_on_the_order() {
    let (world, nodes) = three().await;
    let ([a, b, c], room, given) = taken_over_with_a_late_part(&world, nodes, true).await;
    let log = a.log(&room).await;
    let from = log.iter().position(|event| event.event.event_id == id_of(&log, "end")).unwrap();
    let tail = log[from..].iter().take(2).map(|event| Value::Object(event.event.json.clone()));
    assert_eq!(read_back(&c, &b, &room, &given.event_id).await, tail.collect::<Vec<_>>());
    assert!(c.get(&b, &format!("{UNSTABLE}/event/{}", id_of(&log, "after"))).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_new_hub_does_not_have_the_hub_before_gives() {
    let (_world, [a, b, c]) = three().await;
    let levels = json!({ "users": { a.user("bot"): 100, b.user("bob"): 100 } });
    let room = a.create_room_with("public", levels).await;
    c.join(&room, "carol", &a).await;
    let is_cut = cut(&c, "/send/");
    a.say(&room, "bot", "one").await;
    b.join(&room, "bob", &a).await;
    a.say(&room, "bot", "two").await;
    b.wait_for_body(&room, "two").await;
    hand_over_in_time(&a, &room, &b).await;
    wait_for_hub(&b, &room, &b).await;
    // From here on it hears of the new hub alone.
    a.context.outbound.stop().await;
    is_cut.store(false, Ordering::SeqCst);
    hurry(&[&b, &c]);
    assert_eq!(one_log(&[&a, &c], &room, 2).await, ["one", "two"]);
    assert_eq!(c.fault_kinds(&room).await, [""; 0]);
    assert_eq!(missing(&c.context.store, Some(&room)).await.unwrap().count, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_redacted_while_the_new_hub_was_out_is_not_given_by_it() {
    let (_world, [a, b, c]) = three().await;
    let room = room_of(&a, &b, &c).await;
    let bot = a.user("bot");
    let topic = draft(&bot, "m.room.topic", Some(""), json!({ "topic": "secret" }));
    let Sent::Appended(topic) = a.send(&room, topic).await.unwrap() else { panic!("a hub appends") };
    let Sent::Appended(secret) = a.say(&room, "bot", "secret").await else { panic!("a hub appends") };
    let [topic, secret] = [topic, secret].map(|event| event.event.event_id.clone());
    b.wait_for_body(&room, "secret").await;
    b.lm.leave(&room, &b.user("bob"), &[]).await.unwrap();
    let is_out = |log: &[Appended]| {
        log.last().is_some_and(|last| last.event.content().get("membership") == Some(&json!("leave")))
    };
    b.wait(&room, "the leave", is_out).await;
    for target in [&topic, &secret] {
        a.send(&room, draft(&bot, "m.room.redaction", None, json!({ "redacts": target }))).await.unwrap();
    }
    b.join(&room, "bob", &a).await;
    a.say(&room, "bot", "later").await;
    b.wait_for_body(&room, "later").await;
    let given = hand_over_in_time(&a, &room, &b).await;
    for node in [&b, &c] {
        wait_for_hub(node, &room, &b).await;
    }
    let event = |id: &OwnedEventId| format!("{UNSTABLE}/event/{id}");
    let refused = c.get(&b, &event(&secret)).await;
    assert!(matches!(refused, Err(RemoteError::Status { status: StatusCode::NOT_FOUND, .. })), "{refused:?}");
    assert!(c.get(&b, &format!("{UNSTABLE}/backfill/{room}?v={secret}&limit=1")).await.is_err());
    // What is current it has, as the hub before gives it.
    assert_eq!(c.get(&b, &event(&topic)).await.unwrap(), c.get(&a, &event(&topic)).await.unwrap());
    let state = c.get(&b, &format!("/_matrix/federation/v1/state/{room}?event_id={}", given.event_id)).await.unwrap();
    assert!(!Value::Object(state).to_string().contains("secret"));
    assert!(b.lm.state(&room).await.unwrap().get("m.room.topic", "").unwrap().content().is_empty());
    // From its last join on it has all.
    let log = a.log(&room).await;
    let stay = stretch(&log, "@bob:b.example", &given.event_id);
    assert_eq!(read_back(&c, &b, &room, &given.event_id).await, stay);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_hub_that_has_not_heard_of_it_is_not_said_to_have_gone_back() {
    let (_world, [a, b, c]) =
        World::handing_over([("a.example", on()), ("b.example", on()), ("c.example", on())]).await;
    let room = room_of(&a, &b, &c).await;
    let (is_cut, asked) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicUsize::new(0)));
    let (switch, count) = (is_cut.clone(), asked.clone());
    b.meddle(move |request: Request, next| {
        let path = request.uri().path();
        count.fetch_add(usize::from(path.contains("/make_join/")), Ordering::SeqCst);
        let refuse = switch.load(Ordering::SeqCst) && path.contains("/send/");
        async move { if refuse { StatusCode::SERVICE_UNAVAILABLE.into_response() } else { next.run(request).await } }
    });
    let given = hand_over(&a, &room, "bot", &b).await.unwrap();
    assert!(!given.taken);
    wait_for_hub(&c, &room, &b).await;
    c.lm.hasten_looks(50);
    until("two looks", async || {
        c.lm.resume().await.unwrap();
        asked.load(Ordering::SeqCst) >= 2
    })
    .await;
    // It has been asked about the first of them by now.
    assert_eq!(c.fault_kinds(&room).await, [""; 0]);
    assert_eq!(lost_since(&c.context.store, &room).await.unwrap(), None);
    is_cut.store(false, Ordering::SeqCst);
    hurry(&[&a, &b, &c]);
    wait_for_hub(&b, &room, &b).await;
    c.say(&room, "carol", "on").await;
    assert_eq!(one_log(&[&a, &b, &c], &room, 1).await, ["on"]);
    assert_eq!(c.fault_kinds(&room).await, [""; 0]);
}
