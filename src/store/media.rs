//! The secret by which the gateway knows the names that it gave to media.

use super::{Store, StoreError};

/// The one row.
const ID: i64 = 1;

/// The secret; `fresh` becomes it where there is none yet.
pub async fn secret(store: &Store, fresh: [u8; 32]) -> Result<[u8; 32], StoreError> {
    if let Some(known) = read(store).await? {
        return Ok(known);
    }
    let write = "INSERT INTO media_secret (id, secret) VALUES ($1, $2) ON CONFLICT (id) DO NOTHING";
    store
        .write(move |tx| {
            Box::pin(async move {
                sqlx::query(write).bind(ID).bind(fresh.as_slice()).execute(tx).await?;
                Ok(())
            })
        })
        .await?;
    read(store).await?.ok_or_else(|| StoreError::corrupt("media secret", "it is missing after it was written"))
}

async fn read(store: &Store) -> Result<Option<[u8; 32]>, StoreError> {
    let query = sqlx::query_as("SELECT secret FROM media_secret WHERE id = $1").bind(ID);
    let row: Option<(Vec<u8>,)> = query.fetch_optional(store.reader()).await?;
    let secret = |bytes: Vec<u8>| <[u8; 32]>::try_from(bytes).map_err(|bytes| bytes.len());
    row.map(|(bytes,)| secret(bytes).map_err(|length| StoreError::corrupt("media secret", format!("{length} bytes"))))
        .transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::testing::both_stores;

    #[tokio::test]
    async fn the_first_secret_stays() {
        both_stores(|store| async move {
            assert_eq!(secret(&store, [7; 32]).await.unwrap(), [7; 32]);
            assert_eq!(secret(&store, [8; 32]).await.unwrap(), [7; 32]);
        })
        .await;
    }
}
