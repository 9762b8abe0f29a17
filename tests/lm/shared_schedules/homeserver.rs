//! The homeserver of the test: it takes part in the room's graph, builds on what it has seen, however old that is, and so makes
//! forks of which each branch has state of its own.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use axum::extract::Request;
use isthmus::event::RoomVersion;
use isthmus::seam::Draft;
use ruma::{OwnedEventId, OwnedUserId, RoomId};
use serde_json::{Value, json};

use crate::dag::peer::{Peer, View, id_of};
use crate::lm::schedules::Links;
use crate::lm::shared::unrecognized;
use crate::lm::world::{Node, raw};

pub struct Homeserver {
    pub peer: Peer,
    /// The room as this server sees it.
    pub view: View,
    /// What it was sent.
    pub got: Arc<Mutex<HashSet<OwnedEventId>>>,
    /// What it has to send, to the servers of these numbers, in order.
    pub waiting: Vec<(usize, Value)>,
    /// What of it the first server, the hub, has said that it took.
    pub taken: HashSet<OwnedEventId>,
}

impl Homeserver {
    /// It joins a room.
    pub async fn enter(peer: Peer, links: &Arc<Links>, hub: &Node, room: &RoomId) -> Self {
        let got: Arc<Mutex<HashSet<OwnedEventId>>> = Arc::default();
        let (links, memory, kept, name) = (links.clone(), peer.memory.clone(), got.clone(), peer.name.to_string());
        *peer.front.lock().unwrap() = Some(Arc::new(move |request: Request, next| {
            let (links, memory, kept, name) = (links.clone(), memory.clone(), kept.clone(), name.clone());
            Box::pin(async move {
                if request.uri().path().contains("/invite/") && !request.uri().path().contains("/v2/invite/") {
                    // It knows Matrix' endpoints alone.
                    return unrecognized();
                }
                if !request.uri().path().contains("/send/") {
                    return links.pass(&name, request, next).await;
                }
                let (parts, body) = request.into_parts();
                let body = axum::body::to_bytes(body, 1 << 24).await.unwrap();
                let response = links.pass(&name, Request::from_parts(parts, body.clone().into()), next).await;
                if response.status().is_success() {
                    let body: Value = serde_json::from_slice(&body).unwrap();
                    for event in body["pdus"].as_array().into_iter().flatten().filter_map(Value::as_object) {
                        let id = id_of(RoomVersion::Lm02, event);
                        memory.events.lock().unwrap().insert(id.clone(), event.clone());
                        kept.lock().unwrap().insert(id);
                    }
                }
                response
            })
        }));
        peer.signs_invites(RoomVersion::Lm02);
        let view = peer.join_at(&hub.dag, room, &peer.user("u0")).await.unwrap();
        Self { peer, view, got, waiting: Vec::new(), taken: HashSet::new() }
    }

    pub fn user(&self, localpart: &str) -> OwnedUserId {
        self.peer.user(localpart)
    }

    /// From now on it builds on what a server has that it can reach.
    pub async fn look(&mut self, node: &Node, room: &RoomId) {
        let Some(row) = isthmus::store::dag::room(&node.context.store, room).await.unwrap() else { return };
        let state = node.dag.state(room).await.unwrap();
        self.view.state = state.iter().map(|(key, event)| (key.clone(), event.event_id.clone())).collect();
        self.view.tips = row.tips;
        for appended in node.log(room).await {
            self.peer.keep(&appended.event.event_id, &appended.event.json);
        }
    }

    /// An event on what it sees, which goes to these servers; where there are none nobody ever gets it.
    pub fn send(&mut self, draft: &Draft, to: &[usize]) -> OwnedEventId {
        let content = Value::Object(draft.content.clone());
        let mut event = self.view.next(&draft.sender, &draft.kind, draft.state_key.as_deref(), content);
        event["origin_server_ts"] = json!(draft.origin_server_ts);
        let (id, event) = self.peer.sign(RoomVersion::Lm02, event);
        self.peer.keep(&id, &event);
        let before = self.view.state.values().cloned().collect();
        self.peer.memory.states.lock().unwrap().insert(id.clone(), before);
        self.view.note(id.clone(), &event);
        if to.is_empty() {
            self.peer.memory.hidden.lock().unwrap().insert(id.clone());
        }
        self.waiting.extend(to.iter().map(|to| (*to, Value::Object(event.clone()))));
        id
    }

    /// Sends what it can to those whom it can reach; `lost` says of each answer that does not come whether the request came.
    pub async fn deliver(&mut self, nodes: &[Option<Node>], links: &Links, mut lost: impl FnMut() -> bool) {
        let mut left = Vec::new();
        for (to, event) in std::mem::take(&mut self.waiting) {
            let node = nodes[to].as_ref().unwrap();
            let is_cut = links.is_cut(self.peer.name.as_str(), node.name.as_str());
            if is_cut && lost() {
                left.push((to, event));
                continue;
            }
            let received = node.dag.receive(&self.peer.name, vec![raw(event.as_object().unwrap())]).await;
            let again = received.iter().any(|one| one.result.as_ref().is_err_and(|refusal| refusal.is_transient()));
            if to == 0 && received.iter().all(|one| one.result.is_ok()) {
                self.taken.insert(id_of(RoomVersion::Lm02, event.as_object().unwrap()));
            }
            if is_cut || again {
                left.push((to, event));
            }
        }
        self.waiting = left;
    }
}
