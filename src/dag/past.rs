//! What was said in a room before the gateway came, as a server of the room gives it. It is given to whoever asks and kept nowhere: the
//! graph here begins with the join.
//! <https://spec.matrix.org/v1.16/server-server-api/#backfilling-and-retrieving-missing-events>

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use ruma::{OwnedEventId, OwnedServerName, RoomId, UserId};

use super::fetch::{segment, take_events};
use super::pdu::{Unverified, Verified};
use super::stored::Stored;
use super::{Dag, GraphEvent};
use crate::federation::Call;
use crate::refusal::Refusal;

/// How many events are asked for at most, and how many are looked at of an answer.
const MAX_PAST: usize = 1_000;
/// After how many events of the graph it is asked at once.
const MAX_EDGES: usize = 10;
/// How long a server has to answer.
const TIME: Duration = Duration::from_secs(60);

impl Dag {
    /// The newest `limit` events before a user's join, in the order of the graph, oldest first. Each is signed by its sender's server and
    /// is followed, in steps that are all there, by the join; whether the room's rules allowed it is for the server to have seen that gives it.
    pub async fn past(
        &self,
        room_id: &RoomId,
        user_id: &UserId,
        via: &[OwnedServerName],
        limit: usize,
    ) -> Result<Vec<Arc<GraphEvent>>, Refusal> {
        let limit = limit.min(MAX_PAST);
        let room = self.shared.room(room_id).await?;
        let join = self.state_event(room_id, "m.room.member", user_id.as_str()).await?;
        let edges: Vec<OwnedEventId> = join.map(|join| join.prev_events.clone()).unwrap_or_default();
        if limit == 0 || edges.is_empty() {
            return Ok(Vec::new());
        }
        let from: Vec<_> = edges.iter().take(MAX_EDGES).map(|id| format!("v={}", segment(id.as_str()))).collect();
        let uri =
            format!("/_matrix/federation/v1/backfill/{}?limit={limit}&{}", segment(room_id.as_str()), from.join("&"));
        let client = &self.shared.context.client;
        let mut told = Refusal::NotFound(format!("a server that gives what was said in {room_id}"));
        for server in self.candidates(room_id, user_id, via).await? {
            let call = Call { timeout: TIME, ..Call::get(uri.clone()) };
            let mut answer = match client.call(&server, call, false).await {
                Ok(answer) => answer,
                Err(error) => {
                    told = error.into_refusal(&server);
                    continue;
                }
            };
            let events = take_events(&mut answer, "pdus", MAX_PAST);
            let events = events.into_iter().filter_map(|event| Unverified::from_object(event, room.version).ok());
            let events = events.filter(|event| event.pdu().room_id == *room_id).collect();
            let verified = self.shared.verify_given(room_id, events).await?;
            return Ok(in_order(verified, edges, limit));
        }
        Err(told)
    }
}

/// Those that are reached from `edges`, the newest `limit` of them, oldest first.
fn in_order(events: Vec<Verified>, edges: Vec<OwnedEventId>, limit: usize) -> Vec<Arc<GraphEvent>> {
    let mut given: HashMap<OwnedEventId, Verified> =
        events.into_iter().map(|event| (event.pdu().event_id.clone(), event)).collect();
    let (mut wanted, mut seen, mut found) = (edges, HashSet::new(), Vec::new());
    while let Some(id) = wanted.pop() {
        if !seen.insert(id.clone()) {
            continue;
        }
        let Some(event) = given.remove(&id) else { continue };
        let pdu = event.into_pdu();
        wanted.extend(pdu.prev_events.iter().cloned());
        found.push(Stored::new(pdu).to_graph_event());
    }
    found.sort_by(|one, other| {
        (one.depth, one.origin_server_ts, &one.event_id).cmp(&(other.depth, other.origin_server_ts, &other.event_id))
    });
    let skip = found.len().saturating_sub(limit);
    found.split_off(skip)
}
