//! Power levels as the draft calculates them; integers only:
//! <https://www.ietf.org/archive/id/draft-ralston-mimi-linearized-matrix-04.html#int-calc-power-levels>

use ruma::UserId;
use serde_json::Value;

use super::hub::HUB_EVENT;
use crate::event::Object;

/// The level of a room's creator where there is no `m.room.power_levels`.
const CREATOR: i64 = 100;
/// The level that handing the log over to another server needs at least, where the room does not say: no state default that
/// was meant for names and topics lets anybody do that.
const HUB: i64 = 100;
/// The largest integer that every JSON parser keeps.
const LARGEST: i64 = (1 << 53) - 1;

/// An action that has a level of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// `invite`
    Invite,
    /// `kick`
    Kick,
    /// `ban`
    Ban,
    /// `redact`
    Redact,
}

impl Action {
    /// Its key in `m.room.power_levels`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Invite => "invite",
            Self::Kick => "kick",
            Self::Ban => "ban",
            Self::Redact => "redact",
        }
    }

    fn default_level(self) -> i64 {
        if self == Self::Invite { 0 } else { 50 }
    }
}

/// The levels of a room.
#[derive(Debug, Clone, Copy)]
pub struct Levels<'a> {
    content: Option<&'a Object>,
    creator: Option<&'a UserId>,
}

impl<'a> Levels<'a> {
    /// The levels that the content of `m.room.power_levels` gives, or those of a room without it.
    pub fn new(content: Option<&'a Object>, creator: Option<&'a UserId>) -> Self {
        Self { content, creator }
    }

    /// The level of a user.
    pub fn of_user(&self, user: &UserId) -> i64 {
        if self.content.is_none() {
            return if self.creator == Some(user) { CREATOR } else { 0 };
        }
        self.map_entry("users", user.as_str()).unwrap_or_else(|| self.of_nobody())
    }

    /// The level of a user that is not named.
    pub fn of_nobody(&self) -> i64 {
        self.field("users_default").unwrap_or(0)
    }

    /// The level that an action needs.
    pub fn to_do(&self, action: Action) -> i64 {
        self.field(action.as_str()).unwrap_or_else(|| action.default_level())
    }

    /// The level that sending an event needs.
    pub fn to_send(&self, kind: &str, state_key: Option<&str>) -> i64 {
        let (default, otherwise) = if state_key.is_some() { ("state_default", 50) } else { ("events_default", 0) };
        let or_default = || self.field(default).unwrap_or(otherwise);
        let unnamed = || if kind == HUB_EVENT { or_default().max(HUB) } else { or_default() };
        self.map_entry("events", kind).unwrap_or_else(unnamed)
    }

    fn field(&self, name: &str) -> Option<i64> {
        integer(self.content?.get(name)?)
    }

    fn map_entry(&self, map: &str, key: &str) -> Option<i64> {
        integer(self.content?.get(map)?.as_object()?.get(key)?)
    }
}

/// The value as an integer within ±(2^53−1). A string, a float or a larger number is none.
pub(super) fn integer(value: &Value) -> Option<i64> {
    value.as_i64().filter(|number| (-LARGEST..=LARGEST).contains(number))
}
