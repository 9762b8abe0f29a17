//! Finished events as they come from a hub: their form, their signatures and their hashes.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::{StreamExt as _, stream};
use ruma::{OwnedEventId, OwnedServerName, RoomId, ServerName};
use serde_json::Value;
use tokio::time::Instant;

use super::Lm;
use super::peers::prev_events;
use super::redactions::is_copy;
use crate::event::{HashCheck, Object, Pdu, Redaction, VerifyKeys, event_id, reference_hash, verify_signatures};
use crate::guard::{guarded, guarded_now, trip};
use crate::identity::Validity;
use crate::refusal::Refusal;
use crate::store::lm as stored;

/// How many servers are asked for their keys at once: those that sign what a page of a log has, so that none of them waits for another.
const KEYS_AT_ONCE: usize = 100;
/// How long others wait for the keys of servers: whoever brings their events, and the room.
pub(super) const SOON: Duration = Duration::from_secs(2);
/// By which tables a hub may redact.
const TABLES: [Redaction; 2] = [Redaction::Draft, Redaction::GraphServer];

/// An event whose required signatures are right.
pub(super) struct Finished {
    /// The event; its redacted copy when a hash is wrong.
    pub pdu: Pdu,
    /// The table of redaction with which its signatures are right.
    pub redaction: Redaction,
    /// Which hash is wrong.
    pub redacted: Option<Refusal>,
    /// Whether it came redacted, as it is served when a redaction was accepted, or where not all may read it.
    pub copy: bool,
}

/// Why an event is not taken.
pub(super) enum Bad {
    /// Its room cannot be told, or something failed here.
    Dropped(Refusal),
    /// Its form is wrong; it is known by its ID all the same, and so is what is before it.
    Malformed { event_id: OwnedEventId, prev_events: Vec<OwnedEventId>, refusal: Refusal },
    /// Its keys cannot be had now: nothing is proved either way.
    Unproved(Box<Pdu>, Refusal),
    /// A signature is missing or wrong, or by a key that was not valid when the event was made.
    Forged(Box<Pdu>, Refusal),
}

impl Bad {
    pub fn refusal(&self) -> &Refusal {
        match self {
            Self::Dropped(refusal)
            | Self::Malformed { refusal, .. }
            | Self::Unproved(_, refusal)
            | Self::Forged(_, refusal) => refusal,
        }
    }

    pub fn event_id(&self) -> Option<&OwnedEventId> {
        match self {
            Self::Dropped(_) => None,
            Self::Malformed { event_id, .. } => Some(event_id),
            Self::Unproved(pdu, _) | Self::Forged(pdu, _) => Some(&pdu.event_id),
        }
    }
}

impl Lm {
    /// Checks events; `redaction` is the table that the room's hub is thought to use, the other one is tried too. What keys do not
    /// come soon is not waited for: others wait meanwhile, and the events can.
    pub(super) async fn check_finished(
        &self,
        objects: Vec<Object>,
        redaction: Redaction,
    ) -> Vec<Result<Finished, Bad>> {
        self.check_within(Some(SOON), objects, redaction).await
    }

    /// The same, where others have waited before and do not wait for so long any more.
    pub(super) async fn check_finished_within(
        &self,
        patience: Duration,
        objects: Vec<Object>,
        redaction: Redaction,
    ) -> Vec<Result<Finished, Bad>> {
        self.check_within(Some(patience), objects, redaction).await
    }

    /// The same of events that nobody brings again: all keys are waited for.
    pub(super) async fn check_finished_patiently(
        &self,
        objects: Vec<Object>,
        redaction: Redaction,
    ) -> Vec<Result<Finished, Bad>> {
        self.check_within(None, objects, redaction).await
    }

