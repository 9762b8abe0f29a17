//! Templates and handshakes: how the suite's users come into the room and leave it.

use std::time::Duration;

use ruma::{OwnedUserId, UserId};
use serde_json::{Value, json};

use super::checks;
use crate::conformance::ear::lock;
use crate::conformance::judge::{self, Signer};
use crate::conformance::report::{Outcome, ensure, fail, skip};
use crate::conformance::session::{Endpoint, Session, VERSIONS, id_of, sealed, signed_by};
use crate::conformance::wire::{Answer, Ask, object};
use crate::conformance::{Check, Unmet};
use crate::event::{Object, lpdu_hash};
use crate::identity::SigningKey;

/// How often, and with which pause, it is asked whether one may knock or join now.
pub(super) const KNOCK_LOOKS: u32 = 10;
pub(super) const KNOCK_PAUSE: Duration = Duration::from_millis(300);

const NOWHERE: &str = "!conformance-nowhere:elsewhere.invalid";

/// Up to the end of the join.
pub(super) fn before() -> Vec<Check> {
    checks![
        "LM-M-001", "int-api-make-join", "make_join gives a template with type, state_key, sender and membership", |s, _| template(s, "join");
        "LM-M-002", "int-api-make-join", "the template is of an LPDU: nothing that only the hub may set", |s, _| partial(s, "join");
        "LM-M-003", "int-api-make-join", "make_join of an unknown room is 404 M_NOT_FOUND", |s, _| make_nowhere(s, "join");
        "LM-M-004", "int-api-make-join", "a server that does not know the room's version gets 400 M_INCOMPATIBLE_ROOM_VERSION", |s, _| incompatible(s, "join");
        "LM-M-005", "int-api-make-join", "make_join for a user of another server is 403 M_FORBIDDEN", foreign_template;
        "LM-M-006", "int-api-make-leave", "make_leave of an unknown room is 404 M_NOT_FOUND", |s, _| make_nowhere(s, "leave");
        "LM-M-007", "int-api-make-leave", "make_leave of a user who is not in the room is 403 M_FORBIDDEN", leave_of_stranger;
        "LM-M-008", "int-api-make-knock", "make_knock of an unknown room is 404 M_NOT_FOUND", |s, _| make_nowhere(s, "knock");
        "LM-M-024", "int-api-send-join", "send_join into an unknown room is 404 M_NOT_FOUND", |s, _| send_nowhere(s, Endpoint::SendJoin, "join");
        "LM-M-025", "int-api-send-leave", "send_leave of an unknown room is 404 M_NOT_FOUND", |s, _| send_nowhere(s, Endpoint::SendLeave, "leave");
        "LM-M-026", "int-api-send-knock", "send_knock at an unknown room is 404 M_NOT_FOUND", |s, _| send_nowhere(s, Endpoint::SendKnock, "knock");
        "LM-M-010", "int-api-send-join", "a join is taken", join;
        "LM-M-011", "int-api-send-join", "the answer holds the join with what the hub adds, rightly hashed and signed", joined_event;
        "LM-M-012", "int-api-send-join", "the answer holds the state before the join, with the create event", joined_state;
        "LM-M-013", "int-api-send-join", "the events of the answer's state are rightly hashed and signed", joined_state_verifies;
        "LM-M-014", "int-api-send-join", "auth_chain holds everything by which the state is allowed", joined_chain;
        "LM-M-015", "int-txn-ids", "the same send_join again gets the same answer", join_again;
        "LM-M-016", "int-api-send-join", "send_join takes nothing but joins", |s, id| bad_join(s, id, Wrong::Membership);
        "LM-M-017", "int-checking-signatures", "send_join does not take what is wrongly signed", |s, id| bad_join(s, id, Wrong::Signature);
        "LM-M-018", "int-api-send-join", "send_join does not take another server's user", |s, id| bad_join(s, id, Wrong::Server);
        "LM-M-019", "int-auth-rules 5.2.2", "send_join does not take a join of somebody else", |s, id| bad_join(s, id, Wrong::Target);
        "LM-M-020", "int-transport-joins", "another user of a server that is in the room joins by send", low_joins;
        "LM-M-021", "int-api-make-leave", "make_leave gives a template with the room's version", leave_template;
        "LM-M-022", "int-api-make-knock", "make_knock gives a template where one may knock, and is 403 M_FORBIDDEN elsewhere", knock_template;
        "LM-M-023", "int-api-send-knock", "a knock is answered with stripped state, and can be taken back", knock;
    ]
}

