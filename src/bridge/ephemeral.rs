//! Typing, read receipts and presence: carried over as EDUs of the ghosts, straight to the servers with users in the room
//! across. Nothing of it is stored: the newest of each user and room counts, and what is lost comes again.
//!
//! A hub hands nobody's EDUs round. The draft has servers send them directly to whom they are for, and whoever gets one from
//! another server than its user's could not believe it.

use std::collections::{BTreeMap, HashMap};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use moka::sync::Cache;
use ruma::{OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId, RoomId, ServerName, UserId};
use tokio::sync::Notify;

use super::acl::{self, SERVER_ACL};
use super::core::Core;
use super::portal::Portal;
use super::side::{Key, MEMBER};
use super::users::Who;
use super::{access, loops, read_up_to};
use crate::admin::metrics;
use crate::event::{Edu, EduKey, Ignored, Presence, Receipt, Typing};
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::store::images;

/// How many EDUs wait.
const MAX_WAITING: usize = 20_000;
/// Whoever is not said again to be typing within this time has stopped, in milliseconds. Synapse says it again after 40 s, and
/// takes as long as this for the end itself.
const TYPING_MS: i64 = 60_000;
/// Typing that goes on is not said again before this.
const TYPING_AGAIN_MS: i64 = 20_000;
/// When a receipt for an event that has no image yet is looked at again, in milliseconds. After the last time it is one for the
/// nearest event before it that has one.
const RECEIPT_AGAIN_MS: [i64; 3] = [500, 1_500, 4_000];
/// How often a user's presence crosses at most, in milliseconds.
const PRESENCE_MS: i64 = 30_000;
/// In how many portals it is shown at most, and how long it is remembered which ones they are.
const PRESENCE_PORTALS: usize = 1_000;
const PRESENCE_KNOWN: Duration = Duration::from_secs(600);
/// Of how many users it is remembered what crossed last.
const REMEMBERED: u64 = 10_000;
/// How often it is looked whether something is due, at least: clocks can be set.
const LOOK: Duration = Duration::from_secs(1);

/// What waits to be carried over, and what was.
pub(super) struct Ephemeral {
    waiting: Mutex<Waiting>,
    news: Notify,
    /// Up to where receipts went: the order of the event on its own side.
    read: Cache<(Side, EduKey), i64>,
    /// When presence crossed last.
    shown: Cache<OwnedUserId, i64>,
    /// The portals that users are in.
    portals: Cache<(Side, OwnedUserId), Arc<[i64]>>,
}

impl Default for Ephemeral {
    fn default() -> Self {
        Self {
            waiting: Mutex::default(),
            news: Notify::default(),
            read: Cache::new(REMEMBERED),
            shown: Cache::new(REMEMBERED),
            portals: Cache::builder().max_capacity(REMEMBERED).time_to_live(PRESENCE_KNOWN).build(),
        }
    }
}

#[derive(Default)]
struct Waiting {
    /// When what is due, in milliseconds, with a number that tells those of the same time apart.
    order: BTreeMap<(i64, u64), (Side, EduKey)>,
    jobs: HashMap<(Side, EduKey), Job>,
    next: u64,
    /// Who is typing, by room on the side that they are at home on.
    typing: HashMap<(Side, OwnedRoomId), HashMap<OwnedUserId, Typer>>,
    /// How many jobs there are for each server's users.
    shares: HashMap<OwnedServerName, usize>,
}

#[derive(Debug, Clone)]
struct Job {
    /// Under which it stands in the order.
    at: (i64, u64),
    what: What,
}

#[derive(Debug, Clone, PartialEq)]
enum What {
    /// It is carried over; it was tried so often.
    Carry(Edu, usize),
    /// It is looked whether somebody still types.
    Look,
}

/// Somebody who is typing.
#[derive(Debug, Clone)]
struct Typer {
    ghost: OwnedUserId,
    /// When that was last said across.
    said: i64,
    /// When it ends unless it is said again.
    until: i64,
}

impl Waiting {
    /// Puts a job in the place of an older one of the same; false when there is no room. Where there is none, the server whose
    /// users have most of it makes some for others.
    fn put(&mut self, key: (Side, EduKey), due: i64, what: What) -> bool {
        if self.remove(&key).is_none() && self.jobs.len() >= MAX_WAITING && !self.make_room(server(&key)) {
            return false;
        }
        let share = self.shares.entry(server(&key).to_owned()).or_default();
        *share = share.saturating_add(1);
        let at = (due, self.next);
        self.next = self.next.wrapping_add(1);
        self.order.insert(at, key.clone());
        self.jobs.insert(key, Job { at, what });
        true
    }

