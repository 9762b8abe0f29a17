//! The checked keys of other servers, kept so that their old events stay verifiable when they are gone.

use ruma::ServerName;

use super::{Store, StoreError};

/// The keys of one server as they were last stored, and when they were fetched (ms).
pub async fn load(store: &Store, server: &ServerName) -> Result<Option<(Vec<u8>, i64)>, StoreError> {
    Ok(sqlx::query_as("SELECT keys, fetched_ts FROM server_keys WHERE server_name = $1")
        .bind(server.as_str())
        .fetch_optional(store.reader())
        .await?)
}

/// Puts the keys of one server in the place of what was stored.
pub async fn save(store: &Store, server: &ServerName, keys: Vec<u8>, fetched_ts: i64) -> Result<(), StoreError> {
    let server = server.to_owned();
    store
        .write(move |tx| {
            Box::pin(async move {
                sqlx::query(
                    "INSERT INTO server_keys (server_name, keys, fetched_ts) VALUES ($1, $2, $3) \
                     ON CONFLICT (server_name) DO UPDATE SET keys = excluded.keys, fetched_ts = excluded.fetched_ts",
                )
                .bind(server.as_str())
                .bind(keys.as_slice())
                .bind(fetched_ts)
                .execute(tx)
                .await?;
                Ok(())
            })
        })
        .await
}
