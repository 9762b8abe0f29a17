//! The queues over a real store and a network that is played.

mod crash;
mod edus;
mod failing;
mod order;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use futures::future::BoxFuture;
use http::StatusCode;
use ruma::server_name;
use serde_json::json;
use tokio::sync::mpsc;

use super::*;
use crate::clock::{Clock as _, ManualClock, SystemClock};
use crate::event::parse_object;
use crate::federation::RemoteError;
use crate::store::testing::{both_databases, both_stores};

const WAIT: Duration = Duration::from_secs(20);

/// A request as the other server sees it.
#[derive(Debug)]
struct Seen {
    destination: OwnedServerName,
    uri: String,
    body: Object,
}

impl Seen {
    fn txn_id(&self) -> &str {
        self.uri.rsplit('/').next().unwrap()
    }

    /// The numbers of the events in it.
    fn numbers(&self) -> Vec<i64> {
        self.body["pdus"].as_array().unwrap().iter().map(|pdu| pdu["n"].as_i64().unwrap()).collect()
    }
}

type Replies = dyn Fn(&ServerName, &str, &Object) -> Reply + Send + Sync;
type Reply = BoxFuture<'static, Result<Object, RemoteError>>;

/// A network on which `reply` answers for everybody.
struct Played {
    reply: Box<Replies>,
    seen: mpsc::UnboundedSender<Seen>,
    /// Whether it was asked what `late-eigen.example` is, whose keys cannot be had at first.
    was_asked: std::sync::atomic::AtomicBool,
}

#[async_trait]
impl Transport for Played {
    async fn put(&self, destination: &ServerName, uri: String, body: Bytes) -> Result<Object, RemoteError> {
        let body = parse_object(&body).unwrap();
        let reply = (self.reply)(destination, &uri, &body);
        let _ = self.seen.send(Seen { destination: destination.to_owned(), uri, body });
        reply.await
    }

    async fn is_linearized(&self, destination: &ServerName) -> bool {
        let is_late = destination.as_str().starts_with("late-eigen");
        destination.as_str().starts_with("eigen") || (is_late && self.was_asked.swap(true, Ordering::SeqCst))
    }
}

fn ok() -> Reply {
    answer(json!({}))
}

fn answer(body: serde_json::Value) -> Reply {
    Box::pin(std::future::ready(Ok(body.as_object().unwrap().clone())))
}

fn status(status: u16) -> Reply {
    let error = RemoteError::Status {
        status: StatusCode::from_u16(status).unwrap(),
        errcode: "M_UNKNOWN".to_owned(),
        error: "no".to_owned(),
        retry_after: None,
        hub_server: None,
    };
    Box::pin(std::future::ready(Err(error)))
}

fn unreachable() -> Reply {
    Box::pin(std::future::ready(Err(RemoteError::Unreachable("gone".to_owned()))))
}

fn never() -> Reply {
    Box::pin(std::future::pending())
}

/// A store for what does not depend on the database.
async fn sqlite() -> (tempfile::TempDir, Store) {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&format!("sqlite://{}", directory.path().join("t.db").display())).await.unwrap();
    (directory, store)
}

/// Feeds in memory, and what their owner is told.
#[derive(Default)]
struct Feeds {
    events: Mutex<BTreeMap<Feed, BTreeMap<i64, Option<String>>>>,
    /// What is not for a destination; like an LM room, the feed is then read a stretch at a time.
    hidden: Mutex<Vec<(OwnedServerName, std::ops::Range<i64>)>>,
    delivered: Mutex<Vec<i64>>,
    told: Mutex<Vec<(Vec<i64>, Object)>>,
    /// Whether what their owner is told next cannot be recorded.
    deaf: std::sync::atomic::AtomicBool,
    /// How often events were asked for.
    asked: std::sync::atomic::AtomicUsize,
}

#[async_trait]
impl FeedSource for Feeds {
    async fn read(
        &self,
        feed: &Feed,
        destination: &ServerName,
        after: i64,
        until: Option<i64>,
        limit: usize,
    ) -> Result<Vec<Delivery>, StoreError> {
        let (events, hidden) = (lock(&self.events), lock(&self.hidden));
        self.asked.fetch_add(1, Ordering::SeqCst);
        let is_hidden = |n: i64| hidden.iter().any(|(server, range)| server == destination && range.contains(&n));
        let shown = events[feed].range(after + 1..=until.unwrap_or(i64::MAX));
        let mut found: Vec<Delivery> = shown
            .clone()
            .skip_while(|(n, _)| is_hidden(**n))
            .take_while(|(n, _)| !is_hidden(**n))
            .take(limit)
            .map(|(position, event)| Delivery { position: *position, event: event.clone().map(Bytes::from) })
            .collect();
        if found.is_empty() {
            Delivery::pass_on(&mut found, shown.last().map(|(position, _)| *position));
        }
        Ok(found)
    }