    async fn check_within(
        &self,
        patience: Option<Duration>,
        objects: Vec<Object>,
        redaction: Redaction,
    ) -> Vec<Result<Finished, Bad>> {
        let until = patience.map(|patience| Instant::now() + patience);
        let parsed: Vec<Result<Pdu, Bad>> = objects.into_iter().map(|object| parse(object, redaction)).collect();
        self.fetch_keys(parsed.iter().flatten(), until).await;
        let mut with_keys = Vec::with_capacity(parsed.len());
        for pdu in parsed {
            with_keys.push(match pdu {
                Ok(pdu) => match guarded(&pdu.event_id, self.keys_of(&pdu, until)).await {
                    Ok(keys) => Ok((pdu, keys)),
                    Err(refusal @ Refusal::KeysUnavailable { .. }) => Err(Bad::Unproved(Box::new(pdu), refusal)),
                    Err(refusal) if refusal.is_failure() => Err(Bad::Dropped(refusal)),
                    Err(refusal) => Err(Bad::Forged(Box::new(pdu), refusal)),
                },
                Err(bad) => Err(bad),
            });
        }
        let verified = verify_together(&with_keys, redaction);
        with_keys
            .into_iter()
            .zip(verified)
            .map(|(event, verified)| {
                let (pdu, keys) = event?;
                let id = pdu.event_id.clone();
                let finished = guarded_now(&id, || {
                    Ok(match verified {
                        Ok(()) => Ok(finish(pdu, redaction)),
                        Err(refusal @ Refusal::Fails(_)) => Err(Bad::Dropped(refusal)),
                        Err(refusal) => try_other(pdu, &keys, other(redaction), refusal),
                    })
                });
                finished.unwrap_or_else(|refusal| Err(Bad::Dropped(refusal)))
            })
            .collect()
    }

    /// Asks for the keys that events of a room wait for, while nobody waits for the room.
    pub(super) async fn ask_for_keys(&self, room_id: &RoomId) -> Result<(), Refusal> {
        let mut waiting = stored::holes(&self.context().store, room_id, false).await?;
        waiting.extend(stored::holes(&self.context().store, room_id, true).await?);
        let events = waiting.iter().filter_map(|hole| serde_json::from_slice(hole.json.as_deref()?).ok());
        let parsed: Vec<Pdu> = events.filter_map(|event| parse(event, Redaction::Draft).ok()).collect();
        self.fetch_keys(parsed.iter(), None).await;
        Ok(())
    }

    /// Gets the keys that events name into the key ring, of all servers at once and each until then: one that does not answer, or is asked
    /// anew for a key that it has not told yet, holds up no other.
    async fn fetch_keys<'a>(&self, pdus: impl Iterator<Item = &'a Pdu>, until: Option<Instant>) {
        let mut signed: BTreeMap<OwnedServerName, Vec<&Pdu>> = BTreeMap::new();
        for pdu in pdus {
            for server in pdu.required_signers() {
                signed.entry(server).or_default().push(pdu);
            }
        }
        let fetched = stream::iter(signed).for_each_concurrent(KEYS_AT_ONCE, |(server, pdus)| async move {
            let keyring = &self.context().keyring;
            let asked = async {
                for pdu in pdus {
                    let validity = Validity::InLog(pdu.origin_server_ts);
                    keyring.keys_for_event(&pdu.json, std::slice::from_ref(&server), validity).await?;
                }
                Ok::<_, Refusal>(())
            };
            if let Err(refusal) | Ok(Err(refusal)) = self.in_time(&server, until, asked).await {
                tracing::debug!(%server, %refusal, "no keys");
            }
        });
        fetched.await;
    }

    /// Waits for something of a server's keys until then; not at all where others have waited for long enough.
    async fn in_time<T>(
        &self,
        server: &ServerName,
        until: Option<Instant>,
        asked: impl Future<Output = T>,
    ) -> Result<T, Refusal> {
        let Some(until) = until else { return Ok(asked.await) };
        let until = if self.context().keyring.is_silent(server, SOON) { Instant::now() } else { until };
        let late = |_| {
            let problem = "it has been asked, and has not answered yet".to_owned();
            Refusal::KeysUnavailable { server: server.to_string(), problem }
        };
        tokio::time::timeout_at(until, asked).await.map_err(late)
    }

    async fn keys_of(&self, pdu: &Pdu, until: Option<Instant>) -> Result<VerifyKeys, Refusal> {
        let signers = pdu.required_signers();
        let keyring = &self.context().keyring;
        // Whatever is in the hub's log stands there.
        let validity = Validity::InLog(pdu.origin_server_ts);
        let mut keys = VerifyKeys::new();
        for signer in &signers {
            let asked = keyring.keys_for_event(&pdu.json, std::slice::from_ref(signer), validity);
            keys.extend(self.in_time(signer, until, asked).await??);
            keyring.knows_better_than(&pdu.json, signer, keys.get(signer)).await?;
        }
        let is_right =
            |keys: &VerifyKeys| TABLES.iter().any(|redaction| pdu.verify_signatures(keys, *redaction).is_ok());
        let late = keyring.out_of_time(&pdu.json, pdu.origin_server_ts, &keys, is_right).await;
        late.map_or(Ok(keys), Err)
    }
}

