//! Users of a Synapse look into the gateway's public directory: portals of both kinds that anybody may join, while they do.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::testbed::client::Client;
use crate::support::world::on_both;

/// The rooms of the gateway's directory by the Synapse's client API.
async fn directory(client: &Client, gateway: &str, body: Option<Value>) -> Vec<Value> {
    let method = if body.is_some() { Method::POST } else { Method::GET };
    let path = format!("/_matrix/client/v3/publicRooms?server={gateway}");
    let page = client.call(method, &path, body).await.unwrap();
    page["chunk"].as_array().unwrap().clone()
}

#[test]
fn a_synapse_shows_and_searches_the_gateways_public_rooms() {
    on_both(async |world| {
        let gateway = &world.gateway.server_name;
        let alice = world.user(world.a, "alice-bazaar", "Alice").await;
        let carol = world.user(world.b, "carol-bazaar", "Carol").await;
        let (_, lm_room) = world.lm_room("bazaar");
        let from_lm = alice.join(&world.alias("bazaar", &world.a.server_name), &[]).await.unwrap();
        let mut made = Vec::new();
        for rule in ["public", "invite"] {
            let name = format!("Lamps by {rule}");
            let body = json!({ "kind": "create", "name": name, "alias": format!("lamps-{rule}"), "join_rule": rule });
            let portal = world.gateway.admin(Method::POST, "/portals", Some(body)).await.unwrap();
            made.push(portal["matrix_room_id"].clone());
        }

        // The Synapses keep the answer to GET for a while, so it is asked for once.
        let all = directory(&carol, gateway, None).await;
        let is_listed = |room: &Value| all.iter().any(|listed| listed["room_id"] == *room);
        assert!(is_listed(&json!(from_lm)), "{lm_room} is not listed: {all:?}");
        assert!(is_listed(&made[0]) && !is_listed(&made[1]), "{all:?}");

        let search = |term: &str| json!({ "limit": 10, "filter": { "generic_search_term": term } });
        let found = directory(&alice, gateway, Some(search("lAMPS"))).await;
        let [lamps] = &found[..] else { panic!("{found:?}") };
        assert_eq!((&lamps["room_id"], &lamps["name"]), (&made[0], &json!("Lamps by public")));
        assert_eq!(lamps["canonical_alias"], format!("#lamps-public:{gateway}"));
        assert_eq!(directory(&alice, gateway, Some(search("no such thing"))).await, Vec::<Value>::new());
        let room = alice.join(lamps["room_id"].as_str().unwrap(), &[gateway]).await.unwrap();
        assert_eq!(json!(room), made[0]);

        // It is shown with how many are in, what it is about and its picture, as the hub's users say.
        let (bob, sun) = world.lm_room("solarium");
        world.hub.send(&bob, &sun, "m.room.topic", Some(""), json!({ "topic": "plants and light" })).unwrap();
        let picture = world.hub.upload("image/png", b"no real picture");
        world.hub.send(&bob, &sun, "m.room.avatar", Some(""), json!({ "url": picture })).unwrap();
        let sunny = alice.join(&world.alias("solarium", &world.a.server_name), &[]).await.unwrap();
        carol.join(&sunny, &[gateway]).await.unwrap();
        let ours = |room: &Value| room["room_id"] == sunny.as_str();
        for _ in 0..60 {
            let found = directory(&alice, gateway, Some(search("PLANTS"))).await;
            let listed = found.iter().find(|room| ours(room)).unwrap_or_else(|| panic!("{found:?}"));
            assert_eq!(listed["topic"], "plants and light");
            // The bot, bob's ghost, alice and carol.
            if listed["num_joined_members"] == 4 {
                let picture = listed["avatar_url"].as_str().unwrap();
                assert_eq!(alice.download(picture, false).await.unwrap().1, b"no real picture");
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(250)).await;
        }
        panic!("not everybody is counted");
    });
}
