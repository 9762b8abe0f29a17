//! Whatever the order in which the events of a graph arrive, the room is the same, and the bridge gets each event after those
//! before it (INV-2).

use std::collections::HashMap;

use isthmus::event::RoomVersion;
use proptest::prelude::*;
use serde_json::json;

use super::peer::{Peer, View};
use super::*;

/// One event of a random graph: who says it, what, how long ago, and on which of the events before.
#[derive(Debug, Clone)]
struct Step {
    sender: usize,
    kind: usize,
    age: i64,
    on: Vec<prop::sample::Index>,
}

fn step() -> impl Strategy<Value = Step> {
    (0..3_usize, 0..6_usize, 0..100_i64, prop::collection::vec(any::<prop::sample::Index>(), 1..4))
        .prop_map(|(sender, kind, age, on)| Step { sender, kind, age, on })
}

struct Graph {
    events: Vec<(OwnedEventId, Object)>,
    parents: HashMap<OwnedEventId, Vec<OwnedEventId>>,
}

/// The events of `steps` on top of `base`; auth events are those of `base`, which no event changes.
fn build(peer: &Peer, base: &View, users: &[OwnedUserId], steps: &[Step]) -> Graph {
    let mut ids = vec![(base.tips[0].clone(), base.depth)];
    let mut graph = Graph { events: Vec::new(), parents: HashMap::new() };
    for (number, step) in steps.iter().enumerate() {
        let sender = &users[step.sender];
        let mut event = match step.kind {
            0 => base.next(sender, "m.room.topic", Some(""), json!({ "topic": number })),
            1 => base.next(sender, "m.room.name", Some(""), json!({ "name": number })),
            2 => base.next(sender, "org.example.state", Some(&format!("{}", number % 3)), json!({ "n": number })),
            3 => {
                base.next(sender, "m.room.member", Some(sender.as_str()), json!({ "membership": "join", "n": number }))
            }
            _ => base.next(sender, "m.room.message", None, json!({ "body": number })),
        };
        let mut on: Vec<_> = step.on.iter().map(|index| index.get(&ids).clone()).collect();
        on.sort();
        on.dedup();
        event["prev_events"] = json!(on.iter().map(|(id, _)| id).collect::<Vec<_>>());
        event["depth"] = json!(on.iter().map(|(_, depth)| depth).max().unwrap() + 1);
        // No two at the same time, nor any at that of the joins: ties go by event ID, and that differs from room to room.
        event["origin_server_ts"] = json!(NOW - 1 - step.age * 100 - i64::try_from(number).unwrap());
        let depth = event["depth"].as_i64().unwrap();
        let (id, event) = peer.sign(base.version, event);
        graph.parents.insert(id.clone(), on.into_iter().map(|(id, _)| id).collect());
        ids.push((id.clone(), depth));
        graph.events.push((id, event));
    }
    graph
}

/// The events in an order that has each after its parents, chosen by `seed`.
fn arrival(graph: &Graph, seed: &[u8]) -> Vec<usize> {
    let ids: HashMap<_, _> = graph.events.iter().enumerate().map(|(index, (id, _))| (id.clone(), index)).collect();
    let mut left: Vec<usize> = (0..graph.events.len()).collect();
    let mut order = Vec::new();
    let mut seed = seed.iter().cycle();
    while !left.is_empty() {
        let ready: Vec<usize> = left
            .iter()
            .copied()
            .filter(|index| {
                let parents = &graph.parents[&graph.events[*index].0];
                parents.iter().filter_map(|id| ids.get(id)).all(|parent| order.contains(parent))
            })
            .collect();
        let chosen = ready[usize::from(*seed.next().unwrap()) % ready.len()];
        left.retain(|index| *index != chosen);
        order.push(chosen);
    }
    order
}

async fn scenario(version: RoomVersion, steps: Vec<Step>, seeds: [Vec<u8>; 2], sizes: Vec<usize>) {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    let users = [peer.user("a"), peer.user("b"), peer.user("c")];
    let mut results = Vec::new();
    for seed in seeds {
        let room = gateway.room_of_moderators(version).await;
        let mut base = None;
        for user in &users {
            base = Some(peer.join(&gateway, &room, user).await.unwrap());
        }
        let graph = build(&peer, &base.unwrap(), &users, &steps);
        let order = arrival(&graph, &seed);
        let mut rest = order.as_slice();
        let mut sizes = sizes.iter().cycle();
        while !rest.is_empty() {
            let (part, after) = rest.split_at((*sizes.next().unwrap()).min(rest.len()));
            // Within a transaction the order is anything.
            let mut events: Vec<_> = part.iter().map(|index| &graph.events[*index].1).collect();
            events.reverse();
            for received in peer.put(&gateway.dag, &events).await {
                assert!(received.result.is_ok(), "{received:?}");
            }
            rest = after;
        }
        let inbox = gateway.inbox(&room).await;
        let places: HashMap<_, _> = inbox.iter().enumerate().map(|(place, id)| (id.clone(), place)).collect();
        for (id, parents) in &graph.parents {
            for parent in parents {
                assert!(places[parent] < places[id], "{parent} must come before {id}");
            }
        }
        assert_eq!(inbox.len(), graph.events.len() + users.len());
        // Rooms differ in their IDs, so what is compared is the number of the event that stands in the state.
        let number = |id: &OwnedEventId| graph.events.iter().position(|(event, _)| event == id);
        let state: Vec<_> = gateway.state(&room).await.into_iter().map(|(key, id)| (key, number(&id))).collect();
        results.push(state);
    }
    assert_eq!(results[0], results[1]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 40, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn inv_2_the_order_of_arrival_changes_nothing(
        version in prop::sample::select(VERSIONS.to_vec()),
        steps in prop::collection::vec(step(), 1..25),
        seeds in [prop::collection::vec(any::<u8>(), 8), prop::collection::vec(any::<u8>(), 8)],
        sizes in prop::collection::vec(1..7_usize, 3),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(scenario(version, steps, seeds, sizes));
    }
}
