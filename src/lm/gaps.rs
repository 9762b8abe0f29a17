//! What is missing of a hub's log: fetched from the hub when something names it, and again later when it cannot be had at
//! once. Where the hub will not give it, its state is taken instead.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use ruma::{EventId, OwnedEventId, RoomId, ServerName};

use super::Lm;
use super::batch::Batch;
use super::finished::{Bad, Finished};
use super::intake::Taking;
use super::peers::prev_events;
use super::rooms::{RoomCell, lock};
use crate::federation::RemoteError;
use crate::refusal::Refusal;

/// How many events one request for missing ones asks for.
const PAGE: usize = 100;
/// How many requests fill one gap at most.
const PAGES: usize = 50;
/// How long filling one gap may take: the hub may be waiting for our answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// When a hub that could not be asked for what is missing is asked again. After the last time it counts like one that
/// will not give it.
const AGAIN: [Duration; 3] = [Duration::from_secs(2), Duration::from_secs(20), Duration::from_secs(120)];
/// When state that came with a join and could not be checked is asked for again: its senders' servers were away.
const STATE_AGAIN: [Duration; 5] = [
    Duration::from_secs(60),
    Duration::from_secs(5 * 60),
    Duration::from_secs(30 * 60),
    Duration::from_secs(2 * 3600),
    Duration::from_secs(12 * 3600),
];
/// How many missing events of a room are remembered.
const REMEMBERED: usize = 100;
/// As how many of our users a hub is asked where its log ends.
const ASKERS: usize = 3;

/// What of a room's log is missing.
#[derive(Default)]
pub(super) struct Missing {
    ends: BTreeSet<OwnedEventId>,
    at_work: bool,
}

impl Missing {
    /// Whether the log is known to lack something.
    pub fn is_behind(&self) -> bool {
        self.at_work
    }
}

/// What became of a gap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Filled {
    /// All of it is there.
    Whole,
    /// The hub will not give all of it: its state was taken instead.
    Bridged,
    /// The hub cannot be asked now.
    NotNow,
}

impl Lm {
    /// Takes all that the hub has after the end of our copy of the log. False when the hub does not say where its log ends.
    pub(super) async fn catch_up(&self, room_id: &RoomId, hub: &ServerName) -> Result<bool, Refusal> {
        let (cell, room) = self.find(room_id).await?;
        let users: Vec<_> = self.own_members(&room).take(ASKERS).collect();
        for user in users {
            match self.peers().make(hub, "join", room_id, &user).await {
                Ok((_, template)) => {
                    let ends: BTreeSet<OwnedEventId> = prev_events(&template).into_iter().collect();
                    return match (ends.is_empty(), self.take_up_to(&cell, &ends, false).await?) {
                        (true, _) => Ok(false),
                        (false, Filled::NotNow) => Err(Refusal::Remote {
                            server: hub.to_string(),
                            problem: "does not give the end of its log now".to_owned(),
                        }),
                        (false, _) => Ok(true),
                    };
                }
                // Another user may ask.
                Err(error) if is_verdict(&error) => {}
                Err(error) => return Err(error.into_refusal(hub)),
            }
        }
        Ok(false)
    }

    /// Asks for missing events once more, and again, until they are there or the hub was asked often enough.
    pub(super) fn fetch_later(&self, cell: &Arc<RoomCell>, ends: BTreeSet<OwnedEventId>) {
        if ends.is_empty() {
            return;
        }
        let begin = {
            let mut missing = lock(&cell.missing);
            missing.ends.extend(ends);
            while missing.ends.len() > REMEMBERED {
                missing.ends.pop_first();
            }
            !std::mem::replace(&mut missing.at_work, true)
        };
        if begin {
            let (lm, cell) = (self.clone(), cell.clone());
            tokio::spawn(async move { lm.fetch_again(&cell).await });
        }
    }

