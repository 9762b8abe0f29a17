//! The content of message-like events: it crosses as it is, with the IDs and the names of files in it mapped, keys of the gateway's own stripped,
//! and numbers that Matrix cannot hold written as strings.

use std::collections::{BTreeSet, HashMap};

use percent_encoding::percent_decode_str;
use ruma::{OwnedEventId, OwnedUserId, UserId};
use serde_json::{Number, Value};

use super::{Lookups, References, across};
use crate::bridge::side::Event;
use crate::event::{Object, event_id};
use crate::refusal::Refusal;

/// What keys and types of the gateway's own begin with.
pub(in crate::bridge) const OWN_PREFIX: &str = "im.isthmus.";
const RELATES_TO: &str = "m.relates_to";
const IN_REPLY_TO: &str = "m.in_reply_to";
/// What a reply says first when what it replies to is not there.
const REPLY_FALLBACK: &str = "(in reply to a message that is not in this room)";
/// How many users and events that a content names are looked up; what is named beyond that stays as it is, and is not
/// mentioned across.
pub(super) const MOST_NAMED: usize = 100;
const LINK: &str = "https://matrix.to/#/";
/// The largest integer that both sides can hold.
const LARGEST: i64 = (1 << 53) - 1;

/// Adds what `content` names to `references`.
pub(super) fn collect(content: &Object, references: &mut References) {
    let relation = content.get(RELATES_TO);
    for id in [relation.and_then(target), relation.and_then(reply)].into_iter().flatten() {
        references.needs.push(id.clone());
    }
    let mut named = Named { users: BTreeSet::new(), events: BTreeSet::new() };
    collect_object(content, &mut named);
    references.users.extend(named.users);
    references.events.extend(named.events);
}

/// What a content names, as far as it is looked at.
struct Named {
    users: BTreeSet<OwnedUserId>,
    events: BTreeSet<OwnedEventId>,
}

impl Named {
    fn is_full(&self) -> bool {
        self.users.len().saturating_add(self.events.len()) >= MOST_NAMED
    }

    fn user(&mut self, user: &str) {
        if !self.is_full() {
            self.users.extend(UserId::parse(user).ok());
        }
    }

    fn event(&mut self, event: &str) {
        if !self.is_full() {
            self.events.extend(event_id(event));
        }
    }
}

fn collect_object(object: &Object, references: &mut Named) {
    for (key, value) in object {
        if references.is_full() {
            return;
        }
        match (key.as_str(), value) {
            ("user_id", Value::String(user)) => references.user(user),
            ("user_ids", Value::Array(users)) => {
                users.iter().filter_map(Value::as_str).for_each(|user| references.user(user));
            }
            ("event_id", Value::String(event)) => references.event(event),
            ("body" | "formatted_body", Value::String(text)) => {
                map_links(text, |link| {
                    match link {
                        Link::User(user) => references.user(user),
                        Link::Event(event) => references.event(event),
                        Link::Room(_) => {}
                    }
                    None
                });
            }
            (_, Value::Object(inner)) => collect_object(inner, references),
            (_, Value::Array(items)) => {
                for item in items.iter().filter_map(Value::as_object) {
                    collect_object(item, references);
                }
            }
            _ => {}
        }
    }
}

/// The content across, and a note of what was left out.
pub(super) fn translate(event: &Event, lookups: &Lookups<'_>) -> Result<(Object, Option<String>), Refusal> {
    let mut content = map_object(&event.content, lookups);
    let Some(relation) = event.content.get(RELATES_TO) else { return Ok((content, None)) };
    let known = |id: &OwnedEventId| lookups.events.contains_key(id);
    let mut lost = Vec::new();
    if let Some(target) = target(relation).filter(|target| !known(target)) {
        let kind = relation.get("rel_type").and_then(Value::as_str).unwrap_or("relation");
        let text = event.content.get("body").is_some_and(Value::is_string);
        if kind == "m.annotation" || !text {
            // Without what it is about it says nothing.
            return Err(Refusal::NotBridged(format!("the {kind} of {target}, which has not crossed,")));
        }
        content.remove(RELATES_TO);
        content.remove("m.new_content");
        lost.push(format!("{kind} of {target}"));
    }
    if let Some(replied) = reply(relation).filter(|replied| !known(replied)) {
        if let Some(relation) = content.get_mut(RELATES_TO).and_then(Value::as_object_mut) {
            relation.remove(IN_REPLY_TO);
            relation.remove("is_falling_back");
            if relation.is_empty() {
                content.remove(RELATES_TO);
            }
        }
        if relation.get("is_falling_back") != Some(&Value::Bool(true)) {
            add_fallback(&mut content);
        }
        lost.push(format!("reply to {replied}"));
    }
    let note = (!lost.is_empty()).then(|| format!("left out, not known across: {}", lost.join(", ")));
    Ok((content, note))
}

fn add_fallback(content: &mut Object) {
    for (key, between) in [("body", "\n"), ("formatted_body", "<br>")] {
        if let Some(Value::String(text)) = content.get_mut(key) {
            *text = format!("{REPLY_FALLBACK}{between}{text}");
        }
    }
}

fn target(relation: &Value) -> Option<OwnedEventId> {
    event_id(relation.get("event_id")?.as_str()?)
}

fn reply(relation: &Value) -> Option<OwnedEventId> {
    event_id(relation.get(IN_REPLY_TO)?.get("event_id")?.as_str()?)
}

