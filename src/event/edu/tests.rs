//! What is read of EDUs, and what is written.

use ruma::server_name;

use super::read::MAX_ENTRIES;
use super::*;

fn read_one(edu: &Value) -> Vec<Result<Edu, Ignored>> {
    Edu::read(&edu.to_string(), server_name!("a.example"))
}

fn all() -> Vec<Edu> {
    let alice: OwnedUserId = "@alice:a.example".try_into().unwrap();
    let room: OwnedRoomId = "!r:a.example".try_into().unwrap();
    let receipt = |thread: Option<&str>| {
        Edu::Receipt(Receipt {
            room_id: room.clone(),
            user_id: alice.clone(),
            event_id: "$e".try_into().unwrap(),
            thread_id: thread.map(str::to_owned),
            ts: 5,
        })
    };
    vec![
        Edu::Typing(Typing { room_id: room.clone(), user_id: alice.clone(), typing: true }),
        receipt(None),
        receipt(Some("main")),
        receipt(Some("$root")),
        Edu::Presence(Presence {
            user_id: alice.clone(),
            presence: "online",
            status_msg: Some("here".to_owned()),
            last_active_ago: Some(7),
            currently_active: true,
        }),
        Edu::ToDevice(Box::new(ToDevice {
            sender: alice.clone(),
            message_id: Some("m1".to_owned()),
            kind: "m.room.encrypted".to_owned(),
            target: "@bob:b.example".try_into().unwrap(),
            device: "D".to_owned(),
            content: object([("ciphertext", "x".into())]),
        })),
        Edu::DevicesChanged(alice),
    ]
}

#[test]
fn what_is_written_is_read_again_in_both_shapes() {
    for edu in all() {
        for shape in [edu.to_matrix(), edu.to_lm()] {
            assert_eq!(read_one(&shape.clone().into()), [Ok(edu.clone())], "{shape:?}");
        }
    }
}

#[test]
fn hc_53_an_edu_is_believed_only_for_users_of_the_server_that_sent_it() {
    for edu in all() {
        for shape in [edu.to_matrix(), edu.to_lm()] {
            let text = Value::from(shape).to_string();
            assert_eq!(Edu::read(&text, server_name!("b.example")), [Err(Ignored::Foreign)], "{text}");
        }
    }
    // Its own user beside somebody else's.
    let receipt = json!({ "data": { "ts": 1 }, "event_ids": ["$e"] });
    let users = json!({ "@alice:a.example": receipt, "@bob:b.example": receipt });
    let read = read_one(&json!({ "edu_type": "m.receipt", "content": { "!r:a.example": { "m.read": users } } }));
    assert_eq!((read.len(), read.iter().filter(|entry| entry.is_ok()).count()), (2, 1));
    assert!(read.contains(&Err(Ignored::Foreign)));
    // In the draft's shape nobody speaks for another user of the same server.
    let content = json!({ "!r:a.example": { "m.read": { "@alice:a.example": receipt } } });
    let edu = json!({ "type": "m.receipt", "sender": "@mallory:a.example", "content": content });
    assert_eq!(read_one(&edu), [Err(Ignored::Foreign)]);
}

#[test]
fn hc_25_what_is_malformed_is_ignored_and_what_is_private_stays_so() {
    let receipt = |entry: Value| json!({ "!r:a.example": { "m.read": { "@alice:a.example": entry } } });
    let matrix = |kind: &str, content: Value| json!({ "edu_type": kind, "content": content });
    let private = json!({ "!r:a.example": { "m.read.private": { "@alice:a.example": { "event_ids": ["$e"] } } } });
    let typing = json!({ "room_id": "!r:a.example", "typing": true });
    for (edu, expected) in [
        (json!(null), Ignored::Malformed),
        (json!([1]), Ignored::Malformed),
        (json!({}), Ignored::Malformed),
        (json!({ "edu_type": 5, "content": [] }), Ignored::Malformed),
        (json!({ "type": "m.typing", "content": typing }), Ignored::Malformed),
        (matrix("m.typing", typing), Ignored::Malformed),
        (matrix("m.typing", json!({ "room_id": "r", "user_id": "@alice:a.example", "typing": 1 })), Ignored::Malformed),
        (matrix("m.receipt", receipt(json!({ "event_ids": [] }))), Ignored::Malformed),
        (matrix("m.receipt", receipt(json!({ "event_ids": ["$e"], "data": { "thread_id": 5 } }))), Ignored::Malformed),
        (matrix("m.receipt", private), Ignored::Unknown),
        (
            matrix("m.presence", json!({ "push": [{ "user_id": "@alice:a.example", "presence": "busy" }] })),
            Ignored::Malformed,
        ),
        (
            matrix("m.direct_to_device", json!({ "sender": "@alice:a.example", "type": "t", "messages": {} })),
            Ignored::Malformed,
        ),
        (matrix("org.example.new", json!({})), Ignored::Unknown),
    ] {
        assert_eq!(read_one(&edu), [Err(expected)], "{edu}");
    }
    let long = matrix("m.typing", json!({ "x": "x".repeat(MAX_TEXT) })).to_string();
    assert_eq!(Edu::read(&long, server_name!("a.example")), [Err(Ignored::Malformed)]);
    assert_eq!(Edu::read("{", server_name!("a.example")), [Err(Ignored::Malformed)]);
    let many: Object =
        (0..=MAX_ENTRIES).map(|n| (format!("@u{n}:a.example"), json!({ "event_ids": ["$e"] }))).collect();
    let many = json!({ "!r:a.example": { "m.read": many } });
    assert_eq!(read_one(&matrix("m.receipt", many)), [Err(Ignored::Malformed)]);
}
