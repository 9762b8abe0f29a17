//! Leaves that are owed on this side ([`crate::seam::OwedLeaves`]): how a user leaves a room again through a server that may have taken
//! a join of theirs which was of no use here.

use std::sync::Arc;

use async_trait::async_trait;
use ruma::{OwnedUserId, RoomId};

use super::Dag;
use crate::event::Object;
use crate::refusal::Refusal;
use crate::seam::{Leaver, Membership, OwedLeave, OwedLeaves};
use crate::store::StoreError;
use crate::store::dag::remove_invite;

impl Dag {
    /// Somebody may have to leave.
    pub(super) fn leave_soon(&self) {
        let shared = Arc::downgrade(&self.shared);
        self.shared.owed.attend(move || shared.upgrade().map(|shared| Self { shared }));
    }

    /// Has those who are to leave again do so, and tries it again, so many times sooner: for tests.
    pub fn hasten_leaves(&self, times: u32) {
        self.shared.owed.hasten(times);
    }

    /// Has a user leave who is not in the room as it is here. By the server's template even where we are in the room: a leave that
    /// stands on what is here would not follow the join.
    async fn leave_again(&self, leave: &OwedLeave) -> Result<(), Refusal> {
        let OwedLeave { server, room_id, user_id, version, .. } = leave;
        if self.has_joined(room_id, user_id).await? {
            return Ok(());
        }
        let mut wish = self.wish(room_id, user_id, Membership::Leave, Object::new())?;
        wish.versions = version.map_or(wish.versions, |version| vec![version]);
        let made = self.make_at(server, &wish).await;
        // Where we are in the room they may have come in meanwhile.
        if self.has_joined(room_id, user_id).await? {
            return Ok(());
        }
        let left = match made {
            Ok((_, leave)) => self.send_to(server, "v2/send_leave", &leave, &wish).await,
            Err(refusal) => Err(refusal),
        };
        match left {
            Ok(_) => {}
            // There is nobody who could leave.
            Err(refusal @ (Refusal::Forbidden(_) | Refusal::NotFound(_))) => {
                tracing::info!(room = %room_id, %server, user = %user_id, %refusal, "there is nothing to leave again");
                return Ok(());
            }
            Err(refusal) => return Err(refusal),
        }
        // An invite that was followed so has ended.
        let (room_id, user_id) = (room_id.clone(), user_id.clone());
        let store = &self.shared.context.store;
        Ok(store.write(move |tx| Box::pin(async move { remove_invite(tx, &room_id, &user_id).await })).await?)
    }

    async fn has_joined(&self, room_id: &RoomId, user_id: &OwnedUserId) -> Result<bool, Refusal> {
        let room = self.shared.find(room_id).await?;
        Ok(room.is_some_and(|room| room.core().joined.contains(user_id)))
    }
}

#[async_trait]
impl Leaver for Dag {
    fn owed(&self) -> &OwedLeaves {
        &self.shared.owed
    }

    fn is_joining(&self, room_id: &RoomId) -> bool {
        self.shared.joining.contains(room_id)
    }

    async fn leave_in_turn(&self, leave: &OwedLeave) -> Result<(), StoreError> {
        let place = self.shared.line_up(&leave.room_id);
        let _turn = place.turn().await;
        self.shared.owed.settle(leave, self.leave_again(leave)).await
    }
}
