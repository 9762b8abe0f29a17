//! Copies that lack their content. Whoever passes on what a user of another server said can change the content of it: the redacted copy is then
//! all that is proved, and it would keep the right one out for good, since both have the same ID. So the event's own server is asked first.

use std::collections::HashSet;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt as _, stream};
use ruma::{OwnedEventId, OwnedServerName, ServerName};
use tokio::time::Instant;

use super::Shared;
use super::fetch::{segment, take_events};
use super::pdu::{Pdu, Unverified, Verified};
use crate::federation::Call;

/// How many copies are asked for because of one transaction, or to fill one gap.
pub(super) const COPIES: usize = 50;
/// How many are asked for at once, and how long that may take for all of them.
const AT_ONCE: usize = 8;
const PATIENCE: Duration = Duration::from_secs(10);
/// How many bytes an answer may have.
const LIMIT: usize = 1 << 20;

impl Shared {
    /// The same events. For those that `origin` gave without the content that was hashed stand the whole ones, as far as their own servers
    /// give them now. What one of the events redacts, or one of `others`, is right without content. `left` is how many may still be asked for.
    pub(super) async fn make_whole<'o>(
        self: &Arc<Self>,
        origin: &ServerName,
        mut events: Vec<Verified>,
        others: impl Iterator<Item = &'o Verified> + Send,
        left: &mut usize,
    ) -> Vec<Verified> {
        let is_here = |event: &Verified| !event.is_whole() && event.pdu().sender.server_name() != origin;
        if !events.iter().any(is_here) {
            return events;
        }
        let mut redacted: HashSet<OwnedEventId> = others.filter_map(|event| event.pdu().redacts.clone()).collect();
        redacted.extend(events.iter().filter_map(|event| event.pdu().redacts.clone()));
        let own = &self.context.server_name;
        let mut lacking: Vec<(usize, OwnedServerName, Pdu)> = Vec::new();
        for (place, event) in events.iter().enumerate().filter(|(_, event)| is_here(event)) {
            let (pdu, home) = (event.pdu(), event.pdu().sender.server_name());
            if home.as_str() != own.as_str() && !redacted.contains(&pdu.event_id) && *left > 0 {
                *left = left.saturating_sub(1);
                lacking.push((place, home.to_owned(), pdu.clone()));
            }
        }
        let asking = lacking.into_iter().map(|(place, home, pdu)| async move {
            let copy = self.whole_copy(&home, &pdu).await;
            (place, copy)
        });
        let mut asking = pin!(stream::iter(asking).buffer_unordered(AT_ONCE));
        let until = Instant::now() + PATIENCE;
        let mut found = Vec::new();
        loop {
            match tokio::time::timeout_at(until, asking.next()).await {
                Ok(Some((place, Some(copy)))) => found.push((place, copy)),
                Ok(Some((_, None))) => {}
                Ok(None) => break,
                Err(_) => {
                    // Servers that do not answer are not waited for again and again.
                    *left = 0;
                    break;
                }
            }
        }
        for (place, copy) in found {
            tracing::info!(server = %origin, event = %copy.pdu().event_id, "gave an event with another content than its own server");
            if let Some(event) = events.get_mut(place) {
                *event = copy;
            }
        }
        events
    }

    /// The event as `home` has it; none when that is no better.
    async fn whole_copy(&self, home: &ServerName, lacking: &Pdu) -> Option<Verified> {
        let uri = format!("/_matrix/federation/v1/event/{}", segment(lacking.event_id.as_str()));
        let call = Call { timeout: PATIENCE, limit: LIMIT, ..Call::get(uri) };
        let mut answer = self.context.client.call(home, call, false).await.ok()?;
        let event = take_events(&mut answer, "pdus", 1).pop()?;
        let event = Unverified::from_object(event, lacking.version).ok()?;
        let is_it = event.pdu().event_id == lacking.event_id && event.pdu().room_id == lacking.room_id;
        self.verify(event).await.ok().filter(|event| is_it && event.is_whole())
    }
}
