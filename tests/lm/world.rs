//! Servers of the linear side on loopback HTTP: each with its own store, keys, queues and routes, as the gateway has them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use futures::future::BoxFuture;
use isthmus::clock::{SharedClock, SystemClock};
use isthmus::config::Config;
use isthmus::dag::Dag;
use isthmus::event::{Lpdu, Object, RoomVersion};
use isthmus::federation::{Call, Context, RemoteError};
use isthmus::gateway::{Federation, federation_routes};
use isthmus::lm::{Appended, Lm, NewRoom, Position, Sent};
use isthmus::refusal::Refusal;
use isthmus::seam::{Draft, Outgoing, Raw};
use ruma::{OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId, RoomId, ServerName, UserId};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::support::between::Watcher;

/// How long anything may take before a test gives up.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where a test puts its meddler.
pub type Meddling = Arc<Mutex<Option<Meddler>>>;

/// What a test does with the requests to a server: before, after or instead of what the server does.
pub type Meddler = Arc<dyn Fn(Request, Next) -> BoxFuture<'static, Response> + Send + Sync>;

/// The middleware that has a test meddle.
pub async fn meddle(State(meddler): State<Meddling>, request: Request, next: Next) -> Response {
    let meddler = meddler.lock().unwrap().clone();
    match meddler {
        Some(meddler) => meddler(request, next).await,
        None => next.run(request).await,
    }
}

/// One server. It can be torn down and started again over the same store.
pub struct Node {
    pub name: OwnedServerName,
    pub context: Context,
    pub lm: Lm,
    pub dag: Dag,
    pub watcher: Arc<Watcher>,
    meddler: Meddling,
    listener: std::net::TcpListener,
    serving: JoinHandle<()>,
}

/// One that does not run. Whoever connects to where it listened is hung up on.
pub struct Stopped {
    name: OwnedServerName,
    listener: std::net::TcpListener,
    refusing: JoinHandle<()>,
}

/// Some servers that can reach each other.
pub struct World {
    directory: tempfile::TempDir,
    clock: SharedClock,
    resolve: BTreeMap<OwnedServerName, url::Url>,
    /// Whom all others believe about the keys of those who do not answer.
    notary: Option<&'static str>,
    /// `[hub_transfer]` of each server that has it.
    hub_transfer: BTreeMap<String, Value>,
}

impl World {
    /// Servers of these names.
    pub async fn new<const N: usize>(names: [&str; N]) -> (Self, [Node; N]) {
        Self::with_clock(names, Arc::new(SystemClock)).await
    }

    /// The same, with a clock of the test's.
    pub async fn with_clock<const N: usize>(names: [&str; N], clock: SharedClock) -> (Self, [Node; N]) {
        Self::begin(names, &[], clock, None).await
    }

    /// The same, where logs change hands as these settings of `[hub_transfer]` have it.
    pub async fn handing_over<const N: usize>(servers: [(&str, Value); N]) -> (Self, [Node; N]) {
        let (world, nodes) = Self::new(servers.each_ref().map(|(name, _)| *name)).await;
        world.handing_over_among(nodes, servers).await
    }

    /// Starts these servers again, with these settings of `[hub_transfer]`.
    pub async fn handing_over_among<const N: usize>(
        mut self,
        nodes: [Node; N],
        servers: [(&str, Value); N],
    ) -> (Self, [Node; N]) {
        self.hub_transfer = servers.into_iter().map(|(name, setting)| (name.to_owned(), setting)).collect();
        let mut restarted = Vec::new();
        for node in nodes {
            restarted.push(self.restart(node).await);
        }
        (self, restarted.try_into().unwrap_or_else(|_| panic!("as many nodes as names")))
    }

    /// The same, among others that are somewhere else.
    pub async fn with_others<const N: usize>(names: [&str; N], others: &[(&str, SocketAddr)]) -> (Self, [Node; N]) {
        Self::begin(names, others, Arc::new(SystemClock), None).await
    }

    /// The same, with a server among them that is the notary of all others.
    pub async fn with_notary<const N: usize>(
        names: [&str; N],
        clock: SharedClock,
        notary: Option<&'static str>,
    ) -> (Self, [Node; N]) {
        Self::begin(names, &[], clock, notary).await
    }

