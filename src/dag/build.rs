//! Building events of the gateway's own users: on the newest forward extremities, hashed and signed, and then put through
//! the same check as a foreign event.

use std::sync::Arc;

use ruma::canonical_json::try_from_json_map;
use ruma::events::TimelineEventType;
use ruma::serde::Base64;
use ruma::signatures::{KeyPair, Signature, hash_and_sign_event, sign_event};
use ruma::{AnyKeyName, CanonicalJsonObject, OwnedEventId, OwnedSigningKeyId, ServerName, UserId};
use serde_json::{Value, json};

use super::accept::Source;
use super::batch::Batch;
use super::pdu::{Pdu, REDACTION, Verified, to_object};
use super::room::Tip;
use super::snapshot::{Snapshot, StateKey};
use super::stored::Stored;
use super::version::{is_shared, rules_of};
use crate::event::{self, Links, Object, RoomVersion, VerifiedLpdu, parse_event_id};
use crate::identity::SigningKey;
use crate::refusal::Refusal;
use crate::seam::{Draft, Outgoing};

/// How many forward extremities an event is built on: as many as other servers take. On fewer than there are the state
/// before it could lack what it needs, as its sender's join. From more on an event joins the oldest of them, so that the next one
/// can be built on all.
pub(super) const MAX_PREV_EVENTS: usize = 20;
/// As how many of the gateway's users that is tried.
const JOINERS: usize = 3;
/// The type of that event, which other homeservers use for the same. It has no content, and clients do not show it.
pub(super) const DUMMY: &str = "org.matrix.dummy_event";
/// The largest integer of canonical JSON.
const MAX_DEPTH: i64 = (1 << 53) - 1;

/// The gateway's key, as ruma wants it.
struct Signer<'a> {
    key: &'a SigningKey,
    id: OwnedSigningKeyId<AnyKeyName>,
}

impl<'a> Signer<'a> {
    fn new(key: &'a SigningKey) -> Result<Self, Refusal> {
        let id = key.id().try_into().map_err(|_| Refusal::Internal(format!("key ID {}", key.id())))?;
        Ok(Self { key, id })
    }
}

impl KeyPair for Signer<'_> {
    fn sign(&self, message: &[u8]) -> Signature {
        let signature = Base64::<ruma::serde::base64::Standard>::parse(self.key.sign(message));
        Signature::new(self.id.clone(), signature.map(Base64::into_inner).unwrap_or_default())
    }
}

impl Batch {
    /// Builds, checks and takes in an event of the gateway. When it is refused nothing changes.
    pub async fn send(&mut self, outgoing: Outgoing) -> Result<Arc<Stored>, Refusal> {
        let before = self.savepoint();
        let built = self.build(&outgoing.draft).await;
        self.take_built(built, outgoing.effect, before).await
    }

    async fn take_built(
        &mut self,
        built: Result<Verified, Refusal>,
        effect: Option<crate::seam::EventEffect>,
        before: super::batch::Savepoint,
    ) -> Result<Arc<Stored>, Refusal> {
        let event = match built {
            Ok(event) => event,
            Err(refusal) => {
                self.roll_back(before);
                return Err(refusal);
            }
        };
        // It follows the newest events, so that it is new.
        self.absent.insert(event.pdu().event_id.clone());
        self.take_own(event, effect, before).await
    }

    /// Joins the oldest branches of the room where there are more than `most`, as one of the gateway's users who may.
    pub(super) async fn join_branches(&mut self, most: usize) {
        if self.core.tips.len() <= most || self.cannot_join_branches {
            return;
        }
        let own = self.shared.context.server_name.clone();
        let users = self.core.joined.iter().filter(|user| user.server_name() == own);
        let users: Vec<_> = users.take(JOINERS).cloned().collect();
        for sender in users {
            let before = self.savepoint();
            let draft = Draft {
                sender,
                kind: DUMMY.to_owned(),
                state_key: None,
                content: Object::new(),
                origin_server_ts: self.shared.context.clock.now_ms(),
            };
            let oldest: Vec<Tip> = self.core.tips.iter().take(MAX_PREV_EVENTS).cloned().collect();
            let built = self.build_on(&draft, oldest).await;
            match self.take_built(built, None, before).await {
                Ok(_) => return,
                Err(refusal) => {
                    tracing::info!(room = %self.room_id, %refusal, "the branches of a room were not joined")
                }
            }
        }
        self.cannot_join_branches = true;
    }

