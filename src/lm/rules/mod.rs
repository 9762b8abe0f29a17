//! The authorization rules of Linearized Matrix as a pure function: one event, what stood in the room before it, and the
//! answer. Rules carry the numbers of the draft's section "Auth Rules Algorithm":
//! <https://www.ietf.org/archive/id/draft-ralston-mimi-linearized-matrix-04.html#int-auth-rules>

mod hub;
mod levels;
mod member;
mod power_levels;
mod selection;
#[cfg(test)]
mod tests;

use ruma::{RoomId, ServerName, UserId};
use serde_json::Value;

pub use self::hub::HUB_EVENT;
pub use self::levels::{Action, Levels};
use self::selection::is_tolerated;
pub use self::selection::{Slot, selected_slots};
use crate::event::{Object, RoomVersion};
use crate::refusal::Refusal;

/// An event as the rules see it, with what is known of its signatures.
#[derive(Debug, Clone, Copy)]
pub struct Judged<'a> {
    /// The version of the room.
    pub version: RoomVersion,
    /// `room_id`
    pub room_id: &'a RoomId,
    /// `sender`
    pub sender: &'a UserId,
    /// `type`
    pub kind: &'a str,
    /// `state_key`
    pub state_key: Option<&'a str>,
    /// `content`
    pub content: &'a Object,
    /// Whether the sender's server's signature was checked and is right.
    pub signed_by_sender: bool,
    /// The same for the server in `hub_server`; none when there is no `hub_server`.
    pub signed_by_hub: Option<bool>,
    /// Of an event that hands the log over: whether the server that is to keep it has signed.
    pub signed_by_next_hub: bool,
    /// Whether it has any `prev_events`.
    pub has_prev_events: bool,
    /// What its `auth_events` are, in order.
    pub auth_events: &'a [Slot<'a>],
    /// The room before it.
    pub before: Before<'a>,
}

/// What the rules ask of the room's state before an event.
#[derive(Debug, Clone, Copy)]
pub struct Before<'a> {
    /// The sender of `m.room.create`; none in a room that has no event yet.
    pub creator: Option<&'a UserId>,
    /// Whether the event just before is `m.room.create`.
    pub follows_create: bool,
    /// The content of `m.room.power_levels`.
    pub power_levels: Option<&'a Object>,
    /// The content of `m.room.join_rules`.
    pub join_rules: Option<&'a Object>,
    /// `membership` of the sender; none is `leave`.
    pub sender_membership: Option<&'a str>,
    /// `membership` of the user in `state_key` of a member event; none is `leave`.
    pub target_membership: Option<&'a str>,
    /// The server that keeps the log; none where that cannot be told.
    pub hub: Option<&'a ServerName>,
    /// Whether that is so by an `m.room.hub`, not because its user made the room.
    pub was_handed_over: bool,
    /// Of an event that hands the log over: whether the server that it names has a user in the room.
    pub next_hub_is_in: bool,
}

impl<'a> Before<'a> {
    /// The levels that count before the event.
    pub fn levels(&self) -> Levels<'a> {
        Levels::new(self.power_levels, self.creator)
    }

    fn sender_membership(&self) -> &'a str {
        self.sender_membership.unwrap_or("leave")
    }

    fn target_membership(&self) -> &'a str {
        self.target_membership.unwrap_or("leave")
    }
}

/// Whether the rules allow the event; when not, which one forbids it and why. The order is the draft's:
/// <https://www.ietf.org/archive/id/draft-ralston-mimi-linearized-matrix-04.html#int-auth-rules>. Those about who keeps the log
/// are our own (`hub.rs`).
pub fn check(event: &Judged<'_>) -> Result<(), Refusal> {
    signatures(event)?;
    if event.kind == "m.room.create" {
        return create(event);
    }
    auth_events(event)?;
    hub::sender(event)?;
    if event.kind == "m.room.member" {
        return member::check(event);
    }
    let before = &event.before;
    let membership = before.sender_membership();
    if membership != "join" {
        return refuse("6", format!("the membership of {} is {membership}, not join", event.sender));
    }
    let levels = before.levels();
    let (has, needs) = (levels.of_user(event.sender), levels.to_send(event.kind, event.state_key));
    if needs > has {
        return refuse("7", format!("{} has power level {has}, {:?} needs {needs}", event.sender, event.kind));
    }
    if let Some(state_key) = event.state_key
        && state_key.starts_with('@')
        && state_key != event.sender.as_str()
    {
        return refuse("8", format!("the state key is {state_key:?}, the sender is {}", event.sender));
    }
    if event.kind == HUB_EVENT {
        return hub::check(event);
    }
    if event.kind == "m.room.power_levels" {
        return power_levels::check(event, has);
    }
    Ok(()) // rule 10
}

/// Rules 1 and 2: <https://www.ietf.org/archive/id/draft-ralston-mimi-linearized-matrix-04.html#int-auth-rules>
fn signatures(event: &Judged<'_>) -> Result<(), Refusal> {
    if !event.signed_by_sender {
        return refuse("1", format!("not signed by {}, the server of {}", event.sender.server_name(), event.sender));
    }
    if event.signed_by_hub == Some(false) {
        return refuse("2", "not signed by the server in hub_server");
    }
    Ok(())
}

/// Rule 3: <https://www.ietf.org/archive/id/draft-ralston-mimi-linearized-matrix-04.html#int-auth-rules>
fn create(event: &Judged<'_>) -> Result<(), Refusal> {
    if event.has_prev_events {
        return refuse("3.1", "m.room.create has prev_events");
    }
    let (room, sender) = (event.room_id.server_name(), event.sender.server_name());
    if room != Some(sender) {
        return refuse("3.2", format!("the room is {}, its creator {}", event.room_id, event.sender));
    }
    let (found, expected) = (event.content.get("room_version"), event.version.as_str());
    if found.and_then(Value::as_str) != Some(expected) {
        return refuse("3.3", format!("room_version is {}, not {expected:?}", shown(found)));
    }
    Ok(()) // rule 3.4
}

/// Rule 4: <https://www.ietf.org/archive/id/draft-ralston-mimi-linearized-matrix-04.html#int-auth-rules>
fn auth_events(event: &Judged<'_>) -> Result<(), Refusal> {
    for (index, slot) in event.auth_events.iter().enumerate() {
        if event.auth_events.iter().take(index).any(|earlier| earlier == slot) {
            return refuse("4.1", format!("auth_events hold two {slot}"));
        }
    }
    let selected = selected_slots(event.kind, event.sender, event.state_key, event.content);
    let is_too_much = |slot: &&Slot<'_>| !selected.contains(slot) && !is_tolerated(event.kind, event.content, slot);
    if let Some(slot) = event.auth_events.iter().find(is_too_much) {
        return refuse("4.2", format!("auth_events hold {slot}, which is not selected for {:?}", event.kind));
    }
    if !event.auth_events.iter().any(|slot| slot.kind == "m.room.create") {
        return refuse("4.3", "auth_events hold no m.room.create");
    }
    Ok(())
}

fn refuse(rule: &'static str, problem: impl Into<String>) -> Result<(), Refusal> {
    Err(Refusal::LmRule { rule, problem: problem.into() })
}

/// A value for a message: short, whatever a peer made of it.
fn shown(value: Option<&Value>) -> String {
    match value {
        None => "missing".to_owned(),
        Some(value) => value.to_string().chars().take(60).collect(),
    }
}
