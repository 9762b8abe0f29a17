//! A log is handed over to another server: the hub asks that server to sign the event that does it, and only then signs it itself
//! and appends it. So there is never a whole event before it is in the log, neither at the server that was asked nor, since it
//! names the end of the log, at a hub that would collect signatures. `docs/hub-transfer.md` says the rest.

use std::sync::Arc;
use std::time::Duration;

use futures::{FutureExt as _, StreamExt as _, stream};
use ruma::{OwnedEventId, OwnedServerName, RoomId, ServerName, UserId};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::actor::{Item, Job, Outcome, What, template};
use super::batch::Origin;
use super::gaps::Filled;
use super::room::{Snapshot, Subject};
use super::rooms::{RoomCell, lock};
use super::rules::HUB_EVENT;
use super::{Lm, Position};
use crate::event::{Completion, HashCheck, Object, Pdu, Redaction, redact, verify_object};
use crate::identity::Validity;
use crate::refusal::Refusal;
use crate::seam::Draft;

/// How often the event is built anew because the log has moved, before appends wait for it.
const TRIES: usize = 3;
/// How long each participant is asked, how many at once, and how many at all.
const ASK: Duration = Duration::from_secs(5);
const ASK_AT_ONCE: usize = 16;
const ASK_ALL: usize = 500;
/// How long the hub waits until the server that it gave the log says that it keeps it, and how long it leaves it alone at first.
const TAKES: Duration = Duration::from_secs(5);
const ASKS_AGAIN: Duration = Duration::from_millis(100);
/// How long the hub waits for what we lack of its log.
const CATCH_UP: Duration = Duration::from_secs(4);

/// What became of a log that was to be handed over.
#[derive(Debug, Clone, Serialize)]
pub struct HandedOver {
    /// The event that did it.
    pub event_id: OwnedEventId,
    /// Its place in the log, the last that was this gateway's to give.
    #[serde(skip)]
    pub position: Position,
    /// Whether that server has said since that it keeps the log. Until it does nobody appends: this gateway must not go away for good, though
    /// any server that has the event can give it too.
    pub taken: bool,
    /// The servers in the room of which it is not known that they know of changes of the hub.
    pub unaware: Vec<OwnedServerName>,
}

/// What this gateway says when it is asked whether it knows of changes of the hub.
#[derive(Debug, Clone, Serialize)]
pub struct Readiness {
    /// Who keeps the log, as far as is known here.
    pub hub_server: OwnedServerName,
    /// The last event of the log here.
    pub last_event_id: Option<OwnedEventId>,
    /// Whether this gateway would take the log over from the asker.
    pub accepts: bool,
    /// The events by which the log came from hub to hub, for who has missed them.
    pub changes: Vec<Value>,
}

/// The hub's part.
impl Lm {
    /// Hands the log of a room that is hubbed here over to `server`, by an event of `sender`. Where servers in the room do not show
    /// that they know what this is, only when it is to be done all the same.
    pub async fn hand_over(
        &self,
        room_id: &RoomId,
        sender: &UserId,
        server: &ServerName,
        whatever: bool,
    ) -> Result<HandedOver, Refusal> {
        if !self.context().config.hub_transfer.give {
            return Err(Refusal::Policy("`hub_transfer.give` is off".to_owned()));
        }
        let (cell, _) = self.find(room_id).await?;
        self.is_own(sender)?;
        let room = self.hubbed(room_id).await?;
        if room.facts.shared {
            return Err(Refusal::Forbidden(format!(
                "{room_id} is shared with graph servers: its log stays where it is"
            )));
        }
        let draft = hub_event(sender, server, self.context().clock.now_ms());
        // What forbids it whatever the server says.
        prepare(&room, &draft)?;
        let unaware = self.unaware(&room).await;
        if unaware.iter().any(|unaware| unaware == server) {
            let problem = "does not say that it knows of changes of the hub".to_owned();
            return Err(Refusal::Remote { server: server.to_string(), problem });
        }
        if !unaware.is_empty() && !whatever {
            let names: Vec<&str> = unaware.iter().map(|server| server.as_str()).collect();
            return Err(Refusal::Forbidden(format!(
                "these servers in the room do not show that they know of changes of the hub, and would be cut off by one: {}; \
                 it is done all the same with `force`",
                names.join(", ")
            )));
        }
        let (event_id, position) = self.ask_and_hand_over(&cell, server, &draft).await?;
        tracing::info!(room = %room_id, %server, event = %event_id, "handed the log over");
        let taken = tokio::time::timeout(TAKES, self.is_taken(room_id, server)).await.is_ok();
        Ok(HandedOver { event_id, position, taken, unaware })
    }

