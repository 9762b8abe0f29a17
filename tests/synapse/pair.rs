//! Two gateways, as two processes: one is the hub of an LM room, the other takes part in it, and each has a Matrix room of its own
//! beside it, with users of its own Synapse.

use isthmus::identity::Side;
use reqwest::Method;
use serde_json::json;

use crate::support::world::{ghost, with_two};

#[test]
fn two_gateways_carry_what_users_of_their_homeservers_say() {
    with_two(async |hub, part| {
        let made = json!({ "kind": "create", "name": "Pair", "alias": "pair", "join_rule": "public" });
        let made = hub.gateway.admin(Method::POST, "/portals", Some(made)).await.unwrap();
        let far = json!({ "kind": "from_lm", "lm_alias": format!("#pair:{}", hub.gateway.server_name) });
        let far = part.gateway.admin(Method::POST, "/portals", Some(far)).await.unwrap();
        assert_eq!(far["lm_room_id"], made["lm_room_id"], "{far}");
        let [near_room, far_room] = [&made, &far].map(|portal| portal["matrix_room_id"].as_str().unwrap().to_owned());
        assert_ne!(near_room, far_room);

        let alice = hub.user(hub.a, "alice-pair", "Alice").await;
        let bert = part.user(part.a, "bert-pair", "Bert").await;
        alice.join(&near_room, &[&hub.gateway.server_name]).await.unwrap();
        bert.join(&far_room, &[&part.gateway.server_name]).await.unwrap();
        // Who is at home beyond the other gateway is a ghost of its ghost.
        let alice_far = ghost(&part.gateway.server_name, Side::Lm, &hub.ghost_of(&alice.user_id));
        let bert_near = ghost(&hub.gateway.server_name, Side::Lm, &part.ghost_of(&bert.user_id));
        let member = bert.wait_for_member(&far_room, &alice_far, "join").await.unwrap();
        assert_eq!(member["content"]["displayname"], "Alice");
        alice.wait_for_member(&near_room, &bert_near, "join").await.unwrap();

        for number in 0..5 {
            let (question, answer) = (format!("question {number}"), format!("answer {number}"));
            alice.send_text(&near_room, &question).await.unwrap();
            assert_eq!(bert.wait_for_text(&far_room, &question).await.unwrap()["sender"], alice_far.as_str());
            bert.send_text(&far_room, &answer).await.unwrap();
            assert_eq!(alice.wait_for_text(&near_room, &answer).await.unwrap()["sender"], bert_near.as_str());
        }
        for (world, portal) in [(hub, &made), (part, &far)] {
            let id = portal["portal_id"].as_str().map_or_else(|| portal["portal_id"].to_string(), str::to_owned);
            let shown = world.gateway.admin(Method::GET, &format!("/portals/{id}"), None).await.unwrap();
            assert_eq!(
                (&shown["state"], &shown["health"]["missing"]["count"]),
                (&json!("active"), &json!(0)),
                "{shown}"
            );
        }
    });
}
