//! Power levels: who may do what in a room of either side, and how a room's levels are called on the other. Pure.

use ruma::{OwnedUserId, UserId};
use serde_json::Value;

use super::side::State;
use super::upgrade::TOMBSTONE;
use crate::event::Object;
use crate::identity::Side;

/// The type of power level events.
pub(super) const POWER_LEVELS: &str = "m.room.power_levels";
/// The bot's level where the gateway made the room: the largest integer that both sides can hold.
pub(super) const BOT_LEVEL: i64 = (1 << 53) - 1;
/// The highest level that anybody else has on either side; between the two are creators of version 12 rooms.
pub(super) const USER_LIMIT: i64 = BOT_LEVEL - 2;
/// The level in a log of the creators of a version 12 room, who stand above all levels there.
pub(super) const CREATOR_LEVEL: i64 = BOT_LEVEL - 1;

/// What only the bot turns on in the gateway's Matrix rooms.
const ENCRYPTION: &str = "m.room.encryption";

/// The type of the event that hands a log over, and the least level that it takes.
const HUB_EVENT: &str = "m.room.hub";
const HUB_LEVEL: i64 = 100;

/// What needs a level of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Ban,
    Invite,
    Kick,
    Redact,
}

/// The levels of a room as they are now.
#[derive(Debug)]
pub(super) struct Power<'a> {
    content: Option<&'a Object>,
    /// Those who stand above all levels (version 12), or the one who has 100 while there are no levels.
    creators: Vec<&'a str>,
    sovereign: bool,
}

impl<'a> Power<'a> {
    /// The levels of a room with this state.
    pub(super) fn of(state: &'a State) -> Self {
        let (creators, sovereign) = creators(state);
        Self { content: state.content(POWER_LEVELS), creators, sovereign }
    }

    /// A user's level.
    pub(super) fn level(&self, user: &UserId) -> i64 {
        let creator = self.creators.contains(&user.as_str());
        if creator && self.sovereign {
            return i64::MAX;
        }
        let Some(content) = self.content else { return if creator { 100 } else { 0 } };
        content
            .get("users")
            .and_then(|users| users.get(user.as_str()))
            .and_then(number)
            .or_else(|| content.get("users_default").and_then(number))
            .unwrap_or(0)
    }

    /// The level that an action needs.
    pub(super) fn needed(&self, action: Action) -> i64 {
        let (key, default) = match action {
            Action::Ban => ("ban", 50),
            Action::Invite => ("invite", 0),
            Action::Kick => ("kick", 50),
            Action::Redact => ("redact", 50),
        };
        self.content.and_then(|content| number(content.get(key)?)).unwrap_or(default)
    }

    /// Whether a user has the level for an action.
    pub(super) fn may(&self, user: &UserId, action: Action) -> bool {
        self.level(user) >= self.needed(action)
    }

    /// Whether a user may kick or ban another.
    pub(super) fn may_remove(&self, user: &UserId, target: &UserId, action: Action) -> bool {
        self.may(user, action) && self.level(user) > self.level(target)
    }

    /// Whether a user has the level to send events of a type.
    pub(super) fn may_send(&self, user: &UserId, kind: &str, is_state: bool) -> bool {
        let own = self.content.and_then(|content| number(content.get("events")?.get(kind)?));
        let (key, default) = if is_state { ("state_default", 50) } else { ("events_default", 0) };
        let needed = own.or_else(|| number(self.content?.get(key)?)).unwrap_or(default);
        self.level(user) >= needed
    }
}

/// Whether the creators of a room stand above all levels and must not be named in them.
pub(super) fn sovereign_creators(create: &Object) -> bool {
    create.get("room_version").and_then(Value::as_str) == Some("12")
}

/// The creators of a room with this state, and whether they stand above all levels.
fn creators(state: &State) -> (Vec<&str>, bool) {
    let create = state.get("m.room.create", "");
    let sovereign = create.is_some_and(|entry| sovereign_creators(entry.content));
    let more = create.and_then(|entry| entry.content.get("additional_creators")?.as_array()).filter(|_| sovereign);
    let more = more.into_iter().flatten().filter_map(Value::as_str);
    (create.iter().map(|entry| entry.sender.as_str()).chain(more).collect(), sovereign)
}

/// Those who stand above all levels of a room with this state (version 12).
pub(super) fn sovereigns(state: &State) -> Vec<OwnedUserId> {
    let (creators, sovereign) = creators(state);
    creators.into_iter().filter(|_| sovereign).filter_map(|user| UserId::parse(user).ok()).collect()
}

