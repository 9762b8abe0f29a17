//! Long gaps of a hub's log whose hub is away, or gives them badly, while they are filled.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http::StatusCode;
use isthmus::event::{Pdu, Redaction, reference_hash};
use isthmus::lm::{Appended, Sent};
use isthmus::store::lm::{Gap, Staged, gap, missing, stage, staged};
use ruma::{OwnedEventId, OwnedRoomId, RoomId};
use serde_json::{Value, json};

use super::log_hub::{Faulty, deafen, respond};
use super::world::{Node, World, bodies, ids, raw};

/// A participant's room of which nothing comes from its hub by itself.
async fn cut_off<const N: usize>(nodes: &[Node; N]) -> OwnedRoomId {
    let (hub, part) = (&nodes[0], &nodes[1]);
    let room = hub.create_room("public").await;
    part.join(&room, "alice", hub).await;
    deafen(part);
    room
}

async fn appended(hub: &Node, room: &RoomId, body: &str) -> Appended {
    match hub.say(room, "bot", body).await {
        Sent::Appended(appended) => appended,
        Sent::Queued { .. } => panic!("a hub appends"),
    }
}

async fn write_down(node: &Node, room: &RoomId, gap: Gap, events: Vec<Staged>) {
    let room = room.to_owned();
    let job = node.context.store.write(move |tx| Box::pin(async move { stage(tx, &room, &gap, &events).await }));
    job.await.unwrap();
}

async fn gap_of(node: &Node, room: &RoomId) -> Option<Gap> {
    gap(&node.context.store, room).await.unwrap()
}

