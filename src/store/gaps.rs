//! What is missing in graphs: events that wait for what is before them, and those that were taken with another server's word of
//! the state before them.

use ruma::{EventId, OwnedEventId, OwnedRoomId, OwnedServerName, RoomId, ServerName};
use sqlx::Row as _;
use sqlx::any::AnyRow;

use super::{Store, StoreError, Tx, text};

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// The event after the gap.
    pub event_id: OwnedEventId,
    /// The server that sent it.
    pub server: OwnedServerName,
    /// The event as it came, while it waits.
    pub json: Option<Vec<u8>>,
    /// How many of the events that it follows are not here.
    pub missing: i64,
    /// When it was noticed, in milliseconds.
    pub noticed_ts: i64,
    /// How often it was tried to fill it.
    pub tries: i64,
    /// When it is tried again, in milliseconds.
    pub retry_at: i64,
    /// What was in the way last.
    pub last_error: String,
}

/// How many gaps there may be.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Events of one server that wait in one room.
    pub of_server: i64,
    /// Events of one server that wait in all rooms.
    pub of_server_in_all: i64,
    /// Events that wait in one room.
    pub of_room: i64,
    /// Events of a room that were taken with another server's word.
    pub closed: i64,
}

/// What is missing, as operators are shown it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Missing {
    /// Behind how many events something is missing.
    pub count: i64,
    /// How many of these wait for it; the others were taken without.
    pub waiting: i64,
    /// Since when the first of them is known to be missing, in milliseconds.
    pub since: Option<i64>,
    /// The server that sent what stands after the first of them.
    pub server: Option<String>,
    /// What was in the way of that one last.
    pub last_error: Option<String>,
}

/// Keeps an event that waits, if there is room. Those of the same server that it follows need not be kept: they are fetched with what
/// is before it.
pub async fn keep(
    store: &Store,
    tx: &mut Tx,
    room_id: &RoomId,
    gap: &Gap,
    follows: &[OwnedEventId],
    bounds: Bounds,
) -> Result<bool, StoreError> {
    for id in follows {
        sqlx::query("DELETE FROM dag_gaps WHERE room_id = $1 AND event_id = $2 AND server = $3 AND json IS NOT NULL")
            .bind(room_id.as_str())
            .bind(id.as_str())
            .bind(gap.server.as_str())
            .execute(&mut *tx)
            .await?;
    }
    let counts = sqlx::query(
        "SELECT COUNT(*) AS in_all, \
         CAST(COALESCE(SUM(CASE WHEN room_id = $1 THEN 1 ELSE 0 END), 0) AS BIGINT) AS here, \
         (SELECT COUNT(*) FROM dag_gaps WHERE room_id = $2 AND json IS NOT NULL) AS together, \
         (SELECT COUNT(*) FROM dag_gaps WHERE room_id = $3 AND event_id = $4) AS itself \
         FROM dag_gaps WHERE server = $5 AND json IS NOT NULL",
    )
    .bind(room_id.as_str())
    .bind(room_id.as_str())
    .bind(room_id.as_str())
    .bind(gap.event_id.as_str())
    .bind(gap.server.as_str())
    .fetch_one(&mut *tx)
    .await?;
    let count = |name: &str| counts.try_get::<i64, _>(name);
    if count("itself")? > 0 {
        return Ok(true);
    }
    if count("in_all")? >= bounds.of_server_in_all
        || count("here")? >= bounds.of_server
        || count("together")? >= bounds.of_room
    {
        return Ok(false);
    }
    put(store, tx, room_id, gap).await?;
    Ok(true)
}

/// Remembers what was taken with another server's word; the oldest of too many are forgotten.
pub async fn note_closed(
    store: &Store,
    tx: &mut Tx,
    room_id: &RoomId,
    gap: &Gap,
    bounds: Bounds,
) -> Result<(), StoreError> {
    put(store, tx, room_id, gap).await?;
    sqlx::query(
        "DELETE FROM dag_gaps WHERE room_id = $1 AND json IS NULL AND seq NOT IN \
         (SELECT seq FROM dag_gaps WHERE room_id = $2 AND json IS NULL ORDER BY seq DESC LIMIT $3)",
    )
    .bind(room_id.as_str())
    .bind(room_id.as_str())
    .bind(bounds.closed)
    .execute(tx)
    .await?;
    Ok(())
}

