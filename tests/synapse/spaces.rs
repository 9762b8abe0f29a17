//! The space of an LM hub, as users of a Synapse see it.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::testbed::client::{Client, segment};
use crate::support::world::on_both;

/// What the Synapse shows of a space: the rooms in it, or none yet.
async fn rooms(client: &Client, space: &str) -> Vec<Value> {
    let path = format!("/_matrix/client/v1/rooms/{}/hierarchy?limit=50", segment(space));
    let page = client.call(Method::GET, &path, None).await.unwrap();
    page["rooms"].as_array().unwrap().clone()
}

/// Waits until a room is in the space, or is not; how it is shown. Synapses keep what they have asked others for some minutes, so
/// that each time somebody else asks another Synapse.
async fn held(client: &Client, space: &str, room: &str, is_held: bool) -> Option<Value> {
    for _ in 0..120 {
        let state = client.full_state(space).await.unwrap();
        let holds = |event: &Value| {
            event["type"] == "m.space.child" && event["state_key"] == room && event["content"]["via"].is_array()
        };
        if state.iter().any(holds) == is_held {
            let found = rooms(client, space).await.into_iter().find(|shown| shown["room_id"] == room);
            if found.is_some() == is_held {
                return found;
            }
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    panic!("{room} in {space}: expected {is_held}");
}

#[test]
fn the_space_of_a_hub_holds_its_rooms_as_long_as_they_are_connected() {
    on_both(async |world| {
        let (_, lm_room) = world.lm_room("parlour");
        let alice = world.user(world.a, "alice-parlour", "Alice").await;
        let carol = world.user(world.b, "carol-parlour", "Carol").await;
        let room = alice.join(&world.alias("parlour", &world.a.server_name), &[]).await.unwrap();
        world.hub.wait_for_member(&lm_room, &world.ghost_of(&alice.user_id), "join").await.unwrap();
        let alias = format!("#hub_hub.example:{}", world.gateway.server_name);
        let space = carol.join(&alias, &[]).await.unwrap();
        assert_eq!(carol.state(&space, "m.room.create", "").await.unwrap().unwrap()["type"], "m.space");
        let shown = held(&carol, &space, &room, true).await.unwrap();
        assert_eq!((&shown["name"], &shown["join_rule"]), (&json!("The parlour"), &json!("public")), "{shown}");
        // The room says so too.
        let parent = alice.wait_for_state(&room, "m.space.parent", &space, |content| content["via"].is_array());
        assert_eq!(parent.await.unwrap()["content"]["canonical"], json!(true));

        let portals = world.gateway.admin(Method::GET, "/portals?limit=1000", None).await.unwrap();
        let portals = portals["portals"].as_array().unwrap();
        let portal = portals.iter().find(|portal| portal["matrix_room_id"] == room.as_str()).unwrap();
        let path = format!("/portals/{}", portal["portal_id"].as_str().unwrap());
        world.gateway.admin(Method::DELETE, &path, None).await.unwrap();
        held(&carol, &space, &room, false).await;
    });
}
