//! Which events of the current state an event names as its `auth_events`:
//! <https://www.ietf.org/archive/id/draft-ralston-mimi-linearized-matrix-04.html#int-auth-selection>

use ruma::UserId;
use serde_json::Value;

use super::hub::HUB_EVENT;
use crate::event::Object;

/// A place in a room's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot<'a> {
    /// The event type.
    pub kind: &'a str,
    /// The state key.
    pub state_key: &'a str,
}

impl std::fmt::Display for Slot<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{:?} with state key {:?}", self.kind, self.state_key)
    }
}

/// The places whose events allow an event, in the order of the draft: create, power levels, the sender's member, the
/// target's member, join rules. Those that are empty in the current state are left out of `auth_events`. A change of the hub
/// names the one before it as well, so that who comes later can follow them back to the room's creator.
pub fn selected_slots<'a>(
    kind: &'a str,
    sender: &'a UserId,
    state_key: Option<&'a str>,
    content: &Object,
) -> Vec<Slot<'a>> {
    if kind == "m.room.create" {
        return Vec::new();
    }
    let slot = |kind, state_key| Slot { kind, state_key };
    let mut slots =
        vec![slot("m.room.create", ""), slot("m.room.power_levels", ""), slot("m.room.member", sender.as_str())];
    if kind == HUB_EVENT {
        slots.push(slot(HUB_EVENT, ""));
    }
    if kind == "m.room.member" {
        if let Some(target) = state_key.filter(|target| *target != sender.as_str()) {
            slots.push(slot("m.room.member", target));
        }
        if matches!(content.get("membership").and_then(Value::as_str), Some("join" | "invite")) {
            slots.push(slot("m.room.join_rules", ""));
        }
    }
    slots
}

/// Whether an event may name this place too: what decides of a knock are the join rules, which the draft's list has for joins and
/// invites alone. There are hubs that name them, as in Matrix.
pub(super) fn is_tolerated(kind: &str, content: &Object, slot: &Slot<'_>) -> bool {
    let knock = kind == "m.room.member" && content.get("membership").and_then(Value::as_str) == Some("knock");
    knock && *slot == Slot { kind: "m.room.join_rules", state_key: "" }
}
