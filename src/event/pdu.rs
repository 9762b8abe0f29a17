//! Finished events of an LM room, made by a hub.
//! Source: draft-ralston-mimi-linearized-matrix-04, sections "Events" (`int-pdu`) and "Receiving Events/PDUs"
//! (`int-receiving-events`).

use ruma::{OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId, ServerName};
use serde_json::{Value, json};

use super::canonical::canonical_len;
use super::form::{Common, MAX_EVENT, check_numbers, event_ids, integers, sha256, strip, wrong};
use super::hash::{content_hash, event_id_of, lpdu_hash, lpdu_signing_bytes, signing_bytes};
use super::lpdu::lpdu_id;
use super::sign::{add_signature, bad_signature, known_signatures};
use super::{Object, Redaction, SignatureCheck, VerifiedLpdu, VerifyKeys, canonical_json, redact, verify_signatures};
use crate::identity::SigningKey;
use crate::refusal::Refusal;

/// How many auth or previous events a received event may name; the draft's selection has 5, graph servers send up to 20.
const MAX_REFERENCES: usize = 50;

/// A finished event of an LM room whose form is right. Immutable: the event ID is computed once.
#[derive(Debug, Clone)]
pub struct Pdu {
    /// `$` and the reference hash.
    pub event_id: OwnedEventId,
    /// The reference hash of the LPDU inside it, when it has one (`hub_server` present).
    pub lpdu_id: Option<OwnedEventId>,
    /// The room.
    pub room_id: OwnedRoomId,
    /// The sender.
    pub sender: OwnedUserId,
    /// The event type.
    pub kind: String,
    /// The state key of a state event.
    pub state_key: Option<String>,
    /// When the sender made it, in milliseconds since the epoch.
    pub origin_server_ts: i64,
    /// The hub that finished it, for events of participants.
    pub hub_server: Option<OwnedServerName>,
    /// What allows it.
    pub auth_events: Vec<OwnedEventId>,
    /// What precedes it.
    pub prev_events: Vec<OwnedEventId>,
    /// The whole object, as it goes over the wire.
    pub json: Object,
}

/// What a hub adds to an event.
#[derive(Debug, Clone)]
pub struct Completion {
    /// The events that allow it, in the order of the draft's selection.
    pub auth_events: Vec<OwnedEventId>,
    /// The event before it in the log; none for `m.room.create`.
    pub prev_event: Option<OwnedEventId>,
}

impl Completion {
    fn into_links(self) -> Links {
        let prev_events = self.prev_event.into_iter().collect();
        Links { auth_events: self.auth_events, prev_events, redaction: Redaction::Draft }
    }
}

/// The same in a shared room, where an event follows the last ones of a graph.
#[derive(Debug, Clone)]
pub struct Links {
    /// The events that allow it.
    pub auth_events: Vec<OwnedEventId>,
    /// The events before it.
    pub prev_events: Vec<OwnedEventId>,
    /// The table of redaction that the room's servers use.
    pub redaction: Redaction,
}

/// Whether the hashes of a received event are right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HashCheck {
    /// Both are.
    Intact,
    /// One is wrong: only the redacted copy may be kept.
    Redact(Refusal),
}

impl Pdu {
    /// Checks the form of `json` as a finished event of an LM room and computes its ID. Floats are allowed: a participant
    /// must take what its hub sends. `unsigned` and `event_id` are stripped.
    pub fn parse(mut json: Object, redaction: Redaction) -> Result<Self, Refusal> {
        strip(&mut json);
        integers(&mut json);
        let common = Common::read(&json)?;
        check_hashes_form(&json, common.hub_server.is_some())?;
        let auth_events = event_ids(&json, "auth_events", MAX_REFERENCES)?;
        let prev_events = event_ids(&json, "prev_events", MAX_REFERENCES)?;
        let size = canonical_len(&json);
        if size > MAX_EVENT {
            return Err(Refusal::TooLarge { what: "the event", size, limit: MAX_EVENT });
        }
        let lpdu_id = common.hub_server.is_some().then(|| lpdu_id(&json)).transpose()?;
        let event_id = own_id(&signing_bytes(&json, redaction))?;
        Ok(assemble(common, json, (event_id, lpdu_id), auth_events, prev_events))
    }

    /// Finishes a participant's LPDU as its hub: adds `auth_events`, `prev_events`, the content hash and the hub's
    /// signature. Refuses what would pass 65,536 bytes.
    pub fn complete(
        lpdu: VerifiedLpdu,
        completion: Completion,
        hub: &ServerName,
        key: &SigningKey,
    ) -> Result<Self, Refusal> {
        Self::complete_among(lpdu, completion.into_links(), hub, key)
    }

