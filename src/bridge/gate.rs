//! The gate of handshakes: a change of membership that passes through the gateway is asked of both sides before it is
//! accepted, so that nobody is in one room of a portal whom the other would not have.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use ruma::{OwnedRoomId, OwnedUserId, UserId};

use super::carry::{is_public, stranger};
use super::core::Core;
use super::portal::{Portal, PortalState};
use super::registry::Entry;
use super::side::{Event, MEMBER, State};
use super::translate::member_content;
use super::users::Who;
use super::{access, acl, loops, pending, repair};
use crate::event::Object;
use crate::identity::Side;
use crate::lm::Appended;
use crate::refusal::Refusal;
use crate::seam::{Handshake, Membership, Stage};

/// The type of the events that say who may join.
const JOIN_RULES: &str = "m.room.join_rules";
/// How long a join waits for the hub: less than its echo is waited for, so that a hub that is away is told of in these words.
const HUB_PATIENCE: Duration = Duration::from_secs(15);
/// After this it is looked whether the join or knock that was let in has come.
const LOOK_BACK: Duration = Duration::from_secs(60);

/// Whether the other side has the user too.
pub(super) async fn gate(core: &Arc<Core>, handshake: &Handshake) -> Result<(), Refusal> {
    let Some(entry) = core.registry.of_room(handshake.side, &handshake.room_id) else {
        return match core.registry.watches(handshake.side, &handshake.room_id) {
            true => Err(Refusal::Forbidden("the portal of this room is still being made".to_owned())),
            false if core.spaces.contains(&handshake.room_id) => {
                access::takes_part(&core.context.config.access, handshake.side, handshake.user_id.server_name())
            }
            false => Ok(()),
        };
    };
    if handshake.membership == Membership::Leave {
        return Ok(());
    }
    let portal = entry.portal();
    if portal.state == PortalState::Pending {
        return pending::gate(core, &entry, handshake).await;
    }
    if !portal.state.carries() {
        let reason = portal.reason.as_deref().unwrap_or("no reason is recorded");
        return Err(Refusal::Forbidden(format!("the portal of this room is {}: {reason}", portal.state.as_str())));
    }
    let user = &handshake.user_id;
    let ghost = match core.users.who(&core.context.store, handshake.side, user).await? {
        Who::Native { ghost } => ghost,
        Who::Appservice => return Ok(()),
        Who::Ghost { .. } | Who::Bot | Who::Stranger => return Err(stranger(user)),
    };
    access::takes_part(&core.context.config.access, handshake.side, user.server_name())?;
    let mut keys = vec![(acl::SERVER_ACL.to_owned(), String::new())];
    keys.extend(loops::key(user));
    let near = core.sides()?.rooms(handshake.side).pick(&handshake.room_id, &keys).await?;
    let across = handshake.side.other();
    keys.push((MEMBER.to_owned(), ghost.to_string()));
    let far = core.sides()?.rooms(across).pick(portal.room(across), &keys).await?;
    acl::both(core, &near, &far, user).await?;
    let at_hub =
        portal.lm_hub != core.context.server_name && handshake.side == Side::Matrix && handshake.stage == Stage::Send;
    if matches!(handshake.membership, Membership::Join | Membership::Knock) && far.member(&ghost).is_none() {
        let (limits, server) = (&core.context.config.budgets, user.server_name());
        // Elsewhere it counts when it crosses.
        core.budgets.ghost(limits, entry.number, server, core.now_ms(), !at_hub)?;
    }
    match handshake.membership {
        Membership::Join if at_hub => {
            core.users.keep(&core.context.store, handshake.side, [user]).await?;
            join_at_hub(core, &entry, &ghost, &handshake.content).await
        }
        // The Matrix room lives elsewhere and decides who comes in.
        Membership::Join if !portal.lets_in(across) => match handshake.stage {
            Stage::Make => may_join_there(core, &portal, &ghost).await,
            Stage::Send => {
                core.users.keep(&core.context.store, handshake.side, [user]).await?;
                join_there(core, &entry, &ghost, &handshake.content).await
            }
        },
        Membership::Join => may_join(core, &portal, across, &ghost).await,
        Membership::Knock if at_hub => {
            core.users.keep(&core.context.store, handshake.side, [user]).await?;
            knock_at_hub(core, &entry, user, &ghost, &handshake.content).await
        }
        Membership::Knock => {
            let rooms = core.sides()?.rooms(handshake.side.other());
            let draft = core.member(&ghost, &ghost, "knock");
            rooms.check(portal.room(handshake.side.other()), &draft).await
        }
        Membership::Invite | Membership::Ban | Membership::Leave => Ok(()),
    }
}

