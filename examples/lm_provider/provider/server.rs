//! What the provider serves to other servers.

use std::sync::Arc;

use anyhow::Result;
use axum::Json;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use http::{Method, StatusCode};
use isthmus::clock::{Clock as _, SystemClock};
use isthmus::event::{Object, parse_object, sign_object};
use ruma::{OwnedEventId, OwnedServerName, RoomId, ServerName, UserId};
use serde_json::{Value, json};

use super::room::Room;
use super::{Inner, eigen, lock, media, object, rules};

/// How large a request may be.
const LIMIT: usize = 10 << 20;
/// The unstable prefix, in segments.
const UNSTABLE: &str = "org.matrix.i-d.ralston-mimi-linearized-matrix.02";

/// An error answer, of ours or of another server.
#[derive(Debug, thiserror::Error)]
#[error("{status} {errcode}: {error}")]
pub struct Fault {
    pub status: StatusCode,
    pub errcode: String,
    pub error: String,
}

impl Fault {
    fn new(status: StatusCode, errcode: &str, error: impl ToString) -> Self {
        Self { status, errcode: errcode.to_owned(), error: error.to_string() }
    }

    fn not_found(what: impl std::fmt::Display) -> Self {
        Self::new(StatusCode::NOT_FOUND, "M_NOT_FOUND", format!("{what} was not found"))
    }

    fn forbidden(error: impl std::fmt::Display) -> Self {
        Self::new(StatusCode::FORBIDDEN, "M_FORBIDDEN", format!("{error:#}"))
    }

    fn malformed(error: impl ToString) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "M_BAD_JSON", error)
    }
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        (self.status, Json(json!({ "errcode": self.errcode, "error": self.error }))).into_response()
    }
}

/// A request that is signed by `origin`.
struct Signed {
    origin: OwnedServerName,
    query: Vec<(String, String)>,
    body: Option<Object>,
}

impl Signed {
    fn query(&self, key: &str) -> Result<&str, Fault> {
        let found = self.query.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str());
        found.ok_or_else(|| Fault::new(StatusCode::BAD_REQUEST, "M_MISSING_PARAM", format!("no {key}")))
    }

    fn body(self) -> Result<(OwnedServerName, Object), Fault> {
        let body = self.body.ok_or_else(|| Fault::malformed("no body"))?;
        Ok((self.origin, body))
    }
}

/// Serves until the provider stops.
pub async fn serve(listener: tokio::net::TcpListener, inner: Arc<Inner>) {
    let stopping = inner.stopping.clone();
    let router = axum::Router::new().fallback(handle).with_state(inner);
    let serving = axum::serve(listener, router).with_graceful_shutdown(stopping.cancelled_owned());
    if let Err(error) = serving.await {
        eprintln!("the listener failed: {error}");
    }
}

async fn handle(State(inner): State<Arc<Inner>>, request: Request<Body>) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    if media::asked(&path).is_some() && !inner.eigen {
        return inner.file(request).await;
    }
    match inner.answer(request).await {
        Ok(answer) => Json(answer).into_response(),
        Err(fault) if inner.eigen && fault.errcode == "M_UNRECOGNIZED" => eigen::page(&method, &path),
        Err(fault) => fault.into_response(),
    }
}

impl Inner {
    async fn answer(&self, request: Request<Body>) -> Result<Value, Fault> {
        let (parts, body) = request.into_parts();
        let uri = parts.uri.path_and_query().map(ToString::to_string).unwrap_or_default();
        let decode = |text: &str| percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned();
        let path: Vec<String> = parts.uri.path().split('/').skip(1).map(decode).collect();
        let path: Vec<&str> = path.iter().map(String::as_str).collect();
        if path == ["_matrix", "key", "v2", "server"] {
            return Ok(Value::Object(self.own_keys()));
        }
        let endpoint = match path.as_slice() {
            ["_matrix", "federation", "unstable", UNSTABLE, endpoint @ ..] => endpoint,
            ["_matrix", "federation", "v1" | "v2" | "v3", endpoint @ ..] => endpoint,
            _ => return Err(unrecognized()),
        };
        let named = (path.get(2), endpoint.first());
        if self.eigen && !matches!(named, (Some(prefix), Some(endpoint)) if eigen::serves(prefix, endpoint)) {
            return Err(unrecognized());
        }
        let bytes = axum::body::to_bytes(body, LIMIT).await.map_err(Fault::malformed)?;
        let body = if bytes.is_empty() { None } else { Some(parse_object(&bytes).map_err(Fault::malformed)?) };
        let origin = self.network.origin(&parts.method, &uri, &parts.headers, body.as_ref()).await;
        let origin =
            origin.map_err(|error| Fault::new(StatusCode::UNAUTHORIZED, "M_FORBIDDEN", format!("{error:#}")))?;
        let query =
            url::form_urlencoded::parse(parts.uri.query().unwrap_or_default().as_bytes()).into_owned().collect();
        self.dispatch(&parts.method, endpoint, Signed { origin, query, body }).await
    }

