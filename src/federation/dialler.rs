//! Which addresses may be dialled, and the bounded HTTP client that dials no others. The addresses that are checked are the
//! ones that are dialled: there is no second look-up in between that could answer differently.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use futures::future::BoxFuture;
use http::{HeaderMap, StatusCode};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use url::{Host, Url};

use super::answers::{Answers, HeldAnswer};
use super::{Pace, RemoteError};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(10);
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long an answer may pause, and how fast it has to come, in bytes a second.
const PAUSE: Duration = Duration::from_secs(20);
const RATE: u32 = 32 << 10;
/// How many addresses of one name are tried.
const MAX_ADDRESSES: usize = 16;

/// Which addresses may be dialled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// Only addresses of the public internet.
    Public,
    /// All: an admin has allowed private networks, or has named the address.
    Everything,
}

impl Reach {
    fn allows(self, address: IpAddr) -> bool {
        self == Self::Everything || is_public(address)
    }
}

/// Whether an address belongs to a host of the public internet, after the IANA special-purpose registries
/// (<https://www.iana.org/assignments/iana-ipv4-special-registry>, `…ipv6…`).
pub(super) fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    let special = a == 0
        || a >= 224 // multicast, reserved, broadcast
        || address.is_loopback()
        || address.is_private()
        || address.is_link_local()
        || (a == 100 && (64..128).contains(&b)) // carrier-grade NAT
        || (a == 192 && b == 0 && (c == 0 || c == 2)) // protocol assignments, documentation
        || (a == 192 && b == 88 && c == 99) // 6to4 relays
        || (a == 198 && (b == 18 || b == 19)) // benchmarks
        || address.is_documentation();
    !special
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let segments = address.segments();
    let embedded = || {
        let [.., a, b, c, d] = address.octets();
        Ipv4Addr::new(a, b, c, d)
    };
    match segments {
        [0, 0, 0, 0, 0, 0xffff, ..] | [0x64, 0xff9b, 0, 0, 0, 0, ..] => is_public_v4(embedded()),
        // Protocol assignments (Teredo among them), documentation, 6to4.
        [0x2001, second, ..] if second < 0x200 || second == 0xdb8 => false,
        [0x2002, ..] | [0x3fff, 0..0x1000, ..] => false,
        // Of the rest only 2000::/3 is given out.
        [first, ..] => first & 0xe000 == 0x2000,
    }
}

/// A name's addresses and ports, in the order in which they are to be tried; port 0 stands for the URL's.
pub(super) type Targets = Vec<(String, u16)>;

/// Where the hosts to dial for a TLS name are looked up.
pub(super) trait TargetSource: Send + Sync + 'static {
    /// The hosts that stand behind `name`.
    fn targets(&self, name: String) -> BoxFuture<'static, Targets>;
}

/// The name itself.
pub(super) struct Itself;

impl TargetSource for Itself {
    fn targets(&self, name: String) -> BoxFuture<'static, Targets> {
        Box::pin(std::future::ready(vec![(name, 0)]))
    }
}

struct GuardedResolver<T> {
    targets: T,
    reach: Reach,
}

