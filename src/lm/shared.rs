//! The log of a shared room: it follows from the room's graph, in the transaction in which that grows. What is sent to the log is
//! given to the graph, and comes back as what the graph has accepted.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

use async_trait::async_trait;
use futures::future::BoxFuture;
use ruma::{EventId, OwnedEventId, OwnedRoomId, OwnedServerName, RoomId, ServerName};

use super::actor::{Outcome, What};
use super::batch::{Batch, Done, Origin};
use super::room::{Facts, Snapshot, Subject};
use super::rooms::{RoomCell, lock};
use super::{Appended, Lm, NewRoom};
use crate::event::{Object, Pdu, Redaction};
use crate::refusal::Refusal;
use crate::seam::{Draft, Graphs, JoinShared, LogBatch, LogOrigin, Logs, NewLog, NewShared, Next, NextEvent, SHARED};
use crate::store::lm as stored;
use crate::store::{StoreError, Tx};

impl Lm {
    /// The logs, for the graph side.
    pub fn logs(&self) -> Arc<dyn Logs> {
        Arc::new(LogsOf(self.clone()))
    }

    /// Says who keeps the graphs of shared rooms; without that there are none. The first that is said holds.
    pub fn set_graphs(&self, graphs: &Arc<dyn Graphs>) {
        let _ = self.inner.graphs.set(Arc::downgrade(graphs));
    }

    pub(super) fn graphs(&self) -> Result<Arc<dyn Graphs>, Refusal> {
        let graphs = self.inner.graphs.get().and_then(Weak::upgrade);
        graphs.ok_or_else(|| Refusal::Internal("nobody keeps the graphs of shared rooms".to_owned()))
    }

    /// The log of a shared room was read from the store, which does not have all that its graph has set of its state.
    pub(super) fn tell_graph(&self, room_id: &RoomId) {
        if let Ok(graphs) = self.graphs() {
            graphs.log_was_read(room_id);
        }
    }

    /// Has every room read from the store again when it is asked for next: for tests.
    pub fn forget_rooms(&self) {
        self.rooms().forget_all();
    }

    /// Creates a room that LM servers and graph servers share, with the gateway as its hub.
    pub async fn create_shared(&self, room: NewRoom) -> Result<OwnedRoomId, Refusal> {
        let NewRoom { creator, version, mut initial_state } = room;
        let content = Object::from_iter([(SHARED.to_owned(), true.into())]);
        let (sender, kind, origin_server_ts) =
            (creator.clone(), "m.room.create".to_owned(), self.context().clock.now_ms());
        initial_state.push(Draft { sender, kind, state_key: Some(String::new()), content, origin_server_ts });
        let room_id = self.graphs()?.create(NewShared { creator, version, initial_state }).await?;
        tracing::info!(room = %room_id, "created a shared room");
        Ok(room_id)
    }

    /// Joins a shared room that a server offers to graph servers. Its log follows here from its graph.
    pub(super) async fn join_graph(
        &self,
        server: &ServerName,
        room_id: &RoomId,
        draft: &Draft,
    ) -> Result<Appended, Refusal> {
        let join = JoinShared {
            room_id: room_id.to_owned(),
            via: server.to_owned(),
            user_id: draft.sender.clone(),
            content: draft.content.clone(),
        };
        let joined = self.graphs()?.join(join).await?;
        self.must_have(&joined).await
    }

    /// Whether a room is a shared one.
    pub async fn is_shared(&self, room_id: &RoomId) -> Result<bool, Refusal> {
        match self.find(room_id).await {
            Ok((_, room)) => Ok(room.facts.shared),
            Err(Refusal::UnknownRoom(_)) => Ok(false),
            Err(refusal) => Err(refusal),
        }
    }

    /// Refuses a server that the list of a shared room denies: what came in by the log would be in the graph, and no server there
    /// could refuse it. Rooms that are logs alone have no lists.
    pub(super) async fn admits(&self, facts: &Facts, server: &ServerName) -> Result<(), Refusal> {
        match facts.shared {
            true => self.graphs()?.admits(&facts.room_id, server).await,
            false => Ok(()),
        }
    }

