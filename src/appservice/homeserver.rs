//! The client API of the Synapse that the gateway is an appservice of: few calls, bounded in size and time.

use std::path::PathBuf;
use std::time::Duration;

use futures::StreamExt as _;
use http::{Method, StatusCode, header};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use ruma::{OwnedRoomId, OwnedServerName, OwnedUserId, RoomId};
use serde_json::{Map, Value, json};
use url::Url;

use super::Token;
use crate::federation::crypto_provider;

/// How long a request may take.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How long a ping may take: the Synapse itself waits 60 s for the gateway.
const PING_TIMEOUT: Duration = Duration::from_secs(70);
/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How many bytes an answer may have.
const LIMIT: usize = 1 << 20;
/// What is escaped in a path segment; Synapse matches paths as they are written.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// Why the Synapse did not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum HomeserverError {
    /// It answered with an error.
    #[error("{status} {errcode}: {error}")]
    Status {
        /// HTTP status.
        status: StatusCode,
        /// `errcode`, empty when the answer had none.
        errcode: String,
        /// `error`, at most 300 characters of it.
        error: String,
        /// Everything else that it said.
        body: Map<String, Value>,
    },
    /// It could not be reached.
    #[error("not reachable: {0}")]
    Unreachable(String),
    /// It did not answer in time.
    #[error("no answer within {} s", .0.as_secs())]
    Timeout(Duration),
    /// Its answer was too large or no JSON object.
    #[error("bad answer: {0}")]
    BadAnswer(String),
}

impl HomeserverError {
    /// The `errcode`; empty when there is none.
    pub fn errcode(&self) -> &str {
        match self {
            Self::Status { errcode, .. } => errcode,
            _ => "",
        }
    }

    /// The HTTP status, when there was an answer.
    pub fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Status { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// Whether the same may succeed later without anybody changing it.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Status { status, .. } => status.is_server_error() || *status == StatusCode::TOO_MANY_REQUESTS,
            Self::Unreachable(_) | Self::Timeout(_) | Self::BadAnswer(_) => true,
        }
    }
}

/// An answer with what its headers say.
struct Answer {
    body: Map<String, Value>,
    date: Option<String>,
}

/// The Synapse; clones share connections.
#[derive(Clone)]
pub struct Homeserver {
    http: reqwest::Client,
    base: Url,
    token: Token,
}

type Result<T> = std::result::Result<T, HomeserverError>;

