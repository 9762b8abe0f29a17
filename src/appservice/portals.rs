//! What the appservice asks of the bridge: narrow, so that it can be tested without one.

use std::sync::Arc;

use async_trait::async_trait;
use ruma::{EventId, OwnedUserId, RoomId, ServerName, UserId};

use crate::bridge::{Bridge, Cause, Explanation, Health, Listed, Portal};
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::seam::AliasTarget;
use crate::store::Store;
use crate::store::portals;

/// The portals.
#[async_trait]
pub(super) trait Portals: Send + Sync + 'static {
    /// Where a localpart leads; makes the portal when that is allowed.
    async fn resolve_alias(&self, localpart: &str) -> Result<AliasTarget, Refusal>;

    /// Where a localpart leads by the portals that are there: nobody is asked, and nothing is made.
    fn known_alias(&self, localpart: &str) -> Option<AliasTarget>;

    /// Why a localpart led nowhere when it was last asked for, not long ago.
    async fn why_not(&self, localpart: &str) -> Option<Refusal>;

    /// Invites a user of the homeserver into the portal of a Matrix room.
    async fn invite(&self, room_id: &RoomId, user_id: &UserId) -> Result<(), Refusal>;

    /// The same if anybody may join that room: whether the user is invited now.
    async fn invite_if_public(&self, room_id: &RoomId, user_id: &UserId) -> Result<bool, Refusal>;

    /// Takes that invite back; nothing when the portal is gone.
    async fn withdraw_invite(&self, room_id: &RoomId, user_id: &UserId) -> Result<(), Refusal>;

    /// Invites a user into a portal.
    async fn invite_into(&self, portal_id: &str, user_id: &UserId) -> Result<(), Refusal>;

    /// Makes a portal of a Matrix room, for an admin.
    async fn expose(&self, room_id: &RoomId, via: &ServerName) -> Result<Arc<Portal>, Refusal>;

    /// The first portals that have not ended, at most `limit`.
    async fn first(&self, limit: usize) -> Result<Vec<Arc<Portal>>, Refusal>;

    /// The rooms of the public directory, at most `limit`.
    async fn listed(&self, limit: usize) -> Result<Vec<Listed>, Refusal>;

    /// A portal, and how it is doing.
    async fn show(&self, portal_id: &str) -> Result<(Arc<Portal>, Health), Refusal>;

    /// The ID of the portal of a Matrix room.
    async fn of_room(&self, room_id: &RoomId) -> Result<String, Refusal>;

    /// Ends a portal. What was begun is finished, also when nobody waits for it any more.
    async fn end(&self, portal_id: &str, by: &UserId) -> Result<(), Refusal>;

    /// Where an event is on both sides.
    async fn explain(&self, event_id: &EventId) -> Result<Option<Explanation>, Refusal>;

    /// The ghost of an LM user on Matrix.
    async fn ghost_of(&self, user: &UserId) -> Result<Option<OwnedUserId>, Refusal>;

    /// The LM user whose ghost on Matrix this is.
    async fn user_behind(&self, ghost: &UserId) -> Result<Option<OwnedUserId>, Refusal>;
}

/// The bridge's portals.
pub(super) struct OfBridge {
    pub(super) bridge: Bridge,
    pub(super) store: Store,
}

#[async_trait]
impl Portals for OfBridge {
    async fn resolve_alias(&self, localpart: &str) -> Result<AliasTarget, Refusal> {
        self.bridge.resolve_alias(localpart, Cause::Appservice).await
    }

    fn known_alias(&self, localpart: &str) -> Option<AliasTarget> {
        self.bridge.known_alias(localpart)
    }

    async fn why_not(&self, localpart: &str) -> Option<Refusal> {
        self.bridge.why_not(localpart).await
    }

    async fn invite(&self, room_id: &RoomId, user_id: &UserId) -> Result<(), Refusal> {
        self.bridge.invite(&self.of_room(room_id).await?, user_id).await
    }

    async fn invite_if_public(&self, room_id: &RoomId, user_id: &UserId) -> Result<bool, Refusal> {
        self.bridge.invite_if_public(&self.of_room(room_id).await?, user_id).await
    }

    async fn withdraw_invite(&self, room_id: &RoomId, user_id: &UserId) -> Result<(), Refusal> {
        match self.of_room(room_id).await {
            Ok(portal_id) => self.bridge.withdraw_invite(&portal_id, user_id).await,
            Err(Refusal::UnknownRoom(_)) => Ok(()),
            Err(refusal) => Err(refusal),
        }
    }

    async fn invite_into(&self, portal_id: &str, user_id: &UserId) -> Result<(), Refusal> {
        self.bridge.invite(portal_id, user_id).await
    }

    async fn expose(&self, room_id: &RoomId, via: &ServerName) -> Result<Arc<Portal>, Refusal> {
        self.bridge.portal_from_matrix(room_id, &[via.to_owned()], None, Cause::Admin).await
    }

    async fn first(&self, limit: usize) -> Result<Vec<Arc<Portal>>, Refusal> {
        Ok(self.bridge.open_portals(limit))
    }

    async fn listed(&self, limit: usize) -> Result<Vec<Listed>, Refusal> {
        self.bridge.listed(limit).await
    }

    async fn show(&self, portal_id: &str) -> Result<(Arc<Portal>, Health), Refusal> {
        let portal = self.bridge.portal(portal_id).await?;
        let portal = portal.ok_or_else(|| Refusal::NotFound(format!("the portal {portal_id}")))?;
        Ok((portal, self.bridge.health(portal_id).await?))
    }

    async fn of_room(&self, room_id: &RoomId) -> Result<String, Refusal> {
        match portals::number_of_matrix_room(&self.store, room_id).await? {
            Some(number) => Ok(format!("p{number}")),
            None => Err(Refusal::UnknownRoom(room_id.to_string())),
        }
    }

    async fn end(&self, portal_id: &str, by: &UserId) -> Result<(), Refusal> {
        self.bridge.remove_portal(portal_id, &format!("it was ended by {by}")).await.map(drop)
    }

    async fn explain(&self, event_id: &EventId) -> Result<Option<Explanation>, Refusal> {
        self.bridge.explain(event_id).await
    }

    async fn ghost_of(&self, user: &UserId) -> Result<Option<OwnedUserId>, Refusal> {
        self.bridge.ghost_of(user, Side::Lm).await
    }

    async fn user_behind(&self, ghost: &UserId) -> Result<Option<OwnedUserId>, Refusal> {
        self.bridge.user_behind(ghost).await
    }
}
