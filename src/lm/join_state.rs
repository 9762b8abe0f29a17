//! The state that answers a join, in an order in which it can be replayed. There are participants that put it through the
//! rules event by event, each against what came before it in the answer.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::chain::ancestors_first;
use super::room::{Facts, Snapshot, Subject};
use super::rooms::stored_pdu;
use crate::event::Pdu;
use crate::refusal::Refusal;
use crate::store::lm::EventRow;

/// The current state so that it passes a replay: create, the creator's join, power levels, join rules, the rest in the
/// order of the log. Where that does not pass (members who were let in by an invite or by rules that are gone), the events
/// that allow the state stand between it, all in the order of the log, and what is in no place of that after what allows it: of two for
/// the same type and state key the later one counts, as it does in the log.
pub(super) fn in_replay_order(
    room: &Snapshot,
    mut state: Vec<EventRow>,
    chain: &[EventRow],
) -> Result<Vec<EventRow>, Refusal> {
    state.sort_by_key(|event| event.position);
    let pdus = state.iter().map(|row| Ok(Arc::new(stored_pdu(row.clone(), room.redaction)?)));
    let pdus = pdus.collect::<Result<Vec<Arc<Pdu>>, Refusal>>()?;
    let creator = pdus.iter().find(|pdu| pdu.kind == "m.room.create").map(|create| create.sender.to_string());
    let mut order: Vec<(usize, Arc<Pdu>, EventRow)> =
        pdus.into_iter().zip(state).map(|(pdu, row)| (rank(&pdu, creator.as_deref()), pdu, row)).collect();
    // Stable: what has the same rank stays in the order of the log.
    order.sort_by_key(|(rank, ..)| *rank);
    if passes(room, order.iter().map(|(_, pdu, _)| pdu)) {
        return Ok(order.into_iter().map(|(.., row)| row).collect());
    }
    let state: BTreeSet<_> = order.iter().map(|(.., row)| row.event_id.clone()).collect();
    let all = order.into_iter().map(|(.., row)| row).chain(chain.iter().cloned());
    Ok(ancestors_first(all.collect(), &state))
}

fn rank(event: &Pdu, creator: Option<&str>) -> usize {
    match (event.kind.as_str(), event.state_key.as_deref()) {
        ("m.room.create", Some("")) => 0,
        ("m.room.member", user) if user == creator => 1,
        ("m.room.power_levels", Some("")) => 2,
        ("m.room.join_rules", Some("")) => 3,
        _ => 4,
    }
}

fn passes<'a>(room: &Snapshot, events: impl Iterator<Item = &'a Arc<Pdu>>) -> bool {
    let facts = Facts::clone(&room.facts);
    let mut replayed = Snapshot::empty(facts, room.redaction);
    for event in events {
        let subject = Subject::of(event);
        let (slots, _) = replayed.auth_events(&subject);
        if replayed.judge(&subject, &slots).is_err() {
            return false;
        }
        replayed.apply(event);
    }
    true
}
