//! Which users of the gateway are to leave rooms of other servers again, and which may come to be: those whose joins are under way.

use ruma::{OwnedRoomId, OwnedServerName, OwnedUserId, RoomId, UserId};
use sqlx::Row as _;

use super::lm::parsed;
use super::{Store, StoreError, Tx};
use crate::event::RoomVersion;
use crate::identity::Side;

/// A room that a user is to leave again, or may have to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwedLeave {
    /// By whose handshakes.
    pub side: Side,
    /// The server that is sent the user's join.
    pub server: OwnedServerName,
    /// The room.
    pub room_id: OwnedRoomId,
    /// The user.
    pub user_id: OwnedUserId,
    /// The version of the room by which the join was made, where the leave is made by it too.
    pub version: Option<RoomVersion>,
    /// When the join was sent, in milliseconds.
    pub made_ts: i64,
    /// How often the leave failed.
    pub tries: i64,
}

/// How much is owed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Owed {
    /// How many leaves.
    pub count: i64,
    /// Since when the first of them is, in milliseconds.
    pub since: Option<i64>,
    /// How many were given up.
    pub given_up: i64,
}

/// A join is about to be sent. What is owed of an earlier one stays so, and waits.
pub async fn begin_join(tx: &mut Tx, leave: &OwedLeave) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO owed_leaves (server, room_id, user_id, side, version, made_ts, joining) \
         VALUES ($1, $2, $3, $4, $5, $6, 1) \
         ON CONFLICT (server, room_id, user_id) DO UPDATE \
         SET joining = 1, side = excluded.side, version = excluded.version",
    )
    .bind(leave.server.as_str())
    .bind(leave.room_id.as_str())
    .bind(leave.user_id.as_str())
    .bind(leave.side.as_str())
    .bind(leave.version.map(RoomVersion::as_str))
    .bind(leave.made_ts)
    .execute(tx)
    .await?;
    Ok(())
}

/// The server has not taken the join: nothing is owed but for an earlier one.
pub async fn join_refused(tx: &mut Tx, leave: &OwedLeave) -> Result<(), StoreError> {
    for sql in [
        "DELETE FROM owed_leaves WHERE server = $1 AND room_id = $2 AND user_id = $3 \
         AND next_ts IS NULL AND given_up_ts IS NULL",
        "UPDATE owed_leaves SET joining = 0 WHERE server = $1 AND room_id = $2 AND user_id = $3",
    ] {
        run(tx, sql, leave).await?;
    }
    Ok(())
}

/// The server may have taken the join, and it came to nothing here: the user is to leave at a time, unless so many others are to already.
pub async fn owe_leave(tx: &mut Tx, leave: &OwedLeave, next_ts: i64, limit: i64) -> Result<bool, StoreError> {
    run(tx, "DELETE FROM owed_leaves WHERE server = $1 AND room_id = $2 AND user_id = $3", leave).await?;
    let done = sqlx::query(
        "INSERT INTO owed_leaves (server, room_id, user_id, side, version, made_ts, next_ts) \
         SELECT $1, $2, $3, $4, $5, $6, $7 WHERE (SELECT COUNT(next_ts) FROM owed_leaves) < $8",
    )
    .bind(leave.server.as_str())
    .bind(leave.room_id.as_str())
    .bind(leave.user_id.as_str())
    .bind(leave.side.as_str())
    .bind(leave.version.map(RoomVersion::as_str))
    .bind(leave.made_ts)
    .bind(next_ts)
    .bind(limit)
    .execute(tx)
    .await?;
    Ok(done.rows_affected() > 0)
}

/// Nobody knows what became of the joins of a side that were under way when the gateway was stopped: the users are to leave at a time.
/// Returns how many.
pub async fn owe_broken_off(tx: &mut Tx, side: Side, (now, next_ts): (i64, i64)) -> Result<u64, StoreError> {
    let sql = "UPDATE owed_leaves SET joining = 0, made_ts = $1, tries = 0, next_ts = $2, given_up_ts = NULL \
               WHERE side = $3 AND joining = 1";
    let done = sqlx::query(sql).bind(now).bind(next_ts).bind(side.as_str()).execute(tx).await?;
    Ok(done.rows_affected())
}

