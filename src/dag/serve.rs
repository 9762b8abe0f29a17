//! What other homeservers may read: events, states, auth chains and history, of rooms in which they have somebody.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use ruma::{EventId, OwnedEventId, RoomId, ServerName};
use serde_json::{Value, json};

use super::Dag;
use super::events::{EventMap, Events};
use super::room::Room;
use super::snapshot::Snapshot;
use super::stored::{Status, Stored};
use super::version::is_shared;
use crate::event::{Object, parse_event_id};
use crate::refusal::Refusal;
use crate::seam::Membership;

/// How many events one page of history has at most.
const MAX_PAGE: usize = 100;
/// From how many events one page of history goes back at most.
const MAX_START: usize = 20;
/// How many missing events are given at once, at most.
const MAX_MISSING: usize = 50;
/// How many events that were rejected are passed on the way at most.
const MAX_REJECTED: usize = 1000;

impl Dag {
    /// `GET v1/event`
    pub async fn get_event(&self, origin: &ServerName, event_id: &EventId) -> Result<Value, Refusal> {
        let not_found = || Refusal::NotFound(format!("event {event_id}"));
        let event = self.shared.events.get(event_id).await?.ok_or_else(not_found)?;
        self.reader(origin, &event.pdu.room_id, std::slice::from_ref(&event.pdu.event_id)).await?;
        if event.status == Status::Rejected {
            return Err(not_found());
        }
        Ok(self.page(vec![self.as_seen_by(origin, &event).await?]))
    }

    /// `GET v1/event_auth`
    pub async fn event_auth(
        &self,
        origin: &ServerName,
        room_id: &RoomId,
        event_id: &EventId,
    ) -> Result<Value, Refusal> {
        self.reader(origin, room_id, &[event_id.to_owned()]).await?;
        let event = self.event_of(room_id, event_id).await?;
        let answer = async {
            let chain = auth_chain_of(&self.shared.events, vec![event], &EventMap::new()).await?;
            Ok(json!({ "auth_chain": values(chain) }))
        };
        self.shared.context.large.build(origin, answer).await
    }

    /// `GET v1/state`, and `state_ids` when `ids` is set: the state before an event.
    pub async fn get_state(
        &self,
        origin: &ServerName,
        room_id: &RoomId,
        event_id: &EventId,
        ids: bool,
    ) -> Result<Value, Refusal> {
        self.reader(origin, room_id, &[event_id.to_owned()]).await?;
        let event = self.event_of(room_id, event_id).await?;
        let groups = event.groups.ok_or_else(|| Refusal::NotFound(format!("the state at {event_id}")))?;
        let answer = async {
            let state = self.shared.events.group(groups.before).await?;
            let state_ids: Vec<_> = state.map.values().cloned().collect();
            let state = self.shared.events.get_many(&state_ids).await?;
            let known = state.values().cloned().collect();
            let chain = auth_chain_of(&self.shared.events, known, &EventMap::new()).await?;
            if ids {
                let chain: Vec<_> = chain.into_iter().map(|event| event.pdu.event_id.clone()).collect();
                return Ok(json!({ "pdu_ids": state_ids, "auth_chain_ids": chain }));
            }
            Ok(json!({ "pdus": values(state.into_values()), "auth_chain": values(chain) }))
        };
        self.shared.context.large.build(origin, answer).await
    }

    /// `GET v1/backfill`
    pub async fn backfill(
        &self,
        origin: &ServerName,
        room_id: &RoomId,
        from: &[OwnedEventId],
        limit: i64,
    ) -> Result<Value, Refusal> {
        let start = start_of(from);
        let room = self.reader(origin, room_id, &start).await?;
        Ok(self.page(self.history_for(origin, &room, start, limit).await?))
    }

    /// `GET v2/backfill`, as LM's draft has it, of the graph of a shared room: oldest first, nothing beside the events, and for who may
    /// not read the room there is none.
    pub async fn backfill_as_log(
        &self,
        origin: &ServerName,
        room_id: &RoomId,
        from: &[OwnedEventId],
        limit: i64,
    ) -> Result<Value, Refusal> {
        let start = start_of(from);
        let room = self.reader(origin, room_id, &start).await.map_err(|refusal| match refusal {
            Refusal::Forbidden(_) => Refusal::UnknownRoom(room_id.to_string()),
            refusal => refusal,
        })?;
        let known = self.shared.events.get_many(&start).await?;
        let is_here = |event: &Arc<Stored>| {
            event.pdu.room_id == room.room_id && event.groups.is_some() && event.status != Status::Rejected
        };
        if !known.values().any(is_here) {
            let asked = start.first().map(|id| id.to_string()).unwrap_or_default();
            return Err(Refusal::NotFound(format!("event {asked} in {room_id}")));
        }
        let mut pdus = self.history_for(origin, &room, start, limit).await?;
        pdus.reverse();
        Ok(json!({ "pdus": pdus }))
    }

