//! isthmus passes its own suite.

use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use isthmus::clock::SystemClock;
use isthmus::conformance::{Options, Role, Unmet, run_on};
use reqwest::Method;
use serde_json::json;

use super::world::{NOBODY, SECOND, SUITE, accept, examine, options, room_of, shared_room_of, target, targets};
use crate::lm::hub_transfer::wait_for_hub;
use crate::support::testbed::certificates::Authority;
use crate::support::testbed::gateway::Plan;
use crate::support::world::{scratch, server};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn isthmus_passes_as_a_hub() {
    let (_world, node, socket) = target("hub.example").await;
    let room = room_of(&node, "public").await;
    let report = examine(socket, options(&node, Role::Participant { room: room.clone() })).await;
    println!("{}", report.summary());
    assert_eq!(report.failed(), Vec::<&str>::new());
    // There is no TLS on loopback.
    assert_eq!(report.skipped(), ["LM-T-001", "LM-T-002", "LM-T-003"]);
    let rules =
        node.lm.state(&room).await.unwrap().get("m.room.join_rules", "").unwrap().content()["join_rule"].clone();
    assert_eq!(rules, "public", "all is as it was");
}

/// As a process, over TLS, with a Matrix room behind the room that is examined.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_gateway_that_admins_run_passes_as_a_hub() {
    let directory = scratch("conformance");
    let authority = Authority::new(&directory).unwrap();
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let suite = format!("http://{}", socket.local_addr().unwrap());
    let mut plan = Plan::new(&directory.join("g"), Path::new(env!("CARGO_BIN_EXE_isthmus")), &authority).unwrap();
    plan.resolve(SUITE, &suite);
    plan.resolve(SECOND, &suite);
    let gateway = plan.start().await.unwrap();
    // The draft's own version; the others of these tests are of the peers'.
    let portal = json!({ "kind": "create", "name": "Examined", "join_rule": "public", "lm_room_version": "I.1" });
    let portal = gateway.admin(Method::POST, "/portals", Some(portal)).await.unwrap();
    let power = json!({ "user_id": format!("@conformance:{SUITE}"), "level": 100, "side": "lm" });
    let id = portal["portal_id"].as_str().unwrap();
    gateway.admin(Method::PUT, &format!("/portals/{id}/power"), Some(power)).await.unwrap();
    let options = Options {
        target: server(&gateway.server_name),
        url: None,
        role: Role::Participant { room: portal["lm_room_id"].as_str().unwrap().try_into().unwrap() },
        name: server(SUITE),
        second: Some(server(SECOND)),
        user: "conformance".to_owned(),
        listen: "127.0.0.1:0".parse().unwrap(),
        tls: None,
        signing_key: None,
        custom_ca: vec![authority.file.clone()],
        allow_private_networks: true,
        patience: Duration::from_secs(20),
        limit: Duration::from_secs(20),
        only: Vec::new(),
    };
    let report = examine(socket, options).await;
    println!("{}", report.summary());
    assert_eq!((report.failed(), report.skipped()), (Vec::new(), Vec::new()));
}

/// Its events are redacted by the graph servers' table, and so hashed and signed, and a knock names what graph servers judge it by
/// (`docs/conformance.md`, deviations 15 and 18).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn isthmus_passes_as_the_hub_of_a_shared_room_but_for_what_graph_servers_need() {
    let (_world, [node, graph], socket) = targets(["hub.example", "graph.example"]).await;
    let room = shared_room_of(&node, &graph).await;
    let report = examine(socket, options(&node, Role::Participant { room: room.clone() })).await;
    println!("{}", report.summary());
    assert_eq!(report.failed(), ["LM-R-020", "LM-E-013"]);
    // There is no TLS on loopback.
    assert_eq!(report.skipped(), ["LM-T-001", "LM-T-002", "LM-T-003"]);
    graph.say(&room, "grace", "still here").await;
    node.wait_for_body(&room, "still here").await;
}

