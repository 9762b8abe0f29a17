//! The metrics of every part, in one registry. Other parts count through the functions here; labels come from fixed sets, so
//! that no peer can make the number of series grow.

use std::collections::BTreeMap;
use std::hash::Hash;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::Method;
use prometheus::core::Collector;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

use crate::identity::Side;
use crate::refusal::Refusal;

/// Every metric; see the help texts below for what each means.
#[allow(missing_docs)]
pub struct Metrics {
    registry: Registry,
    pub events_accepted: IntCounterVec,
    pub events_refused: IntCounterVec,
    /// Events of other servers for rooms that are not known.
    pub events_of_unknown_rooms: IntCounter,
    pub hub_transfers: IntCounterVec,
    pub edus_received: IntCounterVec,
    pub edus_sent: IntCounterVec,
    pub edus_dropped: IntCounterVec,
    pub images: IntCounterVec,
    pub images_refused: IntCounterVec,
    pub repairs: IntCounterVec,
    pub crossing_seconds: HistogramVec,
    pub inbox_waiting: IntGauge,
    pub inbox_oldest_seconds: IntGauge,
    pub echoes_waiting: IntGauge,
    pub lm_hub_faults: IntCounterVec,
    pub lm_missing: IntGauge,
    pub lm_missing_oldest_seconds: IntGauge,
    pub graph_missing: IntGauge,
    pub graph_missing_oldest_seconds: IntGauge,
    pub portals: IntGaugeVec,
    pub outbound_waiting: IntGauge,
    pub outbound_failing: IntGauge,
    pub outbound_transactions: IntCounterVec,
    pub outbound_feeds_ended: IntCounter,
    pub outbound_seconds: HistogramVec,
    pub inbound_transactions: IntCounterVec,
    pub inbound_seconds: HistogramVec,
    pub key_fetches: IntCounterVec,
    pub http_requests: IntCounterVec,
    pub http_seconds: HistogramVec,
    pub cache_entries: IntGaugeVec,
    pub cache_lookups: IntCounterVec,
    pub media_requests: IntCounterVec,
    pub media_bytes: IntCounterVec,
    pub media_kept_bytes: IntGauge,
    pub store_group_jobs: Histogram,
    pub store_commit_seconds: Histogram,
    pub appservice_transactions: IntCounterVec,
    pub appservice_events: IntCounterVec,
    pub appservice_waiting: IntGauge,
    pub appservice_alias_queries: IntCounterVec,
    pub homeserver_up: IntGauge,
    pub resident_bytes: IntGauge,
}

/// The one set of metrics of this process.
pub static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

/// An event of another server was accepted into a room on `side`.
pub fn event_accepted(side: Side) {
    METRICS.events_accepted.with_label_values(&[side.as_str()]).inc();
}

/// An event of another server was refused on `side`.
pub fn event_refused(side: Side, refusal: &Refusal) {
    METRICS.events_refused.with_label_values(&[side.as_str(), refusal.code()]).inc();
}

/// A log changed hands: it was `given` away, `taken` over, or that was `seen` as a participant.
pub fn hub_transfer(how: &'static str) {
    METRICS.hub_transfers.with_label_values(&[how]).inc();
}

/// An event of another server came for a room that is not known.
pub fn event_of_unknown_room() {
    METRICS.events_of_unknown_rooms.inc();
}

/// Of the EDUs of another server one thing was taken (`ok`), or not, for this reason.
pub fn edu_received(kind: &'static str, result: &'static str) {
    METRICS.edus_received.with_label_values(&[kind, result]).inc();
}

/// An EDU goes to another server.
pub fn edu_sent(kind: &'static str) {
    METRICS.edus_sent.with_label_values(&[kind]).inc();
}

/// EDUs for other servers were dropped, for this reason.
pub fn edus_dropped(reason: &'static str, count: usize) {
    METRICS.edus_dropped.with_label_values(&[reason]).inc_by(u64::try_from(count).unwrap_or_default());
}

