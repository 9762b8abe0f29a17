//! What a participant takes from its hub: finished events, in the hub's order, each checked at its place.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use ruma::{EventId, OwnedEventId, OwnedServerName, ServerName, UserId};
use serde_json::Value;

use super::batch::{Batch, Origin};
use super::finished::{Bad, Finished, SOON};
use super::gaps::Filled;
use super::hub::received;
use super::remarks::Skipped;
use super::room::{Snapshot, Subject};
use super::rooms::{RoomCell, lock, stored_pdu};
use super::rules::{HUB_EVENT, Slot};
use super::waits::{Waits, slot_of};
use super::{Lm, Role, whereabouts};
use crate::admin::metrics::METRICS;
use crate::event::{Lpdu, Object, Pdu, event_id, reference_hash};
use crate::guard::{fails_on, guarded_now};
use crate::refusal::Refusal;
use crate::seam::Received;
use crate::store::lm::{self as stored, Complaint, Fault, Known};

impl Lm {
    /// Takes what a server sent into a room that is hubbed elsewhere; answers in order, after the commit.
    pub(super) async fn take_finished(
        &self,
        origin: &ServerName,
        cell: &Arc<RoomCell>,
        objects: Vec<Object>,
    ) -> Vec<Received> {
        let (lpdus, finished): (Vec<_>, Vec<_>) =
            objects.into_iter().enumerate().partition(|(_, object)| is_lpdu_for(&self.context().server_name, object));
        let (places, objects): (Vec<usize>, Vec<Object>) = finished.into_iter().unzip();
        let count = objects.len();
        let (lm, from, into) = (self.clone(), origin.to_owned(), cell.clone());
        // On a task of its own: when the hub hangs up, what was begun is still finished.
        let taken = tokio::spawn(async move { lm.take_in_turn(&from, &into, objects).await }).await;
        let taken = match taken {
            Ok(Ok(results)) => results,
            Ok(Err(refusal)) => vec![received(None, Err(refusal)); count],
            Err(error) => vec![received(None, Err(Refusal::Internal(error.to_string()))); count],
        };
        if lpdus.is_empty() {
            return taken;
        }
        // After those, by which we may have come to keep the log.
        let (lpdu_places, lpdus): (Vec<usize>, Vec<Object>) = lpdus.into_iter().unzip();
        let lpdus = self.take_misdirected(origin, cell, lpdus).await;
        let mut all: Vec<(usize, Received)> =
            places.into_iter().zip(taken).chain(lpdu_places.into_iter().zip(lpdus)).collect();
        all.sort_by_key(|(place, _)| *place);
        all.into_iter().map(|(_, received)| received).collect()
    }

    async fn take_in_turn(
        &self,
        origin: &ServerName,
        cell: &Arc<RoomCell>,
        objects: Vec<Object>,
    ) -> Result<Vec<Received>, Refusal> {
        let _turn = cell.intake.lock().await;
        let room = cell.snapshot(&self.context().store).await?;
        if self.role(&room) == Role::Hub {
            // What the hub before us says too late. What it said in time is here.
            return self.too_late(origin, &room, &objects).await;
        }
        let is_hub = *origin == room.facts.hub;
        if !is_hub && !objects.iter().any(|object| announces(object, origin, &room)) {
            let late = self.too_late(origin, &room, &objects).await?;
            if late.iter().any(|event| event.result.is_err()) && room.has_server(origin) {
                self.seek_hub(cell, Some(origin.to_owned()), whereabouts::EVERY);
            }
            return Ok(late);
        }
        let redaction = room.redaction;
        // What the hub sends on to somebody else, by mistake: nobody waits for a verdict of ours.
        let astray: Vec<bool> = objects.iter().map(is_lpdu).collect();
        let checked = self.check_finished(objects, redaction).await;
        if !is_hub && !checked.iter().flatten().any(|event| is_announcement(event, origin, &room)) {
            let why = || Refusal::WrongOrigin { origin: origin.to_string(), expected: room.facts.hub.to_string() };
            let id = |event: &Result<Finished, Bad>| match event {
                Ok(event) => Some(event.pdu.event_id.clone()),
                Err(bad) => bad.event_id().cloned(),
            };
            return Ok(checked.iter().map(|event| received(id(event), Err(why()))).collect());
        }
        let mut taking = Taking::begin(self, cell, room).await?;
        taking.announced = (!is_hub).then(|| origin.to_owned());
        taking.skipped = lock(&cell.skipped).clone();
        let coming = checked.iter().flatten().map(|event| &event.pdu);
        let asked_for = coming.flat_map(|pdu| pdu.prev_events.iter().chain([&pdu.event_id])).cloned();
        taking.look_up(asked_for.collect()).await?;
        let mut results = Vec::with_capacity(checked.len());
        for (event, astray) in checked.into_iter().zip(astray) {
            if astray {
                results.push(received(None, Ok(())));
                continue;
            }
            let event_id = match &event {
                Ok(event) => Some(event.pdu.event_id.clone()),
                Err(bad) => bad.event_id().cloned(),
            };
            taking.remark_on_time(&event);
            results.push(received(event_id, taking.arrive(event).await?));
        }
        *lock(&cell.skipped) = std::mem::take(&mut taking.skipped);
        taking.finish(Some(cell)).await?;
        if is_hub && lock(&cell.ahead).go_on() {
            // Who said that it was not the hub speaks as the hub: perhaps it did not know yet, or this is of the time before.
            self.send_on(&cell.room_id, origin);
        }
        Ok(results)
    }
}