    /// The same with all that there is to choose.
    pub async fn begin<const N: usize>(
        names: [&str; N],
        others: &[(&str, SocketAddr)],
        clock: SharedClock,
        notary: Option<&'static str>,
    ) -> (Self, [Node; N]) {
        let directory = tempfile::tempdir().unwrap();
        let listeners = names.map(|name| (name, std::net::TcpListener::bind("127.0.0.1:0").unwrap()));
        let own = listeners.iter().map(|(name, listener)| (*name, listener.local_addr().unwrap()));
        let resolve = own
            .chain(others.iter().copied())
            .map(|(name, address)| (ServerName::parse(name).unwrap(), format!("http://{address}").parse().unwrap()));
        let hub_transfer = BTreeMap::new();
        let world = Self { resolve: resolve.collect(), directory, clock, notary, hub_transfer };
        let mut nodes = Vec::new();
        for (name, listener) in listeners {
            nodes.push(world.node(name, listener).await);
        }
        (world, nodes.try_into().unwrap_or_else(|_| panic!("as many nodes as names")))
    }

    async fn node(&self, name: &str, listener: std::net::TcpListener) -> Node {
        let file = |ending: &str| self.directory.path().join(format!("{name}.{ending}"));
        let notaries: Vec<_> = self.notary.into_iter().filter(|notary| *notary != name).collect();
        let config = json!({
            "server_name": name,
            "signing_key": file("key"),
            "database": { "url": format!("sqlite://{}", file("db").display()) },
            "federation": { "allow_private_networks": true, "resolve": self.resolve, "notaries": notaries },
        });
        let mut config: Config = serde_json::from_value(config).unwrap();
        if let Some(setting) = self.hub_transfer.get(name) {
            config.hub_transfer = serde_json::from_value(setting.clone()).unwrap();
        }
        let context = isthmus::gateway::context(config, self.clock.clone()).await.unwrap();
        let watcher = Arc::new(Watcher::default());
        let lm = Lm::new(context.clone(), watcher.clone());
        let dag = Dag::new(context.clone(), watcher.clone());
        lm.resume().await.unwrap();
        dag.resume().await.unwrap();
        let federation = Federation::new(context.clone(), lm.clone(), dag.clone(), watcher.clone());
        let routes = federation_routes(federation);
        let meddler: Meddling = Arc::default();
        let routes = routes.layer(axum::middleware::from_fn_with_state(meddler.clone(), meddle));
        context.outbound.start().await.unwrap();
        let accepting = listener.try_clone().unwrap();
        accepting.set_nonblocking(true).unwrap();
        let accepting = tokio::net::TcpListener::from_std(accepting).unwrap();
        let serving = tokio::spawn(async move { axum::serve(accepting, routes).await.unwrap() });
        Node { name: context.server_name.clone(), context, lm, dag, watcher, meddler, listener, serving }
    }

    /// Keeps a copy of a server's store as it is now.
    pub async fn back_up(&self, node: &Node) {
        let copy = self.directory.path().join(format!("{}.copy", node.name));
        let query = format!("VACUUM INTO '{}'", copy.display());
        sqlx::query(sqlx::AssertSqlSafe(query)).execute(node.context.store.reader()).await.unwrap();
    }

    /// Stops a server and starts it again over the copy.
    pub async fn roll_back(&self, node: Node) -> Node {
        let file = |ending: &str| self.directory.path().join(format!("{}.{ending}", node.name));
        let (copy, database) = (file("copy"), file("db"));
        self.restart_with(node, || {
            std::fs::copy(copy, &database).unwrap();
            for ending in ["-wal", "-shm"] {
                let mut beside = database.clone().into_os_string();
                beside.push(ending);
                // It may not be there.
                let _ = std::fs::remove_file(beside);
            }
        })
        .await
    }

    /// Stops a server and starts it again over the same store, with nothing kept in memory.
    pub async fn restart(&self, node: Node) -> Node {
        self.restart_with(node, || {}).await
    }

    async fn restart_with(&self, node: Node, meanwhile: impl FnOnce()) -> Node {
        let (name, listener) = shut_down(node).await;
        meanwhile();
        self.node(name.as_str(), listener).await
    }

