//! The checks on receipt of a PDU, after its form and signatures, and what its acceptance changes.
//! <https://spec.matrix.org/v1.16/server-server-api/#checks-performed-on-receipt-of-a-pdu>

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};

use imbl::ordmap::DiffItem;
use ruma::events::TimelineEventType;
use ruma::{OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId, RoomId, ServerName};

use super::auth::{AuthState, check_against, check_hub, check_independent, keys_needed, state_of_auth_events};
use super::batch::Batch;
use super::events::EventMap;
use super::pdu::{Verified, create_of_room};
use super::room::Tip;
use super::snapshot::{Snapshot, StateKey};
use super::stored::{Groups, Status, Stored};
use super::version::is_shared;
use crate::guard::trip;
use crate::refusal::Refusal;
use crate::seam::{LogOrigin, Membership};
use crate::store::dag::OutboxRow;

/// How many forward extremities a room may have.
const MAX_BRANCHES: usize = 50;

/// How an event came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// In a transaction, or as an answer.
    Received,
    /// Through a handshake with this server: other servers have it from the gateway alone.
    Handshake(OwnedServerName),
    /// The gateway made it.
    Own,
    /// In a shared room: by the way of its log. Graph servers have it from the gateway alone.
    Linear(LogOrigin),
    /// The gateway made it, and another server took it and hands it round.
    Elsewhere,
}

impl Source {
    /// What the log of a shared room must know of it.
    fn log_origin(&self) -> LogOrigin {
        match self {
            Self::Received | Self::Handshake(_) => LogOrigin { foreign: true, ..LogOrigin::default() },
            Self::Own | Self::Elsewhere => LogOrigin::default(),
            Self::Linear(origin) => *origin,
        }
    }
}

/// What became of an event.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// It was checked in full, now or before.
    Known(Arc<Stored>),
    /// It cannot be checked yet: these events before it, and these auth events, are not here.
    Missing {
        /// Events before it.
        prev: Vec<OwnedEventId>,
        /// Auth events.
        auth: Vec<OwnedEventId>,
    },
}

impl Outcome {
    /// Ok when the event is part of the room.
    pub fn accepted(&self) -> Result<&Arc<Stored>, Refusal> {
        match self {
            Self::Known(event) if event.status == Status::Accepted => Ok(event),
            Self::Known(event) => {
                Err(Refusal::MatrixRule(event.reason.clone().unwrap_or_else(|| "not accepted".to_owned())))
            }
            Self::Missing { prev, auth } => {
                Err(Refusal::MatrixRule(format!("missing prev_events {prev:?} and auth_events {auth:?}")))
            }
        }
    }
}

/// How many bytes of soft-failed events are kept of a server with nobody in the room, in how many milliseconds.
const STRAY_BYTES: usize = 1 << 20;
const STRAY_TIME_MS: i64 = 86_400_000;
/// Of how many rooms and servers that is remembered; beyond it nothing is kept of new ones until some are forgotten.
const STRAY_SERVERS: usize = 10_000;

/// How much is kept of servers that have nobody in a room. In memory: a restart forgives.
#[derive(Debug, Default)]
pub(super) struct Strays(HashMap<(OwnedRoomId, OwnedServerName), (usize, i64)>);

impl Strays {
    fn takes(&mut self, room_id: &RoomId, server: &ServerName, size: usize, now: i64) -> bool {
        let fresh = |since: i64| (0..STRAY_TIME_MS).contains(&now.saturating_sub(since));
        if self.0.len() >= STRAY_SERVERS {
            self.0.retain(|_, (_, since)| fresh(*since));
        }
        let key = (room_id.to_owned(), server.to_owned());
        if self.0.len() >= STRAY_SERVERS && !self.0.contains_key(&key) {
            return false;
        }
        let (kept, since) = self.0.entry(key).or_insert((0, now));
        if !fresh(*since) {
            (*kept, *since) = (0, now);
        }
        *kept = kept.saturating_add(size);
        *kept <= STRAY_BYTES
    }
}

enum Verdict {
    Accepted,
    SoftFailed(Refusal),
    Rejected(Refusal),
}

