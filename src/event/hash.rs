//! Content, LPDU and reference hashes.
//! Source: draft-ralston-mimi-linearized-matrix-04, section "Hashes" (`int-content-hashes`, `int-reference-hashes`).

use std::borrow::Cow;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::canonical::canonical_view;
use super::redact::redacted_view;
use super::{Object, Redaction};

/// The hash that stands in `hashes.lpdu.sha256`: unpadded standard base64.
pub fn lpdu_hash(event: &Object) -> String {
    let entries = event
        .iter()
        .filter(|(key, _)| !matches!(key.as_str(), "auth_events" | "prev_events" | "hashes" | "signatures"))
        .map(|(key, value)| (key.as_str(), Cow::Borrowed(value)))
        .collect();
    STANDARD_NO_PAD.encode(Sha256::digest(canonical_view(entries)))
}

/// The hash that stands in `hashes.sha256`: unpadded standard base64.
pub fn content_hash(event: &Object) -> String {
    let entries = event
        .iter()
        .filter_map(|(key, value)| match key.as_str() {
            "signatures" => None,
            "hashes" => only_lpdu(value).map(|hashes| ("hashes", Cow::Owned(hashes))),
            key => Some((key, Cow::Borrowed(value))),
        })
        .collect();
    STANDARD_NO_PAD.encode(Sha256::digest(canonical_view(entries)))
}

/// The reference hash: URL-safe unpadded base64, without the `$`.
pub fn reference_hash(event: &Object, redaction: Redaction) -> String {
    URL_SAFE_NO_PAD.encode(Sha256::digest(signing_bytes(event, redaction)))
}

/// What a hub, an invited server, or the server of a hub's own user signs, and what the reference hash covers: the
/// redacted event without its signatures.
pub(super) fn signing_bytes(event: &Object, redaction: Redaction) -> Vec<u8> {
    let mut entries = redacted_view(event, redaction);
    entries.retain(|(key, _)| *key != "signatures");
    canonical_view(entries)
}

/// What a participant signs: the redacted LPDU that is inside the event.
pub(super) fn lpdu_signing_bytes(event: &Object, redaction: Redaction) -> Vec<u8> {
    let mut entries = redacted_view(event, redaction);
    entries.retain_mut(|(key, value)| match *key {
        "signatures" | "auth_events" | "prev_events" => false,
        "hashes" => only_lpdu(value).map(|hashes| *value = Cow::Owned(hashes)).is_some(),
        _ => true,
    });
    canonical_view(entries)
}

/// The event ID that belongs to signing bytes.
pub(super) fn event_id_of(signing_bytes: &[u8]) -> String {
    format!("${}", URL_SAFE_NO_PAD.encode(Sha256::digest(signing_bytes)))
}

fn only_lpdu(hashes: &Value) -> Option<Value> {
    hashes.get("lpdu").map(|lpdu| serde_json::json!({ "lpdu": lpdu }))
}
