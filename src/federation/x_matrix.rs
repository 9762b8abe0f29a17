//! X-Matrix: the signature of requests between servers, made and checked.
//! <https://spec.matrix.org/latest/server-server-api/#request-authentication>; the draft's section "Request Authentication"
//! asks for a destination always, and signs `content: {}` where there is no body.

use http::{HeaderMap, Method, header};
use ruma::api::federation::authentication::XMatrix;
use ruma::{OwnedServerName, ServerName};
use serde_json::Value;

use crate::event::{Object, SignatureCheck, VerifyKey, canonical_json, verify_signatures};
use crate::identity::{Keyring, SigningKey, Validity};
use crate::refusal::Refusal;

/// How many signatures a request may carry: a server that changes its key needs two.
const MAX_HEADERS: usize = 8;
/// How long one header may be: four values of at most 255 bytes, escaped.
const MAX_HEADER: usize = 4096;
/// How long a server name or the ID of a key may be, in bytes; the parser of names has no limit.
const MAX_NAME: usize = 255;

/// A request whose origin is proved.
#[derive(Debug, Clone)]
pub struct Authenticated {
    /// The server that signed it.
    pub origin: OwnedServerName,
}

/// Checks every `Authorization` header of a request. `uri` is the original path and query; `body` the parsed body of PUT
/// and POST. A request without body may be signed with `content: {}` or without content.
pub async fn authenticate(
    keyring: &Keyring,
    server_name: &ServerName,
    method: &Method,
    uri: &str,
    headers: &HeaderMap,
    body: Option<&Object>,
) -> Result<Authenticated, Refusal> {
    let claimed = Claimed::with_keys(Claims::read(server_name, headers)?, keyring).await?;
    claimed.prove(server_name, method, uri, body.map(canonical_json).as_deref())
}

/// A request whose headers claim an origin, with the keys of that server. Nothing is proved yet, but a body need be read
/// only for whoever gets as far as this.
#[derive(Debug)]
pub struct Claimed {
    origin: OwnedServerName,
    signatures: Vec<(VerifyKey, ClaimedSignature)>,
}

impl Claimed {
    /// Gets the keys that the claims name.
    pub async fn with_keys(claims: Claims, keyring: &Keyring) -> Result<Self, Refusal> {
        let Claims { origin, signatures } = claims;
        let wanted: Vec<&str> = signatures.iter().map(|signature| signature.key_id.as_str()).collect();
        let keys = keyring
            .keys_for(&origin, &wanted, Validity::Now)
            .await
            .map_err(|error| Refusal::Unauthenticated(error.to_string()))?;
        let with_key = |signature: ClaimedSignature| match keys.get(&signature.key_id) {
            Some(key) => Ok((key.clone(), signature)),
            None => Err(Refusal::Unauthenticated(format!("{origin} has no key {} now", signature.key_id))),
        };
        let signatures = signatures.into_iter().map(with_key).collect::<Result<_, _>>()?;
        Ok(Self { origin, signatures })
    }

    /// Who it claims to be from.
    pub fn origin(&self) -> &ServerName {
        &self.origin
    }

    /// Checks every signature. `uri` is the original path and query; `body` that of PUT and POST in canonical form, as
    /// [`crate::event::canonical_text`] makes it even of text that the strict parser would refuse.
    pub fn prove(
        self,
        server_name: &ServerName,
        method: &Method,
        uri: &str,
        body: Option<&[u8]>,
    ) -> Result<Authenticated, Refusal> {
        let Self { origin, signatures } = self;
        let messages = messages(&origin, server_name, method, uri, body);
        for (key, ClaimedSignature { key_id, signature }) in &signatures {
            if !messages.iter().any(|message| is_signed(&origin, key, message, signature)) {
                return Err(Refusal::Unauthenticated(format!(
                    "the signature of {origin} with {key_id} over {method} {uri} for {server_name} is wrong"
                )));
            }
        }
        Ok(Authenticated { origin })
    }
}

/// The value of the `Authorization` header for a request to `destination`.
pub fn authorization_header(
    origin: &ServerName,
    destination: &ServerName,
    key: &SigningKey,
    method: &Method,
    uri: &str,
    content: Option<&Object>,
) -> String {
    header_for(origin, destination, key, method, uri, content.map(canonical_json).as_deref())
}

