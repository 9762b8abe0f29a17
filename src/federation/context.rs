//! What every part of the gateway holds: its name and keys, the key ring, the store, the clock, the client, the queues.

use std::sync::Arc;

use ruma::OwnedServerName;

use super::{Client, OutboundQueues};
use crate::clock::SharedClock;
use crate::config::Config;
use crate::identity::{Keyring, SigningKey};
use crate::store::Store;

/// Shared by `lm`, `dag`, `bridge` and what stands in front of them; clones are cheap.
#[derive(Clone)]
pub struct Context {
    /// The gateway's server name, G.
    pub server_name: OwnedServerName,
    /// Its signing key.
    pub signing_key: Arc<SigningKey>,
    /// The keys of other servers.
    pub keyring: Keyring,
    /// The store.
    pub store: Store,
    /// The clock.
    pub clock: SharedClock,
    /// Requests to other servers.
    pub client: Client,
    /// Events on their way to other servers.
    pub outbound: OutboundQueues,
    /// The configuration.
    pub config: Arc<Config>,
}
