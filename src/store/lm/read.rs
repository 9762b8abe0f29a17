//! What is read. Functions with `IN` lists look up in pieces, so that there are few statements to prepare.

use std::collections::BTreeMap;

use ruma::{EventId, OwnedEventId, OwnedRoomId, RoomId, ServerName};
use sqlx::any::AnyRow;
use sqlx::{AssertSqlSafe, Row as _};

use super::super::rows::{chunks, placeholders};
use super::{EventRow, LpduRow, RoomRow};
use crate::event::{Redaction, RoomVersion};
use crate::store::{Store, StoreError, text};

/// The IDs of all rooms.
pub async fn room_ids(store: &Store) -> Result<Vec<OwnedRoomId>, StoreError> {
    let rows = sqlx::query("SELECT room_id FROM lm_rooms").fetch_all(store.reader()).await?;
    rows.iter().map(|row| parsed(row, "room_id")).collect()
}

/// The rooms with LPDUs that wait for a hub's answer.
pub async fn rooms_with_lpdus(store: &Store) -> Result<Vec<OwnedRoomId>, StoreError> {
    let rows = sqlx::query("SELECT DISTINCT room_id FROM lm_lpdu_queue").fetch_all(store.reader()).await?;
    rows.iter().map(|row| parsed(row, "room_id")).collect()
}

/// One room.
pub async fn room(store: &Store, room_id: &RoomId) -> Result<Option<RoomRow>, StoreError> {
    let row = sqlx::query("SELECT room_id, version, hub, redaction, head, shared FROM lm_rooms WHERE room_id = $1")
        .bind(room_id.as_str())
        .fetch_optional(store.reader())
        .await?;
    let Some(row) = row else { return Ok(None) };
    let version: String = row.try_get("version")?;
    let redaction: String = row.try_get("redaction")?;
    Ok(Some(RoomRow {
        room_id: parsed(&row, "room_id")?,
        version: RoomVersion::parse(&version).ok_or_else(|| StoreError::corrupt("room version", &version))?,
        hub: parsed(&row, "hub")?,
        redaction: match redaction.as_str() {
            "draft" => Redaction::Draft,
            "graph" => Redaction::GraphServer,
            other => return Err(StoreError::corrupt("redaction", other)),
        },
        shared: row.try_get::<i64, _>("shared")? != 0,
        head: row.try_get("head")?,
    }))
}

/// The events of a room from position `from` to `to`, both included, at most `limit`.
pub async fn range(
    store: &Store,
    room_id: &RoomId,
    from: i64,
    to: i64,
    limit: i64,
) -> Result<Vec<EventRow>, StoreError> {
    let rows = sqlx::query(
        "SELECT room_id, position, event_id, json FROM lm_events \
         WHERE room_id = $1 AND position >= $2 AND position <= $3 ORDER BY position LIMIT $4",
    )
    .bind(room_id.as_str())
    .bind(from)
    .bind(to)
    .bind(limit)
    .fetch_all(store.reader())
    .await?;
    rows.iter().map(event_row).collect()
}

/// The current state, in the order of the log.
pub async fn state_now(store: &Store, room_id: &RoomId) -> Result<Vec<EventRow>, StoreError> {
    let rows = sqlx::query(
        "SELECT e.room_id, e.position, e.event_id, e.json FROM lm_state s \
         JOIN lm_events e ON e.room_id = s.room_id AND e.position = s.position \
         WHERE s.room_id = $1 ORDER BY e.position",
    )
    .bind(room_id.as_str())
    .fetch_all(store.reader())
    .await?;
    rows.iter().map(event_row).collect()
}

/// The state before the event at `position`, in the order of the log. Costs no more in a long log than in a short one: what
/// is current leads to each type and state key, and an index from there to what stood in its place.
pub async fn state_before(store: &Store, room_id: &RoomId, position: i64) -> Result<Vec<EventRow>, StoreError> {
    let rows = sqlx::query(AssertSqlSafe(format!("{STATE_BEFORE} ORDER BY e.position")))
        .bind(room_id.as_str())
        .bind(position)
        .bind(position)
        .fetch_all(store.reader())
        .await?;
    rows.iter().map(event_row).collect()
}

/// The same, of one type alone and of the state keys that a pattern matches.
pub async fn state_of_kind_before(
    store: &Store,
    room_id: &RoomId,
    position: i64,
    kind: &str,
    pattern: &str,
) -> Result<Vec<EventRow>, StoreError> {
    let sql = format!("{STATE_BEFORE} AND s.kind = $4 AND s.state_key LIKE $5 ORDER BY e.position");
    let rows = sqlx::query(AssertSqlSafe(sql))
        .bind(room_id.as_str())
        .bind(position)
        .bind(position)
        .bind(text::encode(kind).into_owned())
        .bind(pattern)
        .fetch_all(store.reader())
        .await?;
    rows.iter().map(event_row).collect()
}

