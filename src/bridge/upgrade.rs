//! Rooms that are replaced (`m.room.tombstone`): the portal goes on with the room that comes next, on both sides. The room across gets a
//! tombstone that leads to the one that is connected with the next room, the aliases lead there, and who could not come in by themselves
//! is invited. Each step looks at what is done already, and as long as the old portal has not ended all is taken up after a crash.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use futures::future::BoxFuture;
use ruma::{OwnedRoomId, OwnedServerName, OwnedUserId, RoomId, UserId};

use super::core::Core;
use super::ends::{end, ended};
use super::notice::{say, text};
use super::portal::{Portal, PortalKind, PortalState};
use super::power::{POWER_LEVELS, Power};
use super::registry::Entry;
use super::side::State;
use super::users::Who;
use super::{access, acl, alias, carry, create, repair};
use crate::clock::is_recent;
use crate::event::Object;
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::seam::Outgoing;
use crate::store::portals;

/// The type of events that say by which room a room is replaced.
pub(super) const TOMBSTONE: &str = "m.room.tombstone";
/// For how long a portal waits to be let into the room that comes next, in milliseconds. A restart begins anew.
pub const LET_IN_MS: i64 = 86_400_000;
/// When it is tried again, at first and at last.
const FIRST_PAUSE: Duration = Duration::from_secs(60);
const LONGEST_PAUSE: Duration = Duration::from_secs(3_600);
/// How many rooms in a row may be replaced as soon as they are connected: rooms that lead to each other would go on for ever.
const IN_A_ROW: u32 = 8;
/// Within what time they count as in a row, in milliseconds.
const A_ROW_MS: i64 = 86_400_000;
/// How many members of a room without a door of its own are invited into the next, and how many servers are asked at once.
const FOLLOWERS: usize = 2_000;
const AT_ONCE: usize = 8;
/// How many more servers are asked for the next room that are in the old one.
const OTHERS: usize = 5;
/// What the reason of a portal begins with that waits to be let into the next room.
const WAITS: &str = "it was replaced by ";

/// Portals that are going on to other rooms.
#[derive(Debug, Default)]
pub(super) struct Moves {
    under_way: Mutex<HashMap<i64, Move>>,
    /// Of portals that came of this, by their number: how many in a row, and when.
    rows: Mutex<HashMap<i64, (u32, i64)>>,
}

#[derive(Debug)]
struct Move {
    /// The room that comes next, on the side of the tombstone.
    next: Option<(Side, OwnedRoomId)>,
    since: i64,
    /// Whether a task is at it.
    is_running: bool,
    /// Whether it is to be looked at again when that one is done.
    again: bool,
    /// After what time it is tried again.
    pause: Duration,
    /// Whether it is known across that the gateway is not let in.
    is_told: bool,
    /// The servers whose users have invited the gateway's bot into the next room.
    invited_by: Vec<OwnedServerName>,
}

impl Moves {
    fn lock(&self) -> MutexGuard<'_, HashMap<i64, Move>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins, unless somebody has. Whoever is at it looks again then.
    fn begin(&self, number: i64, next: Option<(Side, OwnedRoomId)>, now: i64) -> bool {
        let mut all = self.lock();
        let new = || Move {
            next: None,
            since: now,
            is_running: false,
            again: false,
            pause: Duration::ZERO,
            is_told: false,
            invited_by: Vec::new(),
        };
        let one = all.entry(number).or_insert_with(new);
        if one.is_running {
            one.again = true;
            return false;
        }
        if one.next != next {
            *one = Move { next, ..new() };
        }
        (one.is_running, one.again) = (true, false);
        true
    }

    /// The portal that waits for a room.
    fn waiting_for(&self, side: Side, room_id: &RoomId) -> Option<i64> {
        let is_it = |one: &Move| one.next.as_ref().is_some_and(|(on, next)| *on == side && next == room_id);
        self.lock().iter().find(|(_, one)| is_it(one)).map(|(number, _)| *number)
    }

    fn forget(&self, number: i64) {
        self.lock().remove(&number);
    }

