//! The hub's part: rooms that the gateway makes, what its own users send there, and the LPDUs of participants.

use std::collections::BTreeMap;
use std::num::NonZero;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use rand::RngCore as _;
use ruma::{OwnedEventId, OwnedRoomId, RoomId, ServerName, UserId};
use serde_json::{Value, json};

use super::actor::{Outcome, What};
use super::batch::{Batch, Origin};
use super::names;
use super::room::{Facts, Snapshot, Subject};
use super::rooms::{RoomCell, lock};
use super::{Appended, Lm, NewRoom, Role, Sent, whereabouts};
use crate::event::{
    Lpdu, Object, Redaction, VerifiedLpdu, VerifyKeys, event_id, parse_leniently, parse_object, reference_hash,
};
use crate::guard::{guarded, guarded_now, trip};
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::seam::{Draft, Handshake, Membership, Outgoing, Raw, Received, Stage};
use crate::store::lm as stored;

/// How often, and how long after one another, it is looked whether a new hub is known that is committed already.
const SEEN_LATE: usize = 100;
const SOON: Duration = Duration::from_millis(20);
/// From how many events on their signatures are checked by several threads.
const SPREAD: usize = 16;

impl Lm {
    /// Creates a room with the gateway as its hub.
    pub async fn create_room(&self, room: NewRoom) -> Result<OwnedRoomId, Refusal> {
        let context = self.context();
        let room_id = new_room_id(&context.server_name)?;
        let facts =
            Facts { room_id: room_id.clone(), version: room.version, hub: context.server_name.clone(), shared: false };
        let mut batch = Batch::of_new_room(Snapshot::empty(facts, Redaction::Draft));
        let now = context.clock.now_ms();
        let first = |kind: &str, state_key: &str, content: Value| Draft {
            sender: room.creator.clone(),
            kind: kind.to_owned(),
            state_key: Some(state_key.to_owned()),
            content: content.as_object().cloned().unwrap_or_default(),
            origin_server_ts: now,
        };
        // What is said of these two comes first, where they belong.
        let is_join =
            |draft: &Draft| draft.kind == "m.room.member" && draft.state_key.as_deref() == Some(room.creator.as_str());
        let given = |is_it: &dyn Fn(&Draft) -> bool| room.initial_state.iter().find(|draft| is_it(draft));
        let mut create = first("m.room.create", "", json!({}));
        create.content.extend(
            given(&|draft| draft.kind == "m.room.create").map(|draft| draft.content.clone()).unwrap_or_default(),
        );
        create.content.insert("room_version".to_owned(), json!(room.version.as_str()));
        let join = first("m.room.member", room.creator.as_str(), json!({ "membership": "join" }));
        let join = given(&is_join).cloned().unwrap_or(join);
        let rest = room.initial_state.iter().filter(|draft| draft.kind != "m.room.create" && !is_join(draft));
        for draft in [create, join].into_iter().chain(rest.cloned()) {
            let pdu = self.build(&batch.after, &draft)?;
            batch.push(pdu, Origin::default());
        }
        batch.commit(self, None).await?;
        tracing::info!(room = %room_id, "created a room");
        Ok(room_id)
    }

    /// Sends events of the gateway's users into a room, in order. As hub they are appended when this returns, as
    /// participant they are signed and queued, in one transaction with their effects. Each fails alone, with its effect.
    /// What is sent here does not go into the bridge's inbox (an echo from a hub does).
    pub async fn send(&self, room_id: &RoomId, events: Vec<Outgoing>) -> Vec<Result<Sent, Refusal>> {
        let (cell, snapshot) = match self.find_to_speak(room_id).await {
            Ok(found) => found,
            Err(refusal) => return events.iter().map(|_| Err(Refusal::clone(&refusal))).collect(),
        };
        match self.role(&snapshot) {
            Role::Hub | Role::GraphServer { .. } => self.send_as_hub(&cell, events).await,
            Role::Participant { hub } => {
                let again = events.clone();
                let sent = self.send_as_participant(&cell, snapshot, events).await;
                self.send_to_new_hub(&cell, &hub, again, sent).await
            }
        }
    }

