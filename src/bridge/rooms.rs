//! What the rooms look like that the gateway makes: their version, power levels, join rules and name.

use ruma::{ServerName, UserId};
use serde_json::{Value, json};

use super::core::Core;
use super::from_matrix;
use super::portal::Request;
use super::power::{self, BOT_LEVEL, POWER_LEVELS};
use super::side::{MEMBER, State};
use super::translate::{MAPPED_STATE, StateRules, across, state_content};
use super::upgrade::TOMBSTONE;
use super::users::Known;
use crate::event::{Object, RoomVersion};
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::seam::Draft;
use crate::{dag, lm};

/// Both rooms of a portal that is to be created.
pub(super) struct Both<'a> {
    pub(super) core: &'a Core,
    pub(super) request: &'a Request,
    pub(super) alias: Option<&'a str>,
}

impl Both<'_> {
    /// The LM room, with the gateway as its hub.
    pub(super) fn lm(&self) -> Result<lm::NewRoom, Refusal> {
        let version = self.request.lm_room_version.as_deref().and_then(RoomVersion::parse).unwrap_or(RoomVersion::Lm02);
        let levels = levels(Side::Lm, Some((self.core.users.bot(), BOT_LEVEL)), true);
        Ok(lm::NewRoom { creator: self.core.users.bot().clone(), version, initial_state: self.state(levels) })
    }

    /// One room for both.
    pub(super) fn shared(&self) -> Result<lm::NewRoom, Refusal> {
        let lm::NewRoom { creator, version, .. } = self.lm()?;
        let levels = levels(Side::Lm, Some((self.core.users.bot(), BOT_LEVEL)), true);
        Ok(lm::NewRoom { creator, version, initial_state: self.state(levels) })
    }

    /// The Matrix room.
    pub(super) fn matrix(&self) -> Result<dag::NewRoom, Refusal> {
        let version = matrix_version(self.core, self.request)?;
        let levels = levels(Side::Matrix, bot_in_graph(self.core, version), true);
        Ok(dag::NewRoom { creator: self.core.users.bot().clone(), version, initial_state: self.state(levels) })
    }

    fn state(&self, levels: Object) -> Vec<Draft> {
        let alias = self.alias.map(|localpart| format!("#{localpart}:{}", self.core.context.server_name));
        let rule = self.request.join_rule.as_deref().unwrap_or("invite");
        let mut state = vec![
            (POWER_LEVELS, Value::Object(levels)),
            ("m.room.join_rules", json!({ "join_rule": rule })),
            ("m.room.history_visibility", json!({ "history_visibility": "shared" })),
        ];
        if let Some(alias) = alias {
            state.push(("m.room.canonical_alias", json!({ "alias": alias })));
        }
        if let Some(name) = &self.request.name {
            state.push(("m.room.name", json!({ "name": name })));
        }
        let rest = state.into_iter().map(|(kind, content)| draft(self.core, kind, content));
        founding(self.core, self.request).into_iter().chain(rest).collect()
    }
}

/// The Matrix room of an LM room that has this state: rules no wider, the same name and topic, and an address by which
/// it is found.
pub(super) fn matrix_of_lm(
    core: &Core,
    state: &State,
    users: &Known,
    alias: Option<&str>,
    request: &Request,
) -> Result<dag::NewRoom, Refusal> {
    let version = matrix_version(core, &Request::default())?;
    let bot = core.users.bot();
    let mapped = |user: &UserId| across(users, user).filter(|_| user != bot);
    let creator = state.get("m.room.create", "").map(|entry| entry.sender);
    let bot_there = bot_in_graph(core, version);
    let alias = alias.map(|localpart| format!("#{localpart}:{}", core.context.server_name));
    let rules = StateRules {
        creator,
        across: &mapped,
        bot: bot_there,
        media: Some(core.media(Side::Matrix)),
        aliases: Some(core.aliases(alias.as_deref())),
        ..StateRules::plain(Side::Matrix)
    };
    let mapped = MAPPED_STATE
        .iter()
        .filter_map(|kind| Some(draft(core, kind, Value::Object(state_content(kind, state.content(kind), &rules)?))));
    let initial_state = founding(core, request).into_iter().chain(mapped).collect();
    Ok(dag::NewRoom { creator: bot.clone(), version, initial_state })
}

