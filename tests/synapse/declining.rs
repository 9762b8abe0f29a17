//! Invites into portals that are there, declined by who was invited, on either side.

use reqwest::Method;
use ruma::{OwnedRoomId, OwnedUserId};
use serde_json::json;

use crate::support::testbed::client::string;
use crate::support::world::{on_both, server};

#[test]
fn who_declines_an_invite_into_a_room_of_the_gateway_declines_on_the_other_side_too() {
    on_both(async |world| {
        let alias = world.name("regrets");
        let made = json!({ "kind": "create", "name": "Regrets", "alias": alias, "join_rule": "public" });
        let made = world.gateway.admin(Method::POST, "/portals", Some(made)).await.unwrap();
        let room = string(&made, "matrix_room_id").unwrap();
        let lm_room: OwnedRoomId = string(&made, "lm_room_id").unwrap().try_into().unwrap();
        let alice = world.user(world.a, "alice-regrets", "Alice").await;
        let eve = world.spoke.user(&world.name("eve-regrets")).unwrap();
        alice.join(&room, &[&world.gateway.server_name]).await.unwrap();
        world.spoke.join(&eve, lm_room.as_str(), &[server(&world.gateway.server_name)]).await.unwrap();
        alice.wait_for_member(&room, &world.image_of(&eve), "join").await.unwrap();

        let frank = world.hub.user(&world.name("frank-regrets")).unwrap();
        alice.invite(&room, &world.image_of(&frank)).await.unwrap();
        assert_eq!(world.hub.wait_for_invite(&frank).await.unwrap(), lm_room);
        world.spoke.wait_for_member(&lm_room, frank.as_str(), "invite").await.unwrap();
        world.hub.leave(&frank, &lm_room).await.unwrap();
        alice.wait_for_member(&room, &world.image_of(&frank), "leave").await.unwrap();

        let carol = world.user(world.b, &world.name("carol-regrets"), "Carol").await;
        let ghost: OwnedUserId = world.ghost_of(&carol.user_id).try_into().unwrap();
        world.spoke.invite(&eve, &lm_room, &ghost).await.unwrap();
        let invited = carol.wait_for_invite().await.unwrap();
        assert_eq!(invited, room);
        carol.leave(&invited).await.unwrap();
        world.spoke.wait_for_member(&lm_room, ghost.as_str(), "leave").await.unwrap();
        assert_eq!(world.spoke.complaints(&lm_room), [""; 0]);
    });
}

#[test]
fn who_declines_an_invite_into_a_room_of_an_lm_hub_declines_on_the_other_side_too() {
    on_both(async |world| {
        let (bob, lm_room) = world.lm_room("excuses");
        let alice = world.user(world.a, "alice-excuses", "Alice").await;
        let room = alice.join(&world.alias("excuses", &world.a.server_name), &[]).await.unwrap();
        world.hub.wait_for_member(&lm_room, &world.ghost_of(&alice.user_id), "join").await.unwrap();
        alice.wait_for_member(&room, &world.image_of(&bob), "join").await.unwrap();

        let carol = world.user(world.b, &world.name("carol-excuses"), "Carol").await;
        let ghost: OwnedUserId = world.ghost_of(&carol.user_id).try_into().unwrap();
        world.hub.invite(&bob, &lm_room, &ghost).await.unwrap();
        let invited = carol.wait_for_invite().await.unwrap();
        assert_eq!(invited, room);
        carol.leave(&invited).await.unwrap();
        world.hub.wait_for_member(&lm_room, ghost.as_str(), "leave").await.unwrap();

        let frank = world.spoke.user(&world.name("frank-excuses")).unwrap();
        alice.invite(&room, &world.image_of(&frank)).await.unwrap();
        assert_eq!(world.spoke.wait_for_invite(&frank).await.unwrap(), lm_room);
        world.hub.wait_for_member(&lm_room, frank.as_str(), "invite").await.unwrap();
        world.spoke.leave(&frank, &lm_room).await.unwrap();
        alice.wait_for_member(&room, &world.image_of(&frank), "leave").await.unwrap();
        assert_eq!(world.hub.complaints(&lm_room), [""; 0]);
    });
}
