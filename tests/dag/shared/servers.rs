//! Which servers a shared room's log is for, hubs that come back, and gaps of several branches.

use isthmus::lm::NewRoom as NewLogRoom;

use super::*;
use crate::lm::world::{self, World};

#[tokio::test]
async fn who_comes_by_the_hub_gets_the_log_though_that_counts_somebody_of_theirs_already() {
    let (peer, other) = (Peer::start("graph.example").await, Peer::start("other.example").await);
    let hub = Hub::real(&[&peer, &other]).await;
    let (alice, oscar, olga) = (peer.user("alice"), other.user("oscar"), other.user("olga"));
    let levels = json!({ "users": { (bot().as_str()): 100 }, "users_default": 50 });
    let public = state("m.room.join_rules", "", json!({ "join_rule": "public" }));
    let initial_state = vec![state("m.room.power_levels", "", levels), public];
    let room = hub.gateway.dag.create(NewShared { creator: bot(), version: LM, initial_state }).await.unwrap();
    peer.join(&hub.gateway, &room, &alice).await.unwrap();
    // Nobody can correct anything.
    let levels = json!({ "users": { (bot().as_str()): 0, (alice.as_str()): 100 }, "users_default": 0 });
    hub.gateway.send(&room, state("m.room.power_levels", "", levels)).await.unwrap();
    let base = hub.view(&room).await;
    // Oscar comes as a graph server's user, and the room was closed at once.
    other.join(&hub.gateway, &room, &oscar).await.unwrap();
    let rules = |rule: &str| draft(&alice, "m.room.join_rules", Some(""), json!({ "join_rule": rule }));
    assert!(hub.pdu(&peer, &mut base.clone(), &rules("invite")).await);
    assert!(!hub.gateway.dag.joined_servers(&room).await.unwrap().contains(&other.name));
    assert_eq!(hub.says(&room, "m.room.member", oscar.as_str()).await["membership"], "join");
    assert_eq!(hub.gateway.dag.uncorrected(&room).await.unwrap().len(), 1);
    let mut view = hub.view(&room).await;
    assert!(hub.pdu(&peer, &mut view, &rules("public")).await);
    let feeds = async || {
        let query = "SELECT kind, sent FROM outbound_cursors WHERE destination = $1 AND ends_at IS NULL";
        let query = sqlx::query_as::<_, (String, i64)>(query).bind(other.name.as_str());
        query.fetch_all(hub.gateway.context.store.reader()).await.unwrap()
    };
    assert_eq!(feeds().await, []);
    hub.lpdu(&other, &room, member(&olga, &olga, "join")).await.unwrap();
    let (feeds, head) = (feeds().await, i64::try_from(hub.log(&room).await.events.len()).unwrap() - 1);
    assert_eq!(feeds, [("log".to_owned(), head - 1)]);
}

