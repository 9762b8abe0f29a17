//! The rooms in memory. A room has at most one cell, in which its one appender and all readers meet; what is in a cell is
//! rebuilt from the store at any time.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use bytes::Bytes;
use ruma::{EventId, OwnedEventId, OwnedRoomId, OwnedServerName, RoomId, ServerName};
use tokio::sync::{Notify, OnceCell, mpsc, oneshot};

use super::Appended;
use super::actor::Job;
use super::ahead::Ahead;
use super::holes::Missing;
use super::kept::Copied;
use super::redactions::as_read;
use super::remarks::Skipped;
use super::room::{Facts, Snapshot};
use super::weight::Weight;
use crate::admin::metrics::CacheMeter;
use crate::event::{Object, Pdu, Redaction};
use crate::refusal::Refusal;
use crate::store::lm::{self as stored, EventRow, Stay};
use crate::store::{Store, StoreError};

/// How many of a busy room's last events are kept as text for the queues of its servers, and how many bytes of them: what
/// a server that keeps up does not have yet.
const RECENT: usize = 4096;
const RECENT_BYTES: usize = 4 << 20;
/// How many bytes of all rooms together; whoever is over it keeps nothing.
const RECENT_ALL: usize = 128 << 20;
/// How many bytes are kept when a room falls silent.
const RECENT_IDLE: usize = 16 << 10;

/// How many LPDUs that are queued for a hub are read at once.
const QUEUED: i64 = 500;

/// One room.
pub(super) struct RoomCell {
    pub room_id: OwnedRoomId,
    /// None until it is loaded, and after a write whose fate is unknown.
    snapshot: RwLock<Option<Arc<Snapshot>>>,
    /// Told with each change.
    pub changes: Notify,
    load: tokio::sync::Mutex<()>,
    /// Whether it was ever loaded from the store.
    is_loaded: AtomicBool,
    /// Another number each time it was.
    reading: AtomicU64,
    /// The last of them that was told to whom it concerns.
    told: AtomicU64,
    /// To the room's actor, when one is at work (see [`super::actor`]).
    pub jobs: Mutex<Option<mpsc::Sender<Job>>>,
    /// Held by whoever appends what a hub sent, so that its events are taken in order.
    pub intake: tokio::sync::Mutex<()>,
    recent: Mutex<Recent>,
    redactions: AtomicUsize,
    waiters: Mutex<HashMap<OwnedEventId, Vec<Echo>>>,
    stays: Mutex<Stays>,
    /// As participant: what our users sent and what has not come back.
    pub ahead: Mutex<Ahead>,
    /// As participant: whether something of the hub's log is missing.
    pub missing: Mutex<Missing>,
    /// As participant: what the hub had, and had not given, when it gave what follows it.
    pub skipped: Mutex<Skipped>,
    /// How often LPDUs may have come to wait for a hub that does not keep the log any more, and up to which time all were replaced.
    stranded: AtomicUsize,
    replaced: AtomicUsize,
    /// Held while those are replaced.
    pub replacing: tokio::sync::Mutex<()>,
    /// When it was last asked for whether another server keeps the log.
    pub sought: Mutex<Option<tokio::time::Instant>>,
    /// As hub of a log that another server kept before: what of the copy of then is the log.
    pub copied: tokio::sync::Mutex<Option<Arc<Copied>>>,
}

/// The end of the log, as text.
#[derive(Default)]
struct Recent {
    events: VecDeque<(i64, Bytes)>,
    bytes: usize,
}

impl Recent {
    fn push(&mut self, position: i64, event: Bytes) {
        // Kept without holes, so that a reader finds everything after a position or nothing.
        if self.events.back().is_some_and(|(last, _)| last.checked_add(1) != Some(position)) {
            self.shrink(0);
        }
        self.bytes = self.bytes.saturating_add(event.len());
        let all = RECENT_NOW.fetch_add(event.len(), Ordering::Relaxed).saturating_add(event.len());
        self.events.push_back((position, event));
        self.shrink(if all > RECENT_ALL { 0 } else { RECENT_BYTES });
    }

