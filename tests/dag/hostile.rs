//! Hostile and faulty events, by the numbers of the list of cases.

use isthmus::event::RoomVersion;
use isthmus::seam::Received;
use isthmus::store::dag as stored;
use serde_json::json;

use super::peer::{Peer, View};
use super::*;

struct Scene {
    peer: Peer,
    gateway: Gateway,
    room: OwnedRoomId,
    alice: OwnedUserId,
    view: View,
}

async fn scene(version: RoomVersion) -> Scene {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    let room = gateway.room(version, "public").await;
    let alice = peer.user("alice");
    let view = peer.join(&gateway, &room, &alice).await.unwrap();
    Scene { peer, gateway, room, alice, view }
}

impl Scene {
    async fn put(&self, event: &Object) -> Received {
        self.peer.put(&self.gateway.dag, &[event]).await.remove(0)
    }

    /// A message signed after its template was changed.
    fn changed(&self, field: &str, value: serde_json::Value) -> (OwnedEventId, Object) {
        let mut event = self.view.next(&self.alice, "m.room.message", None, json!({ "body": "x" }));
        event[field] = value;
        self.peer.sign(self.view.version, event)
    }
}

#[tokio::test]
async fn hc_29_bad_and_missing_signatures_are_refused() {
    let scene = scene(RoomVersion::V12).await;
    let (id, event) = scene.changed("depth", json!(20));
    let mut forged = event.clone();
    forged["signatures"][scene.peer.name.as_str()][scene.peer.key.id()] = json!("A".repeat(86));
    let mut unsigned = event.clone();
    unsigned.remove("signatures");
    let mut other = event.clone();
    other["sender"] = json!(bot());
    for event in [forged, unsigned, other] {
        assert_eq!(scene.put(&event).await.result.unwrap_err().code(), "bad_signature");
    }
    assert!(scene.gateway.dag.event(&id).await.unwrap().is_none());
    assert!(scene.put(&event).await.result.is_ok());
}

#[tokio::test]
async fn hc_06_an_event_dated_beyond_its_signers_keys_is_refused_and_both_times_are_named() {
    let scene = scene(RoomVersion::V12).await;
    let (far, valid_until) = (NOW + 30 * 86_400_000, NOW + 86_400_000);
    let (id, event) = scene.changed("origin_server_ts", json!(far));
    let refused = scene.put(&event).await.result.unwrap_err();
    let text = refused.to_string();
    assert_eq!((refused.code(), refused.is_transient()), ("key_out_of_time", false), "{text}");
    for named in ["peer.example", &far.to_string(), &valid_until.to_string()] {
        assert!(text.contains(named), "{text} does not name {named}");
    }
    assert!(scene.gateway.dag.event(&id).await.unwrap().is_none());
    // Who has not signed it has forged it, whatever it is dated.
    let mut forged = event;
    forged["signatures"][scene.peer.name.as_str()][scene.peer.key.id()] = json!("A".repeat(86));
    assert_eq!(scene.put(&forged).await.result.unwrap_err().code(), "bad_signature");
}

