//! What of a hub's log is missing here, written down so that a restart does not forget it, and tried again without end: events
//! that could not be fetched, events whose signer's keys cannot be had, and what stands on those.
//!
//! An event that cannot be checked now holds nobody up for long: a server whose keys can never be had would else stop the
//! room. It waits here, in our store, and the hub is told that it was delivered. What comes after it waits for a moment
//! ([`super::waits`]); after that only what its own server sends, and what the rules forbid as long as it is not there.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use ruma::{OwnedEventId, RoomId, UserId};
use tokio::sync::Notify;

use super::Lm;
use super::batch::Batch;
use super::gaps::Filled;
use super::intake::Taking;
use super::rooms::{RoomCell, lock};
use crate::event::Object;
use crate::refusal::Refusal;
use crate::store::StoreError;
use crate::store::lm::{self as stored, Counts, Hole};

/// When what is missing is tried again, in milliseconds after the time before. The last is repeated without end.
pub const AGAIN_MS: [i64; 7] = [2_000, 10_000, 2 * 60_000, 15 * 60_000, 3_600_000, 6 * 3_600_000, 24 * 3_600_000];
/// From which try on a hub that cannot be asked counts like one that will not give what is missing.
pub(super) const LAST_TRY: i64 = 2;
/// How much a room remembers of each kind.
pub(super) const BOUNDS: Counts = Counts { absent: 100, waiting: 200, given: 5000 };
/// When a room's task begins with all that is missing.
const FIRST: Duration = Duration::from_secs(1);
/// How long the task of a room sleeps at most, and how long it leaves a store alone that fails.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);

/// What a room's cell knows of its holes.
#[derive(Default)]
pub(super) struct Missing {
    /// Whether a task looks after them: as long as there are any.
    at_work: bool,
    /// Told when there are more, or fewer.
    changed: Arc<Notify>,
}

impl Missing {
    /// Whether something may be missing.
    pub fn is_any(&self) -> bool {
        self.at_work
    }
}

impl Lm {
    /// Goes on looking after what was missing when the gateway was stopped.
    pub async fn resume(&self) -> Result<(), Refusal> {
        let store = &self.context().store;
        let rooms = stored::rooms_with_holes(store).await?.into_iter().chain(stored::rooms_with_gaps(store).await?);
        for room_id in rooms.collect::<BTreeSet<_>>() {
            match self.rooms().find(&room_id).await? {
                Some(cell) => self.attend(&cell),
                // Of a join that was broken off.
                None => self.forget_holes(&room_id).await?,
            }
        }
        self.owed().resume().await?;
        self.leave_soon();
        self.resume_stranded().await?;
        self.resume_tells().await?;
        self.resume_looks().await
    }

    /// Sees to it that somebody looks after what is missing in a room.
    pub(super) fn attend(&self, cell: &Arc<RoomCell>) {
        let begin = {
            let mut missing = lock(&cell.missing);
            missing.changed.notify_one();
            !std::mem::replace(&mut missing.at_work, true)
        };
        if begin {
            let (lm, cell) = (self.clone(), cell.clone());
            tokio::spawn(async move {
                while AssertUnwindSafe(lm.look_after(&cell)).catch_unwind().await.is_err() {
                    tracing::error!(room = %cell.room_id, "looking after what is missing panicked");
                    tokio::time::sleep(LONGEST_SLEEP).await;
                }
            });
        }
    }

