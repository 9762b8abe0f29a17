//! What follows when a log has another hub: the queues end and begin where it was handed over, in the transaction of the event
//! that does it; and what our users had sent to the hub before, and what that did not take, goes to the new one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use ruma::{EventId, OwnedEventId, OwnedServerName, OwnedUserId, RoomId, ServerName, UserId};
use serde::Deserialize;
use serde_json::Value;

use super::lpdus::is_for;
use super::rooms::{RoomCell, lock};
use super::{Lm, Role, Sent};
use crate::admin::metrics;
use crate::event::Object;
use crate::federation::{Feed, FeedKind, OutboundQueues};
use crate::refusal::Refusal;
use crate::seam::{Draft, EventEffect, Outgoing, write_effects};
use crate::store::lm::{self as stored, LpduRow};
use crate::store::{StoreError, Tx};

/// How many LPDUs are looked at together.
const AT_ONCE: i64 = 200;
/// When those that could not be replaced are tried again: ever later, at last so often.
const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(60);

/// A log that has another hub from the last event of a batch on.
#[derive(Debug, Clone)]
pub(super) struct Succession {
    /// The hub before.
    pub from: OwnedServerName,
    /// The hub after.
    pub to: OwnedServerName,
    /// The other servers in the room.
    pub participants: Vec<OwnedServerName>,
}

impl Succession {
    /// What is written with the event that hands the log over, which is at `head`, after it was appended.
    pub async fn write(&self, tx: &mut Tx, log: &Feed, own: &ServerName, head: i64) -> Result<(), StoreError> {
        stored::set_hub(tx, &log.room_id, &self.to).await?;
        let lpdus = Feed { kind: FeedKind::Lpdus, room_id: log.room_id.clone() };
        OutboundQueues::end_at_head(tx, &self.from, &lpdus).await?;
        if self.from == *own {
            // This event is the last that we give them.
            for server in &self.participants {
                OutboundQueues::end(tx, server, log, head).await?;
            }
        }
        if self.to == *own { self.begin(tx, log, own, head).await } else { Ok(()) }
    }

    /// We give the log to all others, beginning with this event: the hub before may not get so far as to give it to them.
    async fn begin(&self, tx: &mut Tx, log: &Feed, own: &ServerName, head: i64) -> Result<(), StoreError> {
        // As a participant we kept no book of who was there when; the log says it.
        stored::forget_servers(tx, &log.room_id).await?;
        let mut stays = Stays::default();
        stored::member_events(tx, &log.room_id, |position, json| stays.follow(position, json)).await?;
        for (server, since, until) in stays.into_all().into_iter().filter(|(server, ..)| server != own) {
            stored::server_joined(tx, &log.room_id, &server, since).await?;
            if let Some(until) = until {
                stored::server_left(tx, &log.room_id, &server, until).await?;
            }
        }
        for server in &self.participants {
            OutboundQueues::subscribe(tx, server, log, head.saturating_sub(1)).await?;
        }
        OutboundQueues::advance(tx, log, head).await
    }
}

#[derive(Deserialize)]
struct Membership {
    state_key: String,
    content: Value,
}

/// When servers had somebody in a room, as the member events of its log tell it, one after the other and in their order.
#[derive(Debug, Default)]
pub(super) struct Stays {
    /// Of the servers that are there: after which position they came, and who of theirs is.
    joined: BTreeMap<OwnedServerName, (i64, BTreeSet<OwnedUserId>)>,
    /// Of those that are not any more.
    ended: Vec<(OwnedServerName, i64, Option<i64>)>,
}

impl Stays {
    /// Takes the next member event.
    pub fn follow(&mut self, position: i64, json: &[u8]) {
        let Ok(member) = serde_json::from_slice::<Membership>(json) else { return };
        let Ok(user) = UserId::parse(&member.state_key) else { return };
        let server = user.server_name().to_owned();
        if member.content.get("membership").and_then(Value::as_str) == Some("join") {
            let (_, users) = self.joined.entry(server).or_insert_with(|| (position.saturating_sub(1), BTreeSet::new()));
            users.insert(user);
        } else if let Some((since, users)) = self.joined.get_mut(&server)
            && users.remove(&user)
            && users.is_empty()
        {
            self.ended.push((server.clone(), *since, Some(position)));
            self.joined.remove(&server);
        }
    }

