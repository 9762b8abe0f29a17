//! The store: SQLite or PostgreSQL behind one set of SQL. Everything durable goes through [`Store::write`], which groups
//! the commits of all rooms and answers only after the commit (INV-6). One file per aggregate beside this one.
//!
//! Rules for the SQL here: `$n` placeholders; columns TEXT, BIGINT and BYTEA; peer-chosen strings go through [`text`].

pub mod appservice;
mod claim;
pub mod dag;
pub mod gaps;
pub mod ghosts;
mod ids;
pub mod images;
pub mod inbox;
pub mod invitations;
pub mod lm;
pub mod media;
pub mod outbound;
pub mod outbound_edus;
pub mod outliers;
pub mod overview;
pub mod owed;
pub mod portals;
pub mod pruning;
mod reader;
pub mod redactions;
mod rows;
pub mod server_keys;
pub mod spaces;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
pub mod text;
pub mod times;
pub mod to_device;
pub mod transactions;
mod writer;

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::str::FromStr as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use sqlx::any::{AnyConnectOptions, AnyPoolOptions};
use sqlx::{AnyConnection, Connection as _, Executor as _};
use tokio::time::timeout;

use self::claim::{Claim, Loss};
use self::ids::Ids;
use self::reader::Lent;
pub use self::reader::Reader;
use self::writer::{Busy, Workshop, Writer};

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
    #[error("the database: {}", said(.0))]
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
    /// The database could not be opened.
    #[error("the database cannot be opened ({problem}): {advice}")]
    Unopened {
        /// What happened.
        problem: String,
        /// What to do about it.
        advice: &'static str,
    },
    /// Another process serves from the same database.
    #[error("another isthmus serves from this database: stop it first, or name another one in `database.url`")]
    InUse,
    /// Another process has served from the database since this one lost its claim.
    #[error("another isthmus has served from this database meanwhile: what is in memory here is old")]
    Overtaken,
    /// The database did not answer; whether it did what it was told is not known.
    #[error("the database did not answer within {} s", .0.as_secs())]
    Silent(Duration),
    /// No connection to the database was to be had.
    #[error("no connection to the database was to be had in time")]
    Unreached,
    /// A write job ended in a panic; its part of the transaction was rolled back.
    #[error("a write job panicked")]
    Panicked,
    /// The store is shutting down.
    #[error("the store is closed")]
    Closed,
}

/// What a database says, without the words that say that it says it.
fn said(error: &sqlx::Error) -> String {
    let text = error.to_string();
    text.strip_prefix("error returned from database: ").map_or_else(|| text.clone(), str::to_owned)
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        let said = match &error {
            sqlx::Error::Io(error) => error.get_ref().and_then(|inner| inner.downcast_ref::<Self>()).cloned(),
            sqlx::Error::PoolTimedOut => Some(Self::Unreached),
            _ => None,
        };
        said.unwrap_or_else(|| Self::Database(Arc::new(error)))
    }
}

impl StoreError {
    /// Whether the database is to blame, rather than what it was asked.
    fn is_of_the_database(&self) -> bool {
        match self {
            Self::Silent(_) | Self::Unreached => true,
            Self::Database(error) => match &**error {
                sqlx::Error::Database(error) => error.kind() == sqlx::error::ErrorKind::Other,
                error => matches!(
                    error,
                    sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed
                ),
            },
            _ => false,
        }
    }

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

impl Backend {
    /// Which database a URL names.
    pub fn of(url: &str) -> Self {
        if url.starts_with("sqlite:") { Self::Sqlite } else { Self::Postgres }
    }

    /// What to do when the database cannot be opened, for this reason.
    pub fn advice(self, problem: &str) -> &'static str {
        let says = |text: &str| problem.contains(text);
        match self {
            Self::Sqlite if says("file is not a database") || says("malformed") => {
                "restore the file from a backup, or name another one in `database.url`"
            }
            Self::Sqlite if says("disk is full") || says("disk I/O error") || says("No space left") => {
                "make space on its disk"
            }
            Self::Sqlite => "make the file and its folder readable and writable for the gateway",
            Self::Postgres if says("permission denied for schema") => {
                "make the gateway's user the owner of the database, or grant it CREATE on the schema"
            }
            Self::Postgres => "start PostgreSQL, or correct host, database, user and password in `database.url`",
        }
    }

    /// What is set on each connection.
    fn settings(self) -> &'static str {
        match self {
            Self::Sqlite => {
                "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; \
                 PRAGMA busy_timeout = 10000; PRAGMA cache_size = -32768; PRAGMA temp_store = MEMORY; \
                 PRAGMA wal_autocheckpoint = 16000;"
            }
            Self::Postgres => SESSION,
        }
    }
}

/// How long a database may take to let itself be opened.
const OPENING: Duration = Duration::from_secs(10);

/// The file that a SQLite URL names.
pub fn sqlite_file(url: &str) -> PathBuf {
    let file = url.strip_prefix("sqlite://").unwrap_or(url);
    let file = file.split('?').next().unwrap_or_default();
    PathBuf::from(percent_encoding::percent_decode_str(file).decode_utf8_lossy().into_owned())
}

/// One connection, with the reason when there is none; a pool would try until its time is up, and say only that it is.
pub(crate) async fn connect(url: &str) -> Result<AnyConnection, StoreError> {
    sqlx::any::install_default_drivers();
    match timeout(OPENING, AnyConnection::connect(url)).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(error)) => Err(unopened(url, said(&error))),
        Err(_) => Err(unopened(url, format!("no answer within {} s", OPENING.as_secs()))),
    }
}

