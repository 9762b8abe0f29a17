//! Events that cannot be put into a log yet, while others are taken: what waits for them, what does not, and what is written
//! down of them ([`super::holes`]). Where too many wait, those that come on top are not kept but asked for again when there
//! is space: of each server the newest is written down, and how far back the others are.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ruma::{EventId, OwnedEventId, OwnedUserId, UserId};

use super::batch::Committed;
use super::finished::{Bad, Finished};
use super::holes::{BOUNDS, LAST_TRY, first_try};
use super::intake::Taking;
use super::join_check::is_deciding;
use super::room::Subject;
use super::rooms::RoomCell;
use crate::event::Pdu;
use crate::refusal::Refusal;
use crate::store::StoreError;
use crate::store::lm::{self as stored, Fault, Hole, Overflow};

/// How long what comes after an event that waits for its keys waits with it.
const HOLD_MS: i64 = 10_000;
/// How long an event that the rules forbid may be allowed by another that waits.
const DEPENDS_MS: i64 = 24 * 3_600_000;
/// How many events of one server may wait in a room.
const WAITING_OF_SERVER: usize = 50;
/// What of a room's log waits, while events are taken.
#[derive(Default)]
pub(super) struct Waits {
    /// Events that wait to be judged, in their order.
    stayed: Vec<Stayed>,
    /// Whether state that was given waits for its keys.
    given: bool,
    /// The events that others go on without: nobody is asked for them on the way.
    passed: BTreeSet<OwnedEventId>,
    /// What is to be written down.
    pub noted: Vec<Hole>,
    /// What is no longer missing.
    pub closed: Vec<OwnedEventId>,
    /// Whether anything was missing when this began.
    any: bool,
    /// What was in the way.
    pub problems: BTreeMap<OwnedEventId, String>,
    /// The end of the log when the events that are being taken were noticed, when they come late.
    pub late: Option<i64>,
    /// The slots in which late state was put, and where.
    late_state: BTreeMap<(String, String), i64>,
    /// Of which servers more waits than is kept, and since when.
    overflows: BTreeMap<String, i64>,
    /// The one of them of which what was not kept is being asked for, and what of that is still not kept.
    pub asking: Option<Overflow>,
    again: Vec<Hole>,
    /// Those of which all was asked for.
    pub asked: Vec<String>,
    /// Whether something no longer waits.
    pub freed: bool,
    /// The newest event that came while a long gap was being filled.
    pub newest: Option<OwnedEventId>,
    /// Whether one came now.
    heard: bool,
}

struct Stayed {
    event_id: OwnedEventId,
    sender: OwnedUserId,
    /// Whether others may be allowed by it.
    is_state: bool,
    since: i64,
    /// Whether its keys are what it waits for.
    unproved: bool,
}

impl Stayed {
    fn new(pdu: &Pdu, since: i64, unproved: bool) -> Self {
        let (event_id, sender) = (pdu.event_id.clone(), pdu.sender.clone());
        Self { event_id, sender, is_state: pdu.state_key.is_some(), since, unproved }
    }
}