    /// After which position a server came that is there, or was there last.
    pub fn since(&self, server: &ServerName) -> Option<i64> {
        let ended = || self.ended.iter().rfind(|(name, ..)| name == server).map(|(_, since, _)| *since);
        self.joined.get(server).map(|(since, _)| *since).or_else(ended)
    }

    /// All: after which position, and up to which.
    pub fn into_all(self) -> Vec<(OwnedServerName, i64, Option<i64>)> {
        let Self { joined, ended: mut all } = self;
        all.extend(joined.into_iter().map(|(server, (since, _))| (server, since, None)));
        all
    }
}

impl Lm {
    /// After the commit.
    pub(super) fn succeeded(&self, cell: &Arc<RoomCell>, succession: &Succession) {
        let Succession { from, to, .. } = succession;
        let own = &self.context().server_name;
        tracing::info!(room = %cell.room_id, %from, %to, "another server keeps the log now");
        metrics::hub_transfer(match (from == own, to == own) {
            (true, _) => "given",
            (_, true) => "taken",
            _ => "seen",
        });
        let lpdus = Feed { kind: FeedKind::Lpdus, room_id: cell.room_id.clone() };
        self.context().outbound.wake(&lpdus, std::slice::from_ref(from));
        self.between().hub_changed(&cell.room_id, to);
        self.replace_in_background(cell);
    }

    /// Goes on replacing what waits for hubs of before, after a restart.
    pub(super) async fn resume_stranded(&self) -> Result<(), Refusal> {
        for room_id in stored::rooms_with_lpdus(&self.context().store).await? {
            let Some(cell) = self.rooms().find(&room_id).await? else { continue };
            cell.snapshot(&self.context().store).await?;
            self.replace_in_background(&cell);
        }
        Ok(())
    }

    /// Sees to it that LPDUs for a hub of before are replaced as soon as that can be.
    pub(super) fn replace_in_background(&self, cell: &Arc<RoomCell>) {
        if !cell.has_stranded() {
            return;
        }
        let (lm, cell) = (self.clone(), cell.clone());
        tokio::spawn(async move {
            let mut pause = FIRST;
            loop {
                if let Err(refusal) = lm.replace_stranded(&cell).await {
                    tracing::info!(room = %cell.room_id, %refusal, "LPDUs still wait for a hub of before");
                }
                if !cell.has_stranded() || lm.context().store.reader().is_closed() {
                    return;
                }
                tokio::time::sleep(pause).await;
                pause = pause.saturating_mul(2).min(LONGEST);
            }
        });
    }

    /// What our users sent to a hub of before, and what is not in its log, goes to the hub of now. Its log ended with the event
    /// that handed it over, and what is before that is here: so nothing is sent twice (INV-5). Where some of that is still
    /// missing that may be ours, nothing is done, and what is queued for the hub of now waits too.
    pub(super) async fn replace_stranded(&self, cell: &Arc<RoomCell>) -> Result<(), Refusal> {
        if !cell.has_stranded() {
            return Ok(());
        }
        let _one_at_a_time = cell.replacing.lock().await;
        if !cell.has_stranded() {
            return Ok(());
        }
        let stranded = cell.stranded();
        let room = cell.snapshot(&self.context().store).await?;
        // Who keeps the log has all that is before it.
        let may_lack = self.role(&room) != Role::Hub && self.may_lack_ours(cell).await?;
        if may_lack && self.any_for_others(&cell.room_id, &room.facts.hub).await? {
            return Ok(());
        }
        self.replace_all(cell, &room.facts.hub).await?;
        cell.replaced(stranded);
        self.send_on(&cell.room_id, &room.facts.hub);
        Ok(())
    }

