//! The form in which servers give each other media: `multipart/mixed` with a part of JSON, then the file, or where the file is.
//! Read as it comes, in any pieces; pure.
//! <https://spec.matrix.org/latest/server-server-api/#get_matrixfederationv1mediadownloadmediaid>

use bytes::{Bytes, BytesMut};

use super::about::About;

/// How long a boundary may be (RFC 2046).
const MAX_BOUNDARY: usize = 70;
/// How long the headers of a part may be.
const MAX_HEADERS: usize = 8 << 10;
/// How much may come before the second part: the JSON.
const MAX_BEFORE: usize = 64 << 10;

/// What is wrong with an answer that should be of this form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Malformed {
    #[error("it is not multipart/mixed with a boundary")]
    NoBoundary,
    #[error("what comes before the file is too long")]
    TooLong,
    #[error("it ends before the file does")]
    Broken,
    #[error("it has no second part")]
    NoFile,
}

/// What was found next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// More must come first.
    Nothing,
    /// The file begins.
    File(About),
    /// The file is elsewhere.
    Elsewhere(String),
    /// Some of the file.
    Bytes(Bytes),
    /// The file has ended.
    End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// Before the first part, or in it.
    Before,
    /// Behind a boundary: the headers of a part.
    Headers,
    /// In the file.
    File,
    /// Behind it.
    End,
}

/// A reader of one answer.
#[derive(Debug)]
pub(super) struct Parts {
    /// A line's end and the boundary.
    delimiter: Vec<u8>,
    read: BytesMut,
    at: At,
    /// How many parts have begun.
    parts: usize,
    /// How much came before the file.
    before: usize,
}

/// The boundary that a `Content-Type` names.
pub(super) fn boundary(content_type: &str) -> Result<String, Malformed> {
    let (kind, rest) = content_type.split_once(';').ok_or(Malformed::NoBoundary)?;
    let boundary = rest.split(';').find_map(|part| {
        let (name, value) = part.trim().split_once('=')?;
        name.eq_ignore_ascii_case("boundary").then(|| value.trim().trim_matches('"'))
    });
    let plain = |text: &&str| (1..=MAX_BOUNDARY).contains(&text.len()) && text.bytes().all(|b| (32..127).contains(&b));
    let boundary = boundary.filter(plain).filter(|_| kind.trim().eq_ignore_ascii_case("multipart/mixed"));
    boundary.map(str::to_owned).ok_or(Malformed::NoBoundary)
}

impl Parts {
    pub(super) fn new(boundary: &str) -> Self {
        Self {
            delimiter: format!("\r\n--{boundary}").into_bytes(),
            // The first boundary has no line before it.
            read: BytesMut::from(b"\r\n".as_slice()),
            at: At::Before,
            parts: 0,
            before: 0,
        }
    }

