//! Hubs like the LM server that exists: its join templates are those for graph servers, its keys say that it does LM alone,
//! it takes LPDUs, invites by `send` only, and never knows a transaction or an LPDU again.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use http::{Method, StatusCode};
use isthmus::event::{Object, sign_object};
use isthmus::federation::Context;
use isthmus::identity::SigningKey;
use isthmus::lm::{Lm, Position, Sent};
use isthmus::refusal::Refusal;
use ruma::{OwnedServerName, RoomId};
use serde_json::{Value, json};

use super::world::{Node, World, assert_dense, bodies, ids, member, raw};

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
async fn an_invite_of_a_hub_that_has_no_make_leave_is_declined_by_send() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    hub.meddle(|request, next| async move {
        match request.uri().path().contains("_leave/") {
            true => {
                Response::builder().status(StatusCode::NOT_FOUND).body(Body::from("<html>Cannot GET</html>")).unwrap()
            }
            false => next.run(request).await,
        }
    });
    let room = hub.create_room("invite").await;
    let carol = part.user("carol");
    let invite = isthmus::seam::Outgoing { draft: member(&hub.user("bot"), &carol, "invite"), effect: None };
    hub.lm.invite(&room, invite).await.unwrap();
    // Who was not invited is told why not.
    let refused = part.lm.leave(&room, &part.user("dave"), std::slice::from_ref(&hub.name)).await;
    assert!(matches!(refused, Err(Refusal::Forbidden(_))), "{refused:?}");
    part.lm.leave(&room, &carol, std::slice::from_ref(&hub.name)).await.unwrap();
    let last = hub.log(&room).await.pop().unwrap().event;
    assert_eq!((&*last.sender, last.content()["membership"].as_str()), (&*carol, Some("leave")));
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_that_goes_away_while_it_is_asked_for_its_graph_may_be_asked_again() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let manners = Manners::new(&hub.context, &hub.lm, false);
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = asked.clone();
    hub.meddle(move |request, next| {
        let is_template = request.uri().path().contains("/make_join/");
        let is_away = is_template && counted.fetch_add(1, Ordering::SeqCst) > 0;
        let manners = manners.clone();
        async move {
            match is_away {
                true => respond(StatusCode::BAD_GATEWAY, json!({})),
                false => manners.answer(request, next).await,
            }
        }
    });
    let room = hub.create_room("public").await;
    let joined = part.lm.join(&room, &part.user("alice"), std::slice::from_ref(&hub.name), Object::new()).await;
    let refusal = joined.map(drop).unwrap_err();
    assert!(matches!(&refusal, Refusal::Remote { server, .. } if server.as_str() == hub.name.as_str()), "{refusal}");
    assert!(asked.load(Ordering::SeqCst) > 1, "it was not asked for its graph");
}

/// A hub whose answers get lost, and what it was sent.
pub struct Faulty {
    /// The transactions that it took.
    taken: Mutex<Vec<String>>,
    /// Whether the next transaction is lost before it is taken; or its answer is, after it.
    loses: Mutex<Option<bool>>,
    /// How many requests find nobody after that.
    pub away: AtomicUsize,
}

impl Faulty {
    pub fn of(hub: &Node) -> Arc<Self> {
        let faulty = Arc::new(Self { taken: Mutex::default(), loses: Mutex::default(), away: AtomicUsize::new(0) });
        let (kept, manners) = (faulty.clone(), Manners::new(&hub.context, &hub.lm, true));
        hub.meddle(move |request, next| {
            let (faulty, manners) = (kept.clone(), manners.clone());
            async move { faulty.answer(manners, request, next).await }
        });
        faulty
    }

    async fn answer(&self, manners: Manners, request: Request, next: Next) -> Response {
        if self.away.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok() {
            return respond(StatusCode::SERVICE_UNAVAILABLE, json!({}));
        }
        if !request.uri().path().contains("/send/") {
            return manners.answer(request, next).await;
        }
        let loses = self.loses.lock().unwrap().take();
        let (parts, body) = request.into_parts();
        let body = to_bytes(body, 1 << 20).await.unwrap();
        if loses == Some(true) {
            self.away.store(3, Ordering::SeqCst);
            return respond(StatusCode::GATEWAY_TIMEOUT, json!({}));
        }
        self.taken.lock().unwrap().push(String::from_utf8(body.to_vec()).unwrap());
        let response = manners.answer(Request::from_parts(parts, body.into()), next).await;
        if loses == Some(false) {
            self.away.store(3, Ordering::SeqCst);
            return respond(StatusCode::GATEWAY_TIMEOUT, json!({}));
        }
        response
    }

