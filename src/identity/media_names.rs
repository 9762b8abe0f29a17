//! How media of one side are called on the other: `mxc://G/ID` stands for `mxc://SERVER/MEDIA`. The ID holds what it stands for,
//! the side where that is at home, and a code that only the gateway can make. So nothing is stored for a name, it never ends, and
//! nobody has the gateway fetch what never crossed.

use std::borrow::Cow;

use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ruma::{OwnedServerName, ServerName};

use super::Side;

/// What the URIs of media begin with.
const SCHEME: &str = "mxc://";
/// How much of the code stands in an ID, in bytes.
const CODE: usize = 16;
/// How long the ID of media may be, in bytes.
const MAX_MEDIA_ID: usize = 255;
/// How long an ID of the gateway's can be at most: what it stands for, and the code, in base64.
const MAX_OWN_ID: usize = (CODE + 1 + 255 + 1 + MAX_MEDIA_ID).div_ceil(3) * 4;

/// The names of media at one gateway. Pure; clones are cheap.
#[derive(Clone)]
pub struct MediaNames {
    server_name: OwnedServerName,
    key: hmac::Key,
}

/// Media of another server.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Medium {
    /// The side on which its name was said.
    pub home: Side,
    /// The server that has it.
    pub server: OwnedServerName,
    /// What that server calls it.
    pub media_id: String,
}

impl Medium {
    /// Its URI where it is at home.
    pub fn uri(&self) -> String {
        format!("{SCHEME}{}/{}", self.server, self.media_id)
    }
}

impl MediaNames {
    /// The names at the gateway `server_name`, which knows them by `secret`.
    pub fn new(server_name: OwnedServerName, secret: &[u8; 32]) -> Self {
        Self { server_name, key: hmac::Key::new(hmac::HMAC_SHA256, secret) }
    }

    /// How media that are called `uri` on one side are called on the side `to`. What is no URI of media stays as it is.
    pub fn across<'a>(&self, uri: &'a str, to: Side) -> Cow<'a, str> {
        match uri.strip_prefix(SCHEME).and_then(split).filter(|(_, _, rest)| rest.is_empty()) {
            Some((server, media_id, _)) => self.name(server, media_id, to).map_or(Cow::Borrowed(uri), Cow::Owned),
            None => Cow::Borrowed(uri),
        }
    }

    /// A text, as HTML, with the URIs of media in it called as on the side `to`.
    pub fn within<'a>(&self, text: &'a str, to: Side) -> Cow<'a, str> {
        if !text.contains(SCHEME) {
            return Cow::Borrowed(text);
        }
        let mut mapped = String::with_capacity(text.len());
        let mut left = text;
        while let Some((before, after)) = left.split_once(SCHEME) {
            mapped.push_str(before);
            left = after;
            match split(after).and_then(|(server, media_id, rest)| Some((self.name(server, media_id, to)?, rest))) {
                Some((name, rest)) => {
                    mapped.push_str(&name);
                    left = rest;
                }
                None => mapped.push_str(SCHEME),
            }
        }
        mapped.push_str(left);
        Cow::Owned(mapped)
    }

    /// What an ID of the gateway's stands for; none when the gateway did not make it.
    pub fn behind(&self, media_id: &str) -> Option<Medium> {
        if media_id.len() > MAX_OWN_ID {
            return None;
        }
        let bytes = URL_SAFE_NO_PAD.decode(media_id).ok()?;
        let (code, said) = bytes.split_at_checked(CODE)?;
        let expected = hmac::sign(&self.key, said);
        let expected = expected.as_ref().get(..CODE)?;
        if !bool::from(subtle::ConstantTimeEq::ct_eq(expected, code)) {
            return None;
        }
        let (home, said) = std::str::from_utf8(said).ok()?.split_at_checked(1)?;
        let home = match home {
            "m" => Side::Matrix,
            "l" => Side::Lm,
            _ => return None,
        };
        let (server, media_id) = said.split_once('/')?;
        Some(Medium { home, server: server.try_into().ok()?, media_id: media_id.to_owned() })
    }

    /// What a URI of the gateway's stands for; none when the gateway did not make it.
    pub fn medium(&self, uri: &str) -> Option<Medium> {
        let (server, media_id, rest) = uri.strip_prefix(SCHEME).and_then(split)?;
        if server != self.server_name.as_str() || !rest.is_empty() {
            return None;
        }
        self.behind(media_id)
    }

    /// How `mxc://server/media_id` is called on the side `to`; none when it is called the same there.
    fn name(&self, server: &str, media_id: &str, to: Side) -> Option<String> {
        if server == self.server_name.as_str() {
            // What comes home is called what it was. What is from across already can be read here as it is.
            return self.behind(media_id).filter(|medium| medium.home == to).map(|medium| medium.uri());
        }
        if media_id.len() > MAX_MEDIA_ID {
            return None;
        }
        let server = <&ServerName>::try_from(server).ok()?;
        let home = match to.other() {
            Side::Matrix => 'm',
            Side::Lm => 'l',
        };
        let said = format!("{home}{server}/{media_id}");
        let code = hmac::sign(&self.key, said.as_bytes());
        let mut bytes = code.as_ref().get(..CODE)?.to_vec();
        bytes.extend_from_slice(said.as_bytes());
        Some(format!("{SCHEME}{}/{}", self.server_name, URL_SAFE_NO_PAD.encode(bytes)))
    }
}

impl std::fmt::Debug for MediaNames {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("MediaNames").field("server_name", &self.server_name).finish_non_exhaustive()
    }
}

