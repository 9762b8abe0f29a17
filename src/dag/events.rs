//! Reading events and states: from the caches, and what is not there from the store.

use std::collections::HashMap;
use std::sync::Arc;

use moka::future::Cache;
use moka::policy::EvictionPolicy;
use ruma::{EventId, OwnedEventId};

use super::snapshot::Snapshot;
use super::stored::Stored;
use crate::admin::metrics::CacheMeter;
use crate::refusal::Refusal;
use crate::store::{Store, StoreError, dag};

/// Some events by their IDs.
pub type EventMap = HashMap<OwnedEventId, Arc<Stored>>;

/// How many events an auth chain may have, which are held in memory while a state is resolved (about half a gigabyte). The
/// largest public rooms have some ten thousand; where somebody has made more, what would need them is refused, and the
/// rest of the transaction and all other rooms go on.
const MAX_AUTH_CHAIN: usize = 200_000;

/// The caches over the store; clones share them.
#[derive(Clone)]
pub struct Events {
    store: Store,
    events: Cache<OwnedEventId, Arc<Stored>>,
    groups: Cache<i64, Snapshot>,
    events_meter: CacheMeter,
    groups_meter: CacheMeter,
    pub(super) max_auth_chain: usize,
}

/// How many events an event counts as: large ones as several, so that the cache is bounded in bytes too.
fn weight(_: &OwnedEventId, event: &Arc<Stored>) -> u32 {
    u32::try_from(event.pdu.raw.get().len() / 4096).unwrap_or(u32::MAX).saturating_add(1)
}

impl Events {
    /// Caches for `events` events and `groups` states.
    pub fn new(store: Store, events: u64, groups: u64) -> Self {
        // What is new is asked for next, by the bridge and by the events after it; it must not have to prove itself against
        // what was asked for often.
        let events = Cache::builder().eviction_policy(EvictionPolicy::lru()).max_capacity(events).weigher(weight);
        let (events, groups) = (events.build(), Cache::new(groups));
        let events_meter = CacheMeter::watch("graph_events", &events);
        let groups_meter = CacheMeter::watch("graph_states", &groups);
        Self { store, events, groups, events_meter, groups_meter, max_auth_chain: MAX_AUTH_CHAIN }
    }

    /// One event.
    pub async fn get(&self, event_id: &EventId) -> Result<Option<Arc<Stored>>, StoreError> {
        let found = self.get_many(&[event_id.to_owned()]).await?;
        Ok(found.into_values().next())
    }

    /// Those of the events that are stored.
    pub async fn get_many(&self, ids: &[OwnedEventId]) -> Result<EventMap, StoreError> {
        let mut found = EventMap::new();
        let mut missing = Vec::new();
        for id in ids {
            if found.contains_key(id) {
                continue;
            }
            match self.events.get(id).await {
                Some(event) => drop(found.insert(id.clone(), event)),
                None => missing.push(id.clone()),
            }
        }
        missing.sort_unstable();
        missing.dedup();
        self.events_meter.looked_up(found.len(), missing.len());
        if missing.is_empty() {
            return Ok(found);
        }
        for row in dag::events(&self.store, &missing).await? {
            let event = Arc::new(Stored::from_row(row)?);
            // What has no state yet may get one; only what is final is kept from a read, so that no read can bring an
            // older row back after a commit.
            let event = if event.groups.is_some() {
                self.events.entry(event.pdu.event_id.clone()).or_insert(event).await.into_value()
            } else {
                event
            };
            found.insert(event.pdu.event_id.clone(), event);
        }
        Ok(found)
    }

    /// Keeps what was just committed.
    pub async fn committed(&self, events: impl IntoIterator<Item = Arc<Stored>>, groups: Vec<Snapshot>) {
        for event in events {
            self.events.insert(event.pdu.event_id.clone(), event).await;
        }
        for group in groups {
            self.groups.insert(group.id, group).await;
        }
    }

