//! Who was invited comes in: the ghost joins the room that it was invited into, and the room across is filled, before the user's join is
//! answered. From then on the portal is like any other, but that in the room that lives elsewhere ghosts alone are.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use ruma::{OwnedServerName, UserId};

use super::asking::{say_encrypted, soon};
use crate::bridge::carry::{ENCRYPTION, stranger};
use crate::bridge::core::Core;
use crate::bridge::gate::{self, Spared};
use crate::bridge::portal::{Portal, PortalState};
use crate::bridge::registry::Entry;
use crate::bridge::side::{Event, MEMBER, State};
use crate::bridge::translate::member_content;
use crate::bridge::users::Who;
use crate::bridge::{access, acl, from_lm, from_matrix, history, populate, repair};
use crate::identity::Side;
use crate::lm::Role;
use crate::refusal::Refusal;
use crate::seam::{Handshake, Membership, Stage as Stages};
use crate::store::invitations::{self, Invitation, Next, Stage};
use crate::store::portals;

/// How long who comes in waits. What was begun goes on, and is there when they try again.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long it may take to get what was said before.
const HISTORY: Duration = Duration::from_secs(8);

/// The gate of a pending portal's room across: only who is invited comes in, and the ghost before them. In a box, here and below: futures
/// inside each other get too deep for the compiler.
pub(in crate::bridge) fn gate<'a>(
    core: &'a Arc<Core>,
    entry: &'a Arc<Entry>,
    handshake: &'a Handshake,
) -> BoxFuture<'a, Result<(), Refusal>> {
    Box::pin(pass(core, entry, handshake))
}

async fn pass(core: &Arc<Core>, entry: &Arc<Entry>, handshake: &Handshake) -> Result<(), Refusal> {
    let portal = entry.portal();
    let user = &handshake.user_id;
    let ghost = match core.users.who(&core.context.store, handshake.side, user).await? {
        Who::Native { ghost } => ghost,
        Who::Appservice | Who::Ghost { .. } | Who::Bot | Who::Stranger => return Err(stranger(user)),
    };
    access::takes_part(&core.context.config.access, handshake.side, user.server_name())?;
    let closed = || {
        let (portal_id, room_id) = (&portal.portal_id, &handshake.room_id);
        Refusal::Forbidden(format!(
            "{user} is not invited into {room_id}, which is {portal_id}, a portal that waits for who is"
        ))
    };
    let side = portal.elsewhere().filter(|side| side.other() == handshake.side).ok_or_else(closed)?;
    if handshake.membership != Membership::Join {
        return Err(closed());
    }
    let row = invitations::one(&core.context.store, side, portal.room(side), user).await?.ok_or_else(closed)?;
    if matches!(row.stage, Stage::Refused | Stage::Retracted) {
        let reason = row.reason.as_deref().unwrap_or("it was taken back");
        return Err(Refusal::Forbidden(format!("the invite of {user} is over: {reason}")));
    }
    if handshake.stage == Stages::Make {
        return Ok(());
    }
    let spared = Spared::new(core, portal.room(side).to_owned(), ghost.clone());
    let entering =
        Entering { core: core.clone(), entry: entry.clone(), side, row, ghost, handshake: handshake.clone() };
    let inner = core.clone();
    let mut enter =
        Box::pin(async move { inner.in_task(async move { entering.enter().await.map(|()| entering) }).await });
    match tokio::time::timeout(PATIENCE, &mut enter).await {
        Ok(Ok(_)) => {
            gate::look_back(core, entry, spared);
            Ok(())
        }
        Ok(Err(refusal)) => Err(in_words(side, refusal)),
        Err(_) => {
            // It goes on, and who tries again in a moment finds it done.
            let (inner, entry) = (core.clone(), entry.clone());
            core.spawn(async move {
                let _ = enter.await;
                gate::look_back(&inner, &entry, spared);
            });
            let waited = PATIENCE.as_secs();
            Err(Refusal::Forbidden(format!(
                "the room on the other side could not be joined within {waited} s: try again"
            )))
        }
    }
}

/// What who wanted to come in is told.
fn in_words(side: Side, refusal: Refusal) -> Refusal {
    let what = match side {
        Side::Matrix => "the Matrix room that this invite is from",
        Side::Lm => "the LM room that this invite is from",
    };
    match refusal.is_transient() {
        true => Refusal::Forbidden(format!("{what} cannot be joined now, try again: {refusal}")),
        false => Refusal::Forbidden(format!("{what} cannot be joined: {refusal}")),
    }
}

