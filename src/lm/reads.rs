//! What the gateway itself reads of its LM rooms.

use std::collections::BTreeSet;
use std::sync::Arc;

use ruma::{EventId, OwnedEventId, OwnedServerName, RoomId, ServerName};
use serde_json::Value;

use super::room::Snapshot;
use super::rooms::{RoomCell, stored_pdu};
use super::{Appended, Lm, Part, Position, Role, Room, State};
use crate::event::Pdu;
use crate::refusal::Refusal;
use crate::seam::Draft;
use crate::store::lm::{self as stored, EventRow};

/// How many complaints about a hub are shown.
const COMPLAINTS: i64 = 20;
/// How many events of a log are read at once.
const LOG: i64 = 1000;

impl Lm {
    /// Whether this room is on the linear side here.
    pub async fn knows(&self, room_id: &RoomId) -> Result<bool, Refusal> {
        Ok(self.rooms().contains(room_id).await?)
    }

    /// Whether this room is being joined. Until that is done it has nothing but a name, which some hub gave it.
    pub fn is_joining(&self, room_id: &RoomId) -> bool {
        self.joining().contains(room_id)
    }

    /// What is known of a room; none when the gateway is not in it.
    pub async fn room(&self, room_id: &RoomId) -> Result<Option<Room>, Refusal> {
        let Some(cell) = self.rooms().find(room_id).await? else { return Ok(None) };
        let snapshot = cell.snapshot(&self.context().store).await?;
        let role = self.role(&snapshot);
        let complaints = match role {
            Role::Hub | Role::GraphServer { .. } => Vec::new(),
            Role::Participant { .. } => stored::complaints(&self.context().store, room_id, COMPLAINTS).await?,
        };
        Ok(Some(Room {
            room_id: room_id.to_owned(),
            version: snapshot.facts.version,
            role,
            head: Position(snapshot.head),
            complaints,
        }))
    }

    /// Whether the LM rules would let `draft` in at the end of the log as it is now.
    pub async fn check(&self, room_id: &RoomId, draft: &Draft) -> Result<(), Refusal> {
        let (_, snapshot) = self.find(room_id).await?;
        self.allow_draft(&snapshot, draft).map(drop)
    }

    /// The current state of a room.
    pub async fn state(&self, room_id: &RoomId) -> Result<State, Refusal> {
        let (_, snapshot) = self.find(room_id).await?;
        Ok(snapshot.state().clone())
    }

    /// One event of the current state.
    pub async fn state_event(
        &self,
        room_id: &RoomId,
        kind: &str,
        state_key: &str,
    ) -> Result<Option<Arc<Pdu>>, Refusal> {
        let (_, snapshot) = self.find(room_id).await?;
        Ok(snapshot.state_event(kind, state_key).cloned())
    }

    /// Those of the current state's events that have one of these types and state keys: costs the same however large the
    /// room.
    pub async fn state_events(&self, room_id: &RoomId, keys: &[(String, String)]) -> Result<State, Refusal> {
        let (_, snapshot) = self.find(room_id).await?;
        let mut found = State::default();
        for event in keys.iter().filter_map(|(kind, state_key)| snapshot.state_event(kind, state_key)) {
            found.insert(event);
        }
        Ok(found)
    }

    /// The servers of the users who are joined now.
    pub async fn joined_servers(&self, room_id: &RoomId) -> Result<Vec<OwnedServerName>, Refusal> {
        let (_, snapshot) = self.find(room_id).await?;
        Ok(snapshot.servers().cloned().collect())
    }

    /// The same, in a room that LM servers and graph servers share, by how they take part: those that do by its log, and those that do by
    /// its graph. In other rooms all do by the log. The hub does by both.
    pub async fn servers_by_part(
        &self,
        room_id: &RoomId,
    ) -> Result<(Vec<OwnedServerName>, Vec<OwnedServerName>), Refusal> {
        let (_, room) = self.find(room_id).await?;
        let mut by_graph = BTreeSet::new();
        if room.facts.shared || room.says_shared() {
            for user in room.members("join") {
                let server = user.server_name();
                let member = room.state_event("m.room.member", user.as_str());
                if *server == *room.facts.hub || member.is_some_and(|event| event.hub_server.is_none()) {
                    by_graph.insert(server);
                }
            }
        }
        Ok(room.servers().cloned().partition(|server| !by_graph.contains(&**server)))
    }

    /// How a server takes part in a shared room; none when it has nobody there.
    pub async fn part_in(&self, room_id: &RoomId, server: &ServerName) -> Result<Option<Part>, Refusal> {
        let (by_log, by_graph) = self.servers_by_part(room_id).await?;
        let is_among = |servers: &[OwnedServerName]| servers.iter().any(|other| other == server);
        let by_log = is_among(&by_log).then_some(Part::Log);
        Ok(by_log.or_else(|| is_among(&by_graph).then_some(Part::Graph)))
    }

    /// One event, with its place.
    pub async fn event(&self, event_id: &EventId) -> Result<Option<Appended>, Refusal> {
        if let Some(event) = self.inner.events.get(event_id).await {
            self.inner.events_meter.looked_up(1, 0);
            return Ok(Some(event));
        }
        self.inner.events_meter.looked_up(0, 1);
        let row = stored::event(&self.context().store, event_id).await?;
        self.appended(row).await
    }

