//! Shared rooms: the graph of LM events with its log beside it, other homeservers on the one side and LM servers on the other.

mod corrections;
pub mod fake;
mod forks;
mod random;
mod redactions;
mod servers;

use isthmus::event::{Lpdu, VerifiedLpdu, VerifyKey, VerifyKeys};
use isthmus::federation::{Feed, FeedKind, FeedSource as _};
use isthmus::lm::{Lm, Position};
use isthmus::seam::{EventEffect, Graphs as _, LogOrigin, NewLog, NewShared, Next, NextEvent};
use isthmus::store::StoreError;

use self::fake::{FakeLogs, Log};
use super::peer::{View, own};
use super::*;

const LM: RoomVersion = RoomVersion::Lm02;

/// A gateway with logs in memory.
struct Hub {
    gateway: Gateway,
    logs: FakeLogs,
    /// The real ones, where they are wanted.
    lm: Option<Lm>,
}

impl Hub {
    async fn start(peers: &[&Peer]) -> Self {
        Self::over(Gateway::start(peers).await, FakeLogs::default(), false)
    }

    /// With the linear side's logs.
    async fn real(peers: &[&Peer]) -> Self {
        Self::over(Gateway::start(peers).await, FakeLogs::default(), true)
    }

    fn restart(self, peers: &[&Peer]) -> Self {
        Self::over(self.gateway.restart(peers), self.logs, self.lm.is_some())
    }

    fn over(gateway: Gateway, logs: FakeLogs, real: bool) -> Self {
        let lm = real.then(|| Lm::new(gateway.context.clone(), gateway.between.clone()));
        match &lm {
            Some(lm) => gateway.dag.set_logs(lm.logs()),
            None => gateway.dag.set_logs(Arc::new(logs.clone())),
        }
        Self { gateway, logs, lm }
    }

    /// A public room in which everybody may set the topic, moderators may ban and alter levels.
    async fn room(&self) -> OwnedRoomId {
        let levels = json!({
            "users": { (bot().as_str()): (1_i64 << 53) - 1 }, "users_default": 50, "ban": 50, "kick": 50, "invite": 0,
            "events": { "m.room.power_levels": 50 },
        });
        let initial_state = vec![
            state("m.room.power_levels", "", levels),
            state("m.room.join_rules", "", json!({ "join_rule": "public" })),
        ];
        let room = NewShared { creator: bot(), version: LM, initial_state };
        self.gateway.dag.create(room).await.unwrap()
    }

    async fn log(&self, room: &RoomId) -> Log {
        let Some(lm) = &self.lm else { return self.logs.log(room) };
        let events = lm.log(room, Position(0), 1000).await.unwrap();
        let events = events.into_iter().map(|appended| (appended.event, LogOrigin::default())).collect();
        let state = lm.state(room).await.unwrap();
        let state = state.iter().map(|(kind, key, event)| ((kind.to_owned(), key.to_owned()), event.clone()));
        Log { room: NewLog { room_id: room.to_owned(), version: LM, hub: own() }, events, state: state.collect() }
    }

    /// What an LM server's user sends.
    async fn lpdu(&self, peer: &Peer, room: &RoomId, draft: Draft) -> Result<OwnedEventId, Refusal> {
        self.add(room, Next::Lpdu(lpdu(peer, room, &draft)), None).await
    }

    async fn add(&self, room: &RoomId, what: Next, effect: Option<EventEffect>) -> Result<OwnedEventId, Refusal> {
        let origin = LogOrigin { foreign: true, ..LogOrigin::default() };
        let added = self.gateway.dag.add(room, vec![NextEvent { what, origin, effect }]).await;
        added.into_iter().next().unwrap()
    }

