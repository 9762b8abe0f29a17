//! What of foreign hubs' logs is missing here: events that could not be fetched, and events that could not be checked.

use ruma::{EventId, OwnedEventId, OwnedRoomId, RoomId};
use sqlx::any::AnyRow;
use sqlx::{AssertSqlSafe, Row as _};

use super::read::parsed;
use crate::store::{Store, StoreError, Tx, text};

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hole {
    /// The missing event.
    pub event_id: OwnedEventId,
    /// The event as it came, when it is here and waits.
    pub json: Option<Vec<u8>>,
    /// The end of our log when it was noticed, if what comes after it goes on without it.
    pub place: Option<i64>,
    /// Whether it is state that the hub gave as it is.
    pub given: bool,
    /// How often it was tried again.
    pub tries: i64,
    /// When it is tried again, in milliseconds.
    pub retry_at: i64,
    /// When it was noticed, in milliseconds.
    pub noticed_ts: i64,
    /// What was in the way last.
    pub last_error: String,
    /// Set when it stands for others too, for which there was no space. The event is the newest of them.
    pub overflow: Option<Overflow>,
}

/// For what a hole stands that stands for many.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overflow {
    /// The server whose events they are; empty for those of all servers.
    pub of: String,
    /// The end of our log when the first of them came.
    pub since: i64,
}

impl Hole {
    /// This one and one that was noticed before and stands for events of the same server.
    pub fn with(mut self, before: Self) -> Self {
        if before.place > self.place {
            (self.event_id, self.place, self.last_error) = (before.event_id, before.place, before.last_error);
        }
        (self.tries, self.retry_at, self.noticed_ts) = (before.tries, before.retry_at, before.noticed_ts);
        if let (Some(overflow), Some(before)) = (&mut self.overflow, before.overflow) {
            overflow.since = overflow.since.min(before.since);
        }
        self
    }
}

/// What is missing, as operators are shown it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Missing {
    /// How many events.
    pub count: i64,
    /// Since when the first of them is known to be missing, in milliseconds.
    pub since: Option<i64>,
    /// What was in the way of that one last.
    pub last_error: Option<String>,
    /// How many rooms have gaps that are too long to be filled at once.
    pub gaps: i64,
    /// How many events of those gaps were fetched so far, from the newest on.
    pub fetched: i64,
    /// How many of these are in the log, from the oldest on.
    pub taken: i64,
}

/// How many holes of each kind a room has, or may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Events that are to be fetched.
    pub absent: i64,
    /// Events that wait to be judged.
    pub waiting: i64,
    /// State that waits for its keys.
    pub given: i64,
}

/// Remembers what is missing in a room, in this order; of one that is known already its place and its event are filled in.
/// Returns how many were too many.
pub async fn note_holes(
    store: &Store,
    tx: &mut Tx,
    room_id: &RoomId,
    holes: &[Hole],
    bounds: Counts,
) -> Result<usize, StoreError> {
    let row = sqlx::query(COUNT).bind(room_id.as_str()).fetch_one(&mut *tx).await?;
    let there = counts(&row)?;
    let mut left = [bounds.absent - there.absent, bounds.waiting - there.waiting, bounds.given - there.given];
    let mut too_many = 0_usize;
    for hole in holes {
        if let Some(overflow) = &hole.overflow {
            let before = overflow_of(tx, room_id, &overflow.of).await?;
            close_overflow(tx, room_id, &overflow.of).await?;
            let hole = hole.clone();
            let hole = match before {
                Some(before) => hole.with(before),
                None => hole,
            };
            note(tx, room_id, &hole, store.next_id()).await?;
            continue;
        }
        let [absent, waiting, given] = &mut left;
        let left = match (hole.given, &hole.json) {
            (true, _) => given,
            (false, Some(_)) => waiting,
            (false, None) => absent,
        };
        if *left <= 0 {
            too_many = too_many.saturating_add(1);
            continue;
        }
        *left -= 1;
        note(tx, room_id, hole, store.next_id()).await?;
    }
    Ok(too_many)
}

const COUNT: &str = "SELECT COUNT(*) AS together, COUNT(json) AS here, CAST(COALESCE(SUM(given), 0) AS BIGINT) AS given, \
     COUNT(newest) AS overflows FROM lm_holes WHERE room_id = $1";

fn counts(row: &AnyRow) -> Result<Counts, StoreError> {
    let (together, here, given): (i64, i64, i64) =
        (row.try_get("together")?, row.try_get("here")?, row.try_get("given")?);
    let elsewhere = here.saturating_add(row.try_get("overflows")?);
    Ok(Counts { absent: together.saturating_sub(elsewhere), waiting: here.saturating_sub(given), given })
}

/// How many holes of each kind a room has.
pub async fn count_holes(store: &Store, room_id: &RoomId) -> Result<Counts, StoreError> {
    counts(&sqlx::query(COUNT).bind(room_id.as_str()).fetch_one(store.reader()).await?)
}