impl Batch {
    /// Checks an event of this room and takes it in. `before` is the state before it, when that was learnt from another
    /// server because the events before it are not here.
    pub async fn accept(
        &mut self,
        event: Verified,
        source: &Source,
        before: Option<Snapshot>,
    ) -> Result<Outcome, Refusal> {
        let pdu = event.into_pdu();
        let create = create_of_room(&self.room_id);
        let ids: Vec<_> =
            pdu.prev_events.iter().chain(&pdu.auth_events).chain([&pdu.event_id]).chain(&create).cloned().collect();
        let known = self.events(&ids).await?;
        if let Some(event) = known.get(&pdu.event_id).filter(|event| event.groups.is_some()) {
            return Ok(Outcome::Known(event.clone()));
        }
        if pdu.kind == TimelineEventType::RoomCreate && !self.core.tips.is_empty() {
            return Err(Refusal::MatrixRule(format!("{} is not this room's m.room.create", pdu.event_id)));
        }
        let has_state = |id: &&OwnedEventId| known.get(*id).is_some_and(|event| event.groups.is_some());
        let prev: Vec<_> = match before {
            Some(_) => Vec::new(),
            None => pdu.prev_events.iter().filter(|id| !has_state(id)).cloned().collect(),
        };
        let auth: Vec<_> = pdu.auth_events.iter().filter(|id| !known.contains_key(*id)).cloned().collect();
        if !prev.is_empty() || !auth.is_empty() {
            return Ok(Outcome::Missing { prev, auth });
        }
        let linear = self.linear_form(&pdu)?;
        self.begin_log(&pdu, before.as_ref()).await?;
        // What came alone may have gone to the log with others.
        let linear = match known.contains_key(&pdu.event_id) && self.log_has(&pdu.event_id).await? {
            true => None,
            false => linear,
        };
        // What came in a gap is new to the log, and so is what stands behind an event that the room did not take.
        let leads_to_more =
            before.is_some() || pdu.prev_events.iter().filter_map(|id| known.get(id)).any(|event| !event.is_accepted());
        // The room as it is now; where the state before the event is another server's word, what happened in the gap is part
        // of it.
        let (before, now) = match before {
            Some(before) => {
                let now = self.merge(vec![self.core.current.clone(), before.clone()]).await?;
                (before, now)
            }
            None => {
                let mut states = Vec::new();
                for event in pdu.prev_events.iter().filter_map(|id| known.get(id)) {
                    if let Some(groups) = event.groups.filter(|_| event.pdu.room_id == self.room_id) {
                        states.push(self.snapshot(groups.after).await?);
                    }
                }
                (self.merge(states).await?, self.core.current.clone())
            }
        };
        let mut event = Stored::new(pdu);
        let mut verdict = self.judge(&event, &known, &before, &now).await?;
        let log = self.linear.mark();
        if matches!(verdict, Verdict::Accepted) {
            if leads_to_more {
                self.log_gap(&before).await?;
            }
            if let Err(refusal) = self.judge_by_log(linear.as_deref(), &known).await? {
                verdict = Verdict::SoftFailed(refusal);
            }
        }
        let verdict = match verdict {
            // Whoever sends it is told why it is not taken, and nothing of it stays.
            Verdict::SoftFailed(refusal) | Verdict::Rejected(refusal) if matches!(source, Source::Linear(_)) => {
                return Err(refusal);
            }
            Verdict::Accepted if *source == Source::Received && self.is_one_branch_too_many(&event) => {
                let limit = MAX_BRANCHES;
                Verdict::SoftFailed(Refusal::TooManyEvents { what: "set of events that nothing follows", limit })
            }
            // Whoever has nobody in the room leaves nothing behind: it costs them nothing to make such events. What is soft-failed
            // may be named by others, so some of it is kept.
            Verdict::SoftFailed(refusal) if self.is_one_stray_too_many(&event) => return Err(refusal),
            Verdict::Rejected(refusal) if !self.core.has_server(event.pdu.sender.server_name()) => return Err(refusal),
            verdict => verdict,
        };
        let after = match (&verdict, event.key()) {
            (Verdict::Accepted | Verdict::SoftFailed(_), Some(key)) => {
                self.derive(&before, &[(key, Some(event.pdu.event_id.clone()))])?
            }
            _ => before.clone(),
        };
        event.groups = Some(Groups { before: before.id, after: after.id });
        (event.status, event.reason) = match &verdict {
            Verdict::Accepted => (Status::Accepted, None),
            Verdict::SoftFailed(refusal) => (Status::SoftFailed, Some(refusal.to_string())),
            Verdict::Rejected(refusal) => (Status::Rejected, Some(refusal.to_string())),
        };
        let can_go = |id: &&OwnedEventId| known.get(*id).is_some_and(|event| event.can_go());
        let outliers: Vec<_> = event.pdu.auth_events.iter().filter(can_go).cloned().collect();
        self.need(outliers).await?;
        let event = self.stage(event);
        if event.status == Status::Accepted {
            if let Some(linear) = linear {
                let comes = self.comes_by_the_log(&event);
                self.linear.push(linear, LogOrigin { comes, ..source.log_origin() });
            }
            self.take_in(&event, source, &before, after).await?;
        } else {
            // What the room is does not follow from it, and so not what the log is.
            self.linear.back_to(log);
            tracing::info!(room = %self.room_id, event = %event.pdu.event_id, status = ?event.status,
                reason = event.reason, "event was not accepted");
        }
        self.redact_late(&event).await?;
        Box::pin(self.correct_after(&event)).await?;
        Ok(Outcome::Known(event))
    }

