//! Events of the gateway's own users, and what other servers are sent of them.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use isthmus::event::RoomVersion;
use isthmus::federation::{Feed, FeedKind, FeedSource as _};
use isthmus::store::StoreError;
use ruma::RoomId;
use serde_json::json;
use tokio::sync::Notify;

use super::peer::Peer;
use super::*;

/// What the destination is sent after a position, as bodies or types.
async fn feed(gateway: &Gateway, room: &RoomId, destination: &Peer, after: i64) -> Vec<(i64, Option<String>)> {
    let feed = Feed { kind: FeedKind::Graph, room_id: room.to_owned() };
    let rows = gateway.dag.outbox().read(&feed, &destination.name, after, None, 100).await.unwrap();
    rows.into_iter()
        .map(|row| {
            let event = row.event.map(|event| serde_json::from_slice::<serde_json::Value>(&event).unwrap());
            let label = event.map(|event| {
                event["content"]["body"].as_str().or(event["content"]["membership"].as_str()).unwrap_or("?").to_owned()
            });
            (row.position, label)
        })
        .collect()
}

#[tokio::test]
async fn ghosts_join_and_speak_each_event_failing_alone() {
    let gateway = Gateway::start(&[]).await;
    for version in VERSIONS {
        let room = gateway.room(version, "public").await;
        let bob = ghost("bob");
        let join = draft(&bob, "m.room.member", Some(bob.as_str()), json!({ "membership": "join" }));
        let effects: Arc<Mutex<Vec<String>>> = Arc::default();
        let note = |label: &str| -> isthmus::seam::EventEffect {
            let (effects, label) = (effects.clone(), label.to_owned());
            isthmus::seam::EventEffect::new(move |_, _| {
                Box::pin(async move {
                    effects.lock().unwrap().push(label);
                    Ok::<(), StoreError>(())
                })
            })
        };
        let events = vec![
            Outgoing { draft: message(&bob, "too early"), effect: Some(note("early")) },
            Outgoing { draft: join, effect: Some(note("join")) },
            Outgoing { draft: message(&bob, "hello"), effect: Some(note("hello")) },
        ];
        let results = gateway.dag.send(&room, events).await;
        assert_eq!(results[0].as_ref().unwrap_err().code(), "matrix_rule");
        let join = results[1].as_ref().unwrap();
        let hello = results[2].as_ref().unwrap();
        assert_eq!(hello.prev_events, std::slice::from_ref(&join.event_id));
        assert_eq!(hello.depth, join.depth + 1);
        assert_eq!(*effects.lock().unwrap(), ["join", "hello"]);
        assert!(gateway.inbox(&room).await.is_empty());
        assert_eq!(gateway.dag.event(&hello.event_id).await.unwrap().unwrap().content["body"], "hello");
    }
}

#[tokio::test]
async fn of_a_batch_in_which_an_effect_fails_nothing_stays_and_each_goes_alone() {
    let gateway = Gateway::start(&[]).await;
    let room = gateway.room(RoomVersion::V11, "public").await;
    let outgoing = |body: &str| {
        let fails = body == "bad";
        let effect = isthmus::seam::EventEffect::new(move |_, _| {
            let done = if fails { Err(StoreError::Withdrawn("as the test wants")) } else { Ok(()) };
            Box::pin(async move { done })
        });
        Outgoing { draft: message(&bot(), body), effect: Some(effect) }
    };
    let bodies = ["one", "bad", "two"];
    let before = gateway.state(&room).await;
    let together = gateway.dag.send(&room, bodies.map(outgoing).into()).await;
    // It may pass, so the bridge tries again.
    assert!(together.iter().all(|sent| sent.as_ref().is_err_and(Refusal::is_transient)), "{together:?}");
    let mut said = Vec::new();
    for body in bodies {
        said.extend(gateway.dag.send(&room, vec![outgoing(body)]).await.into_iter().flatten());
    }
    assert_eq!(said.iter().map(|event| &event.content["body"]).collect::<Vec<_>>(), ["one", "two"]);
    assert_eq!(said[1].prev_events, std::slice::from_ref(&said[0].event_id));
    assert_eq!(said[1].depth, said[0].depth + 1);
    assert_eq!(gateway.state(&room).await, before);
}

