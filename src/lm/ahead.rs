//! What the gateway's users sent to a foreign hub and what has not come back yet, so that a user's next event is judged as if
//! it had. The hub remains the judge: this only keeps events from it that cannot succeed.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use ruma::{EventId, OwnedEventId, OwnedUserId};
use serde_json::Value;

use super::room::{Snapshot, Subject};
use super::rules::Before;
use crate::event::Object;
use crate::refusal::Refusal;
use crate::seam::Draft;

/// How long an event is expected to come back that the hub has taken: some hubs drop what they do not like without a word.
const PATIENCE: Duration = Duration::from_secs(600);
/// How many events of a room are remembered.
const REMEMBERED: usize = 1000;

/// State events of our users on their way to the hub of one room, oldest first, and whether that hub has said that it is not the hub.
#[derive(Default)]
pub(super) struct Ahead(VecDeque<Expected>, Misdirected);

#[derive(Default)]
struct Misdirected {
    /// Whether something waits because of it.
    waits: bool,
    /// Since when the hub says so.
    since: Option<Instant>,
}

/// A state event of a user of the gateway on its way to a foreign hub.
#[derive(Debug, Clone)]
pub struct Coming {
    /// The LPDU.
    pub lpdu_id: OwnedEventId,
    /// Who sent it.
    pub sender: OwnedUserId,
    /// What it says.
    pub content: Object,
}

impl Coming {
    /// `content.membership`
    pub fn membership(&self) -> Option<&str> {
        self.content.get("membership").and_then(Value::as_str)
    }
}

struct Expected {
    /// Since when the hub has it; none while it is queued.
    taken: Option<Instant>,
    kind: String,
    state_key: String,
    coming: Coming,
}

impl Ahead {
    /// An event is queued for the hub.
    pub fn add(&mut self, lpdu_id: &EventId, draft: &Draft) {
        let Some(state_key) = draft.state_key.clone() else { return };
        self.0.retain(Expected::is_expected);
        while self.0.len() >= REMEMBERED {
            self.0.pop_front();
        }
        let (lpdu_id, sender) = (lpdu_id.to_owned(), draft.sender.clone());
        let coming = Coming { lpdu_id, sender, content: draft.content.clone() };
        self.0.push_back(Expected { taken: None, kind: draft.kind.clone(), state_key, coming });
    }

    /// An event that was queued before the gateway started.
    pub fn restore(&mut self, lpdu_id: &EventId, lpdu: &Object) {
        let text = |key: &str| lpdu.get(key).and_then(Value::as_str);
        let (Some(sender), Some(kind), Some(Value::Object(content))) =
            (text("sender").and_then(|user| user.try_into().ok()), text("type"), lpdu.get("content"))
        else {
            return;
        };
        let (kind, state_key) = (kind.to_owned(), text("state_key").map(str::to_owned));
        self.add(lpdu_id, &Draft { sender, kind, state_key, content: content.clone(), origin_server_ts: 0 });
    }

    /// The hub has answered an LPDU that it is not the hub: that one, and all that is queued behind it, waits.
    pub fn misdirected(&mut self) {
        self.1.waits = true;
        self.1.since.get_or_insert_with(Instant::now);
    }

    /// It is known who is the hub, or the one that is known is to be asked once more. Whether something waited for that.
    pub fn go_on(&mut self) -> bool {
        std::mem::take(&mut self.1.waits)
    }

    /// Whether something waits for that.
    pub fn has_misdirected(&self) -> bool {
        self.1.waits
    }

    /// The hub has answered as the hub.
    pub fn directed(&mut self) {
        self.1.since = None;
    }

    /// For how long the hub has said that it is not the hub, if something waits because of that.
    pub fn misdirected_for(&self) -> Option<Duration> {
        self.1.since.filter(|_| self.1.waits).map(|since| since.elapsed())
    }

    /// Whether nothing is on its way.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The hub has taken an event, and is to give it back.
    pub fn taken(&mut self, lpdu_id: &EventId) {
        let found = self.0.iter_mut().find(|expected| expected.coming.lpdu_id == lpdu_id);
        if let Some(expected) = found.filter(|expected| expected.taken.is_none()) {
            expected.taken = Some(Instant::now());
        }
    }

    /// An event came back, or will not.
    pub fn settle(&mut self, lpdu_id: &EventId) {
        self.0.retain(|expected| expected.coming.lpdu_id != lpdu_id);
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

    /// The last event of a type and state key that is on its way.
    pub fn last(&self, kind: &str, state_key: &str) -> Option<&Coming> {
        let is_it =
            |expected: &&Expected| expected.kind == kind && expected.state_key == state_key && expected.is_expected();
        self.0.iter().rev().find(is_it).map(|expected| &expected.coming)
    }

    fn content(&self, kind: &str, state_key: &str) -> Option<&Object> {
        self.last(kind, state_key).map(|coming| &coming.content)
    }

    fn membership(&self, user: &str) -> Option<&str> {
        self.last("m.room.member", user)?.membership()
    }
}

impl Expected {
    fn is_expected(&self) -> bool {
        self.taken.is_none_or(|taken| taken.elapsed() <= PATIENCE)
    }
}

#[cfg(test)]
mod tests {
    use ruma::{event_id, user_id};
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_queued_is_expected_until_the_hub_has_answered_it_or_given_it_back() {
        let mut ahead = Ahead::default();
        let said = |ahead: &Ahead| Some(ahead.last("m.room.member", "@a:g")?.membership()?.to_owned());
        let lpdu = |membership: &str| {
            let event = json!({ "type": "m.room.member", "sender": "@a:g", "state_key": "@a:g",
                                "content": { "membership": membership } });
            event.as_object().cloned().unwrap()
        };
        let (leave, join) = (event_id!("$leave"), event_id!("$join"));
        ahead.restore(leave, &lpdu("leave"));
        let draft = Draft {
            sender: user_id!("@a:g").to_owned(),
            kind: "m.room.member".to_owned(),
            state_key: Some("@a:g".to_owned()),
            content: json!({ "membership": "join" }).as_object().cloned().unwrap(),
            origin_server_ts: 1,
        };
        ahead.add(join, &draft);
        assert_eq!(said(&ahead).as_deref(), Some("join"));
        ahead.taken(join);
        ahead.settle(join);
        assert_eq!(said(&ahead).as_deref(), Some("leave"));
        ahead.settle(leave);
        assert!(ahead.is_empty());
        ahead.restore(
            join,
            &json!({ "type": "m.room.message", "sender": "@a:g", "content": {} }).as_object().cloned().unwrap(),
        );
        assert!(ahead.is_empty(), "no state");
    }
}
