//! The current state of a room. Copies share their structure with each other and with the room's next states, so a state
//! costs the same to hand out however many members a room has.

use std::sync::Arc;

use crate::event::Pdu;

/// The last event of each type and state key.
#[derive(Debug, Clone, Default)]
pub struct State(imbl::OrdMap<String, imbl::OrdMap<String, Arc<Pdu>>>);

impl State {
    /// The event of a type and state key.
    pub fn get(&self, kind: &str, state_key: &str) -> Option<&Arc<Pdu>> {
        self.0.get(kind)?.get(state_key)
    }

    /// The events of a type with their state keys, in the order of these.
    pub fn of_kind(&self, kind: &str) -> impl Iterator<Item = (&str, &Arc<Pdu>)> {
        let events = self.0.get(kind).into_iter().flat_map(|events| events.iter());
        events.map(|(state_key, event)| (state_key.as_str(), event))
    }

    /// All events with their types and state keys, in the order of these.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str, &Arc<Pdu>)> {
        self.0.iter().flat_map(|(kind, events)| {
            events.iter().map(move |(state_key, event)| (kind.as_str(), state_key.as_str(), event))
        })
    }

    /// Puts an event into its place, if it is a state event; the one that was there.
    pub(super) fn insert(&mut self, event: &Arc<Pdu>) -> Option<Arc<Pdu>> {
        let state_key = event.state_key.clone()?;
        self.0.entry(event.kind.clone()).or_default().insert(state_key, event.clone())
    }

    /// Empties a place; the event that was there.
    pub(super) fn remove(&mut self, kind: &str, state_key: &str) -> Option<Arc<Pdu>> {
        self.0.get_mut(kind)?.remove(state_key)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::event::Completion;
    use crate::identity::SigningKey;

    fn member(user: &str, key: &SigningKey) -> Arc<Pdu> {
        let template = json!({
            "type": "m.room.member",
            "room_id": "!room:hub.example",
            "sender": user,
            "state_key": user,
            "content": { "membership": "join" },
            "origin_server_ts": 1,
        });
        let completion = Completion { auth_events: Vec::new(), prev_event: None };
        let hub = ruma::server_name!("hub.example");
        Arc::new(Pdu::build(template.as_object().unwrap().clone(), completion, hub, key).unwrap())
    }

    #[test]
    fn a_join_does_not_copy_the_other_members() {
        const MEMBERS: usize = 5_000;
        const JOINS: usize = 100;
        let key = SigningKey::generate();
        let template = member("@user:hub.example", &key);
        let named = |name: String| {
            let mut pdu = Pdu::clone(&template);
            pdu.state_key = Some(name);
            Arc::new(pdu)
        };
        let members: Vec<Arc<Pdu>> = (0..MEMBERS).map(|number| named(format!("@u{number}:hub.example"))).collect();
        let mut state = State::default();
        for event in &members {
            state.insert(event);
        }
        let mut handed_out = Vec::new();
        for number in 0..JOINS {
            state.insert(&named(format!("@late{number}:hub.example")));
            handed_out.push(state.clone());
        }
        // Each state that had copies of its own would hold every member once more.
        let held: usize = members.iter().map(|event| Arc::strong_count(event) - 1).sum();
        assert!(held < MEMBERS + JOINS * 200, "{held}");
        assert_eq!(handed_out[0].of_kind("m.room.member").count(), MEMBERS + 1);
        assert_eq!(handed_out.last().unwrap().iter().count(), MEMBERS + JOINS);
        assert!(handed_out[0].get("m.room.member", "@late1:hub.example").is_none());
    }
}
