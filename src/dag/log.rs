//! The log of a shared room, as a batch adds to it: what the graph accepts goes to the log's end, in that order and in the same
//! transaction, once the log's own rules have it there.

use std::collections::{BTreeSet, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use imbl::ordmap::DiffItem;
use ruma::events::TimelineEventType;
use ruma::{EventId, OwnedEventId, OwnedServerName, RoomId};

use super::batch::Batch;
use super::events::EventMap;
use super::order::linearize;
use super::pdu::Pdu;
use super::snapshot::{Snapshot, StateKey};
use super::stored::{Status, Stored};
use super::version::is_shared;
use crate::event;
use crate::refusal::Refusal;
use crate::seam::{LogBatch, LogOrigin, Logs, NewLog};
use crate::store::{StoreError, Tx, TxFuture};

/// The event that hands an LM room over to another hub.
const HUB_EVENT: &str = "m.room.hub";

/// What of a batch is the log's.
#[derive(Default)]
pub(super) struct Linear {
    /// Where the events go; none in rooms that have no log, and before the first event.
    pub log: Option<Box<dyn LogBatch>>,
    /// The hub of the room: its creator's server.
    pub hub: Option<OwnedServerName>,
    /// The keys under which the log may have something else than the graph.
    pub dirty: BTreeSet<StateKey>,
    /// Whether corrections are being made.
    pub correcting: bool,
    /// How many were.
    pub corrected: usize,
    /// Whether state was set in a log of another hub.
    pub followed: bool,
}

impl Linear {
    /// How many events go into the log.
    pub fn len(&self) -> usize {
        self.log.as_ref().map_or(0, |log| log.len())
    }

    pub fn truncate(&mut self, len: usize) {
        if let Some(log) = &mut self.log {
            log.truncate(len);
        }
    }

    /// Where it is now.
    pub fn mark(&self) -> (usize, BTreeSet<StateKey>) {
        (self.len(), self.dirty.clone())
    }

    /// Takes back what was put since.
    pub fn back_to(&mut self, (len, dirty): (usize, BTreeSet<StateKey>)) {
        self.truncate(len);
        self.dirty = dirty;
    }

    pub fn push(&mut self, event: Arc<event::Pdu>, origin: LogOrigin) {
        if let Some(log) = &mut self.log {
            if let Some(state_key) = &event.state_key {
                self.dirty.insert((event.kind.clone(), state_key.clone()));
            }
            log.push(event, origin);
        }
    }

    pub fn redact(&mut self, target: &EventId, redaction: &EventId) {
        if let Some(log) = &mut self.log {
            log.redact(target, redaction);
        }
    }

    /// The resolved state has something else there than before.
    pub fn changed(&mut self, kind: &str, state_key: &str) {
        if self.log.is_some() {
            self.dirty.insert((kind.to_owned(), state_key.to_owned()));
        }
    }
}

impl Batch {
    /// An event of a shared room as the log takes it.
    pub(super) fn linear_form(&self, pdu: &Pdu) -> Result<Option<Arc<event::Pdu>>, Refusal> {
        if !is_shared(self.version) || self.shared.logs.get().is_none() {
            return Ok(None);
        }
        Ok(Some(Arc::new(pdu.to_linear()?)))
    }

    /// Begins to add to the log; corrects first what it has otherwise than the graph. `before` is the state before the event
    /// where that is another server's word.
    pub(super) async fn begin_log(&mut self, event: &Pdu, before: Option<&Snapshot>) -> Result<(), Refusal> {
        if self.linear.log.is_some() || !is_shared(self.version) {
            return Ok(());
        }
        let hub = match event.kind {
            TimelineEventType::RoomCreate => Some(event.sender.server_name().to_owned()),
            _ => self.hub_of(before.unwrap_or(&self.core.current)).await?,
        };
        self.open_log(hub).await
    }

    /// Begins the log of a shared room that is joined, or goes on with it, with those of the state's events that are new here: it has
    /// what its state is. A log that the gateway lines up itself, and out of which all of its users were, has what its rules have there.
    pub(super) async fn begin_log_with(&mut self, state: &Snapshot) -> Result<(), Refusal> {
        if !is_shared(self.version) || self.shared.logs.get().is_none() {
            return Ok(());
        }
        let hub = self.hub_of(state).await?;
        // What the room was is to be compared with nothing any more.
        self.core.corrections.compared = true;
        self.open_log(hub).await?;
        if self.is_hub() {
            return self.log_gap(state).await;
        }
        let is_new = |id: &&OwnedEventId| self.staged.get(*id).is_some_and(|event| event.groups.is_none());
        let new: Vec<_> = state.map.values().filter(is_new).filter_map(|id| self.staged.get(id).cloned()).collect();
        for event in linearize(new, |event| &event.pdu, named_before) {
            self.linear.push(Arc::new(event.pdu.to_linear()?), LogOrigin { told: true, ..LogOrigin::default() });
        }
        Ok(())
    }

    pub(super) async fn open_log(&mut self, hub: Option<OwnedServerName>) -> Result<(), Refusal> {
        let Some(logs) = self.shared.logs.get().cloned() else { return Ok(()) };
        let hub = hub.ok_or_else(|| Refusal::NotFound(format!("the m.room.create of {}", self.room_id)))?;
        self.linear.log = Some(if self.core.tips.is_empty() {
            logs.begin_new(NewLog { room_id: self.room_id.clone(), version: self.version, hub: hub.clone() })
        } else {
            logs.begin(&self.room_id).await?
        });
        self.linear.hub = Some(hub);
        Box::pin(self.compare()).await
    }

    /// The server of the room's creator.
    pub(super) async fn hub_of(&self, state: &Snapshot) -> Result<Option<OwnedServerName>, Refusal> {
        let Some(id) = state.get("m.room.create", "").cloned() else { return Ok(None) };
        let found = self.shared.events.with_staged(std::slice::from_ref(&id), &self.staged).await?;
        Ok(found.get(&id).map(|create| create.pdu.sender.server_name().to_owned()))
    }

    /// Whether the gateway lines the room's events up for others.
    pub(super) fn is_hub(&self) -> bool {
        self.linear.hub.as_ref() == Some(&self.shared.context.server_name)
    }

    /// Whether the log has an event.
    pub(super) async fn log_has(&self, event_id: &EventId) -> Result<bool, Refusal> {
        match &self.linear.log {
            Some(log) => log.has(event_id).await,
            None => Ok(false),
        }
    }

    /// Whether the log's rules have the event at its end. Where another server is the hub its log decides, and not ours. What
    /// names, among those that allow it, an event that the log does not have is nothing for participants, who know the log alone.
    pub(super) async fn judge_by_log(
        &self,
        event: Option<&event::Pdu>,
        known: &EventMap,
    ) -> Result<Result<(), Refusal>, Refusal> {
        let (Some(log), Some(event)) = (&self.linear.log, event) else { return Ok(Ok(())) };
        if event.kind == HUB_EVENT && event.state_key.as_deref() == Some("") {
            // Graph servers go by the creator for good, and a log has one hub.
            let problem = "a shared room is not handed over: its creator's server stays its hub";
            return Ok(Err(Refusal::Forbidden(problem.to_owned())));
        }
        if !self.is_hub() {
            return Ok(Ok(()));
        }
        for id in &event.auth_events {
            if !known.get(id).is_some_and(|event| event.is_accepted()) && !log.has(id).await? {
                let problem = format!("auth_events name {id}, which was not accepted here");
                return Ok(Err(Refusal::LmRule { rule: "4.2", problem }));
            }
        }
        Ok(log.judge(event))
    }

    /// What happened in a gap that is closed with another server's word of the state: those of its events that are here go to
    /// the log, as far as its rules have them, before what follows the gap. Else everybody who has come meanwhile would have
    /// to be taken out of the room.
    pub(super) async fn log_gap(&mut self, before: &Snapshot) -> Result<(), Refusal> {
        if !self.is_hub() || self.linear.log.is_none() {
            return Ok(());
        }
        let (mut keys, mut ids) = (HashSet::new(), Vec::new());
        for item in self.core.current.map.diff(&before.map) {
            if let DiffItem::Add(key, id) | DiffItem::Update { new: (key, id), .. } = item {
                keys.insert(key.clone());
                ids.push(id.clone());
            }
        }
        // And what allowed them, where something newer stands in its place now.
        let mut alone = EventMap::new();
        while !ids.is_empty() {
            let found = self.shared.events.with_staged(&ids, &self.staged).await?;
            ids.clear();
            for event in found.into_values() {
                let is_alone = event.groups.is_none() && event.status == Status::Accepted;
                let is_alone = is_alone && !alone.contains_key(&event.pdu.event_id);
                if is_alone && event.key().is_some_and(|key| keys.contains(&key)) {
                    ids.extend(event.pdu.auth_events.iter().filter(|id| !alone.contains_key(*id)).cloned());
                    alone.insert(event.pdu.event_id.clone(), event);
                }
            }
            ids.sort_unstable();
            ids.dedup();
        }
        let alone: Vec<Arc<Stored>> = alone.into_values().collect();
        for event in linearize(alone, |event| &event.pdu, named_before) {
            let known = self.events(&event.pdu.auth_events).await?;
            let linear = event.pdu.to_linear()?;
            if !self.log_has(&linear.event_id).await? && self.judge_by_log(Some(&linear), &known).await?.is_ok() {
                self.linear.push(Arc::new(linear), LogOrigin { foreign: true, ..LogOrigin::default() });
            }
        }
        Ok(())
    }

    /// Where another server is the hub, and nothing can be corrected by events: the log's state is the graph's.
    pub(super) async fn follow(&mut self) -> Result<(), StoreError> {
        let Some(reading) = self.linear.log.as_ref().map(|log| log.reading()).filter(|_| !self.is_hub()) else {
            return Ok(());
        };
        let mut keys: BTreeSet<StateKey> = std::mem::take(&mut self.linear.dirty);
        if self.core.corrections.followed != Some(reading) {
            keys.extend(self.differing());
        }
        let mut wanted = Vec::new();
        for key in keys {
            let there = self.linear.log.as_ref().and_then(|log| log.state(&key.0, &key.1));
            let here = self.core.current.map.get(&key).cloned();
            if here != there {
                wanted.push((key, here));
            }
        }
        let ids: Vec<_> = wanted.iter().filter_map(|(_, id)| id.clone()).collect();
        let events = self.shared.events.with_staged(&ids, &self.staged).await?;
        for ((kind, state_key), id) in wanted {
            let event = id.and_then(|id| events.get(&id)?.pdu.to_linear().ok()).map(Arc::new);
            if let Some(log) = &mut self.linear.log {
                log.set_state(&kind, &state_key, event);
                self.linear.followed = true;
            }
        }
        self.core.corrections.followed = Some(reading);
        Ok(())
    }

    /// The keys under which the log has something else than the graph.
    pub(super) fn differing(&self) -> BTreeSet<StateKey> {
        let Some(log) = &self.linear.log else { return BTreeSet::new() };
        let there: std::collections::BTreeMap<_, _> = log.all_state().into_iter().collect();
        let here = &self.core.current.map;
        let mut keys: BTreeSet<StateKey> =
            there.iter().filter(|(key, id)| here.get(*key) != Some(*id)).map(|(key, _)| key.clone()).collect();
        keys.extend(here.keys().filter(|key| !there.contains_key(*key)).cloned());
        keys
    }
}

/// What comes before an event, as far as it says so.
fn named_before(pdu: &Pdu) -> Vec<OwnedEventId> {
    pdu.prev_events.iter().chain(&pdu.auth_events).cloned().collect()
}

/// A log's batch that is lent to a write job, and comes back whatever becomes of that.
#[derive(Clone)]
pub(super) struct Lent {
    log: Arc<Mutex<Option<Box<dyn LogBatch>>>>,
    /// Whether there ever was one.
    is_any: bool,
}

/// What was lent.
pub(super) struct Loan {
    log: Option<Box<dyn LogBatch>>,
    owner: Lent,
}

impl Lent {
    pub fn new(log: Option<Box<dyn LogBatch>>) -> Self {
        Self { is_any: log.is_some(), log: Arc::new(Mutex::new(log)) }
    }

    pub fn take(&self) -> Option<Loan> {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        Some(Loan { log: Some(log), owner: self.clone() })
    }

    /// Tells the log what became of the write.
    pub async fn give_back(&self, room_id: &RoomId, written: &Result<(), StoreError>, logs: Option<&Arc<dyn Logs>>) {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner).take();
        match (log, written) {
            (Some(log), Ok(())) => log.committed().await,
            (Some(log), Err(error)) => log.uncertain(error),
            (None, Err(_)) if self.is_any => {
                tracing::error!(room = %room_id, "a log is still being written");
                if let Some(logs) = logs {
                    logs.forget(room_id).await;
                }
            }
            (None, _) => {}
        }
    }
}