    /// What a user of a graph server sends on top of `view`; whether the room has it.
    async fn pdu(&self, peer: &Peer, view: &mut View, draft: &Draft) -> bool {
        let (sender, key) = (&draft.sender, draft.state_key.as_deref());
        let mut event = view.next(sender, &draft.kind, key, Value::Object(draft.content.clone()));
        event["origin_server_ts"] = json!(draft.origin_server_ts);
        let (id, event) = peer.sign(LM, event);
        peer.keep(&id, &event);
        view.note(id.clone(), &event);
        assert!(peer.put(&self.gateway.dag, &[&event]).await[0].result.is_ok(), "{event:?}");
        self.gateway.dag.event(&id).await.unwrap().is_some()
    }

    /// The room as it is now.
    async fn view(&self, room: &RoomId) -> View {
        let tips = isthmus::store::dag::room(&self.gateway.context.store, room).await.unwrap().unwrap().tips;
        let state = self.gateway.state(room).await;
        View { version: LM, room_id: room.to_owned(), state, tips, depth: 0 }
    }

    /// INV-2 to INV-4: the log is sound, and its state is the graph's.
    async fn assert_in_step(&self, room: &RoomId) {
        let log = self.log(room).await;
        log.assert_sound();
        assert_eq!(self.gateway.dag.uncorrected(room).await.unwrap(), []);
        let here = self.gateway.dag.state(room).await.unwrap();
        for (key, event) in here.iter() {
            let there = log.state.get(key).unwrap_or_else(|| panic!("the log lacks {key:?} {:?}", event.content));
            if key.0 == "m.room.member" {
                assert_eq!(there.content()["membership"], event.content["membership"], "{key:?}");
            } else {
                assert_eq!(there.event_id, event.event_id, "{key:?} {:?} {:?}", there.content(), event.content);
            }
        }
        for (key, event) in &log.state {
            let gone = key.0 == "m.room.member" && event.content()["membership"] == "leave";
            assert!(here.contains_key(key) || gone, "the log alone has {key:?}");
        }
    }

    async fn says(&self, room: &RoomId, kind: &str, key: &str) -> Object {
        self.log(room).await.state[&(kind.to_owned(), key.to_owned())].content().clone()
    }
}

fn lpdu(peer: &Peer, room: &RoomId, draft: &Draft) -> VerifiedLpdu {
    let mut template = object(json!({ "type": draft.kind, "room_id": room, "sender": draft.sender,
        "content": draft.content, "origin_server_ts": draft.origin_server_ts }));
    if let Some(key) = &draft.state_key {
        template.insert("state_key".to_owned(), json!(key));
    }
    let lpdu = Lpdu::build(template, &own(), &peer.name, &peer.key).unwrap();
    let key = VerifyKey::from_base64(&peer.key.public_base64()).unwrap();
    let keys = VerifyKeys::from([(peer.name.clone(), BTreeMap::from([(peer.key.id().to_owned(), key)]))]);
    lpdu.verify(&keys).unwrap()
}

fn member(sender: &UserId, target: &UserId, membership: &str) -> Draft {
    draft(sender, "m.room.member", Some(target.as_str()), json!({ "membership": membership }))
}

/// What a server is sent of a room's graph.
async fn outbox(hub: &Hub, room: &RoomId, peer: &Peer) -> Vec<OwnedEventId> {
    let feed = Feed { kind: FeedKind::Graph, room_id: room.to_owned() };
    let deliveries = hub.gateway.dag.outbox().read(&feed, &peer.name, 0, None, 1000).await.unwrap();
    let events = deliveries.into_iter().filter_map(|delivery| delivery.event);
    events.map(|event| peer::id_of(LM, &serde_json::from_slice(&event).unwrap())).collect()
}

#[tokio::test]
async fn a_shared_room_is_a_graph_and_a_log_at_once() {
    let (graph, linear) = (Peer::start("graph.example").await, Peer::start("linear.example").await);
    both_at_once(Hub::start(&[&graph, &linear]).await, &graph, &linear).await;
    both_at_once(Hub::real(&[&graph, &linear]).await, &graph, &linear).await;
}

