//! LPDUs and finished events, made well and made badly.

use std::collections::BTreeMap;

use proptest::prelude::*;
use ruma::{ServerName, event_id, server_name};
use serde_json::{Value, json};

use super::*;
use crate::identity::SigningKey;
use crate::refusal::Refusal;

fn hub() -> &'static ServerName {
    server_name!("hub.example")
}

fn origin() -> &'static ServerName {
    server_name!("part.example")
}

struct World {
    hub_key: SigningKey,
    origin_key: SigningKey,
    keys: VerifyKeys,
}

impl World {
    fn new() -> Self {
        let (hub_key, origin_key) = (SigningKey::generate(), SigningKey::generate());
        let of = |key: &SigningKey| {
            BTreeMap::from([(key.id().to_owned(), VerifyKey::from_base64(&key.public_base64()).unwrap())])
        };
        let keys = VerifyKeys::from([(hub().to_owned(), of(&hub_key)), (origin().to_owned(), of(&origin_key))]);
        Self { hub_key, origin_key, keys }
    }

    fn lpdu(&self, template: Value) -> Result<Lpdu, Refusal> {
        Lpdu::build(object(template), hub(), origin(), &self.origin_key)
    }

    fn complete(&self, lpdu: Lpdu) -> Result<Pdu, Refusal> {
        Pdu::complete(lpdu.verify(&self.keys)?, completion(), hub(), &self.hub_key)
    }
}

fn completion() -> Completion {
    Completion {
        auth_events: vec![event_id!("$create").to_owned(), event_id!("$member").to_owned()],
        prev_event: Some(event_id!("$before").to_owned()),
    }
}

fn object(value: Value) -> Object {
    value.as_object().unwrap().clone()
}

fn message(body: &str) -> Value {
    json!({
        "type": "m.room.message", "room_id": "!room:hub.example", "sender": "@bob:part.example",
        "origin_server_ts": 1_795_226_877_068_i64, "content": { "body": body, "msgtype": "m.text" },
    })
}

fn with(mut json: Object, field: &str, value: Value) -> Object {
    json.insert(field.to_owned(), value);
    json
}

fn code<T: std::fmt::Debug>(result: Result<T, Refusal>) -> &'static str {
    result.unwrap_err().code()
}

#[test]
fn who_signs_by_the_drafts_redaction_where_graph_servers_are_is_told_so() {
    let world = World::new();
    let mut template = message("");
    template["type"] = json!("m.room.redaction");
    template["content"] = json!({ "redacts": "$target" });
    let shared = Redaction::GraphServer;
    let lpdu = world.lpdu(template.clone()).unwrap();
    let refused = lpdu.clone().verify_as(&world.keys, shared).map(drop).unwrap_err();
    assert_eq!(refused.code(), "bad_signature");
    let said = refused.to_string();
    assert!(said.contains("part.example") && said.contains("content.redacts") && said.contains("draft"), "{said}");
    assert!(lpdu.verify(&world.keys).is_ok());
    // What is wrong by both is wrong.
    let mut forged = world.lpdu(template.clone()).unwrap();
    let other = SigningKey::generate().sign(b"something else");
    forged.json["signatures"][origin().as_str()] = json!({ world.origin_key.id(): other });
    let refused = forged.verify_as(&world.keys, shared).map(drop).unwrap_err().to_string();
    assert!(refused.contains("does not verify"), "{refused}");
    let right = Lpdu::build_as(object(template), hub(), shared, origin(), &world.origin_key).unwrap();
    assert!(right.verify_as(&world.keys, shared).is_ok());
}

#[test]
fn an_lpdu_becomes_an_event_that_every_participant_can_check() {
    let world = World::new();
    let lpdu = world.lpdu(message("hello")).unwrap();
    let id = lpdu.lpdu_id.clone();
    let pdu = world.complete(lpdu).unwrap();
    assert_eq!(pdu.lpdu_id.as_ref(), Some(&id));
    assert_eq!(pdu.required_signers(), [origin(), hub()]);
    let received = Pdu::parse(parse_object(&pdu.to_bytes()).unwrap(), Redaction::Draft).unwrap();
    received.verify_signatures(&world.keys, Redaction::Draft).unwrap();
    assert_eq!(received.check_hashes(), HashCheck::Intact);
    assert_eq!((&received.event_id, &received.lpdu_id), (&pdu.event_id, &pdu.lpdu_id));
}

