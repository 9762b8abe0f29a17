//! Joining through a server that lives in the test: in every version, and where what it answers is not what it should be.

use isthmus::event::{Object, RoomVersion};
use ruma::{OwnedUserId, RoomId, UserId};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::peer::{Peer, View};
use super::*;

/// A room that a peer keeps, and its answers to joins.
pub struct Hosted {
    pub view: Arc<Mutex<View>>,
    pub admin: OwnedUserId,
}

/// Makes a public room of the peer's admin.
pub fn room_of(peer: &Peer, version: RoomVersion, join_rules: Value) -> View {
    let admin = peer.user("admin");
    let (room_id, named) = match version {
        RoomVersion::V12 => ("!unknown".to_owned(), false),
        _ => (format!("!room-{version}:{}", peer.name), true),
    };
    let mut content = json!({ "room_version": version.as_str() });
    if !matches!(version, RoomVersion::V11 | RoomVersion::V12) {
        content["creator"] = json!(admin);
    }
    let mut create = json!({
        "type": "m.room.create", "sender": admin, "state_key": "", "content": content, "depth": 1,
        "origin_server_ts": NOW, "prev_events": [], "auth_events": [],
    });
    if named {
        create["room_id"] = json!(room_id);
    }
    let (id, create) = peer.sign(version, create);
    peer.keep(&id, &create);
    let room_id = if named { room_id } else { id.as_str().replacen('$', "!", 1) };
    let room_id = RoomId::parse(room_id).unwrap();
    let mut view = View { version, room_id, state: BTreeMap::new(), tips: Vec::new(), depth: 0 };
    view.note(id, &create);
    if !named {
        // Of version 12 on, no event names the create event as allowing it.
        assert!(view.next(&admin, "m.x", None, json!({}))["auth_events"].as_array().unwrap().is_empty());
    }
    view.add(peer, &admin, "m.room.member", Some(admin.as_str()), json!({ "membership": "join" }));
    let users = if named { json!({ admin.as_str(): 100 }) } else { json!({}) };
    view.add(peer, &admin, "m.room.power_levels", Some(""), json!({ "users": users, "state_default": 50 }));
    view.add(peer, &admin, "m.room.join_rules", Some(""), join_rules);
    view.add(peer, &admin, "m.room.name", Some(""), json!({ "name": "the room" }));
    view
}

/// What the peer answers to `make_join` and `send_join`.
pub fn template(peer: &Peer, view: &View, user: &str) -> Value {
    let user = <&UserId>::try_from(user).unwrap();
    let rules = &view.state[&("m.room.join_rules".to_owned(), String::new())];
    let mut content = json!({ "membership": "join" });
    if peer.memory.event(rules.as_str()).unwrap()["content"]["join_rule"] == "restricted" {
        content["join_authorised_via_users_server"] = json!(peer.user("admin"));
    }
    let event = view.next(user, "m.room.member", Some(user.as_str()), content);
    json!({ "room_version": view.version.as_str(), "event": event })
}

pub fn answer_to(memory: &super::peer::Memory, view: &View, join: &Value) -> Value {
    let state: Vec<Object> = view.state.values().map(|id| memory.event(id.as_str()).unwrap()).collect();
    let roots: Vec<String> = view.state.values().map(ToString::to_string).collect();
    json!({ "event": join, "state": state, "auth_chain": memory.chain(&roots), "origin": "peer.example" })
}

type Spoil = Box<dyn Fn(&Peer, &mut Value) + Send + Sync>;

/// Has the peer let in whoever asks, with what `spoil` makes of template (with a `room_version`) and answer.
pub fn open(peer: &Arc<Peer>, view: View, spoil: Spoil) -> Hosted {
    let admin = peer.user("admin");
    let view = Arc::new(Mutex::new(view));
    let (memory, weak, shared) = (Arc::downgrade(&peer.memory), Arc::downgrade(peer), view.clone());
    let meddler = move |path: &str, body: &Value| -> Option<Value> {
        let (memory, peer) = (memory.upgrade()?, weak.upgrade()?);
        let parts: Vec<&str> = path.split('/').collect();
        let mut answer = match parts.as_slice() {
            ["v1", "make_join", _, user] => template(&peer, &shared.lock().unwrap(), user),
            ["v2", "send_join", _, id] => {
                let mut view = shared.lock().unwrap();
                let answer = answer_to(&memory, &view, body);
                let id: OwnedEventId = (*id).try_into().unwrap();
                peer.keep(&id, body.as_object().unwrap());
                view.note(id, body.as_object().unwrap());
                answer
            }
            _ => return None,
        };
        spoil(&peer, &mut answer);
        Some(answer)
    };
    *peer.memory.meddler.lock().unwrap() = Some(Box::new(meddler));
    Hosted { view, admin }
}

