//! What must hold of a portal when nothing waits any more, looked at from outside: in the graph and the log themselves.

use std::collections::{BTreeMap, HashMap, HashSet};

use isthmus::bridge::Portal;
use isthmus::event::{RoomVersion, content_hash};
use isthmus::identity::Side;
use isthmus::lm::{Appended, Position};
use isthmus::seam::{LogOrigin, NewLog};
use isthmus::store::images;
use ruma::{OwnedEventId, OwnedUserId};
use serde_json::{Value, json};

use super::house::House;
use crate::dag::OWN;
use crate::dag::peer::own;
use crate::dag::shared::fake::Log;

/// How a failed seed says what is wrong.
pub type Holds = Result<(), String>;

macro_rules! holds {
    ($is:expr, $($why:tt)*) => {
        if !$is {
            return Err(format!($($why)*));
        }
    };
}

/// The IDs of a log, by position.
pub async fn log_ids(house: &House, portal: &Portal) -> Vec<OwnedEventId> {
    let rows: Vec<(String,)> = sqlx::query_as("SELECT event_id FROM lm_events WHERE room_id = $1 ORDER BY position")
        .bind(portal.lm_room_id.as_str())
        .fetch_all(house.context.store.reader())
        .await
        .unwrap();
    rows.into_iter().map(|(id,)| id.as_str().try_into().unwrap()).collect()
}

/// INV-1: what was at a position is there still.
pub fn same_positions(before: &[OwnedEventId], now: &[OwnedEventId]) -> Holds {
    holds!(now.starts_with(before), "INV-1: positions were {before:?} and are {now:?}");
    Ok(())
}

/// All of them, of a portal at rest.
pub async fn all(house: &House, portal: &Portal, matrix: &[OwnedUserId], linear: &[OwnedUserId]) -> Holds {
    let log = house.lm.log(&portal.lm_room_id, Position(0), 10_000).await.unwrap();
    let graph = house.graph(&portal.matrix_room_id).await;
    positions(&log)?;
    rules(portal, &log, &graph)?;
    let ids: Vec<_> = graph.iter().filter(|(_, _, accepted)| *accepted).map(|(id, _, _)| id.clone()).collect();
    let across = crossed(house, Side::Matrix, &ids).await;
    let ids: Vec<_> = log.iter().map(|appended| appended.event.event_id.clone()).collect();
    let back = crossed(house, Side::Lm, &ids).await;
    once(&log, &graph, &across, &back)?;
    order(&log, &graph, &across, &back)?;
    states(house, portal, matrix, linear).await
}

fn positions(log: &[Appended]) -> Holds {
    for (index, appended) in log.iter().enumerate() {
        let position = appended.position.0;
        holds!(
            usize::try_from(position) == Ok(index),
            "INV-1: {} is at {position}, not {index}",
            appended.event.event_id
        );
    }
    Ok(())
}

/// The images of events of a side.
async fn crossed(house: &House, side: Side, ids: &[OwnedEventId]) -> HashMap<OwnedEventId, OwnedEventId> {
    let rows = images::of_sources(&house.context.store, side, ids).await.unwrap();
    rows.into_iter().map(|(source, row)| (source, row.image)).collect()
}

/// INV-3: every event of the log passes LM's rules at its place, and every event of the gateway's in the graph those of Matrix.
fn rules(portal: &Portal, log: &[Appended], graph: &[(OwnedEventId, Value, bool)]) -> Holds {
    let room = NewLog { room_id: portal.lm_room_id.clone(), version: RoomVersion::Lm02, hub: own() };
    let mut replayed = Log { room, events: Vec::new(), state: BTreeMap::new() };
    for appended in log {
        if let Err(refusal) = replayed.judge(&appended.event) {
            return Err(format!(
                "INV-3: {:?} does not pass at {}: {refusal}",
                appended.event.json, appended.position.0
            ));
        }
        replayed.push(appended.event.clone(), LogOrigin::default());
    }
    for (id, event, accepted) in graph {
        holds!(*accepted || !is_ours(&event["sender"]), "INV-3: the gateway's own {id} was not accepted: {event}");
    }
    Ok(())
}

fn is_ours(sender: &Value) -> bool {
    sender.as_str().unwrap_or_default().ends_with(&format!(":{OWN}"))
}