/// What is left of a feed was dropped, for a destination that has no endpoint for it.
pub fn outbound_feed_ended() {
    METRICS.outbound_feeds_ended.inc();
}

/// An event was carried over to the side `to`, `waited` after it was accepted.
pub fn image(to: Side, waited: Duration) {
    METRICS.images.with_label_values(&[to.as_str()]).inc();
    METRICS.crossing_seconds.with_label_values(&[to.as_str()]).observe(waited.as_secs_f64());
}

/// An event was not carried over to the side `to`.
pub fn image_refused(to: Side, refusal: &Refusal) {
    METRICS.images_refused.with_label_values(&[to.as_str(), refusal.code()]).inc();
}

/// The bridge sent a repair into the room on `side`.
pub fn repair(side: Side) {
    METRICS.repairs.with_label_values(&[side.as_str()]).inc();
}

/// How many portals are in the state `state` (`active`, `degraded` …).
pub fn portals(state: &'static str, count: usize) {
    METRICS.portals.with_label_values(&[state]).set(i64::try_from(count).unwrap_or(i64::MAX));
}

/// A transaction was sent to another server and ended like this: `ok`, `refused` or `unreachable`.
pub fn outbound_transaction(protocol: Side, result: &'static str, took: Duration) {
    METRICS.outbound_transactions.with_label_values(&[protocol.as_str(), result]).inc();
    METRICS.outbound_seconds.with_label_values(&[protocol.as_str()]).observe(took.as_secs_f64());
}

/// A transaction of another server was answered like this: `ok`, `replayed` or `refused`.
pub fn inbound_transaction(protocol: Side, result: &'static str, took: Duration) {
    METRICS.inbound_transactions.with_label_values(&[protocol.as_str(), result]).inc();
    METRICS.inbound_seconds.with_label_values(&[protocol.as_str()]).observe(took.as_secs_f64());
}

/// The keys of another server were asked for.
pub fn key_fetch(ok: bool) {
    METRICS.key_fetches.with_label_values(&[if ok { "ok" } else { "failed" }]).inc();
}

/// Counts the look-ups in one cache and shows how much it holds.
#[derive(Debug, Clone)]
pub struct CacheMeter {
    hits: IntCounter,
    misses: IntCounter,
}

/// What says how much a cache holds.
type Entries = Box<dyn Fn() -> u64 + Send>;

/// The caches that are watched, by name; the last of a name counts.
static CACHES: LazyLock<Mutex<BTreeMap<&'static str, Entries>>> = LazyLock::new(Mutex::default);

