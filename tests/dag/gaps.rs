//! Events whose predecessors or auth events are not here yet.

use isthmus::event::{Object, RoomVersion};
use ruma::OwnedEventId;
use serde_json::json;

use super::peer::{Peer, View};
use super::*;

#[tokio::test]
async fn missing_events_are_fetched_and_taken_in_order() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    for version in VERSIONS {
        let room = gateway.room(version, "public").await;
        let alice = peer.user("alice");
        let mut view = peer.join(&gateway, &room, &alice).await.unwrap();
        let said: Vec<_> = (0..30).map(|number| view.say(&peer, &alice, &format!("{number}"))).collect();
        let (last, event) = said.last().unwrap();
        assert!(peer.put(&gateway.dag, &[event]).await[0].result.is_ok());
        let inbox = gateway.inbox(&room).await;
        let expected: Vec<_> = said.iter().map(|(id, _)| id.clone()).collect();
        assert_eq!(inbox[1..], expected);
        assert!(gateway.dag.event(last).await.unwrap().is_some());
    }
}

#[tokio::test]
async fn hc_48_a_message_that_outruns_its_join() {
    let (one, two) = (Peer::start("one.example").await, Peer::start("two.example").await);
    let gateway = Gateway::start(&[&one, &two]).await;
    let room = gateway.room(RoomVersion::V12, "public").await;
    let mut view = one.join(&gateway, &room, &one.user("alice")).await.unwrap();
    // Carol joined through the first server; the gateway hears of it only from her message.
    let carol = two.user("carol");
    let (join, event) = view.add(&two, &carol, "m.room.member", Some(carol.as_str()), json!({ "membership": "join" }));
    two.keep(&join, &event);
    let (hello, event) = view.say(&two, &carol, "hello");
    assert!(two.put(&gateway.dag, &[&event]).await[0].result.is_ok());
    assert_eq!(gateway.inbox(&room).await[1..], [join, hello]);
    assert_eq!(gateway.membership(&room, &carol).await.as_deref(), Some("join"));
}

#[tokio::test]
async fn a_gap_that_cannot_be_filled_is_bridged_by_the_state_at_its_edge() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    for version in VERSIONS {
        let room = gateway.room(version, "public").await;
        let alice = peer.user("alice");
        let mut view = peer.join(&gateway, &room, &alice).await.unwrap();
        let carol = peer.user("carol");
        for number in 0..5 {
            let (lost, _) = view.say(&peer, &alice, &format!("{number}"));
            peer.memory.hidden.lock().unwrap().insert(lost);
        }
        let (join, _) = view.add(&peer, &carol, "m.room.member", Some(carol.as_str()), json!({ "membership": "join" }));
        let (lost, _) = view.say(&peer, &alice, "lost too");
        peer.memory.hidden.lock().unwrap().insert(lost);
        let before = view.state.values().cloned().collect();
        let (edge, _) = view.say(&peer, &carol, "edge");
        peer.memory.states.lock().unwrap().insert(edge.clone(), before);
        let (last, event) = view.say(&peer, &carol, "last");
        let received = peer.put(&gateway.dag, &[&event]).await.remove(0);
        assert!(received.result.is_ok(), "{received:?} {:#?}", peer.memory.asked.lock().unwrap());
        assert!(gateway.dag.event(&last).await.unwrap().is_some());
        assert_eq!(gateway.inbox(&room).await[1..], [edge, last]);
        assert_eq!(gateway.membership(&room, &carol).await.as_deref(), Some("join"));
        assert_eq!(gateway.state(&room).await[&("m.room.member".to_owned(), carol.to_string())], join);
        let alone = "SELECT event_id, needed FROM dag_events WHERE room_id = $1 AND before_group IS NULL";
        let alone: Vec<(String, i64)> =
            sqlx::query_as(alone).bind(room.as_str()).fetch_all(gateway.context.store.reader()).await.unwrap();
        assert_eq!(alone, [(join.to_string(), 1)], "what came alone and the state has is never pruned");
    }
}

