//! Invites. The hub builds the event on the end of its log, or of a shared room's graph, and has the target's server sign it; as
//! the target's server the gateway checks and signs.

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use ruma::{OwnedRoomId, OwnedServerName, RoomId, ServerName, UserId};
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::actor::{Item, Job, Outcome, What};
use super::batch::Origin;
use super::finished::{Bad, Finished};
use super::handshake::stripped_state;
use super::participant::{into_refusal, of_own_invite, passed_on};
use super::room::Snapshot;
use super::rooms::RoomCell;
use super::{Appended, Lm, Role, Sent};
use crate::event::{Family, Object, Pdu, Redaction, RoomVersion, VerifiedLpdu, redact, verify_object};
use crate::federation::{RemoteError, Underway};
use crate::identity::{Side, Validity};
use crate::refusal::Refusal;
use crate::seam::{Draft, EventEffect, Invite, Next, Outgoing, Uninvited, write_effects};

/// How often an invite is built anew because the log has moved, before appends wait for it.
const TRIES: usize = 3;
/// How long a participant waits for its invite to be signed, however often it is built: those who ask give up after 30 seconds.
const WITHIN: Duration = Duration::from_secs(25);
/// How long a target that let appends wait in vain is not waited for again.
const DISTRUST: Duration = Duration::from_secs(3600);
/// How often appends in one room may be made to wait.
const BETWEEN_HOLDS: Duration = Duration::from_secs(60);
/// How many invites of participants wait for one server at once.
const WAIT_FOR_ONE: usize = 30;
/// How many transactions of one server have ends of invites that wait for the keys of others.
const ENDS_OF_ONE: usize = 3;
/// How many events of stripped state are read.
const STRIPPED: usize = 100;

/// Which servers are waited for, and for whom appends do not wait.
pub(super) struct Invites {
    /// Invites of participants, by the server that is to sign them.
    asked: Underway,
    /// Ends of invites that wait for keys, by the server that told them.
    ended: Underway,
    distrusted: moka::future::Cache<OwnedServerName, ()>,
    held: moka::future::Cache<OwnedRoomId, ()>,
}

impl Invites {
    pub fn new() -> Self {
        let distrusted = moka::future::Cache::builder().max_capacity(10_000).time_to_live(DISTRUST);
        let held = moka::future::Cache::builder().max_capacity(10_000).time_to_live(BETWEEN_HOLDS);
        let (asked, ended) = (Underway::of(WAIT_FOR_ONE), Underway::of(ENDS_OF_ONE));
        Self { asked, ended, distrusted: distrusted.build(), held: held.build() }
    }
}

/// What an invite is made of.
#[derive(Clone)]
enum Source {
    Own(Draft),
    Lpdu(VerifiedLpdu),
}

impl From<Source> for Next {
    fn from(source: Source) -> Self {
        match source {
            Source::Own(draft) => Self::Own(draft),
            Source::Lpdu(lpdu) => Self::Lpdu(lpdu),
        }
    }
}

/// An invite that the target's server is to sign.
struct Asking {
    source: Source,
    /// How long whoever asks for it waits.
    until: Option<Instant>,
}

impl Asking {
    /// Waits for what the target's server does.
    async fn wait<T>(&self, server: &ServerName, asked: impl Future<Output = T>) -> Result<T, Refusal> {
        let late = || {
            let problem = format!("it has not signed the invite within {} s", WITHIN.as_secs());
            Refusal::Remote { server: server.to_string(), problem }
        };
        match self.until {
            None => Ok(asked.await),
            Some(until) if until <= Instant::now() => Err(late()),
            Some(until) => tokio::time::timeout_at(until, asked).await.map_err(|_| late()),
        }
    }
}

