//! Everything that the hub has sent during the run, looked at in one regard after the other; and how it sends.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;

use super::checks;
use crate::conformance::Check;
use crate::conformance::ear::lock;
use crate::conformance::judge::{self, Signer, all};
use crate::conformance::report::{Outcome, ensure, fail, skip};
use crate::conformance::session::{Session, sealed};
use crate::conformance::wire::authentication_problem;

pub(super) fn checks() -> Vec<Check> {
    checks![
        "LM-E-001", "int-pdu", "events have every required field, each of its kind", |s, _| each(s, "required fields of the right kind", judge::form);
        "LM-E-002", "int-pdu", "identifiers, types and state keys are of the grammar and of the length", |s, _| each(s, "identifiers of the grammar", judge::grammar);
        "LM-E-003", "int-pdu", "events have neither depth, origin nor event_id", |s, _| each(s, "no depth, origin or event_id", judge::no_more);
        "LM-E-004", "int-pdu", "events are of at most 65,536 bytes", |s, _| each(s, "at most 65,536 bytes", judge::size);
        "LM-E-005", "int-content-hashes", "the hash of the event is right", |s, _| each(s, "hashes.sha256 as computed", judge::whole_hash);
        "LM-E-006", "int-content-hashes", "the hash of the LPDU is right", |s, _| each(s, "hashes.lpdu.sha256 as computed", judge::inner_hash);
        "LM-E-007", "int-pdu", "an event without hub_server has no hash of an LPDU", |s, _| async move { judge::no_stray_hash(s) };
        "LM-E-008", "int-receiving-events", "the hub has signed each event", |s, _| judge::signatures(s, Signer::Hub);
        "LM-E-009", "int-receiving-events", "the sender's server has signed the LPDU in each event", |s, _| judge::signatures(s, Signer::Sender);
        "LM-E-010", "int-pdu", "hub_server is the hub's name", |s, _| async move { judge::hub_named(s) };
        "LM-E-011", "int-pdu", "prev_events has one entry", |s, _| each(s, "one entry in prev_events", judge::one_before);
        "LM-E-012", "int-pdu", "each event follows the one that was sent before it", |s, _| async move { judge::chain(s) };
        "LM-E-013", "int-auth-selection", "auth_events are exactly those of the selection", |s, _| async move { judge::auth_events(s) };
        "LM-E-014", "int-api-send-txn", "no event is sent twice", |s, _| async move { judge::no_repeats(s) };
        "LM-E-015", "int-pdu", "the hub adds no field to an LPDU that the schema does not have", |s, _| async move { judge::nothing_added(s) };
        "LM-E-020", "int-transport-auth", "the hub's requests are signed by it, for this server", authenticated;
        "LM-E-021", "int-api-send-txn", "transactions have at most 50 PDUs and 100 EDUs", bounded;
        "LM-E-022", "int-api-send-txn", "a transaction is repeated, with the same ID and the same content, until it is answered with 200", repeated;
        "LM-E-023", "int-api-send-txn", "no other transaction comes before the one before is answered", waits;
        "LM-E-024", "int-txn-ids", "no transaction ID is used for two different transactions", distinct;
    ]
}

async fn each(session: &Session, expected: &str, property: judge::Property) -> Outcome {
    all(session, expected, property)
}

async fn authenticated(session: &Session, _: &str) -> Outcome {
    let keys = session.keys_of(&session.target).await.ok_or_else(|| skip("the keys of the target are not known"))?;
    let arrivals = session.ear.arrivals();
    if arrivals.is_empty() {
        return Err(skip("the hub has sent nothing"));
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
    judge::heard(session)?;
    for arrival in session.ear.arrivals().iter().filter(|arrival| arrival.endpoint == "send") {
        let length = |field: &str| {
            let list = arrival.body.as_ref().and_then(|body| body.get(field)).and_then(Value::as_array);
            list.map_or(0, Vec::len)
        };
        let (pdus, edus) = (length("pdus"), length("edus"));
        ensure(pdus <= 50 && edus <= 100, "at most 50 PDUs and 100 EDUs", || format!("{pdus} PDUs and {edus} EDUs"))?;
    }
    Ok(())
}

async fn repeated(session: &Session, id: &str) -> Outcome {
    session.joined()?;
    let before = session.ear.arrivals().len();
    // Whoever is refused waits for a while.
    let repetition = session.limit.saturating_mul(3);
    lock(&session.ear.manners).refuse = 1;
    let mark = session.mark(id);
    let lpdu = sealed(session.message(&session.user, &mark), &session.first);
    let sent = session.send(&session.first, vec![lpdu]).await;
    let refused = session.ear.wait(repetition, |arrivals| {
        let mut refused = arrivals.iter().skip(before).filter(|arrival| arrival.endpoint == "send");
        refused.find(|arrival| arrival.answered == Some(500)).cloned()
    });
    let refused = refused.await;
    lock(&session.ear.manners).refuse = 0;
    sent?.is_good()?;
    let refused = refused.ok_or_else(|| fail("a transaction", format!("none within {repetition:?}")))?;
    let again = session.ear.wait(repetition, |arrivals| {
        let since =
            arrivals.iter().skip(before).filter(|arrival| arrival.endpoint == "send" && arrival.to == refused.to);
        since.skip_while(|arrival| arrival.answered != Some(500)).nth(1).cloned()
    });
    let again = again.await.ok_or_else(|| fail("the transaction again", format!("nothing within {repetition:?}")))?;
    ensure(again.segments == refused.segments, format!("the transaction {:?}", refused.segments), || {
        format!("{:?}", again.segments)
    })?;
    ensure(again.body == refused.body, "the same content", || again.body.clone().unwrap_or_default())?;
    session.echo(&session.first, &mark).await.map(drop)
}

async fn waits(session: &Session, id: &str) -> Outcome {
    session.joined()?;
    let before = session.ear.arrivals().len();
    lock(&session.ear.manners).delay = Some(Duration::from_millis(700));
    let marks = [session.mark(id), session.mark(id), session.mark(id)];
    for mark in &marks {
        let lpdu = sealed(session.message(&session.user, mark), &session.first);
        session.send(&session.first, vec![lpdu]).await?.is_good()?;
    }
    for mark in &marks {
        session.echo(&session.first, mark).await?;
    }
    lock(&session.ear.manners).delay = None;
    let arrivals = session.ear.arrivals();
    let overlapped = arrivals.iter().skip(before).find(|arrival| arrival.overlapped);
    ensure(overlapped.is_none(), "one transaction at a time", || format!("{overlapped:?}"))
}

async fn distinct(session: &Session, _: &str) -> Outcome {
    judge::heard(session)?;
    let arrivals = session.ear.arrivals();
    let mut seen: BTreeMap<(String, String), Option<Value>> = BTreeMap::new();
    for arrival in arrivals.iter().filter(|arrival| arrival.endpoint == "send") {
        let id = arrival.segments.first().cloned().unwrap_or_default();
        let before = seen.insert((arrival.to.to_string(), id.clone()), arrival.body.clone());
        ensure(before.is_none_or(|before| before == arrival.body), "a new ID for a new transaction", || id)?;
    }
    Ok(())
}