    /// Waits until a server says that it keeps a log.
    async fn is_taken(&self, room_id: &RoomId, server: &ServerName) {
        let mut pause = ASKS_AGAIN;
        loop {
            let answer = self.peers().ready(server, room_id).await.unwrap_or_default();
            if answer.get("hub_server").and_then(Value::as_str) == Some(server.as_str()) {
                return;
            }
            tokio::time::sleep(pause).await;
            pause = pause.saturating_mul(2);
        }
    }

    /// The other servers in a room that do not answer as those do that know of changes of the hub.
    async fn unaware(&self, room: &Snapshot) -> Vec<OwnedServerName> {
        let own = &self.context().server_name;
        let others: Vec<OwnedServerName> = room.servers().filter(|server| *server != own).cloned().collect();
        let room_id = &room.facts.room_id;
        let asked = stream::iter(others.into_iter().enumerate()).map(|(index, server)| async move {
            let knows = index < ASK_ALL
                && matches!(
                    tokio::time::timeout(ASK, self.peers().ready(&server, room_id)).await,
                    Ok(Ok(answer)) if answer.contains_key("hub_server")
                );
            (!knows).then_some(server)
        });
        let mut unaware: Vec<OwnedServerName> =
            asked.buffer_unordered(ASK_AT_ONCE).filter_map(|server| async { server }).collect().await;
        unaware.sort();
        unaware
    }

    async fn ask_and_hand_over(
        &self,
        cell: &Arc<RoomCell>,
        server: &ServerName,
        draft: &Draft,
    ) -> Result<(OwnedEventId, Position), Refusal> {
        for _ in 0..TRIES {
            let last = self.hubbed(&cell.room_id).await?.last_id().cloned();
            let what = match self.ask_next_hub(cell, server, draft).await {
                Ok(what) => what,
                // It is said about an end of the log that is its end no more.
                Err(_) if self.hubbed(&cell.room_id).await?.last_id() != last.as_ref() => continue,
                Err(refusal) => return Err(refusal),
            };
            match self.append(cell, vec![(what, Origin::default())]).await.pop() {
                Some(Outcome::Moved(_)) => {}
                Some(outcome) => return done(outcome),
                None => return Err(Refusal::Internal("no outcome".to_owned())),
            }
        }
        // Appends wait while the server signs, for a few seconds at most.
        let busy = || Refusal::Remote {
            server: server.to_string(),
            problem: "the room moves faster than the change of its hub is signed".to_owned(),
        };
        let (still, stands) = oneshot::channel();
        let (give, ready) = oneshot::channel();
        self.submit(cell, Job::Hold { still, ready }).await;
        stands.await.map_err(|_| busy())?;
        let (item, outcome) = Item::new(self.ask_next_hub(cell, server, draft).await?, Origin::default());
        give.send(item).map_err(|_| busy())?;
        done(outcome.await.map_err(|_| busy())?)
    }

