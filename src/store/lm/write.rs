//! What is written, inside write jobs.

use std::sync::LazyLock;

use ruma::{EventId, OwnedEventId, RoomId, ServerName};

use super::super::rows::{Statement, chunks, placeholders, statement, statements};
use super::{Complaint, Fault, NewEvent, RoomRow, redaction_name};
use crate::event::Redaction;
use crate::store::{StoreError, Tx, text};

/// Adds a room.
pub async fn insert_room(tx: &mut Tx, room: &RoomRow) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO lm_rooms (room_id, version, hub, redaction, head, shared) VALUES ($1, $2, $3, $4, $5, $6)",
    )
    .bind(room.room_id.as_str())
    .bind(room.version.as_str())
    .bind(room.hub.as_str())
    .bind(redaction_name(room.redaction))
    .bind(room.head)
    .bind(i64::from(room.shared))
    .execute(tx)
    .await?;
    Ok(())
}

static APPEND: LazyLock<Vec<Statement>> = LazyLock::new(|| {
    statements(|rows| {
        let rows = placeholders(rows, 7, 0);
        format!("INSERT INTO lm_events (room_id, position, event_id, lpdu_id, kind, state_key, json) VALUES {rows}")
    })
});

/// Adds events to the log. A position or an event ID that is taken already is an error, and nothing is changed (INV-1).
pub async fn append(tx: &mut Tx, room_id: &RoomId, events: &[NewEvent]) -> Result<(), StoreError> {
    for chunk in chunks(events) {
        let mut query = sqlx::query(statement(&APPEND, tx, chunk.len())?);
        for event in chunk {
            let (kind, state_key) = match &event.state {
                Some((kind, key)) => (Some(text::encode(kind).into_owned()), Some(text::encode(key).into_owned())),
                None => (None, None),
            };
            query = query
                .bind(room_id.as_str())
                .bind(event.position)
                .bind(event.event_id.as_str())
                .bind(event.lpdu_id.as_deref().map(EventId::as_str))
                .bind(kind)
                .bind(state_key)
                .bind(event.json.as_slice());
        }
        query.execute(&mut *tx).await?;
    }
    Ok(())
}

static SET_STATE: LazyLock<Vec<Statement>> = LazyLock::new(|| {
    statements(|rows| {
        format!(
            "INSERT INTO lm_state (room_id, kind, state_key, position) VALUES {} \
             ON CONFLICT (room_id, kind, state_key) DO UPDATE SET position = excluded.position",
            placeholders(rows, 4, 0)
        )
    })
});

/// Makes the events at these positions the current state of their types and state keys, each named once.
pub async fn set_state(tx: &mut Tx, room_id: &RoomId, state: &[(&(String, String), i64)]) -> Result<(), StoreError> {
    for chunk in chunks(state) {
        let mut query = sqlx::query(statement(&SET_STATE, tx, chunk.len())?);
        for ((kind, state_key), position) in chunk {
            query = query
                .bind(room_id.as_str())
                .bind(text::encode(kind).into_owned())
                .bind(text::encode(state_key).into_owned())
                .bind(*position);
        }
        query.execute(&mut *tx).await?;
    }
    Ok(())
}

/// Makes these events, or none, the current state of their types and state keys. One that is not in the log stands until the room is
/// read from the store again.
pub async fn replace_state(
    tx: &mut Tx,
    room_id: &RoomId,
    state: &[((String, String), Option<OwnedEventId>)],
) -> Result<(), StoreError> {
    for (key, event_id) in state {
        let position: Option<(i64,)> = match event_id {
            Some(event_id) => {
                sqlx::query_as("SELECT position FROM lm_events WHERE room_id = $1 AND event_id = $2")
                    .bind(room_id.as_str())
                    .bind(event_id.as_str())
                    .fetch_optional(&mut *tx)
                    .await?
            }
            None => None,
        };
        match position {
            Some((position,)) => set_state(tx, room_id, &[(key, position)]).await?,
            None => {
                sqlx::query("DELETE FROM lm_state WHERE room_id = $1 AND kind = $2 AND state_key = $3")
                    .bind(room_id.as_str())
                    .bind(text::encode(&key.0).into_owned())
                    .bind(text::encode(&key.1).into_owned())
                    .execute(&mut *tx)
                    .await?;
            }
        }
    }
    Ok(())
}

/// Sets the last position.
pub async fn advance_head(tx: &mut Tx, room_id: &RoomId, head: i64) -> Result<(), StoreError> {
    sqlx::query("UPDATE lm_rooms SET head = $1 WHERE room_id = $2")
        .bind(head)
        .bind(room_id.as_str())
        .execute(tx)
        .await?;
    Ok(())
}

/// Remembers which table of redaction the hub uses.
pub async fn set_redaction(tx: &mut Tx, room_id: &RoomId, redaction: Redaction) -> Result<(), StoreError> {
    sqlx::query("UPDATE lm_rooms SET redaction = $1 WHERE room_id = $2")
        .bind(redaction_name(redaction))
        .bind(room_id.as_str())
        .execute(tx)
        .await?;
    Ok(())
}

