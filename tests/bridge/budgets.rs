//! A server that sends too much waits, and nobody waits for it.

use isthmus::identity::Side;
use serde_json::json;

use super::world::{World, ghost, so};

/// What a server may send at once when it may send one event a second.
const BURST: usize = 60;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_over_the_budget_waits_and_nobody_waits_for_them() {
    let (world, gateway) = World::new(json!({ "budgets": { "events_per_second": 1 } })).await;
    let (portal, mut view) = world.portal_of_two(&gateway).await;
    let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
    let alice = world.matrix_user("alice");
    let bobs = ghost(Side::Lm, "bob");
    let heard = || async {
        let bodies = gateway.matrix_bodies(matrix).await;
        bodies.into_iter().filter(|(by, _)| *by == bobs).map(|(_, body)| body).collect::<Vec<_>>()
    };
    let numbers = |count: usize| (0..count).map(|number| number.to_string()).collect::<Vec<_>>();
    for number in 0..2 * BURST {
        world.lm_say(lm, "bob", &number.to_string()).await;
    }
    // His join was one, and a second or two may have passed.
    so("a burst", || async { heard().await.len() >= BURST - 1 }).await;
    world.matrix_say(&gateway, &mut view, &alice, "am I heard?").await;
    let said = (ghost(Side::Matrix, "alice"), "am I heard?".to_owned());
    so("alice is heard", || async { gateway.node.bodies(lm).await.contains(&said) }).await;
    let waiting = gateway.bridge.health(&portal.portal_id).await.unwrap().waiting[1].count;
    assert!(waiting > 0, "{:?}", heard().await.len());
    // In time all come, in order.
    world.advance(61_000);
    so("the rest", || async { heard().await.len() == 2 * BURST }).await;
    assert_eq!(heard().await, numbers(2 * BURST));

    // What waits too long is refused.
    for number in 2 * BURST..6 * BURST {
        world.lm_say(lm, "bob", &number.to_string()).await;
    }
    so("they wait", || async { gateway.bridge.health(&portal.portal_id).await.unwrap().waiting[1].count > 0 }).await;
    so("all accepted", || async {
        gateway.node.bodies(lm).await.iter().filter(|(by, _)| *by == world.lm_user("bob")).count() == 6 * BURST
    })
    .await;
    world.advance(601_000);
    so("nothing waits", || async {
        world.advance(1_000);
        gateway.bridge.health(&portal.portal_id).await.unwrap().waiting[1].count == 0
    })
    .await;
    let refusals = gateway.bridge.health(&portal.portal_id).await.unwrap().refusals;
    assert!(refusals.iter().any(|refused| refused.code == "budget"), "{refusals:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_82_what_is_put_off_does_not_wait_for_a_clock_that_was_set_back() {
    let (world, gateway) = World::new(json!({ "budgets": { "events_per_second": 1 } })).await;
    let portal = gateway.public_portal().await;
    let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
    world.lm_join(lm, "bob").await.unwrap();
    so("all members everywhere", || gateway.in_step(&portal)).await;
    for number in 0..BURST + 20 {
        world.lm_say(lm, "bob", &number.to_string()).await;
    }
    so("all accepted", || async { gateway.node.bodies(lm).await.len() == BURST + 20 }).await;
    so("some wait", || async { gateway.bridge.health(&portal.portal_id).await.unwrap().waiting[1].count < 25 }).await;
    world.advance(-86_400_000);
    so("the rest", || async {
        world.advance(1_000);
        gateway.matrix_bodies(matrix).await.len() == BURST + 20
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_floods_a_room_does_not_keep_others_from_being_read() {
    /// More than is read at once.
    const FLOOD: usize = 800;
    let (world, gateway) = World::new(json!({ "budgets": { "events_per_second": 2 } })).await;
    let portal = gateway.public_portal().await;
    let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
    let alice = world.matrix_user("alice");
    world.matrix_join(&gateway, matrix, &alice).await.unwrap();
    let other = world.other_server().await;
    let mut peer = crate::dag::peer::Peer::start(super::world::OTHER).await;
    peer.key = other.context.signing_key.clone();
    let carol = peer.user("carol");
    World::matrix_join_from(&peer, &gateway, matrix, &carol).await.unwrap();
    world.lm_join(lm, "bob").await.unwrap();
    so("all members everywhere", || gateway.in_step(&portal)).await;
    let mut view = world.matrix_join(&gateway, matrix, &world.matrix_user("dave")).await.unwrap();
    let mut events = Vec::new();
    for number in 0..FLOOD {
        let content = json!({ "msgtype": "m.text", "body": number.to_string() });
        events.push(view.add(&world.peer, &alice, "m.room.message", None, content).1);
    }
    for chunk in events.chunks(50) {
        for answer in world.peer.put(&gateway.dag, &chunk.iter().collect::<Vec<_>>()).await {
            answer.result.unwrap();
        }
    }
    let alices = ghost(Side::Matrix, "alice");
    let heard = || async {
        let bodies = gateway.node.bodies(lm).await;
        bodies
            .into_iter()
            .filter(|(by, _)| *by == alices)
            .filter_map(|(_, body)| body.parse().ok())
            .collect::<Vec<usize>>()
    };
    so("a burst", || async { heard().await.len() >= 2 * BURST - 2 }).await;
    // However slow all this is, alice has no more time.
    world.stop_clock();
    for body in ["am I heard?", "and still?"] {
        let content = json!({ "msgtype": "m.text", "body": body });
        let (_, event) = view.add(&peer, &carol, "m.room.message", None, content);
        peer.put(&gateway.dag, &[&event]).await.pop().unwrap().result.unwrap();
        so("carol is heard", || async { gateway.node.bodies(lm).await.iter().any(|(_, said)| said == body) }).await;
    }
    assert!(heard().await.len() < FLOOD / 2);
    // In time all come, in order.
    for count in (1..=6).map(|minute| FLOOD.min((minute + 1) * 2 * BURST - 2)) {
        world.advance(61_000);
        so("more of it", || async { heard().await.len() >= count }).await;
    }
    so("all of it", || async { heard().await.len() == FLOOD }).await;
    assert!(heard().await.is_sorted());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_so_many_new_ghosts_an_hour() {
    let (world, gateway) = World::new(json!({ "budgets": { "ghosts_per_hour": 2 } })).await;
    let portal = gateway.public_portal().await;
    let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
    for name in ["one", "two"] {
        let user = world.matrix_user(name);
        world.matrix_join(&gateway, matrix, &user).await.unwrap();
        so("the ghost", || async { gateway.node.membership(lm, &ghost(Side::Matrix, name)).await == "join" }).await;
    }
    let three = world.matrix_user("three");
    let refused = world.matrix_join(&gateway, matrix, &three).await.unwrap_err();
    assert_eq!((refused.code(), refused.status().as_u16()), ("budget", 429));
    // Another server has its own.
    world.lm_join(lm, "bob").await.unwrap();
    so("all members everywhere", || gateway.in_step(&portal)).await;
    world.advance(1_800_000);
    world.matrix_join(&gateway, matrix, &three).await.unwrap();
    so("the third ghost", || async { gateway.node.membership(lm, &ghost(Side::Matrix, "three")).await == "join" })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_of_which_too_much_waits_is_told_to_wait_and_nothing_is_lost() {
    let budgets = json!({ "events_per_second": 1, "backlog": 50 });
    let (world, gateway) = World::new(json!({ "budgets": budgets })).await;
    let lm = super::from_lm::room(&world, "public").await;
    let via = [super::world::LM.try_into().unwrap()];
    let portal = gateway.bridge.portal_from_lm(&lm, &via, None, isthmus::bridge::Cause::Admin).await.unwrap();
    let other = super::from_lm::room(&world, "public").await;
    let other_portal = gateway.bridge.portal_from_lm(&other, &via, None, isthmus::bridge::Cause::Admin).await.unwrap();
    let own: ruma::OwnedServerName = crate::dag::OWN.try_into().unwrap();
    let paused = || async { gateway.bridge.health(&portal.portal_id).await.unwrap().paused };
    for number in 0..3 * BURST {
        world.lm_say(&lm, "hubert", &number.to_string()).await;
    }
    so("the pause", paused).await;
    world.lm_say(&lm, "hubert", "one more").await;
    so("the hub is told", || async {
        let queues = world.server.context.outbound.status().await.unwrap();
        queues.iter().any(|queue| queue.destination == own && queue.failures > 0)
    })
    .await;
    // By no other way does it get more in, and what it sends into other rooms is taken.
    let head = async || gateway.node.lm.room(&lm).await.unwrap().unwrap().head;
    let before = head().await;
    let last = |log: Vec<isthmus::lm::Appended>| json!(log.last().unwrap().event.json);
    world.lm_say(&other, "hubert", "elsewhere").await;
    let logs = [&lm, &other].map(|room| world.server.lm.log(room, isthmus::lm::Position(0), 1000));
    let pdus: Vec<_> = futures::future::join_all(logs).await.into_iter().map(|log| last(log.unwrap())).collect();
    for path in ["v1/send/a", "v2/send/b"] {
        let body = json!({ "pdus": pdus, "origin": world.server.context.server_name, "origin_server_ts": 1 });
        let call =
            isthmus::federation::Call::put(format!("/_matrix/federation/{path}"), body.as_object().unwrap().clone());
        let refused = world.server.context.client.call(&own, call, false).await.unwrap_err();
        assert!(refused.to_string().contains("429"), "{path}: {refused}");
        assert_eq!(head().await, before, "{path}");
    }
    so("the other room goes on", || async {
        gateway.matrix_bodies(&other_portal.matrix_room_id).await
            == [(ghost(Side::Lm, "hubert"), "elsewhere".to_owned())]
    })
    .await;
    // As time goes on, all of it comes, in order.
    let hubert = ghost(Side::Lm, "hubert");
    for count in [2 * BURST - 2, 3 * BURST - 2, 3 * BURST + 1] {
        world.advance(61_000);
        so("more of it", || async {
            world.server.context.outbound.retry(&own);
            gateway.matrix_bodies(&portal.matrix_room_id).await.len() >= count
        })
        .await;
    }
    let bodies = gateway.matrix_bodies(&portal.matrix_room_id).await;
    let mut expected: Vec<_> = (0..3 * BURST).map(|number| (hubert.clone(), number.to_string())).collect();
    expected.push((hubert.clone(), "one more".to_owned()));
    assert_eq!(bodies, expected);
    so("it goes on", || async { !paused().await }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_large_room_as_many_ghosts_come_at_once_as_the_budget_allows() {
    let (world, gateway) = World::new(json!({ "budgets": { "ghosts_per_hour": 3 } })).await;
    let lm = super::from_lm::room(&world, "public").await;
    for number in 0..6 {
        world.lm_join_own(&lm, &format!("member{number}")).await;
    }
    let via = [super::world::LM.try_into().unwrap()];
    let portal = gateway.bridge.portal_from_lm(&lm, &via, None, isthmus::bridge::Cause::Admin).await.unwrap();
    let ghosts = || async {
        let state = gateway.dag.state(&portal.matrix_room_id).await.unwrap();
        state.iter().filter(|((kind, user), _)| kind == "m.room.member" && user.starts_with("@lm_")).count()
    };
    assert_eq!(ghosts().await, 3);
    so("the rest", || async {
        world.advance(3_600_000);
        gateway.bridge.repair(&portal.portal_id).await.unwrap();
        ghosts().await == 7
    })
    .await;
}