    /// Whether one more portal in a row may come of this one.
    fn may_go_on(&self, number: i64, now: i64) -> bool {
        let mut rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        rows.retain(|_, (_, at)| is_recent(*at, now, A_ROW_MS));
        rows.get(&number).is_none_or(|(count, _)| *count < IN_A_ROW)
    }

    fn went_on(&self, from: i64, to: i64, now: i64) {
        let mut rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        let count = rows.get(&from).map_or(0, |(count, _)| *count);
        rows.insert(to, (count.saturating_add(1), now));
    }
}

/// A room says by its state that another one takes its place.
struct Tombstone {
    side: Side,
    /// The room that comes next; none when the room is closed.
    next: Option<OwnedRoomId>,
    sender: OwnedUserId,
    via: Vec<OwnedServerName>,
}

/// Looks whether a room of a portal is replaced, by somebody who may do that to the portal; true when the portal goes on, or ends.
pub(super) async fn look_at(core: &Arc<Core>, entry: &Arc<Entry>, side: Side, state: &State) -> Result<bool, Refusal> {
    let portal = entry.portal();
    let Some(found) = state.get(TOMBSTONE, "").filter(|found| found.sender != core.users.bot()) else {
        return Ok(false);
    };
    // What redaction leaves of one, or takes one back.
    if found.content.keys().all(|key| key.starts_with(super::translate::OWN_PREFIX))
        || !counts(core, &portal, side, found.sender).await?
    {
        return Ok(false);
    }
    let next = found.content.get("replacement_room").and_then(|room| room.as_str());
    let next = next.and_then(|room| RoomId::parse(room).ok()).filter(|next| **next != *portal.room(side));
    let mut via = vec![found.sender.server_name().to_owned()];
    via.extend(Some(portal.lm_hub.clone()).filter(|_| side == Side::Lm));
    via.extend(next.as_ref().and_then(|next| next.server_name()).map(ToOwned::to_owned));
    if side == Side::Matrix {
        // Its ID may not say where it is, and who is in the old one may be in it.
        via.extend(core.sides()?.dag.joined_servers(&portal.matrix_room_id).await?.into_iter().take(OTHERS));
    }
    let mut seen = std::collections::BTreeSet::new();
    via.retain(|server| *server != core.context.server_name && seen.insert(server.clone()));
    let stone = Tombstone { side, next, sender: found.sender.to_owned(), via };
    go_on(core, entry, stone);
    Ok(true)
}

/// Whether who closed a room may do so: where it lives elsewhere that is decided, else it takes the level on both sides.
async fn counts(core: &Core, portal: &Portal, side: Side, sender: &UserId) -> Result<bool, Refusal> {
    if portal.elsewhere() == Some(side) {
        return Ok(true);
    }
    let Who::Native { ghost } = core.users.who(&core.context.store, side, sender).await? else { return Ok(false) };
    if !portal.is_replaceable() || access::takes_part(&core.context.config.access, side, sender.server_name()).is_err()
    {
        return Ok(false);
    }
    let keys = [POWER_LEVELS, "m.room.create", acl::SERVER_ACL].map(|kind| (kind.to_owned(), String::new()));
    let far = core.sides()?.rooms(side.other()).pick(portal.room(side.other()), &keys).await?;
    let is_denied = acl::of(core, &far).await.is_some_and(|list| !list.allows(sender.server_name()));
    Ok(!is_denied && Power::of(&far).may_send(&ghost, TOMBSTONE, true))
}

/// No room of a portal is replaced, or not any more.
pub(super) async fn stays(core: &Core, entry: &Entry) -> Result<(), Refusal> {
    core.moves.forget(entry.number);
    let portal = entry.portal();
    if portal.state == PortalState::Degraded && portal.reason.as_ref().is_some_and(|reason| reason.starts_with(WAITS)) {
        core.set_state(entry, PortalState::Active, None).await?;
    }
    Ok(())
}

/// Whether a portal waits to be let into a room: then the bot follows an invite there, whoever sends it.
pub(super) fn waits_for(core: &Core, side: Side, room_id: &RoomId) -> bool {
    core.moves.waiting_for(side, room_id).is_some()
}

