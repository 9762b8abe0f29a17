//! Forks: several events on the same one, states that differ, and what they are resolved to.

use isthmus::event::RoomVersion;
use serde_json::json;

use super::peer::Peer;
use super::*;

#[tokio::test]
async fn two_servers_speak_at_once_and_the_next_event_joins_the_branches() {
    let (one, two) = (Peer::start("one.example").await, Peer::start("two.example").await);
    let gateway = Gateway::start(&[&one, &two]).await;
    for version in VERSIONS {
        let room = gateway.room(version, "public").await;
        let (alice, carol) = (one.user("alice"), two.user("carol"));
        one.join(&gateway, &room, &alice).await.unwrap();
        let mut here = two.join(&gateway, &room, &carol).await.unwrap();
        let mut there = here.clone();
        let (a, first) = here.say(&one, &alice, "one");
        let (b, second) = there.say(&two, &carol, "two");
        assert!(one.put(&gateway.dag, &[&first]).await[0].result.is_ok());
        assert!(two.put(&gateway.dag, &[&second]).await[0].result.is_ok());
        let reply = gateway.send(&room, message(&bot(), "both")).await.unwrap();
        let mut prev = gateway.dag.event(&reply).await.unwrap().unwrap().prev_events.clone();
        prev.sort();
        let mut expected = [a, b];
        expected.sort();
        assert_eq!(prev, expected);
        let inbox = gateway.inbox(&room).await;
        assert_eq!(inbox.len(), 4);
    }
}

#[tokio::test]
async fn topics_set_at_once_are_resolved_the_same_in_either_order() {
    let peer = Peer::start("peer.example").await;
    for version in VERSIONS {
        let mut topics = Vec::new();
        let gateway = Gateway::start(&[&peer]).await;
        let room = gateway.room_of_moderators(version).await;
        let (alice, carol) = (peer.user("alice"), peer.user("carol"));
        peer.join(&gateway, &room, &alice).await.unwrap();
        let base = peer.join(&gateway, &room, &carol).await.unwrap();
        let branch = |sender: &UserId, topic: &str, ts: i64| {
            let mut event = base.next(sender, "m.room.topic", Some(""), json!({ "topic": topic }));
            event["origin_server_ts"] = json!(ts);
            peer.sign(version, event)
        };
        let early = branch(&alice, "early", NOW - 10);
        let late = branch(&carol, "late", NOW - 5);
        for order in [[&early, &late], [&late, &early]] {
            for (_, event) in order {
                assert!(peer.put(&gateway.dag, &[event]).await[0].result.is_ok());
            }
            topics.push(gateway.state(&room).await[&("m.room.topic".to_owned(), String::new())].clone());
        }
        // Mainline order puts the later one last: it wins.
        assert_eq!(topics, [late.0.clone(), late.0]);
        let next = gateway.send(&room, message(&bot(), "joined")).await.unwrap();
        assert_eq!(gateway.dag.event(&next).await.unwrap().unwrap().prev_events.len(), 2);
        let gateway = gateway.restart(&[&peer]);
        assert_eq!(gateway.state(&room).await[&("m.room.topic".to_owned(), String::new())], topics[0]);
    }
}

#[tokio::test]
async fn a_ban_wins_over_what_the_banned_do_at_the_same_time() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    for version in VERSIONS {
        let levels = state(
            "m.room.power_levels",
            "",
            json!({ "users_default": 50, "ban": 60,
            "users": if version == RoomVersion::V12 { json!({}) } else { json!({ (bot().as_str()): 100 }) } }),
        );
        let public = state("m.room.join_rules", "", json!({ "join_rule": "public" }));
        let room = gateway.room_with(version, vec![levels, public]).await;
        let mallory = peer.user("mallory");
        let mut view = peer.join(&gateway, &room, &mallory).await.unwrap();
        let ban = state("m.room.member", mallory.as_str(), json!({ "membership": "ban" }));
        gateway.send(&room, ban).await.unwrap();
        // Both were made on the event before the ban: allowed there, not by what the room is now.
        let (topic, event) = view.add(&peer, &mallory, "m.room.topic", Some(""), json!({ "topic": "mine" }));
        assert!(peer.put(&gateway.dag, &[&event]).await[0].result.is_ok());
        assert!(gateway.dag.event(&topic).await.unwrap().is_none());
        assert!(!gateway.state(&room).await.contains_key(&("m.room.topic".to_owned(), String::new())));
        assert!(!gateway.inbox(&room).await.contains(&topic));
        assert_eq!(gateway.membership(&room, &mallory).await.as_deref(), Some("ban"));
    }
}

