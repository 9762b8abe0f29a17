//! What every part of the gateway holds: its name and keys, the key ring, the store, the clock, the client, the queues.

use std::sync::Arc;

use ruma::OwnedServerName;

use super::{Asked, Client, Large, OutboundQueues};
use crate::clock::SharedClock;
use crate::config::Config;
use crate::identity::{Keyring, MediaNames, SigningKey};
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
    /// Invites that other servers are asked to sign.
    pub asked: Asked,
    /// Answers that may be as large as a room.
    pub large: Large,
    /// How media of one side are called on the other.
    pub media: MediaNames,
    /// The configuration.
    pub config: Arc<Config>,
}

#[cfg(test)]
impl Context {
    /// A context over an empty store that hears nothing of the network; keys of others come from `keys`.
    pub(crate) async fn of_test(
        directory: &tempfile::TempDir,
        name: &str,
        keys: Arc<dyn crate::identity::KeyFetcher>,
    ) -> Self {
        let store = Store::open(&format!("sqlite://{}", directory.path().join(name).display())).await.unwrap();
        let own: OwnedServerName = name.try_into().unwrap();
        let clock = crate::clock::ManualClock::new(1_704_067_200_000);
        let key = Arc::new(SigningKey::generate());
        let client = Client::new(own.clone(), key.clone(), super::ClientOptions::default()).unwrap();
        let keyring = Keyring::new(own.clone(), key.clone(), keys, store.clone(), clock.clone());
        Self {
            outbound: OutboundQueues::new(store.clone(), clock.clone(), own.clone(), client.clone(), keyring.clone()),
            asked: Asked::default(),
            large: Large::default(),
            media: MediaNames::new(own.clone(), &[7; 32]),
            config: Arc::new(serde_json::from_value(serde_json::json!({ "server_name": own })).unwrap()),
            server_name: own,
            signing_key: key,
            keyring,
            store,
            clock,
            client,
        }
    }
}

/// The keys of servers that have a context in the same test.
#[cfg(test)]
#[derive(Default)]
pub(crate) struct KeysOf(pub std::sync::Mutex<Vec<Context>>);

#[cfg(test)]
#[async_trait::async_trait]
impl crate::identity::KeyFetcher for KeysOf {
    async fn fetch_keys(&self, server: &ruma::ServerName) -> Result<crate::event::Object, crate::refusal::Refusal> {
        let contexts = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let context = contexts.iter().find(|context| context.server_name == server);
        let unknown = || crate::refusal::Refusal::NotFound(format!("the server {server}"));
        context.map(|context| context.keyring.own_keys()).ok_or_else(unknown)
    }
}