/// The end.
pub(super) fn after() -> Vec<Check> {
    checks![
        "LM-M-030", "int-transport-leaves", "a user of a server with others in the room leaves by send", low_leaves;
        "LM-M-031", "int-api-send-leave", "a user leaves by make_leave and send_leave, whose answer is an empty object", user_leaves;
        "LM-M-032", "int-api-make-leave", "who has left cannot leave again: 403 M_FORBIDDEN", cannot_leave_again;
    ]
}

/// The template of an answer, bare as the draft's or under `event`.
fn bare(answer: &Answer, change: &str) -> Value {
    let whole = answer.json.clone().unwrap_or_default();
    // make_leave has it under `event`, the others have it bare.
    if change == "leave" { whole.get("event").cloned().unwrap_or_default() } else { whole }
}

/// The template of an answer: one that is not where it should be says what it has all the same.
fn template_of(answer: &Answer, change: &str) -> Value {
    let (right, whole) = (bare(answer, change), answer.json.clone().unwrap_or_default());
    let places = [Some(&right), whole.get("event"), Some(&whole)];
    let mut found = places.into_iter().flatten().filter(|template| template.get("type").is_some());
    found.next().cloned().unwrap_or_default()
}

async fn made(session: &Session, change: &str) -> Result<Answer, Unmet> {
    let answer =
        session.ask(&session.first, session.make(change, session.room.as_str(), &session.user, &VERSIONS)).await?;
    if answer.status == 403 {
        return Err(skip(format!("{} may not {change}: {answer}", session.user)));
    }
    answer.is_good()?;
    Ok(answer)
}

fn is_template(template: &Value, user: &str, membership: &str) -> Outcome {
    let good = template.get("type") == Some(&json!("m.room.member"))
        && template.get("state_key") == Some(&json!(user))
        && template.get("sender") == Some(&json!(user))
        && template.pointer("/content/membership") == Some(&json!(membership));
    ensure(good, format!("an m.room.member event of {user} with the membership {membership}"), || template)
}

async fn template(session: &Session, change: &str) -> Outcome {
    let answer = made(session, change).await?;
    is_template(&bare(&answer, change), session.user.as_str(), change)
}

async fn partial(session: &Session, change: &str) -> Outcome {
    let answer = made(session, change).await?;
    let template = template_of(&answer, change);
    is_template(&template, session.user.as_str(), change)
        .map_err(|_| skip(format!("it gives no template: {answer}")))?;
    let hubs = ["auth_events", "prev_events", "hashes", "signatures"];
    let stray = hubs.iter().find(|field| template.get(**field).is_some());
    ensure(stray.is_none(), format!("none of {hubs:?}"), || &template)
}

async fn make_nowhere(session: &Session, change: &str) -> Outcome {
    let ask = |room: &str| session.make(change, room, &session.user, &VERSIONS);
    session.ask(&session.first, ask(NOWHERE)).await?.is_error(404, "M_NOT_FOUND")?;
    knows_the_room(&session.ask(&session.first, ask(session.room.as_str())).await?)
}

/// Skips where the answer of the room that is there is that of one that is not.
fn knows_the_room(answer: &Answer) -> Outcome {
    match answer.is_error(404, "M_NOT_FOUND") {
        Ok(()) => Err(skip(format!("the target says the same of the room that is there: {answer}"))),
        Err(_) => Ok(()),
    }
}

