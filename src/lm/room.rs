//! A room as it is after one event of its log: what the next event is judged by and built on. Cloning shares everything,
//! so that a batch can be tried on a copy.

use std::sync::Arc;

use ruma::{OwnedEventId, OwnedRoomId, OwnedServerName, ServerName, UserId};
use serde_json::Value;

use super::State;
use super::rules::{Before, HUB_EVENT, Judged, Slot, check, selected_slots};
use super::weight::Weight;
use crate::event::{Lpdu, Object, Pdu, Redaction, RoomVersion};
use crate::guard::trip;
use crate::identity::Validity;
use crate::refusal::Refusal;
use crate::seam::{Draft, SHARED};

/// What of a room hardly ever changes.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    pub room_id: OwnedRoomId,
    pub version: RoomVersion,
    /// The server that keeps the log. As soon as the room has state it is what that says ([`hub_of`]).
    pub hub: OwnedServerName,
    /// Whether the log follows from a graph that the gateway has a part in: nothing is appended but by the graph.
    pub shared: bool,
}

impl Facts {
    /// The table of redaction by which a hub goes: in shared rooms that of graph servers.
    pub fn redaction(&self) -> Redaction {
        if self.shared { Redaction::GraphServer } else { Redaction::Draft }
    }

    /// For what moment the keys must be valid of who signs an event that is to be appended. In shared rooms graph servers check it
    /// after us, and take none that is dated beyond its keys.
    pub fn validity(&self, origin_server_ts: i64) -> Validity {
        if self.shared { Validity::At(origin_server_ts) } else { Validity::InLog(origin_server_ts) }
    }
}

/// Who keeps a log, by the state: the server of the room's creator, until it is handed over; then the server to which it was
/// handed over last. The one place that decides it: what was not allowed to hand it over is no state of the room.
pub(super) fn hub_of(state: &State) -> Option<&ServerName> {
    let handed_over = state.get(HUB_EVENT, "").and_then(|event| event.new_hub());
    handed_over.or_else(|| state.get("m.room.create", "").map(|create| create.sender.server_name()))
}

/// A room after the event at `head`.
#[derive(Debug, Clone)]
pub(super) struct Snapshot {
    pub facts: Arc<Facts>,
    /// The table of redaction that the hub uses, as far as it is known.
    pub redaction: Redaction,
    /// How much the state is, where the log is another server's.
    pub weight: Weight,
    /// The last position; −1 in a room that has no event yet.
    pub head: i64,
    last: Option<Arc<Pdu>>,
    state: State,
    /// How many joined users each server has.
    servers: imbl::OrdMap<OwnedServerName, u32>,
}

/// A server's membership of a room, as an event changed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Move {
    /// Its first user joined.
    Came(OwnedServerName),
    /// Its last user is gone.
    Went(OwnedServerName),
}

/// What of an event the rules judge, whoever made it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Subject<'a> {
    pub sender: &'a UserId,
    pub kind: &'a str,
    pub state_key: Option<&'a str>,
    pub content: &'a Object,
    /// Whether a hub has signed it, when it has a `hub_server`.
    pub signed_by_hub: Option<bool>,
    /// Whether the server has signed it to which it hands the log over.
    pub signed_by_next_hub: bool,
    /// Whether it names events before it, also where none is known.
    pub has_prev_events: bool,
}

impl<'a> Subject<'a> {
    pub fn of(pdu: &'a Pdu) -> Self {
        Self {
            sender: &pdu.sender,
            kind: &pdu.kind,
            state_key: pdu.state_key.as_deref(),
            content: pdu.content(),
            signed_by_hub: pdu.hub_server.as_ref().map(|_| true),
            // Without that signature it is not taken as an event.
            signed_by_next_hub: pdu.new_hub().is_some(),
            has_prev_events: !pdu.prev_events.is_empty(),
        }
    }

    /// What a user of this gateway is to send, by the hub's own hand or as an LPDU.
    pub fn draft(draft: &'a Draft, signed_by_hub: Option<bool>) -> Self {
        Self {
            sender: &draft.sender,
            kind: &draft.kind,
            state_key: draft.state_key.as_deref(),
            content: &draft.content,
            signed_by_hub,
            signed_by_next_hub: false,
            has_prev_events: false,
        }
    }

