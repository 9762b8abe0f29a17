//! A shared room with three servers: its hub, one that takes part in its graph, and one that does LM alone.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use isthmus::event::{Object, RoomVersion};
use isthmus::lm::{Appended, NewRoom, Role};
use ruma::{OwnedRoomId, RoomId, UserId};
use serde_json::json;

use super::log_hub::Manners;
use super::world::{Node, World, bodies, draft, member};

/// A public shared room, hubbed at `hub`.
async fn shared_room(hub: &Node) -> OwnedRoomId {
    let bot = hub.user("bot");
    let initial_state = vec![
        draft(&bot, "m.room.power_levels", Some(""), json!({ "users": { bot.as_str(): 100 } })),
        draft(&bot, "m.room.join_rules", Some(""), json!({ "join_rule": "public" })),
    ];
    hub.lm.create_shared(NewRoom { creator: bot, version: RoomVersion::Lm02, initial_state }).await.unwrap()
}

/// Has a server say that it does LM alone; notes who sends it transactions.
fn does_logs_alone(node: &Node) -> Arc<Mutex<BTreeSet<String>>> {
    let senders = Arc::new(Mutex::new(BTreeSet::new()));
    let (manners, noted) = (Manners::new(&node.context, &node.lm, true), senders.clone());
    node.meddle(move |request, next| {
        let origin = request.headers().get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default();
        if request.uri().path().contains("/send/") {
            noted.lock().unwrap().insert(origin.to_owned());
        }
        manners.clone().answer(request, next)
    });
    senders
}

fn membership(log: &[Appended], user: &UserId) -> Option<String> {
    let of_user = log
        .iter()
        .rev()
        .find(|entry| entry.event.kind == "m.room.member" && entry.event.state_key.as_deref() == Some(user.as_str()))?;
    of_user.event.content().get("membership")?.as_str().map(str::to_owned)
}

async fn all_know(nodes: &[&Node], room: &RoomId, user: &UserId, wanted: &str) {
    for node in nodes {
        let what = format!("{user} to be {wanted}");
        node.wait(room, &what, |log| membership(log, user).as_deref() == Some(wanted)).await;
    }
}

async fn all_hear(nodes: &[&Node], room: &RoomId, body: &str) {
    for node in nodes {
        node.wait_for_body(room, body).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hub_graph_server_and_participant_hear_each_other() {
    let (world, [a, b, c]) = World::new(["a.example", "b.example", "c.example"]).await;
    let senders = does_logs_alone(&c);
    let room = shared_room(&a).await;
    b.join(&room, "bob", &a).await;
    let role = b.lm.room(&room).await.unwrap().unwrap().role;
    assert!(matches!(role, Role::GraphServer { hub } if hub == a.name));
    c.join(&room, "carol", &a).await;
    let role = c.lm.room(&room).await.unwrap().unwrap().role;
    assert!(matches!(role, Role::Participant { hub } if hub == a.name));
    let [bot, bob, carol] = [a.user("bot"), b.user("bob"), c.user("carol")];
    all_know(&[&a, &b, &c], &room, &carol, "join").await;
    all_know(&[&a, &c], &room, &bob, "join").await;

    let mut b = b;
    for round in 0..3 {
        for (node, name) in [(&a, "bot"), (&b, "bob"), (&c, "carol")] {
            let body = format!("{name} {round}");
            node.say(&room, name, &body).await;
            all_hear(&[&a, &b, &c], &room, &body).await;
        }
        if round == 0 {
            b = world.restart(b).await;
        }
    }
    // Whoever follows another event comes after it everywhere; these were said one after the other.
    let expected: Vec<String> =
        (0..3).flat_map(|round| ["bot", "bob", "carol"].map(|name| format!("{name} {round}"))).collect();
    for node in [&a, &b, &c] {
        assert_eq!(bodies(&node.log(&room).await), expected, "{}", node.name);
    }
    // The graph server sends state, and the graph's state is the same at both.
    b.send(
        &room,
        draft(&bob, "m.room.member", Some(bob.as_str()), json!({ "membership": "join", "displayname": "Bob" })),
    )
    .await
    .unwrap();
    c.wait(&room, "Bob's name", |log| log.iter().any(|entry| entry.event.content().contains_key("displayname"))).await;
    let ids = async |node: &Node| {
        let state = node.dag.state(&room).await.unwrap();
        state.values().map(|event| event.event_id.to_string()).collect::<BTreeSet<_>>()
    };
    assert_eq!(ids(&a).await, ids(&b).await);

    // A kick of a participant's user by the hub, a leave of the graph server's, and coming again.
    a.send(&room, member(&bot, &carol, "leave")).await.unwrap();
    all_know(&[&a, &b, &c], &room, &carol, "leave").await;
    c.join(&room, "carol", &a).await;
    all_know(&[&a, &b, &c], &room, &carol, "join").await;
    b.lm.leave(&room, &bob, &[]).await.unwrap();
    all_know(&[&a, &c], &room, &bob, "leave").await;
    a.say(&room, "bot", "without bob").await;
    all_hear(&[&c], &room, "without bob").await;
    b.lm.join(&room, &bob, std::slice::from_ref(&a.name), Object::new()).await.unwrap();
    all_know(&[&a, &b, &c], &room, &bob, "join").await;
    for (node, name) in [(&a, "bot"), (&b, "bob"), (&c, "carol")] {
        let body = format!("{name} again");
        node.say(&room, name, &body).await;
        all_hear(&[&a, &b, &c], &room, &body).await;
    }
    // A ban ends it.
    a.send(&room, member(&bot, &bob, "ban")).await.unwrap();
    all_know(&[&a, &b, &c], &room, &bob, "ban").await;
    b.send(&room, super::world::message(&bob, "still here")).await.unwrap_err();
    b.lm.join(&room, &bob, std::slice::from_ref(&a.name), Object::new()).await.map(drop).unwrap_err();
    let senders = senders.lock().unwrap();
    assert!(senders.iter().all(|header| header.contains("a.example") && !header.contains("origin=\"b.example\"")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn state_that_stands_on_what_the_log_does_not_have_is_there_when_the_log_is_read_again() {
    let (_world, [a, b]) = World::new(["a.example", "b.example"]).await;
    let room = shared_room(&a).await;
    b.join(&room, "bob", &a).await;
    let topic = draft(&a.user("bot"), "m.room.topic", Some(""), json!({ "topic": "tea" }));
    a.send(&room, topic).await.unwrap();
    b.wait(&room, "the topic", |log| log.iter().any(|entry| entry.event.kind == "m.room.topic")).await;
    // As it is where its event is not in the log.
    let of = room.clone();
    let removed = b.context.store.write(move |tx| {
        Box::pin(async move {
            let sql = "DELETE FROM lm_state WHERE room_id = $1 AND kind = 'm.room.topic'";
            sqlx::query(sql).bind(of.as_str()).execute(tx).await?;
            Ok(())
        })
    });
    removed.await.unwrap();
    b.lm.forget_rooms();
    for _ in 0..500 {
        if b.lm.state(&room).await.unwrap().get("m.room.topic", "").is_some() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    panic!("the topic is lost");
}
