//! Auth chains: the events that allow events, those that allow these, and so on to the room's first. Of a foreign hub's log a participant
//! has the state alone with which it came, and not all that allows that: this is kept outside of the log's positions, for the day on
//! which the log is handed over to it.

use std::collections::{BTreeMap, BTreeSet};

use ruma::{EventId, OwnedEventId, RoomId};
use serde::Deserialize;

use super::Lm;
use super::finished::{Bad, Finished};
use super::weight::BYTES;
use crate::refusal::Refusal;
use crate::store::lm::{self as stored, ChainBounds, EventRow, OUTSIDE};

/// How many events an auth chain has at most.
const LONGEST: usize = 20_000;
/// After so many steps one by one, what stood before an event is read along with it.
const STEPS: usize = 16;
/// How many of these at once.
const ALONG: i64 = 1_000;

/// How much is kept of what allows the state of a foreign hub's log.
pub(super) const KEPT: ChainBounds = ChainBounds { events: LONGEST as i64, bytes: BYTES as i64 };

#[derive(Deserialize)]
struct Links {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    state_key: Option<String>,
    #[serde(default)]
    auth_events: Vec<OwnedEventId>,
}

impl Lm {
    /// The auth chain of `events`, all of one room, in the order of the log; what is in no place of that stands after what allows it. Each change of a user's name stands on the one before it, so that a
    /// chain may be thousands of steps long: a long one costs a query for a thousand of them.
    pub(super) async fn auth_chain(&self, events: &[EventRow]) -> Result<Vec<EventRow>, Refusal> {
        let store = &self.context().store;
        let mut chain: Vec<EventRow> = Vec::new();
        let mut wanted: BTreeSet<OwnedEventId> =
            events.iter().filter_map(links).flat_map(|it| it.auth_events).collect();
        let mut seen = wanted.clone();
        let mut along: BTreeMap<OwnedEventId, EventRow> = BTreeMap::new();
        // What the log does not have is read at once, as it came at once.
        let mut outside: Option<BTreeMap<OwnedEventId, EventRow>> = None;
        for step in 0.. {
            let (here, missing): (Vec<_>, Vec<_>) = wanted.into_iter().partition(|id| along.contains_key(id));
            let mut found: Vec<EventRow> = here.iter().filter_map(|id| along.remove(id)).collect();
            let missing: Vec<&EventId> = missing.iter().map(|id| &**id).collect();
            for event in stored::events_by_id(store, &missing).await? {
                let room = LONGEST.saturating_sub(chain.len()).saturating_sub(along.len());
                if let (true, Some(Links { kind, state_key: Some(state_key), .. })) =
                    (step > STEPS && room > 0, links(&event))
                {
                    let slot = (kind.as_str(), state_key.as_str());
                    let before = stored::stood_before(
                        store,
                        &event.room_id,
                        slot,
                        event.position,
                        ALONG.min(i64::try_from(room).unwrap_or(ALONG)),
                    )
                    .await?;
                    along.extend(before.into_iter().map(|event| (event.event_id.clone(), event)));
                }
                found.push(event);
            }
            let lacking: BTreeSet<&EventId> = {
                let there: BTreeSet<&EventId> = found.iter().map(|event| &*event.event_id).collect();
                missing.into_iter().filter(|id| !there.contains(id)).collect()
            };
            if let (false, Some(event)) = (lacking.is_empty(), events.first()) {
                let outside = match &mut outside {
                    Some(outside) => outside,
                    None => {
                        let rows = stored::chain_of(store, &event.room_id).await?;
                        outside.insert(rows.into_iter().map(|row| (row.event_id.clone(), row)).collect())
                    }
                };
                let here: Vec<EventRow> = lacking.into_iter().filter_map(|id| outside.remove(id)).collect();
                found.extend(here);
            }
            let named = found.iter().filter_map(links).flat_map(|it| it.auth_events);
            wanted = named.filter(|id| seen.insert(id.clone())).collect();
            chain.extend(found);
            if wanted.is_empty() || chain.len() >= LONGEST {
                break;
            }
        }
        Ok(ancestors_first(chain, &BTreeSet::new()))
    }
}

