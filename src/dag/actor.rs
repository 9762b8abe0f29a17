//! The one task of a room: takes its jobs in order, as many as are waiting in one batch, and commits them together.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use ruma::EventId;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::Shared;
use super::batch::Batch;
use super::room::Room;
use crate::refusal::Refusal;
use crate::store::StoreError;

/// How many events a batch has before it is committed, however many jobs wait.
const BATCH: usize = 200;
/// For how long a room that nobody uses stays in memory.
const IDLE: Duration = Duration::from_secs(600);

/// One job.
pub(super) trait Work: Send {
    /// Does it; false when what it changed must be taken back.
    fn run<'b>(&'b mut self, batch: &'b mut Batch) -> BoxFuture<'b, bool>;
    /// Answers, after the commit.
    fn finish(self: Box<Self>, committed: Result<(), Refusal>);
}

struct Job<T, F> {
    work: Option<F>,
    result: Option<Result<T, Refusal>>,
    reply: oneshot::Sender<Result<T, Refusal>>,
    _permit: OwnedSemaphorePermit,
}

pub(super) fn boxed<T, F>(
    work: F,
    permit: OwnedSemaphorePermit,
    reply: oneshot::Sender<Result<T, Refusal>>,
) -> Box<dyn Work>
where
    T: Send + 'static,
    F: for<'b> FnOnce(&'b mut Batch) -> BoxFuture<'b, Result<T, Refusal>> + Send + 'static,
{
    Box::new(Job { work: Some(work), result: None, reply, _permit: permit })
}

impl<T, F> Work for Job<T, F>
where
    T: Send + 'static,
    F: for<'b> FnOnce(&'b mut Batch) -> BoxFuture<'b, Result<T, Refusal>> + Send + 'static,
{
    fn run<'b>(&'b mut self, batch: &'b mut Batch) -> BoxFuture<'b, bool> {
        Box::pin(async move {
            let Some(work) = self.work.take() else { return false };
            let work = AssertUnwindSafe(async { work(batch).await }).catch_unwind();
            let result = work.await.unwrap_or_else(|_| Err(Refusal::Internal("a job of a room panicked".to_owned())));
            let ok = result.is_ok();
            self.result = Some(result);
            ok
        })
    }

    fn finish(self: Box<Self>, committed: Result<(), Refusal>) {
        let result = match (self.result, committed) {
            (Some(Ok(value)), Ok(())) => Ok(value),
            (Some(Err(refusal)), _) | (_, Err(refusal)) => Err(refusal),
            (None, Ok(())) => Err(Refusal::Internal("a job of a room was not run".to_owned())),
        };
        // Who asked may have gone away; what they asked for is done all the same.
        let _ = self.reply.send(result);
    }
}

/// What waits for a room's task.
pub(super) type Jobs = mpsc::UnboundedReceiver<Box<dyn Work>>;

/// Why a room's task ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// Nobody used the room, which is out of memory already.
    Idle,
    /// A batch was not committed, or nobody knows whether it was: what is in memory may lag behind the rows.
    Uncertain,
}

/// Does the room's jobs until there are none for long, or a batch fails.
pub(super) async fn run(shared: &Arc<Shared>, room: &Arc<Room>, jobs: &mut Jobs) -> End {
    loop {
        let first = match tokio::time::timeout(IDLE, jobs.recv()).await {
            Ok(Some(job)) => job,
            Ok(None) => return End::Idle,
            Err(_) if shared.rooms.retire(room, jobs) => return End::Idle,
            Err(_) => continue,
        };
        let mut batch = Batch::new(shared.clone(), room);
        let mut done = Vec::new();
        let mut next = Some(first);
        while let Some(mut job) = next {
            let before = batch.savepoint();
            if !job.run(&mut batch).await {
                batch.roll_back(before);
            }
            done.push(job);
            let is_alone = shared.careful.is(&room.room_id);
            next = if batch.len() < BATCH && !is_alone { jobs.try_recv().ok() } else { None };
        }
        let events = batch.added();
        let panicked = || {
            let events: Vec<&EventId> = events.iter().map(|id| &**id).collect();
            shared.careful.panicked(&room.room_id, &events)
        };
        let committed = match AssertUnwindSafe(batch.commit(room)).catch_unwind().await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(StoreError::Panicked)) | Err(_) => Err(panicked()),
            Ok(Err(error)) => Err(error.into()),
        };
        if let Err(refusal) = &committed {
            tracing::error!(room = %room.room_id, error = %refusal, "a batch of events was not committed");
        }
        if committed.is_err() {
            // Before the jobs are answered: who tries again finds the room as its rows are.
            shared.let_go(room, jobs);
        }
        for job in done {
            job.finish(committed.clone());
        }
        if committed.is_err() {
            return End::Uncertain;
        }
    }
}
