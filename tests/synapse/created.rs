//! Portals that the gateway makes on both sides, as the LM hub: an LM participant and users of Synapses in them.

use isthmus::event::Pdu;
use reqwest::Method;
use ruma::{OwnedRoomId, OwnedServerName, UserId};
use serde_json::{Value, json};

use crate::support::world::{World, on_both, server};

/// A portal that was asked of the admin API.
struct Made {
    world: &'static World,
    id: String,
    room: String,
    lm_room: OwnedRoomId,
}

impl Made {
    async fn new(world: &'static World, alias: &str, join_rule: &str) -> Self {
        Self::of_version(world, alias, join_rule, "12").await
    }

    async fn of_version(world: &'static World, alias: &str, join_rule: &str, version: &str) -> Self {
        let body = json!({
            "kind": "create", "name": "Made", "alias": alias, "join_rule": join_rule, "matrix_room_version": version
        });
        let made = world.gateway.admin(Method::POST, "/portals", Some(body)).await.unwrap();
        let text = |key: &str| made[key].as_str().unwrap_or_else(|| panic!("no {key} in {made}")).to_owned();
        assert_eq!(made["lm_hub"], world.gateway.server_name.as_str(), "{made}");
        let id = made["portal_id"].as_str().map_or_else(|| made["portal_id"].to_string(), str::to_owned);
        Self { world, id, room: text("matrix_room_id"), lm_room: text("lm_room_id").try_into().unwrap() }
    }

    fn alias(&self, name: &str) -> String {
        format!("#{name}:{}", self.world.gateway.server_name)
    }

    fn via(&self) -> [OwnedServerName; 1] {
        [server(&self.world.gateway.server_name)]
    }

    async fn admin(&self, method: Method, rest: &str, body: Option<Value>) -> Value {
        self.world.gateway.admin(method, &format!("/portals/{}{rest}", self.id), body).await.unwrap()
    }
}

#[test]
fn users_of_both_sides_join_a_made_portal_by_the_same_alias() {
    on_both(async |world| {
        let made = Made::new(world, "agora", "public").await;
        let alice = world.user(world.a, "alice-agora", "Alice").await;
        let carol = world.user(world.b, "carol-agora", "Carol").await;
        let eve = world.spoke.user(&world.name("eve-agora")).unwrap();
        world.spoke.set_display_name(&eve, "Eve");
        assert_eq!(carol.join(&made.alias("agora"), &[]).await.unwrap(), made.room);
        let joined = world.spoke.join(&eve, &made.alias("agora"), &[]).await.unwrap();
        assert_eq!(joined, made.lm_room);
        alice.join(&made.alias("agora"), &[]).await.unwrap();

        let image = world.image_of(&eve);
        let member = alice.wait_for_member(&made.room, &image, "join").await.unwrap();
        assert_eq!(member["content"]["displayname"], "Eve");
        let ghost = world.ghost_of(&alice.user_id);
        world.spoke.wait_for_member(&made.lm_room, &ghost, "join").await.unwrap();
        assert_eq!(world.spoke.display_name(&made.lm_room, &ghost), "Alice");

        world.spoke.send_text(&eve, &made.lm_room, "from the participant").unwrap();
        for client in [&alice, &carol] {
            let heard = client.wait_for_text(&made.room, "from the participant").await.unwrap();
            assert_eq!(heard["sender"], image.as_str());
        }
        alice.send_text(&made.room, "from Matrix").await.unwrap();
        assert_eq!(world.spoke.wait_for_text(&made.lm_room, "from Matrix").await.unwrap().sender, ghost);
        world.spoke.leave(&eve, &made.lm_room).await.unwrap();
        alice.wait_for_member(&made.room, &image, "leave").await.unwrap();
        assert_eq!(world.spoke.complaints(&made.lm_room), [""; 0]);
    });
}

#[test]
fn who_was_given_power_sets_the_topic_kicks_bans_and_redacts() {
    who_has_power_uses_it("12");
}

#[test]
fn who_was_given_power_uses_it_in_rooms_of_version_11() {
    who_has_power_uses_it("11");
}

#[test]
fn who_was_given_power_uses_it_in_rooms_of_version_10() {
    who_has_power_uses_it("10");
}