impl<T: TargetSource> Resolve for GuardedResolver<T> {
    fn resolve(&self, name: Name) -> Resolving {
        let (targets, reach) = (self.targets.targets(name.as_str().to_owned()), self.reach);
        Box::pin(async move {
            let mut found = Vec::new();
            let mut problem = format!("{} has no address", name.as_str());
            for (host, port) in targets.await {
                match tokio::time::timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host((host.as_str(), port))).await {
                    Ok(Ok(addresses)) => {
                        for address in addresses {
                            if reach.allows(address.ip()) {
                                found.push(address);
                            } else {
                                problem = format!("{host} is at {}, which may not be dialled", address.ip());
                            }
                        }
                    }
                    Ok(Err(error)) => problem = format!("{host}: {error}"),
                    Err(_) => problem = format!("{host} was not resolved in time"),
                }
            }
            if found.is_empty() {
                return Err(problem.into());
            }
            found.truncate(MAX_ADDRESSES);
            let found: Vec<SocketAddr> = found;
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

/// An HTTP client that follows no redirects, decodes nothing, keeps its connections, and reads within bounds.
pub(super) struct Http {
    client: reqwest::Client,
    reach: Reach,
    /// The bytes of answers that are being read, or not done with.
    answers: Answers,
}

/// An answer whose body was read within its limit.
pub(super) struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
    /// The bytes of its body, for as long as somebody works on it.
    pub held: HeldAnswer,
}

impl Http {
    pub(super) fn new(
        tls: rustls::ClientConfig,
        reach: Reach,
        targets: impl TargetSource,
        answers: Answers,
    ) -> Result<Self, reqwest::Error> {
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .http1_only()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(8)
            .tcp_keepalive(Duration::from_secs(30))
            .tcp_nodelay(true)
            .referer(false)
            .user_agent(concat!("isthmus/", env!("CARGO_PKG_VERSION")))
            .dns_resolver(Arc::new(GuardedResolver { targets, reach }))
            .build()?;
        Ok(Self { client, reach, answers })
    }

    /// Begins a request. Addresses that stand in the URL itself never reach the resolver, so they are checked here.
    pub(super) fn request(&self, method: http::Method, url: Url) -> Result<reqwest::RequestBuilder, RemoteError> {
        let literal = match url.host() {
            Some(Host::Ipv4(address)) => Some(IpAddr::V4(address)),
            Some(Host::Ipv6(address)) => Some(IpAddr::V6(address)),
            _ => None,
        };
        if let Some(address) = literal.filter(|address| !self.reach.allows(*address)) {
            return Err(RemoteError::Unreachable(format!("{address} may not be dialled")));
        }
        Ok(self.client.request(method, url))
    }

    /// Sends a request and reads its answer: all of it within `timeout`, its body within `limit` bytes, or within
    /// `error_limit` when the status is not 200, and all bodies of `server` within its share of what is held of all.
    pub(super) async fn send(
        &self,
        server: &str,
        request: reqwest::RequestBuilder,
        timeout: Duration,
        limit: usize,
        error_limit: usize,
    ) -> Result<Answer, RemoteError> {
        let exchange = async {
            let response = request.send().await.map_err(|error| unreachable(&error))?;
            let (status, headers) = (response.status(), response.headers().clone());
            let address = response.remote_addr().map(|address| address.ip());
            let mut held = self.answers.hold(server, address);
            let body = if status == StatusCode::OK {
                read(response, limit, &mut held).await?
            } else {
                // The status says enough when its explanation is too long or does not come.
                read(response, error_limit, &mut held).await.unwrap_or_default()
            };
            Ok(Answer { status, headers, body, held })
        };
        match tokio::time::timeout(timeout, exchange).await {
            Ok(answer) => answer,
            Err(_) => Err(RemoteError::Unreachable(format!("no answer within {timeout:?}"))),
        }
    }
}

async fn read(response: reqwest::Response, limit: usize, held: &mut HeldAnswer) -> Result<Bytes, RemoteError> {
    let too_large = || RemoteError::BadAnswer(format!("its body is longer than {limit} bytes"));
    if response.content_length().is_some_and(|length| usize::try_from(length).map_or(true, |length| length > limit)) {
        return Err(too_large());
    }
    let mut body = BytesMut::new();
    let mut stream = response.bytes_stream();
    let mut pace = Pace::new(PAUSE, RATE);
    let too_slow = |_| RemoteError::Unreachable(format!("its answer paused for {PAUSE:?}, or comes too slowly"));
    while let Some(chunk) = tokio::time::timeout_at(pace.until(), stream.next()).await.map_err(too_slow)? {
        let chunk = chunk.map_err(|error| unreachable(&error))?;
        if body.len().saturating_add(chunk.len()) > limit {
            return Err(too_large());
        }
        let since = tokio::time::Instant::now();
        if !held.grow(chunk.len()).await {
            let problem = "its answers, or those of all servers, are too much to work on at once";
            return Err(RemoteError::Unreachable(problem.to_owned()));
        }
        pace.resume(since);
        pace.took(chunk.len());
        body.extend_from_slice(&chunk);
    }
    Ok(body.freeze())
}

/// The innermost cause says what happened; the outer ones only that a request failed.
fn unreachable(error: &reqwest::Error) -> RemoteError {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    RemoteError::Unreachable(cause.to_string())
}

/// The TLS of requests: the system's certificate authorities and those in the PEM files.
pub(super) fn tls_config(custom_ca: &[PathBuf]) -> Result<rustls::ClientConfig, anyhow::Error> {
    let provider = crypto_provider();
    let mut extra: Vec<CertificateDer<'static>> = Vec::new();
    for path in custom_ca {
        let problem =
            |error| anyhow::anyhow!("`federation.custom_ca` names {}, which cannot be used: {error}", path.display());
        let certificates = CertificateDer::pem_file_iter(path).map_err(problem)?;
        let before = extra.len();
        for certificate in certificates {
            extra.push(certificate.map_err(problem)?);
        }
        anyhow::ensure!(
            extra.len() > before,
            "`federation.custom_ca` names {}, in which there is no PEM certificate",
            path.display()
        );
    }
    let builder =
        rustls::ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
    let verifier: Arc<dyn ServerCertVerifier> =
        match rustls_platform_verifier::Verifier::new_with_extra_roots(extra, provider) {
            Ok(verifier) => Arc::new(verifier),
            Err(error) => {
                tracing::warn!(%error, "no certificate authority is trusted: no request over TLS will succeed");
                return Ok(builder.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth());
            }
        };
    Ok(builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth())
}

/// The cryptography of TLS, made the process's default at the first call.
pub fn crypto_provider() -> Arc<CryptoProvider> {
    if CryptoProvider::get_default().is_none() {
        // Somebody else may have been quicker; theirs is as good.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    }
    CryptoProvider::get_default().cloned().unwrap_or_else(|| Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hc_57_only_public_addresses_are_dialled() {
        for private in [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.255.255",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.1.1",
            "198.18.0.1",
            "198.51.100.7",
            "203.0.113.9",
            "224.0.0.1",
            "239.1.1.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::127.0.0.1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::ffff:169.254.169.254",
            "64:ff9b::10.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
            "100::1",
            "2001::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "3fff::1",
            "5f00::1",
            "fc00::1",
            "fd12:3456::1",
            "fe80::1",
            "fec0::1",
            "ff02::1",
        ] {
            let address: IpAddr = private.parse().unwrap();
            assert!(!is_public(address), "{private}");
            assert!(!Reach::Public.allows(address) && Reach::Everything.allows(address));
        }
        for public in [
            "1.1.1.1",
            "100.63.255.255",
            "100.128.0.1",
            "172.15.0.1",
            "172.32.0.1",
            "192.0.1.1",
            "198.17.0.1",
            "198.20.0.1",
            "223.255.255.255",
            "::ffff:1.1.1.1",
            "64:ff9b::1.1.1.1",
            "2001:4860:4860::8888",
            "2606:4700::1111",
            "2a00:1450::1",
            "3ffe::1",
        ] {
            assert!(is_public(public.parse().unwrap()), "{public}");
        }
    }

    fn http(reach: Reach) -> Http {
        Http::new(tls_config(&[]).unwrap(), reach, Itself, Answers::default()).unwrap()
    }

    #[tokio::test]
    async fn hc_57_names_of_private_addresses_are_refused_after_the_look_up() {
        let resolver = GuardedResolver { targets: Itself, reach: Reach::Public };
        let error = resolver.resolve("localhost".parse().unwrap()).await.map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("may not be dialled"), "{error}");
        let resolver = GuardedResolver { targets: Itself, reach: Reach::Everything };
        assert!(resolver.resolve("localhost".parse().unwrap()).await.unwrap().all(|found| found.ip().is_loopback()));
    }

    #[test]
    fn hc_57_literals_are_refused_however_they_are_written() {
        for url in [
            "http://127.0.0.1/",
            "http://2130706433/",
            "http://0x7f.1/",
            "http://0177.0.0.1/",
            "http://[::ffff:7f00:1]/",
        ] {
            let url: Url = url.parse().unwrap();
            assert!(http(Reach::Public).request(http::Method::GET, url.clone()).is_err(), "{url}");
            assert!(http(Reach::Everything).request(http::Method::GET, url).is_ok());
        }
    }
}
