//! What must be so when all queues are empty.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use isthmus::event::{Object, Redaction, RoomVersion, VerifyKeys};
use isthmus::lm::Appended;
use isthmus::seam::{LogOrigin, NewLog};
use ruma::{OwnedEventId, OwnedServerName, OwnedUserId, RoomId, UserId};
use serde_json::Value;

use super::{GRAPH, HUB, PARTS, Schedule};
use crate::dag::shared::fake::Log;
use crate::lm::schedules::{same_log, stay_began};
use crate::lm::world::Node;

type Key = (String, String);

impl Schedule {
    pub(super) async fn check(&self) {
        let (hub, room) = (self.node(HUB), &self.room);
        let log = hub.log(room).await;
        ancestors_come_first(hub, &log, 0).await;
        each_passes_at_its_place(hub, room, &self.keys).await;
        self.nothing_is_missing(&log).await;
        for part in PARTS {
            let node = self.node(part);
            same_log(&log, &node.log(room).await, &node.name);
        }
        let graph = self.node(GRAPH);
        let of_graph = graph.log(room).await;
        // Its log begins with the state of then, and what is before that may come to be known later.
        let began = stay_began(&of_graph, &graph.name).expect("somebody of it is in the room");
        ancestors_come_first(graph, &of_graph, began).await;
        one_graph(hub, graph, room).await;
        let left = in_step(hub, room).await;
        assert_eq!(left, [], "{:#?}", self.told);
        self.home_has_all(&log, &of_graph);
    }

    /// What was taken is in the log once, or it is known why it is not: the hub refused it, or the graph had decided otherwise.
    async fn nothing_is_missing(&self, log: &[Appended]) {
        assert_dense_enough(log);
        let mut by_id: HashMap<&OwnedEventId, usize> = HashMap::new();
        let mut by_body: BTreeSet<(&UserId, &str)> = BTreeSet::new();
        for (place, one) in log.iter().enumerate() {
            for id in [Some(&one.event.event_id), one.event.lpdu_id.as_ref()].into_iter().flatten() {
                assert!(by_id.insert(id, place).is_none(), "{id} is in the log twice");
            }
            if let Some(body) = one.event.content().get("body").and_then(Value::as_str) {
                assert!(by_body.insert((&one.event.sender, body)), "{body} is in the log twice: {:#?}", self.told);
            }
        }
        let refused: BTreeSet<OwnedEventId> = self
            .watchers
            .iter()
            .flat_map(|watcher| watcher.refused.lock().unwrap().clone())
            .map(|(id, _)| id)
            .collect();
        let (mut last, mut missing): (BTreeMap<&OwnedUserId, usize>, usize) = Default::default();
        for said in &self.said {
            let Some(place) = by_id.get(&said.id) else {
                missing += 1;
                let why = match said.is_lpdu {
                    true => refused.contains(&said.id).then(|| "refused".to_owned()),
                    false => self.verdict(&said.id).await,
                };
                assert!(why.is_some(), "{} {} is lost: {:#?}", said.what, said.id, self.told);
                println!("{} {}: {why:?}", said.sender, said.what);
                continue;
            };
            if !said.in_line {
                continue;
            }
            let before = last.insert(&said.sender, *place);
            assert!(before < Some(*place), "{} is out of its sender's order: {:#?}", said.what, self.told);
        }
        assert!(missing * 2 < self.said.len(), "{missing} of {} are not there: {:#?}", self.said.len(), self.told);
        for id in &self.home.taken {
            let is_there = by_id.contains_key(id) || self.verdict(id).await.is_some();
            assert!(is_there, "{id} of {} is lost: {:#?}", self.home.peer.name, self.told);
        }
    }

    /// Why the hub did not take an event that it has into the room.
    async fn verdict(&self, id: &OwnedEventId) -> Option<String> {
        // Of servers with nobody in the room it keeps nothing, and says so.
        if let Some(why) = self.refused.lock().unwrap().get(id) {
            return Some(why.clone());
        }
        let rows = isthmus::store::dag::events(&self.node(HUB).context.store, std::slice::from_ref(id)).await.unwrap();
        rows.into_iter().next().filter(|row| row.status != 0)?.reason
    }

    /// The test's homeserver was sent all of its last stay. Each server of the graph sends what its own users do, to those who are in
    /// the room as far as it knows by then, and the hub what comes by the log as well. So what GRAPH said goes by GRAPH's log: there a
    /// homeserver may come later than at the hub, and what was said before it is asked for by whoever misses it.
    fn home_has_all(&self, log: &[Appended], of_graph: &[Appended]) {
        let (name, graph) = (&self.home.peer.name, &self.node(GRAPH).name);
        let got = self.home.got.lock().unwrap();
        for (log, by_graph) in [(log, false), (of_graph, true)] {
            let began = stay_began(log, name).expect("somebody of it is in the room");
            let sent_by = |one: &&Appended| (one.event.sender.server_name() == *graph) == by_graph;
            for one in log[began..].iter().filter(sent_by).filter(|one| one.event.sender.server_name() != *name) {
                let id = &one.event.event_id;
                assert!(got.contains(id), "{name} was not sent {id} {:?}: {:#?}", one.event.content(), self.told);
            }
        }
    }
}

async fn log_of(node: &Node, room: &RoomId, hub: &OwnedServerName) -> Log {
    let events = node.log(room).await.into_iter().map(|appended| (appended.event, LogOrigin::default())).collect();
    let state = node.lm.state(room).await.unwrap();
    let state = state.iter().map(|(kind, key, event)| ((kind.to_owned(), key.to_owned()), event.clone())).collect();
    Log { room: NewLog { room_id: room.to_owned(), version: RoomVersion::Lm02, hub: hub.clone() }, events, state }
}

/// INV-2: of two events an ancestor comes first, also where what is between them is not in the log; of the events from a place on.
async fn ancestors_come_first(node: &Node, log: &[Appended], from: usize) {
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
async fn each_passes_at_its_place(hub: &Node, room: &RoomId, keys: &VerifyKeys) {
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
async fn in_step(hub: &Node, room: &RoomId) -> Vec<(Key, String)> {
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
async fn one_graph(hub: &Node, other: &Node, room: &RoomId) {
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

/// INV-1: positions are dense. (What each event follows is the graph's.)
#[track_caller]
fn assert_dense_enough(log: &[Appended]) {
    assert!(log.iter().enumerate().all(|(index, one)| usize::try_from(one.position.0) == Ok(index)));
}
