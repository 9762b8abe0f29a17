//! What becomes of a transaction of unknown fate.

use super::*;

#[tokio::test]
async fn hc_82_after_a_crash_the_same_transaction_is_sent_again() {
    both_databases(|url| async move {
        let (feeds, graph) = (Arc::new(Feeds::default()), feed(FeedKind::Graph, "!a:b.example"));
        let store = Store::open(&url).await.unwrap();
        fill(&store, &feeds, &graph, 1..4, &["a.example"]).await;
        let mut world = World::new(&store, &feeds, |_, _, _| never());
        world.queues.start().await.unwrap();
        let first = world.next().await;
        assert!(first.uri.starts_with("/_matrix/federation/v1/send/"));
        assert_eq!(first.body["origin"], "g.example");
        // More comes while the transaction is on its way, then all is lost but the database.
        fill(&store, &feeds, &graph, 4..6, &[]).await;
        world.queues.wake(&graph, &[name("a.example")]);
        drop(world);
        store.close().await;

        let store = Store::open(&url).await.unwrap();
        let mut world = World::new(&store, &feeds, |_, _, _| ok());
        world.queues.start().await.unwrap();
        let again = world.next().await;
        assert_eq!((again.txn_id(), &again.body), (first.txn_id(), &first.body));
        let more = world.next().await;
        assert_eq!(more.numbers(), [4, 5]);
        assert_ne!(more.txn_id(), first.txn_id());
        world.settled().await;
        world.queues.stop().await;
        store.close().await;
    })
    .await;
}

#[tokio::test]
async fn what_is_known_to_have_arrived_is_not_sent_again() {
    both_databases(|url| async move {
        let (feeds, lpdus) = (Arc::new(Feeds::default()), feed(FeedKind::Lpdus, "!a:hub.example"));
        let store = Store::open(&url).await.unwrap();
        fill(&store, &feeds, &lpdus, 1..4, &["hub.example"]).await;
        let mut world = World::new(&store, &feeds, |_, _, _| never());
        world.queues.start().await.unwrap();
        let first = world.next().await;
        drop(world);

        *lock(&feeds.delivered) = vec![1, 2];
        let mut world = World::new(&store, &feeds, |_, _, _| ok());
        world.queues.start().await.unwrap();
        let rest = world.next().await;
        assert_eq!(rest.numbers(), [3]);
        assert_ne!(rest.txn_id(), first.txn_id(), "an ID means one content");
        world.settled().await;
        assert!(world.seen.try_recv().is_err());
        let told: Vec<_> = lock(&feeds.told).iter().map(|(positions, _)| positions.clone()).collect();
        assert_eq!(told, [vec![1, 2], vec![3]]);
        world.queues.stop().await;
        store.close().await;
    })
    .await;
}

#[tokio::test]
async fn a_stop_waits_for_what_is_on_its_way() {
    let (_directory, store) = sqlite().await;
    let (feeds, log) = one_log(&store, 1..101, &["a.example"]).await;
    let gate = Arc::new(tokio::sync::Notify::new());
    let mut world = World::new(&store, &feeds, {
        let gate = gate.clone();
        move |_, _, _| {
            let gate = gate.clone();
            Box::pin(async move {
                gate.notified().await;
                Ok(Object::new())
            })
        }
    });
    world.queues.start().await.unwrap();
    assert_eq!(world.next().await.numbers().len(), 50);
    let stopping = tokio::spawn({
        let queues = world.queues.clone();
        async move { queues.stop().await }
    });
    tokio::task::yield_now().await;
    assert!(!stopping.is_finished());
    gate.notify_one();
    tokio::time::timeout(WAIT, stopping).await.unwrap().unwrap();
    let cursor = rows::cursor(&store, &log.key(server_name!("a.example"))).await.unwrap().unwrap();
    assert_eq!((cursor.sent, cursor.target), (50, 100));
    assert!(rows::inflight(&store, "a.example").await.unwrap().is_none());
    assert!(world.seen.try_recv().is_err());
}

#[tokio::test]
async fn what_may_have_arrived_of_a_transaction_that_was_split_is_looked_for_after_a_crash_too() {
    both_databases(|url| async move {
        let (feeds, lpdus) = (Arc::new(Feeds::default()), feed(FeedKind::Lpdus, "!a:late-eigen.example"));
        let store = Store::open(&url).await.unwrap();
        fill(&store, &feeds, &lpdus, 1..7, &["late-eigen.example"]).await;
        let taken = Arc::new(Mutex::new(Vec::new()));
        // Its keys come late, so it gets all at once. It takes two, breaks at the third, and dies when it gets them one by one.
        let stops = stops_at(3, 400, taken.clone());
        let mut world = World::new(&store, &feeds, move |server, uri, body| {
            if body["pdus"].as_array().unwrap().len() > 1 { stops(server, uri, body) } else { never() }
        });
        world.queues.start().await.unwrap();
        assert_eq!(world.next().await.numbers(), [1, 2, 3, 4, 5, 6]);
        assert_eq!(world.next().await.numbers(), [1]);
        drop(world);
        store.close().await;

        // By now its log tells.
        *lock(&feeds.delivered) = vec![1, 2];
        let store = Store::open(&url).await.unwrap();
        let world = World::new(&store, &feeds, stops_at(3, 400, taken.clone()));
        world.queues.start().await.unwrap();
        world.settled().await;
        assert_eq!(*lock(&taken), [1, 2, 4, 5, 6]);
        world.queues.stop().await;
        store.close().await;
    })
    .await;
}

/// What was refused would be lost, and whoever waits for it would wait for ever.
#[tokio::test]
async fn an_answer_that_cannot_be_recorded_is_had_again() {
    both_stores(|store| async move {
        for code in [200, 400] {
            let (feeds, lpdus) = (Arc::new(Feeds::default()), feed(FeedKind::Lpdus, &format!("!r{code}:hub.example")));
            fill(&store, &feeds, &lpdus, 1..2, &["hub.example"]).await;
            feeds.deaf.store(true, Ordering::SeqCst);
            let mut world = World::new(&store, &feeds, move |_, _, _| if code == 200 { ok() } else { status(code) });
            world.queues.start().await.unwrap();
            let first = world.next().await;
            assert_eq!(world.next().await.txn_id(), first.txn_id());
            world.settled().await;
            let told = lock(&feeds.told).clone();
            let [(positions, answer)] = told.as_slice() else { panic!("{told:?}") };
            assert_eq!((positions.as_slice(), answer.is_empty()), ([1].as_slice(), code == 200));
            world.queues.stop().await;
        }
    })
    .await;
}
