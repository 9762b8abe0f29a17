//! The bridge's inbox: accepted events of bridged rooms, written in the transaction that accepts them and taken out in the
//! one that carries them over.

use ruma::{OwnedEventId, RoomId};
use sqlx::Row as _;

use super::{Store, StoreError, Tx};
use crate::identity::Side;

/// An event that waits to be carried over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InboxRow {
    /// The order of acceptance.
    pub seq: i64,
    /// The event.
    pub event_id: OwnedEventId,
    /// When it was accepted, in milliseconds.
    pub received_ts: i64,
}

/// Adds events of one room, in the order of acceptance, inside the write job that accepts them.
pub async fn push(
    store: &Store,
    tx: &mut Tx,
    side: Side,
    room_id: &RoomId,
    events: &[OwnedEventId],
    now_ms: i64,
) -> Result<(), StoreError> {
    for event_id in events {
        sqlx::query("INSERT INTO bridge_inbox (seq, side, room_id, event_id, received_ts) VALUES ($1, $2, $3, $4, $5)")
            .bind(store.next_id())
            .bind(side.as_str())
            .bind(room_id.as_str())
            .bind(event_id.as_str())
            .bind(now_ms)
            .execute(&mut *tx)
            .await?;
    }
    Ok(())
}

/// The oldest events of one room that wait after `after`, in order.
pub async fn waiting(
    store: &Store,
    side: Side,
    room_id: &RoomId,
    after: i64,
    limit: i64,
) -> Result<Vec<InboxRow>, StoreError> {
    let rows = sqlx::query(
        "SELECT seq, event_id, received_ts FROM bridge_inbox WHERE side = $1 AND room_id = $2 AND seq > $3 \
         ORDER BY seq LIMIT $4",
    )
    .bind(side.as_str())
    .bind(room_id.as_str())
    .bind(after)
    .bind(limit)
    .fetch_all(store.reader())
    .await?;
    rows.into_iter()
        .map(|row| {
            let event_id: String = row.try_get("event_id")?;
            Ok(InboxRow {
                seq: row.try_get("seq")?,
                event_id: event_id.try_into().map_err(|error| StoreError::corrupt("event ID", error))?,
                received_ts: row.try_get("received_ts")?,
            })
        })
        .collect()
}

/// Takes one event out, inside the write job that carries it over or records why not.
pub async fn remove(tx: &mut Tx, seq: i64) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM bridge_inbox WHERE seq = $1").bind(seq).execute(tx).await?;
    Ok(())
}
