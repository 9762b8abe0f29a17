//! Endpoints that have two names: which they are, and how it is found out which one the target knows.

use serde_json::json;

use crate::conformance::wire::Ask;

/// The prefix under which the draft's own endpoints are found until they have stable names.
const UNSTABLE: &str = "/_matrix/federation/unstable/org.matrix.i-d.ralston-mimi-linearized-matrix.02";

/// What is known of one of the target's endpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::conformance) enum Presence {
    /// It answers, under its stable name or else under the unstable one.
    Found { stable: bool },
    /// There was no answer under this name, or only one of a proxy in front of the target.
    Silent { stable: bool, why: String },
    /// The target knows neither name.
    Absent,
}

/// Endpoints that have a stable and an unstable name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::conformance) enum Endpoint {
    Send,
    Event,
    Backfill,
    Invite,
    SendJoin,
    SendLeave,
    SendKnock,
    Device,
}

impl Endpoint {
    pub const ALL: [Self; 8] = [
        Self::Send,
        Self::Event,
        Self::Backfill,
        Self::Invite,
        Self::SendJoin,
        Self::SendLeave,
        Self::SendKnock,
        Self::Device,
    ];

    pub(super) fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Send => ("v2", "send"),
            Self::Event => ("v2", "event"),
            Self::Backfill => ("v2", "backfill"),
            Self::Invite => ("v3", "invite"),
            Self::SendJoin => ("v3", "send_join"),
            Self::SendLeave => ("v3", "send_leave"),
            Self::SendKnock => ("v3", "send_knock"),
            Self::Device => ("v1", "user"),
        }
    }

    pub fn stable(self, rest: &str) -> String {
        let (version, name) = self.names();
        format!("/_matrix/federation/{version}/{name}/{rest}")
    }

    pub fn unstable(self, rest: &str) -> String {
        format!("{UNSTABLE}/{}/{rest}", self.names().1)
    }

    /// A request that is well signed and says nothing of use.
    pub(super) fn trial(self, uri: String) -> Ask {
        match self {
            Self::Send => Ask::put(uri, json!({ "pdus": [], "edus": [] })),
            Self::Event | Self::Backfill | Self::Device => Ask::get(uri),
            Self::Invite | Self::SendJoin | Self::SendLeave | Self::SendKnock => Ask::post(uri, json!({})),
        }
    }

    pub(super) fn trial_rest(self) -> &'static str {
        match self {
            Self::Event => "%24AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
            Self::Backfill => "%21nowhere%3Ainvalid?v=%24AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA&limit=1",
            Self::Device => "%40nobody%3Ainvalid/device/ABC",
            _ => "trial",
        }
    }
}
