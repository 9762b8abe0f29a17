//! The gateway with everything but its listeners for clients, an LM server, and a Matrix homeserver.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use isthmus::bridge::{Bridge, NewPortal, Portal};
use isthmus::clock::{Clock, SharedClock};
use isthmus::config::Config;
use isthmus::dag::Dag;
use isthmus::event::{Lpdu, Object, RoomVersion};
use isthmus::federation::{Call, Context};
use isthmus::gateway::{Federation, federation_routes};
use isthmus::identity::Side;
use isthmus::lm::{Appended, Lm, Position};
use isthmus::refusal::Refusal;
use isthmus::seam::{Alone, Draft, Outgoing, SharedBetween};
use ruma::{OwnedEventId, OwnedServerName, OwnedUserId, RoomId, ServerName, UserId};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::dag::peer::{Peer, View, id_of};
use crate::dag::{NOW, OWN};
use crate::lm::world::{Meddling, meddle};

/// How long anything may take before a test gives up. More than the 30 s for which a server is not asked for its keys again
/// that was killed while it was.
const PATIENCE: Duration = Duration::from_secs(180);
/// The LM server and the Matrix homeserver.
pub const LM: &str = "lm.example";
pub const MATRIX: &str = "matrix.example";
/// One more server, which runs when a test asks for it: an LM server, or a second gateway.
pub const OTHER: &str = "other.example";
/// A server that is gone for good: nothing listens there.
pub const DEAD: &str = "dead.example";

/// Time that goes on from the moment that the homeserver lives in, and that can be moved on, or stopped after so many
/// milliseconds.
struct Ticking(Instant, AtomicI64, Panics, std::sync::OnceLock<i64>);

/// In which files whoever asks for the time panics: one that is on the stack, and one that is not. Once each.
type Panics = std::sync::Mutex<Vec<(&'static str, Option<&'static str>)>>;

impl Clock for Ticking {
    fn now_ms(&self) -> i64 {
        if self.panics() {
            panic!("for the test");
        }
        NOW + self.3.get().copied().unwrap_or_else(|| self.elapsed()) + self.1.load(Ordering::SeqCst)
    }
}

impl Ticking {
    fn elapsed(&self) -> i64 {
        i64::try_from(self.0.elapsed().as_millis()).unwrap()
    }

    fn panics(&self) -> bool {
        let mut panics = self.2.lock().unwrap();
        if panics.is_empty() {
            return false;
        }
        let stack = std::backtrace::Backtrace::force_capture().to_string();
        let is_here = |(inside, outside): &(&str, Option<&str>)| {
            stack.contains(inside) && outside.is_none_or(|outside| !stack.contains(outside))
        };
        panics.iter().position(is_here).map(|index| panics.remove(index)).is_some()
    }
}

/// A server with routes, its own store and keys.
pub struct Node {
    pub context: Context,
    pub lm: Lm,
    pub dag: Dag,
    /// A test may put in here what it does with requests to the server.
    pub meddler: Meddling,
    listener: std::net::TcpListener,
    serving: JoinHandle<()>,
    stop: CancellationToken,
}

/// The gateway.
pub struct Gateway {
    pub node: Node,
    pub dag: Dag,
    pub bridge: Bridge,
}

pub struct World {
    directory: tempfile::TempDir,
    resolve: BTreeMap<OwnedServerName, url::Url>,
    clock: Arc<Ticking>,
    settings: Value,
    pub server: Node,
    pub peer: Peer,
    spare: std::net::TcpListener,
}

