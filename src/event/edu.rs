//! EDUs as data: what servers tell each other besides events. Read in the shape of the LM draft (`type`, `sender`, `content`) and
//! in Matrix's (`edu_type`, `content`), one by one, and believed only for users of the server that sent them.

use ruma::{OwnedEventId, OwnedRoomId, OwnedUserId, RoomId, ServerName, UserId};
use serde_json::{Value, json};

use super::{Object, event_id};

/// How long an EDU's text may be. To-device messages for many devices are the longest.
const MAX_TEXT: usize = 128 << 10;
/// How many things one EDU may say: receipts, presences, messages for devices.
const MAX_ENTRIES: usize = 1_000;
/// How long a device's ID, a message's ID or type, or a status may be, in bytes.
const MAX_NAME: usize = 255;
const MAX_STATUS: usize = 1_024;

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

type Entries = Vec<Result<Edu, Ignored>>;

fn object<'a>(entries: impl IntoIterator<Item = (&'a str, Value)>) -> Object {
    entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

/// None when it has not the form of an EDU.
fn read(mut edu: Object, origin: &ServerName) -> Option<Entries> {
    let Some(Value::Object(mut content)) = edu.remove("content") else { return None };
    let Some(kind) = edu.get("edu_type").and_then(Value::as_str) else {
        let kind = edu.get("type")?.as_str()?;
        // The draft's examples have both names.
        let sender = edu.get("sender").or_else(|| edu.get("sender_id"))?;
        let sender = user(sender)?;
        if sender.server_name() != origin {
            return Some(vec![Err(Ignored::Foreign)]);
        }
        return read_lm(kind, sender, content);
    };
    Some(match kind {
        "m.typing" => {
            let user_id = user(content.get("user_id")?)?;
            vec![Ok(typing(user_id, &content)?)]
        }
        "m.receipt" => receipts(&content)?,
        "m.presence" => presences(&content)?,
        "m.direct_to_device" => to_devices(&mut content)?,
        "m.device_list_update" | "m.signing_key_update" | "org.matrix.signing_key_update" => {
            vec![Ok(Edu::DevicesChanged(user(content.get("user_id")?)?))]
        }
        _ => vec![Err(Ignored::Unknown)],
    })
}

/// The draft's shape: what is said is said by one user.
fn read_lm(kind: &str, sender: OwnedUserId, mut content: Object) -> Option<Entries> {
    let entries = match kind {
        "m.typing" => vec![Ok(typing(sender.clone(), &content)?)],
        "m.receipt" => receipts(&content)?,
        "m.presence" => presences(&content)?,
        "m.direct_to_device" => {
            let Some(Value::Object(message)) = content.remove("message") else { return None };
            let message = ToDevice {
                sender: sender.clone(),
                message_id: content.get("message_id").map(name).unwrap_or_default(),
                kind: name(content.get("message_type")?)?,
                target: user(content.get("target")?)?,
                device: name(content.get("target_device")?)?,
                content: message,
            };
            vec![Ok(Edu::ToDevice(Box::new(message)))]
        }
        "m.device_list_update" => vec![Ok(Edu::DevicesChanged(sender.clone()))],
        _ => vec![Err(Ignored::Unknown)],
    };
    let by_another = |entry: Result<Edu, Ignored>| match entry {
        Ok(edu) if edu.user() != sender => Err(Ignored::Foreign),
        entry => entry,
    };
    Some(entries.into_iter().map(by_another).collect())
}

fn user(value: &Value) -> Option<OwnedUserId> {
    UserId::parse(value.as_str()?).ok()
}

fn name(value: &Value) -> Option<String> {
    value.as_str().filter(|name| !name.is_empty() && name.len() <= MAX_NAME).map(str::to_owned)
}

fn typing(user_id: OwnedUserId, content: &Object) -> Option<Edu> {
    let room_id = RoomId::parse(content.get("room_id")?.as_str()?).ok()?;
    Some(Edu::Typing(Typing { room_id, user_id, typing: content.get("typing")?.as_bool()? }))
}

fn receipts(content: &Object) -> Option<Entries> {
    let mut entries = Vec::new();
    for (room_id, kinds) in content {
        let room_id = RoomId::parse(room_id.as_str()).ok();
        for (kind, users) in kinds.as_object()? {
            for (user_id, entry) in users.as_object()? {
                if entries.len() >= MAX_ENTRIES {
                    return None;
                }
                // Nobody but the reader's own server has to know of private ones.
                entries.push(match &room_id {
                    Some(room_id) if kind == "m.read" => receipt(room_id, user_id, entry).ok_or(Ignored::Malformed),
                    Some(_) => Err(Ignored::Unknown),
                    None => Err(Ignored::Malformed),
                });
            }
        }
    }
    Some(entries)
}

fn receipt(room_id: &RoomId, user_id: &str, entry: &Value) -> Option<Edu> {
    let data = entry.get("data");
    let thread_id = match data.and_then(|data| data.get("thread_id")) {
        None => None,
        Some(thread) => Some(name(thread).filter(|thread| thread == "main" || event_id(thread).is_some())?),
    };
    Some(Edu::Receipt(Receipt {
        room_id: room_id.to_owned(),
        user_id: UserId::parse(user_id).ok()?,
        event_id: event_id(entry.get("event_ids")?.as_array()?.last()?.as_str()?)?,
        thread_id,
        ts: data.and_then(|data| data.get("ts")?.as_i64()).unwrap_or(0).max(0),
    }))
}

fn presences(content: &Object) -> Option<Entries> {
    let pushed = content.get("push")?.as_array()?;
    if pushed.len() > MAX_ENTRIES {
        return None;
    }
    Some(pushed.iter().map(|entry| presence(entry).ok_or(Ignored::Malformed)).collect())
}

fn presence(entry: &Value) -> Option<Edu> {
    let presence = entry.get("presence")?.as_str()?;
    let presence = ["online", "unavailable", "offline"].into_iter().find(|known| *known == presence)?;
    let status = entry.get("status_msg").and_then(Value::as_str);
    Some(Edu::Presence(Presence {
        user_id: user(entry.get("user_id")?)?,
        presence,
        status_msg: status.filter(|status| status.len() <= MAX_STATUS).map(str::to_owned),
        last_active_ago: entry.get("last_active_ago").and_then(Value::as_i64).filter(|ago| *ago >= 0),
        currently_active: entry.get("currently_active").and_then(Value::as_bool).unwrap_or(false),
    }))
}

fn to_devices(content: &mut Object) -> Option<Entries> {
    let Some(Value::Object(messages)) = content.remove("messages") else { return None };
    let (sender, kind) = (user(content.get("sender")?)?, name(content.get("type")?)?);
    let message_id = Some(name(content.get("message_id")?)?);
    let mut entries = Vec::new();
    for (target, devices) in messages {
        let (target, Value::Object(devices)) = (UserId::parse(target).ok(), devices) else { return None };
        for (device, content) in devices {
            if entries.len() >= MAX_ENTRIES {
                return None;
            }
            entries.push(match (&target, content) {
                (Some(target), Value::Object(content)) if !device.is_empty() && device.len() <= MAX_NAME => {
                    let (sender, message_id) = (sender.clone(), message_id.clone());
                    let (kind, target) = (kind.clone(), target.clone());
                    Ok(Edu::ToDevice(Box::new(ToDevice { sender, message_id, kind, target, device, content })))
                }
                _ => Err(Ignored::Malformed),
            });
        }
    }
    Some(entries)
}

#[cfg(test)]
mod tests {
    use ruma::server_name;

    use super::*;

    fn read_one(edu: &Value) -> Vec<Result<Edu, Ignored>> {
        Edu::read(&edu.to_string(), server_name!("a.example"))
    }

    fn all() -> Vec<Edu> {
        let alice: OwnedUserId = "@alice:a.example".try_into().unwrap();
        let room: OwnedRoomId = "!r:a.example".try_into().unwrap();
        let receipt = |thread: Option<&str>| {
            Edu::Receipt(Receipt {
                room_id: room.clone(),
                user_id: alice.clone(),
                event_id: "$e".try_into().unwrap(),
                thread_id: thread.map(str::to_owned),
                ts: 5,
            })
        };
        vec![
            Edu::Typing(Typing { room_id: room.clone(), user_id: alice.clone(), typing: true }),
            receipt(None),
            receipt(Some("main")),
            receipt(Some("$root")),
            Edu::Presence(Presence {
                user_id: alice.clone(),
                presence: "online",
                status_msg: Some("here".to_owned()),
                last_active_ago: Some(7),
                currently_active: true,
            }),
            Edu::ToDevice(Box::new(ToDevice {
                sender: alice.clone(),
                message_id: Some("m1".to_owned()),
                kind: "m.room.encrypted".to_owned(),
                target: "@bob:b.example".try_into().unwrap(),
                device: "D".to_owned(),
                content: object([("ciphertext", "x".into())]),
            })),
            Edu::DevicesChanged(alice),
        ]
    }

    #[test]
    fn what_is_written_is_read_again_in_both_shapes() {
        for edu in all() {
            for shape in [edu.to_matrix(), edu.to_lm()] {
                assert_eq!(read_one(&shape.clone().into()), [Ok(edu.clone())], "{shape:?}");
            }
        }
    }

    #[test]
    fn hc_53_an_edu_is_believed_only_for_users_of_the_server_that_sent_it() {
        for edu in all() {
            for shape in [edu.to_matrix(), edu.to_lm()] {
                let text = Value::from(shape).to_string();
                assert_eq!(Edu::read(&text, server_name!("b.example")), [Err(Ignored::Foreign)], "{text}");
            }
        }
        // Its own user beside somebody else's.
        let receipt = json!({ "data": { "ts": 1 }, "event_ids": ["$e"] });
        let users = json!({ "@alice:a.example": receipt, "@bob:b.example": receipt });
        let read = read_one(&json!({ "edu_type": "m.receipt", "content": { "!r:a.example": { "m.read": users } } }));
        assert_eq!((read.len(), read.iter().filter(|entry| entry.is_ok()).count()), (2, 1));
        assert!(read.contains(&Err(Ignored::Foreign)));
        // In the draft's shape nobody speaks for another user of the same server.
        let content = json!({ "!r:a.example": { "m.read": { "@alice:a.example": receipt } } });
        let edu = json!({ "type": "m.receipt", "sender": "@mallory:a.example", "content": content });
        assert_eq!(read_one(&edu), [Err(Ignored::Foreign)]);
    }

    #[test]
    fn hc_25_what_is_malformed_is_ignored_and_what_is_private_stays_so() {
        let receipt = |entry: Value| json!({ "!r:a.example": { "m.read": { "@alice:a.example": entry } } });
        let matrix = |kind: &str, content: Value| json!({ "edu_type": kind, "content": content });
        let private = json!({ "!r:a.example": { "m.read.private": { "@alice:a.example": { "event_ids": ["$e"] } } } });
        let typing = json!({ "room_id": "!r:a.example", "typing": true });
        for (edu, expected) in [
            (json!(null), Ignored::Malformed),
            (json!([1]), Ignored::Malformed),
            (json!({}), Ignored::Malformed),
            (json!({ "edu_type": 5, "content": [] }), Ignored::Malformed),
            (json!({ "type": "m.typing", "content": typing }), Ignored::Malformed),
            (matrix("m.typing", typing), Ignored::Malformed),
            (
                matrix("m.typing", json!({ "room_id": "r", "user_id": "@alice:a.example", "typing": 1 })),
                Ignored::Malformed,
            ),
            (matrix("m.receipt", receipt(json!({ "event_ids": [] }))), Ignored::Malformed),
            (
                matrix("m.receipt", receipt(json!({ "event_ids": ["$e"], "data": { "thread_id": 5 } }))),
                Ignored::Malformed,
            ),
            (matrix("m.receipt", private), Ignored::Unknown),
            (
                matrix("m.presence", json!({ "push": [{ "user_id": "@alice:a.example", "presence": "busy" }] })),
                Ignored::Malformed,
            ),
            (
                matrix("m.direct_to_device", json!({ "sender": "@alice:a.example", "type": "t", "messages": {} })),
                Ignored::Malformed,
            ),
            (matrix("org.example.new", json!({})), Ignored::Unknown),
        ] {
            assert_eq!(read_one(&edu), [Err(expected)], "{edu}");
        }
        let long = matrix("m.typing", json!({ "x": "x".repeat(MAX_TEXT) })).to_string();
        assert_eq!(Edu::read(&long, server_name!("a.example")), [Err(Ignored::Malformed)]);
        assert_eq!(Edu::read("{", server_name!("a.example")), [Err(Ignored::Malformed)]);
        let many: Object =
            (0..=MAX_ENTRIES).map(|n| (format!("@u{n}:a.example"), json!({ "event_ids": ["$e"] }))).collect();
        let many = json!({ "!r:a.example": { "m.read": many } });
        assert_eq!(read_one(&matrix("m.receipt", many)), [Err(Ignored::Malformed)]);
    }
}
