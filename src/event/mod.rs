//! LM events as data: canonical JSON, hashes, redaction, signatures, LPDUs and room versions; EDUs of both protocols. Pure: no I/O, no clock.

mod canonical;
mod canonical_text;
mod edu;
mod form;
mod hash;
mod id;
mod lenient;
mod lpdu;
mod parse;
mod pdu;
mod redact;
mod room_version;
mod sign;
#[cfg(test)]
mod tests;

pub use self::canonical::canonical_json;
pub use self::canonical_text::canonical_text;
pub use self::edu::{Edu, EduKey, Ignored, Presence, Receipt, ToDevice, Typing};
pub(crate) use self::form::{check_numbers, integers};
pub use self::hash::{content_hash, lpdu_hash, reference_hash};
pub use self::id::{event_id, parse_event_id};
pub use self::lenient::{parse_answer, parse_leniently};
pub use self::lpdu::{Lpdu, VerifiedLpdu};
pub use self::parse::{Object, parse_object, parse_value};
pub use self::pdu::{Completion, HashCheck, Links, Pdu};
pub use self::redact::{Redaction, redact};
pub use self::room_version::{Family, RoomVersion};
pub(crate) use self::sign::decode_base64;
pub use self::sign::{
    SignatureCheck, VerifyKey, VerifyKeys, sign_object, verify_each, verify_object, verify_signatures,
};