impl Lm {
    /// Invites a user of another server into a room: as hub or as a server of a shared room's graph through
    /// the target's server, which signs; as participant through the hub.
    pub async fn invite(&self, room_id: &RoomId, invite: Outgoing) -> Result<Sent, Refusal> {
        let target = target_of(&invite.draft.kind, invite.draft.state_key.as_deref(), &invite.draft.content)?;
        let (cell, room) = self.find_to_speak(room_id).await?;
        let server = target.server_name();
        let in_room = room.has_server(server) || *server == self.context().server_name;
        match self.role(&room) {
            Role::Hub | Role::GraphServer { .. } if !in_room => {
                let source = Source::Own(invite.draft);
                self.invite_through(&cell, &target, source, invite.effect).await.map(Sent::Appended)
            }
            Role::Participant { hub } if !in_room => self.invite_through_hub(&cell, room, &hub, invite).await,
            _ => {
                let sent = self.send(room_id, vec![invite]).await.pop();
                sent.unwrap_or_else(|| Err(Refusal::Internal("nothing was sent".to_owned())))
            }
        }
    }

    /// The hub asks the target's server; some hubs take invites by `send` alone.
    async fn invite_through_hub(
        &self,
        cell: &Arc<RoomCell>,
        mut room: Arc<Snapshot>,
        hub: &ServerName,
        invite: Outgoing,
    ) -> Result<Sent, Refusal> {
        self.may_send(cell, &mut room, &invite.draft).await?;
        let lpdu = self.sign(&room.facts, &invite.draft)?;
        let (version, stripped) = (room.facts.version, stripped_state(&room));
        match self.peers().invite(hub, &lpdu.lpdu_id, &lpdu.json, version, stripped).await {
            Ok(_) => {}
            Err(error) if takes_no_invites(&error) => {
                let sent = self.send_as_participant(cell, room, vec![invite]).await.pop();
                return sent.unwrap_or_else(|| Err(Refusal::Internal("nothing was sent".to_owned())));
            }
            Err(RemoteError::Status { errcode, hub_server, .. }) if errcode == "M_WRONG_SERVER" => {
                let named = hub_server.unwrap_or_else(|| hub.to_owned());
                let now = self.seek_hub_now(cell, Some(named)).await?;
                if now.facts.hub == *hub {
                    let problem = "says that it does not keep the log any more, and nothing shows who does".to_owned();
                    return Err(Refusal::Remote { server: hub.to_string(), problem });
                }
                return Box::pin(self.invite(&cell.room_id, invite)).await;
            }
            Err(error) => return Err(into_refusal(error, hub)),
        }
        // The same invite again is the same LPDU, which the hub knows: a crash before this line does no harm.
        if let Some(effect) = invite.effect {
            let lpdu_id = lpdu.lpdu_id.clone();
            let effects = [(effect, lpdu_id)];
            self.context().store.write(move |tx| Box::pin(async move { write_effects(tx, &effects).await })).await?;
        }
        Ok(Sent::Queued { lpdu_id: lpdu.lpdu_id })
    }

    /// `POST invite`, as hub (from a participant, for a third server) and as the target's server: the signed event.
    pub async fn invited(&self, origin: &ServerName, body: Object) -> Result<Value, Refusal> {
        let Some(Value::Object(event)) = body.get("event") else {
            return Err(Refusal::malformed("event", "missing or no object"));
        };
        let room_id = event.get("room_id").and_then(Value::as_str).unwrap_or_default();
        let room_id = RoomId::parse(room_id).map_err(|error| Refusal::malformed("room_id", error.to_string()))?;
        let known = match self.find(&room_id).await {
            Ok(found) => Some(found),
            Err(Refusal::UnknownRoom(_)) => None,
            Err(refusal) => return Err(refusal),
        };
        let signed = match known {
            Some((cell, room)) if self.role(&room) == Role::Hub => {
                is_version(&body, room.facts.version)?;
                self.invite_for(origin, &cell, &room, event.clone()).await?.event.json.clone()
            }
            // A participant takes us for the hub.
            Some((_, room)) if is_for_hub(event, &self.context().server_name) => {
                let (hub, found) = (room.facts.hub.to_string(), self.context().server_name.to_string());
                return Err(Refusal::WrongHub { hub, found });
            }
            // A log has one hub, which we know while we are in the room, and no other server has invites to it signed.
            Some((_, room)) if room.facts.hub != *origin && room.has_server(&self.context().server_name) => {
                let (origin, expected) = (origin.to_string(), room.facts.hub.to_string());
                return Err(Refusal::WrongOrigin { origin, expected });
            }
            _ => self.countersign(origin, &body, event.clone()).await?,
        };
        Ok(Value::Object(signed))
    }

