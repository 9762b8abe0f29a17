//! The provider as participant: it joins rooms through their hubs and takes what the hubs send, checking all of it.

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow, ensure};
use http::Method;
use isthmus::clock::{Clock as _, SystemClock};
use isthmus::event::{HashCheck, Lpdu, Object, Pdu, Redaction};
use ruma::{OwnedRoomId, OwnedServerName, RoomId, ServerName, UserId};
use serde_json::{Value, json};

use super::network::segment;
use super::room::Room;
use super::{Inner, Invite, News, PATIENCE, ROOM_VERSION, lock, object};

impl Inner {
    /// Joins by alias or ID.
    pub(super) async fn join(&self, user: &UserId, target: &str, via: &[OwnedServerName]) -> Result<OwnedRoomId> {
        let (room_id, mut via) = match target.strip_prefix('#') {
            Some(_) => self.resolve_alias(target).await?,
            None => (OwnedRoomId::try_from(target)?, via.to_vec()),
        };
        if let Some(invite) = lock(&self.invites).get(&room_id) {
            via.insert(0, invite.hub.clone());
        }
        let own = &self.network.server_name;
        let is_there = {
            let rooms = lock(&self.rooms);
            let room = rooms.get(&room_id);
            room.is_some_and(|room| room.hub == *own || room.servers().contains(own))
        };
        if is_there {
            self.join_known(user, &room_id).await?
        } else {
            self.join_through(user, &room_id, &via).await?
        }
        lock(&self.invites).remove(&room_id);
        Ok(room_id)
    }

    async fn resolve_alias(&self, alias: &str) -> Result<(OwnedRoomId, Vec<OwnedServerName>)> {
        if let Some(room_id) = lock(&self.aliases).get(alias) {
            return Ok((room_id.clone(), Vec::new()));
        }
        let (_, server) = alias.split_once(':').context("an alias without server")?;
        let path = format!("/_matrix/federation/v1/query/directory?room_alias={}", segment(alias));
        let answer = self.network.call(<&ServerName>::try_from(server)?, Method::GET, &path, None).await?;
        let room_id = answer.get("room_id").and_then(Value::as_str).context("no room_id")?;
        let servers = answer.get("servers").and_then(Value::as_array).context("no servers")?.iter();
        let servers = servers.filter_map(Value::as_str).filter_map(|server| server.try_into().ok());
        Ok((room_id.try_into()?, servers.collect()))
    }

