//! The translator: a pure function of an event and of what the mapping tables say about the users and events it names. It
//! gives the image's type, state key and content, or the reason why there is none.

mod content;
mod state;

use std::collections::{BTreeSet, HashMap};

use ruma::{EventId, OwnedEventId, OwnedUserId, RoomId, UserId};
use serde_json::{Value, json};

use super::pins::{self, PINNED};
use super::side::{Event, MEMBER};
use super::upgrade::TOMBSTONE;
use super::users::{Known, Who};
use crate::event::Object;
use crate::identity::{MediaNames, Side};
use crate::refusal::Refusal;

pub(super) use self::content::OWN_PREFIX;
pub(super) use self::state::{MAPPED_STATE, StateRules, member_content, state_content};

/// The key of the provenance in the content of images. Nothing ever decides by it.
pub(super) const SOURCE: &str = "im.isthmus.source";
/// The longest type, in bytes.
const TYPE_LIMIT: usize = 255;
/// Types that never cross, whatever their content.
const NEVER: [&str; 8] = [
    "m.room.create",
    "m.room.encryption",
    "m.room.encrypted",
    "m.room.third_party_invite",
    "m.room.hub",
    "m.mls.commit",
    "m.room.server_acl",
    "m.room.aliases",
];

/// What an event names, to be looked up before it is translated.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct References {
    /// Its sender, its target, and whoever is mentioned.
    pub(super) users: BTreeSet<OwnedUserId>,
    /// Events in it, whatever for.
    pub(super) events: BTreeSet<OwnedEventId>,
    /// Those among them that it relates to or redacts: it waits for them.
    pub(super) needs: Vec<OwnedEventId>,
}

/// What the mapping tables say.
pub(super) struct Lookups<'a> {
    /// Who the users are on the source's side.
    pub(super) users: &'a Known,
    /// How events of the source's side are called across: the image of a source, the source of an image.
    pub(super) events: &'a HashMap<OwnedEventId, OwnedEventId>,
    /// The room on the source's side and across.
    pub(super) rooms: (&'a RoomId, &'a RoomId),
    /// How files are called across.
    pub(super) media: MediaTo<'a>,
}

/// How files are called on a side: its servers can ask the gateway for them, and seldom the servers of the other side.
#[derive(Debug, Clone, Copy)]
pub(super) struct MediaTo<'a> {
    pub(super) names: &'a MediaNames,
    pub(super) to: Side,
}

impl MediaTo<'_> {
    /// A text, which is another one if it is the URI of a file.
    fn uri(&self, text: &str) -> String {
        self.names.across(text, self.to).into_owned()
    }

    /// HTML, in which the URIs of files may stand anywhere.
    fn html(&self, text: &str) -> String {
        self.names.within(text, self.to).into_owned()
    }
}

/// What becomes of a message-like event.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Image {
    pub(super) kind: String,
    pub(super) content: Object,
    /// What was left out.
    pub(super) note: Option<String>,
}

/// Whom `event` is by and about: its sender, its target, those to whom it gives power.
pub(super) fn concerned(event: &Event) -> BTreeSet<OwnedUserId> {
    let mut users = BTreeSet::from([event.sender.clone()]);
    if event.kind == MEMBER {
        users.extend(event.state_key.as_deref().and_then(|target| UserId::parse(target).ok()));
    }
    if event.kind == super::power::POWER_LEVELS && event.state_key.is_some() {
        let powerful = event.content.get("users").and_then(Value::as_object).into_iter().flatten();
        users.extend(powerful.filter_map(|(user, _)| UserId::parse(user.as_str()).ok()));
    }
    users
}

/// What `event` names.
pub(super) fn references(event: &Event) -> References {
    let mut references = References { users: concerned(event), ..References::default() };
    match &event.state_key {
        None => content::collect(&event.content, &mut references),
        Some(_) if event.kind == PINNED => references.needs.extend(pins::waited_for(&event.content)),
        Some(_) => {}
    }
    if let Some(target) = &event.redacts {
        references.events.insert(target.clone());
        references.needs.push(target.clone());
    }
    references
}

/// Whether events of this type and form can cross at all.
pub(super) fn crosses(event: &Event) -> Result<(), Refusal> {
    let kind = event.kind.as_str();
    if kind.len() > TYPE_LIMIT {
        return Err(Refusal::TooLarge { what: "the type", size: kind.len(), limit: TYPE_LIMIT });
    }
    if kind.starts_with(OWN_PREFIX) || NEVER.contains(&kind) {
        return Err(Refusal::NotBridged(format!("the type {kind:?}")));
    }
    let state = matches!(kind, MEMBER | TOMBSTONE) || MAPPED_STATE.contains(&kind);
    match &event.state_key {
        Some(_) if kind == MEMBER => Ok(()),
        Some(key) if state && key.is_empty() => Ok(()),
        Some(key) => Err(Refusal::NotBridged(format!("state of type {kind:?} with the state key {key:?}"))),
        None if state => Err(Refusal::NotBridged(format!("the type {kind:?} without a state key"))),
        None => Ok(()),
    }
}

/// Translates a message-like event that is no redaction.
pub(super) fn message(event: &Event, lookups: &Lookups<'_>) -> Result<Image, Refusal> {
    if event.content.is_empty() && event.kind.starts_with("m.") {
        return Err(Refusal::NotBridged(format!("a {} without content, as redaction leaves it,", event.kind)));
    }
    let (mut content, note) = content::translate(event, lookups)?;
    content.insert(SOURCE.to_owned(), provenance(event));
    Ok(Image { kind: event.kind.clone(), content, note })
}

/// Translates a redaction of an event that is called `target` across.
pub(super) fn redaction(event: &Event, target: &EventId) -> Image {
    let mut content = Object::new();
    content.insert("redacts".to_owned(), json!(target));
    if let Some(reason) = event.content.get("reason").and_then(Value::as_str) {
        content.insert("reason".to_owned(), json!(state::shorten(reason)));
    }
    content.insert(SOURCE.to_owned(), provenance(event));
    Image { kind: event.kind.clone(), content, note: None }
}

/// Where an image comes from.
pub(super) fn provenance(event: &Event) -> Value {
    json!({
        "room_id": event.room_id,
        "event_id": event.event_id,
        "sender": event.sender,
        "origin_server_ts": event.origin_server_ts,
    })
}

/// The time of an image: the source's, but never in the future, since a receiver takes no key for a time after its
/// validity, and never before the epoch.
pub(super) fn time(origin_server_ts: i64, now_ms: i64) -> i64 {
    origin_server_ts.min(now_ms).max(0)
}

/// How `user` is called across, as far as it was looked up.
pub(super) fn across(known: &Known, user: &UserId) -> Option<OwnedUserId> {
    match known.get(user)? {
        Who::Native { ghost } => Some(ghost.clone()),
        Who::Ghost { user } => Some(user.clone()),
        // The bot is the same on both sides.
        Who::Bot => Some(user.to_owned()),
        Who::Appservice | Who::Stranger => None,
    }
}

#[cfg(test)]
mod tests;
