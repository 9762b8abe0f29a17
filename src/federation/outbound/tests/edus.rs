//! EDUs: with the events of the next transaction or alone, and never at the cost of an event.

use super::*;
use crate::event::{ToDevice, Typing};

fn typing(typing: bool) -> Edu {
    Edu::Typing(Typing {
        room_id: "!r:g.example".try_into().unwrap(),
        user_id: "@u:g.example".try_into().unwrap(),
        typing,
    })
}

fn edus(seen: &Seen) -> Vec<serde_json::Value> {
    seen.body.get("edus").and_then(|edus| edus.as_array()).cloned().unwrap_or_default()
}

#[tokio::test]
async fn edus_go_alone_in_the_shape_that_the_destination_knows_and_nothing_is_stored() {
    let (_directory, store) = sqlite().await;
    let mut world = World::new(&store, &Arc::new(Feeds::default()), |_, _, _| ok());
    world.queues.start().await.unwrap();
    world.queues.send_edu(Side::Matrix, [name("a.example")], &typing(true));
    let seen = world.next().await;
    assert!(seen.uri.starts_with("/_matrix/federation/v1/send/") && seen.numbers().is_empty(), "{seen:?}");
    assert_eq!(edus(&seen), [serde_json::Value::from(typing(true).to_matrix())]);
    // By the LM `send` a server that does both protocols gets Matrix's shape too, one that does LM alone the draft's.
    for (destination, shape) in [("b.example", typing(true).to_matrix()), ("eigen.example", typing(true).to_lm())] {
        world.queues.send_edu(Side::Lm, [name(destination)], &typing(true));
        let seen = world.next().await;
        assert!(seen.uri.starts_with("/_matrix/federation/unstable/"), "{seen:?}");
        assert_eq!(edus(&seen), [serde_json::Value::from(shape)]);
    }
    assert!(rows::inflight_destinations(&store).await.unwrap().is_empty());
    world.queues.stop().await;
}

#[tokio::test]
async fn edus_go_with_events_and_what_was_said_meanwhile_is_the_newest() {
    let (_directory, store) = sqlite().await;
    let (feeds, log) = one_log(&store, 1..2, &["a.example"]).await;
    let (open, gate) = tokio::sync::watch::channel(false);
    let mut world = World::new(&store, &feeds, move |_, _, _| {
        let mut gate = gate.clone();
        Box::pin(async move {
            gate.wait_for(|open| *open).await.unwrap();
            ok().await
        })
    });
    world.queues.start().await.unwrap();
    assert_eq!(world.next().await.numbers(), [1]);
    // While that is on its way.
    fill(&store, &feeds, &log, 2..4, &[]).await;
    world.queues.wake(&log, &[name("a.example")]);
    for is_typing in [true, false, true, false] {
        world.queues.send_edu(Side::Lm, [name("a.example")], &typing(is_typing));
    }
    open.send(true).unwrap();
    let seen = world.next().await;
    assert_eq!((seen.numbers(), edus(&seen)), (vec![2, 3], vec![typing(false).to_matrix().into()]));
    world.settled().await;
    world.queues.stop().await;
}

