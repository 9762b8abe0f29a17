//! What the appservice keeps: transactions that were taken, what is to be done because of them, open invites of its user,
//! its direct chats.

use ruma::{OwnedRoomId, OwnedUserId, RoomId, UserId};
use sqlx::Row as _;

use super::{Store, StoreError, Tx, text};

/// What `ended` is of an alias that is about to lead to the room that took the place of its own: 0 where it leads to its room, 1 where
/// that room's portal is over.
const LED_ON: i64 = 2;

/// Something that is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkRow {
    /// The order in which it came.
    pub seq: i64,
    /// What, as JSON.
    pub work: Vec<u8>,
    /// How often it was tried.
    pub attempts: i64,
}

/// Takes a transaction, once: false when the same one was taken before, and then nothing is written.
pub async fn take_transaction(
    store: &Store,
    tx: &mut Tx,
    txn_id: &str,
    fingerprint: &str,
    work: &[Vec<u8>],
    now_ms: i64,
) -> Result<bool, StoreError> {
    let taken: Option<(String,)> = sqlx::query_as("SELECT fingerprint FROM appservice_transactions WHERE txn_id = $1")
        .bind(text::encode(txn_id).as_ref())
        .fetch_optional(&mut *tx)
        .await?;
    if taken.is_some_and(|(taken,)| taken == fingerprint) {
        return Ok(false);
    }
    sqlx::query(
        "INSERT INTO appservice_transactions (txn_id, fingerprint, received_ts) VALUES ($1, $2, $3) \
         ON CONFLICT (txn_id) DO UPDATE SET fingerprint = excluded.fingerprint, received_ts = excluded.received_ts",
    )
    .bind(text::encode(txn_id).as_ref())
    .bind(fingerprint)
    .bind(now_ms)
    .execute(&mut *tx)
    .await?;
    for work in work {
        sqlx::query("INSERT INTO appservice_work (seq, work, attempts, due_ts) VALUES ($1, $2, 0, $3)")
            .bind(store.next_id())
            .bind(work.as_slice())
            .bind(now_ms)
            .execute(&mut *tx)
            .await?;
    }
    Ok(true)
}

/// Forgets transactions that were taken before `before`.
pub async fn forget_transactions(tx: &mut Tx, before: i64) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM appservice_transactions WHERE received_ts < $1").bind(before).execute(tx).await?;
    Ok(())
}

/// What is due at `now_ms`, the oldest first.
pub async fn due(store: &Store, now_ms: i64, limit: i64) -> Result<Vec<WorkRow>, StoreError> {
    let rows = sqlx::query(
        "SELECT seq, work, attempts FROM appservice_work WHERE failed IS NULL AND due_ts <= $1 ORDER BY seq LIMIT $2",
    )
    .bind(now_ms)
    .bind(limit)
    .fetch_all(store.reader())
    .await?;
    rows.iter()
        .map(|row| {
            Ok(WorkRow { seq: row.try_get("seq")?, work: row.try_get("work")?, attempts: row.try_get("attempts")? })
        })
        .collect()
}

/// How much waits, and when the next of it is due.
pub async fn waiting(store: &Store) -> Result<(i64, Option<i64>), StoreError> {
    Ok(sqlx::query_as("SELECT COUNT(*), MIN(due_ts) FROM appservice_work WHERE failed IS NULL")
        .fetch_one(store.reader())
        .await?)
}

/// It is done.
pub async fn done(tx: &mut Tx, seq: i64) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM appservice_work WHERE seq = $1").bind(seq).execute(tx).await?;
    Ok(())
}

/// It failed, and is tried again at `due_ts`.
pub async fn put_off(tx: &mut Tx, seq: i64, due_ts: i64) -> Result<(), StoreError> {
    sqlx::query("UPDATE appservice_work SET attempts = attempts + 1, due_ts = $2 WHERE seq = $1")
        .bind(seq)
        .bind(due_ts)
        .execute(tx)
        .await?;
    Ok(())
}

/// It failed for good; it is kept for operators.
pub async fn give_up(tx: &mut Tx, seq: i64, reason: &str) -> Result<(), StoreError> {
    sqlx::query("UPDATE appservice_work SET failed = $2 WHERE seq = $1")
        .bind(seq)
        .bind(text::encode(reason).as_ref())
        .execute(tx)
        .await?;
    Ok(())
}

/// The appservice's user is about to be invited into a room.
pub async fn add_invite(tx: &mut Tx, room_id: &RoomId, now_ms: i64) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO appservice_invites (room_id, invited_ts) VALUES ($1, $2) ON CONFLICT (room_id) DO NOTHING",
    )
    .bind(room_id.as_str())
    .bind(now_ms)
    .execute(tx)
    .await?;
    Ok(())
}

/// Whether an invite into a room is open.
pub async fn is_invited(store: &Store, room_id: &RoomId) -> Result<bool, StoreError> {
    let row = sqlx::query("SELECT invited_ts FROM appservice_invites WHERE room_id = $1")
        .bind(room_id.as_str())
        .fetch_optional(store.reader())
        .await?;
    Ok(row.is_some())
}

