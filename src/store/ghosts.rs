//! Ghosts whose name had to be hashed: for whom they stand.

use ruma::{OwnedUserId, UserId};

use super::{Store, StoreError};
use crate::identity::Side;

/// Remembers for whom `ghost` stands: `user`, at home on `home`.
pub async fn remember(store: &Store, ghost: &UserId, home: Side, user: &UserId) -> Result<(), StoreError> {
    let (ghost, user) = (ghost.to_owned(), user.to_owned());
    store
        .write(move |tx| {
            Box::pin(async move {
                sqlx::query(
                    "INSERT INTO bridge_ghosts (ghost, home, user_id) VALUES ($1, $2, $3) \
                     ON CONFLICT (ghost) DO NOTHING",
                )
                .bind(ghost.as_str())
                .bind(home.as_str())
                .bind(user.as_str())
                .execute(tx)
                .await?;
                Ok(())
            })
        })
        .await
}

/// For whom `ghost` stands; none when it is not known, or stands for a user of the other side.
pub async fn behind(store: &Store, ghost: &UserId, home: Side) -> Result<Option<OwnedUserId>, StoreError> {
    let row: Option<(String,)> = sqlx::query_as("SELECT user_id FROM bridge_ghosts WHERE ghost = $1 AND home = $2")
        .bind(ghost.as_str())
        .bind(home.as_str())
        .fetch_optional(store.reader())
        .await?;
    row.map(|(user,)| user.try_into().map_err(|error| StoreError::corrupt("user ID", error))).transpose()
}
