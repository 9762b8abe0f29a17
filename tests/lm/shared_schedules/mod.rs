//! A shared room whose servers come and go: a hub that keeps graph and log, a graph server, two servers that do LM alone, and the
//! test's own homeserver, which builds on old views. They talk, change the room and throw each other out on both sides of links
//! that are cut, answers get lost and servers are started again. Afterwards the log is one, and its state is the graph's.
//!
//! `ISTHMUS_SEED=N cargo test shared_schedules` runs the schedule of that seed, `ISTHMUS_SEEDS=N` those of the first N.

mod check;
mod homeserver;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use futures::FutureExt as _;
use isthmus::clock::{Clock, SystemClock};
use isthmus::event::{Object, RoomVersion, VerifyKey, VerifyKeys};
use isthmus::lm::{Appended, NewRoom, Role, Sent};
use isthmus::seam::Draft;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use ruma::{OwnedEventId, OwnedRoomId, OwnedUserId, UserId};
use serde_json::{Value, json};

use self::homeserver::Homeserver;
use super::schedules::{Fault, Links, same_log, stay_began};
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

/// What a server said that it took.
struct Said {
    sender: OwnedUserId,
    /// What it was.
    what: String,
    id: OwnedEventId,
    is_lpdu: bool,
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
        let mut watchers = Vec::new();
        for (index, node) in nodes.iter().enumerate() {
            link_up(&links, index, node, &mut watchers);
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
        Self { world, clock, random, links, nodes, home, room, watchers, said, keys: verify, told }
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
                link_up(&self.links, index, &node, &mut self.watchers);
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
        match self.random.gen_range(0..13) {
            0..5 => state("m.room.topic", json!({ "topic": format!("{number} {sender}") })),
            5 => state("m.room.name", json!({ "name": format!("{number} {sender}") })),
            6 => member(sender, whom, "ban"),
            7 | 8 => member(sender, whom, "leave"),
            9 => member(sender, sender, "leave"),
            10 => {
                let content = json!({ "membership": "join", "displayname": format!("{number}") });
                draft(sender, "m.room.member", Some(sender.as_str()), content)
            }
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
                draft.state_key.is_none()
                    || draft.kind != "m.room.member"
                    || draft.content["membership"] == "join"
                    || !draft.state_key.as_deref().is_some_and(|key| key.starts_with("@bot:"))
            })
            .collect();
        // Their clocks are not the same, so that of two branches either may win.
        for (_, draft) in &mut drafts {
            draft.origin_server_ts = now - self.random.gen_range(0..5_000);
        }
        let sending = drafts.iter().filter(|(server, _)| *server < NAMES.len()).map(async |(server, draft)| {
            let sending = self.node(*server).send(&self.room, draft.clone());
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
            self.said.push(Said { sender, what, id, is_lpdu });
        }
    }

