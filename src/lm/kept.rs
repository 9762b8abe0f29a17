//! What a server gives of a log that it has taken over from another: as much of its copy as is the log. A copy has what came late at
//! its end, the state that came with a join before that, and of a time outside the room nothing. Its positions never change; so what is
//! vouched for is told by what follows what, from the event on that handed the log over: up to there it was whole at the hub before.

use std::collections::HashSet;
use std::sync::Arc;

use ruma::{EventId, OwnedEventId, ServerName};

use super::Lm;
use super::back::{Back, Places, links_of};
use super::room::Snapshot;
use super::rooms::{RoomCell, stored_pdu};
use super::rules::HUB_EVENT;
use super::succession::Stays;
use crate::refusal::Refusal;
use crate::store::lm::{self as stored, EventRow};

/// How many events of a copy are read at once.
const AT_ONCE: i64 = 1_000;
/// How far before what a log is said to end with it is looked for what follows the events that stand behind that, and how many those may be.
const LOOKED_BACK: i64 = 100_000;
const BEHIND: i64 = 10_000;
/// Among how many changes of the hub the one is looked for by which we took the log over.
const CHANGES: i64 = 50;

/// What of a copy is the log, before the event by which it was handed over to us.
#[derive(Debug)]
pub(super) struct Copied {
    /// That event.
    taken: OwnedEventId,
    /// The position from which on each event follows the one before it, up to that event.
    pub ordered: i64,
    /// Where all that is before that in the log, and of our stay, stands here: in no order. Empty where some of it is missing.
    earlier: Places,
}

impl Lm {
    /// What of a copy is the log, where an event at `position` is a part of the copy: nothing where it was kept here. `until` is
    /// the last position that was kept here.
    pub(super) async fn copied(
        &self,
        cell: &RoomCell,
        room: &Snapshot,
        (until, position): (i64, i64),
    ) -> Result<Option<Arc<Copied>>, Refusal> {
        let Some(taken) = self.taken_over(room, until).await?.filter(|taken| position < taken.position) else {
            return Ok(None);
        };
        let mut known = cell.copied.lock().await;
        if let Some(copied) = known.as_ref().filter(|copied| copied.taken == taken.event_id) {
            return Ok(Some(copied.clone()));
        }
        let copied = Arc::new(self.follow_back(room, taken).await?);
        *known = Some(copied.clone());
        Ok(Some(copied))
    }

    /// Whether a log ends with an event, as far as can be told here. What stands behind it in the copy came late: something that is not behind it
    /// follows that, so in the log it is before it. And nothing follows the event itself.
    pub(super) async fn ends_with(&self, room: &Snapshot, end: &EventId) -> Result<bool, Refusal> {
        if room.last_id().is_some_and(|last| last == end) {
            return Ok(true);
        }
        let (store, room_id) = (&self.context().store, &room.facts.room_id);
        let row = stored::event(store, end).await?.filter(|row| row.room_id == *room_id);
        let Some(at) = row.map(|row| row.position).filter(|at| room.head.saturating_sub(*at) <= BEHIND) else {
            return Ok(false);
        };
        let (mut behind, mut followed) = (HashSet::new(), HashSet::new());
        for row in stored::range(store, room_id, at.saturating_add(1), room.head, BEHIND).await? {
            followed.extend(links_of(&row)?);
            behind.insert(row.event_id);
        }
        if followed.contains(end) {
            return Ok(false);
        }
        behind.retain(|id| !followed.contains(id));
        let (mut last, until) = (at, at.saturating_sub(LOOKED_BACK).max(0));
        while !behind.is_empty() && last >= until {
            let first = last.saturating_sub(AT_ONCE).saturating_add(1).max(until);
            for row in stored::range(store, room_id, first, last, AT_ONCE).await? {
                for id in links_of(&row)? {
                    behind.remove(&id);
                }
            }
            last = first.saturating_sub(1);
        }
        Ok(behind.is_empty())
    }

