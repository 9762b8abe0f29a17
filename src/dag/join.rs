//! Joining rooms that live elsewhere, as a user of the gateway. The state with which a server answers is checked event by
//! event, as at a gap, and taken in with the join in one transaction.
//! <https://spec.matrix.org/v1.16/server-server-api/#joining-rooms>

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use imbl::ordmap::DiffItem;
use ruma::events::TimelineEventType;
use ruma::{OwnedEventId, OwnedServerName, RoomId, ServerName, UserId};
use serde_json::Value;

use super::accept::{Outcome, Source};
use super::batch::Batch;
use super::fetch::{MAX_ANSWER, take_events};
use super::given::stands_on_all;
use super::outside::{Wish, bad, body_of, send_uri, weightier};
use super::pdu::{Unverified, Verified};
use super::room::{Core, Room};
use super::snapshot::{Snapshot, StateKey};
use super::stored::Stored;
use super::version::is_shared;
use super::{Dag, GraphEvent, Shared};
use crate::event::{Object, RoomVersion};
use crate::federation::{Call, Feed, FeedKind};
use crate::refusal::Refusal;
use crate::seam::{EventEffect, Membership, Outgoing};
use crate::store::dag::remove_invite;
use crate::store::gaps::begin;
use crate::store::owed::forget_owed_leaves;

/// How long checking an answer may take: large rooms have the keys of many servers.
const PATIENCE: Duration = Duration::from_secs(300);
/// How often, and after how long each time, a room's place is asked for that somebody just looks at.
const PLACE_TRIES: usize = 50;
const PLACE_WAIT: Duration = Duration::from_millis(20);

/// A room that was joined.
#[derive(Debug, Clone)]
pub struct Joined {
    /// The join.
    pub join: Arc<GraphEvent>,
    /// The room's version.
    pub version: RoomVersion,
    /// The server through which it went; none where the gateway was in the room.
    pub through: Option<OwnedServerName>,
}

impl Dag {
    /// Joins a room as `user_id`, a user of the gateway, through the servers `via`. `content` is what the join says but for the
    /// membership.
    pub async fn join(
        &self,
        room_id: &RoomId,
        via: &[OwnedServerName],
        user_id: &UserId,
        content: Object,
    ) -> Result<Joined, Refusal> {
        let wish = self.wish(room_id, user_id, Membership::Join, content)?;
        self.join_as(wish, via.to_vec()).await
    }

    /// The same, of rooms of the versions that the wish names.
    pub(super) async fn join_as(&self, wish: Wish, via: Vec<OwnedServerName>) -> Result<Joined, Refusal> {
        let dag = self.clone();
        // On a task of its own: a join that another server has taken is stored, whoever still waits for it.
        let joined = tokio::spawn(async move {
            let joined = dag.join_in_turn(wish, &via).await;
            if joined.is_err() {
                // What was tried may be owed a leave.
                dag.leave_soon();
            }
            joined
        });
        joined.await.map_err(|error| Refusal::Internal(error.to_string()))?
    }

    /// Whether this room is being joined: what comes for it waits until it is.
    pub fn is_joining(&self, room_id: &RoomId) -> bool {
        self.shared.joining.contains(room_id)
    }

