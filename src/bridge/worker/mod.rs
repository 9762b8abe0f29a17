//! One task a portal and direction, alive while there is something to do: it takes the rows of the inbox in order, in
//! batches. An image is made in one transaction with its mapping and with the end of its row, so a crash at any point
//! neither loses nor doubles it (INV-5, INV-6).

mod decide;
mod send;

use std::collections::{BTreeSet, HashMap};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use ruma::{OwnedEventId, OwnedServerName};
use tokio::sync::mpsc;

use self::decide::Decision;
use super::carry::{Crossing, Outcome};
use super::core::Core;
use super::decline::decline;
use super::inbox;
use super::linearize::{self, Hold};
use super::portal::Portal;
use super::registry::Entry;
use super::{budget, effect, repair, spaces};
use crate::admin::metrics;
use crate::clock::is_recent;
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::store::{images, inbox as stored};

/// How many images are sent in one call.
const BATCH: usize = 200;
/// How long an event waits for the echo of what it relates to, or of its sender's join.
const ECHO_PATIENCE_MS: i64 = 120_000;
/// How long a row that cannot go holds back whatever may descend from it.
const OVERTAKE_AFTER_MS: i64 = 30_000;
/// How often it is counted how much waits.
const COUNT_EVERY_MS: i64 = 2_000;
/// How often a row is tried that fails here before it is refused, with pauses of a second to five minutes: a quarter of an hour in
/// all.
const TRIES: u32 = 10;
/// After what time, in milliseconds, a row that another server does not answer is refused, when it was tried at least so often:
/// before it counts as the gateway's fault, and also when the gateway is restarted meanwhile.
const REMOTE_PATIENCE_MS: i64 = 480_000;
const REMOTE_TRIES: u32 = 6;
/// How long a task that panicked rests before it starts again, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// How long the task stays when something waits without a time of its own.
const POLL: Duration = Duration::from_secs(5);

/// Carries what `source` has accepted until nothing is left.
pub(super) async fn run(core: Arc<Core>, entry: Arc<Entry>, source: Side) {
    let mut pause = FIRST_PAUSE;
    // A task that ended in a panic would leave its direction marked as running, and nobody would start another one.
    while AssertUnwindSafe(work(core.clone(), entry.clone(), source)).catch_unwind().await.is_err() {
        tracing::error!(portal = entry.portal().portal_id, side = source.as_str(), ?pause, "carrying panicked");
        tokio::time::sleep(pause).await;
        pause = pause.saturating_mul(2).min(LONGEST_PAUSE);
    }
    if source == Side::Lm {
        core.pauses.waiting(entry.number, &entry.portal().lm_hub, 0, 0);
    }
}

async fn work(core: Arc<Core>, entry: Arc<Entry>, source: Side) {
    let (asked, answers) = mpsc::unbounded_channel();
    let mut worker = Worker { core, entry, source, inbox: inbox::Inbox::default(), counted_at: 0, asked, answers };
    loop {
        if !worker.entry.portal().state.carries() {
            worker.entry.direction(source).end();
            return;
        }
        let wait = match worker.pass().await {
            Ok(Progress::More) => continue,
            Ok(Progress::Empty) if worker.entry.direction(source).rest() => return,
            Ok(Progress::Empty) => {
                worker.inbox.look_again();
                continue;
            }
            Ok(Progress::Wait(wait)) => wait,
            Err(error) => {
                tracing::warn!(portal = worker.entry.portal().portal_id, side = source.as_str(), %error, "carrying paused");
                // The news that this pass had taken may not have been read.
                worker.inbox.look_again();
                POLL
            }
        };
        let direction = worker.entry.direction(source);
        let _ = tokio::time::timeout(wait, direction.wake.notified()).await;
    }
}

enum Progress {
    /// Something was done: look again at once.
    More,
    /// The inbox is empty.
    Empty,
    /// What is left waits.
    Wait(Duration),
}

struct Worker {
    core: Arc<Core>,
    entry: Arc<Entry>,
    source: Side,
    inbox: inbox::Inbox,
    /// When it was last counted how much waits.
    counted_at: i64,
    /// Where the tasks tell that ask other servers.
    asked: mpsc::UnboundedSender<(i64, Done)>,
    answers: mpsc::UnboundedReceiver<(i64, Done)>,
}

