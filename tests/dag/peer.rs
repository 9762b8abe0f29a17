//! The second homeserver: it signs events, keeps what it and others made, and answers what a homeserver is asked.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex};

use axum::extract::{OriginalUri, State};
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use isthmus::dag::Dag;
use isthmus::event::{Family, Links, Object, Pdu, Redaction, RoomVersion, sign_object};
use isthmus::identity::SigningKey;
use isthmus::refusal::Refusal;
use isthmus::seam::Received;
use ruma::canonical_json::try_from_json_map;
use ruma::room_version_rules::RoomVersionRules;
use ruma::serde::Base64;
use ruma::signatures::{KeyPair, Signature, hash_and_sign_event, reference_hash, sign_event};
use ruma::{EventId, OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId, RoomId, UserId};
use serde_json::{Value, json};
use url::Url;

use super::{Gateway, NOW, OWN, object};
use crate::lm::world::{Meddling, meddle};

/// A homeserver in the test.
pub struct Peer {
    pub name: OwnedServerName,
    pub url: Url,
    pub key: Arc<SigningKey>,
    pub memory: Arc<Memory>,
    /// Where all requests to it go through a test's hands.
    pub front: Meddling,
}

/// What it has, and what it was asked.
#[derive(Default)]
pub struct Memory {
    keys: Mutex<Value>,
    pub events: Mutex<HashMap<OwnedEventId, Object>>,
    /// The state before an event, as it says when asked.
    pub states: Mutex<HashMap<OwnedEventId, Vec<OwnedEventId>>>,
    pub asked: Mutex<Vec<String>>,
    /// Events it does not give away, though it has them.
    pub hidden: Mutex<HashSet<OwnedEventId>>,
    signer: Mutex<Option<(OwnedServerName, Arc<SigningKey>, RoomVersion)>>,
    pub invite_states: Mutex<Vec<Value>>,
    /// What it was told besides events.
    pub edus: Mutex<Vec<Value>>,
    /// The leaves that were made through it.
    pub leaves: Mutex<Vec<Value>>,
    /// How many missing events it gives at most, the nearest; and then whether it gives any by backfill.
    pub page: Mutex<Option<(usize, bool)>>,
    /// What a test answers instead, by the method's path and the body.
    pub meddler: Mutex<Option<Meddler>>,
}

/// Answers a request, or leaves it to the server.
pub type Meddler = Box<dyn Fn(&str, &Value) -> Option<Value> + Send + Sync>;

/// Signs as ruma wants it.
struct Signer<'a>(&'a SigningKey);

impl KeyPair for Signer<'_> {
    fn sign(&self, message: &[u8]) -> Signature {
        let signature = Base64::<ruma::serde::base64::Standard>::parse(self.0.sign(message)).unwrap();
        Signature::new(self.0.id().try_into().unwrap(), signature.into_inner())
    }
}

pub fn rules(version: RoomVersion) -> RoomVersionRules {
    match version {
        RoomVersion::V6 => RoomVersionRules::V6,
        RoomVersion::V8 => RoomVersionRules::V8,
        RoomVersion::V10 => RoomVersionRules::V10,
        RoomVersion::V11 => RoomVersionRules::V11,
        RoomVersion::V12 => RoomVersionRules::V12,
        // Of shared rooms these serve to select auth events.
        RoomVersion::Lm02 | RoomVersion::LmI1 => RoomVersionRules::V11,
        other => panic!("{other}"),
    }
}

impl Peer {
    pub async fn start(name: &str) -> Self {
        Self::start_at(name, NOW).await
    }

    /// The same at another time than that of these tests.
    pub async fn start_at(name: &str, now: i64) -> Self {
        let name: OwnedServerName = name.try_into().unwrap();
        let key = Arc::new(SigningKey::generate());
        let memory = Arc::new(Memory::default());
        let mut keys = object(json!({
            "server_name": name, "valid_until_ts": now + 86_400_000, "old_verify_keys": {},
            "verify_keys": { key.id(): { "key": key.public_base64() } },
        }));
        sign_object(&mut keys, name.as_str(), &key);
        *memory.keys.lock().unwrap() = Value::Object(keys);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        let front = Meddling::default();
        let router = Router::new().fallback(answer).with_state(memory.clone());
        let router = router.layer(axum::middleware::from_fn_with_state(front.clone(), meddle));
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { name, url, key, memory, front }
    }

    pub fn user(&self, localpart: &str) -> OwnedUserId {
        format!("@{localpart}:{}", self.name).try_into().unwrap()
    }

