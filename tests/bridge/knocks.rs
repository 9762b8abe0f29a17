//! Knocks across: a Matrix user's at a room of a foreign hub, an LM user's at a room of the gateway's.

use std::sync::Arc;

use isthmus::bridge::{Cause, NewPortal, Portal};
use isthmus::event::RoomVersion;
use isthmus::identity::Side;
use isthmus::lm::Appended;
use isthmus::refusal::Refusal;
use ruma::{OwnedRoomId, RoomId, UserId};
use serde_json::json;

use super::from_lm::room;
use super::world::{Gateway, LM, World, draft, ghost, object, so};
use crate::dag::OWN;

/// A user of the homeserver knocks, or takes it back.
async fn hand(world: &World, gateway: &Gateway, room: &RoomId, user: &UserId, membership: &str) -> Result<(), Refusal> {
    let versions: Vec<String> = RoomVersion::ALL.iter().map(|version| version.as_str().to_owned()).collect();
    let (dag, name) = (&gateway.dag, &world.peer.name);
    let made = match membership {
        "knock" => dag.make_knock(name, room, user, &versions).await?,
        _ => dag.make_leave(name, room, user).await?,
    };
    let version = RoomVersion::parse(made["room_version"].as_str().unwrap()).unwrap();
    let mut event = made["event"].clone();
    event["content"]["reason"] = json!("please");
    let (id, event) = world.peer.sign(version, event);
    match membership {
        "knock" => dag.send_knock(name, room, &id, event).await.map(drop),
        _ => dag.send_leave(name, room, &id, event).await.map(drop),
    }
}

