//! Logs that are a graph in a line: of rooms that LM servers and graph servers share. There an event may name as its predecessors
//! events that the log does not have, because the hub did not take them, and of events that were said at once both follow the same
//! one. So what of such a log did not arrive is found by the hub's order, and not by what names what.

use std::collections::BTreeSet;

use ruma::{EventId, OwnedEventId};
use tokio::time::Instant;

use super::finished::{Bad, Finished};
use super::gaps::{AT_ONCE, Filled, PAGES, event_of};
use super::intake::Taking;
use crate::event::Pdu;
use crate::refusal::Refusal;

/// Of how many events it is remembered that logs do not have them.
pub(super) const REMEMBERED: u64 = 10_000;

impl Taking<'_> {
    /// Whether an event was finished by its sender's server, which is not the hub: such a server builds on the graph.
    pub(super) fn is_of_a_graph(&self, pdu: &Pdu) -> bool {
        pdu.hub_server.is_none() && pdu.sender.server_name() != self.room().facts.hub
    }

    /// Takes what the hub's log has between its last event here and this one, and goes on without what this one names and the log does
    /// not have. None when the hub's order does not tell.
    pub(super) async fn fill_in_line(
        &mut self,
        event: &EventId,
        missing: &[OwnedEventId],
    ) -> Result<Option<Filled>, Refusal> {
        let is_late = self.waits.late.is_some() || self.waits.asking.is_some() || self.announced.is_some();
        if is_late || !(self.in_line || self.room().says_shared()) {
            return Ok(None);
        }
        let Some(found) = self.back_to_what_is_here(event).await? else { return Ok(None) };
        let mut named = missing.to_vec();
        for given in found.into_iter().rev() {
            let Some(pdu) = event_of(&given) else { continue };
            if pdu.event_id == *event && !missing.iter().any(|id| id == event) {
                continue;
            }
            named.extend(pdu.prev_events.iter().cloned());
            // A complaint was recorded where one was due.
            let _ = match self.admit(given) {
                Ok(event) => self.place(event).await?,
                Err(outcome) => outcome,
            };
        }
        for event_id in self.unknown(&named).await? {
            if *event_id != *event && !self.is_waiting(&event_id) {
                self.pass_over(event_id);
            }
        }
        Ok(Some(Filled::Whole))
    }

    /// What the hub has before (and at) an event and is not here, the newest first, up to the first that is here.
    async fn back_to_what_is_here(&mut self, event: &EventId) -> Result<Option<Vec<Result<Finished, Bad>>>, Refusal> {
        let facts = self.room().facts.clone();
        let until = Instant::now() + AT_ONCE.patience;
        let (mut from, mut bytes) = (event.to_owned(), 0_usize);
        let (mut seen, mut found) = (BTreeSet::new(), Vec::new());
        for _ in 0..PAGES {
            let Ok(Ok(page)) = tokio::time::timeout_at(until, self.page(&facts, &from)).await else { return Ok(None) };
            let before = seen.len();
            for event in newest_first(page, &from) {
                let Some(pdu) = event_of(&event).filter(|pdu| pdu.room_id == facts.room_id) else { continue };
                let event_id = pdu.event_id.clone();
                if self.knows(&event_id).await? {
                    return Ok(Some(found));
                }
                if seen.insert(event_id.clone()) {
                    bytes = bytes.saturating_add(pdu.to_bytes().len());
                    from = event_id;
                    found.push(event);
                }
            }
            if seen.len() == before || found.len() > AT_ONCE.events || bytes > AT_ONCE.bytes {
                return Ok(None);
            }
        }
        Ok(None)
    }

    /// An event that is named is not in the hub's log, and is asked for no more. Should it come after all, it is taken.
    fn pass_over(&mut self, event_id: OwnedEventId) {
        let room_id = &self.room().facts.room_id;
        tracing::debug!(room = %room_id, event = %event_id, "an event that is named is not in the log");
        self.lm().not_in_logs().insert((room_id.clone(), event_id.clone()), ());
        self.remark(event_id);
    }
}

/// The events of a page with the newest first, whatever the hub's order is.
pub(super) fn newest_first(page: Vec<Result<Finished, Bad>>, from: &EventId) -> Vec<Result<Finished, Bad>> {
    let mut page: Vec<_> = page.into_iter().filter(|event| event_of(event).is_some()).collect();
    if page.last().and_then(event_of).is_some_and(|pdu| pdu.event_id == *from) {
        page.reverse();
    }
    page
}