    /// A further user of ours in a room that we have: an ordinary event.
    async fn join_known(&self, user: &UserId, room_id: &RoomId) -> Result<()> {
        let mut news = self.news.subscribe();
        let event = json!({ "type": "m.room.member", "state_key": user, "sender": user, "room_id": room_id,
            "content": { "membership": "join" }, "origin_server_ts": SystemClock.now_ms() });
        let id = self.send(room_id, object(event))?;
        let wait = async {
            loop {
                if lock(&self.rooms).get(room_id).is_some_and(|room| room.place(&id).is_some()) {
                    return Ok(());
                }
                if let Ok(News::Refused(_, lpdu, error)) = news.recv().await
                    && lpdu == id
                {
                    return Err(anyhow!("the hub refused the join: {error}"));
                }
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.context("the hub does not say whether it takes the join")?
    }

    /// The handshake through the hub.
    async fn join_through(&self, user: &UserId, room_id: &RoomId, via: &[OwnedServerName]) -> Result<()> {
        let hub = via.first().context("no server to join through")?;
        let path = format!(
            "/_matrix/federation/v1/make_join/{}/{}?ver={ROOM_VERSION}&ver=I.1",
            segment(room_id.as_str()),
            segment(user.as_str())
        );
        let answer = self.network.call(hub, Method::GET, &path, None).await?;
        let template = answer.get("event").and_then(Value::as_object).unwrap_or(&answer);
        ensure!(template.get("type").is_some_and(|kind| kind == "m.room.member"), "the template is no membership");
        let version = answer.get("room_version").and_then(Value::as_str).unwrap_or(ROOM_VERSION);
        let mut content = json!({ "membership": "join" });
        if let (Some(name), Some(content)) = (lock(&self.names).get(user), content.as_object_mut()) {
            content.insert("displayname".to_owned(), name.clone().into());
        }
        let event = json!({ "type": "m.room.member", "state_key": user, "sender": user, "room_id": room_id,
            "content": content, "origin_server_ts": SystemClock.now_ms() });
        let lpdu = Lpdu::build(object(event), hub, &self.network.server_name, &self.network.key)?;
        let path = format!("send_join/{}", segment(lpdu.lpdu_id.as_str()));
        let answer = self.network.call_lm(hub, Method::POST, "v3", &path, Some(&lpdu.json)).await?;
        self.take_room(room_id, version, &lpdu, &answer).await
    }

    /// Takes over a room from the answer to a join, checking every event.
    async fn take_room(&self, room_id: &RoomId, version: &str, lpdu: &Lpdu, answer: &Object) -> Result<()> {
        let events = answer.get("state").and_then(Value::as_array).context("no state in the answer")?;
        let mut state = Vec::new();
        for event in events {
            let event = Pdu::parse(event.as_object().context("state that is no event")?.clone(), Redaction::Draft)?;
            ensure!(event.room_id == room_id, "state of another room");
            self.network.verify(&event).await?;
            ensure!(event.check_hashes() == HashCheck::Intact, "state with a wrong hash: {}", event.event_id);
            state.push(event);
        }
        let join = answer.get("event").and_then(Value::as_object).context("no event in the answer")?;
        let join = Pdu::parse(join.clone(), Redaction::Draft)?;
        ensure!(join.lpdu_id.as_ref() == Some(&lpdu.lpdu_id), "the hub answered with another join");
        self.network.verify(&join).await?;
        let create = state.iter().find(|event| event.kind == "m.room.create").context("a room without create event")?;
        let hub = create.sender.server_name().to_owned();
        ensure!(hub == lpdu.hub_server, "the hub is {hub}, not {}", lpdu.hub_server);

        let mut room = Room::new(room_id.to_owned(), version, hub);
        self.journal.room(room_id, version, &room.hub);
        for event in state {
            self.journal.state(room_id, &event.json);
            room.set_state(Arc::new(event));
        }
        room.check(&join.json).map_err(|problem| anyhow!(problem))?;
        let mut rooms = lock(&self.rooms);
        if let Some(before) = rooms.remove(room_id) {
            // What was seen in an earlier stay stays.
            for entry in before.log {
                room.place_at_end(entry.event, BTreeSet::new());
            }
        }
        if room.place(&join.event_id).is_none() {
            self.append(&mut room, join, None);
        }
        rooms.insert(room_id.to_owned(), room);
        Ok(())
    }

    /// Takes an event from a hub.
    pub(super) async fn take(&self, origin: &ServerName, json: Object) -> Result<()> {
        let event = Pdu::parse(json, Redaction::Draft)?;
        let room_id = event.room_id.clone();
        let (known, last) = {
            let rooms = lock(&self.rooms);
            let Some(room) = rooms.get(&room_id) else { return Ok(()) };
            ensure!(room.hub == origin, "{origin} is not the hub of {room_id}, {} is", room.hub);
            (room.place(&event.event_id).is_some(), room.log.last().map(|entry| entry.event.event_id.clone()))
        };
        if known {
            return Ok(());
        }
        if event.prev_events.first() != last.as_ref() {
            self.fill_gap(origin, &event).await;
        }
        self.take_next(event).await
    }

    async fn take_next(&self, event: Pdu) -> Result<()> {
        self.network.verify(&event).await?;
        let (event, hash) = match event.check_hashes() {
            HashCheck::Intact => (event, None),
            HashCheck::Redact(refusal) => (event.redacted(Redaction::Draft), Some(refusal.to_string())),
        };
        let mut rooms = lock(&self.rooms);
        let Some(room) = rooms.get_mut(&event.room_id) else { return Ok(()) };
        if room.place(&event.event_id).is_some() {
            return Ok(());
        }
        let last = room.log.last().map(|entry| entry.event.event_id.clone());
        let order = (event.prev_events.as_slice() != last.as_slice())
            .then(|| format!("{} follows {:?}, not {last:?}", event.event_id, event.prev_events));
        let rule = room.check(&event.json).err();
        let complaints: Vec<String> = hash.into_iter().chain(order).chain(rule).collect();
        room.complaints.extend(complaints.iter().map(|complaint| format!("{}: {complaint}", event.event_id)));
        self.append(room, event, None);
        Ok(())
    }

    /// Asks the hub for the events between the end of our log and an event that came.
    async fn fill_gap(&self, hub: &ServerName, event: &Pdu) {
        let Some(mut from) = event.prev_events.first().cloned() else { return };
        let mut missing = Vec::new();
        while missing.len() < 2000 {
            let path = format!("backfill/{}?v={}&limit=100", segment(event.room_id.as_str()), segment(from.as_str()));
            let Ok(answer) = self.network.call_lm(hub, Method::GET, "v2", &path, None).await else { return };
            let pdus = answer.get("pdus").and_then(Value::as_array).cloned().unwrap_or_default();
            let parse = |pdu: &Value| Pdu::parse(pdu.as_object()?.clone(), Redaction::Draft).ok();
            let page: Vec<Pdu> = pdus.iter().filter_map(parse).collect();
            let rooms = lock(&self.rooms);
            let Some(room) = rooms.get(&event.room_id) else { return };
            let start = page.iter().rposition(|pdu| room.place(&pdu.event_id).is_some());
            let first = page.first().and_then(|pdu| pdu.prev_events.first().cloned());
            missing.splice(0..0, page.into_iter().skip(start.map_or(0, |start| start + 1)));
            match (start, first) {
                (None, Some(first)) if room.place(&first).is_none() => from = first,
                _ => break,
            }
        }
        for event in missing {
            if let Err(error) = self.take_next(event).await {
                eprintln!("an event from the hub's history is not acceptable: {error:#}");
            }
        }
    }

    /// Signs an invite of one of our users.
    pub(super) async fn sign_invite(&self, origin: &ServerName, json: Object) -> Result<Pdu> {
        let mut event = Pdu::parse(json, Redaction::Draft)?;
        let target = event.state_key.as_deref().and_then(|target| <&UserId>::try_from(target).ok());
        let target = target.context("an invite of nobody")?.to_owned();
        ensure!(target.server_name() == self.network.server_name, "{target} is not at home here");
        self.network.verify(&event).await?;
        event.countersign(&self.network.server_name, &self.network.key);
        let invite = Invite { target: target.clone(), sender: event.sender.clone(), hub: origin.to_owned() };
        lock(&self.invites).insert(event.room_id.clone(), invite);
        let _ = self.news.send(News::Invited(event.room_id.clone(), event.sender.clone(), target));
        Ok(event)
    }

    /// Declines an invite through the hub.
    pub(super) async fn decline(&self, user: &UserId, room_id: &RoomId, hub: &ServerName) -> Result<()> {
        let path =
            format!("/_matrix/federation/v1/make_leave/{}/{}", segment(room_id.as_str()), segment(user.as_str()));
        self.network.call(hub, Method::GET, &path, None).await?;
        let event = json!({ "type": "m.room.member", "state_key": user, "sender": user, "room_id": room_id,
            "content": { "membership": "leave" }, "origin_server_ts": SystemClock.now_ms() });
        let lpdu = Lpdu::build(object(event), hub, &self.network.server_name, &self.network.key)?;
        let path = format!("send_leave/{}", segment(lpdu.lpdu_id.as_str()));
        self.network.call_lm(hub, Method::POST, "v3", &path, Some(&lpdu.json)).await?;
        Ok(())
    }
}
