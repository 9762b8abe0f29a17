//! Strange and hostile events of one side never keep the other from what is said after them.

use ruma::{OwnedRoomId, OwnedUserId};
use serde_json::{Value, json};

use crate::support::testbed::client::Client;
use crate::support::world::{World, run, world};

/// 2^53 - 1.
const BIGGEST: i64 = 9_007_199_254_740_991;

#[test]
fn hc_14_15_19_23_nothing_from_lm_poisons_the_matrix_room() {
    run(async {
        let world = world().await;
        let (bob, lm_room) = world.lm_room("poison");
        let alice = world.user(world.a, "alice-poison", "Alice").await;
        let carol = world.user(world.b, "carol-poison", "Carol").await;
        let room = alice.join(&world.alias("poison", &world.a.server_name), &[]).await.unwrap();
        carol.join(&world.alias("poison", &world.gateway.server_name), &[]).await.unwrap();

        let mut taken = 0;
        for (number, (kind, state_key, ts, content)) in strange_lm_events(&bob).into_iter().enumerate() {
            let mut event = json!({ "type": kind, "room_id": lm_room, "sender": bob, "content": content,
                "origin_server_ts": ts.unwrap_or(1_700_000_000_000_i64) });
            if let Some(state_key) = &state_key {
                event["state_key"] = json!(state_key);
            }
            taken += usize::from(world.hub.send_raw(&lm_room, event).is_ok());
            let alive = format!("alive after {number}");
            world.hub.send_text(&bob, &lm_room, &alive).unwrap();
            for client in [&alice, &carol] {
                let heard = client.wait_for_text(&room, &alive).await;
                heard.unwrap_or_else(|error| panic!("after {kind:?} {state_key:?}: {error:#}"));
            }
        }
        assert!(taken >= 20, "the hub itself took only {taken} of them");
        still_talks(world, &alice, &room, &bob, &lm_room).await;
    });
}

/// Type, state key, time and content.
type Strange = (String, Option<String>, Option<i64>, Value);

fn strange_lm_events(bob: &OwnedUserId) -> Vec<Strange> {
    let message = |content: Value| ("m.room.message".to_owned(), None, None, content);
    let text = |body: &str| json!({ "msgtype": "m.text", "body": body });
    let state = |kind: &str, key: &str, content: Value| (kind.to_owned(), Some(key.to_owned()), None, content);
    let nested = (0..90).fold(json!("deep"), |inner, _| json!({ "x": inner }));
    let member = |content: Value| state("m.room.member", bob.as_str(), content);
    let mut events = vec![
        // Times.
        ("m.room.message".to_owned(), None, Some(4_102_444_800_000), text("from the year 2100")),
        ("m.room.message".to_owned(), None, Some(BIGGEST), text("from the end of time")),
        ("m.room.message".to_owned(), None, Some(0), text("from 1970")),
        // Types and state keys.
        ("t".repeat(255), None, None, json!({})),
        ("org.example.\u{0}nul".to_owned(), None, None, json!({})),
        ("".to_owned(), None, None, json!({})),
        state("org.example.state", "\u{0}", json!({ "a": 1 })),
        state("org.example.state", &"k".repeat(255), json!({})),
        // Contents.
        message(json!({ "msgtype": "m.text", "body": "nul \u{0} in it" })),
        message(json!({ "msgtype": "m.text", "body": "\u{202e}\u{2028}\u{ffff}" })),
        message(json!({ "body": { "not": "text" } })),
        message(json!({})),
        message(nested),
        message(json!({ "msgtype": "m.text", "body": "big", "n": [BIGGEST, -BIGGEST] })),
        message(json!({ "msgtype": "m.text", "body": "relates", "m.relates_to": "nothing" })),
        message(
            json!({ "msgtype": "m.text", "body": "relates", "m.relates_to": { "event_id": "$unknown", "rel_type": "m.replace" } }),
        ),
        message(json!({ "msgtype": "m.text", "body": "mentions", "m.mentions": { "user_ids": ["nonsense", 5] } })),
        ("m.room.redaction".to_owned(), None, None, json!({ "redacts": "$unknown" })),
        ("m.room.redaction".to_owned(), None, None, json!({ "redacts": 5 })),
        ("m.reaction".to_owned(), None, None, json!({ "m.relates_to": { "event_id": 5 } })),
        // State that the other side reads.
        state("m.room.name", "", json!({ "name": 5 })),
        state("m.room.name", "", json!({ "name": "n".repeat(5000) })),
        state("m.room.topic", "", json!({ "topic": ["a"] })),
        state("m.room.avatar", "", json!({ "url": 7 })),
        state("m.room.canonical_alias", "", json!({ "alias": "#nonsense" })),
        state("m.room.join_rules", "", json!({ "join_rule": "unheard of" })),
        state("m.room.join_rules", "", json!({ "join_rule": "public" })),
        state("m.room.history_visibility", "", json!({ "history_visibility": 3 })),
        state("m.room.tombstone", "elsewhere", json!({ "body": 5 })),
        state("m.room.create", "again", json!({})),
        member(json!({ "membership": "join", "displayname": { "not": "text" }, "avatar_url": 3 })),
        member(json!({ "membership": "join", "displayname": "d".repeat(3000) })),
        member(json!({ "membership": "join", "displayname": "Bob", "join_authorised_via_users_server": "@x:y" })),
        state("m.room.member", "@never:nowhere.invalid", json!({ "membership": "ban", "reason": 4 })),
        state("m.room.power_levels", "", json!({ "users": { bob.as_str(): 100 }, "events": { "m.room.message": -5 } })),
        state(
            "m.room.power_levels",
            "",
            json!({ "users": { bob.as_str(): 100, "@never:nowhere.invalid": 3 }, "extra": "x" }),
        ),
        state("m.room.power_levels", "", json!({ "users": { bob.as_str(): 100 } })),
    ];
    // As large as LM allows: too large for a Matrix event that says where it comes from.
    events.push(message(text(&"b".repeat(64_500))));
    events.push(message(text(&"b".repeat(65_000))));
    events
}

