//! A shared room whose servers come and go: a hub that keeps graph and log, a graph server, two servers that do LM alone, and the
//! test's own homeserver, which builds on old views. They talk, change the room, invite each other, knock and throw each other out on
//! both sides of links that are cut, answers get lost and servers are started again. Afterwards the log is one, and its state is the graph's.
//!
//! `ISTHMUS_SEED=N cargo test shared_schedules` runs the schedule of that seed, `ISTHMUS_SEEDS=N` those of the first N.

mod check;
mod homeserver;
mod settle;

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::response::Response;
use futures::FutureExt as _;
use isthmus::clock::{Clock, SystemClock};
use isthmus::event::{Object, RoomVersion, VerifyKey, VerifyKeys};
use isthmus::lm::{NewRoom, Role, Sent};
use isthmus::seam::{Draft, Outgoing};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use ruma::{OwnedEventId, OwnedRoomId, OwnedUserId, UserId};
use serde_json::{Value, json};

use self::homeserver::Homeserver;
use super::schedules::{Fault, Links};
use super::shared::{is_of_matrix_alone, keys_of_lm_alone, unrecognized};
use super::world::{Node, World, draft, member, message};
use crate::dag::peer::Peer;
use crate::support::between::Watcher;

const PATIENCE: Duration = Duration::from_secs(60);
const STEPS: usize = 45;
/// The servers by their numbers; the test's homeserver has none.
const HUB: usize = 0;
const GRAPH: usize = 1;
const PARTS: [usize; 2] = [2, 3];
const NAMES: [&str; 4] = ["hub.example", "graph.example", "part.example", "other.example"];
/// The level of the bot.
const MOST: i64 = (1 << 53) - 1;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_1_to_inv_5_the_servers_of_a_shared_room_that_come_and_go_end_with_one_room() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let seeds = match (number("ISTHMUS_SEED"), number("ISTHMUS_SEEDS")) {
        (Some(seed), _) => seed..=seed,
        (None, count) => 1..=count.unwrap_or(2),
    };
    if let Ok(filter) = std::env::var("ISTHMUS_LOG") {
        let logs = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(std::io::stdout);
        let _ = logs.try_init();
    }
    for seed in seeds {
        println!("seed {seed}");
        run(seed, None).await;
    }
}

/// What would go unnoticed if the schedules proved nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_schedule_of_a_shared_room_fails_where_the_network_breaks_what_servers_promise() {
    // What is swallowed comes again, here by the graph and by looking after what the hub took.
    for fault in [Fault::Repeats, Fault::Empties] {
        let broken = run(1, Some(fault));
        let Err(panic) = AssertUnwindSafe(broken).catch_unwind().await else { panic!("{fault:?} went unnoticed") };
        let said = panic.downcast_ref::<String>().map(|said| said.chars().take(200).collect::<String>());
        println!("{fault:?}: {said:?}");
    }
}

async fn run(seed: u64, fault: Option<Fault>) {
    let mut schedule = Schedule::begin(seed, fault).await;
    for _ in 0..STEPS {
        schedule.step().await;
    }
    println!("{:#?}", schedule.told);
    schedule.settle().await;
    schedule.check().await;
}

/// The machine's clock, and more.
#[derive(Default)]
struct Ahead(AtomicI64);

impl Clock for Ahead {
    fn now_ms(&self) -> i64 {
        SystemClock.now_ms() + self.0.load(Ordering::SeqCst)
    }
}

/// Events that the hub did not take, and why.
type Refused = Arc<Mutex<BTreeMap<OwnedEventId, String>>>;

/// What a server said that it took.
struct Said {
    sender: OwnedUserId,
    /// What it was.
    what: String,
    id: OwnedEventId,
    is_lpdu: bool,
    /// Whether it stands in a line with what else its sender says.
    in_line: bool,
}

struct Schedule {
    world: World,
    clock: Arc<Ahead>,
    random: StdRng,
    links: Arc<Links>,
    nodes: Vec<Option<Node>>,
    home: Homeserver,
    room: OwnedRoomId,
    watchers: Vec<Arc<Watcher>>,
    /// Which events the hub has refused to their senders, and why.
    refused: Refused,
    said: Vec<Said>,
    keys: VerifyKeys,
    /// What was done, for who reads a failure.
    told: Vec<String>,
}

