//! The Matrix room of an LM room that a remote hub keeps: the bot joins the log, then the room is made of the log's state,
//! and every member's ghost joins it. Each step looks at what is there, so that it can be done again after a crash.

use std::sync::Arc;
use std::time::Duration;

use ruma::{OwnedRoomId, OwnedUserId, RoomId, ServerName, UserId};

use super::core::Core;
use super::create::save;
use super::effect;
use super::portal::{Portal, Request};
use super::rooms;
use super::side::{MEMBER, State};
use super::translate::member_content;
use super::users::{Known, Who};
use super::{access, acl, alias, carry};
use crate::config::EncryptionPolicy;
use crate::event::Object;
use crate::identity::Side;
use crate::lm::Role;
use crate::refusal::Refusal;
use crate::seam::Outgoing;
use crate::store::portals::PortalRow;

/// How many ghosts join in one call.
const BATCH: usize = 50;
/// How long the hub may take to say where an alias leads.
const DIRECTORY: Duration = Duration::from_secs(10);

/// Makes what is still missing of the portal in `row`.
pub(super) async fn make(core: &Arc<Core>, row: &mut PortalRow) -> Result<(), Refusal> {
    let room_id = row.lm_room_id.clone().ok_or_else(|| Refusal::Internal("the LM room is missing".to_owned()))?;
    let made = make_of(core, row, &room_id).await;
    if made.as_ref().is_err_and(|refusal| !refusal.is_transient()) {
        // Nobody is served by a bot in a room without a portal.
        let via = vec![row.lm_hub.clone()];
        if let Ok(Some(_)) = core.sides()?.lm.room(&room_id).await {
            let _ = core.sides()?.lm.leave(&room_id, core.users.bot(), &via).await;
        }
    }
    made
}

async fn make_of(core: &Arc<Core>, row: &mut PortalRow, room_id: &OwnedRoomId) -> Result<(), Refusal> {
    let request: Request = serde_json::from_slice(&row.request).unwrap_or_default();
    let sides = core.sides()?;
    let state = join(core, room_id, &request).await?;
    let room = sides.lm.room(room_id).await?.ok_or_else(|| Refusal::UnknownRoom(room_id.to_string()))?;
    let (Role::Participant { hub } | Role::GraphServer { hub }) = room.role else {
        return Err(Refusal::Forbidden(format!("{room_id} is hubbed by this gateway")));
    };
    access::takes_part(&core.context.config.access, Side::Lm, &hub)?;
    refuse_encrypted(core, &state)?;
    if row.alias.is_none()
        && let Some(alias) = natural_alias(core, room_id, &hub, &state).await
    {
        save(core, row, |row| row.alias = Some(alias)).await?;
    }
    let members: Vec<OwnedUserId> = users(&state);
    let known = core.users.all(&core.context.store, Side::Lm, &members).await?;
    core.users.keep(&core.context.store, Side::Lm, &members).await?;
    if row.matrix_room_id.is_none() || row.lm_hub != hub {
        let made = match row.matrix_room_id.clone() {
            Some(room_id) => room_id,
            None => {
                let alias = row.alias.clone().or_else(|| alias::of_room(room_id));
                sides.dag.create_room(rooms::matrix_of_lm(core, &state, &known, alias.as_deref())?).await?
            }
        };
        save(core, row, |row| {
            row.matrix_room_id = Some(made);
            row.lm_hub = hub;
        })
        .await?;
    }
    let shadow = PortalRow { state: "active".to_owned(), ..row.clone() };
    let portal = Portal::from_row(&shadow, &core.context.server_name)?
        .ok_or_else(|| Refusal::Internal("a room of the portal is missing".to_owned()))?;
    join_ghosts(core, &portal, &state, &known).await
}