    fn shrink(&mut self, bytes: usize) {
        while self.events.len() > RECENT || self.bytes > bytes {
            let Some((_, event)) = self.events.pop_front() else { return };
            self.bytes = self.bytes.saturating_sub(event.len());
            RECENT_NOW.fetch_sub(event.len(), Ordering::Relaxed);
        }
    }
}

impl Drop for Recent {
    fn drop(&mut self) {
        self.shrink(0);
    }
}

/// The next number of a reading.
static READINGS: AtomicU64 = AtomicU64::new(1);

/// How many bytes all rooms keep.
static RECENT_NOW: AtomicUsize = AtomicUsize::new(0);

/// When servers were in the room, as far as somebody has asked.
#[derive(Default)]
struct Stays {
    /// Grows with every change, so that what was read before it is not kept after it.
    changes: u64,
    known: HashMap<OwnedServerName, Arc<[Stay]>>,
}

/// Where the fate of an LPDU is told.
pub(super) type Echo = oneshot::Sender<Result<Appended, Refusal>>;

impl RoomCell {
    fn new(room_id: OwnedRoomId) -> Self {
        Self {
            room_id,
            snapshot: RwLock::default(),
            changes: Notify::new(),
            load: tokio::sync::Mutex::default(),
            is_loaded: AtomicBool::default(),
            reading: AtomicU64::default(),
            told: AtomicU64::default(),
            jobs: Mutex::default(),
            intake: tokio::sync::Mutex::default(),
            recent: Mutex::default(),
            redactions: AtomicUsize::default(),
            waiters: Mutex::default(),
            stays: Mutex::default(),
            ahead: Mutex::default(),
            missing: Mutex::default(),
            skipped: Mutex::default(),
            stranded: AtomicUsize::default(),
            replaced: AtomicUsize::default(),
            replacing: tokio::sync::Mutex::default(),
            sought: Mutex::default(),
            copied: tokio::sync::Mutex::default(),
        }
    }

    /// LPDUs may wait for a hub that does not keep the log any more.
    pub fn strand(&self) {
        self.stranded.fetch_add(1, Ordering::SeqCst);
    }

    /// How often that has happened.
    pub fn stranded(&self) -> usize {
        self.stranded.load(Ordering::SeqCst)
    }

    /// Whether some may still wait. Until all are replaced nothing of ours goes before them.
    pub fn has_stranded(&self) -> bool {
        self.stranded() != self.replaced.load(Ordering::SeqCst)
    }

    /// All that waited when it had happened so often are replaced.
    pub fn replaced(&self, stranded: usize) {
        self.replaced.store(stranded, Ordering::SeqCst);
    }

    /// Those who wait for an LPDU wait for what replaces it.
    pub fn wait_for_another(&self, lpdu_id: &EventId, other: &EventId) {
        let mut waiters = lock(&self.waiters);
        if let Some(waiting) = waiters.remove(lpdu_id) {
            waiters.entry(other.to_owned()).or_default().extend(waiting);
        }
    }

    /// The room as it is now.
    pub async fn snapshot(&self, store: &Store) -> Result<Arc<Snapshot>, StoreError> {
        if let Some(snapshot) = self.in_memory() {
            return Ok(snapshot);
        }
        let _one_at_a_time = self.load.lock().await;
        if let Some(snapshot) = self.in_memory() {
            return Ok(snapshot);
        }
        let snapshot = Arc::new(load(store, &self.room_id).await?);
        if !self.is_loaded.load(Ordering::Acquire) {
            self.restore_ahead(store, &snapshot.facts.hub).await?;
            self.is_loaded.store(true, Ordering::Release);
        }
        self.reading.store(READINGS.fetch_add(1, Ordering::Relaxed), Ordering::Release);
        self.publish(snapshot.clone());
        Ok(snapshot)
    }

