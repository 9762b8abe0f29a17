//! Two Synapses that send at once: the graph forks, and the log's order is a linear extension of it (INV-2).

use std::collections::{BTreeMap, BTreeSet};

use futures::future::join_all;
use serde_json::json;
use sqlx::{Connection as _, Row as _, SqliteConnection};

use crate::support::world::{World, on_both};

#[test]
fn inv_2_the_log_is_a_linear_extension_of_a_graph_that_forks() {
    on_both(async |world| {
        let (_, lm_room) = world.lm_room("fork");
        let alice = world.user(world.a, "alice-fork", "Alice").await;
        let carol = world.user(world.b, "carol-fork", "Carol").await;
        let room = alice.join(&world.alias("fork", &world.a.server_name), &[]).await.unwrap();
        carol.join(&world.alias("fork", &world.gateway.server_name), &[]).await.unwrap();
        alice.wait_for_member(&room, &carol.user_id, "join").await.unwrap();

        let mut sent = 0;
        for round in 0..20 {
            let texts: Vec<[String; 2]> =
                (0..5).map(|n| ["alice", "carol"].map(|who| format!("{who} {round} {n}"))).collect();
            let sends = |who: usize, client| {
                let texts = &texts;
                let room = &room;
                async move {
                    let client: &crate::support::testbed::client::Client = client;
                    for text in texts {
                        client.send_text(room, &text[who]).await.unwrap();
                    }
                }
            };
            tokio::join!(sends(0, &alice), sends(1, &carol));
            sent += 10;
            let both = [alice.wait_for_text(&room, &texts[4][1]), carol.wait_for_text(&room, &texts[4][0])];
            assert!(join_all(both).await.iter().all(Result::is_ok));
            if round >= 2 && forks(&graph(world, &room).await) > 0 {
                break;
            }
        }
        let is_message = |event: &isthmus::event::Pdu| event.kind == "m.room.message";
        let log = world.hub.wait_for_many(&lm_room, "all messages", sent, is_message).await.unwrap();
        let sources: Vec<String> = log
            .iter()
            .map(|event| event.content()["im.isthmus.source"]["event_id"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(sources.len(), sent);
        assert_eq!(sources.iter().collect::<BTreeSet<_>>().len(), sent, "a message was doubled");

        let graph = graph(world, &room).await;
        assert!(forks(&graph) > 0, "the graph never forked");
        let place: BTreeMap<&String, usize> = sources.iter().zip(0..).collect();
        for (event, at) in &place {
            for ancestor in ancestors(&graph, event) {
                if let Some(before) = place.get(&ancestor) {
                    assert!(before < at, "{ancestor} at {before} is an ancestor of {event} at {at}");
                }
            }
        }
        // And everybody ends with the same state.
        let ids = |events: Vec<serde_json::Value>| {
            events.iter().map(|event| event["event_id"].to_string()).collect::<BTreeSet<_>>()
        };
        let [of_a, of_b] = [&alice, &carol].map(|client| client.full_state(&room));
        assert_eq!(ids(of_a.await.unwrap()), ids(of_b.await.unwrap()));
    });
}

#[test]
fn conflicting_state_from_two_servers_ends_the_same_everywhere() {
    on_both(async |world| {
        let (bob, lm_room) = world.lm_room("conflict");
        let alice = world.user(world.a, "alice-conflict", "Alice").await;
        let carol = world.user(world.b, "carol-conflict", "Carol").await;
        let room = alice.join(&world.alias("conflict", &world.a.server_name), &[]).await.unwrap();
        carol.join(&world.alias("conflict", &world.gateway.server_name), &[]).await.unwrap();
        alice.wait_for_member(&room, &carol.user_id, "join").await.unwrap();
        let ghosts = [&alice, &carol].map(|client| world.ghost_of(&client.user_id));
        world.hub.wait_for_member(&lm_room, &ghosts[1], "join").await.unwrap();
        let levels = json!({ "users": { bob.as_str(): 100, &ghosts[0]: 50, &ghosts[1]: 50 } });
        world.hub.send(&bob, &lm_room, "m.room.power_levels", Some(""), levels).unwrap();
        for client in [&alice, &carol] {
            let user = client.user_id.clone();
            let has = move |content: &serde_json::Value| content["users"][&user] == 50;
            client.wait_for_state(&room, "m.room.power_levels", "", has).await.unwrap();
        }
        let mut topics = BTreeSet::new();
        for round in 0..20 {
            let set = |client, who: &'static str| {
                let room = &room;
                async move {
                    let client: &crate::support::testbed::client::Client = client;
                    let topic = json!({ "topic": format!("{who} {round}") });
                    client.set_state(room, "m.room.topic", "", topic).await.unwrap()
                }
            };
            let (first, second) = tokio::join!(set(&alice, "alice"), set(&carol, "carol"));
            for (client, other) in [(&alice, &second), (&carol, &first)] {
                client.wait_for(&room, "the other's topic", |event| event["event_id"] == other.as_str()).await.unwrap();
            }
            topics.extend([first, second]);
            if round >= 4 && conflicts(&graph(world, &room).await, &topics) > 0 {
                break;
            }
        }
        // A message after the last topics closes the fork; then all have one state.
        alice.send_text(&room, "settled").await.unwrap();
        carol.wait_for_text(&room, "settled").await.unwrap();
        world.hub.wait_for_text(&lm_room, "settled").await.unwrap();
        assert!(conflicts(&graph(world, &room).await, &topics) > 0, "no two topics were ever siblings");
        let of_a = alice.state(&room, "m.room.topic", "").await.unwrap().unwrap();
        let of_b = carol.state(&room, "m.room.topic", "").await.unwrap().unwrap();
        assert_eq!(of_a["topic"], of_b["topic"]);
        let is_last = |event: &isthmus::event::Pdu| event.kind == "m.room.topic";
        world.hub.wait_for(&lm_room, "a topic", is_last).await.unwrap();
        // INV-4, with the log as the authority: the following side's topic is the log's once all is quiet.
        let topic = world.hub.state(&lm_room, "m.room.topic", "").unwrap()["topic"].clone();
        let repaired = |content: &serde_json::Value| content["topic"] == topic;
        alice.wait_for_state(&room, "m.room.topic", "", repaired).await.unwrap();
    });
}

/// The previous events of each event of a room, as the Synapse without registration keeps them.
async fn graph(world: &World, room: &str) -> BTreeMap<String, Vec<String>> {
    let database = &world.database_of_b;
    let mut connection = SqliteConnection::connect(&format!("sqlite://{}?mode=ro", database.display())).await.unwrap();
    let sql = "SELECT e.event_id, e.prev_event_id FROM event_edges e JOIN events v ON v.event_id = e.event_id \
               WHERE v.room_id = $1";
    let mut graph: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for row in sqlx::query(sql).bind(room).fetch_all(&mut connection).await.unwrap() {
        graph.entry(row.get(0)).or_default().push(row.get(1));
    }
    graph
}

/// How many events have more than one previous event.
fn forks(graph: &BTreeMap<String, Vec<String>>) -> usize {
    graph.values().filter(|previous| previous.len() > 1).count()
}

/// How many events have more than one of `events` directly before them.
fn conflicts(graph: &BTreeMap<String, Vec<String>>, events: &BTreeSet<String>) -> usize {
    graph.values().filter(|previous| previous.iter().filter(|id| events.contains(*id)).count() > 1).count()
}

fn ancestors(graph: &BTreeMap<String, Vec<String>>, event: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut open: Vec<&str> = vec![event];
    while let Some(next) = open.pop() {
        for previous in graph.get(next).into_iter().flatten() {
            if found.insert(previous.clone()) {
                open.push(previous);
            }
        }
    }
    found
}
