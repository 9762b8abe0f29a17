//! Which addresses may be dialled, and the bounded HTTP client that dials no others. The addresses that are checked are the
//! ones that are dialled: there is no second look-up in between that could answer differently.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Request, Response, StatusCode, Uri, header, request};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body as _, Incoming};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpInfo;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use super::answers::{Answers, HeldAnswer};
use super::connector::{Connector, TargetSource};
use super::{Pace, RemoteError};

const USER_AGENT: &str = concat!("isthmus/", env!("CARGO_PKG_VERSION"));
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long an answer may pause, and how fast it has to come, in bytes a second.
const PAUSE: Duration = Duration::from_secs(20);
const RATE: u32 = 32 << 10;
/// How long an HTTP/2 connection with requests under way may be silent before it is asked whether it lives, and then may take
/// to say so: all requests to a server go over one, so a dead one must not hold them up until each has run out of time.
const PING: Duration = Duration::from_secs(10);
/// How many bytes of an answer an HTTP/2 server may send ahead of what is read of it. What lies there counts as held by nobody,
/// and a large answer must still come at megabytes a second from far away.
const WINDOW: u32 = 512 << 10;
/// Up to how many bytes an answer is a short one. The others come over connections of their own: what waits there, for room or
/// for a slow reader of media, fills a connection's window, and transactions must not wait behind it.
const SHORT: usize = 1 << 20;
/// How many answers that nobody reads on an HTTP/2 connection holds before it holds up the rest: short ones and others.
const UNREAD: (u32, u32) = (2, 16);
/// How many bytes the headers of an answer may have, by HTTP/1.1 (with what is read ahead of the body) and by HTTP/2.
const HEADERS_1: usize = 400 << 10;
const HEADERS_2: u32 = 32 << 10;
/// How often a request is sent again that the server says not to have begun with.
const UNTOUCHED: usize = 2;

/// Which addresses may be dialled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// Only addresses of the public internet.
    Public,
    /// All: an admin has allowed private networks, or has named the address.
    Everything,
}

