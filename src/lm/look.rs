//! Looking after a foreign hub's log as a whole. A hub that lets its log fork gives events that are nobody's ancestors: what of
//! them did not arrive is found by the hub's order alone, so its log is looked over. A hub that goes back does not know any more
//! what it gave before: nothing is sent to it until it does. What it took and did not put into its log is sent again.
//!
//! A hub that gives events without their content, which no redaction in its log names, keeps from its participants what was said.
//!
//! That is looked for at the start, after an outage of the hub, after its log forked, when an LPDU that it took does not
//! come back, and when an event came without its content. Of who has left the hub may say nothing any more: then its state shows the leave.

mod again;
mod blanks;
mod left;

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use futures::FutureExt as _;
use ruma::{EventId, OwnedEventId, OwnedRoomId, OwnedServerName, RoomId, ServerName};
use tokio::sync::{AcquireError, Notify, OwnedSemaphorePermit, Semaphore, SemaphorePermit};
use tokio::time::Instant;

use self::left::Leaving;
use super::gaps::{ASKERS, Filled, is_verdict};
use super::intake::Taking;
use super::peers::prev_events;
use super::room::Snapshot;
use super::rooms::{RoomCell, lock};
use super::{Inner, Lm, whereabouts};
use crate::federation::{Feed, FeedKind, RemoteError};
use crate::refusal::Refusal;
use crate::store::StoreError;
use crate::store::lm::{self as stored, Fault, Look, TakenRow};

/// When a room is looked after whose hub's log has forked just now.
const SETTLED: Duration = Duration::from_secs(5);
/// How much time is between two looks at the same room.
const EVERY: Duration = Duration::from_secs(30);
/// When the rooms are looked after of which something is known that asks for it, and when the others, after a start.
const SOON: Duration = Duration::from_secs(1);
const AT_START: Duration = Duration::from_secs(15);
/// When a look is repeated that could not be had.
const AGAIN: Duration = Duration::from_secs(60);
/// How long an LPDU that the hub took may take to come back before it is looked for, and so each time that it was sent again.
const FIRST_ECHO_MS: i64 = 30_000;
const ECHO_MS: [i64; 4] = [FIRST_ECHO_MS, 5 * 60_000, 30 * 60_000, 60 * 60_000];
/// How long nothing must have come of a room whose hub does not tell where its log ends, before what it took counts as lost. That long
/// it is not asked again either.
const QUIET: Duration = Duration::from_secs(5 * 60);
/// How many LPDUs of a room are looked for at once.
const TAKEN: i64 = 500;
/// Of how many hubs rooms are looked after at once: of each one room, so that a slow one holds up its own rooms alone.
const AT_ONCE: usize = 64;
/// How often a room's log is complained of at most.
const WARN_EVERY: Duration = Duration::from_secs(60);

/// What is known of the rooms of foreign hubs, and who looks after them.
pub(super) struct Looks {
    rooms: Mutex<HashMap<OwnedRoomId, Looked>>,
    places: Semaphore,
    /// Whose rooms are being looked after, or wait for that.
    hubs: Mutex<HashMap<OwnedServerName, Arc<Semaphore>>>,
    /// By how much all is done sooner.
    haste: AtomicU32,
    /// When this run began, in milliseconds: what came before is not known.
    began_ts: AtomicI64,
}

#[derive(Default)]
struct Looked {
    known: Look,
    at_work: bool,
    /// When it is to be looked for what may come back, and when the hub is to be asked whatever comes.
    due: Option<Instant>,
    ask_at: Option<Instant>,
    /// When the hub was asked last.
    asked: Option<Instant>,
    changed: Arc<Notify>,
    warned: Option<Instant>,
    /// Whether the hub did not tell where its log ends when it was asked last.
    endless: bool,
    /// When something of the room came last, or was to come, in milliseconds, as far as somebody looks after it.
    heard_ts: i64,
    /// When something of it came last; 0 when nothing did in this run.
    came_ts: i64,
    /// Whether events came without their content, of which it is not known yet what redacts them, and how often the pause was doubled
    /// after which that is looked for again.
    has_blanks: bool,
    doubled: u32,
    /// How often the hub was asked in vain for the leaves of all our users.
    fruitless: u32,
}

impl Looked {
    /// Whether nothing is waited for that may come at any time.
    fn keeps_nothing(&self) -> bool {
        !self.has_blanks && self.fruitless == 0
    }
}