    fn remove(&mut self, key: &(Side, EduKey)) -> Option<Job> {
        let job = self.jobs.remove(key)?;
        self.order.remove(&job.at);
        if let Some(share) = self.shares.get_mut(server(key)) {
            *share = share.saturating_sub(1);
            if *share == 0 {
                self.shares.remove(server(key));
            }
        }
        Some(job)
    }

    /// Drops the last EDU of the server whose users have most of the jobs, when that has more than `asker`.
    fn make_room(&mut self, asker: &ServerName) -> bool {
        let own = self.shares.get(asker).copied().unwrap_or(0);
        let Some((most, _)) = self.shares.iter().max_by_key(|(_, share)| **share).filter(|(_, share)| **share > own)
        else {
            return false;
        };
        let may_go = |key: &&(Side, EduKey)| {
            server(key) == &**most && self.jobs.get(*key).is_some_and(|job| job.what != What::Look)
        };
        let Some(last) = self.order.values().rev().find(may_go).cloned() else { return false };
        if let Some(Job { what: What::Carry(edu, _), .. }) = self.remove(&last) {
            metrics::edu_received(edu.kind(), Ignored::Budget.code());
        }
        true
    }

    /// Takes what is due; else how long it is until something is.
    fn take(&mut self, now: i64) -> Result<((Side, EduKey), What), Option<i64>> {
        let Some((&at, key)) = self.order.first_key_value() else { return Err(None) };
        // What is further off than anything can be was put off before the clock was set back.
        let left = at.0.saturating_sub(now);
        if left > 0 && left <= TYPING_MS {
            return Err(Some(left));
        }
        let key = key.clone();
        match self.remove(&key) {
            Some(job) => Ok((key, job.what)),
            None => {
                self.order.remove(&at);
                Err(Some(0))
            }
        }
    }

    /// Somebody types: whether that is to be said across. None when there is no room to look after it.
    fn types(&mut self, side: Side, typing: &Typing, ghost: &UserId, now: i64) -> Option<bool> {
        let until = now.saturating_add(TYPING_MS);
        let key = (side, typing.key());
        // Something newer may have come meanwhile, like the end of it.
        if !self.jobs.contains_key(&key) && !self.put(key, until, What::Look) {
            return None;
        }
        if let Some(typer) =
            self.typer(side, typing).filter(|typer| now.abs_diff(typer.said) < TYPING_AGAIN_MS.unsigned_abs())
        {
            typer.until = until;
            return Some(false);
        }
        let typer = Typer { ghost: ghost.to_owned(), said: now, until };
        let typers = self.typing.entry((side, typing.room_id.clone())).or_default();
        typers.insert(typing.user_id.clone(), typer);
        Some(true)
    }

    fn typer(&mut self, side: Side, typing: &Typing) -> Option<&mut Typer> {
        self.typing.get_mut(&(side, typing.room_id.clone()))?.get_mut(&typing.user_id)
    }

    fn forget_typer(&mut self, side: Side, room_id: &RoomId, user_id: &UserId) -> Option<Typer> {
        let key = (side, room_id.to_owned());
        let typers = self.typing.get_mut(&key)?;
        let typer = typers.remove(user_id);
        if typers.is_empty() {
            self.typing.remove(&key);
        }
        typer
    }
}

/// The server whose user it is about.
fn server((_, key): &(Side, EduKey)) -> &ServerName {
    match key {
        EduKey::Typing(_, user) | EduKey::Receipt(_, user, _) | EduKey::Presence(user) => user.server_name(),
    }
}

impl Ephemeral {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An EDU of another server came.
    pub(super) fn take(&self, core: &Core, side: Side, edu: Edu) {
        let Some(key) = edu.key() else { return };
        let settings = core.context.config.bridge;
        let is_on = match edu {
            Edu::Typing(_) => settings.typing,
            Edu::Receipt(_) => settings.receipts,
            _ => settings.presence,
        };
        let kind = edu.kind();
        // Some servers send all that they have to say by one protocol's endpoint.
        let side = edu.room().map_or(Some(side), |room_id| {
            [side, side.other()].into_iter().find(|side| core.registry.watches(*side, room_id))
        });
        if !is_on {
            metrics::edu_received(kind, Ignored::Off.code());
            return;
        }
        let Some(side) = side else {
            metrics::edu_received(kind, Ignored::NoPortal.code());
            return;
        };
        if self.waiting().put((side, key), core.now_ms(), What::Carry(edu, 0)) {
            self.news.notify_one();
        } else {
            metrics::edu_received(kind, Ignored::Budget.code());
        }
    }

