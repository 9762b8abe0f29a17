//! Requests of other servers as handlers take them: with a proved origin, read within bounds, parsed.

use std::net::IpAddr;

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts as _, OriginalUri, RawPathParams, Request};
use http::Method;
use http::request::Parts;
use ruma::{OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId};

use super::connections::Peer;
use super::routes::Federation;
use crate::event::{Object, canonical_json, canonical_text, parse_event_id, parse_object};
use crate::federation::{Claimed, Claims, Counted};
use crate::refusal::Refusal;
use crate::store::overview;

/// The size of a body, but for transactions: an event of 64 KiB and what goes with it.
pub(super) const BODY_LIMIT: usize = 1 << 20;
/// The size of a transaction: 50 PDUs of 64 KiB and 100 EDUs.
const TRANSACTION_LIMIT: usize = 10 << 20;

/// A request whose origin is proved, with its body, and what its path and query name. Handlers have these from nowhere else, so that
/// nothing of a request is judged before its signature.
pub(super) struct Signed<B> {
    pub origin: OwnedServerName,
    pub body: B,
    path: RawPathParams,
    query: String,
    counted: Option<Counted>,
}

/// A request without a body.
pub(super) type Asked = Signed<()>;

/// A request with an object as its body.
pub(super) type Given = Signed<Object>;

/// A transaction; its events are still text, to be parsed one by one.
pub(super) type SignedTransaction = Signed<Bytes>;

impl<B> Signed<B> {
    /// The segment of the path that the route calls `name`.
    pub fn segment(&self, name: &str) -> &str {
        self.path.iter().find(|(known, _)| *known == name).map_or("", |(_, value)| value)
    }

    /// Says that the answer may wait for a third server: from now on the request counts among those alone.
    pub fn waits(&mut self, state: &Federation) -> Result<(), Refusal> {
        self.counted = Some(state.waiting.enter(&self.origin)?);
        Ok(())
    }

    /// Says that the request is counted where its answer comes from, and no more among those that are worked on.
    pub fn counts_elsewhere(&mut self) {
        self.counted = None;
    }

    /// The room in the path.
    pub fn room_id(&self) -> Result<OwnedRoomId, Refusal> {
        parse("room ID", self.segment("room_id"))
    }

    /// The user in the path.
    pub fn user_id(&self) -> Result<OwnedUserId, Refusal> {
        parse("user ID", self.segment("user_id"))
    }

    /// The event in the path.
    pub fn event_id(&self) -> Result<OwnedEventId, Refusal> {
        parse_event_id("event ID", self.segment("event_id"))
    }

    /// All values of a parameter of the query.
    pub fn values(&self, name: &str) -> impl Iterator<Item = String> {
        let pairs = url::form_urlencoded::parse(self.query.as_bytes());
        pairs.filter(move |(key, _)| key == name).map(|(_, value)| value.into_owned())
    }

    /// The value of a parameter of the query.
    pub fn value(&self, name: &str) -> Option<String> {
        self.values(name).next()
    }

    /// The value of a parameter of the query that is a number.
    pub fn number(&self, name: &str) -> Result<Option<i64>, Refusal> {
        self.value(name).map(|text| integer(name, &text)).transpose()
    }
}

/// Parses an integer; `what` is how a refusal calls it.
pub(super) fn integer(what: &str, text: &str) -> Result<i64, Refusal> {
    text.parse().map_err(|_| Refusal::malformed(what, format!("{:?} is not an integer", shown(text))))
}

/// Parses an identifier; `what` is how a refusal calls it.
pub(super) fn parse<T>(what: &str, text: &str) -> Result<T, Refusal>
where
    for<'a> T: TryFrom<&'a str, Error: std::fmt::Display>,
{
    T::try_from(text).map_err(|error| Refusal::malformed(what, format!("{:?}: {error}", shown(text))))
}

/// As much of a text as a refusal shows.
fn shown(text: &str) -> String {
    text.chars().take(60).collect()
}

