//! What the worker does when a transaction fails: repeats it, sends its events one by one, gives one up, or leaves the destination
//! alone.

use std::collections::HashSet;
use std::time::Duration;

use rand::Rng as _;
use tokio::time::Instant;

use super::{Parked, Worker, overlap, same_feed};
use crate::admin::metrics;
use crate::event::Object;
use crate::federation::RemoteError;
use crate::federation::outbound::compose::{Part, Transaction, part_rows};
use crate::federation::outbound::slot::News;
use crate::federation::outbound::verdict::{
    Failure, Verdict, answers, asked_for, backoff, has_no_endpoint, judge, may_be_about_events,
};
use crate::federation::outbound::{Feed, FeedKind, HeldFeed};
use crate::identity::Side;
use crate::store::StoreError;
use crate::store::outbound::{self as rows, FailureRow};

/// The longest time between two tries of an event on which a destination fails.
const MAX_PARKED: Duration = Duration::from_secs(30);
/// The longest time between two tries of what a destination has no endpoint for.
const MAX_PARKED_WITHOUT_ENDPOINT: Duration = Duration::from_secs(600);
/// The shortest time between two tries of a destination that fails.
const MIN_PAUSE: Duration = Duration::from_secs(1);

impl Worker<'_> {
    pub(super) async fn refused(
        &mut self,
        transaction: Transaction,
        events: usize,
        is_invite: bool,
        error: RemoteError,
    ) -> Result<Option<Transaction>, StoreError> {
        self.answers = answers(&error);
        if has_no_endpoint(&error) {
            return self.has_no_endpoint(transaction, &error).await;
        }
        let mut stops_at_first = false;
        if may_be_about_events(&error) {
            self.tries = self.tries.saturating_add(1);
            self.tried_since.get_or_insert_with(Instant::now);
            stops_at_first = self.shared.sender.stops_at_first(&*self.shared.wire, self.destination).await;
        }
        let lasting = self.tried_since.map_or(Duration::ZERO, |since| since.elapsed());
        let verdict = judge(&Failure { error: &error, events, stops_at_first, tries: self.tries, lasting, is_invite });
        match verdict {
            // Others need not wait for what it fails on.
            Verdict::Retry if stops_at_first && events == 1 => {
                self.park(transaction, &error, MAX_PARKED).await?;
                Ok(None)
            }
            Verdict::Retry => self.failed(transaction, error.to_string(), asked_for(&error)).await,
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
                if let Err(refusal) = self.tell(&transaction, &error_object(&error)).await {
                    return self.failed(transaction, refusal.to_string(), Duration::ZERO).await;
                }
                self.singles = self.singles.saturating_sub(events);
                match verdict {
                    Verdict::GiveUp => self.done_with(&transaction),
                    _ => self.arrived(&transaction),
                }
                Ok(None)
            }
        }
    }

    /// The destination does not know the `send` by which a transaction goes. That says nothing of what goes by the other one, which
    /// does not wait. A server that does LM alone will never have Matrix's: what it is to get by that ends.
    async fn has_no_endpoint(
        &mut self,
        transaction: Transaction,
        error: &RemoteError,
    ) -> Result<Option<Transaction>, StoreError> {
        let is_for_graph_servers = transaction.protocol == Side::Matrix;
        if !is_for_graph_servers || !self.shared.wire.is_linearized(self.destination).await {
            self.tries = self.tries.saturating_add(1);
            self.park(transaction, error, MAX_PARKED_WITHOUT_ENDPOINT).await?;
            return Ok(None);
        }
        if let Err(refusal) = self.tell(&transaction, &error_object(error)).await {
            return self.failed(transaction, refusal.to_string(), Duration::ZERO).await;
        }
        self.singles = 0;
        self.arrived(&transaction);
        let (name, parts) = (self.destination.to_string(), part_rows(&transaction.parts));
        let is_graph = |part: &&Part| part.feed.kind == FeedKind::Graph;
        let ended: Vec<_> = transaction.parts.iter().filter(is_graph).collect();
        let ends: Vec<_> = ended.iter().map(|part| (part.feed.key(self.destination), part.through)).collect();
        self.shared
            .store
            .write(move |tx| {
                Box::pin(async move {
                    rows::arrived(tx, &name, &parts).await?;
                    for (key, through) in &ends {
                        rows::end(tx, key, *through).await?;
                    }
                    Ok(())
                })
            })
            .await?;
        for part in ended {
            let (server, room) = (self.destination, &part.feed.room_id);
            tracing::warn!(%server, %room, %error, "a server that does LM alone gets nothing of a room by its graph any more");
            metrics::outbound_feed_ended();
            self.slot.set_place(&part.feed, None);
        }
        Ok(None)
    }

    /// Leaves the feeds of a transaction alone for a while, `longest` at most, and goes on with the others.
    async fn park(
        &mut self,
        transaction: Transaction,
        error: &RemoteError,
        longest: Duration,
    ) -> Result<(), StoreError> {
        let delay = backoff(i64::from(self.tries), rand::rngs::OsRng.r#gen()).min(longest).max(asked_for(error));
        let mut rows = part_rows(&transaction.parts);
        rows.retain_mut(|part| {
            part.doubtful = true;
            !part.positions.is_empty()
        });
        self.doubtful.retain(|before| !rows.iter().any(|row| same_feed(before, row) && overlap(before, row)));
        self.doubtful.append(&mut rows);
        let (name, row) = (self.destination.to_string(), self.row(None));
        self.shared.store.write(move |tx| Box::pin(async move { rows::keep_inflight(tx, &name, &row).await })).await?;
        self.slot.forget_places();
        for part in transaction.parts {
            if part.positions.is_empty() {
                self.slot.add(part.feed, News::Ask);
                continue;
            }
            tracing::info!(server = %self.destination, room = %part.feed.room_id, tries = self.tries, ?delay, %error, "a room is left alone for a while");
            let now = self.shared.clock.now_ms();
            let again = now.saturating_add(i64::try_from(delay.as_millis()).unwrap_or(i64::MAX));
            let error = error.to_string().chars().take(500).collect();
            self.slot.hold(HeldFeed { feed: part.feed.clone(), tries: self.tries, since: now, retry_at: again, error });
            let parked = Parked { until: Some(Instant::now() + delay), tries: self.tries, since: self.tried_since };
            self.parked.insert(part.feed, parked);
        }
        (self.tries, self.tried_since) = (0, None);
        Ok(())
    }

    /// The feeds that are left alone now. Those that no longer are have news.
    pub(super) fn held(&mut self) -> HashSet<Feed> {
        let now = Instant::now();
        let mut held = HashSet::new();
        for (feed, parked) in &mut self.parked {
            match parked.until {
                Some(until) if until > now => {
                    held.insert(feed.clone());
                }
                Some(_) => {
                    parked.until = None;
                    self.slot.add(feed.clone(), News::Ask);
                }
                None => {}
            }
        }
        held
    }

    /// An event on which the destination failed is tried again.
    pub(super) fn go_on_with_parked(&mut self, transaction: &Transaction) {
        for part in &transaction.parts {
            if let Some(Parked { tries, since, .. }) = self.parked.remove(&part.feed) {
                (self.tries, self.tried_since) = (tries, since);
            }
        }
    }

    /// Composes anew what was in a transaction, one event at a time.
    async fn split(&mut self, transaction: Transaction, events: usize) -> Result<(), StoreError> {
        self.doubtful = part_rows(&transaction.parts);
        self.doubtful.retain_mut(|part| {
            part.doubtful = true;
            !part.positions.is_empty()
        });
        let (name, row) = (self.destination.to_string(), self.row(None));
        self.shared.store.write(move |tx| Box::pin(async move { rows::keep_inflight(tx, &name, &row).await })).await?;
        self.slot.forget_places();
        self.slot.put_back(transaction.parts.into_iter().map(|part| part.feed));
        self.singles = events;
        (self.tries, self.tried_since) = (0, None);
        Ok(())
    }

    /// The destination failed: it is left alone for as long as it asks for, and then for a while or until it is heard of.
    pub(super) async fn failed(
        &mut self,
        mut transaction: Transaction,
        problem: String,
        asked: Duration,
    ) -> Result<Option<Transaction>, StoreError> {
        if self.failures == 0 {
            self.since = self.shared.clock.now_ms();
        }
        self.failures = self.failures.saturating_add(1);
        let delay = backoff(self.failures, rand::rngs::OsRng.r#gen()).max(asked);
        let row = FailureRow {
            destination: self.destination.to_string(),
            failures: self.failures,
            retry_at: self.shared.clock.now_ms().saturating_add(i64::try_from(delay.as_millis()).unwrap_or(i64::MAX)),
            last_error: problem.chars().take(500).collect(),
            since_ts: self.since,
            answers: self.answers,
        };
        tracing::info!(server = %self.destination, failures = self.failures, ?delay, problem, "a destination fails");
        self.shared.store.write(move |tx| Box::pin(async move { rows::record_failure(tx, &row).await })).await?;
        transaction.uncertain = true;
        for part in &mut transaction.parts {
            // Destinations that are away for long hold no events in memory.
            part.events = None;
        }
        self.slot.edus().silence(Instant::now(), delay);
        self.pause(asked).await;
        self.pause_until_heard(delay.saturating_sub(asked)).await;
        Ok(Some(transaction))
    }

    pub(super) async fn pause_until_heard(&self, delay: Duration) {
        let start = Instant::now();
        tokio::select! {
            () = self.pause(delay) => return,
            () = self.slot.until_heard() => {}
        }
        self.pause(MIN_PAUSE.min(delay).saturating_sub(start.elapsed())).await;
    }
}

/// An error as the answer to the one event that it is about.
fn error_object(error: &RemoteError) -> Object {
    let (errcode, text) = match error {
        RemoteError::Status { errcode, error: text, status, .. } if text.is_empty() => {
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
