//! Handshakes of other servers' users: joining, leaving and knocking through this gateway.
//! <https://spec.matrix.org/v1.16/server-server-api/#joining-rooms>

use std::sync::Arc;

use ruma::events::TimelineEventType;
use ruma::{EventId, RoomId, ServerName, UserId};
use serde_json::{Value, json};

use super::Dag;
use super::accept::{Outcome, Source};
use super::batch::Batch;
use super::pdu::{Unverified, Verified};
use super::room::Room;
use super::serve::{auth_chain_of, values};
use super::stored::Stored;
use crate::event::Object;
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::seam::{Draft, Handshake, Membership, Stage};

/// From how many members on a join is answered without them to who asks for that. Fewer are given at once: a Synapse that cannot
/// have them later, because this server is away for a moment, shows the room to nobody until it is restarted itself.
const MANY_MEMBERS: usize = 200;

impl Dag {
    /// `GET v1/make_join`
    pub async fn make_join(
        &self,
        origin: &ServerName,
        room_id: &RoomId,
        user_id: &UserId,
        versions: &[String],
    ) -> Result<Value, Refusal> {
        self.make(origin, room_id, user_id, Membership::Join, Some(versions)).await
    }

    /// `PUT v2/send_join`; full state unless there are many members and `omit_members` asks for them to be left out.
    pub async fn send_join(
        &self,
        origin: &ServerName,
        room_id: &RoomId,
        event_id: &EventId,
        event: Object,
        omit_members: bool,
    ) -> Result<Value, Refusal> {
        let join = self.take_handshake(origin, room_id, event_id, event, Membership::Join).await?;
        self.answer_join(&join, omit_members).await
    }

    /// Answers a join that was taken as it was answered then, with the full state.
    pub async fn answer_join_again(&self, event_id: &EventId) -> Result<Value, Refusal> {
        let join = self.shared.events.get(event_id).await?.filter(|event| event.is_accepted());
        let join = join.ok_or_else(|| Refusal::NotFound(format!("the join {event_id}")))?;
        self.answer_join(&join, false).await
    }

    /// `GET v1/make_leave`
    pub async fn make_leave(&self, origin: &ServerName, room_id: &RoomId, user_id: &UserId) -> Result<Value, Refusal> {
        self.make(origin, room_id, user_id, Membership::Leave, None).await
    }

    /// `PUT v2/send_leave`
    pub async fn send_leave(
        &self,
        origin: &ServerName,
        room_id: &RoomId,
        event_id: &EventId,
        event: Object,
    ) -> Result<Value, Refusal> {
        self.take_handshake(origin, room_id, event_id, event, Membership::Leave).await?;
        Ok(json!({}))
    }

    /// `GET v1/make_knock`
    pub async fn make_knock(
        &self,
        origin: &ServerName,
        room_id: &RoomId,
        user_id: &UserId,
        versions: &[String],
    ) -> Result<Value, Refusal> {
        self.make(origin, room_id, user_id, Membership::Knock, Some(versions)).await
    }

    /// `PUT v1/send_knock`
    pub async fn send_knock(
        &self,
        origin: &ServerName,
        room_id: &RoomId,
        event_id: &EventId,
        event: Object,
    ) -> Result<Value, Refusal> {
        self.take_handshake(origin, room_id, event_id, event, Membership::Knock).await?;
        let room = self.shared.room(room_id).await?;
        Ok(json!({ "knock_room_state": self.stripped_state(&room, None).await? }))
    }

    async fn make(
        &self,
        origin: &ServerName,
        room_id: &RoomId,
        user_id: &UserId,
        membership: Membership,
        versions: Option<&[String]>,
    ) -> Result<Value, Refusal> {
        let room = self.resident(room_id).await?;
        if user_id.server_name() != origin {
            return Err(Refusal::Forbidden(format!("{origin} asks for {user_id}")));
        }
        self.shared.check_acl(&room, origin).await?;
        if versions.is_some_and(|versions| !versions.iter().any(|version| version == room.version.as_str())) {
            return Err(Refusal::IncompatibleRoomVersion(room.version.as_str().to_owned()));
        }
        self.shared.context.asked.settled(room_id, user_id).await;
        self.invite_comes(&room, user_id, membership).await?;
        let draft = Draft {
            sender: user_id.to_owned(),
            kind: "m.room.member".to_owned(),
            state_key: Some(user_id.to_string()),
            content: Object::from_iter([("membership".to_owned(), json!(membership.as_str()))]),
            origin_server_ts: self.shared.context.clock.now_ms(),
        };
        // A batch that is never committed: what the room would say to this event now.
        let mut batch = Batch::new(self.shared.clone(), &room);
        let template = batch.template(&draft).await?;
        let event = Verified::of_template(&template, room.version)?;
        let judged = batch.accept(event, &Source::Received, None).await;
        match judged.and_then(|outcome| outcome.accepted().map(drop)) {
            Err(refusal @ Refusal::MatrixRule(_)) if membership == Membership::Join => {
                return Err(self.restricted(&room, user_id).await?.unwrap_or(refusal));
            }
            judged => judged?,
        }
        self.gate(&room, user_id, membership, Stage::Make, Object::new()).await?;
        let event = serde_json::to_value(&template).map_err(|error| Refusal::Internal(error.to_string()))?;
        Ok(json!({ "room_version": room.version.as_str(), "event": event }))
    }

