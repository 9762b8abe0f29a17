//! How fast what a peer sends has to come, so that it cannot hold a place by sending next to nothing.

use std::time::Duration;

use tokio::time::Instant;

/// The time until which more must have come: each byte puts it off by what it takes at the slowest rate, but never further
/// than a pause may last.
#[derive(Debug)]
pub struct Pace {
    until: Instant,
    pause: Duration,
    bytes_per_second: u32,
}

impl Pace {
    /// Begins now.
    pub fn new(pause: Duration, bytes_per_second: u32) -> Self {
        Self { until: Instant::now() + pause, pause, bytes_per_second: bytes_per_second.max(1) }
    }

    /// Until when more must have come.
    pub fn until(&self) -> Instant {
        self.until
    }

    /// So many bytes came.
    pub fn took(&mut self, bytes: usize) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let worth = Duration::from_secs_f64(f64::from(bytes) / f64::from(self.bytes_per_second));
        self.until = (self.until + worth.min(self.pause)).min(Instant::now() + self.pause);
    }

    /// What was waited for here and not for the peer does not count.
    pub fn resume(&mut self, since: Instant) {
        self.until += since.elapsed();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_puts_the_end_off_by_little_and_much_by_no_more_than_a_pause() {
        let mut pace = Pace::new(Duration::from_secs(100), 1000);
        let begin = pace.until() - Duration::from_secs(100);
        // As if most of the pause were over.
        pace.until = begin + Duration::from_secs(10);
        pace.took(500);
        assert_eq!(pace.until(), begin + Duration::from_millis(10_500));
        pace.took(usize::MAX);
        let most = Instant::now() + Duration::from_secs(100);
        assert!(pace.until() <= most && pace.until() > begin + Duration::from_secs(99));
        pace.until = begin;
        pace.resume(Instant::now() - Duration::from_secs(7));
        assert!(pace.until() >= begin + Duration::from_secs(7));
    }
}
