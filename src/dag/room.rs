//! Active rooms: what is known of each in memory, and the one task that changes it. A room is loaded when it is first asked
//! for and let go when nobody has used it for a while.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use imbl::{OrdMap, OrdSet};
use ruma::room_version_rules::RoomVersionRules;
use ruma::{OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId, RoomId, ServerName};
use tokio::sync::{Notify, OnceCell, Semaphore, mpsc, oneshot};

use super::Shared;
use super::actor::{self, End, Jobs, Work};
use super::batch::Batch;
use super::correct::Corrections;
use super::outliers::Outliers;
use super::snapshot::Snapshot;
use super::version::{is_shared, rules_of};
use crate::event::RoomVersion;
use crate::refusal::Refusal;
use crate::store::dag::RoomRow;
use crate::store::{StoreError, dag, redactions};

/// How many jobs may wait for one room before those who bring more wait too.
const QUEUE: usize = 512;

/// A forward extremity.
#[derive(Debug, Clone)]
pub struct Tip {
    /// The event.
    pub event_id: OwnedEventId,
    /// Its depth.
    pub depth: i64,
    /// The state after it.
    pub after: Snapshot,
}

/// What changes in a room. Clones share structure.
#[derive(Debug, Clone, Default)]
pub struct Core {
    /// The current, resolved state.
    pub current: Snapshot,
    /// The forward extremities, oldest first.
    pub tips: Vec<Tip>,
    /// The joined users.
    pub joined: OrdSet<OwnedUserId>,
    /// The servers of joined users, with how many.
    pub servers: OrdMap<OwnedServerName, usize>,
    /// The last position of the outbox.
    pub head: i64,
    /// Whether redactions were accepted whose targets were not here.
    pub awaits_targets: bool,
    /// Of a shared room: those of `servers` that get its log, and not the outbox.
    pub linear: OrdSet<OwnedServerName>,
    /// Of a shared room: how far its log's state is known to be this one.
    pub corrections: Corrections,
}

impl Core {
    /// The servers of joined users that get the outbox.
    pub fn graph_servers(&self) -> impl Iterator<Item = &OwnedServerName> {
        self.servers.keys().filter(|server| !self.linear.contains(*server))
    }

    /// Whether a user of `server` is joined.
    pub fn has_server(&self, server: &ServerName) -> bool {
        self.servers.contains_key(server)
    }

    /// Takes a user in or out of the joined ones. True when that was the server's first, or last, user.
    pub fn set_joined(&mut self, user: &OwnedUserId, joined: bool) -> bool {
        let server = user.server_name();
        let count = self.servers.get(server).copied().unwrap_or_default();
        let new = match (self.joined.contains(user), joined) {
            (false, true) => count.saturating_add(1),
            (true, false) => count.saturating_sub(1),
            _ => return false,
        };
        if joined {
            self.joined.insert(user.clone());
        } else {
            self.joined.remove(user);
        }
        if new == 0 {
            self.servers.remove(server);
        } else {
            self.servers.insert(server.to_owned(), new);
        }
        (count == 0) != (new == 0)
    }
}

/// An active room.
pub struct Room {
    /// Its ID.
    pub room_id: OwnedRoomId,
    /// Its version.
    pub version: RoomVersion,
    /// The version's rules.
    pub rules: &'static RoomVersionRules,
    /// Held by who fetches what is missing here, so that it is fetched once.
    pub filling: tokio::sync::Mutex<()>,
    /// What was taken of auth events that came alone; none before it was asked for.
    pub outliers: tokio::sync::Mutex<Option<Outliers>>,
    /// Told with each change.
    pub changes: Notify,
    core: ArcSwap<Core>,
    jobs: mpsc::UnboundedSender<Box<dyn Work>>,
    permits: Arc<Semaphore>,
}

impl Room {
    /// The last committed state of things.
    pub fn core(&self) -> Arc<Core> {
        self.core.load_full()
    }

    pub(super) fn set_core(&self, core: Core) {
        self.core.store(Arc::new(core));
        self.changes.notify_waiters();
    }

    /// Its row with `core`.
    pub fn row(&self, core: &Core) -> RoomRow {
        RoomRow {
            room_id: self.room_id.clone(),
            version: self.version.as_str().to_owned(),
            current: core.current.id,
            tips: core.tips.iter().map(|tip| tip.event_id.clone()).collect(),
            head: core.head,
        }
    }
}

