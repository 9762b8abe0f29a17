//! Joins that a hub takes, and whose answers cannot be used: nobody stays in such a room for good.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::response::Response;
use http::StatusCode;
use isthmus::clock::{Clock as _, ManualClock, SystemClock};
use isthmus::event::{Completion, Object, Pdu};
use isthmus::lm::Appended;
use isthmus::refusal::Refusal;
use isthmus::seam::Outgoing;
use isthmus::store::owed::owed_leaves;
use ruma::UserId;
use serde_json::{Value, json};
use tokio::sync::Notify;

use super::hub_transfer::{three, wait_for_hub};
use super::log_hub::respond;
use super::world::{Node, World, member};

/// How much faster a leave follows and is tried again.
const HASTE: u32 = 10_000;

/// What becomes of the answer to a join.
type Spoil = Arc<dyn Fn(Value) -> Response + Send + Sync>;

async fn object(response: Response) -> Value {
    serde_json::from_slice(&to_bytes(response.into_body(), 1 << 24).await.unwrap()).unwrap()
}

fn error(status: StatusCode, errcode: &str) -> Response {
    respond(status, json!({ "errcode": errcode, "error": "no" }))
}

/// Has a hub spoil its answers to the joins that it takes, and say a version in templates.
fn spoils(hub: &Node, version: Option<&'static str>, spoil: Spoil) {
    hub.meddle(move |request, next| {
        let spoil = spoil.clone();
        async move {
            let path = request.uri().path().to_owned();
            let response = next.run(request).await;
            if !response.status().is_success() {
                return response;
            }
            if path.contains("/send_join/") {
                return spoil(object(response).await);
            }
            if !path.contains("/make_") {
                return response;
            }
            // A bare template, as the draft has it for joins, says none.
            let mut made = object(response).await;
            made.as_object_mut().unwrap().remove("room_version");
            if let Some(version) = version.filter(|_| path.contains("/make_leave/")) {
                made["room_version"] = json!(version);
            }
            respond(StatusCode::OK, made)
        }
    });
}

/// What a user last was in a log.
fn last(log: &[Appended], user: &UserId) -> Option<String> {
    let of_user = |event: &&Appended| event.event.state_key.as_deref() == Some(user.as_str());
    let event = log.iter().rev().find(of_user)?;
    event.event.content().get("membership")?.as_str().map(str::to_owned)
}

async fn owed(node: &Node) -> i64 {
    owed_leaves(&node.context.store).await.unwrap().count
}

