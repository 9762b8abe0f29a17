//! What other servers read of rooms: events, states, stretches of logs and graphs.

use serde_json::Value;

use super::routes::{Answer, Federation, side_of};
use super::signed::{Asked, Given};
use crate::event::parse_event_id;
use crate::identity::Side;
use crate::refusal::Refusal;

/// An event of a graph.
pub(super) async fn event(federation: Federation, asked: Asked) -> Answer {
    federation.dag.get_event(&asked.origin, &asked.event_id()?).await
}

/// An event of a log.
pub(super) async fn event_lm(federation: Federation, asked: Asked) -> Answer {
    federation.lm.get_event(&asked.origin, &asked.event_id()?).await
}

/// What an event's authorization stands on.
pub(super) async fn event_auth(federation: Federation, asked: Asked) -> Answer {
    federation.dag.event_auth(&asked.origin, &asked.room_id()?, &asked.event_id()?).await
}

/// A room's state before an event, in full or, with `ids`, by its events' IDs.
pub(super) async fn state(federation: Federation, asked: Asked, ids: bool) -> Answer {
    let room_id = asked.room_id()?;
    let event_id = asked.value("event_id").map(|id| parse_event_id("event_id", &id)).transpose()?;
    match side_of(&federation, &room_id).await? {
        Side::Lm => federation.lm.get_state(&asked.origin, &room_id, event_id.as_deref(), ids).await,
        Side::Matrix => {
            let event_id = event_id.ok_or_else(|| missing("event_id"))?;
            federation.dag.get_state(&asked.origin, &room_id, &event_id, ids).await
        }
    }
}

/// Events before others.
pub(super) async fn backfill(federation: Federation, asked: Asked) -> Answer {
    let room_id = asked.room_id()?;
    let from = asked.values("v").map(|id| parse_event_id("v", &id)).collect::<Result<Vec<_>, _>>()?;
    let limit = asked.number("limit")?.ok_or_else(|| missing("limit"))?;
    let first = from.first().ok_or_else(|| missing("v"))?;
    match side_of(&federation, &room_id).await? {
        Side::Lm => federation.lm.backfill(&asked.origin, &room_id, first, limit).await,
        Side::Matrix => federation.dag.backfill(&asked.origin, &room_id, &from, limit).await,
    }
}

/// Events between others.
pub(super) async fn missing_events(federation: Federation, given: Given) -> Answer {
    federation.dag.get_missing_events(&given.origin, &given.room_id()?, given.body).await
}

/// The public rooms, as the query asks for them.
pub(super) async fn public_rooms(federation: Federation, asked: Asked) -> Answer {
    federation.dag.public_rooms(asked.number("limit")?, asked.value("since").as_deref()).await
}

/// The same, as the body asks for them.
pub(super) async fn search_public_rooms(federation: Federation, given: Given) -> Answer {
    let wrong = |what, problem| move |value: &Value| Refusal::malformed(what, format!("{value} {problem}"));
    let limit = given.body.get("limit");
    let limit = limit.map(|limit| limit.as_i64().ok_or_else(|| wrong("limit", "is not an integer")(limit)));
    let since = given.body.get("since");
    let since = since.map(|since| since.as_str().ok_or_else(|| wrong("since", "is not a string")(since)));
    federation.dag.public_rooms(limit.transpose()?, since.transpose()?).await
}

fn missing(what: &str) -> Refusal {
    Refusal::malformed(what, "missing")
}
