//! Events on their way into one log: tried on a copy of the room, written in one transaction with all that hangs on them,
//! and told about only after the commit (INV-6).

use std::collections::{BTreeMap, BTreeSet};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use bytes::Bytes;
use futures::FutureExt as _;
use ruma::{OwnedEventId, OwnedServerName, UserId};

use super::chain::KEPT;
use super::redactions::{self, Redacting};
use super::room::{Move, Snapshot, Subject};
use super::rooms::{RoomCell, lock};
use super::succession::Succession;
use super::{Appended, Lm, Position};
use crate::event::{Pdu, Redaction};
use crate::federation::{Feed, FeedKind, OutboundQueues};
use crate::guard::{fails_on, guarded_now, trip};
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::seam::{EffectsOf, EventEffect, write_effects_until_one_fails};
use crate::store::lm::{self as stored, Asked, Complaint, NewEvent, RoomRow};
use crate::store::{Store, StoreError, Tx, inbox};

/// Where an event comes from, as far as it matters for what is written with it.
#[derive(Clone, Default)]
pub(super) struct Origin {
    /// It was made elsewhere: it goes into the bridge's inbox.
    pub foreign: bool,
    /// The answer to a handshake carries it to its sender's server, so the queue need not.
    pub answered: bool,
    /// In a shared room: it is a join by which its sender's server comes to take part by the log.
    pub comes: bool,
    /// What is written with it, with the ID by which its maker knows it.
    pub effect: Option<EventEffect>,
}

#[derive(Clone)]
struct Entry {
    pdu: Arc<Pdu>,
    position: i64,
    bytes: Vec<u8>,
    origin: Origin,
    moved: Option<Move>,
    redacts: Option<Redacting>,
}

/// Events that are to be appended together.
#[derive(Clone)]
pub(super) struct Batch {
    before: Arc<Snapshot>,
    /// The room as it will be.
    pub after: Snapshot,
    entries: Vec<Entry>,
    /// A room that is to be made.
    new_room: bool,
    complaints: Vec<Complaint>,
    /// Events of it that came as redaction leaves them.
    blanks: Vec<Asked>,
    /// What the current state has for a type and state key whatever the log's last event is, and how many events it came after.
    replaced: Vec<(usize, Slotted)>,
    /// Of a room whose log follows a graph, and of what comes with a join: what is redacted, and by what.
    redacted: Vec<(OwnedEventId, OwnedEventId)>,
    /// What allows the state of a foreign hub's log, and may be in no place of it here.
    chain: Chain,
}

/// A type and state key, and what the current state has for them.
type Slotted = ((String, String), Option<OwnedEventId>);

/// What allows state, as it goes over the wire, with its IDs.
#[derive(Clone, Default)]
struct Chain {
    events: Arc<Vec<(OwnedEventId, Vec<u8>)>>,
    /// Whether what was kept before is forgotten.
    anew: bool,
}

/// What was committed of a batch.
pub(super) struct Committed {
    /// The events, in order.
    pub appended: Vec<Appended>,
    /// Why the event after those was not appended.
    pub failed: Option<StoreError>,
    /// The effects of the events after the failed one, which were not tried.
    pub untried: Vec<Option<EventEffect>>,
}

impl Batch {
    pub fn new(before: Arc<Snapshot>) -> Self {
        let after = (*before).clone();
        let (entries, complaints, blanks, replaced, redacted) = Default::default();
        let chain = Chain::default();
        Self { before, after, entries, new_room: false, complaints, blanks, replaced, redacted, chain }
    }

    /// A room that is made together with its first events.
    pub fn of_new_room(empty: Snapshot) -> Self {
        Self { new_room: true, ..Self::new(Arc::new(empty)) }
    }

    /// Adds the next event, which was found to be allowed, and returns its index.
    pub fn push(&mut self, pdu: Pdu, origin: Origin) -> usize {
        let pdu = Arc::new(pdu);
        // On a copy: should this fail half-way, nothing of it was done.
        let mut after = self.after.clone();
        let redacts = Redacting::of(&pdu, &self.after);
        let moved = after.apply(&pdu);
        let (position, bytes) = (after.head, pdu.to_bytes());
        self.entries.push(Entry { pdu, position, bytes, origin, moved, redacts });
        self.after = after;
        self.entries.len().saturating_sub(1)
    }

