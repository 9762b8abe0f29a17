//! LPDUs of the gateway's users on their way to a hub: queued with their effects, looked for before they are sent a second
//! time, and judged by the hub.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ruma::{OwnedEventId, OwnedServerName, RoomId, ServerName, UserId};
use serde_json::Value;

use super::actor::template;
use super::room::{Facts, Snapshot, Subject};
use super::rooms::{RoomCell, lock};
use super::{Appended, Coming, Lm, Sent};
use crate::event::{Lpdu, Object, Redaction, canonical_json};
use crate::federation::{Delivery, Feed, FeedKind, OutboundQueues};
use crate::refusal::Refusal;
use crate::seam::{Draft, EffectsOf, EventEffect, Outgoing, write_effects_until_one_fails};
use crate::store::lm as stored;
use crate::store::{Store, StoreError, Tx};

/// How long the echo of an LPDU is waited for.
const ECHO: Duration = Duration::from_secs(20);
/// How long after a look at a hub's log it is looked whether more of a transaction has come.
const SETTLING: Duration = Duration::from_secs(2);
/// How long a refusal waits for what the hub has sent to be taken.
const INTAKE: Duration = Duration::from_secs(5);

impl Lm {
    /// Queues events of our users for the hub, but for those that the rules forbid by all that is known of the room here.
    pub(super) async fn send_as_participant(
        &self,
        cell: &Arc<RoomCell>,
        mut room: Arc<Snapshot>,
        events: Vec<Outgoing>,
    ) -> Vec<Result<Sent, Refusal>> {
        // What judges them may be newer. For another hub they are not: who asked goes by this one.
        let facts = room.facts.clone();
        let mut signed = Vec::with_capacity(events.len());
        for Outgoing { draft, effect } in events {
            signed.push(match self.may_send(cell, &mut room, &draft).await {
                // At once: what comes after it may depend on it.
                Ok(()) => self.sign_ahead(cell, &facts, &draft, room.redaction).map(|lpdu| (lpdu, effect)),
                Err(refusal) => Err(refusal),
            });
        }
        self.queue_lpdus(cell, &facts, signed).await
    }

    fn sign_ahead(&self, cell: &RoomCell, facts: &Facts, draft: &Draft, redaction: Redaction) -> Result<Lpdu, Refusal> {
        let lpdu = self.sign_as(facts, draft, redaction)?;
        lock(&cell.ahead).add(&lpdu.lpdu_id, draft);
        Ok(lpdu)
    }

    async fn queue_lpdus(
        &self,
        cell: &RoomCell,
        facts: &Facts,
        lpdus: Vec<Result<(Lpdu, Option<EventEffect>), Refusal>>,
    ) -> Vec<Result<Sent, Refusal>> {
        let mut results: Vec<Result<Sent, Refusal>> = Vec::with_capacity(lpdus.len());
        let (mut places, mut queue) = (Vec::new(), Vec::new());
        for lpdu in lpdus {
            results.push(lpdu.map(|(lpdu, effect)| {
                places.push(results.len());
                queue.push((lpdu.lpdu_id.clone(), canonical_json(&lpdu.json), effect));
                Sent::Queued { lpdu_id: lpdu.lpdu_id }
            }));
        }
        if queue.is_empty() {
            return results;
        }
        let job = Queueing {
            store: self.context().store.clone(),
            feed: Feed { kind: FeedKind::Lpdus, room_id: facts.room_id.clone() },
            hub: facts.hub.clone(),
            queue,
        };
        let feed = job.feed.clone();
        let written = self.context().store.write(move |tx| Box::pin(job.run(tx))).await;
        let failures = match written {
            Ok(failures) => failures,
            Err(error) => places.iter().map(|_| Some(error.clone())).collect(),
        };
        for (place, failure) in places.into_iter().zip(failures) {
            if let (Some(error), Some(result)) = (failure, results.get_mut(place)) {
                if let Ok(Sent::Queued { lpdu_id }) = result {
                    lock(&cell.ahead).settle(lpdu_id);
                }
                *result = Err(error.into());
            }
        }
        self.context().outbound.wake(&feed, std::slice::from_ref(&facts.hub));
        results
    }

