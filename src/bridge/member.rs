//! How a change of membership crosses. What a user does to itself its ghost does; what is done to a ghost is done to the
//! user it stands for. Who removes somebody is the remover's ghost where it has the level, else the bot. Pure.

use ruma::UserId;
use serde_json::Value;

use super::carry::{Before, Case, Crossing, Outcome, invited_first, same, stranger};
use super::ends::bot_is_out;
use super::power::{Action, Power};
use super::side::{Entry, MEMBER};
use super::translate;
use super::users::Who;
use crate::event::Object;
use crate::lm::Coming;
use crate::refusal::Refusal;
use crate::seam::Draft;

/// What is to be done with a member event about `target`.
pub(super) fn outcome(case: &Case<'_>, target: &UserId, membership: &str) -> Outcome {
    let own = case.event.sender == *target;
    match case.users.get(target) {
        Some(Who::Native { ghost }) => match membership {
            "join" if own => joins(case, ghost),
            "join" => Outcome::Refuse(Refusal::malformed(
                "m.room.member",
                format!("{} joins for {target}", case.event.sender),
            )),
            "knock" => knocks(case, ghost),
            "leave" if own => leaves(case, ghost),
            "leave" => removed(case, ghost, Action::Kick, true),
            "ban" => removed(case, ghost, Action::Ban, true),
            "invite" => invited(case, ghost, false),
            other => Outcome::Refuse(Refusal::malformed("content.membership", format!("is {other:?}"))),
        },
        Some(Who::Ghost { user }) => match membership {
            "leave" => removed(case, user, Action::Kick, false),
            "ban" => removed(case, user, Action::Ban, false),
            "invite" => invited(case, user, true),
            _ => Outcome::Nothing("a ghost's own doing comes from the other side"),
        },
        Some(Who::Bot) => match membership {
            "leave" | "ban" => Outcome::Suspend(bot_is_out(&case.event.sender, membership, case.bot)),
            _ => Outcome::Nothing("the bot is on both sides"),
        },
        Some(Who::Appservice) => Outcome::Nothing("the appservice's sender is nobody across"),
        Some(Who::Stranger) | None => Outcome::Refuse(stranger(target)),
    }
}

fn joins(case: &Case<'_>, ghost: &UserId) -> Outcome {
    let content = translate::member_content(&case.event.content, "join", case.media());
    let there = case.far.member(ghost).filter(|there| there.membership() == "join" && there.sender == ghost);
    let stays = |coming: &Coming| coming.membership() == Some("join") && same(&coming.content, &content);
    let is_this = |there: &Entry<'_>| {
        let mut theirs = there.content.clone();
        // Who vouched for it is nobody's profile.
        theirs.remove("join_authorised_via_users_server");
        same(&theirs, &content)
    };
    if let Some(there) = there.filter(is_this)
        && case.ahead.get(ghost).is_none_or(stays)
    {
        return Outcome::Adopt(there.event_id.to_owned());
    }
    cross(case, invited_first(case, ghost), ghost, ghost, content)
}

fn knocks(case: &Case<'_>, ghost: &UserId) -> Outcome {
    // At a foreign hub the ghost has knocked before the user's knock was taken.
    let there = case.far.member(ghost).filter(|there| there.membership() == "knock" && there.sender == ghost);
    let stays = |coming: &Coming| coming.membership() == Some("knock");
    if let Some(there) = there.filter(|_| case.ahead.get(ghost).is_none_or(stays)) {
        return Outcome::Adopt(there.event_id.to_owned());
    }
    if case.membership_there(ghost) != "leave" {
        return Outcome::Nothing("the ghost is invited, joined or banned across");
    }
    cross(case, Vec::new(), ghost, ghost, translate::member_content(&case.event.content, "knock", case.media()))
}

fn leaves(case: &Case<'_>, ghost: &UserId) -> Outcome {
    if case.settled && matches!(case.far.membership(ghost), "leave" | "ban") {
        return Outcome::Nothing("the ghost is not in the other room");
    }
    cross(case, Vec::new(), ghost, ghost, translate::member_content(&case.event.content, "leave", case.media()))
}

