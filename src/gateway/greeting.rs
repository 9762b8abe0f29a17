//! Saying at the start that the gateway is back. Homeservers leave one that did not answer alone, for ten minutes and then for longer and
//! longer, until something comes of it. Where nothing waits here for them nothing would, and what their users say would wait as long.

use std::time::Duration;

use futures::StreamExt as _;
use ruma::{OwnedServerName, ServerName};
use serde_json::json;

use crate::federation::{Call, Context};
use crate::store::overview;

/// To how many it is said at once.
const AT_ONCE: usize = 8;
/// How long one may take to answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// Sends an empty transaction to each server with which Matrix rooms are shared, once. Those that do not answer are away themselves.
pub(super) async fn run(context: Context) {
    let peers = match overview::peers(&context.store).await {
        Ok(peers) => peers,
        Err(error) => return tracing::warn!(%error, "nobody could be told that the gateway is back"),
    };
    let servers = peers.into_iter().filter(|(_, peer)| peer.matrix_rooms > 0);
    let servers = servers.filter_map(|(server, _)| OwnedServerName::try_from(server).ok());
    let context = &context;
    futures::stream::iter(servers)
        .for_each_concurrent(AT_ONCE, |server| async move { greet(context, &server).await })
        .await;
}

async fn greet(context: &Context, server: &ServerName) {
    let now = context.clock.now_ms();
    let body = json!({ "origin": context.server_name, "origin_server_ts": now, "pdus": [] });
    let Some(body) = body.as_object().cloned() else { return };
    let uri = format!("/_matrix/federation/v1/send/{now}.{}", context.store.next_id());
    let call = Call { timeout: PATIENCE, ..Call::put(uri, body) };
    if let Err(error) = context.client.call(server, call, false).await {
        tracing::debug!(%server, %error, "a server was not told that the gateway is back");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::Value;
    use tokio::sync::mpsc;
    use tokio_util::sync::CancellationToken;

    use super::super::Gateway;
    use super::*;
    use crate::clock::SystemClock;
    use crate::store::Store;
    use crate::store::outbound::{CursorKey, end, subscribe};

    #[tokio::test]
    async fn homeservers_are_told_at_the_start_that_the_gateway_is_back() {
        let directory = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}", directory.path().join("g.db").display());
        let store = Store::open(&url).await.unwrap();
        let write = store.write(|tx| {
            Box::pin(async move {
                let key = |destination: &str, kind: &str| {
                    let [destination, kind, room_id] = [destination, kind, "!a:g.example"].map(str::to_owned);
                    CursorKey { destination, kind, room_id }
                };
                for (destination, kind) in [("hs.example", "graph"), ("lm.example", "log"), ("left.example", "graph")] {
                    subscribe(tx, &key(destination, kind), 0).await?;
                }
                end(tx, &key("left.example", "graph"), 0).await
            })
        });
        write.await.unwrap();
        store.close().await;

        let (said, mut heard) = mpsc::unbounded_channel();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let peer = format!("http://{}", listener.local_addr().unwrap());
        let answer = move |request: axum::extract::Request| {
            let said = said.clone();
            async move {
                let (parts, body) = request.into_parts();
                let body = axum::body::to_bytes(body, 1 << 20).await.unwrap();
                let body: Value = serde_json::from_slice(&body).unwrap();
                let by = parts.headers["authorization"].to_str().unwrap().to_owned();
                said.send((format!("{} {}", parts.method, parts.uri), by, body)).unwrap();
                axum::Json(json!({}))
            }
        };
        tokio::spawn(async move { axum::serve(listener, axum::Router::new().fallback(answer)).await });
        let resolve = json!({ "hs.example": peer, "lm.example": peer, "left.example": peer });
        let config = serde_json::from_value(json!({
            "server_name": "g.example",
            "signing_key": directory.path().join("key"),
            "database": { "url": url },
            "media": { "cache_dir": directory.path().join("media") },
            "federation": { "resolve": resolve },
            "listen": { "address": "127.0.0.1:0" },
            "admin": { "address": "127.0.0.1:0" },
        }));
        let gateway = Gateway::start(config.unwrap(), Arc::new(SystemClock)).await.unwrap();
        let first = tokio::time::timeout(Duration::from_secs(60), heard.recv()).await;
        let (request, by, body) = first.expect("somebody is told").unwrap();
        assert!(request.starts_with("PUT /_matrix/federation/v1/send/"), "{request}");
        assert!(by.contains(r#"destination="hs.example""#), "{by}");
        assert_eq!((&body["pdus"], &body["origin"]), (&json!([]), &json!("g.example")));
        let stop = CancellationToken::new();
        stop.cancel();
        gateway.run(stop).await.unwrap();
        assert!(heard.try_recv().is_err(), "nobody else is told");
    }
}
