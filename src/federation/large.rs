//! Answers that may be as large as a room: its state, what an event's authorization stands on, what answers a join. How often
//! they are asked for says little of what they cost, so they are built one at a time for a server and a few at a time for all, and
//! what is built and not yet taken is counted in bytes.

use std::sync::Arc;
use std::time::Duration;

use ruma::ServerName;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::limits::{Held, LineLimits, Lines, Shares};
use crate::refusal::Refusal;

/// How long one waits for its turn, or for those before it to be taken.
const PATIENCE: Duration = Duration::from_secs(30);
/// How many of one server wait at most.
const WAITING: usize = 50;
/// How many bytes of finished answers are here, for all and for one server. One that is larger takes all that there is for one.
const BYTES: (usize, usize) = (256 << 20, 64 << 20);

/// Large answers; clones count together.
#[derive(Clone)]
pub struct Large {
    lines: Lines,
    building: Arc<Semaphore>,
    finished: Shares,
    each: usize,
    patience: Duration,
}

impl Default for Large {
    fn default() -> Self {
        // While half of the threads build, the other half does everything else.
        let threads = std::thread::available_parallelism().map_or(1, |threads| (threads.get() / 2).max(1));
        Self::new(threads, BYTES, PATIENCE)
    }
}

impl Large {
    fn new(at_once: usize, (all, each): (usize, usize), patience: Duration) -> Self {
        let limits = LineLimits { requests: WAITING, ..LineLimits::default() };
        let building = Arc::new(Semaphore::new(at_once));
        Self { lines: Lines::new(limits), building, finished: Shares::new(all, each), each, patience }
    }

    /// Builds an answer for `origin` when its turn comes; M_LIMIT_EXCEEDED when that takes too long.
    pub async fn build<T>(
        &self,
        origin: &ServerName,
        answer: impl Future<Output = Result<T, Refusal>>,
    ) -> Result<T, Refusal> {
        let turn = async {
            let own = self.lines.enter(origin, 0).await?;
            let of_all = self.building.acquire().await;
            Ok((own, of_all.map_err(|_| Refusal::Internal("the gateway is stopping".to_owned()))?))
        };
        let turn = timeout(self.patience, turn).await.unwrap_or_else(|_| Err(busy(origin)))?;
        let answer = answer.await;
        drop(turn);
        answer
    }

    /// Counts the bytes of an answer until what is returned is dropped; M_LIMIT_EXCEEDED when those before it are not taken in time.
    pub async fn hold(&self, origin: &ServerName, bytes: usize) -> Result<Held, Refusal> {
        let mut held = self.finished.hold(&[origin.as_str()]);
        match timeout(self.patience, held.grow_in_time(bytes.min(self.each))).await {
            Ok(true) => Ok(held),
            _ => Err(busy(origin)),
        }
    }
}

fn busy(origin: &ServerName) -> Refusal {
    Refusal::Budget { what: format!("large answers to {origin}"), retry_after_ms: 5_000 }
}

#[cfg(test)]
mod tests {
    use ruma::server_name;
    use tokio::sync::oneshot;

    use super::*;

    const SHORT: Duration = Duration::from_millis(20);

    #[tokio::test]
    async fn one_server_has_one_answer_built_at_a_time_and_keeps_no_other_out() {
        let large = Large::new(2, BYTES, SHORT);
        let (many, other) = (server_name!("many.example"), server_name!("other.example"));
        let ((begin, begun), (end, ended)) = (oneshot::channel(), oneshot::channel::<()>());
        let first = tokio::spawn({
            let large = large.clone();
            let answer = async {
                begin.send(()).unwrap();
                Ok(ended.await.is_ok())
            };
            async move { large.build(many, answer).await }
        });
        begun.await.unwrap();
        // The second of this server waits in vain, the other's does not.
        let refused = large.build(many, async { Ok(()) }).await.unwrap_err();
        assert!(matches!(refused, Refusal::Budget { retry_after_ms: 5_000, .. }), "{refused:?}");
        assert_eq!(large.build(other, async { Ok(7) }).await, Ok(7));
        end.send(()).unwrap();
        assert_eq!(first.await.unwrap(), Ok(true));
        assert_eq!(large.build(many, async { Ok(8) }).await, Ok(8));
    }

    #[tokio::test]
    async fn what_nobody_takes_is_bounded_for_each_and_for_all() {
        let large = Large::new(1, (3 << 20, 2 << 20), SHORT);
        let (one, other) = (server_name!("one.example"), server_name!("other.example"));
        let first = large.hold(one, 2 << 20).await.unwrap();
        assert_eq!(large.hold(one, 1 << 20).await.map(drop).unwrap_err().code(), "budget");
        let _of_other = large.hold(other, 1 << 20).await.unwrap();
        assert_eq!(large.hold(other, 1 << 20).await.map(drop).unwrap_err().code(), "budget");
        drop(first);
        large.hold(other, 1 << 20).await.map(drop).unwrap();
    }
}
