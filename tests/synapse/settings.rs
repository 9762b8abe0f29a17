//! What is set in a room and said in it beside plain text, through a real Synapse and an LM provider, seen where the others see it.

use std::time::Duration;

use isthmus::event::Pdu;
use reqwest::Method;
use ruma::OwnedUserId;
use serde_json::{Value, json};

use super::crossing::Portal;
use crate::support::testbed::client::segment;
use crate::support::world::{on_both, server};

impl Portal {
    /// Bob sets state in the LM room; Alice sees what `is_it` says.
    async fn set_on_lm(&self, kind: &str, content: Value, is_it: impl Fn(&Value) -> bool) {
        self.world.hub.send(&self.bob, &self.lm_room, kind, Some(""), content).unwrap();
        self.alice.wait_for_state(&self.room, kind, "", is_it).await.unwrap();
    }

    /// Alice sets state in the Matrix room; the hub gets it of her ghost, as `is_it` says.
    async fn set_on_matrix(&self, kind: &str, content: Value, is_it: impl Fn(&Value) -> bool) {
        self.alice.set_state(&self.room, kind, "", content).await.unwrap();
        let ghost = self.alices_ghost();
        let looked_for = |event: &Pdu| {
            event.kind == kind && event.sender == ghost.as_str() && is_it(&Value::Object(event.content().clone()))
        };
        self.world.hub.wait_for(&self.lm_room, kind, looked_for).await.unwrap();
    }
}

#[test]
fn who_may_come_who_may_look_and_what_a_room_looks_like_is_the_same_on_both_sides() {
    on_both(async |world| {
        let portal = Portal::open(world, "settings").await;
        portal.give_power(100).await;
        for (kind, key, on_lm, on_matrix) in [
            ("m.room.join_rules", "join_rule", "invite", "public"),
            ("m.room.history_visibility", "history_visibility", "joined", "world_readable"),
            ("m.room.guest_access", "guest_access", "can_join", "forbidden"),
        ] {
            portal.set_on_lm(kind, json!({ key: on_lm }), |content| content[key] == on_lm).await;
            portal.set_on_matrix(kind, json!({ key: on_matrix }), |content| content[key] == on_matrix).await;
        }
        // A picture is called so that the other side can read it.
        let named = format!("mxc://{}/", world.gateway.server_name);
        let is_named = |content: &Value| content["url"].as_str().is_some_and(|url| url.starts_with(&named));
        portal.set_on_lm("m.room.avatar", json!({ "url": "mxc://hub.example/picture" }), is_named).await;
        let own = portal.alice.upload("image/png", "own.png", b"no picture").await.unwrap();
        portal.set_on_matrix("m.room.avatar", json!({ "url": own }), is_named).await;
        // The room's address leads there by the gateway.
        let address = format!("#{}:hub.example", world.name("settings"));
        let there = world.alias("settings", &world.gateway.server_name);
        let is_there = |content: &Value| content["alias"] == there.as_str();
        portal.set_on_lm("m.room.canonical_alias", json!({ "alias": address }), is_there).await;
        assert_eq!(world.hub.complaints(&portal.lm_room), [""; 0]);
    });
}

#[test]
fn what_is_pinned_is_pinned_on_the_other_side() {
    on_both(async |world| {
        let portal = Portal::open(world, "pins").await;
        let Portal { bob, lm_room, alice, room, .. } = &portal;
        portal.give_power(50).await;
        let tea = alice.send_text(room, "tea at four").await.unwrap();
        let tea_in_log = world.hub.wait_for_text(lm_room, "tea at four").await.unwrap().event_id.clone();
        let scones_in_log = world.hub.send_text(bob, lm_room, "scones too").unwrap();
        let scones = alice.wait_for_text(room, "scones too").await.unwrap()["event_id"].clone();
        let kind = "m.room.pinned_events";
        let pinned = json!([scones, tea]);
        portal
            .set_on_lm(kind, json!({ "pinned": [scones_in_log, tea_in_log] }), |content| content["pinned"] == pinned)
            .await;
        let pinned = json!([tea_in_log]);
        portal.set_on_matrix(kind, json!({ "pinned": [tea] }), |content| content["pinned"] == pinned).await;
    });
}

