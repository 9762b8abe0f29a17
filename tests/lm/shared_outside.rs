//! Users of servers that are not in a shared room: they are invited and told, and whatever their servers know of Matrix, it holds up
//! nothing else.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::StatusCode;
use isthmus::event::{Object, Pdu, Redaction};
use isthmus::lm::Role;
use isthmus::seam::Outgoing;
use ruma::RoomId;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::log_hub::respond;
use super::shared::{does_lm_alone, in_step, is_of_matrix_alone, keys_of_lm_alone, shared_room, unrecognized};
use super::world::{Node, World, draft, member};

/// What a server was asked: by whom, and the path.
type Asked = Arc<Mutex<Vec<(String, String)>>>;

/// Notes what a server that does LM alone is asked, and what of that it does not know.
fn does_lm_alone_and_notes(node: &Node) -> Asked {
    let (keys, asked) = (Arc::new(keys_of_lm_alone(node)), Asked::default());
    let noting = asked.clone();
    node.meddle(move |request, next| {
        let (keys, asked) = (keys.clone(), noting.clone());
        async move {
            let path = request.uri().path().to_owned();
            let by = request.headers().get("authorization").and_then(|value| value.to_str().ok());
            asked.lock().unwrap().push((by.unwrap_or_default().to_owned(), path.clone()));
            match &*path {
                "/_matrix/key/v2/server" => keys(),
                path if is_of_matrix_alone(path) => unrecognized(),
                _ => next.run(request).await,
            }
        }
    });
    asked
}

/// Has a server know Matrix' endpoints alone, as far as they are about invites: it signs all that it gets.
fn does_matrix_alone(node: &Node) -> Asked {
    let asked = Asked::default();
    let (noting, name, key) = (asked.clone(), node.name.clone(), node.context.signing_key.clone());
    node.meddle(move |request, next| {
        let (asked, name, key) = (noting.clone(), name.clone(), key.clone());
        async move {
            let path = request.uri().path().to_owned();
            asked.lock().unwrap().push((String::new(), path.clone()));
            if path.starts_with("/_matrix/key/") {
                return next.run(request).await;
            }
            if path.starts_with("/_matrix/federation/v1/send/") {
                return respond(StatusCode::OK, json!({ "pdus": {} }));
            }
            if !path.starts_with("/_matrix/federation/v2/invite/") {
                return unrecognized();
            }
            let bytes = axum::body::to_bytes(request.into_body(), 1 << 20).await.unwrap();
            let body: Value = serde_json::from_slice(&bytes).unwrap();
            let event = body["event"].as_object().unwrap().clone();
            let mut event = Pdu::parse(event, Redaction::GraphServer).unwrap();
            event.countersign_by(&name, &key, Redaction::GraphServer);
            respond(StatusCode::OK, json!({ "event": event.json }))
        }
    });
    asked
}

fn count(asked: &Asked, is: impl Fn(&str, &str) -> bool) -> usize {
    asked.lock().unwrap().iter().filter(|(by, path)| is(by, path)).count()
}

