//! What is done about invites, room by room: users are invited, and what ends on one side is ended on the other.

use std::collections::hash_map::Entry;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use ruma::{RoomId, UserId};

use super::{NOBODY, Shown, ghost_of, lock, refuse};
use crate::bridge::carry::is_public;
use crate::bridge::core::Core;
use crate::bridge::notice::{speaker, text};
use crate::bridge::portal::{Portal, PortalState};
use crate::bridge::power::{Action, Power};
use crate::bridge::side::MEMBER;
use crate::bridge::translate::member_content;
use crate::bridge::{create, ends};
use crate::event::Object;
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::seam::{Draft, EventEffect, Outgoing};
use crate::store::invitations::{self, Invitation, Next, Stage};

/// After what time, in milliseconds, an invite is declined whose user's server does not answer, when it was asked at least so often.
const REMOTE_PATIENCE_MS: i64 = 480_000;
const REMOTE_TRIES: i64 = 6;
/// For how long, in milliseconds, it is tried to tell the side that does not know yet that an invite has ended.
const TELL_MS: i64 = 86_400_000;
/// For how long, in milliseconds, no word is the last about an invite that its room may not have written down yet when it ends.
const SETTLES_MS: i64 = 15_000;
/// The longest pause between two tries, in milliseconds.
const LONGEST_PAUSE_MS: i64 = 300_000;
/// Up to how long a pause has a timer of its own, in milliseconds.
const SOON_MS: i64 = 30_000;
/// The longest reason that is passed on, in characters.
const REASON_LIMIT: usize = 300;

/// Looks at the invites into a room, one task at a time.
pub(in crate::bridge) fn soon(core: &Arc<Core>, side: Side, room_id: &RoomId) {
    let place = (side, room_id.to_owned());
    match lock(&core.pending.looks).entry(place.clone()) {
        Entry::Occupied(mut again) => {
            again.insert(true);
            return;
        }
        Entry::Vacant(looks) => drop(looks.insert(false)),
    }
    let inner = core.clone();
    core.spawn(async move {
        loop {
            let looked = AssertUnwindSafe(look(&inner, place.0, &place.1)).catch_unwind().await;
            match looked {
                Ok(Ok(())) => {}
                Ok(Err(refusal)) => tracing::warn!(room = %place.1, %refusal, "invites into a room wait"),
                Err(_) => tracing::error!(room = %place.1, "looking at invites panicked"),
            }
            let mut looks = lock(&inner.pending.looks);
            match looks.get_mut(&place) {
                Some(again) if *again => *again = false,
                _ => {
                    looks.remove(&place);
                    return;
                }
            }
        }
    });
}

/// Looks at the rooms where something is due by now.
pub(in crate::bridge) async fn due(core: &Arc<Core>) -> Result<(), Refusal> {
    for (side, room_id) in invitations::due(&core.context.store, core.now_ms()).await? {
        soon(core, side, &room_id);
    }
    Ok(())
}

/// Does what can be done now, until nothing more can.
async fn look(core: &Arc<Core>, side: Side, room_id: &RoomId) -> Result<(), Refusal> {
    let mut last = None;
    loop {
        let rows = invitations::of_room(&core.context.store, side, room_id).await?;
        let is_over = rows.is_empty();
        match is_over {
            true => lock(&core.pending.rooms).remove(room_id),
            false => lock(&core.pending.rooms).insert(room_id.to_owned(), side),
        };
        let (mut has_moved, mut next) = (false, i64::MAX);
        for row in rows {
            let now = core.now_ms();
            let is_late = row.expires_ts <= now && matches!(row.stage, Stage::Asked | Stage::Open);
            if row.retry_ts > now && !is_late {
                next = next.min(row.retry_ts);
                continue;
            }
            let step: BoxFuture<'_, _> = Box::pin(step(core, &row));
            match step.await {
                Ok(moved) => has_moved |= moved,
                Err(refusal) => match failed(core, &row, &refusal).await? {
                    Some(retry_ts) => next = next.min(retry_ts),
                    None => has_moved = true,
                },
            }
            last = row.reason.or(last);
        }
        if has_moved {
            continue;
        }
        if is_over {
            return end(core, side, room_id, last).await;
        }
        let pause = next.saturating_sub(core.now_ms()).max(0);
        // What is later is looked at with what is due.
        if pause <= SOON_MS {
            let pause = Duration::from_millis(u64::try_from(pause).unwrap_or(0));
            let (inner, room_id) = (core.clone(), room_id.to_owned());
            core.spawn(async move {
                tokio::time::sleep(pause).await;
                soon(&inner, side, &room_id);
            });
        }
        return Ok(());
    }
}

