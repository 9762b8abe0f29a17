//! Servers that come and go: schedules made of a seed, of messages, redactions, joins, leaves, kicks, invites, bans, knocks, links that are
//! cut, answers that are lost and servers that are started again. Afterwards each log is its hub's, and nothing is missing or twice.
//! In some of them logs are handed over to other servers too ([`hubs`]), and those who give them go away, one of them for good.
//!
//! `ISTHMUS_SEED=N cargo test schedules` runs the schedules of that seed. The schedule is the same each time, but for what hangs on who
//! keeps a log by then; how the servers' tasks interleave is not.

mod check;
mod hubs;
mod links;

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use futures::FutureExt as _;
use isthmus::event::Object;
use isthmus::lm::Sent;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use ruma::{OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId, UserId};
use serde_json::json;

pub(super) use self::check::{same_log, stay_began};
pub(super) use self::links::{Fault, Links};
use super::hub_transfer::on;
use super::world::{Node, Stopped, World, draft, member, message};
use crate::support::between::Watcher;

/// How long the servers may take to come into step after the schedule.
const PATIENCE: Duration = Duration::from_secs(90);
/// How many steps a schedule has.
const STEPS: usize = 60;
/// How many more it may take until enough was said in it.
const MORE_STEPS: usize = 180;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_1_inv_3_inv_5_two_servers_that_come_and_go_end_with_one_log() {
    run(["one.example", "two.example"], 1, None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_1_inv_3_inv_5_three_servers_that_come_and_go_end_with_one_log() {
    run(["one.example", "two.example", "three.example"], 2, None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_1_inv_3_inv_5_five_servers_that_come_and_go_end_with_one_log() {
    run(["one.example", "two.example", "three.example", "four.example", "five.example"], 3, None).await;
}

/// What would go unnoticed if the schedules proved nothing: a network that breaks what the servers promise is found out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_schedule_fails_where_the_network_breaks_what_servers_promise() {
    for fault in [Fault::Swallows, Fault::Repeats, Fault::Reverses, Fault::Empties] {
        let broken = run(["one.example", "two.example"], 1, Some(fault));
        let Err(panic) = AssertUnwindSafe(broken).catch_unwind().await else { panic!("{fault:?} went unnoticed") };
        let said = panic.downcast_ref::<String>().map(|said| said.chars().take(200).collect::<String>());
        println!("{fault:?}: {said:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_1_inv_3_inv_5_two_servers_that_hand_logs_over_end_with_one_log() {
    run_with(["one.example", "two.example"], 6, None, true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_1_inv_3_inv_5_three_servers_that_hand_logs_over_end_with_one_log() {
    run_with(["one.example", "two.example", "three.example"], 4, None, true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_1_inv_3_inv_5_five_servers_that_hand_logs_over_end_with_one_log() {
    run_with(["one.example", "two.example", "three.example", "four.example", "five.example"], 2, None, true).await;
}

async fn run<const N: usize>(names: [&str; N], seed: u64, fault: Option<Fault>) {
    run_with(names, seed, fault, false).await;
}

/// Each server is the hub of one room and takes part in the others'; it keeps its log all the time, or not.
async fn run_with<const N: usize>(names: [&str; N], seed: u64, fault: Option<Fault>, hands_over: bool) {
    if let Ok(filter) = std::env::var("ISTHMUS_LOG") {
        let logs = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(std::io::stdout);
        let _ = logs.try_init();
    }
    let seed = std::env::var("ISTHMUS_SEED").map_or(seed, |text| text.parse().unwrap());
    let (world, nodes) = match hands_over {
        true => World::handing_over(names.map(|name| (name, on()))).await,
        false => World::new(names).await,
    };
    let keys = nodes.iter().map(|node| (node.name.clone(), node.context.signing_key.clone())).collect();
    let mut schedule = Schedule {
        world,
        hands_over,
        random: StdRng::seed_from_u64(seed),
        links: Links::new(seed, fault, keys),
        names: nodes.iter().map(|node| node.name.clone()).collect(),
        nodes: nodes.into_iter().map(Some).collect(),
        away: BTreeMap::new(),
        gone: None,
        rooms: Vec::new(),
        watchers: Vec::new(),
        said: Vec::new(),
        came: Vec::new(),
        doomed: Vec::new(),
        counter: AtomicI64::new(0),
        told: Vec::new(),
    };
    schedule.begin().await;
    for _ in 0..STEPS {
        schedule.step().await;
    }
    // Where many were out of the rooms, or one is gone for good, it takes longer until enough was said.
    for _ in 0..MORE_STEPS {
        if schedule.said.len() > STEPS / 2 {
            break;
        }
        schedule.step().await;
    }
    schedule.settle().await;
    schedule.check().await;
}

/// What a server said that it took.
struct Said {
    room: usize,
    sender: OwnedUserId,
    /// What it was.
    what: String,
    /// The event, or the LPDU of what was said to a hub elsewhere.
    id: OwnedEventId,
    is_lpdu: bool,
    /// Whether it stands in a line with what else its sender says: a participant's invite goes to the hub by another way.
    in_line: bool,
}

struct Schedule {
    world: World,
    /// Whether logs change hands.
    hands_over: bool,
    random: StdRng,
    links: Arc<Links>,
    names: Vec<OwnedServerName>,
    /// Those that run.
    nodes: Vec<Option<Node>>,
    /// Those that do not.
    away: BTreeMap<usize, Stopped>,
    /// The one that does not come back.
    gone: Option<hubs::Gone>,
    /// The room that each server has made, and is at first the hub of.
    rooms: Vec<OwnedRoomId>,
    /// Of the servers as they were before they were started again too.
    watchers: Vec<Arc<Watcher>>,
    said: Vec<Said>,
    /// Who has joined, by which event, or has knocked.
    came: Vec<(usize, OwnedUserId, Option<OwnedEventId>)>,
    /// What hubs said that may be redacted, with the room.
    doomed: Vec<(usize, OwnedEventId)>,
    /// How much was said.
    counter: AtomicI64,
    /// What was done, for who reads a failure.
    told: Vec<String>,
}

impl Schedule {
    fn node(&self, index: usize) -> &Node {
        self.nodes[index].as_ref().unwrap()
    }

    fn runs(&self, index: usize) -> bool {
        self.nodes[index].is_some()
    }

    fn name(&self, index: usize) -> OwnedServerName {
        self.names[index].clone()
    }

    fn user(&self, index: usize, localpart: &str) -> OwnedUserId {
        UserId::parse(format!("@{localpart}:{}", self.names[index])).unwrap()
    }

    fn link_up(&mut self, index: usize) {
        let (links, name) = (self.links.clone(), self.name(index).to_string());
        self.watchers.push(self.node(index).watcher.clone());
        self.node(index).meddle(move |request, next| {
            let (links, name) = (links.clone(), name.clone());
            async move { links.pass(&name, request, next).await }
        });
    }

    async fn begin(&mut self) {
        for index in 0..self.nodes.len() {
            self.link_up(index);
            self.rooms.push(self.node(index).create_room_with("public", self.levels(index)).await);
        }
        for hub in 0..self.nodes.len() {
            for part in (0..self.nodes.len()).filter(|part| *part != hub) {
                self.node(part).join(&self.rooms[hub], "u0", self.node(hub)).await;
            }
        }
    }

    /// The levels in the room that a server makes. Where logs change hands others can hand them over too.
    fn levels(&self, index: usize) -> serde_json::Value {
        let mut users = Object::from_iter([(self.user(index, "bot").to_string(), json!(200))]);
        if self.hands_over {
            let others = (0..self.names.len()).filter(|other| *other != index);
            users.extend(others.map(|other| (self.user(other, "u0").to_string(), json!(100))));
        }
        json!({ "users": users })
    }

    fn pick(&mut self) -> usize {
        self.random.gen_range(0..self.nodes.len())
    }

    fn localpart(&mut self) -> &'static str {
        ["bot", "u0", "u1"][self.random.gen_range(0..3)]
    }

    async fn step(&mut self) {
        let (node, room) = (self.pick(), self.pick());
        let localpart = self.localpart();
        let user = self.user(node, localpart);
        let what = self.random.gen_range(0..if self.hands_over { 112 } else { 100 });
        self.some_come_back().await;
        if self.is_closed(room) {
            return;
        }
        match what {
            0..46 => self.speak(room).await,
            46..51 => self.redact(room).await,
            51..60 => {
                self.join(node, room, &user).await;
            }
            60..65 if user.localpart() != "bot" => self.say(node, room, member(&user, &user, "leave")).await,
            65..82 => {
                let name = ["u0", "u1"][self.random.gen_range(0..2)];
                let user = self.user(node, name);
                self.change_membership(node, room, &user).await;
            }
            82..90 => {
                let other = self.pick();
                let pair = (self.name(node).to_string(), self.name(other).to_string());
                self.told.push(format!("the link of {} and {} is cut", pair.0, pair.1));
                self.links.cut.lock().unwrap().insert(pair);
            }
            90..95 => self.heal(),
            100.. => self.hand_over(room).await,
            _ if !self.runs(node) => {}
            _ => {
                self.told.push(format!("{} starts again", self.name(node)));
                let stopped = self.nodes[node].take().unwrap();
                self.nodes[node] = Some(self.world.restart(stopped).await);
                self.link_up(node);
            }
        }
    }

    fn heal(&mut self) {
        self.told.push("all links are there again".to_owned());
        self.links.cut.lock().unwrap().clear();
        self.hurry();
    }

    /// Has everything tried now that waits for a better time.
    fn hurry(&self) {
        for node in self.nodes.iter().flatten() {
            for other in self.names.iter().filter(|other| **other != node.name) {
                node.context.outbound.retry(other);
            }
        }
    }

    async fn send(&self, node: usize, room: usize, mut draft: isthmus::seam::Draft) -> Result<Sent, String> {
        // What is said twice is two LPDUs.
        draft.origin_server_ts += self.counter.fetch_add(1, Ordering::Relaxed);
        let Some(node) = &self.nodes[node] else { return Err("it does not run".to_owned()) };
        let sending = node.send(&self.rooms[room], draft);
        let sent = tokio::time::timeout(PATIENCE, sending).await.expect("a send ends");
        sent.map_err(|refusal| refusal.to_string())
    }

    /// The same, and notes what became of it.
    async fn say(&mut self, node: usize, room: usize, draft: isthmus::seam::Draft) {
        let sent = self.send(node, room, draft.clone()).await;
        self.note(room, &draft, true, sent);
    }

    fn note(&mut self, room: usize, draft: &isthmus::seam::Draft, in_line: bool, sent: Result<Sent, String>) {
        let sender = draft.sender.clone();
        let what = match &draft.state_key {
            Some(key) => format!("{sender}: {} {key} {}", draft.kind, json!(draft.content)),
            None => format!("{sender}: {}", draft.content["body"]),
        };
        self.told.push(format!("{what} in {room}: {:?}", sent.as_ref().map(drop)));
        let (id, is_lpdu) = match sent {
            Ok(Sent::Queued { lpdu_id }) => (lpdu_id, true),
            Ok(Sent::Appended(appended)) => (appended.event.event_id.clone(), false),
            Err(_) => return,
        };
        self.said.push(Said { room, sender, what, id, is_lpdu, in_line });
    }

    async fn join(&mut self, node: usize, room: usize, user: &OwnedUserId) -> bool {
        if !self.runs(node) {
            return false;
        }
        let via = self.via(room).await;
        let joining = self.node(node).lm.join(&self.rooms[room], user, &via, Object::new());
        let joined = tokio::time::timeout(PATIENCE, joining).await.expect("a join ends");
        self.told.push(format!("{user} joins {room}: {:?}", joined.as_ref().map(drop)));
        let event = joined.map(|joined| self.came.push((room, user.clone(), Some(joined.event.event_id.clone()))));
        event.is_ok()
    }

    /// A user is invited, kicked, banned or let in again, knocks, or does not want to come any more.
    async fn change_membership(&mut self, node: usize, room: usize, user: &OwnedUserId) {
        let (bot, via) = (self.user(room, "bot"), self.via(room).await);
        match self.random.gen_range(0..12) {
            0..3 => {
                let by = if self.random.gen_bool(0.5) { room } else { self.pick() };
                let inviter = if by == room { bot } else { self.user(by, "u0") };
                if !self.runs(by) {
                    return;
                }
                let mut draft = member(&inviter, user, "invite");
                draft.origin_server_ts += self.counter.fetch_add(1, Ordering::Relaxed);
                let invite = isthmus::seam::Outgoing { draft: draft.clone(), effect: None };
                let inviting = self.node(by).lm.invite(&self.rooms[room], invite);
                let sent = tokio::time::timeout(PATIENCE, inviting).await.expect("an invite ends");
                self.note(room, &draft, by == room, sent.map_err(|refusal| refusal.to_string()));
            }
            3..6 if !self.runs(node) => {}
            3..5 => {
                self.rule(room, "knock").await;
                let knocking = self.node(node).lm.knock(&self.rooms[room], user, &via, Object::new());
                let knocked = tokio::time::timeout(PATIENCE, knocking).await.expect("a knock ends");
                self.told.push(format!("{user} knocks at {room}: {:?}", knocked.as_ref().map(drop)));
                self.came.extend(knocked.is_ok().then(|| (room, user.clone(), None)));
                // It is denied, or waits.
                if self.random.gen_bool(0.5) && node != room {
                    self.say(room, room, member(&bot, user, "leave")).await;
                }
                self.rule(room, "public").await;
            }
            5 => {
                let leaving = self.node(node).lm.leave(&self.rooms[room], user, &via);
                let left = tokio::time::timeout(PATIENCE, leaving).await.expect("a leave ends");
                self.told.push(format!("{user} wants to be out of {room}: {left:?}"));
            }
            // Who is banned is let in again like this.
            6..8 if node != room => self.say(room, room, member(&bot, user, "leave")).await,
            8..10 if node != room => self.say(room, room, member(&bot, user, "ban")).await,
            _ => {
                let rule = ["public", "public", "knock", "invite"][self.random.gen_range(0..4)];
                self.rule(room, rule).await;
            }
        }
    }

    /// The hub says who may join.
    async fn rule(&mut self, room: usize, join_rule: &str) {
        let bot = self.user(room, "bot");
        let rules = draft(&bot, "m.room.join_rules", Some(""), serde_json::json!({ "join_rule": join_rule }));
        let ruled = self.send(room, room, rules).await.is_ok();
        self.told.push(format!("{room} is {join_rule}: {ruled}"));
    }

    /// Every server says something in a room at once.
    async fn speak(&mut self, room: usize) {
        let number = self.told.len();
        let mut drafts = Vec::new();
        for node in 0..self.nodes.len() {
            // Mostly somebody who is there.
            let resident = if node == room { "bot" } else { "u0" };
            let localpart = if self.random.gen_bool(0.7) { resident } else { self.localpart() };
            let sender = self.user(node, localpart);
            drafts.push((node, message(&sender, &format!("{number} {sender}"))));
        }
        let sending = drafts.iter().map(|(node, draft)| self.send(*node, room, draft.clone()));
        let sent = futures::future::join_all(sending).await;
        for ((_, draft), sent) in drafts.into_iter().zip(sent) {
            self.note(room, &draft, true, sent);
        }
    }

    /// A hub says two things, and redacts something that it said.
    async fn redact(&mut self, room: usize) {
        let hub = self.hub_of(room).await.unwrap_or(room);
        let who = self.user(hub, if hub == room { "bot" } else { "u0" });
        for body in ["gone soon", "perhaps gone soon"] {
            let Ok(Sent::Appended(event)) = self.send(hub, room, message(&who, body)).await else { continue };
            self.doomed.push((room, event.event.event_id.clone()));
        }
        if self.doomed.is_empty() {
            return;
        }
        let (room, target) = self.doomed.swap_remove(self.random.gen_range(0..self.doomed.len()));
        let hub = self.hub_of(room).await.unwrap_or(room);
        let who = self.user(hub, if hub == room { "bot" } else { "u0" });
        let redaction = draft(&who, "m.room.redaction", None, json!({ "redacts": target }));
        let redacted = self.send(hub, room, redaction).await.is_ok();
        self.told.push(format!("{target} in {room} is redacted: {redacted}"));
    }

    /// Waits until nothing is on its way, with one user of every server in every room.
    async fn settle(&mut self) {
        self.all_come_back().await;
        self.heal();
        self.quiet().await;
        let all: Vec<usize> = (0..self.names.len()).filter(|index| self.runs(*index)).collect();
        for room in (0..self.rooms.len()).filter(|room| !self.is_closed(*room)).collect::<Vec<_>>() {
            let Some((keeper, master)) = self.master(room).await else {
                self.told.push(format!("nobody is in {room}"));
                self.gone.as_mut().unwrap().closed.insert(room);
                continue;
            };
            let rules = draft(&master, "m.room.join_rules", Some(""), json!({ "join_rule": "public" }));
            self.say(keeper, room, rules).await;
            self.quiet().await;
            for user in self.banned(room).await {
                self.say(keeper, room, member(&master, &user, "leave")).await;
            }
            self.quiet().await;
            for node in all.iter().copied().filter(|node| *node != room) {
                let user = self.user(node, "u0");
                assert!(self.join(node, room, &user).await, "{user} cannot join {room}: {:#?}", self.told);
            }
        }
        self.quiet().await;
        if self.hands_over {
            self.agree().await;
        }
    }

    async fn quiet(&self) {
        let start = Instant::now();
        let mut still = 0;
        while still < 5 {
            let waiting = self.waiting().await;
            still = if waiting.is_empty() { still + 1 } else { 0 };
            assert!(start.elapsed() < PATIENCE, "waits for ever: {waiting:#?}\n{:#?}", self.told);
            self.hurry();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// What has to go to another server yet.
    async fn waiting(&self) -> Vec<String> {
        let mut waiting = Vec::new();
        for node in self.nodes.iter().flatten() {
            let queues = node.context.outbound.status().await.unwrap().into_iter();
            let queues = queues.filter(|queue| queue.waiting > 0 && !self.is_gone(&queue.destination));
            waiting.extend(queues.map(|queue| format!("{}: {queue:?}", node.name)));
            // Also what waits until it is known to whom it is to go.
            let rooms = isthmus::store::lm::rooms_with_lpdus(&node.context.store).await.unwrap();
            let place = |room: &OwnedRoomId| self.rooms.iter().position(|own| own == room).unwrap();
            let open = rooms.iter().map(place).filter(|room| !self.is_closed(*room));
            waiting.extend(open.map(|room| format!("{}: LPDUs of {room}", node.name)));
        }
        waiting
    }
}