/// What the image of a room's levels is made of.
pub(super) struct Levels<'a> {
    /// The levels of the source; none when the room has none.
    pub(super) content: Option<&'a Object>,
    /// The source room's creator, who counts when there are no levels.
    pub(super) creator: Option<&'a UserId>,
    /// How a user of the source's side is called across; none for the bot and for whoever is nobody there.
    pub(super) across: &'a dyn Fn(&UserId) -> Option<OwnedUserId>,
    /// The side across.
    pub(super) to: Side,
    /// The bot and its level on the side across; none where it stands above all levels or has no entry.
    pub(super) bot: Option<(&'a UserId, i64)>,
    /// Those who stand above all levels of the source, by their names there.
    pub(super) sovereigns: &'a [OwnedUserId],
    /// The highest level that anybody else may have across: [`USER_LIMIT`] in an image.
    pub(super) limit: i64,
    /// Whether who has the level may replace the gateway's rooms of the portal.
    pub(super) replaceable: bool,
}

/// The image of a room's power levels: the known keys alone, users by their names across, nobody as high as the bot.
pub(super) fn image(levels: &Levels<'_>) -> Object {
    let mut image = Object::new();
    let mut users = Object::new();
    match levels.content {
        Some(content) => {
            for key in ["ban", "events_default", "invite", "kick", "redact", "state_default"] {
                if let Some(level) = content.get(key).and_then(number) {
                    image.insert(key.to_owned(), clamp(level, BOT_LEVEL).into());
                }
            }
            if let Some(level) = content.get("users_default").and_then(number) {
                image.insert("users_default".to_owned(), clamp(level, levels.limit).into());
            }
            if let Some(events) = content.get("events").and_then(Value::as_object) {
                let events = events
                    .iter()
                    .filter_map(|(kind, level)| Some((kind.clone(), Value::from(clamp(number(level)?, BOT_LEVEL)))));
                image.insert("events".to_owned(), Value::Object(events.collect()));
            }
            for (user, level) in content.get("users").and_then(Value::as_object).into_iter().flatten() {
                let user = UserId::parse(user.as_str()).ok();
                if let (Some(user), Some(level)) = (user.and_then(|user| (levels.across)(&user)), number(level)) {
                    users.insert(user.to_string(), clamp(level, levels.limit).into());
                }
            }
        }
        None => {
            if let Some(creator) = levels.creator.and_then(levels.across) {
                users.insert(creator.to_string(), 100.into());
            }
        }
    }
    for user in levels.sovereigns.iter().filter_map(|user| (levels.across)(user)) {
        users.insert(user.to_string(), CREATOR_LEVEL.into());
    }
    reserve(&mut image, levels.to, levels.replaceable);
    if let Some((bot, level)) = levels.bot {
        users.insert(bot.to_string(), level.into());
    }
    image.insert("users".to_owned(), Value::Object(users));
    image
}

/// What somebody in a log has changed of the levels of a Matrix room that the gateway did not make.
pub(super) struct Change<'a> {
    /// The room's levels; none when it has none.
    pub(super) there: Option<&'a Object>,
    /// The room's creator, who counts when it has no levels.
    pub(super) creator: Option<&'a UserId>,
    /// What the log is to have for these.
    pub(super) image: &'a Object,
    /// What it was given.
    pub(super) wanted: &'a Object,
    /// How a user of the log is called in the Matrix room; none for the bot.
    pub(super) across: &'a dyn Fn(&UserId) -> Option<OwnedUserId>,
    /// Those who stand above all levels of the Matrix room, by their names there, and must not be named in them.
    pub(super) sovereigns: &'a [OwnedUserId],
}

/// The levels with that change and no other: of what does not cross nothing is taken away.
pub(super) fn changed(change: &Change<'_>) -> Object {
    let mut levels = change.there.cloned().unwrap_or_else(|| {
        let creator = change.creator.filter(|_| change.sovereigns.is_empty());
        let users: Object = creator.map(|creator| (creator.to_string(), Value::from(100))).into_iter().collect();
        Object::from_iter([("users".to_owned(), Value::Object(users))])
    });
    let level = |content: &Object, key: &str| content.get(key).and_then(number);
    let keys = ["ban", "events_default", "invite", "kick", "redact", "state_default", "users_default"];
    for key in keys {
        if level(change.image, key) != level(change.wanted, key) {
            set(&mut levels, key, level(change.wanted, key));
        }
    }
    let none = Object::new();
    for part in ["events", "users"] {
        let of = |content: &'_ Object| content.get(part).and_then(Value::as_object).cloned();
        let (image, wanted) = (of(change.image).unwrap_or_default(), of(change.wanted).unwrap_or_default());
        let mut there = of(&levels).unwrap_or_else(|| none.clone());
        for (key, _) in image.iter().chain(wanted.iter().filter(|(key, _)| !image.contains_key(*key))) {
            let new = level(&wanted, key);
            if level(&image, key) == new || key == HUB_EVENT {
                continue;
            }
            if part == "events" {
                set(&mut there, key, new);
                continue;
            }
            let user = UserId::parse(key.as_str()).ok().and_then(|user| (change.across)(&user));
            if let Some(user) = user.filter(|user| !change.sovereigns.contains(user)) {
                set(&mut there, user.as_str(), new.map(|level| clamp(level, USER_LIMIT)));
            }
        }
        if !there.is_empty() || levels.contains_key(part) {
            levels.insert(part.to_owned(), Value::Object(there));
        }
    }
    levels
}