    /// More of the answer has come.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.read.extend_from_slice(bytes);
    }

    /// The answer has ended.
    pub(super) fn finish(&self) -> Result<(), Malformed> {
        match self.at {
            At::End => Ok(()),
            At::File => Err(Malformed::Broken),
            At::Before | At::Headers => Err(Malformed::NoFile),
        }
    }

    /// What comes next of what has come so far. It is asked until it is nothing, or the end.
    pub(super) fn next(&mut self) -> Result<Found, Malformed> {
        loop {
            match self.at {
                At::Before => match self.delimiter() {
                    Delimiter::At(start, Behind::Part(length)) => self.begin_part(start.saturating_add(length))?,
                    Delimiter::At(_, Behind::Last) => return Err(Malformed::NoFile),
                    Delimiter::NotBefore(safe) => {
                        self.skip(safe)?;
                        return Ok(Found::Nothing);
                    }
                },
                At::Headers => {
                    let Some((headers, length)) = self.headers()? else { return Ok(Found::Nothing) };
                    self.skip(length)?;
                    if self.parts < 2 {
                        // What the first part says is not used for anything yet. It may be empty, and its end the line's.
                        self.at = At::Before;
                        continue;
                    }
                    if let Some(location) = headers.location {
                        self.at = At::End;
                        return Ok(Found::Elsewhere(location));
                    }
                    self.at = At::File;
                    return Ok(Found::File(About::read(
                        headers.content_type.as_deref(),
                        headers.disposition.as_deref(),
                    )));
                }
                At::File => {
                    return Ok(match self.delimiter() {
                        Delimiter::At(0, _) => {
                            self.at = At::End;
                            self.read.clear();
                            Found::End
                        }
                        Delimiter::At(start, _) | Delimiter::NotBefore(start) if start > 0 => {
                            Found::Bytes(self.read.split_to(start).freeze())
                        }
                        _ => Found::Nothing,
                    });
                }
                At::End => {
                    self.read.clear();
                    return Ok(Found::End);
                }
            }
        }
    }

    fn skip(&mut self, length: usize) -> Result<(), Malformed> {
        self.before = self.before.saturating_add(length);
        let _ = self.read.split_to(length.min(self.read.len()));
        if self.before > MAX_BEFORE { Err(Malformed::TooLong) } else { Ok(()) }
    }

    fn begin_part(&mut self, length: usize) -> Result<(), Malformed> {
        self.parts = self.parts.saturating_add(1);
        self.at = At::Headers;
        self.skip(length)
    }

    /// Where the next boundary is.
    fn delimiter(&self) -> Delimiter {
        let mut from = 0_usize;
        loop {
            let rest = self.read.get(from..).unwrap_or_default();
            let Some(found) = memchr::memmem::find(rest, &self.delimiter) else {
                // Its beginning may be at the end.
                let safe = self.read.len().saturating_sub(self.delimiter.len().saturating_sub(1));
                return Delimiter::NotBefore(safe.max(from));
            };
            let start = from.saturating_add(found);
            let behind = self.read.get(start.saturating_add(self.delimiter.len())..).unwrap_or_default();
            match behind_delimiter(behind) {
                Some(Ok(Behind::Part(padding))) => {
                    return Delimiter::At(start, Behind::Part(self.delimiter.len().saturating_add(padding)));
                }
                Some(Ok(Behind::Last)) => return Delimiter::At(start, Behind::Last),
                // Of another, longer boundary.
                Some(Err(())) => from = start.saturating_add(1),
                None => return Delimiter::NotBefore(start),
            }
        }
    }

    /// The headers of the part, and how long they are with the empty line behind them.
    fn headers(&self) -> Result<Option<(Headers, usize)>, Malformed> {
        // The line of the boundary ends where the headers begin, so that there may be none.
        let Some(end) = memchr::memmem::find(&self.read, b"\r\n\r\n") else {
            return if self.read.len() > MAX_HEADERS { Err(Malformed::TooLong) } else { Ok(None) };
        };
        if end > MAX_HEADERS {
            return Err(Malformed::TooLong);
        }
        let mut headers = Headers::default();
        let text = String::from_utf8_lossy(self.read.get(..end).unwrap_or_default());
        for (name, value) in text.split("\r\n").filter_map(|line| line.split_once(':')) {
            let value = Some(value.trim().to_owned());
            match name.trim().to_ascii_lowercase().as_str() {
                "content-type" => headers.content_type = value,
                "content-disposition" => headers.disposition = value,
                "location" => headers.location = value,
                _ => {}
            }
        }
        Ok(Some((headers, end.saturating_add(4))))
    }
}

#[derive(Debug, Default)]
struct Headers {
    content_type: Option<String>,
    disposition: Option<String>,
    location: Option<String>,
}

/// Where a boundary is.
enum Delimiter {
    /// It begins there, and this is behind it.
    At(usize, Behind),
    /// There is none that begins before this.
    NotBefore(usize),
}

/// What is behind a boundary.
enum Behind {
    /// A part: the line of the boundary ends after so many bytes.
    Part(usize),
    /// Nothing: it is the last one.
    Last,
}

