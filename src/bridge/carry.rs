//! What is to be done with one event so that it crosses: a pure function of the event, both rooms' current states and the
//! mapping tables. Members are in [`super::member`].

use std::collections::HashMap;

use ruma::{OwnedEventId, OwnedUserId, RoomId, UserId};
use serde_json::{Value, json};

use super::acl::SERVER_ACL;
use super::alias::Aliases;
use super::pins::{self, Counterparts, PINNED, Pins};
use super::power::{self, Action, CREATOR_LEVEL, POWER_LEVELS, Power, USER_LIMIT};
use super::side::{Entry, Event, Key, MEMBER, State};
use super::translate::{self, Image, Lookups, MediaTo, SOURCE, StateRules};
use super::upgrade::TOMBSTONE;
use super::users::{Known, Who};
use super::{loops, member};
use crate::event::Object;
use crate::identity::{MediaNames, Side};
use crate::lm::Coming;
use crate::refusal::Refusal;
use crate::seam::Draft;

/// The type of the event that turns a Matrix room's encryption on.
pub(super) const ENCRYPTION: &str = "m.room.encryption";

/// One event, and all that its crossing depends on.
pub(super) struct Case<'a> {
    pub(super) event: &'a Event,
    /// The side that it is from.
    pub(super) source: Side,
    /// The side whose state the other side follows.
    pub(super) authority: Side,
    /// Whether the bot invites into the room across whom its own room has let in. Else that room decides for itself, and what its
    /// state says beyond what crosses is left alone.
    pub(super) lets_in: bool,
    /// Whether the bot is in the room across.
    pub(super) bot_is_there: bool,
    /// Whether who joins the room across is asked about here.
    pub(super) asks: bool,
    /// Whether the room that the event is of lives elsewhere, so that who replaces it asks nobody here.
    pub(super) is_elsewhere: bool,
    /// Whether who has the level may replace the gateway's rooms of the portal.
    pub(super) replaceable: bool,
    /// Who those are in the room across to whom it gives power, where what crosses changes that.
    pub(super) far_users: &'a Known,
    /// The current state of its room.
    pub(super) near: &'a State,
    /// The current state of the room across.
    pub(super) far: &'a State,
    /// Whether `far` holds all that was sent there: not while LPDUs are on their way to a hub.
    pub(super) settled: bool,
    /// Of the members across of whom something is on its way there, the last of it.
    pub(super) ahead: &'a HashMap<OwnedUserId, Coming>,
    /// The users it names.
    pub(super) users: &'a Known,
    /// How the events it names are called across.
    pub(super) events: &'a HashMap<OwnedEventId, OwnedEventId>,
    /// How aliases are called across.
    pub(super) aliases: Aliases<'a>,
    /// How what is pinned in either room is called across, where the event is about that.
    pub(super) pins: &'a Counterparts,
    /// What it redacts.
    pub(super) redacted: Option<&'a Event>,
    /// The room across.
    pub(super) far_room: &'a RoomId,
    pub(super) bot: &'a UserId,
    pub(super) media: &'a MediaNames,
    pub(super) now_ms: i64,
}

/// A ghost's join or the bot's invite that must come before an image.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Before {
    pub(super) draft: Draft,
    /// The event whose image it is, if it is one and that has none yet.
    pub(super) source: Option<OwnedEventId>,
}

/// How an event crosses.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Crossing {
    /// What is sent first.
    pub(super) before: Vec<Before>,
    /// The image.
    pub(super) image: Draft,
    /// The image if that one is refused.
    pub(super) instead: Option<Draft>,
    /// Whether it is an invite for a user of another server, which is asked first.
    pub(super) asks_server: bool,
    /// What was left out.
    pub(super) note: Option<String>,
}

/// What is to be done with an event.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Outcome {
    /// It crosses.
    Cross(Box<Crossing>),
    /// What it asks for was already done by this event of the room across, which is its image unless that has a source.
    Adopt(OwnedEventId),
    /// There is nothing to be done across.
    Nothing(&'static str),
    /// It does not cross.
    Refuse(Refusal),
    /// The portal stops.
    Suspend(String),
}

