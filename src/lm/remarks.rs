//! What a hub does that costs nothing at once, and that no hub that does its work does: it gives events in another order than its
//! log's, events that follow nothing, and events that do not name all that allows them. They are taken, and a fault is noted.

use std::collections::{BTreeMap, VecDeque};

use ruma::{EventId, OwnedEventId, OwnedServerName, ServerName};

use super::finished::{Bad, Finished};
use super::gaps::{Fetched, event_of};
use super::intake::Taking;
use super::room::Subject;
use crate::event::Pdu;
use crate::identity::Side;
use crate::seam::Uninvited;
use crate::store::lm::Fault;

/// Of how many events of a room it is remembered that they were not given when one that follows them was.
const REMEMBERED: usize = 200;

/// Events that a hub had when it gave one that follows them, and that it had not given. Where a log is handed over two servers give it, each
/// in its order: what one has skipped may come late from the other.
#[derive(Debug, Clone, Default)]
pub(super) struct Skipped(VecDeque<(OwnedServerName, OwnedEventId)>);

impl Skipped {
    pub fn note(&mut self, hub: &ServerName, event_ids: impl IntoIterator<Item = OwnedEventId>) {
        self.0.extend(event_ids.into_iter().map(|event_id| (hub.to_owned(), event_id)));
        let surplus = self.0.len().saturating_sub(REMEMBERED);
        self.0.drain(..surplus);
    }

    /// Whether it is one of those of this hub; from now on it is none.
    fn take(&mut self, hub: &ServerName, event_id: &EventId) -> bool {
        let place = self.0.iter().position(|(_, skipped)| *skipped == event_id);
        place.and_then(|place| self.0.remove(place)).is_some_and(|(by, _)| by == *hub)
    }
}

impl Taking<'_> {
    /// Remarks on when an event was given: after one that follows it.
    pub(super) fn remark_on_time(&mut self, event: &Result<Finished, Bad>) {
        let Ok(Finished { pdu, .. }) = event else { return };
        let hub = self.gives();
        if self.skipped.take(&hub, &pdu.event_id) && self.announced.is_none() && !self.may_branch(pdu) {
            let event_id = pdu.event_id.clone();
            self.fault(Fault::Reordered, &event_id, "given after an event that follows it");
        }
    }

    /// The server whose log is being taken.
    pub(super) fn gives(&self) -> OwnedServerName {
        self.announced.clone().unwrap_or_else(|| self.room().facts.hub.clone())
    }

    /// Remarks on what an event that is allowed names as before it, and as what allows it.
    pub(super) fn remark_on_links(&mut self, pdu: &Pdu) {
        if self.may_branch(pdu) {
            return;
        }
        if pdu.prev_events.is_empty() && pdu.kind != "m.room.create" {
            self.fault(Fault::Unlinked, &pdu.event_id, "follows nothing");
        }
        // Elsewhere than at its end it is not certain what the log was.
        let stands_at_end = self.room().last_id().is_some_and(|last| pdu.prev_events.contains(last));
        if !stands_at_end || self.waits.late.is_some() || self.may_be_left_out() || self.announced.is_some() {
            return;
        }
        let (_, expected) = self.room().auth_events(&Subject::of(pdu));
        let lacks: Vec<&OwnedEventId> = expected.iter().filter(|id| !pdu.auth_events.contains(id)).collect();
        if !lacks.is_empty() && pdu.auth_events.iter().all(|id| expected.contains(id)) {
            let problem = format!("auth_events lack {lacks:?}");
            self.fault(Fault::Incomplete, &pdu.event_id, &problem);
        }
    }

    /// Remarks on the order of a page of the hub's log.
    pub(super) fn in_its_order(&mut self, page: Vec<Result<Finished, Bad>>) -> Vec<Result<Finished, Bad>> {
        let links = page.iter().filter_map(event_of).filter(|pdu| !self.may_branch(pdu));
        let links: Vec<_> = links.map(|pdu| (&*pdu.event_id, &pdu.prev_events[..])).collect();
        if let Some((event, before)) = contradiction(&links) {
            let (event, problem) = (event.to_owned(), format!("backfill gives {before} on the wrong side of it"));
            self.fault(Fault::Reordered, &event, &problem);
        }
        page
    }

    /// Whether an event ends the invite, the knock or the ban of a user of ours who is not in the room: hubs tell that also to those who
    /// are out of it, and nothing else.
    pub(super) fn ends_a_wait(&self, pdu: &Pdu) -> bool {
        let said = (&*pdu.room_id, &*pdu.sender, pdu.state_key.as_deref(), pdu.content());
        let ended = Uninvited::of(Side::Lm, &self.room().facts.hub, &self.lm().context().server_name, said);
        let is_joined = |ended: Uninvited| self.room().membership(ended.target.as_str()) == Some("join");
        pdu.kind == "m.room.member" && ended.is_some_and(|ended| !is_joined(ended))
    }

    /// Whether what came of asking for what is before such an event shows that we are out of the room, perhaps by something that is on
    /// its way to us.
    pub(super) fn is_told_outside(&self, fetched: &Fetched) -> bool {
        self.ends_wait
            && match fetched {
                Fetched::No(_) => true,
                Fetched::NotNow(_) => !self.room().has_server(&self.lm().context().server_name),
                Fetched::All | Fetched::Long(_) => false,
            }
    }

    /// Whether an event may be of a graph, where branches are normal.
    pub(super) fn may_branch(&self, pdu: &Pdu) -> bool {
        self.room().says_shared() || self.is_of_a_graph(pdu)
    }
}