impl Lm {
    /// LPDUs for us in a room whose log another server keeps, as far as is known here.
    async fn take_misdirected(&self, origin: &ServerName, cell: &Arc<RoomCell>, objects: Vec<Object>) -> Vec<Received> {
        let all = |refusal: Refusal| objects.iter().map(|_| received(None, Err(refusal.clone()))).collect();
        let room = match cell.snapshot(&self.context().store).await {
            Ok(room) => room,
            Err(error) => return all(error.into()),
        };
        if self.role(&room) == Role::Hub {
            return Box::pin(self.receive_lpdus(origin, cell, &room.facts, objects)).await;
        }
        let mut results = Vec::with_capacity(objects.len());
        for object in objects {
            results.push(match guarded_now(&"an LPDU", || Lpdu::parse(object)) {
                Ok(lpdu) => received(Some(lpdu.lpdu_id.clone()), self.misdirected(origin, cell, &room, &lpdu).await),
                Err(refusal) => received(None, Err(refusal)),
            });
        }
        results
    }

    async fn misdirected(
        &self,
        origin: &ServerName,
        cell: &Arc<RoomCell>,
        room: &Snapshot,
        lpdu: &Lpdu,
    ) -> Result<(), Refusal> {
        let facts = &room.facts;
        // It was taken when we kept the log, and comes again.
        if self.event_of_lpdu(&lpdu.lpdu_id).await?.is_some_and(|there| there.event.room_id == facts.room_id) {
            return Ok(());
        }
        let found = self.context().server_name.to_string();
        // Who is in the room may know before us that we are the hub, and can show it. Who takes us for the hub of before speaks no
        // otherwise: a log may have come back to us.
        if room.has_server(origin) && self.context().config.hub_transfer.accepts(&facts.hub, &facts.room_id) {
            self.seek_hub(cell, Some(origin.to_owned()), whereabouts::EVERY);
        }
        Err(Refusal::WrongHub { hub: facts.hub.to_string(), found })
    }

    /// What a server that is not the hub says is in the log. The hub before this one may say again what it said in time.
    async fn too_late(
        &self,
        origin: &ServerName,
        room: &Snapshot,
        objects: &[Object],
    ) -> Result<Vec<Received>, Refusal> {
        let mut results = Vec::with_capacity(objects.len());
        for object in objects {
            let event_id = event_id(&format!("${}", reference_hash(object, room.redaction)));
            let there = match event_id.as_ref().filter(|_| is_finished(object)) {
                Some(event_id) => stored::event(&self.context().store, event_id).await?,
                None => None,
            };
            let is_there = there.is_some_and(|row| row.room_id == room.facts.room_id) && speaks_of(object, origin);
            results.push(match is_there {
                true => received(event_id, Ok(())),
                false => received(None, not_from_hub(origin, room, object)),
            });
        }
        Ok(results)
    }
}

