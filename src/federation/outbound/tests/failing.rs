//! Destinations that are away, busy, or do not like what they get.

use super::*;

#[tokio::test]
async fn hc_60_a_dead_destination_slows_no_other() {
    both_stores(|store| async move {
        let (feeds, log) = one_log(&store, 1..11, &["dead.example", "gone.example", "live.example"]).await;
        let mut world = World::new(&store, &feeds, |destination, _, _| match destination.as_str() {
            "dead.example" => never(),
            "gone.example" => unreachable(),
            _ => ok(),
        });
        world.queues.start().await.unwrap();
        let start = Instant::now();
        for n in 11..40 {
            fill(&store, &feeds, &log, n..n + 1, &[]).await;
            world.queues.wake(&log, &[name("dead.example"), name("gone.example"), name("live.example")]);
        }
        let mut arrived = Vec::new();
        while arrived.len() < 39 {
            let seen = world.next().await;
            if seen.destination == "live.example" {
                arrived.extend(seen.numbers());
            }
        }
        assert_eq!(arrived, (1..40).collect::<Vec<_>>());
        assert!(start.elapsed() < Duration::from_secs(10));
        let failing = async {
            loop {
                let status = world.queues.status().await.unwrap();
                if let Some(gone) = status.iter().find(|queue| queue.failures > 0) {
                    return gone.clone();
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let gone = tokio::time::timeout(WAIT, failing).await.unwrap();
        assert_eq!((gone.destination.as_str(), gone.waiting), ("gone.example", 39));
        assert!(gone.retry_at > 0 && gone.last_error.unwrap().contains("gone"));
    })
    .await;
}

#[tokio::test]
async fn a_destination_that_asks_to_be_left_alone_is_even_when_it_is_heard_of() {
    both_stores(|store| async move {
        let (feeds, _) = one_log(&store, 1..2, &["a.example"]).await;
        const ASKED: Duration = Duration::from_millis(1500);
        let asked = std::sync::atomic::AtomicBool::new(false);
        let mut world = World::new(&store, &feeds, move |_, _, _| {
            if asked.swap(true, Ordering::SeqCst) {
                return ok();
            }
            let (status, errcode) = (StatusCode::TOO_MANY_REQUESTS, "M_LIMIT_EXCEEDED".to_owned());
            let error = RemoteError::Status {
                status,
                errcode,
                error: String::new(),
                retry_after: Some(ASKED),
                hub_server: None,
            };
            Box::pin(std::future::ready(Err(error)))
        });
        world.queues.start().await.unwrap();
        let first = world.next().await;
        let start = Instant::now();
        world.queues.retry(&first.destination);
        assert_eq!(world.next().await.txn_id(), first.txn_id());
        assert!(start.elapsed() >= ASKED.mul_f64(0.9), "{:?}", start.elapsed());
        world.settled().await;
        world.queues.stop().await;
    })
    .await;
}

#[tokio::test]
async fn a_destination_that_is_heard_of_is_tried_at_once() {
    both_stores(|store| async move {
        let (feeds, _) = one_log(&store, 1..2, &["a.example"]).await;
        let hours = SystemClock.now_ms() + 5 * 3_600_000;
        let row = rows::FailureRow {
            destination: "a.example".to_owned(),
            failures: 16,
            retry_at: hours,
            last_error: "away".to_owned(),
            since_ts: hours - 1,
            answers: false,
        };
        store.write(move |tx| Box::pin(async move { rows::record_failure(tx, &row).await })).await.unwrap();
        let mut world = World::new(&store, &feeds, |_, _, _| ok());
        world.queues.start().await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(world.seen.try_recv().is_err(), "tried before its time");
        assert_eq!(world.queues.status().await.unwrap()[0].failures, 16);
        world.queues.retry(server_name!("other.example"));
        world.queues.retry(server_name!("a.example"));
        assert_eq!(world.next().await.numbers(), [1]);
        world.settled().await;
        world.queues.stop().await;
    })
    .await;
}

/// One that is there and refuses is told apart from one that is away, and since when it is so stays as it was until something is taken.
#[tokio::test]
async fn since_when_a_destination_takes_nothing_is_known_and_whether_it_answers() {
    both_stores(|store| async move {
        let (feeds, _) = one_log(&store, 1..3, &["fails.example", "gone.example"]).await;
        let mends = Arc::new(AtomicBool::new(false));
        let is_well = mends.clone();
        let world = World::new(&store, &feeds, move |destination, _, _| match destination.as_str() {
            _ if is_well.load(Ordering::SeqCst) => ok(),
            "fails.example" => status(500),
            _ => unreachable(),
        });
        let begin = SystemClock.now_ms();
        world.queues.start().await.unwrap();
        let failed = async |times: i64| {
            let failed = async {
                loop {
                    let queues = world.queues.status().await.unwrap();
                    if queues.iter().filter(|queue| queue.failures >= times).count() == 2 {
                        return queues;
                    }
                    for queue in queues {
                        world.queues.retry(&queue.destination);
                    }
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            tokio::time::timeout(WAIT, failed).await.unwrap()
        };
        let first = failed(1).await;
        let again = failed(2).await;
        for (queue, answers) in again.iter().zip([true, false]) {
            assert_eq!((queue.answers, queue.waiting), (answers, 2), "{queue:?}");
            let before = first.iter().find(|before| before.destination == queue.destination).unwrap();
            assert!(queue.since >= begin && queue.since == before.since, "{queue:?}, before {before:?}");
        }
        mends.store(true, Ordering::SeqCst);
        for queue in again {
            world.queues.retry(&queue.destination);
        }
        world.settled().await;
        world.queues.stop().await;
    })
    .await;
}

/// A server that stops at the first event that it does not like is tried with each, and each is given up. It has taken nothing all the while.
#[test]
fn since_when_nothing_of_a_room_is_taken_is_no_matter_of_single_events() {
    let slot = Slot::default();
    let room = feed(FeedKind::Log, "!a:g.example");
    let held = |since| HeldFeed { feed: room.clone(), tries: 1, since, retry_at: since + 1, error: "500".to_owned() };
    let since = || slot.held().first().map(|held| held.since);
    slot.hold(held(10));
    slot.hold(held(20));
    assert_eq!(since(), Some(10));
    // The event is given up, and the next one fares no better.
    slot.release([&room]);
    assert_eq!(since(), None);
    slot.hold(held(30));
    assert_eq!(since(), Some(10));
    slot.takes([&room]);
    slot.release([&room]);
    slot.hold(held(40));
    assert_eq!(since(), Some(40));
}

#[tokio::test]
async fn hc_20_one_bad_event_holds_up_no_other() {
    both_stores(|store| async move {
        let (feeds, lpdus) = (Arc::new(Feeds::default()), feed(FeedKind::Lpdus, "!a:eigen.example"));
        fill(&store, &feeds, &lpdus, 1..7, &["eigen.example"]).await;
        let taken = Arc::new(Mutex::new(Vec::new()));
        let world = World::new(&store, &feeds, stops_at(3, 400, taken.clone()));
        // The hub's log tells what was appended before the bad event.
        *lock(&feeds.delivered) = vec![1, 2];
        world.queues.start().await.unwrap();
        world.settled().await;
        assert_eq!(*lock(&taken), [1, 2, 4, 5, 6]);
        let told = lock(&feeds.told).clone();
        let (refused, taken): (Vec<_>, Vec<_>) = told.into_iter().partition(|(_, answer)| !answer.is_empty());
        let [(positions, answer)] = refused.as_slice() else { panic!("{refused:?}") };
        assert_eq!(
            (positions.as_slice(), &answer["errcode"], &answer["error"]),
            ([3].as_slice(), &json!("M_UNKNOWN"), &json!("no"))
        );
        let taken: Vec<i64> = taken.into_iter().flat_map(|(positions, _)| positions).collect();
        assert_eq!(taken, [1, 2, 4, 5, 6]);
        world.queues.stop().await;
    })
    .await;
}

/// It hands each event round before it takes the next, so of several nobody could tell which it will still take.
#[tokio::test]
async fn a_linearized_hub_gets_lpdus_one_at_a_time() {
    both_stores(|store| async move {
        let (feeds, lpdus) = (Arc::new(Feeds::default()), feed(FeedKind::Lpdus, "!a:eigen.example"));
        fill(&store, &feeds, &lpdus, 1..5, &["eigen.example", "part.example"]).await;
        let mut world = World::new(&store, &feeds, |_, _, _| ok());
        world.queues.start().await.unwrap();
        world.settled().await;
        let arrived = world.arrived();
        assert_eq!(arrived[&name("eigen.example")], [[1], [2], [3], [4]]);
        assert_eq!(arrived[&name("part.example")], [[1, 2, 3, 4]]);
        world.queues.stop().await;
    })
    .await;
}

/// One that does LM alone would show again what it had taken of a transaction that it did not like, unless it answers for each
/// event.
#[tokio::test]
async fn a_linearized_participant_gets_a_log_one_event_at_a_time_until_it_answers_for_each() {
    both_stores(|store| async move {
        let (feeds, log) = (Arc::new(Feeds::default()), feed(FeedKind::Log, "!a:g.example"));
        let servers = ["eigen.example", "eigen-itemizes.example", "part.example"];
        fill(&store, &feeds, &log, 1..7, &servers).await;
        let taken = Arc::new(Mutex::new(Vec::new()));
        let at_eigen = stops_at(3, 400, taken.clone());
        let answers = std::sync::atomic::AtomicUsize::new(0);
        let mut world = World::new(&store, &feeds, move |destination, uri, body| match destination.as_str() {
            "eigen.example" => at_eigen(destination, uri, body),
            // It is put back to a version that does not, and forward again.
            "eigen-itemizes.example" if answers.fetch_add(1, Ordering::SeqCst) == 2 => ok(),
            "eigen-itemizes.example" => answer(json!({ "failed_pdus": {} })),
            _ => ok(),
        });
        world.queues.start().await.unwrap();
        world.settled().await;
        for range in [7..9, 9..12] {
            fill(&store, &feeds, &log, range, &[]).await;
            world.queues.wake(&log, &servers.map(name));
            world.settled().await;
        }
        assert_eq!(*lock(&taken), [1, 2, 4, 5, 6, 7, 8, 9, 10, 11], "nothing twice");
        let arrived = world.arrived();
        assert_eq!(arrived[&name("eigen.example")], (1..12).map(|n| vec![n]).collect::<Vec<_>>());
        let expected = [vec![1], vec![2, 3, 4, 5, 6], vec![7, 8], vec![9], vec![10, 11]];
        assert_eq!(arrived[&name("eigen-itemizes.example")], expected);
        assert_eq!(arrived[&name("part.example")], [vec![1, 2, 3, 4, 5, 6], vec![7, 8], vec![9, 10, 11]]);
        world.queues.stop().await;
    })
    .await;
}

#[tokio::test]
async fn a_store_that_fails_for_a_while_loses_no_news() {
    both_stores(|store| async move {
        let (feeds, log) = one_log(&store, 1..2, &["a.example"]).await;
        let mut world = World::new(&store, &feeds, |_, _, _| ok());
        world.queues.start().await.unwrap();
        assert_eq!(world.next().await.numbers(), [1]);
        world.settled().await;
        fill(&store, &feeds, &log, 2..3, &[]).await;
        rename(&store, "outbound_cursors", "gone").await;
        world.queues.wake(&log, &[name("a.example")]);
        world.taken().await;
        // What is asked of the store after that fails too.
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(world.seen.try_recv().is_err());
        rename(&store, "gone", "outbound_cursors").await;
        assert_eq!(world.next().await.numbers(), [2]);
        world.settled().await;
        world.queues.stop().await;
    })
    .await;
}

async fn rename(store: &Store, from: &str, to: &str) {
    let sql = format!("ALTER TABLE {from} RENAME TO {to}");
    let job = store.write(|tx| {
        Box::pin(async move {
            sqlx::query(sqlx::AssertSqlSafe(sql)).execute(tx).await?;
            Ok(())
        })
    });
    job.await.unwrap();
}

#[tokio::test]
async fn one_rooms_event_on_which_a_hub_fails_holds_up_no_other_room() {
    both_stores(|store| async move {
        let (feeds, bad) = (Arc::new(Feeds::default()), feed(FeedKind::Lpdus, "!bad:eigen.example"));
        let good = feed(FeedKind::Lpdus, "!good:eigen.example");
        fill(&store, &feeds, &bad, 1..3, &["eigen.example"]).await;
        fill(&store, &feeds, &good, 11..15, &["eigen.example"]).await;
        let failed = std::sync::atomic::AtomicUsize::new(0);
        let mut world = World::new(&store, &feeds, move |_, _, body| {
            let is_bad = body["pdus"].as_array().unwrap().iter().any(|pdu| pdu["n"] == 1);
            match is_bad && failed.fetch_add(1, Ordering::SeqCst) < 2 {
                true => status(500),
                false => ok(),
            }
        });
        world.queues.start().await.unwrap();
        world.settled().await;
        let arrived = world.arrived();
        let numbers: Vec<i64> = arrived[&name("eigen.example")].iter().flatten().copied().collect();
        let place = |wanted: i64| numbers.iter().rposition(|n| *n == wanted).unwrap();
        assert!((11..15).all(|n| place(n) < place(1)), "{numbers:?}");
        assert!(place(1) < place(2), "the room's own order stays: {numbers:?}");
        assert_eq!(numbers.iter().filter(|n| **n == 1).count(), 3);
        assert_eq!(numbers.len(), 3 + 1 + 4, "{numbers:?}");
        world.queues.stop().await;
    })
    .await;
}

fn no_endpoint() -> Reply {
    let error = RemoteError::Status {
        status: StatusCode::NOT_FOUND,
        errcode: "M_UNRECOGNIZED".to_owned(),
        error: String::new(),
        retry_after: None,
        hub_server: None,
    };
    Box::pin(std::future::ready(Err(error)))
}

#[tokio::test]
async fn what_a_server_has_no_endpoint_for_holds_up_nothing_else() {
    both_stores(|store| async move {
        let (feeds, log) = one_log(&store, 1..4, &[]).await;
        let graph = feed(FeedKind::Graph, "!graph:g.example");
        let servers = ["eigen-alone.example", "both.example"];
        fill(&store, &feeds, &graph, 11..13, &servers).await;
        fill(&store, &feeds, &log, 4..6, &servers).await;
        let knows = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let known = knows.clone();
        let mut world = World::new(&store, &feeds, move |_, uri, _| {
            match uri.starts_with("/_matrix/federation/v1/send/") && !known.load(Ordering::SeqCst) {
                true => no_endpoint(),
                false => ok(),
            }
        });
        world.queues.start().await.unwrap();
        let mut logs = BTreeMap::new();
        while logs.values().flatten().count() < 4 {
            let seen = world.next().await;
            if !seen.uri.starts_with("/_matrix/federation/v1/send/") {
                logs.entry(seen.destination.clone()).or_insert_with(Vec::new).extend(seen.numbers());
            }
        }
        assert_eq!(logs, BTreeMap::from(servers.map(|server| (name(server), vec![4, 5]))));
        // A feed may come to be known; one of a server that does LM alone has ended.
        let status = world.queues.status().await.unwrap();
        assert!(status.iter().all(|queue| queue.failures == 0), "{status:?}");
        // Operators see which room waits, and why.
        let held = async {
            loop {
                let status = world.queues.status().await.unwrap();
                let held = status
                    .into_iter()
                    .flat_map(|queue| queue.held.into_iter().map(move |held| (queue.destination.clone(), held)));
                if let Some(held) = held.last() {
                    return held;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let (server, held) = tokio::time::timeout(WAIT, held).await.unwrap();
        assert_eq!((server.as_str(), &held.feed), ("both.example", &graph));
        assert!(held.tries > 0 && held.retry_at > 0 && held.error.contains("M_UNRECOGNIZED"), "{held:?}");
        knows.store(true, Ordering::SeqCst);
        world.settled().await;
        let status = world.queues.status().await.unwrap();
        assert!(status.iter().all(|queue| queue.held.is_empty()), "{status:?}");
        fill(&store, &feeds, &graph, 13..14, &[]).await;
        world.queues.wake(&graph, &servers.map(name));
        world.settled().await;
        let arrived = world.arrived();
        let of_both: Vec<i64> = arrived[&name("both.example")].iter().flatten().copied().collect();
        assert!(of_both.ends_with(&[11, 12, 13]), "{arrived:?}");
        let of_one = arrived.get(&name("eigen-alone.example")).into_iter().flatten().flatten();
        assert!(!of_one.into_iter().any(|n| *n == 13), "{arrived:?}");
        world.queues.stop().await;
    })
    .await;
}

/// As the draft has it of who gets a second transaction while it is at work on one.
#[tokio::test]
async fn a_transaction_for_which_a_server_has_no_time_is_sent_again_as_it_is() {
    both_stores(|store| async move {
        let (feeds, _) = one_log(&store, 1..4, &["a.example"]).await;
        let lpdus = feed(FeedKind::Lpdus, "!a:eigen.example");
        fill(&store, &feeds, &lpdus, 11..13, &["eigen.example"]).await;
        let asked: Mutex<BTreeMap<OwnedServerName, usize>> = Mutex::default();
        let mut world = World::new(&store, &feeds, move |destination, _, _| {
            let mut asked = lock(&asked);
            let asked = asked.entry(destination.to_owned()).or_default();
            *asked += 1;
            match *asked <= 2 {
                true => Box::pin(std::future::ready(Err(RemoteError::Status {
                    status: StatusCode::BAD_REQUEST,
                    errcode: "M_BAD_STATE".to_owned(),
                    error: "another transaction is in flight".to_owned(),
                    retry_after: None,
                    hub_server: None,
                }))),
                false => ok(),
            }
        });
        world.queues.start().await.unwrap();
        let mut seen: BTreeMap<OwnedServerName, Vec<(String, Vec<i64>)>> = BTreeMap::new();
        for _ in 0..3 + 4 {
            let next = world.next().await;
            let transaction = (next.txn_id().to_owned(), next.numbers());
            seen.entry(next.destination).or_default().push(transaction);
        }
        world.settled().await;
        for (server, numbers) in [("a.example", vec![1, 2, 3]), ("eigen.example", vec![11])] {
            let first = &seen[&name(server)][0];
            assert_eq!(first.1, numbers);
            assert!(seen[&name(server)][..3].iter().all(|again| again == first), "{seen:?}");
        }
        assert_eq!(seen[&name("eigen.example")][3].1, [12], "{seen:?}");
        let told = lock(&feeds.told).clone();
        assert!(told.iter().all(|(_, answer)| answer.is_empty()), "nobody is told of a refusal: {told:?}");
        world.queues.stop().await;
    })
    .await;
}

/// Such a hub fetches something from the invited server first, and that is away.
#[tokio::test]
async fn an_invite_on_which_a_hub_fails_is_refused_soon() {
    both_stores(|store| async move {
        let (feeds, lpdus) = (Arc::new(Feeds::default()), feed(FeedKind::Lpdus, "!a:eigen.example"));
        fill(&store, &feeds, &lpdus, 1..3, &["eigen.example"]).await;
        let invite = json!({ "n": 1, "type": "m.room.member", "content": { "membership": "invite" } });
        lock(&feeds.events).get_mut(&lpdus).unwrap().insert(1, Some(invite.to_string()));
        let mut world = World::new(&store, &feeds, |_, _, body| match body["pdus"][0]["n"] == 1 {
            true => status(500),
            false => ok(),
        });
        world.queues.start().await.unwrap();
        world.settled().await;
        assert_eq!(world.arrived()[&name("eigen.example")], [[1], [1], [1], [2]]);
        let told = lock(&feeds.told).clone();
        assert_eq!((told[0].0.as_slice(), &told[0].1["error"]), ([1].as_slice(), &json!("no")));
        world.queues.stop().await;
    })
    .await;
}
