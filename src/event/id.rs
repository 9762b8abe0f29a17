//! Event IDs that come from somebody else. In every room version that is supported here, Matrix's and LM's, an ID is `$` and
//! a hash in URL-safe base64; ruma takes anything that begins with `$`. What is no such ID names no event, and must not get
//! as far as the store: PostgreSQL refuses U+0000 in TEXT, and an index refuses what is thousands of bytes long.
//! <https://spec.matrix.org/v1.16/rooms/v4/#event-ids>

use ruma::OwnedEventId;

use crate::refusal::Refusal;

/// The length of an identifier, in bytes.
const MAX_BYTES: usize = 255;
/// How much of what is no ID is shown.
const SHOWN: usize = 60;

/// The event ID that a peer's text is, if it is one. The only way from text to event ID.
pub fn event_id(text: &str) -> Option<OwnedEventId> {
    let hash = text.strip_prefix('$').filter(|_| text.len() <= MAX_BYTES)?;
    let base64 = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    if hash.is_empty() || !hash.bytes().all(base64) {
        return None;
    }
    OwnedEventId::try_from(text).ok()
}

/// The same, for text that must be one: `what` says where it stood.
pub fn parse_event_id(what: &str, text: &str) -> Result<OwnedEventId, Refusal> {
    event_id(text).ok_or_else(|| {
        let shown: String = text.chars().take(SHOWN).collect();
        Refusal::malformed(what, format!("{shown:?} is no event ID"))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn hc_19_only_hashes_are_event_ids() {
        let long = format!("${}", "a".repeat(255));
        for text in ["", "$", "a", "$a:b.example", "$\u{0}", "$a\u{0}b", "$a b", "$a+b", "$a/b", "$a=", "$é", &long] {
            assert_eq!(event_id(text), None, "{text:?}");
        }
        let hash = "$Rqnc-F-dvnEYJTyHq_iKxU2bZ1CI92-kuZq3a5lr5Zg";
        assert_eq!(event_id(hash).unwrap(), hash);
        let refusal = parse_event_id("v", &long.replace('a', "\u{0}")).unwrap_err();
        assert_eq!(refusal.status(), 400);
        assert!(refusal.to_string().len() < 400, "{refusal}");
    }

    proptest! {
        #[test]
        fn whatever_is_taken_can_be_stored(text in "\\$[\u{0}-\u{7f}é]{0,300}") {
            if let Some(id) = event_id(&text) {
                prop_assert_eq!(id.as_str(), text.as_str());
                prop_assert!(text.len() <= 255);
                prop_assert_eq!(text.find(char::from(0)), None);
            }
        }
    }
}
