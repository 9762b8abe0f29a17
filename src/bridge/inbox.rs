//! The inbox of one direction in memory: the rows that wait, with their events; what need not cross is sorted out when it is
//! read. Rows that others pass are held without their content, and only so many of anybody ([`super::left`]).

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use ruma::{OwnedEventId, UserId};

use super::core::Core;
use super::left::Left;
use super::linearize::{Hold, Waiting};
use super::portal::Portal;
use super::registry::Entry;
use super::side::Event;
use super::users::Who;
use super::{access, carry, effect, ends, gate, repair, translate};
use crate::event::Object;
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::store::images;
use crate::store::inbox::{self, InboxRow};

/// How many rows are held in memory at once, besides those that others pass.
const WINDOW: usize = 500;
/// The longest pause between two tries.
pub(super) const MAX_PAUSE: Duration = Duration::from_secs(300);

/// An event that waits.
pub(super) struct Item {
    pub(super) row: InboxRow,
    pub(super) event: Event,
    pub(super) waiting: Waiting,
    /// Not tried again before this time, in milliseconds.
    pub(super) retry_at: i64,
    /// Since when it could not go.
    pub(super) blocked_since: Option<i64>,
    /// Whether it waits for its server's budget.
    pub(super) over_budget: bool,
    /// Whether it needs another server's answer.
    pub(super) asks_server: bool,
    /// How often it has failed in a row.
    pub(super) failures: u32,
    /// Whether it waits for an echo.
    pub(super) waits: bool,
    /// Whether others pass it.
    passed: bool,
    /// Whether the event is here without its content.
    without_content: bool,
}

/// What waits, in the order of acceptance.
#[derive(Default)]
pub(super) struct Inbox {
    pub(super) items: VecDeque<Item>,
    cursor: i64,
    /// Whether the last look found everything.
    exhausted: bool,
    left: Left,
}

impl Inbox {
    /// Reads more rows, as far as there is room. True when there were some, even if nothing of them must cross.
    pub(super) async fn load(
        &mut self,
        core: &Arc<Core>,
        entry: &Arc<Entry>,
        portal: &Arc<Portal>,
        source: Side,
    ) -> Result<bool, Refusal> {
        let again = self.left.due();
        let was_again = again.is_some();
        let room = match &again {
            Some(_) => WINDOW,
            None => WINDOW.saturating_sub(self.items.iter().filter(|item| !item.passed).count()),
        };
        if room == 0 {
            return Ok(false);
        }
        let limit = i64::try_from(room).unwrap_or(1);
        let store = &core.context.store;
        let after = again.as_ref().map_or(self.cursor, |again| again.after);
        let rows = inbox::waiting(store, source, portal.room(source), after, limit).await?;
        let exhausted = rows.len() < room;
        let last = rows.last().map(|row| row.seq);
        let rows = match again {
            Some(_) => rows.into_iter().filter(|row| row.seq <= self.cursor && self.place(row.seq).is_none()).collect(),
            None => rows,
        };
        let lpdus: HashSet<OwnedEventId> = self.items.iter().filter_map(|item| item.event.lpdu_id.clone()).collect();
        let takes = |seq: i64, sender: &UserId| self.left.takes(seq, sender, again.as_ref());
        let mut sorted = sort(core, portal, source, rows, lpdus, takes).await?;
        effect::sorted_out(core, entry, portal, source, sorted.out).await?;
        if sorted.may_end || sorted.strays {
            repair::soon(core, entry);
        }
        if sorted.echoes {
            // What waited for an echo is on the other direction.
            entry.direction(source.other()).wake.notify_one();
        }
        self.items.append(&mut sorted.items);
        match again {
            Some(again) => {
                self.items.make_contiguous().sort_by_key(|item| item.row.seq);
                self.left.was_read(&again, last.filter(|last| !exhausted && *last < self.cursor));
            }
            None => {
                self.exhausted = exhausted;
                self.cursor = last.unwrap_or(self.cursor);
            }
        }
        Ok(last.is_some() || was_again)
    }

    /// Takes down what the rows hold back that do not go now.
    pub(super) fn held(&mut self, holds: &[Option<Hold>]) {
        for (item, hold) in self.items.iter_mut().zip(holds) {
            item.passed = hold.is_some_and(|hold| hold < Hold::Descendants);
            if item.passed {
                item.event.content = Object::new();
                item.without_content = true;
            }
        }
        self.left.count(self.items.iter().filter(|item| item.passed).map(|item| &*item.event.sender));
    }

    /// Reads the content of an event again that was held without it. False when the event is gone.
    pub(super) async fn complete(&mut self, core: &Core, source: Side, seq: i64) -> Result<bool, Refusal> {
        let Some(item) = self.get_mut(seq) else { return Ok(false) };
        if item.without_content {
            let Some(event) = core.sides()?.rooms(source).event(&item.row.event_id).await? else { return Ok(false) };
            (item.event, item.without_content) = (event, false);
        }
        Ok(true)
    }

