//! Gateways that join each other's rooms over their real routes.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use isthmus::clock::{Clock as _, ManualClock, SystemClock};
use isthmus::dag::NewRoom;
use isthmus::event::{Object, RoomVersion};
use isthmus::federation::{Feed, FeedKind};
use isthmus::refusal::Refusal;
use isthmus::seam::Outgoing;
use isthmus::store::owed::owed_leaves;
use ruma::{OwnedEventId, OwnedRoomId, OwnedUserId, RoomId};
use serde_json::{Value, json};

use crate::lm::world::{Node, World, draft, member, message};

const VERSIONS: [RoomVersion; 3] = [RoomVersion::V10, RoomVersion::V11, RoomVersion::V12];

async fn room(node: &Node, version: RoomVersion, join_rules: Value) -> OwnedRoomId {
    let bot = node.user("bot");
    let initial_state = vec![draft(&bot, "m.room.join_rules", Some(""), join_rules)];
    node.dag.create_room(NewRoom { creator: bot, version, initial_state }).await.unwrap()
}

async fn join(node: &Node, room: &RoomId, localpart: &str, via: &[&Node]) -> Result<(), Refusal> {
    let via: Vec<_> = via.iter().map(|node| node.name.clone()).collect();
    node.dag.join(room, &via, &node.user(localpart), Object::new()).await.map(drop)
}

async fn send(node: &Node, room: &RoomId, draft: isthmus::seam::Draft) -> Result<OwnedEventId, Refusal> {
    let sent = node.dag.send(room, vec![Outgoing { draft, effect: None }]).await.remove(0);
    sent.map(|event| event.event_id.clone())
}

async fn say(node: &Node, room: &RoomId, localpart: &str, body: &str) -> OwnedEventId {
    send(node, room, message(&node.user(localpart), body)).await.unwrap()
}

/// Waits until these have the event.
async fn hear(nodes: &[&Node], event: &OwnedEventId) {
    for node in nodes {
        eventually(&format!("{} to have {event}", node.name), async || node.dag.event(event).await.unwrap().is_some())
            .await;
    }
}