async fn send_nowhere(session: &Session, endpoint: Endpoint, membership: &str) -> Outcome {
    let mut event =
        session.state(&session.user, "m.room.member", session.user.as_str(), json!({ "membership": membership }));
    let forged = signed_by(event.clone(), session.first.name.as_str(), session.first.key.id(), &SigningKey::generate());
    event.insert("room_id".to_owned(), json!(NOWHERE));
    handshake(session, endpoint, sealed(event, &session.first)).await?.is_error(404, "M_NOT_FOUND")?;
    knows_the_room(&handshake(session, endpoint, forged).await?)
}

async fn incompatible(session: &Session, change: &str) -> Outcome {
    let ask = session.make(change, session.room.as_str(), &session.user, &["org.example.nothing"]);
    session.ask(&session.first, ask).await?.is_error(400, "M_INCOMPATIBLE_ROOM_VERSION")
}

async fn foreign_template(session: &Session, _: &str) -> Outcome {
    let user = OwnedUserId::try_from("@somebody:elsewhere.invalid").map_err(|error| skip(error.to_string()))?;
    let ask = session.make("join", session.room.as_str(), &user, &VERSIONS);
    session.ask(&session.first, ask).await?.is_error(403, "M_FORBIDDEN")
}

async fn leave_of_stranger(session: &Session, _: &str) -> Outcome {
    let stranger = session.user_of(&session.first, &format!("stranger-{}", session.run))?;
    let ask = session.make("leave", session.room.as_str(), &stranger, &VERSIONS);
    session.ask(&session.first, ask).await?.is_error(403, "M_FORBIDDEN")
}

fn member(session: &Session, user: &str, membership: &str) -> Object {
    object(json!({
        "type": "m.room.member",
        "state_key": user,
        "sender": user,
        "room_id": session.room,
        "origin_server_ts": session.clock.now_ms(),
        "hub_server": session.target,
        "content": { "membership": membership },
    }))
}

pub(super) async fn handshake(session: &Session, endpoint: Endpoint, lpdu: Object) -> Result<Answer, Unmet> {
    let uri = session.path(endpoint, &session.txn())?;
    session.ask(&session.first, Ask::post(uri, Value::Object(lpdu))).await
}

async fn join(session: &Session, _: &str) -> Outcome {
    made(session, "join").await?;
    let lpdu = sealed(member(session, session.user.as_str(), "join"), &session.first);
    let answer = handshake(session, Endpoint::SendJoin, lpdu.clone()).await?;
    answer.is_good()?;
    let joined = answer.json.clone().unwrap_or_default();
    ensure(joined.get("event").is_some_and(Value::is_object), "an object event", || &answer)?;
    let create = joined.get("state").and_then(Value::as_array).and_then(|state| {
        state.iter().find(|event| event.get("type").and_then(Value::as_str) == Some("m.room.create"))
    });
    let version = create.and_then(|event| event.pointer("/content/room_version")).and_then(Value::as_str);
    let mut notes = lock(&session.notes);
    notes.version = version.unwrap_or_default().to_owned();
    notes.joined = Some(joined);
    Ok(())
}

async fn joined_event(session: &Session, _: &str) -> Outcome {
    let event = session.joined()?.get("event").cloned().unwrap_or_default();
    is_template(&event, session.user.as_str(), "join")?;
    let found = [judge::form, judge::whole_hash, judge::inner_hash, judge::one_before];
    if let Some(problem) = found.iter().find_map(|property| property(&event)) {
        return Err(fail("a finished event", format!("{problem}: {event}")));
    }
    for signer in [Signer::Hub, Signer::Sender] {
        if let Some(problem) = judge::signature_problem(session, &event, signer).await {
            return Err(fail("the signatures of the hub and of the suite", format!("{problem}: {event}")));
        }
    }
    Ok(())
}