/// Whether a ghost could join the room on `side`, after an invite by the bot where it takes one.
async fn may_join(core: &Core, portal: &Portal, side: Side, ghost: &UserId) -> Result<(), Refusal> {
    let rooms = core.sides()?.rooms(side);
    let room = portal.room(side);
    let state = rooms.state(room).await?;
    if state.membership(ghost) == "join" {
        return Ok(());
    }
    let draft = match needs_invite(&state, ghost) {
        true => core.member(core.users.bot(), ghost, "invite"),
        false => core.member(ghost, ghost, "join"),
    };
    rooms.check(room, &draft).await
}

fn needs_invite(state: &State, ghost: &UserId) -> bool {
    !is_public(state) && state.membership(ghost) != "invite"
}

/// Whether a Matrix room that lives elsewhere would have a ghost now, as far as can be told without asking other servers.
async fn may_join_there(core: &Core, portal: &Portal, ghost: &UserId) -> Result<(), Refusal> {
    let rooms = core.sides()?.rooms(Side::Matrix);
    let keys = [(MEMBER.to_owned(), ghost.to_string()), (JOIN_RULES.to_owned(), String::new())];
    let state = rooms.pick(&portal.matrix_room_id, &keys).await?;
    let rule = join_rule(&state);
    if state.membership(ghost) == "join" || (rule.ends_with("restricted") && state.membership(ghost) != "ban") {
        // Who meets the conditions of a restricted room is for its servers to say.
        return Ok(());
    }
    let judged = rooms.check(&portal.matrix_room_id, &core.member(ghost, ghost, "join")).await;
    judged.map_err(|refusal| in_words(portal, ghost, &state, refusal))
}

fn join_rule(state: &State) -> &str {
    state.content(JOIN_RULES).and_then(|content| content.get("join_rule")?.as_str()).unwrap_or("invite")
}

/// Why a Matrix room does not have a ghost, so that its user knows what to do.
fn in_words(portal: &Portal, ghost: &UserId, state: &State, refusal: Refusal) -> Refusal {
    let room = &portal.matrix_room_id;
    match (&refusal, state.membership(ghost), join_rule(state)) {
        _ if refusal.is_transient() => refusal,
        (_, "ban", _) => Refusal::Forbidden(format!("{ghost} is banned from {room}, the Matrix room of this portal")),
        (_, _, "public") => refusal,
        (_, _, rule) => Refusal::Forbidden(format!(
            "the Matrix room of this portal, {room}, has the join rule {rule:?}, and {ghost} is not invited there: {refusal}"
        )),
    }
}