fn levels(bot: &UserId, also: Option<(&UserId, i64)>) -> Value {
    // Moderators on either side of the links, who throw others out and each other.
    let mut users = Object::from_iter([(bot.to_string(), json!(MOST))]);
    users
        .extend(["@u0:graph.example", "@u0:home.example", "@u0:part.example"].map(|user| (user.to_owned(), json!(80))));
    users.extend(also.map(|(user, level)| (user.to_string(), json!(level))));
    json!({ "users": users, "users_default": 50, "ban": 50, "kick": 50, "invite": 0, "events": { "m.room.power_levels": 80 } })
}

impl Schedule {
    async fn begin(seed: u64, fault: Option<Fault>) -> Self {
        let clock = Arc::new(Ahead::default());
        let peer = Peer::start_at("home.example", clock.now_ms()).await;
        let at = (peer.url.host_str().unwrap().to_owned(), peer.url.port().unwrap());
        let at = format!("{}:{}", at.0, at.1).parse().unwrap();
        let (world, nodes) = World::begin(NAMES, &[("home.example", at)], clock.clone(), None).await;
        let keys = nodes.iter().map(|node| (node.name.clone(), node.context.signing_key.clone()));
        let keys: BTreeMap<_, _> = keys.chain([(peer.name.clone(), peer.key.clone())]).collect();
        let verify = keys.iter().map(|(name, key)| {
            let verify = VerifyKey::from_base64(&key.public_base64()).unwrap();
            (name.clone(), BTreeMap::from([(key.id().to_owned(), verify)]))
        });
        let verify = verify.collect();
        let links = Links::new(seed, fault, keys);
        let bot = nodes[HUB].user("bot");
        let initial_state = vec![
            draft(&bot, "m.room.power_levels", Some(""), levels(&bot, None)),
            draft(&bot, "m.room.join_rules", Some(""), json!({ "join_rule": "public" })),
        ];
        let room = NewRoom { creator: bot, version: RoomVersion::Lm02, initial_state };
        let room = nodes[HUB].lm.create_shared(room).await.unwrap();
        let (mut watchers, refused) = (Vec::new(), Refused::default());
        for (index, node) in nodes.iter().enumerate() {
            link_up(&links, index, node, &mut watchers, &refused);
        }
        let home = Homeserver::enter(peer, &links, &nodes[HUB], &room).await;
        for node in &nodes[1..] {
            node.join(&room, "u0", &nodes[HUB]).await;
        }
        let role = async |index: usize| nodes[index].lm.room(&room).await.unwrap().unwrap().role;
        assert!(matches!(role(GRAPH).await, Role::GraphServer { .. }));
        assert!(matches!(role(PARTS[0]).await, Role::Participant { .. }));
        let random = StdRng::seed_from_u64(seed);
        let nodes = nodes.into_iter().map(Some).collect();
        let (said, told) = (Vec::new(), Vec::new());
        Self { world, clock, random, links, nodes, home, room, watchers, refused, said, keys: verify, told }
    }

    fn node(&self, index: usize) -> &Node {
        self.nodes[index].as_ref().unwrap()
    }

    fn chance(&mut self, probability: f64) -> bool {
        self.random.gen_bool(probability)
    }

    /// A server of the room; the test's homeserver is the last.
    fn pick(&mut self) -> usize {
        self.random.gen_range(0..=NAMES.len())
    }

    fn name(&self, index: usize) -> String {
        NAMES.get(index).copied().unwrap_or("home.example").to_owned()
    }

    fn user(&mut self, server: usize) -> OwnedUserId {
        let localpart = match (server, self.chance(0.7)) {
            (HUB, true) => "bot",
            (_, true) => "u0",
            (_, false) => "u1",
        };
        UserId::parse(format!("@{localpart}:{}", self.name(server))).unwrap()
    }

    async fn step(&mut self) {
        match self.random.gen_range(0..100) {
            0..26 => self.speak().await,
            26..64 => self.change().await,
            64..73 => self.come().await,
            73..78 => self.look().await,
            78..87 => {
                // Mostly those by which the graph comes together.
                let one = if self.chance(0.5) { HUB } else { self.pick() };
                let other = [GRAPH, NAMES.len(), self.pick()][self.random.gen_range(0..3)];
                let pair = (self.name(one), self.name(other));
                self.told.push(format!("the link of {} and {} is cut", pair.0, pair.1));
                self.links.cut.lock().unwrap().insert(pair);
            }
            87..93 => self.heal(),
            _ => {
                let index = self.random.gen_range(0..NAMES.len());
                self.told.push(format!("{} starts again", NAMES[index]));
                let stopped = self.nodes[index].take().unwrap();
                let node = self.world.restart(stopped).await;
                link_up(&self.links, index, &node, &mut self.watchers, &self.refused);
                self.nodes[index] = Some(node);
            }
        }
        self.deliver().await;
    }

