//! The LM room of a Matrix room that lives elsewhere: the bot joins the graph, then the room is made of the graph's state, hubbed here,
//! and every member's ghost joins it. Each step looks at what is there, so that it can be done again after a crash.

use std::sync::Arc;
use std::time::Duration;

use ruma::{OwnedRoomId, OwnedServerName};

use super::carry::ENCRYPTION;
use super::core::Core;
use super::create::save;
use super::portal::{Portal, Request};
use super::side::{Event, Key, MEMBER, State};
use super::{access, acl, history, populate, rooms};
use crate::config::EncryptionPolicy;
use crate::event::Object;
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::store::portals::PortalRow;

/// How often, and after how long each time, a room is asked again that invited the bot and does not let it in: it gets the invite when
/// the gateway has signed it.
const INVITE_TRIES: usize = 10;
const INVITE_PAUSE: Duration = Duration::from_millis(500);

/// Makes what is still missing of the portal in `row`.
pub(super) async fn make(core: &Arc<Core>, row: &mut PortalRow) -> Result<(), Refusal> {
    let room_id =
        row.matrix_room_id.clone().ok_or_else(|| Refusal::Internal("the Matrix room is missing".to_owned()))?;
    let made = make_of(core, row, &room_id).await;
    if made.as_ref().is_err_and(|refusal| !refusal.is_transient()) && !is_own(core, &room_id).await.unwrap_or(true) {
        // Nobody is served by a bot in a room without a portal. An invite that comes only now is for whoever waits for it.
        let dag = &core.sides()?.dag;
        if (Request::of(row).invited || matches!(dag.room(&room_id).await, Ok(Some(_))))
            && let Err(refusal) = dag.leave(&room_id, core.users.bot(), &[], None).await
        {
            tracing::debug!(room = %room_id, %refusal, "the bot did not leave a room that gets no portal");
        }
    }
    made
}

async fn make_of(core: &Arc<Core>, row: &mut PortalRow, room_id: &OwnedRoomId) -> Result<(), Refusal> {
    let request: Request = serde_json::from_slice(&row.request).unwrap_or_default();
    if is_own(core, room_id).await? {
        return Err(Refusal::Forbidden(format!("{room_id} is a room of this gateway's own")));
    }
    let state = join(core, room_id, &request).await?;
    if let Some(encryption) = state.content(ENCRYPTION) {
        let EncryptionPolicy::Refuse = core.context.config.portals.encryption;
        return Err(Refusal::Encryption(encrypted(encryption)));
    }
    if acl::of(core, &state).await.is_some_and(|list| !list.allows(&core.context.server_name)) {
        return Err(Refusal::ServerAcl(core.context.server_name.to_string()));
    }
    let members = populate::users(&state);
    let known = core.users.all(&core.context.store, Side::Matrix, &members).await?;
    core.users.keep(&core.context.store, Side::Matrix, &members).await?;
    if row.lm_room_id.is_none() {
        let made = core.sides()?.lm.create_room(rooms::lm_of_matrix(core, &state, &known, &request)).await?;
        save(core, row, |row| row.lm_room_id = Some(made)).await?;
    }
    let shadow = PortalRow { state: "active".to_owned(), ..row.clone() };
    let portal = Portal::from_row(&shadow, &core.context.server_name)?
        .ok_or_else(|| Refusal::Internal("a room of the portal is missing".to_owned()))?;
    populate::join_ghosts(core, &portal, Side::Matrix, &state, &known).await?;
    let limit = history::limit(core);
    if limit == 0 {
        return Ok(());
    }
    let bot = core.users.bot();
    match core.sides()?.dag.past(room_id, bot, &request.via, limit).await {
        Ok(events) => {
            let events = events.iter().map(|event| Event::from(&**event)).collect();
            history::import(core, &portal, Side::Matrix, &state, events).await
        }
        Err(refusal) => {
            tracing::warn!(room = %room_id, %refusal, "what was said before cannot be had");
            Ok(())
        }
    }
}

/// Whether the gateway made a room, so that nobody else did.
async fn is_own(core: &Core, room_id: &OwnedRoomId) -> Result<bool, Refusal> {
    let dag = &core.sides()?.dag;
    if dag.room(room_id).await?.is_none() {
        return Ok(false);
    }
    let create = dag.state_event(room_id, "m.room.create", "").await?;
    Ok(create.is_some_and(|create| create.sender.server_name() == core.context.server_name))
}

/// The state of the Matrix room, which the bot has joined.
async fn join(core: &Core, room_id: &OwnedRoomId, request: &Request) -> Result<State, Refusal> {
    let sides = core.sides()?;
    let (rooms, bot) = (sides.rooms(Side::Matrix), core.users.bot());
    let own: [Key; 1] = [(MEMBER.to_owned(), bot.to_string())];
    if sides.dag.room(room_id).await?.is_some() && rooms.pick(room_id, &own).await?.membership(bot) == "join" {
        return rooms.state(room_id).await;
    }
    let access = &core.context.config.access;
    let takes_part = |server: &&OwnedServerName| access::takes_part(access, Side::Matrix, server).is_ok();
    let via: Vec<OwnedServerName> = request.via.iter().filter(takes_part).cloned().collect();
    let mut tries = if request.invited { INVITE_TRIES } else { 1 };
    loop {
        tries = tries.saturating_sub(1);
        match sides.dag.join(room_id, &via, bot, bot_content()).await {
            Ok(_) => return rooms.state(room_id).await,
            Err(refusal) if tries == 0 => return Err(refusal),
            Err(refusal) => {
                tracing::debug!(room = %room_id, %refusal, "the bot is not let in yet");
                tokio::time::sleep(INVITE_PAUSE).await;
            }
        }
    }
}

/// What the bot's join says.
pub(super) fn bot_content() -> Object {
    Object::from_iter([("displayname".to_owned(), super::BOT_NAME.into())])
}

/// By which algorithm a room is encrypted.
pub(super) fn encrypted(encryption: &Object) -> String {
    let algorithm = encryption.get("algorithm").and_then(|name| name.as_str()).unwrap_or("unknown");
    algorithm.chars().take(100).collect()
}