fn source_of(content: &Value) -> Option<&Value> {
    content.get("im.isthmus.source")
}

/// INV-5 and INV-7: each source has one image and each image one source, and nothing that the gateway made is carried back.
fn once(
    log: &[Appended],
    graph: &[(OwnedEventId, Value, bool)],
    across: &HashMap<OwnedEventId, OwnedEventId>,
    back: &HashMap<OwnedEventId, OwnedEventId>,
) -> Holds {
    let images: HashSet<_> = across.values().chain(back.values()).collect();
    holds!(images.len() == across.len() + back.len(), "INV-5: an image has two sources");
    let log: Vec<(&OwnedEventId, Value)> =
        log.iter().map(|appended| (&appended.event.event_id, Value::Object(appended.event.json.clone()))).collect();
    let graph = graph.iter().filter(|(_, _, accepted)| *accepted).map(|(id, event, _)| (id, event.clone())).collect();
    for (side, events, mapping, far) in [("log", &log, across, back), ("graph", &graph, back, across)] {
        let mut sources: HashMap<String, &OwnedEventId> = HashMap::new();
        for (id, event) in events {
            let content = &event["content"];
            let Some(source) = source_of(content).filter(|_| is_ours(&event["sender"])) else { continue };
            holds!(!far.contains_key(*id), "INV-7: {id}, which is an image in the {side}, has an image");
            holds!(!is_ours(&source["sender"]), "INV-7: {id} in the {side} is the image of the gateway's own {source}");
            let named = source["event_id"].as_str().unwrap_or_default().to_owned();
            if let Some(other) = sources.insert(named.clone(), id) {
                return Err(format!("INV-5: {other} and {id} in the {side} are both images of {named}"));
            }
            let known = mapping.iter().any(|(source, image)| image == *id && source.as_str() == named);
            holds!(known, "INV-5: {id} in the {side} says to be the image of {named}, which is not written down");
        }
    }
    let ids: HashSet<_> = log.iter().map(|(id, _)| *id).collect();
    holds!(across.values().all(|image| ids.contains(image)), "INV-5: an image is not in the log");
    Ok(())
}

/// INV-2: ancestors are before descendants in the log, also through images; and what was said in the log is in that order in the graph.
/// It is not asked of the joins by which ghosts are brought in ([`brings_in`]).
fn order(
    log: &[Appended],
    graph: &[(OwnedEventId, Value, bool)],
    across: &HashMap<OwnedEventId, OwnedEventId>,
    back: &HashMap<OwnedEventId, OwnedEventId>,
) -> Holds {
    let images: HashSet<_> = across.values().collect();
    let mut places = HashMap::new();
    for appended in log {
        let event = &appended.event;
        if !images.contains(&event.event_id) || !brings_in(&Value::Object(event.json.clone()))? {
            places.insert(&event.event_id, appended.position.0);
        }
    }
    let numbers: HashMap<_, _> = graph.iter().enumerate().map(|(number, (id, _, _))| (id.as_str(), number)).collect();
    // Where an event of the graph is in the log, as an image or as a source.
    let sources: HashMap<_, _> = back.iter().map(|(source, image)| (image, source)).collect();
    let place = |id: &OwnedEventId| places.get(across.get(id).or_else(|| sources.get(id).copied())?).copied();
    let mut ancestors: Vec<HashSet<usize>> = Vec::new();
    for (number, (_, event, _)) in graph.iter().enumerate() {
        let mut above = HashSet::new();
        for prev in event["prev_events"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            // What came alone, to authorize another, may be stored before what it follows.
            if let Some(prev) = numbers.get(prev).filter(|prev| **prev < number) {
                above.insert(*prev);
                above.extend(&ancestors[*prev]);
            }
        }
        ancestors.push(above);
    }
    let mut last: Option<(i64, usize)> = None;
    let mut of_log: Vec<(i64, usize)> = Vec::new();
    for (number, (id, event, _)) in graph.iter().enumerate() {
        let Some(here) = place(id) else { continue };
        if sources.contains_key(id) {
            if !brings_in(event)? {
                of_log.push((here, number));
            }
            continue;
        }
        for ancestor in &ancestors[number] {
            let above = &graph[*ancestor];
            if let Some(there) = place(&above.0) {
                let (a, b) = (&above.1, event);
                holds!(
                    there < here,
                    "INV-2: {a} is before {b} in the graph, and after it in the log ({there}, {here})"
                );
            }
        }
    }
    of_log.sort_unstable();
    for (here, number) in of_log {
        if let Some((there, before)) = last {
            let (a, b) = (&graph[before].1, &graph[number].1);
            let is_before = ancestors[number].contains(&before);
            holds!(
                is_before,
                "INV-2: {a} was at {there} in the log, {b} at {here}, and is no ancestor of it in the graph"
            );
        }
        last = Some((here, number));
    }
    Ok(())
}

