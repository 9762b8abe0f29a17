//! What takes two participants: invites through the hub, who may read what and when, and to whom events are sent.

use ruma::OwnedUserId;
use serde_json::{Value, json};

use super::checks;
use super::membership::{is_stripped, while_join_rule};
use super::reads::UNKNOWN_EVENT;
use crate::conformance::ear::{Arrival, lock};
use crate::conformance::judge::{self, Signer};
use crate::conformance::report::{Outcome, ensure, fail, skip};
use crate::conformance::session::{Endpoint, Session, VERSIONS, id_of, mark_of, pushed, sealed};
use crate::conformance::wire::{Answer, Ask, Identity};
use crate::conformance::{Check, Unmet};
use crate::event::Object;

pub(super) fn checks() -> Vec<Check> {
    checks![
        "LM-V-001", "Event and State APIs", "who is not in the room gets no event: 404 M_NOT_FOUND", |s, id| hidden(s, id, Read::Event);
        "LM-V-002", "int-api-get-state", "who is not in the room gets no state: 404 M_NOT_FOUND", |s, id| hidden(s, id, Read::State);
        "LM-V-003", "Event and State APIs", "who is not in the room gets no state_ids: 404 M_NOT_FOUND", |s, id| hidden(s, id, Read::StateIds);
        "LM-V-004", "Event and State APIs", "who is not in the room gets no backfill: 404 M_NOT_FOUND", |s, id| hidden(s, id, Read::Backfill);
        "LM-V-005", "int-receiving-events", "who is not in the room can send nothing into it", stranger_speaks;
        "LM-I-001", "int-api-invite", "the hub passes on what the invited user's server refuses", proxied;
        "LM-I-002", "int-api-invite", "an invite through the hub is answered with the event", invited;
        "LM-I-003", "int-api-invite", "that event is signed by the inviter's server, the hub, and the invited user's server", signed_thrice;
        "LM-I-004", "int-api-invite", "the invited user's server is asked with the finished event, rightly hashed and signed", invite_verifies;
        "LM-I-005", "int-api-invite", "it is told the room's version", invite_version;
        "LM-I-006", "int-stripped-state", "it is told stripped state of nothing but four fields", invite_stripped;
        "LM-I-007", "int-api-invite", "the invite is in the room", invite_in_room;
        "LM-I-008", "int-api-invite", "an invite that the rules forbid is 403 M_FORBIDDEN", forbidden_invite;
        "LM-I-009", "int-api-invite", "an event that is no invite is not taken for one", no_invite;
        "LM-I-010", "int-transport-leaves", "an invite is rejected by make_leave and send_leave", rejected;
        "LM-V-010", "int-auth-rules 5.2.4", "who is invited joins where only the invited may", invited_joins;
        "LM-V-011", "int-transport-invites", "who is invited again joins", second_joins;
        "LM-V-012", "int-transport-send-events", "what one participant says reaches the other", reaches_second;
        "LM-V-013", "int-transport-send-events", "and back", reaches_first;
        "LM-V-014", "int-txn-ids", "a server's transaction IDs are its own", own_ids;
        "LM-V-015", "int-calc-event-visibility", "shared history is given to who joined later", shared;
        "LM-V-016", "int-calc-event-visibility", "history for those who were there is served redacted to who joined later", joined_only;
        "LM-V-017", "int-auth-rules 5.4.5", "a server cannot remove another's user without the power", kicks_first;
        "LM-V-020", "int-transport-send-events", "who is removed is told of it", removed;
        "LM-V-021", "int-transport-send-events", "who has left is sent nothing more", no_more;
        "LM-V-022", "Event and State APIs", "who has left gets no later event: 404 M_NOT_FOUND", |s, id| later(s, id, Read::Event);
        "LM-V-023", "int-api-get-state", "who has left gets no later state: 404 M_NOT_FOUND", |s, id| later(s, id, Read::State);
        "LM-V-024", "Event and State APIs", "who has left gets no later backfill: 404 M_NOT_FOUND", |s, id| later(s, id, Read::Backfill);
        "LM-V-025", "int-auth-rules 6", "who has left can send nothing more", stranger_speaks;
    ]
}

#[derive(Clone, Copy)]
enum Read {
    Event,
    State,
    StateIds,
    Backfill,
}

