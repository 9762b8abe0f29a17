//! Both sides through one interface: what the bridge reads of a room and does in it, whether it is a graph or a log.

use std::sync::Arc;

use async_trait::async_trait;
use ruma::{EventId, OwnedEventId, OwnedRoomId, OwnedUserId, RoomId, UserId};

use crate::dag::{self, Dag, GraphEvent};
use crate::event::{Object, Pdu};
use crate::identity::Side;
use crate::lm::{self, Appended, Lm, Sent};
use crate::refusal::Refusal;
use crate::seam::{Draft, Outgoing};

/// The type of member events.
pub(super) const MEMBER: &str = "m.room.member";

/// An accepted event of either side.
#[derive(Debug, Clone)]
pub(super) struct Event {
    pub(super) event_id: OwnedEventId,
    /// On the LM side: the reference hash of the LPDU inside it.
    pub(super) lpdu_id: Option<OwnedEventId>,
    pub(super) room_id: OwnedRoomId,
    pub(super) sender: OwnedUserId,
    pub(super) kind: String,
    pub(super) state_key: Option<String>,
    pub(super) origin_server_ts: i64,
    pub(super) content: Object,
    /// Of a redaction: what it redacts.
    pub(super) redacts: Option<OwnedEventId>,
    /// Grows from ancestor to descendant: depth or position.
    pub(super) order: i64,
}

impl Event {
    /// The membership that this member event is about: whose, and to what.
    pub(super) fn membership(&self) -> Option<(OwnedUserId, &str)> {
        if self.kind != MEMBER {
            return None;
        }
        let target = UserId::parse(self.state_key.as_deref()?).ok()?;
        Some((target, self.content.get("membership")?.as_str()?))
    }
}

impl From<&GraphEvent> for Event {
    fn from(event: &GraphEvent) -> Self {
        Self {
            event_id: event.event_id.clone(),
            lpdu_id: None,
            room_id: event.room_id.clone(),
            sender: event.sender.clone(),
            kind: event.kind.clone(),
            state_key: event.state_key.clone(),
            origin_server_ts: event.origin_server_ts,
            content: event.content.clone(),
            redacts: event.redacts.clone(),
            order: event.depth,
        }
    }
}

impl From<&Appended> for Event {
    fn from(Appended { event, position }: &Appended) -> Self {
        Self {
            event_id: event.event_id.clone(),
            lpdu_id: event.lpdu_id.clone(),
            room_id: event.room_id.clone(),
            sender: event.sender.clone(),
            kind: event.kind.clone(),
            state_key: event.state_key.clone(),
            origin_server_ts: event.origin_server_ts,
            content: event.content().clone(),
            redacts: event.redacts(),
            order: position.0,
        }
    }
}

/// A type and a state key.
pub(super) type Key = (String, String);

/// The current state of a room of either side, or the part of it that was asked for.
#[derive(Debug, Clone)]
pub(super) enum State {
    Graph(Arc<dag::State>),
    Log(lm::State),
}

/// One entry of a state.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry<'a> {
    pub(super) event_id: &'a EventId,
    pub(super) sender: &'a UserId,
    pub(super) state_key: &'a str,
    pub(super) content: &'a Object,
}

impl Entry<'_> {
    /// `content.membership`
    pub(super) fn membership(&self) -> &str {
        self.content.get("membership").and_then(|membership| membership.as_str()).unwrap_or("leave")
    }
}

impl<'a> From<(&'a str, &'a Arc<GraphEvent>)> for Entry<'a> {
    fn from((state_key, event): (&'a str, &'a Arc<GraphEvent>)) -> Self {
        Self { event_id: &event.event_id, sender: &event.sender, state_key, content: &event.content }
    }
}

impl<'a> From<(&'a str, &'a Arc<Pdu>)> for Entry<'a> {
    fn from((state_key, event): (&'a str, &'a Arc<Pdu>)) -> Self {
        Self { event_id: &event.event_id, sender: &event.sender, state_key, content: event.content() }
    }
}

impl State {
    /// The entry of a type and state key.
    pub(super) fn get(&self, kind: &str, state_key: &str) -> Option<Entry<'_>> {
        match self {
            Self::Graph(state) => {
                let found = state.get_key_value(&(kind.to_owned(), state_key.to_owned()));
                found.map(|((_, key), event)| (key.as_str(), event).into())
            }
            Self::Log(state) => {
                state.get(kind, state_key).and_then(|event| Some((event.state_key.as_deref()?, event).into()))
            }
        }
    }

    /// The content of the entry of a type with an empty state key.
    pub(super) fn content(&self, kind: &str) -> Option<&Object> {
        self.get(kind, "").map(|entry| entry.content)
    }

    /// The member event of a user.
    pub(super) fn member(&self, user: &UserId) -> Option<Entry<'_>> {
        self.get(MEMBER, user.as_str())
    }

    /// The membership of a user; `leave` when there is none.
    pub(super) fn membership(&self, user: &UserId) -> &str {
        self.member(user).map_or("leave", |entry| {
            entry.content.get("membership").and_then(|membership| membership.as_str()).unwrap_or("leave")
        })
    }

    /// All member events.
    pub(super) fn members(&self) -> Vec<Entry<'_>> {
        let from = (MEMBER.to_owned(), String::new());
        match self {
            Self::Graph(state) => state
                .range(from..)
                .take_while(|((kind, _), _)| kind == MEMBER)
                .map(|((_, key), event)| (key.as_str(), event).into())
                .collect(),
            Self::Log(state) => state.of_kind(MEMBER).map(Entry::from).collect(),
        }
    }
}

