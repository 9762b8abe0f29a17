//! A gateway in memory that has no network: keys come from the test, events are handed to it, and nothing that it sends goes anywhere.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use isthmus::bridge::Bridge;
use isthmus::clock::ManualClock;
use isthmus::dag::Dag;
use isthmus::event::{Lpdu, Object, sign_object};
use isthmus::federation::Context;
use isthmus::identity::{KeyFetcher, SigningKey};
use isthmus::lm::Lm;
use isthmus::refusal::Refusal;
use isthmus::seam::{Draft, Received};
use isthmus::store::Store;
use ruma::{OwnedServerName, RoomId, ServerName};
use serde_json::{Value, json};

use crate::dag::peer::{Peer, own};
use crate::dag::{NOW, context};

/// Two homeservers and an LM server, which sign and do nothing else.
pub struct Servers {
    pub one: Peer,
    pub two: Peer,
    pub linear: Peer,
}

/// The keys of servers in the test.
struct Keys(BTreeMap<OwnedServerName, Object>);

#[async_trait]
impl KeyFetcher for Keys {
    async fn fetch_keys(&self, server: &ServerName) -> Result<Object, Refusal> {
        self.0.get(server).cloned().ok_or_else(|| Refusal::NotFound(format!("the server {server}")))
    }
}

fn peer(name: &str, number: u8) -> Peer {
    let seed = data_encoding::BASE64_NOPAD.encode(&[number; 32]);
    let key = SigningKey::from_seed("test", &seed).unwrap();
    let url = "http://127.0.0.1:1".parse().unwrap();
    Peer { name: name.try_into().unwrap(), url, key: Arc::new(key), memory: Arc::default(), front: Default::default() }
}

impl Servers {
    pub fn new() -> Self {
        Self { one: peer("one.example", 1), two: peer("two.example", 2), linear: peer("linear.example", 3) }
    }

    fn all(&self) -> [&Peer; 3] {
        [&self.one, &self.two, &self.linear]
    }

    fn keys(&self) -> Keys {
        let answer = |peer: &Peer| {
            let mut keys = json!({
                "server_name": peer.name, "valid_until_ts": NOW + 6 * 86_400_000, "old_verify_keys": {},
                "verify_keys": { peer.key.id(): { "key": peer.key.public_base64() } },
            });
            let keys = keys.as_object_mut().unwrap();
            sign_object(keys, peer.name.as_str(), &peer.key);
            (peer.name.clone(), keys.clone())
        };
        Keys(self.all().into_iter().map(answer).collect())
    }

    /// What the LM server's user says, as its server sends it.
    pub fn lpdu(&self, room: &RoomId, draft: &Draft) -> Lpdu {
        let mut template = json!({ "room_id": room, "sender": draft.sender, "type": draft.kind,
            "content": draft.content, "origin_server_ts": draft.origin_server_ts });
        if let Some(key) = &draft.state_key {
            template["state_key"] = json!(key);
        }
        let template = template.as_object().unwrap().clone();
        Lpdu::build(template, &own(), &self.linear.name, &self.linear.key).unwrap()
    }
}

/// The gateway.
pub struct House {
    pub context: Context,
    pub clock: Arc<ManualClock>,
    pub lm: Lm,
    pub dag: Dag,
    pub bridge: Bridge,
    _directory: tempfile::TempDir,
}

impl House {
    pub async fn open(servers: &Servers) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&format!("sqlite://{}", directory.path().join("db").display())).await.unwrap();
        let (context, clock) = context(store, &servers.all(), Some(Arc::new(servers.keys())));
        context.keyring.remember_own().await.unwrap();
        let bridge = Bridge::new(context.clone());
        let lm = Lm::new(context.clone(), bridge.between());
        let dag = Dag::new(context.clone(), bridge.between());
        bridge.start(lm.clone(), dag.clone()).await.unwrap();
        Self { context, clock, lm, dag, bridge, _directory: directory }
    }

    /// A transaction of the LM server.
    pub async fn lm_put(&self, servers: &Servers, lpdus: &[Lpdu]) -> Vec<Received> {
        let raw = lpdus.iter().map(|lpdu| serde_json::value::to_raw_value(&lpdu.json).unwrap()).collect();
        self.lm.receive(&servers.linear.name, raw).await
    }

    /// All that the graph of a room has, whatever became of it: IDs, events, and whether they were accepted.
    pub async fn graph(&self, room: &RoomId) -> Vec<(ruma::OwnedEventId, Value, bool)> {
        let rows: Vec<(String, Vec<u8>, i64)> =
            sqlx::query_as("SELECT event_id, json, status FROM dag_events WHERE room_id = $1 ORDER BY seq")
                .bind(room.as_str())
                .fetch_all(self.context.store.reader())
                .await
                .unwrap();
        let row = |(id, json, status): (String, Vec<u8>, i64)| {
            (id.as_str().try_into().unwrap(), serde_json::from_slice(&json).unwrap(), status == 0)
        };
        rows.into_iter().map(row).collect()
    }
}
