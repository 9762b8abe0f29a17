//! The authorization rules of Linearized Matrix, written down once more and independently of the gateway's own, so that the
//! two can disagree.

use std::collections::BTreeMap;
use std::sync::Arc;

use isthmus::event::{Object, Pdu};
use ruma::UserId;
use serde_json::Value;

/// The current state of a room.
pub type State = BTreeMap<(String, String), Arc<Pdu>>;

/// What the rules look at.
pub struct Proposal<'a> {
    pub sender: &'a UserId,
    pub kind: &'a str,
    pub state_key: Option<&'a str>,
    pub content: &'a Object,
    /// Whether the event before it is `m.room.create`.
    pub after_create: bool,
}

/// The content of a state event.
pub fn content<'a>(state: &'a State, kind: &str, key: &str) -> Option<&'a Object> {
    state.get(&(kind.to_owned(), key.to_owned())).map(|event| event.content())
}

/// A user's membership; `leave` for those who never were there.
pub fn membership<'a>(state: &'a State, user: &str) -> &'a str {
    let member = content(state, "m.room.member", user);
    member.and_then(|content| content.get("membership")).and_then(Value::as_str).unwrap_or("leave")
}

/// Whether the proposal may be appended; the error says why not.
pub fn allowed(state: &State, event: &Proposal<'_>) -> Result<(), String> {
    if event.kind == "m.room.create" {
        return if state.is_empty() { Ok(()) } else { Err("the room is created already".to_owned()) };
    }
    let power = Power { state };
    if event.kind == "m.room.member" {
        return member(state, &power, event);
    }
    let sender = event.sender.as_str();
    demand(membership(state, sender) == "join", || format!("{sender} is not joined"))?;
    let (has, needs) = (power.of(sender), power.to_send(event.kind, event.state_key.is_some()));
    demand(has >= needs, || format!("{sender} has level {has}, {} needs {needs}", event.kind))?;
    if let Some(key) = event.state_key.filter(|key| key.starts_with('@')) {
        demand(key == sender, || format!("the state key {key} is not of {sender}"))?;
    }
    if event.kind == "m.room.power_levels" { power_levels(state, has, event) } else { Ok(()) }
}

fn demand(holds: bool, problem: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(problem()) }
}

fn member(state: &State, power: &Power<'_>, event: &Proposal<'_>) -> Result<(), String> {
    let target = event.state_key.ok_or("a membership without state key")?;
    let sender = event.sender.as_str();
    let (own, theirs) = (membership(state, sender), membership(state, target));
    let rule = content(state, "m.room.join_rules", "").and_then(|content| content.get("join_rule"));
    let rule = rule.and_then(Value::as_str).unwrap_or("invite");
    let is_self = sender == target;
    let may = |action: &str, default: i64| power.of(sender) >= power.action(action, default);
    let outranks = power.of(sender) > power.of(target);
    let wanted = event.content.get("membership").and_then(Value::as_str).unwrap_or_default();
    let why = || format!("{sender} ({own}) cannot make {target} ({theirs}) {wanted} in a room of join rule {rule}");
    let holds = match wanted {
        "join" if event.after_create => is_self && power.creator() == Some(sender),
        "join" => is_self && own != "ban" && (rule == "public" || matches!(own, "invite" | "join")),
        "invite" => own == "join" && !matches!(theirs, "join" | "ban") && may("invite", 0),
        "leave" if is_self => matches!(own, "knock" | "join" | "invite"),
        "leave" => own == "join" && (theirs != "ban" || may("ban", 50)) && may("kick", 50) && outranks,
        "ban" => own == "join" && may("ban", 50) && outranks,
        "knock" => is_self && rule == "knock" && !matches!(own, "ban" | "join"),
        _ => false,
    };
    demand(holds, why)
}

fn power_levels(state: &State, has: i64, event: &Proposal<'_>) -> Result<(), String> {
    let none = Object::new();
    let Some(old) = content(state, "m.room.power_levels", "") else { return Ok(()) };
    for key in ["users_default", "events_default", "state_default", "ban", "redact", "kick", "invite"] {
        change(key, old.get(key), event.content.get(key), has)?;
    }
    for map in ["events", "users"] {
        let [old, new] = [old, event.content].map(|levels| levels.get(map).and_then(Value::as_object).unwrap_or(&none));
        for key in old.keys().chain(new.keys().filter(|key| !old.contains_key(*key))) {
            if map == "users" && key == event.sender.as_str() {
                change(key, None, new.get(key), has)?;
            } else {
                change(key, old.get(key), new.get(key), has)?;
            }
        }
    }
    Ok(())
}

fn change(what: &str, old: Option<&Value>, new: Option<&Value>, has: i64) -> Result<(), String> {
    if old == new {
        return Ok(());
    }
    for value in [old, new].into_iter().flatten() {
        let level = value.as_i64().ok_or_else(|| format!("the level of {what} is {value}"))?;
        demand(level <= has, || format!("the level {level} of {what} is above the sender's {has}"))?;
    }
    Ok(())
}

/// Power levels as they are now.
struct Power<'a> {
    state: &'a State,
}

impl<'a> Power<'a> {
    fn levels(&self) -> Option<&'a Object> {
        content(self.state, "m.room.power_levels", "")
    }

    fn creator(&self) -> Option<&'a str> {
        let create = self.state.get(&("m.room.create".to_owned(), String::new()));
        create.map(|event| event.sender.as_str())
    }

    fn level(&self, path: &[&str]) -> Option<i64> {
        let mut levels = path.iter();
        let first = self.levels()?.get(*levels.next()?)?;
        levels.try_fold(first, |value, key| value.get(*key))?.as_i64()
    }

    fn of(&self, user: &str) -> i64 {
        if self.levels().is_none() {
            return if self.creator() == Some(user) { 100 } else { 0 };
        }
        self.level(&["users", user]).or_else(|| self.level(&["users_default"])).unwrap_or(0)
    }

    fn action(&self, action: &str, default: i64) -> i64 {
        self.level(&[action]).unwrap_or(default)
    }

    fn to_send(&self, kind: &str, is_state: bool) -> i64 {
        let (name, default) = if is_state { ("state_default", 50) } else { ("events_default", 0) };
        self.level(&["events", kind]).unwrap_or_else(|| self.action(name, default))
    }
}
