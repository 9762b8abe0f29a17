//! Outbound queues, one a destination: persisted as positions in feeds, not as copies of events. A feed is a list of events
//! with growing positions (an LM room's log, a graph room's outbox, the LPDUs for a hub); a destination has, for each feed
//! that it gets, the position up to which it has it. So a queue costs nothing per event, survives every crash, and is
//! caught up from the room itself. One transaction in flight a destination, the same ID and the same events on retry.

use std::sync::Arc;

use async_trait::async_trait;
use ruma::{OwnedRoomId, OwnedServerName, ServerName};
use serde_json::value::RawValue;

use crate::event::Object;
use crate::refusal::Refusal;
use crate::store::{Store, StoreError, Tx};

/// Which list of events a feed is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FeedKind {
    /// The log of an LM room that this gateway hubs: positions are log positions. Sent with the LM `send`.
    Log,
    /// LPDUs of this gateway's users for the hub of a room. Sent with the LM `send`.
    Lpdus,
    /// Events of a graph room that this gateway must send. Sent with the Matrix `send`.
    Graph,
}

/// One feed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Feed {
    /// What kind.
    pub kind: FeedKind,
    /// Of which room.
    pub room_id: OwnedRoomId,
}

/// An event at its position in a feed, as it goes over the wire.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// The position.
    pub position: i64,
    /// The event; none when this destination does not get what is at this position.
    pub event: Option<Box<RawValue>>,
}

/// Where the queues read the events of feeds. Implemented by `lm` and `dag`, each for its own kinds.
#[async_trait]
pub trait FeedSource: Send + Sync + 'static {
    /// The events of `feed` for `destination` after position `after`, in order, at most `limit`, none past `until`.
    async fn read(
        &self,
        feed: &Feed,
        destination: &ServerName,
        after: i64,
        until: Option<i64>,
        limit: usize,
    ) -> Result<Vec<Delivery>, StoreError>;

    /// Before a transaction whose fate is unknown is sent again: which of its positions are known to have arrived. For
    /// servers that are known to be idempotent, or feeds where that does no harm: none.
    async fn already_delivered(
        &self,
        feed: &Feed,
        destination: &ServerName,
        positions: &[i64],
    ) -> Result<Vec<i64>, Refusal>;

    /// The destination answered 200 to a transaction with these positions.
    async fn answered(&self, feed: &Feed, destination: &ServerName, positions: &[i64], answer: &Object);
}

/// The state of one destination's queue, for operators.
#[derive(Debug, Clone)]
pub struct QueueStatus {
    /// The destination.
    pub destination: OwnedServerName,
    /// How many events wait, as far as the heads of its feeds tell.
    pub waiting: i64,
    /// Failures in a row.
    pub failures: i64,
    /// When it is tried again, ms; 0 when now.
    pub retry_at: i64,
    /// The last failure.
    pub last_error: Option<String>,
}

/// All queues; clones share them.
#[derive(Clone)]
pub struct OutboundQueues {
    _inner: Arc<()>,
}

impl OutboundQueues {
    /// Queues over `store`; nothing is sent before [`OutboundQueues::start`].
    pub fn new(_store: Store) -> Self {
        unimplemented!()
    }

    /// Registers where the events of feeds of some kinds are read, before the start.
    pub fn register(&self, _kinds: &[FeedKind], _source: Arc<dyn FeedSource>) {
        unimplemented!()
    }

    /// Inside a write job: `destination` gets `feed` from the event after position `after` on. When it already gets the
    /// feed, nothing changes but an end that was set.
    pub async fn subscribe(
        _tx: &mut Tx,
        _destination: &ServerName,
        _feed: &Feed,
        _after: i64,
    ) -> Result<(), StoreError> {
        unimplemented!()
    }

    /// Inside a write job: the last position of `feed` that `destination` gets is `until`.
    pub async fn end(_tx: &mut Tx, _destination: &ServerName, _feed: &Feed, _until: i64) -> Result<(), StoreError> {
        unimplemented!()
    }

    /// Inside a write job: the feed's last position is now `head`.
    pub async fn advance(_tx: &mut Tx, _feed: &Feed, _head: i64) -> Result<(), StoreError> {
        unimplemented!()
    }

    /// After a commit: the feed has news for these destinations. Cheap; from memory.
    pub fn wake(&self, _feed: &Feed, _destinations: &[OwnedServerName]) {
        unimplemented!()
    }

    /// Tries a destination now, whatever its backoff: it was heard of, or an operator asks.
    pub fn retry(&self, _destination: &ServerName) {
        unimplemented!()
    }

    /// The queues that are not empty or that fail, for operators.
    pub async fn status(&self) -> Result<Vec<QueueStatus>, StoreError> {
        unimplemented!()
    }
}
