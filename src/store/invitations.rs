//! Invites of ghosts into rooms that have no portal yet.

use ruma::{EventId, OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId, RoomId, ServerName, UserId};
use sqlx::Row as _;
use sqlx::any::AnyRow;

use super::text::{decode, encode};
use super::{Store, StoreError, Tx};
use crate::identity::Side;

/// What is to be done next about an invite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The user whom the ghost stands for is to be invited.
    Asked,
    /// The user was invited.
    Open,
    /// The user is coming in.
    Entering,
    /// The ghost is to decline.
    Refused,
    /// The user's invite is to be taken back.
    Retracted,
}

impl Stage {
    /// As in the store and the admin API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Asked => "asked",
            Self::Open => "open",
            Self::Entering => "entering",
            Self::Refused => "refused",
            Self::Retracted => "retracted",
        }
    }

    fn parse(text: &str) -> Result<Self, StoreError> {
        let all = [Self::Asked, Self::Open, Self::Entering, Self::Refused, Self::Retracted];
        all.into_iter().find(|stage| stage.as_str() == text).ok_or_else(|| StoreError::corrupt("stage", text))
    }
}

/// An invite of a ghost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invitation {
    /// The side of the room that the ghost is invited into.
    pub side: Side,
    /// That room.
    pub room_id: OwnedRoomId,
    /// For whom the ghost stands.
    pub user: OwnedUserId,
    /// Who invites.
    pub inviter: OwnedUserId,
    /// The server that brought the invite.
    pub via: OwnedServerName,
    /// The invite.
    pub event_id: OwnedEventId,
    /// Its content, as JSON.
    pub content: Vec<u8>,
    /// What came with it, as JSON.
    pub shown: Vec<u8>,
    /// What is to be done next.
    pub stage: Stage,
    /// Why it is refused, as one word.
    pub code: Option<String>,
    /// Why it is refused or retracted.
    pub reason: Option<String>,
    /// The invite of the user.
    pub image: Option<OwnedEventId>,
    /// When it came, in milliseconds.
    pub made_ts: i64,
    /// Until when the user may answer, in milliseconds.
    pub expires_ts: i64,
    /// Since when it is tried to do what is next, in milliseconds.
    pub stage_ts: i64,
    /// How often that failed.
    pub tries: i64,
    /// When it is tried again, in milliseconds.
    pub retry_ts: i64,
}

const COLUMNS: &str = "side, room_id, user_id, inviter, via, event_id, content, shown, stage, code, reason, image, made_ts, \
                       expires_ts, stage_ts, tries, retry_ts";

/// Keeps an invite; a later one of the same ghost into the same room takes its place.
pub async fn put(tx: &mut Tx, row: &Invitation) -> Result<(), StoreError> {
    remove(tx, row.side, &row.room_id, &row.user).await?;
    let sql = format!(
        "INSERT INTO bridge_invitations ({COLUMNS}) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)"
    );
    sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(row.side.as_str())
        .bind(row.room_id.as_str())
        .bind(encode(row.user.as_str()).as_ref())
        .bind(encode(row.inviter.as_str()).as_ref())
        .bind(row.via.as_str())
        .bind(row.event_id.as_str())
        .bind(row.content.as_slice())
        .bind(row.shown.as_slice())
        .bind(row.stage.as_str())
        .bind(row.code.as_deref())
        .bind(row.reason.as_deref().map(encode).as_deref())
        .bind(row.image.as_ref().map(|id| id.as_str()))
        .bind(row.made_ts)
        .bind(row.expires_ts)
        .bind(row.stage_ts)
        .bind(row.tries)
        .bind(row.retry_ts)
        .execute(tx)
        .await?;
    Ok(())
}

/// Forgets an invite.
pub async fn remove(tx: &mut Tx, side: Side, room_id: &RoomId, user: &UserId) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM bridge_invitations WHERE side = $1 AND room_id = $2 AND user_id = $3")
        .bind(side.as_str())
        .bind(room_id.as_str())
        .bind(encode(user.as_str()).as_ref())
        .execute(tx)
        .await?;
    Ok(())
}

