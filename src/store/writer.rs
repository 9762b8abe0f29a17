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
mod tests;
