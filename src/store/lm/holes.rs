//! What of foreign hubs' logs is missing here: events that could not be fetched, and events that could not be checked.

use ruma::{EventId, OwnedEventId, OwnedRoomId, RoomId};
use sqlx::Row as _;
use sqlx::any::AnyRow;

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

const COUNT: &str = "SELECT COUNT(*) AS together, COUNT(json) AS here, CAST(COALESCE(SUM(given), 0) AS BIGINT) AS given \
     FROM lm_holes WHERE room_id = $1";

fn counts(row: &AnyRow) -> Result<Counts, StoreError> {
    let (together, here, given): (i64, i64, i64) =
        (row.try_get("together")?, row.try_get("here")?, row.try_get("given")?);
    Ok(Counts { absent: together.saturating_sub(here), waiting: here.saturating_sub(given), given })
}

/// How many holes of each kind a room has.
pub async fn count_holes(store: &Store, room_id: &RoomId) -> Result<Counts, StoreError> {
    counts(&sqlx::query(COUNT).bind(room_id.as_str()).fetch_one(store.reader()).await?)
}

async fn note(tx: &mut Tx, room_id: &RoomId, hole: &Hole, seq: i64) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO lm_holes (room_id, event_id, seq, place, json, given, noticed_ts, tries, retry_at, last_error) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) \
         ON CONFLICT (room_id, event_id) DO UPDATE SET place = COALESCE(excluded.place, lm_holes.place), \
         json = COALESCE(excluded.json, lm_holes.json)",
    )
    .bind(room_id.as_str())
    .bind(hole.event_id.as_str())
    .bind(seq)
    .bind(hole.place)
    .bind(hole.json.as_deref())
    .bind(i64::from(hole.given))
    .bind(hole.noticed_ts)
    .bind(hole.tries)
    .bind(hole.retry_at)
    .bind(text::encode(&hole.last_error).into_owned())
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
    sqlx::query("DELETE FROM lm_holes WHERE room_id = $1").bind(room_id.as_str()).execute(tx).await?;
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
    let due = sqlx::query("SELECT event_id, tries FROM lm_holes WHERE room_id = $1 AND retry_at <= $2")
        .bind(room_id.as_str())
        .bind(now_ms)
        .fetch_all(&mut *tx)
        .await?;
    for row in due {
        let event_id: OwnedEventId = parsed(&row, "event_id")?;
        let tries: i64 = row.try_get::<i64, _>("tries")?.saturating_add(1);
        sqlx::query(
            "UPDATE lm_holes SET tries = $1, retry_at = $2, last_error = COALESCE($3, last_error) \
             WHERE room_id = $4 AND event_id = $5",
        )
        .bind(tries)
        .bind(now_ms.saturating_add(delay(tries)))
        .bind(problem(&event_id).map(|problem| text::encode(&problem).into_owned()))
        .bind(room_id.as_str())
        .bind(event_id.as_str())
        .execute(&mut *tx)
        .await?;
    }
    Ok(())
}

/// The holes of a room in the order in which they were noticed: state that was given, or all else.
pub async fn holes(store: &Store, room_id: &RoomId, given: bool) -> Result<Vec<Hole>, StoreError> {
    let rows = sqlx::query(
        "SELECT event_id, json, place, given, tries, retry_at, noticed_ts, last_error FROM lm_holes \
         WHERE room_id = $1 AND given = $2 ORDER BY seq",
    )
    .bind(room_id.as_str())
    .bind(i64::from(given))
    .fetch_all(store.reader())
    .await?;
    rows.iter().map(hole).collect()
}

fn hole(row: &AnyRow) -> Result<Hole, StoreError> {
    Ok(Hole {
        event_id: parsed(row, "event_id")?,
        json: row.try_get("json")?,
        place: row.try_get("place")?,
        given: row.try_get::<i64, _>("given")? != 0,
        tries: row.try_get("tries")?,
        retry_at: row.try_get("retry_at")?,
        noticed_ts: row.try_get("noticed_ts")?,
        last_error: text::decode(row.try_get("last_error")?),
    })
}

/// When the next hole of a room is to be tried again, if it has any.
pub async fn next_try(store: &Store, room_id: &RoomId) -> Result<Option<i64>, StoreError> {
    let row = sqlx::query("SELECT MIN(retry_at) AS next FROM lm_holes WHERE room_id = $1")
        .bind(room_id.as_str())
        .fetch_one(store.reader())
        .await?;
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
    let row =
        sqlx::query("SELECT COUNT(*) AS missing, MIN(noticed_ts) AS since FROM lm_holes WHERE $1 = 1 OR room_id = $2")
            .bind(all)
            .bind(of)
            .fetch_one(store.reader())
            .await?;
    let first = sqlx::query("SELECT last_error FROM lm_holes WHERE $1 = 1 OR room_id = $2 ORDER BY noticed_ts LIMIT 1")
        .bind(all)
        .bind(of)
        .fetch_optional(store.reader())
        .await?;
    let last_error = first.map(|row| row.try_get("last_error").map(|error: String| text::decode(error))).transpose()?;
    Ok(Missing { count: row.try_get("missing")?, since: row.try_get("since")?, last_error })
}
