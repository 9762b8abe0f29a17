//! The store: SQLite or PostgreSQL behind one set of SQL. Everything durable goes through [`Store::write`], which groups
//! the commits of all rooms and answers only after the commit (INV-6). One file per aggregate beside this one.
//!
//! Rules for the SQL here: `$n` placeholders; columns TEXT, BIGINT and BYTEA; peer-chosen strings go through [`text`].

pub mod appservice;
pub mod dag;
pub mod ghosts;
mod ids;
pub mod images;
pub mod inbox;
pub mod lm;
pub mod outbound;
pub mod overview;
pub mod portals;
pub mod pruning;
mod rows;
pub mod server_keys;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
pub mod text;
pub mod transactions;
mod writer;

use std::str::FromStr as _;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use sqlx::any::{AnyConnectOptions, AnyPoolOptions};
use sqlx::{AnyConnection, AnyPool, Connection as _, Executor as _};

use self::ids::Ids;
use self::writer::Writer;

/// The connection that a write job works on, inside the transaction that is open for it.
pub type Tx = AnyConnection;

/// What a write job returns while it borrows its transaction.
pub type TxFuture<'c, T> = BoxFuture<'c, Result<T, StoreError>>;

/// Something that is written in the same transaction as the event it belongs to.
pub type Effect = Box<dyn for<'c> FnOnce(&'c mut Tx) -> TxFuture<'c, ()> + Send>;

/// Why the store could not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The database answered with an error or could not be reached.
    #[error("database: {0}")]
    Database(Arc<sqlx::Error>),
    /// The schema could not be brought up to date, for instance because a newer isthmus has written it.
    #[error("database schema: {0}")]
    Migration(Arc<sqlx::migrate::MigrateError>),
    /// A row holds what this program would never have written.
    #[error("the store holds a bad {what}: {problem}")]
    Corrupt {
        /// Which column or object.
        what: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// A write job found that what it was to do must not be done, and took its changes back.
    #[error("withdrawn: {0}")]
    Withdrawn(&'static str),
    /// The database did not answer; whether it did what it was told is not known.
    #[error("the database did not answer within {} s", .0.as_secs())]
    Silent(Duration),
    /// A write job ended in a panic; its part of the transaction was rolled back.
    #[error("a write job panicked")]
    Panicked,
    /// The store is shutting down.
    #[error("the store is closed")]
    Closed,
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(Arc::new(error))
    }
}

impl StoreError {
    /// A [`StoreError::Corrupt`].
    pub fn corrupt(what: &'static str, problem: impl ToString) -> Self {
        Self::Corrupt { what, problem: problem.to_string() }
    }
}

/// Which database stands behind the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// One file, write-ahead log, `synchronous=FULL`.
    Sqlite,
    /// A PostgreSQL server.
    Postgres,
}

/// A handle to the store; clones share it.
#[derive(Clone)]
pub struct Store {
    readers: AnyPool,
    writer: Writer,
    backend: Backend,
    ids: Arc<Ids>,
}

/// How many reading connections are kept.
const READERS: u32 = 8;

impl Store {
    /// Opens the database at `url` (`sqlite://PATH` or `postgres://…`), creating a SQLite file that is absent, and brings
    /// its schema up to date.
    pub async fn open(url: &str) -> Result<Self, StoreError> {
        Self::open_with(url, writer::PATIENCE).await
    }

    async fn open_with(url: &str, patience: Duration) -> Result<Self, StoreError> {
        sqlx::any::install_default_drivers();
        let backend = if url.starts_with("sqlite:") { Backend::Sqlite } else { Backend::Postgres };
        let url = match backend {
            Backend::Sqlite if !url.contains('?') => format!("{url}?mode=rwc"),
            _ => url.to_owned(),
        };
        let options = AnyConnectOptions::from_str(&url)?;
        let writers = pool_options(backend, 1).connect_with(options.clone()).await?;
        migrate(&writers).await?;
        let readers = pool_options(backend, READERS).connect_with(options).await?;
        let ids = Arc::new(Ids::default());
        ids.reserve(&mut *writers.acquire().await?).await?;
        let writer = Writer::start(writers, readers.clone(), backend, ids.clone(), patience);
        Ok(Self { readers, writer, backend, ids })
    }

    /// Which database this is.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Connections for reading. What they read may be older than a write that is under way, never than one that was
    /// answered.
    pub fn reader(&self) -> &AnyPool {
        &self.readers
    }

    /// Runs `job` inside a transaction that may be shared with other jobs, and returns after it is committed. A job that
    /// fails takes only its own changes back. A job does no other I/O than SQL: all rooms wait for it.
    pub async fn write<T, F>(&self, job: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: for<'c> FnOnce(&'c mut Tx) -> TxFuture<'c, T> + Send + 'static,
    {
        self.writer.write(job).await
    }

    /// For how long the write that is under way has been so; zero when none is.
    pub fn write_lasts(&self) -> Duration {
        self.writer.busy_for()
    }

    /// The next of a sequence of numbers that grows for ever, across restarts too. Asked for inside write jobs, the numbers
    /// grow in the order of the jobs.
    pub fn next_id(&self) -> i64 {
        self.ids.next()
    }

    /// Waits until everything that was submitted is written, then closes the connections.
    pub async fn close(&self) {
        self.writer.close().await;
        self.readers.close().await;
    }
}

fn pool_options(backend: Backend, size: u32) -> AnyPoolOptions {
    // A file does not go away as a server does: asking it first would double the cost of a small read.
    let options = AnyPoolOptions::new().test_before_acquire(backend == Backend::Postgres);
    options.max_connections(size).acquire_timeout(Duration::from_secs(30)).after_connect(move |connection, _| {
        Box::pin(async move {
            if backend == Backend::Sqlite {
                connection
                    .execute(
                        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; \
                             PRAGMA busy_timeout = 10000; PRAGMA cache_size = -32768; PRAGMA temp_store = MEMORY; \
                             PRAGMA wal_autocheckpoint = 16000;",
                    )
                    .await?;
            }
            Ok(())
        })
    })
}

async fn migrate(pool: &AnyPool) -> Result<(), StoreError> {
    let mut connection = pool.acquire().await?;
    connection.ping().await?;
    sqlx::migrate!().run(&mut *connection).await.map_err(|error| StoreError::Migration(Arc::new(error)))
}
