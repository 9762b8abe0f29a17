//! Content, LPDU and reference hashes.

use super::{Object, Redaction};

/// The hash that stands in `hashes.lpdu.sha256`: unpadded standard base64.
pub fn lpdu_hash(_event: &Object) -> String {
    unimplemented!()
}

/// The hash that stands in `hashes.sha256`: unpadded standard base64.
pub fn content_hash(_event: &Object) -> String {
    unimplemented!()
}

/// The reference hash: URL-safe unpadded base64, without the `$`.
pub fn reference_hash(_event: &Object, _redaction: Redaction) -> String {
    unimplemented!()
}
