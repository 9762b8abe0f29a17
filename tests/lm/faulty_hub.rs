//! Hubs whose store is older than what they have said, whose pages are worth nothing, and that disagree with themselves.

use axum::Json;
use axum::response::IntoResponse as _;
use isthmus::event::{Completion, Object, Pdu, RoomVersion};
use isthmus::refusal::Refusal;
use serde_json::{Value, json};

use super::hostile_hub::finished;
use super::http::ask;
use super::world::{World, bodies, ids, member};

async fn object(response: axum::response::Response) -> Object {
    let bytes = axum::body::to_bytes(response.into_body(), 1 << 24).await.unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_37_inv_1_a_hub_that_comes_back_with_a_shorter_log_is_found_out_and_nothing_is_taken_back() {
    let (world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    hub.say(&room, "bot", "before").await;
    part.wait_for_body(&room, "before").await;
    world.back_up(&hub).await;
    for number in 0..3 {
        hub.say(&room, "bot", &format!("forgotten {number}")).await;
    }
    let known = part.wait_for_body(&room, "forgotten 2").await;
    let hub = world.roll_back(hub).await;
    assert_eq!(bodies(&hub.log(&room).await), ["before"]);
    hub.say(&room, "bot", "another").await;
    part.say(&room, "alice", "and I").await;
    hub.wait_for_body(&room, "and I").await;
    part.wait_for_body(&room, "another").await;
    let log = part.wait_for_body(&room, "and I").await;
    assert_eq!(ids(&log[..known.len()]), ids(&known), "what is written stays where it is");
    assert_eq!(bodies(&log)[1..4], ["forgotten 0", "forgotten 1", "forgotten 2"]);
    let complaints = part.lm.room(&room).await.unwrap().unwrap().complaints;
    assert!(complaints.iter().any(|said| said.contains("not the end of the log")), "{complaints:?}");
    assert!(part.fault_kinds(&room).await.contains(&"forked".to_owned()));
}

/// What a template says of the version is worth nothing: the room's first event says it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_40_a_room_has_the_version_of_its_first_event_whatever_a_template_says() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    let alice = part.user("alice");
    let mut create = hub.log(&room).await[0].event.json.clone();
    create.insert("content".to_owned(), json!({ "room_version": "11" }));
    let completion = Completion { auth_events: Vec::new(), prev_event: None };
    let create = Pdu::build(create, completion, &hub.name, &hub.context.signing_key).unwrap().json;
    hub.meddle(move |request, next| {
        let create = create.clone();
        async move {
            let path = request.uri().path().to_owned();
            let response = next.run(request).await;
            if path.contains("/make_join/") {
                let mut made = object(response).await;
                made.insert("room_version".to_owned(), json!("I.1"));
                return Json(made).into_response();
            }
            if path.contains("/send_join/") {
                let mut joined = object(response).await;
                joined["state"][0] = Value::Object(create);
                return Json(joined).into_response();
            }
            response
        }
    });
    let via = std::slice::from_ref(&hub.name);
    let refused = part.lm.join(&room, &alice, via, Object::new()).await;
    assert!(matches!(refused, Err(Refusal::IncompatibleRoomVersion(_))), "{refused:?}");
    assert!(part.lm.room(&room).await.unwrap().is_none());
    hub.meddle(|request, next| async move {
        let is_make = request.uri().path().contains("/make_join/");
        let response = next.run(request).await;
        if !is_make {
            return response;
        }
        let mut made = object(response).await;
        made.insert("room_version".to_owned(), json!("I.1"));
        Json(made).into_response()
    });
    part.join(&room, "alice", &hub).await;
    assert_eq!(part.lm.room(&room).await.unwrap().unwrap().version, RoomVersion::Lm02);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_55_a_page_full_of_what_is_not_taken_ends_no_gap() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    let (after, log) = (hub.log(&room).await.len(), hub.log(&room).await);
    part.wait(&room, "all", |at_part| {
        at_part.last().map(|last| &last.event.event_id) == log.last().map(|last| &last.event.event_id)
    })
    .await;
    // It is not sent to, and then asks for what is between.
    part.meddle(|request, next| async move {
        match request.uri().path().contains("/send/") {
            true => http::StatusCode::SERVICE_UNAVAILABLE.into_response(),
            false => next.run(request).await,
        }
    });
    for number in 0..250 {
        hub.say(&room, "bot", &number.to_string()).await;
    }
    let all = hub.log(&room).await;
    let bad: std::collections::BTreeSet<String> =
        ids(&all[after + 100..after + 200]).into_iter().map(|id| id.to_string()).collect();
    hub.meddle(move |request, next| {
        let bad = bad.clone();
        async move {
            let reads = ["/backfill/", "/event/"].iter().any(|read| request.uri().path().contains(read));
            let response = next.run(request).await;
            if !reads || !response.status().is_success() {
                return response;
            }
            let mut answer = object(response).await;
            for event in answer.get_mut("pdus").and_then(Value::as_array_mut).into_iter().flatten() {
                let id = format!(
                    "${}",
                    isthmus::event::reference_hash(event.as_object().unwrap(), isthmus::event::Redaction::Draft)
                );
                if bad.contains(&id) {
                    // The ID does not cover it, so the page is still a chain.
                    event["signatures"]["hub.example"] = json!({ "ed25519:1": "AAAA" });
                }
            }
            Json(answer).into_response()
        }
    });
    part.meddle(|request, next| next.run(request));
    hub.context.outbound.retry(&part.name);
    hub.say(&room, "bot", "last").await;
    let log = part.wait_for_body(&room, "last").await;
    let said = bodies(&log);
    for number in (0..100).chain(200..250) {
        assert!(said.contains(&number.to_string()), "{number} is missing");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_24_of_a_malformed_stripped_state_of_an_invite_is_kept_what_can_be() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("invite").await;
    let log = hub.log(&room).await;
    for (number, stripped) in [
        json!([1, null, "x", [], { "type": "m.room.name", "content": 1 }, { "type": "m.room.create" }]),
        json!({ "type": "m.room.create" }),
        Value::Null,
        json!(vec![json!({ "type": "x".repeat(100) }); 5_000]),
    ]
    .into_iter()
    .enumerate()
    {
        let invite = member(&hub.user("bot"), &part.user(&format!("u{number}")), "invite");
        let event = finished(&hub, &room, &log, &invite, &["m.room.create", "m.room.power_levels"]).json;
        let version = "org.matrix.i-d.ralston-mimi-linearized-matrix.02";
        let body = json!({ "event": event, "room_version": version, "invite_room_state": stripped });
        let signed = part.lm.invited(&hub.name, body.as_object().unwrap().clone()).await.unwrap();
        assert!(signed["signatures"].get("part.example").is_some());
    }
    let invites = part.watcher.invites.lock().unwrap();
    let kept: Vec<usize> = invites.iter().map(|invite| invite.stripped_state.len()).collect();
    assert_eq!(kept[..3], [2, 0, 0]);
    assert!(kept[3] < 1_000, "{} are kept", kept[3]);
}

/// Nobody without a signature has anything fetched by a clever name.
#[tokio::test]
async fn hc_59_there_are_no_open_media() {
    let (_world, [hub]) = World::new(["hub.example"]).await;
    for uri in [
        "/_matrix/media/v3/download/hub.example/..%2F..%2Fetc%2Fpasswd",
        "/_matrix/media/v3/thumbnail/hub.example/x?width=1&height=1",
        "/_matrix/media/v3/preview_url?url=http%3A%2F%2F169.254.169.254%2F",
        "/_matrix/client/v1/media/download/hub.example/x",
    ] {
        let (status, answer) = ask(&hub, &http::Method::GET, uri, None, None).await;
        assert_eq!((status, answer["errcode"].as_str()), (404, Some("M_UNRECOGNIZED")), "{uri}");
    }
    for uri in ["download/x", "thumbnail/x?width=1&height=1", "download/..%2F..%2Fetc%2Fpasswd"] {
        let uri = format!("/_matrix/federation/v1/media/{uri}");
        let (status, answer) = ask(&hub, &http::Method::GET, &uri, None, None).await;
        assert_eq!((status, answer["errcode"].as_str()), (401, Some("M_FORBIDDEN")), "{uri}");
    }
}
