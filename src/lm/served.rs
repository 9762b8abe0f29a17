//! What other servers read of the rooms that are hubbed here. A server sees a room while it has a joined user there, and
//! up to the event that ended that when it had one; to all others, also those with an invite alone, the room and its events do
//! not exist, unless all the world may read it. What it sees without
//! its contents says [`super::visibility`]; state is always seen whole.

use std::sync::Arc;

use ruma::{EventId, RoomId, ServerName};
use serde_json::{Value, json};

use super::room::Snapshot;
use super::rooms::RoomCell;
use super::rules::HUB_EVENT;
use super::visibility::is_world_readable;
use super::{Lm, Role};
use crate::refusal::Refusal;
use crate::store::lm::{self as stored, EventRow};

/// How many events one backfill answers with at most.
const BACKFILL: i64 = 100;

/// How far a server sees a log.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reach {
    /// The last position that it sees at all; −1 when it sees nothing.
    pub until: i64,
    /// The last position that it sees because of its users; what comes after that, all the world sees.
    pub as_member: i64,
}

/// A room that is kept here, or was, and what a server sees of it.
struct Seen {
    cell: Arc<RoomCell>,
    room: Arc<Snapshot>,
    /// The last position that was kept here.
    kept: i64,
    reach: Reach,
}

impl Reach {
    /// The same, no further than a log was kept here.
    fn within(self, kept: i64) -> Self {
        Self { until: self.until.min(kept), ..self }
    }
}

impl Lm {
    /// `GET event`
    pub async fn get_event(&self, origin: &ServerName, event_id: &EventId) -> Result<Value, Refusal> {
        let unknown = || Refusal::NotFound(format!("event {event_id}"));
        let Some(row) = stored::event(&self.context().store, event_id).await? else {
            return self.outside_event(origin, event_id).await?.ok_or_else(unknown);
        };
        let (cell, room) = self.find(&row.room_id).await?;
        if room.facts.hub == *origin && !room.facts.shared && room.state_event(HUB_EVENT, "").is_none() {
            // Its log is no secret to who has always kept it, and sees what of it is here, and how.
            return self.as_read(&room, vec![row]).await?.first().map_or_else(|| Err(unknown()), to_value);
        }
        let kept = self.kept_until(&room).await?;
        let reach = self.reach(origin, &room).await?.within(kept);
        match row.position <= reach.until && self.gives(origin, (&cell, &room), kept, &row).await? {
            true => self.as_seen_by(origin, reach, &room, vec![row]).await?.pop().ok_or_else(unknown),
            false => Err(unknown()),
        }
    }

    /// An event that is in no place of the log and allows the state of one that is kept here, for those who read the room now: state
    /// is never hidden from them.
    async fn outside_event(&self, origin: &ServerName, event_id: &EventId) -> Result<Option<Value>, Refusal> {
        let Some(row) = stored::chain_event(&self.context().store, event_id).await? else { return Ok(None) };
        let (_, room) = self.find(&row.room_id).await?;
        self.admits(&room.facts, origin).await?;
        let reads = room.has_server(origin) || is_world_readable(&room);
        if !reads || self.kept_until(&room).await? < 0 {
            return Ok(None);
        }
        self.as_read(&room, vec![row]).await?.first().map(to_value).transpose()
    }

    /// `GET state`, and `state_ids` when `ids` is set.
    pub async fn get_state(
        &self,
        origin: &ServerName,
        room_id: &RoomId,
        event_id: Option<&EventId>,
        ids: bool,
    ) -> Result<Value, Refusal> {
        if event_id.is_none() {
            // What is current only the hub can say.
            self.hubbed(room_id).await?;
        }
        let Seen { cell, room, kept, reach: Reach { until, .. } } = self.kept_and_seen(origin, room_id).await?;
        let at = match event_id {
            Some(event_id) => self.position_of(&room, event_id, until).await?,
            None => until.saturating_add(1),
        };
        if let Some(event_id) = event_id
            && self.copied(&cell, &room, (kept, at)).await?.is_some_and(|copied| at < copied.ordered)
        {
            // What was before it does not all stand before it here.
            return Err(Refusal::NotFound(format!("the state before {event_id} in {room_id}")));
        }
        self.context().large.build(origin, self.state_at(&room, at, ids)).await
    }

    async fn state_at(&self, room: &Snapshot, at: i64, ids: bool) -> Result<Value, Refusal> {
        let state = stored::state_before(&self.context().store, &room.facts.room_id, at).await?;
        let chain = self.auth_chain(&state).await?;
        if ids {
            let (state, chain) = (to_ids(&state), to_ids(&chain));
            // The draft's name and the one that peers write.
            return Ok(json!({ "pdu_ids": state, "pdus_ids": state, "auth_chain_ids": chain }));
        }
        let (state, chain) = (self.as_read(room, state).await?, self.as_read(room, chain).await?);
        Ok(json!({ "pdus": to_values(&state)?, "auth_chain": to_values(&chain)? }))
    }

