//! How foreign hubs keep their logs: whether they fork, how far they were looked over, whether they know their end; what they
//! took and did not put into them; and their faults.

use ruma::{EventId, OwnedEventId, OwnedRoomId, RoomId, ServerName, UserId};
use sqlx::Row as _;

use super::super::{Store, StoreError, Tx, text};
use super::read::parsed;

/// What is known of how a foreign hub keeps the log of a room.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Look {
    /// Whether it was seen to fork.
    pub forks: bool,
    /// The log's newest event when it was looked over last.
    pub until: Option<OwnedEventId>,
    /// Since when the hub does not know the end of the log as it is here.
    pub lost_ts: Option<i64>,
}

/// An LPDU that the hub has, and that is not in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TakenRow {
    /// Its place in the feed.
    pub position: i64,
    /// Its ID.
    pub lpdu_id: OwnedEventId,
    /// Since when the hub has it.
    pub taken_ts: i64,
    /// Whether one that was queued later is in the log.
    pub passed: bool,
    /// Whether it is about a membership of which something else came into the log while the hub had it.
    pub superseded: bool,
    /// How often it was queued again.
    pub resent: i64,
}

/// What a hub did wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Fault {
    /// Two events of its log follow the same one.
    Forked,
    /// It gave an event as it was not signed.
    Rewritten,
    /// It took an event that the rules forbid.
    Forbidden,
    /// It did not give all of its log.
    Skipped,
    /// It does not know what it gave before.
    WentBack,
    /// It gave an event after one that follows it, or gives its log in an order that contradicts what follows what.
    Reordered,
    /// It took an event that follows nothing.
    Unlinked,
    /// It names only a part of what allows an event.
    Incomplete,
    /// It is said to keep the log no more, and nobody shows who does.
    Moved,
}

impl Fault {
    /// As one word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Forked => "forked",
            Self::Rewritten => "rewritten",
            Self::Forbidden => "forbidden",
            Self::Skipped => "skipped",
            Self::WentBack => "went_back",
            Self::Reordered => "reordered",
            Self::Unlinked => "unlinked",
            Self::Incomplete => "incomplete",
            Self::Moved => "moved",
        }
    }
}

/// A fault of a hub as it was recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FaultRow {
    /// The event with which it was noticed.
    pub event_id: String,
    /// What kind of fault, as one word.
    pub kind: String,
    /// What is wrong.
    pub problem: String,
    /// When it was noticed.
    pub noticed_ts: i64,
}

/// The faults of all foreign hubs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Faults {
    /// How many were noticed of late.
    pub count: i64,
    /// In how many rooms.
    pub rooms: i64,
    /// When the last of them was noticed, in milliseconds.
    pub last_ts: Option<i64>,
    /// How many rooms' hubs do not know the end of the log as it is here.
    pub lost: i64,
}

/// What is known of all rooms of which something is.
pub async fn looks(store: &Store) -> Result<Vec<(OwnedRoomId, Look)>, StoreError> {
    let rows =
        sqlx::query("SELECT room_id, forks, looked_until, lost_ts FROM lm_looks").fetch_all(store.reader()).await?;
    let mut looks = Vec::with_capacity(rows.len());
    for row in rows {
        let (forks, until, lost): (i64, String, i64) =
            (row.try_get("forks")?, row.try_get("looked_until")?, row.try_get("lost_ts")?);
        let look = Look { forks: forks != 0, until: until.try_into().ok(), lost_ts: Some(lost).filter(|ts| *ts != 0) };
        looks.push((parsed(&row, "room_id")?, look));
    }
    Ok(looks)
}

/// Since when a room's hub does not know the end of the log as it is here.
pub async fn lost_since(store: &Store, room_id: &RoomId) -> Result<Option<i64>, StoreError> {
    let row: Option<(i64,)> = sqlx::query_as("SELECT lost_ts FROM lm_looks WHERE room_id = $1 AND lost_ts <> 0")
        .bind(room_id.as_str())
        .fetch_optional(store.reader())
        .await?;
    Ok(row.map(|(ts,)| ts))
}

/// Writes down what is known of a room.
pub async fn keep_look(tx: &mut Tx, room_id: &RoomId, look: &Look) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO lm_looks (room_id, forks, looked_until, lost_ts) VALUES ($1, $2, $3, $4) \
         ON CONFLICT (room_id) DO UPDATE SET forks = excluded.forks, looked_until = excluded.looked_until, \
         lost_ts = excluded.lost_ts",
    )
    .bind(room_id.as_str())
    .bind(i64::from(look.forks))
    .bind(look.until.as_deref().map_or("", EventId::as_str))
    .bind(look.lost_ts.unwrap_or_default())
    .execute(tx)
    .await?;
    Ok(())
}

