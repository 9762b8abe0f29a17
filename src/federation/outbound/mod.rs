//! Outbound queues, one a destination: persisted as positions in feeds, not as copies of events. A feed is a list of events
//! with growing positions (an LM room's log, a graph room's outbox, the LPDUs for a hub); a destination has, for each feed
//! that it gets, the position up to which it has it. So a queue costs nothing per event, survives every crash, and is
//! caught up from the room itself. One transaction in flight a destination, the same ID and the same events on retry. EDUs go
//! with the next transaction, or alone (`edus`); those that must not be lost are a feed (`kept`).

mod compose;
mod edus;
mod kept;
mod slot;
mod verdict;
mod way;
mod wire;
mod worker;

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::FutureExt as _;
use ruma::{OwnedRoomId, OwnedServerName, ServerName};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::kept::KeptEdus;
use self::slot::{News, Slot};
use self::wire::{Network, Sender, Transport};
use self::worker::Worker;
use super::Client;
use crate::clock::SharedClock;
use crate::event::{Edu, Object};
use crate::identity::{Keyring, Side};
use crate::refusal::Refusal;
use crate::store::outbound::{self as rows, CursorKey};
use crate::store::{Store, StoreError, Tx};

/// Which list of events a feed is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FeedKind {
    /// The log of an LM room that this gateway hubs: positions are log positions. Sent with the LM `send`.
    Log,
    /// LPDUs of this gateway's users for the hub of a room. Sent with the LM `send`.
    Lpdus,
    /// Events of a graph room that this gateway must send. Sent with the Matrix `send`.
    Graph,
    /// EDUs that must not be lost, for LM servers. Sent with the LM `send`.
    LmEdus,
    /// The same for Matrix servers.
    MatrixEdus,
}

impl FeedKind {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Log => "log",
            Self::Lpdus => "lpdus",
            Self::Graph => "graph",
            Self::LmEdus => "lm_edus",
            Self::MatrixEdus => "matrix_edus",
        }
    }

    fn parse(text: &str) -> Result<Self, StoreError> {
        let all = [Self::Log, Self::Lpdus, Self::Graph, Self::LmEdus, Self::MatrixEdus];
        let known = all.into_iter().find(|kind| kind.as_str() == text);
        known.ok_or_else(|| StoreError::corrupt("feed kind", text))
    }

    /// By which protocol's `send` it goes.
    fn protocol(self) -> Side {
        match self {
            Self::Log | Self::Lpdus | Self::LmEdus => Side::Lm,
            Self::Graph | Self::MatrixEdus => Side::Matrix,
        }
    }

    fn of_edus(side: Side) -> Self {
        match side {
            Side::Lm => Self::LmEdus,
            Side::Matrix => Self::MatrixEdus,
        }
    }

    /// Whether what is in it goes among the EDUs of a transaction.
    fn is_edus(self) -> bool {
        matches!(self, Self::LmEdus | Self::MatrixEdus)
    }
}

/// One feed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Feed {
    /// What kind.
    pub kind: FeedKind,
    /// Of which room.
    pub room_id: OwnedRoomId,
}

impl Feed {
    fn parse(kind: &str, room_id: String) -> Result<Self, StoreError> {
        let room_id = room_id.try_into().map_err(|error| StoreError::corrupt("room ID of a feed", error))?;
        Ok(Self { kind: FeedKind::parse(kind)?, room_id })
    }

    fn key(&self, destination: &ServerName) -> CursorKey {
        CursorKey {
            destination: destination.to_string(),
            kind: self.kind.as_str().to_owned(),
            room_id: self.room_id.to_string(),
        }
    }
}

/// An event at its position in a feed, as it goes over the wire.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// The position.
    pub position: i64,
    /// The event in canonical form; none when this destination does not get what is at this position.
    pub event: Option<Bytes>,
}

impl Delivery {
    /// Says that nothing up to `until` is left after these, when it is known that there is nothing.
    pub fn pass_on(deliveries: &mut Vec<Self>, until: Option<i64>) {
        if let Some(until) = until
            && deliveries.last().is_none_or(|last| last.position < until)
        {
            deliveries.push(Self { position: until, event: None });
        }
    }
}