/// A pending portal into whose room nobody is invited any more ends.
async fn end(core: &Arc<Core>, side: Side, room_id: &RoomId, why: Option<String>) -> Result<(), Refusal> {
    let Some(entry) = core.registry.of_room(side, room_id) else { return Ok(()) };
    if entry.portal().state != PortalState::Pending {
        return Ok(());
    }
    let reason = match why {
        Some(why) => format!("{NOBODY}: {why}"),
        None => NOBODY.to_owned(),
    };
    let ended: BoxFuture<'_, _> = Box::pin(ends::end(core, &entry, &reason));
    ended.await.map(drop)
}

/// Does what is next about one invite; whether that was done.
async fn step(core: &Arc<Core>, row: &Invitation) -> Result<bool, Refusal> {
    let is_late = row.expires_ts <= core.now_ms();
    match row.stage {
        Stage::Entering => return Ok(false),
        Stage::Asked | Stage::Open if is_late => {
            let days = super::PENDING_MS / 86_400_000;
            refuse(core, row, "expired", &format!("{} has not answered within {days} days", row.user)).await?;
            return Ok(true);
        }
        Stage::Asked => return ask(core, row).await,
        Stage::Open => return watch(core, row).await,
        Stage::Refused => {
            withdraw(core, row).await?;
            decline(core, row).await?;
        }
        Stage::Retracted => withdraw(core, row).await?,
    }
    settle(core, row).await?;
    Ok(true)
}

/// What becomes of an invite about which something failed: it is tried again at a time, or not.
async fn failed(core: &Core, row: &Invitation, refusal: &Refusal) -> Result<Option<i64>, Refusal> {
    let now = core.now_ms();
    let since = now.saturating_sub(row.stage_ts);
    let ends = !refusal.is_transient();
    match row.stage {
        Stage::Asked if ends => refuse(core, row, refusal.code(), &refusal.to_string()).await.map(|()| None),
        Stage::Asked if since > REMOTE_PATIENCE_MS && row.tries >= REMOTE_TRIES => {
            let reason = format!("given up after {} minutes: {refusal}", since / 60_000);
            refuse(core, row, refusal.code(), &reason).await.map(|()| None)
        }
        Stage::Refused | Stage::Retracted if (ends && since > SETTLES_MS) || since > TELL_MS => {
            tracing::info!(room = %row.room_id, user = %row.user, %refusal, "the end of an invite is not told");
            settle(core, row).await.map(|()| None)
        }
        _ => {
            let pause = 1_000_i64.checked_shl(u32::try_from(row.tries.min(20)).unwrap_or(20));
            let retry_ts = now.saturating_add(pause.unwrap_or(LONGEST_PAUSE_MS).clamp(1_000, LONGEST_PAUSE_MS));
            tracing::info!(room = %row.room_id, user = %row.user, stage = row.stage.as_str(), %refusal, "an invite waits");
            let row = row.clone();
            let write = core
                .context
                .store
                .write(move |tx| Box::pin(async move { invitations::put_off(tx, &row, retry_ts).await }));
            write.await?;
            Ok(Some(retry_ts))
        }
    }
}

async fn settle(core: &Core, row: &Invitation) -> Result<(), Refusal> {
    let row = row.clone();
    Ok(core.context.store.write(move |tx| Box::pin(async move { invitations::settle(tx, &row).await })).await?)
}

