//! The gateway is broken off in the middle, again and again.

use std::collections::BTreeMap;
use std::time::Duration;

use isthmus::bridge::Cause;
use serde_json::json;

use super::world::{Gateway, LM, World, so};

/// How many messages each side sends, and how often the gateway is broken off meanwhile.
const MESSAGES: usize = 60;
const KILLS: usize = 6;

/// Each body once, and those of each sender in order.
#[track_caller]
fn assert_complete(side: &str, said: &[(String, String)], senders: &[String]) {
    let mut by_sender: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (sender, body) in said {
        by_sender.entry(sender).or_default().push(body);
    }
    for sender in senders {
        let expected: Vec<String> = (0..MESSAGES).map(|number| number.to_string()).collect();
        assert_eq!(by_sender.get(sender.as_str()).cloned().unwrap_or_default(), expected, "{sender} on {side}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_5_hc_82_nothing_is_lost_or_doubled_when_a_hub_is_broken_off() {
    let (world, gateway) = World::new(json!({})).await;
    let portal = gateway.public_portal().await;
    world.lm_join(&portal.lm_room_id, "bob").await.unwrap();
    talk_and_break(&world, gateway, &portal).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_5_hc_36_nothing_is_lost_or_doubled_when_a_participant_is_broken_off() {
    let (world, gateway) = World::new(json!({})).await;
    let creator = world.lm_user("bob");
    let initial_state =
        vec![super::world::draft(&creator, "m.room.join_rules", Some(""), json!({ "join_rule": "public" }))];
    let version = isthmus::event::RoomVersion::Lm02;
    let room = isthmus::lm::NewRoom { creator, version, initial_state };
    let lm = world.server.lm.create_room(room).await.unwrap();
    let via = [LM.try_into().unwrap()];
    let portal = gateway.bridge.portal_from_lm(&lm, &via, None, Cause::Admin).await.unwrap();
    talk_and_break(&world, gateway, &portal).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_5_a_portal_whose_making_is_broken_off_is_made_once_all_the_same() {
    for pause in [0, 3, 6, 10, 15, 25, 60] {
        let (world, gateway) = World::new(json!({})).await;
        let bob = world.lm_user("bob");
        let rules = super::world::draft(&bob, "m.room.join_rules", Some(""), json!({ "join_rule": "public" }));
        let version = isthmus::event::RoomVersion::Lm02;
        let room = isthmus::lm::NewRoom { creator: bob, version, initial_state: vec![rules] };
        let lm = world.server.lm.create_room(room).await.unwrap();
        for number in 0..20 {
            world.lm_join_own(&lm, &format!("user{number}")).await;
        }
        let (bridge, room) = (gateway.bridge.clone(), lm.clone());
        let asking = tokio::spawn(async move {
            let via = [LM.try_into().unwrap()];
            bridge.portal_from_lm(&room, &via, None, Cause::Admin).await
        });
        tokio::time::sleep(Duration::from_millis(pause)).await;
        let gateway = world.kill(gateway).await;
        let asked = asking.await.unwrap();
        let portal = match asked {
            Ok(portal) => portal,
            // It is taken up by itself, or, when it was not written down yet, by who asks again.
            Err(_) => {
                let via = [LM.try_into().unwrap()];
                super::world::until("the portal", || async {
                    let asked = gateway.bridge.portal_from_lm(&lm, &via, None, Cause::Admin).await;
                    asked.inspect_err(|refusal| eprintln!("after {pause} ms: {refusal}")).ok()
                })
                .await
            }
        };
        so("both states in step", || gateway.in_step(&portal)).await;
        let members = gateway.bridge.health(&portal.portal_id).await.unwrap().members;
        assert_eq!((members.matrix.len(), members.lm.len()), (0, 21));
        let joins = gateway
            .matrix_events(&portal.matrix_room_id)
            .await
            .into_iter()
            .filter(|(_, event)| event["content"].get("membership").is_some_and(|membership| membership == "join"));
        assert_eq!(joins.count(), 22, "each ghost and the bot joined once");
        assert_eq!(gateway.bridge.portals(None, 10).await.unwrap().len(), 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_6_a_transaction_that_could_not_be_stored_is_not_acknowledged_and_comes_again() {
    use isthmus::federation::Call;
    use isthmus::identity::Side;
    let (world, gateway) = World::new(json!({})).await;
    let portal = gateway.public_portal().await;
    let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
    // A homeserver with a client of its own, to send a transaction over HTTP.
    let other = world.other_server().await;
    let mut peer = crate::dag::peer::Peer::start(super::world::OTHER).await;
    peer.key = other.context.signing_key.clone();
    let carol = peer.user("carol");
    let mut view = World::matrix_join_from(&peer, &gateway, matrix, &carol).await.unwrap();
    world.lm_join(lm, "bob").await.unwrap();
    so("all members everywhere", || gateway.in_step(&portal)).await;

    // Nothing comes into the bridge's inbox: the whole write fails, of the event too.
    world.break_inserts("bridge_inbox").await;
    let message = json!({ "msgtype": "m.text", "body": "from carol" });
    let (id, event) = view.add(&peer, &carol, "m.room.message", None, message);
    let own: ruma::OwnedServerName = crate::dag::OWN.try_into().unwrap();
    let send = || async {
        let body = json!({ "origin": super::world::OTHER, "origin_server_ts": crate::dag::NOW, "pdus": [event] });
        let call = Call::put("/_matrix/federation/v1/send/one".to_owned(), super::world::object(body));
        other.context.client.call(&own, call, false).await
    };
    let refused = send().await.unwrap_err().to_string();
    assert!(refused.contains("500"), "{refused}");
    assert!(gateway.dag.event(&id).await.unwrap().is_none());
    world.lm_say(lm, "bob", "from bob").await;
    so("bob's hub-bound transaction failed", || async {
        let queues = world.server.context.outbound.status().await.unwrap();
        queues.iter().any(|queue| queue.destination == own && queue.failures > 0)
    })
    .await;
    assert!(gateway.node.bodies(lm).await.is_empty());

    world.mend_inserts("bridge_inbox").await;
    assert!(send().await.is_ok(), "the same transaction again");
    assert!(send().await.is_ok());
    world.server.context.outbound.retry(&own);
    let all = |mut bodies: Vec<(String, String)>| {
        bodies.sort();
        bodies.into_iter().map(|(_, body)| body).collect::<Vec<_>>()
    };
    so("both in both rooms", || async {
        gateway.matrix_bodies(matrix).await.len() >= 2 && gateway.node.bodies(lm).await.len() >= 2
    })
    .await;
    so("both states in step", || gateway.in_step(&portal)).await;
    assert_eq!(all(gateway.node.bodies(lm).await), ["from bob", "from carol"]);
    assert_eq!(gateway.matrix_bodies(matrix).await.len(), 2);

    // The image's own effect fails: the image is not there, its source waits, and it crosses once when that has passed.
    world.break_inserts("bridge_images").await;
    let message = json!({ "msgtype": "m.text", "body": "again carol" });
    let (_, event) = view.add(&peer, &carol, "m.room.message", None, message);
    peer.put(&gateway.dag, &[&event]).await.pop().unwrap().result.unwrap();
    world.lm_say(lm, "bob", "again bob").await;
    so("both wait", || async {
        let waiting = gateway.bridge.health(&portal.portal_id).await.unwrap().waiting;
        waiting.iter().all(|waiting| waiting.count == 1)
    })
    .await;
    assert!(!gateway.matrix_bodies(matrix).await.iter().any(|(_, body)| body == "again bob"));
    assert!(!gateway.node.bodies(lm).await.iter().any(|(_, body)| body == "again carol"));
    world.mend_inserts("bridge_images").await;
    world.advance(10_000);
    so("both crossed", || gateway.in_step(&portal)).await;
    let ghosts = [super::world::ghost(Side::Lm, "bob"), format!("@mx_carol_{}:{own}", super::world::OTHER)];
    let crossed = [gateway.matrix_bodies(matrix).await, gateway.node.bodies(lm).await];
    for ((bodies, ghost), body) in crossed.iter().zip(&ghosts).zip(["again bob", "again carol"]) {
        let found: Vec<_> = bodies.iter().filter(|(_, said)| said == body).collect();
        assert!(found.len() == 1 && found[0].0 == *ghost, "{bodies:?}");
    }
}

async fn talk_and_break(world: &World, gateway: Gateway, portal: &isthmus::bridge::Portal) {
    use isthmus::identity::Side;
    let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
    let alice = world.matrix_user("alice");
    let mut view = world.matrix_join(&gateway, matrix, &alice).await.unwrap();
    let mut gateway = gateway;
    for number in 0..MESSAGES {
        world.matrix_say(&gateway, &mut view, &alice, &number.to_string()).await;
        world.lm_say(lm, "bob", &number.to_string()).await;
        if number % (MESSAGES / KILLS) == 3 {
            // A moment in which something is under way, another one each time.
            tokio::time::sleep(Duration::from_millis(u64::try_from(number).unwrap() % 17)).await;
            gateway = world.kill(gateway).await;
        }
    }
    so("all is carried over", || async {
        gateway.in_step(portal).await
            && gateway.matrix_bodies(matrix).await.len() >= 2 * MESSAGES
            && world.server.bodies(lm).await.len() >= 2 * MESSAGES
    })
    .await;
    let in_log = world.server.bodies(lm).await;
    let in_graph = gateway.matrix_bodies(matrix).await;
    let (bob, bobs_ghost) = (world.lm_user("bob").to_string(), super::world::ghost(Side::Lm, "bob"));
    let alices_ghost = super::world::ghost(Side::Matrix, "alice");
    assert_complete("the hub", &in_log, &[alices_ghost, bob]);
    assert_complete("Matrix", &in_graph, &[alice.to_string(), bobs_ghost]);
    assert_eq!(in_log.len(), 2 * MESSAGES);
    assert_eq!(in_graph.len(), 2 * MESSAGES);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_came_while_the_database_failed_is_carried_when_it_is_well_again() {
    let (world, gateway) = World::new(json!({ "budgets": { "events_per_second": 1 } })).await;
    let lm = super::from_lm::room(&world, "public").await;
    let via = [LM.try_into().unwrap()];
    let portal = gateway.bridge.portal_from_lm(&lm, &via, None, Cause::Admin).await.unwrap();
    let alice = world.matrix_user("alice");
    let mut view = world.matrix_join(&gateway, &portal.matrix_room_id, &alice).await.unwrap();
    so("both states in step", || gateway.in_step(&portal)).await;
    let count = |side: usize| {
        let (bridge, id) = (gateway.bridge.clone(), portal.portal_id.clone());
        async move { bridge.health(&id).await.unwrap().waiting[side].count }
    };
    // Some of what hubert says waits for his server's budget, so that there is something to do when it is well again.
    for number in 0..70 {
        world.lm_say(&lm, "hubert", &number.to_string()).await;
    }
    so("all of it here", || async { gateway.node.bodies(&lm).await.len() == 70 }).await;
    so("some of it waits", || async { (1..30).contains(&count(1).await) }).await;
    world.break_inbox(isthmus::identity::Side::Lm).await;
    world.matrix_say(&gateway, &mut view, &alice, "echo me").await;
    so("alice's words at the hub", || async {
        world.server.bodies(&lm).await.iter().any(|(_, body)| body == "echo me")
    })
    .await;
    so("the echo", || async { gateway.node.bodies(&lm).await.len() == 71 }).await;
    world.mend_inserts("bridge_inbox").await;
    world.advance(120_000);
    so("all carried, and nothing pending", || gateway.in_step(&portal)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_5_an_lpdu_that_its_hub_appends_twice_while_it_waits_crosses_once_and_stops_nothing() {
    use isthmus::event::{Completion, Lpdu, Object, Pdu, VerifyKey, VerifyKeys};
    let (world, gateway) = World::new(json!({ "budgets": { "events_per_second": 1 } })).await;
    let lm = super::from_lm::room(&world, "public").await;
    let via = [LM.try_into().unwrap()];
    let portal = gateway.bridge.portal_from_lm(&lm, &via, None, Cause::Admin).await.unwrap();
    let other = world.other_server().await;
    let carol = ruma::UserId::parse(format!("@carol:{}", super::world::OTHER)).unwrap();
    other.lm.join(&lm, &carol, &via, Object::new()).await.unwrap();
    so("both states in step", || gateway.in_step(&portal)).await;
    // Some of what carol says waits for her server's budget.
    const COUNT: usize = 80;
    for number in 0..COUNT {
        let draft = super::world::message(&carol, &number.to_string());
        let outgoing = isthmus::seam::Outgoing { draft, effect: None };
        other.lm.send(&lm, vec![outgoing]).await.pop().unwrap().unwrap();
    }
    let waiting = || async { gateway.bridge.health(&portal.portal_id).await.unwrap().waiting[1].count };
    so("all of it here", || async { gateway.node.bodies(&lm).await.len() == COUNT }).await;
    so("what is within the budget", || async { (5..25).contains(&waiting().await) }).await;

    // Her last words are appended again: another event, with the same LPDU.
    let log = gateway.node.log(&lm).await;
    let last = log.last().unwrap().event.clone();
    let mut lpdu = last.json.clone();
    for key in ["auth_events", "prev_events"] {
        lpdu.remove(key).unwrap();
    }
    lpdu["hashes"].as_object_mut().unwrap().remove("sha256");
    lpdu["signatures"].as_object_mut().unwrap().remove(LM).unwrap();
    let auth = last.json["auth_events"].as_array().unwrap().iter().map(|id| id.as_str().unwrap().try_into().unwrap());
    let completion = Completion { auth_events: auth.collect(), prev_event: Some(last.event_id.clone()) };
    let (hub, key) = (&world.server.context.server_name, &world.server.context.signing_key);
    let carols = &other.context.signing_key;
    let of_carol = (carols.id().to_owned(), VerifyKey::from_base64(&carols.public_base64()).unwrap());
    let keys = VerifyKeys::from([(other.context.server_name.clone(), [of_carol].into())]);
    let lpdu = Lpdu::parse(lpdu).unwrap().verify(&keys).unwrap();
    let twin = Pdu::complete(lpdu, completion, hub, key).unwrap();
    assert!(twin.event_id != last.event_id && twin.lpdu_id == last.lpdu_id);
    let received = gateway.node.lm.receive(hub, vec![crate::lm::world::raw(&twin.json)]).await.pop().unwrap();
    assert_eq!(received.result, Ok(()));
    assert_eq!(gateway.node.bodies(&lm).await.len(), COUNT + 1);
    so("it is looked at", || async { gateway.bridge.explain(&twin.event_id).await.unwrap().is_some() }).await;

    world.advance(61_000);
    so("all carried", || gateway.in_step(&portal)).await;
    let bodies: Vec<usize> = gateway
        .matrix_bodies(&portal.matrix_room_id)
        .await
        .into_iter()
        .map(|(_, body)| body.parse().unwrap())
        .collect();
    assert_eq!(bodies, (0..COUNT).collect::<Vec<_>>());
    let refusals = gateway.bridge.health(&portal.portal_id).await.unwrap().refusals;
    assert!(refusals.iter().all(|refused| refused.code == "not_bridged"), "{refusals:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_portal_whose_making_could_not_be_written_down_is_made_when_the_database_is_well_again() {
    use isthmus::bridge::{NewPortal, PortalState};
    let (world, gateway) = World::new(json!({})).await;
    let lm = super::from_lm::room(&world, "public").await;
    let via = [LM.try_into().unwrap()];
    let ask = || gateway.bridge.portal_from_lm(&lm, &via, None, Cause::Admin);
    let active = |count: usize| {
        let bridge = gateway.bridge.clone();
        async move {
            let portals = bridge.portals(None, 10).await.unwrap();
            portals.iter().filter(|portal| portal.state == PortalState::Active).count() == count
        }
    };
    world.break_portals("active").await;
    assert_eq!(ask().await.map(drop).unwrap_err().code(), "internal");
    let new = NewPortal { join_rule: Some("public".to_owned()), ..NewPortal::default() };
    assert_eq!(gateway.bridge.create_portal(new).await.map(drop).unwrap_err().code(), "internal");
    assert!(active(0).await);
    // Who asks again waits for the same portal.
    let (again, ()) = tokio::join!(ask(), world.mend_inserts("bridge_portals"));
    let portal = again.unwrap();
    so("both portals", || active(2)).await;
    world.lm_say(&lm, "hubert", "hello").await;
    so("hello across", || async { gateway.matrix_bodies(&portal.matrix_room_id).await.len() == 1 }).await;
    assert_eq!(gateway.bridge.portals(None, 10).await.unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_portal_whose_failure_could_not_be_written_down_can_be_asked_for_when_the_database_is_well_again() {
    let (world, gateway) = World::new(json!({})).await;
    let gone: ruma::OwnedRoomId = format!("!gone:{}", super::world::DEAD).try_into().unwrap();
    let via = [super::world::DEAD.try_into().unwrap()];
    let ask = || gateway.bridge.portal_from_lm(&gone, &via, None, Cause::Admin);
    let rows = || async {
        let sql = "SELECT state, COUNT(*) FROM bridge_portals GROUP BY state ORDER BY state";
        sqlx::query_as::<_, (String, i64)>(sql).fetch_all(gateway.node.context.store.reader()).await.unwrap()
    };
    world.break_portals("ended").await;
    let refusal = ask().await.map(drop).unwrap_err();
    assert_eq!(refusal.code(), "remote", "the reason, and not that it could not be written down: {refusal}");
    assert_eq!(rows().await, [("creating".to_owned(), 1)]);
    world.mend_inserts("bridge_portals").await;
    so("the end", || async { rows().await == [("ended".to_owned(), 1)] }).await;
    assert_eq!(ask().await.map(drop).unwrap_err().code(), "remote", "it is tried anew");
    assert_eq!(rows().await, [("ended".to_owned(), 2)]);
}
