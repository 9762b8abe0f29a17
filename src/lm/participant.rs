//! The participant's part: coming into rooms that are hubbed elsewhere, and leaving them.
//!
//! Positions in a participant's copy of a log number the events that it holds: first the state events that came with its
//! join, in the hub's order, then the join, then every event in the order in which the hub gives them. After a time outside
//! the room the state events that are new come first again, then the new join.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex};

use ruma::{EventId, OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId, RoomId, ServerName, UserId};
use serde_json::{Value, json};

use super::actor::What;
use super::batch::{Batch, Origin};
use super::chain::{as_stored, to_keep};
use super::finished::{Bad, Finished};
use super::intake::Taking;
use super::join_check::{Claim, Seen, forbidden, is_ban, is_critical, without_forbidden};
use super::peers::prev_events;
use super::room::{Facts, Snapshot, Subject};
use super::rooms::{RoomCell, lock};
use super::ways::{as_hub, is_of_a_known_version};
use super::weight::Weight;
use super::{Appended, Lm, Role};
use crate::event::{Family, Lpdu, Object, Pdu, Redaction, RoomVersion};
use crate::federation::RemoteError;
use crate::identity::KeyringError;
use crate::refusal::Refusal;
use crate::seam::{AliasTarget, Draft, Membership, Outgoing};
use crate::store::lm::Fault;

/// How many events are kept that come for a room while its join is under way.
const EARLY: usize = 1000;

/// Rooms that are being joined. Their hub may send events before it answers the join.
#[derive(Default)]
pub(super) struct Joining(Mutex<HashMap<OwnedRoomId, Arc<Join>>>);

#[derive(Default)]
struct Join {
    turn: tokio::sync::Mutex<()>,
    /// The servers that are asked; one of them is the hub.
    asked: Mutex<BTreeSet<OwnedServerName>>,
    early: Mutex<Vec<(OwnedServerName, Object)>>,
}

impl Joining {
    fn enter(&self, room_id: &RoomId) -> Arc<Join> {
        lock(&self.0).entry(room_id.to_owned()).or_default().clone()
    }

    /// Whether a room is being joined.
    pub fn contains(&self, room_id: &RoomId) -> bool {
        lock(&self.0).contains_key(room_id)
    }

    /// Keeps events until the room is known, if they come from a server through which it is being joined: false when they
    /// do not. They are in memory alone, for a server that sends them once; another has to send them again.
    pub fn keep(&self, origin: &ServerName, room_id: &RoomId, objects: &[Object]) -> bool {
        let Some(join) = lock(&self.0).get(room_id).cloned() else { return false };
        if !lock(&join.asked).contains(origin) {
            return false;
        }
        let mut early = lock(&join.early);
        let space = EARLY.saturating_sub(early.len());
        early.extend(objects.iter().take(space).map(|object| (origin.to_owned(), object.clone())));
        true
    }

    /// Ends a join that nobody else waits for; returns what came early.
    fn leave(&self, room_id: &RoomId, join: Arc<Join>) -> Vec<(OwnedServerName, Object)> {
        let mut joining = lock(&self.0);
        // One in the map, one here.
        if Arc::strong_count(&join) <= 2 {
            joining.remove(room_id);
        }
        std::mem::take(&mut *lock(&join.early))
    }
}

impl Lm {
    /// Joins a room whose hub is elsewhere as `user`, through the servers `via`, by make_join and send_join (or, when the
    /// gateway is in the room already, by an LPDU, waiting for its echo). Returns the join when the hub has accepted it.
    pub async fn join(
        &self,
        room_id: &RoomId,
        user: &UserId,
        via: &[OwnedServerName],
        mut content: Object,
    ) -> Result<Appended, Refusal> {
        self.is_own(user)?;
        content.insert("membership".to_owned(), json!("join"));
        let draft = self.own_member(user, content);
        let (lm, room_id, via) = (self.clone(), room_id.to_owned(), via.to_vec());
        // On a task of its own: a join that the hub has accepted is stored, whoever still waits for it.
        let joined = tokio::spawn(async move { lm.join_in_turn(&room_id, draft, &via).await }).await;
        joined.map_err(|error| Refusal::Internal(error.to_string()))?
    }