/// The server and the ID with which what follows `mxc://` begins, and the rest. The ID is of the letters that the
/// specification has: <https://spec.matrix.org/latest/client-server-api/#matrix-content-mxc-uris>
fn split(text: &str) -> Option<(&str, &str, &str)> {
    let (server, rest) = text.split_once('/')?;
    let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '-' || c == '_')).unwrap_or(rest.len());
    let (media_id, rest) = rest.split_at_checked(end)?;
    (!server.is_empty() && server.len() <= 255 && (1..=MAX_OWN_ID).contains(&media_id.len()))
        .then_some((server, media_id, rest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn names() -> MediaNames {
        MediaNames::new("g.example".try_into().unwrap(), &[7; 32])
    }

    #[test]
    fn names_go_across_and_come_home_and_nothing_nests() {
        let names = names();
        let (matrix, lm) = ("mxc://hs.example:8448/abc_DEF-123", "mxc://hub.example/x");
        let there = names.across(matrix, Side::Lm);
        assert!(there.starts_with("mxc://g.example/") && !there.contains("hs.example"), "{there}");
        assert_eq!(names.across(&there, Side::Matrix), matrix, "home");
        assert_eq!(names.across(&there, Side::Lm), there, "it is readable there already");
        assert_eq!(names.across(matrix, Side::Lm), there, "always the same");
        let here = names.across(lm, Side::Matrix);
        assert_eq!(names.across(&here, Side::Lm), lm);
        assert_ne!(names.across(lm, Side::Lm), here, "a name says on which side it is at home");
        let medium = names.behind(here.strip_prefix("mxc://g.example/").unwrap()).unwrap();
        assert_eq!((medium.home, medium.uri().as_str()), (Side::Lm, lm));
        assert_eq!((names.medium(&here), names.medium(lm)), (Some(medium), None));
    }

    #[test]
    fn hc_59_what_the_gateway_did_not_name_stands_for_nothing() {
        let names = names();
        let there = names.across("mxc://hs.example/abc", Side::Lm).into_owned();
        let id = there.strip_prefix("mxc://g.example/").unwrap();
        assert!(names.behind(id).is_some());
        for index in 0..id.len() {
            let other = if id.as_bytes()[index] == b'A' { "B" } else { "A" };
            let forged = format!("{}{other}{}", &id[..index], &id[index + 1..]);
            assert_eq!(names.behind(&forged), None, "{forged}");
        }
        let others = MediaNames::new("g.example".try_into().unwrap(), &[8; 32]);
        assert_eq!(others.behind(id), None, "a name of another secret");
        for id in ["", "x", "..", "%2e%2e", "AAAA", &id[1..], &format!("{id}AAAA"), &"A".repeat(100_000)] {
            assert_eq!(names.behind(id), None, "{id}");
        }
        assert_eq!(names.across("mxc://g.example/forged", Side::Matrix), "mxc://g.example/forged");
    }

    #[test]
    fn what_is_no_uri_of_media_stays() {
        let names = names();
        for text in [
            "",
            "mxc://",
            "mxc://hs.example",
            "mxc://hs.example/",
            "mxc:///abc",
            "mxc://hs.example/a/b",
            "mxc://hs.example/../etc/passwd",
            "mxc://hs.example/abc?x=y",
            "mxc://hs example/abc",
            "mxc://@hs.example/abc",
            "MXC://hs.example/abc",
            "https://hs.example/abc",
            "say mxc://hs.example/abc",
        ] {
            assert_eq!(names.across(text, Side::Lm), text);
        }
        let long = format!("mxc://hs.example/{}", "a".repeat(256));
        assert_eq!(names.across(&long, Side::Lm), long);
    }

    #[test]
    fn uris_within_html_are_named_wherever_they_stand() {
        let names = names();
        let there = names.across("mxc://hs.example/abc", Side::Lm).into_owned();
        for (text, expected) in [
            ("<img src=\"mxc://hs.example/abc\" alt=\"x\">", format!("<img src=\"{there}\" alt=\"x\">")),
            ("mxc://hs.example/abc", there.clone()),
            ("a mxc:// b", "a mxc:// b".to_owned()),
            ("mxc://mxc://hs.example/abc", format!("mxc://{there}")),
            ("'mxc://hs.example/abc'mxc://hs.example/abc'", format!("'{there}'{there}'")),
            ("mxc://é/abc", "mxc://é/abc".to_owned()),
        ] {
            assert_eq!(names.within(text, Side::Lm), expected);
            assert_eq!(names.within(&expected, Side::Matrix), text);
        }
    }

    proptest! {
        #[test]
        fn every_legal_name_round_trips(server in "[a-z0-9.-]{1,60}(:[1-9][0-9]{0,3})?", id in "[A-Za-z0-9_-]{1,255}", lm: bool) {
            prop_assume!(<&ServerName>::try_from(server.as_str()).is_ok() && server != "g.example");
            let (names, to) = (names(), if lm { Side::Lm } else { Side::Matrix });
            let uri = format!("mxc://{server}/{id}");
            let there = names.across(&uri, to);
            prop_assert!(there.starts_with("mxc://g.example/"));
            prop_assert_eq!(names.across(&there, to.other()), uri.as_str());
        }

        #[test]
        fn no_text_is_too_strange(text in "(mxc://|[a-z./:<\"é-]){0,20}") {
            let names = names();
            let _ = (names.across(&text, Side::Lm), names.within(&text, Side::Matrix), names.behind(&text));
        }
    }
}