    /// Takes in an auth event of which the state is not known: it is checked against its own auth events alone. None when
    /// those are not here.
    pub async fn accept_outlier(&mut self, event: Verified) -> Result<Option<Arc<Stored>>, Refusal> {
        let pdu = event.into_pdu();
        let create = create_of_room(&self.room_id);
        let ids: Vec<_> = pdu.auth_events.iter().chain([&pdu.event_id]).chain(&create).cloned().collect();
        let known = self.events(&ids).await?;
        if let Some(event) = known.get(&pdu.event_id) {
            return Ok(Some(event.clone()));
        }
        if pdu.kind == TimelineEventType::RoomCreate && !self.core.tips.is_empty() {
            return Err(Refusal::MatrixRule(format!("{} is not this room's m.room.create", pdu.event_id)));
        }
        if pdu.auth_events.iter().any(|id| !known.contains_key(id)) {
            return Ok(None);
        }
        let mut event = Stored::new(pdu);
        if let Err(refusal) = self.check_by_auth_events(&event, &known) {
            (event.status, event.reason) = (Status::Rejected, Some(refusal.to_string()));
        }
        let event = self.stage(event);
        self.redact_late(&event).await?;
        Ok(Some(event))
    }

    /// Whether a room in which the gateway cannot join branches ([`Batch::join_branches`]) would get more than it looks at.
    /// What follows such an event and a branch that is known brings it back.
    fn is_one_branch_too_many(&self, event: &Stored) -> bool {
        let tips = &self.core.tips;
        tips.len() >= MAX_BRANCHES && !tips.iter().any(|tip| event.pdu.prev_events.contains(&tip.event_id))
    }

    /// Whether a server with nobody in the room has had enough kept of what the room does not take; counts it.
    fn is_one_stray_too_many(&self, event: &Stored) -> bool {
        let server = event.pdu.sender.server_name();
        if self.core.has_server(server) {
            return false;
        }
        let now = self.shared.context.clock.now_ms();
        let size = event.pdu.raw.get().len();
        !self.shared.strays.lock().unwrap_or_else(PoisonError::into_inner).takes(&self.room_id, server, size, now)
    }

    fn stage(&mut self, mut event: Stored) -> Arc<Stored> {
        let seq = self.shared.context.store.next_id();
        if is_shared(self.version) {
            event.pdu.depth = seq;
        }
        let event = Arc::new(event);
        self.changes.events.push(event.to_row(seq));
        self.absent.remove(&event.pdu.event_id);
        self.put_staged(event.clone());
        event
    }

    fn check_by_auth_events(&self, event: &Stored, known: &EventMap) -> Result<AuthState, Refusal> {
        check_independent(event, known, &self.rules.authorization)?;
        let by_auth_events = state_of_auth_events(event, known);
        check_against(event, &by_auth_events, &self.rules.authorization)?;
        check_hub(event, &by_auth_events)?;
        Ok(by_auth_events)
    }

