//! What crosses a portal, checked on the receiving side: messages, name, topic, leaves, kicks and bans, both ways.

use ruma::UserId;
use serde_json::{Value, json};

use crate::support::testbed::client::Client;
use crate::support::world::{World, on_both};

/// A portal with Bob and Eve of `hub.example` and Alice of the Synapse, who has power in it when `power` says so.
pub(super) struct Portal {
    pub(super) world: &'static World,
    pub(super) bob: ruma::OwnedUserId,
    eve: ruma::OwnedUserId,
    pub(super) lm_room: ruma::OwnedRoomId,
    pub(super) alice: Client,
    pub(super) room: String,
}

impl Portal {
    pub(super) async fn open(world: &'static World, name: &str) -> Self {
        let (bob, lm_room) = world.lm_room(name);
        let eve = world.hub.user(&world.name(&format!("eve-{name}"))).unwrap();
        world.hub.join(&eve, lm_room.as_str(), &[]).await.unwrap();
        let alice = world.user(world.a, &format!("alice-{name}"), "Alice").await;
        let room = alice.join(&world.alias(name, &world.a.server_name), &[]).await.unwrap();
        alice.wait_for_member(&room, &world.image_of(&eve), "join").await.unwrap();
        Self { world, bob, eve, lm_room, alice, room }
    }

    /// Gives Alice's ghost a level in the LM room, and waits until Synapse knows of Alice's.
    pub(super) async fn give_power(&self, level: i64) {
        let users = json!({ self.bob.as_str(): 100, self.world.ghost_of(&self.alice.user_id): level });
        let content = json!({ "users": users });
        self.world.hub.send(&self.bob, &self.lm_room, "m.room.power_levels", Some(""), content).unwrap();
        let user = self.alice.user_id.clone();
        let has = move |content: &Value| content["users"][&user] == level;
        self.alice.wait_for_state(&self.room, "m.room.power_levels", "", has).await.unwrap();
    }

    pub(super) fn alices_ghost(&self) -> String {
        self.world.ghost_of(&self.alice.user_id)
    }
}

#[test]
fn names_and_topics_cross_both_ways() {
    on_both(async |world| {
        let portal = Portal::open(world, "topics").await;
        let Portal { bob, lm_room, alice, room, .. } = &portal;
        world.hub.send(bob, lm_room, "m.room.topic", Some(""), json!({ "topic": "set on LM" })).unwrap();
        alice.wait_for_state(room, "m.room.topic", "", |content| content["topic"] == "set on LM").await.unwrap();
        world.hub.send(bob, lm_room, "m.room.name", Some(""), json!({ "name": "named on LM" })).unwrap();
        alice.wait_for_state(room, "m.room.name", "", |content| content["name"] == "named on LM").await.unwrap();

        // Without power on LM she has none on Matrix either.
        assert!(alice.set_state(room, "m.room.topic", "", json!({ "topic": "no" })).await.is_err());
        portal.give_power(50).await;
        alice.set_state(room, "m.room.topic", "", json!({ "topic": "set on Matrix" })).await.unwrap();
        alice.set_state(room, "m.room.name", "", json!({ "name": "named on Matrix" })).await.unwrap();
        let ghost = portal.alices_ghost();
        let set = |kind: &'static str, key: &'static str, value: &'static str| {
            let ghost = ghost.clone();
            world.hub.wait_for(lm_room, value, move |event| {
                event.kind == kind && event.sender == ghost && event.content().get(key) == Some(&json!(value))
            })
        };
        set("m.room.topic", "topic", "set on Matrix").await.unwrap();
        set("m.room.name", "name", "named on Matrix").await.unwrap();
        assert_eq!(world.hub.state(lm_room, "m.room.name", "").unwrap()["name"], "named on Matrix");
    });
}

#[test]
fn display_names_follow() {
    on_both(async |world| {
        let portal = Portal::open(world, "names").await;
        let Portal { bob, lm_room, alice, room, .. } = &portal;
        alice.set_display_name("Alice the second").await.unwrap();
        let ghost = portal.alices_ghost();
        let renamed = |event: &isthmus::event::Pdu| {
            event.state_key.as_deref() == Some(&ghost)
                && event.content().get("displayname") == Some(&json!("Alice the second"))
        };
        world.hub.wait_for(lm_room, "the new name", renamed).await.unwrap();
        let content = json!({ "membership": "join", "displayname": "Robert" });
        world.hub.send(bob, lm_room, "m.room.member", Some(bob.as_str()), content).unwrap();
        let image = world.image_of(bob);
        alice
            .wait_for_state(room, "m.room.member", &image, |content| content["displayname"] == "Robert")
            .await
            .unwrap();
    });
}

