//! Servers that come and go: schedules made of a seed, of messages, redactions, joins, leaves, kicks, invites, bans, knocks, links that are
//! cut, answers that are lost and servers that are started again. Afterwards each log is its hub's, and nothing is missing or twice.
//!
//! `ISTHMUS_SEED=N cargo test schedules` runs the schedules of that seed. The schedule is the same each time; how the servers'
//! tasks interleave is not.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::extract::Request;
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use futures::FutureExt as _;
use isthmus::event::{Lpdu, Object, Redaction, canonical_json, redact};
use isthmus::federation::authorization_header;
use isthmus::identity::SigningKey;
use isthmus::lm::{Appended, Sent};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use ruma::{OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId};

use super::world::{Node, World, assert_dense, draft, member, message};
use crate::support::between::Watcher;

/// How long the servers may take to come into step after the schedule.
const PATIENCE: Duration = Duration::from_secs(90);
/// How many steps a schedule has.
const STEPS: usize = 60;

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

/// What a network does that servers rely on being done rightly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// Over a link that is cut, everything is said to have arrived.
    Swallows,
    /// What is sent to a hub is sent to it as another event as well, as by a server that does not know what it has sent.
    Repeats,
    /// Events come in the wrong order.
    Reverses,
    /// Events of a log come without their contents, which looks like a redaction.
    Empties,
}

/// Each server is the hub of one room and takes part in the others'.
async fn run<const N: usize>(names: [&str; N], seed: u64, fault: Option<Fault>) {
    let seed = std::env::var("ISTHMUS_SEED").map_or(seed, |text| text.parse().unwrap());
    let (world, nodes) = World::new(names).await;
    let mut schedule = Schedule {
        world,
        random: StdRng::seed_from_u64(seed),
        links: Links::new(
            seed,
            fault,
            nodes.iter().map(|node| (node.name.clone(), node.context.signing_key.clone())).collect(),
        ),
        nodes: nodes.into_iter().map(Some).collect(),
        rooms: Vec::new(),
        watchers: Vec::new(),
        said: Vec::new(),
        came: Vec::new(),
        doomed: Vec::new(),
        told: Vec::new(),
    };
    schedule.begin().await;
    for _ in 0..STEPS {
        schedule.step().await;
    }
    schedule.settle().await;
    schedule.check().await;
}

/// Which servers cannot reach each other.
pub(super) struct Links {
    pub(super) cut: Mutex<BTreeSet<(String, String)>>,
    random: Mutex<StdRng>,
    fault: Option<Fault>,
    /// With which what was meddled with is signed again.
    keys: BTreeMap<OwnedServerName, Arc<SigningKey>>,
}

impl Links {
    /// All of them are there.
    pub(super) fn new(seed: u64, fault: Option<Fault>, keys: BTreeMap<OwnedServerName, Arc<SigningKey>>) -> Arc<Self> {
        let random = Mutex::new(StdRng::seed_from_u64(!seed));
        Arc::new(Self { cut: Mutex::default(), random, fault, keys })
    }

    pub(super) fn is_cut(&self, from: &str, to: &str) -> bool {
        let cut = self.cut.lock().unwrap();
        cut.contains(&(from.to_owned(), to.to_owned())) || cut.contains(&(to.to_owned(), from.to_owned()))
    }

