//! Invites across servers: those that the gateway sends, and those that its users get.
//! <https://spec.matrix.org/v1.16/server-server-api/#inviting-to-a-room>

use std::sync::Arc;

use ruma::events::TimelineEventType;
use ruma::{EventId, RoomId, ServerName, UserId};
use serde_json::{Value, json};

use super::accept::{Outcome, Source};
use super::batch::Batch;
use super::build::countersign;
use super::fetch::segment;
use super::pdu::{Pdu, Unverified, Verified};
use super::room::Room;
use super::{Dag, GraphEvent};
use crate::event::{Family, Object, RoomVersion};
use crate::federation::Call;
use crate::identity::{Side, Validity};
use crate::refusal::Refusal;
use crate::seam::{Invite, Outgoing, Uninvited};
use crate::store::dag::{InviteRow, invite as find_invite, put_invite};

/// What an invited user's server is told of the room.
/// <https://spec.matrix.org/v1.16/client-server-api/#stripped-state>
const STRIPPED: [&str; 7] = [
    "m.room.create",
    "m.room.join_rules",
    "m.room.name",
    "m.room.topic",
    "m.room.avatar",
    "m.room.canonical_alias",
    "m.room.encryption",
];
/// How many events of stripped state are taken from an invite.
pub(super) const MAX_STRIPPED: usize = 100;

impl Dag {
    /// Invites a user of another server: the target's server is asked and signs, then the event is stored and sent.
    pub async fn invite(&self, room_id: &RoomId, invite: Outgoing) -> Result<Arc<GraphEvent>, Refusal> {
        let target = invite.draft.state_key.as_deref().and_then(|user| <&UserId>::try_from(user).ok());
        let target = target.ok_or_else(|| Refusal::malformed("state_key", "not a user ID"))?.to_owned();
        let server = target.server_name();
        let room = self.resident(room_id).await?;
        if *server == self.shared.context.server_name {
            return self.send_one(&room, invite).await;
        }
        let _asking = self.shared.context.asked.begin(room_id, &target);
        // Built and checked on what is committed now, without holding the room up while the other server is asked.
        let mut batch = Batch::new(self.shared.clone(), &room);
        let event = batch.build(&invite.draft).await?;
        batch.accept(event.clone(), &Source::Own, None).await?.accepted()?;
        let signed = self.ask_to_sign(&room, server, event.pdu()).await?;
        let effect = invite.effect;
        let stored = self
            .shared
            .run(&room, move |batch| {
                Box::pin(async move {
                    let before = batch.savepoint();
                    batch.take_own(signed, effect, before).await
                })
            })
            .await?;
        Ok(stored.to_graph_event())
    }

    async fn ask_to_sign(&self, room: &Room, server: &ServerName, event: &Pdu) -> Result<Verified, Refusal> {
        let body = json!({
            "event": event.to_value(),
            "room_version": room.version.as_str(),
            "invite_room_state": self.stripped_state(room, Some(&event.sender)).await?,
        });
        let uri = format!(
            "/_matrix/federation/v2/invite/{}/{}",
            segment(room.room_id.as_str()),
            segment(event.event_id.as_str())
        );
        let call = Call::put(uri, body.as_object().cloned().unwrap_or_default());
        let client = &self.shared.context.client;
        let mut answer = client.call(server, call, false).await.map_err(|error| error.into_refusal(server))?;
        let Some(Value::Object(signed)) = answer.remove("event") else {
            return Err(Refusal::Remote { server: server.to_string(), problem: "no event in its answer".to_owned() });
        };
        let signed = Unverified::from_object(signed, room.version)?;
        if signed.pdu().event_id != event.event_id {
            let problem = format!("it signed {}, asked was {}", signed.pdu().event_id, event.event_id);
            return Err(Refusal::Remote { server: server.to_string(), problem });
        }
        let servers = [server.to_owned(), self.shared.context.server_name.clone()];
        let validity = Validity::At(event.origin_server_ts);
        let keys = self.shared.context.keyring.keys_for_event(&signed.signatures(), &servers, validity).await?;
        signed.verify_by(&servers, &keys)
    }

    /// What is told of a room to those who are not in it: for version 12 whole events, else stripped ones.
    pub(super) async fn stripped_state(&self, room: &Room, inviter: Option<&UserId>) -> Result<Vec<Value>, Refusal> {
        let core = room.core();
        let inviter = inviter.and_then(|user| core.current.get("m.room.member", user.as_str()));
        let ids: Vec<_> =
            STRIPPED.iter().filter_map(|kind| core.current.get(kind, "")).chain(inviter).cloned().collect();
        let events = self.shared.events.get_many(&ids).await?;
        let whole = room.rules.authorization.room_create_event_id_as_room_id;
        Ok(ids
            .iter()
            .filter_map(|id| events.get(id))
            .map(|event| {
                if whole {
                    return event.pdu.to_value();
                }
                json!({
                    "type": event.pdu.kind.to_string(), "state_key": event.pdu.state_key, "sender": event.pdu.sender,
                    "content": event.content(),
                })
            })
            .collect())
    }

