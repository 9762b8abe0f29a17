//! Events that are stored: with what was found of them, and with the state groups before and after.

use std::sync::{Arc, OnceLock};

use ruma::events::TimelineEventType;
use ruma::state_res::Event;
use ruma::{MilliSecondsSinceUnixEpoch, OwnedEventId, RoomId, UInt, UserId};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::GraphEvent;
use super::pdu::Pdu;
use super::version::is_shared;
use crate::event::{Object, RoomVersion};
use crate::seam::Membership;
use crate::store::StoreError;
use crate::store::dag::EventRow;

/// What was found of an event.
/// <https://spec.matrix.org/v1.16/server-server-api/#checks-performed-on-receipt-of-a-pdu>
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It is part of the room.
    Accepted,
    /// It was allowed where it stands in the graph, but not by the room's current state: kept, and not carried further.
    SoftFailed,
    /// It was never allowed.
    Rejected,
}

impl Status {
    fn to_i64(self) -> i64 {
        match self {
            Self::Accepted => 0,
            Self::SoftFailed => 1,
            Self::Rejected => 2,
        }
    }

    fn from_i64(value: i64) -> Option<Self> {
        [Self::Accepted, Self::SoftFailed, Self::Rejected].into_iter().find(|status| status.to_i64() == value)
    }
}

/// A stored event.
#[derive(Debug, Clone)]
pub struct Stored {
    /// The event.
    pub pdu: Pdu,
    /// What was found of it.
    pub status: Status,
    /// Why it was not accepted.
    pub reason: Option<String>,
    /// The state groups before and after it; none when they are not known, which is so for an auth event that came alone.
    pub groups: Option<Groups>,
    /// Set when the room stands on it although its groups are not known.
    pub needed: OnceLock<()>,
    /// Of a state event: as the bridge sees it, which asks for the same ones again and again.
    pub shown: OnceLock<Arc<GraphEvent>>,
}

/// The state groups before and after an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Groups {
    /// Before.
    pub before: i64,
    /// After.
    pub after: i64,
}

impl Stored {
    /// An event of which nothing was found yet.
    pub fn new(pdu: Pdu) -> Self {
        let (needed, shown) = (OnceLock::new(), OnceLock::new());
        Self { pdu, status: Status::Accepted, reason: None, groups: None, needed, shown }
    }

    /// Whether it goes when there is no space for it.
    pub fn can_go(&self) -> bool {
        self.groups.is_none() && self.needed.get().is_none()
    }

    /// Whether it is part of the room.
    pub fn is_accepted(&self) -> bool {
        self.status == Status::Accepted && self.groups.is_some()
    }

    /// `(type, state key)` of a state event.
    pub fn key(&self) -> Option<(String, String)> {
        Some((self.pdu.kind.to_string(), self.pdu.state_key.clone()?))
    }

    /// The membership that a member event says.
    pub fn membership(&self) -> Option<Membership> {
        #[derive(Deserialize)]
        struct Content {
            membership: String,
        }
        if self.pdu.kind != TimelineEventType::RoomMember {
            return None;
        }
        Membership::parse(&serde_json::from_str::<Content>(self.pdu.content.get()).ok()?.membership)
    }

    /// `content`, parsed.
    pub fn content(&self) -> Object {
        serde_json::from_str(self.pdu.content.get()).unwrap_or_default()
    }

    /// As the bridge sees it.
    pub fn to_graph_event(&self) -> Arc<GraphEvent> {
        match self.pdu.state_key {
            Some(_) => self.shown.get_or_init(|| self.read()).clone(),
            None => self.read(),
        }
    }

    fn read(&self) -> Arc<GraphEvent> {
        let pdu = &self.pdu;
        Arc::new(GraphEvent {
            event_id: pdu.event_id.clone(),
            room_id: pdu.room_id.clone(),
            sender: pdu.sender.clone(),
            kind: pdu.kind.to_string(),
            state_key: pdu.state_key.clone(),
            origin_server_ts: pdu.origin_server_ts,
            prev_events: pdu.prev_events.clone(),
            auth_events: pdu.auth_events.clone(),
            depth: pdu.depth,
            content: self.content(),
            redacts: pdu.redacts.clone(),
        })
    }

    pub(super) fn to_row(&self, seq: i64) -> EventRow {
        EventRow {
            event_id: self.pdu.event_id.clone(),
            room_id: self.pdu.room_id.clone(),
            version: self.pdu.version.as_str().to_owned(),
            seq,
            status: self.status.to_i64(),
            before: self.groups.map(|groups| groups.before),
            after: self.groups.map(|groups| groups.after),
            reason: self.reason.clone(),
            needed: self.needed.get().is_some(),
            json: self.pdu.raw.get().as_bytes().to_vec(),
        }
    }

    pub(super) fn from_row(row: EventRow) -> Result<Self, StoreError> {
        let version =
            RoomVersion::parse(&row.version).ok_or_else(|| StoreError::corrupt("room version", &row.version))?;
        let raw = std::str::from_utf8(&row.json).map_err(|error| StoreError::corrupt("event", error))?;
        let mut pdu = Pdu::read_stored(raw, row.event_id.as_str(), version)
            .map_err(|refusal| StoreError::corrupt("event", refusal))?;
        if is_shared(version) {
            pdu.depth = row.seq;
        }
        let status =
            Status::from_i64(row.status).ok_or_else(|| StoreError::corrupt("status of an event", row.status))?;
        let groups = row.before.zip(row.after).map(|(before, after)| Groups { before, after });
        let needed = OnceLock::new();
        if row.needed {
            let _ = needed.set(());
        }
        Ok(Self { pdu, status, reason: row.reason, groups, needed, shown: OnceLock::new() })
    }
}

impl Event for Stored {
    type Id = OwnedEventId;

    fn event_id(&self) -> &OwnedEventId {
        &self.pdu.event_id
    }

    fn room_id(&self) -> Option<&RoomId> {
        self.pdu.says_room_id.then_some(&*self.pdu.room_id)
    }

    fn sender(&self) -> &UserId {
        &self.pdu.sender
    }

    fn origin_server_ts(&self) -> MilliSecondsSinceUnixEpoch {
        let ts = u64::try_from(self.pdu.origin_server_ts).unwrap_or_default();
        MilliSecondsSinceUnixEpoch(UInt::new_saturating(ts))
    }

    fn event_type(&self) -> &TimelineEventType {
        &self.pdu.kind
    }

    fn content(&self) -> &RawValue {
        &self.pdu.content
    }

    fn state_key(&self) -> Option<&str> {
        self.pdu.state_key.as_deref()
    }

    fn prev_events(&self) -> Box<dyn DoubleEndedIterator<Item = &OwnedEventId> + '_> {
        Box::new(self.pdu.prev_events.iter())
    }

    fn auth_events(&self) -> Box<dyn DoubleEndedIterator<Item = &OwnedEventId> + '_> {
        Box::new(self.pdu.auth_events.iter())
    }

    fn redacts(&self) -> Option<&OwnedEventId> {
        self.pdu.redacts.as_ref()
    }

    fn rejected(&self) -> bool {
        self.status == Status::Rejected
    }
}