    /// Whether anything of ours still waits for a server that is not the hub any more. Where nothing does nothing has to wait behind it.
    async fn any_for_others(&self, room_id: &RoomId, hub: &ServerName) -> Result<bool, Refusal> {
        let mut after = 0;
        loop {
            let rows = stored::lpdus_after(&self.context().store, room_id, after, AT_ONCE).await?;
            let Some(last) = rows.last() else { return Ok(false) };
            after = last.position;
            if rows.iter().any(|row| !is_for(hub, &row.json)) {
                return Ok(true);
            }
        }
    }

    async fn replace_all(&self, cell: &Arc<RoomCell>, hub: &ServerName) -> Result<(), Refusal> {
        let store = &self.context().store;
        let feed = Feed { kind: FeedKind::Lpdus, room_id: cell.room_id.clone() };
        // What may be on its way to the hub of now stays as it is.
        let may_move = !self.context().outbound.is_on_its_way(hub, &feed).await?;
        // What replaces them comes after this.
        let end = store.next_id();
        let (mut after, mut any) = (0, false);
        loop {
            let mut rows = stored::lpdus_after(store, &cell.room_id, after, AT_ONCE).await?;
            rows.retain(|row| row.position < end);
            let Some(last) = rows.last() else { return Ok(()) };
            after = last.position;
            let mut stranded = Vec::with_capacity(rows.len());
            for row in rows {
                let lpdu: Object =
                    serde_json::from_slice(&row.json).map_err(|error| StoreError::corrupt("LPDU", error))?;
                let is_stranded = hub_of_lpdu(&lpdu) != Some(hub.as_str());
                any |= is_stranded;
                // What is behind those goes behind what replaces them.
                if is_stranded || (any && may_move) {
                    stranded.push((row, lpdu));
                }
            }
            self.replace(cell, stranded).await?;
        }
    }

    async fn replace(&self, cell: &Arc<RoomCell>, stranded: Vec<(LpduRow, Object)>) -> Result<(), Refusal> {
        let store = &self.context().store;
        let ids: Vec<&EventId> = stranded.iter().map(|(row, _)| &*row.lpdu_id).collect();
        let there = stored::positions_of_lpdus(store, &ids).await?;
        let room = cell.snapshot(store).await?;
        let is_hub = self.role(&room) == Role::Hub;
        let (mut old, mut events) = (Vec::new(), Vec::new());
        for (row, lpdu) in stranded {
            let draft = draft_of(lpdu).filter(|_| !there.contains_key(&row.lpdu_id));
            let Some(draft) = draft else {
                self.withdraw(cell, &row).await?;
                continue;
            };
            let effect = self.replacing(cell, &row, !is_hub);
            events.push(Outgoing { draft, effect: Some(effect) });
            old.push(row);
        }
        if events.is_empty() {
            return Ok(());
        }
        tracing::info!(room = %cell.room_id, hub = %room.facts.hub, events = events.len(), "what the hub of before did not take goes to this one");
        let sent = match is_hub {
            true => self.send_as_hub(cell, events).await,
            false => self.send_as_participant(cell, room, events).await,
        };
        for (row, sent) in old.into_iter().zip(sent) {
            match sent {
                Ok(Sent::Appended(appended)) => cell.settle(&row.lpdu_id, &Ok(appended)),
                Ok(Sent::Queued { lpdu_id }) => self.renamed(cell, &row.lpdu_id, &lpdu_id),
                Err(refusal) if refusal.is_transient() => return Err(refusal),
                Err(refusal) => {
                    let why = refusal.to_string();
                    cell.settle(&row.lpdu_id, &Err(refusal));
                    self.between().lpdu_refused(&cell.room_id, &row.lpdu_id, &why).await?;
                    self.withdraw(cell, &row).await?;
                }
            }
        }
        Ok(())
    }

    fn renamed(&self, cell: &RoomCell, old: &OwnedEventId, new: &OwnedEventId) {
        if old != new {
            cell.wait_for_another(old, new);
            lock(&cell.ahead).settle(old);
        }
    }

