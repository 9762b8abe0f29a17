//! What the gateway asks other LM servers. An endpoint is called by the name that peers use today first, then by the
//! draft's; what a server answered to is remembered.

use std::time::Duration;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use ruma::{EventId, OwnedEventId, OwnedServerName, RoomId, ServerName, UserId};
use serde_json::{Value, json};

use crate::event::{Family, Object, Pdu, RoomVersion, event_id};
use crate::federation::{Call, Client, HeldAnswer, RemoteError};
use crate::identity::{Keyring, KeyringError};
use crate::refusal::Refusal;
use crate::seam::AliasTarget;

/// How often a transaction is sent again, and after which pause, to a server that is at work on another one.
const BUSY: usize = 5;
const PAUSE: Duration = Duration::from_secs(1);
const UNSTABLE: &str = "/_matrix/federation/unstable/org.matrix.i-d.ralston-mimi-linearized-matrix.02";
/// Where servers that know of changes of the hub are asked about them (`docs/hub-transfer.md`).
const HUB: &str = "/_matrix/federation/unstable/im.isthmus.hub";
/// What stays as it is in a path segment or a query value.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
/// How many predecessors of a template are looked at.
const PREV_EVENTS: usize = 20;
/// How many servers are remembered.
const SERVERS: u64 = 10_000;
/// How long it is remembered what a server answers to.
const REMEMBERED: Duration = Duration::from_secs(24 * 3600);

/// Other LM servers.
pub(super) struct Peers {
    client: Client,
    keyring: Keyring,
    /// Those that know the endpoints by the draft's names only.
    stable: moka::future::Cache<OwnedServerName, ()>,
}

impl Peers {
    pub fn new(client: Client, keyring: Keyring) -> Self {
        let stable = moka::future::Cache::builder().max_capacity(SERVERS).time_to_live(REMEMBERED).build();
        Self { client, keyring, stable }
    }

    /// `GET make_join`, `make_leave` or `make_knock`: the answer, and the template in it.
    pub async fn make(
        &self,
        server: &ServerName,
        change: &str,
        room_id: &RoomId,
        user_id: &UserId,
    ) -> Result<(Object, Object), RemoteError> {
        let mut uri = format!("/_matrix/federation/v1/make_{change}/{}/{}", encode(room_id), encode(user_id));
        if change != "leave" {
            for (index, version) in RoomVersion::of(Family::Log).enumerate() {
                uri.push(if index == 0 { '?' } else { '&' });
                uri.push_str("ver=");
                uri.push_str(&encode(version.as_str()));
            }
        }
        let answer = self.call(server, Call::get(uri)).await?;
        // The draft answers a join with the bare template, a leave with one in `event`; peers do as they like.
        let template = match answer.get("event") {
            Some(Value::Object(event)) => event.clone(),
            _ => answer.clone(),
        };
        Ok((answer, template))
    }

    /// Whether a server says in its signed key document that it does LM alone. Such a server takes part in no graph,
    /// whatever its templates hold: it takes LPDUs.
    pub async fn is_linearized(&self, server: &ServerName) -> Result<bool, KeyringError> {
        Ok(self.keyring.server_keys(server).await?.linearized)
    }

    /// `POST send_join`, `send_leave` or `send_knock`; the answer may be large.
    pub async fn send(
        &self,
        server: &ServerName,
        change: &str,
        lpdu_id: &EventId,
        lpdu: &Object,
    ) -> Result<(Object, HeldAnswer), RemoteError> {
        let call = |uri| Call::post(uri, lpdu.clone()).with_state();
        self.named_held(server, "v3", &format!("send_{change}/{}", encode(lpdu_id)), call).await
    }

    /// `PUT send` of one LPDU that no queue has, outside any room that is known here. A server that is at work on a transaction of
    /// some queue's may have it wait.
    pub async fn transact(&self, server: &ServerName, lpdu_id: &EventId, lpdu: &Object) -> Result<Object, RemoteError> {
        let body = json!({ "pdus": [lpdu] }).as_object().cloned().unwrap_or_default();
        let path = format!("send/{}", encode(lpdu_id));
        let call = |uri| Call::put(uri, body.clone());
        let mut answer = self.named(server, "v2", &path, call).await;
        for _ in 0..BUSY {
            if !answer.as_ref().is_err_and(RemoteError::is_busy) {
                break;
            }
            tokio::time::sleep(PAUSE).await;
            answer = self.named(server, "v2", &path, call).await;
        }
        answer
    }

