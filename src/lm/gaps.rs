//! What is missing of a hub's log, fetched from the hub when something names it. Where the hub will not give it, its state is
//! taken instead, and it is asked again later ([`super::holes`]). What is too much to be filled at once is fetched in the background
//! ([`super::staged`]).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use ruma::{EventId, OwnedEventId, OwnedServerName, RoomId, ServerName};
use tokio::time::Instant;

use super::Lm;
use super::chain::{as_stored, to_keep};
use super::finished::{Bad, Finished};
use super::in_line::newest_first;
use super::intake::Taking;
use super::join_check::{Claim, Seen, forbidden, without_forbidden};
use super::peers::prev_events;
use super::room::{Facts, Snapshot};
use super::rooms::{RoomCell, stored_pdu};
use super::rules::HUB_EVENT;
use super::staged::Found;
use crate::event::{Object, Pdu};
use crate::federation::RemoteError;
use crate::refusal::Refusal;
use crate::store::lm::{self as stored, Fault, Known};

/// How many events one request for missing ones asks for.
const PAGE: usize = 100;
/// How many requests are made for one gap at once: there are hubs that give ten events at once, whatever is asked for.
pub(super) const PAGES: usize = 500;
/// How much one gap may have to be filled at once, and how long that may take: the hub may be waiting for our answer.
pub(super) const AT_ONCE: Bounds = Bounds { events: 5_000, bytes: 16 << 20, patience: Duration::from_secs(30) };
/// As how many of our users a hub is asked where its log ends.
pub(super) const ASKERS: usize = 3;

/// What became of a gap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Filled {
    /// All of it is there.
    Whole,
    /// The hub will not give all of it: its state was taken instead.
    Bridged,
    /// The hub cannot be asked now.
    NotNow,
    /// The event is no part of what we are to have: the hub tells us as one who is out of the room.
    Outside,
}

/// How much is asked for before something is done with it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// How many events, or a few more.
    pub events: usize,
    /// How many bytes they have, or a few more.
    pub bytes: usize,
    /// For how long.
    pub patience: Duration,
}

/// What became of asking for events.
pub(super) enum Fetched {
    All,
    /// There is more than the bounds allow.
    Long(String),
    /// Why not all of it is there.
    No(String),
    NotNow(String),
}

/// What became of asking for state.
pub(super) enum Adopted {
    Yes,
    /// The hub does not give it.
    Refused(String),
    /// The hub cannot be asked now.
    NotNow(String),
}

impl Lm {
    /// Takes all that the hub has after the end of our copy of the log. False when the hub does not say where its log ends.
    pub(super) async fn catch_up(&self, room_id: &RoomId, hub: &ServerName) -> Result<bool, Refusal> {
        let (cell, room) = self.find(room_id).await?;
        let users: Vec<_> = self.own_members(&room).take(ASKERS).collect();
        for user in users {
            match self.peers().make(hub, "join", room_id, &user).await {
                Ok((_, template)) => {
                    let ends: BTreeSet<OwnedEventId> = prev_events(&template).into_iter().collect();
                    return match (ends.is_empty(), self.take_up_to(&cell, &ends).await?) {
                        (true, _) => Ok(false),
                        (false, Filled::NotNow) => Err(Refusal::Remote {
                            server: hub.to_string(),
                            problem: "does not give the end of its log now".to_owned(),
                        }),
                        (false, _) => Ok(true),
                    };
                }
                // Another user may ask.
                Err(error) if is_verdict(&error) => {}
                Err(error) => return Err(error.into_refusal(hub)),
            }
        }
        Ok(false)
    }

    pub(super) async fn take_up_to(
        &self,
        cell: &Arc<RoomCell>,
        ends: &BTreeSet<OwnedEventId>,
    ) -> Result<Filled, Refusal> {
        let _turn = cell.intake.lock().await;
        let room = cell.snapshot(&self.context().store).await?;
        let mut taking = Taking::begin(self, cell, room).await?;
        let filled = taking.take_up_to(ends).await?;
        taking.finish(Some(cell)).await?;
        Ok(filled)
    }
}

