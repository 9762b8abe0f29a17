//! Hubs like the LM server that exists: its join templates are those for graph servers, its keys say that it does LM alone,
//! it takes LPDUs, invites by `send` only, and never knows a transaction or an LPDU again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use http::{Method, StatusCode};
use isthmus::event::{Object, sign_object};
use isthmus::federation::Context;
use isthmus::identity::SigningKey;
use isthmus::lm::{Lm, Position};
use isthmus::refusal::Refusal;
use ruma::{OwnedServerName, RoomId};
use serde_json::{Value, json};

use super::world::{Node, World, assert_dense, ids, member};

/// What of a hub's manners a test looks at.
#[derive(Clone)]
pub struct Manners {
    name: OwnedServerName,
    key: Arc<SigningKey>,
    lm: Lm,
    /// Whether its keys say that it does LM alone.
    linearized: Arc<AtomicBool>,
}

impl Manners {
    /// Gives a hub the templates of a graph server, and perhaps the keys of an LM server.
    pub fn of(hub: &Node, linearized: bool) -> Self {
        let manners = Self::new(&hub.context, &hub.lm, linearized);
        let kept = manners.clone();
        hub.meddle(move |request, next| kept.clone().answer(request, next));
        manners
    }

    pub fn new(context: &Context, lm: &Lm, linearized: bool) -> Self {
        let (name, key) = (context.server_name.clone(), context.signing_key.clone());
        Self { name, key, lm: lm.clone(), linearized: Arc::new(AtomicBool::new(linearized)) }
    }

    pub async fn answer(self, request: Request, next: Next) -> Response {
        let path = request.uri().path().to_owned();
        if request.method() == Method::POST && path.contains("/invite/") {
            return respond(
                StatusCode::BAD_REQUEST,
                json!({ "errcode": "M_UNKNOWN", "error": "Already know of this room" }),
            );
        }
        let response = next.run(request).await;
        if path.ends_with("/key/v2/server") {
            let mut keys = object(response).await;
            if self.linearized.load(Ordering::SeqCst) {
                keys.insert("m.linearized".to_owned(), json!(true));
                keys.remove("signatures");
                sign_object(&mut keys, self.name.as_str(), &self.key);
            }
            return respond(StatusCode::OK, Value::Object(keys));
        }
        if path.contains("/make_join/") && response.status().is_success() {
            let made = object(response).await;
            let (mut event, version) = (made["event"].clone(), made["room_version"].clone());
            let room_id = RoomId::parse(event["room_id"].as_str().unwrap()).unwrap();
            let log = self.lm.log(&room_id, Position(0), 1000).await.unwrap();
            event["prev_events"] = json!([log.last().unwrap().event.event_id]);
            event["auth_events"] = json!([log[0].event.event_id]);
            return respond(StatusCode::OK, json!({ "event": event, "room_version": version }));
        }
        response
    }
}

async fn object(response: Response) -> Object {
    let bytes = to_bytes(response.into_body(), 1 << 20).await.unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

pub fn respond(status: StatusCode, body: Value) -> Response {
    let response = Response::builder().status(status).header("content-type", "application/json");
    response.body(Body::from(body.to_string())).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_that_does_lm_alone_gets_lpdus_whatever_its_templates_are() {
    let (_world, [hub, part, third]) = World::new(["hub.example", "part.example", "third.example"]).await;
    Manners::of(&hub, true);
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    part.say(&room, "alice", "hello").await;
    hub.wait_for_body(&room, "hello").await;
    hub.say(&room, "bot", "hi").await;
    part.wait_for_body(&room, "hi").await;
    // It takes invites by no other way than this.
    let carol = third.user("carol");
    let invite = isthmus::seam::Outgoing { draft: member(&part.user("alice"), &carol, "invite"), effect: None };
    part.lm.invite(&room, invite).await.unwrap();
    third.wait_for_watcher("the invite", |watcher| !watcher.invites.lock().unwrap().is_empty()).await;
    third.join(&room, "carol", &hub).await;
    third.say(&room, "carol", "me too").await;
    let at_part = part.wait_for_body(&room, "me too").await;
    let at_hub = hub.wait_for_body(&room, "me too").await;
    assert_dense(&at_hub);
    assert_eq!(ids(&at_hub), ids(&at_part));
    assert_eq!(part.lm.room(&room).await.unwrap().unwrap().complaints, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_that_shares_graphs_too_is_refused_by_name() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    Manners::of(&hub, false);
    let room = hub.create_room("public").await;
    let joined = part.lm.join(&room, &part.user("alice"), std::slice::from_ref(&hub.name), Object::new()).await;
    let refusal = joined.map(drop).unwrap_err();
    assert_eq!(refusal, Refusal::GraphTemplate { server: hub.name.to_string(), room_id: room.to_string() });
    assert_eq!(hub.lm.room(&room).await.unwrap().unwrap().head, Position(3), "nothing was sent there");
}
