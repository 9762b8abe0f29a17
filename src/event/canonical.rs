//! RFC 8785 canonical JSON.

use super::Object;

/// The canonical form of `object`: keys in UTF-16 order, numbers as ECMAScript writes them.
pub fn canonical_json(_object: &Object) -> Vec<u8> {
    unimplemented!()
}