    async fn join_in_turn(&self, room_id: &RoomId, draft: Draft, via: &[OwnedServerName]) -> Result<Appended, Refusal> {
        let join = self.joining().enter(room_id);
        let joined = {
            let _turn = join.turn.lock().await;
            match self.join_from_inside(room_id, &draft).await {
                Ok(Some(inside)) => Ok(inside),
                Ok(None) => self.join_from_outside(room_id, &join, &draft, via).await.map(Inside::Joined),
                Err(refusal) => Err(refusal),
            }
        };
        self.end_turn(room_id, join).await;
        if joined.is_err() {
            // What was tried may be owed a leave.
            self.leave_soon();
        }
        match joined? {
            Inside::Joined(appended) => Ok(appended),
            // Not in turn: others may join meanwhile.
            Inside::Member(cell, room) => self.send_and_wait(&cell, &room.facts, draft).await,
        }
    }

    async fn end_turn(&self, room_id: &RoomId, join: Arc<Join>) {
        for (origin, object) in self.joining().leave(room_id, join) {
            // In a box: a future inside this one gets too deep for the compiler.
            let received: futures::future::BoxFuture<'_, _> =
                Box::pin(self.receive_in_room(&origin, room_id, vec![object]));
            for early in received.await {
                if let Err(refusal) = early.result {
                    tracing::info!(room = %room_id, %origin, %refusal, "refused an event that came before the join");
                }
            }
        }
    }

    /// Does something while nobody joins a room.
    pub(super) async fn in_turn<T>(&self, room_id: &RoomId, work: impl Future<Output = T> + Send) -> T {
        let join = self.joining().enter(room_id);
        let turn = join.turn.lock().await;
        let done = work.await;
        drop(turn);
        self.end_turn(room_id, join).await;
        done
    }

    async fn join_from_inside(&self, room_id: &RoomId, draft: &Draft) -> Result<Option<Inside>, Refusal> {
        let (cell, room) = match self.find_to_speak(room_id).await {
            Ok(found) => found,
            Err(Refusal::UnknownRoom(_)) => return Ok(None),
            Err(refusal) => return Err(refusal),
        };
        match self.role(&room) {
            Role::GraphServer { .. } if !room.has_server(&self.context().server_name) => Ok(None),
            Role::Hub | Role::GraphServer { .. } => {
                let outcome = self.append(&cell, vec![(What::Own(draft.clone()), Origin::default())]).await.pop();
                let outcome = outcome.ok_or_else(|| Refusal::Internal("no outcome".to_owned()))?;
                Ok(Some(Inside::Joined(outcome.into_result()?)))
            }
            Role::Participant { .. } if room.has_server(&self.context().server_name) => {
                Ok(Some(Inside::Member(cell, room)))
            }
            Role::Participant { .. } => Ok(None),
        }
    }

    /// Asks one server after the other.
    async fn join_from_outside(
        &self,
        room_id: &RoomId,
        join: &Join,
        draft: &Draft,
        via: &[OwnedServerName],
    ) -> Result<Appended, Refusal> {
        let mut ways = self.ways(room_id, via).await;
        while let Some(server) = ways.next() {
            lock(&join.asked).insert(server.clone());
            match self.join_through(&server, room_id, draft).await {
                Ok(joined) => {
                    self.owed().came_in(room_id, &draft.sender).await;
                    return Ok(joined);
                }
                Err(refusal) => {
                    tracing::info!(room = %room_id, %server, %refusal, "not joined through this server");
                    ways.refused(&server, refusal);
                }
            }
        }
        Err(ways.end(&format!("{room_id} can be joined")))
    }

    async fn join_through(&self, server: &ServerName, room_id: &RoomId, draft: &Draft) -> Result<Appended, Refusal> {
        let failed = |error: RemoteError| as_hub(error, server);
        let (made, template) = self.peers().make(server, "join", room_id, &draft.sender).await.map_err(failed)?;
        is_of_a_known_version(&made)?;
        // What was taken part in by its log is a log for good: a graph cannot begin in its middle.
        let is_log = self.find(room_id).await.is_ok_and(|(_, room)| !room.facts.shared);
        if !prev_events(&template).is_empty() && !is_log && !self.does_logs_alone(server).await? {
            return self.join_graph(server, room_id, draft).await;
        }
        // Of the template nothing else is needed: what the join says is ours.
        let facts =
            Facts { room_id: room_id.to_owned(), version: RoomVersion::Lm02, hub: server.to_owned(), shared: false };
        let lpdu = self.sign(&facts, draft)?;
        let join = self.owed().begin(server, room_id, &draft.sender, None).await?;
        let taken = match self.peers().send(server, "join", &lpdu.lpdu_id, &lpdu.json).await {
            Ok((answer, _held)) => self.take_join(server, &lpdu, answer).await,
            Err(error) if error.may_have_taken() => Err(failed(error)),
            Err(error) => {
                self.owed().refused(join).await;
                return Err(failed(error));
            }
        };
        if let Err(refusal) = &taken {
            self.owed().owe(join, refusal, !refusal.is_transient()).await;
        }
        taken
    }

