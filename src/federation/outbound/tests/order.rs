//! What arrives, in which order, and in which transactions.

use super::*;

#[tokio::test]
async fn all_events_arrive_in_order_and_in_few_transactions() {
    both_stores(|store| async move {
        let (feeds, log) = one_log(&store, 1..121, &["a.example", "b.example"]).await;
        let mut world = World::new(&store, &feeds, |_, _, _| ok());
        world.queues.start().await.unwrap();
        world.settled().await;
        let mut arrived: BTreeMap<OwnedServerName, Vec<Vec<i64>>> = BTreeMap::new();
        while let Ok(seen) = world.seen.try_recv() {
            assert!(seen.uri.starts_with("/_matrix/federation/unstable/"), "{}", seen.uri);
            arrived.entry(seen.destination.clone()).or_default().push(seen.numbers());
        }
        for destination in ["a.example", "b.example"] {
            let transactions = &arrived[&name(destination)];
            assert_eq!(transactions.iter().map(Vec::len).collect::<Vec<_>>(), [50, 50, 20]);
            assert_eq!(transactions.concat(), (1..121).collect::<Vec<_>>());
        }
        // What comes later is sent when they are woken.
        fill(&store, &feeds, &log, 121..123, &[]).await;
        world.queues.wake(&log, &[name("a.example"), name("b.example")]);
        assert_eq!((world.next().await.numbers(), world.next().await.numbers()), (vec![121, 122], vec![121, 122]));
        world.settled().await;
        world.queues.stop().await;
    })
    .await;
}

#[tokio::test]
async fn what_is_committed_and_not_shown_yet_is_not_passed_over() {
    both_stores(|store| async move {
        let (feeds, log) = one_log(&store, 1..2, &["a.example"]).await;
        let mut world = World::new(&store, &feeds, |_, _, _| ok());
        world.queues.start().await.unwrap();
        assert_eq!(world.next().await.numbers(), [1]);
        world.settled().await;
        // The room's task has committed an event and is interrupted before it shows it; something else wakes the queue.
        fill(&store, &feeds, &log, 2..3, &[]).await;
        let event = lock(&feeds.events).get_mut(&log).unwrap().remove(&2).unwrap();
        let asked = feeds.asked.load(Ordering::SeqCst);
        world.queues.wake(&log, &[name("a.example")]);
        while feeds.asked.load(Ordering::SeqCst) == asked {
            tokio::task::yield_now().await;
        }
        // What another feed brings is composed after that, so the worker has done what it does about this one.
        let other = feed(FeedKind::Log, "!b:g.example");
        fill(&store, &feeds, &other, 7..8, &["a.example"]).await;
        world.queues.wake(&other, &[name("a.example")]);
        assert_eq!(world.next().await.numbers(), [7]);

        lock(&feeds.events).get_mut(&log).unwrap().insert(2, event);
        world.queues.wake(&log, &[name("a.example")]);
        assert_eq!(world.next().await.numbers(), [2]);
        world.settled().await;
        world.queues.stop().await;
    })
    .await;
}

#[tokio::test]
async fn transactions_keep_within_bytes_and_protocols() {
    let (_directory, store) = sqlite().await;
    let feeds = Arc::new(Feeds::default());
    let (log, graph) = (feed(FeedKind::Log, "!a:g.example"), feed(FeedKind::Graph, "!b:g.example"));
    fill(&store, &feeds, &log, 1..6, &["a.example"]).await;
    fill(&store, &feeds, &graph, 1..6, &["a.example"]).await;
    let filler = |n: i64, size: usize| Some(json!({ "n": n, "x": "x".repeat(size) }).to_string());
    for events in lock(&feeds.events).values_mut() {
        for (n, size) in [(1, 40_000), (2, 40_000), (3, 40_000), (4, 95_000), (5, 10)] {
            events.insert(n, filler(n, size));
        }
    }
    let mut world = World::new(&store, &feeds, |_, _, _| ok());
    world.queues.start().await.unwrap();
    world.settled().await;
    let (mut lm, mut matrix) = (Vec::new(), Vec::new());
    while let Ok(seen) = world.seen.try_recv() {
        if seen.uri.contains("/v1/send/") { matrix.push(seen.numbers()) } else { lm.push(seen.numbers()) }
    }
    assert_eq!(lm, [vec![1, 2], vec![3], vec![4], vec![5]]);
    assert_eq!(matrix, [vec![1, 2, 3, 4, 5]]);
    world.queues.stop().await;
}

