//! One task for each room that is hubbed here and has something to append. It takes all that waits as one batch, so that a
//! busy room costs one transaction for many events, and it ends when nothing comes.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt as _;
use ruma::{EventId, OwnedEventId};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};

use super::batch::{Batch, Origin};
use super::room::{Snapshot, Subject};
use super::rooms::{RoomCell, lock};
use super::{Appended, Lm};
use crate::event::{Links, Object, Pdu, VerifiedLpdu};
use crate::guard::guarded_now;
use crate::refusal::Refusal;
use crate::seam::{Draft, EventEffect};
use crate::store::lm as stored;

/// How many events go into one batch; a little more when the last job is large.
const BATCH: usize = 256;
/// How many jobs may wait before those who bring more wait too.
const QUEUE: usize = 256;
/// How long a task waits for more before it ends.
const IDLE: Duration = Duration::from_secs(60);
/// How long appends wait for the target of an invite.
const HOLD: Duration = Duration::from_secs(5);

/// What a room's task is asked to do.
pub(super) enum Job {
    /// Appends events, in order.
    Append(Vec<Item>),
    /// Holds all appends until an event that was built on the end of the log is ready, or until it has taken too long.
    Hold {
        /// Told when the log stands still.
        still: oneshot::Sender<()>,
        /// The event.
        ready: oneshot::Receiver<Item>,
    },
}

/// An event that is to be appended.
pub(super) struct Item {
    pub what: What,
    pub origin: Origin,
    pub reply: oneshot::Sender<Outcome>,
}

/// What an event is made of.
#[derive(Clone)]
pub(super) enum What {
    /// A participant's LPDU.
    Lpdu(VerifiedLpdu),
    /// What a user of the gateway sends.
    Own(Draft),
    /// A finished event with a further server's signature, which stands only right after the event `after`.
    Signed { pdu: Box<Pdu>, after: Option<OwnedEventId> },
}

/// What became of an event.
pub(super) enum Outcome {
    /// It is in the log; it may have been there before.
    Appended(Appended),
    /// It is not.
    Refused(Refusal),
    /// The log has moved since it was built.
    Moved(Option<EventEffect>),
    /// It is one of our users', and another server keeps the log now.
    NotHub(Box<Draft>, Option<EventEffect>),
}

impl What {
    /// Under what its maker knows it.
    fn id(&self) -> String {
        match self {
            Self::Lpdu(lpdu) => lpdu.lpdu_id.to_string(),
            Self::Own(draft) => format!("an event of type {:?}", draft.kind),
            Self::Signed { pdu, .. } => pdu.event_id.to_string(),
        }
    }
}

impl Item {
    /// An item and where its outcome is told.
    pub fn new(what: What, origin: Origin) -> (Self, oneshot::Receiver<Outcome>) {
        let (reply, outcome) = oneshot::channel();
        (Self { what, origin, reply }, outcome)
    }
}

impl Lm {
    /// Gives a job to a room's task, starting it when it does not run.
    pub(super) async fn submit(&self, cell: &Arc<RoomCell>, mut job: Job) {
        loop {
            let sender = {
                let mut jobs = lock(&cell.jobs);
                match jobs.as_ref().filter(|sender| !sender.is_closed()) {
                    Some(sender) => sender.clone(),
                    None => {
                        let (sender, inbox) = mpsc::channel(QUEUE);
                        tokio::spawn(watched(self.clone(), cell.clone(), inbox));
                        jobs.insert(sender).clone()
                    }
                }
            };
            match sender.send(job).await {
                Ok(()) => return,
                // The task ended just now; another one takes the job.
                Err(returned) => job = returned.0,
            }
        }
    }

    /// Appends events, in order, and waits until each is committed or refused.
    pub(super) async fn append(&self, cell: &Arc<RoomCell>, events: Vec<(What, Origin)>) -> Vec<Outcome> {
        let events = match self.append_through_graph(cell, events).await {
            Ok(outcomes) => return outcomes,
            Err(events) => events,
        };
        let (items, outcomes): (Vec<_>, Vec<_>) =
            events.into_iter().map(|(what, origin)| Item::new(what, origin)).unzip();
        self.submit(cell, Job::Append(items)).await;
        let mut answers = Vec::with_capacity(outcomes.len());
        for outcome in outcomes {
            let lost = || Outcome::Refused(Refusal::Internal("the room's task ended".to_owned()));
            answers.push(outcome.await.unwrap_or_else(|_| lost()));
        }
        answers
    }
}