    /// `PUT v2/invite`: another server invites a user of the gateway.
    pub async fn invited(
        &self,
        origin: &ServerName,
        room_id: &RoomId,
        event_id: &EventId,
        mut body: Object,
    ) -> Result<Value, Refusal> {
        let version = body.get("room_version").and_then(Value::as_str).unwrap_or_default();
        let version = RoomVersion::parse(version)
            .filter(|version| version.family() == Family::Graph)
            .ok_or_else(|| Refusal::IncompatibleRoomVersion(version.to_owned()))?;
        let Some(Value::Object(event)) = body.remove("event") else {
            return Err(Refusal::malformed("event", "absent"));
        };
        let event = Unverified::from_object(event, version)?;
        let target = check_invite(event.pdu(), origin, room_id, event_id, &self.shared.context.server_name)?;
        let own = &self.shared.context.server_name;
        let room = self.shared.find(room_id).await?;
        if let Some(room) = &room {
            self.shared.check_acl(room, origin).await?;
        }
        let resident = room.filter(|room| room.core().has_server(own));
        let event = self.shared.verify(event).await?;
        if let Some(room) = &resident {
            // What the room would not take is not signed. What cannot be judged yet, because other events come first, is.
            let mut trial = Batch::new(self.shared.clone(), room);
            if let known @ Outcome::Known(_) = trial.accept(event.clone(), &Source::Received, None).await? {
                known.accepted()?;
            }
        }
        let pdu = event.into_pdu();
        let content = serde_json::from_str(pdu.content.get()).unwrap_or_default();
        let stripped = match body.remove("invite_room_state") {
            Some(Value::Array(state)) => state,
            _ => Vec::new(),
        };
        let stripped = stripped.into_iter().take(MAX_STRIPPED).filter_map(|event| event.as_object().cloned());
        let invite = Invite {
            side: Side::Matrix,
            room_id: room_id.to_owned(),
            room_version: version.as_str().to_owned(),
            event_id: event_id.to_owned(),
            sender: pdu.sender.clone(),
            target: target.clone(),
            via: origin.to_owned(),
            content,
            stripped_state: stripped.collect(),
        };
        self.shared.between.invited(invite).await?;
        let context = &self.shared.context;
        let signed = countersign(&pdu, context.server_name.as_str(), &context.signing_key)?;
        // Of a room that is here, the invite comes again as one of its events.
        if resident.is_none() {
            let row = InviteRow {
                version: version.as_str().to_owned(),
                via: origin.to_owned(),
                json: signed.to_string().into_bytes(),
            };
            let room_id = room_id.to_owned();
            let write =
                context.store.write(move |tx| Box::pin(async move { put_invite(tx, &room_id, &target, &row).await }));
            write.await?;
        }
        Ok(json!({ "event": signed }))
    }
}

impl Dag {
    /// An event of a room that the gateway is not in: perhaps somebody takes an invite of one of its users back. Nothing of the room's
    /// state is known, so that is believed of those alone who could not but say so: it follows the invite that was signed here.
    pub(super) async fn outside_event(&self, origin: &ServerName, object: Object) -> Result<(), Refusal> {
        let context = &self.shared.context;
        let text = |key: &str| object.get(key).and_then(Value::as_str);
        let (room_id, target) = (text("room_id").unwrap_or_default(), text("state_key").unwrap_or_default());
        let (Ok(room_id), Ok(target)) = (RoomId::parse(room_id), UserId::parse(target)) else { return Ok(()) };
        if self.shared.between.invited_into(&room_id) != Some(Side::Matrix) {
            return Ok(());
        }
        let invite = find_invite(&context.store, &room_id, &target).await?;
        let Some(version) = invite.as_ref().and_then(|invite| RoomVersion::parse(&invite.version)) else {
            return Ok(());
        };
        let invite: Object = invite.and_then(|invite| serde_json::from_slice(&invite.json).ok()).unwrap_or_default();
        let invite = Unverified::from_object(invite, version)?;
        let event = Unverified::from_object(object, version)?;
        if event.pdu().kind != TimelineEventType::RoomMember
            || !event.pdu().auth_events.contains(&invite.pdu().event_id)
        {
            return Ok(());
        }
        let event = self.shared.verify(event).await?;
        let pdu = event.pdu();
        let content: Object = serde_json::from_str(pdu.content.get()).unwrap_or_default();
        let said = (&*room_id, &*pdu.sender, pdu.state_key.as_deref(), &content);
        match Uninvited::of(Side::Matrix, origin, &context.server_name, said) {
            Some(ended) => self.shared.between.uninvited(ended).await,
            None => Ok(()),
        }
    }
}

/// The event is the invite that the path names, by a user of the origin, for a user of the gateway.
fn check_invite(
    pdu: &Pdu,
    origin: &ServerName,
    room_id: &RoomId,
    event_id: &EventId,
    own: &ServerName,
) -> Result<ruma::OwnedUserId, Refusal> {
    if pdu.event_id != event_id {
        return Err(Refusal::malformed("event ID", format!("{}, expected {event_id}", pdu.event_id)));
    }
    if pdu.room_id != room_id {
        return Err(Refusal::malformed("room_id", format!("{}, expected {room_id}", pdu.room_id)));
    }
    let membership = serde_json::from_str::<Object>(pdu.content.get()).ok();
    let membership = membership.and_then(|content| content.get("membership").cloned()).unwrap_or_default();
    if pdu.kind != TimelineEventType::RoomMember || membership != "invite" {
        return Err(Refusal::malformed("event", format!("{} with membership {membership}, not an invite", pdu.kind)));
    }
    if pdu.sender.server_name() != origin {
        return Err(Refusal::WrongOrigin {
            origin: origin.to_string(),
            expected: pdu.sender.server_name().to_string(),
        });
    }
    let target = pdu.state_key.as_deref().unwrap_or_default();
    let target: ruma::OwnedUserId = target.try_into().map_err(|_| Refusal::malformed("state_key", target))?;
    if target.server_name() != own {
        return Err(Refusal::Forbidden(format!("{target} is not a user of {own}")));
    }
    Ok(target)
}