    /// What a participant sends, as it will be when the hub has signed it.
    pub fn lpdu(lpdu: &'a Lpdu, content: &'a Object) -> Self {
        Self {
            sender: &lpdu.sender,
            kind: &lpdu.kind,
            state_key: lpdu.state_key.as_deref(),
            content,
            signed_by_hub: Some(true),
            signed_by_next_hub: false,
            has_prev_events: false,
        }
    }
}

impl Snapshot {
    /// A room that has no event yet.
    pub fn empty(facts: Facts, redaction: Redaction) -> Self {
        Self {
            facts: Arc::new(facts),
            redaction,
            weight: Weight::default(),
            head: -1,
            last: None,
            state: State::default(),
            servers: imbl::OrdMap::new(),
        }
    }

    /// A room of which the current state and the last event were read from the store.
    pub fn restore(
        facts: Facts,
        redaction: Redaction,
        head: i64,
        last: Arc<Pdu>,
        state: impl IntoIterator<Item = Arc<Pdu>>,
    ) -> Self {
        let mut snapshot = Self::empty(facts, redaction);
        for pdu in state {
            snapshot.place(&pdu);
        }
        snapshot.head = head;
        snapshot.last = Some(last);
        snapshot
    }

    /// The event at `head`.
    pub fn last_id(&self) -> Option<&OwnedEventId> {
        self.last.as_ref().map(|last| &last.event_id)
    }

    /// The current state event of a type and state key.
    pub fn state_event(&self, kind: &str, state_key: &str) -> Option<&Arc<Pdu>> {
        self.state.get(kind, state_key)
    }

    /// The current state.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Whether a server has a joined user.
    pub fn has_server(&self, server: &ServerName) -> bool {
        self.servers.contains_key(server)
    }

    /// The servers with joined users.
    pub fn servers(&self) -> impl Iterator<Item = &OwnedServerName> {
        self.servers.keys()
    }

    /// `membership` of a user.
    pub fn membership(&self, user: &str) -> Option<&str> {
        membership(self.state_event("m.room.member", user)?)
    }

    /// The users with a membership.
    pub fn members<'a>(&'a self, wanted: &'a str) -> impl Iterator<Item = &'a UserId> {
        self.state
            .of_kind("m.room.member")
            .filter(move |(_, event)| membership(event) == Some(wanted))
            .filter_map(|(user, _)| <&UserId>::try_from(user).ok())
    }

