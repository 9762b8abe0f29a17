//! The gateway as a notary: anybody may ask it for the keys of other servers, unproved, so what one request and one address can cause
//! is bounded.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use axum::extract::{FromRequest, FromRequestParts as _, RawPathParams, Request};
use futures::StreamExt as _;
use http::request::Parts;
use ruma::OwnedServerName;
use serde_json::{Value, json};

use super::routes::{Answer, Federation};
use super::signed::{BODY_LIMIT, integer, parse, peer};
use crate::event::{Object, canonical_json, parse_object};
use crate::federation::{Askers, Rate, Rates, Shares};
use crate::identity::KeyQuery;
use crate::refusal::Refusal;

/// How many servers one request may name.
const SERVERS: usize = 100;
/// How many keys of a server one request may name.
const KEYS: usize = 50;
/// How large the keys may be that are answered with.
const ANSWER: usize = 1 << 20;
/// How many bytes of answers are made at once, for all and for one address.
const ANSWERS: (usize, usize) = (64 << 20, 8 << 20);
/// How many servers are asked at once because of such requests, and how many because of one address.
const ASKED: (usize, usize) = (64, 8);
/// How many servers are asked at once because of one request.
const AT_ONCE: usize = 8;
/// How long a request waits for the servers that are asked. Who asks has others to ask too, and waits for twenty seconds in all.
const PATIENCE: Duration = Duration::from_secs(8);

/// What strangers cause by asking; clones share it.
#[derive(Clone)]
pub struct Notary {
    askers: Askers,
    answers: Shares,
}

impl Default for Notary {
    fn default() -> Self {
        Self { askers: Askers::new(ASKED.0, ASKED.1), answers: Shares::new(ANSWERS.0, ANSWERS.1) }
    }
}

/// A request that needs no proof of where it comes from. Its `Authorization` headers are not looked at.
pub(super) struct Anyone<B> {
    address: Option<IpAddr>,
    path: RawPathParams,
    query: String,
    body: B,
}

impl FromRequest<Federation> for Anyone<()> {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &Federation) -> Result<Self, Refusal> {
        anyone((), request.into_parts().0, state).await
    }
}

impl FromRequest<Federation> for Anyone<Object> {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &Federation) -> Result<Self, Refusal> {
        let (parts, body) = request.into_parts();
        let whose = peer(&parts).map_or_else(|| "anybody".to_owned(), |address| address.to_string());
        let body = state.unproved.read(&whose, body, "request body", BODY_LIMIT).await?;
        anyone(parse_object(&body.raw)?, parts, state).await
    }
}

async fn anyone<B>(body: B, mut parts: Parts, state: &Federation) -> Result<Anyone<B>, Refusal> {
    let path = RawPathParams::from_request_parts(&mut parts, state)
        .await
        .map_err(|rejection| Refusal::malformed("path", rejection.body_text()))?;
    let query = parts.uri.query().unwrap_or_default().to_owned();
    Ok(Anyone { address: peer(&parts), path, query, body })
}

/// The keys of one server.
pub(super) async fn query_one(federation: Federation, asked: Anyone<()>) -> Answer {
    let server = asked.path.iter().find(|(name, _)| *name == "server_name").map_or("", |(_, value)| value);
    let mut pairs = url::form_urlencoded::parse(asked.query.as_bytes());
    let minimum = pairs.find(|(name, _)| name == "minimum_valid_until_ts");
    let minimum = minimum.map(|(name, text)| integer(&name, &text)).transpose()?;
    let query = KeyQuery {
        server: parse("server name", server)?,
        keys: BTreeMap::new(),
        minimum_valid_until_ts: minimum.unwrap_or_else(|| federation.context.clock.now_ms()),
    };
    answer(&federation, asked.address, vec![query]).await
}

/// The keys of several servers.
pub(super) async fn query(federation: Federation, asked: Anyone<Object>) -> Answer {
    let queries = queries(&asked.body, federation.context.clock.now_ms())?;
    answer(&federation, asked.address, queries).await
}

fn queries(body: &Object, now_ms: i64) -> Result<Vec<KeyQuery>, Refusal> {
    let servers = object("server_keys", body.get("server_keys").unwrap_or(&Value::Null))?;
    at_most("server_keys", servers.len(), SERVERS)?;
    let query = |(name, keys): (&String, &Value)| {
        let server: OwnedServerName = parse("server name", name)?;
        let keys = object(name, keys)?;
        at_most(name, keys.len(), KEYS)?;
        let minimum = |(key_id, criteria): (&String, &Value)| {
            let minimum = match object(key_id, criteria)?.get("minimum_valid_until_ts") {
                None | Some(Value::Null) => now_ms,
                Some(minimum) => {
                    minimum.as_i64().ok_or_else(|| Refusal::malformed("minimum_valid_until_ts", "is not an integer"))?
                }
            };
            Ok((key_id.clone(), minimum))
        };
        let keys = keys.iter().map(minimum).collect::<Result<_, Refusal>>()?;
        Ok(KeyQuery { server, keys, minimum_valid_until_ts: now_ms })
    };
    servers.iter().map(query).collect()
}

fn object<'a>(what: &str, value: &'a Value) -> Result<&'a Object, Refusal> {
    let what = || what.chars().take(60).collect::<String>();
    value.as_object().ok_or_else(|| Refusal::malformed(what(), "missing or no object"))
}

