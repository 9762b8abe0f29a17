//! The suite as the hub: it invites a user of the target into a room of its own, and looks at what the target does as a participant.

mod invited;

use std::time::{Duration, Instant};

use ruma::OwnedUserId;
use serde_json::{Value, json};

use self::invited::{
    LpduProperty, asks_for_template, badly_signed_invite, countersigned, incompatible, incomplete, invite, join_is,
    join_signed, lpdu_form, lpdu_hashed, lpdu_hub, lpdu_signed, no_invite, spoilt_signature, the_join,
};
use super::checks;
use crate::conformance::ear::{Arrival, lock};
use crate::conformance::hub::HubRoom;
use crate::conformance::judge;
use crate::conformance::report::{Outcome, ensure, fail, skip};
use crate::conformance::session::{Endpoint, Session, VERSIONS, id_of, mark_of, sealed};
use crate::conformance::wire::{Answer, Ask, authentication_problem, object, segment};
use crate::conformance::{Check, Unmet};
use crate::event::{Object, Redaction, VerifyKey, canonical_json, lpdu_hash, redact};
use crate::identity::SigningKey;

pub(super) fn checks() -> Vec<Check> {
    checks![
        "LM-H-001", "int-api-invite", "an invite of an unknown room version is 400 M_INCOMPATIBLE_ROOM_VERSION", incompatible;
        "LM-H-006", "Malformed Requests", "an invite without its event is 400 M_BAD_JSON", incomplete;
        "LM-H-010", "int-api-invite", "a good invite is answered with the event", invite;
        "LM-H-011", "int-api-invite", "the target has signed it, and changed nothing else", countersigned;
        "LM-H-002", "int-api-invite", "an event that is not m.room.member is no invite", |s, _| no_invite(s, |event| drop(event.insert("type".to_owned(), json!("m.room.message"))));
        "LM-H-003", "int-api-invite", "a membership other than invite is no invite", |s, _| no_invite(s, |event| drop(event.insert("content".to_owned(), json!({ "membership": "join" }))));
        "LM-H-004", "int-api-invite", "an invite of another server's user is refused", |s, _| no_invite(s, |event| drop(event.insert("state_key".to_owned(), json!("@somebody:elsewhere.invalid"))));
        "LM-H-005", "int-receiving-events", "an invite that the hub has not signed rightly is refused", badly_signed_invite;
        "LM-H-012", "int-api-make-join", "the target asks for a template with the versions it supports", asks_for_template;
        "LM-H-013", "int-lpdu", "its join is an LPDU with none of the fields that the hub sets", |s, _| join_is(s, "no auth_events, prev_events or other hashes", lpdu_form);
        "LM-H-014", "int-lpdu", "the LPDU names this hub", |s, _| join_is(s, "hub_server of this hub", lpdu_hub);
        "LM-H-015", "int-content-hashes", "the LPDU's hash is right", |s, _| join_is(s, "hashes.lpdu.sha256 as computed", lpdu_hashed);
        "LM-H-016", "int-signing-events", "the LPDU is signed by the target", join_signed;
        "LM-H-020", "int-api-send-txn", "a good event is taken", good;
        "LM-H-021", "int-txn-ids", "the same transaction again gets the same answer", same_answer;
        "LM-H-022", "int-api-send-txn", "an event of an unknown room does no harm to the rest", unknown_room;
        "LM-H-023", "int-api-send-txn", "an LPDU that is sent to who is not the hub does no harm to the rest", stray_lpdu;
        "LM-H-024", "int-receiving-events", "an event that the hub has not signed rightly is not taken", |s, id| bad(s, id, Fate::Dropped, |room, event| {
            spoilt_signature(room.finish(event), room.identity.name.as_str())
        });
        "LM-H-025", "int-receiving-events", "an event without signatures is not taken", |s, id| bad(s, id, Fate::Dropped, |room, event| {
            let mut event = room.finish(event);
            event.insert("signatures".to_owned(), json!({}));
            event
        });
        "LM-H-026", "int-receiving-events", "an event without auth_events is not taken", |s, id| bad(s, id, Fate::Dropped, |room, event| {
            let mut event = room.finish(event);
            event.remove("auth_events");
            room.close(event)
        });
        "LM-H-027", "int-receiving-events", "an event without hashes is not taken", |s, id| bad(s, id, Fate::Dropped, |room, event| {
            let mut event = room.finish(event);
            event.remove("hashes");
            room.sign(event)
        });
        "LM-H-028", "int-pdu", "an event of more than 65,536 bytes is not taken", |s, id| bad(s, id, Fate::Dropped, |room, mut event| {
            if let Some(content) = event.get_mut("content").and_then(Value::as_object_mut) {
                content.insert("filling".to_owned(), json!("x".repeat(66_000)));
            }
            room.finish(event)
        });
        "LM-H-029", "int-receiving-events", "an event of the target's user that the target never sent is not taken", forged;
        "LM-H-030", "int-auth-rules 6", "an event that the rules forbid is rejected by its ID", |s, id| bad(s, id, Fate::Named, |room, mut event| {
            event.insert("sender".to_owned(), json!(format!("@stranger:{}", room.identity.name)));
            room.finish(event)
        });
        "LM-H-031", "int-content-hashes", "what an event with a wrong hash says is not believed", |s, id| bad(s, id, Fate::Redacted, |room, event| {
            let mut event = room.finish(event);
            event.insert("hashes".to_owned(), json!({ "sha256": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA" }));
            room.sign(event)
        });
        "LM-H-032", "int-receiving-events", "a bad event does no harm to the good ones beside it", beside;
        "LM-H-033", "int-hub-selection", "events of the room by a server that is not the hub are not taken for the hub's", not_the_hub;
        "LM-H-034", "int-auth-rules 4.1", "an event whose auth_events have two of the same type and state key is rejected by its ID", two_of_a_kind;
        "LM-H-035", "int-auth-rules 4.2", "an event whose auth_events have one that is not of the selection is rejected by its ID", |s, id| allowed_by(s, id, |room, ids| {
            ids.extend(room.state("m.room.join_rules", "").map(HubRoom::id));
        });
        "LM-H-036", "int-auth-rules 4.3", "an event whose auth_events lack the create event is rejected by its ID", |s, id| allowed_by(s, id, |room, ids| {
            let create = room.state("m.room.create", "").map(HubRoom::id);
            ids.retain(|id| Some(id) != create.as_ref());
        });
        "LM-H-040", "int-api-make-join", "make_join at who is not the hub is 400 M_WRONG_SERVER", |s, _| wrong_server(s, "make_join");
        "LM-H-041", "int-api-make-leave", "make_leave at who is not the hub is 400 M_WRONG_SERVER", |s, _| wrong_server(s, "make_leave");
        "LM-H-042", "int-api-make-knock", "make_knock at who is not the hub is 400 M_WRONG_SERVER", |s, _| wrong_server(s, "make_knock");
        "LM-H-043", "int-api-get-state", "state at who is not the hub is 400 M_WRONG_SERVER", |s, _| wrong_server(s, "state");
        "LM-H-044", "int-api-get-state", "state_ids at who is not the hub is 400 M_WRONG_SERVER", |s, _| wrong_server(s, "state_ids");
        "LM-H-045", "int-api-send-join", "send_join at who is not the hub is 400 M_WRONG_SERVER", |s, _| wrong_handshake(s, Endpoint::SendJoin, "join");
        "LM-H-046", "int-api-send-leave", "send_leave at who is not the hub is 400 M_WRONG_SERVER", |s, _| wrong_handshake(s, Endpoint::SendLeave, "leave");
        "LM-H-047", "int-api-send-knock", "send_knock at who is not the hub is 400 M_WRONG_SERVER", |s, _| wrong_handshake(s, Endpoint::SendKnock, "knock");
        "LM-H-050", "int-lpdu", "what the target's users say comes as LPDUs, rightly made", speaks;
        "LM-H-051", "int-transport-auth", "the target's requests are signed by it, for this server", authenticated;
        "LM-H-052", "int-api-send-txn", "the target's transactions have at most 50 PDUs and 100 EDUs", bounded;
    ]
}

fn creator(session: &Session) -> &OwnedUserId {
    &session.user
}

fn invitee(session: &Session) -> Result<&OwnedUserId, Unmet> {
    session.invitee.as_ref().ok_or_else(|| skip("nobody is to be invited: --invite USER"))
}

/// Does something with the room, which is made when it is first needed.
fn room<T>(session: &Session, act: impl FnOnce(&mut HubRoom) -> T) -> T {
    let mut room = lock(&session.ear.room);
    let made = room.get_or_insert_with(|| {
        HubRoom::new(session.room.clone(), session.first.clone(), creator(session), session.clock.now_ms())
    });
    act(made)
}

/// An event of the hub's own user, not finished.
fn draft(session: &Session, mark: &str) -> Object {
    let mut event = session.message(creator(session), mark);
    event.remove("hub_server");
    event
}

/// Another room of the suite's, into which nothing but bad invites lead.
fn other_room(session: &Session) -> Result<HubRoom, Unmet> {
    let room_id = format!("!conformance-other-{}:{}", session.run, session.first.name);
    let room_id = ruma::OwnedRoomId::try_from(room_id).map_err(|error| skip(error.to_string()))?;
    Ok(HubRoom::new(room_id, session.first.clone(), creator(session), session.clock.now_ms()))
}

fn invitation(session: &Session) -> Result<Object, Unmet> {
    let target = invitee(session)?;
    Ok(object(
        json!({ "type": "m.room.member", "room_id": session.room, "sender": creator(session), "state_key": target,
        "content": { "membership": "invite" }, "origin_server_ts": session.clock.now_ms() }),
    ))
}

async fn ask_invite(session: &Session, event: Object, version: &str) -> Result<Answer, Unmet> {
    let uri = session.path(Endpoint::Invite, &session.txn())?;
    let stripped = |kind: &str| {
        room(session, |room| room.state(kind, "").cloned()).map(|event| {
            json!({ "type": event.get("type"), "sender": event.get("sender"), "state_key": "", "content": event.get("content") })
        })
    };
    let state: Vec<Value> = ["m.room.create", "m.room.join_rules"].into_iter().filter_map(stripped).collect();
    let body = json!({ "event": event, "room_version": version, "invite_room_state": state });
    session.ask(&session.first, Ask::post(uri, body)).await
}

fn version() -> &'static str {
    VERSIONS.first().copied().unwrap_or_default()
}

/// How long a server that answers with an error of its own is left alone.
const PAUSE: Duration = Duration::from_millis(200);

/// Sends finished events to the target, as the hub, and again as long as it says that it cannot take them now: it may be busy joining.
async fn send(session: &Session, pdus: Vec<Object>) -> Result<Answer, Unmet> {
    the_join(session).await?;
    let ask = Ask::put(session.path(Endpoint::Send, &session.txn())?, json!({ "pdus": pdus }));
    let begun = Instant::now();
    loop {
        let answer = session.ask(&session.first, ask.clone()).await?;
        if answer.status < 500 || begun.elapsed() > session.limit {
            return Ok(answer);
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// A good event at the end of the log, which it is put into.
fn appended(session: &Session, mark: &str) -> Object {
    let event = draft(session, mark);
    room(session, |room| {
        let event = room.finish(event);
        room.log.push(event.clone());
        event
    })
}

fn failed(answer: &Answer) -> Object {
    answer.field("failed_pdus").and_then(Value::as_object).cloned().unwrap_or_default()
}

async fn good(session: &Session, id: &str) -> Outcome {
    the_join(session).await?;
    let event = appended(session, &session.mark(id));
    let answer = send(session, vec![event.clone()]).await?;
    answer.is_good()?;
    ensure(failed(&answer).is_empty(), "no failed_pdus", || &answer)?;
    given(session, &event).await
}

async fn same_answer(session: &Session, id: &str) -> Outcome {
    the_join(session).await?;
    let event = appended(session, &session.mark(id));
    let uri = session.path(Endpoint::Send, &session.txn())?;
    let ask = Ask::put(uri, json!({ "pdus": [&event] }));
    let once = session.ask(&session.first, ask.clone()).await?;
    let again = session.ask(&session.first, ask).await?;
    once.is_good()?;
    ensure(once.json == again.json && once.status == again.status, &once.text, || &again)?;
    given(session, &event).await
}

async fn unknown_room(session: &Session, id: &str) -> Outcome {
    the_join(session).await?;
    let mut stray = draft(session, &session.bad_mark(id));
    stray.insert("room_id".to_owned(), json!(format!("!conformance-nowhere:{}", session.first.name)));
    let stray = room(session, |room| room.finish(stray));
    let event = appended(session, &session.mark(id));
    let wanted = id_of(&Value::Object(event.clone()));
    let answer = send(session, vec![stray, event.clone()]).await?;
    answer.is_good()?;
    ensure(!failed(&answer).contains_key(&wanted), format!("{wanted} is not in failed_pdus"), || &answer)?;
    given(session, &event).await
}

async fn stray_lpdu(session: &Session, id: &str) -> Outcome {
    the_join(session).await?;
    let stray = session.message(creator(session), &session.bad_mark(id));
    let stray = crate::conformance::session::sealed(stray, &session.first);
    let event = appended(session, &session.mark(id));
    let wanted = id_of(&Value::Object(event.clone()));
    let answer = send(session, vec![stray, event.clone()]).await?;
    answer.is_good()?;
    ensure(!failed(&answer).contains_key(&wanted), format!("{wanted} is not in failed_pdus"), || &answer)?;
    given(session, &event).await
}

/// What becomes of a bad event.
#[derive(Clone, Copy, PartialEq)]
enum Fate {
    /// It is dropped, with or without a word, and never served.
    Dropped,
    /// It is rejected by its ID.
    Named,
    /// It may be kept, without its content.
    Redacted,
}

async fn bad(session: &Session, id: &str, fate: Fate, spoil: impl Fn(&HubRoom, Object) -> Object) -> Outcome {
    the_join(session).await?;
    let mark = session.bad_mark(id);
    let draft = draft(session, &mark);
    let event = room(session, |room| spoil(room, draft));
    let name = id_of(&Value::Object(event.clone()));
    let answer = send(session, vec![event]).await?;
    answer.is_good()?;
    if fate == Fate::Named {
        let error = failed(&answer).get(&name).and_then(|entry| entry.get("error")).cloned();
        ensure(error.is_some_and(|error| error.is_string()), format!("failed_pdus with {name} and an error"), || {
            &answer
        })?;
    }
    let look = async || {
        let served = session.ask(&session.first, session.event(&name)?).await?;
        // Redacted it keeps its type.
        let says = || served.field("content").is_some_and(|content| content.to_string().contains(&mark));
        let shown = served.status == 200 && (fate != Fate::Redacted || says());
        ensure(!shown, "the event is not served", || &served)
    };
    look().await?;
    if fate == Fate::Named {
        return Ok(());
    }
    and_gives_what_follows(session, id).await?;
    look().await
}

/// Sends a good event after a bad one: whoever does not give that either shows nothing by not giving the bad one.
async fn and_gives_what_follows(session: &Session, id: &str) -> Outcome {
    let event = appended(session, &session.mark(id));
    send(session, vec![event.clone()]).await?.is_good()?;
    given(session, &event).await
}

/// Passes when the target gives a good event that it was sent. A participant that gives none has taken none, or does not give what it has:
/// nothing can be told then.
async fn given(session: &Session, event: &Object) -> Outcome {
    let wanted = HubRoom::id(event);
    let begun = Instant::now();
    loop {
        let answer = session.ask(&session.first, session.event(&wanted)?).await?;
        if answer.status == 200 && answer.json.as_ref().is_some_and(|event| id_of(event) == wanted) {
            lock(&session.notes).gives_events = Some(true);
            return Ok(());
        }
        let gives = lock(&session.notes).gives_events;
        if gives == Some(false) || begun.elapsed() > session.limit {
            if gives == Some(true) {
                return Err(fail("the good event is taken, and given as others are", &answer));
            }
            lock(&session.notes).gives_events = Some(false);
            return Err(skip(format!(
                "the target does not give a good event that it was sent, so nothing is known of others: {answer}"
            )));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// A message with other events in its `auth_events` than the selection has.
async fn allowed_by(session: &Session, id: &str, change: impl Fn(&HubRoom, &mut Vec<String>)) -> Outcome {
    bad(session, id, Fate::Named, |room, event| {
        let mut event = room.finish(event);
        let named = event.get("auth_events").and_then(Value::as_array);
        let mut ids: Vec<String> = named.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect();
        change(room, &mut ids);
        event.insert("auth_events".to_owned(), json!(ids));
        room.close(event)
    })
    .await
}

/// The power levels as they are now, and as they were before.
async fn two_of_a_kind(session: &Session, id: &str) -> Outcome {
    the_join(session).await?;
    let (creator, now_ms) = (creator(session).to_string(), session.clock.now_ms());
    let kind = "m.room.power_levels";
    let (before, again) = room(session, |room| {
        let before = room.state(kind, "").cloned().unwrap_or_default();
        let content = before.get("content").cloned().unwrap_or_default();
        let again = room.own(&creator, kind, Some(""), content, now_ms);
        room.log.push(again.clone());
        (HubRoom::id(&before), again)
    });
    send(session, vec![again]).await?.is_good()?;
    allowed_by(session, id, |_, ids| ids.push(before.clone())).await
}

/// Something that the target's own user is said to have said.
async fn forged(session: &Session, id: &str) -> Outcome {
    let user = invitee(session)?.to_string();
    bad(session, id, Fate::Dropped, move |room, mut event| {
        event.insert("sender".to_owned(), json!(user));
        event.insert("hub_server".to_owned(), json!(room.identity.name));
        event.insert("hashes".to_owned(), json!({ "lpdu": { "sha256": lpdu_hash(&event) } }));
        room.finish(event)
    })
    .await
}

async fn beside(session: &Session, id: &str) -> Outcome {
    the_join(session).await?;
    let spoilt = draft(session, &session.bad_mark(id));
    let before = appended(session, &session.mark(id));
    let spoilt = room(session, |room| spoilt_signature(room.finish(spoilt), room.identity.name.as_str()));
    let after = appended(session, &session.mark(id));
    let wanted = [&before, &after].map(|event| id_of(&Value::Object(event.clone())));
    let answer = send(session, vec![before.clone(), spoilt, after.clone()]).await?;
    answer.is_good()?;
    let failed = failed(&answer);
    ensure(wanted.iter().all(|id| !failed.contains_key(id)), format!("none of {wanted:?} in failed_pdus"), || &answer)?;
    given(session, &before).await?;
    given(session, &after).await
}

async fn not_the_hub(session: &Session, id: &str) -> Outcome {
    the_join(session).await?;
    let second = session.second()?.clone();
    let mark = session.bad_mark(id);
    let mut event = draft(session, &mark);
    event.insert("sender".to_owned(), json!(format!("@somebody:{}", second.name)));
    let event = room(session, |room| room.of_second(&second, event));
    let name = id_of(&Value::Object(event.clone()));
    let answer = session.send(&second, vec![event]).await?;
    ensure(answer.status < 500, "200, or an error of the 400s", || &answer)?;
    let look = async || {
        let served = session.ask(&session.first, session.event(&name)?).await?;
        ensure(served.status != 200, "the event is not served", || &served)
    };
    look().await?;
    and_gives_what_follows(session, id).await?;
    look().await
}

async fn wrong_server(session: &Session, endpoint: &str) -> Outcome {
    the_join(session).await?;
    let stranger = session.user_of(&session.first, "stranger")?;
    let ask = match endpoint.strip_prefix("make_") {
        Some(change) => session.make(change, session.room.as_str(), &stranger, &VERSIONS),
        None => {
            let create = room(session, |room| room.log.first().cloned().map(|event| id_of(&Value::Object(event))));
            let id = create.unwrap_or_default();
            let room = segment(session.room.as_str());
            Ask::get(format!("/_matrix/federation/v1/{endpoint}/{room}?event_id={}", segment(&id)))
        }
    };
    session.ask(&session.first, ask).await?.is_error(400, "M_WRONG_SERVER")
}

async fn wrong_handshake(session: &Session, endpoint: Endpoint, membership: &str) -> Outcome {
    the_join(session).await?;
    let stranger = session.user_of(&session.first, "stranger")?;
    let event = session.state(&stranger, "m.room.member", stranger.as_str(), json!({ "membership": membership }));
    let ask = Ask::post(session.path(endpoint, &session.txn())?, Value::Object(sealed(event, &session.first)));
    session.ask(&session.first, ask).await?.is_error(400, "M_WRONG_SERVER")
}

async fn speaks(session: &Session, _: &str) -> Outcome {
    the_join(session).await?;
    let said = session.ear.wait(session.patience, |arrivals| {
        arrivals
            .iter()
            .filter(|arrival| arrival.endpoint == "send")
            .filter_map(|arrival| arrival.body.as_ref()?.get("pdus")?.as_array()?.first().cloned())
            .find(|event| mark_of(event).is_none())
    });
    let said = said.await.ok_or_else(|| skip(format!("nobody said anything within {:?}", session.patience)))?;
    let lpdu = said.as_object().cloned().unwrap_or_default();
    for (expected, holds) in [
        ("none of the fields that the hub sets", lpdu_form as LpduProperty),
        ("hub_server of this hub", lpdu_hub),
        ("the hash as computed", lpdu_hashed),
    ] {
        ensure(holds(session, &lpdu), expected, || &said)?;
    }
    if let Some(problem) = judge::grammar(&said) {
        return Err(fail("identifiers of the grammar", format!("{problem}: {said}")));
    }
    lpdu_signed(session, &lpdu).await
}

async fn authenticated(session: &Session, _: &str) -> Outcome {
    let keys = session.keys_of(&session.target).await.ok_or_else(|| skip("the keys of the target are not known"))?;
    let arrivals = session.ear.arrivals();
    if arrivals.is_empty() {
        return Err(skip("the target has asked nothing"));
    }
    for arrival in &arrivals {
        let problem = authentication_problem(
            &arrival.authorization,
            &keys,
            (session.target.as_str(), arrival.to.as_str()),
            (&arrival.method, &arrival.uri),
            arrival.body.as_ref(),
        );
        if let Some(problem) = problem {
            return Err(fail("a right signature", format!("{problem}: {} {}", arrival.method, arrival.uri)));
        }
    }
    Ok(())
}

async fn bounded(session: &Session, _: &str) -> Outcome {
    let arrivals = session.ear.arrivals();
    let sends: Vec<&Arrival> = arrivals.iter().filter(|arrival| arrival.endpoint == "send").collect();
    if sends.is_empty() {
        return Err(skip("the target has sent no transaction"));
    }
    for arrival in sends {
        let length = |field: &str| {
            let list = arrival.body.as_ref().and_then(|body| body.get(field)).and_then(Value::as_array);
            list.map_or(0, Vec::len)
        };
        let (pdus, edus) = (length("pdus"), length("edus"));
        ensure(pdus <= 50 && edus <= 100, "at most 50 PDUs and 100 EDUs", || format!("{pdus} PDUs and {edus} EDUs"))?;
    }
    Ok(())
}

/// Removes the invited user from the room, in which nothing happens any more.
pub(super) async fn end(session: &Session) {
    let Some(user) = session.invitee.clone() else { return };
    let creator = creator(session).to_string();
    let now_ms = session.clock.now_ms();
    let kick = room(session, |room| {
        if room.membership(user.as_str()) == "leave" {
            return None;
        }
        let kick = room.own(&creator, "m.room.member", Some(user.as_str()), json!({ "membership": "leave" }), now_ms);
        room.log.push(kick.clone());
        Some(kick)
    });
    if let Some(kick) = kick {
        let _ = session.send(&session.first, vec![kick]).await;
    }
}
