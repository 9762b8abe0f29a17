//! A Matrix client: as much of the client API as the scenarios need. What it has seen by `/sync` is kept, so that waiting
//! for an event never misses one that came before.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::sync::Mutex;

/// How long anything may take that is waited for.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A logged-in user.
pub struct Client {
    /// The user's ID.
    pub user_id: String,
    http: reqwest::Client,
    url: String,
    token: String,
    transaction: AtomicU64,
    seen: Mutex<Seen>,
}

/// What `/sync` has brought.
#[derive(Default)]
struct Seen {
    next_batch: Option<String>,
    /// State and timeline of each room, as they came.
    timelines: BTreeMap<String, Vec<Value>>,
    invites: BTreeMap<String, Value>,
    /// Who types and who has read what, as it came.
    ephemeral: BTreeMap<String, Vec<Value>>,
}

/// An error that the server answered with.
#[derive(Debug, thiserror::Error)]
#[error("{method} {path}: {status} {errcode}: {error}")]
pub struct MatrixError {
    /// The request's method.
    pub method: Method,
    /// The request's path.
    pub path: String,
    /// The HTTP status.
    pub status: StatusCode,
    /// The Matrix error code.
    pub errcode: String,
    /// The text.
    pub error: String,
}

/// An HTTP client that trusts the given authority besides no other.
pub fn http(ca: Option<&std::path::Path>) -> Result<reqwest::Client> {
    // Whoever is first installs it for the process.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let mut builder = reqwest::Client::builder().timeout(Duration::from_secs(90));
    let authorities = match ca {
        Some(path) => vec![reqwest::Certificate::from_pem(&std::fs::read(path)?)?],
        None => Vec::new(),
    };
    builder = builder.tls_certs_only(authorities);
    Ok(builder.build()?)
}

/// A path segment, percent-encoded.
pub fn segment(text: &str) -> String {
    percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string()
}

impl Client {
    /// Registers a user at the homeserver behind `url`.
    pub async fn register(url: &str, localpart: &str, password: &str) -> Result<Self> {
        let body = json!({ "username": localpart, "password": password, "auth": { "type": "m.login.dummy" } });
        Self::enter(url, "register", body).await
    }

    /// Logs a user in.
    pub async fn login(url: &str, localpart: &str, password: &str) -> Result<Self> {
        let user = json!({ "type": "m.id.user", "user": localpart });
        Self::enter(url, "login", json!({ "type": "m.login.password", "identifier": user, "password": password })).await
    }

    async fn enter(url: &str, endpoint: &str, body: Value) -> Result<Self> {
        let mut client = Self {
            user_id: String::new(),
            http: http(None)?,
            url: url.to_owned(),
            token: String::new(),
            transaction: AtomicU64::new(0),
            seen: Mutex::default(),
        };
        let answer = client.call(Method::POST, &format!("/_matrix/client/v3/{endpoint}"), Some(body)).await?;
        client.user_id = string(&answer, "user_id")?;
        client.token = string(&answer, "access_token")?;
        Ok(client)
    }