/// What may be kept of an auth chain that a hub has given: state of the room that is proved and is what it was, and that nothing forbids.
pub(super) fn to_keep<'a>(
    room_id: &RoomId,
    chain: &'a [Result<Finished, Bad>],
    forbidden: &BTreeMap<OwnedEventId, Refusal>,
) -> Vec<&'a Finished> {
    let may_be_kept = |event: &&Finished| {
        event.pdu.room_id == *room_id
            && event.pdu.state_key.is_some()
            && (event.redacted.is_none() || event.copy)
            && !forbidden.contains_key(&event.pdu.event_id)
    };
    chain.iter().flatten().filter(may_be_kept).take(LONGEST).collect()
}

/// Events as they are stored.
pub(super) fn as_stored(events: &[&Finished]) -> Vec<(OwnedEventId, Vec<u8>)> {
    events.iter().map(|event| (event.pdu.event_id.clone(), event.pdu.to_bytes())).collect()
}

/// Each event once, in the order of the log. Where some are in no place of it: each after those that allow it, and what is `state` after
/// all others of its type and state key, which were before it wherever they were.
pub(super) fn ancestors_first(mut events: Vec<EventRow>, state: &BTreeSet<OwnedEventId>) -> Vec<EventRow> {
    // Stable, so that there is one order.
    events.sort_by(|one, other| (one.position, &one.event_id).cmp(&(other.position, &other.event_id)));
    let mut seen = BTreeSet::new();
    events.retain(|event| seen.insert(event.event_id.clone()));
    if events.first().is_none_or(|first| first.position != OUTSIDE) {
        return events;
    }
    let links: Vec<Option<Links>> = events.iter().map(links).collect();
    let places: BTreeMap<&EventId, usize> =
        events.iter().enumerate().map(|(place, event)| (&*event.event_id, place)).collect();
    let slot = |links: &Links| Some((links.kind.clone(), links.state_key.clone()?));
    let mut slots: BTreeMap<(String, String), Vec<usize>> = BTreeMap::new();
    for (place, _) in events.iter().enumerate().filter(|(_, event)| !state.contains(&event.event_id)) {
        if let Some(slot) = links.get(place).and_then(Option::as_ref).and_then(slot) {
            slots.entry(slot).or_default().push(place);
        }
    }
    let before = |place: usize| -> Vec<usize> {
        let Some(links) = links.get(place).and_then(Option::as_ref) else { return Vec::new() };
        let mut before: Vec<usize> = links.auth_events.iter().filter_map(|id| places.get(&**id).copied()).collect();
        let is_state = events.get(place).is_some_and(|event| state.contains(&event.event_id));
        let replaced = slot(links).filter(|_| is_state).and_then(|slot| slots.get(&slot));
        before.extend(replaced.into_iter().flatten());
        before.sort_unstable();
        before
    };
    let mut order = Vec::with_capacity(events.len());
    let mut stack: Vec<usize> = (0..events.len()).rev().collect();
    let (mut entered, mut left) = (BTreeSet::new(), BTreeSet::new());
    while let Some(place) = stack.pop() {
        if entered.insert(place) {
            stack.push(place);
            stack.extend(before(place).into_iter().rev().filter(|before| !entered.contains(before)));
        } else if left.insert(place) {
            order.push(place);
        }
    }
    let mut events: Vec<Option<EventRow>> = events.into_iter().map(Some).collect();
    order.into_iter().filter_map(|place| events.get_mut(place).and_then(Option::take)).collect()
}

fn links(event: &EventRow) -> Option<Links> {
    serde_json::from_slice(&event.json).ok()
}

#[cfg(test)]
mod tests {
    use ruma::room_id;
    use serde_json::json;

    use super::*;

    fn row(id: &str, position: i64, (kind, state_key): (&str, &str), auth_events: &[&str]) -> EventRow {
        let json = json!({ "type": kind, "state_key": state_key, "auth_events": auth_events });
        EventRow {
            room_id: room_id!("!r:hub.example").to_owned(),
            position,
            event_id: id.try_into().unwrap(),
            json: json.to_string().into_bytes(),
        }
    }

