//! Memberships between three servers: invites of participants, what the invited server says of them, and what a server may read when
//! its last user is gone.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use axum::Json;
use axum::response::IntoResponse as _;
use http::{Method, StatusCode};
use isthmus::event::Object;
use isthmus::federation::Call;
use isthmus::lm::{Position, Sent};
use isthmus::refusal::Refusal;
use isthmus::seam::Outgoing;
use isthmus::store::lm::next_tell;
use ruma::{OwnedRoomId, OwnedUserId, RoomId};
use serde_json::{Value, json};

use super::http::{Answered, ask_signed};
use super::world::{Node, World, bodies, ids, member, message};

const V2: &str = "/_matrix/federation/v2";

/// The log does not tell a server of who is taken out before they were in: the hub does so once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_was_invited_or_has_knocked_and_is_turned_away_has_their_server_told() {
    let (_world, [hub, out]) = World::new(["hub.example", "out.example"]).await;
    let room = hub.create_room("knock").await;
    let (bot, dave, erin) = (hub.user("bot"), out.user("dave"), out.user("erin"));
    let (told, mut news) = tokio::sync::mpsc::unbounded_channel();
    out.meddle(move |request, next| {
        let told = told.clone();
        async move {
            let is_send = request.uri().path().contains("/send/");
            let (parts, body) = request.into_parts();
            let body = axum::body::to_bytes(body, 1 << 20).await.unwrap();
            if is_send {
                told.send(serde_json::from_slice::<Value>(&body).unwrap()).unwrap();
            }
            next.run(axum::extract::Request::from_parts(parts, axum::body::Body::from(body))).await
        }
    });
    let invite = Outgoing { draft: member(&bot, &dave, "invite"), effect: None };
    hub.lm.invite(&room, invite).await.unwrap();
    out.lm.knock(&room, &erin, std::slice::from_ref(&hub.name), Object::new()).await.unwrap();
    for (user, membership) in [(&dave, "leave"), (&erin, "ban")] {
        let Sent::Appended(removal) = hub.send(&room, member(&bot, user, membership)).await.unwrap() else { panic!() };
        let told = tokio::time::timeout(std::time::Duration::from_secs(20), news.recv()).await.unwrap().unwrap();
        assert_eq!(told["pdus"], json!([removal.event.json]), "{user}");
    }
    // Of who leaves by themselves, and of who is banned and was never asked, nobody is told.
    let (frank, grace) = (out.user("frank"), out.user("grace"));
    out.lm.knock(&room, &frank, std::slice::from_ref(&hub.name), Object::new()).await.unwrap();
    out.lm.leave(&room, &frank, std::slice::from_ref(&hub.name)).await.unwrap();
    hub.send(&room, member(&bot, &grace, "ban")).await.unwrap();
    // Whoever is told next is the next who is turned away.
    let heidi = out.user("heidi");
    let invite = Outgoing { draft: member(&bot, &heidi, "invite"), effect: None };
    hub.lm.invite(&room, invite).await.unwrap();
    hub.send(&room, member(&bot, &heidi, "leave")).await.unwrap();
    let told = tokio::time::timeout(std::time::Duration::from_secs(20), news.recv()).await.unwrap().unwrap();
    assert_eq!(told["pdus"][0]["state_key"], json!(heidi), "{told}");
}

