//! The keys that a server publishes: checked, merged with what was known before, and as they are stored.
//! Source: draft-ralston-mimi-linearized-matrix-04, section "Retrieving Server Keys" (`int-transport-get-server-keys`).

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ruma::{OwnedServerName, ServerName};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::event::{Object, VerifyKey, canonical_json, verify_object};
use crate::store::server_keys::KeyAnswer;

/// Keys are not believed for longer than this after they were fetched.
const MAX_VALIDITY_MS: i64 = 7 * 24 * 3600 * 1000;
/// How long a key ID may be, in bytes.
const MAX_KEY_ID: usize = 100;
/// How many keys of a server are kept, in use and out of use each.
const MAX_KEYS: usize = 50;
/// How large an answer may be that is kept to be given to others, in bytes.
const MAX_ANSWER: usize = 16 << 10;

/// For what moment keys must be valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validity {
    /// For a request now: only current keys.
    Now,
    /// For an event made at this time, in milliseconds: current keys valid then, and old keys not yet expired then.
    At(i64),
    /// For an event of a log, which says that it was made at this time: the same, but a time that is yet to come counts as now. Its
    /// place is given to it by its hub, and no server's clock decides whether it is there.
    InLog(i64),
}

impl Validity {
    /// For which time, in milliseconds.
    fn moment(self, now_ms: i64) -> i64 {
        match self {
            Self::Now => now_ms,
            Self::At(ts) => ts,
            Self::InLog(ts) => ts.min(now_ms),
        }
    }
}

/// The checked keys of one server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerKeys {
    /// Whose keys they are.
    pub server: OwnedServerName,
    /// Keys in use, by key ID.
    pub current: BTreeMap<String, VerifyKey>,
    /// Keys out of use, by key ID, with the time (ms) at which they expired.
    pub old: BTreeMap<String, (VerifyKey, i64)>,
    /// Until when they are valid, in ms; at most 7 days after they were fetched.
    pub valid_until_ts: i64,
    /// Whether the server says of itself that it is an LM server that cannot do graphs (`m.linearized`).
    pub linearized: bool,
}

impl ServerKeys {
    /// Checks the answer of `server` to `GET /_matrix/key/v2/server`: its name, a good signature by every key in use, and
    /// that none of the keys is in `denied`.
    pub(super) fn check(
        answer: &Object,
        server: &ServerName,
        now_ms: i64,
        denied: &BTreeSet<String>,
    ) -> Result<Self, String> {
        let name = answer.get("server_name").and_then(Value::as_str).unwrap_or_default();
        if name != server.as_str() {
            return Err(format!("server_name is {:?}", name.chars().take(60).collect::<String>()));
        }
        let valid_until_ts =
            answer.get("valid_until_ts").and_then(Value::as_i64).ok_or("valid_until_ts is no integer")?;
        let mut current = BTreeMap::new();
        for (key_id, entry) in entries(answer, "verify_keys")? {
            if let Some(key) = read_key(key_id, entry, denied)? {
                current.insert(key_id.clone(), key);
            }
        }
        if current.is_empty() {
            return Err("verify_keys holds no ed25519 key".to_owned());
        }
        for (key_id, key) in &current {
            let alone = BTreeMap::from([(key_id.clone(), key.clone())]);
            verify_object(answer, server.as_str(), &alone).map_err(|refusal| format!("{key_id}: {refusal}"))?;
        }
        let mut old = BTreeMap::new();
        if answer.contains_key("old_verify_keys") {
            for (key_id, entry) in entries(answer, "old_verify_keys")? {
                let expired_ts = entry.get("expired_ts").and_then(Value::as_i64);
                // An old key that is of no use is no reason to refuse those in use.
                if let (Some(expired_ts), Ok(Some(key))) = (expired_ts, read_key(key_id, entry, denied)) {
                    old.insert(key_id.clone(), (key, expired_ts.min(now_ms)));
                }
            }
        }
        Ok(Self {
            server: server.to_owned(),
            current,
            old,
            valid_until_ts: valid_until_ts.min(now_ms.saturating_add(MAX_VALIDITY_MS)),
            linearized: answer.get("m.linearized").and_then(Value::as_bool).unwrap_or(false),
        })
    }

