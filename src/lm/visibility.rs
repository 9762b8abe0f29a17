//! Which events of a log a server sees with their contents, by `m.room.history_visibility` as it was at each event. The draft
//! says what is done with the others (they are served redacted) and leaves open which those are: it is as in Matrix, where
//! state is never hidden, nor from a server what its own users said.

use ruma::{ServerName, UserId};
use serde_json::Value;

use super::Lm;
use super::room::Snapshot;
use super::rooms::stored_pdu;
use super::served::Reach;
use crate::event::{Object, Pdu};
use crate::refusal::Refusal;
use crate::store::lm::{self as stored, EventRow, Stay};

/// How many changes of the visibility are looked at together.
const CHANGES: i64 = 100;

/// What one server sees of one log.
pub(super) struct Sight {
    /// From which positions on which visibility held; empty when it was never set.
    visibility: Vec<(i64, Visibility)>,
    stays: Vec<Stay>,
    /// From which positions on the server had somebody who was invited, or had not.
    invited: Vec<(i64, bool)>,
    /// The last position that the server sees because of its users.
    as_member: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Visibility {
    World,
    Shared,
    Invited,
    Joined,
}

impl Lm {
    /// What a server sees of a stretch of a log.
    async fn sight(
        &self,
        server: &ServerName,
        as_member: i64,
        room: &Snapshot,
        events: &[EventRow],
    ) -> Result<Sight, Refusal> {
        let (store, room_id) = (&self.context().store, &room.facts.room_id);
        let mut sight = Sight { visibility: Vec::new(), stays: Vec::new(), invited: Vec::new(), as_member };
        let Some(first) = events.first().map(|event| event.position) else { return Ok(sight) };
        let kind = "m.room.history_visibility";
        let mut rows = stored::state_of_kind_before(store, room_id, first, kind, "").await?;
        rows.extend(of_kind(events, kind));
        for row in rows {
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
            // A server name holds neither of the two characters that have a meaning in a pattern.
            let (kind, pattern) = ("m.room.member", format!("%:{server}"));
            let mut rows = stored::state_of_kind_before(store, room_id, first, kind, &pattern).await?;
            rows.extend(of_kind(events, kind));
            let mut waiting = std::collections::BTreeSet::new();
            for row in rows {
                let (position, pdu) = (row.position, stored_pdu(row, room.redaction)?);
                let Some(user) = pdu.state_key.clone().filter(|user| is_of(user, server)) else { continue };
                match pdu.content().get("membership").and_then(Value::as_str) {
                    Some("invite") => waiting.insert(user),
                    _ => waiting.remove(&user),
                };
                sight.invited.push((position, !waiting.is_empty()));
            }
        }
        Ok(sight)
    }

    /// Whether nothing was ever hidden from those who are in a room, by all that is here of its log.
    pub(super) async fn hides_nothing(&self, room: &Snapshot) -> Result<bool, Refusal> {
        let (store, slot) = (&self.context().store, ("m.room.history_visibility", ""));
        let rows = stored::stood_before(store, &room.facts.room_id, slot, i64::MAX, CHANGES).await?;
        let is_all = rows.len() < usize::try_from(CHANGES).unwrap_or_default();
        let mut shown = rows.into_iter().map(|row| Ok(visibility(stored_pdu(row, room.redaction)?.content())));
        let is_shown = |visibility| matches!(visibility, Visibility::World | Visibility::Shared);
        Ok(is_all && shown.try_fold(true, |all, next: Result<_, Refusal>| Ok::<_, Refusal>(all && is_shown(next?)))?)
    }

    /// A stretch of the log as a server sees it.
    pub(super) async fn as_seen_by(
        &self,
        server: &ServerName,
        reach: Reach,
        room: &Snapshot,
        events: Vec<EventRow>,
    ) -> Result<Vec<Value>, Refusal> {
        let sight = self.sight(server, reach.as_member, room, &events).await?;
        let events = self.as_read(room, events).await?;
        events
            .iter()
            .map(|row| {
                if sight.is_whole() && row.position <= reach.as_member {
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
    /// Whether nothing was ever hidden from anybody who was in the room.
    fn is_whole(&self) -> bool {
        self.visibility.iter().all(|(_, visibility)| matches!(visibility, Visibility::World | Visibility::Shared))
    }

    /// Whether the server sees the contents of the event at `position`.
    fn shows(&self, server: &ServerName, position: i64, event: &Pdu) -> bool {
        // What an event is seen by is the state before it. Commits are needed by whoever joins an MLS group.
        let own = event.sender.server_name() == server;
        if own || event.state_key.is_some() || event.kind == "m.mls.commit" {
            return true;
        }
        let visibility = before(&self.visibility, position).unwrap_or(Visibility::Shared);
        if visibility == Visibility::World {
            return true;
        }
        position <= self.as_member
            && (visibility == Visibility::Shared
                || self.was_there(position)
                || (visibility == Visibility::Invited && before(&self.invited, position).unwrap_or(false)))
    }

    fn was_there(&self, position: i64) -> bool {
        self.stays.iter().any(|stay| stay.since < position && stay.until.is_none_or(|until| position <= until))
    }
}

/// The state events of a type among these.
fn of_kind(events: &[EventRow], kind: &str) -> impl Iterator<Item = EventRow> {
    #[derive(serde::Deserialize)]
    struct Peek<'a> {
        #[serde(borrow, rename = "type")]
        kind: std::borrow::Cow<'a, str>,
        state_key: Option<serde::de::IgnoredAny>,
    }
    let is_of_kind = move |event: &&EventRow| {
        serde_json::from_slice(&event.json).is_ok_and(|peek: Peek<'_>| peek.kind == kind && peek.state_key.is_some())
    };
    events.iter().filter(is_of_kind).cloned()
}

fn is_of(user: &str, server: &ServerName) -> bool {
    <&UserId>::try_from(user).is_ok_and(|user| user.server_name() == server)
}

fn before<T: Copy>(changes: &[(i64, T)], position: i64) -> Option<T> {
    changes.iter().rev().find(|(from, _)| *from < position).map(|(_, value)| *value)
}

/// Whether those may read a room now who were never in it.
pub(super) fn is_world_readable(room: &Snapshot) -> bool {
    let event = room.state_event("m.room.history_visibility", "");
    event.is_some_and(|event| visibility(event.content()) == Visibility::World)
}

fn visibility(content: &Object) -> Visibility {
    match content.get("history_visibility").and_then(Value::as_str) {
        Some("joined") => Visibility::Joined,
        Some("invited") => Visibility::Invited,
        Some("world_readable") => Visibility::World,
        // As in Matrix, what is not understood is like what is not there: shared.
        _ => Visibility::Shared,
    }
}
