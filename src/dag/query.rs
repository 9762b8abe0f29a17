//! Questions to other homeservers, and the public directory.

use std::sync::Arc;

use ruma::{OwnedRoomId, OwnedServerName, RoomId, ServerName};
use serde_json::{Value, json};

use super::fetch::segment;
use super::room::Room;
use super::{Dag, GraphEvent};
use crate::event::Object;
use crate::federation::Call;
use crate::refusal::Refusal;
use crate::seam::AliasTarget;
use crate::store::dag::listed_rooms;

/// How many rooms a page of the public directory has at most, and how many are looked at for it.
const MAX_ROOMS: i64 = 500;
/// How many of them are loaded for it, of those of which it is not known how they are listed.
const MAX_LOADED: usize = 50;
/// The type by which a space names its rooms.
const CHILD: &str = "m.space.child";
/// How many servers are taken from a directory's answer.
const MAX_SERVERS: usize = 20;

/// What another server asks of the public directory.
#[derive(Debug, Clone, Default)]
pub struct DirectoryQuery {
    /// How many rooms at most.
    pub limit: Option<i64>,
    /// The `next_batch` of the page before.
    pub since: Option<String>,
    /// What the name, the topic or the alias must hold.
    pub term: Option<String>,
    /// The types that are wanted; none of them is that of rooms without a type.
    pub room_types: Option<Vec<Option<String>>>,
}

/// Whether anybody may come in, or ask to.
fn is_open(rule: &str) -> bool {
    matches!(rule, "public" | "knock" | "knock_restricted")
}

impl DirectoryQuery {
    fn wants(&self, listing: &Value) -> bool {
        let text = |key: &str| listing.get(key).and_then(Value::as_str);
        let holds = |term: &str| {
            let texts = ["name", "topic", "canonical_alias"].into_iter().filter_map(text);
            term.is_empty() || texts.into_iter().any(|text| text.to_lowercase().contains(term))
        };
        self.term.as_ref().is_none_or(|term| holds(&term.to_lowercase()))
            && self
                .room_types
                .as_ref()
                .is_none_or(|types| types.iter().any(|kind| kind.as_deref() == text("room_type")))
    }
}

impl Dag {
    /// Asks `server` where an alias leads.
    pub async fn query_directory(&self, server: &ServerName, alias: &str) -> Result<AliasTarget, Refusal> {
        let uri = format!("/_matrix/federation/v1/query/directory?room_alias={}", segment(alias));
        let answer = self.ask(server, uri).await?;
        let room_id = answer.get("room_id").and_then(Value::as_str).unwrap_or_default();
        let room_id = room_id.try_into().map_err(|_| Refusal::malformed("room_id", room_id))?;
        let servers = answer.get("servers").and_then(Value::as_array).into_iter().flatten();
        let servers: Vec<OwnedServerName> =
            servers.filter_map(|server| server.as_str()?.try_into().ok()).take(MAX_SERVERS).collect();
        Ok(AliasTarget { room_id, servers })
    }

    async fn ask(&self, server: &ServerName, uri: String) -> Result<Object, Refusal> {
        let client = &self.shared.context.client;
        client.call(server, Call::get(uri), false).await.map_err(|error| error.into_refusal(server))
    }

    /// `GET` and `POST v1/publicRooms`: of the rooms that are listed those that anybody may join or ask to join now.
    pub async fn public_rooms(&self, asked: &DirectoryQuery) -> Result<Value, Refusal> {
        let limit = usize::try_from(asked.limit.unwrap_or(MAX_ROOMS).clamp(0, MAX_ROOMS)).unwrap_or(0);
        let since = asked.since.as_deref().unwrap_or_default();
        let rooms = listed_rooms(&self.shared.context.store, since, MAX_ROOMS).await?;
        let mut more = i64::try_from(rooms.len()).is_ok_and(|count| count == MAX_ROOMS);
        let (mut chunk, mut last, mut loaded) = (Vec::new(), None, 0_usize);
        for room_id in rooms {
            let known = self.shared.listings.get(&room_id).await;
            if chunk.len() == limit || (known.is_none() && loaded == MAX_LOADED) {
                more = true;
                break;
            }
            let listing = match known {
                Some(listing) => listing,
                None => {
                    loaded = loaded.saturating_add(1);
                    self.list(&room_id).await?
                }
            };
            chunk.extend(listing.filter(|listing| asked.wants(listing)).map(|listing| Value::clone(&listing)));
            last = Some(room_id);
        }
        let mut answer = json!({ "total_room_count_estimate": chunk.len(), "chunk": chunk });
        if let (true, Some(last), Some(answer)) = (more, last, answer.as_object_mut()) {
            answer.insert("next_batch".to_owned(), json!(last));
        }
        Ok(answer)
    }

    /// How a room is listed, from now on until its state changes.
    async fn list(&self, room_id: &RoomId) -> Result<Option<Arc<Value>>, Refusal> {
        let room = self.shared.room(room_id).await?;
        let state = room.core().current.id;
        let listing = self.listing(&room).await?.map(Arc::new);
        self.shared.listings.insert(room_id.to_owned(), listing.clone()).await;
        if room.core().current.id != state {
            self.shared.listings.invalidate(room_id).await;
        }
        Ok(listing)
    }