/// The bot is invited into a room that a portal waits for, or a portal of it is there: it goes on at once.
pub(super) fn comes(core: &Arc<Core>, side: Side, room_id: &RoomId, by: Option<&OwnedServerName>) {
    let Some(entry) = core.moves.waiting_for(side, room_id).and_then(|number| core.registry.get(number)) else {
        return;
    };
    if let Some(one) = core.moves.lock().get_mut(&entry.number) {
        one.invited_by.extend(by.filter(|by| !one.invited_by.contains(by)).cloned());
    }
    repair::soon(core, &entry);
}

fn go_on(core: &Arc<Core>, entry: &Arc<Entry>, stone: Tombstone) {
    let next = stone.next.clone().map(|next| (stone.side, next));
    if !core.moves.begin(entry.number, next, core.now_ms()) {
        return;
    }
    let (inner, entry) = (core.clone(), entry.clone());
    // In a box: the portal that comes next may be replaced as well.
    let task: BoxFuture<'static, ()> = Box::pin(async move {
        let done = replace(&inner, &entry, &stone).await;
        let again = match &done {
            Ok(()) => None,
            Err(refusal) => not_yet(&inner, &entry, &stone, refusal).await,
        };
        let look_again = {
            let mut all = inner.moves.lock();
            let one = all.get_mut(&entry.number);
            one.is_some_and(|one| {
                one.is_running = false;
                std::mem::take(&mut one.again)
            })
        };
        if entry.portal().state == PortalState::Ended {
            inner.moves.forget(entry.number);
        } else if look_again {
            repair::soon(&inner, &entry);
        } else if let Some(pause) = again {
            tokio::time::sleep(pause).await;
            repair::soon(&inner, &entry);
        }
    });
    core.spawn(task);
}

/// What failed is tried again until it is too late: then the portal ends. After what time; none when it has ended.
async fn not_yet(core: &Arc<Core>, entry: &Arc<Entry>, stone: &Tombstone, refusal: &Refusal) -> Option<Duration> {
    let (portal, Some(next)) = (entry.portal(), &stone.next) else { return None };
    tracing::info!(portal = portal.portal_id, room = %next, %refusal, "the room that comes next cannot be connected yet");
    let (since, pause, is_told) = {
        let mut all = core.moves.lock();
        let one = all.get_mut(&entry.number)?;
        one.pause = one.pause.saturating_mul(2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        (one.since, one.pause, std::mem::replace(&mut one.is_told, !refusal.is_transient()))
    };
    let what = what(stone.side);
    if !is_recent(since, core.now_ms(), LET_IN_MS) || !may_change(refusal) {
        let reason = format!("{what} was replaced by {next}, which cannot be connected: {refusal}");
        ended(entry, end(core, entry, &reason).await);
        return None;
    }
    if !refusal.is_transient() {
        let reason = format!("{WAITS}{next} ({}), into which this gateway is not let: {refusal}", stone.side.as_str());
        if let Err(error) = core.set_state(entry, PortalState::Degraded, Some(reason)).await {
            tracing::warn!(portal = portal.portal_id, %error, "it was not written down what a portal waits for");
        }
        if !is_told && core.context.config.portals.notices {
            let bot = core.users.bot();
            let body = format!(
                "{what} was replaced by {next}, into which this gateway is not let. When somebody there invites {bot}, this room goes \
                 on with that one."
            );
            if let Err(refusal) = say(core, &portal, stone.side.other(), text("m.notice", &body)).await {
                tracing::info!(portal = portal.portal_id, %refusal, "nobody is told what a portal waits for");
            }
        }
    }
    Some(pause)
}

/// Whether another answer may come when somebody lets the gateway in.
fn may_change(refusal: &Refusal) -> bool {
    !matches!(
        refusal,
        Refusal::Encryption(_)
            | Refusal::Policy(_)
            | Refusal::Malformed { .. }
            | Refusal::IncompatibleRoomVersion(_)
            | Refusal::ServerAcl(_)
    )
}

fn what(side: Side) -> &'static str {
    match side {
        Side::Lm => "the LM room",
        Side::Matrix => "the Matrix room",
    }
}

