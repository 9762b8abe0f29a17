//! Transactions: bounds, identity, order, and what the answer says of each event.

use serde_json::{Value, json};

use super::checks;
use crate::conformance::report::{Outcome, ensure, fail};
use crate::conformance::session::{Endpoint, Session, id_of, mark_of, pushed, sealed};
use crate::conformance::wire::{Answer, Ask};
use crate::conformance::{Check, Unmet};
use crate::event::Object;

pub(super) fn checks() -> Vec<Check> {
    checks![
        "LM-S-001", "int-receiving-events", "a good LPDU is finished and sent to all, its sender too", good;
        "LM-S-002", "int-api-send-txn", "what is accepted is not in failed_pdus", not_failed;
        "LM-S-003", "int-txn-ids", "the same transaction again gets the same answer", same_answer;
        "LM-S-004", "int-txn-ids", "the same transaction again is not processed again", once;
        "LM-S-005", "int-receiving-events", "an LPDU that comes in another transaction again is not appended again", same_lpdu;
        "LM-S-006", "int-api-send-txn", "50 PDUs are taken", fifty;
        "LM-S-007", "int-api-send-txn", "a transaction with more than 50 PDUs is refused", fifty_one;
        "LM-S-008", "int-api-send-txn", "a transaction with more than 100 EDUs is refused", too_many_edus;
        "LM-S-009", "int-api-send-txn", "a transaction with nothing but EDUs is taken", only_edus;
        "LM-S-010", "int-transport-edus", "an EDU of a type that is not known does no harm", |s, id| with_edu(s, id, json!({ "type": "im.isthmus.nothing", "sender": s.user, "content": {} }));
        "LM-S-011", "int-transport-edus", "a malformed EDU does no harm to the rest", |s, id| with_edu(s, id, json!({ "content": [] }));
        "LM-S-012", "int-api-send-txn", "the LPDUs of a transaction are appended in their order", in_order;
        "LM-S-013", "int-api-send-txn", "a bad LPDU does no harm to the good ones beside it", beside;
        "LM-S-014", "int-api-send-txn", "what is rejected is in failed_pdus by its ID as it was sent, with an error", named;
        "LM-S-015", "int-api-send-txn", "an event of an unknown room does no harm to the rest", unknown_room;
        "LM-S-016", "int-api-send-txn", "a second transaction while one is in flight is M_BAD_STATE, or waits its turn", at_once;
        "LM-S-017", "int-transport-to-device", "a to-device message for nobody is ignored", |s, id| with_edu(s, id, json!({
            "type": "m.direct_to_device", "sender": s.user, "content": { "target": format!("@conformance-{}:{}", s.run, s.target),
            "target_device": "ABC", "message_type": "im.isthmus.nothing", "message": {} } }));
        "LM-S-018", "int-transport-devices", "a device list update is taken", |s, id| with_edu(s, id, json!({
            "type": "m.device_list_update", "sender_id": s.user, "content": { "changed": [], "removed": ["ABC"] } }));
    ]
}

fn lpdu(session: &Session, mark: &str) -> Object {
    sealed(session.message(&session.user, mark), &session.first)
}

async fn good(session: &Session, id: &str) -> Outcome {
    session.joined()?;
    let event = session.say(&session.first, &session.user, id).await?;
    let hub = event.get("hub_server").and_then(Value::as_str);
    ensure(hub == Some(session.target.as_str()), format!("hub_server {}", session.target), || &event)
}

fn failed(answer: &Answer) -> Object {
    answer.field("failed_pdus").and_then(Value::as_object).cloned().unwrap_or_default()
}

async fn not_failed(session: &Session, id: &str) -> Outcome {
    session.joined()?;
    let mark = session.mark(id);
    let answer = session.send(&session.first, vec![lpdu(session, &mark)]).await?;
    answer.is_good()?;
    session.echo(&session.first, &mark).await?;
    ensure(failed(&answer).is_empty(), "no failed_pdus", || &answer)
}

/// Sends a transaction twice; its two answers and its mark.
async fn twice(session: &Session, id: &str) -> Result<(Answer, Answer, String), Unmet> {
    session.joined()?;
    let mark = session.mark(id);
    let uri = session.path(Endpoint::Send, &session.txn())?;
    let ask = Ask::put(uri, json!({ "pdus": [lpdu(session, &mark)] }));
    let once = session.ask(&session.first, ask.clone()).await?;
    let again = session.ask(&session.first, ask).await?;
    session.echo(&session.first, &mark).await?;
    Ok((once, again, mark))
}

async fn same_answer(session: &Session, id: &str) -> Outcome {
    let (once, again, _) = twice(session, id).await?;
    let same = once.status == again.status && once.json == again.json;
    ensure(same, format!("{} {}", once.status, once.text), || format!("{} {}", again.status, again.text))
}

fn count(session: &Session, mark: &str) -> usize {
    let arrivals = session.ear.arrivals();
    let ids: std::collections::BTreeSet<String> = pushed(&arrivals, &session.first)
        .filter(|(_, event)| mark_of(event) == Some(mark))
        .map(|(_, e)| id_of(e))
        .collect();
    ids.len()
}

async fn once(session: &Session, id: &str) -> Outcome {
    let (_, _, mark) = twice(session, id).await?;
    session.say(&session.first, &session.user, id).await?;
    ensure(count(session, &mark) == 1, "the event once", || format!("{} times", count(session, &mark)))
}

