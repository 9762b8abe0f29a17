//! What one or more jobs change in a room: kept in memory until it is committed in one transaction.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use ruma::room_version_rules::RoomVersionRules;
use ruma::{OwnedEventId, OwnedRoomId, OwnedServerName};

use super::Shared;
use super::build::DUMMY;
use super::events::EventMap;
use super::log::{Lent, Linear};
use super::resolve::resolve;
use super::room::{Core, Room};
use super::snapshot::{Change, Snapshot};
use super::stored::Stored;
use super::version::is_shared;
use crate::event::RoomVersion;
use crate::federation::{Feed, FeedKind, OutboundQueues};
use crate::guard::trip;
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::seam::{EffectsOf, EventEffect, write_effects};
use crate::store::dag::Changes;
use crate::store::{StoreError, dag, inbox, outliers, redactions};

/// The changes of a batch.
pub struct Batch {
    pub(super) shared: Arc<Shared>,
    /// The room.
    pub room_id: OwnedRoomId,
    /// Its version.
    pub version: RoomVersion,
    /// The rules of the version.
    pub rules: &'static RoomVersionRules,
    /// What the room will be.
    pub core: Core,
    /// Events that are not committed yet.
    pub staged: EventMap,
    /// What was staged before under the ID of each event that was staged, in order: the way back.
    replaced: Vec<(OwnedEventId, Option<Arc<Stored>>)>,
    /// Events that are not in the store, as far as was asked; nobody else puts any of this room's there.
    pub absent: HashSet<OwnedEventId>,
    pub(super) groups: HashMap<i64, Snapshot>,
    pub(super) changes: Changes,
    /// Accepted events of others, in order.
    pub(super) inbox: Vec<OwnedEventId>,
    /// What is written together with events, in order.
    effects: EffectsOf,
    /// Servers that get one more event although nobody of theirs is joined: its position.
    pub(super) once: Vec<(OwnedServerName, i64)>,
    /// Events that were redacted: their new JSON.
    pub(super) redacted: Vec<Arc<Stored>>,
    /// Events that are not here, with accepted redactions of them.
    pub(super) awaited: Vec<(OwnedEventId, OwnedEventId)>,
    /// Events without a state on which the room came to stand, and their IDs.
    needed: Vec<Arc<Stored>>,
    needed_ids: HashSet<OwnedEventId>,
    /// Events without a state that go, unless the room came to stand on them.
    pub(super) pruned: Vec<OwnedEventId>,
    /// Whether none of the gateway's users may join the room's branches.
    pub(super) cannot_join_branches: bool,
    /// What goes into the log of a shared room, and what of it is out of step.
    pub(super) linear: Linear,
}

/// Where a batch can be rolled back to.
pub struct Savepoint {
    core: Core,
    lengths: [usize; 13],
    log: usize,
}

impl Batch {
    /// A batch over what is committed.
    pub fn new(shared: Arc<Shared>, room: &Room) -> Self {
        Self {
            shared,
            room_id: room.room_id.clone(),
            version: room.version,
            rules: room.rules,
            core: Core::clone(&room.core()),
            staged: EventMap::new(),
            replaced: Vec::new(),
            absent: HashSet::new(),
            groups: HashMap::new(),
            changes: Changes::default(),
            inbox: Vec::new(),
            effects: EffectsOf::new(),
            once: Vec::new(),
            redacted: Vec::new(),
            awaited: Vec::new(),
            needed: Vec::new(),
            needed_ids: HashSet::new(),
            pruned: Vec::new(),
            cannot_join_branches: false,
            linear: Linear::default(),
        }
    }

    /// How many events it has.
    pub fn len(&self) -> usize {
        self.changes.events.len()
    }

