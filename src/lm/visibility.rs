//! Which events of a log a server sees with their contents, by `m.room.history_visibility` as it was at each event. The draft
//! says what is done with the others (they are served redacted) and leaves open which those are: it is as in Matrix, where
//! state is never hidden, nor from a server what its own users said.

use ruma::ServerName;
use serde_json::Value;

use super::Lm;
use super::room::Snapshot;
use super::rooms::stored_pdu;
use crate::event::{Object, Pdu};
use crate::refusal::Refusal;
use crate::store::lm::{self as stored, EventRow, Stay};

/// What one server sees of one log.
pub(super) struct Sight {
    /// From which positions on which visibility held; empty when it was never set.
    visibility: Vec<(i64, Visibility)>,
    stays: Vec<Stay>,
    /// From which positions on the server had somebody who was invited, or had not.
    invited: Vec<(i64, bool)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Visibility {
    All,
    Invited,
    Joined,
}

impl Lm {
    /// What a server sees of a log.
    pub(super) async fn sight(&self, server: &ServerName, room: &Snapshot) -> Result<Sight, Refusal> {
        let (store, room_id) = (&self.context().store, &room.facts.room_id);
        let mut sight = Sight { visibility: Vec::new(), stays: Vec::new(), invited: Vec::new() };
        for row in stored::state_of_kind(store, room_id, "m.room.history_visibility", None).await? {
            let (position, pdu) = (row.position, stored_pdu(row, room.redaction)?);
            if pdu.state_key.as_deref() == Some("") {
                sight.visibility.push((position, visibility(pdu.content())));
            }
        }
        let hides = |wanted| sight.visibility.iter().any(|(_, visibility)| *visibility == wanted);
        let (invited, joined) = (hides(Visibility::Invited), hides(Visibility::Joined));
        if invited || joined {
            sight.stays = stored::stays(store, room_id, server).await?;
        }
        if invited {
            let rows = stored::state_of_kind(store, room_id, "m.room.member", Some(server)).await?;
            let mut waiting = std::collections::BTreeSet::new();
            for row in rows {
                let (position, pdu) = (row.position, stored_pdu(row, room.redaction)?);
                let Some(user) = pdu.state_key.clone() else { continue };
                match pdu.content().get("membership").and_then(Value::as_str) {
                    Some("invite") => waiting.insert(user),
                    _ => waiting.remove(&user),
                };
                sight.invited.push((position, !waiting.is_empty()));
            }
        }
        Ok(sight)
    }

    /// Events as a server sees them.
    pub(super) async fn as_seen_by(
        &self,
        server: &ServerName,
        room: &Snapshot,
        events: &[EventRow],
    ) -> Result<Vec<Value>, Refusal> {
        let sight = self.sight(server, room).await?;
        events
            .iter()
            .map(|row| {
                if sight.is_whole() {
                    return super::served::to_value(row);
                }
                let pdu = stored_pdu(row.clone(), room.redaction)?;
                let shown = sight.shows(server, row.position, &pdu);
                Ok(Value::Object(if shown { pdu.json } else { pdu.redacted(room.redaction).json }))
            })
            .collect()
    }
}

impl Sight {
    /// Whether nothing was ever hidden from anybody.
    fn is_whole(&self) -> bool {
        self.visibility.iter().all(|(_, visibility)| *visibility == Visibility::All)
    }

    /// Whether the server sees the contents of the event at `position`.
    fn shows(&self, server: &ServerName, position: i64, event: &Pdu) -> bool {
        // What an event is seen by is the state before it. Commits are needed by whoever joins an MLS group.
        let own = event.sender.server_name() == server;
        if own || event.state_key.is_some() || event.kind == "m.mls.commit" {
            return true;
        }
        let visibility = before(&self.visibility, position).unwrap_or(Visibility::All);
        visibility == Visibility::All
            || self.was_there(position)
            || (visibility == Visibility::Invited && before(&self.invited, position).unwrap_or(false))
    }

    fn was_there(&self, position: i64) -> bool {
        self.stays.iter().any(|stay| stay.since < position && stay.until.is_none_or(|until| position <= until))
    }
}

fn before<T: Copy>(changes: &[(i64, T)], position: i64) -> Option<T> {
    changes.iter().rev().find(|(from, _)| *from < position).map(|(_, value)| *value)
}

fn visibility(content: &Object) -> Visibility {
    match content.get("history_visibility").and_then(Value::as_str) {
        Some("joined") => Visibility::Joined,
        Some("invited") => Visibility::Invited,
        // As in Matrix, what is not understood is like what is not there: shared.
        _ => Visibility::All,
    }
}
