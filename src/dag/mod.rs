//! The graph side: Matrix rooms as event graphs, their state and its resolution, handshakes, what is served to other
//! homeservers and what is asked of them.

mod accept;
mod acl;
mod actor;
mod auth;
mod batch;
mod build;
mod correct;
mod create;
mod events;
mod fetch;
mod gaps;
mod given;
mod graphs;
mod handshake;
mod invite;
mod join;
mod joining;
mod log;
mod order;
mod outbox;
mod outliers;
mod outside;
mod owed;
mod past;
mod pdu;
mod query;
mod receive;
mod redact;
mod resolve;
mod room;
mod serve;
mod snapshot;
mod stored;
mod version;
mod walk;
mod whole;

use std::sync::{Arc, Mutex, OnceLock};

use imbl::ordmap::DiffItem;
use moka::future::Cache;
use ruma::{EventId, OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId, RoomId};

pub use self::acl::Acl;
use self::batch::Batch;
use self::events::Events;
pub use self::join::Joined;
use self::outbox::Outbox;
pub use self::pdu::id_as_received;
pub use self::query::DirectoryQuery;
use self::room::Rooms;
use self::snapshot::Snapshot;
use crate::admin::metrics::CacheMeter;
use crate::event::{Object, RoomVersion};
use crate::federation::{Context, FeedKind, FeedSource};
use crate::guard::Careful;
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::seam::{Draft, Logs, Outgoing, OwedLeaves, SharedBetween};

/// An accepted event of a graph.
#[derive(Debug, Clone)]
pub struct GraphEvent {
    /// `$` and the reference hash.
    pub event_id: OwnedEventId,
    /// The room; of a version 12 create event the room that it makes.
    pub room_id: OwnedRoomId,
    /// The sender.
    pub sender: OwnedUserId,
    /// The event type.
    pub kind: String,
    /// The state key of a state event.
    pub state_key: Option<String>,
    /// Milliseconds since the epoch, as the sender says.
    pub origin_server_ts: i64,
    /// The events before it.
    pub prev_events: Vec<OwnedEventId>,
    /// The events that it names as allowing it: among them its sender's membership.
    pub auth_events: Vec<OwnedEventId>,
    /// One more than the deepest of those before it.
    pub depth: i64,
    /// `content`.
    pub content: Object,
    /// Of a redaction: what it redacts.
    pub redacts: Option<OwnedEventId>,
}

/// What is known of a graph room.
#[derive(Debug, Clone)]
pub struct Room {
    /// Its ID.
    pub room_id: OwnedRoomId,
    /// Its version.
    pub version: RoomVersion,
}

/// The current, resolved state of a room, by type and state key. Clones share structure.
pub type State = imbl::OrdMap<(String, String), Arc<GraphEvent>>;

/// A room that the gateway is to create.
#[derive(Debug, Clone)]
pub struct NewRoom {
    /// The creator, the gateway's bot.
    pub creator: OwnedUserId,
    /// The version: 10, 11 or 12.
    pub version: RoomVersion,
    /// State events after `m.room.create` and the creator's join, in order. What stands here of `m.room.create` is added to
    /// its content; power levels, join rules (`invite`) and history visibility (`shared`) are made when they are not here.
    pub initial_state: Vec<Draft>,
}

/// Of how many rooms at least it is kept how they are listed.
const LISTINGS: u64 = 10_000;

/// The graph side; clones share it.
#[derive(Clone)]
pub struct Dag {
    shared: Arc<Shared>,
}

/// What everything on this side holds.
struct Shared {
    context: Context,
    between: SharedBetween,
    /// The logs of shared rooms.
    logs: OnceLock<Arc<dyn Logs>>,
    events: Events,
    rooms: Rooms,
    careful: Careful,
    joining: joining::Joining,
    owed: OwedLeaves,
    /// The groups that states were resolved to.
    resolved: Cache<Vec<i64>, i64>,
    acls: Cache<OwnedEventId, Arc<Acl>>,
    /// The shared rooms of which the log could not be brought into step.
    uncorrected: correct::Uncorrected,
    /// What is kept of servers that have nobody in a room.
    strays: Mutex<accept::Strays>,
    /// The gaps that are filled in the background.
    gaps: gaps::Gaps,
    /// The current states that were asked for as a whole.
    states: Cache<OwnedRoomId, (Snapshot, Arc<State>)>,
    /// How rooms are listed in the public directory, if they are, as of their current state.
    listings: Cache<OwnedRoomId, Option<Arc<serde_json::Value>>>,
    resolved_meter: CacheMeter,
    acls_meter: CacheMeter,
    states_meter: CacheMeter,
}

