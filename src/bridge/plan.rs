//! What brings the following side's state in step with the authority's: a pure function of both states.

use ruma::{EventId, OwnedEventId, UserId};
use serde_json::{Value, json};

use super::alias::Aliases;
use super::carry::{bot_entry, is_public, same};
use super::pins::{Counterparts, Pins};
use super::power::{self, Action, CREATOR_LEVEL, POWER_LEVELS, Power, USER_LIMIT};
use super::side::{Entry, MEMBER, State};
use super::translate::{self, MAPPED_STATE, MediaTo, StateRules, member_content, state_content};
use super::upgrade::TOMBSTONE;
use super::users::{Known, Who};
use crate::event::Object;
use crate::identity::{MediaNames, Side};
use crate::seam::Draft;

/// What marks a repair in its content: true, or the event in the room across from which it follows, as `event_id`.
pub(super) const REPAIR: &str = "im.isthmus.repair";

/// Both states, and who the users in them are.
pub(super) struct Plan<'a> {
    pub(super) authority: Side,
    /// Whether the room that leads is one that the gateway made, in which it says who may be.
    pub(super) owns_leading: bool,
    /// Whether who has the level may replace the gateway's rooms.
    pub(super) replaceable: bool,
    /// Whether the bot lets ghosts into that room by inviting them.
    pub(super) lets_in: bool,
    pub(super) leading: &'a State,
    pub(super) following: &'a State,
    pub(super) leading_users: &'a Known,
    pub(super) following_users: &'a Known,
    pub(super) bot: &'a UserId,
    pub(super) media: &'a MediaNames,
    /// How aliases are called across.
    pub(super) aliases: Aliases<'a>,
    /// How what is pinned in either room is called across.
    pub(super) pins: &'a Counterparts,
    /// Whether a user of the gateway on a side is left alone, because a handshake is under way.
    pub(super) spared: &'a dyn Fn(Side, &UserId) -> bool,
    /// Whether a user, at home on a side, is kept out by the policy, by a room's access control list, or as part of a loop.
    pub(super) denied: &'a dyn Fn(Side, &UserId) -> bool,
    /// Whether a user is kept out by the policy.
    pub(super) barred: &'a dyn Fn(Side, &UserId) -> bool,
    pub(super) now_ms: i64,
}

/// One repair.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Fix {
    /// On which side it is sent.
    pub(super) side: Side,
    /// What must come first.
    pub(super) before: Vec<Draft>,
    /// The repair itself.
    pub(super) draft: Draft,
    /// The event that it is the image of, where it has none.
    pub(super) source: Option<OwnedEventId>,
    /// What is sent on the other side when it is refused.
    pub(super) instead: Option<Draft>,
}

/// What must be sent.
pub(super) fn plan(plan: &Plan<'_>) -> Vec<Fix> {
    let (authority, other) = (plan.authority, plan.authority.other());
    let mut fixes: Vec<Fix> = MAPPED_STATE.iter().filter_map(|kind| plan.state(kind)).collect();
    fixes.extend(plan.tombstone());
    for entry in plan.leading.members() {
        let Ok(user) = <&UserId>::try_from(entry.state_key) else { continue };
        let fix = match plan.leading_users.get(user) {
            Some(Who::Native { ghost }) => plan.native(&entry, user, ghost),
            Some(Who::Ghost { user: real }) => {
                let fix = plan.ghost(&entry, user, real);
                fix.map(|fix| fix.follows(other, plan.following.member(real).map(|there| there.event_id)))
            }
            _ => None,
        };
        fixes.extend(fix.map(|fix| fix.follows(authority, Some(entry.event_id))));
    }
    for entry in plan.following.members() {
        let Ok(user) = <&UserId>::try_from(entry.state_key) else { continue };
        match plan.following_users.get(user) {
            Some(Who::Native { ghost }) if plan.leading.member(ghost).is_none() => {
                let fix = plan.newcomer(&entry, user, ghost);
                fixes.extend(fix.map(|fix| fix.follows(other, Some(entry.event_id))));
            }
            Some(Who::Ghost { user: real }) if plan.leading.member(real).is_none() => {
                fixes.extend(plan.unknown(entry.membership(), user));
            }
            _ => {}
        }
    }
    fixes
}

impl Fix {
    /// Says that it follows from this event of the room on `side`, where it is sent in the other one.
    fn follows(mut self, side: Side, event_id: Option<&EventId>) -> Self {
        if let Some(event_id) = event_id.filter(|_| self.side != side) {
            self.draft.content.insert(REPAIR.to_owned(), json!({ "event_id": event_id }));
        }
        self
    }
}

