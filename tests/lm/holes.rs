//! What of a hub's log is missing: asked for again across restarts, and in nobody's way meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use http::StatusCode;
use isthmus::clock::{Clock as _, ManualClock};
use isthmus::lm::{Appended, Sent};
use isthmus::refusal::Refusal;
use isthmus::store::lm::{Counts, Hole, missing, note_holes};
use ruma::{OwnedRoomId, RoomId};
use serde_json::{Value, json};

use super::log_hub::{Faulty, deafen, respond};
use super::world::{Node, World, bodies, draft, ids, message, raw};

async fn count_missing(node: &Node) -> i64 {
    missing(&node.context.store, None).await.unwrap().count
}

async fn wait_for_missing(node: &Node, count: i64) {
    let waiting = async {
        while count_missing(node).await != count {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    let waited = tokio::time::timeout(std::time::Duration::from_secs(30), waiting).await;
    assert!(waited.is_ok(), "{} are missing, not {count}", count_missing(node).await);
}

fn topic(log: &[Appended]) -> Option<Value> {
    let topic = log.iter().rev().find(|event| event.event.kind == "m.room.topic");
    topic.and_then(|event| event.event.content().get("topic").cloned())
}

async fn set_topic(node: &Node, room: &RoomId, user: &str, topic: &str) {
    node.send(room, draft(&node.user(user), "m.room.topic", Some(""), json!({ "topic": topic }))).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_missing_is_asked_for_again_after_a_restart() {
    let (world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let faulty = Faulty::of(&hub);
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    deafen(&part);
    hub.say(&room, "bot", "missed").await;
    let Sent::Appended(last) = hub.say(&room, "bot", "last").await else { panic!("a hub appends") };
    faulty.away.store(1, Ordering::SeqCst);
    let received = part.lm.receive(&hub.name, vec![raw(&last.event.json)]).await.pop().unwrap();
    assert!(matches!(received.result, Err(Refusal::Internal(_))), "{received:?}");
    // The hub says nothing more, and nothing of it is in memory.
    hub.context.outbound.stop().await;
    let part = world.restart(part).await;
    assert_eq!(bodies(&part.log(&room).await), Vec::<String>::new());
    part.wait_for_body(&room, "last").await;
    assert_eq!(ids(&part.log(&room).await), ids(&hub.log(&room).await));
    wait_for_missing(&part, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_hub_does_not_give_is_passed_over_and_asked_for_again_and_brings_nothing_old_back() {
    let (world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    let deaf = deafen(&part);
    let refuses = Arc::new(AtomicBool::new(true));
    let kept = refuses.clone();
    hub.meddle(move |request, next| {
        let refused = kept.load(Ordering::SeqCst) && request.uri().path().contains("/backfill/");
        async move {
            match refused {
                true => respond(StatusCode::FORBIDDEN, json!({ "errcode": "M_FORBIDDEN", "error": "not now" })),
                false => next.run(request).await,
            }
        }
    });
    set_topic(&hub, &room, "bot", "old").await;
    hub.say(&room, "bot", "missed").await;
    set_topic(&hub, &room, "bot", "new").await;
    hub.wait(&room, "the topic", |log| topic(log) == Some(json!("new"))).await;
    hub.context.outbound.stop().await;
    deaf.store(false, Ordering::SeqCst);
    let Sent::Appended(last) = hub.say(&room, "bot", "last").await else { panic!("a hub appends") };
    let received = part.lm.receive(&hub.name, vec![raw(&last.event.json)]).await.pop().unwrap();
    assert_eq!(received.result, Ok(()));
    let log = part.log(&room).await;
    assert_eq!((bodies(&log), topic(&log)), (vec!["last".to_owned()], Some(json!("new"))), "the hub's state is taken");
    assert_eq!(count_missing(&part).await, 1);
    let shown = missing(&part.context.store, Some(&room)).await.unwrap();
    assert!(shown.last_error.as_deref().is_some_and(|error| error.contains("not now")), "{shown:?}");
    refuses.store(false, Ordering::SeqCst);
    let part = world.restart(part).await;
    let log = part.wait_for_body(&room, "missed").await;
    assert_eq!((bodies(&log), topic(&log)), (vec!["last".to_owned(), "missed".to_owned()], Some(json!("new"))));
    wait_for_missing(&part, 0).await;
}

/// A page of the hub's log has what is missing, and what was said before that too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_said_while_nobody_of_a_server_was_there_does_not_come_with_what_is_missing() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    hub.say(&room, "bot", "before").await;
    part.join(&room, "alice", &hub).await;
    let alice = part.user("alice");
    part.lm.leave(&room, &alice, std::slice::from_ref(&hub.name)).await.unwrap();
    let is_out = |log: &[Appended]| log.last().is_some_and(|last| last.event.content()["membership"] == "leave");
    part.wait(&room, "the leave", is_out).await;
    hub.say(&room, "bot", "in between").await;
    part.join(&room, "alice", &hub).await;
    deafen(&part);
    hub.say(&room, "bot", "missed").await;
    let Sent::Appended(last) = hub.say(&room, "bot", "last").await else { panic!("a hub appends") };
    let received = part.lm.receive(&hub.name, vec![raw(&last.event.json)]).await.pop().unwrap();
    assert_eq!(received.result, Ok(()));
    assert_eq!(part.bodies(&room).await, ["missed", "last"]);
    assert_eq!(part.fault_kinds(&room).await, [""; 0]);
}

/// Three servers, of which `third.example`, in whose user's name `carol` speaks with power, gives its keys to nobody who does
/// not have them when `is_away` is set.
struct Away {
    clock: Arc<ManualClock>,
    world: World,
    hub: Node,
    part: Node,
    third: Node,
    room: OwnedRoomId,
    is_away: Arc<AtomicBool>,
}

async fn away() -> Away {
    let clock = ManualClock::new(isthmus::clock::SystemClock.now_ms());
    let names = ["hub.example", "part.example", "third.example"];
    let (world, [hub, part, third]) = World::with_clock(names, clock.clone()).await;
    let levels = json!({ "users": { hub.user("bot"): 100, third.user("carol"): 100 } });
    let room = hub.create_room_with("public", levels).await;
    third.join(&room, "carol", &hub).await;
    let is_away = Arc::new(AtomicBool::new(true));
    let kept = is_away.clone();
    third.meddle(move |request, next| {
        let away = kept.load(Ordering::SeqCst) && request.uri().path().contains("/key/");
        async move {
            match away {
                true => respond(StatusCode::SERVICE_UNAVAILABLE, json!({})),
                false => next.run(request).await,
            }
        }
    });
    part.join(&room, "alice", &hub).await;
    assert_eq!(count_missing(&part).await, 1, "that carol is a member");
    Away { clock, world, hub, part, third, room, is_away }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_whose_keys_cannot_be_had_waits_for_them_and_holds_nobody_up_for_long() {
    let Away { clock, world: _world, hub, part, third, room, is_away } = away().await;
    third.say(&room, "carol", "first").await;
    wait_for_missing(&part, 2).await;
    // For a moment the keys may come.
    hub.say(&room, "bot", "second").await;
    wait_for_missing(&part, 3).await;
    assert_eq!(part.bodies(&room).await, Vec::<String>::new());
    clock.advance(11_000);
    hub.say(&room, "bot", "third").await;
    part.wait_for_body(&room, "third").await;
    // Again and again there is no waiting.
    third.say(&room, "carol", "fourth").await;
    hub.wait_for_body(&room, "fourth").await;
    hub.say(&room, "bot", "fifth").await;
    part.wait_for_body(&room, "fifth").await;
    assert_eq!(part.bodies(&room).await, ["second", "third", "fifth"]);
    let queue = hub.context.outbound.status().await.unwrap();
    assert!(queue.iter().all(|queue| queue.failures == 0), "the hub has nothing to repeat: {queue:?}");
    is_away.store(false, Ordering::SeqCst);
    clock.advance(3_600_000);
    hub.say(&room, "bot", "sixth").await;
    let log = part.wait(&room, "all of them", |log| bodies(log).len() >= 6).await;
    let bodies = bodies(&log);
    let place = |body: &str| bodies.iter().position(|found| found == body).unwrap();
    assert!(bodies.len() == 6 && place("first") < place("fourth"), "{bodies:?}");
    wait_for_missing(&part, 0).await;
    assert_eq!(part.lm.room(&room).await.unwrap().unwrap().complaints, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_only_an_event_that_waits_allows_waits_with_it_across_a_restart() {
    let Away { clock, world, hub, part, third, room, is_away } = away().await;
    let bot = hub.user("bot");
    let levels = json!({ "users": { bot: 100, third.user("carol"): 100, hub.user("dave"): 50 } });
    hub.lm.join(&room, &hub.user("dave"), &[], isthmus::event::Object::new()).await.unwrap();
    third.send(&room, draft(&third.user("carol"), "m.room.power_levels", Some(""), levels)).await.unwrap();
    hub.wait(&room, "the levels", |log| log.last().unwrap().event.kind == "m.room.power_levels").await;
    set_topic(&hub, &room, "dave", "by dave").await;
    wait_for_missing(&part, 3).await;
    clock.advance(11_000);
    hub.say(&room, "bot", "goes on").await;
    part.wait_for_body(&room, "goes on").await;
    assert_eq!((count_missing(&part).await, topic(&part.log(&room).await)), (3, None));
    is_away.store(false, Ordering::SeqCst);
    let part = world.restart(part).await;
    part.wait(&room, "the topic", |log| topic(log) == Some(json!("by dave"))).await;
    wait_for_missing(&part, 0).await;
    let room = part.lm.room(&room).await.unwrap().unwrap();
    assert_eq!(room.complaints, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn state_that_waited_does_not_replace_newer_state() {
    let Away { clock, world, hub, part, third, room, is_away } = away().await;
    set_topic(&third, &room, "carol", "old").await;
    wait_for_missing(&part, 2).await;
    clock.advance(11_000);
    set_topic(&hub, &room, "bot", "new").await;
    part.wait(&room, "the new topic", |log| topic(log) == Some(json!("new"))).await;
    is_away.store(false, Ordering::SeqCst);
    let part = world.restart(part).await;
    wait_for_missing(&part, 0).await;
    assert_eq!(topic(&part.log(&room).await), Some(json!("new")));
    // Of several that waited the last counts.
    is_away.store(true, Ordering::SeqCst);
    let keys_of = third.name.clone();
    part.context.store.write(move |tx| Box::pin(async move { forget_keys(tx, &keys_of).await })).await.unwrap();
    let part = world.restart(part).await;
    for text in ["one", "two"] {
        set_topic(&third, &room, "carol", text).await;
        hub.wait(&room, text, |log| topic(log) == Some(json!(text))).await;
    }
    wait_for_missing(&part, 2).await;
    is_away.store(false, Ordering::SeqCst);
    let part = world.restart(part).await;
    wait_for_missing(&part, 0).await;
    assert_eq!(topic(&part.log(&room).await), Some(json!("two")));
}

/// As if a server had never been asked for its keys.
async fn forget_keys(tx: &mut isthmus::store::Tx, server: &ruma::ServerName) -> Result<(), isthmus::store::StoreError> {
    let query = sqlx::query("DELETE FROM server_keys WHERE server_name = $1").bind(server.as_str());
    query.execute(tx).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn state_that_was_given_for_what_is_missing_is_taken_when_its_keys_are_there() {
    let Away { clock: _clock, world, hub, part, third, room, is_away } = away().await;
    set_topic(&hub, &room, "bot", "old").await;
    part.wait(&room, "the old topic", |log| topic(log) == Some(json!("old"))).await;
    let deaf = deafen(&part);
    set_topic(&third, &room, "carol", "new").await;
    hub.wait(&room, "the new topic", |log| topic(log) == Some(json!("new"))).await;
    hub.say(&room, "bot", "missed").await;
    hub.context.outbound.stop().await;
    deaf.store(false, Ordering::SeqCst);
    hub.meddle(|request, next| async move {
        match request.uri().path().contains("/backfill/") {
            true => respond(StatusCode::FORBIDDEN, json!({ "errcode": "M_FORBIDDEN", "error": "not now" })),
            false => next.run(request).await,
        }
    });
    let Sent::Appended(last) = hub.say(&room, "bot", "last").await else { panic!("a hub appends") };
    let received = part.lm.receive(&hub.name, vec![raw(&last.event.json)]).await.pop().unwrap();
    assert_eq!(received.result, Ok(()));
    assert_eq!(topic(&part.log(&room).await), Some(json!("old")), "nobody can say that the new one is carol's");
    is_away.store(false, Ordering::SeqCst);
    let part = world.restart(part).await;
    part.wait(&room, "the new topic", |log| topic(log) == Some(json!("new"))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_keys_fills_only_its_own_share_and_what_is_beyond_it_comes_later() {
    let Away { clock, world: _world, hub, part, third, room, is_away } = away().await;
    for index in 0..60 {
        third.say(&room, "carol", &format!("talk {index}")).await;
    }
    set_topic(&third, &room, "carol", "one").await;
    hub.wait(&room, "the first topic", |log| topic(log) == Some(json!("one"))).await;
    clock.advance(11_000);
    set_topic(&hub, &room, "bot", "two").await;
    hub.say(&room, "bot", "goes on").await;
    part.wait_for_body(&room, "goes on").await;
    set_topic(&third, &room, "carol", "three").await;
    third.send(&room, draft(&third.user("carol"), "m.room.name", Some(""), json!({ "name": "old" }))).await.unwrap();
    third.say(&room, "carol", "more").await;
    hub.wait_for_body(&room, "more").await;
    hub.send(&room, draft(&hub.user("bot"), "m.room.name", Some(""), json!({ "name": "new" }))).await.unwrap();
    hub.say(&room, "bot", "still goes on").await;
    part.wait_for_body(&room, "still goes on").await;
    // One stands for all for which there was no space.
    assert_eq!(count_missing(&part).await, 1 + 50 + 1);
    assert_eq!(part.bodies(&room).await, ["goes on", "still goes on"]);
    is_away.store(false, Ordering::SeqCst);
    clock.advance(3_600_000);
    hub.say(&room, "bot", "last").await;
    wait_for_missing(&part, 0).await;
    let log = part.log(&room).await;
    let said: Vec<String> = bodies(&log).into_iter().filter(|body| !body.contains("goes on")).collect();
    let talk: Vec<String> = (0..60).map(|index| format!("talk {index}")).chain(["more".to_owned()]).collect();
    assert_eq!(said.iter().filter(|body| *body != "last").collect::<Vec<_>>(), talk.iter().collect::<Vec<_>>());
    let state = |kind: &str| log.iter().rev().find(|event| event.event.kind == kind).unwrap().event.content().clone();
    assert_eq!(state("m.room.topic")["topic"], "three", "it came after what stood there");
    assert_eq!(state("m.room.name")["name"], "new", "what was newer at the hub stays");
    let complaints = part.lm.room(&room).await.unwrap().unwrap().complaints;
    assert_eq!(complaints.len(), 2, "the first topic and the old name: {complaints:?}");
}

/// It would stand in the stay that has begun since, where the hub's log does not have it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_missing_of_an_earlier_stay_is_not_asked_for_in_a_later_one() {
    let (world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    let alice = part.user("alice");
    part.lm.leave(&room, &alice, std::slice::from_ref(&hub.name)).await.unwrap();
    let is_out = |log: &[Appended]| log.last().is_some_and(|last| last.event.content()["membership"] == "leave");
    part.wait(&room, "the leave", is_out).await;
    let Sent::Appended(old) = hub.say(&room, "bot", "of another time").await else { panic!("a hub appends") };
    let hole = Hole {
        event_id: old.event.event_id.clone(),
        json: None,
        place: Some(1),
        given: false,
        tries: 3,
        retry_at: i64::MAX,
        noticed_ts: 0,
        last_error: String::new(),
        overflow: None,
    };
    let (store, of) = (part.context.store.clone(), room.clone());
    let bounds = Counts { absent: 9, waiting: 9, given: 9 };
    let job = part.context.store.write(move |tx| {
        Box::pin(async move { note_holes(&store, tx, &of, std::slice::from_ref(&hole), bounds).await })
    });
    job.await.unwrap();
    part.join(&room, "alice", &hub).await;
    assert_eq!(count_missing(&part).await, 0);
    let part = world.restart(part).await;
    hub.say(&room, "bot", "later").await;
    part.wait_for_body(&room, "later").await;
    assert_eq!(part.bodies(&room).await, ["later"]);
}

/// The hub sends what follows the join before its answer is here: the join comes as what is missing before that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_missing_of_an_earlier_stay_is_forgotten_too_where_the_join_comes_before_its_answer() {
    let (world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    let Sent::Appended(old) = hub.say(&room, "bot", "of another time").await else { panic!("a hub appends") };
    part.join(&room, "alice", &hub).await;
    let alice = part.user("alice");
    part.lm.leave(&room, &alice, std::slice::from_ref(&hub.name)).await.unwrap();
    let is_out = |log: &[Appended]| log.last().is_some_and(|last| last.event.content()["membership"] == "leave");
    part.wait(&room, "the leave", is_out).await;
    let hole = Hole {
        event_id: old.event.event_id.clone(),
        json: None,
        place: Some(1),
        given: false,
        tries: 3,
        retry_at: i64::MAX,
        noticed_ts: 0,
        last_error: String::new(),
        overflow: None,
    };
    let (store, of) = (part.context.store.clone(), room.clone());
    let bounds = Counts { absent: 9, waiting: 9, given: 9 };
    let job = part.context.store.write(move |tx| {
        Box::pin(async move { note_holes(&store, tx, &of, std::slice::from_ref(&hole), bounds).await })
    });
    job.await.unwrap();
    let (of, kept, lm, bot) = (room.clone(), part.lm.clone(), hub.lm.clone(), hub.user("bot"));
    hub.meddle(move |request, next| {
        let (of, part, lm, bot) = (of.clone(), kept.clone(), lm.clone(), bot.clone());
        async move {
            let joins = request.uri().path().contains("/send_join/");
            let answer = next.run(request).await;
            if joins {
                let outgoing = isthmus::seam::Outgoing { draft: message(&bot, "welcome"), effect: None };
                lm.send(&of, vec![outgoing]).await.pop().unwrap().unwrap();
                for _ in 0..1_000 {
                    let log = part.log(&of, isthmus::lm::Position(0), 1000).await.unwrap();
                    if bodies(&log).iter().any(|body| body == "welcome") {
                        break;
                    }
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                }
            }
            answer
        }
    });
    part.join(&room, "alice", &hub).await;
    assert_eq!((part.bodies(&room).await, count_missing(&part).await), (vec!["welcome".to_owned()], 0));
    let part = world.restart(part).await;
    hub.say(&room, "bot", "later").await;
    part.wait_for_body(&room, "later").await;
    assert_eq!(part.bodies(&room).await, ["welcome", "later"]);
}