    async fn look_after(&self, cell: &Arc<RoomCell>) {
        let changed = lock(&cell.missing).changed.clone();
        // Whatever was put off before a restart: much may have changed.
        let mut at_once = true;
        let begin = tokio::time::Instant::now() + FIRST;
        loop {
            let now = self.context().clock.now_ms();
            let sleep = match stored::next_try(&self.context().store, &cell.room_id).await {
                Ok(Some(_)) if at_once => begin.saturating_duration_since(tokio::time::Instant::now()),
                Ok(Some(next)) => Duration::from_millis(u64::try_from(next.saturating_sub(now)).unwrap_or_default()),
                Ok(None) => {
                    lock(&cell.missing).at_work = false;
                    // Whoever noted more before this saw a task at work.
                    if let Ok(Some(_)) = stored::next_try(&self.context().store, &cell.room_id).await {
                        self.attend(cell);
                    }
                    return;
                }
                Err(_) if self.context().store.reader().is_closed() => return,
                Err(error) => {
                    tracing::warn!(room = %cell.room_id, %error, "what is missing could not be read");
                    LONGEST_SLEEP
                }
            };
            tokio::select! {
                () = tokio::time::sleep(sleep.min(LONGEST_SLEEP)) => {}
                () = changed.notified() => continue,
            }
            let now = if at_once { i64::MAX } else { self.context().clock.now_ms() };
            at_once = false;
            let problems = match self.go_on(cell, now).await {
                Ok(Some(problems)) => problems,
                Ok(None) => continue,
                Err(_) if self.context().store.reader().is_closed() => return,
                Err(refusal) => {
                    tracing::info!(room = %cell.room_id, %refusal, "events are still missing");
                    tokio::time::sleep(FIRST).await;
                    BTreeMap::new()
                }
            };
            if let Err(error) = self.put_off(&cell.room_id, now, problems).await {
                tracing::warn!(room = %cell.room_id, %error, "what is missing could not be put off");
                tokio::time::sleep(LONGEST_SLEEP).await;
            }
        }
    }

    /// Goes on with the room's gap; where it has none, tries what is due at `now`, and returns what was in the way.
    async fn go_on(&self, cell: &Arc<RoomCell>, now: i64) -> Result<Option<BTreeMap<OwnedEventId, String>>, Refusal> {
        match self.go_on_with_gap(cell, now).await {
            Ok(true) => Ok(None),
            Ok(false) => self.try_holes(cell, now).await.map(Some),
            Err(refusal) => {
                if self.context().store.reader().is_closed() {
                    return Err(refusal);
                }
                tracing::info!(room = %cell.room_id, %refusal, "a long gap is still open");
                tokio::time::sleep(FIRST).await;
                Ok(None)
            }
        }
    }

    async fn put_off(
        &self,
        room_id: &RoomId,
        due: i64,
        problems: BTreeMap<OwnedEventId, String>,
    ) -> Result<(), StoreError> {
        let (room_id, now) = (room_id.to_owned(), self.context().clock.now_ms().min(due));
        let delay = |tries: i64| {
            let tries = usize::try_from(tries).unwrap_or_default();
            AGAIN_MS.get(tries).or(AGAIN_MS.last()).copied().unwrap_or_default()
        };
        let job = self.context().store.write(move |tx| {
            Box::pin(
                async move { stored::put_off_holes(tx, &room_id, now, delay, |id| problems.get(id).cloned()).await },
            )
        });
        job.await
    }

    pub(super) async fn forget_holes(&self, room_id: &RoomId) -> Result<(), StoreError> {
        let room_id = room_id.to_owned();
        self.context().store.write(move |tx| Box::pin(async move { stored::forget_holes(tx, &room_id).await })).await
    }