    /// Another number each time that the room was loaded from the store; 0 before that.
    pub fn reading(&self) -> u64 {
        self.reading.load(Ordering::Acquire)
    }

    /// Whether it was loaded since this was asked last.
    pub fn was_read(&self) -> bool {
        let reading = self.reading();
        self.told.swap(reading, Ordering::AcqRel) != reading
    }

    /// What was on its way to the hub when the gateway stopped, or when the room was dropped from memory.
    async fn restore_ahead(&self, store: &Store, hub: &ServerName) -> Result<(), StoreError> {
        let mut after = 0;
        loop {
            let rows = stored::lpdus_after(store, &self.room_id, after, QUEUED).await?;
            let Some(last) = rows.last() else { return Ok(()) };
            after = last.position;
            let ids: Vec<&EventId> = rows.iter().map(|row| &*row.lpdu_id).collect();
            let echoed = stored::positions_of_lpdus(store, &ids).await?;
            for row in rows.iter().filter(|row| !echoed.contains_key(&row.lpdu_id)) {
                let lpdu: Object =
                    serde_json::from_slice(&row.json).map_err(|error| StoreError::corrupt("LPDU", error))?;
                if lpdu.get("hub_server").and_then(serde_json::Value::as_str) != Some(hub.as_str()) {
                    self.strand();
                }
                lock(&self.ahead).restore(&row.lpdu_id, &lpdu);
            }
        }
    }

