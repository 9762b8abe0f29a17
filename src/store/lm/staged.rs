//! Long gaps of foreign hubs' logs, and what was fetched of them so far.

use std::collections::BTreeSet;

use ruma::{EventId, OwnedEventId, OwnedRoomId, RoomId};
use sqlx::{AssertSqlSafe, Row as _};

use super::super::rows::{chunks, placeholders};
use super::read::parsed;
use crate::store::{Store, StoreError, Tx, text};

/// A gap that is being filled from its end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Gap {
    /// The events that are asked for next.
    pub edges: Vec<OwnedEventId>,
    /// The newest event that came meanwhile.
    pub newest: Option<OwnedEventId>,
    /// The lowest `seq` of what was fetched.
    pub lowest: i64,
    /// How many events were fetched.
    pub events: i64,
    /// How many bytes they have.
    pub bytes: i64,
    /// How many of them are in the log.
    pub taken: i64,
    /// The end of our log when all was fetched that can be; none before that.
    pub place: Option<i64>,
    /// Why what is before the first cannot be had.
    pub problem: Option<String>,
    /// When it was noticed, in milliseconds.
    pub noticed_ts: i64,
    /// How often nothing could be had since something was.
    pub tries: i64,
    /// When it is gone on with, in milliseconds.
    pub retry_at: i64,
    /// What was in the way last.
    pub last_error: String,
}

/// An event that was fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Staged {
    /// Its place among the others.
    pub seq: i64,
    /// Its ID.
    pub event_id: OwnedEventId,
    /// Whether its signatures and hashes were found right.
    pub proved: bool,
    /// The event as it came.
    pub json: Vec<u8>,
}

/// The gap of a room.
pub async fn gap(store: &Store, room_id: &RoomId) -> Result<Option<Gap>, StoreError> {
    let row = sqlx::query(
        "SELECT edges, newest, lowest, events, bytes, taken, place, problem, noticed_ts, tries, retry_at, last_error \
         FROM lm_gaps WHERE room_id = $1",
    )
    .bind(room_id.as_str())
    .fetch_optional(store.reader())
    .await?;
    let Some(row) = row else { return Ok(None) };
    let (edges, newest): (String, Option<String>) = (row.try_get("edges")?, row.try_get("newest")?);
    Ok(Some(Gap {
        edges: serde_json::from_str(&edges).map_err(|error| StoreError::corrupt("edges", error))?,
        newest: newest.map(|_| parsed(&row, "newest")).transpose()?,
        lowest: row.try_get("lowest")?,
        events: row.try_get("events")?,
        bytes: row.try_get("bytes")?,
        taken: row.try_get("taken")?,
        place: row.try_get("place")?,
        problem: row.try_get::<Option<String>, _>("problem")?.map(text::decode),
        noticed_ts: row.try_get("noticed_ts")?,
        tries: row.try_get("tries")?,
        retry_at: row.try_get("retry_at")?,
        last_error: text::decode(row.try_get("last_error")?),
    }))
}

/// Writes down how far a gap is, all but `newest`, and what was fetched; events that were fetched before stay where they are.
pub async fn stage(tx: &mut Tx, room_id: &RoomId, gap: &Gap, events: &[Staged]) -> Result<(), StoreError> {
    let edges = serde_json::to_string(&gap.edges).map_err(|error| StoreError::corrupt("edges", error))?;
    sqlx::query(
        "INSERT INTO lm_gaps (room_id, edges, lowest, events, bytes, taken, place, problem, noticed_ts, tries, \
         retry_at, last_error) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) \
         ON CONFLICT (room_id) DO UPDATE SET edges = excluded.edges, lowest = excluded.lowest, \
         events = excluded.events, bytes = excluded.bytes, taken = excluded.taken, place = excluded.place, \
         problem = excluded.problem, tries = excluded.tries, retry_at = excluded.retry_at, \
         last_error = excluded.last_error",
    )
    .bind(room_id.as_str())
    .bind(edges)
    .bind(gap.lowest)
    .bind(gap.events)
    .bind(gap.bytes)
    .bind(gap.taken)
    .bind(gap.place)
    .bind(gap.problem.as_deref().map(|problem| text::encode(problem).into_owned()))
    .bind(gap.noticed_ts)
    .bind(gap.tries)
    .bind(gap.retry_at)
    .bind(text::encode(&gap.last_error).into_owned())
    .execute(&mut *tx)
    .await?;
    for event in events {
        sqlx::query(
            "INSERT INTO lm_staged (room_id, seq, event_id, proved, json) VALUES ($1, $2, $3, $4, $5) \
             ON CONFLICT (room_id, event_id) DO NOTHING",
        )
        .bind(room_id.as_str())
        .bind(event.seq)
        .bind(EventId::as_str(&event.event_id))
        .bind(i64::from(event.proved))
        .bind(event.json.as_slice())
        .execute(&mut *tx)
        .await?;
    }
    Ok(())
}

