//! Shared rooms over real routes: a hub that keeps a graph and its log, and servers that do LM alone.

use std::sync::Arc;

use axum::body::Body;
use axum::response::Response;
use http::{Method, StatusCode};
use isthmus::clock::{Clock as _, SystemClock};
use isthmus::event::{Links, Pdu, Redaction, RoomVersion, sign_object};
use isthmus::lm::{NewRoom, Role};
use isthmus::refusal::Refusal;
use isthmus::seam::{Graphs, JoinShared};
use ruma::{OwnedRoomId, RoomId};
use serde_json::{Value, json};

use super::http::ask_signed;
use super::log_hub::respond;
use super::world::{Node, World, assert_dense, bodies, draft, ids, member, message, raw};
use crate::dag::peer::{Peer, View};

/// Has a server do LM alone: it says so in its keys, and has none of Matrix' endpoints.
pub(super) fn does_lm_alone(node: &Node) {
    let keys = Arc::new(keys_of_lm_alone(node));
    node.meddle(move |request, next| {
        let keys = keys.clone();
        async move {
            match request.uri().path() {
                "/_matrix/key/v2/server" => keys(),
                path if is_of_matrix_alone(path) => unrecognized(),
                _ => next.run(request).await,
            }
        }
    });
}

/// Whether a path is one of federation that the draft does not have, by either name.
pub(super) fn is_of_matrix_alone(path: &str) -> bool {
    const OF_THE_DRAFT: [&str; 14] = [
        "unstable/org.matrix.i-d.ralston-mimi-linearized-matrix.02/",
        "v1/version",
        "v1/make_join/",
        "v1/make_leave/",
        "v1/make_knock/",
        "v1/state/",
        "v1/state_ids/",
        "v1/user/",
        "v2/send/",
        "v2/backfill/",
        "v2/event/",
        "v3/invite/",
        "v3/send_",
        "v1/media/",
    ];
    let rest = path.strip_prefix("/_matrix/federation/");
    rest.is_some_and(|rest| !OF_THE_DRAFT.iter().any(|start| rest.starts_with(start)))
}

/// What a server answers that has no such endpoint.
pub(super) fn unrecognized() -> Response {
    let error = json!({ "errcode": "M_UNRECOGNIZED", "error": "there is no such endpoint" });
    respond(StatusCode::NOT_FOUND, error)
}

/// What a server that does LM alone answers who asks for its keys.
pub(super) fn keys_of_lm_alone(node: &Node) -> impl Fn() -> Response + Send + Sync + use<> {
    let (keyring, name, key) = (node.context.keyring.clone(), node.name.clone(), node.context.signing_key.clone());
    move || {
        let mut keys = keyring.own_keys();
        keys.remove("signatures");
        keys.insert("m.linearized".to_owned(), json!(true));
        sign_object(&mut keys, name.as_str(), &key);
        Response::new(Body::from(json!(keys).to_string()))
    }
}