    /// A participant's invite, at the hub.
    async fn invite_for(
        &self,
        origin: &ServerName,
        cell: &Arc<RoomCell>,
        room: &Snapshot,
        event: Object,
    ) -> Result<Appended, Refusal> {
        let lpdu = self.verify_one(origin, &room.facts, event).await?;
        let empty = Object::new();
        let content = lpdu.json.get("content").and_then(Value::as_object).unwrap_or(&empty);
        let target = target_of(&lpdu.kind, lpdu.state_key.as_deref(), content)?;
        if let Some(appended) = self.event_of_lpdu(&lpdu.lpdu_id).await? {
            return Ok(appended);
        }
        let server = target.server_name();
        if *server == self.context().server_name && !self.between().is_user(Side::Lm, &target).await? {
            // As the invited server says where another one is the hub.
            return Err(Refusal::NotFound(format!("the user {target}")));
        }
        if room.has_server(server) || *server == self.context().server_name {
            let from = Origin { foreign: true, ..Origin::default() };
            let outcome = self.append(cell, vec![(What::Lpdu(lpdu), from)]).await.pop();
            return outcome.ok_or_else(|| Refusal::Internal("no outcome".to_owned()))?.into_result();
        }
        let full = |_| Refusal::Budget { what: format!("invites that wait for {server}"), retry_after_ms: 5_000 };
        let _waiting = self.inner.invites.asked.enter(server).map_err(full)?;
        self.invite_through(cell, &target, Source::Lpdu(lpdu), None).await
    }

    /// Builds an invite on the end of the log, has the target's server sign it, and appends it if the log has not moved.
    async fn invite_through(
        &self,
        cell: &Arc<RoomCell>,
        target: &UserId,
        source: Source,
        effect: Option<EventEffect>,
    ) -> Result<Appended, Refusal> {
        // What forbids it before the target's server was asked is the inviter's fault.
        let room = cell.snapshot(&self.context().store).await?;
        let was_in = room.membership(target.as_str()) == Some("join");
        let _asking = self.context().asked.begin(&cell.room_id, target);
        let invited = self.ask_and_append(cell, target.server_name(), source, effect).await;
        let Err(Refusal::LmRule { rule, problem }) = invited else { return invited };
        let room = cell.snapshot(&self.context().store).await?;
        Err(match room.membership(target.as_str()) == Some("join") && !was_in {
            true => Refusal::Forbidden(format!("{target} has joined by now and needs no invite")),
            false => Refusal::LmRule { rule, problem },
        })
    }

    async fn ask_and_append(
        &self,
        cell: &Arc<RoomCell>,
        server: &ServerName,
        source: Source,
        mut effect: Option<EventEffect>,
    ) -> Result<Appended, Refusal> {
        let foreign = matches!(source, Source::Lpdu(_));
        let asking = Asking { source, until: foreign.then(|| Instant::now() + WITHIN) };
        for _ in 0..TRIES {
            let what = self.ask_target(cell, server, &asking).await?;
            let origin = Origin { foreign, effect: effect.take(), ..Origin::default() };
            match self.append(cell, vec![(what, origin)]).await.pop() {
                Some(Outcome::Moved(returned)) => effect = returned,
                Some(outcome) => return outcome.into_result(),
                None => return Err(Refusal::Internal("no outcome".to_owned())),
            }
        }
        self.invite_while_log_stands(cell, server, &asking, Origin { foreign, effect, ..Origin::default() }).await
    }

