//! What leads to a room, and who may look in: aliases and guests, as both sides call them.

use isthmus::bridge::{Cause, NewPortal};
use isthmus::federation::Call;
use ruma::OwnedServerName;
use serde_json::{Value, json};

use super::from_lm::room;
use super::from_matrix::{Home, via};
use super::world::{Gateway, LM, MATRIX, OTHER, World, draft, object, so};
use crate::dag::OWN;

const ALIAS: &str = "m.room.canonical_alias";

fn without_source(content: Option<isthmus::event::Object>) -> Value {
    let mut content = content.unwrap_or_default();
    content.retain(|key, _| !key.starts_with("im.isthmus."));
    Value::Object(content)
}

async fn in_matrix(gateway: &Gateway, room: &ruma::RoomId, kind: &str, expected: Value) {
    so(&format!("{kind} to be {expected} in Matrix"), || async {
        without_source(gateway.matrix_state(room, kind).await) == expected
    })
    .await;
}

async fn in_log(gateway: &Gateway, room: &ruma::RoomId, kind: &str, expected: Value) {
    so(&format!("{kind} to be {expected} in the log"), || async {
        without_source(gateway.node.state(room, kind, "").await) == expected
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_address_of_a_room_leads_to_it_on_both_sides() {
    let (world, gateway) = World::new(json!({})).await;
    let new = NewPortal { alias: Some("tea".to_owned()), join_rule: Some("public".to_owned()), ..NewPortal::default() };
    let portal = gateway.bridge.create_portal(new).await.unwrap();
    let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
    let own = json!({ "alias": format!("#tea:{OWN}") });
    in_matrix(&gateway, matrix, ALIAS, own.clone()).await;
    in_log(&gateway, lm, ALIAS, own).await;

    let alice = world.matrix_user("alice");
    let mut view = world.matrix_join(&gateway, matrix, &alice).await.unwrap();
    world.lm_join(lm, "bob").await.unwrap();
    so("both states in step", || gateway.in_step(&portal)).await;
    let bob = world.lm_user("bob");
    for user in [&alice, &bob] {
        gateway.bridge.set_power(&portal.portal_id, user, 50).await.unwrap();
    }
    so("both states in step", || gateway.in_step(&portal)).await;
    world.refresh(&gateway, &mut view).await;
    let said = json!({ "alias": format!("#tea:{MATRIX}"), "alt_aliases": [format!("#tea:{OWN}"), 7], "x": 1 });
    world.matrix_send(&gateway, &mut view, &alice, ALIAS, Some(""), said).await;
    let expected = json!({ "alias": format!("#mx_tea_{MATRIX}:{OWN}"), "alt_aliases": [format!("#tea:{OWN}")] });
    in_log(&gateway, lm, ALIAS, expected).await;
    world.lm_send(lm, draft(&bob, ALIAS, Some(""), json!({ "alias": format!("#tee:{LM}") }))).await;
    in_matrix(&gateway, matrix, ALIAS, json!({ "alias": format!("#lm_tee_{LM}:{OWN}") })).await;
    so("both states in step", || gateway.in_step(&portal)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hubs_alias_is_the_matrix_rooms_address_while_it_has_one() {
    let (world, gateway) = World::new(json!({})).await;
    let lm = room(&world, "public").await;
    let via = [LM.try_into().unwrap()];
    let portal = gateway.bridge.portal_from_lm(&lm, &via, Some("tea"), Cause::Admin).await.unwrap();
    let (matrix, hubert) = (&portal.matrix_room_id, world.lm_user("hubert"));
    let own = format!("#tea:{OWN}");
    in_matrix(&gateway, matrix, ALIAS, json!({ "alias": own })).await;
    let said = json!({ "alias": format!("#coffee:{LM}"), "alt_aliases": [format!("#mocha:{LM}")] });
    world.lm_send(&lm, draft(&hubert, ALIAS, Some(""), said)).await;
    let there = |name: &str| format!("#lm_{name}_{LM}:{OWN}");
    in_matrix(&gateway, matrix, ALIAS, json!({ "alias": there("coffee"), "alt_aliases": [there("mocha"), own] })).await;
    world.lm_send(&lm, draft(&hubert, ALIAS, Some(""), json!({}))).await;
    in_matrix(&gateway, matrix, ALIAS, json!({ "alias": own })).await;
    so("both states in step", || gateway.in_step(&portal)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_matrix_rooms_own_alias_leads_lm_servers_to_the_log() {
    let (world, gateway) = World::new(json!({})).await;
    let home = Home::start(&world).await;
    let new = NewPortal { alias: Some("tea".to_owned()), join_rule: Some("public".to_owned()), ..NewPortal::default() };
    let there = home.0.bridge.create_portal(new).await.unwrap();
    let room = &there.matrix_room_id;
    let portal = gateway.bridge.portal_from_matrix(room, &via(), None, Cause::Admin).await.unwrap();
    let alias = format!("#mx_tea_{OTHER}:{OWN}");
    in_log(&gateway, &portal.lm_room_id, ALIAS, json!({ "alias": alias })).await;
    let ask = async |alias: &str| {
        let uri = "/_matrix/federation/unstable/org.matrix.i-d.ralston-mimi-linearized-matrix.02/query/directory";
        let alias = alias.replace('#', "%23").replace(':', "%3A");
        let own: OwnedServerName = OWN.try_into().unwrap();
        let call = Call::get(format!("{uri}?room_alias={alias}"));
        world.server.context.client.call(&own, call, false).await
    };
    let led = ask(&alias).await.unwrap();
    assert_eq!(led, object(json!({ "room_id": portal.lm_room_id, "servers": [OWN] })));
    world.lm_join(&portal.lm_room_id, "bob").await.unwrap();
    // What leads nowhere, and what leads to a room without a portal.
    assert!(ask(&format!("#mx_coffee_{OTHER}:{OWN}")).await.is_err());
    let new =
        NewPortal { alias: Some("cocoa".to_owned()), join_rule: Some("public".to_owned()), ..NewPortal::default() };
    home.0.bridge.create_portal(new).await.unwrap();
    assert!(ask(&format!("#mx_cocoa_{OTHER}:{OWN}")).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whether_guests_may_join_is_said_on_both_sides() {
    let (world, gateway) = World::new(json!({})).await;
    let (portal, mut view) = world.portal_of_two(&gateway).await;
    let (alice, bob) = (world.matrix_user("alice"), world.lm_user("bob"));
    for user in [&alice, &bob] {
        gateway.bridge.set_power(&portal.portal_id, user, 50).await.unwrap();
    }
    so("both states in step", || gateway.in_step(&portal)).await;
    world.refresh(&gateway, &mut view).await;
    let kind = "m.room.guest_access";
    let open = json!({ "guest_access": "can_join", "x": 1 });
    world.matrix_send(&gateway, &mut view, &alice, kind, Some(""), open).await;
    in_log(&gateway, &portal.lm_room_id, kind, json!({ "guest_access": "can_join" })).await;
    world.lm_send(&portal.lm_room_id, draft(&bob, kind, Some(""), json!({ "guest_access": 7 }))).await;
    in_matrix(&gateway, &portal.matrix_room_id, kind, json!({ "guest_access": "forbidden" })).await;
}
