//! Which event is the image of which, which events were refused and why, and what users call themselves.

use std::collections::HashMap;
use std::sync::LazyLock;

use ruma::{EventId, OwnedEventId, OwnedRoomId, OwnedUserId, UserId};
use sqlx::Row as _;
use sqlx::any::AnyRow;

use super::rows::{Statement, chunks, placeholders, statement, statements};
use super::{Store, StoreError, Tx, text};
use crate::identity::Side;

/// A source event and its image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRow {
    /// The side of the source.
    pub side: Side,
    /// The source.
    pub source: OwnedEventId,
    /// The LPDU inside the source, when it has one: a hub may append it twice.
    pub source_lpdu: Option<OwnedEventId>,
    /// The image on the side across; while `pending`, the ID of its LPDU.
    pub image: OwnedEventId,
    /// Whether the image is an LPDU whose echo has not come yet.
    pub pending: bool,
    /// The portal's number.
    pub portal: i64,
    /// What was left out on the way, if something was.
    pub note: Option<String>,
    /// When it was made, in milliseconds.
    pub made_ts: i64,
}

/// An event that was not carried over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefusalRow {
    /// The side of the source.
    pub side: Side,
    /// The source.
    pub source: OwnedEventId,
    /// The portal's number.
    pub portal: i64,
    /// Its sender.
    pub sender: String,
    /// Its type.
    pub kind: String,
    /// The reason as one word.
    pub code: String,
    /// The reason as a sentence.
    pub reason: String,
    /// When it was refused, in milliseconds.
    pub refused_ts: i64,
    /// The room, where none may have had a portal.
    pub room_id: Option<OwnedRoomId>,
}

const IMAGE_COLUMNS: &str = "side, source_event_id, source_lpdu_id, image_event_id, pending, portal, note, made_ts";
const REFUSAL_COLUMNS: &str = "side, source_event_id, portal, sender, kind, code, reason, refused_ts, room_id";

static INSERT: LazyLock<Vec<Statement>> = LazyLock::new(|| {
    statements(|rows| format!("INSERT INTO bridge_images ({IMAGE_COLUMNS}) VALUES {}", placeholders(rows, 8, 0)))
});

/// Records images, in the transaction that makes them. Fails when a source has one already, or an image a source (INV-5).
pub async fn insert(tx: &mut Tx, rows: &[ImageRow]) -> Result<(), StoreError> {
    for chunk in chunks(rows) {
        let mut query = sqlx::query(statement(&INSERT, tx, chunk.len())?);
        for row in chunk {
            query = query
                .bind(row.side.as_str())
                .bind(row.source.as_str())
                .bind(row.source_lpdu.as_ref().map(|id| id.as_str()))
                .bind(row.image.as_str())
                .bind(i64::from(row.pending))
                .bind(row.portal)
                .bind(row.note.as_deref().map(|note| text::encode(note).into_owned()))
                .bind(row.made_ts);
        }
        query.execute(&mut *tx).await?;
    }
    Ok(())
}

/// The echo of an LPDU came: the image is now known by its event's ID. The sources whose image it is, none or one.
pub async fn echoed(tx: &mut Tx, lpdu_id: &EventId, event_id: &EventId) -> Result<bool, StoreError> {
    let done = sqlx::query(
        "UPDATE bridge_images SET image_event_id = $1, pending = 0 \
         WHERE side = 'matrix' AND image_event_id = $2 AND pending = 1",
    )
    .bind(event_id.as_str())
    .bind(lpdu_id.as_str())
    .execute(tx)
    .await?;
    Ok(done.rows_affected() > 0)
}

/// An LPDU is replaced: the image is now known by this ID, which is another LPDU's (`pending`) or an event's.
pub async fn replaced(tx: &mut Tx, lpdu_id: &EventId, by: &EventId, pending: bool) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE bridge_images SET image_event_id = $1, pending = $2 \
         WHERE side = 'matrix' AND image_event_id = $3 AND pending = 1",
    )
    .bind(by.as_str())
    .bind(i64::from(pending))
    .bind(lpdu_id.as_str())
    .execute(tx)
    .await?;
    Ok(())
}

/// Takes back an image that the hub refused, and says whose it was.
pub async fn take_pending(tx: &mut Tx, lpdu_id: &EventId) -> Result<Option<ImageRow>, StoreError> {
    let row = sqlx::query(sqlx::AssertSqlSafe(format!(
        "DELETE FROM bridge_images WHERE side = 'matrix' AND image_event_id = $1 AND pending = 1 \
         RETURNING {IMAGE_COLUMNS}"
    )))
    .bind(lpdu_id.as_str())
    .fetch_optional(tx)
    .await?;
    row.as_ref().map(image_row).transpose()
}