    /// A room into which one of our users says something, when what they said there before has gone first. Where that cannot be yet, it
    /// waits in the queue for the hub, and what is queued after it waits behind it.
    pub(super) async fn find_to_speak(&self, room_id: &RoomId) -> Result<(Arc<RoomCell>, Arc<Snapshot>), Refusal> {
        let (cell, snapshot) = self.find(room_id).await?;
        if lock(&cell.ahead).has_misdirected() {
            self.seek_hub(&cell, None, whereabouts::EVERY);
        }
        if !cell.has_stranded() {
            return Ok((cell, snapshot));
        }
        self.replace_stranded(&cell).await?;
        let snapshot = cell.snapshot(&self.context().store).await?;
        Ok((cell, snapshot))
    }

    /// What could not be queued for a hub, because another server took the log over in that moment, goes there.
    async fn send_to_new_hub(
        &self,
        cell: &Arc<RoomCell>,
        hub: &ServerName,
        events: Vec<Outgoing>,
        mut sent: Vec<Result<Sent, Refusal>>,
    ) -> Vec<Result<Sent, Refusal>> {
        if !sent.iter().any(|sent| matches!(sent, Err(Refusal::Internal(_)))) {
            return sent;
        }
        let mut has_changed = false;
        for _ in 0..SEEN_LATE {
            has_changed = cell.snapshot(&self.context().store).await.is_ok_and(|room| room.facts.hub != *hub);
            let is_committed = stored::room(&self.context().store, &cell.room_id).await;
            if has_changed || !is_committed.is_ok_and(|room| room.is_some_and(|room| room.hub != *hub)) {
                break;
            }
            // It is committed, and will be seen in a moment.
            tokio::time::sleep(SOON).await;
        }
        if !has_changed {
            return sent;
        }
        let failed = events.into_iter().enumerate();
        let (places, events): (Vec<usize>, Vec<Outgoing>) =
            failed.filter(|(place, _)| matches!(sent.get(*place), Some(Err(Refusal::Internal(_))))).unzip();
        for (place, result) in places.into_iter().zip(Box::pin(self.send(&cell.room_id, events)).await) {
            if let Some(sent) = sent.get_mut(place) {
                *sent = result;
            }
        }
        sent
    }

    /// Appends them; what comes too late for that, because another server keeps the log now, is queued for it.
    pub(super) async fn send_as_hub(&self, cell: &Arc<RoomCell>, events: Vec<Outgoing>) -> Vec<Result<Sent, Refusal>> {
        let own = |event: Outgoing| (What::Own(event.draft), Origin { effect: event.effect, ..Origin::default() });
        let outcomes = self.append_and_tell(cell, events.into_iter().map(own).collect()).await;
        let (mut results, mut places, mut late) = (Vec::with_capacity(outcomes.len()), Vec::new(), Vec::new());
        for outcome in outcomes {
            if let Outcome::NotHub(draft, effect) = outcome {
                places.push(results.len());
                late.push(Outgoing { draft: *draft, effect });
                results.push(Err(Refusal::Internal("another server keeps the log".to_owned())));
            } else {
                results.push(outcome.into_result().map(Sent::Appended));
            }
        }
        if late.is_empty() {
            return results;
        }
        match cell.snapshot(&self.context().store).await {
            Ok(room) if self.role(&room) != Role::Hub => {
                let sent = self.send_as_participant(cell, room, late).await;
                for (place, sent) in places.into_iter().zip(sent) {
                    if let Some(result) = results.get_mut(place) {
                        *result = sent;
                    }
                }
            }
            _ => {}
        }
        results
    }

