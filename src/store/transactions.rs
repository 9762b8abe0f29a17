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
