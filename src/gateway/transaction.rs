//! `PUT send`: a transaction of another server, whose events go to the side that each one's room is on. Nothing is
//! answered before everything that was accepted is committed (INV-6).

use std::borrow::Cow;

use ruma::{RoomId, ServerName};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::routes::Federation;
use super::signed::SignedTransaction;
use crate::admin::metrics;
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::seam::{Raw, Received};

/// How many PDUs a transaction may have.
const MAX_PDUS: usize = 50;
/// How many EDUs a transaction may have.
const MAX_EDUS: usize = 100;

/// In which words the outcome is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    /// `{"pdus": {ID: {}}}`
    Matrix,
    /// `{"failed_pdus": {ID: {"error": …}}}`
    Lm,
}

#[derive(Deserialize)]
struct Transaction {
    pdus: Option<Vec<Box<RawValue>>>,
    edus: Option<Vec<Box<RawValue>>>,
}

/// The one field of an event that says to whom it goes.
#[derive(Deserialize)]
struct Peek<'a> {
    #[serde(borrow)]
    room_id: Option<Cow<'a, str>>,
}

pub(super) async fn receive(
    state: &Federation,
    transaction: &SignedTransaction,
    dialect: Dialect,
) -> Result<Value, Refusal> {
    let (pdus, _edus) = parse(&transaction.raw)?;
    let outcomes = dispatch(state, &transaction.origin, pdus).await;
    // What failed here is no verdict on the event: the whole is sent again, and what was taken is known then.
    if let Some(failure) = outcomes.iter().find_map(|outcome| match &outcome.result {
        Err(refusal @ Refusal::Internal(_)) => Some(refusal.clone()),
        _ => None,
    }) {
        return Err(failure);
    }
    Ok(answer(outcomes, dialect))
}

fn parse(raw: &[u8]) -> Result<(Vec<Raw>, Vec<Raw>), Refusal> {
    let Transaction { pdus, edus } =
        serde_json::from_slice(raw).map_err(|error| Refusal::malformed("transaction", error.to_string()))?;
    // The draft allows `edus` to be left out, and a server with nothing but EDUs leaves out `pdus`.
    let (pdus, edus) = (pdus.unwrap_or_default(), edus.unwrap_or_default());
    for (what, count, limit) in [("pdus", pdus.len(), MAX_PDUS), ("edus", edus.len(), MAX_EDUS)] {
        if count > limit {
            return Err(Refusal::malformed(what, format!("{count} entries, at most {limit} are allowed")));
        }
    }
    Ok((pdus, edus))
}

/// Hands the events over, those of one side together, and keeps their order within a side.
async fn dispatch(state: &Federation, origin: &ServerName, pdus: Vec<Raw>) -> Vec<Received> {
    let (mut linear, mut graph, mut outcomes) = (Vec::new(), Vec::new(), Vec::new());
    for pdu in pdus {
        match side_of(state, &pdu).await {
            Ok(Some(Side::Lm)) => linear.push(pdu),
            Ok(Some(Side::Matrix)) => graph.push(pdu),
            Ok(None) => tracing::debug!(%origin, "dropped an event of a room that is not known here"),
            Err(refusal) => outcomes.push(Received { event_id: None, result: Err(refusal) }),
        }
    }
    if !linear.is_empty() {
        outcomes.extend(counted(Side::Lm, state.lm.receive(origin, linear).await));
    }
    if !graph.is_empty() {
        outcomes.extend(counted(Side::Matrix, state.dag.receive(origin, graph).await));
    }
    outcomes
}

fn counted(side: Side, outcomes: Vec<Received>) -> Vec<Received> {
    for outcome in &outcomes {
        match &outcome.result {
            Ok(()) => metrics::event_accepted(side),
            Err(refusal) => metrics::event_refused(side, refusal),
        }
    }
    outcomes
}

async fn side_of(state: &Federation, pdu: &RawValue) -> Result<Option<Side>, Refusal> {
    let peek: Peek<'_> =
        serde_json::from_str(pdu.get()).map_err(|error| Refusal::malformed("event", error.to_string()))?;
    let room_id = peek.room_id.ok_or_else(|| Refusal::malformed("room_id", "missing"))?;
    let room_id = <&RoomId>::try_from(&*room_id).map_err(|error| Refusal::malformed("room_id", error.to_string()))?;
    if state.lm.knows(room_id).await? {
        Ok(Some(Side::Lm))
    } else if state.dag.knows(room_id).await? {
        Ok(Some(Side::Matrix))
    } else {
        Ok(None)
    }
}

fn answer(outcomes: Vec<Received>, dialect: Dialect) -> Value {
    let mut entries = serde_json::Map::new();
    for Received { event_id, result } in outcomes {
        match (event_id, result) {
            (Some(event_id), Ok(())) if dialect == Dialect::Matrix => {
                entries.insert(event_id.to_string(), json!({}));
            }
            (Some(event_id), Err(refusal)) => {
                entries.insert(event_id.to_string(), json!({ "error": refusal.to_string() }));
            }
            (None, Err(refusal)) => tracing::info!(%refusal, "refused an event that has no ID"),
            (_, Ok(())) => {}
        }
    }
    match dialect {
        Dialect::Matrix => json!({ "pdus": entries }),
        Dialect::Lm => json!({ "failed_pdus": entries }),
    }
}