    async fn dispatch(&self, method: &Method, endpoint: &[&str], request: Signed) -> Result<Value, Fault> {
        let get = *method == Method::GET;
        match endpoint {
            ["send", _] if *method == Method::PUT => self.receive(request).await,
            ["make_join", room, user] if get => self.make(room, user, "join", &request.origin),
            ["make_leave", room, user] if get => self.make(room, user, "leave", &request.origin),
            ["send_join", ..] if !get => self.send_join(request).await,
            ["send_leave", ..] if !get => {
                let (origin, body) = request.body()?;
                let lpdu = self.verified_lpdu(&origin, body).await.map_err(Fault::forbidden)?;
                self.finish(lpdu, None).map_err(Fault::forbidden)?;
                Ok(json!({}))
            }
            ["invite", ..] if !get => self.invited(request).await,
            ["event", id] if get => self.event(&request.origin, id),
            ["state", room] if get => self.state(&request.origin, room, false),
            ["state_ids", room] if get => self.state(&request.origin, room, true),
            ["backfill", room] if get => self.backfill(&request, room),
            ["query", "directory"] if get => {
                let alias = request.query("room_alias")?;
                let aliases = lock(&self.aliases);
                let room = aliases.get(alias).ok_or_else(|| Fault::not_found(alias))?;
                Ok(json!({ "room_id": room, "servers": [self.network.server_name] }))
            }
            ["query", "profile"] if get => {
                let user = request.query("user_id")?;
                let names = lock(&self.names);
                let name = names.iter().find(|(id, _)| id.as_str() == user).map(|(_, name)| name);
                Ok(json!({ "displayname": name.ok_or_else(|| Fault::not_found(user))? }))
            }
            _ => Err(unrecognized()),
        }
    }

    fn own_keys(&self) -> Object {
        let (name, key) = (&self.network.server_name, &self.network.key);
        let mut keys = object(json!({ "server_name": name, "m.linearized": true, "old_verify_keys": {},
            "valid_until_ts": SystemClock.now_ms() + 3_600_000, "verify_keys": { key.id(): { "key": key.public_base64() } } }));
        sign_object(&mut keys, name.as_str(), key);
        keys
    }

    async fn receive(&self, request: Signed) -> Result<Value, Fault> {
        let (origin, body) = request.body()?;
        let pdus = body.get("pdus").and_then(Value::as_array).ok_or_else(|| Fault::malformed("no pdus"))?;
        if pdus.len() > 50 {
            return Err(Fault::malformed("more than 50 PDUs"));
        }
        if self.eigen {
            return self.receive_as_eigen(&origin, pdus).await;
        }
        self.hear(&origin, &body);
        let mut failed = Object::new();
        for pdu in pdus.iter().filter_map(Value::as_object).cloned() {
            let id = isthmus::event::reference_hash(&pdu, isthmus::event::Redaction::Draft);
            let result = match pdu.contains_key("prev_events") {
                true => self.take(&origin, pdu).await,
                false => self.receive_lpdu(&origin, pdu).await,
            };
            if let Err(error) = result {
                failed.insert(format!("${id}"), json!({ "error": format!("{error:#}") }));
            }
        }
        Ok(json!({ "failed_pdus": failed }))
    }

    async fn receive_lpdu(&self, origin: &ServerName, lpdu: Object) -> Result<()> {
        let room = lpdu.get("room_id").and_then(Value::as_str).and_then(|room| <&RoomId>::try_from(room).ok());
        if !room.is_some_and(|room| lock(&self.rooms).contains_key(room)) {
            return Ok(());
        }
        let lpdu = self.verified_lpdu(origin, lpdu).await?;
        self.finish(lpdu, None).map(drop)
    }

    fn make(&self, room: &str, user: &str, membership: &str, origin: &ServerName) -> Result<Value, Fault> {
        let room = self.hubbed(room)?;
        let user = <&UserId>::try_from(user).map_err(Fault::malformed)?;
        if user.server_name() != origin {
            return Err(Fault::forbidden(format!("{user} is not of {origin}")));
        }
        let (event, version) = self.template(room, user, membership).map_err(Fault::forbidden)?;
        Ok(json!({ "event": event, "room_version": version }))
    }

    async fn send_join(&self, request: Signed) -> Result<Value, Fault> {
        let (origin, body) = request.body()?;
        let lpdu = self.verified_lpdu(&origin, body).await.map_err(Fault::forbidden)?;
        let is_join = lpdu.kind == "m.room.member"
            && lpdu.json.get("content").and_then(|content| content.get("membership")).is_some_and(|is| is == "join");
        if !is_join {
            return Err(Fault::malformed("not a join"));
        }
        let (state, chain) = {
            let room = self.hubbed(lpdu.room_id.as_str())?;
            lock(&self.rooms).get(room).map(Room::snapshot).unwrap_or_default()
        };
        // The other kind of hub gives the join to the server that joins twice, and first before it answers.
        let not_to = (!self.eigen).then_some(&*origin);
        let event = self.finish(lpdu, not_to).map_err(Fault::forbidden)?;
        if self.eigen {
            self.hand_round(&event).await;
        }
        Ok(json!({ "state": state, "auth_chain": chain, "event": event.json }))
    }