/// What the gateway itself asks of the graph side.
impl Dag {
    /// The graph side over `context`; registers its feed with the outbound queues.
    pub fn new(context: Context, between: SharedBetween) -> Self {
        let caches = &context.config.caches;
        let events = Events::new(context.store.clone(), caches.events, caches.rooms.saturating_mul(8));
        let (rooms, outbound) = (caches.rooms, context.outbound.clone());
        let (resolved, acls, states) = (Cache::new(rooms.saturating_mul(8)), Cache::new(rooms), Cache::new(rooms));
        let shared = Arc::new(Shared {
            owed: OwedLeaves::new(Side::Matrix, context.store.clone(), context.clock.clone()),
            context,
            between,
            logs: OnceLock::new(),
            events,
            rooms: Rooms::default(),
            careful: Careful::default(),
            joining: joining::Joining::default(),
            listings: Cache::new(rooms.max(LISTINGS)),
            resolved_meter: CacheMeter::watch("graph_resolutions", &resolved),
            acls_meter: CacheMeter::watch("graph_acls", &acls),
            states_meter: CacheMeter::watch("graph_whole_states", &states),
            resolved,
            acls,
            uncorrected: correct::Uncorrected::default(),
            strays: Mutex::default(),
            gaps: gaps::Gaps::default(),
            states,
        });
        outbound.register(&[FeedKind::Graph], Arc::new(Outbox(shared.clone())));
        Self { shared }
    }

    /// Says who keeps the logs of shared rooms; once, before any event comes.
    pub fn set_logs(&self, logs: Arc<dyn Logs>) {
        if self.shared.logs.set(logs).is_err() {
            tracing::error!("somebody keeps the logs of shared rooms already");
        }
    }

    /// What is known of a room; none when the gateway is not in it.
    pub async fn room(&self, room_id: &RoomId) -> Result<Option<Room>, Refusal> {
        Ok(self.shared.find(room_id).await?.map(|room| Room { room_id: room.room_id.clone(), version: room.version }))
    }

    /// Sends events of the gateway's users into a room, in order: each is built on the newest forward extremities (at
    /// most 20), put through the check of foreign events, stored and queued, in one transaction with its effect. Each
    /// fails alone. What is sent here does not go into the bridge's inbox.
    pub async fn send(&self, room_id: &RoomId, events: Vec<Outgoing>) -> Vec<Result<Arc<GraphEvent>, Refusal>> {
        let count = events.len();
        match self.try_send(room_id, events).await {
            Ok(results) => results,
            Err(refusal) => vec![Err(refusal); count],
        }
    }

    async fn try_send(
        &self,
        room_id: &RoomId,
        events: Vec<Outgoing>,
    ) -> Result<Vec<Result<Arc<GraphEvent>, Refusal>>, Refusal> {
        let room = self.shared.room(room_id).await?;
        self.shared
            .run(&room, move |batch| {
                Box::pin(async move {
                    let mut results = Vec::with_capacity(events.len());
                    let mut broken_off: Option<Refusal> = None;
                    for event in events {
                        let result = match &broken_off {
                            // What comes after an event that may yet be sent must not overtake it.
                            Some(refusal) => Err(refusal.clone()),
                            None => batch.send(event).await.map(|event| event.to_graph_event()),
                        };
                        broken_off =
                            broken_off.or_else(|| result.as_ref().err().filter(|error| error.is_transient()).cloned());
                        results.push(result);
                    }
                    Ok(results)
                })
            })
            .await
    }

    async fn send_one(&self, room: &Arc<room::Room>, event: Outgoing) -> Result<Arc<GraphEvent>, Refusal> {
        self.shared.run(room, move |batch| Box::pin(async move { Ok(batch.send(event).await?.to_graph_event()) })).await
    }

    /// Whether the room's rules would let `draft` in on the current state.
    pub async fn check(&self, room_id: &RoomId, draft: &Draft) -> Result<(), Refusal> {
        let room = self.shared.room(room_id).await?;
        Batch::new(self.shared.clone(), &room).would_accept(draft).await
    }