fn parse(object: Object, redaction: Redaction) -> Result<Pdu, Bad> {
    let known_by = || {
        // Its ID does not cover its signatures: it may come again with right ones.
        let signatures = object.get("signatures").and_then(Value::as_object)?;
        let is_form = |keys: &Value| keys.as_object().is_some_and(|keys| keys.values().all(Value::is_string));
        signatures.values().all(is_form).then_some(())?;
        let event_id = event_id(&format!("${}", reference_hash(&object, redaction)))?;
        let prev_events = prev_events(&object);
        (!prev_events.is_empty()).then_some((event_id, prev_events))
    };
    let known_by = guarded_now(&"an event", || Ok(known_by())).ok().flatten();
    guarded_now(&"an event", || Pdu::parse(object, redaction)).map_err(|refusal| match known_by {
        Some((event_id, prev_events)) if !refusal.is_failure() => Bad::Malformed { event_id, prev_events, refusal },
        _ => Bad::Dropped(refusal),
    })
}

/// Checks all signatures of all events at once; the answers are in the order of `events`.
fn verify_together(events: &[Result<(Pdu, VerifyKeys), Bad>], redaction: Redaction) -> Vec<Result<(), Refusal>> {
    let mut answers = Vec::with_capacity(events.len());
    let (mut checks, mut owners) = (Vec::new(), Vec::new());
    for (index, event) in events.iter().enumerate() {
        let own = match event {
            Ok((pdu, keys)) => guarded_now(&pdu.event_id, || {
                trip("verify", &pdu.kind);
                pdu.signature_checks(keys, redaction)
            }),
            Err(bad) => Err(bad.refusal().clone()),
        };
        answers.push(own.map(|own| {
            owners.extend(own.iter().map(|_| index));
            checks.extend(own);
        }));
    }
    for (owner, checked) in owners.into_iter().zip(verify_signatures(&checks)) {
        if let (Some(answer @ Ok(())), Err(refusal)) = (answers.get_mut(owner), checked) {
            *answer = Err(refusal);
        }
    }
    answers
}

fn try_other(pdu: Pdu, keys: &VerifyKeys, redaction: Redaction, refusal: Refusal) -> Result<Finished, Bad> {
    // The ID depends on the table too.
    match Pdu::parse(pdu.json.clone(), redaction) {
        Ok(as_other) if as_other.verify_signatures(keys, redaction).is_ok() => Ok(finish(as_other, redaction)),
        _ => Err(Bad::Forged(Box::new(pdu), refusal)),
    }
}

fn finish(pdu: Pdu, redaction: Redaction) -> Finished {
    match pdu.check_hashes() {
        HashCheck::Intact => Finished { pdu, redaction, redacted: None, copy: false },
        HashCheck::Redact(why) => {
            let copy = is_copy(&pdu.json, redaction);
            Finished { pdu: pdu.redacted(redaction), redaction, redacted: Some(why), copy }
        }
    }
}

fn other(redaction: Redaction) -> Redaction {
    match redaction {
        Redaction::Draft => Redaction::GraphServer,
        Redaction::GraphServer => Redaction::Draft,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn hc_19_an_event_of_a_wrong_form_is_known_by_its_id_and_by_what_is_before_it() {
        let event = json!({
            "type": "x".repeat(300), "room_id": "!r:hub.example", "sender": "@a:hub.example", "content": {},
            "origin_server_ts": 1, "auth_events": [], "prev_events": ["$before"], "hashes": { "sha256": "x" },
            "signatures": { "hub.example": { "ed25519:1": "x" } },
        });
        let parsed = |event: &Value| parse(event.as_object().unwrap().clone(), Redaction::Draft);
        let Err(Bad::Malformed { event_id, prev_events, .. }) = parsed(&event) else { panic!("taken, or not known") };
        assert_eq!(prev_events, ["$before"]);
        assert_eq!(event_id.as_str()[1..], reference_hash(event.as_object().unwrap(), Redaction::Draft));
        // Its ID does not cover its signatures: it may come again with right ones.
        let mut unsigned = event;
        unsigned["signatures"] = json!({ "hub.example": 1 });
        assert!(matches!(parsed(&unsigned), Err(Bad::Dropped(_))));
    }
}
