//! The events that another server gives with a state: their signatures checked, themselves checked by what allows them, and the
//! state that they make.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream;
use ruma::events::TimelineEventType;
use ruma::{EventId, OwnedEventId, OwnedServerName, RoomId};

use super::Shared;
use super::batch::Batch;
use super::order::linearize;
use super::pdu::{Unverified, Verified};
use super::snapshot::{Change, Snapshot};
use super::stored::Status;
use crate::guard::guarded;
use crate::refusal::Refusal;

/// How many events are verified at once.
const AT_ONCE: usize = 50;
/// How many servers are asked for their keys at once.
const ASKED_AT_ONCE: usize = 64;
/// How long that may take for all servers together. Large rooms have thousands of members whose servers are gone.
const KEYS_PATIENCE: Duration = Duration::from_secs(60);

impl Shared {
    /// Those of the events that are of this room and are signed.
    pub(super) async fn verify_given(
        self: &Arc<Self>,
        room_id: &RoomId,
        mut events: Vec<Unverified>,
    ) -> Result<Vec<Verified>, Refusal> {
        if events.len() > AT_ONCE {
            let answered = self.ask_for_keys(&events).await;
            let can_be_verified = |event: &Unverified| {
                event.signers().is_ok_and(|signers| signers.iter().all(|server| answered.contains(server)))
            };
            events.retain(can_be_verified);
        }
        let (mut refusals, mut verified, mut rest) = (Vec::new(), Vec::new(), events.into_iter());
        loop {
            let part: Vec<_> = rest.by_ref().take(AT_ONCE).collect();
            if part.is_empty() {
                break;
            }
            verified.extend(self.verify_new(room_id, part, &mut refusals).await?);
        }
        for (event, refusal) in refusals {
            tracing::debug!(room = %room_id, %event, error = %refusal, "an event that was given is refused");
        }
        Ok(verified)
    }

    /// Has the keys of those who must have signed these events fetched; those servers of which any are known then. Whose
    /// state is not about a member comes first.
    async fn ask_for_keys(&self, events: &[Unverified]) -> HashSet<OwnedServerName> {
        let (members, others): (Vec<_>, Vec<_>) =
            events.iter().partition(|event| event.pdu().kind == TimelineEventType::RoomMember);
        let mut seen = HashSet::new();
        let mut servers: Vec<OwnedServerName> = Vec::new();
        for event in others.into_iter().chain(members) {
            servers
                .extend(event.signers().unwrap_or_default().into_iter().filter(|server| seen.insert(server.clone())));
        }
        let (count, answered) = (servers.len(), Mutex::new(HashSet::new()));
        let asking = stream::iter(servers).for_each_concurrent(ASKED_AT_ONCE, |server| {
            let answered = &answered;
            async move {
                if self.context.keyring.server_keys(&server).await.is_ok() {
                    answered.lock().unwrap_or_else(PoisonError::into_inner).insert(server);
                }
            }
        });
        let in_time = tokio::time::timeout(KEYS_PATIENCE, asking).await.is_ok();
        let answered = answered.into_inner().unwrap_or_else(PoisonError::into_inner);
        if answered.len() < count {
            tracing::info!(servers = count, answered = answered.len(), in_time, "keys of some servers cannot be had");
        }
        answered
    }
}

impl Batch {
    /// Takes in auth events, each after those that allow it, so that it can be checked; true when something new came.
    pub(super) async fn accept_given(&mut self, events: Vec<Verified>) -> Result<bool, Refusal> {
        let ids: Vec<_> = events.iter().map(|event| event.pdu().event_id.clone()).collect();
        self.look_up(&ids).await?;
        let mut new = false;
        for event in linearize(events, Verified::pdu, |pdu| pdu.auth_events.clone()) {
            let before = self.savepoint();
            let event_id = event.pdu().event_id.clone();
            match guarded(&event_id, self.accept_outlier(event)).await {
                Ok(event) => new |= event.is_some(),
                Err(_) => self.roll_back(before),
            }
        }
        Ok(new)
    }

    /// The state that these events make, as far as they are here and were allowed; and those that are not here.
    pub(super) async fn state_of_given(
        &mut self,
        state: &[OwnedEventId],
    ) -> Result<(Snapshot, Vec<OwnedEventId>), Refusal> {
        let found = self.shared.events.with_staged(state, &self.staged).await?;
        let lost = state.iter().filter(|id| !found.contains_key(*id)).cloned().collect();
        let mut changes: Vec<Change> = found
            .into_values()
            .filter(|event| event.status != Status::Rejected && event.pdu.room_id == self.room_id)
            .filter_map(|event| Some((event.key()?, Some(event.pdu.event_id.clone()))))
            .collect();
        changes.sort();
        self.need(changes.iter().filter_map(|(_, id)| id.clone()).collect()).await?;
        let empty = self.empty_state();
        Ok((self.derive(&empty, &changes)?, lost))
    }
}

/// What every room's rules stand on.
const FOUNDATIONS: [&str; 3] = ["m.room.create", "m.room.power_levels", "m.room.join_rules"];

/// A state that somebody gave can have events that cannot be had or not be checked here, because their server is gone or
/// hides its keys. Room and gateway must not stand still for that, so they are left out; what the rules stand on must be there
/// if the room has it.
pub(super) fn stands_on_all(given: &Snapshot, lost: &EventId, room_has: impl Fn(&str) -> bool) -> Result<(), Refusal> {
    match FOUNDATIONS.iter().find(|kind| room_has(kind) && given.get(kind, "").is_none()) {
        Some(kind) => Err(Refusal::NotFound(format!("{kind} in a state that was given, which may be {lost}"))),
        None => Ok(()),
    }
}
