//! Portals in memory, as long as they have not ended: which rooms are watched, read by every batch that either side accepts,
//! without a lock.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use arc_swap::ArcSwap;
use ruma::{OwnedRoomId, RoomId, ServerName};
use tokio::sync::Notify;

use super::portal::{Portal, PortalState};
use crate::identity::Side;

/// A portal as the tasks that work for it share it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) number: i64,
    portal: ArcSwap<Portal>,
    pub(super) from_matrix: Direction,
    pub(super) from_lm: Direction,
    /// Whether a task tries again and again to end it.
    pub(super) is_ending: AtomicBool,
    /// Held while somebody comes into a room that nobody is in yet.
    pub(super) opening: tokio::sync::Mutex<()>,
}

impl Entry {
    /// The portal as it is now.
    pub(super) fn portal(&self) -> Arc<Portal> {
        self.portal.load_full()
    }

    /// The direction whose sources are on `side`.
    pub(super) fn direction(&self, side: Side) -> &Direction {
        match side {
            Side::Matrix => &self.from_matrix,
            Side::Lm => &self.from_lm,
        }
    }
}

/// One direction of a portal: whether a task works on it.
#[derive(Debug, Default)]
pub(super) struct Direction {
    state: AtomicU8,
    /// Wakes the task when it waits for something.
    pub(super) wake: Notify,
    /// Held while images of this direction are made.
    pub(super) making: tokio::sync::Mutex<()>,
}

const IDLE: u8 = 0;
const RUNNING: u8 = 1;
const AGAIN: u8 = 2;

