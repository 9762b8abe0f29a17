//! Portals and their aliases.

use ruma::{OwnedRoomId, OwnedServerName, RoomId};
use sqlx::Row as _;
use sqlx::any::AnyRow;

use super::{Store, StoreError, Tx};
use crate::identity::Side;

/// One portal as it is stored. While it is being made, rooms may still be missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortalRow {
    /// Its number; the portal's ID is `p` and this.
    pub number: i64,
    /// `created`, `from_lm`, `from_matrix` or `shared`.
    pub kind: String,
    /// `creating`, `active`, `degraded`, `suspended`, `ending` or `ended`.
    pub state: String,
    /// The Matrix room.
    pub matrix_room_id: Option<OwnedRoomId>,
    /// The LM room.
    pub lm_room_id: Option<OwnedRoomId>,
    /// The LM room's hub.
    pub lm_hub: OwnedServerName,
    /// The localpart of the alias it was asked for with.
    pub alias: Option<String>,
    /// Why it is not active.
    pub reason: Option<String>,
    /// What was asked for, as JSON, for making it again after a crash.
    pub request: Vec<u8>,
    /// When it was asked for, in milliseconds.
    pub created_ts: i64,
    /// Until when it may go unused, in milliseconds; none when it may for ever. Only an admin's has none from the start.
    pub unused_until_ts: Option<i64>,
}

const COLUMNS: &str = "number, kind, state, matrix_room_id, lm_room_id, lm_hub, alias, reason, request, created_ts, \
                       unused_until_ts";

/// Adds a portal and returns its number; the row's own number is not looked at.
pub async fn insert(tx: &mut Tx, row: &PortalRow) -> Result<i64, StoreError> {
    // The newest rows are never deleted, so the next number was never used.
    let (number,): (i64,) = sqlx::query_as("SELECT CAST(COALESCE(MAX(number), 0) + 1 AS BIGINT) FROM bridge_portals")
        .fetch_one(&mut *tx)
        .await?;
    sqlx::query(
        "INSERT INTO bridge_portals \
         (number, kind, state, matrix_room_id, lm_room_id, lm_hub, alias, reason, request, created_ts, \
         unused_until_ts, by_admin) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
    )
    .bind(number)
    .bind(row.kind.as_str())
    .bind(row.state.as_str())
    .bind(row.matrix_room_id.as_ref().map(|id| id.as_str()))
    .bind(row.lm_room_id.as_ref().map(|id| id.as_str()))
    .bind(row.lm_hub.as_str())
    .bind(row.alias.as_deref().map(super::text::encode).as_deref())
    .bind(row.reason.as_deref().map(super::text::encode).as_deref())
    .bind(row.request.as_slice())
    .bind(row.created_ts)
    .bind(row.unused_until_ts)
    .bind(i64::from(row.unused_until_ts.is_none()))
    .execute(tx)
    .await?;
    Ok(number)
}

/// How many portals there are or are being made.
pub async fn count_open<'e>(at: impl sqlx::Executor<'e, Database = sqlx::Any>) -> Result<i64, StoreError> {
    let row: (i64,) =
        sqlx::query_as("SELECT COUNT(*) FROM bridge_portals WHERE state <> 'ended'").fetch_one(at).await?;
    Ok(row.0)
}

/// Writes everything of a portal that changes: its rooms, hub, state and reason.
pub async fn update(tx: &mut Tx, row: &PortalRow) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE bridge_portals SET state = $2, matrix_room_id = $3, lm_room_id = $4, lm_hub = $5, reason = $6 \
         WHERE number = $1",
    )
    .bind(row.number)
    .bind(row.state.as_str())
    .bind(row.matrix_room_id.as_ref().map(|id| id.as_str()))
    .bind(row.lm_room_id.as_ref().map(|id| id.as_str()))
    .bind(row.lm_hub.as_str())
    .bind(row.reason.as_deref().map(super::text::encode).as_deref())
    .execute(tx)
    .await?;
    Ok(())
}