impl Homeserver {
    /// The homeserver at `base`, to which `token` is shown.
    pub fn new(base: Url, token: Token, custom_ca: &[PathBuf]) -> Result<Self> {
        crypto_provider();
        let mut builder = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy();
        let mut authorities = Vec::new();
        for path in custom_ca {
            let unusable = |error: &dyn std::fmt::Display| {
                HomeserverError::Unreachable(format!("the authority {} cannot be used: {error}", path.display()))
            };
            let pem = std::fs::read(path).map_err(|error| unusable(&error))?;
            authorities.extend(reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| unusable(&error))?);
        }
        // Over plain http there must be no need for a system with certificate authorities.
        builder = match base.scheme() {
            "http" => builder.tls_certs_only(authorities),
            _ => builder.tls_certs_merge(authorities),
        };
        let http = builder.build().map_err(|error| HomeserverError::Unreachable(chain(&error)))?;
        Ok(Self { http, base, token })
    }

    /// Asks what the server speaks, without a token: whether it is there, and its `Date`.
    pub async fn versions(&self) -> Result<Option<String>> {
        let answer = self.call(Method::GET, &["_matrix", "client", "versions"], None, false, TIMEOUT).await?;
        match answer.body.get("versions") {
            Some(Value::Array(_)) => Ok(answer.date),
            _ => Err(HomeserverError::BadAnswer("it does not list the versions of the Matrix client API".to_owned())),
        }
    }

    /// What server it says that it is, where it answers other servers at the same URL, as Synapse does unless it is told not to.
    pub async fn server_name(&self) -> Option<String> {
        let answer = self.call(Method::GET, &["_matrix", "key", "v2", "server"], None, false, TIMEOUT).await;
        text(&answer.ok()?.body, "server_name").ok()
    }

    /// Whose token this is.
    pub async fn whoami(&self) -> Result<String> {
        let answer =
            self.call(Method::GET, &["_matrix", "client", "v3", "account", "whoami"], None, true, TIMEOUT).await?;
        text(&answer.body, "user_id")
    }

    /// Has the Synapse call the gateway: it then sends what it has held back. Returns how long it took the Synapse.
    pub async fn ping(&self, appservice: &str, transaction_id: &str) -> Result<Duration> {
        let path = ["_matrix", "client", "v1", "appservice", appservice, "ping"];
        let body = json!({ "transaction_id": transaction_id });
        let answer = self.call(Method::POST, &path, Some(body), true, PING_TIMEOUT).await?;
        Ok(Duration::from_millis(answer.body.get("duration_ms").and_then(Value::as_u64).unwrap_or_default()))
    }

    /// Calls an appservice itself, as a homeserver does when it pings it: the base URL is then the appservice's, and the token the
    /// homeserver's.
    pub async fn call_appservice(&self, transaction_id: &str) -> Result<()> {
        let body = json!({ "transaction_id": transaction_id });
        let path = ["_matrix", "app", "v1", "ping"];
        self.call(Method::POST, &path, Some(body), true, TIMEOUT).await.map(drop)
    }

    /// Makes the appservice's own user, which exists after the first time.
    pub async fn register(&self, localpart: &str) -> Result<()> {
        let body = json!({ "type": "m.login.application_service", "username": localpart, "inhibit_login": true });
        match self.call(Method::POST, &["_matrix", "client", "v3", "register"], Some(body), true, TIMEOUT).await {
            Err(error) if error.errcode() == "M_USER_IN_USE" => Ok(()),
            other => other.map(drop),
        }
    }

    /// Says what a user of the appservice is called.
    pub async fn set_displayname(&self, user: &OwnedUserId, name: &str) -> Result<()> {
        let path = ["_matrix", "client", "v3", "profile", user.as_str(), "displayname"];
        self.call(Method::PUT, &path, Some(json!({ "displayname": name })), true, TIMEOUT).await.map(drop)
    }

    /// Makes an alias lead to a room that others join through `servers`.
    pub async fn put_alias(&self, alias: &str, room_id: &RoomId, servers: &[OwnedServerName]) -> Result<()> {
        let body = json!({ "room_id": room_id, "servers": servers });
        self.call(Method::PUT, &directory(alias), Some(body), true, TIMEOUT).await.map(drop)
    }

    /// Where an alias leads that is known to be there; of one that is not, the Synapse would ask the gateway.
    pub async fn alias(&self, alias: &str) -> Result<OwnedRoomId> {
        let answer = self.call(Method::GET, &directory(alias), None, true, TIMEOUT).await?;
        let room_id = text(&answer.body, "room_id")?;
        RoomId::parse(room_id).map_err(|error| HomeserverError::BadAnswer(format!("room_id: {error}")))
    }

    /// Asks, without a token, for an alias that nobody has: makes the Synapse ask the one to whom such aliases belong, the
    /// appservice or another server.
    pub async fn look_up(&self, alias: &str) -> Result<()> {
        self.call(Method::GET, &directory(alias), None, false, PING_TIMEOUT).await.map(drop)
    }

    /// Takes an alias away.
    pub async fn delete_alias(&self, alias: &str) -> Result<()> {
        self.call(Method::DELETE, &directory(alias), None, true, TIMEOUT).await.map(drop)
    }

    /// Puts a room into a list of the homeserver's directory that is the appservice's own, or takes it out. It shows those that anybody
    /// may join and that users of the homeserver are in.
    pub async fn list_room(&self, list: &str, room_id: &RoomId, is_listed: bool) -> Result<()> {
        let path = ["_matrix", "client", "v3", "directory", "list", "appservice", list, room_id.as_str()];
        let body = json!({ "visibility": if is_listed { "public" } else { "private" } });
        self.call(Method::PUT, &path, Some(body), true, TIMEOUT).await.map(drop)
    }

    /// Joins a room as the appservice's user.
    pub async fn join(&self, room_id: &RoomId) -> Result<()> {
        self.in_room(room_id, "join").await
    }

    /// Invites somebody as the appservice's user.
    pub async fn invite(&self, room_id: &RoomId, user: &OwnedUserId) -> Result<()> {
        let path = ["_matrix", "client", "v3", "rooms", room_id.as_str(), "invite"];
        self.call(Method::POST, &path, Some(json!({ "user_id": user })), true, TIMEOUT).await.map(drop)
    }

    /// Leaves a room, or rejects an invite, as the appservice's user.
    pub async fn leave(&self, room_id: &RoomId) -> Result<()> {
        self.in_room(room_id, "leave").await
    }

    /// Says something as the appservice's user; the same transaction ID again says nothing.
    pub async fn notice(&self, room_id: &RoomId, transaction_id: &str, body: &str) -> Result<()> {
        let path = ["_matrix", "client", "v3", "rooms", room_id.as_str(), "send", "m.room.message", transaction_id];
        let content = json!({ "msgtype": "m.notice", "body": body });
        self.call(Method::PUT, &path, Some(content), true, TIMEOUT).await.map(drop)
    }

    async fn in_room(&self, room_id: &RoomId, what: &str) -> Result<()> {
        let path = ["_matrix", "client", "v3", "rooms", room_id.as_str(), what];
        self.call(Method::POST, &path, Some(json!({})), true, TIMEOUT).await.map(drop)
    }

    async fn call(
        &self,
        method: Method,
        path: &[&str],
        body: Option<Value>,
        with_token: bool,
        timeout: Duration,
    ) -> Result<Answer> {
        match tokio::time::timeout(timeout, self.answer(method, path, body, with_token)).await {
            Ok(answer) => answer,
            Err(_) => Err(HomeserverError::Timeout(timeout)),
        }
    }

    async fn answer(&self, method: Method, path: &[&str], body: Option<Value>, with_token: bool) -> Result<Answer> {
        let mut request = self.http.request(method, self.url(path));
        if with_token {
            request = request.bearer_auth(self.token.expose());
        }
        if let Some(body) = &body {
            request = request.json(body);
        }
        let response = request.send().await.map_err(|error| HomeserverError::Unreachable(chain(&error)))?;
        let status = response.status();
        let date = response.headers().get(header::DATE).and_then(|date| date.to_str().ok()).map(str::to_owned);
        let bytes = bounded(response).await?;
        let parsed = serde_json::from_slice::<Map<String, Value>>(&bytes);
        if !status.is_success() {
            let body = parsed.unwrap_or_default();
            let errcode = text(&body, "errcode").unwrap_or_default();
            let error = text(&body, "error").unwrap_or_default().chars().take(300).collect();
            return Err(HomeserverError::Status { status, errcode, error, body });
        }
        let body = parsed.map_err(|_| HomeserverError::BadAnswer(format!("{status} with no JSON object")))?;
        Ok(Answer { body, date })
    }

    fn url(&self, path: &[&str]) -> String {
        let mut url = self.base.as_str().trim_end_matches('/').to_owned();
        for segment in path {
            url.push('/');
            url.extend(utf8_percent_encode(segment, SEGMENT));
        }
        url
    }
}

