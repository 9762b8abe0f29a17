//! Requests of the suite and the answers to them: signed rightly, or wrongly in one way. The signature is composed here anew, so that a
//! mistake in the product's own code is not repeated by its judge.

use std::sync::Arc;

use http::Method;
use ruma::OwnedServerName;
use ruma::api::federation::authentication::XMatrix;
use serde_json::{Value, json};

use super::report::{Outcome, ensure};
use crate::event::{Object, VerifyKey, canonical_json};
use crate::identity::SigningKey;

/// A server that the suite plays.
#[derive(Debug)]
pub(super) struct Identity {
    pub name: OwnedServerName,
    pub key: Arc<SigningKey>,
    /// A key that it publishes as one out of use.
    pub old: SigningKey,
}

impl Identity {
    /// Its answer to `GET /_matrix/key/v2/server`.
    pub fn keys(&self, now_ms: i64) -> Object {
        let mut keys = object(json!({
            "server_name": self.name,
            "m.linearized": true,
            "valid_until_ts": now_ms.saturating_add(12 * 3_600_000),
            "verify_keys": { self.key.id(): { "key": self.key.public_base64() } },
            "old_verify_keys": { self.old.id(): { "key": self.old.public_base64(), "expired_ts": now_ms.saturating_sub(3_600_000) } },
        }));
        crate::event::sign_object(&mut keys, self.name.as_str(), &self.key);
        keys
    }
}

/// A request before it is signed.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    pub method: Method,
    pub uri: String,
    pub body: Option<Value>,
}

impl Ask {
    pub fn get(uri: impl Into<String>) -> Self {
        Self { method: Method::GET, uri: uri.into(), body: None }
    }

    pub fn put(uri: impl Into<String>, body: Value) -> Self {
        Self { method: Method::PUT, uri: uri.into(), body: Some(body) }
    }

    pub fn post(uri: impl Into<String>, body: Value) -> Self {
        Self { method: Method::POST, uri: uri.into(), body: Some(body) }
    }
}

/// What a signature is made of; each part can be another than it should be.
#[derive(Debug, Clone)]
pub(super) struct Signing<'a> {
    pub origin: &'a str,
    pub destination: &'a str,
    pub key: &'a SigningKey,
    pub key_id: &'a str,
    pub method: &'a str,
    pub uri: &'a str,
    pub content: Option<&'a Value>,
}

impl Signing<'_> {
    /// The signature.
    pub fn signature(&self) -> String {
        self.key.sign(&signed_bytes(self.origin, self.destination, self.method, self.uri, self.content))
    }

    /// The value of the header.
    pub fn header(&self) -> String {
        let Self { origin, destination, key_id, .. } = self;
        format!(r#"X-Matrix origin="{origin}",destination="{destination}",key="{key_id}",sig="{}""#, self.signature())
    }
}

fn signed_bytes(origin: &str, destination: &str, method: &str, uri: &str, content: Option<&Value>) -> Vec<u8> {
    let mut message = object(json!({ "method": method, "uri": uri, "origin": origin, "destination": destination }));
    if let Some(content) = content {
        message.insert("content".to_owned(), content.clone());
    }
    canonical_json(&message)
}

/// What is wrong with the authentication of a request that the target sent to `destination`, if anything is.
pub(super) fn authentication_problem(
    headers: &[String],
    keys: &std::collections::BTreeMap<String, VerifyKey>,
    (origin, destination): (&str, &str),
    (method, uri): (&str, &str),
    body: Option<&Value>,
) -> Option<String> {
    if headers.is_empty() {
        return Some("there is no Authorization header".to_owned());
    }
    for header in headers {
        let claimed = match XMatrix::parse(header) {
            Ok(claimed) => claimed,
            Err(error) => return Some(format!("{header:?} cannot be read: {error}")),
        };
        let key_id = claimed.key.to_string();
        let Some(key) = keys.get(&key_id) else {
            return Some(format!("it is signed with {key_id}, which is none of its keys"));
        };
        if claimed.origin != origin {
            return Some(format!("the origin is {}, not {origin}", claimed.origin));
        }
        if claimed.destination.as_ref().is_none_or(|named| named != destination) {
            return Some(format!("the destination is {:?}, not {destination}", claimed.destination));
        }
        let empty = json!({});
        let contents = match body {
            Some(body) => vec![Some(body)],
            // The draft signs an empty object, Matrix nothing; the peers do the latter.
            None => vec![Some(&empty), None],
        };
        let signature = claimed.sig.encode();
        let is_good = |content: &Option<&Value>| {
            key.verify(&signed_bytes(origin, destination, method, uri, *content), &signature).is_ok()
        };
        if !contents.iter().any(is_good) {
            return Some(format!("the signature with {key_id} over {method} {uri} is wrong"));
        }
    }
    None
}

/// An answer, looked at as little as can be.
#[derive(Debug, Clone)]
pub(super) struct Answer {
    pub status: u16,
    pub content_type: String,
    pub text: String,
    /// The body, if it is JSON in UTF-8.
    pub json: Option<Value>,
    /// What was asked, for reports.
    pub asked: String,
}

impl Answer {
    pub fn errcode(&self) -> &str {
        self.json.as_ref().and_then(|json| json.get("errcode")).and_then(Value::as_str).unwrap_or_default()
    }

    /// A field of the body.
    pub fn field(&self, name: &str) -> Option<&Value> {
        self.json.as_ref().and_then(|json| json.get(name))
    }

    /// Whether the endpoint is not there.
    pub fn is_unrecognized(&self) -> bool {
        matches!(self.status, 404 | 405) && (self.errcode() == "M_UNRECOGNIZED" || self.errcode().is_empty())
    }

    /// Whether it is a proxy's, which says that it has no answer of the server behind it.
    pub fn is_of_proxy(&self) -> bool {
        matches!(self.status, 502..=504) && self.errcode().is_empty()
    }

    /// Passes when it is this error.
    pub fn is_error(&self, status: u16, errcode: &str) -> Outcome {
        ensure(self.status == status && self.errcode() == errcode, format!("{status} {errcode}"), || self)
    }

    /// Passes when it is 200 with an object.
    pub fn is_good(&self) -> Outcome {
        ensure(self.status == 200 && self.json.as_ref().is_some_and(Value::is_object), "200 with a JSON object", || {
            self
        })
    }

    /// Passes when it is some error of the one who asked.
    pub fn is_refusal(&self) -> Outcome {
        ensure((400..500).contains(&self.status), "an error of the 400s", || self)
    }
}

impl std::fmt::Display for Answer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} answered {} {}", self.asked, self.status, self.text)
    }
}

/// The object that a literal is.
pub(super) fn object(value: Value) -> Object {
    match value {
        Value::Object(object) => object,
        _ => Object::new(),
    }
}

/// A path segment.
pub(super) fn segment(text: &str) -> String {
    percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string()
}
