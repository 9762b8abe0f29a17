//! Rooms that a Synapse hosts which knows nothing of the gateway, joined by it, with an LM room that it keeps for them.

use isthmus::event::Pdu;
use reqwest::Method;
use ruma::OwnedRoomId;
use serde_json::{Value, json};

use crate::support::world::{World, on_both};

/// Has the gateway make a portal of a room of the second Synapse; the LM room.
async fn bridge(world: &'static World, room: &str, alias: &str) -> OwnedRoomId {
    let body = json!({
        "kind": "from_matrix", "matrix_room_id": room, "via": [world.b.server_name], "alias": alias,
    });
    let made = world.gateway.admin(Method::POST, "/portals", Some(body)).await.unwrap();
    assert_eq!((&made["kind"], &made["state"]), (&json!("from_matrix"), &json!("active")), "{made}");
    assert_eq!(made["matrix_room_id"], room);
    made["lm_room_id"].as_str().unwrap().try_into().unwrap()
}

#[test]
fn a_room_of_version_12_of_a_synapse_is_shared_with_lm_users() {
    life_of_a_room("12");
}

#[test]
fn a_room_of_version_11_of_a_synapse_is_shared_with_lm_users() {
    life_of_a_room("11");
}

#[test]
fn a_room_of_version_10_of_a_synapse_is_shared_with_lm_users() {
    life_of_a_room("10");
}

#[test]
fn a_room_of_version_9_of_a_synapse_is_shared_with_lm_users() {
    life_of_a_room("9");
}

#[test]
fn a_room_of_version_8_of_a_synapse_is_shared_with_lm_users() {
    life_of_a_room("8");
}

#[test]
fn a_room_of_version_7_of_a_synapse_is_shared_with_lm_users() {
    life_of_a_room("7");
}

#[test]
fn a_room_of_version_6_of_a_synapse_is_shared_with_lm_users() {
    life_of_a_room("6");
}