    /// Those of `events` that still wait and are not in memory.
    pub(super) async fn passed_over(
        &self,
        core: &Core,
        source: Side,
        events: &[OwnedEventId],
    ) -> Result<HashSet<OwnedEventId>, Refusal> {
        if self.left.is_empty() || events.is_empty() {
            return Ok(HashSet::new());
        }
        let mut waiting = inbox::those_that_wait(&core.context.store, source, events).await?;
        for item in &self.items {
            waiting.remove(&item.row.event_id);
        }
        Ok(waiting)
    }

    /// Whether there may be more rows although nobody says so.
    pub(super) fn may_have_more(&self) -> bool {
        !self.exhausted || self.left.due().is_some()
    }

    /// The next look finds what came since the last one.
    pub(super) fn look_again(&mut self) {
        self.exhausted = false;
    }

    /// Whether there may be many more than are in memory.
    pub(super) fn is_full(&self, limit: usize) -> bool {
        self.items.len() >= WINDOW.min(limit)
    }

    /// An item.
    pub(super) fn get(&self, seq: i64) -> Option<&Item> {
        self.items.get(self.place(seq)?)
    }

    fn place(&self, seq: i64) -> Option<usize> {
        self.items.binary_search_by_key(&seq, |item| item.row.seq).ok()
    }

    fn get_mut(&mut self, seq: i64) -> Option<&mut Item> {
        let place = self.place(seq)?;
        self.items.get_mut(place)
    }

    /// It is `now`. Nothing is put off for longer than the longest pause, also when the clock was set back.
    pub(super) fn clock(&mut self, now: i64) {
        let latest = now.saturating_add(i64::try_from(MAX_PAUSE.as_millis()).unwrap_or(i64::MAX));
        for item in &mut self.items {
            // What another server is asked for is told by the one who asks.
            if item.retry_at > latest && item.retry_at != i64::MAX {
                item.retry_at = now;
            }
            item.blocked_since = item.blocked_since.map(|since| since.min(now));
            item.row.received_ts = item.row.received_ts.min(now);
        }
    }

    /// Takes an item out.
    pub(super) fn take(&mut self, seq: i64) -> Option<Item> {
        self.items.remove(self.place(seq)?)
    }

    /// Forgets an item that is done.
    pub(super) fn drop_item(&mut self, seq: i64) {
        drop(self.take(seq));
    }

    /// Puts an item off that waits for an echo: the longer it has waited, the less often it is looked.
    pub(super) fn waits(&mut self, seq: i64, now: i64) {
        if let Some(item) = self.get_mut(seq) {
            let waited = item.blocked_since.map_or(0, |since| now.saturating_sub(since));
            item.retry_at = now.saturating_add((waited / 4).clamp(250, 5_000));
            (item.failures, item.waits) = (0, true);
        }
    }

    /// Puts an item off until it is heard of.
    pub(super) fn wait(&mut self, seq: i64) {
        if let Some(item) = self.get_mut(seq) {
            item.retry_at = i64::MAX;
        }
    }

    /// How often an item has failed.
    pub(super) fn failures(&self, seq: i64) -> u32 {
        self.get(seq).map_or(0, |item| item.failures)
    }

    /// Puts an item off that failed: a second, then twice as long each time.
    pub(super) fn failed(&mut self, seq: i64, now: i64, refusal: &Refusal) -> Duration {
        let pause = match refusal {
            Refusal::Budget { retry_after_ms, .. } => Duration::from_millis(*retry_after_ms).min(MAX_PAUSE),
            _ => self.pause(seq),
        };
        if let Some(item) = self.get_mut(seq) {
            item.over_budget = matches!(refusal, Refusal::Budget { .. });
            item.retry_at = now.saturating_add(i64::try_from(pause.as_millis()).unwrap_or(i64::MAX));
            item.failures = item.failures.saturating_add(1);
        }
        pause
    }

    /// Puts an item off of which it could not be recorded what became of it: that does not count as its failure.
    pub(super) fn put_off(&mut self, seq: i64, now: i64) {
        let pause = self.pause(seq);
        if let Some(item) = self.get_mut(seq) {
            item.retry_at = now.saturating_add(i64::try_from(pause.as_millis()).unwrap_or(i64::MAX));
        }
    }

    /// How long an item rests that has failed as often as this one.
    fn pause(&self, seq: i64) -> Duration {
        Duration::from_secs(1_u64.checked_shl(self.failures(seq)).unwrap_or(u64::MAX)).min(MAX_PAUSE)
    }
}

/// Why a row goes no further.
pub(super) enum Out {
    /// It has crossed, or is the gateway's own.
    Done,
    /// It is the echo of this LPDU of the gateway's.
    Echo(OwnedEventId),
    /// It does not cross.
    Refused(Box<Event>, Refusal),
    /// The store does not know the event.
    Lost,
}