    /// From now on it signs the invites it gets.
    pub fn signs_invites(&self, version: RoomVersion) {
        *self.memory.signer.lock().unwrap() = Some((self.name.clone(), self.key.clone(), version));
    }

    /// Hashes and signs an event as it stands; gives it with its ID.
    pub fn sign(&self, version: RoomVersion, event: Value) -> (OwnedEventId, Object) {
        if version.family() == Family::Log {
            let mut event = object(event);
            event.remove("depth");
            let ids = |field: &str| strings(&event[field]).into_iter().map(|id| id.try_into().unwrap()).collect();
            let (auth_events, prev_events) = (ids("auth_events"), ids("prev_events"));
            let links = Links { auth_events, prev_events, redaction: Redaction::GraphServer };
            let event = Pdu::build_among(event, links, &self.name, &self.key).unwrap();
            return (event.event_id, event.json);
        }
        let mut event = try_from_json_map(object(event)).unwrap();
        hash_and_sign_event(self.name.as_str(), &Signer(&self.key), &mut event, &rules(version).redaction).unwrap();
        let id = format!("${}", reference_hash(&event, &rules(version)).unwrap()).as_str().try_into().unwrap();
        let event = object(serde_json::to_value(event).unwrap());
        (id, event)
    }

    /// Keeps an event, to give it to whoever asks.
    pub fn keep(&self, id: &EventId, event: &Object) {
        self.memory.events.lock().unwrap().insert(id.to_owned(), event.clone());
    }

    /// Sends a transaction.
    pub async fn put(&self, dag: &Dag, events: &[&Object]) -> Vec<Received> {
        let raw = events.iter().map(|event| serde_json::value::to_raw_value(event).unwrap()).collect();
        dag.receive(&self.name, raw).await
    }

    /// `make_join` and `send_join`; what the room is then, as this server sees it.
    pub async fn join(&self, gateway: &Gateway, room_id: &RoomId, user: &UserId) -> Result<View, Refusal> {
        self.join_at(&gateway.dag, room_id, user).await
    }

    /// The same where there is no such gateway.
    pub async fn join_at(&self, dag: &Dag, room_id: &RoomId, user: &UserId) -> Result<View, Refusal> {
        let versions: Vec<String> = RoomVersion::ALL.iter().map(|version| version.as_str().to_owned()).collect();
        let made = dag.make_join(&self.name, room_id, user, &versions).await?;
        let version = RoomVersion::parse(made["room_version"].as_str().unwrap()).unwrap();
        let mut event = made["event"].clone();
        event["content"]["displayname"] = json!("Alice");
        let (id, event) = self.sign(version, event);
        let answer = dag.send_join(&self.name, room_id, &id, event.clone(), false).await?;
        let mut view =
            View { version, room_id: room_id.to_owned(), state: BTreeMap::new(), tips: Vec::new(), depth: 0 };
        for event in answer["state"].as_array().unwrap().iter().chain(answer["auth_chain"].as_array().unwrap()) {
            let event = object(event.clone());
            self.keep(&id_of(version, &event), &event);
        }
        for event in answer["state"].as_array().unwrap() {
            let event = object(event.clone());
            view.note(id_of(version, &event), &event);
        }
        self.keep(&id, &event);
        view.note(id, &event);
        Ok(view)
    }
}

pub fn id_of(version: RoomVersion, event: &Object) -> OwnedEventId {
    if version.family() == Family::Log {
        return Pdu::parse(event.clone(), Redaction::GraphServer).unwrap().event_id;
    }
    let event = try_from_json_map(event.clone()).unwrap();
    format!("${}", reference_hash(&event, &rules(version)).unwrap()).as_str().try_into().unwrap()
}

/// A room as a server sees it at one point of the graph.
#[derive(Debug, Clone)]
pub struct View {
    pub version: RoomVersion,
    pub room_id: OwnedRoomId,
    pub state: BTreeMap<(String, String), OwnedEventId>,
    pub tips: Vec<OwnedEventId>,
    pub depth: i64,
}

impl View {
    /// The room after this event.
    pub fn note(&mut self, id: OwnedEventId, event: &Object) {
        if let Some(state_key) = event.get("state_key").and_then(Value::as_str) {
            let kind = event["type"].as_str().unwrap().to_owned();
            self.state.insert((kind, state_key.to_owned()), id.clone());
        }
        self.depth = self.depth.max(event.get("depth").and_then(Value::as_i64).unwrap_or(0));
        self.tips = vec![id];
    }