/// The images of those of `sources` that have one, by source.
pub async fn of_sources(
    store: &Store,
    side: Side,
    sources: &[OwnedEventId],
) -> Result<HashMap<OwnedEventId, ImageRow>, StoreError> {
    let rows = look_up(store, "side = $1 AND source_event_id", side, sources).await?;
    Ok(rows.into_iter().map(|row| (row.source.clone(), row)).collect())
}

/// What those of `images` that are images are images of, by image. `side` is the side of the sources.
pub async fn of_images(
    store: &Store,
    side: Side,
    images: &[OwnedEventId],
) -> Result<HashMap<OwnedEventId, ImageRow>, StoreError> {
    let rows = look_up(store, "side = $1 AND image_event_id", side, images).await?;
    Ok(rows.into_iter().map(|row| (row.image.clone(), row)).collect())
}

/// Those of `lpdus` that have crossed already, with the source in which they crossed.
pub async fn of_lpdus(
    store: &Store,
    lpdus: &[OwnedEventId],
) -> Result<HashMap<OwnedEventId, OwnedEventId>, StoreError> {
    let rows = look_up(store, "side = $1 AND source_lpdu_id", Side::Lm, lpdus).await?;
    Ok(rows.into_iter().filter_map(|row| Some((row.source_lpdu?, row.source))).collect())
}

/// How many images of a portal still wait for their echo, and since when the oldest does.
pub async fn pending(store: &Store, portal: i64) -> Result<(i64, Option<i64>), StoreError> {
    Ok(sqlx::query_as("SELECT COUNT(*), MIN(made_ts) FROM bridge_images WHERE portal = $1 AND pending = 1")
        .bind(portal)
        .fetch_one(store.reader())
        .await?)
}

/// Forgets the images of a portal that is over: its rooms may get another one, for which they would be wrong.
pub async fn forget(tx: &mut Tx, portal: i64) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM bridge_images WHERE portal = $1").bind(portal).execute(tx).await?;
    Ok(())
}

/// Records a refusal; the newest reason counts.
pub async fn refuse(tx: &mut Tx, row: &RefusalRow) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO bridge_refusals (side, source_event_id, portal, sender, kind, code, reason, refused_ts, room_id) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) \
         ON CONFLICT (side, source_event_id) DO UPDATE SET \
         code = excluded.code, reason = excluded.reason, refused_ts = excluded.refused_ts",
    )
    .bind(row.side.as_str())
    .bind(row.source.as_str())
    .bind(row.portal)
    .bind(text::encode(&row.sender).as_ref())
    .bind(text::encode(&row.kind).as_ref())
    .bind(row.code.as_str())
    .bind(text::encode(&row.reason).as_ref())
    .bind(row.refused_ts)
    .bind(row.room_id.as_ref().map(|room_id| room_id.as_str()))
    .execute(tx)
    .await?;
    Ok(())
}

/// The refusal of an event, if it was refused.
pub async fn refusal(store: &Store, side: Side, source: &EventId) -> Result<Option<RefusalRow>, StoreError> {
    let row = sqlx::query(sqlx::AssertSqlSafe(format!(
        "SELECT {REFUSAL_COLUMNS} FROM bridge_refusals WHERE side = $1 AND source_event_id = $2"
    )))
    .bind(side.as_str())
    .bind(source.as_str())
    .fetch_optional(store.reader())
    .await?;
    row.as_ref().map(refusal_row).transpose()
}

/// Up to when refusals of a portal may have been removed: the time of the oldest that is there, if as many are there as
/// always stay.
pub async fn refusals_gone_until(store: &Store, portal: i64) -> Result<Option<i64>, StoreError> {
    let row: (i64, Option<i64>) =
        sqlx::query_as("SELECT COUNT(*), MIN(refused_ts) FROM bridge_refusals WHERE portal = $1")
            .bind(portal)
            .fetch_one(store.reader())
            .await?;
    let (count, oldest) = row;
    Ok(oldest.filter(|_| count >= super::pruning::STAY))
}