#[tokio::test]
async fn hc_60_edus_cost_no_event_and_make_no_destination_fail() {
    let (_directory, store) = sqlite().await;
    let (feeds, log) = one_log(&store, 1..2, &["a.example"]).await;
    // It fails whenever it gets an EDU.
    let mut world = World::new(&store, &feeds, |_, _, body| match body.contains_key("edus") {
        true => status(500),
        false => ok(),
    });
    world.queues.send_edu(Side::Lm, [name("a.example")], &typing(true));
    world.queues.start().await.unwrap();
    world.queues.wake(&log, &[name("a.example")]);
    let first = world.next().await;
    assert_eq!((first.numbers(), edus(&first).len()), (vec![1], 1));
    // The same events again, without what will be old by then: another transaction.
    let second = world.next().await;
    assert_eq!((second.numbers(), edus(&second).len()), (vec![1], 0));
    assert_ne!(second.txn_id(), first.txn_id());
    world.settled().await;
    // For a while it gets none, alone or with others; events go on.
    world.queues.send_edu(Side::Lm, [name("a.example")], &typing(true));
    fill(&store, &feeds, &log, 2..3, &[]).await;
    world.queues.wake(&log, &[name("a.example")]);
    let third = world.next().await;
    assert_eq!((third.numbers(), edus(&third).len()), (vec![2], 0));
    world.settled().await;

    // One that fails with EDUs alone does not count as failing.
    world.queues.send_edu(Side::Lm, [name("b.example")], &typing(true));
    assert_eq!(edus(&world.next().await).len(), 1);
    fill(&store, &feeds, &feed(FeedKind::Log, "!b:g.example"), 7..8, &["b.example"]).await;
    world.queues.wake(&feed(FeedKind::Log, "!b:g.example"), &[name("b.example")]);
    assert_eq!(world.next().await.numbers(), [7]);
    world.settled().await;
    world.queues.stop().await;
}

#[tokio::test]
async fn hc_60_a_refusal_of_edus_is_none_of_the_event_that_they_go_with() {
    for code in [400, 403, 413, 500] {
        let (_directory, store) = sqlite().await;
        let (feeds, _) = one_log(&store, 1..2, &["a.example"]).await;
        let (open, gate) = tokio::sync::watch::channel(false);
        let answered = Mutex::new(BTreeSet::new());
        // What it has answered once it answers again, whatever comes under that ID.
        let mut world = World::new(&store, &feeds, move |_, uri, body| match body.contains_key("edus") {
            true => {
                lock(&answered).insert(uri.to_owned());
                status(code)
            }
            false if lock(&answered).contains(uri) => status(code),
            false => {
                let mut gate = gate.clone();
                Box::pin(async move {
                    gate.wait_for(|open| *open).await.unwrap();
                    ok().await
                })
            }
        });
        world.queues.send_edu(Side::Lm, [name("a.example")], &typing(true));
        world.queues.start().await.unwrap();
        let first = world.next().await;
        assert_eq!((first.numbers(), edus(&first).len()), (vec![1], 1));
        let second = world.next().await;
        assert_eq!((second.numbers(), edus(&second).len()), (vec![1], 0), "{code}");
        assert_ne!(second.txn_id(), first.txn_id(), "{code}");
        assert!(world.queues.status().await.unwrap().iter().all(|queue| queue.failures == 0), "it does not fail");
        open.send(true).unwrap();
        world.settled().await;
        world.queues.stop().await;
        assert_eq!(*lock(&feeds.told), [(vec![1], Object::new())], "{code}: what its owner is told");
        // An answer without EDUs counts.
        let (_directory, store) = sqlite().await;
        let (feeds, _) = one_log(&store, 1..3, &["b.example"]).await;
        let world = World::new(&store, &feeds, move |_, _, _| if code == 500 { ok() } else { status(code) });
        world.queues.send_edu(Side::Lm, [name("b.example")], &typing(true));
        world.queues.start().await.unwrap();
        world.settled().await;
        let told = lock(&feeds.told).iter().map(|(positions, _)| positions.len()).sum::<usize>();
        assert_eq!(told, 2);
        world.queues.stop().await;
    }
}

/// There are hubs that know an LPDU again by nothing but the transaction that it came in, which is another one without EDUs.
#[tokio::test]
async fn edus_go_with_no_event_that_is_for_a_hub_to_finish() {
    let (_directory, store) = sqlite().await;
    let feeds = Arc::new(Feeds::default());
    let lpdus = feed(FeedKind::Lpdus, "!a:a.example");
    fill(&store, &feeds, &lpdus, 1..3, &["a.example"]).await;
    let mut world = World::new(&store, &feeds, |_, _, _| ok());
    world.queues.send_edu(Side::Lm, [name("a.example")], &typing(true));
    world.queues.start().await.unwrap();
    world.queues.wake(&lpdus, &[name("a.example")]);
    let (first, second) = (world.next().await, world.next().await);
    assert_eq!((first.numbers(), edus(&first).len()), (vec![1, 2], 0));
    assert_eq!((second.numbers(), edus(&second).len()), (vec![], 1));
    world.settled().await;
    world.queues.stop().await;
}

