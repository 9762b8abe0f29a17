//! Who has left a room may not be told so by its hub, which then has nobody of ours to send to. Without the leave the copy of the log
//! would say for ever that we are in. Until it is seen, what the hub does not know or give proves nothing: it owes us nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ruma::{EventId, OwnedEventId, OwnedUserId, RoomId, UserId};
use serde_json::Value;

use super::{EVERY, QUIET, SOON, millis_of};
use crate::event::Object;
use crate::federation::RemoteError;
use crate::lm::Lm;
use crate::lm::gaps::{ASKERS, is_verdict};
use crate::lm::intake::Taking;
use crate::lm::room::Snapshot;
use crate::lm::rooms::{RoomCell, lock};
use crate::refusal::Refusal;
use crate::store::StoreError;
use crate::store::lm as stored;

const MEMBER: &str = "m.room.member";
/// How often a hub is asked in vain for the leaves of all our users, each time after twice as long: for some eight hours. After that
/// it is asked when something is sent to it or comes from it, and by the next start.
const FRUITLESS: u32 = 10;
/// How many LPDUs are read at once.
const AT_ONCE: i64 = 100;

/// Whether all our users in a room are on their way out of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leaving {
    /// At least one is not.
    No,
    /// All are, and not all leaves are at the hub.
    Sent,
    /// All are, and since this time the hub has all leaves, in milliseconds.
    Taken(i64),
}

impl Lm {
    /// The hub has taken LPDUs: they are to be in the log after a while; or at once, where they are the leaves of all our users, which
    /// somebody waits for.
    pub(in crate::lm) async fn expect_taken(&self, room_id: &RoomId) -> Result<(), Refusal> {
        if let Some(looked) = lock(&self.looks().rooms).get_mut(room_id) {
            looked.fruitless = 0;
        }
        let leaves = match self.rooms().find(room_id).await? {
            Some(cell) => {
                let room = cell.snapshot(&self.context().store).await?;
                self.seem_to_leave(&cell, &room)
            }
            None => false,
        };
        match leaves {
            true => self.ask_after(room_id, SOON),
            false => self.expect_echo(room_id),
        }
        Ok(())
    }

    /// Whether all our users in a room have said of late that they leave it.
    fn seem_to_leave(&self, cell: &RoomCell, room: &Snapshot) -> bool {
        let ahead = lock(&cell.ahead);
        let mut members = self.own_members(room).peekable();
        let leaves =
            |user: &UserId| ahead.last(MEMBER, user.as_str()).is_some_and(|last| last.membership() == Some("leave"));
        members.peek().is_some() && members.all(|user| leaves(&user))
    }

    /// Whether all our users in a room are on their way out of it, by what was sent to its hub and is not in the log.
    pub(super) async fn leaving(&self, room: &Snapshot) -> Result<Leaving, StoreError> {
        let mut members: BTreeMap<OwnedUserId, bool> = self.own_members(room).map(|user| (user, false)).collect();
        let mut stay = members.len();
        if stay == 0 {
            return Ok(Leaving::No);
        }
        let (mut before, mut since) = (i64::MAX, Some(0));
        loop {
            let rows = stored::newest_lpdus(&self.context().store, &room.facts.room_id, before, AT_ONCE).await?;
            let Some((last, _)) = rows.last() else { return Ok(Leaving::No) };
            before = last.position;
            for (row, taken_ts) in rows {
                let lpdu: Object =
                    serde_json::from_slice(&row.json).map_err(|error| StoreError::corrupt("LPDU", error))?;
                let named =
                    |key: &str| lpdu.get(key).and_then(Value::as_str).and_then(|user| <&UserId>::try_from(user).ok());
                let out = named("state_key").filter(|user| is_out(&lpdu, user));
                if let Some(leaves) = out.and_then(|user| members.get_mut(user))
                    && !std::mem::replace(leaves, true)
                {
                    since = since.filter(|_| taken_ts > 0).map(|since: i64| since.max(taken_ts));
                    stay = stay.saturating_sub(1);
                }
                // Who says something after that stays, or comes.
                let Some(sender) = named("sender") else { return Ok(Leaving::No) };
                if members.get(sender) != Some(&true) && out != Some(sender) {
                    return Ok(Leaving::No);
                }
                if stay == 0 {
                    return Ok(since.map_or(Leaving::Sent, Leaving::Taken));
                }
            }
        }
    }