    /// The answer that these keys are from, to be given to others, unless it is too large: with the server's own signatures alone,
    /// since anybody can add some of his.
    pub(super) fn as_told(&self, mut answer: Object, fetched_ts: i64) -> Option<KeyAnswer> {
        let own = answer.get("signatures").and_then(|all| all.get(self.server.as_str())).cloned()?;
        answer.insert("signatures".to_owned(), json!({ self.server.as_str(): own }));
        let answer = canonical_json(&answer);
        let keys: Vec<_> = self.current.iter().map(|(id, key)| format!("{id} {}", key.to_base64())).collect();
        let key_set = URL_SAFE_NO_PAD.encode(Sha256::digest(keys.join(" ")));
        let kept = KeyAnswer { key_set, answer, fetched_ts, valid_until_ts: self.valid_until_ts };
        Some(kept).filter(|kept| kept.answer.len() <= MAX_ANSWER)
    }

    /// None at all.
    pub(super) fn none(server: &ServerName) -> Self {
        let (current, old) = (BTreeMap::new(), BTreeMap::new());
        Self { server: server.to_owned(), current, old, valid_until_ts: 0, linearized: false }
    }

    /// Whether `answer`, which says `told` of the same server and comes from a notary, may be added: the server has signed it with a
    /// key that it had in use when it was last heard, none of those goes out of use by it before its time is over, and none that is
    /// out of use comes back.
    pub(super) fn may_be_told(&self, told: &Self, answer: &Object, now_ms: i64) -> Result<(), String> {
        verify_object(answer, self.server.as_str(), &self.current)
            .map_err(|refusal| format!("no key that is known vouches for it: {refusal}"))?;
        let gone = self.current.keys().find(|key_id| !told.current.contains_key(*key_id));
        if let Some(key_id) = gone.filter(|_| self.valid_until_ts > now_ms) {
            return Err(format!("it would have {key_id} out of use, which is valid until {}", self.valid_until_ts));
        }
        match told.current.keys().find(|key_id| self.old.contains_key(*key_id)) {
            Some(key_id) => Err(format!("it would have {key_id} in use again")),
            None => Ok(()),
        }
    }

    /// Adds what a notary says of the same server. Nothing that is known gives way to it: where the two say different things of a key,
    /// the notary's is of no use.
    pub(super) fn and_by_notary(before: Option<&Self>, mut told: Self, now_ms: i64) -> Result<Self, String> {
        let Some(before) = before else { return Ok(told) };
        for (key_id, key) in told.all() {
            if before.all().any(|(known, other)| known == key_id && other != key) {
                return Err(format!("{key_id} is another key than the one that is known"));
            }
        }
        if told.valid_until_ts <= before.valid_until_ts {
            return Ok(before.clone().remember(&told, now_ms));
        }
        // When a key went out of use that is known is known too.
        let older = Self { old: std::mem::take(&mut told.old), ..Self::none(&told.server) };
        Ok(told.remember(before, now_ms).remember(&older, now_ms))
    }

    fn all(&self) -> impl Iterator<Item = (&String, &VerifyKey)> {
        self.current.iter().chain(self.old.iter().map(|(id, (key, _))| (id, key)))
    }

    /// Keeps what `before` knew: a key that is published no more is an old key, which expired when it was last vouched for.
    pub(super) fn remember(mut self, before: &Self, now_ms: i64) -> Self {
        let vanished = before.current.iter().map(|(id, key)| (id, key, before.valid_until_ts.min(now_ms)));
        let older = before.old.iter().map(|(id, (key, expired))| (id, key, *expired));
        for (key_id, key, expired_ts) in vanished.chain(older) {
            if self.old.len() >= MAX_KEYS {
                break;
            }
            if !self.current.contains_key(key_id) && !self.old.contains_key(key_id) {
                self.old.insert(key_id.clone(), (key.clone(), expired_ts));
            }
        }
        self
    }