/// Where the queues read the events of feeds. Implemented by `lm` and `dag`, each for its own kinds.
#[async_trait]
pub trait FeedSource: Send + Sync + 'static {
    /// The events of `feed` for `destination` after position `after`, in order, at most `limit`, none past `until`. Fewer
    /// than there are may be given. Only a [`Delivery`], with an event or without one, brings the destination further:
    /// what a source does not show yet, because it was committed this moment, is not passed over. When it shows none, it
    /// is asked again after the next [`OutboundQueues::wake`].
    async fn read(
        &self,
        feed: &Feed,
        destination: &ServerName,
        after: i64,
        until: Option<i64>,
        limit: usize,
    ) -> Result<Vec<Delivery>, StoreError>;

    /// Whether nothing more of a feed may be sent to a destination for now. What is on its way already is not held up, and when that is
    /// over the queue is to be woken.
    async fn holds_back(&self, feed: &Feed, destination: &ServerName) -> Result<bool, StoreError> {
        let _ = (feed, destination);
        Ok(false)
    }

    /// Before a transaction whose fate is unknown is sent again: which of its positions are known to have arrived. For
    /// servers that are known to be idempotent, or feeds where that does no harm: none. So it is unless a source says otherwise:
    /// what is known by its ID is taken once, however often it comes.
    async fn already_delivered(
        &self,
        feed: &Feed,
        destination: &ServerName,
        positions: &[i64],
    ) -> Result<Vec<i64>, Refusal> {
        let _ = (feed, destination, positions);
        Ok(Vec::new())
    }

    /// The destination, which had failed, took a transaction. Cheap; from memory.
    fn is_back(&self, destination: &ServerName) {
        let _ = destination;
    }

    /// The destination answered 200 to a transaction with these positions, or refused the only event in it: the answer
    /// is then its error, with `errcode` and `error`. Positions that [`Self::already_delivered`] named are told too, with an
    /// empty answer. After a crash in between this may be told twice. What fails here is to be told again: until then the
    /// transaction counts as one of unknown fate.
    async fn answered(
        &self,
        feed: &Feed,
        destination: &ServerName,
        positions: &[i64],
        answer: &Object,
    ) -> Result<(), Refusal>;
}

/// The state of one destination's queue, for operators.
#[derive(Debug, Clone)]
pub struct QueueStatus {
    /// The destination.
    pub destination: OwnedServerName,
    /// How many events wait.
    pub waiting: i64,
    /// Failures in a row.
    pub failures: i64,
    /// When it is tried again, ms; 0 when now.
    pub retry_at: i64,
    /// Since when it has taken nothing, ms; 0 when it does, or when that is not known.
    pub since: i64,
    /// Whether the last failure was an answer: it is there, and does not take what it gets.
    pub answers: bool,
    /// The last failure.
    pub last_error: Option<String>,
    /// Of the rooms of which something waits alone, while others go on: what it waits for.
    pub held: Vec<HeldFeed>,
}

impl QueueStatus {
    /// Of a destination for which nothing waits, and that does not fail.
    pub fn of(destination: OwnedServerName) -> Self {
        Self {
            destination,
            waiting: 0,
            failures: 0,
            retry_at: 0,
            since: 0,
            answers: false,
            last_error: None,
            held: Vec::new(),
        }
    }
}

/// A feed that waits because its destination fails on an event of it, and on nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldFeed {
    /// The feed.
    pub feed: Feed,
    /// How often that event was tried.
    pub tries: u32,
    /// Since when nothing of the feed was taken, ms.
    pub since: i64,
    /// When it is tried again, ms.
    pub retry_at: i64,
    /// How it failed last.
    pub error: String,
}

/// All queues; clones share them. With the last clone they end where they stand, as a crash would end them.
#[derive(Clone)]
pub struct OutboundQueues {
    handle: Arc<Handle>,
}

struct Handle {
    shared: Arc<Shared>,
    /// Takes up no new work.
    stop: CancellationToken,
    /// Drops everything at once.
    kill: CancellationToken,
    workers: TaskTracker,
    started: AtomicBool,
}

/// What the workers share.
struct Shared {
    store: Store,
    clock: SharedClock,
    wire: Arc<dyn Transport>,
    sender: Sender,
    sources: RwLock<HashMap<FeedKind, Arc<dyn FeedSource>>>,
    /// The destinations that have work, or had some until a moment ago.
    slots: Mutex<HashMap<OwnedServerName, Arc<Slot>>>,
    /// How many destinations are spoken to at once: those that answer, and, so that these never wait for the others,
    /// those that fail.
    healthy: Semaphore,
    failing: Semaphore,
}

const HEALTHY_AT_ONCE: usize = 512;
const FAILING_AT_ONCE: usize = 64;
/// How long a stop waits for transactions that are on their way.
const STOP_GRACE: Duration = Duration::from_secs(5);
/// After a bug in a worker it is left alone for so long.
const AFTER_PANIC: Duration = Duration::from_secs(10);