impl Read {
    fn ask(self, session: &Session, event: &str) -> Result<Ask, Unmet> {
        match self {
            Self::Event => session.event(event),
            Self::State => Ok(session.about_room("state", &[("event_id", event)])),
            Self::StateIds => Ok(session.about_room("state_ids", &[("event_id", event)])),
            Self::Backfill => session.backfill(event, 2),
        }
    }
}

fn visibility(session: &Session) -> String {
    let event = session.state_event("m.room.history_visibility", "");
    let value = event.as_ref().and_then(|event| event.pointer("/content/history_visibility")).and_then(Value::as_str);
    value.unwrap_or("shared").to_owned()
}

/// The second server's user.
fn guest(session: &Session) -> Result<OwnedUserId, Unmet> {
    let second = session.second()?.clone();
    session.user_of(&second, session.user.localpart())
}

fn no_world(session: &Session) -> Outcome {
    match visibility(session).as_str() {
        "world_readable" => Err(skip("the room's history is for everybody")),
        _ => Ok(()),
    }
}

async fn hidden(session: &Session, id: &str, read: Read) -> Outcome {
    session.joined()?;
    let second = session.second()?;
    no_world(session)?;
    let said = id_of(&session.say(&session.first, &session.user, id).await?);
    session.ask(second, read.ask(session, &said)?).await?.is_error(404, "M_NOT_FOUND")?;
    session.ask(second, read.ask(session, UNKNOWN_EVENT)?).await?.is_error(404, "M_NOT_FOUND")?;
    session.gives(read.ask(session, &said)?).await
}

async fn stranger_speaks(session: &Session, id: &str) -> Outcome {
    session.joined()?;
    let (second, user) = (session.second()?, guest(session)?);
    if lock(&session.notes).second_is_in {
        return Err(skip("the second server is in the room"));
    }
    let mark = session.bad_mark(id);
    let answer = session.send(second, vec![sealed(session.message(&user, &mark), second)]).await?;
    ensure(answer.status < 500, "200, or an error of the 400s", || &answer)?;
    session.absent(id, &mark).await
}

fn member(session: &Session, sender: &str, target: &str, membership: &str) -> Object {
    let mut event = session.state(&session.user, "m.room.member", target, json!({ "membership": membership }));
    event.insert("sender".to_owned(), json!(sender));
    event
}

pub(super) async fn invite(session: &Session, event: Object) -> Result<Answer, Unmet> {
    let version = lock(&session.notes).version.clone();
    let uri = session.path(Endpoint::Invite, &session.txn())?;
    let body = json!({ "event": sealed(event, &session.first), "room_version": version, "invite_room_state": [] });
    session.ask(&session.first, Ask::post(uri, body)).await
}

fn may_invite(session: &Session) -> Outcome {
    session.joined()?;
    let levels = session.state_event("m.room.power_levels", "");
    let needed = levels.as_ref().and_then(|event| event.pointer("/content/invite")).and_then(Value::as_i64);
    session.needs_power(needed.unwrap_or(0))
}

async fn proxied(session: &Session, id: &str) -> Outcome {
    let target = guest(session)?;
    may_invite(session)?;
    let words = session.mark(id);
    let refusal = json!({ "errcode": "M_FORBIDDEN", "error": words });
    lock(&session.ear.manners).refuse_invites = Some((403, refusal));
    let answer = invite(session, member(session, session.user.as_str(), target.as_str(), "invite")).await;
    lock(&session.ear.manners).refuse_invites = None;
    let answer = answer?;
    answer.is_error(403, "M_FORBIDDEN")?;
    ensure(answer.text.contains(&words), format!("the words {words:?} of the invited user's server"), || &answer)
}

async fn invited(session: &Session, _: &str) -> Outcome {
    let target = guest(session)?;
    may_invite(session)?;
    let answer = invite(session, member(session, session.user.as_str(), target.as_str(), "invite")).await?;
    answer.is_good()?;
    let pdu = answer.field("pdu").filter(|pdu| pdu.is_object()).cloned();
    let pdu = pdu.ok_or_else(|| fail("an object pdu", &answer))?;
    let arrivals = session.ear.arrivals();
    let asked = arrivals.iter().rfind(|arrival| arrival.endpoint == "invite").and_then(|arrival| arrival.body.clone());
    let asked = asked.ok_or_else(|| fail("a request to the invited user's server", "none"))?;
    lock(&session.notes).invite = Some((pdu, asked));
    Ok(())
}

