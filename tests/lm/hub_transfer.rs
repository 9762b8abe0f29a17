//! A log changes hands: one server keeps it, then another, and everybody goes on in one log. `docs/hub-transfer.md` says how.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use axum::response::IntoResponse as _;
use http::StatusCode;
use isthmus::event::{Completion, Object, Pdu};
use isthmus::federation::{Call, RemoteError};
use isthmus::lm::{Appended, HandedOver, Role, Sent};
use isthmus::refusal::Refusal;
use isthmus::seam::{Draft, Received};
use isthmus::store::lm::{Counts, Hole, missing, note_holes};
use ruma::{OwnedEventId, OwnedRoomId, RoomId};
use serde_json::{Value, json};

use super::world::{Node, World, bodies, draft, ids, message, raw};

const PATIENCE: Duration = Duration::from_secs(30);
const UNSTABLE: &str = "/_matrix/federation/unstable/org.matrix.i-d.ralston-mimi-linearized-matrix.02";

pub fn on() -> Value {
    json!({ "give": true, "accept": ["*"] })
}

pub(super) async fn three() -> (World, [Node; 3]) {
    World::handing_over([("a.example", on()), ("b.example", on()), ("c.example", on())]).await
}

/// A room of `a`'s in which `b` has somebody with the level to hand its log over, and `c` somebody without.
pub(super) async fn room_of(a: &Node, b: &Node, c: &Node) -> OwnedRoomId {
    let levels = json!({ "users": { a.user("bot"): 100, b.user("bob"): 100 } });
    let room = a.create_room_with("public", levels).await;
    b.join(&room, "bob", a).await;
    c.join(&room, "carol", a).await;
    room
}

pub(super) async fn hand_over(from: &Node, room: &RoomId, user: &str, to: &Node) -> Result<HandedOver, Refusal> {
    from.lm.hand_over(room, &from.user(user), &to.name, false).await
}

pub(super) async fn hub_at(node: &Node, room: &RoomId) -> String {
    match node.lm.room(room).await.unwrap().unwrap().role {
        Role::Hub => node.name.to_string(),
        Role::Participant { hub } | Role::GraphServer { hub } => hub.to_string(),
    }
}