    /// Redacts an event, which the log may have, for a graph that the log follows, or for a hub that gives it so with a join.
    pub fn redact(&mut self, target: OwnedEventId, redaction: OwnedEventId) {
        self.redacted.push((target, redaction));
    }

    /// How many events it has, and how many it redacts.
    pub fn size(&self) -> (usize, usize) {
        (self.entries.len(), self.redacted.len())
    }

    /// Takes back all but the first `len` events and `redacted` redactions, after which the room was `after`.
    pub fn truncate(&mut self, (len, redacted): (usize, usize), after: Snapshot) {
        self.entries.truncate(len);
        self.redacted.truncate(redacted);
        self.replaced.retain(|(came_after, _)| *came_after <= len);
        self.after = after;
    }

    /// The events, in order.
    pub fn events(&self) -> impl Iterator<Item = &Arc<Pdu>> {
        self.entries.iter().map(|entry| &entry.pdu)
    }

    /// Where the log follows a graph: the current state has this event, or none, whatever the log's last one is.
    pub fn replace_state(&mut self, kind: &str, state_key: &str, event: Option<Arc<Pdu>>) {
        self.after.replace(kind, state_key, event.as_ref());
        let slot = ((kind.to_owned(), state_key.to_owned()), event.map(|event| event.event_id.clone()));
        self.replaced.push((self.entries.len(), slot));
    }

    /// Records what the hub did wrong.
    pub fn complain(&mut self, complaint: Complaint) {
        self.complaints.push(complaint);
    }

    /// Records that an event came as redaction leaves it, to be asked about when all of the log is here.
    pub fn note_blank(&mut self, pdu: &Pdu) {
        self.blanks.push((pdu.event_id.clone(), pdu.sender.clone()));
    }

    /// Keeps what allows the state that comes with these events; instead of what was kept before where `anew` is set.
    pub fn keep_chain(&mut self, events: Vec<(OwnedEventId, Vec<u8>)>, anew: bool) {
        self.chain.anew |= anew;
        Arc::make_mut(&mut self.chain.events).extend(events);
    }

    /// The last event of the log before these.
    pub fn follows(&self) -> Option<&OwnedEventId> {
        self.before.last_id()
    }

    /// Whether nobody has to say any more what redacts an event that came without its content: another server keeps the log, we came
    /// or went, or a redaction came of which nothing is left that says what it redacts.
    fn ends_blanks(&self, own: &ruma::ServerName) -> bool {
        let is_own = |entry: &Entry| match &entry.moved {
            Some(Move::Came(server) | Move::Went(server)) => server == own,
            None => false,
        };
        let is_blank = |pdu: &Pdu| pdu.kind == "m.room.redaction" && pdu.state_key.is_none() && pdu.redacts().is_none();
        self.before.facts.hub != *own
            && (self.before.facts.hub != self.after.facts.hub
                || self.entries.iter().any(|entry| is_own(entry) || is_blank(&entry.pdu)))
    }

    /// Whether events came so.
    pub fn has_blanks(&self) -> bool {
        !self.blanks.is_empty()
    }

    pub fn is_empty(&self) -> bool {
        let nothing = self.entries.is_empty() && self.complaints.is_empty() && self.replaced.is_empty();
        let no_chain = self.chain.events.is_empty() && !self.chain.anew;
        let unchanged = self.redacted.is_empty() && self.after.redaction == self.before.redaction;
        nothing && no_chain && unchanged && self.blanks.is_empty()
    }

