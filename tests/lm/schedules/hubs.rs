//! Logs that change hands in a schedule, and servers that go away while they do: the one that gives a log, as soon as the other has
//! agreed or as soon as it has given it, or the one that is given it. Most come back. One does not, but not before another server has the
//! event by which the log was given, and what the new hub cannot give (what was before it came).

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use isthmus::lm::{Appended, Role};
use ruma::{OwnedEventId, OwnedServerName, OwnedUserId, ServerName};
use tokio::sync::oneshot;

use super::check::stay_began;
use super::links::Agreed;
use super::{PATIENCE, Schedule};

/// How long it is waited until a server may go for good.
const LONG_ENOUGH: Duration = Duration::from_secs(3);
/// How much faster servers look for what is not where they thought it, once the schedule is over.
const HASTE: u32 = 20;

/// A server that does not come back.
pub struct Gone {
    pub index: usize,
    /// What it had of each room.
    pub logs: Vec<Vec<Appended>>,
    /// The rooms that ended with it.
    pub closed: BTreeSet<usize>,
}

impl Schedule {
    pub fn is_gone(&self, name: &ServerName) -> bool {
        self.gone.as_ref().is_some_and(|gone| self.names[gone.index] == name)
    }

    /// Whether a room's log ended with the server that kept it, or nobody is left in the room.
    pub fn is_closed(&self, room: usize) -> bool {
        self.gone.as_ref().is_some_and(|gone| gone.closed.contains(&room))
    }

    pub async fn some_come_back(&mut self) {
        for index in self.away.keys().copied().collect::<Vec<_>>() {
            if !self.is_gone(&self.name(index)) && rand::Rng::gen_bool(&mut self.random, 0.2) {
                self.start(index).await;
            }
        }
    }

    pub async fn all_come_back(&mut self) {
        for index in self.away.keys().copied().collect::<Vec<_>>() {
            if !self.is_gone(&self.name(index)) {
                self.start(index).await;
            }
        }
        if self.hands_over {
            self.nodes.iter().flatten().for_each(|node| node.lm.hasten_looks(HASTE));
        }
    }

    async fn start(&mut self, index: usize) {
        self.told.push(format!("{} comes back", self.name(index)));
        let stopped = self.away.remove(&index).unwrap();
        self.nodes[index] = Some(self.world.start(stopped).await);
        self.link_up(index);
    }

    async fn stop(&mut self, index: usize) {
        self.told.push(format!("{} goes away", self.name(index)));
        let node = self.nodes[index].take().unwrap();
        self.away.insert(index, self.world.stop(node).await);
    }

    pub async fn keeps(&self, index: usize, room: usize) -> bool {
        let Some(node) = &self.nodes[index] else { return false };
        let info = node.lm.room(&self.rooms[room]).await.unwrap();
        info.is_some_and(|info| info.role == Role::Hub)
    }

    /// Who keeps a room's log, of those that run.
    pub async fn hub_of(&self, room: usize) -> Option<usize> {
        for index in 0..self.nodes.len() {
            if self.keeps(index, room).await {
                return Some(index);
            }
        }
        None
    }

    /// By which servers somebody comes into a room.
    pub async fn via(&self, room: usize) -> Vec<OwnedServerName> {
        let also = if self.hands_over { self.hub_of(room).await } else { None };
        [Some(room), also].into_iter().flatten().map(|index| self.name(index)).collect()
    }

    async fn membership(&self, at: usize, room: usize, user: &OwnedUserId) -> Option<String> {
        let event = self.node(at).lm.state_event(&self.rooms[room], "m.room.member", user.as_str()).await.unwrap();
        event.and_then(|event| event.content()["membership"].as_str().map(str::to_owned))
    }

    /// Who has the say in a room: the bot of the server that made it, or else somebody who is there. None when nobody is.
    pub async fn master(&self, room: usize) -> Option<(usize, OwnedUserId)> {
        if self.runs(room) {
            return Some((room, self.user(room, "bot")));
        }
        let all: Vec<usize> = (0..self.nodes.len()).filter(|index| self.runs(*index)).collect();
        let at = self.hub_of(room).await.unwrap_or(all[0]);
        for index in all {
            let user = self.user(index, "u0");
            if self.membership(at, room, &user).await.as_deref() == Some("join") {
                return Some((index, user));
            }
        }
        None
    }

    /// Of those who are to be in a room, those who are banned.
    pub async fn banned(&self, room: usize) -> Vec<OwnedUserId> {
        let hub = self.hub_of(room).await.unwrap_or_else(|| panic!("nobody keeps {room}: {:#?}", self.told));
        let mut banned = Vec::new();
        for user in (0..self.names.len()).map(|index| self.user(index, "u0")) {
            if self.membership(hub, room, &user).await.as_deref() == Some("ban") {
                banned.push(user);
            }
        }
        banned
    }