    /// The key with this ID, when it is valid for `validity`.
    pub(super) fn key(&self, key_id: &str, validity: Validity, now_ms: i64) -> Option<&VerifyKey> {
        let moment = validity.moment(now_ms);
        if let Some(key) = self.current.get(key_id) {
            return Some(key).filter(|_| moment <= self.valid_until_ts);
        }
        let (key, expired_ts) = self.old.get(key_id)?;
        Some(key).filter(|_| validity != Validity::Now && moment <= *expired_ts)
    }

    /// The key with this ID whatever it is valid for, and until when it is or was.
    pub(super) fn known(&self, key_id: &str) -> Option<(&VerifyKey, String)> {
        if let Some(key) = self.current.get(key_id) {
            return Some((key, format!("is known to be valid until {}", self.valid_until_ts)));
        }
        let (key, expired_ts) = self.old.get(key_id)?;
        Some((key, format!("is out of use since {expired_ts}")))
    }

    /// Whether a newer answer of the server could have a key with this ID that is valid for `validity`.
    pub(super) fn may_become_valid(&self, key_id: &str, validity: Validity, now_ms: i64) -> bool {
        // No answer is believed for a time that is farther ahead.
        let reached = validity.moment(now_ms) <= now_ms.saturating_add(MAX_VALIDITY_MS);
        reached || !self.current.contains_key(key_id)
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let stored = Stored {
            current: self.current.iter().map(|(id, key)| (id.clone(), key.to_base64())).collect(),
            old: self.old.iter().map(|(id, (key, expired))| (id.clone(), (key.to_base64(), *expired))).collect(),
            valid_until_ts: self.valid_until_ts,
            linearized: self.linearized,
        };
        serde_json::to_vec(&stored).unwrap_or_default()
    }

    pub(super) fn from_bytes(server: &ServerName, bytes: &[u8]) -> Option<Self> {
        let stored: Stored = serde_json::from_slice(bytes).ok()?;
        let read = |encoded: &String| VerifyKey::from_base64(encoded).ok();
        Some(Self {
            server: server.to_owned(),
            current: stored.current.iter().filter_map(|(id, key)| Some((id.clone(), read(key)?))).collect(),
            old: stored.old.iter().filter_map(|(id, (key, ts))| Some((id.clone(), (read(key)?, *ts)))).collect(),
            valid_until_ts: stored.valid_until_ts,
            linearized: stored.linearized,
        })
    }
}

#[derive(Serialize, Deserialize)]
struct Stored {
    current: BTreeMap<String, String>,
    old: BTreeMap<String, (String, i64)>,
    valid_until_ts: i64,
    linearized: bool,
}

fn entries<'a>(answer: &'a Object, field: &str) -> Result<&'a Object, String> {
    let entries = answer.get(field).and_then(Value::as_object).ok_or_else(|| format!("{field} is no object"))?;
    if entries.len() > MAX_KEYS {
        return Err(format!("{field} has {} entries, at most {MAX_KEYS} are taken", entries.len()));
    }
    Ok(entries)
}

/// None for keys of algorithms that are not used.
fn read_key(key_id: &str, entry: &Value, denied: &BTreeSet<String>) -> Result<Option<VerifyKey>, String> {
    let Some(version) = key_id.strip_prefix("ed25519:") else { return Ok(None) };
    if version.is_empty()
        || key_id.len() > MAX_KEY_ID
        || !version.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
    {
        return Err(format!("the key ID {:?} is malformed", key_id.chars().take(60).collect::<String>()));
    }
    let encoded = entry.get("key").and_then(Value::as_str).ok_or_else(|| format!("{key_id} has no key"))?;
    let key = VerifyKey::from_base64(encoded).map_err(|refusal| format!("{key_id}: {refusal}"))?;
    if denied.contains(&key.to_base64()) {
        return Err(format!("{key_id} is a key that is known to have leaked"));
    }
    Ok(Some(key))
}