async fn bounded(response: reqwest::Response) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut chunks = response.bytes_stream();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|error| HomeserverError::Unreachable(chain(&error)))?;
        if bytes.len().saturating_add(chunk.len()) > LIMIT {
            return Err(HomeserverError::BadAnswer(format!("more than {LIMIT} bytes")));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

fn directory(alias: &str) -> [&str; 6] {
    ["_matrix", "client", "v3", "directory", "room", alias]
}

fn text(body: &Map<String, Value>, name: &str) -> Result<String> {
    match body.get(name) {
        Some(Value::String(text)) => Ok(text.clone()),
        _ => Err(HomeserverError::BadAnswer(format!("there is no {name} in it"))),
    }
}

/// An error with its causes, without the URL.
fn chain(error: &reqwest::Error) -> String {
    let mut parts = Vec::new();
    let mut next: Option<&dyn std::error::Error> = std::error::Error::source(error);
    while let Some(cause) = next {
        let part = cause.to_string();
        if parts.last() != Some(&part) {
            parts.push(part);
        }
        next = cause.source();
    }
    if parts.is_empty() { error.to_string() } else { parts.join(": ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_segments_are_escaped_and_a_base_path_is_kept() {
        let base = "http://127.0.0.1:1/matrix/".parse().unwrap();
        let homeserver = Homeserver::new(base, Token::new("t"), &[]).unwrap();
        let url = homeserver.url(&directory("#lm_a/b?_hub:example.org"));
        assert_eq!(url, "http://127.0.0.1:1/matrix/_matrix/client/v3/directory/room/%23lm_a%2Fb%3F_hub%3Aexample.org");
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_is_unreachable() {
        // A port that was free a moment ago.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let base = format!("http://127.0.0.1:{port}").parse().unwrap();
        let error = Homeserver::new(base, Token::new("t"), &[]).unwrap().versions().await.unwrap_err();
        assert!(matches!(&error, HomeserverError::Unreachable(problem) if problem.contains("refused")), "{error}");
    }
}
