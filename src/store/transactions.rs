//! Answers to transactions of other servers.

use sqlx::Row as _;

use super::{Store, StoreError, Tx, text};

/// A transaction of another server: IDs are its own for each endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TransactionKey {
    /// The server.
    pub origin: String,
    /// The endpoint, as `v1/send`.
    pub endpoint: String,
    /// The ID that it chose.
    pub txn_id: String,
}

/// The answer that a transaction was given.
pub async fn answer(store: &Store, key: &TransactionKey) -> Result<Option<Vec<u8>>, StoreError> {
    let row =
        sqlx::query("SELECT answer FROM federation_transactions WHERE origin = $1 AND endpoint = $2 AND txn_id = $3")
            .bind(key.origin.as_str())
            .bind(key.endpoint.as_str())
            .bind(text::encode(&key.txn_id).into_owned())
            .fetch_optional(store.reader())
            .await?;
    Ok(row.map(|row| row.try_get("answer")).transpose()?)
}

/// Records an answer; an earlier one stands.
pub async fn record(tx: &mut Tx, key: &TransactionKey, answer: &[u8], now_ms: i64) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO federation_transactions (origin, endpoint, txn_id, answer, answered_ts) \
         VALUES ($1, $2, $3, $4, $5) ON CONFLICT (origin, endpoint, txn_id) DO NOTHING",
    )
    .bind(key.origin.as_str())
    .bind(key.endpoint.as_str())
    .bind(text::encode(&key.txn_id).into_owned())
    .bind(answer)
    .bind(now_ms)
    .execute(tx)
    .await?;
    Ok(())
}

/// Forgets the answers given before `before_ms`.
pub async fn prune(tx: &mut Tx, before_ms: i64) -> Result<u64, StoreError> {
    let done =
        sqlx::query("DELETE FROM federation_transactions WHERE answered_ts < $1").bind(before_ms).execute(tx).await?;
    Ok(done.rows_affected())
}

/// Forgets the oldest answers of servers that were given more than `most`; what they were given in the same millisecond as
/// the oldest that stays, stays too.
pub async fn prune_surplus(store: &Store, most: i64) -> Result<u64, StoreError> {
    let busy = "SELECT origin FROM federation_transactions GROUP BY origin HAVING COUNT(*) > $1";
    let busy: Vec<(String,)> = sqlx::query_as(busy).bind(most).fetch_all(store.reader()).await?;
    let mut gone = 0_u64;
    for (origin,) in busy {
        let oldest = "SELECT answered_ts FROM federation_transactions WHERE origin = $1 \
                      ORDER BY answered_ts DESC LIMIT 1 OFFSET $2";
        let oldest = sqlx::query_as(oldest).bind(origin.clone()).bind(most.saturating_sub(1));
        let Some((oldest,)): Option<(i64,)> = oldest.fetch_optional(store.reader()).await? else { continue };
        let write = store.write(move |tx| {
            Box::pin(async move {
                let surplus = "DELETE FROM federation_transactions WHERE origin = $1 AND answered_ts < $2";
                Ok(sqlx::query(surplus).bind(origin).bind(oldest).execute(tx).await?.rows_affected())
            })
        });
        gone = gone.saturating_add(write.await?);
    }
    Ok(gone)
}

#[cfg(test)]
mod tests {
    use super::super::testing::both_stores;
    use super::*;

    fn key(origin: &str, txn: i64) -> TransactionKey {
        TransactionKey { origin: origin.to_owned(), endpoint: "v1/send".to_owned(), txn_id: txn.to_string() }
    }

    #[tokio::test]
    async fn of_busy_servers_the_newest_answers_stay() {
        both_stores(|store| async move {
            for (origin, count) in [("busy.example", 30), ("calm.example", 10)] {
                let fill = store.write(move |tx| {
                    Box::pin(async move {
                        for n in 0..count {
                            record(tx, &key(origin, n), b"{}", n).await?;
                        }
                        Ok(())
                    })
                });
                fill.await.unwrap();
            }
            assert_eq!(prune_surplus(&store, 10).await.unwrap(), 20);
            for (origin, txn, there) in
                [("busy.example", 19, false), ("busy.example", 20, true), ("calm.example", 0, true)]
            {
                assert_eq!(answer(&store, &key(origin, txn)).await.unwrap().is_some(), there, "{origin} {txn}");
            }
            assert_eq!(prune_surplus(&store, 10).await.unwrap(), 0);
        })
        .await;
    }
}
