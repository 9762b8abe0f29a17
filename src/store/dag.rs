//! The tables of the graph side: rooms, events, state groups, joined members, the outbox and invites.

use std::collections::HashSet;
use std::sync::LazyLock;

use ruma::{OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId, RoomId, ServerName, UserId};
use sqlx::any::AnyRow;
use sqlx::{AssertSqlSafe, Row as _};

use super::rows::{Statement, chunks, placeholders, statement, statements};
use super::text::{decode, encode};
use super::{Store, StoreError, Tx};

/// One stored event.
#[derive(Debug, Clone)]
pub struct EventRow {
    /// Its ID.
    pub event_id: OwnedEventId,
    /// The room.
    pub room_id: OwnedRoomId,
    /// The room's version.
    pub version: String,
    /// The order in which events were stored.
    pub seq: i64,
    /// 0 accepted, 1 soft-failed, 2 rejected.
    pub status: i64,
    /// The state group before it.
    pub before: Option<i64>,
    /// The state group after it.
    pub after: Option<i64>,
    /// Why it was not accepted.
    pub reason: Option<String>,
    /// Whether the room stands on it although no state of it is known; what is read, never what is written.
    pub needed: bool,
    /// The event as it goes over the wire.
    pub json: Vec<u8>,
}

/// One state group.
#[derive(Debug, Clone)]
pub struct GroupRow {
    /// Its ID.
    pub id: i64,
    /// The group that it differs from; none when `delta` is everything.
    pub prev_id: Option<i64>,
    /// How many changes lead from the last whole state to it.
    pub weight: i64,
    /// The changes, as JSON.
    pub delta: Vec<u8>,
}

/// One room.
#[derive(Debug, Clone)]
pub struct RoomRow {
    /// The room.
    pub room_id: OwnedRoomId,
    /// Its version.
    pub version: String,
    /// The group of the current state.
    pub current: i64,
    /// The forward extremities, oldest first.
    pub tips: Vec<OwnedEventId>,
    /// The last position of the outbox.
    pub head: i64,
}

/// One position of a room's outbox.
#[derive(Debug, Clone)]
pub struct OutboxRow {
    /// The position.
    pub position: i64,
    /// The event.
    pub event_id: OwnedEventId,
    /// The server that it came from, which does not get it.
    pub not_to: Option<OwnedServerName>,
}

/// Which positions a server gets: those after `opened`, up to `closed`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// The position before the first that it gets.
    pub opened: i64,
    /// The last position that it gets; none while it is in the room.
    pub closed: Option<i64>,
}

/// Everything that one batch of a room changes.
#[derive(Debug, Default)]
pub struct Changes {
    /// Events that are new or whose status changed.
    pub events: Vec<EventRow>,
    /// New state groups.
    pub groups: Vec<GroupRow>,
    /// Users who are joined now (true) or no longer (false), in order.
    pub joined: Vec<(OwnedUserId, bool)>,
    /// New positions of the outbox.
    pub outbox: Vec<OutboxRow>,
    /// Servers that come (true) and get what follows a position, or go and get nothing after it, in order.
    pub windows: Vec<(OwnedServerName, i64, bool)>,
}

/// Writes a batch's changes and the room's new row.
pub async fn write(tx: &mut Tx, room: &RoomRow, changes: &Changes) -> Result<(), StoreError> {
    for group in &changes.groups {
        sqlx::query("INSERT INTO dag_groups (id, room_id, prev_id, weight, delta) VALUES ($1, $2, $3, $4, $5)")
            .bind(group.id)
            .bind(room.room_id.as_str())
            .bind(group.prev_id)
            .bind(group.weight)
            .bind(group.delta.as_slice())
            .execute(&mut *tx)
            .await?;
    }
    write_events(tx, &changes.events).await?;
    for (user, joined) in &changes.joined {
        let sql = if *joined {
            "INSERT INTO dag_joined (room_id, user_id) VALUES ($1, $2) ON CONFLICT (room_id, user_id) DO NOTHING"
        } else {
            "DELETE FROM dag_joined WHERE room_id = $1 AND user_id = $2"
        };
        sqlx::query(sql).bind(room.room_id.as_str()).bind(encode(user.as_str()).as_ref()).execute(&mut *tx).await?;
    }
    write_outbox(tx, &room.room_id, &changes.outbox).await?;
    for (server, position, opened) in &changes.windows {
        let sql = if *opened {
            "INSERT INTO dag_windows (room_id, server, opened, closed) VALUES ($1, $2, $3, NULL) \
             ON CONFLICT (room_id, server, opened) DO UPDATE SET closed = excluded.closed"
        } else {
            "UPDATE dag_windows SET closed = $3 WHERE room_id = $1 AND server = $2 AND closed IS NULL"
        };
        sqlx::query(sql).bind(room.room_id.as_str()).bind(server.as_str()).bind(position).execute(&mut *tx).await?;
    }
    write_room(tx, room).await
}

