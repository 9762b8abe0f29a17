//! Portals of rooms that live elsewhere: whose making is asked for, and by whom.

use std::sync::Arc;

use ruma::{OwnedServerName, RoomId};

use super::{CREATING, Outcome, Place, Running, add_alias, check_form, in_task, lock};
use crate::bridge::core::Core;
use crate::bridge::portal::{Cause, Portal, PortalKind, PortalState, Request};
use crate::bridge::{access, ends, pending};
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::store::invitations::Invitation;
use crate::store::portals::PortalRow;

/// Joins an LM room at its hub and makes the Matrix room of it.
pub(in crate::bridge) async fn portal_from_lm(
    core: &Arc<Core>,
    lm_room_id: &RoomId,
    via: &[OwnedServerName],
    alias: Option<&str>,
    cause: &Cause,
) -> Outcome {
    of_lm_room(core, lm_room_id, via, alias, cause, Request::default()).await
}

/// The same for the bot's invite, which the hub may write down a moment after the bot has taken it.
pub(in crate::bridge) async fn portal_of_lm_invite(
    core: &Arc<Core>,
    lm_room_id: &RoomId,
    via: &[OwnedServerName],
    cause: &Cause,
) -> Outcome {
    of_lm_room(core, lm_room_id, via, None, cause, Request { invited: true, ..Request::default() }).await
}

async fn of_lm_room(
    core: &Arc<Core>,
    lm_room_id: &RoomId,
    via: &[OwnedServerName],
    alias: Option<&str>,
    cause: &Cause,
    request: Request,
) -> Outcome {
    if let Some(portal) = known(core, Side::Lm, lm_room_id, alias, cause).await? {
        return Ok(portal);
    }
    access::may_create(&core.context.config.access, cause)?;
    may_be_of_log(core, lm_room_id).await?;
    let Some(hub) = via.iter().find(|server| **server != core.context.server_name) else {
        return Err(Refusal::malformed("via", "names no other server"));
    };
    access::takes_part(&core.context.config.access, Side::Lm, hub)?;
    // Whether another portal has it is told when this one begins: by now it may be this room's own.
    alias.map_or(Ok(()), check_form)?;
    let request = Request { via: via.to_vec(), ..request };
    let row = PortalRow {
        lm_room_id: Some(lm_room_id.to_owned()),
        lm_hub: hub.clone(),
        ..wanted(core, alias, &request, cause)?
    };
    let place = (Side::Lm, lm_room_id.to_owned());
    match of_room(core, place, PortalKind::FromLm, row) {
        Some(outcome) => outcome.await,
        None => made_meanwhile(known(core, Side::Lm, lm_room_id, alias, cause).await?, lm_room_id),
    }
}

/// Joins a Matrix room that lives elsewhere and makes the LM room of it.
pub(in crate::bridge) async fn portal_from_matrix(
    core: &Arc<Core>,
    matrix_room_id: &RoomId,
    via: &[OwnedServerName],
    alias: Option<&str>,
    cause: &Cause,
) -> Outcome {
    of_matrix_room(core, matrix_room_id, via, alias, cause, Request::default()).await
}

/// The same for the bot's invite, of which the room may hear a moment later.
pub(in crate::bridge) async fn portal_of_invite(
    core: &Arc<Core>,
    matrix_room_id: &RoomId,
    via: &[OwnedServerName],
    cause: &Cause,
) -> Outcome {
    of_matrix_room(core, matrix_room_id, via, None, cause, Request { invited: true, ..Request::default() }).await
}

/// Makes a portal of the room by which one is replaced. The room that is made across follows `predecessor`.
pub(in crate::bridge) async fn portal_of_next(
    core: &Arc<Core>,
    side: Side,
    room_id: &RoomId,
    via: &[OwnedServerName],
    predecessor: &RoomId,
    invited: bool,
) -> Outcome {
    let request = Request { invited, predecessor: Some(predecessor.to_owned()), ..Request::default() };
    match side {
        Side::Lm => of_lm_room(core, room_id, via, None, &Cause::Admin, request).await,
        Side::Matrix => of_matrix_room(core, room_id, via, None, &Cause::Admin, request).await,
    }
}

