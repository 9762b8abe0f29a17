//! What was said in a foreign hub's room before the gateway came, as the hub gives it. It is given to whoever asks and kept nowhere: the
//! log here begins with the join.

use std::collections::HashMap;
use std::sync::Arc;

use ruma::{OwnedEventId, RoomId, UserId};

use super::{Appended, Lm, Position, Role};
use crate::event::Pdu;
use crate::refusal::Refusal;

/// How many events are asked for at most.
const MAX_PAST: usize = 1_000;
/// How many times a hub is asked, which may give few at once.
const PAGES: usize = 20;

impl Lm {
    /// The newest `limit` events before a user's join, oldest first: each signed by its sender's server and the hub, and named by the one
    /// after it. Their places are not known.
    pub async fn past(&self, room_id: &RoomId, user_id: &UserId, limit: usize) -> Result<Vec<Appended>, Refusal> {
        let (_, room) = self.find(room_id).await?;
        let Role::Participant { hub } = self.role(&room) else { return Ok(Vec::new()) };
        let key = ("m.room.member".to_owned(), user_id.to_string());
        let state = self.state_events(room_id, std::slice::from_ref(&key)).await?;
        let mut next = state.get(&key.0, &key.1).and_then(|join| join.prev_events.first().cloned());
        let givers = self.givers(&room, None);
        let (limit, mut found) = (limit.min(MAX_PAST), Vec::new());
        for _ in 0..PAGES {
            let Some(from) = next.clone().filter(|_| found.len() < limit) else { break };
            let wanted = limit.saturating_sub(found.len());
            let page = self.backfill_of(&givers, room_id, &from, wanted).await;
            let page = page.map_err(|error| error.into_refusal(&hub))?.into_iter().take(MAX_PAST).collect();
            let events = self.check_finished(page, room.redaction).await.into_iter().flatten();
            let mut events: HashMap<OwnedEventId, Pdu> =
                events.map(|event| (event.pdu.event_id.clone(), event.pdu)).collect();
            let before = found.len();
            while found.len() < limit
                && let Some(event) = next.as_ref().and_then(|id| events.remove(id))
                && event.room_id == *room_id
            {
                next = event.prev_events.first().cloned();
                found.push(Appended { event: Arc::new(event), position: Position(0) });
            }
            if found.len() == before {
                break;
            }
        }
        found.reverse();
        Ok(found)
    }
}
