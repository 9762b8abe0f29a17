//! Whether the state that a hub gives, with a join or instead of what is missing of its log, can be what it says: each event is
//! put through the rules on the events that it names as those that allow it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ruma::{EventId, OwnedEventId, UserId};
use serde_json::Value;

use super::finished::{Bad, Finished};
use super::room::{Facts, Snapshot, Subject};
use super::rules::{Before, HUB_EVENT, Slot};
use crate::event::{Object, Pdu, Redaction};
use crate::refusal::Refusal;

type Checked = [Result<Finished, Bad>];

/// State without which the room cannot be judged here as it is at its hub.
pub(super) fn is_critical(event: &Pdu, joiner: &UserId) -> bool {
    if event.kind != "m.room.member" {
        return is_deciding(event);
    }
    is_ban(event) || event.state_key.as_deref() == Some(joiner.as_str())
}

/// Whether somebody is banned by it.
pub(super) fn is_ban(event: &Pdu) -> bool {
    event.kind == "m.room.member"
        && event.content().get("membership").and_then(serde_json::Value::as_str) == Some("ban")
}

/// State by which all of a room is judged.
pub(super) fn is_deciding(event: &Pdu) -> bool {
    let kinds = ["m.room.create", "m.room.power_levels", "m.room.join_rules", "m.room.history_visibility"];
    kinds.contains(&event.kind.as_str()) && event.state_key.as_deref() == Some("")
}

/// What a hub says a room's state is.
pub(super) struct Claim<'a> {
    pub state: &'a Checked,
    /// The events that allow it, and those that allow these, as far as the hub gives them.
    pub chain: &'a Checked,
    pub seen: Seen<'a>,
}

/// What a claim is judged by, beside itself.
pub(super) enum Seen<'a> {
    /// Nothing: the room is being joined.
    Outside(Facts),
    /// What is known of the room here.
    Inside {
        room: &'a Snapshot,
        /// Those of the events, and of those that they name, that are in the log here: they were judged in their place.
        log: &'a BTreeMap<OwnedEventId, Pdu>,
        /// Those that were refused before.
        refused: BTreeSet<OwnedEventId>,
    },
}

/// Those of the events that the rules forbid, and why. What allows an event is looked for in the claim and in the log here.
/// An event of which not all of that is there is judged by the room as it is here; by one that comes with a join nobody can:
/// it is a fact at the hub.
pub(super) fn forbidden(claim: Claim<'_>) -> BTreeMap<OwnedEventId, Refusal> {
    let Claim { state, chain, seen } = claim;
    let proved = || chain.iter().chain(state).flatten().map(|event| &event.pdu);
    let unproved = chain.iter().chain(state).filter_map(|event| match event {
        Err(Bad::Unproved(pdu, _)) => Some(&**pdu),
        _ => None,
    });
    let mut known: BTreeMap<&EventId, &Pdu> = proved().map(|event| (&*event.event_id, event)).collect();
    let unproved: BTreeMap<&EventId, &Pdu> = unproved.map(|event| (&*event.event_id, event)).collect();
    let mut judged = known.clone();
    judged.extend(&unproved);
    let mut refused = BTreeMap::new();
    let (room, create, here) = match seen {
        Seen::Outside(facts) => {
            let create = state.iter().flatten().map(|event| &event.pdu).find(|event| event.kind == "m.room.create");
            let Some(create) = create.cloned().map(Arc::new) else { return refused };
            let mut room = Snapshot::empty(facts, Redaction::Draft);
            room.apply(&create);
            (room, create, None)
        }
        Seen::Inside { room, log, refused: before } => {
            let Some(create) = room.state_event("m.room.create", "").cloned() else { return refused };
            for id in before {
                let problem = format!("{id} was refused before");
                refused.insert(id, Refusal::LmRule { rule: "4.2", problem });
            }
            known.extend(log.iter().map(|(id, event)| (&**id, event)));
            judged.retain(|id, _| !log.contains_key(*id));
            (room.clone(), create, Some(log))
        }
    };
    let judge = Judge { room, create: &create, known, unproved, here };
    let mut allows: BTreeMap<&EventId, Vec<&Pdu>> = BTreeMap::new();
    for event in judged.values().filter(|event| event.event_id != create.event_id) {
        for id in &event.auth_events {
            allows.entry(id).or_default().push(event);
        }
        if let Err(refusal) = judge.judge(event) {
            refused.insert(event.event_id.clone(), refusal);
        }
    }
    // What stands on a forbidden event is forbidden.
    let mut follow: Vec<OwnedEventId> = refused.keys().cloned().collect();
    let mut followed = BTreeSet::new();
    while let Some(id) = follow.pop() {
        if !followed.insert(id.clone()) {
            continue;
        }
        for event in allows.get(&*id).into_iter().flatten() {
            let problem = format!("{} is allowed by {id}, which is forbidden", event.event_id);
            refused.entry(event.event_id.clone()).or_insert(Refusal::LmRule { rule: "4.2", problem });
            follow.push(event.event_id.clone());
        }
    }
    refused
}