    /// The current, resolved state, whole. What asks for few events of it asks [`Dag::state_event`].
    pub async fn state(&self, room_id: &RoomId) -> Result<Arc<State>, Refusal> {
        let room = self.shared.room(room_id).await?;
        let current = room.core().current.clone();
        let (known, state) = self.shared.states.get(room_id).await.unwrap_or_default();
        let is_current = known.id == current.id;
        self.shared.states_meter.count(is_current.then_some(()));
        if is_current {
            return Ok(state);
        }
        let (mut gone, mut new) = (Vec::new(), Vec::new());
        for item in known.map.diff(&current.map) {
            match item {
                DiffItem::Add(_, id) | DiffItem::Update { new: (_, id), .. } => new.push(id.clone()),
                DiffItem::Remove(key, _) => gone.push(key.clone()),
            }
        }
        let mut state = State::clone(&state);
        for key in gone {
            state.remove(&key);
        }
        for event in self.shared.events.get_many(&new).await?.into_values() {
            if let Some(key) = event.key() {
                state.insert(key, event.to_graph_event());
            }
        }
        let state = Arc::new(state);
        self.shared.states.insert(room_id.to_owned(), (current, state.clone())).await;
        Ok(state)
    }

    /// One event of the current, resolved state: costs the same however large the room.
    pub async fn state_event(
        &self,
        room_id: &RoomId,
        kind: &str,
        state_key: &str,
    ) -> Result<Option<Arc<GraphEvent>>, Refusal> {
        let room = self.shared.room(room_id).await?;
        let core = room.core();
        let Some(id) = core.current.get(kind, state_key) else { return Ok(None) };
        Ok(self.shared.events.get(id).await?.map(|event| event.to_graph_event()))
    }

    /// Those of the current state's events that have one of these types and state keys: costs the same however large the
    /// room.
    pub async fn state_events(&self, room_id: &RoomId, keys: &[(String, String)]) -> Result<State, Refusal> {
        let room = self.shared.room(room_id).await?;
        let core = room.core();
        let ids: Vec<_> = keys.iter().filter_map(|key| core.current.map.get(key).cloned()).collect();
        let events = self.shared.events.get_many(&ids).await?;
        Ok(events.into_values().filter_map(|event| Some((event.key()?, event.to_graph_event()))).collect())
    }

    /// The users who are joined now.
    pub async fn joined(&self, room_id: &RoomId) -> Result<imbl::OrdSet<OwnedUserId>, Refusal> {
        Ok(self.shared.room(room_id).await?.core().joined.clone())
    }

    /// The servers of the users who are joined now.
    pub async fn joined_servers(&self, room_id: &RoomId) -> Result<Vec<OwnedServerName>, Refusal> {
        Ok(self.shared.room(room_id).await?.core().servers.keys().cloned().collect())
    }

    /// One accepted event.
    pub async fn event(&self, event_id: &EventId) -> Result<Option<Arc<GraphEvent>>, Refusal> {
        let event = self.shared.events.get(event_id).await?.filter(|event| event.is_accepted());
        Ok(event.map(|event| event.to_graph_event()))
    }

    /// The same, also of an event of which nothing is known but that it was in the state that another server gave.
    pub async fn event_of_state(&self, event_id: &EventId) -> Result<Option<Arc<GraphEvent>>, Refusal> {
        let event = self.shared.events.get(event_id).await?;
        let event = event.filter(|event| event.status == stored::Status::Accepted);
        Ok(event.map(|event| event.to_graph_event()))
    }

    /// Lists the room in the public directory while it is public, or takes it out.
    pub async fn set_listed(&self, room_id: &RoomId, listed: bool) -> Result<(), Refusal> {
        let id = room_id.to_owned();
        let write = self
            .shared
            .context
            .store
            .write(move |tx| Box::pin(async move { crate::store::dag::set_listed(tx, &id, listed).await }));
        Ok(write.await?)
    }

    /// What other servers are sent, as the outbound queues read it.
    pub fn outbox(&self) -> impl FeedSource + use<> {
        Outbox(self.shared.clone())
    }

    /// Whether this room is on the graph side here.
    pub async fn knows(&self, room_id: &RoomId) -> Result<bool, Refusal> {
        match self.shared.find(room_id).await {
            // It is there, and whoever sends something of it is told.
            Err(crate::store::StoreError::Corrupt { .. }) => Ok(true),
            found => Ok(found?.is_some()),
        }
    }

    /// The servers through which a room can be joined: this one.
    pub fn servers(&self, _room_id: &RoomId) -> Vec<OwnedServerName> {
        vec![self.shared.context.server_name.clone()]
    }
}