type Slot = Arc<OnceCell<Option<Arc<Room>>>>;

/// The active rooms.
#[derive(Default)]
pub struct Rooms {
    slots: Mutex<HashMap<OwnedRoomId, Slot>>,
}

impl Rooms {
    fn slots(&self) -> std::sync::MutexGuard<'_, HashMap<OwnedRoomId, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the room out if nothing waits for it; true when it was taken out.
    pub(super) fn retire(&self, room: &Arc<Room>, jobs: &mut Jobs) -> bool {
        let mut slots = self.slots();
        if !jobs.is_empty() {
            return false;
        }
        jobs.close();
        let_go_from(&mut slots, room);
        true
    }

    /// Takes this room out, if it has not been taken out or loaded anew.
    pub(super) fn let_go(&self, room: &Arc<Room>) {
        let_go_from(&mut self.slots(), room);
    }
}

fn let_go_from(slots: &mut HashMap<OwnedRoomId, Slot>, room: &Arc<Room>) {
    let is_this = |slot: &Slot| matches!(slot.get(), Some(Some(held)) if Arc::ptr_eq(held, room));
    if slots.get(&room.room_id).is_some_and(is_this) {
        slots.remove(&room.room_id);
    }
}

impl Shared {
    /// The room; none when it is not on the graph side here.
    pub async fn find(self: &Arc<Self>, room_id: &RoomId) -> Result<Option<Arc<Room>>, StoreError> {
        let slot = self.rooms.slots().entry(room_id.to_owned()).or_default().clone();
        let found = slot.get_or_try_init(|| self.load(room_id)).await;
        if !matches!(found, Ok(Some(_))) {
            let mut slots = self.rooms.slots();
            if slots.get(room_id).is_some_and(|held| Arc::ptr_eq(held, &slot)) {
                slots.remove(room_id);
            }
        }
        found.cloned()
    }

    /// The room, which must be known.
    pub async fn room(self: &Arc<Self>, room_id: &RoomId) -> Result<Arc<Room>, Refusal> {
        self.find(room_id).await?.ok_or_else(|| Refusal::UnknownRoom(room_id.to_string()))
    }

    async fn load(self: &Arc<Self>, room_id: &RoomId) -> Result<Option<Arc<Room>>, StoreError> {
        if room_id.as_str().contains('\0') {
            return Ok(None);
        }
        let Some(row) = dag::room(&self.context.store, room_id).await? else { return Ok(None) };
        let version =
            RoomVersion::parse(&row.version).ok_or_else(|| StoreError::corrupt("room version", &row.version))?;
        let mut core = Core { current: self.events.group(row.current).await?, head: row.head, ..Core::default() };
        core.awaits_targets = redactions::any(&self.context.store, room_id).await?;
        let events = self.events.get_many(&row.tips).await?;
        for event_id in row.tips {
            let event = events.get(&event_id).ok_or_else(|| StoreError::corrupt("extremity", &event_id))?;
            let groups = event.groups.ok_or_else(|| StoreError::corrupt("extremity", &event_id))?;
            let after = self.events.group(groups.after).await?;
            core.tips.push(Tip { event_id, depth: event.pdu.depth, after });
        }
        for user in dag::joined(&self.context.store, room_id).await? {
            core.set_joined(&user, true);
        }
        if is_shared(version) {
            let reached = dag::open_windows(&self.context.store, room_id).await?;
            let own = &self.context.server_name;
            let linear = core.servers.keys().filter(|server| *server != own && !reached.contains(*server));
            core.linear = linear.cloned().collect();
        }
        let room = self.start(room_id.to_owned(), version, core)?;
        if is_shared(version) {
            self.compare_with_log(&room);
        }
        Ok(Some(room))
    }

    fn start(
        self: &Arc<Self>,
        room_id: OwnedRoomId,
        version: RoomVersion,
        core: Core,
    ) -> Result<Arc<Room>, StoreError> {
        let rules = rules_of(version).map_err(|refusal| StoreError::corrupt("room version", refusal))?;
        let (jobs, inbox) = mpsc::unbounded_channel();
        let room = Arc::new(Room {
            room_id,
            version,
            rules,
            filling: tokio::sync::Mutex::default(),
            outliers: tokio::sync::Mutex::default(),
            changes: Notify::new(),
            core: ArcSwap::from_pointee(core),
            jobs,
            permits: Arc::new(Semaphore::new(QUEUE)),
        });
        tokio::spawn(watched(self.clone(), room.clone(), inbox));
        Ok(room)
    }