/// The LM room of a Matrix room that has this state, hubbed here: rules no wider, the same name and topic.
pub(super) fn lm_of_matrix(core: &Core, state: &State, users: &Known, request: &Request) -> lm::NewRoom {
    let bot = core.users.bot();
    let mapped = |user: &UserId| across(users, user).filter(|_| user != bot);
    let creator = state.get("m.room.create", "").map(|entry| entry.sender);
    let sovereigns = power::sovereigns(state);
    let rules = StateRules {
        creator,
        across: &mapped,
        bot: Some((bot, BOT_LEVEL)),
        sovereigns: &sovereigns,
        asks: true,
        replaceable: true,
        media: Some(core.media(Side::Lm)),
        aliases: Some(core.aliases(None)),
        ..StateRules::plain(Side::Lm)
    };
    let mapped = MAPPED_STATE
        .iter()
        .filter_map(|kind| Some(draft(core, kind, Value::Object(state_content(kind, state.content(kind), &rules)?))));
    let initial_state = founding(core, request).into_iter().chain(mapped).collect();
    lm::NewRoom { creator: bot.clone(), version: RoomVersion::Lm02, initial_state }
}

/// The LM room of a pending portal, hubbed here: what is shown of the Matrix room, and nobody in it yet but the bot.
pub(super) fn provisional_log(core: &Core, shown: &[(String, Object)], inviter: &UserId) -> lm::NewRoom {
    let bot = core.users.bot();
    let initial_state = provisional(core, Side::Lm, shown, inviter, Some((bot, BOT_LEVEL)));
    lm::NewRoom { creator: bot.clone(), version: RoomVersion::Lm02, initial_state }
}

/// The Matrix room of a pending portal. Clients leave the bot out of what they call a room without a name (MSC4171).
pub(super) fn provisional_graph(
    core: &Core,
    shown: &[(String, Object)],
    inviter: &UserId,
) -> Result<dag::NewRoom, Refusal> {
    let (version, bot) = (matrix_version(core, &Request::default())?, core.users.bot());
    let mut initial_state = provisional(core, Side::Matrix, shown, inviter, bot_in_graph(core, version));
    initial_state.push(draft(core, "io.element.functional_members", json!({ "service_members": [bot] })));
    Ok(dag::NewRoom { creator: bot.clone(), version, initial_state })
}

fn provisional(
    core: &Core,
    to: Side,
    shown: &[(String, Object)],
    inviter: &UserId,
    bot: Option<(&UserId, i64)>,
) -> Vec<Draft> {
    let mut levels = levels(to, bot, to == Side::Lm);
    // Who invites may take that back.
    let users = levels.entry("users").or_insert_with(|| json!({}));
    if let Some(users) = users.as_object_mut() {
        users.insert(inviter.to_string(), json!(50));
    }
    let rules = StateRules { replaceable: to == Side::Lm, media: Some(core.media(to)), ..StateRules::plain(to) };
    let shown = shown.iter().filter(|(kind, _)| kind != POWER_LEVELS && MAPPED_STATE.contains(&kind.as_str()));
    let shown = shown.filter_map(|(kind, content)| Some((kind.as_str(), state_content(kind, Some(content), &rules)?)));
    let fixed = [
        (POWER_LEVELS, levels),
        ("m.room.join_rules", Object::from_iter([("join_rule".to_owned(), json!("invite"))])),
        ("m.room.history_visibility", Object::from_iter([("history_visibility".to_owned(), json!("shared"))])),
    ];
    let rest = fixed.into_iter().chain(shown).map(|(kind, content)| draft(core, kind, Value::Object(content)));
    founding(core, &Request::default()).into_iter().chain(rest).collect()
}

