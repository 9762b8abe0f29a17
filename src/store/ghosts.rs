//! Ghosts whose name had to be hashed: for whom they stand.

use ruma::{OwnedUserId, UserId};

use super::{Store, StoreError, Tx};
use crate::identity::Side;

/// A ghost whose name had to be hashed, and for whom it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hashed {
    /// The ghost.
    pub ghost: OwnedUserId,
    /// The side on which the user is at home.
    pub home: Side,
    /// The user.
    pub user: OwnedUserId,
}

/// Remembers for whom ghosts stand; what is known of a ghost stays.
pub async fn remember(tx: &mut Tx, ghosts: &[Hashed]) -> Result<(), StoreError> {
    for Hashed { ghost, home, user } in ghosts {
        sqlx::query(
            "INSERT INTO bridge_ghosts (ghost, home, user_id) VALUES ($1, $2, $3) ON CONFLICT (ghost) DO NOTHING",
        )
        .bind(ghost.as_str())
        .bind(home.as_str())
        .bind(user.as_str())
        .execute(&mut *tx)
        .await?;
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use ruma::user_id;

    use super::*;
    use crate::store::testing::both_stores;

    #[tokio::test]
    async fn a_ghost_stands_for_one_user_of_one_side_for_ever() {
        both_stores(|store| async move {
            let (ghost, user) = (user_id!("@lm_=_abc:g.example"), user_id!("@LONG:hub.example"));
            assert_eq!(behind(&store, ghost, Side::Lm).await.unwrap(), None);
            let stands = |user: &UserId| Hashed { ghost: ghost.to_owned(), home: Side::Lm, user: user.to_owned() };
            let ghosts = [stands(user), stands(user_id!("@other:hub.example"))];
            store.write(move |tx| Box::pin(async move { remember(tx, &ghosts).await })).await.unwrap();
            assert_eq!(behind(&store, ghost, Side::Lm).await.unwrap().as_deref(), Some(user));
            assert_eq!(behind(&store, ghost, Side::Matrix).await.unwrap(), None);
        })
        .await;
    }
}