fn who_has_power_uses_it(version: &str) {
    on_both(async |world| {
        let forum = format!("forum-{version}");
        let forum = forum.as_str();
        let made = Made::of_version(world, forum, "public", version).await;
        let alice = world.user(world.a, &format!("alice-{forum}"), "Alice").await;
        let [eve, mallory] =
            ["eve", "mallory"].map(|name| world.spoke.user(&world.name(&format!("{name}-{forum}"))).unwrap());
        alice.join(&made.alias(forum), &[]).await.unwrap();
        let create = alice.state(&made.room, "m.room.create", "").await.unwrap().unwrap();
        assert_eq!(create["room_version"], version);
        for user in [&eve, &mallory] {
            world.spoke.join(user, &made.alias(forum), &[]).await.unwrap();
            alice.wait_for_member(&made.room, &world.image_of(user), "join").await.unwrap();
        }
        assert!(alice.set_state(&made.room, "m.room.topic", "", json!({ "topic": "no" })).await.is_err());

        let power = json!({ "user_id": alice.user_id, "level": 60 });
        made.admin(Method::PUT, "/power", Some(power)).await;
        let user = alice.user_id.clone();
        let has = move |content: &Value| content["users"][&user] == 60;
        alice.wait_for_state(&made.room, "m.room.power_levels", "", has).await.unwrap();
        alice.set_state(&made.room, "m.room.topic", "", json!({ "topic": "ours" })).await.unwrap();
        let topic = |event: &Pdu| event.kind == "m.room.topic" && event.content().get("topic") == Some(&json!("ours"));
        world.spoke.wait_for(&made.lm_room, "the topic", topic).await.unwrap();

        alice.kick(&made.room, &world.image_of(&mallory), "out").await.unwrap();
        world.spoke.wait_for_member(&made.lm_room, mallory.as_str(), "leave").await.unwrap();
        world.spoke.join(&mallory, &made.alias(forum), &[]).await.unwrap();
        alice.ban(&made.room, &world.image_of(&mallory), "for good").await.unwrap();
        world.spoke.wait_for_member(&made.lm_room, mallory.as_str(), "ban").await.unwrap();
        assert!(world.spoke.join(&mallory, &made.alias(forum), &[]).await.is_err());

        world.spoke.send_text(&eve, &made.lm_room, "said in anger").unwrap();
        let angry = alice.wait_for_text(&made.room, "said in anger").await.unwrap();
        alice.redact(&made.room, angry["event_id"].as_str().unwrap(), "calm down").await.unwrap();
        let source = world.spoke.wait_for_text(&made.lm_room, "said in anger").await.unwrap();
        let redaction = |event: &Pdu| {
            event.kind == "m.room.redaction" && event.content().get("redacts") == Some(&json!(source.event_id))
        };
        world.spoke.wait_for(&made.lm_room, "the redaction", redaction).await.unwrap();

        // The other way: an LM user with power, and a Matrix user without.
        let power = json!({ "user_id": eve, "level": 60 });
        made.admin(Method::PUT, "/power", Some(power)).await;
        let levels = |event: &Pdu| {
            event.kind == "m.room.power_levels" && event.content()["users"].get(eve.as_str()) == Some(&json!(60))
        };
        world.spoke.wait_for(&made.lm_room, "the power", levels).await.unwrap();
        let loud = alice.send_text(&made.room, "too loud").await.unwrap();
        let image = world.spoke.wait_for_text(&made.lm_room, "too loud").await.unwrap();
        let redacts = json!({ "redacts": image.event_id, "reason": "hush" });
        world.spoke.send(&eve, &made.lm_room, "m.room.redaction", None, redacts).unwrap();
        alice
            .wait_for(&made.room, "the redaction", |event| {
                event["type"] == "m.room.redaction" && event["sender"] == world.image_of(&eve)
            })
            .await
            .unwrap();
        assert_eq!(alice.event(&made.room, &loud).await.unwrap()["content"], json!({}), "redacted by Synapse too");

        for (kind, key) in [("m.room.name", "name"), ("m.room.topic", "topic")] {
            world.spoke.send(&eve, &made.lm_room, kind, Some(""), json!({ key: "set by Eve" })).unwrap();
            alice.wait_for_state(&made.room, kind, "", |content| content[key] == "set by Eve").await.unwrap();
        }
        let anna = world.user(world.a, &format!("anna-{forum}"), "Anna").await;
        anna.join(&made.alias(forum), &[]).await.unwrap();
        let ghost = world.ghost_of(&anna.user_id);
        world.spoke.wait_for_member(&made.lm_room, &ghost, "join").await.unwrap();
        anna.leave(&made.room).await.unwrap();
        world.spoke.wait_for_member(&made.lm_room, &ghost, "leave").await.unwrap();
        anna.join(&made.alias(forum), &[]).await.unwrap();
        let is_join = |event: &Pdu| {
            event.state_key.as_deref() == Some(ghost.as_str())
                && event.content().get("membership") == Some(&json!("join"))
        };
        world.spoke.wait_for_many(&made.lm_room, "Anna's second join", 2, is_join).await.unwrap();
        let ghost = <&UserId>::try_from(ghost.as_str()).unwrap();
        world.spoke.set_membership(&eve, &made.lm_room, ghost, "leave", Some("out")).unwrap();
        let is_kick = |event: &Value| {
            event["state_key"] == anna.user_id.as_str()
                && event["content"]["membership"] == "leave"
                && event["content"]["reason"] == "out"
        };
        alice.wait_for(&made.room, "the kick", is_kick).await.unwrap();
        world.spoke.set_membership(&eve, &made.lm_room, ghost, "ban", Some("noise")).unwrap();
        let banned = alice.wait_for_member(&made.room, &anna.user_id, "ban").await.unwrap();
        assert_eq!(banned["content"]["reason"], "noise");
        assert!(anna.join(&made.alias(forum), &[]).await.is_err());
    });
}