pub(super) async fn shared_room(hub: &Node, join_rule: &str) -> OwnedRoomId {
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
pub(super) async fn in_step(hub: &Node, room: &RoomId) {
    in_step_with_forks(hub, room).await;
    assert_dense(&hub.log(room).await);
}

/// The same, where not each event follows the one before it.
async fn in_step_with_forks(hub: &Node, room: &RoomId) {
    let (log, graph) = (hub.lm.state(room).await.unwrap(), hub.dag.state(room).await.unwrap());
    let of_log: Vec<_> = log.iter().map(|(kind, key, event)| (kind, key, &event.event_id)).collect();
    let of_graph: Vec<_> = graph.iter().map(|((kind, key), event)| (&**kind, &**key, &event.event_id)).collect();
    assert_eq!(of_log, of_graph);
    for appended in hub.log(room).await {
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
    let redaction = draft(&part.user("alice"), "m.room.redaction", None, json!({ "redacts": target }));
    // Signed by the draft's table alone it cannot be taken, and its server is told why.
    let by_draft = part.lpdu(&room, &hub.name, &redaction);
    let refused = hub.lm.receive(&part.name, vec![raw(&by_draft.json)]).await.pop().unwrap().result.unwrap_err();
    assert!(
        matches!(refused, Refusal::BadSignature { .. }) && refused.to_string().contains("content.redacts"),
        "{refused}"
    );
    part.send(&room, redaction).await.unwrap();
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
async fn invites_into_a_shared_room_follow_all_that_its_graph_has_also_where_it_forks() {
    let clock = Arc::new(SystemClock);
    let home = Peer::start_at("home.example", clock.now_ms()).await;
    let at = format!("{}:{}", home.url.host_str().unwrap(), home.url.port().unwrap()).parse().unwrap();
    let names = ["hub.example", "part.example", "third.example"];
    let (_world, [hub, part, third]) = World::begin(names, &[("home.example", at)], clock, None).await;
    does_lm_alone(&part);
    does_lm_alone(&third);
    let room = shared_room(&hub, "public").await;
    let grace = home.user("grace");
    let mut view = home.join_at(&hub.dag, &room, &grace).await.unwrap();
    // What the homeserver says follows what it has heard, and that is never what the log has last.
    let says = async |view: &mut View, body: &str| {
        let (id, event) = view.say(&home, &grace, body);
        assert!(hub.dag.receive(&home.name, vec![raw(&event)]).await.iter().all(|one| one.result.is_ok()));
        assert!(hub.dag.event(&id).await.unwrap().is_some());
    };
    let invite = |by: ruma::OwnedUserId, name: &str| isthmus::seam::Outgoing {
        draft: member(&by, &third.user(name), "invite"),
        effect: None,
    };
    let asked = || third.watcher.invites.lock().unwrap().len();

    part.join(&room, "alice", &hub).await;
    says(&mut view, "alice is not in yet").await;
    part.lm.invite(&room, invite(part.user("alice"), "carol")).await.unwrap();
    let by_alice = hub.wait(&room, "alice's invite", |log| log.last().unwrap().event.lpdu_id.is_some()).await;
    let by_alice = by_alice.last().unwrap().event.clone();
    assert_eq!((by_alice.kind.as_str(), by_alice.prev_events.len()), ("m.room.member", 2));
    assert!(by_alice.json["signatures"].get("third.example").is_some(), "{:?}", by_alice.json);
    third.join(&room, "carol", &hub).await;

    // Whoever was let in again can be invited again, also by the hub.
    let (bot, carol) = (hub.user("bot"), third.user("carol"));
    hub.send(&room, member(&bot, &carol, "ban")).await.unwrap();
    hub.send(&room, member(&bot, &carol, "leave")).await.unwrap();
    says(&mut view, "carol is in").await;
    hub.lm.invite(&room, invite(bot.clone(), "carol")).await.unwrap();
    let state = hub.lm.state(&room).await.unwrap();
    let mut members = state.iter().filter(|(kind, user, _)| (*kind, *user) == ("m.room.member", carol.as_str()));
    assert_eq!(members.next().unwrap().2.content()["membership"], "invite");

    // What is forbidden is so before anybody is asked.
    hub.send(&room, member(&bot, &carol, "ban")).await.unwrap();
    says(&mut view, "carol is asked").await;
    let before = asked();
    hub.lm.invite(&room, invite(bot, "carol")).await.unwrap_err();
    assert_eq!(asked(), before);
    in_step_with_forks(&hub, &room).await;
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_35_a_handshake_is_answered_once_whether_it_is_the_logs_or_the_graphs() {
    let (_world, [hub, part, graph]) = World::new(["hub.example", "part.example", "graph.example"]).await;
    let room = shared_room(&hub, "public").await;
    let whole = async |node: &Node, name: &str| {
        let user = node.user(name);
        let uri = format!("/_matrix/federation/v1/make_join/{room}/{user}?ver={}", RoomVersion::Lm02.as_str());
        let (status, answer) = ask_signed(node, &hub, &Method::GET, &uri, None).await;
        assert_eq!(status, 200, "{answer}");
        let template = answer["event"].as_object().unwrap().clone();
        let ids = |key: &str| {
            let ids = template[key].as_array().unwrap().iter();
            ids.map(|id| id.as_str().unwrap().try_into().unwrap()).collect::<Vec<ruma::OwnedEventId>>()
        };
        let links = Links {
            auth_events: ids("auth_events"),
            prev_events: ids("prev_events"),
            redaction: Redaction::GraphServer,
        };
        let mut event = template.clone();
        event.retain(|key, _| !["auth_events", "prev_events", "hashes", "signatures"].contains(&key.as_str()));
        let event = Pdu::build_among(event, links, &node.name, &node.context.signing_key).unwrap();
        Value::Object(event.json)
    };
    let lpdu = |node: &Node, name: &str| {
        Value::Object(node.lpdu(&room, &hub.name, &member(&node.user(name), &node.user(name), "join")).json)
    };
    let send = async |node: &Node, id: &str, body: &Value| {
        let uri = format!("/_matrix/federation/v3/send_join/{id}");
        let (status, answer) = ask_signed(node, &hub, &Method::POST, &uri, Some(body)).await;
        assert_eq!(status, 200, "{answer}");
        answer["event"].clone()
    };
    // Who takes part by the log gets no whole template any more.
    let anna = whole(&part, "anna").await;
    let alice = send(&part, "1", &lpdu(&part, "alice")).await;
    assert_eq!(send(&part, "1", &anna).await, alice);
    let bob = send(&graph, "1", &whole(&graph, "bob").await).await;
    assert_eq!(send(&graph, "1", &lpdu(&graph, "berta")).await, bob);
    assert_eq!(send(&graph, "1", &whole(&graph, "boris").await).await, bob);
    let joined: Vec<_> = hub.dag.joined(&room).await.unwrap().into_iter().collect();
    assert_eq!(joined, [part.user("alice"), graph.user("bob"), hub.user("bot")]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_took_part_by_the_log_comes_back_to_the_log() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    // As it was before it served graphs.
    hub.meddle(|request, next| async move {
        let is_template = request.uri().path().contains("/make_join/");
        let response = next.run(request).await;
        if !is_template {
            return response;
        }
        let bytes = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
        let mut made: Value = serde_json::from_slice(&bytes).unwrap();
        let event = made["event"].as_object_mut().unwrap();
        event.retain(|key, _| !["auth_events", "prev_events"].contains(&key.as_str()));
        Response::new(Body::from(made.to_string()))
    });
    let room = shared_room(&hub, "public").await;
    let is_participant = async || {
        let role = part.lm.room(&room).await.unwrap().unwrap().role;
        assert!(matches!(role, Role::Participant { .. }), "{role:?}");
    };
    part.join(&room, "alice", &hub).await;
    is_participant().await;
    part.lm.leave(&room, &part.user("alice"), &[]).await.unwrap();
    hub.wait(&room, "the leave", |log| log.last().unwrap().event.content()["membership"] == "leave").await;
    hub.meddle(|request, next| next.run(request));
    part.join(&room, "alice", &hub).await;
    is_participant().await;
    hub.say(&room, "bot", "welcome back").await;
    part.wait_for_body(&room, "welcome back").await;
    part.say(&room, "alice", "thank you").await;
    hub.wait_for_body(&room, "thank you").await;
    // As a graph it is not joined, and nothing is sent.
    let log = ids(&hub.log(&room).await);
    let (room_id, via, user_id) = (room.clone(), hub.name.clone(), part.user("anna"));
    let join = JoinShared { room_id, via, user_id, content: isthmus::event::Object::new() };
    let refusal = Graphs::join(&part.dag, join).await.unwrap_err();
    assert!(
        matches!(&refusal, Refusal::Forbidden(why) if why.contains("as a log that hub.example keeps")),
        "{refusal}"
    );
    assert_eq!(ids(&hub.log(&room).await), log);
}

/// The log of a shared room, too, has an LPDU once: in a transaction twice, in another, and after a restart.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_35_the_same_lpdu_again_is_in_the_log_of_a_shared_room_once() {
    let (world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    does_lm_alone(&part);
    let room = shared_room(&hub, "public").await;
    part.join(&room, "alice", &hub).await;
    let to = hub.name.clone();
    let lpdu = |body: &str| json!(part.lpdu(&room, &to, &message(&part.user("alice"), body)).json);
    let (twice, again) = (lpdu("twice"), lpdu("again"));
    let none = json!({ "failed_pdus": {} }).as_object().unwrap().clone();
    assert_eq!(part.transact(&hub, "1", &[twice.clone(), twice.clone()]).await.unwrap(), none);
    assert_eq!(part.transact(&hub, "2", &[again.clone(), twice.clone()]).await.unwrap(), none);
    let hub = world.restart(hub).await;
    assert_eq!(part.transact(&hub, "3", &[twice, again]).await.unwrap(), none);
    assert_eq!(hub.bodies(&room).await, ["twice", "again"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_52_whom_a_shared_rooms_list_denies_does_not_come_in_by_the_log_either() {
    let (world, [hub, part, other]) = World::new(["hub.example", "part.example", "other.example"]).await;
    does_lm_alone(&part);
    does_lm_alone(&other);
    let room = shared_room(&hub, "public").await;
    part.join(&room, "alice", &hub).await;
    part.join(&room, "dave", &hub).await;
    other.join(&room, "bob", &hub).await;
    let list = json!({ "allow": ["*"], "deny": ["part.example"], "allow_ip_literals": true });
    hub.send(&room, draft(&hub.user("bot"), "m.room.server_acl", Some(""), list)).await.unwrap();
    let hub = world.restart(hub).await;

    let lpdu = |node: &Node, draft: &isthmus::seam::Draft| node.lpdu(&room, &hub.name, draft);
    let carol = part.user("carol");
    for draft in [message(&part.user("alice"), "denied"), member(&carol, &carol, "join")] {
        let refused = hub.lm.receive(&part.name, vec![raw(&lpdu(&part, &draft).json)]).await.remove(0).result;
        assert!(matches!(refused, Err(Refusal::ServerAcl(_))), "{refused:?}");
    }
    let join = lpdu(&part, &member(&carol, &carol, "join")).json;
    let refused = hub.lm.send_join(&part.name, join).await;
    assert!(matches!(refused, Err(Refusal::ServerAcl(_))), "{refused:?}");
    let invite = lpdu(&part, &member(&part.user("alice"), &other.user("oscar"), "invite")).json;
    let version = RoomVersion::Lm02.as_str();
    let body = json!({ "event": invite, "room_version": version, "invite_room_state": [] });
    let refused = hub.lm.invited(&part.name, body.as_object().unwrap().clone()).await;
    assert!(matches!(refused, Err(Refusal::ServerAcl(_))), "{refused:?}");
    let head = hub.log(&room).await.last().unwrap().event.event_id.clone();
    let federation = "/_matrix/federation";
    for uri in [
        format!("{federation}/v1/make_join/{room}/{carol}?ver={version}"),
        format!("{federation}/v1/make_knock/{room}/{carol}?ver={version}"),
        format!("{federation}/v1/state/{room}?event_id={head}"),
        format!("{federation}/v2/backfill/{room}?v={head}&limit=5"),
        format!("{federation}/v2/event/{head}"),
    ] {
        let (status, error) = ask_signed(&part, &hub, &Method::GET, &uri, None).await;
        assert_eq!((status, &error["errcode"]), (403, &json!("M_FORBIDDEN")), "{uri}: {error}");
    }
    // Who is not named goes on, and nobody is kept from leaving.
    other.say(&room, "bob", "allowed").await;
    hub.wait_for_body(&room, "allowed").await;
    let (alice, dave) = (part.user("alice"), part.user("dave"));
    let leave = raw(&lpdu(&part, &member(&alice, &alice, "leave")).json);
    assert_eq!(hub.lm.receive(&part.name, vec![leave]).await.remove(0).result, Ok(()));
    hub.lm.make_leave(&part.name, &room, &dave).await.unwrap();
    hub.lm.send_leave(&part.name, lpdu(&part, &member(&dave, &dave, "leave")).json).await.unwrap();
    assert!(!hub.bodies(&room).await.contains(&"denied".to_owned()));
    in_step(&hub, &room).await;
}