    /// The PDUs of a transaction that belong to LM rooms; answers in order, after all is committed.
    pub async fn receive(&self, origin: &ServerName, pdus: Vec<Raw>) -> Vec<Received> {
        let mut answers: Vec<Received> = Vec::with_capacity(pdus.len());
        let mut by_room: BTreeMap<OwnedRoomId, Vec<(usize, Object)>> = BTreeMap::new();
        for raw in &pdus {
            let place = answers.len();
            let mut parsed = guarded_now(&"an event", || parse(raw));
            if parsed.is_err()
                && let Ok((room_id, object)) = guarded_now(&"an event", || of_a_log(raw))
                && self.follows(&room_id, origin).await
            {
                parsed = Ok((room_id, object));
            }
            answers.push(received(None, parsed.as_ref().map(drop).map_err(Clone::clone)));
            if let Ok((room_id, object)) = parsed {
                by_room.entry(room_id).or_default().push((place, object));
            }
        }
        let rooms = by_room.into_iter().map(|(room_id, events)| async move {
            let (places, objects): (Vec<usize>, Vec<Object>) = events.into_iter().unzip();
            (places, self.receive_in_room(origin, &room_id, objects).await)
        });
        for (places, results) in join_all(rooms).await {
            for (place, result) in places.into_iter().zip(results) {
                set(&mut answers, place, result);
            }
        }
        for (raw, answer) in pdus.iter().zip(&mut answers) {
            let Err(refusal) = &answer.result else { continue };
            // What could not be read as an event still has an ID by which its sender knows it.
            let event_id = answer.event_id.take().or_else(|| id_as_received(raw));
            tracing::info!(%origin, event = event_id.as_ref().map(tracing::field::display), %refusal, "refused an event");
            answer.event_id = event_id;
        }
        answers
    }

    /// Whether a room's log is kept by `origin` and followed here. What it holds is a fact there, however it is written.
    async fn follows(&self, room_id: &RoomId, origin: &ServerName) -> bool {
        let Ok((_, room)) = self.find(room_id).await else { return false };
        room.facts.hub == origin && matches!(self.role(&room), Role::Participant { .. })
    }

    /// Takes events of one room; answers in order.
    pub(super) async fn receive_in_room(
        &self,
        origin: &ServerName,
        room_id: &RoomId,
        objects: Vec<Object>,
    ) -> Vec<Received> {
        let all = |result: Result<(), Refusal>| objects.iter().map(|_| received(None, result.clone())).collect();
        let (cell, snapshot) = match self.find(room_id).await {
            Ok(found) => found,
            // Events of rooms that the gateway is not in are dropped, but not those of a room that is being joined: nothing of
            // it is stored yet, so they are to be sent again (INV-6).
            Err(Refusal::UnknownRoom(_)) => {
                let count = objects.len();
                let result = match self.joining().keep(origin, room_id, &objects) {
                    true => Err(Refusal::Internal(format!("{room_id} is being joined"))),
                    false => self.outside_events(origin, room_id, objects).await,
                };
                return (0..count).map(|_| received(None, result.clone())).collect();
            }
            Err(refusal) => return all(Err(refusal)),
        };
        if self.between().invited_into(room_id) == Some(Side::Lm)
            && let Err(refusal) = self.outside_events(origin, room_id, objects.clone()).await
        {
            return all(Err(refusal));
        }
        match self.role(&snapshot) {
            Role::Hub if snapshot.was_handed_over() => self.take_finished(origin, &cell, objects).await,
            Role::Hub => self.receive_lpdus(origin, &cell, &snapshot.facts, objects).await,
            Role::Participant { .. } => self.take_finished(origin, &cell, objects).await,
            // What is meant for the hub; finished events are the graph's.
            Role::GraphServer { hub } => {
                let found = self.context().server_name.to_string();
                all(Err(Refusal::WrongHub { hub: hub.to_string(), found }))
            }
        }
    }