const ALL: [RoomVersion; 5] = [RoomVersion::V6, RoomVersion::V8, RoomVersion::V10, RoomVersion::V11, RoomVersion::V12];

#[tokio::test]
async fn a_room_of_each_version_is_joined_and_read_after_a_restart() {
    let peer = Arc::new(Peer::start("peer.example").await);
    let mut gateway = Gateway::start(&[&peer]).await;
    for version in ALL {
        let hosted = open(&peer, room_of(&peer, version, json!({ "join_rule": "public" })), Box::new(|_, _| {}));
        let room = hosted.view.lock().unwrap().room_id.clone();
        let content = object(json!({ "displayname": "Bob" }));
        let joined = gateway.dag.join(&room, std::slice::from_ref(&peer.name), &ghost("bob"), content).await.unwrap();
        assert_eq!((joined.version, joined.through.as_deref()), (version, Some(&*peer.name)));
        assert_eq!(joined.join.content, object(json!({ "membership": "join", "displayname": "Bob" })));
        assert_eq!(gateway.state(&room).await, hosted.view.lock().unwrap().state);

        gateway = gateway.restart(&[&peer]);
        assert_eq!(gateway.state(&room).await, hosted.view.lock().unwrap().state);
        let (hello, event) = hosted.view.lock().unwrap().say(&peer, &hosted.admin, "hello");
        assert!(peer.put(&gateway.dag, &[&event]).await[0].result.is_ok());
        assert_eq!(gateway.inbox(&room).await, std::slice::from_ref(&hello), "the join is ours and does not cross");
        let sent = gateway.send(&room, message(&ghost("bob"), "hello yourself")).await.unwrap();
        assert_eq!(gateway.dag.event(&sent).await.unwrap().unwrap().prev_events, [hello]);
        // What is sent there goes to the servers of the room.
        let windows = isthmus::store::dag::windows(&gateway.context.store, &room, &peer.name).await.unwrap();
        assert!(windows.iter().any(|window| window.closed.is_none()), "{windows:?}");
        let needed = "SELECT COUNT(*) FROM dag_events WHERE room_id = $1 AND before_group IS NULL AND needed = 0";
        let (idle,): (i64,) =
            sqlx::query_as(needed).bind(room.as_str()).fetch_one(gateway.context.store.reader()).await.unwrap();
        assert_eq!(idle, 0, "all of the state stays");
    }
}

