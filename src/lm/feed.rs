//! What the outbound queues read: the logs that are kept here, for the servers in their rooms.

use std::sync::Weak;

use async_trait::async_trait;
use ruma::{RoomId, ServerName};

use super::redactions::as_read;
use super::{Inner, Lm};
use crate::event::Object;
use crate::federation::{Delivery, Feed, FeedKind, FeedSource};
use crate::refusal::Refusal;
use crate::store::StoreError;
use crate::store::lm::{self as stored, Stay};

/// The feeds of the linear side. Weak, because the queues are part of what the linear side holds.
pub(super) struct Feeds(pub Weak<Inner>);

impl Feeds {
    fn lm(&self) -> Result<Lm, StoreError> {
        self.0.upgrade().map(|inner| Lm { inner }).ok_or(StoreError::Closed)
    }
}

#[async_trait]
impl FeedSource for Feeds {
    async fn read(
        &self,
        feed: &Feed,
        destination: &ServerName,
        after: i64,
        until: Option<i64>,
        limit: usize,
    ) -> Result<Vec<Delivery>, StoreError> {
        let lm = self.lm()?;
        match feed.kind {
            FeedKind::Log => lm.read_log(&feed.room_id, destination, after, until, limit).await,
            FeedKind::Lpdus => lm.read_lpdus(&feed.room_id, destination, after, until, limit).await,
            FeedKind::Graph | FeedKind::LmEdus | FeedKind::MatrixEdus => Ok(Vec::new()),
        }
    }

    async fn holds_back(&self, feed: &Feed, destination: &ServerName) -> Result<bool, StoreError> {
        match feed.kind {
            FeedKind::Lpdus => self.lm()?.holds_lpdus_back(&feed.room_id, destination).await,
            _ => Ok(false),
        }
    }

    async fn already_delivered(
        &self,
        feed: &Feed,
        destination: &ServerName,
        positions: &[i64],
    ) -> Result<Vec<i64>, Refusal> {
        let lm = self.lm()?;
        match feed.kind {
            FeedKind::Lpdus => lm.lpdus_at_hub(&feed.room_id, destination, positions).await,
            _ => Ok(Vec::new()),
        }
    }

    fn is_back(&self, destination: &ServerName) {
        let (Ok(lm), hub) = (self.lm(), destination.to_owned()) else { return };
        tokio::spawn(async move {
            if let Err(refusal) = lm.hub_is_back(&hub).await {
                tracing::warn!(%hub, %refusal, "the rooms of a hub that is back are not looked at");
            }
        });
    }

    async fn answered(
        &self,
        feed: &Feed,
        destination: &ServerName,
        positions: &[i64],
        answer: &Object,
    ) -> Result<(), Refusal> {
        let lm = self.lm()?;
        match feed.kind {
            FeedKind::Lpdus => lm.lpdus_answered(&feed.room_id, destination, positions, answer).await,
            _ => {
                let failed = answer.get("failed_pdus").and_then(|failed| failed.as_object());
                if let Some(failed) = failed.filter(|failed| !failed.is_empty()) {
                    tracing::warn!(room = %feed.room_id, %destination, events = failed.len(), "a participant refused events");
                }
                Ok(())
            }
        }
    }
}

impl Lm {
    async fn read_log(
        &self,
        room_id: &RoomId,
        destination: &ServerName,
        after: i64,
        until: Option<i64>,
        limit: usize,
    ) -> Result<Vec<Delivery>, StoreError> {
        let store = &self.context().store;
        let Some(cell) = self.rooms().find(room_id).await? else { return Ok(Vec::new()) };
        let room = cell.snapshot(store).await?;
        let head = room.head;
        let last = until.unwrap_or(head).min(head);
        let stays = cell.stays(store, destination).await?;
        let Some((first, last)) = next_visible(&stays, after, last) else {
            // Nothing more of what it was told of is for it.
            let skipped = (last > after).then_some(Delivery { position: last, event: None });
            return Ok(skipped.into_iter().collect());
        };
        let events = match cell.recent(first, last, limit) {
            Some(events) => events,
            None => {
                let limit = i64::try_from(limit).unwrap_or(i64::MAX);
                let rows = stored::range(store, room_id, first, last, limit).await?;
                let rows = as_read(store, room_id, room.redaction, rows).await?;
                rows.into_iter().map(|row| (row.position, row.json.into())).collect()
            }
        };
        Ok(events.into_iter().map(|(position, event)| Delivery { position, event: Some(event) }).collect())
    }
}

/// The first stretch after `after`, up to `last`, that a server gets.
fn next_visible(stays: &[Stay], after: i64, last: i64) -> Option<(i64, i64)> {
    stays
        .iter()
        .map(|stay| {
            let first = stay.since.max(after).saturating_add(1);
            (first, stay.until.map_or(last, |until| until.min(last)))
        })
        .find(|(first, last)| first <= last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stay(since: i64, until: Option<i64>) -> Stay {
        Stay { since, until }
    }

    #[test]
    fn a_server_gets_the_log_after_its_join() {
        assert_eq!(next_visible(&[stay(5, None)], 0, 9), Some((6, 9)));
        assert_eq!(next_visible(&[stay(5, None)], 7, 9), Some((8, 9)));
        assert_eq!(next_visible(&[stay(5, None)], 9, 9), None);
        assert_eq!(next_visible(&[], 0, 9), None);
    }

    #[test]
    fn a_server_gets_the_event_that_ends_its_stay_and_nothing_until_it_is_back() {
        let stays = [stay(5, Some(7)), stay(12, None)];
        assert_eq!(next_visible(&stays, 5, 20), Some((6, 7)));
        assert_eq!(next_visible(&stays, 7, 10), None);
        assert_eq!(next_visible(&stays, 7, 12), None);
        assert_eq!(next_visible(&stays, 7, 20), Some((13, 20)));
    }
}
