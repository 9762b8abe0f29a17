//! What is missing to check an event is asked of the server that sent it: events in between, auth events, and where the gap
//! is too wide the state at its edge. Everything is bounded, and everything that comes is checked like any other event.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use ruma::{EventId, OwnedEventId, ServerName};
use serde_json::Value;
use tokio::time::Instant;

use super::Shared;
use super::accept::{Outcome, Source};
use super::given::stands_on_all;
use super::order::linearize;
use super::pdu::{Unverified, Verified};
use super::receive::Outcomes;
use super::room::Room;
use super::walk::Walked;
use super::whole::COPIES;
use crate::event::{Object, parse_event_id};
use crate::federation::Call;
use crate::guard::guarded;
use crate::refusal::Refusal;

/// How much of a gap is filled while its sender waits for the answer.
const AT_ONCE: Bounds = Bounds { events: 1_000, bytes: 8 << 20, edges: 20, patience: Duration::from_secs(20) };
/// The same for a server that has nobody in the room yet, as far as is known here.
const OUTSIDE: Bounds = Bounds { events: 250, bytes: 2 << 20, edges: 0, patience: Duration::from_secs(20) };
/// How much of a gap is filled in the background; what is longer is closed with the state.
pub(super) const LONG: Bounds =
    Bounds { events: 10_000, bytes: 32 << 20, edges: 500, patience: Duration::from_secs(600) };
/// How long filling a gap at once may take, with the states at its edges.
const PATIENCE: Duration = Duration::from_secs(45);
/// How often auth events are asked for.
const ROUNDS: usize = 10;
/// How many events are given to the room at once.
const CHUNK: usize = 200;
/// How many edges may fail to be closed before no other is tried.
const MAX_FAILED: usize = 5;
/// How many events of a state or an auth chain are fetched one by one before the whole is asked for.
const MAX_SINGLE: usize = 50;
/// How long one waits for another who fills a gap of the same room.
const TURN: Duration = Duration::from_secs(10);
/// How many events an answer may hold.
pub(super) const MAX_ANSWER: usize = 100_000;

/// How much of a gap is asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// How many events in between, or some more.
    pub events: usize,
    /// How many bytes they have, or some more.
    pub bytes: usize,
    /// How many edges are closed by asking for the state there.
    pub edges: usize,
    /// For how long is asked for events in between.
    pub patience: Duration,
}

impl Shared {
    /// Takes verified events of one room that `origin` sent; what they need is fetched from there. Those that wait for a gap that is too
    /// long for that are written down, filled in the background, and not among the outcomes.
    pub(super) async fn accept_all(
        self: &Arc<Self>,
        room: &Arc<Room>,
        origin: &ServerName,
        events: Vec<Verified>,
    ) -> Result<Outcomes, Refusal> {
        if events.is_empty() {
            return Ok(Outcomes::new());
        }
        let mut outcomes = self.accept_batch(room, events.clone(), Source::Received).await?;
        let mut waiting = events;
        waiting.retain(|event| outcomes.get(&event.pdu().event_id).is_some_and(is_missing));
        if waiting.is_empty() {
            return Ok(outcomes);
        }
        // The gap before it is a part of one that is being filled, or is filled after that.
        let mut is_long = self.gaps.is_filling(&room.room_id, origin);
        if !is_long {
            // Mostly several servers send what follows the same gap, and it is filled once. Who fills it can be slow on purpose,
            // so nobody waits for that for long.
            let _one_at_a_time = tokio::time::timeout(TURN, room.filling.lock()).await;
            let bounds = if room.core().has_server(origin) { AT_ONCE } else { OUTSIDE };
            let mut filling = Filling::new(self, room, origin, bounds);
            filling.hands_over = true;
            filling.wait_for(waiting.clone(), &outcomes);
            is_long = match tokio::time::timeout(PATIENCE, Box::pin(filling.fill())).await {
                Ok(filled) => filled? == Filled::Long,
                Err(_) => true,
            };
            outcomes
                .extend(std::mem::take(&mut filling.outcomes).into_iter().filter(|(id, _)| is_one_of(&waiting, id)));
        }
        waiting.retain(|event| outcomes.get(&event.pdu().event_id).is_some_and(is_missing));
        if !waiting.is_empty() && !room.core().has_server(origin) {
            // Nothing of it stays here, so it is not tried again either when what is missing has come.
            for event in waiting {
                let event_id = event.pdu().event_id.clone();
                if let Some(Ok(outcome)) = outcomes.get(&event_id)
                    && let Err(missing) = outcome.accepted()
                {
                    let problem =
                        "has nobody in the room, as far as is known here, and what its event follows is missing";
                    outcomes.insert(event_id, Err(Refusal::Forbidden(format!("{origin} {problem}: {missing}"))));
                }
            }
        } else if !waiting.is_empty() {
            let kept = self.keep_waiting(room, origin, &waiting, is_long).await?;
            if is_long {
                outcomes.retain(|id, _| !kept.contains(id));
                // There is no room for them to wait, and their server does not send them again.
                waiting.retain(|event| !kept.contains(&event.pdu().event_id));
                outcomes.extend(self.close_now(room, origin, waiting).await?);
            }
        }
        Ok(outcomes)
    }

