//! Two gateways: neither carries the other's images back, and a loop is stopped.

use isthmus::bridge::{Cause, NewPortal, PortalState};
use ruma::UserId;
use serde_json::json;

use super::from_lm::room;
use super::world::{Gateway, LM, MATRIX, OTHER, World, so};
use crate::dag::OWN;
use crate::dag::peer::Peer;

/// The bodies of a Matrix room, when nothing waits any more.
async fn said(gateway: &Gateway, room: &ruma::RoomId) -> Vec<String> {
    gateway.matrix_bodies(room).await.into_iter().map(|(_, body)| body).collect()
}

fn sorted(mut bodies: Vec<String>) -> Vec<String> {
    bodies.sort();
    bodies
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_7_hc_66_two_gateways_of_one_lm_room_do_not_echo_each_others_images() {
    let (world, one) = World::new(json!({})).await;
    let two = world.other_gateway().await;
    let lm = room(&world, "public").await;
    let via = [LM.try_into().unwrap()];
    let first = one.bridge.portal_from_lm(&lm, &via, None, Cause::Admin).await.unwrap();
    let second = two.bridge.portal_from_lm(&lm, &via, None, Cause::Admin).await.unwrap();
    // Alice is in both Matrix rooms, which makes it no loop yet.
    let (alice, carol) = (world.matrix_user("alice"), world.matrix_user("carol"));
    let mut at_one = world.matrix_join(&one, &first.matrix_room_id, &alice).await.unwrap();
    let mut at_two = world.matrix_join(&two, &second.matrix_room_id, &carol).await.unwrap();
    world.matrix_join(&two, &second.matrix_room_id, &alice).await.unwrap();
    so("the first in step", || one.in_step(&first)).await;
    so("the second in step", || two.in_step(&second)).await;
    for number in 0..5 {
        world.matrix_say(&one, &mut at_one, &alice, &format!("alice {number}")).await;
        world.matrix_say(&two, &mut at_two, &carol, &format!("carol {number}")).await;
        world.lm_say(&lm, "hubert", &format!("hubert {number}")).await;
    }
    let mut all: Vec<String> =
        (0..5).flat_map(|n| ["alice", "carol", "hubert"].map(|name| format!("{name} {n}"))).collect();
    all.sort();
    for (gateway, portal) in [(&one, &first), (&two, &second)] {
        so("everything everywhere", || async {
            said(gateway, &portal.matrix_room_id).await.len() >= all.len() && gateway.in_step(portal).await
        })
        .await;
    }
    // One more round trip, after which an echo would be there.
    world.matrix_say(&one, &mut at_one, &alice, "last").await;
    so("the last", || async { said(&two, &second.matrix_room_id).await.contains(&"last".to_owned()) }).await;
    world.matrix_say(&two, &mut at_two, &carol, "really").await;
    so("really the last", || async { said(&one, &first.matrix_room_id).await.contains(&"really".to_owned()) }).await;
    all.extend(["last".to_owned(), "really".to_owned()]);
    for bodies in [
        said(&one, &first.matrix_room_id).await,
        said(&two, &second.matrix_room_id).await,
        world.server.bodies(&lm).await.into_iter().map(|(_, body)| body).collect(),
    ] {
        assert_eq!(sorted(bodies), sorted(all.clone()));
    }
    for (gateway, portal) in [(&one, &first), (&two, &second)] {
        assert_eq!(gateway.bridge.portal(&portal.portal_id).await.unwrap().unwrap().state, PortalState::Active);
    }
    // Each image says where it came from, one step back; nothing of the step before that is left.
    let from_two = world.server.log(&lm).await.into_iter().find(|event| {
        event.event.sender.as_str() == format!("@mx_carol_{MATRIX}:{OTHER}")
            && event.event.content().get("body").is_some_and(|body| body == "carol 1")
    });
    let from_two = from_two.unwrap().event;
    assert_eq!(from_two.content()["im.isthmus.source"]["sender"], carol.as_str());
    let image = one.bridge.explain(&from_two.event_id).await.unwrap().unwrap().across.unwrap();
    let image = one.dag.event(&image).await.unwrap().unwrap();
    assert_eq!(image.content["im.isthmus.source"]["sender"], from_two.sender.as_str());
    assert_eq!(image.content["im.isthmus.source"]["event_id"], from_two.event_id.as_str());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_of_a_gateways_room_carries_once() {
    let (world, one) = World::new(json!({})).await;
    let two = world.other_gateway().await;
    let new = NewPortal { join_rule: Some("public".to_owned()), ..NewPortal::default() };
    let first = one.bridge.create_portal(new).await.unwrap();
    let via = [OWN.try_into().unwrap()];
    let second = two.bridge.portal_from_lm(&first.lm_room_id, &via, None, Cause::Admin).await.unwrap();
    let (alice, carol) = (world.matrix_user("alice"), world.matrix_user("carol"));
    let mut at_one = world.matrix_join(&one, &first.matrix_room_id, &alice).await.unwrap();
    let mut at_two = world.matrix_join(&two, &second.matrix_room_id, &carol).await.unwrap();
    world.matrix_say(&one, &mut at_one, &alice, "from one").await;
    so("heard at two", || async { said(&two, &second.matrix_room_id).await == ["from one"] }).await;
    world.matrix_say(&two, &mut at_two, &carol, "from two").await;
    so("heard at one", || async { said(&one, &first.matrix_room_id).await == ["from one", "from two"] }).await;
    so("the first in step", || one.in_step(&first)).await;
    so("the second in step", || two.in_step(&second)).await;
    assert_eq!(said(&two, &second.matrix_room_id).await, ["from one", "from two"]);
    assert_eq!(one.node.bodies(&first.lm_room_id).await.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_portal_whose_rooms_another_gateway_connects_is_suspended() {
    let (world, gateway) = World::new(json!({})).await;
    let other = world.other_server().await;
    // On the Matrix side the other gateway is this homeserver, with the same key.
    let mut peer = Peer::start(OTHER).await;
    peer.key = other.context.signing_key.clone();
    let bot = UserId::parse(format!("@isthmus:{OTHER}")).unwrap();
    let new = NewPortal { join_rule: Some("public".to_owned()), ..NewPortal::default() };
    let portal = gateway.bridge.create_portal(new).await.unwrap();
    let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
    let alice = world.matrix_user("alice");
    let mut view = world.matrix_join(&gateway, matrix, &alice).await.unwrap();
    other.lm.join(lm, &bot, &[OWN.try_into().unwrap()], Default::default()).await.unwrap();
    so("both states in step", || gateway.in_step(&portal)).await;
    let state = || async {
        let portal = gateway.bridge.portal(&portal.portal_id).await.unwrap().unwrap();
        (portal.state, portal.reason.clone())
    };
    assert_eq!(state().await.0, PortalState::Active, "in one of the rooms it is a user like others");

    World::matrix_join_from(&peer, &gateway, matrix, &bot).await.unwrap();
    so("the suspension", || async { state().await.0 == PortalState::Suspended }).await;
    assert_eq!(state().await.1, Some(format!("a loop: {OTHER} connects the same two rooms")));
    world.matrix_say(&gateway, &mut view, &alice, "nobody hears me").await;
    let health = gateway.bridge.health(&portal.portal_id).await.unwrap();
    assert!(health.waiting.iter().all(|waiting| waiting.count == 0));
    assert!(gateway.node.bodies(lm).await.is_empty());
}
