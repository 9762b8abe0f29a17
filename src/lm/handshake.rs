//! Handshakes at the hub: servers that are not in a room come in, leave again, or ask to be let in.

use ruma::{EventId, RoomId, ServerName, UserId};
use serde_json::{Map, Value, json};

use super::actor::What;
use super::batch::Origin;
use super::hub::{handshake, membership};
use super::join_state::in_replay_order;
use super::names::check_user;
use super::room::{Snapshot, Subject};
use super::served::to_values;
use super::{Appended, Lm};
use crate::event::{Object, VerifiedLpdu};
use crate::refusal::Refusal;
use crate::seam::{Membership, Stage};
use crate::store::lm as stored;

/// The state that is shown to those who are not in a room.
const STRIPPED: [&str; 6] =
    ["m.room.create", "m.room.name", "m.room.avatar", "m.room.topic", "m.room.join_rules", "m.room.canonical_alias"];

impl Lm {
    /// `GET make_join`
    pub async fn make_join(
        &self,
        origin: &ServerName,
        room_id: &RoomId,
        user_id: &UserId,
        versions: &[String],
    ) -> Result<Value, Refusal> {
        supported(&self.hubbed(room_id).await?, versions)?;
        self.is_of(origin, user_id)?;
        self.invite_settled(room_id, user_id, Membership::Join).await?;
        let room = self.hubbed(room_id).await?;
        self.admits(&room.facts, origin).await?;
        let content = self.may_make(origin, &room, user_id, Membership::Join)?;
        self.between().gate(&handshake(&room, user_id, Membership::Join, Stage::Make, content.clone())).await?;
        Ok(self.template(&room, user_id, content))
    }

    /// `POST send_join`; the same LPDU again gets the same answer.
    pub async fn send_join(&self, origin: &ServerName, body: Object) -> Result<Value, Refusal> {
        let appended = self.take(origin, body, Membership::Join).await?;
        self.answer_join(&appended).await
    }

    /// The answer to a join that was taken before.
    pub async fn answer_join_again(&self, lpdu_id: &EventId) -> Result<Value, Refusal> {
        let unknown = || Refusal::NotFound(format!("the join {lpdu_id}"));
        let appended = self.event_of_lpdu(lpdu_id).await?.ok_or_else(unknown)?;
        self.answer_join(&appended).await
    }

    async fn answer_join(&self, appended: &Appended) -> Result<Value, Refusal> {
        let origin = appended.event.sender.server_name();
        self.context().large.build(origin, self.build_answer(appended)).await
    }

    async fn build_answer(&self, appended: &Appended) -> Result<Value, Refusal> {
        let room_id = &appended.event.room_id;
        let state = stored::state_before(&self.context().store, room_id, appended.position.0).await?;
        let chain = self.auth_chain(&state).await?;
        // Who keeps the log by now does not change what was taken.
        let (_, room) = self.find(room_id).await?;
        let state = self.as_read(&room, in_replay_order(&room, state, &chain)?).await?;
        let chain = self.as_read(&room, chain).await?;
        Ok(json!({
            "event": appended.event.json,
            "state": to_values(&state)?,
            "auth_chain": to_values(&chain)?,
            "origin": self.context().server_name,
            "members_omitted": false,
        }))
    }

    /// `GET make_leave`
    pub async fn make_leave(&self, origin: &ServerName, room_id: &RoomId, user_id: &UserId) -> Result<Value, Refusal> {
        self.hubbed(room_id).await?;
        self.is_of(origin, user_id)?;
        self.invite_settled(room_id, user_id, Membership::Leave).await?;
        let room = self.hubbed(room_id).await?;
        let content = self.may_make(origin, &room, user_id, Membership::Leave)?;
        Ok(self.template(&room, user_id, content))
    }

    /// `POST send_leave`
    pub async fn send_leave(&self, origin: &ServerName, body: Object) -> Result<Value, Refusal> {
        self.take(origin, body, Membership::Leave).await?;
        Ok(json!({}))
    }

    /// `GET make_knock`
    pub async fn make_knock(
        &self,
        origin: &ServerName,
        room_id: &RoomId,
        user_id: &UserId,
        versions: &[String],
    ) -> Result<Value, Refusal> {
        let room = self.hubbed(room_id).await?;
        supported(&room, versions)?;
        self.admits(&room.facts, origin).await?;
        let content = self.may_make(origin, &room, user_id, Membership::Knock)?;
        self.between().gate(&handshake(&room, user_id, Membership::Knock, Stage::Make, content.clone())).await?;
        Ok(self.template(&room, user_id, content))
    }

    /// `POST send_knock`
    pub async fn send_knock(&self, origin: &ServerName, body: Object) -> Result<Value, Refusal> {
        let appended = self.take(origin, body, Membership::Knock).await?;
        let (_, room) = self.find(&appended.event.room_id).await?;
        Ok(json!({ "stripped_state": stripped_state(&room) }))
    }