    /// Where a link is cut, either the request does not arrive or its answer does not.
    pub(super) async fn pass(&self, to: &str, request: Request, next: Next) -> Response {
        let header = request.headers().get("authorization").and_then(|header| header.to_str().ok()).unwrap_or_default();
        let from = header.split("origin=\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap_or_default();
        if !self.is_cut(from, to) {
            let from = from.to_owned();
            let request = match self.fault {
                Some(fault) if request.uri().path().contains("/send/") => self.meddle(fault, &from, to, request).await,
                _ => request,
            };
            return next.run(request).await;
        }
        if self.fault == Some(Fault::Swallows) {
            return axum::Json(serde_json::json!({})).into_response();
        }
        if self.random.lock().unwrap().gen_bool(0.5) {
            next.run(request).await;
        }
        StatusCode::SERVICE_UNAVAILABLE.into_response()
    }
}

impl Links {
    /// A transaction as a bad network brings it.
    async fn meddle(&self, fault: Fault, from: &str, to: &str, request: Request) -> Request {
        let (mut parts, body) = request.into_parts();
        let body = axum::body::to_bytes(body, 1 << 24).await.unwrap();
        let mut body: Object = serde_json::from_slice(&body).unwrap();
        let key = &self.keys[from];
        if let Some(pdus) = body.get_mut("pdus").and_then(|pdus| pdus.as_array_mut()) {
            match fault {
                Fault::Swallows => {}
                Fault::Reverses => pdus.reverse(),
                Fault::Empties => {
                    for pdu in pdus.iter_mut().filter_map(|pdu| pdu.as_object_mut()) {
                        if pdu.contains_key("prev_events") {
                            *pdu = redact(pdu, Redaction::Draft);
                        }
                    }
                }
                Fault::Repeats => {
                    let lpdus: Vec<Object> = pdus.iter().filter_map(|pdu| pdu.as_object().cloned()).collect();
                    for mut again in lpdus.into_iter().filter(|pdu| !pdu.contains_key("prev_events")) {
                        let ts = again["origin_server_ts"].as_i64().unwrap();
                        again.insert("origin_server_ts".to_owned(), (ts + 1).into());
                        let [from, to] = [from, to].map(|name| OwnedServerName::try_from(name).unwrap());
                        pdus.push(serde_json::Value::Object(Lpdu::build(again, &to, &from, key).unwrap().json));
                    }
                    pdus.truncate(50);
                }
            }
        }
        let [origin, destination] = [from, to].map(|name| OwnedServerName::try_from(name).unwrap());
        let uri = parts.uri.path_and_query().unwrap().as_str().to_owned();
        let header = authorization_header(&origin, &destination, key, &parts.method, &uri, Some(&body));
        parts.headers.insert("authorization", header.parse().unwrap());
        parts.headers.remove("content-length");
        Request::from_parts(parts, axum::body::Body::from(canonical_json(&body)))
    }
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
    random: StdRng,
    links: Arc<Links>,
    nodes: Vec<Option<Node>>,
    /// The room that each server is the hub of.
    rooms: Vec<OwnedRoomId>,
    /// Of the servers as they were before they were started again too.
    watchers: Vec<Arc<Watcher>>,
    said: Vec<Said>,
    /// Who has joined, by which event, or has knocked.
    came: Vec<(usize, OwnedUserId, Option<OwnedEventId>)>,
    /// What hubs said that may be redacted, with the room.
    doomed: Vec<(usize, OwnedEventId)>,
    /// What was done, for who reads a failure.
    told: Vec<String>,
}

impl Schedule {
    fn node(&self, index: usize) -> &Node {
        self.nodes[index].as_ref().unwrap()
    }

    fn name(&self, index: usize) -> OwnedServerName {
        self.node(index).name.clone()
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
            self.rooms.push(self.node(index).create_room("public").await);
        }
        for hub in 0..self.nodes.len() {
            for part in (0..self.nodes.len()).filter(|part| *part != hub) {
                self.node(part).join(&self.rooms[hub], "u0", self.node(hub)).await;
            }
        }
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
        let user = self.node(node).user(localpart);
        match self.random.gen_range(0..100) {
            0..46 => self.speak(room).await,
            46..51 => self.redact(room).await,
            51..60 => {
                self.join(node, room, &user).await;
            }
            60..65 if user.localpart() != "bot" => self.say(node, room, member(&user, &user, "leave")).await,
            65..82 => {
                let name = ["u0", "u1"][self.random.gen_range(0..2)];
                let user = self.node(node).user(name);
                self.change_membership(node, room, &user).await;
            }
            82..90 => {
                let other = self.pick();
                let pair = (self.name(node).to_string(), self.name(other).to_string());
                self.told.push(format!("the link of {} and {} is cut", pair.0, pair.1));
                self.links.cut.lock().unwrap().insert(pair);
            }
            90..95 => self.heal(),
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
            for other in self.nodes.iter().flatten().filter(|other| other.name != node.name) {
                node.context.outbound.retry(&other.name);
            }
        }
    }