/// How much is known of what a hub's log has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Certainty {
    /// All of it is here.
    Whole,
    /// The hub does not tell where it ends; since this time nothing of it came.
    SilentSince(i64),
    /// Something of it is missing.
    Partial,
}

/// What came of a look at a hub's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    /// All that the hub tells.
    All,
    /// Not that: it is to be looked at again.
    NotAll,
    /// Nothing, since all our users have left, or were put out, and it does not show that.
    NoLeave,
}

impl Looks {
    pub fn new() -> Self {
        let (rooms, hubs) = Default::default();
        let (places, haste, began_ts) = (Semaphore::new(AT_ONCE), AtomicU32::new(1), AtomicI64::new(0));
        Self { rooms, hubs, places, haste, began_ts }
    }

    /// Waits until a room of this hub may be looked after.
    async fn place(&self, hub: &ServerName) -> Result<(OwnedSemaphorePermit, SemaphorePermit<'_>), Refusal> {
        let closed = |error: AcquireError| Refusal::Internal(error.to_string());
        let of_hub = {
            let mut hubs = lock(&self.hubs);
            hubs.retain(|_, places| Arc::strong_count(places) > 1);
            hubs.entry(hub.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(1))).clone()
        };
        let of_hub = of_hub.acquire_owned().await.map_err(closed)?;
        Ok((of_hub, self.places.acquire().await.map_err(closed)?))
    }

    /// Whether the hub does not know the end of the log as it is here.
    pub fn is_lost(&self, room_id: &RoomId) -> bool {
        lock(&self.rooms).get(room_id).is_some_and(|room| room.known.lost_ts.is_some())
    }

    /// Whether a fault is to be said in the log: not each of many.
    pub fn warns(&self, room_id: &RoomId) -> bool {
        let mut rooms = lock(&self.rooms);
        let room = rooms.entry(room_id.to_owned()).or_default();
        let due = room.warned.is_none_or(|warned| warned.elapsed() >= WARN_EVERY);
        if due {
            room.warned = Some(Instant::now());
        }
        due
    }

    /// How long something takes that takes `time` where nothing is hastened.
    pub fn pace(&self, time: Duration) -> Duration {
        time.checked_div(self.haste.load(Ordering::Relaxed)).unwrap_or(time)
    }

    /// How long after it was taken an LPDU is to be in the log, in milliseconds. Who does not tell where the log ends gets more time.
    fn patience(&self, row: &TakenRow, endless: bool) -> i64 {
        let resent = usize::try_from(row.resent).unwrap_or_default();
        let time = millis(ECHO_MS.get(resent).or(ECHO_MS.last()).copied().unwrap_or_default());
        let least = if endless && !row.passed { QUIET } else { Duration::ZERO };
        millis_of(self.pace(time.max(least)))
    }

    /// Whether a room's hub did not tell where its log ends, and since when nothing of the room came.
    fn manners(&self, room_id: &RoomId) -> (bool, i64) {
        let (endless, heard) =
            lock(&self.rooms).get(room_id).map(|room| (room.endless, room.heard_ts)).unwrap_or_default();
        (endless, heard.max(self.began_ts.load(Ordering::Relaxed)))
    }

    /// Something of a room will come: its hub is back.
    fn hears(&self, room_id: &RoomId, now: i64) {
        if let Some(room) = lock(&self.rooms).get_mut(room_id) {
            room.heard_ts = now;
        }
    }

    /// Something of a room came.
    fn came(&self, room_id: &RoomId, at: i64) {
        if let Some(room) = lock(&self.rooms).get_mut(room_id) {
            (room.heard_ts, room.came_ts) = (at, at);
        }
    }

    fn known(&self, room_id: &RoomId) -> Look {
        lock(&self.rooms).get(room_id).map(|room| room.known.clone()).unwrap_or_default()
    }
}

impl Lm {
    /// Goes on looking after what was left by the last run.
    pub(super) async fn resume_looks(&self) -> Result<(), Refusal> {
        let store = &self.context().store;
        self.looks().began_ts.store(self.context().clock.now_ms(), Ordering::Relaxed);
        let known = stored::looks(store).await?;
        let mut soon = stored::rooms_with_taken(store).await?;
        let blanks = stored::rooms_with_blanks(store).await?;
        {
            let mut rooms = lock(&self.looks().rooms);
            for room_id in &blanks {
                rooms.entry(room_id.clone()).or_default().has_blanks = true;
            }
            soon.extend(blanks);
            for (room_id, look) in known {
                if look.forks || look.lost_ts.is_some() {
                    soon.push(room_id.clone());
                }
                rooms.entry(room_id).or_default().known = look;
            }
        }
        for room_id in stored::rooms_of_others(store, &self.context().server_name).await? {
            self.ask_after(&room_id, AT_START);
        }
        soon.iter().for_each(|room_id| self.ask_after(room_id, SOON));
        Ok(())
    }