    /// Writes everything, then tells the room's cell, the queues and the bridge. What this gateway fails on is found out: the
    /// events of a hub are tried each alone at once, since their place in its log is fixed; those of a room that is hubbed here
    /// when they come again.
    pub async fn commit(self, lm: &Lm, cell: Option<&Arc<RoomCell>>) -> Result<Committed, Refusal> {
        let room_id = self.after.facts.room_id.clone();
        let is_hub = self.before.facts.hub == lm.context().server_name;
        let events: Vec<Arc<Pdu>> = self.entries.iter().map(|entry| entry.pdu.clone()).collect();
        let ends_blanks = self.ends_blanks(&lm.context().server_name);
        let blanks = if ends_blanks { Vec::new() } else { self.blanks.clone() };
        let (complaints, redaction, chain) = (self.complaints.clone(), self.after.redaction, self.chain.clone());
        let refusal = match AssertUnwindSafe(self.write(lm, cell)).catch_unwind().await {
            Ok(Err(StoreError::Panicked)) | Err(_) => {
                let known_as = |event: &'_ Arc<Pdu>| event.lpdu_id.clone().unwrap_or_else(|| event.event_id.clone());
                let ids: Vec<OwnedEventId> = events.iter().map(known_as).collect();
                lm.careful().panicked(&room_id, &ids.iter().map(|id| &**id).collect::<Vec<_>>())
            }
            Ok(written) => return Ok(written?),
        };
        let Some(cell) = cell else { return Err(refusal) };
        // It may have been committed.
        cell.forget();
        if is_hub {
            return Err(refusal);
        }
        let committed = each_alone(lm, cell, events).await?;
        // What else was in it: verdicts on other events, what allows the state, and how the hub redacts.
        let mut rest = Batch::new(cell.snapshot(&lm.context().store).await?);
        (rest.complaints, rest.blanks, rest.after.redaction, rest.chain) = (complaints, blanks, redaction, chain);
        rest.write(lm, Some(cell)).await?;
        Ok(committed)
    }

    async fn write(self, lm: &Lm, cell: Option<&Arc<RoomCell>>) -> Result<Committed, StoreError> {
        if self.is_empty() {
            return Ok(Committed { appended: Vec::new(), failed: None, untried: Vec::new() });
        }
        self.entries.iter().for_each(|entry| trip("commit", &entry.pdu.kind));
        let news = self.news(lm);
        let job = self.job(lm);
        match lm.context().store.write(move |tx| Box::pin(job.run(tx))).await {
            Ok(done) => Ok(news.tell(lm, cell, done).await?),
            Err(error) => {
                if let Some(cell) = cell {
                    cell.forget();
                }
                Err(error)
            }
        }
    }

    /// What is to be written.
    pub fn job(self, lm: &Lm) -> Job {
        let context = lm.context();
        let room_id = self.after.facts.room_id.clone();
        let handed_over = self.handed_over(&context.server_name);
        let ends_blanks = self.ends_blanks(&context.server_name);
        Job {
            store: context.store.clone(),
            server_name: context.server_name.clone(),
            now_ms: context.clock.now_ms(),
            watched: lm.between().watches(Side::Lm, &room_id),
            feed: Feed { kind: FeedKind::Log, room_id },
            is_hub: self.before.facts.hub == context.server_name,
            handed_over,
            comes_in: !self.before.has_server(&context.server_name) && self.after.has_server(&context.server_name),
            after: self.after,
            head_before: self.before.head,
            redaction_before: self.before.redaction,
            entries: self.entries,
            new_room: self.new_room,
            complaints: self.complaints,
            blanks: if ends_blanks { Vec::new() } else { self.blanks },
            ends_blanks,
            replaced: self.replaced.into_iter().map(|(_, slot)| slot).collect(),
            redacted: self.redacted,
            chain: self.chain,
        }
    }

    /// What is to be told when it is written.
    pub fn news(&self, lm: &Lm) -> News {
        let own = &lm.context().server_name;
        let is_hub = self.before.facts.hub == *own || self.after.facts.hub == *own;
        News {
            before: self.before.clone(),
            after: self.after.clone(),
            events: self.entries.iter().map(|entry| entry.pdu.clone()).collect(),
            destinations: if is_hub { self.destinations(own) } else { Vec::new() },
            somebody_moved: self.entries.iter().any(|entry| entry.moved.is_some()),
            handed_over: self.handed_over(own),
        }
    }

    /// Whether another server keeps the log after it.
    fn handed_over(&self, own: &ruma::ServerName) -> Option<Succession> {
        let (from, to) = (&self.before.facts.hub, &self.after.facts.hub);
        (from != to && !self.new_room).then(|| Succession {
            from: from.clone(),
            to: to.clone(),
            participants: self.after.servers().filter(|server| *server != own).cloned().collect(),
        })
    }