    const CREATE: (&str, &str) = ("m.room.create", "");
    const BOT: (&str, &str) = ("m.room.member", "@bot:hub.example");
    const ALICE: (&str, &str) = ("m.room.member", "@alice:hub.example");
    const LEVELS: (&str, &str) = ("m.room.power_levels", "");
    const RULES: (&str, &str) = ("m.room.join_rules", "");

    fn ids(rows: &[EventRow]) -> Vec<&str> {
        rows.iter().map(|row| row.event_id.as_str()).collect()
    }

    #[test]
    fn what_is_in_no_place_of_a_log_stands_after_what_allows_it_and_before_what_it_allows() {
        // As a join gives it: levels and join rules before the members, whoever set them.
        let log = [
            row("$create", 0, CREATE, &[]),
            row("$bot", 1, BOT, &["$create"]),
            row("$levels3", 2, LEVELS, &["$create", "$levels2", "$alice"]),
            row("$rules2", 3, RULES, &["$create", "$levels1", "$bot"]),
            row("$alice", 4, ALICE, &["$create", "$levels1", "$rules1"]),
        ];
        let outside = [
            row("$levels2", OUTSIDE, LEVELS, &["$create", "$levels1", "$alice"]),
            row("$levels1", OUTSIDE, LEVELS, &["$create", "$bot"]),
            row("$rules1", OUTSIDE, RULES, &["$create", "$levels1", "$bot"]),
        ];
        let all: Vec<EventRow> = log.iter().chain(&outside).chain(&log[1..2]).cloned().collect();
        let state: BTreeSet<OwnedEventId> = log.iter().map(|row| row.event_id.clone()).collect();
        let ordered = ancestors_first(all.clone(), &state);
        let place = |id: &str| ids(&ordered).iter().position(|other| *other == id).unwrap();
        for event in &all {
            for allows in links(event).unwrap().auth_events {
                assert!(place(allows.as_str()) < place(event.event_id.as_str()), "{allows} in {:?}", ids(&ordered));
            }
        }
        let expected = ["$create", "$bot", "$levels1", "$rules1", "$alice", "$levels2", "$levels3", "$rules2"];
        assert_eq!(ids(&ordered), expected);
        // Whatever order they come in.
        assert_eq!(ids(&ancestors_first(all.into_iter().rev().collect(), &state)), expected);
    }

    #[test]
    fn what_is_state_stands_last_of_its_type_and_state_key() {
        // The one member event that is in no place of the log names the rules that hold, and nothing says that others were before.
        let rows = vec![
            row("$create", 0, CREATE, &[]),
            row("$rules2", 1, RULES, &["$create"]),
            row("$alice2", 2, ALICE, &["$create", "$alice1"]),
            row("$alice1", OUTSIDE, ALICE, &["$create", "$rules2"]),
            row("$rules1", OUTSIDE, RULES, &["$create"]),
        ];
        let state: BTreeSet<OwnedEventId> = rows[..3].iter().map(|row| row.event_id.clone()).collect();
        let ordered = ancestors_first(rows, &state);
        assert_eq!(ids(&ordered), ["$create", "$rules1", "$rules2", "$alice1", "$alice2"]);
    }

    #[test]
    fn a_log_that_has_all_keeps_its_order_and_what_names_itself_ends() {
        let log = vec![
            row("$create", 0, CREATE, &[]),
            row("$rules", 1, RULES, &["$create", "$levels"]),
            row("$levels", 2, LEVELS, &["$create"]),
        ];
        let back: Vec<EventRow> = log.iter().chain(&log).rev().cloned().collect();
        assert_eq!(ids(&ancestors_first(back, &BTreeSet::new())), ["$create", "$rules", "$levels"]);
        let round = vec![row("$a", OUTSIDE, LEVELS, &["$b"]), row("$b", OUTSIDE, LEVELS, &["$a", "$b"])];
        assert_eq!(ancestors_first(round, &BTreeSet::new()).len(), 2);
    }
}
