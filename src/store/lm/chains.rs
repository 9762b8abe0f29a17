//! What allows the state of foreign hubs' logs and is in no place of their copies here.

use ruma::{EventId, OwnedEventId, RoomId};
use sqlx::Row as _;
use sqlx::any::AnyRow;

use super::EventRow;
use super::read::parsed;
use crate::store::{Store, StoreError, Tx};

/// The position of what is in no place of a log.
pub const OUTSIDE: i64 = -1;

/// How much of it a room may have.
#[derive(Debug, Clone, Copy)]
pub struct ChainBounds {
    /// How many events.
    pub events: i64,
    /// How many bytes they have.
    pub bytes: i64,
}

/// Keeps events of a room that its log does not have, as far as there is room for them; what is kept already stays as it is. False when
/// not all of them were kept.
pub async fn keep_chain(
    tx: &mut Tx,
    room_id: &RoomId,
    events: &[(OwnedEventId, Vec<u8>)],
    bounds: ChainBounds,
) -> Result<bool, StoreError> {
    let kept = sqlx::query(
        "SELECT COUNT(*) AS events, CAST(COALESCE(SUM(LENGTH(json)), 0) AS BIGINT) AS bytes FROM lm_auth_chains \
         WHERE room_id = $1",
    )
    .bind(room_id.as_str())
    .fetch_one(&mut *tx)
    .await?;
    let (mut count, mut bytes): (i64, i64) = (kept.try_get("events")?, kept.try_get("bytes")?);
    let mut all = true;
    for (event_id, json) in events {
        let size = i64::try_from(json.len()).unwrap_or(i64::MAX);
        if count >= bounds.events || bytes.saturating_add(size) > bounds.bytes {
            all = false;
            break;
        }
        let inserted = sqlx::query(
            "INSERT INTO lm_auth_chains (event_id, room_id, json) VALUES ($1, $2, $3) ON CONFLICT (event_id) DO NOTHING",
        )
        .bind(event_id.as_str())
        .bind(room_id.as_str())
        .bind(json.as_slice())
        .execute(&mut *tx)
        .await?;
        if inserted.rows_affected() > 0 {
            (count, bytes) = (count.saturating_add(1), bytes.saturating_add(size));
        }
    }
    sqlx::query(
        "DELETE FROM lm_auth_chains WHERE room_id = $1 \
         AND EXISTS (SELECT 1 FROM lm_events e WHERE e.event_id = lm_auth_chains.event_id)",
    )
    .bind(room_id.as_str())
    .execute(tx)
    .await?;
    Ok(all)
}

/// Forgets all of a room.
pub async fn forget_chain(tx: &mut Tx, room_id: &RoomId) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM lm_auth_chains WHERE room_id = $1").bind(room_id.as_str()).execute(tx).await?;
    Ok(())
}

/// All of a room, in no order.
pub async fn chain_of(store: &Store, room_id: &RoomId) -> Result<Vec<EventRow>, StoreError> {
    let rows = sqlx::query("SELECT room_id, event_id, json FROM lm_auth_chains WHERE room_id = $1")
        .bind(room_id.as_str())
        .fetch_all(store.reader())
        .await?;
    rows.iter().map(outside_row).collect()
}

/// One event.
pub async fn chain_event(store: &Store, event_id: &EventId) -> Result<Option<EventRow>, StoreError> {
    let row = sqlx::query("SELECT room_id, event_id, json FROM lm_auth_chains WHERE event_id = $1")
        .bind(event_id.as_str())
        .fetch_optional(store.reader())
        .await?;
    row.as_ref().map(outside_row).transpose()
}

/// One event of a room, seen from within a transaction.
pub(super) async fn chain_event_now(
    tx: &mut Tx,
    room_id: &RoomId,
    event_id: &EventId,
) -> Result<Option<EventRow>, StoreError> {
    let row = sqlx::query("SELECT room_id, event_id, json FROM lm_auth_chains WHERE event_id = $1 AND room_id = $2")
        .bind(event_id.as_str())
        .bind(room_id.as_str())
        .fetch_optional(tx)
        .await?;
    row.as_ref().map(outside_row).transpose()
}

fn outside_row(row: &AnyRow) -> Result<EventRow, StoreError> {
    Ok(EventRow {
        room_id: parsed(row, "room_id")?,
        position: OUTSIDE,
        event_id: parsed(row, "event_id")?,
        json: row.try_get("json")?,
    })
}
