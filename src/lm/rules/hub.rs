//! Who keeps a log, and who may hand it over. The draft has no rules for it yet (its section "Hub Transfers" names the event,
//! `m.room.hub`, and what must be decided); these are isthmus' own, and `docs/hub-transfer.md` gives them by their numbers.

use ruma::ServerName;
use serde_json::Value;

use super::{Judged, refuse, shown};
use crate::refusal::Refusal;

/// The type of the event that hands a log over.
pub const HUB_EVENT: &str = "m.room.hub";

/// Where the log was handed over before, what stands in it without `hub_server` is of the hub's own users: nobody else's
/// events get there but by their LPDUs. (In a log that was never handed over such events may be those of servers that share
/// the room's graph.)
pub(super) fn sender(event: &Judged<'_>) -> Result<(), Refusal> {
    let (Some(hub), sender) = (event.before.hub, event.sender.server_name()) else { return Ok(()) };
    if event.before.was_handed_over && event.signed_by_hub.is_none() && sender != hub {
        return refuse("hub.6", format!("an event of {sender} without hub_server, where {hub} keeps the log"));
    }
    Ok(())
}

/// Whether the log may be handed over by this event. That its sender has joined and has the level was found before.
pub(super) fn check(event: &Judged<'_>) -> Result<(), Refusal> {
    let (hub, sender) = (event.before.hub, event.sender.server_name());
    if hub != Some(sender) {
        let hub = hub.map_or("another server", ServerName::as_str);
        return refuse("hub.1", format!("{} hands the log over, which {hub} keeps", event.sender));
    }
    if event.signed_by_hub.is_some() {
        return refuse("hub.2", "it has a hub_server: the hub itself hands its log over, by no LPDU");
    }
    if event.state_key != Some("") {
        return refuse("hub.3", format!("the state key is {:?}, not empty", event.state_key));
    }
    let named = event.content.get("hub_server");
    let Some(next) = named.and_then(Value::as_str).and_then(|name| <&ServerName>::try_from(name).ok()) else {
        return refuse("hub.4", format!("hub_server is {}, no server name", shown(named)));
    };
    if next == sender {
        return refuse("hub.4", format!("{next} is the hub already"));
    }
    if !event.before.next_hub_is_in {
        return refuse("hub.4", format!("{next} has nobody in the room"));
    }
    if !event.signed_by_next_hub {
        return refuse("hub.5", format!("not signed by {next}, which is to keep the log"));
    }
    Ok(())
}
