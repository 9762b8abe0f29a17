//! The rules of each graph room version, as a table of values.

use ruma::room_version_rules::RoomVersionRules;

use crate::event::RoomVersion;
use crate::refusal::Refusal;

static V6: RoomVersionRules = RoomVersionRules::V6;
static V7: RoomVersionRules = RoomVersionRules::V7;
static V8: RoomVersionRules = RoomVersionRules::V8;
static V9: RoomVersionRules = RoomVersionRules::V9;
static V10: RoomVersionRules = RoomVersionRules::V10;
static V11: RoomVersionRules = RoomVersionRules::V11;
static V12: RoomVersionRules = RoomVersionRules::V12;

/// The rules of `version` (<https://spec.matrix.org/v1.16/rooms/>); none for logs.
pub fn rules_of(version: RoomVersion) -> Result<&'static RoomVersionRules, Refusal> {
    match version {
        RoomVersion::V6 => Ok(&V6),
        RoomVersion::V7 => Ok(&V7),
        RoomVersion::V8 => Ok(&V8),
        RoomVersion::V9 => Ok(&V9),
        RoomVersion::V10 => Ok(&V10),
        RoomVersion::V11 => Ok(&V11),
        RoomVersion::V12 => Ok(&V12),
        RoomVersion::Lm02 | RoomVersion::LmI1 => Err(Refusal::IncompatibleRoomVersion(version.as_str().to_owned())),
    }
}

/// The versions of rooms that the gateway makes.
pub fn can_create(version: RoomVersion) -> bool {
    matches!(version, RoomVersion::V10 | RoomVersion::V11 | RoomVersion::V12)
}
