//! The corpus of `/send` at the endpoint itself: whatever comes is answered in the draft's words, each refused event by the ID by which
//! its sender knows it, nothing that is not right reaches the log, and the server goes on.

use std::collections::BTreeSet;

use axum::http::Method;
use isthmus::event::{Object, canonical_json};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use ruma::RoomId;
use serde_json::Value;

use super::{bodies, corpus, mutated, number};
use crate::lm::http::{Answered, ask, signature_over};
use crate::lm::world::{Node, World, ids, message};

const SEND: &str = "/_matrix/federation/unstable/org.matrix.i-d.ralston-mimi-linearized-matrix.02/send";
/// How many mutations are sent.
const MUTATIONS: u64 = 200;

/// Sends a body as it is, signed over what the hub makes of it.
async fn send(part: &Node, hub: &Node, number: usize, body: &[u8]) -> Answered {
    let uri = format!("{SEND}/{number}");
    let authorization = signature_over(part, hub, &Method::PUT, &uri, body);
    ask(hub, &Method::PUT, &uri, Some(&authorization), Some(body)).await
}

/// What is said of a transaction is said in the draft's words, and of its own events alone.
fn is_in_form((status, answer): &Answered, body: &[u8]) {
    let shown = || format!("{status} {answer} to {}", body.escape_ascii());
    match *status {
        200 => {
            let part = <&ruma::ServerName>::try_from("part.example").unwrap();
            let (pdus, _) = isthmus::gateway::transaction_parts(body, part).unwrap();
            let known: BTreeSet<String> =
                pdus.iter().filter_map(isthmus::lm::id_as_received).map(|id| id.to_string()).collect();
            let failed = answer["failed_pdus"].as_object().unwrap_or_else(|| panic!("{}", shown()));
            for (id, entry) in failed {
                assert!(known.contains(id), "{id} is none of the transaction's events: {}", shown());
                assert!(entry["error"].is_string(), "{}", shown());
            }
        }
        400 => assert!(["M_NOT_JSON", "M_BAD_JSON"].contains(&answer["errcode"].as_str().unwrap()), "{}", shown()),
        // What cannot be brought into canonical form cannot be signed.
        401 => assert!(isthmus::event::canonical_text(body).is_err(), "{}", shown()),
        _ => panic!("{}", shown()),
    }
}

fn here(body: &[u8], room: &RoomId) -> Vec<u8> {
    match std::str::from_utf8(body) {
        Ok(text) => text.replace("!room:hub.example", room.as_str()).into_bytes(),
        Err(_) => body.to_vec(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_14_hc_17_hc_20_whatever_is_sent_is_answered_in_form_and_changes_nothing_that_it_may_not() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    let before = ids(&hub.log(&room).await);
    let mut count = 0;
    for (name, data) in corpus("send") {
        let body = here(&data, &room);
        let answered = send(&part, &hub, count, &body).await;
        println!("{name}: {} {}", answered.0, answered.1);
        is_in_form(&answered, &body);
        count += 1;
    }
    assert_eq!(ids(&hub.log(&room).await), before, "something of it is in the log");

    let seed = number("ISTHMUS_SEED").unwrap_or(1);
    let mut random = StdRng::seed_from_u64(seed);
    let corpus = corpus("send");
    let mut genuine = BTreeSet::new();
    for mutation in 0..number("ISTHMUS_MUTATIONS").unwrap_or(MUTATIONS) {
        // A good event, of which mostly something is changed.
        let lpdu = part.lpdu(&room, &hub.name, &message(&part.user("alice"), &mutation.to_string()));
        genuine.insert(lpdu.lpdu_id.clone());
        let mut body = Object::new();
        body.insert("pdus".to_owned(), Value::Array(vec![Value::Object(lpdu.json.clone())]));
        let good = canonical_json(&body);
        let other = here(&corpus[random.gen_range(0..corpus.len())].1, &room);
        let sent = if random.gen_bool(0.1) { good } else { mutated(&good, &other, &mut random) };
        bodies::send(&sent);
        let answered = send(&part, &hub, count, &sent).await;
        is_in_form(&answered, &sent);
        count += 1;
    }
    let log = hub.log(&room).await;
    let new = &log[before.len()..];
    assert!(!new.is_empty(), "not even what is right was taken, seed {seed}");
    for event in new {
        let lpdu_id = event.event.lpdu_id.as_ref().expect("an LPDU");
        assert!(genuine.contains(lpdu_id), "nobody has made {:?}, seed {seed}", event.event.json);
    }
}