    /// The servers that were in the room before or come into it.
    fn destinations(&self, own: &ruma::ServerName) -> Vec<OwnedServerName> {
        let came = self.entries.iter().filter_map(|entry| match &entry.moved {
            Some(Move::Came(server)) => Some(server),
            _ => None,
        });
        let mut servers: Vec<OwnedServerName> = self.before.servers().chain(came).cloned().collect();
        servers.retain(|server| server != own);
        servers
    }
}

/// Who is told of a batch, and of what.
pub(super) struct News {
    before: Arc<Snapshot>,
    after: Snapshot,
    events: Vec<Arc<Pdu>>,
    destinations: Vec<OwnedServerName>,
    somebody_moved: bool,
    handed_over: Option<Succession>,
}

impl News {
    /// Tells the room's cell, the queues and the bridge what was committed.
    pub async fn tell(self, lm: &Lm, cell: Option<&Arc<RoomCell>>, done: Done) -> Result<Committed, StoreError> {
        let Self { before, after, events, destinations, somebody_moved, handed_over } = self;
        let Done { kept, failed, untried, texts, pushed, redacted, superseded } = done;
        let room_id = after.facts.room_id.clone();
        // Not every server in a shared room has its log.
        let all_read_the_log = !after.facts.shared;
        let appended = appended(&before, &events, kept);
        let mut snapshot = if kept == events.len() { after } else { replay(&before, &after, &appended) };
        redacted.iter().for_each(|event| snapshot.redact(event));
        let cell = match cell {
            Some(cell) => {
                if handed_over.is_some() {
                    cell.forget_stays();
                }
                if somebody_moved {
                    // Before the new head can be seen: who sees that must see who came and went with it.
                    cell.forget_stays();
                }
                if !redacted.is_empty() {
                    cell.forget_recent();
                }
                match handed_over {
                    Some(_) => {
                        cell.publish_stranding(Arc::new(snapshot));
                        // After that: who waits for a word on who is the hub looks who is before, and after, it begins to wait.
                        let mut ahead = lock(&cell.ahead);
                        ahead.go_on();
                        ahead.directed();
                    }
                    None => cell.publish(Arc::new(snapshot)),
                }
                cell.clone()
            }
            None => lm.rooms().add(snapshot).await?,
        };
        lm.forget_events(&redacted).await;
        if !destinations.is_empty() {
            if redacted.is_empty() {
                cell.keep_recent(texts);
            }
            let feed = Feed { kind: FeedKind::Log, room_id: room_id.clone() };
            let outbound = &lm.context().outbound;
            match appended.last() {
                Some(last) if !somebody_moved && all_read_the_log && handed_over.is_none() => {
                    outbound.wake_at(&feed, &destinations, last.position.0);
                }
                _ => outbound.wake(&feed, &destinations),
            }
        }
        if pushed {
            let redacted = redactions::ids(&redacted);
            for event in appended.iter().filter(|event| !redacted.contains(&*event.event.event_id)) {
                lm.remember(event).await;
            }
            lm.between().accepted(Side::Lm, &room_id);
        }
        for event in &appended {
            if let Some(lpdu_id) = &event.event.lpdu_id {
                cell.settle(lpdu_id, &Ok(event.clone()));
            }
        }
        lm.were_superseded(&cell, superseded);
        if let Some(succession) = handed_over {
            lm.succeeded(&cell, &succession);
        }
        Ok(Committed { appended, failed, untried })
    }
}

