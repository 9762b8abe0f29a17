//! INV-1 to INV-5 and INV-7 over random portals. Each seed makes a room of some version with users of two homeservers and of an LM server, who
//! speak, change state, promote, demote, ban and come back, on branches that know nothing of each other and that arrive late; what they do
//! conflicts, is reset by resolution, and is forbidden as often as not. In the end both rooms are looked at as they are.
//!
//! All of it is in this process: no sockets, no clock but the test's, keys and times of events by the seed. `ISTHMUS_SEED=N cargo test
//! --test main bridge::random` runs one seed and says each step; `ISTHMUS_SEEDS=N` runs so many, a thousand when it is not set.

mod holds;
mod house;

use std::collections::HashSet;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures::{FutureExt as _, StreamExt as _, stream};
use isthmus::bridge::{NewPortal, Portal};
use isthmus::event::{Object, RoomVersion};
use isthmus::identity::{GhostNames, Side};
use isthmus::seam::Draft;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};
use ruma::{OwnedEventId, OwnedUserId, UserId};
use serde_json::{Value, json};

use self::holds::{log_ids, same_positions};
use self::house::{House, Servers};
use super::world::{World, draft, message};
use crate::dag::peer::{Peer, View, own};
use crate::dag::{NOW, VERSIONS};

/// How many seeds run when nobody says otherwise.
const SEEDS: u64 = 1_000;
/// How many run at once in each of the gateways that they share.
const AT_ONCE: usize = 12;
/// How long one may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often repair is asked for before a portal must be in step.
const REPAIRS: usize = 12;

#[test]
fn inv_1_to_inv_5_and_inv_7_hold_in_random_rooms() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect(name));
    let only = number("ISTHMUS_SEED");
    let seeds: Vec<u64> = match only {
        Some(seed) => vec![seed],
        None => (0..number("ISTHMUS_SEEDS").unwrap_or(SEEDS)).collect(),
    };
    // Half of the machine is left to the tests that run beside this one.
    let houses = std::thread::available_parallelism().map_or(1, |threads| (threads.get() as u64 / 2).max(1));
    let shares: Vec<Vec<u64>> =
        (0..houses).map(|house| seeds.iter().copied().filter(|seed| seed % houses == house).collect()).collect();
    // One thread for all of a gateway's tasks: what hangs on who comes first is mostly the same each time.
    let failed: Vec<u64> = std::thread::scope(|scope| {
        let runs = shares.into_iter().map(|seeds| {
            scope.spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(share(seeds, only.is_some()))
            })
        });
        let runs: Vec<_> = runs.collect();
        runs.into_iter().flat_map(|run| run.join().unwrap()).collect()
    });
    let replay = "ISTHMUS_SEED=N cargo test --test main bridge::random";
    assert!(failed.is_empty(), "of {} seeds these failed: {failed:?}. To run one again: {replay}", seeds.len());
}

/// Runs seeds in a gateway of their own; gives those that failed.
async fn share(seeds: Vec<u64>, aloud: bool) -> Vec<u64> {
    if seeds.is_empty() {
        return Vec::new();
    }
    let servers = Servers::new();
    let house = House::open(&servers).await;
    let runs = stream::iter(seeds).map(|seed| {
        let (house, servers) = (&house, &servers);
        async move {
            let running = AssertUnwindSafe(run(house, servers, seed, aloud)).catch_unwind();
            let why = match tokio::time::timeout(PATIENCE, running).await {
                Ok(Ok(Ok(()))) => return None,
                Ok(Ok(Err(why))) => why,
                Ok(Err(_)) => "it panicked".to_owned(),
                Err(_) => "it does not end".to_owned(),
            };
            eprintln!("seed {seed}: {why}");
            Some(seed)
        }
    });
    let failed: Vec<u64> = runs.buffer_unordered(AT_ONCE).filter_map(std::future::ready).collect().await;
    house.bridge.stop().await;
    house.context.store.close().await;
    failed
}

/// An event that its server has made, and may not have sent yet.
struct Made {
    id: OwnedEventId,
    event: Object,
    by_one: bool,
    prev: Vec<OwnedEventId>,
}