/// Who was away and speaks again need not wait until its turn comes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_outside_a_room_that_is_heard_of_again_is_told_what_it_has_missed() {
    let (world, [mut hub, out]) = World::new(["hub.example", "out.example"]).await;
    let room = hub.create_room("knock").await;
    let dave = out.user("dave");
    out.lm.knock(&room, &dave, std::slice::from_ref(&hub.name), Object::new()).await.unwrap();
    let (is_away, failed, told) =
        (Arc::new(AtomicBool::new(true)), Arc::new(AtomicI64::new(0)), Arc::new(AtomicI64::new(0)));
    let (away, fails, tells) = (is_away.clone(), failed.clone(), told.clone());
    out.meddle(move |request, next| {
        let is_send = request.uri().path().contains("/send/");
        let fail = is_send && away.load(Ordering::SeqCst);
        fails.fetch_add(i64::from(fail), Ordering::SeqCst);
        tells.fetch_add(i64::from(is_send && !fail), Ordering::SeqCst);
        async move { if fail { StatusCode::BAD_GATEWAY.into_response() } else { next.run(request).await } }
    });
    hub.send(&room, member(&hub.user("bot"), &dave, "leave")).await.unwrap();
    let pause = || tokio::time::sleep(Duration::from_millis(20));
    // It is tried at each start, and from the second failure on minutes lie between two tries.
    let mut before = 0;
    for start in 0..3 {
        let is_put_off = async || next_tell(&hub.context.store).await.unwrap().unwrap_or_default() > 0;
        while failed.load(Ordering::SeqCst) == before || !is_put_off().await {
            pause().await;
        }
        before = failed.load(Ordering::SeqCst);
        if start < 2 {
            hub = world.restart(hub).await;
        }
    }
    is_away.store(false, Ordering::SeqCst);
    let speaks = async {
        while told.load(Ordering::SeqCst) == 0 {
            let _ = out.get(&hub, "/_matrix/federation/v1/query/profile?user_id=@bot:hub.example").await;
            pause().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(120), speaks).await.expect("it is told");
}

/// A room of the hub in which `@alice` of the participant may invite, kick and ban.
async fn room_of_alice(hub: &Node, part: &Node) -> (OwnedRoomId, OwnedUserId) {
    let alice = part.user("alice");
    let levels = json!({ "users": { hub.user("bot"): 100, alice.clone(): 60 } });
    let room = hub.create_room_with("invite", levels).await;
    let draft = member(&hub.user("bot"), &alice, "invite");
    hub.lm.invite(&room, Outgoing { draft, effect: None }).await.unwrap();
    part.join(&room, "alice", hub).await;
    (room, alice)
}

