//! What health and metrics show of the store.

use std::collections::BTreeMap;

use ruma::ServerName;

use super::lm::{Faults, Missing};
use super::owed::{Owed, owed_leaves};
use super::{Store, StoreError};

/// For how long a fault of a hub is shown, in milliseconds.
const FAULTS_FOR_MS: i64 = 3_600_000;

/// How much of the bridge waits, and how many portals there are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overview {
    /// Accepted events that wait to be carried over.
    pub inbox_waiting: i64,
    /// When the oldest of them was accepted, in milliseconds.
    pub inbox_oldest_ts: Option<i64>,
    /// Images that were given to a foreign hub and did not come back yet.
    pub echoes_waiting: i64,
    /// When the oldest of them was made, in milliseconds.
    pub echo_oldest_ts: Option<i64>,
    /// What of foreign hubs' logs is missing here.
    pub missing: Missing,
    /// What of graphs is missing here.
    pub graph_missing: super::gaps::Missing,
    /// What these hubs did wrong of late.
    pub faults: Faults,
    /// Which of our users are to leave rooms of other servers again.
    pub owed: Owed,
    /// How many portals are in each state.
    pub portals: Vec<(String, i64)>,
}

/// Reads it, at `now`; that it can be read shows that the store is there.
pub async fn overview(store: &Store, now: i64) -> Result<Overview, StoreError> {
    let (inbox_waiting, inbox_oldest_ts): (i64, Option<i64>) =
        sqlx::query_as("SELECT COUNT(*), MIN(received_ts) FROM bridge_inbox").fetch_one(store.reader()).await?;
    let (echoes_waiting, echo_oldest_ts): (i64, Option<i64>) =
        sqlx::query_as("SELECT COUNT(*), MIN(made_ts) FROM bridge_images WHERE pending = 1")
            .fetch_one(store.reader())
            .await?;
    let portals = sqlx::query_as("SELECT state, COUNT(*) FROM bridge_portals GROUP BY state ORDER BY COUNT(*) DESC")
        .fetch_all(store.reader())
        .await?;
    let missing = super::lm::missing(store, None).await?;
    let graph_missing = super::gaps::missing(store, None).await?;
    let faults = super::lm::faults_since(store, now.saturating_sub(FAULTS_FOR_MS)).await?;
    Ok(Overview {
        faults,
        owed: owed_leaves(store).await?,
        inbox_waiting,
        inbox_oldest_ts,
        echoes_waiting,
        echo_oldest_ts,
        missing,
        graph_missing,
        portals,
    })
}

/// A server with which the gateway shares rooms.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Peer {
    /// In how many Matrix rooms it gets events.
    pub matrix_rooms: i64,
    /// In how many LM rooms it gets events.
    pub lm_rooms: i64,
    /// Of how many portals it is the hub.
    pub hub_of: i64,
}

/// The servers with which the gateway shares rooms, by name.
pub async fn peers(store: &Store) -> Result<BTreeMap<String, Peer>, StoreError> {
    let rooms: Vec<(String, String, i64)> = sqlx::query_as(
        "SELECT destination, kind, COUNT(*) FROM outbound_cursors WHERE ends_at IS NULL GROUP BY destination, kind",
    )
    .fetch_all(store.reader())
    .await?;
    let hubs: Vec<(String, i64)> = sqlx::query_as(
        "SELECT lm_hub, COUNT(*) FROM bridge_portals WHERE kind = 'from_lm' AND state <> 'ended' GROUP BY lm_hub",
    )
    .fetch_all(store.reader())
    .await?;
    let mut peers: BTreeMap<String, Peer> = BTreeMap::new();
    for (server, kind, count) in rooms.into_iter().filter(|(_, kind, _)| !kind.ends_with("_edus")) {
        let peer = peers.entry(server).or_default();
        match kind.as_str() {
            "graph" => peer.matrix_rooms = count,
            "log" => peer.lm_rooms = count,
            // What goes to a hub is told by the portals.
            _ => {}
        }
    }
    for (server, count) in hubs {
        peers.entry(server).or_default().hub_of = count;
    }
    Ok(peers)
}