    async fn join_in_turn(&self, mut wish: Wish, via: &[OwnedServerName]) -> Result<Joined, Refusal> {
        let place = self.shared.line_up(&wish.room_id);
        let _turn = place.turn().await;
        let known = self.shared.find(&wish.room_id).await?;
        let resident = known.as_ref().filter(|room| room.core().has_server(&self.shared.context.server_name));
        if let Some(room) = resident {
            let draft = wish.draft(self.shared.context.clock.now_ms());
            match self.send_one(room, Outgoing { draft, effect: None }).await {
                Ok(join) => return Ok(Joined { join, version: room.version, through: None }),
                // Another server of the room can vouch for who meets its conditions.
                Err(Refusal::MatrixRule(_)) if self.restricted(room, &wish.user_id).await?.is_some() => {}
                Err(refusal) => return Err(refusal),
            }
        }
        if let Some(room) = &known {
            wish.versions = vec![room.version];
        }
        let mut told = None;
        for server in self.candidates(&wish.room_id, &wish.user_id, via).await? {
            match self.join_through(&server, &wish, known.clone()).await {
                Ok((version, join)) => {
                    tracing::info!(room = %wish.room_id, %server, %version, user = %wish.user_id, "joined a room");
                    self.forget_invite(&wish).await;
                    return Ok(Joined { join: join.to_graph_event(), version, through: Some(server) });
                }
                Err(refusal) => {
                    tracing::info!(room = %wish.room_id, %server, %refusal, "not joined through this server");
                    told = Some(weightier(told, refusal));
                }
            }
        }
        Err(told.unwrap_or_else(|| Refusal::NotFound(format!("a server through which {} can be joined", wish.room_id))))
    }

    async fn join_through(
        &self,
        server: &ServerName,
        wish: &Wish,
        known: Option<Arc<Room>>,
    ) -> Result<(RoomVersion, Arc<Stored>), Refusal> {
        // Asked before the template, which shows what the server has by then.
        let feed = Feed { kind: FeedKind::Graph, room_id: wish.room_id.clone() };
        let has_all = !self.shared.context.outbound.waits_for(server, &feed).await?;
        let made = self.make_at(server, wish).await;
        // A server that has us by the log gives a template of the log, which is none of a graph.
        let may_be_of_a_log = match &made {
            Ok((version, _)) => is_shared(*version),
            Err(_) => true,
        };
        if may_be_of_a_log
            && let Some(logs) = self.shared.logs.get()
            && let Some(hub) = logs.hub_of_another(&wish.room_id).await?
        {
            let problem = format!("{} is here as a log that {hub} keeps, and is not joined as a graph", wish.room_id);
            return Err(Refusal::Forbidden(problem));
        }
        let (version, join) = made?;
        let uri = format!("{}?omit_members=false", send_uri("v2/send_join", &join, wish));
        let call = Call::put(uri, body_of(&join)).with_state();
        let client = &self.shared.context.client;
        let owed = &self.shared.owed;
        let begun = owed.begin(server, &wish.room_id, &wish.user_id, Some(version)).await?;
        let joined = match client.call_held(server, call, false).await {
            Ok((answer, _held)) => {
                let taking = self.take_join(server, has_all, wish, (version, join), answer, known);
                let joined = tokio::time::timeout(PATIENCE, Box::pin(taking)).await;
                joined.unwrap_or_else(|_| Err(bad(server, format!("its answer was not checked within {PATIENCE:?}"))))
            }
            Err(error) if error.may_have_taken() => Err(wish.refused(server, error)),
            Err(error) => {
                owed.refused(begun).await;
                return Err(wish.refused(server, error));
            }
        };
        if let Err(refusal) = &joined {
            // Not at once: a leave of before may be on its way, and would do.
            owed.owe(begun, refusal, false).await;
        }
        Ok((version, joined?))
    }