    /// Whether a hub whose template is one for graph servers takes LPDUs all the same. One that does LM alone says so in
    /// its signed keys; one that serves graphs too does not, and goes by what ours say of us.
    async fn does_logs_alone(&self, server: &ServerName) -> Result<bool, Refusal> {
        self.peers().is_linearized(server).await.map_err(KeyringError::into_refusal)
    }

    /// Checks and stores what the hub answered to a join.
    async fn take_join(&self, hub: &ServerName, lpdu: &Lpdu, mut answer: Object) -> Result<Appended, Refusal> {
        let bad = |problem: String| Refusal::Remote { server: hub.to_string(), problem };
        let (Some(Value::Object(event)), Some(Value::Array(state))) = (answer.remove("event"), answer.remove("state"))
        else {
            return Err(bad("event or state is missing in the answer to a join".to_owned()));
        };
        let state = state.into_iter().filter_map(|event| match event {
            Value::Object(event) => Some(event),
            _ => None,
        });
        let state = self.check_finished_patiently(state.collect(), Redaction::Draft).await;
        let chain = match answer.remove("auth_chain") {
            Some(Value::Array(chain)) => chain,
            _ => Vec::new(),
        };
        let chain = chain.into_iter().filter_map(|event| match event {
            Value::Object(event) => Some(event),
            _ => None,
        });
        let chain = self.check_finished_patiently(chain.collect(), Redaction::Draft).await;
        let joined = self.check_finished_patiently(vec![event], Redaction::Draft).await.pop();
        let joined = match joined {
            Some(Ok(joined)) if joined.redacted.is_none() => joined,
            Some(Ok(Finished { redacted: Some(refusal), .. })) => return Err(refusal),
            Some(Err(error)) => return Err(error.refusal().clone()),
            _ => return Err(bad("the answer to a join has no event".to_owned())),
        };
        if joined.pdu.lpdu_id.as_ref() != Some(&lpdu.lpdu_id) {
            return Err(bad(format!("{} was answered with another event, {}", lpdu.lpdu_id, joined.pdu.event_id)));
        }
        let state = without(state, &joined.pdu.event_id);
        let facts = facts_of(hub, &lpdu.room_id, &lpdu.sender, &state)?;
        let forbidden = forbidden(Claim { state: &state, chain: &chain, seen: Seen::Outside(facts.clone()) });
        for event in state.iter().flatten().map(|event| &event.pdu) {
            if let Some(refusal) = forbidden.get(&event.event_id).filter(|_| is_critical(event, &lpdu.sender)) {
                return Err(bad(format!("{} in the answer to a join: {refusal}", event.kind)));
            }
        }
        let (allowed, refused) = without_forbidden(state, &forbidden);
        let sizes = allowed.iter().flatten().map(|event| event.pdu.to_bytes().len());
        sizes.fold(Weight::default(), Weight::with).check()?;
        let known = self.rooms().find(&lpdu.room_id).await?;
        let turn = match &known {
            Some(cell) => Some(cell.intake.lock().await),
            None => None,
        };
        if known.is_some()
            && let Some(there) = self.event(&joined.pdu.event_id).await?
        {
            // The hub has sent what follows the join before its answer came, and what was missing before that is here with it.
            return Ok(there);
        }
        let batch = match &known {
            Some(cell) => Batch::new(cell.snapshot(&self.context().store).await?),
            None => Batch::of_new_room(Snapshot::empty(facts, Redaction::Draft)),
        };
        // State that the hub gives as redaction leaves it may be here as it was said: what redacted it was said while we were out.
        let chain = to_keep(&lpdu.room_id, &chain, &forbidden);
        let copies: Vec<OwnedEventId> = allowed
            .iter()
            .flatten()
            .chain(chain.iter().copied())
            .filter(|event| event.copy)
            .map(|event| event.pdu.event_id.clone())
            .collect();
        let was_out = !batch.after.has_server(&self.context().server_name);
        let mut taking = Taking::new(self, batch);
        taking.batch.keep_chain(as_stored(&chain), was_out);
        taking.adopt(allowed).await?;
        for event_id in copies {
            taking.batch.redact(event_id, joined.pdu.event_id.clone());
        }
        for (event_id, refusal) in refused {
            taking.settle(Some(Fault::Forbidden), &event_id, &refusal.to_string());
        }
        let room = &taking.batch.after;
        if room.facts.hub != *hub {
            return Err(bad(format!(
                "nothing proves that it keeps the log of {}: {} does",
                lpdu.room_id, room.facts.hub
            )));
        }
        let subject = Subject::of(&joined.pdu);
        room.judge(&subject, &room.auth_events(&subject).0)?;
        if joined.redaction != Redaction::Draft {
            taking.batch.after.redaction = joined.redaction;
        } else if taking.batch.after.says_shared() {
            // Most events are the same by both tables; what we sign is not.
            taking.batch.after.redaction = Redaction::GraphServer;
        }
        taking.append(joined.pdu);
        let committed = taking.finish(known.as_ref()).await?;
        drop(turn);
        let joined = committed.appended.into_iter().last();
        let joined = joined.ok_or_else(|| Refusal::Internal("the join was not stored".to_owned()))?;
        tracing::info!(room = %lpdu.room_id, %hub, user = %lpdu.sender, "joined a room");
        Ok(joined)
    }

