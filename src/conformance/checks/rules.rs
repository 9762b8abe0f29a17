//! Events that are rightly made and that the authorization rules forbid, by the number of the rule.

use ruma::UserId;
use serde_json::{Value, json};

use super::checks;
use super::membership::{KNOCK_LOOKS, KNOCK_PAUSE, handshake, join_rule, while_join_rule};
use crate::conformance::Check;
use crate::conformance::report::{Outcome, ensure, skip};
use crate::conformance::session::{Endpoint, Session, VERSIONS, sealed};
use crate::event::Object;

pub(super) fn checks() -> Vec<Check> {
    checks![
        "LM-P-001", "int-auth-rules 3.1", "a second m.room.create is rejected", |s, id| by(s, id, Who::User, |s, by| s.state(by, "m.room.create", "", json!({ "room_version": version(s) })));
        "LM-P-002", "int-auth-rules 5.1", "a membership without state_key is rejected", |s, id| by(s, id, Who::User, |s, by| {
            let mut event = s.state(by, "m.room.member", "", json!({ "membership": "join" }));
            event.remove("state_key");
            event
        });
        "LM-P-003", "int-auth-rules 5.1", "a member event without membership is rejected", |s, id| by(s, id, Who::User, |s, by| s.state(by, "m.room.member", by.as_str(), json!({})));
        "LM-P-004", "int-auth-rules 5.2.2", "a join of somebody else is rejected", |s, id| by(s, id, Who::User, |s, by| membership(s, by, &other(s), "join"));
        "LM-P-005", "int-auth-rules 5.3.1", "an invite by somebody who is not in the room is rejected", |s, id| by(s, id, Who::Stranger, |s, by| membership(s, by, &other(s), "invite"));
        "LM-P-006", "int-auth-rules 5.3.2", "an invite of somebody who is in the room is rejected", |s, id| by(s, id, Who::User, |s, by| membership(s, by, s.user.as_str(), "invite"));
        "LM-P-007", "int-auth-rules 5.4.1", "a leave of somebody who is not in the room is rejected", |s, id| by(s, id, Who::Stranger, |s, by| membership(s, by, by.as_str(), "leave"));
        "LM-P-008", "int-auth-rules 5.4.5", "a kick by somebody without the power is rejected", |s, id| by(s, id, Who::Low, |s, by| membership(s, by, s.user.as_str(), "leave"));
        "LM-P-009", "int-auth-rules 5.5.3", "a ban by somebody without the power is rejected", |s, id| by(s, id, Who::Low, |s, by| membership(s, by, s.user.as_str(), "ban"));
        "LM-P-010", "int-auth-rules 5.6.1", "a knock where nobody may knock is rejected", |s, id| by(s, id, Who::NoKnocks, |s, by| membership(s, by, by.as_str(), "knock"));
        "LM-P-011", "int-auth-rules 5.6.2", "a knock of somebody else is rejected", |s, id| by(s, id, Who::User, |s, by| membership(s, by, &other(s), "knock"));
        "LM-P-012", "int-auth-rules 5.7", "an unknown membership is rejected", |s, id| by(s, id, Who::User, |s, by| membership(s, by, by.as_str(), "visiting"));
        "LM-P-013", "int-auth-rules 6", "an event of somebody who is not in the room is rejected", |s, id| by(s, id, Who::Stranger, |s, by| s.message(by, ""));
        "LM-P-014", "int-auth-rules 7", "a state event of somebody without the power is rejected", |s, id| by(s, id, Who::Low, |s, by| s.state(by, "m.room.name", "", json!({ "name": "conformance" })));
        "LM-P-015", "int-auth-rules 8", "a state key that is another user is rejected", |s, id| by(s, id, Who::Strong, |s, by| s.state(by, "im.isthmus.conformance.key", s.low.as_str(), json!({})));
        "LM-P-016", "int-auth-rules 9.1", "a power level that is no integer is rejected", |s, id| by(s, id, Who::Strong, |s, by| levels(s, by, "ban", json!("50")));
        "LM-P-017", "int-auth-rules 9.2", "events of power levels that are no integers are rejected", |s, id| by(s, id, Who::Strong, |s, by| levels(s, by, "events", json!({ "m.room.name": "50" })));
        "LM-P-018", "int-auth-rules 9.3", "users of power levels that are no user IDs are rejected", |s, id| by(s, id, Who::Strong, |s, by| user_level(s, by, "nobody", 1));
        "LM-P-019", "int-auth-rules 9.5.2", "a level above one's own cannot be asked for", |s, id| by(s, id, Who::Strong, |s, by| levels(s, by, "kick", json!(1_000_000)));
        "LM-P-020", "int-auth-rules 9.9.1", "a level above one's own cannot be given", |s, id| by(s, id, Who::Strong, |s, by| user_level(s, by, s.low.as_str(), 1_000_000));
        "LM-P-021", "int-auth-rules 5.2.3", "who is banned cannot join", banned;
        "LM-P-022", "int-auth-rules 5.2.6", "who was not invited cannot join where only the invited may", |s, id| uninvited(s, id, "invite");
        "LM-P-023", "int-auth-rules 5.2.6", "who was not invited cannot join where one may only knock", |s, id| uninvited(s, id, "knock");
        "LM-P-024", "int-auth-rules 5.6.4", "who is in the room cannot knock", member_knocks;
        "LM-P-025", "int-auth-rules 5.6.4", "who is banned cannot knock", banned_knocks;
    ]
}

/// Who sends it.
#[derive(Clone, Copy, PartialEq)]
enum Who {
    /// The suite's user.
    User,
    /// The same, who must have power for this.
    Strong,
    /// The one without power.
    Low,
    /// One who is not in the room.
    Stranger,
    /// The same, in a room where nobody may knock.
    NoKnocks,
}