    /// Builds the event on the end of the log and has the server sign it. Our own signature does not leave us before the event is in
    /// the log, or the server could show others a whole event that is not.
    async fn ask_next_hub(&self, cell: &Arc<RoomCell>, server: &ServerName, draft: &Draft) -> Result<What, Refusal> {
        let context = self.context();
        let room = self.hubbed(&cell.room_id).await?;
        let completion = prepare(&room, draft)?;
        let built = Pdu::build(template(&cell.room_id, draft), completion, &context.server_name, &context.signing_key)?;
        let mut unsigned = built.json.clone();
        unsigned.insert("signatures".to_owned(), json!({}));
        let declined = |error| super::participant::passed_on(error, server);
        let signed = self.peers().take_hub(server, &built.event_id, &unsigned).await.map_err(declined)?;
        let pdu = self.with_signature(server, &built, signed).await?;
        Ok(What::Signed { pdu: Box::new(pdu), after: room.last_id().cloned() })
    }

    /// The event with the server's signature, if that is right, and with nothing else of what came back.
    async fn with_signature(&self, server: &ServerName, built: &Pdu, mut signed: Object) -> Result<Pdu, Refusal> {
        let bad = |problem: &str| Refusal::BadSignature { entity: server.to_string(), problem: problem.to_owned() };
        let by_server = match signed.remove("signatures") {
            Some(Value::Object(mut signatures)) => signatures.remove(server.as_str()),
            _ => None,
        };
        let Some(Value::Object(by_server)) = by_server else {
            return Err(bad("it did not sign the change of the hub"));
        };
        let ids: Vec<&str> = by_server.keys().map(String::as_str).take(10).collect();
        let at = Validity::At(built.origin_server_ts);
        let keys = self.context().keyring.keys_for(server, &ids, at).await.map_err(|error| error.into_refusal())?;
        let mut json = built.json.clone();
        if let Some(all) = json.get_mut("signatures").and_then(Value::as_object_mut) {
            let known = by_server.into_iter().filter(|(id, _)| keys.contains_key(id)).collect();
            all.insert(server.to_string(), Value::Object(known));
        }
        verify_object(&redact(&json, Redaction::Draft), server.as_str(), &keys)
            .map_err(|error| bad(&format!("under the change of the hub: {error}")))?;
        Pdu::parse(json, Redaction::Draft)
    }
}

/// The part of the server that is to keep the log.
impl Lm {
    /// `GET ready`: to servers in the room only.
    pub async fn ready_for_hub(&self, origin: &ServerName, room_id: &RoomId) -> Result<Readiness, Refusal> {
        let (_, room) = self.find(room_id).await?;
        if !room.has_server(origin) {
            return Err(Refusal::UnknownRoom(room_id.to_string()));
        }
        Ok(Readiness {
            hub_server: room.facts.hub.clone(),
            last_event_id: room.last_id().cloned(),
            accepts: self.context().config.hub_transfer.accepts(origin, room_id),
            changes: self.changes(room_id, &room).await?,
        })
    }

    /// `POST hub`: the hub asks whether we keep the log from this event on. Signed, it binds us only when the hub puts it there.
    pub async fn take_hub(&self, origin: &ServerName, mut body: Object) -> Result<Value, Refusal> {
        let Some(Value::Object(event)) = body.remove("event") else {
            return Err(Refusal::malformed("event", "missing or no object"));
        };
        let mut pdu = Pdu::parse(event, Redaction::Draft)?;
        let (context, own) = (self.context(), &self.context().server_name);
        let (cell, room) = self.find(&pdu.room_id).await?;
        if room.facts.shared {
            return Err(Refusal::Forbidden(format!("{} is shared with graph servers", pdu.room_id)));
        }
        if room.facts.hub != *origin {
            let hub = room.facts.hub.to_string();
            return Err(Refusal::WrongHub { hub, found: origin.to_string() });
        }
        if !context.config.hub_transfer.accepts(origin, &pdu.room_id) {
            let problem = format!("`hub_transfer.accept` names neither {origin} nor {}", pdu.room_id);
            return Err(Refusal::Policy(problem));
        }
        if pdu.new_hub() != Some(own) {
            let problem = format!("{:?} of {:?}, which does not make {own} the hub", pdu.kind, pdu.sender);
            return Err(Refusal::malformed("event", problem));
        }
        if let HashCheck::Redact(refusal) = pdu.check_hashes() {
            return Err(refusal);
        }
        if room.redaction != Redaction::Draft {
            return Err(Refusal::Forbidden(format!("{origin} redacts its log by another table than this gateway")));
        }
        self.between().may_take_hub(&pdu.room_id).await?;
        self.has_all_before(&cell, &pdu).await?;
        // From here on nothing may come in between.
        let _turn = cell.intake.lock().await;
        let room = cell.snapshot(&context.store).await?;
        if let Some(missing) = self.missing_before(&cell, &room, &pdu).await? {
            return Err(missing);
        }
        let subject = Subject::of(&pdu);
        let (slots, expected) = room.auth_events(&subject);
        if pdu.auth_events != expected {
            let problem = format!("auth_events are {:?}, not {expected:?}", pdu.auth_events);
            return Err(Refusal::LmRule { rule: "4.2", problem });
        }
        room.judge(&subject, &slots)?;
        pdu.countersign(own, &context.signing_key);
        tracing::info!(room = %pdu.room_id, hub = %origin, event = %pdu.event_id, "agreed to keep a log");
        Ok(json!({ "event": pdu.json }))
    }