/// The rooms that other servers keep.
pub async fn rooms_of_others(store: &Store, own: &ServerName) -> Result<Vec<OwnedRoomId>, StoreError> {
    let rows = sqlx::query("SELECT room_id FROM lm_rooms WHERE hub <> $1 AND shared = 0")
        .bind(own.as_str())
        .fetch_all(store.reader())
        .await?;
    rows.iter().map(|row| parsed(row, "room_id")).collect()
}

/// The rooms that a server keeps.
pub async fn rooms_of_hub(store: &Store, hub: &ServerName) -> Result<Vec<OwnedRoomId>, StoreError> {
    let rows = sqlx::query("SELECT room_id FROM lm_rooms WHERE hub = $1 AND shared = 0")
        .bind(hub.as_str())
        .fetch_all(store.reader())
        .await?;
    rows.iter().map(|row| parsed(row, "room_id")).collect()
}

/// The rooms whose hubs have LPDUs that are not in the log.
pub async fn rooms_with_taken(store: &Store) -> Result<Vec<OwnedRoomId>, StoreError> {
    let rows =
        sqlx::query("SELECT DISTINCT room_id FROM lm_lpdu_queue WHERE taken_ts <> 0").fetch_all(store.reader()).await?;
    rows.iter().map(|row| parsed(row, "room_id")).collect()
}

/// LPDUs that a room's hub has and that are not in the log, in the order in which they were sent.
pub async fn taken_lpdus(store: &Store, room_id: &RoomId, limit: i64) -> Result<Vec<TakenRow>, StoreError> {
    let rows = sqlx::query(
        "SELECT position, lpdu_id, taken_ts, passed, superseded, resent FROM lm_lpdu_queue \
         WHERE room_id = $1 AND taken_ts <> 0 ORDER BY position LIMIT $2",
    )
    .bind(room_id.as_str())
    .bind(limit)
    .fetch_all(store.reader())
    .await?;
    let row = |row: &sqlx::any::AnyRow| {
        Ok(TakenRow {
            position: row.try_get("position")?,
            lpdu_id: parsed(row, "lpdu_id")?,
            taken_ts: row.try_get("taken_ts")?,
            passed: row.try_get::<i64, _>("passed")? != 0,
            superseded: row.try_get::<i64, _>("superseded")? != 0,
            resent: row.try_get("resent")?,
        })
    };
    rows.iter().map(row).collect()
}

/// Since when a room's hub has the oldest LPDU that it took and that is not in the log, however often it was sent again.
pub async fn taken_since(store: &Store, room_id: &RoomId) -> Result<Option<i64>, StoreError> {
    let first = "SELECT first_taken_ts FROM lm_lpdu_queue WHERE room_id = $1 AND first_taken_ts <> 0 \
                 ORDER BY first_taken_ts LIMIT 1";
    let row: Option<(i64,)> = sqlx::query_as(first).bind(room_id.as_str()).fetch_optional(store.reader()).await?;
    Ok(row.map(|(ts,)| ts))
}

/// The hub has these LPDUs: they wait for the log.
pub async fn take_lpdus(tx: &mut Tx, room_id: &RoomId, positions: &[i64], now: i64) -> Result<(), StoreError> {
    for position in positions {
        sqlx::query(
            "DELETE FROM lm_lpdu_queue WHERE room_id = $1 AND position = $2 \
             AND EXISTS (SELECT 1 FROM lm_events e WHERE e.lpdu_id = lm_lpdu_queue.lpdu_id)",
        )
        .bind(room_id.as_str())
        .bind(*position)
        .execute(&mut *tx)
        .await?;
        let taken = "UPDATE lm_lpdu_queue SET taken_ts = $1, \
                     first_taken_ts = CASE WHEN first_taken_ts = 0 THEN $2 ELSE first_taken_ts END \
                     WHERE room_id = $3 AND position = $4";
        sqlx::query(taken)
            .bind(now.max(1))
            .bind(now.max(1))
            .bind(room_id.as_str())
            .bind(*position)
            .execute(&mut *tx)
            .await?;
    }
    Ok(())
}

