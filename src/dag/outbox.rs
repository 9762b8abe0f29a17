//! What other homeservers are sent: a room's outbox, as a feed of the outbound queues.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use ruma::ServerName;

use super::Shared;
use crate::event::{Object, canonical_text};
use crate::federation::{Delivery, Feed, FeedSource};
use crate::refusal::Refusal;
use crate::store::{StoreError, dag};

/// The outboxes of all rooms.
pub(super) struct Outbox(pub(super) Arc<Shared>);

#[async_trait]
impl FeedSource for Outbox {
    async fn read(
        &self,
        feed: &Feed,
        destination: &ServerName,
        after: i64,
        until: Option<i64>,
        limit: usize,
    ) -> Result<Vec<Delivery>, StoreError> {
        let store = &self.0.context.store;
        let max = i64::try_from(limit).unwrap_or(i64::MAX);
        let windows = dag::windows(store, &feed.room_id, destination).await?;
        let rows = dag::outbox(store, &feed.room_id, after, until.unwrap_or(i64::MAX), max).await?;
        let is_all = rows.len() < limit;
        let mut found = rows
            .into_iter()
            .map(|(row, json)| {
                let wanted = row.not_to.as_deref() != Some(destination)
                    && windows.iter().any(|window| {
                        row.position > window.opened && window.closed.is_none_or(|closed| row.position <= closed)
                    });
                let event = wanted.then(|| canonical(&json)).transpose()?;
                Ok(Delivery { position: row.position, event })
            })
            .collect::<Result<Vec<_>, StoreError>>()?;
        if is_all {
            Delivery::pass_on(&mut found, until);
        }
        Ok(found)
    }

    async fn answered(
        &self,
        feed: &Feed,
        destination: &ServerName,
        _positions: &[i64],
        answer: &Object,
    ) -> Result<(), Refusal> {
        let pdus = answer.get("pdus").and_then(serde_json::Value::as_object);
        for (event, result) in pdus.into_iter().flatten() {
            if let Some(error) = result.get("error") {
                tracing::warn!(room = %feed.room_id, %event, server = %destination, %error, "event refused there");
            }
        }
        Ok(())
    }
}

/// Events that G passes on for others are stored as they came.
fn canonical(json: &[u8]) -> Result<Bytes, StoreError> {
    canonical_text(json).map(Bytes::from).map_err(|error| StoreError::corrupt("event", error))
}