async fn both_at_once(hub: Hub, graph: &Peer, linear: &Peer) {
    let room = hub.room().await;
    let (alice, lena) = (graph.user("alice"), linear.user("lena"));
    let mut view = graph.join(&hub.gateway, &room, &alice).await.unwrap();
    let join = hub.lpdu(linear, &room, member(&lena, &lena, "join")).await.unwrap();
    let said = hub.lpdu(linear, &room, message(&lena, "by the hub")).await.unwrap();
    assert!(hub.pdu(graph, &mut view, &message(&alice, "at once")).await);
    let reply = hub.gateway.send(&room, message(&bot(), "both")).await.unwrap();
    hub.assert_in_step(&room).await;
    let log = hub.log(&room).await;
    assert_eq!(log.room.hub, own());
    let (last, origin) = log.events.last().unwrap();
    assert_eq!((&last.event_id, origin.foreign), (&reply, false));
    assert_eq!(last.prev_events.len(), 2);
    assert!(last.hub_server.is_none() && !last.json.contains_key("depth"));
    let finished = log.events.iter().find(|(event, _)| event.event_id == said).unwrap();
    assert!(finished.0.hub_server.is_some() && finished.0.lpdu_id.is_some());
    // An ancestor is less deep than what follows it.
    let depth = async |id: &OwnedEventId| hub.gateway.dag.event(id).await.unwrap().unwrap().depth;
    assert!(depth(&join).await < depth(&said).await && depth(&said).await < depth(&reply).await);

    // The graph server gets what it cannot have from its maker; the LM server gets the log and nothing of this.
    let sent = outbox(&hub, &room, graph).await;
    assert!([&join, &said, &reply].iter().all(|id| sent.contains(id)), "{sent:?}");
    assert_eq!(outbox(&hub, &room, linear).await, Vec::<OwnedEventId>::new());
    assert!(hub.gateway.inbox(&room).await.is_empty(), "the log tells the bridge");

    // The same LPDU is the same event, and restarts change nothing.
    let again = lpdu(linear, &room, &message(&lena, "by the hub"));
    assert_eq!(hub.add(&room, Next::Lpdu(again.clone()), None).await.unwrap(), said);
    let hub = hub.restart(&[graph, linear]);
    assert_eq!(hub.add(&room, Next::Lpdu(again), None).await.unwrap(), said);
    let last = hub.lpdu(linear, &room, message(&lena, "again")).await.unwrap();
    assert_eq!(hub.log(&room).await.ids().last(), Some(&last));
    assert_eq!(outbox(&hub, &room, linear).await, Vec::<OwnedEventId>::new());
    assert!(outbox(&hub, &room, graph).await.contains(&last));
    hub.assert_in_step(&room).await;
}

#[tokio::test]
async fn what_is_refused_or_not_written_leaves_no_trace() {
    let linear = Peer::start("linear.example").await;
    let hub = Hub::start(&[&linear]).await;
    let room = hub.room().await;
    let (lena, lars) = (linear.user("lena"), linear.user("lars"));
    hub.lpdu(&linear, &room, member(&lena, &lena, "join")).await.unwrap();
    let before = (hub.log(&room).await.ids(), hub.gateway.state(&room).await);
    let unchanged = async || assert_eq!((hub.log(&room).await.ids(), hub.gateway.state(&room).await), before);

    let refused = hub.lpdu(&linear, &room, message(&lars, "not joined")).await.unwrap_err();
    assert!(matches!(refused, Refusal::MatrixRule(_) | Refusal::LmRule { .. }), "{refused}");
    unchanged().await;
    // What is written with it fails, and so nothing is written.
    let failing = EventEffect::new(|_, _| Box::pin(async { Err(StoreError::Withdrawn("meant to fail")) }));
    let what = Next::Lpdu(lpdu(&linear, &room, &message(&lena, "lost")));
    hub.add(&room, what, Some(failing)).await.unwrap_err();
    assert_eq!(*hub.logs.uncertain.lock().unwrap(), 1);
    unchanged().await;
    // Of several one fails alone.
    let next = |draft: &Draft| NextEvent {
        what: Next::Lpdu(lpdu(&linear, &room, draft)),
        origin: LogOrigin { foreign: true, ..LogOrigin::default() },
        effect: None,
    };
    let events = [message(&lena, "lost"), message(&lars, "not joined"), message(&lena, "third")];
    let added = hub.gateway.dag.add(&room, events.iter().map(next).collect()).await;
    assert_eq!(added.iter().map(Result::is_ok).collect::<Vec<_>>(), [true, false, true]);
    assert_eq!(hub.log(&room).await.ids().len(), before.0.len() + 2);
    hub.assert_in_step(&room).await;
}

