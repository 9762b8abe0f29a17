//! Whether the state that a hub gives with a join can be what it says: each event is put through the rules on the events that
//! it names as those that allow it.

use std::collections::{BTreeMap, BTreeSet};

use ruma::{EventId, OwnedEventId, UserId};

use super::finished::{Bad, Finished};
use super::room::{Facts, Snapshot, Subject};
use super::rules::{Before, Slot};
use crate::event::{Pdu, Redaction};
use crate::refusal::Refusal;

type Checked = [Result<Finished, Bad>];

/// State without which the room cannot be judged here as it is at its hub.
pub(super) fn is_critical(event: &Pdu, joiner: &UserId) -> bool {
    match event.kind.as_str() {
        "m.room.create" | "m.room.power_levels" | "m.room.join_rules" | "m.room.history_visibility" => {
            event.state_key.as_deref() == Some("")
        }
        "m.room.member" => {
            let is_ban = event.content().get("membership").and_then(serde_json::Value::as_str) == Some("ban");
            is_ban || event.state_key.as_deref() == Some(joiner.as_str())
        }
        _ => false,
    }
}

/// Those of the events that the rules forbid, and why. What allows an event is looked for in the state and in `chain`; an
/// event of which not all of that is there is not judged: it is a fact at the hub.
pub(super) fn forbidden(facts: Facts, state: &Checked, chain: &Checked) -> BTreeMap<OwnedEventId, Refusal> {
    let events = || chain.iter().chain(state).flatten().map(|event| &event.pdu);
    let known: BTreeMap<&EventId, &Pdu> = events().map(|event| (&*event.event_id, event)).collect();
    let mut refused = BTreeMap::new();
    let mut allows: BTreeMap<&EventId, Vec<&Pdu>> = BTreeMap::new();
    let create = state.iter().flatten().map(|event| &event.pdu).find(|event| event.kind == "m.room.create");
    let Some(create) = create else { return refused };
    let mut room = Snapshot::empty(facts, Redaction::Draft);
    room.apply(&std::sync::Arc::new(create.clone()));
    for event in known.values().filter(|event| event.event_id != create.event_id) {
        for id in &event.auth_events {
            allows.entry(id).or_default().push(event);
        }
        if let Err(refusal) = judge(&room, create, event, &known) {
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

fn judge(room: &Snapshot, create: &Pdu, event: &Pdu, known: &BTreeMap<&EventId, &Pdu>) -> Result<(), Refusal> {
    if event.kind == "m.room.create" || event.room_id != create.room_id {
        let problem = format!("{} of {}, beside {}", event.event_id, event.room_id, create.event_id);
        return Err(Refusal::LmRule { rule: "1", problem });
    }
    let mut slots = Vec::with_capacity(event.auth_events.len());
    let mut content: BTreeMap<(&str, &str), &Pdu> = BTreeMap::new();
    for id in &event.auth_events {
        let Some(allowing) = known.get(&**id) else { return Ok(()) };
        let state_key = allowing.state_key.as_deref().unwrap_or_default();
        slots.push(Slot { kind: &allowing.kind, state_key });
        content.insert((&allowing.kind, state_key), allowing);
    }
    let subject = Subject::of(event);
    let of = |kind: &'static str| content.get(&(kind, "")).map(|event| event.content());
    let membership = |user: &str| content.get(&("m.room.member", user))?.content().get("membership")?.as_str();
    let before = Before {
        creator: Some(&create.sender),
        follows_create: event.prev_events.first() == Some(&create.event_id) && event.prev_events.len() == 1,
        power_levels: of("m.room.power_levels"),
        join_rules: of("m.room.join_rules"),
        sender_membership: membership(event.sender.as_str()),
        target_membership: event.state_key.as_deref().and_then(membership),
    };
    room.judge_after(&subject, &slots, before)
}
