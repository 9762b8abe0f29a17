//! Who is in a room comes into the new room across: the ghosts of all members, as the budgets allow. Who is there already is passed
//! over, so that it can be done again after a crash.

use std::sync::Arc;

use ruma::{OwnedUserId, UserId};

use super::core::Core;
use super::portal::Portal;
use super::side::{MEMBER, State};
use super::translate::member_content;
use super::users::{Known, Who};
use super::{access, acl, carry, effect};
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::seam::Outgoing;

/// How many ghosts join in one call.
const BATCH: usize = 50;

/// Everybody who is somebody in a room with this state: its members, those to whom it gives power, its creators.
pub(super) fn users(state: &State) -> Vec<OwnedUserId> {
    let members = state.members();
    let levels = state.content(super::power::POWER_LEVELS).and_then(|content| content.get("users")?.as_object());
    let named = levels.into_iter().flatten().map(|(user, _)| user.as_str());
    let creator = state.get("m.room.create", "").map(|entry| entry.sender.as_str());
    let all = members.iter().map(|entry| entry.state_key).chain(named).chain(creator);
    let all = all.filter_map(|user| UserId::parse(user).ok());
    all.chain(super::power::sovereigns(state)).collect()
}

/// The ghost of every member of the room on `home`, which has this state, joins the room across, as the image of the member's join.
pub(super) async fn join_ghosts(
    core: &Arc<Core>,
    portal: &Portal,
    home: Side,
    state: &State,
    known: &Known,
) -> Result<(), Refusal> {
    let rooms = core.sides()?.rooms(home.other());
    let room_id = portal.room(home.other());
    let there = rooms.state(room_id).await?;
    let public = carry::is_public(&there);
    let list = acl::of(core, state).await;
    let mut outgoing: Vec<Outgoing> = Vec::new();
    let (mut done, total) = (0_usize, known.len());
    for entry in state.members() {
        let Ok(user) = <&UserId>::try_from(entry.state_key) else { continue };
        let Some(Who::Native { ghost }) = known.get(user) else { continue };
        let content = member_content(entry.content, "join", core.media(home.other()));
        let is_there = there.membership(ghost) == "join";
        let is_same = || there.member(ghost).is_some_and(|there| carry::same(there.content, &content));
        if entry.membership() != "join" || (is_there && is_same()) {
            continue;
        }
        let server = user.server_name();
        if access::takes_part(&core.context.config.access, home, server).is_err()
            || list.as_ref().is_some_and(|list| !list.allows(server))
        {
            continue;
        }
        if !is_there
            && core.budgets.ghost(&core.context.config.budgets, portal.number(), server, core.now_ms(), false).is_err()
        {
            // Who is left out comes by repair, as the budget allows.
            continue;
        }
        if !public && !matches!(there.membership(ghost), "invite" | "join") {
            let draft = core.member(core.users.bot(), ghost, "invite");
            outgoing.push(Outgoing { draft, effect: None });
        }
        let effect = effect::joined(core, portal, home, entry.event_id.to_owned()).await?;
        let draft = core.draft(ghost, MEMBER, Some(ghost.as_str()), content);
        outgoing.push(Outgoing { draft, effect });
        done += 1;
        if outgoing.len() >= BATCH {
            tracing::info!(portal = portal.portal_id, done, total, "ghosts join");
            all(rooms.send(room_id, std::mem::take(&mut outgoing)).await)?;
        }
    }
    all(rooms.send(room_id, outgoing).await)
}

/// The first failure that may pass: the making is broken off for it. Whoever's ghost may not join is left out.
fn all<T>(results: Vec<Result<T, Refusal>>) -> Result<(), Refusal> {
    for refusal in results.into_iter().filter_map(Result::err) {
        if refusal.is_transient() {
            return Err(refusal);
        }
        tracing::warn!(%refusal, "a ghost could not join");
    }
    Ok(())
}
