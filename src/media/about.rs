//! What servers say about a file besides its bytes: of what type it is and what it is called. Only what has a plain form is passed on.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde::{Deserialize, Serialize};

/// The type of what has none.
const BYTES: &str = "application/octet-stream";
/// How long the two parts of a type may be, in bytes.
const MAX_TOKEN: usize = 100;
/// How long a file's name may be, in characters.
const MAX_NAME: usize = 200;
/// What stays as it is in a name in a header.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_');

/// What is said about a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// Its type, as `image/png`.
    pub content_type: String,
    /// What it is called.
    pub file_name: Option<String>,
}

impl About {
    /// What the headers `Content-Type` and `Content-Disposition` say, as far as it is passed on.
    pub(super) fn read(content_type: Option<&str>, disposition: Option<&str>) -> Self {
        Self {
            content_type: content_type.and_then(plain_type).unwrap_or_else(|| BYTES.to_owned()),
            file_name: disposition.and_then(name),
        }
    }

    /// The `Content-Disposition` with which it is passed on: never to be shown as a page.
    pub fn disposition(&self) -> String {
        match &self.file_name {
            None => "attachment".to_owned(),
            Some(name) if name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte)) => {
                format!("attachment; filename={name}")
            }
            Some(name) => format!("attachment; filename*=utf-8''{}", utf8_percent_encode(name, PLAIN)),
        }
    }

    /// Whether it is a picture.
    pub fn is_image(&self) -> bool {
        self.content_type.starts_with("image/")
    }
}

/// A type of the form `type/subtype`, of text with its character set. What consists of parts is none that a file has.
fn plain_type(text: &str) -> Option<String> {
    let mut parts = text.split(';');
    let (kind, subtype) = parts.next()?.trim().split_once('/')?;
    let (kind, subtype) = (token(kind)?, token(subtype)?);
    if kind == "multipart" || kind == "message" {
        return None;
    }
    let charset = parts.find_map(|part| {
        let (name, value) = part.trim().split_once('=')?;
        token(value.trim_matches('"')).filter(|_| kind == "text" && name.eq_ignore_ascii_case("charset"))
    });
    Some(match charset {
        Some(charset) => format!("{kind}/{subtype}; charset={charset}"),
        None => format!("{kind}/{subtype}"),
    })
}

fn token(text: &str) -> Option<String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$&^_.+-".contains(&byte);
    ((1..=MAX_TOKEN).contains(&text.len()) && text.bytes().all(plain)).then(|| text.to_ascii_lowercase())
}

/// The file's name in a `Content-Disposition`, of which only the last part of a path is left.
fn name(disposition: &str) -> Option<String> {
    let (mut plain, mut extended) = (None, None);
    for (key, value) in parameters(disposition) {
        match key.as_str() {
            "filename" => plain = plain.or(Some(value)),
            "filename*" => extended = extended.or_else(|| decoded(&value)),
            _ => {}
        }
    }
    let name = extended.or(plain)?;
    let last = name.rsplit(['/', '\\']).next()?;
    let name: String = last.chars().filter(|c| !misleads(*c)).take(MAX_NAME).collect();
    let name = name.trim().trim_start_matches('.');
    (!name.is_empty()).then(|| name.to_owned())
}

/// Control characters, and those that turn the direction of writing, by which a name can hide its ending.
fn misleads(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

/// A value as RFC 8187 writes it.
fn decoded(value: &str) -> Option<String> {
    let (charset, rest) = value.split_once('\'')?;
    let (_, text) = rest.split_once('\'')?;
    let text = percent_decode_str(text).decode_utf8().ok()?;
    charset.eq_ignore_ascii_case("utf-8").then(|| text.into_owned())
}

/// The parameters after a header's value, with quotes and escapes taken away.
fn parameters(text: &str) -> Vec<(String, String)> {
    let mut parameters = Vec::new();
    let (mut key, mut value) = (String::new(), None::<String>);
    let (mut quoted, mut escaped) = (false, false);
    for c in text.chars().chain([';']) {
        match (c, &mut value) {
            (c, Some(value)) if escaped => {
                escaped = false;
                value.push(c);
            }
            ('\\', Some(_)) if quoted => escaped = true,
            ('"', Some(_)) => quoted = !quoted,
            (';', _) if !quoted => {
                if let Some(value) = value.take() {
                    parameters.push((key.trim().to_ascii_lowercase(), value.trim().to_owned()));
                }
                key.clear();
            }
            ('=', None) => value = Some(String::new()),
            (c, Some(value)) => value.push(c),
            (c, None) => key.push(c),
        }
    }
    parameters
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hc_59_only_types_of_a_plain_form_are_passed_on() {
        for (text, expected) in [
            ("image/png", "image/png"),
            ("IMAGE/JPEG; q=1", "image/jpeg"),
            ("image/svg+xml", "image/svg+xml"),
            ("text/plain; charset=UTF-8", "text/plain; charset=utf-8"),
            ("text/plain; charset=\"utf-8\"", "text/plain; charset=utf-8"),
            ("application/vnd.oasis.opendocument.text", "application/vnd.oasis.opendocument.text"),
            ("", BYTES),
            ("image", BYTES),
            ("image/", BYTES),
            ("image/png\r\nSet-Cookie: a=b", BYTES),
            ("image/p ng", BYTES),
            ("image/png/x", BYTES),
            ("multipart/mixed; boundary=x", BYTES),
            ("text/plain; charset=a b", "text/plain"),
            ("image/\u{e9}", BYTES),
        ] {
            assert_eq!(About::read(Some(text), None).content_type, expected, "{text}");
        }
        let long = format!("image/{}", "x".repeat(101));
        assert_eq!(About::read(Some(&long), None).content_type, BYTES);
        assert_eq!(About::read(None, None), About { content_type: BYTES.to_owned(), file_name: None });
    }

    #[test]
    fn hc_59_no_name_leads_out_of_a_folder_or_into_another_header() {
        for (text, expected) in [
            ("attachment; filename=cat.png", "attachment; filename=cat.png"),
            ("inline; filename=\"cat.png\"", "attachment; filename=cat.png"),
            ("inline", "attachment"),
            ("", "attachment"),
            ("attachment; filename=\"a;b\\\"c.txt\"", "attachment; filename*=utf-8''a%3Bb%22c.txt"),
            ("attachment; filename*=utf-8''%E2%82%AC.txt; filename=x", "attachment; filename*=utf-8''%E2%82%AC.txt"),
            ("attachment; filename*=latin1''%E4.txt; filename=x", "attachment; filename=x"),
            ("attachment; filename*=utf-8''%ff; filename=x", "attachment; filename=x"),
            ("attachment; filename=\"../../etc/passwd\"", "attachment; filename=passwd"),
            ("attachment; filename*=utf-8''..%2F..%5C.bashrc", "attachment; filename=bashrc"),
            ("attachment; filename=\"..\"", "attachment"),
            ("attachment; filename=\"a\r\nX: y\"", "attachment; filename*=utf-8''aX%3A%20y"),
            ("attachment; filename=\"exe.\u{202e}gpj\"", "attachment; filename=exe.gpj"),
            ("attachment; filename=\"open", "attachment"),
        ] {
            let about = About::read(None, Some(text));
            assert_eq!(about.disposition(), expected, "{text}");
            // What is passed on is read as the same.
            assert_eq!(About::read(None, Some(&about.disposition())), about);
        }
        let long = format!("attachment; filename={}", "x".repeat(100_000));
        assert_eq!(About::read(None, Some(&long)).file_name.unwrap().len(), MAX_NAME);
    }
}
