//! Gaps that could not be filled while their sender waited for the answer. What stands after such a gap is written down with the
//! answer, and the gap is filled in the background, across restarts. Where the server gives no more, or more than is taken, the
//! gap is closed with the server's word of the state; that is written down too, and what is missing is asked for again.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use ruma::{OwnedEventId, OwnedRoomId, OwnedServerName, RoomId, ServerName};
use tokio::sync::{Notify, Semaphore};

use super::fetch::{Filling, LONG, is_missing};
use super::pdu::{Unverified, Verified};
use super::room::Room;
use super::walk::Walked;
use super::{Dag, Shared};
use crate::event::parse_object;
use crate::refusal::Refusal;
use crate::seam::EventEffect;
use crate::store::StoreError;
use crate::store::gaps::{self as stored, Bounds, Gap};

/// When a gap is tried again, in milliseconds after the time before. The last is repeated.
const AGAIN_MS: [i64; 7] = [2_000, 10_000, 2 * 60_000, 15 * 60_000, 3_600_000, 6 * 3_600_000, 24 * 3_600_000];
/// How often a gap is tried, which is for about a week.
const MAX_TRIES: i64 = 14;
/// How much is remembered.
const BOUNDS: Bounds = Bounds { of_server: 50, of_server_in_all: 1_000, of_room: 200, closed: 100 };
/// The gaps of how many servers are filled at once in the background.
const AT_ONCE: usize = 4;
/// How long a room's task sleeps at most, and how long it leaves alone what fails.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);
/// How long it waits for a server that is asked for another room.
const TURN: Duration = Duration::from_secs(1);

/// What is being done about gaps.
pub(super) struct Gaps {
    /// The rooms that have a task, which is told when there are more gaps.
    rooms: Mutex<HashMap<OwnedRoomId, Arc<Notify>>>,
    /// The servers that are asked, and for which room.
    filling: Mutex<HashMap<OwnedServerName, OwnedRoomId>>,
    permits: Semaphore,
}

impl Default for Gaps {
    fn default() -> Self {
        Self { rooms: Mutex::default(), filling: Mutex::default(), permits: Semaphore::new(AT_ONCE) }
    }
}

impl Gaps {
    /// Whether a server's gap is being filled in the background.
    pub fn is_filling(&self, room_id: &RoomId, server: &ServerName) -> bool {
        lock(&self.filling).get(server).is_some_and(|room| room == room_id)
    }

    /// Takes a server for a room; none while it is asked for another.
    fn take<'a>(&'a self, room_id: &RoomId, server: &ServerName) -> Option<Taken<'a>> {
        let mut filling = lock(&self.filling);
        if filling.contains_key(server) {
            return None;
        }
        filling.insert(server.to_owned(), room_id.to_owned());
        Some(Taken { gaps: self, server: server.to_owned() })
    }
}

struct Taken<'a> {
    gaps: &'a Gaps,
    server: OwnedServerName,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        lock(&self.gaps.filling).remove(&self.server);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Dag {
    /// Goes on with the gaps that were there when the gateway was stopped, and with what joins have left. Before anybody joins.
    pub async fn resume(&self) -> Result<(), Refusal> {
        self.shared.owed.resume().await?;
        self.leave_soon();
        for room_id in stored::rooms(&self.shared.context.store).await? {
            self.shared.attend(&room_id, true);
        }
        Ok(())
    }
}

/// What becomes of a gap that was tried.
enum Verdict {
    Filled,
    Later(String),
}

impl Shared {
    /// Writes down events that wait for what is before them, to go on with them in the background; gives those that are kept.
    pub(super) async fn keep_waiting(
        self: &Arc<Self>,
        room: &Arc<Room>,
        origin: &ServerName,
        events: &[Verified],
        at_once: bool,
    ) -> Result<HashSet<OwnedEventId>, Refusal> {
        let now = self.context.clock.now_ms();
        let retry_at = if at_once { now } else { again(now, 0) };
        let gap = |event: &Verified| Gap {
            event_id: event.pdu().event_id.clone(),
            server: origin.to_owned(),
            json: Some(event.pdu().raw.get().as_bytes().to_vec()),
            missing: i64::try_from(event.pdu().prev_events.len()).unwrap_or_default(),
            noticed_ts: now,
            tries: 0,
            retry_at,
            last_error: String::new(),
        };
        let rows: Vec<_> = events.iter().map(|event| (gap(event), event.pdu().prev_events.clone())).collect();
        let (store, room_id) = (self.context.store.clone(), room.room_id.clone());
        let write = self.context.store.write(move |tx| {
            Box::pin(async move {
                let mut kept = HashSet::new();
                for (gap, follows) in rows {
                    if stored::keep(&store, tx, &room_id, &gap, &follows, BOUNDS).await? {
                        kept.insert(gap.event_id);
                    }
                }
                Ok(kept)
            })
        });
        let kept = write.await?;
        tracing::info!(room = %room.room_id, server = %origin, events = events.len(), kept = kept.len(), at_once,
            "events wait for what is before them");
        if !kept.is_empty() {
            self.attend(&room.room_id, false);
        }
        Ok(kept)
    }