    /// Any request; `path` is percent-encoded, with its query.
    pub async fn call(&self, method: Method, path: &str, body: Option<Value>) -> Result<Value> {
        let mut request = self.http.request(method.clone(), format!("{}{path}", self.url));
        if !self.token.is_empty() {
            request = request.bearer_auth(&self.token);
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await.with_context(|| format!("{method} {path}"))?;
        let status = response.status();
        let answer: Value = response.json().await.with_context(|| format!("{method} {path}: {status}"))?;
        if status.is_success() {
            return Ok(answer);
        }
        let text = |key: &str| answer.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (errcode, error) = (text("errcode"), text("error"));
        Err(MatrixError { method, path: path.to_owned(), status, errcode, error }.into())
    }

    async fn in_room(&self, method: Method, room: &str, rest: &str, body: Option<Value>) -> Result<Value> {
        self.call(method, &format!("/_matrix/client/v3/rooms/{}/{rest}", segment(room)), body).await
    }

    /// Uploads a file and returns its URI.
    pub async fn upload(&self, content_type: &str, name: &str, bytes: &[u8]) -> Result<String> {
        let path = format!("{}/_matrix/media/v3/upload?filename={}", self.url, segment(name));
        let request = self.http.post(path).bearer_auth(&self.token);
        let request = request.header("content-type", content_type).body(bytes.to_vec());
        string(&request.send().await?.error_for_status()?.json().await?, "content_uri")
    }

    /// Fetches the file with this URI, or a picture of it with `thumbnail`; its type, and what it consists of.
    pub async fn download(&self, uri: &str, thumbnail: bool) -> Result<(String, Vec<u8>)> {
        let path = uri.strip_prefix("mxc://").with_context(|| format!("{uri:?} is no URI of a file"))?;
        let path = match thumbnail {
            true => format!("thumbnail/{path}?width=32&height=32&method=scale"),
            false => format!("download/{path}"),
        };
        let request = self.http.get(format!("{}/_matrix/client/v1/media/{path}", self.url)).bearer_auth(&self.token);
        let response = request.send().await?;
        let status = response.status();
        let kind = response.headers().get("content-type").and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        let kind = kind.to_owned();
        let body = response.bytes().await?;
        if !status.is_success() {
            bail!("{uri}: {status} {}", String::from_utf8_lossy(&body));
        }
        Ok((kind, body.to_vec()))
    }

    /// Sets the user's avatar.
    pub async fn set_avatar(&self, uri: &str) -> Result<()> {
        let path = format!("/_matrix/client/v3/profile/{}/avatar_url", segment(&self.user_id));
        self.call(Method::PUT, &path, Some(json!({ "avatar_url": uri }))).await.map(drop)
    }

    /// Sets the user's display name.
    pub async fn set_display_name(&self, name: &str) -> Result<()> {
        let path = format!("/_matrix/client/v3/profile/{}/displayname", segment(&self.user_id));
        self.call(Method::PUT, &path, Some(json!({ "displayname": name }))).await?;
        Ok(())
    }

    /// Creates a room and returns its ID.
    pub async fn create_room(&self, body: Value) -> Result<String> {
        string(&self.call(Method::POST, "/_matrix/client/v3/createRoom", Some(body)).await?, "room_id")
    }

    /// Joins a room by alias or ID, through the servers in `via`, and returns the room's ID.
    pub async fn join(&self, room: &str, via: &[&str]) -> Result<String> {
        let via: Vec<String> = via
            .iter()
            .flat_map(|server| ["via", "server_name"].map(|key| format!("{key}={}", segment(server))))
            .collect();
        let path = format!("/_matrix/client/v3/join/{}?{}", segment(room), via.join("&"));
        string(&self.call(Method::POST, &path, Some(json!({}))).await?, "room_id")
    }

    /// Leaves a room, or declines an invite.
    pub async fn leave(&self, room: &str) -> Result<()> {
        self.in_room(Method::POST, room, "leave", Some(json!({}))).await.map(drop)
    }

    /// Invites a user.
    pub async fn invite(&self, room: &str, user: &str) -> Result<()> {
        self.in_room(Method::POST, room, "invite", Some(json!({ "user_id": user }))).await.map(drop)
    }

    /// Kicks a user.
    pub async fn kick(&self, room: &str, user: &str, reason: &str) -> Result<()> {
        self.in_room(Method::POST, room, "kick", Some(json!({ "user_id": user, "reason": reason }))).await.map(drop)
    }

    /// Bans a user.
    pub async fn ban(&self, room: &str, user: &str, reason: &str) -> Result<()> {
        self.in_room(Method::POST, room, "ban", Some(json!({ "user_id": user, "reason": reason }))).await.map(drop)
    }

    /// Lifts a ban.
    pub async fn unban(&self, room: &str, user: &str) -> Result<()> {
        self.in_room(Method::POST, room, "unban", Some(json!({ "user_id": user }))).await.map(drop)
    }

    /// Sends an event and returns its ID.
    pub async fn send(&self, room: &str, kind: &str, content: Value) -> Result<String> {
        let number = self.transaction.fetch_add(1, Ordering::SeqCst);
        let answer =
            self.in_room(Method::PUT, room, &format!("send/{}/{number}", segment(kind)), Some(content)).await?;
        string(&answer, "event_id")
    }

    /// Sends a text message and returns its event ID.
    pub async fn send_text(&self, room: &str, body: &str) -> Result<String> {
        self.send(room, "m.room.message", json!({ "msgtype": "m.text", "body": body })).await
    }

    /// Redacts an event.
    pub async fn redact(&self, room: &str, event_id: &str, reason: &str) -> Result<()> {
        let number = self.transaction.fetch_add(1, Ordering::SeqCst);
        let rest = format!("redact/{}/{number}", segment(event_id));
        self.in_room(Method::PUT, room, &rest, Some(json!({ "reason": reason }))).await.map(drop)
    }

    /// Sets a state event and returns its ID.
    pub async fn set_state(&self, room: &str, kind: &str, state_key: &str, content: Value) -> Result<String> {
        let rest = format!("state/{}/{}", segment(kind), segment(state_key));
        string(&self.in_room(Method::PUT, room, &rest, Some(content)).await?, "event_id")
    }

    /// The content of a state event; none when there is no such event.
    pub async fn state(&self, room: &str, kind: &str, state_key: &str) -> Result<Option<Value>> {
        let rest = format!("state/{}/{}", segment(kind), segment(state_key));
        match self.in_room(Method::GET, room, &rest, None).await {
            Ok(content) => Ok(Some(content)),
            Err(error) => match error.downcast_ref::<MatrixError>() {
                Some(MatrixError { status: StatusCode::NOT_FOUND, .. }) => Ok(None),
                _ => Err(error),
            },
        }
    }

    /// All current state events.
    pub async fn full_state(&self, room: &str) -> Result<Vec<Value>> {
        match self.in_room(Method::GET, room, "state", None).await? {
            Value::Array(events) => Ok(events),
            other => bail!("the state is {other}"),
        }
    }

    /// The contents of the members' events, by user ID.
    pub async fn members(&self, room: &str) -> Result<BTreeMap<String, Value>> {
        let events = self.full_state(room).await?.into_iter();
        let members = events.filter(|event| event["type"] == "m.room.member");
        members.map(|event| Ok((string(&event, "state_key")?, event["content"].clone()))).collect()
    }

    /// One event.
    pub async fn event(&self, room: &str, event_id: &str) -> Result<Value> {
        self.in_room(Method::GET, room, &format!("event/{}", segment(event_id)), None).await
    }

    /// Every event of the room's history that the user may see, oldest first.
    pub async fn history(&self, room: &str) -> Result<Vec<Value>> {
        let (mut events, mut from) = (Vec::new(), String::new());
        loop {
            let page = self.in_room(Method::GET, room, &format!("messages?dir=b&limit=500{from}"), None).await?;
            let chunk = page["chunk"].as_array().cloned().unwrap_or_default();
            let end = page["end"].as_str().map(segment);
            events.extend(chunk);
            match end {
                Some(end) => from = format!("&from={end}"),
                None => break,
            }
        }
        events.reverse();
        Ok(events)
    }

    /// Asks once for news and waits for them at most `wait`.
    async fn sync(&self, seen: &mut Seen, wait: Duration) -> Result<()> {
        let filter = json!({ "room": { "timeline": { "limit": 5000 } }, "presence": { "types": [] } });
        let since = seen.next_batch.as_ref().map(|since| format!("&since={}", segment(since))).unwrap_or_default();
        let path = format!(
            "/_matrix/client/v3/sync?timeout={}&filter={}{since}",
            wait.as_millis(),
            segment(&filter.to_string())
        );
        let answer = self.call(Method::GET, &path, None).await?;
        let rooms = |kind: &str| answer["rooms"][kind].as_object().cloned().unwrap_or_default();
        for (room, news) in rooms("join").into_iter().chain(rooms("leave")) {
            seen.invites.remove(&room);
            // The state before the timeline belongs to what is known, as after a join.
            let events = ["state", "timeline"].into_iter().flat_map(|part| news[part]["events"].as_array());
            let ephemeral = news["ephemeral"]["events"].as_array().into_iter().flatten();
            seen.ephemeral.entry(room.clone()).or_default().extend(ephemeral.cloned());
            seen.timelines.entry(room).or_default().extend(events.flatten().cloned());
        }
        seen.invites.extend(rooms("invite"));
        seen.next_batch = Some(string(&answer, "next_batch")?);
        Ok(())
    }

    /// Syncs until `found` finds what it looks for in what was seen, for as long as [`PATIENCE`].
    async fn wait<T>(&self, what: &str, found: impl Fn(&Seen) -> Option<T>) -> Result<T> {
        let mut seen = self.seen.lock().await;
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            if let Some(value) = found(&seen) {
                return Ok(value);
            }
            let left = deadline.saturating_duration_since(tokio::time::Instant::now());
            if left.is_zero() {
                bail!("{} waited for {what} in vain; seen: {}", self.user_id, summary(&seen));
            }
            self.sync(&mut seen, left.min(Duration::from_secs(10))).await?;
        }
    }