/// The newest refusals of a portal.
pub async fn refusals(store: &Store, portal: i64, limit: i64) -> Result<Vec<RefusalRow>, StoreError> {
    let rows = sqlx::query(sqlx::AssertSqlSafe(format!(
        "SELECT {REFUSAL_COLUMNS} FROM bridge_refusals WHERE portal = $1 ORDER BY refused_ts DESC LIMIT $2"
    )))
    .bind(portal)
    .bind(limit)
    .fetch_all(store.reader())
    .await?;
    rows.iter().map(refusal_row).collect()
}

/// Remembers what a user calls itself.
pub async fn set_profile(
    tx: &mut Tx,
    side: Side,
    user: &UserId,
    displayname: Option<&str>,
    avatar_url: Option<&str>,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO bridge_profiles (side, user_id, displayname, avatar_url) VALUES ($1, $2, $3, $4) \
         ON CONFLICT (side, user_id) DO UPDATE SET \
         displayname = excluded.displayname, avatar_url = excluded.avatar_url",
    )
    .bind(side.as_str())
    .bind(user.as_str())
    .bind(displayname.map(text::encode).as_deref())
    .bind(avatar_url.map(text::encode).as_deref())
    .execute(tx)
    .await?;
    Ok(())
}

/// What a user called itself when it was last seen: display name and avatar.
pub async fn profile(
    store: &Store,
    side: Side,
    user: &OwnedUserId,
) -> Result<Option<(Option<String>, Option<String>)>, StoreError> {
    let row: Option<(Option<String>, Option<String>)> =
        sqlx::query_as("SELECT displayname, avatar_url FROM bridge_profiles WHERE side = $1 AND user_id = $2")
            .bind(side.as_str())
            .bind(user.as_str())
            .fetch_optional(store.reader())
            .await?;
    Ok(row.map(|(displayname, avatar)| (displayname.map(text::decode), avatar.map(text::decode))))
}

async fn look_up(store: &Store, key: &str, side: Side, ids: &[OwnedEventId]) -> Result<Vec<ImageRow>, StoreError> {
    let mut found = Vec::new();
    for chunk in chunks(ids) {
        let list = placeholders(1, chunk.len(), 1);
        let sql = format!("SELECT {IMAGE_COLUMNS} FROM bridge_images WHERE {key} IN {list}");
        let mut query = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(side.as_str());
        for id in chunk {
            query = query.bind(id.as_str());
        }
        for row in query.fetch_all(store.reader()).await? {
            found.push(image_row(&row)?);
        }
    }
    Ok(found)
}

fn image_row(row: &AnyRow) -> Result<ImageRow, StoreError> {
    Ok(ImageRow {
        side: side(row)?,
        source: event_id(row.try_get("source_event_id")?)?,
        source_lpdu: row.try_get::<Option<String>, _>("source_lpdu_id")?.map(event_id).transpose()?,
        image: event_id(row.try_get("image_event_id")?)?,
        pending: row.try_get::<i64, _>("pending")? != 0,
        portal: row.try_get("portal")?,
        note: row.try_get::<Option<String>, _>("note")?.map(text::decode),
        made_ts: row.try_get("made_ts")?,
    })
}

fn refusal_row(row: &AnyRow) -> Result<RefusalRow, StoreError> {
    Ok(RefusalRow {
        side: side(row)?,
        source: event_id(row.try_get("source_event_id")?)?,
        portal: row.try_get("portal")?,
        sender: text::decode(row.try_get("sender")?),
        kind: text::decode(row.try_get("kind")?),
        code: row.try_get("code")?,
        reason: text::decode(row.try_get("reason")?),
        refused_ts: row.try_get("refused_ts")?,
        room_id: row
            .try_get::<Option<String>, _>("room_id")?
            .map(|room_id| room_id.try_into().map_err(|error| StoreError::corrupt("room ID", error)))
            .transpose()?,
    })
}

fn side(row: &AnyRow) -> Result<Side, StoreError> {
    let side: String = row.try_get("side")?;
    [Side::Matrix, Side::Lm]
        .into_iter()
        .find(|known| known.as_str() == side)
        .ok_or_else(|| StoreError::corrupt("side", side))
}

fn event_id(column: String) -> Result<OwnedEventId, StoreError> {
    column.try_into().map_err(|error| StoreError::corrupt("event ID", error))
}

#[cfg(test)]
mod tests {
    use ruma::{event_id, user_id};

    use super::*;
    use crate::store::testing::both_stores;

    fn row(source: &str, image: &str) -> ImageRow {
        ImageRow {
            side: Side::Matrix,
            source: source.try_into().unwrap(),
            source_lpdu: None,
            image: image.try_into().unwrap(),
            pending: false,
            portal: 1,
            note: None,
            made_ts: 5,
        }
    }

