//! What a participant takes from its hub: finished events, in the hub's order, each checked at its place.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures::FutureExt as _;
use ruma::{EventId, OwnedEventId, ServerName};

use super::Lm;
use super::batch::{Batch, Origin};
use super::finished::{Bad, Finished};
use super::gaps::Filled;
use super::hub::received;
use super::room::{Snapshot, Subject};
use super::rooms::{RoomCell, lock, stored_pdu};
use super::rules::Slot;
use super::waits::{Waits, slot_of};
use crate::event::{Object, Pdu};
use crate::guard::fails_on;
use crate::refusal::Refusal;
use crate::seam::Received;
use crate::store::lm::{self as stored, Complaint, Known};

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
        let mut taking = Taking::begin(self, cell, room).await?;
        let checked = self.check_finished(objects, taking.room().redaction).await;
        let coming = checked.iter().flatten().map(|event| &event.pdu);
        let asked_for = coming.flat_map(|pdu| pdu.prev_events.iter().chain([&pdu.event_id])).cloned();
        taking.look_up(asked_for.collect()).await?;
        let mut results = Vec::with_capacity(checked.len());
        for event in checked {
            let event_id = match &event {
                Ok(event) => Some(event.pdu.event_id.clone()),
                Err(bad) => bad.event_id().cloned(),
            };
            results.push(received(event_id, taking.arrive(event).await?));
        }
        taking.finish(Some(cell)).await?;
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
    pub(super) fresh: BTreeSet<OwnedEventId>,
    /// What the events that were placed name as their predecessors.
    followed: BTreeSet<OwnedEventId>,
    /// What the store knew of the events that were looked up when this began.
    looked_up: BTreeMap<OwnedEventId, Option<Known>>,
    /// What became of asking the hub for what was missing: it is not asked twice.
    pub(super) asked: Option<Filled>,
    /// Whether a hub that cannot be asked now counts like one that will not give what is missing.
    pub(super) last_try: bool,
    /// Whether a long gap of the room is being filled: what comes after it is not taken before that.
    pub(super) gap_is_open: bool,
    /// What of the log is missing.
    pub(super) waits: Waits,
}

impl<'a> Taking<'a> {
    /// Goes on from a batch in which these events are already.
    pub fn new(lm: &'a Lm, batch: Batch) -> Self {
        Self {
            lm,
            batch,
            fresh: BTreeSet::new(),
            followed: BTreeSet::new(),
            looked_up: BTreeMap::new(),
            asked: None,
            last_try: false,
            gap_is_open: false,
            waits: Waits::default(),
        }
    }

    /// Goes on from a room as it is, first with what waits there.
    pub async fn begin(lm: &'a Lm, cell: &RoomCell, room: Arc<Snapshot>) -> Result<Self, Refusal> {
        let mut taking = Self::new(lm, Batch::new(room));
        if lock(&cell.missing).is_any() {
            if let Some(gap) = stored::gap(&lm.context().store, &cell.room_id).await? {
                (taking.gap_is_open, taking.asked) = (true, Some(Filled::NotNow));
                taking.waits.newest = gap.newest;
            }
            // Boxed: what is beneath it is nested too deeply for the compiler to see at once that it may go to another thread.
            taking.take_waiting().boxed().await?;
        }
        Ok(taking)
    }

    pub(super) fn room(&self) -> &Snapshot {
        &self.batch.after
    }

    /// Takes an event that the hub sent, or keeps it until it can be judged.
    async fn arrive(&mut self, event: Result<Finished, Bad>) -> Result<Result<(), Refusal>, Refusal> {
        if let Err(Bad::Unproved(pdu, _)) = &event
            && self.knows(&pdu.event_id).await?
        {
            return Ok(Ok(()));
        }
        match self.admit(event) {
            Ok(event) => self.take(event).await,
            Err(outcome) => Ok(outcome),
        }
    }

    /// Takes an event, and what is missing before it.
    pub(super) async fn take(&mut self, event: Finished) -> Result<Result<(), Refusal>, Refusal> {
        if self.knows(&event.pdu.event_id).await? {
            return Ok(Ok(()));
        }
        let missing = self.unknown(&event.pdu.prev_events).await?;
        if missing.is_empty() {
            return self.place(event).await;
        }
        let filled = match self.asked {
            Some(filled) => {
                if filled == Filled::Bridged {
                    let place = Some(self.batch.after.head);
                    missing.iter().for_each(|id| self.note(id, place, None, "it was not asked for"));
                }
                filled
            }
            None => self.fill(&event.pdu.event_id, missing).await?,
        };
        if filled == Filled::NotNow {
            if self.gap_is_open {
                // It is asked for with all that came meanwhile: the hub need not keep what it has for other rooms.
                self.comes_later(&event.pdu.event_id, &event.pdu.prev_events);
                return Ok(Ok(()));
            }
            // No verdict on the event: the hub is to send it again, and those that do not are asked for it.
            let problem = "what is before the event cannot be had from the hub now".to_owned();
            self.note(&event.pdu.event_id, None, None, &problem);
            return Ok(Err(Refusal::Internal(problem)));
        }
        self.place(event).await
    }

    /// Takes an event whose predecessors are there, or cannot be had. One on which this gateway fails is refused for good.
    pub async fn place(&mut self, event: Finished) -> Result<Result<(), Refusal>, Refusal> {
        let event_id = event.pdu.event_id.clone();
        let Ok(placed) = AssertUnwindSafe(self.judge_and_place(event)).catch_unwind().await else {
            let refusal = fails_on(&event_id);
            self.settle(&event_id, &refusal.to_string());
            self.fresh.insert(event_id);
            return Ok(Err(refusal));
        };
        placed
    }

