//! What a participant's own users send: judged before it goes to the hub, judged by the hub, sent once whatever happens.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use axum::body::to_bytes;
use http::StatusCode;
use isthmus::lm::{Sent, id_as_received};
use isthmus::refusal::Refusal;
use isthmus::seam::{Outgoing, Raw};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use super::log_hub::respond;
use super::world::{Node, World, bodies, draft, member, message};

/// Holds what others send to a server until permits are added.
fn hold(node: &Node) -> Arc<Semaphore> {
    let gate = Arc::new(Semaphore::new(0));
    let held = gate.clone();
    node.meddle(move |request, next| {
        let held = held.clone();
        async move {
            if request.uri().path().contains("/send/") {
                held.acquire().await.unwrap().forget();
                held.add_permits(1);
            }
            next.run(request).await
        }
    });
    gate
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_who_may_not_is_told_at_once_and_the_hub_is_not_asked() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    let topic = draft(&part.user("alice"), "m.room.topic", Some(""), json!({ "topic": "mine" }));
    let stranger = message(&part.user("carol"), "I never joined");
    for (draft, number) in [(topic, "7"), (stranger, "6")] {
        let refused = part.send(&room, draft).await;
        assert!(matches!(&refused, Err(Refusal::LmRule { rule, .. }) if *rule == number), "{refused:?}");
    }
    part.say(&room, "alice", "after").await;
    let log = hub.wait_for_body(&room, "after").await;
    assert_eq!(log.len(), 6, "nothing else came: {:?}", bodies(&log));
    part.wait_for_body(&room, "after").await;
    assert!(part.watcher.refused.lock().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_on_its_way_counts_for_what_comes_after_it() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let (bot, alice, bob) = (hub.user("bot"), part.user("alice"), part.user("bob"));
    let levels = json!({ "users": { bot.clone(): 100, alice.clone(): 100 } });
    let room = hub.create_room_with("invite", levels).await;
    let invite = Outgoing { draft: member(&bot, &alice, "invite"), effect: None };
    hub.lm.invite(&room, invite).await.unwrap();
    part.join(&room, "alice", &hub).await;
    // Nothing comes back until all is sent.
    let held = hold(&part);
    let drafts = [
        member(&alice, &bob, "invite"),
        member(&bob, &bob, "join"),
        message(&bob, "here"),
        member(&alice, &bob, "ban"),
    ];
    let outgoing = drafts.into_iter().map(|draft| Outgoing { draft, effect: None }).collect();
    for sent in part.lm.send(&room, outgoing).await {
        assert!(matches!(sent, Ok(Sent::Queued { .. })), "{sent:?}");
    }
    let log = hub.wait(&room, "the ban", |log| log.len() >= 10).await;
    assert_eq!(bodies(&log), ["here"]);
    // What is here and what is on its way agree: he is not in the room.
    held.add_permits(1);
    part.wait(&room, "the ban", |log| log.len() >= 10).await;
    let refused = part.send(&room, message(&bob, "still here")).await;
    assert!(matches!(refused, Err(Refusal::LmRule { rule: "6", .. })), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_hub_judges_by_a_state_that_has_moved_on_and_that_is_told() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    let held = hold(&part);
    let levels = json!({ "users": { hub.user("bot"): 100 }, "events_default": 50 });
    hub.send(&room, draft(&hub.user("bot"), "m.room.power_levels", Some(""), levels)).await.unwrap();
    let Sent::Queued { lpdu_id } = part.say(&room, "alice", "too late").await else { panic!("a participant queues") };
    part.wait_for_watcher("the refusal", |watcher| !watcher.refused.lock().unwrap().is_empty()).await;
    let refused = part.watcher.refused.lock().unwrap()[0].clone();
    assert_eq!(refused.0, lpdu_id);
    assert!(refused.1.contains("rule 7"), "{}", refused.1);
    held.add_permits(1);
    part.wait(&room, "the levels", |log| log.len() >= 6).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_hub_has_just_allowed_is_not_refused_by_what_was_before() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let (bot, alice) = (hub.user("bot"), part.user("alice"));
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    let topic = draft(&alice, "m.room.topic", Some(""), json!({ "topic": "mine" }));
    assert!(part.send(&room, topic.clone()).await.is_err());
    let levels = json!({ "users": { bot.clone(): 100, alice.clone(): 50 } });
    hub.send(&room, draft(&bot, "m.room.power_levels", Some(""), levels)).await.unwrap();
    part.wait(&room, "the levels", |log| log.len() >= 6).await;
    part.send(&room, topic).await.unwrap();
    hub.wait(&room, "the topic", |log| log.iter().any(|event| event.event.kind == "m.room.topic")).await;
}

/// Has a server say of each LPDU that it is not the hub, while the switch is on; how many such transactions there were.
fn disclaims(node: &Node) -> (Arc<AtomicBool>, Arc<AtomicUsize>) {
    #[derive(Deserialize)]
    struct Transaction {
        pdus: Vec<Raw>,
    }
    let (is_on, count) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicUsize::new(0)));
    let (switch, counted) = (is_on.clone(), count.clone());
    node.meddle(move |request, next| {
        let (switch, counted) = (switch.clone(), counted.clone());
        async move {
            if !switch.load(Ordering::SeqCst) || !request.uri().path().contains("/send/") {
                return next.run(request).await;
            }
            let body = to_bytes(request.into_body(), 1 << 20).await.unwrap();
            let sent: Transaction = serde_json::from_slice(&body).unwrap();
            let wrong = json!({ "errcode": "M_WRONG_SERVER", "error": "not the hub" });
            let failed = sent.pdus.iter().map(|pdu| (id_as_received(pdu).unwrap().to_string(), wrong.clone()));
            let failed: serde_json::Map<String, Value> = failed.collect();
            counted.fetch_add(1, Ordering::SeqCst);
            respond(StatusCode::OK, json!({ "failed_pdus": failed }))
        }
    });
    (is_on, count)
}