    /// The same, where it need not be read.
    pub fn in_memory(&self) -> Option<Arc<Snapshot>> {
        self.snapshot.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What was committed. Only the appender calls this.
    pub fn publish(&self, snapshot: Arc<Snapshot>) {
        *self.snapshot.write().unwrap_or_else(PoisonError::into_inner) = Some(snapshot);
        self.changes.notify_waiters();
    }

    /// The same where another server keeps the log from now on: whoever sees that sees too that what was on its way to the one
    /// before goes first, and whoever sees this looks for it by the room as it is now.
    pub fn publish_stranding(&self, snapshot: Arc<Snapshot>) {
        let mut current = self.snapshot.write().unwrap_or_else(PoisonError::into_inner);
        self.strand();
        *current = Some(snapshot);
    }

    /// Nobody knows whether a write was committed: the store is asked again.
    pub fn forget(&self) {
        *self.snapshot.write().unwrap_or_else(PoisonError::into_inner) = None;
        lock(&self.recent).shrink(0);
        self.forget_stays();
    }

    /// What is kept as text is not what is to be read any more.
    pub fn forget_recent(&self) {
        lock(&self.recent).shrink(0);
        self.redactions.fetch_add(1, Ordering::AcqRel);
    }

    /// Grows with each redaction, so that what was read before it is not kept after it.
    pub fn redactions(&self) -> usize {
        self.redactions.load(Ordering::Acquire)
    }

    /// Keeps events as text for those who read the log as it grows.
    pub fn keep_recent(&self, events: impl IntoIterator<Item = (i64, Bytes)>) {
        let mut recent = lock(&self.recent);
        for (position, event) in events {
            recent.push(position, event);
        }
    }

    /// Nothing has come for a while: what nobody is waiting for any more is let go.
    pub fn rest(&self) {
        let mut recent = lock(&self.recent);
        recent.shrink(RECENT_IDLE);
        recent.events.shrink_to_fit();
    }

    /// The events from `from` to `to`, at most `limit`, if all of them are in memory.
    pub fn recent(&self, from: i64, to: i64, limit: usize) -> Option<Vec<(i64, Bytes)>> {
        let recent = &lock(&self.recent).events;
        let (first, last) = (recent.front()?.0, recent.back()?.0);
        if from < first || from > last {
            return None;
        }
        let skip = usize::try_from(from.saturating_sub(first)).ok()?;
        Some(recent.iter().skip(skip).take_while(|(position, _)| *position <= to).take(limit).cloned().collect())
    }

    /// When a server was in the room.
    pub async fn stays(&self, store: &Store, server: &ServerName) -> Result<Arc<[Stay]>, StoreError> {
        let changes = {
            let stays = lock(&self.stays);
            if let Some(known) = stays.known.get(server) {
                return Ok(known.clone());
            }
            stays.changes
        };
        let read: Arc<[Stay]> = stored::stays(store, &self.room_id, server).await?.into();
        let mut stays = lock(&self.stays);
        if stays.changes == changes {
            stays.known.insert(server.to_owned(), read.clone());
        }
        Ok(read)
    }

    /// Servers came or went, or may have.
    pub fn forget_stays(&self) {
        let mut stays = lock(&self.stays);
        stays.changes = stays.changes.wrapping_add(1);
        stays.known.clear();
    }

    /// Waits for the echo of an LPDU, or for its refusal.
    pub fn wait_for(&self, lpdu_id: &EventId) -> oneshot::Receiver<Result<Appended, Refusal>> {
        let (echo, answer) = oneshot::channel();
        let mut waiters = lock(&self.waiters);
        waiters.retain(|_, echoes| echoes.iter().any(|echo| !echo.is_closed()));
        waiters.entry(lpdu_id.to_owned()).or_default().push(echo);
        answer
    }

    /// Tells those who wait for an LPDU.
    pub fn settle(&self, lpdu_id: &EventId, fate: &Result<Appended, Refusal>) {
        lock(&self.ahead).settle(lpdu_id);
        for echo in lock(&self.waiters).remove(lpdu_id).unwrap_or_default() {
            // Who waited may have given up.
            let _ = echo.send(fate.clone());
        }
    }
}

/// All rooms.
pub(super) struct Rooms {
    store: Store,
    /// The IDs of all rooms, so that events of other rooms cost no query.
    known: OnceCell<RwLock<HashSet<OwnedRoomId>>>,
    /// Every cell that is in use anywhere.
    live: Mutex<HashMap<OwnedRoomId, Weak<RoomCell>>>,
    /// Keeps the cells of rooms in use from being dropped between uses.
    kept: moka::future::Cache<OwnedRoomId, Arc<RoomCell>>,
    kept_meter: CacheMeter,
}

impl Rooms {
    /// The rooms in `store`, `capacity` of them kept in memory.
    pub fn new(store: Store, capacity: u64) -> Self {
        let kept = moka::future::Cache::new(capacity);
        let kept_meter = CacheMeter::watch("log_rooms", &kept);
        Self { store, known: OnceCell::new(), live: Mutex::default(), kept, kept_meter }
    }

    async fn known(&self) -> Result<&RwLock<HashSet<OwnedRoomId>>, StoreError> {
        let load = async {
            let ids = stored::room_ids(&self.store).await?;
            Ok(RwLock::new(ids.into_iter().collect()))
        };
        self.known.get_or_try_init(|| load).await
    }

    /// Whether there is such a room.
    pub async fn contains(&self, room_id: &RoomId) -> Result<bool, StoreError> {
        Ok(self.known().await?.read().unwrap_or_else(PoisonError::into_inner).contains(room_id))
    }

    /// A room was committed.
    pub async fn add(&self, snapshot: Snapshot) -> Result<Arc<RoomCell>, StoreError> {
        let room_id = snapshot.facts.room_id.clone();
        let cell = self.cell(&room_id).await;
        cell.publish(Arc::new(snapshot));
        self.known().await?.write().unwrap_or_else(PoisonError::into_inner).insert(room_id);
        Ok(cell)
    }

    /// A room's cell, if there is such a room.
    pub async fn find(&self, room_id: &RoomId) -> Result<Option<Arc<RoomCell>>, StoreError> {
        Ok(if self.contains(room_id).await? { Some(self.cell(room_id).await) } else { None })
    }

