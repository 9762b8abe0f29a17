//! Canonical JSON straight from text, as lenient as the parsers of the peers: of duplicate keys the last one counts, a lone
//! surrogate stays the escape that it was, and a number beyond every double is null. It serves only to check the signature
//! over a transaction, of which one bad event must fail alone; what it accepts is parsed strictly afterwards.
//!
//! Nothing is proved of the sender yet, so no tree is built: the canonical form is written as the text is read, and only
//! the keys of objects that are still open are remembered besides.

use std::cmp::Ordering;
use std::ops::Range;

use super::canonical::write_escaped;
use crate::refusal::Refusal;

/// Deeper nesting than this is refused, long before the stack ends.
const MAX_DEPTH: usize = 200;
/// An integer of as many digits is below 2^53, so that what stands in the text is its canonical form.
const EXACT_DIGITS: usize = 15;

/// The RFC 8785 form of the JSON text `raw`.
pub fn canonical_text(raw: &[u8]) -> Result<Vec<u8>, Refusal> {
    let text = std::str::from_utf8(raw).map_err(|error| Refusal::NotJson(error.to_string()))?;
    let mut reader = Reader { text, at: 0, out: Vec::with_capacity(raw.len()) };
    reader.value(0)?;
    if reader.at != text.len() {
        return Err(reader.problem("something follows the JSON value"));
    }
    Ok(reader.out)
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
    out: Vec<u8>,
}

/// Where an entry of an object stands in what was written.
struct Entry {
    key: Range<usize>,
    end: usize,
}

