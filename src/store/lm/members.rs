//! The member events of a log. There may be very many: where they are is read first, and then some of them at once. (A database that
//! sorts them has all of them in memory.)

use ruma::RoomId;
use sqlx::any::AnyRow;
use sqlx::{AssertSqlSafe, Row as _};

use super::super::rows::{chunks, placeholders};
use crate::store::{Store, StoreError, Tx};

const POSITIONS: &str = "SELECT position FROM lm_events \
                         WHERE room_id = $1 AND kind = $2 AND state_key LIKE $3 AND position < $4 ORDER BY position";
const KIND: &str = "m.room.member";

/// Hands over the member events of a log as they are written, one by one and in its order.
pub async fn member_events(
    tx: &mut Tx,
    room_id: &RoomId,
    mut each: impl FnMut(i64, &[u8]) + Send,
) -> Result<(), StoreError> {
    let query = sqlx::query(POSITIONS).bind(room_id.as_str()).bind(KIND).bind("%").bind(i64::MAX);
    let positions = positions(&query.fetch_all(&mut *tx).await?)?;
    for chunk in chunks(&positions) {
        let query = sqlx::query(AssertSqlSafe(at(chunk))).bind(room_id.as_str());
        let query = chunk.iter().fold(query, |query, position| query.bind(*position));
        hand_over(&query.fetch_all(&mut *tx).await?, &mut each)?;
    }
    Ok(())
}

/// The same of those before a position whose state keys a pattern matches.
pub async fn members_before(
    store: &Store,
    room_id: &RoomId,
    pattern: &str,
    position: i64,
    mut each: impl FnMut(i64, &[u8]) + Send,
) -> Result<(), StoreError> {
    let query = sqlx::query(POSITIONS).bind(room_id.as_str()).bind(KIND).bind(pattern).bind(position);
    let positions = positions(&query.fetch_all(store.reader()).await?)?;
    for chunk in chunks(&positions) {
        let query = sqlx::query(AssertSqlSafe(at(chunk))).bind(room_id.as_str());
        let query = chunk.iter().fold(query, |query, position| query.bind(*position));
        hand_over(&query.fetch_all(store.reader()).await?, &mut each)?;
    }
    Ok(())
}

fn positions(rows: &[AnyRow]) -> Result<Vec<i64>, StoreError> {
    rows.iter().map(|row| Ok(row.try_get("position")?)).collect()
}

/// What gives the events at these positions.
fn at(positions: &[i64]) -> String {
    let list = placeholders(1, positions.len(), 1);
    format!("SELECT position, json FROM lm_events WHERE room_id = $1 AND position IN {list} ORDER BY position")
}

fn hand_over(rows: &[AnyRow], each: &mut impl FnMut(i64, &[u8])) -> Result<(), StoreError> {
    for row in rows {
        each(row.try_get("position")?, &row.try_get::<Vec<u8>, _>("json")?);
    }
    Ok(())
}
