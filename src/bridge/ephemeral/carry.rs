//! How typing, receipts and presence are carried over, each as its ghost's.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ruma::{OwnedEventId, OwnedServerName, OwnedUserId, RoomId, UserId};

use super::waiting::{From, TYPING_MS, What};
use crate::bridge::acl::{self, SERVER_ACL};
use crate::bridge::core::Core;
use crate::bridge::portal::Portal;
use crate::bridge::side::{Key, MEMBER};
use crate::bridge::users::Who;
use crate::bridge::{access, loops, read_up_to};
use crate::event::{Edu, EduKey, Ignored, Presence, Receipt, Typing};
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::store::images;

/// When a receipt for an event that has no image yet is looked at again, in milliseconds. After the last time it is one for the
/// nearest event before it that has one.
const RECEIPT_AGAIN_MS: [i64; 3] = [500, 1_500, 4_000];
/// How often a user's presence crosses at most, in milliseconds.
const PRESENCE_MS: i64 = 30_000;
/// In how many portals it is shown at most, and how long it is remembered which ones they are.
const PRESENCE_PORTALS: usize = 1_000;
pub(super) const PRESENCE_KNOWN: Duration = Duration::from_secs(600);

pub(super) enum Done {
    Carried,
    /// It was put off.
    Later,
    Ignored(Ignored),
}

pub(super) async fn carry(core: &Core, side: Side, edu: Edu, tries: usize) -> Result<Done, Refusal> {
    match edu {
        Edu::Typing(typing) => carry_typing(core, side, typing).await,
        Edu::Receipt(receipt) => carry_receipt(core, side, receipt, tries).await,
        Edu::Presence(presence) => carry_presence(core, side, presence).await,
        Edu::ToDevice(_) | Edu::DevicesChanged(_) => Ok(Done::Ignored(Ignored::Unknown)),
    }
}

/// Where what a user does in a room is seen across.
struct Across {
    portal: Arc<Portal>,
    ghost: OwnedUserId,
}

/// The ghost and the portal of a user in a room, when both are in it and nothing keeps what the user does from crossing.
async fn across(core: &Core, side: Side, room_id: &RoomId, user: &UserId) -> Result<Result<Across, Ignored>, Refusal> {
    let Some(entry) = core.registry.of_room(side, room_id) else { return Ok(Err(Ignored::NoPortal)) };
    let portal = entry.portal();
    // In a room that is both nothing crosses: its servers tell each other.
    if !portal.state.carries() || portal.is_one_room() {
        return Ok(Err(Ignored::NoPortal));
    }
    // Of ghosts nothing ever comes back (INV-7).
    let Who::Native { ghost } = core.users.who(&core.context.store, side, user).await? else {
        return Ok(Err(Ignored::Refused));
    };
    access::takes_part(&core.context.config.access, side, user.server_name())?;
    let keys = |user: &UserId, other: &UserId| -> Vec<Key> {
        let member = (MEMBER.to_owned(), user.to_string());
        let acl = (SERVER_ACL.to_owned(), String::new());
        [Some(member), Some(acl), loops::key(other)].into_iter().flatten().collect()
    };
    let sides = core.sides()?;
    let near = sides.rooms(side).pick(room_id, &keys(user, user)).await?;
    if near.membership(user) != "join" {
        return Ok(Err(Ignored::NotJoined));
    }
    let far = sides.rooms(side.other()).pick(portal.room(side.other()), &keys(&ghost, user)).await?;
    if far.membership(&ghost) != "join" {
        return Ok(Err(Ignored::NotJoined));
    }
    acl::both(core, &near, &far, user).await?;
    core.ephemeral.knows(user.server_name());
    Ok(Ok(Across { portal, ghost }))
}

/// Says something to the servers with users in the room on `side`.
async fn say(core: &Core, side: Side, room_id: &RoomId, edu: &Edu) -> Result<(), Refusal> {
    for (side, servers) in listeners(core, side, room_id).await? {
        core.context.outbound.send_edu(side, servers, edu);
    }
    Ok(())
}

/// The other servers with users in a room, and by which protocol they are told what happens there: of those in a log which follows from
/// a graph some know the graph alone.
async fn listeners(core: &Core, side: Side, room_id: &RoomId) -> Result<[(Side, Vec<OwnedServerName>); 2], Refusal> {
    let sides = core.sides()?;
    let (lm, matrix) = match side {
        Side::Matrix => (Vec::new(), sides.dag.joined_servers(room_id).await?),
        Side::Lm => sides.lm.servers_by_part(room_id).await?,
    };
    Ok([(Side::Lm, lm), (Side::Matrix, matrix)].map(|(side, mut servers)| {
        servers.retain(|server| *server != core.context.server_name);
        (side, servers)
    }))
}

