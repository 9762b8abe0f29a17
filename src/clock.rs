//! Time as a parameter, so that validity, backoff and expiry can be tested without waiting.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

/// Where the time comes from.
pub trait Clock: Send + Sync + 'static {
    /// Milliseconds since the Unix epoch.
    fn now_ms(&self) -> i64;
}

/// A clock that everybody shares.
pub type SharedClock = Arc<dyn Clock>;

/// Whether less than `ms` have gone by since `since`. What is in the future was noted before the clock was set back, and
/// nobody knows how long ago: it counts as long ago, or whatever goes by it would wait until the clock has caught up.
pub fn is_recent(since: i64, now_ms: i64, ms: i64) -> bool {
    (0..ms).contains(&now_ms.saturating_sub(since))
}

/// The machine's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[allow(clippy::disallowed_methods)]
    fn now_ms(&self) -> i64 {
        std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |elapsed| i64::try_from(elapsed.as_millis()).unwrap_or(i64::MAX))
    }
}

/// A clock that stands still until it is moved; for tests.
#[derive(Debug, Default)]
pub struct ManualClock(AtomicI64);

impl ManualClock {
    /// A clock that shows `now_ms`.
    pub fn new(now_ms: i64) -> Arc<Self> {
        Arc::new(Self(AtomicI64::new(now_ms)))
    }

    /// Moves the clock by `ms`, backwards when negative.
    pub fn advance(&self, ms: i64) {
        self.0.fetch_add(ms, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now_ms(&self) -> i64 {
        self.0.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_the_future_is_not_recent() {
        for (since, recent) in [(0, false), (1, true), (10, true), (11, false), (i64::MAX, false), (i64::MIN, false)] {
            assert_eq!(is_recent(since, 10, 10), recent, "{since}");
        }
    }
}