#[tokio::test]
async fn own_events_are_built_on_all_extremities_so_that_no_branch_mutes_who_is_joined() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    for (version, forks) in
        [(RoomVersion::V12, 10), (RoomVersion::V12, 12), (RoomVersion::V10, 19), (RoomVersion::V11, 30)]
    {
        let room = gateway.room(version, "public").await;
        let (alice, ann) = (peer.user("alice"), ghost("ann"));
        let view = peer.join(&gateway, &room, &alice).await.unwrap();
        let join = draft(&ann, "m.room.member", Some(ann.as_str()), json!({ "membership": "join" }));
        let mut behind = vec![gateway.send(&room, join).await.unwrap()];
        // None of them knows that ann has come.
        let events: Vec<_> = (0..forks).map(|number| view.clone().say(&peer, &alice, &format!("{number}"))).collect();
        let received = peer.put(&gateway.dag, &events.iter().map(|(_, event)| event).collect::<Vec<_>>()).await;
        assert!(received.iter().all(|received| received.result.is_ok()));
        behind.extend(events.into_iter().map(|(id, _)| id));
        let hello = gateway.send(&room, message(&ann, "hello")).await.unwrap();
        let hello = gateway.dag.event(&hello).await.unwrap().unwrap();
        assert!(hello.prev_events.len() <= 20);
        assert_eq!(extremities(&gateway, &room).await, std::slice::from_ref(&hello.event_id));
        if forks < 20 {
            let mut prev = hello.prev_events.clone();
            prev.sort();
            behind.sort();
            assert_eq!(prev, behind);
        }
    }
}

/// What nothing follows, as it is stored.
async fn extremities(gateway: &Gateway, room: &RoomId) -> Vec<OwnedEventId> {
    isthmus::store::dag::room(&gateway.context.store, room).await.unwrap().unwrap().tips
}

#[tokio::test]
async fn the_branches_of_a_room_are_joined_before_they_are_many() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    for version in VERSIONS {
        let room = gateway.room_of_moderators(version).await;
        let alice = peer.user("alice");
        let view = peer.join(&gateway, &room, &alice).await.unwrap();
        let mut forks = Vec::new();
        for number in 0..100 {
            // Each with another state.
            let content = json!({ "topic": format!("{number}") });
            forks.push(view.clone().add(&peer, &alice, "m.room.topic", Some(&format!("{}", number % 7)), content));
            if forks.len() % 50 == 0 {
                let events: Vec<_> = forks[number - 49..].iter().map(|(_, event)| event).collect();
                assert!(peer.put(&gateway.dag, &events).await.iter().all(|received| received.result.is_ok()));
                let there = extremities(&gateway, &room).await.len();
                assert!(there <= 20, "{there} branches");
            }
        }
        // All of them are behind what is there now.
        let mut ahead = extremities(&gateway, &room).await;
        let mut behind: std::collections::BTreeSet<OwnedEventId> = ahead.iter().cloned().collect();
        while let Some(id) = ahead.pop() {
            let event = gateway.dag.event(&id).await.unwrap().unwrap();
            assert!(event.prev_events.len() <= 20);
            ahead.extend(event.prev_events.iter().filter(|id| behind.insert((*id).clone())).cloned());
        }
        assert!(forks.iter().all(|(id, _)| behind.contains(id)));
        // Nothing of the joining crosses.
        assert_eq!(gateway.inbox(&room).await.len(), 1 + forks.len());
    }
}

#[tokio::test]
async fn a_room_in_which_the_gateway_may_not_speak_has_bounded_branches_too() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    let alice = peer.user("alice");
    let public = state("m.room.join_rules", "", json!({ "join_rule": "public" }));
    let muted = json!({ "users": { alice.as_str(): 100 }, "events_default": 50 });
    let room = gateway.room_with(RoomVersion::V11, vec![public, state("m.room.power_levels", "", muted)]).await;
    let view = peer.join(&gateway, &room, &alice).await.unwrap();
    let mut forks = Vec::new();
    for number in 0..60 {
        let (id, event) = view.clone().say(&peer, &alice, &format!("{number}"));
        assert!(peer.put(&gateway.dag, &[&event]).await[0].result.is_ok());
        forks.push((id, event));
    }
    assert_eq!(extremities(&gateway, &room).await.len(), 50);
    let (left_out, event) = forks.last().unwrap();
    assert!(!gateway.inbox(&room).await.contains(left_out));
    // What follows it and a branch that is known brings it back.
    let mut view = view;
    view.note(forks[0].0.clone(), &forks[0].1);
    let mut next = view.next(&alice, "m.room.message", None, json!({ "body": "all" }));
    next["prev_events"] = json!([forks[0].0, left_out]);
    next["depth"] = json!(event["depth"].as_i64().unwrap() + 1);
    let (id, next) = peer.sign(RoomVersion::V11, next);
    assert!(peer.put(&gateway.dag, &[&next]).await[0].result.is_ok());
    assert!(gateway.inbox(&room).await.contains(&id));
    assert_eq!(extremities(&gateway, &room).await.len(), 50);
}
