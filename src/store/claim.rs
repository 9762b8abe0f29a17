//! One process to a database: two would both send what waits for other servers.

use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::time::Duration;

use sqlx::{AnyConnection, Connection as _};

use super::{Backend, StoreError, connect, sqlite_file};

/// How long a process that was just killed may take to let go of the database.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(200);
/// The advisory lock that means this, in the database of PostgreSQL that is ours: "isthmus" in ASCII.
const LOCK: i64 = 0x0069_7374_686d_7573;

/// Held by the process that serves from a database; it ends with the process, however that ends.
#[derive(Debug)]
pub struct Claim {
    _holder: Holder,
}

#[derive(Debug)]
enum Holder {
    File { _file: File },
    Connection { _connection: AnyConnection },
}

/// Claims the database at `url`, which need not be there yet if it is a file.
pub async fn claim(url: &str) -> Result<Claim, StoreError> {
    claim_within(url, PATIENCE).await
}

async fn claim_within(url: &str, patience: Duration) -> Result<Claim, StoreError> {
    let start = std::time::Instant::now();
    let mut connection = match Backend::of(url) {
        Backend::Sqlite => None,
        Backend::Postgres => Some(connect(url).await?),
    };
    loop {
        let taken = match connection.take() {
            None => lock_file(url)?.map(|file| Holder::File { _file: file }),
            Some(mut held) => {
                if lock_database(&mut held).await? {
                    Some(Holder::Connection { _connection: held })
                } else {
                    connection = Some(held);
                    None
                }
            }
        };
        match taken {
            Some(holder) => return Ok(Claim { _holder: holder }),
            None if start.elapsed() >= patience => return Err(StoreError::InUse),
            None => tokio::time::sleep(PAUSE).await,
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
        advice: Backend::Sqlite.advice(),
    };
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(failed(error)),
    }
}

async fn lock_database(connection: &mut AnyConnection) -> Result<bool, StoreError> {
    connection.ping().await?;
    let ask = "SELECT CASE WHEN pg_try_advisory_lock($1) THEN CAST(1 AS BIGINT) ELSE CAST(0 AS BIGINT) END";
    let (got,): (i64,) = sqlx::query_as(ask).bind(LOCK).fetch_one(connection).await?;
    Ok(got == 1)
}

#[cfg(test)]
mod tests {
    use super::super::testing::both_databases;
    use super::*;

    #[tokio::test]
    async fn one_process_at_a_time_serves_from_a_database() {
        both_databases(|url| async move {
            let first = claim_within(&url, Duration::ZERO).await.unwrap();
            let second = claim_within(&url, Duration::ZERO).await.unwrap_err();
            assert!(matches!(second, StoreError::InUse), "{second}");
            drop(first);
            claim_within(&url, Duration::from_secs(10)).await.unwrap();
        })
        .await;
    }
}
