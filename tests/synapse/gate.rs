//! The gate: both sides' rules are asked before anybody is let into a portal.

use serde_json::json;

use crate::support::provider::NewRoom;
use crate::support::testbed::client::MatrixError;
use crate::support::world::{run, world};

#[test]
fn hc_39_whom_the_lm_room_does_not_let_in_does_not_get_into_the_matrix_room() {
    run(async {
        let world = world().await;
        let (bob, lm_room) = world.lm_room("gate");
        let alice = world.user(world.a, "alice-gate", "Alice").await;
        let room = alice.join(&world.alias("gate", &world.a.server_name), &[]).await.unwrap();
        let carol = world.user(world.b, "carol-gate", "Carol").await;

        // Banned on LM before anybody there has seen her.
        let ghost = world.ghost_of(&carol.user_id);
        world.hub.send(&bob, &lm_room, "m.room.member", Some(&ghost), json!({ "membership": "ban" })).unwrap();
        alice.wait_for_member(&room, &carol.user_id, "ban").await.unwrap();
        let refused = carol.join(&world.alias("gate", &world.gateway.server_name), &[]).await.unwrap_err();
        let refused = refused.downcast::<MatrixError>().unwrap();
        assert_eq!(refused.errcode, "M_FORBIDDEN", "{refused}");
        assert_eq!(world.hub.membership(&lm_room, &ghost), "ban");
    });
}

#[test]
fn a_room_by_invite_is_entered_by_invite_from_the_other_side() {
    run(async {
        let world = world().await;
        let bob = world.hub.user("bob-salon").unwrap();
        let new = NewRoom { join_rule: Some("invite".to_owned()), ..NewRoom::default() };
        let lm_room = world.hub.create_room(&bob, new).unwrap();
        // The gateway's bot is invited, and the portal made.
        let bot: ruma::OwnedUserId = format!("@isthmus:{}", world.gateway.server_name).try_into().unwrap();
        world.hub.invite(&bob, &lm_room, &bot).await.unwrap();
        world.hub.wait_for_member(&lm_room, bot.as_str(), "join").await.unwrap();

        let alice = world.user(world.a, "alice-salon", "Alice").await;
        let ghost: ruma::OwnedUserId = world.ghost_of(&alice.user_id).try_into().unwrap();
        let alias = format!("#lm_{}_hub.example:{}", lm_room.as_str().split(':').next().unwrap(), world.a.server_name);
        assert!(alice.join(&alias, &[]).await.is_err());
        assert_eq!(world.hub.membership(&lm_room, ghost.as_str()), "leave");

        world.hub.invite(&bob, &lm_room, &ghost).await.unwrap();
        let room = alice.wait_for_invite().await.unwrap();
        alice.join(&room, &[&world.gateway.server_name]).await.unwrap();
        alice.send_text(&room, "let in").await.unwrap();
        assert_eq!(world.hub.wait_for_text(&lm_room, "let in").await.unwrap().sender, ghost);
    });
}