fn unopened(url: &str, problem: impl ToString) -> StoreError {
    let (backend, mut problem) = (Backend::of(url), problem.to_string());
    if backend == Backend::Sqlite {
        problem = format!("{}: {problem}", sqlite_file(url).display());
    }
    StoreError::Unopened { advice: backend.advice(&problem), problem }
}

/// Makes a SQLite file that is absent, for its owner's eyes only: it holds what people say to each other. What SQLite puts
/// beside it gets the same permissions.
fn make_private(url: &str) -> std::io::Result<()> {
    let path = sqlite_file(url);
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        made => made.map(drop),
    }
}

/// A handle to the store; clones share it.
#[derive(Clone)]
pub struct Store {
    readers: Reader,
    writer: Writer,
    backend: Backend,
    ids: Arc<Ids>,
    loss: Loss,
}

/// How many reading connections are kept.
const READERS: u32 = 8;
/// How long it may take to get a connection.
const ACQUIRING: Duration = Duration::from_secs(30);
/// A connection to a server that was idle for longer is asked whether it is still there before it is used.
const FRESH: Duration = Duration::from_secs(1);
/// How long it may take to answer that.
const ANSWERING: Duration = Duration::from_secs(5);
/// What a PostgreSQL server is told about a session, so that it too ends one whose other end has vanished without a word: with
/// it go the locks that it holds.
const SESSION: &str = "SET tcp_keepalives_idle = 30; SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 3; \
                       SET tcp_user_timeout = 60000; SET idle_in_transaction_session_timeout = 90000";

impl Store {
    /// Opens the database at `url` (`sqlite://PATH` or `postgres://…`), creating a SQLite file that is absent, and brings
    /// its schema up to date.
    pub async fn open(url: &str) -> Result<Self, StoreError> {
        Self::open_with(url, writer::PATIENCE).await
    }

    /// The same, while no other process has opened it so: for a process that serves from it.
    pub async fn open_alone(url: &str) -> Result<Self, StoreError> {
        Self::open_alone_within(url, claim::PATIENCE).await
    }

    async fn open_with(url: &str, patience: Duration) -> Result<Self, StoreError> {
        Self::open_as(url, patience, None).await
    }

    async fn open_alone_within(url: &str, others: Duration) -> Result<Self, StoreError> {
        Self::open_alone_with(url, writer::PATIENCE, others).await
    }

    async fn open_alone_with(url: &str, patience: Duration, others: Duration) -> Result<Self, StoreError> {
        Self::open_as(url, patience, Some(others)).await
    }

    /// `others` is how long a process that serves from it may take to end.
    async fn open_as(url: &str, patience: Duration, others: Option<Duration>) -> Result<Self, StoreError> {
        sqlx::any::install_default_drivers();
        let backend = Backend::of(url);
        let mut claim = Claim::None;
        if backend == Backend::Sqlite {
            if let Some(others) = others {
                claim = Claim::file(url, others).await?;
            }
            make_private(url).map_err(|error| unopened(url, error))?;
        }
        let mut first = connect(url).await?;
        first.execute(backend.settings()).await.map_err(|error| unopened(url, said(&error)))?;
        first.close().await?;
        let options = AnyConnectOptions::from_str(url)?;
        // The session that writes may have the claim: it does not end because of its age.
        let pool = pool_options(backend, 1, patience).max_lifetime(None).idle_timeout(None);
        let pool = pool.connect_with(options.clone()).await?;
        let mut lent = Lent::of(&pool).await?;
        let loss = Loss::default();
        if let (Backend::Postgres, Some(others)) = (backend, others) {
            claim = Claim::session(lent.connection()?, others, loss.clone()).await?;
        }
        migrate(lent.connection()?).await.map_err(|error| match error.to_string() {
            problem if problem.contains("permission denied") || problem.contains("disk") => unopened(url, problem),
            _ => error,
        })?;
        let readers = pool_options(backend, READERS, patience).connect_with(options).await?;
        let ids = Arc::new(Ids::default());
        ids.reserve(lent.connection()?).await?;
        let writer = Writer::start(Workshop {
            pool,
            held: Some((lent, Instant::now())),
            claim,
            readers: readers.clone(),
            backend,
            ids: ids.clone(),
            patience,
            busy_since: Busy::default(),
        });
        Ok(Self { readers: Reader::new(readers, patience), writer, backend, ids, loss })
    }

    /// Which database this is.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Connections for reading. What they read may be older than a write that is under way, never than one that was
    /// answered. A read that takes longer than a transaction may is given up.
    pub fn reader(&self) -> &Reader {
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

    /// How long ago the database last failed to do a write, and how.
    pub fn write_failed(&self) -> Option<(Duration, String)> {
        self.writer.failed()
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

fn pool_options(backend: Backend, size: u32, patience: Duration) -> AnyPoolOptions {
    let options = AnyPoolOptions::new().max_connections(size).test_before_acquire(false);
    let options = options.acquire_timeout(patience.min(ACQUIRING));
    // A file does not go away as a server does: asking it first would double the cost of a small read.
    let options = match backend {
        Backend::Sqlite => options,
        Backend::Postgres => options.before_acquire(|connection, meta| {
            Box::pin(async move {
                Ok(meta.idle_for < FRESH || matches!(timeout(ANSWERING, connection.ping()).await, Ok(Ok(()))))
            })
        }),
    };
    options.after_connect(move |connection, _| {
        Box::pin(async move { connection.execute(backend.settings()).await.map(drop) })
    })
}

async fn migrate(connection: &mut AnyConnection) -> Result<(), StoreError> {
    connection.ping().await?;
    sqlx::migrate!().run(connection).await.map_err(|error| StoreError::Migration(Arc::new(error)))
}
