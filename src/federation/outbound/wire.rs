//! How a transaction goes over the wire: which `send` endpoint, and what its body is.

use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use moka::sync::Cache;
use ruma::{OwnedServerName, ServerName};
use serde_json::Value;

use crate::admin::metrics;
use crate::event::{Edu, Object, canonical_json};
use crate::federation::{Call, Client, RemoteError};
use crate::identity::{Keyring, Side};

/// What the queues need of the network.
#[async_trait]
pub(super) trait Transport: Send + Sync + 'static {
    /// A signed PUT; `body` is canonical JSON.
    async fn put(&self, destination: &ServerName, uri: String, body: Bytes) -> Result<Object, RemoteError>;
    /// Whether a server that has just answered does LM alone.
    async fn is_linearized(&self, destination: &ServerName) -> bool;
}

pub(super) struct Network {
    pub client: Client,
    pub keyring: Keyring,
}

#[async_trait]
impl Transport for Network {
    async fn put(&self, destination: &ServerName, uri: String, body: Bytes) -> Result<Object, RemoteError> {
        self.client.call(destination, Call::put_canonical(uri, body), false).await
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
    /// Each in canonical form.
    pub pdus: Vec<Bytes>,
    pub edus: Vec<&'a Edu>,
}

/// The `send` endpoints of LM under the names that servers may know them by, the first to try first.
const LM_SEND: [&str; 2] = [
    "/_matrix/federation/unstable/org.matrix.i-d.ralston-mimi-linearized-matrix.02/send",
    "/_matrix/federation/v2/send",
];
const MATRIX_SEND: &str = "/_matrix/federation/v1/send";
const REMEMBERED: u64 = 20_000;

/// Sends transactions, and remembers of each server which name of the LM endpoint it knows, and how it answers.
pub(super) struct Sender {
    server_name: OwnedServerName,
    lm_send: Cache<OwnedServerName, usize>,
    /// Servers that say of each event in an LM transaction whether they took it.
    itemizes: Cache<OwnedServerName, ()>,
}

impl Sender {
    pub(super) fn new(server_name: OwnedServerName) -> Self {
        Self { server_name, lm_send: remembering(), itemizes: remembering() }
    }

    /// Who sends.
    pub(super) fn server_name(&self) -> &ServerName {
        &self.server_name
    }

    /// Whether a server stops at the first event of an LM transaction that it does not like, answers the whole with an error,
    /// and shows again what it is sent again. One that does LM alone is taken to be so until it answers as the draft asks,
    /// with `failed_pdus`, which says that it looks at each event by itself.
    pub(super) async fn stops_at_first(&self, wire: &dyn Transport, destination: &ServerName) -> bool {
        !self.itemizes.contains_key(destination) && wire.is_linearized(destination).await
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
        let mut head = Object::new();
        head.insert("origin".to_owned(), self.server_name.as_str().into());
        head.insert("origin_server_ts".to_owned(), envelope.composed_ts.into());
        put_edus(&mut head, &envelope.edus, Edu::to_matrix);
        let body = body(&head, &envelope.pdus);
        wire.put(envelope.destination, format!("{MATRIX_SEND}/{}", envelope.txn_id), body).await
    }

    async fn send_lm(&self, wire: &dyn Transport, envelope: Envelope<'_>) -> Result<Object, RemoteError> {
        let destination = envelope.destination;
        let known = self.lm_send.get(destination).unwrap_or(0);
        let mut head = Object::new();
        if !envelope.edus.is_empty() {
            // Servers that do both protocols know Matrix's shape of all types, and the draft's of few.
            let is_lm_alone = wire.is_linearized(destination).await;
            put_edus(&mut head, &envelope.edus, if is_lm_alone { Edu::to_lm } else { Edu::to_matrix });
        }
        let body = body(&head, &envelope.pdus);
        let uri = |index: usize| {
            let endpoint = LM_SEND.get(index).copied().unwrap_or(MATRIX_SEND);
            format!("{endpoint}/{}", envelope.txn_id)
        };
        let other = 1_usize.saturating_sub(known);
        let mut answer = wire.put(destination, uri(known), body.clone()).await;
        if answer.as_ref().is_err_and(RemoteError::is_unrecognized) {
            answer = wire.put(destination, uri(other), body).await;
            if answer.as_ref().err().is_none_or(|error| !error.is_unrecognized()) {
                self.lm_send.insert(destination.to_owned(), other);
            }
        }
        // What is said to a transaction without events says nothing of how those are looked at.
        if let Ok(answer) = &answer
            && !envelope.pdus.is_empty()
        {
            match answer.get("failed_pdus") {
                Some(Value::Object(_)) if self.itemizes.contains_key(destination) => {}
                Some(Value::Object(_)) => self.itemizes.insert(destination.to_owned(), ()),
                _ => self.itemizes.invalidate(destination),
            }
        }
        answer
    }
}

fn put_edus(head: &mut Object, edus: &[&Edu], shape: fn(&Edu) -> Object) {
    if edus.is_empty() {
        return;
    }
    for edu in edus {
        metrics::edu_sent(edu.kind());
    }
    let edus = edus.iter().map(|edu| Value::from(shape(edu))).collect();
    head.insert("edus".to_owned(), Value::Array(edus));
}

/// What is known of servers, for a day.
fn remembering<V: Clone + Send + Sync + 'static>() -> Cache<OwnedServerName, V> {
    Cache::builder().max_capacity(REMEMBERED).time_to_live(Duration::from_secs(24 * 3600)).build()
}

/// The canonical form of a transaction, whose events are canonical already; `pdus` sorts after everything in `head`.
fn body(head: &Object, pdus: &[Bytes]) -> Bytes {
    let head = canonical_json(head);
    let length =
        pdus.iter().map(|pdu| pdu.len().saturating_add(1)).fold(head.len().saturating_add(16), usize::saturating_add);
    let mut body = Vec::with_capacity(length);
    body.extend_from_slice(head.strip_suffix(b"}").unwrap_or(&head));
    if body.len() > 1 {
        body.push(b',');
    }
    body.extend_from_slice(br#""pdus":["#);
    for (index, pdu) in pdus.iter().enumerate() {
        if index > 0 {
            body.push(b',');
        }
        body.extend_from_slice(pdu);
    }
    body.extend_from_slice(b"]}");
    body.into()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_body_is_put_together_in_canonical_form() {
        let pdus = [json!({"b": 1, "a": "x"}), json!({"c": [1.5, null]})];
        let texts: Vec<Bytes> = pdus.iter().map(|pdu| canonical_json(pdu.as_object().unwrap()).into()).collect();
        let heads = [json!({}), json!({ "origin_server_ts": 3, "origin": "g.example" })];
        for (head, count) in heads.iter().flat_map(|head| (0..3).map(move |count| (head, count))) {
            let mut whole = head.as_object().unwrap().clone();
            whole.insert("pdus".to_owned(), pdus[..count].to_vec().into());
            assert_eq!(body(head.as_object().unwrap(), &texts[..count]), canonical_json(&whole));
        }
    }
}