/// The newest state events of a type and state key before a position, in order.
pub async fn stood_before(
    store: &Store,
    room_id: &RoomId,
    (kind, state_key): (&str, &str),
    position: i64,
    limit: i64,
) -> Result<Vec<EventRow>, StoreError> {
    let sql = "SELECT room_id, position, event_id, json FROM lm_events \
               WHERE room_id = $1 AND kind = $2 AND state_key = $3 AND position < $4 ORDER BY position DESC LIMIT $5";
    let rows = sqlx::query(sql)
        .bind(room_id.as_str())
        .bind(text::encode(kind).into_owned())
        .bind(text::encode(state_key).into_owned())
        .bind(position)
        .bind(limit)
        .fetch_all(store.reader())
        .await?;
    rows.iter().rev().map(event_row).collect()
}

const STATE_BEFORE: &str = "\
    SELECT e.room_id, e.position, e.event_id, e.json FROM lm_state s \
    JOIN lm_events e ON e.room_id = s.room_id AND e.position = CASE WHEN s.position < $2 THEN s.position ELSE (\
        SELECT before.position FROM lm_events before WHERE before.room_id = s.room_id AND before.kind = s.kind \
        AND before.state_key = s.state_key AND before.state_key IS NOT NULL AND before.position < $3 \
        ORDER BY before.position DESC LIMIT 1) END \
    WHERE s.room_id = $1";

/// One event.
pub async fn event(store: &Store, event_id: &EventId) -> Result<Option<EventRow>, StoreError> {
    let row = sqlx::query("SELECT room_id, position, event_id, json FROM lm_events WHERE event_id = $1")
        .bind(event_id.as_str())
        .fetch_optional(store.reader())
        .await?;
    row.as_ref().map(event_row).transpose()
}

/// Those of the events that are known, in no order.
pub async fn events_by_id(store: &Store, event_ids: &[&EventId]) -> Result<Vec<EventRow>, StoreError> {
    let mut events = Vec::with_capacity(event_ids.len());
    for chunk in chunks(event_ids) {
        let list = placeholders(1, chunk.len(), 0);
        let sql = format!("SELECT room_id, position, event_id, json FROM lm_events WHERE event_id IN {list}");
        let query = chunk.iter().fold(sqlx::query(AssertSqlSafe(sql)), |query, id| query.bind(id.as_str()));
        for row in query.fetch_all(store.reader()).await? {
            events.push(event_row(&row)?);
        }
    }
    Ok(events)
}

/// The first event that was made of an LPDU.
pub async fn event_of_lpdu(store: &Store, lpdu_id: &EventId) -> Result<Option<EventRow>, StoreError> {
    let row = sqlx::query(
        "SELECT room_id, position, event_id, json FROM lm_events WHERE lpdu_id = $1 ORDER BY position LIMIT 1",
    )
    .bind(lpdu_id.as_str())
    .fetch_optional(store.reader())
    .await?;
    row.as_ref().map(event_row).transpose()
}

/// Where the events made of these LPDUs are, of those that are in the log.
pub async fn positions_of_lpdus(
    store: &Store,
    lpdu_ids: &[&EventId],
) -> Result<BTreeMap<OwnedEventId, i64>, StoreError> {
    let mut positions = BTreeMap::new();
    for chunk in chunks(lpdu_ids) {
        let list = placeholders(1, chunk.len(), 0);
        let sql = format!("SELECT lpdu_id, position FROM lm_events WHERE lpdu_id IN {list}");
        let query = chunk.iter().fold(sqlx::query(AssertSqlSafe(sql)), |query, id| query.bind(id.as_str()));
        for row in query.fetch_all(store.reader()).await? {
            let position: i64 = row.try_get("position")?;
            // A foreign hub may have appended an LPDU twice: the first one counts.
            let first = positions.entry(parsed(&row, "lpdu_id")?).or_insert(position);
            *first = position.min(*first);
        }
    }
    Ok(positions)
}

/// A stretch of the log that a server gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stay {
    /// It gets what comes after this position.
    pub since: i64,
    /// The last position that it gets; none while it is in the room.
    pub until: Option<i64>,
}

/// When a server was in a room, oldest first.
pub async fn stays(store: &Store, room_id: &RoomId, server: &ServerName) -> Result<Vec<Stay>, StoreError> {
    let rows = sqlx::query("SELECT since, until FROM lm_servers WHERE room_id = $1 AND server = $2 ORDER BY since")
        .bind(room_id.as_str())
        .bind(server.as_str())
        .fetch_all(store.reader())
        .await?;
    rows.iter().map(|row| Ok(Stay { since: row.try_get("since")?, until: row.try_get("until")? })).collect()
}

/// LPDUs that wait for the hub, after a position of their feed.
pub async fn lpdus_after(store: &Store, room_id: &RoomId, after: i64, limit: i64) -> Result<Vec<LpduRow>, StoreError> {
    let rows = sqlx::query(
        "SELECT position, lpdu_id, json FROM lm_lpdu_queue WHERE room_id = $1 AND position > $2 AND taken_ts = 0 \
         ORDER BY position LIMIT $3",
    )
    .bind(room_id.as_str())
    .bind(after)
    .bind(limit)
    .fetch_all(store.reader())
    .await?;
    rows.iter().map(lpdu_row).collect()
}