    /// A room that does not exist yet: its first job makes it. It is found by others once that job is committed.
    pub(super) fn start_new(
        self: &Arc<Self>,
        room_id: &RoomId,
        version: RoomVersion,
        core: Core,
    ) -> Result<Arc<Room>, Refusal> {
        let mut slots = self.rooms.slots();
        match slots.entry(room_id.to_owned()) {
            // Also one that somebody is looking for, or whose making has begun: it keeps its place.
            Entry::Occupied(_) => Err(Refusal::Internal(format!("room {room_id} exists"))),
            Entry::Vacant(place) => {
                let room = self.start(room_id.to_owned(), version, core)?;
                place.insert(Arc::new(OnceCell::new_with(Some(Some(room.clone())))));
                Ok(room)
            }
        }
    }

    /// Runs `job` in the room's task, and returns what it gave after that is committed. A job that fails changes nothing.
    pub async fn run<T, F>(self: &Arc<Self>, room: &Arc<Room>, job: F) -> Result<T, Refusal>
    where
        T: Send + 'static,
        F: for<'b> FnOnce(&'b mut Batch) -> BoxFuture<'b, Result<T, Refusal>> + Send + 'static,
    {
        let permit = room.permits.clone().acquire_owned().await.map_err(|_| closed())?;
        let (reply, answer) = oneshot::channel();
        self.hand(room.clone(), actor::boxed(job, permit, reply)).await;
        answer.await.map_err(|_| closed())?
    }

    /// Gives a job to the room's task. A room that was let go meanwhile is loaded again; its rows are what it was.
    fn hand(self: &Arc<Self>, mut room: Arc<Room>, mut job: Box<dyn Work>) -> BoxFuture<'static, ()> {
        let shared = self.clone();
        Box::pin(async move {
            for _ in 0..3 {
                let sent = {
                    let _slots = shared.rooms.slots();
                    room.jobs.send(job)
                };
                let Err(mpsc::error::SendError(back)) = sent else { return };
                job = back;
                match shared.room(&room.room_id).await {
                    Ok(loaded) => room = loaded,
                    Err(refusal) => return job.finish(Err(refusal)),
                }
            }
            job.finish(Err(closed()));
        })
    }

    /// Takes a room out of memory; who next asks for it loads it.
    pub(super) fn let_go(&self, room: &Arc<Room>, jobs: &mut Jobs) {
        jobs.close();
        self.rooms.let_go(room);
    }
}

/// A room's task. What waits when it ends is given to the room that is loaded then.
async fn watched(shared: Arc<Shared>, room: Arc<Room>, mut jobs: Jobs) {
    match AssertUnwindSafe(actor::run(&shared, &room, &mut jobs)).catch_unwind().await {
        Ok(End::Idle) => return,
        Ok(End::Uncertain) => {}
        Err(_) => {
            tracing::error!(room = %room.room_id, "a room's task panicked; the room is loaded again");
            shared.let_go(&room, &mut jobs);
        }
    }
    while let Some(job) = jobs.recv().await {
        shared.hand(room.clone(), job).await;
    }
}

