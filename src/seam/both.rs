//! Shared rooms: rooms that are a graph and a log at once. What is true there is the graph, which `dag` keeps; the log, in
//! which `lm` lines its events up for LM servers, follows from it in the same transaction. Neither knows the other: `dag` asks
//! for a [`LogBatch`] and adds to it what the graph has accepted, `lm` gives what its side is asked to send to the [`Graphs`].

use std::sync::Arc;

use async_trait::async_trait;
use ruma::{EventId, OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId, RoomId, ServerName};

use super::{Draft, EventEffect};
use crate::event::{Object, Pdu, RoomVersion, VerifiedLpdu};
use crate::refusal::Refusal;
use crate::store::{StoreError, Tx, TxFuture};

/// In the content of a shared room's `m.room.create`: that it is one, `true`. It tells participants which table of redaction holds.
pub const SHARED: &str = "im.isthmus.shared";

/// A shared room whose log is to be made together with its first event.
#[derive(Debug, Clone)]
pub struct NewLog {
    /// The room.
    pub room_id: OwnedRoomId,
    /// Its version, one of those of LM.
    pub version: RoomVersion,
    /// The server that serves the log to LM servers: the creator's.
    pub hub: OwnedServerName,
}

/// Where an event of a shared room comes from, as far as the log must know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LogOrigin {
    /// It was made elsewhere: it goes into the bridge's inbox.
    pub foreign: bool,
    /// The answer to a handshake carries it to its sender's server, so the queue need not.
    pub answered: bool,
    /// It is a join by which its sender's server is in the graph as one that takes part by the log.
    pub comes: bool,
    /// It is seen to elsewhere that servers outside the room are told what it says of their users.
    pub told: bool,
}

/// The logs of shared rooms, as the graph side holds them.
#[async_trait]
pub trait Logs: Send + Sync + 'static {
    /// Begins to add to a room's log, over what is committed. The task of the room's graph is the only one that adds to it.
    async fn begin(&self, room_id: &RoomId) -> Result<Box<dyn LogBatch>, Refusal>;

    /// Begins the log of a new room.
    fn begin_new(&self, room: NewLog) -> Box<dyn LogBatch>;

    /// Nobody knows what became of a write: the room's log is read from the store again.
    async fn forget(&self, room_id: &RoomId);

    /// The hub of a room's log that follows from no graph here, if there is one.
    async fn hub_of_another(&self, room_id: &RoomId) -> Result<Option<OwnedServerName>, Refusal>;
}

/// Events on their way to the end of a log. Dropped without [`LogBatch::committed`] it has changed nothing in memory.
#[async_trait]
pub trait LogBatch: Send + Sync {
    /// Whether the log's rules allow the event, whose signatures are known to be right, at the end.
    fn judge(&self, event: &Pdu) -> Result<(), Refusal>;

    /// Puts it at the end.
    fn push(&mut self, event: Arc<Pdu>, origin: LogOrigin);

    /// From now on nobody reads more of an event, which the log may have, than its redaction leaves.
    fn redact(&mut self, target: &EventId, redaction: &EventId);

    /// How many events were put and redacted.
    fn len(&self) -> usize;

    /// Whether none were.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes back all but the first `len` of these.
    fn truncate(&mut self, len: usize);

    /// The event that the log has for a type and state key, at its end.
    fn state(&self, kind: &str, state_key: &str) -> Option<OwnedEventId>;

    /// All of these.
    fn all_state(&self) -> Vec<((String, String), OwnedEventId)>;

    /// Where the gateway is not the hub, and can correct nothing: from the end on the log has this event for a type and state key,
    /// or none. The event may be one that the log does not have.
    fn set_state(&mut self, kind: &str, state_key: &str, event: Option<Arc<Pdu>>);

    /// Another number each time that the log was read from the store, where what was set of its state is only as far as the log has
    /// the events.
    fn reading(&self) -> u64;

    /// Whether it has an event, or that is on its way.
    async fn has(&self, event_id: &EventId) -> Result<bool, Refusal>;

    /// The event that was made of an LPDU, in the log or on its way.
    async fn find_lpdu(&self, lpdu_id: &EventId) -> Result<Option<OwnedEventId>, Refusal>;

    /// Inside the write job of the graph: writes everything. May be asked again after what it has written was taken back.
    fn write<'c>(&'c self, tx: &'c mut Tx) -> TxFuture<'c, ()>;

    /// After the commit: tells the room's readers, the queues and the bridge.
    async fn committed(self: Box<Self>);

    /// The write failed, or nobody knows whether it did.
    fn uncertain(self: Box<Self>, error: &StoreError);
}

/// What is to be the next event of a shared room.
pub enum Next {
    /// A participant's LPDU, which the gateway finishes as the hub.
    Lpdu(VerifiedLpdu),
    /// What a user of the gateway sends.
    Own(Draft),
    /// A finished event of the gateway with a further server's signature: an invite.
    Finished(Box<Pdu>),
}

/// The same, with what goes with it.
pub struct NextEvent {
    /// The event.
    pub what: Next,
    /// Where it comes from.
    pub origin: LogOrigin,
    /// What is written with it, with its ID.
    pub effect: Option<EventEffect>,
}

/// The graphs of shared rooms, as the linear side holds them.
#[async_trait]
pub trait Graphs: Send + Sync + 'static {
    /// Puts events after all that the graph has, in order, and so at the end of the log. Each fails alone; an LPDU that the log
    /// has already is the event that was made of it. Answers with their IDs, after the commit.
    async fn add(&self, room_id: &RoomId, events: Vec<NextEvent>) -> Vec<Result<OwnedEventId, Refusal>>;

    /// An event as [`Graphs::add`] would put it, checked and signed; it is not put there.
    async fn build(&self, room_id: &RoomId, what: Next) -> Result<Pdu, Refusal>;

    /// Refuses a server that the room's list (`m.room.server_acl`) denies, by whichever door it comes.
    async fn admits(&self, room_id: &RoomId, server: &ServerName) -> Result<(), Refusal>;

    /// The log of a room was read from the store: what was set of its state is to be set again.
    fn log_was_read(&self, room_id: &RoomId);

    /// Makes a shared room with the gateway as its hub.
    async fn create(&self, room: NewShared) -> Result<OwnedRoomId, Refusal>;

    /// Takes part in a shared room that lives elsewhere, as a graph server. The join's ID, after the commit.
    async fn join(&self, join: JoinShared) -> Result<OwnedEventId, Refusal>;
}

/// A shared room that is to be joined.
#[derive(Debug, Clone)]
pub struct JoinShared {
    /// The room.
    pub room_id: OwnedRoomId,
    /// The server that has offered it.
    pub via: OwnedServerName,
    /// Who joins: a user of the gateway.
    pub user_id: OwnedUserId,
    /// What the join says but for the membership.
    pub content: Object,
}

/// A shared room that is to be made.
#[derive(Debug, Clone)]
pub struct NewShared {
    /// The creator, the gateway's bot.
    pub creator: OwnedUserId,
    /// The version, one of those of LM.
    pub version: RoomVersion,
    /// State events after `m.room.create` and the creator's join, in order.
    pub initial_state: Vec<Draft>,
}
