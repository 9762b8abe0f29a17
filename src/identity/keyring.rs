//! The keys of other servers: fetched directly from them, checked, kept in the database and in a cache, each server
//! fetched once at a time.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use ruma::{OwnedServerName, ServerName};

use super::SigningKey;
use crate::clock::SharedClock;
use crate::event::{Object, VerifyKey, VerifyKeys};
use crate::refusal::Refusal;
use crate::store::Store;

/// What the key ring asks the network for.
#[async_trait]
pub trait KeyFetcher: Send + Sync + 'static {
    /// `GET /_matrix/key/v2/server` of `server`, at most 64 KiB of it, unauthenticated.
    async fn fetch_keys(&self, server: &ServerName) -> Result<Object, Refusal>;
}

/// For what moment keys must be valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validity {
    /// For a request now: only current keys.
    Now,
    /// For an event made at this time, in milliseconds: current keys valid then, and old keys not yet expired then.
    At(i64),
}

/// The checked keys of one server.
#[derive(Debug, Clone)]
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

/// The key ring; clones share it.
#[derive(Clone)]
pub struct Keyring {
    inner: Arc<Inner>,
}

struct Inner {
    _server_name: OwnedServerName,
    _own: Arc<SigningKey>,
    _fetcher: Arc<dyn KeyFetcher>,
    _store: Store,
    _clock: SharedClock,
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
        Self {
            inner: Arc::new(Inner {
                _server_name: server_name,
                _own: own,
                _fetcher: fetcher,
                _store: store,
                _clock: clock,
            }),
        }
    }

    /// The keys of one server, from the cache, the store or the server itself.
    pub async fn server_keys(&self, _server: &ServerName) -> Result<Arc<ServerKeys>, KeyringError> {
        let _ = &self.inner;
        unimplemented!()
    }

    /// The keys with the IDs `wanted` of one server that are valid for `validity`, fetching anew when one is not known yet
    /// or has run out. Keys that the server does not vouch for are left out.
    pub async fn keys_for(
        &self,
        _server: &ServerName,
        _wanted: &[&str],
        _validity: Validity,
    ) -> Result<BTreeMap<String, VerifyKey>, KeyringError> {
        unimplemented!()
    }

    /// Collects the keys that an event's `signatures` name for `servers`, for events made at the times given.
    pub async fn keys_for_event(
        &self,
        _event: &Object,
        _servers: &[OwnedServerName],
        _origin_server_ts: i64,
    ) -> Result<VerifyKeys, Refusal> {
        unimplemented!()
    }

    /// The signed body of our own `GET /_matrix/key/v2/server`: valid for 12 hours, without `m.linearized`.
    pub fn own_keys(&self) -> Object {
        unimplemented!()
    }
}
