//! One room as the provider holds it: its log, its current state, and how far each other server has it.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use anyhow::{Result, anyhow};
use isthmus::event::{Completion, Lpdu, Object, Pdu, VerifiedLpdu};
use isthmus::identity::SigningKey;
use ruma::{OwnedEventId, OwnedRoomId, OwnedServerName, ServerName, UserId};

use super::rules::{self, Proposal, State};

/// An event of the log, and the servers that get it from us.
pub struct Entry {
    pub event: Arc<Pdu>,
    pub to: BTreeSet<OwnedServerName>,
}

/// A room.
pub struct Room {
    pub id: OwnedRoomId,
    pub version: String,
    pub hub: OwnedServerName,
    /// The log; in a room that was joined it begins with the join.
    pub log: Vec<Entry>,
    pub state: State,
    /// The place of each event in the log, by event ID and by the ID of the LPDU inside it.
    places: HashMap<OwnedEventId, usize>,
    /// As hub: from which place on each server has yet to get the log.
    pub cursors: BTreeMap<OwnedServerName, usize>,
    /// As participant: LPDUs that the hub has not answered for yet.
    pub pending: VecDeque<Lpdu>,
    /// What is wrong with what came from the hub.
    pub complaints: Vec<String>,
}

impl Room {
    /// A room of which nothing is known yet.
    pub fn new(id: OwnedRoomId, version: &str, hub: OwnedServerName) -> Self {
        Self {
            id,
            version: version.to_owned(),
            hub,
            log: Vec::new(),
            state: State::new(),
            places: HashMap::new(),
            cursors: BTreeMap::new(),
            pending: VecDeque::new(),
            complaints: Vec::new(),
        }
    }

    /// The place of an event.
    pub fn place(&self, event_id: &OwnedEventId) -> Option<usize> {
        self.places.get(event_id).copied()
    }

    /// The event at a place, or the one with an ID.
    pub fn find(&self, event_id: &OwnedEventId) -> Option<Arc<Pdu>> {
        let placed = self.place(event_id).and_then(|place| self.log.get(place)).map(|entry| entry.event.clone());
        placed.or_else(|| self.state.values().find(|event| event.event_id == *event_id).cloned())
    }

    /// The servers with a joined user.
    pub fn servers(&self) -> BTreeSet<OwnedServerName> {
        let members = self.state.range(("m.room.member".to_owned(), String::new())..);
        members
            .take_while(|((kind, _), _)| kind == "m.room.member")
            .filter(|((_, user), _)| rules::membership(&self.state, user) == "join")
            .filter_map(|((_, user), _)| Some(<&UserId>::try_from(user.as_str()).ok()?.server_name().to_owned()))
            .collect()
    }

    /// Puts an event at the end of the log of the server `own`, without asking whether it may be there. A hub sends it to all
    /// servers that were joined before it or are after it, but for itself and for `not_to`.
    pub fn push(&mut self, event: Pdu, own: &ServerName, not_to: Option<&ServerName>) -> Arc<Pdu> {
        let mut to = self.servers();
        let event = Arc::new(event);
        self.set_state(event.clone());
        to.extend(self.servers());
        to.retain(|server| self.hub == own && server != own && Some(&**server) != not_to);
        self.place_at_end(event.clone(), to);
        event
    }

    /// The same, with the receivers as they were found before: an event that is read from the journal.
    pub fn place_at_end(&mut self, event: Arc<Pdu>, to: BTreeSet<OwnedServerName>) {
        let place = self.log.len();
        self.places.insert(event.event_id.clone(), place);
        if let Some(lpdu_id) = &event.lpdu_id {
            self.places.entry(lpdu_id.clone()).or_insert(place);
            self.pending.retain(|lpdu| lpdu.lpdu_id != *lpdu_id);
        }
        for server in &to {
            self.cursors.entry(server.clone()).or_insert(place);
        }
        self.log.push(Entry { event, to });
    }

    /// Takes an event into the current state when it is a state event.
    pub fn set_state(&mut self, event: Arc<Pdu>) {
        if let Some(key) = &event.state_key {
            self.state.insert((event.kind.clone(), key.clone()), event.clone());
        }
    }

    /// Whether an event may come next.
    pub fn check(&self, json: &Object) -> Result<(), String> {
        let text = |key: &str| json.get(key).and_then(serde_json::Value::as_str);
        let sender = text("sender").and_then(|sender| <&UserId>::try_from(sender).ok()).ok_or("no sender")?;
        let content = json.get("content").and_then(serde_json::Value::as_object).ok_or("no content")?;
        let kind = text("type").ok_or("no type")?;
        let after_create = self.log.len() == 1 && self.state.len() == 1;
        rules::allowed(&self.state, &Proposal { sender, kind, state_key: text("state_key"), content, after_create })
    }

    /// What a hub adds to the next event.
    pub fn completion(&self, json: &Object) -> Completion {
        let text = |key: &str| json.get(key).and_then(serde_json::Value::as_str).unwrap_or_default();
        let mut selected = vec![("m.room.create", ""), ("m.room.power_levels", ""), ("m.room.member", text("sender"))];
        if text("type") == "m.room.member" {
            if text("state_key") != text("sender") {
                selected.push(("m.room.member", text("state_key")));
            }
            let wanted = json.get("content").and_then(|content| content.get("membership"));
            if wanted.is_some_and(|wanted| wanted == "join" || wanted == "invite") {
                selected.push(("m.room.join_rules", ""));
            }
        }
        let find =
            |(kind, key): (&str, &str)| Some(self.state.get(&(kind.to_owned(), key.to_owned()))?.event_id.clone());
        Completion {
            auth_events: selected.into_iter().filter_map(find).collect(),
            prev_event: self.log.last().map(|entry| entry.event.event_id.clone()),
        }
    }

    /// As hub: makes the next event out of a template of one of our own users.
    pub fn build(&self, template: Object, key: &SigningKey) -> Result<Pdu> {
        self.check(&template).map_err(|problem| anyhow!(problem))?;
        let completion = self.completion(&template);
        Ok(Pdu::build(template, completion, &self.hub, key)?)
    }

    /// As hub: makes the next event out of a participant's LPDU.
    pub fn complete(&self, lpdu: VerifiedLpdu, key: &SigningKey) -> Result<Pdu, String> {
        if lpdu.hub_server != self.hub {
            return Err(format!("the hub is {}, not {}", self.hub, lpdu.hub_server));
        }
        self.check(&lpdu.json)?;
        let completion = self.completion(&lpdu.json);
        Pdu::complete(lpdu, completion, &self.hub, key).map_err(|error| error.to_string())
    }

    /// The current state and everything that allows it, as the answer to a join has them.
    pub fn snapshot(&self) -> (Vec<Object>, Vec<Object>) {
        let mut state: Vec<&Arc<Pdu>> = self.state.values().collect();
        state.sort_by_key(|event| self.place(&event.event_id));
        let mut wanted: VecDeque<OwnedEventId> = state.iter().flat_map(|event| event.auth_events.clone()).collect();
        let mut chain = BTreeMap::new();
        while let Some(id) = wanted.pop_front() {
            if let (false, Some(event)) = (chain.contains_key(&id), self.find(&id)) {
                wanted.extend(event.auth_events.clone());
                chain.insert(id, event.json.clone());
            }
        }
        (state.into_iter().map(|event| event.json.clone()).collect(), chain.into_values().collect())
    }
}