#[tokio::test]
async fn hc_14_an_integer_that_is_not_written_as_one_is_refused_by_its_id() {
    for version in [RoomVersion::V10, RoomVersion::V12] {
        let scene = scene(version).await;
        let (id, event) = scene.changed("content", json!({ "msgtype": "m.text", "body": "x", "n": 50 }));
        for written in ["50.0", "5e1", "50.00"] {
            let text = serde_json::to_string(&event).unwrap().replace(r#""n":50"#, &format!(r#""n":{written}"#));
            assert!(text.contains(written));
            let raw = serde_json::value::RawValue::from_string(text).unwrap();
            let received = scene.gateway.dag.receive(&scene.peer.name, vec![raw]).await.remove(0);
            assert_eq!((received.event_id.as_ref(), received.result.unwrap_err().code()), (Some(&id), "malformed"));
        }
        // The same with an integer is another matter.
        let received = scene.put(&event).await;
        assert_eq!((received.event_id, received.result), (Some(id), Ok(())));
    }
}

#[tokio::test]
async fn a_wrong_content_hash_leaves_the_redacted_copy() {
    let scene = scene(RoomVersion::V11).await;
    let (id, mut event) = scene.changed("depth", json!(20));
    event["content"]["body"] = json!("changed on the way");
    assert!(scene.put(&event).await.result.is_ok());
    let kept = scene.gateway.dag.event(&id).await.unwrap().unwrap();
    assert!(kept.content.is_empty());
    assert_eq!(scene.gateway.inbox(&scene.room).await.last(), Some(&id));
}

#[tokio::test]
async fn hc_14_hc_16_hc_23_malformed_events_fail_alone() {
    let scene = scene(RoomVersion::V12).await;
    let (good, event) = scene.changed("depth", json!(9));
    let good_text = serde_json::to_string(&event).unwrap();
    let texts = [
        good_text.replacen("\"depth\":9", "\"depth\":9.5", 1),
        good_text.replacen("\"depth\":9", "\"depth\":-1", 1),
        good_text.replacen("\"depth\":9", "\"depth\":9007199254740992", 1),
        good_text.replacen("\"depth\":9", "\"depth\":9,\"depth\":10", 1),
        good_text.replacen("\"depth\":9", "\"depth\":\"9\"", 1),
        good_text.replacen("\"prev_events\":[", "\"prev_events\":[\"$short\",", 1),
        good_text.replacen("\"type\":\"m.room.message\"", &format!("\"type\":\"{}\"", "x".repeat(256)), 1),
        good_text.replacen("\"body\":\"x\"", &format!("\"body\":\"{}\"", "x".repeat(70_000)), 1),
        good_text.replacen("\"body\":\"x\"", &format!("\"body\":{}1{}", "[".repeat(20_000), "]".repeat(20_000)), 1),
        good_text.replacen("\"content\":{\"body\":\"x\"}", "\"content\":[]", 1),
        good_text.replacen("\"body\":\"x\"", "\"body\":\"\\ud800\"", 1),
    ];
    for text in &texts {
        assert_ne!(*text, good_text);
    }
    let mut raw: Vec<_> =
        texts.into_iter().filter_map(|text| serde_json::value::RawValue::from_string(text).ok()).collect();
    let bad = raw.len();
    assert!(bad >= 10);
    raw.push(serde_json::value::RawValue::from_string(good_text).unwrap());
    let results = scene.gateway.dag.receive(&scene.peer.name, raw).await;
    for (index, received) in results.iter().enumerate() {
        assert_eq!(received.result.is_ok(), index == bad, "{index}: {received:?}");
    }
    assert!(scene.gateway.dag.event(&good).await.unwrap().is_some());
}

#[tokio::test]
async fn hc_23_the_greatest_depth_does_not_stop_the_room() {
    let scene = scene(RoomVersion::V11).await;
    let (id, event) = scene.changed("depth", json!((1_i64 << 53) - 1));
    assert!(scene.put(&event).await.result.is_ok());
    for _ in 0..3 {
        let next = scene.gateway.send(&scene.room, message(&bot(), "on")).await.unwrap();
        assert_eq!(scene.gateway.dag.event(&next).await.unwrap().unwrap().depth, (1_i64 << 53) - 1);
    }
    assert!(scene.gateway.dag.event(&id).await.unwrap().is_some());
}

#[tokio::test]
async fn hc_41_auth_events_of_another_room_duplicated_superfluous_or_rejected() {
    for version in VERSIONS {
        let scene = scene(version).await;
        let elsewhere = scene.gateway.room(version, "public").await;
        let there = scene.peer.join(&scene.gateway, &elsewhere, &scene.alice).await.unwrap();
        let key = |kind: &str, state_key: &str| (kind.to_owned(), state_key.to_owned());
        let member = key("m.room.member", scene.alice.as_str());
        let levels = key("m.room.power_levels", "");
        let auth = |ids: &[&OwnedEventId]| {
            let mut list = ids.to_vec();
            let create = &scene.view.state[&key("m.room.create", "")];
            if version != RoomVersion::V12 {
                list.push(create);
            }
            json!(list)
        };
        let (here_member, here_levels) = (&scene.view.state[&member], &scene.view.state[&levels]);
        // A topic that Alice has no power to set is rejected; then it is cited.
        let (rejected, topic) = {
            let mut view = scene.view.clone();
            view.add(&scene.peer, &scene.alice, "m.room.topic", Some(""), json!({ "topic": "x" }))
        };
        assert_eq!(scene.put(&topic).await.result.unwrap_err().code(), "matrix_rule");
        let cases = [
            auth(&[&there.state[&member], here_levels]),
            auth(&[here_member, here_member, here_levels]),
            auth(&[here_member, here_levels, &scene.view.state[&key("m.room.history_visibility", "")]]),
            auth(&[here_member, here_levels, &rejected]),
            auth(&[here_levels]),
            json!([]),
        ];
        for (number, case) in cases.into_iter().enumerate() {
            let (id, event) = scene.changed("auth_events", case);
            assert!(scene.put(&event).await.result.is_err(), "case {number} in version {version}");
            assert!(scene.gateway.dag.event(&id).await.unwrap().is_none());
        }
        if version == RoomVersion::V12 {
            // HC-46: the create event must not be cited.
            let create = &scene.view.state[&key("m.room.create", "")];
            let (_, event) = scene.changed("auth_events", json!([here_member, here_levels, create]));
            assert_eq!(scene.put(&event).await.result.unwrap_err().code(), "malformed");
        }
    }
}

/// Each of them is allowed by one before it, which nobody has heard of either: fetching them ends, and the room goes on.
#[tokio::test]
async fn hc_41_an_endless_chain_of_auth_events_ends() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    let alice = peer.user("alice");
    for version in VERSIONS {
        let users = if version == RoomVersion::V12 { json!({}) } else { json!({ bot().as_str(): 100 }) };
        let levels = json!({ "users_default": 60, "users": users, "events": { "m.room.power_levels": 50 } });
        let public = state("m.room.join_rules", "", json!({ "join_rule": "public" }));
        let room = gateway.room_with(version, vec![public, state("m.room.power_levels", "", levels.clone())]).await;
        let view = peer.join(&gateway, &room, &alice).await.unwrap();
        let mut chain = view.clone();
        for number in 0..2_000 {
            let mut levels = levels.clone();
            levels["events"]["org.example.counter"] = json!(number % 50);
            chain.add(&peer, &alice, "m.room.power_levels", Some(""), levels);
        }
        // Where it stands all is known.
        let mut next = chain.next(&alice, "m.room.message", None, json!({ "body": "allowed by all that" }));
        next["prev_events"] = json!(view.tips);
        let (id, event) = peer.sign(version, next);
        peer.memory.asked.lock().unwrap().clear();
        assert!(peer.put(&gateway.dag, &[&event]).await.remove(0).result.is_err());
        let asked = peer.memory.asked.lock().unwrap().len();
        assert!(asked < 600, "{asked} requests");
        assert!(gateway.dag.event(&id).await.unwrap().is_none());
        gateway.send(&room, message(&bot(), "fine")).await.unwrap();
        let (_, event) = view.clone().say(&peer, &alice, "fine too");
        assert!(peer.put(&gateway.dag, &[&event]).await.remove(0).result.is_ok());
    }
}

