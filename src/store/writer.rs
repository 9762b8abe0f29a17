//! The one writer: takes jobs from everywhere, runs as many as are waiting inside one transaction, each in a savepoint of
//! its own, commits once, and only then answers.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::FutureExt as _;
use futures::future::BoxFuture;
use sqlx::{AnyConnection, AnyPool, Executor as _};
use tokio::sync::{Mutex, Notify, mpsc, oneshot};
use tokio::task::JoinHandle;

use super::claim::Claim;
use super::ids::Ids;
use super::reader::Lent;
use super::{ANSWERING, Backend, FRESH, StoreError, Tx, TxFuture};
use crate::admin::metrics;

/// How many jobs share a transaction at most.
const GROUP: usize = 256;
/// How many jobs may wait before those who submit more wait too.
const QUEUE: usize = 4096;
/// How long a transaction may take. A database that has vanished without a word would never answer.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// How long what was written waits for its checkpoint.
const CHECKPOINT_EVERY: Duration = Duration::from_millis(500);

#[derive(Clone)]
pub(super) struct Writer {
    jobs: mpsc::Sender<Message>,
    task: Arc<Mutex<Option<JoinHandle<()>>>>,
    busy_since: Busy,
    failed: Arc<std::sync::Mutex<Option<(Instant, String)>>>,
}

/// When the transaction began that is under way.
pub(super) type Busy = Arc<std::sync::Mutex<Option<Instant>>>;

/// What the writer's task works with.
pub(super) struct Workshop {
    pub pool: AnyPool,
    /// The one connection of the pool, and when it was last used. It is not given back: the claim may be its own.
    pub held: Option<(Lent, Instant)>,
    pub claim: Claim,
    pub readers: AnyPool,
    pub backend: Backend,
    pub ids: Arc<Ids>,
    pub patience: Duration,
    pub busy_since: Busy,
}

enum Message {
    Job(Box<dyn Job>),
    Stop,
}

trait Job: Send {
    /// Does the work; false when its changes must be taken back.
    fn run<'c>(&'c mut self, tx: &'c mut Tx) -> BoxFuture<'c, bool>;
    /// Tells the submitter, after the transaction ended.
    fn finish(self: Box<Self>, committed: Result<(), StoreError>);
}

struct TypedJob<T, F> {
    work: Option<F>,
    result: Option<Result<T, StoreError>>,
    reply: oneshot::Sender<Result<T, StoreError>>,
}

impl<T, F> Job for TypedJob<T, F>
where
    T: Send + 'static,
    F: for<'c> FnOnce(&'c mut Tx) -> TxFuture<'c, T> + Send + 'static,
{
    fn run<'c>(&'c mut self, tx: &'c mut Tx) -> BoxFuture<'c, bool> {
        Box::pin(async move {
            let Some(work) = self.work.take() else { return false };
            let work = AssertUnwindSafe(async { work(tx).await }).catch_unwind();
            let result = work.await.unwrap_or(Err(StoreError::Panicked));
            let ok = result.is_ok();
            self.result = Some(result);
            ok
        })
    }

    fn finish(self: Box<Self>, committed: Result<(), StoreError>) {
        let result = match (self.result, committed) {
            (Some(Ok(value)), Ok(())) => Ok(value),
            (Some(Err(error)), _) | (_, Err(error)) => Err(error),
            (None, Ok(())) => Err(StoreError::Closed),
        };
        // The submitter may have gone away; what it asked for is done all the same.
        let _ = self.reply.send(result);
    }
}

impl Writer {
    pub(super) fn start(workshop: Workshop) -> Self {
        let (jobs, inbox) = mpsc::channel(QUEUE);
        let busy_since = workshop.busy_since.clone();
        let task = tokio::spawn(run(workshop, inbox));
        Self { jobs, task: Arc::new(Mutex::new(Some(task))), busy_since, failed: Arc::default() }
    }

    /// For how long the transaction that is under way has been so.
    pub(super) fn busy_for(&self) -> Duration {
        lock(&self.busy_since).map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// How long ago the database last failed to do a job, and how.
    pub(super) fn failed(&self) -> Option<(Duration, String)> {
        lock(&self.failed).as_ref().map(|(at, how)| (at.elapsed(), how.clone()))
    }

    pub(super) async fn write<T, F>(&self, work: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: for<'c> FnOnce(&'c mut Tx) -> TxFuture<'c, T> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let job = TypedJob { work: Some(work), result: None, reply };
        self.jobs.send(Message::Job(Box::new(job))).await.map_err(|_| StoreError::Closed)?;
        let result = answer.await.map_err(|_| StoreError::Closed)?;
        if let Err(error) = &result
            && error.is_of_the_database()
        {
            *lock(&self.failed) = Some((Instant::now(), error.to_string()));
        }
        result
    }