async fn wait_for_gap(node: &Node, room: &RoomId, wanted: impl Fn(Option<&Gap>) -> bool) -> Option<Gap> {
    let waiting = async {
        loop {
            let gap = gap_of(node, room).await;
            if wanted(gap.as_ref()) {
                return gap;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    match tokio::time::timeout(Duration::from_secs(30), waiting).await {
        Ok(gap) => gap,
        Err(_) => panic!("waited in vain: {:?}", gap_of(node, room).await),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_that_is_away_ends_no_long_gap_and_nothing_of_it_has_to_be_repeated() {
    let (world, nodes) = World::new(["hub.example", "part.example"]).await;
    let room = cut_off(&nodes).await;
    let [hub, part] = nodes;
    let faulty = Faulty::of(&hub);
    appended(&hub, &room, "one").await;
    let two = appended(&hub, &room, "two").await;
    let gone_on_with = Gap { edges: vec![two.event.event_id.clone()], tries: 50, ..Gap::default() };
    write_down(&part, &room, gone_on_with, Vec::new()).await;
    hub.context.outbound.stop().await;
    faulty.away.store(usize::MAX, Ordering::SeqCst);
    let part = world.restart(part).await;
    let waits = wait_for_gap(&part, &room, |gap| gap.is_none_or(|gap| gap.tries != 50)).await.unwrap();
    assert_eq!((waits.tries, waits.place), (51, None));
    assert!(waits.retry_at > waits.noticed_ts);
    // What comes meanwhile counts as delivered, and tells that the hub is there.
    let three = appended(&hub, &room, "three").await;
    let received = part.lm.receive(&hub.name, vec![raw(&three.event.json)]).await.pop().unwrap();
    assert_eq!(received.result, Ok(()));
    let sooner = gap_of(&part, &room).await.unwrap();
    assert_eq!(sooner.newest.as_ref(), Some(&three.event.event_id));
    assert!(sooner.retry_at < waits.retry_at, "{sooner:?}");
    faulty.away.store(0, Ordering::SeqCst);
    let log = part.wait_for_body(&room, "three").await;
    assert_eq!(
        (bodies(&log), ids(&log)),
        (["one", "two", "three"].map(str::to_owned).to_vec(), ids(&hub.log(&room).await))
    );
    wait_for_gap(&part, &room, |gap| gap.is_none()).await;
    assert_eq!(part.lm.room(&room).await.unwrap().unwrap().complaints, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_ends_of_a_fork_that_came_during_a_long_gap_are_asked_for() {
    let (_world, nodes) = World::new(["hub.example", "part.example"]).await;
    let room = cut_off(&nodes).await;
    let [hub, part] = nodes;
    let [_, two, _, four] = [
        appended(&hub, &room, "one").await,
        appended(&hub, &room, "two").await,
        appended(&hub, &room, "three").await,
        appended(&hub, &room, "four").await,
    ];
    hub.context.outbound.stop().await;
    // The first of them finds that the hub gives nothing, so that somebody looks after what is missing.
    hub.meddle(|_, _| async { respond(StatusCode::SERVICE_UNAVAILABLE, json!({})) });
    let receive =
        async |event: &Appended| part.lm.receive(&hub.name, vec![raw(&event.event.json)]).await.pop().unwrap().result;
    receive(&two).await.unwrap_err();
    let far = i64::MAX / 2;
    write_down(&part, &room, Gap { edges: vec![two.event.event_id.clone()], retry_at: far, ..Gap::default() }, vec![])
        .await;
    assert_eq!((receive(&two).await, receive(&four).await), (Ok(()), Ok(())));
    assert_eq!(gap_of(&part, &room).await.unwrap().newest, Some(four.event.event_id.clone()));
    let holes = isthmus::store::lm::holes(&part.context.store, &room, false).await.unwrap();
    assert_eq!(holes.iter().map(|hole| &hole.event_id).collect::<Vec<_>>(), [&two.event.event_id]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_fetched_is_not_judged_before_the_state_is_there() {
    let (world, nodes) = World::new(["hub.example", "part.example", "third.example"]).await;
    let room = cut_off(&nodes).await;
    let [hub, part, third] = nodes;
    let faulty = Faulty::of(&hub);
    // The join is what the hub did not give.
    third.join(&room, "carol", &hub).await;
    third.say(&room, "carol", "hello").await;
    let at_hub = hub.wait_for_body(&room, "hello").await;
    let hello = at_hub.last().unwrap();
    hub.context.outbound.stop().await;
    let place = part.lm.room(&room).await.unwrap().unwrap().head.0;
    let closed = Gap { place: Some(place), problem: Some("away".to_owned()), events: 1, ..Gap::default() };
    let json = hello.event.to_bytes();
    let event = Staged { seq: 0, event_id: hello.event.event_id.clone(), proved: true, json };
    write_down(&part, &room, closed, vec![event]).await;
    faulty.away.store(usize::MAX, Ordering::SeqCst);
    let part = world.restart(part).await;
    let waits = wait_for_gap(&part, &room, |gap| gap.is_none_or(|gap| gap.retry_at > 0)).await.unwrap();
    assert_eq!(waits.taken, 0);
    assert_eq!(staged(&part.context.store, &room, 10).await.unwrap().len(), 1);
    faulty.away.store(0, Ordering::SeqCst);
    let part = world.restart(part).await;
    assert_eq!(bodies(&part.wait_for_body(&room, "hello").await), ["hello"]);
    wait_for_gap(&part, &room, |gap| gap.is_none()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_event_counts_against_the_space_of_a_long_gap() {
    let (world, nodes) = World::new(["hub.example", "part.example"]).await;
    let room = cut_off(&nodes).await;
    let [hub, part] = nodes;
    let last = appended(&hub, &room, "last").await;
    hub.context.outbound.stop().await;
    // Each is known by its ID alone, and names the one before it.
    let (mut chain, mut before) = (Vec::<(OwnedEventId, Value)>::new(), last.event.event_id.clone());
    for n in 0..3 {
        let event = json!({ "type": 1, "n": n, "room_id": room, "prev_events": [before], "signatures": {} });
        let hash = reference_hash(event.as_object().unwrap(), Redaction::Draft);
        before = OwnedEventId::try_from(format!("${hash}")).unwrap();
        chain.push((before.clone(), event));
    }
    assert!(Pdu::parse(chain[0].1.as_object().unwrap().clone(), Redaction::Draft).is_err());
    // One each time, and nothing else.
    let (chain, asked) = (Arc::new(chain), Arc::new(AtomicUsize::new(0)));
    let (given, count) = (chain.clone(), asked.clone());
    hub.meddle(move |request, next| {
        let (given, count) = (given.clone(), count.clone());
        async move {
            if !request.uri().path().contains("/backfill/") {
                return next.run(request).await;
            }
            let n = count.fetch_add(1, Ordering::SeqCst);
            match given.iter().rev().nth(n / 2).filter(|_| n % 2 == 0) {
                Some((_, event)) => respond(StatusCode::OK, json!({ "pdus": [event] })),
                None => respond(StatusCode::SERVICE_UNAVAILABLE, json!({})),
            }
        }
    });
    // All the space that one room may have.
    let full = Gap { edges: vec![before], bytes: 1 << 29, ..Gap::default() };
    write_down(&part, &room, full, Vec::new()).await;
    let part = world.restart(part).await;
    wait_for_gap(&part, &room, |gap| gap.is_none()).await;
    let missing = missing(&part.context.store, Some(&room)).await.unwrap();
    assert!(missing.last_error.as_ref().is_some_and(|error| error.contains("there is space")), "{missing:?}");
    assert!(asked.load(Ordering::SeqCst) <= 4);
}
