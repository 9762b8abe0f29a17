//! Finished events of an LM room, made by a hub.

use ruma::{OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId};

use super::{Object, Redaction, VerifiedLpdu, VerifyKeys};
use crate::identity::SigningKey;
use crate::refusal::Refusal;

/// A finished event of an LM room whose form is right. Immutable: the event ID is computed once.
#[derive(Debug, Clone)]
pub struct Pdu {
    /// `$` and the reference hash.
    pub event_id: OwnedEventId,
    /// The reference hash of the LPDU inside it, when it has one (`hub_server` present).
    pub lpdu_id: Option<OwnedEventId>,
    /// The room.
    pub room_id: OwnedRoomId,
    /// The sender.
    pub sender: OwnedUserId,
    /// The event type.
    pub kind: String,
    /// The state key of a state event.
    pub state_key: Option<String>,
    /// When the sender made it, in milliseconds since the epoch.
    pub origin_server_ts: i64,
    /// The hub that finished it, for events of participants.
    pub hub_server: Option<OwnedServerName>,
    /// What allows it.
    pub auth_events: Vec<OwnedEventId>,
    /// What precedes it.
    pub prev_events: Vec<OwnedEventId>,
    /// The whole object, as it goes over the wire.
    pub json: Object,
}

/// What a hub adds to an event.
#[derive(Debug, Clone)]
pub struct Completion {
    /// The events that allow it, in the order of the draft's selection.
    pub auth_events: Vec<OwnedEventId>,
    /// The event before it in the log; none for `m.room.create`.
    pub prev_event: Option<OwnedEventId>,
}

/// Whether the hashes of a received event are right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HashCheck {
    /// Both are.
    Intact,
    /// One is wrong: only the redacted copy may be kept.
    Redact(Refusal),
}

impl Pdu {
    /// Checks the form of `json` as a finished event of an LM room and computes its ID. Floats are allowed: a participant
    /// must take what its hub sends. `unsigned` and `event_id` are stripped.
    pub fn parse(_json: Object, _redaction: Redaction) -> Result<Self, Refusal> {
        unimplemented!()
    }

    /// Finishes a participant's LPDU as its hub: adds `auth_events`, `prev_events`, the content hash and the hub's
    /// signature. Refuses what would pass 65,536 bytes.
    pub fn complete(
        _lpdu: VerifiedLpdu,
        _completion: Completion,
        _hub: &ruma::ServerName,
        _key: &SigningKey,
    ) -> Result<Self, Refusal> {
        unimplemented!()
    }

    /// Makes an event of one of the hub's own users from a template with `type`, `room_id`, `sender`, `content`,
    /// `origin_server_ts` and perhaps `state_key`: no `hub_server` and no LPDU hash.
    pub fn build(
        _template: Object,
        _completion: Completion,
        _hub: &ruma::ServerName,
        _key: &SigningKey,
    ) -> Result<Self, Refusal> {
        unimplemented!()
    }

    /// Adds the signature of an invited server over the redacted event.
    pub fn countersign(&mut self, _entity: &ruma::ServerName, _key: &SigningKey) {
        unimplemented!()
    }

    /// The servers whose signatures must be there: the sender's, and the hub's when `hub_server` is present.
    pub fn required_signers(&self) -> Vec<OwnedServerName> {
        unimplemented!()
    }

    /// Checks the required signatures: the hub's over the redacted event, the sender's over the redacted LPDU (or over the
    /// redacted event when there is no `hub_server`).
    pub fn verify_signatures(&self, _keys: &VerifyKeys, _redaction: Redaction) -> Result<(), Refusal> {
        unimplemented!()
    }

    /// Compares both hashes with the event.
    pub fn check_hashes(&self) -> HashCheck {
        unimplemented!()
    }

    /// The redacted copy; its event ID is the same.
    pub fn redacted(&self, _redaction: Redaction) -> Self {
        unimplemented!()
    }

    /// `content`.
    pub fn content(&self) -> &Object {
        unimplemented!()
    }

    /// The event as bytes, as they go over the wire.
    pub fn to_bytes(&self) -> Vec<u8> {
        unimplemented!()
    }
}
