//! What must be so when all queues are empty.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use isthmus::event::{Redaction, canonical_json, redact};
use isthmus::lm::Appended;
use ruma::{OwnedEventId, OwnedServerName, OwnedUserId};

use super::{STEPS, Said, Schedule};
use crate::lm::world::assert_dense;

impl Schedule {
    pub async fn check(&self) {
        assert!(self.said.len() > STEPS / 2, "hardly anybody said anything: {:#?}", self.told);
        let mut memberships: BTreeMap<String, usize> = BTreeMap::new();
        let mut changes = 0;
        for (room, room_id) in self.rooms.iter().enumerate().filter(|(room, _)| !self.is_closed(*room)) {
            let hub = self.hub_of(room).await.expect("somebody keeps the log");
            let log = self.whole_log(room, hub).await;
            let mut twice = BTreeSet::new();
            for event in &log {
                assert!(
                    event.event.lpdu_id.as_ref().is_none_or(|id| twice.insert(id.clone())),
                    "an LPDU is in the log twice"
                );
            }
            self.nothing_is_missing(room, &log);
            for event in log.iter().filter(|event| event.event.kind == "m.room.member") {
                *memberships.entry(event.event.content()["membership"].to_string()).or_default() += 1;
            }
            changes += log.iter().filter(|event| event.event.kind == "m.room.hub").count();
            for (index, node) in self.nodes.iter().enumerate() {
                let Some(node) = node else { continue };
                let own = node.log(room_id).await;
                if index == room {
                    // Somebody of it was there all the time.
                    assert_dense(&own);
                    assert_eq!(own.len(), log.len());
                }
                same_log(&log, &own, &node.name);
                let mut faults = node.fault_kinds(room_id).await;
                // Of those whom it could ask, nobody knew who keeps the log.
                faults.retain(|kind| !self.hands_over || kind != "moved");
                assert_eq!(faults, [""; 0], "{} of {room}: {:#?}", node.name, self.told);
            }
        }
        println!(
            "{memberships:?}, {changes} changes of the hub, {:?} rooms closed",
            self.gone.as_ref().map(|gone| &gone.closed)
        );
    }

    /// The log of a room from its beginning, of which the hub of now may not have all, each event as the hub has it. Nobody has another.
    async fn whole_log(&self, room: usize, hub: usize) -> Vec<Appended> {
        let room_id = &self.rooms[room];
        let mut all = Vec::new();
        let others = (0..self.nodes.len()).filter(|index| *index != hub && *index != room);
        for index in [hub, room].into_iter().chain(others).filter(|index| self.runs(*index)) {
            assert!(index == hub || !self.keeps(index, room).await, "two keep {room}: {:#?}", self.told);
            all.extend(self.node(index).log(room_id).await);
        }
        let end = self.node(hub).log(room_id).await.last().map(|last| last.event.event_id.clone());
        all.extend(self.gone.iter().flat_map(|gone| gone.logs[room].clone()));
        let (mut known, mut follows): (HashMap<OwnedEventId, Appended>, HashMap<_, _>) = Default::default();
        for event in all {
            let (id, before) = (event.event.event_id.clone(), event.event.prev_events.clone());
            let other = follows.entry(before).or_insert_with(|| id.clone());
            assert_eq!(*other, id, "the log of {room} forks: {:#?}", self.told);
            known.entry(id).or_insert(event);
        }
        let (mut log, mut next) = (Vec::new(), end);
        while let Some(event) = next.and_then(|id| known.remove(&id)) {
            next = event.event.prev_events.first().cloned();
            log.push(event);
        }
        log.reverse();
        assert_eq!(log[0].event.kind, "m.room.create", "something of the log of {room} is lost: {:#?}", self.told);
        log
    }

