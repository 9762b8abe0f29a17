//! What a participant reads at the hub: events, states, stretches of the log.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::checks;
use crate::conformance::judge;
use crate::conformance::report::{Outcome, ensure, fail, skip};
use crate::conformance::session::{Session, id_of, sealed};
use crate::conformance::wire::{Answer, Ask};
use crate::conformance::{Check, Unmet};

pub(super) const UNKNOWN_EVENT: &str = "$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
const NOWHERE: &str = "%21conformance-nowhere%3Aelsewhere.invalid";

pub(super) fn checks() -> Vec<Check> {
    checks![
        "LM-R-001", "Event and State APIs", "event gives the event whose ID is asked for, bare", event;
        "LM-R-002", "Event and State APIs", "event of an unknown ID is 404 M_NOT_FOUND", no_event;
        "LM-R-003", "Event and State APIs", "event does not give LPDUs: 404 M_NOT_FOUND", no_lpdu;
        "LM-R-004", "int-api-get-state", "state is that before the event", state_before;
        "LM-R-005", "int-api-get-state", "the state's events are rightly hashed and signed", state_verifies;
        "LM-R-006", "int-api-get-state", "auth_chain holds everything by which the state is allowed", state_chain;
        "LM-R-007", "Event and State APIs", "state_ids gives the IDs of what state gives", state_ids;
        "LM-R-008", "int-api-get-state", "state at an unknown event is 404 M_NOT_FOUND", |s, id| no_state(s, id, "state");
        "LM-R-009", "int-api-get-state", "state of an unknown room is 404 M_NOT_FOUND", |s, id| nowhere(s, id, "state");
        "LM-R-011", "Event and State APIs", "state_ids at an unknown event is 404 M_NOT_FOUND", |s, id| no_state(s, id, "state_ids");
        "LM-R-012", "Event and State APIs", "state_ids of an unknown room is 404 M_NOT_FOUND", |s, id| nowhere(s, id, "state_ids");
        "LM-R-013", "Event and State APIs", "backfill gives no more than limit", backfill_limit;
        "LM-R-014", "Event and State APIs", "backfill is from the oldest to the newest, and ends with v", backfill_order;
        "LM-R-015", "Event and State APIs", "the events of backfill are finished, and rightly hashed and signed", backfill_verifies;
        "LM-R-016", "Event and State APIs", "backfill from the create event gives that alone", backfill_start;
        "LM-R-017", "Event and State APIs", "backfill from an unknown event is 404 M_NOT_FOUND", no_backfill;
        "LM-R-018", "Event and State APIs", "backfill of an unknown room is 404 M_NOT_FOUND", backfill_nowhere;
        "LM-R-019", "Event and State APIs", "backfill does not start at LPDUs: 404 M_NOT_FOUND", no_backfill_of_lpdu;
        "LM-R-020", "int-redactions", "what its sender has redacted is served redacted", redacted;
    ]
}

async fn said(session: &Session, id: &str) -> Result<Value, Unmet> {
    session.joined()?;
    session.say(&session.first, &session.user, id).await
}

async fn asked(session: &Session, ask: Ask) -> Result<Answer, Unmet> {
    session.ask(&session.first, ask).await
}

async fn event(session: &Session, id: &str) -> Outcome {
    let said = said(session, id).await?;
    let wanted = id_of(&said);
    let answer = asked(session, session.event(&wanted)?).await?;
    answer.is_good()?;
    let found = answer.json.as_ref().map(id_of).unwrap_or_default();
    ensure(found == wanted, format!("the event {wanted}"), || &answer)
}

async fn no_event(session: &Session, id: &str) -> Outcome {
    let said = id_of(&said(session, id).await?);
    asked(session, session.event(UNKNOWN_EVENT)?).await?.is_error(404, "M_NOT_FOUND")?;
    session.gives(session.event(&said)?).await
}

