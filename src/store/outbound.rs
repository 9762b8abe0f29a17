//! Outbound queues: heads of feeds, up to where each destination has them, the transaction on its way to each, and failures.

use serde::{Deserialize, Serialize};
use sqlx::Row as _;

use super::{Store, StoreError, Tx, text};

/// Which feed for which destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CursorKey {
    /// The destination.
    pub destination: String,
    /// The feed's kind.
    pub kind: String,
    /// The feed's room.
    pub room_id: String,
}

/// Up to where a destination has a feed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    /// The last position that it has.
    pub sent: i64,
    /// The last position that it is to have now: the feed's end, or where its own end is before that.
    pub target: i64,
    /// Whether nothing follows the target.
    pub ends: bool,
    /// Whether no end is set.
    pub open: bool,
}

/// One feed's part of a transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartRow {
    /// The feed's kind.
    pub kind: String,
    /// The feed's room.
    pub room_id: String,
    /// The position after which the part begins.
    pub after: i64,
    /// The position up to which the destination has the feed when it has taken the part.
    pub through: i64,
    /// The positions of the events that are in it.
    pub positions: Vec<i64>,
    /// Whether the feed ends here for the destination.
    #[serde(default)]
    pub is_last: bool,
    /// Whether this is not on its way: it was, in a transaction that was split, and some of it may have arrived.
    #[serde(default)]
    pub doubtful: bool,
}

/// The transaction that may be on its way to a destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InflightRow {
    /// Its ID.
    pub txn_id: String,
    /// What is in it.
    pub parts: Vec<PartRow>,
    /// When it was composed, in milliseconds.
    pub composed_ts: i64,
}

/// A destination that fails.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailureRow {
    /// The destination.
    pub destination: String,
    /// Failures in a row.
    pub failures: i64,
    /// When it is tried again, in milliseconds.
    pub retry_at: i64,
    /// The last failure.
    pub last_error: String,
    /// Since when it has taken nothing, in milliseconds; 0 when that is not known.
    pub since_ts: i64,
    /// Whether the last failure was an answer.
    pub answers: bool,
}

/// The feed is for the destination from the event after `after` on. Where it is already, it goes on where it is, and an end
/// is taken back.
pub async fn subscribe(tx: &mut Tx, key: &CursorKey, after: i64) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO outbound_cursors (destination, kind, room_id, sent, ends_at) VALUES ($1, $2, $3, $4, NULL) \
         ON CONFLICT (destination, kind, room_id) DO UPDATE SET ends_at = NULL",
    )
    .bind(key.destination.as_str())
    .bind(key.kind.as_str())
    .bind(key.room_id.as_str())
    .bind(after)
    .execute(tx)
    .await?;
    Ok(())
}

/// The last position for the destination is `ends_at`.
pub async fn end(tx: &mut Tx, key: &CursorKey, ends_at: i64) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE outbound_cursors SET ends_at = $4 \
         WHERE destination = $1 AND kind = $2 AND room_id = $3 AND (ends_at IS NULL OR ends_at > $4)",
    )
    .bind(key.destination.as_str())
    .bind(key.kind.as_str())
    .bind(key.room_id.as_str())
    .bind(ends_at)
    .execute(&mut *tx)
    .await?;
    drop_ended(tx, key).await
}

async fn drop_ended(tx: &mut Tx, key: &CursorKey) -> Result<(), StoreError> {
    sqlx::query(
        "DELETE FROM outbound_cursors WHERE destination = $1 AND kind = $2 AND room_id = $3 AND sent >= ends_at",
    )
    .bind(key.destination.as_str())
    .bind(key.kind.as_str())
    .bind(key.room_id.as_str())
    .execute(tx)
    .await?;
    Ok(())
}

/// The feed's last position is `head`.
pub async fn advance(tx: &mut Tx, kind: &str, room_id: &str, head: i64) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO outbound_feeds (kind, room_id, head) VALUES ($1, $2, $3) ON CONFLICT (kind, room_id) \
         DO UPDATE SET head = excluded.head WHERE outbound_feeds.head < excluded.head",
    )
    .bind(kind)
    .bind(room_id)
    .bind(head)
    .execute(tx)
    .await?;
    Ok(())
}

/// The feed's last position; 0 before it has any.
pub async fn head(tx: &mut Tx, kind: &str, room_id: &str) -> Result<i64, StoreError> {
    let row: Option<(i64,)> = sqlx::query_as("SELECT head FROM outbound_feeds WHERE kind = $1 AND room_id = $2")
        .bind(kind)
        .bind(room_id)
        .fetch_optional(tx)
        .await?;
    Ok(row.map_or(0, |(head,)| head))
}