/// Everything of the move that is not done yet; an error where the next room cannot be connected now.
async fn replace(core: &Arc<Core>, entry: &Arc<Entry>, stone: &Tombstone) -> Result<(), Refusal> {
    let (portal, side) = (entry.portal(), stone.side);
    let what = what(side);
    if !portal.state.carries() {
        return Ok(());
    }
    let Some(room_id) = &stone.next else {
        return end(core, entry, &format!("{what} was closed")).await.map(drop);
    };
    if !core.moves.may_go_on(entry.number, core.now_ms()) {
        let reason =
            format!("{what} was replaced by {room_id}, the last of {IN_A_ROW} that were replaced one after the other");
        return end(core, entry, &reason).await.map(drop);
    }
    let next = next(core, &portal, stone, room_id).await?;
    if next.portal_id == portal.portal_id || !entry.portal().state.carries() {
        return Ok(());
    }
    core.moves.went_on(entry.number, next.number(), core.now_ms());
    move_aliases(core, &portal, &next).await?;
    if let Some(next) = core.registry.get(next.number()) {
        // It may say by now by which name it is found.
        repair::soon(core, &next);
    }
    lead_on(core, &portal, &next, stone).await?;
    invite(core, &portal, &next).await?;
    end(core, entry, &format!("{what} was replaced by {room_id}")).await.map(drop)
}

/// The portal of the room that comes next.
async fn next(core: &Arc<Core>, portal: &Portal, stone: &Tombstone, room_id: &RoomId) -> Result<Arc<Portal>, Refusal> {
    let known = core.registry.of_room(stone.side, room_id).map(|entry| entry.portal());
    if let Some(known) = known.filter(|known| known.state.carries() || portal.has_ghosts_alone(stone.side)) {
        return Ok(known);
    }
    if portal.has_ghosts_alone(stone.side) {
        // Where ghosts are among themselves the next room asks them in, and the bot is not to come.
        return Err(Refusal::Forbidden(format!("nobody of this gateway is invited into {room_id} yet")));
    }
    let invited = core.moves.lock().get(&portal.number()).map(|one| one.invited_by.clone()).unwrap_or_default();
    let is_invited = !invited.is_empty();
    let via: Vec<OwnedServerName> = invited.into_iter().chain(stone.via.iter().cloned()).collect();
    let predecessor = portal.room(stone.side.other());
    create::portal_of_next(core, stone.side, room_id, &via, predecessor, is_invited).await
}

/// All aliases lead to the next portal, but the name that an LM room has by its ID. The next one is called as this was.
async fn move_aliases(core: &Core, portal: &Portal, next: &Portal) -> Result<(), Refusal> {
    let (from, to) = (portal.number(), next.number());
    let by_id = |portal: &Portal| alias::of_room(&portal.lm_room_id);
    let kept = by_id(portal).unwrap_or_default();
    let given = |portal: &Portal| {
        let localpart = alias::localpart_at(portal.alias.as_deref()?, &core.context.server_name)?.to_owned();
        Some(localpart).filter(|localpart| Some(localpart) != by_id(portal).as_ref())
    };
    let name = given(portal).filter(|_| given(next).is_none());
    let stored = name.clone();
    let write = core.context.store.write(move |tx| {
        Box::pin(async move {
            if let Some(name) = &stored {
                portals::set_alias(tx, to, name).await?;
            }
            portals::move_aliases(tx, from, to, &kept).await
        })
    });
    for localpart in write.await? {
        core.registry.set_alias(&localpart, to);
    }
    if let (Some(name), Some(entry)) = (name, core.registry.get(to)) {
        let alias = Some(format!("#{name}:{}", core.context.server_name));
        core.registry.put(to, Portal { alias, ..Portal::clone(&entry.portal()) });
    }
    Ok(())
}