fn map_object(object: &Object, lookups: &Lookups<'_>) -> Object {
    let mut mapped = Object::new();
    for (key, value) in object {
        if key.starts_with(OWN_PREFIX) {
            continue;
        }
        let value = match (key.as_str(), value) {
            ("user_id", Value::String(user)) => map_user(user, lookups).unwrap_or_else(|| user.clone()).into(),
            // Somebody who is nobody across cannot be mentioned there.
            ("user_ids", Value::Array(users)) => {
                users.iter().filter_map(Value::as_str).filter_map(|user| map_user(user, lookups)).collect()
            }
            ("event_id", Value::String(event)) => {
                map_event(event, lookups.events).unwrap_or_else(|| event.clone()).into()
            }
            ("room_id", Value::String(room)) if room == lookups.rooms.0.as_str() => lookups.rooms.1.as_str().into(),
            ("body" | "formatted_body", Value::String(text)) => {
                let text = map_links(text, |link| match link {
                    Link::User(user) => map_user(user, lookups),
                    Link::Event(event) => map_event(event, lookups.events),
                    Link::Room(room) => (room == lookups.rooms.0.as_str()).then(|| lookups.rooms.1.to_string()),
                });
                let html = key == "formatted_body" || object.get("mimetype").is_some_and(|kind| kind == "text/html");
                if html { lookups.media.html(&text) } else { text }.into()
            }
            (_, value) => map_value(value, lookups),
        };
        mapped.insert(key.clone(), value);
    }
    mapped
}

fn map_value(value: &Value, lookups: &Lookups<'_>) -> Value {
    match value {
        Value::Object(object) => Value::Object(map_object(object, lookups)),
        Value::Array(items) => items.iter().map(|item| map_value(item, lookups)).collect(),
        Value::Number(number) => map_number(number),
        Value::String(text) => lookups.media.uri(text).into(),
        other => other.clone(),
    }
}

/// An integer that both sides can hold stays one; any other number becomes a string.
fn map_number(number: &Number) -> Value {
    if let Some(integer) = number.as_i64().filter(|integer| (-LARGEST..=LARGEST).contains(integer)) {
        return integer.into();
    }
    let Some(float) = number.as_f64().filter(|float| float.is_finite()) else { return number.to_string().into() };
    #[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)]
    if number.is_f64() && float.fract() == 0.0 && float.abs() <= LARGEST as f64 {
        // In canonical JSON of the LM side 1.0 and 1 are the same text.
        return (float as i64).into();
    }
    match number.is_f64() {
        true => ryu_js::Buffer::new().format(float).into(),
        false => number.to_string().into(),
    }
}

fn map_user(user: &str, lookups: &Lookups<'_>) -> Option<String> {
    let user = <&UserId>::try_from(user).ok()?;
    across(lookups.users, user).map(String::from)
}

fn map_event(event: &str, events: &HashMap<OwnedEventId, OwnedEventId>) -> Option<String> {
    events.get(&event_id(event)?).map(ToString::to_string)
}

/// One ID in a link.
#[derive(Debug, PartialEq, Eq)]
enum Link<'a> {
    User(&'a str),
    Room(&'a str),
    Event(&'a str),
}

/// The text with the IDs in its matrix.to links replaced by what `map` answers.
fn map_links(text: &str, mut map: impl FnMut(Link<'_>) -> Option<String>) -> String {
    let mut mapped = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(LINK) {
        mapped.push_str(before);
        mapped.push_str(LINK);
        let end = after.find(|c: char| c.is_whitespace() || "\"'<>()[]&?".contains(c)).unwrap_or(after.len());
        let (path, following) = after.split_at_checked(end).unwrap_or((after, ""));
        let parts: Vec<String> = path
            .split('/')
            .map(|part| {
                let decoded = percent_decode_str(part).decode_utf8_lossy();
                let link = match decoded.chars().next() {
                    Some('@') => Link::User(&decoded),
                    Some('!') => Link::Room(&decoded),
                    Some('$') => Link::Event(&decoded),
                    _ => return part.to_owned(),
                };
                map(link).unwrap_or_else(|| part.to_owned())
            })
            .collect();
        mapped.push_str(&parts.join("/"));
        rest = following;
    }
    mapped.push_str(rest);
    mapped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_mapped_wherever_they_end() {
        let map = |link: Link<'_>| match link {
            Link::User(user) => Some(format!("<{user}>")),
            Link::Room(_) => None,
            Link::Event(_) => Some("$far".to_owned()),
        };
        for (text, expected) in [
            ("no link", "no link"),
            ("https://matrix.to/#/", "https://matrix.to/#/"),
            ("a https://matrix.to/#/@b:c d", "a https://matrix.to/#/<@b:c> d"),
            (
                "<a href=\"https://matrix.to/#/%40b%3Ac?via=x\">b</a>",
                "<a href=\"https://matrix.to/#/<@b:c>?via=x\">b</a>",
            ),
            ("(https://matrix.to/#/!r:s/$e?via=s)", "(https://matrix.to/#/!r:s/$far?via=s)"),
            ("https://matrix.to/#/é", "https://matrix.to/#/é"),
            ("https://matrix.to/#/#alias:s", "https://matrix.to/#/#alias:s"),
        ] {
            assert_eq!(map_links(text, map), expected);
        }
    }

    #[test]
    fn hc_14_numbers_become_what_matrix_can_hold() {
        for (number, expected) in [
            ("1", "1"),
            ("-9007199254740991", "-9007199254740991"),
            ("9007199254740992", "\"9007199254740992\""),
            ("18446744073709551615", "\"18446744073709551615\""),
            ("1.5", "\"1.5\""),
            ("1e3", "1000"),
            ("1e300", "\"1e+300\""),
            ("-0.0", "0"),
        ] {
            let number: Value = serde_json::from_str(number).unwrap();
            assert_eq!(map_number(number.as_number().unwrap()).to_string(), expected);
        }
    }
}
