//! EDUs that must not be lost, such as messages for devices: stored for each destination as a feed of its own, so that they are
//! sent until they have arrived, with the same transaction ID after a crash, like events.

use async_trait::async_trait;
use bytes::Bytes;
use ruma::{RoomId, ServerName};

use super::{Delivery, Feed, FeedKind, FeedSource, OutboundQueues};
use crate::event::{Edu, Object, canonical_json};
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::store::outbound as rows;
use crate::store::outbound_edus as kept;
use crate::store::{Store, StoreError, Tx};

/// The feed of a destination's EDUs that go by one protocol. It stands where rooms do, and its kind tells it from them. The
/// prefix is short, so that the longest name of a server that users can have still fits.
fn feed(side: Side, destination: &ServerName) -> Result<Feed, StoreError> {
    let room_id = RoomId::parse(format!("!e:{destination}"));
    let room_id = room_id.map_err(|error| StoreError::corrupt("destination", error))?;
    Ok(Feed { kind: FeedKind::of_edus(side), room_id })
}

impl OutboundQueues {
    /// Inside a write job: `destination` gets an EDU of a user of this gateway by one protocol's `send`. After the commit
    /// [`Self::wake_edus`] has it sent. One that nobody would take, since it is too long or has too long a name in it, is an error.
    pub async fn keep_edu(tx: &mut Tx, side: Side, destination: &ServerName, edu: &Edu) -> Result<(), StoreError> {
        let feed = feed(side, destination)?;
        let position = rows::head(tx, feed.kind.as_str(), feed.room_id.as_str()).await?.saturating_add(1);
        let text = canonical_json(&edu.to_matrix());
        if !is_readable(&text, edu) {
            return Err(StoreError::corrupt("EDU", "nobody would take it"));
        }
        kept::put(tx, feed.kind.as_str(), destination, position, &text).await?;
        Self::subscribe(tx, destination, &feed, position.saturating_sub(1)).await?;
        Self::advance(tx, &feed, position).await
    }

    /// After the commit: there are EDUs for a destination.
    pub fn wake_edus(&self, side: Side, destination: &ServerName) {
        if let Ok(feed) = feed(side, destination) {
            self.wake(&feed, &[destination.to_owned()]);
        }
    }
}

/// Whether an EDU is read as what was written.
fn is_readable(text: &[u8], edu: &Edu) -> bool {
    let text = std::str::from_utf8(text).unwrap_or_default();
    matches!(&Edu::read(text, edu.user().server_name())[..], [Ok(read)] if read == edu)
}

/// Where the queues read them.
pub(super) struct KeptEdus(pub Store);

#[async_trait]
impl FeedSource for KeptEdus {
    async fn read(
        &self,
        feed: &Feed,
        destination: &ServerName,
        after: i64,
        until: Option<i64>,
        limit: usize,
    ) -> Result<Vec<Delivery>, StoreError> {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let until = until.unwrap_or(i64::MAX);
        let found = kept::range(&self.0, feed.kind.as_str(), destination, after, until, limit).await?;
        let delivery = |(position, edu): (i64, Vec<u8>)| Delivery { position, event: Some(Bytes::from(edu)) };
        Ok(found.into_iter().map(delivery).collect())
    }

    async fn answered(
        &self,
        feed: &Feed,
        destination: &ServerName,
        positions: &[i64],
        _answer: &Object,
    ) -> Result<(), Refusal> {
        let (kind, destination) = (feed.kind.as_str(), destination.to_owned());
        let Some(last) = positions.iter().max().copied() else { return Ok(()) };
        let write = self.0.write(move |tx| Box::pin(async move { kept::remove(tx, kind, &destination, last).await }));
        Ok(write.await?)
    }
}
