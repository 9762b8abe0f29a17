//! A small provider of Linearized Matrix: a server with users and rooms, hub of the rooms that it makes and participant in
//! the rooms that its users join elsewhere. It is the other side of the demo and of the tests, so it shares only the event
//! format, signatures and server names with the gateway; the two roles are written anew here, in memory.
#![allow(dead_code, missing_docs)]

mod edus;
mod eigen;
mod hub;
mod journal;
mod media;
mod network;
mod outbox;
mod participant;
mod room;
mod rules;
mod server;

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use isthmus::clock::{Clock as _, SystemClock};
use isthmus::event::{Object, Pdu};
use isthmus::identity::SigningKey;
use ruma::{OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId, RoomId, UserId};
use serde_json::{Value, json};
use tokio::runtime::Handle;
use tokio::sync::{Notify, broadcast};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use url::Url;

use self::journal::Journal;
use self::network::Network;
use self::room::Room;

/// The room version that the provider speaks.
pub const ROOM_VERSION: &str = "org.matrix.i-d.ralston-mimi-linearized-matrix.02";
/// How long anything may take that is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// How to start a provider.
pub struct Options {
    /// Its server name.
    pub server_name: OwnedServerName,
    /// Where it listens, without TLS.
    pub listen: SocketAddr,
    /// A certificate authority to trust besides the system's, PEM.
    pub ca: Option<PathBuf>,
    /// Where other servers are.
    pub resolve: BTreeMap<OwnedServerName, Url>,
    /// A file in which rooms and what is to be sent survive a restart; its signing key stands beside it.
    pub journal: Option<PathBuf>,
    /// Whether it has the manners of the LM server that others know (see `eigen`), as hub.
    pub eigen: bool,
}

/// What happened, for whoever watches.
#[derive(Debug, Clone)]
pub enum News {
    /// An event was appended to a room's log.
    Event(OwnedRoomId, Arc<Pdu>),
    /// A hub has refused an LPDU of ours.
    Refused(OwnedRoomId, OwnedEventId, String),
    /// A server said something besides events.
    Edu(OwnedServerName, Value),
    /// One of our users was invited.
    Invited(OwnedRoomId, OwnedUserId, OwnedUserId),
}

/// An invite that one of our users has.
#[derive(Debug, Clone)]
struct Invite {
    target: OwnedUserId,
    sender: OwnedUserId,
    hub: OwnedServerName,
}

/// What a new room is like.
#[derive(Debug, Clone, Default)]
pub struct NewRoom {
    /// The NAME of its alias `#NAME:server`.
    pub alias: Option<String>,
    /// Its name.
    pub name: Option<String>,
    /// Its join rule; `public` when not given.
    pub join_rule: Option<String>,
    /// Levels that differ from the default ones.
    pub power_levels: Object,
    /// What its first event says of encryption.
    pub encryption: Option<Value>,
}

/// A running provider; clones share it.
#[derive(Clone)]
pub struct Provider(Arc<Inner>);

struct Inner {
    me: Weak<Inner>,
    /// Where it listens.
    url: String,
    network: Network,
    eigen: bool,
    journal: Journal,
    rooms: Mutex<BTreeMap<OwnedRoomId, Room>>,
    aliases: Mutex<BTreeMap<String, OwnedRoomId>>,
    invites: Mutex<BTreeMap<OwnedRoomId, Invite>>,
    names: Mutex<BTreeMap<OwnedUserId, String>>,
    /// The users' files, by their IDs.
    files: Mutex<BTreeMap<String, media::File>>,
    /// What other servers said besides events.
    heard: Mutex<Vec<(OwnedServerName, Value)>>,
    /// Numbers of transactions that hold nothing but EDUs.
    numbers: Mutex<std::ops::RangeFrom<u64>>,
    outboxes: Mutex<HashMap<OwnedServerName, Arc<Notify>>>,
    /// The tasks of the outboxes, and the one that serves until it is told to stop.
    tasks: Mutex<Vec<JoinHandle<()>>>,
    serving: Mutex<Option<JoinHandle<()>>>,
    /// Where the tasks run.
    runtime: Handle,
    stopping: CancellationToken,
    news: broadcast::Sender<News>,
}

/// A lock that goes on after a panic of somebody else who held it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An object literal.
fn object(value: Value) -> Object {
    match value {
        Value::Object(object) => object,
        _ => Object::new(),
    }
}

