//! Resolving several states into one: state resolution v2, and v2.1 for room version 12. ruma resolves; here it is fed with
//! no more than what can make a difference, so that a fork costs what differs between its branches, not what the room holds.
//! <https://spec.matrix.org/v1.16/rooms/v12/#state-resolution>

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use imbl::ordmap::DiffItem;
use ruma::events::StateEventType;
use ruma::room_version_rules::RoomVersionRules;
use ruma::state_res::utils::event_id_set::EventIdSet;
use ruma::state_res::{self, StateMap};
use ruma::{EventId, OwnedEventId};

use super::auth::auth_event_keys;
use super::events::{EventMap, Events};
use super::pdu::create_of_room;
use super::snapshot::{Change, Snapshot, StateKey};
use super::stored::Stored;
use crate::refusal::Refusal;
use crate::store::StoreError;

/// What must be done to the first of `states` (two or more, all different) to make it the resolved state.
pub async fn resolve(
    events: &Events,
    staged: &EventMap,
    room_id: &ruma::RoomId,
    rules: &RoomVersionRules,
    states: &[Snapshot],
) -> Result<Vec<Change>, Refusal> {
    let Some(first) = states.first() else { return Ok(Vec::new()) };
    let conflicted_keys = conflicted_keys(states);
    if conflicted_keys.is_empty() {
        return Ok(Vec::new());
    }
    let inputs = Inputs::gather(events, staged, room_id, rules, states, &conflicted_keys).await?;
    let resolved = inputs.resolve(rules)?;

    let mut changes = Vec::new();
    for (key, event_id) in &resolved {
        let decided_by_all = first.map.contains_key(key) && !conflicted_keys.contains(key);
        if !decided_by_all && first.map.get(key) != Some(event_id) {
            changes.push((key.clone(), Some(event_id.clone())));
        }
    }
    for key in &conflicted_keys {
        if !resolved.contains_key(key) && first.map.contains_key(key) {
            changes.push((key.clone(), None));
        }
    }
    Ok(changes)
}

/// The keys that do not have the same event in every state.
fn conflicted_keys(states: &[Snapshot]) -> BTreeSet<StateKey> {
    let Some((first, others)) = states.split_first() else { return BTreeSet::new() };
    let mut keys = BTreeSet::new();
    for other in others {
        for item in first.map.diff(&other.map) {
            let (DiffItem::Add(key, _) | DiffItem::Remove(key, _) | DiffItem::Update { new: (key, _), .. }) = item;
            keys.insert(key.clone());
        }
    }
    keys
}

/// What is given to ruma.
struct Inputs {
    maps: Vec<StateMap<OwnedEventId>>,
    auth_difference: EventIdSet<OwnedEventId>,
    subgraph: EventIdSet<OwnedEventId>,
    events: EventMap,
}

impl Inputs {
    async fn gather(
        events: &Events,
        staged: &EventMap,
        room_id: &ruma::RoomId,
        rules: &RoomVersionRules,
        states: &[Snapshot],
        conflicted_keys: &BTreeSet<StateKey>,
    ) -> Result<Self, Refusal> {
        let conflicted_of = |state: &Snapshot| -> Vec<OwnedEventId> {
            conflicted_keys.iter().filter_map(|key| state.map.get(key).cloned()).collect()
        };
        // The auth chains of what is in conflict, one for each state.
        let mut known = EventMap::new();
        let mut chains = Vec::new();
        let mut conflicted = EventMap::new();
        for state in states {
            let roots = events.with_staged(&conflicted_of(state), staged).await?;
            let chain = events.auth_chain(roots.values().cloned().collect(), staged).await?;
            conflicted.extend(roots);
            known.extend(chain.iter().map(|(id, event)| (id.clone(), event.clone())));
            chains.push(chain.into_keys().collect::<HashSet<_>>());
        }
        let auth_difference = auth_difference(events, staged, states, conflicted_keys, &chains).await?;
        let subgraph = subgraph(&conflicted, &known);
        known.extend(conflicted.iter().map(|(id, event)| (id.clone(), event.clone())));

        // Of what all agree on, that alone can matter which something of the full conflicted set is checked against.
        let mut needed = BTreeSet::from([key(StateEventType::RoomPowerLevels), key(StateEventType::RoomCreate)]);
        let full_conflicted = conflicted.keys().chain(auth_difference.iter()).chain(&subgraph);
        for event in full_conflicted.filter_map(|id| known.get(id)) {
            needed.extend(auth_event_keys(&event.pdu, &rules.authorization).unwrap_or_default());
        }
        needed.extend(conflicted_keys.iter().cloned());
        let maps: Vec<StateMap<OwnedEventId>> = states.iter().map(|state| part(state, &needed)).collect();

        let mut missing: Vec<_> = maps.iter().flat_map(|map| map.values().cloned()).collect();
        missing.extend(create_of_room(room_id));
        missing.retain(|id| !known.contains_key(id));
        let rest = events.with_staged(&missing, staged).await?;
        known.extend(events.auth_chain(rest.values().cloned().collect(), staged).await?);
        known.extend(rest);
        Ok(Self { maps, auth_difference, subgraph: subgraph.into_iter().collect(), events: known })
    }