#[tokio::test]
async fn times_in_the_future_become_now_and_foreign_senders_are_refused() {
    let gateway = Gateway::start(&[]).await;
    let room = gateway.room(RoomVersion::V12, "public").await;
    let late = Draft { origin_server_ts: NOW + 1, ..message(&bot(), "x") };
    let early = Draft { origin_server_ts: NOW - 5, ..message(&bot(), "x") };
    for (draft, ts) in [(late, NOW), (early, NOW - 5)] {
        let id = gateway.send(&room, draft).await.unwrap();
        assert_eq!(gateway.dag.event(&id).await.unwrap().unwrap().origin_server_ts, ts);
    }
    let alice: OwnedUserId = "@alice:peer.example".try_into().unwrap();
    assert_eq!(gateway.send(&room, message(&alice, "x")).await.unwrap_err().code(), "forbidden");
    let large = message(&bot(), &"x".repeat(70_000));
    assert_eq!(gateway.send(&room, large).await.unwrap_err().code(), "malformed");
    let float = draft(&bot(), "x", None, json!({ "x": 1.5 }));
    assert_eq!(gateway.send(&room, float).await.unwrap_err().code(), "malformed");
    assert!(gateway.dag.check(&room, &message(&bot(), "fine")).await.is_ok());
    assert!(gateway.dag.check(&room, &message(&ghost("x"), "not joined")).await.is_err());
}

#[tokio::test]
async fn a_server_is_sent_what_happens_while_it_is_in_the_room() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    let room = gateway.room(RoomVersion::V11, "public").await;
    gateway.send(&room, message(&bot(), "before")).await.unwrap();
    let alice = peer.user("alice");
    let mut view = peer.join(&gateway, &room, &alice).await.unwrap();
    gateway.send(&room, message(&bot(), "while")).await.unwrap();
    let kick = state("m.room.member", alice.as_str(), json!({ "membership": "leave" }));
    gateway.send(&room, kick).await.unwrap();
    gateway.send(&room, message(&bot(), "after")).await.unwrap();
    let sent = |rows: Vec<(i64, Option<String>)>| rows.into_iter().filter_map(|row| row.1).collect::<Vec<_>>();
    assert_eq!(sent(feed(&gateway, &room, &peer, 0).await), ["while", "leave"]);

    view = peer.join(&gateway, &room, &alice).await.unwrap_or(view);
    gateway.send(&room, message(&bot(), "again")).await.unwrap();
    assert_eq!(sent(feed(&gateway, &room, &peer, 0).await), ["while", "leave", "again"]);
    // A join through the gateway goes to the others, not to where it came from.
    let other = Peer::start("other.example").await;
    let gateway = gateway.restart(&[&peer, &other]);
    other.join(&gateway, &room, &other.user("carol")).await.unwrap();
    assert_eq!(sent(feed(&gateway, &room, &peer, 0).await).last().unwrap(), "join");
    assert!(sent(feed(&gateway, &room, &other, 0).await).is_empty());
    assert!(!view.tips.is_empty());
}

#[tokio::test]
async fn invites_are_signed_by_the_target_and_withdrawn_over_federation() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    for version in VERSIONS {
        peer.signs_invites(version);
        let room = gateway.room(version, "invite").await;
        let alice = peer.user("_isthmus");
        let invite = state("m.room.member", alice.as_str(), json!({ "membership": "invite" }));
        let event = gateway.dag.invite(&room, Outgoing { draft: invite, effect: None }).await.unwrap();
        assert_eq!(gateway.membership(&room, &alice).await.as_deref(), Some("invite"));
        let told = peer.memory.invite_states.lock().unwrap().pop().unwrap();
        let create = told.as_array().unwrap().iter().find(|event| event["type"] == "m.room.create").unwrap();
        assert_eq!(create.get("signatures").is_some(), version == RoomVersion::V12);
        assert!(gateway.inbox(&room).await.is_empty());
        let withdraw = state("m.room.member", alice.as_str(), json!({ "membership": "leave" }));
        gateway.send(&room, withdraw).await.unwrap();
        let sent: Vec<_> = feed(&gateway, &room, &peer, 0).await.into_iter().filter_map(|row| row.1).collect();
        assert_eq!(sent, ["leave"]);
        assert_eq!(event.state_key.as_deref(), Some(alice.as_str()));
    }
    // A server that does not sign is not invited.
    let silent = Peer::start("silent.example").await;
    let gateway = gateway.restart(&[&silent]);
    let room = gateway.room(RoomVersion::V12, "invite").await;
    let invite = state("m.room.member", silent.user("x").as_str(), json!({ "membership": "invite" }));
    let refused = gateway.dag.invite(&room, Outgoing { draft: invite, effect: None }).await.unwrap_err();
    assert_eq!(refused.code(), "remote");
    assert_eq!(gateway.membership(&room, &silent.user("x")).await, None);
}