    /// Whether an event of ours can be allowed at the hub, by the log as far as it is known here and by what is on its way
    /// there. `room` is brought up to date before it is the reason of a refusal.
    pub(super) async fn may_send(
        &self,
        cell: &RoomCell,
        room: &mut Arc<Snapshot>,
        draft: &Draft,
    ) -> Result<(), Refusal> {
        let subject = Subject::draft(draft, Some(true));
        let refused = lock(&cell.ahead).judge(room, &subject);
        if refused.is_ok() {
            return Ok(());
        }
        if self.is_behind(cell).await {
            // Only the hub knows.
            return Ok(());
        }
        // What the hub has just sent may allow it.
        let _taken = tokio::time::timeout(INTAKE, cell.intake.lock()).await;
        *room = cell.snapshot(&self.context().store).await?;
        lock(&cell.ahead).judge(room, &subject)
    }

    /// An LPDU of one of our users.
    pub(super) fn sign(&self, facts: &Facts, draft: &Draft) -> Result<Lpdu, Refusal> {
        self.sign_as(facts, draft, Redaction::Draft)
    }

    fn sign_as(&self, facts: &Facts, draft: &Draft, redaction: Redaction) -> Result<Lpdu, Refusal> {
        let context = self.context();
        self.is_own(&draft.sender)?;
        let (own, key) = (&context.server_name, &context.signing_key);
        Lpdu::build_as(template(&facts.room_id, draft), &facts.hub, redaction, own, key)
    }

    /// Only this gateway's users speak through it.
    pub(super) fn is_own(&self, user: &UserId) -> Result<(), Refusal> {
        let own = &self.context().server_name;
        match user.server_name() == own {
            true => Ok(()),
            false => Err(Refusal::WrongOrigin { origin: own.to_string(), expected: user.server_name().to_string() }),
        }
    }

    /// Sends one event and waits until the hub has put it into the log. Who waits for the hub is judged by the hub alone,
    /// which may know more of the room than is known here.
    pub(super) async fn send_and_wait(
        &self,
        cell: &Arc<RoomCell>,
        facts: &Facts,
        draft: Draft,
    ) -> Result<Appended, Refusal> {
        // Of a membership both tables keep the same.
        let lpdu = self.sign_ahead(cell, facts, &draft, Redaction::Draft)?;
        let lpdu_id = lpdu.lpdu_id.clone();
        let echo = cell.wait_for(&lpdu_id);
        let sent = self.queue_lpdus(cell, facts, vec![Ok((lpdu, None))]).await.pop();
        sent.ok_or_else(|| Refusal::Internal("not queued".to_owned()))??;
        // It may be there from an earlier attempt, of which no further echo comes.
        if let Some(appended) = self.event_of_lpdu(&lpdu_id).await? {
            return Ok(appended);
        }
        match tokio::time::timeout(ECHO, echo).await {
            Ok(Ok(fate)) => fate,
            _ => Err(Refusal::Remote {
                server: facts.hub.to_string(),
                problem: format!("{lpdu_id} did not come back within {} s", ECHO.as_secs()),
            }),
        }
    }

    pub(super) async fn read_lpdus(
        &self,
        room_id: &RoomId,
        hub: &ServerName,
        after: i64,
        until: Option<i64>,
        limit: usize,
    ) -> Result<Vec<Delivery>, StoreError> {
        if self.looks().is_lost(room_id) {
            return Ok(Vec::new());
        }
        let max = i64::try_from(limit).unwrap_or(i64::MAX);
        let rows = stored::lpdus_after(&self.context().store, room_id, after, max).await?;
        let is_all = rows.len() < limit;
        let mut found: Vec<Delivery> = rows
            .into_iter()
            .filter(|row| until.is_none_or(|until| row.position <= until))
            .map(|row| Delivery { position: row.position, event: is_for(hub, &row.json).then(|| row.json.into()) })
            .collect();
        if is_all || found.is_empty() {
            // What was answered meanwhile is gone from the store.
            Delivery::pass_on(&mut found, until);
        }
        Ok(found)
    }

