//! What is looked at in every event that a hub sends, one property at a time, so that each can fail alone.

use std::collections::{BTreeMap, BTreeSet};

use ruma::{ServerName, UserId};
use serde_json::Value;

use super::ear::lock;
use super::report::{Outcome, ensure, fail, skip};
use super::session::{Session, id_of, mark_of, pushed};
use crate::event::{Object, Redaction, canonical_json, content_hash, lpdu_hash, redact};

/// The keys that redaction keeps: those of the LPDUs of the suite, and those that a hub adds.
const TOP_LEVEL: [&str; 11] = [
    "auth_events",
    "content",
    "hashes",
    "hub_server",
    "origin_server_ts",
    "prev_events",
    "room_id",
    "sender",
    "signatures",
    "state_key",
    "type",
];

/// Every event of the room that the hub has sent to the suite's first server, each once, without those that should never have been taken:
/// other checks tell of them.
pub(super) fn heard(session: &Session) -> Result<Vec<Value>, super::Unmet> {
    session.joined()?;
    let bad = lock(&session.notes).bad.clone();
    let arrivals = session.ear.arrivals();
    let mut seen = BTreeSet::new();
    let events: Vec<Value> = pushed(&arrivals, &session.first)
        .map(|(_, event)| event)
        .filter(|event| !mark_of(event).is_some_and(|mark| bad.contains(mark)))
        .filter(|event| seen.insert(id_of(event)))
        .cloned()
        .collect();
    if events.is_empty() { Err(skip("the hub has sent nothing")) } else { Ok(events) }
}

/// What is wrong with an event in one regard.
pub(super) type Property = fn(&Value) -> Option<String>;

/// Passes when `property` finds nothing wrong with any event.
pub(super) fn all(session: &Session, expected: &str, property: Property) -> Outcome {
    for event in heard(session)? {
        if let Some(problem) = property(&event) {
            return Err(fail(expected, format!("{problem}: {event}")));
        }
    }
    Ok(())
}

fn text<'a>(event: &'a Value, field: &str) -> &'a str {
    event.get(field).and_then(Value::as_str).unwrap_or_default()
}

/// The required fields, and what each is.
pub(super) fn form(event: &Value) -> Option<String> {
    let is = |field: &str, kind: fn(&Value) -> bool| event.get(field).is_some_and(kind);
    for field in ["room_id", "type", "sender"] {
        if !is(field, Value::is_string) {
            return Some(format!("{field} is no string"));
        }
    }
    for field in ["state_key", "hub_server"] {
        if event.get(field).is_some_and(|value| !value.is_string()) {
            return Some(format!("{field} is no string"));
        }
    }
    for field in ["content", "hashes", "signatures"] {
        if !is(field, Value::is_object) {
            return Some(format!("{field} is no object"));
        }
    }
    for field in ["auth_events", "prev_events"] {
        let ids = |value: &Value| value.as_array().is_some_and(|ids| ids.iter().all(Value::is_string));
        if !is(field, ids) {
            return Some(format!("{field} is no array of strings"));
        }
    }
    (!is("origin_server_ts", Value::is_i64)).then(|| "origin_server_ts is no integer".to_owned())
}

/// Identifiers and lengths.
pub(super) fn grammar(event: &Value) -> Option<String> {
    let (room, sender) = (text(event, "room_id"), text(event, "sender"));
    if !room.starts_with('!') || room.len() > 255 {
        return Some("the room ID".to_owned());
    }
    if <&UserId>::try_from(sender).is_err() || sender.len() > 255 {
        return Some("the sender".to_owned());
    }
    if text(event, "type").chars().count() > 255 || text(event, "state_key").chars().count() > 255 {
        return Some("the length of the type or the state key".to_owned());
    }
    event
        .get("hub_server")
        .and_then(Value::as_str)
        .filter(|hub| <&ServerName>::try_from(*hub).is_err())
        .map(str::to_owned)
}