#[test]
fn only_the_invited_come_into_a_portal_that_asks_for_invites() {
    on_both(async |world| {
        let made = Made::new(world, "club", "invite").await;
        let alice = world.user(world.a, "alice-club", "Alice").await;
        let carol = world.user(world.b, "carol-club", "Carol").await;
        let [eve, mallory] = ["eve-club", "mallory-club"].map(|name| world.spoke.user(&world.name(name)).unwrap());
        made.admin(Method::POST, "/invite", Some(json!({ "user_id": alice.user_id }))).await;
        assert_eq!(alice.wait_for_invite().await.unwrap(), made.room);
        alice.join(&made.room, &[&world.gateway.server_name]).await.unwrap();
        made.admin(Method::POST, "/invite", Some(json!({ "user_id": eve }))).await;
        assert_eq!(world.spoke.wait_for_invite(&eve).await.unwrap(), made.lm_room);
        world.spoke.join(&eve, made.lm_room.as_str(), &made.via()).await.unwrap();
        world.spoke.send_text(&eve, &made.lm_room, "among us").unwrap();
        alice.wait_for_text(&made.room, "among us").await.unwrap();

        assert!(carol.join(&made.room, &[&world.gateway.server_name]).await.is_err());
        assert!(world.spoke.join(&mallory, made.lm_room.as_str(), &made.via()).await.is_err());
        assert_eq!(world.spoke.membership(&made.lm_room, mallory.as_str()), "leave");
    });
}

#[test]
fn operators_see_where_an_event_is_and_speak_in_both_rooms() {
    on_both(async |world| {
        let made = Made::new(world, "stage", "public").await;
        let alice = world.user(world.a, "alice-stage", "Alice").await;
        let eve = world.spoke.user(&world.name("eve-stage")).unwrap();
        alice.join(&made.alias("stage"), &[]).await.unwrap();
        world.spoke.join(&eve, &made.alias("stage"), &[]).await.unwrap();
        let said = made.admin(Method::POST, "/announce", Some(json!({ "body": "attention" }))).await;
        let on_matrix = alice.wait_for_text(&made.room, "attention").await.unwrap();
        let on_lm = world.spoke.wait_for_text(&made.lm_room, "attention").await.unwrap();
        assert_eq!(said["matrix_event_id"], on_matrix["event_id"]);
        assert_eq!(said["lm_event_id"], on_lm.event_id.as_str());

        let sent = alice.send_text(&made.room, "where am I").await.unwrap();
        let image = world.spoke.wait_for_text(&made.lm_room, "where am I").await.unwrap();
        let path = format!("/events/{}", crate::support::testbed::client::segment(&sent));
        let explained = world.gateway.admin(Method::GET, &path, None).await.unwrap();
        assert!(explained.to_string().contains(image.event_id.as_str()), "{explained}");

        // Who takes part, and how: by the rooms that are shared.
        let servers = world.gateway.admin(Method::GET, "/servers", None).await.unwrap();
        let of =
            |name: &str| servers["servers"].as_array().unwrap().iter().find(|server| server["server_name"] == name);
        let synapse = of(&world.a.server_name).unwrap_or_else(|| panic!("{servers}"));
        assert_eq!((&synapse["speaks"], &synapse["reachable"]), (&json!(["matrix"]), &json!(true)));
        let spoke = of(eve.server_name().as_str()).unwrap_or_else(|| panic!("{servers}"));
        assert_eq!((&spoke["speaks"], &spoke["reachable"]), (&json!(["linearized"]), &json!(true)));

        // The log as operators see it is the log that the participant has.
        let page = made.admin(Method::GET, "/log?limit=1000&full=true", None).await;
        let events = page["events"].as_array().unwrap();
        let ids: Vec<&str> = events.iter().filter_map(|event| event["event_id"].as_str()).collect();
        let positions: Vec<i64> = events.iter().filter_map(|event| event["position"].as_i64()).collect();
        assert_eq!(positions, (0..i64::try_from(ids.len()).unwrap()).collect::<Vec<_>>());
        let theirs: Vec<String> =
            world.spoke.log(&made.lm_room).iter().map(|event| event.event_id.to_string()).collect();
        assert!(ids.windows(theirs.len()).any(|part| part == theirs), "{ids:?}\n{theirs:?}");
    });
}
