//! Redactions of a log. The draft says what redaction leaves of an event, and not who may redact what: here it is the sender of
//! the event, or who has the `redact` level when the redaction is accepted. The log keeps every event as it was written (INV-1);
//! everybody who reads it, other servers and the gateway itself, gets of what was redacted the redacted copy, which has the same
//! event ID, hashes and signatures.

use std::collections::BTreeSet;
use std::sync::Arc;

use ruma::{EventId, OwnedEventId, OwnedUserId, RoomId};

use super::Lm;
use super::room::Snapshot;
use super::rooms::stored_pdu;
use super::rules::Action;
use crate::event::{Object, Pdu, Redaction, canonical_json, redact};
use crate::refusal::Refusal;
use crate::store::lm::{self as stored, Asked, By, EventRow};
use crate::store::{Store, StoreError, Tx};

/// What no redaction changes: the room's beginning and its hub, by which others are judged, and lists of servers, which deny
/// everybody when they are empty; commits, without which nobody finds into the MLS group; redactions, of which the draft leaves
/// nothing, so that those who come later would not know what they redact.
const LASTING: [&str; 5] = ["m.room.create", "m.room.hub", "m.room.server_acl", "m.mls.commit", "m.room.redaction"];

/// A redaction on its way into a log.
#[derive(Debug, Clone)]
pub(super) struct Redacting {
    target: OwnedEventId,
    redaction: OwnedEventId,
    sender: OwnedUserId,
    /// Whether its sender may redact what others said.
    everything: bool,
    /// Whether its sender may redact what others of the same server said, as graph servers have it in a room that they share.
    neighbours: bool,
}

impl Redacting {
    /// What an event redacts that comes after `before`, if it redacts.
    pub fn of(event: &Pdu, before: &Snapshot) -> Option<Self> {
        if before.facts.shared {
            // The graph decides it.
            return None;
        }
        let target = event.redacts()?;
        let power = before.state_event("m.room.power_levels", "").map(|event| event.content());
        let creator = before.state_event("m.room.create", "").map(|create| &*create.sender);
        let levels = super::rules::Levels::new(power, creator);
        let everything = levels.of_user(&event.sender) >= levels.to_do(Action::Redact);
        let (sender, neighbours) = (event.sender.clone(), before.says_shared());
        Some(Self { target, redaction: event.event_id.clone(), sender, everything, neighbours })
    }

    /// Writes down what it redacts, in the transaction that appends it; what it redacts, if that is in the log already.
    /// What is not may come late where the log is another server's.
    pub async fn write(
        &self,
        tx: &mut Tx,
        room_id: &RoomId,
        (table, is_hub): (Redaction, bool),
    ) -> Result<Option<Pdu>, StoreError> {
        let Some(row) = stored::target(tx, room_id, &self.target).await? else {
            let by = match (self.everything, self.neighbours) {
                (true, _) => By::Anybody,
                (false, true) => By::Neighbours(self.sender.server_name()),
                (false, false) => By::Sender(&self.sender),
            };
            if !is_hub {
                stored::redact(tx, room_id, &self.target, by, &self.redaction).await?;
            }
            return Ok(None);
        };
        let target = stored_pdu(row, table)?;
        let is_neighbour = self.neighbours && target.sender.server_name() == self.sender.server_name();
        let may = self.everything || is_neighbour || target.sender == self.sender;
        if !may || !may_be_redacted(&target.kind) {
            if !is_hub {
                // The hub may think otherwise, and give it without its content.
                stored::redact(tx, room_id, &self.target, By::Nobody, &self.redaction).await?;
            }
            return Ok(None);
        }
        stored::redact(tx, room_id, &self.target, By::Anybody, &self.redaction).await?;
        Ok(Some(target))
    }
}

/// Writes down what the graph that a log follows has redacted, with the redactions; what of that is in the log.
pub(super) async fn write_all(
    tx: &mut Tx,
    room_id: &RoomId,
    table: Redaction,
    redacted: &[(OwnedEventId, OwnedEventId)],
) -> Result<Vec<Pdu>, StoreError> {
    let mut found = Vec::new();
    for (target, redaction) in redacted {
        let Some(row) = stored::target(tx, room_id, target).await? else { continue };
        let target = stored_pdu(row, table)?;
        if may_be_redacted(&target.kind) {
            stored::redact(tx, room_id, &target.event_id, By::Anybody, redaction).await?;
            found.push(target);
        }
    }
    Ok(found)
}

/// Those of the new events of a foreign hub's log of which the redaction came before them.
pub(super) async fn redacted_before(
    tx: &mut Tx,
    room_id: &RoomId,
    events: &[Arc<Pdu>],
) -> Result<Vec<Pdu>, StoreError> {
    let may_be = |event: &&Arc<Pdu>| may_be_redacted(&event.kind);
    let asked: Vec<Asked> =
        events.iter().filter(may_be).map(|event| (event.event_id.clone(), event.sender.clone())).collect();
    let redacted = stored::redacted_now(tx, room_id, &asked).await?;
    Ok(events.iter().filter(|event| redacted.contains(&event.event_id)).map(|event| Pdu::clone(event)).collect())
}

/// Events of a log as they are to be read.
pub(super) async fn as_read(
    store: &Store,
    room_id: &RoomId,
    table: Redaction,
    mut rows: Vec<EventRow>,
) -> Result<Vec<EventRow>, StoreError> {
    let asked: Vec<Asked> = rows.iter().filter_map(asked).collect();
    let redacted = stored::redacted(store, room_id, &asked).await?;
    if !redacted.is_empty() {
        for row in rows.iter_mut().filter(|row| redacted.contains(&row.event_id)) {
            row.json = without_content(&row.json, table)?;
        }
    }
    Ok(rows)
}

impl Lm {
    /// Events of a room as they are to be read.
    pub(super) async fn as_read(&self, room: &Snapshot, rows: Vec<EventRow>) -> Result<Vec<EventRow>, Refusal> {
        Ok(as_read(&self.context().store, &room.facts.room_id, room.redaction, rows).await?)
    }

    /// The redacted events among these.
    pub(super) async fn forget_events(&self, events: &[Pdu]) {
        for event in events {
            self.inner.events.invalidate(&event.event_id).await;
        }
    }
}

fn may_be_redacted(kind: &str) -> bool {
    !LASTING.contains(&kind)
}

/// What is asked of the store about an event; nothing of what no redaction changes.
fn asked(row: &EventRow) -> Option<Asked> {
    #[derive(serde::Deserialize)]
    struct Peek<'a> {
        #[serde(borrow, rename = "type")]
        kind: std::borrow::Cow<'a, str>,
        sender: OwnedUserId,
    }
    let peek: Peek<'_> = serde_json::from_slice(&row.json).ok()?;
    may_be_redacted(&peek.kind).then(|| (row.event_id.clone(), peek.sender))
}

fn without_content(json: &[u8], table: Redaction) -> Result<Vec<u8>, StoreError> {
    let event: Object = serde_json::from_slice(json).map_err(|error| StoreError::corrupt("event", error))?;
    Ok(canonical_json(&redact(&event, table)))
}

/// Whether this event is its redacted copy, as who has it redacted hands it on.
pub(super) fn is_copy(event: &Object, table: Redaction) -> bool {
    redact(event, table) == *event
}

/// The IDs of events.
pub(super) fn ids(events: &[Pdu]) -> BTreeSet<&EventId> {
    events.iter().map(|event| &*event.event_id).collect()
}
