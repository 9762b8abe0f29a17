//! What anybody may know of, and come into: the rooms of the public directory.

use ruma::UserId;
use serde_json::Value;

use super::admin;
use super::core::Core;
use crate::dag::DirectoryQuery;
use crate::identity::Side;
use crate::refusal::Refusal;

/// A room of the public directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The Matrix room's ID.
    pub room_id: String,
    /// Its alias, when it has one.
    pub alias: Option<String>,
    /// Its name.
    pub name: Option<String>,
    /// How many members it has.
    pub members: u64,
    /// Its join rule.
    pub join_rule: Option<String>,
}

/// The rooms of the public directory.
pub(super) async fn listed(core: &Core, limit: usize) -> Result<Vec<Listed>, Refusal> {
    let query = DirectoryQuery { limit: Some(i64::try_from(limit).unwrap_or(i64::MAX)), ..DirectoryQuery::default() };
    let answer = core.sides()?.dag.public_rooms(&query).await?;
    let rooms = answer.get("chunk").and_then(Value::as_array).into_iter().flatten();
    Ok(rooms.map(room).collect())
}

fn room(listing: &Value) -> Listed {
    let text = |key: &str| listing.get(key).and_then(Value::as_str).map(str::to_owned);
    Listed {
        room_id: text("room_id").unwrap_or_default(),
        alias: text("canonical_alias"),
        name: text("name"),
        members: listing.get("num_joined_members").and_then(Value::as_u64).unwrap_or_default(),
        join_rule: text("join_rule"),
    }
}

/// Invites a user into the Matrix room of a portal that anybody may join. Into all others only an admin lets people.
pub(super) async fn invite_if_public(core: &Core, portal_id: &str, user: &UserId) -> Result<bool, Refusal> {
    let portal = admin::entry(core, portal_id).await?.portal();
    let state = core.sides()?.rooms(Side::Matrix).state(&portal.matrix_room_id).await?;
    let rule = state.content("m.room.join_rules").and_then(|content| content.get("join_rule"));
    if rule.and_then(Value::as_str) != Some("public") {
        return Ok(false);
    }
    admin::invite(core, portal_id, user, Some(Side::Matrix)).await.map(|()| true)
}