    pub(super) async fn close(&self) {
        if let Some(task) = self.task.lock().await.take() {
            let _ = self.jobs.send(Message::Stop).await;
            let _ = task.await;
        }
    }
}

async fn run(mut workshop: Workshop, mut inbox: mpsc::Receiver<Message>) {
    let written = Arc::new(Notify::new());
    let checkpoints = (workshop.backend == Backend::Sqlite)
        .then(|| tokio::spawn(checkpoints(workshop.readers.clone(), written.clone())));
    let mut stopping = false;
    while !stopping {
        let mut group = Vec::new();
        match inbox.recv().await {
            Some(Message::Job(job)) => group.push(job),
            Some(Message::Stop) | None => break,
        }
        while group.len() < GROUP {
            match inbox.try_recv() {
                Ok(Message::Job(job)) => group.push(job),
                Ok(Message::Stop) => {
                    stopping = true;
                    break;
                }
                Err(_) => break,
            }
        }
        let start = Instant::now();
        *lock(&workshop.busy_since) = Some(start);
        let committed = workshop.commit(&mut group).await;
        *lock(&workshop.busy_since) = None;
        metrics::store_group(group.len(), start.elapsed());
        written.notify_one();
        if let Err(error) = &committed {
            tracing::error!(%error, jobs = group.len(), "a group of writes was not committed");
        }
        for job in group {
            job.finish(committed.clone());
        }
    }
    if let Some(task) = checkpoints {
        task.abort();
    }
    workshop.hang_up().await;
    workshop.pool.close().await;
}

/// Brings what was committed from SQLite's write-ahead log into its file, beside the writer and not in the middle of a commit.
/// What it leaves, because the writer was quicker, the writer brings over itself when the log has grown long.
async fn checkpoints(readers: AnyPool, written: Arc<Notify>) {
    loop {
        written.notified().await;
        tokio::time::sleep(CHECKPOINT_EVERY).await;
        match readers.execute("PRAGMA wal_checkpoint(PASSIVE)").await {
            Ok(_) => {}
            Err(sqlx::Error::PoolClosed) => return,
            Err(error) => tracing::warn!(%error, "no checkpoint"),
        }
    }
}

impl Workshop {
    async fn commit(&mut self, group: &mut [Box<dyn Job>]) -> Result<(), StoreError> {
        let patience = self.patience;
        let transaction = async {
            let (backend, ids) = (self.backend, self.ids.clone());
            let connection = self.connection().await?;
            ids.reserve(connection).await?;
            match (backend, group) {
                (Backend::Sqlite, [job]) => alone(connection, &mut **job).await,
                (_, jobs) => together(connection, backend, jobs).await,
            }
        };
        let done = tokio::time::timeout(patience, transaction).await;
        let done = done.unwrap_or(Err(StoreError::Silent(patience)));
        match (&done, &mut self.held) {
            (Ok(()), Some((_, used))) => *used = Instant::now(),
            // What state the connection is in is not known any more; a closed one has no open transaction.
            _ => self.hang_up().await,
        }
        done
    }

    /// The connection that writes, with the claim where that is its own.
    async fn connection(&mut self) -> Result<&mut AnyConnection, StoreError> {
        if let Some((lent, used)) = &mut self.held
            && self.backend == Backend::Postgres
            && used.elapsed() >= FRESH
            && !lent.answers(ANSWERING).await
        {
            self.hang_up().await;
        }
        if self.held.is_none() {
            let mut lent = Lent::of(&self.pool).await?;
            // Dropped, the connection is closed, and with it goes a lock that is not ours to have.
            self.claim.take_again(lent.connection()?, &self.ids).await?;
            self.held = Some((lent, Instant::now()));
        }
        let (lent, _) = self.held.as_mut().ok_or(StoreError::Closed)?;
        Ok(lent.connection()?)
    }

    async fn hang_up(&mut self) {
        if let Some((lent, _)) = self.held.take() {
            lent.close().await;
        }
    }
}

/// A job that fails takes the whole transaction back, which is its own. Not with PostgreSQL, where a commit after an error that
/// the job made little of takes all back and calls that success; the end of a savepoint does not.
async fn alone(tx: &mut AnyConnection, job: &mut dyn Job) -> Result<(), StoreError> {
    control(tx, Backend::Sqlite, "BEGIN IMMEDIATE").await?;
    let end = if job.run(tx).await { "COMMIT" } else { "ROLLBACK" };
    control(tx, Backend::Sqlite, end).await
}