/// Whether an image is a join by which a ghost is brought in because its user is in the room across: before what it says, or by repair. That
/// was made of the state as it was then, in no event's turn: the user may have joined long before, or joins again later, by an event of
/// which it then is the image. Such a join says no source; everything else that has a source says it.
fn brings_in(image: &Value) -> Result<bool, String> {
    if source_of(&image["content"]).is_some() {
        return Ok(false);
    }
    let is_own_join = image["content"]["membership"] == "join" && image["state_key"] == image["sender"];
    // What was redacted since says it no more.
    let is_whole = image.as_object().is_some_and(|image| content_hash(image) == image["hashes"]["sha256"]);
    match is_own_join {
        true => Ok(true),
        false if !is_whole => Ok(false),
        false => Err(format!("INV-2: {image} is an image, and does not say of what")),
    }
}

/// INV-4: the log's state is what the graph's comes to, looked at without the planner of repairs.
async fn states(house: &House, portal: &Portal, matrix: &[OwnedUserId], linear: &[OwnedUserId]) -> Holds {
    let graph = house.dag.state(&portal.matrix_room_id).await.unwrap();
    let log = house.lm.state(&portal.lm_room_id).await.unwrap();
    let leading = |kind: &str, key: &str, field: &str| {
        let event = graph.get(&(kind.to_owned(), key.to_owned()));
        event.and_then(|event| event.content.get(field).cloned()).unwrap_or_default()
    };
    let following = |kind: &str, key: &str, field: &str| {
        log.get(kind, key).and_then(|event| event.content().get(field).cloned()).unwrap_or_default()
    };
    for (kind, field) in [("m.room.name", "name"), ("m.room.topic", "topic"), ("m.room.join_rules", "join_rule")] {
        // What the graph has no more the log has empty.
        let text = |value: Value| if value.is_null() { json!("") } else { value };
        let (here, there) = (text(leading(kind, "", field)), text(following(kind, "", field)));
        holds!(here == there, "INV-4: {kind} is {here} in the graph and {there} in the log");
    }
    let stands = |membership: Value| match membership.as_str() {
        Some("join") => "join",
        Some("ban") => "ban",
        _ => "out",
    };
    for (home, users) in [(Side::Matrix, matrix), (Side::Lm, linear)] {
        for user in users {
            let ghost = house.bridge.ghost_of(user, home).await.unwrap();
            let ghost = ghost.map_or_else(String::new, |ghost| ghost.to_string());
            let (there, here) = match home {
                Side::Matrix => (ghost.as_str(), user.as_str()),
                Side::Lm => (user.as_str(), ghost.as_str()),
            };
            let here = stands(leading("m.room.member", here, "membership"));
            let there = stands(following("m.room.member", there, "membership"));
            // That somebody is banned is lost where the ghost of who bans them may not ban theirs.
            let lost = home == Side::Lm && (here, there) == ("out", "ban");
            holds!(here == there || lost, "INV-4: {user} is {here} in the graph and {there} in the log");
        }
    }
    let level = |user: &OwnedUserId| leading("m.room.power_levels", "", "users")[user.as_str()].as_i64().unwrap_or(0);
    for user in matrix {
        let ghost = house.bridge.ghost_of(user, Side::Matrix).await.unwrap().unwrap();
        let there = following("m.room.power_levels", "", "users")[ghost.as_str()].as_i64().unwrap_or(0);
        holds!(
            json!(there) == json!(level(user)),
            "INV-4: {user} has {} in the graph and {there} in the log",
            level(user)
        );
    }
    Ok(())
}