/// The invite is withdrawn.
pub async fn remove_invite(tx: &mut Tx, room_id: &RoomId) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM appservice_invites WHERE room_id = $1").bind(room_id.as_str()).execute(tx).await?;
    Ok(())
}

/// An alias is about to be published at the homeserver.
pub async fn add_alias(tx: &mut Tx, alias: &str, room_id: &RoomId) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO appservice_aliases (alias, room_id, ended) VALUES ($1, $2, 0) \
         ON CONFLICT (alias) DO UPDATE SET room_id = excluded.room_id, ended = 0",
    )
    .bind(text::encode(alias).as_ref())
    .bind(room_id.as_str())
    .execute(tx)
    .await?;
    Ok(())
}

/// The portal of a room is over: its aliases are to be taken away, and no invite is open any more.
pub async fn end_room(tx: &mut Tx, room_id: &RoomId) -> Result<(), StoreError> {
    sqlx::query("UPDATE appservice_aliases SET ended = 1 WHERE room_id = $1")
        .bind(room_id.as_str())
        .execute(&mut *tx)
        .await?;
    remove_invite(tx, room_id).await
}

/// The aliases that are to be taken away, or are to lead elsewhere.
pub async fn ended_aliases(store: &Store) -> Result<Vec<(String, OwnedRoomId)>, StoreError> {
    let rows: Vec<(String, String)> =
        sqlx::query_as("SELECT alias, room_id FROM appservice_aliases WHERE ended <> 0 LIMIT 100")
            .fetch_all(store.reader())
            .await?;
    rows.into_iter()
        .map(|(alias, room_id)| {
            let room_id = RoomId::parse(room_id).map_err(|error| StoreError::corrupt("room ID", error))?;
            Ok((text::decode(alias), room_id))
        })
        .collect()
}

/// An alias was taken away, unless it leads elsewhere by now.
pub async fn remove_alias(tx: &mut Tx, alias: &str) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM appservice_aliases WHERE alias = $1 AND ended <> 0")
        .bind(text::encode(alias).as_ref())
        .execute(tx)
        .await?;
    Ok(())
}

/// An alias whose portal is over is about to lead to another room. Should that room's portal end before it does, it is to be taken away.
pub async fn lead_on(tx: &mut Tx, alias: &str, room_id: &RoomId) -> Result<(), StoreError> {
    sqlx::query("UPDATE appservice_aliases SET room_id = $2, ended = $3 WHERE alias = $1 AND ended <> 0")
        .bind(text::encode(alias).as_ref())
        .bind(room_id.as_str())
        .bind(LED_ON)
        .execute(tx)
        .await?;
    Ok(())
}

/// It does, unless that room's portal is over too by now.
pub async fn led_on(tx: &mut Tx, alias: &str, room_id: &RoomId) -> Result<(), StoreError> {
    sqlx::query("UPDATE appservice_aliases SET ended = 0 WHERE alias = $1 AND room_id = $2 AND ended = $3")
        .bind(text::encode(alias).as_ref())
        .bind(room_id.as_str())
        .bind(LED_ON)
        .execute(tx)
        .await?;
    Ok(())
}

/// A chat with the appservice's user began; a direct one when the two are alone.
pub async fn add_chat(tx: &mut Tx, room_id: &RoomId, user_id: &UserId, is_direct: bool) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO appservice_chats (room_id, user_id, is_direct) VALUES ($1, $2, $3) \
         ON CONFLICT (room_id) DO UPDATE SET user_id = excluded.user_id, is_direct = excluded.is_direct",
    )
    .bind(room_id.as_str())
    .bind(user_id.as_str())
    .bind(i64::from(is_direct))
    .execute(tx)
    .await?;
    Ok(())
}

/// A chat ended.
pub async fn remove_chat(tx: &mut Tx, room_id: &RoomId) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM appservice_chats WHERE room_id = $1").bind(room_id.as_str()).execute(tx).await?;
    Ok(())
}

