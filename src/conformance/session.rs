//! One run of the suite: who plays whom, what is known of the target and the room, and how the checks ask and wait.

mod endpoint;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use ruma::{OwnedRoomId, OwnedServerName, OwnedUserId, ServerName, UserId};
use serde_json::{Value, json};

pub(super) use self::endpoint::{Endpoint, Presence};
use super::ear::{Arrival, Ear, lock};
use super::report::{Outcome, Unmet, ensure, fail, skip};
use super::wire::{Answer, Ask, Identity, Signing, object, segment};
use crate::clock::SharedClock;
use crate::event::{Object, Redaction, VerifyKey, canonical_json, lpdu_hash, redact, reference_hash};
use crate::federation::{Client, Probe};

/// How often a request is repeated that the target has no time for.
const PATIENT: usize = 5;

/// The room versions that the suite speaks, the one that the peers know first.
pub(super) const VERSIONS: [&str; 2] = ["org.matrix.i-d.ralston-mimi-linearized-matrix.02", "I.1"];

/// A request that needs a good signature, and finds nothing.
pub(super) const NOWHERE: &str =
    "/_matrix/federation/v1/state/%21nowhere%3Ainvalid?event_id=%24AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

/// What was learned on the way.
#[derive(Default)]
pub(super) struct Notes {
    /// Keys of servers, by server and key ID.
    pub keys: BTreeMap<OwnedServerName, BTreeMap<String, VerifyKey>>,
    /// Which endpoints are there, and under which name.
    pub names: BTreeMap<Endpoint, Presence>,
    /// The answer to the join.
    pub joined: Option<Value>,
    /// The version of the room.
    pub version: String,
    /// Whether the user without power is in the room.
    pub low_is_in: bool,
    /// Whether the second server is in the room, and by which event it came in.
    pub second_is_in: bool,
    /// Events of which the second server may know, and those of which it must not.
    pub before_second: Option<Value>,
    pub secret: Option<Value>,
    pub after_second: Option<Value>,
    /// An invite as it reached the second server.
    pub invite: Option<(Value, Value)>,
    /// Marks of what must not get into the room.
    pub bad: BTreeSet<String>,
    /// Whether the target, as a participant, gives the events that it has taken, once that was tried.
    pub gives_events: Option<bool>,
    /// The content of the room's join rules, while they are others for a moment.
    pub join_rules: Option<Value>,
    /// The same of its power levels.
    pub power_levels: Option<Value>,
    /// Whether the target takes GETs only if they are signed without content, as in Matrix.
    pub gets_as_matrix: bool,
    /// Whether anything was answered, and what of the answers was not as every answer must be.
    pub has_answered: bool,
    pub not_utf8: Vec<String>,
    pub not_typed: Vec<String>,
}

/// One run.
pub(super) struct Session {
    pub target: OwnedServerName,
    pub room: OwnedRoomId,
    pub first: Arc<Identity>,
    pub second: Option<Arc<Identity>>,
    /// The user who does most, and one who is to have no power.
    pub user: OwnedUserId,
    pub low: OwnedUserId,
    /// For how long people are waited for.
    pub patience: Duration,
    /// How long the target may take for an answer, and for sending an event on.
    pub limit: Duration,
    pub ear: Arc<Ear>,
    pub clock: SharedClock,
    pub client: Client,
    /// Whom to invite, as the hub.
    pub invitee: Option<OwnedUserId>,
    pub run: String,
    pub counter: AtomicU64,
    pub notes: Mutex<Notes>,
}

impl Session {
    /// A number that was not used yet.
    pub fn fresh(&self) -> u64 {
        self.counter.fetch_add(1, Ordering::Relaxed)
    }

    /// A mark by which an event is known again.
    pub fn mark(&self, check: &str) -> String {
        format!("{}.{check}.{}", self.run, self.fresh())
    }

    /// A mark of something that must not get into the room.
    pub fn bad_mark(&self, check: &str) -> String {
        let mark = self.mark(&format!("{check}.bad"));
        lock(&self.notes).bad.insert(mark.clone());
        mark
    }

    pub fn txn(&self) -> String {
        format!("{}-{}", self.run, self.fresh())
    }

    /// A user of one of the suite's servers.
    pub fn user_of(&self, identity: &Identity, localpart: &str) -> Result<OwnedUserId, Unmet> {
        UserId::parse(format!("@{localpart}:{}", identity.name)).map_err(|error| skip(error.to_string()))
    }

    pub fn second(&self) -> Result<&Arc<Identity>, Unmet> {
        self.second.as_ref().ok_or_else(|| skip("it needs a second server: --second NAME"))
    }

