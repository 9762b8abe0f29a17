//! What the two existing LM peers produced and how they judged it: every recorded event, good and bad, canonical form and
//! request signature gives here what it gave there. Where the peers differ from each other or from the draft, the test
//! names the vector and the reason.

use std::collections::BTreeMap;

use isthmus::event::{
    HashCheck, Lpdu, Object, Pdu, Redaction, VerifyKey, VerifyKeys, canonical_json, canonical_text, content_hash,
    lpdu_hash, parse_object, redact, reference_hash, verify_object,
};
use serde_json::Value;

fn load(text: &str) -> Vec<Value> {
    let Value::Array(vectors) = serde_json::from_str(text).unwrap() else { panic!("not a list of vectors") };
    assert!(!vectors.is_empty());
    vectors
}

fn object(value: &Value) -> Object {
    parse_object(&serde_json::to_vec(value).unwrap()).unwrap()
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap()
}

fn eigen_keys() -> VerifyKeys {
    let servers: BTreeMap<String, Value> = serde_json::from_str(include_str!("vectors/eigen-keys.json")).unwrap();
    let keys_of = |answer: &Value| -> BTreeMap<String, VerifyKey> {
        let keys = answer["verify_keys"].as_object().unwrap().iter();
        keys.map(|(id, key)| (id.clone(), VerifyKey::from_base64(key["key"].as_str().unwrap()).unwrap())).collect()
    };
    servers.iter().map(|(server, answer)| (server.as_str().try_into().unwrap(), keys_of(answer))).collect()
}

/// How far an event gets here.
#[derive(Debug, PartialEq)]
enum Fate {
    Malformed,
    BadSignature,
    Redacted,
    Accepted,
}

fn judge(event: &Value, keys: &VerifyKeys, redaction: Redaction) -> Fate {
    let Ok(pdu) = Pdu::parse(object(event), redaction) else { return Fate::Malformed };
    if pdu.verify_signatures(keys, redaction).is_err() {
        return Fate::BadSignature;
    }
    match pdu.check_hashes() {
        HashCheck::Intact => Fate::Accepted,
        HashCheck::Redact(_) => Fate::Redacted,
    }
}

#[test]
fn eigen_good_events() {
    let keys = eigen_keys();
    let vectors = load(include_str!("vectors/eigen-events.json"));
    let good: Vec<&Value> = vectors.iter().filter(|vector| vector["negative"] == false).collect();
    assert!(good.len() >= 20);
    for vector in good {
        let (name, event, expected) = (&vector["name"], object(&vector["event"]), &vector["expected"]);
        assert_eq!(Value::Object(redact(&event, Redaction::Draft)), expected["redacted"], "{name}");
        assert_eq!(reference_hash(&event, Redaction::Draft), expected["reference_hash"].as_str().unwrap(), "{name}");
        if let Some(hash) = expected.get("lpdu_hash_sha256") {
            assert_eq!(lpdu_hash(&event), hash.as_str().unwrap(), "{name}");
        }
        if let Some(hash) = expected.get("content_hash_sha256") {
            assert_eq!(content_hash(&event), hash.as_str().unwrap(), "{name}");
        }
        if vector["kind"] == "lpdu" {
            let lpdu = Lpdu::parse(event).unwrap();
            assert_eq!(lpdu.lpdu_id, expected["event_id"].as_str().unwrap(), "{name}");
            lpdu.verify(&keys).unwrap_or_else(|refusal| panic!("{name}: {refusal}"));
        } else {
            assert_eq!(judge(&vector["event"], &keys, Redaction::Draft), Fate::Accepted, "{name}");
            let pdu = Pdu::parse(event, Redaction::Draft).unwrap();
            assert_eq!(pdu.event_id, expected["event_id"].as_str().unwrap(), "{name}");
            assert_eq!(pdu.redacted(Redaction::Draft).event_id, pdu.event_id, "{name}");
        }
        for signature in vector["signatures"].as_array().unwrap() {
            let key = VerifyKey::from_base64(signature["public_key"].as_str().unwrap()).unwrap();
            let (message, signature) = (&signature["signed_bytes"], &signature["signature"]);
            key.verify(message.as_str().unwrap().as_bytes(), signature.as_str().unwrap()).unwrap();
        }
    }
}