#[test]
fn an_event_of_the_hubs_own_user_has_neither_hub_server_nor_lpdu_hash() {
    let world = World::new();
    let template = with(object(message("hello")), "sender", json!("@alice:hub.example"));
    let mut pdu = Pdu::build(template, completion(), hub(), &world.hub_key).unwrap();
    assert!(pdu.hub_server.is_none() && pdu.json["hashes"].get("lpdu").is_none());
    let id = pdu.event_id.clone();
    pdu.countersign(origin(), &world.origin_key);
    let received = Pdu::parse(pdu.json, Redaction::Draft).unwrap();
    assert_eq!(received.event_id, id);
    received.verify_signatures(&world.keys, Redaction::Draft).unwrap();
}

#[test]
fn hc_27_what_only_the_hub_may_set_is_refused_in_an_lpdu() {
    let good = World::new().lpdu(message("hello")).unwrap().json;
    let hashes = |value: Value| with(good.clone(), "hashes", value);
    for bad in [
        with(good.clone(), "prev_events", json!([])),
        with(good.clone(), "auth_events", json!(["$a"])),
        hashes(json!({ "lpdu": { "sha256": "x" }, "sha256": "y" })),
        hashes(json!({ "sha256": "y" })),
    ] {
        assert_eq!(code(Lpdu::parse(bad)), "malformed");
    }
    // Not part of an event: stripped, and the hash is right without them.
    let world = World::new();
    let lpdu = world.lpdu(message("hello")).unwrap();
    let noisy = with(with(lpdu.json.clone(), "unsigned", json!({ "age": 1 })), "event_id", json!("$x"));
    assert_eq!(Lpdu::parse(noisy).unwrap().verify(&world.keys).unwrap().lpdu_id, lpdu.lpdu_id);
}

#[test]
fn hc_28_wrong_missing_or_foreign_lpdu_hashes_are_refused() {
    let world = World::new();
    let good = world.lpdu(message("hello")).unwrap().json;
    for hashes in [
        json!({}),
        json!({ "lpdu": {} }),
        json!({ "lpdu": "x" }),
        json!({ "lpdu": { "sha512": "x" } }),
        json!({ "lpdu": { "sha256": "x", "sha512": "x" } }),
        json!({ "lpdu": { "sha256": 1 } }),
        json!([]),
    ] {
        assert_eq!(code(Lpdu::parse(with(good.clone(), "hashes", hashes))), "malformed");
    }
    let wrong = with(good, "hashes", json!({ "lpdu": { "sha256": "AAAA" } }));
    assert_eq!(code(Lpdu::parse(wrong).unwrap().verify(&world.keys)), "hash_mismatch");
}

#[test]
fn hc_29_the_senders_server_must_have_signed() {
    let world = World::new();
    let template = || object(message("hello"));
    // Signed by the hub instead, by nobody, and by two keys of which one is wrong.
    let by_hub = Lpdu::build(template(), hub(), hub(), &world.hub_key).unwrap();
    assert_eq!(code(by_hub.verify(&world.keys)), "bad_signature");
    let good = world.lpdu(message("hello")).unwrap();
    let unsigned = Lpdu::parse(with(good.json.clone(), "signatures", json!({}))).unwrap();
    assert_eq!(code(unsigned.verify(&world.keys)), "bad_signature");
    let mut keys = world.keys.clone();
    let second = SigningKey::generate();
    let public = VerifyKey::from_base64(&second.public_base64()).unwrap();
    keys.get_mut(origin()).unwrap().insert(second.id().to_owned(), public);
    let mut two = good.json.clone();
    two["signatures"][origin().as_str()][second.id()] = json!(second.sign(b"something else"));
    assert_eq!(code(Lpdu::parse(two).unwrap().verify(&keys)), "bad_signature");
    // Under the name of another server's user.
    let forged = with(template(), "sender", json!("@alice:hub.example"));
    let forged = Lpdu::build(forged, hub(), origin(), &world.origin_key).unwrap();
    assert_eq!(code(forged.verify(&world.keys)), "bad_signature");
}

