//! Telling servers outside a room, as its hub, what was said there about their users: the log does not. Of an invite that a
//! participant has sent like any event, and of the end of an invite or a knock. What could not be told is told later, across
//! restarts, for a day; whatever comes of it, the event stands.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::future::join_all;
use ruma::{EventId, OwnedServerName, RoomId, ServerName, UserId};

use super::actor::{Outcome, What};
use super::batch::Origin;
use super::gaps::is_verdict;
use super::room::Snapshot;
use super::rooms::{RoomCell, lock};
use super::{Lm, Role};
use crate::event::{Object, Pdu};
use crate::federation::RemoteError;
use crate::identity::KeyringError;
use crate::refusal::Refusal;
use crate::seam::{Errands, EventEffect, Runner, again};
use crate::store::lm::{self as stored, Outsider, Tell, TellLimits};
use crate::store::{Store, StoreError, Tx};

/// How many servers are told at once. Participants choose whom they invite, and how often.
const AT_ONCE: i64 = 32;
/// Of how many events one server is still to be told at most, of how many of one server's users others are, and how many in all.
const WAITING: TellLimits = TellLimits { to: 100, by: 500, all: 10_000 };
/// How long a server that could not be told is left alone after that, though it is heard of.
const HEARD: Duration = Duration::from_secs(2);

/// Who tells servers.
#[derive(Default)]
pub(super) struct Tells {
    errands: Errands,
    /// Servers that could not be told, and when it was tried last.
    away: Mutex<HashMap<OwnedServerName, Instant>>,
}

/// A member event about a user of a server that is not in the room.
struct Outside<'a> {
    user: &'a UserId,
    server: &'a ServerName,
    /// Whether it is an invite; otherwise the end of one, or of a knock.
    invites: bool,
}

impl Outside<'_> {
    fn outsider(&self, sender: &UserId) -> Outsider {
        Outsider { server: self.server.to_owned(), by: sender.server_name().to_owned() }
    }
}

impl Lm {
    /// Appends events of which servers outside the room may have to be told. That they are to be is written with them, where
    /// nothing else is.
    pub(super) async fn append_and_tell(&self, cell: &Arc<RoomCell>, mut events: Vec<(What, Origin)>) -> Vec<Outcome> {
        let Ok(room) = cell.snapshot(&self.context().store).await else { return self.append(cell, events).await };
        let mut afterwards = Vec::new();
        let mut any = false;
        for (place, (what, origin)) in events.iter_mut().enumerate() {
            let Some(outsider) = self.outside(&room, what) else { continue };
            any = true;
            if origin.effect.is_some() {
                afterwards.push((place, outsider));
                continue;
            }
            let (ids, now, room_id) = (self.context().store.clone(), self.now(), cell.room_id.clone());
            origin.effect = Some(EventEffect::new(move |tx, event_id| {
                Box::pin(async move { keep(tx, (ids.next_id(), now), &outsider, (&room_id, &event_id)).await })
            }));
        }
        let outcomes = self.append(cell, events).await;
        for (place, outsider) in afterwards {
            let Some(Outcome::Appended(appended)) = outcomes.get(place) else { continue };
            if appended.position.0 <= room.head {
                continue;
            }
            let (ids, now) = (self.context().store.clone(), self.now());
            let (room_id, event_id) = (cell.room_id.clone(), appended.event.event_id.clone());
            let kept = self.context().store.write(move |tx| {
                Box::pin(async move { keep(tx, (ids.next_id(), now), &outsider, (&room_id, &event_id)).await })
            });
            if let Err(error) = kept.await {
                tracing::warn!(room = %cell.room_id, %error, "a server outside the room is not told of its user");
            }
        }
        if any {
            self.tell_soon();
        }
        outcomes
    }

    /// The server outside the room that is to be told of an event.
    fn outside(&self, room: &Snapshot, what: &What) -> Option<Outsider> {
        let (sender, kind, state_key, content) = match what {
            What::Lpdu(lpdu) => (&lpdu.sender, &lpdu.kind, &lpdu.state_key, lpdu.json.get("content")?.as_object()?),
            What::Own(draft) => (&draft.sender, &draft.kind, &draft.state_key, &draft.content),
            // Its server was asked.
            What::Signed { .. } => return None,
        };
        let found = outside(sender, kind, state_key.as_deref(), content)?;
        self.is_to_hear(room, &found).then(|| found.outsider(sender))
    }