    /// The same by Matrix' `send`, of an event of a shared room.
    pub async fn transact_as_graph(
        &self,
        server: &ServerName,
        own: &ServerName,
        now: i64,
        event: &Pdu,
    ) -> Result<Object, RemoteError> {
        let body = json!({ "origin": own, "origin_server_ts": now, "pdus": [event.json] });
        let body = body.as_object().cloned().unwrap_or_default();
        self.call(server, Call::put(format!("/_matrix/federation/v1/send/{}", encode(&event.event_id)), body)).await
    }

    /// Matrix' `PUT invite`, of an event of a shared room: the event as the server signed it.
    pub async fn invite_as_graph(
        &self,
        server: &ServerName,
        event: &Pdu,
        version: RoomVersion,
        stripped_state: Vec<Value>,
    ) -> Result<Object, RemoteError> {
        let body = json!({
            "event": event.json,
            "room_version": version.as_str(),
            "invite_room_state": stripped_state,
        });
        let body = body.as_object().cloned().unwrap_or_default();
        let uri = format!("/_matrix/federation/v2/invite/{}/{}", encode(&event.room_id), encode(&event.event_id));
        match self.call(server, Call::put(uri, body)).await?.remove("event") {
            Some(Value::Object(event)) => Ok(event),
            _ => Err(RemoteError::BadAnswer("no event in the answer to an invite".to_owned())),
        }
    }

    /// `POST invite`: the event as the server signed it.
    pub async fn invite(
        &self,
        server: &ServerName,
        event_id: &EventId,
        event: &Object,
        version: RoomVersion,
        stripped_state: Vec<Value>,
    ) -> Result<Object, RemoteError> {
        let body = json!({
            "event": event,
            "room_version": version.as_str(),
            "invite_room_state": stripped_state,
        });
        let body = body.as_object().cloned().unwrap_or_default();
        let call = |uri| Call::post(uri, body.clone());
        let answer = self.named(server, "v3", &format!("invite/{}", encode(event_id)), call).await?;
        ["pdu", "event"]
            .iter()
            .find_map(|name| answer.get(*name)?.as_object().cloned())
            .ok_or_else(|| RemoteError::BadAnswer("neither pdu nor event in the answer to an invite".to_owned()))
    }

    /// `GET ready`: whether a server knows of changes of the hub, and what it says of a room.
    pub async fn ready(&self, server: &ServerName, room_id: &RoomId) -> Result<Object, RemoteError> {
        self.call(server, Call::get(format!("{HUB}/ready/{}", encode(room_id)))).await
    }

    /// `POST hub`: the event that would make a server the hub, as that server signed it.
    pub async fn take_hub(
        &self,
        server: &ServerName,
        event_id: &EventId,
        event: &Object,
    ) -> Result<Object, RemoteError> {
        let body = json!({ "event": event }).as_object().cloned().unwrap_or_default();
        let mut answer = self.call(server, Call::post(format!("{HUB}/hub/{}", encode(event_id)), body)).await?;
        match answer.remove("event") {
            Some(Value::Object(event)) => Ok(event),
            _ => Err(RemoteError::BadAnswer("no event in the answer to a change of the hub".to_owned())),
        }
    }

    /// `GET backfill`: the events before and with `from`, in the order in which the server gives them.
    pub async fn backfill(
        &self,
        server: &ServerName,
        room_id: &RoomId,
        from: &EventId,
        limit: usize,
    ) -> Result<Vec<Object>, RemoteError> {
        let path = format!("backfill/{}?v={}&limit={limit}", encode(room_id), encode(from));
        let mut answer = self.named(server, "v2", &path, Call::get).await?;
        events(&mut answer, "pdus")
    }

    /// `GET event`: whether a server gives an event.
    pub async fn event(&self, server: &ServerName, event_id: &EventId) -> Result<(), RemoteError> {
        self.named(server, "v2", &format!("event/{}", encode(event_id)), Call::get).await.map(drop)
    }

