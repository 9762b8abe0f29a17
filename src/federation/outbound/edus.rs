//! EDUs that wait for a destination. What is worth nothing later (typing, receipts, presence) is in memory alone: the newest of
//! each kind, room and user, bounded, and dropped while the destination is left alone. Losing it harms nobody.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use super::verdict::backoff;
use crate::admin::metrics;
use crate::event::{Edu, EduKey, canonical_json};
use crate::identity::Side;

/// How many EDUs a transaction has at most.
pub(super) const MAX_EDUS: usize = 100;
/// How many bytes of them, so that what goes with 90,000 bytes of events stays below the 102,400 that a peer takes.
const MAX_BYTES: usize = 10_000;
/// How many EDUs wait for one destination.
const MAX_WAITING: usize = 1_000;
/// After this time nobody believes any more that somebody is typing.
const TYPING_LASTS: Duration = Duration::from_secs(30);
/// How long a destination that did not take EDUs gets none: at first as many times this as failing ones are left alone, and at most.
const SILENCE: u32 = 10;
const LONGEST_SILENCE: Duration = Duration::from_secs(600);

/// The EDUs that wait, the one that has waited longest first.
#[derive(Default)]
pub(super) struct Waiting {
    order: VecDeque<(Side, EduKey)>,
    known: HashMap<(Side, EduKey), (Edu, Instant)>,
    /// The destination answered what held some with an error.
    refused: Silence,
    /// The destination is left alone, or was not reached when it was to get some.
    away: Silence,
}

/// A while in which there is no use in keeping any.
#[derive(Debug, Clone, Copy, Default)]
struct Silence {
    until: Option<Instant>,
    /// How often in a row there was reason for it.
    failures: i64,
}

impl Silence {
    fn lengthen(&mut self, until: Option<Instant>) {
        self.until = self.until.max(until);
    }

    fn is_on(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }
}

impl Waiting {
    /// Adds one, in the place of an older one of the same; false when it is dropped.
    pub(super) fn add(&mut self, side: Side, edu: &Edu, now: Instant) -> bool {
        let Some(key) = edu.key() else { return false };
        if self.is_silent(now) {
            metrics::edus_dropped("backoff", 1);
            return false;
        }
        let key = (side, key);
        if let Some(known) = self.known.get_mut(&key) {
            *known = (edu.clone(), now);
            return true;
        }
        if self.known.len() >= MAX_WAITING {
            metrics::edus_dropped("full", 1);
            return false;
        }
        self.order.push_back(key.clone());
        self.known.insert(key, (edu.clone(), now));
        true
    }

    /// By which protocol's `send` the one goes that has waited longest.
    pub(super) fn first_side(&self) -> Option<Side> {
        self.order.front().map(|(side, _)| *side)
    }

    /// Takes those of one protocol for a transaction, at most `limit`.
    pub(super) fn take(&mut self, side: Side, limit: usize, now: Instant) -> Vec<Edu> {
        let (mut taken, mut left, mut bytes) = (Vec::new(), VecDeque::new(), 0_usize);
        while let Some(key) = self.order.pop_front() {
            if key.0 != side || taken.len() >= limit || bytes >= MAX_BYTES {
                left.push_back(key);
                continue;
            }
            let Some((edu, since)) = self.known.remove(&key) else { continue };
            if matches!(edu, Edu::Typing(_)) && now.saturating_duration_since(since) >= TYPING_LASTS {
                metrics::edus_dropped("old", 1);
                continue;
            }
            bytes = bytes.saturating_add(canonical_json(&edu.to_lm()).len());
            taken.push(edu);
        }
        self.order = left;
        taken
    }

    /// A transaction that held some got through.
    pub(super) fn arrived(&mut self) {
        (self.refused, self.away) = (Silence::default(), Silence::default());
    }

    /// One that held some failed: if it was `answered` perhaps because of them, so the destination gets none for a while. Events do
    /// not wait for that.
    pub(super) fn failed(&mut self, now: Instant, answered: bool) {
        self.drop_all();
        let silence = if answered { &mut self.refused } else { &mut self.away };
        silence.failures = silence.failures.saturating_add(1);
        let delay = backoff(silence.failures, 1.0).saturating_mul(SILENCE).min(LONGEST_SILENCE);
        silence.lengthen(now.checked_add(delay));
    }

