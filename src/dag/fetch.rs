//! What is missing to check an event is asked of the server that sent it: events in between, auth events, and where the gap
//! is too wide the state at its edge. Everything is bounded, and everything that comes is checked like any other event.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use ruma::{EventId, OwnedEventId, ServerName};
use serde_json::{Value, json};

use super::Shared;
use super::accept::{Outcome, Source};
use super::given::stands_on_all;
use super::pdu::{Unverified, Verified};
use super::receive::Outcomes;
use super::room::Room;
use super::stored::Stored;
use super::version::is_shared;
use crate::event::{Object, parse_event_id};
use crate::federation::Call;
use crate::guard::guarded;
use crate::refusal::Refusal;
use crate::store::dag::first_with_state;

/// How often the events in between are asked for, each time further back.
const ROUNDS: usize = 5;
/// How many events in between are asked for at once.
const PER_ROUND: usize = 50;
/// How many events may wait for others in one call.
const MAX_WAITING: usize = 300;
/// How many edges of a gap are closed by asking for the state there.
const MAX_EDGES: usize = 5;
/// How many events of a state or an auth chain are fetched one by one before the whole is asked for.
const MAX_SINGLE: usize = 50;
/// How long one waits for another who fills a gap of the same room.
const TURN: Duration = Duration::from_secs(10);
/// How long filling a gap may take.
const PATIENCE: Duration = Duration::from_secs(180);
/// How many events an answer may hold.
pub(super) const MAX_ANSWER: usize = 100_000;

impl Shared {
    /// Takes verified events of one room that `origin` sent; what they need is fetched from there.
    pub(super) async fn accept_all(
        self: &Arc<Self>,
        room: &Arc<Room>,
        origin: &ServerName,
        events: Vec<Verified>,
    ) -> Result<Outcomes, Refusal> {
        if events.is_empty() {
            return Ok(Outcomes::new());
        }
        let outcomes = self.accept_batch(room, events.clone(), Source::Received).await?;
        if !outcomes.values().any(is_missing) {
            return Ok(outcomes);
        }
        // Mostly several servers send what follows the same gap, and it is filled once. Who fills it can be slow on purpose,
        // so nobody waits for that for long.
        let _one_at_a_time = tokio::time::timeout(TURN, room.filling.lock()).await;
        let wanted: BTreeSet<OwnedEventId> = outcomes.keys().cloned().collect();
        let mut filling = Filling { shared: self, room, origin, waiting: HashMap::new(), outcomes: Outcomes::new() };
        for event in events {
            if outcomes.get(&event.pdu().event_id).is_some_and(is_missing) {
                filling.waiting.insert(event.pdu().event_id.clone(), event);
            }
        }
        filling.outcomes = outcomes;
        match tokio::time::timeout(PATIENCE, Box::pin(filling.fill())).await {
            Ok(filled) => filled?,
            Err(_) => tracing::info!(room = %room.room_id, server = %origin, "filling a gap took too long"),
        }
        let mut outcomes = filling.outcomes;
        outcomes.retain(|id, _| wanted.contains(id));
        Ok(outcomes)
    }
}

fn is_missing(outcome: &Result<Outcome, Refusal>) -> bool {
    matches!(outcome, Ok(Outcome::Missing { .. }))
}

struct Filling<'a> {
    shared: &'a Arc<Shared>,
    room: &'a Arc<Room>,
    origin: &'a ServerName,
    /// Verified events that lack something.
    waiting: HashMap<OwnedEventId, Verified>,
    outcomes: Outcomes,
}

