//! The queues over a real store and a network that is played.

use std::collections::BTreeMap;
use std::time::Instant;

use futures::future::BoxFuture;
use http::StatusCode;
use ruma::server_name;
use serde_json::json;
use tokio::sync::mpsc;

use super::*;
use crate::clock::{Clock as _, ManualClock, SystemClock};
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
}

#[async_trait]
impl Transport for Played {
    async fn put(&self, destination: &ServerName, uri: String, body: Object) -> Result<Object, RemoteError> {
        let reply = (self.reply)(destination, &uri, &body);
        let _ = self.seen.send(Seen { destination: destination.to_owned(), uri, body });
        reply.await
    }

    async fn is_linearized(&self, destination: &ServerName) -> bool {
        destination.as_str().starts_with("eigen")
    }
}

fn ok() -> Reply {
    Box::pin(std::future::ready(Ok(Object::new())))
}

fn status(status: u16) -> Reply {
    let error = RemoteError::Status {
        status: StatusCode::from_u16(status).unwrap(),
        errcode: "M_UNKNOWN".to_owned(),
        error: "no".to_owned(),
        retry_after: None,
    };
    Box::pin(std::future::ready(Err(error)))
}

fn unreachable() -> Reply {
    Box::pin(std::future::ready(Err(RemoteError::Unreachable("gone".to_owned()))))
}

fn never() -> Reply {
    Box::pin(std::future::pending())
}

/// Feeds in memory, and what their owner is told.
#[derive(Default)]
struct Feeds {
    events: Mutex<BTreeMap<Feed, BTreeMap<i64, Option<String>>>>,
    /// What is not for a destination; like an LM room, the feed is then read a stretch at a time.
    hidden: Mutex<Vec<(OwnedServerName, std::ops::Range<i64>)>>,
    delivered: Mutex<Vec<i64>>,
    told: Mutex<Vec<(Vec<i64>, Object)>>,
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
            .map(|(position, event)| Delivery {
                position: *position,
                event: event.clone().map(|event| RawValue::from_string(event).unwrap()),
            })
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

    async fn answered(&self, _feed: &Feed, _destination: &ServerName, positions: &[i64], answer: &Object) {
        lock(&self.told).push((positions.to_vec(), answer.clone()));
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
        let (sender, seen) = mpsc::unbounded_channel();
        let wire = Arc::new(Played { reply: Box::new(reply), seen: sender });
        let queues =
            OutboundQueues::over(store.clone(), Arc::new(SystemClock), server_name!("g.example").to_owned(), wire);
        queues.register(&[FeedKind::Log, FeedKind::Lpdus, FeedKind::Graph], feeds.clone());
        Self { queues, seen }
    }

