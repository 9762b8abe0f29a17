//! The authorization rules over one event and some events that stand for the room's state.
//! <https://spec.matrix.org/v1.16/server-server-api/#authorization-rules>

use std::collections::HashMap;
use std::sync::Arc;

use ruma::events::StateEventType;
use ruma::room_version_rules::AuthorizationRules;
use ruma::state_res::{auth_types_for_event, check_state_dependent_auth_rules, check_state_independent_auth_rules};

use super::events::EventMap;
use super::pdu::{Pdu, create_of_room};
use super::snapshot::StateKey;
use super::stored::Stored;
use crate::refusal::Refusal;

/// Some of a room's state, enough to check one event against it.
pub type AuthState = HashMap<StateKey, Arc<Stored>>;

/// The keys of the state that an event is checked against, `m.room.create` included.
pub fn keys_needed(pdu: &Pdu, rules: &AuthorizationRules) -> Result<Vec<StateKey>, Refusal> {
    let mut keys = auth_event_keys(pdu, rules)?;
    let create = (StateEventType::RoomCreate.to_string(), String::new());
    if !keys.contains(&create) {
        keys.push(create);
    }
    Ok(keys)
}

/// The keys whose events belong into `auth_events`.
/// <https://spec.matrix.org/v1.16/server-server-api/#auth-events-selection>
pub fn auth_event_keys(pdu: &Pdu, rules: &AuthorizationRules) -> Result<Vec<StateKey>, Refusal> {
    let keys = auth_types_for_event(&pdu.kind, &pdu.sender, pdu.state_key.as_deref(), &pdu.content, rules)
        .map_err(Refusal::MatrixRule)?;
    Ok(keys.into_iter().map(|(kind, state_key)| (kind.to_string(), state_key)).collect())
}

/// The rules that look at the event and its auth events alone. `known` holds the auth events and the create event.
pub fn check_independent(event: &Stored, known: &EventMap, rules: &AuthorizationRules) -> Result<(), Refusal> {
    check_state_independent_auth_rules(rules, event, |id| known.get(id)).map_err(Refusal::MatrixRule)
}

/// The rules that look at the state.
pub fn check_against(event: &Stored, state: &AuthState, rules: &AuthorizationRules) -> Result<(), Refusal> {
    check_state_dependent_auth_rules(rules, event, |kind: &StateEventType, state_key: &str| {
        state.get(&(kind.to_string(), state_key.to_owned()))
    })
    .map_err(Refusal::MatrixRule)
}

/// What LM adds to the rules of a shared room: the hub, which is the server of the room's creator, finishes events of others'
/// users, and nobody else finishes any.
pub fn check_hub(event: &Stored, state: &AuthState) -> Result<(), Refusal> {
    let Some(found) = &event.pdu.hub_server else { return Ok(()) };
    let create = state.get(&(StateEventType::RoomCreate.to_string(), String::new()));
    let hub = create.map_or_else(|| event.pdu.sender.server_name(), |create| create.pdu.sender.server_name());
    if found != hub {
        return Err(Refusal::WrongHub { hub: hub.to_string(), found: found.to_string() });
    }
    if event.pdu.sender.server_name() == hub {
        return Err(Refusal::malformed(
            "hub_server",
            format!("present in an event of the hub's user {}", event.pdu.sender),
        ));
    }
    Ok(())
}

/// The state that an event's own auth events make, with the create event.
pub fn state_of_auth_events(event: &Stored, known: &EventMap) -> AuthState {
    let create = create_of_room(&event.pdu.room_id);
    let ids = event.pdu.auth_events.iter().chain(create.as_ref());
    ids.filter_map(|id| known.get(id)).filter_map(|event| Some((event.key()?, event.clone()))).collect()
}
