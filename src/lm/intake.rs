//! What a participant takes from its hub: finished events, in the hub's order, each checked at its place. What is missing
//! between them is fetched from the hub.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use ruma::{EventId, OwnedEventId, ServerName};

use super::Lm;
use super::batch::{Batch, Origin};
use super::finished::{Bad, Finished};
use super::hub::received;
use super::room::{Snapshot, Subject};
use super::rooms::{RoomCell, stored_pdu};
use super::rules::Slot;
use crate::event::{Object, Pdu};
use crate::refusal::Refusal;
use crate::seam::Received;
use crate::store::lm as stored;

/// How many events one request for missing ones asks for.
const PAGE: usize = 100;
/// How many requests fill one gap at most.
const PAGES: usize = 50;
/// How long filling one gap may take: the hub may be waiting for our answer.
const PATIENCE: Duration = Duration::from_secs(30);

impl Lm {
    /// Takes what a server sent into a room that is hubbed elsewhere; answers in order, after the commit.
    pub(super) async fn take_finished(
        &self,
        origin: &ServerName,
        cell: &Arc<RoomCell>,
        objects: Vec<Object>,
    ) -> Vec<Received> {
        let count = objects.len();
        let (lm, origin, cell) = (self.clone(), origin.to_owned(), cell.clone());
        // On a task of its own: when the hub hangs up, what was begun is still finished.
        let taken = tokio::spawn(async move { lm.take_in_turn(&origin, &cell, objects).await }).await;
        match taken {
            Ok(Ok(results)) => results,
            Ok(Err(refusal)) => vec![received(None, Err(refusal)); count],
            Err(error) => vec![received(None, Err(Refusal::Internal(error.to_string()))); count],
        }
    }

    async fn take_in_turn(
        &self,
        origin: &ServerName,
        cell: &Arc<RoomCell>,
        objects: Vec<Object>,
    ) -> Result<Vec<Received>, Refusal> {
        let _turn = cell.intake.lock().await;
        let room = cell.snapshot(&self.context().store).await?;
        if *origin != room.facts.hub {
            return Ok(objects.iter().map(|object| received(None, not_from_hub(origin, &room, object))).collect());
        }
        let checked = self.check_finished(objects, room.redaction).await;
        let mut taking = Taking::new(self, Batch::new(room));
        let coming = checked.iter().flatten().map(|event| &event.pdu);
        let asked_for = coming.flat_map(|pdu| pdu.prev_events.iter().chain([&pdu.event_id])).cloned();
        taking.look_up(asked_for.collect()).await?;
        let mut results = Vec::with_capacity(checked.len());
        for event in checked {
            results.push(match event {
                Ok(event) => received(Some(event.pdu.event_id.clone()), taking.take(event).await?),
                Err(bad) => received(None, taking.reject(bad)),
            });
        }
        taking.batch.commit(self, Some(cell)).await?;
        Ok(results)
    }
}

/// Only the hub sends what is in the log.
fn not_from_hub(origin: &ServerName, room: &Snapshot, object: &Object) -> Result<(), Refusal> {
    if !object.contains_key("auth_events") && !object.contains_key("prev_events") {
        // An LPDU at a server that is not the hub is dropped.
        return Ok(());
    }
    Err(Refusal::WrongOrigin { origin: origin.to_string(), expected: room.facts.hub.to_string() })
}

/// Events of one room on their way into its log.
pub(super) struct Taking<'a> {
    lm: &'a Lm,
    pub batch: Batch,
    /// The events in the batch, and those that were rejected on the way.
    fresh: BTreeSet<OwnedEventId>,
    /// What the store knew of the events that were looked up when this began.
    looked_up: BTreeMap<OwnedEventId, bool>,
    /// The hub did not give what was missing: it is not asked again now.
    in_vain: bool,
}

impl<'a> Taking<'a> {
    /// Goes on from a batch in which these events are already.
    pub fn new(lm: &'a Lm, batch: Batch) -> Self {
        Self { lm, batch, fresh: BTreeSet::new(), looked_up: BTreeMap::new(), in_vain: false }
    }

    fn room(&self) -> &Snapshot {
        &self.batch.after
    }

    /// Takes an event, and what is missing before it.
    async fn take(&mut self, event: Finished) -> Result<Result<(), Refusal>, Refusal> {
        if self.knows(&event.pdu.event_id).await? {
            return Ok(Ok(()));
        }
        let missing = self.unknown(&event.pdu.prev_events).await?;
        if !missing.is_empty() && !self.in_vain {
            self.fill(&event.pdu.event_id, missing).await?;
        }
        self.place(event).await
    }

    /// Takes everything up to these events, of which nothing but the IDs is known.
    pub async fn take_up_to(&mut self, ends: Vec<OwnedEventId>) -> Result<(), Refusal> {
        let missing = self.unknown(&ends).await?;
        match missing.first().cloned() {
            Some(first) => self.fill(&first, missing).await,
            None => Ok(()),
        }
    }