    /// The places in the current state of the events that allow an event, and those events' IDs.
    pub fn auth_events<'a>(&self, event: &Subject<'a>) -> (Vec<Slot<'a>>, Vec<OwnedEventId>) {
        selected_slots(event.kind, event.sender, event.state_key, event.content)
            .into_iter()
            .filter_map(|slot| Some((slot, self.state_event(slot.kind, slot.state_key)?.event_id.clone())))
            .unzip()
    }

    /// Whether the rules allow an event, whose signatures are known to be right, after this one.
    pub fn judge(&self, event: &Subject<'_>, auth_events: &[Slot<'_>]) -> Result<(), Refusal> {
        self.judge_after(event, auth_events, self.before(event))
    }

    /// What of the room the rules ask for an event.
    pub fn before<'a>(&'a self, event: &Subject<'a>) -> Before<'a> {
        let content = |kind| self.state_event(kind, "").map(|event| event.content());
        Before {
            creator: self.state_event("m.room.create", "").map(|create| &*create.sender),
            follows_create: self.last.as_ref().is_some_and(|last| last.kind == "m.room.create"),
            power_levels: content("m.room.power_levels"),
            join_rules: content("m.room.join_rules"),
            sender_membership: self.membership(event.sender.as_str()),
            target_membership: event.state_key.and_then(|target| self.membership(target)),
            hub: Some(&self.facts.hub),
            was_handed_over: self.was_handed_over(),
            next_hub_is_in: self.next_hub_is_in(event),
        }
    }

    /// Whether the hub says in the create event that graph servers have a part in the room.
    pub fn says_shared(&self) -> bool {
        let create = self.state_event("m.room.create", "");
        create.is_some_and(|create| create.content().get(SHARED).and_then(Value::as_bool) == Some(true))
    }

    /// Whether another server kept the log before.
    pub fn was_handed_over(&self) -> bool {
        self.state_event(HUB_EVENT, "").is_some_and(|event| event.new_hub().is_some())
    }

    fn next_hub_is_in(&self, event: &Subject<'_>) -> bool {
        let named = event.content.get("hub_server").filter(|_| event.kind == HUB_EVENT).and_then(Value::as_str);
        named.and_then(|name| <&ServerName>::try_from(name).ok()).is_some_and(|server| self.has_server(server))
    }

    /// The same as [`Self::judge`], where the room may be another than this.
    pub fn judge_after(
        &self,
        event: &Subject<'_>,
        auth_events: &[Slot<'_>],
        before: Before<'_>,
    ) -> Result<(), Refusal> {
        trip("judge", &event.kind);
        check(&Judged {
            version: self.facts.version,
            room_id: &self.facts.room_id,
            sender: event.sender,
            kind: event.kind,
            state_key: event.state_key,
            content: event.content,
            signed_by_sender: true,
            signed_by_hub: event.signed_by_hub,
            signed_by_next_hub: event.signed_by_next_hub,
            has_prev_events: self.last.is_some() || event.has_prev_events,
            auth_events,
            before,
        })
    }

    /// Puts the next event in its place.
    pub fn apply(&mut self, pdu: &Arc<Pdu>) -> Option<Move> {
        self.head = self.head.saturating_add(1);
        self.last = Some(pdu.clone());
        trip("apply", &pdu.kind);
        self.place(pdu)
    }

    /// Leaves of an event what redaction does. The rules go by nothing of what goes.
    pub fn redact(&mut self, event: &Pdu) {
        let current = event.state_key.as_deref().and_then(|state_key| self.state_event(&event.kind, state_key));
        if current.is_some_and(|current| current.event_id == event.event_id) {
            self.state.insert(&Arc::new(event.redacted(self.redaction)));
        }
    }

    fn place(&mut self, pdu: &Arc<Pdu>) -> Option<Move> {
        let state_key = pdu.state_key.as_ref()?;
        let before = self.state.insert(pdu);
        self.moved(&pdu.kind, state_key, before.as_deref(), Some(pdu))
    }

    /// In the current state there is this event, or none, for a type and state key, whatever the log's last one is.
    pub fn replace(&mut self, kind: &str, state_key: &str, event: Option<&Arc<Pdu>>) {
        let before = match event {
            Some(event) => self.state.insert(event),
            None => self.state.remove(kind, state_key),
        };
        self.moved(kind, state_key, before.as_deref(), event.map(|event| &**event));
    }

    fn moved(&mut self, kind: &str, state_key: &str, before: Option<&Pdu>, now: Option<&Pdu>) -> Option<Move> {
        // A shared room stays with its creator's server, whatever its graph comes to.
        if !self.facts.shared
            && matches!(kind, "m.room.create" | HUB_EVENT)
            && let Some(hub) = hub_of(&self.state).filter(|hub| **hub != self.facts.hub)
        {
            self.facts = Arc::new(Facts { hub: hub.to_owned(), ..Facts::clone(&self.facts) });
        }
        if kind != "m.room.member" {
            return None;
        }
        let user = <&UserId>::try_from(state_key).ok()?;
        let is_in = |event: Option<&Pdu>| event.and_then(membership) == Some("join");
        self.count(user.server_name(), is_in(before), is_in(now))
    }

    fn count(&mut self, server: &ServerName, was_in: bool, is_in: bool) -> Option<Move> {
        let users = self.servers.get(server).copied().unwrap_or(0);
        match (was_in, is_in) {
            (false, true) => {
                self.servers.insert(server.to_owned(), users.saturating_add(1));
                (users == 0).then(|| Move::Came(server.to_owned()))
            }
            (true, false) if users <= 1 => {
                self.servers.remove(server);
                Some(Move::Went(server.to_owned()))
            }
            (true, false) => {
                self.servers.insert(server.to_owned(), users.saturating_sub(1));
                None
            }
            _ => None,
        }
    }
}

fn membership(member: &Pdu) -> Option<&str> {
    member.content().get("membership").and_then(Value::as_str)
}