/// What was left by a hub that said that it was none goes before what was said later, when it speaks as the hub or is asked again,
/// and across restarts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_hub_left_is_sent_again_before_what_was_said_later() {
    let (world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    let (disclaims, count) = disclaims(&hub);
    let disclaimed = async |more_than: usize| {
        let waiting = async {
            while count.load(Ordering::SeqCst) <= more_than {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(30), waiting).await.unwrap();
    };
    // Nobody shows another hub, so this one is asked once more.
    part.say(&room, "alice", "1").await;
    disclaimed(1).await;
    disclaims.store(false, Ordering::SeqCst);
    for body in ["2", "3"] {
        part.say(&room, "alice", body).await;
    }
    hub.say(&room, "bot", "I am the hub").await;
    let of_alice = async || hub.bodies(&room).await.into_iter().filter(|body| body.len() == 1).collect::<Vec<_>>();
    hub.wait_for_body(&room, "3").await;
    assert_eq!(of_alice().await, ["1", "2", "3"]);

    // Of the next nothing is known after a restart but that it waits.
    disclaims.store(true, Ordering::SeqCst);
    let before = count.load(Ordering::SeqCst);
    part.say(&room, "alice", "4").await;
    disclaimed(before).await;
    disclaims.store(false, Ordering::SeqCst);
    let part = world.restart(part).await;
    part.say(&room, "alice", "5").await;
    hub.wait_for_body(&room, "5").await;
    assert_eq!(of_alice().await, ["1", "2", "3", "4", "5"]);
}

/// Whoever says that it is not the hub is not sent what comes later, until it speaks as the hub; other rooms of its do not wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_said_later_waits_while_a_hub_says_that_it_is_none() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let (room, other) = (hub.create_room("public").await, hub.create_room("public").await);
    part.join(&room, "alice", &hub).await;
    part.join(&other, "alice", &hub).await;
    let (disclaims, count) = disclaims(&hub);
    part.say(&room, "alice", "1").await;
    let asked_again = async {
        while count.load(Ordering::SeqCst) < 2 {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), asked_again).await.unwrap();
    disclaims.store(false, Ordering::SeqCst);
    for body in ["2", "3"] {
        part.say(&room, "alice", body).await;
    }
    // What was queued later, and is sent in the order of the rooms.
    part.say(&other, "alice", "elsewhere").await;
    hub.wait_for_body(&other, "elsewhere").await;
    assert_eq!(hub.bodies(&room).await, Vec::<String>::new());
    hub.say(&room, "bot", "hub").await;
    hub.wait_for_body(&room, "3").await;
    assert_eq!(hub.bodies(&room).await, ["hub", "1", "2", "3"]);
}
