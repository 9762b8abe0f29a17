//! Joining, leaving, knocking and invites. Both protocols have the same handshakes: a template is asked for (`make_…`), completed, and
//! sent (`send_…`). The template's path, and the path that Matrix sends to, serve both, and the side that the room is on answers.

use http::StatusCode;
use ruma::{OwnedEventId, OwnedRoomId};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::routes::{Answer, Federation, Place, place_of, side_of};
use super::signed::{Asked, Given};
use crate::event::{Family, Lpdu, Object, Pdu, Redaction, RoomVersion};
use crate::federation::Begun;
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
    let of_graph = of_a_graph(&federation, &given.body).await?;
    let endpoint = match handshake {
        Handshake::Join => "v3/send_join",
        Handshake::Leave => "v3/send_leave",
        Handshake::Knock => "v3/send_knock",
    };
    let lpdu_id = Lpdu::parse(given.body.clone()).ok().map(|lpdu| lpdu.lpdu_id);
    let taking = federation.clone();
    let event_id = of_graph.as_ref().map(|(_, event_id)| event_id.clone());
    let said = |answer| match (handshake, event_id, lpdu_id) {
        // The room's state is too much to be kept for everybody who has joined.
        (Handshake::Join, Some(event_id), _) => Said::JoinedGraph { event_id },
        (Handshake::Join, None, Some(lpdu_id)) => Said::Joined { lpdu_id },
        _ => Said::Answer(answer),
    };
    let take = |given| async move {
        match of_graph {
            Some((room_id, event_id)) => send_to_graph(handshake, taking, given, room_id, event_id).await,
            None => send_to_log(handshake, taking, given).await,
        }
    };
    once(&federation, endpoint, given, said, take).await
}

/// What was said to a transaction, as it is written down.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Said {
    Answer(Value),
    /// The answer to the join that was made of this LPDU.
    Joined {
        lpdu_id: OwnedEventId,
    },
    /// The answer to this join, which a graph server made.
    JoinedGraph {
        event_id: OwnedEventId,
    },
    /// An event that was signed.
    Signed(Value),
    Refused {
        status: u16,
        errcode: Box<str>,
        error: Box<str>,
    },
}

/// Does what a transaction asks for once: whoever uses its ID again, with whatever body, is told the same. What may succeed later
/// is not written down.
/// Source: draft-ralston-mimi-linearized-matrix-04, section "Transaction Identifiers" (`int-txn-ids`).
async fn once<F: Future<Output = Answer>>(
    federation: &Federation,
    endpoint: &str,
    given: Given,
    said: impl FnOnce(Value) -> Said,
    take: impl FnOnce(Given) -> F,
) -> Answer {
    let txn_id = given.segment("txn_id").to_owned();
    let processing = match federation.transactions.begin(&given.origin, endpoint, &txn_id).await? {
        Begun::Answered(before) => return repeat(federation, before).await,
        Begun::Process(processing) => processing,
    };
    let answer = take(given).await;
    let record = match &answer {
        Ok(answer) => said(answer.clone()),
        // Nobody changes what a room's version is.
        Err(Refusal::IncompatibleRoomVersion(_)) => return answer,
        Err(refusal) if refusal.is_transient() || !refusal.status().is_client_error() => return answer,
        Err(refusal) if refusal.status() == StatusCode::TOO_MANY_REQUESTS => return answer,
        Err(refusal) => Said::Refused {
            status: refusal.status().as_u16(),
            errcode: refusal.errcode().into(),
            error: refusal.to_string().into(),
        },
    };
    let record = serde_json::to_value(record).map_err(|error| Refusal::Internal(error.to_string()))?;
    processing.finish(record).await?;
    answer
}

async fn repeat(federation: &Federation, before: Value) -> Answer {
    let said = serde_json::from_value(before).map_err(|error| Refusal::Corrupt(format!("answer: {error}")))?;
    match said {
        Said::Answer(answer) => Ok(answer),
        Said::Joined { lpdu_id } => federation.lm.answer_join_again(&lpdu_id).await,
        Said::JoinedGraph { event_id } => federation.dag.answer_join_again(&event_id).await,
        Said::Signed(event) => Ok(signed(event)),
        Said::Refused { status, errcode, error } => Err(Refusal::Repeated { status, errcode, error }),
    }
}

/// The answer to an invite, under the draft's name and the one that peers read.
fn signed(event: Value) -> Value {
    json!({ "pdu": event, "event": event })
}

/// The room and the ID of an event that is one of a shared room's graph.
async fn of_a_graph(federation: &Federation, event: &Object) -> Result<Option<(OwnedRoomId, OwnedEventId)>, Refusal> {
    let Some(Ok(room_id)) = event.get("room_id").and_then(Value::as_str).map(OwnedRoomId::try_from) else {
        return Ok(None);
    };
    match place_of(federation, &room_id).await? {
        Some(Place::Shared) if Place::Shared.side_for(event) == Side::Matrix => {}
        // Servers of both kinds ask here first, whatever the room, and by Matrix's own endpoints when they are told that there is no such.
        Some(Place::On(Side::Matrix)) => {
            return Err(Refusal::Unrecognized(format!("{room_id} is a Matrix room: this endpoint is for LM rooms")));
        }
        _ => return Ok(None),
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
        Some(Family::Log) => take_invite(federation, given).await,
        Some(Family::Graph) => federation.dag.invited(&given.origin, &room_id, &event_id, given.body).await,
        None => Err(Refusal::IncompatibleRoomVersion(version.to_owned())),
    }
}

/// The same under the draft's own name.
pub(super) async fn invite_lm(federation: Federation, given: Given) -> Answer {
    let taking = federation.clone();
    let said = |mut answer: Value| Said::Signed(answer.get_mut("pdu").map(Value::take).unwrap_or_default());
    once(&federation, "v3/invite", given, said, |given| take_invite(taking, given)).await
}

async fn take_invite(federation: Federation, mut given: Given) -> Answer {
    given.waits(&federation)?;
    federation.lm.invited(&given.origin, given.body).await.map(signed)
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