    fn took(&self, body: &str) -> usize {
        self.taken.lock().unwrap().iter().filter(|taken| taken.contains(body)).count()
    }
}

/// Has a server answer to all that is sent to it, and take nothing of it, as long as it is deaf.
pub fn deafen(node: &Node) -> Arc<AtomicBool> {
    let deaf = Arc::new(AtomicBool::new(true));
    let kept = deaf.clone();
    node.meddle(move |request, next| {
        let deaf = kept.load(Ordering::SeqCst) && request.uri().path().contains("/send/");
        async move {
            match deaf {
                true => respond(StatusCode::OK, json!({})),
                false => next.run(request).await,
            }
        }
    });
    deaf
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_5_what_became_of_an_lpdu_is_looked_for_before_it_is_sent_again() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let faulty = Faulty::of(&hub);
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    for (body, before) in [("appended before it was away", false), ("not appended before it was away", true)] {
        // Nothing comes back by itself: neither the answer nor the echo, nor what others say.
        let deaf = deafen(&part);
        *faulty.loses.lock().unwrap() = Some(before);
        hub.say(&room, "bot", &format!("earlier: {body}")).await;
        part.say(&room, "alice", body).await;
        hub.wait_for_body(&room, body).await;
        hub.say(&room, "bot", &format!("later: {body}")).await;
        let done = format!("done: {body}");
        deaf.store(false, Ordering::SeqCst);
        part.say(&room, "alice", &done).await;
        part.wait_for_body(&room, &done).await;
        assert_eq!(faulty.took(&format!("\"{body}\"")), 1);
    }
    let (at_hub, at_part) = (hub.log(&room).await, part.log(&room).await);
    assert_eq!(ids(&at_hub), ids(&at_part));
    assert_eq!(at_hub.len(), 5 + 2 * 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_5_what_became_of_lpdus_is_looked_for_after_a_restart_before_they_are_sent_again() {
    let (world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    // It answers nothing, and goes on with the second message only when everybody believes it dead.
    let (taken, silent) = (Arc::new(Mutex::new(Vec::<String>::new())), Arc::new(AtomicBool::new(false)));
    let late = Arc::new(tokio::sync::Notify::new());
    let (manners, lm) = (Manners::new(&hub.context, &hub.lm, true), hub.lm.clone());
    let (kept, quiet, begin, origin) = (taken.clone(), silent.clone(), late.clone(), part.name.clone());
    hub.meddle(move |request, next| {
        let (taken, silent, late) = (kept.clone(), quiet.clone(), begin.clone());
        let (manners, lm, origin) = (manners.clone(), lm.clone(), origin.clone());
        async move {
            if !request.uri().path().contains("/send/") {
                return manners.answer(request, next).await;
            }
            let (parts, body) = request.into_parts();
            let body = to_bytes(body, 1 << 20).await.unwrap();
            taken.lock().unwrap().push(String::from_utf8(body.to_vec()).unwrap());
            if !silent.load(Ordering::SeqCst) {
                return manners.answer(Request::from_parts(parts, body.into()), next).await;
            }
            let pdus: Object = serde_json::from_slice(&body).unwrap();
            let pdus: Vec<_> =
                pdus["pdus"].as_array().unwrap().iter().map(|pdu| raw(pdu.as_object().unwrap())).collect();
            let (first, rest) = pdus.split_first().unwrap();
            lm.receive(&origin, vec![first.clone()]).await;
            let rest = rest.to_vec();
            tokio::spawn(async move {
                late.notified().await;
                lm.receive(&origin, rest).await;
            });
            std::future::pending().await
        }
    });
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    deafen(&part);
    silent.store(true, Ordering::SeqCst);
    let message =
        |body: &str| isthmus::seam::Outgoing { draft: super::world::message(&part.user("alice"), body), effect: None };
    part.lm.send(&room, vec![message("one"), message("two")]).await;
    hub.wait_for_body(&room, "one").await;
    let part = world.restart(part).await;
    silent.store(false, Ordering::SeqCst);
    part.wait_for_body(&room, "one").await;
    late.notify_one();
    hub.wait_for_body(&room, "two").await;
    part.say(&room, "alice", "three").await;
    hub.wait_for_body(&room, "three").await;
    let at_part = part.wait_for_body(&room, "three").await;
    assert_eq!(bodies(&at_part), ["one", "two", "three"]);
    let taken = taken.lock().unwrap();
    for body in ["one", "two", "three"] {
        assert_eq!(taken.iter().filter(|taken| taken.contains(&format!("\"{body}\""))).count(), 1, "{body}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_missing_and_cannot_be_had_now_is_asked_for_again() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let faulty = Faulty::of(&hub);
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    let deaf = deafen(&part);
    hub.say(&room, "bot", "missed").await;
    let Sent::Appended(last) = hub.say(&room, "bot", "last").await else { panic!("a hub appends") };
    deaf.store(false, Ordering::SeqCst);
    // The hub is away when it is asked for what is before the event.
    faulty.away.store(1, Ordering::SeqCst);
    let received = part.lm.receive(&hub.name, vec![raw(&last.event.json)]).await.pop().unwrap();
    assert!(matches!(received.result, Err(Refusal::Internal(_))), "{received:?}");
    assert_eq!(bodies(&part.log(&room).await), Vec::<String>::new());
    // Nothing comes from the hub again.
    part.wait_for_body(&room, "last").await;
    assert_eq!(ids(&part.log(&room).await), ids(&hub.log(&room).await));
    assert_eq!(part.lm.room(&room).await.unwrap().unwrap().complaints, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_hub_said_in_a_long_absence_comes_in_order_though_it_gives_ten_events_at_once() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    let deaf = deafen(&part);
    hub.meddle(|request, next| async move {
        let is_backfill = request.uri().path().contains("/backfill/");
        let response = next.run(request).await;
        if !is_backfill {
            return response;
        }
        let mut answer = object(response).await;
        if let Some(Value::Array(pdus)) = answer.get_mut("pdus") {
            pdus.drain(..pdus.len().saturating_sub(10));
        }
        respond(StatusCode::OK, Value::Object(answer))
    });
    for n in 0..600 {
        hub.say(&room, "bot", &n.to_string()).await;
    }
    let Sent::Appended(last) = hub.say(&room, "bot", "last").await else { panic!("a hub appends") };
    deaf.store(false, Ordering::SeqCst);
    let received = part.lm.receive(&hub.name, vec![raw(&last.event.json)]).await.pop().unwrap();
    assert_eq!(received.result, Ok(()));
    assert_eq!(ids(&part.log(&room).await), ids(&hub.log(&room).await));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_hub_said_in_a_very_long_absence_comes_in_order_across_a_restart() {
    let (world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let faulty = Faulty::of(&hub);
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    deafen(&part);
    let message = |n: usize| isthmus::seam::Outgoing {
        draft: super::world::message(&hub.user("bot"), &n.to_string()),
        effect: None,
    };
    for from in (0..5_500).step_by(500) {
        hub.lm.send(&room, (from..from + 500).map(message).collect()).await;
    }
    let Sent::Appended(last) = hub.say(&room, "bot", "last").await else { panic!("a hub appends") };
    hub.context.outbound.stop().await;
    let received = part.lm.receive(&hub.name, vec![raw(&last.event.json)]).await.pop().unwrap();
    assert_eq!(received.result, Ok(()), "it is asked for with all the rest");
    let missing = isthmus::store::lm::missing(&part.context.store, Some(&room)).await.unwrap();
    assert_eq!((missing.gaps, missing.taken), (1, 0), "{missing:?}");
    // So many at once, or fewer where the time for that is over before.
    assert!((1..=5_500).contains(&missing.fetched), "{missing:?}");
    // The hub is away when the rest is asked for, and the gateway is stopped.
    faulty.away.store(1, Ordering::SeqCst);
    let part = world.restart(part).await;
    let closed = async {
        while isthmus::store::lm::missing(&part.context.store, None).await.unwrap().count > 0 {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), closed).await.unwrap();
    let log = async |node: &Node| {
        let rows = isthmus::store::lm::range(&node.context.store, &room, 0, i64::MAX, 10_000).await.unwrap();
        rows.into_iter().map(|row| row.event_id).collect::<Vec<_>>()
    };
    let (at_part, at_hub) = (log(&part).await, log(&hub).await);
    assert_eq!((at_part.len(), at_hub.last()), (at_hub.len(), Some(&last.event.event_id)));
    assert!(at_part == at_hub, "in another order");
    assert_eq!(part.lm.room(&room).await.unwrap().unwrap().complaints, Vec::<String>::new());
}