#[test]
fn hc_14_15_19_nothing_from_matrix_poisons_the_log() {
    run(async {
        let world = world().await;
        let (bob, lm_room) = world.lm_room("venom");
        let alice = world.user(world.a, "alice-venom", "Alice").await;
        let room = alice.join(&world.alias("venom", &world.a.server_name), &[]).await.unwrap();
        let levels = json!({ "users": { bob.as_str(): 100, world.ghost_of(&alice.user_id): 100 } });
        world.hub.send(&bob, &lm_room, "m.room.power_levels", Some(""), levels).unwrap();
        let user = alice.user_id.clone();
        let has = move |content: &Value| content["users"][&user].as_i64() >= Some(99);
        alice.wait_for_state(&room, "m.room.power_levels", "", has).await.unwrap();

        let mut taken = 0;
        for (number, (kind, state_key, _, content)) in strange_matrix_events(&alice).into_iter().enumerate() {
            let sent = match &state_key {
                Some(state_key) => alice.set_state(&room, &kind, state_key, content).await,
                None => alice.send(&room, &kind, content).await,
            };
            taken += usize::from(sent.is_ok());
            let alive = format!("alive after {number}");
            alice.send_text(&room, &alive).await.unwrap();
            let heard = world.hub.wait_for_text(&lm_room, &alive).await;
            heard.unwrap_or_else(|error| panic!("after {kind:?} {state_key:?}: {error:#}"));
        }
        assert!(taken >= 12, "Synapse itself took only {taken} of them");
        assert_eq!(world.hub.complaints(&lm_room), [""; 0]);
        still_talks(world, &alice, &room, &bob, &lm_room).await;
    });
}

fn strange_matrix_events(alice: &Client) -> Vec<Strange> {
    let message = |content: Value| ("m.room.message".to_owned(), None, None, content);
    let text = |body: &str| json!({ "msgtype": "m.text", "body": body });
    let state = |kind: &str, key: &str, content: Value| (kind.to_owned(), Some(key.to_owned()), None, content);
    let nested = (0..90).fold(json!("deep"), |inner, _| json!({ "x": inner }));
    vec![
        ("t".repeat(255), None, None, json!({})),
        ("org.example.\u{0}nul".to_owned(), None, None, json!({})),
        message(text("nul \u{0} in it")),
        message(text("\u{202e}\u{2028}\u{ffff}")),
        message(json!({ "msgtype": "m.text", "body": { "not": "text" } })),
        message(json!({})),
        message(nested),
        message(json!({ "msgtype": "m.text", "body": "big", "n": [BIGGEST, -BIGGEST] })),
        message(json!({ "msgtype": "m.text", "body": "relates", "m.relates_to": "nothing" })),
        message(json!({ "msgtype": "m.text", "body": "m", "m.mentions": { "user_ids": ["nonsense", 5] } })),
        message(json!({ "msgtype": "m.text", "body": "forged", "im.isthmus.source": 5, "im.isthmus.repair": true })),
        message(text(&"b".repeat(64_000))),
        message(text(&"b".repeat(64_900))),
        (
            "m.reaction".to_owned(),
            None,
            None,
            json!({ "m.relates_to": { "event_id": "$unknown", "rel_type": "m.annotation" } }),
        ),
        ("m.room.encrypted".to_owned(), None, None, json!({ "algorithm": "m.megolm.v1.aes-sha2" })),
        ("m.mls.commit".to_owned(), None, None, json!({})),
        state("org.example.state", "\u{0}", json!({ "a": 1 })),
        state("m.room.name", "", json!({ "name": 5 })),
        state("m.room.topic", "", json!({ "topic": ["a"] })),
        state("m.room.hub", "", json!({ "server": "evil.example" })),
        state("m.room.member", &alice.user_id, json!({ "membership": "join", "displayname": "d".repeat(2000) })),
        state("m.room.guest_access", "", json!({ "guest_access": 5 })),
        state("m.space.child", "!x:y", json!({ "via": 5 })),
    ]
}

/// Both still hear each other, and nothing waits.
async fn still_talks(world: &World, alice: &Client, room: &str, bob: &OwnedUserId, lm_room: &OwnedRoomId) {
    alice.send_text(room, "last from Matrix").await.unwrap();
    world.hub.wait_for_text(lm_room, "last from Matrix").await.unwrap();
    world.hub.send_text(bob, lm_room, "last from LM").unwrap();
    alice.wait_for_text(room, "last from LM").await.unwrap();
    let health = world.gateway.health().await.unwrap();
    // That the hub has what the rules forbid is said, and nothing else is wrong.
    let problems = health["problems"].as_array().unwrap().iter().filter_map(|problem| problem.as_str());
    let others: Vec<&str> = problems.filter(|problem| !problem.starts_with("foreign hubs misbehaved")).collect();
    assert_eq!(others, [""; 0], "{health}");
}