impl World {
    /// The three, with the gateway's settings besides the usual ones.
    pub async fn new(settings: Value) -> (Self, Gateway) {
        let directory = tempfile::tempdir().unwrap();
        let clock = Arc::new(Ticking(Instant::now(), AtomicI64::new(0), Panics::default(), Default::default()));
        let peer = Peer::start(MATRIX).await;
        let listeners = [OWN, LM, OTHER].map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        let mut resolve = BTreeMap::from([(peer.name.clone(), peer.url.clone())]);
        for (name, listener) in [OWN, LM, OTHER].into_iter().zip(&listeners) {
            let url = format!("http://{}", listener.local_addr().unwrap());
            resolve.insert(ServerName::parse(name).unwrap(), url.parse().unwrap());
        }
        resolve.insert(ServerName::parse(DEAD).unwrap(), "http://127.0.0.1:1".parse().unwrap());
        let [own, other, spare] = listeners;
        let hands_over = json!({ "hub_transfer": { "give": true, "accept": ["*"] } });
        let context = context(directory.path(), LM, &resolve, clock.clone(), &hands_over).await;
        let between: SharedBetween = Arc::new(Alone);
        let lm = Lm::new(context.clone(), between.clone());
        let server = serve(&context, &lm, Dag::new(context.clone(), between.clone()), between, other).await;
        let world = Self { directory, resolve, clock, settings, server, peer, spare };
        let gateway = world.start(OWN, own, &world.settings).await;
        (world, gateway)
    }

    /// Where a server listens.
    pub fn url_of(&self, name: &str) -> url::Url {
        self.resolve[&ServerName::parse(name).unwrap()].clone()
    }

    /// One more LM server.
    pub async fn other_server(&self) -> Node {
        let context = context(self.directory.path(), OTHER, &self.resolve, self.clock.clone(), &json!({})).await;
        let between: SharedBetween = Arc::new(Alone);
        let lm = Lm::new(context.clone(), between.clone());
        let dag = Dag::new(context.clone(), between.clone());
        serve(&context, &lm, dag, between, self.spare.try_clone().unwrap()).await
    }

    /// One more gateway.
    pub async fn other_gateway(&self) -> Gateway {
        self.start(OTHER, self.spare.try_clone().unwrap(), &json!({})).await
    }

    async fn start(&self, name: &str, listener: std::net::TcpListener, settings: &Value) -> Gateway {
        let context = context(self.directory.path(), name, &self.resolve, self.clock.clone(), settings).await;
        let bridge = Bridge::new(context.clone());
        let between = bridge.between();
        let lm = Lm::new(context.clone(), between.clone());
        let dag = Dag::new(context.clone(), between.clone());
        bridge.start(lm.clone(), dag.clone()).await.unwrap();
        let node = serve(&context, &lm, dag.clone(), between, listener).await;
        Gateway { node, dag, bridge }
    }

    /// The address of one more server that is to be somebody else's program.
    pub fn give_up_other(&mut self) -> std::net::SocketAddr {
        let spare = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        std::mem::replace(&mut self.spare, spare).local_addr().unwrap()
    }

    /// Where all servers are.
    pub fn resolve(&self) -> BTreeMap<OwnedServerName, url::Url> {
        self.resolve.clone()
    }

    /// Breaks everything off where it is, and starts again over the same store.
    pub async fn kill(&self, gateway: Gateway) -> Gateway {
        let Gateway { node: Node { context, lm, dag: _, listener, serving, stop, meddler: _ }, dag, bridge } = gateway;
        bridge.stop().await;
        // Its connections must go too, or who keeps one goes on talking with the dead.
        stop.cancel();
        let _ = tokio::time::timeout(PATIENCE, serving).await.unwrap();
        context.outbound.stop().await;
        context.store.close().await;
        drop((context, lm, dag, bridge));
        self.start(OWN, listener, &self.settings).await
    }

    /// From now on the gateway's database refuses to insert into a table.
    pub async fn break_inserts(&self, table: &str) {
        let trigger = format!(
            "CREATE TRIGGER broken_{table} BEFORE INSERT ON {table} BEGIN SELECT RAISE(ABORT, 'broken for the test'); END"
        );
        self.sql(&trigger).await;
    }

    /// From now on the gateway's database keeps what is in a side's inbox, and fails.
    pub async fn break_inbox(&self, side: Side) {
        let trigger = format!(
            "CREATE TRIGGER broken_bridge_inbox BEFORE DELETE ON bridge_inbox WHEN OLD.side = '{}' \
             BEGIN SELECT RAISE(ABORT, 'broken for the test'); END",
            side.as_str()
        );
        self.sql(&trigger).await;
    }