/// Appends events of a hub one by one, which were found to be allowed. One on which this gateway fails is refused for good, and
/// so is what names it among those that allow it, where the rules forbid that without it.
async fn each_alone(lm: &Lm, cell: &Arc<RoomCell>, events: Vec<Arc<Pdu>>) -> Result<Committed, Refusal> {
    let store = &lm.context().store;
    let mut committed = Committed { appended: Vec::new(), failed: None, untried: Vec::new() };
    let mut refused: BTreeSet<OwnedEventId> = BTreeSet::new();
    for event in events {
        if stored::event(store, &event.event_id).await?.is_some() {
            continue;
        }
        let room = cell.snapshot(store).await?;
        let subject = Subject::of(&event);
        let judged = match event.auth_events.iter().any(|id| refused.contains(id)) {
            true => guarded_now(&event.event_id, || room.judge(&subject, &room.auth_events(&subject).0)),
            false => Ok(()),
        };
        let refusal = match judged {
            Ok(()) => {
                let mut batch = Batch::new(room.clone());
                let weight = room.weight_after(&event);
                batch.push(Pdu::clone(&event), Origin { foreign: true, ..Origin::default() });
                batch.after.weight = weight;
                match AssertUnwindSafe(batch.write(lm, Some(cell))).catch_unwind().await {
                    Ok(Ok(done)) => {
                        committed.appended.extend(done.appended);
                        continue;
                    }
                    Ok(Err(error)) if !matches!(error, StoreError::Panicked) => return Err(error.into()),
                    _ => fails_on(&event.event_id),
                }
            }
            Err(refusal) => refusal,
        };
        cell.forget();
        refused.insert(event.event_id.clone());
        let mut batch = Batch::new(cell.snapshot(store).await?);
        let problem = refusal.to_string();
        batch.complain(Complaint { event_id: event.event_id.clone(), problem, settled: true, fault: None });
        batch.write(lm, Some(cell)).await?;
    }
    Ok(committed)
}

fn appended(before: &Snapshot, events: &[Arc<Pdu>], kept: usize) -> Vec<Appended> {
    (before.head.saturating_add(1)..)
        .zip(events.iter().take(kept))
        .map(|(position, event)| Appended { event: event.clone(), position: Position(position) })
        .collect()
}

fn replay(before: &Snapshot, after: &Snapshot, appended: &[Appended]) -> Snapshot {
    let mut snapshot = before.clone();
    snapshot.redaction = after.redaction;
    for event in appended {
        snapshot.apply(&event.event);
    }
    snapshot
}

/// Whose membership an event says, where that is a user of this server.
fn member_of<'a>(pdu: &'a Pdu, own: &ruma::ServerName) -> Option<&'a UserId> {
    let user = pdu.state_key.as_deref().filter(|_| pdu.kind == "m.room.member")?;
    <&UserId>::try_from(user).ok().filter(|user| user.server_name() == own)
}

/// The write job of a batch.
pub(super) struct Job {
    store: Store,
    server_name: OwnedServerName,
    now_ms: i64,
    feed: Feed,
    watched: bool,
    /// Whether the gateway keeps the log up to these events.
    is_hub: bool,
    /// When another server keeps it after them.
    handed_over: Option<Succession>,
    /// Whether nobody of ours was in the room before them, and somebody is after them.
    comes_in: bool,
    after: Snapshot,
    head_before: i64,
    redaction_before: Redaction,
    entries: Vec<Entry>,
    new_room: bool,
    complaints: Vec<Complaint>,
    blanks: Vec<Asked>,
    /// Whether those of before are forgotten.
    ends_blanks: bool,
    replaced: Vec<Slotted>,
    redacted: Vec<(OwnedEventId, OwnedEventId)>,
    chain: Chain,
}

/// What was written.
pub(super) struct Done {
    kept: usize,
    failed: Option<StoreError>,
    untried: Vec<Option<EventEffect>>,
    /// The events as text, where there is somebody to send them to.
    texts: Vec<(i64, Bytes)>,
    /// Whether anything went into the bridge's inbox.
    pushed: bool,
    /// What is redacted from now on, as it was.
    redacted: Vec<Pdu>,
    /// What our users said of their memberships that was lost on the way, and that something newer took the place of.
    superseded: Vec<OwnedEventId>,
}

