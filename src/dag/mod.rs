//! The graph side: Matrix rooms as event graphs, their state and its resolution, handshakes, what is served to other
//! homeservers and what is asked of them.

use std::sync::Arc;

use ruma::{EventId, OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId, RoomId, ServerName, UserId};
use serde_json::Value;

use crate::event::{Object, RoomVersion};
use crate::federation::Context;
use crate::refusal::Refusal;
use crate::seam::{AliasTarget, Draft, Outgoing, Profile, Raw, Received, SharedBetween};

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
    /// One more than the deepest of those.
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
    /// Whether it is listed in the public directory.
    pub listed: bool,
}

/// The current, resolved state of a room.
pub type State = std::collections::BTreeMap<(String, String), Arc<GraphEvent>>;

/// A room that the gateway is to create.
#[derive(Debug, Clone)]
pub struct NewRoom {
    /// The creator, the gateway's bot.
    pub creator: OwnedUserId,
    /// The version: 10, 11 or 12.
    pub version: RoomVersion,
    /// State events after `m.room.create` and the creator's join, in order.
    pub initial_state: Vec<Draft>,
}

/// The graph side; clones share it.
#[derive(Clone)]
pub struct Dag {
    context: Context,
    between: SharedBetween,
}

/// What the gateway itself asks of the graph side.
impl Dag {
    /// The graph side over `context`; registers its feed with the outbound queues.
    pub fn new(context: Context, between: SharedBetween) -> Self {
        Self { context, between }
    }

    /// Creates a room with the gateway's bot as its creator.
    pub async fn create_room(&self, _room: NewRoom) -> Result<OwnedRoomId, Refusal> {
        let _ = (&self.context, &self.between);
        unimplemented!()
    }

    /// What is known of a room; none when the gateway is not in it.
    pub async fn room(&self, _room_id: &RoomId) -> Result<Option<Room>, Refusal> {
        unimplemented!()
    }

    /// Sends events of the gateway's users into a room, in order: each is built on the newest forward extremities (at
    /// most 10), put through the check of foreign events, stored and queued, in one transaction with its effect. Each
    /// fails alone. What is sent here does not go into the bridge's inbox.
    pub async fn send(&self, _room_id: &RoomId, _events: Vec<Outgoing>) -> Vec<Result<Arc<GraphEvent>, Refusal>> {
        unimplemented!()
    }

    /// Whether the room's rules would let `draft` in on the current state.
    pub async fn check(&self, _room_id: &RoomId, _draft: &Draft) -> Result<(), Refusal> {
        unimplemented!()
    }

    /// Invites a user of another server: the target's server is asked and signs, then the event is stored and sent.
    pub async fn invite(&self, _room_id: &RoomId, _invite: Outgoing) -> Result<Arc<GraphEvent>, Refusal> {
        unimplemented!()
    }

    /// The current, resolved state.
    pub async fn state(&self, _room_id: &RoomId) -> Result<Arc<State>, Refusal> {
        unimplemented!()
    }

    /// One accepted event.
    pub async fn event(&self, _event_id: &EventId) -> Result<Option<Arc<GraphEvent>>, Refusal> {
        unimplemented!()
    }

    /// Lists the room in the public directory, or takes it out.
    pub async fn set_listed(&self, _room_id: &RoomId, _listed: bool) -> Result<(), Refusal> {
        unimplemented!()
    }

    /// The profile of a user of another server, asked of that server.
    pub async fn query_profile(&self, _user_id: &UserId) -> Result<Profile, Refusal> {
        unimplemented!()
    }

    /// Asks `server` where an alias leads.
    pub async fn query_directory(&self, _server: &ServerName, _alias: &str) -> Result<AliasTarget, Refusal> {
        unimplemented!()
    }
}

/// What other homeservers ask; the gateway's routes call these with the proved origin. Answers are the JSON bodies.
impl Dag {
    /// Whether this room is on the graph side here.
    pub async fn knows(&self, _room_id: &RoomId) -> Result<bool, Refusal> {
        unimplemented!()
    }

    /// The PDUs of a transaction that belong to graph rooms; answers in order, after all is committed.
    pub async fn receive(&self, _origin: &ServerName, _pdus: Vec<Raw>) -> Vec<Received> {
        unimplemented!()
    }

    /// `GET v1/make_join`
    pub async fn make_join(
        &self,
        _origin: &ServerName,
        _room_id: &RoomId,
        _user_id: &UserId,
        _versions: &[String],
    ) -> Result<Value, Refusal> {
        unimplemented!()
    }

    /// `PUT v2/send_join`; full state unless `omit_members`, which may be ignored.
    pub async fn send_join(
        &self,
        _origin: &ServerName,
        _room_id: &RoomId,
        _event_id: &EventId,
        _event: Object,
        _omit_members: bool,
    ) -> Result<Value, Refusal> {
        unimplemented!()
    }

    /// `GET v1/make_leave`
    pub async fn make_leave(
        &self,
        _origin: &ServerName,
        _room_id: &RoomId,
        _user_id: &UserId,
    ) -> Result<Value, Refusal> {
        unimplemented!()
    }

    /// `PUT v2/send_leave`
    pub async fn send_leave(
        &self,
        _origin: &ServerName,
        _room_id: &RoomId,
        _event_id: &EventId,
        _event: Object,
    ) -> Result<Value, Refusal> {
        unimplemented!()
    }

    /// `PUT v2/invite`: another server invites a user of the gateway.
    pub async fn invited(
        &self,
        _origin: &ServerName,
        _room_id: &RoomId,
        _event_id: &EventId,
        _body: Object,
    ) -> Result<Value, Refusal> {
        unimplemented!()
    }

    /// `GET v1/event`
    pub async fn get_event(&self, _origin: &ServerName, _event_id: &EventId) -> Result<Value, Refusal> {
        unimplemented!()
    }

    /// `GET v1/event_auth`
    pub async fn event_auth(
        &self,
        _origin: &ServerName,
        _room_id: &RoomId,
        _event_id: &EventId,
    ) -> Result<Value, Refusal> {
        unimplemented!()
    }

    /// `GET v1/state`, and `state_ids` when `ids` is set.
    pub async fn get_state(
        &self,
        _origin: &ServerName,
        _room_id: &RoomId,
        _event_id: &EventId,
        _ids: bool,
    ) -> Result<Value, Refusal> {
        unimplemented!()
    }

    /// `GET v1/backfill`
    pub async fn backfill(
        &self,
        _origin: &ServerName,
        _room_id: &RoomId,
        _from: &[OwnedEventId],
        _limit: i64,
    ) -> Result<Value, Refusal> {
        unimplemented!()
    }

    /// `POST v1/get_missing_events`
    pub async fn get_missing_events(
        &self,
        _origin: &ServerName,
        _room_id: &RoomId,
        _body: Object,
    ) -> Result<Value, Refusal> {
        unimplemented!()
    }

    /// `GET` and `POST v1/publicRooms`: the rooms that are listed.
    pub async fn public_rooms(&self, _limit: Option<i64>, _since: Option<&str>) -> Result<Value, Refusal> {
        unimplemented!()
    }

    /// The servers through which a room can be joined: this one.
    pub fn servers(&self, _room_id: &RoomId) -> Vec<OwnedServerName> {
        vec![self.context.server_name.clone()]
    }
}
