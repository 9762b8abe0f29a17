//! Pending portals: of rooms that live elsewhere and into which ghosts are invited, before the gateway is in them. The room across is made
//! of what came with the invite, with nobody in it but the gateway's users, and whom the ghost stands for is invited there (`asking`). When
//! they join it, the ghost joins the room that it was invited into, the room across is filled, and only then their join is answered
//! (`entering`). An invite that ends before that, on either side, ends on the other too; a portal without open invites ends.
//!
//! What is to be done next about each invite is in the store (`store::invitations`), and is done again after a crash.

mod asking;
mod entering;
mod invited;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::future::BoxFuture;
use ruma::{OwnedRoomId, RoomId, UserId};
use serde::{Deserialize, Serialize};

pub(super) use self::asking::{due, soon};
pub(super) use self::entering::gate;
pub(super) use self::invited::{invited, uninvited};
use super::core::Core;
use super::create::save;
use super::portal::{Portal, PortalState};
use super::registry::Entry;
use super::users::Who;
use super::{ends, rooms};
use crate::event::Object;
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::store::images::{self, RefusalRow};
use crate::store::invitations::{self, Invitation, Next, Stage};
use crate::store::portals::PortalRow;

/// For how long an invite may wait for its answer, in milliseconds.
pub const PENDING_MS: i64 = 7 * 86_400_000;
/// Why a pending portal ends for one of the whole room: the invites go on there.
const MAKES_WAY: &str = "the whole room is connected now";
/// Why one ends into which nobody is invited any more; who is invited in that moment gets another.
const NOBODY: &str = "no invite into it is open any more";
/// How long after a portal has made way its invites are sent again, in milliseconds.
const AGAIN_MS: i64 = 10_000;

/// A room into which ghosts are invited.
type Place = (Side, OwnedRoomId);

/// What is known of invites in memory.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// The rooms with invites.
    rooms: Mutex<HashMap<OwnedRoomId, Side>>,
    /// Those that a task looks at; true when it is to look again.
    looks: Mutex<HashMap<Place, bool>>,
}