    /// Something was accepted in a room: who types there may have left.
    pub(super) fn look_at(&self, core: &Core, side: Side, room_id: &RoomId) {
        let mut waiting = self.waiting();
        if waiting.typing.is_empty() {
            return;
        }
        let typers = waiting.typing.get(&(side, room_id.to_owned()));
        let users: Vec<OwnedUserId> = typers.into_iter().flat_map(HashMap::keys).cloned().collect();
        for user in users {
            let key = (side, EduKey::Typing(room_id.to_owned(), user));
            if waiting.jobs.get(&key).is_none_or(|job| job.what == What::Look) {
                waiting.put(key, core.now_ms(), What::Look);
            }
        }
        self.news.notify_one();
    }
}

/// Carries over what is due, for ever.
pub(super) async fn run(core: Arc<Core>) {
    loop {
        let next = core.ephemeral.waiting().take(core.now_ms());
        match next {
            Ok((key, what)) => {
                if AssertUnwindSafe(work(&core, key, what)).catch_unwind().await.is_err() {
                    tracing::error!("this gateway failed on an EDU");
                }
            }
            Err(None) => core.ephemeral.news.notified().await,
            Err(Some(left)) => {
                let left = Duration::from_millis(u64::try_from(left).unwrap_or(0)).min(LOOK);
                let _ = tokio::time::timeout(left, core.ephemeral.news.notified()).await;
            }
        }
    }
}

async fn work(core: &Core, key: (Side, EduKey), what: What) {
    let side = key.0;
    let (kind, done) = match what {
        What::Look => return look(core, key).await,
        What::Carry(edu, tries) => (edu.kind(), carry(core, side, edu, tries).await),
    };
    match done {
        Ok(Done::Carried) => metrics::edu_received(kind, "ok"),
        Ok(Done::Later) => {}
        Ok(Done::Ignored(reason)) => metrics::edu_received(kind, reason.code()),
        Err(refusal) => {
            tracing::debug!(%refusal, kind, "an EDU did not cross");
            let reason = if refusal.is_transient() { Ignored::Failed } else { Ignored::Refused };
            metrics::edu_received(kind, reason.code());
        }
    }
}

enum Done {
    Carried,
    /// It was put off.
    Later,
    Ignored(Ignored),
}

