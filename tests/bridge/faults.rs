//! The gateway is broken off in the middle, again and again.

use std::collections::BTreeMap;
use std::time::Duration;

use isthmus::bridge::{Cause, NewPortal};
use serde_json::json;

use super::world::{Gateway, LM, World, so};

/// How many messages each side sends, and how often the gateway is broken off meanwhile.
const MESSAGES: usize = 60;
const KILLS: usize = 6;

/// Each body once, and those of each sender in order.
#[track_caller]
fn assert_complete(side: &str, said: &[(String, String)], senders: &[String]) {
    let mut by_sender: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (sender, body) in said {
        by_sender.entry(sender).or_default().push(body);
    }
    for sender in senders {
        let expected: Vec<String> = (0..MESSAGES).map(|number| number.to_string()).collect();
        assert_eq!(by_sender.get(sender.as_str()).cloned().unwrap_or_default(), expected, "{sender} on {side}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_5_hc_82_nothing_is_lost_or_doubled_when_a_hub_is_broken_off() {
    let (world, gateway) = World::new(json!({})).await;
    let new = NewPortal { join_rule: Some("public".to_owned()), ..NewPortal::default() };
    let portal = gateway.bridge.create_portal(new).await.unwrap();
    world.lm_join(&portal.lm_room_id, "bob").await.unwrap();
    talk_and_break(&world, gateway, &portal).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_5_hc_36_nothing_is_lost_or_doubled_when_a_participant_is_broken_off() {
    let (world, gateway) = World::new(json!({})).await;
    let creator = world.lm_user("bob");
    let initial_state =
        vec![super::world::draft(&creator, "m.room.join_rules", Some(""), json!({ "join_rule": "public" }))];
    let version = isthmus::event::RoomVersion::Lm02;
    let room = isthmus::lm::NewRoom { creator, version, initial_state };
    let lm = world.server.lm.create_room(room).await.unwrap();
    let via = [LM.try_into().unwrap()];
    let portal = gateway.bridge.portal_from_lm(&lm, &via, None, Cause::Admin).await.unwrap();
    talk_and_break(&world, gateway, &portal).await;
}

async fn talk_and_break(world: &World, gateway: Gateway, portal: &isthmus::bridge::Portal) {
    use isthmus::identity::Side;
    let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
    let alice = world.matrix_user("alice");
    let mut view = world.matrix_join(&gateway, matrix, &alice).await.unwrap();
    let mut gateway = gateway;
    for number in 0..MESSAGES {
        world.matrix_say(&gateway, &mut view, &alice, &number.to_string()).await;
        world.lm_say(lm, "bob", &number.to_string()).await;
        if number % (MESSAGES / KILLS) == 3 {
            // A moment in which something is under way, another one each time.
            tokio::time::sleep(Duration::from_millis(u64::try_from(number).unwrap() % 17)).await;
            gateway = world.kill(gateway).await;
        }
    }
    so("all is carried over", || async {
        gateway.in_step(portal).await
            && gateway.matrix_bodies(matrix).await.len() >= 2 * MESSAGES
            && world.server.bodies(lm).await.len() >= 2 * MESSAGES
    })
    .await;
    let in_log = world.server.bodies(lm).await;
    let in_graph = gateway.matrix_bodies(matrix).await;
    let (bob, bobs_ghost) = (world.lm_user("bob").to_string(), super::world::ghost(Side::Lm, "bob"));
    let alices_ghost = super::world::ghost(Side::Matrix, "alice");
    assert_complete("the hub", &in_log, &[alices_ghost, bob]);
    assert_complete("Matrix", &in_graph, &[alice.to_string(), bobs_ghost]);
    assert_eq!(in_log.len(), 2 * MESSAGES);
    assert_eq!(in_graph.len(), 2 * MESSAGES);
}
