//! Typing, read receipts, presence and messages for devices: what crosses a portal, and what no other server can make cross.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::body::{Body, to_bytes};
use axum::extract::Request;
use isthmus::federation::{Call, Client, ClientOptions};
use isthmus::identity::Side;
use ruma::{OwnedEventId, OwnedUserId, RoomId, ServerName};
use serde_json::{Value, json};

use super::world::{Gateway, LM, MATRIX, World, draft, ghost, object, so, until};
use crate::dag::OWN;

/// Longer than a receipt waits for its event's image.
const PATIENT_MS: i64 = 10_000;

/// A gateway in whose portal alice and bob are, and what both their servers hear of it besides events.
struct Talk {
    world: World,
    gateway: Gateway,
    portal: Arc<isthmus::bridge::Portal>,
    view: crate::dag::peer::View,
    matrix_client: Client,
    lm_heard: Arc<Mutex<Vec<Value>>>,
    sent: AtomicUsize,
}

impl Talk {
    async fn new(settings: Value) -> Self {
        let (world, gateway) = World::new(settings).await;
        let (portal, view) = world.portal_of_two(&gateway).await;
        let options = ClientOptions { allow_private_networks: true, resolve: world.resolve(), ..Default::default() };
        let matrix_client = Client::new(world.peer.name.clone(), world.peer.key.clone(), options).unwrap();
        let lm_heard: Arc<Mutex<Vec<Value>>> = Arc::default();
        let hears = lm_heard.clone();
        *world.server.meddler.lock().unwrap() = Some(Arc::new(move |request, next| {
            let hears = hears.clone();
            Box::pin(async move {
                let (parts, body) = request.into_parts();
                let body = to_bytes(body, 1 << 20).await.unwrap();
                if parts.uri.path().contains("/send/") {
                    let body: Value = serde_json::from_slice(&body).unwrap();
                    hears.lock().unwrap().extend(body["edus"].as_array().into_iter().flatten().cloned());
                }
                next.run(Request::from_parts(parts, Body::from(body))).await
            })
        }));
        Self { world, gateway, portal, view, matrix_client, lm_heard, sent: AtomicUsize::new(0) }
    }

    fn alice(&self) -> OwnedUserId {
        self.world.matrix_user("alice")
    }

    fn bob(&self) -> OwnedUserId {
        self.world.lm_user("bob")
    }

    fn matrix_room(&self) -> &RoomId {
        &self.portal.matrix_room_id
    }

    fn lm_room(&self) -> &RoomId {
        &self.portal.lm_room_id
    }

    async fn put(&self, client: &Client, path: &str, edus: &[Value]) {
        let number = self.sent.fetch_add(1, Ordering::SeqCst);
        let body = object(json!({ "pdus": [], "edus": edus }));
        let own = ServerName::parse(OWN).unwrap();
        let call = Call::put(format!("/_matrix/federation/{path}/send/edus{number}"), body);
        client.call(&own, call, false).await.unwrap();
    }

    /// The homeserver says something.
    async fn matrix_says(&self, edus: &[Value]) {
        self.put(&self.matrix_client, "v1", edus).await;
    }

    /// The LM server says something.
    async fn lm_says(&self, edus: &[Value]) {
        self.put(&self.world.server.context.client, "v2", edus).await;
    }

    /// What a side's server has heard, as types and contents.
    fn heard(&self, side: Side) -> Vec<Value> {
        match side {
            Side::Matrix => self.world.peer.memory.edus.lock().unwrap().clone(),
            Side::Lm => self.lm_heard.lock().unwrap().clone(),
        }
    }

    /// Waits until a side's server has heard this, or something that ends with it.
    async fn hears(&self, side: Side, expected: Value) {
        let at = format!("{expected} at {side:?}");
        so(&at, || async { self.heard(side).last() == Some(&expected) }).await;
    }

    fn typing(room: &RoomId, user: &str, typing: bool) -> Value {
        json!({ "edu_type": "m.typing", "content": { "room_id": room, "user_id": user, "typing": typing } })
    }

    fn receipt(room: &RoomId, user: &str, event: &OwnedEventId, thread: Option<&str>) -> Value {
        let mut data = json!({ "ts": 5 });
        if let Some(thread) = thread {
            data["thread_id"] = json!(thread);
        }
        let entry = json!({ "data": data, "event_ids": [event] });
        json!({ "edu_type": "m.receipt", "content": { room.as_str(): { "m.read": { user: entry } } } })
    }