async fn joined_state(session: &Session, _: &str) -> Outcome {
    let joined = session.joined()?;
    let state = joined.get("state").cloned().unwrap_or_default();
    let events = judge::state_of(&state);
    let create = events.contains_key(&("m.room.create".to_owned(), String::new()));
    let own = joined.get("event").map(id_of).unwrap_or_default();
    let holds_join = state.as_array().is_some_and(|state| state.iter().any(|event| id_of(event) == own));
    ensure(create && !holds_join, "the create event, and not the join itself", || &state)
}

async fn joined_state_verifies(session: &Session, _: &str) -> Outcome {
    let joined = session.joined()?;
    match judge::list_problem(session, joined.get("state")).await {
        Some(problem) => Err(fail("events that verify", problem)),
        None => Ok(()),
    }
}

async fn joined_chain(session: &Session, _: &str) -> Outcome {
    let joined = session.joined()?;
    match judge::is_closed(joined.get("state"), joined.get("auth_chain")) {
        Some(problem) => Err(fail("every event that is named in auth_events", problem)),
        None => Ok(()),
    }
}

async fn join_again(session: &Session, _: &str) -> Outcome {
    session.joined()?;
    // A user of its own: a second join of the same user is an event like others.
    let user = session.user_of(&session.first, &format!("twice-{}", session.run))?;
    let lpdu = sealed(member(session, user.as_str(), "join"), &session.first);
    let uri = session.path(Endpoint::SendJoin, &session.txn())?;
    let once = session.ask(&session.first, Ask::post(uri.clone(), Value::Object(lpdu.clone()))).await?;
    if once.status == 403 {
        return Err(skip(format!("{user} may not join: {once}")));
    }
    once.is_good()?;
    let again = session.ask(&session.first, Ask::post(uri, Value::Object(lpdu))).await?;
    again.is_good()?;
    let id = |answer: &Answer| answer.field("event").map(id_of).unwrap_or_default();
    ensure(!id(&once).is_empty(), "an object event", || &once)?;
    ensure(id(&once) == id(&again), format!("the event {}", id(&once)), || id(&again))?;
    let leave = sealed(member(session, user.as_str(), "leave"), &session.first);
    session.send(&session.first, vec![leave]).await.map(drop)
}

#[derive(Clone, Copy, PartialEq)]
enum Wrong {
    Membership,
    Signature,
    Server,
    Target,
}

async fn bad_join(session: &Session, id: &str, wrong: Wrong) -> Outcome {
    session.joined()?;
    let mark = session.bad_mark(id);
    let user = match wrong {
        Wrong::Server => "@somebody:elsewhere.invalid".to_owned(),
        _ => session.user_of(&session.first, &format!("wrong-{}", session.fresh()))?.to_string(),
    };
    let mut event = member(session, &user, "join");
    if matches!(wrong, Wrong::Target | Wrong::Membership) {
        event.insert("sender".to_owned(), json!(session.user));
    }
    // An invite would be allowed, but is no join.
    let membership = if wrong == Wrong::Membership { "invite" } else { "join" };
    event.insert("content".to_owned(), json!({ "membership": membership, "mark": mark }));
    let lpdu = if wrong == Wrong::Signature {
        let hash = lpdu_hash(&event);
        event.insert("hashes".to_owned(), json!({ "lpdu": { "sha256": hash } }));
        signed_by(event, session.first.name.as_str(), session.first.key.id(), &SigningKey::generate())
    } else {
        sealed(event, &session.first)
    };
    handshake(session, Endpoint::SendJoin, lpdu).await?.is_refusal()?;
    session.absent(id, &mark).await
}