    /// The events that it adds, without those that join branches on the way.
    pub fn added(&self) -> Vec<OwnedEventId> {
        let added = self.changes.events.iter().map(|row| row.event_id.clone());
        added.filter(|id| self.staged.get(id).is_none_or(|event| event.pdu.kind.to_string() != DUMMY)).collect()
    }

    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        let Changes { events, groups, .. } = &self.changes;
        let is_graph_as_it_was = events.is_empty() && groups.is_empty();
        is_graph_as_it_was && self.redacted.is_empty() && self.pruned.is_empty() && !self.linear.followed
    }

    /// The point to come back to when the next job fails.
    pub fn savepoint(&self) -> Savepoint {
        let changes = &self.changes;
        Savepoint {
            core: self.core.clone(),
            lengths: [
                self.replaced.len(),
                changes.events.len(),
                changes.groups.len(),
                changes.joined.len(),
                changes.outbox.len(),
                changes.windows.len(),
                self.inbox.len(),
                self.effects.len(),
                self.once.len(),
                self.redacted.len(),
                self.awaited.len(),
                self.needed.len(),
                self.pruned.len(),
            ],
            log: self.linear.len(),
        }
    }

    /// Takes back what was changed since.
    pub fn roll_back(&mut self, savepoint: Savepoint) {
        let [
            replaced,
            events,
            groups,
            joined,
            outbox,
            windows,
            inbox,
            effects,
            once,
            redacted,
            awaited,
            needed,
            pruned,
        ] = savepoint.lengths;
        self.core = savepoint.core;
        self.linear.truncate(savepoint.log);
        for (event_id, before) in self.replaced.drain(replaced..).rev() {
            match before {
                Some(before) => self.staged.insert(event_id, before),
                None => self.staged.remove(&event_id),
            };
        }
        self.changes.events.truncate(events);
        self.changes.groups.truncate(groups);
        self.changes.joined.truncate(joined);
        self.changes.outbox.truncate(outbox);
        self.changes.windows.truncate(windows);
        self.inbox.truncate(inbox);
        self.effects.truncate(effects);
        self.once.truncate(once);
        self.redacted.truncate(redacted);
        self.awaited.truncate(awaited);
        for event in self.needed.drain(needed..) {
            self.needed_ids.remove(&event.pdu.event_id);
        }
        self.pruned.truncate(pruned);
        let written: BTreeSet<i64> = self.changes.groups.iter().map(|group| group.id).collect();
        self.groups.retain(|id, _| written.contains(id));
    }

    /// Writes something together with an event.
    pub(super) fn add_effect(&mut self, event_id: OwnedEventId, effect: EventEffect) {
        self.effects.push((effect, event_id));
    }

    /// Stages an event, which may take the place of an earlier form of itself.
    pub fn put_staged(&mut self, event: Arc<Stored>) {
        let event_id = event.pdu.event_id.clone();
        let before = self.staged.insert(event_id.clone(), event);
        self.replaced.push((event_id, before));
    }

    /// Asks once for many which of these events are not in the store. What a job before this one has staged is not there yet, and
    /// is known all the same.
    pub async fn look_up(&mut self, ids: &[OwnedEventId]) -> Result<(), StoreError> {
        let ids: Vec<_> = ids.iter().filter(|id| !self.staged.contains_key(*id)).cloned().collect();
        let found = self.shared.events.get_many(&ids).await?;
        self.absent.extend(ids.iter().filter(|id| !found.contains_key(*id)).cloned());
        Ok(())
    }

    /// Those of the events that are here, committed or not.
    pub async fn events(&self, ids: &[OwnedEventId]) -> Result<EventMap, StoreError> {
        let ids: Vec<_> = ids.iter().filter(|id| !self.absent.contains(*id)).cloned().collect();
        self.shared.events.with_staged(&ids, &self.staged).await
    }

    /// The room stands on these events, and on what allows them: they stay.
    pub async fn need(&mut self, mut ids: Vec<OwnedEventId>) -> Result<(), StoreError> {
        while !ids.is_empty() {
            ids.sort_unstable();
            ids.dedup();
            let found = self.shared.events.with_staged(&ids, &self.staged).await?;
            ids.clear();
            for event in found.into_values().filter(|event| event.can_go()) {
                if self.needed_ids.insert(event.pdu.event_id.clone()) {
                    ids.extend(event.pdu.auth_events.iter().cloned());
                    self.needed.push(event);
                }
            }
        }
        Ok(())
    }

    /// The state of a group, committed or not.
    pub async fn snapshot(&self, id: i64) -> Result<Snapshot, StoreError> {
        if let Some(snapshot) = self.groups.get(&id) {
            return Ok(snapshot.clone());
        }
        if self.core.current.id == id {
            return Ok(self.core.current.clone());
        }
        if let Some(tip) = self.core.tips.iter().find(|tip| tip.after.id == id) {
            return Ok(tip.after.clone());
        }
        self.shared.events.group(id).await
    }

    /// A new state that differs from `base` by `changes`.
    pub fn derive(&mut self, base: &Snapshot, changes: &[Change]) -> Result<Snapshot, StoreError> {
        let (snapshot, row) = base.with(self.shared.context.store.next_id(), changes)?;
        self.groups.insert(snapshot.id, snapshot.clone());
        self.changes.groups.push(row);
        Ok(snapshot)
    }

    /// The empty state, where a room begins.
    pub fn empty_state(&mut self) -> Snapshot {
        let (snapshot, row) = Snapshot::empty(self.shared.context.store.next_id());
        self.groups.insert(snapshot.id, snapshot.clone());
        self.changes.groups.push(row);
        snapshot
    }

    /// The resolved state of `states`, in no order.
    pub async fn merge(&mut self, mut states: Vec<Snapshot>) -> Result<Snapshot, Refusal> {
        states.sort_by_key(|state| state.id);
        states.dedup_by_key(|state| state.id);
        let Some(first) = states.first().cloned() else { return Ok(self.empty_state()) };
        if states.len() == 1 {
            return Ok(first);
        }
        let key: Vec<i64> = states.iter().map(|state| state.id).collect();
        if let Some(id) = self.shared.resolved_meter.count(self.shared.resolved.get(&key).await) {
            // What was resolved in a batch that failed was never written.
            if let Ok(snapshot) = self.snapshot(id).await {
                return Ok(snapshot);
            }
        }
        let changes = resolve(&self.shared.events, &self.staged, &self.room_id, self.rules, &states).await?;
        let merged = self.known_or_derived(&states, &changes)?;
        self.shared.resolved.insert(key, merged.id).await;
        Ok(merged)
    }

    /// One of `states` when the resolved one is the same, else a new one.
    fn known_or_derived(&mut self, states: &[Snapshot], changes: &[Change]) -> Result<Snapshot, StoreError> {
        let Some(first) = states.first() else { return Ok(self.empty_state()) };
        if changes.is_empty() {
            return Ok(first.clone());
        }
        let mut map = first.map.clone();
        for (key, event_id) in changes {
            match event_id {
                Some(event_id) => map.insert(key.clone(), event_id.clone()),
                None => map.remove(key),
            };
        }
        match states.iter().find(|state| state.map.diff(&map).next().is_none()) {
            Some(same) => Ok(same.clone()),
            None => self.derive(first, changes),
        }
    }

    /// Commits everything or nothing, since each event names those before it, and tells those who wait for it.
    pub(super) async fn commit(mut self, room: &Room) -> Result<(), StoreError> {
        self.follow().await?;
        if self.is_empty() {
            if is_shared(self.version) {
                // What was found of the log is no change of the room, but known from now on.
                self.shared.note_uncorrected(&self.room_id, &self.core);
                room.set_core(self.core);
            }
            return Ok(());
        }
        self.staged.values().for_each(|event| trip("commit", &event.pdu.kind));
        let Self {
            shared,
            room_id,
            core,
            staged,
            groups,
            changes,
            inbox,
            effects,
            once,
            redacted,
            awaited,
            needed,
            pruned,
            linear,
            version,
            ..
        } = self;
        let log = Lent::new(linear.log);
        let store = shared.context.store.clone();
        let row = room.row(&core);
        let feed = Feed { kind: FeedKind::Graph, room_id: room_id.clone() };
        let has_news = !changes.outbox.is_empty();
        // Whose window is opened or closed asks where it is, also when nothing is said: what was said while it was closed is passed over.
        let is_asked = has_news || !changes.windows.is_empty();
        let mut to_wake: BTreeSet<OwnedServerName> = once.iter().map(|(server, _)| server.clone()).collect();
        to_wake.extend(changes.windows.iter().map(|(server, ..)| server.clone()));
        // Of a shared room the bridge is told by its log.
        let watched = !inbox.is_empty() && !is_shared(version) && shared.between.watches(Side::Matrix, &room_id);
        let now = shared.context.clock.now_ms();
        let (to_replace, to_need, to_remove) = (redacted.clone(), needed.clone(), pruned.clone());
        let (writing, lent) = (store.clone(), log.clone());
        let written = store
            .write(move |tx| {
                Box::pin(async move {
                    dag::write(tx, &row, &changes).await?;
                    let to_need: Vec<_> = to_need.iter().map(|event| &*event.pdu.event_id).collect();
                    outliers::need(tx, &to_need).await?;
                    outliers::remove(tx, &to_remove.iter().map(|id| &**id).collect::<Vec<_>>()).await?;
                    for event in &to_replace {
                        dag::replace_json(tx, &event.pdu.event_id, event.pdu.raw.get().as_bytes()).await?;
                    }
                    for (target, redaction) in &awaited {
                        redactions::wait(tx, &row.room_id, target, redaction).await?;
                    }
                    write_effects(tx, &effects).await?;
                    if let Some(loan) = lent.take()
                        && let Some(writing) = loan.write(tx)
                    {
                        writing.await?;
                    }
                    if watched {
                        inbox::push(&writing, tx, Side::Matrix, &row.room_id, &inbox, now).await?;
                    }
                    for (server, position, opened) in &changes.windows {
                        if *opened {
                            OutboundQueues::subscribe(tx, server, &feed, *position).await?;
                        } else {
                            OutboundQueues::end(tx, server, &feed, *position).await?;
                        }
                    }
                    for (server, position) in &once {
                        dag::open_once(tx, &row.room_id, server, *position).await?;
                        OutboundQueues::subscribe(tx, server, &feed, position.saturating_sub(1)).await?;
                        OutboundQueues::end(tx, server, &feed, *position).await?;
                    }
                    if has_news {
                        OutboundQueues::advance(tx, &feed, row.head).await?;
                    }
                    Ok(())
                })
            })
            .await;
        if !redacted.is_empty() {
            shared.states.invalidate(&room_id).await;
            shared.listings.invalidate(&room_id).await;
        }
        to_wake.extend(core.graph_servers().filter(|server| **server != shared.context.server_name).cloned());
        match &written {
            Ok(()) => {
                for event in &needed {
                    let _ = event.needed.set(());
                }
                shared.events.committed(staged.into_values().chain(redacted), groups.into_values().collect()).await;
                shared.events.forget(pruned.iter()).await;
                let has_other_state = room.core().current.id != core.current.id;
                if is_shared(version) {
                    shared.note_uncorrected(&room_id, &core);
                }
                room.set_core(core);
                if has_other_state {
                    shared.listings.invalidate(&room_id).await;
                }
            }
            // It may be committed all the same: then queues and bridge find it, and what was redacted is not read from memory.
            Err(_) => shared.events.forget(redacted.iter().map(|event| &event.pdu.event_id)).await,
        }
        if is_asked {
            let feed = Feed { kind: FeedKind::Graph, room_id: room_id.clone() };
            shared.context.outbound.wake(&feed, &to_wake.into_iter().collect::<Vec<_>>());
        }
        if watched {
            shared.between.accepted(Side::Matrix, &room_id);
        }
        log.give_back(&room_id, &written, shared.logs.get()).await;
        written
    }
}