impl Job {
    pub async fn run(mut self, tx: &mut Tx) -> Result<Done, StoreError> {
        let room_id = self.feed.room_id.clone();
        let (kept, failed) = self.effects(tx).await?;
        let untried = self.entries.drain(kept..).skip(1).map(|entry| entry.origin.effect).collect();
        let head = self.entries.last().map_or(self.head_before, |entry| entry.position);
        if self.new_room {
            let facts = &self.after.facts;
            let room = RoomRow {
                room_id: room_id.clone(),
                version: facts.version,
                hub: facts.hub.clone(),
                redaction: self.after.redaction,
                shared: facts.shared,
                head,
            };
            stored::insert_room(tx, &room).await?;
        } else if self.after.redaction != self.redaction_before {
            stored::set_redaction(tx, &room_id, self.after.redaction).await?;
        }
        for complaint in &self.complaints {
            stored::complain(tx, &room_id, complaint, self.now_ms).await?;
        }
        if self.ends_blanks {
            stored::forget_blanks_of(tx, &room_id).await?;
        }
        for blank in &self.blanks {
            stored::note_blank(tx, &room_id, blank, self.now_ms).await?;
        }
        self.keep_chain(tx).await?;
        if self.entries.is_empty() {
            stored::replace_state(tx, &room_id, &self.replaced).await?;
            let redacted = redactions::write_all(tx, &room_id, self.after.redaction, &self.redacted).await?;
            let (texts, superseded) = Default::default();
            return Ok(Done { kept, failed, untried, texts, pushed: false, redacted, superseded });
        }
        if !self.new_room {
            stored::advance_head(tx, &room_id, head).await?;
        }
        if self.is_hub {
            self.fan_out(tx, head).await?;
        }
        let pushed = self.push_to_inbox(tx).await?;
        let is_hub = self.is_hub;
        let (redaction, follows) = (self.after.redaction, self.after.facts.shared);
        let by_graph = std::mem::take(&mut self.redacted);
        let redacting: Vec<Redacting> = self.entries.iter().filter_map(|entry| entry.redacts.clone()).collect();
        let pdus: Vec<Arc<Pdu>> = self.entries.iter().map(|entry| entry.pdu.clone()).collect();
        let replaced = std::mem::take(&mut self.replaced);
        let (feed, succession) = (self.feed.clone(), self.handed_over.take());
        let server_name = self.server_name.clone();
        let (events, superseded) = self.append(tx).await?;
        stored::replace_state(tx, &room_id, &replaced).await?;
        if let Some(succession) = succession {
            succession.write(tx, &feed, &server_name, head).await?;
        }
        let mut redacted = redactions::write_all(tx, &room_id, redaction, &by_graph).await?;
        if !is_hub && !follows {
            redacted.extend(redactions::redacted_before(tx, &room_id, &pdus).await?);
        }
        for redacting in redacting {
            redacted.extend(redacting.write(tx, &room_id, (redaction, is_hub)).await?);
        }
        let text = |event: NewEvent| (event.position, event.json.into());
        let texts = if is_hub { events.into_iter().map(text).collect() } else { Vec::new() };
        Ok(Done { kept, failed, untried, texts, pushed, redacted, superseded })
    }

    /// Writes what allows the state; what is in the log need not be kept twice.
    async fn keep_chain(&mut self, tx: &mut Tx) -> Result<(), StoreError> {
        let Chain { anew, events } = std::mem::take(&mut self.chain);
        let room_id = &self.feed.room_id;
        if anew {
            stored::forget_chain(tx, room_id).await?;
        }
        if events.is_empty() {
            return Ok(());
        }
        let here: BTreeSet<&OwnedEventId> = self.entries.iter().map(|entry| &entry.pdu.event_id).collect();
        let mut outside = Arc::unwrap_or_clone(events);
        outside.retain(|(event_id, _)| !here.contains(event_id));
        if !stored::keep_chain(tx, room_id, &outside, KEPT).await? {
            tracing::warn!(room = %room_id, "not all that allows the state is kept: there is too much of it");
        }
        Ok(())
    }

    /// Writes the effects in order, up to the first that fails; says how many events are kept.
    async fn effects(&mut self, tx: &mut Tx) -> Result<(usize, Option<StoreError>), StoreError> {
        let with_effect = self.entries.iter().enumerate().filter_map(|(index, entry)| {
            let effect = entry.origin.effect.clone()?;
            Some((index, (effect, entry.pdu.event_id.clone())))
        });
        let (indexes, effects): (Vec<usize>, EffectsOf) = with_effect.unzip();
        let (written, failed) = write_effects_until_one_fails(tx, &effects).await?;
        let kept = indexes.get(written).copied().filter(|_| failed.is_some());
        Ok((kept.unwrap_or(self.entries.len()), failed))
    }

