//! Being a notary: other servers' answers about their keys are kept as they came, and given to others with this server's signature.
//! Anybody may ask, so what comes of it is written down only of servers whose keys the gateway needed itself.
//! Source: draft-ralston-mimi-linearized-matrix-04, sections `int-api-notary-query` and `int-api-notary-query-bulk`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use moka::future::Cache;
use ruma::{OwnedServerName, ServerName};
use serde_json::Value;

use super::{Inner, Keyring, REFETCH_MS, retry_after, unreachable};
use crate::event::{Object, VerifyKey, parse_object, sign_object};
use crate::store::server_keys::{self, KeyAnswer};
use crate::store::{Store, StoreError};

/// How long a server is waited for that is asked for others: less than those wait.
const PATIENCE: Duration = Duration::from_secs(6);
/// How many bytes are kept in memory of servers that were asked for others.
const HEARD: u64 = 32 << 20;
/// How many answers of one of them.
const ANSWERS: usize = 8;

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

/// What came of asking a server for others.
pub(super) struct Heard {
    /// What it has said, the newest first; nothing where that is in the database.
    answers: Vec<KeyAnswer>,
    /// When it was asked.
    asked_ts: i64,
    /// How often in a row that failed.
    failures: u32,
}

impl Heard {
    pub(super) fn cache() -> Cache<OwnedServerName, Arc<Self>> {
        let weigh = |server: &OwnedServerName, heard: &Arc<Self>| {
            let answers = heard.answers.iter().map(|kept| kept.answer.len().saturating_add(kept.key_set.len()));
            let size = answers.fold(server.as_str().len().saturating_add(256), usize::saturating_add);
            u32::try_from(size).unwrap_or(u32::MAX)
        };
        Cache::builder().max_capacity(HEARD).weigher(weigh).build()
    }

    fn may_be_asked(&self, now_ms: i64) -> bool {
        let age = now_ms.saturating_sub(self.asked_ts);
        age < 0 || age >= if self.failures > 0 { retry_after(self.failures) } else { REFETCH_MS }
    }
}

impl Inner {
    /// Asks a server for others. No notary is asked in its place, or two that name each other would wait for one another.
    async fn hear(&self, server: &ServerName) -> Heard {
        let last = self.heard.get(server).await;
        let asked = tokio::time::timeout(PATIENCE, self.ask(server, self.clock.now_ms())).await;
        let asked_ts = self.clock.now_ms();
        let old = last.as_ref().map(|last| last.answers.clone()).unwrap_or_default();
        let told = match asked.unwrap_or_else(|_| Err(unreachable(server, "no answer in time"))) {
            Ok(told) => told,
            Err(error) => {
                tracing::info!(%server, %error, "a server that others ask for has given no keys");
                let failures = last.as_ref().map_or(0, |last| last.failures).saturating_add(1);
                return Heard { answers: old, asked_ts, failures };
            }
        };
        let mut answers = told.answers;
        for old in old {
            if answers.len() < ANSWERS && answers.iter().all(|new| new.key_set != old.key_set) {
                answers.push(old);
            }
        }
        if let Some((before, _)) = self.remembered(server).await {
            let keys = told.keys.remember(&before, asked_ts).to_bytes();
            match server_keys::save(&self.store, server, keys, std::mem::take(&mut answers), asked_ts).await {
                Ok(()) => {}
                Err(error) => tracing::warn!(%server, %error, "the keys of a server could not be stored"),
            }
        }
        Heard { answers, asked_ts, failures: 0 }
    }
}

impl Keyring {
    /// Whether the server has to be asked for a good answer to `query`, and may be by now.
    pub async fn would_ask_for(&self, query: &KeyQuery) -> Result<bool, StoreError> {
        let known = self.answers(query).await?;
        let now_ms = self.inner.clock.now_ms();
        if query.server == self.inner.server_name || query.is_settled_by(&known, now_ms) {
            return Ok(false);
        }
        let heard = self.inner.heard.get(&query.server).await;
        Ok(heard.is_none_or(|heard| heard.may_be_asked(now_ms)))
    }

    /// Asks the server when it may be asked by now. Those who want that of the same server wait for one answer.
    pub async fn refresh(&self, query: &KeyQuery) {
        let inner = &*self.inner;
        let now_ms = inner.clock.now_ms();
        let hearing = async { Arc::new(inner.hear(&query.server).await) };
        let entry = inner.heard.entry_by_ref(&query.server);
        entry.or_insert_with_if(hearing, |heard| heard.may_be_asked(now_ms)).await;
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
        let mut kept = server_keys::answers(self.store(), &query.server).await?;
        if let Some(heard) = self.inner.heard.get(&query.server).await {
            let new = heard.answers.iter().filter(|heard| kept.iter().all(|kept| kept.key_set != heard.key_set));
            let new: Vec<_> = new.cloned().collect();
            kept.extend(new);
        }
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