impl Plan<'_> {
    /// State other than members.
    fn state(&self, kind: &str) -> Option<Fix> {
        let across = |user: &UserId| translate::across(self.leading_users, user).filter(|_| user != self.bot);
        let creator = self.leading.get("m.room.create", "").map(|entry| entry.sender);
        let bot = bot_entry(self.following, self.bot);
        let sovereigns = power::sovereigns(self.leading);
        let rules = StateRules {
            creator,
            across: &across,
            to: self.authority.other(),
            bot,
            sovereigns: &sovereigns,
            limit: USER_LIMIT,
            asks: self.asks(),
            replaceable: self.replaceable,
            media: Some(self.media(self.authority.other())),
            pins: Pins::Image { there: self.following.content(kind), names: self.pins },
            aliases: Some(self.aliases),
        };
        let there = self.following.content(kind);
        let nothing = Object::new();
        let content = match (state_content(kind, self.leading.content(kind), &rules), there) {
            (Some(content), _) => content,
            (None, None) => return None,
            // The authority has none: the following side gets an empty one.
            (None, Some(_)) => state_content(kind, Some(&nothing), &rules)?,
        };
        if there.is_some_and(|there| same(&self.known(kind, there), &content)) {
            return None;
        }
        let fix = self.fix(self.authority.other(), self.draft(self.bot, kind, "", content));
        Some(fix.follows(self.authority, self.leading.get(kind, "").map(|entry| entry.event_id)))
    }

    /// The room that follows was closed by somebody who may not close the one that leads: that is taken back.
    fn tombstone(&self) -> Option<Fix> {
        let there = self.following.get(TOMBSTONE, "").filter(|there| there.sender != self.bot)?;
        let is_one = |content: &Object| content.keys().any(|key| !key.starts_with(translate::OWN_PREFIX));
        let leads = self.leading.content(TOMBSTONE).is_some_and(is_one);
        (self.replaceable && is_one(there.content) && !leads)
            .then(|| self.fix(self.authority.other(), self.draft(self.bot, TOMBSTONE, "", Object::new())))
    }

    /// Whether who joins the room that follows is asked about.
    fn asks(&self) -> bool {
        self.authority == Side::Matrix && !self.owns_leading
    }

    /// What of a content of the following side is compared.
    fn known(&self, kind: &str, there: &Object) -> Object {
        // Nobody across stands for these users, so they are not the authority's to set.
        let mapped = |user: &UserId| {
            matches!(self.following_users.get(user), Some(Who::Native { .. } | Who::Ghost { .. }))
                .then(|| user.to_owned())
        };
        let bot = match kind {
            POWER_LEVELS => bot_entry(self.following, self.bot),
            _ => None,
        };
        let rules = StateRules {
            across: &mapped,
            bot,
            // Who is higher than an image has it is to be seen.
            limit: CREATOR_LEVEL,
            replaceable: self.replaceable,
            pins: Pins::Own { names: self.pins },
            ..StateRules::plain(self.authority.other())
        };
        state_content(kind, Some(there), &rules).unwrap_or_default()
    }

    /// A user of the authority's side, and its ghost on the following side.
    fn native(&self, here: &Entry<'_>, user: &UserId, ghost: &UserId) -> Option<Fix> {
        let side = self.authority.other();
        let there = self.following.membership(ghost);
        match (here.membership(), there) {
            // Whoever is in a room that the gateway made is there by the gateway's policy.
            ("join", _) if self.authority == Side::Matrix && (self.barred)(self.authority, user) => {
                match self.owns_leading {
                    true => self
                        .may_remove(self.leading, user, Action::Kick)
                        .then(|| self.fix(self.authority, self.member(self.bot, user, "leave"))),
                    false => self.leave(side, there, ghost),
                }
            }
            ("join", "join") | ("ban", "ban") => None,
            ("join", _) if (self.denied)(self.authority, user) => None,
            ("join", _) => {
                let before = match there {
                    "ban" => vec![self.member(self.bot, ghost, "leave")],
                    _ => Vec::new(),
                };
                Some(self.join(side, here, ghost, before))
            }
            ("ban", _) if self.may_remove(self.following, ghost, Action::Ban) => {
                Some(self.fix(side, self.member(self.bot, ghost, "ban")))
            }
            ("leave" | "invite" | "knock", "ban") if self.may_remove(self.following, ghost, Action::Ban) => {
                Some(self.fix(side, self.member(self.bot, ghost, "leave")))
            }
            ("leave" | "ban", _) => self.leave(side, there, ghost),
            // The join was taken back by a resolution, which no event says.
            ("invite" | "knock", "join") => self.leave(side, there, ghost),
            _ => None,
        }
    }

    /// A ghost on the authority's side, and the user of the following side that it stands for.
    fn ghost(&self, here: &Entry<'_>, ghost: &UserId, user: &UserId) -> Option<Fix> {
        let there = self.following.membership(user);
        let removed_by_others = here.sender != ghost && here.sender != self.bot;
        match (here.membership(), there) {
            ("ban", "ban") => None,
            // Whom the gateway cannot remove is left to health.
            ("ban", _) => self
                .may_remove(self.following, user, Action::Ban)
                .then(|| self.fix(self.authority.other(), self.member(self.bot, user, "ban"))),
            ("leave", "join") if removed_by_others => self
                .may_remove(self.following, user, Action::Kick)
                .then(|| self.fix(self.authority.other(), self.member(self.bot, user, "leave"))),
            ("leave" | "invite" | "knock", "join") => self.newcomer(&self.following.member(user)?, user, ghost),
            // Who is only invited has not come: the join for which the ghost joined was refused.
            ("join", "leave" | "ban" | "invite" | "knock") => self.leave(self.authority, "join", ghost),
            _ => None,
        }
    }

    /// A user who has joined the following side and whose ghost is not on the authority's side: the ghost joins, or, if it
    /// may not, the user is kicked where the gateway can.
    fn newcomer(&self, there: &Entry<'_>, user: &UserId, ghost: &UserId) -> Option<Fix> {
        if there.membership() != "join" || (self.spared)(self.authority, ghost) {
            return None;
        }
        let kick = self.may_remove(self.following, user, Action::Kick).then(|| self.member(self.bot, user, "leave"));
        if (self.denied)(self.authority.other(), user) {
            return kick.map(|kick| self.fix(self.authority.other(), kick));
        }
        Some(Fix { instead: kick, ..self.join(self.authority, there, ghost, Vec::new()) })
    }

    /// A ghost on the following side of a user of whom the authority knows nothing, or nothing any more.
    fn unknown(&self, membership: &str, ghost: &UserId) -> Option<Fix> {
        let side = self.authority.other();
        match membership {
            "ban" if self.may_remove(self.following, ghost, Action::Ban) => {
                Some(self.fix(side, self.member(self.bot, ghost, "leave")))
            }
            _ => self.leave(side, membership, ghost),
        }
    }

    fn leave(&self, side: Side, membership: &str, ghost: &UserId) -> Option<Fix> {
        if !matches!(membership, "join" | "invite" | "knock") || (self.spared)(side, ghost) {
            return None;
        }
        Some(self.fix(side, self.member(ghost, ghost, "leave")))
    }

    /// A ghost's join on `side`, as the image of `source`, a join across.
    fn join(&self, side: Side, source: &Entry<'_>, ghost: &UserId, mut before: Vec<Draft>) -> Fix {
        let state = if side == self.authority { self.leading } else { self.following };
        if (side != self.authority || self.lets_in) && !is_public(state) && state.membership(ghost) != "invite" {
            before.push(self.member(self.bot, ghost, "invite"));
        }
        let content = member_content(source.content, "join", self.media(side));
        let draft = self.draft(ghost, MEMBER, ghost.as_str(), content);
        Fix { before, source: Some(source.event_id.to_owned()), ..self.fix(side, draft) }
    }

    fn media(&self, to: Side) -> MediaTo<'_> {
        MediaTo { names: self.media, to }
    }

    fn may_remove(&self, state: &State, user: &UserId, action: Action) -> bool {
        state.membership(self.bot) == "join" && Power::of(state).may_remove(self.bot, user, action)
    }

    fn member(&self, sender: &UserId, target: &UserId, membership: &str) -> Draft {
        let mut content = Object::new();
        content.insert("membership".to_owned(), Value::from(membership));
        self.draft(sender, MEMBER, target.as_str(), content)
    }

    fn draft(&self, sender: &UserId, kind: &str, state_key: &str, mut content: Object) -> Draft {
        content.insert(REPAIR.to_owned(), json!(true));
        Draft {
            sender: sender.to_owned(),
            kind: kind.to_owned(),
            state_key: Some(state_key.to_owned()),
            content,
            origin_server_ts: self.now_ms,
        }
    }

    fn fix(&self, side: Side, draft: Draft) -> Fix {
        Fix { side, before: Vec::new(), draft, source: None, instead: None }
    }
}

#[cfg(test)]
mod tests;
