//! Canonical JSON straight from text, as lenient as the parsers of the peers: of duplicate keys the last one counts, and a
//! lone surrogate stays the escape that it was, and a number beyond every double is null. It serves only to check the signature over a transaction, of which one bad
//! event must fail alone; what it accepts is parsed strictly afterwards.

use std::borrow::Cow;
use std::cmp::Ordering;

use crate::refusal::Refusal;

/// Deeper nesting than this is refused, long before the stack ends.
const MAX_DEPTH: usize = 200;
/// Up to here every integer has a form of its own (2^53).
const MAX_EXACT: i64 = 1 << 53;

/// The RFC 8785 form of the JSON text `raw`.
pub fn canonical_text(raw: &[u8]) -> Result<Vec<u8>, Refusal> {
    let text = std::str::from_utf8(raw).map_err(|error| Refusal::NotJson(error.to_string()))?;
    let mut reader = Reader { text, at: 0 };
    reader.white_space();
    let node = reader.node(0)?;
    reader.white_space();
    if reader.at != text.len() {
        return Err(reader.problem("something follows the JSON value"));
    }
    let mut out = Vec::with_capacity(raw.len());
    write_node(&node, &mut out);
    Ok(out)
}

enum Node<'a> {
    /// `null`, `true`, `false`, and numbers in their canonical form.
    Literal(Cow<'a, str>),
    Text(Text<'a>),
    Array(Vec<Node<'a>>),
    Object(Vec<(Text<'a>, Node<'a>)>),
}

/// A string.
enum Text<'a> {
    /// Without escapes: its canonical form is what stands between the quotes.
    Plain(&'a str),
    /// With escapes, as UTF-16 code units, so that lone surrogates have a place.
    Units(Vec<u16>),
}

impl Text<'_> {
    fn units(&self) -> Cow<'_, [u16]> {
        match self {
            Self::Plain(text) => Cow::Owned(text.encode_utf16().collect()),
            Self::Units(units) => Cow::Borrowed(units),
        }
    }

    fn order(&self, other: &Self) -> Ordering {
        match (self, other) {
            (Self::Plain(a), Self::Plain(b)) if a.is_ascii() && b.is_ascii() => a.cmp(b),
            _ => self.units().cmp(&other.units()),
        }
    }
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Reader<'a> {
    fn problem(&self, problem: &str) -> Refusal {
        Refusal::NotJson(format!("{problem} at byte {}", self.at))
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn next(&mut self) -> Option<u8> {
        let byte = self.peek()?;
        self.at += 1;
        Some(byte)
    }

    fn white_space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn node(&mut self, depth: usize) -> Result<Node<'a>, Refusal> {
        if depth > MAX_DEPTH {
            return Err(self.problem("nested too deeply"));
        }
        match self.peek() {
            Some(b'{') => self.object(depth),
            Some(b'[') => self.array(depth),
            Some(b'"') => Ok(Node::Text(self.string()?)),
            Some(b'-' | b'0'..=b'9') => self.number(),
            _ => self.keyword(),
        }
    }

    fn keyword(&mut self) -> Result<Node<'a>, Refusal> {
        let rest = self.text.get(self.at..).unwrap_or_default();
        let Some(word) = ["null", "true", "false"].into_iter().find(|word| rest.starts_with(word)) else {
            return Err(self.problem("no JSON value"));
        };
        self.at += word.len();
        Ok(Node::Literal(Cow::Borrowed(word)))
    }

    fn number(&mut self) -> Result<Node<'a>, Refusal> {
        let start = self.at;
        while matches!(self.peek(), Some(b'-' | b'+' | b'.' | b'e' | b'E' | b'0'..=b'9')) {
            self.at += 1;
        }
        let text = self.text.get(start..self.at).unwrap_or_default();
        // The strict grammar of numbers is serde_json's business.
        serde_json::from_str::<&serde_json::value::RawValue>(text).map_err(|_| self.problem("a bad number"))?;
        if let Ok(integer) = text.parse::<i64>()
            && (-MAX_EXACT..=MAX_EXACT).contains(&integer)
        {
            return Ok(Node::Literal(Cow::Owned(integer.to_string())));
        }
        // A number beyond every double is infinite to the peers' parser, and infinity is written as null.
        let number = text.parse::<f64>().ok().filter(|number| number.is_finite());
        Ok(Node::Literal(number.map_or(Cow::Borrowed("null"), |number| {
            Cow::Owned(ryu_js::Buffer::new().format_finite(number).to_owned())
        })))
    }

    fn array(&mut self, depth: usize) -> Result<Node<'a>, Refusal> {
        self.at += 1;
        let mut items = Vec::new();
        self.white_space();
        if self.peek() == Some(b']') {
            self.at += 1;
            return Ok(Node::Array(items));
        }
        loop {
            self.white_space();
            items.push(self.node(depth + 1)?);
            self.white_space();
            match self.next() {
                Some(b',') => {}
                Some(b']') => return Ok(Node::Array(items)),
                _ => return Err(self.problem("an array that is not closed")),
            }
        }
    }

    fn object(&mut self, depth: usize) -> Result<Node<'a>, Refusal> {
        self.at += 1;
        let mut entries = Vec::new();
        self.white_space();
        if self.peek() == Some(b'}') {
            self.at += 1;
            return Ok(Node::Object(entries));
        }
        loop {
            self.white_space();
            if self.peek() != Some(b'"') {
                return Err(self.problem("a key that is no string"));
            }
            let key = self.string()?;
            self.white_space();
            if self.next() != Some(b':') {
                return Err(self.problem("a key without a value"));
            }
            self.white_space();
            entries.push((key, self.node(depth + 1)?));
            self.white_space();
            match self.next() {
                Some(b',') => {}
                Some(b'}') => break,
                _ => return Err(self.problem("an object that is not closed")),
            }
        }
        entries.sort_by(|(a, _), (b, _)| a.order(b));
        // The sort is stable, so of equal keys the last one in the text is the last one here.
        let mut unique: Vec<(Text<'a>, Node<'a>)> = Vec::with_capacity(entries.len());
        for entry in entries {
            match unique.last_mut() {
                Some(last) if last.0.order(&entry.0) == Ordering::Equal => *last = entry,
                _ => unique.push(entry),
            }
        }
        Ok(Node::Object(unique))
    }

    fn string(&mut self) -> Result<Text<'a>, Refusal> {
        self.at += 1;
        let start = self.at;
        loop {
            match self.next() {
                Some(b'"') => return Ok(Text::Plain(self.text.get(start..self.at - 1).unwrap_or_default())),
                Some(b'\\') => break,
                Some(byte) if byte >= 0x20 => {}
                _ => return Err(self.problem("a string that is not closed, or a control character in it")),
            }
        }
        let mut units: Vec<u16> = self.text.get(start..self.at - 1).unwrap_or_default().encode_utf16().collect();
        units.push(self.escape()?);
        loop {
            let plain = self.at;
            while !matches!(self.peek(), None | Some(b'"' | b'\\' | 0..=0x1f)) {
                self.at += 1;
            }
            units.extend(self.text.get(plain..self.at).unwrap_or_default().encode_utf16());
            match self.next() {
                Some(b'"') => return Ok(Text::Units(units)),
                Some(b'\\') => units.push(self.escape()?),
                _ => return Err(self.problem("a string that is not closed, or a control character in it")),
            }
        }
    }

    /// What follows a backslash.
    fn escape(&mut self) -> Result<u16, Refusal> {
        Ok(match self.next() {
            Some(byte @ (b'"' | b'\\' | b'/')) => u16::from(byte),
            Some(b'b') => 0x08,
            Some(b'f') => 0x0c,
            Some(b'n') => 0x0a,
            Some(b'r') => 0x0d,
            Some(b't') => 0x09,
            Some(b'u') => {
                let digits = self.text.get(self.at..self.at + 4).filter(|digits| !digits.starts_with('+'));
                let unit = digits.and_then(|digits| u16::from_str_radix(digits, 16).ok());
                self.at += 4;
                unit.ok_or_else(|| self.problem("a bad \\u escape"))?
            }
            _ => return Err(self.problem("a bad escape")),
        })
    }
}

