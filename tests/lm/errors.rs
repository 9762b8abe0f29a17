//! Each endpoint's errors as the draft has them: for a stranger, at a server that is not the hub, of a room that does not exist, for
//! what the rules forbid.

use std::sync::atomic::{AtomicUsize, Ordering};

use http::Method;
use isthmus::event::Object;
use ruma::RoomId;
use serde_json::{Value, json};

use super::http::ask_signed;
use super::world::{Node, World, member};

const UNSTABLE: &str = "/_matrix/federation/unstable/org.matrix.i-d.ralston-mimi-linearized-matrix.02";
const V1: &str = "/_matrix/federation/v1";
const LM02: &str = "org.matrix.i-d.ralston-mimi-linearized-matrix.02";

/// Asks as `a`; the status and the error.
async fn error(a: &Node, at: &Node, method: Method, uri: &str, body: Option<&Object>) -> (u16, String) {
    // Each request is one of its own: the same transaction would get the same answer.
    static REQUESTS: AtomicUsize = AtomicUsize::new(0);
    let of_transaction = ["/send_", "/invite/"].iter().any(|name| uri.contains(name));
    let number = REQUESTS.fetch_add(1, Ordering::Relaxed);
    let uri = &if of_transaction { format!("{uri}.{number}") } else { uri.to_owned() };
    let body = body.cloned().map(Value::Object);
    let (status, answer) = ask_signed(a, at, &method, uri, body.as_ref()).await;
    assert!(status != 200 && answer["error"].is_string(), "{method} {uri}: {status} {answer}");
    if answer["errcode"] == "M_INCOMPATIBLE_ROOM_VERSION" && uri.contains("/make_") {
        assert_eq!(answer["room_version"], LM02, "{uri}");
    }
    (status, answer["errcode"].as_str().unwrap().to_owned())
}

/// What reads a room, under all its names.
fn reads(room: &RoomId, event: &str) -> Vec<String> {
    let state = ["state", "state_ids"].map(|name| format!("{V1}/{name}/{room}?event_id={event}"));
    let backfill = ["/_matrix/federation/v2", UNSTABLE].map(|at| format!("{at}/backfill/{room}?v={event}&limit=10"));
    state.into_iter().chain(backfill).collect()
}

fn events(event: &str) -> [String; 2] {
    ["/_matrix/federation/v2", UNSTABLE].map(|at| format!("{at}/event/{event}"))
}

fn sends(change: &str) -> [String; 2] {
    ["/_matrix/federation/v3", UNSTABLE].map(|at| format!("{at}/send_{change}/1"))
}

fn make(change: &str, room: &RoomId, user: &str) -> String {
    format!("{V1}/make_{change}/{room}/{user}?ver={LM02}")
}