    /// Reads these from the store again when they are next asked for.
    pub async fn forget(&self, events: impl Iterator<Item = &OwnedEventId>) {
        for event_id in events {
            self.events.invalidate(event_id).await;
        }
    }

    /// The state of a group.
    pub async fn group(&self, id: i64) -> Result<Snapshot, StoreError> {
        if let Some(group) = self.groups.get(&id).await {
            self.groups_meter.looked_up(1, 0);
            return Ok(group);
        }
        self.groups_meter.looked_up(0, 1);
        let chain = dag::group_chain(&self.store, id).await?;
        let group = Snapshot::from_chain(id, chain)?;
        self.groups.insert(id, group.clone()).await;
        Ok(group)
    }

    /// Everything that the auth events of `roots` lead to; `roots` themselves are in it only where another's chain holds
    /// them. `staged` are events that are not committed yet. A chain of more events than fit is refused.
    pub async fn auth_chain(&self, roots: Vec<Arc<Stored>>, staged: &EventMap) -> Result<EventMap, Refusal> {
        let mut chain = EventMap::new();
        let mut level: Vec<OwnedEventId> = roots.into_iter().flat_map(|event| event.pdu.auth_events.clone()).collect();
        while !level.is_empty() {
            level.retain(|id| !chain.contains_key(id));
            let events = self.with_staged(&level, staged).await?;
            level = events.values().flat_map(|event| event.pdu.auth_events.iter().cloned()).collect();
            chain.extend(events);
            if chain.len() > self.max_auth_chain {
                return Err(Refusal::TooManyEvents { what: "auth chain", limit: self.max_auth_chain });
            }
        }
        Ok(chain)
    }

    /// The same as [`Events::get_many`], with events that are not committed yet.
    pub async fn with_staged(&self, ids: &[OwnedEventId], staged: &EventMap) -> Result<EventMap, StoreError> {
        let committed: Vec<_> = ids.iter().filter(|id| !staged.contains_key(*id)).cloned().collect();
        let mut found = self.get_many(&committed).await?;
        for id in ids {
            if let Some(event) = staged.get(id) {
                found.insert(id.clone(), event.clone());
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::dag::pdu::Unverified;
    use crate::dag::stored::Groups;
    use crate::event::RoomVersion;

    fn event(number: u64, body: usize) -> Arc<Stored> {
        let event = json!({ "type": "m.room.message", "sender": "@a:x", "room_id": "!room:x", "depth": number,
            "content": { "body": "x".repeat(body) }, "origin_server_ts": number, "auth_events": [],
            "prev_events": [format!("${}", "p".repeat(43))] });
        let pdu = Unverified::from_object(event.as_object().unwrap().clone(), RoomVersion::V11).unwrap().pdu().clone();
        Arc::new(Stored { groups: Some(Groups { before: 1, after: 1 }), ..Stored::new(pdu) })
    }

    #[tokio::test]
    async fn what_is_new_stays_in_the_cache_and_large_events_leave_less_room() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&format!("sqlite://{}", directory.path().join("db").display())).await.unwrap();
        let events = Events::new(store.clone(), 100, 10);
        let all: Vec<_> = (0..300).map(|number| event(number, 10)).collect();
        for event in &all {
            events.committed([event.clone()], Vec::new()).await;
            // The old ones are popular.
            for old in all.iter().take(100) {
                events.events.get(&old.pdu.event_id).await;
            }
        }
        let new: Vec<_> = (300..310).map(|number| event(number, 10)).collect();
        events.committed(new.clone(), Vec::new()).await;
        events.events.run_pending_tasks().await;
        for event in new {
            assert!(events.events.contains_key(&event.pdu.event_id));
        }
        events.committed((400..500).map(|number| event(number, 40_000)), Vec::new()).await;
        events.events.run_pending_tasks().await;
        assert!(events.events.entry_count() <= 10, "{}", events.events.entry_count());
        store.close().await;
    }
}
