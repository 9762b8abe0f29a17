//! Events that a hub whose parser takes more than ours has in its log: they are taken in their redacted form, and neither the rest
//! of an answer nor what comes after them fails because of them.

use axum::body::to_bytes;
use axum::response::Response;
use isthmus::lm::Sent;
use serde_json::json;
use serde_json::value::RawValue;

use super::log_hub::{Manners, deafen};
use super::world::{Node, World, bodies, draft, ids, raw};
use isthmus::store::lm::missing;

/// What stands where the hub has what cannot be read.
const MARK: &str = "UNREADABLE";
/// What cannot be read: half of a pair of surrogates.
const HALF: &str = r"\ud800";

/// Has a hub that does LM alone answer with what cannot be read.
fn spoil(hub: &Node) {
    let manners = Manners::new(&hub.context, &hub.lm, true);
    hub.meddle(move |request, next| {
        let manners = manners.clone();
        async move {
            let (head, body) = manners.answer(request, next).await.into_parts();
            let text = String::from_utf8(to_bytes(body, 1 << 20).await.unwrap().to_vec()).unwrap();
            let mut response = Response::new(axum::body::Body::from(text.replace(MARK, HALF)));
            *response.status_mut() = head.status;
            response
        }
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_15_one_event_that_cannot_be_read_keeps_nobody_from_joining() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    let bot = hub.user("bot");
    let named = json!({ "membership": "join", "displayname": MARK });
    hub.send(&room, draft(&bot, "m.room.member", Some(bot.as_str()), named)).await.unwrap();
    spoil(&hub);
    part.join(&room, "alice", &hub).await;
    hub.say(&room, "bot", "hello").await;
    let log = part.wait_for_body(&room, "hello").await;
    let member = log.iter().find(|event| event.event.state_key.as_deref() == Some(bot.as_str())).unwrap();
    assert_eq!(member.event.content()["membership"], "join");
    assert!(member.event.content().get("displayname").is_none(), "taken redacted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_15_a_message_that_cannot_be_read_is_no_gap() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    spoil(&hub);
    part.join(&room, "alice", &hub).await;
    // Where it is missing, and where it comes by itself.
    deafen(&part);
    hub.say(&room, "bot", MARK).await;
    let Sent::Appended(second) = hub.say(&room, "bot", "second").await else { panic!("a hub appends") };
    let received = part.lm.receive(&hub.name, vec![raw(&second.event.json)]).await.pop().unwrap();
    assert_eq!(received.result, Ok(()));
    let Sent::Appended(third) = hub.say(&room, "bot", MARK).await else { panic!("a hub appends") };
    let Sent::Appended(fourth) = hub.say(&room, "bot", "fourth").await else { panic!("a hub appends") };
    let text = raw(&third.event.json).get().replace(MARK, HALF);
    let pdus = vec![RawValue::from_string(text).unwrap(), raw(&fourth.event.json)];
    for received in part.lm.receive(&hub.name, pdus).await {
        assert_eq!(received.result, Ok(()));
    }
    let log = part.log(&room).await;
    assert_eq!(bodies(&log), ["second", "fourth"]);
    assert_eq!(ids(&log), ids(&hub.log(&room).await), "the others are there, redacted");
    assert_eq!(missing(&part.context.store, Some(&room)).await.unwrap().count, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_19_a_number_that_is_no_integer_is_no_gap_either() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    deafen(&part);
    hub.say(&room, "bot", MARK).await;
    let Sent::Appended(second) = hub.say(&room, "bot", "second").await else { panic!("a hub appends") };
    hub.meddle(|request, next| async move {
        let (head, body) = next.run(request).await.into_parts();
        let text = String::from_utf8(to_bytes(body, 1 << 20).await.unwrap().to_vec()).unwrap();
        let mut response = Response::new(axum::body::Body::from(text.replace(&format!("\"{MARK}\""), "1.5")));
        *response.status_mut() = head.status;
        response
    });
    let received = part.lm.receive(&hub.name, vec![raw(&second.event.json)]).await.pop().unwrap();
    assert_eq!(received.result, Ok(()));
    assert_eq!(bodies(&part.log(&room).await), ["second"]);
    assert_eq!(missing(&part.context.store, Some(&room)).await.unwrap().count, 0);
    let complaints = part.lm.room(&room).await.unwrap().unwrap().complaints;
    assert!(complaints.len() == 1 && complaints[0].contains("taken redacted"), "{complaints:?}");
}