async fn carry_typing(core: &Core, side: Side, typing: Typing) -> Result<Done, Refusal> {
    if !typing.typing {
        let is_known = core.ephemeral.waiting().typer(side, &typing).is_some();
        stop_typing(core, side, &typing.room_id, &typing.user_id).await?;
        return Ok(if is_known { Done::Carried } else { Done::Ignored(Ignored::Old) });
    }
    let Across { portal, ghost } = match across(core, side, &typing.room_id, &typing.user_id).await {
        Ok(Ok(across)) => across,
        // Who may not type any more has stopped.
        ended => {
            stop_typing(core, side, &typing.room_id, &typing.user_id).await?;
            return ended.map(|across| Done::Ignored(across.err().unwrap_or(Ignored::Refused)));
        }
    };
    let is_new = core.ephemeral.waiting().types(side, &typing, &ghost, core.now_ms());
    let Some(is_new) = is_new else {
        // Nobody would see the end of it.
        stop_typing(core, side, &typing.room_id, &typing.user_id).await?;
        return Ok(Done::Ignored(Ignored::Budget));
    };
    if is_new {
        let room_id = portal.room(side.other());
        let image = Edu::Typing(Typing { room_id: room_id.to_owned(), user_id: ghost, typing: true });
        say(core, side.other(), room_id, &image).await?;
    }
    Ok(Done::Carried)
}

/// Says across that somebody has stopped, when it was said that they type.
async fn stop_typing(core: &Core, side: Side, room_id: &RoomId, user_id: &UserId) -> Result<(), Refusal> {
    let Some(typer) = core.ephemeral.waiting().forget_typer(side, room_id, user_id) else { return Ok(()) };
    let Some(entry) = core.registry.of_room(side, room_id) else { return Ok(()) };
    let portal = entry.portal();
    let far = portal.room(side.other());
    let image = Edu::Typing(Typing { room_id: far.to_owned(), user_id: typer.ghost, typing: false });
    say(core, side.other(), far, &image).await
}

/// Looks whether somebody who was typing still may, and when it has to be looked again.
pub(super) async fn look(core: &Core, key: (Side, EduKey)) {
    let (side, EduKey::Typing(room_id, user)) = &key else { return };
    let until = {
        let waiting = core.ephemeral.waiting();
        let typers = waiting.typing.get(&(*side, room_id.clone()));
        typers.and_then(|typers| typers.get(user)).map(|typer| typer.until)
    };
    let Some(until) = until else { return };
    let left = until.saturating_sub(core.now_ms());
    let goes_on =
        left > 0 && left <= TYPING_MS && across(core, *side, room_id, user).await.is_ok_and(|across| across.is_ok());
    if goes_on {
        let mut waiting = core.ephemeral.waiting();
        // Something newer may have come meanwhile.
        if !waiting.jobs.contains_key(&key) {
            waiting.put(key.clone(), until, What::Look, From::Known);
        }
    } else if let Err(refusal) = stop_typing(core, *side, room_id, user).await {
        tracing::debug!(%refusal, "the end of typing did not cross");
    }
}

async fn carry_receipt(core: &Core, side: Side, receipt: Receipt, tries: usize) -> Result<Done, Refusal> {
    let Across { portal, ghost } = match across(core, side, &receipt.room_id, &receipt.user_id).await? {
        Ok(across) => across,
        Err(reason) => return Ok(Done::Ignored(reason)),
    };
    let key = (side, receipt.key());
    let is_last = tries >= RECEIPT_AGAIN_MS.len();
    let found = read_up_to::find(core, side, &receipt.room_id, &receipt.event_id, is_last).await?;
    let thread_id = thread(core, side, receipt.thread_id.as_deref()).await?;
    let (Some(found), Ok(thread_id)) = (found, thread_id) else {
        let Some(delay) = RECEIPT_AGAIN_MS.get(tries) else { return Ok(Done::Ignored(Ignored::NoImage)) };
        let mut waiting = core.ephemeral.waiting();
        // Something newer may have come meanwhile.
        if !waiting.jobs.contains_key(&key) {
            let due = core.now_ms().saturating_add(*delay);
            waiting.put(key, due, What::Carry(Edu::Receipt(receipt), tries.saturating_add(1)), From::Known);
        }
        return Ok(Done::Later);
    };
    // Depths have an end, which anybody can lead a graph to: from there on all are the same.
    let is_old = |order| found.order < order || (side == Side::Lm && found.order == order);
    if core.ephemeral.read.get(&key).is_some_and(is_old) {
        return Ok(Done::Ignored(Ignored::Old));
    }
    let room_id = portal.room(side.other());
    let image = Edu::Receipt(Receipt {
        room_id: room_id.to_owned(),
        user_id: ghost,
        event_id: found.image,
        thread_id,
        ts: receipt.ts.min(core.now_ms()),
    });
    say(core, side.other(), room_id, &image).await?;
    core.ephemeral.read.insert(key, found.order);
    Ok(Done::Carried)
}

