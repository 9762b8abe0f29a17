//! Who sees whether the homeserver's calls arrive: the running gateway, or in its place the doctor itself on the gateway's
//! addresses.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::State;
use axum::routing::{any, get};
use axum::{Json, Router};
use http::{HeaderMap, StatusCode};
use serde_json::{Value, json};

use super::Finding;
use crate::admin::Health;
use crate::appservice::{Bearer, Token};
use crate::clock::SharedClock;
use crate::config::Config;
use crate::event::{Object, sign_object};
use crate::federation::crypto_provider;
use crate::gateway::{ListenError, Listener};
use crate::identity::SigningKey;

/// How long the running gateway may take to say how it is.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the stand-in's keys are valid: short, in case somebody else asks for them.
const VALIDITY_MS: i64 = 60_000;

/// What of the homeserver's calls arrived, since the start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// Calls with the right hs_token.
    pub(super) calls: u64,
    /// Calls with a wrong one or none.
    pub(super) refused: u64,
    /// The transaction ID of the last ping.
    pub(super) ping: Option<String>,
}

/// Who sees them.
pub(super) enum Witness {
    /// The running gateway, asked at this URL.
    Gateway {
        /// Its client.
        http: reqwest::Client,
        /// Where it says how it is.
        url: String,
    },
    /// The doctor, listening in its place.
    StandIn {
        /// What it saw.
        seen: Arc<Mutex<Seen>>,
        /// Where it listens.
        listeners: Vec<Listener>,
    },
}

impl Witness {
    /// Finds the running gateway or listens in its place, and says which.
    pub(super) async fn call(
        config: &Config,
        key: Arc<SigningKey>,
        hs_token: Option<Token>,
        clock: SharedClock,
    ) -> (Self, Vec<Finding>) {
        const CHECK: &str = "gateway";
        crypto_provider();
        let url = format!("http://{}/health", reachable(config.admin.address));
        let http = reqwest::Client::builder().timeout(PATIENCE).no_proxy().tls_certs_only([]).build();
        if let Ok(http) = http
            && let Some(health) = ask(&http, &url).await
        {
            let findings = if health.server_name != config.server_name {
                let found = format!("at {url} the gateway {} runs, not {}", health.server_name, config.server_name);
                vec![Finding::fail(CHECK, found, "give each gateway its own `admin.address`")]
            } else if health.ok {
                vec![Finding::pass(CHECK, format!("it runs and says at {url} that it is well"))]
            } else {
                let problem =
                    |problem: String| Finding::warn(CHECK, format!("it says: {problem}"), "see the checks below");
                health.problems.into_iter().map(problem).collect()
            };
            return (Self::Gateway { http, url }, findings);
        }
        let seen = Arc::new(Mutex::new(Seen::default()));
        let routes = routes(StandIn { seen: seen.clone(), hs_token, config: config.clone(), key, clock });
        let mut listeners = Vec::new();
        let mut findings = Vec::new();
        for opened in [
            Listener::open("federation", &config.listen, routes.clone()).await,
            Listener::open_plain("admin", config.admin.address, routes).await,
        ] {
            match opened {
                Ok(listener) => listeners.push(listener),
                Err(error) => findings.push(unopened(&error)),
            }
        }
        if findings.is_empty() {
            let found = "it does not run; the doctor listens in its place for these checks";
            findings.push(Finding::pass(CHECK, found));
        }
        (Self::StandIn { seen, listeners }, findings)
    }

    /// What arrived so far; none when the gateway does not say.
    pub(super) async fn seen(&self) -> Option<Seen> {
        match self {
            Self::Gateway { http, url } => {
                let status = ask(http, url).await?.homeserver?;
                Some(Seen { calls: status.calls, refused: status.refused_calls, ping: status.received })
            }
            Self::StandIn { seen, .. } => Some(seen.lock().unwrap_or_else(PoisonError::into_inner).clone()),
        }
    }

