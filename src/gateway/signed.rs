//! Requests of other servers as handlers take them: read within bounds, parsed, and with a proved origin.

use std::time::Duration;

use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{FromRequest, OriginalUri, Request};
use http::Method;
use http::request::Parts;
use ruma::OwnedServerName;

use super::routes::Federation;
use crate::event::{Object, canonical_json, canonical_text, parse_object};
use crate::federation::authenticate_canonical;
use crate::refusal::Refusal;

/// How long a body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
/// The size of a body, but for transactions: an event of 64 KiB and what goes with it.
const BODY_LIMIT: usize = 1 << 20;
/// The size of a transaction: 50 PDUs of 64 KiB and 100 EDUs.
pub(super) const TRANSACTION_LIMIT: usize = 10 << 20;

/// A GET whose origin is proved.
pub(super) struct Signed {
    pub origin: OwnedServerName,
}

/// A PUT or POST whose origin is proved, and its body.
pub(super) struct SignedBody {
    pub origin: OwnedServerName,
    pub body: Object,
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
        Ok(Self { origin: origin(&parts, state, None).await? })
    }
}

impl FromRequest<Federation> for SignedBody {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &Federation) -> Result<Self, Refusal> {
        let (parts, body) = request.into_parts();
        let raw = read(body, "request body", BODY_LIMIT).await?;
        let body = parse_object(&raw)?;
        Ok(Self { origin: origin(&parts, state, Some(&canonical_json(&body))).await?, body })
    }
}

impl FromRequest<Federation> for SignedTransaction {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &Federation) -> Result<Self, Refusal> {
        let (parts, body) = request.into_parts();
        let raw = read(body, "transaction", TRANSACTION_LIMIT).await?;
        // Duplicate keys inside one event are that event's fault alone, so the signature is checked over what any JSON
        // parser makes of the body; each event is parsed strictly later.
        let body = canonical_text(&raw)?;
        Ok(Self { origin: origin(&parts, state, Some(&body)).await?, raw })
    }
}

async fn read(body: Body, what: &'static str, limit: usize) -> Result<Bytes, Refusal> {
    match tokio::time::timeout(BODY_TIMEOUT, to_bytes(body, limit)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) if is_length_limit(&error) => {
            Err(Refusal::TooLarge { what, size: limit.saturating_add(1), limit })
        }
        Ok(Err(error)) => Err(Refusal::NotJson(format!("the {what} could not be read: {error}"))),
        Err(_) => Err(Refusal::NotJson(format!("the {what} did not arrive within {BODY_TIMEOUT:?}"))),
    }
}

fn is_length_limit(error: &axum::Error) -> bool {
    let mut source: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = source {
        if error.is::<http_body_util::LengthLimitError>() {
            return true;
        }
        source = error.source();
    }
    false
}

/// The proved origin; `body` is canonical.
async fn origin(parts: &Parts, state: &Federation, body: Option<&[u8]>) -> Result<OwnedServerName, Refusal> {
    let uri = parts.extensions.get::<OriginalUri>().map_or(&parts.uri, |original| &original.0);
    let uri = uri.path_and_query().map_or("/", |path| path.as_str());
    let context = &state.context;
    let body = if parts.method == Method::GET { None } else { body };
    let proved =
        authenticate_canonical(&context.keyring, &context.server_name, &parts.method, uri, &parts.headers, body)
            .await?;
    // Whoever speaks can be spoken to: what waits for that server need not wait for its backoff.
    context.outbound.retry(&proved.origin);
    Ok(proved.origin)
}