    /// The event that would come next, not signed.
    pub fn next(&self, sender: &UserId, kind: &str, state_key: Option<&str>, content: Value) -> Value {
        let raw = serde_json::value::to_raw_value(&content).unwrap();
        let keys = ruma::state_res::auth_types_for_event(
            &kind.into(),
            sender,
            state_key,
            &raw,
            &rules(self.version).authorization,
        )
        .unwrap();
        let auth: Vec<_> =
            keys.iter().filter_map(|(kind, key)| self.state.get(&(kind.to_string(), key.clone()))).collect();
        let mut event = json!({
            "type": kind, "sender": sender, "content": content, "room_id": self.room_id, "depth": self.depth + 1,
            "origin_server_ts": NOW, "prev_events": self.tips, "auth_events": auth,
        });
        if let Some(state_key) = state_key {
            event["state_key"] = json!(state_key);
        }
        event
    }

    /// A signed event that follows, which the server keeps; the room is what it is after it.
    pub fn add(
        &mut self,
        peer: &Peer,
        sender: &UserId,
        kind: &str,
        state_key: Option<&str>,
        content: Value,
    ) -> (OwnedEventId, Object) {
        let (id, event) = peer.sign(self.version, self.next(sender, kind, state_key, content));
        peer.keep(&id, &event);
        self.note(id.clone(), &event);
        (id, event)
    }

    pub fn say(&mut self, peer: &Peer, sender: &UserId, body: &str) -> (OwnedEventId, Object) {
        self.add(peer, sender, "m.room.message", None, json!({ "msgtype": "m.text", "body": body }))
    }
}

async fn answer(
    State(memory): State<Arc<Memory>>,
    method: Method,
    OriginalUri(uri): OriginalUri,
    body: axum::body::Bytes,
) -> Response {
    let path = percent_encoding::percent_decode_str(uri.path()).decode_utf8_lossy().into_owned();
    memory.asked.lock().unwrap().push(format!("{method} {path}"));
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let query: HashMap<String, String> =
        url::form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes()).into_owned().collect();
    let rest = path.strip_prefix("/_matrix/federation/").unwrap_or_default();
    let parts: Vec<&str> = rest.split('/').collect();
    let meddled = memory.meddler.lock().unwrap().as_ref().and_then(|meddler| meddler(rest, &body));
    let found = match parts.as_slice() {
        _ if meddled.is_some() => meddled,
        _ if path == "/_matrix/key/v2/server" => Some(memory.keys.lock().unwrap().clone()),
        ["v1", "send", _] => {
            memory.edus.lock().unwrap().extend(body["edus"].as_array().into_iter().flatten().cloned());
            Some(json!({ "pdus": {} }))
        }
        ["v1", "event", id] => memory.event(id).map(|event| json!({ "pdus": [event] })),
        ["v1", "get_missing_events", _] => Some(memory.missing(&body)),
        ["v1", "backfill", _] => memory.backfill(uri.query().unwrap_or_default()),
        ["v1", "event_auth", _, id] => Some(json!({ "auth_chain": memory.chain(&[(*id).to_owned()]) })),
        ["v1", "state_ids", _] => memory.state_ids(&query["event_id"]),
        ["v1", "state", _] => memory.state(&query["event_id"]),
        ["v2", "invite", _, _] => memory.sign_invite(&body),
        // Where the leave stands in the graph counts, and nothing else of this.
        ["v1", "make_leave", room, _] => Some(json!({ "room_version": "11", "event": {
            "type": "m.room.topic", "room_id": room, "sender": "@evil:x", "content": { "evil": true }, "depth": 7,
            "prev_events": [format!("${}", "c".repeat(43))], "auth_events": [format!("${}", "d".repeat(43))] } })),
        ["v2", "send_leave", _, _] => {
            memory.leaves.lock().unwrap().push(body);
            Some(json!({}))
        }
        ["v1", "query", "profile"] => Some(json!({ "displayname": "Alice", "avatar_url": "mxc://x/y" })),
        ["v1", "query", "directory"] => Some(json!({ "room_id": "!room:x", "servers": ["x"] })),
        _ => None,
    };
    match found {
        Some(found) if found.get("errcode").is_some() => (StatusCode::FORBIDDEN, Json(found)).into_response(),
        Some(found) => Json(found).into_response(),
        None => (StatusCode::NOT_FOUND, Json(json!({ "errcode": "M_NOT_FOUND", "error": path }))).into_response(),
    }
}

impl Memory {
    pub fn event(&self, id: &str) -> Option<Object> {
        let id: OwnedEventId = id.try_into().ok()?;
        if self.hidden.lock().unwrap().contains(&id) {
            return None;
        }
        self.events.lock().unwrap().get(&id).cloned()
    }

