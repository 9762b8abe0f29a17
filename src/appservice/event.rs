//! What of the homeserver's events concerns the control plane. Everything else of a transaction is not even kept. Pure.

use std::collections::BTreeMap;

use ruma::{OwnedRoomId, OwnedUserId, RoomId, ServerName, UserId};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// How much of a message is read.
const LONGEST_COMMAND: usize = 1000;

/// One event as the homeserver pushes it, as far as it is read.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Pushed {
    /// Its ID.
    pub event_id: String,
    room_id: OwnedRoomId,
    #[serde(rename = "type")]
    kind: String,
    sender: OwnedUserId,
    state_key: Option<String>,
    #[serde(default)]
    content: Value,
}

/// What is to be done because of an event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub(super) enum Work {
    /// A user of the homeserver joined a room: the bot's invite to it has done its duty.
    LocalJoin {
        /// The room.
        room_id: OwnedRoomId,
    },
    /// Somebody invited the bot.
    Invited {
        /// The room.
        room_id: OwnedRoomId,
        /// Who.
        sender: OwnedUserId,
        /// Whether the two are to be alone there.
        #[serde(default)]
        is_direct: bool,
    },
    /// The bot's chat with this room is over.
    ChatOver {
        /// The room.
        room_id: OwnedRoomId,
        /// Whether the bot is still in it.
        leave: bool,
    },
    /// Who invited the bot gave it a command, or said something encrypted.
    Said {
        /// The chat.
        room_id: OwnedRoomId,
        /// Who.
        sender: OwnedUserId,
        /// The event, by which the answer is known.
        event_id: String,
        /// What; none when it is encrypted.
        body: Option<String>,
    },
}

impl Work {
    /// The room that it is about.
    pub(super) fn room_id(&self) -> &RoomId {
        match self {
            Self::LocalJoin { room_id }
            | Self::Invited { room_id, .. }
            | Self::ChatOver { room_id, .. }
            | Self::Said { room_id, .. } => room_id,
        }
    }
}

/// A room in which the bot answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chat {
    /// Who invited the bot, and whom alone it answers.
    pub(super) with: OwnedUserId,
    /// Whether the two are alone there: everything that is said there is for the bot.
    pub(super) is_direct: bool,
}

/// Whose events they are looked at for.
#[derive(Debug, Clone, Copy)]
pub(super) struct View<'a> {
    /// The homeserver.
    pub homeserver: &'a ServerName,
    /// The appservice's user.
    pub bot: &'a UserId,
    /// Its chats.
    pub chats: &'a BTreeMap<OwnedRoomId, Chat>,
}

/// What is to be done because of `event`.
pub(super) fn work(view: View<'_>, event: &Pushed) -> Option<Work> {
    let room_id = event.room_id.clone();
    let text = |name: &str| event.content.get(name).and_then(Value::as_str);
    match (event.kind.as_str(), event.state_key.as_deref()) {
        ("m.room.member", Some(target)) => match text("membership")? {
            // Its invites into portals come from the gateway and only make the room known.
            "invite" if target == view.bot && event.sender.server_name() == view.homeserver => {
                let is_direct = event.content.get("is_direct").and_then(Value::as_bool).unwrap_or(false);
                Some(Work::Invited { room_id, sender: event.sender.clone(), is_direct })
            }
            "leave" | "ban" if target == view.bot => {
                view.chats.contains_key(&room_id).then_some(Work::ChatOver { room_id, leave: false })
            }
            "leave" | "ban" if view.chats.get(&room_id).is_some_and(|chat| chat.with == target) => {
                Some(Work::ChatOver { room_id, leave: true })
            }
            "join" if target != view.bot && is_of(target, view.homeserver) => Some(Work::LocalJoin { room_id }),
            _ => None,
        },
        (kind @ ("m.room.message" | "m.room.encrypted"), None) => {
            // Others in the room talk with each other, and so does whoever invited the bot but for its commands.
            let chat = view.chats.get(&room_id).filter(|chat| chat.with == event.sender)?;
            let body = match kind {
                "m.room.message" => {
                    let body = text("body").filter(|_| text("msgtype") == Some("m.text"))?;
                    Some(cut(Some(body).filter(|body| chat.is_direct || body.trim_start().starts_with('!'))?))
                }
                _ => None,
            };
            Some(Work::Said { room_id, sender: event.sender.clone(), event_id: event.event_id.clone(), body })
        }
        _ => None,
    }
}

fn cut(text: &str) -> String {
    text.chars().take(LONGEST_COMMAND).collect()
}