#[tokio::test]
async fn hc_42_leaving_out_the_power_levels_does_not_help() {
    for version in VERSIONS {
        let scene = scene(version).await;
        let key = |kind: &str, state_key: &str| (kind.to_owned(), state_key.to_owned());
        let mut auth = vec![scene.view.state[&key("m.room.member", scene.alice.as_str())].clone()];
        if version != RoomVersion::V12 {
            auth.push(scene.view.state[&key("m.room.create", "")].clone());
        }
        let mut event = scene.view.next(&scene.alice, "m.room.topic", Some(""), json!({ "topic": "mine" }));
        event["auth_events"] = json!(auth);
        let (_, event) = scene.peer.sign(version, event);
        assert_eq!(scene.put(&event).await.result.unwrap_err().code(), "matrix_rule");
        let mut event = scene.view.next(&scene.alice, "m.room.message", None, json!({ "body": "harmless" }));
        event["auth_events"] = json!(auth);
        let (_, event) = scene.peer.sign(version, event);
        assert!(scene.put(&event).await.result.is_ok());
    }
}

#[tokio::test]
async fn servers_that_are_not_in_a_room_leave_nothing_in_it() {
    let (peer, stranger) = (Peer::start("peer.example").await, Peer::start("stranger.example").await);
    let gateway = Gateway::start(&[&peer, &stranger]).await;
    for version in VERSIONS {
        let room = gateway.room(version, "public").await;
        let alice = peer.user("alice");
        let mut view = peer.join(&gateway, &room, &alice).await.unwrap();
        let (id, event) = view.clone().say(&stranger, &stranger.user("mallory"), "spam");
        let refused = stranger.put(&gateway.dag, &[&event]).await.remove(0).result.unwrap_err();
        assert_eq!(refused.code(), "matrix_rule", "{refused}");
        assert_eq!(stored::events(&gateway.context.store, &[id]).await.unwrap().len(), 0);
        // What somebody in the room does against its rules is remembered: others may refer to it.
        let (id, event) = view.add(&peer, &alice, "m.room.name", Some(""), json!({ "name": "mine" }));
        assert!(peer.put(&gateway.dag, &[&event]).await[0].result.is_err());
        assert_eq!(stored::events(&gateway.context.store, &[id]).await.unwrap().len(), 1);
    }
}