fn set(levels: &mut Object, key: &str, level: Option<i64>) {
    match level {
        Some(level) => drop(levels.insert(key.to_owned(), level.into())),
        None => drop(levels.remove(key)),
    }
}

/// In the gateway's Matrix rooms encryption is the bot's alone to turn on; a log has no such type. So is replacing the room where its
/// log is a foreign hub's, whose room is replaced at the hub. In its logs it takes [`HUB_LEVEL`] to hand them over, whatever Matrix
/// says of an event that it does not have.
fn reserve(image: &mut Object, to: Side, replaceable: bool) {
    if !image.contains_key("events") {
        image.insert("events".to_owned(), Value::Object(Object::new()));
    }
    let Some(events) = image.get_mut("events").and_then(Value::as_object_mut) else { return };
    match to {
        Side::Matrix => drop(events.remove(HUB_EVENT)),
        Side::Lm => {
            let level = events.get(HUB_EVENT).and_then(number).unwrap_or(HUB_LEVEL).max(HUB_LEVEL);
            events.insert(HUB_EVENT.to_owned(), level.into());
        }
    }
    for kind in reserved(replaceable) {
        match to {
            Side::Matrix => drop(events.insert(kind.to_owned(), BOT_LEVEL.into())),
            Side::Lm => drop(events.remove(kind)),
        }
    }
}

/// The types whose levels do not cross.
fn reserved(replaceable: bool) -> impl Iterator<Item = &'static str> {
    [ENCRYPTION].into_iter().chain((!replaceable).then_some(TOMBSTONE))
}

/// A log's own levels for what is the bot's alone in the Matrix room stay when others are set from there.
pub(super) fn keep_reserved(image: &mut Object, there: Option<&Object>, replaceable: bool) {
    let own = there.and_then(|there| there.get("events")?.as_object());
    let Some(events) = image.get_mut("events").and_then(Value::as_object_mut) else { return };
    for kind in reserved(replaceable) {
        if let Some(level) = own.and_then(|own| number(own.get(kind)?)) {
            events.insert(kind.to_owned(), level.into());
        }
    }
}

fn clamp(level: i64, limit: i64) -> i64 {
    level.clamp(-BOT_LEVEL, limit)
}

