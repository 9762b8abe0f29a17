//! Gaps of a hub's log that are too long to be filled while something waits for it: who was away for a week comes back to them.
//! A hub gives its log backwards alone. So what it gives is written down from the newest event on, and put into the log from the
//! oldest on when that is there, in the hub's order. Nothing else of the room is taken meanwhile. It is gone on with after a
//! restart. What is longer than the space for it is closed like a gap of which the hub does not give the rest.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ruma::OwnedEventId;

use super::Lm;
use super::finished::{Bad, Finished};
use super::gaps::{Adopted, Bounds, Fetched, Passed, event_of, in_order};
use super::holes::{AGAIN_MS, first_try};
use super::intake::Taking;
use super::rooms::{RoomCell, stored_pdu};
use crate::event::Redaction;
use crate::refusal::Refusal;
use crate::store::StoreError;
use crate::store::lm::{self as stored, EventRow, Fault, Gap, Hole, Staged};

/// How many bytes are written down for all gaps together. A room may have half of what the others leave.
const SPACE: i64 = 1 << 30;
/// How much is asked for, and for how long, before it is written down.
const ROUND: Bounds = Bounds { events: 2_000, bytes: 8 << 20, patience: Duration::from_secs(30) };
/// How many bytes a round counts for at least, and an event of which only its refusal is written down.
const ROUND_BYTES: i64 = 16 << 10;
const REFUSED_BYTES: i64 = 1 << 10;
/// How many events are put into the log at once.
const AT_ONCE: i64 = 200;
/// How often a hub is asked for its state or its keys that answers and does not give them, for more than an hour in all, before
/// the log goes on without.
const TRIES: i64 = 5;
/// When a hub that is away is asked for its state again, in milliseconds.
const AWAY_MS: i64 = 2 * 60_000;
/// How many branches of a log that forks are followed.
const EDGES: usize = 100;

/// What is said of a gap when nothing is in the way.
const UNDER_WAY: &str = "a long part of the log is being fetched";

/// What a round of asking found.
#[derive(Default)]
pub(super) struct Found {
    pub events: BTreeMap<OwnedEventId, Result<Finished, Bad>>,
    pub passed: BTreeMap<OwnedEventId, Passed>,
    /// What is before them, and is not there.
    pub left: Vec<OwnedEventId>,
}

impl Found {
    fn is_empty(&self) -> bool {
        self.events.is_empty() && self.passed.is_empty()
    }
}

impl Taking<'_> {
    /// Goes on with a gap later, from what was found of it.
    pub(super) async fn stage(&mut self, found: Found) -> Result<(), Refusal> {
        let (room_id, hub) = (&self.room().facts.room_id, &self.room().facts.hub);
        tracing::info!(room = %room_id, %hub, "much is missing: it is fetched in the background");
        let (lm, now) = (self.lm(), self.lm().context().clock.now_ms());
        // One that nobody attends may be there, of a try that failed: what was found now is asked for again after it.
        if stored::gap(&lm.context().store, room_id).await?.is_none() {
            let gap = Gap { noticed_ts: now, retry_at: now, last_error: UNDER_WAY.to_owned(), ..Gap::default() };
            self.write_down(gap, found).await?;
        }
        if let Some(cell) = lm.rooms().find(room_id).await? {
            lm.attend(&cell);
        }
        self.gap_is_open = true;
        Ok(())
    }

    /// Returns the gap as it is then.
    async fn write_down(&self, mut gap: Gap, found: Found) -> Result<Gap, Refusal> {
        let (context, room_id) = (self.lm().context(), self.room().facts.room_id.clone());
        let refused = i64::try_from(found.passed.len()).unwrap_or(i64::MAX).saturating_mul(REFUSED_BYTES);
        let bytes_before = gap.bytes;
        let has_found = !found.is_empty();
        let ids: Vec<OwnedEventId> = found.events.keys().chain(&found.left).cloned().collect();
        let there = stored::staged_of(&context.store, &room_id, &ids).await?;
        let events = in_order(found.events, &found.passed, 0).into_iter().filter_map(|(_, event)| {
            let proved =
                matches!(&event, Ok(event) if event.redacted.is_none() && event.redaction == self.room().redaction);
            let pdu = event_of(&event).filter(|pdu| !there.contains(&pdu.event_id))?;
            Some(Staged { seq: 0, event_id: pdu.event_id.clone(), proved, json: raw(&event)? })
        });
        let mut events: Vec<Staged> = events.collect();
        let count = i64::try_from(events.len()).unwrap_or(i64::MAX);
        gap.lowest = gap.lowest.saturating_sub(count);
        for (seq, event) in (gap.lowest..).zip(&mut events) {
            event.seq = seq;
            gap.bytes = gap.bytes.saturating_add(i64::try_from(event.json.len()).unwrap_or(i64::MAX));
        }
        gap.bytes = gap.bytes.saturating_add(refused);
        if has_found {
            gap.bytes = gap.bytes.max(bytes_before.saturating_add(ROUND_BYTES));
        }
        gap.events = gap.events.saturating_add(count);
        gap.edges = found.left.into_iter().filter(|id| !there.contains(id)).take(EDGES).collect();
        let (written, id) = (gap.clone(), room_id);
        let job =
            context.store.write(move |tx| Box::pin(async move { stored::stage(tx, &id, &written, &events).await }));
        job.await?;
        Ok(gap)
    }
}