    /// Waits for an event in the room's timeline.
    pub async fn wait_for(&self, room: &str, what: &str, matches: impl Fn(&Value) -> bool) -> Result<Value> {
        let look = |seen: &Seen| seen.timelines.get(room)?.iter().find(|event| matches(event)).cloned();
        self.wait(what, look).await
    }

    /// Waits for a text message.
    pub async fn wait_for_text(&self, room: &str, body: &str) -> Result<Value> {
        let is_it = |event: &Value| event["type"] == "m.room.message" && event["content"]["body"] == body;
        self.wait_for(room, &format!("the message {body:?}"), is_it).await
    }

    /// Waits for a state event with such content.
    pub async fn wait_for_state(
        &self,
        room: &str,
        kind: &str,
        state_key: &str,
        matches: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let is_it =
            |event: &Value| event["type"] == kind && event["state_key"] == state_key && matches(&event["content"]);
        self.wait_for(room, &format!("the state ({kind}, {state_key})"), is_it).await
    }

    /// Waits until a user's membership is the one given.
    pub async fn wait_for_member(&self, room: &str, user: &str, membership: &str) -> Result<Value> {
        self.wait_for_state(room, "m.room.member", user, |content| content["membership"] == membership).await
    }

    /// Says that the user types for half a minute, or has stopped.
    pub async fn set_typing(&self, room: &str, typing: bool) -> Result<()> {
        let rest = format!("typing/{}", segment(&self.user_id));
        let body = json!({ "typing": typing, "timeout": 30_000 });
        self.in_room(Method::PUT, room, &rest, Some(body)).await.map(drop)
    }

