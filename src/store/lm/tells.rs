//! Of what servers outside a room are to be told.

use ruma::{EventId, OwnedEventId, OwnedRoomId, OwnedServerName, RoomId, ServerName};
use sqlx::Row as _;

use super::super::{Store, StoreError, Tx};
use super::read::parsed;

/// An event of which a server is to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tell {
    /// Its number; grows.
    pub seq: i64,
    /// The server.
    pub server: OwnedServerName,
    /// The room.
    pub room_id: OwnedRoomId,
    /// The event.
    pub event_id: OwnedEventId,
    /// Since when.
    pub made_ts: i64,
    /// How often that failed.
    pub tries: i64,
}

/// A server is to be told of an event, unless `limit` others wait for the same server, or a hundred times as many for all.
pub async fn keep_tell(
    tx: &mut Tx,
    (seq, now): (i64, i64),
    server: &ServerName,
    (room_id, event_id): (&RoomId, &EventId),
    limit: i64,
) -> Result<bool, StoreError> {
    let done = sqlx::query(
        "INSERT INTO lm_tells (seq, server, room_id, event_id, made_ts) SELECT $1, $2, $3, $4, $5 \
         WHERE (SELECT COUNT(*) FROM lm_tells WHERE server = $6) < $7 AND (SELECT COUNT(*) FROM lm_tells) < $8",
    )
    .bind(seq)
    .bind(server.as_str())
    .bind(room_id.as_str())
    .bind(event_id.as_str())
    .bind(now)
    .bind(server.as_str())
    .bind(limit)
    .bind(limit.saturating_mul(100))
    .execute(tx)
    .await?;
    Ok(done.rows_affected() > 0)
}

/// The first of each server of which something is due at a time.
pub async fn tells_due(store: &Store, now: i64, limit: i64) -> Result<Vec<Tell>, StoreError> {
    let rows = sqlx::query(
        "SELECT seq, server, room_id, event_id, made_ts, tries FROM lm_tells WHERE next_ts <= $1 \
         AND seq IN (SELECT MIN(seq) FROM lm_tells GROUP BY server) ORDER BY seq LIMIT $2",
    )
    .bind(now)
    .bind(limit)
    .fetch_all(store.reader())
    .await?;
    let row = |row: &sqlx::any::AnyRow| {
        Ok(Tell {
            seq: row.try_get("seq")?,
            server: parsed(row, "server")?,
            room_id: parsed(row, "room_id")?,
            event_id: parsed(row, "event_id")?,
            made_ts: row.try_get("made_ts")?,
            tries: row.try_get("tries")?,
        })
    };
    rows.iter().map(row).collect()
}

/// When the next is due.
pub async fn next_tell(store: &Store) -> Result<Option<i64>, StoreError> {
    let (next,): (Option<i64>,) = sqlx::query_as(
        "SELECT MIN(next_ts) FROM lm_tells WHERE seq IN (SELECT MIN(seq) FROM lm_tells GROUP BY server)",
    )
    .fetch_one(store.reader())
    .await?;
    Ok(next)
}

/// It was told, or need not be.
pub async fn forget_tell(tx: &mut Tx, seq: i64) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM lm_tells WHERE seq = $1").bind(seq).execute(tx).await?;
    Ok(())
}

/// It failed, and is tried again at a time.
pub async fn put_off_tell(tx: &mut Tx, seq: i64, next_ts: i64) -> Result<(), StoreError> {
    sqlx::query("UPDATE lm_tells SET tries = tries + 1, next_ts = $1 WHERE seq = $2")
        .bind(next_ts)
        .bind(seq)
        .execute(tx)
        .await?;
    Ok(())
}

/// All are due: nothing is known of who is away now.
pub async fn hasten_tells(tx: &mut Tx) -> Result<(), StoreError> {
    sqlx::query("UPDATE lm_tells SET next_ts = 0").execute(tx).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use ruma::{event_id, room_id, server_name};

    use super::*;
    use crate::store::testing::both_stores;

    #[tokio::test]
    async fn each_server_is_told_in_order_and_only_so_much_waits() {
        both_stores(|store| async move {
            let (one, other) = (server_name!("one.example"), server_name!("other.example"));
            let what = (room_id!("!r:h.example"), event_id!("$e"));
            let write = store.write(move |tx| {
                Box::pin(async move {
                    let mut kept = Vec::new();
                    for (seq, server) in [(1, one), (2, other), (3, one), (4, one)] {
                        kept.push(keep_tell(tx, (seq, 7), server, what, 2).await?);
                    }
                    Ok(kept)
                })
            });
            assert_eq!(write.await.unwrap(), [true, true, true, false]);
            let due = async |now: i64| -> Vec<i64> {
                tells_due(&store, now, 10).await.unwrap().iter().map(|tell| tell.seq).collect()
            };
            assert_eq!(due(0).await, [1, 2]);
            let write = store.write(move |tx| {
                Box::pin(async move {
                    put_off_tell(tx, 1, 50).await?;
                    forget_tell(tx, 2).await
                })
            });
            write.await.unwrap();
            assert_eq!(due(49).await, [0i64; 0], "what comes after it waits for it");
            assert_eq!(due(50).await, [1]);
            assert_eq!(tells_due(&store, 50, 1).await.unwrap()[0].tries, 1);
            assert_eq!(next_tell(&store).await.unwrap(), Some(50));
            let write = store.write(move |tx| {
                Box::pin(async move {
                    hasten_tells(tx).await?;
                    forget_tell(tx, 1).await
                })
            });
            write.await.unwrap();
            assert_eq!(due(0).await, [3]);
        })
        .await;
    }
}
