//! Whether the gateway's server name leads back to it, resolved as another server would.

use std::sync::Arc;

use serde_json::Value;

use super::Finding;
use super::diagnosis::{self, OwnName};
use super::witness::Witness;
use crate::config::Config;
use crate::federation::{Client, ClientOptions};
use crate::identity::{KeyFetcher as _, SigningKey};

/// Asks whoever is found under the gateway's own name for keys, and compares.
pub(super) async fn own_name(config: &Config, key: Arc<SigningKey>, witness: &Witness) -> Finding {
    let options = ClientOptions {
        custom_ca: config.federation.custom_ca.clone(),
        allow_private_networks: config.federation.allow_private_networks,
        resolve: config.federation.resolve.clone(),
    };
    let client = match Client::new(config.server_name.clone(), key.clone(), options) {
        Ok(client) => client,
        Err(error) => {
            let found = format!("the client for other servers cannot be made: {error:#}");
            return Finding::fail("server name", found, "correct `federation.custom_ca` and `federation.resolve`");
        }
    };
    let answer = client.fetch_keys(&config.server_name).await.map_err(|refusal| refusal.to_string()).map(|keys| {
        let name = keys.get("server_name").and_then(Value::as_str).map(str::to_owned);
        let found = keys.get("verify_keys").and_then(|keys| keys.get(key.id())?.get("key")?.as_str());
        (name, found.map(str::to_owned))
    });
    diagnosis::own_name(&OwnName {
        server_name: &config.server_name,
        key: (key.id(), key.public_base64()),
        listens: witness.listens(),
        answer,
    })
}