    async fn fetch_again(&self, cell: &Arc<RoomCell>) {
        let mut tries = AGAIN.iter().peekable();
        while let Some(delay) = tries.next() {
            tokio::time::sleep(*delay).await;
            let ends = std::mem::take(&mut lock(&cell.missing).ends);
            let left = match self.take_up_to(cell, &ends, tries.peek().is_none()).await {
                Ok(Filled::NotNow) | Err(_) => ends,
                Ok(_) => self.still_missing(cell, ends).await,
            };
            let mut missing = lock(&cell.missing);
            missing.ends.extend(left);
            if missing.ends.is_empty() {
                break;
            }
        }
        *lock(&cell.missing) = Missing::default();
    }

    /// Those of the events that are not there, though the hub gave what it had: their keys may be.
    async fn still_missing(&self, cell: &RoomCell, ends: BTreeSet<OwnedEventId>) -> BTreeSet<OwnedEventId> {
        let ids: Vec<&EventId> = ends.iter().map(|id| &**id).collect();
        let known = crate::store::lm::known_of(&self.context().store, &cell.room_id, &ids).await.unwrap_or_default();
        ends.into_iter().filter(|id| known.get(id) != Some(&crate::store::lm::Known::Settled)).collect()
    }

    /// Asks again for state events before a join whose keys could not be had when it was answered.
    pub(super) fn adopt_later(&self, cell: &Arc<RoomCell>, mut wanted: BTreeSet<OwnedEventId>, join: OwnedEventId) {
        if wanted.is_empty() {
            return;
        }
        let (lm, cell) = (self.clone(), cell.clone());
        tokio::spawn(async move {
            for delay in STATE_AGAIN {
                tokio::time::sleep(delay).await;
                match lm.adopt_again(&cell, &mut wanted, &join).await {
                    Ok(()) if wanted.is_empty() => return,
                    Ok(()) => {}
                    Err(refusal) => tracing::info!(room = %cell.room_id, %refusal, "state is still missing"),
                }
            }
            tracing::warn!(room = %cell.room_id, missing = wanted.len(), "state of a room could not be checked");
        });
    }

    async fn adopt_again(
        &self,
        cell: &Arc<RoomCell>,
        wanted: &mut BTreeSet<OwnedEventId>,
        join: &EventId,
    ) -> Result<(), Refusal> {
        let room = cell.snapshot(&self.context().store).await?;
        let hub = &room.facts.hub;
        let state = self.peers().state(hub, &cell.room_id, join).await.map_err(|error| error.into_refusal(hub))?;
        let mut state = self.check_finished(state, room.redaction).await;
        let _turn = cell.intake.lock().await;
        let room = cell.snapshot(&self.context().store).await?;
        state.retain(|event| {
            let Ok(Finished { pdu, .. }) = event else { return false };
            // What came after the join for the same place is newer.
            let state_key = pdu.state_key.as_deref().unwrap_or_default();
            wanted.remove(&pdu.event_id) && room.state_event(&pdu.kind, state_key).is_none()
        });
        let mut taking = Taking::new(self, Batch::new(room));
        taking.adopt(state).await?;
        taking.batch.commit(self, Some(cell)).await?;
        Ok(())
    }

    async fn take_up_to(
        &self,
        cell: &Arc<RoomCell>,
        ends: &BTreeSet<OwnedEventId>,
        last_try: bool,
    ) -> Result<Filled, Refusal> {
        let _turn = cell.intake.lock().await;
        let room = cell.snapshot(&self.context().store).await?;
        let mut taking = Taking::new(self, Batch::new(room));
        taking.last_try = last_try;
        let filled = taking.take_up_to(ends).await?;
        taking.batch.commit(self, Some(cell)).await?;
        Ok(filled)
    }
}