async fn put(store: &Store, tx: &mut Tx, room_id: &RoomId, gap: &Gap) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO dag_gaps (room_id, event_id, seq, server, json, missing, noticed_ts, tries, retry_at, last_error) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) ON CONFLICT (room_id, event_id) DO UPDATE SET \
         json = excluded.json, missing = excluded.missing, tries = excluded.tries, retry_at = excluded.retry_at, \
         last_error = excluded.last_error",
    )
    .bind(room_id.as_str())
    .bind(gap.event_id.as_str())
    .bind(store.next_id())
    .bind(gap.server.as_str())
    .bind(gap.json.as_deref())
    .bind(gap.missing)
    .bind(gap.noticed_ts)
    .bind(gap.tries)
    .bind(gap.retry_at)
    .bind(text::encode(&gap.last_error).as_ref())
    .execute(tx)
    .await?;
    Ok(())
}

/// The rooms in which something is missing.
pub async fn rooms(store: &Store) -> Result<Vec<OwnedRoomId>, StoreError> {
    let rows: Vec<(String,)> =
        sqlx::query_as("SELECT DISTINCT room_id FROM dag_gaps").fetch_all(store.reader()).await?;
    rows.into_iter().map(|(id,)| RoomId::parse(id).map_err(|error| StoreError::corrupt("room ID", error))).collect()
}

/// When something of a room is to be tried next; none when nothing is missing.
pub async fn next_try(store: &Store, room_id: &RoomId) -> Result<Option<i64>, StoreError> {
    let (next,): (Option<i64>,) = sqlx::query_as("SELECT MIN(retry_at) FROM dag_gaps WHERE room_id = $1")
        .bind(room_id.as_str())
        .fetch_one(store.reader())
        .await?;
    Ok(next)
}

/// What of a room is to be tried by `now`, in the order in which it was noticed.
pub async fn due(store: &Store, room_id: &RoomId, now: i64) -> Result<Vec<Gap>, StoreError> {
    sqlx::query("SELECT * FROM dag_gaps WHERE room_id = $1 AND retry_at <= $2 ORDER BY seq")
        .bind(room_id.as_str())
        .bind(now)
        .fetch_all(store.reader())
        .await?
        .into_iter()
        .map(gap)
        .collect()
}

/// It is tried again later.
pub async fn put_off(
    tx: &mut Tx,
    room_id: &RoomId,
    event_id: &EventId,
    retry_at: i64,
    last_error: &str,
) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE dag_gaps SET tries = tries + 1, retry_at = $1, last_error = $2 WHERE room_id = $3 AND event_id = $4",
    )
    .bind(retry_at)
    .bind(text::encode(last_error).as_ref())
    .bind(room_id.as_str())
    .bind(event_id.as_str())
    .execute(tx)
    .await?;
    Ok(())
}

/// Nothing is missing there any more, or it is asked for no more. What was closed with a state meanwhile stays when `waiting`.
pub async fn remove(tx: &mut Tx, room_id: &RoomId, event_id: &EventId, waiting: bool) -> Result<(), StoreError> {
    let sql = match waiting {
        true => "DELETE FROM dag_gaps WHERE room_id = $1 AND event_id = $2 AND json IS NOT NULL",
        false => "DELETE FROM dag_gaps WHERE room_id = $1 AND event_id = $2",
    };
    sqlx::query(sql).bind(room_id.as_str()).bind(event_id.as_str()).execute(tx).await?;
    Ok(())
}

/// Nobody is in the room any more.
pub async fn forget(tx: &mut Tx, room_id: &RoomId) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM dag_gaps WHERE room_id = $1").bind(room_id.as_str()).execute(tx).await?;
    Ok(())
}

/// What is missing in a room, or in all.
pub async fn missing(store: &Store, room_id: Option<&RoomId>) -> Result<Missing, StoreError> {
    let (all, of) = (i64::from(room_id.is_none()), room_id.map_or("", RoomId::as_str));
    let row = sqlx::query(
        "SELECT COUNT(*) AS missing, COUNT(json) AS waiting, MIN(noticed_ts) AS since FROM dag_gaps \
         WHERE $1 = 1 OR room_id = $2",
    )
    .bind(all)
    .bind(of)
    .fetch_one(store.reader())
    .await?;
    let first = sqlx::query(
        "SELECT server, last_error FROM dag_gaps WHERE $1 = 1 OR room_id = $2 ORDER BY noticed_ts, seq LIMIT 1",
    )
    .bind(all)
    .bind(of)
    .fetch_optional(store.reader())
    .await?;
    Ok(Missing {
        count: row.try_get("missing")?,
        waiting: row.try_get("waiting")?,
        since: row.try_get("since")?,
        server: first.as_ref().map(|row| row.try_get("server")).transpose()?,
        last_error: first.map(|row| row.try_get("last_error").map(text::decode)).transpose()?,
    })
}

/// The gateway comes into a room with this join.
pub async fn begin(tx: &mut Tx, room_id: &RoomId, event_id: &EventId) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO dag_begins (room_id, event_id) VALUES ($1, $2) \
         ON CONFLICT (room_id) DO UPDATE SET event_id = excluded.event_id",
    )
    .bind(room_id.as_str())
    .bind(event_id.as_str())
    .execute(tx)
    .await?;
    Ok(())
}