    async fn judge_and_place(&mut self, event: Finished) -> Result<Result<(), Refusal>, Refusal> {
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
        if self.is_replaced(&pdu).await? {
            self.settle(&pdu.event_id, "came when something newer stood in its place already");
            self.fresh.insert(pdu.event_id);
            return Ok(Ok(()));
        }
        if let Err(refusal) = self.judge(&pdu).await? {
            if self.may_be_allowed() {
                return Ok(self.keep(&pdu, &refusal, false));
            }
            self.settle(&pdu.event_id, &refusal.to_string());
            self.fresh.insert(pdu.event_id);
            return Ok(Err(refusal));
        }
        if let Err(refusal) = self.room().has_room_for(&pdu) {
            self.settle(&pdu.event_id, &refusal.to_string());
            self.fresh.insert(pdu.event_id);
            return Ok(Err(refusal));
        }
        if let Some(why) = redacted {
            self.complain(&pdu.event_id, &format!("taken redacted: {why}"));
        }
        if self.forks(&pdu).await? {
            // The log forks at the hub. Both branches are facts there; they stand here in the order in which they came.
            self.complain(&pdu.event_id, &format!("follows {:?}, not the end of the log", pdu.prev_events));
        }
        self.batch.after.redaction = redaction;
        let slot = slot_of(&pdu);
        self.followed.extend(pdu.prev_events.iter().cloned());
        self.append(pdu);
        self.placed(slot);
        Ok(Ok(()))
    }

    /// Whether another event follows the same one already. What stands between may also have come late.
    async fn forks(&self, pdu: &Pdu) -> Result<bool, Refusal> {
        if self.waits.late.is_some() || self.room().last_id().is_none_or(|last| pdu.prev_events.contains(last)) {
            return Ok(false);
        }
        if pdu.prev_events.iter().any(|id| self.followed.contains(id)) {
            return Ok(true);
        }
        let (store, room) = (&self.lm.context().store, self.room());
        let ids: Vec<&EventId> = pdu.prev_events.iter().map(|id| &**id).collect();
        for before in stored::events_by_id(store, &ids).await? {
            let next = before.position.saturating_add(1);
            for row in stored::range(store, &room.facts.room_id, next, next, 1).await? {
                if stored_pdu(row, room.redaction)?.prev_events.contains(&before.event_id) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Puts an event at the end of the batch.
    pub fn append(&mut self, pdu: Pdu) {
        let (event_id, weight) = (pdu.event_id.clone(), self.room().weight_after(&pdu));
        self.batch.push(pdu, Origin { foreign: true, ..Origin::default() });
        self.batch.after.weight = weight;
        self.fresh.insert(event_id);
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
            if row.room_id != room.facts.room_id {
                continue;
            }
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
                // It waits here for its keys, perhaps for ever: the room goes on by what it was before.
                None if self.is_passed(id) || self.may_be_left_out() => return Ok(room.judge(&subject, &slots)),
                None => {
                    let problem = format!("auth_events name {id}, which is not known");
                    return Ok(Err(Refusal::LmRule { rule: "4.2", problem }));
                }
            }
        }
        Ok(room.judge(&subject, &chosen))
    }

    /// Remarks on an event that is taken all the same, or may come again and be right.
    pub fn complain(&mut self, event_id: &EventId, problem: &str) {
        self.record(event_id, problem, false);
        self.looked_up.entry(event_id.to_owned()).or_default().get_or_insert(Known::Remarked);
    }

    /// Records that an event is refused for good.
    pub(super) fn settle(&mut self, event_id: &EventId, problem: &str) {
        self.record(event_id, problem, true);
    }

    fn record(&mut self, event_id: &EventId, problem: &str, settled: bool) {
        let facts = &self.room().facts;
        tracing::warn!(room = %facts.room_id, hub = %facts.hub, event = %event_id, problem, "the hub misbehaves");
        let (event_id, problem) = (event_id.to_owned(), problem.chars().take(500).collect());
        self.batch.complain(Complaint { event_id, problem, settled });
    }

    /// Whether an event is in the log, or was rejected for good.
    pub(super) async fn knows(&mut self, event_id: &EventId) -> Result<bool, Refusal> {
        Ok(self.known(event_id).await? == Some(Known::Settled))
    }

    async fn known(&mut self, event_id: &EventId) -> Result<Option<Known>, Refusal> {
        if self.fresh.contains(event_id) {
            return Ok(Some(Known::Settled));
        }
        if !self.looked_up.contains_key(event_id) {
            self.look_up(BTreeSet::from([event_id.to_owned()])).await?;
        }
        let known = self.looked_up.get(event_id).copied().flatten();
        Ok(known.or(self.is_passed(event_id).then_some(Known::Remarked)))
    }

    pub(super) fn lm(&self) -> &'a Lm {
        self.lm
    }

    /// Asks the store about many events at once.
    pub(super) async fn look_up(&mut self, event_ids: BTreeSet<OwnedEventId>) -> Result<(), Refusal> {
        let ids: Vec<&EventId> = event_ids.iter().map(|id| &**id).collect();
        let room_id = self.room().facts.room_id.clone();
        let known = stored::known_of(&self.lm.context().store, &room_id, &ids).await?;
        for event_id in event_ids {
            let is_known = known.get(&event_id).copied();
            self.looked_up.insert(event_id, is_known);
        }
        Ok(())
    }

    /// Those of the events that nothing was heard of yet.
    pub(super) async fn unknown(&mut self, event_ids: &[OwnedEventId]) -> Result<Vec<OwnedEventId>, Refusal> {
        let mut unknown = Vec::new();
        for event_id in event_ids {
            if self.known(event_id).await?.is_none() {
                unknown.push(event_id.clone());
            }
        }
        Ok(unknown)
    }
}
