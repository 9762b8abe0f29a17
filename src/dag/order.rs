//! The fixed order in which events of a batch are taken: each after the events before it, ties by depth, time and ID.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

use ruma::OwnedEventId;

use super::pdu::Pdu;

/// Sorts `events` so that each comes after those it names in `before` (of those that are here); the rest by
/// `(depth, origin_server_ts, event ID)`. Events in a cycle, which cannot be honest, come last.
pub fn linearize<T>(events: Vec<T>, pdu: impl Fn(&T) -> &Pdu, before: impl Fn(&Pdu) -> Vec<OwnedEventId>) -> Vec<T> {
    let ids: BTreeSet<OwnedEventId> = events.iter().map(|event| pdu(event).event_id.clone()).collect();
    let mut waits_for: BTreeMap<OwnedEventId, usize> = BTreeMap::new();
    let mut followers: BTreeMap<OwnedEventId, Vec<OwnedEventId>> = BTreeMap::new();
    let mut ready = BinaryHeap::new();
    let rank = |pdu: &Pdu| Reverse((pdu.depth, pdu.origin_server_ts, pdu.event_id.clone()));
    let mut by_id = BTreeMap::new();
    for event in events {
        let fields = pdu(&event);
        let id = fields.event_id.clone();
        let here: BTreeSet<_> = before(fields).into_iter().filter(|prev| ids.contains(prev) && *prev != id).collect();
        if here.is_empty() {
            ready.push(rank(fields));
        }
        waits_for.insert(id.clone(), here.len());
        for prev in here {
            followers.entry(prev).or_default().push(id.clone());
        }
        by_id.insert(id, event);
    }
    let mut sorted = Vec::with_capacity(by_id.len());
    while let Some(Reverse((_, _, id))) = ready.pop() {
        if let Some(event) = by_id.remove(&id) {
            sorted.push(event);
        }
        for follower in followers.remove(&id).unwrap_or_default() {
            let Some(count) = waits_for.get_mut(&follower) else { continue };
            *count = count.saturating_sub(1);
            if *count == 0
                && let Some(event) = by_id.get(&follower)
            {
                ready.push(rank(pdu(event)));
            }
        }
    }
    sorted.extend(by_id.into_values());
    sorted
}
