//! The linear side: logs of LM rooms, their authorization rules, the two roles (hub and participant), what is served to
//! other LM servers and what is asked of them.

pub mod rules;

use std::collections::BTreeMap;
use std::sync::Arc;

use ruma::{OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId, RoomId, ServerName, UserId};
use serde_json::Value;

use crate::event::{Object, Pdu, RoomVersion};
use crate::federation::Context;
use crate::refusal::Refusal;
use crate::seam::{AliasTarget, Draft, Outgoing, Raw, Received, SharedBetween};

/// An index in a log, from 0; once written it never changes (INV-1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Position(pub i64);

/// The gateway's part in an LM room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// This gateway keeps the log.
    Hub,
    /// That server keeps it.
    Participant {
        /// The hub.
        hub: OwnedServerName,
    },
}

/// What is known of an LM room.
#[derive(Debug, Clone)]
pub struct Room {
    /// Its ID.
    pub room_id: OwnedRoomId,
    /// Its version.
    pub version: RoomVersion,
    /// The gateway's role.
    pub role: Role,
    /// The last position of the log.
    pub head: Position,
    /// Where the hub misbehaved, as seen by this participant; empty when all is well.
    pub complaints: Vec<String>,
}

/// An event in its place in a log.
#[derive(Debug, Clone)]
pub struct Appended {
    /// The event.
    pub event: Arc<Pdu>,
    /// Its place.
    pub position: Position,
}

/// What became of an event that the gateway's own user sent.
#[derive(Debug, Clone)]
pub enum Sent {
    /// As hub: it is in the log.
    Appended(Appended),
    /// As participant: it is queued for the hub and will be known by its LPDU ID when its echo comes.
    Queued {
        /// The LPDU's reference hash with `$`.
        lpdu_id: OwnedEventId,
    },
}

/// The current state of a room: the last event of each (type, state key).
pub type State = BTreeMap<(String, String), Arc<Pdu>>;

/// A room that the gateway is to create as its hub.
#[derive(Debug, Clone)]
pub struct NewRoom {
    /// The creator, a bot of the gateway.
    pub creator: OwnedUserId,
    /// The version.
    pub version: RoomVersion,
    /// State events after `m.room.create` and the creator's join, in order: power levels, join rules, name …
    pub initial_state: Vec<Draft>,
}

/// The linear side; clones share it.
#[derive(Clone)]
pub struct Lm {
    context: Context,
    between: SharedBetween,
}

/// What the gateway itself asks of the linear side.
impl Lm {
    /// The linear side over `context`; registers its feeds with the outbound queues.
    pub fn new(context: Context, between: SharedBetween) -> Self {
        Self { context, between }
    }

    /// Creates a room with the gateway as its hub.
    pub async fn create_room(&self, _room: NewRoom) -> Result<OwnedRoomId, Refusal> {
        let _ = (&self.context, &self.between);
        unimplemented!()
    }

    /// What is known of a room; none when the gateway is not in it.
    pub async fn room(&self, _room_id: &RoomId) -> Result<Option<Room>, Refusal> {
        unimplemented!()
    }

    /// Sends events of the gateway's users into a room, in order. As hub they are appended when this returns, as
    /// participant they are signed and queued, in one transaction with their effects. Each fails alone, with its effect.
    /// What is sent here does not go into the bridge's inbox (an echo from a hub does).
    pub async fn send(&self, _room_id: &RoomId, _events: Vec<Outgoing>) -> Vec<Result<Sent, Refusal>> {
        unimplemented!()
    }

    /// Whether the LM rules would let `draft` in at the end of the log as it is now.
    pub async fn check(&self, _room_id: &RoomId, _draft: &Draft) -> Result<(), Refusal> {
        unimplemented!()
    }

    /// Joins a room whose hub is elsewhere as `user`, through the servers `via`, by make_join and send_join (or, when the
    /// gateway is in the room already, by an LPDU, waiting for its echo). Returns the join when the hub has accepted it.
    pub async fn join(
        &self,
        _room_id: &RoomId,
        _user: &UserId,
        _via: &[OwnedServerName],
        _content: Object,
    ) -> Result<Appended, Refusal> {
        unimplemented!()
    }