/// A kick, a ban, or the end of one. `ghost` says that the one who is removed across is a ghost, which can leave by itself
/// when nobody of the gateway may remove it.
fn removed(case: &Case<'_>, target: &UserId, action: Action, ghost: bool) -> Outcome {
    let membership = if action == Action::Ban { "ban" } else { "leave" };
    let there = case.membership_there(target);
    if there == membership && case.settled {
        return Outcome::Nothing("it is so across already");
    }
    let power = Power::of(case.far);
    let may = |actor: &UserId| {
        // In a room that lives elsewhere nobody gets more done than they may do there themselves.
        (case.lets_in || actor != case.bot)
            && case.far.membership(actor) == "join"
            && power.may_remove(actor, target, action)
            // Who takes a ban back needs the level of a ban too.
            && (there != "ban" || power.may(actor, Action::Ban))
    };
    let remover = case.across(&case.event.sender).filter(|remover| *remover != *case.bot);
    let content = translate::member_content(&case.event.content, membership, case.media());
    match remover.filter(|remover| may(remover)) {
        Some(remover) => {
            let mut crossing = crossing(case, Vec::new(), &remover, target, content.clone());
            crossing.instead = may(case.bot).then(|| member_draft(case, case.bot, target, content));
            Outcome::Cross(Box::new(crossing))
        }
        None if may(case.bot) => cross(case, Vec::new(), case.bot, target, content),
        None if ghost && matches!(there, "join" | "invite" | "knock") => {
            let mut content = content;
            content.insert("membership".to_owned(), Value::from("leave"));
            let mut crossing = crossing(case, Vec::new(), target, target, content);
            if action == Action::Ban {
                crossing.note = Some("nobody of the gateway may ban across: the ghost left".to_owned());
            }
            Outcome::Cross(Box::new(crossing))
        }
        None => Outcome::Refuse(Refusal::Forbidden(format!(
            "nobody of the gateway may give {target} the membership {membership:?} across: {target} has the level {}, \
             the bot {}",
            power.level(target),
            power.level(case.bot)
        ))),
    }
}

fn invited(case: &Case<'_>, target: &UserId, asks_server: bool) -> Outcome {
    match case.membership_there(target) {
        "join" | "invite" => return Outcome::Nothing("it is invited or joined across"),
        "ban" => return Outcome::Refuse(Refusal::Forbidden(format!("{target} is banned across"))),
        _ => {}
    }
    let power = Power::of(case.far);
    let may = |actor: &UserId| {
        (case.lets_in || actor != case.bot) && case.far.membership(actor) == "join" && power.may(actor, Action::Invite)
    };
    let content = translate::member_content(&case.event.content, "invite", case.media());
    let inviter = case.across(&case.event.sender).filter(|inviter| may(inviter));
    let Some(inviter) = inviter.or_else(|| may(case.bot).then(|| case.bot.to_owned())) else {
        return Outcome::Refuse(Refusal::Forbidden(format!("nobody of the gateway may invite {target} across")));
    };
    let mut crossing = crossing(case, Vec::new(), &inviter, target, content);
    crossing.asks_server = asks_server;
    Outcome::Cross(Box::new(crossing))
}

fn cross(case: &Case<'_>, before: Vec<Before>, sender: &UserId, target: &UserId, content: Object) -> Outcome {
    Outcome::Cross(Box::new(crossing(case, before, sender, target, content)))
}

fn crossing(case: &Case<'_>, before: Vec<Before>, sender: &UserId, target: &UserId, content: Object) -> Crossing {
    let image = member_draft(case, sender, target, content);
    Crossing { before, image, instead: None, asks_server: false, note: None }
}

fn member_draft(case: &Case<'_>, sender: &UserId, target: &UserId, content: Object) -> Draft {
    case.draft(sender, MEMBER, Some(target.as_str()), case.sourced(content))
}