impl Taking<'_> {
    /// Takes everything up to these events, of which nothing but the IDs is known.
    async fn take_up_to(&mut self, ends: &BTreeSet<OwnedEventId>) -> Result<Filled, Refusal> {
        let mut missing = Vec::new();
        for end in ends {
            if !self.knows(end).await? {
                missing.push(end.clone());
            }
        }
        match missing.first().cloned() {
            Some(first) => self.fill(&first, missing).await,
            None => Ok(Filled::Whole),
        }
    }

    /// Fetches and takes what is missing before (or at) an event.
    pub(super) async fn fill(&mut self, event: &EventId, missing: Vec<OwnedEventId>) -> Result<Filled, Refusal> {
        let (room_id, hub) = (self.room().facts.room_id.clone(), self.room().facts.hub.clone());
        tracing::info!(room = %room_id, %hub, event = %event, "events are missing, asking the hub");
        let mut found: BTreeMap<OwnedEventId, Finished> = BTreeMap::new();
        let fetching = self.fetch(&mut found, missing);
        let filled = match tokio::time::timeout(PATIENCE, fetching).await {
            Ok(filled) => filled?,
            Err(_) => Filled::NotNow,
        };
        let filled = if filled == Filled::NotNow && self.last_try { Filled::Bridged } else { filled };
        if filled != Filled::Whole {
            self.asked = Some(filled);
        }
        if filled == Filled::NotNow {
            return Ok(filled);
        }
        let found = in_order(found);
        if filled == Filled::Bridged {
            let first = found.first().map_or_else(|| event.to_owned(), |first| first.pdu.event_id.clone());
            self.complain(event, "the hub did not give all that is before it");
            self.adopt_state_before(&first).await?;
        }
        for event in found {
            // A complaint was recorded where one was due.
            let _ = self.place(event).await?;
        }
        Ok(filled)
    }

    /// Looks for everything between the log and `missing`.
    async fn fetch(
        &mut self,
        found: &mut BTreeMap<OwnedEventId, Finished>,
        missing: Vec<OwnedEventId>,
    ) -> Result<Filled, Refusal> {
        let facts = self.room().facts.clone();
        let mut wanted = missing;
        for _ in 0..PAGES {
            let Some(from) = wanted.pop() else { return Ok(Filled::Whole) };
            let page = match self.lm().peers().backfill(&facts.hub, &facts.room_id, &from, PAGE).await {
                Ok(page) => page,
                Err(error) => {
                    tracing::info!(room = %facts.room_id, hub = %facts.hub, %error, "no backfill");
                    return Ok(if is_verdict(&error) { Filled::Bridged } else { Filled::NotNow });
                }
            };
            let page = page.into_iter().take(PAGE).collect();
            for event in self.lm().check_finished(page, self.room().redaction).await.into_iter().flatten() {
                if event.pdu.room_id == facts.room_id && !self.knows(&event.pdu.event_id).await? {
                    found.insert(event.pdu.event_id.clone(), event);
                }
            }
            if !found.contains_key(&from) {
                return Ok(Filled::Bridged);
            }
            let before: BTreeSet<OwnedEventId> =
                found.values().flat_map(|event| event.pdu.prev_events.iter().cloned()).collect();
            let before: Vec<OwnedEventId> =
                before.into_iter().chain(wanted).filter(|id| !found.contains_key(id)).collect();
            wanted = self.unknown(&before).await?;
        }
        Ok(if wanted.is_empty() { Filled::Whole } else { Filled::Bridged })
    }

    /// Takes the state that the hub has before an event, where the events that made it cannot be had.
    async fn adopt_state_before(&mut self, event_id: &EventId) -> Result<(), Refusal> {
        let (room_id, hub) = (self.room().facts.room_id.clone(), self.room().facts.hub.clone());
        match self.lm().peers().state(&hub, &room_id, event_id).await {
            Ok(state) => {
                let state = self.lm().check_finished(state, self.room().redaction).await;
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
                Err(Bad::Forged(pdu, refusal) | Bad::Unproved(pdu, refusal)) => {
                    self.complain(&pdu.event_id, &refusal.to_string());
                }
                Err(Bad::Dropped(refusal)) => tracing::warn!(%refusal, "a state event was not taken"),
            }
        }
        Ok(())
    }
}

/// Whether a server has answered, rather than being away, busy or broken on its way to us.
fn is_verdict(error: &RemoteError) -> bool {
    let away = [
        StatusCode::TOO_MANY_REQUESTS,
        StatusCode::BAD_GATEWAY,
        StatusCode::SERVICE_UNAVAILABLE,
        StatusCode::GATEWAY_TIMEOUT,
    ];
    matches!(error, RemoteError::Status { status, .. } if !away.contains(status))
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
