//! Stores for this crate's own tests: [`both_stores`] runs a test on SQLite and on PostgreSQL. The files live in `testbed/`,
//! which the integration tests and the demo include too.
#![allow(dead_code, missing_docs, clippy::expect_used, clippy::panic, clippy::unwrap_used)]

#[path = "../../testbed/packages.rs"]
mod packages;
#[path = "../../testbed/postgres.rs"]
mod postgres;
#[path = "../../testbed/process.rs"]
mod process;
#[path = "../../testbed/stores.rs"]
mod stores;

use std::net::SocketAddr;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use sqlx::{AnyConnection, Connection as _};

use super::Store;
use super::claim::LOCK;

pub(crate) use self::stores::{both_databases, both_stores};

/// A way to a server. While `silent` is true nothing passes and nothing is closed; what was connected then never speaks again.
pub(crate) struct Proxy {
    pub url: String,
    pub silent: watch::Sender<bool>,
    _task: JoinSet<()>,
}

impl Proxy {
    pub async fn before(url: &str) -> Self {
        let mut url = url::Url::parse(url).unwrap();
        let server: SocketAddr = format!("{}:{}", url.host_str().unwrap(), url.port().unwrap()).parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        url.set_port(Some(listener.local_addr().unwrap().port())).unwrap();
        let (silent, heard) = watch::channel(false);
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut ways = JoinSet::new();
            while let Ok((mut near, _)) = listener.accept().await {
                let mut heard = heard.clone();
                ways.spawn(async move {
                    let mut far = TcpStream::connect(server).await.unwrap();
                    let silence = async {
                        let _ = heard.wait_for(|silent| *silent).await;
                    };
                    tokio::select! {
                        biased;
                        () = silence => {}
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => return,
                    }
                    // The sockets stay open.
                    std::future::pending::<()>().await;
                    drop((near, far));
                });
            }
        });
        Self { url: url.into(), silent, _task: task }
    }
}

/// Ends the session of PostgreSQL that has the database's lock.
pub(crate) async fn end_claiming_session(admin: &mut AnyConnection) {
    let end = "SELECT CAST(COUNT(pg_terminate_backend(pid)) AS BIGINT) FROM pg_locks WHERE locktype = 'advisory' AND granted \
               AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    assert_eq!(sqlx::query_as::<_, (i64,)>(end).fetch_one(admin).await.unwrap().0, 1);
}

/// A session that has taken the database's lock from the one that had it.
pub(crate) async fn take_claim_away(url: &str) -> AnyConnection {
    let mut admin = AnyConnection::connect(url).await.unwrap();
    let mut thief = AnyConnection::connect(url).await.unwrap();
    let take = sqlx::query("SELECT 1 FROM pg_advisory_lock($1)").bind(LOCK);
    let (taken, ()) = tokio::join!(take.execute(&mut thief), async {
        // Whoever waits first is the next.
        let waiting = "SELECT CAST(COUNT(*) AS BIGINT) FROM pg_locks WHERE NOT granted \
                       AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
        while sqlx::query_as::<_, (i64,)>(waiting).fetch_one(&mut admin).await.unwrap().0 == 0 {}
        end_claiming_session(&mut admin).await;
    });
    taken.unwrap();
    thief
}