#[test]
fn one_bad_lpdu_among_many_fails_alone() {
    let world = World::new();
    let mut lpdus: Vec<Lpdu> = (0..50).map(|n| world.lpdu(message(&n.to_string())).unwrap()).collect();
    lpdus[17].json["content"]["body"] = json!("tampered");
    lpdus[31].json["signatures"][origin().as_str()][world.origin_key.id()] = json!(world.origin_key.sign(b"x"));
    let answers = Lpdu::verify_all(lpdus, &world.keys);
    let bad: Vec<usize> = (0..50).filter(|n| answers[*n].is_err()).collect();
    assert_eq!(bad, [17, 31]);
    assert_eq!(answers[17].as_ref().unwrap_err().code(), "hash_mismatch");
    assert_eq!(answers[31].as_ref().unwrap_err().code(), "bad_signature");
}

#[test]
fn hc_14_lpdus_hold_no_floats_and_no_great_integers() {
    let world = World::new();
    for (number, fits) in [
        ("9007199254740991", true),
        ("-9007199254740991", true),
        ("9007199254740992", false),
        ("18446744073709551615", false),
        ("1.5", false),
        ("1e3", true),
        ("-0.0", true),
        ("9007199254740992.0", false),
    ] {
        let mut template = object(message("hello"));
        template["content"]["deep"] = json!([{ "n": serde_json::from_str::<Value>(number).unwrap() }]);
        let lpdu = Lpdu::build(template, hub(), origin(), &world.origin_key);
        assert_eq!(lpdu.is_ok(), fits, "{number}");
    }
    // A participant takes what its hub sends.
    let mut pdu = world.complete(world.lpdu(message("hello")).unwrap()).unwrap().json;
    pdu["content"]["n"] = json!(1.5);
    assert!(Pdu::parse(pdu, Redaction::Draft).is_ok());
}

#[test]
fn hc_18_an_lpdu_that_fits_while_its_event_would_not_is_refused_by_the_hub() {
    let world = World::new();
    let empty = canonical_json(&world.lpdu(message("")).unwrap().json).len();
    let finished = world.complete(world.lpdu(message("")).unwrap()).unwrap().to_bytes().len();
    let body = |size: usize| world.lpdu(message(&"x".repeat(size)));
    // 65,536 bytes fit, one more does not; first as an LPDU, then as a finished event.
    assert!(body(65_536 - empty).is_ok());
    assert_eq!(code(body(65_537 - empty)), "too_large");
    assert_eq!(world.complete(body(65_536 - finished).unwrap()).unwrap().to_bytes().len(), 65_536);
    assert_eq!(code(world.complete(body(65_537 - finished).unwrap())), "too_large");
}

#[test]
fn hc_19_types_and_state_keys_have_255_characters_at_most() {
    let world = World::new();
    for field in ["type", "state_key"] {
        for (length, fits) in [(255, true), (256, false)] {
            for character in ["x", "é"] {
                let template = with(object(message("hello")), field, json!(character.repeat(length)));
                assert_eq!(Lpdu::build(template, hub(), origin(), &world.origin_key).is_ok(), fits, "{field}");
            }
        }
    }
    for (field, value) in [
        ("sender", format!("@{}:part.example", "x".repeat(250))),
        ("room_id", format!("!{}:hub.example", "x".repeat(250))),
        ("sender", "bob".to_owned()),
        ("room_id", "room".to_owned()),
    ] {
        let template = with(object(message("hello")), field, json!(value));
        assert_eq!(code(Lpdu::build(template, hub(), origin(), &world.origin_key)), "malformed", "{field}");
    }
}

#[test]
fn hc_15_event_ids_that_no_hash_gives_are_refused() {
    let world = World::new();
    let good = world.complete(world.lpdu(message("hello")).unwrap()).unwrap().json;
    for field in ["prev_events", "auth_events"] {
        for id in ["", "$", "a", "$a\0b", "$a b", "$a:hub.example", &format!("${}", "a".repeat(255))] {
            let bad = with(good.clone(), field, json!(["$good-_1", id]));
            assert_eq!(code(Pdu::parse(bad, Redaction::Draft)), "malformed", "{field}: {id}");
        }
        let many = with(good.clone(), field, json!(vec!["$a"; 51]));
        assert_eq!(code(Pdu::parse(many, Redaction::Draft)), "malformed", "{field}");
    }
}

