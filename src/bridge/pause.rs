//! Hubs that have to wait: what they send comes faster than it can be carried over, and it must not fill the store.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use ruma::{OwnedServerName, ServerName};

/// Portals of which more waits than may, with their hubs.
#[derive(Debug, Default)]
pub(super) struct Pauses {
    portals: Mutex<HashMap<i64, OwnedServerName>>,
}

impl Pauses {
    /// So many events of a portal wait, of `limit` that may: beyond, its hub waits until half of them are gone. Without a
    /// limit (0) nobody does.
    pub(super) fn waiting(&self, portal: i64, hub: &ServerName, count: i64, limit: u32) {
        let limit = i64::from(limit);
        let mut portals = self.portals.lock().unwrap_or_else(PoisonError::into_inner);
        if limit > 0 && count > limit {
            if portals.insert(portal, hub.to_owned()).is_none() {
                tracing::warn!(portal, %hub, count, "a portal is paused until less of it waits");
            }
        } else if (limit == 0 || count <= limit / 2) && portals.remove(&portal).is_some() {
            tracing::info!(portal, %hub, count, "a portal goes on");
        }
    }

    /// Whether a server has to wait.
    pub(super) fn waits(&self, hub: &ServerName) -> bool {
        let portals = self.portals.lock().unwrap_or_else(PoisonError::into_inner);
        portals.values().any(|paused| paused == hub)
    }

    /// Whether a portal is paused.
    pub(super) fn is_paused(&self, portal: i64) -> bool {
        self.portals.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&portal)
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
            assert_eq!((pauses.waits(hub), pauses.is_paused(1)), (waits, waits), "{count}");
            assert!(!pauses.waits(server_name!("other")) && !pauses.is_paused(2));
        }
        pauses.waiting(1, hub, i64::MAX, 0);
        assert!(!pauses.waits(hub));
    }
}