impl Provider {
    /// Starts a provider, with what its journal holds.
    pub async fn start(options: Options) -> Result<Self> {
        let key = match &options.journal {
            Some(journal) => SigningKey::load_or_generate(&journal.with_extension("key"))?,
            None => SigningKey::generate(),
        };
        let listener = tokio::net::TcpListener::bind(options.listen).await.context("listening")?;
        let url = format!("http://{}", listener.local_addr()?);
        let (journal, kept) = Journal::open(options.journal.as_deref())?;
        let network = Network::new(options.server_name, Arc::new(key), options.ca.as_deref(), options.resolve)?;
        let inner = Arc::new_cyclic(|me| Inner {
            me: me.clone(),
            url,
            network,
            eigen: options.eigen,
            journal,
            rooms: Mutex::new(kept.rooms),
            aliases: Mutex::new(kept.aliases),
            invites: Mutex::default(),
            names: Mutex::default(),
            files: Mutex::default(),
            heard: Mutex::default(),
            numbers: Mutex::new(0..),
            outboxes: Mutex::default(),
            tasks: Mutex::default(),
            serving: Mutex::default(),
            runtime: Handle::current(),
            stopping: CancellationToken::new(),
            news: broadcast::channel(10_000).0,
        });
        let serving = tokio::spawn(server::serve(listener, inner.clone()));
        *lock(&inner.serving) = Some(serving);
        inner.wake_everybody();
        Ok(Self(inner))
    }

    /// Stops, leaving undone what is on its way to others.
    pub async fn stop(self) {
        let tasks = std::mem::take(&mut *lock(&self.0.tasks));
        tasks.iter().for_each(JoinHandle::abort);
        self.0.stopping.cancel();
        let serving = lock(&self.0.serving).take();
        futures::future::join_all(tasks.into_iter().chain(serving)).await;
    }

    /// Where it listens.
    pub fn url(&self) -> &str {
        &self.0.url
    }

    /// Its server name.
    pub fn server_name(&self) -> &OwnedServerName {
        &self.0.network.server_name
    }

    /// The user with this localpart.
    pub fn user(&self, localpart: &str) -> Result<OwnedUserId> {
        Ok(UserId::parse(format!("@{localpart}:{}", self.server_name()))?)
    }

    /// Gives a user a display name, which stands in the memberships that follow.
    pub fn set_display_name(&self, user: &UserId, name: &str) {
        lock(&self.0.names).insert(user.to_owned(), name.to_owned());
    }

    /// Everything that happens from now on.
    pub fn news(&self) -> broadcast::Receiver<News> {
        self.0.news.subscribe()
    }

    /// Makes a room and becomes its hub.
    pub fn create_room(&self, creator: &UserId, room: NewRoom) -> Result<OwnedRoomId> {
        self.0.create_room(creator, room)
    }

    /// Sends an event of a local user. As hub this gives its event ID, else the ID of the LPDU that is on its way.
    pub fn send(
        &self,
        sender: &UserId,
        room: &RoomId,
        kind: &str,
        state_key: Option<&str>,
        content: Value,
    ) -> Result<OwnedEventId> {
        let mut event = object(json!({ "type": kind, "room_id": room, "sender": sender, "content": content,
            "origin_server_ts": SystemClock.now_ms() }));
        if let Some(state_key) = state_key {
            event.insert("state_key".to_owned(), state_key.into());
        }
        self.0.send(room, event)
    }

    /// Sends an event whose every field is given, but for what the event format adds.
    pub fn send_raw(&self, room: &RoomId, event: Value) -> Result<OwnedEventId> {
        self.0.send(room, object(event))
    }

    /// Sends a text message.
    pub fn send_text(&self, sender: &UserId, room: &RoomId, body: &str) -> Result<OwnedEventId> {
        self.send(sender, room, "m.room.message", None, json!({ "msgtype": "m.text", "body": body }))
    }

    /// Kicks (`leave`), bans (`ban`) or lifts a ban (`leave`), or leaves.
    pub fn set_membership(
        &self,
        sender: &UserId,
        room: &RoomId,
        target: &UserId,
        membership: &str,
        reason: Option<&str>,
    ) -> Result<OwnedEventId> {
        let mut content = json!({ "membership": membership });
        if let (Some(reason), Some(content)) = (reason, content.as_object_mut()) {
            content.insert("reason".to_owned(), reason.into());
        }
        self.send(sender, room, "m.room.member", Some(target.as_str()), content)
    }

    /// Invites a user of any server.
    pub async fn invite(&self, sender: &UserId, room: &RoomId, target: &UserId) -> Result<()> {
        self.0.invite(sender, room, target).await
    }

    /// Joins a room by its alias or, through the servers `via`, by its ID; returns when the join is in the log.
    pub async fn join(&self, user: &UserId, room: &str, via: &[OwnedServerName]) -> Result<OwnedRoomId> {
        self.0.join(user, room, via).await
    }