    /// What a participant sends into a room that is hubbed here. Everything that can be checked before an event's place
    /// is known is checked here, for many events at once; the rest by the room's task.
    pub(super) async fn receive_lpdus(
        &self,
        origin: &ServerName,
        cell: &Arc<RoomCell>,
        facts: &Facts,
        objects: Vec<Object>,
    ) -> Vec<Received> {
        let mut results: Vec<Received> = Vec::with_capacity(objects.len());
        let mut parsed = Vec::with_capacity(objects.len());
        let admitted = self.admits(facts, origin).await;
        for object in objects {
            let lpdu = match guarded_now(&"an LPDU", || Lpdu::parse(object)) {
                Ok(lpdu) => lpdu,
                Err(refusal) => {
                    results.push(received(None, Err(refusal)));
                    continue;
                }
            };
            let admitted = if is_own_leave(&lpdu) { Ok(()) } else { admitted.clone() };
            let for_us = self.is_for_us(origin, facts, &lpdu).and(admitted);
            let is_for_us = for_us.is_ok();
            results.push(received(Some(lpdu.lpdu_id.clone()), for_us));
            if is_for_us {
                parsed.push((results.len().saturating_sub(1), lpdu));
            }
        }
        let mut waiting = Vec::new();
        for (place, verified) in self.verify(origin, facts, parsed).await {
            let passed = match verified {
                Ok(lpdu) if let Some(membership) = gated(&lpdu) => {
                    // What comes before it in the transaction may decide whether it is allowed.
                    self.flush(cell, &mut waiting, &mut results).await;
                    guarded(&lpdu.lpdu_id, self.pass_gate(cell, &lpdu, membership)).await.map(|()| lpdu)
                }
                other => other,
            };
            match passed {
                Ok(lpdu) => waiting.push((place, lpdu)),
                Err(refusal) => set_result(&mut results, place, Err(refusal)),
            }
        }
        self.flush(cell, &mut waiting, &mut results).await;
        results
    }

    async fn flush(&self, cell: &Arc<RoomCell>, waiting: &mut Vec<(usize, VerifiedLpdu)>, results: &mut [Received]) {
        if waiting.is_empty() {
            return;
        }
        let (places, lpdus): (Vec<_>, Vec<_>) = waiting.drain(..).unzip();
        let foreign = |lpdu| (What::Lpdu(lpdu), Origin { foreign: true, ..Origin::default() });
        let appended = self.append_and_tell(cell, lpdus.into_iter().map(foreign).collect()).await;
        for (place, outcome) in places.into_iter().zip(appended) {
            set_result(results, place, outcome.into_result().map(drop));
        }
    }

    /// Whether an LPDU comes from its sender's server and is meant for this hub. Our own users are no exception: only this
    /// gateway speaks for them, and it does not do so over federation.
    pub(super) fn is_for_us(&self, origin: &ServerName, facts: &Facts, lpdu: &Lpdu) -> Result<(), Refusal> {
        let own = &self.context().server_name;
        let sent_by = lpdu.sender.server_name();
        if sent_by != origin || sent_by == own {
            return Err(Refusal::WrongOrigin { origin: origin.to_string(), expected: sent_by.to_string() });
        }
        if lpdu.hub_server != facts.hub {
            return Err(Refusal::WrongHub { hub: facts.hub.to_string(), found: lpdu.hub_server.to_string() });
        }
        if lpdu.room_id != facts.room_id {
            return Err(Refusal::malformed("room_id", format!("{}, not {}", lpdu.room_id, facts.room_id)));
        }
        names::check(lpdu)
    }

    /// Checks hashes and signatures, together those that are signed with the same keys.
    async fn verify(
        &self,
        origin: &ServerName,
        facts: &Facts,
        lpdus: Vec<(usize, Lpdu)>,
    ) -> Vec<(usize, Result<VerifiedLpdu, Refusal>)> {
        let mut results = Vec::with_capacity(lpdus.len());
        let mut groups: Vec<(VerifyKeys, Vec<usize>, Vec<Lpdu>)> = Vec::new();
        for (place, lpdu) in lpdus {
            match guarded(&lpdu.lpdu_id, self.keys(origin, facts, &lpdu)).await {
                Ok(keys) => match groups.iter_mut().find(|(of_group, ..)| *of_group == keys) {
                    Some((_, places, lpdus)) => {
                        places.push(place);
                        lpdus.push(lpdu);
                    }
                    None => groups.push((keys, vec![place], vec![lpdu])),
                },
                // No verdict on the event: its sender is to send it again.
                Err(refusal @ Refusal::KeysUnavailable { .. }) => {
                    results.push((place, Err(Refusal::Internal(refusal.to_string()))));
                }
                Err(refusal) => results.push((place, Err(refusal))),
            }
        }
        for (keys, places, lpdus) in groups {
            results.extend(places.into_iter().zip(verify_all(keys, facts.redaction(), lpdus).await));
        }
        // The order of a transaction is the order in the log.
        results.sort_by_key(|(place, _)| *place);
        results
    }