async fn eventually(what: &str, mut is: impl AsyncFnMut() -> bool) {
    for _ in 0..1500 {
        if is().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("waited in vain for {what}");
}

async fn membership(node: &Node, room: &RoomId, user: &OwnedUserId) -> Option<String> {
    let event = node.dag.state_event(room, "m.room.member", user.as_str()).await.unwrap()?;
    event.content.get("membership")?.as_str().map(str::to_owned)
}

#[tokio::test(flavor = "multi_thread")]
async fn three_gateways_talk_in_a_room_that_one_of_them_made() {
    let (world, [a, b, c]) = World::new(["a.example", "b.example", "c.example"]).await;
    let mut b = b;
    for version in VERSIONS {
        let room = room(&a, version, json!({ "join_rule": "public" })).await;
        say(&a, &room, "bot", "before").await;
        join(&b, &room, "bob", &[&a]).await.unwrap();
        let hello = say(&a, &room, "bot", "hello").await;
        hear(&[&b], &hello).await;
        let answer = say(&b, &room, "bob", "hello yourself").await;
        hear(&[&a], &answer).await;

        // The third comes through the second, who does not live there either.
        join(&c, &room, "carol", &[&b]).await.unwrap();
        let carol = c.user("carol");
        eventually("the first to know", async || membership(&a, &room, &carol).await.is_some()).await;
        b = world.restart(b).await;
        for (node, name) in [(&a, "bot"), (&b, "bob"), (&c, "carol")] {
            let said = say(node, &room, name, &format!("all of {version}")).await;
            hear(&[&a, &b, &c], &said).await;
        }
        // A second user goes through nobody, and all hear of it.
        let dave = b.user("dave");
        join(&b, &room, "dave", &[]).await.unwrap();
        eventually("dave at the others", async || {
            membership(&a, &room, &dave).await.is_some() && membership(&c, &room, &dave).await.is_some()
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_room_that_was_left_is_joined_anew() {
    let (_world, [a, b]) = World::new(["a.example", "b.example"]).await;
    for version in VERSIONS {
        let room = room(&a, version, json!({ "join_rule": "public" })).await;
        join(&b, &room, "bob", &[&a]).await.unwrap();
        b.dag.leave(&room, &b.user("bob"), &[], None).await.unwrap();
        let bob = b.user("bob");
        eventually("bob to be gone", async || membership(&a, &room, &bob).await.as_deref() == Some("leave")).await;
        let topic = draft(&a.user("bot"), "m.room.topic", Some(""), json!({ "topic": "while you were away" }));
        let topic = send(&a, &room, topic).await.unwrap();
        assert!(b.dag.event(&topic).await.unwrap().is_none());

        join(&b, &room, "bob", &[]).await.unwrap();
        let state = b.dag.state_event(&room, "m.room.topic", "").await.unwrap().unwrap();
        assert_eq!(state.event_id, topic);
        assert_eq!(b.dag.joined_servers(&room).await.unwrap().len(), 2);
        let answer = say(&b, &room, "bob", "back").await;
        hear(&[&a], &answer).await;
        let hello = say(&a, &room, "bot", "welcome").await;
        hear(&[&b], &hello).await;
    }
}

/// What a server does with transactions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hears {
    All,
    /// As while a queue waits after an outage.
    Nothing,
    /// It says that it has them, and has them wait, as for what is before them.
    Later,
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leave_that_has_not_arrived_stands_beside_the_join_that_overtakes_it() {
    leaves_are_overtaken(Hears::Nothing).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leave_that_has_arrived_and_waits_there_stands_beside_the_join_that_overtakes_it() {
    leaves_are_overtaken(Hears::Later).await;
}

async fn leaves_are_overtaken(away: Hears) {
    let (_world, [a, b]) = World::new(["a.example", "b.example"]).await;
    // Handshakes reach it in any case.
    let (hears, kept) = (Arc::new(Mutex::new(Hears::All)), Arc::new(Mutex::new(Vec::<Value>::new())));
    let (hearing, keeping) = (hears.clone(), kept.clone());
    a.meddle(move |request, next| {
        let hears = if request.uri().path().contains("/send/") { *hearing.lock().unwrap() } else { Hears::All };
        let kept = keeping.clone();
        async move {
            match hears {
                Hears::All => next.run(request).await,
                Hears::Nothing => StatusCode::SERVICE_UNAVAILABLE.into_response(),
                Hears::Later => {
                    let body = axum::body::to_bytes(request.into_body(), 1 << 20).await.unwrap();
                    let body: Value = serde_json::from_slice(&body).unwrap();
                    kept.lock().unwrap().extend(body["pdus"].as_array().into_iter().flatten().cloned());
                    axum::Json(json!({ "pdus": {} })).into_response()
                }
            }
        }
    });
    let is =
        async |user: &OwnedUserId, room: &RoomId| (membership(&a, room, user).await, membership(&b, room, user).await);
    let both = |wanted: &str| (Some(wanted.to_owned()), Some(wanted.to_owned()));
    for (version, rule) in VERSIONS.into_iter().flat_map(|version| [(version, "public"), (version, "invite")]) {
        let rules = |rule: &str| json!({ "join_rule": rule });
        let room = room(&a, version, rules("public")).await;
        let [bob, carol] = [b.user("bob"), b.user("carol")];
        for name in ["bob", "carol"] {
            join(&b, &room, name, &[&a]).await.unwrap();
        }
        eventually("both at the other", async || membership(&a, &room, &carol).await.is_some()).await;
        let said = send(&a, &room, draft(&a.user("bot"), "m.room.join_rules", Some(""), rules(rule))).await.unwrap();
        hear(&[&b], &said).await;

        *hears.lock().unwrap() = away;
        for user in [&carol, &bob] {
            b.dag.leave(&room, user, &[], None).await.unwrap();
        }
        if away == Hears::Later {
            let feed = Feed { kind: FeedKind::Graph, room_id: room.clone() };
            eventually("the leaves to be taken", async || !b.context.outbound.waits_for(&a.name, &feed).await.unwrap())
                .await;
        }
        let joined = join(&b, &room, "bob", &[&a]).await;
        assert_eq!(is(&carol, &room).await, (Some("join".to_owned()), Some("leave".to_owned())));
        let after = match rule {
            // Who is in a room may join it whatever its rule is. That is not so any more when the leave arrives.
            "invite" => {
                let refusal = joined.unwrap_err().to_string();
                assert!(refusal.contains("a.example has not heard yet that @bob:b.example left"), "{refusal}");
                "leave"
            }
            _ => {
                joined.unwrap();
                "join"
            }
        };
        assert_eq!(is(&bob, &room).await, (Some("join".to_owned()), Some(after.to_owned())));

        *hears.lock().unwrap() = Hears::All;
        let late: Vec<Value> = std::mem::take(&mut *kept.lock().unwrap());
        let late: Vec<_> = late.iter().map(|event| serde_json::value::to_raw_value(event).unwrap()).collect();
        for received in a.dag.receive(&b.name, late).await {
            assert_eq!(received.result, Ok(()));
        }
        eventually("the leave to arrive", async || {
            b.context.outbound.retry(&a.name);
            is(&carol, &room).await == both("leave") && is(&bob, &room).await == both(after)
        })
        .await;
        if rule == "public" {
            for (node, other, name) in [(&a, &b, "bot"), (&b, &a, "bob")] {
                let said = say(node, &room, name, "in one room").await;
                hear(&[other], &said).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_users_who_join_at_once_both_come_in() {
    let (_world, [a, b]) = World::new(["a.example", "b.example"]).await;
    let room = room(&a, RoomVersion::V12, json!({ "join_rule": "public" })).await;
    let names: Vec<String> = (0..5).map(|n| format!("user{n}")).collect();
    let via = [&a];
    let joins = names.iter().map(|name| join(&b, &room, name, &via));
    assert!(futures::future::join_all(joins).await.iter().all(Result::is_ok));
    for name in &names {
        let user = b.user(name);
        assert_eq!(membership(&b, &room, &user).await.as_deref(), Some("join"));
        eventually(name, async || membership(&a, &room, &user).await.as_deref() == Some("join")).await;
    }
    assert!(!b.dag.is_joining(&room));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_said_while_a_join_is_under_way_is_not_lost() {
    let (_world, [a, b]) = World::new(["a.example", "b.example"]).await;
    let room = room(&a, RoomVersion::V11, json!({ "join_rule": "public" })).await;
    // After the join is taken and before it is answered, the other server sends what is said.
    let (dag, id, bot) = (a.dag.clone(), room.clone(), a.user("bot"));
    let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
    a.meddle(move |request, next| {
        let is_join = request.uri().path().contains("/send_join/");
        let (dag, id, bot, tell) = (dag.clone(), id.clone(), bot.clone(), tell.clone());
        async move {
            let response = next.run(request).await;
            if is_join {
                let outgoing = Outgoing { draft: message(&bot, "in between"), effect: None };
                let sent = dag.send(&id, vec![outgoing]).await.remove(0).unwrap();
                tell.send(sent.event_id.clone()).unwrap();
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            response
        }
    });
    join(&b, &room, "bob", &[&a]).await.unwrap();
    let said = told.recv().await.unwrap();
    hear(&[&b], &said).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invite_is_followed_and_another_declined() {
    let (_world, [a, b]) = World::new(["a.example", "b.example"]).await;
    for version in VERSIONS {
        let room = room(&a, version, json!({ "join_rule": "invite" })).await;
        let refusal = join(&b, &room, "bob", &[&a]).await.unwrap_err();
        assert_eq!(refusal.code(), "forbidden", "{refusal}");
        assert!(!b.dag.knows(&room).await.unwrap());
        for name in ["bob", "carol"] {
            let draft = member(&a.user("bot"), &b.user(name), "invite");
            a.dag.invite(&room, Outgoing { draft, effect: None }).await.unwrap();
        }
        b.dag.decline(&room, &b.user("carol"), Some("no, thanks")).await.unwrap();
        assert_eq!(membership(&a, &room, &b.user("carol")).await.as_deref(), Some("leave"));
        // The invite says through whom.
        join(&b, &room, "bob", &[]).await.unwrap();
        assert_eq!(b.dag.decline(&room, &b.user("bob"), None).await.unwrap_err().code(), "not_found");
        let hello = say(&b, &room, "bob", "hello").await;
        hear(&[&a], &hello).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_knock_is_let_in_or_taken_back() {
    let (_world, [a, b]) = World::new(["a.example", "b.example"]).await;
    let room = room(&a, RoomVersion::V11, json!({ "join_rule": "knock" })).await;
    let via = [a.name.clone()];
    for name in ["bob", "carol"] {
        let told = b.dag.knock(&room, &via, &b.user(name), Object::new()).await.unwrap();
        assert!(told.iter().any(|event| event["type"] == "m.room.create"), "{told:?}");
        assert_eq!(membership(&a, &room, &b.user(name)).await.as_deref(), Some("knock"));
    }
    b.dag.leave(&room, &b.user("carol"), &[], None).await.unwrap();
    assert_eq!(membership(&a, &room, &b.user("carol")).await.as_deref(), Some("leave"));
    let draft = member(&a.user("bot"), &b.user("bob"), "invite");
    a.dag.invite(&room, Outgoing { draft, effect: None }).await.unwrap();
    join(&b, &room, "bob", &[]).await.unwrap();
}

/// What becomes of the answer to a join.
type Spoil = fn(Value) -> Option<Response>;

/// Has a server answer the joins that it takes with something of no use; with nothing, and a word to who waits for that, where `spoil`
/// gives none.
fn spoils(node: &Node, spoil: impl Fn(Value) -> Option<Response> + Send + Sync + 'static) -> Arc<tokio::sync::Notify> {
    let (spoil, taken) = (Arc::new(spoil), Arc::new(tokio::sync::Notify::new()));
    let tell = taken.clone();
    node.meddle(move |request, next| {
        let (spoil, tell) = (spoil.clone(), tell.clone());
        async move {
            let joins = request.uri().path().contains("/send_join/");
            let response = next.run(request).await;
            if !joins || !response.status().is_success() {
                return response;
            }
            let body = axum::body::to_bytes(response.into_body(), 1 << 24).await.unwrap();
            match spoil(serde_json::from_slice(&body).unwrap()) {
                Some(spoilt) => spoilt,
                None => {
                    tell.notify_one();
                    std::future::pending().await
                }
            }
        }
    });
    taken
}

async fn owed(node: &Node) -> i64 {
    owed_leaves(&node.context.store).await.unwrap().count
}

#[tokio::test(flavor = "multi_thread")]
async fn hc_40_who_was_joined_by_an_answer_of_no_use_leaves_again() {
    let (_world, [a, b]) = World::new(["a.example", "b.example"]).await;
    b.dag.hasten_leaves(10_000);
    let bob = b.user("bob");
    let stateless: Spoil = |mut answer| {
        answer.as_object_mut().unwrap().remove("state");
        Some(axum::Json(answer).into_response())
    };
    let of_another_version: Spoil = |mut answer| {
        let state = answer["state"].as_array_mut().unwrap();
        let create = state.iter_mut().find(|event| event["type"] == "m.room.create").unwrap();
        create["content"]["room_version"] = json!("org.example");
        Some(axum::Json(answer).into_response())
    };
    let no_json: Spoil = |_| Some("<html>".into_response());
    let failed: Spoil = |_| Some(StatusCode::GATEWAY_TIMEOUT.into_response());
    for (version, spoil) in VERSIONS.into_iter().flat_map(|version| {
        [("no state", stateless), ("another version", of_another_version), ("no JSON", no_json), ("failed", failed)]
            .map(|spoil| (version, spoil))
    }) {
        let (what, spoil) = spoil;
        let room = room(&a, version, json!({ "join_rule": "public" })).await;
        spoils(&a, spoil);
        assert!(join(&b, &room, "bob", &[&a]).await.is_err(), "{version}: {what}");
        assert!(!b.dag.knows(&room).await.unwrap(), "{version}: {what}: nothing of it is believed");
        eventually(what, async || membership(&a, &room, &bob).await.as_deref() == Some("leave")).await;
        eventually(what, async || owed(&b).await == 0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_was_joined_when_the_gateway_ended_leaves_again_unless_they_come_in() {
    let clock = ManualClock::new(SystemClock.now_ms());
    let (world, [a, b]) = World::with_clock(["a.example", "b.example"], clock.clone()).await;
    let mut b = b;
    let bob = b.user("bob");
    for (version, comes_in) in VERSIONS.into_iter().flat_map(|version| [(version, false), (version, true)]) {
        let room = room(&a, version, json!({ "join_rule": "public" })).await;
        let taken = spoils(&a, |_| None);
        let (dag, id, via, user) = (b.dag.clone(), room.clone(), a.name.clone(), bob.clone());
        let joining = tokio::spawn(async move { dag.join(&id, &[via], &user, Object::new()).await.map(drop) });
        taken.notified().await;
        assert_eq!(owed(&b).await, 0, "nothing, so far");
        let stopped = world.stop(b).await;
        joining.abort();
        a.meddle(|request, next| next.run(request));
        assert_eq!(membership(&a, &room, &bob).await.as_deref(), Some("join"));
        b = world.start(stopped).await;
        assert_eq!(owed(&b).await, 1);
        if comes_in {
            join(&b, &room, "bob", &[&a]).await.unwrap();
            assert_eq!(owed(&b).await, 0);
        }
        // Nobody has tried again for a while.
        clock.advance(91 * 60_000);
        b.dag.hasten_leaves(10_000);
        if comes_in {
            let said = say(&b, &room, "bob", "here").await;
            hear(&[&a], &said).await;
            assert_eq!(membership(&a, &room, &bob).await.as_deref(), Some("join"));
        } else {
            eventually("the leave", async || membership(&a, &room, &bob).await.as_deref() == Some("leave")).await;
            eventually("nothing to be owed", async || owed(&b).await == 0).await;
        }
    }
}