    /// Sends a request signed as it should be.
    pub async fn ask(&self, identity: &Identity, ask: Ask) -> Result<Answer, Unmet> {
        let header = self.sign(identity, &ask);
        self.ask_with(vec![header], ask).await
    }

    /// The signature that a request should have, or that the target wants where it is known to want another.
    pub fn sign(&self, identity: &Identity, ask: &Ask) -> String {
        let empty = json!({});
        let mut signing = self.signing(identity, ask, ask.body.as_ref().unwrap_or(&empty));
        if ask.body.is_none() && lock(&self.notes).gets_as_matrix {
            signing.content = None;
        }
        signing.header()
    }

    pub fn signing<'a>(&'a self, identity: &'a Identity, ask: &'a Ask, content: &'a Value) -> Signing<'a> {
        Signing {
            origin: identity.name.as_str(),
            destination: self.target.as_str(),
            key: &identity.key,
            key_id: identity.key.id(),
            method: ask.method.as_str(),
            uri: &ask.uri,
            content: Some(content),
        }
    }

    /// Sends a request with these headers.
    pub async fn ask_with(&self, authorization: Vec<String>, ask: Ask) -> Result<Answer, Unmet> {
        let body = ask.body.as_ref().map(|body| match body {
            Value::Object(body) => canonical_json(body).into(),
            other => Bytes::from(other.to_string()),
        });
        self.ask_raw(authorization, ask, body).await
    }

    /// Sends a request with these headers and this body, and again after a while when the target says that it was asked too often.
    pub async fn ask_raw(&self, authorization: Vec<String>, ask: Ask, body: Option<Bytes>) -> Result<Answer, Unmet> {
        for _ in 0..PATIENT {
            let answer = self.ask_once(authorization.clone(), ask.clone(), body.clone()).await?;
            let wait = answer.field("retry_after_ms").and_then(Value::as_u64).map(Duration::from_millis);
            if answer.status != 429 {
                return Ok(answer);
            }
            tokio::time::sleep(wait.unwrap_or(Duration::from_secs(1)).min(self.limit)).await;
        }
        self.ask_once(authorization, ask, body).await
    }