/// An event of a page, and one of those that it follows, that stand the other way round than the first such two. Whether the
/// newest comes first is for the hub to choose, once.
fn contradiction<'a>(page: &[(&'a EventId, &'a [OwnedEventId])]) -> Option<(&'a EventId, &'a EventId)> {
    let places: BTreeMap<&EventId, usize> = page.iter().enumerate().map(|(place, (id, _))| (*id, place)).collect();
    let mut newest_first = None;
    for (place, (id, before)) in page.iter().enumerate() {
        for before in before.iter().filter(|before| ***before != **id) {
            let Some(other) = places.get(&**before) else { continue };
            let is_newest_first = place < *other;
            if *newest_first.get_or_insert(is_newest_first) != is_newest_first {
                return Some((id, before));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use ruma::server_name;

    use super::*;

    fn id(name: &str) -> OwnedEventId {
        OwnedEventId::try_from(format!("${name}")).unwrap()
    }

    #[test]
    fn a_page_has_one_order() {
        let follows = [("a", ""), ("b", "a"), ("c", "b"), ("c2", "b"), ("d", "c")];
        let events: BTreeMap<&str, (OwnedEventId, Vec<OwnedEventId>)> = follows
            .into_iter()
            .map(|(name, before)| (name, (id(name), if before.is_empty() { vec![] } else { vec![id(before)] })))
            .collect();
        for (order, is_wrong) in [
            ("a b c c2 d", false),
            ("d c2 c b a", false),
            ("d c c2 b a", false),
            ("a d", false),
            ("a c b d", true),
            ("b a c", true),
            ("d b c a", true),
        ] {
            let page: Vec<_> = order
                .split(' ')
                .map(|name| {
                    let (id, before) = &events[name];
                    (&**id, &before[..])
                })
                .collect();
            assert_eq!(contradiction(&page).is_some(), is_wrong, "{order}");
        }
    }

    #[test]
    fn only_so_much_is_remembered() {
        let (mut skipped, hub) = (Skipped::default(), server_name!("hub.example"));
        skipped.note(hub, (0..REMEMBERED + 1).map(|n| id(&n.to_string())));
        assert!(!skipped.take(hub, &id("0")));
        assert!(skipped.take(hub, &id("1")) && !skipped.take(hub, &id("1")));
        assert!(!skipped.take(server_name!("other.example"), &id("2")));
    }
}
