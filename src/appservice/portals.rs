//! What the appservice asks of the bridge: narrow, so that it can be tested without one.

use std::sync::Arc;

use async_trait::async_trait;
use ruma::{RoomId, UserId};

use crate::bridge::{Bridge, Cause, Portal};
use crate::refusal::Refusal;
use crate::seam::AliasTarget;
use crate::store::Store;
use crate::store::portals;

/// The portals.
#[async_trait]
pub(super) trait Portals: Send + Sync + 'static {
    /// Where a localpart leads; makes the portal when that is allowed.
    async fn resolve_alias(&self, localpart: &str) -> Result<AliasTarget, Refusal>;

    /// Why a localpart led nowhere when it was last asked for, not long ago.
    async fn why_not(&self, localpart: &str) -> Option<Refusal>;

    /// Invites a user of the homeserver into the portal of a Matrix room.
    async fn invite(&self, room_id: &RoomId, user_id: &UserId) -> Result<(), Refusal>;

    /// Takes that invite back; nothing when the portal is gone.
    async fn withdraw_invite(&self, room_id: &RoomId, user_id: &UserId) -> Result<(), Refusal>;

    /// Invites a user into a portal.
    async fn invite_into(&self, portal_id: &str, user_id: &UserId) -> Result<(), Refusal>;

    /// The first portals, at most `limit`.
    async fn first(&self, limit: usize) -> Result<Vec<Arc<Portal>>, Refusal>;
}

/// The bridge's portals.
pub(super) struct OfBridge {
    pub(super) bridge: Bridge,
    pub(super) store: Store,
}

impl OfBridge {
    async fn portal_of(&self, room_id: &RoomId) -> Result<String, Refusal> {
        match portals::number_of_matrix_room(&self.store, room_id).await? {
            Some(number) => Ok(format!("p{number}")),
            None => Err(Refusal::UnknownRoom(room_id.to_string())),
        }
    }
}

#[async_trait]
impl Portals for OfBridge {
    async fn resolve_alias(&self, localpart: &str) -> Result<AliasTarget, Refusal> {
        self.bridge.resolve_alias(localpart, Cause::Appservice).await
    }

    async fn why_not(&self, localpart: &str) -> Option<Refusal> {
        self.bridge.why_not(localpart).await
    }

    async fn invite(&self, room_id: &RoomId, user_id: &UserId) -> Result<(), Refusal> {
        self.bridge.invite(&self.portal_of(room_id).await?, user_id).await
    }

    async fn withdraw_invite(&self, room_id: &RoomId, user_id: &UserId) -> Result<(), Refusal> {
        match self.portal_of(room_id).await {
            Ok(portal_id) => self.bridge.withdraw_invite(&portal_id, user_id).await,
            Err(Refusal::UnknownRoom(_)) => Ok(()),
            Err(refusal) => Err(refusal),
        }
    }

    async fn invite_into(&self, portal_id: &str, user_id: &UserId) -> Result<(), Refusal> {
        self.bridge.invite(portal_id, user_id).await
    }

    async fn first(&self, limit: usize) -> Result<Vec<Arc<Portal>>, Refusal> {
        Ok(self.bridge.open_portals(limit))
    }
}
