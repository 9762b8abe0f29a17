//! Two gateways: neither carries the other's images back, and a loop is stopped.

use isthmus::bridge::{Cause, PortalState};
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
    let first = one.public_portal().await;
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
async fn of_another_gateway_of_the_same_two_rooms_nothing_is_carried_back_and_nobody_else_is_stopped() {
    let (world, gateway) = World::new(json!({})).await;
    let other = world.other_server().await;
    // On the Matrix side the other gateway is this homeserver, with the same key.
    let mut peer = Peer::start(OTHER).await;
    peer.key = other.context.signing_key.clone();
    let user = |localpart: &str| UserId::parse(format!("@{localpart}:{OTHER}")).unwrap();
    let (bot, image, carol) = (user("isthmus"), user("mx_alice_matrix.example"), user("carol"));
    let portal = gateway.public_portal().await;
    let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
    let alice = world.matrix_user("alice");
    world.matrix_join(&gateway, matrix, &alice).await.unwrap();
    for user in [&bot, &image, &carol] {
        other.lm.join(lm, user, &[OWN.try_into().unwrap()], Default::default()).await.unwrap();
    }
    so("both states in step", || gateway.in_step(&portal)).await;
    let says = async |user: &UserId, body: &str| {
        let outgoing = isthmus::seam::Outgoing { draft: super::world::message(user, body), effect: None };
        other.lm.send(lm, vec![outgoing]).await.pop().unwrap().unwrap();
    };
    says(&image, "in one of the rooms it is a user like others").await;
    so("a user like others", || async { said(&gateway, matrix).await.len() == 1 }).await;

    let mut view = World::matrix_join_from(&peer, &gateway, matrix, &bot).await.unwrap();
    so("both states in step", || gateway.in_step(&portal)).await;
    says(&image, "carried back").await;
    let refused = || async { gateway.bridge.health(&portal.portal_id).await.unwrap().refusals };
    so("the refusal", || async { refused().await.iter().any(|refused| refused.code == "loop") }).await;
    let late = World::matrix_join_from(&peer, &gateway, matrix, &user("lm_bob_lm.example")).await;
    assert_eq!(late.map(drop).unwrap_err().code(), "loop");
    // Everybody else goes on, also others of that server.
    says(&carol, "and I?").await;
    so("carol is heard", || async { said(&gateway, matrix).await.contains(&"and I?".to_owned()) }).await;
    world.refresh(&gateway, &mut view).await;
    world.matrix_say(&gateway, &mut view, &alice, "we go on").await;
    so("alice is heard", || async { gateway.node.bodies(lm).await.iter().any(|(_, body)| body == "we go on") }).await;
    assert!(!said(&gateway, matrix).await.contains(&"carried back".to_owned()));
    assert_eq!(gateway.bridge.portal(&portal.portal_id).await.unwrap().unwrap().state, PortalState::Active);
    // The other gateway goes, and what its ghosts say is nobody's echo any more.
    let leave = json!({ "membership": "leave" });
    let (_, event) = view.add(&peer, &bot, "m.room.member", Some(bot.as_str()), leave);
    peer.put(&gateway.dag, &[&event]).await.pop().unwrap().result.unwrap();
    so("both states in step", || gateway.in_step(&portal)).await;
    says(&image, "a user again").await;
    so("a user like others", || async { said(&gateway, matrix).await.contains(&"a user again".to_owned()) }).await;
}
