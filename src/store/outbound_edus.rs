//! EDUs for other servers that must not be lost, each at its position in its destination's feed.

use ruma::ServerName;

use super::{Store, StoreError, Tx};

/// Keeps one.
pub async fn put(
    tx: &mut Tx,
    kind: &str,
    destination: &ServerName,
    position: i64,
    edu: &[u8],
) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO outbound_edus (kind, destination, position, edu) VALUES ($1, $2, $3, $4)")
        .bind(kind)
        .bind(destination.as_str())
        .bind(position)
        .bind(edu)
        .execute(tx)
        .await?;
    Ok(())
}

/// Those of a destination after one position and up to another, in order.
pub async fn range(
    store: &Store,
    kind: &str,
    destination: &ServerName,
    after: i64,
    until: i64,
    limit: i64,
) -> Result<Vec<(i64, Vec<u8>)>, StoreError> {
    let rows = sqlx::query_as(
        "SELECT position, edu FROM outbound_edus WHERE kind = $1 AND destination = $2 AND position > $3 \
         AND position <= $4 ORDER BY position LIMIT $5",
    )
    .bind(kind)
    .bind(destination.as_str())
    .bind(after)
    .bind(until)
    .bind(limit)
    .fetch_all(store.reader())
    .await?;
    Ok(rows)
}

/// Those up to a position have arrived.
pub async fn remove(tx: &mut Tx, kind: &str, destination: &ServerName, up_to: i64) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM outbound_edus WHERE kind = $1 AND destination = $2 AND position <= $3")
        .bind(kind)
        .bind(destination.as_str())
        .bind(up_to)
        .execute(tx)
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use ruma::server_name;

    use super::*;
    use crate::store::testing::both_stores;

    #[tokio::test]
    async fn each_destination_has_its_own_until_they_have_arrived() {
        both_stores(|store| async move {
            let (one, other) = (server_name!("one.example"), server_name!("other.example"));
            let write = store.write(move |tx| {
                Box::pin(async move {
                    for position in 1..5 {
                        put(tx, "a", one, position, &[u8::try_from(position).unwrap_or_default()]).await?;
                    }
                    put(tx, "a", other, 1, b"x").await?;
                    put(tx, "b", one, 1, b"y").await?;
                    remove(tx, "a", one, 1).await
                })
            });
            write.await.unwrap();
            let found = range(&store, "a", one, 0, 3, 10).await.unwrap();
            assert_eq!(found, [(2, vec![2]), (3, vec![3])]);
            assert_eq!(range(&store, "a", one, 0, 9, 1).await.unwrap(), [(2, vec![2])]);
            assert_eq!(range(&store, "a", other, 0, 9, 9).await.unwrap(), [(1, b"x".to_vec())]);
            assert_eq!(range(&store, "b", one, 0, 9, 9).await.unwrap(), [(1, b"y".to_vec())]);
        })
        .await;
    }
}
