//! The provider as hub: it makes rooms, finishes its participants' LPDUs, and answers their handshakes.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use isthmus::clock::{Clock as _, SystemClock};
use isthmus::event::{Completion, Lpdu, Object, Pdu, Redaction, VerifiedLpdu};
use ruma::{OwnedEventId, OwnedRoomId, RoomId, ServerName, UserId};
use serde_json::{Value, json};

use super::network::segment;
use super::room::Room;
use super::{Inner, NewRoom, News, ROOM_VERSION, lock, object};

impl Inner {
    pub(super) fn create_room(&self, creator: &UserId, room: NewRoom) -> Result<OwnedRoomId> {
        let own = &self.network.server_name;
        let opaque: [u8; 12] = rand::random();
        let opaque = data_encoding::BASE32_NOPAD.encode(&opaque).to_lowercase();
        let room_id = OwnedRoomId::try_from(format!("!{opaque}:{own}"))?;
        let join_rule = room.join_rule.as_deref().unwrap_or("public");
        let mut levels = object(json!({ "users": { creator.as_str(): 100 } }));
        levels.extend(room.power_levels);
        let mut create = json!({ "room_version": ROOM_VERSION });
        if let Some(encryption) = room.encryption {
            create["encryption"] = encryption;
        }
        let mut events = vec![
            ("m.room.create", "", create),
            ("m.room.member", creator.as_str(), json!({ "membership": "join" })),
            ("m.room.power_levels", "", Value::Object(levels)),
            ("m.room.join_rules", "", json!({ "join_rule": join_rule })),
            ("m.room.history_visibility", "", json!({ "history_visibility": "shared" })),
        ];
        if let Some(name) = &room.name {
            events.push(("m.room.name", "", json!({ "name": name })));
        }
        self.journal.room(&room_id, ROOM_VERSION, own);
        lock(&self.rooms).insert(room_id.clone(), Room::new(room_id.clone(), ROOM_VERSION, own.clone()));
        for (kind, state_key, content) in events {
            let event = json!({ "type": kind, "state_key": state_key, "room_id": room_id, "sender": creator,
                "content": content, "origin_server_ts": SystemClock.now_ms() });
            self.send(&room_id, object(event))?;
        }
        if let Some(alias) = &room.alias {
            let alias = format!("#{alias}:{own}");
            self.journal.alias(&alias, &room_id);
            lock(&self.aliases).insert(alias, room_id.clone());
        }
        Ok(room_id)
    }

    /// Sends an event of a local user: appends it as hub, else queues its LPDU for the hub.
    pub(super) fn send(&self, room_id: &RoomId, mut event: Object) -> Result<OwnedEventId> {
        self.add_display_name(&mut event);
        let mut rooms = lock(&self.rooms);
        let room = rooms.get_mut(room_id).with_context(|| format!("{room_id} is not known"))?;
        if room.hub != self.network.server_name {
            let lpdu = Lpdu::build(event, &room.hub, &self.network.server_name, &self.network.key)?;
            let (id, hub) = (lpdu.lpdu_id.clone(), room.hub.clone());
            self.journal.pending(room_id, &lpdu.json);
            room.pending.push_back(lpdu);
            drop(rooms);
            self.wake(&hub);
            return Ok(id);
        }
        let event = room.build(event, &self.network.key)?;
        let event = self.append(room, event, None);
        let servers: Vec<_> = room.cursors.keys().cloned().collect();
        drop(rooms);
        if self.eigen {
            self.hand_round_later(&event);
        }
        servers.iter().for_each(|server| self.wake(server));
        Ok(event.event_id.clone())
    }

    /// A local user's membership `join` carries the display name.
    fn add_display_name(&self, event: &mut Object) {
        let names = lock(&self.names);
        let sender = event.get("sender").and_then(Value::as_str).and_then(|sender| <&UserId>::try_from(sender).ok());
        let name = sender.and_then(|sender| names.get(sender)).cloned();
        let content = event.get_mut("content").and_then(Value::as_object_mut);
        if let (Some(name), Some(content)) = (name, content)
            && content.get("membership").is_some_and(|membership| membership == "join")
        {
            content.entry("displayname").or_insert(name.into());
        }
    }

    /// Puts an event at the end of the log and into the journal, and tells.
    pub(super) fn append(&self, room: &mut Room, event: Pdu, not_to: Option<&ServerName>) -> Arc<Pdu> {
        let event = room.push(event, &self.network.server_name, not_to);
        if let Some(entry) = room.log.last() {
            self.journal.event(&room.id, &event.json, &entry.to);
        }
        let _ = self.news.send(News::Event(room.id.clone(), event.clone()));
        event
    }

    /// Checks what a participant sent: its form, its origin, its hash and its signature.
    pub(super) async fn verified_lpdu(&self, origin: &ServerName, json: Object) -> Result<VerifiedLpdu> {
        let lpdu = Lpdu::parse(json)?;
        let server = lpdu.sender.server_name();
        ensure!(server == origin, "{origin} sent an LPDU of {server}");
        ensure!(lpdu.hub_server == self.network.server_name, "the hub is {}", lpdu.hub_server);
        let keys = self.network.keys_for(&lpdu.json, &[server.to_owned()]).await?;
        Ok(lpdu.verify(&keys)?)
    }

