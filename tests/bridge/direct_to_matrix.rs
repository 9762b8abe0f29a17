//! Invites of ghosts into LM rooms that have no portal and are hubbed elsewhere: the Matrix user is invited at their homeserver, and the
//! ghost joins when they do.

use std::sync::Arc;

use isthmus::bridge::{Cause, PENDING_MS, Portal, PortalKind, PortalState};
use isthmus::clock::{Clock as _, SystemClock};
use isthmus::event::RoomVersion;
use isthmus::identity::Side;
use isthmus::refusal::Refusal;
use isthmus::seam::Outgoing;
use ruma::{OwnedEventId, OwnedUserId, RoomId, UserId};
use serde_json::json;

use super::from_lm::room;
use super::from_matrix::is_state;
use super::world::{DEAD, Gateway, LM, OTHER, World, draft, ghost, so, until};
use crate::dag::{NOW, OWN};
use crate::support::provider::{self, Options, Provider};

/// Hubert invites a user of the gateway into a room of his.
async fn invite(world: &World, room: &RoomId, target: &str) -> Result<(), Refusal> {
    let content = json!({ "membership": "invite", "is_direct": true });
    let draft = draft(&world.lm_user("hubert"), "m.room.member", Some(target), content);
    world.server.lm.invite(room, Outgoing { draft, effect: None }).await.map(drop)
}

async fn portal_of(gateway: &Gateway, room: &RoomId, state: PortalState) -> Arc<Portal> {
    until(&format!("a portal that is {state:?}"), || async {
        let mut portals = gateway.bridge.portals(None, 100).await.unwrap().into_iter();
        portals.find(|portal| portal.lm_room_id == room && portal.state == state)
    })
    .await
}

async fn in_graph(gateway: &Gateway, room: &RoomId, user: &str, membership: &str) {
    so(&format!("{user} to be {membership} in the graph"), || async {
        gateway.matrix_member(room, user).await.is_some_and(|content| content["membership"] == membership)
    })
    .await;
}

async fn in_log(world: &World, room: &RoomId, user: &str, membership: &str) {
    so(&format!("{user} to be {membership} in the log"), || async {
        world.server.membership(room, user).await == membership
    })
    .await;
}

/// The portal of a room into which alice's ghost is invited, when alice is invited at her homeserver.
async fn pending(gateway: &Gateway, room: &RoomId, alice: &UserId) -> Arc<Portal> {
    let portal = portal_of(gateway, room, PortalState::Pending).await;
    in_graph(gateway, &portal.matrix_room_id, alice.as_str(), "invite").await;
    portal
}