/// What was said before it took the log over its predecessor has signed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn isthmus_passes_as_the_hub_of_a_log_that_it_took_over() {
    let (world, nodes, socket) = targets(["old.example", "hub.example"]).await;
    let on = || crate::lm::hub_transfer::on();
    let (_world, [old, node]) = world.handing_over_among(nodes, [("old.example", on()), ("hub.example", on())]).await;
    let users = json!({ old.user("bot"): 100, node.user("bot"): 100, format!("@conformance:{SUITE}"): 100 });
    let room = old.create_room_with("public", json!({ "users": users })).await;
    node.join(&room, "bot", &old).await;
    node.say(&room, "bot", "before").await;
    old.wait_for_body(&room, "before").await;
    old.lm.hand_over(&room, &old.user("bot"), &node.name, false).await.unwrap();
    wait_for_hub(&node, &room, &node).await;
    let report = examine(socket, options(&node, Role::Participant { room })).await;
    println!("{}", report.summary());
    assert_eq!(report.failed(), Vec::<&str>::new());
    // There is no TLS on loopback, and the log's beginning is the predecessor's.
    assert_eq!(report.skipped(), ["LM-T-001", "LM-T-002", "LM-T-003", "LM-R-016"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_find_the_suite_is_told_so_once() {
    let (_world, node, socket) = target("hub.example").await;
    let room = room_of(&node, "public").await;
    // Nobody is where this name leads.
    let name = NOBODY.try_into().unwrap();
    let options = Options { name, second: None, ..options(&node, Role::Participant { room }) };
    let report = examine(socket, options).await;
    assert_eq!(report.failed(), ["LM-A-015"]);
    let why = report.rows.iter().filter_map(|row| match &row.outcome {
        Err(Unmet::Skip(why)) => Some((row.id, why)),
        _ => None,
    });
    let (told, other): (Vec<_>, Vec<_>) =
        why.partition(|(_, why)| why.contains("has not asked the suite for the keys"));
    assert!(told.len() > 200, "{told:?}");
    assert!(other.iter().all(|(id, _)| id.starts_with("LM-T-00")), "{other:?}");
}

/// What a server that is not examined still has for the suite's name counts neither for nor against the one that is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_other_servers_send_is_not_held_against_the_target() {
    let (_world, node, socket) = target("hub.example").await;
    let address = socket.local_addr().unwrap();
    let room = room_of(&node, "public").await;
    // The socket takes it from now on; it is answered when the suite listens.
    let (next, mut rows) = tokio::sync::mpsc::unbounded_channel();
    next.send(()).unwrap();
    let in_room = room.clone();
    let strays = tokio::spawn(async move {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let mut count = 0;
        while rows.recv().await.is_some() {
            count += 1;
            // Too many events, of which each lacks all that one has, always in the same transaction, and a signature of nobody.
            let event = json!({ "room_id": in_room, "type": "m.room.message", "n": count, "content": {} });
            let header = format!(r#"X-Matrix origin="stray.example",destination="{SUITE}",key="ed25519:1",sig="AAAA""#);
            let request = client
                .put(format!("http://{address}/_matrix/federation/v1/send/same"))
                .header("host", SUITE)
                .header("authorization", header)
                .json(&json!({ "pdus": vec![event; 51] }));
            // At the end of the run nobody listens any more.
            drop(request.send().await);
        }
    });
    let options = Options { only: vec!["LM-E".to_owned()], ..options(&node, Role::Participant { room }) };
    let report = run_on(socket, options, Arc::new(SystemClock), |_| {
        let _ = next.send(());
    })
    .await
    .unwrap();
    assert_eq!(report.failed(), Vec::<&str>::new());
    assert_eq!(report.skipped(), Vec::<&str>::new());
    strays.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn isthmus_passes_as_a_participant() {
    let (_world, node, socket) = target("spoke.example").await;
    let examining = examine(socket, options(&node, Role::Hub { invite: node.user("alice") }));
    let report = tokio::select! {
        report = examining => report,
        () = accept(&node) => unreachable!("it stays in the room"),
    };
    println!("{}", report.summary());
    assert_eq!(report.failed(), Vec::<&str>::new());
    assert_eq!(report.skipped(), Vec::<&str>::new());
}
