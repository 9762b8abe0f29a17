//! What brings a log back into step with its graph, and where that ends.

use super::*;

#[tokio::test]
async fn what_parted_while_nobody_looked_is_corrected_when_the_room_is_loaded() {
    let peer = Peer::start("graph.example").await;
    let hub = Hub::start(&[&peer]).await;
    let room = hub.room().await;
    peer.join(&hub.gateway, &room, &peer.user("alice")).await.unwrap();
    hub.gateway.send(&room, state("m.room.topic", "", json!({ "topic": "one" }))).await.unwrap();
    let hub = hub.restart(&[&peer]);
    // As if the last event had never come to the log.
    {
        let mut logs = hub.logs.logs.lock().unwrap();
        let log = logs.get_mut(&room).unwrap();
        log.events.pop();
        log.state.remove(&("m.room.topic".to_owned(), String::new()));
    }
    // The room's task compares before anything else.
    hub.gateway.send(&room, message(&bot(), "loaded")).await.unwrap();
    assert_eq!(hub.says(&room, "m.room.topic", "").await["topic"], "one");
    hub.assert_in_step(&room).await;
}

#[tokio::test]
async fn corrections_end_and_what_is_left_is_told_and_tried_again() {
    let peer = Peer::start("graph.example").await;
    let hub = Hub::start(&[&peer]).await;
    let room = hub.room().await;
    let alice = peer.user("alice");
    let base = peer.join(&hub.gateway, &room, &alice).await.unwrap();
    // Each is older than the one before, so that the first stays what the graph has.
    let mut corrected = 0;
    for number in 0..6_i64 {
        let topic = draft(&alice, "m.room.topic", Some(""), json!({ "topic": number }));
        let topic = Draft { origin_server_ts: NOW - number, ..topic };
        assert!(hub.pdu(&peer, &mut base.clone(), &topic).await);
        corrected = hub
            .log(&room)
            .await
            .events
            .iter()
            .filter(|(event, _)| event.sender == bot() && event.kind == "m.room.topic")
            .count();
    }
    assert_eq!(corrected, 3);
    let left = hub.gateway.dag.uncorrected(&room).await.unwrap();
    assert_eq!(left.len(), 1, "{left:?}");
    assert_eq!(left[0].0, ("m.room.topic".to_owned(), String::new()));
    hub.log(&room).await.assert_sound();
    hub.gateway.clock.advance(61_000);
    hub.gateway.send(&room, message(&bot(), "next")).await.unwrap();
    hub.assert_in_step(&room).await;
}

#[tokio::test]
async fn without_the_power_to_correct_the_room_says_what_is_out_of_step() {
    let peer = Peer::start("graph.example").await;
    let hub = Hub::start(&[&peer]).await;
    let alice = peer.user("alice");
    let levels = json!({ "users": { (bot().as_str()): 100 }, "users_default": 50, "events": { "m.room.topic": 50 } });
    let public = state("m.room.join_rules", "", json!({ "join_rule": "public" }));
    let initial_state = vec![state("m.room.power_levels", "", levels), public];
    let room = hub.gateway.dag.create(NewShared { creator: bot(), version: LM, initial_state }).await.unwrap();
    peer.join(&hub.gateway, &room, &alice).await.unwrap();
    // The bot gives its power away.
    let levels = json!({ "users": { (bot().as_str()): 0, (alice.as_str()): 100 }, "users_default": 0 });
    hub.gateway.send(&room, state("m.room.power_levels", "", levels)).await.unwrap();
    let base = hub.view(&room).await;
    for number in 0..2_i64 {
        let topic = draft(&alice, "m.room.topic", Some(""), json!({ "topic": number }));
        assert!(hub.pdu(&peer, &mut base.clone(), &Draft { origin_server_ts: NOW - number, ..topic }).await);
    }
    let left = hub.gateway.dag.uncorrected(&room).await.unwrap();
    assert_eq!(left.len(), 1, "{left:?}");
    assert!(left[0].1.contains("power") || left[0].1.contains("level"), "{left:?}");
    // Who has the power says it anew, and it is right again.
    let mut view = hub.view(&room).await;
    let topic = draft(&alice, "m.room.topic", Some(""), json!({ "topic": "new" }));
    assert!(hub.pdu(&peer, &mut view, &topic).await);
    hub.assert_in_step(&room).await;
}

