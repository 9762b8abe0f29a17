//! The worker of one destination: composes a transaction from the feeds that have news, keeps its composition, sends it
//! until it is answered, and keeps what has arrived.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use rand::Rng as _;
use ruma::OwnedServerName;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::slot::Slot;
use super::verdict::{Failure, Verdict, backoff, is_own_error, judge};
use super::wire::Envelope;
use super::{Feed, FeedSource, Shared, lock};
use crate::event::{Object, parse_object};
use crate::federation::RemoteError;
use crate::identity::Side;
use crate::store::StoreError;
use crate::store::outbound::{self as rows, FailureRow, InflightRow, PartRow};

/// How many events a transaction has at most.
const MAX_PDUS: usize = 50;
/// How many feeds are looked at for one transaction.
const MAX_FEEDS: usize = 50;
/// How few events of one feed are taken at once when many feeds wait.
const MIN_SHARE: usize = 5;
/// An LM transaction ends before the event that would make its body longer than this: a peer refuses 102,400 bytes.
const MAX_LM_BYTES: usize = 90_000;
/// The same for Matrix servers, which take 50 events of any size.
const MAX_MATRIX_BYTES: usize = 4 << 20;
/// How long a worker stays when there is nothing to do.
const LINGER: Duration = Duration::from_secs(20);
/// The shortest time between two tries of a destination that fails.
const MIN_PAUSE: Duration = Duration::from_secs(1);
/// How long is waited when the store fails.
const STORE_PAUSE: Duration = Duration::from_secs(5);

pub(super) struct Worker<'a> {
    shared: &'a Shared,
    destination: &'a OwnedServerName,
    slot: &'a Slot,
    stop: &'a CancellationToken,
    failures: i64,
    /// How often the transaction was answered with an error of the server's own.
    tries: u32,
    /// How many events are still to be sent one by one, because the batch that they were in was refused.
    singles: usize,
}

struct Transaction {
    txn_id: String,
    composed_ts: i64,
    parts: Vec<Part>,
    /// Whether some of it may have arrived already.
    uncertain: bool,
}

struct Part {
    feed: Feed,
    after: i64,
    through: i64,
    positions: Vec<i64>,
    /// The events at the positions, as long as they need not be read again.
    events: Option<Vec<Object>>,
}

enum Composed {
    Nothing,
    /// There was nothing to send, but the destination is further now.
    Passed(Vec<Part>),
    Transaction(Transaction),
}

impl<'a> Worker<'a> {
    pub(super) fn new(
        shared: &'a Shared,
        destination: &'a OwnedServerName,
        slot: &'a Slot,
        stop: &'a CancellationToken,
    ) -> Self {
        Self { shared, destination, slot, stop, failures: 0, tries: 0, singles: 0 }
    }