/// Has the ghost join a Matrix room that lives elsewhere, before its user's join is taken. Where the room has conditions, another server
/// of the room is asked. A join for whose user there is none in the end is left again.
async fn join_there(core: &Arc<Core>, entry: &Arc<Entry>, ghost: &UserId, content: &Object) -> Result<(), Refusal> {
    let portal = entry.portal();
    let keys = [(MEMBER.to_owned(), ghost.to_string()), (JOIN_RULES.to_owned(), String::new())];
    let state = core.sides()?.rooms(Side::Matrix).pick(&portal.matrix_room_id, &keys).await?;
    if state.membership(ghost) == "join" {
        return Ok(());
    }
    let spared = Spared::new(core, portal.matrix_room_id.clone(), ghost.to_owned());
    let (dag, content) = (core.sides()?.dag.clone(), member_content(content, "join", core.media(Side::Matrix)));
    let (room_id, user, joining) = (portal.matrix_room_id.clone(), ghost.to_owned(), core.clone());
    let mut join =
        Box::pin(async move { joining.in_task(async move { dag.join(&room_id, &[], &user, content).await }).await });
    match tokio::time::timeout(HUB_PATIENCE, &mut join).await {
        Ok(Ok(_)) => {
            wait_for_join(core, entry, ghost.to_owned(), spared);
            Ok(())
        }
        Ok(Err(refusal)) => Err(in_words(&portal, ghost, &state, refusal)),
        Err(_) => {
            let (inner, entry) = (core.clone(), entry.clone());
            core.spawn(async move {
                let _ = join.await;
                drop(spared);
                repair::soon(&inner, &entry);
            });
            let waited = HUB_PATIENCE.as_secs();
            Err(Refusal::Forbidden(format!(
                "the servers of {} have not answered the join in {waited} s",
                portal.matrix_room_id
            )))
        }
    }
}

/// Keeps repair from a ghost until its user's join is in the log, which it should be in a moment.
fn wait_for_join(core: &Arc<Core>, entry: &Arc<Entry>, ghost: OwnedUserId, spared: Spared) {
    let (inner, entry) = (core.clone(), entry.clone());
    core.spawn(async move {
        let tries = LOOK_BACK.as_secs();
        for _ in 0..tries {
            tokio::time::sleep(Duration::from_secs(1)).await;
            if has_come(&inner, &entry, &ghost).await.unwrap_or(false) {
                return;
            }
        }
        drop(spared);
        repair::soon(&inner, &entry);
    });
}

/// Whether the user for whom a ghost is in the Matrix room is in the log.
async fn has_come(core: &Core, entry: &Entry, ghost: &UserId) -> Result<bool, Refusal> {
    let Who::Ghost { user } = core.users.who(&core.context.store, Side::Matrix, ghost).await? else { return Ok(false) };
    let key = (MEMBER.to_owned(), user.to_string());
    let state = core.sides()?.rooms(Side::Lm).pick(&entry.portal().lm_room_id, &[key]).await?;
    Ok(state.membership(&user) == "join")
}

/// Has the ghost knock at the hub, and waits for that. A knock that comes too late is taken back.
async fn knock_at_hub(
    core: &Arc<Core>,
    entry: &Arc<Entry>,
    user: &UserId,
    ghost: &UserId,
    content: &Object,
) -> Result<(), Refusal> {
    let portal = entry.portal();
    let spared = Spared::new(core, portal.lm_room_id.clone(), ghost.to_owned());
    let lm = core.sides()?.lm.clone();
    // Before the state, which holds what came back meanwhile.
    let key = (MEMBER.to_owned(), ghost.to_string());
    let coming = lm.on_its_way(&portal.lm_room_id, std::slice::from_ref(&key)).await?;
    let leaves = coming.get(&key).is_some_and(|coming| coming.membership() != Some("knock"));
    let state = State::Log(lm.state_events(&portal.lm_room_id, &[key]).await?);
    if state.membership(ghost) == "knock" && !leaves {
        look_back(core, entry, spared);
        return Ok(());
    }
    let content = member_content(content, "knock", core.media(Side::Lm));
    let (room_id, via, sender) = (portal.lm_room_id.clone(), vec![portal.lm_hub.clone()], ghost.to_owned());
    let knocking = core.clone();
    let mut knock =
        Box::pin(
            async move { knocking.in_task(async move { lm.knock(&room_id, &sender, &via, content).await }).await },
        );
    match tokio::time::timeout(HUB_PATIENCE, &mut knock).await {
        Ok(Ok(_)) => {
            look_back(core, entry, spared);
            Ok(())
        }
        Ok(Err(refusal)) => Err(refusal),
        Err(_) => {
            let hub = portal.lm_hub.clone();
            let (inner, entry, user, ghost) = (core.clone(), entry.clone(), user.to_owned(), ghost.to_owned());
            core.spawn(async move {
                if knock.await.is_ok()
                    && let Err(refusal) = take_knock_back(&inner, &entry, &user, &ghost, spared).await
                {
                    tracing::warn!(portal = portal.portal_id, %ghost, %refusal, "a late knock could not be taken back");
                }
            });
            let waited = HUB_PATIENCE.as_secs();
            Err(Refusal::Forbidden(format!("the hub {hub} has not answered the knock in {waited} s")))
        }
    }
}