async fn note(tx: &mut Tx, room_id: &RoomId, hole: &Hole, seq: i64) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO lm_holes (room_id, event_id, seq, place, json, given, noticed_ts, tries, retry_at, last_error, \
         newest, since) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) \
         ON CONFLICT (room_id, event_id) DO UPDATE SET place = COALESCE(excluded.place, lm_holes.place), \
         json = COALESCE(excluded.json, lm_holes.json)",
    )
    .bind(room_id.as_str())
    .bind(hole.overflow.as_ref().map_or_else(|| hole.event_id.to_string(), |overflow| key(&overflow.of)))
    .bind(seq)
    .bind(hole.place)
    .bind(hole.json.as_deref())
    .bind(i64::from(hole.given))
    .bind(hole.noticed_ts)
    .bind(hole.tries)
    .bind(hole.retry_at)
    .bind(text::encode(&hole.last_error).into_owned())
    .bind(hole.overflow.is_some().then(|| hole.event_id.as_str()))
    .bind(hole.overflow.as_ref().map(|overflow| overflow.since))
    .execute(tx)
    .await?;
    Ok(())
}

/// Under what a hole is kept that stands for events of this server.
fn key(server: &str) -> String {
    format!("~{server}")
}

async fn overflow_of(tx: &mut Tx, room_id: &RoomId, server: &str) -> Result<Option<Hole>, StoreError> {
    let row = sqlx::query(
        "SELECT event_id, newest, since, json, place, given, tries, retry_at, noticed_ts, last_error FROM lm_holes \
         WHERE room_id = $1 AND event_id = $2",
    )
    .bind(room_id.as_str())
    .bind(key(server))
    .fetch_optional(tx)
    .await?;
    row.as_ref().map(hole).transpose()
}

/// Forgets the hole that stands for events of a server.
pub async fn close_overflow(tx: &mut Tx, room_id: &RoomId, server: &str) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM lm_holes WHERE room_id = $1 AND event_id = $2")
        .bind(room_id.as_str())
        .bind(key(server))
        .execute(tx)
        .await?;
    Ok(())
}

/// Has the holes that stand for many tried now: there is space for some.
pub async fn hasten_overflows(tx: &mut Tx, room_id: &RoomId, now_ms: i64) -> Result<(), StoreError> {
    sqlx::query("UPDATE lm_holes SET tries = 0, retry_at = $1 WHERE room_id = $2 AND newest IS NOT NULL")
        .bind(now_ms)
        .bind(room_id.as_str())
        .execute(tx)
        .await?;
    Ok(())
}

/// Forgets holes that are filled.
pub async fn close_holes(tx: &mut Tx, room_id: &RoomId, event_ids: &[OwnedEventId]) -> Result<(), StoreError> {
    for event_id in event_ids {
        sqlx::query("DELETE FROM lm_holes WHERE room_id = $1 AND event_id = $2")
            .bind(room_id.as_str())
            .bind(EventId::as_str(event_id))
            .execute(&mut *tx)
            .await?;
    }
    Ok(())
}

/// Forgets all of a room.
pub async fn forget_holes(tx: &mut Tx, room_id: &RoomId) -> Result<(), StoreError> {
    for sql in [
        "DELETE FROM lm_holes WHERE room_id = $1",
        "DELETE FROM lm_staged WHERE room_id = $1",
        "DELETE FROM lm_gaps WHERE room_id = $1",
    ] {
        sqlx::query(sql).bind(room_id.as_str()).execute(&mut *tx).await?;
    }
    Ok(())
}

/// Forgets what was missing of a room up to now; what was fetched of a long gap stays when it `goes_on`.
pub async fn forget_holes_of_before(tx: &mut Tx, room_id: &RoomId, goes_on: bool) -> Result<(), StoreError> {
    if !goes_on {
        return forget_holes(tx, room_id).await;
    }
    for sql in ["DELETE FROM lm_holes WHERE room_id = $1", "UPDATE lm_gaps SET edges = '[]' WHERE room_id = $1"] {
        sqlx::query(sql).bind(room_id.as_str()).execute(&mut *tx).await?;
    }
    Ok(())
}