/// An event that the bridge made.
#[derive(Debug, Clone)]
pub(super) struct Made {
    /// Its ID; while it is on its way to a hub, its LPDU's.
    pub(super) event_id: OwnedEventId,
}

/// What the bridge asks of a side.
#[async_trait]
pub(super) trait Rooms: Send + Sync {
    async fn event(&self, event_id: &EventId) -> Result<Option<Event>, Refusal>;
    async fn state(&self, room_id: &RoomId) -> Result<State, Refusal>;
    /// The state as far as these types and state keys go.
    async fn pick(&self, room_id: &RoomId, keys: &[Key]) -> Result<State, Refusal>;
    async fn send(&self, room_id: &RoomId, events: Vec<Outgoing>) -> Vec<Result<Made, Refusal>>;
    async fn invite(&self, room_id: &RoomId, invite: Outgoing) -> Result<Made, Refusal>;
    async fn check(&self, room_id: &RoomId, draft: &Draft) -> Result<(), Refusal>;
}

#[async_trait]
impl Rooms for Dag {
    async fn event(&self, event_id: &EventId) -> Result<Option<Event>, Refusal> {
        Ok(Self::event(self, event_id).await?.map(|event| event.as_ref().into()))
    }

    async fn state(&self, room_id: &RoomId) -> Result<State, Refusal> {
        Ok(State::Graph(Self::state(self, room_id).await?))
    }

    async fn pick(&self, room_id: &RoomId, keys: &[Key]) -> Result<State, Refusal> {
        Ok(State::Graph(Arc::new(self.state_events(room_id, keys).await?)))
    }

    async fn send(&self, room_id: &RoomId, events: Vec<Outgoing>) -> Vec<Result<Made, Refusal>> {
        let sent = Self::send(self, room_id, events).await;
        sent.into_iter().map(|result| result.map(|event| event.as_ref().into())).collect()
    }

    async fn invite(&self, room_id: &RoomId, invite: Outgoing) -> Result<Made, Refusal> {
        Ok(Self::invite(self, room_id, invite).await?.as_ref().into())
    }

    async fn check(&self, room_id: &RoomId, draft: &Draft) -> Result<(), Refusal> {
        Self::check(self, room_id, draft).await
    }
}

#[async_trait]
impl Rooms for Lm {
    async fn event(&self, event_id: &EventId) -> Result<Option<Event>, Refusal> {
        Ok(Self::event(self, event_id).await?.as_ref().map(Event::from))
    }

    async fn state(&self, room_id: &RoomId) -> Result<State, Refusal> {
        Ok(State::Log(Self::state(self, room_id).await?))
    }

    async fn pick(&self, room_id: &RoomId, keys: &[Key]) -> Result<State, Refusal> {
        Ok(State::Log(self.state_events(room_id, keys).await?))
    }

    async fn send(&self, room_id: &RoomId, events: Vec<Outgoing>) -> Vec<Result<Made, Refusal>> {
        let sent = Self::send(self, room_id, events).await;
        sent.into_iter().map(|result| result.map(Made::from)).collect()
    }

    async fn invite(&self, room_id: &RoomId, invite: Outgoing) -> Result<Made, Refusal> {
        Self::invite(self, room_id, invite).await.map(Made::from)
    }

    async fn check(&self, room_id: &RoomId, draft: &Draft) -> Result<(), Refusal> {
        Self::check(self, room_id, draft).await
    }
}

impl From<&GraphEvent> for Made {
    fn from(event: &GraphEvent) -> Self {
        Self { event_id: event.event_id.clone() }
    }
}

impl From<Sent> for Made {
    fn from(sent: Sent) -> Self {
        match sent {
            Sent::Appended(Appended { event, .. }) => Self { event_id: event.event_id.clone() },
            Sent::Queued { lpdu_id } => Self { event_id: lpdu_id },
        }
    }
}

/// Both sides, as the bridge holds them.
#[derive(Clone)]
pub(super) struct Sides {
    pub(super) lm: Lm,
    pub(super) dag: Dag,
}

impl Sides {
    pub(super) fn rooms(&self, side: Side) -> &dyn Rooms {
        match side {
            Side::Matrix => &self.dag,
            Side::Lm => &self.lm,
        }
    }
}
