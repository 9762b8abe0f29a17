//! The PDUs of transactions: parsed, their signatures checked in parallel, and given to their rooms' tasks.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use futures::future::join_all;
use ruma::{OwnedEventId, OwnedServerName, RoomId, ServerName};
use serde_json::Value;

use super::accept::{Outcome, Source};
use super::batch::Batch;
use super::build::MAX_PREV_EVENTS;
use super::order::linearize;
use super::pdu::{Unverified, Verified, id_as_received};
use super::room::Room;
use super::whole::COPIES;
use super::{Dag, Shared};
use crate::event::{RoomVersion, VerifyKeys, parse_object};
use crate::guard::{fails_on, guarded, trip};
use crate::identity::Validity;
use crate::refusal::Refusal;
use crate::seam::{Raw, Received};

/// What became of each event: none when it is missing something.
pub(super) type Outcomes = HashMap<OwnedEventId, Result<Outcome, Refusal>>;

enum Intake {
    Done(Received),
    Event(Arc<Room>, OwnedEventId, Box<Unverified>),
}

impl Dag {
    /// The PDUs of a transaction that belong to graph rooms; answers in order, after all is committed.
    pub async fn receive(&self, origin: &ServerName, pdus: Vec<Raw>) -> Vec<Received> {
        let intake = join_all(pdus.iter().map(|raw| self.intake(origin, raw.get()))).await;
        let mut rooms: BTreeMap<_, (Arc<Room>, Vec<Unverified>)> = BTreeMap::new();
        let mut answers = Vec::new();
        for item in intake {
            match item {
                Intake::Done(received) => answers.push(received),
                Intake::Event(room, event_id, event) => {
                    answers.push(Received { event_id: Some(event_id), result: Ok(()) });
                    rooms.entry(room.room_id.clone()).or_insert_with(|| (room, Vec::new())).1.push(*event);
                }
            }
        }
        let results = join_all(rooms.into_values().map(|(room, events)| self.take(origin, room, events))).await;
        let mut results: HashMap<_, _> = results.into_iter().flatten().collect();
        for answer in &mut answers {
            if let Some(refusal) = answer.event_id.as_ref().and_then(|id| results.remove(id)) {
                answer.result = Err(refusal);
            }
        }
        answers
    }

    async fn intake(&self, origin: &ServerName, raw: &str) -> Intake {
        match guarded(&"an event", self.try_intake(origin, raw)).await {
            Ok(intake) => intake,
            Err(refusal) => {
                let event_id = id_as_received(raw, RoomVersion::V12);
                Intake::Done(Received { event_id, result: Err(verdict(refusal)) })
            }
        }
    }

    async fn try_intake(&self, origin: &ServerName, raw: &str) -> Result<Intake, Refusal> {
        let object = parse_object(raw.as_bytes())?;
        let dropped = || Intake::Done(Received { event_id: None, result: Ok(()) });
        let Some(room_id) = object.get("room_id").and_then(Value::as_str) else { return Ok(dropped()) };
        let room_id = <&RoomId>::try_from(room_id).map_err(|_| Refusal::malformed("room_id", room_id))?;
        let Some(room) = self.resident_soon(room_id).await? else {
            self.outside_event(origin, object).await?;
            return Ok(dropped());
        };
        if room.core().linear.contains(origin) {
            // It has nothing that could be asked for, and what it sends its hub finishes.
            let event_id = id_as_received(raw, room.version);
            let refusal = Refusal::Forbidden(format!("{origin} takes part in {room_id} by its hub, with LPDUs"));
            return Ok(Intake::Done(Received { event_id, result: Err(refusal) }));
        }
        let event = match Unverified::from_object(object, room.version) {
            Ok(event) => event,
            Err(refusal) => {
                let event_id = id_as_received(raw, room.version);
                return Ok(Intake::Done(Received { event_id, result: Err(refusal) }));
            }
        };
        let event_id = event.pdu().event_id.clone();
        if let Err(refusal) = self.shared.check_acl(&room, origin).await {
            return Ok(Intake::Done(Received { event_id: Some(event_id), result: Err(refusal) }));
        }
        Ok(Intake::Event(room, event_id, Box::new(event)))
    }

    /// A room in which the gateway has somebody, perhaps once the join is done that is under way.
    async fn resident_soon(&self, room_id: &RoomId) -> Result<Option<Arc<Room>>, Refusal> {
        let own = &self.shared.context.server_name;
        let resident = |room: &Arc<Room>| room.core().has_server(own);
        if let Some(room) = self.shared.find(room_id).await?.filter(resident) {
            return Ok(Some(room));
        }
        if !self.shared.wait_for_join(room_id).await? {
            return Ok(None);
        }
        Ok(self.shared.find(room_id).await?.filter(resident))
    }

    /// Takes events of one room; gives the refusals.
    async fn take(
        &self,
        origin: &ServerName,
        room: Arc<Room>,
        events: Vec<Unverified>,
    ) -> Vec<(OwnedEventId, Refusal)> {
        let ids: Vec<_> = events.iter().map(|event| event.pdu().event_id.clone()).collect();
        let result = self.try_take(origin, room, events).await;
        let refusals = match result {
            Ok(refusals) => refusals,
            Err(refusal) => ids.into_iter().map(|id| (id, refusal.clone())).collect(),
        };
        refusals.into_iter().map(|(id, refusal)| (id, verdict(refusal))).collect()
    }