#[test]
fn leaving_crosses_both_ways_and_so_does_coming_back() {
    on_both(async |world| {
        let portal = Portal::open(world, "leaves").await;
        let Portal { eve, lm_room, alice, room, .. } = &portal;
        let image = world.image_of(eve);
        world.hub.leave(eve, lm_room).await.unwrap();
        let left = alice.wait_for_member(room, &image, "leave").await.unwrap();
        assert_eq!(left["sender"], image.as_str());

        let anna = world.user(world.a, "anna-leaves", "Anna").await;
        anna.join(room, &[]).await.unwrap();
        let ghost = world.ghost_of(&anna.user_id);
        world.hub.wait_for_member(lm_room, &ghost, "join").await.unwrap();
        anna.leave(room).await.unwrap();
        let left = world.hub.wait_for_member(lm_room, &ghost, "leave").await.unwrap();
        assert_eq!(left.sender, ghost);

        anna.join(room, &[]).await.unwrap();
        anna.send_text(room, "back again").await.unwrap();
        assert_eq!(world.hub.wait_for_text(lm_room, "back again").await.unwrap().sender, ghost);
        world.hub.join(eve, lm_room.as_str(), &[]).await.unwrap();
        world.hub.send_text(eve, lm_room, "me too").unwrap();
        assert_eq!(alice.wait_for_text(room, "me too").await.unwrap()["sender"], image.as_str());
    });
}

#[test]
fn an_lm_user_kicks_and_bans_a_matrix_user() {
    on_both(async |world| {
        let portal = Portal::open(world, "lm-kick").await;
        let Portal { bob, lm_room, alice, room, .. } = &portal;
        let anna = world.user(world.a, "anna-lm-kick", "Anna").await;
        anna.join(room, &[]).await.unwrap();
        let ghost = world.ghost_of(&anna.user_id);
        world.hub.wait_for_member(lm_room, &ghost, "join").await.unwrap();
        let ghost = <&UserId>::try_from(ghost.as_str()).unwrap();

        world.hub.set_membership(bob, lm_room, ghost, "leave", Some("too loud")).unwrap();
        let kicked = alice.wait_for_member(room, &anna.user_id, "leave").await.unwrap();
        assert_eq!(kicked["content"]["reason"], "too loud");
        assert_ne!(kicked["sender"], anna.user_id.as_str());
        // A kick does not keep anybody out for good.
        anna.join(room, &[]).await.unwrap();
        world.hub.send_text(bob, lm_room, "after the kick").unwrap();
        anna.wait_for_text(room, "after the kick").await.unwrap();

        world.hub.set_membership(bob, lm_room, ghost, "ban", Some("for good")).unwrap();
        let banned = alice.wait_for_member(room, &anna.user_id, "ban").await.unwrap();
        assert_eq!(banned["content"]["reason"], "for good");
        assert!(anna.join(room, &[]).await.is_err());
        assert!(anna.send_text(room, "still here").await.is_err());

        world.hub.set_membership(bob, lm_room, ghost, "leave", None).unwrap();
        let lifted = |event: &Value| {
            event["state_key"] == anna.user_id.as_str()
                && event["content"]["membership"] == "leave"
                && event["unsigned"]["prev_content"]["membership"] == "ban"
        };
        alice.wait_for(room, "the end of the ban", lifted).await.unwrap();
        anna.join(room, &[]).await.unwrap();
        anna.send_text(room, "after the ban").await.unwrap();
        world.hub.wait_for_text(lm_room, "after the ban").await.unwrap();
    });
}