fn is_finished(object: &Object) -> bool {
    object.contains_key("auth_events") || object.contains_key("prev_events")
}

/// Whether it is for a hub to finish.
fn is_lpdu(object: &Object) -> bool {
    !is_finished(object) && object.contains_key("hub_server")
}

/// Whether it is an LPDU that this server is to finish.
fn is_lpdu_for(own: &ServerName, object: &Object) -> bool {
    !is_finished(object) && text(object, "hub_server") == Some(own.as_str())
}

fn text<'a>(object: &'a Object, key: &str) -> Option<&'a str> {
    object.get(key).and_then(Value::as_str)
}

/// Whether an event is one that a server put into a log as its hub, or says that it is.
fn speaks_of(object: &Object, server: &ServerName) -> bool {
    let sender = text(object, "sender").and_then(|user| <&UserId>::try_from(user).ok());
    text(object, "hub_server").is_some_and(|hub| hub == server.as_str())
        || sender.is_some_and(|user| user.server_name() == server)
}

/// Whether an event says that the hub of a room has handed its log over to a server. That server says so too, since the hub
/// before it may be gone.
fn announces(object: &Object, server: &ServerName, room: &Snapshot) -> bool {
    let named = object.get("content").and_then(|content| content.get("hub_server")).and_then(Value::as_str);
    text(object, "type") == Some(HUB_EVENT) && named == Some(server.as_str()) && speaks_of(object, &room.facts.hub)
}

/// The same of an event whose signatures were checked: those of both servers.
fn is_announcement(event: &Finished, server: &ServerName, room: &Snapshot) -> bool {
    let pdu = &event.pdu;
    event.redacted.is_none()
        && pdu.new_hub() == Some(server)
        && pdu.sender.server_name() == room.facts.hub
        // One that was said before the log came to its hub of now is old.
        && room.state_event(HUB_EVENT, "").is_none_or(|current| pdu.auth_events.contains(&current.event_id))
}

/// Only the hub sends what is in the log.
fn not_from_hub(origin: &ServerName, room: &Snapshot, object: &Object) -> Result<(), Refusal> {
    if !is_finished(object) {
        // An LPDU at a server that is not the hub is dropped.
        return Ok(());
    }
    Err(Refusal::WrongOrigin { origin: origin.to_string(), expected: room.facts.hub.to_string() })
}

/// Events of one room on their way into its log.
pub(super) struct Taking<'a> {
    lm: &'a Lm,
    pub batch: Batch,
    /// The events in the batch, and those that were rejected on the way.
    pub(super) fresh: BTreeSet<OwnedEventId>,
    /// What the events that were placed name as their predecessors.
    followed: BTreeSet<OwnedEventId>,
    /// Of the events that were placed, whether they were said while we were in the room.
    pub(super) of_our_stay: BTreeMap<OwnedEventId, bool>,
    /// What the store knew of the events that were looked up when this began.
    looked_up: BTreeMap<OwnedEventId, Option<Known>>,
    /// What became of asking the hub for what was missing: it is not asked twice.
    pub(super) asked: Option<Filled>,
    /// Whether a hub that cannot be asked now counts like one that will not give what is missing.
    pub(super) last_try: bool,
    /// The server that is to keep the log by an event of the hub's that it has sent: it is asked for what is before that.
    pub(super) announced: Option<OwnedServerName>,
    /// Whether a long gap of the room is being filled: what comes after it is not taken before that.
    pub(super) gap_is_open: bool,
    /// What of the log is missing.
    pub(super) waits: Waits,
    /// Whether the event that is being taken shows that the log is a graph in a line.
    pub(super) in_line: bool,
    /// Whether the event that is being taken may be one of which a hub tells those who are out of the room.
    pub(super) ends_wait: bool,
    /// Whether the hub's log was seen to fork.
    pub(super) forked: bool,
    /// Whether the log is being looked over: what is found so sets off no other look.
    pub(super) looks: bool,
    /// What the hub had, and had not given, when it gave what follows it.
    pub(super) skipped: Skipped,
    /// How long the next page of what is missing waits for the keys of servers.
    pub(super) key_patience: Duration,
    /// Whether a stay of ours begins with these events, by whichever way its first join comes.
    pub(super) begins_stay: bool,
}

