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

/// Whom an event concerns, and whose it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outsider {
    /// The server that is to be told.
    pub server: OwnedServerName,
    /// The server whose user said it.
    pub by: OwnedServerName,
}

/// How many may wait.
#[derive(Debug, Clone, Copy)]
pub struct TellLimits {
    /// For one server.
    pub to: i64,
    /// By users of one server.
    pub by: i64,
    /// In all.
    pub all: i64,
}

/// A server is to be told of an event, unless so many wait already.
pub async fn keep_tell(
    tx: &mut Tx,
    (seq, now): (i64, i64),
    outsider: &Outsider,
    (room_id, event_id): (&RoomId, &EventId),
    limits: TellLimits,
) -> Result<bool, StoreError> {
    let (to, by) = (outsider.server.as_str(), outsider.by.as_str());
    let done = sqlx::query(
        "INSERT INTO lm_tells (seq, server, by_server, room_id, event_id, made_ts) SELECT $1, $2, $3, $4, $5, $6 \
         WHERE (SELECT COUNT(*) FROM lm_tells WHERE server = $7) < $8 \
         AND (SELECT COUNT(*) FROM lm_tells WHERE by_server = $9) < $10 AND (SELECT COUNT(*) FROM lm_tells) < $11",
    )
    .bind(seq)
    .bind(to)
    .bind(by)
    .bind(room_id.as_str())
    .bind(event_id.as_str())
    .bind(now)
    .bind(to)
    .bind(limits.to)
    .bind(by)
    .bind(limits.by)
    .bind(limits.all)
    .execute(tx)
    .await?;
    Ok(done.rows_affected() > 0)
}

/// The first of each server of which something is due at a time; those of different servers' users in turn, and what was never
/// tried before what has failed.
pub async fn tells_due(store: &Store, now: i64, limit: i64) -> Result<Vec<Tell>, StoreError> {
    let rows = sqlx::query(
        "SELECT seq, server, room_id, event_id, made_ts, tries FROM \
         (SELECT *, ROW_NUMBER() OVER (PARTITION BY by_server ORDER BY tries, seq) AS turn FROM lm_tells \
          WHERE next_ts <= $1 AND seq IN (SELECT MIN(seq) FROM lm_tells GROUP BY server)) AS due \
         ORDER BY turn, seq LIMIT $2",
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

/// Those to a server are due: it is back.
pub async fn hasten_tells_to(tx: &mut Tx, server: &ServerName) -> Result<(), StoreError> {
    sqlx::query("UPDATE lm_tells SET next_ts = 0 WHERE server = $1").bind(server.as_str()).execute(tx).await?;
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
            let limits = TellLimits { to: 2, by: 10, all: 10 };
            let what = (room_id!("!r:h.example"), event_id!("$e"));
            let write = store.write(move |tx| {
                Box::pin(async move {
                    let mut kept = Vec::new();
                    for (seq, server) in [(1, one), (2, other), (3, one), (4, one)] {
                        let outsider = Outsider { server: server.to_owned(), by: other.to_owned() };
                        kept.push(keep_tell(tx, (seq, 7), &outsider, what, limits).await?);
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
            for (back, now) in [(other, 50), (one, 0)] {
                let write = store.write(move |tx| Box::pin(async move { hasten_tells_to(tx, back).await }));
                write.await.unwrap();
                assert_eq!(next_tell(&store).await.unwrap(), Some(now), "{back} is back");
            }
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

    #[tokio::test]
    async fn who_invites_many_leaves_room_and_turns_to_others() {
        both_stores(|store| async move {
            let limits = TellLimits { to: 2, by: 5, all: 7 };
            let what = (room_id!("!r:h.example"), event_id!("$e"));
            let write = store.write(move |tx| {
                Box::pin(async move {
                    let mut kept = Vec::new();
                    for seq in 1..=9 {
                        let by = if seq < 7 { "busy.example" } else { "quiet.example" };
                        let server = OwnedServerName::try_from(format!("s{seq}.example")).expect("a name");
                        let outsider = Outsider { server, by: by.try_into().expect("a name") };
                        kept.push(keep_tell(tx, (seq, 7), &outsider, what, limits).await?);
                    }
                    put_off_tell(tx, 1, 0).await?;
                    Ok(kept)
                })
            });
            assert_eq!(write.await.unwrap(), [true, true, true, true, true, false, true, true, false]);
            let due: Vec<i64> = tells_due(&store, 0, 4).await.unwrap().iter().map(|tell| tell.seq).collect();
            assert_eq!(due, [2, 7, 3, 8]);
        })
        .await;
    }
}