    /// The destination is left alone: what waits would be old.
    pub(super) fn silence(&mut self, now: Instant, delay: Duration) {
        self.drop_all();
        self.away.lengthen(now.checked_add(delay));
    }

    fn drop_all(&mut self) {
        metrics::edus_dropped("backoff", self.known.len());
        self.order.clear();
        self.known.clear();
    }

    /// The destination is spoken to again; what it thinks of EDUs stays as it was.
    pub(super) fn is_back(&mut self) {
        self.away = Silence::default();
    }

    /// Whether it gets none for now.
    pub(super) fn is_silent(&self, now: Instant) -> bool {
        self.refused.is_on(now) || self.away.is_on(now)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.order.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Typing;

    fn typing(user: usize, typing: bool) -> Edu {
        let user_id = format!("@u{user}:g.example").try_into().unwrap();
        Edu::Typing(Typing { room_id: "!r:g.example".try_into().unwrap(), user_id, typing })
    }

    #[test]
    fn the_newest_of_each_counts_and_each_protocol_gets_its_own() {
        let (mut waiting, now) = (Waiting::default(), Instant::now());
        for edu in [typing(1, true), typing(2, true), typing(1, false)] {
            assert!(waiting.add(Side::Lm, &edu, now));
        }
        waiting.add(Side::Matrix, &typing(1, true), now);
        assert_eq!(waiting.first_side(), Some(Side::Lm));
        assert_eq!(waiting.take(Side::Lm, MAX_EDUS, now), [typing(1, false), typing(2, true)]);
        assert!(!waiting.is_empty());
        assert_eq!(waiting.take(Side::Matrix, MAX_EDUS, now), [typing(1, true)]);
        assert!(waiting.is_empty() && waiting.take(Side::Lm, MAX_EDUS, now).is_empty());
    }

    #[test]
    fn hc_20_what_waits_and_what_goes_at_once_is_bounded() {
        let (mut waiting, now) = (Waiting::default(), Instant::now());
        for user in 0..MAX_WAITING {
            assert!(waiting.add(Side::Matrix, &typing(user, true), now));
        }
        assert!(!waiting.add(Side::Matrix, &typing(MAX_WAITING, true), now));
        assert!(waiting.add(Side::Matrix, &typing(0, false), now), "in the place of an older one");
        let mut all = 0;
        loop {
            let taken = waiting.take(Side::Matrix, MAX_EDUS, now);
            let bytes: usize = taken.iter().map(|edu| canonical_json(&edu.to_lm()).len()).sum();
            assert!(taken.len() <= MAX_EDUS && bytes < MAX_BYTES + 1_000);
            all += taken.len();
            if taken.is_empty() {
                break;
            }
        }
        assert_eq!(all, MAX_WAITING);
    }

    #[test]
    fn what_is_old_or_comes_while_the_destination_is_left_alone_is_dropped() {
        let (mut waiting, now) = (Waiting::default(), Instant::now());
        waiting.add(Side::Lm, &typing(1, true), now);
        assert!(waiting.take(Side::Lm, MAX_EDUS, now + TYPING_LASTS).is_empty() && waiting.is_empty());

        waiting.add(Side::Lm, &typing(1, true), now);
        waiting.silence(now, Duration::from_secs(60));
        assert!(waiting.is_empty() && !waiting.add(Side::Lm, &typing(1, true), now));
        waiting.is_back();
        assert!(waiting.add(Side::Lm, &typing(1, true), now));

        // Who fails because of EDUs gets none for a while, however well the rest goes.
        waiting.failed(now, true);
        // That it is left alone for longer because it is away has an end when it is back.
        waiting.silence(now, 36 * LONGEST_SILENCE);
        waiting.is_back();
        assert!(!waiting.add(Side::Lm, &typing(1, true), now));
        assert!(waiting.add(Side::Lm, &typing(1, true), now + LONGEST_SILENCE));
        waiting.arrived();
        assert!(waiting.add(Side::Lm, &typing(2, true), now));

        // Who was not there to take them has said nothing of them.
        waiting.failed(now, false);
        assert!(!waiting.add(Side::Lm, &typing(1, true), now));
        waiting.is_back();
        assert!(waiting.add(Side::Lm, &typing(1, true), now));
    }
}
