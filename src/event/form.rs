//! The form of an event: the fields that LPDUs and finished events have in common, read once into types.
//! Source: draft-ralston-mimi-linearized-matrix-04, section "Events" (`int-pdu`).

use ruma::{OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId};
use serde_json::Value;

use super::Object;
use super::canonical::canonical_number;
use super::id::event_id;
use super::parse::kind;
use crate::refusal::Refusal;

/// The size of a whole event as canonical JSON, signatures included.
pub(super) const MAX_EVENT: usize = 65_536;
/// The length of a type or a state key, in characters.
const MAX_CHARACTERS: usize = 255;
/// The length of an identifier, in bytes.
const MAX_IDENTIFIER: usize = 255;
/// The largest integer that every JSON parser reads exactly, 2^53 − 1.
const MAX_INTEGER: i64 = (1 << 53) - 1;

/// What every event has.
pub(super) struct Common {
    pub room_id: OwnedRoomId,
    pub sender: OwnedUserId,
    pub kind: String,
    pub state_key: Option<String>,
    pub origin_server_ts: i64,
    pub hub_server: Option<OwnedServerName>,
}

impl Common {
    pub(super) fn read(json: &Object) -> Result<Self, Refusal> {
        let origin_server_ts = json
            .get("origin_server_ts")
            .and_then(Value::as_i64)
            .filter(|ts| (0..=MAX_INTEGER).contains(ts))
            .ok_or_else(|| wrong(json, "origin_server_ts", "an integer from 0 to 2^53 − 1"))?;
        if !json.get("content").is_some_and(Value::is_object) {
            return Err(wrong(json, "content", "an object"));
        }
        check_signatures(json)?;
        Ok(Self {
            room_id: identifier(json, "room_id")?,
            sender: identifier(json, "sender")?,
            kind: short_text(json, "type")?,
            state_key: json.contains_key("state_key").then(|| short_text(json, "state_key")).transpose()?,
            origin_server_ts,
            hub_server: json.contains_key("hub_server").then(|| identifier(json, "hub_server")).transpose()?,
        })
    }
}

/// `field` is not what it must be.
pub(super) fn wrong(json: &Object, field: &str, needed: &str) -> Refusal {
    let found = json.get(field).map_or("missing", kind);
    Refusal::malformed(field, format!("{found}, must be {needed}"))
}

pub(super) fn text<'a>(json: &'a Object, field: &str) -> Result<&'a str, Refusal> {
    json.get(field).and_then(Value::as_str).ok_or_else(|| wrong(json, field, "a string"))
}

fn short_text(json: &Object, field: &str) -> Result<String, Refusal> {
    let text = text(json, field)?;
    let length = text.chars().count();
    if length > MAX_CHARACTERS {
        return Err(Refusal::malformed(field, format!("{length} characters, at most {MAX_CHARACTERS} are allowed")));
    }
    Ok(text.to_owned())
}

fn identifier<T>(json: &Object, field: &str) -> Result<T, Refusal>
where
    for<'a> T: TryFrom<&'a str, Error: std::fmt::Display>,
{
    let text = text(json, field)?;
    if text.len() > MAX_IDENTIFIER {
        return Err(Refusal::malformed(field, format!("{} bytes, at most {MAX_IDENTIFIER} are allowed", text.len())));
    }
    T::try_from(text).map_err(|error| {
        let shown: String = text.chars().take(60).collect();
        Refusal::malformed(field, format!("{shown:?}: {error}"))
    })
}

/// A list of event IDs.
pub(super) fn event_ids(json: &Object, field: &str, most: usize) -> Result<Vec<OwnedEventId>, Refusal> {
    let list = json.get(field).and_then(Value::as_array).ok_or_else(|| wrong(json, field, "an array"))?;
    if list.len() > most {
        return Err(Refusal::malformed(field, format!("{} entries, at most {most} are taken", list.len())));
    }
    list.iter()
        .map(|id| {
            id.as_str().and_then(event_id).ok_or_else(|| Refusal::malformed(field, "an entry that is no event ID"))
        })
        .collect()
}

fn check_signatures(json: &Object) -> Result<(), Refusal> {
    let well_formed = json.get("signatures").and_then(Value::as_object).is_some_and(|signatures| {
        signatures.values().all(|keys| keys.as_object().is_some_and(|keys| keys.values().all(Value::is_string)))
    });
    if well_formed { Ok(()) } else { Err(wrong(json, "signatures", "an object of objects of strings")) }
}

/// Refuses floats and integers beyond ±(2^53 − 1), which not every parser reads alike.
pub(crate) fn check_numbers(value: &Value) -> Result<(), Refusal> {
    match value {
        Value::Number(number) => match number.as_i64() {
            Some(integer) if (-MAX_INTEGER..=MAX_INTEGER).contains(&integer) => Ok(()),
            _ => Err(Refusal::malformed("number", format!("{number} is no integer within ±(2^53 − 1)"))),
        },
        Value::Array(items) => items.iter().try_for_each(check_numbers),
        Value::Object(object) => object.values().try_for_each(check_numbers),
        _ => Ok(()),
    }
}

/// Writes numbers that are integers as such, however a server wrote them (`50.0`, `5e1`, `-0`): RFC 8785 knows one form for each,
/// by which events are hashed and signed, so they are the same event.
pub(crate) fn integers(object: &mut Object) {
    object.values_mut().for_each(integer);
}

fn integer(value: &mut Value) {
    match value {
        Value::Number(number) if number.is_f64() => {
            // Its form without a fraction or exponent, where it has one, is exact.
            let exact = canonical_number(number).parse::<i64>().ok().filter(|exact| exact.abs() <= MAX_INTEGER);
            if let Some(exact) = exact {
                *number = exact.into();
            }
        }
        Value::Array(items) => items.iter_mut().for_each(integer),
        Value::Object(object) => integers(object),
        _ => {}
    }
}

/// Takes out what is not part of an event though some servers send it.
pub(super) fn strip(json: &mut Object) {
    json.remove("unsigned");
    json.remove("event_id");
}

/// The SHA-256 in `hashes` or in `hashes.lpdu`.
pub(super) fn sha256(hashes: Option<&Value>) -> Option<&str> {
    hashes.and_then(|hashes| hashes.get("sha256")).and_then(Value::as_str)
}