struct Judge<'a> {
    room: Snapshot,
    create: &'a Pdu,
    known: BTreeMap<&'a EventId, &'a Pdu>,
    /// Events of which it is not proved that they are their senders': nothing that is proved stands on them.
    unproved: BTreeMap<&'a EventId, &'a Pdu>,
    /// Those of the known that are in the log here.
    here: Option<&'a BTreeMap<OwnedEventId, Pdu>>,
}

impl Judge<'_> {
    fn judge(&self, event: &Pdu) -> Result<(), Refusal> {
        let (room, create) = (&self.room, self.create);
        if event.kind == "m.room.create" || event.room_id != create.room_id {
            let problem = format!("{} of {}, beside {}", event.event_id, event.room_id, create.event_id);
            return Err(Refusal::LmRule { rule: "1", problem });
        }
        let subject = Subject::of(event);
        let mut slots = Vec::with_capacity(event.auth_events.len());
        let mut content: BTreeMap<(&str, &str), &Pdu> = BTreeMap::new();
        for id in &event.auth_events {
            let claimed = || self.unproved.get(&**id).filter(|_| self.unproved.contains_key(&*event.event_id));
            let Some(allowing) = self.known.get(&**id).or_else(claimed) else {
                return match self.here {
                    Some(_) => room.judge(&subject, &room.auth_events(&subject).0),
                    None => Ok(()),
                };
            };
            let state_key = allowing.state_key.as_deref().unwrap_or_default();
            slots.push(Slot { kind: &allowing.kind, state_key });
            content.insert((&allowing.kind, state_key), allowing);
        }
        let of = |kind: &'static str| content.get(&(kind, "")).copied();
        self.follows_levels(event, of("m.room.power_levels"))?;
        let membership = |user: &str| content.get(&("m.room.member", user))?.content().get("membership")?.as_str();
        // A knock need not name the join rules, as the draft selects what allows it: then they were such that it was taken.
        let knock = Object::from_iter([("join_rule".to_owned(), Value::from("knock"))]);
        let is_knock = event.content().get("membership").and_then(Value::as_str) == Some("knock");
        let unnamed = (event.kind == "m.room.member" && is_knock).then_some(&knock);
        let before = Before {
            creator: Some(&create.sender),
            follows_create: event.prev_events.first() == Some(&create.event_id) && event.prev_events.len() == 1,
            power_levels: of("m.room.power_levels").map(Pdu::content),
            join_rules: of("m.room.join_rules").map(Pdu::content).or(unnamed),
            sender_membership: membership(event.sender.as_str()),
            target_membership: event.state_key.as_deref().and_then(membership),
            // Each change of the hub names the one before it. Who had joined then, and which events are of that time, is not said.
            hub: Some(of(HUB_EVENT).and_then(Pdu::new_hub).unwrap_or(create.sender.server_name())),
            was_handed_over: false,
            next_hub_is_in: true,
        };
        room.judge_after(&subject, &slots, before)
    }

    /// New power levels follow those that hold here, or others that are new: not those under which their sender once was
    /// somebody.
    fn follows_levels(&self, event: &Pdu, before: Option<&Pdu>) -> Result<(), Refusal> {
        let (Some(here), "m.room.power_levels") = (self.here, event.kind.as_str()) else { return Ok(()) };
        let now = self.room.state_event("m.room.power_levels", "").map(|now| &now.event_id);
        let before = before.map(|before| &before.event_id);
        if before == now || before.is_some_and(|before| !here.contains_key(before)) {
            return Ok(());
        }
        let problem = format!("power levels that follow {before:?}, where {now:?} hold");
        Err(Refusal::LmRule { rule: "4.2", problem })
    }
}

/// What may be taken, and what was found to be forbidden.
type Parts = (Vec<Result<Finished, Bad>>, Vec<(OwnedEventId, Refusal)>);

/// State in two parts.
pub(super) fn without_forbidden(
    state: Vec<Result<Finished, Bad>>,
    forbidden: &BTreeMap<OwnedEventId, Refusal>,
) -> Parts {
    let mut refused = Vec::new();
    let mut allowed = state;
    allowed.retain(|event| {
        let id = match event {
            Ok(event) => Some(&event.pdu.event_id),
            Err(bad) => bad.event_id(),
        };
        let Some((id, refusal)) = id.and_then(|id| forbidden.get_key_value(id)) else { return true };
        refused.push((id.clone(), refusal.clone()));
        false
    });
    (allowed, refused)
}