async fn by(session: &Session, id: &str, who: Who, make: impl Fn(&Session, &UserId) -> Object) -> Outcome {
    session.joined()?;
    let stranger = session.user_of(&session.first, &format!("stranger-{}", session.run))?;
    match who {
        Who::Strong => session.needs_power(50)?,
        Who::Low => session.low_is_low()?,
        Who::NoKnocks if join_rule(session) == "knock" => return Err(skip("one may knock at the room")),
        _ => {}
    }
    let sender = match who {
        Who::User | Who::Strong => &session.user,
        Who::Low => &session.low,
        Who::Stranger | Who::NoKnocks => &stranger,
    };
    rejected(session, id, make(session, sender)).await
}

/// Marks an event of which nothing may come; the mark.
pub(super) fn marked(session: &Session, id: &str, event: &mut Object) -> String {
    let mark = session.bad_mark(id);
    if let Some(content) = event.get_mut("content").and_then(Value::as_object_mut) {
        content.insert("mark".to_owned(), json!(mark));
    }
    mark
}

/// Sends an event that the rules forbid, and looks that it is not sent on.
pub(super) async fn rejected(session: &Session, id: &str, mut event: Object) -> Outcome {
    let mark = marked(session, id, &mut event);
    let answer = session.send(&session.first, vec![sealed(event, &session.first)]).await?;
    ensure(answer.status < 500, "200, or an error of the 400s", || &answer)?;
    session.absent(id, &mark).await
}

/// The same by a handshake, which must say so.
async fn turned_away(session: &Session, id: &str, endpoint: Endpoint, mut event: Object) -> Outcome {
    let mark = marked(session, id, &mut event);
    handshake(session, endpoint, sealed(event, &session.first)).await?.is_refusal()?;
    session.absent(id, &mark).await
}

async fn no_template(session: &Session, change: &str, user: &UserId) -> Outcome {
    let ask = || session.make(change, session.room.as_str(), user, &VERSIONS);
    // A hub that asks somebody else whom it lets in may take a moment to know of new join rules.
    for _ in 0..KNOCK_LOOKS {
        if session.ask(&session.first, ask()).await?.status == 403 {
            break;
        }
        tokio::time::sleep(KNOCK_PAUSE).await;
    }
    session.ask(&session.first, ask()).await?.is_error(403, "M_FORBIDDEN")
}

async fn uninvited(session: &Session, id: &str, rule: &str) -> Outcome {
    session.joined()?;
    let user = session.user_of(&session.first, &format!("uninvited-{}", session.fresh()))?;
    while_join_rule(session, rule, async {
        no_template(session, "join", &user).await?;
        let join = || membership(session, &user, user.as_str(), "join");
        turned_away(session, id, Endpoint::SendJoin, join()).await?;
        rejected(session, id, join()).await
    })
    .await
}

async fn cannot_knock(session: &Session, id: &str, user: &UserId) -> Outcome {
    while_join_rule(session, "knock", async {
        let knock = || membership(session, user, user.as_str(), "knock");
        turned_away(session, id, Endpoint::SendKnock, knock()).await?;
        rejected(session, id, knock()).await
    })
    .await
}

async fn member_knocks(session: &Session, id: &str) -> Outcome {
    session.joined()?;
    cannot_knock(session, id, &session.user).await
}

async fn banned_knocks(session: &Session, id: &str) -> Outcome {
    session.joined()?;
    session.needs_power(50)?;
    let victim = session.user_of(&session.first, &format!("banned-{}", session.fresh()))?;
    session.set(&session.first, membership(session, &session.user, victim.as_str(), "ban")).await?;
    let looked = cannot_knock(session, id, &victim).await;
    let lifted = session.set(&session.first, membership(session, &session.user, victim.as_str(), "leave")).await;
    looked.and(lifted.map(drop))
}

fn version(session: &Session) -> String {
    crate::conformance::ear::lock(&session.notes).version.clone()
}

/// Somebody of the suite's server who is not in the room.
pub(super) fn other(session: &Session) -> String {
    format!("@other-{}:{}", session.run, session.first.name)
}

pub(super) fn membership(session: &Session, sender: &UserId, target: &str, membership: &str) -> Object {
    session.state(sender, "m.room.member", target, json!({ "membership": membership }))
}

pub(super) fn content_of_levels(session: &Session) -> Object {
    let levels = session.state_event("m.room.power_levels", "");
    levels.and_then(|event| event.get("content").and_then(Value::as_object).cloned()).unwrap_or_default()
}

/// The power levels with one field changed.
fn levels(session: &Session, sender: &UserId, field: &str, value: Value) -> Object {
    let mut content = content_of_levels(session);
    content.insert(field.to_owned(), value);
    session.state(sender, "m.room.power_levels", "", Value::Object(content))
}

fn user_level(session: &Session, sender: &UserId, user: &str, level: i64) -> Object {
    let mut users = content_of_levels(session).get("users").and_then(Value::as_object).cloned().unwrap_or_default();
    users.insert(user.to_owned(), json!(level));
    levels(session, sender, "users", Value::Object(users))
}

async fn banned(session: &Session, id: &str) -> Outcome {
    session.joined()?;
    session.needs_power(50)?;
    let victim = session.user_of(&session.first, &format!("banned-{}", session.run))?;
    session.set(&session.first, membership(session, &session.user, victim.as_str(), "ban")).await?;
    rejected(session, id, membership(session, &victim, victim.as_str(), "join")).await?;
    let ask = session.make("join", session.room.as_str(), &victim, &VERSIONS);
    session.ask(&session.first, ask).await?.is_error(403, "M_FORBIDDEN")?;
    session.set(&session.first, membership(session, &session.user, victim.as_str(), "leave")).await.map(drop)
}
