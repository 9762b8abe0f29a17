//! Events by who has some power, and not enough for that: each is right in all that the other authorization rules ask.

use ruma::{OwnedUserId, UserId};
use serde_json::{Value, json};

use super::checks;
use super::membership::join_rule;
use super::rules::{content_of_levels, marked, membership, other, rejected};
use super::second::invite;
use crate::conformance::Check;
use crate::conformance::ear::lock;
use crate::conformance::report::{Outcome, skip};
use crate::conformance::session::Session;
use crate::event::Object;

const LEVELS: &str = "m.room.power_levels";

/// A level, one that is enough for it, and one that is not.
const LEVEL: i64 = 10;
const BELOW: i64 = 5;
const ABOVE: i64 = 20;

/// An event type that takes more than the level, and one that nothing is said of.
const GUARDED: &str = "im.isthmus.conformance.guarded";
const FREE: &str = "im.isthmus.conformance.free";

pub(super) fn checks() -> Vec<Check> {
    checks![
        "LM-P-030", "int-auth-rules 5.3.4", "an invite by somebody below the level of invites is rejected", invites;
        "LM-P-031", "int-auth-rules 5.4.3", "who may kick and not ban cannot lift a ban", lifts_ban;
        "LM-P-032", "int-auth-rules 5.4.5", "a kick of somebody of the same level is rejected", |s, id| of_equal(s, id, "leave");
        "LM-P-033", "int-auth-rules 5.5.3", "a ban of somebody of the same level is rejected", |s, id| of_equal(s, id, "ban");
        "LM-P-034", "int-auth-rules 5.4.2", "a kick by somebody with the power who is not in the room is rejected", |s, id| from_outside(s, id, "leave");
        "LM-P-035", "int-auth-rules 5.5.1", "a ban by somebody with the power who is not in the room is rejected", |s, id| from_outside(s, id, "ban");
        "LM-P-036", "int-auth-rules 9.5.1", "a level above one's own cannot be lowered or removed", |s, id| changes(s, id, |_, content, level| set(content, "ban", level));
        "LM-P-037", "int-auth-rules 9.6.1", "an event type's level above one's own cannot be lowered or removed", |s, id| changes(s, id, |_, content, level| entry(content, "events", GUARDED, level));
        "LM-P-038", "int-auth-rules 9.7.1", "an event type's level cannot be made higher than one's own", raises;
        "LM-P-039", "int-auth-rules 9.8.1", "the level of somebody above oneself cannot be lowered or removed", |s, id| changes(s, id, |s, content, level| entry(content, "users", s.user.as_str(), level));
    ]
}

/// Sets a level, or removes it.
fn set(content: &mut Object, field: &str, level: Option<i64>) {
    match level {
        Some(level) => content.insert(field.to_owned(), json!(level)),
        None => content.remove(field),
    };
}

/// The same in a map of levels.
fn entry(content: &mut Object, map: &str, key: &str, level: Option<i64>) {
    let entries = content.entry(map).or_insert_with(|| json!({}));
    if let Some(entries) = entries.as_object_mut() {
        set(entries, key, level);
    }
}

/// Gives some users the level while something is looked at. It is enough to kick and to change the levels, and not to invite; `to_ban` is as it
/// is wanted.
async fn while_levels(
    session: &Session,
    to_ban: i64,
    users: &[&UserId],
    look: impl Future<Output = Outcome>,
) -> Outcome {
    let before = content_of_levels(session);
    let touched = ["kick", "ban", "invite"].into_iter().filter_map(|field| before.get(field)?.as_i64());
    let needed = touched.chain([ABOVE, session.needed_for(LEVELS)]).max().unwrap_or(ABOVE);
    session.needs_power(needed)?;
    let mut content = before.clone();
    set(&mut content, "kick", Some(BELOW));
    set(&mut content, "ban", Some(to_ban));
    set(&mut content, "invite", Some(ABOVE));
    entry(&mut content, "events", LEVELS, Some(BELOW));
    entry(&mut content, "events", GUARDED, Some(ABOVE));
    for user in users {
        entry(&mut content, "users", user.as_str(), Some(LEVEL));
    }
    lock(&session.notes).power_levels = Some(Value::Object(before.clone()));
    give(session, content).await?;
    let looked = look.await;
    let restored = give(session, before).await;
    lock(&session.notes).power_levels = None;
    looked.and(restored)
}