#[tokio::test]
async fn who_came_in_a_gap_is_in_the_log_and_not_kicked() {
    for real in [false, true] {
        let peer = Peer::start("graph.example").await;
        let hub = if real { Hub::real(&[&peer]).await } else { Hub::start(&[&peer]).await };
        let room = hub.room().await;
        let (alice, carol) = (peer.user("alice"), peer.user("carol"));
        peer.join(&hub.gateway, &room, &alice).await.unwrap();
        let mut view = hub.view(&room).await;
        let (lost, _) = view.say(&peer, &alice, "lost");
        let (join, join_event) =
            view.add(&peer, &carol, "m.room.member", Some(carol.as_str()), json!({ "membership": "join" }));
        let (lost_too, _) = view.say(&peer, &alice, "lost too");
        peer.memory.hidden.lock().unwrap().extend([lost, lost_too]);
        let before = view.state.values().cloned().collect();
        let (edge, event) = view.say(&peer, &carol, "edge");
        peer.memory.states.lock().unwrap().insert(edge.clone(), before);
        assert!(peer.put(&hub.gateway.dag, &[&event]).await[0].result.is_ok());
        assert!(hub.gateway.dag.event(&edge).await.unwrap().is_some());
        assert_eq!(hub.gateway.membership(&room, &carol).await.as_deref(), Some("join"));
        let ids = hub.log(&room).await.ids();
        assert_eq!(ids[ids.len() - 2..], [join.clone(), edge]);
        hub.assert_in_step(&room).await;
        // It comes again by itself, and is not there twice.
        peer.put(&hub.gateway.dag, &[&join_event]).await;
        assert_eq!(hub.log(&room).await.ids().iter().filter(|id| **id == join).count(), 1);
        hub.assert_in_step(&room).await;
    }
}

#[tokio::test]
async fn what_came_in_a_gap_is_not_in_the_log_when_what_follows_it_is_refused() {
    for (real, rejected) in [(false, false), (false, true), (true, false), (true, true)] {
        let peer = Peer::start("graph.example").await;
        let hub = if real { Hub::real(&[&peer]).await } else { Hub::start(&[&peer]).await };
        let room = hub.room().await;
        let (alice, dora) = (peer.user("alice"), peer.user("dora"));
        peer.join(&hub.gateway, &room, &alice).await.unwrap();
        peer.join(&hub.gateway, &room, &dora).await.unwrap();
        let mut view = hub.view(&room).await;
        // Those of whom the peer does not know it yet may not speak any more.
        hub.gateway.send(&room, member(&bot(), &dora, "leave")).await.unwrap();
        let log = hub.log(&room).await.ids();
        let (lost, _) = view.say(&peer, &alice, "lost");
        let (topic, _) = view.add(&peer, &alice, "m.room.topic", Some(""), json!({ "topic": "in the gap" }));
        let (lost_too, _) = view.say(&peer, &alice, "lost too");
        peer.memory.hidden.lock().unwrap().extend([lost, lost_too]);
        let before = view.state.values().cloned().collect();
        let mut after = view.clone();
        let (edge, event) = match rejected {
            true => view.add(&peer, &alice, "m.room.member", Some(bot().as_str()), json!({ "membership": "ban" })),
            false => view.say(&peer, &dora, "too late"),
        };
        peer.memory.states.lock().unwrap().insert(edge.clone(), before);
        peer.put(&hub.gateway.dag, &[&event]).await;
        assert!(hub.gateway.dag.event(&edge).await.unwrap().is_none());
        assert!(
            !isthmus::store::dag::events(&hub.gateway.context.store, std::slice::from_ref(&edge))
                .await
                .unwrap()
                .is_empty(),
            "it is kept"
        );
        assert_eq!(hub.log(&room).await.ids(), log);
        hub.assert_in_step(&room).await;
        // What the room takes after it brings what was in the gap, as it was said.
        after.tips = vec![edge];
        let (next, event) = after.say(&peer, &alice, "next");
        assert_eq!(peer.put(&hub.gateway.dag, &[&event]).await[0].result, Ok(()));
        assert_eq!(hub.log(&room).await.ids(), [log, vec![topic, next]].concat());
        hub.assert_in_step(&room).await;
    }
}