    /// Whether an event is given, as far as it is one of a copy.
    pub(super) async fn gives(
        &self,
        server: &ServerName,
        (cell, room): (&RoomCell, &Snapshot),
        until: i64,
        row: &EventRow,
    ) -> Result<bool, Refusal> {
        let Some(copied) = self.copied(cell, room, (until, row.position)).await? else { return Ok(true) };
        if row.position >= copied.ordered {
            return Ok(true);
        }
        let pdu = stored_pdu(row.clone(), room.redaction)?;
        // What is current came with a join, or the log has gone on from it.
        let current = pdu.state_key.as_deref().and_then(|state_key| room.state_event(&pdu.kind, state_key));
        if current.is_some_and(|current| current.event_id == pdu.event_id) {
            return Ok(true);
        }
        Ok(copied.earlier.holds(row.position) && self.sees_all(server, room).await?)
    }

    /// Up to `limit` events of the log before and with one whose position says nothing, as far as a server may have them.
    pub(super) async fn earlier(
        &self,
        server: &ServerName,
        room: &Snapshot,
        copied: &Copied,
        (from, limit): (&EventId, usize),
    ) -> Result<Vec<EventRow>, Refusal> {
        let unknown = || Refusal::NotFound(format!("event {from} in {}", room.facts.room_id));
        let store = &self.context().store;
        let last = stored::event(store, from).await?.filter(|row| copied.earlier.holds(row.position));
        let Some(last) = last.filter(|row| row.room_id == room.facts.room_id) else { return Err(unknown()) };
        if !self.sees_all(server, room).await? {
            return Err(unknown());
        }
        let mut back = Back::before(store, &last, (copied.earlier.first(), copied.ordered))?;
        let mut found = vec![last];
        while found.len() < limit
            && let Some(row) = back.step().await?
        {
            found.push(row);
        }
        found.truncate(limit);
        found.reverse();
        Ok(found)
    }

    /// The event by which we came to keep a log up to a position; none where we kept it from its beginning.
    async fn taken_over(&self, room: &Snapshot, until: i64) -> Result<Option<EventRow>, Refusal> {
        if !room.was_handed_over() {
            return Ok(None);
        }
        let (store, room_id) = (&self.context().store, &room.facts.room_id);
        let rows = stored::stood_before(store, room_id, (HUB_EVENT, ""), until.saturating_add(1), CHANGES).await?;
        for row in rows.into_iter().rev() {
            if stored_pdu(row.clone(), room.redaction)?.new_hub() == Some(&*self.context().server_name) {
                return Ok(Some(row));
            }
        }
        Ok(None)
    }

    /// Follows the log back from the event by which it was handed over, to where our stay of then began.
    async fn follow_back(&self, room: &Snapshot, taken: EventRow) -> Result<Copied, Refusal> {
        let began = self.stay_began(room, taken.position).await?;
        let (mut ordered, mut reached) = (taken.position, taken.position);
        let mut earlier = Places::default();
        let mut back = Back::before(&self.context().store, &taken, (began, taken.position))?;
        while let Some(row) = back.step().await? {
            let follows = row.position == ordered.saturating_sub(1);
            if earlier.is_empty() {
                if follows {
                    (ordered, reached) = (row.position, row.position);
                    continue;
                }
                earlier = Places::between(began, ordered);
            }
            if !earlier.insert(row.position) {
                break;
            }
            reached = row.position;
        }
        if reached != began {
            // Something was refused here, or replaced before it came: what it says of the rest is not known.
            earlier = Places::default();
        }
        Ok(Copied { taken: taken.event_id, ordered, earlier })
    }

    /// Where the stay began in which we were at a position.
    async fn stay_began(&self, room: &Snapshot, position: i64) -> Result<i64, Refusal> {
        let own = &self.context().server_name;
        let (store, mut stays) = (&self.context().store, Stays::default());
        let follow = |position, json: &[u8]| stays.follow(position, json);
        stored::members_before(store, &room.facts.room_id, &format!("%:{own}"), position, follow).await?;
        let began = stays.since(own).map_or(position, |since| since.saturating_add(1));
        let create = room.state_event("m.room.create", "");
        // Who has made the room was there before joining it.
        let is_maker = create.is_some_and(|create| create.sender.server_name() == own);
        Ok(if is_maker && began <= 1 { 0 } else { began })
    }

    /// Whether a server may have all that was ever said in a room: it is in it, and nothing was hidden from those who are.
    async fn sees_all(&self, server: &ServerName, room: &Snapshot) -> Result<bool, Refusal> {
        Ok(room.has_server(server) && self.hides_nothing(room).await?)
    }
}
