//! What a server that was given a log gives of the events that allow its state: all of them, also those that were replaced before it came.

use std::collections::{BTreeMap, BTreeSet};

use isthmus::event::{Pdu, Redaction};
use isthmus::lm::Appended;
use isthmus::seam::Draft;
use ruma::{OwnedEventId, RoomId};
use serde_json::{Value, json};

use super::hub_transfer::{hand_over, three, wait_for_hub};
use super::world::{Node, draft};

const UNSTABLE: &str = "/_matrix/federation/unstable/org.matrix.i-d.ralston-mimi-linearized-matrix.02";

fn events(answer: &Value, list: &str) -> Vec<Pdu> {
    let events = answer[list].as_array().unwrap().iter();
    events.map(|event| Pdu::parse(event.as_object().unwrap().clone(), Redaction::Draft).unwrap()).collect()
}

/// The IDs of all events that allow these, by a log that has everything.
fn chain_by(log: &[Appended], events: &[Pdu]) -> BTreeSet<OwnedEventId> {
    let log: BTreeMap<_, _> = log.iter().map(|event| (&event.event.event_id, &event.event)).collect();
    let mut left: Vec<OwnedEventId> = events.iter().flat_map(|event| event.auth_events.clone()).collect();
    let mut chain = BTreeSet::new();
    while let Some(id) = left.pop() {
        if chain.insert(id.clone()) {
            left.extend(log[&id].auth_events.iter().cloned());
        }
    }
    chain
}

async fn state_at(reader: &Node, of: &Node, room: &RoomId) -> Value {
    Value::Object(reader.get(of, &format!("/_matrix/federation/v1/state/{room}")).await.unwrap())
}

/// An answer has all that allows its state, each event once and after those that allow it.
#[track_caller]
fn assert_whole(log: &[Appended], answer: &Value, state: &str) {
    let (state, chain) = (events(answer, state), events(answer, "auth_chain"));
    let found: Vec<&OwnedEventId> = chain.iter().map(|event| &event.event_id).collect();
    assert_eq!(found.iter().copied().cloned().collect::<BTreeSet<_>>(), chain_by(log, &state));
    for (place, event) in chain.iter().enumerate() {
        assert!(event.auth_events.iter().all(|id| found[..place].contains(&id)), "{} in {found:?}", event.event_id);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_was_given_a_log_gives_all_that_allows_its_state() {
    let (world, [a, b, c]) = three().await;
    let (bot, bob) = (a.user("bot"), b.user("bob"));
    let levels =
        |number: i64| json!({ "users": { bot.as_str(): 100, bob.as_str(): 100 }, "im.example.number": number });
    let room = a.create_room_with("public", levels(0)).await;
    for number in 1..4 {
        a.send(&room, draft(&bot, "m.room.power_levels", Some(""), levels(number))).await.unwrap();
        let name = json!({ "name": format!("name {number}") });
        a.send(&room, draft(&bot, "m.room.name", Some(""), name)).await.unwrap();
    }
    b.join(&room, "bob", &a).await;
    hand_over(&a, &room, "bot", &b).await.unwrap();
    wait_for_hub(&b, &room, &b).await;
    // What it keeps of it is written down.
    let b = world.restart(b).await;
    let log = a.log(&room).await;
    let all_levels = log.iter().filter(|event| event.event.kind == "m.room.power_levels");
    let all_levels: Vec<OwnedEventId> = all_levels.map(|event| event.event.event_id.clone()).collect();
    assert_eq!(all_levels.len(), 4);
    let second = format!("{UNSTABLE}/event/{}", all_levels[1]);
    assert!(c.get(&b, &second).await.is_err(), "it has nobody there");

    let joined = c.join(&room, "carol", &b).await;
    let answer = b.lm.answer_join_again(joined.event.lpdu_id.as_ref().unwrap()).await.unwrap();
    assert_whole(&log, &answer, "state");
    let log = one_log_of(&a, &b, &c, &room).await;
    let now = state_at(&c, &b, &room).await;
    assert_whole(&log, &now, "pdus");
    let found: BTreeSet<OwnedEventId> = events(&now, "auth_chain").into_iter().map(|event| event.event_id).collect();
    assert!(all_levels.iter().all(|id| found.contains(id)), "{found:?}");

    // Each can be asked for by those who are in the room, and be redacted like what is in the log.
    let number_of = |event: &Value| event["content"].get("im.example.number").cloned();
    let given = Value::Object(c.get(&b, &second).await.unwrap());
    let given = given.get("pdus").map_or(&given, |pdus| &pdus[0]);
    assert_eq!(number_of(given), Some(json!(1)));
    let redaction: Draft = draft(&bob, "m.room.redaction", None, json!({ "redacts": all_levels[1] }));
    b.send(&room, redaction).await.unwrap();
    let now = state_at(&c, &b, &room).await;
    let log = one_log_of(&a, &b, &c, &room).await;
    assert_whole(&log, &now, "pdus");
    let numbers: Vec<_> = now["auth_chain"].as_array().unwrap().iter().filter_map(number_of).collect();
    assert_eq!(numbers, [json!(0), json!(2), json!(3)]);
    // The log goes on, and nobody complains of it.
    c.say(&room, "carol", "here").await;
    a.wait_for_body(&room, "here").await;
    assert_eq!(c.lm.room(&room).await.unwrap().unwrap().complaints, Vec::<String>::new());
}

/// The whole log, as the server has it that kept it from the beginning, when it has all that the hub has.
async fn one_log_of(a: &Node, b: &Node, c: &Node, room: &RoomId) -> Vec<Appended> {
    let last = b.log(room).await.last().unwrap().event.event_id.clone();
    for node in [c, a] {
        node.wait(room, "the end of the log", |log| log.iter().any(|event| event.event.event_id == last)).await;
    }
    a.log(room).await
}