    /// Gives the new events to the queues of the servers in the room.
    async fn fan_out(&self, tx: &mut Tx, head: i64) -> Result<(), StoreError> {
        for entry in &self.entries {
            match &entry.moved {
                Some(Move::Came(server)) if *server != self.server_name => {
                    let since = if entry.origin.answered { entry.position } else { entry.position.saturating_sub(1) };
                    stored::server_joined(tx, &self.feed.room_id, server, since).await?;
                    // Who came into a shared room as a graph server has its graph.
                    if !self.after.facts.shared || entry.origin.comes {
                        OutboundQueues::subscribe(tx, server, &self.feed, since).await?;
                    }
                }
                Some(Move::Went(server)) if *server != self.server_name => {
                    stored::server_left(tx, &self.feed.room_id, server, entry.position).await?;
                    OutboundQueues::end(tx, server, &self.feed, entry.position).await?;
                }
                // The log counts another user of its server whom the graph does not.
                _ if entry.origin.comes => {
                    let since = if entry.origin.answered { entry.position } else { entry.position.saturating_sub(1) };
                    OutboundQueues::subscribe(tx, entry.pdu.sender.server_name(), &self.feed, since).await?;
                }
                _ => {}
            }
        }
        OutboundQueues::advance(tx, &self.feed, head).await
    }

    async fn push_to_inbox(&self, tx: &mut Tx) -> Result<bool, StoreError> {
        if !self.watched {
            return Ok(false);
        }
        let foreign = self.entries.iter().filter(|entry| entry.origin.foreign);
        let event_ids: Vec<OwnedEventId> = foreign.map(|entry| entry.pdu.event_id.clone()).collect();
        inbox::push(&self.store, tx, Side::Lm, &self.feed.room_id, &event_ids, self.now_ms).await?;
        Ok(!event_ids.is_empty())
    }

    /// The events as they were written, and what our users said of their memberships before and what is not to come after these.
    async fn append(self, tx: &mut Tx) -> Result<(Vec<NewEvent>, Vec<OwnedEventId>), StoreError> {
        let room_id = &self.feed.room_id;
        let of_own = |entry: &&Entry| entry.pdu.sender.server_name() == self.server_name;
        let own: Vec<OwnedEventId> =
            self.entries.iter().filter(of_own).filter_map(|entry| entry.pdu.lpdu_id.clone()).collect();
        let mut superseded = Vec::new();
        for entry in self.entries.iter().filter(|_| !self.is_hub) {
            let Some(user) = member_of(&entry.pdu, &self.server_name) else { continue };
            let lpdu_id = entry.pdu.lpdu_id.as_deref();
            let by = match self.comes_in || matches!(entry.moved, Some(Move::Came(_))) {
                true => stored::Came::Anew(lpdu_id),
                false => stored::Came::In(lpdu_id),
            };
            superseded.extend(stored::forget_memberships(tx, room_id, user, by).await?);
        }
        let events: Vec<NewEvent> = self
            .entries
            .into_iter()
            .map(|entry| NewEvent {
                position: entry.position,
                event_id: entry.pdu.event_id.clone(),
                lpdu_id: entry.pdu.lpdu_id.clone(),
                state: entry.pdu.state_key.as_ref().map(|state_key| (entry.pdu.kind.clone(), state_key.clone())),
                json: entry.bytes,
            })
            .collect();
        stored::append(tx, room_id, &events).await?;
        for lpdu_id in own.iter().filter(|_| !self.is_hub) {
            stored::lpdu_echoed(tx, room_id, lpdu_id).await?;
        }
        let state = events.iter().filter_map(|event| Some((event.state.as_ref()?, event.position)));
        let state: BTreeMap<&(String, String), i64> = state.collect();
        stored::set_state(tx, room_id, &state.into_iter().collect::<Vec<_>>()).await?;
        Ok((events, superseded))
    }
}