impl OutboundQueues {
    /// The queues of `server_name` over `store`; nothing is sent before [`OutboundQueues::start`].
    pub fn new(
        store: Store,
        clock: SharedClock,
        server_name: OwnedServerName,
        client: Client,
        keyring: Keyring,
    ) -> Self {
        Self::over(store, clock, server_name, Arc::new(Network { client, keyring }))
    }

    fn over(store: Store, clock: SharedClock, server_name: OwnedServerName, wire: Arc<dyn Transport>) -> Self {
        let kept: Arc<dyn FeedSource> = Arc::new(KeptEdus(store.clone()));
        let sources = [FeedKind::LmEdus, FeedKind::MatrixEdus].map(|kind| (kind, kept.clone()));
        let shared = Shared {
            store,
            clock,
            wire,
            sender: Sender::new(server_name),
            sources: RwLock::new(sources.into()),
            slots: Mutex::default(),
            healthy: Semaphore::new(HEALTHY_AT_ONCE),
            failing: Semaphore::new(FAILING_AT_ONCE),
        };
        let handle = Handle {
            shared: Arc::new(shared),
            stop: CancellationToken::new(),
            kill: CancellationToken::new(),
            workers: TaskTracker::new(),
            started: AtomicBool::new(false),
        };
        Self { handle: Arc::new(handle) }
    }

    /// Registers where the events of feeds of some kinds are read, before the start.
    pub fn register(&self, kinds: &[FeedKind], source: Arc<dyn FeedSource>) {
        let mut sources = self.handle.shared.sources.write().unwrap_or_else(PoisonError::into_inner);
        sources.extend(kinds.iter().map(|kind| (*kind, source.clone())));
    }

    /// Takes up what was left unfinished, and sends from now on.
    pub async fn start(&self) -> Result<(), StoreError> {
        let store = &self.handle.shared.store;
        let unfinished = rows::unfinished(store).await?;
        let inflight = rows::inflight_destinations(store).await?;
        if !unfinished.is_empty() {
            tracing::info!(feeds = unfinished.len(), "taking up unfinished outbound queues");
        }
        let mut slots = lock(&self.handle.shared.slots);
        for key in unfinished {
            let destination = parse_destination(key.destination)?;
            slots.entry(destination).or_default().add(Feed::parse(&key.kind, key.room_id)?, News::Ask);
        }
        for destination in inflight {
            slots.entry(parse_destination(destination)?).or_default();
        }
        if !self.handle.started.swap(true, Ordering::SeqCst) {
            for (destination, slot) in &*slots {
                self.handle.spawn(destination.clone(), slot.clone());
            }
        }
        Ok(())
    }