    /// Takes in an event that was built, and perhaps countersigned by somebody.
    pub(super) async fn take_own(
        &mut self,
        event: Verified,
        effect: Option<crate::seam::EventEffect>,
        before: super::batch::Savepoint,
    ) -> Result<Arc<Stored>, Refusal> {
        let outcome = self.accept(event, &Source::Own, None).await;
        match outcome.and_then(|outcome| outcome.accepted().cloned()) {
            Ok(event) => {
                if let Some(effect) = effect {
                    self.add_effect(event.pdu.event_id.clone(), effect);
                }
                Ok(event)
            }
            Err(refusal) => {
                self.roll_back(before);
                Err(refusal)
            }
        }
    }

    /// An event of the gateway, signed, built on the newest forward extremities.
    pub async fn build(&mut self, draft: &Draft) -> Result<Verified, Refusal> {
        self.build_on(draft, self.newest_tips()).await
    }

    /// What a participant of a shared room sends, finished as its hub and built on the newest forward extremities.
    pub async fn complete(&mut self, lpdu: VerifiedLpdu) -> Result<Verified, Refusal> {
        let tips = self.newest_tips();
        let before = self.state_after(&tips).await?;
        let content = lpdu.json.get("content").and_then(Value::as_object);
        let content = content.cloned().unwrap_or_default();
        let keys = self.auth_keys(&lpdu.kind, &lpdu.sender, lpdu.state_key.as_deref(), &content)?;
        let auth_events = self.auth_ids(&keys, &before).await?;
        let prev_events = tips.into_iter().map(|tip| tip.event_id).collect();
        let context = &self.shared.context;
        let links = Links { auth_events, prev_events, redaction: REDACTION };
        let event = event::Pdu::complete_among(lpdu, links, &context.server_name, &context.signing_key)?;
        Verified::own_linear(&event, self.version)
    }

    async fn build_on(&mut self, draft: &Draft, tips: Vec<Tip>) -> Result<Verified, Refusal> {
        let own = &self.shared.context.server_name;
        if draft.sender.server_name() != own {
            return Err(Refusal::Forbidden(format!("{} is not a user of {own}", draft.sender)));
        }
        let template = self.template_on(draft, tips).await?;
        let context = &self.shared.context;
        sign_canonical(template, self.version, context.server_name.as_str(), &context.signing_key)
    }

    /// The event without hashes and signatures; also what `make_join` and the like answer.
    pub async fn template(&mut self, draft: &Draft) -> Result<CanonicalJsonObject, Refusal> {
        self.template_on(draft, self.newest_tips()).await
    }

    fn newest_tips(&self) -> Vec<Tip> {
        let skip = self.core.tips.len().saturating_sub(MAX_PREV_EVENTS);
        self.core.tips.iter().skip(skip).cloned().collect()
    }

    async fn state_after(&mut self, tips: &[Tip]) -> Result<Snapshot, Refusal> {
        if tips.len() == self.core.tips.len() {
            return Ok(self.core.current.clone());
        }
        self.merge(tips.iter().map(|tip| tip.after.clone()).collect()).await
    }

    async fn template_on(&mut self, draft: &Draft, tips: Vec<Tip>) -> Result<CanonicalJsonObject, Refusal> {
        let before = self.state_after(&tips).await?;
        let depth = tips.iter().map(|tip| tip.depth).max().map_or(1, |depth| depth.saturating_add(1).min(MAX_DEPTH));
        let now = self.shared.context.clock.now_ms();
        let mut event = Object::new();
        let mut content = draft.content.clone();
        if draft.kind == "m.room.redaction"
            && !self.rules.redaction.content_field_redacts
            && let Some(redacts) = content.remove("redacts")
        {
            event.insert("redacts".to_owned(), redacts);
        }
        if draft.kind != "m.room.create" || self.rules.event_format.require_room_create_room_id {
            event.insert("room_id".to_owned(), json!(self.room_id));
        }
        if let Some(state_key) = &draft.state_key {
            event.insert("state_key".to_owned(), json!(state_key));
        }
        event.extend([
            ("type".to_owned(), json!(draft.kind)),
            ("sender".to_owned(), json!(draft.sender)),
            ("content".to_owned(), Value::Object(content)),
            ("origin_server_ts".to_owned(), json!(draft.origin_server_ts.clamp(0, now.max(0)))),
            ("prev_events".to_owned(), json!(tips.iter().map(|tip| &tip.event_id).collect::<Vec<_>>())),
        ]);
        if !is_shared(self.version) {
            event.insert("depth".to_owned(), json!(depth));
        }
        let keys = self.auth_keys(&draft.kind, &draft.sender, draft.state_key.as_deref(), &draft.content)?;
        let auth_events = self.auth_ids(&keys, &before).await?;
        event.insert("auth_events".to_owned(), json!(auth_events));
        try_from_json_map(event).map_err(|error| Refusal::malformed("event", error.to_string()))
    }