    /// Leaves a room or declines an invite.
    pub async fn leave(&self, user: &UserId, room: &RoomId) -> Result<()> {
        let invited = lock(&self.0.invites).remove(room).filter(|invite| invite.target == user);
        match invited {
            Some(invite) => self.0.decline(user, room, &invite.hub).await,
            None => self.set_membership(user, room, user, "leave", None).map(drop),
        }
    }

    /// The rooms' IDs.
    pub fn rooms(&self) -> Vec<OwnedRoomId> {
        lock(&self.0.rooms).keys().cloned().collect()
    }

    /// A room's log, oldest event first; of a room hubbed elsewhere from our join on.
    pub fn log(&self, room: &RoomId) -> Vec<Arc<Pdu>> {
        let rooms = lock(&self.0.rooms);
        rooms.get(room).into_iter().flat_map(|room| &room.log).map(|entry| entry.event.clone()).collect()
    }

    /// The content of a state event.
    pub fn state(&self, room: &RoomId, kind: &str, state_key: &str) -> Option<Value> {
        let rooms = lock(&self.0.rooms);
        rules::content(&rooms.get(room)?.state, kind, state_key).cloned().map(Value::Object)
    }

    /// A user's membership.
    pub fn membership(&self, room: &RoomId, user: &str) -> String {
        lock(&self.0.rooms).get(room).map_or("leave", |room| rules::membership(&room.state, user)).to_owned()
    }

    /// What was wrong with what hubs sent.
    pub fn complaints(&self, room: &RoomId) -> Vec<String> {
        lock(&self.0.rooms).get(room).map(|room| room.complaints.clone()).unwrap_or_default()
    }

    /// A user's display name in a room, or the user's ID.
    pub fn display_name(&self, room: &RoomId, user: &str) -> String {
        let name = self
            .state(room, "m.room.member", user)
            .and_then(|content| Some(content.get("displayname")?.as_str()?.to_owned()));
        name.unwrap_or_else(|| user.to_owned())
    }

    /// Waits until an event that matches is in the log, wherever in it.
    pub async fn wait_for(&self, room: &RoomId, what: &str, matches: impl Fn(&Pdu) -> bool) -> Result<Arc<Pdu>> {
        let found = self.wait_for_many(room, what, 1, matches).await?;
        found.into_iter().next().ok_or_else(|| anyhow!("nothing found"))
    }

    /// Waits until `count` events that match are in the log and returns all that do, in the log's order.
    pub async fn wait_for_many(
        &self,
        room: &RoomId,
        what: &str,
        count: usize,
        matches: impl Fn(&Pdu) -> bool,
    ) -> Result<Vec<Arc<Pdu>>> {
        let mut news = self.news();
        let look = async {
            loop {
                let found: Vec<Arc<Pdu>> = self.log(room).into_iter().filter(|event| matches(event)).collect();
                if found.len() >= count {
                    return found;
                }
                // Whatever was missed is found by looking again.
                let _ = news.recv().await;
            }
        };
        match tokio::time::timeout(PATIENCE, look).await {
            Ok(found) => Ok(found),
            Err(_) => {
                let last: Vec<String> =
                    self.log(room).iter().rev().take(20).rev().map(|event| describe(event)).collect();
                bail!("{} waited for {what} in vain; the end of the log:\n  {}", self.server_name(), last.join("\n  "))
            }
        }
    }

    /// Waits for a text message.
    pub async fn wait_for_text(&self, room: &RoomId, body: &str) -> Result<Arc<Pdu>> {
        let is_it = |event: &Pdu| event.kind == "m.room.message" && event.content().get("body") == Some(&json!(body));
        self.wait_for(room, &format!("the message {body:?}"), is_it).await
    }

    /// Waits until a user's membership is the one given.
    pub async fn wait_for_member(&self, room: &RoomId, user: &str, membership: &str) -> Result<Arc<Pdu>> {
        let is_it = |event: &Pdu| {
            event.kind == "m.room.member"
                && event.state_key.as_deref() == Some(user)
                && event.content().get("membership") == Some(&json!(membership))
        };
        self.wait_for(room, &format!("{user} to be {membership}"), is_it).await
    }

    /// Waits until one of our users is invited into a room.
    pub async fn wait_for_invite(&self, user: &UserId) -> Result<OwnedRoomId> {
        let mut news = self.news();
        let look = async {
            loop {
                let found =
                    lock(&self.0.invites).iter().find(|(_, invite)| invite.target == user).map(|(id, _)| id.clone());
                if let Some(found) = found {
                    return found;
                }
                let _ = news.recv().await;
            }
        };
        tokio::time::timeout(PATIENCE, look).await.with_context(|| format!("{user} waited for an invite in vain"))
    }
}

fn describe(event: &Pdu) -> String {
    format!("{} {} {:?} {}", event.sender, event.kind, event.state_key, Value::Object(event.content().clone()))
}