    /// Tries what is due at `now`; what was in the way.
    async fn try_holes(&self, cell: &Arc<RoomCell>, now: i64) -> Result<BTreeMap<OwnedEventId, String>, Refusal> {
        let store = &self.context().store;
        self.ask_for_keys(&cell.room_id).await?;
        let _turn = cell.intake.lock().await;
        let room = cell.snapshot(store).await?;
        if !room.has_server(&self.context().server_name) {
            // The hub owes us nothing any more.
            self.forget_holes(&cell.room_id).await?;
            return Ok(BTreeMap::new());
        }
        let mut taking = Taking::new(self, Batch::new(room));
        taking.adopt_given(now).await?;
        let holes = taking.take_waiting().await?;
        let freed = taking.waits.freed;
        let is_due = |hole: &&Hole| hole.json.is_none() && (hole.retry_at <= now || (freed && hole.overflow.is_some()));
        for hole in holes.iter().filter(is_due) {
            if hole.overflow.as_ref().is_some_and(|overflow| taking.is_full_of(&overflow.of)) {
                // There is no space for more of it.
                continue;
            }
            taking.waits.asking = hole.overflow.clone();
            taking.waits.late = hole.place;
            taking.last_try = hole.tries >= LAST_TRY;
            // State that the hub gave instead of what was missing may be known, and what is before it not.
            if hole.place.is_none() && taking.knows(&hole.event_id).await? {
                taking.waits.closed.push(hole.event_id.clone());
                continue;
            }
            let noted = taking.waits.noted.len();
            let filled = taking.fill(&hole.event_id, vec![hole.event_id.clone()]).await?;
            let is_new = |noted: &[Hole]| !noted.is_empty() && noted.iter().all(|new| new.event_id != hole.event_id);
            match filled {
                Filled::NotNow => break,
                Filled::Bridged if !taking.waits.noted.get(noted..).is_some_and(is_new) => {}
                // What is still missing of it has its own hole.
                Filled::Bridged | Filled::Whole | Filled::Outside => match &hole.overflow {
                    Some(overflow) => taking.waits.asked.push(overflow.of.clone()),
                    None => taking.waits.closed.push(hole.event_id.clone()),
                },
            }
        }
        let problems = std::mem::take(&mut taking.waits.problems);
        taking.finish(Some(cell)).await?;
        Ok(problems)
    }

    /// Whether what our users sent may be in the log where some of it is missing here.
    pub(super) async fn may_lack_ours(&self, cell: &RoomCell) -> Result<bool, Refusal> {
        if !lock(&cell.missing).at_work {
            return Ok(false);
        }
        let store = &self.context().store;
        if stored::gap(store, &cell.room_id).await?.is_some() {
            return Ok(true);
        }
        let own = self.context().server_name.as_str();
        let is_ours = |hole: &Hole| match (&hole.overflow, &hole.json) {
            (Some(overflow), _) => overflow.of.is_empty() || overflow.of == own,
            // What waits for the keys of its sender's server is not ours.
            (None, Some(json)) => serde_json::from_slice(json).is_ok_and(|event: Object| {
                let sender = event.get("sender").and_then(|user| <&UserId>::try_from(user.as_str()?).ok());
                sender.is_some_and(|user| user.server_name() == own)
            }),
            // What cannot be had, and was asked for in vain, is not waited for.
            (None, None) => hole.place.is_none() && hole.tries <= LAST_TRY,
        };
        Ok(stored::holes(store, &cell.room_id, false).await?.iter().any(is_ours))
    }

    /// Whether the hub may know of events that would allow what seems forbidden here.
    pub(super) async fn is_behind(&self, cell: &RoomCell) -> bool {
        if !lock(&cell.missing).at_work {
            return false;
        }
        if matches!(stored::gap(&self.context().store, &cell.room_id).await, Ok(Some(_))) {
            return true;
        }
        let holes = stored::holes(&self.context().store, &cell.room_id, false).await.unwrap_or_default();
        let is_open = |hole: &Hole| {
            hole.json.is_some() || hole.overflow.is_some() || (hole.place.is_none() && hole.tries <= LAST_TRY)
        };
        holes.iter().any(is_open)
    }
}

impl Lm {
    pub(super) async fn note_holes(&self, room_id: &RoomId, holes: Vec<Hole>) -> Result<(), StoreError> {
        let (room, store) = (room_id.to_owned(), self.context().store.clone());
        let job = self
            .context()
            .store
            .write(move |tx| Box::pin(async move { stored::note_holes(&store, tx, &room, &holes, BOUNDS).await }));
        let too_many = job.await?;
        if too_many > 0 {
            tracing::warn!(room = %room_id, events = too_many, "more is missing than is remembered");
        }
        Ok(())
    }
}

/// When what was noticed at `now` is tried first.
pub(super) fn first_try(now: i64) -> i64 {
    let [first, ..] = AGAIN_MS;
    now.saturating_add(first)
}