impl CacheMeter {
    /// Watches `cache` under `name`.
    pub fn watch<K, V>(name: &'static str, cache: &moka::future::Cache<K, V>) -> Self
    where
        K: Hash + Eq + Send + Sync + 'static,
        V: Clone + Send + Sync + 'static,
    {
        let cache = cache.clone();
        CACHES.lock().unwrap_or_else(PoisonError::into_inner).insert(name, Box::new(move || cache.entry_count()));
        let counter = |result| METRICS.cache_lookups.with_label_values(&[name, result]);
        Self { hits: counter("hit"), misses: counter("miss") }
    }

    /// Counts one look-up by what it found, and passes that on.
    pub fn count<V>(&self, found: Option<V>) -> Option<V> {
        self.looked_up(usize::from(found.is_some()), usize::from(found.is_none()));
        found
    }

    /// So much was asked for and found, and so much was not.
    pub fn looked_up(&self, hits: usize, misses: usize) {
        self.hits.inc_by(u64::try_from(hits).unwrap_or_default());
        self.misses.inc_by(u64::try_from(misses).unwrap_or_default());
    }
}

/// A server asked for a file: it was there (`hit`), was being fetched already (`joined`), could not be had a moment ago (`failed`), or
/// is fetched because of that (`miss`).
pub fn media_request(result: &'static str) {
    METRICS.media_requests.with_label_values(&[result]).inc();
}

/// So many bytes of files were `fetched`, or `served`.
pub fn media_bytes(direction: &'static str, bytes: u64) {
    METRICS.media_bytes.with_label_values(&[direction]).inc_by(bytes);
}

/// A group of `jobs` writes was committed, which took so long.
pub fn store_group(jobs: usize, took: Duration) {
    METRICS.store_group_jobs.observe(f64::from(u32::try_from(jobs).unwrap_or(u32::MAX)));
    METRICS.store_commit_seconds.observe(took.as_secs_f64());
}

/// Counts and times the requests of one listener: for [`axum::middleware::from_fn_with_state`], whose state is the
/// listener's name.
pub async fn track(State(listener): State<&'static str>, request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().cloned();
    let method = match *request.method() {
        Method::GET => "GET",
        Method::PUT => "PUT",
        Method::POST => "POST",
        Method::DELETE => "DELETE",
        _ => "other",
    };
    let start = Instant::now();
    let response = next.run(request).await;
    let route = route.as_ref().map_or("other", MatchedPath::as_str);
    METRICS.http_requests.with_label_values(&[listener, method, route, response.status().as_str()]).inc();
    METRICS.http_seconds.with_label_values(&[listener, route]).observe(start.elapsed().as_secs_f64());
    response
}

/// All metrics as Prometheus reads them.
pub fn render() -> String {
    let metrics = &*METRICS;
    if let Some(bytes) = resident_bytes() {
        metrics.resident_bytes.set(bytes);
    }
    for (name, entries) in &*CACHES.lock().unwrap_or_else(PoisonError::into_inner) {
        let entries = i64::try_from(entries()).unwrap_or(i64::MAX);
        metrics.cache_entries.with_label_values(&[*name]).set(entries);
    }
    TextEncoder::new().encode_to_string(&metrics.registry.gather()).unwrap_or_default()
}

/// The memory that the process has, as Linux says.
fn resident_bytes() -> Option<i64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().trim_end_matches("kB").trim().parse::<i64>().ok()?.checked_mul(1024)
}

/// Bounds of latencies, in seconds.
const LATENCIES: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
/// Bounds of the sizes of groups.
const SIZES: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