async fn owes_nothing(node: &Node) {
    for _ in 0..1_000 {
        if owed(node).await == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("a leave is still owed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_40_nothing_is_signed_for_a_room_of_a_version_that_is_not_known() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let via = std::slice::from_ref(&hub.name);
    let (public, asked) = (hub.create_room("public").await, hub.create_room("knock").await);
    let (alice, carol) = (part.user("alice"), part.user("carol"));
    let invite = Outgoing { draft: member(&hub.user("bot"), &carol, "invite"), effect: None };
    hub.lm.invite(&public, invite).await.unwrap();
    let sent = Arc::new(AtomicUsize::new(0));
    // One that nobody knows, and one of graphs.
    for version in ["I.2", "11"] {
        let kept = sent.clone();
        hub.meddle(move |request, next| {
            let sent = kept.clone();
            async move {
                let path = request.uri().path().to_owned();
                if path.contains("/send") {
                    sent.fetch_add(1, Ordering::SeqCst);
                }
                let response = next.run(request).await;
                if !path.contains("/make_") {
                    return response;
                }
                let mut made = object(response).await;
                made["room_version"] = json!(version);
                respond(StatusCode::OK, made)
            }
        });
        for refused in [
            part.lm.join(&public, &alice, via, Object::new()).await.map(drop),
            part.lm.knock(&asked, &alice, via, Object::new()).await.map(drop),
            part.lm.leave(&public, &carol, via).await,
        ] {
            assert_eq!(refused, Err(Refusal::IncompatibleRoomVersion(version.to_owned())));
        }
    }
    assert_eq!(sent.load(Ordering::SeqCst), 0, "nothing was sent");
    assert_eq!(owed(&part).await, 0);
    assert_eq!(last(&hub.log(&public).await, &carol).as_deref(), Some("invite"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_40_who_was_joined_by_an_answer_of_no_use_leaves_again() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    part.lm.hasten_looks(HASTE);
    let (name, key) = (hub.name.clone(), hub.context.signing_key.clone());
    let of_another_version = move |mut answer: Value| {
        let mut create = answer["state"][0].as_object().unwrap().clone();
        create.insert("content".to_owned(), json!({ "room_version": "I.2" }));
        let completion = Completion { auth_events: Vec::new(), prev_event: None };
        answer["state"][0] = json!(Pdu::build(create, completion, &name, &key).unwrap().json);
        respond(StatusCode::OK, answer)
    };
    let forged = |mut answer: Value| {
        let state = answer["state"].as_array_mut().unwrap();
        let levels = state.iter_mut().find(|event| event["type"] == "m.room.power_levels").unwrap();
        levels["content"]["users"] = json!({ "@eve:hub.example": 100 });
        respond(StatusCode::OK, answer)
    };
    let stateless = |mut answer: Value| {
        answer.as_object_mut().unwrap().remove("state");
        respond(StatusCode::OK, answer)
    };
    let cases: [(&str, Spoil); 5] = [
        ("another version", Arc::new(of_another_version)),
        ("forged", Arc::new(forged)),
        ("no state", Arc::new(stateless)),
        ("no JSON", Arc::new(|_| Response::new(Body::from("<html>")))),
        ("failed", Arc::new(|_| error(StatusCode::INTERNAL_SERVER_ERROR, "M_UNKNOWN"))),
    ];
    let alice = part.user("alice");
    for (what, spoil) in cases {
        let room = hub.create_room("public").await;
        spoils(&hub, Some("I.2"), spoil);
        let refused = part.lm.join(&room, &alice, std::slice::from_ref(&hub.name), Object::new()).await;
        assert!(refused.is_err(), "{what}");
        assert!(part.lm.room(&room).await.unwrap().is_none(), "{what}: nothing of it is believed");
        let log = hub.wait(&room, what, |log| last(log, &alice).as_deref() == Some("leave")).await;
        let joins = |event: &&Appended| {
            event.event.sender == alice && event.event.content().get("membership") == Some(&json!("join"))
        };
        assert_eq!(log.iter().filter(joins).count(), 1, "{what}");
        owes_nothing(&part).await;
    }
}

/// A leave would end the invite that the next try needs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_tries_again_comes_in_and_does_not_leave() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let via = std::slice::from_ref(&hub.name);
    let room = hub.create_room("invite").await;
    let (alice, bob) = (part.user("alice"), part.user("bob"));
    for user in [&alice, &bob] {
        let invite = Outgoing { draft: member(&hub.user("bot"), user, "invite"), effect: None };
        hub.lm.invite(&room, invite).await.unwrap();
    }
    // What the hub refuses it has not taken.
    for (status, errcode, owes) in
        [(StatusCode::FORBIDDEN, "M_FORBIDDEN", 0), (StatusCode::INTERNAL_SERVER_ERROR, "M_UNKNOWN", 1)]
    {
        hub.meddle(move |request, next| async move {
            match request.uri().path().contains("/send_join/") {
                true => error(status, errcode),
                false => next.run(request).await,
            }
        });
        part.lm.join(&room, &alice, via, Object::new()).await.map(drop).unwrap_err();
        assert_eq!(owed(&part).await, owes, "{status}");
    }
    hub.meddle(|request, next| next.run(request));
    part.join(&room, "alice", &hub).await;
    assert_eq!(owed(&part).await, 0);
    part.join(&room, "bob", &hub).await;
    part.say(&room, "alice", "here").await;
    let log = hub.wait_for_body(&room, "here").await;
    assert!(log.iter().all(|event| event.event.content().get("membership") != Some(&json!("leave"))));
}

/// Has a hub answer so to the joins that it takes, and give no template of a leave; counts how often it was asked for one.
fn lets_nobody_out(hub: &Node, answer: fn(StatusCode) -> Response) -> Arc<AtomicUsize> {
    let tries = Arc::new(AtomicUsize::new(0));
    let kept = tries.clone();
    hub.meddle(move |request, next| {
        let tries = kept.clone();
        async move {
            let path = request.uri().path().to_owned();
            if path.contains("/make_leave/") {
                tries.fetch_add(1, Ordering::SeqCst);
                return error(StatusCode::SERVICE_UNAVAILABLE, "M_UNKNOWN");
            }
            let response = next.run(request).await;
            if path.contains("/send_join/") { answer(response.status()) } else { response }
        }
    });
    tries
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leave_that_is_owed_is_tried_again_after_a_restart() {
    let (world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    part.lm.hasten_looks(HASTE);
    let (room, alice) = (hub.create_room("public").await, part.user("alice"));
    let tries = lets_nobody_out(&hub, |_| error(StatusCode::GATEWAY_TIMEOUT, "M_UNKNOWN"));
    let refused = part.lm.join(&room, &alice, std::slice::from_ref(&hub.name), Object::new()).await;
    assert!(refused.is_err());
    for _ in 0..1_000 {
        if tries.load(Ordering::SeqCst) > 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_ne!(tries.load(Ordering::SeqCst), 0, "nobody has tried to leave");
    let part = world.stop(part).await;
    assert_eq!(last(&hub.log(&room).await, &alice).as_deref(), Some("join"));
    hub.meddle(|request, next| next.run(request));
    let part = world.start(part).await;
    hub.wait(&room, "the leave", |log| last(log, &alice).as_deref() == Some("leave")).await;
    owes_nothing(&part).await;
}

/// Has a hub never answer the joins that it takes; told of each.
fn falls_silent(hub: &Node) -> Arc<Notify> {
    let taken = Arc::new(Notify::new());
    let tell = taken.clone();
    hub.meddle(move |request, next| {
        let tell = tell.clone();
        async move {
            let joins = request.uri().path().contains("/send_join/");
            let response = next.run(request).await;
            if joins {
                assert_eq!(response.status(), StatusCode::OK);
                tell.notify_one();
                std::future::pending::<()>().await;
            }
            response
        }
    });
    taken
}

/// A gateway that ends when the hub has taken a join, and before it knows.
async fn ends_while_joining(world: &World, hub: &Node, part: Node, room: &ruma::RoomId) -> Node {
    let taken = falls_silent(hub);
    let (lm, id, via, alice) = (part.lm.clone(), room.to_owned(), hub.name.clone(), part.user("alice"));
    let joining = tokio::spawn(async move { lm.join(&id, &alice, &[via], Object::new()).await.map(drop) });
    taken.notified().await;
    assert_eq!(owed(&part).await, 0, "nothing, so far");
    let alice = part.user("alice");
    let part = world.stop(part).await;
    joining.abort();
    hub.meddle(|request, next| next.run(request));
    assert_eq!(last(&hub.log(room).await, &alice).as_deref(), Some("join"));
    world.start(part).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_was_joined_when_the_gateway_ended_leaves_again() {
    let clock = ManualClock::new(SystemClock.now_ms());
    let (world, [hub, part]) = World::with_clock(["hub.example", "part.example"], clock.clone()).await;
    let room = hub.create_room("public").await;
    let part = ends_while_joining(&world, &hub, part, &room).await;
    assert_eq!(owed(&part).await, 1);
    // Nobody has tried again for a while.
    clock.advance(91 * 60_000);
    part.lm.hasten_looks(HASTE);
    let alice = part.user("alice");
    hub.wait(&room, "the leave", |log| last(log, &alice).as_deref() == Some("leave")).await;
    owes_nothing(&part).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_comes_in_after_the_gateway_ended_while_they_joined_does_not_leave() {
    let clock = ManualClock::new(SystemClock.now_ms());
    let (world, [hub, part]) = World::with_clock(["hub.example", "part.example"], clock.clone()).await;
    let room = hub.create_room("public").await;
    let part = ends_while_joining(&world, &hub, part, &room).await;
    part.join(&room, "alice", &hub).await;
    assert_eq!(owed(&part).await, 0);
    clock.advance(91 * 60_000);
    part.lm.hasten_looks(HASTE);
    part.say(&room, "alice", "here").await;
    let log = hub.wait_for_body(&room, "here").await;
    assert_eq!(last(&log, &part.user("alice")).as_deref(), Some("join"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leave_that_is_owed_follows_the_log_to_another_hub() {
    let (_world, [a, b, c]) = three().await;
    c.lm.hasten_looks(HASTE);
    let room = a.create_room_with("public", json!({ "users": { a.user("bot"): 100, b.user("bob"): 100 } })).await;
    b.join(&room, "bob", &a).await;
    lets_nobody_out(&a, |status| respond(status, json!({})));
    let carol = c.user("carol");
    c.lm.join(&room, &carol, std::slice::from_ref(&a.name), Object::new()).await.map(drop).unwrap_err();
    // Whatever `c` says, which does not know the room.
    a.lm.hand_over(&room, &a.user("bot"), &b.name, true).await.unwrap();
    wait_for_hub(&b, &room, &b).await;
    assert_eq!(last(&b.log(&room).await, &carol).as_deref(), Some("join"));
    a.meddle(|request, next| next.run(request));
    b.wait(&room, "the leave", |log| last(log, &carol).as_deref() == Some("leave")).await;
    owes_nothing(&c).await;
}

/// As a proxy does that gives up before the server behind it, or when that is not there.
fn times_out(hub: &Node, late: Option<Arc<Notify>>) {
    hub.meddle(move |request, next| {
        let late = late.clone();
        async move {
            if !request.uri().path().contains("/send_join/") {
                return next.run(request).await;
            }
            if let Some(late) = late {
                tokio::spawn(async move {
                    late.notified().await;
                    next.run(request).await
                });
            }
            error(StatusCode::GATEWAY_TIMEOUT, "M_UNKNOWN")
        }
    });
}

/// Time passes, and what is due by then has time to be done.
async fn minutes_later(part: &Node, clock: &ManualClock, minutes: i64) {
    clock.advance(minutes * 60_000);
    part.lm.hasten_looks(1);
    tokio::time::sleep(Duration::from_millis(300)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invite_stands_while_the_join_that_it_is_for_is_tried_again() {
    let clock = ManualClock::new(SystemClock.now_ms());
    let (_world, [hub, part]) = World::with_clock(["hub.example", "part.example"], clock.clone()).await;
    let (room, alice) = (hub.create_room("invite").await, part.user("alice"));
    let invite = Outgoing { draft: member(&hub.user("bot"), &alice, "invite"), effect: None };
    hub.lm.invite(&room, invite).await.unwrap();
    times_out(&hub, None);
    let refused = part.lm.join(&room, &alice, std::slice::from_ref(&hub.name), Object::new()).await;
    assert!(refused.is_err() && owed(&part).await == 1);
    hub.meddle(|request, next| next.run(request));
    for _ in 0..3 {
        minutes_later(&part, &clock, 20).await;
    }
    assert_eq!(last(&hub.log(&room).await, &alice).as_deref(), Some("invite"));
    part.join(&room, "alice", &hub).await;
    assert_eq!(owed(&part).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_joined_long_after_the_answer_leaves_again() {
    let clock = ManualClock::new(SystemClock.now_ms());
    let (_world, [hub, part]) = World::with_clock(["hub.example", "part.example"], clock.clone()).await;
    let (room, alice, late) = (hub.create_room("public").await, part.user("alice"), Arc::new(Notify::new()));
    times_out(&hub, Some(late.clone()));
    let refused = part.lm.join(&room, &alice, std::slice::from_ref(&hub.name), Object::new()).await;
    assert!(refused.is_err());
    minutes_later(&part, &clock, 2).await;
    assert_eq!(owed(&part).await, 1, "that it is not in yet says nothing");
    late.notify_one();
    hub.wait(&room, "the join", |log| last(log, &alice).as_deref() == Some("join")).await;
    minutes_later(&part, &clock, 90).await;
    hub.wait(&room, "the leave", |log| last(log, &alice).as_deref() == Some("leave")).await;
    owes_nothing(&part).await;
}
