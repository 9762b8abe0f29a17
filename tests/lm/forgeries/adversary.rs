//! What the adversary does: it makes events of anything that it has seen, signs them with what keys it has, under whatever name, and
//! sends them to everybody in every way that there is.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use axum::Json;
use axum::extract::Request;
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use http::Method;
use isthmus::event::{Object, Redaction, canonical_json, content_hash, lpdu_hash, redact, sign_object};
use isthmus::federation::Call;
use isthmus::identity::SigningKey;
use isthmus::lm::Appended;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use ruma::{OwnedRoomId, OwnedServerName, RoomId};
use serde_json::{Value, json};

use super::RIGHT;
use crate::lm::http::ask;
use crate::lm::world::{Node, message};

const UNSTABLE: &str = "/_matrix/federation/unstable/org.matrix.i-d.ralston-mimi-linearized-matrix.02";

/// A server of which the adversary has the key.
#[derive(Clone)]
pub(super) struct Owned {
    pub name: OwnedServerName,
    pub key: Arc<SigningKey>,
}

impl Owned {
    fn of(node: &Node) -> Self {
        Self { name: node.name.clone(), key: node.context.signing_key.clone() }
    }
}

/// Whom it attacks: `to` about the room of `hub`.
pub struct Target<'a> {
    pub to: &'a Node,
    pub hub: &'a Node,
    pub room: &'a RoomId,
}

pub struct Adversary<'a> {
    pub random: StdRng,
    /// How often which answer came.
    pub answered: BTreeMap<u16, usize>,
    /// Why events were refused that came as far as to be looked at.
    pub reasons: BTreeSet<String>,
    /// How often it sent something that was right but for one thing.
    pub aimed: usize,
    servers: [&'a Node; 3],
    forger: Arc<Mutex<Forger>>,
    count: usize,
}