struct Room<'a> {
    house: &'a House,
    servers: &'a Servers,
    portal: std::sync::Arc<Portal>,
    version: RoomVersion,
    random: StdRng,
    aloud: bool,
    /// a and b of one homeserver, c and d of the other.
    matrix: Vec<OwnedUserId>,
    linear: Vec<OwnedUserId>,
    /// The room as it was seen somewhere at some time.
    views: Vec<View>,
    waiting: Vec<Made>,
    /// What was made and is no part of the gateway's graph, now or ever.
    dead: HashSet<OwnedEventId>,
    said: Vec<OwnedEventId>,
    log: Vec<OwnedEventId>,
    /// The power levels with which it began.
    levels: Value,
    steps: i64,
}

async fn run(house: &House, servers: &Servers, seed: u64, aloud: bool) -> Result<(), String> {
    let mut random = StdRng::seed_from_u64(seed);
    let version = *VERSIONS.choose(&mut random).unwrap();
    let public = Some("public".to_owned());
    let new = NewPortal { join_rule: public, matrix_room_version: Some(version), ..NewPortal::default() };
    let portal = house.bridge.create_portal(new).await.map_err(|refusal| refusal.to_string())?;
    let matrix = [(&servers.one, "a"), (&servers.one, "b"), (&servers.two, "c"), (&servers.two, "d")];
    let matrix = matrix.map(|(peer, name)| peer.user(name)).to_vec();
    let linear = ["k", "l", "m"].map(|name| servers.linear.user(name)).to_vec();
    let (views, waiting, said, log) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (dead, levels) = (HashSet::new(), Value::Null);
    let mut room = Room {
        house,
        servers,
        portal,
        version,
        random,
        aloud,
        matrix,
        linear,
        views,
        waiting,
        dead,
        said,
        log,
        levels,
        steps: 0,
    };
    room.begin().await?;
    for _ in 0..room.random.gen_range(4..10) {
        room.round().await?;
    }
    room.end().await
}