    /// Stops a server.
    pub async fn stop(&self, node: Node) -> Stopped {
        let (name, listener) = shut_down(node).await;
        let accepting = tokio::net::TcpListener::from_std(listener.try_clone().unwrap()).unwrap();
        let refusing = tokio::spawn(async move { while accepting.accept().await.is_ok() {} });
        Stopped { name, listener, refusing }
    }

    /// Starts a server again over the same store.
    pub async fn start(&self, stopped: Stopped) -> Node {
        stopped.refusing.abort();
        let _ = stopped.refusing.await;
        self.node(stopped.name.as_str(), stopped.listener).await
    }
}

async fn shut_down(node: Node) -> (OwnedServerName, std::net::TcpListener) {
    let Node { name, context, lm, dag, listener, serving, watcher, meddler: _ } = node;
    serving.abort();
    let _ = serving.await;
    context.outbound.stop().await;
    context.store.close().await;
    drop((lm, dag, context, watcher));
    (name, listener)
}

impl Node {
    /// Has all requests to this server go through a test's hands.
    pub fn meddle<F>(&self, meddler: impl Fn(Request, Next) -> F + Send + Sync + 'static)
    where
        F: Future<Output = Response> + Send + 'static,
    {
        *self.meddler.lock().unwrap() = Some(Arc::new(move |request, next| Box::pin(meddler(request, next))));
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    pub fn url(&self, uri: &str) -> String {
        format!("http://{}{uri}", self.address())
    }

    pub fn user(&self, localpart: &str) -> OwnedUserId {
        UserId::parse(format!("@{localpart}:{}", self.name)).unwrap()
    }

    /// A room with `@bot` as its creator.
    pub async fn create_room(&self, join_rule: &str) -> OwnedRoomId {
        self.create_room_with(join_rule, json!({ "users": { self.user("bot"): 100 } })).await
    }

    pub async fn create_room_with(&self, join_rule: &str, power_levels: Value) -> OwnedRoomId {
        let bot = self.user("bot");
        let initial_state = vec![
            draft(&bot, "m.room.power_levels", Some(""), power_levels),
            draft(&bot, "m.room.join_rules", Some(""), json!({ "join_rule": join_rule })),
        ];
        let room = NewRoom { creator: bot, version: RoomVersion::Lm02, initial_state };
        self.lm.create_room(room).await.unwrap()
    }

    /// Joins a room as one of this server's users, through `hub`.
    pub async fn join(&self, room_id: &RoomId, localpart: &str, hub: &Node) -> Appended {
        self.lm.join(room_id, &self.user(localpart), std::slice::from_ref(&hub.name), Object::new()).await.unwrap()
    }

    pub async fn send(&self, room_id: &RoomId, draft: Draft) -> Result<Sent, Refusal> {
        self.lm.send(room_id, vec![Outgoing { draft, effect: None }]).await.pop().unwrap()
    }

    pub async fn say(&self, room_id: &RoomId, localpart: &str, body: &str) -> Sent {
        self.send(room_id, message(&self.user(localpart), body)).await.unwrap()
    }

    /// The whole log.
    pub async fn log(&self, room_id: &RoomId) -> Vec<Appended> {
        self.lm.log(room_id, Position(0), 1000).await.unwrap()
    }

    pub async fn bodies(&self, room_id: &RoomId) -> Vec<String> {
        bodies(&self.log(room_id).await)
    }

    /// Waits until the log is as wanted.
    pub async fn wait(&self, room_id: &RoomId, what: &str, wanted: impl Fn(&[Appended]) -> bool) -> Vec<Appended> {
        let mut news = self.watcher.news.subscribe();
        let waiting = async {
            loop {
                news.borrow_and_update();
                if let Ok(log) = self.lm.log(room_id, Position(0), 1000).await
                    && wanted(&log)
                {
                    return log;
                }
                // Own events of a hub are no news: look again now and then.
                let _ = tokio::time::timeout(Duration::from_millis(50), news.changed()).await;
            }
        };
        match tokio::time::timeout(PATIENCE, waiting).await {
            Ok(log) => log,
            Err(_) => panic!("{} waited in vain for {what}; the log is {:#?}", self.name, self.bodies(room_id).await),
        }
    }

    /// Waits until what the watcher has seen is as wanted.
    pub async fn wait_for_watcher(&self, what: &str, wanted: impl Fn(&Watcher) -> bool) {
        let mut news = self.watcher.news.subscribe();
        let seen = tokio::time::timeout(PATIENCE, news.wait_for(|_| wanted(&self.watcher))).await;
        assert!(seen.is_ok(), "{} waited in vain for {what}", self.name);
    }

    pub async fn wait_for_body(&self, room_id: &RoomId, body: &str) -> Vec<Appended> {
        self.wait(room_id, body, |log| bodies(log).iter().any(|found| found == body)).await
    }

    /// The kinds of faults of a room's hub that are on record, sorted.
    pub async fn fault_kinds(&self, room_id: &RoomId) -> Vec<String> {
        let (_, found) = isthmus::store::lm::faults(&self.context.store, room_id, 100).await.unwrap();
        let mut kinds: Vec<String> = found.into_iter().map(|fault| fault.kind).collect();
        kinds.sort();
        kinds
    }

    /// A correctly signed LPDU of this server, whoever its sender is.
    pub fn lpdu(&self, room_id: &RoomId, hub: &ServerName, draft: &Draft) -> Lpdu {
        let mut template = Object::new();
        template.insert("type".to_owned(), json!(draft.kind));
        template.insert("room_id".to_owned(), json!(room_id));
        template.insert("sender".to_owned(), json!(draft.sender));
        template.insert("content".to_owned(), Value::Object(draft.content.clone()));
        template.insert("origin_server_ts".to_owned(), json!(draft.origin_server_ts));
        if let Some(state_key) = &draft.state_key {
            template.insert("state_key".to_owned(), json!(state_key));
        }
        Lpdu::build(template, hub, &self.name, &self.context.signing_key).unwrap()
    }

    /// Sends a transaction as this server; the answer.
    pub async fn transact(&self, to: &Node, txn_id: &str, pdus: &[Value]) -> Result<Object, RemoteError> {
        let uri =
            format!("/_matrix/federation/unstable/org.matrix.i-d.ralston-mimi-linearized-matrix.02/send/{txn_id}");
        let body = json!({ "pdus": pdus }).as_object().unwrap().clone();
        self.context.client.call(&to.name, Call::put(uri, body), false).await
    }

    pub async fn get(&self, from: &Node, uri: &str) -> Result<Object, RemoteError> {
        self.context.client.call(&from.name, Call::get(uri), false).await
    }
}

pub fn draft(sender: &UserId, kind: &str, state_key: Option<&str>, content: Value) -> Draft {
    Draft {
        sender: sender.to_owned(),
        kind: kind.to_owned(),
        state_key: state_key.map(str::to_owned),
        content: content.as_object().unwrap().clone(),
        origin_server_ts: 1_700_000_000_000,
    }
}

pub fn message(sender: &UserId, body: &str) -> Draft {
    draft(sender, "m.room.message", None, json!({ "msgtype": "m.text", "body": body }))
}

pub fn member(sender: &UserId, target: &UserId, membership: &str) -> Draft {
    draft(sender, "m.room.member", Some(target.as_str()), json!({ "membership": membership }))
}

pub fn bodies(log: &[Appended]) -> Vec<String> {
    let body = |event: &Appended| event.event.content().get("body")?.as_str().map(str::to_owned);
    log.iter().filter_map(body).collect()
}

pub fn ids(log: &[Appended]) -> Vec<OwnedEventId> {
    log.iter().map(|event| event.event.event_id.clone()).collect()
}

pub fn raw(json: &Object) -> Raw {
    serde_json::value::to_raw_value(json).unwrap()
}

/// Positions are dense from 0 and each event follows the one before it (INV-1).
#[track_caller]
pub fn assert_dense(log: &[Appended]) {
    for (index, event) in log.iter().enumerate() {
        assert_eq!(event.position, Position(i64::try_from(index).unwrap()));
        let before = index.checked_sub(1).map(|before| vec![log[before].event.event_id.clone()]);
        assert_eq!(event.event.prev_events, before.unwrap_or_default());
    }
}