/// The LM room of a portal has another hub.
pub async fn set_hub(tx: &mut Tx, number: i64, hub: &ruma::ServerName) -> Result<(), StoreError> {
    sqlx::query("UPDATE bridge_portals SET lm_hub = $2 WHERE number = $1")
        .bind(number)
        .bind(hub.as_str())
        .execute(tx)
        .await?;
    Ok(())
}

/// Writes down again who keeps the logs of all portals, where that was not written when it changed.
pub async fn set_all_hubs(tx: &mut Tx) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE bridge_portals SET lm_hub = (SELECT hub FROM lm_rooms WHERE lm_rooms.room_id = bridge_portals.lm_room_id) \
         WHERE state <> 'ended' AND EXISTS (SELECT 1 FROM lm_rooms \
         WHERE lm_rooms.room_id = bridge_portals.lm_room_id AND lm_rooms.hub <> bridge_portals.lm_hub)",
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// Writes how a portal is, why, and when its ghosts leave for that.
pub async fn set_state(
    tx: &mut Tx,
    number: i64,
    state: &str,
    reason: Option<&str>,
    ghosts_leave_ts: Option<i64>,
) -> Result<(), StoreError> {
    sqlx::query("UPDATE bridge_portals SET state = $2, reason = $3, ghosts_leave_ts = $4 WHERE number = $1")
        .bind(number)
        .bind(state)
        .bind(reason.map(super::text::encode).as_deref())
        .bind(ghosts_leave_ts)
        .execute(tx)
        .await?;
    Ok(())
}

/// The portals whose ghosts are to leave by now.
pub async fn to_be_left(store: &Store, now_ms: i64) -> Result<Vec<i64>, StoreError> {
    numbers(
        store,
        "SELECT number FROM bridge_portals WHERE ghosts_leave_ts IS NOT NULL AND ghosts_leave_ts <= $1",
        now_ms,
    )
    .await
}

/// The ghosts of a portal have left.
pub async fn left(tx: &mut Tx, number: i64) -> Result<(), StoreError> {
    sqlx::query("UPDATE bridge_portals SET ghosts_leave_ts = NULL WHERE number = $1").bind(number).execute(tx).await?;
    Ok(())
}

/// The portals that may have gone unused for too long by now.
pub async fn unused(store: &Store, now_ms: i64) -> Result<Vec<i64>, StoreError> {
    numbers(
        store,
        "SELECT number FROM bridge_portals WHERE unused_until_ts IS NOT NULL AND unused_until_ts <= $1",
        now_ms,
    )
    .await
}

/// Since when nobody of Matrix is in a portal's Matrix room it may have been asked: until when it is waited for somebody to come back.
pub async fn set_empty(tx: &mut Tx, number: i64, until_ts: Option<i64>) -> Result<(), StoreError> {
    let sql = match until_ts {
        // Who leaves an empty room once more does not put its end off.
        Some(_) => "UPDATE bridge_portals SET empty_until_ts = COALESCE(empty_until_ts, $2) WHERE number = $1",
        None => "UPDATE bridge_portals SET empty_until_ts = $2 WHERE number = $1",
    };
    sqlx::query(sql).bind(number).bind(until_ts).execute(tx).await?;
    Ok(())
}

/// The portals in whose Matrix room nobody of Matrix may have been for too long by now.
pub async fn empty(store: &Store, now_ms: i64) -> Result<Vec<i64>, StoreError> {
    numbers(
        store,
        "SELECT number FROM bridge_portals WHERE empty_until_ts IS NOT NULL AND empty_until_ts <= $1 AND state <> 'ended'",
        now_ms,
    )
    .await
}

/// Portals that no admin wants and that were asked for before a time: those after a number, in the order of their making, each with
/// when that was.
pub async fn nobodys(store: &Store, before_ms: i64, after: i64, limit: i64) -> Result<Vec<(i64, i64)>, StoreError> {
    let rows: Vec<(i64, i64)> = sqlx::query_as(
        "SELECT number, created_ts FROM bridge_portals WHERE by_admin = 0 AND state <> 'ended' AND created_ts <= $1 AND number > $2 \
         ORDER BY number LIMIT $3",
    )
    .bind(before_ms)
    .bind(after)
    .bind(limit)
    .fetch_all(store.reader())
    .await?;
    Ok(rows)
}