/// What of a side is due at a time: of each server what has been so for longest.
pub async fn owed_leaves_due(store: &Store, side: Side, now: i64, limit: i64) -> Result<Vec<OwedLeave>, StoreError> {
    let rows = sqlx::query(
        "SELECT server, room_id, user_id, version, made_ts, tries FROM \
         (SELECT *, ROW_NUMBER() OVER (PARTITION BY server ORDER BY next_ts) AS turn FROM owed_leaves \
          WHERE side = $1 AND joining = 0 AND next_ts <= $2) AS due \
         WHERE turn = 1 ORDER BY next_ts LIMIT $3",
    )
    .bind(side.as_str())
    .bind(now)
    .bind(limit)
    .fetch_all(store.reader())
    .await?;
    let row = |row: &sqlx::any::AnyRow| {
        let version: Option<String> = row.try_get("version")?;
        Ok(OwedLeave {
            side,
            server: parsed(row, "server")?,
            room_id: parsed(row, "room_id")?,
            user_id: parsed(row, "user_id")?,
            version: version.as_deref().and_then(RoomVersion::parse),
            made_ts: row.try_get("made_ts")?,
            tries: row.try_get("tries")?,
        })
    };
    rows.iter().map(row).collect()
}

/// When the next of a side is due.
pub async fn next_owed_leave(store: &Store, side: Side) -> Result<Option<i64>, StoreError> {
    let (next,): (Option<i64>,) =
        sqlx::query_as("SELECT MIN(next_ts) FROM owed_leaves WHERE side = $1 AND joining = 0")
            .bind(side.as_str())
            .fetch_one(store.reader())
            .await?;
    Ok(next)
}

/// When this one is due; none when it is not owed, or waits for a join.
pub async fn owed_leave(store: &Store, leave: &OwedLeave) -> Result<Option<i64>, StoreError> {
    let row: Option<(Option<i64>,)> = sqlx::query_as(
        "SELECT next_ts FROM owed_leaves WHERE server = $1 AND room_id = $2 AND user_id = $3 AND joining = 0",
    )
    .bind(leave.server.as_str())
    .bind(leave.room_id.as_str())
    .bind(leave.user_id.as_str())
    .fetch_optional(store.reader())
    .await?;
    Ok(row.and_then(|(next_ts,)| next_ts))
}

/// How much is owed.
pub async fn owed_leaves(store: &Store) -> Result<Owed, StoreError> {
    let (count, since, given_up): (i64, Option<i64>, i64) = sqlx::query_as(
        "SELECT COUNT(next_ts), MIN(CASE WHEN next_ts IS NULL THEN NULL ELSE made_ts END), COUNT(given_up_ts) \
         FROM owed_leaves",
    )
    .fetch_one(store.reader())
    .await?;
    Ok(Owed { count, since, given_up })
}

/// What is due at `now` is tried again at a time; `tries` times it has failed by then.
pub async fn put_off_leave(
    tx: &mut Tx,
    leave: &OwedLeave,
    tries: i64,
    (now, next_ts): (i64, i64),
) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE owed_leaves SET tries = $1, next_ts = $2 \
         WHERE server = $3 AND room_id = $4 AND user_id = $5 AND next_ts <= $6",
    )
    .bind(tries)
    .bind(next_ts)
    .bind(leave.server.as_str())
    .bind(leave.room_id.as_str())
    .bind(leave.user_id.as_str())
    .bind(now)
    .execute(tx)
    .await?;
    Ok(())
}

/// It is not tried any more, which is kept for a while.
pub async fn give_up_leave(tx: &mut Tx, leave: &OwedLeave, now: i64) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE owed_leaves SET next_ts = NULL, given_up_ts = $1 WHERE server = $2 AND room_id = $3 AND user_id = $4",
    )
    .bind(now)
    .bind(leave.server.as_str())
    .bind(leave.room_id.as_str())
    .bind(leave.user_id.as_str())
    .execute(tx)
    .await?;
    Ok(())
}

/// A user need not leave a room again, through whichever server.
pub async fn forget_owed_leaves(tx: &mut Tx, room_id: &RoomId, user_id: &UserId) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM owed_leaves WHERE room_id = $1 AND user_id = $2")
        .bind(room_id.as_str())
        .bind(user_id.as_str())
        .execute(tx)
        .await?;
    Ok(())
}

/// This one was left, or need not be.
pub async fn forget_owed_leave(tx: &mut Tx, leave: &OwedLeave) -> Result<(), StoreError> {
    run(tx, "DELETE FROM owed_leaves WHERE server = $1 AND room_id = $2 AND user_id = $3", leave).await
}

