//! How users of a Synapse come into an LM room: by an alias of their own server through the appservice, or by one of the
//! gateway over federation alone.

use reqwest::Method;
use serde_json::json;

use crate::support::testbed::client::MatrixError;
use crate::support::world::on_both;

#[test]
fn an_alias_of_the_synapse_leads_into_the_lm_room() {
    on_both(async |world| {
        let (bob, lm_room) = world.lm_room("porch");
        let alice = world.user(world.a, "alice-porch", "Alice").await;
        let room = alice.join(&world.alias("porch", &world.a.server_name), &[]).await.unwrap();

        // Each sees the other by name, in a room of the same name.
        let members = alice.members(&room).await.unwrap();
        assert_eq!(members[&world.image_of(&bob)]["membership"], "join");
        assert_eq!(members[&world.image_of(&bob)]["displayname"], "Bob");
        assert_eq!(alice.state(&room, "m.room.name", "").await.unwrap(), Some(json!({ "name": "The porch" })));
        let ghost = world.ghost_of(&alice.user_id);
        world.hub.wait_for_member(&lm_room, &ghost, "join").await.unwrap();
        assert_eq!(world.hub.display_name(&lm_room, &ghost), "Alice");

        alice.send_text(&room, "from Matrix").await.unwrap();
        let heard = world.hub.wait_for_text(&lm_room, "from Matrix").await.unwrap();
        assert_eq!(heard.sender, ghost);
        world.hub.send_text(&bob, &lm_room, "from LM").unwrap();
        let heard = alice.wait_for_text(&room, "from LM").await.unwrap();
        assert_eq!(heard["sender"], world.image_of(&bob).as_str());

        // A second user of the Synapse comes into the same room, at once.
        let anna = world.user(world.a, "anna-porch", "Anna").await;
        assert_eq!(anna.join(&world.alias("porch", &world.a.server_name), &[]).await.unwrap(), room);
        world.hub.wait_for_member(&lm_room, &world.ghost_of(&anna.user_id), "join").await.unwrap();
        assert_eq!(world.hub.complaints(&lm_room), [""; 0]);
    });
}

#[test]
fn a_synapse_without_registration_joins_over_federation_alone() {
    on_both(async |world| {
        let (bob, lm_room) = world.lm_room("garden");
        let carol = world.user(world.b, "carol-garden", "Carol").await;
        let alias = world.alias("garden", &world.gateway.server_name);

        // By default such an alias makes no portal, for servers that nobody here answers for.
        let refused = carol.join(&alias, &[]).await.unwrap_err();
        let refused = refused.downcast_ref::<MatrixError>().unwrap_or_else(|| panic!("{refused:#}"));
        assert_eq!((refused.status.as_u16(), refused.errcode.as_str()), (404, "M_NOT_FOUND"), "{refused:?}");

        let alice = world.user(world.a, "alice-garden", "Alice").await;
        let room = alice.join(&world.alias("garden", &world.a.server_name), &[]).await.unwrap();
        assert_eq!(carol.join(&alias, &[]).await.unwrap(), room);
        world.hub.wait_for_member(&lm_room, &world.ghost_of(&carol.user_id), "join").await.unwrap();

        carol.send_text(&room, "from Carol").await.unwrap();
        world.hub.wait_for_text(&lm_room, "from Carol").await.unwrap();
        alice.wait_for_text(&room, "from Carol").await.unwrap();
        alice.send_text(&room, "from Alice").await.unwrap();
        carol.wait_for_text(&room, "from Alice").await.unwrap();
        world.hub.wait_for_text(&lm_room, "from Alice").await.unwrap();
        world.hub.send_text(&bob, &lm_room, "from Bob").unwrap();
        for client in [&alice, &carol] {
            client.wait_for_text(&room, "from Bob").await.unwrap();
        }
        let texts: Vec<_> =
            world.hub.log(&lm_room).iter().filter_map(|event| event.content().get("body").cloned()).collect();
        assert_eq!(texts, ["from Carol", "from Alice", "from Bob"]);
    });
}

#[test]
fn a_portal_that_an_admin_made_is_open_to_every_homeserver_by_its_natural_alias() {
    on_both(async |world| {
        let (_, lm_room) = world.lm_room("terrace");
        let carol = world.user(world.b, "carol-terrace", "Carol").await;
        let body = json!({ "kind": "from_lm", "lm_room_id": lm_room, "via": ["hub.example"] });
        let made = world.gateway.admin(Method::POST, "/portals", Some(body)).await.unwrap();

        // Nobody has named this alias yet, and Carol's server may not have portals made.
        let room = carol.join(&world.alias("terrace", &world.gateway.server_name), &[]).await.unwrap();
        assert_eq!(made["matrix_room_id"], room.as_str());
        world.hub.wait_for_member(&lm_room, &world.ghost_of(&carol.user_id), "join").await.unwrap();
        // The one that the admin was told leads there too.
        let told = made["alias"].as_str().unwrap();
        assert_eq!(carol.join(told, &[]).await.unwrap(), room, "{told}");
    });
}

#[test]
fn an_alias_of_nothing_is_not_found() {
    on_both(async |world| {
        let alice = world.user(world.a, "alice-nothing", "Alice").await;
        for name in ["nothing_hub.example", "nothing_nowhere.invalid", "nonsense"] {
            let refused = alice.join(&format!("#lm_{name}:{}", world.a.server_name), &[]).await.unwrap_err();
            let refused = refused.downcast::<MatrixError>().unwrap();
            assert_eq!((refused.status.as_u16(), refused.errcode.as_str()), (404, "M_NOT_FOUND"), "{refused}");
        }
    });
}
