//! Signed requests to other servers: discovered, dialled within policy, bounded in size and time, connections kept.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, Uri, header};
use http_body_util::Full;
use ruma::{OwnedServerName, ServerName};
use tokio::sync::Semaphore;
use url::Url;

use super::answers::{Answers, HeldAnswer};
use super::connector::{Federation, Fixed, Itself};
use super::dialler::{self, Answer, Http, Reach};
use super::discovery::{Dial, Network, Route, discover};
use super::srv::SrvTargets;
use super::x_matrix;
use crate::event::{Object, canonical_json, parse_answer};
use crate::identity::{KeyFetcher, SigningKey};
use crate::refusal::Refusal;

/// How the client reaches other servers.
#[derive(Debug, Clone, Default)]
pub struct ClientOptions {
    /// Certificate authorities trusted besides the system's, as PEM files.
    pub custom_ca: Vec<PathBuf>,
    /// Whether addresses of private and loopback networks may be dialled.
    pub allow_private_networks: bool,
    /// Servers whose base URL is given, without discovery.
    pub resolve: BTreeMap<OwnedServerName, Url>,
}

/// One request.
#[derive(Debug, Clone)]
pub struct Call {
    /// The method.
    pub method: Method,
    /// Path and query, percent-encoded, beginning with `/_matrix/`.
    pub uri: String,
    /// The body of PUT and POST, in canonical form.
    pub body: Option<Bytes>,
    /// How long everything may take.
    pub timeout: Duration,
    /// How many bytes the answer may have.
    pub limit: usize,
}

impl Call {
    /// A GET with the usual limits (30 s, 10 MiB).
    pub fn get(uri: impl Into<String>) -> Self {
        Self { method: Method::GET, uri: uri.into(), body: None, timeout: Duration::from_secs(30), limit: 10 << 20 }
    }

    /// A PUT with the usual limits (60 s, 1 MiB).
    pub fn put(uri: impl Into<String>, body: Object) -> Self {
        Self::put_canonical(uri, canonical_json(&body).into())
    }

    /// The same of a body that is in canonical form already.
    pub fn put_canonical(uri: impl Into<String>, body: Bytes) -> Self {
        let get = Self::get(uri);
        Self { method: Method::PUT, body: Some(body), timeout: Duration::from_secs(60), limit: 1 << 20, ..get }
    }

    /// A POST with the limits of a PUT.
    pub fn post(uri: impl Into<String>, body: Object) -> Self {
        Self { method: Method::POST, ..Self::put(uri, body) }
    }

    /// The same with room for a room's whole state in the answer (5 min, 64 MiB: about 100,000 members).
    pub fn with_state(self) -> Self {
        Self { timeout: Duration::from_secs(300), limit: 64 << 20, ..self }
    }
}

/// Why a request got no good answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RemoteError {
    /// The server answered with an error.
    #[error("{status} {errcode}: {error}")]
    Status {
        /// HTTP status.
        status: StatusCode,
        /// `errcode`, empty when the answer had none.
        errcode: String,
        /// `error`, at most 500 characters of it.
        error: String,
        /// How long it asks to be left alone: `Retry-After`, or else `retry_after_ms`.
        retry_after: Option<Duration>,
        /// Of M_WRONG_SERVER: who keeps the log, `hub_server`, as far as it says so.
        hub_server: Option<OwnedServerName>,
    },
    /// The server could not be found or reached, or did not answer in time.
    #[error("not reachable: {0}")]
    Unreachable(String),
    /// Its answer was too large or no JSON object.
    #[error("bad answer: {0}")]
    BadAnswer(String),
}

impl RemoteError {
    /// Whether the endpoint is not known there, so that another name of it should be tried: 404 or 405 with
    /// M_UNRECOGNIZED, or with no Matrix error at all.
    pub fn is_unrecognized(&self) -> bool {
        matches!(self, Self::Status { status, errcode, .. }
            if matches!(*status, StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED | StatusCode::BAD_REQUEST)
                && (errcode == "M_UNRECOGNIZED" || (errcode.is_empty() && *status != StatusCode::BAD_REQUEST)))
    }

    /// Whether the server is at work on another transaction of ours, and has not looked at this one: it is to be sent again as it is.
    pub fn is_busy(&self) -> bool {
        matches!(self, Self::Status { status, errcode, .. }
            if *status == StatusCode::BAD_REQUEST && errcode == "M_BAD_STATE")
    }