/// What became of an item.
enum Done {
    /// It was carried over.
    Crossed,
    /// There was nothing to do, or it was done already.
    Gone,
    /// It is refused.
    Refused(Refusal),
    /// It is tried again later.
    Later(Refusal),
    /// It waits for an echo.
    Waits,
    /// Another server is being asked; what it answers is told later.
    Asked,
}

impl Worker {
    async fn pass(&mut self) -> Result<Progress, Refusal> {
        let portal = self.entry.portal();
        while let Ok((seq, done)) = self.answers.try_recv() {
            self.finish(&portal, seq, done).await?;
        }
        let look = self.entry.direction(self.source).take_news() || self.inbox.may_have_more();
        let loaded = look && self.inbox.load(&self.core, &self.entry, &portal, self.source).await?;
        if self.inbox.items.is_empty() {
            return Ok(if loaded { Progress::More } else { Progress::Empty });
        }
        let now = self.core.now_ms();
        self.inbox.clock(now);
        self.count(&portal, now).await?;
        for (seq, refusal) in self.over_budget(now) {
            self.finish(&portal, seq, Done::Refused(refusal)).await?;
        }
        self.mark(now).await?;
        let holds = linearize::holds(self.inbox.items.iter().map(|item| &item.waiting));
        self.inbox.held(&holds);
        let items = self.inbox.items.iter().zip(&holds).filter(|(_, hold)| hold.is_none());
        let seqs: Vec<i64> = items.take(BATCH).map(|(item, _)| item.row.seq).collect();
        if seqs.is_empty() && loaded {
            return Ok(Progress::More);
        }
        if seqs.is_empty() {
            let next = self.inbox.items.iter().map(|item| item.retry_at).filter(|at| *at > now).min();
            let wait = next.and_then(|at| u64::try_from(at.saturating_sub(now)).ok()).map(Duration::from_millis);
            return Ok(Progress::Wait(wait.unwrap_or(POLL).min(POLL)));
        }
        self.carry(&portal, &seqs).await?;
        Ok(Progress::More)
    }

    /// Marks what cannot go now, and what it holds back.
    async fn mark(&mut self, now: i64) -> Result<(), Refusal> {
        let needs: BTreeSet<&OwnedEventId> = self.inbox.items.iter().flat_map(|item| &item.waiting.needs).collect();
        let needs: Vec<OwnedEventId> = needs.into_iter().cloned().collect();
        let images = match self.source {
            // Only what went to a foreign hub can be on its way.
            Side::Matrix if !needs.is_empty() => {
                images::of_sources(&self.core.context.store, Side::Matrix, &needs).await?
            }
            _ => HashMap::new(),
        };
        let passed_over = self.inbox.passed_over(&self.core, self.source, &needs).await?;
        for item in &mut self.inbox.items {
            let pending = item.waiting.needs.iter().any(|need| {
                let image = images.get(need);
                image.is_some_and(|image| image.pending && now.saturating_sub(image.made_ts) < ECHO_PATIENCE_MS)
            });
            let held = pending || item.retry_at > now;
            item.blocked_since = match held {
                true => Some(item.blocked_since.unwrap_or(now)),
                // That it is about to be tried again does not mean that it will go.
                false if item.failures > 0 || item.waits => item.blocked_since,
                false => None,
            };
            let long = item.blocked_since.is_some_and(|since| now.saturating_sub(since) > OVERTAKE_AFTER_MS);
            item.waiting.hold = match held {
                true if item.asks_server => Some(Hold::Named),
                true if long || item.over_budget => Some(Hold::Sender),
                true => Some(Hold::Descendants),
                // A redaction need not wait for what it redacts, which then does not cross.
                false if item.waiting.moderates => None,
                false if item.waiting.needs.iter().any(|need| passed_over.contains(need)) => Some(Hold::Sender),
                false => None,
            };
        }
        Ok(())
    }

    /// Looks now and then how much waits, so that a foreign hub waits with more.
    async fn count(&mut self, portal: &Portal, now: i64) -> Result<(), Refusal> {
        if self.source != Side::Lm || portal.lm_hub == self.core.context.server_name {
            return Ok(());
        }
        let limit = self.core.context.config.budgets.backlog;
        if !self.inbox.is_full(usize::try_from(limit).unwrap_or(usize::MAX)) {
            self.core.pauses.waiting(self.entry.number, &portal.lm_hub, 0, limit);
        } else if !is_recent(self.counted_at, now, COUNT_EVERY_MS) {
            self.counted_at = now;
            let (count, _) = stored::backlog(&self.core.context.store, Side::Lm, &portal.lm_room_id).await?;
            self.core.pauses.waiting(self.entry.number, &portal.lm_hub, count, limit);
        }
        Ok(())
    }