/// Forgets an invite, if it is still this one at this stage.
pub async fn settle(tx: &mut Tx, row: &Invitation) -> Result<(), StoreError> {
    sqlx::query(
        "DELETE FROM bridge_invitations WHERE side = $1 AND room_id = $2 AND user_id = $3 AND event_id = $4 AND stage = $5",
    )
    .bind(row.side.as_str())
    .bind(row.room_id.as_str())
    .bind(encode(row.user.as_str()).as_ref())
    .bind(row.event_id.as_str())
    .bind(row.stage.as_str())
    .execute(tx)
    .await?;
    Ok(())
}

/// What an invite is to become.
#[derive(Debug, Clone)]
pub struct Next {
    /// What is to be done next.
    pub stage: Stage,
    /// Why, as one word.
    pub code: Option<String>,
    /// Why.
    pub reason: Option<String>,
    /// The invite of the user, where there is one now.
    pub image: Option<OwnedEventId>,
    /// When this is, in milliseconds.
    pub now_ms: i64,
}

/// Changes what is to be done next about an invite, if it is still this one at this stage; whether it was.
pub async fn set_stage(tx: &mut Tx, row: &Invitation, next: &Next) -> Result<bool, StoreError> {
    let changed = sqlx::query(
        "UPDATE bridge_invitations SET stage = $6, code = $7, reason = $8, image = COALESCE($9, image), stage_ts = $10, \
         tries = 0, retry_ts = 0 \
         WHERE side = $1 AND room_id = $2 AND user_id = $3 AND event_id = $4 AND stage = $5",
    )
    .bind(row.side.as_str())
    .bind(row.room_id.as_str())
    .bind(encode(row.user.as_str()).as_ref())
    .bind(row.event_id.as_str())
    .bind(row.stage.as_str())
    .bind(next.stage.as_str())
    .bind(next.code.as_deref())
    .bind(next.reason.as_deref().map(encode).as_deref())
    .bind(next.image.as_ref().map(|id| id.as_str()))
    .bind(next.now_ms)
    .execute(tx)
    .await?;
    Ok(changed.rows_affected() > 0)
}

/// What was to be done failed: it is tried again at a time.
pub async fn put_off(tx: &mut Tx, row: &Invitation, retry_ts: i64) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE bridge_invitations SET tries = tries + 1, retry_ts = $6 \
         WHERE side = $1 AND room_id = $2 AND user_id = $3 AND event_id = $4 AND stage = $5",
    )
    .bind(row.side.as_str())
    .bind(row.room_id.as_str())
    .bind(encode(row.user.as_str()).as_ref())
    .bind(row.event_id.as_str())
    .bind(row.stage.as_str())
    .bind(retry_ts)
    .execute(tx)
    .await?;
    Ok(())
}

/// Who was coming in when the gateway stopped is waited for again.
pub async fn nobody_enters(tx: &mut Tx) -> Result<(), StoreError> {
    sqlx::query("UPDATE bridge_invitations SET stage = 'open' WHERE stage = 'entering'").execute(tx).await?;
    Ok(())
}

/// The room across is made anew: everybody is invited again, after a time.
pub async fn ask_again(tx: &mut Tx, side: Side, room_id: &RoomId, retry_ts: i64) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE bridge_invitations SET stage = 'asked', image = NULL, tries = 0, retry_ts = $3 \
         WHERE side = $1 AND room_id = $2 AND stage IN ('asked', 'open', 'entering')",
    )
    .bind(side.as_str())
    .bind(room_id.as_str())
    .bind(retry_ts)
    .execute(tx)
    .await?;
    Ok(())
}

/// The invites into a room, oldest first.
pub async fn of_room(store: &Store, side: Side, room_id: &RoomId) -> Result<Vec<Invitation>, StoreError> {
    let sql = format!(
        "SELECT {COLUMNS} FROM bridge_invitations WHERE side = $1 AND room_id = $2 ORDER BY made_ts, expires_ts"
    );
    let query = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(side.as_str()).bind(room_id.as_str());
    query.fetch_all(store.reader()).await?.iter().map(row).collect()
}

