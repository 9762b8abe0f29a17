//! Asking the server that has a file: by authenticated federation, as Matrix has it today and LM takes over, else by the open
//! download of before. Where an answer leads elsewhere, it is followed.
//! <https://spec.matrix.org/latest/server-server-api/#content-repository>

use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use http::{HeaderMap, HeaderName, StatusCode, header};
use ruma::ServerName;

use super::about::About;
use super::multipart::{Found, Malformed, Parts, boundary};
use crate::federation::{Bytewise, Context, Opened, RemoteError};
use crate::identity::Medium;
use crate::refusal::Refusal;

/// How long a server may wait for a file that is still being uploaded, in milliseconds; what Matrix clients wait for.
const WAIT_MS: u64 = 20_000;
/// How long the head of an answer may take.
const HEAD: Duration = Duration::from_secs(25);
/// How often an answer may lead elsewhere.
const HOPS: usize = 3;

/// How much may be around a file in an answer: more than is read before it, and some that may follow.
const MOST_AROUND: u64 = 256 << 10;

/// A file that comes.
pub(super) struct Coming {
    pub(super) about: About,
    /// How long it is, where that is said beforehand.
    pub(super) length: Option<u64>,
    /// How long it is at least, by what is said of the whole answer.
    pub(super) at_least: u64,
    body: Bytewise,
    parts: Option<Parts>,
}

/// Asks for a file, and returns when it begins to come.
pub(super) async fn ask(context: &Context, medium: &Medium) -> Result<Coming, Refusal> {
    let asked = authenticated(context, medium).await;
    let asked = match asked {
        Err(error) if error.is_unrecognized() => open(context, medium).await,
        asked => asked,
    };
    asked.map_err(|error| refusal(error, medium))
}

async fn authenticated(context: &Context, medium: &Medium) -> Result<Coming, RemoteError> {
    let Medium { server, media_id, .. } = medium;
    let keys = context.keyring.server_keys(server).await;
    let linearized = keys.is_ok_and(|keys| keys.linearized);
    let uri = format!("/_matrix/federation/v1/media/download/{media_id}?timeout_ms={WAIT_MS}");
    match context.client.open(server, &uri, Some(linearized), HEAD).await? {
        Opened::Body { headers, length, body } => in_parts(context, &headers, length, body).await,
        Opened::Elsewhere(url) => elsewhere(context, url).await,
    }
}

/// As servers without authenticated media have it.
async fn open(context: &Context, medium: &Medium) -> Result<Coming, RemoteError> {
    let Medium { server, media_id, .. } = medium;
    let uri = format!(
        "/_matrix/media/v3/download/{server}/{media_id}?allow_remote=false&allow_redirect=true&timeout_ms={WAIT_MS}"
    );
    match context.client.open(server, &uri, None, HEAD).await? {
        Opened::Body { headers, length, body } => whole(&headers, length, body),
        Opened::Elsewhere(url) => elsewhere(context, url).await,
    }
}

async fn elsewhere(context: &Context, url: String) -> Result<Coming, RemoteError> {
    let mut url = url;
    for _ in 0..HOPS {
        match context.client.open_elsewhere(&url, HEAD).await? {
            Opened::Body { headers, length, body } => return whole(&headers, length, body),
            Opened::Elsewhere(next) => url = next,
        }
    }
    Err(RemoteError::BadAnswer(format!("it leads elsewhere more than {HOPS} times")))
}

fn whole(headers: &HeaderMap, length: Option<u64>, body: Bytewise) -> Result<Coming, RemoteError> {
    if text(headers, header::CONTENT_ENCODING).is_some_and(|encoding| !encoding.eq_ignore_ascii_case("identity")) {
        return Err(RemoteError::BadAnswer("it is compressed, which nobody asked for".to_owned()));
    }
    let about = About::read(text(headers, header::CONTENT_TYPE), text(headers, header::CONTENT_DISPOSITION));
    Ok(Coming { about, length, at_least: 0, body, parts: None })
}

/// Reads up to the file.
async fn in_parts(
    context: &Context,
    headers: &HeaderMap,
    length: Option<u64>,
    mut body: Bytewise,
) -> Result<Coming, RemoteError> {
    let at_least = length.unwrap_or(0).saturating_sub(MOST_AROUND);
    let boundary = boundary(text(headers, header::CONTENT_TYPE).unwrap_or_default()).map_err(malformed)?;
    let mut parts = Parts::new(&boundary);
    loop {
        match parts.next().map_err(malformed)? {
            Found::File(about) => {
                return Ok(Coming { about, length: None, at_least, body, parts: Some(parts) });
            }
            Found::Elsewhere(url) => return elsewhere(context, url).await,
            Found::Nothing | Found::Bytes(_) => match body.next().await {
                Some(chunk) => parts.push(&chunk?),
                None => return Err(malformed(Malformed::NoFile)),
            },
            Found::End => return Err(malformed(Malformed::NoFile)),
        }
    }
}

impl Coming {
    /// More of the file; none at its end. What breaks off before that is an error.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, RemoteError> {
        let Some(parts) = &mut self.parts else { return self.body.next().await.transpose() };
        loop {
            match parts.next().map_err(malformed)? {
                Found::Bytes(bytes) => return Ok(Some(bytes)),
                Found::End => return Ok(None),
                _ => match self.body.next().await {
                    Some(chunk) => parts.push(&chunk?),
                    None => return parts.finish().map(|()| None).map_err(malformed),
                },
            }
        }
    }
}

fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

fn malformed(problem: Malformed) -> RemoteError {
    RemoteError::BadAnswer(problem.to_string())
}

/// What a server's answer means for whoever asked here.
pub(super) fn refusal(error: RemoteError, medium: &Medium) -> Refusal {
    let server = &medium.server;
    let RemoteError::Status { status, errcode, retry_after, .. } = &error else { return error.into_refusal(server) };
    match (*status, errcode.as_str()) {
        (_, "M_TOO_LARGE") | (StatusCode::PAYLOAD_TOO_LARGE, _) => too_large(server, "the server says that"),
        (StatusCode::NOT_FOUND, _) => Refusal::NotFound(format!("the file {}", medium.uri())),
        (StatusCode::TOO_MANY_REQUESTS, _) => {
            let wait = retry_after.map_or(5_000, |wait| u64::try_from(wait.as_millis()).unwrap_or(u64::MAX));
            Refusal::Budget { what: format!("files of {server}, as it says"), retry_after_ms: wait.min(600_000) }
        }
        (StatusCode::GATEWAY_TIMEOUT, _) => Refusal::Declined {
            server: server.to_string(),
            status: 504,
            errcode: "M_NOT_YET_UPLOADED".into(),
            error: "the file has not been uploaded yet".into(),
            retry_after_ms: None,
        },
        _ => error.into_refusal(server),
    }
}

/// The refusal of a file that is too large, with the status that the specification has for it.
pub(super) fn too_large(server: &ServerName, who: &str) -> Refusal {
    Refusal::Declined {
        server: server.to_string(),
        status: 502,
        errcode: "M_TOO_LARGE".into(),
        error: format!("{who} the file is too large").into(),
        retry_after_ms: None,
    }
}