impl Metrics {
    fn new() -> Self {
        let registry = Registry::new();
        let r = &registry;
        counter(r, "build_info", "Always 1, with the version.", &["version"])
            .with_label_values(&[env!("CARGO_PKG_VERSION")])
            .inc();
        Self {
            events_accepted: counter(
                r,
                "events_accepted_total",
                "Events of other servers that were accepted.",
                &["side"],
            ),
            events_refused: counter(
                r,
                "events_refused_total",
                "Events of other servers that were refused, by reason.",
                &["side", "code"],
            ),
            events_of_unknown_rooms: registered(
                r,
                IntCounter::with_opts(opts(
                    "events_of_unknown_rooms_total",
                    "Events of other servers for rooms that the database does not know; they were dropped.",
                )),
            ),
            hub_transfers: counter(
                r,
                "hub_transfers_total",
                "LM rooms whose log another server keeps since then: by this gateway's part in it.",
                &["part"],
            ),
            edus_received: counter(
                r,
                "edus_received_total",
                "What other servers' EDUs say, by type and by what became of it.",
                &["type", "result"],
            ),
            edus_sent: counter(r, "edus_sent_total", "EDUs sent to other servers, by type.", &["type"]),
            edus_dropped: counter(
                r,
                "edus_dropped_total",
                "EDUs for other servers that were dropped, by reason.",
                &["reason"],
            ),
            outbound_feeds_ended: registered(
                r,
                IntCounter::with_opts(opts(
                    "outbound_feeds_ended_total",
                    "Feeds of which the rest was dropped, for a server that does LM alone and has no endpoint for them.",
                )),
            ),
            images: counter(r, "images_total", "Events that were carried over to a side.", &["to"]),
            images_refused: counter(
                r,
                "images_refused_total",
                "Events that were not carried over, by reason.",
                &["to", "code"],
            ),
            repairs: counter(r, "repairs_total", "Events sent to bring two states together.", &["side"]),
            crossing_seconds: histogram(
                r,
                "crossing_seconds",
                "From the acceptance of an event to the commit of its image.",
                &["to"],
            ),
            inbox_waiting: gauge(r, "inbox_waiting", "Accepted events that wait to be carried over."),
            inbox_oldest_seconds: gauge(r, "inbox_oldest_seconds", "How long the oldest of them has waited."),
            echoes_waiting: gauge(r, "echoes_waiting", "Images that a foreign hub did not send back yet."),
            lm_hub_faults: counter(r, "lm_hub_faults_total", "Faults of foreign hubs, by kind.", &["kind"]),
            lm_missing: gauge(r, "lm_missing", "Events of foreign hubs' logs that could not be had or checked so far."),
            lm_missing_oldest_seconds: gauge(
                r,
                "lm_missing_oldest_seconds",
                "Since when the first of them is known to be missing.",
            ),
            graph_missing: gauge(
                r,
                "graph_missing",
                "Events of Matrix rooms that wait for what is before them, or were taken without.",
            ),
            graph_missing_oldest_seconds: gauge(
                r,
                "graph_missing_oldest_seconds",
                "Since when something is known to be missing before the first of them.",
            ),
            portals: gauges(r, "portals", "Portals by state.", &["state"]),
            outbound_waiting: gauge(r, "outbound_waiting", "Events that wait to be sent to other servers."),
            outbound_failing: gauge(r, "outbound_failing", "Servers to which the last transaction failed."),
            outbound_transactions: counter(
                r,
                "outbound_transactions_total",
                "Transactions sent to other servers, by result.",
                &["protocol", "result"],
            ),
            outbound_seconds: histogram(
                r,
                "outbound_transaction_seconds",
                "How long other servers took to answer a transaction.",
                &["protocol"],
            ),
            inbound_transactions: counter(
                r,
                "inbound_transactions_total",
                "Transactions of other servers, by result.",
                &["protocol", "result"],
            ),
            inbound_seconds: histogram(
                r,
                "inbound_transaction_seconds",
                "How long it took to answer a transaction of another server.",
                &["protocol"],
            ),
            key_fetches: counter(r, "key_fetches_total", "Requests for the keys of other servers.", &["result"]),
            http_requests: counter(
                r,
                "http_requests_total",
                "Requests by listener, route and status.",
                &["listener", "method", "route", "status"],
            ),
            http_seconds: histogram(r, "http_request_seconds", "How long requests took.", &["listener", "route"]),
            cache_entries: gauges(r, "cache_entries", "How much a cache holds.", &["cache"]),
            cache_lookups: counter(r, "cache_lookups_total", "Look-ups in a cache.", &["cache", "result"]),
            media_requests: counter(
                r,
                "media_requests_total",
                "Files that servers asked for, by what became of it.",
                &["result"],
            ),
            media_bytes: counter(r, "media_bytes_total", "Bytes of files, fetched and served.", &["direction"]),
            media_kept_bytes: gauge(r, "media_kept_bytes", "How much of files is on disk."),
            store_group_jobs: plain_histogram(r, "store_group_jobs", "Writes that shared a commit.", SIZES),
            store_commit_seconds: plain_histogram(
                r,
                "store_commit_seconds",
                "How long a group of writes took, with its commit.",
                LATENCIES,
            ),
            appservice_transactions: counter(
                r,
                "appservice_transactions_total",
                "Transactions of the homeserver, by result.",
                &["result"],
            ),
            appservice_events: counter(
                r,
                "appservice_events_total",
                "Events of the homeserver's transactions, by what became of them.",
                &["result"],
            ),
            appservice_waiting: gauge(r, "appservice_waiting", "Stored events of the homeserver that wait."),
            appservice_alias_queries: counter(
                r,
                "appservice_alias_queries_total",
                "Aliases that the homeserver asked for, by result.",
                &["result"],
            ),
            homeserver_up: gauge(r, "homeserver_up", "Whether the last ping of the homeserver came back."),
            resident_bytes: gauge(r, "resident_memory_bytes", "Memory that the process has."),
            registry,
        }
    }
}