impl Pending {
    /// On which side a room is into which ghosts are invited.
    pub(super) fn side_of(&self, room_id: &RoomId) -> Option<Side> {
        lock(&self.rooms).get(room_id).copied()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What came with an invite of the room and of who invites, as its server says.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Shown {
    /// The content of `m.room.name`, `m.room.topic` and `m.room.avatar`, by type.
    pub(super) room: Vec<(String, Object)>,
    /// The member event's content of who invites.
    pub(super) inviter: Object,
}

/// Loads what waits; before anything is accepted.
pub(super) async fn load(core: &Core) -> Result<(), Refusal> {
    core.context.store.write(|tx| Box::pin(invitations::nobody_enters(tx))).await?;
    let found = invitations::rooms(&core.context.store).await?;
    lock(&core.pending.rooms).extend(found.into_iter().map(|(side, room_id)| (room_id, side)));
    Ok(())
}

/// Goes on with all invites.
pub(super) fn at_start(core: &Arc<Core>) {
    let rooms: Vec<_> = lock(&core.pending.rooms).iter().map(|(room_id, side)| (*side, room_id.clone())).collect();
    for (side, room_id) in rooms {
        soon(core, side, &room_id);
    }
    // Of a portal whose last invite ended when the gateway stopped nothing else tells.
    let inner = core.clone();
    core.spawn(async move {
        let mut last = 0;
        while let Some(entry) = inner.registry.after(last, 1).pop() {
            last = entry.number;
            look_at(&inner, &entry);
        }
    });
}

/// Something has happened in a room of a portal: if it is pending, somebody may have answered.
pub(super) fn look_at(core: &Arc<Core>, entry: &Entry) {
    let portal = entry.portal();
    if portal.state == PortalState::Pending
        && let Some(side) = portal.elsewhere()
    {
        soon(core, side, portal.room(side));
    }
}

/// Makes what is still missing of the pending portal in `row`: the room across.
pub(super) async fn make(core: &Arc<Core>, row: &mut PortalRow) -> Result<(), Refusal> {
    let (side, room_id) = match (row.kind.as_str(), &row.matrix_room_id, &row.lm_room_id) {
        ("from_lm", _, Some(room_id)) => (Side::Lm, room_id.clone()),
        (_, Some(room_id), _) => (Side::Matrix, room_id.clone()),
        _ => return Err(Refusal::Internal("the room that lives elsewhere is missing".to_owned())),
    };
    let open = invitations::of_room(&core.context.store, side, &room_id).await?;
    let Some(first) = open.first() else {
        return Err(Refusal::Forbidden(format!("no invite into {room_id} is open any more")));
    };
    let shown: Shown = serde_json::from_slice(&first.shown).unwrap_or_default();
    let inviter = ghost_of(core, side, &first.inviter).await?;
    match side {
        Side::Matrix if row.lm_room_id.is_none() => {
            let made = core.sides()?.lm.create_room(rooms::provisional_log(core, &shown.room, &inviter)).await?;
            save(core, row, |row| row.lm_room_id = Some(made)).await
        }
        Side::Lm if row.matrix_room_id.is_none() => {
            let made = core.sides()?.dag.create_room(rooms::provisional_graph(core, &shown.room, &inviter)?).await?;
            save(core, row, |row| row.matrix_room_id = Some(made)).await
        }
        _ => Ok(()),
    }
}

/// The ghost across of a user who is at home on `home`.
async fn ghost_of(core: &Core, home: Side, user: &UserId) -> Result<ruma::OwnedUserId, Refusal> {
    match core.users.who(&core.context.store, home, user).await? {
        Who::Native { ghost } => Ok(ghost),
        _ => Err(Refusal::Forbidden(format!("{user} has no ghost on the other side"))),
    }
}

/// A pending portal gives way to one of the whole room, by which its invites go on.
pub(super) async fn make_way(core: &Arc<Core>, entry: &Arc<Entry>) -> Result<(), Refusal> {
    let portal = entry.portal();
    let Some(side) = portal.elsewhere().filter(|_| portal.state == PortalState::Pending) else { return Ok(()) };
    let (room_id, retry_ts) = (portal.room(side).to_owned(), core.now_ms().saturating_add(AGAIN_MS));
    let write = core
        .context
        .store
        .write(move |tx| Box::pin(async move { invitations::ask_again(tx, side, &room_id, retry_ts).await }));
    write.await?;
    let ended: BoxFuture<'_, _> = Box::pin(ends::end(core, entry, MAKES_WAY));
    ended.await.map(drop)
}

/// A portal ends: what is open of its invites is declined.
pub(super) async fn close(core: &Arc<Core>, portal: &Portal) -> Result<(), Refusal> {
    let Some(side) = portal.elsewhere() else { return Ok(()) };
    let reason = portal.reason.as_deref().unwrap_or("it was asked for");
    let room_id = portal.room(side);
    let goes_on = reason == MAKES_WAY || reason.starts_with(NOBODY);
    for row in invitations::of_room(&core.context.store, side, room_id).await? {
        if !goes_on && !matches!(row.stage, Stage::Refused | Stage::Retracted) {
            refuse(core, &row, "ended", reason).await?;
        }
    }
    if reason != MAKES_WAY && core.pending.side_of(room_id).is_some() {
        soon(core, side, room_id);
    }
    Ok(())
}

/// Why an invite came to nothing, for `explain` and the portal's health.
fn refusal_row(core: &Core, row: &Invitation, code: &str, reason: &str) -> RefusalRow {
    RefusalRow {
        side: row.side,
        source: row.event_id.clone(),
        portal: core.registry.of_room(row.side, &row.room_id).map_or(0, |entry| entry.number),
        sender: row.inviter.to_string(),
        kind: super::side::MEMBER.to_owned(),
        code: code.to_owned(),
        reason: reason.to_owned(),
        refused_ts: core.now_ms(),
        room_id: Some(row.room_id.clone()),
    }
}

/// Writes down that an invite is to be declined, and why: also for `explain` and the portal's health.
async fn refuse(core: &Core, row: &Invitation, code: &str, reason: &str) -> Result<(), Refusal> {
    let (refused, now_ms) = (refusal_row(core, row, code, reason), core.now_ms());
    let (code, reason) = (Some(code.to_owned()), Some(reason.to_owned()));
    let next = Next { stage: Stage::Refused, code, reason, image: None, now_ms };
    let row = row.clone();
    let write = core.context.store.write(move |tx| {
        Box::pin(async move {
            if invitations::set_stage(tx, &row, &next).await? {
                images::refuse(tx, &refused).await?;
            }
            Ok(())
        })
    });
    Ok(write.await?)
}