    /// Adds events to a shared room; gives those of any other room back.
    pub(super) async fn append_through_graph(
        &self,
        cell: &Arc<RoomCell>,
        events: Vec<(What, Origin)>,
    ) -> Result<Vec<Outcome>, Vec<(What, Origin)>> {
        let refused =
            |events: &[_], refusal: Refusal| events.iter().map(|_| Outcome::Refused(refusal.clone())).collect();
        match cell.snapshot(&self.context().store).await {
            Ok(room) if !room.facts.shared => return Err(events),
            Ok(_) => {}
            Err(error) => return Ok(refused(&events, error.into())),
        }
        let graphs = match self.graphs() {
            Ok(graphs) => graphs,
            Err(refusal) => return Ok(refused(&events, refusal)),
        };
        let next = events.into_iter().map(|(what, Origin { foreign, answered, effect, .. })| {
            let what = match what {
                What::Lpdu(lpdu) => Next::Lpdu(lpdu),
                What::Own(draft) => Next::Own(draft),
                What::Signed { pdu, .. } => Next::Finished(pdu),
            };
            // Who appends tells: `append_and_tell`, or who had the event signed.
            let origin = LogOrigin { foreign, answered, told: true, ..LogOrigin::default() };
            NextEvent { what, origin, effect }
        });
        let mut outcomes = Vec::new();
        for added in graphs.add(&cell.room_id, next.collect()).await {
            let found = match added {
                Ok(event_id) => self.must_have(&event_id).await,
                Err(refusal) => Err(refusal),
            };
            outcomes.push(found.map_or_else(Outcome::Refused, Outcome::Appended));
        }
        Ok(outcomes)
    }

    async fn must_have(&self, event_id: &EventId) -> Result<Appended, Refusal> {
        let event = self.event(event_id).await?;
        event.ok_or_else(|| Refusal::Internal(format!("{event_id} was accepted and is not in the log")))
    }
}

struct LogsOf(Lm);

#[async_trait]
impl Logs for LogsOf {
    async fn begin(&self, room_id: &RoomId) -> Result<Box<dyn LogBatch>, Refusal> {
        let (cell, snapshot) = self.0.find(room_id).await?;
        if !snapshot.facts.shared {
            return Err(Refusal::Internal(format!("the log of {room_id} follows from no graph")));
        }
        Ok(Box::new(Growing::new(self.0.clone(), Some(cell), Batch::new(snapshot))))
    }

    fn begin_new(&self, room: NewLog) -> Box<dyn LogBatch> {
        let facts = Facts { room_id: room.room_id, version: room.version, hub: room.hub, shared: true };
        let batch = Batch::of_new_room(Snapshot::empty(facts, Redaction::GraphServer));
        Box::new(Growing::new(self.0.clone(), None, batch))
    }

    async fn forget(&self, room_id: &RoomId) {
        match self.0.rooms().find(room_id).await {
            Ok(cell) => cell.into_iter().for_each(|cell| cell.forget()),
            Err(error) => tracing::error!(room = %room_id, %error, "a log is kept as it was"),
        }
    }

    async fn hub_of_another(&self, room_id: &RoomId) -> Result<Option<OwnedServerName>, Refusal> {
        match self.0.find(room_id).await {
            Ok((_, room)) => Ok((!room.facts.shared).then(|| room.facts.hub.clone())),
            Err(Refusal::UnknownRoom(_)) => Ok(None),
            Err(refusal) => Err(refusal),
        }
    }
}

/// A log that grows.
struct Growing {
    lm: Lm,
    cell: Option<Arc<RoomCell>>,
    batch: Batch,
    /// The room before each event that was put or redacted, and how much there was of both.
    before: Vec<(Snapshot, (usize, usize))>,
    /// The events that were made of LPDUs, by these.
    of_lpdus: HashMap<OwnedEventId, OwnedEventId>,
    /// Which servers outside are to be told of which events, and how much there was before each.
    tells: Vec<(usize, stored::Outsider, OwnedEventId)>,
    /// What was written, in the transaction that was committed last.
    done: Mutex<Option<Done>>,
}

impl Growing {
    fn new(lm: Lm, cell: Option<Arc<RoomCell>>, batch: Batch) -> Self {
        Self {
            lm,
            cell,
            batch,
            before: Vec::new(),
            of_lpdus: HashMap::new(),
            tells: Vec::new(),
            done: Mutex::default(),
        }
    }
}