#[test]
fn emotes_and_notices_are_heard_and_edits_and_reactions_are_taken_back_once() {
    on_both(async |world| {
        let portal = Portal::open(world, "emotes").await;
        let Portal { bob, lm_room, alice, room, .. } = &portal;
        for kind in ["m.emote", "m.notice"] {
            let content = |who: &str| json!({ "msgtype": kind, "body": format!("{who} waves by {kind}") });
            alice.send(room, "m.room.message", content("Alice")).await.unwrap();
            let heard = world.hub.wait_for_text(lm_room, &format!("Alice waves by {kind}")).await.unwrap();
            assert_eq!(heard.content()["msgtype"], kind);
            world.hub.send(bob, lm_room, "m.room.message", None, content("Bob")).unwrap();
            let heard = alice.wait_for_text(room, &format!("Bob waves by {kind}")).await.unwrap();
            assert_eq!(heard["content"]["msgtype"], kind);
        }
        let about = |event_id: &str| {
            let relates = |kind: &str| json!({ "rel_type": kind, "event_id": event_id, "key": "+" });
            [
                ("m.reaction", json!({ "m.relates_to": relates("m.annotation") })),
                (
                    "m.room.message",
                    json!({ "msgtype": "m.text", "body": "* mended", "m.relates_to": relates("m.replace"),
                            "m.new_content": { "msgtype": "m.text", "body": "mended" } }),
                ),
            ]
        };
        let alices_ghost = portal.alices_ghost();
        let mut redacted = Vec::new();
        let said = alice.send_text(room, "to be mended").await.unwrap();
        world.hub.wait_for_text(lm_room, "to be mended").await.unwrap();
        for (kind, content) in about(&said) {
            let id = alice.send(room, kind, content).await.unwrap();
            let is_image =
                |event: &Pdu| event.content().get("im.isthmus.source").is_some_and(|of| of["event_id"] == id);
            let image = world.hub.wait_for(lm_room, kind, is_image).await.unwrap();
            alice.redact(room, &id, "never mind").await.unwrap();
            let redacts = json!(image.event_id);
            let is_it = |event: &Pdu| {
                event.kind == "m.room.redaction"
                    && event.sender == alices_ghost.as_str()
                    && event.content().get("redacts") == Some(&redacts)
            };
            world.hub.wait_for(lm_room, "the redaction", is_it).await.unwrap();
            redacted.push(id);
        }
        let bobs_ghost = world.image_of(bob);
        let said = world.hub.send_text(bob, lm_room, "mended too").unwrap();
        alice.wait_for_text(room, "mended too").await.unwrap();
        for (kind, content) in about(said.as_str()) {
            let id = world.hub.send(bob, lm_room, kind, None, content).unwrap();
            let is_image = |event: &Value| event["content"]["im.isthmus.source"]["event_id"] == id.as_str();
            let image = alice.wait_for(room, kind, is_image).await.unwrap()["event_id"].as_str().unwrap().to_owned();
            world.hub.send(bob, lm_room, "m.room.redaction", None, json!({ "redacts": id })).unwrap();
            let is_it = |event: &Value| event["type"] == "m.room.redaction" && event["sender"] == bobs_ghost.as_str();
            alice.wait_for_many(room, redacted.len() - 1, is_it).await.unwrap();
            let gone = alice.event(room, &image).await.unwrap();
            assert_eq!(gone["content"], json!({}), "{gone}");
            redacted.push(image);
        }
        // Nothing of it comes back: each was taken back once on either side.
        alice.send_text(room, "is that all?").await.unwrap();
        world.hub.wait_for_text(lm_room, "is that all?").await.unwrap();
        world.hub.send_text(bob, lm_room, "that is all").unwrap();
        alice.wait_for_text(room, "that is all").await.unwrap();
        let of_log = world.hub.log(lm_room).iter().filter(|event| event.kind == "m.room.redaction").count();
        let history = alice.history(room).await.unwrap();
        let of_graph = history.iter().filter(|event| event["type"] == "m.room.redaction").count();
        assert_eq!((of_log, of_graph), (redacted.len(), redacted.len()));
    });
}