impl FromRequest<Federation> for Asked {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &Federation) -> Result<Self, Refusal> {
        let (parts, _) = request.into_parts();
        let claimed = claimed(&parts, state).await?;
        let origin = origin(claimed, &parts, state, None)?;
        let counted = state.underway.enter(&origin)?;
        signed(origin, (), parts, state, Some(counted)).await
    }
}

impl FromRequest<Federation> for Given {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &Federation) -> Result<Self, Refusal> {
        let (parts, body) = request.into_parts();
        let claimed = claimed(&parts, state).await?;
        let unchecked = state.unproved.read(&whose(&parts, &claimed), body, "request body", BODY_LIMIT).await?;
        let body = parse_object(&unchecked.raw)?;
        let origin = origin(claimed, &parts, state, Some(&canonical_json(&body)))?;
        let counted = state.underway.enter(&origin)?;
        signed(origin, body, parts, state, Some(counted)).await
    }
}

impl FromRequest<Federation> for SignedTransaction {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &Federation) -> Result<Self, Refusal> {
        let (parts, body) = request.into_parts();
        let claimed = claimed(&parts, state).await?;
        let unchecked = state.unproved.read(&whose(&parts, &claimed), body, "transaction", TRANSACTION_LIMIT).await?;
        // Duplicate keys inside one event are that event's fault alone, so the signature is checked over what any JSON
        // parser makes of the body; each event is parsed strictly later.
        let body = canonical_text(&unchecked.raw)?;
        let origin = origin(claimed, &parts, state, Some(&body))?;
        // Transactions stand in lines of their own.
        signed(origin, unchecked.raw, parts, state, None).await
    }
}

/// Reads what the path and query name, now that the origin is proved.
async fn signed<B>(
    origin: OwnedServerName,
    body: B,
    mut parts: Parts,
    state: &Federation,
    counted: Option<Counted>,
) -> Result<Signed<B>, Refusal> {
    let path = RawPathParams::from_request_parts(&mut parts, state)
        .await
        .map_err(|rejection| Refusal::malformed("path", rejection.body_text()))?;
    let query = parts.uri.query().unwrap_or_default().to_owned();
    Ok(Signed { origin, body, path, query, counted })
}

/// What the headers claim. It comes before the body is read, so that nobody unknown has one read.
async fn claimed(parts: &Parts, state: &Federation) -> Result<Claimed, Refusal> {
    let context = &state.context;
    let claims = Claims::read(&context.server_name, &parts.headers)?;
    let mut _asker = None;
    if context.keyring.would_ask(&claims.origin, claims.key_ids()).await {
        let (origin, address) = (&claims.origin, peer(parts));
        _asker = Some(match state.askers.enter(origin, address, true) {
            Err(_) if overview::peer(&context.store, origin).await? != overview::Peer::default() => {
                state.askers.enter(origin, address, false)?
            }
            asker => asker?,
        });
    }
    Claimed::with_keys(claims, &context.keyring).await
}

/// In whose share a body is read: a name can be claimed by anybody, so addresses count where they say anything.
fn whose(parts: &Parts, claimed: &Claimed) -> String {
    peer(parts).map_or_else(|| claimed.origin().to_string(), |address| address.to_string())
}

pub(super) fn peer(parts: &Parts) -> Option<IpAddr> {
    parts.extensions.get::<Peer>().and_then(|peer| peer.0)
}

/// The proved origin; `body` is canonical.
fn origin(
    claimed: Claimed,
    parts: &Parts,
    state: &Federation,
    body: Option<&[u8]>,
) -> Result<OwnedServerName, Refusal> {
    let uri = parts.extensions.get::<OriginalUri>().map_or(&parts.uri, |original| &original.0);
    let uri = uri.path_and_query().map_or("/", |path| path.as_str());
    let context = &state.context;
    let body = if parts.method == Method::GET { None } else { body };
    let proved = claimed.prove(&context.server_name, &parts.method, uri, body)?;
    // Whoever speaks can be spoken to: what waits for that server need not wait for its backoff.
    context.outbound.retry(&proved.origin);
    state.lm.heard_of(&proved.origin);
    Ok(proved.origin)
}
