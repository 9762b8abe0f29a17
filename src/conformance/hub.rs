//! The room that the suite is the hub of: a log in memory, with as few rules as the checks need.

use std::collections::BTreeMap;
use std::sync::Arc;

use ruma::{OwnedRoomId, OwnedUserId, ServerName};
use serde_json::{Value, json};

use super::ear::Arrival;
use super::session::{VERSIONS, sealed};
use super::wire::{Identity, object};
use crate::clock::SharedClock;
use crate::event::{Object, Redaction, content_hash, reference_hash};

/// The room.
pub(super) struct HubRoom {
    pub room_id: OwnedRoomId,
    pub identity: Arc<Identity>,
    pub log: Vec<Object>,
    /// LPDUs as they came, with who sent them.
    pub lpdus: Vec<Value>,
}

impl HubRoom {
    /// A room made by `creator`, public.
    pub fn new(room_id: OwnedRoomId, identity: Arc<Identity>, creator: &OwnedUserId, now_ms: i64) -> Self {
        let mut room = Self { room_id, identity, log: Vec::new(), lpdus: Vec::new() };
        let version = VERSIONS.first().copied().unwrap_or_default();
        for (kind, key, content) in [
            ("m.room.create", "", json!({ "room_version": version })),
            ("m.room.member", creator.as_str(), json!({ "membership": "join" })),
            ("m.room.power_levels", "", json!({ "users": { creator.as_str(): 100 } })),
            ("m.room.join_rules", "", json!({ "join_rule": "invite" })),
        ] {
            let event = room.own(creator.as_str(), kind, Some(key), content, now_ms);
            room.log.push(event);
        }
        room
    }

    pub fn owner(&self) -> &ServerName {
        &self.identity.name
    }

    /// The latest event of a type and state key.
    pub fn state(&self, kind: &str, key: &str) -> Option<&Object> {
        let is = |event: &&Object| {
            event.get("type").and_then(Value::as_str) == Some(kind)
                && event.get("state_key").and_then(Value::as_str) == Some(key)
        };
        self.log.iter().rfind(is)
    }

    pub fn membership(&self, user: &str) -> &str {
        let member = self.state("m.room.member", user).and_then(|event| event.get("content"));
        member.and_then(|content| content.get("membership")).and_then(Value::as_str).unwrap_or("leave")
    }

    /// The whole state.
    pub fn whole(&self) -> Vec<Object> {
        let mut state: BTreeMap<(&str, &str), (usize, &Object)> = BTreeMap::new();
        for (place, event) in self.log.iter().enumerate() {
            let text = |field: &str| event.get(field).and_then(Value::as_str);
            if let (Some(kind), Some(key)) = (text("type"), text("state_key")) {
                state.insert((kind, key), (place, event));
            }
        }
        let mut state: Vec<_> = state.into_values().collect();
        state.sort_by_key(|(place, _)| *place);
        state.into_iter().map(|(_, event)| event.clone()).collect()
    }

    /// The ID of an event.
    pub fn id(event: &Object) -> String {
        format!("${}", reference_hash(event, Redaction::Draft))
    }

    /// What would be added to an event at the end of the log.
    fn completion(&self, event: &Object) -> (Vec<String>, Vec<String>) {
        let text = |field: &str| event.get(field).and_then(Value::as_str).unwrap_or_default();
        let mut slots = vec![("m.room.create", ""), ("m.room.power_levels", ""), ("m.room.member", text("sender"))];
        if text("type") == "m.room.member" {
            slots.push(("m.room.member", text("state_key")));
            let membership = event.get("content").and_then(|content| content.get("membership")).and_then(Value::as_str);
            if matches!(membership, Some("join" | "invite")) {
                slots.push(("m.room.join_rules", ""));
            }
        }
        let mut auth: Vec<String> =
            slots.into_iter().filter_map(|(kind, key)| self.state(kind, key)).map(Self::id).collect();
        let mut seen = std::collections::BTreeSet::new();
        auth.retain(|id| seen.insert(id.clone()));
        (auth, self.log.last().map(Self::id).into_iter().collect())
    }

    /// An event of one of the hub's own users, for the end of the log.
    pub fn own(&self, sender: &str, kind: &str, key: Option<&str>, content: Value, now_ms: i64) -> Object {
        let mut event = object(json!({ "type": kind, "room_id": self.room_id, "sender": sender, "content": content,
            "origin_server_ts": now_ms }));
        if let Some(key) = key {
            event.insert("state_key".to_owned(), json!(key));
        }
        self.finish(event)
    }

    /// Adds what the hub adds, to its own event or to an LPDU.
    pub fn finish(&self, mut event: Object) -> Object {
        let (auth, prev) = self.completion(&event);
        event.insert("auth_events".to_owned(), json!(auth));
        event.insert("prev_events".to_owned(), json!(prev));
        self.close(event)
    }