/// Where the destination is in a feed; none when the feed is not for it.
pub async fn cursor(store: &Store, key: &CursorKey) -> Result<Option<Cursor>, StoreError> {
    let row = sqlx::query(
        "SELECT c.sent AS sent, c.ends_at AS ends_at, f.head AS head FROM outbound_cursors c \
         JOIN outbound_feeds f ON f.kind = c.kind AND f.room_id = c.room_id \
         WHERE c.destination = $1 AND c.kind = $2 AND c.room_id = $3",
    )
    .bind(key.destination.as_str())
    .bind(key.kind.as_str())
    .bind(key.room_id.as_str())
    .fetch_optional(store.reader())
    .await?;
    let Some(row) = row else { return Ok(None) };
    let (head, ends_at): (i64, Option<i64>) = (row.try_get("head")?, row.try_get("ends_at")?);
    let target = ends_at.map_or(head, |end| end.min(head));
    Ok(Some(Cursor { sent: row.try_get("sent")?, target, ends: ends_at == Some(target), open: ends_at.is_none() }))
}

/// Every destination and feed where events wait.
pub async fn unfinished(store: &Store) -> Result<Vec<CursorKey>, StoreError> {
    let rows = sqlx::query(
        "SELECT c.destination AS destination, c.kind AS kind, c.room_id AS room_id FROM outbound_cursors c \
         JOIN outbound_feeds f ON f.kind = c.kind AND f.room_id = c.room_id \
         WHERE c.sent < f.head AND (c.ends_at IS NULL OR c.sent < c.ends_at)",
    )
    .fetch_all(store.reader())
    .await?;
    rows.into_iter()
        .map(|row| {
            Ok(CursorKey {
                destination: row.try_get("destination")?,
                kind: row.try_get("kind")?,
                room_id: row.try_get("room_id")?,
            })
        })
        .collect()
}

/// How many events wait for each destination for which any do. LPDUs are counted, since their positions are taken from what the whole
/// store shares, and far apart; all other feeds have one event at each position.
pub async fn waiting(store: &Store) -> Result<Vec<(String, i64)>, StoreError> {
    let rows = sqlx::query(
        "SELECT w.destination AS destination, CAST(SUM(CASE WHEN w.kind = 'lpdus' THEN (SELECT COUNT(*) FROM lm_lpdu_queue q \
         WHERE q.room_id = w.room_id AND q.position > w.sent AND q.position <= w.until) ELSE w.until - w.sent END) AS BIGINT) \
         AS waiting FROM (SELECT c.destination, c.kind, c.room_id, c.sent, \
         CASE WHEN c.ends_at < f.head THEN c.ends_at ELSE f.head END AS until FROM outbound_cursors c \
         JOIN outbound_feeds f ON f.kind = c.kind AND f.room_id = c.room_id \
         WHERE c.sent < f.head AND (c.ends_at IS NULL OR c.sent < c.ends_at)) w GROUP BY w.destination",
    )
    .fetch_all(store.reader())
    .await?;
    rows.into_iter().map(|row| Ok((row.try_get("destination")?, row.try_get("waiting")?))).collect()
}

/// The destinations to which a transaction may be on its way.
pub async fn inflight_destinations(store: &Store) -> Result<Vec<String>, StoreError> {
    let rows = sqlx::query("SELECT destination FROM outbound_inflight").fetch_all(store.reader()).await?;
    rows.into_iter().map(|row| Ok(row.try_get("destination")?)).collect()
}

/// The transaction that may be on its way.
pub async fn inflight(store: &Store, destination: &str) -> Result<Option<InflightRow>, StoreError> {
    let row = sqlx::query("SELECT txn_id, parts, composed_ts FROM outbound_inflight WHERE destination = $1")
        .bind(destination)
        .fetch_optional(store.reader())
        .await?;
    let Some(row) = row else { return Ok(None) };
    let parts: Vec<u8> = row.try_get("parts")?;
    Ok(Some(InflightRow {
        txn_id: row.try_get("txn_id")?,
        parts: serde_json::from_slice(&parts).map_err(|error| StoreError::corrupt("outbound transaction", error))?,
        composed_ts: row.try_get("composed_ts")?,
    }))
}

/// Keeps the transaction that is about to be sent, in the place of another.
pub async fn keep_inflight(tx: &mut Tx, destination: &str, row: &InflightRow) -> Result<(), StoreError> {
    let parts = serde_json::to_vec(&row.parts).map_err(|error| StoreError::corrupt("outbound transaction", error))?;
    sqlx::query(
        "INSERT INTO outbound_inflight (destination, txn_id, parts, composed_ts) VALUES ($1, $2, $3, $4) \
         ON CONFLICT (destination) DO UPDATE SET txn_id = excluded.txn_id, parts = excluded.parts, \
         composed_ts = excluded.composed_ts",
    )
    .bind(destination)
    .bind(row.txn_id.as_str())
    .bind(parts.as_slice())
    .bind(row.composed_ts)
    .execute(tx)
    .await?;
    Ok(())
}