impl Loan {
    /// Writes everything, in the open transaction.
    pub fn write<'c>(&'c self, tx: &'c mut Tx) -> Option<TxFuture<'c, ()>> {
        Some(self.log.as_ref()?.write(tx))
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        *self.owner.log.lock().unwrap_or_else(PoisonError::into_inner) = self.log.take();
    }
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use ruma::room_id;

    use super::*;

    #[derive(Default)]
    struct Noted(Mutex<Vec<ruma::OwnedRoomId>>);

    #[async_trait]
    impl Logs for Noted {
        async fn begin(&self, room_id: &RoomId) -> Result<Box<dyn LogBatch>, Refusal> {
            Err(Refusal::UnknownRoom(room_id.to_string()))
        }

        fn begin_new(&self, _: NewLog) -> Box<dyn LogBatch> {
            Box::new(Nothing)
        }

        async fn forget(&self, room_id: &RoomId) {
            self.0.lock().unwrap().push(room_id.to_owned());
        }

        async fn hub_of_another(&self, _: &RoomId) -> Result<Option<OwnedServerName>, Refusal> {
            Ok(None)
        }
    }

    /// A batch that has nothing.
    struct Nothing;

    #[async_trait]
    impl LogBatch for Nothing {
        fn judge(&self, _: &event::Pdu) -> Result<(), Refusal> {
            Ok(())
        }

