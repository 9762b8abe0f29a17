//! Rooms that LM servers and graph servers share: as portals that are one room, and as the far room of a portal.

use isthmus::bridge::{Cause, NewPortal, PortalKind, PortalState};
use isthmus::event::RoomVersion;
use isthmus::identity::Side;
use isthmus::lm::{NewRoom, Role};
use ruma::{OwnedRoomId, RoomId};
use serde_json::json;

use super::world::{LM, Node, World, draft, ghost, so};

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
