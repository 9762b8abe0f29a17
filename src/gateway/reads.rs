//! What other servers read of rooms: events, states, stretches of logs and graphs.

use ruma::{OwnedEventId, OwnedRoomId};
use serde_json::Value;

use super::routes::{Answer, Federation, Place, place_of, side_of};
use super::signed::{Asked, Given};
use crate::dag::DirectoryQuery;
use crate::event::{Object, parse_event_id};
use crate::identity::Side;
use crate::lm::Part;
use crate::refusal::Refusal;

/// How many types of rooms a search of the directory may name.
const ROOM_TYPES: usize = 50;

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
    match side_of(&federation, &asked.origin, &room_id).await? {
        Side::Lm => federation.lm.get_state(&asked.origin, &room_id, event_id.as_deref(), ids).await,
        Side::Matrix => {
            let event_id = event_id.ok_or_else(|| missing("event_id"))?;
            federation.dag.get_state(&asked.origin, &room_id, &event_id, ids).await
        }
    }
}

/// Events before others, under Matrix' name.
pub(super) async fn backfill(federation: Federation, asked: Asked) -> Answer {
    let Page { room_id, from, first, limit } = page(&asked)?;
    match side_of(&federation, &asked.origin, &room_id).await? {
        Side::Lm => federation.lm.backfill(&asked.origin, &room_id, &first, limit).await,
        Side::Matrix => federation.dag.backfill(&asked.origin, &room_id, &from, limit).await,
    }
}

/// The same under the draft's names: of a shared room in the draft's form, whoever asks. Servers that take part in the graph ask by
/// these names too, for events that the log may not have.
pub(super) async fn backfill_lm(federation: Federation, asked: Asked) -> Answer {
    let (Page { room_id, from, first, limit }, origin) = (page(&asked)?, &asked.origin);
    let Federation { lm, dag, .. } = &federation;
    match place_of(&federation, &room_id).await? {
        Some(Place::On(Side::Matrix)) => dag.backfill(origin, &room_id, &from, limit).await,
        Some(Place::Shared)
            if lm.part_in(&room_id, origin).await? == Some(Part::Graph)
                && side_of(&federation, origin, &room_id).await? == Side::Matrix =>
        {
            dag.backfill_as_log(origin, &room_id, &from, limit).await
        }
        Some(Place::Shared | Place::On(Side::Lm)) => lm.backfill(origin, &room_id, &first, limit).await,
        None => Err(Refusal::UnknownRoom(room_id.to_string())),
    }
}

/// What a request for events before others names.
struct Page {
    room_id: OwnedRoomId,
    from: Vec<OwnedEventId>,
    /// The first of these.
    first: OwnedEventId,
    limit: i64,
}

fn page(asked: &Asked) -> Result<Page, Refusal> {
    let room_id = asked.room_id()?;
    let from = asked.values("v").map(|id| parse_event_id("v", &id)).collect::<Result<Vec<_>, _>>()?;
    let limit = asked.number("limit")?.ok_or_else(|| missing("limit"))?;
    let first = from.first().cloned().ok_or_else(|| missing("v"))?;
    Ok(Page { room_id, from, first, limit })
}

/// Events between others.
pub(super) async fn missing_events(federation: Federation, given: Given) -> Answer {
    federation.dag.get_missing_events(&given.origin, &given.room_id()?, given.body).await
}

/// The public rooms, as the query asks for them.
pub(super) async fn public_rooms(federation: Federation, asked: Asked) -> Answer {
    let asked =
        DirectoryQuery { limit: asked.number("limit")?, since: asked.value("since"), ..DirectoryQuery::default() };
    federation.dag.public_rooms(&asked).await
}

/// The same, as the body asks for them.
pub(super) async fn search_public_rooms(federation: Federation, given: Given) -> Answer {
    federation.dag.public_rooms(&directory_query(&given.body)?).await
}

/// A room, and if it is a space the rooms in it.
pub(super) async fn hierarchy(federation: Federation, asked: Asked) -> Answer {
    let suggested = asked.value("suggested_only").as_deref() == Some("true");
    federation.dag.hierarchy(&asked.origin, &asked.room_id()?, suggested).await
}

fn directory_query(body: &Object) -> Result<DirectoryQuery, Refusal> {
    let wrong = |what: &str, value: &Value, kind| Refusal::malformed(what, format!("{value} is not {kind}"));
    let given = |within: &Object, key: &str| within.get(key).filter(|value| !value.is_null()).cloned();
    let text = |within: &Object, key: &str| match given(within, key) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(wrong(key, &other, "a string")),
    };
    let limit = given(body, "limit").map(|limit| limit.as_i64().ok_or_else(|| wrong("limit", &limit, "an integer")));
    let filter = match given(body, "filter") {
        None => Object::new(),
        Some(Value::Object(filter)) => filter,
        Some(other) => return Err(wrong("filter", &other, "an object")),
    };
    let room_types = match given(&filter, "room_types") {
        None => None,
        Some(Value::Array(types)) => {
            let types = types.into_iter().take(ROOM_TYPES).map(|kind| match kind {
                Value::Null => Ok(None),
                Value::String(kind) => Ok(Some(kind)),
                other => Err(wrong("room_types", &other, "a string or null")),
            });
            Some(types.collect::<Result<_, _>>()?)
        }
        Some(other) => return Err(wrong("room_types", &other, "an array")),
    };
    let term = text(&filter, "generic_search_term")?;
    Ok(DirectoryQuery { limit: limit.transpose()?, since: text(body, "since")?, term, room_types })
}

fn missing(what: &str) -> Refusal {
    Refusal::malformed(what, "missing")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_asked_of_the_directory_is_read_or_refused() {
        let query = |body: Value| directory_query(body.as_object().unwrap());
        let synapses = query(json!({ "filter": null, "include_all_networks": false, "limit": 101 })).unwrap();
        assert_eq!((synapses.limit, synapses.term, synapses.room_types), (Some(101), None, None));
        let all = query(json!({
            "since": "!r:g", "filter": { "generic_search_term": "tea", "room_types": [null, "m.space"] }
        }));
        let all = all.unwrap();
        assert_eq!((all.since.as_deref(), all.term.as_deref()), (Some("!r:g"), Some("tea")));
        assert_eq!(all.room_types, Some(vec![None, Some("m.space".to_owned())]));
        for (body, what) in [
            (json!({ "limit": "7" }), "limit"),
            (json!({ "since": 7 }), "since"),
            (json!({ "filter": [] }), "filter"),
            (json!({ "filter": { "generic_search_term": {} } }), "generic_search_term"),
            (json!({ "filter": { "room_types": "m.space" } }), "room_types"),
            (json!({ "filter": { "room_types": [7] } }), "room_types"),
        ] {
            let refusal = query(body).unwrap_err();
            assert!(refusal.to_string().starts_with(&format!("{what}: ")), "{refusal}");
        }
    }
}