async fn carry(core: &Core, side: Side, edu: Edu, tries: usize) -> Result<Done, Refusal> {
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
    if !portal.state.carries() {
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
    Ok(Ok(Across { portal, ghost }))
}

/// Says something to the servers with users in the room on `side`.
async fn say(core: &Core, side: Side, room_id: &RoomId, edu: &Edu) -> Result<(), Refusal> {
    let sides = core.sides()?;
    let mut servers = match side {
        Side::Matrix => sides.dag.joined_servers(room_id).await?,
        Side::Lm => sides.lm.joined_servers(room_id).await?,
    };
    servers.retain(|server| *server != core.context.server_name);
    core.context.outbound.send_edu(side, servers, edu);
    Ok(())
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
async fn look(core: &Core, key: (Side, EduKey)) {
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
            waiting.put(key.clone(), until, What::Look);
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
            waiting.put(key, due, What::Carry(Edu::Receipt(receipt), tries.saturating_add(1)));
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
            waiting.put(key, now.saturating_add(left), What::Carry(Edu::Presence(presence), 0));
        }
        return Ok(Done::Later);
    }
    let mut servers = std::collections::BTreeSet::new();
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
        let sides = core.sides()?;
        servers.extend(match side.other() {
            Side::Matrix => sides.dag.joined_servers(far).await?,
            Side::Lm => sides.lm.joined_servers(far).await?,
        });
        image = Some(ghost);
    }
    let Some(ghost) = image else { return Ok(Done::Ignored(Ignored::NotJoined)) };
    servers.remove(&core.context.server_name);
    core.ephemeral.shown.insert(user, now);
    let image = Edu::Presence(Presence { user_id: ghost, ..presence });
    core.context.outbound.send_edu(side.other(), servers, &image);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn typing(user: usize) -> (EduKey, Edu) {
        let user_id = format!("@u{user}:h.example").try_into().unwrap();
        let typing = Typing { room_id: "!r:h.example".try_into().unwrap(), user_id, typing: true };
        (typing.key(), Edu::Typing(typing))
    }

    #[test]
    fn what_is_newer_replaces_what_waits_and_what_is_due_comes_in_order() {
        let mut waiting = Waiting::default();
        let mut put = |user, due, tries| {
            let (key, edu) = typing(user);
            assert!(waiting.put((Side::Matrix, key), due, What::Carry(edu, tries)));
        };
        put(1, 10, 0);
        put(2, 5, 0);
        put(1, 7, 1);
        assert_eq!(waiting.take(4).unwrap_err(), Some(1));
        assert_eq!(waiting.take(8).unwrap().0.1, typing(2).0);
        assert_eq!(waiting.take(8).unwrap().1, What::Carry(typing(1).1, 1));
        assert_eq!(waiting.take(8).unwrap_err(), None);
        // A clock that was set back puts nothing off for longer than anything can be.
        let (key, edu) = typing(3);
        waiting.put((Side::Lm, key), 1_000_000, What::Carry(edu, 0));
        assert!(waiting.take(0).is_ok());
    }

    #[test]
    fn the_end_of_typing_that_comes_while_the_beginning_is_carried_is_carried_too() {
        let mut waiting = Waiting::default();
        let (key, edu) = typing(1);
        let key = (Side::Matrix, key);
        let Edu::Typing(begins) = edu else { panic!() };
        let ends = What::Carry(Edu::Typing(Typing { typing: false, ..begins.clone() }), 0);
        waiting.put(key.clone(), 5, ends.clone());
        let ghost: OwnedUserId = "@ghost:g.example".try_into().unwrap();
        assert_eq!(waiting.types(Side::Matrix, &begins, &ghost, 5), Some(true));
        assert_eq!(waiting.take(5).unwrap(), (key.clone(), ends));
        assert_eq!(waiting.types(Side::Matrix, &begins, &ghost, 6), Some(false));
        assert_eq!(waiting.take(6 + TYPING_MS).unwrap(), (key, What::Look));
        // Who cannot be looked after does not begin.
        for user in 0..MAX_WAITING {
            waiting.put((Side::Lm, typing(user).0), 0, What::Look);
        }
        assert_eq!(waiting.types(Side::Matrix, &begins, &ghost, 7), None);
    }

    #[test]
    fn hc_53_who_fills_the_line_leaves_room_for_others() {
        let mut waiting = Waiting::default();
        let line = |server: &str, user: usize| {
            let user_id = format!("@u{user}:{server}").try_into().unwrap();
            let room_id = "!r:h.example".try_into().unwrap();
            let typing = Typing { room_id, user_id, typing: true };
            ((Side::Lm, typing.key()), What::Carry(Edu::Typing(typing), 0))
        };
        for user in 0..MAX_WAITING {
            let (key, what) = line(&format!("flood{}.example", user % 4), user);
            assert!(waiting.put(key, 0, what));
        }
        for user in 0..100 {
            let (key, what) = line("quiet.example", user);
            assert!(waiting.put(key, 0, what), "{user}");
        }
        let (key, what) = line("flood0.example", MAX_WAITING);
        assert!(!waiting.put(key, 0, what));
        assert_eq!((waiting.jobs.len(), waiting.order.len()), (MAX_WAITING, MAX_WAITING));
        let mut quiet = 0;
        while let Ok((key, _)) = waiting.take(0) {
            quiet += usize::from(server(&key) == "quiet.example");
        }
        assert_eq!((quiet, waiting.shares.len()), (100, 0));
    }

    #[test]
    fn what_waits_is_bounded() {
        let mut waiting = Waiting::default();
        for user in 0..MAX_WAITING {
            assert!(waiting.put((Side::Lm, typing(user).0), 0, What::Look));
        }
        assert!(!waiting.put((Side::Lm, typing(MAX_WAITING).0), 0, What::Look));
        assert!(waiting.put((Side::Lm, typing(0).0), 0, What::Look));
        assert_eq!((waiting.jobs.len(), waiting.order.len()), (MAX_WAITING, MAX_WAITING));
    }
}