/// With which join the gateway came into a room that was elsewhere.
pub async fn begun(store: &Store, room_id: &RoomId) -> Result<Option<OwnedEventId>, StoreError> {
    let row: Option<(String,)> = sqlx::query_as("SELECT event_id FROM dag_begins WHERE room_id = $1")
        .bind(room_id.as_str())
        .fetch_optional(store.reader())
        .await?;
    row.map(|(id,)| OwnedEventId::try_from(id).map_err(|error| StoreError::corrupt("event ID", error))).transpose()
}

fn gap(row: AnyRow) -> Result<Gap, StoreError> {
    let event_id: String = row.try_get("event_id")?;
    let server: String = row.try_get("server")?;
    Ok(Gap {
        event_id: event_id.try_into().map_err(|error| StoreError::corrupt("event ID", error))?,
        server: ServerName::parse(server).map_err(|error| StoreError::corrupt("server name", error))?,
        json: row.try_get("json")?,
        missing: row.try_get("missing")?,
        noticed_ts: row.try_get("noticed_ts")?,
        tries: row.try_get("tries")?,
        retry_at: row.try_get("retry_at")?,
        last_error: text::decode(row.try_get("last_error")?),
    })
}

#[cfg(test)]
mod tests {
    use ruma::{room_id, server_name};

    use super::*;
    use crate::store::testing::both_stores;

    fn waiting(server: &ServerName, letter: &str) -> Gap {
        Gap {
            event_id: id(letter),
            server: server.to_owned(),
            json: Some(b"{}".to_vec()),
            missing: 1,
            noticed_ts: 5,
            tries: 0,
            retry_at: 7,
            last_error: "away".to_owned(),
        }
    }

    fn id(letter: &str) -> OwnedEventId {
        format!("${}", letter.repeat(43)).try_into().unwrap()
    }

    #[tokio::test]
    async fn what_waits_is_bounded_and_followers_stand_for_what_they_follow() {
        both_stores(|store| async move {
            let bounds = Bounds { of_server: 2, of_server_in_all: 3, of_room: 3, closed: 1 };
            let (a, b) = (server_name!("a.example"), server_name!("b.example"));
            let (one, two) = (room_id!("!one:g"), room_id!("!two:g"));
            let keep = async |room: &'static RoomId, gap: Gap, follows: Vec<OwnedEventId>| {
                let writing = store.clone();
                let kept = store.write(move |tx| {
                    Box::pin(async move { super::keep(&writing, tx, room, &gap, &follows, bounds).await })
                });
                kept.await.unwrap()
            };
            assert!(keep(one, waiting(a, "a"), Vec::new()).await);
            assert!(keep(one, waiting(a, "a"), Vec::new()).await, "it is kept already");
            assert!(keep(one, waiting(a, "b"), Vec::new()).await);
            assert!(!keep(one, waiting(a, "c"), Vec::new()).await);
            assert!(keep(one, waiting(a, "c"), vec![id("a")]).await);
            assert!(keep(one, waiting(b, "d"), vec![id("b")]).await, "another server's");
            assert!(!keep(one, waiting(b, "e"), Vec::new()).await, "the room is full");
            assert!(keep(two, waiting(a, "f"), Vec::new()).await);
            assert!(!keep(two, waiting(a, "g"), Vec::new()).await, "the server has enough");

            let due: Vec<_> = due(&store, one, 7).await.unwrap().into_iter().map(|gap| gap.event_id).collect();
            assert_eq!(due, [id("b"), id("c"), id("d")]);
            assert!(super::due(&store, one, 6).await.unwrap().is_empty());
            let writing = store.clone();
            let close = store.write(move |tx| {
                Box::pin(async move {
                    put_off(tx, one, &id("b"), 99, "still away").await?;
                    for letter in ["c", "d"] {
                        let closed = Gap { json: None, ..waiting(a, letter) };
                        note_closed(&writing, tx, one, &closed, bounds).await?;
                        remove(tx, one, &id(letter), true).await?;
                    }
                    Ok(())
                })
            });
            close.await.unwrap();
            let missing = missing(&store, Some(one)).await.unwrap();
            assert_eq!((missing.count, missing.waiting, missing.since), (2, 1, Some(5)));
            assert_eq!(super::missing(&store, None).await.unwrap().count, 3);
            assert_eq!(next_try(&store, one).await.unwrap(), Some(7));
            store.write(move |tx| Box::pin(async move { forget(tx, one).await })).await.unwrap();
            assert_eq!(next_try(&store, one).await.unwrap(), None);
            assert_eq!(rooms(&store).await.unwrap(), [two]);
        })
        .await;
    }
}