#[tokio::test]
async fn hc_60_who_does_not_answer_edus_gets_its_events() {
    let (_directory, store) = sqlite().await;
    let feeds = Arc::new(Feeds::default());
    let mut world = World::new(&store, &feeds, |_, _, body| match body.contains_key("edus") {
        true => never(),
        false => ok(),
    });
    world.queues.start().await.unwrap();
    world.queues.send_edu(Side::Lm, [name("a.example")], &typing(true));
    assert_eq!(edus(&world.next().await).len(), 1);
    let log = feed(FeedKind::Log, "!a:g.example");
    fill(&store, &feeds, &log, 1..2, &["a.example"]).await;
    world.queues.wake(&log, &[name("a.example")]);
    let start = Instant::now();
    assert_eq!(world.next().await.numbers(), [1]);
    assert!(start.elapsed() < Duration::from_secs(5));
    world.settled().await;
    world.queues.stop().await;
}

#[tokio::test]
async fn what_is_said_while_a_destination_is_left_alone_is_dropped() {
    let (_directory, store) = sqlite().await;
    let (feeds, _) = one_log(&store, 1..2, &["a.example"]).await;
    let away = Arc::new(AtomicBool::new(true));
    let is_away = away.clone();
    let mut world = World::new(&store, &feeds, move |_, _, _| match is_away.load(Ordering::SeqCst) {
        true => unreachable(),
        false => ok(),
    });
    // Who is away says nothing of the EDU that it should have got.
    world.queues.send_edu(Side::Lm, [name("a.example")], &typing(true));
    world.queues.start().await.unwrap();
    assert_eq!(edus(&world.next().await).len(), 1);
    let failing = async {
        while world.queues.status().await.unwrap().iter().all(|queue| queue.failures == 0) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(WAIT, failing).await.unwrap();
    world.queues.send_edu(Side::Lm, [name("a.example")], &typing(true));
    away.store(false, Ordering::SeqCst);
    world.queues.retry(&name("a.example"));
    let seen = world.next().await;
    assert_eq!((seen.numbers(), edus(&seen).len()), (vec![1], 0));
    world.settled().await;
    world.queues.send_edu(Side::Lm, [name("a.example")], &typing(false));
    assert_eq!(edus(&world.next().await).len(), 1, "it is back");
    world.queues.stop().await;
}

/// A message for a device.
fn message(id: &str) -> Edu {
    Edu::ToDevice(Box::new(ToDevice {
        sender: "@u:g.example".try_into().unwrap(),
        message_id: Some(id.to_owned()),
        kind: "m.room.encrypted".to_owned(),
        target: "@bob:a.example".try_into().unwrap(),
        device: "D".to_owned(),
        content: json!({ "ciphertext": id }).as_object().unwrap().clone(),
    }))
}

async fn keep(store: &Store, side: Side, destination: &str, ids: &[&str]) {
    let (destination, edus) = (name(destination), ids.iter().map(|id| message(id)).collect::<Vec<_>>());
    let write = store.write(move |tx| {
        Box::pin(async move {
            for edu in &edus {
                OutboundQueues::keep_edu(tx, side, &destination, edu).await?;
            }
            Ok(())
        })
    });
    write.await.unwrap();
}

#[tokio::test]
async fn inv_6_messages_for_devices_survive_a_crash_with_the_same_transaction() {
    both_stores(|store| async move {
        let feeds = Arc::new(Feeds::default());
        keep(&store, Side::Matrix, "a.example", &["1", "2"]).await;
        let mut world = World::new(&store, &feeds, |_, _, _| never());
        world.queues.start().await.unwrap();
        let first = world.next().await;
        let expected = [message("1"), message("2")].map(|edu| serde_json::Value::from(edu.to_matrix()));
        assert_eq!(edus(&first), expected);
        keep(&store, Side::Matrix, "a.example", &["3"]).await;
        drop(world);

        let mut world = World::new(&store, &feeds, |_, _, _| ok());
        world.queues.start().await.unwrap();
        let again = world.next().await;
        assert_eq!((again.txn_id(), edus(&again)), (first.txn_id(), edus(&first)));
        let rest = world.next().await;
        assert_eq!(edus(&rest), [serde_json::Value::from(message("3").to_matrix())]);
        world.settled().await;
        let left = crate::store::outbound_edus::range(&store, "matrix_edus", &name("a.example"), 0, 99, 99).await;
        assert_eq!(left.unwrap(), []);
        world.queues.stop().await;
    })
    .await;
}

#[tokio::test]
async fn hc_20_messages_and_what_may_be_lost_are_a_hundred_together() {
    let (_directory, store) = sqlite().await;
    let (feeds, log) = one_log(&store, 1..3, &["eigen.example"]).await;
    let ids: Vec<String> = (0..60).map(|n| n.to_string()).collect();
    keep(&store, Side::Lm, "eigen.example", &ids.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let mut world = World::new(&store, &feeds, |_, _, _| answer(json!({ "failed_pdus": {} })));
    for user in 0..200 {
        let user_id = format!("@u{user}:g.example").try_into().unwrap();
        let typing = Typing { room_id: "!r:g.example".try_into().unwrap(), user_id, typing: true };
        world.queues.send_edu(Side::Lm, [name("eigen.example")], &Edu::Typing(typing));
    }
    world.queues.start().await.unwrap();
    world.queues.wake(&log, &[name("eigen.example")]);
    let (mut messages, mut others) = (Vec::new(), 0);
    while messages.len() < 60 || others < 200 {
        let seen = world.next().await;
        let edus = edus(&seen);
        assert!(edus.len() <= 100, "{}", edus.len());
        for edu in edus {
            match edu["type"].as_str().unwrap() {
                "m.direct_to_device" => {
                    messages.push(edu["content"]["message"]["ciphertext"].as_str().unwrap().to_owned())
                }
                _ => others += 1,
            }
        }
    }
    assert_eq!((messages, others), (ids, 200));
    world.settled().await;
    world.queues.stop().await;
}

#[tokio::test]
async fn what_nobody_would_take_is_not_kept_and_the_longest_names_are() {
    both_stores(|store| async move {
        let put = async |destination: String, edu: Edu| {
            let destination = name(&destination);
            let write = store.write(move |tx| {
                Box::pin(async move { OutboundQueues::keep_edu(tx, Side::Lm, &destination, &edu).await })
            });
            write.await
        };
        let with = |change: fn(&mut ToDevice)| {
            let Edu::ToDevice(mut message) = message("1") else { panic!() };
            change(&mut message);
            Edu::ToDevice(message)
        };
        let long = || "x".repeat(256);
        for refused in [
            with(|message| message.message_id = None),
            with(|message| message.kind = "x".repeat(256)),
            with(|message| message.device = String::new()),
            with(|message| drop(message.content.insert("x".to_owned(), json!("x".repeat(200_000))))),
        ] {
            assert!(put("a.example".to_owned(), refused.clone()).await.is_err(), "{}", refused.kind());
        }
        // As long as the server of a user can be: `@a:` is before it.
        let longest = format!("{}.example", &long()[..244]);
        put(longest.clone(), message("1")).await.unwrap();
        let kept = crate::store::outbound_edus::range(&store, "lm_edus", &name(&longest), 0, 99, 99).await.unwrap();
        assert_eq!(kept.len(), 1);
    })
    .await;
}
