//! The worker of one destination: has a transaction composed, keeps its composition, sends it until it is answered, and
//! keeps what has arrived.

mod failing;

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use ruma::OwnedServerName;
use serde::Deserialize;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::compose::{Composed, Composer, Part, Transaction, part_rows};
use super::slot::{News, Slot};
use super::verdict::{is_refusal, may_be_about_events, still_alone};
use super::wire::Envelope;
use super::{Feed, FeedKind, Shared, lock};
use crate::admin::metrics;
use crate::event::{Edu, Object};
use crate::federation::RemoteError;
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::store::StoreError;
use crate::store::outbound::{self as rows, InflightRow, PartRow};

/// How long a worker stays when there is nothing to do.
const LINGER: Duration = Duration::from_secs(20);
/// How often an answer that cannot be recorded is had again.
const TELLS: i64 = 10;
/// How long EDUs alone may take, and how long when events wait behind them.
const EDUS_LAST: Duration = Duration::from_secs(10);
const EDUS_LAST_BEFORE_EVENTS: Duration = Duration::from_secs(1);
/// How long is waited when the store fails.
const STORE_PAUSE: Duration = Duration::from_secs(5);

pub(super) struct Worker<'a> {
    shared: &'a Shared,
    destination: &'a OwnedServerName,
    slot: &'a Slot,
    stop: &'a CancellationToken,
    failures: i64,
    /// Since when the destination has taken nothing, in milliseconds; 0 when it does, or when that is not known.
    since: i64,
    /// Whether it answered when something was sent to it last.
    answers: bool,
    /// How often the transaction was answered in a way that may be about its events, and since when.
    tries: u32,
    tried_since: Option<Instant>,
    /// How many events are still to be sent one by one, because the batch that they were in was refused.
    singles: usize,
    /// What was in a transaction that was split, of which some may have arrived.
    doubtful: Vec<PartRow>,
    /// The feeds of which one event is left alone for a while, because the destination failed on it.
    parked: HashMap<Feed, Parked>,
    /// What has arrived and is still to be kept.
    done: Option<Vec<PartRow>>,
    /// Whether the record of failures is still to be taken away.
    recovered: bool,
    /// Whether what has news is to be read from the store again: what was taken from memory was given up.
    lost: bool,
}

/// An event on which the destination failed.
struct Parked {
    /// Until when it is left alone; none when it is to be tried again.
    until: Option<Instant>,
    tries: u32,
    since: Option<Instant>,
}

impl<'a> Worker<'a> {
    pub(super) fn new(
        shared: &'a Shared,
        destination: &'a OwnedServerName,
        slot: &'a Slot,
        stop: &'a CancellationToken,
        lost: bool,
    ) -> Self {
        let doubtful = Vec::new();
        Self {
            shared,
            destination,
            slot,
            stop,
            failures: 0,
            since: 0,
            answers: false,
            tries: 0,
            tried_since: None,
            singles: 0,
            doubtful,
            parked: HashMap::new(),
            done: None,
            recovered: false,
            lost,
        }
    }

    /// Works until there is nothing to do, or until all is stopped.
    pub(super) async fn run(mut self) {
        let mut current = None;
        let mut resumed = false;
        while !self.stop.is_cancelled() {
            let step = async {
                if self.lost {
                    self.slot.everything_again(&self.shared.store, self.destination).await?;
                    self.lost = false;
                }
                if !resumed {
                    current = self.resume().await?;
                    resumed = true;
                }
                if current.is_none() {
                    let held = self.held();
                    match self.composer().compose(self.singles > 0, self.done.as_deref(), &held).await? {
                        Composed::Nothing => {
                            self.keep(Vec::new(), None).await?;
                            return Ok(self.is_idle().await);
                        }
                        Composed::Passed(parts) => self.keep(part_rows(&parts), None).await?,
                        Composed::Transaction(mut transaction) => {
                            self.go_on_with_parked(&transaction);
                            transaction.uncertain |= self.is_doubtful(&transaction);
                            self.keep(Vec::new(), Some(&transaction)).await?;
                            current = Some(transaction);
                        }
                        Composed::Edus(transaction) => {
                            self.keep(Vec::new(), None).await?;
                            self.send_edus(&transaction).await;
                        }
                    }
                }
                if let Some(transaction) = current.take() {
                    current = self.attempt(transaction).await?;
                }
                Ok::<_, StoreError>(false)
            };
            match step.await {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => {
                    tracing::error!(%error, server = %self.destination, "the outbound queue waits for the store");
                    (resumed, current, self.done, self.lost) = (false, None, None, true);
                    self.pause(STORE_PAUSE).await;
                }
            }
        }
        if let Err(error) = self.keep(Vec::new(), None).await {
            tracing::error!(%error, server = %self.destination, "what was sent last is sent again by the next start");
        }
    }