    /// Waits for an invite that another server of the room may have made, where it alone lets a user come in, or decline it.
    async fn invite_comes(&self, room: &Room, user_id: &UserId, membership: Membership) -> Result<(), Refusal> {
        let own = &self.shared.context.server_name;
        let core = room.core();
        let has_others = core.graph_servers().any(|server| server != own) && !core.has_server(user_id.server_name());
        if !has_others || !matches!(membership, Membership::Join | Membership::Leave) {
            return Ok(());
        }
        let member = self.state_event(&room.room_id, "m.room.member", user_id.as_str()).await?;
        let current = member.as_ref().and_then(|event| event.content.get("membership")?.as_str());
        let rules = self.state_event(&room.room_id, "m.room.join_rules", "").await?;
        let rule = rules.as_ref().and_then(|event| event.content.get("join_rule")?.as_str()).unwrap_or("invite");
        if !membership.needs_invite(current, rule) {
            return Ok(());
        }
        let of_user = || room.core().current.get("m.room.member", user_id.as_str()).cloned();
        let before = core.current.get("m.room.member", user_id.as_str());
        self.shared.context.asked.comes(&room.changes, || of_user().as_ref() != before).await;
        Ok(())
    }

    /// The refusal of a join that another server of the room might authorise, for a user whom nothing but the conditions
    /// keeps out: <https://spec.matrix.org/v1.16/server-server-api/#restricted-rooms>
    pub(super) async fn restricted(&self, room: &Room, user_id: &UserId) -> Result<Option<Refusal>, Refusal> {
        let rules = self.state_event(&room.room_id, "m.room.join_rules", "").await?;
        let rule = rules.as_ref().and_then(|event| event.content.get("join_rule")?.as_str()).unwrap_or_default();
        let member = self.state_event(&room.room_id, "m.room.member", user_id.as_str()).await?;
        let membership = member.as_ref().and_then(|event| event.content.get("membership")?.as_str());
        if !matches!(rule, "restricted" | "knock_restricted") || membership == Some("ban") {
            return Ok(None);
        }
        Ok(Some(Refusal::UnableToAuthoriseJoin {
            room_id: room.room_id.to_string(),
            join_rule: rule.to_owned(),
            user_id: user_id.to_string(),
        }))
    }

    /// Checks the signed event of a handshake, asks the other side, and takes it in.
    async fn take_handshake(
        &self,
        origin: &ServerName,
        room_id: &RoomId,
        event_id: &EventId,
        event: Object,
        membership: Membership,
    ) -> Result<Arc<Stored>, Refusal> {
        let room = self.resident(room_id).await?;
        self.shared.check_acl(&room, origin).await?;
        let event = Unverified::from_object(event, room.version)?;
        check_matches(&event, origin, room_id, event_id, membership)?;
        if let Some(known) = self.shared.events.get(event_id).await?.filter(|event| event.groups.is_some()) {
            return Outcome::Known(known).accepted().cloned();
        }
        let event = self.shared.verify(event).await?;
        let content: Object = serde_json::from_str(event.pdu().content.get()).unwrap_or_default();
        let user_id = event.pdu().sender.clone();
        self.shared.context.asked.settled(room_id, &user_id).await;
        self.invite_comes(&room, &user_id, membership).await?;
        let mut trial = Batch::new(self.shared.clone(), &room);
        trial.accept(event.clone(), &Source::Received, None).await?.accepted()?;
        self.gate(&room, &user_id, membership, Stage::Send, content).await?;
        let source = Source::Handshake(origin.to_owned());
        let mut outcomes = self.shared.accept_batch(&room, vec![event], source).await?;
        let outcome = outcomes.remove(event_id).ok_or_else(|| Refusal::Internal("no outcome".to_owned()))?;
        outcome?.accepted().cloned()
    }