    /// Puts off what is over its server's budget; returns what has waited too long for it.
    fn over_budget(&mut self, now: i64) -> Vec<(i64, Refusal)> {
        let (core, number) = (&self.core, self.entry.number);
        let mut servers: HashMap<OwnedServerName, Option<Refusal>> = HashMap::new();
        let mut expired = Vec::new();
        for item in self.inbox.items.iter_mut().filter(|item| item.retry_at <= now) {
            let server = item.event.sender.server_name();
            let over = match servers.get(server) {
                Some(over) => over,
                None => {
                    let over = core.budgets.over(&core.context.config.budgets, number, server, now).err();
                    servers.entry(server.to_owned()).or_insert(over)
                }
            };
            item.over_budget = over.is_some();
            if let Some(refusal @ Refusal::Budget { retry_after_ms, .. }) = over {
                let pause = Duration::from_millis(*retry_after_ms).min(inbox::MAX_PAUSE);
                let pause = i64::try_from(pause.as_millis()).unwrap_or(i64::MAX);
                item.retry_at = now.saturating_add(pause);
                if now.saturating_sub(item.row.received_ts) > budget::PATIENCE_MS {
                    expired.push((item.row.seq, refusal.clone()));
                }
            }
        }
        expired
    }

    /// Carries the items with these numbers, in order. Ends early when one of them fails, for the others to be looked at
    /// again.
    async fn carry(&mut self, portal: &Arc<Portal>, seqs: &[i64]) -> Result<(), Refusal> {
        let entry = self.entry.clone();
        // Repair makes images too; together the two could make one twice.
        let _lock = entry.direction(self.source).making.lock().await;
        if !entry.portal().state.carries() {
            return Ok(());
        }
        let mut batch: Vec<(i64, Crossing)> = Vec::new();
        for &seq in seqs {
            let Some(item) = self.inbox.get(seq) else { continue };
            let server = item.event.sender.server_name();
            let budgets = &self.core.context.config.budgets;
            if self.core.budgets.over(budgets, entry.number, server, self.core.now_ms()).is_err() {
                break;
            }
            if !self.inbox.complete(&self.core, self.source, seq).await? {
                tracing::error!(portal = portal.portal_id, seq, "an event that waited is not in the store");
                effect::drop_row(&self.core, seq).await?;
                self.inbox.drop_item(seq);
                continue;
            }
            let Some(item) = self.inbox.get(seq) else { continue };
            let server = item.event.sender.server_name();
            self.core.budgets.spend(entry.number, server, budget::size(&item.event.content));
            let single = item.event.state_key.is_some();
            if single && !batch.is_empty() && !self.flush(portal, std::mem::take(&mut batch)).await? {
                return Ok(());
            }
            let Some(item) = self.inbox.get(seq) else { continue };
            let decided = AssertUnwindSafe(self.decide(portal, &item.event)).catch_unwind().await;
            let Decision { outcome, unsure, over, waits } =
                match decided.unwrap_or_else(|_| Err(Refusal::Internal("deciding on it panicked".to_owned()))) {
                    Ok(decision) => decision,
                    // It fails alone: nobody else waits for what may never be better.
                    Err(refusal) => {
                        if self.flush(portal, std::mem::take(&mut batch)).await? {
                            self.finish(portal, seq, Done::Later(refusal)).await?;
                        }
                        return Ok(());
                    }
                };
            if waits {
                if self.flush(portal, std::mem::take(&mut batch)).await? {
                    self.finish(portal, seq, Done::Waits).await?;
                }
                return Ok(());
            }
            if let Some(refusal) = over {
                if self.flush(portal, std::mem::take(&mut batch)).await? {
                    self.finish(portal, seq, Done::Later(refusal)).await?;
                }
                return Ok(());
            }
            match outcome {
                Outcome::Cross(crossing) if crossing.before.is_empty() && !single => batch.push((seq, *crossing)),
                outcome => {
                    if !self.flush(portal, std::mem::take(&mut batch)).await? {
                        return Ok(());
                    }
                    let done = match self.single(portal, seq, outcome).await {
                        Ok(done) => done,
                        Err(refusal) => Done::Later(refusal),
                    };
                    if unsure {
                        repair::soon(&self.core, &self.entry);
                    }
                    if !self.finish(portal, seq, done).await? {
                        return Ok(());
                    }
                }
            }
        }
        self.flush(portal, batch).await?;
        Ok(())
    }