/// Nothing of a graph's event at the top.
pub(super) fn no_more(event: &Value) -> Option<String> {
    let keys = event.as_object().into_iter().flat_map(Object::keys);
    keys.filter(|key| ["depth", "origin", "event_id"].contains(&key.as_str()))
        .map(|key| format!("{key} is there"))
        .next()
}

/// Only keys that the schema has, of which `unsigned` is none either, in the events of the suite's own users, whose LPDUs have no others. An
/// event may have more than the schema asks for: that is for whoever makes it to say, and not for a hub to add.
pub(super) fn nothing_added(session: &Session) -> Outcome {
    let ours = |event: &Value| {
        let server = text(event, "sender").split_once(':').map_or("", |(_, server)| server);
        session.first.name == server || session.second.as_ref().is_some_and(|second| second.name == server)
    };
    let heard = heard(session)?;
    if !heard.iter().any(ours) {
        return Err(skip("the hub has sent nothing that the suite's users said"));
    }
    for event in heard.iter().filter(|event| ours(event)) {
        let mut keys = event.as_object().into_iter().flat_map(Object::keys);
        let stray = keys.find(|key| !TOP_LEVEL.contains(&key.as_str()) && *key != "unsigned");
        ensure(stray.is_none(), "nothing that was not in the LPDU but what a hub adds", || {
            format!("{stray:?}: {event}")
        })?;
    }
    Ok(())
}

/// The size as canonical JSON.
pub(super) fn size(event: &Value) -> Option<String> {
    let size = event.as_object().map(canonical_json).map_or(0, |bytes| bytes.len());
    (size > 65_536).then(|| format!("it has {size} bytes"))
}

/// The hash of the whole.
pub(super) fn whole_hash(event: &Value) -> Option<String> {
    let expected = content_hash(event.as_object()?);
    let found = event.pointer("/hashes/sha256").and_then(Value::as_str).unwrap_or_default();
    (found != expected && !is_redacted(event)).then(|| format!("hashes.sha256 is {found:?}, computed was {expected:?}"))
}

/// The hash of the LPDU inside.
pub(super) fn inner_hash(event: &Value) -> Option<String> {
    event.get("hub_server")?;
    let expected = lpdu_hash(event.as_object()?);
    let found = event.pointer("/hashes/lpdu/sha256").and_then(Value::as_str).unwrap_or_default();
    (found != expected && !is_redacted(event))
        .then(|| format!("hashes.lpdu.sha256 is {found:?}, computed was {expected:?}"))
}

/// No LPDU's hash where there is no LPDU, in what the hub has sent and in the state that it gave with the join.
pub(super) fn no_stray_hash(session: &Session) -> Outcome {
    let joined = session.joined()?;
    let given = joined.get("state").and_then(Value::as_array).into_iter().flatten().cloned();
    let mut own = heard(session)?.into_iter().chain(given).filter(|event| event.get("hub_server").is_none()).peekable();
    if own.peek().is_none() {
        return Err(skip("each event that it gives has hub_server"));
    }
    match own.find(|event| event.pointer("/hashes/lpdu").is_some()) {
        Some(event) => Err(fail("no hashes.lpdu", format!("hashes.lpdu without hub_server: {event}"))),
        None => Ok(()),
    }
}

/// One event before it.
pub(super) fn one_before(event: &Value) -> Option<String> {
    let count = event.get("prev_events").and_then(Value::as_array).map_or(0, Vec::len);
    (count != 1).then(|| format!("{count} prev_events"))
}

fn is_redacted(event: &Value) -> bool {
    event.as_object().is_some_and(|event| redact(event, Redaction::Draft) == *event)
}

/// The hub's name in what participants sent; the hub's own events may leave it out.
pub(super) fn hub_named(session: &Session) -> Outcome {
    for event in heard(session)? {
        let own = text(&event, "sender").ends_with(&format!(":{}", session.target));
        let hub = event.get("hub_server").and_then(Value::as_str);
        let good = hub == Some(session.target.as_str()) || (own && hub.is_none());
        ensure(good, format!("hub_server is {}", session.target), || format!("{hub:?} in {event}"))?;
    }
    Ok(())
}