    /// Checks and takes in what a server answers to a join. `has_all` says whether it has got all that the gateway has said in the
    /// room.
    async fn take_join(
        &self,
        server: &ServerName,
        has_all: bool,
        wish: &Wish,
        (version, join): (RoomVersion, Verified),
        answer: Object,
        known: Option<Arc<Room>>,
    ) -> Result<Arc<Stored>, Refusal> {
        let shared = &self.shared;
        let own = &shared.context.server_name;
        let mut given = Given::read(version, answer).map_err(|problem| match problem {
            Problem::Says(problem) => bad(server, format!("its answer to a join: {problem}")),
            Problem::Is(refusal) => refusal,
        })?;
        let join = match countersigned(&join, given.event.take(), version).map_err(|problem| bad(server, problem))? {
            Some(signed) => shared.verify(signed).await?,
            None => join,
        };
        if let Some(room) = known.as_ref().filter(|room| room.core().has_server(own)) {
            return self.join_from_inside(room, server, join).await;
        }
        let events = std::mem::take(&mut given.events);
        let verified = shared.verify_given(&wish.room_id, events).await?;
        let (room, is_new) = match known {
            Some(room) => (room, false),
            None => (shared.place_for(&wish.room_id, version).await?, true),
        };
        let outliers = shared.new_outliers(&room, server, verified, Vec::new).await;
        let entered = match outliers {
            Ok(outliers) => {
                let giver = Giver { server: server.to_owned(), has_all };
                shared.run(&room, move |batch| Box::pin(enter(batch, outliers, given, join, giver))).await
            }
            Err(refusal) => Err(refusal),
        };
        if entered.is_err() && is_new {
            shared.rooms.let_go(&room);
        }
        entered
    }

    /// The gateway is in the room: the join is one more event of it.
    async fn join_from_inside(
        &self,
        room: &Arc<Room>,
        server: &ServerName,
        join: Verified,
    ) -> Result<Arc<Stored>, Refusal> {
        let again = join.clone();
        let outcome = self
            .shared
            .run(room, move |batch| Box::pin(async move { batch.accept(join, &Source::Elsewhere, None).await }));
        let outcome = match outcome.await? {
            // What came before it has not come here yet.
            Outcome::Missing { .. } => {
                let event_id = again.pdu().event_id.clone();
                let mut outcomes = self.shared.accept_all(room, server, vec![again.clone()]).await?;
                if !outcomes.contains_key(&event_id) {
                    // That is too much for somebody to wait for it, who is in the room by that server's word.
                    outcomes = self.shared.close_now(room, server, vec![again]).await?;
                }
                outcomes.remove(&event_id).ok_or_else(|| Refusal::Internal("no outcome".to_owned()))??
            }
            known => known,
        };
        outcome.accepted().cloned()
    }

    /// An invite that was followed has done its work, and no leave is owed to any server. Left behind they would be of no harm.
    async fn forget_invite(&self, wish: &Wish) {
        let (room_id, user_id) = (wish.room_id.clone(), wish.user_id.clone());
        let store = &self.shared.context.store;
        let write = store.write(move |tx| {
            Box::pin(async move {
                remove_invite(tx, &room_id, &user_id).await?;
                forget_owed_leaves(tx, &room_id, &user_id).await
            })
        });
        if let Err(error) = write.await {
            tracing::warn!(room = %wish.room_id, user = %wish.user_id, %error, "an invite that was followed is kept");
        }
    }
}

impl Shared {
    /// The place of a room that is not here. Whoever looks for it holds it for a moment.
    async fn place_for(self: &Arc<Self>, room_id: &RoomId, version: RoomVersion) -> Result<Arc<Room>, Refusal> {
        for _ in 0..PLACE_TRIES {
            if let Ok(room) = self.start_new(room_id, version, Core::default()) {
                return Ok(room);
            }
            tokio::time::sleep(PLACE_WAIT).await;
        }
        self.start_new(room_id, version, Core::default())
    }
}

/// Who gave a state with a join.
struct Giver {
    server: OwnedServerName,
    /// Whether it has got all that the gateway has said in the room. It may still wait there for what is before it.
    has_all: bool,
}