async fn low_joins(session: &Session, _: &str) -> Outcome {
    session.joined()?;
    let rule = join_rule(session);
    if rule != "public" {
        return Err(skip(format!("the room's join rule is {rule}")));
    }
    let event = session.set(&session.first, member(session, session.low.as_str(), "join")).await?;
    is_template(&event, session.low.as_str(), "join")?;
    lock(&session.notes).low_is_in = true;
    Ok(())
}

pub(super) fn join_rule(session: &Session) -> String {
    let rules = session.state_event("m.room.join_rules", "");
    let rule = rules.as_ref().and_then(|event| event.pointer("/content/join_rule")).and_then(Value::as_str);
    rule.unwrap_or("invite").to_owned()
}

async fn leave_template(session: &Session, _: &str) -> Outcome {
    session.joined()?;
    let answer = made(session, "leave").await?;
    is_template(&bare(&answer, "leave"), session.user.as_str(), "leave")?;
    let version = lock(&session.notes).version.clone();
    ensure(answer.field("room_version") == Some(&json!(version)), format!("room_version {version}"), || &answer)
}

async fn set_join_rules(session: &Session, content: Value) -> Outcome {
    let event = session.state(&session.user, "m.room.join_rules", "", content);
    session.set(&session.first, event).await.map(drop)
}

/// Has the room take knocks while something is looked at, where the suite's user has the power for that.
async fn while_one_may_knock(session: &Session, look: impl Future<Output = Outcome>) -> Outcome {
    while_join_rule(session, "knock", look).await
}

/// Gives the room a join rule while something is looked at, where the suite's user has the power for that.
pub(super) async fn while_join_rule(session: &Session, rule: &str, look: impl Future<Output = Outcome>) -> Outcome {
    if join_rule(session) == rule {
        return look.await;
    }
    session.needs_power(session.needed_for("m.room.join_rules"))?;
    let before = session.state_event("m.room.join_rules", "").and_then(|event| event.get("content").cloned());
    let before = before.ok_or_else(|| skip("the room has no join rules"))?;
    lock(&session.notes).join_rules = Some(before.clone());
    set_join_rules(session, json!({ "join_rule": rule })).await?;
    let looked = look.await;
    let restored = set_join_rules(session, before).await;
    lock(&session.notes).join_rules = None;
    looked.and(restored)
}

fn make_knock(session: &Session, user: &UserId, versions: &[&str]) -> Ask {
    session.make("knock", session.room.as_str(), user, versions)
}

/// The template of a knock; a hub that asks somebody else whom it lets in may take a moment to know of new join rules.
async fn made_knock(session: &Session, user: &UserId) -> Result<Answer, Unmet> {
    for _ in 0..KNOCK_LOOKS {
        let answer = session.ask(&session.first, make_knock(session, user, &VERSIONS)).await?;
        if answer.status != 403 {
            return Ok(answer);
        }
        tokio::time::sleep(KNOCK_PAUSE).await;
    }
    session.ask(&session.first, make_knock(session, user, &VERSIONS)).await
}

async fn knock_template(session: &Session, _: &str) -> Outcome {
    session.joined()?;
    let user = session.user_of(&session.first, &format!("knock-{}", session.run))?;
    if join_rule(session) != "knock" {
        session.ask(&session.first, make_knock(session, &user, &VERSIONS)).await?.is_error(403, "M_FORBIDDEN")?;
    }
    let looked = while_one_may_knock(session, async {
        let answer = made_knock(session, &user).await?;
        answer.is_good()?;
        is_template(&bare(&answer, "knock"), user.as_str(), "knock")?;
        let ask = make_knock(session, &user, &["org.example.nothing"]);
        session.ask(&session.first, ask).await?.is_error(400, "M_INCOMPATIBLE_ROOM_VERSION")
    });
    match looked.await {
        // Without the power for more, that it is refused where nobody may knock is what can be seen.
        Err(Unmet::Skip(_)) => Ok(()),
        looked => looked,
    }
}