/// A thread as it is called across; an error when its root has no image.
async fn thread(core: &Core, side: Side, thread: Option<&str>) -> Result<Result<Option<String>, ()>, Refusal> {
    let Some(thread) = thread else { return Ok(Ok(None)) };
    let Some(root) = crate::event::event_id(thread) else { return Ok(Ok(Some(thread.to_owned()))) };
    let roots: [OwnedEventId; 1] = [root];
    let found = read_up_to::images(core, side, &roots).await?;
    Ok(found.into_values().next().map(|image| Some(image.to_string())).ok_or(()))
}

async fn carry_presence(core: &Core, side: Side, presence: Presence) -> Result<Done, Refusal> {
    let user = presence.user_id.clone();
    let now = core.now_ms();
    let since = core.ephemeral.shown.get(&user).map(|shown| now.saturating_sub(shown));
    if let Some(left) =
        since.map(|since| PRESENCE_MS.saturating_sub(since)).filter(|left| (1..=PRESENCE_MS).contains(left))
    {
        let mut waiting = core.ephemeral.waiting();
        let key = (side, EduKey::Presence(user));
        if !waiting.jobs.contains_key(&key) {
            waiting.put(key, now.saturating_add(left), What::Carry(Edu::Presence(presence), 0), From::Known);
        }
        return Ok(Done::Later);
    }
    let mut servers = BTreeMap::new();
    let mut image = None;
    let mut portals = portals_of(core, side, &user).await?;
    let mut side = side;
    if portals.is_empty() {
        // Some servers send all that they have to say by one protocol's endpoint.
        side = side.other();
        portals = portals_of(core, side, &user).await?;
    }
    for number in portals.iter() {
        let Some(portal) = core.registry.get(*number).map(|entry| entry.portal()) else { continue };
        let Ok(Ok(Across { portal, ghost })) = across(core, side, portal.room(side), &user).await else { continue };
        let far = portal.room(side.other());
        for (side, told) in listeners(core, side.other(), far).await? {
            servers.extend(told.into_iter().map(|server| (server, side)));
        }
        image = Some(ghost);
    }
    let Some(ghost) = image else { return Ok(Done::Ignored(Ignored::NotJoined)) };
    core.ephemeral.shown.insert(user, now);
    let image = Edu::Presence(Presence { user_id: ghost, ..presence });
    for (server, side) in servers {
        core.context.outbound.send_edu(side, [server], &image);
    }
    Ok(Done::Carried)
}

/// The portals that a user is in, as far as they are among the first.
async fn portals_of(core: &Core, side: Side, user: &UserId) -> Result<Arc<[i64]>, Refusal> {
    let key = (side, user.to_owned());
    if let Some(known) = core.ephemeral.portals.get(&key) {
        return Ok(known);
    }
    // Of strangers there may be any number: the portals are not searched for them, and they take no place.
    if images::profile(&core.context.store, side, &key.1).await?.is_none() {
        return Ok(Arc::default());
    }
    let member = [(MEMBER.to_owned(), user.to_string())];
    let mut found = Vec::new();
    for entry in core.registry.after(0, PRESENCE_PORTALS) {
        let portal = entry.portal();
        let state = core.sides()?.rooms(side).pick(portal.room(side), &member).await;
        if state.is_ok_and(|state| state.membership(user) == "join") {
            found.push(entry.number);
        }
    }
    let found: Arc<[i64]> = found.into();
    core.ephemeral.portals.insert(key, found.clone());
    Ok(found)
}
