//! What must be so when all queues are empty.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use isthmus::event::{Object, Redaction, RoomVersion, VerifyKeys};
use isthmus::lm::Appended;
use isthmus::seam::{LogOrigin, NewLog};
use ruma::{OwnedEventId, OwnedServerName, RoomId};
use serde_json::Value;

use crate::dag::shared::fake::Log;
use crate::lm::world::Node;

type Key = (String, String);

async fn log_of(node: &Node, room: &RoomId, hub: &OwnedServerName) -> Log {
    let events = node.log(room).await.into_iter().map(|appended| (appended.event, LogOrigin::default())).collect();
    let state = node.lm.state(room).await.unwrap();
    let state = state.iter().map(|(kind, key, event)| ((kind.to_owned(), key.to_owned()), event.clone())).collect();
    Log { room: NewLog { room_id: room.to_owned(), version: RoomVersion::Lm02, hub: hub.clone() }, events, state }
}

/// INV-2: of two events an ancestor comes first, also where what is between them is not in the log; of the events from a place on.
pub async fn ancestors_come_first(node: &Node, log: &[Appended], from: usize) {
    let places: HashMap<_, _> =
        log.iter().enumerate().map(|(place, one)| (one.event.event_id.clone(), place)).collect();
    for (place, one) in log.iter().enumerate().skip(from) {
        let (mut next, mut seen) = (one.event.prev_events.clone(), BTreeSet::new());
        while let Some(id) = next.pop() {
            if !seen.insert(id.clone()) {
                continue;
            }
            if let Some(before) = places.get(&id) {
                assert!(*before < place, "{}: {id} must come before {}", node.name, one.event.event_id);
                continue;
            }
            for row in isthmus::store::dag::events(&node.context.store, &[id]).await.unwrap() {
                let event: Value = serde_json::from_slice(&row.json).unwrap();
                let prev = event["prev_events"].as_array().into_iter().flatten();
                next.extend(prev.map(|id| OwnedEventId::try_from(id.as_str().unwrap()).unwrap()));
            }
        }
    }
}

/// INV-3: at each place of the hub's log the rules have the event that is there, and those have signed it who must.
pub async fn each_passes_at_its_place(hub: &Node, room: &RoomId, keys: &VerifyKeys) {
    let log = log_of(hub, room, &hub.name).await;
    log.assert_sound();
    for (event, _) in &log.events {
        event.verify_signatures(keys, Redaction::GraphServer).unwrap();
        assert_eq!(event.hub_server.is_some(), event.lpdu_id.is_some());
    }
}

fn means(key: &Key, content: &Object) -> Value {
    match key.0.as_str() {
        "m.room.member" => content["membership"].clone(),
        _ => Value::Object(content.clone()),
    }
}

/// INV-4: the log's state is the graph's, or the graph says why not. Of a member only the membership counts.
pub async fn in_step(hub: &Node, room: &RoomId) -> Vec<(Key, String)> {
    let left = hub.dag.uncorrected(room).await.unwrap();
    let excused: BTreeSet<&Key> = left.iter().map(|(key, _)| key).collect();
    let (log, graph) = (log_of(hub, room, &hub.name).await, hub.dag.state(room).await.unwrap());
    // What the log comes to, read from its beginning.
    let mut read: BTreeMap<Key, &Object> = BTreeMap::new();
    for (event, _) in &log.events {
        if let Some(key) = &event.state_key {
            read.insert((event.kind.clone(), key.clone()), event.content());
        }
    }
    for (key, event) in log.state.iter() {
        assert_eq!(means(key, read[key]), means(key, event.content()), "what is said to be the log's state");
    }
    assert_eq!(read.len(), log.state.len());
    for (key, event) in graph.iter().filter(|(key, _)| !excused.contains(key)) {
        let there = read.get(key).unwrap_or_else(|| panic!("the log lacks {key:?} {:?}", event.content));
        assert_eq!(means(key, there), means(key, &event.content), "{key:?}");
    }
    for (key, content) in read.iter().filter(|(key, _)| !excused.contains(key) && !graph.contains_key(*key)) {
        assert!(key.0 == "m.room.member" && content["membership"] == "leave", "the log alone has {key:?} {content:?}");
    }
    left
}

/// What the graph comes to is the same at two graph servers, and at the one that is not the hub the log's state too.
pub async fn one_graph(hub: &Node, other: &Node, room: &RoomId) {
    let ids = async |node: &Node| -> BTreeMap<Key, OwnedEventId> {
        let state = node.dag.state(room).await.unwrap();
        state.iter().map(|(key, event)| (key.clone(), event.event_id.clone())).collect()
    };
    let (here, there) = (ids(hub).await, ids(other).await);
    assert_eq!(here, there, "the graph's state at {} and {}", hub.name, other.name);
    let log = other.lm.state(room).await.unwrap();
    let log: BTreeMap<Key, OwnedEventId> =
        log.iter().map(|(kind, key, event)| ((kind.to_owned(), key.to_owned()), event.event_id.clone())).collect();
    assert_eq!(log, there, "the state of {}'s log and graph", other.name);
}