    /// The same of an event that came to a shared room by its graph. Its hub tells whatever came so; elsewhere each server tells
    /// what its own users do.
    pub(super) fn outside_of_graph(&self, room: &Snapshot, event: &Pdu) -> Option<Outsider> {
        if self.role(room) != Role::Hub && *event.sender.server_name() != self.context().server_name {
            return None;
        }
        let found = outside(&event.sender, &event.kind, event.state_key.as_deref(), event.content())?;
        // The server of an invited user was asked where it has signed.
        let has_signed = || event.json.get("signatures").is_some_and(|by| by.get(found.server.as_str()).is_some());
        let is_to_hear = self.is_to_hear(room, &found) && !(found.invites && has_signed());
        is_to_hear.then(|| found.outsider(&event.sender))
    }

    fn is_to_hear(&self, room: &Snapshot, found: &Outside<'_>) -> bool {
        let is_outside = !room.has_server(found.server) && *found.server != self.context().server_name;
        let waits = || matches!(room.membership(found.user.as_str()), Some("invite" | "knock"));
        is_outside && (found.invites || waits())
    }

    /// Inside a write job: a server outside is to be told of an event.
    pub(super) async fn keep_tell(
        &self,
        tx: &mut Tx,
        outsider: &Outsider,
        room_id: &RoomId,
        event_id: &EventId,
    ) -> Result<(), StoreError> {
        keep(tx, (self.context().store.next_id(), self.now()), outsider, (room_id, event_id)).await
    }

    fn now(&self) -> i64 {
        self.context().clock.now_ms()
    }

    /// There may be something to tell.
    pub(super) fn tell_soon(&self) {
        let inner = Arc::downgrade(&self.inner);
        self.inner.tells.errands.run_soon(move || inner.upgrade().map(|inner| Telling(Self { inner })));
    }

    /// A server was heard of: what it is to be told need not wait.
    pub fn heard_of(&self, server: &ServerName) {
        let pause = self.looks().pace(HEARD);
        {
            let mut away = lock(&self.inner.tells.away);
            if away.get(server).is_none_or(|tried| tried.elapsed() < pause) {
                return;
            }
            away.remove(server);
        }
        let (lm, server) = (self.clone(), server.to_owned());
        tokio::spawn(async move {
            let store = &lm.context().store;
            match store.write(move |tx| Box::pin(async move { stored::hasten_tells_to(tx, &server).await })).await {
                Ok(()) => lm.tell_soon(),
                Err(error) => tracing::warn!(%error, "a server outside that is back is told later"),
            }
        });
    }

    /// Goes on with what was not told before the last stop.
    pub(super) async fn resume_tells(&self) -> Result<(), Refusal> {
        self.context().store.write(|tx| Box::pin(async move { stored::hasten_tells(tx).await })).await?;
        self.tell_soon();
        Ok(())
    }

    /// Tells what is due. How long nothing more is; none when nothing is left.
    async fn tell_due(&self) -> Result<Option<Duration>, StoreError> {
        let store = &self.context().store;
        loop {
            let due = stored::tells_due(store, self.now(), AT_ONCE).await?;
            if due.is_empty() {
                let next = stored::next_tell(store).await?;
                let left = |next: i64| u64::try_from(next.saturating_sub(self.now())).unwrap_or(0);
                return Ok(next.map(|next| Duration::from_millis(left(next))));
            }
            for told in join_all(due.into_iter().map(|tell| self.tell_one(tell))).await {
                told?;
            }
        }
    }

    async fn tell_one(&self, tell: Tell) -> Result<(), StoreError> {
        let Tell { seq, server, room_id, event_id, made_ts, tries } = tell;
        let now = self.now();
        let next = match self.tell(&server, &room_id, &event_id).await {
            Ok(()) => None,
            Err(refusal) => {
                tracing::info!(room = %room_id, %server, event = %event_id, tries, %refusal, "a server outside is not told yet");
                again(made_ts, tries, now).map(|pause| {
                    let pause = self.looks().pace(pause);
                    now.saturating_add(i64::try_from(pause.as_millis()).unwrap_or(i64::MAX))
                })
            }
        };
        let write = self.context().store.write(move |tx| {
            Box::pin(async move {
                match next {
                    Some(next) => stored::put_off_tell(tx, seq, next).await,
                    None => stored::forget_tell(tx, seq).await,
                }
            })
        });
        write.await?;
        let mut away = lock(&self.inner.tells.away);
        match next {
            Some(_) => drop(away.insert(server, Instant::now())),
            None => drop(away.remove(&server)),
        }
        Ok(())
    }