    /// Writes down, together with an event that is taken with another server's word of the state before it, that so many of those that
    /// it follows are missing.
    pub(super) fn notes_closed(&self, room_id: &RoomId, origin: &ServerName, missing: usize) -> EventEffect {
        tracing::warn!(room = %room_id, server = %origin, missing, "a gap is closed with the state, and events are missing");
        let (store, room_id, server) = (self.context.store.clone(), room_id.to_owned(), origin.to_owned());
        let now = self.context.clock.now_ms();
        EventEffect::new(move |tx, event_id| {
            Box::pin(async move {
                let gap = Gap {
                    event_id,
                    server,
                    json: None,
                    missing: i64::try_from(missing).unwrap_or(i64::MAX),
                    noticed_ts: now,
                    tries: 0,
                    retry_at: again(now, 0),
                    last_error: "the server gave the state alone".to_owned(),
                };
                stored::note_closed(&store, tx, &room_id, &gap, BOUNDS).await
            })
        })
    }

    /// Sees to it that somebody looks after a room's gaps; after all of them when `all`.
    pub(super) fn attend(self: &Arc<Self>, room_id: &RoomId, all: bool) {
        let changed = Arc::new(Notify::new());
        {
            let mut rooms = lock(&self.gaps.rooms);
            if let Some(changed) = rooms.get(room_id) {
                changed.notify_one();
                return;
            }
            rooms.insert(room_id.to_owned(), changed.clone());
        }
        let (shared, room_id) = (self.clone(), room_id.to_owned());
        tokio::spawn(async move {
            while AssertUnwindSafe(shared.look_after(&room_id, &changed, all)).catch_unwind().await.is_err() {
                tracing::error!(room = %room_id, "filling a gap panicked");
                tokio::time::sleep(LONGEST_SLEEP).await;
            }
        });
    }

    async fn look_after(self: &Arc<Self>, room_id: &RoomId, changed: &Notify, mut all: bool) {
        let store = &self.context.store;
        loop {
            let sleep = match stored::next_try(store, room_id).await {
                Ok(Some(_)) if all => Duration::ZERO,
                Ok(Some(next)) => {
                    let left = next.saturating_sub(self.context.clock.now_ms());
                    Duration::from_millis(u64::try_from(left).unwrap_or_default())
                }
                Ok(None) => {
                    lock(&self.gaps.rooms).remove(room_id);
                    // Whoever noted more before this saw a task at work.
                    if let Ok(Some(_)) = stored::next_try(store, room_id).await {
                        self.attend(room_id, false);
                    }
                    return;
                }
                Err(_) if store.reader().is_closed() => return,
                Err(error) => {
                    tracing::warn!(room = %room_id, %error, "gaps could not be read");
                    LONGEST_SLEEP
                }
            };
            if !sleep.is_zero() {
                tokio::select! {
                    () = tokio::time::sleep(sleep.min(LONGEST_SLEEP)) => {}
                    () = changed.notified() => {}
                }
            }
            let until = if all { i64::MAX } else { self.context.clock.now_ms() };
            match self.try_gaps(room_id, until).await {
                Ok(()) => all = false,
                Err(_) if store.reader().is_closed() => return,
                Err(refusal) => {
                    tracing::info!(room = %room_id, %refusal, "gaps are still open");
                    tokio::time::sleep(LONGEST_SLEEP).await;
                }
            }
        }
    }

    /// Tries what is due.
    async fn try_gaps(self: &Arc<Self>, room_id: &RoomId, until: i64) -> Result<(), Refusal> {
        let rows = stored::due(&self.context.store, room_id, until).await?;
        if rows.is_empty() {
            return Ok(());
        }
        let own = &self.context.server_name;
        let Some(room) = self.find(room_id).await?.filter(|room| room.core().has_server(own)) else {
            let room_id = room_id.to_owned();
            let forget =
                self.context.store.write(move |tx| Box::pin(async move { stored::forget(tx, &room_id).await }));
            return Ok(forget.await?);
        };
        let mut by_server: BTreeMap<OwnedServerName, (Vec<Gap>, Vec<Gap>)> = BTreeMap::new();
        for row in rows {
            let (waiting, closed) = by_server.entry(row.server.clone()).or_default();
            if row.json.is_some() { waiting.push(row) } else { closed.push(row) }
        }
        for (server, (waiting, closed)) in by_server {
            let Some(_taken) = self.gaps.take(room_id, &server) else {
                tokio::time::sleep(TURN).await;
                continue;
            };
            let _permit = self.gaps.permits.acquire().await.map_err(|_| Refusal::Internal("stopped".to_owned()))?;
            let verdicts = self.fill_long(&room, &server, &waiting).await?;
            self.settle(&room, waiting, verdicts).await?;
            let mut verdicts = HashMap::new();
            for gap in &closed {
                verdicts.insert(gap.event_id.clone(), self.fill_closed(&room, gap).await?);
            }
            self.settle(&room, closed, verdicts).await?;
        }
        Ok(())
    }

