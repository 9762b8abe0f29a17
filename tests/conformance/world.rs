//! A server of the linear side and the suite, on loopback.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use isthmus::clock::SystemClock;
use isthmus::conformance::{Options, Report, Role, run_on};
use isthmus::event::{Object, RoomVersion};
use isthmus::lm::NewRoom;
use ruma::OwnedServerName;
use serde_json::json;

use crate::lm::world::{Node, World, draft, message};

pub const SUITE: &str = "suite.example";
pub const SECOND: &str = "second.example";
/// A server that is known not to be there.
pub const NOBODY: &str = "nobody.example";

/// A server that can find the suite, and the socket on which the suite is to listen.
pub async fn target(name: &str) -> (World, Node, TcpListener) {
    let (world, [node], socket) = targets([name]).await;
    (world, node, socket)
}

/// The same of several servers.
pub async fn targets<const N: usize>(names: [&str; N]) -> (World, [Node; N], TcpListener) {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let others = [(SUITE, address), (SECOND, address), (NOBODY, closed)];
    let (world, nodes) = World::with_others(names, &others).await;
    (world, nodes, socket)
}

/// A public room in which the suite's user has power.
pub async fn room(node: &Node) -> ruma::OwnedRoomId {
    room_of(node, "public").await
}

pub async fn room_of(node: &Node, join_rule: &str) -> ruma::OwnedRoomId {
    let users = json!({ node.user("bot"): 100, format!("@conformance:{SUITE}"): 100 });
    node.create_room_with(join_rule, json!({ "users": users })).await
}

/// The same, shared with a server that keeps its graph and has said something.
pub async fn shared_room_of(hub: &Node, graph: &Node) -> ruma::OwnedRoomId {
    let bot = hub.user("bot");
    let state = |kind: &str, content| draft(&bot, kind, Some(""), content);
    let users = json!({ bot.as_str(): 100, format!("@conformance:{SUITE}"): 100 });
    let initial_state = vec![
        state("m.room.power_levels", json!({ "users": users })),
        state("m.room.join_rules", json!({ "join_rule": "public" })),
    ];
    let room = NewRoom { creator: bot.clone(), version: RoomVersion::Lm02, initial_state };
    let room = hub.lm.create_shared(room).await.unwrap();
    graph.join(&room, "grace", hub).await;
    let role = graph.lm.room(&room).await.unwrap().unwrap().role;
    assert!(matches!(role, isthmus::lm::Role::GraphServer { .. }), "{role:?}");
    graph.say(&room, "grace", "hello").await;
    hub.wait_for_body(&room, "hello").await;
    room
}

pub fn options(node: &Node, role: Role) -> Options {
    let name = |name: &str| OwnedServerName::try_from(name).unwrap();
    Options {
        target: node.name.clone(),
        url: Some(node.url("").parse().unwrap()),
        role,
        name: name(SUITE),
        second: Some(name(SECOND)),
        user: "conformance".to_owned(),
        listen: "127.0.0.1:0".parse().unwrap(),
        tls: None,
        signing_key: None,
        custom_ca: Vec::new(),
        allow_private_networks: true,
        patience: Duration::from_secs(20),
        limit: Duration::from_secs(20),
        only: Vec::new(),
    }
}

pub async fn examine(socket: TcpListener, options: Options) -> Report {
    run_on(socket, options, Arc::new(SystemClock), |row| println!("{row}   [{} ms]", row.took_ms)).await.unwrap()
}

/// Alice accepts the invite of the suite, says something, and stays.
pub async fn accept(node: &Node) {
    let user = node.user("alice");
    let mut news = node.watcher.news.subscribe();
    news.wait_for(|_| !node.watcher.invites.lock().unwrap().is_empty()).await.unwrap();
    let room = node.watcher.invites.lock().unwrap()[0].room_id.clone();
    let hub = OwnedServerName::try_from(SUITE).unwrap();
    // What the suite does to the server may spoil this; then its checks say so.
    match node.lm.join(&room, &user, &[hub], Object::new()).await {
        Ok(_) => drop(node.send(&room, message(&user, "hello")).await),
        Err(refusal) => println!("the join was refused: {refusal}"),
    }
    std::future::pending().await
}
