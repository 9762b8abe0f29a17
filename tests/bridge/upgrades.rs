//! Rooms that are replaced, on either side: the portal goes on with the room that comes next, and those who were in follow.

use std::sync::Arc;

use isthmus::bridge::{Cause, NewPortal, Portal, PortalKind, PortalState};
use isthmus::event::RoomVersion;
use isthmus::identity::Side;
use isthmus::seam::Outgoing;
use ruma::{OwnedRoomId, RoomId};
use serde_json::{Value, json};

use super::from_lm::room;
use super::from_matrix::{Home, at_home, image, in_log, is_state, user, via};
use super::world::{Gateway, LM, World, draft, ghost, so, until};
use crate::dag::OWN;

/// The level in a log of who stands above all levels in the Matrix room.
const CREATOR: i64 = (1 << 53) - 2;

/// The portal that has come of one whose room was replaced by `next`, which is on `side`.
async fn successor(gateway: &Gateway, old: &Portal, side: Side, next: &RoomId) -> Arc<Portal> {
    so("the old portal to end", || is_state(gateway, old, PortalState::Ended)).await;
    let portals = gateway.bridge.portals(None, 100).await.unwrap();
    let of_side = |portal: &Portal| match side {
        Side::Matrix => portal.matrix_room_id.clone(),
        Side::Lm => portal.lm_room_id.clone(),
    };
    let found = portals.into_iter().find(|portal| of_side(portal) == next && portal.state == PortalState::Active);
    found.unwrap_or_else(|| panic!("{next} has no portal"))
}

async fn tombstones_in_log(gateway: &Gateway, lm: &RoomId) -> Vec<Value> {
    let log = gateway.node.log(lm).await;
    let stones = log.iter().filter(|event| event.event.kind == "m.room.tombstone");
    stones.map(|event| event.event.content()["replacement_room"].clone()).collect()
}