    async fn keys(&self, origin: &ServerName, facts: &Facts, lpdu: &Lpdu) -> Result<VerifyKeys, Refusal> {
        let (keyring, ts) = (&self.context().keyring, lpdu.origin_server_ts);
        let keys = keyring.keys_for_own_event(&lpdu.json, origin, facts.validity(ts)).await?;
        let is_right = |keys: &VerifyKeys| lpdu.clone().verify_as(keys, facts.redaction()).is_ok();
        let late = keyring.out_of_time(&lpdu.json, ts, &keys, is_right).await;
        late.map_or(Ok(keys), Err)
    }

    /// One LPDU that came with a handshake: everything but the rules and the gate.
    pub(super) async fn verify_one(
        &self,
        origin: &ServerName,
        facts: &Facts,
        body: Object,
    ) -> Result<VerifiedLpdu, Refusal> {
        let lpdu = Lpdu::parse(body)?;
        self.is_for_us(origin, facts, &lpdu)?;
        if !is_own_leave(&lpdu) {
            self.admits(facts, origin).await?;
        }
        let keys = self.keys(origin, facts, &lpdu).await?;
        lpdu.verify_as(&keys, facts.redaction())
    }

    /// Asks the other side about a user who joins or knocks, if the rules allow it and it is new.
    pub(super) async fn pass_gate(
        &self,
        cell: &Arc<RoomCell>,
        lpdu: &VerifiedLpdu,
        membership: Membership,
    ) -> Result<(), Refusal> {
        let room = cell.snapshot(&self.context().store).await?;
        let current = lpdu.state_key.as_deref().and_then(|user| room.membership(user));
        let in_already = current == Some(membership.as_str());
        if in_already || self.event_of_lpdu(&lpdu.lpdu_id).await?.is_some() {
            return Ok(());
        }
        let content = content(lpdu);
        let subject = Subject::lpdu(lpdu, &content);
        room.judge(&subject, &room.auth_events(&subject).0)?;
        self.between().gate(&handshake(&room, &lpdu.sender, membership, Stage::Send, content)).await
    }
}

/// Checks hashes and signatures, of many events on all cores and away from the threads that serve requests.
async fn verify_all(
    keys: VerifyKeys,
    redaction: Redaction,
    mut lpdus: Vec<Lpdu>,
) -> Vec<Result<VerifiedLpdu, Refusal>> {
    let check = move |lpdus: Vec<Lpdu>, keys: &VerifyKeys| {
        let check = |lpdu: Lpdu| {
            let id = lpdu.lpdu_id.clone();
            guarded_now(&id, || {
                trip("verify", &lpdu.kind);
                lpdu.verify_as(keys, redaction)
            })
        };
        lpdus.into_iter().map(check).collect()
    };
    if lpdus.len() < SPREAD {
        return check(lpdus, &keys);
    }
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    let share = lpdus.len().div_ceil(cores).max(SPREAD / 2);
    let keys = Arc::new(keys);
    let mut shares = Vec::new();
    while !lpdus.is_empty() {
        let later = lpdus.split_off(share.min(lpdus.len()));
        let (events, keys) = (std::mem::replace(&mut lpdus, later), keys.clone());
        let count = events.len();
        shares.push((count, tokio::task::spawn_blocking(move || check(events, &keys))));
    }
    let mut results = Vec::new();
    for (count, share) in shares {
        match share.await {
            Ok(verified) => results.extend(verified),
            // No verdict on the events: their sender is to send them again.
            Err(error) => results.extend((0..count).map(|_| Err(Refusal::Internal(error.to_string())))),
        }
    }
    results
}