impl<'a> Taking<'a> {
    /// Goes on from a batch in which these events are already.
    pub fn new(lm: &'a Lm, batch: Batch) -> Self {
        Self {
            lm,
            batch,
            fresh: BTreeSet::new(),
            followed: BTreeSet::new(),
            of_our_stay: BTreeMap::new(),
            looked_up: BTreeMap::new(),
            asked: None,
            last_try: false,
            announced: None,
            gap_is_open: false,
            waits: Waits::default(),
            in_line: false,
            ends_wait: false,
            forked: false,
            looks: false,
            skipped: Skipped::default(),
            key_patience: SOON,
            begins_stay: false,
        }
    }

    /// Goes on from a room as it is, first with what waits there.
    pub async fn begin(lm: &'a Lm, cell: &RoomCell, room: Arc<Snapshot>) -> Result<Self, Refusal> {
        let mut taking = Self::new(lm, Batch::new(room));
        // Of a room in which we are not nothing is missing: what is written down is of an earlier stay.
        if lock(&cell.missing).is_any() && !taking.is_out() {
            if let Some(gap) = stored::gap(&lm.context().store, &cell.room_id).await? {
                (taking.gap_is_open, taking.asked) = (true, Some(Filled::NotNow));
                taking.waits.newest = gap.newest;
            }
            // Boxed: what is beneath it is nested too deeply for the compiler to see at once that it may go to another thread.
            taking.take_waiting().boxed().await?;
        }
        Ok(taking)
    }

    pub(super) fn room(&self) -> &Snapshot {
        &self.batch.after
    }

    /// Takes an event that the hub sent, or keeps it until it can be judged.
    async fn arrive(&mut self, event: Result<Finished, Bad>) -> Result<Result<(), Refusal>, Refusal> {
        let unread = match &event {
            Err(Bad::Unproved(pdu, _)) => Some(&pdu.event_id),
            Err(Bad::Malformed { event_id, .. }) => Some(event_id),
            _ => None,
        };
        if let Some(event_id) = unread
            && self.knows(event_id).await?
        {
            return Ok(Ok(()));
        }
        match self.admit(event) {
            Ok(event) => self.take(event).await,
            Err(outcome) => Ok(outcome),
        }
    }

    /// Takes an event, and what is missing before it.
    pub(super) async fn take(&mut self, event: Finished) -> Result<Result<(), Refusal>, Refusal> {
        if self.knows(&event.pdu.event_id).await? {
            return Ok(Ok(()));
        }
        let missing = self.unknown(&event.pdu.prev_events).await?;
        if missing.is_empty() {
            return self.place(event).await;
        }
        self.in_line = self.room().says_shared() || self.is_of_a_graph(&event.pdu);
        self.ends_wait = self.ends_a_wait(&event.pdu);
        let filled = match self.asked {
            Some(filled) => {
                if filled == Filled::Bridged {
                    let place = Some(self.batch.after.head);
                    missing.iter().for_each(|id| self.note(id, place, None, "it was not asked for"));
                }
                filled
            }
            None => self.fill(&event.pdu.event_id, missing.clone()).await?,
        };
        self.ends_wait = false;
        if filled == Filled::Outside {
            return Ok(Ok(()));
        }
        if filled != Filled::NotNow && !self.in_line {
            let hub = self.gives();
            self.skipped.note(&hub, missing);
        }
        if filled == Filled::NotNow {
            if self.gap_is_open {
                // It is asked for with all that came meanwhile: the hub need not keep what it has for other rooms.
                self.comes_later(&event.pdu.event_id, &event.pdu.prev_events);
                return Ok(Ok(()));
            }
            // No verdict on the event: the hub is to send it again, and those that do not are asked for it.
            let problem = "what is before the event cannot be had from the hub now".to_owned();
            self.note(&event.pdu.event_id, None, None, &problem);
            return Ok(Err(Refusal::Internal(problem)));
        }
        self.place(event).await
    }

