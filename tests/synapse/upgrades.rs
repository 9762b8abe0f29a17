//! Rooms that users of a Synapse or of an LM hub replace, as clients do it.

use reqwest::Method;
use ruma::OwnedRoomId;
use serde_json::{Value, json};

use crate::support::testbed::client::{Client, segment, string};
use crate::support::world::{World, on_both, server};

/// Replaces a room as clients do: the homeserver makes the next one, and closes the old one.
async fn upgrade(client: &Client, room: &str, version: &str) -> String {
    let path = format!("/_matrix/client/v3/rooms/{}/upgrade", segment(room));
    let answer = client.call(Method::POST, &path, Some(json!({ "new_version": version }))).await.unwrap();
    string(&answer, "replacement_room").unwrap()
}

/// A room of alice's Synapse with an LM room beside it.
async fn exposed(world: &World, alice: &Client, preset: &str, name: &str) -> (String, OwnedRoomId) {
    let room = json!({ "preset": preset, "name": name, "room_version": "11" });
    let room = alice.create_room(room).await.unwrap();
    if preset == "private_chat" {
        // Nobody lets the bot make portals but an admin, by which this one is asked for below.
        alice.set_state(&room, "m.room.join_rules", "", json!({ "join_rule": "public" })).await.unwrap();
    }
    let wish = json!({ "kind": "from_matrix", "matrix_room_id": room, "via": [world.a.server_name] });
    let portal = world.gateway.admin(Method::POST, "/portals", Some(wish)).await.unwrap();
    if preset == "private_chat" {
        alice.set_state(&room, "m.room.join_rules", "", json!({ "join_rule": "invite" })).await.unwrap();
    }
    (room, string(&portal, "lm_room_id").unwrap().try_into().unwrap())
}

/// Where the old log leads.
async fn next_log(world: &World, old: &OwnedRoomId) -> OwnedRoomId {
    let stone = world.spoke.wait_for(old, "the tombstone", |event| event.kind == "m.room.tombstone").await.unwrap();
    stone.content()["replacement_room"].as_str().unwrap().try_into().unwrap()
}

#[test]
fn a_public_room_of_a_synapse_is_upgraded_and_lm_users_follow() {
    on_both(async |world| {
        let alice = world.user(world.a, "alice-attic", "Alice").await;
        let eve = world.spoke.user(&world.name("eve-attic")).unwrap();
        let via = [server(&world.gateway.server_name)];
        let (room, lm_room) = exposed(world, &alice, "public_chat", "The attic").await;
        world.spoke.join(&eve, lm_room.as_str(), &via).await.unwrap();
        alice.wait_for_member(&room, &world.image_of(&eve), "join").await.unwrap();

        let next = upgrade(&alice, &room, "12").await;
        let next_lm = next_log(world, &lm_room).await;
        world.spoke.join(&eve, next_lm.as_str(), &via).await.unwrap();
        alice.wait_for_member(&next, &world.image_of(&eve), "join").await.unwrap();
        alice.send_text(&next, "a new roof").await.unwrap();
        world.spoke.wait_for_text(&next_lm, "a new roof").await.unwrap();
        world.spoke.send_text(&eve, &next_lm, "it is dry").unwrap();
        alice.wait_for_text(&next, "it is dry").await.unwrap();
        // Alice made the room of version 12, and stands above all levels there.
        let levels = world.spoke.state(&next_lm, "m.room.power_levels", "").unwrap();
        assert_eq!(levels["users"][world.ghost_of(&alice.user_id)], json!((1_i64 << 53) - 2), "{levels}");
        // Of the old room nobody of the gateway is left.
        let bot = format!("@isthmus:{}", world.gateway.server_name);
        for user in [&world.image_of(&eve), &bot] {
            alice.wait_for_member(&room, user, "leave").await.unwrap();
        }
        assert_eq!(world.spoke.complaints(&next_lm), [""; 0]);
    });
}