impl Lm {
    /// Who is asked for a log: who keeps it, and for what that server does not have who kept it before, which gives it further on.
    /// `next` is who is said to keep it from now on.
    pub(super) fn givers(&self, room: &Snapshot, next: Option<&OwnedServerName>) -> Vec<OwnedServerName> {
        let own = &self.context().server_name;
        let change = room.state_event(HUB_EVENT, "").filter(|event| event.new_hub().is_some());
        let before = change.map(|event| event.sender.server_name().to_owned());
        let mut seen = BTreeSet::from([own]);
        let givers = next.into_iter().chain([&room.facts.hub]).chain(&before);
        givers.filter(|server| seen.insert(server)).cloned().collect()
    }

    /// What one of these has of a log up to an event: the first, or another of what that says that it does not have.
    pub(super) async fn backfill_of(
        &self,
        givers: &[OwnedServerName],
        room_id: &RoomId,
        from: &EventId,
        limit: usize,
    ) -> Result<Vec<Object>, RemoteError> {
        let mut refused = None;
        for server in givers {
            match self.peers().backfill(server, room_id, from, limit).await {
                Ok(page) => return Ok(page),
                Err(error) if refused.is_none() && !is_verdict(&error) => return Err(error),
                // What the first of them says counts.
                Err(error) => refused = refused.or(Some(error)),
            }
        }
        Err(refused.unwrap_or_else(|| RemoteError::Unreachable("nobody else keeps the log".to_owned())))
    }
}