    /// The hub is back: what became of its rooms meanwhile is looked at.
    pub(super) async fn hub_is_back(&self, hub: &ServerName) -> Result<(), Refusal> {
        for room_id in stored::rooms_of_hub(&self.context().store, hub).await? {
            self.ask_after(&room_id, SETTLED);
            // What it has to say of it is on its way.
            self.looks().hears(&room_id, self.context().clock.now_ms());
        }
        Ok(())
    }

    /// Another server keeps the log than we thought: it has more of it than was taken.
    pub(super) fn came_to_another_hub(&self, room_id: &RoomId) {
        lock(&self.looks().rooms).entry(room_id.to_owned()).or_default().asked = None;
        self.ask_after(room_id, SOON);
    }

    /// The hub's log forks, or has got more, which came at this time.
    pub(super) async fn saw(&self, room_id: &RoomId, forked: bool, at: i64) -> Result<(), StoreError> {
        self.looks().came(room_id, at);
        self.look_when_quiet(room_id);
        let mut known = self.looks().known(room_id);
        if forked && !known.forks {
            known.forks = true;
            self.keep_look(room_id, known.clone()).await?;
        }
        if known.forks {
            self.ask_after(room_id, SETTLED);
        }
        Ok(())
    }

    async fn keep_look(&self, room_id: &RoomId, look: Look) -> Result<(), StoreError> {
        lock(&self.looks().rooms).entry(room_id.to_owned()).or_default().known = look.clone();
        let room_id = room_id.to_owned();
        let job =
            self.context().store.write(move |tx| Box::pin(async move { stored::keep_look(tx, &room_id, &look).await }));
        job.await
    }

    /// Does all of this so many times faster: for tests.
    pub fn hasten_looks(&self, times: u32) {
        self.looks().haste.store(times, Ordering::Relaxed);
        self.owed().hasten(times);
    }

    /// The hub is asked after a while, whatever comes until then.
    fn ask_after(&self, room_id: &RoomId, delay: Duration) {
        let (delay, every) = (self.looks().pace(delay), self.looks().pace(EVERY));
        self.plan(room_id, |room| {
            let earliest = room.asked.map(|asked| asked + every);
            let at = (Instant::now() + delay).max(earliest.unwrap_or_else(Instant::now));
            room.ask_at = Some(room.ask_at.map_or(at, |before| before.min(at)));
        });
    }

    /// The hub has taken LPDUs: they are to be in the log after a while.
    pub(super) fn expect_echo(&self, room_id: &RoomId) {
        self.expect_within(room_id, self.looks().pace(millis(FIRST_ECHO_MS)));
    }

    fn expect_within(&self, room_id: &RoomId, delay: Duration) {
        self.plan(room_id, |room| {
            let at = Instant::now() + delay;
            room.due = Some(room.due.map_or(at, |before| before.min(at)));
        });
    }

    fn plan(&self, room_id: &RoomId, change: impl FnOnce(&mut Looked)) {
        let begin = {
            let mut rooms = lock(&self.looks().rooms);
            let room = rooms.entry(room_id.to_owned()).or_default();
            change(room);
            room.changed.notify_one();
            !std::mem::replace(&mut room.at_work, true)
        };
        if begin {
            tokio::spawn(look_after(Arc::downgrade(&self.inner), room_id.to_owned()));
        }
    }

    /// When the next look at a room is due; none when nobody has to look any more.
    fn next_look(&self, room_id: &RoomId) -> Option<(Instant, Arc<Notify>)> {
        let mut rooms = lock(&self.looks().rooms);
        let room = rooms.get_mut(room_id)?;
        let next = [room.due, room.ask_at].into_iter().flatten().min();
        room.at_work = next.is_some();
        let changed = room.changed.clone();
        if next.is_none() && room.known == Look::default() && room.warned.is_none() && room.keeps_nothing() {
            rooms.remove(room_id);
        }
        Some((next?, changed))
    }

