//! The member events of a log. There may be very many: where they are is read first, and then some of them at once. (A database that
//! sorts them has all of them in memory.)

use futures::TryStreamExt as _;
use ruma::RoomId;
use sqlx::{AssertSqlSafe, Row as _};

use super::super::rows::{chunks, placeholders};
use crate::store::{Store, StoreError, Tx};

/// Hands over the member events of a log as they are written, one by one and in its order.
pub async fn member_events(
    tx: &mut Tx,
    room_id: &RoomId,
    each: impl FnMut(i64, &[u8]) + Send,
) -> Result<(), StoreError> {
    members(tx, room_id, ("%", i64::MAX), each).await
}

/// The same of those before a position whose state keys a pattern matches.
pub async fn members_before(
    store: &Store,
    room_id: &RoomId,
    pattern: &str,
    position: i64,
    each: impl FnMut(i64, &[u8]) + Send,
) -> Result<(), StoreError> {
    let mut connection = store.reader().acquire().await?;
    members(&mut connection, room_id, (pattern, position), each).await
}

async fn members(
    connection: &mut Tx,
    room_id: &RoomId,
    (pattern, before): (&str, i64),
    mut each: impl FnMut(i64, &[u8]) + Send,
) -> Result<(), StoreError> {
    let sql = "SELECT position FROM lm_events \
               WHERE room_id = $1 AND kind = $2 AND state_key LIKE $3 AND position < $4 ORDER BY position";
    let query = sqlx::query(sql).bind(room_id.as_str()).bind("m.room.member").bind(pattern).bind(before);
    let mut rows = query.fetch(&mut *connection);
    let mut positions: Vec<i64> = Vec::new();
    while let Some(row) = rows.try_next().await? {
        positions.push(row.try_get("position")?);
    }
    drop(rows);
    for chunk in chunks(&positions) {
        let list = placeholders(1, chunk.len(), 1);
        let sql =
            format!("SELECT position, json FROM lm_events WHERE room_id = $1 AND position IN {list} ORDER BY position");
        let query = sqlx::query(AssertSqlSafe(sql)).bind(room_id.as_str());
        let query = chunk.iter().fold(query, |query, position| query.bind(*position));
        for row in query.fetch_all(&mut *connection).await? {
            each(row.try_get("position")?, &row.try_get::<Vec<u8>, _>("json")?);
        }
    }
    Ok(())
}
