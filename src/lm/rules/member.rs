//! Rule 5: changes of membership. Each refusal names its sub-rule, as the draft's section numbers it:
//! <https://www.ietf.org/archive/id/draft-ralston-mimi-linearized-matrix-04.html#int-auth-rules>

use ruma::UserId;
use serde_json::Value;

use super::{Action, Judged, refuse, shown};
use crate::refusal::Refusal;

pub(super) fn check(event: &Judged<'_>) -> Result<(), Refusal> {
    let membership = event.content.get("membership");
    let (Some(target), Some(membership)) = (event.state_key, membership.and_then(Value::as_str)) else {
        return refuse(
            "5.1",
            format!("m.room.member with state key {:?} and membership {}", event.state_key, shown(membership)),
        );
    };
    match membership {
        "join" => join(event, target),
        "invite" => invite(event, target),
        "leave" => leave(event, target),
        "ban" => ban(event, target),
        "knock" => knock(event, target),
        unknown => refuse("5.7", format!("the membership {unknown:?} is unknown")),
    }
}

/// Rule 5.2.
fn join(event: &Judged<'_>, target: &str) -> Result<(), Refusal> {
    let before = &event.before;
    if before.follows_create && before.creator.is_some_and(|creator| creator.as_str() == target) {
        return Ok(()); // rule 5.2.1
    }
    if event.sender.as_str() != target {
        return refuse("5.2.2", format!("{} cannot join for {target}", event.sender));
    }
    let current = before.sender_membership();
    if current == "ban" {
        return refuse("5.2.3", format!("{} is banned", event.sender));
    }
    let rule = join_rule(event);
    match rule {
        Some("invite" | "knock") if matches!(current, "invite" | "join") => Ok(()), // rule 5.2.4
        Some("public") => Ok(()),                                                   // rule 5.2.5
        _ => refuse(
            "5.2.6",
            format!("the join rule is {}, the membership of {} is {current}", rule.unwrap_or("missing"), event.sender),
        ),
    }
}

/// Rule 5.3.
fn invite(event: &Judged<'_>, target: &str) -> Result<(), Refusal> {
    joined_sender(event, "5.3.1")?;
    let current = event.before.target_membership();
    if matches!(current, "join" | "ban") {
        return refuse("5.3.2", format!("the membership of {target} is {current}"));
    }
    let levels = event.before.levels();
    let (has, needs) = (levels.of_user(event.sender), levels.to_do(Action::Invite));
    if has >= needs {
        return Ok(()); // rule 5.3.3
    }
    refuse("5.3.4", format!("{} has power level {has}, inviting needs {needs}", event.sender))
}

/// Rule 5.4.
fn leave(event: &Judged<'_>, target: &str) -> Result<(), Refusal> {
    let before = &event.before;
    let current = before.target_membership();
    if event.sender.as_str() == target {
        return match before.sender_membership() {
            "knock" | "join" | "invite" => Ok(()),
            current => refuse("5.4.1", format!("{target} cannot leave, the membership is {current}")),
        };
    }
    joined_sender(event, "5.4.2")?;
    let levels = before.levels();
    let has = levels.of_user(event.sender);
    let unban = levels.to_do(Action::Ban);
    if current == "ban" && has < unban {
        return refuse("5.4.3", format!("{} has power level {has}, lifting a ban needs {unban}", event.sender));
    }
    let (needs, other) = (levels.to_do(Action::Kick), level_of_target(event, target));
    if has >= needs && other < has {
        return Ok(()); // rule 5.4.4
    }
    refuse("5.4.5", format!("{} has power level {has}, kicking needs {needs}, {target} has {other}", event.sender))
}

/// Rule 5.5.
fn ban(event: &Judged<'_>, target: &str) -> Result<(), Refusal> {
    joined_sender(event, "5.5.1")?;
    let levels = event.before.levels();
    let (has, needs) = (levels.of_user(event.sender), levels.to_do(Action::Ban));
    let other = level_of_target(event, target);
    if has >= needs && other < has {
        return Ok(()); // rule 5.5.2
    }
    refuse("5.5.3", format!("{} has power level {has}, banning needs {needs}, {target} has {other}", event.sender))
}

/// Rule 5.6.
fn knock(event: &Judged<'_>, target: &str) -> Result<(), Refusal> {
    let rule = join_rule(event);
    if rule != Some("knock") {
        return refuse("5.6.1", format!("the join rule is {}, not knock", rule.unwrap_or("missing")));
    }
    if event.sender.as_str() != target {
        return refuse("5.6.2", format!("{} cannot knock for {target}", event.sender));
    }
    match event.before.sender_membership() {
        current @ ("ban" | "join") => refuse("5.6.4", format!("the membership of {target} is {current}")),
        _ => Ok(()), // rule 5.6.3
    }
}

fn joined_sender(event: &Judged<'_>, rule: &'static str) -> Result<(), Refusal> {
    match event.before.sender_membership() {
        "join" => Ok(()),
        other => refuse(rule, format!("the membership of {} is {other}, not join", event.sender)),
    }
}

fn join_rule<'a>(event: &Judged<'a>) -> Option<&'a str> {
    event.before.join_rules?.get("join_rule")?.as_str()
}

fn level_of_target(event: &Judged<'_>, target: &str) -> i64 {
    let levels = event.before.levels();
    match <&UserId>::try_from(target) {
        Ok(target) => levels.of_user(target),
        // Who is no user has the level of a user that nobody named.
        Err(_) => levels.of_nobody(),
    }
}