impl Reader<'_> {
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

    /// The next byte that is no white space.
    fn next_token(&mut self) -> Option<u8> {
        self.white_space();
        self.next()
    }

    fn white_space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn read(&self, range: Range<usize>) -> &str {
        self.text.get(range).unwrap_or_default()
    }

    /// One value and the white space around it.
    fn value(&mut self, depth: usize) -> Result<(), Refusal> {
        if depth > MAX_DEPTH {
            return Err(self.problem("nested too deeply"));
        }
        self.white_space();
        match self.peek() {
            Some(b'{') => self.object(depth)?,
            Some(b'[') => self.array(depth)?,
            Some(b'"') => self.string()?,
            Some(b'-' | b'0'..=b'9') => self.number()?,
            _ => self.keyword()?,
        }
        self.white_space();
        Ok(())
    }

    fn keyword(&mut self) -> Result<(), Refusal> {
        let rest = self.read(self.at..self.text.len());
        let Some(word) = ["null", "true", "false"].into_iter().find(|word| rest.starts_with(word)) else {
            return Err(self.problem("no JSON value"));
        };
        self.at += word.len();
        self.out.extend_from_slice(word.as_bytes());
        Ok(())
    }

    fn number(&mut self) -> Result<(), Refusal> {
        let start = self.at;
        let negative = self.peek() == Some(b'-');
        if negative {
            self.at += 1;
        }
        let leading_zero = self.peek() == Some(b'0');
        let digits = self.digits();
        if digits == 0 || (leading_zero && digits > 1) {
            return Err(self.problem("a bad number"));
        }
        let mut integer = true;
        if self.peek() == Some(b'.') {
            self.at += 1;
            integer = false;
            if self.digits() == 0 {
                return Err(self.problem("a bad number"));
            }
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.at += 1;
            integer = false;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            if self.digits() == 0 {
                return Err(self.problem("a bad number"));
            }
        }
        let text = self.text.get(start..self.at).unwrap_or_default();
        if integer && digits <= EXACT_DIGITS && !(negative && leading_zero) {
            self.out.extend_from_slice(text.as_bytes());
            return Ok(());
        }
        // A number beyond every double is infinite to the peers' parser, and infinity is written as null.
        match text.parse::<f64>().ok().filter(|number| number.is_finite()) {
            Some(number) => self.out.extend_from_slice(ryu_js::Buffer::new().format_finite(number).as_bytes()),
            None => self.out.extend_from_slice(b"null"),
        }
        Ok(())
    }

    /// How many digits stand here.
    fn digits(&mut self) -> usize {
        let start = self.at;
        while matches!(self.peek(), Some(b'0'..=b'9')) {
            self.at += 1;
        }
        self.at - start
    }

    fn array(&mut self, depth: usize) -> Result<(), Refusal> {
        self.at += 1;
        self.out.push(b'[');
        self.white_space();
        if self.peek() == Some(b']') {
            self.at += 1;
            self.out.push(b']');
            return Ok(());
        }
        loop {
            self.value(depth + 1)?;
            match self.next() {
                Some(b',') => self.out.push(b','),
                Some(b']') => {
                    self.out.push(b']');
                    return Ok(());
                }
                _ => return Err(self.problem("an array that is not closed")),
            }
        }
    }

    fn object(&mut self, depth: usize) -> Result<(), Refusal> {
        self.at += 1;
        let start = self.out.len();
        self.out.push(b'{');
        self.white_space();
        if self.peek() == Some(b'}') {
            self.at += 1;
            self.out.push(b'}');
            return Ok(());
        }
        let mut entries: Vec<Entry> = Vec::new();
        let mut in_order = true;
        loop {
            self.white_space();
            if self.peek() != Some(b'"') {
                return Err(self.problem("a key that is no string"));
            }
            let key_start = self.out.len();
            self.string()?;
            let key = key_start..self.out.len();
            if self.next_token() != Some(b':') {
                return Err(self.problem("a key without a value"));
            }
            self.out.push(b':');
            self.value(depth + 1)?;
            in_order =
                in_order && entries.last().is_none_or(|last| key_order(&self.out, &last.key, &key) == Ordering::Less);
            entries.push(Entry { key, end: self.out.len() });
            match self.next() {
                Some(b',') => self.out.push(b','),
                Some(b'}') => {
                    self.out.push(b'}');
                    break;
                }
                _ => return Err(self.problem("an object that is not closed")),
            }
        }
        if !in_order {
            self.sort(start, entries);
        }
        Ok(())
    }

    /// Puts the entries of the object that was written last into their order.
    fn sort(&mut self, start: usize, mut entries: Vec<Entry>) {
        entries.sort_by(|a, b| key_order(&self.out, &a.key, &b.key));
        let mut sorted = Vec::with_capacity(self.out.len() - start);
        let mut entries = entries.iter().peekable();
        while let Some(entry) = entries.next() {
            // The sort is stable, so of equal keys the last one in the text is the last one here.
            if entries.peek().is_some_and(|next| key_order(&self.out, &entry.key, &next.key) == Ordering::Equal) {
                continue;
            }
            sorted.push(if sorted.is_empty() { b'{' } else { b',' });
            sorted.extend_from_slice(self.out.get(entry.key.start..entry.end).unwrap_or_default());
        }
        sorted.push(b'}');
        self.out.truncate(start);
        self.out.extend_from_slice(&sorted);
    }

    fn string(&mut self) -> Result<(), Refusal> {
        self.at += 1;
        self.out.push(b'"');
        loop {
            let plain = self.at;
            while !matches!(self.peek(), None | Some(b'"' | b'\\' | 0..=0x1f)) {
                self.at += 1;
            }
            self.out.extend_from_slice(self.text.as_bytes().get(plain..self.at).unwrap_or_default());
            match self.next() {
                Some(b'"') => {
                    self.out.push(b'"');
                    return Ok(());
                }
                Some(b'\\') => self.escaped()?,
                _ => return Err(self.problem("a string that is not closed, or a control character in it")),
            }
        }
    }

    /// What a backslash begins, and the other half of a pair of surrogates.
    fn escaped(&mut self) -> Result<(), Refusal> {
        let unit = self.escape()?;
        let mut units = vec![unit];
        if matches!(unit, 0xd800..=0xdbff) && self.read(self.at..self.at + 2) == "\\u" {
            let behind_first = self.at;
            self.at += 1;
            match self.escape()? {
                second @ 0xdc00..=0xdfff => units.push(second),
                // It stands for itself.
                _ => self.at = behind_first,
            }
        }
        match String::from_utf16(&units) {
            Ok(text) => write_escaped(&text, &mut self.out),
            Err(_) => self.out.extend_from_slice(format!("\\u{unit:04x}").as_bytes()),
        }
        Ok(())
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

/// The code unit of an escape `uXXXX` at the beginning of a text, behind its backslash.
pub(super) fn escape_unit(text: &str) -> Option<u16> {
    let digits = text.strip_prefix('u')?.get(..4)?;
    let is_hex = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_hex.then(|| u16::from_str_radix(digits, 16).ok()).flatten()
}

/// The order of two keys that were written, by the UTF-16 code units that they stand for.
fn key_order(out: &[u8], a: &Range<usize>, b: &Range<usize>) -> Ordering {
    let inside = |key: &Range<usize>| out.get(key.start + 1..key.end - 1).unwrap_or_default();
    let (a, b) = (inside(a), inside(b));
    let plain = !a.contains(&b'\\') && !b.contains(&b'\\');
    if plain && (a.is_ascii() || b.is_ascii()) { a.cmp(b) } else { units(a).cmp(&units(b)) }
}

/// The code units that a string in its canonical form stands for.
fn units(canonical: &[u8]) -> Vec<u16> {
    let canonical = std::str::from_utf8(canonical).unwrap_or_default();
    let mut units = Vec::with_capacity(canonical.len());
    let mut reader = Reader { text: canonical, at: 0, out: Vec::new() };
    while reader.at < canonical.len() {
        let plain = reader.at;
        while !matches!(reader.peek(), None | Some(b'\\')) {
            reader.at += 1;
        }
        units.extend(reader.read(plain..reader.at).encode_utf16());
        if reader.next().is_some() {
            units.push(reader.escape().unwrap_or_default());
        }
    }
    units
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
    fn hc_16_keys_are_ordered_by_what_they_stand_for() {
        assert_eq!(canonical(r#"{"a\"":1,"a!":2,"a#":3,"a\n":4}"#), r#"{"a\n":4,"a!":2,"a\"":1,"a#":3}"#);
        assert_eq!(
            canonical(r#"{"\ud800":1,"\ud800\udc00":2,"\ud800a":3}"#),
            "{\"\\ud800\":1,\"\\ud800a\":3,\"\u{10000}\":2}"
        );
        assert_eq!(
            canonical(r#"{"b":1,"a":{"d":1,"c":2},"b":{"f":1,"e":2}}"#),
            r#"{"a":{"c":2,"d":1},"b":{"e":2,"f":1}}"#
        );
    }

    #[test]
    fn hc_15_halves_of_pairs_that_do_not_meet_stay_escapes() {
        assert_eq!(canonical(r#""\uD800\n\udc00\ud83d\uD83D\ude00\udbff""#), "\"\\ud800\\n\\udc00\\ud83d😀\\udbff\"");
    }

    #[test]
    fn hc_17_many_small_values_cost_no_more_than_their_text() {
        let text = format!("[{}0]", "0,".repeat(100_000));
        let canonical = canonical_text(text.as_bytes()).unwrap();
        assert_eq!((canonical.len(), canonical.capacity()), (text.len(), text.len()));
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