impl<'a> Adversary<'a> {
    pub fn new(servers: [&'a Node; 3], honest: &[&Node], seed: u64) -> Self {
        let forger = Forger {
            random: StdRng::seed_from_u64(!seed),
            owned: servers.map(Owned::of).to_vec(),
            honest: honest.iter().map(|node| (node.name.clone(), node.context.signing_key.id().to_owned())).collect(),
            seen: Vec::new(),
            found: Vec::new(),
            is_shared: false,
        };
        let (random, forger) = (StdRng::seed_from_u64(seed), Arc::new(Mutex::new(forger)));
        Self { random, answered: BTreeMap::new(), reasons: BTreeSet::new(), aimed: 0, servers, forger, count: 0 }
    }

    /// From now on what it aims at is a shared room, of which its graph server keeps the graph.
    pub fn takes_part_in_a_graph(&self) {
        self.forger.lock().unwrap().is_shared = true;
    }

    /// Its key documents name others, and as everybody's notary it vouches for others' keys that are its own.
    pub fn lie_about_keys(&self) {
        for node in self.servers {
            let forger = self.forger.clone();
            node.meddle(move |request, next| lie_about_keys(forger.clone(), request, next));
        }
    }

    /// As the hub it gives templates of other events, and other events beside what it was asked for.
    pub fn lie_in_answers(&self, room: &RoomId) {
        let (forger, room) = (self.forger.clone(), room.to_owned());
        self.servers[0].meddle(move |request, next| lie_in_answers(forger.clone(), room.clone(), request, next));
    }

    /// It reads a log.
    pub fn look(&self, log: &[Appended]) {
        self.forger.lock().unwrap().seen = log.iter().map(|event| event.event.json.clone()).collect();
    }

    /// It says something that it may say; whether that is taken.
    pub async fn speak(&mut self, hub: &Node, room: &RoomId) -> bool {
        self.count += 1;
        let (node, user) = [(self.servers[0], "eve"), (self.servers[1], "mallory")][self.random.gen_range(0..2)];
        let lpdu = node.lpdu(room, &hub.name, &message(&node.user(user), &format!("own {}", self.count)));
        let answer = node.transact(hub, &format!("own{}", self.count), &[Value::Object(lpdu.json)]).await;
        answer.is_ok_and(|answer| answer["failed_pdus"].as_object().is_some_and(Object::is_empty))
    }

    /// An LPDU of another server's gets into its hands.
    pub fn finds(&self, lpdu: Object) {
        self.forger.lock().unwrap().found.push(lpdu);
    }

    /// An event that is right but for one thing, from whom it must come.
    async fn aim(&mut self, target: Target<'_>) {
        let nearly_right = self.forger.lock().unwrap().nearly_right(target.room, &target.hub.name);
        if let Some((event, by)) = nearly_right {
            self.deliver(event, by, target).await;
        }
    }

    /// One of those that lack nothing: what is made as these are, is taken when it is right.
    pub async fn do_right(&mut self, target: Target<'_>) {
        let right = {
            let mut forger = self.forger.lock().unwrap();
            let is_right = |event: &Object| {
                let body = event.get("content").and_then(|content| content.get("body")?.as_str());
                body.is_some_and(|body| body.starts_with(RIGHT))
            };
            let made = std::iter::from_fn(|| Some(forger.nearly_right(target.room, &target.hub.name)));
            made.take(1_000).flatten().find(|(event, _)| is_right(event))
        };
        let (event, by) = right.expect("none was right");
        self.count += 1;
        self.deliver(event, by, target).await;
    }

    async fn deliver(&mut self, event: Object, by: OwnedServerName, Target { to, .. }: Target<'_>) {
        self.aimed += 1;
        let node = self.servers.into_iter().find(|node| node.name == by).unwrap();
        let (id, event) = (format!("aimed{}", self.count), Value::Object(event));
        let answer = match event.get("prev_events").is_some() && self.random.gen_bool(0.5) {
            true => {
                let body = json!({ "origin": node.name, "origin_server_ts": 1, "pdus": [event] });
                let call = Call::put(
                    format!("/_matrix/federation/v1/send/{id}"),
                    body.as_object().cloned().unwrap_or_default(),
                );
                node.context.client.call(&to.name, call, false).await
            }
            false => node.transact(to, &id, &[event]).await,
        };
        let answer = answer.unwrap_or_default();
        let failed = ["failed_pdus", "pdus"].into_iter().filter_map(|key| answer.get(key)?.as_object());
        let failed = failed.flat_map(|failed| failed.values());
        self.reasons.extend(failed.filter_map(|failed| Some(failed.get("error")?.as_str()?.to_owned())));
    }

    /// One request of any kind.
    pub async fn attack(&mut self, target: Target<'_>) {
        self.count += 1;
        if self.random.gen_bool(0.4) {
            return self.aim(target).await;
        }
        let Target { to, hub, room } = target;
        let (event, edu, claimed) = {
            let mut forger = self.forger.lock().unwrap();
            (forger.event(room, &hub.name), forger.edu(room), forger.someone())
        };
        let id = format!("${}", isthmus::event::reference_hash(&event, Redaction::Draft)).replace('$', "%24");
        let count = self.count;
        let event = Value::Object(event);
        let (method, uri, body) = match self.random.gen_range(0..14) {
            0..5 => (Method::PUT, format!("{UNSTABLE}/send/{count}"), json!({ "pdus": [event.clone(), event] })),
            5 => {
                (Method::PUT, format!("/_matrix/federation/v2/send/{count}"), json!({ "pdus": [event], "edus": [edu] }))
            }
            6 => (
                Method::PUT,
                format!("/_matrix/federation/v1/send/{count}"),
                json!({ "pdus": [event], "edus": [edu], "origin": claimed, "origin_server_ts": 1 }),
            ),
            7 => (Method::POST, format!("{UNSTABLE}/send_join/{count}"), event),
            8 => (Method::POST, format!("/_matrix/federation/v3/send_knock/{count}"), event),
            9 => (Method::POST, format!("/_matrix/federation/v3/send_leave/{count}"), event),
            10 => (
                Method::POST,
                format!("{UNSTABLE}/invite/{count}"),
                json!({ "event": event, "room_version": "org.matrix.i-d.ralston-mimi-linearized-matrix.02", "invite_room_state": [] }),
            ),
            11 => (Method::PUT, format!("/_matrix/federation/v2/send_join/{room}/{id}"), event),
            12 => (Method::PUT, format!("/_matrix/federation/v2/send_leave/{room}/{id}"), event),
            _ => (
                Method::PUT,
                format!("/_matrix/federation/v2/invite/{room}/{id}"),
                json!({ "event": event, "room_version": "12", "invite_room_state": [] }),
            ),
        };
        let honestly = self.random.gen_bool(0.8);
        let by = self.servers[self.random.gen_range(0..3)];
        // Under its own name, or under another's with its own key.
        let origin = if honestly { by.name.clone() } else { claimed };
        let key = &by.context.signing_key;
        let key_id = if honestly { key.id().to_owned() } else { self.forger.lock().unwrap().key_id(&origin, key) };
        let message =
            json!({ "content": body, "destination": to.name, "method": method.as_str(), "origin": origin, "uri": uri });
        let sig = key.sign(&canonical_json(message.as_object().unwrap()));
        let header = format!(r#"X-Matrix origin="{origin}",destination="{}",key="{key_id}",sig="{sig}""#, to.name);
        let (status, answer) = ask(to, &method, &uri, Some(&header), Some(&serde_json::to_vec(&body).unwrap())).await;
        assert!(status != 500, "{method} {uri}: {answer}, to {body}");
        if !honestly && !self.servers.iter().any(|node| node.name == origin) {
            // Who does LM alone has no such endpoint, whoever asks.
            let is_none = status == 404 && answer["errcode"] == "M_UNRECOGNIZED";
            assert!(status == 401 || is_none, "it speaks as {origin}: {status} {answer}");
        }
        for (_, failed) in answer["failed_pdus"].as_object().into_iter().flatten() {
            self.reasons.insert(failed["error"].as_str().unwrap_or_default().to_owned());
        }
        *self.answered.entry(status).or_default() += 1;
        // What others sign for it, it uses.
        if let Some(signed) = answer["event"].as_object().filter(|_| status == 200) {
            self.forger.lock().unwrap().seen.push(signed.clone());
        }
    }
}

/// What makes events.
pub(super) struct Forger {
    pub random: StdRng,
    pub owned: Vec<Owned>,
    /// The honest servers, with the IDs of their keys.
    pub honest: Vec<(OwnedServerName, String)>,
    /// Events that it knows.
    pub seen: Vec<Object>,
    /// LPDUs of others that never came to the hub.
    pub found: Vec<Object>,
    /// Whether the third of its servers keeps the graph of the room.
    pub is_shared: bool,
}

impl Forger {
    pub fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.random.gen_range(0..from.len())].clone()
    }