    /// Whether what is queued for the hub waits: what our users said before waits too, and nothing goes before it.
    pub(super) async fn holds_lpdus_back(&self, room_id: &RoomId, hub: &ServerName) -> Result<bool, StoreError> {
        let Some(cell) = self.rooms().find(room_id).await? else { return Ok(false) };
        let room = cell.snapshot(&self.context().store).await?;
        Ok(room.facts.hub == *hub && (cell.has_stranded() || lock(&cell.ahead).has_misdirected()))
    }

    /// What waited for the hub goes on.
    pub(super) fn send_on(&self, room_id: &RoomId, hub: &ServerName) {
        let feed = Feed { kind: FeedKind::Lpdus, room_id: room_id.to_owned() };
        self.context().outbound.wake(&feed, &[hub.to_owned()]);
    }

    /// Which of the LPDUs at `positions` are in the hub's log already. It is looked for to the end of the hub's log where
    /// the hub tells that end, as those do that know no transaction again. Others go by the draft, and take the same
    /// transaction once: of those what was not seen may be sent again.
    pub(super) async fn lpdus_at_hub(
        &self,
        room_id: &RoomId,
        hub: &ServerName,
        positions: &[i64],
    ) -> Result<Vec<i64>, Refusal> {
        let lpdus = stored::queued_lpdus(&self.context().store, room_id, positions).await?;
        let delivered = self.echoed(&lpdus).await?;
        if delivered.len() == lpdus.len() {
            return Ok(delivered);
        }
        if self.find(room_id).await?.1.facts.hub != hub {
            // Its log ended where it was handed over, and all of that is here, or will be.
            return Ok(delivered);
        }
        let mut seen = None;
        while self.catch_up(room_id, hub).await? {
            let found = self.echoed(&lpdus).await?;
            // There are hubs that hand each event round before they take the next: one may still be at it.
            if lpdus.len() < 2 || found.len() == lpdus.len() || seen == Some(found.len()) {
                return Ok(found);
            }
            seen = Some(found.len());
            tokio::time::sleep(SETTLING).await;
        }
        self.echoed(&lpdus).await
    }

    async fn echoed(&self, lpdus: &[stored::LpduRow]) -> Result<Vec<i64>, Refusal> {
        let ids: Vec<_> = lpdus.iter().map(|lpdu| &*lpdu.lpdu_id).collect();
        let known = stored::positions_of_lpdus(&self.context().store, &ids).await?;
        Ok(lpdus.iter().filter(|lpdu| known.contains_key(&lpdu.lpdu_id)).map(|lpdu| lpdu.position).collect())
    }

    /// The last event of each of these types and state keys that is on its way to the room's hub.
    pub async fn on_its_way(
        &self,
        room_id: &RoomId,
        keys: &[(String, String)],
    ) -> Result<BTreeMap<(String, String), Coming>, Refusal> {
        let (cell, _) = self.find(room_id).await?;
        let ahead = lock(&cell.ahead);
        Ok(keys.iter().filter_map(|key| Some((key.clone(), ahead.last(&key.0, &key.1)?.clone()))).collect())
    }

    /// What the hub has taken is expected back for some time only.
    async fn taken(&self, room_id: &RoomId, positions: &[i64]) -> Result<(), Refusal> {
        let Some(cell) = self.rooms().find(room_id).await? else { return Ok(()) };
        if lock(&cell.ahead).is_empty() {
            return Ok(());
        }
        for lpdu in stored::queued_lpdus(&self.context().store, room_id, positions).await? {
            lock(&cell.ahead).taken(&lpdu.lpdu_id);
        }
        Ok(())
    }