async fn knock(session: &Session, _: &str) -> Outcome {
    session.joined()?;
    let user = session.user_of(&session.first, &format!("knock-{}", session.run))?;
    while_one_may_knock(session, async {
        made_knock(session, &user).await?;
        let lpdu = sealed(member(session, user.as_str(), "knock"), &session.first);
        let answer = handshake(session, Endpoint::SendKnock, lpdu).await?;
        answer.is_good()?;
        let stripped = answer.field("stripped_state").cloned().unwrap_or_default();
        // Taken back whatever comes with it.
        let leave = sealed(member(session, user.as_str(), "leave"), &session.first);
        let left = handshake(session, Endpoint::SendLeave, leave).await;
        is_stripped(&stripped)?;
        left?.is_good()
    })
    .await
}

/// Events with nothing but the four fields.
pub(super) fn is_stripped(events: &Value) -> Outcome {
    let fields = ["content", "sender", "state_key", "type"];
    if events.as_array().is_some_and(Vec::is_empty) {
        return Err(skip("no stripped state was given, which is allowed"));
    }
    let good = events.as_array().is_some_and(|events| {
        events.iter().all(|event| {
            event.as_object().is_some_and(|event| {
                event.len() == fields.len() && fields.iter().all(|field| event.contains_key(*field))
            })
        })
    });
    ensure(good, format!("events with {fields:?} alone"), || events)
}

async fn low_leaves(session: &Session, _: &str) -> Outcome {
    session.joined()?;
    if !lock(&session.notes).low_is_in {
        return Err(skip(format!("{} is not in the room", session.low)));
    }
    session.set(&session.first, member(session, session.low.as_str(), "leave")).await?;
    lock(&session.notes).low_is_in = false;
    Ok(())
}

async fn user_leaves(session: &Session, _: &str) -> Outcome {
    session.joined()?;
    is_template(&template_of(&made(session, "leave").await?, "leave"), session.user.as_str(), "leave")?;
    let lpdu = sealed(member(session, session.user.as_str(), "leave"), &session.first);
    let answer = handshake(session, Endpoint::SendLeave, lpdu).await?;
    answer.is_good()?;
    lock(&session.notes).joined = None;
    ensure(answer.json == Some(json!({})), "an empty object", || &answer)
}

async fn cannot_leave_again(session: &Session, _: &str) -> Outcome {
    if lock(&session.notes).joined.is_some() || lock(&session.notes).version.is_empty() {
        return Err(skip("the suite's user has not left"));
    }
    let ask = session.make("leave", session.room.as_str(), &session.user, &VERSIONS);
    session.ask(&session.first, ask).await?.is_error(403, "M_FORBIDDEN")
}

/// Whatever is left in the room goes, answers or not.
pub(super) async fn leave_all(session: &Session) {
    let (join_rules, power_levels) = {
        let mut notes = lock(&session.notes);
        (notes.join_rules.take(), notes.power_levels.take())
    };
    for (kind, content) in [("m.room.join_rules", join_rules), ("m.room.power_levels", power_levels)] {
        if let Some(content) = content {
            let event = session.state(&session.user, kind, "", content);
            let _ = session.send(&session.first, vec![sealed(event, &session.first)]).await;
        }
    }
    let (low_is_in, user_is_in) = {
        let notes = lock(&session.notes);
        (notes.low_is_in, notes.joined.is_some())
    };
    for (user, is_in) in [(&session.low, low_is_in), (&session.user, user_is_in)] {
        if is_in {
            let leave = sealed(member(session, user.as_str(), "leave"), &session.first);
            let _ = session.send(&session.first, vec![leave]).await;
        }
    }
    let second_is_in = lock(&session.notes).second_is_in;
    if let Some(second) = session.second.as_ref().filter(|_| second_is_in) {
        let Ok(user) = session.user_of(second, session.user.localpart()) else { return };
        let leave = sealed(member(session, user.as_str(), "leave"), second);
        let _ = session.send(second, vec![leave]).await;
    }
}
