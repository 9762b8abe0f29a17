//! Bearer tokens: shown nowhere, compared in constant time.

use http::HeaderMap;
use http::header::AUTHORIZATION;
use rand::RngCore as _;
use rand::rngs::OsRng;
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq as _;

/// A secret that a caller shows as `Authorization: Bearer …`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Token(String);

/// How a request stands to the token that it needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bearer {
    /// It shows the token.
    Right,
    /// It shows another one.
    Wrong,
    /// It shows none.
    Missing,
}

impl Token {
    /// A fresh token of 256 random bits, in hexadecimal.
    pub fn generate() -> Self {
        let mut bytes = [0; 32];
        OsRng.fill_bytes(&mut bytes);
        Self(data_encoding::HEXLOWER.encode(&bytes))
    }

    /// The token with this text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text, for the one place that must show it.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// How the request with these headers stands to this token.
    pub fn check(&self, headers: &HeaderMap) -> Bearer {
        let Some(header) = headers.get(AUTHORIZATION) else { return Bearer::Missing };
        let header = header.as_bytes();
        let Some((scheme, shown)) = header.split_at_checked("Bearer ".len()) else { return Bearer::Missing };
        if !scheme.eq_ignore_ascii_case(b"Bearer ") {
            return Bearer::Missing;
        }
        if bool::from(shown.ct_eq(self.0.as_bytes())) { Bearer::Right } else { Bearer::Wrong }
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Token(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_token_is_right() {
        let token = Token::new("abc");
        for (header, expected) in [
            ("Bearer abc", Bearer::Right),
            ("bearer abc", Bearer::Right),
            ("Bearer abcd", Bearer::Wrong),
            ("Bearer ab", Bearer::Wrong),
            ("Bearer ", Bearer::Wrong),
            ("Bearer", Bearer::Missing),
            ("Basic abc", Bearer::Missing),
            ("", Bearer::Missing),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(AUTHORIZATION, header.parse().unwrap());
            assert_eq!(token.check(&headers), expected, "{header}");
        }
        assert_eq!(token.check(&HeaderMap::new()), Bearer::Missing);
    }

    #[test]
    fn a_token_is_shown_nowhere() {
        let token = Token::generate();
        assert_eq!(token.expose().len(), 64);
        assert_ne!(token, Token::generate());
        assert!(!format!("{token:?}").contains(token.expose()));
    }
}