fn is_of(user_id: &str, server: &ServerName) -> bool {
    UserId::parse(user_id).is_ok_and(|user_id| user_id.server_name() == server)
}

#[cfg(test)]
mod tests {
    use ruma::{room_id, server_name, user_id};
    use serde_json::json;

    use super::*;

    fn of(event: Value) -> Option<Work> {
        let chat = |is_direct| Chat { with: user_id!("@alice:hs").to_owned(), is_direct };
        let chats = BTreeMap::from([
            (room_id!("!chat:hs").to_owned(), chat(false)),
            (room_id!("!direct:hs").to_owned(), chat(true)),
        ]);
        let view = View { homeserver: server_name!("hs"), bot: user_id!("@_isthmus:hs"), chats: &chats };
        work(view, &serde_json::from_value(event).unwrap())
    }

    fn member(room: &str, sender: &str, target: &str, membership: &str) -> Option<Work> {
        of(json!({ "type": "m.room.member", "event_id": "$1", "room_id": room, "sender": sender, "state_key": target,
                   "content": { "membership": membership } }))
    }

    #[test]
    fn memberships() {
        let bot = "@_isthmus:hs";
        let room_id = room_id!("!r:g").to_owned();
        assert_eq!(member("!r:g", "@a:hs", "@a:hs", "join"), Some(Work::LocalJoin { room_id: room_id.clone() }));
        assert_eq!(member("!r:g", "@a:other", "@a:other", "join"), None);
        assert_eq!(member("!r:g", bot, bot, "join"), None);
        assert_eq!(member("!r:g", "@isthmus:g", bot, "invite"), None);
        assert_eq!(
            member("!r:g", "@a:hs", bot, "invite"),
            Some(Work::Invited { room_id, sender: user_id!("@a:hs").to_owned(), is_direct: false })
        );
        let chat = room_id!("!chat:hs").to_owned();
        let over = |leave| Some(Work::ChatOver { room_id: chat.clone(), leave });
        assert_eq!(member("!chat:hs", "@alice:hs", bot, "leave"), over(false));
        assert_eq!(member("!chat:hs", "@alice:hs", "@alice:hs", "leave"), over(true));
        assert_eq!(member("!chat:hs", "@alice:hs", "@other:hs", "leave"), None);
        assert_eq!(member("!r:g", "@alice:hs", "@alice:hs", "leave"), None);
    }

    #[test]
    fn messages_of_chats_only() {
        let said = |room: &str, sender: &str, kind: &str, content: Value| {
            of(json!({ "type": kind, "event_id": "$1", "room_id": room, "sender": sender, "content": content }))
        };
        let text = json!({ "msgtype": "m.text", "body": "!help" });
        let Some(Work::Said { body, .. }) = said("!chat:hs", "@alice:hs", "m.room.message", text.clone()) else {
            panic!("it is a command");
        };
        assert_eq!(body.as_deref(), Some("!help"));
        let Some(Work::Said { body: None, .. }) = said("!chat:hs", "@alice:hs", "m.room.encrypted", json!({})) else {
            panic!("it is an encrypted message");
        };
        assert_eq!(said("!chat:hs", "@carol:hs", "m.room.message", text.clone()), None, "not who invited it");
        let talk = json!({ "msgtype": "m.text", "body": "hello carol!" });
        assert_eq!(said("!chat:hs", "@alice:hs", "m.room.message", talk.clone()), None, "no command");
        let Some(Work::Said { body, .. }) = said("!direct:hs", "@alice:hs", "m.room.message", talk.clone()) else {
            panic!("they are alone");
        };
        assert_eq!(body.as_deref(), Some("hello carol!"));
        assert_eq!(said("!direct:hs", "@carol:hs", "m.room.message", talk), None, "not who invited it");
        assert_eq!(said("!r:g", "@alice:hs", "m.room.message", text.clone()), None, "a bridged room");
        assert_eq!(said("!chat:hs", "@_isthmus:hs", "m.room.message", text), None, "the bot's own");
        assert_eq!(said("!chat:hs", "@alice:hs", "m.room.message", json!({ "msgtype": "m.notice", "body": "" })), None);
        assert_eq!(said("!chat:hs", "@alice:hs", "m.room.message", json!(["x"])), None);
        let long = json!({ "msgtype": "m.text", "body": format!("!{}", "é".repeat(5000)) });
        let Some(Work::Said { body: Some(body), .. }) = said("!chat:hs", "@alice:hs", "m.room.message", long) else {
            panic!("it is a message");
        };
        assert_eq!(body.chars().count(), LONGEST_COMMAND);
    }
}