    /// States that cannot be resolved are the fault of the event that brings them together: it fails alone, and for good.
    fn resolve(&self, rules: &RoomVersionRules) -> Result<BTreeMap<StateKey, OwnedEventId>, Refusal> {
        let v2 = rules.state_res.v2_rules().ok_or_else(|| StoreError::corrupt("room version", "no v2 resolution"))?;
        // Of an empty chain and another one the difference is the other one.
        let chains = vec![self.auth_difference.clone(), EventIdSet::new()];
        let fetch = |id: &EventId| self.events.get(id).cloned();
        let resolved =
            state_res::resolve::<Arc<Stored>, _>(&rules.authorization, v2, &self.maps, chains, fetch, |_| {
                Some(self.subgraph.clone())
            })
            .map_err(|error| Refusal::MatrixRule(format!("the states before it cannot be resolved: {error}")))?;
        Ok(resolved.into_iter().map(|((kind, state_key), id)| ((kind.to_string(), state_key), id)).collect())
    }
}

/// The auth difference of whole states, from the chains of what is in conflict: what an agreed event's chain holds is in
/// every state's chain.
async fn auth_difference(
    events: &Events,
    staged: &EventMap,
    states: &[Snapshot],
    conflicted_keys: &BTreeSet<StateKey>,
    chains: &[HashSet<OwnedEventId>],
) -> Result<EventIdSet<OwnedEventId>, StoreError> {
    let mut counts: HashMap<&OwnedEventId, usize> = HashMap::new();
    for id in chains.iter().flatten() {
        *counts.entry(id).or_default() += 1;
    }
    let mut candidates: HashSet<OwnedEventId> =
        counts.into_iter().filter(|(_, count)| *count < chains.len()).map(|(id, _)| id.clone()).collect();
    let Some(first) = states.first().filter(|_| !candidates.is_empty()) else {
        return Ok(candidates.into_iter().collect());
    };
    let mut level: Vec<OwnedEventId> =
        first.map.iter().filter(|(key, _)| !conflicted_keys.contains(*key)).map(|(_, id)| id.clone()).collect();
    let mut seen = HashSet::new();
    while !level.is_empty() && !candidates.is_empty() {
        let loaded = events.with_staged(&level, staged).await?;
        level.clear();
        for id in loaded.into_values().flat_map(|event| event.pdu.auth_events.clone()) {
            candidates.remove(&id);
            if seen.insert(id.clone()) {
                level.push(id);
            }
        }
    }
    Ok(candidates.into_iter().collect())
}

/// The conflicted state subgraph: what lies on a path of auth events from one conflicted event to another, both included.
/// `chain` holds the auth chains of all conflicted events.
fn subgraph(conflicted: &EventMap, chain: &EventMap) -> HashSet<OwnedEventId> {
    let mut cites: HashMap<&OwnedEventId, Vec<&OwnedEventId>> = HashMap::new();
    for event in chain.values().chain(conflicted.values()) {
        for id in &event.pdu.auth_events {
            cites.entry(id).or_default().push(&event.pdu.event_id);
        }
    }
    // Everything in `chain` is reached from a conflicted event; what reaches one as well lies between two.
    let mut reaching: HashSet<OwnedEventId> = conflicted.keys().cloned().collect();
    let mut level: Vec<&OwnedEventId> = conflicted.keys().collect();
    while let Some(id) = level.pop() {
        for citing in cites.get(id).into_iter().flatten() {
            if reaching.insert((*citing).clone()) {
                level.push(citing);
            }
        }
    }
    reaching
}

fn part(state: &Snapshot, needed: &BTreeSet<StateKey>) -> StateMap<OwnedEventId> {
    needed
        .iter()
        .filter_map(|key| {
            let id = state.map.get(key)?;
            Some(((StateEventType::from(key.0.as_str()), key.1.clone()), id.clone()))
        })
        .collect()
}

fn key(kind: StateEventType) -> StateKey {
    (kind.to_string(), String::new())
}

#[cfg(test)]
mod tests;