#[async_trait]
impl LogBatch for Growing {
    fn judge(&self, event: &Pdu) -> Result<(), Refusal> {
        let (room, subject) = (&self.batch.after, Subject::of(event));
        room.judge(&subject, &room.auth_events(&subject).0)
    }

    fn push(&mut self, event: Arc<Pdu>, origin: LogOrigin) {
        let outside = self.lm.outside_of_graph(&self.batch.after, &event).filter(|_| !origin.told);
        self.tells.extend(outside.map(|outsider| (self.before.len(), outsider, event.event_id.clone())));
        self.before.push((self.batch.after.clone(), self.batch.size()));
        if let Some(lpdu_id) = &event.lpdu_id {
            self.of_lpdus.insert(lpdu_id.clone(), event.event_id.clone());
        }
        let LogOrigin { foreign, answered, comes, told: _ } = origin;
        self.batch.push(Arc::unwrap_or_clone(event), Origin { foreign, answered, comes, effect: None });
    }

    fn redact(&mut self, target: &EventId, redaction: &EventId) {
        self.before.push((self.batch.after.clone(), self.batch.size()));
        self.batch.redact(target.to_owned(), redaction.to_owned());
    }

    fn len(&self) -> usize {
        self.before.len()
    }

    fn truncate(&mut self, len: usize) {
        let Some((after, size)) = self.before.get(len).cloned() else { return };
        self.before.truncate(len);
        self.tells.retain(|(before, ..)| *before < len);
        self.batch.truncate(size, after);
        let kept: Vec<OwnedEventId> = self.batch.events().map(|event| event.event_id.clone()).collect();
        self.of_lpdus.retain(|_, event_id| kept.contains(event_id));
    }

    fn state(&self, kind: &str, state_key: &str) -> Option<OwnedEventId> {
        self.batch.after.state_event(kind, state_key).map(|event| event.event_id.clone())
    }

    fn all_state(&self) -> Vec<((String, String), OwnedEventId)> {
        let state = self.batch.after.state().iter();
        state.map(|(kind, key, event)| ((kind.to_owned(), key.to_owned()), event.event_id.clone())).collect()
    }

    fn set_state(&mut self, kind: &str, state_key: &str, event: Option<Arc<Pdu>>) {
        self.batch.replace_state(kind, state_key, event);
    }

    fn reading(&self) -> u64 {
        self.cell.as_ref().map_or(0, |cell| cell.reading())
    }

    async fn has(&self, event_id: &EventId) -> Result<bool, Refusal> {
        if self.batch.events().any(|event| event.event_id == event_id) {
            return Ok(true);
        }
        Ok(stored::event(&self.lm.context().store, event_id).await?.is_some())
    }

    async fn find_lpdu(&self, lpdu_id: &EventId) -> Result<Option<OwnedEventId>, Refusal> {
        if let Some(event_id) = self.of_lpdus.get(lpdu_id) {
            return Ok(Some(event_id.clone()));
        }
        let found = stored::event_of_lpdu(&self.lm.context().store, lpdu_id).await?;
        Ok(found.map(|row| row.event_id))
    }

    fn write<'c>(&'c self, tx: &'c mut Tx) -> BoxFuture<'c, Result<(), StoreError>> {
        Box::pin(async move {
            *lock(&self.done) = None;
            if self.batch.is_empty() {
                return Ok(());
            }
            let done = self.batch.clone().job(&self.lm).run(tx).await?;
            for (_, outsider, event_id) in &self.tells {
                self.lm.keep_tell(tx, outsider, &self.batch.after.facts.room_id, event_id).await?;
            }
            *lock(&self.done) = Some(done);
            Ok(())
        })
    }

    async fn committed(self: Box<Self>) {
        let Self { lm, cell, batch, tells, done, .. } = *self;
        let done = done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some(done) = done else { return };
        if !tells.is_empty() {
            lm.tell_soon();
        }
        let room_id = batch.after.facts.room_id.clone();
        if let Err(error) = batch.news(&lm).tell(&lm, cell.as_ref(), done).await {
            tracing::error!(room = %room_id, %error, "the log of a shared room is read anew");
            if let Some(cell) = cell {
                cell.forget();
            }
        }
    }

    fn uncertain(self: Box<Self>, _error: &StoreError) {
        if let Some(cell) = self.cell {
            cell.forget();
        }
    }
}