fn at_most(what: &str, found: usize, limit: usize) -> Result<(), Refusal> {
    match found <= limit {
        true => Ok(()),
        false => Err(Refusal::malformed(what, format!("{found} entries, at most {limit} are taken"))),
    }
}

async fn answer(federation: &Federation, address: Option<IpAddr>, queries: Vec<KeyQuery>) -> Answer {
    count(&federation.rates, address)?;
    let whose = address.map(|address| address.to_string());
    let mut held = federation.notary.answers.hold(&whose.iter().map(String::as_str).collect::<Vec<_>>());
    if !held.grow(ANSWER) {
        return Err(Refusal::Budget { what: "answers about keys".to_owned(), retry_after_ms: 2_000 });
    }
    let asking = futures::stream::iter(queries.clone()).map(|query| refresh(federation.clone(), address, query));
    let asked = asking.buffer_unordered(AT_ONCE).fold(Ok(()), async |all: Result<(), Refusal>, one| all.and(one));
    // Of those that take longer what is known is given.
    if let Ok(asked) = tokio::time::timeout(PATIENCE, asked).await {
        asked?;
    }
    let (mut server_keys, mut size) = (Vec::new(), 0_usize);
    for query in &queries {
        for keys in federation.context.keyring.notarized(query).await? {
            size = size.saturating_add(canonical_json(&keys).len());
            if size > ANSWER {
                return Ok(json!({ "server_keys": server_keys }));
            }
            server_keys.push(Value::Object(keys));
        }
    }
    Ok(json!({ "server_keys": server_keys }))
}

/// Has a server asked for its keys where what is known is not what is wanted, if it is its turn.
async fn refresh(federation: Federation, address: Option<IpAddr>, query: KeyQuery) -> Result<(), Refusal> {
    let keyring = &federation.context.keyring;
    if keyring.would_ask_for(&query).await?
        && count(&federation.rates, address).is_ok()
        && let Ok(_asker) = federation.notary.askers.enter(&query.server, address, true)
    {
        keyring.refresh(&query).await;
    }
    Ok(())
}

/// Counts a request, or a server that is asked because of one. Behind a reverse proxy, where no address says anything, what is asked
/// at once is the bound.
fn count(rates: &Rates, address: Option<IpAddr>) -> Result<(), Refusal> {
    address.map_or(Ok(()), |address| rates.take(&network(address), Rate::Keys))
}

/// An IPv4 address, or the part of an IPv6 address that one customer has.
fn network(address: IpAddr) -> String {
    match address.to_canonical() {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            format!("{a:x}:{b:x}:{c:x}:{d:x}::")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_asks_too_often_is_told_to_wait_and_keeps_no_other_out() {
        let rates = Rates::default();
        let ask = |address: &str| count(&rates, Some(address.parse().unwrap()));
        let refused =
            |address: &str| (0..1_000).any(|_| ask(address).is_err_and(|no| no.errcode() == "M_LIMIT_EXCEEDED"));
        assert!(refused("192.0.2.1") && ask("192.0.2.2").is_ok() && ask("::ffff:192.0.2.1").is_err());
        // Whoever has one IPv6 address has the network.
        assert!(refused("2001:db8:1:2::1") && ask("2001:db8:1:2:ffff::9").is_err() && ask("2001:db8:1:3::1").is_ok());
        assert!((0..1_000).all(|_| count(&rates, None).is_ok()));
    }

    #[test]
    fn what_is_asked_is_read_or_refused() {
        let read = |body: Value| queries(body.as_object().unwrap(), 7);
        let all = json!({ "server_keys": {
            "a.example": {},
            "b.example": { "ed25519:1": { "minimum_valid_until_ts": 5 }, "ed25519:2": {} },
        } });
        let [a, b] = read(all).unwrap().try_into().unwrap();
        assert_eq!((a.server.as_str(), a.keys.len(), a.minimum_valid_until_ts), ("a.example", 0, 7));
        assert_eq!(b.keys, BTreeMap::from([("ed25519:1".to_owned(), 5), ("ed25519:2".to_owned(), 7)]));
        assert!(read(json!({ "server_keys": {} })).unwrap().is_empty());
        let many = |count: usize| (0..count).map(|n| (format!("s{n}"), json!({}))).collect::<Object>();
        assert_eq!(read(json!({ "server_keys": many(SERVERS) })).unwrap().len(), SERVERS);
        for (body, what) in [
            (json!({}), "server_keys"),
            (json!({ "server_keys": [] }), "server_keys"),
            (json!({ "server_keys": many(SERVERS + 1) }), "server_keys"),
            (json!({ "server_keys": { "a.example": many(KEYS + 1) } }), "a.example"),
            (json!({ "server_keys": { "a.example": [] } }), "a.example"),
            (json!({ "server_keys": { "a b": {} } }), "server name"),
            (json!({ "server_keys": { "a.example": { "ed25519:1": 5 } } }), "ed25519:1"),
            (
                json!({ "server_keys": { "a.example": { "ed25519:1": { "minimum_valid_until_ts": "5" } } } }),
                "minimum_valid_until_ts",
            ),
        ] {
            let refusal = read(body).unwrap_err();
            assert!(refusal.errcode() == "M_BAD_JSON" && refusal.to_string().starts_with(what), "{refusal}");
        }
    }
}