/// The gate as it is by then. As a type of its own, since it is what led here.
fn at_the_gate<'a>(core: &'a Arc<Core>, handshake: &'a Handshake) -> BoxFuture<'a, Result<(), Refusal>> {
    Box::pin(gate::gate(core, handshake))
}

/// Somebody who comes in.
struct Entering {
    core: Arc<Core>,
    entry: Arc<Entry>,
    /// The side of the room that the ghost was invited into.
    side: Side,
    row: Invitation,
    ghost: ruma::OwnedUserId,
    handshake: Handshake,
}

impl Entering {
    async fn enter(&self) -> Result<(), Refusal> {
        let core = &self.core;
        let _alone = self.entry.opening.lock().await;
        if self.entry.portal().state != PortalState::Pending {
            // Somebody else was quicker, and the room is there.
            return at_the_gate(core, &self.handshake).await;
        }
        if !self.set_stage(&self.row, Stage::Entering, None).await? {
            return Err(Refusal::Forbidden(format!("the invite of {} is over", self.row.user)));
        }
        let entering = Invitation { stage: Stage::Entering, ..self.row.clone() };
        let filling: BoxFuture<'_, Result<(), Refusal>> = Box::pin(self.fill());
        let Err(refusal) = filling.await else {
            let settled =
                core.context.store.write(move |tx| Box::pin(async move { invitations::settle(tx, &entering).await }));
            settled.await?;
            soon(core, self.side, &self.row.room_id);
            return Ok(());
        };
        let stage = match refusal.is_transient() {
            true => Stage::Open,
            // The room has said its last word: nobody is to wait for another.
            false => Stage::Retracted,
        };
        self.set_stage(&entering, stage, Some(refusal.to_string())).await?;
        soon(core, self.side, &self.row.room_id);
        Err(refusal)
    }

    async fn set_stage(&self, row: &Invitation, stage: Stage, reason: Option<String>) -> Result<bool, Refusal> {
        let next = Next { stage, code: None, reason, image: None, now_ms: self.core.now_ms() };
        let row = row.clone();
        let write = self
            .core
            .context
            .store
            .write(move |tx| Box::pin(async move { invitations::set_stage(tx, &row, &next).await }));
        Ok(write.await?)
    }

    /// Joins the room that lives elsewhere, and makes the room across like it.
    async fn fill(&self) -> Result<(), Refusal> {
        let (core, side) = (&self.core, self.side);
        let state = self.join().await?;
        let hub = match self.check(&state).await {
            Ok(hub) => hub,
            Err(refusal) => {
                self.leave_again(&refusal).await;
                return Err(refusal);
            }
        };
        let portal = Portal { lm_hub: hub.clone(), state: PortalState::Active, ..Portal::clone(&self.entry.portal()) };
        let members = populate::users(&state);
        let known = core.users.all(&core.context.store, side, &members).await?;
        core.users.keep(&core.context.store, side, &members).await?;
        populate::join_ghosts(core, &portal, side, &state, &known).await?;
        self.say_again(&portal, &state).await?;
        let number = self.entry.number;
        if hub != self.entry.portal().lm_hub {
            let stored = hub.clone();
            let write = core
                .context
                .store
                .write(move |tx| Box::pin(async move { portals::set_hub(tx, number, &stored).await }));
            write.await?;
            core.registry.put(number, Portal { lm_hub: hub, ..Portal::clone(&self.entry.portal()) });
        }
        core.set_state(&self.entry, PortalState::Active, None).await?;
        tracing::info!(portal = portal.portal_id, user = %self.row.user, "a pending portal is in use");
        if let Err(refusal) = repair::run(core, &self.entry).await {
            tracing::info!(portal = portal.portal_id, %refusal, "the state follows later");
            repair::soon(core, &self.entry);
        }
        for side in [Side::Matrix, Side::Lm] {
            core.call_entry(&self.entry, side);
        }
        Ok(())
    }