/// An LPDU is in the log. Those that the hub had before are not there, or it would have put them before it. Of what it has not
/// taken yet that says nothing.
pub async fn lpdu_echoed(tx: &mut Tx, room_id: &RoomId, lpdu_id: &EventId) -> Result<(), StoreError> {
    let found: Option<(i64,)> =
        sqlx::query_as("SELECT position FROM lm_lpdu_queue WHERE room_id = $1 AND lpdu_id = $2")
            .bind(room_id.as_str())
            .bind(lpdu_id.as_str())
            .fetch_optional(&mut *tx)
            .await?;
    let Some((position,)) = found else { return Ok(()) };
    sqlx::query("DELETE FROM lm_lpdu_queue WHERE room_id = $1 AND lpdu_id = $2")
        .bind(room_id.as_str())
        .bind(lpdu_id.as_str())
        .execute(&mut *tx)
        .await?;
    sqlx::query("UPDATE lm_lpdu_queue SET passed = 1 WHERE room_id = $1 AND position < $2 AND taken_ts <> 0")
        .bind(room_id.as_str())
        .bind(position)
        .execute(&mut *tx)
        .await?;
    Ok(())
}

/// How a user's membership came into the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Came<'a> {
    /// By an event of this LPDU, if of any, with which the gateway came into the room. Where that is not queued, as after a handshake,
    /// it came after all that is.
    Anew(Option<&'a EventId>),
    /// By an event that the hub gave, of this LPDU if of any. Where that is not queued, what is queued may be later.
    In(Option<&'a EventId>),
}

/// A user's membership came into the log by an event: what the user said of it before, and what is not in the log, would undo that
/// if it came there later. Takes it out, and returns which it was. What the hub has may stand behind the event in its log, though, where
/// the event is somebody else's: that is only marked, so that it is not sent again.
pub async fn forget_memberships(
    tx: &mut Tx,
    room_id: &RoomId,
    user: &UserId,
    came: Came<'_>,
) -> Result<Vec<OwnedEventId>, StoreError> {
    #[derive(serde::Deserialize)]
    struct Peek {
        #[serde(rename = "type")]
        kind: String,
        sender: String,
        #[serde(default)]
        state_key: Option<String>,
    }
    let (lpdu_id, otherwise) = match came {
        Came::Anew(lpdu_id) => (lpdu_id, Some(i64::MAX)),
        Came::In(lpdu_id) => (lpdu_id, None),
    };
    let mut until = otherwise;
    if let Some(id) = lpdu_id {
        let sql = "SELECT position FROM lm_lpdu_queue WHERE lpdu_id = $1 AND room_id = $2";
        let found: Option<(i64,)> =
            sqlx::query_as(sql).bind(id.as_str()).bind(room_id.as_str()).fetch_optional(&mut *tx).await?;
        until = found.map(|(position,)| position).or(otherwise);
    }
    // Of a long queue little stands before what comes back, and little is taken and not in the log.
    let (of, bound) = until.map_or(("taken_ts > $2", 0), |until| ("position < $2", until));
    let sql =
        format!("SELECT position, lpdu_id, json FROM lm_lpdu_queue WHERE room_id = $1 AND {of} ORDER BY position");
    let rows = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(room_id.as_str()).bind(bound).fetch_all(&mut *tx).await?;
    let mut said: Vec<(i64, OwnedEventId)> = Vec::new();
    for row in &rows {
        let json: Vec<u8> = row.try_get("json")?;
        let peek: Peek = serde_json::from_slice(&json).map_err(|error| StoreError::corrupt("LPDU", error))?;
        let is_own = peek.sender == user.as_str() && peek.state_key.as_deref() == Some(user.as_str());
        if is_own && peek.kind == "m.room.member" {
            said.push((row.try_get("position")?, parsed(row, "lpdu_id")?));
        }
    }
    let positions: Vec<i64> = said.iter().map(|(position, _)| *position).collect();
    if until.is_none() {
        for position in positions {
            sqlx::query("UPDATE lm_lpdu_queue SET superseded = 1 WHERE room_id = $1 AND position = $2")
                .bind(room_id.as_str())
                .bind(position)
                .execute(&mut *tx)
                .await?;
        }
        return Ok(Vec::new());
    }
    super::forget_lpdus(tx, room_id, &positions).await?;
    Ok(said.into_iter().map(|(_, id)| id).collect())
}

/// An LPDU that the hub took, and that is not in its log, waits again, at another position. False when it came meanwhile.
pub async fn requeue_lpdu(tx: &mut Tx, room_id: &RoomId, from: i64, to: i64) -> Result<bool, StoreError> {
    let done = sqlx::query(
        "UPDATE lm_lpdu_queue SET position = $1, resent = resent + CASE WHEN taken_ts = 0 THEN 0 ELSE 1 END, \
         taken_ts = 0, passed = 0 WHERE room_id = $2 AND position = $3",
    )
    .bind(to)
    .bind(room_id.as_str())
    .bind(from)
    .execute(tx)
    .await?;
    Ok(done.rows_affected() > 0)
}

/// The positions of the LPDUs that wait to be sent.
pub async fn waiting_lpdus(tx: &mut Tx, room_id: &RoomId) -> Result<Vec<i64>, StoreError> {
    let rows: Vec<(i64,)> =
        sqlx::query_as("SELECT position FROM lm_lpdu_queue WHERE room_id = $1 AND taken_ts = 0 ORDER BY position")
            .bind(room_id.as_str())
            .fetch_all(tx)
            .await?;
    Ok(rows.into_iter().map(|(position,)| position).collect())
}

/// How many faults of a room's hub are on record, and the newest, newest first.
pub async fn faults(store: &Store, room_id: &RoomId, limit: i64) -> Result<(i64, Vec<FaultRow>), StoreError> {
    let (count,): (i64,) = sqlx::query_as("SELECT COUNT(*) FROM lm_complaints WHERE room_id = $1 AND fault <> ''")
        .bind(room_id.as_str())
        .fetch_one(store.reader())
        .await?;
    if count == 0 {
        return Ok((0, Vec::new()));
    }
    let rows = sqlx::query(
        "SELECT event_id, fault, problem, noticed_ts FROM lm_complaints WHERE room_id = $1 AND fault <> '' \
         ORDER BY noticed_ts DESC LIMIT $2",
    )
    .bind(room_id.as_str())
    .bind(limit)
    .fetch_all(store.reader())
    .await?;
    let row = |row: &sqlx::any::AnyRow| {
        Ok(FaultRow {
            event_id: row.try_get("event_id")?,
            kind: row.try_get("fault")?,
            problem: text::decode(row.try_get::<String, _>("problem")?),
            noticed_ts: row.try_get("noticed_ts")?,
        })
    };
    Ok((count, rows.iter().map(row).collect::<Result<_, StoreError>>()?))
}

/// The faults of all hubs that were noticed since a time.
pub async fn faults_since(store: &Store, since: i64) -> Result<Faults, StoreError> {
    let (count, rooms, last_ts): (i64, i64, Option<i64>) = sqlx::query_as(
        "SELECT COUNT(*), COUNT(DISTINCT room_id), MAX(noticed_ts) FROM lm_complaints WHERE fault <> '' AND noticed_ts >= $1",
    )
    .bind(since)
    .fetch_one(store.reader())
    .await?;
    let (lost,): (i64,) =
        sqlx::query_as("SELECT COUNT(*) FROM lm_looks WHERE lost_ts <> 0").fetch_one(store.reader()).await?;
    Ok(Faults { count, rooms, last_ts, lost })
}

#[cfg(test)]
mod tests {
    use ruma::{event_id, room_id};

    use super::super::queue_lpdu;
    use super::*;
    use crate::store::testing::both_stores;

    #[tokio::test]
    async fn how_long_something_does_not_come_back_is_counted_from_the_first_time_that_it_was_taken() {
        both_stores(|store| async move {
            let room = room_id!("!room:hub.example");
            let since = async || taken_since(&store, room).await.unwrap();
            let queue = store.write(move |tx| {
                Box::pin(async move { queue_lpdu(tx, room, 1, event_id!("$an_announcement"), b"{}").await })
            });
            queue.await.unwrap();
            assert_eq!(since().await, None);
            let take = async |position: i64, now: i64| {
                store
                    .write(move |tx| Box::pin(async move { take_lpdus(tx, room, &[position], now).await }))
                    .await
                    .unwrap();
            };
            take(1, 100).await;
            assert_eq!(since().await, Some(100));
            let again = store.write(move |tx| Box::pin(async move { requeue_lpdu(tx, room, 1, 2).await }));
            assert!(again.await.unwrap());
            assert_eq!(since().await, Some(100));
            take(2, 900).await;
            assert_eq!(since().await, Some(100));
            let echoed = store
                .write(move |tx| Box::pin(async move { lpdu_echoed(tx, room, event_id!("$an_announcement")).await }));
            echoed.await.unwrap();
            assert_eq!(since().await, None);
        })
        .await;
    }
}
