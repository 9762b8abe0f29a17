//! JSON as it came from a peer: duplicate keys, lone surrogates and too deep nesting are refused, floats are kept.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Number, Value};

use crate::refusal::Refusal;

/// A JSON object; its keys are unique.
pub type Object = serde_json::Map<String, Value>;

/// How deep arrays and objects may be nested.
const MAX_DEPTH: usize = 100;

/// Parses one JSON object, refusing duplicate keys anywhere in it, lone surrogates, and nesting deeper than 100.
pub fn parse_object(raw: &[u8]) -> Result<Object, Refusal> {
    match parse_value(raw)? {
        Value::Object(object) => Ok(object),
        other => Err(Refusal::malformed("JSON", format!("{} where an object is needed", kind(&other)))),
    }
}

/// Parses any JSON value under the same rules.
pub fn parse_value(raw: &[u8]) -> Result<Value, Refusal> {
    let mut deserializer = serde_json::Deserializer::from_slice(raw);
    let value = Strict { depth: 0 }.deserialize(&mut deserializer).map_err(classify)?;
    deserializer.end().map_err(classify)?;
    Ok(value)
}

/// What kind of JSON value this is, for messages.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

fn classify(error: serde_json::Error) -> Refusal {
    match error.classify() {
        // Ours: the text is JSON, but not such as is taken.
        serde_json::error::Category::Data => Refusal::malformed("JSON", error.to_string()),
        _ => Refusal::NotJson(error.to_string()),
    }
}

/// Builds a [`Value`], looking at every key on the way.
#[derive(Clone, Copy)]
struct Strict {
    depth: usize,
}

impl Strict {
    fn deeper<E: serde::de::Error>(self) -> Result<Self, E> {
        if self.depth >= MAX_DEPTH {
            return Err(E::custom(format_args!("nested deeper than {MAX_DEPTH}")));
        }
        Ok(Self { depth: self.depth + 1 })
    }
}

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("a number out of range"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let inner = self.deeper()?;
        let mut array = Vec::new();
        while let Some(item) = items.next_element_seed(inner)? {
            array.push(item);
        }
        Ok(Value::Array(array))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let inner = self.deeper()?;
        let mut object = Object::new();
        while let Some(key) = entries.next_key::<String>()? {
            let value = entries.next_value_seed(inner)?;
            match object.entry(key) {
                serde_json::map::Entry::Vacant(entry) => {
                    entry.insert(value);
                }
                serde_json::map::Entry::Occupied(entry) => {
                    return Err(A::Error::custom(format_args!("the key {:?} stands twice", entry.key())));
                }
            }
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn hc_16_duplicate_keys_are_refused_anywhere() {
        for text in [r#"{"a":1,"a":2}"#, r#"{"x":[{"a":1,"\u0061":2}]}"#] {
            assert_eq!(parse_object(text.as_bytes()).unwrap_err().code(), "malformed", "{text}");
        }
    }

    #[test]
    fn hc_15_lone_surrogates_and_bad_utf8_are_refused() {
        for raw in [&br#"{"a":"\ud800"}"#[..], br#"{"a":"\udc00x"}"#, b"{\"a\":\"\xc0\xaf\"}", b"{\"a\":\"\xff\"}"] {
            assert_eq!(parse_object(raw).unwrap_err().code(), "not_json");
        }
        assert!(parse_object("{\"a\":\"\\u0000\\u2028\\u202e\"}".as_bytes()).is_ok());
    }

    #[test]
    fn hc_17_deep_nesting_is_refused_without_overflow() {
        for open in ["[", "{\"a\":"] {
            let text = format!("{{\"a\":{}", open.repeat(100_000));
            assert!(parse_object(text.as_bytes()).is_err());
        }
        let fits = format!("{{\"a\":{}{}}}", "[".repeat(99), "]".repeat(99));
        assert!(parse_object(fits.as_bytes()).is_ok());
        let too_deep = format!("{{\"a\":{}{}}}", "[".repeat(100), "]".repeat(100));
        assert_eq!(parse_object(too_deep.as_bytes()).unwrap_err().code(), "malformed");
    }

    #[test]
    fn only_objects_are_objects_and_only_json_is_json() {
        for (text, code) in
            [("[]", "malformed"), ("null", "malformed"), ("{", "not_json"), ("{} x", "not_json"), ("", "not_json")]
        {
            assert_eq!(parse_object(text.as_bytes()).unwrap_err().code(), code, "{text}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(raw in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_value(&raw);
        }

        #[test]
        fn agrees_with_serde_json_where_it_accepts(text in "[\\[\\]{}\",:0-9e.\\\\ua-c-]{0,40}") {
            if let Ok(value) = parse_value(text.as_bytes()) {
                prop_assert_eq!(value, serde_json::from_str::<Value>(&text).unwrap());
            }
        }
    }
}
