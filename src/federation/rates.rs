//! How often one server may ask for what costs something: the draft names the endpoints that are limited. Who asks too often is told
//! when to come again.
//! Source: draft-ralston-mimi-linearized-matrix-04, section "Rate Limiting".

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::refusal::Refusal;

/// What is counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rate {
    /// Events, states and stretches of rooms.
    Reads,
    /// `make_…` and `send_…`.
    Handshakes,
    /// Invites.
    Invites,
    /// Devices and their keys.
    Devices,
    /// Files.
    Media,
    /// Keys of other servers, by address: nobody proves who asks.
    Keys,
}

impl Rate {
    /// How many at once, and how many a second from then on. A homeserver that catches up asks for thousands of events.
    const fn allowance(self) -> (f64, f64) {
        match self {
            Self::Reads => (2_000.0, 200.0),
            Self::Handshakes => (500.0, 50.0),
            Self::Invites => (300.0, 20.0),
            Self::Devices => (500.0, 50.0),
            Self::Media => (600.0, 30.0),
            Self::Keys => (300.0, 10.0),
        }
    }
}

/// How many servers' counts are kept before those are dropped that say nothing any more.
const KEPT: usize = 4_096;

/// The counts of all servers; clones share them.
#[derive(Clone, Default)]
pub struct Rates {
    buckets: Arc<Mutex<HashMap<(String, Rate), Bucket>>>,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    left: f64,
    at: Instant,
}

impl Rates {
    /// Counts a request of `origin`, a server or an address, or refuses it.
    pub fn take(&self, origin: &str, rate: Rate) -> Result<(), Refusal> {
        self.take_at(origin, rate, Instant::now())
    }

    fn take_at(&self, origin: &str, rate: Rate, now: Instant) -> Result<(), Refusal> {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= KEPT && buckets.len() == buckets.capacity() {
            buckets.retain(|(_, rate), bucket| bucket.filled(*rate, now) < rate.allowance().0);
        }
        let (most, a_second) = rate.allowance();
        let bucket = buckets.entry((origin.to_owned(), rate)).or_insert(Bucket { left: most, at: now });
        *bucket = Bucket { left: bucket.filled(rate, now), at: now };
        if bucket.left >= 1.0 {
            bucket.left -= 1.0;
            return Ok(());
        }
        let wait = ((1.0 - bucket.left) / a_second * 1000.0).ceil();
        let what = format!("requests of {origin} for {}", rate.name());
        Err(Refusal::Budget { what, retry_after_ms: wait.clamp(1.0, 60_000.0) as u64 })
    }
}

impl Bucket {
    fn filled(&self, rate: Rate, now: Instant) -> f64 {
        let (most, a_second) = rate.allowance();
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        passed.mul_add(a_second, self.left).min(most)
    }
}

impl Rate {
    fn name(self) -> &'static str {
        match self {
            Self::Reads => "events and states",
            Self::Handshakes => "handshakes",
            Self::Invites => "invites",
            Self::Devices => "devices",
            Self::Media => "files",
            Self::Keys => "keys of servers",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn who_asks_too_often_is_told_when_to_come_again_and_keeps_nobody_else_out() {
        let (rates, start) = (Rates::default(), Instant::now());
        let (a, b) = ("a.example", "b.example");
        for _ in 0..300 {
            rates.take_at(a, Rate::Invites, start).unwrap();
        }
        let refusal = rates.take_at(a, Rate::Invites, start).unwrap_err();
        assert!(matches!(refusal, Refusal::Budget { retry_after_ms: 50, .. }), "{refusal:?}");
        rates.take_at(b, Rate::Invites, start).unwrap();
        rates.take_at(a, Rate::Reads, start).unwrap();
        let later = start + Duration::from_millis(50);
        rates.take_at(a, Rate::Invites, later).unwrap();
        assert!(rates.take_at(a, Rate::Invites, later).is_err());
        // A clock that goes back changes nothing.
        assert!(rates.take_at(a, Rate::Invites, start).is_err());
    }

    #[test]
    fn who_has_not_asked_for_long_is_forgotten() {
        let (rates, start) = (Rates::default(), Instant::now());
        let later = start + Duration::from_secs(3600);
        for number in 0..20_000 {
            rates.take_at(&format!("s{number}.example"), Rate::Reads, start + Duration::from_secs(number)).unwrap();
        }
        assert!(rates.buckets.lock().unwrap().len() < 20_000);
        rates.take_at("a.example", Rate::Reads, later).unwrap();
    }
}