#[tokio::test]
async fn hc_43_power_levels_of_the_wrong_type_or_height_are_rejected() {
    for version in VERSIONS {
        let peer = Peer::start("peer.example").await;
        let gateway = Gateway::start(&[&peer]).await;
        let alice = peer.user("alice");
        let mut users = json!({ alice.as_str(): 90 });
        if version != RoomVersion::V12 {
            users[bot().as_str()] = json!(100);
        }
        let levels = |users: &serde_json::Value| json!({ "users": users, "events": { "m.room.power_levels": 50 } });
        let room = gateway
            .room_with(
                version,
                vec![
                    state("m.room.power_levels", "", levels(&users)),
                    state("m.room.join_rules", "", json!({ "join_rule": "public" })),
                ],
            )
            .await;
        let view = peer.join(&gateway, &room, &alice).await.unwrap();
        let with = |key: &str, value: serde_json::Value| {
            let mut users = users.clone();
            users[key] = value;
            levels(&users)
        };
        for bad in [
            with(alice.as_str(), json!("90")),
            with(alice.as_str(), json!(null)),
            with(alice.as_str(), json!(91)),
            with("@other:x", json!(91)),
            with("not a user", json!(1)),
            with(bot().as_str(), json!(0)),
            json!({ "users": [] }),
            json!({ "ban": "50", "users": users }),
        ] {
            let (_, event) = peer.sign(version, view.next(&alice, "m.room.power_levels", Some(""), bad.clone()));
            let received = peer.put(&gateway.dag, &[&event]).await.remove(0);
            assert!(received.result.is_err(), "{version}: {bad}");
        }
        let lower = with(alice.as_str(), json!(-5));
        let (id, event) = peer.sign(version, view.next(&alice, "m.room.power_levels", Some(""), lower));
        assert!(peer.put(&gateway.dag, &[&event]).await[0].result.is_ok());
        assert_eq!(gateway.state(&room).await[&("m.room.power_levels".to_owned(), String::new())], id);
    }
}

#[tokio::test]
async fn hc_46_another_create_event_is_refused() {
    for version in VERSIONS {
        let scene = scene(version).await;
        let mut create = json!({ "type": "m.room.create", "state_key": "", "sender": scene.alice, "depth": 1,
            "content": { "room_version": version.as_str(), "creator": scene.alice }, "origin_server_ts": NOW,
            "prev_events": [], "auth_events": [] });
        create["room_id"] = json!(scene.room);
        let (id, event) = scene.peer.sign(version, create);
        let result = scene.put(&event).await.result;
        assert!(result.is_err() || scene.gateway.dag.event(&id).await.unwrap().is_none());
        assert_ne!(scene.gateway.state(&scene.room).await[&("m.room.create".to_owned(), String::new())], id);
    }
}

#[tokio::test]
async fn hc_47_soft_failed_events_are_kept_and_do_not_spread() {
    for version in VERSIONS {
        let scene = scene(version).await;
        let mut view = scene.view.clone();
        let ban = state("m.room.member", scene.alice.as_str(), json!({ "membership": "ban" }));
        let ban = scene.gateway.send(&scene.room, ban).await.unwrap();
        let (first, one) = view.say(&scene.peer, &scene.alice, "one");
        let (second, two) = view.say(&scene.peer, &scene.alice, "two");
        for event in [&one, &two, &one] {
            assert!(scene.put(event).await.result.is_ok());
        }
        for id in [&first, &second] {
            assert!(scene.gateway.dag.event(id).await.unwrap().is_none());
            assert!(!scene.gateway.inbox(&scene.room).await.contains(id));
        }
        let next = scene.gateway.send(&scene.room, message(&bot(), "next")).await.unwrap();
        assert_eq!(scene.gateway.dag.event(&next).await.unwrap().unwrap().prev_events, [ban]);
    }
}

