//! Auth chains: the events that allow events, those that allow these, and so on to the room's first.

use std::collections::{BTreeMap, BTreeSet};

use ruma::{EventId, OwnedEventId};
use serde::Deserialize;

use super::Lm;
use crate::refusal::Refusal;
use crate::store::lm::{self as stored, EventRow};

/// How many events an auth chain has at most.
const LONGEST: usize = 20_000;
/// After so many steps one by one, what stood before an event is read along with it.
const STEPS: usize = 16;
/// How many of these at once.
const ALONG: i64 = 1_000;

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
    /// The auth chain of `events`, in the order of the log. Each change of a user's name stands on the one before it, so that a
    /// chain may be thousands of steps long: a long one costs a query for a thousand of them.
    pub(super) async fn auth_chain(&self, events: &[EventRow]) -> Result<Vec<EventRow>, Refusal> {
        let store = &self.context().store;
        let mut chain: Vec<EventRow> = Vec::new();
        let mut wanted: BTreeSet<OwnedEventId> =
            events.iter().filter_map(links).flat_map(|it| it.auth_events).collect();
        let mut seen = wanted.clone();
        let mut along: BTreeMap<OwnedEventId, EventRow> = BTreeMap::new();
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
            let named = found.iter().filter_map(links).flat_map(|it| it.auth_events);
            wanted = named.filter(|id| seen.insert(id.clone())).collect();
            chain.extend(found);
            if wanted.is_empty() || chain.len() >= LONGEST {
                break;
            }
        }
        chain.sort_by_key(|event| event.position);
        Ok(chain)
    }
}

fn links(event: &EventRow) -> Option<Links> {
    serde_json::from_slice(&event.json).ok()
}