impl Taking<'_> {
    /// Takes what waits to be judged and can be judged now, before anything newer. Returns all that was missing.
    pub(super) async fn take_waiting(&mut self) -> Result<Vec<Hole>, Refusal> {
        let store = &self.lm().context().store;
        let room_id = self.room().facts.room_id.clone();
        let holes = stored::holes(store, &room_id, false).await?;
        self.waits.any = true;
        self.waits.given = stored::count_holes(store, &room_id).await?.given > 0;
        self.waits.passed =
            holes.iter().filter(|hole| hole.place.is_some()).map(|hole| hole.event_id.clone()).collect();
        let overflows = holes.iter().filter_map(|hole| Some((hole.overflow.as_ref()?.of.clone(), hole.noticed_ts)));
        self.waits.overflows = overflows.collect();
        let is_overdue = |hole: &Hole| hole.json.is_none() && hole.place.is_none() && hole.tries > LAST_TRY;
        self.last_try = holes.iter().any(is_overdue);
        let waiting: Vec<&Hole> = holes.iter().filter(|hole| hole.json.is_some()).collect();
        let objects = waiting.iter().map(|hole| hole.json.as_deref().unwrap_or_default());
        let objects = objects.map(|json| {
            serde_json::from_slice(json).map_err(|error| Refusal::from(StoreError::corrupt("event", error)))
        });
        let checked = self.lm().check_finished(objects.collect::<Result<Vec<_>, _>>()?, self.room().redaction).await;
        for (hole, event) in waiting.into_iter().zip(checked) {
            self.waits.late = hole.place;
            let stayed = self.waits.stayed.len();
            self.take_again(hole, event).await?;
            self.waits.freed |= self.waits.stayed.len() == stayed;
        }
        self.waits.late = None;
        Ok(holes)
    }

    async fn take_again(&mut self, hole: &Hole, event: Result<Finished, Bad>) -> Result<(), Refusal> {
        let unproved = matches!(event, Err(Bad::Unproved(..)));
        let (stayed, slot) = match &event {
            Ok(Finished { pdu, .. }) => (Stayed::new(pdu, hole.noticed_ts, unproved), slot_of(pdu)),
            Err(Bad::Forged(pdu, _) | Bad::Unproved(pdu, _)) => {
                (Stayed::new(pdu, hole.noticed_ts, unproved), slot_of(pdu))
            }
            Err(Bad::Dropped(refusal)) if refusal.is_failure() => return Err(refusal.clone()),
            Err(Bad::Dropped(_) | Bad::Malformed { .. }) => {
                self.waits.closed.push(hole.event_id.clone());
                return Ok(());
            }
        };
        let before = self.waits.stayed.len();
        match self.admit(event) {
            Ok(event) => drop(self.take(event).await?),
            Err(Ok(())) => {}
            Err(Err(refusal)) if refusal.is_failure() => {}
            // Proved to be wrong: it may come again and be right.
            Err(Err(_)) => self.waits.closed.push(hole.event_id.clone()),
        }
        if self.knows(&hole.event_id).await? {
            self.waits.closed.push(hole.event_id.clone());
        }
        if self.waits.closed.contains(&hole.event_id) {
            return Ok(());
        }
        // It stays where it was, not as one that has just come.
        self.waits.stayed.truncate(before);
        self.waits.noted.retain(|noted| noted.event_id != hole.event_id);
        self.waits.stayed.push(stayed);
        if let Some(place) = slot.and_then(|slot| self.waits.late_state.get(&slot)) {
            // What was put there came before it.
            self.waits.noted.push(Hole { place: Some(*place), ..hole.clone() });
        }
        Ok(())
    }

    /// Puts state into the log that was given with a join, and whose keys can be had now.
    pub(super) async fn adopt_given(&mut self, now: i64) -> Result<(), Refusal> {
        let room_id = self.room().facts.room_id.clone();
        let store = &self.lm().context().store;
        let counts = stored::count_holes(store, &room_id).await?;
        if counts.given == 0 {
            return Ok(());
        }
        let given = stored::holes(store, &room_id, true).await?;
        // What waits may wait for it.
        if counts.waiting == 0 && !given.iter().any(|hole| hole.retry_at <= now) {
            return Ok(());
        }
        let objects = given.iter().map(|hole| {
            let json = hole.json.as_deref().unwrap_or_default();
            serde_json::from_slice(json).map_err(|error| Refusal::from(StoreError::corrupt("event", error)))
        });
        let checked = self.lm().check_finished(objects.collect::<Result<Vec<_>, _>>()?, self.room().redaction).await;
        for (hole, event) in given.into_iter().zip(checked) {
            match event {
                Err(Bad::Unproved(_, refusal)) => {
                    self.hinder(&hole.event_id, &refusal.to_string());
                    continue;
                }
                Err(Bad::Dropped(refusal)) if refusal.is_failure() => {
                    self.hinder(&hole.event_id, &refusal.to_string());
                    continue;
                }
                event => {
                    self.waits.late = hole.place;
                    let replaced = match &event {
                        Ok(event) => self.is_replaced(&event.pdu).await?,
                        Err(_) => false,
                    };
                    // What allowed it was perhaps not proved either.
                    let forbidden = event.as_ref().ok().and_then(|event| self.forbids_deciding(&event.pdu));
                    match forbidden {
                        Some(refusal) => {
                            self.fault(Fault::Forbidden, &hole.event_id, &format!("left out of the state: {refusal}"))
                        }
                        None if replaced => {}
                        None => self.adopt(vec![event]).await?,
                    }
                }
            }
            self.waits.closed.push(hole.event_id);
        }
        self.waits.late = None;
        Ok(())
    }

    /// Why the room as it is here forbids an event by which others are judged.
    fn forbids_deciding(&self, pdu: &Pdu) -> Option<Refusal> {
        let subject = Subject::of(pdu);
        let room = self.room();
        is_deciding(pdu).then(|| room.judge(&subject, &room.auth_events(&subject).0).err()).flatten()
    }

    /// An event that can be judged now; else what the hub is told.
    pub(super) fn admit(&mut self, event: Result<Finished, Bad>) -> Result<Finished, Result<(), Refusal>> {
        match event {
            Ok(event) => match self.waits_for(&event.pdu) {
                Some(why) => Err(self.keep(&event.pdu, &Refusal::Internal(why), false)),
                None => Ok(event),
            },
            Err(Bad::Unproved(pdu, refusal)) => match &refusal {
                // The hub's own keys: it is to send the whole again.
                Refusal::KeysUnavailable { server, .. } if *server == *self.room().facts.hub => {
                    let problem = refusal.to_string();
                    self.note(&pdu.event_id, None, None, &problem);
                    Err(Err(Refusal::Internal(problem)))
                }
                _ => Err(self.keep(&pdu, &refusal, true)),
            },
            Err(Bad::Malformed { event_id, refusal, .. }) => {
                // The hub has put into its log what is no event: nothing is asked for in its place. What another server says
                // that the hub has said is not the hub's fault.
                let fault = self.announced.is_none().then_some(Fault::Forbidden);
                self.settle(fault, &event_id, &refusal.to_string());
                self.fresh.insert(event_id);
                Err(Err(refusal))
            }
            Err(Bad::Dropped(refusal)) => Err(Err(refusal)),
            Err(Bad::Forged(pdu, refusal)) => {
                self.forged(&pdu, &refusal);
                Err(Err(refusal))
            }
        }
    }

    /// For what an event must wait that could be judged.
    fn waits_for(&self, pdu: &Pdu) -> Option<String> {
        let stayed = &self.waits.stayed;
        if stayed.is_empty() || self.is_full(pdu) {
            return None;
        }
        let now = self.lm().context().clock.now_ms();
        let is_recent = |since: i64| now.saturating_sub(since) < HOLD_MS;
        let same = |one: &Stayed, user: &UserId| one.sender.server_name() == user.server_name();
        let holds = |one: &&Stayed| {
            // A server whose keys were missing for longer holds nobody up again.
            one.unproved
                && is_recent(one.since)
                && !stayed.iter().any(|other| same(other, &one.sender) && !is_recent(other.since))
        };
        let before = stayed
            .iter()
            .find(|one| one.sender == pdu.sender || (one.unproved && same(one, &pdu.sender)))
            .or_else(|| stayed.iter().find(holds))?;
        Some(format!("waits for {}, which came before it", before.event_id))
    }

    fn is_full(&self, pdu: &Pdu) -> bool {
        let all = i64::try_from(self.waits.stayed.len()).unwrap_or(i64::MAX);
        all >= BOUNDS.waiting || self.is_full_of(pdu.sender.server_name().as_str())
    }

    /// Whether as much of a server waits as may.
    pub(super) fn is_full_of(&self, server: &str) -> bool {
        let of_server = self.waits.stayed.iter().filter(|one| one.sender.server_name() == server);
        of_server.count() >= WAITING_OF_SERVER
    }

    /// Whether an event that the rules forbid may be allowed by one that waits.
    pub(super) fn may_be_allowed(&self) -> bool {
        let now = self.lm().context().clock.now_ms();
        let is_recent = |since: i64| now.saturating_sub(since) < DEPENDS_MS;
        self.waits.given
            || self.waits.stayed.iter().any(|one| one.is_state && is_recent(one.since))
            || self.waits.overflows.values().any(|since| is_recent(*since))
    }

    /// Whether an event is one that waits.
    pub(super) fn is_waiting(&self, event_id: &EventId) -> bool {
        self.waits.stayed.iter().any(|one| one.event_id == event_id)
    }

    /// Keeps an event that cannot be judged now: what became of it, for the hub.
    pub(super) fn keep(&mut self, pdu: &Pdu, why: &Refusal, unproved: bool) -> Result<(), Refusal> {
        if self.is_waiting(&pdu.event_id) {
            return Ok(());
        }
        if self.is_full(pdu) {
            self.overflow(pdu, why);
            return Ok(());
        }
        let since = self.lm().context().clock.now_ms();
        if self.waits.late.is_none() {
            tracing::info!(room = %pdu.room_id, event = %pdu.event_id, %why, "an event waits");
        }
        self.waits.stayed.push(Stayed::new(pdu, since, unproved));
        self.waits.passed.insert(pdu.event_id.clone());
        let place = self.waits.late.unwrap_or(self.batch.after.head);
        self.note(&pdu.event_id, Some(place), Some(pdu.to_bytes()), &why.to_string());
        Ok(())
    }

    /// Writes down that an event is to be asked for when there is space for it.
    fn overflow(&mut self, pdu: &Pdu, why: &Refusal) {
        let server = pdu.sender.server_name().as_str();
        // Else there are too many of all servers together.
        let of = if self.is_full_of(server) { server.to_owned() } else { String::new() };
        let place = self.waits.late.unwrap_or(self.batch.after.head);
        if self.waits.late.is_none() {
            tracing::info!(room = %pdu.room_id, event = %pdu.event_id, %why, "an event is left out: too many wait");
        }
        self.hinder(&pdu.event_id, &why.to_string());
        let overflow = Overflow { of: of.clone(), since: place };
        let mut hole =
            Hole { overflow: Some(overflow), ..self.hole(&pdu.event_id, Some(place), None, &why.to_string()) };
        self.waits.passed.insert(pdu.event_id.clone());
        self.waits.overflows.entry(of.clone()).or_insert(hole.noticed_ts);
        let is_asked_for = self.waits.asking.as_ref().is_some_and(|asking| asking.of == of);
        let noted = if is_asked_for { &mut self.waits.again } else { &mut self.waits.noted };
        let is_of = |hole: &Hole| hole.overflow.as_ref().is_some_and(|overflow| overflow.of == of);
        if let Some(before) = noted.iter().position(is_of) {
            hole = hole.with(noted.remove(before));
        }
        noted.push(hole);
    }

    /// Keeps state that the hub gave, until its keys can be had.
    pub(super) fn keep_given(&mut self, pdu: &Pdu, why: &Refusal) {
        let place = Some(self.batch.after.head);
        let hole = self.hole(&pdu.event_id, place, Some(pdu.to_bytes()), &why.to_string());
        self.waits.noted.push(Hole { given: true, ..hole });
    }

    /// Writes down that an event is missing.
    pub(super) fn note(&mut self, event_id: &EventId, place: Option<i64>, json: Option<Vec<u8>>, problem: &str) {
        self.hinder(event_id, problem);
        let hole = self.hole(event_id, place, json, problem);
        self.waits.noted.push(hole);
    }

    fn hole(&self, event_id: &EventId, place: Option<i64>, json: Option<Vec<u8>>, problem: &str) -> Hole {
        let now = self.lm().context().clock.now_ms();
        Hole {
            event_id: event_id.to_owned(),
            json,
            place,
            given: false,
            tries: 0,
            retry_at: first_try(now),
            noticed_ts: now,
            last_error: problem.chars().take(500).collect(),
            overflow: None,
        }
    }

    /// Writes down that an event, and all that is before it, is to be asked for when the long gap is closed.
    pub(super) fn comes_later(&mut self, event_id: &EventId, prev_events: &[OwnedEventId]) {
        if self.waits.late.is_some() {
            // It has been written down before.
            return;
        }
        let before = self.waits.newest.replace(event_id.to_owned());
        self.waits.heard = true;
        // Where the log forks, the one does not lead to the other.
        if let Some(before) = before.filter(|before| before != event_id && !prev_events.contains(before)) {
            self.note(&before, None, None, "it came while a long gap was being filled");
        }
    }

    /// Remembers what is in the way of an event.
    pub(super) fn hinder(&mut self, event_id: &EventId, problem: &str) {
        self.waits.problems.insert(event_id.to_owned(), problem.chars().take(500).collect());
    }

    /// Whether others go on without an event that is missing.
    pub(super) fn is_passed(&self, event_id: &EventId) -> bool {
        self.waits.passed.contains(event_id)
    }

    /// Whether an event that is not known may be one of those for which there was no space.
    pub(super) fn may_be_left_out(&self) -> bool {
        !self.waits.overflows.is_empty()
    }

    /// Whether something newer stands in the place of a state event that comes late: the log here goes on from where it is,
    /// and would go back to what the hub has left behind.
    pub(super) async fn is_replaced(&self, pdu: &Pdu) -> Result<bool, Refusal> {
        let (Some(late), Some(state_key)) = (self.waits.late, pdu.state_key.as_deref()) else { return Ok(false) };
        let Some(current) = self.room().state_event(&pdu.kind, state_key) else { return Ok(false) };
        let row = stored::events_by_id(&self.lm().context().store, &[&*current.event_id]).await?;
        // What is not stored yet has come with it, in the hub's order.
        Ok(row.first().is_some_and(|row| row.position > late))
    }

    /// An event was put at the end of the log, perhaps late.
    pub(super) fn placed(&mut self, slot: Option<(String, String)>) {
        if let (Some(_), Some(slot)) = (self.waits.late, slot) {
            self.waits.late_state.insert(slot, self.batch.after.head);
        }
    }

    /// What was missing of an earlier stay, or of the time since, is not of the one that begins, and would stand in it if it came. State
    /// that was given is of now.
    pub(super) fn forget_earlier_stay(&mut self) {
        self.begins_stay = true;
        let waits = &mut self.waits;
        waits.noted.retain(|hole| hole.given);
        waits.given = !waits.noted.is_empty();
        waits.stayed.clear();
        waits.overflows.clear();
        waits.again.clear();
    }

    /// Writes all of it: first what is missing, so that nothing that stands behind it hides it; last what no longer is.
    pub(super) async fn finish(self, cell: Option<&Arc<RoomCell>>) -> Result<Committed, Refusal> {
        let lm = self.lm().clone();
        let room_id = self.room().facts.room_id.clone();
        let Waits { noted, mut closed, asked, again, overflows, freed, any, newest, heard, .. } = self.waits;
        // What was asked for, and came, and waits now is still missing.
        closed.retain(|id| self.fresh.contains(id) || noted.iter().all(|noted| noted.event_id != *id));
        if any {
            closed.extend(self.fresh);
        }
        let (forked, looks, begins_stay) = (self.forked, self.looks, self.begins_stay);
        let hasten = freed && !overflows.is_empty();
        let settled = !closed.is_empty() || !asked.is_empty() || hasten;
        let changes = !noted.is_empty() || settled || self.gap_is_open || begins_stay;
        if begins_stay {
            // The rest of a long gap in which it begins is of this stay.
            let (room_id, gap_goes_on) = (room_id.clone(), self.gap_is_open);
            let job = lm.context().store.write(move |tx| {
                Box::pin(async move { stored::forget_holes_of_before(tx, &room_id, gap_goes_on).await })
            });
            job.await?;
        }
        if let Some(newest) = newest.filter(|_| heard) {
            let (room_id, soon) = (room_id.clone(), first_try(lm.context().clock.now_ms()));
            let job = lm
                .context()
                .store
                .write(move |tx| Box::pin(async move { stored::note_newest(tx, &room_id, &newest, soon).await }));
            job.await?;
        }
        if !noted.is_empty() {
            lm.note_holes(&room_id, noted).await?;
        }
        let (has_blanks, at) = (self.batch.has_blanks(), lm.context().clock.now_ms());
        let committed = self.batch.commit(&lm, cell).await?;
        if has_blanks {
            lm.saw_blanks(&room_id);
        }
        if !looks && (forked || !committed.appended.is_empty()) {
            lm.saw(&room_id, forked, at).await?;
        }
        if settled {
            let (room_id, store, now) = (room_id.clone(), lm.context().store.clone(), lm.context().clock.now_ms());
            let job = lm.context().store.write(move |tx| {
                Box::pin(async move {
                    stored::close_holes(tx, &room_id, &closed).await?;
                    for server in &asked {
                        stored::close_overflow(tx, &room_id, server).await?;
                    }
                    stored::note_holes(&store, tx, &room_id, &again, BOUNDS).await?;
                    if hasten {
                        stored::hasten_overflows(tx, &room_id, now).await?;
                    }
                    Ok(())
                })
            });
            job.await?;
        }
        if changes {
            let cell = match cell {
                Some(cell) => Some(cell.clone()),
                None => lm.rooms().find(&room_id).await?,
            };
            if let Some(cell) = cell {
                lm.attend(&cell);
            }
        }
        Ok(committed)
    }
}

pub(super) fn slot_of(pdu: &Pdu) -> Option<(String, String)> {
    Some((pdu.kind.clone(), pdu.state_key.clone()?))
}