impl Direction {
    /// Says that there is news. True when no task works on it: the caller starts one.
    pub(super) fn call(&self) -> bool {
        let start = self.state.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |state| {
            Some(if state == IDLE { RUNNING } else { AGAIN })
        }) == Ok(IDLE);
        self.wake.notify_one();
        start
    }

    /// Whether there was news since this was last asked; for the task that works.
    pub(super) fn take_news(&self) -> bool {
        self.state.compare_exchange(AGAIN, RUNNING, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// The task has nothing left. True when it may end; false when there was news meanwhile.
    pub(super) fn rest(&self) -> bool {
        let ended = self.state.compare_exchange(RUNNING, IDLE, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        if !ended {
            self.state.store(RUNNING, Ordering::SeqCst);
        }
        ended
    }

    /// The task ends, whatever came.
    pub(super) fn end(&self) {
        self.state.store(IDLE, Ordering::SeqCst);
    }
}

#[derive(Debug, Clone)]
enum Watch {
    Portal(Arc<Entry>),
    /// The portal is being made: what is accepted is kept for it.
    Making,
}

/// All portals.
#[derive(Debug, Default)]
pub(super) struct Registry {
    rooms: ArcSwap<imbl::HashMap<(Side, OwnedRoomId), Watch>>,
    tables: Mutex<Tables>,
}

#[derive(Debug, Default)]
struct Tables {
    portals: BTreeMap<i64, Arc<Entry>>,
    aliases: BTreeMap<String, i64>,
}

impl Registry {
    /// Whether what is accepted in a room waits for the bridge.
    pub(super) fn watches(&self, side: Side, room_id: &RoomId) -> bool {
        match self.rooms.load().get(&(side, room_id.to_owned())) {
            Some(Watch::Portal(entry)) => {
                let state = entry.portal.load().state;
                // What comes between a ghost's join and its user's is kept.
                state.carries() || state == PortalState::Pending
            }
            Some(Watch::Making) => true,
            None => false,
        }
    }

    /// The portal of a room.
    pub(super) fn of_room(&self, side: Side, room_id: &RoomId) -> Option<Arc<Entry>> {
        match self.rooms.load().get(&(side, room_id.to_owned()))? {
            Watch::Portal(entry) => Some(entry.clone()),
            Watch::Making => None,
        }
    }

    /// The portal that is one room on both sides: nothing waits there to cross, so it is not watched.
    pub(super) fn of_one_room(&self, room_id: &RoomId) -> Option<Arc<Entry>> {
        let is_it = |entry: &&Arc<Entry>| {
            let portal = entry.portal.load();
            portal.is_one_room() && portal.lm_room_id == *room_id
        };
        self.lock(|tables| tables.portals.values().find(is_it).cloned())
    }

    /// A portal by its number.
    pub(super) fn get(&self, number: i64) -> Option<Arc<Entry>> {
        self.lock(|tables| tables.portals.get(&number).cloned())
    }

    /// The portals after a number, in the order of their making.
    pub(super) fn after(&self, number: i64, limit: usize) -> Vec<Arc<Entry>> {
        let from = number.saturating_add(1);
        self.lock(|tables| tables.portals.range(from..).take(limit).map(|(_, entry)| entry.clone()).collect())
    }

    /// Whether a server is the hub of a portal.
    pub(super) fn has_hub(&self, server: &ServerName) -> bool {
        let is_hub = |entry: &Arc<Entry>| entry.portal.load().lm_hub == *server;
        self.lock(|tables| tables.portals.values().any(is_hub))
    }

    /// Where the localpart of an alias leads.
    pub(super) fn of_alias(&self, localpart: &str) -> Option<Arc<Entry>> {
        self.lock(|tables| tables.portals.get(tables.aliases.get(localpart)?).cloned())
    }

    /// Keeps what is accepted in a room for a portal that is being made.
    pub(super) fn watch(&self, side: Side, room_id: &RoomId) {
        self.rooms.rcu(|rooms| {
            let mut rooms = imbl::HashMap::clone(rooms);
            rooms.entry((side, room_id.to_owned())).or_insert(Watch::Making);
            rooms
        });
    }

    /// Stops that, when nothing came of it.
    pub(super) fn unwatch(&self, side: Side, room_id: &RoomId) {
        self.rooms.rcu(|rooms| {
            let key = (side, room_id.to_owned());
            let mut rooms = imbl::HashMap::clone(rooms);
            if matches!(rooms.get(&key), Some(Watch::Making)) {
                rooms.remove(&key);
            }
            rooms
        });
    }

    /// Adds a portal, or replaces what is known of it. One that has ended is forgotten, with its aliases; who holds it sees
    /// that it has.
    pub(super) fn put(&self, number: i64, portal: Portal) -> Arc<Entry> {
        let ended = portal.state == PortalState::Ended;
        // Nothing that is accepted in a room that is shared waits for the bridge.
        let sides: &[Side] = if portal.is_one_room() { &[] } else { portal.sides() };
        let rooms: Vec<_> = sides.iter().map(|side| (*side, portal.room(*side).to_owned())).collect();
        let entry = self.lock(|tables| match tables.portals.get(&number) {
            Some(entry) => {
                entry.portal.store(Arc::new(portal));
                entry.clone()
            }
            None => {
                let entry = Arc::new(Entry {
                    is_ending: AtomicBool::default(),
                    opening: tokio::sync::Mutex::default(),
                    number,
                    portal: ArcSwap::from_pointee(portal),
                    from_matrix: Direction::default(),
                    from_lm: Direction::default(),
                });
                if !ended {
                    tables.portals.insert(number, entry.clone());
                }
                entry
            }
        });
        if ended {
            self.lock(|tables| {
                tables.portals.remove(&number);
                tables.aliases.retain(|_, leads_to| *leads_to != number);
            });
        }
        self.rooms.rcu(|known| {
            let mut known = imbl::HashMap::clone(known);
            for room in &rooms {
                // The room of a portal that has ended may have a new one.
                let other = matches!(known.get(room), Some(Watch::Portal(other)) if other.number != number);
                match ended {
                    true if !other => drop(known.remove(room)),
                    true => {}
                    false => drop(known.insert(room.clone(), Watch::Portal(entry.clone()))),
                }
            }
            known
        });
        entry
    }

    /// Makes an alias lead to a portal.
    pub(super) fn set_alias(&self, localpart: &str, number: i64) {
        self.lock(|tables| tables.aliases.insert(localpart.to_owned(), number));
    }

    fn lock<T>(&self, work: impl FnOnce(&mut Tables) -> T) -> T {
        // Nothing in here panics half-way, so a poisoned lock guards whole tables.
        work(&mut self.tables.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use ruma::{room_id, server_name};

    use super::super::portal::PortalKind;
    use super::*;

    fn portal(number: i64, matrix: &str, lm: &str, state: PortalState) -> Portal {
        Portal {
            portal_id: format!("p{number}"),
            kind: PortalKind::Created,
            state,
            matrix_room_id: matrix.try_into().unwrap(),
            lm_room_id: lm.try_into().unwrap(),
            lm_hub: server_name!("g").to_owned(),
            alias: None,
            reason: None,
            ghosts_alone: false,
        }
    }

    #[test]
    fn rooms_are_watched_from_the_making_of_a_portal_to_its_end() {
        let registry = Registry::default();
        let (matrix, lm) = (room_id!("!m:g"), room_id!("!l:g"));
        registry.watch(Side::Lm, lm);
        assert!(registry.watches(Side::Lm, lm) && registry.of_room(Side::Lm, lm).is_none());
        registry.unwatch(Side::Lm, lm);
        assert!(!registry.watches(Side::Lm, lm));

        registry.put(1, portal(1, "!m:g", "!l:g", PortalState::Active));
        registry.unwatch(Side::Lm, lm);
        registry.set_alias("a", 1);
        assert!(registry.watches(Side::Matrix, matrix) && registry.watches(Side::Lm, lm));
        assert!(!registry.watches(Side::Lm, matrix), "a room is of one side");
        assert_eq!(registry.of_alias("a").unwrap().number, 1);
        registry.put(1, portal(1, "!m:g", "!l:g", PortalState::Suspended));
        assert!(!registry.watches(Side::Lm, lm) && registry.of_room(Side::Lm, lm).is_some());

        let held = registry.get(1).unwrap();
        registry.set_alias("b", 2);
        registry.put(1, portal(1, "!m:g", "!l:g", PortalState::Ended));
        assert!(registry.of_room(Side::Lm, lm).is_none());
        assert!(registry.get(1).is_none() && registry.of_alias("a").is_none() && registry.after(0, 10).is_empty());
        assert_eq!(held.portal().state, PortalState::Ended);
        registry.put(2, portal(2, "!m2:g", "!l:g", PortalState::Active));
        registry.put(1, portal(1, "!m:g", "!l:g", PortalState::Ended));
        assert_eq!(registry.of_room(Side::Lm, lm).unwrap().number, 2);
        assert_eq!((registry.after(0, 10).len(), registry.after(1, 10).len()), (1, 1));
        assert_eq!(registry.of_alias("b").unwrap().number, 2, "the alias of another stays");
    }

    #[test]
    fn a_direction_never_loses_a_call() {
        let direction = Direction::default();
        assert!(direction.call());
        assert!(!direction.call());
        assert!(!direction.rest(), "there was a call");
        assert!(!direction.take_news() && !direction.call());
        assert!(direction.take_news() && !direction.take_news());
        assert!(direction.rest());
        assert!(direction.call());
    }
}