async fn same_lpdu(session: &Session, id: &str) -> Outcome {
    session.joined()?;
    let mark = session.mark(id);
    let lpdu = lpdu(session, &mark);
    session.send(&session.first, vec![lpdu.clone()]).await?.is_good()?;
    session.send(&session.first, vec![lpdu]).await?;
    session.say(&session.first, &session.user, id).await?;
    ensure(count(session, &mark) == 1, "the event once", || format!("{} times", count(session, &mark)))
}

async fn fifty(session: &Session, id: &str) -> Outcome {
    session.joined()?;
    let marks: Vec<String> = (0..50).map(|_| session.mark(id)).collect();
    session.send(&session.first, marks.iter().map(|mark| lpdu(session, mark)).collect()).await?.is_good()?;
    for mark in &marks {
        session.echo(&session.first, mark).await?;
    }
    Ok(())
}

async fn fifty_one(session: &Session, id: &str) -> Outcome {
    session.joined()?;
    let mark = session.bad_mark(id);
    let answer = session.send(&session.first, vec![lpdu(session, &mark); 51]).await?;
    answer.is_refusal()?;
    session.absent(id, &mark).await
}

async fn edus(session: &Session, edus: Vec<Value>, pdus: Vec<Object>) -> Result<Answer, Unmet> {
    let uri = session.path(Endpoint::Send, &session.txn())?;
    session.ask(&session.first, Ask::put(uri, json!({ "pdus": pdus, "edus": edus }))).await
}

async fn too_many_edus(session: &Session, _: &str) -> Outcome {
    let edu = json!({ "type": "im.isthmus.nothing", "sender": session.user, "content": {} });
    edus(session, vec![edu; 101], Vec::new()).await?.is_refusal()
}

async fn only_edus(session: &Session, _: &str) -> Outcome {
    session.joined()?;
    let edu = json!({ "type": "im.isthmus.nothing", "sender": session.user, "content": {} });
    edus(session, vec![edu], Vec::new()).await?.is_good()
}

async fn with_edu(session: &Session, id: &str, edu: Value) -> Outcome {
    session.joined()?;
    let mark = session.mark(id);
    edus(session, vec![edu], vec![lpdu(session, &mark)]).await?.is_good()?;
    session.echo(&session.first, &mark).await.map(drop)
}

async fn in_order(session: &Session, id: &str) -> Outcome {
    session.joined()?;
    let marks: Vec<String> = (0..10).map(|_| session.mark(id)).collect();
    session.send(&session.first, marks.iter().map(|mark| lpdu(session, mark)).collect()).await?.is_good()?;
    for mark in &marks {
        session.echo(&session.first, mark).await?;
    }
    let arrivals = session.ear.arrivals();
    let came: Vec<&str> = pushed(&arrivals, &session.first)
        .filter_map(|(_, event)| mark_of(event))
        .filter(|mark| marks.iter().any(|m| m == mark))
        .collect();
    ensure(came == marks, format!("{marks:?}"), || format!("{came:?}"))
}

/// An LPDU that the rules forbid: its sender is not in the room.
fn forbidden(session: &Session, id: &str) -> Result<Object, Unmet> {
    let stranger = session.user_of(&session.first, &format!("stranger-{}", session.run))?;
    Ok(sealed(session.message(&stranger, &session.bad_mark(id)), &session.first))
}

async fn beside(session: &Session, id: &str) -> Outcome {
    session.joined()?;
    let (before, after) = (session.mark(id), session.mark(id));
    let pdus = vec![lpdu(session, &before), forbidden(session, id)?, lpdu(session, &after)];
    session.send(&session.first, pdus).await?.is_good()?;
    session.echo(&session.first, &before).await?;
    session.echo(&session.first, &after).await.map(drop)
}

async fn named(session: &Session, id: &str) -> Outcome {
    session.joined()?;
    let bad = forbidden(session, id)?;
    let expected = id_of(&Value::Object(bad.clone()));
    let answer = session.send(&session.first, vec![bad]).await?;
    answer.is_good()?;
    let failed = failed(&answer);
    let error = failed.get(&expected).and_then(|entry| entry.get("error"));
    ensure(
        error.is_some_and(Value::is_string) && failed.len() == 1,
        format!("failed_pdus with {expected} alone"),
        || &answer,
    )
}

async fn unknown_room(session: &Session, id: &str) -> Outcome {
    session.joined()?;
    let mark = session.mark(id);
    let mut stray = session.message(&session.user, &session.bad_mark(id));
    stray.insert("room_id".to_owned(), json!("!conformance-nowhere:elsewhere.invalid"));
    session.send(&session.first, vec![sealed(stray, &session.first), lpdu(session, &mark)]).await?.is_good()?;
    session.echo(&session.first, &mark).await.map(drop)
}

async fn at_once(session: &Session, id: &str) -> Outcome {
    session.joined()?;
    let marks: Vec<String> = (0..4).map(|_| session.mark(id)).collect();
    let sends = marks.iter().map(|mark| session.send(&session.first, vec![lpdu(session, mark)]));
    for (mark, answer) in marks.iter().zip(futures::future::join_all(sends).await) {
        let answer = answer?;
        match (answer.status, answer.errcode()) {
            (200, _) => session.echo(&session.first, mark).await.map(drop)?,
            (400, "M_BAD_STATE") => {}
            _ => return Err(fail("200, or 400 M_BAD_STATE", &answer)),
        }
    }
    Ok(())
}