/// A portal of a room at the LM server into which one knocks.
async fn knocking_from_lm(world: &World, gateway: &Gateway) -> (OwnedRoomId, Arc<Portal>) {
    let lm = room(world, "public").await;
    let portal = gateway.bridge.portal_from_lm(&lm, &[LM.try_into().unwrap()], None, Cause::Admin).await.unwrap();
    let hubert = world.lm_user("hubert");
    world.lm_send(&lm, draft(&hubert, "m.room.join_rules", Some(""), json!({ "join_rule": "knock" }))).await;
    so("knocks are taken on Matrix", || async {
        let rules = gateway.matrix_state(&portal.matrix_room_id, "m.room.join_rules").await;
        rules.is_some_and(|content| content["join_rule"] == "knock")
    })
    .await;
    (lm, portal)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_matrix_user_knocks_at_a_foreign_hub_and_is_let_in() {
    let (world, gateway) = World::new(json!({})).await;
    let (lm, portal) = knocking_from_lm(&world, &gateway).await;
    let (matrix, alice, hubert) = (&portal.matrix_room_id, world.matrix_user("alice"), world.lm_user("hubert"));
    let alices = ghost(Side::Matrix, "alice");
    assert!(world.matrix_join(&gateway, matrix, &alice).await.is_err());
    // When the knock is taken, the ghost has knocked at the hub, and its knock is the knock's image.
    hand(&world, &gateway, matrix, &alice, "knock").await.unwrap();
    let at_hub = world.server.state(&lm, "m.room.member", &alices).await.unwrap();
    assert_eq!((&at_hub["membership"], &at_hub["reason"]), (&json!("knock"), &json!("please")));
    so("both in step", || gateway.in_step(&portal)).await;
    let of_alice = |event: &Appended| event.event.state_key.as_deref() == Some(alices.as_str());
    assert_eq!(world.server.log(&lm).await.iter().filter(|event| of_alice(event)).count(), 1, "one knock");
    // Taken back, and again.
    hand(&world, &gateway, matrix, &alice, "leave").await.unwrap();
    so("it is taken back at the hub", || async { world.server.membership(&lm, &alices).await == "leave" }).await;
    hand(&world, &gateway, matrix, &alice, "knock").await.unwrap();
    assert_eq!(world.server.membership(&lm, &alices).await, "knock");
    // Let in.
    world.peer.signs_invites(gateway.dag.room(matrix).await.unwrap().unwrap().version);
    world.lm_send(&lm, draft(&hubert, "m.room.member", Some(&alices), json!({ "membership": "invite" }))).await;
    so("alice is invited", || async {
        gateway.matrix_member(matrix, alice.as_str()).await.is_some_and(|content| content["membership"] == "invite")
    })
    .await;
    world.matrix_join(&gateway, matrix, &alice).await.unwrap();
    assert_eq!(world.server.membership(&lm, &alices).await, "join");
    so("both in step", || gateway.in_step(&portal)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_knock_that_the_hub_does_not_take_or_turns_away_is_over_on_matrix_too() {
    let (world, gateway) = World::new(json!({})).await;
    let (lm, portal) = knocking_from_lm(&world, &gateway).await;
    let (matrix, hubert) = (&portal.matrix_room_id, world.lm_user("hubert"));
    let [alice, mallory] = ["alice", "mallory"].map(|name| world.matrix_user(name));
    let ban = draft(&hubert, "m.room.member", Some(&ghost(Side::Matrix, "mallory")), json!({ "membership": "ban" }));
    world.lm_send(&lm, ban).await;
    let refused = hand(&world, &gateway, matrix, &mallory, "knock").await;
    assert!(refused.is_err());
    assert_ne!(
        gateway.matrix_member(matrix, mallory.as_str()).await.unwrap_or_default().get("membership"),
        Some(&json!("knock"))
    );
    hand(&world, &gateway, matrix, &alice, "knock").await.unwrap();
    let kick = draft(&hubert, "m.room.member", Some(&ghost(Side::Matrix, "alice")), json!({ "membership": "leave" }));
    world.lm_send(&lm, kick).await;
    so("alice is turned away", || async {
        gateway.matrix_member(matrix, alice.as_str()).await.is_some_and(|content| content["membership"] == "leave")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_lm_user_knocks_and_is_let_in_from_matrix() {
    let (world, gateway) = World::new(json!({})).await;
    let new = NewPortal { join_rule: Some("knock".to_owned()), ..NewPortal::default() };
    let portal = gateway.bridge.create_portal(new).await.unwrap();
    let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
    let (alice, bob) = (world.matrix_user("alice"), world.lm_user("bob"));
    world.peer.signs_invites(gateway.dag.room(matrix).await.unwrap().unwrap().version);
    gateway.bridge.invite(&portal.portal_id, &alice).await.unwrap();
    let mut view = world.matrix_join(&gateway, matrix, &alice).await.unwrap();
    gateway.bridge.set_power(&portal.portal_id, &alice, 50).await.unwrap();
    world.refresh(&gateway, &mut view).await;
    let via = [OWN.try_into().unwrap()];
    let knock = async || world.server.lm.knock(lm, &bob, &via, object(json!({ "reason": "please" }))).await;
    let is_on_matrix = async |membership: &str| {
        let content = gateway.matrix_member(matrix, &ghost(Side::Lm, "bob")).await;
        content.is_some_and(|content| content["membership"] == membership)
    };
    knock().await.unwrap();
    so("the ghost knocks on Matrix", || is_on_matrix("knock")).await;
    assert_eq!(gateway.matrix_member(matrix, &ghost(Side::Lm, "bob")).await.unwrap()["reason"], "please");
    world.server.lm.leave(lm, &bob, &via).await.unwrap();
    so("the ghost takes it back", || is_on_matrix("leave")).await;
    knock().await.unwrap();
    so("the ghost knocks again", || is_on_matrix("knock")).await;
    world.refresh(&gateway, &mut view).await;
    let invite = json!({ "membership": "invite" });
    world.matrix_send(&gateway, &mut view, &alice, "m.room.member", Some(&ghost(Side::Lm, "bob")), invite).await;
    so("bob is invited", || async { gateway.node.membership(lm, bob.as_str()).await == "invite" }).await;
    world.lm_join(lm, "bob").await.unwrap();
    so("the ghost has joined", || is_on_matrix("join")).await;
    so("both in step", || gateway.in_step(&portal)).await;
    // Whom the Matrix side does not have cannot knock on LM either.
    let mallory = ghost(Side::Lm, "mallory");
    world.refresh(&gateway, &mut view).await;
    let ban = json!({ "membership": "ban" });
    world.matrix_send(&gateway, &mut view, &alice, "m.room.member", Some(&mallory), ban).await;
    let knocks = async || world.server.lm.knock(lm, &world.lm_user("mallory"), &via, object(json!({}))).await;
    assert!(matches!(knocks().await, Err(Refusal::Forbidden(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_knocks_at_a_foreign_hub_spends_of_the_portals_budget() {
    let (world, gateway) = World::new(json!({ "budgets": { "ghosts_per_hour": 2 } })).await;
    let (lm, portal) = knocking_from_lm(&world, &gateway).await;
    for name in ["alice", "bert"] {
        hand(&world, &gateway, &portal.matrix_room_id, &world.matrix_user(name), "knock").await.unwrap();
    }
    let refusal =
        hand(&world, &gateway, &portal.matrix_room_id, &world.matrix_user("carl"), "knock").await.unwrap_err();
    assert_eq!(refusal.code(), "budget", "{refusal}");
    assert!(world.server.state(&lm, "m.room.member", &ghost(Side::Matrix, "carl")).await.is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_knock_that_comes_late_stays_for_one_who_has_knocked_again() {
    let (world, gateway) = World::new(json!({})).await;
    let (lm, portal) = knocking_from_lm(&world, &gateway).await;
    let (matrix, alice, alices) = (&portal.matrix_room_id, world.matrix_user("alice"), ghost(Side::Matrix, "alice"));
    let (open, is_open) = tokio::sync::watch::channel(false);
    *world.server.meddler.lock().unwrap() = Some(Arc::new(move |request, next| {
        let mut is_open = is_open.clone();
        Box::pin(async move {
            if request.uri().path().contains("/send/") {
                let _ = is_open.wait_for(|is_open| *is_open).await;
            }
            next.run(request).await
        })
    }));
    let first = hand(&world, &gateway, matrix, &alice, "knock").await.unwrap_err();
    assert!(first.to_string().contains("has not answered the knock"), "{first}");
    let key = ("m.room.member".to_owned(), alices.clone());
    let coming = || async {
        let coming = gateway.node.lm.on_its_way(&lm, std::slice::from_ref(&key)).await.unwrap();
        coming.get(&key).map(|coming| coming.lpdu_id.clone())
    };
    let before = coming().await.unwrap();
    // Both knocks wait when the hub goes on.
    let opening = async {
        so("the second one waits too", || async { coming().await.is_some_and(|id| id != before) }).await;
        open.send(true).unwrap();
    };
    let (again, ()) = tokio::join!(hand(&world, &gateway, matrix, &alice, "knock"), opening);
    again.unwrap();
    // What the gateway would have sent after the first knock goes before this.
    world.matrix_join(&gateway, matrix, &world.matrix_user("bert")).await.unwrap_err();
    hand(&world, &gateway, matrix, &world.matrix_user("bert"), "knock").await.unwrap();
    assert_eq!(world.server.membership(&lm, &alices).await, "knock");
    assert_eq!(gateway.matrix_member(matrix, alice.as_str()).await.unwrap()["membership"], "knock");
}