    /// The event whose LPDU has this ID, once it is in the log.
    pub async fn event_of_lpdu(&self, lpdu_id: &EventId) -> Result<Option<Appended>, Refusal> {
        let row = stored::event_of_lpdu(&self.context().store, lpdu_id).await?;
        self.appended(row).await
    }

    /// A stretch of the log from `from` on; at most 1,000 events.
    pub async fn log(&self, room_id: &RoomId, from: Position, limit: i64) -> Result<Vec<Appended>, Refusal> {
        let (_, snapshot) = self.find(room_id).await?;
        let limit = limit.clamp(0, LOG);
        let rows = stored::range(&self.context().store, room_id, from.0, snapshot.head, limit).await?;
        let rows = self.as_read(&snapshot, rows).await?;
        rows.into_iter().map(|row| from_row(row, &snapshot)).collect()
    }

    async fn appended(&self, row: Option<EventRow>) -> Result<Option<Appended>, Refusal> {
        let Some(row) = row else { return Ok(None) };
        let (cell, snapshot) = self.find(&row.room_id.clone()).await?;
        let redactions = cell.redactions();
        let Some(row) = self.as_read(&snapshot, vec![row]).await?.pop() else { return Ok(None) };
        let event = from_row(row, &snapshot)?;
        self.remember(&event).await;
        if cell.redactions() != redactions {
            self.forget_events(&[Pdu::clone(&event.event)]).await;
        }
        Ok(Some(event))
    }

    /// Keeps an event that will be asked for soon.
    pub(super) async fn remember(&self, event: &Appended) {
        self.inner.events.insert(event.event.event_id.clone(), event.clone()).await;
    }

    /// A room that must be known, as it is now.
    pub(super) async fn find(&self, room_id: &RoomId) -> Result<(Arc<RoomCell>, Arc<Snapshot>), Refusal> {
        let cell = self.rooms().find(room_id).await?;
        let cell = cell.ok_or_else(|| Refusal::UnknownRoom(room_id.to_string()))?;
        let snapshot = cell.snapshot(&self.context().store).await?;
        if snapshot.facts.shared && cell.was_read() && snapshot.facts.hub != self.context().server_name {
            self.tell_graph(room_id);
        }
        Ok((cell, snapshot))
    }

    pub(super) fn role(&self, room: &Snapshot) -> Role {
        match &room.facts.hub {
            hub if *hub == self.context().server_name => Role::Hub,
            hub if room.facts.shared => Role::GraphServer { hub: hub.clone() },
            hub => Role::Participant { hub: hub.clone() },
        }
    }
}

pub(super) fn from_row(row: EventRow, room: &Snapshot) -> Result<Appended, Refusal> {
    let position = Position(row.position);
    Ok(Appended { event: Arc::new(stored_pdu(row, room.redaction)?), position })
}

/// How many events an event counts as: large ones as several, so that the cache is bounded in bytes too.
pub(super) fn weight(_: &OwnedEventId, event: &Appended) -> u32 {
    let bytes = event.event.json.iter().fold(0_usize, |sum, (key, value)| sum.saturating_add(entry(key, value)));
    u32::try_from(bytes / PLAIN_EVENT).unwrap_or(u32::MAX).saturating_add(1)
}

/// About how much memory an event may take that counts as one.
const PLAIN_EVENT: usize = 8192;
/// About how much memory each value takes beside its text.
const VALUE: usize = 64;

fn entry(key: &str, value: &Value) -> usize {
    key.len().saturating_add(VALUE).saturating_add(size(value))
}

/// About how much memory what is in a value takes: of many short ones more than their text.
fn size(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(values) => {
            values.iter().fold(0, |sum, value| sum.saturating_add(VALUE).saturating_add(size(value)))
        }
        Value::Object(object) => object.iter().fold(0, |sum, (key, value)| sum.saturating_add(entry(key, value))),
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::identity::SigningKey;

    #[test]
    fn a_large_event_counts_as_many() {
        let weight_of = |content: Value| {
            let key = SigningKey::generate();
            let template = json!({ "type": "m.x", "room_id": "!a:g.example", "sender": "@a:g.example", "content": content,
                "origin_server_ts": 1 });
            let template = template.as_object().cloned().unwrap_or_default();
            let server = ruma::server_name!("g.example");
            let completion = crate::event::Completion { auth_events: Vec::new(), prev_event: None };
            let event = crate::event::Pdu::build(template, completion, server, &key).unwrap();
            weight(&event.event_id.clone(), &Appended { event: Arc::new(event), position: Position(0) })
        };
        assert_eq!(weight_of(json!({ "body": "hello", "msgtype": "m.text" })), 1);
        assert!((6..10).contains(&weight_of(json!({ "body": "x".repeat(60_000) }))));
        // Short values take more than their text: 60 KB of these are some 2 MB.
        assert!(weight_of(json!({ "values": vec![0; 30_000] })) > 200);
    }
}