    /// Hashes and signs what has everything else.
    pub fn close(&self, mut event: Object) -> Object {
        let hash = content_hash(&event);
        let hashes = event.entry("hashes").or_insert_with(|| json!({}));
        if let Some(hashes) = hashes.as_object_mut() {
            hashes.insert("sha256".to_owned(), json!(hash));
        }
        self.sign(event)
    }

    /// Signs over whatever stands there.
    pub fn sign(&self, mut event: Object) -> Object {
        let before = event.remove("signatures");
        let redacted = crate::event::redact(&event, Redaction::Draft);
        let signature = self.identity.key.sign(&crate::event::canonical_json(&redacted));
        let mut signatures = before.and_then(|before| before.as_object().cloned()).unwrap_or_default();
        signatures.insert(self.identity.name.to_string(), json!({ self.identity.key.id(): signature }));
        event.insert("signatures".to_owned(), Value::Object(signatures));
        event
    }

    /// An LPDU of the second server, finished by this hub.
    pub fn of_second(&self, second: &Identity, mut event: Object) -> Object {
        event.insert("hub_server".to_owned(), json!(self.identity.name));
        self.finish(sealed(event, second))
    }

    /// Takes a transaction of a participant: what is of a joined user is appended, everything is kept for the checks.
    pub fn take(&mut self, arrival: &Arrival, _clock: &SharedClock) -> (u16, Value) {
        let pdus = arrival.body.as_ref().and_then(|body| body.get("pdus")).and_then(Value::as_array);
        for pdu in pdus.into_iter().flatten() {
            self.lpdus.push(pdu.clone());
            let Some(lpdu) = pdu.as_object().cloned() else { continue };
            let sender = lpdu.get("sender").and_then(Value::as_str).unwrap_or_default().to_owned();
            if self.membership(&sender) == "join" {
                let event = self.finish(lpdu);
                self.log.push(event);
            }
        }
        (200, json!({ "failed_pdus": {} }))
    }

    /// Answers what a participant asks of its hub.
    pub fn answer(&mut self, arrival: &Arrival, first: &str) -> Option<(u16, Value)> {
        let second = arrival.segments.get(1).map(String::as_str).unwrap_or_default();
        let find = |id: &str| self.log.iter().position(|event| Self::id(event) == id);
        let missing = || (404, json!({ "errcode": "M_NOT_FOUND", "error": "not here" }));
        let query = |name: &str| {
            let url = url::Url::parse(&format!("http://x{}", arrival.uri)).ok()?;
            url.query_pairs().find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
        };
        Some(match arrival.endpoint.as_str() {
            "make_join" | "make_leave" if first == self.room_id => {
                let change = arrival.endpoint.strip_prefix("make_").unwrap_or_default();
                let mut template = object(json!({ "type": "m.room.member", "room_id": first, "sender": second,
                    "state_key": second, "content": { "membership": change }, "origin_server_ts": 0 }));
                let event = Value::Object(template.clone());
                template.insert("event".to_owned(), event);
                template.insert("room_version".to_owned(), json!(VERSIONS.first()));
                (200, Value::Object(template))
            }
            "send_join" | "send_leave" => {
                let lpdu = arrival.body.as_ref()?.as_object()?.clone();
                self.lpdus.push(Value::Object(lpdu.clone()));
                let state = self.whole();
                let event = self.finish(lpdu);
                self.log.push(event.clone());
                if arrival.endpoint == "send_leave" {
                    (200, json!({}))
                } else {
                    (
                        200,
                        json!({ "state": state, "auth_chain": self.log.get(..self.log.len().saturating_sub(1)), "event": event }),
                    )
                }
            }
            "event" => find(first)
                .and_then(|place| self.log.get(place))
                .map_or_else(missing, |event| (200, Value::Object(event.clone()))),
            "backfill" if first == self.room_id => {
                let limit = query("limit").and_then(|limit| limit.parse().ok()).unwrap_or(10_usize);
                match query("v").and_then(|id| find(&id)) {
                    Some(place) => {
                        let end = place.saturating_add(1);
                        let pdus = self.log.get(end.saturating_sub(limit)..end).unwrap_or_default();
                        (200, json!({ "pdus": pdus }))
                    }
                    None => missing(),
                }
            }
            "state" if first == self.room_id => {
                let whole = self.whole();
                (200, json!({ "pdus": whole, "auth_chain": self.log }))
            }
            "state_ids" if first == self.room_id => {
                let ids = |events: &[Object]| events.iter().map(Self::id).collect::<Vec<_>>();
                (200, json!({ "pdu_ids": ids(&self.whole()), "auth_chain_ids": ids(&self.log) }))
            }
            _ => return None,
        })
    }
}