    /// Where the hub's log ends, as far as who has left is told; nothing when that cannot be seen. `end` is what its templates say.
    pub(super) async fn end_for_who_leaves(
        &self,
        room: &Snapshot,
        head: &EventId,
        (end, leaving): (Option<Vec<OwnedEventId>>, Leaving),
    ) -> Result<Option<Vec<OwnedEventId>>, Refusal> {
        if let Leaving::Taken(since) = leaving {
            if let Some(leaves) = self.own_leaves(room, head).await? {
                return Ok(Some(leaves));
            }
            let came = lock(&self.looks().rooms).get(&room.facts.room_id).map_or(0, |looked| looked.came_ts);
            if came.saturating_sub(since) >= millis_of(self.looks().pace(QUIET)) {
                // It goes on sending: it has not taken them for leaves.
                return Ok(Some(end.unwrap_or_default()));
            }
        }
        // Who may not come in again gets no template, and who may is not told by one what may be read.
        let Some(end) = end.filter(|end| !end.is_empty()) else { return Ok(None) };
        for event_id in &end {
            if !self.hub_knows(room, event_id).await? {
                return Ok(None);
            }
        }
        Ok(Some(end))
    }

    /// By which events all our users are out, by the hub's state; nothing when that cannot be seen.
    async fn own_leaves(&self, room: &Snapshot, head: &EventId) -> Result<Option<Vec<OwnedEventId>>, Refusal> {
        let (hub, room_id) = (&room.facts.hub, &room.facts.room_id);
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

    /// Whether the hub knows a room and gives nothing of our stay there: the join of a user of ours, by which it may have put all of
    /// them out without a word. One that has gone back to before that join says no more than that either.
    pub(super) async fn may_be_put_out(&self, room: &Snapshot) -> Result<Option<OwnedEventId>, Refusal> {
        let (hub, room_id) = (&room.facts.hub, &room.facts.room_id);
        let mut first = None;
        for user in self.own_members(room).take(ASKERS) {
            let Some(join) = room.state_event(MEMBER, user.as_str()).map(|join| join.event_id.clone()) else {
                continue;
            };
            if self.hub_knows(room, &join).await? {
                return Ok(None);
            }
            first.get_or_insert((user, join));
        }
        let Some((user, join)) = first else { return Ok(None) };
        let knows_room = match self.peers().make(hub, "join", room_id, &user).await {
            Ok(_) => true,
            Err(RemoteError::Status { errcode, .. }) => errcode == "M_FORBIDDEN",
            Err(_) => false,
        };
        Ok(knows_room.then_some(join))
    }

    /// Notes for whoever looks at the room that nothing of it comes any more, which accuses nobody.
    pub(super) async fn mention_silence(&self, cell: &Arc<RoomCell>, join: &EventId) -> Result<(), Refusal> {
        let _turn = cell.intake.lock().await;
        let mut taking = Taking::begin(self, cell, cell.snapshot(&self.context().store).await?).await?;
        taking.looks = true;
        let problem =
            "the hub gives nothing of the room since then: it may have put all users of this server out of it";
        taking.mention(join, problem);
        taking.finish(Some(cell)).await.map(drop)
    }

    /// The leaves of all our users were asked for in vain: the hub is asked again later, and not without end.
    pub(super) fn wait_for_leaves(&self, room_id: &RoomId) {
        let pause = {
            let mut rooms = lock(&self.looks().rooms);
            let looked = rooms.entry(room_id.to_owned()).or_default();
            looked.fruitless = looked.fruitless.saturating_add(1);
            pause_after(looked.fruitless)
        };
        match pause {
            Some(pause) => self.ask_after(room_id, pause),
            None => tracing::info!(room = %room_id, "the hub does not show that all users of this server have left"),
        }
    }
}

/// For how long a hub is left alone that was asked so often in vain; none when it is not asked again.
fn pause_after(fruitless: u32) -> Option<Duration> {
    (fruitless < FRUITLESS).then(|| EVERY.saturating_mul(1 << fruitless.saturating_sub(1)))
}

/// Whether by this event a user is not in the room any more.
fn is_out(event: &Object, user: &UserId) -> bool {
    let text = |key: &str| event.get(key).and_then(Value::as_str);
    let membership = event.get("content").and_then(|content| content.get("membership")).and_then(Value::as_str);
    text("type") == Some(MEMBER)
        && text("state_key") == Some(user.as_str())
        && matches!(membership, Some("leave" | "ban"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hub_that_does_not_show_the_leaves_is_asked_for_some_hours_and_not_for_ever() {
        let pauses: Vec<Duration> = (1..100).map_while(pause_after).collect();
        assert_eq!(pauses.first(), Some(&EVERY));
        assert!(pauses.windows(2).all(|pair| pair[1] == pair[0] * 2));
        let all: Duration = pauses.iter().sum();
        assert!((4..12).contains(&(all.as_secs() / 3600)), "{all:?}");
    }
}
