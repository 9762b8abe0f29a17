//! The one vocabulary of refusal: every reason for which isthmus does not take an event or a request. HTTP errors, logs,
//! metrics, `explain` and tests all use these variants; each message names the values that disagree.

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde_json::json;

use crate::store::StoreError;

/// Why an event or a request was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The body is no JSON at all.
    #[error("the body is not JSON: {0}")]
    NotJson(String),
    /// The JSON is not of the form that the endpoint or the event format asks for.
    #[error("{what}: {problem}")]
    Malformed {
        /// The field or object that is wrong.
        what: String,
        /// What is wrong with it, with the value found.
        problem: String,
    },
    /// A size limit was passed.
    #[error("{what} is {size} bytes long, the limit is {limit}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// Its size in bytes.
        size: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// It would take more events than are looked at for one thing.
    #[error("the {what} has more than {limit} events, more than this gateway looks at")]
    TooManyEvents {
        /// What has too many.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// A request is not authenticated as it must be.
    #[error("{0}")]
    Unauthenticated(String),
    /// A signature that is needed is missing or wrong.
    #[error("signature of {entity}: {problem}")]
    BadSignature {
        /// The server that should have signed.
        entity: String,
        /// What is wrong.
        problem: String,
    },
    /// A signature is right, and by a key of its server that was not valid when the event says that it was made: the server's clock is
    /// wrong, or it signs with a key out of use.
    #[error(
        "signature of {entity}: right, by a key that is not valid for the event's time ({problem}, all in milliseconds)"
    )]
    KeyOutOfTime {
        /// The server that has signed.
        entity: String,
        /// The key, until when it is valid, and the event's time.
        problem: String,
    },
    /// The keys of a server could not be had, so its signatures cannot be checked now. Worth another try later.
    #[error("the keys of {server} could not be fetched: {problem}")]
    KeysUnavailable {
        /// The server whose keys are missing.
        server: String,
        /// What went wrong.
        problem: String,
    },
    /// A hash in the event is not the hash of the event.
    #[error("the {which} hash is {found}, computed was {expected}")]
    HashMismatch {
        /// `lpdu` or `content`.
        which: &'static str,
        /// The hash as computed.
        expected: String,
        /// The hash as found.
        found: String,
    },
    /// The request's origin has no right to send this event.
    #[error("{origin} sent an event of {expected}")]
    WrongOrigin {
        /// The authenticated origin.
        origin: String,
        /// The server that should have sent it.
        expected: String,
    },
    /// The receiver is not the hub of the room.
    #[error("{found} is not the hub of the room, {hub} is")]
    WrongHub {
        /// The hub of the room.
        hub: String,
        /// The server that was named or asked.
        found: String,
    },
    /// An authorization rule of Linearized Matrix forbids it.
    #[error("LM rule {rule}: {problem}")]
    LmRule {
        /// The rule's number in the draft's section "Auth Rules Algorithm", as `5.2.4`.
        rule: &'static str,
        /// Which values broke it.
        problem: String,
    },
    /// An authorization rule of the Matrix room version forbids it.
    #[error("Matrix authorization: {0}")]
    MatrixRule(String),
    /// The room is not known here.
    #[error("room {0} is not known here")]
    UnknownRoom(String),
    /// The event, user, alias or other thing is not known here, or the asker may not know of it.
    #[error("{0} was not found")]
    NotFound(String),
    /// The endpoint is not for this: another one may be.
    #[error("{0}")]
    Unrecognized(String),
    /// The asker may not do or see this.
    #[error("{0}")]
    Forbidden(String),
    /// Somebody else has the alias.
    #[error("the alias {alias:?} leads to {portal_id} already")]
    AliasTaken {
        /// Its localpart.
        alias: String,
        /// The portal that has it, or is being made with it.
        portal_id: String,
    },
    /// The hub of an LM room takes this gateway for a server that shares the room's graph, and then does not let it.
    #[error(
        "{server} offers {room_id} only as a room whose graph is shared (its join template names prev_events, and its key \
         document does not say m.linearized), and did not take a graph server's join"
    )]
    GraphTemplate {
        /// The hub that was asked.
        server: String,
        /// The room.
        room_id: String,
    },
    /// The room lets in those who meet conditions, and the gateway cannot tell who does.
    #[error(
        "the join rule of {room_id} is {join_rule:?}, and this gateway cannot tell whether {user_id} meets its conditions: \
         join through another server of the room, or ask for an invite"
    )]
    UnableToAuthoriseJoin {
        /// The room.
        room_id: String,
        /// `restricted` or `knock_restricted`.
        join_rule: String,
        /// Who wants to join.
        user_id: String,
    },
    /// The room's version is not one the other side supports.
    #[error("the room has version {0}, which is not among those that both servers support")]
    IncompatibleRoomVersion(String),
    /// The configuration's `[access]` does not allow it.
    #[error("the policy of this gateway does not allow it: {0}")]
    Policy(String),
    /// The room is encrypted, and the policy for encrypted rooms is to refuse them.
    #[error("the room is encrypted, and this gateway does not bridge encrypted rooms: {0}")]
    Encryption(String),
    /// A budget of this source server, room or portal is used up.
    #[error("the budget for {what} is used up")]
    Budget {
        /// What is limited.
        what: String,
        /// When it is worth trying again, in milliseconds from now.
        retry_after_ms: u64,
    },
    /// The room's server access control list does not allow the server.
    #[error("{0} is denied by the room's access control list")]
    ServerAcl(String),
    /// Another gateway connects the same two rooms, and would carry the image back.
    #[error("{0} connects the same two rooms: what its bot and its ghosts do does not cross")]
    Loop(String),
    /// The event is of a kind that never crosses.
    #[error("{0} does not cross")]
    NotBridged(String),
    /// The other server did not answer as it should have; worth another try later.
    #[error("{server}: {problem}")]
    Remote {
        /// The server that was asked.
        server: String,
        /// What it did.
        problem: String,
    },
    /// A third server, which was asked because of a request, refused: its answer is passed on as it is.
    #[error("{server}: {error}")]
    Declined {
        /// The server that was asked.
        server: String,
        /// Its status, from 400 to 599.
        status: u16,
        /// Its `errcode`.
        errcode: Box<str>,
        /// Its `error`.
        error: Box<str>,
        /// How long it asks to be left alone, in milliseconds.
        retry_after_ms: Option<u64>,
    },
    /// What was answered to the same transaction before.
    #[error("{error}")]
    Repeated {
        /// The status of that answer, from 400 to 499.
        status: u16,
        /// Its `errcode`.
        errcode: Box<str>,
        /// Its `error`.
        error: Box<str>,
    },
    /// This gateway has a fault that shows with this event, each time it comes.
    #[error("this gateway fails on {0}")]
    Fails(String),
    /// The store holds what this program would not have written: it fails until somebody repairs it.
    #[error("internal error: the store holds a bad {0}")]
    Corrupt(String),
    /// Something failed here; worth another try later.
    #[error("internal error: {0}")]
    Internal(String),
}