    fn composer(&self) -> Composer<'a> {
        Composer { shared: self.shared, destination: self.destination, slot: self.slot }
    }

    /// What was on its way when the last worker ended.
    async fn resume(&mut self) -> Result<Option<Transaction>, StoreError> {
        let name = self.destination.as_str();
        if let Some(failure) = rows::failure(&self.shared.store, name).await? {
            (self.failures, self.since, self.answers) = (failure.failures, failure.since_ts, failure.answers);
            let left = still_alone(failure.retry_at, self.shared.clock.now_ms(), failure.failures);
            if !left.is_zero() {
                self.slot.edus().silence(Instant::now(), left);
                self.pause_until_heard(left).await;
                self.slot.edus().is_back();
            }
        }
        let Some(row) = rows::inflight(&self.shared.store, name).await? else { return Ok(None) };
        let (doubtful, parts): (Vec<PartRow>, Vec<PartRow>) = row.parts.into_iter().partition(|part| part.doubtful);
        self.doubtful = doubtful;
        if parts.is_empty() {
            return Ok(None);
        }
        let parts = parts.into_iter().map(|part| {
            Ok::<_, StoreError>(Part {
                feed: Feed::parse(&part.kind, part.room_id)?,
                after: part.after,
                through: part.through,
                positions: part.positions,
                is_last: part.is_last,
                events: None,
            })
        });
        let parts = parts.collect::<Result<Vec<_>, StoreError>>()?;
        // The end of the part that is on its way need not be the end of the feed.
        for part in &parts {
            self.slot.add(part.feed.clone(), News::Ask);
        }
        let protocol = parts.first().map_or(Side::Matrix, |part| part.feed.kind.protocol());
        let (txn_id, composed_ts) = (row.txn_id, row.composed_ts);
        Ok(Some(Transaction { txn_id, composed_ts, protocol, parts, edus: Vec::new(), uncertain: true }))
    }

    /// Waits for news; true when there is none for a while, and the destination is forgotten.
    async fn is_idle(&self) -> bool {
        if let Some(next) = self.parked.values().filter_map(|parked| parked.until).min() {
            tokio::select! {
                () = self.slot.news() => {}
                () = self.stop.cancelled() => {}
                () = tokio::time::sleep_until(next) => {}
            }
            return false;
        }
        tokio::select! {
            () = self.slot.news() => return false,
            () = self.stop.cancelled() => return false,
            () = tokio::time::sleep(LINGER) => {}
        }
        // News comes under this lock.
        let mut slots = lock(&self.shared.slots);
        // Who did not take EDUs is remembered for as long as that counts.
        let idle = self.slot.is_clean() && !self.slot.edus().is_silent(Instant::now());
        if idle {
            slots.remove(self.destination);
        }
        idle
    }

    /// Keeps, in one write, what has arrived, what was passed over, and the transaction that comes next.
    async fn keep(&mut self, passed: Vec<PartRow>, next: Option<&Transaction>) -> Result<(), StoreError> {
        let (done, recovered) = (self.done.take(), self.recovered);
        if done.is_none() && passed.is_empty() && next.is_none() {
            return Ok(());
        }
        let (name, ended) = (self.destination.to_string(), done.is_some());
        let next = match next {
            None if self.doubtful.is_empty() || !ended => None,
            next => Some(self.row(next)),
        };
        let mut arrived = done.unwrap_or_default();
        arrived.extend(passed);
        self.shared
            .store
            .write(move |tx| {
                Box::pin(async move {
                    rows::arrived(tx, &name, &arrived).await?;
                    match next {
                        Some(next) => rows::keep_inflight(tx, &name, &next).await?,
                        None if ended => rows::forget_inflight(tx, &name).await?,
                        None => {}
                    }
                    if recovered { rows::forget_failure(tx, &name).await } else { Ok(()) }
                })
            })
            .await?;
        self.recovered = false;
        Ok(())
    }

    /// What is kept of what is on its way, and of what may have arrived.
    fn row(&self, transaction: Option<&Transaction>) -> InflightRow {
        let nothing = || InflightRow { txn_id: String::new(), parts: Vec::new(), composed_ts: 0 };
        let mut row = transaction.map_or_else(nothing, Transaction::row);
        row.parts.extend(self.doubtful.iter().cloned());
        row
    }

    fn is_doubtful(&self, transaction: &Transaction) -> bool {
        let parts = part_rows(&transaction.parts);
        self.doubtful
            .iter()
            .any(|doubtful| parts.iter().any(|part| same_feed(part, doubtful) && overlap(part, doubtful)))
    }

    /// Tries to send a transaction; gives it back when it is to be tried again.
    async fn attempt(&mut self, mut transaction: Transaction) -> Result<Option<Transaction>, StoreError> {
        self.slot.listen();
        if transaction.uncertain
            && let Err(problem) = self.leave_out_delivered(&mut transaction).await?
        {
            return self.failed(transaction, problem, Duration::ZERO).await;
        }
        let (pdus, kept) = self.composer().load(&mut transaction).await?;
        if pdus.is_empty() && kept.is_empty() {
            self.singles = self.singles.saturating_sub(1);
            self.arrived(&transaction);
            return Ok(None);
        }
        let events = pdus.len().saturating_add(kept.len());
        let is_invite = matches!(&pdus[..], [pdu] if is_invite(&transaction, pdu));
        match self.send(&transaction, pdus, &kept).await {
            Ok(answer) => {
                if let Err(refusal) = self.tell(&transaction, &answer).await {
                    transaction.edus.clear();
                    return self.failed(transaction, refusal.to_string(), Duration::ZERO).await;
                }
                self.singles = self.singles.saturating_sub(events);
                self.arrived(&transaction);
                Ok(None)
            }
            Err(error) => {
                // What is repeated is the same but for what will be old by then.
                let had_edus = !std::mem::take(&mut transaction.edus).is_empty();
                if had_edus && (is_refusal(&error) || may_be_about_events(&error)) {
                    // It may be about them: what is answered without them says what becomes of the events.
                    tracing::debug!(server = %self.destination, %error, "trying again without EDUs");
                    self.slot.edus().failed(Instant::now(), true);
                    transaction.uncertain = true;
                    // That answer is for that transaction, and without EDUs it is another one: the same ID may get the same answer.
                    (transaction.txn_id, transaction.composed_ts) = self.composer().txn_id();
                    self.keep(Vec::new(), Some(&transaction)).await?;
                    return Ok(Some(transaction));
                }
                self.refused(transaction, events, is_invite, error).await
            }
        }
    }

    /// Before a transaction of unknown fate is sent again: what is known to have arrived is left out. With other content
    /// it is another transaction.
    async fn leave_out_delivered(&mut self, transaction: &mut Transaction) -> Result<Result<(), String>, StoreError> {
        let mut changed = false;
        for part in transaction.parts.iter_mut().filter(|part| !part.positions.is_empty()) {
            let source = self.composer().source(&part.feed)?;
            let delivered = match source.already_delivered(&part.feed, self.destination, &part.positions).await {
                Ok(delivered) => delivered,
                Err(refusal) => return Ok(Err(refusal.to_string())),
            };
            let (gone, left): (Vec<i64>, Vec<i64>) =
                part.positions.iter().partition(|position| delivered.contains(position));
            if !gone.is_empty() {
                if let Err(refusal) = source.answered(&part.feed, self.destination, &gone, &Object::new()).await {
                    return Ok(Err(refusal.to_string()));
                }
                (part.positions, part.events, changed) = (left, None, true);
            }
        }
        if changed {
            (transaction.txn_id, transaction.composed_ts) = self.composer().txn_id();
            self.keep(Vec::new(), Some(transaction)).await?;
        }
        Ok(Ok(()))
    }

    /// Sends what is not repeated when it fails. Events wait for it a moment at most, and the destination does not count as failing.
    async fn send_edus(&mut self, transaction: &Transaction) {
        let events_waited = async {
            while !self.slot.has_events() {
                self.slot.news().await;
            }
            tokio::time::sleep(EDUS_LAST_BEFORE_EVENTS).await;
        };
        let answer = tokio::select! {
            answer = self.send(transaction, Vec::new(), &[]) => answer,
            () = tokio::time::sleep(EDUS_LAST) => Err(RemoteError::Unreachable("no answer in time".to_owned())),
            () = events_waited => Err(RemoteError::Unreachable("no answer, and events wait".to_owned())),
        };
        match answer {
            Ok(_) if self.failures > 0 => self.arrived(transaction),
            Ok(_) => self.slot.edus().arrived(),
            Err(error) => {
                let edus = transaction.edus.len();
                tracing::debug!(server = %self.destination, edus, %error, "EDUs were not taken");
                metrics::edus_dropped("refused", edus);
                let answered = matches!(error, RemoteError::Status { .. });
                self.slot.edus().failed(Instant::now(), answered);
            }
        }
    }

    async fn send(&self, transaction: &Transaction, pdus: Vec<Bytes>, kept: &[Edu]) -> Result<Object, RemoteError> {
        let places = if self.failures == 0 { &self.shared.healthy } else { &self.shared.failing };
        let _place = places.acquire().await.map_err(|error| RemoteError::Unreachable(error.to_string()))?;
        let envelope = Envelope {
            destination: self.destination,
            protocol: transaction.protocol,
            txn_id: &transaction.txn_id,
            composed_ts: transaction.composed_ts,
            pdus,
            edus: kept.iter().chain(&transaction.edus).collect(),
        };
        match self.shared.sender.send(&*self.shared.wire, envelope).await {
            // With 200 all is said; what else an answer holds is for those who understand it.
            Err(RemoteError::BadAnswer(problem)) => {
                tracing::warn!(server = %self.destination, problem, "a transaction got 200 and an odd answer");
                Ok(Object::new())
            }
            answer => answer,
        }
    }

    /// Tells the feeds' owners what was answered. An error when that could not be recorded, and is to be had again.
    async fn tell(&self, transaction: &Transaction, answer: &Object) -> Result<(), Refusal> {
        for part in transaction.parts.iter().filter(|part| !part.positions.is_empty()) {
            let source = self.composer().source(&part.feed)?;
            match source.answered(&part.feed, self.destination, &part.positions, answer).await {
                Err(refusal) if self.failures < TELLS => return Err(refusal),
                // It is not the store alone, which would not have taken so many failures either.
                Err(refusal) => {
                    let (server, room) = (self.destination, &part.feed.room_id);
                    tracing::error!(%server, %room, %refusal, "what was answered is not recorded");
                }
                Ok(()) => {}
            }
        }
        Ok(())
    }

    /// The destination has said what becomes of the transaction.
    fn arrived(&mut self, transaction: &Transaction) {
        self.slot.takes(transaction.parts.iter().map(|part| &part.feed));
        self.done_with(transaction);
    }

    /// The transaction is done with; this is kept together with what comes next.
    fn done_with(&mut self, transaction: &Transaction) {
        if self.failures > 0 {
            tracing::info!(server = %self.destination, failures = self.failures, "the destination is back");
            self.recovered = true;
            self.composer().tell_back();
        }
        (self.failures, self.since, self.tries, self.tried_since) = (0, 0, 0, None);
        match transaction.edus.is_empty() {
            true => self.slot.edus().is_back(),
            false => self.slot.edus().arrived(),
        }
        self.slot.release(transaction.parts.iter().map(|part| &part.feed));
        let done = part_rows(&transaction.parts);
        for doubtful in &mut self.doubtful {
            let through = done.iter().filter(|part| same_feed(part, doubtful)).map(|part| part.through).max();
            doubtful.positions.retain(|position| through.is_none_or(|through| *position > through));
        }
        self.doubtful.retain(|part| !part.positions.is_empty());
        self.done = Some(done);
    }

    async fn pause(&self, delay: Duration) {
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = self.stop.cancelled() => {}
        }
    }
}

/// Whether the one event of a transaction invites somebody, by way of the hub.
fn is_invite(transaction: &Transaction, pdu: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Event {
        #[serde(rename = "type")]
        kind: String,
        content: Content,
    }
    #[derive(Deserialize)]
    struct Content {
        membership: String,
    }
    let is_lpdu = transaction.parts.iter().any(|part| part.feed.kind == FeedKind::Lpdus && !part.positions.is_empty());
    is_lpdu
        && serde_json::from_slice::<Event>(pdu)
            .is_ok_and(|event| event.kind == "m.room.member" && event.content.membership == "invite")
}

fn same_feed(one: &PartRow, other: &PartRow) -> bool {
    (&one.kind, &one.room_id) == (&other.kind, &other.room_id)
}

fn overlap(one: &PartRow, other: &PartRow) -> bool {
    one.positions.iter().any(|position| other.positions.contains(position))
}