    async fn deliver(&mut self) {
        let random = &mut self.random;
        self.home.deliver(&self.nodes, &self.links, || random.gen_bool(0.5)).await;
    }

    /// The homeserver sees what another has, if it can.
    async fn look(&mut self) {
        let at = if self.chance(0.6) { HUB } else { GRAPH };
        if !self.links.is_cut("home.example", NAMES[at]) {
            self.told.push(format!("home.example looks at {}", NAMES[at]));
            let node = self.nodes[at].as_ref().unwrap();
            self.home.look(node, &self.room).await;
        }
    }

    /// Every server says something at once.
    async fn speak(&mut self) {
        let number = self.told.len();
        let mut drafts = Vec::new();
        for server in 0..=NAMES.len() {
            let sender = self.user(server);
            drafts.push((server, message(&sender, &format!("{number} {sender}"))));
        }
        self.send(drafts).await;
    }

    /// Some change the room at once.
    async fn change(&mut self) {
        let mut drafts = Vec::new();
        let servers: Vec<usize> = (0..=NAMES.len()).filter(|_| self.random.gen_bool(0.5)).collect();
        for server in servers {
            let (sender, of) = (self.user(server), self.pick());
            let whom = self.user(of);
            drafts.push((server, self.does(&sender, &whom)));
        }
        self.send(drafts).await;
    }

    fn does(&mut self, sender: &UserId, whom: &UserId) -> Draft {
        let (bot, number) = (self.node(HUB).user("bot"), self.told.len());
        let state = |kind: &str, content: Value| draft(sender, kind, Some(""), content);
        match self.random.gen_range(0..17) {
            0..5 => state("m.room.topic", json!({ "topic": format!("{number} {sender}") })),
            5 => state("m.room.name", json!({ "name": format!("{number} {sender}") })),
            6 => member(sender, whom, "ban"),
            7 | 8 => member(sender, whom, "leave"),
            9 => member(sender, sender, "leave"),
            10 => {
                let content = json!({ "membership": "join", "displayname": format!("{number}") });
                draft(sender, "m.room.member", Some(sender.as_str()), content)
            }
            11 | 12 => member(sender, whom, "invite"),
            13 => {
                let rule = ["public", "knock", "invite"][self.random.gen_range(0..3)];
                state("m.room.join_rules", json!({ "join_rule": rule }))
            }
            // Mostly the room is one that is easily come into.
            14 => state("m.room.join_rules", json!({ "join_rule": "public" })),
            _ => {
                let level = 40 + self.random.gen_range(0..5) * 10;
                // The bot keeps its own.
                state("m.room.power_levels", levels(&bot, (*whom != bot).then_some((whom, level))))
            }
        }
    }

    async fn send(&mut self, drafts: Vec<(usize, Draft)>) {
        let now = self.clock.now_ms();
        let mut drafts: Vec<_> = drafts
            .into_iter()
            // The bot stays, or nobody could correct anything.
            .filter(|(_, draft)| {
                let is_of_bot = draft.state_key.as_deref().is_some_and(|key| key.starts_with("@bot:"));
                !is_of_bot || draft.kind != "m.room.member" || draft.content["membership"] == "join"
            })
            .collect();
        // Their clocks are not the same, so that of two branches either may win.
        for (_, draft) in &mut drafts {
            draft.origin_server_ts = now - self.random.gen_range(0..5_000);
        }
        let sending = drafts.iter().filter(|(server, _)| *server < NAMES.len()).map(async |(server, draft)| {
            let (node, draft) = (self.node(*server), draft.clone());
            let sending = async {
                match is_invite(&draft) {
                    true => node.lm.invite(&self.room, Outgoing { draft, effect: None }).await,
                    false => node.send(&self.room, draft).await,
                }
            };
            tokio::time::timeout(PATIENCE, sending).await.expect("a send ends")
        });
        let mut sent = futures::future::join_all(sending).await.into_iter();
        for (server, draft) in drafts {
            let what = format!("{} {:?} {}", draft.kind, draft.state_key, Value::Object(draft.content.clone()));
            let sender = draft.sender.clone();
            if server == NAMES.len() {
                // Some things are lost before anybody else has them, and what follows shows it.
                let is_lost = draft.kind == "m.room.message" && self.random.gen_bool(0.15);
                let id = self.home.send(&draft, if is_lost { &[] } else { &[HUB, GRAPH] });
                self.told.push(format!("{sender} on its own: {what} ({id}{})", if is_lost { ", lost" } else { "" }));
                continue;
            }
            let (id, is_lpdu) = match sent.next().unwrap() {
                Ok(Sent::Queued { lpdu_id }) => (lpdu_id, true),
                Ok(Sent::Appended(appended)) => (appended.event.event_id.clone(), false),
                Err(refusal) => {
                    self.told.push(format!("{sender}: {what}: {refusal}"));
                    continue;
                }
            };
            self.told.push(format!("{sender}: {what} ({id})"));
            // A participant's invite goes to the hub by another way than what else it says.
            let in_line = !is_lpdu || !is_invite(&draft);
            self.said.push(Said { sender, what, id, is_lpdu, in_line });
        }
    }