#[tokio::test]
async fn hc_49_redactions_of_others_of_themselves_and_across_rooms() {
    for version in VERSIONS {
        let scene = scene(version).await;
        let other = scene.gateway.send(&scene.room, message(&bot(), "the bot's")).await.unwrap();
        let mut view = scene.view.clone();
        let (own, event) = view.say(&scene.peer, &scene.alice, "my own");
        assert!(scene.put(&event).await.result.is_ok());
        let acl =
            scene.gateway.send(&scene.room, state("m.room.server_acl", "", json!({ "allow": ["*"] }))).await.unwrap();
        let elsewhere = scene.gateway.room(version, "public").await;
        let away = scene.gateway.send(&elsewhere, message(&bot(), "elsewhere")).await.unwrap();
        for target in [&other, &away, &own] {
            let mut event = view.next(&scene.alice, "m.room.redaction", None, json!({ "redacts": target }));
            event["redacts"] = json!(target);
            let (id, event) = scene.peer.sign(version, event);
            view.note(id, &event);
            assert!(scene.put(&event).await.result.is_ok());
        }
        let body = |id: OwnedEventId| {
            let dag = scene.gateway.dag.clone();
            async move { dag.event(&id).await.unwrap().unwrap().content.get("body").cloned() }
        };
        assert!(body(other).await.is_some());
        assert!(body(away).await.is_some());
        assert!(body(own.clone()).await.is_none());
        let served = scene.gateway.dag.get_event(&scene.peer.name, &own).await.unwrap();
        assert_eq!(served["pdus"][0]["content"], json!({}));
        // Without its content it would deny everybody.
        let redaction = draft(&bot(), "m.room.redaction", None, json!({ "redacts": acl }));
        scene.gateway.send(&scene.room, redaction).await.unwrap();
        let kept = scene.gateway.dag.event(&acl).await.unwrap().unwrap();
        assert_eq!(kept.content.get("allow"), Some(&json!(["*"])));
        let mine = scene.gateway.send(&scene.room, draft(&bot(), "m.room.redaction", None, json!({ "redacts": own })));
        assert_eq!(scene.gateway.dag.event(&mine.await.unwrap()).await.unwrap().unwrap().redacts, Some(own));
    }
}

#[tokio::test]
async fn hc_50_other_servers_and_other_rooms_read_nothing() {
    let scene = scene(RoomVersion::V12).await;
    let dag = &scene.gateway.dag;
    let private = scene.gateway.room(RoomVersion::V12, "invite").await;
    let secret = scene.gateway.send(&private, message(&bot(), "secret")).await.unwrap();
    let public = scene.gateway.send(&scene.room, message(&bot(), "public")).await.unwrap();
    let stranger: ruma::OwnedServerName = "stranger.example".try_into().unwrap();
    let peer = &scene.peer.name;
    let missing =
        |latest: &OwnedEventId| object(json!({ "latest_events": [latest], "earliest_events": [], "limit": 50 }));

    for (server, room, event) in
        [(peer, &private, &secret), (&stranger, &scene.room, &public), (&stranger, &private, &secret)]
    {
        let from = std::slice::from_ref(event);
        assert_eq!(dag.get_event(server, event).await.unwrap_err().code(), "forbidden");
        assert_eq!(dag.event_auth(server, room, event).await.unwrap_err().code(), "forbidden");
        assert_eq!(dag.get_state(server, room, event, true).await.unwrap_err().code(), "forbidden");
        assert_eq!(dag.get_state(server, room, event, false).await.unwrap_err().code(), "forbidden");
        assert_eq!(dag.backfill(server, room, from, 10).await.unwrap_err().code(), "forbidden");
        assert_eq!(dag.get_missing_events(server, room, missing(event)).await.unwrap_err().code(), "forbidden");
    }
    // The event of another room through a room that may be read.
    assert_eq!(dag.event_auth(peer, &scene.room, &secret).await.unwrap_err().code(), "not_found");
    assert_eq!(dag.get_state(peer, &scene.room, &secret, true).await.unwrap_err().code(), "not_found");
    let page = dag.backfill(peer, &scene.room, std::slice::from_ref(&secret), 10).await.unwrap();
    assert_eq!(page["pdus"], json!([]));
    let answer = dag.get_missing_events(peer, &scene.room, missing(&secret)).await.unwrap();
    assert_eq!(answer["events"], json!([]));

    let page = dag.backfill(peer, &scene.room, std::slice::from_ref(&public), 3).await.unwrap();
    assert_eq!(page["pdus"].as_array().unwrap().len(), 3);
    assert_eq!(page["pdus"][0]["content"]["body"], "public");
    let answer = dag.get_missing_events(peer, &scene.room, missing(&public)).await.unwrap();
    assert_eq!(answer["events"].as_array().unwrap().len(), 6);
    assert_eq!(answer["events"][0]["type"], "m.room.create");
    assert!(dag.get_event(peer, &public).await.is_ok());
    assert!(!dag.event_auth(peer, &scene.room, &public).await.unwrap()["auth_chain"].as_array().unwrap().is_empty());
}

