//! The checked keys of other servers, kept so that their old events stay verifiable when they are gone, and the signed answers that
//! they came with, for those who ask this server as a notary.

use ruma::{OwnedServerName, ServerName};

use super::{Store, StoreError};

/// How many answers of one server are kept; the oldest goes for the newest.
const ANSWERS: i64 = 8;

/// An answer of a server about its keys.
#[derive(Debug, Clone)]
pub struct KeyAnswer {
    /// What tells the set of keys in use in it from others.
    pub key_set: String,
    /// The answer, canonical, with the server's own signatures.
    pub answer: Vec<u8>,
    /// When it was had, in milliseconds.
    pub fetched_ts: i64,
    /// Until when it is believed, in milliseconds.
    pub valid_until_ts: i64,
}

/// The keys of one server as they were last stored, and when they were fetched (ms).
pub async fn load(store: &Store, server: &ServerName) -> Result<Option<(Vec<u8>, i64)>, StoreError> {
    Ok(sqlx::query_as("SELECT keys, fetched_ts FROM server_keys WHERE server_name = $1")
        .bind(server.as_str())
        .fetch_optional(store.reader())
        .await?)
}

/// Puts the keys of one server in the place of what was stored, and keeps the answers that they are from.
pub async fn save(
    store: &Store,
    server: &ServerName,
    keys: Vec<u8>,
    answers: Vec<KeyAnswer>,
    fetched_ts: i64,
) -> Result<(), StoreError> {
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
                .execute(&mut *tx)
                .await?;
                for answer in &answers {
                    keep(tx, &server, answer).await?;
                }
                Ok(())
            })
        })
        .await
}

async fn keep(tx: &mut super::Tx, server: &OwnedServerName, answer: &KeyAnswer) -> Result<(), StoreError> {
    // What a notary remembers may be older than what is here.
    sqlx::query(
        "INSERT INTO server_key_answers (server_name, key_set, answer, fetched_ts, valid_until_ts) \
         VALUES ($1, $2, $3, $4, $5) ON CONFLICT (server_name, key_set) DO UPDATE SET answer = excluded.answer, \
         fetched_ts = excluded.fetched_ts, valid_until_ts = excluded.valid_until_ts \
         WHERE server_key_answers.valid_until_ts <= excluded.valid_until_ts",
    )
    .bind(server.as_str())
    .bind(answer.key_set.as_str())
    .bind(answer.answer.as_slice())
    .bind(answer.fetched_ts)
    .bind(answer.valid_until_ts)
    .execute(&mut *tx)
    .await?;
    sqlx::query(
        "DELETE FROM server_key_answers WHERE server_name = $1 AND fetched_ts < (SELECT MIN(newest.fetched_ts) FROM \
         (SELECT fetched_ts FROM server_key_answers WHERE server_name = $1 ORDER BY fetched_ts DESC LIMIT $2) newest)",
    )
    .bind(server.as_str())
    .bind(ANSWERS)
    .execute(tx)
    .await?;
    Ok(())
}

/// The answers of one server that are kept, the newest first.
pub async fn answers(store: &Store, server: &ServerName) -> Result<Vec<KeyAnswer>, StoreError> {
    let rows: Vec<(String, Vec<u8>, i64, i64)> = sqlx::query_as(
        "SELECT key_set, answer, fetched_ts, valid_until_ts FROM server_key_answers WHERE server_name = $1 \
         ORDER BY fetched_ts DESC LIMIT $2",
    )
    .bind(server.as_str())
    .bind(ANSWERS)
    .fetch_all(store.reader())
    .await?;
    let answer =
        |(key_set, answer, fetched_ts, valid_until_ts)| KeyAnswer { key_set, answer, fetched_ts, valid_until_ts };
    Ok(rows.into_iter().map(answer).collect())
}