    /// Has the ghost join; the room's state.
    async fn join(&self) -> Result<State, Refusal> {
        let (core, side, room_id) = (&self.core, self.side, &self.row.room_id);
        let (sides, via) = (core.sides()?, [self.row.via.clone()]);
        core.users.keep(&core.context.store, side.other(), [&self.row.user]).await?;
        let is_known = match side {
            Side::Matrix => sides.dag.room(room_id).await?.is_some(),
            Side::Lm => sides.lm.room(room_id).await?.is_some(),
        };
        let rooms = sides.rooms(side);
        let own = [(MEMBER.to_owned(), self.ghost.to_string())];
        if is_known && rooms.pick(room_id, &own).await?.membership(&self.ghost) == "join" {
            return rooms.state(room_id).await;
        }
        let content = member_content(&self.handshake.content, "join", core.media(side));
        match side {
            Side::Matrix => drop(sides.dag.join(room_id, &via, &self.ghost, content).await?),
            Side::Lm => drop(sides.lm.join(room_id, &self.ghost, &via, content).await?),
        }
        rooms.state(room_id).await
    }

    /// Whether a room with this state may be bridged; who keeps its log.
    async fn check(&self, state: &State) -> Result<OwnedServerName, Refusal> {
        let (core, own) = (&self.core, &self.core.context.server_name);
        let hub = match self.side {
            Side::Matrix => {
                if let Some(encryption) = state.content(ENCRYPTION) {
                    return Err(Refusal::Encryption(from_matrix::encrypted(encryption)));
                }
                own.clone()
            }
            Side::Lm => {
                let room = core.sides()?.lm.room(&self.row.room_id).await?;
                let room = room.ok_or_else(|| Refusal::UnknownRoom(self.row.room_id.to_string()))?;
                from_lm::refuse_encrypted(core, state, matches!(room.role, Role::GraphServer { .. }))?;
                match room.role {
                    Role::Participant { hub } | Role::GraphServer { hub } => hub,
                    Role::Hub => return Err(Refusal::Forbidden(format!("{} is hubbed by this gateway", room.room_id))),
                }
            }
        };
        if self.side == Side::Lm {
            access::takes_part(&core.context.config.access, Side::Lm, &hub)?;
        }
        if acl::of(core, state).await.is_some_and(|list| !list.allows(own)) {
            return Err(Refusal::ServerAcl(own.to_string()));
        }
        Ok(hub)
    }

    /// What was said before the ghost came, as far as newcomers may read it.
    async fn say_again(&self, portal: &Portal, state: &State) -> Result<(), Refusal> {
        let (core, limit) = (&self.core, history::limit(&self.core));
        if limit == 0 {
            return Ok(());
        }
        let (sides, room_id) = (core.sides()?, &self.row.room_id);
        let past = async {
            Ok(match self.side {
                Side::Matrix => {
                    let past = sides.dag.past(room_id, &self.ghost, std::slice::from_ref(&self.row.via), limit).await?;
                    past.iter().map(|event| Event::from(&**event)).collect()
                }
                Side::Lm => sides.lm.past(room_id, &self.ghost, limit).await?.iter().map(Event::from).collect(),
            })
        };
        let past: Result<Result<Vec<Event>, Refusal>, _> = tokio::time::timeout(HISTORY, past).await;
        match past {
            Ok(Ok(events)) => history::import(core, portal, self.side, state, events).await,
            Ok(Err(refusal)) => {
                tracing::info!(room = %room_id, %refusal, "what was said before cannot be had");
                Ok(())
            }
            Err(_) => {
                tracing::info!(room = %room_id, "what was said before could not be had in time");
                Ok(())
            }
        }
    }

    /// The room cannot be bridged: the ghost leaves it, saying why.
    async fn leave_again(&self, refusal: &Refusal) {
        let (core, room_id, ghost): (_, _, &UserId) = (&self.core, &self.row.room_id, &self.ghost);
        let left = async {
            let reason: String = refusal.to_string().chars().take(300).collect();
            let via = [self.row.via.clone()];
            match self.side {
                Side::Matrix => {
                    if matches!(refusal, Refusal::Encryption(_)) && core.context.config.portals.notices {
                        say_encrypted(core, room_id, ghost, &self.row.user).await?;
                    }
                    core.sides()?.dag.leave(room_id, ghost, &via, Some(&reason)).await
                }
                Side::Lm => core.sides()?.lm.leave_because(room_id, ghost, &via, Some(&reason)).await,
            }
        };
        if let Err(refusal) = left.await {
            tracing::warn!(room = %room_id, %ghost, %refusal, "a ghost could not leave a room that gets no portal");
        }
    }
}