#[tokio::test]
async fn nobody_but_the_hub_finishes_events_and_none_of_its_own_users() {
    let (one, two) = (Peer::start("one.example").await, Peer::start("two.example").await);
    let hub = Hub::start(&[&one, &two]).await;
    let room = hub.room().await;
    let (alice, lena) = (one.user("alice"), two.user("lena"));
    let view = one.join(&hub.gateway, &room, &alice).await.unwrap();
    hub.lpdu(&two, &room, member(&lena, &lena, "join")).await.unwrap();
    let log = hub.log(&room).await.ids();
    // A graph server plays the hub for another's user.
    let template = object(json!({ "type": "m.room.message", "room_id": room, "sender": lena,
        "content": { "body": "no" }, "origin_server_ts": NOW }));
    let lpdu = Lpdu::build(template, &one.name, &two.name, &two.key).unwrap();
    let key = VerifyKey::from_base64(&two.key.public_base64()).unwrap();
    let keys = VerifyKeys::from([(two.name.clone(), BTreeMap::from([(two.key.id().to_owned(), key)]))]);
    let lpdu = lpdu.verify(&keys).unwrap();
    let refused = hub.add(&room, Next::Lpdu(lpdu.clone()), None).await.unwrap_err();
    assert!(matches!(refused, Refusal::WrongHub { .. }), "{refused}");
    let all: Vec<_> = hub.view(&room).await.state.into_iter().collect();
    let auth_events = all.iter().filter(|((kind, key), _)| {
        ["m.room.create", "m.room.power_levels"].contains(&kind.as_str()) || key == lena.as_str()
    });
    let links = isthmus::event::Links {
        auth_events: auth_events.map(|(_, id)| id.clone()).collect(),
        prev_events: hub.view(&room).await.tips,
        redaction: isthmus::event::Redaction::GraphServer,
    };
    let event = isthmus::event::Pdu::complete_among(lpdu, links, &one.name, &one.key).unwrap();
    let received = one.put(&hub.gateway.dag, &[&event.json]).await;
    let refused = received[0].result.as_ref().unwrap_err().to_string();
    assert!(refused.contains("is not the hub"), "{refused}");
    // An LM server's own PDUs go through the hub.
    let (_, event) = two.sign(LM, hub.view(&room).await.next(&lena, "m.room.message", None, json!({ "body": "no" })));
    assert!(two.put(&hub.gateway.dag, &[&event]).await[0].result.is_err());
    // Floats are none of a graph's numbers.
    let (_, mut event) = one.sign(LM, view.next(&alice, "m.room.message", None, json!({ "body": "no" })));
    event.insert("content".to_owned(), json!({ "n": 1.5 }));
    assert!(matches!(one.put(&hub.gateway.dag, &[&event]).await[0].result, Err(Refusal::Malformed { .. })));
    // A wrong hash leaves the redacted copy.
    let (id, mut event) = one.sign(LM, view.next(&alice, "m.room.message", None, json!({ "body": "one" })));
    event.insert("content".to_owned(), json!({ "body": "another" }));
    assert!(one.put(&hub.gateway.dag, &[&event]).await[0].result.is_ok());
    assert!(hub.gateway.dag.event(&id).await.unwrap().unwrap().content.is_empty());
    assert_eq!(hub.log(&room).await.ids(), [log, vec![id]].concat());
    hub.assert_in_step(&room).await;
}