    /// Takes an event whose predecessors are there, or cannot be had.
    pub async fn place(&mut self, event: Finished) -> Result<Result<(), Refusal>, Refusal> {
        let Finished { pdu, redaction, redacted } = event;
        if pdu.room_id != self.room().facts.room_id {
            return Ok(Err(Refusal::malformed(
                "room_id",
                format!("{}, not {}", pdu.room_id, self.room().facts.room_id),
            )));
        }
        if self.knows(&pdu.event_id).await? {
            return Ok(Ok(()));
        }
        if let Err(refusal) = self.judge(&pdu).await? {
            self.complain(&pdu.event_id, &refusal.to_string());
            self.fresh.insert(pdu.event_id);
            return Ok(Err(refusal));
        }
        if let Some(why) = redacted {
            self.complain(&pdu.event_id, &format!("taken redacted: {why}"));
        }
        if self.room().last_id().is_some_and(|last| !pdu.prev_events.contains(last)) {
            // The log forks at the hub. Both branches are facts there; they stand here in the order in which they came.
            self.complain(&pdu.event_id, &format!("follows {:?}, not the end of the log", pdu.prev_events));
        }
        self.batch.after.redaction = redaction;
        self.append(pdu);
        Ok(Ok(()))
    }

    /// Puts an event at the end of the batch.
    pub fn append(&mut self, pdu: Pdu) {
        self.fresh.insert(pdu.event_id.clone());
        self.batch.push(pdu, Origin { foreign: true, ..Origin::default() });
    }

    /// The rules, and that the hub chose the right events to allow this one.
    async fn judge(&self, pdu: &Pdu) -> Result<Result<(), Refusal>, Refusal> {
        let room = self.room();
        if let Some(hub) = pdu.hub_server.as_ref().filter(|hub| **hub != room.facts.hub) {
            return Ok(Err(Refusal::WrongHub { hub: room.facts.hub.to_string(), found: hub.to_string() }));
        }
        let subject = Subject::of(pdu);
        let (slots, expected) = room.auth_events(&subject);
        if pdu.auth_events.iter().collect::<BTreeSet<_>>() == expected.iter().collect() {
            return Ok(room.judge(&subject, &slots));
        }
        // Not what we would have chosen: perhaps earlier events for the right places, perhaps not.
        let ids: Vec<&EventId> = pdu.auth_events.iter().map(|id| &**id).collect();
        let mut named = BTreeMap::new();
        for row in stored::events_by_id(&self.lm.context().store, &ids).await? {
            let event = stored_pdu(row, room.redaction)?;
            named.insert(event.event_id.clone(), (event.kind, event.state_key.unwrap_or_default()));
        }
        for id in expected {
            if let Some(slot) = slots
                .iter()
                .find(|slot| room.state_event(slot.kind, slot.state_key).is_some_and(|event| event.event_id == id))
            {
                named.insert(id, (slot.kind.to_owned(), slot.state_key.to_owned()));
            }
        }
        let mut chosen = Vec::with_capacity(pdu.auth_events.len());
        for id in &pdu.auth_events {
            match named.get(id) {
                Some((kind, state_key)) => chosen.push(Slot { kind, state_key }),
                None => {
                    let problem = format!("auth_events name {id}, which is not known");
                    return Ok(Err(Refusal::LmRule { rule: "4.2", problem }));
                }
            }
        }
        Ok(room.judge(&subject, &chosen))
    }

    /// Records what makes an event unacceptable.
    fn reject(&mut self, bad: Bad) -> Result<(), Refusal> {
        match bad {
            Bad::Dropped(refusal) => Err(refusal),
            Bad::Forged(pdu, refusal) => {
                self.complain(&pdu.event_id, &refusal.to_string());
                Err(refusal)
            }
        }
    }

    pub fn complain(&mut self, event_id: &EventId, problem: &str) {
        let facts = &self.room().facts;
        tracing::warn!(room = %facts.room_id, hub = %facts.hub, event = %event_id, problem, "the hub misbehaves");
        self.batch.complain(event_id.to_owned(), problem.chars().take(500).collect());
    }

    /// Whether an event is in the log, or was rejected before.
    async fn knows(&mut self, event_id: &EventId) -> Result<bool, Refusal> {
        if self.fresh.contains(event_id) {
            return Ok(true);
        }
        if !self.looked_up.contains_key(event_id) {
            self.look_up(BTreeSet::from([event_id.to_owned()])).await?;
        }
        Ok(self.looked_up.get(event_id).copied().unwrap_or(false))
    }

    /// Asks the store about many events at once.
    async fn look_up(&mut self, event_ids: BTreeSet<OwnedEventId>) -> Result<(), Refusal> {
        let ids: Vec<&EventId> = event_ids.iter().map(|id| &**id).collect();
        let room_id = self.room().facts.room_id.clone();
        let known = stored::known_of(&self.lm.context().store, &room_id, &ids).await?;
        for event_id in event_ids {
            let is_known = known.contains(&event_id);
            self.looked_up.insert(event_id, is_known);
        }
        Ok(())
    }

