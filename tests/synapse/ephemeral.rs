//! Typing and read receipts, as clients of a Synapse send and see them, and as LM servers do.

use serde_json::{Value, json};

use crate::support::world::on_both;

#[test]
fn typing_is_seen_on_the_other_side() {
    on_both(async |world| {
        let (bob, lm_room) = world.lm_room("desk");
        let alice = world.user(world.a, "alice-desk", "Alice").await;
        let room = alice.join(&world.alias("desk", &world.a.server_name), &[]).await.unwrap();
        let (ghost, image) = (world.ghost_of(&alice.user_id), world.image_of(&bob));
        world.hub.wait_for_member(&lm_room, &ghost, "join").await.unwrap();

        // By the draft's shape, since the provider does LM alone.
        let says = |typing: bool| {
            let (ghost, lm_room) = (ghost.clone(), lm_room.clone());
            move |edu: &Value| {
                let content = json!({ "room_id": lm_room, "user_id": ghost, "typing": typing });
                *edu == json!({ "type": "m.typing", "sender": ghost, "content": content })
            }
        };
        for typing in [true, false] {
            alice.set_typing(&room, typing).await.unwrap();
            let (origin, _) = world.hub.wait_for_edu("Alice's typing", says(typing)).await.unwrap();
            assert_eq!(origin, world.gateway.server_name.as_str());
        }

        for typing in [true, false] {
            world.hub.set_typing(&bob, &lm_room, typing).await;
            // An empty list came for Alice too, so the last counts, once Bob was in any.
            let is_it = |events: &[Value]| {
                let lists = events.iter().filter(|event| event["type"] == "m.typing");
                let has_bob = |event: &Value| event["content"]["user_ids"].as_array().unwrap().contains(&json!(image));
                let lists: Vec<bool> = lists.map(has_bob).collect();
                lists.contains(&true) && lists.last() == Some(&typing)
            };
            alice.wait_for_ephemeral(&room, "Bob's typing", is_it).await.unwrap();
        }
    });
}

#[test]
fn read_receipts_are_seen_on_the_other_side() {
    on_both(async |world| {
        let (bob, lm_room) = world.lm_room("shelf");
        let alice = world.user(world.a, "alice-shelf", "Alice").await;
        let room = alice.join(&world.alias("shelf", &world.a.server_name), &[]).await.unwrap();
        let (ghost, image) = (world.ghost_of(&alice.user_id), world.image_of(&bob));
        let said_by_bob = world.hub.send_text(&bob, &lm_room, "read this").unwrap();
        let heard = alice.wait_for_text(&room, "read this").await.unwrap();
        alice.read(&room, heard["event_id"].as_str().unwrap()).await.unwrap();
        let is_it = |edu: &Value| {
            let receipt = &edu["content"][lm_room.as_str()]["m.read"][&ghost];
            edu["type"] == "m.receipt" && receipt["event_ids"] == json!([said_by_bob])
        };
        world.hub.wait_for_edu("Alice's receipt", is_it).await.unwrap();

        let said_by_alice = alice.send_text(&room, "and this").await.unwrap();
        let heard = world.hub.wait_for_text(&lm_room, "and this").await.unwrap();
        world.hub.read(&bob, &lm_room, &heard.event_id, None).await;
        let is_it = |event: &Value| {
            event["type"] == "m.receipt" && event["content"][&said_by_alice]["m.read"].get(&image).is_some()
        };
        let came = |events: &[Value]| events.iter().any(is_it);
        alice.wait_for_ephemeral(&room, "Bob's receipt", came).await.unwrap();
    });
}