impl Refusal {
    /// A [`Refusal::Malformed`].
    pub fn malformed(what: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Malformed { what: what.into(), problem: problem.into() }
    }

    /// The reason as one word: the label in metrics and in the store.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotJson(_) => "not_json",
            Self::Malformed { .. } => "malformed",
            Self::TooLarge { .. } => "too_large",
            Self::TooManyEvents { .. } => "too_many_events",
            Self::Unauthenticated(_) => "unauthenticated",
            Self::BadSignature { .. } => "bad_signature",
            Self::KeyOutOfTime { .. } => "key_out_of_time",
            Self::KeysUnavailable { .. } => "keys_unavailable",
            Self::HashMismatch { .. } => "hash_mismatch",
            Self::WrongOrigin { .. } => "wrong_origin",
            Self::WrongHub { .. } => "wrong_hub",
            Self::LmRule { .. } => "lm_rule",
            Self::MatrixRule(_) => "matrix_rule",
            Self::UnknownRoom(_) => "unknown_room",
            Self::NotFound(_) => "not_found",
            Self::Unrecognized(_) => "unrecognized",
            Self::Forbidden(_) => "forbidden",
            Self::AliasTaken { .. } => "alias_taken",
            Self::GraphTemplate { .. } => "graph_template",
            Self::UnableToAuthoriseJoin { .. } => "unable_to_authorise_join",
            Self::IncompatibleRoomVersion(_) => "incompatible_room_version",
            Self::Policy(_) => "policy",
            Self::Encryption(_) => "encryption",
            Self::Budget { .. } => "budget",
            Self::ServerAcl(_) => "server_acl",
            Self::Loop(_) => "loop",
            Self::NotBridged(_) => "not_bridged",
            Self::Remote { .. } => "remote",
            Self::Declined { .. } => "declined",
            Self::Repeated { .. } => "repeated",
            Self::Fails(_) => "fails",
            Self::Corrupt(_) | Self::Internal(_) => "internal",
        }
    }

    /// The Matrix error code that goes with it.
    pub fn errcode(&self) -> &str {
        match self {
            Self::Declined { errcode, .. } | Self::Repeated { errcode, .. } => errcode,
            Self::NotJson(_) => "M_NOT_JSON",
            Self::Malformed { .. } => "M_BAD_JSON",
            Self::TooLarge { .. } => "M_TOO_LARGE",
            Self::WrongHub { .. } => "M_WRONG_SERVER",
            Self::UnknownRoom(_) | Self::NotFound(_) => "M_NOT_FOUND",
            Self::Unrecognized(_) => "M_UNRECOGNIZED",
            Self::IncompatibleRoomVersion(_) => "M_INCOMPATIBLE_ROOM_VERSION",
            Self::AliasTaken { .. } => "M_ROOM_IN_USE",
            Self::UnableToAuthoriseJoin { .. } => "M_UNABLE_TO_AUTHORISE_JOIN",
            Self::Budget { .. } => "M_LIMIT_EXCEEDED",
            Self::Remote { .. } | Self::KeysUnavailable { .. } | Self::Corrupt(_) | Self::Internal(_) => "M_UNKNOWN",
            _ => "M_FORBIDDEN",
        }
    }

    /// The HTTP status that goes with it.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::NotJson(_)
            | Self::Malformed { .. }
            | Self::WrongHub { .. }
            | Self::UnableToAuthoriseJoin { .. }
            | Self::IncompatibleRoomVersion(_) => StatusCode::BAD_REQUEST,
            Self::Declined { status, .. } | Self::Repeated { status, .. } => {
                StatusCode::from_u16(*status).unwrap_or(StatusCode::FORBIDDEN)
            }
            Self::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Unauthenticated(_) => StatusCode::UNAUTHORIZED,
            Self::UnknownRoom(_) | Self::NotFound(_) | Self::Unrecognized(_) => StatusCode::NOT_FOUND,
            Self::AliasTaken { .. } => StatusCode::CONFLICT,
            Self::Budget { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::Remote { .. } | Self::KeysUnavailable { .. } => StatusCode::BAD_GATEWAY,
            Self::Corrupt(_) | Self::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
            _ => StatusCode::FORBIDDEN,
        }
    }

    /// Whether the same thing may succeed later without anybody changing it.
    pub fn is_transient(&self) -> bool {
        self.is_failure() || matches!(self, Self::KeysUnavailable { .. } | Self::Remote { .. } | Self::Budget { .. })
    }

    /// Whether something failed here, which says nothing of what was to be done.
    pub fn is_failure(&self) -> bool {
        matches!(self, Self::Corrupt(_) | Self::Internal(_))
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Corrupt { what, problem } => Self::Corrupt(format!("{what}: {problem}")),
            error => Self::Internal(error.to_string()),
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut body = json!({ "errcode": self.errcode(), "error": self.to_string() });
        let retry_after = match &self {
            Self::Budget { retry_after_ms, .. } => Some(*retry_after_ms),
            Self::Declined { retry_after_ms, .. } => *retry_after_ms,
            _ => None,
        };
        if let (Some(retry_after_ms), Some(object)) = (retry_after, body.as_object_mut()) {
            object.insert("retry_after_ms".to_owned(), json!(retry_after_ms));
        }
        if let (Self::IncompatibleRoomVersion(version), Some(object)) = (&self, body.as_object_mut()) {
            object.insert("room_version".to_owned(), json!(version));
        }
        // Who asks for the way is told it.
        if let (Self::WrongHub { hub, .. }, Some(object)) = (&self, body.as_object_mut()) {
            object.insert("hub_server".to_owned(), json!(hub));
        }
        (self.status(), Json(body)).into_response()
    }
}