    async fn next(&mut self) -> Seen {
        tokio::time::timeout(WAIT, self.seen.recv()).await.expect("nothing was sent").unwrap()
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

#[tokio::test]
async fn all_events_arrive_in_order_and_in_few_transactions() {
    both_stores(|store| async move {
        let (feeds, log) = (Arc::new(Feeds::default()), feed(FeedKind::Log, "!a:g.example"));
        fill(&store, &feeds, &log, 1..121, &["a.example", "b.example"]).await;
        let mut world = World::new(&store, &feeds, |_, _, _| ok());
        world.queues.start().await.unwrap();
        world.settled().await;
        let mut arrived: BTreeMap<OwnedServerName, Vec<Vec<i64>>> = BTreeMap::new();
        while let Ok(seen) = world.seen.try_recv() {
            assert!(seen.uri.starts_with("/_matrix/federation/unstable/"), "{}", seen.uri);
            arrived.entry(seen.destination.clone()).or_default().push(seen.numbers());
        }
        for destination in ["a.example", "b.example"] {
            let transactions = &arrived[&name(destination)];
            assert_eq!(transactions.iter().map(Vec::len).collect::<Vec<_>>(), [50, 50, 20]);
            assert_eq!(transactions.concat(), (1..121).collect::<Vec<_>>());
        }
        // What comes later is sent when they are woken.
        fill(&store, &feeds, &log, 121..123, &[]).await;
        world.queues.wake(&log, &[name("a.example"), name("b.example")]);
        assert_eq!((world.next().await.numbers(), world.next().await.numbers()), (vec![121, 122], vec![121, 122]));
        world.settled().await;
        world.queues.stop().await;
    })
    .await;
}

#[tokio::test]
async fn what_is_committed_and_not_shown_yet_is_not_passed_over() {
    both_stores(|store| async move {
        let (feeds, log) = (Arc::new(Feeds::default()), feed(FeedKind::Log, "!a:g.example"));
        fill(&store, &feeds, &log, 1..2, &["a.example"]).await;
        let mut world = World::new(&store, &feeds, |_, _, _| ok());
        world.queues.start().await.unwrap();
        assert_eq!(world.next().await.numbers(), [1]);
        world.settled().await;
        // The room's task has committed an event and is interrupted before it shows it; something else wakes the queue.
        fill(&store, &feeds, &log, 2..3, &[]).await;
        let event = lock(&feeds.events).get_mut(&log).unwrap().remove(&2).unwrap();
        let asked = feeds.asked.load(Ordering::SeqCst);
        world.queues.wake(&log, &[name("a.example")]);
        while feeds.asked.load(Ordering::SeqCst) == asked {
            tokio::task::yield_now().await;
        }
        // What another feed brings is composed after that, so the worker has done what it does about this one.
        let other = feed(FeedKind::Log, "!b:g.example");
        fill(&store, &feeds, &other, 7..8, &["a.example"]).await;
        world.queues.wake(&other, &[name("a.example")]);
        assert_eq!(world.next().await.numbers(), [7]);

        lock(&feeds.events).get_mut(&log).unwrap().insert(2, event);
        world.queues.wake(&log, &[name("a.example")]);
        assert_eq!(world.next().await.numbers(), [2]);
        world.settled().await;
        world.queues.stop().await;
    })
    .await;
}

#[tokio::test]
async fn hc_82_after_a_crash_the_same_transaction_is_sent_again() {
    both_databases(|url| async move {
        let (feeds, graph) = (Arc::new(Feeds::default()), feed(FeedKind::Graph, "!a:b.example"));
        let store = Store::open(&url).await.unwrap();
        fill(&store, &feeds, &graph, 1..4, &["a.example"]).await;
        let mut world = World::new(&store, &feeds, |_, _, _| never());
        world.queues.start().await.unwrap();
        let first = world.next().await;
        assert!(first.uri.starts_with("/_matrix/federation/v1/send/"));
        assert_eq!(first.body["origin"], "g.example");
        // More comes while the transaction is on its way, then all is lost but the database.
        fill(&store, &feeds, &graph, 4..6, &[]).await;
        world.queues.wake(&graph, &[name("a.example")]);
        drop(world);
        store.close().await;

        let store = Store::open(&url).await.unwrap();
        let mut world = World::new(&store, &feeds, |_, _, _| ok());
        world.queues.start().await.unwrap();
        let again = world.next().await;
        assert_eq!((again.txn_id(), &again.body), (first.txn_id(), &first.body));
        let more = world.next().await;
        assert_eq!(more.numbers(), [4, 5]);
        assert_ne!(more.txn_id(), first.txn_id());
        world.settled().await;
        world.queues.stop().await;
        store.close().await;
    })
    .await;
}

#[tokio::test]
async fn what_is_known_to_have_arrived_is_not_sent_again() {
    both_databases(|url| async move {
        let (feeds, lpdus) = (Arc::new(Feeds::default()), feed(FeedKind::Lpdus, "!a:hub.example"));
        let store = Store::open(&url).await.unwrap();
        fill(&store, &feeds, &lpdus, 1..4, &["hub.example"]).await;
        let mut world = World::new(&store, &feeds, |_, _, _| never());
        world.queues.start().await.unwrap();
        let first = world.next().await;
        drop(world);

        *lock(&feeds.delivered) = vec![1, 2];
        let mut world = World::new(&store, &feeds, |_, _, _| ok());
        world.queues.start().await.unwrap();
        let rest = world.next().await;
        assert_eq!(rest.numbers(), [3]);
        assert_ne!(rest.txn_id(), first.txn_id(), "an ID means one content");
        world.settled().await;
        assert!(world.seen.try_recv().is_err());
        let told: Vec<_> = lock(&feeds.told).iter().map(|(positions, _)| positions.clone()).collect();
        assert_eq!(told, [vec![1, 2], vec![3]]);
        world.queues.stop().await;
        store.close().await;
    })
    .await;
}

#[tokio::test]
async fn hc_60_a_dead_destination_slows_no_other() {
    both_stores(|store| async move {
        let (feeds, log) = (Arc::new(Feeds::default()), feed(FeedKind::Log, "!a:g.example"));
        fill(&store, &feeds, &log, 1..11, &["dead.example", "gone.example", "live.example"]).await;
        let mut world = World::new(&store, &feeds, |destination, _, _| match destination.as_str() {
            "dead.example" => never(),
            "gone.example" => unreachable(),
            _ => ok(),
        });
        world.queues.start().await.unwrap();
        let start = Instant::now();
        for n in 11..40 {
            fill(&store, &feeds, &log, n..n + 1, &[]).await;
            world.queues.wake(&log, &[name("dead.example"), name("gone.example"), name("live.example")]);
        }
        let mut arrived = Vec::new();
        while arrived.len() < 39 {
            let seen = world.next().await;
            if seen.destination == "live.example" {
                arrived.extend(seen.numbers());
            }
        }
        assert_eq!(arrived, (1..40).collect::<Vec<_>>());
        assert!(start.elapsed() < Duration::from_secs(10));
        let failing = async {
            loop {
                let status = world.queues.status().await.unwrap();
                if let Some(gone) = status.iter().find(|queue| queue.failures > 0) {
                    return gone.clone();
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let gone = tokio::time::timeout(WAIT, failing).await.unwrap();
        assert_eq!((gone.destination.as_str(), gone.waiting), ("gone.example", 39));
        assert!(gone.retry_at > 0 && gone.last_error.unwrap().contains("gone"));
    })
    .await;
}

#[tokio::test]
async fn a_destination_that_asks_to_be_left_alone_is_even_when_it_is_heard_of() {
    both_stores(|store| async move {
        let (feeds, log) = (Arc::new(Feeds::default()), feed(FeedKind::Log, "!a:g.example"));
        fill(&store, &feeds, &log, 1..2, &["a.example"]).await;
        const ASKED: Duration = Duration::from_millis(1500);
        let asked = std::sync::atomic::AtomicBool::new(false);
        let mut world = World::new(&store, &feeds, move |_, _, _| {
            if asked.swap(true, Ordering::SeqCst) {
                return ok();
            }
            let (status, errcode) = (StatusCode::TOO_MANY_REQUESTS, "M_LIMIT_EXCEEDED".to_owned());
            let error = RemoteError::Status { status, errcode, error: String::new(), retry_after: Some(ASKED) };
            Box::pin(std::future::ready(Err(error)))
        });
        world.queues.start().await.unwrap();
        let first = world.next().await;
        let start = Instant::now();
        world.queues.retry(&first.destination);
        assert_eq!(world.next().await.txn_id(), first.txn_id());
        assert!(start.elapsed() >= ASKED.mul_f64(0.9), "{:?}", start.elapsed());
        world.settled().await;
        world.queues.stop().await;
    })
    .await;
}

#[tokio::test]
async fn a_destination_that_is_heard_of_is_tried_at_once() {
    both_stores(|store| async move {
        let (feeds, log) = (Arc::new(Feeds::default()), feed(FeedKind::Log, "!a:g.example"));
        fill(&store, &feeds, &log, 1..2, &["a.example"]).await;
        let hours = SystemClock.now_ms() + 5 * 3_600_000;
        let row = rows::FailureRow {
            destination: "a.example".to_owned(),
            failures: 15,
            retry_at: hours,
            last_error: "away".to_owned(),
        };
        store.write(move |tx| Box::pin(async move { rows::record_failure(tx, &row).await })).await.unwrap();
        let mut world = World::new(&store, &feeds, |_, _, _| ok());
        world.queues.start().await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(world.seen.try_recv().is_err(), "tried before its time");
        assert_eq!(world.queues.status().await.unwrap()[0].failures, 15);
        world.queues.retry(server_name!("other.example"));
        world.queues.retry(server_name!("a.example"));
        assert_eq!(world.next().await.numbers(), [1]);
        world.settled().await;
        world.queues.stop().await;
    })
    .await;
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

#[tokio::test]
async fn hc_20_one_bad_event_holds_up_no_other() {
    both_stores(|store| async move {
        let (feeds, lpdus) = (Arc::new(Feeds::default()), feed(FeedKind::Lpdus, "!a:eigen.example"));
        fill(&store, &feeds, &lpdus, 1..7, &["eigen.example"]).await;
        let taken = Arc::new(Mutex::new(Vec::new()));
        let world = World::new(&store, &feeds, stops_at(3, 400, taken.clone()));
        // The hub's log tells what was appended before the bad event.
        *lock(&feeds.delivered) = vec![1, 2];
        world.queues.start().await.unwrap();
        world.settled().await;
        assert_eq!(*lock(&taken), [1, 2, 4, 5, 6]);
        let told = lock(&feeds.told).clone();
        let (refused, taken): (Vec<_>, Vec<_>) = told.into_iter().partition(|(_, answer)| !answer.is_empty());
        let [(positions, answer)] = refused.as_slice() else { panic!("{refused:?}") };
        assert_eq!(
            (positions.as_slice(), &answer["errcode"], &answer["error"]),
            ([3].as_slice(), &json!("M_UNKNOWN"), &json!("no"))
        );
        let taken: Vec<i64> = taken.into_iter().flat_map(|(positions, _)| positions).collect();
        assert_eq!(taken, [1, 2, 4, 5, 6]);
        world.queues.stop().await;
    })
    .await;
}

#[tokio::test]
async fn a_linearized_server_that_breaks_at_a_batch_gets_its_events_one_by_one() {
    both_stores(|store| async move {
        let (feeds, log) = (Arc::new(Feeds::default()), feed(FeedKind::Log, "!a:g.example"));
        fill(&store, &feeds, &log, 1..5, &["eigen.example"]).await;
        let mut world =
            World::new(
                &store,
                &feeds,
                |_, _, body| {
                    if body["pdus"].as_array().unwrap().len() > 1 { status(500) } else { ok() }
                },
            );
        world.queues.start().await.unwrap();
        world.settled().await;
        let seen: Vec<_> = std::iter::from_fn(|| world.seen.try_recv().ok()).map(|seen| seen.numbers()).collect();
        assert_eq!(seen, [vec![1, 2, 3, 4], vec![1], vec![2], vec![3], vec![4]]);
        // Afterwards they are sent together again.
        fill(&store, &feeds, &log, 5..6, &[]).await;
        world.queues.wake(&log, &[name("eigen.example")]);
        assert_eq!(world.next().await.numbers(), [5]);
        world.queues.stop().await;
    })
    .await;
}

#[tokio::test]
async fn the_name_of_the_endpoint_that_a_server_knows_is_remembered() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&format!("sqlite://{}", directory.path().join("t.db").display())).await.unwrap();
    let (feeds, log) = (Arc::new(Feeds::default()), feed(FeedKind::Log, "!a:g.example"));
    fill(&store, &feeds, &log, 1..2, &["a.example"]).await;
    let mut world = World::new(&store, &feeds, |_, uri, _| {
        if uri.starts_with("/_matrix/federation/v2/send/") {
            return ok();
        }
        let (status, errcode, error) = (StatusCode::NOT_FOUND, String::new(), String::new());
        let error = RemoteError::Status { status, errcode, error, retry_after: None };
        Box::pin(std::future::ready(Err(error)))
    });
    world.queues.start().await.unwrap();
    let (first, second) = (world.next().await, world.next().await);
    assert!(first.uri.contains("/unstable/") && second.uri.contains("/v2/send/"));
    assert_eq!(first.txn_id(), second.txn_id());
    world.settled().await;
    fill(&store, &feeds, &log, 2..3, &[]).await;
    world.queues.wake(&log, &[name("a.example")]);
    assert!(world.next().await.uri.contains("/v2/send/"));
    world.settled().await;
    world.queues.stop().await;
}

#[tokio::test]
async fn transactions_keep_within_bytes_and_protocols() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&format!("sqlite://{}", directory.path().join("t.db").display())).await.unwrap();
    let feeds = Arc::new(Feeds::default());
    let (log, graph) = (feed(FeedKind::Log, "!a:g.example"), feed(FeedKind::Graph, "!b:g.example"));
    fill(&store, &feeds, &log, 1..6, &["a.example"]).await;
    fill(&store, &feeds, &graph, 1..6, &["a.example"]).await;
    let filler = |n: i64, size: usize| Some(json!({ "n": n, "x": "x".repeat(size) }).to_string());
    for events in lock(&feeds.events).values_mut() {
        for (n, size) in [(1, 40_000), (2, 40_000), (3, 40_000), (4, 95_000), (5, 10)] {
            events.insert(n, filler(n, size));
        }
    }
    let mut world = World::new(&store, &feeds, |_, _, _| ok());
    world.queues.start().await.unwrap();
    world.settled().await;
    let (mut lm, mut matrix) = (Vec::new(), Vec::new());
    while let Ok(seen) = world.seen.try_recv() {
        if seen.uri.contains("/v1/send/") { matrix.push(seen.numbers()) } else { lm.push(seen.numbers()) }
    }
    assert_eq!(lm, [vec![1, 2], vec![3], vec![4], vec![5]]);
    assert_eq!(matrix, [vec![1, 2, 3, 4, 5]]);
    world.queues.stop().await;
}

#[tokio::test]
async fn what_is_not_for_a_destination_is_passed_over() {
    both_stores(|store| async move {
        let (feeds, log) = (Arc::new(Feeds::default()), feed(FeedKind::Log, "!a:g.example"));
        fill(&store, &feeds, &log, 1..201, &["a.example"]).await;
        for (n, event) in lock(&feeds.events).get_mut(&log).unwrap() {
            if *n != 150 {
                *event = None;
            }
        }
        let mut world = World::new(&store, &feeds, |_, _, _| ok());
        world.queues.start().await.unwrap();
        assert_eq!(world.next().await.numbers(), [150]);
        world.settled().await;
        assert!(world.seen.try_recv().is_err());
        world.queues.stop().await;
    })
    .await;
}

#[tokio::test]
async fn an_end_and_a_new_beginning() {
    both_stores(|store| async move {
        let (feeds, log) = (Arc::new(Feeds::default()), feed(FeedKind::Log, "!a:g.example"));
        fill(&store, &feeds, &log, 1..11, &["left.example", "back.example"]).await;
        let ended = log.clone();
        store
            .write(move |tx| {
                Box::pin(async move {
                    for destination in [server_name!("left.example"), server_name!("back.example")] {
                        OutboundQueues::end(tx, destination, &ended, 4).await?;
                    }
                    // Joined again before it got even the end.
                    OutboundQueues::subscribe(tx, server_name!("back.example"), &ended, 8).await
                })
            })
            .await
            .unwrap();
        *lock(&feeds.hidden) = vec![(name("back.example"), 5..9)];
        let mut world = World::new(&store, &feeds, |_, _, _| ok());
        world.queues.start().await.unwrap();
        world.settled().await;
        let mut seen: Vec<_> = std::iter::from_fn(|| world.seen.try_recv().ok())
            .map(|seen| (seen.destination.to_string(), seen.numbers()))
            .collect();
        seen.sort();
        let (back, left) = ("back.example".to_owned(), "left.example".to_owned());
        assert_eq!(seen, [(back.clone(), vec![1, 2, 3, 4]), (back, vec![9, 10]), (left, vec![1, 2, 3, 4])]);
        let cursor = rows::cursor(&store, &log.key(server_name!("left.example"))).await.unwrap();
        assert_eq!(cursor, None, "what has ended leaves nothing behind");
        fill(&store, &feeds, &log, 11..12, &[]).await;
        world.queues.wake(&log, &[name("left.example"), name("back.example")]);
        let next = world.next().await;
        assert_eq!((next.destination.as_str(), next.numbers()), ("back.example", vec![11]));
        world.settled().await;
        world.queues.stop().await;
    })
    .await;
}

#[tokio::test]
async fn a_stop_waits_for_what_is_on_its_way() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&format!("sqlite://{}", directory.path().join("t.db").display())).await.unwrap();
    let (feeds, log) = (Arc::new(Feeds::default()), feed(FeedKind::Log, "!a:g.example"));
    fill(&store, &feeds, &log, 1..101, &["a.example"]).await;
    let gate = Arc::new(tokio::sync::Notify::new());
    let mut world = World::new(&store, &feeds, {
        let gate = gate.clone();
        move |_, _, _| {
            let gate = gate.clone();
            Box::pin(async move {
                gate.notified().await;
                Ok(Object::new())
            })
        }
    });
    world.queues.start().await.unwrap();
    assert_eq!(world.next().await.numbers().len(), 50);
    let stopping = tokio::spawn({
        let queues = world.queues.clone();
        async move { queues.stop().await }
    });
    tokio::task::yield_now().await;
    assert!(!stopping.is_finished());
    gate.notify_one();
    tokio::time::timeout(WAIT, stopping).await.unwrap().unwrap();
    let cursor = rows::cursor(&store, &log.key(server_name!("a.example"))).await.unwrap().unwrap();
    assert_eq!((cursor.sent, cursor.target), (50, 100));
    assert!(rows::inflight(&store, "a.example").await.unwrap().is_none());
    assert!(world.seen.try_recv().is_err());
}

#[tokio::test]
async fn idle_rooms_and_idle_destinations_cost_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&format!("sqlite://{}", directory.path().join("t.db").display())).await.unwrap();
    let feeds = Arc::new(Feeds::default());
    for n in 0..20 {
        fill(&store, &feeds, &feed(FeedKind::Log, &format!("!{n}:g.example")), 1..2, &["a.example"]).await;
    }
    let clock = ManualClock::new(1);
    let (sender, mut seen) = mpsc::unbounded_channel();
    let wire = Arc::new(Played { reply: Box::new(|_, _, _| ok()), seen: sender });
    let queues = OutboundQueues::over(store.clone(), clock, server_name!("g.example").to_owned(), wire);
    queues.register(&[FeedKind::Log], feeds.clone());
    queues.start().await.unwrap();
    let first = tokio::time::timeout(WAIT, seen.recv()).await.unwrap().unwrap();
    // All twenty rooms share one transaction.
    assert_eq!(first.numbers().len(), 20);
    let idle = async {
        while !lock(&queues.handle.shared.slots).values().all(|slot| slot.is_clean()) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(WAIT, idle).await.unwrap();
    queues.stop().await;
}