#[tokio::test]
async fn a_server_whose_last_user_was_kicked_reads_up_to_that() {
    let scene = scene(RoomVersion::V12).await;
    let (dag, peer) = (&scene.gateway.dag, &scene.peer.name);
    let before = scene.gateway.send(&scene.room, message(&bot(), "before")).await.unwrap();
    let kick = state("m.room.member", scene.alice.as_str(), json!({ "membership": "leave" }));
    let kick = scene.gateway.send(&scene.room, kick).await.unwrap();
    let after = scene.gateway.send(&scene.room, message(&bot(), "after")).await.unwrap();
    let missing =
        |latest: &OwnedEventId| object(json!({ "latest_events": [latest], "earliest_events": [], "limit": 1 }));

    let answer = dag.get_missing_events(peer, &scene.room, missing(&kick)).await.unwrap();
    assert_eq!(answer["events"][0]["content"]["body"], "before");
    let page = dag.backfill(peer, &scene.room, std::slice::from_ref(&kick), 2).await.unwrap();
    assert_eq!(page["pdus"].as_array().unwrap().len(), 2);
    assert_eq!(dag.get_event(peer, &before).await.unwrap()["pdus"][0]["content"]["body"], "before");
    for ids in [true, false] {
        assert!(dag.get_state(peer, &scene.room, &kick, ids).await.is_ok());
        assert_eq!(dag.get_state(peer, &scene.room, &after, ids).await.unwrap_err().code(), "forbidden");
    }
    assert_eq!(dag.get_event(peer, &after).await.unwrap_err().code(), "forbidden");
    assert_eq!(
        dag.backfill(peer, &scene.room, &[kick.clone(), after.clone()], 9).await.unwrap_err().code(),
        "forbidden"
    );
    assert_eq!(dag.get_missing_events(peer, &scene.room, missing(&after)).await.unwrap_err().code(), "forbidden");
}

#[tokio::test]
async fn history_that_was_not_visible_is_given_without_its_content() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    let room = gateway
        .room_with(
            RoomVersion::V12,
            vec![
                state("m.room.join_rules", "", json!({ "join_rule": "public" })),
                state("m.room.history_visibility", "", json!({ "history_visibility": "joined" })),
            ],
        )
        .await;
    let before = gateway.send(&room, message(&bot(), "before")).await.unwrap();
    let topic = |topic: &str| state("m.room.topic", "", json!({ "topic": topic }));
    let topic_before = gateway.send(&room, topic("before")).await.unwrap();
    peer.join(&gateway, &room, &peer.user("alice")).await.unwrap();
    let after = gateway.send(&room, message(&bot(), "after")).await.unwrap();
    let topic_after = gateway.send(&room, topic("after")).await.unwrap();
    // State too; what is current is given with the state of the room.
    let topic_at = async |event: &OwnedEventId| {
        gateway.dag.get_event(&peer.name, event).await.unwrap()["pdus"][0]["content"]["topic"].clone()
    };
    assert_eq!((topic_at(&topic_before).await, topic_at(&topic_after).await), (json!(null), json!("after")));
    let state = gateway.dag.get_state(&peer.name, &room, &after, false).await.unwrap();
    assert!(state["pdus"].as_array().unwrap().iter().any(|event| event["content"]["topic"] == "before"), "{state}");
    let body = |event: serde_json::Value| event["pdus"][0]["content"]["body"].clone();
    assert_eq!(body(gateway.dag.get_event(&peer.name, &before).await.unwrap()), json!(null));
    assert_eq!(body(gateway.dag.get_event(&peer.name, &after).await.unwrap()), json!("after"));
}