fn the_invite(session: &Session) -> Result<(Value, Value), Unmet> {
    session.second()?;
    lock(&session.notes).invite.clone().ok_or_else(|| skip("there is no invite"))
}

async fn signed_thrice(session: &Session, _: &str) -> Outcome {
    let (pdu, _) = the_invite(session)?;
    let second = session.second()?;
    let names = [session.first.name.as_str(), session.target.as_str(), second.name.as_str()];
    for signer in [Signer::Sender, Signer::Hub, Signer::Target] {
        if let Some(problem) = judge::signature_problem(session, &pdu, signer).await {
            return Err(fail(format!("signatures of {names:?}"), format!("{problem}: {pdu}")));
        }
    }
    Ok(())
}

async fn invite_verifies(session: &Session, _: &str) -> Outcome {
    let (_, asked) = the_invite(session)?;
    let event = asked.get("event").cloned().unwrap_or_default();
    match judge::list_problem(session, Some(&json!([event]))).await {
        Some(problem) => Err(fail("a finished event that verifies", problem)),
        None => Ok(()),
    }
}

async fn invite_version(session: &Session, _: &str) -> Outcome {
    let (_, asked) = the_invite(session)?;
    let version = lock(&session.notes).version.clone();
    ensure(asked.get("room_version") == Some(&json!(version)), format!("room_version {version}"), || &asked)
}

async fn invite_stripped(session: &Session, _: &str) -> Outcome {
    let (_, asked) = the_invite(session)?;
    match asked.get("invite_room_state") {
        Some(state) => is_stripped(state),
        None => Err(skip("no stripped state was given, which is allowed")),
    }
}

async fn invite_in_room(session: &Session, _: &str) -> Outcome {
    let (pdu, _) = the_invite(session)?;
    let id = id_of(&pdu);
    session.arrived(&session.first, "the hub sends the invite to all", |event| id_of(event) == id).await.map(drop)
}

async fn forbidden_invite(session: &Session, _: &str) -> Outcome {
    session.joined()?;
    let create = session.state_event("m.room.create", "");
    let joined = create.as_ref().and_then(|event| event.get("sender")).and_then(Value::as_str).unwrap_or_default();
    let is_in = session.state_event("m.room.member", joined);
    let is_in = is_in.as_ref().and_then(|event| event.pointer("/content/membership")).and_then(Value::as_str);
    if is_in != Some("join") {
        return Err(skip("nobody else is known to be in the room"));
    }
    invite(session, member(session, session.user.as_str(), joined, "invite")).await?.is_error(403, "M_FORBIDDEN")
}

async fn no_invite(session: &Session, id: &str) -> Outcome {
    let target = guest(session)?;
    session.joined()?;
    let mark = session.bad_mark(id);
    for (field, value) in
        [("content", json!({ "membership": "join", "mark": mark })), ("type", json!("im.isthmus.other"))]
    {
        let mut event = member(session, session.user.as_str(), target.as_str(), "invite");
        event.insert("content".to_owned(), json!({ "membership": "invite", "mark": mark }));
        event.insert(field.to_owned(), value);
        invite(session, event).await?.is_refusal()?;
    }
    session.absent(id, &mark).await
}

async fn of_second(session: &Session, endpoint: Endpoint, event: Object) -> Result<Answer, Unmet> {
    let second = session.second()?;
    let uri = session.path(endpoint, &session.txn())?;
    session.ask(second, Ask::post(uri, Value::Object(sealed(event, second)))).await
}

async fn rejected(session: &Session, _: &str) -> Outcome {
    let (_, user) = (the_invite(session)?, guest(session)?);
    let ask = session.make("leave", session.room.as_str(), &user, &VERSIONS);
    session.ask(session.second()?, ask).await?.is_good()?;
    let leave = member(session, user.as_str(), user.as_str(), "leave");
    of_second(session, Endpoint::SendLeave, leave).await?.is_good()?;
    let is_it = |event: &Value| {
        event.get("state_key").and_then(Value::as_str) == Some(user.as_str())
            && event.pointer("/content/membership").and_then(Value::as_str) == Some("leave")
    };
    session.arrived(&session.first, "the hub sends the rejection to all", is_it).await.map(drop)
}

