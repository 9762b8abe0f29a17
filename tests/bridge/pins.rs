//! What is pinned: the same messages on both sides, each under its own ID.

use isthmus::bridge::{Cause, NewPortal};
use isthmus::event::RoomVersion;
use isthmus::identity::Side;
use ruma::{OwnedEventId, RoomId};
use serde_json::{Value, json};

use super::from_lm;
use super::from_matrix::{Home, at_home, user, via};
use super::world::{Gateway, LM, World, draft, ghost, in_each_version, message, so, until};

const PINNED: &str = "m.room.pinned_events";

/// How an event is called across, once it is.
async fn across(gateway: &Gateway, event: &OwnedEventId) -> OwnedEventId {
    until("its name across", || async {
        let found = gateway.bridge.explain(event).await.unwrap()?;
        matches!(found.status, "crossed" | "image").then_some(found.across?)
    })
    .await
}

async fn pinned_in_log(gateway: &Gateway, room: &RoomId, ids: &[&OwnedEventId]) {
    so(&format!("{ids:?} to be pinned in the log"), || async {
        gateway.node.state(room, PINNED, "").await.is_some_and(|content| content["pinned"] == json!(ids))
    })
    .await;
}

async fn pinned_in_graph(gateway: &Gateway, room: &RoomId, ids: &[&OwnedEventId]) {
    so(&format!("{ids:?} to be pinned in the graph"), || async {
        gateway.matrix_state(room, PINNED).await.is_some_and(|content| content["pinned"] == json!(ids))
    })
    .await;
}

/// The event in the log in which somebody said something.
async fn said(gateway: &Gateway, room: &RoomId, body: &str) -> OwnedEventId {
    until(body, || async {
        let log = gateway.node.log(room).await;
        let event = log.iter().find(|event| event.event.content().get("body") == Some(&json!(body)))?;
        Some(event.event.event_id.clone())
    })
    .await
}

fn list(ids: &[&OwnedEventId]) -> Value {
    json!({ "pinned": ids })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_pinned_is_pinned_on_both_sides() {
    in_each_version(pinned_on_both_sides).await;
}

async fn pinned_on_both_sides(world: World, gateway: Gateway) {
    let new = NewPortal { join_rule: Some("public".to_owned()), ..NewPortal::default() };
    let portal = gateway.bridge.create_portal(new).await.unwrap();
    let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
    let alice = world.matrix_user("alice");
    let bob = world.lm_user("bob");
    let mut view = world.matrix_join(&gateway, matrix, &alice).await.unwrap();
    world.lm_join(lm, "bob").await.unwrap();
    gateway.bridge.set_power(&portal.portal_id, &alice, 50).await.unwrap();
    gateway.bridge.set_power(&portal.portal_id, &bob, 50).await.unwrap();
    world.refresh(&gateway, &mut view).await;
    let tea = world.matrix_say(&gateway, &mut view, &alice, "tea at four").await;
    world.lm_say(lm, "bob", "scones too").await;
    let scones = said(&gateway, lm, "scones too").await;
    let (tea_in_log, scones_in_graph) = (across(&gateway, &tea).await, across(&gateway, &scones).await);

    world.refresh(&gateway, &mut view).await;
    let both = list(&[&scones_in_graph, &tea]);
    world.matrix_send(&gateway, &mut view, &alice, PINNED, Some(""), both).await;
    pinned_in_log(&gateway, lm, &[&scones, &tea_in_log]).await;

    // What only one room knows is pinned in that room alone, and stays so whatever the other side pins.
    let old = OwnedEventId::try_from("$of_a_time_before").unwrap();
    world.lm_send(lm, draft(&bob, PINNED, Some(""), list(&[&old, &tea_in_log, &scones]))).await;
    pinned_in_graph(&gateway, matrix, &[&tea, &scones_in_graph]).await;
    so("both states in step", || gateway.in_step(&portal)).await;
    pinned_in_log(&gateway, lm, &[&old, &tea_in_log, &scones]).await;
    world.refresh(&gateway, &mut view).await;
    world.matrix_send(&gateway, &mut view, &alice, PINNED, Some(""), list(&[&tea])).await;
    pinned_in_log(&gateway, lm, &[&tea_in_log, &old]).await;
    world.matrix_send(&gateway, &mut view, &alice, PINNED, Some(""), list(&[])).await;
    pinned_in_log(&gateway, lm, &[&old]).await;
    so("both states in step", || gateway.in_step(&portal)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_hub_has_pinned_is_pinned_in_the_room_made_for_it() {
    let (world, gateway) = World::new(json!({})).await;
    let lm = from_lm::room(&world, "public").await;
    let hubert = world.lm_user("hubert");
    let hub_sends = async |draft| world.lm_send(&lm, draft).await;
    hub_sends(message(&hubert, "before the portal")).await;
    let portal = gateway.bridge.portal_from_lm(&lm, &[LM.try_into().unwrap()], None, Cause::Admin).await.unwrap();
    hub_sends(message(&hubert, "tea at four")).await;
    let tea = said(&gateway, &lm, "tea at four").await;
    let image = across(&gateway, &tea).await;
    hub_sends(draft(&hubert, PINNED, Some(""), list(&[&tea]))).await;
    pinned_in_graph(&gateway, &portal.matrix_room_id, &[&image]).await;
    hub_sends(draft(&hubert, PINNED, Some(""), list(&[]))).await;
    pinned_in_graph(&gateway, &portal.matrix_room_id, &[]).await;
    so("both states in step", || gateway.in_step(&portal)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_pin_in_a_room_that_lives_elsewhere_pins_from_the_log() {
    let (world, gateway) = World::new(json!({})).await;
    let home = Home::start(&world).await;
    let room = home.public(RoomVersion::V11).await;
    let portal = gateway.bridge.portal_from_matrix(&room, &via(), None, Cause::Admin).await.unwrap();
    let lm = &portal.lm_room_id;
    world.lm_join(lm, "bob").await.unwrap();
    let bobs_ghost = ghost(Side::Lm, "bob");
    at_home(&home, &room, &bobs_ghost, "join").await;
    home.empower(&room, &[(&bobs_ghost, 50)]).await;
    let tea = home.say(&room, "alice", "tea at four").await;
    let image = across(&gateway, &tea).await;
    let old = OwnedEventId::try_from("$of_a_time_before").unwrap();
    home.send(&room, "alice", PINNED, Some(""), list(&[&old, &tea])).await;
    pinned_in_log(&gateway, lm, &[&image]).await;
    so("bob to have power", || async {
        let levels = gateway.node.state(lm, "m.room.power_levels", "").await.unwrap();
        levels["users"].get(world.lm_user("bob").as_str()) == Some(&json!(50))
    })
    .await;
    world.lm_say(lm, "bob", "scones too").await;
    let scones = said(&gateway, lm, "scones too").await;
    let scones_at_home = across(&gateway, &scones).await;
    world.lm_send(lm, draft(&world.lm_user("bob"), PINNED, Some(""), list(&[&scones, &image]))).await;
    so("the list at home", || async {
        let content = home.0.matrix_state(&room, PINNED).await.unwrap();
        content["pinned"] == json!([scones_at_home, tea, old])
    })
    .await;
    so("both states in step", || gateway.in_step(&portal)).await;
    assert_eq!(home.membership(&room, user("alice").as_str()).await, "join");
}