async fn of_matrix_room(
    core: &Arc<Core>,
    matrix_room_id: &RoomId,
    via: &[OwnedServerName],
    alias: Option<&str>,
    cause: &Cause,
    request: Request,
) -> Outcome {
    if let Some(portal) = known(core, Side::Matrix, matrix_room_id, alias, cause).await? {
        return Ok(portal);
    }
    let policy = &core.context.config.access;
    access::may_create(policy, cause)?;
    may_be_elsewhere(core, Side::Matrix, matrix_room_id).await?;
    let mut servers = via.iter().map(|server| &**server).chain(matrix_room_id.server_name());
    let Some(first) = servers.clone().find(|server| *server != core.context.server_name) else {
        return Err(Refusal::malformed("via", "names no other server"));
    };
    if !servers.any(|server| access::takes_part(policy, Side::Matrix, server).is_ok()) {
        access::takes_part(policy, Side::Matrix, first)?;
    }
    alias.map_or(Ok(()), check_form)?;
    let request = Request { via: via.to_vec(), ..request };
    let row = PortalRow { matrix_room_id: Some(matrix_room_id.to_owned()), ..wanted(core, alias, &request, cause)? };
    let place = (Side::Matrix, matrix_room_id.to_owned());
    match of_room(core, place, PortalKind::FromMatrix, row) {
        Some(outcome) => outcome.await,
        None => made_meanwhile(known(core, Side::Matrix, matrix_room_id, alias, cause).await?, matrix_room_id),
    }
}

/// Makes a pending portal of a room into which a ghost is invited.
pub(in crate::bridge) async fn portal_of_ghost_invite(core: &Arc<Core>, invite: &Invitation) -> Outcome {
    let cause = Cause::GhostInvite(invite.inviter.clone());
    access::may_create(&core.context.config.access, &cause)?;
    may_be_elsewhere(core, invite.side, &invite.room_id).await?;
    let request = Request { via: vec![invite.via.clone()], ghosts_alone: true, ..Request::default() };
    let row = wanted(core, None, &request, &cause)?;
    let room_id = Some(invite.room_id.clone());
    let (kind, row) = match invite.side {
        Side::Lm => (PortalKind::FromLm, PortalRow { lm_room_id: room_id, lm_hub: invite.via.clone(), ..row }),
        Side::Matrix => (PortalKind::FromMatrix, PortalRow { matrix_room_id: room_id, ..row }),
    };
    match of_room(core, (invite.side, invite.room_id.clone()), kind, row) {
        Some(outcome) => outcome.await,
        None => {
            let is_of_use = |portal: &Arc<Portal>| portal.state == PortalState::Pending || portal.state.carries();
            let portal = core.registry.of_room(invite.side, &invite.room_id).map(|entry| entry.portal());
            made_meanwhile(portal.filter(is_of_use), &invite.room_id)
        }
    }
}

/// Refuses what cannot be a room of a side that lives elsewhere.
pub(in crate::bridge) async fn may_be_elsewhere(core: &Core, side: Side, room_id: &RoomId) -> Result<(), Refusal> {
    match side {
        Side::Lm => may_be_of_log(core, room_id).await,
        Side::Matrix if core.sides()?.lm.room(room_id).await?.is_some() => {
            Err(Refusal::malformed("room_id", format!("{room_id} is an LM room, not a Matrix room")))
        }
        Side::Matrix => Ok(()),
    }
}