    async fn ask_target(&self, cell: &Arc<RoomCell>, server: &ServerName, asking: &Asking) -> Result<What, Refusal> {
        let source = &asking.source;
        let room = cell.snapshot(&self.context().store).await?;
        let mut pdu = match source {
            // The log's end is one of several that the graph may have.
            source if room.facts.shared => self.graphs()?.build(&cell.room_id, source.clone().into()).await?,
            Source::Own(draft) => self.build(&room, draft)?,
            Source::Lpdu(lpdu) => self.complete(&room, lpdu.clone())?,
        };
        let answer = asking.wait(server, self.have_signed(server, &room, &pdu)).await?;
        let signed = answer.map_err(|error| match source {
            Source::Own(_) => of_own_invite(error, server),
            // The participant is told what the target's server says.
            Source::Lpdu(_) => passed_on(error, server),
        })?;
        let by = (room.facts.redaction(), room.facts.validity(pdu.origin_server_ts));
        asking.wait(server, self.take_signature(server, &mut pdu, by, signed)).await?;
        Ok(What::Signed { pdu: Box::new(pdu), after: room.last_id().cloned() })
    }

    /// Asks a server to sign an invite of its user. One that takes part in shared rooms as a graph server may know Matrix' endpoint
    /// alone.
    pub(super) async fn have_signed(
        &self,
        server: &ServerName,
        room: &Snapshot,
        event: &Pdu,
    ) -> Result<Object, RemoteError> {
        let (version, stripped) = (room.facts.version, stripped_state(room));
        let answer = self.peers().invite(server, &event.event_id, &event.json, version, stripped.clone()).await;
        match answer {
            Err(error) if room.facts.shared && error.is_unrecognized() => {
                self.peers().invite_as_graph(server, event, version, stripped).await
            }
            answer => answer,
        }
    }

    /// Takes the target's signature, if it is right, and nothing else of what came back.
    async fn take_signature(
        &self,
        server: &ServerName,
        pdu: &mut Pdu,
        (redaction, validity): (Redaction, Validity),
        mut signed: Object,
    ) {
        let Some(Value::Object(mut signatures)) = signed.remove("signatures") else { return };
        let Some(Value::Object(by_target)) = signatures.remove(server.as_str()) else { return };
        let ids: Vec<&str> = by_target.keys().map(String::as_str).take(10).collect();
        let keyring = &self.context().keyring;
        let Ok(keys) = keyring.keys_for(server, &ids, validity).await else { return };
        let mut countersigned = pdu.json.clone();
        let all = countersigned.entry("signatures").or_insert_with(|| json!({}));
        if let Some(all) = all.as_object_mut() {
            let known = by_target.into_iter().filter(|(id, _)| keys.contains_key(id)).collect();
            all.insert(server.to_string(), Value::Object(known));
        }
        let right = verify_object(&redact(&countersigned, redaction), server.as_str(), &keys).is_ok();
        match Pdu::parse(countersigned, redaction) {
            Ok(countersigned) if right => *pdu = countersigned,
            _ => tracing::info!(%server, event = %pdu.event_id, "the invited server did not sign the invite"),
        }
    }

    /// Appends wait while the target signs, for at most five seconds.
    async fn invite_while_log_stands(
        &self,
        cell: &Arc<RoomCell>,
        server: &ServerName,
        asking: &Asking,
        origin: Origin,
    ) -> Result<Appended, Refusal> {
        let invites = &self.inner.invites;
        let busy = || Refusal::Remote {
            server: server.to_string(),
            problem: "the room moves faster than the invite is signed".to_owned(),
        };
        if invites.distrusted.contains_key(server) || invites.held.contains_key(&cell.room_id) {
            return Err(busy());
        }
        asking.wait(server, std::future::ready(())).await?;
        invites.held.insert(cell.room_id.clone(), ()).await;
        let (still, stands) = oneshot::channel();
        let (give, ready) = oneshot::channel();
        self.submit(cell, Job::Hold { still, ready }).await;
        stands.await.map_err(|_| busy())?;
        let what = match self.ask_target(cell, server, asking).await {
            Err(refusal @ (Refusal::Remote { .. } | Refusal::Declined { status: 500.., .. })) => {
                invites.distrusted.insert(server.to_owned(), ()).await;
                return Err(refusal);
            }
            answer => answer?,
        };
        let (item, outcome) = Item::new(what, origin);
        if give.send(item).is_err() {
            invites.distrusted.insert(server.to_owned(), ()).await;
            return Err(busy());
        }
        outcome.await.map_err(|_| busy())?.into_result()
    }