const CHANGES: [&str; 3] = ["join", "leave", "knock"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_endpoint_has_the_drafts_errors() {
    let (_world, [hub, part, a]) = World::new(["hub.example", "part.example", "a.example"]).await;
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    let head = hub.log(&room).await.pop().unwrap().event.event_id.clone();
    let user = a.user("u");
    let not_found = (404, "M_NOT_FOUND".to_owned());
    let wrong_server = (400, "M_WRONG_SERVER".to_owned());
    let forbidden = (403, "M_FORBIDDEN".to_owned());
    let bad_json = (400, "M_BAD_JSON".to_owned());
    let incompatible = (400, "M_INCOMPATIBLE_ROOM_VERSION".to_owned());
    let nowhere = RoomId::parse("!nowhere:hub.example").unwrap();
    let lpdu = |room: &RoomId, membership: &str| a.lpdu(room, &hub.name, &member(&user, &user, membership)).json;

    // A stranger learns nothing of a room, not even that it is there.
    for uri in reads(&room, head.as_str()).iter().chain(&events(head.as_str())) {
        assert_eq!(error(&a, &hub, Method::GET, uri, None).await, not_found, "{uri}");
    }
    for uri in reads(&nowhere, head.as_str()).iter().chain(&events("$nothing")) {
        assert_eq!(error(&a, &hub, Method::GET, uri, None).await, not_found, "{uri}");
    }
    // Of an event of another room, a member neither.
    let other = hub.create_room("public").await;
    let others = hub.log(&other).await.pop().unwrap().event.event_id.clone();
    for uri in reads(&room, others.as_str()) {
        assert_eq!(error(&part, &hub, Method::GET, &uri, None).await, not_found, "{uri}");
    }
    // Who does not keep the log says so where the draft has it, and knows no history.
    for uri in reads(&room, head.as_str()) {
        let expected = if uri.contains("backfill") { &not_found } else { &wrong_server };
        assert_eq!(error(&hub, &part, Method::GET, &uri, None).await, *expected, "{uri}");
    }

    for change in CHANGES {
        let uri = make(change, &room, user.as_str());
        assert_eq!(error(&a, &part, Method::GET, &uri, None).await, wrong_server, "{uri}");
        let uri = make(change, &nowhere, user.as_str());
        assert_eq!(error(&a, &hub, Method::GET, &uri, None).await, not_found, "{uri}");
        // For a user of another server.
        let uri = make(change, &room, "@x:b.example");
        assert_eq!(error(&a, &hub, Method::GET, &uri, None).await, forbidden, "{uri}");
        for uri in sends(change) {
            let event = lpdu(&room, change);
            assert_eq!(error(&a, &part, Method::POST, &uri, Some(&event)).await, wrong_server, "{uri}");
            let event = lpdu(&nowhere, change);
            assert_eq!(error(&a, &hub, Method::POST, &uri, Some(&event)).await, not_found, "{uri}");
            // Another membership than the endpoint's, or no member event.
            let event = lpdu(&room, if change == "join" { "leave" } else { "join" });
            assert_eq!(error(&a, &hub, Method::POST, &uri, Some(&event)).await, bad_json, "{uri}");
            let event = a.lpdu(&room, &hub.name, &super::world::message(&user, "hello")).json;
            assert_eq!(error(&a, &hub, Method::POST, &uri, Some(&event)).await, bad_json, "{uri}");
            assert_eq!(error(&a, &hub, Method::POST, &uri, Some(&Object::new())).await, bad_json, "{uri}");
        }
    }
    for change in ["join", "knock"] {
        for versions in ["", "?ver=11", "?ver=10&ver=12"] {
            let uri = format!("{V1}/make_{change}/{room}/{user}{versions}");
            assert_eq!(error(&a, &hub, Method::GET, &uri, None).await, incompatible, "{uri}");
        }
    }
    // What the rules forbid, both at the template and at the event.
    let closed = hub.create_room("invite").await;
    for change in CHANGES {
        let uri = make(change, &closed, user.as_str());
        assert_eq!(error(&a, &hub, Method::GET, &uri, None).await, forbidden, "{uri}");
        let event = lpdu(&closed, change);
        for uri in sends(change) {
            assert_eq!(error(&a, &hub, Method::POST, &uri, Some(&event)).await, forbidden, "{uri}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn invites_have_the_drafts_errors() {
    let (_world, [hub, part, a]) = World::new(["hub.example", "part.example", "a.example"]).await;
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    let (alice, carol) = (part.user("alice"), a.user("carol"));
    let body =
        |event: &Object, version: &str| json!({ "event": event, "room_version": version }).as_object().unwrap().clone();
    let without_version = |event: &Object| json!({ "event": event }).as_object().unwrap().clone();
    let lpdu = |draft| part.lpdu(&room, &hub.name, &draft).json;
    // An invite of the hub's, as it would be sent to another server.
    let own = hub.create_room("invite").await;
    let draft = member(&hub.user("bot"), &part.user("bob"), "invite");
    let sent = hub.lm.invite(&own, isthmus::seam::Outgoing { draft, effect: None }).await.unwrap();
    let isthmus::lm::Sent::Appended(invite) = sent else { panic!("a hub appends") };
    let invite = &invite.event.json;
    for at in ["/_matrix/federation/v3", UNSTABLE] {
        let uri = format!("{at}/invite/1");
        for (from, to, body, expected) in [
            (&part, &hub, Object::new(), (400, "M_BAD_JSON")),
            (&part, &hub, body(&Object::new(), LM02), (400, "M_BAD_JSON")),
            (&part, &hub, body(&lpdu(member(&alice, &carol, "join")), LM02), (400, "M_BAD_JSON")),
            (&part, &hub, body(&lpdu(member(&part.user("x"), &carol, "invite")), LM02), (403, "M_FORBIDDEN")),
            // To the hub, in which version the room is not, or none.
            (&part, &hub, body(&lpdu(member(&alice, &carol, "invite")), "I.1"), (400, "M_INCOMPATIBLE_ROOM_VERSION")),
            (&part, &hub, without_version(&lpdu(member(&alice, &carol, "invite"))), (400, "M_BAD_JSON")),
            // Somebody else's.
            (&a, &hub, body(&lpdu(member(&alice, &carol, "invite")), LM02), (403, "M_FORBIDDEN")),
            (&a, &part, body(invite, LM02), (403, "M_FORBIDDEN")),
            // As the invited server: a version it does not have, a user it does not have.
            (&hub, &part, body(invite, "org.example.unknown"), (400, "M_INCOMPATIBLE_ROOM_VERSION")),
            (&hub, &a, body(invite, LM02), (404, "M_NOT_FOUND")),
        ] {
            let (status, errcode) = error(from, to, Method::POST, &uri, Some(&body)).await;
            assert_eq!((status, errcode.as_str()), expected, "{uri} from {} to {}: {body:?}", from.name, to.name);
        }
    }
    // What the user or its server does not want.
    part.watcher.unwanted.lock().unwrap().push(part.user("bob"));
    let uri = format!("{UNSTABLE}/invite/2");
    let answered = error(&hub, &part, Method::POST, &uri, Some(&body(invite, LM02))).await;
    assert_eq!(answered, (403, "M_FORBIDDEN".to_owned()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_asks_too_often_is_told_when_to_come_again() {
    let (_world, [hub, a, b]) = World::new(["hub.example", "a.example", "b.example"]).await;
    let uri = "/_matrix/federation/v3/invite/1";
    let ask = async |node: &Node| ask_signed(node, &hub, &Method::POST, uri, Some(&json!({}))).await;
    let mut limited = None;
    for _ in 0..2_000 {
        let (status, answer) = ask(&a).await;
        if status != 400 {
            limited = Some((status, answer));
            break;
        }
    }
    let (status, answer) = limited.expect("a limit");
    assert_eq!((status, answer["errcode"].as_str().unwrap()), (429, "M_LIMIT_EXCEEDED"));
    assert!(answer["retry_after_ms"].as_u64().is_some_and(|wait| (1..=60_000).contains(&wait)), "{answer}");
    // Others are not held up, nor is what has no limit.
    assert_eq!(ask(&b).await.0, 400);
    let (status, _) =
        ask_signed(&a, &hub, &Method::PUT, "/_matrix/federation/v2/send/1", Some(&json!({ "pdus": [] }))).await;
    assert_eq!(status, 200);
}
