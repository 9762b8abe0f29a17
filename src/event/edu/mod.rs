//! EDUs as data: what servers tell each other besides events. Read in the shape of the LM draft (`type`, `sender`, `content`) and
//! in Matrix's (`edu_type`, `content`), one by one, and believed only for users of the server that sent them.

mod read;
#[cfg(test)]
mod tests;

use ruma::{OwnedEventId, OwnedRoomId, OwnedUserId, RoomId, ServerName, UserId};
use serde_json::{Value, json};

use self::read::read;
use super::Object;

/// How long an EDU's text may be. To-device messages for many devices are the longest.
const MAX_TEXT: usize = 128 << 10;

/// One thing that an EDU says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Edu {
    /// `m.typing`
    Typing(Typing),
    /// An entry of `m.receipt`.
    Receipt(Receipt),
    /// An entry of `m.presence`.
    Presence(Presence),
    /// A message of `m.direct_to_device` for one device.
    ToDevice(Box<ToDevice>),
    /// `m.device_list_update` or `m.signing_key_update`: the user's devices are to be asked for again.
    DevicesChanged(OwnedUserId),
}

/// Whether a user is typing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Typing {
    /// Where.
    pub room_id: OwnedRoomId,
    /// Who.
    pub user_id: OwnedUserId,
    /// Whether it begins, or goes on, rather than ends.
    pub typing: bool,
}

/// Up to where a user has read: a public receipt, `m.read`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    /// In which room.
    pub room_id: OwnedRoomId,
    /// Who.
    pub user_id: OwnedUserId,
    /// Up to which event.
    pub event_id: OwnedEventId,
    /// In which thread: the event at its root, or `main`; none for the whole room.
    pub thread_id: Option<String>,
    /// When, in milliseconds since the epoch, as the sender says.
    pub ts: i64,
}

/// How a user is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Presence {
    /// Who.
    pub user_id: OwnedUserId,
    /// `online`, `unavailable` or `offline`.
    pub presence: &'static str,
    /// What the user says about it.
    pub status_msg: Option<String>,
    /// How long ago the user last did something, in milliseconds.
    pub last_active_ago: Option<i64>,
    /// Whether the user is active now.
    pub currently_active: bool,
}

/// A message from a user to one device of another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToDevice {
    /// From whom.
    pub sender: OwnedUserId,
    /// By which its server's messages can be told apart; the draft has none.
    pub message_id: Option<String>,
    /// The message's type.
    pub kind: String,
    /// To whom.
    pub target: OwnedUserId,
    /// To which device; `*` for all.
    pub device: String,
    /// The message.
    pub content: Object,
}

/// What an EDU that is worth nothing later is about: something newer of the same replaces it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EduKey {
    /// Somebody's typing in a room.
    Typing(OwnedRoomId, OwnedUserId),
    /// Somebody's receipt in a room, or in a thread of it.
    Receipt(OwnedRoomId, OwnedUserId, Option<String>),
    /// How somebody is.
    Presence(OwnedUserId),
}

/// Why an EDU, or an entry of one, was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Ignored {
    /// It is not of the form that its type asks for, or beyond the bounds.
    Malformed,
    /// Nobody here has a use for its type.
    Unknown,
    /// It is about a user of another server than the one that sent it.
    Foreign,
    /// Its room is not here, or has no portal.
    NoPortal,
    /// Its user is not in the room.
    NotJoined,
    /// Its server has sent too many.
    Budget,
    /// No user of this gateway has the device.
    NoDevice,
    /// What it is for is switched off.
    Off,
    /// It says nothing new, or something older than what is known.
    Old,
    /// The event that it is about has not crossed, and none of those shortly before it has.
    NoImage,
    /// Policy, an access control list or a loop keeps it from crossing.
    Refused,
    /// It could not be looked into.
    Failed,
}

impl Ignored {
    /// As one word.
    pub fn code(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Unknown => "unknown_type",
            Self::Foreign => "foreign_user",
            Self::NoPortal => "no_portal",
            Self::NotJoined => "not_joined",
            Self::Budget => "budget",
            Self::NoDevice => "unknown_device",
            Self::Off => "switched_off",
            Self::Old => "old",
            Self::NoImage => "no_image",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }
}

impl Typing {
    /// What it is about.
    pub fn key(&self) -> EduKey {
        EduKey::Typing(self.room_id.clone(), self.user_id.clone())
    }
}

impl Receipt {
    /// What it is about.
    pub fn key(&self) -> EduKey {
        EduKey::Receipt(self.room_id.clone(), self.user_id.clone(), self.thread_id.clone())
    }
}

