//! What the gateway's users sent to a foreign hub and what has not come back yet, so that a user's next event is judged as if
//! it had. The hub remains the judge: this only keeps events from it that cannot succeed.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use ruma::{EventId, OwnedEventId};
use serde_json::Value;

use super::room::{Snapshot, Subject};
use super::rules::Before;
use crate::event::Object;
use crate::refusal::Refusal;
use crate::seam::Draft;

/// How long an event is expected to come back: some hubs drop what they do not like without a word.
const PATIENCE: Duration = Duration::from_secs(600);
/// How many events of a room are remembered.
const REMEMBERED: usize = 1000;

/// State events of our users on their way to the hub of one room, oldest first.
#[derive(Default)]
pub(super) struct Ahead(VecDeque<Expected>);

struct Expected {
    lpdu_id: OwnedEventId,
    since: Instant,
    kind: String,
    state_key: String,
    content: Object,
}

impl Ahead {
    /// An event is queued for the hub.
    pub fn add(&mut self, lpdu_id: &EventId, draft: &Draft) {
        let Some(state_key) = draft.state_key.clone() else { return };
        let now = Instant::now();
        while self.0.len() >= REMEMBERED || self.0.front().is_some_and(|first| now - first.since > PATIENCE) {
            self.0.pop_front();
        }
        let (lpdu_id, kind, content) = (lpdu_id.to_owned(), draft.kind.clone(), draft.content.clone());
        self.0.push_back(Expected { lpdu_id, since: now, kind, state_key, content });
    }

    /// An event came back, or will not.
    pub fn settle(&mut self, lpdu_id: &EventId) {
        self.0.retain(|expected| expected.lpdu_id != lpdu_id);
    }

    /// Whether the rules allow an event at the end of the log as it is, or as it will be when the hub takes what is on its
    /// way.
    pub fn judge(&self, room: &Snapshot, subject: &Subject<'_>) -> Result<(), Refusal> {
        let (slots, _) = room.auth_events(subject);
        let before = room.before(subject);
        let refusal = match room.judge_after(subject, &slots, before) {
            Err(refusal) if !self.0.is_empty() => refusal,
            verdict => return verdict,
        };
        let expected = Before {
            power_levels: self.content("m.room.power_levels", "").or(before.power_levels),
            join_rules: self.content("m.room.join_rules", "").or(before.join_rules),
            sender_membership: self.membership(subject.sender.as_str()).or(before.sender_membership),
            target_membership: subject.state_key.and_then(|user| self.membership(user)).or(before.target_membership),
            ..before
        };
        room.judge_after(subject, &slots, expected).map_err(|_| refusal)
    }

    fn content(&self, kind: &str, state_key: &str) -> Option<&Object> {
        let now = Instant::now();
        let is_it = |expected: &&Expected| {
            expected.kind == kind && expected.state_key == state_key && now - expected.since <= PATIENCE
        };
        self.0.iter().rev().find(is_it).map(|expected| &expected.content)
    }

    fn membership(&self, user: &str) -> Option<&str> {
        self.content("m.room.member", user)?.get("membership").and_then(Value::as_str)
    }
}