#[test]
fn fields_of_the_wrong_kind_are_named() {
    let good = World::new().lpdu(message("hello")).unwrap().json;
    for (field, value) in [
        ("type", json!(1)),
        ("state_key", Value::Null),
        ("sender", json!({})),
        ("origin_server_ts", json!("now")),
        ("origin_server_ts", json!(1.5)),
        ("origin_server_ts", json!(-1)),
        ("content", Value::Null),
        ("content", json!([])),
        ("signatures", json!({ "a": "b" })),
        ("hub_server", json!("not a name")),
        ("hub_server", json!("x".repeat(256))),
        ("hub_server", Value::Null),
    ] {
        let refusal = Lpdu::parse(with(good.clone(), field, value)).unwrap_err();
        assert!(refusal.to_string().contains(field), "{field}: {refusal}");
    }
    for field in ["type", "room_id", "sender", "origin_server_ts", "content", "signatures", "hub_server", "hashes"] {
        let mut missing = good.clone();
        missing.remove(field);
        let refusal = Lpdu::parse(missing).unwrap_err();
        assert!(refusal.to_string().contains(field), "{field}: {refusal}");
    }
}

#[test]
fn hc_30_what_the_hub_added_cannot_be_changed_on_the_way() {
    let world = World::new();
    let good = world.complete(world.lpdu(message("hello")).unwrap()).unwrap().json;
    for (field, value) in [
        ("prev_events", json!(["$other"])),
        ("auth_events", json!([])),
        ("hub_server", json!("other.example")),
        ("origin_server_ts", json!(1)),
    ] {
        let pdu = Pdu::parse(with(good.clone(), field, value), Redaction::Draft).unwrap();
        assert_eq!(code(pdu.verify_signatures(&world.keys, Redaction::Draft)), "bad_signature", "{field}");
    }
    // What redaction drops breaks the hash alone: the redacted copy may be kept, under the same ID.
    let mut tampered = good;
    tampered["content"]["body"] = json!("tampered");
    let pdu = Pdu::parse(tampered, Redaction::Draft).unwrap();
    pdu.verify_signatures(&world.keys, Redaction::Draft).unwrap();
    assert!(matches!(pdu.check_hashes(), HashCheck::Redact(Refusal::HashMismatch { which: "lpdu", .. })));
    assert!(pdu.redacted(Redaction::Draft).content().is_empty());
}

#[test]
fn hc_34_redaction_keeps_the_id_the_hub_and_the_hashes() {
    let world = World::new();
    let pdu = world.complete(world.lpdu(with(object(message("hello")), "extra", json!(1)).into()).unwrap()).unwrap();
    let redacted = pdu.redacted(Redaction::Draft);
    assert_eq!(format!("${}", reference_hash(&redacted.json, Redaction::Draft)), pdu.event_id);
    assert_eq!(redacted.json["hub_server"], "hub.example");
    assert_eq!(redacted.json["hashes"], pdu.json["hashes"]);
    assert!(redacted.json.get("extra").is_none() && pdu.json.get("extra").is_some());
    redacted.verify_signatures(&world.keys, Redaction::Draft).unwrap();
}

#[test]
fn a_hub_finishes_only_what_is_meant_for_it() {
    let world = World::new();
    let elsewhere = Lpdu::build(object(message("x")), server_name!("other.example"), origin(), &world.origin_key);
    let verified = elsewhere.unwrap().verify(&world.keys).unwrap();
    assert_eq!(code(Pdu::complete(verified, completion(), hub(), &world.hub_key)), "wrong_hub");
}

proptest! {
    #[test]
    fn parsing_never_panics(fields in proptest::collection::btree_map(
        proptest::sample::select(vec!["type", "room_id", "sender", "content", "hashes", "signatures", "hub_server",
            "origin_server_ts", "auth_events", "prev_events", "state_key"]),
        proptest::sample::select(vec!["null", "1", "\"x\"", "{}", "[]", "[1]", "{\"lpdu\":{\"sha256\":\"x\"}}",
            "\"@a:b\"", "\"!a:b\"", "\"$a\"", "[\"$a\"]", "{\"sha256\":\"\"}", "{\"b\":{\"ed25519:1\":\"AA\"}}"]),
        0..11,
    )) {
        let json: Object = fields.into_iter().map(|(k, v)| (k.to_owned(), serde_json::from_str(v).unwrap())).collect();
        let world = World::new();
        let _ = Lpdu::parse(json.clone()).map(|lpdu| lpdu.verify(&world.keys));
        if let Ok(pdu) = Pdu::parse(json, Redaction::Draft) {
            let _ = pdu.verify_signatures(&world.keys, Redaction::Draft);
            let _ = pdu.check_hashes();
        }
    }
}