    async fn look_now(&self, room_id: &RoomId) -> Result<(), Refusal> {
        let asks = {
            let mut rooms = lock(&self.looks().rooms);
            let room = rooms.entry(room_id.to_owned()).or_default();
            room.due = None;
            let asks = room.ask_at.is_some_and(|at| at <= Instant::now());
            if asks {
                room.ask_at = None;
            }
            asks
        };
        let Some(cell) = self.rooms().find(room_id).await? else { return Ok(()) };
        let store = &self.context().store;
        let room = cell.snapshot(store).await?;
        let taken = stored::taken_lpdus(store, room_id, TAKEN).await?;
        let owes_nothing = room.facts.shared
            || room.facts.hub == self.context().server_name
            || !room.has_server(&self.context().server_name);
        if self.looks().is_lost(room_id) && (owes_nothing || self.leaving(&room).await? != Leaving::No) {
            self.keep_look(room_id, Look { lost_ts: None, ..self.looks().known(room_id) }).await?;
            // The leaves may go where they will.
            let feed = Feed { kind: FeedKind::Lpdus, room_id: room_id.to_owned() };
            self.context().outbound.wake(&feed, std::slice::from_ref(&room.facts.hub));
        }
        if owes_nothing {
            self.forget_blanks(room_id).await?;
            return self.forget(room_id, taken.iter().map(|row| row.position).collect()).await;
        }
        let now = self.context().clock.now_ms();
        let (endless, _) = self.looks().manners(room_id);
        let left =
            |row: &TakenRow| self.looks().patience(row, endless).saturating_sub(now.saturating_sub(row.taken_ts));
        let next = taken.iter().map(left).min();
        if !asks {
            match next {
                None => return Ok(()),
                Some(left) if left > 0 => {
                    self.expect_within(room_id, millis(left));
                    return Ok(());
                }
                Some(_) => {}
            }
        }
        // Not in the condition, where the lock would be held while `ask_after` takes it.
        let asked = lock(&self.looks().rooms).entry(room_id.to_owned()).or_default().asked.replace(Instant::now());
        if asked.is_some_and(|asked| asked.elapsed() < self.looks().pace(EVERY)) {
            self.ask_after(room_id, EVERY);
            return Ok(());
        }
        let place = self.looks().place(&room.facts.hub).await?;
        let looked = self.look(&cell).await;
        drop(place);
        match looked {
            Ok(Seen::NoLeave) => {
                self.wait_for_leaves(room_id);
                Ok(())
            }
            Ok(Seen::All) => {
                lock(&self.looks().rooms).entry(room_id.to_owned()).or_default().fruitless = 0;
                if let Some(next) = stored::taken_lpdus(store, room_id, 1).await?.first() {
                    let (endless, _) = self.looks().manners(room_id);
                    let patience = millis(self.looks().patience(next, endless)).max(self.looks().pace(EVERY));
                    self.expect_within(room_id, patience);
                }
                Ok(())
            }
            Ok(Seen::NotAll) => {
                self.ask_after(room_id, AGAIN);
                Ok(())
            }
            Err(Refusal::WrongHub { hub, .. }) => {
                // It has handed the log on, or has not heard yet that the log is its own.
                self.ask_after(room_id, AGAIN);
                self.seek_hub(&cell, ServerName::parse(hub).ok(), whereabouts::EVERY);
                Ok(())
            }
            Err(refusal) => {
                self.ask_after(room_id, AGAIN);
                // It may have handed the log on before it went.
                self.seek_hub(&cell, None, whereabouts::SELDOM);
                Err(refusal)
            }
        }
    }

