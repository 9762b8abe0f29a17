//! Reads, each with a deadline: a database host that vanishes without a word would never answer. A connection that was waited
//! for in vain, or whose read was given up by who asked for it, is dropped and does not come back to the pool.

use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{self, BoxStream};
use futures::{StreamExt as _, TryStreamExt as _};
use sqlx::any::{Any, AnyQueryResult, AnyRow, AnyStatement, AnyTypeInfo};
use sqlx::pool::PoolConnection;
use sqlx::{AnyConnection, AnyPool, Connection as _, Describe, Either, Execute, Executor, SqlStr};
use tokio::time::timeout;

use super::StoreError;

/// How long a connection that is given back may take to say that it is in order.
const GIVING_BACK: Duration = Duration::from_secs(2);
/// How long the connection of a transaction that failed may take to close.
const CLOSING: Duration = Duration::from_secs(5);

/// Connections for reading; what is asked of them is answered in time or fails.
#[derive(Debug, Clone)]
pub struct Reader {
    pool: AnyPool,
    patience: Duration,
}

impl Reader {
    pub(super) fn new(pool: AnyPool, patience: Duration) -> Self {
        Self { pool, patience }
    }

    /// Whether the store was closed.
    pub fn is_closed(&self) -> bool {
        self.pool.is_closed()
    }

    pub(super) async fn close(&self) {
        self.pool.close().await;
    }

    async fn read<T>(&self, read: impl AsyncFnOnce(&mut AnyConnection) -> sqlx::Result<T>) -> sqlx::Result<T> {
        let mut lent = Lent::of(&self.pool).await?;
        let connection = lent.connection()?;
        let Ok(answer) = timeout(self.patience, read(connection)).await else {
            return Err(sqlx::Error::Io(std::io::Error::other(StoreError::Silent(self.patience))));
        };
        lent.give_back();
        answer
    }
}

/// A connection of a pool; dropped, it is closed.
pub(super) struct Lent(Option<PoolConnection<Any>>);

impl Lent {
    pub(super) async fn of(pool: &AnyPool) -> sqlx::Result<Self> {
        Ok(Self(Some(pool.acquire().await?)))
    }

    pub(super) fn connection(&mut self) -> sqlx::Result<&mut AnyConnection> {
        self.0.as_deref_mut().ok_or(sqlx::Error::PoolClosed)
    }

    /// Whether there is still somebody at the other end.
    pub(super) async fn answers(&mut self, within: Duration) -> bool {
        let Some(connection) = self.0.as_deref_mut() else { return false };
        matches!(timeout(within, connection.ping()).await, Ok(Ok(())))
    }

    /// Ends the session, in good order where the other end still answers.
    pub(super) async fn close(mut self) {
        if let Some(connection) = self.0.take() {
            let _ = timeout(CLOSING, connection.close()).await;
        }
    }

    /// Puts the connection back into its pool, beside what is done next. What the pool itself does would wait for the
    /// connection's answer without end, and the place in the pool would be taken until then.
    fn give_back(mut self) {
        if let Some(mut connection) = self.0.take() {
            tokio::spawn(async move { timeout(GIVING_BACK, connection.return_to_pool()).await });
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(connection) = self.0.take() {
            drop(connection.detach());
        }
    }
}

impl<'c> Executor<'c> for &'c Reader {
    type Database = Any;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, sqlx::Result<Either<AnyQueryResult, AnyRow>>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Any>,
    {
        let all = self.read(async move |connection| connection.fetch_many(query).try_collect::<Vec<_>>().await);
        stream::once(all).map_ok(|rows| stream::iter(rows).map(Ok)).try_flatten().boxed()
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, sqlx::Result<Option<AnyRow>>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Any>,
    {
        Box::pin(self.read(async move |connection| connection.fetch_optional(query).await))
    }

    fn prepare_with<'e>(self, sql: SqlStr, parameters: &'e [AnyTypeInfo]) -> BoxFuture<'e, sqlx::Result<AnyStatement>>
    where
        'c: 'e,
    {
        Box::pin(self.read(async move |connection| connection.prepare_with(sql, parameters).await))
    }

    fn describe<'e>(self, sql: SqlStr) -> BoxFuture<'e, sqlx::Result<Describe<Any>>>
    where
        'c: 'e,
    {
        Box::pin(self.read(async move |connection| connection.describe(sql).await))
    }
}

#[cfg(test)]
mod tests {
    use futures::future::join_all;

    use super::super::Store;
    use super::super::testing::{Proxy, both_databases};
    use super::*;

    async fn read(store: &Store) -> Result<i64, StoreError> {
        // Long enough that as many as are asked at once have a connection each.
        let sql = "SELECT CAST(7 AS BIGINT) FROM pg_sleep(0.1)";
        Ok(sqlx::query_scalar(sql).fetch_one(store.reader()).await?)
    }

    #[tokio::test]
    async fn what_is_asked_of_a_host_that_vanishes_without_a_word_fails_and_what_is_asked_later_does_not() {
        both_databases(|url| async move {
            if url.starts_with("sqlite:") {
                return;
            }
            let proxy = Proxy::before(&url).await;
            let store = Store::open_with(&proxy.url, Duration::from_secs(3)).await.unwrap();
            let many = || join_all((0..20).map(|_| read(&store)));
            let all = async {
                for result in many().await {
                    assert_eq!(result.unwrap(), 7);
                }
                proxy.silent.send_replace(true);
                let (reads, written) =
                    tokio::join!(join_all((0..8).map(|_| read(&store))), store.write(|_| Box::pin(async { Ok(()) })));
                for error in reads.into_iter().map(Result::unwrap_err).chain([written.unwrap_err()]) {
                    assert!(matches!(error, StoreError::Silent(_) | StoreError::Unreached), "{error}");
                }
                proxy.silent.send_replace(false);
                for result in many().await {
                    assert_eq!(result.unwrap(), 7);
                }
                store.write(|_| Box::pin(async { Ok(()) })).await.unwrap();
                // Those who ask may be gone before the deadline.
                proxy.silent.send_replace(true);
                timeout(Duration::from_millis(100), many()).await.unwrap_err();
                proxy.silent.send_replace(false);
                for result in many().await {
                    assert_eq!(result.unwrap(), 7);
                }
            };
            timeout(Duration::from_secs(90), all).await.expect("nothing waits for the old connections");
            store.close().await;
        })
        .await;
    }
}
