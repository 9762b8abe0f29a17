//! JSON from servers whose parsers take more than ours: what stands in it that we take from nobody is replaced, so that the event
//! around it can still be read. Its content hash is wrong then, and such an event is taken in its redacted form, as everywhere.

use std::fmt;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;

use super::canonical_text::escape_unit;
use super::parse::{Object, parse_object, parse_value};
use crate::refusal::Refusal;

/// How deep the text of one event may be nested; what is deeper is replaced.
const MAX_DEPTH: usize = 90;

/// Parses one event, if need be with replacements; the error is that of the strict parser. A key that stands twice in an object
/// has no replacement.
pub fn parse_leniently(raw: &str) -> Result<Object, Refusal> {
    parse_object(raw.as_bytes()).or_else(|refusal| parse_object(replaced(raw).as_bytes()).map_err(|_| refusal))
}

/// Parses the answer of a server: an entry of a list in it that cannot be read, not even with replacements, is left out alone.
pub fn parse_answer(raw: &[u8]) -> Result<Object, Refusal> {
    parse_object(raw).or_else(|refusal| in_pieces(raw).ok_or(refusal))
}

fn in_pieces(raw: &[u8]) -> Option<Object> {
    let Pieces(pieces) = serde_json::from_slice(raw).ok()?;
    let mut answer = Object::new();
    for (name, piece) in pieces {
        if answer.contains_key(&name) {
            return None;
        }
        let value = match serde_json::from_str::<Vec<&RawValue>>(piece.get()) {
            Ok(entries) => Value::Array(entries.into_iter().filter_map(|entry| value(entry.get()).ok()).collect()),
            Err(_) => value(piece.get()).ok()?,
        };
        answer.insert(name, value);
    }
    Some(answer)
}

/// The members of an object, still text, as often as they stand in it.
struct Pieces<'a>(Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Pieces<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Members)
    }
}

struct Members;

impl<'de> Visitor<'de> for Members {
    type Value = Pieces<'de>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members = Vec::new();
        while let Some(member) = map.next_entry()? {
            members.push(member);
        }
        Ok(Pieces(members))
    }
}

fn value(raw: &str) -> Result<Value, Refusal> {
    parse_value(raw.as_bytes()).or_else(|_| parse_value(replaced(raw).as_bytes()))
}

/// The text with halves of surrogate pairs replaced by U+FFFD, and what is nested too deeply and numbers beyond every double by
/// null. Of what is no JSON it makes something else that is none.
fn replaced(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let (mut at, mut depth) = (0_usize, 0_usize);
    let bytes = text.as_bytes();
    let from = |at: usize| text.get(at..).unwrap_or_default();
    while let Some(byte) = bytes.get(at) {
        let end = match byte {
            b'"' => at.saturating_add(string_len(from(at))),
            b'-' | b'0'..=b'9' => {
                let is_part = |byte: &u8| matches!(byte, b'0'..=b'9' | b'+' | b'-' | b'.' | b'e' | b'E');
                let rest = bytes.get(at..).unwrap_or_default();
                at.saturating_add(rest.iter().take_while(|byte| is_part(byte)).count())
            }
            _ => at.saturating_add(from(at).chars().next().map_or(1, char::len_utf8)),
        };
        let piece = text.get(at..end).unwrap_or_default();
        at = end;
        if matches!(byte, b'{' | b'[') {
            depth = depth.saturating_add(1);
            if depth == MAX_DEPTH {
                out.push_str("null");
            }
        }
        if depth < MAX_DEPTH {
            match byte {
                b'"' => write_string(piece, &mut out),
                b'-' | b'0'..=b'9' if piece.parse::<f64>().is_ok_and(f64::is_infinite) => out.push_str("null"),
                _ => out.push_str(piece),
            }
        }
        if matches!(byte, b'}' | b']') {
            depth = depth.saturating_sub(1);
        }
    }
    out
}

/// How long the string literal is with which a text begins.
fn string_len(text: &str) -> usize {
    let mut escaped = false;
    let end = text.bytes().skip(1).position(|byte| {
        let ends = byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        ends
    });
    end.map_or(text.len(), |end| end.saturating_add(2))
}

fn write_string(literal: &str, out: &mut String) {
    let mut rest = literal;
    while let Some((before, escape)) = rest.split_once('\\') {
        out.push_str(before);
        let length = match (escape_unit(escape), escape.get(5..).and_then(|next| next.strip_prefix('\\'))) {
            (Some(0xd800..=0xdbff), Some(next)) if matches!(escape_unit(next), Some(0xdc00..=0xdfff)) => 11,
            (Some(0xd800..=0xdfff), _) => {
                out.push('\u{fffd}');
                rest = escape.get(5..).unwrap_or_default();
                continue;
            }
            _ => escape.chars().next().map_or(0, char::len_utf8),
        };
        out.push('\\');
        out.push_str(escape.get(..length).unwrap_or_default());
        rest = escape.get(length..).unwrap_or_default();
    }
    out.push_str(rest);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn read(text: &str) -> Value {
        parse_leniently(text).map(Value::Object).unwrap()
    }

    #[test]
    fn hc_15_what_nobody_may_send_is_replaced_and_the_rest_stays() {
        for (text, expected) in [
            (r#"{"a":"x\ud800y"}"#, json!({ "a": "x\u{fffd}y" })),
            (
                r#"{"a\udc00":"\ud83d\ude00\ud83d\n\\ud800\"","b":[-1,2]}"#,
                json!({ "a\u{fffd}": "😀\u{fffd}\n\\ud800\"", "b": [-1, 2] }),
            ),
            (r#"{"a":1e999,"b":-1e999,"c":"1e999"}"#, json!({ "a": null, "b": null, "c": "1e999" })),
        ] {
            assert_eq!(read(text), expected, "{text}");
        }
        for levels in [150, 3_000] {
            let deep = format!(r#"{{"b":{}"}}"{},"a":"é"}}"#, r#"{"x":["#.repeat(levels), "]}".repeat(levels));
            let parsed = read(&deep);
            assert_eq!(parsed["a"], "é");
            assert!(parsed["b"]["x"][0]["x"].is_array());
        }
        // What can be read as it is stays as it is; what is no JSON, or has a key twice, is refused.
        assert_eq!(read(r#"{"a":"\ud83d\ude00"}"#), json!({ "a": "😀" }));
        for text in [r#"{"a":1,"a":"\ud800"}"#, r#"{"a":"\ud800"#, "", "[]", r#"{"a":"\ud80"}"#] {
            assert!(parse_leniently(text).is_err(), "{text}");
        }
    }

    #[test]
    fn hc_15_one_bad_entry_of_an_answer_fails_alone() {
        let answer = r#"{"pdus":[{"n":1},{"n":2,"n":2},{"n":3,"x":"\ud800"}],"state":"s"}"#;
        let expected = json!({ "pdus": [{ "n": 1 }, { "n": 3, "x": "\u{fffd}" }], "state": "s" });
        assert_eq!(Value::Object(parse_answer(answer.as_bytes()).unwrap()), expected);
        for bad in [r#"{"pdus":[1"#, "[]", r#"{"a":1,"a":2}"#] {
            assert!(parse_answer(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn never_panics_and_leaves_what_is_well_formed(raw in "[\\[\\]{}\",:0-9eE.\\\\udD8a-c é+-]{0,60}") {
            let replaced = replaced(&raw);
            if serde_json::from_str::<Value>(&raw).is_ok() {
                prop_assert_eq!(&replaced, &raw);
            }
            let _ = parse_answer(raw.as_bytes());
        }
    }
}
