//! The keys of other servers: fetched directly from them, or from notaries when that fails, checked, kept in the database and in a
//! cache, each server fetched once at a time. Servers that are asked because others ask us as a notary have a cache of their own.

mod notaries;
mod notary;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use async_trait::async_trait;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use moka::future::Cache;
use ruma::{OwnedServerName, ServerName};
use serde_json::{Value, json};

pub use self::notary::KeyQuery;
use super::SigningKey;
use super::server_keys::{ServerKeys, Validity};
use crate::admin::metrics;
use crate::clock::SharedClock;
use crate::event::{Object, VerifyKey, VerifyKeys, sign_object};
use crate::refusal::Refusal;
use crate::store::{Store, StoreError, server_keys};

/// How many servers' keys are kept in memory.
const CACHED_SERVERS: u64 = 20_000;
/// A server that could not be asked is left alone for this long, and each time after that for twice as long …
const RETRY_MS: i64 = 30_000;
/// … up to this.
const LONGEST_RETRY_MS: i64 = 15 * 60_000;
/// A server is asked again for a key that it did not publish after this time at the earliest …
const REFETCH_MS: i64 = 10_000;
/// … or after this, when it names the key itself. An answer of this age says what keys a server has now.
const FRESH_MS: i64 = 3_000;
/// For how long our own answer is valid.
const OWN_VALIDITY_MS: i64 = 12 * 3600 * 1000;

/// What the key ring asks the network for.
#[async_trait]
pub trait KeyFetcher: Send + Sync + 'static {
    /// `GET /_matrix/key/v2/server` of `server`, at most 64 KiB of it, unauthenticated.
    async fn fetch_keys(&self, server: &ServerName) -> Result<Object, Refusal>;

    /// `GET /_matrix/key/v2/query/SERVER` of `notary`, for answers that are valid until then, unauthenticated.
    async fn ask_notary(
        &self,
        notary: &ServerName,
        server: &ServerName,
        minimum_valid_until_ts: i64,
    ) -> Result<Object, Refusal> {
        let _ = (server, minimum_valid_until_ts);
        Err(Refusal::KeysUnavailable { server: notary.to_string(), problem: "notaries are not asked".to_owned() })
    }
}

/// Whom the key ring believes.
#[derive(Debug, Clone, Default)]
pub struct Trust {
    /// Public keys (unpadded base64) that are never believed because they are known to have leaked.
    pub denied: BTreeSet<String>,
    /// Servers that are asked, in this order, for the keys of one that does not give them itself.
    pub notaries: Vec<OwnedServerName>,
}

/// Why keys could not be had.
#[derive(Debug, Clone, thiserror::Error)]
pub enum KeyringError {
    /// The server's answer does not prove its keys.
    #[error("the key answer of {server} is not acceptable: {problem}")]
    Rejected {
        /// The server.
        server: String,
        /// What is wrong with its answer.
        problem: String,
    },
    /// The server could not be asked.
    #[error("{server} could not be asked for its keys: {problem}")]
    Unreachable {
        /// The server.
        server: String,
        /// What went wrong.
        problem: String,
    },
}

impl KeyringError {
    /// As a refusal, which names the server itself.
    pub fn into_refusal(self) -> Refusal {
        let (server, problem) = match self {
            Self::Unreachable { server, problem } => (server, problem),
            Self::Rejected { server, problem } => (server, format!("its answer is not acceptable: {problem}")),
        };
        Refusal::KeysUnavailable { server, problem }
    }
}

/// The key ring; clones share it.
#[derive(Clone)]
pub struct Keyring {
    inner: Arc<Inner>,
}

struct Inner {
    server_name: OwnedServerName,
    own: Arc<SigningKey>,
    own_keys: ArcSwap<ServerKeys>,
    fetcher: Arc<dyn KeyFetcher>,
    store: Store,
    clock: SharedClock,
    trust: Trust,
    lookups: Cache<OwnedServerName, Arc<Lookup>>,
    /// The servers that are being asked, and since when.
    asking: moka::sync::Cache<OwnedServerName, Instant>,
    heard: Cache<OwnedServerName, Arc<notary::Heard>>,
    meter: metrics::CacheMeter,
}

/// What the last attempt to learn a server's keys gave.
#[derive(Debug)]
struct Lookup {
    /// The best that is known, perhaps out of date.
    keys: Option<Arc<ServerKeys>>,
    /// Why there is nothing better.
    error: Option<KeyringError>,
    /// When the server was last asked, or was to be.
    asked_ts: i64,
    /// How often in a row that failed.
    failures: u32,
}