/// Takes back a ghost's knock for which nobody waited, unless the user has knocked again meanwhile, which found it there.
async fn take_knock_back(
    core: &Core,
    entry: &Entry,
    user: &UserId,
    ghost: &UserId,
    spared: Spared,
) -> Result<(), Refusal> {
    while spared.is_shared() {
        tokio::time::sleep(LOOK_BACK).await;
    }
    let portal = entry.portal();
    let key = (MEMBER.to_owned(), user.to_string());
    let here = core.sides()?.rooms(Side::Matrix).pick(&portal.matrix_room_id, &[key]).await?;
    if here.membership(user) == "knock" {
        return Ok(());
    }
    core.sides()?.lm.leave(&portal.lm_room_id, ghost, std::slice::from_ref(&portal.lm_hub)).await.map(drop)
}

/// Has the ghost join the LM room at its hub, and waits for that. A join that comes too late is left again.
async fn join_at_hub(core: &Arc<Core>, entry: &Arc<Entry>, ghost: &UserId, content: &Object) -> Result<(), Refusal> {
    let portal = entry.portal();
    let lm = core.sides()?.lm.clone();
    // Before the state, which holds what came back meanwhile.
    let key = (MEMBER.to_owned(), ghost.to_string());
    let coming = lm.on_its_way(&portal.lm_room_id, std::slice::from_ref(&key)).await?;
    let leaves = coming.get(&key).is_some_and(|coming| coming.membership() != Some("join"));
    let state = State::Log(lm.state(&portal.lm_room_id).await?);
    if state.membership(ghost) == "join" && !leaves {
        return Ok(());
    }
    let spared = Spared::new(core, portal.lm_room_id.clone(), ghost.to_owned());
    // Who is not let in by the bot needs somebody's invite, or the hub refuses the join.
    let lets_in = !portal.ghosts_alone || state.membership(core.users.bot()) == "join";
    if lets_in && (needs_invite(&state, ghost) || (leaves && !is_public(&state))) {
        let draft = core.member(core.users.bot(), ghost, "invite");
        core.send(&portal, Side::Lm, draft).await?;
    }
    let content = member_content(content, "join", core.media(Side::Lm));
    let (room_id, via, user) = (portal.lm_room_id.clone(), vec![portal.lm_hub.clone()], ghost.to_owned());
    let joining = core.clone();
    let mut join =
        Box::pin(async move { joining.in_task(async move { lm.join(&room_id, &user, &via, content).await }).await });
    // Whatever comes of it: who is refused here is not to stay there. Of a join that outlives this process its echo tells.
    let late = Late { core: core.clone(), entry: entry.clone(), ghost: ghost.to_owned(), spared };
    match tokio::time::timeout(HUB_PATIENCE, &mut join).await {
        Ok(Ok(_)) => {
            look_back(core, entry, late.spared);
            Ok(())
        }
        Ok(Err(refusal)) => {
            let why = refusal.clone();
            core.spawn(async move { late.leave_again(Err(why)).await });
            Err(refusal)
        }
        Err(_) => {
            core.spawn(async move { late.leave_again(join.await).await });
            let waited = HUB_PATIENCE.as_secs();
            Err(Refusal::Forbidden(format!("the hub {} has not answered the join in {waited} s", portal.lm_hub)))
        }
    }
}

/// A ghost's join for which nobody waits any more.
struct Late {
    core: Arc<Core>,
    entry: Arc<Entry>,
    ghost: OwnedUserId,
    spared: Spared,
}

