//! The events in between: asked of the server that sent what follows them, further and further back, while that brings something
//! new, until all is here that is named, or it is too much.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use ruma::OwnedEventId;
use serde_json::json;
use tokio::time::Instant;

use super::fetch::{Filling, segment, take_events};
use super::pdu::{Pdu, Unverified};
use super::stored::Stored;
use super::version::is_shared;
use crate::event::Object;
use crate::federation::Call;
use crate::refusal::Refusal;
use crate::store::StoreError;
use crate::store::dag::first_with_state;
use crate::store::gaps::begun;

/// How many events are asked for at once. Synapse gives 20 missing ones and 100 by backfill.
const PAGE: usize = 100;
/// After how many requests backfill comes first: it has no word for what is known here.
const SHORT: usize = 2;
/// How many events are named in a request.
const NAMED: usize = 20;
/// How many events may not be given by any way before the rest is not asked for either.
const MAX_REFUSED: usize = 200;
/// How many events are asked for one by one.
const MAX_SINGLE: usize = 50;

/// How far the walk came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Walked {
    /// All that is named is here.
    Whole,
    /// The server gives no more.
    Stuck,
    /// There is more than is asked for.
    Long,
}

/// What is named and not here.
#[derive(Default)]
struct Front {
    /// Each with what follows it.
    missing: BTreeMap<OwnedEventId, BTreeSet<OwnedEventId>>,
    /// Those that are not given.
    refused: HashSet<OwnedEventId>,
    singles: usize,
}

impl Front {
    /// What is asked for next: missing events, and what follows them.
    fn next(&self) -> (Vec<OwnedEventId>, Vec<OwnedEventId>) {
        let wanted = self.missing.iter().filter(|(id, _)| !self.refused.contains(*id)).take(NAMED);
        let (mut missing, mut followers) = (Vec::new(), BTreeSet::new());
        for (id, after) in wanted {
            missing.push(id.clone());
            followers.extend(after.first().cloned());
        }
        (missing, followers.into_iter().collect())
    }
}

/// Where the room begins here. What was said before the gateway came into a room that lives elsewhere is no gap, and must not be
/// taken for what is said now.
struct Begin {
    /// Less deep events are from before.
    floor: i64,
    /// Events from before, in rooms whose events say no depth.
    old: HashSet<OwnedEventId>,
}

impl Begin {
    fn is_before(&self, pdu: &Pdu) -> bool {
        self.old.contains(&pdu.event_id) || pdu.depth < self.floor
    }
}