    /// The keys of the state that belongs into an event's `auth_events`.
    fn auth_keys(
        &self,
        kind: &str,
        sender: &UserId,
        state_key: Option<&str>,
        content: &Object,
    ) -> Result<Vec<StateKey>, Refusal> {
        let content = serde_json::value::to_raw_value(content)
            .map_err(|error| Refusal::malformed("content", error.to_string()))?;
        let (kind, rules) = (TimelineEventType::from(kind), &self.rules.authorization);
        let keys = ruma::state_res::auth_types_for_event(&kind, sender, state_key, &content, rules);
        Ok(keys.map_err(Refusal::MatrixRule)?.into_iter().map(|(kind, key)| (kind.to_string(), key)).collect())
    }

    /// Those of a state's events that belong into `auth_events`. Where the gateway lines a shared room up, without those that its log
    /// does not have, since participants know nothing else: that the state as a whole allows the event is looked at all the same.
    async fn auth_ids(&self, keys: &[StateKey], before: &Snapshot) -> Result<Vec<OwnedEventId>, Refusal> {
        let mut ids: Vec<_> = keys.iter().filter_map(|key| before.map.get(key).cloned()).collect();
        if !is_shared(self.version) || !self.is_hub() {
            return Ok(ids);
        }
        let known = self.shared.events.with_staged(&ids, &self.staged).await?;
        let mut left_out = Vec::new();
        for id in &ids {
            if !known.get(id).is_some_and(|event| event.is_accepted()) && !self.log_has(id).await? {
                left_out.push(id.clone());
            }
        }
        ids.retain(|id| !left_out.contains(id));
        Ok(ids)
    }

    /// Whether the event would be accepted as the next one; changes nothing.
    pub async fn would_accept(&mut self, draft: &Draft) -> Result<(), Refusal> {
        let before = self.savepoint();
        let event = self.build(draft).await;
        let result = match event {
            Ok(event) => self.accept(event, &Source::Own, None).await,
            Err(refusal) => Err(refusal),
        };
        self.roll_back(before);
        result?.accepted().map(drop)
    }
}

/// Hashes and signs an event of the gateway as it stands.
pub(super) fn sign(
    event: Object,
    version: RoomVersion,
    server_name: &str,
    key: &SigningKey,
) -> Result<Verified, Refusal> {
    let event = try_from_json_map(event).map_err(|error| Refusal::malformed("event", error.to_string()))?;
    sign_canonical(event, version, server_name, key)
}

fn sign_canonical(
    mut event: CanonicalJsonObject,
    version: RoomVersion,
    server_name: &str,
    key: &SigningKey,
) -> Result<Verified, Refusal> {
    if is_shared(version) {
        return sign_linear(to_object(&event)?, version, server_name, key);
    }
    hash_and_sign_event(server_name, &Signer::new(key)?, &mut event, &rules_of(version)?.redaction)
        .map_err(|error| Refusal::malformed("event", error.to_string()))?;
    Verified::own(&event, version)
}

fn sign_linear(
    mut event: Object,
    version: RoomVersion,
    server_name: &str,
    key: &SigningKey,
) -> Result<Verified, Refusal> {
    let mut take = |field: &str| -> Result<Vec<OwnedEventId>, Refusal> {
        let ids = event.remove(field).unwrap_or_default();
        let ids = ids.as_array().into_iter().flatten();
        ids.map(|id| parse_event_id(field, id.as_str().unwrap_or_default())).collect()
    };
    let links = Links { auth_events: take("auth_events")?, prev_events: take("prev_events")?, redaction: REDACTION };
    // What somebody else's template says of it means nothing here.
    event.remove("depth");
    let server = <&ServerName>::try_from(server_name).map_err(|error| Refusal::Internal(error.to_string()))?;
    Verified::own_linear(&event::Pdu::build_among(event, links, server, key)?, version)
}

/// Adds the gateway's signature to an event that another server has signed.
pub(super) fn countersign(pdu: &Pdu, server_name: &str, key: &SigningKey) -> Result<Value, Refusal> {
    if is_shared(pdu.version) {
        let mut event = pdu.to_linear()?;
        let server = <&ServerName>::try_from(server_name).map_err(|error| Refusal::Internal(error.to_string()))?;
        event.countersign_by(server, key, REDACTION);
        return Ok(Value::Object(event.json));
    }
    let mut json: CanonicalJsonObject =
        serde_json::from_str(pdu.raw.get()).map_err(|error| Refusal::NotJson(error.to_string()))?;
    let rules = rules_of(pdu.version)?;
    sign_event(server_name, &Signer::new(key)?, &mut json, &rules.redaction)
        .map_err(|error| Refusal::malformed("event", error.to_string()))?;
    serde_json::to_value(&json).map_err(|error| Refusal::Internal(error.to_string()))
}