/// A room's task. After a panic outside of the check of any event the room is read anew from the store, by the next task:
/// what is in memory may be more, or less, than what was committed.
async fn watched(lm: Lm, cell: Arc<RoomCell>, inbox: mpsc::Receiver<Job>) {
    if AssertUnwindSafe(run(lm, cell.clone(), inbox)).catch_unwind().await.is_err() {
        tracing::error!(room = %cell.room_id, "a room's task panicked; the room is read anew");
        cell.forget();
    }
}

async fn run(lm: Lm, cell: Arc<RoomCell>, mut inbox: mpsc::Receiver<Job>) {
    loop {
        let mut next = match tokio::time::timeout(IDLE, inbox.recv()).await {
            Ok(Some(job)) => Some(job),
            Ok(None) => return,
            Err(_) if end_if_idle(&cell.jobs, &inbox) => {
                cell.rest();
                return;
            }
            Err(_) => continue,
        };
        let mut items = Vec::new();
        let hold = loop {
            match next.take().or_else(|| inbox.try_recv().ok()) {
                Some(Job::Append(more)) => items.extend(more),
                Some(Job::Hold { still, ready }) => break Some((still, ready)),
                None => break None,
            }
            if items.len() >= BATCH {
                break None;
            }
        };
        process(&lm, &cell, items).await;
        if let Some((still, ready)) = hold
            && still.send(()).is_ok()
            && let Ok(Ok(item)) = tokio::time::timeout(HOLD, ready).await
        {
            process(&lm, &cell, vec![item]).await;
        }
    }
}

/// Whether a task may end: nothing waits, and nobody has a sender with which something could still be given to it. Under
/// the lock, where alone senders are handed out, so that whoever comes next finds nobody and starts another task.
fn end_if_idle(jobs: &Mutex<Option<mpsc::Sender<Job>>>, inbox: &mpsc::Receiver<Job>) -> bool {
    let mut jobs = lock(jobs);
    // One sender is the cell's own.
    let idle = inbox.is_empty() && inbox.sender_strong_count() <= 1;
    if idle {
        *jobs = None;
    }
    idle
}

/// What is known of an item before its batch is committed.
enum Verdict {
    /// It is the entry of this index.
    Entry(usize),
    /// It is in the log already.
    Known(Appended),
    Refused(Refusal),
    Moved,
    NotHub(Box<Draft>),
}

impl Verdict {
    fn into_outcome(self, effect: Option<EventEffect>, entry: impl FnOnce(usize) -> Outcome) -> Outcome {
        match self {
            Self::Entry(index) => entry(index),
            Self::Known(appended) => Outcome::Appended(appended),
            Self::Refused(refusal) => Outcome::Refused(refusal),
            Self::Moved => Outcome::Moved(effect),
            Self::NotHub(draft) => Outcome::NotHub(draft, effect),
        }
    }
}

async fn process(lm: &Lm, cell: &Arc<RoomCell>, mut items: Vec<Item>) {
    // What hands the log over is a batch of its own: what comes after it is not ours to append.
    let hands_over = |item: &Item| matches!(&item.what, What::Signed { pdu, .. } if pdu.new_hub().is_some());
    while let Some(place) = items.iter().position(hands_over) {
        let after = items.split_off(place.saturating_add(1));
        let transfer = items.pop();
        process_together(lm, cell, items).await;
        process_together(lm, cell, transfer.into_iter().collect()).await;
        items = after;
    }
    process_together(lm, cell, items).await;
}

async fn process_together(lm: &Lm, cell: &Arc<RoomCell>, items: Vec<Item>) {
    if !lm.careful().is(&cell.room_id) {
        return in_batches(lm, cell, items).await;
    }
    for item in items {
        in_batches(lm, cell, vec![item]).await;
    }
}

async fn in_batches(lm: &Lm, cell: &Arc<RoomCell>, mut items: Vec<Item>) {
    while !items.is_empty() {
        items = match try_batch(lm, cell, items).await {
            Ok(rest) => rest,
            Err((items, refusal)) => {
                for item in items {
                    let _ = item.send(Outcome::Refused(refusal.clone()));
                }
                return;
            }
        };
    }
}

type Replies = Vec<oneshot::Sender<Outcome>>;