    async fn invited(&self, request: Signed) -> Result<Value, Fault> {
        let (origin, body) = request.body()?;
        let event = body.get("event").and_then(Value::as_object).ok_or_else(|| Fault::malformed("no event"))?.clone();
        let room = event.get("room_id").and_then(Value::as_str).and_then(|room| <&RoomId>::try_from(room).ok());
        if self.eigen && room.is_some_and(|room| lock(&self.rooms).contains_key(room)) {
            return Err(Fault::new(StatusCode::BAD_REQUEST, "M_UNKNOWN", "Already know of this room"));
        }
        let event = if event.contains_key("prev_events") {
            self.sign_invite(&origin, event).await.map_err(Fault::forbidden)?.json
        } else {
            let lpdu = self.verified_lpdu(&origin, event).await.map_err(Fault::forbidden)?;
            let target = lpdu.state_key.as_deref().unwrap_or_default().to_owned();
            let target = <&UserId>::try_from(target.as_str()).map_err(Fault::malformed)?;
            let room = lpdu.room_id.clone();
            let build = |room: &Room| {
                room.complete(lpdu.clone(), &self.network.key).map_err(|problem| anyhow::anyhow!(problem))
            };
            self.invite_as_hub(&room, target, build).await.map_err(Fault::forbidden)?.json.clone()
        };
        Ok(json!({ "pdu": event, "event": event }))
    }

    fn event(&self, origin: &ServerName, id: &str) -> Result<Value, Fault> {
        let id = OwnedEventId::try_from(id).map_err(Fault::malformed)?;
        let rooms = lock(&self.rooms);
        let rooms = rooms.values().filter(|room| self.may_read(room, origin));
        let found = rooms.filter_map(|room| room.find(&id)).find(|event| event.event_id == id);
        Ok(Value::Object(found.ok_or_else(|| Fault::not_found(id))?.json.clone()))
    }

    fn state(&self, origin: &ServerName, room: &str, ids: bool) -> Result<Value, Fault> {
        let id = self.hubbed(room)?;
        let rooms = lock(&self.rooms);
        let room = rooms.get(id).filter(|room| self.may_read(room, origin)).ok_or_else(|| Fault::not_found(id))?;
        if ids {
            let ids: Vec<_> = room.state.values().map(|event| &event.event_id).collect();
            return Ok(json!({ "pdu_ids": ids, "auth_chain_ids": [] }));
        }
        if self.eigen {
            let state: Vec<Value> = room.state.values().map(|event| eigen::with_id(event)).collect();
            return Ok(json!({ "pdus": state, "auth_chain": [] }));
        }
        let (state, chain) = room.snapshot();
        Ok(json!({ "pdus": state, "auth_chain": chain }))
    }

    fn backfill(&self, request: &Signed, room: &str) -> Result<Value, Fault> {
        let id = <&RoomId>::try_from(room).map_err(Fault::malformed)?;
        let limit: usize = request.query("limit")?.parse().map_err(Fault::malformed)?;
        let from = OwnedEventId::try_from(request.query("v")?).map_err(Fault::malformed)?;
        let rooms = lock(&self.rooms);
        let room = rooms.get(id).filter(|room| self.may_read(room, &request.origin));
        let room = room.ok_or_else(|| Fault::not_found(id))?;
        let end = room.place(&from).ok_or_else(|| Fault::not_found(&from))? + 1;
        if self.eigen {
            let newest_first = room.log.iter().take(end).rev().take(limit.min(eigen::BACKFILL));
            return Ok(json!({ "pdus": newest_first.map(|entry| eigen::with_id(&entry.event)).collect::<Vec<_>>() }));
        }
        let start = end.saturating_sub(limit.min(100));
        let pdus: Vec<&Object> = room.log.iter().skip(start).take(end - start).map(|entry| &entry.event.json).collect();
        Ok(json!({ "pdus": pdus }))
    }

    /// Whether anybody of the server is or was in the room.
    fn may_read(&self, room: &Room, origin: &ServerName) -> bool {
        let members = room.state.iter().filter(|((kind, _), _)| kind == "m.room.member");
        members
            .filter(|((_, user), _)| <&UserId>::try_from(user.as_str()).is_ok_and(|user| user.server_name() == origin))
            .any(|((_, user), _)| rules::membership(&room.state, user) != "ban")
    }

    fn hubbed<'a>(&self, room: &'a str) -> Result<&'a RoomId, Fault> {
        let id = <&RoomId>::try_from(room).map_err(Fault::malformed)?;
        match lock(&self.rooms).get(id) {
            None => Err(Fault::not_found(id)),
            Some(room) if room.hub != self.network.server_name => {
                let error = format!("the hub is {}", room.hub);
                Err(Fault::new(StatusCode::BAD_REQUEST, "M_WRONG_SERVER", error))
            }
            Some(_) => Ok(id),
        }
    }
}

fn unrecognized() -> Fault {
    Fault::new(StatusCode::NOT_FOUND, "M_UNRECOGNIZED", "unknown endpoint")
}