impl Room<'_> {
    async fn begin(&mut self) -> Result<(), String> {
        for (number, user) in self.matrix.clone().iter().enumerate().take(3) {
            let peer = self.home(number < 2);
            let joined = World::join_at(peer, &self.house.dag, &self.portal.matrix_room_id, user).await;
            joined.map_err(|refusal| refusal.to_string())?;
        }
        for user in self.linear.clone().iter().take(2) {
            let join = self.servers.lpdu(&self.portal.lm_room_id, &member(user, user, "join", NOW - 5_000_000));
            let joined = self.house.lm.send_join(&self.servers.linear.name, join.json).await;
            joined.map_err(|refusal| refusal.to_string())?;
        }
        self.settle().await?;
        let powers = [(self.matrix[0].clone(), 100), (self.matrix[1].clone(), 60), (self.linear[0].clone(), 60)];
        for (user, level) in powers {
            let set = self.house.bridge.set_power(&self.portal.portal_id, &user, level).await;
            set.map_err(|refusal| refusal.to_string())?;
        }
        self.settle().await?;
        let levels = self.house.dag.state_event(&self.portal.matrix_room_id, "m.room.power_levels", "").await;
        self.levels = Value::Object(levels.map_err(|refusal| refusal.to_string())?.unwrap().content.clone());
        self.look().await;
        Ok(())
    }

    fn home(&self, one: bool) -> &Peer {
        if one { &self.servers.one } else { &self.servers.two }
    }

    /// The homeservers see the room as the gateway does now.
    async fn look(&mut self) {
        let (store, room) = (&self.house.context.store, &self.portal.matrix_room_id);
        let tips = isthmus::store::dag::room(store, room).await.unwrap().unwrap().tips;
        let state = self.house.dag.state(room).await.unwrap();
        let mut depth = 0;
        for tip in &tips {
            depth = self.house.dag.event(tip).await.unwrap().map_or(depth, |event| event.depth.max(depth));
        }
        let state = state.iter().map(|(key, event)| (key.clone(), event.event_id.clone())).collect();
        self.views.push(View { version: self.version, room_id: room.clone(), state, tips, depth });
    }

    async fn round(&mut self) -> Result<(), String> {
        for _ in 0..self.random.gen_range(1..5) {
            self.make();
        }
        // Late is what others made long before.
        let count = self.random.gen_range(0..=self.waiting.len());
        self.deliver(count).await;
        let mut lpdus = Vec::new();
        for _ in 0..self.random.gen_range(0..3) {
            let who = self.linear.choose(&mut self.random).unwrap().clone();
            let draft = self.does(&who, Side::Lm);
            self.tell(&draft);
            lpdus.push(self.servers.lpdu(&self.portal.lm_room_id, &draft));
        }
        // Many of them the rules forbid.
        drop(self.house.lm_put(self.servers, &lpdus).await);
        self.settle().await?;
        if self.random.gen_bool(0.5) {
            self.look().await;
        }
        let log = log_ids(self.house, &self.portal).await;
        same_positions(&self.log, &log)?;
        self.log = log;
        Ok(())
    }

    /// Somebody on Matrix does something, on what they have seen.
    fn make(&mut self) {
        let who = self.random.gen_range(0..self.matrix.len());
        let sender = self.matrix[who].clone();
        // Mostly on something new.
        let newest = self.views.len() - 1;
        let on = if self.random.gen_bool(0.6) { newest } else { self.random.gen_range(0..=newest) };
        let mut view = self.views[on].clone();
        if self.random.gen_bool(0.15) {
            let other = self.views.choose(&mut self.random).unwrap();
            view.depth = view.depth.max(other.depth);
            let new: Vec<_> = other.tips.iter().filter(|tip| !view.tips.contains(tip)).cloned().collect();
            view.tips.extend(new);
            view.tips.truncate(10);
        }
        let draft = self.does(&sender, Side::Matrix);
        let mut event =
            view.next(&sender, &draft.kind, draft.state_key.as_deref(), Value::Object(draft.content.clone()));
        event["origin_server_ts"] = json!(draft.origin_server_ts);
        if let Some(target) = draft.content.get("redacts") {
            event["redacts"] = target.clone();
        }
        let (id, event) = self.home(who < 2).sign(self.version, event);
        self.tell(&format!("{id} on {:?}: {draft:?}", view.tips));
        let prev = view.tips.clone();
        view.note(id.clone(), &event);
        if draft.state_key.is_none() {
            self.said.push(id.clone());
        }
        self.views.push(view);
        self.waiting.push(Made { id, event, by_one: who < 2, prev });
    }

    /// What somebody tries; it may be forbidden.
    fn does(&mut self, who: &UserId, side: Side) -> Draft {
        self.steps += 1;
        let number = self.steps;
        // Times go back and forth, and no two are the same.
        let ts = NOW - 1_000_000 - self.random.gen_range(0..500) * 1_000 - number;
        let users = [&self.matrix, &self.linear][usize::from(self.random.gen_bool(0.3))].clone();
        let whom = users.choose(&mut self.random).unwrap().clone();
        let own = [&self.matrix, &self.linear][usize::from(side == Side::Lm)].choose(&mut self.random).unwrap().clone();
        let whom = self.under_which_name(&whom, side);
        let mut draft = match self.random.gen_range(0..16) {
            0 | 1 => draft(who, "m.room.topic", Some(""), json!({ "topic": format!("topic {number}") })),
            2 => draft(who, "m.room.name", Some(""), json!({ "name": format!("name {number}") })),
            3 => member(who, &whom, "ban", ts),
            4 => member(who, &whom, "leave", ts),
            5 => member(who, &own, "invite", ts),
            6 | 7 => member(who, who, "join", ts),
            8 => member(who, who, "leave", ts),
            9 => {
                let rule = ["public", "invite", "knock"].choose(&mut self.random).unwrap();
                draft(who, "m.room.join_rules", Some(""), json!({ "join_rule": rule }))
            }
            10 if side == Side::Matrix => self.levels(who, &whom),
            11 if side == Side::Matrix && !self.said.is_empty() => {
                let target = self.said.choose(&mut self.random).unwrap();
                draft(who, "m.room.redaction", None, json!({ "redacts": target }))
            }
            _ => message(who, &format!("message {number}")),
        };
        draft.origin_server_ts = ts;
        draft
    }

    /// Levels that raise or lower somebody, of those that were there in the beginning.
    fn levels(&mut self, who: &UserId, whom: &UserId) -> Draft {
        let mut content = self.levels.clone();
        content["users"][whom.as_str()] = json!(*[0, 50, 60, 100].choose(&mut self.random).unwrap());
        draft(who, "m.room.power_levels", Some(""), content)
    }

    /// A user as the room of a side knows them.
    fn under_which_name(&self, user: &UserId, side: Side) -> OwnedUserId {
        let names = GhostNames::new(own());
        match (side, self.matrix.iter().any(|known| known == user)) {
            (Side::Matrix, true) | (Side::Lm, false) => user.to_owned(),
            (Side::Matrix, false) => names.of_user(Side::Lm, user).unwrap().0,
            (Side::Lm, true) => names.of_user(Side::Matrix, user).unwrap().0,
        }
    }

    /// So many of the events that wait come to the gateway, each after what it follows, and otherwise in any order.
    async fn deliver(&mut self, count: usize) {
        for _ in 0..count {
            let missing: HashSet<&OwnedEventId> = self.waiting.iter().map(|made| &made.id).collect();
            let can = |made: &Made| !made.prev.iter().any(|id| missing.contains(id));
            let ready: Vec<usize> = (0..self.waiting.len()).filter(|index| can(&self.waiting[*index])).collect();
            let Some(index) = ready.choose(&mut self.random).copied() else { return };
            let made = self.waiting.remove(index);
            self.give(made).await;
        }
    }

    async fn give(&mut self, made: Made) {
        // What stands on an event that the gateway would have to ask for comes no more: there is nobody whom it could ask.
        let auth = made.event["auth_events"].as_array().unwrap().iter().filter_map(Value::as_str);
        let stands_on: Vec<&str> = made.prev.iter().map(|id| id.as_str()).chain(auth).collect();
        if self.dead.iter().any(|id| stands_on.contains(&id.as_str())) {
            self.dead.insert(made.id);
            return;
        }
        let received = self.home(made.by_one).put(&self.house.dag, &[&made.event]).await.remove(0);
        self.tell(&format!("{} came: {:?}", made.id, received.result));
        if received.result.is_err() {
            let kept = isthmus::store::dag::events(&self.house.context.store, std::slice::from_ref(&made.id)).await;
            if kept.unwrap().is_empty() {
                self.dead.insert(made.id);
            }
        }
    }

    /// Waits until nothing waits to cross.
    async fn settle(&self) -> Result<(), String> {
        let waiting = "SELECT COUNT(*) FROM bridge_inbox WHERE room_id IN ($1, $2)";
        let mut pause = 5;
        loop {
            let count: i64 = sqlx::query_scalar(waiting)
                .bind(self.portal.matrix_room_id.as_str())
                .bind(self.portal.lm_room_id.as_str())
                .fetch_one(self.house.context.store.reader())
                .await
                .map_err(|error| error.to_string())?;
            if count == 0 {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(pause)).await;
            pause = (pause * 2).min(40);
        }
    }

    async fn end(&mut self) -> Result<(), String> {
        self.deliver(usize::MAX).await;
        self.settle().await?;
        let id = &self.portal.portal_id;
        let mut left = 0;
        for _ in 0..REPAIRS {
            let repaired = self.house.bridge.repair(id).await.map_err(|refusal| refusal.to_string())?;
            self.tell(&format!("{repaired} repairs"));
            self.settle().await?;
            left = self.house.bridge.out_of_step(id).await.map_err(|refusal| refusal.to_string())?;
            if repaired == 0 && left == 0 {
                break;
            }
            self.house.clock.advance(61_000);
        }
        if left > 0 {
            let portal = self.house.bridge.portal(id).await.map_err(|refusal| refusal.to_string())?;
            let reason = portal.and_then(|portal| portal.reason.clone());
            return Err(format!("INV-4: {left} are not in step after {REPAIRS} repairs: {reason:?}"));
        }
        same_positions(&self.log, &log_ids(self.house, &self.portal).await)?;
        holds::all(self.house, &self.portal, &self.matrix, &self.linear).await
    }

    fn tell(&self, what: &impl std::fmt::Debug) {
        if self.aloud {
            eprintln!("{what:?}");
        }
    }
}

fn member(who: &UserId, whom: &UserId, membership: &str, ts: i64) -> Draft {
    let draft = draft(who, "m.room.member", Some(whom.as_str()), json!({ "membership": membership }));
    Draft { origin_server_ts: ts, ..draft }
}
