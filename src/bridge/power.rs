//! Power levels: who may do what in a room of either side, and how a room's levels are called on the other. Pure.

use ruma::{OwnedUserId, UserId};
use serde_json::Value;

use super::side::State;
use crate::event::Object;
use crate::identity::Side;

/// The type of power level events.
pub(super) const POWER_LEVELS: &str = "m.room.power_levels";
/// The bot's level where the gateway made the room: the largest integer that both sides can hold.
pub(super) const BOT_LEVEL: i64 = (1 << 53) - 1;
/// The highest level that anybody else has on either side; between the two are creators of version 12 rooms.
pub(super) const USER_LIMIT: i64 = BOT_LEVEL - 2;

/// Types that only the bot sends in the gateway's Matrix rooms.
const RESERVED: [&str; 2] = ["m.room.encryption", "m.room.tombstone"];

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
        let create = state.get("m.room.create", "");
        let sovereign = create.is_some_and(|entry| sovereign_creators(entry.content));
        let mut creators: Vec<&str> = create.iter().map(|entry| entry.sender.as_str()).collect();
        if let Some(more) =
            create.and_then(|entry| entry.content.get("additional_creators")?.as_array()).filter(|_| sovereign)
        {
            creators.extend(more.iter().filter_map(Value::as_str));
        }
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
            .and_then(Value::as_i64)
            .or_else(|| content.get("users_default").and_then(Value::as_i64))
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
        self.content.and_then(|content| content.get(key)?.as_i64()).unwrap_or(default)
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
        let own = self.content.and_then(|content| content.get("events")?.get(kind)?.as_i64());
        let (key, default) = if is_state { ("state_default", 50) } else { ("events_default", 0) };
        let needed = own.or_else(|| self.content?.get(key)?.as_i64()).unwrap_or(default);
        self.level(user) >= needed
    }
}

/// Whether the creators of a room stand above all levels and must not be named in them.
pub(super) fn sovereign_creators(create: &Object) -> bool {
    create.get("room_version").and_then(Value::as_str) == Some("12")
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
}

/// The image of a room's power levels: the known keys alone, users by their names across, nobody as high as the bot.
pub(super) fn image(levels: &Levels<'_>) -> Object {
    let mut image = Object::new();
    let mut users = Object::new();
    match levels.content {
        Some(content) => {
            for key in ["ban", "events_default", "invite", "kick", "redact", "state_default"] {
                if let Some(level) = content.get(key).and_then(Value::as_i64) {
                    image.insert(key.to_owned(), clamp(level, BOT_LEVEL).into());
                }
            }
            if let Some(level) = content.get("users_default").and_then(Value::as_i64) {
                image.insert("users_default".to_owned(), clamp(level, USER_LIMIT).into());
            }
            if let Some(events) = content.get("events").and_then(Value::as_object) {
                let events = events
                    .iter()
                    .filter_map(|(kind, level)| Some((kind.clone(), Value::from(clamp(level.as_i64()?, BOT_LEVEL)))));
                image.insert("events".to_owned(), Value::Object(events.collect()));
            }
            for (user, level) in content.get("users").and_then(Value::as_object).into_iter().flatten() {
                let user = UserId::parse(user.as_str()).ok();
                if let (Some(user), Some(level)) = (user.and_then(|user| (levels.across)(&user)), level.as_i64()) {
                    users.insert(user.to_string(), clamp(level, USER_LIMIT).into());
                }
            }
        }
        None => {
            if let Some(creator) = levels.creator.and_then(levels.across) {
                users.insert(creator.to_string(), 100.into());
            }
        }
    }
    reserve(&mut image, levels.to);
    if let Some((bot, level)) = levels.bot {
        users.insert(bot.to_string(), level.into());
    }
    image.insert("users".to_owned(), Value::Object(users));
    image
}

/// In the gateway's Matrix rooms these are the bot's alone; the log has no such types. In its logs it takes [`HUB_LEVEL`] to hand them
/// over, whatever Matrix says of an event that it does not have.
fn reserve(image: &mut Object, to: Side) {
    if !image.contains_key("events") {
        image.insert("events".to_owned(), Value::Object(Object::new()));
    }
    let Some(events) = image.get_mut("events").and_then(Value::as_object_mut) else { return };
    match to {
        Side::Matrix => drop(events.remove(HUB_EVENT)),
        Side::Lm => {
            let level = events.get(HUB_EVENT).and_then(Value::as_i64).unwrap_or(HUB_LEVEL).max(HUB_LEVEL);
            events.insert(HUB_EVENT.to_owned(), level.into());
        }
    }
    for kind in RESERVED {
        match to {
            Side::Matrix => drop(events.insert(kind.to_owned(), BOT_LEVEL.into())),
            Side::Lm => drop(events.remove(kind)),
        }
    }
}

fn clamp(level: i64, limit: i64) -> i64 {
    level.clamp(-BOT_LEVEL, limit)
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
        };
        assert_eq!(
            Value::Object(image(&levels)),
            json!({
                "ban": 50, "users_default": USER_LIMIT, "state_default": -5, "events": {"m.room.name": 50, "m.room.hub": 100},
                "users": {"@mx_a_h:g": USER_LIMIT, "@isthmus:g": BOT_LEVEL},
            })
        );
        let levels =
            Levels { content: None, creator: Some(user_id!("@a:h")), across: &across, to: Side::Matrix, bot: None };
        assert_eq!(
            Value::Object(image(&levels)),
            json!({
                "users": {"@mx_a_h:g": 100},
                "events": {"m.room.encryption": BOT_LEVEL, "m.room.tombstone": BOT_LEVEL},
            })
        );
    }
}