/// Invites the user in the room across, which is made when there is none.
async fn ask(core: &Arc<Core>, row: &Invitation) -> Result<bool, Refusal> {
    let portal = portal(core, row).await?;
    let far = row.side.other();
    let rooms = core.sides()?.rooms(far);
    let room_id = portal.room(far);
    let state = rooms.state(room_id).await?;
    let next = Next { stage: Stage::Open, code: None, reason: None, image: None, now_ms: core.now_ms() };
    match state.membership(&row.user) {
        "ban" => return Err(Refusal::Forbidden(format!("{} is banned from the room on the other side", row.user))),
        "invite" | "join" => {
            let row = row.clone();
            let write = core
                .context
                .store
                .write(move |tx| Box::pin(async move { invitations::set_stage(tx, &row, &next).await }));
            return Ok(write.await?);
        }
        _ => {}
    }
    let ghost = ghost_of(core, row.side, &row.inviter).await?;
    core.users.keep(&core.context.store, row.side, [&row.inviter]).await?;
    come(core, &portal, far, &ghost, row).await?;
    let content: Object = serde_json::from_slice(&row.content).unwrap_or_default();
    let content = member_content(&content, "invite", core.media(far));
    let sender = match Power::of(&state).may(&ghost, Action::Invite) {
        true => &ghost,
        false => core.users.bot(),
    };
    let draft = core.draft(sender, MEMBER, Some(row.user.as_str()), content);
    let opened = row.clone();
    let effect = EventEffect::new(move |tx, image| {
        let next = Next { image: Some(image), ..next };
        Box::pin(async move { invitations::set_stage(tx, &opened, &next).await.map(drop) })
    });
    rooms.invite(room_id, Outgoing { draft, effect: Some(effect) }).await?;
    tracing::info!(portal = portal.portal_id, user = %row.user, inviter = %row.inviter, "invited on the other side");
    Ok(true)
}

/// The portal of the room that the invite leads into; a pending one is made when there is none.
async fn portal(core: &Arc<Core>, row: &Invitation) -> Result<Arc<Portal>, Refusal> {
    if let Some(entry) = core.registry.of_room(row.side, &row.room_id)
        && !ends::over(core, &entry).await?
    {
        let portal = entry.portal();
        let state = portal.state;
        if state.carries() && portal.has_ghosts_alone(row.side) && speaker(core, &portal, row.side).await?.is_none() {
            let server = core.context.server_name.to_string();
            return Err(Refusal::Remote { server, problem: format!("{} is about to end", portal.portal_id) });
        }
        return match state {
            PortalState::Pending => Ok(portal),
            state if state.carries() => Ok(portal),
            state => Err(Refusal::Forbidden(format!("the portal of this room is {}", state.as_str()))),
        };
    }
    let made: BoxFuture<'_, _> = Box::pin(create::portal_of_ghost_invite(core, row));
    made.await
}

/// Who invites is in the room across, so that the invite is theirs.
async fn come(core: &Core, portal: &Portal, far: Side, ghost: &UserId, row: &Invitation) -> Result<(), Refusal> {
    let state = core.sides()?.rooms(far).state(portal.room(far)).await?;
    if state.membership(ghost) == "join" {
        return Ok(());
    }
    if !is_public(&state) && state.membership(ghost) != "invite" {
        core.send(portal, far, core.member(core.users.bot(), ghost, "invite")).await?;
    }
    let shown: Shown = serde_json::from_slice(&row.shown).unwrap_or_default();
    let mut content = member_content(&shown.inviter, "join", core.media(far));
    content.remove("reason");
    content.remove("is_direct");
    core.send(portal, far, core.draft(ghost, MEMBER, Some(ghost.as_str()), content)).await.map(drop)
}

/// Looks what has become of a user's invite.
async fn watch(core: &Arc<Core>, row: &Invitation) -> Result<bool, Refusal> {
    let Some(entry) = core.registry.of_room(row.side, &row.room_id) else { return Ok(false) };
    let portal = entry.portal();
    if portal.state.carries() {
        // What happens from now on crosses like everything else.
        return settle(core, row).await.map(|()| true);
    }
    if portal.state != PortalState::Pending {
        return Ok(false);
    }
    let far = row.side.other();
    let key = (MEMBER.to_owned(), row.user.to_string());
    let state = core.sides()?.rooms(far).pick(portal.room(far), &[key]).await?;
    let Some(member) = state.member(&row.user).filter(|member| matches!(member.membership(), "leave" | "ban")) else {
        return Ok(false);
    };
    let reason = member.content.get("reason").and_then(|reason| reason.as_str());
    let reason = reason.map_or_else(|| format!("{} has declined", row.user), shorten);
    refuse(core, row, "declined", &reason).await?;
    Ok(true)
}