/// Says something; the ID of its LPDU, and that of the event.
async fn lpdu_id(session: &Session, id: &str) -> Result<(String, String), Unmet> {
    session.joined()?;
    let mark = session.mark(id);
    let lpdu = sealed(session.message(&session.user, &mark), &session.first);
    let lpdu_id = id_of(&Value::Object(lpdu.clone()));
    session.send(&session.first, vec![lpdu]).await?.is_good()?;
    let event = session.echo(&session.first, &mark).await?;
    Ok((lpdu_id, id_of(&event)))
}

async fn no_lpdu(session: &Session, id: &str) -> Outcome {
    let (lpdu_id, said) = lpdu_id(session, id).await?;
    asked(session, session.event(&lpdu_id)?).await?.is_error(404, "M_NOT_FOUND")?;
    session.gives(session.event(&said)?).await
}

async fn state_at(session: &Session, id: &str) -> Result<Answer, Unmet> {
    let answer = asked(session, session.about_room("state", &[("event_id", id)])).await?;
    answer.is_good()?;
    Ok(answer)
}

async fn state_before(session: &Session, id: &str) -> Outcome {
    let joined = session.joined()?;
    let join = joined.get("event").map(id_of).unwrap_or_default();
    let holds = |answer: &Answer| {
        answer.field("pdus").and_then(Value::as_array).is_some_and(|pdus| pdus.iter().any(|event| id_of(event) == join))
    };
    let before = state_at(session, &join).await?;
    ensure(!holds(&before), "a state at the join without the join", || &before)?;
    let said = said(session, id).await?;
    let after = state_at(session, &id_of(&said)).await?;
    ensure(holds(&after), "a state at a later event with the join", || &after)
}

async fn state_verifies(session: &Session, id: &str) -> Outcome {
    let said = said(session, id).await?;
    let answer = state_at(session, &id_of(&said)).await?;
    match judge::list_problem(session, answer.field("pdus")).await {
        Some(problem) => Err(fail("events that verify", problem)),
        None => Ok(()),
    }
}

async fn state_chain(session: &Session, id: &str) -> Outcome {
    let said = said(session, id).await?;
    let answer = state_at(session, &id_of(&said)).await?;
    match judge::is_closed(answer.field("pdus"), answer.field("auth_chain")) {
        Some(problem) => Err(fail("every event that is named in auth_events", problem)),
        None => Ok(()),
    }
}

async fn state_ids(session: &Session, id: &str) -> Outcome {
    let said = id_of(&said(session, id).await?);
    let whole = state_at(session, &said).await?;
    let ids = asked(session, session.about_room("state_ids", &[("event_id", said.as_str())])).await?;
    ids.is_good()?;
    for (events, names) in [("pdus", "pdu_ids"), ("auth_chain", "auth_chain_ids")] {
        let expected: BTreeSet<String> =
            whole.field(events).and_then(Value::as_array).into_iter().flatten().map(id_of).collect();
        let found: BTreeSet<String> = ids
            .field(names)
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(|id| id.as_str().map(str::to_owned))
            .collect();
        ensure(!expected.is_empty(), format!("a state with {events}"), || &whole)?;
        ensure(expected == found, format!("{names} {expected:?}"), || &ids)?;
    }
    Ok(())
}

async fn no_state(session: &Session, id: &str, endpoint: &str) -> Outcome {
    let said = id_of(&said(session, id).await?);
    asked(session, session.about_room(endpoint, &[("event_id", UNKNOWN_EVENT)])).await?.is_error(404, "M_NOT_FOUND")?;
    session.gives(session.about_room(endpoint, &[("event_id", said.as_str())])).await
}

async fn nowhere(session: &Session, id: &str, endpoint: &str) -> Outcome {
    let said = id_of(&said(session, id).await?);
    let uri = format!("/_matrix/federation/v1/{endpoint}/{NOWHERE}?event_id={}", UNKNOWN_EVENT.replace('$', "%24"));
    asked(session, Ask::get(uri)).await?.is_error(404, "M_NOT_FOUND")?;
    session.gives(session.about_room(endpoint, &[("event_id", said.as_str())])).await
}

