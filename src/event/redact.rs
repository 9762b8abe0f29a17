//! Redaction: the draft's table, and the one of room version 11 that graph servers use in shared rooms.

use super::Object;

/// Which table of kept fields is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Redaction {
    /// The table of the LM draft.
    Draft,
    /// The table of Matrix room version 11, with `hub_server` kept and `depth` dropped.
    GraphServer,
}

/// The event with only the fields that redaction keeps.
pub fn redact(_event: &Object, _redaction: Redaction) -> Object {
    unimplemented!()
}
