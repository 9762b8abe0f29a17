//! What is on its way to other servers: a task a server, one transaction in flight, sent again until it is answered.

use std::sync::Arc;
use std::time::Duration;

use http::Method;
use isthmus::clock::{Clock as _, SystemClock};
use isthmus::event::Object;
use ruma::{OwnedEventId, OwnedRoomId, OwnedServerName, ServerName};
use serde_json::{Value, json};
use tokio::sync::Notify;

use super::{Inner, News, lock};

/// How many events a transaction holds at most.
const BATCH: usize = 50;

/// What a transaction brings, and what is to be noted when it is answered.
#[derive(Default)]
struct Batch {
    pdus: Vec<Object>,
    /// As hub: up to where the server then has each room.
    cursors: Vec<(OwnedRoomId, usize)>,
    /// As participant: the LPDUs in it.
    lpdus: Vec<(OwnedRoomId, OwnedEventId)>,
}

impl Inner {
    /// There may be something for this server.
    pub(super) fn wake(&self, server: &ServerName) {
        if self.eigen {
            return;
        }
        let mut outboxes = lock(&self.outboxes);
        if let Some(notify) = outboxes.get(server) {
            notify.notify_one();
            return;
        }
        let Some(me) = self.me.upgrade() else { return };
        let notify = Arc::new(Notify::new());
        outboxes.insert(server.to_owned(), notify.clone());
        let task = self.runtime.spawn(run(me, server.to_owned(), notify));
        lock(&self.tasks).push(task);
    }

    /// After a restart everybody may lack something.
    pub(super) fn wake_everybody(&self) {
        let servers: Vec<OwnedServerName> = {
            let rooms = lock(&self.rooms);
            rooms.values().flat_map(|room| room.cursors.keys().chain([&room.hub])).cloned().collect()
        };
        servers.iter().filter(|server| **server != self.network.server_name).for_each(|server| self.wake(server));
    }

    fn batch(&self, server: &ServerName) -> Batch {
        let mut batch = Batch::default();
        for room in lock(&self.rooms).values() {
            if room.hub == server {
                let space = BATCH.saturating_sub(batch.pdus.len());
                for lpdu in room.pending.iter().take(space) {
                    batch.pdus.push(lpdu.json.clone());
                    batch.lpdus.push((room.id.clone(), lpdu.lpdu_id.clone()));
                }
            }
            let Some(cursor) = room.cursors.get(server).copied() else { continue };
            let mut reached = cursor;
            for entry in room.log.iter().skip(cursor) {
                if entry.to.contains(server) {
                    if batch.pdus.len() == BATCH {
                        break;
                    }
                    batch.pdus.push(entry.event.json.clone());
                }
                reached += 1;
            }
            if reached > cursor {
                batch.cursors.push((room.id.clone(), reached));
            }
        }
        batch
    }

    fn answered(&self, server: &ServerName, batch: Batch, answer: &Object) {
        let mut rooms = lock(&self.rooms);
        for (room_id, place) in batch.cursors {
            if let Some(room) = rooms.get_mut(&room_id) {
                room.cursors.insert(server.to_owned(), place);
                self.journal.cursor(&room_id, server, place);
            }
        }
        for (room_id, lpdu_id) in batch.lpdus {
            if let Some(room) = rooms.get_mut(&room_id) {
                room.pending.retain(|lpdu| lpdu.lpdu_id != lpdu_id);
                self.journal.answered(&room_id, &lpdu_id);
            }
            let failed = answer.get("failed_pdus").and_then(|failed| failed.get(lpdu_id.as_str()));
            if let Some(failed) = failed {
                let error = failed.get("error").and_then(Value::as_str).unwrap_or_default().to_owned();
                let _ = self.news.send(News::Refused(room_id, lpdu_id, error));
            }
        }
    }
}

async fn run(inner: Arc<Inner>, server: OwnedServerName, notify: Arc<Notify>) {
    let start = SystemClock.now_ms();
    for number in 0_u64.. {
        let mut batch = inner.batch(&server);
        while batch.pdus.is_empty() {
            inner.answered(&server, batch, &Object::new());
            notify.notified().await;
            batch = inner.batch(&server);
        }
        let body = super::object(json!({ "pdus": batch.pdus, "edus": [] }));
        let path = format!("send/{start}-{number}");
        let mut pause = Duration::from_millis(50);
        let answer = loop {
            match inner.network.call_lm(&server, Method::PUT, "v2", &path, Some(&body)).await {
                Ok(answer) => break answer,
                Err(_) => tokio::time::sleep(pause).await,
            }
            pause = (pause * 2).min(Duration::from_secs(1));
        };
        inner.answered(&server, batch, &answer);
    }
}