#[test]
fn a_matrix_user_with_power_kicks_and_bans_an_lm_user() {
    on_both(async |world| {
        let portal = Portal::open(world, "mx-kick").await;
        let Portal { eve, lm_room, alice, room, .. } = &portal;
        let image = world.image_of(eve);
        assert!(alice.kick(room, &image, "no power yet").await.is_err());
        portal.give_power(50).await;
        alice.kick(room, &image, "out").await.unwrap();
        let kicked = world.hub.wait_for_member(lm_room, eve.as_str(), "leave").await.unwrap();
        assert_eq!(kicked.sender, portal.alices_ghost());
        assert_eq!(kicked.content().get("reason"), Some(&json!("out")));

        world.hub.join(eve, lm_room.as_str(), &[]).await.unwrap();
        world.hub.send_text(eve, lm_room, "here again").unwrap();
        alice.wait_for_text(room, "here again").await.unwrap();
        alice.ban(room, &image, "for good").await.unwrap();
        world.hub.wait_for_member(lm_room, eve.as_str(), "ban").await.unwrap();
        assert!(world.hub.join(eve, lm_room.as_str(), &[]).await.is_err());
        alice.unban(room, &image).await.unwrap();
        let lifted = |event: &isthmus::event::Pdu| {
            event.state_key.as_deref() == Some(eve.as_str())
                && event.content().get("membership") == Some(&json!("leave"))
        };
        world.hub.wait_for_many(lm_room, "the end of the ban", 2, lifted).await.unwrap();
    });
}

#[test]
fn formatted_and_unknown_events_cross_and_provenance_is_the_gateways_own() {
    on_both(async |world| {
        let portal = Portal::open(world, "content").await;
        let Portal { bob, lm_room, alice, room, .. } = &portal;
        let html = json!({ "msgtype": "m.text", "body": "a *b*", "format": "org.matrix.custom.html",
            "formatted_body": "a <b>b</b>", "im.isthmus.source": { "forged": true } });
        alice.send(room, "m.room.message", html).await.unwrap();
        let heard = world.hub.wait_for_text(lm_room, "a *b*").await.unwrap();
        assert_eq!(heard.content().get("formatted_body"), Some(&json!("a <b>b</b>")));
        assert_eq!(heard.content()["im.isthmus.source"]["sender"], alice.user_id.as_str());
        assert_eq!(heard.content()["im.isthmus.source"]["room_id"], room.as_str());

        world.hub.send(bob, lm_room, "org.example.poke", None, json!({ "strength": 3 })).unwrap();
        let poked = alice.wait_for(room, "a poke", |event| event["type"] == "org.example.poke").await.unwrap();
        assert_eq!(poked["content"]["strength"], 3);
        assert_eq!(poked["sender"], world.image_of(bob).as_str());
        assert_eq!(poked["content"]["im.isthmus.source"]["room_id"], lm_room.as_str());
    });
}

#[test]
fn relations_and_redactions_point_to_the_images() {
    on_both(async |world| {
        let portal = Portal::open(world, "relations").await;
        let Portal { bob, lm_room, alice, room, .. } = &portal;
        let question = alice.send_text(room, "a question").await.unwrap();
        let heard = world.hub.wait_for_text(lm_room, "a question").await.unwrap();

        let reply = json!({ "msgtype": "m.text", "body": "an answer",
            "m.relates_to": { "m.in_reply_to": { "event_id": heard.event_id } } });
        let answer = world.hub.send(bob, lm_room, "m.room.message", None, reply).unwrap();
        let seen = alice.wait_for_text(room, "an answer").await.unwrap();
        assert_eq!(seen["content"]["m.relates_to"]["m.in_reply_to"]["event_id"], question.as_str());
        let relates = |id: &str| json!({ "m.relates_to": { "rel_type": "m.annotation", "event_id": id, "key": "x" } });
        let seen_id = seen["event_id"].as_str().unwrap();
        alice.send(room, "m.reaction", relates(seen_id)).await.unwrap();
        let reaction = world.hub.wait_for(lm_room, "a reaction", |event| event.kind == "m.reaction").await.unwrap();
        assert_eq!(reaction.content()["m.relates_to"]["event_id"], answer.as_str());

        let redacts = json!({ "redacts": answer, "reason": "wrong" });
        world.hub.send(bob, lm_room, "m.room.redaction", None, redacts).unwrap();
        alice.wait_for(room, "the redaction", |event| event["type"] == "m.room.redaction").await.unwrap();
        let gone = alice.event(room, seen_id).await.unwrap();
        assert_eq!(gone["content"], json!({}), "{gone}");
        alice.send(room, "m.room.message", json!({ "msgtype": "m.text", "body": "to be gone" })).await.unwrap();
        let heard = world.hub.wait_for_text(lm_room, "to be gone").await.unwrap();
        let id = alice.wait_for_text(room, "to be gone").await.unwrap()["event_id"].as_str().unwrap().to_owned();
        alice.redact(room, &id, "wrong too").await.unwrap();
        let redaction = world.hub.wait_for(lm_room, "the redaction", |event| {
            event.kind == "m.room.redaction" && event.sender == portal.alices_ghost()
        });
        assert_eq!(redaction.await.unwrap().content()["redacts"], heard.event_id.as_str());
    });
}