    /// Tells a server of an event, if that is still so: its answer, whatever it is, ends it.
    async fn tell(&self, server: &ServerName, room_id: &RoomId, event_id: &EventId) -> Result<(), Refusal> {
        let room = match self.find(room_id).await {
            Ok((_, room)) => room,
            Err(Refusal::UnknownRoom(_)) => return Ok(()),
            Err(refusal) => return Err(refusal),
        };
        if matches!(self.role(&room), Role::Participant { .. }) || room.has_server(server) {
            return Ok(());
        }
        let Some(appended) = self.event(event_id).await? else { return Ok(()) };
        let event = &appended.event;
        let found = outside(&event.sender, &event.kind, event.state_key.as_deref(), event.content());
        let target = event.state_key.as_deref().unwrap_or_default();
        let is_so = room.state_event("m.room.member", target).is_some_and(|now| now.event_id == *event_id);
        let Some(found) = found.filter(|_| is_so) else { return Ok(()) };
        let told = match found.invites {
            true => self.have_signed(server, &room, event).await.map(drop),
            false => self.tell_of_end(server, &room, event).await?,
        };
        match told {
            Ok(()) => Ok(()),
            Err(error) if ends(&error) => {
                tracing::info!(room = %room_id, %server, event = %event_id, %error, "a server outside does not want to know");
                Ok(())
            }
            Err(error) => Err(error.into_refusal(server)),
        }
    }
}

impl Lm {
    /// Tells that an invite or a knock has ended. By which protocol a server that takes part in graphs has heard of it is not
    /// known: it is told by both.
    async fn tell_of_end(
        &self,
        server: &ServerName,
        room: &Snapshot,
        event: &Pdu,
    ) -> Result<Result<(), RemoteError>, Refusal> {
        let knows_graphs = match room.facts.shared {
            true => !self.peers().is_linearized(server).await.map_err(KeyringError::into_refusal)?,
            false => false,
        };
        let by_log = self.peers().transact(server, &event.event_id, &event.json).await.map(drop);
        match &by_log {
            Err(error) if knows_graphs && !ends(error) => Ok(by_log),
            _ if knows_graphs => {
                let (own, now) = (&self.context().server_name, self.now());
                Ok(self.peers().transact_as_graph(server, own, now, event).await.map(drop))
            }
            _ => Ok(by_log),
        }
    }
}

async fn keep(tx: &mut Tx, at: (i64, i64), outsider: &Outsider, what: (&RoomId, &EventId)) -> Result<(), StoreError> {
    if !stored::keep_tell(tx, at, outsider, what, WAITING).await? {
        let Outsider { server, by } = outsider;
        tracing::warn!(room = %what.0, %server, %by, "a server outside the room is not told: too many are to be already");
    }
    Ok(())
}

/// Whether an answer is about what was told, and not about the moment.
fn ends(error: &RemoteError) -> bool {
    let fails = matches!(error, RemoteError::Status { status, .. } if status.is_server_error());
    is_verdict(error) && !fails
}

fn outside<'a>(sender: &UserId, kind: &str, state_key: Option<&'a str>, content: &Object) -> Option<Outside<'a>> {
    let target = <&UserId>::try_from(state_key?).ok().filter(|_| kind == "m.room.member")?;
    let invites = match content.get("membership")?.as_str()? {
        "invite" => true,
        "leave" | "ban" if target != sender => false,
        _ => return None,
    };
    Some(Outside { user: target, server: target.server_name(), invites })
}

/// What servers are to be told.
struct Telling(Lm);

#[async_trait]
impl Runner for Telling {
    fn errands(&self) -> &Errands {
        &self.0.inner.tells.errands
    }

    fn store(&self) -> &Store {
        &self.0.context().store
    }

    async fn run_due(&self) -> Result<Option<Duration>, StoreError> {
        self.0.tell_due().await
    }
}
