//! Where a server is found: IP literal, explicit port, `.well-known`, SRV, port 8448, in this order.
//! <https://spec.matrix.org/latest/server-server-api/#resolving-server-names>

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use hickory_resolver::TokioResolver;
use hickory_resolver::proto::rr::RData;
use moka::future::Cache;
use moka::ops::compute::Op;
use rand::Rng as _;
use ruma::{OwnedServerName, ServerName};

use super::dialler::{Http, TargetSource, Targets};
use super::well_known::{self, Entry};
use crate::admin::metrics::CacheMeter;

/// How a server is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Route {
    /// The beginning of URLs: its host is the name that the server's certificate must be for.
    pub base: String,
    /// The value of the `Host` header.
    pub host: String,
    /// What is dialled for the URL's host.
    pub dial: Dial,
}

/// What is dialled for a URL's host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dial {
    /// The host itself.
    Host,
    /// The targets of the host's SRV records.
    Srv,
    /// The host itself, wherever it is: an admin has named it.
    Trusted,
}

/// What discovery looks up.
pub(super) trait Lookups {
    /// To what `host` delegates.
    fn delegate(&self, host: &str) -> impl Future<Output = Option<OwnedServerName>> + Send;
    /// Whether `host` has SRV records.
    fn has_srv(&self, host: &str) -> impl Future<Output = bool> + Send;
}

/// The route to `name`. The numbers are those of the spec's steps.
pub(super) async fn discover(name: &ServerName, lookups: &impl Lookups) -> Route {
    // 1 and 2
    if name.is_ip_literal() || name.port().is_some() {
        return fixed(name);
    }
    match lookups.delegate(name.host()).await {
        // 3.1 and 3.2
        Some(delegate) if delegate.is_ip_literal() || delegate.port().is_some() => fixed(&delegate),
        // 3.3 to 3.5
        Some(delegate) => by_srv(delegate.host(), lookups).await,
        // 4 to 6
        None => by_srv(name.host(), lookups).await,
    }
}

/// An IP literal, or a name with a port.
fn fixed(name: &ServerName) -> Route {
    let port = name.port().unwrap_or(8448);
    Route { base: format!("https://{}:{port}", name.host()), host: name.as_str().to_owned(), dial: Dial::Host }
}

async fn by_srv(host: &str, lookups: &impl Lookups) -> Route {
    let host = host.to_owned();
    if lookups.has_srv(&host).await {
        // No port: the records have theirs.
        Route { base: format!("https://{host}"), host, dial: Dial::Srv }
    } else {
        Route { base: format!("https://{host}:8448"), host, dial: Dial::Host }
    }
}

/// How many hosts are remembered.
const CACHED: u64 = 20_000;
/// For how long SRV records, or that there are none, are believed, whatever their own lifetime.
const SRV_LIFETIME: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3600));
const NO_SRV_LIFETIME: Duration = Duration::from_secs(300);
const SRV_TIMEOUT: Duration = Duration::from_secs(5);
/// How many targets of SRV records are kept.
const MAX_TARGETS: usize = 8;

/// The look-ups of the real world, each host asked once at a time, and the answers remembered.
#[derive(Clone)]
pub(super) struct Network {
    http: Arc<Http>,
    well_known: Cache<String, Entry>,
    well_known_meter: CacheMeter,
    srv: SrvTargets,
}

/// SRV records.
#[derive(Clone)]
pub(super) struct SrvTargets {
    resolver: Option<TokioResolver>,
    cache: Cache<String, SrvEntry>,
    meter: CacheMeter,
}

#[derive(Clone)]
struct SrvEntry {
    targets: Arc<Targets>,
    ask_again: Instant,
}

impl Network {
    /// Look-ups that fetch `.well-known` through `http`.
    pub(super) fn new(http: Arc<Http>, srv: SrvTargets) -> Self {
        let well_known = Cache::new(CACHED);
        Self { http, well_known_meter: CacheMeter::watch("well_known", &well_known), well_known, srv }
    }
}