    /// Asks the hub of a room where its log ends, takes what is missing, and sends again what is not there.
    async fn look(&self, cell: &Arc<RoomCell>) -> Result<Seen, Refusal> {
        let store = &self.context().store;
        let began = self.context().clock.now_ms();
        let room = cell.snapshot(store).await?;
        let hub = room.facts.hub.clone();
        let mut end = self.end_of_log(&room).await?;
        let Some(head) = room.last_id().cloned() else { return Ok(Seen::All) };
        let leaving = self.leaving(&room).await?;
        if leaving != Leaving::No {
            match self.end_for_who_leaves(&room, &head, (end, leaving)).await? {
                Some(found) => end = Some(found),
                // What it says to who has left proves nothing.
                None => return Ok(Seen::NoLeave),
            }
        }
        let was_lost = self.looks().is_lost(&cell.room_id);
        let known = match &end {
            Some(ends) if ends.contains(&head) => true,
            _ => self.hub_knows(&room, &head).await?,
        };
        if !known {
            let now = cell.snapshot(store).await?;
            if self.leaving(&now).await? != Leaving::No {
                return Ok(Seen::NoLeave);
            }
            if !was_lost && let Some(join) = self.may_be_put_out(&now).await? {
                self.mention_silence(cell, &join).await?;
                return Ok(Seen::NoLeave);
            }
            // What came while it was asked may follow what it knows.
            if now.last_id() == Some(&head) && !was_lost {
                self.lose(cell, &head).await?;
            }
            return Ok(Seen::NotAll);
        }
        let ends = end.unwrap_or_default();
        let heard_ts = {
            lock(&self.looks().rooms).entry(cell.room_id.clone()).or_default().endless = ends.is_empty();
            self.looks().manners(&cell.room_id).1
        };
        let look = self.looks().known(&cell.room_id);
        let (mut whole, mut newest) = (true, None);
        {
            let _turn = cell.intake.lock().await;
            let mut taking = Taking::begin(self, cell, cell.snapshot(store).await?).await?;
            taking.looks = true;
            if taking.gap_is_open {
                return Ok(Seen::NotAll);
            }
            whole &= taking.take_up_to(&ends.iter().cloned().collect()).await? == Filled::Whole;
            if look.forks {
                let from = ends.first().cloned().unwrap_or(head);
                if taking.look_back(from.clone(), look.until.as_deref()).await? {
                    newest = Some(from);
                } else {
                    whole = false;
                }
            }
            taking.finish(Some(cell)).await?;
        }
        if !cell.snapshot(store).await?.has_server(&self.context().server_name) {
            // The next look puts away what is left.
            self.ask_after(&cell.room_id, SOON);
            return Ok(Seen::All);
        }
        if was_lost {
            tracing::info!(room = %cell.room_id, %hub, "the hub knows the end of its log again");
        }
        whole &= !self.is_behind(cell).await;
        let certainty = match (whole, ends.is_empty()) {
            (true, false) => Certainty::Whole,
            (true, true) => Certainty::SilentSince(heard_ts),
            (false, _) => Certainty::Partial,
        };
        self.ask_about_blanks(cell, certainty, began).await?;
        self.send_again(cell, &hub, certainty, was_lost).await?;
        if was_lost || newest.is_some() {
            let known = self.looks().known(&cell.room_id);
            let until = newest.or(known.until);
            self.keep_look(&cell.room_id, Look { until, lost_ts: None, forks: known.forks }).await?;
        }
        let feed = Feed { kind: FeedKind::Lpdus, room_id: cell.room_id.clone() };
        self.context().outbound.wake(&feed, &[hub]);
        Ok(Seen::All)
    }

    /// The last events of the hub's log, as far as it tells.
    async fn end_of_log(&self, room: &Snapshot) -> Result<Option<Vec<OwnedEventId>>, Refusal> {
        let users: Vec<_> = self.own_members(room).take(ASKERS).collect();
        for user in users {
            match self.peers().make(&room.facts.hub, "join", &room.facts.room_id, &user).await {
                Ok((_, template)) => return Ok(Some(prev_events(&template))),
                Err(error) if is_not_hub(&error) => return Err(wrong_hub(&error, &room.facts.hub)),
                // Another user may ask.
                Err(error) if is_verdict(&error) => {}
                Err(error) => return Err(error.into_refusal(&room.facts.hub)),
            }
        }
        Ok(None)
    }

    /// Whether the hub has an event that it gave.
    async fn hub_knows(&self, room: &Snapshot, event_id: &EventId) -> Result<bool, Refusal> {
        let (hub, room_id) = (&room.facts.hub, &room.facts.room_id);
        match self.peers().backfill(hub, room_id, event_id, 10).await {
            Ok(page) => {
                let page = self.check_finished_patiently(page, room.redaction).await;
                if page.iter().filter_map(super::gaps::event_of).any(|pdu| pdu.event_id == *event_id) {
                    return Ok(true);
                }
                // There may be hubs that leave out the event from which they are asked on, and hubs that give the end of their
                // log for one that they do not know.
                if page.iter().flatten().next().is_none() {
                    return Ok(false);
                }
                match self.peers().event(hub, event_id).await {
                    Ok(()) => Ok(true),
                    Err(error) if error.is_unrecognized() => Ok(true),
                    Err(error) if is_not_hub(&error) => Err(wrong_hub(&error, hub)),
                    Err(error) if is_verdict(&error) => Ok(false),
                    Err(error) => Err(error.into_refusal(hub)),
                }
            }
            Err(error) if error.is_unrecognized() => Ok(true),
            Err(error) if is_not_hub(&error) => Err(wrong_hub(&error, hub)),
            Err(error) if is_verdict(&error) => Ok(false),
            Err(error) => Err(error.into_refusal(hub)),
        }
    }

