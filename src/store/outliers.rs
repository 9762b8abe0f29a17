//! Events of graph rooms of which no state is known: auth events that came alone. Those on which the room stands are marked;
//! the others can go.

use std::sync::LazyLock;

use ruma::{EventId, OwnedEventId, RoomId};

use super::rows::{Statement, chunks, placeholders, statement, statements};
use super::{Store, StoreError, Tx};

/// How many bytes a room has of them.
pub async fn bytes(store: &Store, room_id: &RoomId) -> Result<i64, StoreError> {
    let sql = "SELECT CAST(COALESCE(SUM(LENGTH(json)), 0) AS BIGINT) FROM dag_events \
               WHERE room_id = $1 AND before_group IS NULL";
    let row: (i64,) = sqlx::query_as(sql).bind(room_id.as_str()).fetch_one(store.reader()).await?;
    Ok(row.0)
}

/// Those that can go and were stored before `before`, with their places, the newest first: what allows an event was stored
/// before it, so whoever removes them in this order leaves none without what allows it.
pub async fn unneeded(
    store: &Store,
    room_id: &RoomId,
    before: i64,
    limit: i64,
) -> Result<Vec<(i64, OwnedEventId)>, StoreError> {
    let rows: Vec<(i64, String)> = sqlx::query_as(
        "SELECT seq, event_id FROM dag_events \
         WHERE room_id = $1 AND before_group IS NULL AND seq < $2 AND needed = 0 ORDER BY seq DESC LIMIT $3",
    )
    .bind(room_id.as_str())
    .bind(before)
    .bind(limit)
    .fetch_all(store.reader())
    .await?;
    let id = |text: String| OwnedEventId::try_from(text).map_err(|error| StoreError::corrupt("event ID", error));
    rows.into_iter().map(|(seq, event_id)| Ok((seq, id(event_id)?))).collect()
}

static NEED: LazyLock<Vec<Statement>> = LazyLock::new(|| {
    statements(|rows| format!("UPDATE dag_events SET needed = 1 WHERE event_id IN {}", placeholders(1, rows, 0)))
});

/// The room stands on these.
pub async fn need(tx: &mut Tx, event_ids: &[&EventId]) -> Result<(), StoreError> {
    each(tx, &NEED, event_ids).await
}

static REMOVE: LazyLock<Vec<Statement>> = LazyLock::new(|| {
    statements(|rows| {
        let places = placeholders(1, rows, 0);
        format!("DELETE FROM dag_events WHERE event_id IN {places} AND before_group IS NULL AND needed = 0")
    })
});

/// Removes those of them on which the room does not stand.
pub async fn remove(tx: &mut Tx, event_ids: &[&EventId]) -> Result<(), StoreError> {
    each(tx, &REMOVE, event_ids).await
}

async fn each(tx: &mut Tx, sql: &'static [Statement], event_ids: &[&EventId]) -> Result<(), StoreError> {
    for chunk in chunks(event_ids) {
        let mut query = sqlx::query(statement(sql, tx, chunk.len())?);
        for event_id in chunk {
            query = query.bind(event_id.as_str());
        }
        query.execute(&mut *tx).await?;
    }
    Ok(())
}