/// Appends what can be appended; returns the items after one whose effect failed, which must be built anew.
async fn try_batch(lm: &Lm, cell: &Arc<RoomCell>, items: Vec<Item>) -> Result<Vec<Item>, (Replies, Refusal)> {
    let ready = async {
        let snapshot = cell.snapshot(&lm.context().store).await?;
        let known = known_lpdus(lm, &items).await?;
        Ok::<_, Refusal>((snapshot, known))
    };
    let (snapshot, known) = match ready.await {
        Ok(ready) => ready,
        Err(refusal) => return Err((items.into_iter().map(|item| item.reply).collect(), refusal)),
    };
    let mut batch = Batch::new(snapshot);
    let mut placed: HashMap<OwnedEventId, usize> = HashMap::new();
    // Only an effect can fail, so that what follows it must be built once more.
    let may_fail = items.iter().any(|item| item.origin.effect.is_some());
    let mut judged = Vec::with_capacity(items.len());
    for Item { what, mut origin, reply } in items {
        let again = may_fail.then(|| (what.clone(), Origin { effect: None, ..origin_of(&origin) }));
        let verdict = match already_there(&what, &known, &placed) {
            Some(verdict) => verdict,
            None => {
                let id = what.id();
                let placed = guarded_now(&id, || Ok(place(lm, &mut batch, &mut placed, what, &mut origin)));
                placed.unwrap_or_else(Verdict::Refused)
            }
        };
        judged.push((verdict, again, origin.effect.take(), reply));
    }
    let committed = match batch.commit(lm, Some(cell)).await {
        Ok(committed) => committed,
        Err(refusal) => {
            for (verdict, _, effect, reply) in judged {
                let _ = reply.send(verdict.into_outcome(effect, |_| Outcome::Refused(refusal.clone())));
            }
            return Ok(Vec::new());
        }
    };
    let kept = committed.appended.len();
    let mut untried = committed.untried;
    let mut failed = committed.failed;
    let mut failed_passed = false;
    let mut rest = Vec::new();
    for (verdict, again, effect, reply) in judged {
        if failed_passed {
            let effect = match verdict {
                Verdict::Entry(index) => {
                    let place = index.saturating_sub(kept).checked_sub(1);
                    place.and_then(|place| untried.get_mut(place)).and_then(Option::take)
                }
                _ => effect,
            };
            if let Some((what, origin)) = again {
                rest.push(Item { what, origin: Origin { effect, ..origin }, reply });
            }
            continue;
        }
        let outcome = verdict.into_outcome(effect, |index| match committed.appended.get(index) {
            Some(appended) => Outcome::Appended(appended.clone()),
            None => {
                failed_passed = index >= kept;
                let error = failed.take().map_or_else(|| "not appended".to_owned(), |error| error.to_string());
                Outcome::Refused(Refusal::Internal(error))
            }
        });
        let _ = reply.send(outcome);
    }
    Ok(rest)
}

fn origin_of(origin: &Origin) -> Origin {
    Origin { foreign: origin.foreign, answered: origin.answered, ..Origin::default() }
}

/// The items' LPDUs that are in the log already.
async fn known_lpdus(lm: &Lm, items: &[Item]) -> Result<HashMap<OwnedEventId, Appended>, Refusal> {
    let lpdu_ids: Vec<&EventId> = items
        .iter()
        .filter_map(|item| match &item.what {
            What::Lpdu(lpdu) => Some(&*lpdu.lpdu_id),
            What::Signed { pdu, .. } => pdu.lpdu_id.as_deref(),
            What::Own(_) => None,
        })
        .collect();
    let mut known = HashMap::new();
    if lpdu_ids.is_empty() {
        return Ok(known);
    }
    for lpdu_id in stored::positions_of_lpdus(&lm.context().store, &lpdu_ids).await?.into_keys() {
        if let Some(appended) = lm.event_of_lpdu(&lpdu_id).await? {
            known.insert(lpdu_id, appended);
        }
    }
    Ok(known)
}

fn already_there(
    what: &What,
    known: &HashMap<OwnedEventId, Appended>,
    placed: &HashMap<OwnedEventId, usize>,
) -> Option<Verdict> {
    let lpdu_id = match what {
        What::Lpdu(lpdu) => &lpdu.lpdu_id,
        What::Signed { pdu, .. } => pdu.lpdu_id.as_ref()?,
        What::Own(_) => return None,
    };
    if let Some(index) = placed.get(lpdu_id) {
        return Some(Verdict::Entry(*index));
    }
    known.get(lpdu_id).cloned().map(Verdict::Known)
}