fn opts(name: &str, help: &str) -> Opts {
    Opts::new(format!("isthmus_{name}"), help)
}

fn counter(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    registered(registry, IntCounterVec::new(opts(name, help), labels))
}

fn gauge(registry: &Registry, name: &str, help: &str) -> IntGauge {
    registered(registry, IntGauge::with_opts(opts(name, help)))
}

fn gauges(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    registered(registry, IntGaugeVec::new(opts(name, help), labels))
}

fn histogram(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> HistogramVec {
    let options = HistogramOpts::from(opts(name, help)).buckets(LATENCIES.to_vec());
    registered(registry, HistogramVec::new(options, labels))
}

fn plain_histogram(registry: &Registry, name: &str, help: &str, bounds: &[f64]) -> Histogram {
    registered(registry, Histogram::with_opts(HistogramOpts::from(opts(name, help)).buckets(bounds.to_vec())))
}

/// Names and labels are the constants above, so neither step fails; a test makes them all.
#[allow(clippy::expect_used)]
fn registered<C: Collector + Clone + 'static>(registry: &Registry, metric: prometheus::Result<C>) -> C {
    let metric = metric.expect("the name of a metric is well-formed");
    registry.register(Box::new(metric.clone())).expect("the name of a metric is there once");
    metric
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::body::Body;
    use axum::routing::get;
    use tower::ServiceExt as _;

    use super::*;

    #[test]
    fn what_is_counted_is_shown() {
        event_refused(Side::Lm, &Refusal::NotJson(String::new()));
        event_accepted(Side::Matrix);
        event_of_unknown_room();
        image(Side::Matrix, Duration::from_millis(3));
        store_group(3, Duration::from_millis(3));
        let text = render();
        for line in [
            "isthmus_events_refused_total{code=\"not_json\",side=\"lm\"} ",
            "isthmus_crossing_seconds_bucket{to=\"matrix\",le=\"0.005\"} ",
            "isthmus_store_group_jobs_count ",
            "isthmus_build_info{version=\"",
            "isthmus_inbox_waiting ",
            "isthmus_events_of_unknown_rooms_total ",
        ] {
            assert!(text.contains(line), "{line} in\n{text}");
        }
    }

    #[tokio::test]
    async fn a_cache_shows_what_it_holds() {
        let cache = moka::future::Cache::new(10);
        let meter = CacheMeter::watch("test", &cache);
        cache.insert(1, 1).await;
        cache.run_pending_tasks().await;
        meter.looked_up(2, 1);
        assert_eq!(meter.count(cache.get(&1).await), Some(1));
        let text = render();
        for line in [
            "isthmus_cache_entries{cache=\"test\"} 1",
            "isthmus_cache_lookups_total{cache=\"test\",result=\"hit\"} 3",
            "isthmus_cache_lookups_total{cache=\"test\",result=\"miss\"} 1",
        ] {
            assert!(text.contains(line), "{line} in\n{text}");
        }
    }

    #[tokio::test]
    async fn requests_are_counted_by_route_and_not_by_path() {
        let router: Router = Router::new()
            .route("/thing/{id}", get(|| async {}))
            .layer(axum::middleware::from_fn_with_state("test", track));
        for path in ["/thing/1", "/thing/2", "/unknown"] {
            let request = Request::get(path).body(Body::empty()).unwrap();
            router.clone().oneshot(request).await.unwrap();
        }
        let text = render();
        let line = |route, status| {
            format!(
                "isthmus_http_requests_total{{listener=\"test\",method=\"GET\",route=\"{route}\",status=\"{status}\"}}"
            )
        };
        assert!(text.contains(&format!("{} 2", line("/thing/{id}", 200))), "{text}");
        assert!(text.contains(&format!("{} 1", line("other", 404))), "{text}");
    }
}