    /// `GET backfill`
    pub async fn backfill(
        &self,
        origin: &ServerName,
        room_id: &RoomId,
        from: &EventId,
        limit: i64,
    ) -> Result<Value, Refusal> {
        let seen = self.kept_and_seen(origin, room_id).await;
        let Seen { cell, room, kept, reach } = seen.map_err(|refusal| match refusal {
            // That another server keeps the log is said by the endpoints for which the draft has it.
            Refusal::WrongHub { .. } => Refusal::UnknownRoom(room_id.to_string()),
            refusal => refusal,
        })?;
        let last = self.position_of(&room, from, reach.until).await?;
        let limit = limit.clamp(0, BACKFILL);
        let first = last.saturating_sub(limit).saturating_add(1).max(0);
        let rows = match self.copied(&cell, &room, (kept, first)).await? {
            Some(copied) if last < copied.ordered => {
                let limit = usize::try_from(limit).unwrap_or_default();
                self.earlier(origin, &room, &copied, (from, limit)).await?
            }
            copied => {
                let first = copied.map_or(first, |copied| first.max(copied.ordered));
                stored::range(&self.context().store, room_id, first, last, limit).await?
            }
        };
        Ok(json!({ "pdus": self.as_seen_by(origin, reach, &room, rows).await? }))
    }

    /// A room that is hubbed here, or was until another server took its log over, and what of it `origin` sees.
    async fn kept_and_seen(&self, origin: &ServerName, room_id: &RoomId) -> Result<Seen, Refusal> {
        let (cell, room) = self.find(room_id).await?;
        let kept = self.kept_until(&room).await?;
        if kept < 0 {
            self.hubbed(room_id).await?;
        }
        match self.reach(origin, &room).await?.within(kept) {
            reach if reach.until >= 0 => Ok(Seen { cell, room, kept, reach }),
            _ => Err(Refusal::UnknownRoom(room_id.to_string())),
        }
    }

    /// Up to which position this gateway kept a log: to its end, or to the event that handed it over, up to which others may still
    /// be fetching it here. −1 where it never did, or where the log went on to a third server.
    async fn kept_until(&self, room: &Snapshot) -> Result<i64, Refusal> {
        if self.role(room) == Role::Hub {
            return Ok(room.head);
        }
        let own = &self.context().server_name;
        let given = room.state_event(HUB_EVENT, "").filter(|event| event.sender.server_name() == own);
        let Some(given) = given.filter(|event| event.new_hub().is_some()) else { return Ok(-1) };
        let row = stored::event(&self.context().store, &given.event_id).await?;
        Ok(row.map_or(-1, |row| row.position))
    }

    /// A room that is hubbed here.
    pub(super) async fn hubbed(&self, room_id: &RoomId) -> Result<Snapshot, Refusal> {
        let (_, room) = self.find(room_id).await?;
        match self.role(&room) {
            Role::Hub => Ok((*room).clone()),
            Role::Participant { hub } | Role::GraphServer { hub } => {
                Err(Refusal::WrongHub { hub: hub.to_string(), found: self.context().server_name.to_string() })
            }
        }
    }

    async fn reach(&self, server: &ServerName, room: &Snapshot) -> Result<Reach, Refusal> {
        self.admits(&room.facts, server).await?;
        if room.has_server(server) {
            return Ok(Reach { until: room.head, as_member: room.head });
        }
        let stays = stored::stays(&self.context().store, &room.facts.room_id, server).await?;
        let as_member = stays.into_iter().filter_map(|stay| stay.until).max().unwrap_or(-1);
        let until = if is_world_readable(room) { room.head } else { as_member };
        Ok(Reach { until, as_member })
    }

    async fn position_of(&self, room: &Snapshot, event_id: &EventId, until: i64) -> Result<i64, Refusal> {
        let row = stored::event(&self.context().store, event_id).await?;
        match row {
            Some(row) if row.room_id == room.facts.room_id && row.position <= until => Ok(row.position),
            _ => Err(Refusal::NotFound(format!("event {event_id} in {}", room.facts.room_id))),
        }
    }
}

pub(super) fn to_value(event: &EventRow) -> Result<Value, Refusal> {
    serde_json::from_slice(&event.json).map_err(|error| Refusal::Internal(error.to_string()))
}

pub(super) fn to_values(events: &[EventRow]) -> Result<Vec<Value>, Refusal> {
    events.iter().map(to_value).collect()
}

fn to_ids(events: &[EventRow]) -> Vec<&EventId> {
    events.iter().map(|event| &*event.event_id).collect()
}
