//! X-Matrix: the signature of requests between servers, made and checked.

use http::{HeaderMap, Method};
use ruma::{OwnedServerName, ServerName};

use crate::event::Object;
use crate::identity::{Keyring, SigningKey};
use crate::refusal::Refusal;

/// A request whose origin is proved.
#[derive(Debug, Clone)]
pub struct Authenticated {
    /// The server that signed it.
    pub origin: OwnedServerName,
}

/// Checks every `Authorization` header of a request. `uri` is the original path and query; `body` the parsed body of PUT
/// and POST. A GET may be signed with `content: {}` or without content.
pub async fn authenticate(
    _keyring: &Keyring,
    _server_name: &ServerName,
    _method: &Method,
    _uri: &str,
    _headers: &HeaderMap,
    _body: Option<&Object>,
) -> Result<Authenticated, Refusal> {
    unimplemented!()
}

/// The value of the `Authorization` header for a request to `destination`.
pub fn authorization_header(
    _origin: &ServerName,
    _destination: &ServerName,
    _key: &SigningKey,
    _method: &Method,
    _uri: &str,
    _content: Option<&Object>,
) -> String {
    unimplemented!()
}
