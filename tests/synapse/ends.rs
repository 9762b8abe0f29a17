//! A portal that is removed, as the users of a Synapse and of an LM server see it.

use reqwest::Method;

use crate::support::world::{run, world};

#[test]
fn after_a_goodbye_nobody_of_the_gateway_is_left_and_the_alias_makes_a_new_portal() {
    run(async {
        let world = world().await;
        let (bob, lm_room) = world.lm_room("farewell");
        let alice = world.user(world.a, "alice-farewell", "Alice").await;
        let alias = world.alias("farewell", &world.a.server_name);
        let room = alice.join(&alias, &[]).await.unwrap();
        let ghost = world.ghost_of(&alice.user_id);
        world.hub.wait_for_member(&lm_room, &ghost, "join").await.unwrap();

        let portals = world.gateway.admin(Method::GET, "/portals?limit=1000", None).await.unwrap();
        let portal =
            portals["portals"].as_array().unwrap().iter().find(|portal| portal["matrix_room_id"] == room.as_str());
        let id = portal.unwrap()["portal_id"].as_str().unwrap().to_owned();
        let removed = world.gateway.plan().run(&["portal", "remove", &id, "--config", "isthmus.toml"]).unwrap();
        assert!(removed.contains("\"ended\""), "{removed}");

        let bot = format!("@isthmus:{}", world.gateway.server_name);
        for user in [&world.image_of(&bob), &bot] {
            alice.wait_for_member(&room, user, "leave").await.unwrap();
        }
        let goodbye = alice.wait_for(&room, "the goodbye", |event| {
            event["content"]["body"].as_str().is_some_and(|body| body.starts_with("Goodbye"))
        });
        assert_eq!(goodbye.await.unwrap()["sender"], bot.as_str());
        for user in [&ghost, &bot] {
            world.hub.wait_for_member(&lm_room, user, "leave").await.unwrap();
        }
        assert_eq!(world.hub.complaints(&lm_room), [""; 0]);

        // The alias was taken away, so that the homeserver asks anew.
        let again = async {
            loop {
                let found = alice.join(&alias, &[]).await.unwrap();
                if found != room {
                    return found;
                }
                tokio::time::sleep(std::time::Duration::from_millis(200)).await;
            }
        };
        let again = tokio::time::timeout(std::time::Duration::from_secs(60), again).await.unwrap();
        alice.send_text(&again, "here again").await.unwrap();
        assert_eq!(world.hub.wait_for_text(&lm_room, "here again").await.unwrap().sender, ghost);
        world.hub.send_text(&bob, &lm_room, "welcome").unwrap();
        alice.wait_for_text(&again, "welcome").await.unwrap();
    });
}
