//! JSON as it came from a peer: duplicate keys, lone surrogates and too deep nesting are refused, floats are kept.

use crate::refusal::Refusal;

/// A JSON object; its keys are unique.
pub type Object = serde_json::Map<String, serde_json::Value>;

/// Parses one JSON object, refusing duplicate keys anywhere in it, lone surrogates, and nesting deeper than 100.
pub fn parse_object(_raw: &[u8]) -> Result<Object, Refusal> {
    unimplemented!()
}

/// Parses any JSON value under the same rules.
pub fn parse_value(_raw: &[u8]) -> Result<serde_json::Value, Refusal> {
    unimplemented!()
}