/// Takes in the state and the join: the room is from now on what they say.
async fn enter(
    batch: &mut Batch,
    outliers: Vec<Verified>,
    given: Given,
    join: Verified,
    giver: Giver,
) -> Result<Arc<Stored>, Refusal> {
    batch.accept_given(outliers).await?;
    let ids: Vec<OwnedEventId> = given.state.iter().map(|(_, id)| id.clone()).collect();
    let (before, lost) = batch.state_of_given(&ids).await?;
    let some = lost.first().unwrap_or(&join.pdu().event_id);
    stands_on_all(&before, some, |kind| given.foundations.contains(kind))?;
    if before.get("m.room.create", "").is_none() {
        return Err(Refusal::NotFound("m.room.create in the answer to a join".to_owned()));
    }
    if !lost.is_empty() || given.left_out > 0 {
        tracing::warn!(room = %batch.room_id, lost = lost.len(), malformed = given.left_out, of = ids.len(),
            "a room was joined with a state of which some events cannot be had");
    }
    batch.begin_log_with(&before).await?;
    // What was known of the room, if it was, ended with the last user's leave. One that is still on its way, or waits there for what is
    // before it, will stand beside the join there, and so it does here: else a join that it undoes would be one for this gateway alone.
    let is_beside = batch.have_left(&before, giver.has_all).await?;
    if !is_beside {
        batch.core.tips.clear();
    }
    batch.set_current(before.clone()).await?;
    batch.linear.dirty = batch.differing();
    let (room_id, event_id) = (batch.room_id.clone(), join.pdu().event_id.clone());
    let user = join.pdu().sender.clone();
    let outcome = batch.accept(join, &Source::Elsewhere, Some(before)).await?;
    batch.add_effect(
        event_id,
        EventEffect::new(move |tx, event_id| Box::pin(async move { begin(tx, &room_id, &event_id).await })),
    );
    let join = outcome.accepted().cloned()?;
    if is_beside && !batch.core.joined.contains(&user) {
        let problem = format!("has not heard yet that {user} left {}, which undoes its join", batch.room_id);
        return Err(Refusal::Forbidden(format!("{} {problem}", giver.server)));
    }
    Ok(join)
}

impl Batch {
    /// Whether users of the gateway who are in the room by this state have left it since. Of whom who gave the state `has_all`, by joins
    /// that are older than the leaves here: what is not known may be newer, as a join of which no answer came.
    async fn have_left(&self, state: &Snapshot, has_all: bool) -> Result<bool, Refusal> {
        let own = &self.shared.context.server_name;
        let mut parted = Vec::new();
        for item in self.core.current.map.diff(&state.map) {
            if let DiffItem::Update { old: ((kind, user), here), new: (_, there) } = item
                && kind == "m.room.member"
                && <&UserId>::try_from(user.as_str()).is_ok_and(|user| user.server_name() == own)
            {
                parted.push((here.clone(), there.clone()));
            }
        }
        let ids: Vec<_> = parted.iter().flat_map(|(here, there)| [here.clone(), there.clone()]).collect();
        let events = self.events(&ids).await?;
        let is_left = |id| {
            events.get(id).is_some_and(|event| {
                event.membership() == Some(Membership::Leave) && event.pdu.sender.server_name() == own
            })
        };
        let is_in = |id| {
            events.get(id).is_some_and(|event| {
                event.membership() == Some(Membership::Join) && (!has_all || event.groups.is_some())
            })
        };
        Ok(parted.iter().any(|(here, there)| is_left(here) && is_in(there)))
    }
}

/// What a server gives with a join, of the right form.
struct Given {
    /// The join as it has it.
    event: Option<Object>,
    /// The events of the state, with their keys.
    state: Vec<(StateKey, OwnedEventId)>,
    /// These, and what allows them, each once.
    events: Vec<Unverified>,
    /// Which of the types that rules stand on it says the room has.
    foundations: HashSet<String>,
    /// How many events were not of the right form.
    left_out: usize,
}

enum Problem {
    /// What the server says is wrong.
    Says(String),
    Is(Refusal),
}