    /// From now on the gateway's database refuses to write down that a portal is so.
    pub async fn break_portals(&self, state: &str) {
        let trigger = format!(
            "CREATE TRIGGER broken_bridge_portals BEFORE UPDATE ON bridge_portals WHEN NEW.state = '{state}' \
             BEGIN SELECT RAISE(ABORT, 'broken for the test'); END"
        );
        self.sql(&trigger).await;
    }

    /// It takes them again.
    pub async fn mend_inserts(&self, table: &str) {
        self.sql(&format!("DROP TRIGGER broken_{table}")).await;
    }

    async fn sql(&self, statement: &str) {
        use sqlx::Connection as _;
        let url = format!("sqlite://{}", self.directory.path().join(format!("{OWN}.db")).display());
        let mut connection = sqlx::AnyConnection::connect(&url).await.unwrap();
        sqlx::query(sqlx::AssertSqlSafe(statement.to_owned())).execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
    }

    /// Who asks for the time next inside one file, and not inside another, panics.
    pub fn panic_inside(&self, inside: &'static str, outside: Option<&'static str>) {
        self.clock.2.lock().unwrap().push((inside, outside));
    }

    /// Whether a panic that was asked for is still to come.
    pub fn will_panic(&self) -> bool {
        !self.clock.2.lock().unwrap().is_empty()
    }

    /// A public portal with alice of the Matrix side and bob of the LM side in it, and alice's view of its graph.
    pub async fn portal_of_two(&self, gateway: &Gateway) -> (Arc<Portal>, View) {
        let portal = gateway.public_portal().await;
        let alice = self.matrix_user("alice");
        let view = self.matrix_join(gateway, &portal.matrix_room_id, &alice).await.unwrap();
        self.lm_join(&portal.lm_room_id, "bob").await.unwrap();
        so("all members everywhere", || gateway.in_step(&portal)).await;
        (portal, view)
    }

    /// Alice and bob each say something, and both are heard on the other side: all that they did before has been looked at.
    pub async fn last_words(&self, gateway: &Gateway, portal: &Portal, view: &mut View) {
        self.matrix_say(gateway, view, &self.matrix_user("alice"), "last of alice").await;
        self.lm_say(&portal.lm_room_id, "bob", "last of bob").await;
        let alices = (ghost(Side::Matrix, "alice"), "last of alice".to_owned());
        let bobs = (ghost(Side::Lm, "bob"), "last of bob".to_owned());
        so("alice's last word", || async { self.server.bodies(&portal.lm_room_id).await.contains(&alices) }).await;
        so("bob's last word", || async { gateway.matrix_bodies(&portal.matrix_room_id).await.contains(&bobs) }).await;
    }

    /// Stops everybody's clock: from now on time goes only as far as it is moved.
    pub fn stop_clock(&self) {
        let _ = self.clock.3.set(self.clock.elapsed());
    }

    /// Moves everybody's clock on, or back.
    pub fn advance(&self, ms: i64) {
        self.clock.1.fetch_add(ms, Ordering::SeqCst);
    }

    pub fn lm_user(&self, localpart: &str) -> OwnedUserId {
        UserId::parse(format!("@{localpart}:{LM}")).unwrap()
    }

    pub fn matrix_user(&self, localpart: &str) -> OwnedUserId {
        UserId::parse(format!("@{localpart}:{MATRIX}")).unwrap()
    }

    /// A user of the LM server joins a room that the gateway keeps.
    pub async fn lm_join(&self, room: &RoomId, localpart: &str) -> Result<Appended, Refusal> {
        let content = object(json!({ "displayname": localpart.to_uppercase() }));
        self.server.lm.join(room, &self.lm_user(localpart), &[OWN.try_into().unwrap()], content).await
    }

    /// A user of the LM server joins a room of that server.
    pub async fn lm_join_own(&self, room: &RoomId, localpart: &str) {
        let user = self.lm_user(localpart);
        let content = json!({ "membership": "join", "displayname": localpart });
        self.lm_send(room, draft(&user, "m.room.member", Some(user.as_str()), content)).await;
    }