async fn wait_for(node: &Node, room: &RoomId, user: &OwnedUserId, membership: &str) {
    node.wait(room, membership, |log| {
        let of_user = log.iter().rev().find(|event| event.event.state_key.as_deref() == Some(user.as_str()));
        of_user.is_some_and(|event| event.event.content()["membership"] == membership)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_invited_server_says_is_passed_on_as_it_is() {
    let (_world, [hub, part, third]) = World::new(["hub.example", "part.example", "third.example"]).await;
    let (room, alice) = room_of_alice(&hub, &part).await;
    let before = hub.log(&room).await.len();
    let carol = third.user("carol");
    let invite = async |number: usize| -> Answered {
        let mut draft = member(&alice, &carol, "invite");
        draft.origin_server_ts += i64::try_from(number).unwrap();
        let lpdu = part.lpdu(&room, &hub.name, &draft);
        let body = json!({ "event": lpdu.json, "room_version": "org.matrix.i-d.ralston-mimi-linearized-matrix.02" });
        let uri = format!("/_matrix/federation/v3/invite/{number}");
        ask_signed(&part, &hub, &Method::POST, &uri, Some(&body)).await
    };
    let cases = [
        (403, json!({ "errcode": "M_FORBIDDEN", "error": "no spam" }), (403, "M_FORBIDDEN")),
        (400, json!({ "errcode": "M_INCOMPATIBLE_ROOM_VERSION", "error": "x" }), (400, "M_INCOMPATIBLE_ROOM_VERSION")),
        (404, json!({ "errcode": "M_NOT_FOUND", "error": "who?" }), (404, "M_NOT_FOUND")),
        (418, json!({ "errcode": "EXAMPLE_TEAPOT", "error": "tea" }), (418, "EXAMPLE_TEAPOT")),
        (
            429,
            json!({ "errcode": "M_LIMIT_EXCEEDED", "error": "x", "retry_after_ms": 7000 }),
            (429, "M_LIMIT_EXCEEDED"),
        ),
        (500, json!({ "errcode": "M_UNKNOWN", "error": "oops", "more": "x".repeat(9000) }), (500, "M_UNKNOWN")),
        // Nothing that the participant could mistake for a word about its own request, nor what is no error of Matrix's.
        (401, json!({ "errcode": "M_FORBIDDEN", "error": "signature" }), (502, "M_UNKNOWN")),
        (404, json!({ "errcode": "M_UNRECOGNIZED", "error": "x" }), (502, "M_UNKNOWN")),
        (500, json!("no object"), (502, "M_UNKNOWN")),
    ];
    for (number, (status, body, expected)) in cases.into_iter().enumerate() {
        let shown = body.clone();
        third.meddle(move |request, next| {
            let body = body.clone();
            async move {
                match request.uri().path().contains("/invite/") {
                    true => (StatusCode::from_u16(status).unwrap(), Json(body)).into_response(),
                    false => next.run(request).await,
                }
            }
        });
        let (status, answer) = invite(number).await;
        assert_eq!((status, answer["errcode"].as_str().unwrap()), expected, "{shown}: {answer}");
        assert!(answer["error"].as_str().unwrap().contains("third.example"), "{answer}");
        assert_eq!(answer.get("retry_after_ms"), shown.get("retry_after_ms"));
        assert!(answer.to_string().len() < 2000);
    }
    assert_eq!(hub.log(&room).await.len(), before, "nothing was appended");
    // The rules come first: who may not invite has nobody asked.
    let draft = member(&part.user("mallory"), &carol, "invite");
    let version = "org.matrix.i-d.ralston-mimi-linearized-matrix.02";
    let body = json!({ "event": part.lpdu(&room, &hub.name, &draft).json, "room_version": version });
    let (status, answer) = ask_signed(&part, &hub, &Method::POST, "/_matrix/federation/v3/invite/x", Some(&body)).await;
    assert_eq!((status, answer["errcode"].as_str().unwrap()), (403, "M_FORBIDDEN"), "{answer}");

    // The participant that is refused does not try another way in.
    third.meddle(|request, next| async move {
        match request.uri().path().contains("/invite/") {
            true => {
                let body = json!({ "errcode": "M_INCOMPATIBLE_ROOM_VERSION", "error": "too new" });
                (StatusCode::BAD_REQUEST, Json(body)).into_response()
            }
            false => next.run(request).await,
        }
    });
    let refused = part.lm.invite(&room, Outgoing { draft: member(&alice, &carol, "invite"), effect: None }).await;
    assert!(matches!(refused, Err(Refusal::IncompatibleRoomVersion(_))), "{refused:?}");
    assert_eq!(hub.log(&room).await.len(), before);
}

/// Names of servers cost nothing: many that invite users of one that hangs wait for it so often and no more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_so_many_invites_wait_for_one_server_whoever_sends_them() {
    let names = ["hub.example", "part.example", "other.example", "third.example", "quick.example"];
    let (_world, [hub, part, other, third, quick]) = World::new(names).await;
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    other.join(&room, "alice", &hub).await;
    *third.watcher.before_signing.lock().unwrap() = Some(Box::new(|| Box::pin(std::future::pending())));
    let mut asking = tokio::task::JoinSet::new();
    for from in [&part, &other] {
        for number in 0..20 {
            let invite = member(&from.user("alice"), &third.user(&format!("user{number}")), "invite");
            let version = "org.matrix.i-d.ralston-mimi-linearized-matrix.02";
            let body = json!({ "event": from.lpdu(&room, &hub.name, &invite).json, "room_version": version });
            let call = Call::post(format!("/_matrix/federation/v3/invite/{number}"), body.as_object().unwrap().clone());
            let (client, to) = (from.context.client.clone(), hub.name.clone());
            asking.spawn(async move { client.call(&to, call, false).await });
        }
    }
    for _ in 0..10 {
        let refused = asking.join_next().await.unwrap().unwrap().unwrap_err().to_string();
        let why = ["M_LIMIT_EXCEEDED", "invites that wait for third.example"];
        assert!(why.iter().all(|why| refused.contains(why)), "{refused}");
    }
    // Nobody waits for who waits there.
    part.lm
        .invite(&room, Outgoing { draft: member(&part.user("alice"), &quick.user("quinn"), "invite"), effect: None })
        .await
        .unwrap();
    quick.join(&room, "quinn", &hub).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_participant_invites_kicks_bans_and_lets_in_again_users_of_a_third_server() {
    let (_world, [hub, part, third]) = World::new(["hub.example", "part.example", "third.example"]).await;
    let (room, alice) = room_of_alice(&hub, &part).await;
    let carol = third.user("carol");
    let via = std::slice::from_ref(&hub.name);
    // What says the same at the same time is the same LPDU, which is appended once.
    let clock = AtomicI64::new(0);
    let draft = |membership: &str| {
        let mut draft = member(&alice, &carol, membership);
        draft.origin_server_ts += clock.fetch_add(1, Ordering::SeqCst);
        draft
    };
    let invite = async || part.lm.invite(&room, Outgoing { draft: draft("invite"), effect: None }).await;
    let set = async |membership: &str| {
        part.send(&room, draft(membership)).await.unwrap();
        wait_for(&hub, &room, &carol, membership).await;
        wait_for(&part, &room, &carol, membership).await;
    };
    // Declined, asked again, accepted.
    let Ok(Sent::Queued { lpdu_id }) = invite().await else { panic!("a participant asks the hub") };
    wait_for(&part, &room, &carol, "invite").await;
    let at_hub = hub.lm.event_of_lpdu(&lpdu_id).await.unwrap().unwrap();
    let signers: BTreeSet<_> =
        at_hub.event.json["signatures"].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(signers, BTreeSet::from(["hub.example", "part.example", "third.example"]));
    third.lm.leave(&room, &carol, via).await.unwrap();
    wait_for(&part, &room, &carol, "leave").await;
    assert!(matches!(third.lm.join(&room, &carol, via, Object::new()).await, Err(Refusal::Forbidden(_))));
    invite().await.unwrap();
    third.join(&room, "carol", &hub).await;
    wait_for(&part, &room, &carol, "join").await;
    // Kicked, asked again, back.
    set("leave").await;
    wait_for(&third, &room, &carol, "leave").await;
    assert!(matches!(third.lm.join(&room, &carol, via, Object::new()).await, Err(Refusal::Forbidden(_))));
    invite().await.unwrap();
    third.join(&room, "carol", &hub).await;
    wait_for(&part, &room, &carol, "join").await;
    // Banned: no invite helps, until the ban is lifted.
    set("ban").await;
    wait_for(&third, &room, &carol, "ban").await;
    assert!(invite().await.is_err());
    assert!(matches!(third.lm.join(&room, &carol, via, Object::new()).await, Err(Refusal::Forbidden(_))));
    set("leave").await;
    invite().await.unwrap();
    third.join(&room, "carol", &hub).await;
    third.say(&room, "carol", "back again").await;
    assert_eq!(bodies(&part.wait_for_body(&room, "back again").await), ["back again"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_reads_a_room_up_to_what_ended_its_membership() {
    let (_world, [hub, part, third]) = World::new(["hub.example", "part.example", "third.example"]).await;
    let (room, alice) = room_of_alice(&hub, &part).await;
    let carol = third.user("carol");
    part.lm.invite(&room, Outgoing { draft: member(&alice, &carol, "invite"), effect: None }).await.unwrap();
    let get = async |uri: String| third.get(&hub, &uri).await.ok();
    // An invite gives no right to read.
    let head = hub.log(&room).await.pop().unwrap().event.event_id.clone();
    assert!(get(format!("{V2}/event/{head}")).await.is_none());
    third.join(&room, "carol", &hub).await;
    hub.say(&room, "bot", "before").await;
    third.wait_for_body(&room, "before").await;
    part.send(&room, member(&alice, &carol, "leave")).await.unwrap();
    wait_for(&hub, &room, &carol, "leave").await;
    let kick = hub.log(&room).await.pop().unwrap().event.event_id.clone();
    hub.say(&room, "bot", "after").await;
    let after = hub.log(&room).await.pop().unwrap().event.event_id.clone();
    let v1 = "/_matrix/federation/v1";
    let pdus = |answer: Option<Object>| Some(answer?["pdus"].as_array().unwrap().len());
    let until_kick = hub.log(&room).await.len() - 1;
    assert!(get(format!("{V2}/event/{kick}")).await.is_some());
    assert_eq!(pdus(get(format!("{V2}/backfill/{room}?v={kick}&limit=100")).await), Some(until_kick));
    assert!(get(format!("{v1}/state/{room}?event_id={kick}")).await.is_some());
    assert!(get(format!("{v1}/state_ids/{room}?event_id={kick}")).await.is_some());
    for uri in [
        format!("{V2}/event/{after}"),
        format!("{V2}/backfill/{room}?v={after}&limit=100"),
        format!("{v1}/state/{room}?event_id={after}"),
        format!("{v1}/state_ids/{room}?event_id={after}"),
    ] {
        let (status, answer): (u16, Value) = ask_signed(&third, &hub, &Method::GET, &uri, None).await;
        assert_eq!((status, answer["errcode"].as_str().unwrap()), (404, "M_NOT_FOUND"), "{uri}: {answer}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_join_that_comes_with_what_follows_it_before_it_is_answered_is_there_once() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let part = Arc::new(part);
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    part.lm.leave(&room, &part.user("alice"), &[]).await.unwrap();
    let left =
        |log: &[isthmus::lm::Appended]| log.last().unwrap().event.content().get("membership") == Some(&json!("leave"));
    for node in [&hub, &*part] {
        node.wait(&room, "the leave", left).await;
    }
    hub.say(&room, "bot", "while nobody listens").await;
    // The answer comes after what was said since.
    let (lm, bot, id, joining) = (hub.lm.clone(), hub.user("bot"), room.clone(), part.clone());
    hub.meddle(move |request, next| {
        let (lm, bot, id, joining) = (lm.clone(), bot.clone(), id.clone(), joining.clone());
        async move {
            let is_join = request.uri().path().contains("/send_join/");
            let response = next.run(request).await;
            if is_join {
                let welcome = Outgoing { draft: message(&bot, "welcome"), effect: None };
                lm.send(&id, vec![welcome]).await.pop().unwrap().unwrap();
                joining.wait_for_body(&id, "welcome").await;
            }
            response
        }
    });
    let joined = part.join(&room, "alice", &hub).await;
    part.say(&room, "alice", "thank you").await;
    hub.wait_for_body(&room, "thank you").await;
    let log = part.wait_for_body(&room, "thank you").await;
    assert_eq!(log.iter().filter(|one| one.event.event_id == joined.event.event_id).count(), 1);
    let at_hub = ids(&hub.log(&room).await);
    let place = at_hub.iter().position(|id| *id == joined.event.event_id).unwrap();
    assert!(ids(&log).ends_with(&at_hub[place..]), "{:?}", bodies(&log));
}

/// Each change of a name stands on the one before it, so that a chain gets as long as somebody's whims.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_auth_chain_is_whole_however_often_somebody_changed_their_name() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    let bot = hub.user("bot");
    for changes in 0..3 {
        let names = (0..400).map(|number| {
            let mut draft = member(&bot, &bot, "join");
            draft.content.insert("displayname".to_owned(), json!(format!("{changes} {number}")));
            Outgoing { draft, effect: None }
        });
        assert!(hub.lm.send(&room, names.collect()).await.iter().all(Result::is_ok));
    }
    part.join(&room, "alice", &hub).await;
    let mut log = Vec::new();
    while let Some(more) =
        Some(hub.lm.log(&room, Position(log.len() as i64), 1000).await.unwrap()).filter(|it| !it.is_empty())
    {
        log.extend(more);
    }
    let answer = hub.lm.get_state(&part.name, &room, None, true).await.unwrap();
    let named = |list: &str| -> BTreeSet<String> { serde_json::from_value(answer[list].clone()).unwrap() };
    let (mut expected, mut wanted) = (BTreeSet::new(), named("pdu_ids"));
    for event in log.iter().rev().filter(|event| event.event.state_key.is_some()) {
        if wanted.contains(event.event.event_id.as_str()) {
            for allows in &event.event.auth_events {
                wanted.insert(allows.to_string());
                expected.insert(allows.to_string());
            }
        }
    }
    assert!(expected.len() > 1_200);
    assert_eq!(named("auth_chain_ids"), expected);
}