    /// Leaves a room, or rejects an invite to one that the gateway is not in, through the hub.
    pub async fn leave(&self, _room_id: &RoomId, _user: &UserId, _via: &[OwnedServerName]) -> Result<(), Refusal> {
        unimplemented!()
    }

    /// Invites a user of another server into a room: as hub through the target's server, which signs; as participant
    /// through the hub.
    pub async fn invite(&self, _room_id: &RoomId, _invite: Outgoing) -> Result<Sent, Refusal> {
        unimplemented!()
    }

    /// The current state of a room.
    pub async fn state(&self, _room_id: &RoomId) -> Result<Arc<State>, Refusal> {
        unimplemented!()
    }

    /// One event, with its place.
    pub async fn event(&self, _event_id: &ruma::EventId) -> Result<Option<Appended>, Refusal> {
        unimplemented!()
    }

    /// The event whose LPDU has this ID, once it is in the log.
    pub async fn event_of_lpdu(&self, _lpdu_id: &ruma::EventId) -> Result<Option<Appended>, Refusal> {
        unimplemented!()
    }

    /// A stretch of the log from `from` on.
    pub async fn log(&self, _room_id: &RoomId, _from: Position, _limit: i64) -> Result<Vec<Appended>, Refusal> {
        unimplemented!()
    }

    /// Asks `server` where an LM alias leads.
    pub async fn query_directory(&self, _server: &ServerName, _alias: &str) -> Result<AliasTarget, Refusal> {
        unimplemented!()
    }
}

/// What other LM servers ask; the gateway's routes call these with the proved origin. Answers are the JSON bodies.
impl Lm {
    /// Whether this room is on the linear side here.
    pub async fn knows(&self, _room_id: &RoomId) -> Result<bool, Refusal> {
        unimplemented!()
    }

    /// The PDUs of a transaction that belong to LM rooms; answers in order, after all is committed.
    pub async fn receive(&self, _origin: &ServerName, _pdus: Vec<Raw>) -> Vec<Received> {
        unimplemented!()
    }

    /// `GET make_join`
    pub async fn make_join(
        &self,
        _origin: &ServerName,
        _room_id: &RoomId,
        _user_id: &UserId,
        _versions: &[String],
    ) -> Result<Value, Refusal> {
        unimplemented!()
    }

    /// `POST send_join`; the same LPDU again gets the same answer.
    pub async fn send_join(&self, _origin: &ServerName, _body: Object) -> Result<Value, Refusal> {
        unimplemented!()
    }

    /// `GET make_leave`
    pub async fn make_leave(
        &self,
        _origin: &ServerName,
        _room_id: &RoomId,
        _user_id: &UserId,
    ) -> Result<Value, Refusal> {
        unimplemented!()
    }

    /// `POST send_leave`
    pub async fn send_leave(&self, _origin: &ServerName, _body: Object) -> Result<Value, Refusal> {
        unimplemented!()
    }

    /// `POST invite`, as hub (from a participant, for a third server) and as the target's server.
    pub async fn invited(&self, _origin: &ServerName, _body: Object) -> Result<Value, Refusal> {
        unimplemented!()
    }

    /// `GET event`
    pub async fn get_event(&self, _origin: &ServerName, _event_id: &ruma::EventId) -> Result<Value, Refusal> {
        unimplemented!()
    }

    /// `GET state`, and `state_ids` when `ids` is set.
    pub async fn get_state(
        &self,
        _origin: &ServerName,
        _room_id: &RoomId,
        _event_id: Option<&ruma::EventId>,
        _ids: bool,
    ) -> Result<Value, Refusal> {
        unimplemented!()
    }

    /// `GET backfill`
    pub async fn backfill(
        &self,
        _origin: &ServerName,
        _room_id: &RoomId,
        _from: &ruma::EventId,
        _limit: i64,
    ) -> Result<Value, Refusal> {
        unimplemented!()
    }
}