#[tokio::test]
async fn state_of_a_server_whose_keys_cannot_be_had_does_not_stop_a_room() {
    let (peer, gone) = (Peer::start("peer.example").await, Peer::start("gone.example").await);
    // The gateway cannot reach the second.
    let gateway = Gateway::start(&[&peer]).await;
    for version in VERSIONS {
        let room = gateway.room(version, "public").await;
        let alice = peer.user("alice");
        let mut view = peer.join(&gateway, &room, &alice).await.unwrap();
        let put = async |view: &View, id: &OwnedEventId, event: &Object, before: &View| {
            peer.memory.states.lock().unwrap().insert(id.clone(), before.state.values().cloned().collect());
            assert_eq!(view.tips, std::slice::from_ref(id));
            peer.put(&gateway.dag, &[event]).await.remove(0).result
        };
        let dave = gone.user("dave");
        let (join, event) =
            view.add(&gone, &dave, "m.room.member", Some(dave.as_str()), json!({ "membership": "join" }));
        peer.keep(&join, &event);
        assert!(peer.put(&gateway.dag, &[&event]).await[0].result.is_err());

        let before = view.clone();
        let (hello, event) = view.say(&peer, &alice, "hello");
        put(&view, &hello, &event, &before).await.unwrap();
        // What stands on such an event cannot be judged; what comes after that can.
        let before = view.clone();
        let kick = json!({ "membership": "leave" });
        let (kick, event) = view.add(&peer, &alice, "m.room.member", Some(dave.as_str()), kick);
        put(&view, &kick, &event, &before).await.unwrap_err();
        let before = view.clone();
        let (after, event) = view.say(&peer, &alice, "after");
        put(&view, &after, &event, &before).await.unwrap();
        let (last, event) = view.say(&peer, &alice, "last");
        assert!(peer.put(&gateway.dag, &[&event]).await[0].result.is_ok());

        assert_eq!(gateway.inbox(&room).await[1..], [hello, after, last]);
        assert_eq!(gateway.membership(&room, &dave).await, None);
        assert_eq!(gateway.membership(&room, &alice).await.as_deref(), Some("join"));
    }
}

#[tokio::test]
async fn a_gap_is_not_closed_with_a_state_that_lacks_what_the_rules_stand_on() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    let room = gateway.room(RoomVersion::V12, "public").await;
    let alice = peer.user("alice");
    let mut view = peer.join(&gateway, &room, &alice).await.unwrap();
    let (lost, _) = view.say(&peer, &alice, "lost");
    let mut before = view.state.clone();
    let levels = before.insert(("m.room.power_levels".to_owned(), String::new()), lost.clone()).unwrap();
    peer.memory.hidden.lock().unwrap().insert(lost);
    let (edge, event) = view.say(&peer, &alice, "edge");
    peer.memory.states.lock().unwrap().insert(edge.clone(), before.into_values().collect());
    assert!(peer.put(&gateway.dag, &[&event]).await[0].result.is_err());
    assert!(gateway.dag.event(&edge).await.unwrap().is_none());
    let state = gateway.state(&room).await;
    assert_eq!(state[&("m.room.power_levels".to_owned(), String::new())], levels);
}

#[tokio::test]
async fn what_nobody_has_is_refused_and_may_come_later() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    let room = gateway.room(RoomVersion::V11, "public").await;
    let alice = peer.user("alice");
    let mut view = peer.join(&gateway, &room, &alice).await.unwrap();
    let (lost, first) = view.say(&peer, &alice, "lost");
    peer.memory.hidden.lock().unwrap().insert(lost);
    let (second, event) = view.say(&peer, &alice, "second");
    assert!(peer.put(&gateway.dag, &[&event]).await[0].result.is_err());
    assert!(gateway.dag.event(&second).await.unwrap().is_none());
    let results = peer.put(&gateway.dag, &[&event, &first]).await;
    assert!(results.iter().all(|received| received.result.is_ok()));
    assert_eq!(gateway.inbox(&room).await.len(), 3);
}

#[tokio::test]
async fn hc_41_an_endless_chain_of_missing_events_ends() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    let room = gateway.room(RoomVersion::V12, "public").await;
    let alice = peer.user("alice");
    let mut view = peer.join(&gateway, &room, &alice).await.unwrap();
    let (hole, _) = view.say(&peer, &alice, "hole");
    peer.memory.hidden.lock().unwrap().insert(hole);
    for number in 0..600 {
        view.say(&peer, &alice, &format!("{number}"));
    }
    let (_, event) = view.say(&peer, &alice, "last");
    peer.memory.asked.lock().unwrap().clear();
    assert!(peer.put(&gateway.dag, &[&event]).await[0].result.is_err());
    let asked = peer.memory.asked.lock().unwrap().len();
    assert!(asked < 20, "{asked} requests");
    gateway.send(&room, message(&bot(), "fine")).await.unwrap();
}