    /// Takes events that cannot wait for what is before them with the state that their server says was there, where it says that; what
    /// is missing is asked for later.
    pub(super) async fn close_now(
        self: &Arc<Self>,
        room: &Arc<Room>,
        origin: &ServerName,
        events: Vec<Verified>,
    ) -> Result<Outcomes, Refusal> {
        if events.is_empty() {
            return Ok(Outcomes::new());
        }
        let mut filling = Filling::new(self, room, origin, AT_ONCE);
        filling.wait_for(events.clone(), &Outcomes::new());
        let closing = async {
            filling.take_connected().await?;
            filling.drop_hopeless();
            filling.bridge_gaps().await
        };
        // What was not closed in time is refused.
        if let Ok(closed) = tokio::time::timeout(PATIENCE, Box::pin(closing)).await {
            closed?;
        }
        let outcomes = std::mem::take(&mut filling.outcomes).into_iter();
        Ok(outcomes.filter(|(id, _)| is_one_of(&events, id)).collect())
    }
}

fn is_one_of(events: &[Verified], id: &EventId) -> bool {
    events.iter().any(|event| event.pdu().event_id == id)
}

pub(super) fn is_missing(outcome: &Result<Outcome, Refusal>) -> bool {
    matches!(outcome, Ok(Outcome::Missing { .. }))
}

/// What became of a gap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Filled {
    /// All that could be done was done.
    Done,
    /// There is more than is fetched while somebody waits.
    Long,
}

pub(super) struct Filling<'a> {
    pub shared: &'a Arc<Shared>,
    pub room: &'a Arc<Room>,
    pub origin: &'a ServerName,
    pub bounds: Bounds,
    /// Until when events in between are asked for.
    pub until: Instant,
    /// Whether somebody else goes on with what is too long for this.
    pub hands_over: bool,
    /// Verified events that lack something.
    pub waiting: HashMap<OwnedEventId, Verified>,
    /// What is before the gateway came into the room, as far as it was named.
    pub before: HashSet<OwnedEventId>,
    pub outcomes: Outcomes,
    /// How many events were taken with the other server's word of the state before them.
    closed: usize,
    /// How many copies may still be asked of other servers because `origin` gave them without their content.
    pub copies: usize,
    /// What was in the way last.
    pub problem: String,
}

impl<'a> Filling<'a> {
    pub fn new(shared: &'a Arc<Shared>, room: &'a Arc<Room>, origin: &'a ServerName, bounds: Bounds) -> Self {
        Filling {
            shared,
            room,
            origin,
            bounds,
            until: Instant::now() + bounds.patience,
            hands_over: false,
            waiting: HashMap::new(),
            before: HashSet::new(),
            outcomes: Outcomes::new(),
            closed: 0,
            copies: COPIES,
            problem: String::new(),
        }
    }

    /// What is to be taken, with what is known of it.
    pub fn wait_for(&mut self, events: Vec<Verified>, outcomes: &Outcomes) {
        for event in events {
            let event_id = event.pdu().event_id.clone();
            if let Some(outcome) = outcomes.get(&event_id) {
                self.outcomes.insert(event_id.clone(), outcome.clone());
            }
            self.waiting.insert(event_id, event);
        }
    }