/// A server in which nobody is joined gets the one event at `position`.
pub async fn open_once(tx: &mut Tx, room_id: &RoomId, server: &ServerName, position: i64) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO dag_windows (room_id, server, opened, closed) VALUES ($1, $2, $3, $4) \
         ON CONFLICT (room_id, server, opened) DO UPDATE SET closed = excluded.closed",
    )
    .bind(room_id.as_str())
    .bind(server.as_str())
    .bind(position.saturating_sub(1))
    .bind(position)
    .execute(tx)
    .await?;
    Ok(())
}

static WRITE_EVENTS: LazyLock<Vec<Statement>> = LazyLock::new(|| {
    statements(|rows| {
        format!(
            "INSERT INTO dag_events \
             (event_id, room_id, version, seq, status, before_group, after_group, reason, json) VALUES {} \
             ON CONFLICT (event_id) DO UPDATE SET seq = excluded.seq, status = excluded.status, \
             before_group = excluded.before_group, after_group = excluded.after_group, reason = excluded.reason, \
             json = excluded.json",
            placeholders(rows, 9, 0)
        )
    })
});

async fn write_events(tx: &mut Tx, events: &[EventRow]) -> Result<(), StoreError> {
    // PostgreSQL takes a row once in a statement: of an event that changed twice the last row counts.
    let mut seen = HashSet::new();
    let mut last: Vec<&EventRow> = events.iter().rev().filter(|event| seen.insert(&event.event_id)).collect();
    last.reverse();
    for chunk in chunks(&last) {
        let mut query = sqlx::query(statement(&WRITE_EVENTS, tx, chunk.len())?);
        for event in chunk {
            query = query
                .bind(event.event_id.as_str())
                .bind(event.room_id.as_str())
                .bind(event.version.as_str())
                .bind(event.seq)
                .bind(event.status)
                .bind(event.before)
                .bind(event.after)
                .bind(event.reason.as_deref().map(|reason| encode(reason).into_owned()))
                .bind(event.json.as_slice());
        }
        query.execute(&mut *tx).await?;
    }
    Ok(())
}

static WRITE_OUTBOX: LazyLock<Vec<Statement>> = LazyLock::new(|| {
    statements(|rows| {
        format!("INSERT INTO dag_outbox (room_id, position, event_id, not_to) VALUES {}", placeholders(rows, 4, 0))
    })
});

async fn write_outbox(tx: &mut Tx, room_id: &RoomId, outbox: &[OutboxRow]) -> Result<(), StoreError> {
    for chunk in chunks(outbox) {
        let mut query = sqlx::query(statement(&WRITE_OUTBOX, tx, chunk.len())?);
        for row in chunk {
            query = query
                .bind(room_id.as_str())
                .bind(row.position)
                .bind(row.event_id.as_str())
                .bind(row.not_to.as_ref().map(|server| server.as_str()));
        }
        query.execute(&mut *tx).await?;
    }
    Ok(())
}

async fn write_room(tx: &mut Tx, room: &RoomRow) -> Result<(), StoreError> {
    let tips = serde_json::to_vec(&room.tips).map_err(|error| StoreError::corrupt("list of extremities", error))?;
    sqlx::query(
        "INSERT INTO dag_rooms (room_id, version, listed, current_group, tips, outbox_head) \
         VALUES ($1, $2, 0, $3, $4, $5) ON CONFLICT (room_id) DO UPDATE SET \
         current_group = excluded.current_group, tips = excluded.tips, outbox_head = excluded.outbox_head",
    )
    .bind(room.room_id.as_str())
    .bind(room.version.as_str())
    .bind(room.current)
    .bind(tips.as_slice())
    .bind(room.head)
    .execute(tx)
    .await?;
    Ok(())
}

/// Replaces an event's JSON by its redacted form.
pub async fn replace_json(tx: &mut Tx, event_id: &ruma::EventId, json: &[u8]) -> Result<(), StoreError> {
    sqlx::query("UPDATE dag_events SET json = $2 WHERE event_id = $1")
        .bind(event_id.as_str())
        .bind(json)
        .execute(tx)
        .await?;
    Ok(())
}

/// One room's row.
pub async fn room(store: &Store, room_id: &RoomId) -> Result<Option<RoomRow>, StoreError> {
    sqlx::query("SELECT * FROM dag_rooms WHERE room_id = $1")
        .bind(room_id.as_str())
        .fetch_optional(store.reader())
        .await?
        .map(room_row)
        .transpose()
}