/// What is to be done with the event of `case`.
pub(super) fn outcome(case: &Case<'_>) -> Outcome {
    if let Some((target, membership)) = case.event.membership() {
        return member::outcome(case, &target, membership);
    }
    if case.event.kind == MEMBER {
        return Outcome::Refuse(Refusal::malformed("content.membership", "is missing, or the state key is no user ID"));
    }
    let ghost = match case.users.get(&case.event.sender) {
        Some(Who::Native { ghost }) => ghost.as_ref(),
        Some(Who::Appservice) => return Outcome::Nothing("the appservice's sender is nobody across"),
        _ => return Outcome::Refuse(stranger(&case.event.sender)),
    };
    if let Some(reason) = gone(case) {
        return Outcome::Nothing(reason);
    }
    let says = case.event.state_key.is_none() && case.source == Side::Lm;
    if let Some(encryption) = case.far.content(ENCRYPTION).filter(|_| says) {
        // Nothing that is said is sent on in the clear.
        let algorithm = encryption.get("algorithm").and_then(Value::as_str).unwrap_or("unknown");
        return Outcome::Refuse(Refusal::Encryption(algorithm.chars().take(100).collect()));
    }
    let crossing = match &case.event.state_key {
        Some(_) if case.event.kind == TOMBSTONE => return tombstone(case, ghost),
        Some(_) => return state(case, ghost),
        None if case.event.kind == "m.room.redaction" => redaction(case, ghost),
        None => message(case),
    };
    let (image, before) = match crossing.and_then(|image| Ok((image, speaking(case, ghost)?))) {
        Ok(parts) => parts,
        Err(refusal) => return Outcome::Refuse(refusal),
    };
    let draft = case.draft(ghost, &image.kind, None, image.content);
    Outcome::Cross(Box::new(Crossing { before, image: draft, instead: None, asks_server: false, note: image.note }))
}

/// The parts of both rooms' states that the crossing of `event` may depend on: of its own room, and of the one across.
pub(super) fn reads(event: &Event, users: &Known, bot: &UserId) -> (Vec<Key>, Vec<Key>) {
    let whole = |kind: &str| (kind.to_owned(), String::new());
    let member = |user: &UserId| (MEMBER.to_owned(), user.to_string());
    let looped = loops::key(&event.sender);
    let own = event.state_key.clone().map(|key| (event.kind.clone(), key));
    let both = [whole("m.room.create"), whole(POWER_LEVELS), whole(SERVER_ACL)];
    let near = both.clone().into_iter().chain([member(&event.sender)]).chain(own).chain(looped.clone());
    let rules = both.into_iter().chain([whole("m.room.join_rules"), member(bot)]);
    let target = event.membership().map(|(target, _)| target);
    let there = [Some(event.sender.clone()), target].into_iter().flatten();
    let there = there.filter_map(|user| translate::across(users, &user)).map(|user| member(&user));
    let far = rules.chain(there).chain([whole(&event.kind), whole(ENCRYPTION)]).chain(looped);
    (near.collect(), far.collect())
}

impl Case<'_> {
    /// The membership that a user across will have when all that is on its way has arrived, and who gave it.
    pub(super) fn there(&self, user: &UserId) -> Option<(&str, &UserId)> {
        match self.ahead.get(user) {
            Some(coming) => Some((coming.membership()?, &coming.sender)),
            None => self.far.member(user).map(|entry| (membership_of(entry), entry.sender)),
        }
    }

    /// The same; `leave` for who was never there.
    pub(super) fn membership_there(&self, user: &UserId) -> &str {
        self.there(user).map_or("leave", |(membership, _)| membership)
    }

    /// An event in the room across with the time of this one.
    pub(super) fn draft(&self, sender: &UserId, kind: &str, state_key: Option<&str>, content: Object) -> Draft {
        Draft {
            sender: sender.to_owned(),
            kind: kind.to_owned(),
            state_key: state_key.map(str::to_owned),
            content,
            origin_server_ts: translate::time(self.event.origin_server_ts, self.now_ms),
        }
    }

    /// `content` with the event's provenance.
    pub(super) fn sourced(&self, mut content: Object) -> Object {
        content.insert(SOURCE.to_owned(), translate::provenance(self.event));
        content
    }

    /// How files are called across.
    pub(super) fn media(&self) -> MediaTo<'_> {
        MediaTo { names: self.media, to: self.source.other() }
    }

    /// How a user of the source's side is called across.
    pub(super) fn across(&self, user: &UserId) -> Option<OwnedUserId> {
        translate::across(self.users, user)
    }
}

