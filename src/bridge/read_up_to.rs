//! Which event across somebody has read up to, when they have read up to one here: its image, its source, or, where it has
//! neither, those of the nearest event before it.

use std::collections::HashMap;

use ruma::{EventId, OwnedEventId, RoomId};

use super::core::Core;
use crate::identity::Side;
use crate::lm::Position;
use crate::refusal::Refusal;
use crate::store::images as stored;

/// How many events are looked at, that one included.
const LOOK_BACK: usize = 20;

/// An event across.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ReadUpTo {
    pub(super) image: OwnedEventId,
    /// The order of the event on its own side: depth or position.
    pub(super) order: i64,
}

/// What stands across for an event of `side`, or, when `or_earlier`, for the nearest one before it.
pub(super) async fn find(
    core: &Core,
    side: Side,
    room_id: &RoomId,
    event_id: &EventId,
    or_earlier: bool,
) -> Result<Option<ReadUpTo>, Refusal> {
    let Some(event) = core.sides()?.rooms(side).event(event_id).await?.filter(|event| event.room_id == *room_id) else {
        return Ok(None);
    };
    let itself = [event.event_id.clone()];
    if let Some(image) = images(core, side, &itself).await?.into_values().next() {
        return Ok(Some(ReadUpTo { image, order: event.order }));
    }
    if !or_earlier {
        return Ok(None);
    }
    let before = match side {
        Side::Matrix => before_in_graph(core, room_id, event_id).await?,
        Side::Lm => before_in_log(core, room_id, event.order).await?,
    };
    let ids: Vec<OwnedEventId> = before.iter().map(|(id, _)| id.clone()).collect();
    let found = images(core, side, &ids).await?;
    let nearest = before.into_iter().find_map(|(id, order)| Some(ReadUpTo { image: found.get(&id)?.clone(), order }));
    Ok(nearest)
}

/// What stands across for those of `ids` for which something does: images of them, and sources that they are images of.
pub(super) async fn images(
    core: &Core,
    side: Side,
    ids: &[OwnedEventId],
) -> Result<HashMap<OwnedEventId, OwnedEventId>, Refusal> {
    let store = &core.context.store;
    let made = stored::of_sources(store, side, ids).await?;
    // One that is on its way to its hub has no ID there yet.
    let made = made.into_iter().filter(|(_, row)| !row.pending).map(|(id, row)| (id, row.image));
    let mut found: HashMap<_, _> = made.collect();
    if found.len() < ids.len() {
        let sources = stored::of_images(store, side.other(), ids).await?;
        found.extend(sources.into_iter().map(|(id, row)| (id, row.source)));
    }
    Ok(found)
}

/// The events before one of a graph, along one branch, the nearest first.
async fn before_in_graph(
    core: &Core,
    room_id: &RoomId,
    event_id: &EventId,
) -> Result<Vec<(OwnedEventId, i64)>, Refusal> {
    let dag = &core.sides()?.dag;
    let (mut before, mut at) = (Vec::new(), event_id.to_owned());
    while before.len() < LOOK_BACK {
        let Some(event) = dag.event(&at).await?.filter(|event| event.room_id == *room_id) else { break };
        if at != event_id {
            before.push((event.event_id.clone(), event.depth));
        }
        let Some(previous) = event.prev_events.first() else { break };
        at = previous.clone();
    }
    Ok(before)
}

async fn before_in_log(core: &Core, room_id: &RoomId, position: i64) -> Result<Vec<(OwnedEventId, i64)>, Refusal> {
    let count = i64::try_from(LOOK_BACK).unwrap_or(i64::MAX).min(position);
    let from = Position(position.saturating_sub(count));
    let log = core.sides()?.lm.log(room_id, from, count).await?;
    Ok(log.into_iter().rev().map(|entry| (entry.event.event_id.clone(), entry.position.0)).collect())
}