    /// Leaves a room, or rejects an invite to one that the gateway is not in, through the hub.
    pub async fn leave(&self, room_id: &RoomId, user: &UserId, via: &[OwnedServerName]) -> Result<(), Refusal> {
        self.leave_because(room_id, user, via, None).await
    }

    /// The same, saying why.
    pub async fn leave_because(
        &self,
        room_id: &RoomId,
        user: &UserId,
        via: &[OwnedServerName],
        reason: Option<&str>,
    ) -> Result<(), Refusal> {
        self.is_own(user)?;
        let mut content = Object::new();
        content.insert("membership".to_owned(), json!("leave"));
        content.extend(reason.map(|reason| ("reason".to_owned(), json!(reason))));
        let draft = self.own_member(user, content);
        match self.find(room_id).await {
            Ok((_, room)) if room.has_server(&self.context().server_name) => {
                let sent = self.send(room_id, vec![Outgoing { draft, effect: None }]).await.pop();
                sent.unwrap_or_else(|| Err(Refusal::Internal("nothing was sent".to_owned()))).map(drop)
            }
            Ok(_) | Err(Refusal::UnknownRoom(_)) => self.leave_from_outside(room_id, &draft, via).await,
            Err(refusal) => Err(refusal),
        }
    }

    async fn leave_from_outside(
        &self,
        room_id: &RoomId,
        draft: &Draft,
        via: &[OwnedServerName],
    ) -> Result<(), Refusal> {
        let mut ways = self.ways(room_id, via).await;
        while let Some(server) = ways.next() {
            match self.leave_through(&server, room_id, draft, false).await {
                Ok(()) => return Ok(()),
                Err(refusal) => ways.refused(&server, refusal),
            }
        }
        Err(ways.end(&format!("{room_id} can be left")))
    }

