//! What is written down to be done at other servers, and is done in time by one task, as long as there is any of it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Notify;

use crate::store::{Store, StoreError};

/// How long is waited after each failure.
const BACKOFF: [Duration; 4] =
    [Duration::from_secs(30), Duration::from_secs(5 * 60), Duration::from_secs(15 * 60), Duration::from_secs(3600)];
/// The longest of these, in milliseconds.
pub const LONGEST_PAUSE_MS: i64 = 3_600_000;
/// For how long it is tried.
const PATIENCE_MS: i64 = 24 * 3_600_000;
/// How long is waited when the store fails.
const STORE_PAUSE: Duration = Duration::from_secs(5);

/// How long is waited when something fails at `now` that has been tried since `since`, and has failed `tries` times before; none
/// when it was tried for long enough.
pub fn again(since: i64, tries: i64, now: i64) -> Option<Duration> {
    let pause = usize::try_from(tries).ok().and_then(|tries| BACKOFF.get(tries)).or(BACKOFF.last());
    pause.copied().filter(|_| now.saturating_sub(since) < PATIENCE_MS)
}

/// Who does errands of one kind.
#[derive(Debug, Default)]
pub struct Errands {
    at_work: Mutex<AtWork>,
    news: Arc<Notify>,
}

#[derive(Debug, Default)]
struct AtWork {
    runs: bool,
    /// Whether there is more since it was looked last.
    news: bool,
}

/// What errands are.
#[async_trait]
pub trait Runner: Send + Sync + Sized + 'static {
    /// Who does them.
    fn errands(&self) -> &Errands;

    /// Where they are written down.
    fn store(&self) -> &Store;

    /// Does what is due. How long nothing more is; none when nothing is left.
    async fn run_due(&self) -> Result<Option<Duration>, StoreError>;
}

impl Errands {
    /// There may be something to do. `find` gives what it is, as long as that is there.
    pub fn run_soon<R: Runner>(&self, find: impl Fn() -> Option<R> + Send + 'static) {
        let begin = {
            let mut at_work = self.at_work();
            at_work.news = true;
            !std::mem::replace(&mut at_work.runs, true)
        };
        self.look_again();
        if begin {
            tokio::spawn(run_all(find));
        }
    }

    /// Looks now for what is due, if somebody waits for that.
    pub fn look_again(&self) {
        self.news.notify_one();
    }

    fn at_work(&self) -> MutexGuard<'_, AtWork> {
        self.at_work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Goes on as long as there is something to do. Holds nothing while it sleeps.
async fn run_all<R: Runner>(find: impl Fn() -> Option<R> + Send + 'static) {
    loop {
        let Some(runner) = find() else { return };
        runner.errands().at_work().news = false;
        let wait = match runner.run_due().await {
            Ok(Some(wait)) => wait,
            Ok(None) => {
                let mut at_work = runner.errands().at_work();
                if at_work.news {
                    continue;
                }
                at_work.runs = false;
                return;
            }
            Err(_) if runner.store().reader().is_closed() => return,
            Err(error) => {
                tracing::warn!(%error, "other servers are told later");
                STORE_PAUSE
            }
        };
        let news = runner.errands().news.clone();
        drop(runner);
        // What is new is done at once.
        let _ = tokio::time::timeout(wait, news.notified()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_is_tried_ever_more_seldom_for_a_day() {
        let seconds = |tries| again(1_000, tries, 2_000).map(|pause| pause.as_secs());
        assert_eq!([0, 1, 2, 3, 4, i64::MAX].map(seconds), [30, 300, 900, 3600, 3600, 3600].map(Some));
        assert!(BACKOFF.iter().all(|pause| pause.as_millis() <= u128::try_from(LONGEST_PAUSE_MS).unwrap()));
        assert!(again(1_000, 30, 999 + PATIENCE_MS).is_some() && again(1_000, 0, 1_000 + PATIENCE_MS).is_none());
    }
}