impl Reach {
    pub(super) fn allows(self, address: IpAddr) -> bool {
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

/// An HTTP client that follows no redirects, decodes nothing, keeps its connections, and reads within bounds.
pub(super) struct Http {
    short: legacy::Client<Connector, Full<Bytes>>,
    long: legacy::Client<Connector, Full<Bytes>>,
    connector: Connector,
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
    pub(super) fn new(tls: rustls::ClientConfig, reach: Reach, targets: impl TargetSource, answers: Answers) -> Self {
        Self::pinging(tls, reach, targets, answers, PING)
    }

    /// The same, which asks a silent HTTP/2 connection after `ping` whether it lives, and gives it as long to say so.
    pub(super) fn pinging(
        tls: rustls::ClientConfig,
        reach: Reach,
        targets: impl TargetSource,
        answers: Answers,
        ping: Duration,
    ) -> Self {
        let connector = Connector::new(tls, reach, Arc::new(targets));
        let client = |unread: u32| {
            legacy::Client::builder(TokioExecutor::new())
                .timer(TokioTimer::new())
                .pool_timer(TokioTimer::new())
                .pool_idle_timeout(IDLE_TIMEOUT)
                .pool_max_idle_per_host(8)
                .http1_max_buf_size(HEADERS_1)
                .http2_max_header_list_size(HEADERS_2)
                .http2_initial_stream_window_size(WINDOW)
                .http2_initial_connection_window_size(WINDOW.saturating_mul(unread))
                .http2_keep_alive_interval(ping)
                .http2_keep_alive_timeout(ping)
                .build(connector.clone())
        };
        let (short, long) = (client(UNREAD.0), client(UNREAD.1));
        Self { short, long, connector, answers }
    }

    /// Begins a request. The authority of `uri` is what the server is asked as: `Host`, or `:authority`.
    pub(super) fn request(&self, method: http::Method, uri: Uri) -> Result<request::Builder, RemoteError> {
        self.dialled(uri.clone())?;
        let mut request = Request::builder().method(method);
        // By itself `Host` would be without a port that is the scheme's own; a server name's port is part of the name.
        if let Some(authority) = uri.authority().filter(|authority| authority.port().is_some()) {
            request = request.header(header::HOST, authority.as_str());
        }
        Ok(request.uri(uri).header(header::USER_AGENT, USER_AGENT).header(header::ACCEPT, "*/*"))
    }

    /// What is dialled for `uri`, if that may be: its host is the name that the certificate must be for.
    pub(super) fn dialled(&self, uri: Uri) -> Result<Uri, RemoteError> {
        self.connector.dialled(uri).map_err(RemoteError::Unreachable)
    }

    /// Sends a request and reads its answer: all of it within `timeout`, its body within `limit` bytes, or within
    /// `error_limit` when the status is not 200, and all bodies of `server` within its share of what is held of all.
    pub(super) async fn send(
        &self,
        server: &str,
        request: Request<Full<Bytes>>,
        timeout: Duration,
        limit: usize,
        error_limit: usize,
    ) -> Result<Answer, RemoteError> {
        let exchange = async {
            let (head, body) = self.exchange(request, limit).await?.into_parts();
            let address = head.extensions.get::<HttpInfo>().map(|info| info.remote_addr().ip());
            let mut held = self.answers.hold(server, address);
            let body = if head.status == StatusCode::OK {
                read(body, limit, &mut held).await?
            } else {
                // The status says enough when its explanation is too long or does not come.
                read(body, error_limit, &mut held).await.unwrap_or_default()
            };
            Ok(Answer { status: head.status, headers: head.headers, body, held })
        };
        match tokio::time::timeout(timeout, exchange).await {
            Ok(answer) => answer,
            Err(_) => Err(RemoteError::Unreachable(format!("no answer within {timeout:?}"))),
        }
    }

    /// Sends a request, and returns when the head of its answer is there, whose body may have `limit` bytes.
    pub(super) async fn exchange(
        &self,
        request: Request<Full<Bytes>>,
        limit: usize,
    ) -> Result<Response<Incoming>, RemoteError> {
        let client = if limit <= SHORT { &self.short } else { &self.long };
        for _ in 0..UNTOUCHED {
            match client.request(request.clone()).await {
                Err(error) if is_untouched(&error) => {}
                answer => return answer.map_err(|error| unreachable(&error)),
            }
        }
        client.request(request).await.map_err(|error| unreachable(&error))
    }
}

/// Whether the server says that it has not begun with the request: the connection is about to end, or has too much to do.
/// <https://www.rfc-editor.org/rfc/rfc9113#section-8.7>
fn is_untouched(error: &legacy::Error) -> bool {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<h2::Error>().filter(|error| error.is_remote()) {
            return (error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR))
                || (error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM));
        }
        cause = error.source();
    }
    false
}

async fn read(mut incoming: Incoming, limit: usize, held: &mut HeldAnswer) -> Result<Bytes, RemoteError> {
    let too_large = || RemoteError::BadAnswer(format!("its body is longer than {limit} bytes"));
    if usize::try_from(incoming.size_hint().lower()).map_or(true, |length| length > limit) {
        return Err(too_large());
    }
    let mut body = BytesMut::new();
    let mut pace = Pace::new(PAUSE, RATE);
    let too_slow = |_| RemoteError::Unreachable(format!("its answer paused for {PAUSE:?}, or comes too slowly"));
    while let Some(frame) = tokio::time::timeout_at(pace.until(), incoming.frame()).await.map_err(too_slow)? {
        let Ok(chunk) = frame.map_err(|error| unreachable(&error))?.into_data() else { continue };
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
pub(super) fn unreachable(error: &(dyn std::error::Error + 'static)) -> RemoteError {
    let mut cause = error;
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
    use super::super::connector::Itself;
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
        Http::new(tls_config(&[]).unwrap(), reach, Itself, Answers::default())
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
            let url: Uri = url.parse().unwrap();
            assert!(http(Reach::Public).request(http::Method::GET, url.clone()).is_err(), "{url}");
            assert!(http(Reach::Everything).request(http::Method::GET, url).is_ok());
        }
    }
}