    /// A log goes to another server, and perhaps one of the two goes away.
    pub async fn hand_over(&mut self, room: usize) {
        let (heir, fate) = (self.pick(), rand::Rng::gen_range(&mut self.random, 0..10));
        let cuts = rand::Rng::gen_bool(&mut self.random, 0.3);
        let Some(hub) = self.hub_of(room).await.filter(|hub| *hub != heir && self.runs(heir)) else { return };
        let user = self.user(hub, if hub == room { "bot" } else { "u0" });
        let (tells, agreed) = oneshot::channel();
        self.links.when_agreed(Some(Agreed { cuts, tells }));
        let (lm, room_id, to) = (self.node(hub).lm.clone(), self.rooms[room].clone(), self.name(heir));
        let handing = tokio::spawn(async move { lm.hand_over(&room_id, &user, &to, true).await });
        let ended = async || {
            while !handing.is_finished() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        let given = async || {
            while !handing.is_finished() && self.keeps(hub, room).await {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        let waiting = async {
            match fate {
                0..4 => ended().await,
                4 => tokio::select! { _ = agreed => {}, () = ended() => {} },
                _ => given().await,
            }
        };
        tokio::time::timeout(PATIENCE, waiting).await.expect("it is given or not");
        let is_given = !self.keeps(hub, room).await;
        let result = if handing.is_finished() { Some(handing.await.unwrap()) } else { None };
        self.links.when_agreed(None);
        let [from, to] = [hub, heir].map(|index| self.name(index));
        let cuts = if cuts { ", whose link is cut" } else { "" };
        self.told.push(format!("{from} gives {room} to {to}{cuts}: {is_given} {result:?}"));
        match fate {
            4 => self.stop(hub).await,
            5 | 6 if is_given => self.stop(hub).await,
            7 if is_given => self.stop(heir).await,
            8 | 9 if is_given && self.names.len() > 2 && self.gone.is_none() => self.stop_for_good(hub).await,
            _ => {}
        }
    }

    /// A server goes away for good as soon as it may, or for a while only when it may not.
    async fn stop_for_good(&mut self, index: usize) {
        let start = Instant::now();
        while !self.may_go(index).await && start.elapsed() < LONG_ENOUGH {
            self.hurry();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if self.may_go(index).await {
            let (mut logs, mut closed) = (Vec::new(), BTreeSet::new());
            for room in 0..self.rooms.len() {
                logs.push(self.node(index).log(&self.rooms[room]).await);
                closed.extend(self.keeps(index, room).await.then_some(room));
            }
            self.told.push(format!("{} goes for good, and with it the rooms {closed:?}", self.name(index)));
            self.gone = Some(Gone { index, logs, closed });
        }
        self.stop(index).await;
    }

    /// Whether nothing is lost when a server goes for good, but for the rooms that it keeps: of each log that went on to another server
    /// the others have the event by which it did, and what was before that server came.
    async fn may_go(&self, index: usize) -> bool {
        for (room, room_id) in self.rooms.iter().enumerate() {
            let log = self.node(index).log(room_id).await;
            let change = log.iter().rposition(|event| event.event.kind == "m.room.hub");
            let Some(change) = change.filter(|_| !log.is_empty()) else { continue };
            if self.keeps(index, room).await {
                continue;
            }
            let heir = log[change].event.content()["hub_server"].as_str().unwrap();
            let heir = self.names.iter().position(|name| name == heir).unwrap();
            let Some(came) = stay_began(&log[..=change], &self.names[heir]) else { return false };
            let (mut known, all_have) = (false, log[came].event.event_id.clone());
            for other in (0..self.nodes.len()).filter(|other| *other != index) {
                if !self.runs(other) {
                    return false;
                }
                let there = self.node(other).log(room_id).await;
                let has = |id: &OwnedEventId| there.iter().any(|event| event.event.event_id == *id);
                known |= has(&log[change].event.event_id);
                if stay_began(&log, &self.names[other]).is_some() && !has(&all_have) {
                    return false;
                }
            }
            if !known {
                return false;
            }
        }
        true
    }

    /// Waits until all see one hub and one end of each log.
    pub async fn agree(&self) {
        let start = Instant::now();
        for room in (0..self.rooms.len()).filter(|room| !self.is_closed(*room)) {
            loop {
                let mut seen = Vec::new();
                for node in self.nodes.iter().flatten() {
                    let hub = match node.lm.room(&self.rooms[room]).await.unwrap().unwrap().role {
                        Role::Hub => node.name.clone(),
                        Role::Participant { hub } | Role::GraphServer { hub } => hub,
                    };
                    let log = node.log(&self.rooms[room]).await;
                    seen.push((node.name.clone(), hub, log.last().map(|last| last.event.event_id.clone())));
                }
                if seen.iter().all(|(_, hub, last)| (hub, last) == (&seen[0].1, &seen[0].2)) {
                    break;
                }
                assert!(start.elapsed() < PATIENCE, "they do not agree on {room}: {seen:#?}\n{:#?}", self.told);
                self.hurry();
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}
