//! Budgets: how much of one server's users may cross in one portal. What is over waits until there is room again; what has
//! waited too long is refused. Kept in memory: a restart forgives.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use ruma::{OwnedServerName, ServerName};
use serde_json::Value;

use crate::config;
use crate::event::Object;
use crate::refusal::Refusal;

/// How long what is over a budget waits, in milliseconds.
pub(super) const PATIENCE_MS: i64 = 600_000;
/// A server that has been quiet may send as much at once as it may send in this time.
const BURST_MS: i64 = 60_000;
/// It is not looked again before this, so that some room has come together.
const PAUSE_MS: u64 = 250;
const HOUR_MS: i64 = 3_600_000;
const DAY_MS: i64 = 24 * HOUR_MS;
/// What counts for a server without regard to portals; their numbers begin with 1.
const NO_PORTAL: i64 = 0;
/// How many servers in portals are remembered; with more, those that owe nothing are forgotten.
const REMEMBERED: usize = 10_000;

/// What was spent, by portal and server.
#[derive(Debug, Default)]
pub(super) struct Budgets {
    spent: Mutex<HashMap<(i64, OwnedServerName), Spent>>,
}

#[derive(Debug, Default)]
struct Spent {
    events: Bucket,
    bytes: Bucket,
    ghosts: Bucket,
    portals: Bucket,
}

/// How full a bucket is that empties evenly. The level is no event's content, so a float is good enough.
#[derive(Debug, Default)]
struct Bucket {
    level: f64,
    at: i64,
}

/// How much a bucket holds, and in what time it empties; none without a limit.
#[derive(Debug, Clone, Copy)]
struct Limit {
    what: &'static str,
    size: f64,
    empties_ms: i64,
}

impl Limit {
    fn new(what: &'static str, size: u64, empties_ms: i64) -> Option<Self> {
        let size = u32::try_from(size).map_or_else(|_| size as f64, f64::from);
        (size > 0.0).then_some(Self { what, size, empties_ms })
    }

    fn events(limits: &config::Budgets) -> Option<Self> {
        let seconds = u64::try_from(BURST_MS / 1000).unwrap_or(1);
        Self::new("events a second", u64::from(limits.events_per_second).saturating_mul(seconds), BURST_MS)
    }

    fn bytes(limits: &config::Budgets) -> Option<Self> {
        Self::new("bytes a day", limits.bytes_per_day, DAY_MS)
    }

    fn ghosts(limits: &config::Budgets) -> Option<Self> {
        Self::new("new ghosts an hour", u64::from(limits.ghosts_per_hour), HOUR_MS)
    }

    fn portals(limits: &config::Budgets) -> Option<Self> {
        Self::new("new portals an hour", u64::from(limits.portals_per_hour), HOUR_MS)
    }

    /// How long it takes, in milliseconds, until a bucket has room for one more.
    fn wait(&self, bucket: &Bucket) -> Option<u64> {
        let over = bucket.level + 1.0 - self.size;
        (over > 0.0).then(|| PAUSE_MS.max((over / self.size * self.empties_ms as f64) as u64))
    }

    fn refusal(&self, server: &ServerName, retry_after_ms: u64) -> Refusal {
        Refusal::Budget { what: format!("{} from {server}, {}", self.what, self.size), retry_after_ms }
    }
}

impl Bucket {
    fn drain(&mut self, limit: Limit, now: i64) {
        let elapsed = now.saturating_sub(self.at).max(0);
        self.level = (self.level - elapsed as f64 * limit.size / limit.empties_ms as f64).max(0.0);
        self.at = now;
    }
}

impl Budgets {
    /// Why no event of a server may cross now, if so.
    pub(super) fn over(
        &self,
        limits: &config::Budgets,
        portal: i64,
        server: &ServerName,
        now: i64,
    ) -> Result<(), Refusal> {
        self.with(portal, server, |spent| {
            for (limit, bucket) in
                [(Limit::events(limits), &mut spent.events), (Limit::bytes(limits), &mut spent.bytes)]
            {
                let Some(limit) = limit else { continue };
                bucket.drain(limit, now);
                if let Some(wait) = limit.wait(bucket) {
                    return Err(limit.refusal(server, wait));
                }
            }
            Ok(())
        })
    }

    /// An event of a server crosses.
    pub(super) fn spend(&self, portal: i64, server: &ServerName, bytes: usize) {
        self.with(portal, server, |spent| {
            spent.events.level += 1.0;
            spent.bytes.level += u32::try_from(bytes).map_or(f64::MAX, f64::from);
        });
    }