    async fn try_take(
        &self,
        origin: &ServerName,
        room: Arc<Room>,
        events: Vec<Unverified>,
    ) -> Result<Vec<(OwnedEventId, Refusal)>, Refusal> {
        let mut refusals = Vec::new();
        let verified = self.shared.verify_new(&room.room_id, events, &mut refusals).await?;
        let verified = self.shared.make_whole(origin, verified, std::iter::empty(), &mut { COPIES }).await;
        let outcomes = self.shared.accept_all(&room, origin, verified).await?;
        for (event_id, outcome) in outcomes {
            // What was soft-failed is kept and not carried further; its sender is not told.
            let refusal = match outcome {
                Ok(Outcome::Known(event)) if event.status != super::stored::Status::Rejected => continue,
                Ok(outcome) => outcome.accepted().map(drop),
                Err(refusal) => Err(refusal),
            };
            if let Err(refusal) = refusal {
                refusals.push((event_id, refusal));
            }
        }
        Ok(refusals)
    }
}

/// What the sender is told. What the store lost of a room is no reason to repeat a transaction for ever, with what it brings
/// for other rooms: what is refused now can be fetched when somebody has repaired the store.
fn verdict(refusal: Refusal) -> Refusal {
    match refusal {
        Refusal::Corrupt(what) => fails_on(&format!("the stored {what}")),
        refusal => refusal,
    }
}

impl Shared {
    /// Checks the signatures of those events that are not known yet, in parallel. What was refused, and what is known to be
    /// rejected, goes to `refusals`.
    pub(super) async fn verify_new(
        self: &Arc<Self>,
        room_id: &RoomId,
        events: Vec<Unverified>,
        refusals: &mut Vec<(OwnedEventId, Refusal)>,
    ) -> Result<Vec<Verified>, Refusal> {
        let ids: Vec<_> = events.iter().map(|event| event.pdu().event_id.clone()).collect();
        let known = self.events.get_many(&ids).await?;
        let mut tasks = Vec::new();
        for event in events {
            let event_id = event.pdu().event_id.clone();
            if event.pdu().room_id != room_id {
                let problem = format!("{}, expected {room_id}", event.pdu().room_id);
                refusals.push((event_id, Refusal::malformed("room_id", problem)));
            } else if let Some(known) = known.get(&event_id).filter(|known| known.groups.is_some()) {
                if known.status == super::stored::Status::Rejected {
                    let reason = known.reason.clone().unwrap_or_default();
                    refusals.push((event_id, Refusal::MatrixRule(reason)));
                }
            } else {
                let shared = self.clone();
                tasks.push((event_id, tokio::spawn(async move { shared.verify(event).await })));
            }
        }
        let mut verified = Vec::new();
        for (event_id, task) in tasks {
            match task.await.unwrap_or_else(|_| Err(fails_on(&event_id))) {
                Ok(event) => verified.push(event),
                Err(refusal) => refusals.push((event_id, refusal)),
            }
        }
        Ok(verified)
    }

    /// Checks one event's signatures, with keys that were valid when it says it was made.
    pub(super) async fn verify(&self, event: Unverified) -> Result<Verified, Refusal> {
        trip("verify", &event.pdu().kind);
        let signers: Vec<OwnedServerName> = event.signers()?.into_iter().collect();
        let ts = event.pdu().origin_server_ts;
        let (keyring, signatures) = (&self.context.keyring, event.signatures());
        let keys = keyring.keys_for_event(&signatures, &signers, Validity::At(ts)).await?;
        let is_right = |keys: &VerifyKeys| event.clone().verify(keys).is_ok();
        let late = keyring.out_of_time(&signatures, ts, &keys, is_right).await;
        late.map_or_else(|| event.verify(&keys), Err)
    }

    /// Takes verified events of one room in their order, without fetching anything.
    pub(super) async fn accept_batch(
        self: &Arc<Self>,
        room: &Arc<Room>,
        events: Vec<Verified>,
        source: Source,
    ) -> Result<Outcomes, Refusal> {
        let events =
            linearize(events, Verified::pdu, |pdu| pdu.prev_events.iter().chain(&pdu.auth_events).cloned().collect());
        if !self.careful.is(&room.room_id) && events.len() > 1 {
            let accepted = self.run(room, move |batch| Box::pin(accept_each(batch, events, source))).await;
            // One of them was new, and it is not known which.
            return accepted.map_err(|refusal| match refusal {
                Refusal::Fails(_) => self.careful.panicked(&room.room_id, &[]),
                refusal => refusal,
            });
        }
        let mut outcomes = Outcomes::new();
        for event in events {
            let (event_id, source) = (event.pdu().event_id.clone(), source.clone());
            match self.run(room, move |batch| Box::pin(accept_each(batch, vec![event], source))).await {
                Ok(outcome) => outcomes.extend(outcome),
                Err(refusal @ Refusal::Fails(_)) => drop(outcomes.insert(event_id, Err(refusal))),
                Err(refusal) => return Err(refusal),
            }
        }
        Ok(outcomes)
    }
}

async fn accept_each(batch: &mut Batch, events: Vec<Verified>, source: Source) -> Result<Outcomes, Refusal> {
    let mut outcomes = Outcomes::new();
    batch.look_up(&events.iter().map(|event| event.pdu().event_id.clone()).collect::<Vec<_>>()).await?;
    for event in events {
        let event_id = event.pdu().event_id.clone();
        let before = batch.savepoint();
        let accepting = async {
            let outcome = batch.accept(event, &source, None).await?;
            let most = match &source {
                // A server that joins is sent nothing of what came between the join's template and the join. An event that follows
                // all branches has it ask for that here, before others name it, who may have joined too late to know.
                Source::Handshake(origin) if batch.core.has_server(origin) => 1,
                _ => MAX_PREV_EVENTS,
            };
            batch.join_branches(most).await;
            Ok(outcome)
        };
        let outcome = guarded(&event_id, accepting).await;
        if outcome.is_err() {
            batch.roll_back(before);
        }
        outcomes.insert(event_id, outcome);
    }
    Ok(outcomes)
}