    /// Takes an event whose predecessors are there, or cannot be had. One on which this gateway fails is refused for good.
    pub async fn place(&mut self, event: Finished) -> Result<Result<(), Refusal>, Refusal> {
        let event_id = event.pdu.event_id.clone();
        let Ok(placed) = AssertUnwindSafe(self.judge_and_place(event)).catch_unwind().await else {
            let refusal = fails_on(&event_id);
            self.settle(None, &event_id, &refusal.to_string());
            self.fresh.insert(event_id);
            return Ok(Err(refusal));
        };
        placed
    }

    async fn judge_and_place(&mut self, event: Finished) -> Result<Result<(), Refusal>, Refusal> {
        let Finished { pdu, redaction, redacted, copy } = event;
        if pdu.room_id != self.room().facts.room_id {
            return Ok(Err(Refusal::malformed(
                "room_id",
                format!("{}, not {}", pdu.room_id, self.room().facts.room_id),
            )));
        }
        if self.knows(&pdu.event_id).await? {
            return Ok(Ok(()));
        }
        if self.is_replaced(&pdu).await? {
            self.settle(None, &pdu.event_id, "came when something newer stood in its place already");
            self.fresh.insert(pdu.event_id);
            return Ok(Ok(()));
        }
        if let Err(refusal) = self.judge(&pdu).await? {
            if self.may_be_allowed() {
                return Ok(self.keep(&pdu, &refusal, false));
            }
            self.settle(Some(Fault::Forbidden), &pdu.event_id, &refusal.to_string());
            self.fresh.insert(pdu.event_id);
            return Ok(Err(refusal));
        }
        if let Err(refusal) = self.room().has_room_for(&pdu) {
            self.settle(None, &pdu.event_id, &refusal.to_string());
            self.fresh.insert(pdu.event_id);
            return Ok(Err(refusal));
        }
        let is_ours = self.is_of_our_stay(&pdu).await?;
        if let Some(why) = redacted.filter(|_| !copy) {
            self.fault(Fault::Rewritten, &pdu.event_id, &format!("taken redacted: {why}"));
        } else if copy
            && is_ours
            && self.room().has_server(&self.lm.context().server_name)
            && !self.room().says_shared()
        {
            // Nothing of it was hidden from this gateway: something in the log redacts it, or the hub leaves out what was said.
            self.batch.note_blank(&pdu);
        }
        self.of_our_stay.insert(pdu.event_id.clone(), is_ours);
        if self.forks(&pdu).await? {
            // The log forks at the hub. Both branches are facts there; they stand here in the order in which they came.
            let problem = format!("follows {:?}, not the end of the log", pdu.prev_events);
            self.fault(Fault::Forked, &pdu.event_id, &problem);
            self.forked = true;
        }
        self.remark_on_links(&pdu);
        self.batch.after.redaction = redaction;
        let slot = slot_of(&pdu);
        self.followed.extend(pdu.prev_events.iter().cloned());
        self.append(pdu);
        self.placed(slot);
        Ok(Ok(()))
    }

