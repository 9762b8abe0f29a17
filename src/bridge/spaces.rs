//! A space for each LM hub, where the configuration wishes for them: it holds the Matrix rooms of the hub's portals that anybody may join
//! or ask to join. What it holds is compared with the portals there are, whenever one comes, goes or changes its door, so that nothing
//! that was missed stays so.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ruma::{OwnedRoomId, OwnedServerName, RoomId, ServerName};
use serde_json::{Value, json};

use super::core::Core;
use super::portal::{Portal, PortalKind};
use super::side::MEMBER;
use super::{alias, rooms};
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::store::spaces as stored;

/// The types by which a space and its rooms name each other.
const CHILD: &str = "m.space.child";
const PARENT: &str = "m.space.parent";
/// How long after a change a space is looked at, since changes come in company.
const SOON: Duration = Duration::from_millis(200);
/// When it is looked again after a failure.
const AGAIN: Duration = Duration::from_secs(60);

/// The spaces, and those that are about to be looked at.
#[derive(Debug, Default)]
pub(super) struct Spaces {
    rooms: Mutex<HashMap<OwnedServerName, OwnedRoomId>>,
    planned: Mutex<BTreeSet<OwnedServerName>>,
    /// Held while one is looked at.
    looking: tokio::sync::Mutex<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Spaces {
    /// The space of a hub.
    pub(super) fn of(&self, hub: &ServerName) -> Option<OwnedRoomId> {
        lock(&self.rooms).get(hub).cloned()
    }

    /// Whether a room is a space of the gateway's.
    pub(super) fn contains(&self, room_id: &RoomId) -> bool {
        lock(&self.rooms).values().any(|space| space == room_id)
    }
}

/// Loads the spaces.
pub(super) async fn load(core: &Core) -> Result<(), Refusal> {
    let rooms = stored::all(&core.context.store).await?;
    lock(&core.spaces.rooms).extend(rooms);
    Ok(())
}

/// Looks at all of them: while the gateway was away the wish may have changed.
pub(super) fn at_start(core: &Arc<Core>) {
    let mut hubs: BTreeSet<OwnedServerName> = lock(&core.spaces.rooms).keys().cloned().collect();
    if core.context.config.portals.hub_spaces {
        hubs.extend(core.registry.after(0, usize::MAX).iter().map(|entry| entry.portal().lm_hub.clone()));
    }
    for hub in hubs {
        soon(core, &hub);
    }
}

/// A portal of a hub came, went, or changed.
pub(super) fn soon(core: &Arc<Core>, hub: &ServerName) {
    let wished = core.context.config.portals.hub_spaces || core.spaces.of(hub).is_some();
    if !wished || !lock(&core.spaces.planned).insert(hub.to_owned()) {
        return;
    }
    let (inner, hub) = (core.clone(), hub.to_owned());
    core.spawn(async move {
        let mut pause = SOON;
        loop {
            tokio::time::sleep(pause).await;
            lock(&inner.spaces.planned).remove(&hub);
            match keep_up(&inner, &hub).await {
                Ok(()) => return,
                Err(refusal) => {
                    tracing::warn!(%hub, %refusal, "the space of a hub could not be kept up");
                    pause = AGAIN;
                    if !lock(&inner.spaces.planned).insert(hub.clone()) {
                        return;
                    }
                }
            }
        }
    });
}

/// Brings the space of a hub in step with its portals.
async fn keep_up(core: &Arc<Core>, hub: &ServerName) -> Result<(), Refusal> {
    let _alone = core.spaces.looking.lock().await;
    let wanted = wanted(core, hub).await?;
    let space = match core.spaces.of(hub) {
        Some(space) => space,
        None if wanted.is_empty() => return Ok(()),
        None => make(core, hub).await?,
    };
    let sides = core.sides()?;
    let state = sides.dag.state(&space).await?;
    let held: BTreeSet<OwnedRoomId> = state
        .range((CHILD.to_owned(), String::new())..)
        .take_while(|((kind, _), _)| kind == CHILD)
        .filter(|(_, event)| event.content.contains_key("via"))
        .filter_map(|((_, room), _)| RoomId::parse(room.as_str()).ok())
        .collect();
    sides.dag.set_listed(&space, core.context.config.portals.hub_spaces).await?;
    for room in wanted.difference(&held) {
        name_each_other(core, &space, room, true).await?;
    }
    for room in held.difference(&wanted) {
        name_each_other(core, &space, room, false).await?;
    }
    Ok(())
}

/// The rooms that the space of a hub is to hold.
async fn wanted(core: &Core, hub: &ServerName) -> Result<BTreeSet<OwnedRoomId>, Refusal> {
    let mut wanted = BTreeSet::new();
    if !core.context.config.portals.hub_spaces {
        return Ok(wanted);
    }
    for entry in core.registry.after(0, usize::MAX) {
        let portal = entry.portal();
        if portal.lm_hub == *hub && belongs(&portal) && is_open(core, &portal.matrix_room_id).await? {
            wanted.insert(portal.matrix_room_id.clone());
        }
    }
    Ok(wanted)
}

/// Whether a portal is one of the hub's rooms to others; not a direct chat, nor a room of others that only has a log here.
fn belongs(portal: &Portal) -> bool {
    portal.state.carries() && portal.may_be_listed() && !portal.ghosts_alone && portal.kind != PortalKind::Shared
}

async fn is_open(core: &Core, room_id: &RoomId) -> Result<bool, Refusal> {
    let rules = core.sides()?.dag.state_event(room_id, "m.room.join_rules", "").await?;
    let rule = rules.as_ref().and_then(|rules| rules.content.get("join_rule")?.as_str());
    Ok(matches!(rule, Some("public" | "knock" | "restricted" | "knock_restricted")))
}

async fn make(core: &Core, hub: &ServerName) -> Result<OwnedRoomId, Refusal> {
    let address = format!("#{}:{}", alias::of_hub(hub), core.context.server_name);
    let room_id = core.sides()?.dag.create_room(rooms::space_of_hub(core, hub, &address)?).await?;
    let (of, stored_room) = (hub.to_owned(), room_id.clone());
    let write = core.context.store.write(move |tx| Box::pin(async move { stored::put(tx, &of, &stored_room).await }));
    write.await?;
    lock(&core.spaces.rooms).insert(hub.to_owned(), room_id.clone());
    tracing::info!(%hub, room = %room_id, address, "a space was made for the rooms of a hub");
    Ok(room_id)
}

/// A space holds a room from now on, and the room says so, or neither does any more.
async fn name_each_other(core: &Core, space: &RoomId, room: &RoomId, holds: bool) -> Result<(), Refusal> {
    let own = [&core.context.server_name];
    let content = |more: Value| if holds { more } else { json!({}) };
    say(core, space, CHILD, room, content(json!({ "via": own }))).await?;
    let sides = core.sides()?;
    let bot = core.users.bot();
    let keys = [(MEMBER.to_owned(), bot.to_string()), (PARENT.to_owned(), space.to_string())];
    let state = match sides.rooms(Side::Matrix).pick(room, &keys).await {
        Err(Refusal::UnknownRoom(_)) => return Ok(()),
        state => state?,
    };
    // The bot has left the room of a portal that is over.
    let says = state.get(PARENT, space.as_str()).is_some_and(|parent| parent.content.contains_key("via"));
    if state.membership(bot) != "join" || says == holds {
        return Ok(());
    }
    say(core, room, PARENT, space, content(json!({ "via": own, "canonical": true }))).await
}

async fn say(core: &Core, room: &RoomId, kind: &str, about: &RoomId, content: Value) -> Result<(), Refusal> {
    let content = content.as_object().cloned().unwrap_or_default();
    let draft = core.draft(core.users.bot(), kind, Some(about.as_str()), content);
    let outgoing = crate::seam::Outgoing { draft, effect: None };
    let sent = core.sides()?.rooms(Side::Matrix).send(room, vec![outgoing]).await.pop();
    sent.unwrap_or_else(|| Err(Refusal::Internal("nothing came of an event".to_owned()))).map(drop)
}