/// Judges an event at the end of the batch and adds it.
fn place(
    lm: &Lm,
    batch: &mut Batch,
    placed: &mut HashMap<OwnedEventId, usize>,
    what: What,
    origin: &mut Origin,
) -> Verdict {
    let hub = &batch.after.facts.hub;
    if *hub != lm.context().server_name {
        return match what {
            What::Own(draft) => Verdict::NotHub(Box::new(draft)),
            What::Lpdu(lpdu) => {
                Verdict::Refused(Refusal::WrongHub { hub: hub.to_string(), found: lpdu.hub_server.to_string() })
            }
            What::Signed { .. } => Verdict::Moved,
        };
    }
    let pdu = match what {
        What::Signed { pdu, after } if batch.after.last_id() == after.as_ref() => Ok(*pdu),
        What::Signed { .. } => return Verdict::Moved,
        What::Lpdu(lpdu) => lm.complete(&batch.after, lpdu),
        What::Own(draft) => lm.build(&batch.after, &draft),
    };
    match pdu {
        Ok(pdu) => {
            let lpdu_id = pdu.lpdu_id.clone();
            let taken = Origin { effect: origin.effect.take(), ..origin_of(origin) };
            let index = batch.push(pdu, taken);
            placed.extend(lpdu_id.map(|lpdu_id| (lpdu_id, index)));
            Verdict::Entry(index)
        }
        Err(refusal) => Verdict::Refused(refusal),
    }
}

/// How the hub makes events.
impl Lm {
    /// Finishes a participant's LPDU as the next event after `room`, if the rules allow it there.
    pub(super) fn complete(&self, room: &Snapshot, lpdu: VerifiedLpdu) -> Result<Pdu, Refusal> {
        let empty = Object::new();
        let content = lpdu.json.get("content").and_then(Value::as_object).unwrap_or(&empty);
        let links = allow(room, &Subject::lpdu(&lpdu, content))?;
        let context = self.context();
        Pdu::complete_among(lpdu, links, &context.server_name, &context.signing_key)
    }

    /// Makes an event of one of the gateway's own users as the next event after `room`, if the rules allow it there.
    pub(super) fn build(&self, room: &Snapshot, draft: &Draft) -> Result<Pdu, Refusal> {
        let links = self.allow_draft(room, draft)?;
        let context = self.context();
        Pdu::build_among(template(&room.facts.room_id, draft), links, &context.server_name, &context.signing_key)
    }

    /// What the hub would add to a draft, if it is allowed.
    pub(super) fn allow_draft(&self, room: &Snapshot, draft: &Draft) -> Result<Links, Refusal> {
        let own = &self.context().server_name;
        if draft.sender.server_name() != own {
            let (origin, expected) = (own.to_string(), draft.sender.server_name().to_string());
            return Err(Refusal::WrongOrigin { origin, expected });
        }
        // Where another server keeps the log, it will have signed it.
        let subject = Subject::draft(draft, (room.facts.hub != *own && !room.facts.shared).then_some(true));
        allow(room, &subject)
    }
}

fn allow(room: &Snapshot, subject: &Subject<'_>) -> Result<Links, Refusal> {
    let (slots, auth_events) = room.auth_events(subject);
    room.judge(subject, &slots)?;
    let prev_events = room.last_id().cloned().into_iter().collect();
    Ok(Links { auth_events, prev_events, redaction: room.facts.redaction() })
}

/// A draft as the template of an event.
pub(super) fn template(room_id: &ruma::RoomId, draft: &Draft) -> Object {
    let mut template = Object::new();
    template.insert("type".to_owned(), json!(draft.kind));
    template.insert("room_id".to_owned(), json!(room_id));
    template.insert("sender".to_owned(), json!(draft.sender));
    template.insert("origin_server_ts".to_owned(), json!(draft.origin_server_ts));
    template.insert("content".to_owned(), Value::Object(draft.content.clone()));
    if let Some(state_key) = &draft.state_key {
        template.insert("state_key".to_owned(), json!(state_key));
    }
    template
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_does_not_end_while_somebody_may_still_give_it_a_job() {
        let (sender, mut inbox) = mpsc::channel(QUEUE);
        let jobs = Mutex::new(Some(sender));
        // Somebody who brings a job has taken the sender and has not sent yet.
        let bringing = lock(&jobs).clone().unwrap();
        assert!(!end_if_idle(&jobs, &inbox), "the job would be lost");
        assert!(bringing.send(Job::Append(Vec::new())).await.is_ok());
        drop(bringing);
        assert!(!end_if_idle(&jobs, &inbox), "the job would be lost");
        assert!(matches!(inbox.recv().await, Some(Job::Append(_))));
        assert!(end_if_idle(&jobs, &inbox));
        assert!(lock(&jobs).is_none(), "whoever comes next starts another task");
    }
}