impl Filling<'_> {
    /// Fetches what the waiting events follow, and `more`: missing events with what follows them.
    pub async fn walk(&mut self, more: Vec<(OwnedEventId, OwnedEventId)>) -> Result<Walked, Refusal> {
        let begin = self.begin().await?;
        let mut front = Front::default();
        for (missing, follower) in more {
            if begin.old.contains(&missing) {
                self.before.insert(missing);
            } else {
                front.missing.entry(missing).or_default().insert(follower);
            }
        }
        self.add_named(&mut front, &begin, self.waiting.keys().cloned().collect()).await?;
        let (mut fetched, mut bytes, mut rounds, mut backfills) = (0_usize, 0_usize, 0_usize, true);
        loop {
            let (missing, followers) = front.next();
            if missing.is_empty() || front.refused.len() > MAX_REFUSED {
                return Ok(if front.missing.is_empty() { Walked::Whole } else { Walked::Stuck });
            }
            if fetched >= self.bounds.events || bytes >= self.bounds.bytes || Instant::now() >= self.until {
                self.problem = format!("{} does not end: {fetched} events were fetched", self.origin);
                return Ok(Walked::Long);
            }
            let ways = if rounds < SHORT { [Way::Between, Way::Backfill] } else { [Way::Backfill, Way::Between] };
            rounds = rounds.saturating_add(1);
            let mut new = 0_usize;
            for way in ways.into_iter().chain([Way::Single]) {
                let found = match way {
                    Way::Between => self.between(&begin, &followers).await,
                    Way::Backfill if !backfills => continue,
                    Way::Backfill => {
                        let found = self.backfill(&missing).await;
                        backfills = found.is_some();
                        found
                    }
                    Way::Single => self.single(&mut front, &missing).await,
                };
                let (events, size) = self.add(&mut front, &begin, found.unwrap_or_default()).await?;
                (new, bytes) = (events, bytes.saturating_add(size));
                if new > 0 {
                    break;
                }
            }
            fetched = fetched.saturating_add(new);
            if new == 0 {
                front.refused.extend(missing);
                self.problem = format!("{} does not give all that is missing", self.origin);
            }
        }
    }

    /// `POST get_missing_events`.
    async fn between(&self, begin: &Begin, latest: &[OwnedEventId]) -> Option<Vec<Object>> {
        let earliest: Vec<_> = self.room.core().tips.iter().rev().take(NAMED).map(|tip| tip.event_id.clone()).collect();
        let body =
            json!({ "limit": PAGE, "min_depth": begin.floor, "earliest_events": earliest, "latest_events": latest });
        let uri = format!("/_matrix/federation/v1/get_missing_events/{}", segment(self.room.room_id.as_str()));
        self.ask(Call::post(uri, body.as_object().cloned().unwrap_or_default()), "events").await
    }

    /// `GET backfill`: these events and what is before them.
    async fn backfill(&self, from: &[OwnedEventId]) -> Option<Vec<Object>> {
        let from: Vec<String> = from.iter().map(|id| format!("v={}", segment(id.as_str()))).collect();
        let room_id = segment(self.room.room_id.as_str());
        let uri = format!("/_matrix/federation/v1/backfill/{room_id}?limit={PAGE}&{}", from.join("&"));
        self.ask(Call::get(uri), "pdus").await
    }

    async fn ask(&self, call: Call, list: &str) -> Option<Vec<Object>> {
        let call = Call { limit: 8 << 20, ..call };
        let asking = self.shared.context.client.call(self.origin, call, false);
        match tokio::time::timeout_at(self.until, asking).await {
            Ok(Ok(mut answer)) => Some(take_events(&mut answer, list, PAGE)),
            Ok(Err(error)) => {
                tracing::info!(room = %self.room.room_id, server = %self.origin, %error, "no missing events");
                None
            }
            Err(_) => None,
        }
    }

    /// `GET event`, one by one.
    async fn single(&self, front: &mut Front, missing: &[OwnedEventId]) -> Option<Vec<Object>> {
        let mut found = Vec::new();
        for id in missing {
            if front.singles >= MAX_SINGLE || Instant::now() >= self.until {
                break;
            }
            front.singles = front.singles.saturating_add(1);
            let uri = format!("/_matrix/federation/v1/event/{}", segment(id.as_str()));
            if let Ok(mut answer) = self.shared.context.client.call(self.origin, Call::get(uri), false).await {
                found.extend(take_events(&mut answer, "pdus", 1));
            }
        }
        Some(found)
    }

    /// Has those of the events wait that are missing, or are before such; how many they are, and how large.
    async fn add(&mut self, front: &mut Front, begin: &Begin, found: Vec<Object>) -> Result<(usize, usize), Refusal> {
        let mut found: HashMap<OwnedEventId, Unverified> =
            self.parse(found).map(|event| (event.pdu().event_id.clone(), event)).collect();
        let ids: Vec<_> = found.keys().cloned().collect();
        for (id, _) in self.known(&ids).await?.into_iter().filter(|(_, has_state)| *has_state) {
            found.remove(&id);
        }
        let mut reached: Vec<_> = ids.into_iter().filter(|id| front.missing.contains_key(id)).collect();
        let mut taken = Vec::new();
        while let Some(id) = reached.pop() {
            let Some(event) = found.remove(&id) else { continue };
            if begin.is_before(event.pdu()) {
                self.before.insert(id.clone());
                front.refused.insert(id);
            } else if event.pdu().room_id == self.room.room_id && !self.waiting.contains_key(&id) {
                reached.extend(event.pdu().prev_events.iter().cloned());
                taken.push(event);
            }
        }
        let (mut new, mut bytes) = (Vec::new(), 0_usize);
        let taken = self.shared.verify_given(&self.room.room_id, taken).await?;
        let taken = self.shared.make_whole(self.origin, taken, self.waiting.values(), &mut self.copies).await;
        for event in taken {
            bytes = bytes.saturating_add(event.pdu().raw.get().len());
            new.push(event.pdu().event_id.clone());
            self.waiting.insert(event.pdu().event_id.clone(), event);
        }
        let count = new.len();
        self.add_named(front, begin, new).await?;
        Ok((count, bytes))
    }

    /// What these waiting events follow is missing, as far as it neither waits nor is known.
    async fn add_named(&mut self, front: &mut Front, begin: &Begin, ids: Vec<OwnedEventId>) -> Result<(), Refusal> {
        let mut named: BTreeMap<OwnedEventId, BTreeSet<OwnedEventId>> = BTreeMap::new();
        for id in ids {
            front.missing.remove(&id);
            let prev_events = self.waiting.get(&id).map(|event| event.pdu().prev_events.clone()).unwrap_or_default();
            for prev in prev_events.into_iter().filter(|prev| !self.waiting.contains_key(prev)) {
                named.entry(prev).or_default().insert(id.clone());
            }
        }
        let known = self.known(&named.keys().cloned().collect::<Vec<_>>()).await?;
        for (prev, followers) in named {
            if begin.old.contains(&prev) {
                self.before.insert(prev);
            } else if known.get(&prev) != Some(&true) {
                front.missing.entry(prev).or_default().extend(followers);
            }
        }
        Ok(())
    }

    /// Those of the events that are stored, and whether with the state there.
    async fn known(&self, ids: &[OwnedEventId]) -> Result<HashMap<OwnedEventId, bool>, StoreError> {
        let known = self.shared.events.get_many(ids).await?;
        Ok(known.into_iter().map(|(id, event)| (id, event.groups.is_some())).collect())
    }

    async fn begin(&self) -> Result<Begin, Refusal> {
        let store = &self.shared.context.store;
        let first = match begun(store, &self.room.room_id).await? {
            Some(id) => self.shared.events.get(&id).await?.map(|event| event.pdu.clone()),
            None => {
                first_with_state(store, &self.room.room_id).await?.map(Stored::from_row).transpose()?.map(|e| e.pdu)
            }
        };
        let Some(first) = first else { return Ok(Begin { floor: 0, old: HashSet::new() }) };
        if !is_shared(self.room.version) {
            return Ok(Begin { floor: first.depth, old: HashSet::new() });
        }
        let mut old: HashSet<OwnedEventId> = first.prev_events.iter().cloned().collect();
        if !old.is_empty() {
            let named: Vec<_> = first.prev_events.iter().take(NAMED).cloned().collect();
            let before = self.backfill(&named).await.unwrap_or_default();
            let before: HashMap<OwnedEventId, Vec<OwnedEventId>> = self
                .parse(before)
                .map(|event| (event.pdu().event_id.clone(), event.pdu().prev_events.clone()))
                .collect();
            let mut next: Vec<OwnedEventId> = old.iter().cloned().collect();
            while let Some(id) = next.pop() {
                let prev = before.get(&id).into_iter().flatten();
                next.extend(prev.filter(|id| old.insert((*id).clone())).cloned());
            }
        }
        Ok(Begin { floor: 0, old })
    }
}

/// How events are asked for.
#[derive(Clone, Copy)]
enum Way {
    Between,
    Backfill,
    Single,
}