    /// Whether the gateway, or the doctor in its place, listens for other servers.
    pub(super) fn listens(&self) -> bool {
        match self {
            Self::Gateway { .. } => true,
            Self::StandIn { listeners, .. } => !listeners.is_empty(),
        }
    }

    /// Stops listening.
    pub(super) async fn dismiss(self) {
        if let Self::StandIn { listeners, .. } = self {
            for listener in listeners {
                listener.stop(Duration::from_millis(100));
                listener.ended().await;
            }
        }
    }
}

async fn ask(http: &reqwest::Client, url: &str) -> Option<Health> {
    // A gateway that is not well answers 503 with the same body.
    http.get(url).send().await.ok()?.json().await.ok()
}

/// The address at which a listener of this machine is reached.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(if address.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() });
    }
    address
}

fn unopened(error: &ListenError) -> Finding {
    Finding::fail("listener", error.to_string(), error.advice())
}

#[derive(Clone)]
struct StandIn {
    seen: Arc<Mutex<Seen>>,
    hs_token: Option<Token>,
    config: Config,
    key: Arc<SigningKey>,
    clock: SharedClock,
}

/// As much of the gateway as the checks need.
fn routes(stand_in: StandIn) -> Router {
    Router::new()
        .route("/_matrix/app/v1/{*path}", any(appservice))
        .route("/_matrix/key/v2/server", get(own_keys))
        .route("/.well-known/matrix/server", get(well_known))
        .fallback(unknown)
        .with_state(stand_in)
}

/// A proxy may pass this on too.
async fn well_known(State(stand_in): State<StandIn>) -> (StatusCode, Json<Value>) {
    match stand_in.config.delegated() {
        Some(server) => (StatusCode::OK, Json(json!({ "m.server": server }))),
        None => (StatusCode::NOT_FOUND, Json(json!({ "errcode": "M_NOT_FOUND", "error": "nothing is delegated" }))),
    }
}

async fn appservice(
    State(stand_in): State<StandIn>,
    headers: HeaderMap,
    uri: http::Uri,
    body: Bytes,
) -> (StatusCode, Json<Value>) {
    let right = stand_in.hs_token.as_ref().is_some_and(|token| token.check(&headers) == Bearer::Right);
    let mut seen = stand_in.seen.lock().unwrap_or_else(PoisonError::into_inner);
    if !right {
        seen.refused = seen.refused.saturating_add(1);
        return (StatusCode::FORBIDDEN, Json(json!({ "errcode": "M_FORBIDDEN", "error": "wrong hs_token" })));
    }
    seen.calls = seen.calls.saturating_add(1);
    if uri.path().ends_with("/ping") {
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        seen.ping = body.get("transaction_id").and_then(Value::as_str).map(str::to_owned);
        return (StatusCode::OK, Json(json!({})));
    }
    // Events are not taken: the homeserver sends them again to the gateway.
    let status =
        if uri.path().contains("/transactions/") { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::NOT_FOUND };
    (status, Json(json!({ "errcode": "M_NOT_FOUND", "error": "the gateway does not run" })))
}

async fn own_keys(State(stand_in): State<StandIn>) -> Json<Value> {
    let StandIn { config, key, clock, .. } = stand_in;
    let mut answer = Object::new();
    answer.insert("server_name".to_owned(), json!(config.server_name));
    answer.insert("valid_until_ts".to_owned(), json!(clock.now_ms().saturating_add(VALIDITY_MS)));
    answer.insert("verify_keys".to_owned(), json!({ key.id(): { "key": key.public_base64() } }));
    answer.insert("old_verify_keys".to_owned(), json!({}));
    sign_object(&mut answer, config.server_name.as_str(), &key);
    Json(Value::Object(answer))
}

async fn unknown() -> (StatusCode, Json<Value>) {
    (StatusCode::NOT_FOUND, Json(json!({ "errcode": "M_NOT_FOUND", "error": "the gateway does not run" })))
}