    /// Sends nothing new, waits a moment for what is on its way, and ends. What did not get through is sent by the next
    /// start.
    pub async fn stop(&self) {
        self.handle.stop.cancel();
        self.handle.workers.close();
        if tokio::time::timeout(STOP_GRACE, self.handle.workers.wait()).await.is_err() {
            self.handle.kill.cancel();
            self.handle.workers.wait().await;
        }
        // The sources hold what holds these queues.
        self.handle.shared.sources.write().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Inside a write job: `destination` gets `feed` from the event after position `after` on. When it already gets the
    /// feed, nothing changes but an end that was set: that is taken back, and it is for [`FeedSource::read`] to leave out
    /// what is not for the destination.
    pub async fn subscribe(tx: &mut Tx, destination: &ServerName, feed: &Feed, after: i64) -> Result<(), StoreError> {
        rows::subscribe(tx, &feed.key(destination), after).await
    }

    /// Inside a write job: the last position of `feed` that `destination` gets is `until`.
    pub async fn end(tx: &mut Tx, destination: &ServerName, feed: &Feed, until: i64) -> Result<(), StoreError> {
        rows::end(tx, &feed.key(destination), until).await
    }

    /// Inside a write job: `destination` gets nothing more of `feed` than is in it now.
    pub async fn end_at_head(tx: &mut Tx, destination: &ServerName, feed: &Feed) -> Result<(), StoreError> {
        let head = rows::head(tx, feed.kind.as_str(), feed.room_id.as_str()).await?;
        Self::end(tx, destination, feed, head).await
    }

    /// Inside a write job: the feed's last position is now `head`.
    pub async fn advance(tx: &mut Tx, feed: &Feed, head: i64) -> Result<(), StoreError> {
        rows::advance(tx, feed.kind.as_str(), feed.room_id.as_str(), head).await
    }

    /// After a commit: the feed has news for these destinations. Cheap; from memory.
    pub fn wake(&self, feed: &Feed, destinations: &[OwnedServerName]) {
        self.tell(feed, destinations, News::Ask);
    }

    /// The same, when nothing but the feed's head has changed, which is now at `head`: nobody was subscribed, and no end
    /// was set or taken back. The store need not be asked then.
    pub fn wake_at(&self, feed: &Feed, destinations: &[OwnedServerName], head: i64) {
        self.tell(feed, destinations, News::Head(head));
    }

    /// Sends an EDU that is worth nothing later, of a user of this gateway, by one protocol's `send`: with the next transaction,
    /// or alone. In memory only; what is newer of the same replaces it, and destinations that are left alone do not get it.
    /// Whoever calls this names only servers that may see it.
    pub fn send_edu(&self, side: Side, destinations: impl IntoIterator<Item = OwnedServerName>, edu: &Edu) {
        for destination in destinations {
            self.with_slot(&destination, |slot| slot.add_edu(side, edu));
        }
    }

    fn tell(&self, feed: &Feed, destinations: &[OwnedServerName], news: News) {
        for destination in destinations {
            self.with_slot(destination, |slot| slot.add(feed.clone(), news));
        }
    }

    /// Does something with what is in memory of a destination, and sees to it that its worker runs.
    fn with_slot(&self, destination: &OwnedServerName, work: impl FnOnce(&Slot)) {
        let mut slots = lock(&self.handle.shared.slots);
        if let Some(slot) = slots.get(destination) {
            work(slot);
            return;
        }
        let slot = Arc::<Slot>::default();
        work(&slot);
        if slot.is_clean() {
            return;
        }
        slots.insert(destination.clone(), slot.clone());
        if self.handle.started.load(Ordering::SeqCst) {
            self.handle.spawn(destination.clone(), slot);
        }
    }

    /// Tries a destination now, whatever its backoff: it was heard of, or an operator asks.
    pub fn retry(&self, destination: &ServerName) {
        if let Some(slot) = lock(&self.handle.shared.slots).get(destination) {
            slot.heard();
        }
    }

    /// The queues that are not empty or that fail, for operators.
    pub async fn status(&self) -> Result<Vec<QueueStatus>, StoreError> {
        let store = &self.handle.shared.store;
        let mut queues = HashMap::new();
        for (destination, waiting) in rows::waiting(store).await? {
            let destination = parse_destination(destination)?;
            queues.insert(destination.clone(), QueueStatus { waiting, ..QueueStatus::of(destination) });
        }
        for row in rows::failures(store).await? {
            let destination = parse_destination(row.destination)?;
            let queue = queues.entry(destination.clone()).or_insert_with(|| QueueStatus::of(destination));
            (queue.failures, queue.retry_at, queue.last_error) = (row.failures, row.retry_at, Some(row.last_error));
            (queue.since, queue.answers) = (row.since_ts, row.answers);
        }
        for (destination, slot) in lock(&self.handle.shared.slots).iter() {
            if let Some(queue) = queues.get_mut(destination) {
                queue.held = slot.held();
            }
        }
        let mut queues: Vec<_> = queues.into_values().collect();
        queues.sort_by(|a, b| a.destination.cmp(&b.destination));
        Ok(queues)
    }
}

impl Handle {
    /// Starts the one worker of a destination, which ends when there is nothing left to do.
    fn spawn(&self, destination: OwnedServerName, slot: Arc<Slot>) {
        let (shared, stop, kill) = (self.shared.clone(), self.stop.clone(), self.kill.clone());
        self.workers.spawn(async move {
            let work = async {
                let mut lost = false;
                loop {
                    let worker = Worker::new(&shared, &destination, &slot, &stop, lost);
                    if AssertUnwindSafe(worker.run()).catch_unwind().await.is_ok() {
                        return;
                    }
                    tracing::error!(server = %destination, "the outbound queue panicked");
                    lost = true;
                    tokio::time::sleep(AFTER_PANIC).await;
                }
            };
            tokio::select! {
                () = kill.cancelled() => {}
                () = work => {}
            }
        });
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.kill.cancel();
    }
}

fn parse_destination(name: String) -> Result<OwnedServerName, StoreError> {
    name.try_into().map_err(|error| StoreError::corrupt("destination", error))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is inside is whole between any two statements, so a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