/// An event as it came, as far as it is known.
fn raw(event: &Result<Finished, Bad>) -> Option<Vec<u8>> {
    event_of(event).map(|pdu| pdu.to_bytes())
}

impl Lm {
    /// Goes on with the gap of a room for a moment, if that is due at `now`. False when it has none.
    pub(super) async fn go_on_with_gap(&self, cell: &Arc<RoomCell>, now: i64) -> Result<bool, Refusal> {
        let store = &self.context().store;
        if stored::gap(store, &cell.room_id).await?.is_none() {
            return Ok(false);
        }
        let _turn = cell.intake.lock().await;
        let room = cell.snapshot(store).await?;
        let Some(gap) = stored::gap(store, &cell.room_id).await? else { return Ok(false) };
        if !room.has_server(&self.context().server_name) {
            // The hub owes us nothing any more.
            self.forget_holes(&cell.room_id).await?;
            return Ok(true);
        }
        if gap.retry_at > now {
            return Ok(true);
        }
        let mut taking = Taking::begin(self, cell, room).await?;
        if gap.place.is_none() {
            self.fetch_more(&mut taking, gap).await?;
            taking.finish(Some(cell)).await?;
            return Ok(true);
        }
        let rows = stored::staged(store, &cell.room_id, AT_ONCE).await?;
        let Some(last) = rows.last().map(|row| row.seq) else {
            self.end_gap(cell, gap).await?;
            return Ok(true);
        };
        let count = i64::try_from(rows.len()).unwrap_or(i64::MAX);
        if let (0, Some(problem), Some(first)) = (gap.taken, &gap.problem, rows.first()) {
            taking.fault(
                Fault::Skipped,
                &first.event_id,
                &format!("the hub did not give all that is before it: {problem}"),
            );
            let adopted = taking.adopt_state_before(&first.event_id).await?;
            // What was judged without it would be refused for good.
            match adopted {
                Adopted::Yes => {}
                Adopted::Refused(_) if gap.tries >= TRIES => {}
                Adopted::Refused(problem) => {
                    self.put_off_gap(cell, again_later(gap, &problem, self.context().clock.now_ms())).await?;
                    return Ok(true);
                }
                Adopted::NotNow(problem) => {
                    let retry_at = self.context().clock.now_ms().saturating_add(AWAY_MS);
                    self.put_off_gap(cell, Gap { retry_at, last_error: problem, ..gap }).await?;
                    return Ok(true);
                }
            }
        }
        if let Some(problem) = self.take_staged(&mut taking, rows, gap.tries >= TRIES).await? {
            self.put_off_gap(cell, again_later(gap, &problem, self.context().clock.now_ms())).await?;
            return Ok(true);
        }
        taking.finish(Some(cell)).await?;
        let room_id = cell.room_id.clone();
        let job = store.write(move |tx| Box::pin(async move { stored::unstage(tx, &room_id, last, count).await }));
        job.await?;
        if gap.taken % 10_000 < count {
            tracing::info!(room = %cell.room_id, taken = gap.taken.saturating_add(count), of = gap.events, "a long gap is put into the log");
        }
        Ok(true)
    }

    /// Writes down when a gap is gone on with.
    async fn put_off_gap(&self, cell: &RoomCell, gap: Gap) -> Result<(), StoreError> {
        let room_id = cell.room_id.clone();
        tracing::info!(room = %room_id, problem = gap.last_error, "a long gap waits");
        let job =
            self.context().store.write(move |tx| Box::pin(async move { stored::stage(tx, &room_id, &gap, &[]).await }));
        job.await
    }