#[test]
fn whom_a_rooms_list_denies_is_not_heard_behind_a_ghost() {
    on_both(async |world| {
        let portal = Portal::open(world, "denied").await;
        let Portal { bob, lm_room, alice, room, .. } = &portal;
        portal.give_power(100).await;
        let mallory = world.spoke.user(&world.name("mallory-denied")).unwrap();
        world.spoke.join(&mallory, lm_room.as_str(), &[server("hub.example")]).await.unwrap();
        alice.wait_for_member(room, &world.image_of(&mallory), "join").await.unwrap();
        let list = json!({ "allow": ["*"], "deny": ["spoke.example"], "allow_ip_literals": true });
        alice.set_state(room, "m.room.server_acl", "", list).await.unwrap();
        // What comes after it is heard when the gateway knows of the list.
        alice.send_text(room, "the list is set").await.unwrap();
        world.hub.wait_for_text(lm_room, "the list is set").await.unwrap();
        world.spoke.send_text(&mallory, lm_room, "let me in").unwrap();
        world.hub.wait_for_text(lm_room, "let me in").await.unwrap();
        world.hub.send_text(bob, lm_room, "who was that?").unwrap();
        alice.wait_for_text(room, "who was that?").await.unwrap();
        let history = alice.history(room).await.unwrap();
        assert!(!history.iter().any(|event| event["content"]["body"] == "let me in"));
    });
}

#[test]
fn a_user_of_a_synapse_knocks_and_an_lm_user_lets_them_in() {
    on_both(async |world| {
        let (bob, lm_room) = world.lm_room("lodge");
        let alice = world.user(world.a, "alice-manor", "Alice").await;
        let room = alice.join(&world.alias("lodge", &world.a.server_name), &[]).await.unwrap();
        alice.wait_for_member(&room, &world.image_of(&bob), "join").await.unwrap();
        world.hub.send(&bob, &lm_room, "m.room.join_rules", Some(""), json!({ "join_rule": "knock" })).unwrap();
        alice.wait_for_state(&room, "m.room.join_rules", "", |content| content["join_rule"] == "knock").await.unwrap();

        let carol = world.user(world.b, &world.name("carol-manor"), "Carol").await;
        let ghost: OwnedUserId = world.ghost_of(&carol.user_id).try_into().unwrap();
        assert!(carol.join(&room, &[&world.gateway.server_name]).await.is_err());
        let path =
            format!("/_matrix/client/v3/knock/{}?server_name={}", segment(&room), segment(&world.gateway.server_name));
        carol.call(Method::POST, &path, Some(json!({ "reason": "it rains" }))).await.unwrap();
        let knock = world.hub.wait_for_member(&lm_room, ghost.as_str(), "knock").await.unwrap();
        assert_eq!(knock.content()["reason"], "it rains");
        alice.wait_for_member(&room, &carol.user_id, "knock").await.unwrap();
        world.hub.invite(&bob, &lm_room, &ghost).await.unwrap();
        assert_eq!(carol.wait_for_invite().await.unwrap(), room);
        carol.join(&room, &[&world.gateway.server_name]).await.unwrap();
        carol.send_text(&room, "dry at last").await.unwrap();
        assert_eq!(world.hub.wait_for_text(&lm_room, "dry at last").await.unwrap().sender, ghost);
        assert_eq!(world.hub.complaints(&lm_room), [""; 0]);
    });
}

#[test]
fn a_client_sees_the_profile_of_an_lm_user() {
    on_both(async |world| {
        let portal = Portal::open(world, "profile").await;
        let Portal { bob, lm_room, alice, room, .. } = &portal;
        let named = json!({ "membership": "join", "displayname": "Bob the baker" });
        world.hub.send(bob, lm_room, "m.room.member", Some(bob.as_str()), named).unwrap();
        let image = world.image_of(bob);
        let is_named = |content: &Value| content["displayname"] == "Bob the baker";
        alice.wait_for_state(room, "m.room.member", &image, is_named).await.unwrap();
        // What goes by federation may still be on its way.
        let path = format!("/_matrix/client/v3/profile/{}", segment(&image));
        let asked = async {
            while alice.call(Method::GET, &path, None).await.ok().is_none_or(|profile| !is_named(&profile)) {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), asked).await.expect("no profile");
        // Of who is nobody nothing is told.
        let nobody = format!("@lm_nobody_hub.example:{}", world.gateway.server_name);
        let path = format!("/_matrix/client/v3/profile/{}", segment(&nobody));
        assert!(alice.call(Method::GET, &path, None).await.is_err());
    });
}