    /// As a refusal, with the server's name.
    pub fn into_refusal(self, server: &ServerName) -> Refusal {
        Refusal::Remote { server: server.to_string(), problem: self.to_string() }
    }

    /// Whether a server that answers so to an event may have taken it: it has not where it says that the request is at fault.
    pub fn may_have_taken(&self) -> bool {
        !matches!(self, Self::Status { status, .. }
            if status.is_client_error() && *status != StatusCode::REQUEST_TIMEOUT)
    }

    /// What another server answered to what a user of this one wants, as a verdict where it is one.
    pub fn into_verdict(self, server: &ServerName) -> Refusal {
        let Self::Status { status, errcode, error: text, .. } = &self else { return self.into_refusal(server) };
        match (*status, errcode.as_str()) {
            (StatusCode::FORBIDDEN, _) if text.is_empty() => {
                let says = if errcode.is_empty() { "no Matrix error" } else { errcode };
                Refusal::Forbidden(format!("{server}: {status}, {says}"))
            }
            (StatusCode::FORBIDDEN, _) => Refusal::Forbidden(format!("{server}: {text}")),
            (StatusCode::NOT_FOUND, "M_NOT_FOUND") => Refusal::NotFound(asked_for(server, text)),
            (_, "M_INCOMPATIBLE_ROOM_VERSION") => {
                Refusal::IncompatibleRoomVersion(format!("unknown here ({server}: {text})"))
            }
            _ => self.into_refusal(server),
        }
    }
}

/// What was not found, without saying twice that it was not.
fn asked_for(server: &ServerName, text: &str) -> String {
    if text.is_empty() || text.to_lowercase().contains("not found") {
        return format!("what {server} was asked for");
    }
    format!("what {server} was asked for ({text:?})")
}

/// The client; clones share connections and caches.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    server_name: OwnedServerName,
    signing_key: Arc<SigningKey>,
    /// Where an admin says that servers are.
    named: BTreeMap<OwnedServerName, (Route, Http)>,
    custom_ca: Vec<PathBuf>,
    network: Network,
    to_host: Http,
    to_srv: Http,
    /// For addresses to which others lead.
    to_url: Arc<Http>,
    reach: Reach,
    /// Anybody can make this server ask for keys; this many are asked at once.
    key_fetches: Semaphore,
}

/// How much of an error's body is read.
pub(super) const ERROR_LIMIT: usize = 16 << 10;
/// How large the keys of a server may be.
const KEYS_LIMIT: usize = 64 << 10;
/// How large a notary's answer about one server may be.
const NOTARY_LIMIT: usize = 256 << 10;
const KEYS_TIMEOUT: Duration = Duration::from_secs(20);
const KEY_FETCHES: usize = 256;
/// How long a fetch of keys waits for its turn.
const KEYS_TURN: Duration = Duration::from_secs(10);

impl Client {
    /// A client for the server `server_name`.
    pub fn new(
        server_name: OwnedServerName,
        signing_key: Arc<SigningKey>,
        options: ClientOptions,
    ) -> Result<Self, anyhow::Error> {
        Self::within(server_name, signing_key, options, Answers::default())
    }

    /// The same with another budget for answers.
    pub(super) fn within(
        server_name: OwnedServerName,
        signing_key: Arc<SigningKey>,
        options: ClientOptions,
        answers: Answers,
    ) -> Result<Self, anyhow::Error> {
        let tls = dialler::tls_config(&options.custom_ca)?;
        let reach = if options.allow_private_networks { Reach::Everything } else { Reach::Public };
        let srv = SrvTargets::new();
        let to_url = Arc::new(Http::new(tls.clone(), reach, Itself, answers.clone()));
        let named = options.resolve.into_iter().map(|(name, base)| {
            let route = named_route(&name, &base)?;
            let http = Http::new(tls.clone(), Reach::Everything, Fixed::new(&base)?, answers.clone());
            Ok::<_, anyhow::Error>((name, (route, http)))
        });
        Ok(Self {
            inner: Arc::new(Inner {
                named: named.collect::<Result<_, _>>()?,
                custom_ca: options.custom_ca,
                server_name,
                signing_key,
                network: Network::new(to_url.clone(), srv.clone()),
                to_host: Http::new(tls.clone(), reach, Federation, answers.clone()),
                to_srv: Http::new(tls.clone(), reach, srv, answers.clone()),
                to_url,
                reach,
                key_fetches: Semaphore::new(KEY_FETCHES),
            }),
        })
    }

