//! Being a notary: other servers' answers about their keys are kept as they came, and given to others with this server's signature.
//! Source: draft-ralston-mimi-linearized-matrix-04, sections `int-api-notary-query` and `int-api-notary-query-bulk`.

use std::collections::BTreeMap;

use ruma::OwnedServerName;
use serde_json::Value;

use super::Keyring;
use crate::event::{Object, VerifyKey, parse_object, sign_object};
use crate::store::server_keys::{self, KeyAnswer};
use crate::store::{Store, StoreError};

/// What a notary is asked about one server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyQuery {
    /// The server.
    pub server: OwnedServerName,
    /// The keys that are wanted, each with the time (ms) until which it must be valid; without any, all are.
    pub keys: BTreeMap<String, i64>,
    /// Until when answers must be valid in that case, in ms.
    pub minimum_valid_until_ts: i64,
}

impl KeyQuery {
    /// Whether an answer is what is asked for. A key out of use is good until it expired, whatever the answer's own validity.
    fn is_met_by(&self, answer: &Object, valid_until_ts: i64) -> bool {
        if self.keys.is_empty() {
            return valid_until_ts >= self.minimum_valid_until_ts;
        }
        self.keys.iter().any(|(key_id, minimum)| has_key(answer, valid_until_ts, key_id, *minimum))
    }

    /// Whether nothing better is to be expected of the server: the newest answer is within the first half of its time, and what is
    /// asked for is there.
    fn is_settled_by(&self, answers: &[Answer], now_ms: i64) -> bool {
        let newest = answers.iter().max_by_key(|answer| answer.fetched_ts);
        let fresh = newest.is_some_and(|newest| {
            let age = now_ms.saturating_sub(newest.fetched_ts);
            age >= 0 && age < newest.valid_until_ts.saturating_sub(newest.fetched_ts) / 2
        });
        let there = |key_id: &String, minimum: i64| {
            answers.iter().any(|answer| has_key(&answer.json, answer.valid_until_ts, key_id, minimum))
        };
        fresh
            && if self.keys.is_empty() {
                answers.iter().any(|answer| answer.valid_until_ts >= self.minimum_valid_until_ts)
            } else {
                self.keys.iter().all(|(key_id, minimum)| there(key_id, *minimum))
            }
    }
}

fn has_key(answer: &Object, valid_until_ts: i64, key_id: &str, minimum: i64) -> bool {
    let entry = |field: &str| answer.get(field).and_then(|keys| keys.get(key_id));
    match (entry("verify_keys"), entry("old_verify_keys")) {
        (Some(_), _) => valid_until_ts >= minimum,
        (None, Some(old)) => old.get("expired_ts").and_then(Value::as_i64).is_some_and(|expired| expired >= minimum),
        (None, None) => false,
    }
}

/// An answer of a server, as it was kept.
struct Answer {
    json: Object,
    fetched_ts: i64,
    valid_until_ts: i64,
}

impl Keyring {
    /// Whether the server has to be asked for a good answer to `query`, and may be by now.
    pub async fn would_ask_for(&self, query: &KeyQuery) -> Result<bool, StoreError> {
        let known = self.answers(query).await?;
        let now_ms = self.inner.clock.now_ms();
        Ok(!query.is_settled_by(&known, now_ms) && self.may_be_asked(&query.server).await)
    }

    /// Asks the server, or those notaries who are asked for others, when it may be asked by now.
    pub async fn refresh(&self, query: &KeyQuery) {
        // What comes from the store at first is not asked for anew.
        let lookup = self.inner.lookup(&query.server, false).await;
        if lookup.is_stale(self.inner.clock.now_ms(), true) {
            self.inner.lookup(&query.server, true).await;
        }
    }

    /// What is known of what `query` asks for, with this server's signature besides the other's.
    pub async fn notarized(&self, query: &KeyQuery) -> Result<Vec<Object>, StoreError> {
        let answers = self.answers(query).await?;
        let met = answers.into_iter().filter(|answer| query.is_met_by(&answer.json, answer.valid_until_ts));
        let signed = met.map(|answer| {
            let mut json = answer.json;
            if query.server != self.inner.server_name {
                sign_object(&mut json, self.inner.server_name.as_str(), &self.inner.own);
            }
            json
        });
        Ok(signed.collect())
    }

    async fn answers(&self, query: &KeyQuery) -> Result<Vec<Answer>, StoreError> {
        if query.server == self.inner.server_name {
            let json = self.own_keys();
            let valid_until_ts = json.get("valid_until_ts").and_then(Value::as_i64).unwrap_or_default();
            return Ok(vec![Answer { json, fetched_ts: self.inner.clock.now_ms(), valid_until_ts }]);
        }
        let kept = server_keys::answers(self.store(), &query.server).await?;
        Ok(kept.into_iter().filter_map(|kept| self.read(kept)).collect())
    }

    /// None for what holds a key that has become known as leaked.
    fn read(&self, kept: KeyAnswer) -> Option<Answer> {
        let KeyAnswer { answer, fetched_ts, valid_until_ts, .. } = kept;
        let json = parse_object(&answer).ok()?;
        let denied = &self.inner.trust.denied;
        let is_denied = |entry: &Value| {
            let key = entry.get("key").and_then(Value::as_str).and_then(|key| VerifyKey::from_base64(key).ok());
            key.is_some_and(|key| denied.contains(&key.to_base64()))
        };
        let keys = json.get("verify_keys").and_then(Value::as_object);
        let leaked = !denied.is_empty() && keys.is_some_and(|keys| keys.values().any(is_denied));
        (!leaked).then_some(Answer { json, fetched_ts, valid_until_ts })
    }

    fn store(&self) -> &Store {
        &self.inner.store
    }
}