async fn filled(session: &Session, from: &str, limit: usize) -> Result<Vec<Value>, Unmet> {
    let answer = asked(session, session.backfill(from, limit)?).await?;
    answer.is_good()?;
    answer.field("pdus").and_then(Value::as_array).cloned().ok_or_else(|| fail("an array pdus", &answer))
}

async fn backfill_limit(session: &Session, id: &str) -> Outcome {
    let said = id_of(&said(session, id).await?);
    for limit in [1, 3] {
        let pdus = filled(session, &said, limit).await?;
        ensure((1..=limit).contains(&pdus.len()), format!("1 to {limit} events"), || format!("{} events", pdus.len()))?;
    }
    Ok(())
}

async fn backfill_order(session: &Session, id: &str) -> Outcome {
    let said = id_of(&said(session, id).await?);
    let pdus = filled(session, &said, 5).await?;
    let last = pdus.last().map(id_of).unwrap_or_default();
    ensure(last == said, format!("{said} as the last"), || Value::from(pdus.clone()))?;
    for pair in pdus.windows(2) {
        if let [before, after] = pair {
            let prev = after.pointer("/prev_events/0").and_then(Value::as_str).unwrap_or_default();
            ensure(prev == id_of(before), "each event follows the one before it", || Value::from(pdus.clone()))?;
        }
    }
    Ok(())
}

async fn backfill_verifies(session: &Session, id: &str) -> Outcome {
    let said = id_of(&said(session, id).await?);
    let pdus = filled(session, &said, 10).await?;
    match judge::list_problem(session, Some(&Value::from(pdus))).await {
        Some(problem) => Err(fail("finished events that verify", problem)),
        None => Ok(()),
    }
}

async fn backfill_start(session: &Session, _: &str) -> Outcome {
    session.joined()?;
    let create = session.state_event("m.room.create", "").ok_or_else(|| skip("the create event is not known"))?;
    if session.was_handed_over() {
        return Err(skip("the log was handed over, and who takes it need not have its beginning"));
    }
    let pdus = filled(session, &id_of(&create), 5).await?;
    let found: Vec<String> = pdus.iter().map(id_of).collect();
    ensure(found == [id_of(&create)], format!("{} alone", id_of(&create)), || Value::from(pdus.clone()))
}

async fn no_backfill(session: &Session, id: &str) -> Outcome {
    let said = id_of(&said(session, id).await?);
    asked(session, session.backfill(UNKNOWN_EVENT, 5)?).await?.is_error(404, "M_NOT_FOUND")?;
    session.gives(session.backfill(&said, 5)?).await
}

async fn backfill_nowhere(session: &Session, id: &str) -> Outcome {
    let said = id_of(&said(session, id).await?);
    let mut ask = session.backfill(UNKNOWN_EVENT, 5)?;
    ask.uri = ask.uri.replace(&crate::conformance::wire::segment(session.room.as_str()), NOWHERE);
    asked(session, ask).await?.is_error(404, "M_NOT_FOUND")?;
    session.gives(session.backfill(&said, 5)?).await
}

async fn no_backfill_of_lpdu(session: &Session, id: &str) -> Outcome {
    let (lpdu_id, said) = lpdu_id(session, id).await?;
    asked(session, session.backfill(&lpdu_id, 5)?).await?.is_error(404, "M_NOT_FOUND")?;
    session.gives(session.backfill(&said, 5)?).await
}

async fn redacted(session: &Session, id: &str) -> Outcome {
    let said = id_of(&said(session, id).await?);
    let mark = session.mark(id);
    let mut redaction = session.message(&session.user, &mark);
    redaction.insert("type".to_owned(), json!("m.room.redaction"));
    redaction.insert("content".to_owned(), json!({ "redacts": said, "mark": mark }));
    let answer = session.send(&session.first, vec![sealed(redaction, &session.first)]).await?;
    answer.is_good()?;
    session.echo(&session.first, &mark).await?;
    let answer = asked(session, session.event(&said)?).await?;
    answer.is_good()?;
    ensure(answer.field("content") == Some(&json!({})), "an empty content", || &answer)
}
