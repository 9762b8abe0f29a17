//! Where a server is found: IP literal, explicit port, `.well-known`, SRV, port 8448, in this order.
//! <https://spec.matrix.org/latest/server-server-api/#resolving-server-names>

use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use moka::future::Cache;
use moka::ops::compute::Op;
use ruma::{OwnedServerName, ServerName};

use super::dialler::Http;
use super::srv::SrvTargets;
use super::well_known::{self, Entry};
use crate::admin::metrics::CacheMeter;

/// How a server is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Route {
    /// The beginning of URLs: its authority is what the server is asked as (`Host`, `:authority`).
    pub base: String,
    /// What is dialled, and so for which name the certificate must be.
    pub dial: Dial,
}

/// What is dialled for a URL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dial {
    /// The URL's host, at port 8448 unless it has another.
    Host,
    /// The targets of the host's SRV records.
    Srv,
    /// Where an admin says that the server is.
    Named,
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
    Route { base: format!("https://{name}"), dial: Dial::Host }
}

async fn by_srv(host: &str, lookups: &impl Lookups) -> Route {
    let dial = if lookups.has_srv(host).await { Dial::Srv } else { Dial::Host };
    Route { base: format!("https://{host}"), dial }
}

/// How many hosts are remembered.
pub(super) const CACHED: u64 = 20_000;

/// The look-ups of the real world, each host asked once at a time, and the answers remembered.
#[derive(Clone)]
pub(super) struct Network {
    http: Arc<Http>,
    well_known: Cache<String, Entry>,
    well_known_meter: CacheMeter,
    srv: SrvTargets,
}

impl Network {
    /// Look-ups that fetch `.well-known` through `http`.
    pub(super) fn new(http: Arc<Http>, srv: SrvTargets) -> Self {
        let well_known = Cache::new(CACHED);
        Self { http, well_known_meter: CacheMeter::watch("well_known", &well_known), well_known, srv }
    }

    /// Lets the time pass after which `host` is asked again.
    #[cfg(test)]
    pub(super) async fn outdate(&self, host: &str) {
        if let Some(mut entry) = self.well_known.get(host).await {
            entry.ask_again = Instant::now();
            self.well_known.insert(host.to_owned(), entry).await;
        }
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

#[cfg(test)]
mod tests {
    use ruma::server_name;

    use super::super::connector::{Federation, TargetSource as _};
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
        for (name, dialled, host, dial) in [
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
            assert_eq!(route, Route { base: format!("https://{host}"), dial }, "{name}");
            if dial == Dial::Host {
                let at = Federation.dialled(route.base.parse().unwrap()).to_string();
                assert_eq!(at.trim_end_matches('/'), dialled, "{name}");
            }
        }
    }

    #[tokio::test]
    async fn hc_05_a_host_that_looks_like_a_number_is_checked_as_an_address() {
        let route = discover(server_name!("2130706433"), &Fixed { delegates: &[], srv: &[] }).await;
        let url = url::Url::parse(&route.base).unwrap();
        assert_eq!(url.host_str(), Some("127.0.0.1"));
    }
}
