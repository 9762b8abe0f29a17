//! isthmus with a portal whose two rooms it made: the whole gateway, as it is shipped.

use std::path::Path;
use std::sync::Arc;

use isthmus::bridge::NewPortal;
use isthmus::clock::SystemClock;
use isthmus::gateway::Gateway as Isthmus;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::gateway::{Gateway, config, say_hello};

/// Starts this program again as the gateway, with a portal that anybody may join.
pub async fn start(directory: &Path) -> Gateway {
    Gateway::start(&["--serve-portal", directory.to_str().unwrap()]).await
}

/// The gateway's process.
pub async fn serve(directory: &Path) {
    // The port is its name, so it is found before the gateway is.
    let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let name = format!("localhost:{}", free.local_addr().unwrap().port());
    drop(free);
    let gateway = Isthmus::start(config(directory, &name), Arc::new(SystemClock)).await.unwrap();
    let new = NewPortal { join_rule: Some("public".to_owned()), ..NewPortal::default() };
    let portal = gateway.bridge().create_portal(new).await.unwrap();
    say_hello(&json!({ "name": name, "rooms": [portal.lm_room_id], "matrix_room": portal.matrix_room_id }));
    gateway.run(CancellationToken::new()).await.unwrap();
}