/// The space of an LM hub: anybody may look in and join, and nobody but the bot says anything.
pub(super) fn space_of_hub(core: &Core, hub: &ServerName, address: &str) -> Result<dag::NewRoom, Refusal> {
    let (version, bot) = (matrix_version(core, &Request::default())?, core.users.bot());
    let mut levels = levels(Side::Matrix, bot_in_graph(core, version), false);
    for key in ["events_default", "state_default"] {
        levels.insert(key.to_owned(), 100.into());
    }
    let topic = format!("The rooms of {hub} that are connected with Matrix by {}.", core.context.server_name);
    let state = [
        ("m.room.create", json!({ "type": "m.space" })),
        (POWER_LEVELS, Value::Object(levels)),
        ("m.room.join_rules", json!({ "join_rule": "public" })),
        ("m.room.history_visibility", json!({ "history_visibility": "world_readable" })),
        ("m.room.name", json!({ "name": format!("{hub} (Linearized Matrix)") })),
        ("m.room.topic", json!({ "topic": topic })),
        ("m.room.canonical_alias", json!({ "alias": address })),
    ];
    let state = state.into_iter().map(|(kind, content)| draft(core, kind, content));
    let initial_state = founding(core, &Request::default()).into_iter().chain(state).collect();
    Ok(dag::NewRoom { creator: bot.clone(), version, initial_state })
}

/// The version of a Matrix room that is to be made.
fn matrix_version(core: &Core, request: &Request) -> Result<RoomVersion, Refusal> {
    let wanted = request.matrix_room_version.as_ref().unwrap_or(&core.context.config.portals.matrix_room_version);
    match RoomVersion::parse(wanted) {
        Some(version @ (RoomVersion::V10 | RoomVersion::V11 | RoomVersion::V12)) => Ok(version),
        _ => Err(Refusal::IncompatibleRoomVersion(wanted.clone())),
    }
}

/// The bot's entry in the levels of a Matrix room: none where creators stand above all levels.
fn bot_in_graph(core: &Core, version: RoomVersion) -> Option<(&UserId, i64)> {
    (version != RoomVersion::V12).then_some((core.users.bot().as_ref(), BOT_LEVEL))
}

/// The levels of a new room. All are written out, so that the two rooms' events stay alike key by key.
fn levels(to: Side, bot: Option<(&UserId, i64)>, replaceable: bool) -> Object {
    let plain = json!({
        "ban": 50, "kick": 50, "redact": 50, "invite": 0,
        "state_default": 50, "events_default": 0, "users_default": 0,
        "events": {
            "m.room.power_levels": 100,
            "m.room.history_visibility": 100,
            "m.room.server_acl": 100,
            TOMBSTONE: 100,
        },
    });
    let rules = StateRules { bot, replaceable, ..StateRules::plain(to) };
    state_content(POWER_LEVELS, plain.as_object(), &rules).unwrap_or_default()
}

/// What a room begins with: the one that it follows, and what the bot is called.
fn founding(core: &Core, request: &Request) -> Vec<Draft> {
    let bot = core.users.bot();
    let create = request.predecessor.as_ref().map(|predecessor| json!({ "predecessor": { "room_id": predecessor } }));
    let create = create.map(|content| draft(core, "m.room.create", content));
    let mut join = from_matrix::bot_content();
    join.insert("membership".to_owned(), "join".into());
    create.into_iter().chain([core.draft(bot, MEMBER, Some(bot.as_str()), join)]).collect()
}

fn draft(core: &Core, kind: &str, content: Value) -> Draft {
    let content = match content {
        Value::Object(content) => content,
        _ => Object::new(),
    };
    core.draft(core.users.bot(), kind, Some(""), content)
}