/// The rooms of the public directory after `after`, in order.
pub async fn listed_rooms(store: &Store, after: &str, limit: i64) -> Result<Vec<OwnedRoomId>, StoreError> {
    // Databases sort text each in its own way.
    let rows: Vec<(String,)> =
        sqlx::query_as("SELECT room_id FROM dag_rooms WHERE listed = 1").fetch_all(store.reader()).await?;
    let mut rooms: Vec<String> =
        rows.into_iter().map(|(room_id,)| room_id).filter(|room_id| **room_id > *after).collect();
    rooms.sort();
    rooms.truncate(usize::try_from(limit).unwrap_or(0));
    rooms.into_iter().map(|id| RoomId::parse(id).map_err(|error| StoreError::corrupt("room ID", error))).collect()
}

/// Lists a room, or takes it out.
pub async fn set_listed(tx: &mut Tx, room_id: &RoomId, listed: bool) -> Result<(), StoreError> {
    sqlx::query("UPDATE dag_rooms SET listed = $2 WHERE room_id = $1")
        .bind(room_id.as_str())
        .bind(i64::from(listed))
        .execute(tx)
        .await?;
    Ok(())
}

/// The servers that get everything of a room's outbox from some position on.
pub async fn open_windows(store: &Store, room_id: &RoomId) -> Result<HashSet<OwnedServerName>, StoreError> {
    let rows: Vec<(String,)> = sqlx::query_as("SELECT server FROM dag_windows WHERE room_id = $1 AND closed IS NULL")
        .bind(room_id.as_str())
        .fetch_all(store.reader())
        .await?;
    rows.into_iter().map(|(server,)| parse(server, "server name")).collect()
}

/// The joined users of a room.
pub async fn joined(store: &Store, room_id: &RoomId) -> Result<Vec<OwnedUserId>, StoreError> {
    sqlx::query("SELECT user_id FROM dag_joined WHERE room_id = $1")
        .bind(room_id.as_str())
        .fetch_all(store.reader())
        .await?
        .into_iter()
        .map(|row| decode(row.try_get("user_id")?).try_into().map_err(|error| StoreError::corrupt("user ID", error)))
        .collect()
}

/// The events with these IDs that are stored, in no order.
pub async fn events(store: &Store, ids: &[OwnedEventId]) -> Result<Vec<EventRow>, StoreError> {
    let mut rows = Vec::new();
    for chunk in ids.chunks(CHUNK) {
        let Some(last) = chunk.last() else { continue };
        // A few statement lengths only, so that prepared statements are found again.
        let size = [1, 4, 16, 64, CHUNK].into_iter().find(|size| chunk.len() <= *size).unwrap_or(CHUNK);
        let places = (1..=size).map(|n| format!("${n}")).collect::<Vec<_>>().join(", ");
        let sql = format!("SELECT * FROM dag_events WHERE event_id IN ({places})");
        let mut query = sqlx::query(AssertSqlSafe(sql));
        for n in 0..size {
            query = query.bind(chunk.get(n).unwrap_or(last).as_str());
        }
        for row in query.fetch_all(store.reader()).await? {
            rows.push(event_row(row)?);
        }
    }
    Ok(rows)
}

const CHUNK: usize = 256;

/// The event of a room that was stored first with the state before it: where its history begins here.
pub async fn first_with_state(store: &Store, room_id: &RoomId) -> Result<Option<EventRow>, StoreError> {
    sqlx::query(
        "SELECT * FROM dag_events WHERE room_id = $1 AND before_group IS NOT NULL AND status = 0 ORDER BY seq LIMIT 1",
    )
    .bind(room_id.as_str())
    .fetch_optional(store.reader())
    .await?
    .map(event_row)
    .transpose()
}

/// A state group and those that it stands on, down to the last whole state.
pub async fn group_chain(store: &Store, id: i64) -> Result<Vec<GroupRow>, StoreError> {
    sqlx::query(
        "WITH RECURSIVE chain (id, prev_id, weight, delta) AS ( \
             SELECT id, prev_id, weight, delta FROM dag_groups WHERE id = $1 \
             UNION ALL \
             SELECT g.id, g.prev_id, g.weight, g.delta FROM dag_groups g JOIN chain c ON g.id = c.prev_id \
         ) SELECT id, prev_id, weight, delta FROM chain",
    )
    .bind(id)
    .fetch_all(store.reader())
    .await?
    .into_iter()
    .map(|row| {
        Ok(GroupRow {
            id: row.try_get("id")?,
            prev_id: row.try_get("prev_id")?,
            weight: row.try_get("weight")?,
            delta: row.try_get("delta")?,
        })
    })
    .collect()
}

