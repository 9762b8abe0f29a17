//! Who has left a room may not be told so by its hub, which then has nobody of ours to send to. Without the leave the copy of the log
//! would say for ever that we are in.

use std::sync::Arc;

use ruma::{EventId, OwnedEventId, RoomId, UserId};
use serde_json::Value;

use super::SOON;
use crate::event::Object;
use crate::lm::Lm;
use crate::lm::gaps::is_verdict;
use crate::lm::room::Snapshot;
use crate::lm::rooms::{RoomCell, lock};
use crate::refusal::Refusal;
use crate::store::lm as stored;

const MEMBER: &str = "m.room.member";

impl Lm {
    /// The hub has taken LPDUs: they are to be in the log after a while; or at once, where they are the leaves of all our users, which
    /// somebody waits for.
    pub(in crate::lm) async fn expect_taken(&self, room_id: &RoomId) -> Result<(), Refusal> {
        let leaves = match self.rooms().find(room_id).await? {
            Some(cell) => {
                let room = cell.snapshot(&self.context().store).await?;
                self.all_leave(&cell, &room)
            }
            None => false,
        };
        match leaves {
            true => self.ask_after(room_id, SOON),
            false => self.expect_echo(room_id),
        }
        Ok(())
    }

    /// Whether all our users in a room are on their way out of it.
    pub(super) fn all_leave(&self, cell: &Arc<RoomCell>, room: &Snapshot) -> bool {
        let ahead = lock(&cell.ahead);
        let mut members = self.own_members(room).peekable();
        let leaves =
            |user: &UserId| ahead.last(MEMBER, user.as_str()).is_some_and(|last| last.membership() == Some("leave"));
        members.peek().is_some() && members.all(|user| leaves(&user))
    }

    /// By which events all our users are out, by the hub's state, when it has taken something and gives none of them a template; nothing
    /// when that cannot be seen.
    pub(super) async fn own_leaves(
        &self,
        room: &Snapshot,
        head: &EventId,
    ) -> Result<Option<Vec<OwnedEventId>>, Refusal> {
        let (hub, room_id) = (&room.facts.hub, &room.facts.room_id);
        if stored::taken_lpdus(&self.context().store, room_id, 1).await?.is_empty() {
            return Ok(None);
        }
        let (state, _, _held) = match self.peers().state(hub, room_id, head).await {
            Ok(state) => state,
            Err(error) if is_verdict(&error) || error.is_unrecognized() => return Ok(None),
            Err(error) => return Err(error.into_refusal(hub)),
        };
        let mut leaves = Vec::new();
        for user in self.own_members(room) {
            let Some(leave) = state.iter().find(|event| is_out(event, &user)) else { return Ok(None) };
            leaves.push(leave.clone());
        }
        let checked = self.check_finished(leaves, room.redaction).await;
        let leaves: Vec<_> = checked.into_iter().flatten().map(|finished| finished.pdu.event_id).collect();
        Ok(Some(leaves).filter(|leaves| !leaves.is_empty()))
    }
}

/// Whether by this event a user is not in the room any more.
fn is_out(event: &Object, user: &UserId) -> bool {
    let text = |key: &str| event.get(key).and_then(Value::as_str);
    let membership = event.get("content").and_then(|content| content.get("membership")).and_then(Value::as_str);
    text("type") == Some(MEMBER)
        && text("state_key") == Some(user.as_str())
        && matches!(membership, Some("leave" | "ban"))
}
