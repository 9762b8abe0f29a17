//! Redactions of graph rooms that came before what they redact.

use ruma::{EventId, OwnedEventId, RoomId};
use sqlx::Row as _;

use super::{Store, StoreError, Tx};

/// How many redactions of one event are looked at.
const LIMIT: i64 = 100;

/// A redaction waits for its target.
pub async fn wait(tx: &mut Tx, room_id: &RoomId, target: &EventId, redaction: &EventId) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO dag_awaited (room_id, target, redaction) VALUES ($1, $2, $3) \
         ON CONFLICT (room_id, target, redaction) DO NOTHING",
    )
    .bind(room_id.as_str())
    .bind(target.as_str())
    .bind(redaction.as_str())
    .execute(tx)
    .await?;
    Ok(())
}

/// Whether any redaction of a room came before its target.
pub async fn any(store: &Store, room_id: &RoomId) -> Result<bool, StoreError> {
    let query = sqlx::query("SELECT target FROM dag_awaited WHERE room_id = $1 LIMIT 1").bind(room_id.as_str());
    Ok(query.fetch_optional(store.reader()).await?.is_some())
}

/// The redactions that came before this event.
pub async fn of(store: &Store, room_id: &RoomId, target: &EventId) -> Result<Vec<OwnedEventId>, StoreError> {
    let rows = sqlx::query("SELECT redaction FROM dag_awaited WHERE room_id = $1 AND target = $2 LIMIT $3")
        .bind(room_id.as_str())
        .bind(target.as_str())
        .bind(LIMIT)
        .fetch_all(store.reader())
        .await?;
    let id = |text: String| OwnedEventId::try_from(text).map_err(|error| StoreError::corrupt("event ID", error));
    rows.into_iter().map(|row| id(row.try_get("redaction")?)).collect()
}