fn membership_of(entry: Entry<'_>) -> &str {
    entry.content.get("membership").and_then(Value::as_str).unwrap_or("leave")
}

/// The refusal of an event by somebody of the gateway's name who does not exist on its side.
pub(super) fn stranger(user: &UserId) -> Refusal {
    Refusal::Forbidden(format!("{user} is of this gateway's name, but no user of that side"))
}

fn message(case: &Case<'_>) -> Result<Image, Refusal> {
    let rooms = (case.event.room_id.as_ref(), case.far_room);
    let media = case.media();
    translate::message(case.event, &Lookups { users: case.users, events: case.events, rooms, media })
}

/// Why there is nothing of an event to carry: it was redacted before its turn came, or it redacts such an event. What is
/// left of such an event would be shown as a message without text.
fn gone(case: &Case<'_>) -> Option<&'static str> {
    let event = case.event;
    if is_gone(event) {
        return Some("it was redacted before it was carried");
    }
    let target = event.redacts.as_ref().filter(|target| !case.events.contains_key(*target));
    let found = case.redacted.filter(|redacted| target == Some(&redacted.event_id) && is_gone(redacted));
    found.map(|_| "what it redacts was not carried")
}

/// Redaction leaves nothing of what is said, but for what a redaction redacts.
fn is_gone(event: &Event) -> bool {
    event.state_key.is_none() && event.redacts.is_none() && event.content.is_empty()
}

/// A redaction crosses only if its sender is its target's sender or has the level on both sides: all ghosts share a domain,
/// so the rooms' own rule of domains would let any ghost redact any other's events.
fn redaction(case: &Case<'_>, ghost: &UserId) -> Result<Image, Refusal> {
    let event = case.event;
    let Some(target) = &event.redacts else { return Err(Refusal::malformed("redacts", "is missing")) };
    let Some(image) = case.events.get(target) else {
        return Err(Refusal::NotBridged(format!("the redaction of {target}, which has not crossed,")));
    };
    let own = case.redacted.is_some_and(|redacted| redacted.sender == event.sender);
    let near = Power::of(case.near);
    let far = Power::of(case.far);
    if !own && !near.may(&event.sender, Action::Redact) {
        return Err(level(&event.sender, &near, "redact", near.needed(Action::Redact)));
    }
    if !own && !far.may(ghost, Action::Redact) {
        return Err(level(ghost, &far, "redact", far.needed(Action::Redact)));
    }
    Ok(translate::redaction(event, image))
}

/// What must come before something that a ghost says: its join, when it is not in the room across.
fn speaking(case: &Case<'_>, ghost: &UserId) -> Result<Vec<Before>, Refusal> {
    let sender = &case.event.sender;
    let there = case.there(ghost);
    if there.is_some_and(|(membership, _)| membership == "join") {
        return Ok(Vec::new());
    }
    let Some(here) = case.near.member(sender).filter(|entry| entry.membership() == "join") else {
        return Err(Refusal::Forbidden(format!("{sender} has left, and {ghost} is not in the other room")));
    };
    if let Some((membership, by)) = there.filter(|(membership, by)| removed(membership, by, ghost)) {
        return Err(Refusal::Forbidden(format!("{ghost} has the membership {membership:?} across, by {by}")));
    }
    let content = translate::member_content(here.content, "join", case.media());
    let join = case.draft(ghost, MEMBER, Some(ghost.as_str()), content);
    let mut before = invited_first(case, ghost);
    before.push(Before { draft: join, source: Some(here.event_id.to_owned()) });
    Ok(before)
}

/// Whether somebody else has taken a user out of the room.
fn removed(membership: &str, by: &UserId, user: &UserId) -> bool {
    membership == "ban" || (membership == "leave" && by != user)
}

/// The bot's invite for a ghost that could not join without one.
pub(super) fn invited_first(case: &Case<'_>, ghost: &UserId) -> Vec<Before> {
    if !case.lets_in
        || !case.bot_is_there
        || is_public(case.far)
        || matches!(case.membership_there(ghost), "invite" | "join")
    {
        return Vec::new();
    }
    let mut content = Object::new();
    content.insert("membership".to_owned(), json!("invite"));
    let draft = case.draft(case.bot, MEMBER, Some(ghost.as_str()), content);
    vec![Before { draft, source: None }]
}

/// Whether anybody may join a room.
pub(super) fn is_public(state: &State) -> bool {
    state.content("m.room.join_rules").and_then(|content| content.get("join_rule")?.as_str()) == Some("public")
}

/// A tombstone has no image: it moves the portal on (`upgrade.rs`), where its sender may do so on both sides.
fn tombstone(case: &Case<'_>, ghost: &UserId) -> Outcome {
    let far = Power::of(case.far);
    match case.is_elsewhere || (case.replaceable && far.may_send(ghost, TOMBSTONE, true)) {
        true => Outcome::Nothing("it moves the portal on"),
        false if !case.replaceable => Outcome::Refuse(Refusal::Forbidden(
            "a room that a foreign hub keeps is replaced there, and this one with it".to_owned(),
        )),
        false => Outcome::Refuse(Refusal::Forbidden(format!(
            "{ghost} has the level {} across, which is not enough to replace the room",
            far.level(ghost)
        ))),
    }
}

/// State of the mapped types: sent by the sender's ghost where it has the level; by the bot where the room across follows.
fn state(case: &Case<'_>, ghost: &UserId) -> Outcome {
    let kind = case.event.kind.as_str();
    let far = Power::of(case.far);
    let across = |user: &UserId| case.across(user).filter(|_| user != case.bot);
    let creator = case.near.get("m.room.create", "").map(|entry| entry.sender);
    let bot = bot_entry(case.far, case.bot);
    let sovereigns = power::sovereigns(case.near);
    let rules = StateRules {
        creator,
        across: &across,
        to: case.source.other(),
        bot,
        sovereigns: &sovereigns,
        limit: USER_LIMIT,
        asks: case.asks,
        replaceable: case.replaceable,
        media: Some(case.media()),
        pins: Pins::Image { there: case.far.content(kind), names: case.pins },
        aliases: Some(case.aliases),
    };
    let content = match case.lets_in {
        true => translate::state_content(kind, Some(&case.event.content), &rules),
        false => match changed(case, kind, &rules) {
            Some(Change::None) => return Outcome::Nothing("the room across has it already"),
            Some(Change::To(content)) => Some(content),
            None => None,
        },
    };
    let content = content.map(|mut content| {
        if kind == POWER_LEVELS && case.source == Side::Matrix && case.lets_in {
            power::keep_reserved(&mut content, case.far.content(kind), case.replaceable);
        }
        content
    });
    let Some(content) = content else {
        if kind == PINNED {
            return Outcome::Nothing("nothing of what is pinned is across");
        }
        return Outcome::Refuse(Refusal::NotBridged(format!("state of type {kind:?}")));
    };
    if case.settled && case.far.content(kind).is_some_and(|there| same(there, &content)) {
        return Outcome::Nothing("the room across has it already");
    }
    let content = case.sourced(content);
    let by = |sender: &UserId| case.draft(sender, kind, Some(""), content.clone());
    let follows = case.source == case.authority;
    let before = speaking(case, ghost);
    let (image, before, instead) = match before {
        Ok(before) if far.may_send(ghost, kind, true) => (by(ghost), before, follows.then(|| by(case.bot))),
        _ if follows => (by(case.bot), Vec::new(), None),
        Ok(_) => {
            let needed = format!("to send {kind}");
            return Outcome::Refuse(Refusal::Forbidden(format!(
                "{ghost} has the level {} across, which is not enough {needed}",
                far.level(ghost)
            )));
        }
        Err(refusal) => return Outcome::Refuse(refusal),
    };
    let note = if kind == PINNED { pins::left_out(&case.event.content) } else { None };
    Outcome::Cross(Box::new(Crossing { before, image, instead, asks_server: false, note }))
}

/// What somebody's state in a log asks of a room that lives elsewhere.
enum Change {
    None,
    To(Object),
}

/// What of the state across is to change: nothing when the log has been given what it has of that room anyway, though the room says
/// more than that.
fn changed(case: &Case<'_>, kind: &str, rules: &StateRules<'_>) -> Option<Change> {
    let there = case.far.content(kind);
    let creator = case.far.get("m.room.create", "").map(|entry| entry.sender);
    let sovereigns = power::sovereigns(case.far);
    let back = |user: &UserId| translate::across(case.far_users, user).filter(|_| user != case.bot);
    let own = |user: &UserId| Some(user.to_owned()).filter(|user| user != case.bot);
    let limit = CREATOR_LEVEL;
    let image = StateRules {
        creator,
        across: &back,
        to: case.source,
        bot: None,
        sovereigns: &sovereigns,
        limit: USER_LIMIT,
        asks: true,
        replaceable: case.replaceable,
        media: Some(MediaTo { names: case.media, to: case.source }),
        pins: Pins::Image { there: Some(&case.event.content), names: case.pins },
        aliases: Some(case.aliases),
    };
    let image = translate::state_content(kind, there, &image).unwrap_or_default();
    let wanted = StateRules {
        across: &own,
        limit,
        replaceable: case.replaceable,
        pins: Pins::Own { names: case.pins },
        ..StateRules::plain(case.source)
    };
    let wanted = translate::state_content(kind, Some(&case.event.content), &wanted)?;
    if same(&image, &wanted) {
        return Some(Change::None);
    }
    if kind != POWER_LEVELS {
        return translate::state_content(kind, Some(&case.event.content), rules).map(Change::To);
    }
    let names: HashMap<OwnedUserId, &OwnedUserId> =
        case.far_users.keys().filter_map(|user| Some((back(user)?, user))).collect();
    let across = |user: &UserId| {
        let named = names.get(user).map(|user| (*user).clone());
        named.or_else(|| (rules.across)(user))
    };
    Some(Change::To(power::changed(&power::Change {
        there,
        creator,
        image: &image,
        wanted: &wanted,
        across: &across,
        sovereigns: &sovereigns,
    })))
}

/// The bot's entry in a room's power levels, which never crosses and is kept as it is.
pub(super) fn bot_entry<'a>(state: &State, bot: &'a UserId) -> Option<(&'a UserId, i64)> {
    let level = state.content(POWER_LEVELS)?.get("users")?.get(bot.as_str())?.as_i64()?;
    Some((bot, level))
}

/// Whether two contents are the same but for keys of the gateway's own.
pub(super) fn same(one: &Object, other: &Object) -> bool {
    let own = |key: &String| key.starts_with(translate::OWN_PREFIX);
    let plain = |object: &Object| -> Vec<(String, Value)> {
        let pairs = object.iter().filter(|(key, _)| !own(key));
        let mut pairs: Vec<_> = pairs.map(|(key, value)| (key.clone(), value.clone())).collect();
        pairs.sort_by(|one, other| one.0.cmp(&other.0));
        pairs
    };
    plain(one) == plain(other)
}

fn level(user: &UserId, power: &Power<'_>, what: &str, needed: i64) -> Refusal {
    Refusal::Forbidden(format!("{user} has the level {}, to {what} it takes {needed}", power.level(user)))
}

#[cfg(test)]
mod tests;