fn closed() -> Refusal {
    Refusal::Internal("the room's task ended".to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::dag::{Dag, NewRoom};
    use crate::federation::{Context, KeysOf};
    use crate::seam::{Alone, Draft, Outgoing, Raw};

    struct Panicking;

    impl Work for Panicking {
        fn run<'b>(&'b mut self, _: &'b mut Batch) -> BoxFuture<'b, bool> {
            panic!("as a commit might")
        }

        fn finish(self: Box<Self>, _: Result<(), Refusal>) {}
    }

    const NOW: i64 = 1_704_067_200_000;

    async fn context(directory: &tempfile::TempDir) -> Context {
        Context::of_test(directory, "gateway.example", Arc::<KeysOf>::default()).await
    }

    fn draft(kind: &str, body: &str) -> Draft {
        let content = json!({ "body": body }).as_object().unwrap().clone();
        Draft { sender: bot(), kind: kind.to_owned(), state_key: None, content, origin_server_ts: NOW }
    }

    /// Events as another server relays them.
    async fn relayed(dag: &Dag, room_id: &RoomId, drafts: Vec<Draft>) -> Vec<Raw> {
        let room = dag.shared.room(room_id).await.unwrap();
        let building = dag.shared.run(&room, move |batch| {
            Box::pin(async move {
                let mut events = Vec::new();
                for draft in &drafts {
                    events.push(batch.build(draft).await?.into_pdu().raw);
                }
                Ok(events)
            })
        });
        building.await.unwrap().into_iter().map(|raw| serde_json::from_str(raw.get()).unwrap()).collect()
    }

    async fn room_of(dag: &Dag) -> OwnedRoomId {
        let new = NewRoom { creator: bot(), version: RoomVersion::V11, initial_state: Vec::new() };
        dag.create_room(new).await.unwrap()
    }

    fn bot() -> OwnedUserId {
        "@isthmus:gateway.example".try_into().unwrap()
    }

    async fn say(dag: &Dag, room_id: &RoomId, body: &str) -> Result<OwnedEventId, Refusal> {
        let draft = draft("m.room.message", body);
        let sent = dag.send(room_id, vec![Outgoing { draft, effect: None }]).await.remove(0)?;
        Ok(sent.event_id.clone())
    }

    #[tokio::test]
    async fn a_room_goes_on_after_its_task_panicked() {
        let directory = tempfile::tempdir().unwrap();
        let dag = Dag::new(context(&directory).await, Arc::new(Alone));
        let room_id = room_of(&dag).await;

        let room = dag.shared.room(&room_id).await.unwrap();
        assert!(room.jobs.send(Box::new(Panicking)).is_ok());
        room.jobs.closed().await;
        let sent = say(&dag, &room_id, "after").await.unwrap();
        assert!(dag.event(&sent).await.unwrap().is_some());
        assert!(!Arc::ptr_eq(&room, &dag.shared.room(&room_id).await.unwrap()));
        dag.shared.context.store.close().await;
    }

    #[tokio::test]
    async fn an_event_that_two_servers_bring_at_once_is_taken_once() {
        let directory = tempfile::tempdir().unwrap();
        let dag = Dag::new(context(&directory).await, Arc::new(Alone));
        let room_id = room_of(&dag).await;
        let events = relayed(&dag, &room_id, vec![draft("m.one", "body")]).await;
        let room = dag.shared.room(&room_id).await.unwrap();
        // The room's task is busy until both wait for it, and so takes both together.
        let (go, waiting) = oneshot::channel::<()>();
        let busy = dag.shared.run(&room, |_| Box::pin(async { waiting.await.map_err(|_| closed()) }));
        let release = async {
            while room.permits.available_permits() > QUEUE - 3 {
                tokio::task::yield_now().await;
            }
            go.send(()).unwrap();
        };
        let bring = |server: &'static str| {
            let (dag, events) = (dag.clone(), events.clone());
            async move { dag.receive(<&ServerName>::try_from(server).unwrap(), events).await.remove(0) }
        };
        let (busy, one, other, ()) = tokio::join!(busy, bring("one.example"), bring("other.example"), release);
        busy.unwrap();
        assert_eq!((&one.result, &other.result), (&Ok(()), &Ok(())));
        let tips: Vec<_> = room.core().tips.iter().map(|tip| tip.event_id.clone()).collect();
        assert_eq!(tips, [one.event_id.unwrap()]);
        dag.shared.context.store.close().await;
    }

    #[tokio::test]
    async fn a_room_whose_memory_lags_behind_its_rows_is_loaded_again() {
        let directory = tempfile::tempdir().unwrap();
        let context = context(&directory).await;
        let dag = Dag::new(context.clone(), Arc::new(Alone));
        let room_id = room_of(&dag).await;
        // As after a commit that the database did and could not confirm: the rows have an event of which memory has not heard.
        let lost = say(&Dag::new(context, Arc::new(Alone)), &room_id, "committed").await.unwrap();

        say(&dag, &room_id, "at a place that is taken").await.unwrap_err();
        let sent = say(&dag, &room_id, "again").await.unwrap();
        let sent = dag.event(&sent).await.unwrap().unwrap();
        assert_eq!(sent.prev_events, [lost]);
        dag.shared.context.store.close().await;
    }

    #[tokio::test]
    async fn an_event_on_which_the_gateway_fails_is_refused_alone() {
        let directory = tempfile::tempdir().unwrap();
        let dag = Dag::new(context(&directory).await, Arc::new(Alone));
        let room_id = room_of(&dag).await;
        let kinds = ["m.one", "test.panic.apply", "test.panic.verify", "m.two"];
        let events = relayed(&dag, &room_id, kinds.map(|kind| draft(kind, "body")).into()).await;
        for _ in 0..2 {
            let received = dag.receive(ruma::server_name!("other.example"), events.clone()).await;
            let fails: Vec<bool> = received
                .iter()
                .map(|received| match &received.result {
                    Ok(()) => false,
                    Err(refusal) => matches!(refusal, Refusal::Fails(_)) || panic!("{refusal:?}"),
                })
                .collect();
            // It is no failure of the transaction, which would be repeated.
            assert_eq!(fails, [false, true, true, false]);
        }
        let tips = dag.shared.room(&room_id).await.unwrap().core().tips.len();
        assert_eq!(tips, 2, "the two others");
        dag.shared.context.store.close().await;
    }

    #[tokio::test]
    async fn what_the_store_lost_of_a_room_is_no_failure_of_a_transaction() {
        let directory = tempfile::tempdir().unwrap();
        let context = context(&directory).await;
        let dag = Dag::new(context.clone(), Arc::new(Alone));
        let (bad, good) = (room_of(&dag).await, room_of(&dag).await);
        let mut events = relayed(&dag, &bad, vec![draft("m.one", "body")]).await;
        events.extend(relayed(&dag, &good, vec![draft("m.two", "body")]).await);
        let of = bad.clone();
        let spoil = context.store.write(move |tx| {
            Box::pin(async move {
                let sql = "UPDATE dag_events SET json = $1 WHERE room_id = $2";
                sqlx::query(sql).bind(&b"{}"[..]).bind(of.as_str()).execute(tx).await?;
                Ok(())
            })
        });
        spoil.await.unwrap();
        // Nothing of the room is in memory.
        let dag = Dag::new(context, Arc::new(Alone));
        assert_eq!(dag.knows(&bad).await, Ok(true));
        let received = dag.receive(ruma::server_name!("other.example"), events).await;
        let results: Vec<_> = received.into_iter().map(|received| received.result).collect();
        assert!(results.contains(&Ok(())) && results.len() == 2, "{results:?}");
        assert!(results.iter().any(|result| matches!(result, Err(Refusal::Fails(_)))), "{results:?}");
        dag.shared.context.store.close().await;
    }

    #[tokio::test]
    async fn a_room_is_read_anew_after_a_commit_panicked() {
        let directory = tempfile::tempdir().unwrap();
        let dag = Dag::new(context(&directory).await, Arc::new(Alone));
        let room_id = room_of(&dag).await;
        let origin = ruma::server_name!("other.example");
        let kinds = ["m.one", "test.panic.commit"].map(|kind| draft(kind, "body"));
        let events = relayed(&dag, &room_id, kinds.into()).await;
        let before = dag.shared.room(&room_id).await.unwrap();
        let tips = |room: &Room| room.core().tips.iter().map(|tip| tip.event_id.clone()).collect::<Vec<_>>();
        // Nothing of the batch was committed, and nothing is said of its events: they are sent again.
        for received in dag.receive(origin, events.clone()).await {
            assert!(matches!(received.result, Err(Refusal::Internal(_))), "{received:?}");
        }
        before.jobs.closed().await;
        let after = dag.shared.room(&room_id).await.unwrap();
        assert!(!Arc::ptr_eq(&before, &after));
        assert_eq!(tips(&after), tips(&before));
        let received = dag.receive(origin, events[..1].to_vec()).await.remove(0);
        assert_eq!(received.result, Ok(()));
        assert_eq!(tips(&after), [received.event_id.unwrap()]);
        // The whole again: now each goes alone, so that it is known which one it is.
        for _ in 0..2 {
            let received = dag.receive(origin, events.clone()).await;
            let [one, other] = &received[..] else { panic!("{received:?}") };
            assert_eq!(one.result, Ok(()));
            assert!(matches!(other.result, Err(Refusal::Fails(_))), "{other:?}");
        }
        dag.shared.context.store.close().await;
    }
}