    /// The same in a shared room.
    pub fn complete_among(
        lpdu: VerifiedLpdu,
        links: Links,
        hub: &ServerName,
        key: &SigningKey,
    ) -> Result<Self, Refusal> {
        let lpdu = lpdu.into_inner();
        if lpdu.hub_server != hub {
            return Err(Refusal::WrongHub { hub: hub.to_string(), found: lpdu.hub_server.to_string() });
        }
        let common = Common {
            room_id: lpdu.room_id,
            sender: lpdu.sender,
            kind: lpdu.kind,
            state_key: lpdu.state_key,
            origin_server_ts: lpdu.origin_server_ts,
            hub_server: Some(lpdu.hub_server),
        };
        finish(common, lpdu.json, Some(lpdu.lpdu_id), links, hub, key)
    }

    /// Makes an event of one of the hub's own users from a template with `type`, `room_id`, `sender`, `content`,
    /// `origin_server_ts` and perhaps `state_key`: no `hub_server` and no LPDU hash.
    pub fn build(
        template: Object,
        completion: Completion,
        hub: &ServerName,
        key: &SigningKey,
    ) -> Result<Self, Refusal> {
        Self::build_among(template, completion.into_links(), hub, key)
    }

    /// The same in a shared room, for a user of any server that takes part in its graph.
    pub fn build_among(
        mut template: Object,
        links: Links,
        server: &ServerName,
        key: &SigningKey,
    ) -> Result<Self, Refusal> {
        for field in ["hub_server", "hashes", "unsigned", "event_id"] {
            template.remove(field);
        }
        template.insert("signatures".to_owned(), Value::Object(Object::new()));
        template.values().try_for_each(check_numbers)?;
        let common = Common::read(&template)?;
        finish(common, template, None, links, server, key)
    }

    /// Adds the signature of an invited server over the redacted event.
    pub fn countersign(&mut self, entity: &ServerName, key: &SigningKey) {
        self.countersign_by(entity, key, Redaction::Draft);
    }

    /// The same in a shared room, where graph servers check it.
    pub fn countersign_by(&mut self, entity: &ServerName, key: &SigningKey, redaction: Redaction) {
        let signature = key.sign(&signing_bytes(&self.json, redaction));
        add_signature(&mut self.json, entity.as_str(), key.id(), signature);
    }

    /// The server to which this event hands the log over, when it is of the form of one that does: an `m.room.hub` of the
    /// hub's own, which names a server. Whether it was allowed to is for the rules.
    pub fn new_hub(&self) -> Option<&ServerName> {
        let is_hub_event = self.kind == "m.room.hub" && self.state_key.as_deref() == Some("");
        let named = self.content().get("hub_server").filter(|_| is_hub_event && self.hub_server.is_none())?;
        named.as_str()?.try_into().ok()
    }

    /// The servers whose signatures must be there: the sender's, the hub's when `hub_server` is present, and that of a server
    /// that is to be the hub from here on.
    pub fn required_signers(&self) -> Vec<OwnedServerName> {
        let sender = self.sender.server_name().to_owned();
        match self.hub_server.as_deref().or(self.new_hub()) {
            Some(hub) if *hub != sender => vec![sender, hub.to_owned()],
            _ => vec![sender],
        }
    }

    /// Checks the required signatures: the hub's over the redacted event, the sender's over the redacted LPDU (or over the
    /// redacted event when there is no `hub_server`).
    pub fn verify_signatures(&self, keys: &VerifyKeys, redaction: Redaction) -> Result<(), Refusal> {
        verify_signatures(&self.signature_checks(keys, redaction)?).into_iter().collect()
    }

    /// Checks the signature of a server over the redacted event, of one that was invited too.
    pub fn verify_signature_of(
        &self,
        server: &ServerName,
        keys: &VerifyKeys,
        redaction: Redaction,
    ) -> Result<(), Refusal> {
        if self.hub_server.is_some() && *server == *self.sender.server_name() {
            // That one has signed the LPDU inside.
            return self.verify_signatures(keys, redaction);
        }
        let missing = || bad_signature(server.as_str(), "no key is known");
        let message = signing_bytes(&self.json, redaction);
        for (key, signature) in known_signatures(&self.json, server.as_str(), keys.get(server).ok_or_else(missing)?)? {
            key.verify(&message, signature).map_err(|problem| bad_signature(server.as_str(), problem))?;
        }
        Ok(())
    }