impl Lookup {
    /// Whether the server is asked again; for a key that is not known when the answer is as old as `again`.
    fn is_stale(&self, now_ms: i64, again: Option<i64>) -> bool {
        let age = now_ms.saturating_sub(self.asked_ts);
        match &self.keys {
            // A clock that was set back makes everything stale, so that nothing lasts until it caught up.
            _ if age < 0 => true,
            _ if self.error.is_some() => age >= retry_after(self.failures),
            Some(keys) => (keys.valid_until_ts <= now_ms && age >= RETRY_MS) || again.is_some_and(|again| age >= again),
            None => true,
        }
    }
}

impl Keyring {
    /// A key ring of `server_name`, whose own key is `own`.
    pub fn new(
        server_name: OwnedServerName,
        own: Arc<SigningKey>,
        fetcher: Arc<dyn KeyFetcher>,
        store: Store,
        clock: SharedClock,
    ) -> Self {
        Self::with_trust(server_name, own, fetcher, store, clock, Trust::default())
    }

    /// The same, with whom it believes and whom not.
    pub fn with_trust(
        server_name: OwnedServerName,
        own: Arc<SigningKey>,
        fetcher: Arc<dyn KeyFetcher>,
        store: Store,
        clock: SharedClock,
        trust: Trust,
    ) -> Self {
        let current = VerifyKey::from_base64(&own.public_base64()).ok().map(|key| (own.id().to_owned(), key));
        let own_keys = ArcSwap::from_pointee(ServerKeys {
            server: server_name.clone(),
            current: current.into_iter().collect(),
            old: BTreeMap::new(),
            valid_until_ts: i64::MAX,
            linearized: false,
        });
        let lookups = Cache::new(CACHED_SERVERS);
        let meter = metrics::CacheMeter::watch("server_keys", &lookups);
        let heard = notary::Heard::cache();
        let asking = moka::sync::Cache::new(CACHED_SERVERS);
        let inner = Inner { server_name, own, own_keys, fetcher, store, clock, trust, lookups, asking, heard, meter };
        Self { inner: Arc::new(inner) }
    }

    /// Takes up, at the start, the keys that this server had before: they are published as old ones from now on, so that
    /// what was signed with them stays verifiable.
    pub async fn remember_own(&self) -> Result<(), StoreError> {
        let Inner { server_name, own_keys, store, clock, .. } = &*self.inner;
        let now_ms = clock.now_ms();
        let mut keys = ServerKeys::clone(&own_keys.load());
        if let Some((bytes, _)) = server_keys::load(store, server_name).await? {
            let before = ServerKeys::from_bytes(server_name, &bytes)
                .ok_or_else(|| StoreError::corrupt("own keys", "not as this program writes them"))?;
            keys = keys.remember(&before, now_ms);
        }
        server_keys::save(store, server_name, keys.to_bytes(), Vec::new(), now_ms).await?;
        own_keys.store(Arc::new(keys));
        Ok(())
    }

    /// The keys of one server, from the cache, the store or the server itself.
    pub async fn server_keys(&self, server: &ServerName) -> Result<Arc<ServerKeys>, KeyringError> {
        if server == self.inner.server_name {
            return Ok(self.inner.own_keys.load_full());
        }
        let lookup = self.inner.lookup(server, None).await;
        match (&lookup.keys, &lookup.error) {
            (Some(keys), _) => Ok(keys.clone()),
            (None, Some(error)) => Err(error.clone()),
            (None, None) => Err(unreachable(server, "no keys are known")),
        }
    }

    /// The keys with the IDs `wanted` of one server that are valid for `validity`, fetching anew when one is not known yet
    /// or has run out. Keys that the server does not vouch for are left out.
    pub async fn keys_for(
        &self,
        server: &ServerName,
        wanted: &[&str],
        validity: Validity,
    ) -> Result<BTreeMap<String, VerifyKey>, KeyringError> {
        self.keys_after(REFETCH_MS, server, wanted, validity).await
    }

