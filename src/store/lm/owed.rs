//! Which users of the gateway are to leave a foreign hub's room again.

use ruma::{OwnedRoomId, OwnedServerName, OwnedUserId, RoomId, UserId};
use sqlx::Row as _;

use super::super::{Store, StoreError, Tx};
use super::read::parsed;

/// A room that a user is to leave again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwedLeave {
    /// The server that was sent the user's join.
    pub server: OwnedServerName,
    /// The room.
    pub room_id: OwnedRoomId,
    /// The user.
    pub user_id: OwnedUserId,
    /// Since when, in milliseconds.
    pub made_ts: i64,
    /// How often that failed.
    pub tries: i64,
}

/// How much is owed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Owed {
    /// How many leaves.
    pub count: i64,
    /// Since when the first of them is, in milliseconds.
    pub since: Option<i64>,
}

/// A user is to leave a room at a time, unless `limit` leaves are owed already; where that is known, at that time and not before.
pub async fn owe_leave(tx: &mut Tx, leave: &OwedLeave, next_ts: i64, limit: i64) -> Result<bool, StoreError> {
    let done = sqlx::query(
        "INSERT INTO lm_owed_leaves (server, room_id, user_id, made_ts, next_ts) SELECT $1, $2, $3, $4, $5 \
         WHERE (SELECT COUNT(*) FROM lm_owed_leaves) < $6 \
         ON CONFLICT (server, room_id, user_id) DO UPDATE SET next_ts = excluded.next_ts",
    )
    .bind(leave.server.as_str())
    .bind(leave.room_id.as_str())
    .bind(leave.user_id.as_str())
    .bind(leave.made_ts)
    .bind(next_ts)
    .bind(limit)
    .execute(tx)
    .await?;
    Ok(done.rows_affected() > 0)
}

/// What is due at a time: of each server what has been so for longest.
pub async fn owed_leaves_due(store: &Store, now: i64, limit: i64) -> Result<Vec<OwedLeave>, StoreError> {
    let rows = sqlx::query(
        "SELECT server, room_id, user_id, made_ts, tries FROM \
         (SELECT *, ROW_NUMBER() OVER (PARTITION BY server ORDER BY next_ts) AS turn FROM lm_owed_leaves \
          WHERE next_ts <= $1) AS due \
         WHERE turn = 1 ORDER BY next_ts LIMIT $2",
    )
    .bind(now)
    .bind(limit)
    .fetch_all(store.reader())
    .await?;
    let row = |row: &sqlx::any::AnyRow| {
        Ok(OwedLeave {
            server: parsed(row, "server")?,
            room_id: parsed(row, "room_id")?,
            user_id: parsed(row, "user_id")?,
            made_ts: row.try_get("made_ts")?,
            tries: row.try_get("tries")?,
        })
    };
    rows.iter().map(row).collect()
}

/// When the next is due.
pub async fn next_owed_leave(store: &Store) -> Result<Option<i64>, StoreError> {
    let (next,): (Option<i64>,) =
        sqlx::query_as("SELECT MIN(next_ts) FROM lm_owed_leaves").fetch_one(store.reader()).await?;
    Ok(next)
}

/// When this one is due; none when it is not owed any more.
pub async fn owed_leave(store: &Store, leave: &OwedLeave) -> Result<Option<i64>, StoreError> {
    let row: Option<(i64,)> =
        sqlx::query_as("SELECT next_ts FROM lm_owed_leaves WHERE server = $1 AND room_id = $2 AND user_id = $3")
            .bind(leave.server.as_str())
            .bind(leave.room_id.as_str())
            .bind(leave.user_id.as_str())
            .fetch_optional(store.reader())
            .await?;
    Ok(row.map(|(next_ts,)| next_ts))
}

/// How much is owed.
pub async fn owed_leaves(store: &Store) -> Result<Owed, StoreError> {
    let (count, since): (i64, Option<i64>) =
        sqlx::query_as("SELECT COUNT(*), MIN(made_ts) FROM lm_owed_leaves").fetch_one(store.reader()).await?;
    Ok(Owed { count, since })
}

