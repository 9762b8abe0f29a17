//! Rooms that LM servers and graph servers share: as portals that are one room, and as the far room of a portal.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use isthmus::bridge::{Cause, NewPortal, PortalKind, PortalState};
use isthmus::event::{Object, RoomVersion};
use isthmus::identity::Side;
use isthmus::lm::{NewRoom, Role};
use ruma::{OwnedRoomId, RoomId};
use serde_json::{Value, json};

use super::world::{LM, Node, World, draft, ghost, so};
use crate::dag::NOW;
use crate::lm::log_hub::{Manners, respond};

async fn hears(node: &Node, room: &RoomId, by: &str, body: &str) -> bool {
    node.bodies(room).await.contains(&(by.to_owned(), body.to_owned()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shared_room_is_made_used_and_ended_like_a_portal() {
    let (world, gateway) = World::new(json!({})).await;
    let text = |text: &str| Some(text.to_owned());
    let new = NewPortal { name: text("Tea"), alias: text("tea"), join_rule: text("public"), ..NewPortal::default() };
    let portal = gateway.bridge.shared_room(new).await.unwrap();
    assert_eq!((portal.kind, &portal.matrix_room_id), (PortalKind::Shared, &portal.lm_room_id));
    let (room, id) = (&portal.lm_room_id, &portal.portal_id);
    assert_eq!(gateway.node.state(room, "m.room.name", "").await.unwrap()["name"], "Tea");

    // Another server takes part, as what it is: its keys do not say that it does LM alone.
    world.lm_join(room, "bob").await.unwrap();
    let role = world.server.lm.room(room).await.unwrap().unwrap().role;
    assert!(matches!(role, Role::GraphServer { .. }), "{role:?}");
    let (bob, bot) = (world.lm_user("bob"), gateway.bot());
    world.lm_say(room, "bob", "hello").await;
    so("bob is heard", || hears(&gateway.node, room, bob.as_str(), "hello")).await;
    let (one, other) = gateway.bridge.announce(id, "welcome").await.unwrap();
    assert_eq!(one, other);
    so("bob hears", || hears(&world.server, room, bot.as_str(), "welcome")).await;
    gateway.bridge.set_power(id, &bob, 60).await.unwrap();
    gateway.bridge.invite(id, &world.lm_user("carol")).await.unwrap();
    let levels = gateway.node.state(room, "m.room.power_levels", "").await.unwrap();
    assert_eq!(levels["users"][bob.as_str()], 60);
    assert_eq!(gateway.node.membership(room, world.lm_user("carol").as_str()).await, "invite");

    let log = gateway.node.log(room).await;
    let hello = log.iter().find(|event| event.event.content().get("body") == Some(&json!("hello"))).unwrap();
    let found = gateway.bridge.explain(&hello.event.event_id).await.unwrap().unwrap();
    assert_eq!((found.status, found.side, found.portal_id.as_ref()), ("shared", "lm", Some(id)));

    // Nobody has a ghost, nothing waits to cross, and the log has what the graph has.
    let health = gateway.bridge.health(id).await.unwrap();
    assert_eq!((health.members.matrix, health.members.lm), (vec![bob.clone()], vec![]));
    assert!(health.waiting.iter().all(|waiting| waiting.count == 0));
    assert_eq!(gateway.bridge.out_of_step(id).await.unwrap(), 0);
    let senders = gateway.node.log(room).await.into_iter().map(|appended| appended.event.sender.clone());
    assert!(senders.into_iter().all(|sender| sender == bob || sender == bot));

    let gateway = world.kill(gateway).await;
    world.lm_say(room, "bob", "still here?").await;
    so("bob is heard again", || hears(&gateway.node, room, bob.as_str(), "still here?")).await;
    let ended = gateway.bridge.remove_portal(id, "for the test").await.unwrap();
    assert_eq!(ended.state, PortalState::Ended);
    assert_eq!(gateway.node.membership(room, bot.as_str()).await, "leave");
    so("the bot has left at bob's", || async { world.server.membership(room, bot.as_str()).await == "leave" }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_corrected_is_in_the_portals_health_and_what_need_not_be_is_in_step() {
    let (world, gateway) = World::new(json!({})).await;
    world.stop_clock();
    let new = NewPortal { join_rule: Some("public".to_owned()), ..NewPortal::default() };
    let portal = gateway.bridge.shared_room(new).await.unwrap();
    let (room, id) = (&portal.lm_room_id, &portal.portal_id);
    let alice = world.matrix_user("alice");
    gateway.bridge.set_power(id, &alice, 60).await.unwrap();
    let base = world.matrix_join(&gateway, room, &alice).await.unwrap();
    // All at once, and each older than the one before, so that the first stays what the room has.
    let say = async |kind: &str, key: &str, age: i64, content| {
        let mut event = base.next(&alice, kind, Some(key), content);
        event["origin_server_ts"] = json!(NOW - age);
        let (_, event) = world.peer.sign(base.version, event);
        assert_eq!(world.peer.put(&gateway.dag, &[&event]).await[0].result, Ok(()));
    };
    for age in 0..2 {
        let name = json!({ "membership": "join", "displayname": format!("Alice {age}") });
        say("m.room.member", alice.as_str(), age, name).await;
    }
    let is = gateway.dag.state_event(room, "m.room.member", alice.as_str()).await.unwrap().unwrap();
    let in_log = gateway.node.state(room, "m.room.member", alice.as_str()).await.unwrap();
    assert_eq!((&is.content["displayname"], &in_log["displayname"]), (&json!("Alice 0"), &json!("Alice 1")));
    // Nobody but alice says what she calls herself.
    assert_eq!(gateway.bridge.out_of_step(id).await.unwrap(), 0);
    assert_eq!(gateway.bridge.health(id).await.unwrap().uncorrected, []);
    assert_eq!(gateway.dag.rooms_uncorrected(), (0, 0));

    for age in 0..5 {
        say("m.room.topic", "", age, json!({ "topic": age })).await;
    }
    let uncorrected = gateway.bridge.health(id).await.unwrap().uncorrected;
    assert_eq!(uncorrected.len(), 1, "{uncorrected:?}");
    assert_eq!((&*uncorrected[0].kind, &*uncorrected[0].state_key), ("m.room.topic", ""));
    assert!(uncorrected[0].reason.contains("times in a minute"), "{uncorrected:?}");
    assert_eq!(serde_json::to_value(&uncorrected).unwrap()[0]["type"], "m.room.topic");
    assert_eq!(gateway.bridge.out_of_step(id).await.unwrap(), 1);
    assert_eq!(gateway.dag.rooms_uncorrected(), (1, 1));
    world.advance(61_000);
    gateway.bridge.announce(id, "later").await.unwrap();
    assert_eq!(gateway.bridge.health(id).await.unwrap().uncorrected, []);
    assert_eq!((gateway.bridge.out_of_step(id).await.unwrap(), gateway.dag.rooms_uncorrected()), (0, (0, 0)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn to_a_participant_what_a_graph_makes_of_a_log_is_no_fault_of_the_hub() {
    let (world, gateway) = World::new(json!({})).await;
    let (manners, loses) =
        (Manners::new(&world.server.context, &world.server.lm, true), Arc::new(AtomicBool::new(false)));
    let lose = loses.clone();
    *world.server.meddler.lock().unwrap() = Some(Arc::new(move |request, next| {
        let manners = manners.clone();
        // As if it was taken, and is not.
        let lost = request.uri().path().contains("/send/") && lose.swap(false, Ordering::SeqCst);
        Box::pin(async move {
            match lost {
                true => respond(http::StatusCode::OK, json!({ "failed_pdus": {} })),
                false => manners.answer(request, next).await,
            }
        })
    }));
    let new = NewPortal { join_rule: Some("public".to_owned()), ..NewPortal::default() };
    let portal = gateway.bridge.shared_room(new).await.unwrap();
    let (room, server) = (&portal.lm_room_id, &world.server);
    world.lm_join(room, "bob").await.unwrap();
    assert!(matches!(server.lm.room(room).await.unwrap().unwrap().role, Role::Participant { .. }));
    let (alice, dora) = (world.matrix_user("alice"), world.matrix_user("dora"));
    world.matrix_join(&gateway, room, &dora).await.unwrap();
    let base = world.matrix_join(&gateway, room, &alice).await.unwrap();
    let put = async |event: &Object| assert_eq!(world.peer.put(&gateway.dag, &[event]).await[0].result, Ok(()));
    let heard = async |body: &str| so(body, || hears(server, room, alice.as_str(), body)).await;

    // What is said at once both follows the same.
    for body in ["one", "two"] {
        let (_, event) = base.clone().say(&world.peer, &alice, body);
        put(&event).await;
        heard(body).await;
    }
    // An event that the hub does not take, and one of its server that names it.
    let bot = gateway.bot();
    let kick = draft(&bot, "m.room.member", Some(dora.as_str()), json!({ "membership": "leave" }));
    let kick = isthmus::seam::Outgoing { draft: kick, effect: None };
    gateway.dag.send(room, vec![kick]).await.pop().unwrap().unwrap();
    let after_unknown = async |body: &str| {
        let mut view = base.clone();
        let (unknown, event) = view.say(&world.peer, &dora, body);
        put(&event).await;
        assert!(gateway.dag.event(&unknown).await.unwrap().is_none());
        let (_, event) = view.say(&world.peer, &alice, body);
        put(&event).await;
    };
    after_unknown("three").await;
    heard("three").await;
    // What is lost is found all the same, where it stands.
    loses.store(true, Ordering::SeqCst);
    gateway.bridge.announce(&portal.portal_id, "lost").await.unwrap();
    so("it to be lost", || async { !loses.load(Ordering::SeqCst) }).await;
    after_unknown("four").await;
    heard("four").await;

    let ids = |log: Vec<isthmus::lm::Appended>| -> Vec<_> {
        log.into_iter().rev().take(6).map(|appended| appended.event.event_id.clone()).collect()
    };
    assert_eq!(ids(server.log(room).await), ids(gateway.node.log(room).await));
    assert_eq!(server.lm.room(room).await.unwrap().unwrap().complaints, Vec::<String>::new());
    let missing = isthmus::store::lm::missing(&server.context.store, Some(room)).await.unwrap();
    assert_eq!(missing.count, 0);
}

/// A shared room of the LM server.
async fn shared_elsewhere(world: &World) -> OwnedRoomId {
    let creator = world.lm_user("hubert");
    let state = |kind: &str, content| draft(&creator, kind, Some(""), content);
    let initial_state = vec![
        state("m.room.power_levels", json!({ "users": { creator.as_str(): 100 } })),
        state("m.room.join_rules", json!({ "join_rule": "public" })),
        state("m.room.name", json!({ "name": "Tea" })),
    ];
    let room = NewRoom { creator, version: RoomVersion::Lm02, initial_state };
    world.server.lm.create_shared(room).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_portal_of_a_shared_room_elsewhere_carries_as_a_graph_server() {
    let (world, gateway) = World::new(json!({})).await;
    let room = shared_elsewhere(&world).await;
    let portal = gateway.bridge.portal_from_lm(&room, &[LM.try_into().unwrap()], None, Cause::Admin).await.unwrap();
    let role = gateway.node.lm.room(&room).await.unwrap().unwrap().role;
    assert!(matches!(role, Role::GraphServer { .. }), "{role:?}");
    let matrix = &portal.matrix_room_id;
    assert_eq!(gateway.matrix_state(matrix, "m.room.name").await.unwrap()["name"], "Tea");

    let alice = world.matrix_user("alice");
    let mut view = world.matrix_join(&gateway, matrix, &alice).await.unwrap();
    let alices = ghost(Side::Matrix, "alice");
    so("alice is in", || async { world.server.membership(&room, &alices).await == "join" }).await;
    world.matrix_say(&gateway, &mut view, &alice, "hello").await;
    so("alice is heard", || hears(&world.server, &room, &alices, "hello")).await;
    world.lm_say(&room, "hubert", "hi").await;
    let hubert = (ghost(Side::Lm, "hubert"), "hi".to_owned());
    so("hubert is heard", || async { gateway.matrix_bodies(matrix).await.contains(&hubert) }).await;
    let said: Vec<_> = gateway.matrix_bodies(matrix).await;
    assert_eq!(said.iter().filter(|(_, body)| body == "hello").count(), 1, "{said:?}");
    so("all is in step", || gateway.in_step(&portal)).await;

    let gateway = world.kill(gateway).await;
    world.lm_say(&room, "hubert", "again").await;
    let again = (ghost(Side::Lm, "hubert"), "again".to_owned());
    so("hubert is heard again", || async { gateway.matrix_bodies(matrix).await.contains(&again) }).await;
    world.refresh(&gateway, &mut view).await;
    world.matrix_say(&gateway, &mut view, &alice, "good night").await;
    so("alice is heard again", || hears(&world.server, &room, &alices, "good night")).await;
    so("all is in step", || gateway.in_step(&portal)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_ghost_does_in_a_shared_room_every_server_is_told_by_its_protocol() {
    let (world, gateway) = World::new(json!({})).await;
    let room = shared_elsewhere(&world).await;
    let portal = gateway.bridge.portal_from_lm(&room, &[LM.try_into().unwrap()], None, Cause::Admin).await.unwrap();
    let alice = world.matrix_user("alice");
    world.matrix_join(&gateway, &portal.matrix_room_id, &alice).await.unwrap();
    let alices = ghost(Side::Matrix, "alice");
    so("alice is in", || async { world.server.membership(&room, &alices).await == "join" }).await;
    // Two more servers are in the LM room: one knows its graph alone, the other its log.
    let (graph, other) = (&world.peer, world.other_server().await);
    let paul = graph.user("paul");
    World::join_at(graph, &world.server.dag, &room, &paul).await.unwrap();
    let manners = Manners::new(&other.context, &other.lm, true);
    let heard: Arc<std::sync::Mutex<Vec<(String, Value)>>> = Arc::default();
    let hears = heard.clone();
    *other.meddler.lock().unwrap() = Some(Arc::new(move |request, next| {
        let (manners, hears) = (manners.clone(), hears.clone());
        Box::pin(async move {
            let (parts, body) = request.into_parts();
            let body = axum::body::to_bytes(body, 1 << 20).await.unwrap();
            let edus: Value = serde_json::from_slice(&body).unwrap_or_default();
            let edus = edus["edus"].as_array().cloned().unwrap_or_default();
            hears.lock().unwrap().extend(edus.into_iter().map(|edu| (parts.uri.path().to_owned(), edu)));
            manners.answer(axum::extract::Request::from_parts(parts, body.into()), next).await
        })
    }));
    let carol = ruma::UserId::parse("@carol:other.example").unwrap();
    other.lm.join(&room, &carol, &[LM.try_into().unwrap()], Object::new()).await.unwrap();
    for user in [&paul, &carol] {
        so("all are in", || async { gateway.node.membership(&room, user.as_str()).await == "join" }).await;
    }
    let is_typing = |edu: &Value| {
        let (content, kind) = (&edu["content"], edu["edu_type"].as_str().or(edu["type"].as_str()));
        kind == Some("m.typing") && content["room_id"] == room.as_str() && content["user_id"] == alices.as_str()
    };
    let typing = json!({ "edu_type": "m.typing",
        "content": { "room_id": portal.matrix_room_id, "user_id": alice, "typing": true } });
    let options = isthmus::federation::ClientOptions {
        allow_private_networks: true,
        resolve: world.resolve(),
        ..Default::default()
    };
    let client = isthmus::federation::Client::new(graph.name.clone(), graph.key.clone(), options).unwrap();
    let body = super::world::object(json!({ "pdus": [], "edus": [typing] }));
    let call = isthmus::federation::Call::put("/_matrix/federation/v1/send/edu".to_owned(), body);
    client.call(&ruma::ServerName::parse(crate::dag::OWN).unwrap(), call, false).await.unwrap();
    so("the graph server to hear it", || async { graph.memory.edus.lock().unwrap().iter().any(is_typing) }).await;
    so("the LM server to hear it", || async {
        heard.lock().unwrap().iter().any(|(path, edu)| is_typing(edu) && !path.contains("/federation/v1/"))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shared_room_elsewhere_gets_a_portal_again_after_its_portal_has_ended() {
    let (world, gateway) = World::new(json!({})).await;
    let room = shared_elsewhere(&world).await;
    let via = [LM.try_into().unwrap()];
    let make = || gateway.bridge.portal_from_lm(&room, &via, None, Cause::Admin);
    let first = make().await.unwrap();
    gateway.bridge.remove_portal(&first.portal_id, "for the test").await.unwrap();
    let bot = gateway.bot();
    so("the bot has left", || async { world.server.membership(&room, bot.as_str()).await == "leave" }).await;
    world.lm_say(&room, "hubert", "while you were out").await;
    let second = make().await.unwrap();
    assert_ne!((&second.portal_id, &second.matrix_room_id), (&first.portal_id, &first.matrix_room_id));
    world.lm_say(&room, "hubert", "welcome back").await;
    let back = (ghost(Side::Lm, "hubert"), "welcome back".to_owned());
    so("hubert is heard", || async { gateway.matrix_bodies(&second.matrix_room_id).await.contains(&back) }).await;
    assert!(gateway.bridge.portal_from_lm(&second.matrix_room_id, &via, None, Cause::Admin).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_8_a_shared_room_that_is_encrypted_has_no_portal() {
    let (world, gateway) = World::new(json!({})).await;
    let room = shared_elsewhere(&world).await;
    let via = [LM.try_into().unwrap()];
    let make = || gateway.bridge.portal_from_lm(&room, &via, None, Cause::Admin);
    let portal = make().await.unwrap();
    let content = json!({ "algorithm": "m.megolm.v1.aes-sha2" });
    world.lm_send(&room, draft(&world.lm_user("hubert"), "m.room.encryption", Some(""), content)).await;
    let ended = async || gateway.bridge.portal(&portal.portal_id).await.unwrap().unwrap();
    so("the portal ends", || async { ended().await.state == PortalState::Ended }).await;
    assert!(
        ended().await.reason.as_ref().unwrap().contains("was encrypted: m.megolm.v1"),
        "{:?}",
        ended().await.reason
    );
    let refusal = make().await.unwrap_err();
    assert_eq!(refusal.code(), "encryption", "{refusal}");
}
