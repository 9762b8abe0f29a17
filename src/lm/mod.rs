//! The linear side: logs of LM rooms, their authorization rules, the two roles (hub and participant), what is served to
//! other LM servers and what is asked of them.
//!
//! Where to find what: `rules` judges one event; `room` is a room after an event, `rooms` keeps them in memory; `batch`
//! writes events with all that hangs on them, `actor` gives each hubbed room its one appender. The hub's side is in `hub`
//! (own events, LPDUs), `handshake`, `invite`, `served`, `kept` (of a log that another server kept before), `visibility` and `join_state`; the participant's in `participant` (joining), `join_check`
//! (the state that comes with a join),
//! `intake` (what the hub sends), `gaps` (what is missing of
//! that), `staged` (where that is much), `look` (whether the log as a whole is what was given), `holes` (what stays missing), `waits` (what waits to be
//! judged), `finished` (its signatures and hashes), `lpdus` (what goes to the hub) and `ahead` (what has
//! not come back from there); `owed` has users leave whose joins were of no use. `shared` is the log of a room that is a graph too. `weight` bounds the state that a foreign hub can have us keep. `feed` is what
//! the outbound queues read, `peers` what is asked of others, `reads` what the gateway itself asks.

mod actor;
mod ahead;
mod back;
mod batch;
mod chain;
mod feed;
mod finished;
mod gaps;
mod handshake;
mod holes;
mod hub;
mod in_line;
mod intake;
mod invite;
mod join_check;
mod join_state;
mod kept;
mod knock;
mod look;
mod lpdus;
mod names;
mod owed;
mod participant;
mod past;
mod peers;
mod reads;
mod redactions;
mod remarks;
mod room;
mod rooms;
pub mod rules;
mod served;
mod shared;
mod staged;
mod state;
mod succession;
mod tell;
#[cfg(test)]
mod tests;
mod transfer;
mod visibility;
mod waits;
mod ways;
mod weight;
mod whereabouts;

use std::sync::{Arc, OnceLock, Weak};

use ruma::{OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId};

pub use self::ahead::Coming;
use self::feed::Feeds;
pub use self::holes::AGAIN_MS as HOLES_AGAIN_MS;
pub use self::hub::id_as_received;
use self::invite::Invites;
use self::look::Looks;
use self::participant::Joining;
use self::peers::Peers;
use self::rooms::Rooms;
pub use self::state::State;
use self::tell::Tells;
pub use self::transfer::{HandedOver, Readiness};
use crate::admin::metrics::CacheMeter;
use crate::event::{Pdu, RoomVersion};
use crate::federation::{Context, FeedKind};
use crate::guard::Careful;
use crate::identity::Side;
use crate::seam::{Draft, Graphs, OwedLeaves, SharedBetween};

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
    /// That server keeps the log for LM servers; this gateway takes part in the room's graph, from which it keeps a log of its own.
    GraphServer {
        /// The hub.
        hub: OwnedServerName,
    },
}

/// How a server takes part in a room that LM servers and graph servers share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// It sends LPDUs, and gets the log.
    Log,
    /// It sends events of the room's graph.
    Graph,
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
    inner: Arc<Inner>,
}

struct Inner {
    context: Context,
    between: SharedBetween,
    rooms: Rooms,
    careful: Careful,
    /// Events by ID.
    events: moka::future::Cache<OwnedEventId, Appended>,
    events_meter: CacheMeter,
    peers: Peers,
    joining: Joining,
    invites: Invites,
    looks: Looks,
    tells: Tells,
    owed: OwedLeaves,
    /// Events that are named in logs which do not have them.
    not_in_logs: moka::sync::Cache<(OwnedRoomId, OwnedEventId), ()>,
    /// The graphs of shared rooms.
    graphs: OnceLock<Weak<dyn Graphs>>,
}

impl Lm {
    /// The linear side over `context`; registers its feeds with the outbound queues.
    pub fn new(context: Context, between: SharedBetween) -> Self {
        let caches = &context.config.caches;
        // What is new is asked for next, by the bridge; it must not have to prove itself against what was asked for often.
        let events = moka::future::Cache::builder()
            .eviction_policy(moka::policy::EvictionPolicy::lru())
            .max_capacity(caches.events)
            .weigher(reads::weight)
            .build();
        let inner = Inner {
            rooms: Rooms::new(context.store.clone(), caches.rooms),
            careful: Careful::default(),
            events_meter: CacheMeter::watch("log_events", &events),
            events,
            peers: Peers::new(context.client.clone(), context.keyring.clone()),
            joining: Joining::default(),
            invites: Invites::new(),
            looks: Looks::new(),
            tells: Tells::default(),
            owed: OwedLeaves::new(Side::Lm, context.store.clone(), context.clock.clone()),
            not_in_logs: moka::sync::Cache::new(in_line::REMEMBERED),
            graphs: OnceLock::new(),
            context,
            between,
        };
        let inner = Arc::new(inner);
        let feeds = Arc::new(Feeds(Arc::downgrade(&inner)));
        inner.context.outbound.register(&[FeedKind::Log, FeedKind::Lpdus], feeds);
        Self { inner }
    }

    fn not_in_logs(&self) -> &moka::sync::Cache<(OwnedRoomId, OwnedEventId), ()> {
        &self.inner.not_in_logs
    }

    fn context(&self) -> &Context {
        &self.inner.context
    }

    fn between(&self) -> &SharedBetween {
        &self.inner.between
    }

    fn rooms(&self) -> &Rooms {
        &self.inner.rooms
    }

    fn careful(&self) -> &Careful {
        &self.inner.careful
    }

    fn peers(&self) -> &Peers {
        &self.inner.peers
    }

    fn looks(&self) -> &Looks {
        &self.inner.looks
    }

    fn joining(&self) -> &Joining {
        &self.inner.joining
    }
}