    pub async fn fill(&mut self) -> Result<Filled, Refusal> {
        // Somebody else may have filled the gap while this one waited for its turn.
        self.retry().await?;
        if self.waiting.is_empty() {
            return Ok(Filled::Done);
        }
        let walked = self.walk(Vec::new()).await?;
        if walked == Walked::Long && self.hands_over {
            return Ok(Filled::Long);
        }
        self.take_connected().await?;
        // Of a server that is not in the room yet, no word on the room's state is believed.
        if self.waiting.is_empty() || !self.room.core().has_server(self.origin) {
            return Ok(Filled::Done);
        }
        self.drop_hopeless();
        self.bridge_gaps().await
    }

    /// Gives all that waits to the room, with the auth events that it needs.
    pub async fn take_connected(&mut self) -> Result<(), Refusal> {
        self.retry().await?;
        for _ in 0..ROUNDS {
            let (_, auth) = self.missing();
            if auth.is_empty() || !self.fetch_auth_events(&auth).await? {
                return Ok(());
            }
            self.retry().await?;
        }
        Ok(())
    }

    /// Events whose auth events cannot be had are not waited for any more: what follows them is at the edge of a gap.
    fn drop_hopeless(&mut self) {
        loop {
            let (_, auths) = self.missing();
            let is_hopeless = |outcome: &Result<Outcome, Refusal>| {
                matches!(outcome, Ok(Outcome::Missing { auth, .. })
                if auth.iter().any(|id| auths.contains(id)))
            };
            let before = self.waiting.len();
            let outcomes = &self.outcomes;
            self.waiting.retain(|id, _| !outcomes.get(id).is_some_and(is_hopeless));
            if self.waiting.len() == before {
                return;
            }
        }
    }

    /// Gives everything that waits to the room again, in the graph's order.
    async fn retry(&mut self) -> Result<(), Refusal> {
        let events: Vec<Verified> = self.in_order().into_iter().cloned().collect();
        for chunk in events.chunks(CHUNK) {
            let outcomes = self.shared.accept_batch(self.room, chunk.to_vec(), Source::Received).await?;
            self.outcomes.extend(outcomes);
        }
        let outcomes = &self.outcomes;
        self.waiting.retain(|id, _| outcomes.get(id).is_some_and(is_missing));
        Ok(())
    }

    /// What waits, each after what it follows.
    fn in_order(&self) -> Vec<&Verified> {
        let before = |pdu: &super::pdu::Pdu| pdu.prev_events.iter().chain(&pdu.auth_events).cloned().collect();
        linearize(self.waiting.values().collect(), |event| event.pdu(), before)
    }

    /// The events that are missing and do not wait themselves: before the waiting ones, and to authorize them.
    fn missing(&self) -> (BTreeSet<OwnedEventId>, BTreeSet<OwnedEventId>) {
        let (mut before, mut auths) = (BTreeSet::new(), BTreeSet::new());
        for outcome in self.waiting.keys().filter_map(|id| self.outcomes.get(id)) {
            if let Ok(Outcome::Missing { prev, auth }) = outcome {
                before.extend(prev.iter().filter(|id| !self.waiting.contains_key(*id)).cloned());
                auths.extend(auth.iter().filter(|id| !self.waiting.contains_key(*id)).cloned());
            }
        }
        (before, auths)
    }

    /// Fetches auth events, each alone when they are few, and those that they need in turn; true when something new came.
    async fn fetch_auth_events(&mut self, wanted: &BTreeSet<OwnedEventId>) -> Result<bool, Refusal> {
        let (mut found, mut _held) = (Vec::new(), None);
        if wanted.len() > 3
            && let Some(event_id) = self.needs_auth()
        {
            let (room_id, event_id) = (segment(self.room.room_id.as_str()), segment(event_id.as_str()));
            let call = Call::get(format!("/_matrix/federation/v1/event_auth/{room_id}/{event_id}")).with_state();
            if let Ok((mut answer, held)) = self.shared.context.client.call_held(self.origin, call, false).await {
                found = take_events(&mut answer, "auth_chain", MAX_ANSWER);
                _held = Some(held);
            }
        }
        let mut events = self.verify(found).await?;
        let mut have: BTreeSet<OwnedEventId> = events.iter().map(|event| event.pdu().event_id.clone()).collect();
        let mut level: Vec<_> = wanted.iter().filter(|id| !have.contains(*id)).cloned().collect();
        let mut asked = 0;
        while let Some(id) = level.pop() {
            asked += 1;
            if asked > MAX_SINGLE || have.contains(&id) || self.is_known(&id).await? {
                continue;
            }
            let Some(event) = self.fetch_event(&id).await? else { continue };
            level.extend(event.pdu().auth_events.iter().cloned());
            have.insert(id);
            events.push(event);
        }
        self.take_outliers(events, &[]).await
    }