    /// What was taken is in the log once and in its sender's order, or its sender was told that the hub would not have it.
    fn nothing_is_missing(&self, hub: usize, log: &[Appended]) {
        let refused: Vec<OwnedEventId> = self
            .watchers
            .iter()
            .flat_map(|watcher| watcher.refused.lock().unwrap().iter().map(|(id, _)| id.clone()).collect::<Vec<_>>())
            .collect();
        let (mut places, mut bodies): (HashMap<&OwnedEventId, usize>, BTreeSet<(&OwnedUserId, &str)>) =
            Default::default();
        for (place, event) in log.iter().enumerate() {
            for id in [Some(&event.event.event_id), event.event.lpdu_id.as_ref()].into_iter().flatten() {
                assert!(places.insert(id, place).is_none(), "{id} is twice in the log of {hub}");
            }
            let body = event.event.content().get("body").and_then(|body| body.as_str()).unwrap_or_default();
            if body.starts_with(|first: char| first.is_ascii_digit()) {
                assert!(bodies.insert((&event.event.sender, body)), "{body} is twice in the log of {hub}");
            }
        }
        let mut last: BTreeMap<&OwnedUserId, usize> = BTreeMap::new();
        let instead: Vec<(OwnedEventId, OwnedEventId)> =
            self.watchers.iter().flat_map(|watcher| watcher.replaced.lock().unwrap().clone()).collect();
        for Said { sender, what, id, is_lpdu, in_line, .. } in self.said.iter().filter(|said| said.room == hub) {
            // What one hub did not take goes to the next under another name.
            let mut ids = vec![id];
            let mut at = 0;
            while let Some(id) = ids.get(at).copied() {
                let more = instead.iter().filter(|(old, _)| old == id).map(|(_, new)| new);
                ids.extend(more.filter(|new| !ids.contains(new)).collect::<Vec<_>>());
                at += 1;
            }
            let found: Vec<usize> = ids.iter().filter_map(|id| places.get(id).copied()).collect();
            assert!(found.len() < 2, "{what} is twice in the log of {hub}: {:#?}", self.told);
            let Some(place) = found.first().copied() else {
                let was_refused = ids.iter().any(|id| refused.contains(id)) || self.is_gone(sender.server_name());
                assert!(*is_lpdu && was_refused, "{what} in {hub} is lost: {:#?}", self.told);
                continue;
            };
            if *in_line {
                let before = last.insert(sender, place);
                assert!(before < Some(place), "{what} is out of its sender's order: {:#?}", self.told);
            }
        }
        for (_, user, event_id) in self.came.iter().filter(|(room, ..)| *room == hub) {
            let is_it = |event: &Appended| match event_id {
                Some(event_id) => event.event.event_id == *event_id,
                None => {
                    event.event.sender == *user
                        && event.event.state_key.as_deref() == Some(user.as_str())
                        && event.event.content()["membership"] == "knock"
                }
            };
            assert!(log.iter().any(is_it), "{user} has come or knocked, and {hub} forgot it: {:#?}", self.told);
        }
    }
}

/// What a participant reads is what the hub reads, byte for byte, in the hub's order and without what was redacted, and from its last join on it has all of it.
pub fn same_log(hub: &[Appended], part: &[Appended], name: &OwnedServerName) {
    let at_hub: HashMap<_, _> = hub.iter().map(|event| (&event.event.event_id, event)).collect();
    let here: BTreeSet<_> = part.iter().map(|event| event.event.event_id.as_str()).collect();
    let redactions = hub.iter().filter(|event| event.event.kind == "m.room.redaction");
    let redactions: Vec<(&str, &str)> = redactions
        .filter_map(|event| Some((event.event.content().get("redacts")?.as_str()?, event.event.event_id.as_str())))
        .collect();
    for event in part {
        let id = &event.event.event_id;
        let original = at_hub.get(id).expect("an event that the hub does not have");
        let (mine, theirs) = (&event.event.json, &original.event.json);
        let mut by = redactions.iter().filter(|(target, _)| target == id).map(|(_, by)| by).peekable();
        // What redacts it was said while nobody of this server was there, and the server is not told of it.
        if by.peek().is_some() && by.all(|by| !here.contains(by)) {
            assert_eq!(redact(mine, Redaction::Draft), redact(theirs, Redaction::Draft));
        } else {
            assert_eq!(canonical_json(mine), canonical_json(theirs), "{name} has another {id} than the hub");
        }
    }
    let began = stay_began(hub, name).unwrap_or_else(|| panic!("{name} has nobody in the room"));
    let stay: Vec<_> = hub[began..].iter().map(|event| &event.event.event_id).collect();
    let tail = part.iter().skip_while(|event| event.event.event_id != *stay[0]).map(|event| &event.event.event_id);
    let lines = |log: &[Appended]| -> Vec<String> {
        let line = |event: &Appended| {
            let (kind, key, content) = (&event.event.kind, &event.event.state_key, event.event.json.get("content"));
            format!("{} {kind} {key:?} of {} {content:?}", event.event.event_id, event.event.sender)
        };
        log.iter().map(line).collect()
    };
    let is_same = tail.collect::<Vec<_>>() == stay;
    assert!(is_same, "{name} has another log than the hub: {:#?}\n{:#?}", lines(part), lines(hub));
}

/// Where a server's last stay began: the last join while it had nobody in the room. None when it has nobody there.
pub fn stay_began(hub: &[Appended], name: &OwnedServerName) -> Option<usize> {
    let mut joined = BTreeSet::new();
    let mut began = None;
    for (place, event) in hub.iter().enumerate() {
        let json = &event.event.json;
        let user = json.get("state_key").and_then(|key| key.as_str()).unwrap_or_default();
        if json["type"] != "m.room.member" || !user.ends_with(&format!(":{name}")) {
            continue;
        }
        if json["content"]["membership"] == "join" {
            if joined.is_empty() {
                began = Some(place);
            }
            joined.insert(user.to_owned());
        } else {
            joined.remove(user);
        }
    }
    began.filter(|_| !joined.is_empty())
}