/// All chats, with whom each is, and whether the two are alone.
pub async fn chats(store: &Store) -> Result<Vec<(OwnedRoomId, OwnedUserId, bool)>, StoreError> {
    let rows: Vec<(String, String, i64)> =
        sqlx::query_as("SELECT room_id, user_id, is_direct FROM appservice_chats").fetch_all(store.reader()).await?;
    rows.into_iter()
        .map(|(room_id, user_id, is_direct)| {
            let room_id = RoomId::parse(room_id).map_err(|error| StoreError::corrupt("room ID", error))?;
            let user_id = UserId::parse(user_id).map_err(|error| StoreError::corrupt("user ID", error))?;
            Ok((room_id, user_id, is_direct != 0))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use ruma::{room_id, user_id};

    use super::*;
    use crate::store::testing::both_stores;

    async fn take(store: &Store, txn_id: &'static str, fingerprint: &'static str, work: &[&[u8]]) -> bool {
        let work: Vec<Vec<u8>> = work.iter().map(|work| work.to_vec()).collect();
        let inner = store.clone();
        store
            .write(move |tx| Box::pin(async move { take_transaction(&inner, tx, txn_id, fingerprint, &work, 5).await }))
            .await
            .unwrap()
    }

    #[tokio::test]
    async fn a_transaction_is_taken_once_and_its_work_comes_in_order() {
        both_stores(|store| async move {
            assert!(take(&store, "1", "a", &[b"one", b"two"]).await);
            assert!(!take(&store, "1", "a", &[b"one", b"two"]).await);
            assert!(take(&store, "1", "b", &[b"three"]).await, "the homeserver began to count anew");
            let rows = due(&store, 5, 10).await.unwrap();
            let works: Vec<&[u8]> = rows.iter().map(|row| row.work.as_slice()).collect();
            assert_eq!(works, [&b"one"[..], b"two", b"three"]);

            let [one, two, three] = [rows[0].seq, rows[1].seq, rows[2].seq];
            store
                .write(move |tx| {
                    Box::pin(async move {
                        done(tx, one).await?;
                        put_off(tx, two, 9).await?;
                        give_up(tx, three, "it\u{0}").await
                    })
                })
                .await
                .unwrap();
            assert_eq!(due(&store, 8, 10).await.unwrap(), []);
            assert_eq!(due(&store, 9, 10).await.unwrap(), [WorkRow { seq: two, work: b"two".to_vec(), attempts: 1 }]);
            assert_eq!(waiting(&store).await.unwrap(), (1, Some(9)));

            store.write(|tx| Box::pin(async move { forget_transactions(tx, 6).await })).await.unwrap();
            assert!(take(&store, "1", "b", &[]).await);
        })
        .await;
    }

    #[tokio::test]
    async fn aliases_of_a_room_without_a_portal_are_to_be_taken_away() {
        both_stores(|store| async move {
            let (room, other) = (room_id!("!a:b"), room_id!("!c:b"));
            let write = store.write(move |tx| {
                Box::pin(async move {
                    add_alias(tx, "#one:b", room).await?;
                    add_alias(tx, "#two:b", room).await?;
                    add_alias(tx, "#three:b", other).await?;
                    add_invite(tx, room, 1).await?;
                    end_room(tx, room).await?;
                    // It leads to another room by now.
                    add_alias(tx, "#two:b", other).await
                })
            });
            write.await.unwrap();
            assert!(!is_invited(&store, room).await.unwrap());
            assert_eq!(ended_aliases(&store).await.unwrap(), [("#one:b".to_owned(), room.to_owned())]);
            let write = store.write(move |tx| {
                Box::pin(async move {
                    remove_alias(tx, "#one:b").await?;
                    remove_alias(tx, "#two:b").await?;
                    end_room(tx, other).await
                })
            });
            write.await.unwrap();
            assert_eq!(ended_aliases(&store).await.unwrap().len(), 2);
        })
        .await;
    }

    #[tokio::test]
    async fn an_alias_that_leads_on_stays_unless_the_next_portal_is_over_too() {
        both_stores(|store| async move {
            let (old, next) = (room_id!("!a:b"), room_id!("!c:b"));
            for ends_too in [false, true] {
                let write = store.write(move |tx| {
                    Box::pin(async move {
                        add_alias(tx, "#one:b", old).await?;
                        end_room(tx, old).await?;
                        lead_on(tx, "#one:b", next).await?;
                        if ends_too {
                            end_room(tx, next).await?;
                        }
                        Ok(())
                    })
                });
                write.await.unwrap();
                // Until it leads there it is looked at again.
                assert_eq!(ended_aliases(&store).await.unwrap(), [("#one:b".to_owned(), next.to_owned())]);
                store.write(move |tx| Box::pin(async move { led_on(tx, "#one:b", next).await })).await.unwrap();
                assert_eq!(ended_aliases(&store).await.unwrap().is_empty(), !ends_too);
            }
            // One that leads where it should is not led elsewhere.
            let write = store.write(move |tx| {
                Box::pin(async move {
                    add_alias(tx, "#one:b", next).await?;
                    lead_on(tx, "#one:b", old).await
                })
            });
            write.await.unwrap();
            assert_eq!(ended_aliases(&store).await.unwrap(), []);
        })
        .await;
    }

    #[tokio::test]
    async fn invites_and_chats_come_and_go() {
        both_stores(|store| async move {
            let (room, user) = (room_id!("!a:b"), user_id!("@u:b"));
            let write = |on: bool| {
                store.write(move |tx| {
                    Box::pin(async move {
                        if on {
                            add_invite(tx, room, 1).await?;
                            add_invite(tx, room, 2).await?;
                            add_chat(tx, room, user, true).await
                        } else {
                            remove_invite(tx, room).await?;
                            remove_chat(tx, room).await
                        }
                    })
                })
            };
            write(true).await.unwrap();
            assert!(is_invited(&store, room).await.unwrap());
            assert_eq!(chats(&store).await.unwrap(), [(room.to_owned(), user.to_owned(), true)]);
            write(false).await.unwrap();
            assert!(!is_invited(&store, room).await.unwrap());
            assert_eq!(chats(&store).await.unwrap(), []);
        })
        .await;
    }
}
