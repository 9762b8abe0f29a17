//! The suite's own server: serves its keys, takes transactions and invites, and keeps everything that comes from the examined server
//! for the checks to look at.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::to_bytes;
use axum::extract::{Request, State};
use axum::response::{IntoResponse as _, Response};
use axum_server::Handle;
use axum_server::tls_rustls::RustlsConfig;
use http::{StatusCode, header};
use percent_encoding::percent_decode_str;
use ruma::OwnedServerName;
use ruma::api::federation::authentication::XMatrix;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::hub::HubRoom;
use super::wire::Identity;
use crate::clock::SharedClock;
use crate::event::{Object, Pdu, Redaction};
use crate::federation::crypto_provider;

/// For how long a join waits for the invite before it to be in the log: so often it is looked, with this pause between.
const INVITE_LOOKS: u32 = 250;
const INVITE_PAUSE: Duration = Duration::from_millis(20);

/// How large a request may be.
const BODY_LIMIT: usize = 32 << 20;
/// How many requests are kept.
const KEPT: usize = 20_000;

/// A request that came.
#[derive(Debug, Clone)]
pub(super) struct Arrival {
    /// The server that it was meant for.
    pub to: OwnedServerName,
    pub method: String,
    /// Path and query as they were sent.
    pub uri: String,
    /// The endpoint's name, as `send`.
    pub endpoint: String,
    /// What follows the name, decoded.
    pub segments: Vec<String>,
    pub authorization: Vec<String>,
    pub body: Option<Value>,
    /// Whether another transaction for the same server was still being answered.
    pub overlapped: bool,
    /// The status that it was answered with; none while it is being answered.
    pub answered: Option<u16>,
}

/// How the suite's server behaves just now.
#[derive(Debug, Default)]
pub(super) struct Manners {
    /// So many transactions are answered with an error.
    pub refuse: usize,
    /// The next transaction is answered so late.
    pub delay: Option<Duration>,
    /// Whether an invite is on its way whose answer is not in the log yet. Whoever accepts it at once must wait for that.
    pub inviting: bool,
    /// What invites are answered with instead of a signature.
    pub refuse_invites: Option<(u16, Value)>,
}

