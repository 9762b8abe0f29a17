//! Rooms of the linear side: the log, the current state, which servers were in a room when, LPDUs on their way to a hub,
//! what is missing of foreign hubs' logs, what allows their state and stands nowhere in them, what was redacted, and complaints about
//! hubs.

mod blanks;
mod chains;
mod holes;
mod looks;
mod members;
mod read;
mod redactions;
mod staged;
mod tells;
mod write;

use ruma::{OwnedEventId, OwnedRoomId, OwnedServerName};

pub use self::blanks::{blanks, forget_blanks, forget_blanks_of, forget_named_blanks, note_blank, rooms_with_blanks};
pub use self::chains::{ChainBounds, OUTSIDE, chain_event, chain_of, forget_chain, keep_chain};
pub use self::holes::{
    Counts, Hole, Missing, Overflow, close_holes, close_overflow, count_holes, forget_holes, forget_holes_of_before,
    hasten_overflows, holes, missing, next_try, note_holes, put_off_holes, rooms_with_holes,
};
pub use self::looks::{
    Came, Fault, FaultRow, Faults, Look, TakenRow, faults, faults_since, forget_memberships, keep_look, looks,
    lost_since, lpdu_echoed, requeue_lpdu, rooms_of_hub, rooms_of_others, rooms_with_taken, take_lpdus, taken_lpdus,
    taken_since, waiting_lpdus,
};
pub use self::members::{member_events, members_before};
pub(in crate::store) use self::read::parsed;
pub use self::read::{
    Known, Stay, complaints, event, event_of_lpdu, events_by_id, known_of, lpdus_after, newest_lpdus,
    positions_of_lpdus, queued_lpdus, range, room, room_ids, rooms_with_lpdus, state_before, state_now,
    state_of_kind_before, stays, stood_before,
};
pub use self::redactions::{Asked, By, redact, redacted, redacted_now, target};
pub use self::staged::{
    Gap, Staged, bytes_of_other_gaps, close_gap, gap, note_newest, rooms_with_gaps, stage, staged, staged_of, unstage,
};
pub use self::tells::{
    Outsider, Tell, TellLimits, forget_tell, hasten_tells, hasten_tells_to, keep_tell, next_tell, put_off_tell,
    tells_due,
};
pub use self::write::{
    advance_head, append, complain, forget_lpdus, forget_servers, insert_room, is_hub, is_kept_here, queue_lpdu,
    replace_state, server_joined, server_left, set_hub, set_redaction, set_state, withdraw_lpdu,
};
use crate::event::{Redaction, RoomVersion};

/// A room as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoomRow {
    /// The room.
    pub room_id: OwnedRoomId,
    /// Its version.
    pub version: RoomVersion,
    /// The server that keeps its log.
    pub hub: OwnedServerName,
    /// The table of redaction that the hub uses.
    pub redaction: Redaction,
    /// Whether the room is a graph too, from which the log follows.
    pub shared: bool,
    /// The last position.
    pub head: i64,
}

/// An event on its way into a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewEvent {
    /// Its place.
    pub position: i64,
    /// Its ID.
    pub event_id: OwnedEventId,
    /// The ID of the LPDU that it was made of.
    pub lpdu_id: Option<OwnedEventId>,
    /// Type and state key of a state event.
    pub state: Option<(String, String)>,
    /// The event as it goes over the wire.
    pub json: Vec<u8>,
}

/// An event of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventRow {
    /// The room.
    pub room_id: OwnedRoomId,
    /// Its place; [`OUTSIDE`] when it has none.
    pub position: i64,
    /// Its ID.
    pub event_id: OwnedEventId,
    /// The event as it goes over the wire.
    pub json: Vec<u8>,
}

/// An LPDU that waits for the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LpduRow {
    /// Its place in the feed of the room's LPDUs.
    pub position: i64,
    /// Its ID.
    pub lpdu_id: OwnedEventId,
    /// The LPDU as it goes over the wire.
    pub json: Vec<u8>,
}

/// A complaint about an event that the hub sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Complaint {
    /// The event.
    pub event_id: OwnedEventId,
    /// What is wrong with it.
    pub problem: String,
    /// Whether the event is refused for good; otherwise it may come again and be right.
    pub settled: bool,
    /// What fault of the hub it is, if it is one.
    pub fault: Option<Fault>,
}

fn redaction_name(redaction: Redaction) -> &'static str {
    match redaction {
        Redaction::Draft => "draft",
        Redaction::GraphServer => "graph",
    }
}

#[cfg(test)]
mod tests;
