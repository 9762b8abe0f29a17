//! Files: the provider's users' own, which other servers fetch, and those of other servers, in the form of Matrix's authenticated media.

use anyhow::{Context as _, Result, bail, ensure};
use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse as _, Response};
use http::{HeaderMap, Method, StatusCode, header};
use ruma::OwnedServerName;

use super::server::Fault;
use super::{Inner, Provider, lock};

/// Where a file is asked for.
const PATH: &str = "/_matrix/federation/v1/media/download/";
const BOUNDARY: &str = "provider-boundary";

/// A file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    pub content_type: String,
    pub bytes: Vec<u8>,
}

impl Provider {
    /// Keeps a file of a user, and gives its URI.
    pub fn upload(&self, content_type: &str, bytes: &[u8]) -> String {
        let mut files = lock(&self.0.files);
        let id = format!("file-{}", files.len());
        files.insert(id.clone(), File { content_type: content_type.to_owned(), bytes: bytes.to_vec() });
        format!("mxc://{}/{id}", self.server_name())
    }

    /// Fetches a file from the server that its URI names.
    pub async fn download(&self, uri: &str) -> Result<File> {
        let (server, id) = uri.strip_prefix("mxc://").and_then(|rest| rest.split_once('/')).context("no mxc URI")?;
        let server: OwnedServerName = server.try_into()?;
        let (headers, body) = self.0.network.get(&server, &format!("{PATH}{id}")).await?;
        read(&headers, &body)
    }
}

/// The ID of the file that is asked for.
pub(super) fn asked(path: &str) -> Option<&str> {
    path.strip_prefix(PATH)
}

impl Inner {
    pub(super) async fn file(&self, request: Request<Body>) -> Response {
        let (parts, _) = request.into_parts();
        let uri = parts.uri.path_and_query().map(ToString::to_string).unwrap_or_default();
        if let Err(error) = self.network.origin(&Method::GET, &uri, &parts.headers, None).await {
            let (errcode, error) = ("M_FORBIDDEN".to_owned(), format!("{error:#}"));
            return Fault { status: StatusCode::UNAUTHORIZED, errcode, error }.into_response();
        }
        let found = asked(parts.uri.path()).and_then(|id| lock(&self.files).get(id).cloned());
        let Some(File { content_type, bytes }) = found else {
            let (errcode, error) = ("M_NOT_FOUND".to_owned(), "there is no such file".to_owned());
            return Fault { status: StatusCode::NOT_FOUND, errcode, error }.into_response();
        };
        let mut body = format!(
            "--{BOUNDARY}\r\nContent-Type: application/json\r\n\r\n{{}}\r\n--{BOUNDARY}\r\nContent-Type: {content_type}\r\n\r\n"
        )
        .into_bytes();
        body.extend(bytes);
        body.extend(format!("\r\n--{BOUNDARY}--\r\n").bytes());
        ([(header::CONTENT_TYPE, format!("multipart/mixed; boundary={BOUNDARY}"))], body).into_response()
    }
}

/// The file in an answer.
fn read(headers: &HeaderMap, body: &[u8]) -> Result<File> {
    let kind = headers.get(header::CONTENT_TYPE).context("no content type")?.to_str()?;
    let (kind, boundary) = kind.split_once("; boundary=").context("no boundary")?;
    ensure!(kind == "multipart/mixed", "not multipart/mixed but {kind}");
    let find = |haystack: &[u8], needle: &[u8]| haystack.windows(needle.len()).position(|window| window == needle);
    let second = format!("\r\n--{boundary}\r\n");
    let start = find(body, second.as_bytes()).context("no second part")? + second.len();
    let part = body.get(start..).context("no second part")?;
    let head = find(part, b"\r\n\r\n").context("no headers")?;
    let Some(bytes) =
        part.get(head + 4..).and_then(|rest| rest.strip_suffix(format!("\r\n--{boundary}--\r\n").as_bytes()))
    else {
        bail!("the answer breaks off");
    };
    let text = std::str::from_utf8(part.get(..head).unwrap_or_default())?;
    let mut named = text.lines().filter_map(|line| line.split_once(": "));
    let content_type = named.find(|(name, _)| name.eq_ignore_ascii_case("content-type"));
    let content_type = content_type.context("no content type of the file")?.1.to_owned();
    Ok(File { content_type, bytes: bytes.to_vec() })
}
