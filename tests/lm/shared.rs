//! Shared rooms over real routes: a hub that keeps a graph and its log, and servers that do LM alone.

use axum::body::Body;
use axum::response::Response;
use http::Method;
use isthmus::event::{RoomVersion, sign_object};
use isthmus::lm::{NewRoom, Role};
use ruma::{OwnedRoomId, RoomId};
use serde_json::{Value, json};

use super::http::ask_signed;
use super::world::{Node, World, assert_dense, bodies, draft, ids, member, message};

/// Has a server say in its keys that it does LM alone.
fn does_lm_alone(node: &Node) {
    let (keyring, name, key) = (node.context.keyring.clone(), node.name.clone(), node.context.signing_key.clone());
    node.meddle(move |request, next| {
        let (keyring, name, key) = (keyring.clone(), name.clone(), key.clone());
        async move {
            if request.uri().path() != "/_matrix/key/v2/server" {
                return next.run(request).await;
            }
            let mut keys = keyring.own_keys();
            keys.remove("signatures");
            keys.insert("m.linearized".to_owned(), json!(true));
            sign_object(&mut keys, name.as_str(), &key);
            Response::new(Body::from(json!(keys).to_string()))
        }
    });
}

async fn shared_room(hub: &Node, join_rule: &str) -> OwnedRoomId {
    let bot = hub.user("bot");
    let state = |kind: &str, content: Value| draft(&bot, kind, Some(""), content);
    let initial_state = vec![
        state("m.room.power_levels", json!({ "users": { bot.as_str(): 100 } })),
        state("m.room.join_rules", json!({ "join_rule": join_rule })),
    ];
    let room = NewRoom { creator: bot.clone(), version: RoomVersion::Lm02, initial_state };
    hub.lm.create_shared(room).await.unwrap()
}