/// No transaction is on its way any more.
pub async fn forget_inflight(tx: &mut Tx, destination: &str) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM outbound_inflight WHERE destination = $1").bind(destination).execute(tx).await?;
    Ok(())
}

/// The destination has these parts.
pub async fn arrived(tx: &mut Tx, destination: &str, parts: &[PartRow]) -> Result<(), StoreError> {
    for part in parts {
        sqlx::query(
            "UPDATE outbound_cursors SET sent = $4 \
             WHERE destination = $1 AND kind = $2 AND room_id = $3 AND sent < $4",
        )
        .bind(destination)
        .bind(part.kind.as_str())
        .bind(part.room_id.as_str())
        .bind(part.through)
        .execute(&mut *tx)
        .await?;
        if part.is_last {
            let key = CursorKey {
                destination: destination.to_owned(),
                kind: part.kind.clone(),
                room_id: part.room_id.clone(),
            };
            drop_ended(tx, &key).await?;
        }
    }
    Ok(())
}

/// The destination's failures, if it fails.
pub async fn failure(store: &Store, destination: &str) -> Result<Option<FailureRow>, StoreError> {
    let row = sqlx::query(
        "SELECT destination, failures, retry_at, last_error, since_ts, answers FROM outbound_destinations \
         WHERE destination = $1",
    )
    .bind(destination)
    .fetch_optional(store.reader())
    .await?;
    row.map(read_failure).transpose()
}

/// All destinations that fail.
pub async fn failures(store: &Store) -> Result<Vec<FailureRow>, StoreError> {
    let rows =
        sqlx::query("SELECT destination, failures, retry_at, last_error, since_ts, answers FROM outbound_destinations")
            .fetch_all(store.reader())
            .await?;
    rows.into_iter().map(read_failure).collect()
}

fn read_failure(row: sqlx::any::AnyRow) -> Result<FailureRow, StoreError> {
    Ok(FailureRow {
        destination: row.try_get("destination")?,
        failures: row.try_get("failures")?,
        retry_at: row.try_get("retry_at")?,
        last_error: text::decode(row.try_get("last_error")?),
        since_ts: row.try_get("since_ts")?,
        answers: row.try_get::<i64, _>("answers")? != 0,
    })
}

/// The destination has failed.
pub async fn record_failure(tx: &mut Tx, row: &FailureRow) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO outbound_destinations (destination, failures, retry_at, last_error, since_ts, answers) \
         VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (destination) DO UPDATE SET failures = excluded.failures, \
         retry_at = excluded.retry_at, last_error = excluded.last_error, since_ts = excluded.since_ts, \
         answers = excluded.answers",
    )
    .bind(row.destination.as_str())
    .bind(row.failures)
    .bind(row.retry_at)
    .bind(text::encode(&row.last_error).as_ref())
    .bind(row.since_ts)
    .bind(i64::from(row.answers))
    .execute(tx)
    .await?;
    Ok(())
}

/// The destination fails no more.
pub async fn forget_failure(tx: &mut Tx, destination: &str) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM outbound_destinations WHERE destination = $1").bind(destination).execute(tx).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use ruma::RoomId;

    use super::*;
    use crate::event::event_id;
    use crate::store::lm::queue_lpdu;
    use crate::store::testing::both_stores;

    #[tokio::test]
    async fn what_waits_is_counted_however_far_apart_its_positions_are() {
        both_stores(|store| async move {
            let write = store.write(|tx| {
                Box::pin(async move {
                    let room_id = RoomId::parse("!a:hub").unwrap();
                    let key = |kind: &str, room_id: &str| CursorKey {
                        destination: "hub".to_owned(),
                        kind: kind.to_owned(),
                        room_id: room_id.to_owned(),
                    };
                    subscribe(tx, &key("lpdus", "!a:hub"), 4).await?;
                    // The first has been sent, and waits for its echo.
                    for position in [4, 9, 2_000_000] {
                        let lpdu_id = event_id(&format!("$e{position}")).unwrap();
                        queue_lpdu(tx, &room_id, position, &lpdu_id, b"{}").await?;
                    }
                    advance(tx, "lpdus", "!a:hub", 2_000_000).await?;
                    subscribe(tx, &key("log", "!b:g"), 2).await?;
                    advance(tx, "log", "!b:g", 5).await?;
                    // It gets nothing after its end.
                    subscribe(tx, &key("log", "!c:g"), 2).await?;
                    advance(tx, "log", "!c:g", 9).await?;
                    end(tx, &key("log", "!c:g"), 3).await
                })
            });
            write.await.unwrap();
            assert_eq!(waiting(&store).await.unwrap(), [("hub".to_owned(), 2 + 3 + 1)]);
        })
        .await;
    }
}