    pub async fn lm_send(&self, room: &RoomId, draft: Draft) {
        let sent = self.server.lm.send(room, vec![Outgoing { draft, effect: None }]).await.pop().unwrap();
        sent.unwrap();
    }

    /// Sends an event to the gateway's log whatever the LM server thinks of it.
    pub async fn lm_send_unjudged(&self, room: &RoomId, draft: Draft) {
        let mut template = object(json!({
            "room_id": room,
            "sender": draft.sender,
            "type": draft.kind,
            "content": draft.content,
            "origin_server_ts": draft.origin_server_ts,
        }));
        if let Some(state_key) = draft.state_key {
            template.insert("state_key".to_owned(), json!(state_key));
        }
        let context = &self.server.context;
        let own: ruma::OwnedServerName = OWN.try_into().unwrap();
        let lpdu = Lpdu::build(template, &own, &context.server_name, &context.signing_key).unwrap();
        // Under the ID of a transaction that was answered nothing is looked at.
        let uri = format!("/_matrix/federation/v2/send/{}", lpdu.lpdu_id.as_str().trim_start_matches('$'));
        let answer = context.client.call(&own, Call::put(uri, object(json!({ "pdus": [lpdu.json] }))), false).await;
        assert_eq!(answer.unwrap()["failed_pdus"], json!({}));
    }

    pub async fn lm_say(&self, room: &RoomId, localpart: &str, body: &str) {
        self.lm_send(room, message(&self.lm_user(localpart), body)).await;
    }

    /// A user of the homeserver joins a room of the gateway.
    pub async fn matrix_join(&self, gateway: &Gateway, room: &RoomId, user: &UserId) -> Result<View, Refusal> {
        Self::matrix_join_from(&self.peer, gateway, room, user).await
    }

    /// A user of any homeserver joins a room of the gateway.
    pub async fn matrix_join_from(
        peer: &Peer,
        gateway: &Gateway,
        room: &RoomId,
        user: &UserId,
    ) -> Result<View, Refusal> {
        Self::join_at(peer, &gateway.dag, room, user).await
    }

    /// A user of any homeserver joins a room through any server.
    pub async fn join_at(peer: &Peer, dag: &Dag, room: &RoomId, user: &UserId) -> Result<View, Refusal> {
        let versions: Vec<String> = RoomVersion::ALL.iter().map(|version| version.as_str().to_owned()).collect();
        let made = dag.make_join(&peer.name, room, user, &versions).await?;
        let version = RoomVersion::parse(made["room_version"].as_str().unwrap()).unwrap();
        let mut event = made["event"].clone();
        event["content"]["displayname"] = json!(user.localpart().to_uppercase());
        let (id, event) = peer.sign(version, event);
        let answer = dag.send_join(&peer.name, room, &id, event.clone(), false).await?;
        let mut view = View { version, room_id: room.to_owned(), state: BTreeMap::new(), tips: Vec::new(), depth: 0 };
        for event in answer["auth_chain"].as_array().unwrap().iter().chain(answer["state"].as_array().unwrap()) {
            let event = object(event.clone());
            peer.keep(&id_of(version, &event), &event);
        }
        for event in answer["state"].as_array().unwrap() {
            let event = object(event.clone());
            view.note(id_of(version, &event), &event);
        }
        peer.keep(&id, &event);
        view.note(id, &event);
        Ok(view)
    }

    /// A user of the homeserver sends an event; its ID.
    pub async fn matrix_send(
        &self,
        gateway: &Gateway,
        view: &mut View,
        user: &UserId,
        kind: &str,
        state_key: Option<&str>,
        content: Value,
    ) -> OwnedEventId {
        let (id, event) = view.add(&self.peer, user, kind, state_key, content);
        let answers = self.peer.put(&gateway.dag, &[&event]).await;
        for answer in answers {
            answer.result.unwrap();
        }
        id
    }

    pub async fn matrix_say(&self, gateway: &Gateway, view: &mut View, user: &UserId, body: &str) -> OwnedEventId {
        let content = json!({ "msgtype": "m.text", "body": body });
        self.matrix_send(gateway, view, user, "m.room.message", None, content).await
    }