    /// As the target's server: checks an invite for one of our users and signs it.
    async fn countersign(&self, origin: &ServerName, body: &Object, event: Object) -> Result<Object, Refusal> {
        let version = body.get("room_version").and_then(Value::as_str);
        let version = version.ok_or_else(|| Refusal::malformed("room_version", "missing or no string"))?;
        let room_version = RoomVersion::parse(version)
            .filter(|version| version.family() == Family::Log)
            .ok_or_else(|| Refusal::IncompatibleRoomVersion(version.to_owned()))?;
        let finished = self.check_finished_patiently(vec![event], Redaction::Draft).await.pop();
        let finished = finished.ok_or_else(|| Refusal::malformed("event", "missing"))?;
        let finished = finished.map_err(|bad| bad.refusal().clone())?;
        if let Some(refusal) = finished.redacted {
            return Err(refusal);
        }
        let mut pdu = finished.pdu;
        let target = target_of(&pdu.kind, pdu.state_key.as_deref(), pdu.content())?;
        let own = &self.context().server_name;
        if target.server_name() != own {
            return Err(Refusal::NotFound(format!("user {target}")));
        }
        // The hub asks for its own users and for those of its participants.
        let asked_by = pdu.hub_server.as_deref().unwrap_or(pdu.sender.server_name());
        if asked_by != origin || pdu.sender.server_name() == own {
            return Err(Refusal::WrongOrigin { origin: origin.to_string(), expected: asked_by.to_string() });
        }
        let stripped = body.get("invite_room_state").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let stripped_state = stripped.iter().take(STRIPPED).filter_map(|event| event.as_object().cloned()).collect();
        let invite = Invite {
            side: Side::Lm,
            room_id: pdu.room_id.clone(),
            room_version: room_version.as_str().to_owned(),
            event_id: pdu.event_id.clone(),
            sender: pdu.sender.clone(),
            target,
            via: origin.to_owned(),
            content: pdu.content().clone(),
            stripped_state,
        };
        self.between().invited(invite).await?;
        pdu.countersign(own, &self.context().signing_key);
        Ok(pdu.json)
    }
}

/// Whether an event is a participant's, for the hub, and names this server as that.
fn is_for_hub(event: &Object, own: &ServerName) -> bool {
    event.get("hub_server").and_then(Value::as_str) == Some(own.as_str()) && !event.contains_key("prev_events")
}

