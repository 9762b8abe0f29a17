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

fn write_entries<V>(mut entries: Vec<(&str, V)>, out: &mut Vec<u8>, write: impl Fn(V, &mut Vec<u8>)) {
    if !entries.is_sorted_by(|(a, _), (b, _)| utf16_order(a, b) == Ordering::Less) {
        entries.sort_by(|(a, _), (b, _)| utf16_order(a, b));
    }
    out.push(b'{');
    for (index, (key, value)) in entries.into_iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        write_string(key, out);
        out.push(b':');
        write(value, out);
    }
    out.push(b'}');
}

/// The order of UTF-16 code units, which is the order of bytes but for what lies beyond the basic plane.
fn utf16_order(a: &str, b: &str) -> Ordering {
    if a.is_ascii() || b.is_ascii() { a.cmp(b) } else { a.encode_utf16().cmp(b.encode_utf16()) }
}

fn write_value(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::Null => out.extend_from_slice(b"null"),
        Value::Bool(true) => out.extend_from_slice(b"true"),
        Value::Bool(false) => out.extend_from_slice(b"false"),
        Value::Number(number) => out.extend_from_slice(canonical_number(number).as_bytes()),
        Value::String(text) => write_string(text, out),
        Value::Array(items) => {
            out.push(b'[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    out.push(b',');
                }
                write_value(item, out);
            }
            out.push(b']');
        }
        Value::Object(object) => {
            write_entries(object.iter().map(|(key, value)| (key.as_str(), value)).collect(), out, write_value);
        }
    }
}

fn write_string(text: &str, out: &mut Vec<u8>) {
    out.push(b'"');
    write_escaped(text, out);
    out.push(b'"');
}

/// What stands between the quotes of a string.
pub(super) fn write_escaped(text: &str, out: &mut Vec<u8>) {
    let bytes = text.as_bytes();
    let mut plain = 0;
    for (index, byte) in bytes.iter().enumerate() {
        let escape: &[u8] = match byte {
            b'"' => b"\\\"",
            b'\\' => b"\\\\",
            0x08 => b"\\b",
            0x0c => b"\\f",
            b'\n' => b"\\n",
            b'\r' => b"\\r",
            b'\t' => b"\\t",
            0..=0x1f => b"\\u",
            _ => continue,
        };
        out.extend_from_slice(bytes.get(plain..index).unwrap_or_default());
        out.extend_from_slice(escape);
        if escape == b"\\u" {
            out.extend_from_slice(format!("{byte:04x}").as_bytes());
        }
        plain = index + 1;
    }
    out.extend_from_slice(bytes.get(plain..).unwrap_or_default());
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