    /// A server, mostly not its own.
    fn someone(&mut self) -> OwnedServerName {
        let (honest, owned) = (self.honest.clone(), self.owned.clone());
        if self.random.gen_bool(0.8) { self.pick(&honest).0 } else { self.pick(&owned).name }
    }

    fn user(&mut self) -> String {
        let server = self.someone();
        let name = self.pick(&["bot", "alice", "henry", "lucy", "ghost", "eve", "mallory", "grace"]);
        format!("@{name}:{server}")
    }

    /// The ID of a server's key, or of the key itself.
    fn key_id(&mut self, server: &OwnedServerName, key: &SigningKey) -> String {
        let known = self.honest.iter().find(|(honest, _)| honest == server).map(|(_, id)| id.clone());
        known.filter(|_| self.random.gen_bool(0.7)).unwrap_or_else(|| key.id().to_owned())
    }

    /// An event of any kind in a room, as a participant or as the hub sends it.
    fn event(&mut self, room: &RoomId, hub: &OwnedServerName) -> Object {
        let mut event = match self.random.gen_bool(0.4) && !self.seen.is_empty() {
            true => {
                let seen = self.seen.clone();
                let known = self.pick(&seen);
                // As it is, it is a repetition.
                if self.random.gen_bool(0.2) {
                    return known;
                }
                self.changed(known)
            }
            false => self.fresh(room),
        };
        if self.random.gen_bool(0.5) {
            self.as_lpdu(&mut event, hub)
        } else {
            self.as_finished(&mut event, hub)
        }
        event
    }

    fn fresh(&mut self, room: &RoomId) -> Object {
        let (sender, other) = (self.user(), self.user());
        let membership = self.pick(&["join", "leave", "invite", "ban", "knock"]);
        let target = if self.random.gen_bool(0.5) { sender.clone() } else { other.clone() };
        let own = self.owned[0].name.clone();
        let levels = json!({ "users": { format!("@eve:{own}"): 100 } });
        let (kind, state_key, content) = match self.random.gen_range(0..8) {
            0..3 => ("m.room.message", None, json!({ "msgtype": "m.text", "body": self.random.gen_range(0..1000) })),
            3 | 4 => ("m.room.member", Some(target), json!({ "membership": membership })),
            5 => ("m.room.power_levels", Some(String::new()), levels),
            6 => (
                "m.room.create",
                Some(String::new()),
                json!({ "room_version": "org.matrix.i-d.ralston-mimi-linearized-matrix.02" }),
            ),
            _ => ("m.room.hub", Some(String::new()), json!({ "hub_server": own })),
        };
        let mut event = json!({ "type": kind, "room_id": room, "sender": sender, "content": content,
            "origin_server_ts": 1_700_000_000_000_i64 + self.random.gen_range(0..1000) });
        if let Some(state_key) = state_key {
            event["state_key"] = json!(state_key);
        }
        event.as_object().unwrap().clone()
    }