#[tokio::test]
async fn a_join_that_meets_conditions_is_countersigned() {
    let peer = Arc::new(Peer::start("peer.example").await);
    let gateway = Gateway::start(&[&peer]).await;
    for (version, lies) in [(RoomVersion::V8, true), (RoomVersion::V10, false), (RoomVersion::V12, false)] {
        let rules = json!({ "join_rule": "restricted", "allow": [{ "type": "m.room_membership", "room_id": "!s:x" }] });
        let view = room_of(&peer, version, rules);
        let hosted = open(
            &peer,
            view,
            Box::new(move |peer, answer| {
                if !lies && answer.get("state").is_some() {
                    let (_, signed) = peer.sign(version, answer["event"].clone());
                    let theirs = signed["signatures"][peer.name.as_str()].clone();
                    answer["event"]["signatures"][peer.name.as_str()] = theirs;
                }
                // What else the answer says of our join counts for nothing.
                answer["event"]["unsigned"] = json!({ "evil": true });
            }),
        );
        let room = hosted.view.lock().unwrap().room_id.clone();
        let joined = gateway.dag.join(&room, std::slice::from_ref(&peer.name), &ghost("bob"), Object::new()).await;
        match joined {
            Ok(joined) if !lies => {
                assert_eq!(joined.join.content["join_authorised_via_users_server"], json!(hosted.admin));
                // A second user of the gateway needs the same.
                let joined = gateway.dag.join(&room, &[], &ghost("carol"), Object::new()).await.unwrap();
                assert_eq!(joined.through.as_deref(), Some(&*peer.name));
                assert_eq!(gateway.membership(&room, &ghost("carol")).await.as_deref(), Some("join"));
                assert_eq!(gateway.inbox(&room).await.len(), 0);
            }
            Err(refusal) if lies => assert_eq!(refusal.code(), "bad_signature"),
            other => panic!("{version}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn who_joins_through_another_server_does_not_wait_for_all_that_was_said_there() {
    let peer = Arc::new(Peer::start("peer.example").await);
    let gateway = Gateway::start(&[&peer]).await;
    let version = RoomVersion::V10;
    let rules = json!({ "join_rule": "restricted", "allow": [{ "type": "m.room_membership", "room_id": "!s:x" }] });
    let spoil: Spoil = Box::new(move |peer, answer| {
        if answer.get("state").is_some() {
            let (id, signed) = peer.sign(version, answer["event"].clone());
            answer["event"]["signatures"][peer.name.as_str()] = signed["signatures"][peer.name.as_str()].clone();
            let state = answer["state"].as_array().unwrap().iter();
            let state = state.map(|event| super::peer::id_of(version, event.as_object().unwrap())).collect();
            peer.memory.states.lock().unwrap().insert(id, state);
        }
    });
    let hosted = open(&peer, room_of(&peer, version, rules), spoil);
    let room = hosted.view.lock().unwrap().room_id.clone();
    gateway.dag.join(&room, std::slice::from_ref(&peer.name), &ghost("bob"), Object::new()).await.unwrap();
    // More than is fetched while somebody waits.
    for number in 0..1_200 {
        hosted.view.lock().unwrap().say(&peer, &hosted.admin, &format!("{number}"));
    }
    let joined = gateway.dag.join(&room, &[], &ghost("carol"), Object::new()).await.unwrap();
    assert_eq!(joined.through.as_deref(), Some(&*peer.name));
    assert_eq!(gateway.membership(&room, &ghost("carol")).await.as_deref(), Some("join"));
}

#[tokio::test]
async fn hostile_answers_to_a_join_are_refused_and_leave_nothing() {
    let peer = Arc::new(Peer::start("peer.example").await);
    let evil = Arc::new(Peer::start("evil.example").await);
    let gateway = Gateway::start(&[&peer, &evil]).await;
    let version = RoomVersion::V11;
    let in_answer = |spoil: fn(&Peer, &mut Value)| -> Spoil {
        Box::new(move |peer, answer| {
            if answer.get("state").is_some() {
                spoil(peer, answer);
            }
        })
    };
    let in_template = |spoil: fn(&mut Value)| -> Spoil {
        Box::new(move |_, answer| {
            if answer.get("room_version").is_some() {
                spoil(answer);
            }
        })
    };
    fn find(answer: &mut Value, kind: &str) -> usize {
        answer["state"].as_array().unwrap().iter().position(|event| event["type"] == kind).unwrap()
    }
    fn take_out(answer: &mut Value, kind: &str) {
        for list in ["state", "auth_chain"] {
            answer[list].as_array_mut().unwrap().retain(|event| event["type"] != kind);
        }
    }
    fn again(peer: &Peer, answer: &mut Value, kind: &str, change: impl Fn(&mut Value)) -> Value {
        let at = find(answer, kind);
        let mut event = answer["state"][at].clone();
        change(&mut event);
        event.as_object_mut().unwrap().remove("signatures");
        Value::Object(peer.sign(RoomVersion::V11, event).1)
    }
    let cases: Vec<(&str, Spoil, &str)> = vec![
        (
            "a template with another sender",
            in_template(|it| it["event"]["sender"] = json!("@a:peer.example")),
            "sender",
        ),
        ("one of another type", in_template(|it| it["event"]["type"] = json!("m.room.topic")), "type"),
        ("one for another room", in_template(|it| it["event"]["room_id"] = json!("!x:peer.example")), "room_id"),
        ("a version that is not supported", in_template(|it| it["room_version"] = json!("5")), "version 5"),
        ("another version than the room's", in_template(|it| it["room_version"] = json!("10")), "says version"),
        ("its refusal", in_template(|it| *it = json!({ "errcode": "M_FORBIDDEN", "error": "go away" })), "go away"),
        (
            "another join",
            in_answer(|peer, it| {
                let event = it["event"].clone();
                let mut event = event;
                event["origin_server_ts"] = json!(7);
                it["event"] = Value::Object(peer.sign(RoomVersion::V11, event).1);
            }),
            "another event",
        ),
        ("no state", in_answer(|_, it| *it = json!({ "auth_chain": [], "state": null })), "state is missing"),
        ("members left out", in_answer(|_, it| it["members_omitted"] = json!(true)), "members_omitted"),
        ("no create event", in_answer(|_, it| take_out(it, "m.room.create")), "0 events of the type m.room.create"),
        (
            "two create events",
            in_answer(|peer, it| {
                let second = again(peer, it, "m.room.create", |event| event["origin_server_ts"] = json!(5));
                it["auth_chain"].as_array_mut().unwrap().push(second);
            }),
            "2 events of the type m.room.create",
        ),
        (
            "a create event of another room",
            in_answer(|peer, it| {
                let other = again(peer, it, "m.room.create", |event| event["room_id"] = json!("!other:peer.example"));
                take_out(it, "m.room.create");
                it["state"].as_array_mut().unwrap().push(other);
            }),
            "m.room.create",
        ),
        (
            "two events for one key",
            in_answer(|peer, it| {
                let second = again(peer, it, "m.room.name", |event| event["content"] = json!({ "name": "evil" }));
                it["state"].as_array_mut().unwrap().push(second);
            }),
            "two events for",
        ),
        (
            "power levels that nobody signed",
            in_answer(|_, it| {
                let at = find(it, "m.room.power_levels");
                it["state"][at]["signatures"] = json!({ "peer.example": { "ed25519:x": "AAAA" } });
            }),
            "m.room.power_levels",
        ),
        (
            "join rules of another room",
            in_answer(|peer, it| {
                let other =
                    again(peer, it, "m.room.join_rules", |event| event["room_id"] = json!("!other:peer.example"));
                let at = find(it, "m.room.join_rules");
                it["state"][at] = other;
            }),
            "m.room.join_rules",
        ),
        (
            "join rules that are malformed",
            in_answer(|_, it| {
                let at = find(it, "m.room.join_rules");
                it["state"][at]["depth"] = json!(1.5);
            }),
            "m.room.join_rules",
        ),
        (
            "power levels that nothing allows",
            in_answer(|peer, it| {
                let other = again(peer, it, "m.room.power_levels", |event| event["auth_events"] = json!([]));
                let at = find(it, "m.room.power_levels");
                it["state"][at] = other;
            }),
            "m.room.power_levels",
        ),
        (
            "power levels whose auth events are missing",
            in_answer(|peer, it| {
                let other = again(peer, it, "m.room.power_levels", |event| {
                    event["auth_events"].as_array_mut().unwrap().push(json!(format!("${}", "m".repeat(43))));
                });
                let at = find(it, "m.room.power_levels");
                it["state"][at] = other;
            }),
            "m.room.power_levels",
        ),
        (
            "a state in which we are banned",
            in_answer(|peer, it| {
                let at = find(it, "m.room.join_rules");
                let mut ban = it["state"][at].clone();
                let user = it["event"]["sender"].clone();
                ban["type"] = json!("m.room.member");
                ban["state_key"] = user;
                ban["content"] = json!({ "membership": "ban" });
                ban.as_object_mut().unwrap().remove("signatures");
                it["state"].as_array_mut().unwrap().push(Value::Object(peer.sign(RoomVersion::V11, ban).1));
            }),
            "ban",
        ),
        ("100,001 events", in_answer(|_, it| it["state"] = json!(vec![json!({}); 100_001])), "100000 events"),
        ("a giant body", in_answer(|_, it| it["state"] = json!(["x".repeat(65 << 20)])), "peer.example"),
        ("no join rules in the chain", in_answer(|_, it| take_out(it, "m.room.join_rules")), "missing"),
    ];
    let view = room_of(&peer, version, json!({ "join_rule": "public" }));
    let room = view.room_id.clone();
    for (what, spoil, expected) in cases {
        open(&peer, view.clone(), spoil);
        let joined = gateway.dag.join(&room, std::slice::from_ref(&peer.name), &ghost("bob"), Object::new()).await;
        let refusal = joined.expect_err(what).to_string();
        assert!(refusal.contains(expected), "{what}: {refusal}");
        assert!(!gateway.dag.knows(&room).await.unwrap(), "{what}");
        for table in ["dag_rooms", "dag_events", "dag_groups", "dag_joined", "dag_windows"] {
            let sql = sqlx::AssertSqlSafe(format!("SELECT COUNT(*) FROM {table}"));
            let (rows,): (i64,) = sqlx::query_as(sql).fetch_one(gateway.context.store.reader()).await.unwrap();
            assert_eq!(rows, 0, "{what}: {table}");
        }
    }
    // The same room, told as it is.
    let hosted = open(&peer, view, Box::new(|_, _| {}));
    gateway.dag.join(&room, &[evil.name.clone(), peer.name.clone()], &ghost("bob"), Object::new()).await.unwrap();
    assert_eq!(gateway.state(&room).await, hosted.view.lock().unwrap().state);
}

#[tokio::test]
async fn what_cannot_be_checked_of_a_state_is_left_out() {
    let peer = Arc::new(Peer::start("peer.example").await);
    // The gateway cannot reach this one.
    let gone = Peer::start("gone.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    let mut view = room_of(&peer, RoomVersion::V12, json!({ "join_rule": "public" }));
    let (dave, alice) = (gone.user("dave"), peer.user("alice"));
    let (id, event) = view.add(&gone, &dave, "m.room.member", Some(dave.as_str()), json!({ "membership": "join" }));
    peer.keep(&id, &event);
    for n in 0..60 {
        let user = peer.user(&format!("user{n}"));
        view.add(&peer, &user, "m.room.member", Some(user.as_str()), json!({ "membership": "join" }));
    }
    let (topic, _) = view.add(&peer, &peer.user("admin"), "m.room.topic", Some(""), json!({ "topic": "true" }));
    view.add(&peer, &alice, "m.room.member", Some(alice.as_str()), json!({ "membership": "join" }));
    let spoil = move |_: &Peer, answer: &mut Value| {
        for event in answer["state"].as_array_mut().into_iter().flatten() {
            if event["type"] == "m.room.topic" {
                // Signed is what redaction keeps.
                event["content"] = json!({ "topic": "false" });
            }
        }
    };
    let hosted = open(&peer, view, Box::new(spoil));
    let room = hosted.view.lock().unwrap().room_id.clone();
    gateway.dag.join(&room, std::slice::from_ref(&peer.name), &ghost("bob"), Object::new()).await.unwrap();
    let mut expected = hosted.view.lock().unwrap().state.clone();
    expected.remove(&("m.room.member".to_owned(), dave.to_string()));
    assert_eq!(gateway.state(&room).await, expected);
    assert_eq!(gateway.dag.joined(&room).await.unwrap().len(), 63);
    let topic = gateway.dag.event(&topic).await.unwrap();
    assert!(topic.is_none(), "it is state, and no event that was accepted in its place");
    let topic = gateway.dag.state_event(&room, "m.room.topic", "").await.unwrap().unwrap();
    assert!(topic.content.is_empty(), "a wrong hash leaves the redacted copy");
}

#[tokio::test]
async fn what_was_said_before_the_join_is_not_taken_for_news() {
    let peer = Arc::new(Peer::start("peer.example").await);
    let gateway = Gateway::start(&[&peer]).await;
    let mut view = room_of(&peer, RoomVersion::V11, json!({ "join_rule": "public" }));
    let admin = peer.user("admin");
    for number in 0..5 {
        view.say(&peer, &admin, &format!("old {number}"));
    }
    // Said while the join was under way: it follows what was before the join, and the join does not.
    let mut beside = view.clone();
    let (said, event) = beside.say(&peer, &admin, "beside");
    let before = view.state.values().cloned().collect();
    peer.memory.states.lock().unwrap().insert(said.clone(), before);
    let hosted = open(&peer, view, Box::new(|_, _| {}));
    let room = hosted.view.lock().unwrap().room_id.clone();
    gateway.dag.join(&room, std::slice::from_ref(&peer.name), &ghost("bob"), Object::new()).await.unwrap();
    let received = peer.put(&gateway.dag, &[&event]).await.remove(0);
    assert!(received.result.is_ok(), "{received:?}");
    assert_eq!(gateway.inbox(&room).await, [said]);
    assert_eq!(gateway.membership(&room, &ghost("bob")).await.as_deref(), Some("join"));
}