    async fn judge(
        &self,
        event: &Stored,
        known: &EventMap,
        before: &Snapshot,
        now: &Snapshot,
    ) -> Result<Verdict, Refusal> {
        let foreign = event.pdu.prev_events.iter().filter_map(|id| known.get(id));
        if let Some(prev) = foreign.into_iter().find(|prev| prev.pdu.room_id != self.room_id) {
            let problem = format!("prev event {} is of room {}", prev.pdu.event_id, prev.pdu.room_id);
            return Ok(Verdict::Rejected(Refusal::MatrixRule(problem)));
        }
        let by_auth_events = match self.check_by_auth_events(event, known) {
            Ok(state) => state,
            Err(refusal) => return Ok(Verdict::Rejected(refusal)),
        };
        let rules = &self.rules.authorization;
        // Mostly the auth events are what stands in the state before, and that is what stands in the current state: then
        // there is nothing else to check.
        let by_state = self.auth_state(event, before).await?;
        if !same(&by_state, &by_auth_events)
            && let Err(refusal) = check_against(event, &by_state, rules)
        {
            return Ok(Verdict::Rejected(refusal));
        }
        if now.id != before.id {
            let by_current = self.auth_state(event, now).await?;
            if !self.core.tips.is_empty()
                && !same(&by_current, &by_state)
                && let Err(refusal) = check_against(event, &by_current, rules)
            {
                return Ok(Verdict::SoftFailed(refusal));
            }
        }
        Ok(Verdict::Accepted)
    }

    /// What of a state an event is checked against.
    pub async fn auth_state(&self, event: &Stored, state: &Snapshot) -> Result<AuthState, Refusal> {
        let keys = keys_needed(&event.pdu, &self.rules.authorization)?;
        let ids: Vec<_> = keys.iter().filter_map(|key| state.map.get(key).cloned()).collect();
        let events = self.shared.events.with_staged(&ids, &self.staged).await?;
        Ok(events.into_values().filter_map(|event| Some((event.key()?, event))).collect())
    }

    async fn take_in(
        &mut self,
        event: &Arc<Stored>,
        source: &Source,
        before: &Snapshot,
        after: Snapshot,
    ) -> Result<(), Refusal> {
        let pdu = &event.pdu;
        self.core.tips.retain(|tip| !pdu.prev_events.contains(&tip.event_id));
        self.core.tips.push(Tip { event_id: pdu.event_id.clone(), depth: pdu.depth, after });
        match source {
            Source::Received => self.inbox.push(pdu.event_id.clone()),
            Source::Handshake(origin) => {
                self.inbox.push(pdu.event_id.clone());
                self.queue(event, Some(origin.clone()));
            }
            Source::Own | Source::Linear(_) => {
                self.queue(event, None);
                self.tell_ended_membership(event, before).await?;
            }
            Source::Elsewhere => {}
        }
        trip("apply", &pdu.kind);
        let states = self.core.tips.iter().map(|tip| tip.after.clone()).collect();
        let current = self.merge(states).await?;
        self.set_current(current).await?;
        self.redact(event).await
    }

    fn queue(&mut self, event: &Stored, not_to: Option<OwnedServerName>) {
        self.core.head = self.core.head.saturating_add(1);
        let event_id = event.pdu.event_id.clone();
        self.changes.outbox.push(OutboxRow { position: self.core.head, event_id, not_to });
    }

    /// Who was invited, or has knocked, and has nobody of their server in the room, is told when that ends. In a shared room that
    /// server may be one of LM, which knows no transactions of Matrix: there its log tells, each by what it knows.
    async fn tell_ended_membership(&mut self, event: &Stored, before: &Snapshot) -> Result<(), Refusal> {
        let (Some(user), Some(Membership::Leave | Membership::Ban)) = (&event.pdu.state_key, event.membership()) else {
            return Ok(());
        };
        let Ok(user) = OwnedUserId::try_from(user.as_str()) else { return Ok(()) };
        let server = user.server_name();
        let is_told = self.linear.log.is_some() || self.core.has_server(server);
        if is_told || server == self.shared.context.server_name {
            return Ok(());
        }
        let Some(id) = before.get("m.room.member", user.as_str()).cloned() else { return Ok(()) };
        let events = self.shared.events.with_staged(std::slice::from_ref(&id), &self.staged).await?;
        let was = events.get(&id).and_then(|event| event.membership());
        if matches!(was, Some(Membership::Invite | Membership::Knock)) {
            self.once.push((server.to_owned(), self.core.head));
        }
        Ok(())
    }