fn life_of_a_room(version: &str) {
    on_both(async |world| {
        let name = format!("square-{version}");
        let alice = world.user(world.b, &format!("alice-{name}"), "Alice").await;
        let carol = world.user(world.a, &format!("carol-{name}"), "Carol").await;
        let room = json!({ "preset": "public_chat", "name": "The square", "room_version": version });
        let room = alice.create_room(room).await.unwrap();
        carol.join(&room, &[&world.b.server_name]).await.unwrap();
        alice.send_text(&room, "before").await.unwrap();
        let lm_room = bridge(world, &room, &name).await;

        let eve = world.spoke.user(&world.name(&format!("eve-{name}"))).unwrap();
        world.spoke.set_display_name(&eve, "Eve");
        let alias = format!("#{name}:{}", world.gateway.server_name);
        assert_eq!(world.spoke.join(&eve, &alias, &[]).await.unwrap(), lm_room);
        let image = world.image_of(&eve);
        for client in [&alice, &carol] {
            let member = client.wait_for_member(&room, &image, "join").await.unwrap();
            assert_eq!(member["content"]["displayname"], "Eve");
        }
        for (client, display_name) in [(&alice, "Alice"), (&carol, "Carol")] {
            let ghost = world.ghost_of(&client.user_id);
            // They were there before Eve.
            assert_eq!(world.spoke.membership(&lm_room, &ghost), "join");
            assert_eq!(world.spoke.display_name(&lm_room, &ghost), display_name);
        }

        // They talk, answer and take back.
        alice.send_text(&room, "hello from Matrix").await.unwrap();
        let heard = world.spoke.wait_for_text(&lm_room, "hello from Matrix").await.unwrap();
        assert_eq!(heard.sender, world.ghost_of(&alice.user_id));
        let answer = json!({ "msgtype": "m.text", "body": "hello from LM",
            "m.relates_to": { "m.in_reply_to": { "event_id": heard.event_id } } });
        world.spoke.send(&eve, &lm_room, "m.room.message", None, answer).unwrap();
        for client in [&alice, &carol] {
            let reply = client.wait_for_text(&room, "hello from LM").await.unwrap();
            assert_eq!(reply["sender"], image.as_str());
            let event = reply["content"]["m.relates_to"]["m.in_reply_to"]["event_id"].as_str().unwrap();
            assert_eq!(client.event(&room, event).await.unwrap()["content"]["body"], "hello from Matrix");
        }
        let reply = alice.wait_for_text(&room, "hello from LM").await.unwrap();
        let source = world.spoke.wait_for_text(&lm_room, "hello from LM").await.unwrap();
        alice.redact(&room, reply["event_id"].as_str().unwrap(), "no").await.unwrap();
        let redacts = |target: &ruma::EventId| {
            let target = json!(target);
            move |event: &Pdu| event.kind == "m.room.redaction" && event.content().get("redacts") == Some(&target)
        };
        world.spoke.wait_for(&lm_room, "the redaction", redacts(&source.event_id)).await.unwrap();
        world.spoke.send_text(&eve, &lm_room, "a slip").unwrap();
        let slip = alice.wait_for_text(&room, "a slip").await.unwrap();
        let source = world.spoke.wait_for_text(&lm_room, "a slip").await.unwrap();
        world.spoke.send(&eve, &lm_room, "m.room.redaction", None, json!({ "redacts": source.event_id })).unwrap();
        let gone = |event: &Value| event["type"] == "m.room.redaction" && event["sender"] == image.as_str();
        carol.wait_for(&room, "the redaction", gone).await.unwrap();
        assert_eq!(carol.event(&room, slip["event_id"].as_str().unwrap()).await.unwrap()["content"], json!({}));

        // State needs its sender's level in the Matrix room.
        let mut levels = alice.state(&room, "m.room.power_levels", "").await.unwrap().unwrap();
        levels["users"][&image] = json!(50);
        alice.set_state(&room, "m.room.power_levels", "", levels).await.unwrap();
        let has = |event: &Pdu| {
            event.kind == "m.room.power_levels" && event.content()["users"].get(eve.as_str()) == Some(&json!(50))
        };
        world.spoke.wait_for(&lm_room, "the power", has).await.unwrap();
        world.spoke.send(&eve, &lm_room, "m.room.topic", Some(""), json!({ "topic": "set by Eve" })).unwrap();
        for client in [&alice, &carol] {
            let set = |content: &Value| content["topic"] == "set by Eve";
            client.wait_for_state(&room, "m.room.topic", "", set).await.unwrap();
        }
        alice.set_state(&room, "m.room.name", "", json!({ "name": "The circle" })).await.unwrap();
        let named =
            |event: &Pdu| event.kind == "m.room.name" && event.content().get("name") == Some(&json!("The circle"));
        world.spoke.wait_for(&lm_room, "the name", named).await.unwrap();

        // Who is sent out or goes is gone on the other side.
        let mallory = world.spoke.user(&world.name(&format!("mallory-{name}"))).unwrap();
        world.spoke.join(&mallory, &alias, &[]).await.unwrap();
        alice.wait_for_member(&room, &world.image_of(&mallory), "join").await.unwrap();
        alice.kick(&room, &world.image_of(&mallory), "out").await.unwrap();
        world.spoke.wait_for_member(&lm_room, mallory.as_str(), "leave").await.unwrap();
        let ghost = world.ghost_of(&carol.user_id);
        let kick = json!({ "membership": "leave", "reason": "off topic" });
        world.spoke.send(&eve, &lm_room, "m.room.member", Some(&ghost), kick).unwrap();
        carol.wait_for_member(&room, &carol.user_id, "leave").await.unwrap();
        world.spoke.leave(&eve, &lm_room).await.unwrap();
        alice.wait_for_member(&room, &image, "leave").await.unwrap();
        assert_eq!(world.spoke.complaints(&lm_room), [""; 0]);
    });
}