    /// A waiting event that misses auth events.
    fn needs_auth(&self) -> Option<OwnedEventId> {
        let misses = |id: &&OwnedEventId| matches!(self.outcomes.get(*id), Some(Ok(Outcome::Missing { auth, .. })) if !auth.is_empty());
        self.waiting.keys().find(misses).cloned()
    }

    /// Takes auth events, and keeps those of `state` that are here.
    async fn take_outliers(&self, events: Vec<Verified>, state: &[OwnedEventId]) -> Result<bool, Refusal> {
        let keep = || {
            let waiting = self.waiting.values().map(Verified::pdu);
            waiting.flat_map(|pdu| pdu.auth_events.iter()).chain(state).cloned().collect()
        };
        let events = match self.shared.new_outliers(self.room, self.origin, events, keep).await {
            Ok(events) => events,
            Err(refusal @ Refusal::TooLarge { .. }) => {
                tracing::warn!(room = %self.room.room_id, server = %self.origin, %refusal, "auth events were not taken");
                return Ok(false);
            }
            Err(refusal) => return Err(refusal),
        };
        if events.is_empty() {
            return Ok(false);
        }
        self.shared.run(self.room, move |batch| Box::pin(batch.accept_given(events))).await
    }

    /// Closes what is still open: the events at the edge are taken with the state that the other server says was there.
    async fn bridge_gaps(&mut self) -> Result<Filled, Refusal> {
        let mut failed = HashSet::new();
        loop {
            let edges = self.edges(&failed);
            if edges.is_empty() {
                return Ok(Filled::Done);
            }
            for (edge, missing) in edges {
                if self.closed >= self.bounds.edges {
                    return Ok(Filled::Long);
                }
                let event_id = edge.pdu().event_id.clone();
                match self.bridge_gap(edge, missing).await {
                    Ok(outcome) => {
                        self.waiting.remove(&event_id);
                        self.outcomes.insert(event_id, Ok(outcome));
                        self.closed = self.closed.saturating_add(1);
                    }
                    Err(refusal) => {
                        tracing::info!(room = %self.room.room_id, event = %event_id, error = %refusal, "gap stays open");
                        self.problem = refusal.to_string();
                        failed.insert(event_id);
                    }
                }
                if failed.len() >= MAX_FAILED {
                    self.retry().await?;
                    return Ok(Filled::Done);
                }
            }
            self.retry().await?;
        }
    }

    /// The waiting events that follow something nobody gave and nothing that waits, in the graph's order; with how much of it the
    /// gateway should have.
    fn edges(&self, failed: &HashSet<OwnedEventId>) -> Vec<(Verified, usize)> {
        let edge = |event: &Verified| match self.outcomes.get(&event.pdu().event_id) {
            Some(Ok(Outcome::Missing { prev, auth }))
                if auth.is_empty() && !prev.iter().any(|id| self.waiting.contains_key(id)) =>
            {
                Some((event.clone(), prev.iter().filter(|id| !self.before.contains(*id)).count()))
            }
            _ => None,
        };
        let all = self.in_order().into_iter().filter(|event| !failed.contains(&event.pdu().event_id));
        all.filter_map(edge).collect()
    }

