//! Who keeps a log now, where we have missed how it was handed on: a participant that was away meanwhile asks the others in the
//! room, since the servers that it would have heard it from may be gone. What they say is believed for its signatures alone: each
//! change has those of the hub before it, the first of the hub that is known here, and of the hub after it.

use std::sync::Arc;
use std::time::Duration;

use futures::{FutureExt as _, StreamExt as _, stream};
use rand::seq::SliceRandom as _;
use ruma::{EventId, OwnedEventId, OwnedServerName, RoomId, ServerName};
use serde_json::Value;
use tokio::time::Instant;

use super::finished::Finished;
use super::intake::Taking;
use super::room::Snapshot;
use super::rooms::{RoomCell, lock};
use super::rules::HUB_EVENT;
use super::served::to_values;
use super::{Lm, Role};
use crate::event::{Object, Pdu};
use crate::refusal::Refusal;
use crate::store::lm::{self as stored, Fault};

/// How many servers are asked, and for how long each.
const ASKED: usize = 16;
const ASK: Duration = Duration::from_secs(5);
/// How many changes of a log a server tells, and how many are taken from one.
const CHANGES: usize = 50;
/// How much time is between two searches for the hub of a room.
pub(super) const EVERY: Duration = Duration::from_secs(60);
/// How long a hub to which a log was given may not know of it.
const HEARS: Duration = Duration::from_secs(90);
/// The same where nobody has said that the hub is another.
pub(super) const SELDOM: Duration = Duration::from_secs(600);

impl Lm {
    /// The events by which a log came from hub to hub, the last ones.
    pub(super) async fn changes(&self, room_id: &RoomId, room: &Snapshot) -> Result<Vec<Value>, Refusal> {
        if !room.was_handed_over() {
            return Ok(Vec::new());
        }
        let limit = i64::try_from(CHANGES).unwrap_or(i64::MAX);
        to_values(&stored::stood_before(&self.context().store, room_id, (HUB_EVENT, ""), i64::MAX, limit).await?)
    }

    /// It may be that another server keeps a log than the one that is known here: asks the others in the room, and `who` first, who
    /// said so. Not more often than `every`.
    pub(super) fn seek_hub(&self, cell: &Arc<RoomCell>, who: Option<OwnedServerName>, every: Duration) {
        if !is_due(cell, self.looks().pace(every)) {
            return;
        }
        let (lm, cell) = (self.clone(), cell.clone());
        tokio::spawn(async move {
            if let Err(refusal) = lm.find_hub(&cell, who).boxed().await {
                tracing::info!(room = %cell.room_id, %refusal, "it was not found out who keeps a log now");
            }
        });
    }

    /// The same, as soon as it is due: who says that it is not the hub gets what waits once more after each search.
    pub(super) fn seek_hub_in_time(&self, cell: &Arc<RoomCell>, who: OwnedServerName) {
        let left = {
            let mut sought = lock(&cell.sought);
            let now = Instant::now();
            let due = sought.map_or(now, |at| at + self.looks().pace(EVERY));
            if sought.is_some_and(|at| at > now) {
                // Somebody waits for that already.
                return;
            }
            *sought = Some(due.max(now));
            due.saturating_duration_since(now)
        };
        let (lm, cell) = (self.clone(), cell.clone());
        tokio::spawn(async move {
            tokio::time::sleep(left).await;
            if !lock(&cell.ahead).has_misdirected() || lm.context().store.reader().is_closed() {
                return;
            }
            if let Err(refusal) = lm.find_hub(&cell, Some(who.clone())).boxed().await {
                tracing::info!(room = %cell.room_id, %refusal, "it was not found out who keeps a log now");
                lm.seek_hub_in_time(&cell, who);
            }
        });
    }

    /// The same, and waits for what is found; the room as it is then.
    pub(super) async fn seek_hub_now(
        &self,
        cell: &Arc<RoomCell>,
        who: Option<OwnedServerName>,
    ) -> Result<Arc<Snapshot>, Refusal> {
        if is_due(cell, self.looks().pace(EVERY)) {
            self.find_hub(cell, who).boxed().await?;
        }
        Ok(cell.snapshot(&self.context().store).await?)
    }

