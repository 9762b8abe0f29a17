//! Signed requests to other servers: discovered, dialled within policy, bounded in size and time, connections kept.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use http::{Method, StatusCode};
use ruma::{OwnedServerName, ServerName};
use url::Url;

use crate::event::Object;
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
    /// The body of PUT and POST.
    pub body: Option<Object>,
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
        let get = Self::get(uri);
        Self { method: Method::PUT, body: Some(body), timeout: Duration::from_secs(60), limit: 1 << 20, ..get }
    }

    /// A POST with the limits of a PUT.
    pub fn post(uri: impl Into<String>, body: Object) -> Self {
        Self { method: Method::POST, ..Self::put(uri, body) }
    }

    /// The same with room for a room's whole state in the answer (5 min, 256 MiB).
    pub fn with_state(self) -> Self {
        Self { timeout: Duration::from_secs(300), limit: 256 << 20, ..self }
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

    /// As a refusal, with the server's name.
    pub fn into_refusal(self, server: &ServerName) -> Refusal {
        Refusal::Remote { server: server.to_string(), problem: self.to_string() }
    }
}

/// The client; clones share connections and caches.
#[derive(Clone)]
pub struct Client {
    _inner: Arc<()>,
}

impl Client {
    /// A client for the server `server_name`.
    pub fn new(
        _server_name: OwnedServerName,
        _signing_key: Arc<SigningKey>,
        _options: ClientOptions,
    ) -> Result<Self, anyhow::Error> {
        unimplemented!()
    }

    /// Sends a signed request and returns the JSON object that came back with status 200. `linearized` says how a GET is
    /// signed: with `content: {}` for servers that say `m.linearized`, without for others.
    pub async fn call(&self, _destination: &ServerName, _call: Call, _linearized: bool) -> Result<Object, RemoteError> {
        unimplemented!()
    }
}

#[async_trait]
impl KeyFetcher for Client {
    async fn fetch_keys(&self, _server: &ServerName) -> Result<Object, Refusal> {
        unimplemented!()
    }
}