    /// By make_leave and send_leave; some hubs know neither and take a leave like any other event. After a join that the hub has,
    /// as `has_join` says, whatever the room's version is.
    pub(super) async fn leave_through(
        &self,
        server: &ServerName,
        room_id: &RoomId,
        draft: &Draft,
        has_join: bool,
    ) -> Result<(), Refusal> {
        let failed = |error: RemoteError| as_hub(error, server);
        let made = self.peers().make(server, "leave", room_id, &draft.sender).await;
        if let Ok((made, _)) = &made
            && !has_join
        {
            is_of_a_known_version(made)?;
        }
        let facts =
            Facts { room_id: room_id.to_owned(), version: RoomVersion::Lm02, hub: server.to_owned(), shared: false };
        let lpdu = self.sign(&facts, draft)?;
        let left = match made {
            Ok(_) => self.peers().send(server, "leave", &lpdu.lpdu_id, &lpdu.json).await,
            Err(error) => Err(error),
        };
        match left {
            Ok(_) => Ok(()),
            Err(error) if error.is_unrecognized() => {
                let answer = self.peers().transact(server, &lpdu.lpdu_id, &lpdu.json).await.map_err(failed)?;
                let refused = answer.get("failed_pdus").and_then(|failed| failed.get(lpdu.lpdu_id.as_str()));
                match refused {
                    Some(why) => {
                        let why = why.get("error").and_then(Value::as_str).unwrap_or("no reason given");
                        let why: String = why.chars().take(500).collect();
                        Err(Refusal::Forbidden(format!("{server}: {why}")))
                    }
                    None => Ok(()),
                }
            }
            Err(error) => Err(failed(error)),
        }
    }

    /// Asks `server` where an LM alias leads.
    pub async fn query_directory(&self, server: &ServerName, alias: &str) -> Result<AliasTarget, Refusal> {
        self.peers().directory(server, alias).await
    }

    /// A member event that a user of ours sends about itself.
    pub(super) fn own_member(&self, user: &UserId, content: Object) -> Draft {
        Draft {
            sender: user.to_owned(),
            kind: "m.room.member".to_owned(),
            state_key: Some(user.to_string()),
            content,
            origin_server_ts: self.context().clock.now_ms(),
        }
    }

    /// Users of ours who are joined to a room.
    pub(super) fn own_members<'a>(&'a self, room: &'a Snapshot) -> impl Iterator<Item = OwnedUserId> + 'a {
        let own = &self.context().server_name;
        room.members(Membership::Join.as_str()).filter(move |user| user.server_name() == own).map(UserId::to_owned)
    }
}

enum Inside {
    Joined(Appended),
    /// The gateway is a member of the room: the hub is told by an LPDU.
    Member(Arc<RoomCell>, Arc<Snapshot>),
}

fn without(mut state: Vec<Result<Finished, Bad>>, join: &EventId) -> Vec<Result<Finished, Bad>> {
    state.retain(|event| !matches!(event, Ok(finished) if finished.pdu.event_id == *join));
    state
}

/// What the room is, as its create event says; and that it can be: the server that was asked keeps its log.
fn facts_of(
    hub: &ServerName,
    room_id: &RoomId,
    joiner: &UserId,
    state: &[Result<Finished, Bad>],
) -> Result<Facts, Refusal> {
    let bad = |problem: String| Refusal::Remote { server: hub.to_string(), problem };
    for event in state {
        // Without these nothing else can be judged.
        let critical = match event {
            Err(Bad::Forged(pdu, refusal)) if is_critical(pdu, joiner) => Some((pdu, refusal)),
            // One old ban whose sender's server is gone must not keep everybody out. The hub, which has it, goes by it.
            Err(Bad::Unproved(pdu, refusal)) if is_critical(pdu, joiner) && !is_ban(pdu) => Some((pdu, refusal)),
            _ => None,
        };
        if let Some((pdu, refusal)) = critical {
            return Err(bad(format!("{} in the answer to a join: {refusal}", pdu.kind)));
        }
    }
    let create = state.iter().flatten().map(|event| &event.pdu).find(|pdu| pdu.kind == "m.room.create");
    let create = create.ok_or_else(|| bad("no m.room.create in the answer to a join".to_owned()))?;
    if !create.auth_events.is_empty() {
        return Err(bad("m.room.create in the answer to a join names auth_events".to_owned()));
    }
    let version = create.content().get("room_version").and_then(Value::as_str).unwrap_or_default();
    let version = RoomVersion::parse(version)
        .filter(|version| version.family() == Family::Log)
        .ok_or_else(|| Refusal::IncompatibleRoomVersion(version.to_owned()))?;
    // Who made the room keeps its log, or who took it over last; that they did is proved as all state is.
    let pdus = || state.iter().flatten().map(|event| &event.pdu);
    let keeper = pdus().filter_map(Pdu::new_hub).next_back().unwrap_or(create.sender.server_name());
    if keeper != hub || create.room_id != *room_id {
        let problem = format!("the log of {}, which {} made, is kept by {keeper}", create.room_id, create.sender);
        return Err(bad(problem));
    }
    let facts = Facts { room_id: room_id.to_owned(), version, hub: hub.to_owned(), shared: false };
    Snapshot::empty(facts, Redaction::Draft).judge(&Subject::of(create), &[])?;
    Ok(Facts { room_id: room_id.to_owned(), version, hub: hub.to_owned(), shared: false })
}

