//! The bridge's inbox: accepted events of bridged rooms, written in the transaction that accepts them and taken out in the
//! one that carries them over.

use std::collections::HashSet;
use std::sync::LazyLock;

use ruma::{EventId, OwnedEventId, OwnedRoomId, RoomId};
use sqlx::Row as _;

use super::rows::{Statement, chunks, placeholders, statement, statements};
use super::{Store, StoreError, Tx};
use crate::identity::Side;

/// An event that waits to be carried over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InboxRow {
    /// The order of acceptance.
    pub seq: i64,
    /// The event.
    pub event_id: OwnedEventId,
    /// When it was accepted, in milliseconds.
    pub received_ts: i64,
}

static PUSH: LazyLock<Vec<Statement>> = LazyLock::new(|| {
    statements(|rows| {
        let rows = placeholders(rows, 5, 0);
        format!("INSERT INTO bridge_inbox (seq, side, room_id, event_id, received_ts) VALUES {rows}")
    })
});

/// Adds events of one room, in the order of acceptance, inside the write job that accepts them.
pub async fn push(
    store: &Store,
    tx: &mut Tx,
    side: Side,
    room_id: &RoomId,
    events: &[OwnedEventId],
    now_ms: i64,
) -> Result<(), StoreError> {
    for chunk in chunks(events) {
        let mut query = sqlx::query(statement(&PUSH, tx, chunk.len())?);
        for event_id in chunk {
            query = query
                .bind(store.next_id())
                .bind(side.as_str())
                .bind(room_id.as_str())
                .bind(event_id.as_str())
                .bind(now_ms);
        }
        query.execute(&mut *tx).await?;
    }
    Ok(())
}

/// The oldest events of one room that wait after `after`, in order.
pub async fn waiting(
    store: &Store,
    side: Side,
    room_id: &RoomId,
    after: i64,
    limit: i64,
) -> Result<Vec<InboxRow>, StoreError> {
    let rows = sqlx::query(
        "SELECT seq, event_id, received_ts FROM bridge_inbox WHERE side = $1 AND room_id = $2 AND seq > $3 \
         ORDER BY seq LIMIT $4",
    )
    .bind(side.as_str())
    .bind(room_id.as_str())
    .bind(after)
    .bind(limit)
    .fetch_all(store.reader())
    .await?;
    rows.into_iter()
        .map(|row| {
            let event_id: String = row.try_get("event_id")?;
            Ok(InboxRow {
                seq: row.try_get("seq")?,
                event_id: event_id.try_into().map_err(|error| StoreError::corrupt("event ID", error))?,
                received_ts: row.try_get("received_ts")?,
            })
        })
        .collect()
}

static TAKE: LazyLock<Vec<Statement>> =
    LazyLock::new(|| statements(|rows| format!("DELETE FROM bridge_inbox WHERE seq IN {}", placeholders(1, rows, 0))));

/// Takes events out, inside the write job that carries them over; false when one was not there any more.
pub async fn take(tx: &mut Tx, seqs: &[i64]) -> Result<bool, StoreError> {
    let mut taken = 0;
    for chunk in chunks(seqs) {
        let query = sqlx::query(statement(&TAKE, tx, chunk.len())?);
        let query = chunk.iter().fold(query, |query, seq| query.bind(*seq));
        taken += query.execute(&mut *tx).await?.rows_affected();
    }
    Ok(usize::try_from(taken) == Ok(seqs.len()))
}

/// The rooms in which events wait.
pub async fn rooms(store: &Store) -> Result<Vec<(Side, OwnedRoomId)>, StoreError> {
    let rows: Vec<(String, String)> =
        sqlx::query_as("SELECT DISTINCT side, room_id FROM bridge_inbox").fetch_all(store.reader()).await?;
    rows.into_iter()
        .map(|(side, room_id)| {
            let side = if side == Side::Matrix.as_str() { Side::Matrix } else { Side::Lm };
            Ok((side, room_id.try_into().map_err(|error| StoreError::corrupt("room ID", error))?))
        })
        .collect()
}

/// How many events of one room wait, and since when the oldest does.
pub async fn backlog(store: &Store, side: Side, room_id: &RoomId) -> Result<(i64, Option<i64>), StoreError> {
    Ok(sqlx::query_as("SELECT COUNT(*), MIN(received_ts) FROM bridge_inbox WHERE side = $1 AND room_id = $2")
        .bind(side.as_str())
        .bind(room_id.as_str())
        .fetch_one(store.reader())
        .await?)
}