    /// Brings a homeserver's view up to what the gateway has.
    pub async fn refresh(&self, gateway: &Gateway, view: &mut View) {
        let mut view_of = Vec::new();
        for (id, event) in gateway.matrix_events(&view.room_id).await {
            view_of.push((id, event));
        }
        let prevs: std::collections::BTreeSet<String> = view_of
            .iter()
            .flat_map(|(_, event)| event["prev_events"].as_array().unwrap().clone())
            .filter_map(|id| id.as_str().map(str::to_owned))
            .collect();
        let state = gateway.dag.state(&view.room_id).await.unwrap();
        for (id, event) in &view_of {
            self.peer.keep(id, event);
            view.depth = view.depth.max(event["depth"].as_i64().unwrap());
        }
        view.state = state.iter().map(|(key, event)| (key.clone(), event.event_id.clone())).collect();
        view.tips = view_of.into_iter().map(|(id, _)| id).filter(|id| !prevs.contains(id.as_str())).collect();
    }
}

impl Gateway {
    /// A new portal whose rooms everybody may join.
    pub async fn public_portal(&self) -> Arc<Portal> {
        let new = NewPortal { join_rule: Some("public".to_owned()), ..NewPortal::default() };
        self.bridge.create_portal(new).await.unwrap()
    }

    pub fn bot(&self) -> OwnedUserId {
        crate::dag::bot()
    }

    /// All accepted events of a Matrix room, in the order in which they were stored.
    pub async fn matrix_events(&self, room: &RoomId) -> Vec<(OwnedEventId, Object)> {
        let rows: Vec<(String, Vec<u8>)> =
            sqlx::query_as("SELECT event_id, json FROM dag_events WHERE room_id = $1 AND status = 0 ORDER BY seq")
                .bind(room.as_str())
                .fetch_all(self.node.context.store.reader())
                .await
                .unwrap();
        rows.into_iter()
            .map(|(id, json)| (id.as_str().try_into().unwrap(), object(serde_json::from_slice(&json).unwrap())))
            .collect()
    }

    /// The messages of a Matrix room: sender and body.
    pub async fn matrix_bodies(&self, room: &RoomId) -> Vec<(String, String)> {
        let events = self.matrix_events(room).await;
        events.into_iter().filter_map(|(_, event)| said(&Value::Object(event))).collect()
    }

    /// A member's content in the Matrix room.
    pub async fn matrix_member(&self, room: &RoomId, user: &str) -> Option<Object> {
        let event = self.dag.state_event(room, "m.room.member", user).await.unwrap()?;
        Some(event.content.clone())
    }

    pub async fn matrix_state(&self, room: &RoomId, kind: &str) -> Option<Object> {
        Some(self.dag.state_event(room, kind, "").await.unwrap()?.content.clone())
    }

    /// How many invites of ghosts are written down.
    pub async fn invitations(&self) -> i64 {
        let reader = self.node.context.store.reader();
        sqlx::query_scalar("SELECT COUNT(*) FROM bridge_invitations").fetch_one(reader).await.unwrap()
    }

    /// The two states are in step, when the queues are empty (INV-4).
    pub async fn in_step(&self, portal: &Portal) -> bool {
        let health = self.bridge.health(&portal.portal_id).await.unwrap();
        let empty = health.waiting.iter().all(|waiting| waiting.count == 0) && health.pending == 0;
        empty && self.bridge.out_of_step(&portal.portal_id).await.unwrap() == 0
    }
}

impl Node {
    pub async fn log(&self, room: &RoomId) -> Vec<Appended> {
        self.lm.log(room, Position(0), 10_000).await.unwrap_or_default()
    }

    /// The messages of a log: sender and body.
    pub async fn bodies(&self, room: &RoomId) -> Vec<(String, String)> {
        self.log(room).await.iter().filter_map(|event| said(&Value::Object(event.event.json.clone()))).collect()
    }

    pub async fn state(&self, room: &RoomId, kind: &str, state_key: &str) -> Option<Object> {
        let state = self.lm.state(room).await.ok()?;
        Some(state.get(kind, state_key)?.content().clone())
    }