/// What the bytes behind a boundary say; none while they are too few, an error when it is none.
fn behind_delimiter(bytes: &[u8]) -> Option<Result<Behind, ()>> {
    let padding = bytes.iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
    let rest = bytes.get(padding..).unwrap_or_default();
    match rest {
        // The line's end stays, so that a part without headers has its empty line.
        [b'\r', b'\n', ..] => Some(Ok(Behind::Part(padding))),
        [b'-', b'-', ..] if padding == 0 => Some(Ok(Behind::Last)),
        [] | [b'\r'] | [b'-'] if padding < MAX_HEADERS => None,
        _ => Some(Err(())),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What is said of a file, the file, and where else it is.
    type Read = (Option<About>, Vec<u8>, Option<String>);

    /// All that is found when the answer comes in pieces of this length.
    fn read(boundary: &str, answer: &[u8], piece: usize) -> Result<Read, Malformed> {
        let mut parts = Parts::new(boundary);
        let (mut about, mut file) = (None, Vec::new());
        for chunk in answer.chunks(piece) {
            parts.push(chunk);
            loop {
                match parts.next()? {
                    Found::Nothing | Found::End => break,
                    Found::File(found) => about = Some(found),
                    Found::Elsewhere(location) => return Ok((about, file, Some(location))),
                    Found::Bytes(bytes) => file.extend_from_slice(&bytes),
                }
            }
        }
        parts.finish()?;
        Ok((about, file, None))
    }

    fn answer(file: &[u8]) -> Vec<u8> {
        let mut answer = b"--b\r\nContent-Type: application/json\r\n\r\n{}\r\n--b\r\nContent-Type: image/png\r\n\
                           Content-Disposition: inline; filename=cat.png\r\n\r\n"
            .to_vec();
        answer.extend_from_slice(file);
        answer.extend_from_slice(b"\r\n--b--\r\n");
        answer
    }

    #[test]
    fn a_file_is_read_in_pieces_of_any_length() {
        let file = b"one\r\ntwo\r\n--bc\r\n--\r\n-b\r\n--b-c\r\n";
        let answer = answer(file);
        for piece in 1..=answer.len() {
            let (about, read, _) = read("b", &answer, piece).unwrap();
            assert_eq!(
                (about.unwrap().content_type.as_str(), read.as_slice()),
                ("image/png", file.as_slice()),
                "{piece}"
            );
        }
        let (_, nothing, _) = read("b", &super::tests::answer(b""), 7).unwrap();
        assert!(nothing.is_empty());
    }

    #[test]
    fn forms_that_others_write_are_read() {
        for text in [
            "preamble\r\n--b \t\r\ncontent-type: application/json\r\n\r\n{}\r\n--b\r\n\r\nfile\r\n--b--",
            "--b\r\n\r\n\r\n--b\r\nContent-Type:image/png\r\n\r\nfile\r\n--b\r\nX: y\r\n\r\nthird\r\n--b--",
            "\r\n--b\r\nContent-Type: application/json\r\n\r\n\r\n--b\r\nX: y\r\n\r\nfile\r\n--b--\r\nepilogue",
        ] {
            for piece in [1, 3, 1000] {
                let (about, file, _) = read("b", text.as_bytes(), piece).unwrap();
                assert_eq!((about.is_some(), file.as_slice()), (true, b"file".as_slice()), "{text}");
            }
        }
        let elsewhere = "--b\r\nContent-Type: application/json\r\n\r\n{}\r\n--b\r\nLocation: https://cdn.example/x\r\n\r\n\r\n--b--";
        for piece in [1, 1000] {
            let (_, _, location) = read("b", elsewhere.as_bytes(), piece).unwrap();
            assert_eq!(location.as_deref(), Some("https://cdn.example/x"));
        }
    }

    #[test]
    fn hc_59_hostile_forms_are_named_and_end() {
        let long = "x".repeat(100_000);
        for (text, problem) in [
            (String::new(), Malformed::NoFile),
            ("no parts at all".to_owned(), Malformed::NoFile),
            ("--b--".to_owned(), Malformed::NoFile),
            ("--b\r\n\r\n{}\r\n--b--".to_owned(), Malformed::NoFile),
            ("--b\r\n\r\n{}\r\n--b\r\nX: y".to_owned(), Malformed::NoFile),
            ("--b\r\n\r\n{}\r\n--b\r\nX: y\r\n\r\nfile".to_owned(), Malformed::Broken),
            ("--b\r\n\r\n{}\r\n--b\r\nX: y\r\n\r\nfile\r\n--b".to_owned(), Malformed::Broken),
            (long.clone(), Malformed::TooLong),
            (format!("--b\r\n\r\n{long}\r\n--b\r\n\r\nfile\r\n--b--"), Malformed::TooLong),
            (format!("--b\r\nX: {long}\r\n\r\n{{}}\r\n--b\r\n\r\nfile\r\n--b--"), Malformed::TooLong),
            (format!("--b\r\n\r\n{{}}\r\n--b\r\nX: {long}\r\n\r\nfile\r\n--b--"), Malformed::TooLong),
            (format!("--b{}\r\n\r\n{{}}\r\n--b\r\n\r\nfile\r\n--b--", " ".repeat(100_000)), Malformed::TooLong),
        ] {
            for piece in [1, 5, 1 << 20] {
                assert_eq!(read("b", text.as_bytes(), piece).unwrap_err(), problem, "{:.60}", text);
            }
        }
    }

    #[test]
    fn the_boundary_is_what_the_header_names() {
        for (text, expected) in [
            ("multipart/mixed; boundary=abc", Some("abc")),
            ("Multipart/Mixed;charset=x; Boundary=\"a b'c\"", Some("a b'c")),
            ("multipart/form-data; boundary=abc", None),
            ("multipart/mixed", None),
            ("multipart/mixed; boundary=", None),
            ("image/png", None),
            ("multipart/mixed; boundary=\u{e9}", None),
        ] {
            assert_eq!(boundary(text).ok().as_deref(), expected, "{text}");
        }
        assert!(boundary(&format!("multipart/mixed; boundary={}", "x".repeat(71))).is_err());
    }

    proptest! {
        #[test]
        fn any_file_comes_out_as_it_went_in(file in proptest::collection::vec(prop_oneof![any::<u8>(), Just(b'\r'), Just(b'\n'), Just(b'-')], 0..300), piece in 1_usize..400) {
            prop_assume!(memchr::memmem::find(&[b"\r\n", file.as_slice(), b"\r"].concat(), b"\r\n--b").is_none());
            let (_, read, _) = read("b", &answer(&file), piece).unwrap();
            prop_assert_eq!(read, file);
        }

        #[test]
        fn no_answer_is_too_strange(text in "(--b|\r\n|--|x: y|\\{\\}){0,40}", piece in 1_usize..40) {
            let _ = read("b", text.as_bytes(), piece);
        }
    }
}