/// Their server shows it to them while it signs, and they may be quicker than the signature.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn who_answers_an_invite_before_its_signature_is_here_is_not_turned_away() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    peer.signs_invites(RoomVersion::V11);
    let room = gateway.room(RoomVersion::V11, "invite").await;
    let alice = peer.user("alice");
    let answered = Arc::new(Mutex::new(None));
    let (dag, name, keeps) = (gateway.dag.clone(), peer.name.clone(), answered.clone());
    let (of, by) = (room.clone(), alice.clone());
    *peer.memory.meddler.lock().unwrap() = Some(Box::new(move |path, _| {
        if path.starts_with("v2/invite/") {
            let (dag, name, of, by) = (dag.clone(), name.clone(), of.clone(), by.clone());
            let join = async move { dag.make_join(&name, &of, &by, &["11".to_owned()]).await };
            *keeps.lock().unwrap() = Some(tokio::spawn(join));
            // Long enough for a refusal.
            tokio::task::block_in_place(|| std::thread::sleep(std::time::Duration::from_millis(300)));
        }
        None
    }));
    let invite = state("m.room.member", alice.as_str(), json!({ "membership": "invite" }));
    gateway.dag.invite(&room, Outgoing { draft: invite, effect: None }).await.unwrap();
    let answered = answered.lock().unwrap().take().unwrap();
    let template = answered.await.unwrap().unwrap();
    assert_eq!(template["event"]["content"]["membership"], "join");
    // Of whom nobody is asked, nobody waits.
    let refused = gateway.dag.make_join(&peer.name, &room, &peer.user("eve"), &["11".to_owned()]).await.unwrap_err();
    assert_eq!(refused.code(), "matrix_rule");
}

#[tokio::test]
async fn who_comes_back_while_something_is_on_its_way_is_owed_nothing_of_the_time_between() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    gateway.context.outbound.start().await.unwrap();
    let room = gateway.room(RoomVersion::V11, "public").await;
    let alice = peer.user("alice");
    let mut view = peer.join(&gateway, &room, &alice).await.unwrap();
    let (came, let_in) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (comes, waits) = (came.clone(), let_in.clone());
    *peer.front.lock().unwrap() = Some(Arc::new(move |request: axum::extract::Request, next| {
        let (comes, waits) = (comes.clone(), waits.clone());
        Box::pin(async move {
            if request.uri().path().contains("/send/") {
                comes.notify_one();
                waits.notified().await;
            }
            next.run(request).await
        })
    }));
    view.tips = vec![gateway.send(&room, message(&bot(), "while it is there")).await.unwrap()];
    came.notified().await;
    for (membership, said) in [("leave", Some("while it is away")), ("join", None)] {
        let content = json!({ "membership": membership });
        let (_, event) = view.add(&peer, &alice, "m.room.member", Some(alice.as_str()), content);
        assert_eq!(peer.put(&gateway.dag, &[&event]).await[0].result, Ok(()));
        assert_eq!(gateway.membership(&room, &alice).await.as_deref(), Some(membership));
        if let Some(said) = said {
            view.tips = vec![gateway.send(&room, message(&bot(), said)).await.unwrap()];
        }
    }
    let_in.notify_one();
    let owed = async || gateway.context.outbound.status().await.unwrap().iter().any(|queue| queue.waiting > 0);
    let settled = async {
        while owed().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(30), settled).await.is_ok(), "something waits for ever");
    let asked = peer.memory.asked.lock().unwrap();
    assert_eq!(asked.iter().filter(|asked| asked.contains("/send/")).count(), 1, "{asked:?}");
}

#[tokio::test]
async fn aliases_are_asked_of_their_servers() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    let target = gateway.dag.query_directory(&peer.name, "#a b:peer.example").await.unwrap();
    assert_eq!(target.room_id.as_str(), "!room:x");
}