    /// Finishes and appends a participant's LPDU. The same LPDU again is the same event again.
    pub(super) fn finish(&self, lpdu: VerifiedLpdu, not_to: Option<&ServerName>) -> Result<Arc<Pdu>> {
        let mut rooms = lock(&self.rooms);
        let room = rooms.get_mut(&lpdu.room_id).ok_or_else(|| anyhow!("{} is not known", lpdu.room_id))?;
        ensure!(room.hub == self.network.server_name, "{} is the hub of this room", room.hub);
        if let Some(known) = room.find(&lpdu.lpdu_id).filter(|_| !self.eigen) {
            return Ok(known);
        }
        let event = room.complete(lpdu, &self.network.key).map_err(|problem| anyhow!(problem))?;
        let event = self.append(room, event, not_to);
        let servers: Vec<_> = room.cursors.keys().cloned().collect();
        drop(rooms);
        servers.iter().for_each(|server| self.wake(server));
        Ok(event)
    }

    /// The template for a change of membership, when the rules would allow it.
    pub(super) fn template(&self, room_id: &RoomId, user: &UserId, membership: &str) -> Result<(Object, String)> {
        let mut event = object(json!({ "type": "m.room.member", "state_key": user, "sender": user, "room_id": room_id,
            "content": { "membership": membership }, "hub_server": self.network.server_name,
            "origin_server_ts": SystemClock.now_ms() }));
        let rooms = lock(&self.rooms);
        let room = rooms.get(room_id).ok_or_else(|| anyhow!("{room_id} is not known"))?;
        room.check(&event).map_err(|problem| anyhow!(problem))?;
        if self.eigen {
            let Completion { auth_events, prev_event } = room.completion(&event);
            event.insert("auth_events".to_owned(), json!(auth_events));
            event.insert("prev_events".to_owned(), json!(Vec::from_iter(prev_event)));
        }
        Ok((event, room.version.clone()))
    }

    /// Invites a user. A server that is not in the room yet signs the invite first.
    pub(super) async fn invite(&self, sender: &UserId, room_id: &RoomId, target: &UserId) -> Result<()> {
        let event = object(json!({ "type": "m.room.member", "state_key": target, "sender": sender, "room_id": room_id,
            "content": { "membership": "invite" }, "origin_server_ts": SystemClock.now_ms() }));
        let (hub, is_there) = {
            let rooms = lock(&self.rooms);
            let room = rooms.get(room_id).with_context(|| format!("{room_id} is not known"))?;
            (room.hub.clone(), room.servers().contains(target.server_name()))
        };
        if is_there || target.server_name() == self.network.server_name {
            return self.send(room_id, event).map(drop);
        }
        if hub == self.network.server_name {
            return self
                .invite_as_hub(room_id, target, |room| room.build(event.clone(), &self.network.key))
                .await
                .map(drop);
        }
        let lpdu = Lpdu::build(event, &hub, &self.network.server_name, &self.network.key)?;
        let body = object(json!({ "event": lpdu.json, "room_version": ROOM_VERSION }));
        let path = format!("invite/{}", segment(lpdu.lpdu_id.as_str()));
        self.network.call_lm(&hub, http::Method::POST, "v3", &path, Some(&body)).await?;
        Ok(())
    }

    /// The invite of a user whose server has to sign it, which is built anew when the log has moved on meanwhile.
    pub(super) async fn invite_as_hub(
        &self,
        room_id: &RoomId,
        target: &UserId,
        build: impl Fn(&Room) -> Result<Pdu>,
    ) -> Result<Arc<Pdu>> {
        for _ in 0..3 {
            let (event, stripped, version) = {
                let rooms = lock(&self.rooms);
                let room = rooms.get(room_id).with_context(|| format!("{room_id} is not known"))?;
                (build(room)?, stripped_state(room), room.version.clone())
            };
            let body = json!({ "event": event.json, "room_version": version, "invite_room_state": stripped });
            let path = format!("invite/{}", segment(event.event_id.as_str()));
            let to = target.server_name();
            let answer = self.network.call_lm(to, http::Method::POST, "v3", &path, Some(&object(body))).await?;
            let signed = answer.get("pdu").or_else(|| answer.get("event")).and_then(Value::as_object);
            let signed =
                Pdu::parse(signed.context("the invited server's answer holds no event")?.clone(), Redaction::Draft)?;
            ensure!(signed.event_id == event.event_id, "{to} answered with another event");
            let keys = self.network.keys_for(&signed.json, &[to.to_owned()]).await?;
            isthmus::event::verify_object(
                &isthmus::event::redact(&signed.json, Redaction::Draft),
                to.as_str(),
                keys.get(to).unwrap_or(&BTreeMap::new()),
            )?;
            let mut rooms = lock(&self.rooms);
            let room = rooms.get_mut(room_id).with_context(|| format!("{room_id} is not known"))?;
            if room.completion(&signed.json).prev_event.as_ref() == signed.prev_events.first() {
                let event = self.append(room, signed, None);
                let servers: Vec<_> = room.cursors.keys().cloned().collect();
                drop(rooms);
                servers.iter().for_each(|server| self.wake(server));
                return Ok(event);
            }
        }
        bail!("the log moved on three times while {target} was invited")
    }
}

/// What an invited server is told of a room.
fn stripped_state(room: &Room) -> Vec<Value> {
    let shown =
        ["m.room.create", "m.room.name", "m.room.avatar", "m.room.topic", "m.room.join_rules", "m.room.encryption"];
    let events = shown.iter().filter_map(|kind| room.state.get(&((*kind).to_owned(), String::new())));
    events
        .map(|event| json!({ "type": event.kind, "state_key": "", "sender": event.sender, "content": event.content() }))
        .collect()
}