async fn set_visibility(session: &Session, value: &str) -> Result<Value, Unmet> {
    let content = json!({ "history_visibility": value });
    let event = session.state(&session.user, "m.room.history_visibility", "", content);
    session.set(&session.first, event).await
}

/// Says what the second server is to see when it has come, and what it is not.
async fn prepare(session: &Session, id: &str) -> Outcome {
    let open = matches!(visibility(session).as_str(), "shared" | "world_readable");
    if open {
        let said = session.say(&session.first, &session.user, id).await?;
        lock(&session.notes).before_second = Some(said);
    }
    if session.needs_power(50).is_ok() {
        let before = visibility(session);
        set_visibility(session, "joined").await?;
        let secret = session.say(&session.first, &session.user, id).await?;
        lock(&session.notes).secret = Some(secret);
        set_visibility(session, &before).await?;
    } else if visibility(session) == "joined" {
        let secret = session.say(&session.first, &session.user, id).await?;
        lock(&session.notes).secret = Some(secret);
    }
    Ok(())
}

async fn invited_joins(session: &Session, _: &str) -> Outcome {
    session.joined()?;
    let second = session.second()?.clone();
    may_invite(session)?;
    let user = session.user_of(&second, &format!("invited-{}", session.run))?;
    let joining = async {
        let invited = member(session, session.user.as_str(), user.as_str(), "invite");
        invite(session, invited).await?.is_good()?;
        let ask = session.make("join", session.room.as_str(), &user, &VERSIONS);
        session.ask(&second, ask).await?.is_good()?;
        of_second(session, Endpoint::SendJoin, member(session, user.as_str(), user.as_str(), "join"))
            .await?
            .is_good()?;
        let is_it = |event: &Value| {
            event.get("state_key").and_then(Value::as_str) == Some(user.as_str())
                && event.pointer("/content/membership").and_then(Value::as_str) == Some("join")
        };
        session.arrived(&session.first, "the hub sends the join to all", is_it).await.map(drop)
    };
    let joined = while_join_rule(session, "invite", joining).await;
    // However far it came, it goes.
    let left = of_second(session, Endpoint::SendLeave, member(session, user.as_str(), user.as_str(), "leave")).await;
    joined?;
    left?.is_good()
}

async fn second_joins(session: &Session, id: &str) -> Outcome {
    session.joined()?;
    let user = guest(session)?;
    prepare(session, id).await?;
    let again = invite(session, member(session, session.user.as_str(), user.as_str(), "invite")).await?;
    again.is_good()?;
    let ask = session.make("join", session.room.as_str(), &user, &VERSIONS);
    session.ask(session.second()?, ask).await?.is_good()?;
    of_second(session, Endpoint::SendJoin, member(session, user.as_str(), user.as_str(), "join")).await?.is_good()?;
    lock(&session.notes).second_is_in = true;
    let is_it = |event: &Value| {
        event.get("state_key").and_then(Value::as_str) == Some(user.as_str())
            && event.pointer("/content/membership").and_then(Value::as_str) == Some("join")
    };
    session.arrived(&session.first, "the hub sends the join to all", is_it).await.map(drop)
}

fn is_in(session: &Session) -> Result<&std::sync::Arc<Identity>, Unmet> {
    let second = session.second()?;
    if lock(&session.notes).second_is_in { Ok(second) } else { Err(skip("the second server is not in the room")) }
}

async fn reaches_second(session: &Session, id: &str) -> Outcome {
    let second = is_in(session)?;
    let mark = session.mark(id);
    let lpdu = sealed(session.message(&session.user, &mark), &session.first);
    session.send(&session.first, vec![lpdu]).await?.is_good()?;
    session.echo(second, &mark).await.map(drop)
}

async fn reaches_first(session: &Session, id: &str) -> Outcome {
    let (second, user) = (is_in(session)?, guest(session)?);
    let mark = session.mark(id);
    session.send(second, vec![sealed(session.message(&user, &mark), second)]).await?.is_good()?;
    session.echo(&session.first, &mark).await.map(drop)
}

async fn own_ids(session: &Session, id: &str) -> Outcome {
    let (second, user) = (is_in(session)?, guest(session)?);
    let uri = session.path(Endpoint::Send, &session.txn())?;
    for (identity, user) in [(&session.first, &session.user), (second, &user)] {
        let mark = session.mark(id);
        let body = json!({ "pdus": [sealed(session.message(user, &mark), identity)] });
        session.ask(identity, Ask::put(uri.clone(), body)).await?.is_good()?;
        session.echo(&session.first, &mark).await?;
    }
    Ok(())
}