#[tokio::test]
async fn what_is_not_for_a_destination_is_passed_over() {
    both_stores(|store| async move {
        let (feeds, log) = one_log(&store, 1..201, &["a.example"]).await;
        for (n, event) in lock(&feeds.events).get_mut(&log).unwrap() {
            if *n != 150 {
                *event = None;
            }
        }
        let mut world = World::new(&store, &feeds, |_, _, _| ok());
        world.queues.start().await.unwrap();
        assert_eq!(world.next().await.numbers(), [150]);
        world.settled().await;
        assert!(world.seen.try_recv().is_err());
        world.queues.stop().await;
    })
    .await;
}

#[tokio::test]
async fn an_end_and_a_new_beginning() {
    both_stores(|store| async move {
        let (feeds, log) = one_log(&store, 1..11, &["left.example", "back.example"]).await;
        let ended = log.clone();
        store
            .write(move |tx| {
                Box::pin(async move {
                    for destination in [server_name!("left.example"), server_name!("back.example")] {
                        OutboundQueues::end(tx, destination, &ended, 4).await?;
                    }
                    // Joined again before it got even the end.
                    OutboundQueues::subscribe(tx, server_name!("back.example"), &ended, 8).await
                })
            })
            .await
            .unwrap();
        *lock(&feeds.hidden) = vec![(name("back.example"), 5..9)];
        let mut world = World::new(&store, &feeds, |_, _, _| ok());
        world.queues.start().await.unwrap();
        world.settled().await;
        let mut seen: Vec<_> = std::iter::from_fn(|| world.seen.try_recv().ok())
            .map(|seen| (seen.destination.to_string(), seen.numbers()))
            .collect();
        seen.sort();
        let (back, left) = ("back.example".to_owned(), "left.example".to_owned());
        assert_eq!(seen, [(back.clone(), vec![1, 2, 3, 4]), (back, vec![9, 10]), (left, vec![1, 2, 3, 4])]);
        let cursor = rows::cursor(&store, &log.key(server_name!("left.example"))).await.unwrap();
        assert_eq!(cursor, None, "what has ended leaves nothing behind");
        fill(&store, &feeds, &log, 11..12, &[]).await;
        // Of a destination whose place is in memory the store is not asked, of another it is.
        world.queues.wake_at(&log, &[name("left.example"), name("back.example")], 11);
        let next = world.next().await;
        assert_eq!((next.destination.as_str(), next.numbers()), ("back.example", vec![11]));
        world.settled().await;
        fill(&store, &feeds, &log, 12..14, &[]).await;
        let ended = log.clone();
        store
            .write(move |tx| {
                Box::pin(async move { OutboundQueues::end(tx, server_name!("back.example"), &ended, 12).await })
            })
            .await
            .unwrap();
        world.queues.wake_at(&log, &[name("back.example")], 13);
        world.queues.wake(&log, &[name("back.example")]);
        assert_eq!(world.next().await.numbers(), [12], "an end that was told of holds");
        world.queues.wake_at(&log, &[name("back.example")], 13);
        world.settled().await;
        assert!(world.seen.try_recv().is_err());
        world.queues.stop().await;
    })
    .await;
}

#[tokio::test]
async fn idle_rooms_and_idle_destinations_cost_nothing() {
    let (_directory, store) = sqlite().await;
    let feeds = Arc::new(Feeds::default());
    for n in 0..20 {
        fill(&store, &feeds, &feed(FeedKind::Log, &format!("!{n}:g.example")), 1..2, &["a.example"]).await;
    }
    let mut world = World::with_clock(&store, &feeds, ManualClock::new(1), |_, _, _| ok());
    world.queues.start().await.unwrap();
    // All twenty rooms share one transaction.
    assert_eq!(world.next().await.numbers().len(), 20);
    world.taken().await;
    world.queues.stop().await;
}

#[tokio::test]
async fn the_name_of_the_endpoint_that_a_server_knows_is_remembered() {
    let (_directory, store) = sqlite().await;
    let (feeds, log) = one_log(&store, 1..2, &["a.example"]).await;
    let mut world = World::new(&store, &feeds, |_, uri, _| {
        if uri.starts_with("/_matrix/federation/v2/send/") {
            return ok();
        }
        let (status, errcode, error) = (StatusCode::NOT_FOUND, String::new(), String::new());
        let error = RemoteError::Status { status, errcode, error, retry_after: None, hub_server: None };
        Box::pin(std::future::ready(Err(error)))
    });
    world.queues.start().await.unwrap();
    let (first, second) = (world.next().await, world.next().await);
    assert!(first.uri.contains("/unstable/") && second.uri.contains("/v2/send/"));
    assert_eq!(first.txn_id(), second.txn_id());
    world.settled().await;
    fill(&store, &feeds, &log, 2..3, &[]).await;
    world.queues.wake(&log, &[name("a.example")]);
    assert!(world.next().await.uri.contains("/v2/send/"));
    world.settled().await;
    world.queues.stop().await;
}