/// The log has another hub.
pub async fn set_hub(tx: &mut Tx, room_id: &RoomId, hub: &ServerName) -> Result<(), StoreError> {
    sqlx::query("UPDATE lm_rooms SET hub = $1 WHERE room_id = $2")
        .bind(hub.as_str())
        .bind(room_id.as_str())
        .execute(tx)
        .await?;
    Ok(())
}

/// Whether this server keeps the log, as far as is committed.
pub async fn is_hub(tx: &mut Tx, room_id: &RoomId, server: &ServerName) -> Result<bool, StoreError> {
    let row = sqlx::query("SELECT room_id FROM lm_rooms WHERE room_id = $1 AND hub = $2")
        .bind(room_id.as_str())
        .bind(server.as_str())
        .fetch_optional(tx)
        .await?;
    Ok(row.is_some())
}

/// Whether what this server sends is in the log when it is committed, and no other server has to put it there: it keeps the log, or
/// the log follows from a graph of which it has a part.
pub async fn is_kept_here(tx: &mut Tx, room_id: &RoomId, server: &ServerName) -> Result<bool, StoreError> {
    let row = sqlx::query("SELECT room_id FROM lm_rooms WHERE room_id = $1 AND (hub = $2 OR shared <> 0)")
        .bind(room_id.as_str())
        .bind(server.as_str())
        .fetch_optional(tx)
        .await?;
    Ok(row.is_some())
}

/// Forgets which servers were in the room when.
pub async fn forget_servers(tx: &mut Tx, room_id: &RoomId) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM lm_servers WHERE room_id = $1").bind(room_id.as_str()).execute(tx).await?;
    Ok(())
}

/// A server is in the room: it gets what comes after `since`.
pub async fn server_joined(tx: &mut Tx, room_id: &RoomId, server: &ServerName, since: i64) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO lm_servers (room_id, server, since, until) VALUES ($1, $2, $3, NULL) \
         ON CONFLICT (room_id, server, since) DO UPDATE SET until = NULL",
    )
    .bind(room_id.as_str())
    .bind(server.as_str())
    .bind(since)
    .execute(tx)
    .await?;
    Ok(())
}

/// A server is no longer in the room: the event at `until` is the last that it gets.
pub async fn server_left(tx: &mut Tx, room_id: &RoomId, server: &ServerName, until: i64) -> Result<(), StoreError> {
    sqlx::query("UPDATE lm_servers SET until = $1 WHERE room_id = $2 AND server = $3 AND until IS NULL")
        .bind(until)
        .bind(room_id.as_str())
        .bind(server.as_str())
        .execute(tx)
        .await?;
    Ok(())
}

/// Adds an LPDU to the room's feed of LPDUs.
pub async fn queue_lpdu(
    tx: &mut Tx,
    room_id: &RoomId,
    position: i64,
    lpdu_id: &EventId,
    json: &[u8],
) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO lm_lpdu_queue (room_id, position, lpdu_id, json) VALUES ($1, $2, $3, $4)")
        .bind(room_id.as_str())
        .bind(position)
        .bind(lpdu_id.as_str())
        .bind(json)
        .execute(tx)
        .await?;
    Ok(())
}

/// Takes LPDUs out that the hub has answered.
pub async fn forget_lpdus(tx: &mut Tx, room_id: &RoomId, positions: &[i64]) -> Result<(), StoreError> {
    for position in positions {
        sqlx::query("DELETE FROM lm_lpdu_queue WHERE room_id = $1 AND position = $2")
            .bind(room_id.as_str())
            .bind(*position)
            .execute(&mut *tx)
            .await?;
    }
    Ok(())
}

/// Takes out an LPDU that another event takes the place of. False when it is not there any more.
pub async fn withdraw_lpdu(tx: &mut Tx, room_id: &RoomId, position: i64) -> Result<bool, StoreError> {
    let done = sqlx::query("DELETE FROM lm_lpdu_queue WHERE room_id = $1 AND position = $2")
        .bind(room_id.as_str())
        .bind(position)
        .execute(tx)
        .await?;
    Ok(done.rows_affected() > 0)
}

/// Records a complaint; the first one about an event counts, but for one that settles it.
pub async fn complain(tx: &mut Tx, room_id: &RoomId, complaint: &Complaint, now_ms: i64) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO lm_complaints (room_id, event_id, problem, noticed_ts, settled, fault) \
         VALUES ($1, $2, $3, $4, $5, $6) \
         ON CONFLICT (room_id, event_id) DO UPDATE SET problem = excluded.problem, settled = excluded.settled, \
         fault = excluded.fault \
         WHERE lm_complaints.settled < excluded.settled",
    )
    .bind(room_id.as_str())
    .bind(complaint.event_id.as_str())
    .bind(text::encode(&complaint.problem).into_owned())
    .bind(now_ms)
    .bind(i64::from(complaint.settled))
    .bind(complaint.fault.map_or("", Fault::as_str))
    .execute(tx)
    .await?;
    Ok(())
}
