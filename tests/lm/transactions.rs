//! Transactions: the same ID gives the same answer and is worked on once, the same LPDU is in the log once.

use futures::future::join_all;
use http::Method;
use ruma::OwnedRoomId;
use serde_json::{Value, json};

use super::http::ask_signed;
use super::hub_transfer::{hand_over, hub_at, room_of as room_to_hand_over, three};
use super::world::{Node, World, bodies, member, message};

const UNSTABLE: &str = "/_matrix/federation/unstable/org.matrix.i-d.ralston-mimi-linearized-matrix.02";

async fn room_of(hub: &Node, part: &Node) -> OwnedRoomId {
    let room = hub.create_room("public").await;
    part.join(&room, "alice", hub).await;
    room
}

async fn send(part: &Node, hub: &Node, at: &str, txn_id: &str, pdus: &[Value]) -> Value {
    let uri = format!("{at}/send/{txn_id}");
    let (status, answer) = ask_signed(part, hub, &Method::PUT, &uri, Some(&json!({ "pdus": pdus }))).await;
    assert_eq!(status, 200, "{answer}");
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_35_the_same_id_gives_the_same_answer_across_restarts_and_names() {
    let (world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = room_of(&hub, &part).await;
    let to = hub.name.clone();
    let lpdu = |localpart: &str, body: &str| part.lpdu(&room, &to, &message(&part.user(localpart), body));
    let (good, bad, other) = (lpdu("alice", "good"), lpdu("nobody", "bad"), lpdu("alice", "other"));
    let good_and_bad = [json!(good.json), json!(bad.json)];
    let first = send(&part, &hub, UNSTABLE, "1", &good_and_bad).await;
    // What failed is named as it came: by the LPDU's ID, since it never became an event.
    let failed = first["failed_pdus"].as_object().unwrap();
    assert_eq!(failed.keys().collect::<Vec<_>>(), [bad.lpdu_id.as_str()]);
    assert!(failed[bad.lpdu_id.as_str()]["error"].as_str().unwrap().contains("@nobody"), "{first}");

    // Whatever comes under the ID again, and under whichever name of the endpoint.
    for at in [UNSTABLE, "/_matrix/federation/v2"] {
        assert_eq!(send(&part, &hub, at, "1", &good_and_bad).await, first);
        assert_eq!(send(&part, &hub, at, "1", &[json!(other.json)]).await, first);
    }
    let hub = world.restart(hub).await;
    assert_eq!(send(&part, &hub, UNSTABLE, "1", &[json!(other.json)]).await, first);
    assert_eq!(bodies(&hub.log(&room).await), ["good"]);
    // Another server's IDs are its own.
    let none = json!({ "failed_pdus": {} });
    // The same LPDU under another ID: it is there already, and no failure.
    assert_eq!(send(&part, &hub, UNSTABLE, "2", &[json!(good.json), json!(other.json)]).await, none);
    assert_eq!(bodies(&hub.log(&room).await), ["good", "other"]);
    // One that said nothing of any event has used its ID as well, as long as that is remembered.
    let mark = [json!(lpdu("alice", "by a used ID").json)];
    assert_eq!(send(&part, &hub, UNSTABLE, "nothing", &[]).await, none);
    assert_eq!(send(&part, &hub, UNSTABLE, "nothing", &mark).await, none);
    assert_eq!(bodies(&hub.log(&room).await), ["good", "other"]);
    // At the graph's endpoint the ID is another.
    let uri = "/_matrix/federation/v1/send/1";
    let body = json!({ "pdus": [lpdu("alice", "third").json], "origin": part.name, "origin_server_ts": 1 });
    let (status, _) = ask_signed(&part, &hub, &Method::PUT, uri, Some(&body)).await;
    assert_eq!(status, 200);
    assert_eq!(bodies(&hub.log(&room).await), ["good", "other", "third"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_transactions_at_once_are_taken_one_after_the_other_and_none_is_lost() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = room_of(&hub, &part).await;
    let texts: Vec<String> = (0..40).map(|number| format!("message {number}")).collect();
    let lpdus: Vec<_> =
        texts.iter().map(|body| part.lpdu(&room, &hub.name, &message(&part.user("alice"), body)).json).collect();
    // Each twice, under the same ID, and all at the same time.
    let sending = lpdus.iter().enumerate().flat_map(|(number, lpdu)| {
        [(); 2].map(|()| {
            let (part, hub, id) = (&part, &hub, format!("t{number}"));
            async move { send(part, hub, UNSTABLE, &id, &[json!(lpdu)]).await }
        })
    });
    for answer in join_all(sending).await {
        assert_eq!(answer, json!({ "failed_pdus": {} }));
    }
    let mut said = bodies(&hub.log(&room).await);
    said.sort();
    let mut texts = texts;
    texts.sort();
    assert_eq!(said, texts);
}

/// Handshakes have transaction IDs too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_35_a_handshake_s_used_id_gets_its_first_answer_whatever_comes_with_it() {
    let (world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let (open, closed) = (hub.create_room("public").await, hub.create_room("invite").await);
    let at = |name: &str| format!("/_matrix/federation/{name}");
    let ask = async |hub: &Node, uri: &str, body: &Value| ask_signed(&part, hub, &Method::POST, uri, Some(body)).await;
    let hub_name = hub.name.clone();
    let change = |room: &OwnedRoomId, who: &str, membership: &str| {
        let user = part.user(who);
        json!(part.lpdu(room, &hub_name, &member(&user, &user, membership)).json)
    };
    // Another body under a used ID is not looked at, under whichever name, and across a restart.
    let join = ask(&hub, &at("v3/send_join/T"), &change(&open, "alice", "join")).await;
    assert_eq!(join.0, 200, "{}", join.1);
    let other = change(&open, "bob", "join");
    assert_eq!(ask(&hub, &at("v3/send_join/T"), &other).await, join);
    assert_eq!(ask(&hub, &format!("{UNSTABLE}/send_join/T"), &other).await, join);
    // A refusal is an answer as well.
    let late = change(&closed, "alice", "join");
    let refused = ask(&hub, &at("v3/send_join/C"), &late).await;
    assert_eq!((refused.0, &refused.1["errcode"]), (403, &json!("M_FORBIDDEN")), "{}", refused.1);
    let bot = hub.user("bot");
    hub.send(&closed, member(&bot, &part.user("alice"), "invite")).await.unwrap();
    let hub = world.restart(hub).await;
    assert_eq!(ask(&hub, &at("v3/send_join/C"), &late).await, refused);
    assert_eq!(ask(&hub, &at("v3/send_join/T"), &other).await, join);
    assert_eq!(ask(&hub, &at("v3/send_join/C2"), &late).await.0, 200);
    // Leaving, with the same ID: another endpoint.
    let leave = ask(&hub, &at("v3/send_leave/T"), &change(&open, "alice", "leave")).await;
    assert_eq!(leave.0, 200, "{}", leave.1);
    assert_eq!(ask(&hub, &at("v3/send_leave/T"), &json!({ "what": "ever" })).await, leave);
    let members = |log: Vec<isthmus::lm::Appended>| {
        let members = log.into_iter().filter(|appended| appended.event.sender.server_name() == part.name);
        members.map(|appended| appended.event.sender.localpart().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(members(hub.log(&open).await), ["alice", "alice"], "bob came by a used ID");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_35_a_join_s_used_id_gets_its_first_answer_when_another_server_keeps_the_log_by_then() {
    let (_world, [a, b, c]) = three().await;
    let room = room_to_hand_over(&a, &b, &c).await;
    let dora = c.user("dora");
    let join = json!(c.lpdu(&room, &a.name, &member(&dora, &dora, "join")).json);
    let join_as = async |txn: &str| {
        let uri = format!("{UNSTABLE}/send_join/{txn}");
        ask_signed(&c, &a, &Method::POST, &uri, Some(&join)).await
    };
    let first = join_as("T").await;
    assert_eq!(first.0, 200, "{}", first.1);
    hand_over(&a, &room, "bot", &b).await.unwrap();
    assert_eq!(hub_at(&a, &room).await, b.name.as_str());
    assert_eq!(join_as("T").await, first);
    // Under an ID of its own it is a request to who keeps the log now.
    let anew = join_as("U").await;
    assert_eq!((anew.0, &anew.1["errcode"]), (400, &json!("M_WRONG_SERVER")), "{}", anew.1);
}
