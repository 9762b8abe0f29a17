//! Logs in memory, which judge by LM's own rules, as the graphs of shared rooms want them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use isthmus::event::{Pdu, RoomVersion};
use isthmus::lm::rules::{Before, Judged, check, selected_slots};
use isthmus::refusal::Refusal;
use isthmus::seam::{LogBatch, LogOrigin, Logs, NewLog};
use isthmus::store::{StoreError, Tx, TxFuture};
use ruma::{EventId, OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId, RoomId};
use serde_json::Value;

type Key = (String, String);

/// One log.
#[derive(Clone)]
pub struct Log {
    pub room: NewLog,
    pub events: Vec<(Arc<Pdu>, LogOrigin)>,
    pub state: BTreeMap<Key, Arc<Pdu>>,
}

/// All logs of a gateway.
#[derive(Clone, Default)]
pub struct FakeLogs {
    pub logs: Arc<Mutex<HashMap<OwnedRoomId, Log>>>,
    /// How many batches ended in doubt.
    pub uncertain: Arc<Mutex<usize>>,
}

struct FakeBatch {
    logs: FakeLogs,
    /// As it was committed, and as it will be.
    before: Log,
    after: Log,
    written: Mutex<bool>,
}

impl Log {
    /// Whether LM's rules have the event at the end.
    pub fn judge(&self, event: &Pdu) -> Result<(), Refusal> {
        let state = |kind: &str, key: &str| self.state.get(&(kind.to_owned(), key.to_owned()));
        let content = |kind: &str| state(kind, "").map(|event| event.content());
        let member = |user: &str| state("m.room.member", user)?.content().get("membership").and_then(Value::as_str);
        let slots = selected_slots(&event.kind, &event.sender, event.state_key.as_deref(), event.content());
        let auth_events: Vec<_> = slots.into_iter().filter(|slot| state(slot.kind, slot.state_key).is_some()).collect();
        let creator: Option<OwnedUserId> = state("m.room.create", "").map(|event| event.sender.clone());
        check(&Judged {
            version: RoomVersion::Lm02,
            room_id: &self.room.room_id,
            sender: &event.sender,
            kind: &event.kind,
            state_key: event.state_key.as_deref(),
            content: event.content(),
            signed_by_sender: true,
            signed_by_hub: event.hub_server.as_ref().map(|_| true),
            signed_by_next_hub: false,
            has_prev_events: !self.events.is_empty(),
            auth_events: &auth_events,
            before: Before {
                creator: creator.as_deref(),
                follows_create: self.events.last().is_some_and(|(last, _)| last.kind == "m.room.create"),
                power_levels: content("m.room.power_levels"),
                join_rules: content("m.room.join_rules"),
                sender_membership: member(event.sender.as_str()),
                target_membership: event.state_key.as_deref().and_then(member),
                hub: Some(&self.room.hub),
                was_handed_over: false,
                next_hub_is_in: false,
            },
        })
    }

    pub fn push(&mut self, event: Arc<Pdu>, origin: LogOrigin) {
        if let Some(key) = &event.state_key {
            self.state.insert((event.kind.clone(), key.clone()), event.clone());
        }
        self.events.push((event, origin));
    }

    pub fn ids(&self) -> Vec<OwnedEventId> {
        self.events.iter().map(|(event, _)| event.event_id.clone()).collect()
    }

    /// INV-2, INV-3, and that no event is there twice.
    pub fn assert_sound(&self) {
        let mut replayed = Self { room: self.room.clone(), events: Vec::new(), state: BTreeMap::new() };
        let all: HashSet<_> = self.ids().into_iter().collect();
        assert_eq!(all.len(), self.events.len(), "an event is there twice");
        let mut seen = HashSet::new();
        for (event, origin) in &self.events {
            for prev in event.prev_events.iter().filter(|prev| all.contains(*prev)) {
                assert!(seen.contains(prev), "{prev} must come before {}", event.event_id);
            }
            let known = event.auth_events.iter().all(|id| seen.contains(id));
            assert!(known, "{} is allowed by what the log does not have", event.event_id);
            if let Err(refusal) = replayed.judge(event) {
                panic!("{} {:?} does not pass at its place: {refusal}", event.kind, event.content());
            }
            seen.insert(event.event_id.clone());
            replayed.push(event.clone(), *origin);
        }
    }
}