impl Edu {
    /// The type as one word, from a fixed set.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Typing(_) => "typing",
            Self::Receipt(_) => "receipt",
            Self::Presence(_) => "presence",
            Self::ToDevice(_) => "to_device",
            Self::DevicesChanged(_) => "device_list",
        }
    }

    /// Reads one EDU of `origin`: each thing that it says, or why that is ignored.
    pub fn read(text: &str, origin: &ServerName) -> Vec<Result<Self, Ignored>> {
        if text.len() > MAX_TEXT {
            return vec![Err(Ignored::Malformed)];
        }
        let parsed = serde_json::from_str::<Object>(text).ok().and_then(|edu| read(edu, origin));
        let mut entries = parsed.unwrap_or_else(|| vec![Err(Ignored::Malformed)]);
        for entry in &mut entries {
            if entry.as_ref().is_ok_and(|edu| edu.user().server_name() != origin) {
                *entry = Err(Ignored::Foreign);
            }
        }
        entries
    }

    /// What it is about; none when it must not be lost.
    pub fn key(&self) -> Option<EduKey> {
        Some(match self {
            Self::Typing(typing) => typing.key(),
            Self::Receipt(receipt) => receipt.key(),
            Self::Presence(presence) => EduKey::Presence(presence.user_id.clone()),
            Self::ToDevice(_) | Self::DevicesChanged(_) => return None,
        })
    }

    /// Who does it.
    pub fn user(&self) -> &UserId {
        match self {
            Self::Typing(typing) => &typing.user_id,
            Self::Receipt(receipt) => &receipt.user_id,
            Self::Presence(presence) => &presence.user_id,
            Self::ToDevice(message) => &message.sender,
            Self::DevicesChanged(user) => user,
        }
    }

    /// In which room, when it is about one.
    pub fn room(&self) -> Option<&RoomId> {
        match self {
            Self::Typing(typing) => Some(&typing.room_id),
            Self::Receipt(receipt) => Some(&receipt.room_id),
            Self::Presence(_) | Self::ToDevice(_) | Self::DevicesChanged(_) => None,
        }
    }

    /// In Matrix's shape.
    pub fn to_matrix(&self) -> Object {
        object([("edu_type", self.type_name().into()), ("content", self.matrix_content())])
    }

    /// In the draft's shape. Where the draft has no word on the content, that is Matrix's.
    pub fn to_lm(&self) -> Object {
        let content = match self {
            Self::ToDevice(message) => {
                let mut content = object([
                    ("target", message.target.as_str().into()),
                    ("target_device", message.device.as_str().into()),
                    ("message_type", message.kind.as_str().into()),
                    ("message", message.content.clone().into()),
                ]);
                if let Some(id) = &message.message_id {
                    content.insert("message_id".to_owned(), id.as_str().into());
                }
                content.into()
            }
            Self::DevicesChanged(_) => json!({ "changed": [], "removed": [] }),
            _ => self.matrix_content(),
        };
        object([("type", self.type_name().into()), ("sender", self.user().as_str().into()), ("content", content)])
    }

    fn type_name(&self) -> &'static str {
        match self {
            Self::Typing(_) => "m.typing",
            Self::Receipt(_) => "m.receipt",
            Self::Presence(_) => "m.presence",
            Self::ToDevice(_) => "m.direct_to_device",
            Self::DevicesChanged(_) => "m.device_list_update",
        }
    }

    fn matrix_content(&self) -> Value {
        match self {
            Self::Typing(Typing { room_id, user_id, typing }) => {
                json!({ "room_id": room_id, "user_id": user_id, "typing": typing })
            }
            Self::Receipt(receipt) => {
                let mut data = object([("ts", receipt.ts.into())]);
                if let Some(thread) = &receipt.thread_id {
                    data.insert("thread_id".to_owned(), thread.as_str().into());
                }
                let entry = json!({ "data": data, "event_ids": [receipt.event_id] });
                let users = object([(receipt.user_id.as_str(), entry)]);
                let kinds = object([("m.read", users.into())]);
                object([(receipt.room_id.as_str(), kinds.into())]).into()
            }
            Self::Presence(presence) => {
                let mut entry = object([
                    ("user_id", presence.user_id.as_str().into()),
                    ("presence", presence.presence.into()),
                    ("currently_active", presence.currently_active.into()),
                ]);
                // Matrix asks for it.
                entry.insert("last_active_ago".to_owned(), presence.last_active_ago.unwrap_or(0).into());
                if let Some(status) = &presence.status_msg {
                    entry.insert("status_msg".to_owned(), status.as_str().into());
                }
                json!({ "push": [entry] })
            }
            Self::ToDevice(message) => {
                let devices = object([(message.device.as_str(), message.content.clone().into())]);
                let messages = object([(message.target.as_str(), devices.into())]);
                let (sender, id) = (&message.sender, message.message_id.as_deref().unwrap_or_default());
                json!({ "sender": sender, "type": message.kind, "message_id": id, "messages": messages })
            }
            Self::DevicesChanged(user) => json!({ "user_id": user }),
        }
    }
}

fn object<'a>(entries: impl IntoIterator<Item = (&'a str, Value)>) -> Object {
    entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}
