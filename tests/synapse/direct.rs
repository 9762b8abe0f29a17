//! Direct chats as Element makes them, with users of an LM provider who are in no room with anybody here yet.

use std::time::Duration;

use reqwest::Method;
use ruma::OwnedUserId;
use serde_json::{Value, json};

use crate::support::world::{World, on_both, server};

/// What Element sends when somebody starts a chat with one other; with encryption where the other has devices for it, or where it is told to.
fn chat_with(user: &str, encrypted: bool) -> Value {
    let encryption = json!({
        "type": "m.room.encryption", "state_key": "", "content": { "algorithm": "m.megolm.v1.aes-sha2" },
    });
    let guests = json!({ "type": "m.room.guest_access", "state_key": "", "content": { "guest_access": "can_join" } });
    let initial_state = if encrypted { json!([guests, encryption]) } else { json!([guests]) };
    json!({
        "preset": "trusted_private_chat", "visibility": "private", "is_direct": true, "invite": [user],
        "initial_state": initial_state,
    })
}

/// The portal of a Matrix room, when it is in this state.
async fn portal(world: &World, room: &str, state: &str) -> Value {
    for _ in 0..300 {
        let portals = world.gateway.admin(Method::GET, "/portals?limit=1000", None).await.unwrap();
        let portals = portals["portals"].as_array().unwrap().clone();
        if let Some(found) =
            portals.into_iter().find(|portal| portal["matrix_room_id"] == room && portal["state"] == state)
        {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("no portal of {room} is {state}");
}

#[test]
fn a_direct_chat_of_a_synapses_user_reaches_an_lm_user() {
    on_both(async |world| {
        let alice = world.user(world.a, &world.name("alice-dm"), "Alice").await;
        let eve = world.spoke.user(&world.name("eve-dm")).unwrap();
        world.spoke.set_display_name(&eve, "Eve");
        let image = world.image_of(&eve);
        let room = alice.create_room(chat_with(&image, false)).await.unwrap();
        let lm_room = world.spoke.wait_for_invite(&eve).await.unwrap();
        portal(world, &room, "pending").await;
        let via = [server(&world.gateway.server_name)];
        world.spoke.join(&eve, lm_room.as_str(), &via).await.unwrap();
        let member = alice.wait_for_member(&room, &image, "join").await.unwrap();
        assert_eq!(member["content"]["displayname"], "Eve");
        // The two of them, and nobody else.
        let members = alice.members(&room).await.unwrap();
        let joined: Vec<_> = members.iter().filter(|(_, content)| content["membership"] == "join").collect();
        assert_eq!(joined.len(), 2, "{members:?}");
        assert_eq!(world.spoke.display_name(&lm_room, &world.ghost_of(&alice.user_id)), "Alice");

        alice.send_text(&room, "hello Eve").await.unwrap();
        let heard = world.spoke.wait_for_text(&lm_room, "hello Eve").await.unwrap();
        assert_eq!(heard.sender, world.ghost_of(&alice.user_id));
        world.spoke.send_text(&eve, &lm_room, "hello Alice").unwrap();
        assert_eq!(alice.wait_for_text(&room, "hello Alice").await.unwrap()["sender"], image.as_str());
        assert_eq!(world.spoke.complaints(&lm_room), [""; 0]);

        // Eve goes, and both know that nothing is left of it.
        world.spoke.leave(&eve, &lm_room).await.unwrap();
        alice.wait_for_member(&room, &image, "leave").await.unwrap();
        portal(world, &room, "ended").await;
    });
}

#[test]
fn an_encrypted_direct_chat_is_answered_with_the_reason_why_nobody_comes() {
    on_both(async |world| {
        let alice = world.user(world.a, &world.name("alice-e2e"), "Alice").await;
        let eve = world.spoke.user(&world.name("eve-e2e")).unwrap();
        let image = world.image_of(&eve);
        let room = alice.create_room(chat_with(&image, true)).await.unwrap();
        let is_told = |event: &Value| {
            let body = event["content"]["body"].as_str().unwrap_or_default();
            event["type"] == "m.room.message" && event["sender"] == image.as_str() && body.contains("encrypted")
        };
        alice.wait_for(&room, "the reason", is_told).await.unwrap();
        let left = alice.wait_for_member(&room, &image, "leave").await.unwrap();
        assert!(left["content"]["reason"].as_str().unwrap().contains("encrypted"), "{left}");
        // As she is told, without encryption it goes.
        let room = alice.create_room(chat_with(&image, false)).await.unwrap();
        let lm_room = world.spoke.wait_for_invite(&eve).await.unwrap();
        world.spoke.join(&eve, lm_room.as_str(), &[server(&world.gateway.server_name)]).await.unwrap();
        alice.wait_for_member(&room, &image, "join").await.unwrap();
    });
}

#[test]
fn a_direct_chat_is_declined_and_taken_back() {
    on_both(async |world| {
        let alice = world.user(world.a, &world.name("alice-no"), "Alice").await;
        let eve = world.spoke.user(&world.name("eve-no")).unwrap();
        let image = world.image_of(&eve);
        let room = alice.create_room(chat_with(&image, false)).await.unwrap();
        let lm_room = world.spoke.wait_for_invite(&eve).await.unwrap();
        world.spoke.leave(&eve, &lm_room).await.unwrap();
        alice.wait_for_member(&room, &image, "leave").await.unwrap();
        portal(world, &room, "ended").await;

        let mallory = world.spoke.user(&world.name("mallory-no")).unwrap();
        let image = world.image_of(&mallory);
        // In a chat of two both have all power, and nobody is sent out: here alice has more.
        let room = json!({ "preset": "private_chat", "name": "The nook", "invite": [image] });
        let room = alice.create_room(room).await.unwrap();
        let lm_room = world.spoke.wait_for_invite(&mallory).await.unwrap();
        portal(world, &room, "pending").await;
        alice.kick(&room, &image, "a mistake").await.unwrap();
        portal(world, &room, "ended").await;
        let via = [server(&world.gateway.server_name)];
        world.spoke.join(&mallory, lm_room.as_str(), &via).await.unwrap_err();
    });
}

#[test]
fn a_direct_chat_of_an_lm_user_reaches_a_synapses_user() {
    on_both(async |world| {
        let alice = world.user(world.a, &world.name("alice-from"), "Alice").await;
        let eve = world.hub.user(&world.name("eve-from")).unwrap();
        world.hub.set_display_name(&eve, "Eve");
        let new = crate::support::provider::NewRoom {
            join_rule: Some("invite".to_owned()),
            name: Some("Eve and Alice".to_owned()),
            ..Default::default()
        };
        let lm_room = world.hub.create_room(&eve, new).unwrap();
        let ghost: OwnedUserId = world.ghost_of(&alice.user_id).try_into().unwrap();
        let image = world.image_of(&eve);
        world.hub.invite(&eve, &lm_room, &ghost).await.unwrap();
        let room = alice.wait_for_invite().await.unwrap();
        let shown = alice.invite_state(&room).await;
        let of = |kind: &str, key: &str| {
            shown.iter().find(|event| event["type"] == kind && event["state_key"] == key).cloned().unwrap_or_default()
        };
        assert_eq!(of("m.room.name", "")["content"]["name"], "Eve and Alice", "{shown:?}");
        assert_eq!(of("m.room.member", &alice.user_id)["sender"], image.as_str(), "{shown:?}");

        alice.join(&room, &[&world.gateway.server_name]).await.unwrap();
        let is_named = |content: &Value| content["displayname"] == "Eve" && content["membership"] == "join";
        alice.wait_for_state(&room, "m.room.member", &image, is_named).await.unwrap();
        world.hub.wait_for_member(&lm_room, ghost.as_str(), "join").await.unwrap();
        world.hub.send_text(&eve, &lm_room, "hello Alice").unwrap();
        alice.wait_for_text(&room, "hello Alice").await.unwrap();
        alice.send_text(&room, "hello Eve").await.unwrap();
        assert_eq!(world.hub.wait_for_text(&lm_room, "hello Eve").await.unwrap().sender, ghost);

        // Another invite is declined, and the LM user sees that.
        let new = crate::support::provider::NewRoom { join_rule: Some("invite".to_owned()), ..Default::default() };
        let second = world.hub.create_room(&eve, new).unwrap();
        let carol = world.user(world.b, &world.name("carol-from"), "Carol").await;
        let ghost: OwnedUserId = world.ghost_of(&carol.user_id).try_into().unwrap();
        world.hub.invite(&eve, &second, &ghost).await.unwrap();
        let room = carol.wait_for_invite().await.unwrap();
        carol.leave(&room).await.unwrap();
        world.hub.wait_for_member(&second, ghost.as_str(), "leave").await.unwrap();
        portal(world, &room, "ended").await;
        assert_eq!(world.hub.complaints(&lm_room), [""; 0]);
    });
}