    /// Somebody joins, or knocks, or does not want to come any more.
    async fn come(&mut self) {
        let server = self.pick();
        let user = self.user(server);
        let what = self.random.gen_range(0..10);
        let membership = ["knock", "knock", "leave"].get(what).copied().unwrap_or("join");
        if server == NAMES.len() {
            self.send(vec![(server, member(&user, &user, membership))]).await;
            return;
        }
        if user.localpart() == "bot" && membership != "join" {
            return;
        }
        let (via, lm) = ([self.node(HUB).name.clone()], self.node(server).lm.clone());
        let coming = async {
            match membership {
                "knock" => lm.knock(&self.room, &user, &via, Object::new()).await.map(drop),
                "leave" => lm.leave(&self.room, &user, &via).await,
                _ => lm.join(&self.room, &user, &via, Object::new()).await.map(drop),
            }
        };
        let came = tokio::time::timeout(PATIENCE, coming).await.expect("a handshake ends");
        self.told.push(format!("{user} by a handshake: {membership}: {came:?}"));
    }

    async fn join(&self, server: usize, user: &OwnedUserId) -> Result<OwnedEventId, String> {
        let via = [self.node(HUB).name.clone()];
        let joining = self.node(server).lm.join(&self.room, user, &via, Object::new());
        let joined = tokio::time::timeout(PATIENCE, joining).await.expect("a join ends");
        joined.map(|joined| joined.event.event_id.clone()).map_err(|refusal| refusal.to_string())
    }

    fn heal(&mut self) {
        self.told.push("all links are there again".to_owned());
        self.links.cut.lock().unwrap().clear();
        self.hurry();
    }

    fn hurry(&self) {
        let names = || NAMES.into_iter().chain(["home.example"]);
        for node in self.nodes.iter().flatten() {
            for name in names().filter(|name| *name != node.name.as_str()) {
                node.context.outbound.retry(name.try_into().unwrap());
            }
        }
    }
}

fn is_invite(draft: &Draft) -> bool {
    draft.kind == "m.room.member" && draft.content["membership"] == "invite"
}

fn link_up(links: &Arc<Links>, index: usize, node: &Node, watchers: &mut Vec<Arc<Watcher>>, refused: &Refused) {
    watchers.push(node.watcher.clone());
    let keys = PARTS.contains(&index).then(|| keys_of_lm_alone(node));
    let refused = (index == HUB).then(|| refused.clone());
    let (links, keys, name) = (links.clone(), Arc::new(keys), node.name.to_string());
    node.meddle(move |request, next| {
        let (links, keys, name, refused) = (links.clone(), keys.clone(), name.clone(), refused.clone());
        async move {
            let refused = refused.filter(|_| request.uri().path().contains("/v1/send/"));
            let response = match &*keys {
                Some(keys) if request.uri().path() == "/_matrix/key/v2/server" => keys(),
                Some(_) if is_of_matrix_alone(request.uri().path()) => unrecognized(),
                _ => links.pass(&name, request, next).await,
            };
            let Some(refused) = refused.filter(|_| response.status().is_success()) else { return response };
            let (parts, body) = response.into_parts();
            let body = axum::body::to_bytes(body, 1 << 24).await.unwrap();
            let answer: Value = serde_json::from_slice(&body).unwrap();
            for (id, said) in answer["pdus"].as_object().into_iter().flatten() {
                // What waits for others is no verdict; of who has nobody in the room nothing waits.
                let waits = |why: &&str| why.contains("missing prev_events") && !why.contains("has nobody in the room");
                let why = said["error"].as_str().filter(|why| !waits(why));
                if let (Some(why), Ok(id)) = (why, OwnedEventId::try_from(id.as_str())) {
                    refused.lock().unwrap().insert(id, why.to_owned());
                }
            }
            Response::from_parts(parts, body.into())
        }
    });
}