    /// Fetches what is missing before the event, for as long as the hub can wait; the rest is fetched after that.
    async fn has_all_before(&self, cell: &Arc<RoomCell>, pdu: &Pdu) -> Result<(), Refusal> {
        let room = cell.snapshot(&self.context().store).await?;
        if self.missing_before(cell, &room, pdu).await?.is_none() {
            return Ok(());
        }
        let ends = pdu.prev_events.iter().cloned().collect();
        let (lm, of) = (self.clone(), cell.clone());
        let fetching = tokio::spawn(async move { lm.take_up_to(&of, &ends).boxed().await });
        match tokio::time::timeout(CATCH_UP, fetching).await {
            Ok(Ok(Ok(Filled::Whole))) => Ok(()),
            _ => {
                let room = cell.snapshot(&self.context().store).await?;
                self.missing_before(cell, &room, pdu).await?.map_or(Ok(()), Err)
            }
        }
    }

    /// What of the log before an event is not here, of which everything is needed.
    pub(super) async fn missing_before(
        &self,
        cell: &RoomCell,
        room: &Snapshot,
        pdu: &Pdu,
    ) -> Result<Option<Refusal>, Refusal> {
        if lock(&cell.missing).is_any() {
            return Ok(Some(Refusal::Forbidden(
                "a part of the log is missing here, and is being asked for".to_owned(),
            )));
        }
        let last = room.last_id();
        let is_at_end = match &*pdu.prev_events {
            [end] => self.ends_with(room, end).await?,
            all => all.is_empty() && last.is_none(),
        };
        if is_at_end {
            return Ok(None);
        }
        let names = |ids: &[OwnedEventId]| ids.iter().map(|id| id.as_str()).collect::<Vec<_>>().join(", ");
        let (named, here) = (names(&pdu.prev_events), last.map_or("nothing", |last| last.as_str()));
        Ok(Some(Refusal::Forbidden(format!("the event follows {named}, the log here ends with {here}"))))
    }
}

fn done(outcome: Outcome) -> Result<(OwnedEventId, Position), Refusal> {
    let appended = outcome.into_result()?;
    Ok((appended.event.event_id.clone(), appended.position))
}

fn hub_event(sender: &UserId, server: &ServerName, now: i64) -> Draft {
    let mut content = Object::new();
    content.insert("hub_server".to_owned(), json!(server));
    Draft {
        sender: sender.to_owned(),
        kind: HUB_EVENT.to_owned(),
        state_key: Some(String::new()),
        content,
        origin_server_ts: now,
    }
}

/// What the hub adds to the event, if the rules allow it once the server has signed.
fn prepare(room: &Snapshot, draft: &Draft) -> Result<Completion, Refusal> {
    let subject = Subject { signed_by_next_hub: true, ..Subject::draft(draft, None) };
    let (slots, auth_events) = room.auth_events(&subject);
    room.judge(&subject, &slots)?;
    Ok(Completion { auth_events, prev_event: room.last_id().cloned() })
}