/// Alice leaves a room of the gateway's, through it.
async fn decline(world: &World, gateway: &Gateway, room: &RoomId, alice: &UserId) {
    let made = gateway.dag.make_leave(&world.peer.name, room, alice).await.unwrap();
    let version = RoomVersion::parse(made["room_version"].as_str().unwrap()).unwrap();
    let mut event = made["event"].clone();
    event["content"]["reason"] = json!("not now");
    let (id, event) = world.peer.sign(version, event);
    gateway.dag.send_leave(&world.peer.name, room, &id, event).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_lm_user_begins_a_direct_chat_with_a_matrix_user() {
    for version in [RoomVersion::V10, RoomVersion::V12] {
        let settings = json!({ "portals": { "matrix_room_version": version.as_str() } });
        let (world, gateway) = World::new(settings).await;
        world.peer.signs_invites(version);
        let (alice, alices_ghost) = (world.matrix_user("alice"), ghost(Side::Matrix, "alice"));
        let (hubert, huberts_ghost) = (world.lm_user("hubert"), ghost(Side::Lm, "hubert"));
        let lm = room(&world, "invite").await;
        invite(&world, &lm, &alices_ghost).await.unwrap();
        let portal = pending(&gateway, &lm, &alice).await;
        let matrix = &portal.matrix_room_id;
        assert_eq!(portal.kind, PortalKind::FromLm);
        // Alice sees who invites her, into what, and that it is a direct chat; the bot is nobody by whom the room is called.
        let member = gateway.dag.state_event(matrix, "m.room.member", alice.as_str()).await.unwrap().unwrap();
        assert_eq!((member.sender.as_str(), &member.content["is_direct"]), (huberts_ghost.as_str(), &json!(true)));
        assert_eq!(gateway.matrix_state(matrix, "m.room.name").await.unwrap()["name"], "Tea");
        let members = gateway.matrix_state(matrix, "io.element.functional_members").await.unwrap();
        assert_eq!(members["service_members"], json!([gateway.bot()]));
        assert_eq!(world.server.membership(&lm, &alices_ghost).await, "invite");
        // Nobody else comes in.
        let refusal = world.matrix_join(&gateway, matrix, &world.matrix_user("carol")).await.err().unwrap();
        assert_eq!(refusal.errcode(), "M_FORBIDDEN", "{refusal}");

        let mut view = world.matrix_join(&gateway, matrix, &alice).await.unwrap();
        assert_eq!(world.server.membership(&lm, &alices_ghost).await, "join");
        assert_eq!(world.server.membership(&lm, gateway.bot().as_str()).await, "leave");
        assert!(is_state(&gateway, &portal, PortalState::Active).await);
        world.matrix_say(&gateway, &mut view, &alice, "hello").await;
        let hello = (alices_ghost.clone(), "hello".to_owned());
        so("hello at the hub", || async { world.server.bodies(&lm).await.contains(&hello) }).await;
        world.lm_say(&lm, "hubert", "hi").await;
        let hi = (huberts_ghost.clone(), "hi".to_owned());
        so("hi in the graph", || async { gateway.matrix_bodies(matrix).await.contains(&hi) }).await;
        so("both states in step", || gateway.in_step(&portal)).await;
        let gateway = world.kill(gateway).await;
        world.lm_say(&lm, "hubert", "still there?").await;
        let still = (huberts_ghost.clone(), "still there?".to_owned());
        so("hubert after a restart", || async { gateway.matrix_bodies(matrix).await.contains(&still) }).await;
        so("both states in step", || gateway.in_step(&portal)).await;

        // Hubert sends her out: nobody of Matrix is left, and nothing dangles.
        let kick = draft(&hubert, "m.room.member", Some(&alices_ghost), json!({ "membership": "leave" }));
        world.lm_send(&lm, kick).await;
        in_graph(&gateway, matrix, alice.as_str(), "leave").await;
        let ended = portal_of(&gateway, &lm, PortalState::Ended).await;
        assert!(ended.reason.as_ref().unwrap().contains("nobody of Matrix"), "{ended:?}");
        in_graph(&gateway, matrix, &huberts_ghost, "leave").await;
        // And he may ask her again.
        invite(&world, &lm, &alices_ghost).await.unwrap();
        let again = pending(&gateway, &lm, &alice).await;
        world.matrix_join(&gateway, &again.matrix_room_id, &alice).await.unwrap();
        in_log(&world, &lm, &alices_ghost, "join").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_ends_on_one_side_ends_on_the_other() {
    let (world, gateway) = World::new(json!({})).await;
    world.peer.signs_invites(RoomVersion::V12);
    let (alice, alices_ghost) = (world.matrix_user("alice"), ghost(Side::Matrix, "alice"));
    // Alice declines.
    let lm = room(&world, "invite").await;
    invite(&world, &lm, &alices_ghost).await.unwrap();
    let portal = pending(&gateway, &lm, &alice).await;
    decline(&world, &gateway, &portal.matrix_room_id, &alice).await;
    in_log(&world, &lm, &alices_ghost, "leave").await;
    assert_eq!(world.server.state(&lm, "m.room.member", &alices_ghost).await.unwrap()["reason"], "not now");
    portal_of(&gateway, &lm, PortalState::Ended).await;

    // Hubert takes it back.
    let lm = room(&world, "invite").await;
    invite(&world, &lm, &alices_ghost).await.unwrap();
    let portal = pending(&gateway, &lm, &alice).await;
    let back = json!({ "membership": "leave", "reason": "a mistake" });
    world.lm_send(&lm, draft(&world.lm_user("hubert"), "m.room.member", Some(&alices_ghost), back)).await;
    in_graph(&gateway, &portal.matrix_room_id, alice.as_str(), "leave").await;
    let member =
        gateway.dag.state_event(&portal.matrix_room_id, "m.room.member", alice.as_str()).await.unwrap().unwrap();
    assert_eq!((member.sender.as_str(), &member.content["reason"]), (&*ghost(Side::Lm, "hubert"), &json!("a mistake")));
    portal_of(&gateway, &lm, PortalState::Ended).await;

    // An admin ends it.
    let lm = room(&world, "invite").await;
    invite(&world, &lm, &alices_ghost).await.unwrap();
    let portal = pending(&gateway, &lm, &alice).await;
    gateway.bridge.remove_portal(&portal.portal_id, "an admin wants it").await.unwrap();
    in_log(&world, &lm, &alices_ghost, "leave").await;
    in_graph(&gateway, &portal.matrix_room_id, alice.as_str(), "leave").await;

    // The homeserver is gone.
    let lm = room(&world, "invite").await;
    let gone = format!("@mx_gone_{DEAD}:{OWN}");
    invite(&world, &lm, &gone).await.unwrap();
    for _ in 0..60 {
        if world.server.membership(&lm, &gone).await == "leave" {
            break;
        }
        world.advance(301_000);
        gateway.bridge.look_for_ends().await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    in_log(&world, &lm, &gone, "leave").await;

    // Nobody answers, across a restart.
    let lm = room(&world, "invite").await;
    invite(&world, &lm, &alices_ghost).await.unwrap();
    let portal = pending(&gateway, &lm, &alice).await;
    let gateway = world.kill(gateway).await;
    world.advance(PENDING_MS + 1);
    gateway.bridge.look_for_ends().await.unwrap();
    in_log(&world, &lm, &alices_ghost, "leave").await;
    in_graph(&gateway, &portal.matrix_room_id, alice.as_str(), "leave").await;
    portal_of(&gateway, &lm, PortalState::Ended).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_lm_room_that_is_encrypted_takes_no_ghosts_and_says_why() {
    let (mut world, gateway) = World::new(json!({})).await;
    // The provider lives in the present.
    world.advance(SystemClock.now_ms() - NOW);
    let options = Options {
        server_name: OTHER.try_into().unwrap(),
        listen: world.give_up_other(),
        ca: None,
        resolve: world.resolve(),
        journal: None,
        eigen: false,
    };
    let hub = Provider::start(options).await.unwrap();
    let carol = hub.user("carol").unwrap();
    let encryption = Some(json!({ "algorithm": "m.mls.v1.dhkemx25519-aes128gcm-sha256-ed25519" }));
    let lm = hub.create_room(&carol, provider::NewRoom { encryption, ..Default::default() }).unwrap();
    let alice: OwnedUserId = ghost(Side::Matrix, "alice").try_into().unwrap();
    let refusal = format!("{:#}", hub.invite(&carol, &lm, &alice).await.unwrap_err());
    assert!(refusal.contains("encrypted"), "{refusal}");
    assert!(gateway.bridge.portals(None, 10).await.unwrap().is_empty());
    let reader = gateway.node.context.store.reader();
    let refused = sqlx::query_scalar("SELECT source_event_id FROM bridge_refusals").fetch_one(reader).await;
    let refused: OwnedEventId = refused.map(|id: String| id.try_into().unwrap()).unwrap();
    let found = gateway.bridge.explain(&refused).await.unwrap().unwrap();
    assert_eq!((found.status, found.side, &found.room_id, &found.sender), ("refused", "lm", &lm, &carol));
    assert_eq!(found.refusal.unwrap().code, "encryption");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whom_the_room_does_not_let_in_any_more_is_told_so_and_waits_for_nothing() {
    let (world, gateway) = World::new(json!({})).await;
    world.peer.signs_invites(RoomVersion::V12);
    let (alice, alices_ghost) = (world.matrix_user("alice"), ghost(Side::Matrix, "alice"));
    let lm = room(&world, "invite").await;
    invite(&world, &lm, &alices_ghost).await.unwrap();
    let portal = pending(&gateway, &lm, &alice).await;
    // The gateway is told nothing of it.
    *gateway.node.meddler.lock().unwrap() =
        Some(Arc::new(|request: axum::extract::Request, next: axum::middleware::Next| {
            use axum::response::IntoResponse as _;
            Box::pin(async move {
                match request.uri().path().contains("/send/") {
                    true => axum::http::StatusCode::BAD_GATEWAY.into_response(),
                    false => next.run(request).await,
                }
            })
        }));
    let back = json!({ "membership": "leave" });
    world.lm_send(&lm, draft(&world.lm_user("hubert"), "m.room.member", Some(&alices_ghost), back)).await;
    let refusal = world.matrix_join(&gateway, &portal.matrix_room_id, &alice).await.err().unwrap();
    assert_eq!(refusal.errcode(), "M_FORBIDDEN", "{refusal}");
    in_graph(&gateway, &portal.matrix_room_id, alice.as_str(), "leave").await;
    portal_of(&gateway, &lm, PortalState::Ended).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_portal_of_the_whole_lm_room_takes_over_from_a_pending_one() {
    let (world, gateway) = World::new(json!({})).await;
    world.peer.signs_invites(RoomVersion::V12);
    let (alice, alices_ghost) = (world.matrix_user("alice"), ghost(Side::Matrix, "alice"));
    let lm = room(&world, "public").await;
    invite(&world, &lm, &alices_ghost).await.unwrap();
    let first = pending(&gateway, &lm, &alice).await;
    // Who names the room's alias is not led into a room that nobody is in.
    let alias = format!("lm_{}_{LM}", lm.as_str().split(':').next().unwrap());
    let target = gateway.bridge.resolve_alias(&alias, Cause::Appservice).await.unwrap();
    assert_ne!(target.room_id, first.matrix_room_id);
    assert!(is_state(&gateway, &first, PortalState::Ended).await);
    let portal = portal_of(&gateway, &lm, PortalState::Active).await;
    world.advance(60_000);
    gateway.bridge.look_for_ends().await.unwrap();
    in_graph(&gateway, &portal.matrix_room_id, alice.as_str(), "invite").await;
    world.matrix_join(&gateway, &portal.matrix_room_id, &alice).await.unwrap();
    in_log(&world, &lm, &alices_ghost, "join").await;
}
