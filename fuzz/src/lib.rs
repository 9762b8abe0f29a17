//! What must hold of any bytes that a peer sends: one function a fuzz target. They panic when it does not hold.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use http::{HeaderMap, HeaderValue, header};
use isthmus::event::{
    Edu, Lpdu, Object, Pdu, Redaction, RoomVersion, canonical_json, canonical_text, parse_answer, parse_leniently,
    parse_object, parse_value, redact, reference_hash,
};
use isthmus::federation::Claims;
use isthmus::gateway::transaction_parts;
use ruma::{OwnedEventId, ServerName};
use serde_json::Value;

/// The server that all of it comes to, and the one that it comes from.
const OWN: &str = "hub.example";
const PEER: &str = "part.example";

/// An event of an LM room, as a participant or as a hub may send it: whatever is taken is within the draft's bounds, is the same
/// after it was written and read again, and keeps its ID and hashes when it is redacted, once or twice.
pub fn event(data: &[u8]) {
    let strict = parse_object(data);
    if let Ok(object) = &strict {
        finished(object);
        partial(object);
    }
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(object) = parse_leniently(text)
    {
        // What the strict parser takes the lenient one leaves as it is.
        assert!(strict.as_ref().is_ok_and(|strict| *strict == object) || strict.is_err());
        finished(&object);
    }
}

fn finished(object: &Object) {
    for table in [Redaction::Draft, Redaction::GraphServer] {
        let Ok(pdu) = Pdu::parse(object.clone(), table) else { continue };
        let bytes = pdu.to_bytes();
        assert!(bytes.len() <= 65_536, "{} bytes", bytes.len());
        within_bounds(&pdu.json, &pdu.kind, pdu.state_key.as_deref());
        assert!(pdu.auth_events.len() <= 50 && pdu.prev_events.len() <= 50);
        let again = Pdu::parse(parse_object(&bytes).unwrap(), table).unwrap();
        assert_eq!(again.event_id, pdu.event_id, "the ID changes when the event is written and read");
        assert_eq!(again.to_bytes(), bytes, "the event changes when it is written and read");
        let once = pdu.redacted(table);
        let twice = once.redacted(table);
        assert_eq!(once.json, twice.json, "redaction takes something away at the second time");
        assert_eq!(format!("${}", reference_hash(&once.json, table)), pdu.event_id.as_str());
        for kept in ["hashes", "signatures", "hub_server", "auth_events", "prev_events", "type", "state_key", "sender"]
        {
            assert_eq!(once.json.get(kept), pdu.json.get(kept), "{kept} is lost");
        }
        let read = Pdu::parse(once.json, table).unwrap();
        assert_eq!((read.event_id, read.lpdu_id), (pdu.event_id.clone(), pdu.lpdu_id.clone()));
        if let Some(target) = pdu.redacts() {
            assert!(target.as_str().len() <= 255);
        }
        let _ = pdu.check_hashes();
    }
}

fn partial(object: &Object) {
    let Ok(lpdu) = Lpdu::parse(object.clone()) else { return };
    for only_the_hubs in ["auth_events", "prev_events", "unsigned", "event_id"] {
        assert!(!lpdu.json.contains_key(only_the_hubs), "{only_the_hubs}");
    }
    within_bounds(&lpdu.json, &lpdu.kind, lpdu.state_key.as_deref());
    let bytes = canonical_json(&lpdu.json);
    assert!(bytes.len() <= 65_536);
    let again = Lpdu::parse(parse_object(&bytes).unwrap()).unwrap();
    assert_eq!((again.lpdu_id, again.json), (lpdu.lpdu_id.clone(), lpdu.json.clone()));
    let redacted = redact(&lpdu.json, Redaction::Draft);
    assert_eq!(Lpdu::parse(redacted).unwrap().lpdu_id, lpdu.lpdu_id);
}

fn within_bounds(json: &Object, kind: &str, state_key: Option<&str>) {
    assert!(kind.chars().count() <= 255 && state_key.unwrap_or_default().chars().count() <= 255);
    for field in ["room_id", "sender", "hub_server"] {
        assert!(json.get(field).and_then(Value::as_str).unwrap_or_default().len() <= 255, "{field}");
    }
}

/// JSON: its canonical form is the same when it is read and written again, and both ways to it, through values and over the text
/// alone, come to the same.
pub fn canonical_json_of(data: &[u8]) {
    let over_text = canonical_text(data);
    if let Ok(text) = &over_text {
        assert_eq!(&canonical_text(text).unwrap(), text, "the canonical form of a canonical form is another");
    }
    let _ = parse_answer(data);
    let Ok(value) = parse_value(data) else { return };
    let Value::Object(object) = value else { return };
    let canonical = canonical_json(&object);
    assert_eq!(over_text.as_deref().unwrap(), canonical, "text and values do not agree");
    let again = parse_object(&canonical).unwrap();
    assert_eq!(canonical_json(&again), canonical);
    assert_eq!(again.len(), object.len());
}

/// `Authorization` headers, one a line: what is taken names one other server and keys, within bounds.
pub fn x_matrix(data: &[u8]) {
    let mut headers = HeaderMap::new();
    for line in data.split(|byte| *byte == b'\n') {
        if let Ok(value) = HeaderValue::from_bytes(line) {
            headers.append(header::AUTHORIZATION, value);
        }
    }
    let own = <&ServerName>::try_from(OWN).unwrap();
    let Ok(claims) = Claims::read(own, &headers) else { return };
    assert_ne!(claims.origin, own, "somebody else is this server");
    assert!(claims.origin.as_str().len() <= 255);
    let keys: Vec<&str> = claims.key_ids().collect();
    assert!((1..=8).contains(&keys.len()), "{keys:?}");
    assert!(headers.get_all(header::AUTHORIZATION).iter().count() == keys.len());
}

/// The body of `/send`: within bounds, each event and EDU fails alone, and each event has one ID by which its sender knows it.
pub fn send(data: &[u8]) {
    let peer = <&ServerName>::try_from(PEER).unwrap();
    let Ok((pdus, edus)) = transaction_parts(data, peer) else { return };
    assert!(pdus.len() <= 50 && edus.len() <= 100);
    for pdu in &pdus {
        event(pdu.get().as_bytes());
        let id = isthmus::lm::id_as_received(pdu);
        let _ = isthmus::dag::id_as_received(pdu.get(), RoomVersion::V12);
        if let Ok(object) = parse_object(pdu.get().as_bytes()) {
            known_by_one_id(&object, id.as_ref());
        }
    }
    for edu in &edus {
        for said in Edu::read(edu.get(), peer).into_iter().flatten() {
            assert_eq!(said.user().server_name(), peer, "an EDU in the name of another server");
        }
    }
}

fn known_by_one_id(object: &Object, id: Option<&OwnedEventId>) {
    for of_event in [
        Lpdu::parse(object.clone()).ok().map(|lpdu| lpdu.lpdu_id),
        Pdu::parse(object.clone(), Redaction::Draft).ok().map(|pdu| pdu.event_id),
    ] {
        assert!(of_event.is_none() || of_event.as_ref() == id, "{of_event:?}, answered as {id:?}");
    }
}