/// The room across gets a tombstone too: by the bot, or in a room that lives elsewhere by the ghost of who closed this one.
async fn lead_on(core: &Core, portal: &Portal, next: &Portal, stone: &Tombstone) -> Result<(), Refusal> {
    let far = stone.side.other();
    let (room_id, leads_to) = (portal.room(far), next.room(far));
    let keys = [(TOMBSTONE.to_owned(), String::new())];
    let state = core.sides()?.rooms(far).pick(room_id, &keys).await?;
    let there = state.content(TOMBSTONE).and_then(|content| content.get("replacement_room")?.as_str());
    if there == Some(leads_to.as_str()) || room_id == leads_to {
        return Ok(());
    }
    let who = match portal.elsewhere() == Some(far) {
        true => core.users.who(&core.context.store, stone.side, &stone.sender).await?,
        false => Who::Bot,
    };
    let sender = match who {
        Who::Native { ghost } => ghost,
        _ => core.users.bot().clone(),
    };
    let mut content = Object::new();
    content.insert("body".to_owned(), "This room has been replaced".into());
    content.insert("replacement_room".to_owned(), leads_to.as_str().into());
    match core.send(portal, far, core.draft(&sender, TOMBSTONE, Some(""), content)).await {
        Err(refusal) if refusal.is_transient() => Err(refusal),
        Err(refusal) => {
            tracing::warn!(portal = portal.portal_id, %refusal, "the room across does not lead on");
            Ok(())
        }
        Ok(_) => Ok(()),
    }
}

/// Those who were in are invited into the next rooms that the gateway has made and that not everybody may join. Into a Matrix room that
/// lives elsewhere its own people invite, and that crosses.
async fn invite(core: &Arc<Core>, portal: &Portal, next: &Portal) -> Result<(), Refusal> {
    if next.kind == PortalKind::FromMatrix || next.is_one_room() || !next.state.carries() {
        return Ok(());
    }
    for side in [Side::Matrix, Side::Lm] {
        if next.elsewhere() == Some(side) || portal.room(side) == next.room(side) {
            continue;
        }
        let rooms = core.sides()?.rooms(side);
        let there = rooms.state(next.room(side)).await?;
        if carry::is_public(&there) {
            continue;
        }
        let before = rooms.state(portal.room(side)).await?;
        let mut followers = Vec::new();
        for entry in before.members().into_iter().filter(|entry| entry.membership() == "join") {
            let Ok(user) = <&UserId>::try_from(entry.state_key) else { continue };
            // Who is in, is invited, or has declined, and who was never in this room's place.
            if there.member(user).is_none()
                && matches!(core.users.who(&core.context.store, side, user).await?, Who::Native { .. })
            {
                followers.push(user.to_owned());
            }
        }
        let room_id = next.room(side);
        let invites = followers.into_iter().take(FOLLOWERS).map(|user| async move {
            let draft = core.member(core.users.bot(), &user, "invite");
            if let Err(refusal) = rooms.invite(room_id, Outgoing { draft, effect: None }).await {
                tracing::info!(room = %room_id, %user, %refusal, "who was in the old room is not invited into the next");
            }
        });
        futures::stream::iter(invites).buffer_unordered(AT_ONCE).collect::<Vec<()>>().await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use ruma::room_id;

    use super::*;

    #[test]
    fn a_portal_goes_on_once_at_a_time_and_is_found_by_the_room_that_it_waits_for() {
        let moves = Moves::default();
        let next = Some((Side::Matrix, room_id!("!next:h").to_owned()));
        assert!(moves.begin(1, next.clone(), 5));
        assert!(!moves.begin(1, next.clone(), 6), "a task is at it");
        assert!(moves.lock()[&1].again);
        assert_eq!(moves.waiting_for(Side::Matrix, room_id!("!next:h")), Some(1));
        assert_eq!(moves.waiting_for(Side::Lm, room_id!("!next:h")), None);
        moves.lock().get_mut(&1).unwrap().is_running = false;
        assert!(moves.begin(1, next, 9));
        assert_eq!(moves.lock()[&1].since, 5, "it waits since then");
        moves.lock().get_mut(&1).unwrap().is_running = false;
        assert!(moves.begin(1, None, 9));
        assert_eq!(moves.lock()[&1].since, 9, "it is another one");
    }

    #[test]
    fn rooms_that_lead_to_each_other_are_not_followed_for_ever() {
        let moves = Moves::default();
        let mut number = 1;
        while moves.may_go_on(number, 10) {
            moves.went_on(number, number + 1, 10);
            number += 1;
        }
        assert_eq!(number, 1 + i64::from(IN_A_ROW));
        assert!(moves.may_go_on(number, 10 + A_ROW_MS), "but one after the other over the days");
    }
}