/// One invite.
pub async fn one(store: &Store, side: Side, room_id: &RoomId, user: &UserId) -> Result<Option<Invitation>, StoreError> {
    let all = of_room(store, side, room_id).await?;
    Ok(all.into_iter().find(|row| row.user == user))
}

/// An invite by its event.
pub async fn of_event(store: &Store, event_id: &EventId) -> Result<Option<Invitation>, StoreError> {
    let sql = format!("SELECT {COLUMNS} FROM bridge_invitations WHERE event_id = $1");
    let query = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(event_id.as_str());
    query.fetch_optional(store.reader()).await?.as_ref().map(row).transpose()
}

/// The rooms with invites about which something is due by a time.
pub async fn due(store: &Store, now_ms: i64) -> Result<Vec<(Side, OwnedRoomId)>, StoreError> {
    let rows: Vec<(String, String)> = sqlx::query_as(
        "SELECT DISTINCT side, room_id FROM bridge_invitations \
         WHERE expires_ts <= $1 OR (stage IN ('asked', 'refused', 'retracted') AND retry_ts <= $1)",
    )
    .bind(now_ms)
    .fetch_all(store.reader())
    .await?;
    rows.into_iter().map(|(side, room)| Ok((side_of(&side)?, room_of(room)?))).collect()
}

/// The rooms with invites.
pub async fn rooms(store: &Store) -> Result<Vec<(Side, OwnedRoomId)>, StoreError> {
    due(store, i64::MAX).await
}

/// How many invites of a user are not over, and how many of all users of a server.
pub async fn count(store: &Store, inviter: &UserId) -> Result<(i64, i64), StoreError> {
    let of_server = |server: &ServerName| format!("%:{}", server.as_str().replace('_', "!_"));
    let row: (i64, i64) = sqlx::query_as(
        "SELECT (SELECT COUNT(*) FROM bridge_invitations WHERE inviter = $1), \
         (SELECT COUNT(*) FROM bridge_invitations WHERE inviter LIKE $2 ESCAPE '!')",
    )
    .bind(encode(inviter.as_str()).as_ref())
    .bind(of_server(inviter.server_name()).as_str())
    .fetch_one(store.reader())
    .await?;
    Ok(row)
}

fn row(row: &AnyRow) -> Result<Invitation, StoreError> {
    let user = |column: &str| -> Result<OwnedUserId, StoreError> {
        let text = decode(row.try_get(column)?);
        text.try_into().map_err(|error| StoreError::corrupt("user ID", error))
    };
    let event = |text: String| OwnedEventId::try_from(text).map_err(|error| StoreError::corrupt("event ID", error));
    Ok(Invitation {
        side: side_of(&row.try_get::<String, _>("side")?)?,
        room_id: room_of(row.try_get("room_id")?)?,
        user: user("user_id")?,
        inviter: user("inviter")?,
        via: row.try_get::<String, _>("via")?.try_into().map_err(|error| StoreError::corrupt("server name", error))?,
        event_id: event(row.try_get("event_id")?)?,
        content: row.try_get("content")?,
        shown: row.try_get("shown")?,
        stage: Stage::parse(&row.try_get::<String, _>("stage")?)?,
        code: row.try_get("code")?,
        reason: row.try_get::<Option<String>, _>("reason")?.map(decode),
        image: row.try_get::<Option<String>, _>("image")?.map(event).transpose()?,
        made_ts: row.try_get("made_ts")?,
        expires_ts: row.try_get("expires_ts")?,
        stage_ts: row.try_get("stage_ts")?,
        tries: row.try_get("tries")?,
        retry_ts: row.try_get("retry_ts")?,
    })
}

fn side_of(text: &str) -> Result<Side, StoreError> {
    let side = [Side::Matrix, Side::Lm].into_iter().find(|side| side.as_str() == text);
    side.ok_or_else(|| StoreError::corrupt("side", text))
}