    /// The same, where the server is asked anew when its last answer is at least `again` ms old.
    async fn keys_after(
        &self,
        again: i64,
        server: &ServerName,
        wanted: &[&str],
        validity: Validity,
    ) -> Result<BTreeMap<String, VerifyKey>, KeyringError> {
        let now_ms = self.inner.clock.now_ms();
        let select = |keys: &ServerKeys| -> BTreeMap<String, VerifyKey> {
            let valid = |id: &&str| Some(((*id).to_owned(), keys.key(id, validity, now_ms)?.clone()));
            wanted.iter().filter_map(valid).collect()
        };
        if server == self.inner.server_name {
            return Ok(select(&self.inner.own_keys.load()));
        }
        let mut lookup = self.inner.lookup(server, None).await;
        let mut found = lookup.keys.as_deref().map(select).unwrap_or_default();
        let may_be_told = |keys: &Arc<ServerKeys>| {
            let mut missing = wanted.iter().filter(|id| keys.key(id, validity, now_ms).is_none());
            missing.any(|id| keys.may_become_valid(id, validity, now_ms))
        };
        let asks = found.len() < wanted.len() && lookup.keys.as_ref().is_none_or(may_be_told);
        if asks && lookup.is_stale(now_ms, Some(again)) {
            lookup = self.inner.lookup(server, Some(again)).await;
            found = lookup.keys.as_deref().map(select).unwrap_or_default();
        }
        match &lookup.error {
            Some(error) if found.is_empty() => Err(error.clone()),
            _ => Ok(found),
        }
    }

    /// Whether the server would have to be asked for some of these of its keys.
    pub async fn would_ask(&self, server: &ServerName, wanted: impl Iterator<Item = &str>) -> bool {
        let now_ms = self.inner.clock.now_ms();
        let Some(lookup) = self.inner.lookups.get(server).await else { return server != self.inner.server_name };
        let known = |id| lookup.keys.as_ref().is_some_and(|keys| keys.key(id, Validity::Now, now_ms).is_some());
        let mut wanted = wanted;
        lookup.is_stale(now_ms, None) || (lookup.is_stale(now_ms, Some(REFETCH_MS)) && !wanted.all(known))
    }

    /// Whether a server has been asked for its keys this long ago and has not answered yet.
    pub fn is_silent(&self, server: &ServerName, since: Duration) -> bool {
        self.inner.asking.get(server).is_some_and(|begun| begun.elapsed() >= since)
    }

    /// Collects the keys that an event's `signatures` name for `servers`, as far as they are valid for it.
    pub async fn keys_for_event(
        &self,
        event: &Object,
        servers: &[OwnedServerName],
        validity: Validity,
    ) -> Result<VerifyKeys, Refusal> {
        let mut collected = VerifyKeys::new();
        for server in servers {
            let wanted = signed_with(event, server);
            if wanted.is_empty() {
                // The missing signature is named when it is looked for.
                continue;
            }
            let keys = self.keys_for(server, &wanted, validity).await.map_err(KeyringError::into_refusal)?;
            collected.insert(server.clone(), keys);
        }
        Ok(collected)
    }

    /// The keys that the `signatures` of an event name for `server`, which sent it in a request that is certain to be its own. Of a
    /// key that it names it is asked at once, which costs nobody else anything: so there is a verdict on the event without delay.
    pub async fn keys_for_own_event(
        &self,
        event: &Object,
        server: &ServerName,
        validity: Validity,
    ) -> Result<VerifyKeys, Refusal> {
        let wanted = signed_with(event, server);
        if wanted.is_empty() {
            return Ok(VerifyKeys::new());
        }
        let keys = self.keys_after(FRESH_MS, server, &wanted, validity).await;
        Ok(VerifyKeys::from([(server.to_owned(), keys.map_err(KeyringError::into_refusal)?)]))
    }

    /// That a server's answer is recent enough to say of an event that its signature is by none of the server's keys: a
    /// key may be newer than the answer that is known. `found` are those of the event's keys that the server vouches for.
    pub async fn knows_better_than(
        &self,
        event: &Object,
        server: &ServerName,
        found: Option<&BTreeMap<String, VerifyKey>>,
    ) -> Result<(), Refusal> {
        if found.is_none_or(|found| !found.is_empty()) || server == self.inner.server_name {
            return Ok(());
        }
        let Some(lookup) = self.inner.lookups.get(server).await else { return Ok(()) };
        let mut named = signed_with(event, server).into_iter();
        if lookup.keys.as_ref().is_some_and(|keys| named.all(|id| keys.known(id).is_some())) {
            // They are known, and were not valid when the event was made.
            return Ok(());
        }
        let age = self.inner.clock.now_ms().saturating_sub(lookup.asked_ts);
        if (0..=FRESH_MS).contains(&age) {
            return Ok(());
        }
        let problem = format!("its answer of {} s ago has none of the keys", age / 1000);
        Err(Refusal::KeysUnavailable { server: server.to_string(), problem })
    }

