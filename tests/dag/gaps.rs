//! Events whose predecessors or auth events are not here yet.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use isthmus::event::{Object, RoomVersion};
use isthmus::store::gaps::{self, Bounds, Gap, missing};
use ruma::{OwnedEventId, OwnedRoomId, RoomId};
use serde_json::{Value, json};

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

/// Of what alice of one server said another gives a copy that says something else, or nothing: the ID is the same, and the right one comes.
#[tokio::test]
async fn what_is_passed_on_with_another_content_is_asked_of_its_own_server() {
    for (way, version) in [("get_missing_events", VERSIONS[0]), ("backfill", VERSIONS[1]), ("send", VERSIONS[2])] {
        let (one, two) = (Peer::start("one.example").await, Peer::start("two.example").await);
        let gateway = Gateway::start(&[&one, &two]).await;
        if way == "backfill" {
            *two.memory.page.lock().unwrap() = Some((20, true));
            *two.memory.meddler.lock().unwrap() =
                Some(Box::new(|path, _| path.starts_with("v1/get_missing_events").then(|| json!({ "events": [] }))));
        }
        let room = gateway.room(version, "public").await;
        let (alice, carol) = (one.user("alice"), two.user("carol"));
        one.join(&gateway, &room, &alice).await.unwrap();
        let mut view = two.join(&gateway, &room, &carol).await.unwrap();
        // Her server gives it, or is away.
        for (content, is_away) in [(json!({ "body": "changed" }), false), (json!({}), false), (json!({}), true)] {
            let (said, right) = view.say(&one, &alice, "right");
            let mut changed = right.clone();
            changed["content"] = content;
            two.keep(&said, &changed);
            if is_away {
                one.memory.hidden.lock().unwrap().insert(said.clone());
            }
            let (after, event) = view.say(&two, &carol, "after");
            let events = if way == "send" { vec![&changed, &event] } else { vec![&event] };
            for received in two.put(&gateway.dag, &events).await {
                received.result.unwrap();
            }
            let taken = gateway.dag.event(&said).await.unwrap().unwrap();
            let expected = if is_away { json!({}) } else { right["content"].clone() };
            assert_eq!(Value::Object(taken.content.clone()), expected, "{way}");
            let inbox = gateway.inbox(&room).await;
            assert_eq!(inbox[inbox.len() - 2..], [said, after]);
        }
        // What was redacted in the meantime is rightly without content, and nobody is asked.
        let (said, event) = view.say(&one, &alice, "taken back");
        let mut stripped = event.clone();
        stripped["content"] = json!({});
        two.keep(&said, &stripped);
        let mut redacts = view.next(&alice, "m.room.redaction", None, json!({ "redacts": said }));
        redacts["redacts"] = json!(said);
        let (redaction, event) = one.sign(version, redacts);
        two.keep(&redaction, &event);
        view.note(redaction, &event);
        let (_, event) = view.say(&two, &carol, "after");
        if way != "send" {
            two.put(&gateway.dag, &[&event]).await.remove(0).result.unwrap();
            assert_eq!(gateway.dag.event(&said).await.unwrap().unwrap().content, Object::new());
            assert!(!one.memory.asked.lock().unwrap().iter().any(|asked| asked.contains(said.as_str())));
        }
    }
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

/// Waits until the bridge has got so many events of a room; these, without the join.
async fn come(gateway: &Gateway, room: &RoomId, count: usize) -> Vec<OwnedEventId> {
    let mut news = gateway.between.news.subscribe();
    let coming = async {
        loop {
            let inbox = gateway.inbox(room).await;
            if inbox.len() > count {
                return inbox[1..].to_vec();
            }
            news.changed().await.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(120), coming).await.expect("the events did not come")
}

/// Waits until nothing of a room is missing.
async fn whole(gateway: &Gateway, room: &RoomId) {
    for _ in 0..600 {
        if missing(&gateway.context.store, Some(room)).await.unwrap() == gaps::Missing::default() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{:?}", missing(&gateway.context.store, Some(room)).await);
}

/// A room with Alice of the peer in it, who has said so much of which the gateway knows nothing.
async fn said(peer: &Peer, gateway: &Gateway, count: usize) -> (OwnedRoomId, View, Vec<(OwnedEventId, Object)>) {
    let room = gateway.room(RoomVersion::V12, "public").await;
    let alice = peer.user("alice");
    let mut view = peer.join(gateway, &room, &alice).await.unwrap();
    let said = (0..count).map(|number| view.say(peer, &alice, &format!("{number}"))).collect();
    (room, view, said)
}

#[tokio::test]
async fn all_of_a_wide_gap_comes_however_little_the_server_gives_at_once() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    for backfills in [false, true] {
        *peer.memory.page.lock().unwrap() = Some((20, backfills));
        let (room, _, said) = said(&peer, &gateway, 301).await;
        assert_eq!(peer.put(&gateway.dag, &[&said[300].1]).await[0].result, Ok(()));
        let expected: Vec<_> = said.into_iter().map(|(id, _)| id).collect();
        assert_eq!(gateway.inbox(&room).await[1..], expected);
        assert_eq!(missing(&gateway.context.store, None).await.unwrap().count, 0);
    }
}

#[tokio::test]
async fn a_long_gap_with_a_hole_at_its_end_is_filled_in_the_background_and_the_hole_later() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    *peer.memory.page.lock().unwrap() = Some((20, true));
    let (room, mut view, said) = said(&peer, &gateway, 1_200).await;
    let (lost, _) = &said[0];
    peer.memory.hidden.lock().unwrap().insert(lost.clone());
    peer.memory.states.lock().unwrap().insert(said[1].0.clone(), view.state.values().cloned().collect());
    // What is acknowledged is kept, and what follows it at once needs no gap to be filled again.
    assert_eq!(peer.put(&gateway.dag, &[&said[1_199].1]).await[0].result, Ok(()));
    let (more, event) = view.say(&peer, &peer.user("alice"), "more");
    assert_eq!(peer.put(&gateway.dag, &[&event]).await[0].result, Ok(()));
    let mut expected: Vec<_> = said[1..].iter().map(|(id, _)| id.clone()).chain([more]).collect();
    assert_eq!(come(&gateway, &room, 1_200).await, expected);
    let row = loop {
        let row = missing(&gateway.context.store, Some(&room)).await.unwrap();
        if row.waiting == 0 {
            break row;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert_eq!((row.count, row.server.as_deref(), row.since), (1, Some("peer.example"), Some(gateway.now())));

    // It is asked for again.
    peer.memory.hidden.lock().unwrap().clear();
    let gateway = gateway.restart(&[&peer]);
    gateway.dag.resume().await.unwrap();
    expected.push(lost.clone());
    assert_eq!(come(&gateway, &room, 1_201).await, expected);
    whole(&gateway, &room).await;
}

#[tokio::test]
async fn a_long_gap_is_gone_on_with_after_a_restart_in_the_middle() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    *peer.memory.page.lock().unwrap() = Some((20, false));
    let (room, _, said) = said(&peer, &gateway, 1_100).await;
    let asked = AtomicUsize::new(0);
    // It goes away when most of it was fetched for the second time.
    *peer.memory.meddler.lock().unwrap() = Some(Box::new(move |path, _| {
        let is_asked = path.starts_with("v1/get_missing_events") || path.starts_with("v1/event/");
        let away = is_asked && asked.fetch_add(1, Ordering::SeqCst) > 80;
        away.then(|| json!({ "errcode": "M_UNKNOWN", "error": "away" }))
    }));
    assert_eq!(peer.put(&gateway.dag, &[&said[1_099].1]).await[0].result, Ok(()));
    assert_eq!(gateway.inbox(&room).await.len(), 1);
    assert_eq!(missing(&gateway.context.store, Some(&room)).await.unwrap().waiting, 1);
    while gaps::due(&gateway.context.store, &room, i64::MAX).await.unwrap()[0].tries == 0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let gateway = gateway.restart(&[&peer]);
    *peer.memory.meddler.lock().unwrap() = None;
    gateway.dag.resume().await.unwrap();
    let expected: Vec<_> = said.into_iter().map(|(id, _)| id).collect();
    assert_eq!(come(&gateway, &room, 1_100).await, expected);
    whole(&gateway, &room).await;
}

#[tokio::test]
async fn each_of_many_edges_is_closed_and_what_follows_them_all_is_kept() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    let (room, base, _) = said(&peer, &gateway, 0).await;
    let alice = peer.user("alice");
    let state: Vec<OwnedEventId> = base.state.values().cloned().collect();
    let (mut edges, mut last) = (Vec::new(), base.clone());
    for number in 0..30 {
        let mut branch = base.clone();
        let (lost, _) = branch.say(&peer, &alice, &format!("lost {number}"));
        let (edge, _) = branch.say(&peer, &alice, &format!("edge {number}"));
        peer.memory.hidden.lock().unwrap().insert(lost);
        peer.memory.states.lock().unwrap().insert(edge.clone(), state.clone());
        edges.push(edge);
    }
    let mut joined = Vec::new();
    for part in edges.chunks(15) {
        last.tips = part.to_vec();
        joined.push(last.say(&peer, &alice, "half").0);
    }
    last.tips = joined.clone();
    let (all, event) = last.say(&peer, &alice, "all");
    assert_eq!(peer.put(&gateway.dag, &[&event]).await[0].result, Ok(()));
    let come = come(&gateway, &room, 33).await;
    assert_eq!(come.last(), Some(&all));
    for id in edges.iter().chain(&joined) {
        assert!(come.contains(id));
    }
    let mut row = missing(&gateway.context.store, Some(&room)).await.unwrap();
    while (row.count, row.waiting) != (30, 0) {
        tokio::time::sleep(Duration::from_millis(50)).await;
        row = missing(&gateway.context.store, Some(&room)).await.unwrap();
    }
}

#[tokio::test]
async fn what_nobody_gives_now_is_tried_again_so_often_and_no_more() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    let (room, mut view, said) = said(&peer, &gateway, 2).await;
    peer.memory.hidden.lock().unwrap().insert(said[0].0.clone());
    assert!(peer.put(&gateway.dag, &[&said[1].1]).await[0].result.is_err());
    assert_eq!(missing(&gateway.context.store, Some(&room)).await.unwrap().waiting, 1);
    // Each start tries all that waits.
    let mut gateway = gateway;
    for tries in 1..14 {
        gateway = gateway.restart(&[&peer]);
        gateway.dag.resume().await.unwrap();
        let tried =
            async || gaps::due(&gateway.context.store, &room, i64::MAX).await.unwrap().first().map(|gap| gap.tries);
        while tried().await == Some(tries - 1) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    gateway = gateway.restart(&[&peer]);
    gateway.dag.resume().await.unwrap();
    whole(&gateway, &room).await;
    assert_eq!(gateway.inbox(&room).await.len(), 1);
    // And it is taken with the next that brings it.
    peer.memory.hidden.lock().unwrap().clear();
    let (next, event) = view.say(&peer, &peer.user("alice"), "next");
    assert_eq!(peer.put(&gateway.dag, &[&event]).await[0].result, Ok(()));
    assert_eq!(gateway.inbox(&room).await[1..], [said[0].0.clone(), said[1].0.clone(), next]);
}

/// Has so many events of a server wait in a room for a time that does not come.
async fn wait_for_ever(gateway: &Gateway, room: &RoomId, server: &Peer, count: i64) {
    let bounds = Bounds { of_server: count, of_server_in_all: 10 * count, of_room: count, closed: count };
    let (store, room, server) = (gateway.context.store.clone(), room.to_owned(), server.name.clone());
    let keep = gateway.context.store.write(move |tx| {
        Box::pin(async move {
            for number in 0..count {
                let gap = Gap {
                    event_id: format!("${number:0>43}").as_str().try_into().unwrap(),
                    server: server.clone(),
                    json: Some(b"{}".to_vec()),
                    missing: 1,
                    noticed_ts: NOW,
                    tries: 0,
                    retry_at: i64::MAX,
                    last_error: String::new(),
                };
                assert!(gaps::keep(&store, tx, &room, &gap, &[], bounds).await?);
            }
            Ok(())
        })
    });
    keep.await.unwrap();
}

#[tokio::test]
async fn what_cannot_wait_for_a_long_gap_is_taken_with_the_state_before_it() {
    let (peer, other) = (Peer::start("peer.example").await, Peer::start("other.example").await);
    // Of its own server too many wait, or of all servers.
    for (server, count) in [(&peer, 50), (&other, 200)] {
        let gateway = Gateway::start(&[&peer]).await;
        let (room, view, said) = said(&peer, &gateway, 1_200).await;
        wait_for_ever(&gateway, &room, server, count).await;
        let (last, event) = said.last().unwrap();
        let state = view.state.values().cloned().collect();
        peer.memory.states.lock().unwrap().insert(last.clone(), state);
        assert_eq!(peer.put(&gateway.dag, &[event]).await[0].result, Ok(()));
        assert!(gateway.dag.event(last).await.unwrap().is_some());
        let row = missing(&gateway.context.store, Some(&room)).await.unwrap();
        assert_eq!((row.count, row.waiting), (count + 1, count));
        // Where its server does not say the state, it is refused by its ID.
        let mut branch = View { tips: vec![said[1_150].0.clone()], ..view };
        let (_, event) = branch.say(&peer, &peer.user("alice"), "beside");
        let refused = peer.put(&gateway.dag, &[&event]).await.remove(0).result.unwrap_err();
        assert!(refused.to_string().contains("missing prev_events"), "{refused}");
    }
}

#[tokio::test]
async fn who_has_nobody_in_the_room_is_told_that_an_event_does_not_wait_for_what_is_before_it() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    let (room, _, said) = said(&peer, &gateway, 2).await;
    peer.memory.hidden.lock().unwrap().insert(said[0].0.clone());
    let kick = state("m.room.member", peer.user("alice").as_str(), json!({ "membership": "leave" }));
    gateway.send(&room, kick).await.unwrap();
    // Its server has not heard of that.
    let (last, event) = &said[1];
    let refused = peer.put(&gateway.dag, &[event]).await.remove(0).result.unwrap_err().to_string();
    for said in ["peer.example has nobody in the room", "missing prev_events", said[0].0.as_str()] {
        assert!(refused.contains(said), "{refused}");
    }
    assert!(gateway.dag.event(last).await.unwrap().is_none());
    assert_eq!(missing(&gateway.context.store, None).await.unwrap().count, 0);
}