fn write_node(node: &Node<'_>, out: &mut Vec<u8>) {
    match node {
        Node::Literal(text) => out.extend_from_slice(text.as_bytes()),
        Node::Text(text) => write_text(text, out),
        Node::Array(items) => {
            out.push(b'[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    out.push(b',');
                }
                write_node(item, out);
            }
            out.push(b']');
        }
        Node::Object(entries) => {
            out.push(b'{');
            for (index, (key, value)) in entries.iter().enumerate() {
                if index > 0 {
                    out.push(b',');
                }
                write_text(key, out);
                out.push(b':');
                write_node(value, out);
            }
            out.push(b'}');
        }
    }
}

fn write_text(text: &Text<'_>, out: &mut Vec<u8>) {
    out.push(b'"');
    match text {
        Text::Plain(plain) => out.extend_from_slice(plain.as_bytes()),
        Text::Units(units) => {
            for unit in char::decode_utf16(units.iter().copied()) {
                match unit {
                    Ok('"') => out.extend_from_slice(b"\\\""),
                    Ok('\\') => out.extend_from_slice(b"\\\\"),
                    Ok('\u{8}') => out.extend_from_slice(b"\\b"),
                    Ok('\u{c}') => out.extend_from_slice(b"\\f"),
                    Ok('\n') => out.extend_from_slice(b"\\n"),
                    Ok('\r') => out.extend_from_slice(b"\\r"),
                    Ok('\t') => out.extend_from_slice(b"\\t"),
                    Ok(control) if control < ' ' => {
                        out.extend_from_slice(format!("\\u{:04x}", u32::from(control)).as_bytes());
                    }
                    Ok(character) => out.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes()),
                    Err(lone) => {
                        out.extend_from_slice(format!("\\u{:04x}", lone.unpaired_surrogate()).as_bytes());
                    }
                }
            }
        }
    }
    out.push(b'"');
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn canonical(text: &str) -> String {
        String::from_utf8(canonical_text(text.as_bytes()).unwrap()).unwrap()
    }

    #[test]
    fn gives_the_peers_canonical_forms() {
        let vectors: Vec<serde_json::Value> =
            serde_json::from_str(include_str!("../../tests/vectors/eigen-canonical-json.json")).unwrap();
        for vector in &vectors {
            let (Some(text), Some(expected)) = (vector["json_text"].as_str(), vector["eigen_canonical"].as_str())
            else {
                continue;
            };
            assert_eq!(canonical(text), expected, "for {text}");
        }
        assert!(vectors.len() > 5);
    }

    #[test]
    fn hc_16_of_duplicate_keys_the_last_one_counts() {
        assert_eq!(canonical(r#"{"b":1,"a":2,"b":[{"c":1,"c":2}]}"#), r#"{"a":2,"b":[{"c":2}]}"#);
        assert_eq!(canonical(r#"{"a":1,"\u0061":2}"#), r#"{"a":2}"#);
    }

    #[test]
    fn hc_15_a_lone_surrogate_stays_an_escape() {
        assert_eq!(canonical(r#"{"a":"x\uD800y"}"#), r#"{"a":"x\ud800y"}"#);
        assert_eq!(canonical(r#""\ud83d\ude00\n\u001f/""#), "\"😀\\n\\u001f/\"");
    }

    #[test]
    fn hc_17_deep_nesting_is_refused() {
        let deep = "[".repeat(100_000);
        assert!(matches!(canonical_text(deep.as_bytes()), Err(Refusal::NotJson(_))));
    }

    #[test]
    fn refuses_what_is_no_json() {
        for text in
            ["", "{", "[1,]", "{\"a\":}", "01", "1.", "+1", "\"\\u12\"", "\"\\u+123\"", "1 2", "nul", "\"\u{1}\""]
        {
            assert!(canonical_text(text.as_bytes()).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(raw in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = canonical_text(&raw);
        }

        #[test]
        fn never_panics_on_json_like_text(raw in "[\\[\\]{}\",:0-9eE.\\\\udD8a-c +-]{0,60}") {
            if let Ok(once) = canonical_text(raw.as_bytes()) {
                prop_assert_eq!(canonical_text(&once).unwrap(), once);
            }
        }
    }
}