#[tokio::test]
async fn hc_52_a_denied_server_can_neither_send_nor_join_nor_read() {
    let scene = scene(RoomVersion::V11).await;
    let acl = json!({ "allow": ["*"], "deny": ["peer.*"] });
    let event = scene.gateway.send(&scene.room, state("m.room.server_acl", "", acl)).await.unwrap();
    let (_, message) = scene.changed("depth", json!(30));
    assert_eq!(scene.put(&message).await.result.unwrap_err().code(), "server_acl");
    let dag = &scene.gateway.dag;
    let versions = ["11".to_owned()];
    let bob = scene.peer.user("bob");
    assert_eq!(dag.make_join(&scene.peer.name, &scene.room, &bob, &versions).await.unwrap_err().code(), "server_acl");
    assert_eq!(dag.get_event(&scene.peer.name, &event).await.unwrap_err().code(), "server_acl");
}

#[tokio::test]
async fn events_of_rooms_that_are_not_here_are_dropped_silently() {
    let scene = scene(RoomVersion::V12).await;
    let (id, event) = scene.changed("room_id", json!(format!("!{}", "x".repeat(43))));
    let received = scene.put(&event).await;
    assert!(received.result.is_ok());
    assert!(scene.gateway.dag.event(&id).await.unwrap().is_none());
}

#[tokio::test]
async fn hc_55_rejected_events_end_no_page() {
    let mut scene = scene(RoomVersion::V11).await;
    let (first, event) = scene.view.say(&scene.peer, &scene.alice, "first");
    scene.put(&event).await.result.unwrap();
    // More of them than any page has, each after the other: Alice may set no topic.
    for number in 0..120 {
        let topic = json!({ "topic": number });
        let (_, event) = scene.view.add(&scene.peer, &scene.alice, "m.room.topic", Some(""), topic);
        assert_eq!(scene.put(&event).await.result.unwrap_err().code(), "matrix_rule");
    }
    let (last, event) = scene.view.say(&scene.peer, &scene.alice, "last");
    scene.put(&event).await.result.unwrap();
    let (dag, origin) = (&scene.gateway.dag, &scene.peer.name);
    let page = dag.backfill(origin, &scene.room, std::slice::from_ref(&last), 2).await.unwrap();
    let bodies: Vec<_> = page["pdus"].as_array().unwrap().iter().map(|pdu| pdu["content"]["body"].clone()).collect();
    assert_eq!(bodies, ["last", "first"]);
    let missing = object(json!({ "latest_events": [last], "earliest_events": [], "limit": 1 }));
    let missing = dag.get_missing_events(origin, &scene.room, missing).await.unwrap();
    assert_eq!(missing["events"][0]["content"]["body"], "first");
    assert_eq!(dag.event(&first).await.unwrap().unwrap().event_id, first);
}

#[tokio::test]
async fn hc_49_what_comes_after_its_redaction_comes_redacted() {
    for version in VERSIONS {
        let mut scene = scene(version).await;
        let mut view = scene.view.clone();
        // On branches of their own, of which the one with the redactions is here first.
        let targets = ["one", "two"].map(|body| view.clone().say(&scene.peer, &scene.alice, body));
        let others = scene.gateway.send(&scene.room, message(&bot(), "the bot's")).await.unwrap();
        for target in [&targets[0].0, &targets[1].0, &others] {
            let mut event = view.next(&scene.alice, "m.room.redaction", None, json!({ "redacts": target }));
            event["redacts"] = json!(target);
            let (id, event) = scene.peer.sign(version, event);
            view.note(id, &event);
            assert!(scene.put(&event).await.result.is_ok());
        }
        for (id, event) in &targets {
            assert!(scene.put(event).await.result.is_ok());
            let content = scene.gateway.dag.event(id).await.unwrap().unwrap().content.clone();
            assert_eq!(content, json!({}).as_object().unwrap().clone());
            let served = scene.gateway.dag.get_event(&scene.peer.name, id).await.unwrap();
            assert_eq!(served["pdus"][0]["content"], json!({}));
            scene.gateway = scene.gateway.restart(&[&scene.peer]);
        }
        let content = scene.gateway.dag.event(&others).await.unwrap().unwrap().content.clone();
        assert_eq!(content["body"], "the bot's");
    }
}