    /// A room in which the gateway has somebody.
    pub(super) async fn resident(&self, room_id: &RoomId) -> Result<Arc<Room>, Refusal> {
        let room = self.shared.room(room_id).await?;
        if room.core().has_server(&self.shared.context.server_name) {
            Ok(room)
        } else {
            Err(Refusal::UnknownRoom(room_id.to_string()))
        }
    }

    async fn gate(
        &self,
        room: &Room,
        user_id: &UserId,
        membership: Membership,
        stage: Stage,
        content: Object,
    ) -> Result<(), Refusal> {
        let handshake = Handshake {
            side: Side::Matrix,
            room_id: room.room_id.clone(),
            user_id: user_id.to_owned(),
            membership,
            stage,
            content,
        };
        self.shared.between.gate(&handshake).await
    }

    /// The room's state before the join, and everything that authorizes it and the join.
    async fn answer_join(&self, join: &Arc<Stored>, omit_members: bool) -> Result<Value, Refusal> {
        let origin = join.pdu.sender.server_name();
        self.shared.context.large.build(origin, self.build_answer(join, omit_members)).await
    }

    async fn build_answer(&self, join: &Arc<Stored>, omit_members: bool) -> Result<Value, Refusal> {
        let events = &self.shared.events;
        let groups = join.groups.ok_or_else(|| Refusal::Internal("a join without state".to_owned()))?;
        let before = events.group(groups.before).await?;
        let is_member = |kind: &str| kind == "m.room.member";
        let members = before.map.iter().filter(|((kind, _), _)| is_member(kind)).count();
        let omit_members = omit_members && members >= MANY_MEMBERS;
        // The joining server asks for the other members later; what it needs to check the rest is in the auth chain.
        let wanted = |kind: &str| !omit_members || !is_member(kind);
        let ids: Vec<_> = before.map.iter().filter(|((kind, _), _)| wanted(kind)).map(|(_, id)| id.clone()).collect();
        let state = events.get_many(&ids).await?;
        let chain = auth_chain_of(events, state.values().chain([join]).cloned().collect(), &state).await?;
        let room = self.shared.room(&join.pdu.room_id).await?;
        let mut answer = json!({
            "origin": self.shared.context.server_name,
            "event": join.pdu.to_value(),
            "state": values(state.into_values()),
            "auth_chain": values(chain),
            "members_omitted": omit_members,
        });
        if omit_members && let Some(answer) = answer.as_object_mut() {
            answer.insert("servers_in_room".to_owned(), json!(room.core().servers.keys().collect::<Vec<_>>()));
        }
        Ok(answer)
    }
}

/// The event is the handshake that the path names, of the origin's own user.
fn check_matches(
    event: &Unverified,
    origin: &ServerName,
    room_id: &RoomId,
    event_id: &EventId,
    membership: Membership,
) -> Result<(), Refusal> {
    let pdu = event.pdu();
    let differs = |what: &str, found: &str, expected: &str| {
        Err(Refusal::malformed(what, format!("{found:?}, expected {expected:?}")))
    };
    if pdu.event_id != event_id {
        return differs("event ID", pdu.event_id.as_str(), event_id.as_str());
    }
    if pdu.room_id != room_id {
        return differs("room_id", pdu.room_id.as_str(), room_id.as_str());
    }
    if pdu.kind != TimelineEventType::RoomMember {
        return differs("type", &pdu.kind.to_string(), "m.room.member");
    }
    let content: Object = serde_json::from_str(pdu.content.get()).unwrap_or_default();
    let found = content.get("membership").and_then(Value::as_str).unwrap_or_default();
    if found != membership.as_str() {
        return differs("membership", found, membership.as_str());
    }
    if pdu.state_key.as_deref() != Some(pdu.sender.as_str()) {
        return differs("state_key", pdu.state_key.as_deref().unwrap_or_default(), pdu.sender.as_str());
    }
    if pdu.sender.server_name() != origin {
        return Err(Refusal::WrongOrigin {
            origin: origin.to_string(),
            expected: pdu.sender.server_name().to_string(),
        });
    }
    if content.contains_key("join_authorised_via_users_server") {
        return Err(Refusal::Forbidden("this server does not authorise restricted joins".to_owned()));
    }
    Ok(())
}