        fn push(&mut self, _: Arc<event::Pdu>, _: LogOrigin) {}

        fn redact(&mut self, _: &EventId, _: &EventId) {}

        fn len(&self) -> usize {
            0
        }

        fn truncate(&mut self, _: usize) {}

        fn state(&self, _: &str, _: &str) -> Option<OwnedEventId> {
            None
        }

        fn all_state(&self) -> Vec<(StateKey, OwnedEventId)> {
            Vec::new()
        }

        fn set_state(&mut self, _: &str, _: &str, _: Option<Arc<event::Pdu>>) {}

        fn reading(&self) -> u64 {
            0
        }

        async fn has(&self, _: &EventId) -> Result<bool, Refusal> {
            Ok(false)
        }

        async fn find_lpdu(&self, _: &EventId) -> Result<Option<OwnedEventId>, Refusal> {
            Ok(None)
        }

        fn write<'c>(&'c self, _: &'c mut Tx) -> TxFuture<'c, ()> {
            Box::pin(async { Ok(()) })
        }

        async fn committed(self: Box<Self>) {}

        fn uncertain(self: Box<Self>, _: &StoreError) {}
    }

    #[tokio::test]
    async fn a_log_whose_write_nobody_waits_for_any_more_is_read_again() {
        let (noted, room) = (Arc::new(Noted::default()), room_id!("!room:gateway.example"));
        let logs: Arc<dyn Logs> = noted.clone();
        let given_up = Err(StoreError::Closed);
        for (log, forgotten) in [(None, 0), (Some(Box::new(Nothing) as Box<dyn LogBatch>), 1)] {
            let lent = Lent::new(log);
            let loan = lent.take();
            lent.give_back(room, &given_up, Some(&logs)).await;
            assert_eq!(noted.0.lock().unwrap().len(), forgotten);
            drop(loan);
        }
    }
}