    /// `GET state`: the state before an event, and the events that allow it, as far as they are given.
    pub async fn state(
        &self,
        server: &ServerName,
        room_id: &RoomId,
        before: &EventId,
    ) -> Result<(Vec<Object>, Vec<Object>, HeldAnswer), RemoteError> {
        let uri = format!("/_matrix/federation/v1/state/{}?event_id={}", encode(room_id), encode(before));
        let (mut answer, held) = self.call_held(server, Call::get(uri).with_state()).await?;
        let state = events(&mut answer, "pdus")?;
        Ok((state, events(&mut answer, "auth_chain").unwrap_or_default(), held))
    }

    /// `GET query/directory`
    pub async fn directory(&self, server: &ServerName, alias: &str) -> Result<AliasTarget, Refusal> {
        // The draft has no such endpoint; under its prefix a server that does both knows which room is meant.
        let path = format!("query/directory?room_alias={}", encode(alias));
        let answer = match self.call(server, Call::get(format!("{UNSTABLE}/{path}"))).await {
            Err(error) if error.is_unrecognized() => {
                self.call(server, Call::get(format!("/_matrix/federation/v1/{path}"))).await
            }
            answer => answer,
        };
        let answer = match answer {
            Ok(answer) => answer,
            Err(RemoteError::Status { status, .. }) if status == http::StatusCode::NOT_FOUND => {
                return Err(Refusal::NotFound(format!("alias {alias}")));
            }
            Err(error) => return Err(error.into_refusal(server)),
        };
        let room_id = answer.get("room_id").and_then(Value::as_str).unwrap_or_default();
        let room_id = RoomId::parse(room_id).map_err(|error| Refusal::Remote {
            server: server.to_string(),
            problem: format!("answered for {alias} with room_id {room_id:?}: {error}"),
        })?;
        let servers = answer.get("servers").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let servers = servers.iter().filter_map(|server| ServerName::parse(server.as_str()?).ok());
        Ok(AliasTarget { room_id, servers: servers.take(50).collect() })
    }

    /// Calls an endpoint that has two names.
    async fn named(
        &self,
        server: &ServerName,
        version: &str,
        path: &str,
        call: impl Fn(String) -> Call,
    ) -> Result<Object, RemoteError> {
        Ok(self.named_held(server, version, path, call).await?.0)
    }

    async fn named_held(
        &self,
        server: &ServerName,
        version: &str,
        path: &str,
        call: impl Fn(String) -> Call,
    ) -> Result<(Object, HeldAnswer), RemoteError> {
        let unstable = || call(format!("{UNSTABLE}/{path}"));
        let stable = || call(format!("/_matrix/federation/{version}/{path}"));
        if self.stable.contains_key(server) {
            return match self.call_held(server, stable()).await {
                Err(error) if error.is_unrecognized() => {
                    self.stable.invalidate(server).await;
                    self.call_held(server, unstable()).await
                }
                answer => answer,
            };
        }
        match self.call_held(server, unstable()).await {
            Err(error) if error.is_unrecognized() => {
                let answer = self.call_held(server, stable()).await;
                if !matches!(&answer, Err(error) if error.is_unrecognized()) {
                    self.stable.insert(server.to_owned(), ()).await;
                }
                answer
            }
            answer => answer,
        }
    }

    async fn call(&self, server: &ServerName, call: Call) -> Result<Object, RemoteError> {
        Ok(self.call_held(server, call).await?.0)
    }

    async fn call_held(&self, server: &ServerName, call: Call) -> Result<(Object, HeldAnswer), RemoteError> {
        // How a GET is signed depends on what the server is; where that cannot be known, as Matrix does it.
        let linearized = self.is_linearized(server).await.unwrap_or(false);
        self.client.call_held(server, call, linearized).await
    }
}

/// The events that a template names as its predecessors: where a server gives any, the end of its log.
pub(super) fn prev_events(template: &Object) -> Vec<OwnedEventId> {
    let named = template.get("prev_events").and_then(Value::as_array).into_iter().flatten();
    named.filter_map(|id| event_id(id.as_str()?)).take(PREV_EVENTS).collect()
}

fn encode(segment: impl AsRef<str>) -> String {
    utf8_percent_encode(segment.as_ref(), ENCODED).to_string()
}

fn events(answer: &mut Object, name: &str) -> Result<Vec<Object>, RemoteError> {
    let Some(Value::Array(events)) = answer.remove(name) else {
        return Err(RemoteError::BadAnswer(format!("{name} is missing or no array")));
    };
    let objects = events.into_iter().filter_map(|event| match event {
        Value::Object(event) => Some(event),
        _ => None,
    });
    Ok(objects.collect())
}