/// Waits until a server was asked something so often. What is told alone has the event's ID where others have a transaction's.
async fn so_often(asked: &Asked, what: &str, times: usize, is: impl Fn(&str, &str) -> bool) {
    let waiting = async {
        while count(asked, &is) < times {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(20), waiting).await;
    assert!(waited.is_ok(), "{what}: {:#?}", asked.lock().unwrap());
}

fn tells(path: &str) -> bool {
    path.contains("/send/%24") || path.contains("/send/$")
}

fn invite(by: &Node, name: &str, target: &ruma::UserId) -> Outgoing {
    Outgoing { draft: member(&by.user(name), target, "invite"), effect: None }
}

/// The invite of a user, once it is in the log.
async fn invited(node: &Node, room: &RoomId, user: &ruma::UserId) -> Object {
    let is_it = |event: &Pdu| {
        event.state_key.as_deref() == Some(user.as_str()) && event.content().get("membership") == Some(&json!("invite"))
    };
    let log = node.wait(room, "the invite", |log| log.iter().any(|one| is_it(&one.event))).await;
    log.iter().rfind(|one| is_it(&one.event)).unwrap().event.json.clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_knock_or_an_invite_that_ends_holds_up_no_other_room_of_a_server_that_does_lm_alone() {
    let (_world, [hub, part, graph]) = World::new(["hub.example", "part.example", "graph.example"]).await;
    let asked = does_lm_alone_and_notes(&part);
    let plain = hub.create_room("public").await;
    part.join(&plain, "anna", &hub).await;
    let room = shared_room(&hub, "knock").await;
    let (alice, bot, via) = (part.user("alice"), hub.user("bot"), std::slice::from_ref(&hub.name));
    let knock = async || part.lm.knock(&room, &alice, via, Object::new()).await.unwrap();
    let go_on = async |after: &str| {
        hub.say(&plain, "bot", after).await;
        part.wait_for_body(&plain, after).await;
    };

    knock().await;
    part.lm.leave(&room, &alice, via).await.unwrap();
    go_on("a knock was retracted").await;
    hub.lm.invite(&room, invite(&hub, "bot", &alice)).await.unwrap();
    part.lm.leave(&room, &alice, via).await.unwrap();
    go_on("an invite was declined").await;
    assert_eq!(count(&asked, |_, path| tells(path)), 0, "it has said so itself");

    knock().await;
    hub.send(&room, member(&bot, &alice, "leave")).await.unwrap();
    so_often(&asked, "the knock was denied", 1, |_, path| tells(path)).await;
    go_on("a knock was denied").await;
    hub.lm.invite(&room, invite(&hub, "bot", &alice)).await.unwrap();
    hub.send(&room, member(&bot, &alice, "leave")).await.unwrap();
    so_often(&asked, "the invite was withdrawn", 2, |_, path| tells(path)).await;
    go_on("an invite was withdrawn").await;

    // By a user of a graph server, of which the hub hears by the graph.
    hub.lm.invite(&room, invite(&hub, "bot", &graph.user("grace"))).await.unwrap();
    graph.join(&room, "grace", &hub).await;
    let role = graph.lm.room(&room).await.unwrap().unwrap().role;
    assert!(matches!(role, Role::GraphServer { .. }), "{role:?}");
    let levels = json!({ "users": { bot.as_str(): 100, graph.user("grace").as_str(): 100 } });
    hub.send(&room, draft(&bot, "m.room.power_levels", Some(""), levels)).await.unwrap();
    knock().await;
    let is_last = |what: &'static str| {
        move |log: &[isthmus::lm::Appended]| {
            log.last().is_some_and(|last| last.event.content().get("membership") == Some(&json!(what)))
        }
    };
    graph.wait(&room, "the knock", is_last("knock")).await;
    graph.send(&room, member(&graph.user("grace"), &alice, "leave")).await.unwrap();
    hub.wait(&room, "the denial", is_last("leave")).await;
    let by_hub = |by: &str, path: &str| tells(path) && by.contains("hub.example");
    so_often(&asked, "the knock was denied by a graph server", 3, by_hub).await;
    go_on("a knock was denied by a graph server").await;

    assert_eq!(count(&asked, |_, path| is_of_matrix_alone(path) && path.contains("/v1/send/")), 0);
    let status = hub.context.outbound.status().await.unwrap();
    assert!(status.iter().all(|queue| queue.failures == 0), "{status:?}");
    // And when it comes, it gets what is said.
    hub.lm.invite(&room, invite(&hub, "bot", &alice)).await.unwrap();
    part.join(&room, "alice", &hub).await;
    hub.say(&room, "bot", "welcome").await;
    part.wait_for_body(&room, "welcome").await;
    in_step(&hub, &room).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_graph_server_of_a_shared_room_invites_users_of_servers_that_are_not_in_it() {
    let names = ["hub.example", "graph.example", "third.example", "matrix.example"];
    let (_world, [hub, graph, third, matrix]) = World::new(names).await;
    does_lm_alone(&third);
    let asked = does_matrix_alone(&matrix);
    let room = shared_room(&hub, "invite").await;
    hub.lm.invite(&room, invite(&hub, "bot", &graph.user("grace"))).await.unwrap();
    graph.join(&room, "grace", &hub).await;
    let role = graph.lm.room(&room).await.unwrap().unwrap().role;
    assert!(matches!(role, Role::GraphServer { .. }), "{role:?}");

    let carol = third.user("carol");
    graph.lm.invite(&room, invite(&graph, "grace", &carol)).await.unwrap();
    let seen: Vec<_> = third.watcher.invites.lock().unwrap().iter().map(|invite| invite.target.clone()).collect();
    assert_eq!(seen, std::slice::from_ref(&carol));
    for node in [&hub, &graph] {
        let event = invited(node, &room, &carol).await;
        assert!(event["signatures"].get("third.example").is_some(), "{event:?}");
    }
    third.join(&room, "carol", &hub).await;
    third.say(&room, "carol", "hello").await;
    graph.wait_for_body(&room, "hello").await;

    // And those of a server that knows Matrix' endpoint alone; the hub does as well.
    let (dora, dave) = (matrix.user("dora"), matrix.user("dave"));
    graph.lm.invite(&room, invite(&graph, "grace", &dora)).await.unwrap();
    let by_graph = invited(&hub, &room, &dora).await;
    hub.lm.invite(&room, invite(&hub, "bot", &dave)).await.unwrap();
    for event in [by_graph, invited(&hub, &room, &dave).await] {
        assert!(event["signatures"].get("matrix.example").is_some(), "{event:?}");
    }
    assert_eq!(count(&asked, |_, path| path.starts_with("/_matrix/federation/v2/invite/")), 2);
    assert_eq!(count(&asked, |_, path| path.contains("/v1/send/")), 0);
    hub.send(&room, member(&hub.user("bot"), &dave, "leave")).await.unwrap();
    so_often(&asked, "the invite was withdrawn", 1, |_, path| path.contains("/v1/send/")).await;
    in_step(&hub, &room).await;
}

/// Has what graph.example says arrive only half a second after somebody has come for a template, or when that was refused.
fn hears_late(hub: &Node) {
    let (came, refused) = (watch::Sender::new(false), watch::Sender::new(false));
    hub.meddle(move |request, next| {
        let (came, refused) = (came.clone(), refused.clone());
        async move {
            let path = request.uri().path();
            let origin =
                request.headers().get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default();
            if path.contains("/make_") {
                came.send_replace(true);
                let response = next.run(request).await;
                refused.send_replace(!response.status().is_success());
                return response;
            }
            if path.contains("/send/") && origin.contains("graph.example") {
                let (mut comes, mut refuses) = (came.subscribe(), refused.subscribe());
                comes.wait_for(|came| *came).await.unwrap();
                let _ = tokio::time::timeout(Duration::from_millis(500), refuses.wait_for(|refused| *refused)).await;
            }
            next.run(request).await
        }
    });
}

/// The invited server signs before anybody else has the invite, and its user may be quicker than what is on its way to the hub.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_was_invited_by_a_graph_server_may_answer_before_the_hub_has_heard_of_it() {
    let names = ["hub.example", "graph.example", "third.example", "other.example", "away.example"];
    let (_world, [hub, graph, third, other, away]) = World::new(names).await;
    does_lm_alone(&third);
    does_lm_alone(&away);
    let room = shared_room(&hub, "invite").await;
    hub.lm.invite(&room, invite(&hub, "bot", &graph.user("grace"))).await.unwrap();
    graph.join(&room, "grace", &hub).await;
    for (node, name) in [(&third, "carol"), (&other, "gwen")] {
        hears_late(&hub);
        graph.lm.invite(&room, invite(&graph, "grace", &node.user(name))).await.unwrap();
        node.join(&room, name, &hub).await;
    }
    hears_late(&hub);
    let dora = away.user("dora");
    graph.lm.invite(&room, invite(&graph, "grace", &dora)).await.unwrap();
    away.lm.leave(&room, &dora, std::slice::from_ref(&hub.name)).await.unwrap();
    hub.wait(&room, "the invite to be declined", |log| {
        let of_dora = log.iter().filter(|one| one.event.state_key.as_deref() == Some(dora.as_str()));
        of_dora.filter_map(|one| one.event.content().get("membership")).eq([&json!("invite"), &json!("leave")])
    })
    .await;
    in_step(&hub, &room).await;
}
