//! PDUs of graph rooms: parsed strictly, then proved step by step. An [`Unverified`] has the right form, a [`Verified`] the
//! right signatures (and the content hash, or else it is the redacted copy); what was authorized is a
//! [`super::stored::Stored`]. Events of shared rooms have LM's form, and what proves them is in [`crate::event`].

use std::collections::BTreeSet;

use ruma::canonical_json::{redact, try_from_json_map};
use ruma::events::TimelineEventType;
use ruma::room_version_rules::RoomVersionRules;
use ruma::serde::Base64;
use ruma::signatures::{
    PublicKeyMap, PublicKeySet, Verified as HashVerified, reference_hash, required_server_signatures_to_verify_event,
    verify_event, verify_json,
};
use ruma::state_res::check_pdu_format;
use ruma::{CanonicalJsonObject, OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::version::{is_shared, rules_of};
use crate::event::{
    self, HashCheck, Object, Redaction, RoomVersion, VerifyKeys, check_numbers, event_id, integers, parse_event_id,
    parse_object,
};
use crate::guard::guarded_now;
use crate::refusal::Refusal;

/// The table by which events of shared rooms are redacted, hashed and signed: graph servers know no other.
pub const REDACTION: Redaction = Redaction::GraphServer;

/// The fields of an event of a graph, and the event itself as it goes over the wire (canonical JSON without `unsigned`; in a
/// shared room that of RFC 8785).
#[derive(Debug, Clone)]
pub struct Pdu {
    /// The version of the room.
    pub version: RoomVersion,
    /// `$` and the reference hash.
    pub event_id: OwnedEventId,
    /// The room; of a version 12 create event the room that it makes.
    pub room_id: OwnedRoomId,
    /// Whether `room_id` stands in the event: not so in a version 12 create event.
    pub says_room_id: bool,
    /// The sender.
    pub sender: OwnedUserId,
    /// The event type.
    pub kind: TimelineEventType,
    /// The state key of a state event.
    pub state_key: Option<String>,
    /// Milliseconds since the epoch, as the sender says; never negative.
    pub origin_server_ts: i64,
    /// As the sender says. In a shared room events have none: what stands here is the place in which it was stored, so that who
    /// was before it is less deep; 0 before that.
    pub depth: i64,
    /// The events before it, each once.
    pub prev_events: Vec<OwnedEventId>,
    /// The events that allow it.
    pub auth_events: Vec<OwnedEventId>,
    /// Of a redaction: what it redacts.
    pub redacts: Option<OwnedEventId>,
    /// In a shared room: the hub that finished it for a participant.
    pub hub_server: Option<OwnedServerName>,
    /// `content`.
    pub content: Box<RawValue>,
    /// The whole event.
    pub raw: Box<RawValue>,
}

/// How many events one of a shared room may name, as in every graph. <https://spec.matrix.org/v1.16/rooms/v11/#event-format-1>
const MAX_PREV_EVENTS: usize = 20;
const MAX_AUTH_EVENTS: usize = 10;

/// A PDU whose form is right, and of which nothing else is proved.
#[derive(Debug, Clone)]
pub struct Unverified {
    pdu: Pdu,
    form: Form,
}

/// What is verified of an event.
#[derive(Debug, Clone)]
enum Form {
    Graph(CanonicalJsonObject),
    Linear(Box<event::Pdu>),
}

/// A PDU that is signed as its room version asks.
#[derive(Debug, Clone)]
pub struct Verified {
    pdu: Pdu,
    is_whole: bool,
}

/// What of an event is read from its JSON. (Section "Event format" of the room versions.)
#[derive(Deserialize)]
struct Wire {
    room_id: Option<OwnedRoomId>,
    sender: OwnedUserId,
    #[serde(rename = "type")]
    kind: TimelineEventType,
    state_key: Option<String>,
    origin_server_ts: i64,
    depth: Option<i64>,
    prev_events: Vec<OwnedEventId>,
    auth_events: Vec<OwnedEventId>,
    redacts: Option<serde_json::Value>,
    hub_server: Option<serde_json::Value>,
    content: Box<RawValue>,
}

/// The ID by which the sender of what cannot be taken as an event of a graph knows it. An integer that is not written as one is
/// none in a graph; such an event is named by what it would be with an integer.
pub fn id_as_received(raw: &str, version: RoomVersion) -> Option<OwnedEventId> {
    let id = || {
        let mut object = parse_object(raw.as_bytes())?;
        object.remove("unsigned");
        integers(&mut object);
        if is_shared(version) {
            object.remove("event_id");
            return Ok(event_id(&format!("${}", event::reference_hash(&object, REDACTION))));
        }
        let malformed = |error: String| Refusal::malformed("event", error);
        let json = try_from_json_map(object).map_err(|error| malformed(error.to_string()))?;
        let hash = reference_hash(&json, rules_of(version)?).map_err(|error| malformed(error.to_string()))?;
        Ok(event_id(&format!("${hash}")))
    };
    guarded_now(&"the ID of an event", id).ok()?
}

impl Unverified {
    /// Checks the form of a parsed event: canonical JSON, fields, lengths and numbers. `unsigned` is dropped.
    pub fn from_object(mut object: Object, version: RoomVersion) -> Result<Self, Refusal> {
        if is_shared(version) {
            return Self::linear(object, version);
        }
        let rules = rules_of(version)?;
        object.remove("unsigned");
        let json = try_from_json_map(object).map_err(|error| Refusal::malformed("event", error.to_string()))?;
        check_pdu_format(&json, &rules.event_format).map_err(|problem| Refusal::malformed("event", problem))?;
        let hash = reference_hash(&json, rules).map_err(|error| Refusal::malformed("event", error.to_string()))?;
        let pdu = Pdu::read(&json, &format!("${hash}"), version)?;
        if pdu.prev_events.is_empty() && pdu.kind != TimelineEventType::RoomCreate {
            return Err(Refusal::malformed("prev_events", "empty"));
        }
        Ok(Self { pdu, form: Form::Graph(json) })
    }

    /// An event of a shared room. One with floats is none, as in other graphs, nor one that names more events than Matrix lets it: graph
    /// servers drop these, and what followed them here would be lost on them.
    fn linear(object: Object, version: RoomVersion) -> Result<Self, Refusal> {
        let event = event::Pdu::parse(object, REDACTION)?;
        event.json.values().try_for_each(check_numbers)?;
        let pdu = Pdu::of_linear(&event, version)?;
        for (field, named, limit) in [
            ("prev_events", pdu.prev_events.len(), MAX_PREV_EVENTS),
            ("auth_events", pdu.auth_events.len(), MAX_AUTH_EVENTS),
        ] {
            if named > limit {
                return Err(Refusal::malformed(field, format!("{named} events, at most {limit} may be named")));
            }
        }
        if pdu.prev_events.is_empty() && pdu.kind != TimelineEventType::RoomCreate {
            return Err(Refusal::malformed("prev_events", "empty"));
        }
        Ok(Self { pdu, form: Form::Linear(Box::new(event)) })
    }

    /// The servers that must have signed it.
    pub fn signers(&self) -> Result<BTreeSet<OwnedServerName>, Refusal> {
        let rules = rules_of(self.pdu.version)?;
        match &self.form {
            Form::Linear(event) => Ok(event.required_signers().into_iter().collect()),
            Form::Graph(json) => required_server_signatures_to_verify_event(json, &rules.signatures)
                .map_err(|error| Refusal::malformed("event", error.to_string())),
        }
    }

    /// Its `signatures`, as an object that holds nothing else.
    pub fn signatures(&self) -> Object {
        let signatures = match &self.form {
            Form::Linear(event) => event.json.get("signatures").cloned(),
            Form::Graph(json) => json.get("signatures").cloned().map(serde_json::Value::from),
        };
        signatures.into_iter().map(|value| ("signatures".to_owned(), value)).collect()
    }

    /// The fields, not proved.
    pub fn pdu(&self) -> &Pdu {
        &self.pdu
    }

    /// Checks the signatures and the content hash. When the hash is wrong, what is returned is the redacted copy.
    pub fn verify(self, keys: &VerifyKeys) -> Result<Verified, Refusal> {
        let intact = match &self.form {
            Form::Linear(event) => {
                event.verify_signatures(keys, REDACTION)?;
                event.check_hashes() == HashCheck::Intact
            }
            Form::Graph(json) => {
                let rules = rules_of(self.pdu.version)?;
                let checked =
                    verify_event(&public_keys(keys)?, json, rules).map_err(|error| Refusal::BadSignature {
                        entity: self.pdu.sender.server_name().to_string(),
                        problem: error.to_string(),
                    })?;
                checked == HashVerified::All
            }
        };
        if intact {
            return Ok(Verified { pdu: self.pdu, is_whole: true });
        }
        tracing::info!(room = %self.pdu.room_id, event = %self.pdu.event_id, "wrong content hash: kept redacted");
        Ok(Verified { pdu: self.pdu.redacted()?, is_whole: false })
    }
}

impl Unverified {
    /// The same as [`Unverified::verify`], with the signatures of all of `servers` demanded.
    pub fn verify_by(self, servers: &[OwnedServerName], keys: &VerifyKeys) -> Result<Verified, Refusal> {
        let json = match &self.form {
            Form::Graph(json) => json.clone(),
            Form::Linear(event) => {
                for server in servers {
                    event.verify_signature_of(server, keys, REDACTION)?;
                }
                return self.verify(keys);
            }
        };
        let rules = rules_of(self.pdu.version)?;
        let redacted =
            redact(json, &rules.redaction, None).map_err(|error| Refusal::malformed("event", error.to_string()))?;
        // ruma checks every entity that has signed: it is shown one at a time.
        let all = public_keys(keys)?;
        for server in servers {
            let bad = |problem: &str| Refusal::BadSignature { entity: server.to_string(), problem: problem.to_owned() };
            let signatures = redacted.get("signatures").and_then(|value| value.as_object());
            let signature = signatures.and_then(|all| all.get(server.as_str())).ok_or_else(|| bad("absent"))?;
            let keys = all.get(server.as_str()).ok_or_else(|| bad("no key is known"))?;
            let mut shown = redacted.clone();
            let signature = CanonicalJsonObject::from([(server.to_string(), signature.clone())]);
            shown.insert("signatures".to_owned(), signature.into());
            let keys = PublicKeyMap::from([(server.to_string(), keys.clone())]);
            verify_json(&keys, &shown).map_err(|error| bad(&error.to_string()))?;
        }
        self.verify(keys)
    }
}

impl Verified {
    /// An event that the gateway has made and signed itself.
    pub(super) fn own(json: &CanonicalJsonObject, version: RoomVersion) -> Result<Self, Refusal> {
        let rules = rules_of(version)?;
        check_pdu_format(json, &rules.event_format).map_err(|problem| Refusal::malformed("event", problem))?;
        let hash = reference_hash(json, rules).map_err(|error| Refusal::malformed("event", error.to_string()))?;
        Ok(Self { pdu: Pdu::read(json, &format!("${hash}"), version)?, is_whole: true })
    }

    /// An event of a shared room that the gateway has finished itself.
    pub(super) fn own_linear(event: &event::Pdu, version: RoomVersion) -> Result<Self, Refusal> {
        Ok(Self { pdu: Pdu::of_linear(event, version)?, is_whole: true })
    }

    /// What would be sent, without hashes and signatures: only to be judged.
    pub(super) fn of_template(template: &CanonicalJsonObject, version: RoomVersion) -> Result<Self, Refusal> {
        if !is_shared(version) {
            return Self::own(template, version);
        }
        let mut event = to_object(template)?;
        event.insert("hashes".to_owned(), serde_json::json!({ "sha256": "" }));
        event.insert("signatures".to_owned(), serde_json::json!({}));
        Self::own_linear(&event::Pdu::parse(event, REDACTION)?, version)
    }

    /// The fields.
    pub fn pdu(&self) -> &Pdu {
        &self.pdu
    }

    /// Whether its content is the one that was hashed, and not what redaction leaves of it.
    pub fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// The fields.
    pub fn into_pdu(self) -> Pdu {
        self.pdu
    }
}

impl Pdu {
    /// Reads the fields of an event that is stored here, whose ID is known.
    pub fn read_stored(raw: &str, event_id: &str, version: RoomVersion) -> Result<Self, Refusal> {
        let raw = RawValue::from_string(raw.to_owned()).map_err(|error| Refusal::NotJson(error.to_string()))?;
        Self::read_raw(raw, event_id, version)
    }

    /// The copy without what redaction takes away; its ID is the same.
    pub fn redacted(&self) -> Result<Self, Refusal> {
        if is_shared(self.version) {
            let redacted = Self::of_linear(&self.to_linear()?.redacted(REDACTION), self.version)?;
            return Ok(Self { depth: self.depth, ..redacted });
        }
        let rules = rules_of(self.version)?;
        let json: CanonicalJsonObject =
            serde_json::from_str(self.raw.get()).map_err(|error| Refusal::NotJson(error.to_string()))?;
        let redacted =
            redact(json, &rules.redaction, None).map_err(|error| Refusal::malformed("event", error.to_string()))?;
        Self::read(&redacted, self.event_id.as_str(), self.version)
    }

    /// The event as a JSON value.
    pub fn to_value(&self) -> serde_json::Value {
        serde_json::from_str(self.raw.get()).unwrap_or_default()
    }

    /// An event of a shared room, as the log takes it.
    pub fn to_linear(&self) -> Result<event::Pdu, Refusal> {
        event::Pdu::parse(parse_object(self.raw.get().as_bytes())?, REDACTION)
    }

    fn of_linear(event: &event::Pdu, version: RoomVersion) -> Result<Self, Refusal> {
        let text = String::from_utf8(event.to_bytes()).map_err(|error| Refusal::NotJson(error.to_string()))?;
        let raw = RawValue::from_string(text).map_err(|error| Refusal::NotJson(error.to_string()))?;
        Self::read_raw(raw, event.event_id.as_str(), version)
    }

    fn read(json: &CanonicalJsonObject, event_id: &str, version: RoomVersion) -> Result<Self, Refusal> {
        let raw = serde_json::value::to_raw_value(json).map_err(|error| Refusal::NotJson(error.to_string()))?;
        Self::read_raw(raw, event_id, version)
    }

    fn read_raw(raw: Box<RawValue>, event_id: &str, version: RoomVersion) -> Result<Self, Refusal> {
        let wire: Wire =
            serde_json::from_str(raw.get()).map_err(|error| Refusal::malformed("event", error.to_string()))?;
        if !wire.content.get().starts_with('{') {
            return Err(Refusal::malformed("content", "not an object"));
        }
        if wire.origin_server_ts < 0 {
            return Err(Refusal::malformed("origin_server_ts", wire.origin_server_ts.to_string()));
        }
        for id in wire.prev_events.iter().chain(&wire.auth_events) {
            check_event_id(id)?;
        }
        let event_id = event_id.try_into().map_err(|_| Refusal::malformed("event ID", event_id))?;
        let says_room_id = wire.room_id.is_some();
        let room_id = match wire.room_id {
            Some(room_id) => room_id,
            None => room_of_create(&event_id)?,
        };
        let depth = match wire.depth {
            Some(depth) if !is_shared(version) => depth,
            None if !is_shared(version) => return Err(Refusal::malformed("depth", "missing")),
            _ => 0,
        };
        let hub_server = wire.hub_server.filter(|_| is_shared(version));
        let hub_server = hub_server.and_then(|hub| OwnedServerName::try_from(hub.as_str()?).ok());
        let redacts = redacts(wire.redacts, &wire.kind, &wire.content, rules_of(version)?);
        let mut seen = BTreeSet::new();
        let prev_events = wire.prev_events.into_iter().filter(|id| seen.insert(id.clone())).collect();
        Ok(Self {
            version,
            event_id,
            room_id,
            says_room_id,
            sender: wire.sender,
            kind: wire.kind,
            state_key: wire.state_key,
            origin_server_ts: wire.origin_server_ts,
            depth,
            prev_events,
            auth_events: wire.auth_events,
            redacts,
            hub_server,
            content: wire.content,
            raw,
        })
    }
}

/// The same as an object that is not bound to Matrix's canonical JSON.
pub fn to_object(json: &CanonicalJsonObject) -> Result<Object, Refusal> {
    match serde_json::to_value(json) {
        Ok(serde_json::Value::Object(object)) => Ok(object),
        _ => Err(Refusal::Internal("canonical JSON that is no object".to_owned())),
    }
}

/// The room that a version 12 create event makes.
pub fn room_of_create(event_id: &OwnedEventId) -> Result<OwnedRoomId, Refusal> {
    let room_id = event_id.as_str().replacen('$', "!", 1);
    room_id.as_str().try_into().map_err(|_| Refusal::malformed("room ID", room_id))
}

/// The create event of a version 12 room; no event has the ID that an older room's ID would give.
pub fn create_of_room(room_id: &ruma::RoomId) -> Option<OwnedEventId> {
    let event_id: OwnedEventId = room_id.as_str().replacen('!', "$", 1).as_str().try_into().ok()?;
    check_event_id(&event_id).is_ok().then_some(event_id)
}

/// Event IDs of the versions that are supported are `$` and 43 characters of URL-safe base64.
fn check_event_id(id: &ruma::EventId) -> Result<(), Refusal> {
    parse_event_id("event ID", id.as_str()).and_then(|id| match id.as_str().len() {
        44 => Ok(()),
        _ => Err(Refusal::malformed("event ID", id.as_str())),
    })
}

fn redacts(
    top_level: Option<serde_json::Value>,
    kind: &TimelineEventType,
    content: &RawValue,
    rules: &RoomVersionRules,
) -> Option<OwnedEventId> {
    #[derive(Deserialize)]
    struct Content {
        redacts: Option<serde_json::Value>,
    }
    if *kind != TimelineEventType::RoomRedaction {
        return None;
    }
    let value = if rules.redaction.content_field_redacts {
        serde_json::from_str::<Content>(content.get()).ok()?.redacts
    } else {
        top_level
    };
    event_id(value?.as_str()?)
}

fn public_keys(keys: &VerifyKeys) -> Result<PublicKeyMap, Refusal> {
    let mut map = PublicKeyMap::new();
    for (server, keys) in keys {
        let mut set = PublicKeySet::new();
        for (id, key) in keys {
            let key = Base64::parse(key.to_base64()).map_err(|error| Refusal::malformed("key", error.to_string()))?;
            set.insert(id.clone(), key);
        }
        map.insert(server.to_string(), set);
    }
    Ok(map)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::event::VerifyKey;

    /// Events of a dual-stack Synapse, of all the kinds of servers that a shared room has.
    #[test]
    fn recorded_events_of_a_shared_room_are_read_and_verified() {
        let recorded = include_str!("../../tests/vectors/dual-stack-synapse-events.json");
        let recorded: Value = serde_json::from_str(recorded).unwrap();
        let version = RoomVersion::parse(recorded["room_version"].as_str().unwrap()).unwrap();
        let mut keys = VerifyKeys::new();
        for (server, of_server) in recorded["public_keys"].as_object().unwrap() {
            let of_server = of_server.as_object().unwrap().iter();
            let of_server =
                of_server.map(|(id, key)| (id.clone(), VerifyKey::from_base64(key.as_str().unwrap()).unwrap()));
            keys.insert(server.as_str().try_into().unwrap(), of_server.collect());
        }
        let mut finished = 0;
        for vector in recorded["events"].as_array().unwrap() {
            let object = vector["pdu"].as_object().unwrap().clone();
            let event = Unverified::from_object(object.clone(), version).unwrap();
            assert_eq!(event.pdu().event_id, vector["event_id"].as_str().unwrap());
            assert_eq!(id_as_received(&vector["pdu"].to_string(), version), Some(event.pdu().event_id.clone()));
            let signers = event.signers().unwrap();
            let by_hub = event.pdu().hub_server.is_some();
            assert_eq!(signers.len(), if by_hub { 2 } else { 1 });
            let verified = event.clone().verify(&keys).unwrap();
            let redacted = verified.pdu().redacted().unwrap();
            assert_eq!(redacted.to_linear().unwrap().event_id, verified.pdu().event_id);
            assert_eq!(redacted.to_value(), vector["redacted"]);
            let stored = Pdu::read_stored(verified.pdu().raw.get(), verified.pdu().event_id.as_str(), version).unwrap();
            assert_eq!((stored.depth, &stored.hub_server), (0, &verified.pdu().hub_server));
            finished += usize::from(by_hub);
            // Without the hub's signature, or the participant's, it is nothing.
            for server in signers {
                let mut unsigned = object.clone();
                unsigned["signatures"].as_object_mut().unwrap().remove(server.as_str());
                let unsigned = Unverified::from_object(unsigned, version).unwrap();
                assert!(matches!(unsigned.verify(&keys), Err(Refusal::BadSignature { .. })));
            }
        }
        assert!(finished >= 4);
    }

    /// Graph servers drop it, and would miss all that follows it.
    #[test]
    fn hc_18_an_event_of_a_shared_room_names_no_more_events_than_graph_servers_take() {
        let recorded = include_str!("../../tests/vectors/dual-stack-synapse-events.json");
        let recorded: Value = serde_json::from_str(recorded).unwrap();
        let version = RoomVersion::parse(recorded["room_version"].as_str().unwrap()).unwrap();
        let event = recorded["events"].as_array().unwrap().last().unwrap()["pdu"].as_object().unwrap();
        for (field, most) in [("prev_events", 20), ("auth_events", 10)] {
            for (count, fits) in [(most, true), (most + 1, false)] {
                let mut event = event.clone();
                let named: Vec<String> = (0..count).map(|n| format!("${n:a>43}")).collect();
                event.insert(field.to_owned(), named.into());
                let read = Unverified::from_object(event, version);
                assert_eq!(read.is_ok(), fits, "{count} {field}");
                assert!(fits || read.unwrap_err().to_string().contains(field));
            }
        }
    }
}