pub async fn wait_for_hub(node: &Node, room: &RoomId, hub: &Node) {
    let waiting = async {
        while hub_at(node, room).await != hub.name.as_str() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let seen = tokio::time::timeout(PATIENCE, waiting).await;
    assert!(seen.is_ok(), "{} does not see {} as the hub: {:?}", node.name, hub.name, node.bodies(room).await);
}

fn bytes(log: &[Appended]) -> Vec<Vec<u8>> {
    log.iter().map(|event| event.event.to_bytes()).collect()
}

/// Waits until all have one log, byte for byte, with nothing twice in it, and returns what was said.
pub(super) async fn one_log(nodes: &[&Node], room: &RoomId, said: usize) -> Vec<String> {
    let waiting = async {
        loop {
            let mut logs = Vec::new();
            for node in nodes {
                logs.push(node.log(room).await);
            }
            if logs.iter().all(|log| bodies(log).len() >= said && bytes(log) == bytes(&logs[0])) {
                return logs.remove(0);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let Ok(log) = tokio::time::timeout(PATIENCE, waiting).await else {
        for node in nodes {
            let log = node.log(room).await;
            let lines: Vec<_> =
                log.iter().map(|event| (event.event.kind.clone(), event.event.event_id.clone())).collect();
            eprintln!("{}: {:?} {lines:#?}", node.name, bodies(&log));
        }
        panic!("the logs are not one with {said} messages");
    };
    let mut unique = ids(&log);
    unique.sort();
    unique.dedup();
    assert_eq!(unique.len(), log.len());
    let said = bodies(&log);
    let mut once = said.clone();
    once.sort();
    once.dedup();
    assert_eq!(once.len(), said.len(), "said twice: {said:?}");
    said
}

/// Lets no request to a server's `what` through while the switch is on.
pub(super) fn cut(node: &Node, what: &'static str) -> Arc<AtomicBool> {
    let is_cut = Arc::new(AtomicBool::new(true));
    let switch = is_cut.clone();
    node.meddle(move |request, next| {
        let refuse = switch.load(Ordering::SeqCst) && request.uri().path().contains(what);
        async move { if refuse { StatusCode::SERVICE_UNAVAILABLE.into_response() } else { next.run(request).await } }
    });
    is_cut
}

pub(super) fn hurry(nodes: &[&Node]) {
    for node in nodes {
        for other in nodes {
            node.context.outbound.retry(&other.name);
        }
    }
}

pub(super) fn transfers(log: &[Appended]) -> usize {
    log.iter().filter(|event| event.event.kind == "m.room.hub").count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_takes_a_log_over_reads_no_more_of_it_than_before() {
    let (_world, [a, b, c]) = three().await;
    let room = a.create_room_with("public", json!({ "users": { a.user("bot"): 100, b.user("bob"): 100 } })).await;
    c.join(&room, "carol", &a).await;
    let joined = json!({ "history_visibility": "joined" });
    a.send(&room, draft(&a.user("bot"), "m.room.history_visibility", Some(""), joined)).await.unwrap();
    a.say(&room, "bot", "not for bob").await;
    c.wait_for_body(&room, "not for bob").await;
    let hidden = a.log(&room).await.pop().unwrap().event.event_id.clone();
    b.join(&room, "bob", &a).await;
    let asked = async |of: &Node| of.lm.get_event(&b.name, &hidden).await.map(|event| event["content"].clone()).ok();
    assert_eq!((asked(&a).await, asked(&c).await), (Some(json!({})), None));
    // Who has always kept the log sees what of it is elsewhere.
    assert_eq!(c.lm.get_event(&a.name, &hidden).await.unwrap()["content"]["body"], "not for bob");
    hand_over(&a, &room, "bot", &b).await.unwrap();
    for node in [&b, &c] {
        wait_for_hub(node, &room, &b).await;
    }
    assert_eq!((asked(&a).await, asked(&c).await), (Some(json!({})), None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_is_handed_over_and_back_and_everybody_goes_on() {
    let (world, [a, b, c]) = three().await;
    let room = room_of(&a, &b, &c).await;
    c.say(&room, "carol", "c1").await;
    one_log(&[&a, &b, &c], &room, 1).await;
    let given = hand_over(&a, &room, "bot", &b).await.unwrap();
    assert_eq!(given.unaware, [] as [&str; 0]);
    assert!(given.taken);
    assert_eq!(hub_at(&a, &room).await, "b.example");
    for node in [&b, &c] {
        wait_for_hub(node, &room, &b).await;
    }
    c.say(&room, "carol", "c2").await;
    assert!(matches!(a.say(&room, "bot", "a2").await, Sent::Queued { .. }));
    assert!(matches!(b.say(&room, "bob", "b2").await, Sent::Appended(_)));
    let said = one_log(&[&a, &b, &c], &room, 4).await;
    assert_eq!(said[0], "c1");
    let log = b.log(&room).await;
    let last = log.last().unwrap().event.clone();
    let from_c = log.iter().find(|event| bodies(std::slice::from_ref(*event)) == ["c2"]).unwrap();
    assert_eq!(from_c.event.hub_server.as_deref(), Some(&*b.name));

    // What only a hub answers the one before does not answer any more.
    let (carol, dave) = (c.user("carol"), c.user("dave"));
    let uri =
        format!("/_matrix/federation/v1/make_join/{room}/{dave}?ver=org.matrix.i-d.ralston-mimi-linearized-matrix.02");
    let Err(RemoteError::Status { status, errcode, error, .. }) = c.get(&a, &uri).await else { panic!("answered") };
    assert_eq!((status, errcode.as_str()), (StatusCode::BAD_REQUEST, "M_WRONG_SERVER"));
    assert!(error.contains("b.example"), "{error}");
    let state = c.get(&a, &format!("/_matrix/federation/v1/state/{room}")).await;
    assert!(matches!(state, Err(RemoteError::Status { errcode, .. }) if errcode == "M_WRONG_SERVER"));
    // But what it kept until then it gives to those who are still fetching it, and nothing of what came later.
    let given_at = &given.event_id;
    let backfill = |from: &str| format!("{UNSTABLE}/backfill/{room}?v={from}&limit=100");
    assert!(c.get(&a, &backfill(given_at.as_str())).await.is_ok());
    assert!(c.get(&a, &backfill(last.event_id.as_str())).await.is_err());
    assert!(c.get(&b, &backfill(last.event_id.as_str())).await.is_ok());
    // An LPDU for it is refused by name; nothing of it gets anywhere.
    let lpdu = c.lpdu(&room, &b.name, &message(&carol, "by hand"));
    let old = c.lpdu(&room, &a.name, &message(&carol, "too late"));
    let answer = c.transact(&a, "late", &[Value::Object(old.json.clone())]).await;
    let failed = match answer {
        Ok(answer) => answer["failed_pdus"][old.lpdu_id.as_str()].clone(),
        Err(error) => panic!("{error}"),
    };
    // It would take the log back, so its sender may know more than it does: where it would not, it says so for good.
    assert_eq!(failed["errcode"], "M_WRONG_SERVER", "{failed}");
    assert!(failed["error"].as_str().unwrap().contains("b.example"), "{failed}");
    assert_eq!(c.transact(&b, "now", &[Value::Object(lpdu.json)]).await.unwrap()["failed_pdus"], json!({}));

    // And back, by somebody of the new hub's.
    one_log(&[&a, &b, &c], &room, 5).await;
    hand_over(&b, &room, "bob", &a).await.unwrap();
    for node in [&a, &b, &c] {
        wait_for_hub(node, &room, &a).await;
    }
    let (a, b, c) = (world.restart(a).await, world.restart(b).await, world.restart(c).await);
    assert_eq!([hub_at(&a, &room).await, hub_at(&b, &room).await, hub_at(&c, &room).await], ["a.example"; 3]);
    for (node, user, body) in [(&a, "bot", "a3"), (&b, "bob", "b3"), (&c, "carol", "c3")] {
        node.say(&room, user, body).await;
    }
    one_log(&[&a, &b, &c], &room, 8).await;
    assert_eq!(transfers(&a.log(&room).await), 2);
    assert_eq!(c.lm.room(&room).await.unwrap().unwrap().complaints, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_comes_later_comes_to_the_new_hub_and_follows_the_changes_back() {
    let (_world, [a, b, c]) = three().await;
    let levels = json!({ "users": { a.user("bot"): 100, b.user("bob"): 100 } });
    let room = a.create_room_with("public", levels).await;
    b.join(&room, "bob", &a).await;
    hand_over(&a, &room, "bot", &b).await.unwrap();
    wait_for_hub(&b, &room, &b).await;
    // It asks the one that it knows, and that names the other.
    c.join(&room, "carol", &a).await;
    assert_eq!(hub_at(&c, &room).await, "b.example");
    c.say(&room, "carol", "here").await;
    one_log(&[&a, &b, &c], &room, 1).await;
    hand_over(&b, &room, "bob", &c).await.unwrap();
    wait_for_hub(&c, &room, &c).await;
    wait_for_hub(&a, &room, &c).await;
    a.say(&room, "bot", "there").await;
    assert_eq!(one_log(&[&a, &b, &c], &room, 2).await, ["here", "there"]);
}

/// Everybody talks all the while.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_5_what_is_said_meanwhile_is_in_the_log_once() {
    const EACH: usize = 25;
    let (_world, [a, b, c]) = three().await;
    let room = room_of(&a, &b, &c).await;
    let talk = async |node: &Node, user: &str| {
        for number in 0..EACH {
            node.say(&room, user, &format!("{user} {number}")).await;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let transfer = async {
        tokio::time::sleep(Duration::from_millis(80)).await;
        hand_over(&a, &room, "bot", &b).await
    };
    let (.., given) = tokio::join!(talk(&a, "bot"), talk(&b, "bob"), talk(&c, "carol"), transfer);
    given.unwrap();
    let said = one_log(&[&a, &b, &c], &room, 3 * EACH).await;
    for user in ["bot", "bob", "carol"] {
        let of_user: Vec<_> = said.iter().filter(|body| body.split(' ').next() == Some(user)).collect();
        let expected: Vec<String> = (0..EACH).map(|number| format!("{user} {number}")).collect();
        assert_eq!(of_user, expected.iter().collect::<Vec<_>>());
    }
    assert_eq!(hub_at(&c, &room).await, "b.example");
}

/// What a participant had queued for the hub of before: one message that it took and did not answer, and some that it did not take.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_5_what_was_on_its_way_to_the_old_hub_goes_to_the_new_one_unless_it_was_taken() {
    let (world, [a, b, c]) = three().await;
    let room = room_of(&a, &b, &c).await;
    let sends = Arc::new(AtomicUsize::new(0));
    let seen = sends.clone();
    let own = format!("origin=\"{}\"", c.name);
    a.meddle(move |request, next| {
        let authorization = request.headers().get("authorization").and_then(|value| value.to_str().ok());
        let is_send = request.uri().path().contains("/send/")
            && authorization.is_some_and(|value| value.replace("origin=c.example", &own).contains(&own));
        let seen = seen.clone();
        async move {
            match is_send.then(|| seen.fetch_add(1, Ordering::SeqCst)) {
                None => next.run(request).await,
                // Taken, and nobody hears of it.
                Some(0) => {
                    next.run(request).await;
                    StatusCode::SERVICE_UNAVAILABLE.into_response()
                }
                Some(_) => StatusCode::SERVICE_UNAVAILABLE.into_response(),
            }
        }
    });
    c.say(&room, "carol", "taken").await;
    a.wait_for_body(&room, "taken").await;
    assert!(sends.load(Ordering::SeqCst) > 0, "the meddler is not in the way");
    c.say(&room, "carol", "one").await;
    c.say(&room, "carol", "two").await;
    b.wait_for_body(&room, "taken").await;
    hand_over(&a, &room, "bot", &b).await.unwrap();
    wait_for_hub(&c, &room, &b).await;
    assert_eq!(one_log(&[&a, &b, &c], &room, 3).await, ["taken", "one", "two"]);
    // Nothing is left of it, also after a restart.
    let c = world.restart(c).await;
    c.say(&room, "carol", "three").await;
    assert_eq!(one_log(&[&a, &b, &c], &room, 4).await, ["taken", "one", "two", "three"]);
}

/// The same of the server that becomes the hub: what it had queued it appends itself.
/// What is missing of a log is asked for for minutes. That holds up only what was on its way when the log changed hands.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_lacks_something_of_a_log_that_was_handed_over_says_what_is_new_at_once() {
    let (world, [a, b, c]) = three().await;
    let room = room_of(&a, &b, &c).await;
    one_log(&[&a, &b, &c], &room, 0).await;
    let hole = Hole {
        event_id: OwnedEventId::try_from(format!("${}", "x".repeat(43))).unwrap(),
        json: None,
        place: None,
        given: false,
        tries: 0,
        retry_at: 0,
        noticed_ts: 0,
        last_error: String::new(),
        overflow: None,
    };
    let (store, of) = (c.context.store.clone(), room.clone());
    let bounds = Counts { absent: 9, waiting: 9, given: 9 };
    let job = c.context.store.write(move |tx| {
        Box::pin(async move { note_holes(&store, tx, &of, std::slice::from_ref(&hole), bounds).await })
    });
    job.await.unwrap();
    let c = world.restart(c).await;
    hand_over(&a, &room, "bot", &b).await.unwrap();
    wait_for_hub(&c, &room, &b).await;
    c.say(&room, "carol", "to the new hub").await;
    b.wait_for_body(&room, "to the new hub").await;
    assert_eq!(missing(&c.context.store, Some(&room)).await.unwrap().count, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_new_hub_had_queued_it_appends_itself() {
    let (_world, [a, b, c]) = three().await;
    let room = room_of(&a, &b, &c).await;
    let is_cut = cut(&a, "/send/");
    b.say(&room, "bob", "one").await;
    b.say(&room, "bob", "two").await;
    hand_over(&a, &room, "bot", &b).await.unwrap();
    wait_for_hub(&b, &room, &b).await;
    b.say(&room, "bob", "three").await;
    is_cut.store(false, Ordering::SeqCst);
    hurry(&[&a, &b, &c]);
    assert_eq!(one_log(&[&a, &b, &c], &room, 3).await, ["one", "two", "three"]);
    assert!(b.log(&room).await.iter().all(|event| event.event.sender != b.user("bob")
        || event.event.kind != "m.room.message"
        || event.event.hub_server.is_none()));
}

/// The old hub is stopped between the end of its part and anybody's hearing of it, and the new one before it has told the others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_of_either_leaves_one_hub_and_one_log() {
    let (world, [a, b, c]) = three().await;
    let room = room_of(&a, &b, &c).await;
    let cuts = [cut(&b, "/send/"), cut(&c, "/send/")];
    hand_over(&a, &room, "bot", &b).await.unwrap();
    let a = world.restart(a).await;
    assert_eq!(hub_at(&a, &room).await, "b.example");
    assert!(matches!(a.say(&room, "bot", "from a").await, Sent::Queued { .. }));
    // Nobody has told the others.
    assert_eq!(hub_at(&b, &room).await, "a.example");
    c.say(&room, "carol", "from c").await;
    cuts[0].store(false, Ordering::SeqCst);
    hurry(&[&a, &b, &c]);
    wait_for_hub(&b, &room, &b).await;
    let b = world.restart(b).await;
    assert_eq!(hub_at(&b, &room).await, "b.example");
    b.say(&room, "bob", "from b").await;
    cuts[1].store(false, Ordering::SeqCst);
    hurry(&[&a, &b, &c]);
    let mut said = one_log(&[&a, &b, &c], &room, 3).await;
    said.sort();
    assert_eq!(said, ["from a", "from b", "from c"]);
    let c = world.restart(c).await;
    assert_eq!(hub_at(&c, &room).await, "b.example");
}

/// The old hub is gone as soon as it has handed its log over: the new one tells a participant that had not even got the last messages.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_new_hub_tells_those_whom_the_old_one_did_not() {
    let (_world, [a, b, c]) = three().await;
    let room = room_of(&a, &b, &c).await;
    let is_cut = cut(&c, "/send/");
    for body in ["one", "two"] {
        a.say(&room, "bot", body).await;
    }
    b.wait_for_body(&room, "two").await;
    hand_over(&a, &room, "bot", &b).await.unwrap();
    wait_for_hub(&b, &room, &b).await;
    a.context.outbound.stop().await;
    let _gone = cut(&a, "/");
    b.say(&room, "bob", "three").await;
    assert_eq!(hub_at(&c, &room).await, "a.example");
    is_cut.store(false, Ordering::SeqCst);
    hurry(&[&b, &c]);
    assert_eq!(one_log(&[&b, &c], &room, 3).await, ["one", "two", "three"]);
    assert_eq!(hub_at(&c, &room).await, "b.example");
    assert_eq!(c.lm.room(&room).await.unwrap().unwrap().complaints, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_keeps_a_log_who_does_not_want_to_or_does_not_have_it() {
    let off = json!({ "give": false, "accept": [] });
    let (_world, [a, b, c]) = World::handing_over([("a.example", on()), ("b.example", on()), ("c.example", off)]).await;
    let room = room_of(&a, &b, &c).await;
    // Its admin has not said so.
    let refused = hand_over(&a, &room, "bot", &c).await.unwrap_err();
    assert!(refused.to_string().contains("hub_transfer.accept"), "{refused}");
    // Nor here: it is nobody's to give away by a default.
    let refused = hand_over(&c, &room, "carol", &b).await.unwrap_err();
    assert_eq!(refused.code(), "policy");
    // Of what it has not it is told, and cannot fetch it.
    let _told = cut(&b, "/send/");
    let is_cut = cut(&a, "/backfill/");
    a.say(&room, "bot", "not here").await;
    let refused = hand_over(&a, &room, "bot", &b).await.unwrap_err();
    let last = a.log(&room).await.last().unwrap().event.event_id.clone();
    assert!(refused.to_string().contains(last.as_str()), "{refused}");
    assert_eq!((hub_at(&a, &room).await, transfers(&a.log(&room).await)), ("a.example".to_owned(), 0));
    // It can fetch it.
    is_cut.store(false, Ordering::SeqCst);
    let waiting = async {
        while let Err(refusal) = hand_over(&a, &room, "bot", &b).await {
            assert!(refusal.to_string().contains("log"), "{refusal}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap();
    assert!(b.bodies(&room).await.contains(&"not here".to_owned()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_takes_the_switch_the_level_a_server_in_the_room_and_the_hub() {
    let off = json!({ "give": false, "accept": ["*"] });
    let (_world, [a, b, c]) = World::handing_over([("a.example", on()), ("b.example", off), ("c.example", on())]).await;
    let room = room_of(&a, &b, &c).await;
    a.lm.join(&room, &a.user("small"), &[], Object::new()).await.unwrap();
    let rule = async |node: &Node, user: &str, to: &str| {
        let to = to.try_into().unwrap();
        match node.lm.hand_over(&room, &node.user(user), to, true).await.unwrap_err() {
            Refusal::LmRule { rule, .. } => rule.to_owned(),
            other => other.code().to_owned(),
        }
    };
    assert_eq!(rule(&a, "small", "b.example").await, "7");
    assert_eq!(rule(&a, "nobody", "b.example").await, "6");
    assert_eq!(rule(&a, "bot", "away.example").await, "hub.4");
    assert_eq!(rule(&a, "bot", "a.example").await, "hub.4");
    assert_eq!(rule(&b, "bob", "c.example").await, "policy");
    assert_eq!(rule(&c, "carol", "b.example").await, "wrong_hub");
    // The room says what it needs.
    let levels = json!({ "users": { a.user("bot"): 100, b.user("bob"): 100 }, "events": { "m.room.hub": 101 } });
    let levels = draft(&a.user("bot"), "m.room.power_levels", Some(""), levels);
    assert!(a.send(&room, levels).await.is_err(), "nobody sets what is above him");
    // By no other way than this one.
    let by_hand = draft(&a.user("bot"), "m.room.hub", Some(""), json!({ "hub_server": b.name }));
    let Err(Refusal::LmRule { rule, .. }) = a.send(&room, by_hand).await else { panic!("sent") };
    assert_eq!(rule, "hub.5");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn those_who_do_not_know_of_it_are_named_and_it_is_done_when_it_must_be() {
    let (_world, [a, b, c]) = three().await;
    let room = room_of(&a, &b, &c).await;
    c.meddle(|request, next| async move {
        if request.uri().path().contains("im.isthmus.hub") {
            let error = json!({ "errcode": "M_UNRECOGNIZED", "error": "there is no such endpoint" });
            return (StatusCode::NOT_FOUND, axum::Json(error)).into_response();
        }
        next.run(request).await
    });
    let refused = hand_over(&a, &room, "bot", &b).await.unwrap_err();
    assert!(refused.to_string().contains("c.example") && !refused.to_string().contains("b.example"), "{refused}");
    assert_eq!(hub_at(&a, &room).await, "a.example");
    // It cannot be made the hub by anybody's will.
    assert!(a.lm.hand_over(&room, &a.user("bot"), &c.name, true).await.is_err());
    let given = a.lm.hand_over(&room, &a.user("bot"), &b.name, true).await.unwrap();
    assert_eq!(given.unaware, ["c.example"]);
    wait_for_hub(&b, &room, &b).await;
}

/// An `m.room.hub` on the end of a log, signed by these servers.
pub(super) fn hub_event(room: &RoomId, log: &[Appended], draft: &Draft, by: &Node, also: &[&Node]) -> Pdu {
    let of = |kind: &str, key: &str| {
        let found =
            log.iter().rev().find(|event| event.event.kind == kind && event.event.state_key.as_deref() == Some(key));
        found.unwrap().event.event_id.clone()
    };
    let auth_events =
        vec![of("m.room.create", ""), of("m.room.power_levels", ""), of("m.room.member", draft.sender.as_str())];
    let completion = Completion { auth_events, prev_event: Some(log.last().unwrap().event.event_id.clone()) };
    let template = json!({
        "type": draft.kind, "room_id": room, "sender": draft.sender, "state_key": "", "content": draft.content,
        "origin_server_ts": draft.origin_server_ts,
    });
    let template = template.as_object().unwrap().clone();
    let mut pdu = Pdu::build(template, completion, &by.name, &by.context.signing_key).unwrap();
    for node in also {
        pdu.countersign(&node.name, &node.context.signing_key);
    }
    pdu
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forged_change_of_the_hub_changes_nothing() {
    let (_world, [a, b, c]) = three().await;
    let room = room_of(&a, &b, &c).await;
    let log = one_log(&[&a, &b, &c], &room, 0).await;
    assert!(log.is_empty());
    let log = a.log(&room).await;
    let to_b =
        |sender: &Node, user: &str| draft(&sender.user(user), "m.room.hub", Some(""), json!({ "hub_server": b.name }));
    let give = async |to: &Node, from: &Node, event: &Object| -> Received {
        to.lm.receive(&from.name, vec![raw(event)]).await.pop().unwrap()
    };
    // A participant asks the hub for it.
    let lpdu = c.lpdu(&room, &a.name, &to_b(&c, "carol"));
    let failed = c.transact(&a, "lpdu", &[Value::Object(lpdu.json.clone())]).await.unwrap();
    assert!(failed["failed_pdus"][lpdu.lpdu_id.as_str()].is_object(), "{failed:?}");
    let with_level =
        b.lpdu(&room, &a.name, &draft(&b.user("bob"), "m.room.hub", Some(""), json!({ "hub_server": b.name })));
    let failed = b.transact(&a, "lpdu", &[Value::Object(with_level.json.clone())]).await.unwrap();
    let why = failed["failed_pdus"][with_level.lpdu_id.as_str()]["error"].as_str().unwrap().to_owned();
    assert!(why.contains("hub.1"), "{why}");
    // A participant says that it is so: with its own signature, the next hub's, whoever's.
    let own = hub_event(&room, &log, &to_b(&b, "bob"), &b, &[&b, &c]);
    assert!(give(&c, &b, &own.json).await.result.is_err());
    assert!(give(&a, &b, &own.json).await.result.is_err());
    // The hub says so without the other's word, or with a third server's.
    for also in [&[][..], &[&c]] {
        let forged = hub_event(&room, &log, &to_b(&a, "bot"), &a, also);
        let refused = give(&c, &a, &forged.json).await.result.unwrap_err();
        assert!(matches!(&refused, Refusal::BadSignature { entity, .. } if entity == "b.example"), "{refused}");
    }
    // The next hub alone has signed what the hub never did.
    let mut half = hub_event(&room, &log, &to_b(&a, "bot"), &a, &[&b]);
    half.json["signatures"].as_object_mut().unwrap().remove("a.example");
    assert!(give(&c, &b, &half.json).await.result.is_err());
    for node in [&a, &b, &c] {
        assert_eq!((hub_at(node, &room).await, transfers(&node.log(&room).await)), ("a.example".to_owned(), 0));
    }
    // With both it would have been one, so it was not for anything else.
    let right = hub_event(&room, &log, &to_b(&a, "bot"), &a, &[&b]);
    assert_eq!(give(&c, &a, &right.json).await.result, Ok(()));
    assert_eq!(hub_at(&c, &room).await, "b.example");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_it_the_old_hub_puts_nothing_into_the_log_any_more() {
    let (_world, [a, b, c]) = three().await;
    let room = room_of(&a, &b, &c).await;
    hand_over(&a, &room, "bot", &b).await.unwrap();
    wait_for_hub(&c, &room, &b).await;
    wait_for_hub(&b, &room, &b).await;
    let log = a.log(&room).await;
    let mut late = message(&a.user("bot"), "late");
    late.state_key = Some(String::new());
    let event = hub_event(&room, &log, &late, &a, &[]);
    for node in [&b, &c] {
        let refused = node.lm.receive(&a.name, vec![raw(&event.json)]).await.pop().unwrap().result;
        assert!(refused.is_err(), "{} took it", node.name);
    }
    // The event that handed it over is no news, and no fault.
    let known = log.last().unwrap().event.json.clone();
    for node in [&b, &c] {
        assert_eq!(node.lm.receive(&a.name, vec![raw(&known)]).await.pop().unwrap().result, Ok(()));
    }
    // A server is asked in nobody's name but the hub's.
    let body = json!({ "event": event.json }).as_object().unwrap().clone();
    let uri = "/_matrix/federation/unstable/im.isthmus.hub/hub/x";
    let answer = a.context.client.call(&c.name, Call::post(uri, body), false).await;
    assert!(matches!(&answer, Err(RemoteError::Status { errcode, .. }) if errcode == "M_WRONG_SERVER"), "{answer:?}");
    let ready = a.get(&c, &format!("/_matrix/federation/unstable/im.isthmus.hub/ready/{room}")).await.unwrap();
    assert_eq!(ready["hub_server"], "b.example");
}