#[test]
fn a_private_room_of_a_synapse_is_upgraded_and_goes_on_when_its_members_are_invited() {
    on_both(async |world| {
        let alice = world.user(world.a, "alice-cellar", "Alice").await;
        let eve = world.spoke.user(&world.name("eve-cellar")).unwrap();
        let via = [server(&world.gateway.server_name)];
        let (room, lm_room) = exposed(world, &alice, "private_chat", "The cellar").await;
        alice.invite(&room, &world.image_of(&eve)).await.unwrap();
        world.spoke.wait_for_invite(&eve).await.unwrap();
        world.spoke.join(&eve, lm_room.as_str(), &via).await.unwrap();
        alice.wait_for_member(&room, &world.image_of(&eve), "join").await.unwrap();

        // Clients close the room first, and then invite who was in it, the gateway's users among them.
        let next = upgrade(&alice, &room, "12").await;
        let told = world.spoke.wait_for(&lm_room, "the notice", |event| {
            event.content().get("body").and_then(Value::as_str).is_some_and(|body| body.contains("is not let"))
        });
        told.await.unwrap();
        let bot = format!("@isthmus:{}", world.gateway.server_name);
        alice.invite(&next, &bot).await.unwrap();
        alice.wait_for_member(&next, &bot, "join").await.unwrap();
        let next_lm = next_log(world, &lm_room).await;
        alice.invite(&next, &world.image_of(&eve)).await.unwrap();
        while world.spoke.wait_for_invite(&eve).await.unwrap() != next_lm {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        world.spoke.join(&eve, next_lm.as_str(), &via).await.unwrap();
        alice.wait_for_member(&next, &world.image_of(&eve), "join").await.unwrap();
        alice.send_text(&next, "mind the steps").await.unwrap();
        world.spoke.wait_for_text(&next_lm, "mind the steps").await.unwrap();
    });
}

#[test]
fn a_room_of_an_lm_hub_is_replaced_and_users_of_a_synapse_follow() {
    on_both(async |world| {
        let (bob, lm_room) = world.lm_room("loft");
        let (builder, next_lm) = world.lm_room("new-loft");
        let alice = world.user(world.a, "alice-loft", "Alice").await;
        let alias = world.alias("loft", &world.a.server_name);
        let room = alice.join(&alias, &[]).await.unwrap();
        world.hub.wait_for_member(&lm_room, &world.ghost_of(&alice.user_id), "join").await.unwrap();
        let content = json!({ "body": "moved", "replacement_room": next_lm });
        world.hub.send(&bob, &lm_room, "m.room.tombstone", Some(""), content).unwrap();
        let stone =
            alice.wait_for_state(&room, "m.room.tombstone", "", |content| content["replacement_room"].is_string());
        let stone = stone.await.unwrap();
        let next = stone["content"]["replacement_room"].as_str().unwrap();
        // As clients do that follow a tombstone: by the server of who wrote it.
        let joined = alice.join(next, &[&world.gateway.server_name]).await.unwrap();
        let create = alice.state(&joined, "m.room.create", "").await.unwrap().unwrap();
        assert_eq!(create["predecessor"]["room_id"], room.as_str());
        alice.send_text(&joined, "more light").await.unwrap();
        world.hub.wait_for_text(&next_lm, "more light").await.unwrap();
        world.hub.send_text(&builder, &next_lm, "and air").unwrap();
        alice.wait_for_text(&joined, "and air").await.unwrap();
        // The homeserver's own alias follows, though nobody asks for it: these are those that it has, and it asks no appservice for them.
        let path = format!("/_matrix/client/v3/rooms/{}/aliases", segment(&joined));
        let follows = async {
            loop {
                let answer = alice.call(Method::GET, &path, None).await.unwrap();
                if answer["aliases"].as_array().is_some_and(|aliases| aliases.contains(&json!(alias))) {
                    return;
                }
                tokio::time::sleep(std::time::Duration::from_millis(200)).await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(120), follows).await.expect("the alias does not follow");
    });
}
