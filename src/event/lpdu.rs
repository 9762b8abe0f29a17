//! LPDUs: what a participant sends to the hub, and what of it is proved.

use ruma::{OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId};

use super::{Object, SignatureCheck, VerifyKeys};
use crate::identity::SigningKey;
use crate::refusal::Refusal;

/// An LPDU whose form is right and of which nothing else is proved.
#[derive(Debug, Clone)]
pub struct Lpdu {
    /// The LPDU's own reference hash with `$`: how it is known before the hub has finished it.
    pub lpdu_id: OwnedEventId,
    /// The room.
    pub room_id: OwnedRoomId,
    /// The sender.
    pub sender: OwnedUserId,
    /// The hub that it is meant for.
    pub hub_server: OwnedServerName,
    /// The event type.
    pub kind: String,
    /// The state key of a state event.
    pub state_key: Option<String>,
    /// When the sender made it, in milliseconds since the epoch.
    pub origin_server_ts: i64,
    /// The whole object.
    pub json: Object,
}

/// An LPDU whose hash and signature are right.
#[derive(Debug, Clone)]
pub struct VerifiedLpdu(pub(super) Lpdu);

impl Lpdu {
    /// Checks the form of `json` as an LPDU: required fields, their types and lengths, none of the fields that a
    /// participant must not set, `hashes` exactly `{lpdu: {sha256}}`, no floats and no integer beyond ±(2^53−1).
    /// `unsigned` and `event_id` are stripped.
    pub fn parse(_json: Object) -> Result<Self, Refusal> {
        unimplemented!()
    }

    /// Makes, hashes and signs an LPDU from a template with `type`, `room_id`, `sender`, `content`,
    /// `origin_server_ts` and perhaps `state_key`; `hub_server`, hash and signature are added here.
    pub fn build(
        _template: Object,
        _hub: &ruma::ServerName,
        _entity: &ruma::ServerName,
        _key: &SigningKey,
    ) -> Result<Self, Refusal> {
        unimplemented!()
    }

    /// The signatures that must be checked: at least one by the sender's server, with a key known in `keys`.
    pub fn signature_checks<'a>(&'a self, _keys: &'a VerifyKeys) -> Result<Vec<SignatureCheck<'a>>, Refusal> {
        unimplemented!()
    }

    /// Checks the hash and the sender's server's signature.
    pub fn verify(self, _keys: &VerifyKeys) -> Result<VerifiedLpdu, Refusal> {
        unimplemented!()
    }

    /// The same for many, with one batch verification; answers in order.
    pub fn verify_all(_lpdus: Vec<Self>, _keys: &VerifyKeys) -> Vec<Result<VerifiedLpdu, Refusal>> {
        unimplemented!()
    }
}

impl std::ops::Deref for VerifiedLpdu {
    type Target = Lpdu;

    fn deref(&self) -> &Lpdu {
        &self.0
    }
}