/// Whose signature is looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Signer {
    Hub,
    Sender,
    /// The server of the user whom a member event is about.
    Target,
}

/// The hub's signature over the event, or the sender's server's over the LPDU inside (over the event, where there is none).
pub(super) async fn signatures(session: &Session, signer: Signer) -> Outcome {
    for event in heard(session)? {
        if let Some(problem) = signature_problem(session, &event, signer).await {
            let whose = if signer == Signer::Hub { "the hub" } else { "the sender's server" };
            return Err(fail(format!("each event is signed by {whose}"), format!("{problem}: {event}")));
        }
    }
    Ok(())
}

/// What is wrong with a signature.
pub(super) async fn signature_problem(session: &Session, event: &Value, signer: Signer) -> Option<String> {
    let sender = text(event, "sender").split_once(':').map(|(_, server)| server.to_owned())?;
    let inside = event.get("hub_server").is_some();
    let server = match signer {
        Signer::Hub if !inside && sender != session.target => return None,
        // Whoever was the hub at the time has signed.
        Signer::Hub if inside && session.was_handed_over() => text(event, "hub_server").to_owned(),
        Signer::Hub => session.target.to_string(),
        Signer::Sender => sender,
        Signer::Target => text(event, "state_key").split_once(':')?.1.to_owned(),
    };
    let name = <&ServerName>::try_from(server.as_str()).ok()?;
    // What cannot be had of another server is nobody's mistake that could be seen from here.
    let Some(keys) = session.keys_of(name).await else {
        return (*name == session.target).then(|| format!("the keys of {server} cannot be had"));
    };
    let mut signed = redact(event.as_object()?, Redaction::Draft);
    signed.remove("signatures");
    if signer == Signer::Sender && inside {
        signed.remove("auth_events");
        signed.remove("prev_events");
        let lpdu = event.pointer("/hashes/lpdu").cloned().unwrap_or_default();
        signed.insert("hashes".to_owned(), serde_json::json!({ "lpdu": lpdu }));
    }
    let message = canonical_json(&signed);
    let signatures = event.get("signatures").and_then(|all| all.get(&server)).and_then(Value::as_object);
    let Some(signatures) = signatures else { return Some(format!("no signature of {server}")) };
    let mut known = 0_usize;
    for (id, signature) in signatures {
        let Some(key) = keys.get(id) else { continue };
        known = known.saturating_add(1);
        if let Err(problem) = key.verify(&message, signature.as_str().unwrap_or_default()) {
            return Some(format!("the signature of {server} with {id} {problem}"));
        }
    }
    (known == 0).then(|| format!("{server} signed with none of its keys"))
}

/// Each event follows the one that was sent before it.
pub(super) fn chain(session: &Session) -> Outcome {
    let joined = session.joined()?;
    heard(session)?;
    let bad = lock(&session.notes).bad.clone();
    let arrivals = session.ear.arrivals();
    let mut before = joined.get("event").map(id_of).unwrap_or_default();
    let mut seen = BTreeSet::from([before.clone()]);
    let mut broken = false;
    for (_, event) in pushed(&arrivals, &session.first) {
        let id = id_of(event);
        if !seen.insert(id.clone()) {
            continue;
        }
        // Who takes what it must not breaks the chain too, which is not counted twice.
        if mark_of(event).is_some_and(|mark| bad.contains(mark)) {
            broken = true;
            continue;
        }
        let prev = event.get("prev_events").and_then(Value::as_array).cloned().unwrap_or_default();
        if prev.len() == 1 {
            let good = prev.first().and_then(Value::as_str) == Some(before.as_str()) || broken;
            ensure(good, format!("the event follows {before}, the last one that was sent"), || event)?;
        }
        broken = false;
        before = id;
    }
    Ok(())
}