    /// Makes `new` the current state, and follows who is joined.
    pub(super) async fn set_current(&mut self, new: Snapshot) -> Result<(), Refusal> {
        let old = std::mem::replace(&mut self.core.current, new);
        if old.id == self.core.current.id {
            return Ok(());
        }
        let mut members: Vec<(String, Option<OwnedEventId>)> = Vec::new();
        for item in old.map.diff(&self.core.current.map) {
            match item {
                DiffItem::Add((kind, user), id) | DiffItem::Update { new: ((kind, user), id), .. } => {
                    self.linear.changed(kind, user);
                    if kind == "m.room.member" {
                        members.push((user.clone(), Some(id.clone())));
                    }
                }
                DiffItem::Remove((kind, user), _) => {
                    self.linear.changed(kind, user);
                    if kind == "m.room.member" {
                        members.push((user.clone(), None));
                    }
                }
            }
        }
        let ids: Vec<_> = members.iter().filter_map(|(_, id)| id.clone()).collect();
        let events = self.shared.events.with_staged(&ids, &self.staged).await?;
        for (user, id) in members {
            let Ok(user) = OwnedUserId::try_from(user.as_str()) else { continue };
            let event = id.and_then(|id| events.get(&id));
            let by_hub = event.is_some_and(|event| event.pdu.hub_server.is_some());
            let membership = event.and_then(|event| event.membership());
            self.set_joined(user, membership == Some(Membership::Join), by_hub);
        }
        Ok(())
    }

    /// Whether this is a join by which a server is, or stays, one of those that get the log.
    fn comes_by_the_log(&self, event: &Stored) -> bool {
        let server = event.pdu.sender.server_name();
        event.pdu.hub_server.is_some()
            && event.membership() == Some(Membership::Join)
            && (!self.core.has_server(server) || self.core.linear.contains(server))
    }

    /// A server whose first user comes by the hub is one of LM: the log is for it, the outbox not.
    fn set_joined(&mut self, user: OwnedUserId, joined: bool, by_hub: bool) {
        if self.core.joined.contains(&user) == joined {
            return;
        }
        let server = user.server_name().to_owned();
        if self.core.set_joined(&user, joined) && server != self.shared.context.server_name {
            let linear = if joined { by_hub } else { self.core.linear.remove(&server).is_some() };
            if linear && joined {
                self.core.linear.insert(server);
            } else if !linear {
                self.changes.windows.push((server, self.core.head, joined));
            }
        }
        self.changes.joined.push((user, joined));
    }
}

fn same(one: &AuthState, other: &AuthState) -> bool {
    let stands = |(key, event): (&StateKey, &Arc<Stored>)| {
        other.get(key).is_some_and(|other| other.pdu.event_id == event.pdu.event_id)
    };
    one.len() == other.len() && one.iter().all(stands)
}

#[cfg(test)]
mod tests {
    use ruma::{room_id, server_name};

    use super::*;

    #[test]
    fn of_a_server_with_nobody_in_the_room_only_so_much_is_kept_a_day() {
        let (mut strays, room, evil) = (Strays::default(), room_id!("!r:g"), server_name!("evil.example"));
        let kept = |strays: &mut Strays, now| (0..100).filter(|_| strays.takes(room, evil, 60_000, now)).count();
        assert_eq!(kept(&mut strays, 5), STRAY_BYTES / 60_000);
        assert_eq!(kept(&mut strays, STRAY_TIME_MS), 0);
        assert!(strays.takes(room, server_name!("other.example"), 60_000, 6));
        assert_eq!(kept(&mut strays, STRAY_TIME_MS + 5), STRAY_BYTES / 60_000);
    }
}