    /// A user of a server has a portal made by an invite, if the budget allows; counts it.
    pub(super) fn portal(&self, limits: &config::Budgets, server: &ServerName, now: i64) -> Result<(), Refusal> {
        let Some(limit) = Limit::portals(limits) else { return Ok(()) };
        self.with(NO_PORTAL, server, |spent| {
            spent.portals.drain(limit, now);
            if let Some(wait) = limit.wait(&spent.portals) {
                return Err(limit.refusal(server, wait));
            }
            spent.portals.level += 1.0;
            Ok(())
        })
    }

    /// A user of a server gets a ghost in a portal, if the budget allows; counts it unless it is only asked.
    pub(super) fn ghost(
        &self,
        limits: &config::Budgets,
        portal: i64,
        server: &ServerName,
        now: i64,
        only_asked: bool,
    ) -> Result<(), Refusal> {
        let Some(limit) = Limit::ghosts(limits) else { return Ok(()) };
        self.with(portal, server, |spent| {
            spent.ghosts.drain(limit, now);
            if let Some(wait) = limit.wait(&spent.ghosts) {
                return Err(limit.refusal(server, wait));
            }
            spent.ghosts.level += if only_asked { 0.0 } else { 1.0 };
            Ok(())
        })
    }

    fn with<T>(&self, portal: i64, server: &ServerName, work: impl FnOnce(&mut Spent) -> T) -> T {
        let mut spent = self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        if spent.len() > REMEMBERED {
            spent.retain(|_, spent| [&spent.events, &spent.bytes, &spent.ghosts].iter().any(|b| b.level > 0.0));
            if spent.len() > REMEMBERED {
                spent.clear();
            }
        }
        work(spent.entry((portal, server.to_owned())).or_default())
    }
}

/// About how many bytes a content has.
pub(super) fn size(content: &Object) -> usize {
    content.iter().map(|(key, value)| key.len().saturating_add(weight(value)).saturating_add(4)).sum()
}

fn weight(value: &Value) -> usize {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 8,
        Value::String(text) => text.len().saturating_add(2),
        Value::Array(values) => values.iter().map(|value| weight(value).saturating_add(1)).sum(),
        Value::Object(object) => size(object),
    }
}

#[cfg(test)]
mod tests {
    use ruma::server_name;
    use serde_json::json;

    use super::*;

    const fn unlimited() -> config::Budgets {
        config::Budgets {
            events_per_second: 0,
            bytes_per_day: 0,
            ghosts_per_hour: 0,
            backlog: 0,
            portals_per_hour: 0,
            open_invites_per_user: 0,
            open_invites_per_server: 0,
            edus_per_second: 0,
        }
    }

    const LIMITS: config::Budgets =
        config::Budgets { events_per_second: 2, bytes_per_day: 86_400_000, ghosts_per_hour: 3, ..unlimited() };

    fn wait(result: Result<(), Refusal>) -> Option<u64> {
        match result {
            Ok(()) => None,
            Err(Refusal::Budget { retry_after_ms, .. }) => Some(retry_after_ms),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn a_burst_passes_then_the_rate_and_each_server_has_its_own() {
        let budgets = Budgets::default();
        let (one, other) = (server_name!("one"), server_name!("other"));
        let over = |server, now| wait(budgets.over(&LIMITS, 1, server, now));
        for _ in 0..120 {
            assert_eq!(over(one, 0), None);
            budgets.spend(1, one, 10);
        }
        assert_eq!(over(one, 0), Some(500));
        assert_eq!(over(other, 0), None);
        assert_eq!(wait(budgets.over(&LIMITS, 2, one, 0)), None);
        assert_eq!(over(one, 499), Some(PAUSE_MS));
        assert_eq!(over(one, 500), None);
        budgets.spend(1, one, 10);
        assert_eq!(over(one, 500), Some(500));
        // One that goes back in time is none the worse for it.
        assert_eq!(over(one, 100), Some(500));
        assert_eq!(over(one, 100 + BURST_MS), None);
        let unlimited = unlimited();
        assert_eq!(wait(budgets.over(&unlimited, 1, one, 0)), None);
    }

    #[test]
    fn bytes_and_ghosts_have_their_own_measure() {
        let budgets = Budgets::default();
        let server = server_name!("one");
        budgets.spend(1, server, 86_400_000);
        assert_eq!(wait(budgets.over(&LIMITS, 1, server, 0)), Some(PAUSE_MS));
        assert_eq!(wait(budgets.over(&LIMITS, 1, server, 1_000)), None);
        let ghost = |now, asked| wait(budgets.ghost(&LIMITS, 1, server, now, asked));
        for _ in 0..3 {
            assert_eq!(ghost(0, true), None);
            assert_eq!(ghost(0, false), None);
        }
        assert_eq!(ghost(0, false), Some(1_200_000));
        assert_eq!(ghost(1_200_000, true), None);
        let content = json!({ "body": "x".repeat(1000), "n": [1, null, { "a": "b" }] });
        let size = size(content.as_object().unwrap());
        assert!((1000..1100).contains(&size), "{size}");
    }
}