    /// Has every room read from the store again when it is asked for next.
    pub fn forget_all(&self) {
        lock(&self.live).values().filter_map(Weak::upgrade).for_each(|cell| cell.forget());
    }

    async fn cell(&self, room_id: &RoomId) -> Arc<RoomCell> {
        if let Some(cell) = self.kept_meter.count(self.kept.get(room_id).await) {
            return cell;
        }
        let cell = {
            let mut live = lock(&self.live);
            match live.get(room_id).and_then(Weak::upgrade) {
                Some(cell) => cell,
                None => {
                    if live.len() == live.capacity() {
                        live.retain(|_, cell| cell.strong_count() > 0);
                    }
                    let cell = Arc::new(RoomCell::new(room_id.to_owned()));
                    live.insert(room_id.to_owned(), Arc::downgrade(&cell));
                    cell
                }
            }
        };
        self.kept.insert(room_id.to_owned(), cell.clone()).await;
        cell
    }
}

async fn load(store: &Store, room_id: &RoomId) -> Result<Snapshot, StoreError> {
    let row = stored::room(store, room_id).await?.ok_or_else(|| StoreError::corrupt("room", "it is not there"))?;
    let state = stored::state_now(store, room_id).await?;
    let last = stored::range(store, room_id, row.head, row.head, 1).await?;
    let last = last.into_iter().next().ok_or_else(|| StoreError::corrupt("log", "the last event is missing"))?;
    let last = Arc::new(stored_pdu(last, row.redaction)?);
    let weight = state.iter().fold(Weight::default(), |weight, event| weight.with(event.json.len()));
    let state = as_read(store, room_id, row.redaction, state).await?;
    let state = state.into_iter().map(|event| Ok(Arc::new(stored_pdu(event, row.redaction)?)));
    let state = state.collect::<Result<Vec<_>, StoreError>>()?;
    let facts = Facts { room_id: row.room_id, version: row.version, hub: row.hub, shared: row.shared };
    let mut snapshot = Snapshot::restore(facts, row.redaction, row.head, last, state);
    snapshot.weight = weight;
    Ok(snapshot)
}

/// An event as it was stored. Its ID is the one under which it was stored.
pub(super) fn stored_pdu(row: EventRow, redaction: Redaction) -> Result<Pdu, StoreError> {
    let json = serde_json::from_slice(&row.json).map_err(|error| StoreError::corrupt("event", error))?;
    let mut pdu = Pdu::parse(json, redaction).map_err(|error| StoreError::corrupt("event", error))?;
    pdu.event_id = row.event_id;
    Ok(pdu)
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use ruma::room_id;

    use super::*;

    #[test]
    fn the_end_of_a_log_is_kept_without_holes_and_within_bounds() {
        let cell = RoomCell::new(room_id!("!a:g.example").to_owned());
        let event = |size: usize| Bytes::from(vec![b'x'; size]);
        let positions = |from, to, limit| {
            let found = cell.recent(from, to, limit)?;
            Some(found.into_iter().map(|(position, _)| position).collect::<Vec<_>>())
        };
        cell.keep_recent((5..9).map(|position| (position, event(10))));
        assert_eq!(positions(6, 8, 2), Some(vec![6, 7]));
        assert_eq!(positions(4, 8, 9), None, "the store has to be asked for what came before");
        cell.keep_recent([(10, event(10))]);
        assert_eq!(positions(8, 10, 9), None, "the one at 9 is not there");
        assert_eq!(positions(10, 10, 9), Some(vec![10]));
        // 64 KiB each: 64 of them are 4 MiB.
        cell.keep_recent((11..111).map(|position| (position, event(64 << 10))));
        assert_eq!(positions(46, 110, 100), None);
        assert_eq!(positions(47, 110, 100), Some((47..111).collect()));
        cell.rest();
        assert_eq!(positions(110, 110, 100), None);
    }
}