/// LPDUs that are not in the log, those that the hub has taken among them, before a position of their feed, the newest first; and
/// since when the hub has each, 0 while it does not. Those that it has lost are left out.
pub async fn newest_lpdus(
    store: &Store,
    room_id: &RoomId,
    before: i64,
    limit: i64,
) -> Result<Vec<(LpduRow, i64)>, StoreError> {
    let rows = sqlx::query(
        "SELECT position, lpdu_id, json, taken_ts FROM lm_lpdu_queue WHERE room_id = $1 AND position < $2 \
         AND passed = 0 AND superseded = 0 ORDER BY position DESC LIMIT $3",
    )
    .bind(room_id.as_str())
    .bind(before)
    .bind(limit)
    .fetch_all(store.reader())
    .await?;
    rows.iter().map(|row| Ok((lpdu_row(row)?, row.try_get("taken_ts")?))).collect()
}

/// The LPDUs at these positions of their feed, of those that still wait.
pub async fn queued_lpdus(store: &Store, room_id: &RoomId, positions: &[i64]) -> Result<Vec<LpduRow>, StoreError> {
    let mut lpdus = Vec::with_capacity(positions.len());
    for chunk in chunks(positions) {
        let list = placeholders(1, chunk.len(), 1);
        let sql = format!(
            "SELECT position, lpdu_id, json FROM lm_lpdu_queue WHERE room_id = $1 AND taken_ts = 0 AND position IN {list}"
        );
        let query = sqlx::query(AssertSqlSafe(sql)).bind(room_id.as_str());
        let query = chunk.iter().fold(query, |query, position| query.bind(*position));
        for row in query.fetch_all(store.reader()).await? {
            lpdus.push(lpdu_row(&row)?);
        }
    }
    Ok(lpdus)
}

/// The newest complaints about a room's hub, newest first.
pub async fn complaints(store: &Store, room_id: &RoomId, limit: i64) -> Result<Vec<String>, StoreError> {
    let rows =
        sqlx::query("SELECT event_id, problem FROM lm_complaints WHERE room_id = $1 ORDER BY noticed_ts DESC LIMIT $2")
            .bind(room_id.as_str())
            .bind(limit)
            .fetch_all(store.reader())
            .await?;
    rows.iter()
        .map(|row| {
            let (event_id, problem): (String, String) = (row.try_get("event_id")?, row.try_get("problem")?);
            Ok(format!("{event_id}: {}", text::decode(problem)))
        })
        .collect()
}

/// What is known of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Known {
    /// It was complained of, and may come again and be right.
    Remarked,
    /// It is in a log, or was refused for good.
    Settled,
}

/// Which of these events are in a log, or were complained of in this room.
pub async fn known_of(
    store: &Store,
    room_id: &RoomId,
    event_ids: &[&EventId],
) -> Result<BTreeMap<OwnedEventId, Known>, StoreError> {
    let mut known = BTreeMap::new();
    for chunk in chunks(event_ids) {
        let list = placeholders(1, chunk.len(), 1);
        let sql = format!("SELECT event_id, settled FROM lm_complaints WHERE room_id = $1 AND event_id IN {list}");
        let query = sqlx::query(AssertSqlSafe(sql)).bind(room_id.as_str());
        let query = chunk.iter().fold(query, |query, id| query.bind(id.as_str()));
        for row in query.fetch_all(store.reader()).await? {
            let settled: i64 = row.try_get("settled")?;
            known.insert(parsed(&row, "event_id")?, if settled == 0 { Known::Remarked } else { Known::Settled });
        }
        let list = placeholders(1, chunk.len(), 0);
        let sql = format!("SELECT event_id FROM lm_events WHERE event_id IN {list}");
        let query = chunk.iter().fold(sqlx::query(AssertSqlSafe(sql)), |query, id| query.bind(id.as_str()));
        for row in query.fetch_all(store.reader()).await? {
            known.insert(parsed(&row, "event_id")?, Known::Settled);
        }
    }
    Ok(known)
}

pub(super) fn event_row(row: &AnyRow) -> Result<EventRow, StoreError> {
    Ok(EventRow {
        room_id: parsed(row, "room_id")?,
        position: row.try_get("position")?,
        event_id: parsed(row, "event_id")?,
        json: row.try_get("json")?,
    })
}

fn lpdu_row(row: &AnyRow) -> Result<LpduRow, StoreError> {
    Ok(LpduRow { position: row.try_get("position")?, lpdu_id: parsed(row, "lpdu_id")?, json: row.try_get("json")? })
}

/// An identifier.
pub(in crate::store) fn parsed<T>(row: &AnyRow, column: &'static str) -> Result<T, StoreError>
where
    T: TryFrom<String, Error: std::fmt::Display>,
{
    let value: String = row.try_get(column)?;
    T::try_from(value).map_err(|error| StoreError::corrupt(column, error))
}