/// What another server answered, as a verdict where it is one.
pub(super) fn into_refusal(error: RemoteError, server: &ServerName) -> Refusal {
    error.into_verdict(server)
}

/// What an invited server answered, for the gateway's own user who invites: a 400 with an error is a verdict too, since the same request
/// gets the same answer again.
pub(super) fn of_own_invite(error: RemoteError, server: &ServerName) -> Refusal {
    // These say what may be otherwise a moment later, or that it was the wrong endpoint, or are told in other words.
    const OTHERS: [&str; 5] = ["", "M_UNRECOGNIZED", "M_BAD_STATE", "M_LIMIT_EXCEEDED", "M_INCOMPATIBLE_ROOM_VERSION"];
    match &error {
        RemoteError::Status { status, errcode, .. }
            if *status == http::StatusCode::BAD_REQUEST && !OTHERS.contains(&errcode.as_str()) =>
        {
            passed_on(error, server)
        }
        _ => into_refusal(error, server),
    }
}

/// What a third server answered, for the server that wanted it asked: as it came where it is a verdict.
pub(super) fn passed_on(error: RemoteError, server: &ServerName) -> Refusal {
    // Of these two the asker would think that they are about its own request.
    let about_us = [http::StatusCode::UNAUTHORIZED, http::StatusCode::METHOD_NOT_ALLOWED];
    match error {
        RemoteError::Status { status, errcode, error, retry_after, .. }
            if (status.is_client_error() || status.is_server_error())
                && !about_us.contains(&status)
                && !matches!(errcode.as_str(), "" | "M_UNRECOGNIZED") =>
        {
            let retry_after_ms = retry_after.and_then(|wait| u64::try_from(wait.as_millis()).ok());
            Refusal::Declined {
                server: server.to_string(),
                status: status.as_u16(),
                errcode: errcode.into(),
                error: error.into(),
                retry_after_ms,
            }
        }
        error => into_refusal(error, server),
    }
}

#[cfg(test)]
mod tests {
    use ruma::{room_id, server_name};

    use super::*;

    #[test]
    fn what_a_hub_answers_is_told_in_one_sentence() {
        let hub = server_name!("hub.example");
        let status = |status, errcode: &str, error: &str| {
            let (errcode, error) = (errcode.to_owned(), error.to_owned());
            let error = RemoteError::Status { status, errcode, error, retry_after: None, hub_server: None };
            into_refusal(error, hub).to_string()
        };
        let unknown = "the room was not found";
        assert_eq!(
            status(http::StatusCode::NOT_FOUND, "M_NOT_FOUND", unknown),
            "what hub.example was asked for was not found"
        );
        let unknown = status(http::StatusCode::NOT_FOUND, "M_NOT_FOUND", "Unknown room");
        assert_eq!(unknown, "what hub.example was asked for (\"Unknown room\") was not found");
        let problem = "not reachable: refused".to_owned();
        let keys = KeyringError::Unreachable { server: hub.to_string(), problem }.into_refusal();
        assert_eq!(keys.to_string(), "the keys of hub.example could not be fetched: not reachable: refused");
    }

    #[test]
    fn what_comes_before_a_join_is_kept_only_from_servers_that_were_asked() {
        let (joining, room) = (Joining::default(), room_id!("!room:hub.example"));
        let (hub, evil) = (server_name!("hub.example"), server_name!("evil.example"));
        let join = joining.enter(room);
        lock(&join.asked).insert(hub.to_owned());
        assert!(!joining.keep(evil, room, &vec![Object::new(); EARLY]));
        assert!(joining.keep(hub, room, &vec![Object::new(); EARLY + 1]));
        let early = joining.leave(room, join);
        assert_eq!(early.len(), EARLY);
        assert!(early.iter().all(|(origin, _)| origin == hub));
        assert!(!joining.keep(hub, room, &[Object::new()]));
        assert!(!joining.contains(room));
    }
}
