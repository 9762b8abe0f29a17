//! Finished events as they come from a hub: their form, their signatures and their hashes.

use std::collections::BTreeSet;

use futures::{StreamExt as _, stream};
use ruma::{OwnedEventId, OwnedServerName};

use super::Lm;
use crate::event::{HashCheck, Object, Pdu, Redaction, VerifyKeys, verify_signatures};
use crate::guard::{guarded, guarded_now, trip};
use crate::refusal::Refusal;

/// How many servers are asked for their keys at once.
const KEYS_AT_ONCE: usize = 16;

/// An event whose required signatures are right.
pub(super) struct Finished {
    /// The event; its redacted copy when a hash is wrong.
    pub pdu: Pdu,
    /// The table of redaction with which its signatures are right.
    pub redaction: Redaction,
    /// Which hash is wrong.
    pub redacted: Option<Refusal>,
}

/// Why an event is not taken.
pub(super) enum Bad {
    /// Its form is wrong, or something failed here.
    Dropped(Refusal),
    /// Its keys cannot be had now: nothing is proved either way.
    Unproved(Box<Pdu>, Refusal),
    /// A signature is missing or wrong.
    Forged(Box<Pdu>, Refusal),
}

impl Bad {
    pub fn refusal(&self) -> &Refusal {
        match self {
            Self::Dropped(refusal) | Self::Unproved(_, refusal) | Self::Forged(_, refusal) => refusal,
        }
    }

    pub fn event_id(&self) -> Option<&OwnedEventId> {
        match self {
            Self::Dropped(_) => None,
            Self::Unproved(pdu, _) | Self::Forged(pdu, _) => Some(&pdu.event_id),
        }
    }
}

impl Lm {
    /// Checks events; `redaction` is the table that the room's hub is thought to use, the other one is tried too.
    pub(super) async fn check_finished(
        &self,
        objects: Vec<Object>,
        redaction: Redaction,
    ) -> Vec<Result<Finished, Bad>> {
        let parsed: Vec<Result<Pdu, Refusal>> =
            objects.into_iter().map(|object| guarded_now(&"an event", || Pdu::parse(object, redaction))).collect();
        self.fetch_keys(parsed.iter().flatten()).await;
        let mut with_keys = Vec::with_capacity(parsed.len());
        for pdu in parsed {
            with_keys.push(match pdu {
                Ok(pdu) => match guarded(&pdu.event_id, self.keys_of(&pdu)).await {
                    Ok(keys) => Ok((pdu, keys)),
                    Err(refusal @ Refusal::KeysUnavailable { .. }) => Err(Bad::Unproved(Box::new(pdu), refusal)),
                    Err(refusal) if refusal.is_failure() => Err(Bad::Dropped(refusal)),
                    Err(refusal) => Err(Bad::Forged(Box::new(pdu), refusal)),
                },
                Err(refusal) => Err(Bad::Dropped(refusal)),
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

    /// Gets the keys that will be needed into the key ring, many servers at once.
    async fn fetch_keys<'a>(&self, pdus: impl Iterator<Item = &'a Pdu>) {
        let servers: BTreeSet<OwnedServerName> = pdus.flat_map(Pdu::required_signers).collect();
        let keyring = &self.context().keyring;
        let fetched = stream::iter(servers).for_each_concurrent(KEYS_AT_ONCE, |server| async move {
            if let Err(error) = keyring.server_keys(&server).await {
                tracing::debug!(%server, %error, "no keys");
            }
        });
        fetched.await;
    }

    async fn keys_of(&self, pdu: &Pdu) -> Result<VerifyKeys, Refusal> {
        let signers = pdu.required_signers();
        let keyring = &self.context().keyring;
        let keys = keyring.keys_for_event(&pdu.json, &signers, pdu.origin_server_ts).await?;
        for signer in signers {
            keyring.knows_better_than(&signer, keys.get(&signer)).await?;
        }
        Ok(keys)
    }
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
        HashCheck::Intact => Finished { pdu, redaction, redacted: None },
        HashCheck::Redact(why) => Finished { pdu: pdu.redacted(redaction), redaction, redacted: Some(why) },
    }
}

fn other(redaction: Redaction) -> Redaction {
    match redaction {
        Redaction::Draft => Redaction::GraphServer,
        Redaction::GraphServer => Redaction::Draft,
    }
}
