//! Events that are rightly made and that the authorization rules forbid, by the number of the rule.

use serde_json::{Value, json};

use super::checks;
use crate::conformance::Check;
use crate::conformance::report::{Outcome, ensure, skip};
use crate::conformance::session::{Session, sealed};
use crate::event::Object;

pub(super) fn checks() -> Vec<Check> {
    checks![
        "LM-P-001", "int-auth-rules 3", "a second m.room.create is rejected", |s, id| by(s, id, Who::User, |s, by| s.state(by, "m.room.create", "", json!({ "room_version": version(s) })));
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
        "LM-P-019", "int-auth-rules 9.5", "a level above one's own cannot be asked for", |s, id| by(s, id, Who::Strong, |s, by| levels(s, by, "kick", json!(1_000_000)));
        "LM-P-020", "int-auth-rules 9.9", "a level above one's own cannot be given", |s, id| by(s, id, Who::Strong, |s, by| user_level(s, by, s.low.as_str(), 1_000_000));
        "LM-P-021", "int-auth-rules 5.2.3", "who is banned cannot join", banned;
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

async fn by(session: &Session, id: &str, who: Who, make: impl Fn(&Session, &ruma::UserId) -> Object) -> Outcome {
    session.joined()?;
    let stranger = session.user_of(&session.first, &format!("stranger-{}", session.run))?;
    match who {
        Who::Strong => session.needs_power(50)?,
        Who::Low => session.low_is_low()?,
        Who::NoKnocks if rule(session) == "knock" => return Err(skip("one may knock at the room")),
        _ => {}
    }
    let sender = match who {
        Who::User | Who::Strong => &session.user,
        Who::Low => &session.low,
        Who::Stranger | Who::NoKnocks => &stranger,
    };
    let mark = session.bad_mark(id);
    let mut event = make(session, sender);
    if let Some(content) = event.get_mut("content").and_then(Value::as_object_mut) {
        content.insert("mark".to_owned(), json!(mark));
    }
    let answer = session.send(&session.first, vec![sealed(event, &session.first)]).await?;
    ensure(answer.status < 500, "200, or an error of the 400s", || &answer)?;
    session.absent(id, &mark).await
}

fn version(session: &Session) -> String {
    crate::conformance::ear::lock(&session.notes).version.clone()
}

fn rule(session: &Session) -> String {
    let rules = session.state_event("m.room.join_rules", "");
    let rule = rules.as_ref().and_then(|event| event.pointer("/content/join_rule")).and_then(Value::as_str);
    rule.unwrap_or("invite").to_owned()
}

/// Somebody of the suite's server who is not in the room.
fn other(session: &Session) -> String {
    format!("@other-{}:{}", session.run, session.first.name)
}

fn membership(session: &Session, sender: &ruma::UserId, target: &str, membership: &str) -> Object {
    session.state(sender, "m.room.member", target, json!({ "membership": membership }))
}

fn content_of_levels(session: &Session) -> Object {
    let levels = session.state_event("m.room.power_levels", "");
    levels.and_then(|event| event.get("content").and_then(Value::as_object).cloned()).unwrap_or_default()
}

/// The power levels with one field changed.
fn levels(session: &Session, sender: &ruma::UserId, field: &str, value: Value) -> Object {
    let mut content = content_of_levels(session);
    content.insert(field.to_owned(), value);
    session.state(sender, "m.room.power_levels", "", Value::Object(content))
}

fn user_level(session: &Session, sender: &ruma::UserId, user: &str, level: i64) -> Object {
    let mut users = content_of_levels(session).get("users").and_then(Value::as_object).cloned().unwrap_or_default();
    users.insert(user.to_owned(), json!(level));
    levels(session, sender, "users", Value::Object(users))
}

async fn banned(session: &Session, id: &str) -> Outcome {
    session.joined()?;
    session.needs_power(50)?;
    let victim = session.user_of(&session.first, &format!("banned-{}", session.run))?;
    session.set(&session.first, membership(session, &session.user, victim.as_str(), "ban")).await?;
    let mark = session.bad_mark(id);
    let mut join = membership(session, &victim, victim.as_str(), "join");
    if let Some(content) = join.get_mut("content").and_then(Value::as_object_mut) {
        content.insert("mark".to_owned(), json!(mark));
    }
    let answer = session.send(&session.first, vec![sealed(join, &session.first)]).await?;
    ensure(answer.status < 500, "200, or an error of the 400s", || &answer)?;
    session.absent(id, &mark).await?;
    let versions = crate::conformance::session::VERSIONS;
    let ask = session.make("join", session.room.as_str(), &victim, &versions);
    session.ask(&session.first, ask).await?.is_error(403, "M_FORBIDDEN")?;
    session.set(&session.first, membership(session, &session.user, victim.as_str(), "leave")).await.map(drop)
}