fn shorten(reason: &str) -> String {
    reason.chars().take(REASON_LIMIT).collect()
}

/// Takes back the invite of the user, if it is open. Homeservers believe that of who invited.
async fn withdraw(core: &Core, row: &Invitation) -> Result<(), Refusal> {
    let Some(entry) = core.registry.of_room(row.side, &row.room_id) else { return Ok(()) };
    let (portal, far) = (entry.portal(), row.side.other());
    let state = core.sides()?.rooms(far).state(portal.room(far)).await?;
    let Some(invite) = state.member(&row.user).filter(|member| member.membership() == "invite") else { return Ok(()) };
    let remover = match Power::of(&state).may_remove(invite.sender, &row.user, Action::Kick) {
        true if *invite.sender.server_name() == core.context.server_name => invite.sender,
        _ => core.users.bot(),
    };
    match core.send(&portal, far, with_reason(core.member(remover, &row.user, "leave"), row)).await {
        Err(refusal) if refusal.is_transient() => Err(refusal),
        Err(refusal) => {
            tracing::info!(portal = portal.portal_id, user = %row.user, %refusal, "an invite stays open");
            Ok(())
        }
        Ok(_) => Ok(()),
    }
}

fn with_reason(mut draft: Draft, row: &Invitation) -> Draft {
    draft.content.extend(row.reason.as_deref().map(|reason| ("reason".to_owned(), shorten(reason).into())));
    draft
}

/// The ghost declines where it was invited.
async fn decline(core: &Arc<Core>, row: &Invitation) -> Result<(), Refusal> {
    let ghost = ghost_of(core, row.side.other(), &row.user).await?;
    let reason = row.reason.as_deref().map(shorten);
    if row.code.as_deref() == Some("encryption") && row.side == Side::Matrix {
        tell_encrypted(core, row, &ghost).await?;
    }
    let via = [row.via.clone()];
    match row.side {
        Side::Matrix => core.sides()?.dag.leave(&row.room_id, &ghost, &via, reason.as_deref()).await,
        Side::Lm => core.sides()?.lm.leave_because(&row.room_id, &ghost, &via, reason.as_deref()).await,
    }
}

/// In a room that is encrypted the ghost says why nobody will come; a reason for declining is not what everybody looks at.
async fn tell_encrypted(core: &Arc<Core>, row: &Invitation, ghost: &UserId) -> Result<(), Refusal> {
    if !core.context.config.portals.notices {
        return Ok(());
    }
    let told = async {
        let via = [row.via.clone()];
        core.users.keep(&core.context.store, row.side.other(), [&row.user]).await?;
        let dag = &core.sides()?.dag;
        dag.join(&row.room_id, &via, ghost, Object::new()).await?;
        say_encrypted(core, &row.room_id, ghost, &row.user).await
    };
    let Err(refusal) = told.await else { return Ok(()) };
    if core.now_ms().saturating_sub(row.stage_ts) <= SETTLES_MS {
        return Err(refusal);
    }
    tracing::info!(room = %row.room_id, %refusal, "nobody in an encrypted room is told why a ghost declines");
    Ok(())
}

/// Says in a Matrix room, as a ghost that is in it, that what is encrypted does not get to its user.
pub(super) async fn say_encrypted(core: &Core, room_id: &RoomId, ghost: &UserId, user: &UserId) -> Result<(), Refusal> {
    let body = format!(
        "{user} cannot take part in this room: it is encrypted, and {}, which carries messages to {}, does not carry encrypted ones. \
         Nothing that was said here was passed on. To reach {user}, create a room with encryption switched off and invite {ghost} there.",
        core.context.server_name,
        user.server_name(),
    );
    let draft = core.draft(ghost, "m.room.message", None, text("m.notice", &body));
    let sent = core.sides()?.rooms(Side::Matrix).send(room_id, vec![Outgoing { draft, effect: None }]).await.pop();
    sent.unwrap_or_else(|| Err(Refusal::Internal("nothing came of a notice".to_owned()))).map(drop)
}