impl Lm {
    /// Finished events of a room that the gateway is not in: perhaps somebody takes an invite of one of its users back. The room's hub
    /// has signed it, if it is the server that asked for the invite, which is for the bridge to see. What waits for the keys of others is
    /// looked at when they are there: the hub, which has more to say and of other rooms, does not wait for that.
    pub(super) async fn outside_events(
        &self,
        origin: &ServerName,
        room_id: &RoomId,
        mut objects: Vec<Object>,
    ) -> Result<(), Refusal> {
        if self.between().invited_into(room_id) != Some(Side::Lm) {
            return Ok(());
        }
        let own = &self.context().server_name;
        objects.retain(|object| may_end_invite(object, own));
        let mut late = Vec::new();
        for finished in self.check_finished(objects, Redaction::Draft).await {
            match finished {
                Ok(finished) => self.ends_invite(origin, room_id, &finished).await?,
                Err(Bad::Unproved(pdu, _)) => late.push(pdu.json),
                Err(_) => {}
            }
        }
        if late.is_empty() {
            return Ok(());
        }
        let Ok(turn) = self.inner.invites.ended.enter(origin) else {
            tracing::warn!(room = %room_id, %origin, "too much waits for keys: the end of an invite is not looked at");
            return Ok(());
        };
        let (lm, origin, room_id) = (self.clone(), origin.to_owned(), room_id.to_owned());
        tokio::spawn(async move {
            let _turn = turn;
            for finished in lm.check_finished_patiently(late, Redaction::Draft).await.into_iter().flatten() {
                if let Err(refusal) = lm.ends_invite(&origin, &room_id, &finished).await {
                    tracing::warn!(room = %room_id, %refusal, "the end of an invite was not noted");
                }
            }
        });
        Ok(())
    }

    async fn ends_invite(&self, origin: &ServerName, room_id: &RoomId, finished: &Finished) -> Result<(), Refusal> {
        let pdu = &finished.pdu;
        let hub = pdu.hub_server.as_deref().unwrap_or(pdu.sender.server_name());
        if finished.redacted.is_some() || pdu.kind != "m.room.member" || hub != origin || pdu.room_id != *room_id {
            return Ok(());
        }
        let said = (room_id, &*pdu.sender, pdu.state_key.as_deref(), pdu.content());
        match Uninvited::of(Side::Lm, origin, &self.context().server_name, said) {
            Some(ended) => self.between().uninvited(ended).await,
            None => Ok(()),
        }
    }
}

/// Whether an event, as it came, says something of a membership of this server's: nobody is asked for the keys of others.
fn may_end_invite(event: &Object, own: &ServerName) -> bool {
    let text = |key: &str| event.get(key).and_then(Value::as_str);
    let target = text("state_key").and_then(|user| <&UserId>::try_from(user).ok());
    text("type") == Some("m.room.member") && target.is_some_and(|user| user.server_name() == own)
}

/// The inviter knows in which version the room is, and says it.
fn is_version(body: &Object, version: RoomVersion) -> Result<(), Refusal> {
    match body.get("room_version") {
        Some(Value::String(named)) if named == version.as_str() => Ok(()),
        Some(Value::String(named)) => {
            tracing::info!(named, room_has = version.as_str(), "an invite names another room version");
            Err(Refusal::IncompatibleRoomVersion(version.as_str().to_owned()))
        }
        _ => Err(Refusal::malformed("room_version", "missing or no string")),
    }
}

/// Whether a hub would have a participant's invite sent like any other event. There are hubs that answer every other one
/// as if they themselves were the invited server, with 400. What the invited server has said is another thing.
fn takes_no_invites(error: &RemoteError) -> bool {
    let verdicts = ["M_INCOMPATIBLE_ROOM_VERSION", "M_WRONG_SERVER", "M_FORBIDDEN", "M_NOT_FOUND", "M_LIMIT_EXCEEDED"];
    let is_no_verdict = |errcode: &String| !verdicts.contains(&errcode.as_str());
    error.is_unrecognized()
        || matches!(error, RemoteError::Status { status, errcode, .. }
            if *status == StatusCode::BAD_REQUEST && is_no_verdict(errcode))
}

/// The user whom an event invites.
fn target_of(kind: &str, state_key: Option<&str>, content: &Object) -> Result<ruma::OwnedUserId, Refusal> {
    let membership = content.get("membership").and_then(Value::as_str);
    if kind != "m.room.member" || membership != Some("invite") {
        let membership = membership.map_or_else(|| "no membership".to_owned(), |found| format!("membership {found:?}"));
        return Err(Refusal::malformed("event", format!("{kind:?} with {membership}, not an invite")));
    }
    let target = state_key.unwrap_or_default();
    UserId::parse(target).map_err(|error| Refusal::malformed("state_key", format!("{target:?}: {error}")))
}
