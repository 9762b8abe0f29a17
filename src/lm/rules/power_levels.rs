//! Rule 9: changes of power levels. By the draft's section:
//! <https://www.ietf.org/archive/id/draft-ralston-mimi-linearized-matrix-04.html#int-auth-rules>

use ruma::UserId;
use serde_json::Value;

use super::levels::integer;
use super::{Judged, refuse, shown};
use crate::event::Object;
use crate::refusal::Refusal;

const FIELDS: [&str; 7] = ["users_default", "events_default", "state_default", "ban", "redact", "kick", "invite"];

/// `has` is the sender's level before the event.
pub(super) fn check(event: &Judged<'_>, has: i64) -> Result<(), Refusal> {
    let new = event.content;
    form(new)?;
    let Some(old) = event.before.power_levels else { return Ok(()) }; // rule 9.4
    for field in FIELDS {
        let (old, new) = (old.get(field), new.get(field));
        if old != new {
            not_above("9.5.1", field, "is", old, has)?;
            not_above("9.5.2", field, "would be", new, has)?;
        }
    }
    for (kind, old, new) in changes(old, new, "events") {
        not_above("9.6.1", kind, "needs", old, has)?;
        not_above("9.7.1", kind, "would need", new, has)?;
    }
    for (user, old, new) in changes(old, new, "users") {
        if user != event.sender.as_str() {
            not_above("9.8.1", user, "has", old, has)?;
        }
        not_above("9.9.1", user, "would have", new, has)?;
    }
    Ok(()) // rule 9.10
}

/// Rules 9.1 to 9.3.
fn form(content: &Object) -> Result<(), Refusal> {
    for field in FIELDS {
        let value = content.get(field);
        if value.is_some_and(|value| integer(value).is_none()) {
            return refuse("9.1", format!("{field} is {}, not an integer", shown(value)));
        }
    }
    for (rule, map) in [("9.2", "events"), ("9.3", "users")] {
        let value = content.get(map);
        let Some(entries) = value.map(Value::as_object) else { continue };
        let Some(entries) = entries else {
            return refuse(rule, format!("{map} is {}, not an object", shown(value)));
        };
        for (key, level) in entries {
            if integer(level).is_none() {
                return refuse(rule, format!("{map} gives {key:?} {}, not an integer", shown(Some(level))));
            }
            if map == "users" && <&UserId>::try_from(key.as_str()).is_err() {
                return refuse(rule, format!("users holds {key:?}, which is no user ID"));
            }
        }
    }
    Ok(())
}

/// The entries of a map that are not the same before and after.
fn changes<'a>(old: &'a Object, new: &'a Object, map: &str) -> Vec<(&'a str, Option<&'a Value>, Option<&'a Value>)> {
    let (old, new) = (old.get(map).and_then(Value::as_object), new.get(map).and_then(Value::as_object));
    let removed_or_changed =
        old.into_iter().flatten().map(|(key, value)| (key.as_str(), Some(value), new.and_then(|new| new.get(key))));
    let added = new
        .into_iter()
        .flatten()
        .filter(|(key, _)| old.is_none_or(|old| !old.contains_key(*key)))
        .map(|(key, value)| (key.as_str(), None, Some(value)));
    removed_or_changed.filter(|(_, old, new)| old != new).chain(added).collect()
}

fn not_above(rule: &'static str, what: &str, verb: &str, level: Option<&Value>, has: i64) -> Result<(), Refusal> {
    match level.and_then(integer) {
        Some(level) if level > has => refuse(rule, format!("{what} {verb} {level}, the sender has {has}")),
        _ => Ok(()),
    }
}
