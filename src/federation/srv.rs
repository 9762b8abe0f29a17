//! SRV records: which service is asked for first, in which order targets are tried, and for how long records are believed.
//! <https://spec.matrix.org/latest/server-server-api/#resolving-server-names>

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::rr::RData;
use hickory_resolver::{ResolverBuilder, TokioResolver};
use moka::future::Cache;
use moka::ops::compute::Op;
use rand::Rng as _;

use super::connector::{TargetSource, Targets};
use super::discovery::CACHED;
use crate::admin::metrics::CacheMeter;

/// For how long SRV records, or that there are none, are believed, whatever their own lifetime.
const SRV_LIFETIME: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3600));
const NO_SRV_LIFETIME: Duration = Duration::from_secs(300);
const SRV_TIMEOUT: Duration = Duration::from_secs(5);
/// How many targets of SRV records are kept.
const MAX_TARGETS: usize = 8;

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

impl SrvTargets {
    /// SRV records by the system's resolver.
    pub(super) fn new() -> Self {
        let resolver = TokioResolver::builder_tokio().and_then(build);
        Self::with(resolver.inspect_err(|error| tracing::warn!(%error, "no SRV records will be looked up")).ok())
    }

    fn with(resolver: Option<TokioResolver>) -> Self {
        let cache = Cache::new(CACHED);
        Self { resolver, meter: CacheMeter::watch("srv", &cache), cache }
    }

    pub(super) async fn look_up(&self, host: &str) -> Arc<Targets> {
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

fn build(mut builder: ResolverBuilder<TokioRuntimeProvider>) -> Result<TokioResolver, NetError> {
    builder.options_mut().timeout = Duration::from_secs(2);
    builder.options_mut().attempts = 2;
    builder.build()
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
    use std::sync::Mutex;

    use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig};
    use hickory_resolver::proto::op::{Message, ResponseCode};
    use hickory_resolver::proto::rr::rdata::SRV;
    use hickory_resolver::proto::rr::{Name, Record as DnsRecord};
    use tokio::net::UdpSocket;

    use super::*;

    /// A name server on loopback and what it was asked for; it ends with the test's runtime.
    struct NameServer {
        asked: Arc<Mutex<Vec<String>>>,
        targets: SrvTargets,
    }

    impl NameServer {
        /// One that has a record with this target and lifetime for each of these names.
        async fn new(records: &'static [(&'static str, &'static str, u32)]) -> Self {
            let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let port = socket.local_addr().unwrap().port();
            let asked: Arc<Mutex<Vec<String>>> = Arc::default();
            let log = asked.clone();
            tokio::spawn(async move {
                let mut buffer = [0; 1500];
                loop {
                    let (length, from) = socket.recv_from(&mut buffer).await.unwrap();
                    let mut message = Message::from_vec(&buffer[..length]).unwrap().into_response();
                    let name = message.queries[0].name().clone();
                    let text = name.to_utf8().to_ascii_lowercase();
                    let found = records.iter().filter(|(known, ..)| *known == text);
                    let answers = found.map(|(_, target, lifetime)| {
                        let srv = SRV::new(0, 0, 443, Name::from_utf8(target).unwrap());
                        DnsRecord::from_rdata(name.clone(), *lifetime, RData::SRV(srv))
                    });
                    message.answers = answers.collect();
                    if message.answers.is_empty() {
                        message.metadata.response_code = ResponseCode::NXDomain;
                    }
                    log.lock().unwrap().push(text);
                    socket.send_to(&message.to_vec().unwrap(), from).await.unwrap();
                }
            });
            let mut connection = ConnectionConfig::udp();
            connection.port = port;
            let mut server = NameServerConfig::udp([127, 0, 0, 1].into());
            server.connections = vec![connection];
            let config = ResolverConfig::from_parts(None, Vec::new(), vec![server]);
            let builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
            Self { asked, targets: SrvTargets::with(Some(build(builder).unwrap())) }
        }

        /// What it was asked for since the last time.
        fn asked(&self) -> Vec<String> {
            std::mem::take(&mut self.asked.lock().unwrap())
        }
    }

    #[tokio::test]
    async fn hc_58_the_new_service_is_asked_for_first_and_the_old_one_when_it_is_not_there() {
        let dns = NameServer::new(&[
            ("_matrix-fed._tcp.both.example.", "new.example.", 600),
            ("_matrix._tcp.both.example.", "old.example.", 600),
            ("_matrix._tcp.old.example.", "old.example.", 600),
            // There is no such service, says the one: that is no target.
            ("_matrix-fed._tcp.off.example.", ".", 600),
        ])
        .await;
        for (host, target, asked) in [
            ("both.example", Some("new.example"), &["_matrix-fed._tcp.both.example."][..]),
            ("old.example", Some("old.example"), &["_matrix-fed._tcp.old.example.", "_matrix._tcp.old.example."]),
            ("none.example", None, &["_matrix-fed._tcp.none.example.", "_matrix._tcp.none.example."]),
            ("off.example", None, &["_matrix-fed._tcp.off.example.", "_matrix._tcp.off.example."]),
        ] {
            let found = dns.targets.look_up(host).await;
            assert_eq!(found.first(), target.map(|target| (target.to_owned(), 443)).as_ref(), "{host}");
            assert_eq!(dns.asked(), asked, "{host}");
        }
    }

    #[tokio::test]
    async fn many_ask_once_and_the_answer_is_kept_for_its_lifetime_within_bounds() {
        let dns = NameServer::new(&[
            ("_matrix-fed._tcp.short.example.", "t.example.", 1),
            ("_matrix-fed._tcp.fair.example.", "t.example.", 600),
            ("_matrix-fed._tcp.long.example.", "t.example.", 80_000),
        ])
        .await;
        let hosts = ["Fair.example", "fair.example"];
        let many = (0..20).map(|n| dns.targets.look_up(hosts[n % 2]));
        for found in futures::future::join_all(many).await {
            assert_eq!(found.len(), 1);
        }
        assert_eq!(dns.asked().len(), 1);
        for (host, lifetime) in
            [("short.example", 60), ("fair.example", 600), ("long.example", 3600), ("none.example", 300)]
        {
            dns.targets.look_up(host).await;
            let left = dns.targets.cache.get(host).await.unwrap().ask_again - Instant::now();
            assert!((lifetime - 30..=lifetime).contains(&left.as_secs()), "{host}: {left:?}");
        }
        dns.asked();
        // What is not there is remembered too, and what is outdated is asked for again.
        dns.targets.look_up("none.example").await;
        assert_eq!(dns.asked(), [""; 0]);
        let outdated = SrvEntry { targets: Arc::default(), ask_again: Instant::now() };
        dns.targets.cache.insert("other.example".to_owned(), outdated).await;
        dns.targets.look_up("other.example").await;
        assert_eq!(dns.asked().len(), 2);
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