/// The alias at the gateway that stands for the LM room's own, if its hub knows that one and nobody has taken it here.
async fn natural_alias(core: &Core, room_id: &RoomId, hub: &ServerName, state: &State) -> Option<String> {
    let canonical = state.content("m.room.canonical_alias")?.get("alias")?.as_str()?;
    let name = alias::localpart_at(canonical, hub)?;
    let localpart = alias::of_alias(name, hub);
    if alias::parse(&localpart).is_none() || core.registry.of_alias(&localpart).is_some() {
        return None;
    }
    // Anybody may write any alias into a room's state.
    let asked = core.sides().ok()?.lm.query_directory(hub, canonical);
    let target = tokio::time::timeout(DIRECTORY, asked).await.ok()?.ok()?;
    (target.room_id == *room_id).then_some(localpart)
}

/// The state of the LM room, which the bot has joined.
async fn join(core: &Core, room_id: &OwnedRoomId, request: &Request) -> Result<State, Refusal> {
    let lm = &core.sides()?.lm;
    let bot = core.users.bot();
    if lm.room(room_id).await?.is_some() {
        let state = State::Log(lm.state(room_id).await?);
        if state.membership(bot) == "join" {
            return Ok(state);
        }
    }
    let mut content = Object::new();
    content.insert("membership".to_owned(), "join".into());
    content.insert("displayname".to_owned(), super::BOT_NAME.into());
    lm.join(room_id, bot, &request.via, content).await?;
    Ok(State::Log(lm.state(room_id).await?))
}

fn refuse_encrypted(core: &Core, state: &State) -> Result<(), Refusal> {
    let EncryptionPolicy::Refuse = core.context.config.portals.encryption;
    let Some(encryption) = state.content("m.room.create").and_then(|content| content.get("encryption")) else {
        return Ok(());
    };
    let algorithm = encryption.get("algorithm").and_then(|name| name.as_str()).unwrap_or("unknown");
    let algorithm: String = algorithm.chars().take(100).collect();
    Err(Refusal::Encryption(algorithm))
}

fn users(state: &State) -> Vec<OwnedUserId> {
    let members = state.members();
    let levels = state.content(super::power::POWER_LEVELS).and_then(|content| content.get("users")?.as_object());
    let named = levels.into_iter().flatten().map(|(user, _)| user.as_str());
    let creator = state.get("m.room.create", "").map(|entry| entry.sender.as_str());
    let all = members.iter().map(|entry| entry.state_key).chain(named).chain(creator);
    all.filter_map(|user| UserId::parse(user).ok()).collect()
}

/// Every LM member's ghost joins the Matrix room, as the image of the member's join.
async fn join_ghosts(core: &Arc<Core>, portal: &Portal, state: &State, known: &Known) -> Result<(), Refusal> {
    let rooms = core.sides()?.rooms(Side::Matrix);
    let room_id = &portal.matrix_room_id;
    let there = rooms.state(room_id).await?;
    let public = carry::is_public(&there);
    let list = acl::of(core, state).await;
    let mut outgoing: Vec<Outgoing> = Vec::new();
    let (mut done, total) = (0_usize, known.len());
    for entry in state.members() {
        let Ok(user) = <&UserId>::try_from(entry.state_key) else { continue };
        let Some(Who::Native { ghost }) = known.get(user) else { continue };
        if entry.membership() != "join" || there.membership(ghost) == "join" {
            continue;
        }
        let server = user.server_name();
        if access::takes_part(&core.context.config.access, Side::Lm, server).is_err()
            || list.as_ref().is_some_and(|list| !list.allows(server))
        {
            continue;
        }
        if core.budgets.ghost(&core.context.config.budgets, portal.number(), server, core.now_ms(), false).is_err() {
            // Who is left out comes by repair, as the budget allows.
            continue;
        }
        if !public && there.membership(ghost) != "invite" {
            let draft = core.member(core.users.bot(), ghost, "invite");
            outgoing.push(Outgoing { draft, effect: None });
        }
        let effect = effect::joined(core, portal, Side::Lm, entry.event_id.to_owned()).await?;
        let content = member_content(entry.content, "join");
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