    /// A known event with something else in it.
    fn changed(&mut self, mut event: Object) -> Object {
        match self.random.gen_range(0..6) {
            0 | 1 => drop(event.insert("content".to_owned(), json!({ "msgtype": "m.text", "body": "changed" }))),
            2 => drop(event.insert("sender".to_owned(), json!(self.user()))),
            3 => drop(event.insert("state_key".to_owned(), json!(self.user()))),
            4 => drop(event.insert("origin_server_ts".to_owned(), json!(1))),
            _ => drop(event.insert("type".to_owned(), json!("m.room.name"))),
        }
        event
    }

    fn as_lpdu(&mut self, event: &mut Object, hub: &OwnedServerName) {
        for hubs in ["auth_events", "prev_events"] {
            event.remove(hubs);
        }
        let hub = if self.random.gen_bool(0.8) { hub.clone() } else { self.someone() };
        event.insert("hub_server".to_owned(), json!(hub));
        let known = event.get("hashes").and_then(|hashes| hashes["lpdu"].as_object()).cloned();
        match known.filter(|_| self.random.gen_bool(0.5)) {
            Some(lpdu) => event.insert("hashes".to_owned(), json!({ "lpdu": lpdu })),
            None => event.insert("hashes".to_owned(), json!({ "lpdu": { "sha256": lpdu_hash(event) } })),
        };
        self.sign(event);
    }

    /// As a hub finishes it: after what is the end of the log, or anywhere; allowed by what is current, or by anything.
    fn as_finished(&mut self, event: &mut Object, hub: &OwnedServerName) {
        if self.random.gen_bool(0.5) {
            self.as_lpdu(event, hub);
        } else {
            event.remove("hub_server");
            event.remove("hashes");
        }
        let id = |event: &Object| json!(format!("${}", isthmus::event::reference_hash(event, Redaction::Draft)));
        let before = match self.random.gen_bool(0.7) {
            true => self.seen.last().cloned(),
            false if self.seen.is_empty() => None,
            false => Some(self.seen[self.random.gen_range(0..self.seen.len())].clone()),
        };
        let sender = event.get("sender").cloned().unwrap_or_default();
        let allowing = |kind: &str, key: &Value| {
            let found = self.seen.iter().rev().find(|seen| seen["type"] == kind && seen.get("state_key") == Some(key));
            found.map(id)
        };
        let mut wanted =
            vec![("m.room.create", json!("")), ("m.room.power_levels", json!("")), ("m.room.member", sender)];
        if event["type"] == "m.room.member" {
            wanted.push(("m.room.join_rules", json!("")));
        }
        let auth: Vec<Value> = wanted.iter().filter_map(|(kind, key)| allowing(kind, key)).collect();
        event.insert("auth_events".to_owned(), json!(auth));
        event.insert("prev_events".to_owned(), json!(before.iter().map(id).collect::<Vec<_>>()));
        let hash = content_hash(event);
        let hashes = event.entry("hashes").or_insert_with(|| json!({}));
        if let Some(hashes) = hashes.as_object_mut() {
            hashes.insert("sha256".to_owned(), json!(hash));
        }
        self.sign(event);
    }

    /// Signs as its servers, as the sender's server with a key of its own, or with what that server once signed.
    fn sign(&mut self, event: &mut Object) {
        let mut signatures = match self.random.gen_bool(0.5) {
            true => event.get("signatures").and_then(Value::as_object).cloned().unwrap_or_default(),
            false => Object::new(),
        };
        let sender = event.get("sender").and_then(Value::as_str).unwrap_or_default();
        let server = OwnedServerName::try_from(sender.split_once(':').map_or("x", |(_, server)| server)).unwrap();
        let mut signed = redact(event, Redaction::Draft);
        signed.remove("signatures");
        let bytes = canonical_json(&signed);
        for by in self.owned.clone() {
            signatures.insert(by.name.to_string(), json!({ by.key.id(): by.key.sign(&bytes) }));
            if self.owned.iter().all(|owned| owned.name != server) && self.random.gen_bool(0.3) {
                let id = self.key_id(&server, &by.key);
                signatures.insert(server.to_string(), json!({ id: by.key.sign(&bytes) }));
            }
        }
        let of_server = self.seen.iter().filter_map(|seen| seen.get("signatures")?.get(server.as_str())).cloned();
        let of_server: Vec<Value> = of_server.collect();
        if !of_server.is_empty() && self.random.gen_bool(0.4) {
            signatures.insert(server.to_string(), self.pick(&of_server));
        }
        event.insert("signatures".to_owned(), Value::Object(signatures));
    }

