//! The manners of the LM server that others know: as hub it never knows an LPDU again, sends each event once and forgets it
//! when that fails, sends the echo before it answers, ends a transaction at the first bad event with a 500, has web pages
//! for what it does not serve, and knows no make_leave. Only its manners as hub are here.

use std::sync::Arc;

use axum::response::{Html, IntoResponse as _, Response};
use http::{Method, StatusCode};
use isthmus::event::{Object, Pdu};
use ruma::{RoomId, ServerName};
use serde_json::{Value, json};

use super::network::UNSTABLE;
use super::server::Fault;
use super::{Inner, lock, object};

/// How many events it gives at once of those that somebody missed.
pub const BACKFILL: usize = 10;

/// Whether it serves an endpoint under this name.
pub fn serves(prefix: &str, endpoint: &str) -> bool {
    match prefix {
        "v1" => matches!(endpoint, "send" | "make_join" | "state" | "state_ids" | "query"),
        "v2" => matches!(endpoint, "invite" | "send_join"),
        "v3" => false,
        _ => matches!(endpoint, "send" | "invite" | "send_join" | "event" | "backfill"),
    }
}

/// The page that it has instead of an error.
pub fn page(method: &Method, path: &str) -> Response {
    let page = format!("<!DOCTYPE html><html><body><pre>Cannot {method} {path}</pre></body></html>");
    (StatusCode::NOT_FOUND, Html(page)).into_response()
}

/// What everything is that goes wrong.
pub fn fault(error: &anyhow::Error) -> Fault {
    Fault { status: StatusCode::INTERNAL_SERVER_ERROR, errcode: "M_UNKNOWN".to_owned(), error: format!("{error:#}") }
}

/// An event with its ID in it, as some of its answers have them.
pub fn with_id(event: &Pdu) -> Value {
    let mut json = event.json.clone();
    json.insert("event_id".to_owned(), json!(event.event_id));
    Value::Object(json)
}

impl Inner {
    /// Sends an event to all who are to get it, in turn and once. What does not arrive is lost.
    pub(super) async fn hand_round(&self, event: &Pdu) {
        let to = {
            let rooms = lock(&self.rooms);
            let room = rooms.get(&event.room_id);
            let entry = room.and_then(|room| room.log.get(room.place(&event.event_id)?));
            entry.map(|entry| entry.to.clone()).unwrap_or_default()
        };
        let body = object(json!({ "pdus": [event.json] }));
        for server in to {
            let path = format!("{UNSTABLE}/send/{}", rand::random::<u64>());
            let _ = self.network.call(&server, Method::PUT, &path, Some(&body)).await;
        }
    }

    /// The same, without waiting for it: many events are on their way at once.
    pub(super) fn hand_round_later(&self, event: &Arc<Pdu>) {
        let (Some(me), event) = (self.me.upgrade(), event.clone()) else { return };
        let task = self.runtime.spawn(async move { me.hand_round(&event).await });
        lock(&self.tasks).push(task);
    }

    /// Takes a transaction up to the first event that is not right.
    pub(super) async fn receive_as_eigen(&self, origin: &ServerName, pdus: &[Value]) -> Result<Value, Fault> {
        for lpdu in pdus.iter().filter_map(Value::as_object).cloned() {
            let room = lpdu.get("room_id").and_then(Value::as_str).and_then(|room| <&RoomId>::try_from(room).ok());
            if !room.is_some_and(|room| lock(&self.rooms).contains_key(room)) {
                continue;
            }
            let finished = async { self.finish(self.verified_lpdu(origin, lpdu).await?, None) };
            let event = finished.await.map_err(|error| fault(&error))?;
            self.hand_round(&event).await;
        }
        Ok(Value::Object(Object::new()))
    }
}
