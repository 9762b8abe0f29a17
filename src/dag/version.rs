//! The rules of each room version, as a table of values: graphs', and those of LM for shared rooms.

use ruma::room_version_rules::RoomVersionRules;

use crate::event::{Family, RoomVersion};
use crate::refusal::Refusal;

static V6: RoomVersionRules = RoomVersionRules::V6;
static V7: RoomVersionRules = RoomVersionRules::V7;
static V8: RoomVersionRules = RoomVersionRules::V8;
static V9: RoomVersionRules = RoomVersionRules::V9;
static V10: RoomVersionRules = RoomVersionRules::V10;
static V11: RoomVersionRules = RoomVersionRules::V11;
static V12: RoomVersionRules = RoomVersionRules::V12;
static SHARED: RoomVersionRules = shared();

/// The rules of shared rooms: those of version 11 without restricted joins and without a look at the levels of `notifications`.
/// LM does not check `third_party_invite` either, which ruma cannot be told: an invite that has one is judged by it, as the
/// graph servers that exist do. Of `signatures` and `event_format` nothing is used: the events' form is LM's (`pdu.rs`).
const fn shared() -> RoomVersionRules {
    let mut rules = RoomVersionRules::V11;
    rules.authorization.limit_notifications_power_levels = false;
    rules.authorization.restricted_join_rule = false;
    rules.authorization.knock_restricted_join_rule = false;
    rules
}

/// The rules of `version` (<https://spec.matrix.org/v1.16/rooms/>); of LM's versions, those of shared rooms.
pub fn rules_of(version: RoomVersion) -> Result<&'static RoomVersionRules, Refusal> {
    match version {
        RoomVersion::V6 => Ok(&V6),
        RoomVersion::V7 => Ok(&V7),
        RoomVersion::V8 => Ok(&V8),
        RoomVersion::V9 => Ok(&V9),
        RoomVersion::V10 => Ok(&V10),
        RoomVersion::V11 => Ok(&V11),
        RoomVersion::V12 => Ok(&V12),
        RoomVersion::Lm02 | RoomVersion::LmI1 => Ok(&SHARED),
    }
}

/// Whether rooms of a version are here as shared ones: a graph whose events have LM's form, with a log beside it.
pub fn is_shared(version: RoomVersion) -> bool {
    version.family() == Family::Log
}

/// The versions of rooms that the gateway makes.
pub fn can_create(version: RoomVersion) -> bool {
    matches!(version, RoomVersion::V10 | RoomVersion::V11 | RoomVersion::V12)
}
