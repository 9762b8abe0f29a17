//! What a hub takes from participants that misbehave: only what is wrong fails, and nothing of it reaches the log.

use isthmus::event::{Lpdu, Object};
use isthmus::lm::{Appended, Position, Sent};
use isthmus::refusal::Refusal;
use isthmus::seam::{Draft, EventEffect, Outgoing, Received};
use isthmus::store::StoreError;
use ruma::{OwnedRoomId, RoomId};
use serde_json::{Value, json};

use super::world::{Node, World, assert_dense, bodies, draft, ids, member, message, raw};

/// A room with `@alice` of the participant in it.
async fn room_of(hub: &Node, part: &Node) -> OwnedRoomId {
    let room = hub.create_room("public").await;
    part.join(&room, "alice", hub).await;
    room
}

/// What the hub says to one event that comes from `origin`.
async fn give(hub: &Node, origin: &Node, event: &Object) -> Received {
    hub.lm.receive(&origin.name, vec![raw(event)]).await.pop().unwrap()
}

fn lpdu(part: &Node, hub: &Node, room: &RoomId, body: &str) -> Lpdu {
    part.lpdu(room, &hub.name, &message(&part.user("alice"), body))
}

/// The same LPDU with something changed after it was signed.
fn changed(lpdu: &Lpdu, change: impl FnOnce(&mut Object)) -> Object {
    let mut json = lpdu.json.clone();
    change(&mut json);
    json
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_27_hc_28_an_lpdu_has_nothing_that_the_hub_adds_and_the_right_hash() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = room_of(&hub, &part).await;
    let good = lpdu(&part, &hub, &room, "good");
    let before = hub.log(&room).await;
    let set = |key: &'static str, value: Value| changed(&good, |json| drop(json.insert(key.to_owned(), value)));
    let in_hashes = |key: &'static str, value: Value| {
        changed(&good, |json| drop(json["hashes"].as_object_mut().unwrap().insert(key.to_owned(), value)))
    };
    for bad in [
        set("auth_events", json!([])),
        set("prev_events", json!([before[0].event.event_id])),
        set("hashes", json!({})),
        set("hashes", json!({ "lpdu": {} })),
        set("hashes", json!({ "lpdu": { "sha512": "x" } })),
        set("hashes", json!({ "lpdu": { "sha256": "AAAA" } })),
        in_hashes("sha256", json!("x")),
        in_hashes("md5", json!("x")),
        set("content", json!({ "msgtype": "m.text", "body": "tampered" })),
        set("depth", json!(1)),
        set("content", json!({ "float": 1.5 })),
        changed(&good, |json| drop(json.remove("hub_server"))),
        changed(&good, |json| drop(json.remove("signatures"))),
    ] {
        let received = give(&hub, &part, &bad).await;
        assert!(received.result.is_err(), "taken: {bad:?}");
        assert!(received.event_id.is_some());
    }
    // Neither belongs to an event; both are passed over.
    let passed_over = changed(&good, |json| {
        json.insert("unsigned".to_owned(), json!({ "age": 1 }));
        json.insert("event_id".to_owned(), json!("$else"));
    });
    assert_eq!(give(&hub, &part, &passed_over).await.result, Ok(()));
    assert_eq!(hub.log(&room).await.len(), before.len() + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_31_a_hub_passes_on_no_signature_that_it_has_not_checked() {
    let (_world, [hub, part, third]) = World::new(["hub.example", "part.example", "third.example"]).await;
    let room = room_of(&hub, &part).await;
    third.join(&room, "carol", &hub).await;
    // The hub knows none of these keys but the good one; another participant may come to know them, and would refuse the event.
    let decorated = changed(&lpdu(&part, &hub, &room, "decorated"), |json| {
        let signatures = json["signatures"].as_object_mut().unwrap();
        for server in [&hub.name, &third.name, &part.name] {
            let of_server = signatures.entry(server.to_string()).or_insert_with(|| json!({}));
            of_server.as_object_mut().unwrap().insert("ed25519:old".to_owned(), json!("AAAA"));
        }
        signatures.insert("stranger.example".to_owned(), json!({ "ed25519:a": "AAAA" }));
    });
    let received = give(&hub, &part, &decorated).await;
    assert_eq!(received.result, Ok(()));
    let appended = hub.wait_for_body(&room, "decorated").await.pop().unwrap();
    let signatures = appended.event.json["signatures"].as_object().unwrap();
    assert_eq!(signatures.keys().collect::<Vec<_>>(), [hub.name.as_str(), part.name.as_str()]);
    for (server, node) in [(&hub.name, &hub), (&part.name, &part)] {
        let ids: Vec<_> = signatures[server.as_str()].as_object().unwrap().keys().collect();
        assert_eq!(ids, [node.context.signing_key.id()]);
    }
    third.wait_for_body(&room, "decorated").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_29_hc_39_nobody_speaks_for_users_of_another_server() {
    let (_world, [hub, part, evil]) = World::new(["hub.example", "part.example", "evil.example"]).await;
    let room = room_of(&hub, &part).await;
    evil.join(&room, "eve", &hub).await;
    let before = hub.log(&room).await;
    for victim in [hub.user("bot"), part.user("alice")] {
        let forged = evil.lpdu(&room, &hub.name, &message(&victim, "forged")).json;
        let refused = give(&hub, &evil, &forged).await;
        assert!(matches!(refused.result, Err(Refusal::WrongOrigin { .. })), "{refused:?}");
        for membership in ["join", "leave", "invite", "knock"] {
            let forged = evil.lpdu(&room, &hub.name, &member(&victim, &victim, membership)).json;
            let refused = give(&hub, &evil, &forged).await;
            assert!(matches!(refused.result, Err(Refusal::WrongOrigin { .. })), "{refused:?}");
            let refused = evil.lm.send_join(&hub.name, forged.clone()).await;
            assert!(refused.is_err());
            assert!(hub.lm.send_join(&evil.name, forged.clone()).await.is_err());
            assert!(hub.lm.send_leave(&evil.name, forged).await.is_err());
        }
        assert!(hub.lm.make_leave(&evil.name, &room, &victim).await.is_err());
        assert!(hub.lm.make_join(&evil.name, &room, &victim, &all_versions()).await.is_err());
    }
    // Not even the hub itself, asked from outside under its own name.
    let own = hub.lpdu(&room, &hub.name, &message(&hub.user("bot"), "own")).json;
    let refused = hub.lm.receive(&hub.name, vec![raw(&own)]).await.pop().unwrap();
    assert!(matches!(refused.result, Err(Refusal::WrongOrigin { .. })), "{refused:?}");
    // Another server's event relayed with its good signature, and one under the sender's name with a bad signature.
    let relayed = lpdu(&part, &hub, &room, "relayed").json;
    let refused = give(&hub, &evil, &relayed).await;
    assert!(matches!(refused.result, Err(Refusal::WrongOrigin { .. })), "{refused:?}");
    let mut unsigned = evil.lpdu(&room, &hub.name, &message(&evil.user("eve"), "x")).json;
    let signature = unsigned["signatures"]["evil.example"].clone();
    unsigned.insert("signatures".to_owned(), json!({ "part.example": signature }));
    let refused = give(&hub, &evil, &unsigned).await;
    assert!(matches!(refused.result, Err(Refusal::BadSignature { .. })), "{refused:?}");
    assert_eq!(ids(&hub.log(&room).await), ids(&before));
}

/// Stricter participants would drop such an event and lack it before every later one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_43_users_who_cannot_exist_get_into_no_log() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = room_of(&hub, &part).await;
    let (alice, before) = (part.user("alice"), hub.log(&room).await.len());
    for name in ["@:part.example", "@Alice:part.example", "@a b:part.example", "@\u{e9}:part.example"] {
        let user = ruma::OwnedUserId::try_from(name).unwrap();
        for event in [member(&user, &user, "join"), member(&alice, &user, "invite")] {
            let refused = give(&hub, &part, &part.lpdu(&room, &hub.name, &event).json).await;
            assert!(matches!(refused.result, Err(Refusal::Malformed { .. })), "{name}: {refused:?}");
        }
        let join = part.lpdu(&room, &hub.name, &member(&user, &user, "join"));
        assert!(part.context.client.call(&hub.name, send_join(&join), false).await.is_err(), "{name}");
        // Nor is there a template for an event that would be refused.
        let versions = ["org.matrix.i-d.ralston-mimi-linearized-matrix.02".to_owned()];
        let made = hub.lm.make_join(&part.name, &room, &user, &versions).await.map(drop);
        assert!(matches!(made, Err(Refusal::Malformed { .. })), "{name}: {made:?}");
        let knock = hub.lm.make_knock(&part.name, &room, &user, &versions).await.map(drop);
        assert!(matches!(knock, Err(Refusal::Malformed { .. })), "{name}: {knock:?}");
    }
    assert_eq!(hub.log(&room).await.len(), before);
}

fn send_join(join: &Lpdu) -> isthmus::federation::Call {
    let id = join.lpdu_id.as_str().replace('$', "%24");
    isthmus::federation::Call::post(format!("/_matrix/federation/v3/send_join/{id}"), join.json.clone())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_31_an_lpdu_for_another_hub_is_refused() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = room_of(&hub, &part).await;
    for other in ["part.example", "elsewhere.example"] {
        let event = part.lpdu(&room, other.try_into().unwrap(), &message(&part.user("alice"), "x")).json;
        let refused = give(&hub, &part, &event).await;
        assert!(matches!(refused.result, Err(Refusal::WrongHub { .. })), "{refused:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_35_inv_5_the_same_lpdu_again_is_not_appended_again_and_no_error() {
    let (world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = room_of(&hub, &part).await;
    let event = lpdu(&part, &hub, &room, "once").json;
    // Twice in one transaction, again in others, at once, and after a restart.
    let twice = [Value::Object(event.clone()), Value::Object(event.clone())];
    for txn in ["a", "b"] {
        let answer = part.transact(&hub, txn, &twice).await.unwrap();
        assert_eq!(answer["failed_pdus"], json!({}));
    }
    let (first, second) = tokio::join!(give(&hub, &part, &event), give(&hub, &part, &event));
    assert_eq!((first.result, second.result), (Ok(()), Ok(())));
    let hub = world.restart(hub).await;
    assert_eq!(give(&hub, &part, &event).await.result, Ok(()));
    let log = hub.log(&room).await;
    assert_eq!(bodies(&log), ["once"]);
    assert_dense(&log);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_20_one_bad_event_among_fifty_fails_alone() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = room_of(&hub, &part).await;
    let mut events: Vec<Lpdu> = (0..50).map(|number| lpdu(&part, &hub, &room, &format!("{number}"))).collect();
    let forbidden = part.lpdu(&room, &hub.name, &draft(&part.user("alice"), "m.room.topic", Some(""), json!({})));
    let ghost = part.lpdu(&room, &hub.name, &message(&part.user("not-joined"), "x"));
    let mut tampered = events[30].clone();
    tampered.json["content"]["body"] = json!("tampered");
    for (place, bad) in [(10, forbidden.clone()), (20, ghost.clone()), (30, tampered)] {
        events[place] = bad;
    }
    let tampered_id = {
        // The hash is not part of what was changed, so the ID is still that of the event as it was.
        events[30].lpdu_id.clone()
    };
    let pdus: Vec<Value> = events.iter().map(|event| Value::Object(event.json.clone())).collect();
    let answer = part.transact(&hub, "fifty", &pdus).await.unwrap();
    let failed = answer["failed_pdus"].as_object().unwrap();
    assert_eq!(failed.len(), 3, "{failed:?}");
    for (id, why) in [(&forbidden.lpdu_id, "rule 7"), (&ghost.lpdu_id, "rule 6"), (&tampered_id, "hash")] {
        let error = failed[id.as_str()]["error"].as_str().unwrap();
        assert!(error.contains(why), "{error}");
    }
    let log = hub.log(&room).await;
    let expected: Vec<String> =
        (0..50).filter(|number| ![10, 20, 30].contains(number)).map(|number| number.to_string()).collect();
    assert_eq!(bodies(&log), expected);
    assert_dense(&log);
    part.wait_for_body(&room, "49").await;
    assert_eq!(ids(&part.log(&room).await), ids(&log));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_16_hc_17_an_event_that_cannot_be_parsed_fails_alone() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = room_of(&hub, &part).await;
    let good = lpdu(&part, &hub, &room, "good");
    let text = serde_json::to_string(&good.json).unwrap();
    let twice = text.replacen('{', "{\"type\":\"m.room.message\",", 1);
    let deep = text.replacen("\"body\"", &format!("\"deep\":{}{},\"body\"", "[".repeat(5000), "]".repeat(5000)), 1);
    let surrogate = text.replacen("good", "\\ud800", 1);
    let mut raws: Vec<_> = ["null", "1", "[]", "{}", &twice, &surrogate]
        .into_iter()
        .map(|text| serde_json::value::RawValue::from_string(text.to_owned()).unwrap())
        .collect();
    raws.extend(serde_json::value::RawValue::from_string(deep));
    raws.push(raw(&good.json));
    let results = hub.lm.receive(&part.name, raws).await;
    let (last, bad) = results.split_last().unwrap();
    assert_eq!(last.result, Ok(()));
    assert!(bad.iter().all(|received| received.result.is_err()), "{bad:?}");
    assert_eq!(bodies(&hub.log(&room).await), ["good"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_14_an_integer_is_one_however_it_is_written() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = room_of(&hub, &part).await;
    let levels = json!({ "users": { hub.user("bot"): 100, part.user("alice"): 50 }, "ban": 50 });
    hub.send(&room, draft(&hub.user("bot"), "m.room.power_levels", Some(""), levels)).await.unwrap();
    part.wait(&room, "the levels", |log| log.iter().any(|event| event.event.kind == "m.room.power_levels")).await;
    let levels =
        json!({ "users": { hub.user("bot"): 100, part.user("alice"): 50 }, "ban": 50, "kick": 40, "invite": 0 });
    let good = part.lpdu(&room, &hub.name, &draft(&part.user("alice"), "m.room.power_levels", Some(""), levels));
    let text = |json: &Object| {
        let text =
            raw(json).get().replace(r#""kick":40"#, r#""kick":4e1"#).replace(r#""invite":0"#, r#""invite":-0.0"#);
        assert!(text.contains("4e1") && text.contains("-0.0"), "{text}");
        serde_json::value::RawValue::from_string(text).unwrap()
    };
    let deaf = super::log_hub::deafen(&part);
    let received = hub.lm.receive(&part.name, vec![text(&good.json)]).await.pop().unwrap();
    assert_eq!((received.event_id, received.result), (Some(good.lpdu_id.clone()), Ok(())));
    let appended = hub.log(&room).await.pop().unwrap().event;
    assert_eq!(appended.lpdu_id.as_ref(), Some(&good.lpdu_id));
    assert_eq!((&appended.content()["kick"], &appended.content()["invite"]), (&json!(40), &json!(0)));
    // From a hub that hands on what it was given too.
    deaf.store(false, std::sync::atomic::Ordering::SeqCst);
    let received = part.lm.receive(&hub.name, vec![text(&appended.json)]).await.pop().unwrap();
    assert_eq!((received.event_id.as_ref(), received.result), (Some(&appended.event_id), Ok(())));
    assert_eq!(ids(&part.log(&room).await), ids(&hub.log(&room).await));
    assert_eq!(part.lm.room(&room).await.unwrap().unwrap().complaints, Vec::<String>::new());
    // What is no integer is refused, by the ID by which its sender knows it.
    let half = changed(&good, |json| json["content"]["kick"] = json!(40.5));
    let received = give(&hub, &part, &half).await;
    let id = format!("${}", isthmus::event::reference_hash(&half, isthmus::event::Redaction::Draft));
    assert_eq!(received.result.unwrap_err().code(), "malformed");
    assert_eq!(received.event_id.as_ref().map(|id| id.as_str()), Some(&*id));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_18_an_lpdu_that_fits_while_its_event_does_not_is_refused() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = room_of(&hub, &part).await;
    let empty = serde_json::to_string(&lpdu(&part, &hub, &room, "").json).unwrap().len();
    let large = lpdu(&part, &hub, &room, &"x".repeat(65_536 - empty)).json;
    assert_eq!(serde_json::to_string(&large).unwrap().len(), 65_536);
    let refused = give(&hub, &part, &large).await;
    assert!(matches!(refused.result, Err(Refusal::TooLarge { .. })), "{:?}", refused.result);
    assert_eq!(give(&hub, &part, &lpdu(&part, &hub, &room, "").json).await.result, Ok(()));
    let finished = hub.log(&room).await.pop().unwrap().event.to_bytes().len();
    let over = lpdu(&part, &hub, &room, &"x".repeat(65_537 - finished)).json;
    assert!(matches!(give(&hub, &part, &over).await.result, Err(Refusal::TooLarge { .. })));
    let fits = lpdu(&part, &hub, &room, &"x".repeat(65_536 - finished)).json;
    assert_eq!(give(&hub, &part, &fits).await.result, Ok(()));
    assert_eq!(hub.log(&room).await.pop().unwrap().event.to_bytes().len(), 65_536);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_36_two_participants_append_at_once() {
    let (_world, [hub, one, two]) = World::new(["hub.example", "one.example", "two.example"]).await;
    let room = hub.create_room("public").await;
    one.join(&room, "a", &hub).await;
    two.join(&room, "b", &hub).await;
    let say = |node: &Node, user: &str, number: usize| {
        node.lpdu(&room, &hub.name, &message(&node.user(user), &format!("{user}{number}"))).json
    };
    let mut running = Vec::new();
    for number in 0..40 {
        for (node, user) in [(&one, "a"), (&two, "b")] {
            let (lm, origin, event) = (hub.lm.clone(), node.name.clone(), raw(&say(node, user, number)));
            running.push(tokio::spawn(async move { lm.receive(&origin, vec![event]).await }));
        }
        let (lm, room, draft) = (hub.lm.clone(), room.clone(), message(&hub.user("bot"), &format!("c{number}")));
        running.push(tokio::spawn(async move {
            let sent = lm.send(&room, vec![Outgoing { draft, effect: None }]).await.pop().unwrap();
            vec![Received { event_id: None, result: sent.map(drop) }]
        }));
    }
    for task in running {
        assert_eq!(task.await.unwrap().pop().unwrap().result, Ok(()));
    }
    let log = hub.log(&room).await;
    assert_dense(&log);
    assert_eq!(bodies(&log).len(), 120);
    for node in [&one, &two] {
        let theirs = node.wait(&room, "everything", |log| bodies(log).len() == 120).await;
        assert_eq!(ids(&theirs)[theirs.len() - 120..], ids(&log)[log.len() - 120..]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_38_a_template_that_was_altered_is_refused() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    let alice = part.user("alice");
    let before = hub.log(&room).await;
    let signed = |draft: Draft| part.lpdu(&room, &hub.name, &draft).json;
    for altered in [
        signed(member(&alice, &alice, "leave")),
        signed(member(&alice, &alice, "invite")),
        signed(member(&alice, &part.user("bob"), "join")),
        signed(draft(&alice, "m.room.topic", Some(alice.as_str()), json!({ "membership": "join" }))),
        signed(message(&alice, "x")),
        part.lpdu("!other:hub.example".try_into().unwrap(), &hub.name, &member(&alice, &alice, "join")).json,
        Object::new(),
    ] {
        assert!(hub.lm.send_join(&part.name, altered.clone()).await.is_err(), "{altered:?}");
    }
    let join = signed(member(&alice, &alice, "join"));
    assert!(hub.lm.send_leave(&part.name, join.clone()).await.is_err());
    assert!(hub.lm.send_knock(&part.name, join.clone()).await.is_err());
    assert_eq!(ids(&hub.log(&room).await), ids(&before));
    // The same join twice is one join with one answer.
    let first = hub.lm.send_join(&part.name, join.clone()).await.unwrap();
    let second = hub.lm.send_join(&part.name, join).await.unwrap();
    assert_eq!(first, second);
    assert_eq!(hub.log(&room).await.len(), before.len() + 1);
    assert_eq!(hub.watcher.gates.lock().unwrap().len(), 1, "a join that is there already asks nobody");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_39_a_banned_user_stays_out() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = room_of(&hub, &part).await;
    let mallory = part.user("mallory");
    hub.send(&room, member(&hub.user("bot"), &mallory, "ban")).await.unwrap();
    let join = part.lpdu(&room, &hub.name, &member(&mallory, &mallory, "join")).json;
    let refused = give(&hub, &part, &join).await.result;
    assert!(matches!(refused, Err(Refusal::LmRule { rule: "5.2.3", .. })), "{refused:?}");
    let refused = hub.lm.send_join(&part.name, join).await;
    assert!(matches!(refused, Err(Refusal::LmRule { rule: "5.2.3", .. })), "{refused:?}");
    let refused = hub.lm.make_join(&part.name, &room, &mallory, &all_versions()).await;
    assert!(matches!(refused, Err(Refusal::LmRule { rule: "5.2.3", .. })), "{refused:?}");
    // Nobody asked the other side about somebody whom this one does not take.
    assert!(hub.watcher.gates.lock().unwrap().iter().all(|gate| gate.user_id != mallory));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_40_a_server_that_does_not_know_the_version_gets_no_template() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    for versions in [vec![], vec!["11".to_owned(), "I.1".to_owned()]] {
        let refused = hub.lm.make_join(&part.name, &room, &part.user("alice"), &versions).await;
        assert!(matches!(refused, Err(Refusal::IncompatibleRoomVersion(_))), "{refused:?}");
    }
    let template = hub.lm.make_join(&part.name, &room, &part.user("alice"), &all_versions()).await.unwrap();
    assert_eq!(template["room_version"], all_versions()[0].as_str());
    assert_eq!(template["state_key"], template["event"]["state_key"]);
    assert_eq!(template["content"], json!({ "membership": "join" }));
    assert_eq!(template.get("prev_events"), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_48_a_join_that_the_same_transaction_makes_possible_still_asks_the_gate() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let levels = json!({ "users": { hub.user("bot"): 100, part.user("alice"): 50 } });
    let room = hub.create_room_with("invite", levels).await;
    let (alice, mallory) = (part.user("alice"), part.user("mallory"));
    let invite = Outgoing { draft: member(&hub.user("bot"), &alice, "invite"), effect: None };
    hub.lm.invite(&room, invite).await.unwrap();
    part.join(&room, "alice", &hub).await;
    hub.watcher.unwanted.lock().unwrap().push(mallory.clone());
    let sign = |draft| part.lpdu(&room, &hub.name, &draft).json;
    let events = [
        sign(member(&alice, &mallory, "invite")),
        sign(member(&mallory, &mallory, "join")),
        sign(message(&mallory, "sneaked in")),
    ];
    let results = hub.lm.receive(&part.name, events.iter().map(raw).collect()).await;
    assert_eq!(results[0].result, Ok(()));
    assert!(matches!(results[1].result, Err(Refusal::Forbidden(_))), "{:?}", results[1]);
    assert!(matches!(results[2].result, Err(Refusal::LmRule { rule: "6", .. })), "{:?}", results[2]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_50_only_servers_in_the_room_read_it() {
    let (_world, [hub, part, out]) = World::new(["hub.example", "part.example", "out.example"]).await;
    let room = room_of(&hub, &part).await;
    let other = hub.create_room("public").await;
    for number in 0..120 {
        hub.say(&room, "bot", &number.to_string()).await;
    }
    let log = hub.log(&room).await;
    let last = &log.last().unwrap().event.event_id;
    let foreign = &hub.log(&other).await[0].event.event_id.clone();

    let answer = hub.lm.get_event(&part.name, last).await.unwrap();
    assert_eq!(answer, Value::Object(log.last().unwrap().event.json.clone()));
    let filled = hub.lm.backfill(&part.name, &room, last, 1_000_000).await.unwrap();
    let filled: Vec<&Value> = filled["pdus"].as_array().unwrap().iter().collect();
    assert_eq!(filled.len(), 100);
    assert_eq!(filled[99], &Value::Object(log.last().unwrap().event.json.clone()));
    assert_eq!(filled[0], &Value::Object(log[log.len() - 100].event.json.clone()));
    let few = hub.lm.backfill(&part.name, &room, last, 3).await.unwrap();
    assert_eq!(few["pdus"].as_array().unwrap().len(), 3);
    for limit in [0, -5] {
        assert_eq!(hub.lm.backfill(&part.name, &room, last, limit).await.unwrap()["pdus"], json!([]));
    }
    let levels = &log.iter().find(|event| event.event.kind == "m.room.power_levels").unwrap().event.event_id;
    let state = hub.lm.get_state(&part.name, &room, Some(levels), true).await.unwrap();
    assert_eq!(state["pdu_ids"], json!([log[0].event.event_id, log[1].event.event_id]));
    assert_eq!(state["pdu_ids"], state["pdus_ids"]);
    let state = hub.lm.get_state(&part.name, &room, None, false).await.unwrap();
    assert_eq!(state["pdus"].as_array().unwrap().len(), 5);
    assert_eq!(state["auth_chain"].as_array().unwrap().len(), 4);

    let not_found = |result: Result<Value, Refusal>| {
        assert!(matches!(result, Err(Refusal::NotFound(_) | Refusal::UnknownRoom(_))), "{result:?}");
    };
    for (origin, event, room) in [(&out, last, &room), (&part, foreign, &other)] {
        not_found(hub.lm.get_event(&origin.name, event).await);
        not_found(hub.lm.backfill(&origin.name, room, event, 10).await);
        not_found(hub.lm.get_state(&origin.name, room, Some(event), false).await);
        not_found(hub.lm.get_state(&origin.name, room, None, true).await);
    }
    // An event of another room.
    not_found(hub.lm.backfill(&part.name, &room, foreign, 10).await);
    not_found(hub.lm.get_state(&part.name, &room, Some(foreign), false).await);
    // A participant keeps no log for others.
    let refused = part.lm.get_state(&hub.name, &room, None, false).await;
    assert!(matches!(refused, Err(Refusal::WrongHub { .. })), "{refused:?}");
}

fn all_versions() -> Vec<String> {
    vec!["org.matrix.i-d.ralston-mimi-linearized-matrix.02".to_owned(), "I.1".to_owned()]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_whose_effect_fails_fails_alone_and_leaves_no_gap() {
    let (_world, [hub]) = World::new(["hub.example"]).await;
    let room = hub.create_room("public").await;
    let head = hub.lm.room(&room).await.unwrap().unwrap().head;
    let effect = |good: bool, name: &'static str| -> EventEffect {
        EventEffect::new(move |tx, event_id| {
            Box::pin(async move {
                sqlx::query("INSERT INTO sequence (name, value) VALUES ($1, $2)")
                    .bind(name)
                    .bind(i64::try_from(event_id.as_str().len()).unwrap())
                    .execute(tx)
                    .await?;
                if good { Ok(()) } else { Err(StoreError::corrupt("effect", "meant to fail")) }
            })
        })
    };
    let send = |body: &str, effect: Option<EventEffect>| Outgoing { draft: message(&hub.user("bot"), body), effect };
    let events = vec![
        send("a", Some(effect(true, "a"))),
        send("b", Some(effect(false, "b"))),
        send("c", None),
        Outgoing { draft: message(ruma::user_id!("@x:elsewhere.example"), "d"), effect: Some(effect(true, "d")) },
        send("e", Some(effect(true, "e"))),
        send("f", Some(effect(false, "f"))),
    ];
    let results = hub.lm.send(&room, events).await;
    let good: Vec<bool> = results.iter().map(Result::is_ok).collect();
    assert_eq!(good, [true, false, true, false, true, false]);
    let appended: Vec<Appended> = results
        .into_iter()
        .flatten()
        .map(|sent| match sent {
            Sent::Appended(appended) => appended,
            Sent::Queued { .. } => panic!("a hub appends"),
        })
        .collect();
    let log = hub.log(&room).await;
    assert_dense(&log);
    assert_eq!(bodies(&log), ["a", "c", "e"]);
    assert_eq!(ids(&log)[log.len() - 3..], ids(&appended));
    assert_eq!(log.last().unwrap().position, Position(head.0 + 3));
    let rows: Vec<(String,)> = sqlx::query_as("SELECT name FROM sequence WHERE name <> 'id'")
        .fetch_all(hub.context.store.reader())
        .await
        .unwrap();
    let mut names: Vec<String> = rows.into_iter().map(|(name,)| name).collect();
    names.sort();
    assert_eq!(names, ["a", "e"]);
}