async fn run(tx: &mut Tx, sql: &'static str, leave: &OwedLeave) -> Result<(), StoreError> {
    sqlx::query(sql)
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
        OwedLeave { side: Side::Lm, server, room_id: room.to_owned(), user_id, version: None, made_ts, tries: 0 }
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
                        kept.push(owe_leave(tx, leave, next, 3).await?);
                    }
                    let one_more = OwedLeave { room_id: room_id!("!t:h.example").to_owned(), ..first };
                    kept.push(owe_leave(tx, &one_more, 1, 3).await?);
                    Ok(kept)
                })
            });
            assert_eq!(write.await.unwrap(), [true, true, true, true, false]);
            let due = async |now: i64| owed_leaves_due(&store, Side::Lm, now, 10).await.unwrap();
            assert!(due(4).await.is_empty());
            assert_eq!(due(19).await, [second.clone(), elsewhere.clone()]);
            assert_eq!(due(20).await, [second.clone(), elsewhere.clone()], "one of each server");
            assert!(owed_leaves_due(&store, Side::Matrix, 20, 10).await.unwrap().is_empty(), "of the other side");
            assert_eq!(next_owed_leave(&store, Side::Lm).await.unwrap(), Some(5));
            assert_eq!(owed_leave(&store, &first).await.unwrap(), Some(20));
            assert_eq!(owed_leaves(&store).await.unwrap(), Owed { count: 3, since: Some(1), given_up: 0 });
            let (failed, left) = (second.clone(), room.to_owned());
            let write = store.write(move |tx| {
                Box::pin(async move {
                    put_off_leave(tx, &failed, 1, (20, 30)).await?;
                    put_off_leave(tx, &failed, 7, (20, 90)).await?;
                    forget_owed_leaves(tx, &left, user_id!("@a:g.example")).await
                })
            });
            write.await.unwrap();
            assert_eq!(due(30).await, [OwedLeave { tries: 1, ..second.clone() }]);
            let given_up = second.clone();
            let write = store.write(move |tx| Box::pin(async move { give_up_leave(tx, &given_up, 40).await }));
            write.await.unwrap();
            assert_eq!((next_owed_leave(&store, Side::Lm).await.unwrap(), due(100).await), (None, Vec::new()));
            assert_eq!(owed_leaves(&store).await.unwrap(), Owed { count: 0, since: None, given_up: 1 });
            let write = store.write(move |tx| Box::pin(async move { forget_owed_leave(tx, &second).await }));
            write.await.unwrap();
            assert_eq!(owed_leaves(&store).await.unwrap(), Owed::default());
        })
        .await;
    }

    #[tokio::test]
    async fn a_join_that_is_under_way_owes_nothing_until_it_is_broken_off() {
        both_stores(|store| async move {
            let room = room_id!("!r:h.example");
            let (new, again) = (leave("h.example", room, 1), leave("i.example", room, 2));
            let graph =
                OwedLeave { side: Side::Matrix, version: Some(RoomVersion::V11), ..leave("j.example", room, 3) };
            let leaves = [new.clone(), again.clone(), graph.clone()];
            let write = store.write(move |tx| {
                Box::pin(async move {
                    owe_leave(tx, &leaves[1], 5, 10).await?;
                    for leave in &leaves {
                        begin_join(tx, leave).await?;
                    }
                    Ok(())
                })
            });
            write.await.unwrap();
            let due = async |side| owed_leaves_due(&store, side, 100, 10).await.unwrap();
            assert_eq!((due(Side::Lm).await, due(Side::Matrix).await), (Vec::new(), Vec::new()));
            assert_eq!(next_owed_leave(&store, Side::Lm).await.unwrap(), None);
            assert_eq!(owed_leave(&store, &again).await.unwrap(), None);
            // Of one that is refused what was owed before is owed still.
            let leaves = [new.clone(), again.clone()];
            let write = store.write(move |tx| {
                Box::pin(async move {
                    for leave in &leaves {
                        join_refused(tx, leave).await?;
                    }
                    Ok(())
                })
            });
            write.await.unwrap();
            assert_eq!(due(Side::Lm).await, std::slice::from_ref(&again));
            assert_eq!(owed_leaves(&store).await.unwrap(), Owed { count: 1, since: Some(2), given_up: 0 });
            let write = store.write(move |tx| {
                Box::pin(async move {
                    begin_join(tx, &again).await?;
                    let first = owe_broken_off(tx, Side::Matrix, (3, 70)).await?;
                    Ok((first, owe_broken_off(tx, Side::Matrix, (3, 80)).await?))
                })
            });
            assert_eq!(write.await.unwrap(), (1, 0));
            assert_eq!((due(Side::Lm).await, due(Side::Matrix).await), (Vec::new(), vec![graph]));
            assert_eq!(next_owed_leave(&store, Side::Matrix).await.unwrap(), Some(70));
        })
        .await;
    }
}