    /// The events from `start` backwards, newest first, as a server sees them.
    async fn history_for(
        &self,
        origin: &ServerName,
        room: &Room,
        start: Vec<OwnedEventId>,
        limit: i64,
    ) -> Result<Vec<Value>, Refusal> {
        let limit = usize::try_from(limit).unwrap_or(0).min(MAX_PAGE);
        let mut pdus = Vec::new();
        for event in self.history(room, start, &HashSet::new(), 0, limit).await? {
            pdus.push(self.as_seen_by(origin, &event).await?);
        }
        Ok(pdus)
    }

    /// `POST v1/get_missing_events`
    pub async fn get_missing_events(
        &self,
        origin: &ServerName,
        room_id: &RoomId,
        body: Object,
    ) -> Result<Value, Refusal> {
        let latest = event_ids(&body, "latest_events")?;
        let room = self.reader(origin, room_id, &latest).await?;
        let limit = body.get("limit").and_then(Value::as_u64).unwrap_or(10);
        let limit = usize::try_from(limit).unwrap_or(MAX_MISSING).min(MAX_MISSING);
        // Of a shared room nobody else knows how deep something is here.
        let min_depth = body.get("min_depth").and_then(Value::as_i64).filter(|_| !is_shared(room.version)).unwrap_or(0);
        let earliest: HashSet<OwnedEventId> = event_ids(&body, "earliest_events")?.into_iter().collect();
        let heads = self.shared.events.get_many(&latest).await?;
        let heads: Vec<_> = heads.into_values().filter(|event| event.pdu.room_id == room.room_id).collect();
        let mut stop = earliest;
        stop.extend(latest);
        let start = heads.iter().flat_map(|event| event.pdu.prev_events.iter().cloned()).collect();
        let mut events = self.history(&room, start, &stop, min_depth, limit).await?;
        events.reverse();
        let mut pdus = Vec::new();
        for event in events {
            pdus.push(self.as_seen_by(origin, &event).await?);
        }
        Ok(json!({ "events": pdus }))
    }

    /// The events from `start` backwards, newest first, without those of `stop` and what is before them. `min_depth` holds for what
    /// is further back than `start`: a branch that is shorter than another one is wanted all the same.
    async fn history(
        &self,
        room: &Room,
        start: Vec<OwnedEventId>,
        stop: &HashSet<OwnedEventId>,
        min_depth: i64,
        limit: usize,
    ) -> Result<Vec<Arc<Stored>>, Refusal> {
        let mut seen: HashSet<OwnedEventId> = HashSet::new();
        // Newest first: the deepest of what is known next.
        let mut next: BTreeSet<(i64, i64, OwnedEventId)> = BTreeSet::new();
        let mut known = EventMap::new();
        let mut wanted = start;
        let mut least = i64::MIN;
        let mut events = Vec::new();
        loop {
            wanted.retain(|id| !stop.contains(id) && seen.insert(id.clone()));
            for (id, event) in self.shared.events.get_many(&wanted).await? {
                let pdu = &event.pdu;
                if pdu.room_id == room.room_id && event.groups.is_some() && pdu.depth >= least {
                    next.insert((pdu.depth, pdu.origin_server_ts, id.clone()));
                    known.insert(id, event);
                }
            }
            least = min_depth;
            let Some((_, _, id)) = next.pop_last().filter(|_| events.len() < limit) else { return Ok(events) };
            let Some(event) = known.remove(&id) else { return Ok(events) };
            wanted = event.pdu.prev_events.clone();
            if event.status != Status::Rejected {
                events.push(event);
            } else if seen.len() > limit.saturating_add(MAX_REJECTED) {
                return Ok(events);
            }
        }
    }

    /// The room, when the server has somebody in it, or had at each of the events: who was kicked may not have all yet that came
    /// before that. (HC-50)
    async fn reader(&self, origin: &ServerName, room_id: &RoomId, at: &[OwnedEventId]) -> Result<Arc<Room>, Refusal> {
        let room = self.shared.room(room_id).await?;
        self.shared.check_acl(&room, origin).await?;
        if room.core().has_server(origin) || self.was_in(origin, &room, at).await? {
            Ok(room)
        } else {
            Err(Refusal::Forbidden(format!("{origin} is not in room {room_id}")))
        }
    }