/// The listener's state.
pub(super) struct Ear {
    pub identities: Vec<Arc<Identity>>,
    /// The server that is examined.
    target: OwnedServerName,
    pub manners: Mutex<Manners>,
    /// The room that the suite is the hub of.
    pub room: Mutex<Option<HubRoom>>,
    arrivals: Mutex<Vec<Arrival>>,
    gave_keys: AtomicBool,
    news: watch::Sender<u64>,
    clock: SharedClock,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ear {
    pub fn new(identities: Vec<Arc<Identity>>, target: OwnedServerName, clock: SharedClock) -> Arc<Self> {
        Arc::new(Self {
            identities,
            target,
            manners: Mutex::default(),
            room: Mutex::default(),
            arrivals: Mutex::default(),
            gave_keys: AtomicBool::new(false),
            news: watch::Sender::new(0),
            clock,
        })
    }

    /// Whether anybody has asked for keys.
    pub fn gave_keys(&self) -> bool {
        self.gave_keys.load(Ordering::Relaxed)
    }

    /// Everything that came from the target, in the order in which it came.
    pub fn arrivals(&self) -> Vec<Arrival> {
        lock(&self.arrivals).clone()
    }

    /// Waits for something that `find` finds in what came.
    pub async fn wait<T>(&self, limit: Duration, find: impl Fn(&[Arrival]) -> Option<T>) -> Option<T> {
        let mut news = self.news.subscribe();
        let waiting = async {
            loop {
                news.borrow_and_update();
                if let Some(found) = find(&lock(&self.arrivals)) {
                    return Some(found);
                }
                news.changed().await.ok()?;
            }
        };
        tokio::time::timeout(limit, waiting).await.ok().flatten()
    }

    fn tell(&self) {
        self.news.send_modify(|news| *news = news.wrapping_add(1));
    }

    /// Which of the suite's servers a request is for: by the destination it names, or else by its host.
    fn identity(&self, host: &str, authorization: &[String]) -> Option<Arc<Identity>> {
        let named = |identity: &&Arc<Identity>| {
            let name = identity.name.as_str();
            authorization.iter().any(|header| header.contains(&format!("destination=\"{name}\"")))
        };
        let by_host = |identity: &&Arc<Identity>| identity.name == host || identity.name.host() == host;
        let found = self.identities.iter().find(named).or_else(|| self.identities.iter().find(by_host));
        found.or_else(|| self.identities.first()).cloned()
    }

    /// Whether a server that is not examined says that a request is its own. One that nobody says to have sent is the target's.
    fn is_of_another(&self, authorization: &[String]) -> bool {
        let claimed: Vec<XMatrix> = authorization.iter().filter_map(|header| XMatrix::parse(header).ok()).collect();
        !claimed.is_empty() && claimed.iter().all(|claimed| claimed.origin != self.target)
    }

    async fn answer(self: Arc<Self>, request: Request) -> Response {
        let (head, body) = request.into_parts();
        let text = |name| head.headers.get(name).and_then(|value: &http::HeaderValue| value.to_str().ok());
        let host = text(header::HOST).unwrap_or_default().to_owned();
        let authorization: Vec<String> = head
            .headers
            .get_all(header::AUTHORIZATION)
            .iter()
            .filter_map(|value| value.to_str().ok().map(str::to_owned))
            .collect();
        let uri = head.uri.path_and_query().map(|uri| uri.as_str().to_owned()).unwrap_or_default();
        let Some(identity) = self.identity(&host, &authorization) else {
            return StatusCode::NOT_FOUND.into_response();
        };
        if head.uri.path().starts_with("/_matrix/key/v2/server") {
            self.gave_keys.store(true, Ordering::Relaxed);
            return json_answer(200, Value::Object(identity.keys(self.clock.now_ms())));
        }
        let Ok(bytes) = to_bytes(body, BODY_LIMIT).await else { return json_answer(413, error("M_TOO_LARGE")) };
        let (endpoint, segments) = name_of(head.uri.path());
        if self.is_of_another(&authorization) {
            // Whoever still has something for a server of the suite's name is thanked, so that it does not come again.
            return match endpoint.as_str() {
                "send" => json_answer(200, json!({ "failed_pdus": {} })),
                _ => json_answer(403, error("M_FORBIDDEN")),
            };
        }
        let place = {
            let mut arrivals = lock(&self.arrivals);
            if arrivals.len() >= KEPT {
                return json_answer(429, error("M_LIMIT_EXCEEDED"));
            }
            let same = |arrival: &Arrival| {
                arrival.endpoint == "send" && arrival.to == identity.name && arrival.answered.is_none()
            };
            let overlapped = endpoint == "send" && arrivals.iter().any(same);
            arrivals.push(Arrival {
                to: identity.name.clone(),
                method: head.method.to_string(),
                uri,
                endpoint,
                segments,
                authorization,
                body: serde_json::from_slice(&bytes).ok(),
                overlapped,
                answered: None,
            });
            arrivals.len().saturating_sub(1)
        };
        let arrival = lock(&self.arrivals).get(place).cloned();
        let (status, body) = match arrival {
            Some(arrival) => self.react(&identity, &arrival).await,
            None => (500, error("M_UNKNOWN")),
        };
        if let Some(arrival) = lock(&self.arrivals).get_mut(place) {
            arrival.answered = Some(status);
        }
        self.tell();
        json_answer(status, body)
    }

    async fn react(&self, identity: &Identity, arrival: &Arrival) -> (u16, Value) {
        let first = arrival.segments.first().map(String::as_str).unwrap_or_default();
        if matches!(arrival.endpoint.as_str(), "make_join" | "send_join") {
            let mut looks = 0;
            while looks < INVITE_LOOKS && lock(&self.manners).inviting {
                looks += 1;
                tokio::time::sleep(INVITE_PAUSE).await;
            }
        }
        match arrival.endpoint.as_str() {
            "send" => {
                let delay = lock(&self.manners).delay.take();
                if let Some(delay) = delay {
                    // What was taken is known before the answer, as it is of every server.
                    self.tell();
                    tokio::time::sleep(delay).await;
                }
                let mut manners = lock(&self.manners);
                if manners.refuse > 0 {
                    manners.refuse = manners.refuse.saturating_sub(1);
                    return (500, error("M_UNKNOWN"));
                }
                drop(manners);
                match lock(&self.room).as_mut() {
                    Some(room) => room.take(arrival, &self.clock),
                    None => (200, json!({ "failed_pdus": {} })),
                }
            }
            "invite" => {
                if let Some((status, body)) = lock(&self.manners).refuse_invites.clone() {
                    return (status, body);
                }
                match signed_invite(identity, arrival) {
                    Some(pdu) => (200, json!({ "pdu": pdu, "event": pdu })),
                    None => (400, error("M_BAD_JSON")),
                }
            }
            _ => match lock(&self.room).as_mut() {
                Some(room) if room.owner() == identity.name => {
                    room.answer(arrival, first).unwrap_or_else(|| (404, error("M_UNRECOGNIZED")))
                }
                _ => (404, error("M_UNRECOGNIZED")),
            },
        }
    }
}

fn signed_invite(identity: &Identity, arrival: &Arrival) -> Option<Object> {
    let event = arrival.body.as_ref()?.get("event")?.as_object()?.clone();
    let mut pdu = Pdu::parse(event, Redaction::Draft).ok()?;
    pdu.countersign(&identity.name, &identity.key);
    Some(pdu.json)
}

fn error(errcode: &str) -> Value {
    json!({ "errcode": errcode, "error": "the conformance suite says so" })
}

fn json_answer(status: u16, body: Value) -> Response {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (status, axum::Json(body)).into_response()
}

/// The name of an endpoint under any of its prefixes, and what follows it.
fn name_of(path: &str) -> (String, Vec<String>) {
    let Some(rest) = path.strip_prefix("/_matrix/federation/") else { return (String::new(), Vec::new()) };
    let rest = match rest.strip_prefix("unstable/") {
        Some(unstable) => unstable.split_once('/').map_or("", |(_, rest)| rest),
        None => rest.split_once('/').map_or("", |(_, rest)| rest),
    };
    let mut parts = rest.split('/').map(|part| percent_decode_str(part).decode_utf8_lossy().into_owned());
    (parts.next().unwrap_or_default(), parts.collect())
}

/// The listener.
pub(super) struct Listening {
    handle: Handle<SocketAddr>,
}

impl Listening {
    pub async fn open(
        ear: Arc<Ear>,
        socket: std::net::TcpListener,
        tls: Option<(PathBuf, PathBuf)>,
    ) -> Result<Self, std::io::Error> {
        socket.set_nonblocking(true)?;
        let routes = Router::new()
            .fallback(|State(ear): State<Arc<Ear>>, request: Request| ear.answer(request))
            .with_state(ear)
            .into_make_service();
        let handle = Handle::new();
        match tls {
            Some((certificate, key)) => {
                let _ = (*crypto_provider()).clone().install_default();
                let tls = RustlsConfig::from_pem_file(certificate, key).await?;
                let server = axum_server::from_tcp_rustls(socket, tls)?.handle(handle.clone());
                tokio::spawn(async move { server.serve(routes).await });
            }
            None => {
                let server = axum_server::from_tcp(socket)?.handle(handle.clone());
                tokio::spawn(async move { server.serve(routes).await });
            }
        }
        Ok(Self { handle })
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.handle.shutdown();
    }
}