    /// What is written with what replaces an LPDU: that is taken out, or it was replaced already.
    fn replacing(&self, cell: &RoomCell, row: &LpduRow, by_lpdu: bool) -> EventEffect {
        let (room_id, position) = (cell.room_id.clone(), row.position);
        let across = self.between().lpdu_replaced(&row.lpdu_id, by_lpdu);
        EventEffect::new(move |tx, event_id| {
            Box::pin(async move {
                if !stored::withdraw_lpdu(tx, &room_id, position).await? {
                    return Err(StoreError::Withdrawn("an LPDU that was to be replaced is gone"));
                }
                match across {
                    Some(across) => write_effects(tx, &[(across, event_id)]).await,
                    None => Ok(()),
                }
            })
        })
    }

    async fn withdraw(&self, cell: &RoomCell, row: &LpduRow) -> Result<(), Refusal> {
        let (room_id, position) = (cell.room_id.clone(), row.position);
        let job = self
            .context()
            .store
            .write(move |tx| Box::pin(async move { stored::withdraw_lpdu(tx, &room_id, position).await }));
        job.await?;
        Ok(())
    }
}

/// For which hub an LPDU is.
pub(super) fn hub_of_lpdu(lpdu: &Object) -> Option<&str> {
    lpdu.get("hub_server").and_then(Value::as_str)
}

/// What one of our users said, of an LPDU that was made of it.
fn draft_of(mut lpdu: Object) -> Option<Draft> {
    let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
    let Some(Value::Object(content)) = lpdu.remove("content") else { return None };
    Some(Draft {
        sender: text(lpdu.get("sender"))?.try_into().ok()?,
        kind: text(lpdu.get("type"))?,
        state_key: text(lpdu.get("state_key")),
        content,
        origin_server_ts: lpdu.get("origin_server_ts")?.as_i64()?,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_log_says_when_a_server_was_there() {
        let members = [
            (1, "@a:one.example", "join"),
            (3, "@b:two.example", "invite"),
            (4, "@b:two.example", "join"),
            (5, "@c:two.example", "join"),
            (6, "@b:two.example", "leave"),
            (7, "@b:two.example", "leave"),
            (8, "@c:two.example", "ban"),
            (12, "@b:two.example", "join"),
            (13, "@b:two.example", "join"),
            (14, "@d:four.example", "join"),
            (15, "@d:four.example", "leave"),
        ];
        let mut stays = Stays::default();
        for (position, user, membership) in members {
            let json = json!({ "state_key": user, "content": { "membership": membership } }).to_string();
            stays.follow(position, json.as_bytes());
        }
        let since = |server: &str| stays.since(server.try_into().unwrap());
        let since = ["one.example", "two.example", "three.example", "four.example"].map(since);
        assert_eq!(since, [Some(0), Some(11), None, Some(13)]);
        let name = |name: &str| OwnedServerName::try_from(name).unwrap();
        let ended = [(name("two.example"), 3, Some(8)), (name("four.example"), 13, Some(15))];
        let expected = [ended.to_vec(), vec![(name("one.example"), 0, None), (name("two.example"), 11, None)]].concat();
        assert_eq!(stays.into_all(), expected);
    }

    #[test]
    fn what_a_user_said_is_read_from_the_lpdu_that_was_made_of_it() {
        let lpdu = json!({ "type": "m.room.topic", "state_key": "", "sender": "@a:g.example", "content": { "topic": "x" },
            "origin_server_ts": 7, "hub_server": "hub.example", "hashes": {}, "signatures": {} });
        let lpdu = lpdu.as_object().unwrap();
        assert_eq!(hub_of_lpdu(lpdu), Some("hub.example"));
        let draft = draft_of(lpdu.clone()).unwrap();
        assert_eq!(
            (draft.kind.as_str(), draft.state_key.as_deref(), draft.origin_server_ts),
            ("m.room.topic", Some(""), 7)
        );
        assert_eq!(draft.content["topic"], "x");
        assert!(draft_of(Object::new()).is_none());
    }
}
