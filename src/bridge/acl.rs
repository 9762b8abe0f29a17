//! `m.room.server_acl` of both rooms of a portal applies to the server behind an image too: the gateway's own name, under which
//! images come, would let in whom a room keeps out.

use std::sync::Arc;

use moka::future::Cache;
use ruma::{OwnedEventId, UserId};

use super::core::Core;
use super::loops;
use super::side::{Event, State};
use crate::dag::Acl;
use crate::refusal::Refusal;

/// The type of access control lists.
pub(super) const SERVER_ACL: &str = "m.room.server_acl";

/// Parsed lists, by their event.
pub(super) type Acls = Cache<OwnedEventId, Arc<Acl>>;

/// An empty cache of parsed lists.
pub(super) fn acls(rooms: u64) -> Acls {
    Cache::new(rooms)
}

/// The list of a room with this state.
pub(super) async fn of(core: &Core, state: &State) -> Option<Arc<Acl>> {
    let entry = state.get(SERVER_ACL, "")?;
    if let Some(acl) = core.acls.get(entry.event_id).await {
        return Some(acl);
    }
    let acl = Arc::new(Acl::parse(entry.content));
    core.acls.insert(entry.event_id.to_owned(), acl.clone()).await;
    Some(acl)
}

/// Whether both rooms let a user's server take part, and nobody carries back what the user does.
pub(super) async fn both(core: &Core, near: &State, far: &State, user: &UserId) -> Result<(), Refusal> {
    let server = user.server_name();
    for state in [near, far] {
        if of(core, state).await.is_some_and(|acl| !acl.allows(server)) {
            return Err(Refusal::ServerAcl(server.to_string()));
        }
    }
    loops::crosses(near, far, user)
}

/// Whether an event may cross, as far as its sender's server goes. Leaving is always possible.
pub(super) async fn crosses(core: &Core, near: &State, far: &State, event: &Event) -> Result<(), Refusal> {
    if event.membership().is_some_and(|(target, membership)| membership == "leave" && target == event.sender) {
        return Ok(());
    }
    both(core, near, far, &event.sender).await
}
