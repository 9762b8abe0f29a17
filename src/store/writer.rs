//! The one writer: takes jobs from everywhere, runs as many as are waiting inside one transaction, each in a savepoint of
//! its own, commits once, and only then answers.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use sqlx::{AnyConnection, AnyPool, Executor as _};
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::task::JoinHandle;

use super::ids::Ids;
use super::{Backend, StoreError, Tx, TxFuture};

/// How many jobs share a transaction at most.
const GROUP: usize = 256;
/// How many jobs may wait before those who submit more wait too.
const QUEUE: usize = 4096;

#[derive(Clone)]
pub(super) struct Writer {
    jobs: mpsc::Sender<Message>,
    task: Arc<Mutex<Option<JoinHandle<()>>>>,
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
    pub(super) fn start(pool: AnyPool, backend: Backend, ids: Arc<Ids>) -> Self {
        let (jobs, inbox) = mpsc::channel(QUEUE);
        let task = tokio::spawn(run(pool, backend, ids, inbox));
        Self { jobs, task: Arc::new(Mutex::new(Some(task))) }
    }

    pub(super) async fn write<T, F>(&self, work: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: for<'c> FnOnce(&'c mut Tx) -> TxFuture<'c, T> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let job = TypedJob { work: Some(work), result: None, reply };
        self.jobs.send(Message::Job(Box::new(job))).await.map_err(|_| StoreError::Closed)?;
        answer.await.map_err(|_| StoreError::Closed)?
    }

    pub(super) async fn close(&self) {
        if let Some(task) = self.task.lock().await.take() {
            let _ = self.jobs.send(Message::Stop).await;
            let _ = task.await;
        }
    }
}

async fn run(pool: AnyPool, backend: Backend, ids: Arc<Ids>, mut inbox: mpsc::Receiver<Message>) {
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
        let committed = commit(&pool, backend, &ids, &mut group).await;
        if let Err(error) = &committed {
            tracing::error!(%error, jobs = group.len(), "a group of writes was not committed");
        }
        for job in group {
            job.finish(committed.clone());
        }
    }
    pool.close().await;
}

async fn commit(pool: &AnyPool, backend: Backend, ids: &Ids, group: &mut [Box<dyn Job>]) -> Result<(), StoreError> {
    let mut connection = pool.acquire().await?;
    ids.reserve(&mut connection).await?;
    let begin = match backend {
        Backend::Sqlite => "BEGIN IMMEDIATE",
        Backend::Postgres => "BEGIN",
    };
    connection.execute(begin).await?;
    let done = match in_transaction(&mut connection, group).await {
        Ok(()) => connection.execute("COMMIT").await.map(drop).map_err(StoreError::from),
        Err(error) => Err(error),
    };
    if done.is_err() {
        // What state the connection is in is not known any more; a closed one has no open transaction.
        let _ = connection.close().await;
    }
    done
}

async fn in_transaction(tx: &mut AnyConnection, group: &mut [Box<dyn Job>]) -> Result<(), StoreError> {
    for job in group {
        tx.execute("SAVEPOINT job").await?;
        if !job.run(tx).await {
            tx.execute("ROLLBACK TO SAVEPOINT job").await?;
        }
        tx.execute("RELEASE SAVEPOINT job").await?;
    }
    Ok(())
}