    /// The hub has answered: what it refused is told, and nothing waits any more.
    pub(super) async fn lpdus_answered(
        &self,
        room_id: &RoomId,
        hub: &ServerName,
        positions: &[i64],
        answer: &Object,
    ) -> Result<(), Refusal> {
        let store = &self.context().store;
        let failed = answer.get("failed_pdus").and_then(Value::as_object);
        // A transaction of one event may be refused as a whole.
        let refused = answer.get("errcode").and_then(Value::as_str).map(|_| answer);
        self.taken(room_id, positions).await?;
        let (mut left, mut refused_at): (Vec<i64>, Vec<i64>) = Default::default();
        let mut named = None;
        if refused.is_some() || failed.is_some_and(|failed| !failed.is_empty()) {
            let cell = self.rooms().find(room_id).await?;
            let hub_now = match &cell {
                Some(cell) => Some(cell.snapshot(store).await?.facts.hub.clone()),
                None => None,
            };
            for lpdu in stored::queued_lpdus(store, room_id, positions).await? {
                let why = failed.and_then(|failed| failed.get(lpdu.lpdu_id.as_str())?.as_object()).or(refused);
                let Some(why) = why else { continue };
                let is_hub = why.get("errcode").and_then(Value::as_str) != Some("M_WRONG_SERVER");
                if !is_hub || hub_now.as_ref().is_some_and(|now| now != hub) {
                    // No verdict on the event: it goes to whoever keeps the log now, as soon as that is known here.
                    left.push(lpdu.position);
                    let hub_server = why.get("hub_server").and_then(Value::as_str);
                    named = named.or(hub_server.and_then(|name| ServerName::parse(name).ok()));
                    continue;
                }
                refused_at.push(lpdu.position);
                let why = why.get("error").and_then(Value::as_str).unwrap_or("no reason given");
                let why: String = why.chars().take(500).collect();
                tracing::info!(room = %room_id, %hub, event = %lpdu.lpdu_id, why, "the hub refused an event");
                if let Some(cell) = &cell {
                    cell.settle(&lpdu.lpdu_id, &Err(Refusal::Forbidden(format!("{hub}: {why}"))));
                }
                self.between().lpdu_refused(room_id, &lpdu.lpdu_id, &why).await?;
            }
        }
        let cell = self.rooms().find(room_id).await?;
        if let Some(cell) = cell.as_ref().filter(|_| left.is_empty()) {
            lock(&cell.ahead).directed();
        }
        let misdirected = cell.filter(|_| !left.is_empty());
        // What is replaced is not moved meanwhile.
        let _replacing = match &misdirected {
            Some(cell) => Some(cell.replacing.lock().await),
            None => None,
        };
        let is_taken = |position: &i64| !left.contains(position) && !refused_at.contains(position);
        let taken: Vec<i64> = positions.iter().copied().filter(is_taken).collect();
        let (feed, now) = (Feed { kind: FeedKind::Lpdus, room_id: room_id.to_owned() }, self.context().clock.now_ms());
        let (ids, to, is_left) = (store.clone(), hub.to_owned(), !left.is_empty());
        let job = store.write(move |tx| {
            Box::pin(async move {
                stored::forget_lpdus(tx, &feed.room_id, &refused_at).await?;
                stored::take_lpdus(tx, &feed.room_id, &taken, now).await?;
                match is_left && stored::is_hub(tx, &feed.room_id, &to).await? {
                    true => queue_again(tx, &ids, &feed, &to).await,
                    false => Ok(()),
                }
            })
        });
        job.await?;
        if let Some(cell) = &misdirected {
            tracing::info!(room = %room_id, %hub, events = left.len(), "the hub says that it is not the hub any more");
            self.wrong_server(cell, hub, named).await?;
        }
        self.expect_taken(room_id).await
    }