impl Late {
    /// Has the ghost leave, unless it is certain that it has not come and will not. A leave goes the same way to the hub as
    /// the join and after it, so that also one that is still on its way is left again.
    async fn leave_again(self, joined: Result<Appended, Refusal>) {
        let Self { core, entry, ghost, spared } = self;
        let portal = entry.portal();
        let mut failed = false;
        if !joined.as_ref().is_err_and(|refusal| !refusal.is_transient()) {
            let left = match core.sides() {
                Ok(sides) => sides.lm.leave(&portal.lm_room_id, &ghost, std::slice::from_ref(&portal.lm_hub)).await,
                Err(refusal) => Err(refusal),
            };
            if let Err(refusal) = left {
                failed = true;
                tracing::warn!(portal = portal.portal_id, %ghost, %refusal, "a late join could not be left again");
            }
        }
        drop(spared);
        if failed {
            repair::soon(&core, &entry);
        }
    }
}

/// Whether an event is a ghost's join at a foreign hub for which no handshake waits: that was refused meanwhile, or was before
/// a restart. Repair looks whether the ghost is to stay.
pub(super) fn is_stray(core: &Core, portal: &Portal, event: &Event) -> bool {
    let joins = |(user, membership): (OwnedUserId, &str)| user == event.sender && membership == "join";
    if portal.lm_hub == core.context.server_name || event.lpdu_id.is_none() || !event.membership().is_some_and(joins) {
        return false;
    }
    let key = (event.room_id.clone(), event.sender.clone());
    !core.joining.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&key)
}

/// Looks a while later whether the join or knock for which the ghost has done the same has come; repair makes the ghost leave if a
/// join has not.
pub(super) fn look_back(core: &Arc<Core>, entry: &Arc<Entry>, spared: Spared) {
    let (inner, entry) = (core.clone(), entry.clone());
    core.spawn(async move {
        tokio::time::sleep(LOOK_BACK).await;
        drop(spared);
        repair::soon(&inner, &entry);
    });
}

/// How many handshakes wait for a ghost's join to a room, or its knock.
pub(super) type Joining = HashMap<(OwnedRoomId, OwnedUserId), usize>;

/// Keeps repair from a ghost as long as it lives.
pub(super) struct Spared {
    core: Arc<Core>,
    key: (OwnedRoomId, OwnedUserId),
}

impl Spared {
    pub(super) fn new(core: &Arc<Core>, room_id: OwnedRoomId, ghost: OwnedUserId) -> Self {
        let key = (room_id, ghost);
        spare(&mut core.joining.lock().unwrap_or_else(PoisonError::into_inner), &key);
        Self { core: core.clone(), key }
    }

    /// Whether another handshake of the same ghost waits, or its event is still to come.
    fn is_shared(&self) -> bool {
        let joining = self.core.joining.lock().unwrap_or_else(PoisonError::into_inner);
        joining.get(&self.key).is_some_and(|count| *count > 1)
    }
}

impl Drop for Spared {
    fn drop(&mut self) {
        spare_no_more(&mut self.core.joining.lock().unwrap_or_else(PoisonError::into_inner), &self.key);
    }
}

fn spare(joining: &mut Joining, key: &(OwnedRoomId, OwnedUserId)) {
    let count = joining.entry(key.clone()).or_default();
    *count = count.saturating_add(1);
}

/// The last of several handshakes of one ghost ends it.
fn spare_no_more(joining: &mut Joining, key: &(OwnedRoomId, OwnedUserId)) {
    if let Some(count) = joining.get_mut(key) {
        *count = count.saturating_sub(1);
        if *count == 0 {
            joining.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use ruma::{room_id, user_id};

    use super::*;

    #[test]
    fn a_ghost_is_spared_until_the_last_of_its_handshakes_ends() {
        let mut joining = Joining::new();
        let key = (room_id!("!r:h").to_owned(), user_id!("@g:h").to_owned());
        spare(&mut joining, &key);
        spare(&mut joining, &key);
        spare_no_more(&mut joining, &key);
        assert!(joining.contains_key(&key));
        spare_no_more(&mut joining, &key);
        spare_no_more(&mut joining, &key);
        assert!(joining.is_empty());
    }
}
