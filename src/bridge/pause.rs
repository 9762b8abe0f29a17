//! Hubs that have to wait: what they send comes faster than it can be carried over, and it must not fill the store.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ruma::ServerName;

/// Portals of which more waits than may. Their hubs wait with what they send there; their other rooms go on.
#[derive(Debug, Default)]
pub(super) struct Pauses {
    portals: Mutex<HashSet<i64>>,
}

impl Pauses {
    /// So many events of a portal wait, of `limit` that may: beyond, its hub waits until half of them are gone. Without a
    /// limit (0) nobody does.
    pub(super) fn waiting(&self, portal: i64, hub: &ServerName, count: i64, limit: u32) {
        let limit = i64::from(limit);
        let mut portals = self.portals();
        if limit > 0 && count > limit {
            if portals.insert(portal) {
                tracing::warn!(portal, %hub, count, "a portal is paused until less of it waits");
            }
        } else if (limit == 0 || count <= limit / 2) && portals.remove(&portal) {
            tracing::info!(portal, %hub, count, "a portal goes on");
        }
    }

    /// Whether any portal is paused.
    pub(super) fn any(&self) -> bool {
        !self.portals().is_empty()
    }

    /// Whether a portal is paused.
    pub(super) fn is_paused(&self, portal: i64) -> bool {
        self.portals().contains(&portal)
    }

    fn portals(&self) -> MutexGuard<'_, HashSet<i64>> {
        self.portals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use ruma::server_name;

    use super::*;

    #[test]
    fn a_hub_waits_from_the_limit_until_half_of_it() {
        let pauses = Pauses::default();
        let hub = server_name!("hub");
        for (count, waits) in [(10, false), (11, true), (6, true), (5, false), (10, false)] {
            pauses.waiting(1, hub, count, 10);
            assert_eq!((pauses.any(), pauses.is_paused(1)), (waits, waits), "{count}");
            assert!(!pauses.is_paused(2));
        }
        pauses.waiting(1, hub, i64::MAX, 0);
        assert!(!pauses.any());
    }
}