    async fn come(&mut self) {
        let server = self.pick();
        let user = self.user(server);
        if server == NAMES.len() {
            self.send(vec![(server, member(&user, &user, "join"))]).await;
            return;
        }
        let joined = self.join(server, &user).await;
        self.told.push(format!("{user} joins: {joined:?}"));
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

    /// Waits until nothing is on its way.
    async fn quiet(&mut self) {
        let start = Instant::now();
        let mut still = 0;
        while still < 5 {
            let mut waiting = Vec::new();
            for node in self.nodes.iter().flatten() {
                let queues = node.context.outbound.status().await.unwrap().into_iter();
                waiting.extend(queues.filter(|queue| queue.waiting > 0).map(|queue| (node.name.clone(), queue)));
            }
            self.deliver().await;
            let is_still = waiting.is_empty() && self.home.waiting.is_empty();
            still = if is_still { still + 1 } else { 0 };
            let home = &self.home.waiting;
            assert!(start.elapsed() < PATIENCE, "waits for ever: {waiting:#?} {home:?}\n{:#?}", self.told);
            self.hurry();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until all that was said is everywhere, with one user of every server in the room.
    async fn settle(&mut self) {
        self.heal();
        self.quiet().await;
        self.clock.0.fetch_add(61_000, Ordering::SeqCst);
        let bot = self.node(HUB).user("bot");
        // What was corrected too often in a minute is tried again with the next event.
        self.send(vec![(HUB, message(&bot, "settling"))]).await;
        self.quiet().await;
        let all: Vec<OwnedUserId> =
            (1..=NAMES.len()).map(|server| UserId::parse(format!("@u0:{}", self.name(server))).unwrap()).collect();
        let state = self.node(HUB).dag.state(&self.room).await.unwrap();
        for user in &all {
            let is = state.get(&("m.room.member".to_owned(), user.to_string()));
            if is.is_some_and(|event| event.content["membership"] == "ban") {
                self.send(vec![(HUB, member(&bot, user, "leave"))]).await;
            }
        }
        self.quiet().await;
        for (server, user) in all.iter().enumerate().map(|(index, user)| (index + 1, user)) {
            if server < NAMES.len() {
                if let Err(why) = self.join(server, user).await {
                    panic!("{user} cannot join: {why} {:#?}", self.told);
                }
            } else {
                self.home.view = self.home.peer.join_at(&self.node(HUB).dag, &self.room, user).await.unwrap();
            }
        }
        self.quiet().await;
        // Each with all that is there before it, so that nothing is left that only one of them goes by.
        let node = self.nodes[GRAPH].as_ref().unwrap();
        self.home.look(node, &self.room).await;
        for server in [NAMES.len(), GRAPH, HUB, PARTS[0], PARTS[1]] {
            let sender = if server == HUB { bot.clone() } else { all[server - 1].clone() };
            self.clock.0.fetch_add(61_000, Ordering::SeqCst);
            self.send(vec![(server, message(&sender, &format!("{sender} at the end")))]).await;
            self.quiet().await;
        }
    }

    async fn check(&self) {
        let (hub, room) = (self.node(HUB), &self.room);
        let log = hub.log(room).await;
        check::ancestors_come_first(hub, &log, 0).await;
        check::each_passes_at_its_place(hub, room, &self.keys).await;
        self.nothing_is_missing(&log).await;
        for part in PARTS {
            let node = self.node(part);
            same_log(&log, &node.log(room).await, &node.name);
        }
        let graph = self.node(GRAPH);
        let of_graph = graph.log(room).await;
        // Its log begins with the state of then, and what is before that may come to be known later.
        let began = stay_began(&of_graph, &graph.name).expect("somebody of it is in the room");
        check::ancestors_come_first(graph, &of_graph, began).await;
        check::one_graph(hub, graph, room).await;
        let left = check::in_step(hub, room).await;
        assert_eq!(left, [], "{:#?}", self.told);
        self.home_has_all(&log);
    }

    /// What was taken is in the log once, or it is known why it is not: the hub refused it, or the graph had decided otherwise.
    async fn nothing_is_missing(&self, log: &[Appended]) {
        assert_dense_enough(log);
        let mut by_id: HashMap<&OwnedEventId, usize> = HashMap::new();
        let mut by_body: BTreeSet<(&UserId, &str)> = BTreeSet::new();
        for (place, one) in log.iter().enumerate() {
            for id in [Some(&one.event.event_id), one.event.lpdu_id.as_ref()].into_iter().flatten() {
                assert!(by_id.insert(id, place).is_none(), "{id} is in the log twice");
            }
            if let Some(body) = one.event.content().get("body").and_then(Value::as_str) {
                assert!(by_body.insert((&one.event.sender, body)), "{body} is in the log twice: {:#?}", self.told);
            }
        }
        let refused: BTreeSet<OwnedEventId> = self
            .watchers
            .iter()
            .flat_map(|watcher| watcher.refused.lock().unwrap().clone())
            .map(|(id, _)| id)
            .collect();
        let (mut last, mut missing): (BTreeMap<&OwnedUserId, usize>, usize) = Default::default();
        for said in &self.said {
            let Some(place) = by_id.get(&said.id) else {
                missing += 1;
                let why = match said.is_lpdu {
                    true => refused.contains(&said.id).then(|| "refused".to_owned()),
                    false => self.verdict(&said.id).await,
                };
                assert!(why.is_some(), "{} {} is lost: {:#?}", said.what, said.id, self.told);
                println!("{} {}: {why:?}", said.sender, said.what);
                continue;
            };
            let before = last.insert(&said.sender, *place);
            assert!(before < Some(*place), "{} is out of its sender's order: {:#?}", said.what, self.told);
        }
        assert!(missing * 4 < self.said.len(), "{missing} of {} are not there: {:#?}", self.said.len(), self.told);
        for id in &self.home.taken {
            let is_there = by_id.contains_key(id) || self.verdict(id).await.is_some();
            assert!(is_there, "{id} of {} is lost: {:#?}", self.home.peer.name, self.told);
        }
    }

    /// Why the hub did not take an event that it has into the room.
    async fn verdict(&self, id: &OwnedEventId) -> Option<String> {
        let rows = isthmus::store::dag::events(&self.node(HUB).context.store, std::slice::from_ref(id)).await.unwrap();
        rows.into_iter().next().filter(|row| row.status != 0)?.reason
    }

    /// The test's homeserver was sent all of its last stay.
    fn home_has_all(&self, log: &[Appended]) {
        let name = &self.home.peer.name;
        let began = stay_began(log, name).expect("somebody of it is in the room");
        let got = self.home.got.lock().unwrap();
        for one in log[began..].iter().filter(|one| one.event.sender.server_name() != *name) {
            let id = &one.event.event_id;
            assert!(got.contains(id), "{name} was not sent {id} {:?}: {:#?}", one.event.content(), self.told);
        }
    }
}

/// INV-1: positions are dense. (What each event follows is the graph's.)
#[track_caller]
fn assert_dense_enough(log: &[Appended]) {
    assert!(log.iter().enumerate().all(|(index, one)| usize::try_from(one.position.0) == Ok(index)));
}

fn link_up(links: &Arc<Links>, index: usize, node: &Node, watchers: &mut Vec<Arc<Watcher>>) {
    watchers.push(node.watcher.clone());
    let keys = PARTS.contains(&index).then(|| keys_of_lm_alone(node));
    let (links, keys, name) = (links.clone(), Arc::new(keys), node.name.to_string());
    node.meddle(move |request, next| {
        let (links, keys, name) = (links.clone(), keys.clone(), name.clone());
        async move {
            match &*keys {
                Some(keys) if request.uri().path() == "/_matrix/key/v2/server" => keys(),
                Some(_) if is_of_matrix_alone(request.uri().path()) => unrecognized(),
                _ => links.pass(&name, request, next).await,
            }
        }
    });
}