    fn walk(&self, start: &[String], field: &str, stop: &[String]) -> Vec<(String, Object)> {
        let mut level = start.to_vec();
        let mut found: BTreeMap<String, Object> = BTreeMap::new();
        while let Some(id) = level.pop() {
            if stop.contains(&id) || found.contains_key(&id) {
                continue;
            }
            let Some(event) = self.event(&id) else { continue };
            level.extend(strings(&event[field]));
            found.insert(id, event);
        }
        let mut found: Vec<_> = found.into_iter().collect();
        found.sort_by_key(|(_, event)| event.get("depth").and_then(Value::as_i64));
        found
    }

    fn missing(&self, body: &Value) -> Value {
        let latest = strings(&body["latest_events"]);
        if let Some((page, _)) = *self.page.lock().unwrap() {
            let start = latest.iter().filter_map(|id| self.event(id)).flat_map(|event| strings(&event["prev_events"]));
            let mut found = self.nearest(start.collect(), &strings(&body["earliest_events"]), page);
            found.reverse();
            return json!({ "events": found });
        }
        let mut found = self.walk(&latest, "prev_events", &strings(&body["earliest_events"]));
        found.retain(|(id, _)| !latest.contains(id));
        let limit = usize::try_from(body["limit"].as_u64().unwrap_or(10)).unwrap();
        let skip = found.len().saturating_sub(limit);
        json!({ "events": found.into_iter().skip(skip).map(|(_, event)| event).collect::<Vec<_>>() })
    }

    /// As Synapse does it: in breadth, from `start` on.
    fn nearest(&self, start: Vec<String>, stop: &[String], limit: usize) -> Vec<Object> {
        let (mut seen, mut found) = (stop.iter().cloned().collect::<HashSet<_>>(), Vec::new());
        let mut next: std::collections::VecDeque<String> = start.into();
        while let Some(id) = next.pop_front() {
            if found.len() < limit
                && seen.insert(id.clone())
                && let Some(event) = self.event(&id)
            {
                next.extend(strings(&event["prev_events"]));
                found.push(event);
            }
        }
        found
    }

    fn backfill(&self, query: &str) -> Option<Value> {
        let (_, true) = (*self.page.lock().unwrap())? else { return None };
        let query = url::form_urlencoded::parse(query.as_bytes());
        let from = query.filter(|(name, _)| name == "v").map(|(_, id)| id.into_owned()).collect();
        Some(json!({ "pdus": self.nearest(from, &[], 100) }))
    }

    pub fn chain(&self, roots: &[String]) -> Vec<Object> {
        let mut found = self.walk(roots, "auth_events", &[]);
        found.retain(|(id, _)| !roots.contains(id));
        found.into_iter().map(|(_, event)| event).collect()
    }

    fn state_ids(&self, id: &str) -> Option<Value> {
        let id: OwnedEventId = id.try_into().ok()?;
        let state = self.states.lock().unwrap().get(&id)?.clone();
        let roots: Vec<String> = state.iter().map(ToString::to_string).collect();
        let chain = self.walk(&roots, "auth_events", &[]);
        let chain: Vec<_> = chain.into_iter().map(|(id, _)| id).filter(|id| !roots.contains(id)).collect();
        Some(json!({ "pdu_ids": state, "auth_chain_ids": chain }))
    }

    fn state(&self, id: &str) -> Option<Value> {
        let ids = self.state_ids(id)?;
        let events = |key: &str| -> Vec<Object> { strings(&ids[key]).iter().filter_map(|id| self.event(id)).collect() };
        Some(json!({ "pdus": events("pdu_ids"), "auth_chain": events("auth_chain_ids") }))
    }

    fn sign_invite(&self, body: &Value) -> Option<Value> {
        let signer = self.signer.lock().unwrap();
        let (name, key, version) = signer.as_ref()?;
        self.invite_states.lock().unwrap().push(body["invite_room_state"].clone());
        if version.family() == Family::Log {
            let mut event = Pdu::parse(object(body["event"].clone()), Redaction::GraphServer).ok()?;
            event.countersign_by(name, key, Redaction::GraphServer);
            return Some(json!({ "event": event.json }));
        }
        let mut event = try_from_json_map(object(body["event"].clone())).unwrap();
        sign_event(name.as_str(), &Signer(key), &mut event, &rules(*version).redaction).unwrap();
        Some(json!({ "event": event }))
    }
}

fn strings(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

/// The gateway's name as a server name.
pub fn own() -> OwnedServerName {
    OWN.try_into().unwrap()
}
