//! The graph side against a second homeserver that lives in the test: it has its own key, builds its events with ruma, and
//! answers over loopback HTTP.

mod arrival;
pub mod databases;
mod forks;
mod gaps;
mod handshakes;
mod hostile;
mod joining;
mod joining_hostile;
pub mod peer;
mod rooms;
mod sending;
pub mod shared;
mod synapse;

use std::collections::BTreeMap;
use std::sync::Arc;

use isthmus::clock::{Clock as _, ManualClock};
use isthmus::dag::{Dag, NewRoom};
use isthmus::event::{Object, RoomVersion};
use isthmus::federation::{Asked, Client, ClientOptions, Context, Large, OutboundQueues};
use isthmus::identity::{KeyFetcher, Keyring, MediaNames, Side, SigningKey};
use isthmus::refusal::Refusal;
use isthmus::seam::{Draft, Outgoing};
use isthmus::store::{Store, inbox};
use ruma::{OwnedEventId, OwnedRoomId, OwnedUserId, RoomId, UserId};
use serde_json::{Value, json};

use self::peer::Peer;
use crate::support::between::Watcher;

/// The gateway's name in these tests.
pub const OWN: &str = "gateway.example";
/// 2024-01-01.
pub const NOW: i64 = 1_704_067_200_000;

/// A graph side with a store of its own.
pub struct Gateway {
    pub dag: Dag,
    pub context: Context,
    pub clock: Arc<ManualClock>,
    pub between: Arc<Watcher>,
    _directory: tempfile::TempDir,
}

impl Gateway {
    /// A gateway that knows `peers`.
    pub async fn start(peers: &[&Peer]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&format!("sqlite://{}", directory.path().join("db").display())).await.unwrap();
        Self::over(store, peers, directory)
    }

    /// The same over the same store, as after a restart.
    pub fn restart(self, peers: &[&Peer]) -> Self {
        Self::over(self.context.store, peers, self._directory)
    }

    /// The same over a store of the caller's.
    pub fn over(store: Store, peers: &[&Peer], directory: tempfile::TempDir) -> Self {
        let (context, clock) = context(store, peers, None);
        let between = Arc::new(Watcher::default());
        let dag = Dag::new(context.clone(), between.clone());
        Self { dag, context, clock, between, _directory: directory }
    }

    /// A room with these join rules, made by the bot.
    pub async fn room(&self, version: RoomVersion, join_rule: &str) -> OwnedRoomId {
        self.room_with(version, vec![state("m.room.join_rules", "", json!({ "join_rule": join_rule }))]).await
    }

    /// A public room in which everybody may send state.
    pub async fn room_of_moderators(&self, version: RoomVersion) -> OwnedRoomId {
        // Of version 12 on, the levels do not name the creator.
        let users = if version == RoomVersion::V12 { json!({}) } else { json!({ bot().as_str(): 100 }) };
        let levels = state("m.room.power_levels", "", json!({ "users_default": 50, "users": users }));
        let public = state("m.room.join_rules", "", json!({ "join_rule": "public" }));
        self.room_with(version, vec![levels, public]).await
    }

    /// A room with this state, made by the bot.
    pub async fn room_with(&self, version: RoomVersion, initial_state: Vec<Draft>) -> OwnedRoomId {
        self.dag.create_room(NewRoom { creator: bot(), version, initial_state }).await.unwrap()
    }

    /// Sends one event of the gateway.
    pub async fn send(&self, room: &RoomId, draft: Draft) -> Result<OwnedEventId, Refusal> {
        let results = self.dag.send(room, vec![Outgoing { draft, effect: None }]).await;
        results.into_iter().next().unwrap().map(|event| event.event_id.clone())
    }

    /// What waits in the bridge's inbox, in order.
    pub async fn inbox(&self, room: &RoomId) -> Vec<OwnedEventId> {
        let rows = inbox::waiting(&self.context.store, Side::Matrix, room, 0, 10_000).await.unwrap();
        rows.into_iter().map(|row| row.event_id).collect()
    }

    /// The current state's event IDs.
    pub async fn state(&self, room: &RoomId) -> BTreeMap<(String, String), OwnedEventId> {
        let state = self.dag.state(room).await.unwrap();
        state.iter().map(|(key, event)| (key.clone(), event.event_id.clone())).collect()
    }

    /// A current membership.
    pub async fn membership(&self, room: &RoomId, user: &UserId) -> Option<String> {
        let event = self.dag.state_event(room, "m.room.member", user.as_str()).await.unwrap()?;
        event.content.get("membership")?.as_str().map(str::to_owned)
    }

    pub fn now(&self) -> i64 {
        self.clock.now_ms()
    }
}

/// What a gateway stands on that knows `peers`, and the clock by which it goes. Keys are asked of the servers, or come from `keys`.
pub fn context(store: Store, peers: &[&Peer], keys: Option<Arc<dyn KeyFetcher>>) -> (Context, Arc<ManualClock>) {
    let own: ruma::OwnedServerName = OWN.try_into().unwrap();
    let clock = ManualClock::new(NOW);
    let key = Arc::new(SigningKey::from_seed("own", "YJDBA9Xnr2sVqXD9Vj7XVUnmFZcZrlw8Md7kMW+3XA1").unwrap());
    let options = ClientOptions {
        allow_private_networks: true,
        resolve: peers.iter().map(|peer| (peer.name.clone(), peer.url.clone())).collect(),
        ..ClientOptions::default()
    };
    let client = Client::new(own.clone(), key.clone(), options).unwrap();
    let keys = keys.unwrap_or_else(|| Arc::new(client.clone()));
    let keyring = Keyring::new(own.clone(), key.clone(), keys, store.clone(), clock.clone());
    let config = serde_json::from_value(json!({ "server_name": OWN })).unwrap();
    let context = Context {
        outbound: OutboundQueues::new(store.clone(), clock.clone(), own.clone(), client.clone(), keyring.clone()),
        signing_key: key,
        keyring,
        store,
        clock: clock.clone(),
        client,
        asked: Asked::default(),
        large: Large::default(),
        media: MediaNames::new(own.clone(), &[7; 32]),
        config: Arc::new(config),
        server_name: own,
    };
    (context, clock)
}

pub fn bot() -> OwnedUserId {
    format!("@isthmus:{OWN}").try_into().unwrap()
}

pub fn ghost(name: &str) -> OwnedUserId {
    format!("@lm_{name}_hub.example:{OWN}").try_into().unwrap()
}

pub fn object(value: Value) -> Object {
    value.as_object().unwrap().clone()
}

/// A state event of the bot.
pub fn state(kind: &str, state_key: &str, content: Value) -> Draft {
    draft(&bot(), kind, Some(state_key), content)
}

/// A message of one of the gateway's users.
pub fn message(sender: &UserId, body: &str) -> Draft {
    draft(sender, "m.room.message", None, json!({ "msgtype": "m.text", "body": body }))
}

pub fn draft(sender: &UserId, kind: &str, state_key: Option<&str>, content: Value) -> Draft {
    Draft {
        sender: sender.to_owned(),
        kind: kind.to_owned(),
        state_key: state_key.map(str::to_owned),
        content: object(content),
        origin_server_ts: NOW,
    }
}

/// The versions that the gateway makes rooms of.
pub const VERSIONS: [RoomVersion; 3] = [RoomVersion::V10, RoomVersion::V11, RoomVersion::V12];
