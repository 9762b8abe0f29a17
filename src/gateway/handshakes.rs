//! Joining, leaving, knocking and invites. Both protocols have the same handshakes: a template is asked for (`make_…`), completed, and
//! sent (`send_…`). The template's path, and the path that Matrix sends to, serve both, and the side that the room is on answers.

use ruma::{OwnedEventId, OwnedRoomId};
use serde_json::Value;

use super::routes::{Answer, Federation, Place, place_of, side_of};
use super::signed::{Asked, Given};
use crate::event::{Family, Object, Pdu, Redaction, RoomVersion};
use crate::identity::Side;
use crate::refusal::Refusal;

/// What a handshake makes of a user.
#[derive(Debug, Clone, Copy)]
pub(super) enum Handshake {
    Join,
    Leave,
    Knock,
}

/// `make_…`: the template of a member event.
pub(super) async fn make(handshake: Handshake, federation: Federation, asked: Asked) -> Answer {
    let (origin, room_id, user_id) = (&asked.origin, asked.room_id()?, asked.user_id()?);
    let versions: Vec<String> = asked.values("ver").collect();
    let Federation { lm, dag, .. } = &federation;
    match (side_of(&federation, origin, &room_id).await?, handshake) {
        (Side::Lm, Handshake::Join) => lm.make_join(origin, &room_id, &user_id, &versions).await,
        (Side::Lm, Handshake::Leave) => lm.make_leave(origin, &room_id, &user_id).await,
        (Side::Lm, Handshake::Knock) => lm.make_knock(origin, &room_id, &user_id, &versions).await,
        (Side::Matrix, Handshake::Join) => dag.make_join(origin, &room_id, &user_id, &versions).await,
        (Side::Matrix, Handshake::Leave) => dag.make_leave(origin, &room_id, &user_id).await,
        (Side::Matrix, Handshake::Knock) => dag.make_knock(origin, &room_id, &user_id, &versions).await,
    }
}

/// `send_…` with the room and the event in its path, as Matrix has it.
pub(super) async fn send(handshake: Handshake, federation: Federation, given: Given) -> Answer {
    let (room_id, event_id) = (given.room_id()?, given.event_id()?);
    let place = place_of(&federation, &room_id).await?.ok_or_else(|| Refusal::UnknownRoom(room_id.to_string()))?;
    if place.side_for(&given.body) == Side::Lm {
        return send_to_log(handshake, federation, given).await;
    }
    send_to_graph(handshake, federation, given, room_id, event_id).await
}

async fn send_to_graph(
    handshake: Handshake,
    federation: Federation,
    mut given: Given,
    room_id: OwnedRoomId,
    event_id: OwnedEventId,
) -> Answer {
    given.waits(&federation)?;
    let omit_members = given.values("omit_members").any(|value| value == "true");
    let (origin, dag, event) = (&given.origin, &federation.dag, given.body);
    match handshake {
        Handshake::Join => dag.send_join(origin, &room_id, &event_id, event, omit_members).await,
        Handshake::Leave => dag.send_leave(origin, &room_id, &event_id, event).await,
        Handshake::Knock => dag.send_knock(origin, &room_id, &event_id, event).await,
    }
}

/// `send_…` with a transaction ID in its path, as the draft has it. The LPDU in the body says the room; graph servers that speak LM
/// use this for whole events too.
pub(super) async fn send_lm(handshake: Handshake, federation: Federation, given: Given) -> Answer {
    if let Some((room_id, event_id)) = of_a_graph(&federation, &given.body).await? {
        return send_to_graph(handshake, federation, given, room_id, event_id).await;
    }
    send_to_log(handshake, federation, given).await
}

/// The room and the ID of an event that is one of a shared room's graph.
async fn of_a_graph(federation: &Federation, event: &Object) -> Result<Option<(OwnedRoomId, OwnedEventId)>, Refusal> {
    let Some(Ok(room_id)) = event.get("room_id").and_then(Value::as_str).map(OwnedRoomId::try_from) else {
        return Ok(None);
    };
    let place = place_of(federation, &room_id).await?;
    if place != Some(Place::Shared) || Place::Shared.side_for(event) == Side::Lm {
        return Ok(None);
    }
    let event_id = Pdu::parse(event.clone(), Redaction::GraphServer)?.event_id;
    Ok(Some((room_id, event_id)))
}

async fn send_to_log(handshake: Handshake, federation: Federation, mut given: Given) -> Answer {
    given.waits(&federation)?;
    let (origin, lm, lpdu) = (&given.origin, &federation.lm, given.body);
    match handshake {
        Handshake::Join => lm.send_join(origin, lpdu).await,
        Handshake::Leave => lm.send_leave(origin, lpdu).await,
        Handshake::Knock => lm.send_knock(origin, lpdu).await,
    }
}

/// An invite of a user of the gateway, whose room is known by its version alone.
pub(super) async fn invite(federation: Federation, given: Given) -> Answer {
    let (room_id, event_id) = (given.room_id()?, given.event_id()?);
    let version = given.body.get("room_version").and_then(Value::as_str);
    let version = version.ok_or_else(|| Refusal::malformed("room_version", "missing or no string"))?;
    match RoomVersion::parse(version).map(RoomVersion::family) {
        Some(Family::Log) => invite_lm(federation, given).await,
        Some(Family::Graph) => federation.dag.invited(&given.origin, &room_id, &event_id, given.body).await,
        None => Err(Refusal::IncompatibleRoomVersion(version.to_owned())),
    }
}

/// The same under the draft's own name.
pub(super) async fn invite_lm(federation: Federation, mut given: Given) -> Answer {
    given.waits(&federation)?;
    federation.lm.invited(&given.origin, given.body).await
}

/// A hub asks whether this server will keep the log of a room from an event on.
pub(super) async fn take_hub(federation: Federation, mut given: Given) -> Answer {
    given.waits(&federation)?;
    federation.lm.take_hub(&given.origin, given.body).await
}

/// Whether this server knows of changes of the hub, and what it would do in a room.
pub(super) async fn ready_for_hub(federation: Federation, asked: Asked) -> Answer {
    let ready = federation.lm.ready_for_hub(&asked.origin, &asked.room_id()?).await?;
    serde_json::to_value(ready).map_err(|error| Refusal::Internal(error.to_string()))
}