    /// Takes an event with the state before it as the other server gives it. In the same transaction it is written down that so many
    /// of those that it follows are missing.
    async fn bridge_gap(&self, event: Verified, missed: usize) -> Result<Outcome, Refusal> {
        let edge = event.pdu().event_id.clone();
        let room_id = segment(self.room.room_id.as_str());
        let uri = format!("/_matrix/federation/v1/state_ids/{room_id}?event_id={}", segment(edge.as_str()));
        let client = &self.shared.context.client;
        let answer = match client.call(self.origin, Call::get(uri).with_state(), false).await {
            Ok(answer) => answer,
            Err(error) => return Err(error.into_refusal(self.origin)),
        };
        let state = event_ids(&answer, "pdu_ids")?;
        let chain = event_ids(&answer, "auth_chain_ids")?;
        let all: Vec<_> = state.iter().chain(&chain).cloned().collect();
        let known = self.shared.events.get_many(&all).await?;
        let missing: Vec<_> = all.iter().filter(|id| !known.contains_key(*id)).cloned().collect();
        let (mut fetched, mut _held) = (Vec::new(), None);
        if missing.len() > MAX_SINGLE {
            let uri = format!("/_matrix/federation/v1/state/{room_id}?event_id={}", segment(edge.as_str()));
            let (mut answer, held) = client
                .call_held(self.origin, Call::get(uri).with_state(), false)
                .await
                .map_err(|error| error.into_refusal(self.origin))?;
            let mut events = take_events(&mut answer, "pdus", MAX_ANSWER);
            events.extend(take_events(&mut answer, "auth_chain", MAX_ANSWER));
            fetched = self.verify(events).await?;
            _held = Some(held);
        } else {
            for id in &missing {
                fetched.extend(self.fetch_event(id).await?);
            }
        }
        self.take_outliers(fetched, &all).await?;
        let note = (missed > 0).then(|| self.shared.notes_closed(&self.room.room_id, self.origin, missed));
        let taken = self
            .shared
            .run(self.room, move |batch| {
                Box::pin(async move {
                    let (before, lost) = batch.state_of_given(&state).await?;
                    if let Some(first) = lost.first() {
                        let current = batch.core.current.clone();
                        stands_on_all(&before, first, |kind| current.get(kind, "").is_some())?;
                        tracing::warn!(room = %batch.room_id, event = %event.pdu().event_id, lost = lost.len(), %first,
                            "a gap is closed with a state of which some events cannot be had");
                    }
                    let event_id = event.pdu().event_id.clone();
                    let outcome = guarded(&event_id, batch.accept(event, &Source::Received, Some(before))).await?;
                    if let (Outcome::Known(_), Some(note)) = (&outcome, note) {
                        batch.add_effect(event_id, note);
                    }
                    Ok(outcome)
                })
            })
            .await?;
        if missed > 0 {
            self.shared.attend(&self.room.room_id, false);
        }
        Ok(taken)
    }

    async fn is_known(&self, id: &OwnedEventId) -> Result<bool, Refusal> {
        Ok(self.shared.events.get(id).await?.is_some())
    }

    /// `GET event`, verified; none when the server does not have it.
    pub async fn fetch_event(&self, event_id: &EventId) -> Result<Option<Verified>, Refusal> {
        let uri = format!("/_matrix/federation/v1/event/{}", segment(event_id.as_str()));
        let Ok(mut answer) = self.shared.context.client.call(self.origin, Call::get(uri), false).await else {
            return Ok(None);
        };
        let events = self.verify(take_events(&mut answer, "pdus", 1)).await?;
        Ok(events.into_iter().find(|event| event.pdu().event_id == event_id))
    }

    /// Those of the events that have the right form, are of this room, and are signed.
    async fn verify(&self, events: Vec<Object>) -> Result<Vec<Verified>, Refusal> {
        let parsed = self.parse(events).collect();
        self.shared.verify_given(&self.room.room_id, parsed).await
    }

    pub fn parse(&self, events: Vec<Object>) -> impl Iterator<Item = Unverified> + use<> {
        let version = self.room.version;
        events.into_iter().filter_map(move |event| Unverified::from_object(event, version).ok())
    }
}

/// The events of a list in an answer, at most `limit`.
pub(super) fn take_events(answer: &mut Object, key: &str, limit: usize) -> Vec<Object> {
    let Some(Value::Array(events)) = answer.remove(key) else { return Vec::new() };
    let objects = events.into_iter().filter_map(|event| match event {
        Value::Object(event) => Some(event),
        _ => None,
    });
    objects.take(limit).collect()
}

fn event_ids(answer: &Object, key: &str) -> Result<Vec<OwnedEventId>, Refusal> {
    let list = answer.get(key).and_then(Value::as_array).ok_or_else(|| Refusal::malformed(key, "absent"))?;
    if list.len() > MAX_ANSWER {
        return Err(Refusal::malformed(key, format!("{} events", list.len())));
    }
    list.iter().map(|id| parse_event_id(key, id.as_str().unwrap_or_default())).collect()
}

/// A path segment or query value, percent-encoded.
pub(super) fn segment(text: &str) -> String {
    percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string()
}
