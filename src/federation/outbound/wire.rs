//! How a transaction goes over the wire: which `send` endpoint, and what its body is.

use std::time::{Duration, Instant};

use async_trait::async_trait;
use moka::sync::Cache;
use ruma::{OwnedServerName, ServerName};
use serde_json::{Value, json};

use crate::admin::metrics;
use crate::event::Object;
use crate::federation::{Call, Client, RemoteError};
use crate::identity::{Keyring, Side};

/// What the queues need of the network.
#[async_trait]
pub(super) trait Transport: Send + Sync + 'static {
    /// A signed PUT.
    async fn put(&self, destination: &ServerName, uri: String, body: Object) -> Result<Object, RemoteError>;
    /// Whether a server that has just answered does LM alone.
    async fn is_linearized(&self, destination: &ServerName) -> bool;
}

pub(super) struct Network {
    pub client: Client,
    pub keyring: Keyring,
}

#[async_trait]
impl Transport for Network {
    async fn put(&self, destination: &ServerName, uri: String, body: Object) -> Result<Object, RemoteError> {
        self.client.call(destination, Call::put(uri, body), false).await
    }

    async fn is_linearized(&self, destination: &ServerName) -> bool {
        self.keyring.server_keys(destination).await.is_ok_and(|keys| keys.linearized)
    }
}

/// A transaction as it goes over the wire.
pub(super) struct Envelope<'a> {
    pub destination: &'a ServerName,
    pub protocol: Side,
    pub txn_id: &'a str,
    pub composed_ts: i64,
    pub pdus: Vec<Object>,
}

/// The `send` endpoints of LM under the names that servers may know them by, the first to try first.
const LM_SEND: [&str; 2] = [
    "/_matrix/federation/unstable/org.matrix.i-d.ralston-mimi-linearized-matrix.02/send",
    "/_matrix/federation/v2/send",
];
const MATRIX_SEND: &str = "/_matrix/federation/v1/send";
const REMEMBERED: u64 = 20_000;

/// Sends transactions, and remembers which name of the LM endpoint each server knows.
pub(super) struct Sender {
    server_name: OwnedServerName,
    lm_send: Cache<OwnedServerName, usize>,
}

impl Sender {
    pub(super) fn new(server_name: OwnedServerName) -> Self {
        let lm_send = Cache::builder().max_capacity(REMEMBERED).time_to_live(Duration::from_secs(24 * 3600)).build();
        Self { server_name, lm_send }
    }

    pub(super) async fn send(&self, wire: &dyn Transport, envelope: Envelope<'_>) -> Result<Object, RemoteError> {
        let (protocol, start) = (envelope.protocol, Instant::now());
        let answer = match protocol {
            Side::Matrix => self.send_matrix(wire, envelope).await,
            Side::Lm => self.send_lm(wire, envelope).await,
        };
        let result = match &answer {
            Ok(_) => "ok",
            Err(RemoteError::Unreachable(_)) => "unreachable",
            Err(_) => "refused",
        };
        metrics::outbound_transaction(protocol, result, start.elapsed());
        answer
    }

    async fn send_matrix(&self, wire: &dyn Transport, envelope: Envelope<'_>) -> Result<Object, RemoteError> {
        let mut body = pdus(envelope.pdus);
        body.insert("origin".to_owned(), json!(self.server_name));
        body.insert("origin_server_ts".to_owned(), json!(envelope.composed_ts));
        wire.put(envelope.destination, format!("{MATRIX_SEND}/{}", envelope.txn_id), body).await
    }

    async fn send_lm(&self, wire: &dyn Transport, envelope: Envelope<'_>) -> Result<Object, RemoteError> {
        let destination = envelope.destination;
        let known = self.lm_send.get(destination).unwrap_or(0);
        let body = pdus(envelope.pdus);
        let uri = |index: usize| {
            let endpoint = LM_SEND.get(index).copied().unwrap_or(MATRIX_SEND);
            format!("{endpoint}/{}", envelope.txn_id)
        };
        let other = 1_usize.saturating_sub(known);
        match wire.put(destination, uri(known), body.clone()).await {
            Err(error) if error.is_unrecognized() => {
                let answer = wire.put(destination, uri(other), body).await;
                if answer.as_ref().err().is_none_or(|error| !error.is_unrecognized()) {
                    self.lm_send.insert(destination.to_owned(), other);
                }
                answer
            }
            answer => answer,
        }
    }
}

fn pdus(pdus: Vec<Object>) -> Object {
    let mut body = Object::new();
    body.insert("pdus".to_owned(), Value::Array(pdus.into_iter().map(Value::Object).collect()));
    body
}