/// Remembers the newest event that came while a gap was being filled. The hub that sent it is asked for more at `soon`.
pub async fn note_newest(tx: &mut Tx, room_id: &RoomId, newest: &EventId, soon: i64) -> Result<(), StoreError> {
    sqlx::query("UPDATE lm_gaps SET newest = $1 WHERE room_id = $2")
        .bind(newest.as_str())
        .bind(room_id.as_str())
        .execute(&mut *tx)
        .await?;
    sqlx::query("UPDATE lm_gaps SET retry_at = $1 WHERE room_id = $2 AND place IS NULL AND retry_at > $3")
        .bind(soon)
        .bind(room_id.as_str())
        .bind(soon)
        .execute(tx)
        .await?;
    Ok(())
}

/// The first events that were fetched and are not in the log yet.
pub async fn staged(store: &Store, room_id: &RoomId, limit: i64) -> Result<Vec<Staged>, StoreError> {
    let rows =
        sqlx::query("SELECT seq, event_id, proved, json FROM lm_staged WHERE room_id = $1 ORDER BY seq LIMIT $2")
            .bind(room_id.as_str())
            .bind(limit)
            .fetch_all(store.reader())
            .await?;
    let event = |row: &sqlx::any::AnyRow| {
        Ok(Staged {
            seq: row.try_get("seq")?,
            event_id: parsed(row, "event_id")?,
            proved: row.try_get::<i64, _>("proved")? != 0,
            json: row.try_get("json")?,
        })
    };
    rows.iter().map(event).collect()
}

/// Those of the events that were fetched.
pub async fn staged_of(
    store: &Store,
    room_id: &RoomId,
    event_ids: &[OwnedEventId],
) -> Result<BTreeSet<OwnedEventId>, StoreError> {
    let mut there = BTreeSet::new();
    for chunk in chunks(event_ids) {
        let list = placeholders(1, chunk.len(), 1);
        let sql = format!("SELECT event_id FROM lm_staged WHERE room_id = $1 AND event_id IN {list}");
        let query = sqlx::query(AssertSqlSafe(sql)).bind(room_id.as_str());
        let query = chunk.iter().fold(query, |query, id| query.bind(EventId::as_str(id)));
        for row in query.fetch_all(store.reader()).await? {
            there.insert(parsed(&row, "event_id")?);
        }
    }
    Ok(there)
}

/// Forgets what is in the log now, up to `seq`: `count` events.
pub async fn unstage(tx: &mut Tx, room_id: &RoomId, seq: i64, count: i64) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM lm_staged WHERE room_id = $1 AND seq <= $2")
        .bind(room_id.as_str())
        .bind(seq)
        .execute(&mut *tx)
        .await?;
    sqlx::query("UPDATE lm_gaps SET taken = taken + $1, tries = 0 WHERE room_id = $2")
        .bind(count)
        .bind(room_id.as_str())
        .execute(tx)
        .await?;
    Ok(())
}

/// Forgets the gap of a room, and has what could not be had meanwhile asked for at once.
pub async fn close_gap(tx: &mut Tx, room_id: &RoomId, now_ms: i64) -> Result<(), StoreError> {
    for sql in ["DELETE FROM lm_staged WHERE room_id = $1", "DELETE FROM lm_gaps WHERE room_id = $1"] {
        sqlx::query(sql).bind(room_id.as_str()).execute(&mut *tx).await?;
    }
    sqlx::query("UPDATE lm_holes SET tries = 0, retry_at = $1 WHERE room_id = $2 AND place IS NULL AND json IS NULL")
        .bind(now_ms)
        .bind(room_id.as_str())
        .execute(tx)
        .await?;
    Ok(())
}

/// How many bytes all gaps but that of this room have.
pub async fn bytes_of_other_gaps(store: &Store, room_id: &RoomId) -> Result<i64, StoreError> {
    let row = sqlx::query("SELECT CAST(COALESCE(SUM(bytes), 0) AS BIGINT) AS bytes FROM lm_gaps WHERE room_id <> $1")
        .bind(room_id.as_str())
        .fetch_one(store.reader())
        .await?;
    Ok(row.try_get("bytes")?)
}

/// The rooms that have a gap.
pub async fn rooms_with_gaps(store: &Store) -> Result<Vec<OwnedRoomId>, StoreError> {
    let rows = sqlx::query("SELECT room_id FROM lm_gaps").fetch_all(store.reader()).await?;
    rows.iter().map(|row| parsed(row, "room_id")).collect()
}