impl Given {
    fn read(version: RoomVersion, mut answer: Object) -> Result<Self, Problem> {
        let says = |problem: String| Err(Problem::Says(problem));
        if answer.get("members_omitted").is_some_and(|omitted| *omitted != Value::Bool(false)) {
            return says("members_omitted, which was not asked for".to_owned());
        }
        for list in ["state", "auth_chain"] {
            match answer.get(list).and_then(Value::as_array).map(Vec::len) {
                None => return says(format!("{list} is missing")),
                Some(count) if count > MAX_ANSWER => {
                    return Err(Problem::Is(Refusal::TooManyEvents { what: "answer to a join", limit: MAX_ANSWER }));
                }
                Some(_) => {}
            }
        }
        let event = match answer.remove("event") {
            Some(Value::Object(event)) => Some(event),
            Some(Value::Null) | None => None,
            Some(_) => return says("event is no object".to_owned()),
        };
        let state = take_events(&mut answer, "state", MAX_ANSWER);
        let chain = take_events(&mut answer, "auth_chain", MAX_ANSWER);
        let mut given = Self { event, state: Vec::new(), events: Vec::new(), foundations: HashSet::new(), left_out: 0 };
        let (mut keys, mut seen) = (HashSet::new(), HashSet::new());
        let mut creates: HashSet<OwnedEventId> = HashSet::new();
        let count = state.len();
        for (index, event) in state.into_iter().chain(chain).enumerate() {
            let is_state = index < count;
            if is_state
                && event.get("state_key").and_then(Value::as_str) == Some("")
                && let Some(kind) = event.get("type").and_then(Value::as_str)
            {
                given.foundations.insert(kind.to_owned());
            }
            let Ok(event) = Unverified::from_object(event, version) else {
                given.left_out = given.left_out.saturating_add(1);
                continue;
            };
            let pdu = event.pdu();
            if pdu.kind == TimelineEventType::RoomCreate {
                creates.insert(pdu.event_id.clone());
                check_version(&event, version).map_err(Problem::Says)?;
            }
            if is_state && let Some(state_key) = &pdu.state_key {
                let key = (pdu.kind.to_string(), state_key.clone());
                if !keys.insert(key.clone()) {
                    return says(format!("two events for {key:?} in the state"));
                }
                given.state.push((key, pdu.event_id.clone()));
            }
            if seen.insert(pdu.event_id.clone()) {
                given.events.push(event);
            }
        }
        if creates.len() != 1 {
            return says(format!("{} events of the type m.room.create", creates.len()));
        }
        Ok(given)
    }
}

/// The create event says the version by whose rules the room is read.
fn check_version(create: &Unverified, version: RoomVersion) -> Result<(), String> {
    let content: Object = serde_json::from_str(create.pdu().content.get()).unwrap_or_default();
    match content.get("room_version").map_or(Some("1"), Value::as_str) {
        Some(said) if said == version.as_str() => Ok(()),
        said => Err(format!("m.room.create says version {said:?}, and the template {version}")),
    }
}

/// The join with the further signature that it needs when it has to meet conditions; none when it needs none. Nothing else of
/// what the server calls our join is taken.
fn countersigned(join: &Verified, theirs: Option<Object>, version: RoomVersion) -> Result<Option<Unverified>, String> {
    let Some(theirs) = theirs else { return Ok(None) };
    let signatures = theirs.get("signatures").cloned().unwrap_or_default();
    let theirs = Unverified::from_object(theirs, version).map_err(|refusal| refusal.to_string())?;
    if theirs.pdu().event_id != join.pdu().event_id {
        return Err(format!("{} was answered with another event, {}", join.pdu().event_id, theirs.pdu().event_id));
    }
    let mut event = body_of(join);
    let content = event.get("content").and_then(Value::as_object);
    if content.is_none_or(|content| !content.contains_key("join_authorised_via_users_server")) {
        return Ok(None);
    }
    let own = event.get("signatures").and_then(Value::as_object).cloned().unwrap_or_default();
    let mut all = signatures.as_object().cloned().unwrap_or_default();
    all.extend(own);
    event.insert("signatures".to_owned(), Value::Object(all));
    Unverified::from_object(event, version).map(Some).map_err(|refusal| refusal.to_string())
}