    /// Fills the gaps before waiting events.
    async fn fill_long(
        self: &Arc<Self>,
        room: &Arc<Room>,
        server: &ServerName,
        gaps: &[Gap],
    ) -> Result<HashMap<OwnedEventId, Verdict>, Refusal> {
        let ids: Vec<_> = gaps.iter().map(|gap| gap.event_id.clone()).collect();
        let known = self.events.get_many(&ids).await?;
        let (mut verdicts, mut events) = (HashMap::new(), Vec::new());
        for gap in gaps {
            let is_known = known.get(&gap.event_id).is_some_and(|event| event.groups.is_some());
            let json = parse_object(gap.json.as_deref().unwrap_or_default()).ok();
            match json.and_then(|json| Unverified::from_object(json, room.version).ok()).filter(|_| !is_known) {
                Some(event) => {
                    let later = Verdict::Later("its signatures cannot be checked".to_owned());
                    verdicts.insert(gap.event_id.clone(), later);
                    events.push(event);
                }
                None => drop(verdicts.insert(gap.event_id.clone(), Verdict::Filled)),
            }
        }
        let events = self.verify_given(&room.room_id, events).await?;
        if events.is_empty() {
            return Ok(verdicts);
        }
        let ids: Vec<_> = events.iter().map(|event| event.pdu().event_id.clone()).collect();
        let mut filling = Filling::new(self, room, server, LONG);
        filling.wait_for(events, &HashMap::new());
        let filled = filling.fill().await;
        let (outcomes, problem) = (std::mem::take(&mut filling.outcomes), std::mem::take(&mut filling.problem));
        filled?;
        for id in ids {
            let verdict = match outcomes.get(&id) {
                Some(outcome) if !is_missing(outcome) => Verdict::Filled,
                _ => Verdict::Later(problem.clone()),
            };
            verdicts.insert(id, verdict);
        }
        tracing::info!(room = %room.room_id, %server, events = outcomes.len(), "a long gap was gone on with");
        Ok(verdicts)
    }

    /// Asks again for what is before an event that was taken without.
    async fn fill_closed(self: &Arc<Self>, room: &Arc<Room>, gap: &Gap) -> Result<Verdict, Refusal> {
        let Some(event) = self.events.get(&gap.event_id).await? else { return Ok(Verdict::Filled) };
        let prev = &event.pdu.prev_events;
        let missing = self.without_state(prev).await?;
        if missing.is_empty() {
            return Ok(Verdict::Filled);
        }
        let mut filling = Filling::new(self, room, &gap.server, LONG);
        let named = missing.into_iter().map(|id| (id, gap.event_id.clone())).collect();
        // A part that still does not reach back to what is known is worth nothing: the state is there already.
        if filling.walk(named).await? == Walked::Whole || !filling.waiting.is_empty() {
            filling.take_connected().await?;
        }
        let left = self.without_state(prev).await?.into_iter().filter(|id| !filling.before.contains(id)).count();
        Ok(if left == 0 { Verdict::Filled } else { Verdict::Later(std::mem::take(&mut filling.problem)) })
    }

    /// Those of the events that are not here with their state.
    async fn without_state(&self, ids: &[OwnedEventId]) -> Result<Vec<OwnedEventId>, StoreError> {
        let known = self.events.get_many(ids).await?;
        Ok(ids.iter().filter(|id| known.get(*id).is_none_or(|event| event.groups.is_none())).cloned().collect())
    }

    async fn settle(
        &self,
        room: &Room,
        gaps: Vec<Gap>,
        mut verdicts: HashMap<OwnedEventId, Verdict>,
    ) -> Result<(), StoreError> {
        if gaps.is_empty() {
            return Ok(());
        }
        let (now, room_id) = (self.context.clock.now_ms(), room.room_id.clone());
        let write = self.context.store.write(move |tx| {
            Box::pin(async move {
                for gap in gaps {
                    let tries = gap.tries.saturating_add(1);
                    match verdicts.remove(&gap.event_id) {
                        Some(Verdict::Later(problem)) if tries < MAX_TRIES => {
                            stored::put_off(tx, &room_id, &gap.event_id, again(now, tries), &problem).await?;
                        }
                        Some(Verdict::Later(problem)) => {
                            tracing::warn!(room = %room_id, server = %gap.server, event = %gap.event_id, problem,
                                tries, "what is before an event is missing, and not asked for any more");
                            stored::remove(tx, &room_id, &gap.event_id, gap.json.is_some()).await?;
                        }
                        Some(Verdict::Filled) => {
                            stored::remove(tx, &room_id, &gap.event_id, gap.json.is_some()).await?;
                        }
                        None => {}
                    }
                }
                Ok(())
            })
        });
        write.await
    }
}

/// When what was tried so often is tried again.
fn again(now: i64, tries: i64) -> i64 {
    let tries = usize::try_from(tries).unwrap_or_default();
    now.saturating_add(AGAIN_MS.get(tries).or(AGAIN_MS.last()).copied().unwrap_or_default())
}