    async fn send(&self, node: usize, room: usize, draft: isthmus::seam::Draft) -> Result<Sent, String> {
        let sending = self.node(node).send(&self.rooms[room], draft);
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
            Some(key) => format!("{sender}: {} {key} {}", draft.kind, draft.content["membership"]),
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
        let via = [self.name(room)];
        let joining = self.node(node).lm.join(&self.rooms[room], user, &via, Object::new());
        let joined = tokio::time::timeout(PATIENCE, joining).await.expect("a join ends");
        self.told.push(format!("{user} joins {room}: {:?}", joined.as_ref().map(drop)));
        let event = joined.map(|joined| self.came.push((room, user.clone(), Some(joined.event.event_id.clone()))));
        event.is_ok()
    }

    /// A user is invited, kicked, banned or let in again, knocks, or does not want to come any more.
    async fn change_membership(&mut self, node: usize, room: usize, user: &OwnedUserId) {
        let (bot, via) = (self.node(room).user("bot"), [self.name(room)]);
        match self.random.gen_range(0..12) {
            0..3 => {
                let by = if self.random.gen_bool(0.5) { room } else { self.pick() };
                let inviter = if by == room { bot } else { self.node(by).user("u0") };
                let draft = member(&inviter, user, "invite");
                let invite = isthmus::seam::Outgoing { draft: draft.clone(), effect: None };
                let inviting = self.node(by).lm.invite(&self.rooms[room], invite);
                let sent = tokio::time::timeout(PATIENCE, inviting).await.expect("an invite ends");
                self.note(room, &draft, by == room, sent.map_err(|refusal| refusal.to_string()));
            }
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
        let bot = self.node(room).user("bot");
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
            let sender = self.node(node).user(localpart);
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
        let bot = self.node(room).user("bot");
        for body in ["gone soon", "perhaps gone soon"] {
            let Ok(Sent::Appended(event)) = self.send(room, room, message(&bot, body)).await else { continue };
            self.doomed.push((room, event.event.event_id.clone()));
        }
        let (room, target) = self.doomed.swap_remove(self.random.gen_range(0..self.doomed.len()));
        let bot = self.node(room).user("bot");
        let redaction = draft(&bot, "m.room.redaction", None, serde_json::json!({ "redacts": target }));
        let redacted = self.send(room, room, redaction).await.is_ok();
        self.told.push(format!("{target} in {room} is redacted: {redacted}"));
    }

    /// Waits until nothing is on its way, with one user of every server in every room.
    async fn settle(&mut self) {
        self.heal();
        self.quiet().await;
        for hub in 0..self.nodes.len() {
            self.rule(hub, "public").await;
            for part in (0..self.nodes.len()).filter(|part| *part != hub) {
                let user = self.node(part).user("u0");
                let is = self.node(hub).lm.state_event(&self.rooms[hub], "m.room.member", user.as_str()).await.unwrap();
                if is.is_some_and(|event| event.content()["membership"] == "ban") {
                    let bot = self.node(hub).user("bot");
                    self.say(hub, hub, member(&bot, &user, "leave")).await;
                }
                assert!(self.join(part, hub, &user).await, "{user} cannot join {hub}: {:#?}", self.told);
            }
        }
        self.quiet().await;
    }

    async fn quiet(&self) {
        let start = Instant::now();
        let mut still = 0;
        while still < 5 {
            let mut waiting = Vec::new();
            for node in self.nodes.iter().flatten() {
                let queues = node.context.outbound.status().await.unwrap();
                waiting.extend(
                    queues.into_iter().filter(|queue| queue.waiting > 0).map(|queue| (node.name.clone(), queue)),
                );
            }
            still = if waiting.is_empty() { still + 1 } else { 0 };
            assert!(start.elapsed() < PATIENCE, "waits for ever: {waiting:#?}\n{:#?}", self.told);
            self.hurry();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn check(&self) {
        assert!(self.said.len() > STEPS / 2, "hardly anybody said anything: {:#?}", self.told);
        let mut memberships: BTreeMap<String, usize> = BTreeMap::new();
        for (hub, room) in self.rooms.iter().enumerate() {
            let log = self.node(hub).log(room).await;
            assert_dense(&log);
            let mut twice = BTreeSet::new();
            for event in &log {
                assert!(
                    event.event.lpdu_id.as_ref().is_none_or(|id| twice.insert(id.clone())),
                    "an LPDU is in the log twice"
                );
            }
            self.nothing_is_missing(hub, &log);
            for event in log.iter().filter(|event| event.event.kind == "m.room.member") {
                *memberships.entry(event.event.content()["membership"].to_string()).or_default() += 1;
            }
            for (part, node) in self.nodes.iter().enumerate().filter(|(part, _)| *part != hub) {
                same_log(&log, &node.as_ref().unwrap().log(room).await, &self.name(part));
                let info = node.as_ref().unwrap().lm.room(room).await.unwrap().unwrap();
                assert_eq!(info.complaints, Vec::<String>::new(), "{:#?}", self.told);
            }
        }
        println!("{memberships:?}");
    }

    /// What was taken is in the log once and in its sender's order, or its sender was told that the hub would not have it.
    fn nothing_is_missing(&self, hub: usize, log: &[Appended]) {
        let refused: Vec<OwnedEventId> = self
            .watchers
            .iter()
            .flat_map(|watcher| watcher.refused.lock().unwrap().iter().map(|(id, _)| id.clone()).collect::<Vec<_>>())
            .collect();
        let (mut places, mut bodies): (HashMap<&OwnedEventId, usize>, BTreeSet<(&OwnedUserId, &str)>) =
            Default::default();
        for (place, event) in log.iter().enumerate() {
            for id in [Some(&event.event.event_id), event.event.lpdu_id.as_ref()].into_iter().flatten() {
                assert!(places.insert(id, place).is_none(), "{id} is twice in the log of {hub}");
            }
            let body = event.event.content().get("body").and_then(|body| body.as_str()).unwrap_or_default();
            if body.starts_with(|first: char| first.is_ascii_digit()) {
                assert!(bodies.insert((&event.event.sender, body)), "{body} is twice in the log of {hub}");
            }
        }
        let mut last: BTreeMap<&OwnedUserId, usize> = BTreeMap::new();
        for Said { sender, what, id, is_lpdu, in_line, .. } in self.said.iter().filter(|said| said.room == hub) {
            let Some(place) = places.get(id).copied() else {
                assert!(*is_lpdu && refused.contains(id), "{what} in {hub} is lost: {:#?}", self.told);
                continue;
            };
            if *in_line {
                let before = last.insert(sender, place);
                assert!(before < Some(place), "{what} is out of its sender's order: {:#?}", self.told);
            }
        }
        for (_, user, event_id) in self.came.iter().filter(|(room, ..)| *room == hub) {
            let is_it = |event: &Appended| match event_id {
                Some(event_id) => event.event.event_id == *event_id,
                None => {
                    event.event.sender == *user
                        && event.event.state_key.as_deref() == Some(user.as_str())
                        && event.event.content()["membership"] == "knock"
                }
            };
            assert!(log.iter().any(is_it), "{user} has come or knocked, and {hub} forgot it: {:#?}", self.told);
        }
    }
}

/// What a participant reads is what the hub reads, byte for byte, in the hub's order and without what was redacted, and from its last join on it has all of it.
pub(super) fn same_log(hub: &[Appended], part: &[Appended], name: &OwnedServerName) {
    let at_hub: HashMap<_, _> = hub.iter().map(|event| (&event.event.event_id, event)).collect();
    for event in part {
        let original = at_hub.get(&event.event.event_id).expect("an event that the hub does not have");
        assert_eq!(canonical_json(&event.event.json), canonical_json(&original.event.json));
    }
    let began = stay_began(hub, name).unwrap_or_else(|| panic!("{name} has nobody in the room"));
    let stay: Vec<_> = hub[began..].iter().map(|event| &event.event.event_id).collect();
    let tail = part.iter().skip_while(|event| event.event.event_id != *stay[0]).map(|event| &event.event.event_id);
    assert_eq!(tail.collect::<Vec<_>>(), stay, "{name} has another log than the hub");
}

/// Where a server's last stay began: the last join while it had nobody in the room. None when it has nobody there.
pub(super) fn stay_began(hub: &[Appended], name: &OwnedServerName) -> Option<usize> {
    let mut joined = BTreeSet::new();
    let mut began = None;
    for (place, event) in hub.iter().enumerate() {
        let json = &event.event.json;
        let user = json.get("state_key").and_then(|key| key.as_str()).unwrap_or_default();
        if json["type"] != "m.room.member" || !user.ends_with(&format!(":{name}")) {
            continue;
        }
        if json["content"]["membership"] == "join" {
            if joined.is_empty() {
                began = Some(place);
            }
            joined.insert(user.to_owned());
        } else {
            joined.remove(user);
        }
    }
    began.filter(|_| !joined.is_empty())
}