impl Taking<'_> {
    /// Takes everything up to these events, of which nothing but the IDs is known.
    pub(super) async fn take_up_to(&mut self, ends: &BTreeSet<OwnedEventId>) -> Result<Filled, Refusal> {
        let mut missing = Vec::new();
        for end in ends {
            if !self.knows(end).await? {
                missing.push(end.clone());
            }
        }
        match missing.first().cloned() {
            Some(first) => self.fill(&first, missing).await,
            None => Ok(Filled::Whole),
        }
    }

    /// Fetches and takes what is missing before (or at) an event.
    pub(super) async fn fill(&mut self, event: &EventId, missing: Vec<OwnedEventId>) -> Result<Filled, Refusal> {
        if self.gap_is_open {
            self.comes_later(event, &[]);
            return Ok(Filled::NotNow);
        }
        let (room_id, hub) = (self.room().facts.room_id.clone(), self.room().facts.hub.clone());
        if let Some(filled) = self.fill_in_line(event, &missing).await? {
            return Ok(filled);
        }
        tracing::info!(room = %room_id, %hub, event = %event, "events are missing, asking the hub");
        let is_itself = missing.iter().any(|missing| missing == event);
        let mut found = Found { left: missing, ..Found::default() };
        let fetched = self.fetch(&mut found, AT_ONCE).await?;
        if found.events.is_empty() && self.is_told_outside(&fetched) {
            return Ok(Filled::Outside);
        }
        if matches!(fetched, Fetched::Long(_))
            && self.announced.is_none()
            && self.waits.late.is_none()
            && self.waits.asking.is_none()
        {
            self.asked = Some(Filled::NotNow);
            self.stage(found).await?;
            self.comes_later(event, &[]);
            return Ok(Filled::NotNow);
        }
        let Found { events: found, passed, left } = found;
        let (filled, problem) = match fetched {
            Fetched::All => (Filled::Whole, String::new()),
            Fetched::No(problem) | Fetched::Long(problem) => (Filled::Bridged, problem),
            Fetched::NotNow(problem) if self.last_try => (Filled::Bridged, problem),
            Fetched::NotNow(problem) => (Filled::NotNow, problem),
        };
        if filled != Filled::Whole {
            self.asked = Some(filled);
            self.hinder(event, &problem);
        }
        if filled == Filled::NotNow || (is_itself && found.is_empty()) {
            return Ok(filled);
        }
        let late = self.waits.late;
        let place = late.unwrap_or(self.batch.after.head);
        let since = self.reaches_back_to().unwrap_or(place);
        let found = in_order(found, &passed, place);
        let was_out = self.is_out();
        if filled == Filled::Bridged && late.is_none() {
            let first = found.first().and_then(|(_, event)| event_of(event)).map_or(event, |first| &first.event_id);
            let first = first.to_owned();
            match self.announced.is_some() {
                // Who comes to keep the log need not have been there.
                true => self.mention(event, "who keeps the log now did not give all that is before it"),
                false => self.fault(Fault::Skipped, event, "the hub did not give all that is before it"),
            }
            self.adopt_state_before(&first).await?;
        }
        for (place, event) in found {
            self.waits.late = late.map(|_| place);
            // A complaint was recorded where one was due.
            let _ = match self.admit(event) {
                Ok(event) => self.place(event).await?,
                Err(outcome) => outcome,
            };
        }
        self.waits.late = late;
        // What is before the join with which our stay begins is not ours.
        if !was_out || self.is_out() {
            for event_id in left {
                self.note(&event_id, Some(since), None, &problem);
            }
        }
        Ok(filled)
    }

    /// Takes what of the hub's log did not arrive, from an event back to one up to which it was looked over before, or to where
    /// our part of it begins: in the hub's order, whatever names what. False when the hub did not give all of that.
    pub(super) async fn look_back(&mut self, from: OwnedEventId, until: Option<&EventId>) -> Result<bool, Refusal> {
        let facts = self.room().facts.clone();
        let deadline = Instant::now() + AT_ONCE.patience;
        let (mut from, mut reached, mut whole) = (from, false, false);
        let (mut place, mut bytes) = (self.batch.after.head, 0_usize);
        let (mut seen, mut found) = (BTreeSet::new(), Vec::new());
        'pages: for _ in 0..PAGES {
            let page = match tokio::time::timeout_at(deadline, self.page(&facts, &from)).await {
                Ok(Ok(page)) => self.in_its_order(page),
                Ok(Err(error)) => {
                    tracing::info!(room = %facts.room_id, hub = %facts.hub, %error, "the log was not looked over to its end");
                    whole = is_verdict(&error);
                    break;
                }
                Err(_) => break,
            };
            let page = newest_first(page, &from);
            let ids: Vec<OwnedEventId> = page.iter().filter_map(event_of).map(|pdu| pdu.event_id.clone()).collect();
            let ids: Vec<&EventId> = ids.iter().map(|id| &**id).collect();
            let rows = stored::events_by_id(&self.lm().context().store, &ids).await?;
            let places: BTreeMap<OwnedEventId, i64> =
                rows.into_iter().map(|row| (row.event_id, row.position)).collect();
            let (mut far, mut any_new) = (None, false);
            for event in page {
                let Some(pdu) = event_of(&event).filter(|pdu| pdu.room_id == facts.room_id) else { continue };
                let event_id = pdu.event_id.clone();
                if !seen.insert(event_id.clone()) {
                    continue;
                }
                reached |= until.is_some_and(|until| *until == *event_id);
                if let Some(position) = places.get(&event_id) {
                    if self.begins_here(pdu, *position).await? {
                        whole = true;
                        break 'pages;
                    }
                    place = place.min(position.saturating_sub(1));
                } else if !self.knows(&event_id).await? && !self.is_waiting(&event_id) {
                    any_new = true;
                    bytes = bytes.saturating_add(pdu.to_bytes().len());
                    found.push((place, event));
                }
                far = Some(event_id);
            }
            match far.filter(|far| *far != from) {
                Some(far) if (!reached || any_new) && found.len() < AT_ONCE.events && bytes < AT_ONCE.bytes => {
                    from = far
                }
                _ => {
                    whole = true;
                    break;
                }
            }
        }
        if !found.is_empty() {
            let events = found.len();
            tracing::warn!(room = %facts.room_id, hub = %facts.hub, events, "the hub's log has events that did not arrive");
        }
        for (place, event) in found.into_iter().rev() {
            // State that is older than what stands in its place must not replace it.
            self.waits.late = Some(place);
            let _ = match self.admit(event) {
                Ok(event) => self.place(event).await?,
                Err(outcome) => outcome,
            };
        }
        self.waits.late = None;
        Ok(whole)
    }

    /// Whether our part of the log begins with an event of it: what is before is not ours.
    async fn begins_here(&self, pdu: &Pdu, position: i64) -> Result<bool, Refusal> {
        let own = &self.lm().context().server_name;
        let joins = |pdu: &Pdu| pdu.content().get("membership").and_then(|text| text.as_str()) == Some("join");
        if pdu.kind == "m.room.create" {
            return Ok(true);
        }
        if pdu.kind != "m.room.member" || pdu.sender.server_name() != own || !joins(pdu) {
            return Ok(false);
        }
        let (store, room) = (&self.lm().context().store, self.room());
        let pattern = format!("%:{own}");
        let before =
            stored::state_of_kind_before(store, &room.facts.room_id, position, "m.room.member", &pattern).await?;
        for row in before {
            if joins(&stored_pdu(row, room.redaction)?) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Looks for everything between the log and what is `left`, in which what was not found remains.
    pub(super) async fn fetch(&mut self, found: &mut Found, bounds: Bounds) -> Result<Fetched, Refusal> {
        let Found { events: found, passed, left } = found;
        let facts = self.room().facts.clone();
        let until = Instant::now() + bounds.patience;
        let mut bytes: usize = 0;
        for _ in 0..PAGES {
            let Some(from) = left.last().cloned() else { return Ok(Fetched::All) };
            if bytes > bounds.bytes {
                return Ok(Fetched::Long(format!("there is more than {} bytes", bounds.bytes)));
            }
            if found.len().saturating_add(passed.len()) >= bounds.events {
                return Ok(Fetched::Long(format!("there are more than {} events", bounds.events)));
            }
            let page = match tokio::time::timeout_at(until, self.page(&facts, &from)).await {
                Ok(Ok(page)) => self.in_its_order(page),
                Ok(Err(error)) => {
                    tracing::info!(room = %facts.room_id, hub = %facts.hub, %error, "no backfill");
                    let problem = error.to_string();
                    return Ok(if is_verdict(&error) { Fetched::No(problem) } else { Fetched::NotNow(problem) });
                }
                Err(_) => {
                    let problem =
                        format!("{} did not give all of it within {} s", facts.hub, bounds.patience.as_secs());
                    return Ok(if found.is_empty() { Fetched::NotNow(problem) } else { Fetched::Long(problem) });
                }
            };
            let mut page = by_id(page, &facts.room_id);
            let mut named = std::mem::take(left);
            if self.in_line || self.room().says_shared() {
                // What was said at once with what is missing is named by nothing.
                named.extend(page.keys().cloned());
            }
            let mut seen: BTreeSet<OwnedEventId> = found.keys().chain(passed.keys()).cloned().collect();
            // Only what leads from the one to the other: a page has also what was said before we came, or while we were out.
            while let Some(event_id) = named.pop() {
                if !seen.insert(event_id.clone()) {
                    continue;
                }
                let Some(event) = page.remove(&event_id) else {
                    if self.unknown(std::slice::from_ref(&event_id)).await?.len() == 1
                        || self.is_waiting(&event_id)
                        || self.stands_after_hole(&event_id).await?.is_some()
                    {
                        left.push(event_id);
                    }
                    continue;
                };
                if let Err(Bad::Malformed { event_id, prev_events, refusal }) = event {
                    // It is refused whenever it comes, and nothing waits for it.
                    if !self.knows(&event_id).await? {
                        self.settle(Some(Fault::Forbidden), &event_id, &refusal.to_string());
                        self.fresh.insert(event_id.clone());
                    }
                    named.extend(prev_events.iter().cloned());
                    passed.insert(event_id, Passed { position: i64::MAX, prev_events });
                    continue;
                }
                // What is forged or not proved says what is before it all the same: it is the hub that gives it.
                let prev_events = event_of(&event).map(|pdu| pdu.prev_events.clone()).unwrap_or_default();
                if !self.knows(&event_id).await? {
                    bytes = bytes.saturating_add(event_of(&event).map_or(0, |pdu| pdu.to_bytes().len()));
                    found.insert(event_id, event);
                } else if let Some(position) = self.stands_after_hole(&event_id).await? {
                    passed.insert(event_id, Passed { position, prev_events: prev_events.clone() });
                } else {
                    continue;
                }
                named.extend(prev_events);
            }
            if !found.contains_key(&from) && !passed.contains_key(&from) {
                return Ok(Fetched::No(format!("{} does not give {from}", facts.hub)));
            }
        }
        Ok(if left.is_empty() { Fetched::All } else { Fetched::Long("there is more than was asked for".to_owned()) })
    }

    /// What the hub gives up to an event. Each time that servers do not give their keys in time the next page waits half as long for
    /// others: so all pages of a gap together wait for silent servers hardly twice as long as one. What is not proved is kept.
    pub(super) async fn page(
        &mut self,
        facts: &Facts,
        from: &EventId,
    ) -> Result<Vec<Result<Finished, Bad>>, RemoteError> {
        let (givers, lm) = (self.lm().givers(self.room(), self.announced.as_ref()), self.lm());
        let page = lm.backfill_of(&givers, &facts.room_id, from, PAGE).await?.into_iter().take(PAGE).collect();
        let (begun, patience) = (Instant::now(), self.key_patience);
        let page = lm.check_finished_within(patience, page, self.room().redaction).await;
        if begun.elapsed() >= patience {
            self.key_patience = patience / 2;
        }
        Ok(page)
    }

    /// Where an event is in the log if that is behind the hole that is being filled: as state that was taken instead of it,
    /// or because the log went on without it.
    async fn stands_after_hole(&self, event_id: &EventId) -> Result<Option<i64>, Refusal> {
        let Some(since) = self.reaches_back_to() else { return Ok(None) };
        let rows = stored::events_by_id(&self.lm().context().store, &[event_id]).await?;
        Ok(rows.first().map(|row| row.position).filter(|position| *position > since))
    }

    /// Where the log ended when the first of what is being filled went missing.
    fn reaches_back_to(&self) -> Option<i64> {
        self.waits.asking.as_ref().map(|asking| asking.since).or(self.waits.late)
    }

    /// Takes the state that the hub has before an event, where the events that made it cannot be had.
    pub(super) async fn adopt_state_before(&mut self, event_id: &EventId) -> Result<Adopted, Refusal> {
        let room_id = self.room().facts.room_id.clone();
        let (mut hub, mut answer) = (self.room().facts.hub.clone(), None);
        for asked in self.lm().givers(self.room(), self.announced.as_ref()) {
            let given = self.lm().peers().state(&asked, &room_id, event_id).await;
            let goes_on = matches!(&given, Err(error) if is_verdict(error));
            if answer.is_none() || given.is_ok() {
                (hub, answer) = (asked, Some(given));
            }
            if !goes_on {
                break;
            }
        }
        let nobody = || Err(RemoteError::Unreachable("nobody else keeps the log".to_owned()));
        match answer.unwrap_or_else(nobody) {
            Ok((state, chain, _held)) => {
                let redaction = self.room().redaction;
                let state = self.lm().check_finished(state, redaction).await;
                let chain = self.lm().check_finished(chain, redaction).await;
                let forbidden = self.forbidden_here(&state, &chain).await?;
                self.batch.keep_chain(as_stored(&to_keep(&room_id, &chain, &forbidden)), false);
                let (allowed, refused) = without_forbidden(state, &forbidden);
                for (event_id, refusal) in refused {
                    if !self.knows(&event_id).await? {
                        self.fault(Fault::Forbidden, &event_id, &format!("left out of the state: {refusal}"));
                    }
                }
                self.adopt(allowed).await?;
                Ok(Adopted::Yes)
            }
            Err(error) => {
                tracing::warn!(room = %room_id, %hub, %error, "the hub does not give its state");
                let problem = error.to_string();
                Ok(if is_verdict(&error) { Adopted::Refused(problem) } else { Adopted::NotNow(problem) })
            }
        }
    }

    /// Those of the events that cannot be state of the room by what is known of it here.
    async fn forbidden_here(
        &self,
        state: &[Result<Finished, Bad>],
        chain: &[Result<Finished, Bad>],
    ) -> Result<BTreeMap<OwnedEventId, Refusal>, Refusal> {
        let (store, room) = (&self.lm().context().store, self.room());
        let named = chain.iter().chain(state).filter_map(event_of);
        let named: BTreeSet<&EventId> =
            named.flat_map(|pdu| pdu.auth_events.iter().chain([&pdu.event_id])).map(|id| &**id).collect();
        let ids: Vec<&EventId> = named.iter().copied().collect();
        // What has just been put into the batch is not stored yet.
        let current = room.state().iter().map(|(_, _, event)| &**event);
        let current = current.filter(|event| named.contains(&*event.event_id)).cloned();
        let mut log: BTreeMap<OwnedEventId, Pdu> = current.map(|event| (event.event_id.clone(), event)).collect();
        for row in stored::events_by_id(store, &ids).await? {
            if row.room_id == room.facts.room_id {
                log.insert(row.event_id.clone(), stored_pdu(row, room.redaction)?);
            }
        }
        let known = stored::known_of(store, &room.facts.room_id, &ids).await?;
        let settled = known.into_iter().filter(|(id, known)| *known == Known::Settled && !log.contains_key(id));
        let refused = settled.map(|(id, _)| id).collect();
        Ok(forbidden(Claim { state, chain, seen: Seen::Inside { room, log: &log, refused } }))
    }

    /// Puts state events that the hub vouches for into the log as they are: they are facts at the hub, and nothing is known
    /// that forbids them.
    pub async fn adopt(&mut self, state: Vec<Result<Finished, Bad>>) -> Result<(), Refusal> {
        for event in state {
            match event {
                Ok(Finished { pdu, redaction, .. }) => {
                    if pdu.room_id != self.room().facts.room_id || pdu.state_key.is_none() {
                        continue;
                    }
                    if self.knows(&pdu.event_id).await? {
                        continue;
                    }
                    if let Err(refusal) = self.room().has_room_for(&pdu) {
                        self.fault(Fault::Forbidden, &pdu.event_id, &format!("left out of the state: {refusal}"));
                        continue;
                    }
                    self.batch.after.redaction = redaction;
                    self.append(pdu);
                }
                Err(Bad::Forged(pdu, refusal)) => self.forged(&pdu, &refusal),
                Err(Bad::Unproved(pdu, refusal)) => self.keep_given(&pdu, &refusal),
                Err(Bad::Dropped(refusal) | Bad::Malformed { refusal, .. }) => {
                    tracing::warn!(%refusal, "a state event was not taken")
                }
            }
        }
        Ok(())
    }
}

/// Whether a server has answered, be it nonsense, rather than being away, busy or broken on its way to us.
pub(super) fn is_verdict(error: &RemoteError) -> bool {
    let away = [
        StatusCode::TOO_MANY_REQUESTS,
        StatusCode::BAD_GATEWAY,
        StatusCode::SERVICE_UNAVAILABLE,
        StatusCode::GATEWAY_TIMEOUT,
    ];
    match error {
        RemoteError::Status { status, .. } => !away.contains(status) && !error.is_busy(),
        RemoteError::BadAnswer(_) => true,
        RemoteError::Unreachable(_) => false,
    }
}

pub(super) fn event_of(event: &Result<Finished, Bad>) -> Option<&Pdu> {
    match event {
        Ok(event) => Some(&event.pdu),
        Err(Bad::Unproved(pdu, _) | Bad::Forged(pdu, _)) => Some(pdu),
        Err(Bad::Dropped(_) | Bad::Malformed { .. }) => None,
    }
}

/// The events of a page that are of this room and have an ID.
fn by_id(page: Vec<Result<Finished, Bad>>, room_id: &RoomId) -> BTreeMap<OwnedEventId, Result<Finished, Bad>> {
    let id = |event: &Result<Finished, Bad>| match event {
        Err(Bad::Malformed { event_id, .. }) => Some(event_id.clone()),
        event => event_of(event).filter(|pdu| pdu.room_id == *room_id).map(|pdu| pdu.event_id.clone()),
    };
    page.into_iter().filter_map(|event| Some((id(&event)?, event))).collect()
}

/// An event of the log, of which something before it is missing.
pub(super) struct Passed {
    position: i64,
    prev_events: Vec<OwnedEventId>,
}

/// Each event after those that it names as its predecessors, as far as they are there, with the position after which it
/// would stand: the last of them after `last`, the others before what was passed on the way to them. What was itself put into
/// the log late stands far back there and says little.
pub(super) fn in_order(
    mut found: BTreeMap<OwnedEventId, Result<Finished, Bad>>,
    passed: &BTreeMap<OwnedEventId, Passed>,
    last: i64,
) -> Vec<(i64, Result<Finished, Bad>)> {
    let before = |id: &OwnedEventId| {
        let pdu = found.get(id).and_then(event_of).map(|pdu| &pdu.prev_events);
        pdu.or_else(|| Some(&passed.get(id)?.prev_events))
    };
    let mut ordered = Vec::with_capacity(found.len());
    let mut stack: Vec<OwnedEventId> = passed.keys().chain(found.keys()).cloned().collect();
    let (mut entered, mut left) = (BTreeSet::new(), BTreeSet::new());
    while let Some(event_id) = stack.pop() {
        let Some(prev_events) = before(&event_id) else { continue };
        if entered.insert(event_id.clone()) {
            stack.push(event_id);
            stack.extend(prev_events.iter().filter(|id| !entered.contains(*id)).cloned());
        } else if left.insert(event_id.clone()) {
            ordered.push(event_id);
        }
    }
    let mut place = last;
    let mut placed = Vec::with_capacity(found.len());
    for event_id in ordered.into_iter().rev() {
        match passed.get(&event_id) {
            Some(passed) => place = place.min(passed.position.saturating_sub(1)),
            None => placed.extend(found.remove(&event_id).map(|event| (place, event))),
        }
    }
    placed.reverse();
    placed
}