    /// Says that the user has read up to an event.
    pub async fn read(&self, room: &str, event_id: &str) -> Result<()> {
        let rest = format!("receipt/m.read/{}", segment(event_id));
        self.in_room(Method::POST, room, &rest, Some(json!({}))).await.map(drop)
    }

    /// Waits until what has come of typing and reading in a room matches, oldest first.
    pub async fn wait_for_ephemeral(&self, room: &str, what: &str, matches: impl Fn(&[Value]) -> bool) -> Result<()> {
        self.wait(what, |seen| matches(seen.ephemeral.get(room)?).then_some(())).await
    }

    /// Waits until as many events as `count` of the timeline match, and returns them in the timeline's order.
    pub async fn wait_for_many(
        &self,
        room: &str,
        count: usize,
        matches: impl Fn(&Value) -> bool,
    ) -> Result<Vec<Value>> {
        let look = |seen: &Seen| {
            let found: Vec<Value> = seen.timelines.get(room)?.iter().filter(|event| matches(event)).cloned().collect();
            (found.len() >= count).then_some(found)
        };
        self.wait(&format!("{count} events"), look).await
    }

    /// Waits for an invite into any room and returns the room's ID.
    pub async fn wait_for_invite(&self) -> Result<String> {
        self.wait("an invite", |seen| seen.invites.keys().next().cloned()).await
    }

    /// What is shown of a room that the user is invited into.
    pub async fn invite_state(&self, room: &str) -> Vec<Value> {
        let seen = self.seen.lock().await;
        let shown = seen.invites.get(room).map(|invite| &invite["invite_state"]["events"]);
        shown.and_then(Value::as_array).cloned().unwrap_or_default()
    }
}

fn summary(seen: &Seen) -> String {
    let mut text = String::new();
    for (room, events) in &seen.timelines {
        text.push_str(&format!("\n  {room}:"));
        for event in events.iter().rev().take(20).rev() {
            text.push_str(&format!(
                "\n    {} {} {} {}",
                event["sender"], event["type"], event["state_key"], event["content"]
            ));
        }
    }
    text
}

/// A text field of an answer.
pub fn string(value: &Value, key: &str) -> Result<String> {
    let found = value.get(key).and_then(Value::as_str).map(str::to_owned);
    found.ok_or_else(|| anyhow!("no {key} in {value}"))
}