async fn give(session: &Session, content: Object) -> Outcome {
    let event = session.state(&session.user, LEVELS, "", Value::Object(content));
    session.set(&session.first, event).await.map(drop)
}

fn fresh_user(session: &Session, what: &str) -> Result<OwnedUserId, crate::conformance::Unmet> {
    session.user_of(&session.first, &format!("{what}-{}", session.fresh()))
}

async fn invites(session: &Session, id: &str) -> Outcome {
    session.joined()?;
    session.low_is_low()?;
    while_levels(session, ABOVE, &[&session.low], async {
        rejected(session, id, membership(session, &session.low, &other(session), "invite")).await?;
        let Ok(second) = session.second() else { return Ok(()) };
        let guest = session.user_of(second, &format!("uninvited-{}", session.run))?;
        let mut event = membership(session, &session.low, guest.as_str(), "invite");
        let mark = marked(session, id, &mut event);
        invite(session, event).await?.is_error(403, "M_FORBIDDEN")?;
        session.absent(id, &mark).await
    })
    .await
}

async fn lifts_ban(session: &Session, id: &str) -> Outcome {
    session.joined()?;
    session.low_is_low()?;
    session.needs_power(50)?;
    let victim = fresh_user(session, "banned")?;
    let by_user = |what: &str| membership(session, &session.user, victim.as_str(), what);
    session.set(&session.first, by_user("ban")).await?;
    let lifting = rejected(session, id, membership(session, &session.low, victim.as_str(), "leave"));
    let looked = while_levels(session, ABOVE, &[&session.low], lifting).await;
    let lifted = session.set(&session.first, by_user("leave")).await;
    looked.and(lifted.map(drop))
}

async fn of_equal(session: &Session, id: &str, what: &str) -> Outcome {
    session.joined()?;
    session.low_is_low()?;
    let rule = join_rule(session);
    if rule != "public" {
        return Err(skip(format!("the room's join rule is {rule}")));
    }
    let equal = fresh_user(session, "equal")?;
    session.set(&session.first, membership(session, &equal, equal.as_str(), "join")).await?;
    let forbidden = rejected(session, id, membership(session, &session.low, equal.as_str(), what));
    let looked = while_levels(session, BELOW, &[&session.low, &equal], forbidden).await;
    let left = session.set(&session.first, membership(session, &equal, equal.as_str(), "leave")).await;
    looked.and(left.map(drop))
}

async fn from_outside(session: &Session, id: &str, what: &str) -> Outcome {
    session.joined()?;
    session.low_is_low()?;
    let stranger = fresh_user(session, "stranger")?;
    let forbidden = rejected(session, id, membership(session, &stranger, session.low.as_str(), what));
    while_levels(session, BELOW, &[&stranger], forbidden).await
}

/// Two changes of the levels: one to the sender's own, and one that removes it.
async fn changes(session: &Session, id: &str, change: impl Fn(&Session, &mut Object, Option<i64>)) -> Outcome {
    session.joined()?;
    session.low_is_low()?;
    while_levels(session, ABOVE, &[&session.low], async {
        for level in [Some(LEVEL), None] {
            let mut content = content_of_levels(session);
            change(session, &mut content, level);
            let event = session.state(&session.low, LEVELS, "", Value::Object(content));
            rejected(session, id, event).await?;
        }
        Ok(())
    })
    .await
}

async fn raises(session: &Session, id: &str) -> Outcome {
    session.joined()?;
    session.low_is_low()?;
    while_levels(session, ABOVE, &[&session.low], async {
        let mut content = content_of_levels(session);
        entry(&mut content, "events", FREE, Some(ABOVE));
        rejected(session, id, session.state(&session.low, LEVELS, "", Value::Object(content))).await
    })
    .await
}