/// An admin wants a portal: it stays, used or not.
pub async fn wanted(tx: &mut Tx, number: i64) -> Result<(), StoreError> {
    sqlx::query("UPDATE bridge_portals SET by_admin = 1, unused_until_ts = NULL WHERE number = $1")
        .bind(number)
        .execute(tx)
        .await?;
    Ok(())
}

/// It need not be looked again whether a portal is used.
pub async fn used(tx: &mut Tx, number: i64) -> Result<(), StoreError> {
    sqlx::query("UPDATE bridge_portals SET unused_until_ts = NULL WHERE number = $1").bind(number).execute(tx).await?;
    Ok(())
}

async fn numbers(store: &Store, sql: &'static str, now_ms: i64) -> Result<Vec<i64>, StoreError> {
    let rows: Vec<(i64,)> = sqlx::query_as(sql).bind(now_ms).fetch_all(store.reader()).await?;
    Ok(rows.into_iter().map(|(number,)| number).collect())
}

/// The portals that have not ended, in the order of their making.
pub async fn open(store: &Store) -> Result<Vec<PortalRow>, StoreError> {
    let sql = format!("SELECT {COLUMNS} FROM bridge_portals WHERE state <> 'ended' ORDER BY number");
    let rows = sqlx::query(sqlx::AssertSqlSafe(sql)).fetch_all(store.reader()).await?;
    rows.iter().map(portal_row).collect()
}

/// Portals that had both rooms and have ended: those after a number, in the order of their making.
pub async fn ended_after(store: &Store, number: i64, limit: i64) -> Result<Vec<PortalRow>, StoreError> {
    let sql = format!(
        "SELECT {COLUMNS} FROM bridge_portals WHERE number > $1 AND state = 'ended' \
         AND matrix_room_id IS NOT NULL AND lm_room_id IS NOT NULL ORDER BY number LIMIT $2"
    );
    let query = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(number).bind(limit);
    query.fetch_all(store.reader()).await?.iter().map(portal_row).collect()
}

/// The newest portal that a room was in and that has ended.
pub async fn last_ended_of(store: &Store, side: Side, room_id: &RoomId) -> Result<Option<i64>, StoreError> {
    let column = match side {
        Side::Matrix => "matrix_room_id",
        Side::Lm => "lm_room_id",
    };
    let sql = format!("SELECT MAX(number) FROM bridge_portals WHERE {column} = $1 AND state = 'ended'");
    let query = sqlx::query_as(sqlx::AssertSqlSafe(sql)).bind(room_id.as_str());
    let (number,): (Option<i64>,) = query.fetch_one(store.reader()).await?;
    Ok(number)
}

/// The number of the portal that a Matrix room is in and that has not ended.
pub async fn number_of_matrix_room(store: &Store, room_id: &RoomId) -> Result<Option<i64>, StoreError> {
    let row: Option<(i64,)> =
        sqlx::query_as("SELECT number FROM bridge_portals WHERE matrix_room_id = $1 AND state <> 'ended'")
            .bind(room_id.as_str())
            .fetch_optional(store.reader())
            .await?;
    Ok(row.map(|(number,)| number))
}

/// Makes the alias with this localpart lead to a portal, unless it leads to another one that has not ended: then that one's
/// number is returned and nothing changes.
pub async fn claim_alias(tx: &mut Tx, localpart: &str, portal: i64) -> Result<Option<i64>, StoreError> {
    let other = alias_owner(tx, localpart).await?.filter(|owner| *owner != portal);
    if other.is_none() {
        sqlx::query(
            "INSERT INTO bridge_aliases (localpart, portal) VALUES ($1, $2) \
             ON CONFLICT (localpart) DO UPDATE SET portal = excluded.portal",
        )
        .bind(super::text::encode(localpart).as_ref())
        .bind(portal)
        .execute(tx)
        .await?;
    }
    Ok(other)
}