    /// Whether another event follows the same one already. What stands between may also have come late.
    async fn forks(&self, pdu: &Pdu) -> Result<bool, Refusal> {
        if self.waits.late.is_some() || self.room().last_id().is_none_or(|last| pdu.prev_events.contains(last)) {
            return Ok(false);
        }
        if self.room().says_shared() || self.is_of_a_graph(pdu) {
            // Whoever builds on a graph may have said it at once with what stands before it here.
            return Ok(false);
        }
        if pdu.prev_events.iter().any(|id| self.followed.contains(id)) {
            return Ok(true);
        }
        let (store, room) = (&self.lm.context().store, self.room());
        let ids: Vec<&EventId> = pdu.prev_events.iter().map(|id| &**id).collect();
        for before in stored::events_by_id(store, &ids).await? {
            let next = before.position.saturating_add(1);
            for row in stored::range(store, &room.facts.room_id, next, next, 1).await? {
                if stored_pdu(row, room.redaction)?.prev_events.contains(&before.event_id) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Puts an event at the end of the batch.
    pub fn append(&mut self, pdu: Pdu) {
        let (event_id, weight) = (pdu.event_id.clone(), self.room().weight_after(&pdu));
        let was_out = self.is_out();
        self.batch.push(pdu, Origin { foreign: true, ..Origin::default() });
        self.batch.after.weight = weight;
        self.fresh.insert(event_id);
        if was_out && !self.is_out() {
            self.forget_earlier_stay();
        }
    }

    /// Whether nobody of ours is in the room.
    pub(super) fn is_out(&self) -> bool {
        !self.room().has_server(&self.lm.context().server_name)
    }

    /// The rules, and that the hub chose the right events to allow this one.
    async fn judge(&self, pdu: &Pdu) -> Result<Result<(), Refusal>, Refusal> {
        let room = self.room();
        if let Some(hub) = pdu.hub_server.as_ref().filter(|hub| **hub != room.facts.hub) {
            return Ok(Err(Refusal::WrongHub { hub: room.facts.hub.to_string(), found: hub.to_string() }));
        }
        // What stands before the log was handed over is the hub's of then to say, and what it says it has signed.
        if self.announced.is_some() && pdu.hub_server.is_none() && pdu.sender.server_name() != room.facts.hub {
            let (origin, expected) = (pdu.sender.server_name().to_string(), room.facts.hub.to_string());
            return Ok(Err(Refusal::WrongOrigin { origin, expected }));
        }
        let subject = Subject::of(pdu);
        let (slots, expected) = room.auth_events(&subject);
        let is_as_expected = pdu.auth_events.len() == expected.len()
            && pdu.auth_events.iter().collect::<BTreeSet<_>>() == expected.iter().collect();
        // What hands the log over is good for one place alone: said again later, it names what is there no more.
        if pdu.new_hub().is_some() {
            let problem = if !is_as_expected {
                format!("auth_events are not {expected:?}, which allow it where it stands")
            } else if self.forks(pdu).await? {
                format!(
                    "it follows {:?}, which another event follows: it was signed for another place",
                    pdu.prev_events
                )
            } else {
                return Ok(room.judge(&subject, &slots));
            };
            return Ok(Err(Refusal::LmRule { rule: "hub.7", problem }));
        }
        if is_as_expected {
            return Ok(room.judge(&subject, &slots));
        }
        // Not what we would have chosen: perhaps earlier events for the right places, perhaps not.
        let ids: Vec<&EventId> = pdu.auth_events.iter().map(|id| &**id).collect();
        let mut named = BTreeMap::new();
        for row in stored::events_by_id(&self.lm.context().store, &ids).await? {
            if row.room_id != room.facts.room_id {
                continue;
            }
            let event = stored_pdu(row, room.redaction)?;
            named.insert(event.event_id.clone(), (event.kind, event.state_key.unwrap_or_default()));
        }
        for id in expected {
            if let Some(slot) = slots
                .iter()
                .find(|slot| room.state_event(slot.kind, slot.state_key).is_some_and(|event| event.event_id == id))
            {
                named.insert(id, (slot.kind.to_owned(), slot.state_key.to_owned()));
            }
        }
        let mut chosen = Vec::with_capacity(pdu.auth_events.len());
        for id in &pdu.auth_events {
            match named.get(id) {
                Some((kind, state_key)) => chosen.push(Slot { kind, state_key }),
                // It waits here for its keys, perhaps for ever: the room goes on by what it was before. Where the log is a graph in a
                // line it may also have been replaced before we came, and a branch of then goes by it.
                None if self.is_passed(id) || self.may_be_left_out() || self.may_branch(pdu) => {
                    return Ok(room.judge(&subject, &slots));
                }
                None => {
                    let problem = format!("auth_events name {id}, which is not known");
                    return Ok(Err(Refusal::LmRule { rule: "4.2", problem }));
                }
            }
        }
        Ok(room.judge(&subject, &chosen))
    }

    /// Remarks on an event whose signatures prove nothing.
    pub(super) fn forged(&mut self, pdu: &Pdu, refusal: &Refusal) {
        // What is signed rightly at a wrong time was neither forged nor changed: the hub has passed on what it was given.
        let fault = (!matches!(refusal, Refusal::KeyOutOfTime { .. })).then_some(Fault::Rewritten);
        self.record(fault, &pdu.event_id, &refusal.to_string(), false);
        self.remark(pdu.event_id.clone());
    }

    /// Remarks on a fault of the hub: the event is taken all the same, or may come again and be right.
    pub fn fault(&mut self, fault: Fault, event_id: &EventId, problem: &str) {
        self.record(Some(fault), event_id, problem, false);
        self.remark(event_id.to_owned());
    }

    /// Notes what is no fault of the hub as far as is known.
    pub(super) fn mention(&mut self, event_id: &EventId, problem: &str) {
        self.record(None, event_id, problem, false);
    }

    /// What names an event goes on without it.
    pub(super) fn remark(&mut self, event_id: OwnedEventId) {
        self.looked_up.entry(event_id).or_default().get_or_insert(Known::Remarked);
    }

    /// Records that an event is refused for good, and whether that is a fault of the hub.
    pub(super) fn settle(&mut self, fault: Option<Fault>, event_id: &EventId, problem: &str) {
        self.record(fault, event_id, problem, true);
    }

    fn record(&mut self, fault: Option<Fault>, event_id: &EventId, problem: &str, settled: bool) {
        let facts = self.room().facts.clone();
        let (room_id, hub) = (&facts.room_id, &facts.hub);
        match fault {
            Some(fault) => {
                let fault = fault.as_str();
                if self.lm.looks().warns(room_id) {
                    tracing::warn!(room = %room_id, %hub, event = %event_id, fault, problem, "the hub misbehaves");
                } else {
                    tracing::debug!(room = %room_id, %hub, event = %event_id, fault, problem, "the hub misbehaves");
                }
                METRICS.lm_hub_faults.with_label_values(&[fault]).inc();
                self.lm.between().hub_misbehaves(room_id, fault);
            }
            None => tracing::info!(room = %room_id, %hub, event = %event_id, problem, "an event is not taken"),
        }
        let (event_id, problem) = (event_id.to_owned(), problem.chars().take(500).collect());
        self.batch.complain(Complaint { event_id, problem, settled, fault });
    }

    /// Whether an event is in the log, or was rejected for good.
    pub(super) async fn knows(&mut self, event_id: &EventId) -> Result<bool, Refusal> {
        Ok(self.known(event_id).await? == Some(Known::Settled))
    }

    async fn known(&mut self, event_id: &EventId) -> Result<Option<Known>, Refusal> {
        if self.fresh.contains(event_id) {
            return Ok(Some(Known::Settled));
        }
        if !self.looked_up.contains_key(event_id) {
            self.look_up(BTreeSet::from([event_id.to_owned()])).await?;
        }
        let known = self.looked_up.get(event_id).copied().flatten();
        Ok(known.or(self.is_passed(event_id).then_some(Known::Remarked)))
    }

    pub(super) fn lm(&self) -> &'a Lm {
        self.lm
    }

    /// Asks the store about many events at once.
    pub(super) async fn look_up(&mut self, event_ids: BTreeSet<OwnedEventId>) -> Result<(), Refusal> {
        let ids: Vec<&EventId> = event_ids.iter().map(|id| &**id).collect();
        let room_id = self.room().facts.room_id.clone();
        let known = stored::known_of(&self.lm.context().store, &room_id, &ids).await?;
        for event_id in event_ids {
            let is_passed = || self.lm.not_in_logs().contains_key(&(room_id.clone(), event_id.clone()));
            let is_known = known.get(&event_id).copied().or_else(|| is_passed().then_some(Known::Remarked));
            self.looked_up.insert(event_id, is_known);
        }
        Ok(())
    }

    /// Those of the events that nothing was heard of yet.
    pub(super) async fn unknown(&mut self, event_ids: &[OwnedEventId]) -> Result<Vec<OwnedEventId>, Refusal> {
        let mut unknown = Vec::new();
        for event_id in event_ids {
            if self.known(event_id).await?.is_none() {
                unknown.push(event_id.clone());
            }
        }
        Ok(unknown)
    }
}