impl Lookups for Network {
    async fn delegate(&self, host: &str) -> Option<OwnedServerName> {
        let host = host.to_ascii_lowercase();
        let known = self.well_known.get(&host).await.filter(|entry| entry.ask_again > Instant::now());
        if let Some(entry) = self.well_known_meter.count(known) {
            return entry.delegate;
        }
        let asked = self
            .well_known
            .entry_by_ref(&host)
            .and_compute_with(async |entry| {
                let previous = entry.map(|entry| entry.into_value());
                if previous.as_ref().is_some_and(|entry| entry.ask_again > Instant::now()) {
                    return Op::Nop;
                }
                let outcome = well_known::fetch(self.http.clone(), &host).await;
                tracing::debug!(server = host, ?outcome, "asked for .well-known");
                Op::Put(well_known::remember(previous.as_ref(), outcome, Instant::now()))
            })
            .await;
        asked.into_entry().and_then(|entry| entry.into_value().delegate)
    }

    async fn has_srv(&self, host: &str) -> bool {
        !self.srv.look_up(host).await.is_empty()
    }
}

impl SrvTargets {
    /// SRV records by the system's resolver.
    pub(super) fn new() -> Self {
        let resolver = TokioResolver::builder_tokio().and_then(|mut builder| {
            builder.options_mut().timeout = Duration::from_secs(2);
            builder.options_mut().attempts = 2;
            builder.build()
        });
        let resolver = resolver.inspect_err(|error| tracing::warn!(%error, "no SRV records will be looked up")).ok();
        let cache = Cache::new(CACHED);
        Self { resolver, meter: CacheMeter::watch("srv", &cache), cache }
    }

    async fn look_up(&self, host: &str) -> Arc<Targets> {
        let host = host.to_ascii_lowercase();
        let known = self.cache.get(&host).await.filter(|entry| entry.ask_again > Instant::now());
        if let Some(entry) = self.meter.count(known) {
            return entry.targets;
        }
        let asked = self
            .cache
            .entry_by_ref(&host)
            .and_compute_with(async |entry| {
                let fresh = entry.is_some_and(|entry| entry.value().ask_again > Instant::now());
                if fresh { Op::Nop } else { Op::Put(self.ask(&host).await) }
            })
            .await;
        asked.into_entry().map(|entry| entry.into_value().targets).unwrap_or_default()
    }

    async fn ask(&self, host: &str) -> SrvEntry {
        for service in ["_matrix-fed", "_matrix"] {
            let Some(resolver) = &self.resolver else { break };
            let name = format!("{service}._tcp.{host}.");
            let Ok(Ok(answer)) = tokio::time::timeout(SRV_TIMEOUT, resolver.srv_lookup(name)).await else { continue };
            let records = answer.answers().iter().filter_map(|record| match &record.data {
                RData::SRV(srv) => Some(Record {
                    priority: srv.priority,
                    weight: srv.weight,
                    target: srv.target.to_utf8().trim_end_matches('.').to_owned(),
                    port: srv.port,
                }),
                _ => None,
            });
            let targets = in_order(records.collect(), || rand::rngs::OsRng.r#gen());
            if !targets.is_empty() {
                let lifetime = answer.valid_until().saturating_duration_since(Instant::now());
                let ask_again = Instant::now() + lifetime.clamp(SRV_LIFETIME.0, SRV_LIFETIME.1);
                return SrvEntry { targets: Arc::new(targets), ask_again };
            }
        }
        SrvEntry { targets: Arc::default(), ask_again: Instant::now() + NO_SRV_LIFETIME }
    }
}

impl TargetSource for SrvTargets {
    fn targets(&self, name: String) -> BoxFuture<'static, Targets> {
        let this = self.clone();
        Box::pin(async move { this.look_up(&name).await.to_vec() })
    }
}

struct Record {
    priority: u16,
    weight: u16,
    target: String,
    port: u16,
}

/// The order in which targets are tried: by priority, and within one priority at random by weight
/// (<https://www.rfc-editor.org/rfc/rfc2782>). The target `.` means that there is no such service.
fn in_order(records: Vec<Record>, mut random: impl FnMut() -> f64) -> Targets {
    let mut keyed: Vec<(u16, f64, Record)> = records
        .into_iter()
        .filter(|record| !record.target.is_empty() && record.port != 0)
        .map(|record| {
            // The smallest of exponentially distributed times: each wins in proportion to its weight.
            let weight = f64::from(record.weight).max(0.001);
            (record.priority, -random().max(f64::MIN_POSITIVE).ln() / weight, record)
        })
        .collect();
    keyed.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
    keyed.into_iter().take(MAX_TARGETS).map(|(_, _, record)| (record.target, record.port)).collect()
}

#[cfg(test)]
mod tests {
    use ruma::server_name;