    async fn listing(&self, room: &Room) -> Result<Option<Value>, Refusal> {
        let rule = self.content_field(room, "m.room.join_rules", "join_rule").await?;
        match rule.as_deref().is_some_and(is_open) {
            true => self.described(room, rule).await.map(Some),
            false => Ok(None),
        }
    }

    /// `GET v1/hierarchy/{roomId}`: what a server may know of a room, and if that is a space, of the rooms of it that are here.
    /// <https://spec.matrix.org/v1.17/server-server-api/#get_matrixfederationv1hierarchyroomid>
    pub async fn hierarchy(&self, origin: &ServerName, room_id: &RoomId, suggested: bool) -> Result<Value, Refusal> {
        let unknown = || Refusal::NotFound(format!("the room {room_id}"));
        let room = self.shared.find(room_id).await?.ok_or_else(unknown)?;
        let mut summary = self.summary(origin, &room).await?.ok_or_else(unknown)?;
        let (mut children, mut inaccessible, mut named) = (Vec::new(), Vec::new(), Vec::new());
        for (child, event) in self.children(&room).await? {
            let is_suggested = event.content.get("suggested").and_then(Value::as_bool).unwrap_or(false);
            if suggested && !is_suggested {
                continue;
            }
            named.push(json!({
                "type": event.kind, "state_key": child, "content": event.content, "sender": event.sender,
                "origin_server_ts": event.origin_server_ts,
            }));
            if children.len() >= MAX_LOADED {
                // Whoever asks for it by itself is told.
                continue;
            }
            let Some(child) = self.shared.find(&child).await? else { continue };
            match self.summary(origin, &child).await? {
                Some(summary) => children.push(summary),
                None => inaccessible.push(child.room_id.clone()),
            }
        }
        summary["children_state"] = json!(named);
        Ok(json!({ "room": summary, "children": children, "inaccessible_children": inaccessible }))
    }

    /// The rooms that a space names, by its current state.
    async fn children(&self, room: &Room) -> Result<Vec<(OwnedRoomId, Arc<GraphEvent>)>, Refusal> {
        if self.content_field(room, "m.room.create", "type").await?.as_deref() != Some("m.space") {
            return Ok(Vec::new());
        }
        let state = self.state(&room.room_id).await?;
        let children = state.range((CHILD.to_owned(), String::new())..).take_while(|((kind, _), _)| kind == CHILD);
        let held = children.filter(|(_, event)| event.content.get("via").is_some_and(Value::is_array));
        Ok(held.filter_map(|((_, room), event)| Some((RoomId::parse(room.as_str()).ok()?, event.clone()))).collect())
    }

    /// What a server may know of a room: everything of one that anybody may come into or look into, or that its users are in.
    async fn summary(&self, origin: &ServerName, room: &Room) -> Result<Option<Value>, Refusal> {
        let rule = self.content_field(room, "m.room.join_rules", "join_rule").await?;
        let visibility = self.content_field(room, "m.room.history_visibility", "history_visibility").await?;
        let is_told = rule.as_deref().is_some_and(is_open)
            || visibility.as_deref() == Some("world_readable")
            || room.core().has_server(origin);
        if !is_told {
            return Ok(None);
        }
        let mut summary = self.described(room, rule).await?;
        summary["room_version"] = json!(room.version.as_str());
        summary["children_state"] = json!([]);
        Ok(Some(summary))
    }

    /// What the directory says of a room.
    async fn described(&self, room: &Room, rule: Option<String>) -> Result<Value, Refusal> {
        let name = self.content_field(room, "m.room.name", "name").await?;
        let topic = self.content_field(room, "m.room.topic", "topic").await?;
        let avatar = self.content_field(room, "m.room.avatar", "url").await?;
        let alias = self.content_field(room, "m.room.canonical_alias", "alias").await?;
        let kind = self.content_field(room, "m.room.create", "type").await?;
        let visibility = self.content_field(room, "m.room.history_visibility", "history_visibility").await?;
        let guests = self.content_field(room, "m.room.guest_access", "guest_access").await?;
        let mut listing = json!({
            "room_id": room.room_id,
            "num_joined_members": room.core().joined.len(),
            "world_readable": visibility.as_deref() == Some("world_readable"),
            "guest_can_join": guests.as_deref() == Some("can_join"),
        });
        let optional = [
            ("name", name),
            ("topic", topic),
            ("avatar_url", avatar),
            ("canonical_alias", alias),
            ("join_rule", rule),
            ("room_type", kind),
        ];
        for (key, value) in optional {
            if let (Some(value), Some(listing)) = (value, listing.as_object_mut()) {
                listing.insert(key.to_owned(), json!(value));
            }
        }
        Ok(listing)
    }

    async fn content_field(&self, room: &Room, kind: &str, field: &str) -> Result<Option<String>, Refusal> {
        let core = room.core();
        let Some(id) = core.current.get(kind, "") else { return Ok(None) };
        let content = self.shared.events.get(id).await?.map(|event| event.content()).unwrap_or_default();
        Ok(content.get(field).and_then(Value::as_str).map(str::to_owned))
    }
}
