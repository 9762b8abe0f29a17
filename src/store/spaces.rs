//! Spaces: the Matrix room that holds the rooms of an LM hub.

use ruma::{OwnedRoomId, OwnedServerName, RoomId, ServerName};

use super::{Store, StoreError, Tx};

/// Writes down the space of a hub, which had none.
pub async fn put(tx: &mut Tx, hub: &ServerName, room_id: &RoomId) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO bridge_spaces (hub, room_id) VALUES ($1, $2)")
        .bind(hub.as_str())
        .bind(room_id.as_str())
        .execute(tx)
        .await?;
    Ok(())
}

/// The spaces of all hubs.
pub async fn all(store: &Store) -> Result<Vec<(OwnedServerName, OwnedRoomId)>, StoreError> {
    let rows: Vec<(String, String)> =
        sqlx::query_as("SELECT hub, room_id FROM bridge_spaces").fetch_all(store.reader()).await?;
    rows.into_iter().map(parse).collect()
}

fn parse((hub, room_id): (String, String)) -> Result<(OwnedServerName, OwnedRoomId), StoreError> {
    let hub: OwnedServerName = hub.try_into().map_err(|error| StoreError::corrupt("server name", error))?;
    Ok((hub, RoomId::parse(room_id).map_err(|error| StoreError::corrupt("room ID", error))?))
}

#[cfg(test)]
mod tests {
    use ruma::{room_id, server_name};

    use super::*;
    use crate::store::testing::both_stores;

    #[tokio::test]
    async fn a_hub_has_one_space() {
        both_stores(|store| async move {
            let (hub, room) = (server_name!("hub.example:8448"), room_id!("!space"));
            let add = || store.write(move |tx| Box::pin(async move { put(tx, hub, room).await }));
            add().await.unwrap();
            assert!(add().await.is_err());
            assert_eq!(all(&store).await.unwrap(), [(hub.to_owned(), room.to_owned())]);
        })
        .await;
    }
}