    async fn ask_once(&self, authorization: Vec<String>, ask: Ask, body: Option<Bytes>) -> Result<Answer, Unmet> {
        let Ask { method, uri, .. } = ask;
        let asked = format!("{method} {uri}");
        let probe = Probe { method, uri, authorization, body, timeout: self.limit };
        let answer = self.client.probe(&self.target, probe).await;
        let answer = answer.map_err(|error| fail(format!("an answer to {asked} within {:?}", self.limit), error))?;
        let content_type = answer.headers.get(http::header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let content_type = content_type.unwrap_or_default().to_owned();
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        let utf8 = std::str::from_utf8(&answer.body).is_ok();
        let json = if utf8 { serde_json::from_slice(&answer.body).ok() } else { None };
        let answer = Answer { status: answer.status.as_u16(), content_type, text, json, asked };
        let mut notes = lock(&self.notes);
        notes.has_answered = true;
        if !utf8 {
            notes.not_utf8.push(answer.to_string());
        }
        if !answer.content_type.starts_with("application/json") {
            notes.not_typed.push(format!("{answer} with the content type {:?}", answer.content_type));
        }
        drop(notes);
        Ok(answer)
    }

    /// Why nothing that is signed can be looked at, when the target lets nothing in and never asked for the suite's keys.
    pub async fn is_not_found(&self) -> Option<String> {
        let ask = Ask::put(self.path(Endpoint::Send, &self.txn()).ok()?, json!({ "pdus": [] }));
        let answer = self.ask(&self.first, ask).await.ok()?;
        if answer.is_good().is_ok() || self.ear.gave_keys() {
            return None;
        }
        let Self { target, first, .. } = self;
        Some(format!(
            "{target} has not asked the suite for the keys of {}: it must find that name at --listen ({answer})",
            first.name
        ))
    }

    /// Finds out whether the target wants GETs signed as in Matrix. That is one fault, and should hide no others.
    pub async fn learn_signing(&self) {
        let (ask, empty) = (Ask::get(NOWHERE), json!({}));
        let mut refused = Vec::new();
        for content in [Some(&empty), None] {
            let signing = Signing { content, ..self.signing(&self.first, &ask, &empty) };
            let answer = self.ask_with(vec![signing.header()], ask.clone()).await;
            refused.push(answer.is_ok_and(|answer| answer.status == 401));
        }
        lock(&self.notes).gets_as_matrix = refused == [true, false];
    }

    /// Finds out under which name each endpoint answers.
    pub async fn learn_names(&self) {
        for endpoint in Endpoint::ALL {
            let (mut found, mut silent) = (None, None);
            for (stable, uri) in
                [(true, endpoint.stable(endpoint.trial_rest())), (false, endpoint.unstable(endpoint.trial_rest()))]
            {
                // What gives no answer may be there, and not like what it was tried with.
                let why = match self.ask(&self.first, endpoint.trial(uri)).await {
                    Ok(answer) if answer.is_unrecognized() => continue,
                    Ok(answer) if answer.is_of_proxy() => answer.to_string(),
                    Ok(_) => {
                        found = Some(Presence::Found { stable });
                        break;
                    }
                    Err(Unmet::Fail { found: why, .. } | Unmet::Skip(why)) => why,
                };
                silent = silent.or(Some(Presence::Silent { stable, why }));
            }
            lock(&self.notes).names.insert(endpoint, found.or(silent).unwrap_or(Presence::Absent));
        }
    }

    /// What is known of an endpoint.
    pub fn presence(&self, endpoint: Endpoint) -> Presence {
        lock(&self.notes).names.get(&endpoint).cloned().unwrap_or(Presence::Absent)
    }

    /// A request that is well signed and says nothing of use, under the name that the endpoint has at the target.
    pub fn trial(&self, endpoint: Endpoint) -> Result<Ask, Unmet> {
        Ok(endpoint.trial(self.path(endpoint, endpoint.trial_rest())?))
    }

    /// The path of an endpoint under the name that it has at the target.
    pub fn path(&self, endpoint: Endpoint, rest: &str) -> Result<String, Unmet> {
        match self.presence(endpoint) {
            Presence::Found { stable } | Presence::Silent { stable, .. } if stable => Ok(endpoint.stable(rest)),
            Presence::Found { .. } | Presence::Silent { .. } => Ok(endpoint.unstable(rest)),
            Presence::Absent => Err(skip(format!("the target has no {}", endpoint.names().1))),
        }
    }

    /// Skips where the target does not give this either, which is there and is for who asks: then it says nothing that it does not give
    /// something else.
    pub async fn gives(&self, ask: Ask) -> Outcome {
        let answer = self.ask(&self.first, ask).await?;
        match answer.status {
            200 => Ok(()),
            _ => Err(skip(format!("the target does not give what there is either: {answer}"))),
        }
    }

    /// The answer to the join, once the suite is in the room.
    pub fn joined(&self) -> Result<Value, Unmet> {
        lock(&self.notes).joined.clone().ok_or_else(|| skip("the suite's user is not in the room"))
    }

    /// The keys of a server, fetched from it when they are not known.
    pub async fn keys_of(&self, server: &ServerName) -> Option<BTreeMap<String, VerifyKey>> {
        let own = self.first.name == server || self.second.as_ref().is_some_and(|second| second.name == server);
        if own {
            let identity = if self.first.name == server { Some(&self.first) } else { self.second.as_ref() }?;
            let key = VerifyKey::from_base64(&identity.key.public_base64()).ok()?;
            return Some(BTreeMap::from([(identity.key.id().to_owned(), key)]));
        }
        if let Some(known) = lock(&self.notes).keys.get(server) {
            return Some(known.clone());
        }
        let probe = Probe {
            method: http::Method::GET,
            uri: "/_matrix/key/v2/server".to_owned(),
            authorization: Vec::new(),
            body: None,
            timeout: self.limit,
        };
        let answer = self.client.probe(server, probe).await.ok()?;
        let answer: Value = serde_json::from_slice(&answer.body).ok()?;
        let mut keys = BTreeMap::new();
        for list in ["verify_keys", "old_verify_keys"] {
            for (id, key) in answer.get(list).and_then(Value::as_object).into_iter().flatten() {
                let decoded = key.get("key").and_then(Value::as_str).map(VerifyKey::from_base64);
                if let Some(Ok(key)) = decoded {
                    keys.insert(id.clone(), key);
                }
            }
        }
        lock(&self.notes).keys.insert(server.to_owned(), keys.clone());
        Some(keys)
    }

    /// An event without hashes and signatures, with a mark in its type and in its content.
    pub fn message(&self, sender: &UserId, mark: &str) -> Object {
        object(json!({
            "type": format!("im.isthmus.conformance.{mark}"),
            "room_id": self.room,
            "sender": sender,
            "origin_server_ts": self.clock.now_ms(),
            "hub_server": self.target,
            "content": { "body": format!("conformance {mark}"), "mark": mark },
        }))
    }

    /// A state event.
    pub fn state(&self, sender: &UserId, kind: &str, state_key: &str, content: Value) -> Object {
        object(json!({
            "type": kind,
            "state_key": state_key,
            "room_id": self.room,
            "sender": sender,
            "origin_server_ts": self.clock.now_ms(),
            "hub_server": self.target,
            "content": content,
        }))
    }

    /// Sends a transaction with a new ID.
    pub async fn send(&self, identity: &Identity, pdus: Vec<Object>) -> Result<Answer, Unmet> {
        let uri = self.path(Endpoint::Send, &self.txn())?;
        self.ask(identity, Ask::put(uri, json!({ "pdus": pdus }))).await
    }

    /// Says something good as `user` and waits until the hub has sent it to `identity` itself.
    pub async fn say(&self, identity: &Identity, user: &UserId, check: &str) -> Result<Value, Unmet> {
        let mark = self.mark(check);
        let lpdu = sealed(self.message(user, &mark), identity);
        self.send(identity, vec![lpdu]).await?.is_good()?;
        self.echo(identity, &mark).await
    }

    /// Sends a good state event and waits for it to come back.
    pub async fn set(&self, identity: &Identity, event: Object) -> Result<Value, Unmet> {
        let hash = lpdu_hash(&event);
        self.send(identity, vec![sealed(event, identity)]).await?.is_good()?;
        self.arrived(identity, "the hub sends a state event back to its sender", move |event| {
            event.pointer("/hashes/lpdu/sha256").and_then(Value::as_str) == Some(hash.as_str())
        })
        .await
    }

    /// Waits for the event with this mark.
    pub async fn echo(&self, identity: &Identity, mark: &str) -> Result<Value, Unmet> {
        let expected = format!("the hub sends the event {mark} to {}", identity.name);
        self.arrived(identity, &expected, |event| mark_of(event) == Some(mark)).await
    }

    /// Waits for an event.
    pub async fn arrived(
        &self,
        identity: &Identity,
        expected: &str,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value, Unmet> {
        let found = self.ear.wait(self.limit, |arrivals| {
            pushed(arrivals, identity).find(|(_, event)| wanted(event)).map(|(_, e)| e.clone())
        });
        found.await.ok_or_else(|| fail(expected, format!("nothing such within {:?}", self.limit)))
    }

    /// Passes when nothing with this mark has come, after everything that the hub took before now has.
    pub async fn absent(&self, check: &str, mark: &str) -> Outcome {
        self.say(&self.first, &self.user, check).await?;
        let arrivals = self.ear.arrivals();
        let found = pushed(&arrivals, &self.first).find(|(_, event)| mark_of(event) == Some(mark));
        ensure(found.is_none(), "the event is not sent on", || {
            format!("the hub sent on {}", found.map(|(_, event)| event.to_string()).unwrap_or_default())
        })
    }

    /// Whether the target has the log, or had it once, from another server.
    pub fn was_handed_over(&self) -> bool {
        self.state_event("m.room.hub", "").is_some()
    }

    /// The room's state as far as the suite knows it: by the join's answer and by everything that came since.
    pub fn state_event(&self, kind: &str, state_key: &str) -> Option<Value> {
        let (joined, bad) = {
            let notes = lock(&self.notes);
            (notes.joined.clone()?, notes.bad.clone())
        };
        let matches = |event: &&Value| {
            event.get("type").and_then(Value::as_str) == Some(kind)
                && event.get("state_key").and_then(Value::as_str) == Some(state_key)
                && !mark_of(event).is_some_and(|mark| bad.contains(mark))
        };
        let arrivals = self.ear.arrivals();
        let later = pushed(&arrivals, &self.first).map(|(_, event)| event).filter(matches).last().cloned();
        let own = joined.get("event").filter(matches).cloned();
        let before =
            joined.get("state").and_then(Value::as_array).and_then(|state| state.iter().rfind(matches)).cloned();
        later.or(own).or(before)
    }

    /// The power level of a user.
    pub fn level(&self, user: &UserId) -> i64 {
        let levels = self.state_event("m.room.power_levels", "").and_then(|event| event.get("content").cloned());
        let Some(levels) = levels else { return 0 };
        let of_user = levels.get("users").and_then(|users| users.get(user.as_str())).and_then(Value::as_i64);
        of_user.or_else(|| levels.get("users_default").and_then(Value::as_i64)).unwrap_or(0)
    }

    /// The level that it takes to set this state.
    pub fn needed_for(&self, kind: &str) -> i64 {
        let levels = self.state_event("m.room.power_levels", "").and_then(|event| event.get("content").cloned());
        let Some(levels) = levels else { return 0 };
        let of_kind = levels.get("events").and_then(|events| events.get(kind)).and_then(Value::as_i64);
        of_kind.or_else(|| levels.get("state_default").and_then(Value::as_i64)).unwrap_or(50)
    }

    /// Skips where the suite's user has not this much power.
    pub fn needs_power(&self, level: i64) -> Outcome {
        let has = self.level(&self.user);
        if has >= level {
            return Ok(());
        }
        Err(skip(format!("{} has the level {has}: give it {level} in the room", self.user)))
    }

    /// Skips where the user who is to have no power has some.
    pub fn low_is_low(&self) -> Outcome {
        if !lock(&self.notes).low_is_in {
            return Err(skip(format!("{} is not in the room", self.low)));
        }
        match self.level(&self.low) {
            level if level < 50 => Ok(()),
            level => Err(skip(format!("{} has the level {level}", self.low))),
        }
    }

    /// A GET about the room.
    pub fn about_room(&self, endpoint: &str, query: &[(&str, &str)]) -> Ask {
        let query: Vec<String> = query.iter().map(|(name, value)| format!("{name}={}", segment(value))).collect();
        Ask::get(format!("/_matrix/federation/v1/{endpoint}/{}?{}", segment(self.room.as_str()), query.join("&")))
    }

    /// A backfill of the room.
    pub fn backfill(&self, from: &str, limit: usize) -> Result<Ask, Unmet> {
        let rest = format!("{}?v={}&limit={limit}", segment(self.room.as_str()), segment(from));
        Ok(Ask::get(self.path(Endpoint::Backfill, &rest)?))
    }

    /// A look-up of an event.
    pub fn event(&self, id: &str) -> Result<Ask, Unmet> {
        Ok(Ask::get(self.path(Endpoint::Event, &segment(id))?))
    }

    /// A template.
    pub fn make(&self, change: &str, room: &str, user: &UserId, versions: &[&str]) -> Ask {
        let versions: Vec<String> = versions.iter().map(|version| format!("ver={}", segment(version))).collect();
        let (room, user) = (segment(room), segment(user.as_str()));
        let query = if versions.is_empty() { String::new() } else { format!("?{}", versions.join("&")) };
        Ask::get(format!("/_matrix/federation/v1/make_{change}/{room}/{user}{query}"))
    }
}

/// The mark of an event, if it has one.
pub(super) fn mark_of(event: &Value) -> Option<&str> {
    let in_content = event.pointer("/content/mark").and_then(Value::as_str);
    let in_kind = || event.get("type").and_then(Value::as_str)?.strip_prefix("im.isthmus.conformance.");
    in_content.or_else(in_kind)
}

/// The events that came to one of the suite's servers, in order; those of transactions that it refused are left out.
pub(super) fn pushed<'a>(
    arrivals: &'a [Arrival],
    identity: &'a Identity,
) -> impl Iterator<Item = (&'a Arrival, &'a Value)> {
    arrivals
        .iter()
        .filter(|arrival| arrival.endpoint == "send" && arrival.to == identity.name)
        .filter(|arrival| arrival.answered.is_none_or(|status| status == 200))
        .flat_map(|arrival| {
            let pdus = arrival.body.as_ref().and_then(|body| body.get("pdus")).and_then(Value::as_array);
            pdus.into_iter().flatten().map(move |pdu| (arrival, pdu))
        })
}

/// The event's ID.
pub(super) fn id_of(event: &Value) -> String {
    event.as_object().map(|event| format!("${}", reference_hash(event, Redaction::Draft))).unwrap_or_default()
}

/// Adds the hash and the signature that an LPDU needs.
pub(super) fn sealed(mut lpdu: Object, identity: &Identity) -> Object {
    let hash = lpdu_hash(&lpdu);
    lpdu.insert("hashes".to_owned(), json!({ "lpdu": { "sha256": hash } }));
    signed(lpdu, identity)
}

/// Adds the signature alone.
pub(super) fn signed(lpdu: Object, identity: &Identity) -> Object {
    signed_by(lpdu, identity.name.as_str(), identity.key.id(), &identity.key)
}

/// Signs in any name.
pub(super) fn signed_by(mut lpdu: Object, name: &str, key_id: &str, key: &crate::identity::SigningKey) -> Object {
    lpdu.remove("signatures");
    let signature = key.sign(&canonical_json(&redact(&lpdu, Redaction::Draft)));
    lpdu.insert("signatures".to_owned(), json!({ name: { key_id: signature } }));
    lpdu
}
