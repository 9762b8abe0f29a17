//! Requests of other servers as handlers take them: read within bounds, parsed, and with a proved origin.

use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody as _};
use axum::extract::{FromRequest, OriginalUri, Request};
use bytes::BytesMut;
use futures::StreamExt as _;
use http::Method;
use http::request::Parts;
use ruma::OwnedServerName;

use super::routes::Federation;
use crate::event::{Object, canonical_json, canonical_text, parse_object};
use crate::federation::{Claimed, Counted, Reserved};
use crate::refusal::Refusal;

/// How long a body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
/// The size of a body, but for transactions: an event of 64 KiB and what goes with it.
const BODY_LIMIT: usize = 1 << 20;
/// The size of a transaction: 50 PDUs of 64 KiB and 100 EDUs.
const TRANSACTION_LIMIT: usize = 10 << 20;
/// How often a body is in memory while its signature is checked: as read, in canonical form, and in the signed message.
const COPIES: usize = 4;
/// How many bytes those copies may have together, of all requests whose origin is not proved yet.
pub(super) const UNPROVED_LIMIT: usize = 384 << 20;

/// A GET whose origin is proved.
pub(super) struct Signed {
    pub origin: OwnedServerName,
    _counted: Counted,
}

/// A PUT or POST whose origin is proved, and its body.
pub(super) struct SignedBody {
    pub origin: OwnedServerName,
    pub body: Object,
    _counted: Counted,
}

/// A transaction whose origin is proved; its events are still text, to be parsed one by one.
pub(super) struct SignedTransaction {
    pub origin: OwnedServerName,
    pub raw: Bytes,
}

impl FromRequest<Federation> for Signed {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &Federation) -> Result<Self, Refusal> {
        let (parts, _) = request.into_parts();
        let claimed = claimed(&parts, state).await?;
        let origin = origin(claimed, &parts, state, None)?;
        Ok(Self { _counted: state.underway.enter(&origin)?, origin })
    }
}

impl FromRequest<Federation> for SignedBody {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &Federation) -> Result<Self, Refusal> {
        let (parts, body) = request.into_parts();
        let claimed = claimed(&parts, state).await?;
        let mut reserved = state.unproved.reserve();
        let raw = read(body, "request body", BODY_LIMIT, &mut reserved).await?;
        let body = parse_object(&raw)?;
        let origin = origin(claimed, &parts, state, Some(&canonical_json(&body)))?;
        Ok(Self { _counted: state.underway.enter(&origin)?, origin, body })
    }
}

impl FromRequest<Federation> for SignedTransaction {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &Federation) -> Result<Self, Refusal> {
        let (parts, body) = request.into_parts();
        let claimed = claimed(&parts, state).await?;
        let mut reserved = state.unproved.reserve();
        let raw = read(body, "transaction", TRANSACTION_LIMIT, &mut reserved).await?;
        // Duplicate keys inside one event are that event's fault alone, so the signature is checked over what any JSON
        // parser makes of the body; each event is parsed strictly later.
        let body = canonical_text(&raw)?;
        Ok(Self { origin: origin(claimed, &parts, state, Some(&body))?, raw })
    }
}

/// What the headers claim. It comes before the body is read, so that nobody unknown has one read.
async fn claimed(parts: &Parts, state: &Federation) -> Result<Claimed, Refusal> {
    let context = &state.context;
    Claimed::read(&context.keyring, &context.server_name, &parts.headers).await
}

async fn read(body: Body, what: &'static str, limit: usize, reserved: &mut Reserved) -> Result<Bytes, Refusal> {
    let too_large = || Refusal::TooLarge { what, size: limit.saturating_add(1), limit };
    let declared = body.size_hint().exact();
    if declared.is_some_and(|size| usize::try_from(size).map_or(true, |size| size > limit)) {
        return Err(too_large());
    }
    let whole = async {
        let mut raw = BytesMut::new();
        let mut chunks = body.into_data_stream();
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|error| Refusal::NotJson(format!("the {what} could not be read: {error}")))?;
            if raw.len().saturating_add(chunk.len()) > limit {
                return Err(too_large());
            }
            if !reserved.grow(chunk.len().saturating_mul(COPIES)) {
                return Err(Refusal::Budget { what: "requests being read".to_owned(), retry_after_ms: 2_000 });
            }
            raw.extend_from_slice(&chunk);
        }
        Ok(raw.freeze())
    };
    match tokio::time::timeout(BODY_TIMEOUT, whole).await {
        Ok(read) => read,
        Err(_) => Err(Refusal::NotJson(format!("the {what} did not arrive within {BODY_TIMEOUT:?}"))),
    }
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
    Ok(proved.origin)
}