    /// Why an event is not taken whose signatures are right, and by a key that is known of its server and was not valid when the
    /// event says that it was made: nobody has forged it or changed it on its way. `found` are the keys that are valid for it,
    /// `is_right` says whether its signatures are right with others.
    pub async fn out_of_time(
        &self,
        event: &Object,
        origin_server_ts: i64,
        found: &VerifyKeys,
        is_right: impl FnOnce(&VerifyKeys) -> bool,
    ) -> Option<Refusal> {
        let (mut keys, mut why) = (found.clone(), None);
        for (server, found) in &mut keys {
            if !found.is_empty() {
                continue;
            }
            let known = match *server == self.inner.server_name {
                true => self.inner.own_keys.load_full(),
                false => self.inner.lookups.get(server).await?.keys.clone()?,
            };
            for key_id in signed_with(event, server) {
                let Some((key, validity)) = known.known(key_id) else { continue };
                found.insert(key_id.to_owned(), key.clone());
                why.get_or_insert_with(|| (server.clone(), format!("{key_id} {validity}")));
            }
        }
        let (server, validity) = why.filter(|_| is_right(&keys))?;
        let now_ms = self.inner.clock.now_ms();
        let problem = format!("{validity}, the event is of {origin_server_ts}, and it is {now_ms} now");
        Some(Refusal::KeyOutOfTime { entity: server.to_string(), problem })
    }

    /// The signed body of our own `GET /_matrix/key/v2/server`: valid for 12 hours, without `m.linearized`.
    pub fn own_keys(&self) -> Object {
        let Inner { server_name, own, own_keys, clock, .. } = &*self.inner;
        let old = own_keys.load();
        let old = old
            .old
            .iter()
            .map(|(id, (key, expired_ts))| (id.clone(), json!({ "key": key.to_base64(), "expired_ts": expired_ts })));
        let mut answer = Object::new();
        answer.insert("server_name".to_owned(), json!(server_name));
        answer.insert("valid_until_ts".to_owned(), json!(clock.now_ms().saturating_add(OWN_VALIDITY_MS)));
        answer.insert("verify_keys".to_owned(), json!({ own.id(): { "key": own.public_base64() } }));
        answer.insert("old_verify_keys".to_owned(), Value::Object(old.collect()));
        sign_object(&mut answer, server_name.as_str(), own);
        answer
    }
}

impl Inner {
    /// What is known of a server, from memory when that is not stale. Those who ask for the same server at the same time
    /// wait for one answer; it is learned also when nobody waits for it any more.
    fn lookup<'a>(self: &'a Arc<Self>, server: &'a ServerName, again: Option<i64>) -> BoxFuture<'a, Arc<Lookup>> {
        // Boxed, because the keys of notaries are looked up on the way.
        self.look_up(server, again).boxed()
    }

    async fn look_up(self: &Arc<Self>, server: &ServerName, again: Option<i64>) -> Arc<Lookup> {
        let now_ms = self.clock.now_ms();
        if let Some(known) = self.lookups.get(server).await.filter(|known| !known.is_stale(now_ms, again)) {
            self.meter.count(Some(()));
            return known;
        }
        let (inner, name) = (self.clone(), server.to_owned());
        let learning = async move {
            let learn = async {
                inner.asking.insert(name.clone(), Instant::now());
                let learned = inner.learn(&name, now_ms).await;
                inner.asking.invalidate(&name);
                Arc::new(learned)
            };
            let is_stale = |known: &Arc<Lookup>| known.is_stale(now_ms, again);
            let entry = inner.lookups.entry_by_ref(&name).or_insert_with_if(learn, is_stale).await;
            inner.meter.count((!entry.is_fresh()).then_some(()));
            entry.into_value()
        };
        tokio::spawn(learning).await.unwrap_or_else(|error| {
            let error = Some(unreachable(server, &error.to_string()));
            Arc::new(Lookup { keys: None, error, asked_ts: now_ms, failures: 0 })
        })
    }

