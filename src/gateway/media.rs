//! Files of the other side, as servers ask for them: signed, and answered in the form of authenticated media.
//! <https://spec.matrix.org/latest/server-server-api/#content-repository>

use axum::body::{Body, Bytes};
use axum::response::Response;
use data_encoding::HEXLOWER;
use futures::stream::{self, StreamExt as _};
use http::{HeaderValue, header};
use rand::RngCore as _;
use rand::rngs::OsRng;

use super::routes::Federation;
use super::signed::Asked;
use crate::media::Served;
use crate::refusal::Refusal;

/// A file.
pub(super) async fn download(federation: Federation, asked: Asked) -> Result<Response, Refusal> {
    let served = file(&federation, asked).await?;
    in_parts(served)
}

/// A small picture of a picture: the picture itself, since nothing is decoded here. Whoever asks may get a larger one than wanted.
pub(super) async fn thumbnail(federation: Federation, asked: Asked) -> Result<Response, Refusal> {
    let served = file(&federation, asked).await?;
    if !served.about.is_image() {
        return Err(Refusal::NotFound(format!("a picture of a file of the type {}", served.about.content_type)));
    }
    in_parts(served)
}

async fn file(federation: &Federation, mut asked: Asked) -> Result<Served, Refusal> {
    // Its server may take its time, which must not keep those who wait for it from asking for anything else.
    asked.counts_elsewhere();
    federation.media.get(&asked.origin, asked.segment("media_id")).await
}

/// The answer: a part of JSON, which says nothing yet, and the file.
fn in_parts(served: Served) -> Result<Response, Refusal> {
    let mut random = [0; 16];
    OsRng.fill_bytes(&mut random);
    let boundary = HEXLOWER.encode(&random);
    let Served { about, length, bytes } = served;
    let before = format!(
        "--{boundary}\r\nContent-Type: application/json\r\n\r\n{{}}\r\n\
         --{boundary}\r\nContent-Type: {}\r\nContent-Disposition: {}\r\n\r\n",
        about.content_type,
        about.disposition(),
    );
    let after = format!("\r\n--{boundary}--\r\n");
    let around = u64::try_from(before.len().saturating_add(after.len())).unwrap_or(u64::MAX);
    let whole = |text: String| stream::once(async { Ok(Bytes::from(text)) });
    let body = Body::from_stream(whole(before).chain(bytes).chain(whole(after)));
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    // Nothing behind the boundary, and no quotes: Synapse takes all that follows for it.
    let content_type = format!("multipart/mixed; boundary={boundary}");
    let value = |text: String| HeaderValue::try_from(text).map_err(|error| Refusal::Internal(error.to_string()));
    headers.insert(header::CONTENT_TYPE, value(content_type)?);
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static("sandbox; default-src 'none'"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("private, no-store"));
    if let Some(length) = length {
        headers.insert(header::CONTENT_LENGTH, value(length.saturating_add(around).to_string())?);
    }
    Ok(response)
}