struct Sorted {
    items: VecDeque<Item>,
    out: Vec<(InboxRow, Out)>,
    echoes: bool,
    /// Whether an event among them may end the portal.
    may_end: bool,
    /// Whether a ghost among them has joined for nobody.
    strays: bool,
}

/// What is to be done with rows, as far as `takes` takes them. `seen` are the LPDUs of those that wait already: a hub may
/// have appended one twice, and it crosses once.
async fn sort(
    core: &Core,
    portal: &Portal,
    source: Side,
    rows: Vec<InboxRow>,
    mut seen: HashSet<OwnedEventId>,
    mut takes: impl FnMut(i64, &UserId) -> bool,
) -> Result<Sorted, Refusal> {
    let store = &core.context.store;
    let rooms = core.sides()?.rooms(source);
    let mut events = Vec::with_capacity(rows.len());
    for row in rows {
        let event = rooms.event(&row.event_id).await?;
        events.push((row, event));
    }
    let ids: Vec<OwnedEventId> = events.iter().map(|(row, _)| row.event_id.clone()).collect();
    let lpdus: Vec<OwnedEventId> = events.iter().filter_map(|(_, event)| event.as_ref()?.lpdu_id.clone()).collect();
    let crossed = images::of_sources(store, source, &ids).await?;
    let twice = if lpdus.is_empty() { Default::default() } else { images::of_lpdus(store, &lpdus).await? };
    let mut sorted = Sorted { items: VecDeque::new(), out: Vec::new(), echoes: false, may_end: false, strays: false };
    for (row, event) in events {
        let Some(event) = event else {
            tracing::error!(portal = portal.portal_id, event = %row.event_id, "an accepted event is not in the store");
            sorted.out.push((row, Out::Lost));
            continue;
        };
        let again =
            event.lpdu_id.as_ref().and_then(|lpdu| twice.get(lpdu)).is_some_and(|first| *first != event.event_id)
                || event.lpdu_id.as_ref().is_some_and(|lpdu| seen.contains(lpdu));
        if crossed.contains_key(&event.event_id) || again {
            sorted.out.push((row, Out::Done));
            continue;
        }
        sorted.may_end |= ends::may_end(portal, source, &event, core.users.bot());
        if !takes(row.seq, &event.sender) {
            continue;
        }
        match core.users.who(store, source, &event.sender).await? {
            // INV-7: what the gateway itself made is never translated back.
            Who::Ghost { .. } | Who::Bot => {
                sorted.strays |= gate::is_stray(core, portal, &event) && !is_image(core, source, &event).await?;
                let echo = event.lpdu_id.clone().map_or(Out::Done, Out::Echo);
                sorted.echoes |= matches!(echo, Out::Echo(_));
                sorted.out.push((row, echo));
            }
            who => match admit(core, source, &event, &who) {
                Err(refusal) => sorted.out.push((row, Out::Refused(Box::new(event), refusal))),
                Ok(()) => {
                    seen.extend(event.lpdu_id.clone());
                    sorted.items.push_back(item(core, row, event));
                }
            },
        }
    }
    Ok(sorted)
}

/// Whether the echo of an LPDU is that of an image.
async fn is_image(core: &Core, source: Side, event: &Event) -> Result<bool, Refusal> {
    let Some(lpdu_id) = &event.lpdu_id else { return Ok(false) };
    let images = images::of_images(&core.context.store, source.other(), std::slice::from_ref(lpdu_id)).await?;
    Ok(!images.is_empty())
}

/// Whether an event may cross as far as its type and its sender's server go.
fn admit(core: &Core, source: Side, event: &Event, who: &Who) -> Result<(), Refusal> {
    if *who == Who::Stranger {
        return Err(carry::stranger(&event.sender));
    }
    if *who != Who::Appservice {
        access::takes_part(&core.context.config.access, source, event.sender.server_name())?;
    }
    translate::crosses(event)
}

fn item(core: &Core, row: InboxRow, event: Event) -> Item {
    let membership = event.membership();
    // A far user is invited through their server, which may be slow or dead: nobody else waits for that.
    let asks_server = membership.as_ref().is_some_and(|(target, membership)| {
        *membership == "invite" && target.server_name() == core.context.server_name
    });
    let takes_out = membership
        .as_ref()
        .is_some_and(|(target, membership)| *target != event.sender && matches!(*membership, "leave" | "ban"));
    let waiting = Waiting {
        event_id: event.event_id.clone(),
        sender: event.sender.clone(),
        order: event.order,
        needs: translate::references(&event).needs,
        moderates: takes_out || event.kind == "m.room.redaction",
        member: membership.map(|(target, _)| target),
        hold: None,
    };
    Item {
        row,
        event,
        waiting,
        retry_at: 0,
        blocked_since: None,
        over_budget: false,
        asks_server,
        failures: 0,
        waits: false,
        passed: false,
        without_content: false,
    }
}