/// Each job in a savepoint. What stands between two jobs goes to the database at once: every round trip counts.
async fn together(tx: &mut AnyConnection, backend: Backend, jobs: &mut [Box<dyn Job>]) -> Result<(), StoreError> {
    let begin = match backend {
        Backend::Sqlite => "BEGIN IMMEDIATE; SAVEPOINT job",
        Backend::Postgres => "BEGIN; SAVEPOINT job",
    };
    control(tx, backend, begin).await?;
    let last = jobs.len().saturating_sub(1);
    for (index, job) in jobs.iter_mut().enumerate() {
        if !job.run(tx).await {
            control(tx, backend, "ROLLBACK TO SAVEPOINT job").await?;
        }
        let next = if index == last { "RELEASE SAVEPOINT job; COMMIT" } else { "RELEASE SAVEPOINT job; SAVEPOINT job" };
        control(tx, backend, next).await?;
    }
    Ok(())
}

pub(super) fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

async fn control(tx: &mut AnyConnection, backend: Backend, sql: &'static str) -> Result<(), StoreError> {
    match backend {
        // Prepared once.
        Backend::Sqlite => sqlx::query(sql).execute(tx).await?,
        // What is prepared there is one statement.
        Backend::Postgres => tx.execute(sql).await?,
    };
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use sqlx::Row as _;
    use tokio::sync::oneshot;

    use super::super::testing::{both_databases, both_stores};
    use super::super::{Store, StoreError, Tx};

    async fn table(store: &Store) {
        store
            .write(|tx| {
                Box::pin(async move {
                    sqlx::query("CREATE TABLE thing (id BIGINT NOT NULL PRIMARY KEY)").execute(tx).await?;
                    Ok(())
                })
            })
            .await
            .unwrap();
    }

    async fn insert(tx: &mut Tx, id: i64) -> Result<(), StoreError> {
        sqlx::query("INSERT INTO thing (id) VALUES ($1)").bind(id).execute(tx).await?;
        Ok(())
    }

    async fn things(store: &Store) -> Vec<i64> {
        let rows = sqlx::query("SELECT id FROM thing ORDER BY id").fetch_all(store.reader()).await.unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    }

    /// Keeps the writer busy until the sender is used, so that what is submitted meanwhile shares a transaction.
    async fn hold(store: &Store) -> (oneshot::Sender<()>, tokio::task::JoinHandle<Result<(), StoreError>>) {
        let (started, has_started) = oneshot::channel();
        let (release, released) = oneshot::channel::<()>();
        let store = store.clone();
        let job = tokio::spawn(async move {
            store
                .write(|_| {
                    Box::pin(async move {
                        let _ = started.send(());
                        let _ = released.await;
                        Ok(())
                    })
                })
                .await
        });
        has_started.await.unwrap();
        (release, job)
    }

    /// Submits a job to a writer that is held and returns after it is queued; jobs run in the order of their submission.
    async fn submit<F>(store: &Store, job: F) -> tokio::task::JoinHandle<Result<(), StoreError>>
    where
        F: for<'c> FnOnce(&'c mut Tx) -> super::TxFuture<'c, ()> + Send + 'static,
    {
        let queued = store.writer.jobs.capacity();
        let task = tokio::spawn({
            let store = store.clone();
            async move { store.write(job).await }
        });
        while store.writer.jobs.capacity() == queued {
            tokio::task::yield_now().await;
        }
        task
    }

    #[tokio::test]
    async fn a_failing_and_a_panicking_job_fail_alone() {
        both_stores(|store| async move {
            table(&store).await;
            let (release, holder) = hold(&store).await;
            let first = submit(&store, |tx| Box::pin(insert(tx, 1))).await;
            let failing = submit(&store, |tx| {
                Box::pin(async move {
                    insert(tx, 2).await?;
                    insert(tx, 2).await
                })
            })
            .await;
            let panicking = submit(&store, |tx| {
                Box::pin(async move {
                    insert(tx, 3).await?;
                    panic!("on purpose")
                })
            })
            .await;
            let last = submit(&store, |tx| Box::pin(insert(tx, 4))).await;
            release.send(()).unwrap();
            holder.await.unwrap().unwrap();
            first.await.unwrap().unwrap();
            assert!(matches!(failing.await.unwrap(), Err(StoreError::Database(_))));
            assert!(matches!(panicking.await.unwrap(), Err(StoreError::Panicked)));
            last.await.unwrap().unwrap();
            assert_eq!(things(&store).await, [1, 4]);
        })
        .await;
    }

    #[tokio::test]
    async fn inv_6_nothing_is_called_written_that_is_not() {
        both_stores(|store| async move {
            table(&store).await;
            let told = store.write(|tx| {
                Box::pin(async move {
                    insert(tx, 1).await?;
                    // What a job should not do.
                    let _ = insert(tx, 1).await;
                    Ok(())
                })
            });
            let told = told.await;
            assert_eq!(told.is_ok(), things(&store).await == [1], "{told:?}");
            store.write(|tx| Box::pin(insert(tx, 2))).await.unwrap();
            assert!(things(&store).await.contains(&2));
        })
        .await;
    }

    #[tokio::test]
    async fn inv_6_a_job_is_answered_only_after_its_group_is_committed() {
        both_databases(|url| async move {
            let store = Store::open(&url).await.unwrap();
            table(&store).await;
            let (release, holder) = hold(&store).await;
            let mut first = submit(&store, |tx| Box::pin(insert(tx, 1))).await;
            let (reached, has_reached) = oneshot::channel();
            let (go_on, may_go_on) = oneshot::channel::<()>();
            let second = submit(&store, |tx| {
                Box::pin(async move {
                    let _ = reached.send(());
                    let _ = may_go_on.await;
                    insert(tx, 2).await
                })
            })
            .await;
            release.send(()).unwrap();
            holder.await.unwrap().unwrap();
            has_reached.await.unwrap();
            // The first job's part is done, the transaction is still open.
            tokio::time::timeout(Duration::from_millis(50), &mut first).await.expect_err("answered before the commit");
            assert_eq!(things(&store).await, [0_i64; 0]);
            go_on.send(()).unwrap();
            first.await.unwrap().unwrap();
            // Whoever opens the database now finds it, also if this process died at once.
            let other = Store::open(&url).await.unwrap();
            assert_eq!(things(&other).await, [1, 2]);
            second.await.unwrap().unwrap();
            other.close().await;
            store.close().await;
        })
        .await;
    }

    #[tokio::test]
    async fn a_transaction_that_does_not_end_is_given_up_and_seen_meanwhile() {
        both_databases(|url| async move {
            let store = Store::open_with(&url, Duration::from_millis(300)).await.unwrap();
            table(&store).await;
            assert_eq!(store.write_lasts(), Duration::ZERO);
            let (_release, stuck) = hold(&store).await;
            assert!(store.write_lasts() > Duration::ZERO);
            let behind = submit(&store, |tx| Box::pin(insert(tx, 1))).await;
            assert!(matches!(stuck.await.unwrap(), Err(StoreError::Silent(_))));
            behind.await.unwrap().unwrap();
            assert_eq!(things(&store).await, [1]);
            store.close().await;
        })
        .await;
    }

    #[tokio::test]
    async fn a_commit_that_fails_fails_its_whole_group_and_nothing_after_it() {
        both_stores(|store| async move {
            table(&store).await;
            store
                .write(|tx| {
                    Box::pin(async move {
                        let sql = "CREATE TABLE part (thing BIGINT NOT NULL REFERENCES thing (id) \
                                   DEFERRABLE INITIALLY DEFERRED)";
                        sqlx::query(sql).execute(tx).await?;
                        Ok(())
                    })
                })
                .await
                .unwrap();
            let (release, holder) = hold(&store).await;
            let innocent = submit(&store, |tx| Box::pin(insert(tx, 1))).await;
            let orphan = submit(&store, |tx| {
                Box::pin(async move {
                    sqlx::query("INSERT INTO part (thing) VALUES (99)").execute(tx).await?;
                    Ok(())
                })
            })
            .await;
            release.send(()).unwrap();
            holder.await.unwrap().unwrap();
            assert!(matches!(innocent.await.unwrap(), Err(StoreError::Database(_))));
            assert!(matches!(orphan.await.unwrap(), Err(StoreError::Database(_))));
            assert_eq!(things(&store).await, [0_i64; 0]);

            store.write(|tx| Box::pin(insert(tx, 2))).await.unwrap();
            assert_eq!(things(&store).await, [2]);
        })
        .await;
    }

    #[tokio::test]
    async fn close_waits_for_what_was_submitted_and_refuses_what_comes_after() {
        both_databases(|url| async move {
            let store = Store::open(&url).await.unwrap();
            table(&store).await;
            let (release, holder) = hold(&store).await;
            let last = submit(&store, |tx| Box::pin(insert(tx, 1))).await;
            let closing = tokio::spawn({
                let store = store.clone();
                async move { store.close().await }
            });
            release.send(()).unwrap();
            closing.await.unwrap();
            holder.await.unwrap().unwrap();
            last.await.unwrap().unwrap();
            assert!(matches!(store.write(|tx| Box::pin(insert(tx, 2))).await, Err(StoreError::Closed)));

            let again = Store::open(&url).await.unwrap();
            assert_eq!(things(&again).await, [1]);
            again.close().await;
        })
        .await;
    }
}