/// The outbox of a room after position `after`, with the events' JSON.
pub async fn outbox(
    store: &Store,
    room_id: &RoomId,
    after: i64,
    until: i64,
    limit: i64,
) -> Result<Vec<(OutboxRow, Vec<u8>)>, StoreError> {
    sqlx::query(
        "SELECT o.position, o.event_id, o.not_to, e.json FROM dag_outbox o \
         JOIN dag_events e ON e.event_id = o.event_id \
         WHERE o.room_id = $1 AND o.position > $2 AND o.position <= $3 ORDER BY o.position LIMIT $4",
    )
    .bind(room_id.as_str())
    .bind(after)
    .bind(until)
    .bind(limit)
    .fetch_all(store.reader())
    .await?
    .into_iter()
    .map(|row| {
        let not_to: Option<String> = row.try_get("not_to")?;
        let outbox = OutboxRow {
            position: row.try_get("position")?,
            event_id: parse(row.try_get("event_id")?, "event ID")?,
            not_to: not_to.map(|server| parse(server, "server name")).transpose()?,
        };
        Ok((outbox, row.try_get("json")?))
    })
    .collect()
}

/// Which positions of a room's outbox a server gets.
pub async fn windows(store: &Store, room_id: &RoomId, server: &ServerName) -> Result<Vec<Window>, StoreError> {
    sqlx::query("SELECT opened, closed FROM dag_windows WHERE room_id = $1 AND server = $2")
        .bind(room_id.as_str())
        .bind(server.as_str())
        .fetch_all(store.reader())
        .await?
        .into_iter()
        .map(|row| Ok(Window { opened: row.try_get("opened")?, closed: row.try_get("closed")? }))
        .collect()
}

/// An invite into a room that lives elsewhere.
#[derive(Debug, Clone)]
pub struct InviteRow {
    /// The room's version.
    pub version: String,
    /// The server that it came from.
    pub via: OwnedServerName,
    /// The signed invite.
    pub json: Vec<u8>,
}

/// Keeps an invite; a later one for the same user and room takes its place.
pub async fn put_invite(tx: &mut Tx, room_id: &RoomId, user: &UserId, invite: &InviteRow) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO dag_invites (room_id, user_id, version, via, json) VALUES ($1, $2, $3, $4, $5) \
         ON CONFLICT (room_id, user_id) DO UPDATE SET version = excluded.version, via = excluded.via, \
         json = excluded.json",
    )
    .bind(room_id.as_str())
    .bind(encode(user.as_str()).as_ref())
    .bind(invite.version.as_str())
    .bind(invite.via.as_str())
    .bind(invite.json.as_slice())
    .execute(tx)
    .await?;
    Ok(())
}

/// The invite of a user into a room.
pub async fn invite(store: &Store, room_id: &RoomId, user: &UserId) -> Result<Option<InviteRow>, StoreError> {
    let row = sqlx::query("SELECT version, via, json FROM dag_invites WHERE room_id = $1 AND user_id = $2")
        .bind(room_id.as_str())
        .bind(encode(user.as_str()).as_ref())
        .fetch_optional(store.reader())
        .await?;
    row.map(|row| {
        Ok(InviteRow {
            version: row.try_get("version")?,
            via: parse(row.try_get("via")?, "server name")?,
            json: row.try_get("json")?,
        })
    })
    .transpose()
}

/// Forgets an invite.
pub async fn remove_invite(tx: &mut Tx, room_id: &RoomId, user: &UserId) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM dag_invites WHERE room_id = $1 AND user_id = $2")
        .bind(room_id.as_str())
        .bind(encode(user.as_str()).as_ref())
        .execute(tx)
        .await?;
    Ok(())
}

fn event_row(row: AnyRow) -> Result<EventRow, StoreError> {
    Ok(EventRow {
        event_id: parse(row.try_get("event_id")?, "event ID")?,
        room_id: parse(row.try_get("room_id")?, "room ID")?,
        version: row.try_get("version")?,
        seq: row.try_get("seq")?,
        status: row.try_get("status")?,
        before: row.try_get("before_group")?,
        after: row.try_get("after_group")?,
        reason: row.try_get::<Option<String>, _>("reason")?.map(decode),
        needed: row.try_get::<i64, _>("needed")? == 1,
        json: row.try_get("json")?,
    })
}

fn room_row(row: AnyRow) -> Result<RoomRow, StoreError> {
    let tips: Vec<u8> = row.try_get("tips")?;
    Ok(RoomRow {
        room_id: parse(row.try_get("room_id")?, "room ID")?,
        version: row.try_get("version")?,
        current: row.try_get("current_group")?,
        tips: serde_json::from_slice(&tips).map_err(|error| StoreError::corrupt("list of extremities", error))?,
        head: row.try_get("outbox_head")?,
    })
}

fn parse<T: TryFrom<String, Error: ToString>>(text: String, what: &'static str) -> Result<T, StoreError> {
    text.try_into().map_err(|error: T::Error| StoreError::corrupt(what, error))
}