/// The membership that the other side is asked about.
fn gated(lpdu: &Lpdu) -> Option<Membership> {
    let asked = |membership: &Membership| matches!(membership, Membership::Join | Membership::Knock);
    membership(lpdu).filter(asked).filter(|_| lpdu.kind == "m.room.member")
}

/// Whether somebody goes by themselves, which nobody is kept from.
fn is_own_leave(lpdu: &Lpdu) -> bool {
    let own = lpdu.kind == "m.room.member" && lpdu.state_key.as_deref() == Some(lpdu.sender.as_str());
    own && membership(lpdu) == Some(Membership::Leave)
}

pub(super) fn membership(lpdu: &Lpdu) -> Option<Membership> {
    lpdu.json.get("content")?.get("membership")?.as_str().and_then(Membership::parse)
}

pub(super) fn handshake(
    room: &Snapshot,
    user_id: &UserId,
    membership: Membership,
    stage: Stage,
    content: Object,
) -> Handshake {
    let room_id = room.facts.room_id.clone();
    Handshake { side: Side::Lm, room_id, user_id: user_id.to_owned(), membership, stage, content }
}

fn content(lpdu: &Lpdu) -> Object {
    lpdu.json.get("content").and_then(Value::as_object).cloned().unwrap_or_default()
}

impl Outcome {
    /// The event, or why it is not in the log.
    pub(super) fn into_result(self) -> Result<Appended, Refusal> {
        match self {
            Self::Appended(appended) => Ok(appended),
            Self::Refused(refusal) => Err(refusal),
            Self::Moved(_) => Err(Refusal::Internal("the log moved".to_owned())),
            Self::NotHub(..) => Err(Refusal::Internal("another server keeps the log now".to_owned())),
        }
    }
}

pub(super) fn received(event_id: Option<OwnedEventId>, result: Result<(), Refusal>) -> Received {
    Received { event_id, result }
}

fn set(results: &mut [Received], place: usize, result: Received) {
    if let Some(entry) = results.get_mut(place) {
        *entry = result;
    }
}

fn set_result(results: &mut [Received], place: usize, result: Result<(), Refusal>) {
    if let Some(entry) = results.get_mut(place) {
        entry.result = result;
    }
}

/// An event of a transaction, and its room.
fn parse(raw: &Raw) -> Result<(OwnedRoomId, Object), Refusal> {
    with_room(parse_object(raw.get().as_bytes())?)
}

/// The same of an event that stands in somebody's log and is not to be read strictly.
fn of_a_log(raw: &Raw) -> Result<(OwnedRoomId, Object), Refusal> {
    with_room(parse_leniently(raw.get())?)
}

fn with_room(object: Object) -> Result<(OwnedRoomId, Object), Refusal> {
    let room_id = object.get("room_id").and_then(Value::as_str).unwrap_or_default();
    let room_id = RoomId::parse(room_id).map_err(|error| Refusal::malformed("room_id", error.to_string()))?;
    Ok((room_id, object))
}

/// The ID by which the sender of what cannot be taken as an event of a log knows it.
pub fn id_as_received(raw: &Raw) -> Option<OwnedEventId> {
    let id = || {
        let object = parse_leniently(raw.get())?;
        Ok(event_id(&format!("${}", reference_hash(&object, Redaction::Draft))))
    };
    guarded_now(&"the ID of an event", id).ok()?
}

fn new_room_id(own: &ServerName) -> Result<OwnedRoomId, Refusal> {
    let mut random = [0u8; 12];
    rand::rngs::OsRng.fill_bytes(&mut random);
    let opaque = data_encoding::BASE32_NOPAD.encode(&random).to_lowercase();
    RoomId::parse(format!("!{opaque}:{own}")).map_err(|error| Refusal::Internal(error.to_string()))
}
