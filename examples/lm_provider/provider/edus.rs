//! What the provider's users do besides events: typing and reading, told to every server in the room directly, as the draft has it.

use anyhow::Result;
use http::Method;
use isthmus::clock::{Clock as _, SystemClock};
use isthmus::event::Object;
use ruma::{EventId, OwnedServerName, RoomId, ServerName, UserId};
use serde_json::{Value, json};

use super::{Inner, News, PATIENCE, Provider, lock, object, rules};

/// How many EDUs are remembered.
const HEARD: usize = 10_000;

impl Provider {
    /// Says that a user types, or has stopped.
    pub async fn set_typing(&self, user: &UserId, room: &RoomId, typing: bool) {
        let content = json!({ "room_id": room, "user_id": user, "typing": typing });
        self.0.say(user, room, "m.typing", content).await;
    }

    /// Says that a user has read up to an event, in a thread if one is named.
    pub async fn read(&self, user: &UserId, room: &RoomId, event_id: &EventId, thread: Option<&str>) {
        let mut data = json!({ "ts": SystemClock.now_ms() });
        if let (Some(thread), Some(data)) = (thread, data.as_object_mut()) {
            data.insert("thread_id".to_owned(), thread.into());
        }
        let entry = json!({ "data": data, "event_ids": [event_id] });
        let users = Object::from_iter([(user.to_string(), entry)]);
        let content = Object::from_iter([(room.to_string(), json!({ "m.read": users }))]);
        self.0.say(user, room, "m.receipt", Value::Object(content)).await;
    }

    /// The EDUs that came, with the servers that sent them.
    pub fn edus(&self) -> Vec<(OwnedServerName, Value)> {
        lock(&self.0.heard).clone()
    }

    /// Waits until an EDU that matches has come.
    pub async fn wait_for_edu(&self, what: &str, matches: impl Fn(&Value) -> bool) -> Result<(OwnedServerName, Value)> {
        let mut news = self.news();
        let look = async {
            loop {
                if let Some(found) = self.edus().into_iter().find(|(_, edu)| matches(edu)) {
                    return found;
                }
                let _ = news.recv().await;
            }
        };
        let found = tokio::time::timeout(PATIENCE, look).await;
        found.map_err(|_| anyhow::anyhow!("waited for {what} in vain; there were {:?}", self.edus()))
    }
}

impl Inner {
    /// EDUs came.
    pub(super) fn hear(&self, origin: &ServerName, body: &Object) {
        for edu in body.get("edus").and_then(Value::as_array).into_iter().flatten() {
            let mut heard = lock(&self.heard);
            if heard.len() < HEARD {
                heard.push((origin.to_owned(), edu.clone()));
            }
            drop(heard);
            let _ = self.news.send(News::Edu(origin.to_owned(), edu.clone()));
        }
    }

    /// Tells every other server in a room something; who cannot be reached misses it.
    async fn say(&self, user: &UserId, room: &RoomId, kind: &str, content: Value) {
        let edu = json!({ "type": kind, "sender": user, "content": content });
        let body = object(json!({ "pdus": [], "edus": [edu] }));
        let path = format!("send/edu{}-{}", SystemClock.now_ms(), lock(&self.numbers).next().unwrap_or_default());
        let servers: std::collections::BTreeSet<OwnedServerName> = {
            let rooms = lock(&self.rooms);
            let state = rooms.get(room).map(|room| &room.state);
            let members = state.into_iter().flatten().filter(|((kind, _), _)| kind == "m.room.member");
            let users = members.filter_map(|((_, user), _)| UserId::parse(user.as_str()).ok());
            let joined =
                |user: &ruma::OwnedUserId| state.is_some_and(|state| rules::membership(state, user.as_str()) == "join");
            users.filter(joined).map(|user| user.server_name().to_owned()).collect()
        };
        for server in servers.iter().filter(|server| **server != self.network.server_name) {
            if let Err(fault) = self.network.call_lm(server, Method::PUT, "v2", &path, Some(&body)).await {
                eprintln!("{server} did not take an EDU: {fault}");
            }
        }
    }
}