impl FakeLogs {
    pub fn log(&self, room_id: &RoomId) -> Log {
        self.logs.lock().unwrap()[room_id].clone()
    }

    fn batch(&self, log: Log) -> Box<dyn LogBatch> {
        Box::new(FakeBatch { logs: self.clone(), before: log.clone(), after: log, written: Mutex::new(false) })
    }
}

#[async_trait]
impl Logs for FakeLogs {
    async fn begin(&self, room_id: &RoomId) -> Result<Box<dyn LogBatch>, Refusal> {
        let log = self.logs.lock().unwrap().get(room_id).cloned();
        Ok(self.batch(log.ok_or_else(|| Refusal::UnknownRoom(room_id.to_string()))?))
    }

    fn begin_new(&self, room: NewLog) -> Box<dyn LogBatch> {
        self.batch(Log { room, events: Vec::new(), state: BTreeMap::new() })
    }

    async fn forget(&self, _room_id: &RoomId) {}

    async fn hub_of_another(&self, _room_id: &RoomId) -> Result<Option<OwnedServerName>, Refusal> {
        Ok(None)
    }
}

#[async_trait]
impl LogBatch for FakeBatch {
    fn judge(&self, event: &Pdu) -> Result<(), Refusal> {
        self.after.judge(event)
    }

    fn push(&mut self, event: Arc<Pdu>, origin: LogOrigin) {
        self.after.push(event, origin);
    }

    fn redact(&mut self, _target: &EventId, _redaction: &EventId) {}

    fn len(&self) -> usize {
        self.after.events.len() - self.before.events.len()
    }

    fn truncate(&mut self, len: usize) {
        let kept: Vec<_> = self.after.events.drain(self.before.events.len()..).take(len).collect();
        self.after = self.before.clone();
        for (event, origin) in kept {
            self.after.push(event, origin);
        }
    }

    fn state(&self, kind: &str, state_key: &str) -> Option<OwnedEventId> {
        Some(self.after.state.get(&(kind.to_owned(), state_key.to_owned()))?.event_id.clone())
    }

    fn all_state(&self) -> Vec<(Key, OwnedEventId)> {
        self.after.state.iter().map(|(key, event)| (key.clone(), event.event_id.clone())).collect()
    }

    fn set_state(&mut self, kind: &str, state_key: &str, event: Option<Arc<Pdu>>) {
        let key = (kind.to_owned(), state_key.to_owned());
        match event {
            Some(event) => self.after.state.insert(key, event),
            None => self.after.state.remove(&key),
        };
    }

    fn reading(&self) -> u64 {
        0
    }

    async fn has(&self, event_id: &EventId) -> Result<bool, Refusal> {
        Ok(self.after.events.iter().any(|(event, _)| event.event_id == event_id))
    }

    async fn find_lpdu(&self, lpdu_id: &EventId) -> Result<Option<OwnedEventId>, Refusal> {
        let known = self.after.events.iter().find(|(event, _)| event.lpdu_id.as_deref() == Some(lpdu_id));
        Ok(known.map(|(event, _)| event.event_id.clone()))
    }

    fn write<'c>(&'c self, _tx: &'c mut Tx) -> TxFuture<'c, ()> {
        Box::pin(async move {
            *self.written.lock().unwrap() = true;
            Ok(())
        })
    }

    async fn committed(self: Box<Self>) {
        assert!(*self.written.lock().unwrap(), "committed without being written");
        self.logs.logs.lock().unwrap().insert(self.after.room.room_id.clone(), self.after.clone());
    }

    fn uncertain(self: Box<Self>, _error: &StoreError) {
        *self.logs.uncertain.lock().unwrap() += 1;
    }
}
