//! What other servers say: whether the gateway's server name leads back to it, resolved as they would, and what time it is.

use std::sync::Arc;

use ruma::OwnedServerName;
use serde_json::Value;
use url::{Host, Url};

use super::Finding;
use super::diagnosis::{self, OwnName};
use super::witness::Witness;
use crate::clock::SharedClock;
use crate::config::Config;
use crate::federation::{Client, ClientOptions};
use crate::identity::{KeyFetcher as _, SigningKey};

/// How many servers are asked for the time.
const CLOCKS: usize = 3;

/// The client for other servers.
pub(super) fn client(config: &Config, key: Arc<SigningKey>) -> Result<Client, Finding> {
    let options = ClientOptions {
        custom_ca: config.federation.custom_ca.clone(),
        allow_private_networks: config.federation.allow_private_networks,
        resolve: config.federation.resolve.clone(),
    };
    Client::new(config.server_name.clone(), key, options).map_err(|error| {
        let found = format!("the client for other servers cannot be made: {error:#}");
        Finding::fail("server name", found, "correct `federation.custom_ca` and `federation.resolve`")
    })
}

/// Compares the clock with that of a server that the configuration names and that is on another machine. Nothing, where there
/// is none and the homeserver, on another machine, has told enough.
pub(super) async fn clock(config: &Config, client: &Client, clock: &SharedClock) -> Option<Finding> {
    for server in elsewhere(config) {
        if let Some(date) = client.date(&server).await {
            return Some(diagnosis::clocks(server.as_str(), Some(&date), clock.now_ms()));
        }
    }
    let homeserver = config.appservice.as_ref().map(|appservice| &appservice.homeserver_url);
    homeserver.is_none_or(is_here).then(diagnosis::clock_is_alone)
}

/// Servers that the configuration names, but for those that it says are on this machine.
fn elsewhere(config: &Config) -> Vec<OwnedServerName> {
    let resolve = &config.federation.resolve;
    let patterns = config.access.hubs.iter().chain(&config.access.matrix_servers);
    let named = patterns.filter_map(|name| OwnedServerName::try_from(name.as_str()).ok());
    let mut servers: Vec<OwnedServerName> = Vec::new();
    for server in resolve.keys().cloned().chain(named) {
        let is_own = server == config.server_name || resolve.get(&server).is_some_and(is_here);
        if !is_own && !servers.contains(&server) {
            servers.push(server);
        }
    }
    servers.truncate(CLOCKS);
    servers
}

fn is_here(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        // Names without a dot are those of containers, which share their machine's clock.
        Some(Host::Domain(name)) => !name.contains('.'),
        None => false,
    }
}

/// Asks whoever is found under the gateway's own name for keys, and compares.
pub(super) async fn own_name(config: &Config, client: &Client, key: Arc<SigningKey>, witness: &Witness) -> Finding {
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn servers_on_other_machines_are_asked_for_the_time() {
        let named = |federation: Value, access: Value| -> Vec<String> {
            let config = json!({ "server_name": "g.example", "federation": federation, "access": access });
            let config: Config = serde_json::from_value(config).unwrap();
            elsewhere(&config).into_iter().map(|server| server.to_string()).collect()
        };
        assert_eq!(named(json!({}), json!({})), [""; 0], "wildcards are no names");
        let resolve = json!({ "resolve": {
            "a.example": "http://127.0.0.1:1", "b.example": "https://192.0.2.1", "g.example": "https://192.0.2.2",
        } });
        let access = json!({ "hubs": ["b.example", "*.c", "a.example"], "matrix_servers": ["d.example:1", "e", "f"] });
        assert_eq!(named(resolve, access), ["b.example", "d.example:1", "e"]);
        let here = |url: &str| is_here(&Url::parse(url).unwrap());
        assert!(
            ["http://127.0.0.1:8008", "http://[::1]", "http://localhost:1", "http://synapse:8008"].map(here)
                == [true; 4]
        );
        assert!(["http://192.0.2.1", "https://synapse.hs.example", "http://[2001:db8::1]"].map(here) == [false; 3]);
    }
}