/// Puts off what was due at `now_ms` by what `delay` says for so many tries, and remembers what `problem` says of it.
pub async fn put_off_holes(
    tx: &mut Tx,
    room_id: &RoomId,
    now_ms: i64,
    delay: fn(i64) -> i64,
    problem: impl Fn(&EventId) -> Option<String>,
) -> Result<(), StoreError> {
    let due = sqlx::query("SELECT event_id, COALESCE(newest, event_id) AS event, tries FROM lm_holes WHERE room_id = $1 AND retry_at <= $2")
        .bind(room_id.as_str())
        .bind(now_ms)
        .fetch_all(&mut *tx)
        .await?;
    for row in due {
        let (key, event_id): (String, OwnedEventId) = (row.try_get("event_id")?, parsed(&row, "event")?);
        let tries: i64 = row.try_get::<i64, _>("tries")?.saturating_add(1);
        sqlx::query(
            "UPDATE lm_holes SET tries = $1, retry_at = $2, last_error = COALESCE($3, last_error) \
             WHERE room_id = $4 AND event_id = $5",
        )
        .bind(tries)
        .bind(now_ms.saturating_add(delay(tries)))
        .bind(problem(&event_id).map(|problem| text::encode(&problem).into_owned()))
        .bind(room_id.as_str())
        .bind(key)
        .execute(&mut *tx)
        .await?;
    }
    Ok(())
}

/// The holes of a room in the order in which they were noticed: state that was given, or all else.
pub async fn holes(store: &Store, room_id: &RoomId, given: bool) -> Result<Vec<Hole>, StoreError> {
    let rows = sqlx::query(
        "SELECT event_id, newest, since, json, place, given, tries, retry_at, noticed_ts, last_error FROM lm_holes \
         WHERE room_id = $1 AND given = $2 ORDER BY seq",
    )
    .bind(room_id.as_str())
    .bind(i64::from(given))
    .fetch_all(store.reader())
    .await?;
    rows.iter().map(hole).collect()
}

fn hole(row: &AnyRow) -> Result<Hole, StoreError> {
    let (key, since): (String, Option<i64>) = (row.try_get("event_id")?, row.try_get("since")?);
    let overflow = since.map(|since| Overflow { of: key.strip_prefix('~').unwrap_or_default().to_owned(), since });
    Ok(Hole {
        event_id: parsed(row, if overflow.is_some() { "newest" } else { "event_id" })?,
        json: row.try_get("json")?,
        place: row.try_get("place")?,
        given: row.try_get::<i64, _>("given")? != 0,
        tries: row.try_get("tries")?,
        retry_at: row.try_get("retry_at")?,
        noticed_ts: row.try_get("noticed_ts")?,
        last_error: text::decode(row.try_get("last_error")?),
        overflow,
    })
}

/// When the gap of a room is gone on with; where it has none, when the next of its holes is to be tried again, if it has any.
pub async fn next_try(store: &Store, room_id: &RoomId) -> Result<Option<i64>, StoreError> {
    let sql = "SELECT COALESCE((SELECT retry_at FROM lm_gaps WHERE room_id = $1), \
               (SELECT MIN(retry_at) FROM lm_holes WHERE room_id = $2)) AS next";
    let row = sqlx::query(sql).bind(room_id.as_str()).bind(room_id.as_str()).fetch_one(store.reader()).await?;
    Ok(row.try_get("next")?)
}

/// The rooms that have holes.
pub async fn rooms_with_holes(store: &Store) -> Result<Vec<OwnedRoomId>, StoreError> {
    let rows = sqlx::query("SELECT DISTINCT room_id FROM lm_holes").fetch_all(store.reader()).await?;
    rows.iter().map(|row| parsed(row, "room_id")).collect()
}

/// What is missing in a room, or in all.
pub async fn missing(store: &Store, room_id: Option<&RoomId>) -> Result<Missing, StoreError> {
    let (all, of) = (i64::from(room_id.is_none()), room_id.map_or("", RoomId::as_str));
    const ALL: &str = "(SELECT noticed_ts, last_error FROM lm_holes WHERE $1 = 1 OR room_id = $2 \
         UNION ALL SELECT noticed_ts, last_error FROM lm_gaps WHERE $3 = 1 OR room_id = $4) AS missing";
    let bound = |sql: String| sqlx::query(AssertSqlSafe(sql)).bind(all).bind(of).bind(all).bind(of);
    let row = bound(format!("SELECT COUNT(*) AS missing, MIN(noticed_ts) AS since FROM {ALL}"));
    let row = row.fetch_one(store.reader()).await?;
    let first = bound(format!("SELECT last_error FROM {ALL} ORDER BY noticed_ts LIMIT 1"));
    let first = first.fetch_optional(store.reader()).await?;
    let last_error = first.map(|row| row.try_get("last_error").map(|error: String| text::decode(error))).transpose()?;
    let gaps = sqlx::query(
        "SELECT COUNT(*) AS gaps, CAST(COALESCE(SUM(events), 0) AS BIGINT) AS fetched, \
         CAST(COALESCE(SUM(taken), 0) AS BIGINT) AS taken FROM lm_gaps WHERE $1 = 1 OR room_id = $2",
    )
    .bind(all)
    .bind(of)
    .fetch_one(store.reader())
    .await?;
    Ok(Missing {
        count: row.try_get("missing")?,
        since: row.try_get("since")?,
        last_error,
        gaps: gaps.try_get("gaps")?,
        fetched: gaps.try_get("fetched")?,
        taken: gaps.try_get("taken")?,
    })
}
