//! State events: their content is rebuilt from a whitelist, never copied.

use ruma::{OwnedUserId, UserId};
use serde_json::{Value, json};

use super::MediaTo;
use crate::bridge::alias::{self, Aliases};
use crate::bridge::pins::{PINNED, Pins};
use crate::bridge::power::{self, Levels, POWER_LEVELS};
use crate::event::Object;
use crate::identity::Side;

/// The state, besides members, that is kept in step; all with an empty state key.
pub(in crate::bridge) const MAPPED_STATE: [&str; 9] = [
    POWER_LEVELS,
    "m.room.join_rules",
    "m.room.history_visibility",
    "m.room.name",
    "m.room.topic",
    "m.room.avatar",
    PINNED,
    "m.room.guest_access",
    CANONICAL_ALIAS,
];
const CANONICAL_ALIAS: &str = "m.room.canonical_alias";
/// The longest text that is taken over in state, in characters.
const TEXT_LIMIT: usize = 2_000;

/// What the image of a state event depends on besides its content.
pub(in crate::bridge) struct StateRules<'a> {
    /// The creator of the source's room.
    pub(in crate::bridge) creator: Option<&'a UserId>,
    /// How users of the source's side are called across; none for the bot.
    pub(in crate::bridge) across: &'a dyn Fn(&UserId) -> Option<OwnedUserId>,
    /// The side across.
    pub(in crate::bridge) to: Side,
    /// The bot's entry in the power levels across.
    pub(in crate::bridge) bot: Option<(&'a UserId, i64)>,
    /// Those who stand above all levels of the source.
    pub(in crate::bridge) sovereigns: &'a [OwnedUserId],
    /// The highest level that anybody else may have across.
    pub(in crate::bridge) limit: i64,
    /// Whether the room across asks the source's room about everybody who comes in, so that it need not say itself who meets conditions.
    pub(in crate::bridge) asks: bool,
    /// Whether who has the level may replace the gateway's rooms of the portal.
    pub(in crate::bridge) replaceable: bool,
    /// How files are called across; none where they are called so already.
    pub(in crate::bridge) media: Option<MediaTo<'a>>,
    /// How what is pinned is called across.
    pub(in crate::bridge) pins: Pins<'a>,
    /// How aliases are called across; none where they are called so already.
    pub(in crate::bridge) aliases: Option<Aliases<'a>>,
}

impl StateRules<'_> {
    /// Those of state in which nobody and nothing is called otherwise across, as of what the gateway itself says.
    pub(in crate::bridge) fn plain(to: Side) -> Self {
        StateRules {
            creator: None,
            across: &|_| None,
            to,
            bot: None,
            sovereigns: &[],
            limit: power::USER_LIMIT,
            asks: false,
            replaceable: false,
            media: None,
            pins: Pins::Unknown,
            aliases: None,
        }
    }
}

/// The content that the image of state of a mapped type has; `content` is none when the source's room has none. None when
/// the room across should have none either.
pub(in crate::bridge) fn state_content(kind: &str, content: Option<&Object>, rules: &StateRules<'_>) -> Option<Object> {
    let text = |key: &str| content.and_then(|content| content.get(key)?.as_str());
    match kind {
        POWER_LEVELS => Some(power::image(&Levels {
            content,
            creator: rules.creator,
            across: rules.across,
            to: rules.to,
            bot: rules.bot,
            sovereigns: rules.sovereigns,
            limit: rules.limit,
            replaceable: rules.replaceable,
        })),
        "m.room.join_rules" => Some(object("join_rule", join_rule(text("join_rule"), rules.asks))),
        "m.room.history_visibility" => {
            Some(object("history_visibility", history_visibility(text("history_visibility"))))
        }
        "m.room.name" => content.map(|_| object("name", &shorten(text("name").unwrap_or_default()))),
        "m.room.topic" => content.map(|_| object("topic", &shorten(text("topic").unwrap_or_default()))),
        "m.room.avatar" => content.map(|_| match text("url") {
            Some(url) => object("url", &rules.media.map_or_else(|| shorten(url), |media| media.uri(&shorten(url)))),
            None => Object::new(),
        }),
        PINNED => rules.pins.content(content?),
        // Nobody is a guest who is not let in by this.
        "m.room.guest_access" => content.map(|_| {
            let is_open = text("guest_access") == Some("can_join");
            object("guest_access", if is_open { "can_join" } else { "forbidden" })
        }),
        CANONICAL_ALIAS => match rules.aliases {
            Some(aliases) => aliases.image(content, rules.to),
            None => content.map(alias::as_image),
        },
        _ => None,
    }
}

/// The content of the image of a member event.
pub(in crate::bridge) fn member_content(content: &Object, membership: &str, media: MediaTo<'_>) -> Object {
    let mut image = object("membership", membership);
    for key in ["displayname", "avatar_url", "reason"] {
        if let Some(text) = content.get(key).and_then(Value::as_str) {
            let text = shorten(text);
            let text = if key == "avatar_url" { media.uri(&text) } else { text };
            image.insert(key.to_owned(), text.into());
        }
    }
    if let Some(direct) = content.get("is_direct").and_then(Value::as_bool) {
        image.insert("is_direct".to_owned(), direct.into());
    }
    image
}

/// A join rule that is no wider than `rule`, but where who joins is asked about, and that both sides have.
fn join_rule(rule: Option<&str>, asks: bool) -> &'static str {
    match rule {
        Some("public") => "public",
        Some("restricted") if asks => "public",
        Some("knock" | "knock_restricted") => "knock",
        _ => "invite",
    }
}

fn history_visibility(visibility: Option<&str>) -> &'static str {
    match visibility {
        Some("invited") => "invited",
        Some("joined") => "joined",
        Some("world_readable") => "world_readable",
        _ => "shared",
    }
}

/// At most [`TEXT_LIMIT`] characters of a text.
pub(super) fn shorten(text: &str) -> String {
    text.chars().take(TEXT_LIMIT).collect()
}

fn object(key: &str, value: &str) -> Object {
    let mut object = Object::new();
    object.insert(key.to_owned(), json!(value));
    object
}