    /// Whether a server had somebody in the room before each of these events, up to the one by which the last was taken out.
    async fn was_in(&self, origin: &ServerName, room: &Room, at: &[OwnedEventId]) -> Result<bool, Refusal> {
        let events = self.shared.events.get_many(at).await?;
        if at.is_empty() || !at.iter().all(|id| events.contains_key(id)) {
            return Ok(false);
        }
        for event in events.values() {
            let Some(groups) = event.groups.filter(|_| event.pdu.room_id == room.room_id) else { return Ok(false) };
            let before = self.shared.events.group(groups.before).await?;
            if event.status == Status::Rejected || !self.has(origin, &before, &[Membership::Join]).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether a user of a server has one of these memberships in a state.
    async fn has(&self, origin: &ServerName, state: &Snapshot, wanted: &[Membership]) -> Result<bool, Refusal> {
        let first = ("m.room.member".to_owned(), String::new());
        let suffix = format!(":{origin}");
        let ids: Vec<_> = state
            .map
            .range(first..)
            .take_while(|((kind, _), _)| kind == "m.room.member")
            .filter(|((_, user), _)| user.ends_with(&suffix))
            .map(|(_, id)| id.clone())
            .collect();
        let members = self.shared.events.get_many(&ids).await?;
        Ok(members.values().any(|event| event.membership().is_some_and(|found| wanted.contains(&found))))
    }

    async fn event_of(&self, room_id: &RoomId, event_id: &EventId) -> Result<Arc<Stored>, Refusal> {
        let event = self.shared.events.get(event_id).await?;
        event
            .filter(|event| event.pdu.room_id == room_id && event.status != Status::Rejected)
            .ok_or_else(|| Refusal::NotFound(format!("event {event_id} of room {room_id}")))
    }

    /// The event, or its redacted copy when the room's history was not visible to the server then.
    async fn as_seen_by(&self, origin: &ServerName, event: &Arc<Stored>) -> Result<Value, Refusal> {
        if self.is_visible(origin, event).await? {
            Ok(event.pdu.to_value())
        } else {
            Ok(event.pdu.redacted()?.to_value())
        }
    }

    /// By the history visibility before the event or after it, whichever shows more: also state, which is given in full where the
    /// state of the room is asked for.
    async fn is_visible(&self, origin: &ServerName, event: &Arc<Stored>) -> Result<bool, Refusal> {
        if event.pdu.sender.server_name() == origin {
            return Ok(true);
        }
        // What came alone, because something stands on it, has no place in the history.
        let Some(groups) = event.groups else { return Ok(event.pdu.state_key.is_some()) };
        let before = self.shared.events.group(groups.before).await?;
        if self.shows(origin, &before).await? {
            return Ok(true);
        }
        if groups.after == groups.before {
            return Ok(false);
        }
        let after = self.shared.events.group(groups.after).await?;
        self.shows(origin, &after).await
    }

    /// Whether a room in this state shows its history to a server.
    async fn shows(&self, origin: &ServerName, state: &Snapshot) -> Result<bool, Refusal> {
        let visibility = match state.get("m.room.history_visibility", "") {
            Some(id) => self.shared.events.get(id).await?.map(|event| event.content()),
            None => None,
        };
        let visibility = visibility.and_then(|content| Some(content.get("history_visibility")?.as_str()?.to_owned()));
        match visibility.as_deref() {
            Some("joined") => self.has(origin, state, &[Membership::Join]).await,
            Some("invited") => self.has(origin, state, &[Membership::Join, Membership::Invite]).await,
            _ => Ok(true),
        }
    }

    fn page(&self, pdus: Vec<Value>) -> Value {
        let context = &self.shared.context;
        json!({ "origin": context.server_name, "origin_server_ts": context.clock.now_ms(), "pdus": pdus })
    }
}

/// From where a page of history goes back at most.
fn start_of(from: &[OwnedEventId]) -> Vec<OwnedEventId> {
    from.iter().take(MAX_START).cloned().collect()
}

/// The auth chain of `roots`, without the events of `known`.
pub(super) async fn auth_chain_of(
    events: &Events,
    roots: Vec<Arc<Stored>>,
    known: &EventMap,
) -> Result<Vec<Arc<Stored>>, Refusal> {
    let chain = events.auth_chain(roots, &EventMap::new()).await?;
    Ok(chain.into_iter().filter(|(id, _)| !known.contains_key(id)).map(|(_, event)| event).collect())
}

/// Events as JSON, in the order of their depth.
pub(super) fn values(events: impl IntoIterator<Item = Arc<Stored>>) -> Vec<Value> {
    let mut events: Vec<_> = events.into_iter().collect();
    events.sort_by(|a, b| (a.pdu.depth, &a.pdu.event_id).cmp(&(b.pdu.depth, &b.pdu.event_id)));
    events.iter().map(|event| event.pdu.to_value()).collect()
}

fn event_ids(body: &Object, key: &str) -> Result<Vec<OwnedEventId>, Refusal> {
    let Some(list) = body.get(key).and_then(Value::as_array) else {
        return Err(Refusal::malformed(key, "absent or no list"));
    };
    let ids = list.iter().take(MAX_MISSING).map(|id| parse_event_id(key, id.as_str().unwrap_or_default()));
    ids.collect()
}
