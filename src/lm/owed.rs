//! Leaves that are owed on this side ([`crate::seam::OwedLeaves`]): how a user leaves a room of a foreign hub again into which a join
//! of theirs may have come that was of no use here.

use std::collections::BTreeSet;
use std::sync::Arc;

use async_trait::async_trait;
use ruma::{RoomId, ServerName};
use serde_json::json;

use super::Lm;
use crate::event::Object;
use crate::refusal::Refusal;
use crate::seam::{Leaver, Membership, OwedLeave, OwedLeaves};
use crate::store::StoreError;

impl Lm {
    pub(super) fn owed(&self) -> &OwedLeaves {
        &self.inner.owed
    }

    /// Somebody may have to leave.
    pub(super) fn leave_soon(&self) {
        let inner = Arc::downgrade(&self.inner);
        self.owed().attend(move || inner.upgrade().map(|inner| Self { inner }));
    }

    /// Has a user leave. Where we are in the room, what the log has of the user is so, and is for the bridge to see.
    async fn leave_again(&self, leave: &OwedLeave) -> Result<(), Refusal> {
        let OwedLeave { server, room_id, user_id, .. } = leave;
        match self.find(room_id).await {
            Ok((_, room)) if room.has_server(&self.context().server_name) => return Ok(()),
            Ok(_) | Err(Refusal::UnknownRoom(_)) => {}
            Err(refusal) => return Err(refusal),
        }
        let content = Object::from_iter([("membership".to_owned(), json!(Membership::Leave.as_str()))]);
        let draft = self.own_member(user_id, content);
        // Who was sent the join, and the hub that it names if it is none: what these say counts. Of the others, that the user has left.
        let mut believed = BTreeSet::from([server.clone()]);
        let mut ways = self.ways(room_id, std::slice::from_ref(server)).await;
        while let Some(asked) = ways.next() {
            let Err(refusal) = self.leave_through(&asked, room_id, &draft, true).await else { return Ok(()) };
            tracing::info!(room = %room_id, server = %asked, user = %user_id, %refusal, "not left again through this server");
            match &refusal {
                // There is nobody who could leave.
                Refusal::Forbidden(_) | Refusal::NotFound(_) if believed.contains(&asked) => return Ok(()),
                Refusal::WrongHub { hub, .. } if believed.contains(&asked) => {
                    believed.extend(ServerName::parse(hub).ok());
                }
                _ => {}
            }
            ways.refused(&asked, refusal);
        }
        Err(ways.end(&format!("{room_id} can be left again")))
    }
}

#[async_trait]
impl Leaver for Lm {
    fn owed(&self) -> &OwedLeaves {
        Self::owed(self)
    }

    fn is_joining(&self, room_id: &RoomId) -> bool {
        self.joining().contains(room_id)
    }

    async fn leave_in_turn(&self, leave: &OwedLeave) -> Result<(), StoreError> {
        self.in_turn(&leave.room_id, self.owed().settle(leave, self.leave_again(leave))).await
    }
}