    async fn already_delivered(
        &self,
        _feed: &Feed,
        _destination: &ServerName,
        positions: &[i64],
    ) -> Result<Vec<i64>, Refusal> {
        let delivered = lock(&self.delivered);
        Ok(positions.iter().copied().filter(|position| delivered.contains(position)).collect())
    }

    async fn answered(
        &self,
        _feed: &Feed,
        _destination: &ServerName,
        positions: &[i64],
        answer: &Object,
    ) -> Result<(), Refusal> {
        if self.deaf.swap(false, Ordering::SeqCst) {
            return Err(Refusal::Internal("the store fails".to_owned()));
        }
        lock(&self.told).push((positions.to_vec(), answer.clone()));
        Ok(())
    }
}

struct World {
    queues: OutboundQueues,
    seen: mpsc::UnboundedReceiver<Seen>,
}

impl World {
    /// Queues over `store`, not started yet.
    fn new(
        store: &Store,
        feeds: &Arc<Feeds>,
        reply: impl Fn(&ServerName, &str, &Object) -> Reply + Send + Sync + 'static,
    ) -> Self {
        Self::with_clock(store, feeds, Arc::new(SystemClock), reply)
    }

    /// The same, by a clock of the test's.
    fn with_clock(
        store: &Store,
        feeds: &Arc<Feeds>,
        clock: SharedClock,
        reply: impl Fn(&ServerName, &str, &Object) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let (sender, seen) = mpsc::unbounded_channel();
        let wire = Arc::new(Played { reply: Box::new(reply), seen: sender, was_asked: Default::default() });
        let queues = OutboundQueues::over(store.clone(), clock, server_name!("g.example").to_owned(), wire);
        queues.register(&[FeedKind::Log, FeedKind::Lpdus, FeedKind::Graph], feeds.clone());
        Self { queues, seen }
    }

    /// The transactions that servers have got, by their numbers.
    fn arrived(&mut self) -> BTreeMap<OwnedServerName, Vec<Vec<i64>>> {
        let mut arrived: BTreeMap<_, Vec<_>> = BTreeMap::new();
        while let Ok(seen) = self.seen.try_recv() {
            arrived.entry(seen.destination.clone()).or_default().push(seen.numbers());
        }
        arrived
    }

    async fn next(&mut self) -> Seen {
        tokio::time::timeout(WAIT, self.seen.recv()).await.expect("nothing was sent").unwrap()
    }

    /// Waits until every worker has seen what it was woken for.
    async fn taken(&self) {
        let taken = async {
            while !lock(&self.queues.handle.shared.slots).values().all(|slot| slot.is_clean()) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(WAIT, taken).await.expect("a worker did not take its news");
    }

    /// Waits until nothing is left to send, and nobody fails.
    async fn settled(&self) {
        let settled = async {
            while !self.queues.status().await.unwrap().is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(WAIT, settled).await.expect("the queues did not become empty");
    }
}

fn feed(kind: FeedKind, room_id: &str) -> Feed {
    Feed { kind, room_id: room_id.try_into().unwrap() }
}

fn name(text: &str) -> OwnedServerName {
    text.try_into().unwrap()
}

/// A log that is the only feed, filled as by [`fill`].
async fn one_log(store: &Store, range: std::ops::Range<i64>, destinations: &[&str]) -> (Arc<Feeds>, Feed) {
    let (feeds, log) = (Arc::new(Feeds::default()), feed(FeedKind::Log, "!a:g.example"));
    fill(store, &feeds, &log, range, destinations).await;
    (feeds, log)
}

/// Adds the events `range` to a feed, and subscribes `destinations` from the one before the first.
async fn fill(store: &Store, feeds: &Feeds, feed: &Feed, range: std::ops::Range<i64>, destinations: &[&str]) {
    let (first, last) = (range.start, range.end - 1);
    let events = range.map(|n| (n, Some(json!({ "n": n }).to_string())));
    lock(&feeds.events).entry(feed.clone()).or_default().extend(events);
    let (feed, destinations) = (feed.clone(), destinations.iter().map(|text| name(text)).collect::<Vec<_>>());
    store
        .write(move |tx| {
            Box::pin(async move {
                for destination in destinations {
                    OutboundQueues::subscribe(tx, &destination, &feed, first - 1).await?;
                }
                OutboundQueues::advance(tx, &feed, last).await
            })
        })
        .await
        .unwrap();
}

/// A server that takes what comes before the first bad event, and answers with an error then.
fn stops_at(bad: i64, code: u16, taken: Arc<Mutex<Vec<i64>>>) -> impl Fn(&ServerName, &str, &Object) -> Reply {
    move |_, _, body| {
        for pdu in body["pdus"].as_array().unwrap() {
            let n = pdu["n"].as_i64().unwrap();
            if n == bad {
                return status(code);
            }
            lock(&taken).push(n);
        }
        ok()
    }
}
