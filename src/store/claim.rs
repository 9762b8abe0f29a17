//! One process to a database: two would both send what waits for other servers.
//!
//! A SQLite file is claimed by a lock beside it. A PostgreSQL database is claimed by an advisory lock of the very session that
//! writes, so that nothing is ever committed without it. When that session breaks, the one that follows it takes the lock again
//! before anything is written; where another process was quicker, nothing is written any more.

use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sqlx::AnyConnection;

use super::ids::Ids;
use super::writer::lock;
use super::{Backend, Store, StoreError, sqlite_file};

/// How long a process that was just killed may take to let go of the database.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// How long the server may take to end a session of ours of which only it still knows.
const ENDING: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(100);
/// How often it is looked whether the database is still ours.
const EVERY: Duration = Duration::from_secs(5);
/// The advisory lock that means this, in the database of PostgreSQL that is ours: "isthmus" in ASCII.
pub(super) const LOCK: i64 = 0x0069_7374_686d_7573;

/// What keeps other processes from the database. It ends with the process, however that ends.
pub(super) enum Claim {
    /// Nothing: for tests, where nobody else is.
    None,
    /// The lock beside a SQLite file.
    File { _file: File },
    /// The lock of the writing session.
    Session(Session),
}

/// Why the database is not ours, while that is so.
#[derive(Clone, Default)]
pub(super) struct Loss(Arc<Mutex<Option<StoreError>>>);

impl Loss {
    fn set(&self, loss: Option<StoreError>) {
        *lock(&self.0) = loss;
    }
}

/// The session that has the lock, or had it last: which process of the server it is, and since when.
pub(super) struct Session {
    process: i64,
    since: i64,
    loss: Loss,
}

impl Claim {
    /// Claims a SQLite file, which need not be there yet.
    pub(super) async fn file(url: &str, patience: Duration) -> Result<Self, StoreError> {
        let start = Instant::now();
        loop {
            match lock_file(url)? {
                Some(file) => return Ok(Self::File { _file: file }),
                None if start.elapsed() >= patience => return Err(StoreError::InUse),
                None => tokio::time::sleep(PAUSE).await,
            }
        }
    }

    /// Claims a database of PostgreSQL for the session that will write.
    pub(super) async fn session(
        connection: &mut AnyConnection,
        patience: Duration,
        loss: Loss,
    ) -> Result<Self, StoreError> {
        if !lock_within(connection, patience).await? {
            return Err(StoreError::InUse);
        }
        let (process, since) = identify(connection).await?;
        Ok(Self::Session(Session { process, since, loss }))
    }

    /// Takes the lock for the session that follows the one that had it.
    pub(super) async fn take_again(&mut self, connection: &mut AnyConnection, ids: &Ids) -> Result<(), StoreError> {
        let Self::Session(session) = self else { return Ok(()) };
        let taken = session.take_again(connection, ids).await;
        match &taken {
            Ok(()) => tracing::warn!("the session that wrote to the database broke; another has its lock now"),
            Err(error) => tracing::error!(%error, "the lock of the database is lost, nothing is written"),
        }
        if let Ok(()) | Err(StoreError::InUse | StoreError::Overtaken) = &taken {
            session.loss.set(taken.clone().err());
        }
        taken
    }
}

impl Session {
    async fn take_again(&mut self, connection: &mut AnyConnection, ids: &Ids) -> Result<(), StoreError> {
        if !lock_now(connection).await? {
            // The server may not have noticed yet that nobody is at the other end of the session that broke.
            let end = "SELECT CAST(COUNT(pg_terminate_backend(pid)) AS BIGINT) FROM pg_stat_activity \
                       WHERE pid = CAST($1 AS INTEGER) \
                       AND CAST(EXTRACT(EPOCH FROM backend_start) * 1000000 AS BIGINT) = $2";
            sqlx::query(end).bind(self.process).bind(self.since).execute(&mut *connection).await?;
            if !lock_within(connection, ENDING).await? {
                return Err(StoreError::InUse);
            }
        }
        // Whoever opens the database to serve from it takes numbers; what this process has in memory would be old then.
        if !ids.are_the_last(connection).await? {
            return Err(StoreError::Overtaken);
        }
        (self.process, self.since) = identify(connection).await?;
        Ok(())
    }
}

impl Store {
    /// Why another process may serve from the database now; none while this one does.
    pub fn claim_lost(&self) -> Option<StoreError> {
        lock(&self.loss.0).clone()
    }

    /// Looks after the claim, and returns when it is lost.
    pub async fn lose_claim(&self) -> StoreError {
        self.lose_claim_looking(EVERY).await
    }

    async fn lose_claim_looking(&self, every: Duration) -> StoreError {
        loop {
            tokio::time::sleep(every).await;
            // A lock beside a file stays. The writing session is seen to be there by writing nothing.
            if self.backend == Backend::Postgres {
                let _ = self.write(|_| Box::pin(async { Ok(()) })).await;
            }
            if let Some(loss) = self.claim_lost() {
                return loss;
            }
        }
    }
}