/// The portal that has an alias, also while it is being made.
pub async fn alias_owner(tx: &mut Tx, localpart: &str) -> Result<Option<i64>, StoreError> {
    let row: Option<(i64,)> = sqlx::query_as(
        "SELECT portal FROM bridge_aliases JOIN bridge_portals ON number = portal \
         WHERE localpart = $1 AND state <> 'ended'",
    )
    .bind(super::text::encode(localpart).as_ref())
    .fetch_optional(tx)
    .await?;
    Ok(row.map(|(number,)| number))
}

/// Takes away all aliases of a portal.
pub async fn remove_aliases(tx: &mut Tx, portal: i64) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM bridge_aliases WHERE portal = $1").bind(portal).execute(tx).await?;
    Ok(())
}

/// Makes all aliases of a portal lead to another one, but one; those that do.
pub async fn move_aliases(tx: &mut Tx, from: i64, to: i64, but: &str) -> Result<Vec<String>, StoreError> {
    let rows: Vec<(String,)> =
        sqlx::query_as("SELECT localpart FROM bridge_aliases WHERE portal = $1 AND localpart <> $2")
            .bind(from)
            .bind(super::text::encode(but).as_ref())
            .fetch_all(&mut *tx)
            .await?;
    sqlx::query("UPDATE bridge_aliases SET portal = $2 WHERE portal = $1 AND localpart <> $3")
        .bind(from)
        .bind(to)
        .bind(super::text::encode(but).as_ref())
        .execute(tx)
        .await?;
    Ok(rows.into_iter().map(|(localpart,)| super::text::decode(localpart)).collect())
}

/// A portal is called by another alias, which leads to it.
pub async fn set_alias(tx: &mut Tx, number: i64, localpart: &str) -> Result<(), StoreError> {
    sqlx::query("UPDATE bridge_portals SET alias = $2 WHERE number = $1")
        .bind(number)
        .bind(super::text::encode(localpart).as_ref())
        .execute(tx)
        .await?;
    Ok(())
}

/// All aliases, as localpart and the portal's number.
pub async fn aliases(store: &Store) -> Result<Vec<(String, i64)>, StoreError> {
    let rows: Vec<(String, i64)> =
        sqlx::query_as("SELECT localpart, portal FROM bridge_aliases").fetch_all(store.reader()).await?;
    Ok(rows.into_iter().map(|(localpart, portal)| (super::text::decode(localpart), portal)).collect())
}

fn portal_row(row: &AnyRow) -> Result<PortalRow, StoreError> {
    Ok(PortalRow {
        number: row.try_get("number")?,
        kind: row.try_get("kind")?,
        state: row.try_get("state")?,
        matrix_room_id: room_id(row.try_get("matrix_room_id")?)?,
        lm_room_id: room_id(row.try_get("lm_room_id")?)?,
        lm_hub: row
            .try_get::<String, _>("lm_hub")?
            .try_into()
            .map_err(|error| StoreError::corrupt("server name", error))?,
        alias: row.try_get::<Option<String>, _>("alias")?.map(super::text::decode),
        reason: row.try_get::<Option<String>, _>("reason")?.map(super::text::decode),
        request: row.try_get("request")?,
        created_ts: row.try_get("created_ts")?,
        unused_until_ts: row.try_get("unused_until_ts")?,
    })
}

fn room_id(column: Option<String>) -> Result<Option<OwnedRoomId>, StoreError> {
    column.map(|id| RoomId::parse(id).map_err(|error| StoreError::corrupt("room ID", error))).transpose()
}

#[cfg(test)]
mod tests {
    use ruma::{room_id, server_name};

    use super::*;
    use crate::store::testing::both_stores;