/// What is shared with one server.
pub async fn peer(store: &Store, server: &ServerName) -> Result<Peer, StoreError> {
    let rooms: Vec<(String, i64)> = sqlx::query_as(
        "SELECT kind, COUNT(*) FROM outbound_cursors WHERE destination = $1 AND ends_at IS NULL GROUP BY kind",
    )
    .bind(server.as_str())
    .fetch_all(store.reader())
    .await?;
    let count = |wanted: &str| rooms.iter().find(|(kind, _)| kind == wanted).map_or(0, |(_, count)| *count);
    let (hub_of,): (i64,) = sqlx::query_as(
        "SELECT COUNT(*) FROM bridge_portals WHERE kind = 'from_lm' AND state <> 'ended' AND lm_hub = $1",
    )
    .bind(server.as_str())
    .fetch_one(store.reader())
    .await?;
    Ok(Peer { matrix_rooms: count("graph"), lm_rooms: count("log"), hub_of })
}

/// Whether a server shares LM rooms with the gateway and no Matrix rooms.
pub async fn is_lm_only(store: &Store, server: &ServerName) -> Result<bool, StoreError> {
    let kinds: Vec<(String,)> = sqlx::query_as("SELECT DISTINCT kind FROM outbound_cursors WHERE destination = $1")
        .bind(server.as_str())
        .fetch_all(store.reader())
        .await?;
    let has = |wanted: &str| kinds.iter().any(|(kind,)| kind == wanted);
    Ok((has("log") || has("lpdus")) && !has("graph"))
}

#[cfg(test)]
mod tests {
    use ruma::server_name;

    use super::*;
    use crate::store::outbound::{CursorKey, subscribe};
    use crate::store::testing::both_stores;

    #[tokio::test]
    async fn an_empty_store_has_nothing_waiting() {
        both_stores(|store| async move {
            assert_eq!(overview(&store, 0).await.unwrap(), Overview::default());
            assert!(peers(&store).await.unwrap().is_empty());
        })
        .await;
    }

    #[tokio::test]
    async fn peers_are_known_by_the_rooms_that_are_shared() {
        both_stores(|store| async move {
            let write = store.write(|tx| {
                Box::pin(async move {
                    for (destination, kind, room_id) in [
                        ("hs", "graph", "!a:g"),
                        ("both", "graph", "!a:g"),
                        ("both", "log", "!b:g"),
                        ("lm", "log", "!b:g"),
                        ("lm", "log", "!c:g"),
                        ("hub", "lpdus", "!d:hub"),
                        ("told", "matrix_edus", "!edus:told"),
                    ] {
                        let [destination, kind, room_id] = [destination, kind, room_id].map(str::to_owned);
                        subscribe(tx, &CursorKey { destination, kind, room_id }, 0).await?;
                    }
                    Ok(())
                })
            });
            write.await.unwrap();
            let peers = peers(&store).await.unwrap();
            let of = |name: &str| peers.get(name).map(|peer| (peer.matrix_rooms, peer.lm_rooms));
            for (name, listed) in &peers {
                let name = ruma::ServerName::parse(name.as_str()).unwrap();
                assert_eq!(peer(&store, &name).await.unwrap(), *listed, "{name}");
            }
            assert_eq!([of("hs"), of("both"), of("lm")], [Some((1, 0)), Some((1, 1)), Some((0, 2))]);
            for (server, expected) in [("hs", false), ("both", false), ("lm", true), ("hub", true), ("other", false)] {
                let server = ruma::ServerName::parse(server).unwrap();
                assert_eq!(is_lm_only(&store, &server).await.unwrap(), expected, "{server}");
            }
            assert!(!is_lm_only(&store, server_name!("nobody")).await.unwrap());
        })
        .await;
    }
}