/// The lock beside a SQLite file; none while another process has it.
fn lock_file(url: &str) -> Result<Option<File>, StoreError> {
    let mut path = sqlite_file(url).into_os_string();
    path.push(".lock");
    let path = PathBuf::from(path);
    let failed = |error: std::io::Error| StoreError::Unopened {
        problem: format!("{}: {error}", path.display()),
        advice: Backend::Sqlite.advice(""),
    };
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(failed(error)),
    }
}

async fn lock_within(connection: &mut AnyConnection, patience: Duration) -> Result<bool, StoreError> {
    let start = Instant::now();
    while !lock_now(connection).await? {
        if start.elapsed() >= patience {
            return Ok(false);
        }
        tokio::time::sleep(PAUSE).await;
    }
    Ok(true)
}

async fn lock_now(connection: &mut AnyConnection) -> Result<bool, StoreError> {
    let ask = "SELECT CASE WHEN pg_try_advisory_lock($1) THEN CAST(1 AS BIGINT) ELSE CAST(0 AS BIGINT) END";
    let (got,): (i64,) = sqlx::query_as(ask).bind(LOCK).fetch_one(connection).await?;
    Ok(got == 1)
}

async fn identify(connection: &mut AnyConnection) -> Result<(i64, i64), StoreError> {
    let ask = "SELECT CAST(pid AS BIGINT), CAST(EXTRACT(EPOCH FROM backend_start) * 1000000 AS BIGINT) \
               FROM pg_stat_activity WHERE pid = pg_backend_pid()";
    Ok(sqlx::query_as(ask).fetch_one(connection).await?)
}

#[cfg(test)]
mod tests {
    use sqlx::Connection as _;

    use super::super::testing::{Proxy, both_databases, end_claiming_session, take_claim_away};
    use super::*;

    const NOW: Duration = Duration::ZERO;

    async fn write(store: &Store) -> Result<(), StoreError> {
        store.write(|_| Box::pin(async { Ok(()) })).await
    }

    /// Writes when that is possible again: a busy machine may not get a session in the short time that these stores wait for one.
    async fn written(store: &Store) {
        let writing = async {
            while write(store).await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), writing).await.unwrap();
    }

    #[tokio::test]
    async fn hc_65_one_process_at_a_time_serves_from_a_database() {
        both_databases(|url| async move {
            let first = Store::open_alone_within(&url, NOW).await.unwrap();
            let second = Store::open_alone_within(&url, NOW).await.err().unwrap();
            assert!(matches!(second, StoreError::InUse), "{second}");
            first.close().await;
            Store::open_alone_within(&url, PATIENCE).await.unwrap().close().await;
        })
        .await;
    }

    #[tokio::test]
    async fn a_session_that_breaks_is_followed_by_one_with_its_lock() {
        both_databases(|url| async move {
            if Backend::of(&url) == Backend::Sqlite {
                return;
            }
            let proxy = Proxy::before(&url).await;
            let store = Store::open_alone_with(&proxy.url, Duration::from_secs(3), NOW).await.unwrap();
            let mut admin = AnyConnection::connect(&url).await.unwrap();
            end_claiming_session(&mut admin).await;
            // What was about to be written may fail, or not.
            let _ = write(&store).await;
            written(&store).await;
            assert!(matches!(Store::open_alone_within(&url, NOW).await, Err(StoreError::InUse)));
            // The server does not see that this session is over, and keeps its lock.
            proxy.silent.send_replace(true);
            write(&store).await.unwrap_err();
            proxy.silent.send_replace(false);
            written(&store).await;
            assert!(matches!(Store::open_alone_within(&url, NOW).await, Err(StoreError::InUse)));
            assert!(store.claim_lost().is_none());
            store.close().await;
        })
        .await;
    }

    #[tokio::test]
    async fn inv_6_nothing_is_written_once_another_process_has_the_lock_or_had_it() {
        both_databases(|url| async move {
            if Backend::of(&url) == Backend::Sqlite {
                return;
            }
            let store = Store::open_alone_within(&url, NOW).await.unwrap();
            let mut admin = AnyConnection::connect(&url).await.unwrap();
            let other = take_claim_away(&url).await;
            let loss = store.lose_claim_looking(Duration::from_millis(10)).await;
            assert!(matches!(loss, StoreError::InUse), "{loss}");
            assert!(matches!(write(&store).await, Err(StoreError::InUse)));
            // It goes, and has written nothing.
            other.close().await.unwrap();
            write(&store).await.unwrap();
            assert!(store.claim_lost().is_none());

            end_claiming_session(&mut admin).await;
            Store::open_alone_within(&url, PATIENCE).await.unwrap().close().await;
            let loss = store.lose_claim_looking(Duration::from_millis(10)).await;
            assert!(matches!(loss, StoreError::Overtaken), "{loss}");
            assert!(matches!(write(&store).await, Err(StoreError::Overtaken)));
            store.close().await;
        })
        .await;
    }
}