    /// Asks the hub for more of what is missing.
    async fn fetch_more(&self, taking: &mut Taking<'_>, mut gap: Gap) -> Result<(), Refusal> {
        let (room_id, place) = (taking.room().facts.room_id.clone(), taking.room().head);
        let others = stored::bytes_of_other_gaps(&self.context().store, &room_id).await?;
        let now = self.context().clock.now_ms();
        let mut found = Found { left: std::mem::take(&mut gap.edges), ..Found::default() };
        let fetched = taking.fetch(&mut found, ROUND).await?;
        (gap.tries, gap.retry_at) = (if found.is_empty() { gap.tries } else { 0 }, now);
        let ended = |gap: &mut Gap, problem: Option<String>| (gap.place, gap.problem) = (Some(place), problem);
        match fetched {
            Fetched::All => ended(&mut gap, None),
            Fetched::No(problem) => ended(&mut gap, Some(problem)),
            Fetched::Long(_) | Fetched::NotNow(_) if gap.bytes > SPACE.saturating_sub(others) / 2 => {
                let problem = format!("there are more than the {} events for which there is space", gap.events);
                ended(&mut gap, Some(problem));
            }
            Fetched::Long(_) => {}
            // While it is away nothing else comes from it either.
            Fetched::NotNow(problem) => gap = again_later(gap, &problem, self.context().clock.now_ms()),
        }
        if !found.is_empty() {
            gap.last_error = UNDER_WAY.to_owned();
        }
        if gap.place.is_some() {
            gap.tries = 0;
        }
        let gap = taking.write_down(gap, found).await?;
        tracing::info!(room = %room_id, fetched = gap.events, whole = gap.place.is_some(), "a long gap is fetched");
        Ok(())
    }

    /// Puts events into the log. Nothing is done where the hub's own keys cannot be had and `without_keys` is not set: the
    /// reason is returned.
    async fn take_staged(
        &self,
        taking: &mut Taking<'_>,
        rows: Vec<Staged>,
        without_keys: bool,
    ) -> Result<Option<String>, Refusal> {
        let redaction = taking.room().redaction;
        let mut unproved = Vec::new();
        let mut events = Vec::with_capacity(rows.len());
        for row in rows {
            if row.proved
                && let Some(pdu) = proved(taking, &row, redaction)
            {
                events.push(Some(Ok(pdu)));
                continue;
            }
            let json = serde_json::from_slice(&row.json).map_err(|error| StoreError::corrupt("event", error))?;
            unproved.push(json);
            events.push(None);
        }
        let checked = self.check_finished(unproved, redaction).await;
        let hub = &taking.room().facts.hub;
        let waits = checked.iter().find_map(|event| match event {
            Err(Bad::Unproved(_, refusal @ Refusal::KeysUnavailable { server, .. })) if *server == **hub => {
                Some(refusal)
            }
            _ => None,
        });
        if let Some(refusal) = waits.filter(|_| !without_keys) {
            return Ok(Some(refusal.to_string()));
        }
        let mut checked = checked.into_iter();
        let coming = events.iter().flatten().filter_map(|event| event_of(event));
        let ids = coming.flat_map(|pdu| pdu.prev_events.iter().chain([&pdu.event_id])).cloned();
        taking.look_up(ids.collect()).await?;
        for event in events {
            let Some(event) = event.or_else(|| checked.next()) else { continue };
            // A complaint was recorded where one was due.
            let _ = match taking.admit(event) {
                Ok(event) => taking.place(event).await?,
                Err(outcome) => outcome,
            };
        }
        Ok(None)
    }

    /// Nothing of a gap is left to be put into the log.
    async fn end_gap(&self, cell: &Arc<RoomCell>, gap: Gap) -> Result<(), Refusal> {
        let (store, now) = (self.context().store.clone(), self.context().clock.now_ms());
        let problem = gap.problem.unwrap_or_default();
        let hole = |event_id, place, retry_at| Hole {
            event_id,
            json: None,
            place,
            given: false,
            tries: 0,
            retry_at,
            noticed_ts: gap.noticed_ts,
            last_error: problem.clone(),
            overflow: None,
        };
        // What the hub was told was delivered before all else: there is an end to how much is remembered.
        let newest = gap.newest.map(|newest| hole(newest, None, now));
        let edges = gap.edges.into_iter().map(|edge| hole(edge, gap.place, first_try(now)));
        let holes: Vec<Hole> = newest.into_iter().chain(edges).collect();
        tracing::info!(room = %cell.room_id, events = gap.events, "a long gap is closed");
        self.note_holes(&cell.room_id, holes).await?;
        let room_id = cell.room_id.clone();
        let job = store.write(move |tx| Box::pin(async move { stored::close_gap(tx, &room_id, now).await }));
        Ok(job.await?)
    }
}

/// A gap that is gone on with ever more seldom.
fn again_later(gap: Gap, problem: &str, now: i64) -> Gap {
    let tries = usize::try_from(gap.tries).unwrap_or_default();
    let delay = AGAIN_MS.get(tries).or(AGAIN_MS.last()).copied().unwrap_or_default();
    let last_error = problem.chars().take(500).collect();
    Gap { tries: gap.tries.saturating_add(1), retry_at: now.saturating_add(delay), last_error, ..gap }
}

fn proved(taking: &Taking<'_>, row: &Staged, redaction: Redaction) -> Option<Finished> {
    let room_id = taking.room().facts.room_id.clone();
    let row = EventRow { room_id, position: 0, event_id: row.event_id.clone(), json: row.json.clone() };
    Some(Finished { pdu: stored_pdu(row, redaction).ok()?, redaction, redacted: None, copy: false })
}
