//! What is still on its way to a destination, for those who must know before they ask it for something.

use ruma::ServerName;

use super::{Feed, OutboundQueues};
use crate::store::{StoreError, outbound as rows};

impl OutboundQueues {
    /// Whether events of a feed are on their way to a destination, or may be.
    pub async fn is_on_its_way(&self, destination: &ServerName, feed: &Feed) -> Result<bool, StoreError> {
        let inflight = rows::inflight(&self.handle.shared.store, destination.as_str()).await?;
        let is_of = |part: &rows::PartRow| part.kind == feed.kind.as_str() && part.room_id == feed.room_id.as_str();
        Ok(inflight.is_some_and(|inflight| inflight.parts.iter().any(is_of)))
    }

    /// Whether a destination has not got yet all that a feed has for it.
    pub async fn waits_for(&self, destination: &ServerName, feed: &Feed) -> Result<bool, StoreError> {
        let cursor = rows::cursor(&self.handle.shared.store, &feed.key(destination)).await?;
        Ok(cursor.is_some_and(|cursor| cursor.sent < cursor.target))
    }
}