/// The log has what the graph has, and nothing else.
async fn in_step(hub: &Node, room: &RoomId) {
    let (log, graph) = (hub.lm.state(room).await.unwrap(), hub.dag.state(room).await.unwrap());
    let of_log: Vec<_> = log.iter().map(|(kind, key, event)| (kind, key, &event.event_id)).collect();
    let of_graph: Vec<_> = graph.iter().map(|((kind, key), event)| (&**kind, &**key, &event.event_id)).collect();
    assert_eq!(of_log, of_graph);
    let log = hub.log(room).await;
    assert_dense(&log);
    for appended in log {
        assert!(hub.dag.event(&appended.event.event_id).await.unwrap().is_some(), "not in the graph");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lm_servers_take_part_in_a_shared_room_through_its_log() {
    let (world, [hub, part, other]) = World::new(["hub.example", "part.example", "other.example"]).await;
    does_lm_alone(&part);
    does_lm_alone(&other);
    let room = shared_room(&hub, "public").await;
    assert!(hub.lm.is_shared(&room).await.unwrap() && hub.dag.knows(&room).await.unwrap());
    part.join(&room, "alice", &hub).await;
    other.join(&room, "bob", &hub).await;
    assert!(matches!(part.lm.room(&room).await.unwrap().unwrap().role, Role::Participant { .. }));
    hub.say(&room, "bot", "from the hub").await;
    part.say(&room, "alice", "from a participant").await;
    other.say(&room, "bob", "from another").await;
    for node in [&hub, &part, &other] {
        node.wait_for_body(&room, "from the hub").await;
        node.wait_for_body(&room, "from a participant").await;
        node.wait_for_body(&room, "from another").await;
    }
    // What is said over the graph is in the log as well.
    let said = hub
        .dag
        .send(&room, vec![isthmus::seam::Outgoing { draft: message(&hub.user("bot"), "by the graph"), effect: None }]);
    said.await.pop().unwrap().unwrap();
    part.wait_for_body(&room, "by the graph").await;
    in_step(&hub, &room).await;

    // A kick, and what it ends; a redaction by the table of graph servers.
    hub.send(&room, member(&hub.user("bot"), &other.user("bob"), "leave")).await.unwrap();
    other.wait(&room, "the kick", |log| log.last().is_some_and(|last| last.event.kind == "m.room.member")).await;
    let target = part.wait_for_body(&room, "from a participant").await;
    let target = target.iter().find(|appended| bodies(std::slice::from_ref(*appended)) == ["from a participant"]);
    let target = target.unwrap().event.event_id.clone();
    part.send(&room, draft(&part.user("alice"), "m.room.redaction", None, json!({ "redacts": target }))).await.unwrap();
    hub.wait(&room, "the redaction", |log| log.last().is_some_and(|last| last.event.kind == "m.room.redaction")).await;
    in_step(&hub, &room).await;

    // Across a restart.
    let hub = world.restart(hub).await;
    hub.say(&room, "bot", "after the restart").await;
    part.say(&room, "alice", "still here").await;
    for node in [&hub, &part] {
        node.wait_for_body(&room, "after the restart").await;
        node.wait_for_body(&room, "still here").await;
    }
    in_step(&hub, &room).await;
    let (at_hub, at_part) = (hub.log(&room).await, part.log(&room).await);
    assert!(ids(&at_hub).ends_with(&ids(&at_part)[ids(&at_part).len() - 3..]));
    assert!(part.lm.room(&room).await.unwrap().unwrap().complaints.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn invites_into_a_shared_room_are_signed_by_the_invited_server_and_in_its_graph() {
    let (_world, [hub, part, third]) = World::new(["hub.example", "part.example", "third.example"]).await;
    does_lm_alone(&part);
    does_lm_alone(&third);
    let room = shared_room(&hub, "invite").await;
    let invite = |by: &ruma::UserId, who: &Node, name: &str| isthmus::seam::Outgoing {
        draft: member(by, &who.user(name), "invite"),
        effect: None,
    };
    hub.lm.invite(&room, invite(&hub.user("bot"), &part, "alice")).await.unwrap();
    part.join(&room, "alice", &hub).await;
    part.lm.invite(&room, invite(&part.user("alice"), &third, "carol")).await.unwrap();
    third.join(&room, "carol", &hub).await;
    third.say(&room, "carol", "hello").await;
    part.wait_for_body(&room, "hello").await;
    in_step(&hub, &room).await;
    let log = hub.log(&room).await;
    let invites: Vec<_> =
        log.iter().filter(|appended| appended.event.content().get("membership") == Some(&json!("invite"))).collect();
    assert_eq!(invites.len(), 2);
    for (appended, server) in invites.iter().zip(["part.example", "third.example"]) {
        assert!(appended.event.json["signatures"].get(server).is_some(), "{:?}", appended.event.json);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shared_room_gives_lm_servers_the_partial_template_and_others_the_whole_one() {
    let (_world, [hub, part, graph]) = World::new(["hub.example", "part.example", "graph.example"]).await;
    does_lm_alone(&part);
    let room = shared_room(&hub, "public").await;
    let template = async |node: &Node| {
        let version = RoomVersion::Lm02.as_str();
        let uri = format!("/_matrix/federation/v1/make_join/{room}/{}?ver={version}", node.user("a"));
        let (status, answer) = ask_signed(node, &hub, &Method::GET, &uri, None).await;
        assert_eq!(status, 200, "{answer}");
        answer["event"].as_object().unwrap().clone()
    };
    let (partial, whole) = (template(&part).await, template(&graph).await);
    assert!(!partial.contains_key("prev_events") && !partial.contains_key("auth_events"), "{partial:?}");
    assert!(!whole["prev_events"].as_array().unwrap().is_empty() && !whole.contains_key("depth"), "{whole:?}");
    assert!(!whole["auth_events"].as_array().unwrap().is_empty() && !whole.contains_key("hub_server"), "{whole:?}");
}
