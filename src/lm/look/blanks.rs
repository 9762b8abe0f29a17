//! Events that came as redaction leaves them: when all of the log is here, so is what redacts them, or the hub has rewritten them.
//! That is said of a hub only where nothing else can be so: what is missing here, what another hub kept, and what was redacted when
//! we were not in the room proves nothing.

use std::sync::Arc;

use ruma::{EventId, RoomId};

use super::{Certainty, Looked, QUIET, millis_of};
use crate::event::Pdu;
use crate::lm::Lm;
use crate::lm::intake::Taking;
use crate::lm::rooms::{RoomCell, lock};
use crate::refusal::Refusal;
use crate::store::lm::{self as stored, Fault};

/// How many of a room are asked about at once.
const AT_ONCE: i64 = 500;
/// How often the pause is doubled after which a hub is looked at again of whose log too little is known.
const DOUBLED: u32 = 4;
/// By how many of our users it is found out since when we are in a room.
const MEMBERS: usize = 50;

impl Looked {
    /// Up to when events without content must have come, so that a hub that does not tell its log's end has shown by now what
    /// redacts them: something came after them, and nothing for long after that. That nothing comes at all may have other reasons.
    fn silent_after(&self, now: i64, quiet: i64) -> Option<i64> {
        let last = self.heard_ts.max(self.came_ts);
        (now.saturating_sub(last) >= quiet).then(|| self.came_ts.saturating_sub(1))
    }
}

impl Lm {
    /// Something came without its content: what redacts it is in the hub's log, and is to be here when all of that is.
    pub(in crate::lm) fn saw_blanks(&self, room_id: &RoomId) {
        lock(&self.looks().rooms).entry(room_id.to_owned()).or_default().has_blanks = true;
        self.ask_after(room_id, super::SETTLED);
    }

    /// Something came of a room that has some, or whose hub does not show that we have left: where nobody looks at it any more, it is
    /// looked at when it has been quiet.
    pub(super) fn look_when_quiet(&self, room_id: &RoomId) {
        let waits = |room: &Looked| (room.has_blanks || room.fruitless > 0) && room.ask_at.is_none();
        if lock(&self.looks().rooms).get(room_id).is_some_and(waits) {
            self.ask_after(room_id, QUIET);
        }
    }

    /// Asks about those that came before a look began, by which it is known how much of the log is here.
    pub(super) async fn ask_about_blanks(
        &self,
        cell: &Arc<RoomCell>,
        certainty: Certainty,
        began: i64,
    ) -> Result<(), Refusal> {
        let (store, room_id) = (&self.context().store, &cell.room_id);
        if stored::blanks(store, room_id, i64::MAX, 1).await?.is_empty() {
            self.no_blanks(room_id);
            return Ok(());
        }
        let _turn = cell.intake.lock().await;
        // Of what something redacts nothing is asked, however much of the log is here.
        let room = room_id.clone();
        let forget = store.write(move |tx| Box::pin(async move { stored::forget_named_blanks(tx, &room).await }));
        forget.await?;
        let until = {
            let quiet = millis_of(self.looks().pace(QUIET));
            let mut rooms = lock(&self.looks().rooms);
            let looked = rooms.entry(room_id.clone()).or_default();
            match certainty {
                Certainty::Whole => Some(began),
                Certainty::SilentSince(_) => looked.silent_after(began, quiet),
                Certainty::Partial => None,
            }
        };
        // Of a log with holes, filled over or not, nobody knows what else is in it.
        let until = match stored::next_try(store, room_id).await? {
            None => until,
            Some(_) => None,
        };
        if let Some(until) = until {
            self.accuse_of_blanks(cell, until).await?;
        }
        if stored::blanks(store, room_id, i64::MAX, 1).await?.is_empty() {
            self.no_blanks(room_id);
            return Ok(());
        }
        // Where the hub is silent since they came, there is nothing to look for before it says something.
        let again = {
            let mut rooms = lock(&self.looks().rooms);
            let looked = rooms.entry(room_id.clone()).or_default();
            looked.has_blanks = true;
            let is_silent = matches!(certainty, Certainty::SilentSince(_)) && until.is_some();
            let doubled = looked.doubled;
            looked.doubled = doubled.saturating_add(1).min(DOUBLED);
            (!is_silent).then(|| QUIET.saturating_mul(1 << doubled))
        };
        if let Some(again) = again {
            self.ask_after(room_id, again);
        }
        Ok(())
    }

    fn no_blanks(&self, room_id: &RoomId) {
        if let Some(looked) = lock(&self.looks().rooms).get_mut(room_id) {
            (looked.has_blanks, looked.doubled) = (false, 0);
        }
    }

    /// Nothing redacts those that came up to a time. The caller has the room's intake.
    async fn accuse_of_blanks(&self, cell: &Arc<RoomCell>, until: i64) -> Result<(), Refusal> {
        let store = &self.context().store;
        loop {
            let rewritten = stored::blanks(store, &cell.room_id, until, AT_ONCE).await?;
            if rewritten.is_empty() {
                return Ok(());
            }
            let mut taking = Taking::begin(self, cell, cell.snapshot(store).await?).await?;
            taking.looks = true;
            for (event_id, sender) in &rewritten {
                let problem = format!("came without what {sender} said in it, and nothing in the log redacts it");
                taking.fault(Fault::Rewritten, event_id, &problem);
            }
            taking.finish(Some(cell)).await?;
            let room_id = cell.room_id.clone();
            let forget =
                store.write(move |tx| Box::pin(async move { stored::forget_blanks(tx, &room_id, &rewritten).await }));
            forget.await?;
        }
    }

    /// We are not in a room any more, or its log is not another server's: nobody has to say what redacts what came before.
    pub(super) async fn forget_blanks(&self, room_id: &RoomId) -> Result<(), Refusal> {
        self.no_blanks(room_id);
        if stored::blanks(&self.context().store, room_id, i64::MAX, 1).await?.is_empty() {
            return Ok(());
        }
        let room_id = room_id.to_owned();
        let forget =
            self.context().store.write(move |tx| Box::pin(async move { stored::forget_blanks_of(tx, &room_id).await }));
        Ok(forget.await?)
    }
}

impl Taking<'_> {
    /// Whether an event was said while we were in the room: it follows what was. Of what else the hub gives, what redacts it may have
    /// been told to others alone.
    pub(in crate::lm) async fn is_of_our_stay(&self, pdu: &Pdu) -> Result<bool, Refusal> {
        let mut others: Vec<&EventId> = Vec::new();
        for id in &pdu.prev_events {
            match self.of_our_stay.get(id) {
                Some(true) => return Ok(true),
                Some(false) => {}
                None if self.batch.follows() == Some(id) => return Ok(true),
                None => others.push(id),
            }
        }
        if others.is_empty() {
            return Ok(false);
        }
        let store = &self.lm().context().store;
        let room = self.room();
        let is_member = |user: &ruma::OwnedUserId| room.state_event("m.room.member", user.as_str());
        let joins: Vec<_> =
            self.lm().own_members(room).take(MEMBERS).filter_map(|user| is_member(&user).cloned()).collect();
        let joins: Vec<&EventId> = joins.iter().map(|join| &*join.event_id).collect();
        let joins = stored::events_by_id(store, &joins).await?;
        // Who has changed the name since then counts as having come later.
        let Some(since) = joins.iter().map(|join| join.position).min() else { return Ok(false) };
        let before = stored::events_by_id(store, &others).await?;
        Ok(before.iter().any(|row| row.room_id == room.facts.room_id && row.position >= since))
    }
}