    /// A server to which LPDUs were sent says that it is not the hub: where another is known they are replaced, else it is looked for.
    async fn wrong_server(
        &self,
        cell: &Arc<RoomCell>,
        hub: &ServerName,
        named: Option<OwnedServerName>,
    ) -> Result<(), Refusal> {
        let store = &self.context().store;
        if cell.snapshot(store).await?.facts.hub == hub {
            lock(&cell.ahead).misdirected();
        }
        if cell.snapshot(store).await?.facts.hub == hub {
            self.seek_hub_in_time(cell, named.unwrap_or_else(|| hub.to_owned()));
            return Ok(());
        }
        // Also where that became known just now: nothing waits for the search then.
        lock(&cell.ahead).go_on();
        cell.strand();
        self.replace_in_background(cell);
        Ok(())
    }
}

/// Puts what a hub left to the end of the queue, and all that is behind it after that, so that the order stays.
async fn queue_again(tx: &mut Tx, ids: &Store, feed: &Feed, hub: &ServerName) -> Result<(), StoreError> {
    let mut last = None;
    for from in stored::waiting_lpdus(tx, &feed.room_id).await? {
        let to = ids.next_id();
        if stored::requeue_lpdu(tx, &feed.room_id, from, to).await? {
            if last.is_none() {
                OutboundQueues::subscribe(tx, hub, feed, to.saturating_sub(1)).await?;
            }
            last = Some(to);
        }
    }
    match last {
        Some(last) => OutboundQueues::advance(tx, feed, last).await,
        None => Ok(()),
    }
}

/// Whether an LPDU that is queued is for this hub.
pub(super) fn is_for(hub: &ServerName, lpdu: &[u8]) -> bool {
    #[derive(serde::Deserialize)]
    struct Peek<'a> {
        #[serde(borrow)]
        hub_server: std::borrow::Cow<'a, str>,
    }
    serde_json::from_slice(lpdu).is_ok_and(|peek: Peek<'_>| peek.hub_server == hub.as_str())
}

/// The write job that queues LPDUs.
struct Queueing {
    store: Store,
    feed: Feed,
    hub: OwnedServerName,
    queue: Vec<(OwnedEventId, Vec<u8>, Option<EventEffect>)>,
}

impl Queueing {
    /// Queues each with its effect, or neither; says for each what failed.
    async fn run(self, tx: &mut Tx) -> Result<Vec<Option<StoreError>>, StoreError> {
        if !stored::is_hub(tx, &self.feed.room_id, &self.hub).await? {
            return Err(StoreError::Withdrawn("another server keeps the log now"));
        }
        let failures = self.effects(tx).await?;
        let mut last = None;
        for ((lpdu_id, json, _), _) in self.queue.iter().zip(&failures).filter(|(_, failure)| failure.is_none()) {
            let position = self.store.next_id();
            if last.is_none() {
                OutboundQueues::subscribe(tx, &self.hub, &self.feed, position.saturating_sub(1)).await?;
            }
            stored::queue_lpdu(tx, &self.feed.room_id, position, lpdu_id, json).await?;
            last = Some(position);
        }
        if let Some(last) = last {
            OutboundQueues::advance(tx, &self.feed, last).await?;
        }
        Ok(failures)
    }

    /// Writes the effects of those that have one; says for each what failed.
    async fn effects(&self, tx: &mut Tx) -> Result<Vec<Option<StoreError>>, StoreError> {
        let with_effect = self
            .queue
            .iter()
            .enumerate()
            .filter_map(|(index, (lpdu_id, _, effect))| Some((index, (effect.clone()?, lpdu_id.clone()))));
        let (indexes, effects): (Vec<usize>, EffectsOf) = with_effect.unzip();
        let mut failures = vec![None; self.queue.len()];
        let mut tried = 0_usize;
        while let Some(rest) = effects.get(tried..).filter(|rest| !rest.is_empty()) {
            let (written, failure) = write_effects_until_one_fails(tx, rest).await?;
            tried = tried.saturating_add(written);
            let failed = indexes.get(tried).and_then(|index| failures.get_mut(*index));
            if let (Some(failure), Some(place)) = (failure, failed) {
                *place = Some(failure);
                tried = tried.saturating_add(1);
            }
        }
        Ok(failures)
    }
}
