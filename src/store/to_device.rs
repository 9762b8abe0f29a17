//! Messages for devices of this gateway's users, kept until they are taken out, and users whose devices have changed. A message is
//! taken once, however often its server sends it.

use std::collections::BTreeMap;

use ruma::{OwnedUserId, ServerName, UserId};
use sqlx::Row as _;
use sqlx::any::AnyRow;

use super::{Store, StoreError, Tx, text};
use crate::event::Object;
use crate::identity::Side;

/// How many messages are kept for one device; what comes beyond is dropped.
const MAX_WAITING: i64 = 10_000;
/// For how long it is known what was taken out: for as long as transactions' answers are, in milliseconds.
const KNOWN_MS: i64 = 86_400_000;

/// A message for a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Grows with each message.
    pub position: i64,
    /// From which side.
    pub side: Side,
    /// From whom.
    pub sender: OwnedUserId,
    /// By which its server's messages can be told apart.
    pub message_id: String,
    /// Its type.
    pub kind: String,
    /// To whom.
    pub target: OwnedUserId,
    /// To which device.
    pub device: String,
    /// What it says.
    pub content: Object,
}

/// Keeps messages of `origin` that are not known yet, each at its position.
pub async fn put(tx: &mut Tx, origin: &ServerName, messages: &[Message]) -> Result<(), StoreError> {
    let mut places: BTreeMap<(&UserId, &str), i64> = BTreeMap::new();
    for message in messages {
        let content =
            serde_json::to_vec(&message.content).map_err(|error| StoreError::corrupt("to-device message", error))?;
        let (id, device) = (text::encode(&message.message_id), text::encode(&message.device));
        let known: Option<(i64,)> = sqlx::query_as(
            "SELECT taken_ts FROM to_device_taken WHERE origin = $1 AND message_id = $2 AND target = $3 AND device = $4",
        )
        .bind(origin.as_str())
        .bind(id.as_ref())
        .bind(message.target.as_str())
        .bind(device.as_ref())
        .fetch_optional(&mut *tx)
        .await?;
        let key = (&*message.target, &*message.device);
        let waiting = match places.get(&key) {
            Some(waiting) => *waiting,
            None => {
                let query = "SELECT COUNT(*) FROM to_device_messages WHERE target = $1 AND device = $2";
                let query = sqlx::query_as(query).bind(message.target.as_str()).bind(device.as_ref());
                let (waiting,): (i64,) = query.fetch_one(&mut *tx).await?;
                waiting
            }
        };
        places.insert(key, waiting);
        if known.is_some() || waiting >= MAX_WAITING {
            continue;
        }
        let put = sqlx::query(
            "INSERT INTO to_device_messages \
             (position, side, origin, sender, message_id, kind, target, device, content) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT (origin, message_id, target, device) DO NOTHING",
        )
        .bind(message.position)
        .bind(message.side.as_str())
        .bind(origin.as_str())
        .bind(text::encode(message.sender.as_str()).as_ref())
        .bind(id.as_ref())
        .bind(text::encode(&message.kind).as_ref())
        .bind(message.target.as_str())
        .bind(device.as_ref())
        .bind(content.as_slice())
        .execute(&mut *tx)
        .await?;
        places.insert(key, waiting.saturating_add(i64::try_from(put.rows_affected()).unwrap_or(1)));
    }
    Ok(())
}

/// The messages for a device, the oldest first.
pub async fn waiting(store: &Store, target: &UserId, device: &str, limit: i64) -> Result<Vec<Message>, StoreError> {
    let rows = sqlx::query(
        "SELECT position, side, sender, message_id, kind, target, device, content FROM to_device_messages \
         WHERE target = $1 AND device = $2 ORDER BY position LIMIT $3",
    )
    .bind(target.as_str())
    .bind(text::encode(device).as_ref())
    .bind(limit)
    .fetch_all(store.reader())
    .await?;
    rows.iter().map(message).collect()
}

/// Takes out the messages for a device up to a position, in the transaction that does what they ask for.
pub async fn take(tx: &mut Tx, target: &UserId, device: &str, up_to: i64, now_ms: i64) -> Result<(), StoreError> {
    let device = text::encode(device);
    sqlx::query("DELETE FROM to_device_taken WHERE taken_ts < $1")
        .bind(now_ms.saturating_sub(KNOWN_MS))
        .execute(&mut *tx)
        .await?;
    sqlx::query(
        "INSERT INTO to_device_taken (origin, message_id, target, device, taken_ts) \
         SELECT origin, message_id, target, device, $1 FROM to_device_messages \
         WHERE target = $2 AND device = $3 AND position <= $4",
    )
    .bind(now_ms)
    .bind(target.as_str())
    .bind(device.as_ref())
    .bind(up_to)
    .execute(&mut *tx)
    .await?;
    sqlx::query("DELETE FROM to_device_messages WHERE target = $1 AND device = $2 AND position <= $3")
        .bind(target.as_str())
        .bind(device.as_ref())
        .bind(up_to)
        .execute(tx)
        .await?;
    Ok(())
}