    /// Sends a signed request and returns the JSON object that came back with status 200. `linearized` says how a GET is
    /// signed: with `content: {}` for servers that say `m.linearized`, without for others.
    pub async fn call(&self, destination: &ServerName, call: Call, linearized: bool) -> Result<Object, RemoteError> {
        Ok(self.call_held(destination, call, linearized).await?.0)
    }

    /// The same for an answer that may be large: it counts as held until the second part is dropped.
    pub async fn call_held(
        &self,
        destination: &ServerName,
        call: Call,
        linearized: bool,
    ) -> Result<(Object, HeldAnswer), RemoteError> {
        let signing = if linearized { Signing::WithContent } else { Signing::WithoutContent };
        self.within_timeout(destination, call, signing).await
    }

    /// Sends a GET that is not signed and returns the JSON object that came back with status 200.
    pub async fn get_json(&self, destination: &ServerName, call: Call) -> Result<Object, RemoteError> {
        Ok(self.within_timeout(destination, call, Signing::Unsigned).await?.0)
    }

    /// What time it is at `destination`, as it writes into the `Date` of its answers.
    pub async fn date(&self, destination: &ServerName) -> Option<String> {
        let call = Call { timeout: KEYS_TIMEOUT, limit: KEYS_LIMIT, ..Call::get("/_matrix/federation/v1/version") };
        let timeout = call.timeout;
        let answer =
            tokio::time::timeout(timeout, self.answer(destination, call, Signing::Unsigned)).await.ok()?.ok()?;
        Some(answer.headers.get(header::DATE)?.to_str().ok()?.to_owned())
    }

    async fn within_timeout(
        &self,
        destination: &ServerName,
        call: Call,
        signing: Signing,
    ) -> Result<(Object, HeldAnswer), RemoteError> {
        let timeout = call.timeout;
        // Discovery is within the time too.
        // Boxed, or the futures of whoever asks would nest too deeply for the compiler.
        match tokio::time::timeout(timeout, Box::pin(self.exchange(destination, call, signing))).await {
            Ok(answer) => answer,
            Err(_) => Err(RemoteError::Unreachable(format!("no answer within {timeout:?}"))),
        }
    }

    async fn exchange(
        &self,
        destination: &ServerName,
        call: Call,
        signing: Signing,
    ) -> Result<(Object, HeldAnswer), RemoteError> {
        read_answer(self.answer(destination, call, signing).await?)
    }

    async fn answer(&self, destination: &ServerName, call: Call, signing: Signing) -> Result<Answer, RemoteError> {
        let inner = &*self.inner;
        let (http, uri) = self.locate(destination, &call.uri).await?;
        let mut request = http.request(call.method.clone(), uri)?;
        let content = call.body;
        let signed = match (&content, signing) {
            (_, Signing::Unsigned) => None,
            (Some(content), _) => Some(Some(content.as_ref())),
            (None, Signing::WithContent) => Some(Some(b"{}".as_slice())),
            (None, Signing::WithoutContent) => Some(None),
        };
        if let Some(content) = signed {
            let authorization = x_matrix::header_for(
                &inner.server_name,
                destination,
                &inner.signing_key,
                &call.method,
                &call.uri,
                content,
            );
            request = request.header(header::AUTHORIZATION, authorization);
        }
        if content.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let request = request.body(Full::new(content.unwrap_or_default()));
        let request = request.map_err(|error| RemoteError::Unreachable(error.to_string()))?;
        let answer = http.send(destination.as_str(), request, call.timeout, call.limit, ERROR_LIMIT).await;
        let path = call.uri.split('?').next().unwrap_or_default();
        match &answer {
            Ok(answer) => {
                tracing::debug!(server = %destination, method = %call.method, path, status = %answer.status, "asked");
            }
            Err(error) => tracing::debug!(server = %destination, method = %call.method, path, %error, "asked in vain"),
        }
        answer
    }

    /// Where a server is, and what dials it.
    pub(super) async fn route(&self, destination: &ServerName) -> (Route, &Http) {
        if let Some((route, http)) = self.inner.named.get(destination) {
            return (route.clone(), http);
        }
        let route = discover(destination, &self.inner.network).await;
        let http = match route.dial {
            Dial::Srv => &self.inner.to_srv,
            Dial::Host | Dial::Named => &self.inner.to_host,
        };
        (route, http)
    }