    async fn unknown(&mut self, event_ids: &[OwnedEventId]) -> Result<Vec<OwnedEventId>, Refusal> {
        let mut unknown = Vec::new();
        for event_id in event_ids {
            if !self.knows(event_id).await? {
                unknown.push(event_id.clone());
            }
        }
        Ok(unknown)
    }

    /// Fetches and takes what is missing before (or at) an event.
    async fn fill(&mut self, event: &EventId, missing: Vec<OwnedEventId>) -> Result<(), Refusal> {
        let (room_id, hub) = (self.room().facts.room_id.clone(), self.room().facts.hub.clone());
        tracing::info!(room = %room_id, %hub, event = %event, "events are missing, asking the hub");
        let mut found: BTreeMap<OwnedEventId, Finished> = BTreeMap::new();
        let fetching = self.fetch(&mut found, missing);
        let complete = match tokio::time::timeout(PATIENCE, fetching).await {
            Ok(complete) => complete?,
            Err(_) => false,
        };
        let found = in_order(found);
        if !complete {
            self.in_vain = true;
            let first = found.first().map_or_else(|| event.to_owned(), |first| first.pdu.event_id.clone());
            self.complain(event, "the hub did not give all that is before it");
            self.adopt_state_before(&first).await?;
        }
        for event in found {
            // A complaint was recorded where one was due.
            let _ = self.place(event).await?;
        }
        Ok(())
    }

    /// Whether everything between the log and `missing` was found.
    async fn fetch(
        &mut self,
        found: &mut BTreeMap<OwnedEventId, Finished>,
        missing: Vec<OwnedEventId>,
    ) -> Result<bool, Refusal> {
        let facts = self.room().facts.clone();
        let mut wanted = missing;
        for _ in 0..PAGES {
            let Some(from) = wanted.pop() else { return Ok(true) };
            let page = match self.lm.peers().backfill(&facts.hub, &facts.room_id, &from, PAGE).await {
                Ok(page) => page,
                Err(error) => {
                    tracing::info!(room = %facts.room_id, hub = %facts.hub, %error, "no backfill");
                    return Ok(false);
                }
            };
            let page = page.into_iter().take(PAGE).collect();
            for event in self.lm.check_finished(page, self.room().redaction).await.into_iter().flatten() {
                if event.pdu.room_id == facts.room_id && !self.knows(&event.pdu.event_id).await? {
                    found.insert(event.pdu.event_id.clone(), event);
                }
            }
            if !found.contains_key(&from) {
                return Ok(false);
            }
            let before: BTreeSet<OwnedEventId> =
                found.values().flat_map(|event| event.pdu.prev_events.iter().cloned()).collect();
            let before: Vec<OwnedEventId> =
                before.into_iter().chain(wanted).filter(|id| !found.contains_key(id)).collect();
            wanted = self.unknown(&before).await?;
        }
        Ok(wanted.is_empty())
    }

    /// Takes the state that the hub has before an event, where the events that made it cannot be had.
    async fn adopt_state_before(&mut self, event_id: &EventId) -> Result<(), Refusal> {
        let (room_id, hub) = (self.room().facts.room_id.clone(), self.room().facts.hub.clone());
        match self.lm.peers().state(&hub, &room_id, event_id).await {
            Ok(state) => {
                let state = self.lm.check_finished(state, self.room().redaction).await;
                self.adopt(state).await
            }
            Err(error) => {
                tracing::warn!(room = %room_id, %hub, %error, "the hub does not give its state");
                Ok(())
            }
        }
    }

    /// Puts state events that the hub vouches for into the log as they are: what allowed them is not known here, and they
    /// are facts at the hub.
    pub async fn adopt(&mut self, state: Vec<Result<Finished, Bad>>) -> Result<(), Refusal> {
        for event in state {
            match event {
                Ok(Finished { pdu, redaction, .. }) => {
                    if pdu.room_id != self.room().facts.room_id || pdu.state_key.is_none() {
                        continue;
                    }
                    if !self.knows(&pdu.event_id).await? {
                        self.batch.after.redaction = redaction;
                        self.append(pdu);
                    }
                }
                Err(Bad::Forged(pdu, refusal)) => self.complain(&pdu.event_id, &refusal.to_string()),
                Err(Bad::Dropped(refusal)) => tracing::warn!(%refusal, "a state event was not taken"),
            }
        }
        Ok(())
    }
}

/// Each event after those that it names as its predecessors, as far as they are there.
fn in_order(mut found: BTreeMap<OwnedEventId, Finished>) -> Vec<Finished> {
    let mut ordered = Vec::with_capacity(found.len());
    let mut stack: Vec<OwnedEventId> = found.keys().cloned().collect();
    let mut entered = BTreeSet::new();
    while let Some(event_id) = stack.pop() {
        let Some(event) = found.get(&event_id) else { continue };
        if entered.insert(event_id.clone()) {
            stack.push(event_id);
            stack.extend(event.pdu.prev_events.iter().filter(|id| found.contains_key(*id)).cloned());
        } else {
            ordered.extend(found.remove(&event_id));
        }
    }
    ordered
}
