//! What the linear side asks of the graphs of shared rooms: that participants' LPDUs, and what is said by the way of the log,
//! follow all that a graph has; and that shared rooms are made.

use async_trait::async_trait;
use ruma::{OwnedEventId, OwnedRoomId, RoomId, ServerName};

use super::accept::Source;
use super::batch::Batch;
use super::pdu::Verified;
use super::version::is_shared;
use super::{Dag, NewRoom};
use crate::event::{Family, Pdu, RoomVersion};
use crate::refusal::Refusal;
use crate::seam::{Graphs, JoinShared, LogOrigin, Membership, NewShared, Next, NextEvent};

#[async_trait]
impl Graphs for Dag {
    async fn add(&self, room_id: &RoomId, events: Vec<NextEvent>) -> Vec<Result<OwnedEventId, Refusal>> {
        let count = events.len();
        match self.try_add(room_id, events).await {
            Ok(added) => added,
            Err(refusal) => vec![Err(refusal); count],
        }
    }

    async fn build(&self, room_id: &RoomId, what: Next) -> Result<Pdu, Refusal> {
        let room = self.shared.room(room_id).await?;
        if !is_shared(room.version) {
            return Err(Refusal::IncompatibleRoomVersion(room.version.as_str().to_owned()));
        }
        let mut trial = Batch::new(self.shared.clone(), &room);
        let event = trial.next(what).await?;
        let source = Source::Linear(LogOrigin::default());
        trial.accept(event.clone(), &source, None).await?.accepted()?;
        event.pdu().to_linear()
    }

    async fn admits(&self, room_id: &RoomId, server: &ServerName) -> Result<(), Refusal> {
        let room = self.shared.room(room_id).await?;
        self.shared.check_acl(&room, server).await
    }

    fn log_was_read(&self, room_id: &RoomId) {
        let (shared, room_id) = (self.shared.clone(), room_id.to_owned());
        tokio::spawn(async move {
            match shared.find(&room_id).await {
                Ok(room) => room.iter().for_each(|room| shared.compare_with_log(room)),
                Err(error) => tracing::warn!(room = %room_id, %error, "a room was not compared with its log"),
            }
        });
    }

    async fn create(&self, room: NewShared) -> Result<OwnedRoomId, Refusal> {
        let NewShared { creator, version, initial_state } = room;
        if !is_shared(version) {
            return Err(Refusal::IncompatibleRoomVersion(version.as_str().to_owned()));
        }
        self.make_room(NewRoom { creator, version, initial_state }).await
    }

    async fn join(&self, join: JoinShared) -> Result<OwnedEventId, Refusal> {
        let JoinShared { room_id, via, user_id, content } = join;
        let mut wish = self.wish(&room_id, &user_id, Membership::Join, content)?;
        wish.versions = RoomVersion::of(Family::Log).collect();
        wish.offered_by = Some(via.clone());
        let joined = self.join_as(wish, vec![via]).await?;
        Ok(joined.join.event_id.clone())
    }
}

impl Dag {
    async fn try_add(
        &self,
        room_id: &RoomId,
        events: Vec<NextEvent>,
    ) -> Result<Vec<Result<OwnedEventId, Refusal>>, Refusal> {
        let room = self.shared.room(room_id).await?;
        if !is_shared(room.version) {
            return Err(Refusal::IncompatibleRoomVersion(room.version.as_str().to_owned()));
        }
        self.shared
            .run(&room, move |batch| {
                Box::pin(async move {
                    let mut added = Vec::with_capacity(events.len());
                    for event in events {
                        let before = batch.savepoint();
                        let result = batch.add(event).await;
                        if result.is_err() {
                            batch.roll_back(before);
                        }
                        added.push(result);
                    }
                    Ok(added)
                })
            })
            .await
    }
}

impl Batch {
    /// Puts an event after all that is there.
    async fn add(&mut self, event: NextEvent) -> Result<OwnedEventId, Refusal> {
        let NextEvent { what, origin, effect } = event;
        self.begin_to_add().await?;
        let lpdu_id = match &what {
            Next::Lpdu(lpdu) => Some(&lpdu.lpdu_id),
            Next::Finished(event) => event.lpdu_id.as_ref(),
            Next::Own(_) => None,
        };
        if let (Some(lpdu_id), Some(log)) = (lpdu_id, &self.linear.log)
            && let Some(known) = log.find_lpdu(lpdu_id).await?
        {
            return Ok(known);
        }
        let event = self.next(what).await?;
        // It may be known, when somebody asks again.
        let outcome = self.accept(event, &Source::Linear(origin), None).await?;
        let event_id = outcome.accepted()?.pdu.event_id.clone();
        if let Some(effect) = effect {
            self.add_effect(event_id.clone(), effect);
        }
        Ok(event_id)
    }

    /// The log is known from now on, and who lines it up.
    async fn begin_to_add(&mut self) -> Result<(), Refusal> {
        if self.linear.log.is_some() {
            return Ok(());
        }
        let hub = self.hub_of(&self.core.current).await?;
        self.open_log(hub).await
    }

    /// The event that is to follow all that is there, built on the newest forward extremities.
    async fn next(&mut self, what: Next) -> Result<Verified, Refusal> {
        self.begin_to_add().await?;
        let event = match what {
            Next::Lpdu(lpdu) if !self.is_hub() => {
                let hub = self.linear.hub.as_ref().map(ToString::to_string).unwrap_or_default();
                return Err(Refusal::WrongHub { hub, found: lpdu.hub_server.to_string() });
            }
            Next::Lpdu(lpdu) => self.complete(lpdu).await?,
            Next::Own(draft) => self.build(&draft).await?,
            Next::Finished(event) => Verified::own_linear(&event, self.version)?,
        };
        if event.pdu().room_id != self.room_id {
            let problem = format!("{}, expected {}", event.pdu().room_id, self.room_id);
            return Err(Refusal::malformed("room_id", problem));
        }
        Ok(event)
    }
}