async fn shared(session: &Session, _: &str) -> Outcome {
    let second = is_in(session)?;
    let before = lock(&session.notes).before_second.clone().ok_or_else(|| skip("the room's history is not shared"))?;
    let answer = session.ask(second, session.event(&id_of(&before))?).await?;
    answer.is_good()?;
    ensure(answer.field("content") == before.get("content"), "the event with its content", || &answer)
}

async fn joined_only(session: &Session, _: &str) -> Outcome {
    let second = is_in(session)?;
    let secret = lock(&session.notes).secret.clone();
    let Some(secret) = secret else { return session.needs_power(50) };
    let id = id_of(&secret);
    let answer = session.ask(second, session.event(&id)?).await?;
    // Whoever has no reason to know that it exists may be told that it does not.
    if answer.status != 404 {
        answer.is_good()?;
        ensure(answer.field("content") == Some(&json!({})), "an empty content", || &answer)?;
    }
    let answer = session.ask(second, session.backfill(&id, 1)?).await?;
    let pdus = answer.field("pdus").and_then(Value::as_array);
    let shown = pdus.into_iter().flatten().any(|event| id_of(event) == id && event.get("content") != Some(&json!({})));
    ensure(!shown, "no content in backfill either", || &answer)
}

async fn kicks_first(session: &Session, id: &str) -> Outcome {
    let (second, user) = (is_in(session)?, guest(session)?);
    if session.level(&user) >= 50 {
        return Err(skip(format!("{user} has the power")));
    }
    let mark = session.bad_mark(id);
    let mut kick = member(session, user.as_str(), session.user.as_str(), "leave");
    kick.insert("content".to_owned(), json!({ "membership": "leave", "mark": mark }));
    session.send(second, vec![sealed(kick, second)]).await?;
    session.absent(id, &mark).await
}

async fn removed(session: &Session, _: &str) -> Outcome {
    let (second, user) = (is_in(session)?.clone(), guest(session)?);
    let strong = session.needs_power(50);
    let (by, identity) = if strong.is_ok() { (&session.user, &session.first) } else { (&user, &second) };
    let leave = member(session, by.as_str(), user.as_str(), "leave");
    session.send(identity, vec![sealed(leave, identity)]).await?.is_good()?;
    let is_it = |event: &Value| {
        event.get("state_key").and_then(Value::as_str) == Some(user.as_str())
            && event.pointer("/content/membership").and_then(Value::as_str) == Some("leave")
            && event.get("sender").and_then(Value::as_str) == Some(by.as_str())
    };
    session.arrived(&session.first, "the hub sends the event to all", is_it).await?;
    lock(&session.notes).second_is_in = false;
    let told = session.arrived(&second, "the hub sends the event to the server of who is removed", is_it).await;
    // Who went by itself need not be told.
    strong.and(told.map(drop))
}

fn is_gone(session: &Session) -> Outcome {
    session.joined()?;
    session.second()?;
    match lock(&session.notes).second_is_in {
        true => Err(skip("the second server is in the room")),
        false => Ok(()),
    }
}

async fn no_more(session: &Session, id: &str) -> Outcome {
    is_gone(session)?;
    let said = session.say(&session.first, &session.user, id).await?;
    // Two more, so that what was sent to others first would have come by now.
    for _ in 0..2 {
        session.say(&session.first, &session.user, id).await?;
    }
    let mark = mark_of(&said).unwrap_or_default().to_owned();
    lock(&session.notes).after_second = Some(said);
    let arrivals: Vec<Arrival> = session.ear.arrivals();
    let found = pushed(&arrivals, session.second()?).any(|(_, event)| mark_of(event) == Some(mark.as_str()));
    ensure(!found, "nothing is sent", || "the event")
}

async fn later(session: &Session, _: &str, read: Read) -> Outcome {
    is_gone(session)?;
    no_world(session)?;
    let after = lock(&session.notes).after_second.clone().ok_or_else(|| skip("nothing was said since"))?;
    let after = id_of(&after);
    session.ask(session.second()?, read.ask(session, &after)?).await?.is_error(404, "M_NOT_FOUND")?;
    session.gives(read.ask(session, &after)?).await
}