/// The same, with the content in canonical form already: a large body is written once for its signature and for the wire.
pub(super) fn header_for(
    origin: &ServerName,
    destination: &ServerName,
    key: &SigningKey,
    method: &Method,
    uri: &str,
    content: Option<&[u8]>,
) -> String {
    let sig = key.sign(&message(origin, destination, method, uri, content));
    format!(r#"X-Matrix origin="{origin}",destination="{destination}",key="{}",sig="{sig}""#, key.id())
}

/// The bytes that are signed; `content` is canonical already.
fn message(
    origin: &ServerName,
    destination: &ServerName,
    method: &Method,
    uri: &str,
    content: Option<&[u8]>,
) -> Vec<u8> {
    let mut rest = Object::new();
    for (name, value) in
        [("destination", destination.as_str()), ("method", method.as_str()), ("origin", origin.as_str()), ("uri", uri)]
    {
        rest.insert(name.to_owned(), Value::from(value));
    }
    let rest = canonical_json(&rest);
    let Some(content) = content else { return rest };
    // `content` sorts before every other key.
    let mut message = Vec::with_capacity(content.len().saturating_add(rest.len()).saturating_add(12));
    message.extend_from_slice(br#"{"content":"#);
    message.extend_from_slice(content);
    message.push(b',');
    message.extend_from_slice(rest.strip_prefix(b"{").unwrap_or(&rest));
    message
}

fn messages(
    origin: &ServerName,
    destination: &ServerName,
    method: &Method,
    uri: &str,
    body: Option<&[u8]>,
) -> Vec<Vec<u8>> {
    let message = |content: Option<&[u8]>| message(origin, destination, method, uri, content);
    match body {
        Some(body) => vec![message(Some(body))],
        None => vec![message(None), message(Some(b"{}"))],
    }
}

fn is_signed(origin: &ServerName, key: &VerifyKey, message: &[u8], signature: &str) -> bool {
    let check = SignatureCheck { server: origin.as_str(), key, message: message.to_vec(), signature };
    verify_signatures(&[check]).iter().all(Result::is_ok)
}

/// What the headers claim, before anything is proved.
#[derive(Debug)]
pub struct Claims {
    /// The server that is named.
    pub origin: OwnedServerName,
    signatures: Vec<ClaimedSignature>,
}

impl Claims {
    /// Reads every `Authorization` header of a request to `server_name`.
    pub fn read(server_name: &ServerName, headers: &HeaderMap) -> Result<Self, Refusal> {
        claims(server_name, headers)
    }

    /// The IDs of the keys that the signatures are said to be by.
    pub fn key_ids(&self) -> impl Iterator<Item = &str> {
        self.signatures.iter().map(|signature| signature.key_id.as_str())
    }
}

#[derive(Debug)]
struct ClaimedSignature {
    key_id: String,
    signature: String,
}

/// Everything that can be refused before the origin's keys are fetched is refused here: whoever is not even spoken to
/// properly causes no request to a third server.
fn claims(server_name: &ServerName, headers: &HeaderMap) -> Result<Claims, Refusal> {
    let unauthenticated = |problem: String| Refusal::Unauthenticated(problem);
    let mut found: Option<Claims> = None;
    for (index, value) in headers.get_all(header::AUTHORIZATION).iter().enumerate() {
        if index >= MAX_HEADERS || value.len() > MAX_HEADER {
            return Err(unauthenticated(format!(
                "more than {MAX_HEADERS} Authorization headers, or one of more than {MAX_HEADER} bytes"
            )));
        }
        let text = value.to_str().map_err(|_| unauthenticated("the Authorization header is not ASCII".to_owned()))?;
        let claimed = parse(text).map_err(|problem| unauthenticated(format!("the Authorization header: {problem}")))?;
        match claimed.destination {
            Some(destination) if destination == server_name => {}
            Some(destination) => {
                return Err(unauthenticated(format!("the request is for {destination}, this is {server_name}")));
            }
            None => return Err(unauthenticated(format!("the request names no destination, this is {server_name}"))),
        }
        if claimed.origin.as_str().len() > MAX_NAME || claimed.key.as_str().len() > MAX_NAME {
            return Err(unauthenticated(format!("origin or key are longer than {MAX_NAME} bytes")));
        }
        let signature = ClaimedSignature { key_id: claimed.key.to_string(), signature: claimed.sig.encode() };
        match &mut found {
            None => found = Some(Claims { origin: claimed.origin, signatures: vec![signature] }),
            Some(claims) if claims.origin == claimed.origin => claims.signatures.push(signature),
            Some(claims) => {
                return Err(unauthenticated(format!(
                    "the request is signed by {} and by {}",
                    claims.origin, claimed.origin
                )));
            }
        }
    }
    let claims = found.ok_or_else(|| unauthenticated("there is no Authorization header".to_owned()))?;
    if claims.origin == server_name {
        return Err(unauthenticated(format!("{server_name} does not talk to itself")));
    }
    Ok(claims)
}

fn parse(header: &str) -> Result<XMatrix, String> {
    let header = quote_values(header)?;
    XMatrix::parse(&header).map_err(|error| error.to_string())
}

/// Puts quotes round bare values: the spec asks for leniency with `:` in bare values, which the grammar of HTTP does not
/// have. The draft's list of parameters has `signature` for what its example, as Matrix, has as `sig`. A second challenge in the same header is refused, because the parser would not look at it.
fn quote_values(header: &str) -> Result<String, &'static str> {
    let (scheme, parameters) = header.trim().split_once(' ').ok_or("there is nothing after the scheme")?;
    let is_named = |name: &str| name.eq_ignore_ascii_case("signature") && !parameters.contains("sig=");
    let mut quoted = format!("{scheme} ");
    let mut rest = parameters.trim_start();
    loop {
        let (name, after) = rest.split_once('=').ok_or("a parameter has no value")?;
        let name = name.trim();
        if name.is_empty() || name.contains(|c: char| c.is_ascii_whitespace() || c == ',' || c == '"') {
            return Err("a parameter has a bad name, or there is a second challenge");
        }
        let end = match after.strip_prefix('"') {
            Some(text) => closing_quote(text).ok_or("a quoted value does not end")?,
            None => after.find([',', ' ', '\t']).unwrap_or(after.len()),
        };
        let (value, tail) = after.split_at_checked(end).ok_or("a value does not end")?;
        let bare = !value.starts_with('"');
        let quote = if bare { "\"" } else { "" };
        quoted.extend([if is_named(name) { "sig" } else { name }, "=", quote, value, quote]);
        rest = tail.trim_start();
        if rest.is_empty() {
            return Ok(quoted);
        }
        rest = rest.strip_prefix(',').ok_or("a value is followed by something else than a comma")?.trim_start();
        quoted.push(',');
    }
}

/// The length of a quoted string with both its quotes, given what follows the opening one.
fn closing_quote(text: &str) -> Option<usize> {
    let mut escaped = false;
    for (index, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return index.checked_add(2),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
pub(super) mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;
    use ruma::server_name;
    use serde::Deserialize;

    use super::*;

    /// Whether a request from `g.example` to `destination` is signed with `key`.
    pub(in crate::federation) fn is_signed_request(
        key: &SigningKey,
        destination: &ServerName,
        method: &Method,
        uri: &str,
        headers: &HeaderMap,
        content: Option<&[u8]>,
    ) -> bool {
        let claims = claims(destination, headers).unwrap();
        assert_eq!(claims.origin, "g.example");
        let public = VerifyKey::from_base64(&key.public_base64()).unwrap();
        let message = message(&claims.origin, destination, method, uri, content);
        claims.signatures.iter().all(|signature| is_signed(&claims.origin, &public, &message, &signature.signature))
    }

    fn headers(values: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(header::AUTHORIZATION, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    fn refused(values: &[&str]) -> String {
        let refusal = claims(server_name!("g.example"), &headers(values)).unwrap_err();
        assert_eq!(refusal.status(), http::StatusCode::UNAUTHORIZED);
        assert_eq!(refusal.errcode(), "M_FORBIDDEN");
        refusal.to_string()
    }

    const SIG: &str = "t70hIjFTiybTLAcGWgqUS6xeJBSgfLk6yOQRdNA2h1ZR3E3lvVY7Z3sD+K1/VGgvzu/qTPTQ0twZ73M6Wi5fDw";

    fn header(origin: &str, destination: &str) -> String {
        format!(r#"X-Matrix origin="{origin}",destination="{destination}",key="ed25519:1",sig="{SIG}""#)
    }

    #[test]
    fn hc_01_incomplete_headers_are_refused() {
        assert!(refused(&[]).contains("no Authorization header"));
        for bad in [
            "",
            "X-Matrix",
            "Bearer abc",
            r#"X-Matrix origin="a.example""#,
            r#"X-Matrix origin="a.example",destination="g.example",key="ed25519:1""#,
            r#"X-Matrix origin="a.example",destination="g.example",key="1",sig="AAAA""#,
            r#"X-Matrix origin="a.example",destination="g.example",key="ed25519:1",sig="AAAA"#,
            r#"X-Matrix origin="a.example",origin="a.example",destination="g.example",key="ed25519:1",sig="AAAA""#,
        ] {
            refused(&[bad]);
            // A good header does not make up for a bad one.
            refused(&[&header("a.example", "g.example"), bad]);
        }
        refused(&[&format!("{}, {}", header("a.example", "g.example"), header("a.example", "g.example"))]);
        let many = vec![header("a.example", "g.example"); MAX_HEADERS + 1];
        refused(&many.iter().map(String::as_str).collect::<Vec<_>>());
    }

    #[test]
    fn hc_02_the_destination_is_needed_and_must_be_this_server() {
        assert!(refused(&[&format!(r#"X-Matrix origin="a.example",key="ed25519:1",sig="{SIG}""#)]).contains("no dest"));
        assert!(refused(&[&header("a.example", "h.example")]).contains("h.example"));
        refused(&[&header("a.example", "g.example"), &header("a.example", "h.example")]);
    }

    #[test]
    fn hc_05_the_origin_is_one_server_name_and_not_this_one() {
        for bad in ["", "a b", "a.example:x", "a.example/", "g.example", "a_b:99999999"] {
            refused(&[&header(bad, "g.example")]);
        }
        refused(&[&header(&"a".repeat(256), "g.example")]);
        refused(&[&header("a.example", "g.example"), &header("b.example", "g.example")]);
    }

    #[test]
    fn bare_values_and_spaces_are_read() {
        let server = server_name!("localhost:3001");
        for good in [
            format!(r#"X-Matrix origin="localhost:3000",destination="localhost:3001",key="ed25519:1",sig="{SIG}""#),
            format!("X-Matrix origin=localhost:3000,destination=localhost:3001,key=ed25519:1,sig={SIG}"),
            format!(r#"x-matrix  origin=localhost:3000, destination="localhost:3001" , key="ed25519:1",sig="{SIG}==""#),
            format!(
                r#"X-Matrix signature="{SIG}",origin="localhost:3000",destination="localhost:3001",key="ed25519:1""#
            ),
        ] {
            let claims = claims(server, &headers(&[&good])).unwrap();
            assert_eq!(claims.origin, "localhost:3000");
            assert_eq!(claims.signatures[0].signature, SIG);
        }
    }

    proptest! {
        #[test]
        fn no_header_panics(header in r#"[ -~]{0,60}"#, parameters in r#"[a-c="\\, ]{0,30}"#) {
            let _ = parse(&header);
            let _ = parse(&format!("X-Matrix {parameters}"));
        }
    }

    #[derive(Deserialize)]
    struct Vector {
        method: String,
        uri: String,
        origin: OwnedServerName,
        destination: OwnedServerName,
        sig: String,
        public_key: String,
        signed_bytes: String,
    }

    #[test]
    fn recorded_requests_verify() {
        let vectors = include_str!("../../tests/vectors/eigen-request-auth.json");
        let vectors: Vec<Vector> = serde_json::from_str(vectors).unwrap();
        assert!(vectors.len() > 10);
        for vector in vectors {
            let signed: Object = serde_json::from_str(&vector.signed_bytes).unwrap();
            let body = signed.get("content").and_then(Value::as_object).map(canonical_json);
            let body = body.as_deref();
            let method: Method = vector.method.parse().unwrap();
            let messages = messages(&vector.origin, &vector.destination, &method, &vector.uri, body);
            let key = VerifyKey::from_base64(&vector.public_key).unwrap();
            assert!(messages.iter().any(|message| message == vector.signed_bytes.as_bytes()), "{}", vector.uri);
            assert!(messages.iter().any(|message| is_signed(&vector.origin, &key, message, &vector.sig)));
            // HC-04: for another path, method or host the signature says nothing.
            let elsewhere = format!("{}x", vector.uri);
            for (method, uri, destination) in [
                (&method, elsewhere.as_str(), &*vector.destination),
                (&Method::DELETE, vector.uri.as_str(), &*vector.destination),
                (&method, vector.uri.as_str(), server_name!("other.example")),
            ] {
                let messages = super::messages(&vector.origin, destination, method, uri, body);
                assert!(!messages.iter().any(|message| is_signed(&vector.origin, &key, message, &vector.sig)));
            }
        }
    }

    /// Answers with the keys of one server.
    struct OneServer(Object);

    #[async_trait::async_trait]
    impl crate::identity::KeyFetcher for OneServer {
        async fn fetch_keys(&self, server: &ServerName) -> Result<Object, Refusal> {
            let refusal = || Refusal::KeysUnavailable { server: server.to_string(), problem: "away".to_owned() };
            (server == "a.example").then(|| self.0.clone()).ok_or_else(refusal)
        }
    }

    #[tokio::test]
    async fn requests_are_let_in_by_every_signature_that_they_carry() {
        let directory = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}", directory.path().join("t.db").display());
        let store = crate::store::Store::open(&url).await.unwrap();
        let clock = crate::clock::ManualClock::new(1_700_000_000_000);
        let (key, other_key) = (std::sync::Arc::new(SigningKey::generate()), SigningKey::generate());
        let (a, g) = (server_name!("a.example"), server_name!("g.example"));
        let nobody = std::sync::Arc::new(OneServer(Object::new()));
        let of_a = Keyring::new(a.to_owned(), key.clone(), nobody, store.clone(), clock.clone()).own_keys();
        let own = std::sync::Arc::new(SigningKey::generate());
        let keyring = Keyring::new(g.to_owned(), own, std::sync::Arc::new(OneServer(of_a)), store, clock);
        let check = async |method: &Method, uri: &str, values: &[String], body: Option<&Object>| {
            let values: Vec<&str> = values.iter().map(String::as_str).collect();
            authenticate(&keyring, g, method, uri, &headers(&values), body).await
        };

        let (empty, body) = (Object::new(), serde_json::from_str::<Object>(r#"{"a":{"b":1.5},"c":null}"#).unwrap());
        let sign = |method: &Method, uri: &str, content: Option<&Object>| {
            authorization_header(a, g, &key, method, uri, content)
        };
        let uri = "/_matrix/federation/v1/x/%21a%3Ab?c=d";
        for content in [None, Some(&empty)] {
            let header = sign(&Method::GET, uri, content);
            assert_eq!(
                check(&Method::GET, uri, std::slice::from_ref(&header), None).await.unwrap().origin,
                "a.example"
            );
            // HC-04
            assert!(
                check(&Method::GET, "/_matrix/federation/v1/x/%21a%3Ab", std::slice::from_ref(&header), None)
                    .await
                    .is_err()
            );
            assert!(check(&Method::POST, uri, &[header], Some(&body)).await.is_err());
        }
        let good = sign(&Method::PUT, uri, Some(&body));
        assert!(check(&Method::PUT, uri, std::slice::from_ref(&good), Some(&body)).await.is_ok());
        assert!(check(&Method::PUT, uri, &[good.clone(), good.clone()], Some(&body)).await.is_ok());
        // HC-03: another body, and a body that was not signed at all.
        let changed = serde_json::from_str::<Object>(r#"{"a":{"b":1.25},"c":null}"#).unwrap();
        assert!(check(&Method::PUT, uri, std::slice::from_ref(&good), Some(&changed)).await.is_err());
        assert!(check(&Method::PUT, uri, &[sign(&Method::PUT, uri, None)], Some(&body)).await.is_err());

        let with_other_key = authorization_header(a, g, &other_key, &Method::PUT, uri, Some(&body));
        let same_id = with_other_key.replace(other_key.id(), key.id());
        let of_other = authorization_header(server_name!("b.example"), g, &key, &Method::PUT, uri, Some(&body));
        for bad in [with_other_key, same_id, of_other] {
            let alone = check(&Method::PUT, uri, std::slice::from_ref(&bad), Some(&body)).await.unwrap_err();
            assert_eq!((alone.status(), alone.errcode()), (http::StatusCode::UNAUTHORIZED, "M_FORBIDDEN"), "{alone}");
            assert!(check(&Method::PUT, uri, &[good.clone(), bad], Some(&body)).await.is_err());
        }
    }
}