    fn edu(&mut self, room: &RoomId) -> Value {
        let user = self.user();
        match self.random.gen_range(0..4) {
            0 => {
                json!({ "type": "m.typing", "sender": user, "content": { "room_id": room, "user_id": user, "typing": true } })
            }
            1 => {
                json!({ "edu_type": "m.receipt", "content": { room.as_str(): { "m.read": { user: { "event_ids": [], "data": { "ts": 1 } } } } } })
            }
            2 => {
                json!({ "edu_type": "m.presence", "content": { "push": [{ "user_id": user, "presence": "online" }] } })
            }
            _ => {
                json!({ "edu_type": "m.direct_to_device", "content": { "sender": user, "type": "m.x", "message_id": "1",
                "messages": { "@alice:part.example": { "*": {} } } } })
            }
        }
    }
}

async fn object(response: Response) -> Option<Object> {
    let bytes = axum::body::to_bytes(response.into_body(), 1 << 24).await.ok()?;
    serde_json::from_slice(&bytes).ok()
}

async fn lie_about_keys(forger: Arc<Mutex<Forger>>, request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    if !path.contains("/_matrix/key/v2/") {
        return next.run(request).await;
    }
    if forger.lock().unwrap().random.gen_bool(0.5) {
        return next.run(request).await;
    }
    let mut forger = forger.lock().unwrap();
    let victim = forger.someone();
    let owned = forger.owned.clone();
    let by = forger.pick(&owned);
    let id = forger.key_id(&victim, &by.key);
    let mut keys = json!({ "server_name": victim, "valid_until_ts": 9_000_000_000_000_i64, "old_verify_keys": {},
        "verify_keys": { id: { "key": by.key.public_base64() } } });
    let keys = keys.as_object_mut().unwrap();
    sign_object(keys, victim.as_str(), &by.key);
    for owned in &owned {
        sign_object(keys, owned.name.as_str(), &owned.key);
    }
    match path.ends_with("/server") {
        true => Json(json!(keys)).into_response(),
        false => Json(json!({ "server_keys": [keys] })).into_response(),
    }
}

async fn lie_in_answers(forger: Arc<Mutex<Forger>>, room: OwnedRoomId, request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    if path.contains("/key/v2/") {
        return lie_about_keys(forger, request, next).await;
    }
    let reads = ["/backfill/", "/state/", "/event/", "/make_join/", "/send_join/"];
    let response = next.run(request).await;
    if !response.status().is_success() || !reads.iter().any(|read| path.contains(read)) {
        return response;
    }
    let Some(mut answer) = object(response).await else { return http::StatusCode::BAD_GATEWAY.into_response() };
    let mut forger = forger.lock().unwrap();
    let hub = forger.owned[0].name.clone();
    if path.contains("/make_join/") {
        if forger.random.gen_bool(0.3) {
            // Something else to be signed.
            let other = forger.fresh(&room);
            for (key, value) in other {
                if key != "sender" || forger.random.gen_bool(0.5) {
                    answer.insert(key.clone(), value.clone());
                    if let Some(event) = answer.get_mut("event").and_then(Value::as_object_mut) {
                        event.insert(key, value);
                    }
                }
            }
        }
        return Json(answer).into_response();
    }
    for list in ["pdus", "state", "auth_chain"] {
        let Some(entries) = answer.get_mut(list).and_then(Value::as_array_mut) else { continue };
        for _ in 0..forger.random.gen_range(0..4) {
            let forged = Value::Object(forger.event(&room, &hub));
            let place = forger.random.gen_range(0..=entries.len());
            if forger.random.gen_bool(0.7) || place == entries.len() {
                entries.insert(place, forged);
            } else {
                entries[place] = forged;
            }
        }
    }
    if path.contains("/event/") && forger.random.gen_bool(0.5) {
        answer = forger.event(&room, &hub);
    }
    Json(answer).into_response()
}