impl Filling<'_> {
    async fn fill(&mut self) -> Result<(), Refusal> {
        // Somebody else may have filled the gap while this one waited for its turn.
        self.retry().await?;
        for _ in 0..ROUNDS {
            if self.waiting.is_empty() {
                return Ok(());
            }
            let (prev, auth) = self.missing();
            let mut progress = false;
            if !auth.is_empty() {
                progress |= self.fetch_auth_events(&auth).await?;
            }
            if !prev.is_empty() {
                progress |= self.fetch_between().await?;
            }
            self.retry().await?;
            if !progress {
                break;
            }
        }
        // Of a server that is not in the room yet, no word on the room's state is believed.
        if self.waiting.is_empty() || !self.room.core().has_server(self.origin) {
            return Ok(());
        }
        self.drop_hopeless();
        self.bridge_gaps().await
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

    /// Gives everything that waits to the room again.
    async fn retry(&mut self) -> Result<(), Refusal> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let events = self.waiting.values().cloned().collect();
        let outcomes = self.shared.accept_batch(self.room, events, Source::Received).await?;
        self.waiting.retain(|id, _| outcomes.get(id).is_some_and(is_missing));
        self.outcomes.extend(outcomes);
        Ok(())
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

    /// `POST get_missing_events`; true when something new came.
    async fn fetch_between(&mut self) -> Result<bool, Refusal> {
        let earliest: Vec<_> = self.room.core().tips.iter().rev().take(20).map(|tip| tip.event_id.clone()).collect();
        let latest: Vec<_> = self
            .waiting
            .keys()
            .filter(|id| match self.outcomes.get(*id) {
                Some(Ok(Outcome::Missing { prev, .. })) => prev.iter().any(|id| !self.waiting.contains_key(id)),
                _ => false,
            })
            .take(20)
            .collect();
        let floor = self.floor().await?;
        let body =
            json!({ "limit": PER_ROUND, "min_depth": floor, "earliest_events": earliest, "latest_events": latest });
        let uri = format!("/_matrix/federation/v1/get_missing_events/{}", segment(self.room.room_id.as_str()));
        let body = body.as_object().cloned().unwrap_or_default();
        let call = Call { limit: 8 << 20, ..Call::post(uri, body) };
        let mut answer = match self.shared.context.client.call(self.origin, call, false).await {
            Ok(answer) => answer,
            Err(error) => {
                tracing::info!(room = %self.room.room_id, server = %self.origin, %error, "no missing events");
                return Ok(false);
            }
        };
        let events = self.verify(take_events(&mut answer, "events", PER_ROUND)).await?;
        let mut new = false;
        for event in events.into_iter().filter(|event| event.pdu().depth >= floor) {
            if self.waiting.len() < MAX_WAITING {
                new |= self.waiting.insert(event.pdu().event_id.clone(), event).is_none();
            }
        }
        Ok(new)
    }

    /// The depth at which the room's history begins here. What was said before the gateway came into a room that lives
    /// elsewhere is no gap, and must not be taken for what is said now: the state at its edge is asked for.
    async fn floor(&self) -> Result<i64, Refusal> {
        if is_shared(self.room.version) {
            return Ok(0);
        }
        let first = first_with_state(&self.shared.context.store, &self.room.room_id).await?;
        Ok(first.map(Stored::from_row).transpose()?.map_or(0, |first| first.pdu.depth))
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
    async fn bridge_gaps(&mut self) -> Result<(), Refusal> {
        for _ in 0..MAX_EDGES {
            let Some(edge) = self.edge() else { return Ok(()) };
            let event_id = edge.pdu().event_id.clone();
            match self.bridge_gap(edge).await {
                Ok(outcome) => {
                    self.waiting.remove(&event_id);
                    self.outcomes.insert(event_id, Ok(outcome));
                }
                Err(refusal) => {
                    tracing::info!(room = %self.room.room_id, event = %event_id, error = %refusal, "gap stays open");
                    return Ok(());
                }
            }
            self.retry().await?;
        }
        Ok(())
    }

    /// The deepest in the past of the waiting events that follow something nobody gave.
    fn edge(&self) -> Option<Verified> {
        let is_edge = |event: &&Verified| {
            matches!(self.outcomes.get(&event.pdu().event_id), Some(Ok(Outcome::Missing { prev, auth }))
                if auth.is_empty() && prev.iter().any(|id| !self.waiting.contains_key(id)))
        };
        let rank = |event: &&Verified| (event.pdu().depth, event.pdu().event_id.clone());
        self.waiting.values().filter(is_edge).min_by_key(rank).cloned()
    }

    async fn bridge_gap(&self, event: Verified) -> Result<Outcome, Refusal> {
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
        self.shared
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
                    guarded(&event_id, batch.accept(event, &Source::Received, Some(before))).await
                })
            })
            .await
    }

    async fn is_known(&self, id: &OwnedEventId) -> Result<bool, Refusal> {
        Ok(self.shared.events.get(id).await?.is_some())
    }

    /// `GET event`, verified; none when the server does not have it.
    async fn fetch_event(&self, event_id: &EventId) -> Result<Option<Verified>, Refusal> {
        let uri = format!("/_matrix/federation/v1/event/{}", segment(event_id.as_str()));
        let Ok(mut answer) = self.shared.context.client.call(self.origin, Call::get(uri), false).await else {
            return Ok(None);
        };
        let events = self.verify(take_events(&mut answer, "pdus", 1)).await?;
        Ok(events.into_iter().find(|event| event.pdu().event_id == event_id))
    }

    /// Those of the events that have the right form, are of this room, and are signed.
    async fn verify(&self, events: Vec<Object>) -> Result<Vec<Verified>, Refusal> {
        let version = self.room.version;
        let parsed = events.into_iter().filter_map(|event| Unverified::from_object(event, version).ok()).collect();
        self.shared.verify_given(&self.room.room_id, parsed).await
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