    async fn find_hub(&self, cell: &Arc<RoomCell>, who: Option<OwnedServerName>) -> Result<(), Refusal> {
        let store = &self.context().store;
        let before = cell.snapshot(store).await?;
        if !matches!(self.role(&before), Role::Participant { .. }) {
            return Ok(());
        }
        let told = self.ask_for_changes(&before, who.as_deref()).await;
        let changes = self.check_finished_patiently(told, before.redaction).await;
        let current = before.state_event(HUB_EVENT, "").map(|event| event.event_id.clone());
        let path = path(&cell.room_id, &before.facts.hub, current, changes.into_iter().flatten().collect());
        let _turn = cell.intake.lock().await;
        let room = cell.snapshot(store).await?;
        if room.facts.hub != before.facts.hub {
            return Ok(());
        }
        let last = path.into_iter().next_back();
        let Some((hub, last)) = last.and_then(|last| Some((last.pdu.new_hub()?.to_owned(), last))) else {
            let hub = room.facts.hub.clone();
            let remarked = self.remark(cell, room, who).await;
            if lock(&cell.ahead).go_on() {
                // It may know more by now. If not, it says so again.
                self.send_on(&cell.room_id, &hub);
            }
            return remarked;
        };
        if hub == self.context().server_name
            && let Some(missing) = self.missing_before(cell, &room, &last.pdu).await?
        {
            // Whatever is here is not what was here when we agreed to it.
            return Err(Refusal::Forbidden(format!("{} gave us this log, but {missing}", last.pdu.sender)));
        }
        tracing::info!(room = %cell.room_id, from = %room.facts.hub, %hub, "a log was handed on while we were away");
        let mut taking = Taking::begin(self, cell, room).await?;
        taking.announced = Some(hub);
        let taken = taking.take(last).await?;
        taking.finish(Some(cell)).await?;
        self.came_to_another_hub(&cell.room_id);
        taken
    }

    /// What the servers in the room say of its changes of the hub.
    async fn ask_for_changes(&self, room: &Snapshot, who: Option<&ServerName>) -> Vec<Object> {
        let own = &self.context().server_name;
        let mut servers: Vec<_> =
            room.servers().filter(|server| *server != own && Some(&***server) != who).cloned().collect();
        servers.shuffle(&mut rand::rngs::OsRng);
        servers.truncate(ASKED);
        servers.extend(who.map(ServerName::to_owned));
        let room_id = &room.facts.room_id;
        let asked = stream::iter(servers).map(|server| async move {
            let mut answer = tokio::time::timeout(ASK, self.peers().ready(&server, room_id)).await.ok()?.ok()?;
            match answer.remove("changes")? {
                Value::Array(changes) => Some(changes),
                _ => None,
            }
        });
        let answers: Vec<_> = asked.buffer_unordered(ASKED).filter_map(|changes| async { changes }).collect().await;
        let mut found: Vec<Object> = Vec::new();
        for change in answers.into_iter().flat_map(|changes| changes.into_iter().take(CHANGES)) {
            if let Value::Object(change) = change
                && !found.contains(&change)
            {
                found.push(change);
            }
        }
        found
    }

    /// Nobody shows another hub than the one that is known. Where that one has said that it is not the hub, that is written down:
    /// what any other server says without showing it is nothing.
    async fn remark(
        &self,
        cell: &Arc<RoomCell>,
        room: Arc<Snapshot>,
        who: Option<OwnedServerName>,
    ) -> Result<(), Refusal> {
        let refuses = lock(&cell.ahead).misdirected_for();
        let Some((head, refuses)) = room.last_id().cloned().zip(refuses) else { return Ok(()) };
        // It was given the log by a server that it takes for the hub still: it has not heard of that, and finds out now.
        if room.was_handed_over() && refuses < HEARS {
            return Ok(());
        }
        let named = who.filter(|who| *who != room.facts.hub).map_or_else(String::new, |who| format!(" but {who}"));
        let problem = format!(
            "{} says that it does not keep this room's log any more{named}, and no server in the room shows by what event it was \
             handed on: nothing that is said here gets there until one does",
            room.facts.hub
        );
        let mut taking = Taking::begin(self, cell, room).await?;
        taking.fault(Fault::Moved, &head, &problem);
        taking.finish(Some(cell)).await.map(drop)
    }
}

/// Whether the hub of a room was last sought so long ago; if so it is from now on.
fn is_due(cell: &RoomCell, every: Duration) -> bool {
    let mut sought = lock(&cell.sought);
    let due = sought.is_none_or(|at| at.elapsed() >= every);
    if due {
        *sought = Some(Instant::now());
    }
    due
}

/// The changes that lead on from a hub, each by the server that the one before named, in order. `current` is the one by which the
/// first came to keep the log.
fn path(
    room_id: &RoomId,
    hub: &ServerName,
    current: Option<OwnedEventId>,
    mut changes: Vec<Finished>,
) -> Vec<Finished> {
    changes.retain(|event| event.redacted.is_none() && event.pdu.room_id == *room_id && event.pdu.new_hub().is_some());
    let all: Vec<OwnedEventId> = changes.iter().map(|event| event.pdu.event_id.clone()).collect();
    // One that begins a log's changes names none before it.
    let follows = |pdu: &Pdu, current: Option<&EventId>| match current {
        Some(current) => pdu.auth_events.iter().any(|id| id == current),
        None => !pdu.auth_events.iter().any(|id| all.contains(id)),
    };
    let (mut hub, mut current) = (hub.to_owned(), current);
    let mut path = Vec::new();
    loop {
        let next = changes
            .iter()
            .position(|event| event.pdu.sender.server_name() == hub && follows(&event.pdu, current.as_deref()));
        let Some(next) = next.map(|index| changes.swap_remove(index)) else { return path };
        let Some(named) = next.pdu.new_hub() else { return path };
        (hub, current) = (named.to_owned(), Some(next.pdu.event_id.clone()));
        path.push(next);
    }
}
