//! What is read of a shared room, by each name: who asks by LM's is answered as the draft has it, whether its keys say that it does LM
//! alone, say nothing, or it takes part in the graph.

use http::Method;
use isthmus::event::{Redaction, RoomVersion, reference_hash};
use ruma::OwnedRoomId;
use serde_json::{Value, json};

use super::http::{Answered, ask_signed};
use super::shared::{does_lm_alone, shared_room};
use super::world::{Node, World, ids, member};

const V1: &str = "/_matrix/federation/v1";
/// LM's names.
const OF_LM: [&str; 2] =
    ["/_matrix/federation/v2", "/_matrix/federation/unstable/org.matrix.i-d.ralston-mimi-linearized-matrix.02"];

async fn get(node: &Node, from: &Node, uri: &str) -> Answered {
    ask_signed(node, from, &Method::GET, uri, None).await
}

fn keys(answer: &Value) -> Vec<&str> {
    answer.as_object().unwrap().keys().map(String::as_str).collect()
}

fn ids_of(answer: &Value) -> Vec<String> {
    let id = |event: &Value| format!("${}", reference_hash(event.as_object().unwrap(), Redaction::GraphServer));
    answer["pdus"].as_array().unwrap().iter().map(id).collect()
}

/// A shared room in which `named` takes part by the log and says so in its keys, `part` by the log alone, and `graph` by the graph; the
/// last three messages, oldest first.
async fn room_of(hub: &Node, named: &Node, part: &Node, graph: &Node) -> (OwnedRoomId, Vec<String>) {
    does_lm_alone(named);
    let room = shared_room(hub, "public").await;
    named.join(&room, "alice", hub).await;
    let bob = part.user("bob");
    let join = Value::Object(part.lpdu(&room, &hub.name, &member(&bob, &bob, "join")).json);
    let uri = "/_matrix/federation/v3/send_join/1";
    let (status, answer) = ask_signed(part, hub, &Method::POST, uri, Some(&join)).await;
    assert_eq!(status, 200, "{answer}");
    graph.join(&room, "gina", hub).await;
    for body in ["one", "two", "three"] {
        hub.say(&room, "bot", body).await;
    }
    let log = ids(&hub.wait_for_body(&room, "three").await);
    (room, log[log.len() - 3..].iter().map(ToString::to_string).collect())
}

async fn assert_not_found(node: &Node, from: &Node, uri: &str) {
    let (status, error) = get(node, from, uri).await;
    assert_eq!((status, &error["errcode"]), (404, &json!("M_NOT_FOUND")), "{} {uri}: {error}", node.name);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn by_lms_names_a_shared_room_is_read_as_the_draft_has_it_whoever_asks() {
    let names = ["hub.example", "named.example", "part.example", "graph.example", "none.example"];
    let (_world, [hub, named, part, graph, none]) = World::new(names).await;
    let (room, said) = room_of(&hub, &named, &part, &graph).await;
    let last = &said[2];
    let nothing = format!("${}", "a".repeat(43));
    for at in OF_LM {
        let backfill = |from: &str| format!("{at}/backfill/{room}?v={from}&limit=3");
        for node in [&named, &part, &graph] {
            let (status, page) = get(node, &hub, &backfill(last)).await;
            assert_eq!((status, keys(&page)), (200, vec!["pdus"]), "{} {at}: {page}", node.name);
            assert_eq!(ids_of(&page), said, "{} {at}", node.name);
            assert_not_found(node, &hub, &backfill(&nothing)).await;
            let (status, event) = get(node, &hub, &format!("{at}/event/{last}")).await;
            assert_eq!((status, &event["content"]["body"]), (200, &json!("three")), "{} {at}: {event}", node.name);
            assert_not_found(node, &hub, &format!("{at}/event/{nothing}")).await;
        }
        for uri in [backfill(last), backfill(&nothing), format!("{at}/event/{last}")] {
            assert_not_found(&none, &hub, &uri).await;
        }
        // Where another server keeps the log there is none, but the graph, for who takes part in that.
        graph.wait_for_body(&room, "three").await;
        let (status, page) = get(&hub, &graph, &backfill(last)).await;
        assert_eq!((status, keys(&page), ids_of(&page)), (200, vec!["pdus"], said.clone()), "{at}: {page}");
        assert_not_found(&named, &graph, &backfill(last)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn by_the_names_of_both_a_server_is_answered_by_how_it_takes_part() {
    let names = ["hub.example", "named.example", "part.example", "graph.example"];
    let (_world, [hub, named, part, graph]) = World::new(names).await;
    let (room, said) = room_of(&hub, &named, &part, &graph).await;
    let template = async |node: &Node| {
        let uri = format!("{V1}/make_join/{room}/{}?ver={}", node.user("zoe"), RoomVersion::Lm02.as_str());
        let (status, answer) = get(node, &hub, &uri).await;
        assert_eq!(status, 200, "{answer}");
        answer["event"].clone()
    };
    for node in [&named, &part] {
        let made = template(node).await;
        assert!(made.get("prev_events").is_none() && made.get("auth_events").is_none(), "{}: {made}", node.name);
        // What is current, of which Matrix does not know.
        for (name, expected) in [("state", "pdus"), ("state_ids", "pdu_ids")] {
            let (status, state) = get(node, &hub, &format!("{V1}/{name}/{room}")).await;
            assert_eq!(status, 200, "{} {name}: {state}", node.name);
            assert!(state[expected].as_array().is_some_and(|state| state.len() > 5), "{} {name}: {state}", node.name);
        }
    }
    let made = template(&graph).await;
    assert!(made["prev_events"].is_array() && made["auth_events"].is_array(), "{made}");
    for name in ["state", "state_ids"] {
        let (status, error) = get(&graph, &hub, &format!("{V1}/{name}/{room}")).await;
        assert_eq!(status, 400, "{name}: {error}");
    }
    let (status, page) = get(&graph, &hub, &format!("{V1}/backfill/{room}?v={}&limit=3", said[2])).await;
    assert_eq!((status, keys(&page)), (200, vec!["origin", "origin_server_ts", "pdus"]), "{page}");
    assert_eq!(ids_of(&page), said.iter().rev().cloned().collect::<Vec<_>>());
    let (status, page) = get(&graph, &hub, &format!("{V1}/event/{}", said[2])).await;
    assert_eq!((status, ids_of(&page)), (200, vec![said[2].clone()]), "{page}");
}