    /// The hub does not know what it gave: nothing is sent to it until it does.
    async fn lose(&self, cell: &Arc<RoomCell>, head: &EventId) -> Result<(), Refusal> {
        let look = self.looks().known(&cell.room_id);
        let now = self.context().clock.now_ms();
        self.keep_look(&cell.room_id, Look { lost_ts: Some(now), ..look }).await?;
        let _turn = cell.intake.lock().await;
        let mut taking = Taking::begin(self, cell, cell.snapshot(&self.context().store).await?).await?;
        taking.looks = true;
        taking.fault(Fault::WentBack, head, "the hub gave it, and does not know it now");
        taking.finish(Some(cell)).await.map(drop)
    }
}

/// Whether a server says that it is not the hub: of what it does not know nothing follows then.
fn is_not_hub(error: &RemoteError) -> bool {
    matches!(error, RemoteError::Status { errcode, .. } if errcode == "M_WRONG_SERVER")
}

/// What such a server says, with who is the hub, as far as it knows.
fn wrong_hub(error: &RemoteError, server: &ServerName) -> Refusal {
    let named = match error {
        RemoteError::Status { hub_server: Some(named), .. } => named.as_str(),
        _ => server.as_str(),
    };
    Refusal::WrongHub { hub: named.to_owned(), found: server.to_string() }
}

/// Looks after a room as long as there is something to look for. Holds nothing while it sleeps.
async fn look_after(inner: Weak<Inner>, room_id: OwnedRoomId) {
    loop {
        let Some(lm) = inner.upgrade().map(|inner| Lm { inner }) else { return };
        let Some((at, changed)) = lm.next_look(&room_id) else { return };
        drop(lm);
        tokio::select! {
            () = tokio::time::sleep_until(at) => {}
            () = changed.notified() => continue,
        }
        let Some(lm) = inner.upgrade().map(|inner| Lm { inner }) else { return };
        let looked = AssertUnwindSafe(lm.look_now(&room_id)).catch_unwind().await;
        if lm.context().store.reader().is_closed() {
            return;
        }
        match looked {
            Ok(Ok(())) => {}
            Ok(Err(refusal)) => tracing::info!(room = %room_id, %refusal, "the hub's log could not be looked at"),
            Err(_) => {
                tracing::error!(room = %room_id, "looking at a hub's log panicked");
                lm.ask_after(&room_id, AGAIN);
            }
        }
    }
}

fn millis_of(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

fn millis(ms: i64) -> Duration {
    Duration::from_millis(u64::try_from(ms).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use futures::FutureExt as _;
    use ruma::server_name;

    use super::super::tests::World;
    use super::*;

    #[test]
    fn a_hub_that_was_asked_just_now_is_asked_later() {
        let (tell, told) = mpsc::channel();
        // Not on this thread: a lock that is taken twice would hold it for ever.
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let later = runtime.block_on(async {
                let world = World::new().await;
                world.copy_log().await;
                let (looks, now) = (world.part.looks(), Instant::now());
                {
                    let mut rooms = lock(&looks.rooms);
                    let room = rooms.entry(world.room.clone()).or_default();
                    (room.asked, room.ask_at, room.at_work) = (Some(now), Some(now), true);
                }
                world.part.look_now(&world.room).await.unwrap();
                lock(&looks.rooms).get(&world.room).and_then(|room| room.ask_at)
            });
            tell.send(later).unwrap();
        });
        let later = told.recv_timeout(Duration::from_secs(60)).expect("it is looked at without end");
        assert!(later.is_some_and(|later| later > Instant::now()));
    }

    #[tokio::test]
    async fn a_slow_hub_holds_up_its_own_rooms_alone() {
        let looks = Looks::new();
        let (slow, other) = (server_name!("slow.example"), server_name!("other.example"));
        let first = looks.place(slow).await.unwrap();
        let waiting: Vec<_> = (0..AT_ONCE).map(|_| looks.place(slow)).collect();
        let mut waiting = futures::future::join_all(waiting).boxed();
        assert!((&mut waiting).now_or_never().is_none());
        assert!(looks.place(other).now_or_never().unwrap().is_ok());
        drop(first);
        drop(waiting);
        assert!(looks.place(slow).now_or_never().unwrap().is_ok());
        assert!(lock(&looks.hubs).len() <= 2, "who is not looked after is forgotten");
    }
}