    /// Works until there is nothing to do, or until all is stopped.
    pub(super) async fn run(mut self) {
        let mut current = None;
        let mut resumed = false;
        while !self.stop.is_cancelled() {
            let step = async {
                if !resumed {
                    current = self.resume().await?;
                    resumed = true;
                }
                if current.is_none() {
                    match self.compose().await? {
                        Composed::Nothing => return Ok(self.is_idle().await),
                        Composed::Passed(parts) => self.keep_passed(parts).await?,
                        Composed::Transaction(transaction) => {
                            self.keep(&transaction).await?;
                            current = Some(transaction);
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
                    resumed = false;
                    current = None;
                    self.slot.everything_again(&self.shared.store, self.destination).await;
                    self.pause(STORE_PAUSE).await;
                }
            }
        }
    }

    /// What was on its way when the last worker ended.
    async fn resume(&mut self) -> Result<Option<Transaction>, StoreError> {
        let name = self.destination.as_str();
        if let Some(failure) = rows::failure(&self.shared.store, name).await? {
            self.failures = failure.failures;
            let left = failure.retry_at.saturating_sub(self.shared.clock.now_ms());
            self.pause_until_heard(Duration::from_millis(u64::try_from(left).unwrap_or(0))).await;
        }
        let Some(row) = rows::inflight(&self.shared.store, name).await? else { return Ok(None) };
        let parts = row.parts.into_iter().map(|part| {
            Ok(Part {
                feed: Feed::parse(&part.kind, part.room_id)?,
                after: part.after,
                through: part.through,
                positions: part.positions,
                events: None,
            })
        });
        let parts = parts.collect::<Result<Vec<_>, StoreError>>()?;
        // The end of the part that is on its way need not be the end of the feed.
        for part in &parts {
            self.slot.add(part.feed.clone());
        }
        Ok(Some(Transaction { txn_id: row.txn_id, composed_ts: row.composed_ts, parts, uncertain: true }))
    }

    /// Waits for news; true when there is none for a while, and the destination is forgotten.
    async fn is_idle(&self) -> bool {
        tokio::select! {
            () = self.slot.news() => return false,
            () = self.stop.cancelled() => return false,
            () = tokio::time::sleep(LINGER) => {}
        }
        // News comes under this lock.
        let mut slots = lock(&self.shared.slots);
        let idle = self.slot.is_clean();
        if idle {
            slots.remove(self.destination);
        }
        idle
    }

    async fn compose(&mut self) -> Result<Composed, StoreError> {
        let feeds = self.slot.take(MAX_FEEDS);
        let Some(first) = feeds.first() else { return Ok(Composed::Nothing) };
        let mut room = Room::new(first.kind.protocol(), self.singles > 0, feeds.len());
        let mut parts = Vec::new();
        for feed in feeds {
            if room.is_full() {
                self.slot.add(feed);
                continue;
            }
            if let Some(part) = self.part(feed, &mut room).await? {
                parts.push(part);
            }
        }
        if parts.iter().all(|part| part.positions.is_empty()) {
            return Ok(Composed::Passed(parts));
        }
        let composed_ts = self.shared.clock.now_ms();
        let txn_id = self.txn_id(composed_ts);
        Ok(Composed::Transaction(Transaction { txn_id, composed_ts, parts, uncertain: self.singles > 0 }))
    }

    fn txn_id(&self, now_ms: i64) -> String {
        format!("{now_ms}.{}", self.shared.store.next_id())
    }

    /// What a feed has for the destination, as far as there is room. A feed that has more is put to the end of the line.
    async fn part(&self, feed: Feed, room: &mut Room) -> Result<Option<Part>, StoreError> {
        let source = self.source(&feed)?;
        let Some(cursor) = rows::cursor(&self.shared.store, &feed.key(self.destination)).await? else {
            return Ok(None);
        };
        if cursor.sent >= cursor.target {
            return Ok(None);
        }
        let limit = room.share();
        let found = source.read(&feed, self.destination, cursor.sent, Some(cursor.target), limit).await?;
        let mut part =
            Part { feed, after: cursor.sent, through: cursor.sent, positions: Vec::new(), events: Some(Vec::new()) };
        // A source may give less than there is, but for nothing at all.
        let exhausted = found.is_empty();
        for delivery in found {
            if delivery.position <= part.through || delivery.position > cursor.target {
                let (position, through, target) = (delivery.position, part.through, cursor.target);
                tracing::error!(feed = ?part.feed, position, through, target, "a feed is out of order");
                return Ok(None);
            }
            if let Some(raw) = delivery.event {
                if !room.takes(raw.get().len()) {
                    break;
                }
                if let Some(event) = self.parse(&part.feed, delivery.position, raw.get()) {
                    part.positions.push(delivery.position);
                    part.events.get_or_insert_default().push(event);
                }
            }
            part.through = delivery.position;
        }
        if exhausted {
            part.through = cursor.target;
        }
        if part.through < cursor.target {
            self.slot.add(part.feed.clone());
        }
        Ok(Some(part))
    }

    fn source(&self, feed: &Feed) -> Result<Arc<dyn FeedSource>, StoreError> {
        let sources = self.shared.sources.read().unwrap_or_else(PoisonError::into_inner);
        let source = sources.get(&feed.kind).cloned();
        source.ok_or_else(|| StoreError::corrupt("feed", format!("nobody has registered for {:?}", feed.kind)))
    }

    fn parse(&self, feed: &Feed, position: i64, raw: &str) -> Option<Object> {
        parse_object(raw.as_bytes())
            .inspect_err(|refusal| tracing::error!(?feed, position, %refusal, "an event of ours cannot be sent"))
            .ok()
    }

    async fn keep(&self, transaction: &Transaction) -> Result<(), StoreError> {
        let name = self.destination.to_string();
        let row = InflightRow {
            txn_id: transaction.txn_id.clone(),
            parts: part_rows(&transaction.parts),
            composed_ts: transaction.composed_ts,
        };
        self.shared.store.write(move |tx| Box::pin(async move { rows::keep_inflight(tx, &name, &row).await })).await
    }

    async fn keep_passed(&self, parts: Vec<Part>) -> Result<(), StoreError> {
        let (name, parts) = (self.destination.to_string(), part_rows(&parts));
        if parts.is_empty() {
            return Ok(());
        }
        self.shared.store.write(move |tx| Box::pin(async move { rows::arrived(tx, &name, &parts).await })).await
    }

    /// Tries to send a transaction; gives it back when it is to be tried again.
    async fn attempt(&mut self, mut transaction: Transaction) -> Result<Option<Transaction>, StoreError> {
        self.slot.listen();
        if transaction.uncertain
            && let Err(problem) = self.leave_out_delivered(&mut transaction).await?
        {
            return self.failed(transaction, problem).await;
        }
        let pdus = self.load(&mut transaction).await?;
        if pdus.is_empty() {
            self.singles = self.singles.saturating_sub(1);
            self.arrived(transaction).await?;
            return Ok(None);
        }
        let events = pdus.len();
        match self.send(&transaction, pdus).await {
            Ok(answer) => {
                self.tell(&transaction, &answer).await;
                self.singles = self.singles.saturating_sub(events);
                self.arrived(transaction).await?;
                Ok(None)
            }
            Err(error) => self.refused(transaction, events, error).await,
        }
    }

    /// Before a transaction of unknown fate is sent again: what is known to have arrived is left out. With other content
    /// it is another transaction.
    async fn leave_out_delivered(&self, transaction: &mut Transaction) -> Result<Result<(), String>, StoreError> {
        let mut changed = false;
        for part in transaction.parts.iter_mut().filter(|part| !part.positions.is_empty()) {
            let source = self.source(&part.feed)?;
            let delivered = match source.already_delivered(&part.feed, self.destination, &part.positions).await {
                Ok(delivered) => delivered,
                Err(refusal) => return Ok(Err(refusal.to_string())),
            };
            let (gone, left): (Vec<i64>, Vec<i64>) =
                part.positions.iter().partition(|position| delivered.contains(position));
            if !gone.is_empty() {
                source.answered(&part.feed, self.destination, &gone, &Object::new()).await;
                (part.positions, part.events, changed) = (left, None, true);
            }
        }
        if changed {
            transaction.composed_ts = self.shared.clock.now_ms();
            transaction.txn_id = self.txn_id(transaction.composed_ts);
            self.keep(transaction).await?;
        }
        Ok(Ok(()))
    }

    /// The events of a transaction, read again when they are not at hand.
    async fn load(&self, transaction: &mut Transaction) -> Result<Vec<Object>, StoreError> {
        let mut pdus = Vec::new();
        for part in &mut transaction.parts {
            if let Some(events) = part.events.take() {
                pdus.extend(events);
                continue;
            }
            if part.positions.is_empty() {
                continue;
            }
            let source = self.source(&part.feed)?;
            let found = source.read(&part.feed, self.destination, part.after, Some(part.through), MAX_PDUS).await?;
            for delivery in found.into_iter().filter(|delivery| part.positions.contains(&delivery.position)) {
                let event = delivery.event.and_then(|raw| self.parse(&part.feed, delivery.position, raw.get()));
                pdus.extend(event);
            }
        }
        Ok(pdus)
    }

    async fn send(&self, transaction: &Transaction, pdus: Vec<Object>) -> Result<Object, RemoteError> {
        let places = if self.failures == 0 { &self.shared.healthy } else { &self.shared.failing };
        let _place = places.acquire().await.map_err(|error| RemoteError::Unreachable(error.to_string()))?;
        let envelope = Envelope {
            destination: self.destination,
            protocol: transaction.parts.first().map_or(Side::Matrix, |part| part.feed.kind.protocol()),
            txn_id: &transaction.txn_id,
            composed_ts: transaction.composed_ts,
            pdus,
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

    async fn tell(&self, transaction: &Transaction, answer: &Object) {
        for part in transaction.parts.iter().filter(|part| !part.positions.is_empty()) {
            if let Ok(source) = self.source(&part.feed) {
                source.answered(&part.feed, self.destination, &part.positions, answer).await;
            }
        }
    }

    async fn refused(
        &mut self,
        transaction: Transaction,
        events: usize,
        error: RemoteError,
    ) -> Result<Option<Transaction>, StoreError> {
        let mut linearized = false;
        if let RemoteError::Status { status, .. } = &error
            && is_own_error(*status)
        {
            self.tries = self.tries.saturating_add(1);
            linearized = self.shared.wire.is_linearized(self.destination).await;
        }
        let verdict = judge(&Failure { error: &error, events, linearized, tries: self.tries });
        match verdict {
            Verdict::Retry => self.failed(transaction, error.to_string()).await,
            Verdict::Split => {
                tracing::info!(server = %self.destination, events, %error, "sending the events one by one");
                self.split(transaction, events).await?;
                Ok(None)
            }
            Verdict::Refused | Verdict::GiveUp => {
                let feed = transaction.parts.iter().find(|part| !part.positions.is_empty());
                let (room, position) =
                    feed.map_or((None, None), |part| (Some(&part.feed.room_id), part.positions.first()));
                if verdict == Verdict::GiveUp {
                    tracing::error!(server = %self.destination, ?room, ?position, %error, "passing over an event");
                } else {
                    tracing::warn!(server = %self.destination, ?room, ?position, %error, "an event was refused");
                }
                self.tell(&transaction, &error_object(&error)).await;
                self.singles = self.singles.saturating_sub(events);
                self.arrived(transaction).await?;
                Ok(None)
            }
        }
    }

    /// Composes anew what was in a transaction, one event at a time.
    async fn split(&mut self, transaction: Transaction, events: usize) -> Result<(), StoreError> {
        let name = self.destination.to_string();
        self.shared.store.write(move |tx| Box::pin(async move { rows::forget_inflight(tx, &name).await })).await?;
        self.slot.put_back(transaction.parts.into_iter().map(|part| part.feed));
        self.singles = events;
        self.tries = 0;
        Ok(())
    }

    async fn arrived(&mut self, transaction: Transaction) -> Result<(), StoreError> {
        let (name, parts) = (self.destination.to_string(), part_rows(&transaction.parts));
        let recovered = self.failures > 0;
        self.shared
            .store
            .write(move |tx| {
                Box::pin(async move {
                    rows::arrived(tx, &name, &parts).await?;
                    rows::forget_inflight(tx, &name).await?;
                    if recovered {
                        rows::forget_failure(tx, &name).await?;
                    }
                    Ok(())
                })
            })
            .await?;
        if recovered {
            tracing::info!(server = %self.destination, failures = self.failures, "the destination is back");
        }
        (self.failures, self.tries) = (0, 0);
        Ok(())
    }

    /// The destination failed: it is left alone for a while, or until it is heard of.
    async fn failed(
        &mut self,
        mut transaction: Transaction,
        problem: String,
    ) -> Result<Option<Transaction>, StoreError> {
        self.failures = self.failures.saturating_add(1);
        let delay = backoff(self.failures, rand::rngs::OsRng.r#gen());
        let row = FailureRow {
            destination: self.destination.to_string(),
            failures: self.failures,
            retry_at: self.shared.clock.now_ms().saturating_add(i64::try_from(delay.as_millis()).unwrap_or(i64::MAX)),
            last_error: problem.chars().filter(|c| *c != '\0').take(500).collect(),
        };
        tracing::info!(server = %self.destination, failures = self.failures, ?delay, problem, "a destination fails");
        self.shared.store.write(move |tx| Box::pin(async move { rows::record_failure(tx, &row).await })).await?;
        transaction.uncertain = true;
        for part in &mut transaction.parts {
            // Destinations that are away for long hold no events in memory.
            part.events = None;
        }
        self.pause_until_heard(delay).await;
        Ok(Some(transaction))
    }

    async fn pause_until_heard(&self, delay: Duration) {
        let start = Instant::now();
        tokio::select! {
            () = self.pause(delay) => return,
            () = self.slot.until_heard() => {}
        }
        self.pause(MIN_PAUSE.min(delay).saturating_sub(start.elapsed())).await;
    }

    async fn pause(&self, delay: Duration) {
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = self.stop.cancelled() => {}
        }
    }
}

/// The room that is left in a transaction.
struct Room {
    events: usize,
    bytes: usize,
    share: usize,
    is_empty: bool,
}

impl Room {
    fn new(protocol: Side, single: bool, feeds: usize) -> Self {
        let events = if single { 1 } else { MAX_PDUS };
        let bytes = match protocol {
            Side::Lm => MAX_LM_BYTES,
            Side::Matrix => MAX_MATRIX_BYTES,
        };
        let share = MAX_PDUS.checked_div(feeds).unwrap_or(MAX_PDUS).max(MIN_SHARE).min(events);
        Self { events, bytes, share, is_empty: true }
    }

    fn is_full(&self) -> bool {
        self.events == 0
    }

    /// How many events the next feed may add.
    fn share(&self) -> usize {
        self.share.min(self.events)
    }

    /// Whether there is room for an event of so many bytes: for the first one always.
    fn takes(&mut self, bytes: usize) -> bool {
        let Some(events) = self.events.checked_sub(1) else { return false };
        let Some(bytes) = self.bytes.checked_sub(bytes.saturating_add(1)) else {
            let first = self.is_empty;
            (self.events, self.bytes, self.is_empty) = (0, 0, false);
            return first;
        };
        (self.events, self.bytes, self.is_empty) = (events, bytes, false);
        true
    }
}

fn part_rows(parts: &[Part]) -> Vec<PartRow> {
    let row = |part: &Part| PartRow {
        kind: part.feed.kind.as_str().to_owned(),
        room_id: part.feed.room_id.to_string(),
        after: part.after,
        through: part.through,
        positions: part.positions.clone(),
    };
    parts.iter().map(row).collect()
}

/// An error as the answer to the one event that it is about.
fn error_object(error: &RemoteError) -> Object {
    let (errcode, text) = match error {
        RemoteError::Status { errcode, error: text, status } if text.is_empty() => {
            (errcode.as_str(), status.to_string())
        }
        RemoteError::Status { errcode, error: text, .. } => (errcode.as_str(), text.clone()),
        other => ("", other.to_string()),
    };
    let errcode = if errcode.is_empty() { "M_UNKNOWN" } else { errcode };
    let mut object = Object::new();
    object.insert("errcode".to_owned(), errcode.into());
    object.insert("error".to_owned(), text.into());
    object
}
