//! Events that came as redaction leaves them, until it is known whether something redacts them.

use ruma::{OwnedRoomId, RoomId};

use super::read::parsed;
use super::redactions::Asked;
use crate::store::{Store, StoreError, Tx};

/// Notes that an event came without its content.
pub async fn note_blank(tx: &mut Tx, room_id: &RoomId, (event_id, sender): &Asked, now: i64) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO lm_blanks (room_id, event_id, sender, noticed_ts) VALUES ($1, $2, $3, $4) \
         ON CONFLICT (room_id, event_id) DO NOTHING",
    )
    .bind(room_id.as_str())
    .bind(event_id.as_str())
    .bind(sender.as_str())
    .bind(now)
    .execute(tx)
    .await?;
    Ok(())
}

/// Those of a room that were noted at a time or before, oldest first, at most `limit`.
pub async fn blanks(store: &Store, room_id: &RoomId, until: i64, limit: i64) -> Result<Vec<Asked>, StoreError> {
    let rows = sqlx::query(
        "SELECT event_id, sender FROM lm_blanks WHERE room_id = $1 AND noticed_ts <= $2 ORDER BY noticed_ts LIMIT $3",
    )
    .bind(room_id.as_str())
    .bind(until)
    .bind(limit)
    .fetch_all(store.reader())
    .await?;
    rows.iter().map(|row| Ok((parsed(row, "event_id")?, parsed(row, "sender")?))).collect()
}

/// The rooms that have some.
pub async fn rooms_with_blanks(store: &Store) -> Result<Vec<OwnedRoomId>, StoreError> {
    let rows = sqlx::query("SELECT DISTINCT room_id FROM lm_blanks").fetch_all(store.reader()).await?;
    rows.iter().map(|row| parsed(row, "room_id")).collect()
}

/// Forgets all of a room.
pub async fn forget_blanks_of(tx: &mut Tx, room_id: &RoomId) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM lm_blanks WHERE room_id = $1").bind(room_id.as_str()).execute(tx).await?;
    Ok(())
}

/// Forgets those of a room that something in the log names as redacted, whether it may redact them by our rules or not.
pub async fn forget_named_blanks(tx: &mut Tx, room_id: &RoomId) -> Result<(), StoreError> {
    sqlx::query(
        "DELETE FROM lm_blanks WHERE room_id = $1 AND EXISTS (SELECT 1 FROM lm_redactions r \
         WHERE r.room_id = lm_blanks.room_id AND r.target = lm_blanks.event_id)",
    )
    .bind(room_id.as_str())
    .execute(tx)
    .await?;
    Ok(())
}

/// Forgets these of a room.
pub async fn forget_blanks(tx: &mut Tx, room_id: &RoomId, events: &[Asked]) -> Result<(), StoreError> {
    for (event_id, _) in events {
        sqlx::query("DELETE FROM lm_blanks WHERE room_id = $1 AND event_id = $2")
            .bind(room_id.as_str())
            .bind(event_id.as_str())
            .execute(&mut *tx)
            .await?;
    }
    Ok(())
}