/// It is tried again at a time; `tries` times it has failed by then.
pub async fn put_off_leave(tx: &mut Tx, leave: &OwedLeave, tries: i64, next_ts: i64) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE lm_owed_leaves SET tries = $1, next_ts = $2 WHERE server = $3 AND room_id = $4 AND user_id = $5",
    )
    .bind(tries)
    .bind(next_ts)
    .bind(leave.server.as_str())
    .bind(leave.room_id.as_str())
    .bind(leave.user_id.as_str())
    .execute(tx)
    .await?;
    Ok(())
}

/// A user need not leave a room again, through whichever server.
pub async fn forget_owed_leaves(tx: &mut Tx, room_id: &RoomId, user_id: &UserId) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM lm_owed_leaves WHERE room_id = $1 AND user_id = $2")
        .bind(room_id.as_str())
        .bind(user_id.as_str())
        .execute(tx)
        .await?;
    Ok(())
}

/// This one was left, or need not be.
pub async fn forget_owed_leave(tx: &mut Tx, leave: &OwedLeave) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM lm_owed_leaves WHERE server = $1 AND room_id = $2 AND user_id = $3")
        .bind(leave.server.as_str())
        .bind(leave.room_id.as_str())
        .bind(leave.user_id.as_str())
        .execute(tx)
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use ruma::{room_id, user_id};

    use super::*;
    use crate::store::testing::both_stores;

    fn leave(server: &str, room: &RoomId, made_ts: i64) -> OwedLeave {
        let user_id = user_id!("@a:g.example").to_owned();
        let server = server.try_into().expect("a name");
        OwedLeave { server, room_id: room.to_owned(), user_id, made_ts, tries: 0 }
    }

    #[tokio::test]
    async fn an_owed_leave_waits_until_it_is_due_and_a_new_join_puts_it_off() {
        both_stores(|store| async move {
            let (room, other) = (room_id!("!r:h.example"), room_id!("!s:h.example"));
            let (first, second) = (leave("h.example", room, 1), leave("h.example", other, 2));
            let elsewhere = leave("i.example", room, 3);
            let leaves = (first.clone(), second.clone(), elsewhere.clone());
            let write = store.write(move |tx| {
                Box::pin(async move {
                    let (first, second, elsewhere) = leaves;
                    let mut kept = Vec::new();
                    for (leave, next) in [(&first, 10), (&second, 5), (&elsewhere, 7), (&first, 20)] {
                        kept.push(owe_leave(tx, leave, next, 4).await?);
                    }
                    kept.push(
                        owe_leave(tx, &OwedLeave { room_id: room_id!("!t:h.example").to_owned(), ..first }, 1, 3)
                            .await?,
                    );
                    Ok(kept)
                })
            });
            assert_eq!(write.await.unwrap(), [true, true, true, true, false]);
            let due = async |now: i64| owed_leaves_due(&store, now, 10).await.unwrap();
            assert!(due(4).await.is_empty());
            assert_eq!(due(19).await, [second.clone(), elsewhere.clone()]);
            assert_eq!(due(20).await, [second.clone(), elsewhere.clone()], "one of each server");
            assert_eq!(next_owed_leave(&store).await.unwrap(), Some(5));
            assert_eq!(owed_leave(&store, &first).await.unwrap(), Some(20));
            assert_eq!(owed_leaves(&store).await.unwrap(), Owed { count: 3, since: Some(1) });
            let (failed, left) = (second.clone(), room.to_owned());
            let write = store.write(move |tx| {
                Box::pin(async move {
                    put_off_leave(tx, &failed, 1, 30).await?;
                    forget_owed_leaves(tx, &left, user_id!("@a:g.example")).await
                })
            });
            write.await.unwrap();
            assert_eq!(due(30).await, [OwedLeave { tries: 1, ..second.clone() }]);
            let write = store.write(move |tx| Box::pin(async move { forget_owed_leave(tx, &second).await }));
            write.await.unwrap();
            assert_eq!(next_owed_leave(&store).await.unwrap(), None);
        })
        .await;
    }
}