    /// The signatures that must be checked, for checking those of many events at once.
    pub fn signature_checks<'a>(
        &'a self,
        keys: &'a VerifyKeys,
        redaction: Redaction,
    ) -> Result<Vec<SignatureCheck<'a>>, Refusal> {
        static NONE: std::collections::BTreeMap<String, super::VerifyKey> = std::collections::BTreeMap::new();
        let sender = self.sender.server_name();
        let mut needed: Vec<(&ServerName, Vec<u8>)> = Vec::with_capacity(2);
        match &self.hub_server {
            Some(hub) => {
                needed.push((sender, lpdu_signing_bytes(&self.json, redaction)));
                needed.push((hub, signing_bytes(&self.json, redaction)));
            }
            None => {
                let bytes = signing_bytes(&self.json, redaction);
                // Nobody is made the hub who has not agreed to it by a signature.
                needed.extend(self.new_hub().filter(|hub| *hub != sender).map(|hub| (hub, bytes.clone())));
                needed.push((sender, bytes));
            }
        }
        let mut checks = Vec::with_capacity(needed.len());
        for (server, message) in needed {
            let known = known_signatures(&self.json, server.as_str(), keys.get(server).unwrap_or(&NONE))?;
            checks.extend(known.into_iter().map(|(key, signature)| SignatureCheck {
                server: server.as_str(),
                key,
                message: message.clone(),
                signature,
            }));
        }
        Ok(checks)
    }

    /// Compares both hashes with the event.
    pub fn check_hashes(&self) -> HashCheck {
        let hashes = self.json.get("hashes");
        let lpdu = self.hub_server.as_ref().map(|_| {
            let found = sha256(hashes.and_then(|hashes| hashes.get("lpdu")));
            ("lpdu", lpdu_hash(&self.json), found)
        });
        let content = ("content", content_hash(&self.json), sha256(hashes));
        for (which, expected, found) in lpdu.into_iter().chain([content]) {
            let found = found.unwrap_or_default();
            if found != expected {
                let found = found.chars().take(60).collect();
                return HashCheck::Redact(Refusal::HashMismatch { which, expected, found });
            }
        }
        HashCheck::Intact
    }

    /// The redacted copy; its event ID is the same.
    pub fn redacted(&self, redaction: Redaction) -> Self {
        Self { json: redact(&self.json, redaction), ..self.clone() }
    }

    /// What this redacts, when it is a redaction. The draft has no word on where it says so; both places are in use.
    pub fn redacts(&self) -> Option<OwnedEventId> {
        if self.kind != "m.room.redaction" || self.state_key.is_some() {
            return None;
        }
        let named = self.content().get("redacts").or_else(|| self.json.get("redacts"))?;
        super::event_id(named.as_str()?)
    }

    /// `content`.
    pub fn content(&self) -> &Object {
        static EMPTY: std::sync::LazyLock<Object> = std::sync::LazyLock::new(Object::new);
        self.json.get("content").and_then(Value::as_object).unwrap_or(&EMPTY)
    }

    /// The event as bytes, as they go over the wire.
    pub fn to_bytes(&self) -> Vec<u8> {
        canonical_json(&self.json)
    }
}

fn finish(
    common: Common,
    mut json: Object,
    lpdu_id: Option<OwnedEventId>,
    links: Links,
    hub: &ServerName,
    key: &SigningKey,
) -> Result<Pdu, Refusal> {
    let Links { auth_events, prev_events, redaction } = links;
    json.insert("auth_events".to_owned(), json!(auth_events));
    json.insert("prev_events".to_owned(), json!(prev_events));
    let hash = content_hash(&json);
    let hashes = json.entry("hashes").or_insert_with(|| Value::Object(Object::new()));
    if let Some(hashes) = hashes.as_object_mut() {
        hashes.insert("sha256".to_owned(), Value::String(hash));
    }
    // What the hub signs is what the reference hash covers.
    let bytes = signing_bytes(&json, redaction);
    add_signature(&mut json, hub.as_str(), key.id(), key.sign(&bytes));
    let size = canonical_len(&json);
    if size > MAX_EVENT {
        return Err(Refusal::TooLarge { what: "the event with the hub's fields", size, limit: MAX_EVENT });
    }
    let event_id = own_id(&bytes)?;
    Ok(assemble(common, json, (event_id, lpdu_id), auth_events, prev_events))
}

fn assemble(
    common: Common,
    json: Object,
    (event_id, lpdu_id): (OwnedEventId, Option<OwnedEventId>),
    auth_events: Vec<OwnedEventId>,
    prev_events: Vec<OwnedEventId>,
) -> Pdu {
    let Common { room_id, sender, kind, state_key, origin_server_ts, hub_server } = common;
    Pdu {
        event_id,
        lpdu_id,
        room_id,
        sender,
        kind,
        state_key,
        origin_server_ts,
        hub_server,
        auth_events,
        prev_events,
        json,
    }
}

fn own_id(signing_bytes: &[u8]) -> Result<OwnedEventId, Refusal> {
    let id = event_id_of(signing_bytes);
    id.try_into().map_err(|error| Refusal::Internal(format!("an event ID that is none: {error}")))
}

/// A participant's event has the LPDU's hash, every other event must not.
fn check_hashes_form(json: &Object, from_participant: bool) -> Result<(), Refusal> {
    let hashes = json.get("hashes");
    if sha256(hashes).is_none() {
        return Err(wrong(json, "hashes", "an object with sha256"));
    }
    let lpdu = hashes.and_then(|hashes| hashes.get("lpdu"));
    match (lpdu, from_participant) {
        (None, false) => Ok(()),
        (Some(_), true) if sha256(lpdu).is_some() => Ok(()),
        (_, true) => Err(Refusal::malformed("hashes.lpdu", "missing or without sha256, though hub_server is present")),
        (Some(_), false) => Err(Refusal::malformed("hashes.lpdu", "present, though hub_server is not")),
    }
}