    use super::*;

    struct Fixed {
        delegates: &'static [(&'static str, &'static str)],
        srv: &'static [&'static str],
    }

    impl Lookups for Fixed {
        async fn delegate(&self, host: &str) -> Option<OwnedServerName> {
            let found = self.delegates.iter().find(|(from, _)| *from == host);
            found.map(|(_, to)| OwnedServerName::try_from(*to).unwrap())
        }

        async fn has_srv(&self, host: &str) -> bool {
            self.srv.contains(&host)
        }
    }

    #[tokio::test]
    async fn hc_58_the_steps_of_the_spec() {
        let world = Fixed {
            delegates: &[
                ("d1.example", "1.2.3.4"),
                ("d2.example", "1.2.3.4:5678"),
                ("d3.example", "[2001:db8::1]"),
                ("d4.example", "fed.example:443"),
                ("d5.example", "srv.example"),
                ("d6.example", "plain.example"),
                ("loop.example", "loop.example"),
                ("chain.example", "d4.example"),
                ("srv.example", "srv.example"),
                ("1.2.3.4", "evil.example"),
                ("port.example", "evil.example"),
            ],
            srv: &["srv.example", "both.example", "port.example"],
        };
        for (name, base, host, dial) in [
            // 1: IP literals are never looked up.
            ("1.2.3.4", "https://1.2.3.4:8448", "1.2.3.4", Dial::Host),
            ("1.2.3.4:99", "https://1.2.3.4:99", "1.2.3.4:99", Dial::Host),
            ("[2001:db8::1]", "https://[2001:db8::1]:8448", "[2001:db8::1]", Dial::Host),
            ("[2001:db8::1]:99", "https://[2001:db8::1]:99", "[2001:db8::1]:99", Dial::Host),
            // 2: with a port neither .well-known nor SRV is asked.
            ("port.example:443", "https://port.example:443", "port.example:443", Dial::Host),
            // 3.1
            ("d1.example", "https://1.2.3.4:8448", "1.2.3.4", Dial::Host),
            ("d2.example", "https://1.2.3.4:5678", "1.2.3.4:5678", Dial::Host),
            ("d3.example", "https://[2001:db8::1]:8448", "[2001:db8::1]", Dial::Host),
            // 3.2
            ("d4.example", "https://fed.example:443", "fed.example:443", Dial::Host),
            // 3.3 and 3.4: the certificate and the Host header are the delegate's, whatever the target.
            ("d5.example", "https://srv.example", "srv.example", Dial::Srv),
            // 3.5
            ("d6.example", "https://plain.example:8448", "plain.example", Dial::Host),
            // A delegate is not asked for its own delegate.
            ("loop.example", "https://loop.example:8448", "loop.example", Dial::Host),
            ("chain.example", "https://d4.example:8448", "d4.example", Dial::Host),
            // 4 and 5
            ("both.example", "https://both.example", "both.example", Dial::Srv),
            // 6
            ("none.example", "https://none.example:8448", "none.example", Dial::Host),
        ] {
            let route = discover(<&ServerName>::try_from(name).unwrap(), &world).await;
            assert_eq!(route, Route { base: base.to_owned(), host: host.to_owned(), dial }, "{name}");
        }
    }

    #[tokio::test]
    async fn hc_05_a_host_that_looks_like_a_number_is_checked_as_an_address() {
        let route = discover(server_name!("2130706433"), &Fixed { delegates: &[], srv: &[] }).await;
        let url = url::Url::parse(&route.base).unwrap();
        assert_eq!(url.host_str(), Some("127.0.0.1"));
    }

    #[test]
    fn hc_58_targets_are_tried_by_priority_and_weight() {
        let record =
            |priority, weight, target: &str, port| Record { priority, weight, target: target.to_owned(), port };
        let records = || {
            vec![
                record(20, 5, "late", 1),
                record(10, 0, "never", 2),
                record(10, 50, "often", 3),
                record(10, 1, "", 4),
                record(5, 1, "no-port", 0),
            ]
        };
        let hosts = |random: f64| -> Vec<String> {
            in_order(records(), || random).into_iter().map(|(target, _)| target).collect()
        };
        assert_eq!(hosts(0.5), ["often", "never", "late"]);
        let many = (0..100).map(|n| record(n, 1, "t", 1)).collect();
        assert_eq!(in_order(many, || 0.5).len(), MAX_TARGETS);
    }
}
