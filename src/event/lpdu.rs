//! LPDUs: what a participant sends to the hub, and what of it is proved.
//! Source: draft-ralston-mimi-linearized-matrix-04, section "Linearized PDU" (`int-lpdu`).

use ruma::{OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId, ServerName};
use serde_json::{Value, json};

use super::canonical::canonical_len;
use super::form::{Common, MAX_EVENT, check_numbers, integers, sha256, strip, wrong};
use super::hash::{event_id_of, lpdu_hash, lpdu_signing_bytes};
use super::sign::{add_signature, known_signatures};
use super::{Object, Redaction, SignatureCheck, VerifyKeys, verify_each};
use crate::identity::SigningKey;
use crate::refusal::Refusal;

/// An LPDU whose form is right and of which nothing else is proved.
#[derive(Debug, Clone)]
pub struct Lpdu {
    /// The LPDU's own reference hash with `$`: how it is known before the hub has finished it.
    pub lpdu_id: OwnedEventId,
    /// The room.
    pub room_id: OwnedRoomId,
    /// The sender.
    pub sender: OwnedUserId,
    /// The hub that it is meant for.
    pub hub_server: OwnedServerName,
    /// The event type.
    pub kind: String,
    /// The state key of a state event.
    pub state_key: Option<String>,
    /// When the sender made it, in milliseconds since the epoch.
    pub origin_server_ts: i64,
    /// The whole object.
    pub json: Object,
}

/// An LPDU whose hash and signature are right.
#[derive(Debug, Clone)]
pub struct VerifiedLpdu(pub(super) Lpdu);

impl Lpdu {
    /// Checks the form of `json` as an LPDU: required fields, their types and lengths, none of the fields that a
    /// participant must not set, `hashes` exactly `{lpdu: {sha256}}`, no floats and no integer beyond ±(2^53−1).
    /// `unsigned` and `event_id` are stripped.
    pub fn parse(mut json: Object) -> Result<Self, Refusal> {
        strip(&mut json);
        integers(&mut json);
        for field in ["auth_events", "prev_events"] {
            if json.contains_key(field) {
                return Err(Refusal::malformed(field, "present in an LPDU, where only the hub may set it"));
            }
        }
        let common = Common::read(&json)?;
        let hub_server = common.hub_server.ok_or_else(|| wrong(&json, "hub_server", "the hub's name in an LPDU"))?;
        check_lpdu_hashes(&json)?;
        json.values().try_for_each(check_numbers)?;
        let size = canonical_len(&json);
        if size > MAX_EVENT {
            return Err(Refusal::TooLarge { what: "the LPDU", size, limit: MAX_EVENT });
        }
        Ok(Self {
            lpdu_id: lpdu_id(&json)?,
            room_id: common.room_id,
            sender: common.sender,
            hub_server,
            kind: common.kind,
            state_key: common.state_key,
            origin_server_ts: common.origin_server_ts,
            json,
        })
    }

    /// Makes, hashes and signs an LPDU from a template with `type`, `room_id`, `sender`, `content`,
    /// `origin_server_ts` and perhaps `state_key`; `hub_server`, hash and signature are added here.
    pub fn build(template: Object, hub: &ServerName, entity: &ServerName, key: &SigningKey) -> Result<Self, Refusal> {
        Self::build_as(template, hub, Redaction::Draft, entity, key)
    }

    /// The same in a room whose hub uses this table of redaction.
    pub fn build_as(
        mut template: Object,
        hub: &ServerName,
        redaction: Redaction,
        entity: &ServerName,
        key: &SigningKey,
    ) -> Result<Self, Refusal> {
        template.insert("hub_server".to_owned(), Value::String(hub.to_string()));
        template.remove("signatures");
        let hash = lpdu_hash(&template);
        template.insert("hashes".to_owned(), json!({ "lpdu": { "sha256": hash } }));
        let signature = key.sign(&lpdu_signing_bytes(&template, redaction));
        add_signature(&mut template, entity.as_str(), key.id(), signature);
        Self::parse(template)
    }

    /// The signatures that must be checked: at least one by the sender's server, with a key known in `keys`.
    pub fn signature_checks<'a>(&'a self, keys: &'a VerifyKeys) -> Result<Vec<SignatureCheck<'a>>, Refusal> {
        self.signature_checks_as(keys, Redaction::Draft)
    }

