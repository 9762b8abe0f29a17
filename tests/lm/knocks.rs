//! Knocking: asking to be invited, taking it back, being let in or turned away.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use isthmus::event::Object;
use isthmus::lm::{Appended, Sent};
use isthmus::refusal::Refusal;
use isthmus::seam::{Membership, Outgoing, Stage};
use ruma::{RoomId, UserId};
use serde_json::json;

use super::log_hub::deafen;
use super::world::{Node, World, member, raw};

async fn knock(part: &Node, room: &RoomId, user: &UserId, hub: &Node) -> Result<Vec<String>, Refusal> {
    let content = json!({ "reason": "let me in" }).as_object().unwrap().clone();
    let stripped = part.lm.knock(room, user, std::slice::from_ref(&hub.name), content).await?;
    Ok(stripped.iter().map(|event| event["type"].as_str().unwrap().to_owned()).collect())
}

async fn last(node: &Node, room: &RoomId) -> (String, String) {
    let Appended { event, .. } = node.log(room).await.pop().unwrap();
    (event.state_key.clone().unwrap(), event.content()["membership"].as_str().unwrap().to_owned())
}

async fn invite(hub: &Node, room: &RoomId, target: &UserId) {
    let draft = member(&hub.user("bot"), target, "invite");
    hub.lm.invite(room, Outgoing { draft, effect: None }).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_knocks_is_invited_and_joins_or_takes_it_back() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("knock").await;
    let alice = part.user("alice");
    let is = |membership: &str| (alice.to_string(), membership.to_owned());

    // Without a knock nobody comes in.
    let via = std::slice::from_ref(&hub.name);
    assert!(matches!(part.lm.join(&room, &alice, via, Object::new()).await, Err(Refusal::Forbidden(_))));
    hub.watcher.gates.lock().unwrap().clear();
    assert_eq!(knock(&part, &room, &alice, &hub).await.unwrap(), ["m.room.create", "m.room.join_rules"]);
    assert_eq!(last(&hub, &room).await, is("knock"));
    assert_eq!(hub.log(&room).await.last().unwrap().event.content()["reason"], "let me in");
    let gates: Vec<_> = hub.watcher.gates.lock().unwrap().iter().map(|gate| (gate.stage, gate.membership)).collect();
    assert_eq!(gates, [(Stage::Make, Membership::Knock), (Stage::Send, Membership::Knock)]);
    // A knock alone opens nothing.
    assert!(matches!(part.lm.join(&room, &alice, via, Object::new()).await, Err(Refusal::Forbidden(_))));

    part.lm.leave(&room, &alice, via).await.unwrap();
    assert_eq!(last(&hub, &room).await, is("leave"));
    knock(&part, &room, &alice, &hub).await.unwrap();
    invite(&hub, &room, &alice).await;
    part.join(&room, "alice", &hub).await;
    assert_eq!(last(&hub, &room).await, is("join"));

    // From inside a second user knocks by an LPDU, and the hub's answer is waited for.
    let bob = part.user("bob");
    knock(&part, &room, &bob, &hub).await.unwrap();
    assert_eq!(last(&hub, &room).await, (bob.to_string(), "knock".to_owned()));
    // Who is in the room does not knock.
    let refused = knock(&part, &room, &alice, &hub).await.unwrap_err();
    assert!(refused.to_string().contains("5.6.4"), "{refused}");
    // And at the hub's own side.
    let carol = hub.user("carol");
    knock(&hub, &room, &carol, &hub).await.unwrap();
    assert_eq!(last(&hub, &room).await, (carol.to_string(), "knock".to_owned()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_turned_away_is_told_and_may_knock_again_unless_banned() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("knock").await;
    let (alice, bot) = (part.user("alice"), hub.user("bot"));
    let told = Arc::new(AtomicUsize::new(0));
    let count = told.clone();
    part.meddle(move |request, next| {
        let is_send = request.uri().path().contains("/send/");
        let count = count.clone();
        async move {
            let response = next.run(request).await;
            count.fetch_add(usize::from(is_send && response.status().is_success()), Ordering::SeqCst);
            response
        }
    });
    for (number, membership) in ["leave", "ban"].into_iter().enumerate() {
        knock(&part, &room, &alice, &hub).await.unwrap();
        hub.send(&room, member(&bot, &alice, membership)).await.unwrap();
        let waiting = async {
            while told.load(Ordering::SeqCst) == number {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(20), waiting).await.expect("the server is told");
    }
    assert!(matches!(knock(&part, &room, &alice, &hub).await, Err(Refusal::Forbidden(_))));
    // Lifting the ban is no invite.
    hub.send(&room, member(&bot, &alice, "leave")).await.unwrap();
    knock(&part, &room, &alice, &hub).await.unwrap();
}

/// What the hub tells those who are out of a room stands in a part of the log that they are not to have.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_that_tells_a_server_that_is_out_of_the_room_has_left_nothing_out() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let (alice, bob, bot) = (part.user("alice"), part.user("bob"), hub.user("bot"));
    for has_heard in [true, false] {
        let room = hub.create_room("public").await;
        part.join(&room, "alice", &hub).await;
        if !has_heard {
            deafen(&part);
        }
        let kicked = hub.send(&room, member(&bot, &alice, "leave")).await.unwrap();
        let Sent::Appended(kicked) = kicked else { panic!("a hub appends") };
        if has_heard {
            part.wait(&room, "the kick", |log| log.last().unwrap().event.event_id == kicked.event.event_id).await;
        }
        invite(&hub, &room, &bob).await;
        let ended = hub.send(&room, member(&bot, &bob, "leave")).await.unwrap();
        let Sent::Appended(ended) = ended else { panic!("a hub appends") };
        let before = part.log(&room).await.len();
        let told = part.lm.receive(&hub.name, vec![raw(&ended.event.json)]).await.pop().unwrap();
        assert_eq!(told.result, Ok(()));
        assert_eq!(part.log(&room).await.len(), before);
        assert_eq!(part.fault_kinds(&room).await, [""; 0], "has heard: {has_heard}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_knocks_where_the_rules_or_the_other_side_do_not_take_it() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let alice = part.user("alice");
    for join_rule in ["public", "invite"] {
        let room = hub.create_room(join_rule).await;
        let refused = knock(&part, &room, &alice, &hub).await;
        assert!(matches!(&refused, Err(Refusal::Forbidden(why)) if why.contains("5.6.1")), "{refused:?}");
    }
    let room = hub.create_room("knock").await;
    hub.watcher.unwanted.lock().unwrap().push(alice.clone());
    let refused = knock(&part, &room, &alice, &hub).await;
    assert!(matches!(&refused, Err(Refusal::Forbidden(why)) if why.contains("would not have")), "{refused:?}");
    assert_ne!(last_member(&hub, &room).await.as_deref(), Some(alice.as_str()));
    // Nobody knocks for others.
    let knocked = part.lm.knock(&room, &hub.user("x"), std::slice::from_ref(&hub.name), Object::new()).await;
    assert!(matches!(knocked, Err(Refusal::WrongOrigin { .. })));
}

async fn last_member(node: &Node, room: &RoomId) -> Option<String> {
    let log = node.log(room).await;
    log.iter().rev().find(|event| event.event.kind == "m.room.member")?.event.state_key.clone()
}