    async fn learn(self: &Arc<Self>, server: &ServerName, now_ms: i64) -> Lookup {
        let before = self.remembered(server).await;
        let last = self.lookups.get(server).await;
        if last.is_none()
            && let Some((keys, asked_ts)) = &before
            && keys.valid_until_ts > now_ms
        {
            return Lookup { keys: Some(keys.clone()), error: None, asked_ts: *asked_ts, failures: 0 };
        }
        let before = before.map(|(keys, _)| keys);
        let failures = || last.as_ref().map_or(0, |last| last.failures).saturating_add(1);
        let asked = self.ask(server, now_ms).await;
        // How old an answer is counts from when it is here: whoever asks may have waited long for it.
        let asked_ts = self.clock.now_ms();
        let (told, error) = match asked {
            Ok(told) => {
                let valid_until_ts = told.keys.valid_until_ts;
                // Events of its time can be checked with it; but who asks again soon would be told the same.
                let error = (valid_until_ts <= asked_ts).then(|| KeyringError::Rejected {
                    server: server.to_string(),
                    problem: format!("valid_until_ts is {valid_until_ts}, and it is {asked_ts} now"),
                });
                let keys = match &before {
                    Some(before) => told.keys.remember(before, now_ms),
                    None => told.keys,
                };
                (Some(Told { keys, ..told }), error)
            }
            Err(error) => {
                let told = self.ask_notaries(server, before.as_deref(), now_ms).await;
                let helped = told.as_ref().is_some_and(|told| told.keys.valid_until_ts > asked_ts);
                (told, (!helped).then_some(error))
            }
        };
        if let Some(error) = &error {
            tracing::info!(%server, %error, "no new keys of a server");
        }
        let failures = if error.is_some() { failures() } else { 0 };
        let Some(Told { keys, answers }) = told else {
            return Lookup { keys: before, error, asked_ts, failures };
        };
        // What is out of date already and says nothing new is not written down again and again.
        if !(error.is_some() && before.as_deref() == Some(&keys))
            && let Err(error) = server_keys::save(&self.store, server, keys.to_bytes(), answers, now_ms).await
        {
            tracing::warn!(%server, %error, "the keys of a server could not be stored");
        }
        Lookup { keys: Some(Arc::new(keys)), error, asked_ts, failures }
    }

    async fn remembered(&self, server: &ServerName) -> Option<(Arc<ServerKeys>, i64)> {
        match server_keys::load(&self.store, server).await {
            Ok(stored) => {
                let (bytes, fetched_ts) = stored?;
                let mut keys = ServerKeys::from_bytes(server, &bytes)?;
                keys.current.retain(|_, key| !self.trust.denied.contains(&key.to_base64()));
                keys.old.retain(|_, (key, _)| !self.trust.denied.contains(&key.to_base64()));
                Some((Arc::new(keys), fetched_ts))
            }
            Err(error) => {
                tracing::warn!(%server, %error, "the stored keys of a server could not be read");
                None
            }
        }
    }

    async fn ask(&self, server: &ServerName, now_ms: i64) -> Result<Told, KeyringError> {
        let answer = self.fetcher.fetch_keys(server).await;
        metrics::key_fetch(answer.is_ok());
        let answer = answer.map_err(|refusal| match refusal {
            // They name the server as this one does.
            Refusal::KeysUnavailable { problem, .. } | Refusal::Remote { problem, .. } => unreachable(server, &problem),
            refusal => unreachable(server, &refusal.to_string()),
        })?;
        let keys = ServerKeys::check(&answer, server, now_ms, &self.trust.denied)
            .map_err(|problem| KeyringError::Rejected { server: server.to_string(), problem })?;
        let answers = keys.as_told(answer, now_ms).into_iter().collect();
        Ok(Told { keys, answers })
    }
}

/// By which of a server's keys an event says that it is signed; not more than twenty.
fn signed_with<'a>(event: &'a Object, server: &ServerName) -> Vec<&'a str> {
    let signatures = event.get("signatures").and_then(|all| all.get(server.as_str())).and_then(Value::as_object);
    signatures.map(|keys| keys.keys().map(String::as_str).take(20).collect()).unwrap_or_default()
}

/// What was learned of a server.
struct Told {
    keys: ServerKeys,
    /// The answers that it is from.
    answers: Vec<server_keys::KeyAnswer>,
}

/// How long a server is left alone that could not be asked so many times in a row.
fn retry_after(failures: u32) -> i64 {
    let doublings = failures.saturating_sub(1).min(16);
    RETRY_MS.saturating_mul(1 << doublings).min(LONGEST_RETRY_MS)
}

fn unreachable(server: &ServerName, problem: &str) -> KeyringError {
    KeyringError::Unreachable { server: server.to_string(), problem: problem.to_owned() }
}

#[cfg(test)]
mod tests;