    pub async fn membership(&self, room: &RoomId, user: &str) -> String {
        let content = self.state(room, "m.room.member", user).await.unwrap_or_default();
        content.get("membership").and_then(Value::as_str).unwrap_or("leave").to_owned()
    }
}

/// Runs a scenario with Matrix rooms of each version that the gateway makes.
pub async fn in_each_version(scenario: impl AsyncFn(World, Gateway)) {
    for version in ["10", "11", "12"] {
        eprintln!("Matrix room version {version}");
        let (world, gateway) = World::new(json!({ "portals": { "matrix_room_version": version } })).await;
        scenario(world, gateway).await;
    }
}

/// Waits until `found` finds something.
pub async fn until<T, F: Future<Output = Option<T>>>(what: &str, mut found: impl FnMut() -> F) -> T {
    let waiting = async {
        loop {
            if let Some(found) = found().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    match tokio::time::timeout(PATIENCE, waiting).await {
        Ok(found) => found,
        Err(_) => panic!("waited in vain for {what}"),
    }
}

/// Waits until it is so.
pub async fn so<F: Future<Output = bool>>(what: &str, mut is: impl FnMut() -> F) {
    until(what, || {
        let is = is();
        async move { is.await.then_some(()) }
    })
    .await;
}

pub fn object(value: Value) -> Object {
    value.as_object().unwrap().clone()
}

pub fn draft(sender: &UserId, kind: &str, state_key: Option<&str>, content: Value) -> Draft {
    Draft {
        sender: sender.to_owned(),
        kind: kind.to_owned(),
        state_key: state_key.map(str::to_owned),
        content: object(content),
        origin_server_ts: NOW,
    }
}

pub fn message(sender: &UserId, body: &str) -> Draft {
    draft(sender, "m.room.message", None, json!({ "msgtype": "m.text", "body": body }))
}

pub fn said(event: &Value) -> Option<(String, String)> {
    let body = event["content"]["body"].as_str()?;
    Some((event["sender"].as_str()?.to_owned(), body.to_owned()))
}

async fn context(
    directory: &std::path::Path,
    name: &str,
    resolve: &BTreeMap<OwnedServerName, url::Url>,
    clock: SharedClock,
    settings: &Value,
) -> Context {
    let file = |ending: &str| directory.join(format!("{name}.{ending}"));
    let mut config = json!({
        "server_name": name,
        "signing_key": file("key"),
        "database": { "url": format!("sqlite://{}", file("db").display()) },
        "federation": { "allow_private_networks": true, "resolve": resolve },
    });
    for (key, value) in settings.as_object().unwrap() {
        config[key] = value.clone();
    }
    config["media"]["cache_dir"] = json!(file("media"));
    let config: Config = serde_json::from_value(config).unwrap();
    isthmus::gateway::context(config, clock).await.unwrap()
}

async fn serve(context: &Context, lm: &Lm, dag: Dag, between: SharedBetween, listener: std::net::TcpListener) -> Node {
    let its_dag = dag.clone();
    let routes = federation_routes(Federation::new(context.clone(), lm.clone(), dag, between));
    let meddler = Meddling::default();
    let routes = routes.layer(axum::middleware::from_fn_with_state(meddler.clone(), meddle));
    context.outbound.start().await.unwrap();
    let accepting = listener.try_clone().unwrap();
    accepting.set_nonblocking(true).unwrap();
    let accepting = tokio::net::TcpListener::from_std(accepting).unwrap();
    let stop = CancellationToken::new();
    let serving = axum::serve(accepting, routes).with_graceful_shutdown(stop.clone().cancelled_owned());
    let serving = tokio::spawn(async move { serving.await.unwrap() });
    Node { context: context.clone(), lm: lm.clone(), dag: its_dag, meddler, listener, serving, stop }
}

/// The ghost of a user on the side across.
pub fn ghost(of: Side, localpart: &str) -> String {
    match of {
        Side::Matrix => format!("@mx_{localpart}_{MATRIX}:{OWN}"),
        Side::Lm => format!("@lm_{localpart}_{LM}:{OWN}"),
    }
}