    #[tokio::test]
    async fn a_portal_and_its_alias_come_back_as_they_were_written() {
        both_stores(|store| async move {
            let row = PortalRow {
                number: 0,
                kind: "from_lm".to_owned(),
                state: "creating".to_owned(),
                matrix_room_id: None,
                lm_room_id: Some(room_id!("!a:hub.example").to_owned()),
                lm_hub: server_name!("hub.example").to_owned(),
                alias: Some("lm_a_hub.example".to_owned()),
                reason: None,
                request: b"{}".to_vec(),
                created_ts: 7,
                unused_until_ts: Some(9),
            };
            let insert_row = row.clone();
            let number = store.write(move |tx| Box::pin(async move { insert(tx, &insert_row).await })).await.unwrap();
            let done = PortalRow {
                number,
                state: "active".to_owned(),
                matrix_room_id: Some(room_id!("!m:g.example").to_owned()),
                reason: Some("x\u{0}y".to_owned()),
                ..row.clone()
            };
            let written = done.clone();
            store
                .write(move |tx| {
                    Box::pin(async move {
                        update(tx, &written).await?;
                        assert_eq!(claim_alias(tx, "lm_a_hub.example", number).await?, None);
                        // Nobody else gets it, until the portal has ended.
                        assert_eq!(claim_alias(tx, "lm_a_hub.example", number + 1).await?, Some(number));
                        Ok(())
                    })
                })
                .await
                .unwrap();
            assert_eq!(open(&store).await.unwrap(), std::slice::from_ref(&done));
            assert_eq!(ended_after(&store, 0, 10).await.unwrap(), []);
            assert_eq!(aliases(&store).await.unwrap(), [("lm_a_hub.example".to_owned(), number)]);

            // A second portal of the same room is impossible until the first has ended.
            let again = row.clone();
            assert!(store.write(move |tx| Box::pin(async move { insert(tx, &again).await })).await.is_err());
            let ended = PortalRow { state: "ended".to_owned(), ..done };
            let end = ended.clone();
            let second = store
                .write(move |tx| {
                    Box::pin(async move {
                        update(tx, &end).await?;
                        assert_eq!(claim_alias(tx, "lm_a_hub.example", number + 1).await?, None);
                        insert(tx, &row).await
                    })
                })
                .await
                .unwrap();
            assert_eq!(second, number + 1);
            // What has ended is found apart from the rest.
            assert_eq!(open(&store).await.unwrap().iter().map(|row| row.number).collect::<Vec<_>>(), [second]);
            assert_eq!(ended_after(&store, 0, 10).await.unwrap(), [ended]);
            assert_eq!(ended_after(&store, number, 10).await.unwrap(), []);
            assert_eq!(ended_after(&store, 0, 0).await.unwrap(), []);
            let of = async |side, room| last_ended_of(&store, side, room).await.unwrap();
            assert_eq!(of(Side::Lm, room_id!("!a:hub.example")).await, Some(number));
            assert_eq!(of(Side::Matrix, room_id!("!m:g.example")).await, Some(number));
            assert_eq!(of(Side::Matrix, room_id!("!a:hub.example")).await, None);
        })
        .await;
    }

    #[tokio::test]
    async fn portals_are_due_at_their_time_and_once() {
        both_stores(|store| async move {
            let row = PortalRow {
                number: 0,
                kind: "from_lm".to_owned(),
                state: "active".to_owned(),
                matrix_room_id: None,
                lm_room_id: None,
                lm_hub: server_name!("hub.example").to_owned(),
                alias: None,
                reason: None,
                request: Vec::new(),
                created_ts: 0,
                unused_until_ts: Some(20),
            };
            let number = store.write(move |tx| Box::pin(async move { insert(tx, &row).await })).await.unwrap();
            let suspend = store.write(move |tx| {
                Box::pin(async move { set_state(tx, number, "suspended", Some("kicked"), Some(10)).await })
            });
            suspend.await.unwrap();
            assert_eq!(to_be_left(&store, 9).await.unwrap(), [0; 0]);
            assert_eq!(to_be_left(&store, 10).await.unwrap(), [number]);
            assert_eq!(unused(&store, 19).await.unwrap(), [0; 0]);
            assert_eq!(unused(&store, 20).await.unwrap(), [number]);
            let done = store.write(move |tx| {
                Box::pin(async move {
                    left(tx, number).await?;
                    used(tx, number).await
                })
            });
            done.await.unwrap();
            assert_eq!(to_be_left(&store, i64::MAX).await.unwrap(), [0; 0]);
            assert_eq!(unused(&store, i64::MAX).await.unwrap(), [0; 0]);
        })
        .await;
    }
}