    /// What alice says, with its image's ID.
    async fn alice_says(&mut self, body: &str) -> (OwnedEventId, OwnedEventId) {
        let alice = self.alice();
        let id = self.world.matrix_say(&self.gateway, &mut self.view, &alice, body).await;
        let image = until("the image", || self.image(&id)).await;
        (id, image)
    }

    /// What bob says: its ID and its image's.
    async fn bob_says(&self, body: &str) -> (OwnedEventId, OwnedEventId) {
        self.world.lm_say(self.lm_room(), "bob", body).await;
        let id = until("what bob says", || async {
            let log = self.gateway.node.log(self.lm_room()).await;
            let said = log.into_iter().rev().find(|event| event.event.content().get("body") == Some(&json!(body)))?;
            Some(said.event.event_id.clone())
        })
        .await;
        let image = until("the image", || self.image(&id)).await;
        (id, image)
    }

    async fn image(&self, id: &OwnedEventId) -> Option<OwnedEventId> {
        let found = self.gateway.bridge.explain(id).await.unwrap()?;
        (found.status == "crossed").then_some(found.across).flatten()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn typing_crosses_both_ways_and_ends() {
    let talk = Talk::new(json!({})).await;
    let (alice, bob) = (talk.alice(), talk.bob());
    let (alices, bobs) = (ghost(Side::Matrix, "alice"), ghost(Side::Lm, "bob"));
    let (matrix, lm) = (talk.matrix_room(), talk.lm_room());

    talk.matrix_says(&[Talk::typing(matrix, alice.as_str(), true)]).await;
    talk.hears(Side::Lm, Talk::typing(lm, &alices, true)).await;
    // Again, at once: that is no news. Then she stops.
    talk.matrix_says(&[Talk::typing(matrix, alice.as_str(), true)]).await;
    talk.matrix_says(&[Talk::typing(matrix, alice.as_str(), false)]).await;
    talk.hears(Side::Lm, Talk::typing(lm, &alices, false)).await;
    assert_eq!(talk.heard(Side::Lm).len(), 2);

    // In the draft's shape.
    let content = json!({ "room_id": lm, "typing": true });
    talk.lm_says(&[json!({ "type": "m.typing", "sender": bob, "content": content })]).await;
    talk.hears(Side::Matrix, Talk::typing(matrix, &bobs, true)).await;
    // His server is never heard of again: nobody types for ever.
    talk.world.advance(30_000);
    talk.matrix_says(&[Talk::typing(matrix, alice.as_str(), true)]).await;
    talk.hears(Side::Lm, Talk::typing(lm, &alices, true)).await;
    assert_eq!(talk.heard(Side::Matrix).len(), 1);
    talk.world.advance(31_000);
    talk.hears(Side::Matrix, Talk::typing(matrix, &bobs, false)).await;
    assert_eq!(talk.heard(Side::Lm).len(), 3, "half a minute is not too long for alice");

    // Who leaves does not type.
    let leave = draft(&alice, "m.room.member", Some(alice.as_str()), json!({ "membership": "leave" }));
    let mut view = talk.view.clone();
    talk.world.refresh(&talk.gateway, &mut view).await;
    let content = Value::Object(leave.content);
    talk.world.matrix_send(&talk.gateway, &mut view, &alice, "m.room.member", Some(alice.as_str()), content).await;
    talk.hears(Side::Lm, Talk::typing(lm, &alices, false)).await;
    talk.matrix_says(&[Talk::typing(matrix, alice.as_str(), true)]).await;
    // Nothing of a ghost's comes back (INV-7): each side heard the other alone.
    let all = [talk.heard(Side::Matrix), talk.heard(Side::Lm)];
    assert_eq!(all.map(|heard| heard.len()), [2, 4]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn read_receipts_cross_both_ways_with_the_images_of_their_events() {
    let mut talk = Talk::new(json!({})).await;
    let (alice, bob) = (talk.alice(), talk.bob());
    let (alices, bobs) = (ghost(Side::Matrix, "alice"), ghost(Side::Lm, "bob"));
    let (said_by_alice, alices_image) = talk.alice_says("hello").await;
    let (said_by_bob, bobs_image) = talk.bob_says("hi").await;
    let (matrix, lm) = (talk.matrix_room().to_owned(), talk.lm_room().to_owned());

    talk.matrix_says(&[Talk::receipt(&matrix, alice.as_str(), &bobs_image, None)]).await;
    talk.hears(Side::Lm, Talk::receipt(&lm, &alices, &said_by_bob, None)).await;
    talk.lm_says(&[Talk::receipt(&lm, bob.as_str(), &alices_image, Some("main"))]).await;
    talk.hears(Side::Matrix, Talk::receipt(&matrix, &bobs, &said_by_alice, Some("main"))).await;
    // Her own event has an image too; in a thread, whose root is an event.
    talk.lm_says(&[Talk::receipt(&lm, bob.as_str(), &said_by_bob, Some(alices_image.as_str()))]).await;
    talk.hears(Side::Matrix, Talk::receipt(&matrix, &bobs, &bobs_image, Some(said_by_alice.as_str()))).await;

    // What is older than what is known says nothing; neither does what is private.
    let (_, third) = talk.bob_says("third").await;
    let private = json!({ "edu_type": "m.receipt", "content": {
        matrix.as_str(): { "m.read.private": { alice.as_str(): { "data": {}, "event_ids": [third] } } } } });
    talk.matrix_says(&[private, Talk::receipt(&matrix, alice.as_str(), &said_by_alice, None)]).await;

    // An event that does not cross: the receipt is for the nearest before it that did.
    let mut view = talk.view.clone();
    talk.world.refresh(&talk.gateway, &mut view).await;
    let hidden = talk
        .world
        .matrix_send(&talk.gateway, &mut view, &alice, "m.room.third_party_invite", Some("x"), json!({}))
        .await;
    let (fourth, fourth_image) = talk.bob_says("fourth").await;
    talk.matrix_says(&[Talk::receipt(&matrix, alice.as_str(), &fourth_image, Some("main"))]).await;
    talk.hears(Side::Lm, Talk::receipt(&lm, &alices, &fourth, Some("main"))).await;
    talk.matrix_says(&[Talk::receipt(&matrix, alice.as_str(), &hidden, None)]).await;
    let heard = talk.heard(Side::Lm).len();
    so("a receipt for an earlier event", || async {
        talk.world.advance(PATIENT_MS);
        talk.heard(Side::Lm).len() > heard
    })
    .await;
    let last = talk.heard(Side::Lm).pop().unwrap();
    let event = last["content"][lm.as_str()]["m.read"][&alices]["event_ids"][0].as_str().unwrap().to_owned();
    let log = talk.gateway.node.log(&lm).await;
    let position = log.iter().position(|entry| entry.event.event_id.as_str() == event).unwrap();
    let at_third = log.iter().position(|entry| entry.event.content().get("body") == Some(&json!("third"))).unwrap();
    assert_eq!(position, at_third, "{last}");
    assert_eq!(talk.heard(Side::Lm).len(), 3);
    assert_eq!(talk.heard(Side::Matrix).len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_53_edus_in_the_name_of_others_do_not_cross() {
    let talk = Talk::new(json!({ "bridge": { "presence": true } })).await;
    let (alice, bob) = (talk.alice(), talk.bob());
    let (bobs_image, carol) = (ghost(Side::Lm, "bob"), talk.world.matrix_user("carol"));
    let (_, seen) = talk.bob_says("hi").await;
    let (matrix, lm) = (talk.matrix_room(), talk.lm_room());
    let online = |user: &str| {
        let push = json!([{ "user_id": user, "presence": "online", "currently_active": true, "last_active_ago": 0 }]);
        json!({ "edu_type": "m.presence", "content": { "push": push } })
    };
    // Other servers' users, ghosts, who is not in the room, rooms that are none of theirs.
    let mut lies = vec![json!(null), json!({ "edu_type": "m.typing" })];
    for user in [bob.as_str(), &bobs_image, carol.as_str(), &format!("@isthmus:{OWN}")] {
        lies.extend([Talk::typing(matrix, user, true), Talk::receipt(matrix, user, &seen, None), online(user)]);
    }
    for user in [alice.as_str(), bob.as_str()] {
        lies.extend([Talk::typing(lm, user, true), Talk::receipt(lm, user, &seen, None)]);
    }
    lies.push(json!({ "type": "m.typing", "sender": bob, "content": { "room_id": lm, "typing": true } }));
    talk.matrix_says(&lies).await;
    talk.matrix_says(&[Talk::typing(matrix, alice.as_str(), true)]).await;
    talk.hears(Side::Lm, Talk::typing(lm, &ghost(Side::Matrix, "alice"), true)).await;
    assert_eq!(talk.heard(Side::Lm).len(), 1, "{:?}", talk.heard(Side::Lm));

    talk.lm_says(&[Talk::typing(lm, alice.as_str(), true), Talk::typing(matrix, bob.as_str(), true)]).await;
    talk.lm_says(&[Talk::typing(lm, bob.as_str(), true)]).await;
    talk.hears(Side::Matrix, Talk::typing(matrix, &bobs_image, true)).await;
    assert_eq!(talk.heard(Side::Matrix).len(), 1, "{:?}", talk.heard(Side::Matrix));

    // What somebody says of themselves is told those with whom they share a room.
    talk.matrix_says(&[online(alice.as_str())]).await;
    talk.hears(Side::Lm, online(&ghost(Side::Matrix, "alice"))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_switched_off_does_not_cross() {
    let talk = Talk::new(json!({ "bridge": { "receipts": false } })).await;
    let alice = talk.alice();
    let (_, seen) = talk.bob_says("hi").await;
    let matrix = talk.matrix_room();
    let push = json!([{ "user_id": alice, "presence": "online" }]);
    let online = json!({ "edu_type": "m.presence", "content": { "push": push } });
    let receipt = Talk::receipt(matrix, alice.as_str(), &seen, None);
    talk.matrix_says(&[online, receipt, Talk::typing(matrix, alice.as_str(), true)]).await;
    talk.hears(Side::Lm, Talk::typing(talk.lm_room(), &ghost(Side::Matrix, "alice"), true)).await;
    assert_eq!(talk.heard(Side::Lm).len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_53_a_flood_of_edus_spends_its_servers_budget_and_keeps_no_event_back() {
    let mut talk = Talk::new(json!({ "budgets": { "edus_per_second": 1 } })).await;
    let (alice, bob) = (talk.alice(), talk.bob());
    talk.world.stop_clock();
    let (matrix, lm) = (talk.matrix_room().to_owned(), talk.lm_room().to_owned());
    for _ in 0..20 {
        let name = |n: usize| talk.world.matrix_user(&format!("u{n}"));
        let mut flood: Vec<_> = (0..99).map(|n| Talk::typing(&matrix, name(n).as_str(), true)).collect();
        flood.push(Talk::typing(&matrix, alice.as_str(), true));
        talk.matrix_says(&flood).await;
    }
    talk.alice_says("still heard").await;
    talk.lm_says(&[Talk::typing(&lm, bob.as_str(), true)]).await;
    talk.hears(Side::Matrix, Talk::typing(&matrix, &ghost(Side::Lm, "bob"), true)).await;
    // She was the hundredth to be heard of, and the budget of a minute is sixty.
    assert_eq!(talk.heard(Side::Lm), Vec::<Value>::new());
    // Her server may speak again later.
    talk.world.advance(120_000);
    let before = talk.heard(Side::Lm).len();
    talk.matrix_says(&[Talk::typing(&matrix, alice.as_str(), true)]).await;
    so("heard again", || async { talk.heard(Side::Lm).len() > before }).await;
    talk.hears(Side::Lm, Talk::typing(&lm, &ghost(Side::Matrix, "alice"), true)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_for_devices_that_nobody_has_are_dropped_and_changed_devices_are_marked() {
    let talk = Talk::new(json!({})).await;
    let (alice, bobs) = (talk.alice(), ghost(Side::Lm, "bob"));
    let stranger = talk.world.matrix_user("stranger");
    let message = json!({ "sender": alice, "type": "m.room.encrypted", "message_id": "1",
        "messages": { bobs.as_str(): { "*": {}, "D": {} }, alice.as_str(): { "D": {} } } });
    let changed = |user: &str| json!({ "edu_type": "m.device_list_update", "content": { "user_id": user, "device_id": "D", "stream_id": 1 } });
    let edus = [
        json!({ "edu_type": "m.direct_to_device", "content": message }),
        changed(alice.as_str()),
        changed(alice.as_str()),
        changed(stranger.as_str()),
        changed(talk.bob().as_str()),
    ];
    talk.matrix_says(&edus).await;
    let store = &talk.gateway.node.context.store;
    let count: (i64,) =
        sqlx::query_as("SELECT COUNT(*) FROM to_device_messages").fetch_one(store.reader()).await.unwrap();
    assert_eq!(count.0, 0);
    let changed = isthmus::store::to_device::changed_after(store, 0, 10).await.unwrap();
    assert_eq!(changed.into_iter().map(|(user, _)| user).collect::<Vec<_>>(), [alice]);
    assert!(talk.heard(Side::Lm).is_empty() && LM != MATRIX);
}