/// When an event that waits was accepted.
pub async fn waits(store: &Store, side: Side, event_id: &EventId) -> Result<Option<i64>, StoreError> {
    let row: Option<(i64,)> =
        sqlx::query_as("SELECT received_ts FROM bridge_inbox WHERE side = $1 AND event_id = $2 LIMIT 1")
            .bind(side.as_str())
            .bind(event_id.as_str())
            .fetch_optional(store.reader())
            .await?;
    Ok(row.map(|(received_ts,)| received_ts))
}

/// Those of these events that wait.
pub async fn those_that_wait(
    store: &Store,
    side: Side,
    events: &[OwnedEventId],
) -> Result<HashSet<OwnedEventId>, StoreError> {
    let mut waiting = HashSet::new();
    for chunk in chunks(events) {
        let list = placeholders(1, chunk.len(), 1);
        let sql = format!("SELECT event_id FROM bridge_inbox WHERE side = $1 AND event_id IN {list}");
        let mut query = sqlx::query_as(sqlx::AssertSqlSafe(sql)).bind(side.as_str());
        for event_id in chunk {
            query = query.bind(event_id.as_str());
        }
        let rows: Vec<(String,)> = query.fetch_all(store.reader()).await?;
        let known = chunk.iter().filter(|event| rows.iter().any(|(id,)| *id == event.as_str()));
        waiting.extend(known.cloned());
    }
    Ok(waiting)
}

/// Takes out all that waits in one room.
pub async fn clear(tx: &mut Tx, side: Side, room_id: &RoomId) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM bridge_inbox WHERE side = $1 AND room_id = $2")
        .bind(side.as_str())
        .bind(room_id.as_str())
        .execute(tx)
        .await?;
    Ok(())
}

/// Takes one event out, inside the write job that carries it over or records why not.
pub async fn remove(tx: &mut Tx, seq: i64) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM bridge_inbox WHERE seq = $1").bind(seq).execute(tx).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use ruma::{OwnedEventId, RoomId, event_id, room_id};

    use super::super::testing::both_stores;
    use super::super::{Store, StoreError};
    use super::{push, remove, waiting};
    use crate::identity::Side;

    async fn accept(store: &Store, side: Side, room: &RoomId, events: &[OwnedEventId]) -> Result<(), StoreError> {
        let (own, room, events) = (store.clone(), room.to_owned(), events.to_vec());
        store.write(move |tx| Box::pin(async move { push(&own, tx, side, &room, &events, 7).await })).await
    }

    async fn ids(store: &Store, side: Side, room: &RoomId) -> Vec<OwnedEventId> {
        waiting(store, side, room, 0, 100).await.unwrap().into_iter().map(|row| row.event_id).collect()
    }

    #[tokio::test]
    async fn events_wait_in_the_order_of_acceptance_by_side_and_room() {
        both_stores(|store| async move {
            let (room, other) = (room_id!("!a:lm.example"), room_id!("!b:lm.example"));
            let [x, y, z] = [event_id!("$x"), event_id!("$y"), event_id!("$z")].map(ToOwned::to_owned);
            accept(&store, Side::Lm, room, &[z.clone(), y.clone()]).await.unwrap();
            accept(&store, Side::Lm, other, std::slice::from_ref(&y)).await.unwrap();
            accept(&store, Side::Matrix, room, std::slice::from_ref(&x)).await.unwrap();
            accept(&store, Side::Lm, room, std::slice::from_ref(&x)).await.unwrap();
            assert_eq!(ids(&store, Side::Lm, room).await, [z, y.clone(), x.clone()]);
            assert_eq!(ids(&store, Side::Lm, other).await, [y]);
            assert_eq!(ids(&store, Side::Matrix, room).await, [x]);
        })
        .await;
    }

    #[tokio::test]
    async fn a_removed_event_is_gone_and_reading_goes_on_after_a_row() {
        both_stores(|store| async move {
            let room = room_id!("!a:lm.example");
            let events: Vec<OwnedEventId> = (0..5).map(|n| OwnedEventId::try_from(format!("$e{n}")).unwrap()).collect();
            accept(&store, Side::Lm, room, &events).await.unwrap();
            let rows = waiting(&store, Side::Lm, room, 0, 2).await.unwrap();
            assert_eq!(rows.len(), 2);
            assert_eq!(rows[0].received_ts, 7);
            let after = waiting(&store, Side::Lm, room, rows[1].seq, 100).await.unwrap();
            assert_eq!(after.iter().map(|row| &row.event_id).collect::<Vec<_>>(), [&events[2], &events[3], &events[4]]);

            let seq = rows[0].seq;
            store.write(move |tx| Box::pin(remove(tx, seq))).await.unwrap();
            assert_eq!(ids(&store, Side::Lm, room).await, events[1..]);
        })
        .await;
    }
}