/// The portal that a room has, which is not over. It has the alias from now on.
async fn known(
    core: &Arc<Core>,
    side: Side,
    room_id: &RoomId,
    alias: Option<&str>,
    cause: &Cause,
) -> Result<Option<Arc<Portal>>, Refusal> {
    let Some(entry) = core.registry.of_room(side, room_id) else { return Ok(None) };
    if entry.portal().state == PortalState::Pending {
        access::may_create(&core.context.config.access, cause)?;
        pending::make_way(core, &entry).await?;
    }
    if ends::over(core, &entry).await? {
        return Ok(None);
    }
    if *cause == Cause::Admin {
        ends::keep(core, entry.number).await?;
    }
    let Some(alias) = alias else { return Ok(Some(entry.portal())) };
    add_alias(core, alias, entry.number).await?;
    // Of several aliases who asked is told the own one.
    let alias = Some(format!("#{alias}:{}", core.context.server_name));
    Ok(Some(Arc::new(Portal { alias, ..entry.portal().as_ref().clone() })))
}

/// A row of what is wanted, which is to say of which room.
fn wanted(core: &Core, alias: Option<&str>, request: &Request, cause: &Cause) -> Result<PortalRow, Refusal> {
    Ok(PortalRow {
        number: 0,
        kind: String::new(),
        state: CREATING.to_owned(),
        matrix_room_id: None,
        lm_room_id: None,
        lm_hub: core.context.server_name.clone(),
        alias: alias.map(str::to_owned),
        reason: None,
        request: serde_json::to_vec(request).map_err(|error| Refusal::Internal(error.to_string()))?,
        created_ts: core.now_ms(),
        unused_until_ts: unused_until(core, cause),
    })
}

/// Makes a portal of a room that lives elsewhere, or waits for who makes it already. None when it was made since it was looked last:
/// who makes one is here until everybody sees what came of it.
fn of_room(core: &Arc<Core>, place: Place, kind: PortalKind, row: PortalRow) -> Option<Running> {
    let mut running = lock(core);
    if let Some(outcome) = running.get(&place) {
        return Some(outcome.clone());
    }
    let (side, room_id) = &place;
    if core.registry.of_room(*side, room_id).is_some_and(|entry| entry.portal().state != PortalState::Ended) {
        return None;
    }
    let row = PortalRow { kind: kind.as_str().to_owned(), ..row };
    let outcome = in_task(core, place.clone(), row);
    running.insert(place, outcome.clone());
    Some(outcome)
}

fn made_meanwhile(portal: Option<Arc<Portal>>, room_id: &RoomId) -> Outcome {
    portal.ok_or_else(|| Refusal::Internal(format!("the portal of {room_id} was made, and has ended, just now")))
}

/// The room that lives elsewhere, of a portal that is made of one.
pub(super) fn place_of(row: &PortalRow) -> Option<Place> {
    match PortalKind::parse(&row.kind)? {
        PortalKind::FromLm => Some((Side::Lm, row.lm_room_id.clone()?)),
        PortalKind::FromMatrix => Some((Side::Matrix, row.matrix_room_id.clone()?)),
        PortalKind::Created | PortalKind::Shared => None,
    }
}

/// Refuses what cannot be a log elsewhere, whatever a hub or a tombstone says: the ID of a graph that is here and no log as well, and
/// one that names no server.
async fn may_be_of_log(core: &Core, room_id: &RoomId) -> Result<(), Refusal> {
    if room_id.server_name().is_none() {
        return Err(Refusal::malformed("room_id", format!("{room_id} names no server, so it is no LM room's")));
    }
    let sides = core.sides()?;
    if sides.dag.knows(room_id).await? && !sides.lm.is_shared(room_id).await? {
        return Err(Refusal::malformed("room_id", format!("{room_id} is a Matrix room, not an LM room")));
    }
    Ok(())
}

/// Until when a portal may go unused that no admin asked for. Who names an alias comes in at once, or never meant to.
fn unused_until(core: &Core, cause: &Cause) -> Option<i64> {
    let unused = match cause {
        Cause::Admin => return None,
        Cause::Invite(_) | Cause::MatrixInvite(_) | Cause::GhostInvite(_) => ends::UNUSED_MS,
        Cause::Appservice | Cause::Server(_) => ends::UNUSED_ALIAS_MS,
    };
    Some(core.now_ms().saturating_add(unused))
}
