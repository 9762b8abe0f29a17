//! Questions to other homeservers, and the public directory.

use ruma::{OwnedServerName, ServerName};
use serde_json::{Value, json};

use super::Dag;
use super::fetch::segment;
use super::room::Room;
use crate::event::Object;
use crate::federation::Call;
use crate::refusal::Refusal;
use crate::seam::AliasTarget;
use crate::store::dag::listed_rooms;

/// How many rooms a page of the public directory has at most.
const MAX_ROOMS: i64 = 500;
/// How many servers are taken from a directory's answer.
const MAX_SERVERS: usize = 20;

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

    /// `GET` and `POST v1/publicRooms`: the rooms that are listed.
    pub async fn public_rooms(&self, limit: Option<i64>, since: Option<&str>) -> Result<Value, Refusal> {
        let limit = limit.unwrap_or(MAX_ROOMS).clamp(0, MAX_ROOMS);
        let rows = listed_rooms(&self.shared.context.store, since.unwrap_or_default(), limit).await?;
        let full = i64::try_from(rows.len()).is_ok_and(|count| count == limit && count > 0);
        let next = rows.last().filter(|_| full).map(|row| row.room_id.clone());
        let mut chunk = Vec::new();
        for row in rows {
            let room = self.shared.room(&row.room_id).await?;
            chunk.push(self.listing(&room).await?);
        }
        let mut answer = json!({ "total_room_count_estimate": chunk.len(), "chunk": chunk });
        if let (Some(next), Some(answer)) = (next, answer.as_object_mut()) {
            answer.insert("next_batch".to_owned(), json!(next));
        }
        Ok(answer)
    }

    async fn listing(&self, room: &Room) -> Result<Value, Refusal> {
        let name = self.content_field(room, "m.room.name", "name").await?;
        let topic = self.content_field(room, "m.room.topic", "topic").await?;
        let avatar = self.content_field(room, "m.room.avatar", "url").await?;
        let alias = self.content_field(room, "m.room.canonical_alias", "alias").await?;
        let rule = self.content_field(room, "m.room.join_rules", "join_rule").await?;
        let visibility = self.content_field(room, "m.room.history_visibility", "history_visibility").await?;
        let guests = self.content_field(room, "m.room.guest_access", "guest_access").await?;
        let mut listing = json!({
            "room_id": room.room_id,
            "num_joined_members": room.core().joined.len(),
            "world_readable": visibility.as_deref() == Some("world_readable"),
            "guest_can_join": guests.as_deref() == Some("can_join"),
        });
        let optional =
            [("name", name), ("topic", topic), ("avatar_url", avatar), ("canonical_alias", alias), ("join_rule", rule)];
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