/// A level, which rooms of versions before 10 may also say in a string.
fn number(level: &Value) -> Option<i64> {
    level.as_i64().or_else(|| level.as_str()?.trim().parse().ok())
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use ruma::user_id;
    use serde_json::json;

    use super::*;
    use crate::dag::GraphEvent;

    /// A state of these (type, state key, sender, content).
    pub(crate) fn state(entries: &[(&str, &str, &str, Value)]) -> State {
        let entries = entries.iter().enumerate().map(|(index, (kind, state_key, sender, content))| {
            let event = GraphEvent {
                event_id: format!("$state{index}").try_into().unwrap(),
                room_id: "!r:h".try_into().unwrap(),
                sender: (*sender).try_into().unwrap(),
                kind: (*kind).to_owned(),
                state_key: Some((*state_key).to_owned()),
                origin_server_ts: 1,
                prev_events: Vec::new(),
                auth_events: Vec::new(),
                depth: 1,
                content: content.as_object().unwrap().clone(),
                redacts: None,
            };
            (((*kind).to_owned(), (*state_key).to_owned()), Arc::new(event))
        });
        State::Graph(Arc::new(entries.collect()))
    }

    #[test]
    fn levels_of_a_room() {
        let levels =
            json!({"users": {"@a:h": 60, "@c:h": 10}, "users_default": 5, "kick": 60, "events": {"m.room.name": 5}});
        let old = state(&[
            ("m.room.create", "", "@c:h", json!({"room_version": "11"})),
            (POWER_LEVELS, "", "@c:h", levels.clone()),
        ]);
        let power = Power::of(&old);
        assert_eq!(power.level(user_id!("@a:h")), 60);
        assert_eq!(power.level(user_id!("@c:h")), 10);
        assert_eq!(power.level(user_id!("@x:h")), 5);
        assert!(power.may_remove(user_id!("@a:h"), user_id!("@x:h"), Action::Kick));
        assert!(!power.may_remove(user_id!("@c:h"), user_id!("@x:h"), Action::Kick));
        assert!(!power.may_remove(user_id!("@a:h"), user_id!("@a:h"), Action::Ban));
        assert!(power.may(user_id!("@x:h"), Action::Invite));
        assert!(!power.may(user_id!("@c:h"), Action::Redact));
        assert!(power.may_send(user_id!("@x:h"), "m.room.name", true));
        assert!(!power.may_send(user_id!("@x:h"), "m.room.topic", true));
        assert!(power.may_send(user_id!("@x:h"), "m.room.message", false));

        let create = json!({"room_version": "12", "additional_creators": ["@d:h"]});
        let new = state(&[("m.room.create", "", "@c:h", create), (POWER_LEVELS, "", "@c:h", levels)]);
        assert_eq!(Power::of(&new).level(user_id!("@c:h")), i64::MAX);
        assert_eq!(Power::of(&new).level(user_id!("@d:h")), i64::MAX);

        let none = state(&[("m.room.create", "", "@c:h", json!({}))]);
        assert_eq!(Power::of(&none).level(user_id!("@c:h")), 100);
        assert_eq!(Power::of(&none).level(user_id!("@a:h")), 0);
    }

    #[test]
    fn the_image_has_known_keys_mapped_users_and_nobody_as_high_as_the_bot() {
        let content = json!({
            "ban": 50, "kick": "50", "users_default": i64::MAX, "notifications": {"room": 50}, "im.isthmus.x": 1,
            "events": {"m.room.name": 50, "x": null, "m.room.encryption": 100, "m.room.hub": 0}, "state_default": -5,
            "users": {"@a:h": BOT_LEVEL, "@isthmus:g": 7, "@stranger:g": 3, "no user": 1},
        });
        let across = |user: &UserId| (user == user_id!("@a:h")).then(|| user_id!("@mx_a_h:g").to_owned());
        let bot = user_id!("@isthmus:g");
        let levels = Levels {
            content: content.as_object(),
            creator: None,
            across: &across,
            to: Side::Lm,
            bot: Some((bot, BOT_LEVEL)),
            sovereigns: &[],
            limit: USER_LIMIT,
            replaceable: false,
        };
        assert_eq!(
            Value::Object(image(&levels)),
            json!({
                "ban": 50, "kick": 50, "users_default": USER_LIMIT, "state_default": -5, "events": {"m.room.name": 50, "m.room.hub": 100},
                "users": {"@mx_a_h:g": USER_LIMIT, "@isthmus:g": BOT_LEVEL},
            })
        );
        let levels = Levels { content: None, creator: Some(user_id!("@a:h")), to: Side::Matrix, bot: None, ..levels };
        assert_eq!(
            Value::Object(image(&levels)),
            json!({
                "users": {"@mx_a_h:g": 100},
                "events": {"m.room.encryption": BOT_LEVEL, "m.room.tombstone": BOT_LEVEL},
            })
        );
    }

    #[test]
    fn who_may_replace_a_room_is_the_same_on_both_sides_where_the_gateway_keeps_the_log() {
        let content = json!({ "events": { "m.room.tombstone": 90, "m.room.encryption": 80 } });
        let of = |to, replaceable| {
            let levels = Levels {
                content: content.as_object(),
                creator: None,
                across: &|_| None,
                to,
                bot: None,
                sovereigns: &[],
                limit: USER_LIMIT,
                replaceable,
            };
            Value::Object(image(&levels))["events"].clone()
        };
        assert_eq!(of(Side::Lm, true), json!({ "m.room.tombstone": 90, "m.room.hub": 100 }));
        assert_eq!(of(Side::Matrix, true), json!({ "m.room.tombstone": 90, "m.room.encryption": BOT_LEVEL }));
        assert_eq!(of(Side::Lm, false), json!({ "m.room.hub": 100 }));
        let reserved = json!({ "m.room.tombstone": BOT_LEVEL, "m.room.encryption": BOT_LEVEL });
        assert_eq!(of(Side::Matrix, false), reserved);

        let mut image = json!({ "events": { "m.room.name": 1 } }).as_object().unwrap().clone();
        keep_reserved(&mut image, content.as_object(), false);
        assert_eq!(
            Value::Object(image),
            json!({ "events": {
            "m.room.name": 1, "m.room.tombstone": 90, "m.room.encryption": 80 } })
        );
    }
}
