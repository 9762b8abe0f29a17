//! How much state a room may have whose log another server keeps: all of it is in memory while the room is in use, and its hub
//! can make as much of it as it likes.

use super::join_check::is_deciding;
use super::room::Snapshot;
use crate::event::Pdu;
use crate::refusal::Refusal;

/// How many places the state of such a room may have: twice the members of the largest public rooms.
const SLOTS: usize = 200_000;
/// How many bytes its events may have.
pub(super) const BYTES: usize = 128 << 20;
/// How large a change of a membership may be that is taken all the same, so that who is in can be removed.
const CHANGE: usize = 2048;

/// How much the state of a room is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Weight {
    /// Its places.
    pub slots: usize,
    /// The bytes of its events.
    pub bytes: usize,
}

impl Weight {
    /// With one event more, of so many bytes, in a place of its own.
    pub fn with(self, bytes: usize) -> Self {
        Self { slots: self.slots.saturating_add(1), bytes: self.bytes.saturating_add(bytes) }
    }

    /// Whether that is too much.
    pub fn check(self) -> Result<(), Refusal> {
        if self.slots > SLOTS {
            return Err(Refusal::TooManyEvents { what: "state of a room that another server keeps", limit: SLOTS });
        }
        if self.bytes > BYTES {
            let what = "the state of a room that another server keeps";
            return Err(Refusal::TooLarge { what, size: self.bytes, limit: BYTES });
        }
        Ok(())
    }
}

impl Snapshot {
    /// How much the state is after this event.
    pub fn weight_after(&self, pdu: &Pdu) -> Weight {
        let Some(state_key) = &pdu.state_key else { return self.weight };
        let new = pdu.to_bytes().len();
        match self.state_event(&pdu.kind, state_key) {
            Some(old) => Weight {
                bytes: self.weight.bytes.saturating_sub(old.to_bytes().len()).saturating_add(new),
                ..self.weight
            },
            None => self.weight.with(new),
        }
    }

    /// Whether there is room for this event in the state. What the rules go by is always taken.
    pub fn has_room_for(&self, pdu: &Pdu) -> Result<(), Refusal> {
        let after = self.weight_after(pdu);
        let is_new = after.slots > self.weight.slots;
        if pdu.state_key.is_none() || is_deciding(pdu) || (!is_new && after.bytes <= self.weight.bytes) {
            return Ok(());
        }
        if !is_new && pdu.kind == "m.room.member" && pdu.to_bytes().len() <= CHANGE {
            return Ok(());
        }
        after.check()
    }
}

#[cfg(test)]
pub(super) const FULL: Weight = Weight { slots: SLOTS, bytes: 1 };

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_much_is_named() {
        assert_eq!(FULL.check(), Ok(()));
        let many = FULL.with(1).check().unwrap_err();
        assert_eq!((many.code(), many.to_string().contains("200000")), ("too_many_events", true), "{many}");
        let large = Weight { slots: 1, bytes: BYTES }.with(1).check().unwrap_err();
        assert_eq!(large.code(), "too_large");
    }
}