/// Users of other servers whose devices have changed, each at a position.
pub async fn mark_changed(tx: &mut Tx, users: &[(OwnedUserId, i64)]) -> Result<(), StoreError> {
    for (user, position) in users {
        sqlx::query(
            "INSERT INTO devices_changed (user_id, position) VALUES ($1, $2) \
             ON CONFLICT (user_id) DO UPDATE SET position = excluded.position",
        )
        .bind(text::encode(user.as_str()).as_ref())
        .bind(*position)
        .execute(&mut *tx)
        .await?;
    }
    Ok(())
}

/// The users whose devices have changed after a position, with theirs, in that order.
pub async fn changed_after(store: &Store, after: i64, limit: i64) -> Result<Vec<(OwnedUserId, i64)>, StoreError> {
    let rows: Vec<(String, i64)> =
        sqlx::query_as("SELECT user_id, position FROM devices_changed WHERE position > $1 ORDER BY position LIMIT $2")
            .bind(after)
            .bind(limit)
            .fetch_all(store.reader())
            .await?;
    rows.into_iter().map(|(user, position)| Ok((user_id(user)?, position))).collect()
}

fn message(row: &AnyRow) -> Result<Message, StoreError> {
    let (side, content): (String, Vec<u8>) = (row.try_get("side")?, row.try_get("content")?);
    let known = [Side::Matrix, Side::Lm].into_iter().find(|known| known.as_str() == side);
    Ok(Message {
        position: row.try_get("position")?,
        side: known.ok_or_else(|| StoreError::corrupt("side", side))?,
        sender: user_id(row.try_get("sender")?)?,
        message_id: text::decode(row.try_get("message_id")?),
        kind: text::decode(row.try_get("kind")?),
        target: user_id(row.try_get("target")?)?,
        device: text::decode(row.try_get("device")?),
        content: serde_json::from_slice(&content).map_err(|error| StoreError::corrupt("to-device message", error))?,
    })
}

fn user_id(column: String) -> Result<OwnedUserId, StoreError> {
    text::decode(column).try_into().map_err(|error| StoreError::corrupt("user ID", error))
}

#[cfg(test)]
mod tests {
    use ruma::{server_name, user_id};
    use serde_json::json;

    use super::*;
    use crate::store::testing::both_stores;

    fn to(device: &str, message_id: &str, position: i64) -> Message {
        Message {
            position,
            side: Side::Lm,
            sender: user_id!("@bob:hub.example").to_owned(),
            message_id: message_id.to_owned(),
            kind: "m.room.encrypted".to_owned(),
            target: user_id!("@mx_a_h:g.example").to_owned(),
            device: device.to_owned(),
            content: json!({ "ciphertext": position }).as_object().unwrap().clone(),
        }
    }

    async fn keep(store: &Store, origin: &'static ServerName, messages: Vec<Message>) {
        store.write(move |tx| Box::pin(async move { put(tx, origin, &messages).await })).await.unwrap();
    }

    #[tokio::test]
    async fn inv_5_a_message_is_kept_once_until_it_is_taken_and_not_again() {
        both_stores(|store| async move {
            let (hub, other) = (server_name!("hub.example"), server_name!("other.example"));
            let target = user_id!("@mx_a_h:g.example");
            keep(&store, hub, vec![to("D", "1", 1), to("D\0", "1\0", 2), to("D", "1", 3), to("D", "2", 4)]).await;
            // Another server's message may be called the same.
            keep(&store, other, vec![to("D", "1", 5)]).await;
            let all = waiting(&store, target, "D", 10).await.unwrap();
            assert_eq!(all, [to("D", "1", 1), to("D", "2", 4), to("D", "1", 5)]);
            assert_eq!(waiting(&store, target, "D\0", 10).await.unwrap(), [to("D\0", "1\0", 2)]);
            assert_eq!(waiting(&store, target, "D", 1).await.unwrap().len(), 1);

            let out =
                |up_to, now| store.write(move |tx| Box::pin(async move { take(tx, target, "D", up_to, now).await }));
            out(4, 0).await.unwrap();
            keep(&store, hub, vec![to("D", "1", 6), to("D", "2", 7)]).await;
            let left = waiting(&store, target, "D", 10).await.unwrap();
            assert_eq!(left, [to("D", "1", 5)], "what was taken is known");
            out(5, KNOWN_MS + 1).await.unwrap();
            keep(&store, hub, vec![to("D", "1", 8)]).await;
            assert_eq!(waiting(&store, target, "D", 10).await.unwrap(), [to("D", "1", 8)], "it is not known for ever");
        })
        .await;
    }

    #[tokio::test]
    async fn whose_devices_changed_is_known_from_a_position_on() {
        both_stores(|store| async move {
            let (alice, bob) = (user_id!("@alice:h.example").to_owned(), user_id!("@bob:h.example").to_owned());
            for marks in [vec![(alice.clone(), 1), (bob.clone(), 2)], vec![(alice.clone(), 3)]] {
                store.write(move |tx| Box::pin(async move { mark_changed(tx, &marks).await })).await.unwrap();
            }
            let after = |position| changed_after(&store, position, 10);
            assert_eq!(after(0).await.unwrap(), [(bob, 2), (alice.clone(), 3)]);
            assert_eq!(after(2).await.unwrap(), [(alice, 3)]);
            assert_eq!(after(3).await.unwrap(), []);
        })
        .await;
    }
}
