//! EDUs as they are read: what is wrong with one entry is said of that entry alone.

use ruma::{OwnedUserId, RoomId, ServerName, UserId};
use serde_json::Value;

use super::{Edu, Ignored, Presence, Receipt, ToDevice, Typing};
use crate::event::{Object, event_id};

/// How many things one EDU may say: receipts, presences, messages for devices.
pub(super) const MAX_ENTRIES: usize = 1_000;
/// How long a device's ID, a message's ID or type, or a status may be, in bytes.
const MAX_NAME: usize = 255;
const MAX_STATUS: usize = 1_024;

type Entries = Vec<Result<Edu, Ignored>>;

/// None when it has not the form of an EDU.
pub(super) fn read(mut edu: Object, origin: &ServerName) -> Option<Entries> {
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