#[tokio::test]
async fn of_two_gaps_the_one_that_is_further_back_is_closed_first() {
    let peer = Peer::start("graph.example").await;
    let hub = Hub::start(&[&peer]).await;
    let room = hub.room().await;
    let alice = peer.user("alice");
    peer.join(&hub.gateway, &room, &alice).await.unwrap();
    let base = hub.view(&room).await;
    // By their IDs they would come in the other order.
    for number in 0.. {
        let (mut view, mut branch) = (base.clone(), base.clone());
        let (lost, _) = view.say(&peer, &alice, &format!("lost {number}"));
        let (first, first_event) = view.say(&peer, &alice, &format!("first {number}"));
        let (lost_too, _) = branch.say(&peer, &alice, &format!("lost too {number}"));
        view.tips.push(lost_too.clone());
        let (second, second_event) = view.say(&peer, &alice, &format!("second {number}"));
        if first < second {
            continue;
        }
        peer.memory.hidden.lock().unwrap().extend([lost, lost_too]);
        let state: Vec<_> = base.state.values().cloned().collect();
        peer.memory.states.lock().unwrap().extend([(first.clone(), state.clone()), (second.clone(), state)]);
        for received in peer.put(&hub.gateway.dag, &[&first_event, &second_event]).await {
            assert_eq!(received.result, Ok(()));
        }
        let ids = hub.log(&room).await.ids();
        assert_eq!(ids[ids.len() - 2..], [first, second]);
        break;
    }
    hub.assert_in_step(&room).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_that_comes_back_puts_into_the_log_what_its_rules_have_there() {
    let (_world, [a, b]) = World::new(["a.example", "b.example"]).await;
    let (owner, bob, dave) = (a.user("bot"), b.user("bob"), b.user("dave"));
    let levels = |dave_has: i64| json!({ "users": { owner.as_str(): (1_i64 << 53) - 1, bob.as_str(): 100, dave.as_str(): dave_has } });
    let initial_state = vec![
        world::draft(&owner, "m.room.power_levels", Some(""), levels(0)),
        world::draft(&owner, "m.room.join_rules", Some(""), json!({ "join_rule": "public" })),
    ];
    let room = NewLogRoom { creator: owner.clone(), version: LM, initial_state };
    let room = a.lm.create_shared(room).await.unwrap();
    b.join(&room, "bob", &a).await;
    let server = [b.name.clone()];
    b.dag.join(&room, &server, &dave, Object::new()).await.unwrap();
    let is_in = |user: &OwnedUserId, is: bool| {
        let user = user.clone();
        move |log: &[isthmus::lm::Appended]| {
            let last = log.iter().rev().find(|one| one.event.state_key.as_deref() == Some(user.as_str()));
            last.is_some_and(|one| (one.event.content()["membership"] == "join") == is)
        }
    };
    a.wait(&room, "dave", is_in(&dave, true)).await;
    a.lm.leave(&room, &owner, &[]).await.unwrap();
    b.wait(&room, "the owner to be gone", is_in(&owner, false)).await;
    // Dave may set the topic for a moment, of which nothing is left when the owner comes back but the topic.
    let send = async |draft| b.send(&room, draft).await.unwrap();
    send(world::draft(&bob, "m.room.power_levels", Some(""), levels(60))).await;
    send(world::draft(&dave, "m.room.topic", Some(""), json!({ "topic": "daves" }))).await;
    send(world::draft(&bob, "m.room.power_levels", Some(""), levels(0))).await;
    a.dag.join(&room, &server, &owner, Object::new()).await.unwrap();

    let events = a.lm.log(&room, Position(0), 1000).await.unwrap();
    let events: Vec<_> = events.into_iter().map(|appended| (appended.event, LogOrigin::default())).collect();
    let state = a.lm.state(&room).await.unwrap();
    assert_eq!(state.get("m.room.topic", "").unwrap().content()["topic"], "daves");
    assert_eq!(a.dag.state_event(&room, "m.room.topic", "").await.unwrap().unwrap().content["topic"], "daves");
    let hub = a.name.clone();
    let log = Log { room: NewLog { room_id: room.clone(), version: LM, hub }, events, state: BTreeMap::new() };
    log.assert_sound();
    assert_eq!(a.dag.uncorrected(&room).await.unwrap(), []);
}

#[tokio::test]
async fn all_of_a_wide_gap_comes_into_the_log_in_order() {
    let peer = Peer::start("graph.example").await;
    let hub = Hub::real(&[&peer]).await;
    for backfills in [false, true] {
        *peer.memory.page.lock().unwrap() = Some((20, backfills));
        let room = hub.room().await;
        let alice = peer.user("alice");
        let mut view = peer.join(&hub.gateway, &room, &alice).await.unwrap();
        let said: Vec<_> = (0..301).map(|number| view.say(&peer, &alice, &format!("{number}"))).collect();
        let before = hub.log(&room).await.events.len();
        assert_eq!(peer.put(&hub.gateway.dag, &[&said[300].1]).await[0].result, Ok(()));
        let expected: Vec<_> = said.into_iter().map(|(id, _)| id).collect();
        assert_eq!(hub.log(&room).await.ids()[before..], expected);
        hub.assert_in_step(&room).await;
    }
}