    async fn put(store: &Store, row: ImageRow) -> Result<(), StoreError> {
        store.write(move |tx| Box::pin(async move { insert(tx, &[row]).await })).await
    }

    #[tokio::test]
    async fn inv_5_a_source_has_one_image_and_an_image_one_source() {
        both_stores(|store| async move {
            put(&store, row("$a", "$A")).await.unwrap();
            assert!(put(&store, row("$a", "$B")).await.is_err());
            assert!(put(&store, row("$b", "$A")).await.is_err());
            put(&store, row("$b", "$B")).await.unwrap();
            // The same two IDs with their sides exchanged are another pair.
            put(&store, ImageRow { side: Side::Lm, ..row("$a", "$A") }).await.unwrap();
            let wanted = [event_id!("$a").to_owned(), event_id!("$c").to_owned()];
            let found = of_sources(&store, Side::Matrix, &wanted).await.unwrap();
            assert_eq!(found.len(), 1);
            assert_eq!(found[event_id!("$a")], row("$a", "$A"));
            assert_eq!(of_images(&store, Side::Matrix, &[event_id!("$B").to_owned()]).await.unwrap().len(), 1);
        })
        .await;
    }

    #[tokio::test]
    async fn an_lpdu_that_its_hub_appended_twice_crosses_once() {
        both_stores(|store| async move {
            let lpdu = Some(event_id!("$lpdu").to_owned());
            let first = ImageRow { side: Side::Lm, source_lpdu: lpdu.clone(), ..row("$a", "$A") };
            put(&store, first).await.unwrap();
            assert!(put(&store, ImageRow { side: Side::Lm, source_lpdu: lpdu, ..row("$b", "$B") }).await.is_err());
            let found = of_lpdus(&store, &[event_id!("$lpdu").to_owned()]).await.unwrap();
            assert_eq!(found[event_id!("$lpdu")], event_id!("$a").to_owned());
        })
        .await;
    }

    #[tokio::test]
    async fn a_pending_image_gets_its_event_id_once_or_is_taken_back() {
        both_stores(|store| async move {
            put(&store, ImageRow { pending: true, ..row("$a", "$lpdu1") }).await.unwrap();
            put(&store, ImageRow { pending: true, ..row("$b", "$lpdu2") }).await.unwrap();
            assert_eq!(pending(&store, 1).await.unwrap(), (2, Some(5)));
            let echo = |lpdu: &'static str, event: &'static str| {
                let store = store.clone();
                async move {
                    store
                        .write(move |tx| {
                            Box::pin(
                                async move { echoed(tx, lpdu.try_into().unwrap(), event.try_into().unwrap()).await },
                            )
                        })
                        .await
                        .unwrap()
                }
            };
            assert!(echo("$lpdu1", "$A").await);
            assert!(!echo("$lpdu1", "$A2").await);
            let taken = store
                .write(|tx| Box::pin(async move { take_pending(tx, event_id!("$lpdu2")).await }))
                .await
                .unwrap()
                .unwrap();
            assert_eq!(taken.source, event_id!("$b").to_owned());
            assert_eq!(pending(&store, 1).await.unwrap(), (0, None));
        })
        .await;
    }

    #[tokio::test]
    async fn refusals_and_profiles_come_back() {
        both_stores(|store| async move {
            let refused = RefusalRow {
                side: Side::Lm,
                source: event_id!("$a").to_owned(),
                portal: 3,
                sender: "@a:b".to_owned(),
                kind: "x\u{0}".to_owned(),
                code: "lm_rule".to_owned(),
                reason: "no\u{0}".to_owned(),
                refused_ts: 9,
                room_id: Some(ruma::room_id!("!r:b").to_owned()),
            };
            let written = refused.clone();
            store
                .write(move |tx| {
                    Box::pin(async move {
                        refuse(tx, &written).await?;
                        refuse(tx, &written).await?;
                        set_profile(tx, Side::Lm, user_id!("@a:b"), Some("A\u{0}"), None).await
                    })
                })
                .await
                .unwrap();
            assert_eq!(refusal(&store, Side::Lm, event_id!("$a")).await.unwrap(), Some(refused.clone()));
            assert_eq!(refusals(&store, 3, 10).await.unwrap(), [refused]);
            let profile = profile(&store, Side::Lm, &user_id!("@a:b").to_owned()).await.unwrap().unwrap();
            assert_eq!(profile, (Some("A\u{0}".to_owned()), None));
        })
        .await;
    }
}