    /// What is put off: not for ever. That its row is looked for before it is put off keeps an outage of the database from
    /// counting.
    fn later(&self, seq: i64, refusal: Refusal) -> Done {
        let Some(item) = self.inbox.get(seq) else { return Done::Gone };
        let waited = self.core.now_ms().saturating_sub(item.row.received_ts);
        match refusal {
            Refusal::Budget { .. } if waited > budget::PATIENCE_MS => Done::Refused(refusal),
            Refusal::Budget { .. } => Done::Later(refusal),
            Refusal::Remote { server, problem } if waited > REMOTE_PATIENCE_MS && item.failures >= REMOTE_TRIES => {
                let problem = format!("given up after {} minutes: {problem}", waited / 60_000);
                Done::Refused(Refusal::Remote { server, problem })
            }
            _ if item.failures < TRIES => Done::Later(refusal),
            Refusal::Remote { server, problem } => {
                let problem = format!("given up after {} tries: {problem}", item.failures);
                Done::Refused(Refusal::Remote { server, problem })
            }
            refusal => Done::Refused(Refusal::Internal(format!("given up after {} tries: {refusal}", item.failures))),
        }
    }

    /// Records what became of an item; false when the rest must be looked at again. What cannot be recorded is tried again.
    async fn finish(&mut self, portal: &Arc<Portal>, seq: i64, done: Done) -> Result<bool, Refusal> {
        let recorded = self.record(portal, seq, done).await;
        if recorded.is_err() {
            self.inbox.put_off(seq, self.core.now_ms());
        }
        recorded
    }

    async fn record(&mut self, portal: &Arc<Portal>, seq: i64, done: Done) -> Result<bool, Refusal> {
        let now = self.core.now_ms();
        let done = match done {
            Done::Later(refusal) => {
                let Some(item) = self.inbox.get(seq) else { return Ok(false) };
                if !effect::still_waits(&self.core, self.source, portal, item).await? {
                    // It was carried over after all, by somebody who did not get to say so.
                    self.inbox.drop_item(seq);
                    return Ok(false);
                }
                self.later(seq, refusal)
            }
            done => done,
        };
        match done {
            Done::Gone => self.inbox.drop_item(seq),
            Done::Crossed => {
                if let Some(item) = self.inbox.take(seq) {
                    if item.event.kind == "m.room.join_rules" {
                        spaces::soon(&self.core, &portal.lm_hub);
                    }
                    let waited = u64::try_from(now.saturating_sub(item.row.received_ts)).unwrap_or(0);
                    metrics::image(self.source.other(), Duration::from_millis(waited));
                }
            }
            Done::Asked => self.inbox.wait(seq),
            Done::Waits => {
                self.inbox.waits(seq, now);
                return Ok(false);
            }
            Done::Later(refusal) => {
                let wait = self.inbox.failed(seq, now, &refusal);
                tracing::warn!(
                    portal = portal.portal_id, side = self.source.as_str(), %refusal, ?wait, "an event waits to cross"
                );
                return Ok(false);
            }
            Done::Refused(refusal) => {
                // Where others pass it, its content is not in memory.
                self.inbox.complete(&self.core, self.source, seq).await?;
                let Some(item) = self.inbox.get(seq) else { return Ok(false) };
                decline(&self.core, portal, self.source, &item.event, &refusal).await?;
                // Should this fail, it is still there to be tried again.
                effect::refused(&self.core, portal, self.source, item, &refusal).await?;
                let Some(item) = self.inbox.take(seq) else { return Ok(false) };
                metrics::image_refused(self.source.other(), &refusal);
                self.core.notices.tell(&self.core, portal, self.source, &item.event, &refusal);
                if item.event.state_key.is_some() {
                    repair::soon(&self.core, &self.entry);
                }
                return Ok(false);
            }
        }
        Ok(true)
    }
}