fn room_of(text: String) -> Result<OwnedRoomId, StoreError> {
    RoomId::parse(text).map_err(|error| StoreError::corrupt("room ID", error))
}

#[cfg(test)]
mod tests {
    use ruma::{room_id, user_id};

    use super::*;
    use crate::store::testing::both_stores;

    fn invitation(user: &str, inviter: &str) -> Invitation {
        Invitation {
            side: Side::Matrix,
            room_id: room_id!("!m:hs.example").to_owned(),
            user: user.try_into().unwrap(),
            inviter: inviter.try_into().unwrap(),
            via: "hs.example".try_into().unwrap(),
            event_id: format!("${}", user.trim_start_matches('@').replace(':', "-")).as_str().try_into().unwrap(),
            content: b"{}".to_vec(),
            shown: b"{}".to_vec(),
            stage: Stage::Asked,
            code: None,
            reason: None,
            image: None,
            made_ts: 1,
            expires_ts: 100,
            stage_ts: 1,
            tries: 0,
            retry_ts: 0,
        }
    }

    #[tokio::test]
    async fn an_invite_goes_through_its_stages_and_is_counted_until_it_is_over() {
        both_stores(|store| async move {
            let (bob, carol) = (invitation("@bob:l", "@a:hs.example"), invitation("@carol:l", "@b_c:hs.example"));
            let (first, second) = (bob.clone(), carol.clone());
            store
                .write(move |tx| {
                    Box::pin(async move {
                        put(tx, &first).await?;
                        put(tx, &first).await?;
                        put(tx, &second).await
                    })
                })
                .await
                .unwrap();
            assert_eq!(of_room(&store, Side::Matrix, &bob.room_id).await.unwrap().len(), 2);
            assert_eq!(one(&store, Side::Matrix, &bob.room_id, &bob.user).await.unwrap(), Some(bob.clone()));
            assert_eq!(one(&store, Side::Lm, &bob.room_id, &bob.user).await.unwrap(), None);
            assert_eq!(of_event(&store, &carol.event_id).await.unwrap(), Some(carol.clone()));
            assert_eq!(count(&store, user_id!("@a:hs.example")).await.unwrap(), (1, 2));
            assert_eq!(count(&store, user_id!("@a:s.example")).await.unwrap(), (0, 0));
            assert_eq!(due(&store, 0).await.unwrap(), [(Side::Matrix, bob.room_id.clone())]);

            let open =
                Next { stage: Stage::Open, code: None, reason: None, image: Some(carol.event_id.clone()), now_ms: 5 };
            let (row, next) = (bob.clone(), open.clone());
            let set = store.write(move |tx| {
                Box::pin(async move {
                    assert!(set_stage(tx, &row, &next).await?);
                    // It is not at that stage any more.
                    assert!(!set_stage(tx, &row, &next).await?);
                    put_off(tx, &row, 50).await?;
                    settle(tx, &row).await
                })
            });
            set.await.unwrap();
            let now = one(&store, Side::Matrix, &bob.room_id, &bob.user).await.unwrap().unwrap();
            assert_eq!(
                (now.stage, now.stage_ts, now.tries, now.image.as_ref()),
                (Stage::Open, 5, 0, open.image.as_ref())
            );
            let other = carol.clone();
            store.write(move |tx| Box::pin(async move { put_off(tx, &other, 50).await })).await.unwrap();
            assert!(due(&store, 49).await.unwrap().is_empty());
            assert_eq!(due(&store, 50).await.unwrap().len(), 1);
            assert_eq!(rooms(&store).await.unwrap().len(), 1);

            let rows = [now, Invitation { tries: 1, retry_ts: 50, ..carol }];
            let settled = store.write(move |tx| {
                Box::pin(async move {
                    for row in &rows {
                        settle(tx, row).await?;
                    }
                    Ok(())
                })
            });
            settled.await.unwrap();
            assert_eq!(count(&store, user_id!("@a:hs.example")).await.unwrap(), (0, 0));
        })
        .await;
    }
}