    fn signature_checks_as<'a>(
        &'a self,
        keys: &'a VerifyKeys,
        redaction: Redaction,
    ) -> Result<Vec<SignatureCheck<'a>>, Refusal> {
        let server = self.sender.server_name();
        static NONE: std::collections::BTreeMap<String, super::VerifyKey> = std::collections::BTreeMap::new();
        let known = known_signatures(&self.json, server.as_str(), keys.get(server).unwrap_or(&NONE))?;
        let message = lpdu_signing_bytes(&self.json, redaction);
        let check =
            |(key, signature)| SignatureCheck { server: server.as_str(), key, message: message.clone(), signature };
        Ok(known.into_iter().map(check).collect())
    }

    /// Checks the hash and the sender's server's signature. Of `signatures` no more is left than what was checked: the LPDU's
    /// hash covers none of it, and what the hub passes on unseen could make a participant refuse that knows other keys.
    pub fn verify(self, keys: &VerifyKeys) -> Result<VerifiedLpdu, Refusal> {
        self.verify_as(keys, Redaction::Draft)
    }

    /// The same in a room whose hub uses this table of redaction.
    pub fn verify_as(mut self, keys: &VerifyKeys, redaction: Redaction) -> Result<VerifiedLpdu, Refusal> {
        self.check_hash()?;
        let checked: Result<(), Refusal> =
            verify_each(&self.signature_checks_as(keys, redaction)?).into_iter().collect();
        checked.map_err(|refusal| self.signed_otherwise(keys, redaction).unwrap_or(refusal))?;
        self.keep_checked(keys);
        Ok(VerifiedLpdu(self))
    }

    /// Whoever signs by the draft's table where graph servers share the room is told so.
    fn signed_otherwise(&self, keys: &VerifyKeys, redaction: Redaction) -> Option<Refusal> {
        if redaction == Redaction::Draft {
            return None;
        }
        let checks = self.signature_checks_as(keys, Redaction::Draft).ok()?;
        if !verify_each(&checks).into_iter().all(|answer| answer.is_ok()) {
            return None;
        }
        let problem = "verifies by the draft's redaction alone: this room is shared with graph servers and signed by room version \
                       11's, which keeps more (of a redaction content.redacts)";
        Some(Refusal::BadSignature { entity: self.sender.server_name().to_string(), problem: problem.to_owned() })
    }

    fn keep_checked(&mut self, keys: &VerifyKeys) {
        let server = self.sender.server_name();
        let Some(all) = self.json.get_mut("signatures").and_then(Value::as_object_mut) else { return };
        all.retain(|signer, _| signer == server.as_str());
        if let Some((of_server, known)) =
            all.get_mut(server.as_str()).and_then(Value::as_object_mut).zip(keys.get(server))
        {
            of_server.retain(|key_id, _| known.contains_key(key_id));
        }
    }

    /// The same for many; answers in order. Not in one batch: [`verify_each`] says why.
    pub fn verify_all(lpdus: Vec<Self>, keys: &VerifyKeys) -> Vec<Result<VerifiedLpdu, Refusal>> {
        lpdus.into_iter().map(|lpdu| lpdu.verify(keys)).collect()
    }

    fn check_hash(&self) -> Result<(), Refusal> {
        let expected = lpdu_hash(&self.json);
        let found = sha256(self.json.get("hashes").and_then(|hashes| hashes.get("lpdu"))).unwrap_or_default();
        if found == expected {
            return Ok(());
        }
        Err(Refusal::HashMismatch { which: "lpdu", expected, found: found.chars().take(60).collect() })
    }
}

impl VerifiedLpdu {
    /// The LPDU, of which everything but the hub's own rules is proved.
    pub fn into_inner(self) -> Lpdu {
        self.0
    }
}

impl std::ops::Deref for VerifiedLpdu {
    type Target = Lpdu;

    fn deref(&self) -> &Lpdu {
        &self.0
    }
}

/// The reference hash of the LPDU that is inside an event.
pub(super) fn lpdu_id(json: &Object) -> Result<OwnedEventId, Refusal> {
    // Both tables of redaction keep the same of an LPDU's hash, which covers everything: the draft's is enough.
    let id = event_id_of(&lpdu_signing_bytes(json, Redaction::Draft));
    id.try_into().map_err(|error| Refusal::Internal(format!("an event ID that is none: {error}")))
}

fn check_lpdu_hashes(json: &Object) -> Result<(), Refusal> {
    let hashes = json.get("hashes").and_then(Value::as_object);
    let lpdu = hashes.and_then(|hashes| hashes.get("lpdu")).and_then(Value::as_object);
    let exact = hashes.is_some_and(|hashes| hashes.len() == 1)
        && lpdu.is_some_and(|lpdu| lpdu.len() == 1 && lpdu.get("sha256").is_some_and(Value::is_string));
    if exact { Ok(()) } else { Err(wrong(json, "hashes", "exactly {\"lpdu\": {\"sha256\": …}} in an LPDU")) }
}
