//! The state of a room at one point of its graph: a map that shares structure with those before and after it, and its row,
//! which holds the difference from another group or, so that chains stay short, the whole map.

use imbl::OrdMap;
use ruma::OwnedEventId;

use crate::store::StoreError;
use crate::store::dag::GroupRow;

/// `(type, state key)`
pub type StateKey = (String, String);

/// A change of one key: the event that stands there now, or none.
pub type Change = (StateKey, Option<OwnedEventId>);

/// A state with the ID of its group. Two states with the same ID are the same.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// The group's ID.
    pub id: i64,
    /// How many changes lead from the last group that was written whole to this one.
    pub weight: i64,
    /// The state.
    pub map: OrdMap<StateKey, OwnedEventId>,
}

/// Below so many changes since the last whole group no other whole group is written, however small the state.
const MIN_WEIGHT: i64 = 64;

impl Snapshot {
    /// The empty state, and its row.
    pub fn empty(id: i64) -> (Self, GroupRow) {
        (Self { id, ..Self::default() }, GroupRow { id, prev_id: None, weight: 0, delta: b"[]".to_vec() })
    }

    /// The state that `changes` make of this one, and its row. The row holds everything when the changes since the last
    /// whole row outweigh half of the state, so that what is written stays in proportion to what changed.
    pub fn with(&self, id: i64, changes: &[Change]) -> Result<(Self, GroupRow), StoreError> {
        let mut map = self.map.clone();
        for (key, event_id) in changes {
            match event_id {
                Some(event_id) => map.insert(key.clone(), event_id.clone()),
                None => map.remove(key),
            };
        }
        let weight = self.weight.saturating_add(count(changes.len()));
        if weight <= MIN_WEIGHT.max(count(map.len()) / 2) {
            let row = GroupRow { id, prev_id: Some(self.id), weight, delta: encode(changes.iter().cloned())? };
            return Ok((Self { id, weight, map }, row));
        }
        let all = map.iter().map(|(key, event_id)| (key.clone(), Some(event_id.clone())));
        let row = GroupRow { id, prev_id: None, weight: 0, delta: encode(all)? };
        Ok((Self { id, weight: 0, map }, row))
    }

    /// The state of a chain of rows, as [`crate::store::dag::group_chain`] gives them.
    pub fn from_chain(id: i64, mut rows: Vec<GroupRow>) -> Result<Self, StoreError> {
        let mut map = OrdMap::new();
        let weight = rows.iter().find(|row| row.id == id).map_or(0, |row| row.weight);
        rows.sort_by_key(|row| row.id);
        if rows.first().is_none_or(|row| row.prev_id.is_some()) {
            return Err(StoreError::corrupt("state group", format!("{id} does not lead to a whole state")));
        }
        for row in rows {
            let changes: Vec<(String, String, Option<OwnedEventId>)> =
                serde_json::from_slice(&row.delta).map_err(|error| StoreError::corrupt("state group", error))?;
            for (kind, state_key, event_id) in changes {
                match event_id {
                    Some(event_id) => map.insert((kind, state_key), event_id),
                    None => map.remove(&(kind, state_key)),
                };
            }
        }
        Ok(Self { id, weight, map })
    }

    /// The event that stands under a key.
    pub fn get(&self, kind: &str, state_key: &str) -> Option<&OwnedEventId> {
        self.map.get(&(kind.to_owned(), state_key.to_owned()))
    }
}

fn encode(changes: impl Iterator<Item = Change>) -> Result<Vec<u8>, StoreError> {
    let list: Vec<_> = changes.map(|((kind, state_key), event_id)| (kind, state_key, event_id)).collect();
    serde_json::to_vec(&list).map_err(|error| StoreError::corrupt("state group", error))
}

fn count(length: usize) -> i64 {
    i64::try_from(length).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(n: usize) -> OwnedEventId {
        format!("${n:043}").as_str().try_into().unwrap()
    }

    #[test]
    fn a_chain_of_differences_gives_the_state_back_and_is_never_long() {
        let (mut state, row) = Snapshot::empty(1);
        let mut rows = vec![row];
        for n in 0..1000 {
            let key = ("m.room.member".to_owned(), format!("@u{}:x", n % 300));
            let change = (n % 7 != 0).then(|| event(n));
            let (next, row) = state.with(state.id + 1, &[(key, change)]).unwrap();
            (state, rows) = (next, [rows, vec![row]].concat());
        }
        let mut chain = Vec::new();
        let mut id = Some(state.id);
        while let Some(row) = id.and_then(|id| rows.iter().find(|row| row.id == id)) {
            chain.push(row.clone());
            id = row.prev_id;
        }
        assert!(chain.len() <= 200, "{}", chain.len());
        let loaded = Snapshot::from_chain(state.id, chain).unwrap();
        assert_eq!(loaded.map, state.map);
        assert_eq!(loaded.weight, state.weight);
    }

    #[test]
    fn a_chain_without_its_whole_state_is_refused() {
        let (state, _) = Snapshot::empty(1);
        let (_, row) = state.with(2, &[(("a".to_owned(), String::new()), Some(event(1)))]).unwrap();
        assert!(Snapshot::from_chain(2, vec![row]).is_err());
    }
}