#[test]
fn hc_30_eigen_bad_events() {
    // Where isthmus judges otherwise than eigen-server did, and why.
    let different = BTreeMap::from([
        ("tampered_content_hub_event", (Fate::Redacted, "the draft: keep a redacted copy; eigen refuses")),
        ("hub_rewrote_content_and_resigned", (Fate::Redacted, "the draft: keep a redacted copy; eigen refuses")),
        ("unknown_key_id_beside_a_good_one", (Fate::Accepted, "one good signature by a known key is enough")),
        ("unsigned_added_after_signing", (Fate::Accepted, "unsigned is no part of an event and is stripped")),
        ("unsigned_present_when_lpdu_hashed", (Fate::Redacted, "the same: its hash cannot be right then")),
    ]);
    let keys = eigen_keys();
    let vectors = load(include_str!("vectors/eigen-events.json"));
    let bad: Vec<&Value> = vectors.iter().filter(|vector| vector["negative"] == true).collect();
    assert!(bad.len() >= 25);
    let mut met = 0;
    for vector in bad {
        let name = vector["name"].as_str().unwrap();
        let fate = judge(&vector["event"], &keys, Redaction::Draft);
        if let Some((expected, reason)) = different.get(name) {
            assert_eq!(&fate, expected, "{name}: {reason}");
            met += 1;
            continue;
        }
        let accepted = vector["eigen_check_validity"]["accepted"].as_bool().unwrap();
        assert_eq!(fate == Fate::Accepted, accepted, "{name}: {fate:?}");
        assert_ne!(fate, Fate::Redacted, "{name}");
        let received = object(&vector["event"]);
        if let Some(id) = vector["expected"]["event_id_of_received"].as_str() {
            assert_eq!(format!("${}", reference_hash(&received, Redaction::Draft)), id, "{name}");
        }
        if let Some(hash) = vector["expected"]["content_hash_sha256_of_received"].as_str() {
            assert_eq!(content_hash(&received), hash, "{name}");
        }
    }
    assert_eq!(met, different.len());
}

#[test]
fn dual_stack_synapse_events() {
    let recorded: Value = serde_json::from_str(include_str!("vectors/dual-stack-synapse-events.json")).unwrap();
    let mut keys = VerifyKeys::new();
    for (server, of_server) in recorded["public_keys"].as_object().unwrap() {
        let of_server = of_server.as_object().unwrap().iter();
        let of_server = of_server.map(|(id, key)| (id.clone(), VerifyKey::from_base64(key.as_str().unwrap()).unwrap()));
        keys.insert(server.as_str().try_into().unwrap(), of_server.collect());
    }
    let events = recorded["events"].as_array().unwrap();
    assert!(events.len() > 15);
    let (mut redactions, mut from_participants) = (0, 0);
    for vector in events {
        let (id, event) = (vector["event_id"].as_str().unwrap(), object(&vector["pdu"]));
        let table = Redaction::GraphServer;
        assert_eq!(Value::Object(redact(&event, table)), vector["redacted"], "{id}");
        assert_eq!(format!("${}", reference_hash(&event, table)), id);
        assert_eq!(content_hash(&event), vector["content_hash"].as_str().unwrap(), "{id}");
        assert_eq!(judge(&vector["pdu"], &keys, table), Fate::Accepted, "{id}");
        // The two peers keep different fields of a redaction, so the draft's table does not verify this peer's.
        if vector["type"] == "m.room.redaction" {
            assert_ne!(judge(&vector["pdu"], &keys, Redaction::Draft), Fate::Accepted, "{id}");
            redactions += 1;
        }
        if let Some(hash) = vector["lpdu_hash"].as_str() {
            assert_eq!(lpdu_hash(&event), hash, "{id}");
            let lpdu = Lpdu::parse(object(&vector["lpdu"])).unwrap();
            assert_eq!(lpdu.hub_server, "localhost:8801");
            if vector["type"] != "m.room.redaction" {
                lpdu.verify(&keys).unwrap_or_else(|refusal| panic!("{id}: {refusal}"));
            }
            from_participants += 1;
        }
    }
    assert!(redactions >= 2 && from_participants >= 4);
}

#[test]
fn eigen_canonical_json() {
    let vectors = load(include_str!("vectors/eigen-canonical-json.json"));
    for vector in &vectors {
        let (json, expected) = (vector["json_text"].as_str().unwrap(), vector["eigen_canonical"].as_str().unwrap());
        assert_eq!(text(canonical_text(json.as_bytes()).unwrap()), expected);
        // What is parsed strictly has the same form; what is not is an event that is refused.
        match parse_object(json.as_bytes()) {
            Ok(parsed) => assert_eq!(text(canonical_json(&parsed)), expected),
            Err(_) => assert!(
                ["1E400", "\\ud800", "\\udc00", "\"a\":1,\"a\":2", "[]", "\"x\""].iter().any(|bad| json.contains(bad)),
                "{json} was refused"
            ),
        }
    }
}

#[test]
fn eigen_request_signatures() {
    let vectors = load(include_str!("vectors/eigen-request-auth.json"));
    assert!(vectors.len() > 20);
    for vector in &vectors {
        let signed = vector["signed_bytes"].as_str().unwrap();
        let mut request = parse_object(signed.as_bytes()).unwrap();
        assert_eq!(text(canonical_json(&request)), signed);
        let (origin, key_id) = (vector["origin"].as_str().unwrap(), vector["key"].as_str().unwrap());
        request.insert("signatures".to_owned(), serde_json::json!({ origin: { key_id: vector["sig"] } }));
        let key = VerifyKey::from_base64(vector["public_key"].as_str().unwrap()).unwrap();
        verify_object(&request, origin, &BTreeMap::from([(key_id.to_owned(), key)])).unwrap();
    }
}
