//! RFC 8785 canonical JSON: keys in UTF-16 order, numbers as ECMAScript writes them. Objects are written from views, so that
//! hashing or signing a part of an event copies nothing but what redaction takes apart.

use std::borrow::Cow;
use std::cmp::Ordering;

use serde_json::{Number, Value};

use super::Object;

/// Up to here every integer has a form of its own (2^53).
const MAX_EXACT: i64 = 1 << 53;

/// The canonical form of `object`.
pub fn canonical_json(object: &Object) -> Vec<u8> {
    let mut out = Vec::with_capacity(1024);
    write_entries(object.iter().map(|(key, value)| (key.as_str(), value)).collect(), &mut out, write_value);
    out
}

/// How many bytes the canonical form of `object` has.
pub(super) fn canonical_len(object: &Object) -> usize {
    let mut length = Length(0);
    write_entries(object.iter().map(|(key, value)| (key.as_str(), value)).collect(), &mut length, write_value);
    length.0
}

/// Where canonical JSON is written to.
pub(super) trait Sink {
    fn put(&mut self, bytes: &[u8]);
}

impl Sink for Vec<u8> {
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

struct Length(usize);

impl Sink for Length {
    fn put(&mut self, bytes: &[u8]) {
        self.0 = self.0.saturating_add(bytes.len());
    }
}

/// The canonical form of an object of which only the top level is chosen by the caller.
pub(super) fn canonical_view(entries: Vec<(&str, Cow<'_, Value>)>) -> Vec<u8> {
    let mut out = Vec::with_capacity(1024);
    write_entries(entries, &mut out, |value, out| write_value(&value, out));
    out
}

/// The canonical form of a number.
pub(super) fn canonical_number(number: &Number) -> Cow<'static, str> {
    if let Some(integer) = number.as_i64()
        && (-MAX_EXACT..=MAX_EXACT).contains(&integer)
    {
        return Cow::Owned(integer.to_string());
    }
    match number.as_f64().filter(|float| float.is_finite()) {
        Some(float) => Cow::Owned(ryu_js::Buffer::new().format_finite(float).to_owned()),
        None => Cow::Borrowed("null"),
    }
}

fn write_entries<V, S: Sink>(mut entries: Vec<(&str, V)>, out: &mut S, write: impl Fn(V, &mut S)) {
    if !entries.is_sorted_by(|(a, _), (b, _)| utf16_order(a, b) == Ordering::Less) {
        entries.sort_by(|(a, _), (b, _)| utf16_order(a, b));
    }
    out.put(b"{");
    for (index, (key, value)) in entries.into_iter().enumerate() {
        if index > 0 {
            out.put(b",");
        }
        write_string(key, out);
        out.put(b":");
        write(value, out);
    }
    out.put(b"}");
}

/// The order of UTF-16 code units, which is the order of bytes but for what lies beyond the basic plane.
fn utf16_order(a: &str, b: &str) -> Ordering {
    if a.is_ascii() || b.is_ascii() { a.cmp(b) } else { a.encode_utf16().cmp(b.encode_utf16()) }
}

fn write_value<S: Sink>(value: &Value, out: &mut S) {
    match value {
        Value::Null => out.put(b"null"),
        Value::Bool(true) => out.put(b"true"),
        Value::Bool(false) => out.put(b"false"),
        Value::Number(number) => out.put(canonical_number(number).as_bytes()),
        Value::String(text) => write_string(text, out),
        Value::Array(items) => {
            out.put(b"[");
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    out.put(b",");
                }
                write_value(item, out);
            }
            out.put(b"]");
        }
        Value::Object(object) => {
            write_entries(object.iter().map(|(key, value)| (key.as_str(), value)).collect(), out, write_value);
        }
    }
}

fn write_string(text: &str, out: &mut impl Sink) {
    out.put(b"\"");
    write_escaped(text, out);
    out.put(b"\"");
}

/// What stands between the quotes of a string.
pub(super) fn write_escaped(text: &str, out: &mut impl Sink) {
    let mut rest = text.as_bytes();
    while let Some((plain, byte, after)) = split_at_escape(rest) {
        out.put(plain);
        match byte {
            b'"' => out.put(b"\\\""),
            b'\\' => out.put(b"\\\\"),
            0x08 => out.put(b"\\b"),
            0x0c => out.put(b"\\f"),
            b'\n' => out.put(b"\\n"),
            b'\r' => out.put(b"\\r"),
            b'\t' => out.put(b"\\t"),
            _ => out.put(format!("\\u{byte:04x}").as_bytes()),
        }
        rest = after;
    }
    out.put(rest);
}

/// The bytes before the first one that is escaped, that one, and those after it.
fn split_at_escape(bytes: &[u8]) -> Option<(&[u8], u8, &[u8])> {
    let is_escaped = |byte: &u8| *byte < 0x20 || *byte == b'"' || *byte == b'\\';
    // Blocks without a branch inside are looked at many bytes at a time.
    let is_plain = |block: &&[u8; 32]| !block.iter().fold(false, |found, byte| found | is_escaped(byte));
    let (blocks, _) = bytes.as_chunks::<32>();
    let skipped = blocks.iter().take_while(is_plain).count().saturating_mul(32);
    let index = skipped.checked_add(bytes.get(skipped..)?.iter().position(is_escaped)?)?;
    let (plain, rest) = bytes.split_at_checked(index)?;
    let (byte, after) = rest.split_first()?;
    Some((plain, *byte, after))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{canonical_text, parse_object, parse_value};
    use super::*;

    proptest! {
        #[test]
        fn agrees_with_the_canonical_form_of_the_text(text in "\\{\"a\":[\\[\\]{}\",:0-9eE.a-c\u{e000}\u{10000}-]{0,40}\\}") {
            if let Ok(object) = parse_object(text.as_bytes()) {
                let canonical = canonical_json(&object);
                prop_assert_eq!(&canonical, &canonical_text(text.as_bytes()).unwrap());
                prop_assert_eq!(canonical.len(), canonical_len(&object));
                // Canonical JSON is its own canonical form.
                prop_assert_eq!(canonical_json(&parse_object(&canonical).unwrap()), canonical);
            }
        }

        #[test]
        fn sorts_keys_by_utf16(keys in proptest::collection::vec("[a\u{7f}\u{e9}\u{ffff}\u{fb33}\u{10000}\u{1f600}]{0,3}", 0..6)) {
            let object: Object = keys.into_iter().map(|key| (key, Value::Null)).collect();
            prop_assert_eq!(canonical_json(&object), canonical_text(&serde_json::to_vec(&object).unwrap()).unwrap());
        }
    }

    #[test]
    fn hc_14_numbers_are_written_as_the_peers_write_them() {
        for (number, expected) in
            [("-0", "0"), ("1e21", "1e+21"), ("9007199254740993", "9007199254740992"), ("2e-3", "0.002"), ("1.0", "1")]
        {
            let Value::Number(number) = parse_value(number.as_bytes()).unwrap() else { panic!("no number") };
            assert_eq!(canonical_number(&number), expected);
        }
    }
}