    /// Waits while an invite is on its way that a user answers: one that the user's server signs, or, in a shared room, one that a server
    /// of its graph has made.
    async fn invite_settled(&self, room_id: &RoomId, user_id: &UserId, membership: Membership) -> Result<(), Refusal> {
        let asked = &self.context().asked;
        asked.settled(room_id, user_id).await;
        let room = self.hubbed(room_id).await?;
        let current = room.membership(user_id.as_str());
        let rules = room.state_event("m.room.join_rules", "");
        let rule = rules.and_then(|event| event.content().get("join_rule")?.as_str()).unwrap_or("invite");
        if !room.facts.shared || room.has_server(user_id.server_name()) || !membership.needs_invite(current, rule) {
            return Ok(());
        }
        let (_, by_graph) = self.servers_by_part(room_id).await?;
        let cell = self.rooms().find(room_id).await?;
        if let Some(cell) = cell.filter(|_| by_graph.iter().any(|server| *server != room.facts.hub)) {
            let now = || cell.in_memory().and_then(|room| room.membership(user_id.as_str()).map(str::to_owned));
            asked.comes(&cell.changes, || now().as_deref() != current).await;
        }
        Ok(())
    }

    /// Each server changes the membership of its own users.
    fn is_of(&self, origin: &ServerName, user_id: &UserId) -> Result<(), Refusal> {
        if user_id.server_name() != origin || origin == self.context().server_name {
            let expected = user_id.server_name().to_string();
            return Err(Refusal::WrongOrigin { origin: origin.to_string(), expected });
        }
        Ok(())
    }

    /// Whether a user may change its membership; the content of the event that would do it.
    fn may_make(
        &self,
        origin: &ServerName,
        room: &Snapshot,
        user_id: &UserId,
        membership: Membership,
    ) -> Result<Object, Refusal> {
        self.is_of(origin, user_id)?;
        check_user("user ID", user_id.as_str())?;
        let content = Map::from_iter([("membership".to_owned(), json!(membership.as_str()))]);
        let subject = Subject {
            sender: user_id,
            kind: "m.room.member",
            state_key: Some(user_id.as_str()),
            content: &content,
            signed_by_hub: Some(true),
            signed_by_next_hub: false,
            has_prev_events: false,
        };
        room.judge(&subject, &room.auth_events(&subject).0)?;
        Ok(content)
    }

    /// The partial LPDU, both as the draft's make_join answers it and as peers and make_leave do.
    fn template(&self, room: &Snapshot, user_id: &UserId, content: Object) -> Value {
        let event = json!({
            "type": "m.room.member",
            "room_id": room.facts.room_id,
            "sender": user_id,
            "state_key": user_id,
            "content": content,
            "origin_server_ts": self.context().clock.now_ms(),
        });
        let mut answer = event.clone();
        if let Some(answer) = answer.as_object_mut() {
            answer.insert("event".to_owned(), event);
            answer.insert("room_version".to_owned(), json!(room.facts.version.as_str()));
        }
        answer
    }

    /// Takes the signed event of a handshake.
    async fn take(&self, origin: &ServerName, body: Object, expected: Membership) -> Result<Appended, Refusal> {
        let room_id = body.get("room_id").and_then(Value::as_str).unwrap_or_default();
        let room_id = RoomId::parse(room_id).map_err(|error| Refusal::malformed("room_id", error.to_string()))?;
        let room = self.hubbed(&room_id).await?;
        let lpdu = self.verify_one(origin, &room.facts, body).await?;
        is_what_was_made(&lpdu, expected)?;
        self.invite_settled(&room_id, &lpdu.sender, expected).await?;
        let cell = self.rooms().find(&room_id).await?.ok_or_else(|| Refusal::UnknownRoom(room_id.to_string()))?;
        if matches!(expected, Membership::Join | Membership::Knock) {
            self.pass_gate(&cell, &lpdu, expected).await?;
        }
        let from = Origin { foreign: true, answered: expected == Membership::Join, ..Origin::default() };
        let outcome = self.append(&cell, vec![(What::Lpdu(lpdu), from)]).await.pop();
        outcome.ok_or_else(|| Refusal::Internal("no outcome".to_owned()))?.into_result()
    }
}

fn supported(room: &Snapshot, versions: &[String]) -> Result<(), Refusal> {
    let version = room.facts.version.as_str();
    match versions.iter().any(|supported| supported == version) {
        true => Ok(()),
        false => Err(Refusal::IncompatibleRoomVersion(version.to_owned())),
    }
}

/// A template may come back with another membership, or for another user.
fn is_what_was_made(lpdu: &VerifiedLpdu, expected: Membership) -> Result<(), Refusal> {
    if lpdu.kind != "m.room.member" {
        return Err(Refusal::malformed("type", format!("{:?}, not m.room.member", lpdu.kind)));
    }
    if membership(lpdu) != Some(expected) {
        let found = lpdu.json.get("content").and_then(|content| content.get("membership"));
        let found = found.map_or_else(|| "missing".to_owned(), ToString::to_string);
        return Err(Refusal::malformed("membership", format!("{found}, not {:?}", expected.as_str())));
    }
    if lpdu.state_key.as_deref() != Some(lpdu.sender.as_str()) {
        let found = lpdu.state_key.as_deref().map_or_else(|| "missing".to_owned(), |key| format!("{key:?}"));
        return Err(Refusal::malformed("state_key", format!("{found}, not {:?}", lpdu.sender.as_str())));
    }
    Ok(())
}

/// What those see of a room who are not in it.
pub(super) fn stripped_state(room: &Snapshot) -> Vec<Value> {
    STRIPPED
        .iter()
        .filter_map(|kind| room.state_event(kind, ""))
        .map(|event| {
            json!({
                "type": event.kind,
                "sender": event.sender,
                "state_key": event.state_key,
                "content": event.content(),
            })
        })
        .collect()
}