/// Nothing is sent twice under different transaction IDs.
pub(super) fn no_repeats(session: &Session) -> Outcome {
    heard(session)?;
    let arrivals = session.ear.arrivals();
    let mut seen: BTreeMap<String, String> = BTreeMap::new();
    for (arrival, event) in pushed(&arrivals, &session.first) {
        let (id, txn) = (id_of(event), arrival.segments.first().cloned().unwrap_or_default());
        let before = seen.insert(id, txn.clone());
        ensure(before.as_ref().is_none_or(|before| *before == txn), "each event is sent once", || {
            format!("in the transactions {before:?} and {txn}: {event}")
        })?;
    }
    Ok(())
}

type State = BTreeMap<(String, String), Value>;

/// The events that the draft's selection names for an event, with the state before it.
fn selection(state: &State, event: &Value) -> BTreeSet<String> {
    let sender = text(event, "sender").to_owned();
    let mut slots =
        vec![("m.room.create", String::new()), ("m.room.power_levels", String::new()), ("m.room.member", sender)];
    if text(event, "type") == "m.room.member" {
        slots.push(("m.room.member", text(event, "state_key").to_owned()));
        if matches!(event.pointer("/content/membership").and_then(Value::as_str), Some("join" | "invite")) {
            slots.push(("m.room.join_rules", String::new()));
        }
    }
    slots.into_iter().filter_map(|(kind, key)| state.get(&(kind.to_owned(), key))).map(id_of).collect()
}

fn apply(state: &mut State, event: &Value) {
    if let Some(key) = event.get("state_key").and_then(Value::as_str) {
        state.insert((text(event, "type").to_owned(), key.to_owned()), event.clone());
    }
}

/// The state of an answer.
pub(super) fn state_of(events: &Value) -> State {
    let mut state = State::new();
    for event in events.as_array().into_iter().flatten() {
        apply(&mut state, event);
    }
    state
}

/// Each event names exactly the events that the selection has for it.
pub(super) fn auth_events(session: &Session) -> Outcome {
    let joined = session.joined()?;
    let mut state = state_of(joined.get("state").unwrap_or(&Value::Null));
    let own = joined.get("event").cloned();
    let mut seen = BTreeSet::new();
    for event in own.into_iter().chain(heard(session)?) {
        // A hub may send the joining server its join, too.
        if !seen.insert(id_of(&event)) {
            continue;
        }
        let named: Vec<&str> = event
            .get("auth_events")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let found: BTreeSet<String> = named.iter().map(|id| (*id).to_owned()).collect();
        let expected = selection(&state, &event);
        ensure(found == expected && found.len() == named.len(), format!("auth_events are {expected:?}"), || &event)?;
        apply(&mut state, &event);
    }
    Ok(())
}

/// What is wrong with a list of events that an answer holds: with the form, the hashes or the signatures of one.
pub(super) async fn list_problem(session: &Session, events: Option<&Value>) -> Option<String> {
    let Some(events) = events.and_then(Value::as_array) else { return Some("no array of events".to_owned()) };
    if events.is_empty() {
        return Some("there are no events".to_owned());
    }
    for event in events {
        let found = form(event).or_else(|| whole_hash(event)).or_else(|| inner_hash(event));
        if let Some(problem) = found {
            return Some(format!("{problem}: {event}"));
        }
        for signer in [Signer::Hub, Signer::Sender] {
            if let Some(problem) = signature_problem(session, event, signer).await {
                return Some(format!("{problem}: {event}"));
            }
        }
    }
    None
}

/// Whether `chain` has every event that `events` and itself are allowed by.
pub(super) fn is_closed(events: Option<&Value>, chain: Option<&Value>) -> Option<String> {
    let list = |value: Option<&Value>| value.and_then(Value::as_array).cloned().unwrap_or_default();
    let (events, chain) = (list(events), list(chain));
    if events.is_empty() {
        return Some("there are no events".to_owned());
    }
    let there: BTreeSet<String> = chain.iter().map(id_of).collect();
    for event in events.iter().chain(&chain) {
        for id in event.get("auth_events").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str) {
            if !there.contains(id) {
                return Some(format!("{id}, by which {} is allowed, is missing", id_of(event)));
            }
        }
    }
    None
}