/// A content without what the gateway says of it, and the event of which it is the image.
fn image(content: &Value) -> (Value, Option<String>) {
    let mut content = content.clone();
    let source = content.as_object_mut().unwrap().remove("im.isthmus.source");
    (content, source.and_then(|source| source["event_id"].as_str().map(str::to_owned)))
}

/// Something about a message and a user: an edit, an answer in its thread, a mention, a poll.
fn about(event_id: &str, user_id: &str) -> [(&'static str, Value); 4] {
    let text = |body: &str| json!([{ "body": body }]);
    let link = format!("<a href=\"https://matrix.to/#/{user_id}\">you</a>");
    [
        (
            "m.room.message",
            json!({ "msgtype": "m.text", "body": "* better", "m.new_content": { "msgtype": "m.text", "body": "better" },
                "m.relates_to": { "rel_type": "m.replace", "event_id": event_id } }),
        ),
        (
            "m.room.message",
            json!({ "msgtype": "m.text", "body": "in a thread", "m.relates_to": { "rel_type": "m.thread",
                "event_id": event_id, "is_falling_back": true, "m.in_reply_to": { "event_id": event_id } } }),
        ),
        (
            "m.room.message",
            json!({ "msgtype": "m.text", "body": "you!", "format": "org.matrix.custom.html", "formatted_body": link,
                "m.mentions": { "user_ids": [user_id] } }),
        ),
        (
            "m.poll.start",
            json!({ "m.text": text("Tea?"), "m.poll": { "kind": "m.disclosed", "max_selections": 1,
                "question": { "m.text": text("Tea?") }, "answers": [{ "m.id": "yes", "m.text": text("Yes") }] } }),
        ),
    ]
}

/// A vote in a poll.
fn vote(poll: &str) -> (&'static str, Value) {
    let relates = json!({ "rel_type": "m.reference", "event_id": poll });
    ("m.poll.response", json!({ "m.relates_to": relates, "m.selections": ["yes"] }))
}

#[test]
fn edits_threads_mentions_and_polls_name_what_is_there() {
    on_both(async |world| {
        let portal = Portal::open(world, "threads").await;
        let Portal { bob, lm_room, alice, room, .. } = &portal;
        let (ghost, bobs_image) = (portal.alices_ghost(), world.image_of(bob));
        // From Matrix: the event that comes of one that Alice sends, and that is as expected.
        let from_matrix = async |(kind, content): (&str, Value), expected: Value| {
            let id = alice.send(room, kind, content).await.unwrap();
            let of = |event: &isthmus::event::Pdu| image(&Value::Object(event.content().clone()));
            let is_it = |event: &isthmus::event::Pdu| of(event).1.as_deref() == Some(id.as_str());
            let heard = world.hub.wait_for(lm_room, kind, is_it).await.unwrap();
            assert_eq!((heard.kind.as_str(), of(&heard).0), (kind, expected));
            (id, heard.event_id.to_string())
        };
        let root = alice.send_text(room, "Alice begins").await.unwrap();
        let heard = world.hub.wait_for_text(lm_room, "Alice begins").await.unwrap();
        let mut last = (String::new(), String::new());
        for (near, (_, far)) in about(&root, &bobs_image).into_iter().zip(about(heard.event_id.as_str(), bob.as_str()))
        {
            last = from_matrix(near, far).await;
        }
        from_matrix(vote(&last.0), vote(&last.1).1).await;

        // From LM.
        let from_lm = async |(kind, content): (&str, Value), expected: Value| {
            let id = world.hub.send(bob, lm_room, kind, None, content).unwrap();
            let is_it = |event: &Value| image(&event["content"]).1.as_deref() == Some(id.as_str());
            let seen = alice.wait_for(room, kind, is_it).await.unwrap();
            assert_eq!((&seen["type"], image(&seen["content"]).0), (&json!(kind), expected));
            (id.to_string(), seen["event_id"].as_str().unwrap().to_owned())
        };
        let root = world.hub.send_text(bob, lm_room, "Bob begins").unwrap();
        let seen = alice.wait_for_text(room, "Bob begins").await.unwrap();
        let seen = seen["event_id"].as_str().unwrap();
        for (near, (_, far)) in about(root.as_str(), &ghost).into_iter().zip(about(seen, &alice.user_id)) {
            last = from_lm(near, far).await;
        }
        from_lm(vote(&last.0), vote(&last.1).1).await;
    });
}