/// Until the portal says that it waits to be let into a room.
async fn waits(gateway: &Gateway, portal: &Portal, next: &RoomId) {
    so("the portal to wait", || async {
        let portal = gateway.bridge.portal(&portal.portal_id).await.unwrap().unwrap();
        portal.reason.as_ref().is_some_and(|reason| reason.contains(next.as_str()) && reason.contains("is not let"))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_lm_user_with_the_level_replaces_both_rooms_that_the_gateway_made() {
    let (world, gateway) = World::new(json!({})).await;
    let alias = Some("tea".to_owned());
    let new = NewPortal { alias, join_rule: Some("public".to_owned()), ..NewPortal::default() };
    let old = gateway.bridge.create_portal(new).await.unwrap();
    let alice = world.matrix_user("alice");
    world.matrix_join(&gateway, &old.matrix_room_id, &alice).await.unwrap();
    world.lm_join(&old.lm_room_id, "bob").await.unwrap();
    so("both states in step", || gateway.in_step(&old)).await;
    let bob = world.lm_user("bob");
    let next = room(&world, "public").await;
    let tombstone = || draft(&bob, "m.room.tombstone", Some(""), json!({ "body": "moved", "replacement_room": next }));

    // It takes the level, which is the same on both sides.
    gateway.bridge.set_power(&old.portal_id, &bob, 99).await.unwrap();
    so("both states in step", || gateway.in_step(&old)).await;
    let stone = Outgoing { draft: tombstone(), effect: None };
    assert!(world.server.lm.send(&old.lm_room_id, vec![stone]).await.pop().unwrap().is_err());
    gateway.bridge.set_power(&old.portal_id, &bob, 100).await.unwrap();
    so("both states in step", || gateway.in_step(&old)).await;
    so("the level at bob's server", || async {
        let levels = world.server.state(&old.lm_room_id, "m.room.power_levels", "").await.unwrap();
        levels["users"][bob.as_str()] == 100
    })
    .await;
    world.lm_send(&old.lm_room_id, tombstone()).await;

    let portal = successor(&gateway, &old, Side::Lm, &next).await;
    assert_eq!(portal.kind, PortalKind::FromLm);
    let leads = gateway.matrix_state(&old.matrix_room_id, "m.room.tombstone").await.unwrap();
    assert_eq!(leads["replacement_room"], portal.matrix_room_id.as_str());
    let create = gateway.matrix_state(&portal.matrix_room_id, "m.room.create").await.unwrap();
    assert_eq!(create["predecessor"], json!({ "room_id": old.matrix_room_id }));
    // Its alias leads there, and the next room says so itself.
    assert_eq!(portal.alias.as_deref(), Some(format!("#tea:{OWN}").as_str()));
    let led = gateway.bridge.resolve_alias("tea", Cause::Appservice).await.unwrap();
    assert_eq!(led.room_id, portal.matrix_room_id);
    so("the address", || async {
        let address = gateway.matrix_state(&portal.matrix_room_id, "m.room.canonical_alias").await.unwrap();
        address["alias"] == format!("#tea:{OWN}")
    })
    .await;
    let listed = gateway.bridge.listed(10).await.unwrap();
    let listed: Vec<&str> = listed.iter().map(|listed| listed.room_id.as_str()).collect();
    assert_eq!(listed, [portal.matrix_room_id.as_str()]);
    world.matrix_join(&gateway, &portal.matrix_room_id, &alice).await.unwrap();
    so("alice in the next room", || async {
        world.server.membership(&next, &ghost(Side::Matrix, "alice")).await == "join"
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_matrix_user_with_the_level_replaces_both_rooms_that_the_gateway_made() {
    let (world, gateway) = World::new(json!({})).await;
    let home = Home::start(&world).await;
    let (old, mut view) = world.portal_of_two(&gateway).await;
    let alice = world.matrix_user("alice");
    gateway.bridge.set_power(&old.portal_id, &alice, 100).await.unwrap();
    so("both states in step", || gateway.in_step(&old)).await;
    world.refresh(&gateway, &mut view).await;
    let next = home.public(RoomVersion::V11).await;
    let tombstone = json!({ "body": "moved", "replacement_room": next });
    world.matrix_send(&gateway, &mut view, &alice, "m.room.tombstone", Some(""), tombstone).await;
    let portal = successor(&gateway, &old, Side::Matrix, &next).await;
    assert_eq!(portal.kind, PortalKind::FromMatrix);
    assert_eq!(tombstones_in_log(&gateway, &old.lm_room_id).await, [json!(portal.lm_room_id)]);
    let create = gateway.node.state(&portal.lm_room_id, "m.room.create", "").await.unwrap();
    assert_eq!(create["predecessor"], json!({ "room_id": old.lm_room_id }));
    world.lm_join(&portal.lm_room_id, "bob").await.unwrap();
    at_home(&home, &next, &ghost(Side::Lm, "bob"), "join").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_was_in_a_private_room_of_a_hub_is_invited_into_the_next_when_the_gateway_is_let_in() {
    let (world, gateway) = World::new(json!({})).await;
    world.peer.signs_invites(RoomVersion::V12);
    let (lm, next) = (room(&world, "public").await, room(&world, "invite").await);
    let old = gateway.bridge.portal_from_lm(&lm, &[LM.try_into().unwrap()], None, Cause::Admin).await.unwrap();
    let alice = world.matrix_user("alice");
    world.matrix_join(&gateway, &old.matrix_room_id, &alice).await.unwrap();
    so("both states in step", || gateway.in_step(&old)).await;
    let hubert = world.lm_user("hubert");
    let tombstone = json!({ "body": "moved", "replacement_room": next });
    world.lm_send(&lm, draft(&hubert, "m.room.tombstone", Some(""), tombstone)).await;
    waits(&gateway, &old, &next).await;
    so("the notice", || async {
        let said = gateway.matrix_bodies(&old.matrix_room_id).await;
        said.iter().any(|(by, body)| *by == gateway.bot() && body.contains(next.as_str()) && body.contains("invites"))
    })
    .await;
    // The policy lets nobody make portals by invites, but this one was there.
    let bot = gateway.bot();
    let invite = draft(&hubert, "m.room.member", Some(bot.as_str()), json!({ "membership": "invite" }));
    world.server.lm.invite(&next, Outgoing { draft: invite, effect: None }).await.unwrap();
    let portal = successor(&gateway, &old, Side::Lm, &next).await;
    let alices =
        gateway.dag.state_event(&portal.matrix_room_id, "m.room.member", alice.as_str()).await.unwrap().unwrap();
    assert_eq!((&alices.sender, &alices.content["membership"]), (&bot, &json!("invite")));
    world.matrix_join(&gateway, &portal.matrix_room_id, &alice).await.unwrap();
    so("alice in the next room", || async {
        world.server.membership(&next, &ghost(Side::Matrix, "alice")).await == "join"
    })
    .await;
    so("both states in step", || gateway.in_step(&portal)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_matrix_room_goes_on_in_a_private_one_when_its_people_invite_the_bot_and_the_lm_users() {
    let (world, gateway) = World::new(json!({})).await;
    let home = Home::start(&world).await;
    let room = home.public(RoomVersion::V12).await;
    let next = home.room(RoomVersion::V12, json!({ "join_rule": "invite" }), Vec::new()).await;
    let old = gateway.bridge.portal_from_matrix(&room, &via(), Some("tea"), Cause::Admin).await.unwrap();
    let (bob, bobs_ghost) = (world.lm_user("bob"), ghost(Side::Lm, "bob"));
    world.lm_join(&old.lm_room_id, "bob").await.unwrap();
    at_home(&home, &room, &bobs_ghost, "join").await;
    let tombstone = json!({ "body": "moved", "replacement_room": next });
    home.send(&room, "alice", "m.room.tombstone", Some(""), tombstone).await;
    waits(&gateway, &old, &next).await;
    so("the notice", || async {
        gateway.node.bodies(&old.lm_room_id).await.iter().any(|(_, body)| body.contains("is not let"))
    })
    .await;
    home.invite(&next, gateway.bot().as_str()).await.unwrap();
    let portal = successor(&gateway, &old, Side::Matrix, &next).await;
    assert_eq!(tombstones_in_log(&gateway, &old.lm_room_id).await, [json!(portal.lm_room_id)]);
    let led = gateway.bridge.resolve_alias("tea", Cause::Appservice).await.unwrap();
    assert_eq!(led.room_id, next);
    // Nobody is let in whom the room's own people do not let in.
    assert!(world.lm_join(&portal.lm_room_id, "bob").await.is_err());
    home.invite(&next, &bobs_ghost).await.unwrap();
    in_log(&gateway, &portal.lm_room_id, bob.as_str(), "invite").await;
    world.lm_join(&portal.lm_room_id, "bob").await.unwrap();
    at_home(&home, &next, &bobs_ghost, "join").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_lm_user_with_the_level_there_replaces_a_matrix_room_that_lives_elsewhere() {
    let (world, gateway) = World::new(json!({})).await;
    let home = Home::start(&world).await;
    let room = home.public(RoomVersion::V12).await;
    let old = gateway.bridge.portal_from_matrix(&room, &via(), None, Cause::Admin).await.unwrap();
    let bobs_ghost = ghost(Side::Lm, "bob");
    world.lm_join(&old.lm_room_id, "bob").await.unwrap();
    at_home(&home, &room, &bobs_ghost, "join").await;
    home.empower(&room, &[(&bobs_ghost, 150)]).await;
    so("bob's level", || async {
        let levels = gateway.node.state(&old.lm_room_id, "m.room.power_levels", "").await.unwrap();
        levels["users"][world.lm_user("bob").as_str()] == 150
    })
    .await;
    let next = super::from_lm::room(&world, "public").await;
    let tombstone = json!({ "body": "moved", "replacement_room": next });
    world.lm_send(&old.lm_room_id, draft(&world.lm_user("bob"), "m.room.tombstone", Some(""), tombstone)).await;
    let portal = successor(&gateway, &old, Side::Lm, &next).await;
    let leads = until("the tombstone", || home.0.matrix_state(&room, "m.room.tombstone")).await;
    assert_eq!(leads["replacement_room"], portal.matrix_room_id.as_str());
    let by = home.0.dag.state_event(&room, "m.room.tombstone", "").await.unwrap().unwrap();
    assert_eq!(by.sender.as_str(), bobs_ghost);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_stands_above_all_levels_in_a_room_of_version_12_does_in_the_log_too() {
    let (world, gateway) = World::new(json!({})).await;
    let home = Home::start(&world).await;
    let bobs_ghost = ghost(Side::Lm, "bob");
    let made_with = |creators: &[&str]| {
        let create = json!({ "additional_creators": creators });
        vec![draft(&user("alice"), "m.room.create", Some(""), create)]
    };
    let public = json!({ "join_rule": "public" });
    let carol = user("carol");
    let room = home.room(RoomVersion::V12, public.clone(), made_with(&[carol.as_str(), &bobs_ghost])).await;
    let old = gateway.bridge.portal_from_matrix(&room, &via(), None, Cause::Admin).await.unwrap();
    let bob = world.lm_user("bob");
    let level = async |portal: &Portal, user: &str| {
        let levels = gateway.node.state(&portal.lm_room_id, "m.room.power_levels", "").await.unwrap();
        levels["users"][user].clone()
    };
    for user in [image("alice"), image("carol"), bob.to_string()] {
        assert_eq!(level(&old, &user).await, json!(CREATOR), "{user}");
    }
    // The LM user who is a creator there sets what takes a level, though no levels name the ghost.
    world.lm_join(&old.lm_room_id, "bob").await.unwrap();
    at_home(&home, &room, &bobs_ghost, "join").await;
    world.lm_send(&old.lm_room_id, draft(&bob, "m.room.topic", Some(""), json!({ "topic": "by bob" }))).await;
    so("bob's topic", || async {
        home.0.matrix_state(&room, "m.room.topic").await.is_some_and(|content| content["topic"] == "by bob")
    })
    .await;
    home.join(&room, "carol").await;
    in_log(&gateway, &old.lm_room_id, &image("carol"), "join").await;
    home.send(&room, "carol", "m.room.name", Some(""), json!({ "name": "by carol" })).await;
    so("carol's name", || async {
        let name = gateway.node.log(&old.lm_room_id).await;
        let name = name.iter().rev().find(|event| event.event.kind == "m.room.name");
        name.is_some_and(|event| event.event.sender.as_str() == image("carol"))
    })
    .await;
    // Levels that an LM creator gives others cross, and name no creator.
    let mut levels = gateway.node.state(&old.lm_room_id, "m.room.power_levels", "").await.unwrap();
    levels["users"][world.lm_user("eve").as_str()] = json!(50);
    world.lm_send(&old.lm_room_id, draft(&bob, "m.room.power_levels", Some(""), Value::Object(levels))).await;
    so("eve's level", || async {
        let levels = home.0.matrix_state(&room, "m.room.power_levels").await.unwrap();
        levels["users"] == json!({ ghost(Side::Lm, "eve"): 50 })
    })
    .await;

    // In the next room others are.
    let next = home.room(RoomVersion::V12, public, made_with(&[user("dave").as_str()])).await;
    let tombstone = json!({ "body": "moved", "replacement_room": next });
    home.send(&room, "alice", "m.room.tombstone", Some(""), tombstone).await;
    let portal = successor(&gateway, &old, Side::Matrix, &next).await;
    assert_eq!(level(&portal, &image("dave")).await, json!(CREATOR));
    assert_eq!(level(&portal, bob.as_str()).await, Value::Null);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_that_was_broken_off_is_taken_up_and_done_once() {
    let (world, gateway) = World::new(json!({})).await;
    let home = Home::start(&world).await;
    let (room, next) = (home.public(RoomVersion::V12).await, home.public(RoomVersion::V11).await);
    let old = gateway.bridge.portal_from_matrix(&room, &via(), Some("tea"), Cause::Admin).await.unwrap();
    world.break_portals("ending").await;
    let tombstone = json!({ "body": "moved", "replacement_room": next });
    home.send(&room, "alice", "m.room.tombstone", Some(""), tombstone).await;
    so("the tombstone across", || async { tombstones_in_log(&gateway, &old.lm_room_id).await.len() == 1 }).await;
    let gateway = world.kill(gateway).await;
    world.mend_inserts("bridge_portals").await;
    let portal = successor(&gateway, &old, Side::Matrix, &next).await;
    assert_eq!(tombstones_in_log(&gateway, &old.lm_room_id).await, [json!(portal.lm_room_id)]);
    assert_eq!(gateway.bridge.portals(None, 10).await.unwrap().len(), 2);
    let led = gateway.bridge.resolve_alias("tea", Cause::Appservice).await.unwrap();
    assert_eq!(led.room_id, next);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rooms_that_lead_to_each_other_are_left_after_a_while() {
    let (world, gateway) = World::new(json!({})).await;
    let rooms: [OwnedRoomId; 2] = [room(&world, "public").await, room(&world, "public").await];
    let hubert = world.lm_user("hubert");
    for (from, to) in [(&rooms[1], &rooms[0]), (&rooms[0], &rooms[1])] {
        let content = json!({ "body": "moved", "replacement_room": to });
        world.lm_send(from, draft(&hubert, "m.room.tombstone", Some(""), content)).await;
    }
    gateway.bridge.portal_from_lm(&rooms[0], &[LM.try_into().unwrap()], None, Cause::Admin).await.unwrap();
    let portals = until("the last", || async {
        let portals = gateway.bridge.portals(None, 100).await.unwrap();
        let is_last =
            |portal: &Arc<Portal>| portal.reason.as_ref().is_some_and(|reason| reason.contains("one after the other"));
        let is_over = portals.iter().any(is_last) && portals.iter().all(|portal| portal.state == PortalState::Ended);
        is_over.then_some(portals)
    })
    .await;
    assert_eq!(portals.len(), 9);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_direct_chat_goes_on_in_the_room_into_which_the_ghost_is_invited() {
    let (world, gateway) = World::new(json!({})).await;
    let home = Home::start(&world).await;
    let (bob, bobs_ghost) = (world.lm_user("bob"), ghost(Side::Lm, "bob"));
    let chat = async || home.room(RoomVersion::V12, json!({ "join_rule": "invite" }), Vec::new()).await;
    let portal_of = async |room: &OwnedRoomId| {
        until("the portal", || async {
            let mut portals = gateway.bridge.portals(None, 10).await.unwrap().into_iter();
            portals.find(|portal| portal.matrix_room_id == *room)
        })
        .await
    };
    let (room, next) = (chat().await, chat().await);
    home.invite(&room, &bobs_ghost).await.unwrap();
    let old = portal_of(&room).await;
    in_log(&gateway, &old.lm_room_id, bob.as_str(), "invite").await;
    world.lm_join(&old.lm_room_id, "bob").await.unwrap();
    at_home(&home, &room, &bobs_ghost, "join").await;
    let tombstone = json!({ "body": "moved", "replacement_room": next });
    home.send(&room, "alice", "m.room.tombstone", Some(""), tombstone).await;
    waits(&gateway, &old, &next).await;
    home.invite(&next, &bobs_ghost).await.unwrap();
    let new = portal_of(&next).await;
    so("the old portal to end", || is_state(&gateway, &old, PortalState::Ended)).await;
    assert_eq!(tombstones_in_log(&gateway, &old.lm_room_id).await, [json!(new.lm_room_id)]);
    in_log(&gateway, &new.lm_room_id, bob.as_str(), "invite").await;
    world.lm_join(&new.lm_room_id, "bob").await.unwrap();
    at_home(&home, &next, &bobs_ghost, "join").await;
    // The bot is not between them.
    assert!(home.0.matrix_member(&next, gateway.bot().as_str()).await.is_none());
}