#[tokio::test]
async fn what_is_missing_before_an_event_is_written_down_with_the_event_or_it_is_not_taken() {
    let peer = Peer::start("peer.example").await;
    let gateway = Gateway::start(&[&peer]).await;
    let (room, view, said) = said(&peer, &gateway, 2).await;
    let [(lost, _), (edge, event)] = &said[..] else { panic!("{said:?}") };
    peer.memory.hidden.lock().unwrap().insert(lost.clone());
    peer.memory.states.lock().unwrap().insert(edge.clone(), view.state.values().cloned().collect());
    let refuse = async |sql: &'static str| {
        let write = gateway.context.store.write(move |tx| {
            Box::pin(async move {
                sqlx::query(sql).execute(tx).await?;
                Ok(())
            })
        });
        write.await.unwrap();
    };
    refuse(
        "CREATE TRIGGER test_full BEFORE INSERT ON dag_gaps WHEN NEW.json IS NULL \
         BEGIN SELECT RAISE(ABORT, 'as if the disk were full'); END",
    )
    .await;
    assert!(peer.put(&gateway.dag, &[event]).await[0].result.is_err());
    assert!(gateway.dag.event(edge).await.unwrap().is_none(), "taken, and nobody would ask for what is missing");
    refuse("DROP TRIGGER test_full").await;
    assert_eq!(peer.put(&gateway.dag, &[event]).await[0].result, Ok(()));
    assert!(gateway.dag.event(edge).await.unwrap().is_some());
    let row = missing(&gateway.context.store, Some(&room)).await.unwrap();
    assert_eq!((row.count, row.waiting), (1, 0));
}
