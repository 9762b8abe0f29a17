//! The Matrix room of an LM room that a remote hub keeps: the bot joins the log, then the room is made of the log's state,
//! and every member's ghost joins it. Each step looks at what is there, so that it can be done again after a crash.

use std::sync::Arc;
use std::time::Duration;

use ruma::{OwnedRoomId, RoomId, ServerName};

use super::carry::ENCRYPTION;
use super::core::Core;
use super::create::save;
use super::from_matrix::encrypted;
use super::portal::{Portal, Request};
use super::side::{Event, State};
use super::{access, alias, history, populate, rooms};
use crate::config::EncryptionPolicy;
use crate::event::Object;
use crate::identity::Side;
use crate::lm::Role;
use crate::refusal::Refusal;
use crate::store::portals::PortalRow;

/// After which pauses a hub that invited the bot, and does not let it in, is asked again: it may write the invite down when it has the
/// bot's signature, and that may take a while.
const INVITE_PAUSES_MS: [u64; 7] = [500, 1_000, 2_000, 4_000, 8_000, 16_000, 30_000];
/// How long the hub may take to say where an alias leads.
const DIRECTORY: Duration = Duration::from_secs(10);

/// Makes what is still missing of the portal in `row`.
pub(super) async fn make(core: &Arc<Core>, row: &mut PortalRow) -> Result<(), Refusal> {
    let room_id = row.lm_room_id.clone().ok_or_else(|| Refusal::Internal("the LM room is missing".to_owned()))?;
    let made = make_of(core, row, &room_id).await;
    if made.as_ref().is_err_and(|refusal| !refusal.is_transient()) {
        // Nobody is served by a bot in a room without a portal, and nobody is to wait for it where it does not come.
        let (via, lm) = (vec![row.lm_hub.clone()], &core.sides()?.lm);
        if is_invited(row) || matches!(lm.room(&room_id).await, Ok(Some(_))) {
            let _ = lm.leave(&room_id, core.users.bot(), &via).await;
        }
    }
    made
}

fn is_invited(row: &PortalRow) -> bool {
    serde_json::from_slice(&row.request).is_ok_and(|request: Request| request.invited)
}

async fn make_of(core: &Arc<Core>, row: &mut PortalRow, room_id: &OwnedRoomId) -> Result<(), Refusal> {
    let request: Request = serde_json::from_slice(&row.request).unwrap_or_default();
    let sides = core.sides()?;
    let state = join(core, room_id, &request).await?;
    let room = sides.lm.room(room_id).await?.ok_or_else(|| Refusal::UnknownRoom(room_id.to_string()))?;
    let (Role::Participant { hub } | Role::GraphServer { hub }) = room.role.clone() else {
        return Err(Refusal::Forbidden(format!("{room_id} is hubbed by this gateway")));
    };
    access::takes_part(&core.context.config.access, Side::Lm, &hub)?;
    refuse_encrypted(core, &state, matches!(room.role, Role::GraphServer { .. }))?;
    if row.alias.is_none()
        && let Some(alias) = natural_alias(core, room_id, &hub, &state).await
    {
        save(core, row, |row| row.alias = Some(alias)).await?;
    }
    let members = populate::users(&state);
    let known = core.users.all(&core.context.store, Side::Lm, &members).await?;
    core.users.keep(&core.context.store, Side::Lm, &members).await?;
    if row.matrix_room_id.is_none() || row.lm_hub != hub {
        let made = match row.matrix_room_id.clone() {
            Some(room_id) => room_id,
            None => {
                let alias = row.alias.clone().or_else(|| alias::of_room(room_id));
                sides.dag.create_room(rooms::matrix_of_lm(core, &state, &known, alias.as_deref(), &request)?).await?
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
    populate::join_ghosts(core, &portal, Side::Lm, &state, &known).await?;
    let limit = history::limit(core);
    if limit == 0 {
        return Ok(());
    }
    match sides.lm.past(room_id, core.users.bot(), limit).await {
        Ok(events) => history::import(core, &portal, Side::Lm, &state, events.iter().map(Event::from).collect()).await,
        Err(refusal) => {
            tracing::info!(room = %room_id, %refusal, "what was said before cannot be had");
            Ok(())
        }
    }
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
    let mut pauses = INVITE_PAUSES_MS.into_iter().filter(|_| request.invited);
    while let Err(refusal) = lm.join(room_id, bot, &request.via, content.clone()).await {
        let Some(pause) = pauses.next() else { return Err(refusal) };
        tracing::debug!(room = %room_id, %refusal, "the bot is not let in yet");
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
    Ok(State::Log(lm.state(room_id).await?))
}

/// An LM room says in its first event how it is encrypted; one that Matrix servers share, also later and as they do.
pub(super) fn refuse_encrypted(core: &Core, state: &State, is_shared: bool) -> Result<(), Refusal> {
    let EncryptionPolicy::Refuse = core.context.config.portals.encryption;
    if let Some(encryption) = state.content(ENCRYPTION).filter(|_| is_shared) {
        return Err(Refusal::Encryption(encrypted(encryption)));
    }
    let Some(encryption) = state.content("m.room.create").and_then(|content| content.get("encryption")) else {
        return Ok(());
    };
    let algorithm = encryption.get("algorithm").and_then(|name| name.as_str()).unwrap_or("unknown");
    let algorithm: String = algorithm.chars().take(100).collect();
    Err(Refusal::Encryption(algorithm))
}