    /// What dials addresses to which others lead, and which of them.
    pub(super) fn elsewhere(&self) -> (&Http, Reach) {
        (&self.inner.to_url, self.inner.reach)
    }

    /// Who signs, and by what.
    pub(super) fn own(&self) -> (&ServerName, &SigningKey) {
        (&self.inner.server_name, &self.inner.signing_key)
    }

    /// The certificate authorities that are trusted besides the system's.
    pub(super) fn custom_ca(&self) -> &[PathBuf] {
        &self.inner.custom_ca
    }

    /// The URI of `uri` at `destination`, and what dials it. What is signed must be what goes over the wire, so a `uri` that a
    /// URL parser would change is not sent.
    pub(super) async fn locate(&self, destination: &ServerName, uri: &str) -> Result<(&Http, Uri), RemoteError> {
        let (route, http) = self.route(destination).await;
        let text = format!("{}{uri}", route.base);
        let url = Url::parse(&text).map_err(|error| RemoteError::Unreachable(format!("{text:?}: {error}")))?;
        let path = &url[url::Position::BeforePath..url::Position::AfterQuery];
        if !uri.starts_with("/_matrix/") || !path.ends_with(uri) {
            return Err(RemoteError::Unreachable(format!("{uri:?} is not a normal path, {path:?} would be asked for")));
        }
        // Not from the URL, which leaves out the port 443.
        let whole = text.parse().map_err(|error| RemoteError::Unreachable(format!("{text:?}: {error}")))?;
        Ok((http, whole))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Signing {
    Unsigned,
    WithContent,
    WithoutContent,
}

/// An admin's word on where a server is: a base URL, over plain HTTP on this machine only.
fn named_route(name: &ServerName, base: &Url) -> Result<Route, anyhow::Error> {
    let loopback = match base.host() {
        Some(url::Host::Domain(host)) => host == "localhost",
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    };
    anyhow::ensure!(
        base.scheme() == "https" || (base.scheme() == "http" && loopback),
        "federation.resolve of {name}: {base} is neither https nor http to this machine"
    );
    anyhow::ensure!(
        base.query().is_none() && base.fragment().is_none() && base.username().is_empty(),
        "federation.resolve of {name}: {base} is more than a base URL"
    );
    let base = format!("{}://{name}{}", base.scheme(), base.path().trim_end_matches('/'));
    Ok(Route { base, dial: Dial::Named })
}

fn read_answer(answer: Answer) -> Result<(Object, HeldAnswer), RemoteError> {
    if answer.status == StatusCode::OK {
        let object = parse_answer(&answer.body).map_err(|refusal| RemoteError::BadAnswer(refusal.to_string()))?;
        return Ok((object, answer.held));
    }
    Err(failure(answer.status, &answer.headers, &answer.body))
}

pub(super) fn failure(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> RemoteError {
    let body: Object = serde_json::from_slice(body).unwrap_or_default();
    let text = |name: &str, length: usize| -> String {
        body.get(name).and_then(|value| value.as_str()).unwrap_or_default().chars().take(length).collect()
    };
    let (errcode, error) = (text("errcode", 100), text("error", 500));
    let hub_server = body.get("hub_server").and_then(|name| ServerName::parse(name.as_str()?).ok());
    RemoteError::Status { status, errcode, error, retry_after: retry_after(headers, &body), hub_server }
}

/// How long a server asks to be left alone. A date counts from the server's own, so that clocks need not agree.
/// <https://www.rfc-editor.org/rfc/rfc9110#field.retry-after>
fn retry_after(headers: &HeaderMap, body: &Object) -> Option<Duration> {
    let text = |name: header::HeaderName| headers.get(name)?.to_str().ok().map(str::trim);
    let date = |name| httpdate::parse_http_date(text(name)?).ok();
    let seconds = text(header::RETRY_AFTER).and_then(|text| text.parse().ok()).map(Duration::from_secs);
    let until = || date(header::RETRY_AFTER)?.duration_since(date(header::DATE)?).ok();
    let in_body = || body.get("retry_after_ms")?.as_u64().map(Duration::from_millis);
    seconds.or_else(until).or_else(in_body)
}

#[async_trait]
impl KeyFetcher for Client {
    async fn fetch_keys(&self, server: &ServerName) -> Result<Object, Refusal> {
        let call = Call { limit: KEYS_LIMIT, ..Call::get("/_matrix/key/v2/server") };
        self.keys(server, call).await
    }

    async fn ask_notary(
        &self,
        notary: &ServerName,
        server: &ServerName,
        minimum_valid_until_ts: i64,
    ) -> Result<Object, Refusal> {
        let uri = format!("/_matrix/key/v2/query/{server}?minimum_valid_until_ts={minimum_valid_until_ts}");
        let call = Call { limit: NOTARY_LIMIT, ..Call::get(uri) };
        self.keys(notary, call).await
    }
}

impl Client {
    async fn keys(&self, server: &ServerName, call: Call) -> Result<Object, Refusal> {
        let unavailable = |problem: String| Refusal::KeysUnavailable { server: server.to_string(), problem };
        let turn = tokio::time::timeout(KEYS_TURN, self.inner.key_fetches.acquire()).await;
        let turn = turn.map_err(|_| unavailable(format!("{KEY_FETCHES} servers are being asked already")))?;
        let _permit = turn.map_err(|error| unavailable(error.to_string()))?;
        let call = Call { timeout: KEYS_TIMEOUT, ..call };
        self.get_json(server, call).await.map_err(|error| unavailable(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_refusal_says_what_there_is_to_say() {
        let of = |body: &[u8]| {
            failure(StatusCode::FORBIDDEN, &HeaderMap::new(), body)
                .into_verdict(ruma::server_name!("a.example"))
                .to_string()
        };
        assert!(of(b"<html>").ends_with("a.example: 403 Forbidden, no Matrix error"), "{}", of(b"<html>"));
        let bare = of(br#"{"errcode":"M_FORBIDDEN"}"#);
        assert!(bare.ends_with("a.example: 403 Forbidden, M_FORBIDDEN"), "{bare}");
        assert!(of(br#"{"errcode":"M_FORBIDDEN","error":"no"}"#).ends_with("a.example: no"));
    }

    #[test]
    fn a_request_that_is_refused_as_such_was_not_taken() {
        let of = |status| failure(status, &HeaderMap::new(), b"{}").may_have_taken();
        for refused in
            [StatusCode::BAD_REQUEST, StatusCode::FORBIDDEN, StatusCode::NOT_FOUND, StatusCode::TOO_MANY_REQUESTS]
        {
            assert!(!of(refused), "{refused}");
        }
        for uncertain in [StatusCode::INTERNAL_SERVER_ERROR, StatusCode::GATEWAY_TIMEOUT, StatusCode::REQUEST_TIMEOUT] {
            assert!(of(uncertain), "{uncertain}");
        }
        assert!(RemoteError::BadAnswer("no JSON".to_owned()).may_have_taken());
        assert!(RemoteError::Unreachable("timed out".to_owned()).may_have_taken());
    }

    #[test]
    fn a_server_says_how_long_it_wants_to_be_left_alone() {
        let date = "Wed, 21 Oct 2015 07:28:00 GMT";
        let later = "Wed, 21 Oct 2015 07:30:00 GMT";
        for (headers, body, expected) in [
            (vec![], json!({}), None),
            (vec![("retry-after", "120")], json!({ "retry_after_ms": 5 }), Some(120_000)),
            (vec![], json!({ "retry_after_ms": 1500 }), Some(1500)),
            (vec![("retry-after", later), ("date", date)], json!({}), Some(120_000)),
            // What cannot be read says nothing.
            (vec![("retry-after", later)], json!({}), None),
            (vec![("retry-after", date), ("date", later)], json!({}), None),
            (vec![("retry-after", "-1")], json!({ "retry_after_ms": "7" }), None),
            (vec![("retry-after", "soon")], json!({ "retry_after_ms": -7 }), None),
            (vec![("retry-after", "99999999999999999999")], json!({ "retry_after_ms": 7 }), Some(7)),
        ] {
            let headers = headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
            let failure = failure(StatusCode::TOO_MANY_REQUESTS, &headers, body.to_string().as_bytes());
            let RemoteError::Status { retry_after, .. } = failure else { panic!() };
            assert_eq!(retry_after, expected.map(Duration::from_millis), "{headers:?} {body}");
        }
    }
}