#[test]
fn the_bot_is_invited_into_a_private_room_and_lm_users_come_in_by_invites() {
    on_both(async |world| {
        let name = world.name("salon");
        let alice = world.user(world.b, &format!("bridger-{name}"), "Alice").await;
        let eve = world.spoke.user(&format!("eve-{name}")).unwrap();
        let room = alice.create_room(json!({ "preset": "private_chat", "name": "The salon" })).await.unwrap();
        let bot = format!("@isthmus:{}", world.gateway.server_name);
        alice.invite(&room, &bot).await.unwrap();
        alice.wait_for_member(&room, &bot, "join").await.unwrap();
        let mut lm_room: Option<OwnedRoomId> = None;
        for _ in 0..100 {
            let portals = world.gateway.admin(Method::GET, "/portals?limit=1000", None).await.unwrap();
            let portals = portals["portals"].as_array().unwrap().clone();
            let made = portals.iter().find(|portal| portal["matrix_room_id"] == room && portal["state"] == "active");
            lm_room = made.map(|portal| portal["lm_room_id"].as_str().unwrap().try_into().unwrap());
            if lm_room.is_some() {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        let lm_room = lm_room.expect("a portal");
        alice.invite(&room, &world.image_of(&eve)).await.unwrap();
        world.spoke.wait_for_invite(&eve).await.unwrap();
        let via = [crate::support::world::server(&world.gateway.server_name)];
        world.spoke.join(&eve, lm_room.as_str(), &via).await.unwrap();
        alice.wait_for_member(&room, &world.image_of(&eve), "join").await.unwrap();
        alice.send_text(&room, "between us").await.unwrap();
        world.spoke.wait_for_text(&lm_room, "between us").await.unwrap();
        world.spoke.send_text(&eve, &lm_room, "as ever").unwrap();
        alice.wait_for_text(&room, "as ever").await.unwrap();

        // The bot is sent out: nothing crosses any more.
        alice.kick(&room, &bot, "enough").await.unwrap();
        alice.wait_for_member(&room, &bot, "leave").await.unwrap();
    });
}

#[test]
fn a_room_with_conditions_lets_in_those_who_meet_them() {
    on_both(async |world| {
        let alice = world.user(world.b, &world.name("alice-lodge"), "Alice").await;
        let [eve, mallory] = ["eve-lodge", "mallory-lodge"].map(|name| world.spoke.user(&world.name(name)).unwrap());
        let club = alice.create_room(json!({ "preset": "public_chat", "name": "The club" })).await.unwrap();
        bridge(world, &club, "lodge").await;
        let alias = |name: &str| format!("#{name}:{}", world.gateway.server_name);
        world.spoke.join(&eve, &alias("lodge"), &[]).await.unwrap();
        alice.wait_for_member(&club, &world.image_of(&eve), "join").await.unwrap();

        let rules = json!({ "join_rule": "restricted", "allow": [{ "type": "m.room_membership", "room_id": club }] });
        let rules = json!([{ "type": "m.room.join_rules", "state_key": "", "content": rules }]);
        let back = json!({ "preset": "private_chat", "name": "The back room", "initial_state": rules });
        let back = alice.create_room(back).await.unwrap();
        let lm_room = bridge(world, &back, "lodge-back").await;
        world.spoke.join(&mallory, &alias("lodge-back"), &[]).await.unwrap_err();
        world.spoke.join(&eve, &alias("lodge-back"), &[]).await.unwrap();
        let member = alice.wait_for_member(&back, &world.image_of(&eve), "join").await.unwrap();
        assert_eq!(member["content"]["join_authorised_via_users_server"], alice.user_id.as_str());
        alice.send_text(&back, "among members").await.unwrap();
        world.spoke.wait_for_text(&lm_room, "among members").await.unwrap();
        world.spoke.send_text(&eve, &lm_room, "indeed").unwrap();
        alice.wait_for_text(&back, "indeed").await.unwrap();
    });
}
