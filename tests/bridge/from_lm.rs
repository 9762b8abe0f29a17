//! A portal of a room that another LM server keeps: the log has authority.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use isthmus::bridge::{Cause, Portal};
use isthmus::event::RoomVersion;
use isthmus::identity::Side;
use isthmus::lm::NewRoom;
use isthmus::refusal::Refusal;
use isthmus::seam::Outgoing;
use ruma::OwnedRoomId;
use serde_json::{Value, json};

use crate::dag::OWN;
use crate::dag::peer::View;
use crate::lm::log_hub::{Manners, respond};

use super::world::{DEAD, Gateway, LM, World, draft, ghost, in_each_version, message, so, until};

/// A room at the LM server: `@hubert` made it, and these rules and this name are in it.
pub async fn room(world: &World, join_rule: &str) -> OwnedRoomId {
    let creator = world.lm_user("hubert");
    let state = |kind: &str, content: Value| draft(&creator, kind, Some(""), content);
    let initial_state = vec![
        state("m.room.power_levels", json!({ "users": { creator.as_str(): 100 } })),
        state("m.room.join_rules", json!({ "join_rule": join_rule })),
        state("m.room.name", json!({ "name": "Tea" })),
    ];
    let room = NewRoom { creator: creator.clone(), version: RoomVersion::Lm02, initial_state };
    world.server.lm.create_room(room).await.unwrap()
}

async fn hub_says(world: &World, room: &OwnedRoomId, name: &str, body: &str) {
    let draft = message(&world.lm_user(name), body);
    world.server.lm.send(room, vec![Outgoing { draft, effect: None }]).await.pop().unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_matrix_user_joins_an_lm_room_by_its_alias_and_both_talk() {
    in_each_version(joined_by_alias).await;
}

async fn joined_by_alias(world: World, gateway: Gateway) {
    let lm = room(&world, "public").await;
    let alias = format!("lm_{}_{LM}", lm.as_str().split(':').next().unwrap());
    let target = gateway.bridge.resolve_alias(&alias, Cause::Appservice).await.unwrap();
    let again = gateway.bridge.resolve_alias(&alias, Cause::Appservice).await.unwrap();
    assert_eq!(target, again);
    let portal = gateway.bridge.portals(None, 10).await.unwrap().pop().unwrap();
    let matrix = &portal.matrix_room_id;
    assert_eq!((&portal.lm_room_id, &target.room_id), (&lm, matrix));
    assert_eq!(gateway.matrix_state(matrix, "m.room.name").await.unwrap()["name"], "Tea");
    let address = gateway.matrix_state(matrix, "m.room.canonical_alias").await.unwrap();
    assert_eq!(address["alias"], format!("#{alias}:{OWN}"));
    let hubert = gateway.matrix_member(matrix, &ghost(Side::Lm, "hubert")).await.unwrap();
    assert_eq!(hubert["membership"], "join");

    // When the join is accepted, the ghost is in the log already, and it is the join's image.
    let alice = world.matrix_user("alice");
    let mut view = world.matrix_join(&gateway, matrix, &alice).await.unwrap();
    assert_eq!(world.server.membership(&lm, &ghost(Side::Matrix, "alice")).await, "join");
    let hello = world.matrix_say(&gateway, &mut view, &alice, "hello").await;
    let (from, hello_there) = (ghost(Side::Matrix, "alice"), "hello".to_owned());
    so("hello at the hub", || async { world.server.bodies(&lm).await == [(from.clone(), hello_there.clone())] }).await;
    until("the echo", || async {
        gateway.bridge.explain(&hello).await.unwrap().filter(|found| found.status == "crossed")
    })
    .await;
    hub_says(&world, &lm, "hubert", "hi").await;
    let hi = (ghost(Side::Lm, "hubert"), "hi".to_owned());
    so("hi in the graph", || async { gateway.matrix_bodies(matrix).await.contains(&hi) }).await;
    // A reply to what is on its way waits for its echo.
    let first = world.matrix_say(&gateway, &mut view, &alice, "first").await;
    let content = json!({ "body": "second", "m.relates_to": { "m.in_reply_to": { "event_id": first } } });
    let second = world.matrix_send(&gateway, &mut view, &alice, "m.room.message", None, content).await;
    let crossed = |id| {
        let gateway = &gateway;
        async move {
            let found = gateway.bridge.explain(id).await.unwrap()?;
            (found.status == "crossed").then(|| found.across.unwrap())
        }
    };
    let first = until("first", || crossed(&first)).await;
    let second = until("second", || crossed(&second)).await;
    let second = gateway.node.lm.event(&second).await.unwrap().unwrap();
    let content = Value::Object(second.event.content().clone());
    assert_eq!(content["m.relates_to"]["m.in_reply_to"]["event_id"], json!(first));

    let joins = world
        .server
        .log(&lm)
        .await
        .into_iter()
        .filter(|event| event.event.state_key.as_deref() == Some(ghost(Side::Matrix, "alice").as_str()));
    assert_eq!(joins.count(), 1, "alice's ghost joined once");
    so("both states in step", || gateway.in_step(&portal)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_has_authority() {
    in_each_version(the_log_rules).await;
}

async fn the_log_rules(world: World, gateway: Gateway) {
    let lm = room(&world, "public").await;
    let via = [LM.try_into().unwrap()];
    let portal = gateway.bridge.portal_from_lm(&lm, &via, None, Cause::Admin).await.unwrap();
    let matrix = &portal.matrix_room_id;
    let (alice, hubert) = (world.matrix_user("alice"), world.lm_user("hubert"));
    let mut view = world.matrix_join(&gateway, matrix, &alice).await.unwrap();
    let set = async |draft| {
        let sent = world.server.lm.send(&lm, vec![Outgoing { draft, effect: None }]).await.pop().unwrap();
        sent.unwrap();
    };
    set(draft(&hubert, "m.room.topic", Some(""), json!({ "topic": "green" }))).await;
    so("the topic in the graph", || async {
        gateway.matrix_state(matrix, "m.room.topic").await.is_some_and(|content| content["topic"] == "green")
    })
    .await;
    // Whoever may not in the log does not in the graph: the levels are the log's.
    let (_, name) = view.add(&world.peer, &alice, "m.room.name", Some(""), json!({ "name": "Mine" }));
    assert!(world.peer.put(&gateway.dag, &[&name]).await[0].result.is_err());
    set(draft(
        &hubert,
        "m.room.power_levels",
        Some(""),
        json!({ "users": { hubert.as_str(): 100, ghost(Side::Matrix, "alice"): 50 } }),
    ))
    .await;
    so("alice's level in the graph", || async {
        let levels = gateway.matrix_state(matrix, "m.room.power_levels").await.unwrap();
        let mut users = levels["users"].clone();
        // Before version 12 the bot has the highest level there is; from then on creators stand above all levels.
        let bots = users.as_object_mut().unwrap().remove(gateway.bot().as_str());
        let is_v12 = gateway.dag.room(matrix).await.unwrap().unwrap().version == RoomVersion::V12;
        assert_eq!(bots, (!is_v12).then_some(json!(9_007_199_254_740_991_i64)));
        users == json!({ ghost(Side::Lm, "hubert"): 100, alice.as_str(): 50 })
    })
    .await;
    world.refresh(&gateway, &mut view).await;
    world.matrix_send(&gateway, &mut view, &alice, "m.room.name", Some(""), json!({ "name": "Ours" })).await;
    so("the name at the hub", || async {
        world.server.state(&lm, "m.room.name", "").await.is_some_and(|content| content["name"] == "Ours")
    })
    .await;
    // A ban in the log takes alice out of the graph, and keeps her out.
    set(draft(&hubert, "m.room.member", Some(&ghost(Side::Matrix, "alice")), json!({ "membership": "ban" }))).await;
    so("alice banned", || async {
        gateway.matrix_member(matrix, alice.as_str()).await.is_some_and(|content| content["membership"] == "ban")
    })
    .await;
    assert!(world.matrix_join(&gateway, matrix, &alice).await.is_err());
    so("both states in step", || gateway.in_step(&portal)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_39_the_hubs_refusal_of_a_join_is_the_gates() {
    let (world, gateway) = World::new(json!({})).await;
    let lm = room(&world, "public").await;
    let hubert = world.lm_user("hubert");
    let via = [LM.try_into().unwrap()];
    let portal = gateway.bridge.portal_from_lm(&lm, &via, None, Cause::Admin).await.unwrap();
    let mallory = ghost(Side::Matrix, "mallory");
    let ban = draft(&hubert, "m.room.member", Some(&mallory), json!({ "membership": "ban" }));
    world.server.lm.send(&lm, vec![Outgoing { draft: ban, effect: None }]).await.pop().unwrap().unwrap();
    let refused = world.matrix_join(&gateway, &portal.matrix_room_id, &world.matrix_user("mallory")).await;
    assert!(refused.is_err());
    // The Matrix room is no wider than the log: nobody else may let her in either.
    so("both states in step", || gateway.in_step(&portal)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn portals_are_made_by_whom_and_with_whom_the_policy_allows() {
    let access = json!({ "hubs": ["*.trusted"], "create_by_alias": "appservice" });
    let (world, gateway) = World::new(json!({ "access": access })).await;
    let lm = room(&world, "public").await;
    let alias = format!("lm_{}_{LM}", lm.as_str().split(':').next().unwrap());
    let by_server = Cause::Server("other.example".try_into().unwrap());
    for (cause, problem) in [(Cause::Appservice, "hubs"), (by_server, "create_by_alias")] {
        let refusal = gateway.bridge.resolve_alias(&alias, cause).await.unwrap_err();
        assert_eq!(refusal.code(), "policy");
        assert!(refusal.to_string().contains(problem), "{refusal}");
    }
    assert!(gateway.bridge.portals(None, 10).await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_room_whose_hub_shares_graphs_is_refused_in_words_that_reach_who_asked() {
    let (world, gateway) = World::new(json!({})).await;
    let manners = Manners::new(&world.server.context, &world.server.lm, false);
    *world.server.meddler.lock().unwrap() =
        Some(Arc::new(move |request, next| Box::pin(manners.clone().answer(request, next))));
    let lm = room(&world, "public").await;
    let refusal = Refusal::GraphTemplate { server: LM.to_owned(), room_id: lm.to_string() };
    let by_admin = gateway.bridge.portal_from_lm(&lm, &[LM.try_into().unwrap()], None, Cause::Admin).await;
    assert_eq!(by_admin.map(drop), Err(refusal.clone()));
    let localpart = format!("lm_{}_{LM}", lm.as_str().split(':').next().unwrap());
    assert_eq!(gateway.bridge.resolve_alias(&localpart, Cause::Appservice).await, Err(refusal.clone()));
    assert_eq!(gateway.bridge.why_not(&localpart).await, Some(refusal));
}

/// Has the LM server take nothing from the gateway, and say so, until it is told otherwise.
pub fn go_away(world: &World) -> Arc<AtomicBool> {
    let away = Arc::new(AtomicBool::new(true));
    let kept = away.clone();
    *world.server.meddler.lock().unwrap() = Some(Arc::new(move |request, next| {
        let away = kept.load(Ordering::SeqCst) && request.uri().path().contains("/send/");
        Box::pin(async move {
            match away {
                true => respond(http::StatusCode::SERVICE_UNAVAILABLE, json!({})),
                false => next.run(request).await,
            }
        })
    }));
    away
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_39_a_join_that_was_refused_because_the_hub_was_away_is_left_again_when_it_is_back() {
    let (world, gateway) = World::new(json!({})).await;
    let lm = room(&world, "public").await;
    let via = [LM.try_into().unwrap()];
    let portal = gateway.bridge.portal_from_lm(&lm, &via, None, Cause::Admin).await.unwrap();
    so("both states in step", || gateway.in_step(&portal)).await;
    let away = go_away(&world);
    let refused = world.matrix_join(&gateway, &portal.matrix_room_id, &world.matrix_user("alice")).await.unwrap_err();
    assert_eq!(refused.status().as_u16(), 403, "{refused}");
    away.store(false, Ordering::SeqCst);
    let alices = ghost(Side::Matrix, "alice");
    let memberships = || async {
        world.server.context.outbound.retry(OWN.try_into().unwrap());
        gateway.node.context.outbound.retry(LM.try_into().unwrap());
        let log = world.server.log(&lm).await;
        let hers = log.into_iter().filter(|event| event.event.state_key.as_deref() == Some(&alices));
        hers.map(|event| event.event.content()["membership"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    so("the late join and its end", || async { memberships().await == ["join", "leave"] }).await;
    so("both states in step", || gateway.in_step(&portal)).await;
    assert_eq!(gateway.matrix_member(&portal.matrix_room_id, world.matrix_user("alice").as_str()).await, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_39_a_join_that_is_on_its_way_when_the_gateway_dies_is_left_again_when_it_comes() {
    let (world, gateway) = World::new(json!({})).await;
    let lm = room(&world, "public").await;
    let via = [LM.try_into().unwrap()];
    let portal = gateway.bridge.portal_from_lm(&lm, &via, None, Cause::Admin).await.unwrap();
    so("both states in step", || gateway.in_step(&portal)).await;
    let away = go_away(&world);
    let (alice, alices) = (world.matrix_user("alice"), ghost(Side::Matrix, "alice"));
    let failures = |gateway: &Gateway| {
        let outbound = gateway.node.context.outbound.clone();
        async move { outbound.status().await.unwrap().iter().map(|queue| queue.failures).max().unwrap_or(0) }
    };
    tokio::select! {
        _ = world.matrix_join(&gateway, &portal.matrix_room_id, &alice) => panic!("the hub is away"),
        () = so("the join on its way", || async { failures(&gateway).await > 0 }) => {}
    }
    let gateway = world.kill(gateway).await;
    // What is done at the start is done, and the join still has not come.
    so("the hub asked again", || async { failures(&gateway).await > 1 }).await;
    assert!(gateway.in_step(&portal).await);
    away.store(false, Ordering::SeqCst);
    let memberships = || async {
        gateway.node.context.outbound.retry(LM.try_into().unwrap());
        let log = world.server.log(&lm).await;
        let hers = log.into_iter().filter(|event| event.event.state_key.as_deref() == Some(&alices));
        hers.map(|event| event.event.content()["membership"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    so("the late join and its end", || async { memberships().await == ["join", "leave"] }).await;
    so("both states in step", || gateway.in_step(&portal)).await;
    assert_eq!(gateway.matrix_member(&portal.matrix_room_id, alice.as_str()).await, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_comes_back_after_a_kick_is_heard_also_when_the_hub_is_slow() {
    let (world, gateway) = World::new(json!({})).await;
    let lm = room(&world, "public").await;
    let via = [LM.try_into().unwrap()];
    let portal = gateway.bridge.portal_from_lm(&lm, &via, None, Cause::Admin).await.unwrap();
    let matrix = &portal.matrix_room_id;
    let [alice, carol] = ["alice", "carol"].map(|name| world.matrix_user(name));
    world.matrix_join(&gateway, matrix, &carol).await.unwrap();
    let mut view = world.matrix_join(&gateway, matrix, &alice).await.unwrap();
    so("both states in step", || gateway.in_step(&portal)).await;
    let carols = ghost(Side::Matrix, "carol");
    let kick = draft(&world.lm_user("hubert"), "m.room.member", Some(&carols), json!({ "membership": "leave" }));
    world.server.lm.send(&lm, vec![Outgoing { draft: kick, effect: None }]).await.pop().unwrap().unwrap();
    so("carol kicked", || async {
        gateway.matrix_member(matrix, carol.as_str()).await.is_some_and(|content| content["membership"] == "leave")
    })
    .await;
    world.refresh(&gateway, &mut view).await;

    let away = go_away(&world);
    let join = json!({ "membership": "join" });
    world.matrix_send(&gateway, &mut view, &carol, "m.room.member", Some(carol.as_str()), join).await;
    world.matrix_say(&gateway, &mut view, &carol, "back again").await;
    let pending = || async { gateway.bridge.health(&portal.portal_id).await.unwrap().pending };
    so("her join on its way", || async { pending().await == 1 }).await;
    // What is said after hers is decided after hers, and passes it when that has waited long.
    world.matrix_say(&gateway, &mut view, &alice, "hello carol").await;
    so("another's word on its way", || async {
        world.advance(10_000);
        pending().await == 2
    })
    .await;
    away.store(false, Ordering::SeqCst);
    so("her word in the log", || async {
        gateway.node.context.outbound.retry(LM.try_into().unwrap());
        world.server.bodies(&lm).await.contains(&(carols.clone(), "back again".to_owned()))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_comes_speaks_and_goes_while_the_hub_is_away_is_heard_when_it_is_back() {
    let (world, gateway) = World::new(json!({})).await;
    let lm = room(&world, "public").await;
    let via = [LM.try_into().unwrap()];
    let portal = gateway.bridge.portal_from_lm(&lm, &via, None, Cause::Admin).await.unwrap();
    let [alice, carol] = ["alice", "carol"].map(|name| world.matrix_user(name));
    let mut view = world.matrix_join(&gateway, &portal.matrix_room_id, &alice).await.unwrap();
    so("both states in step", || gateway.in_step(&portal)).await;
    world.refresh(&gateway, &mut view).await;
    let away = go_away(&world);
    // Her server is in the room, so nobody asks the gateway.
    let is = |membership: &str| json!({ "membership": membership });
    world.matrix_send(&gateway, &mut view, &carol, "m.room.member", Some(carol.as_str()), is("join")).await;
    let message = world.matrix_say(&gateway, &mut view, &carol, "was here").await;
    world.matrix_send(&gateway, &mut view, &carol, "m.room.member", Some(carol.as_str()), is("leave")).await;
    let pending = || async { gateway.bridge.health(&portal.portal_id).await.unwrap().pending };
    so("her join on its way", || async { pending().await == 1 }).await;
    // Longer than one waits for an echo.
    world.advance(180_000);
    world.matrix_say(&gateway, &mut view, &alice, "others are not held up").await;
    so("others on their way", || async { pending().await == 2 }).await;
    let found = gateway.bridge.explain(&message).await.unwrap().unwrap();
    assert_eq!(found.status, "waiting", "{:?}", found.refusal);
    away.store(false, Ordering::SeqCst);
    so("both states in step", || async {
        gateway.node.context.outbound.retry(LM.try_into().unwrap());
        gateway.in_step(&portal).await
    })
    .await;
    let carols = ghost(Side::Matrix, "carol");
    let hers = world.server.log(&lm).await.into_iter().filter(|event| event.event.sender.as_str() == carols);
    let hers: Vec<String> = hers.map(|event| event.event.kind.clone()).collect();
    assert_eq!(hers, ["m.room.member", "m.room.message", "m.room.member"]);
    let refusals = gateway.bridge.health(&portal.portal_id).await.unwrap().refusals;
    assert!(refusals.iter().all(|refused| refused.code == "not_bridged"), "{refusals:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_asks_again_with_an_alias_is_told_that_one() {
    let (world, gateway) = World::new(json!({})).await;
    let (lm, via) = (room(&world, "public").await, [LM.try_into().unwrap()]);
    for alias in ["tea", "coffee"] {
        let portal = gateway.bridge.portal_from_lm(&lm, &via, Some(alias), Cause::Admin).await.unwrap();
        assert_eq!(portal.alias, Some(format!("#{alias}:{OWN}")));
    }
    let portal = gateway.bridge.portal_from_lm(&lm, &via, None, Cause::Admin).await.unwrap();
    assert_eq!(portal.alias, Some(format!("#tea:{OWN}")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_several_servers_the_refusal_of_the_first_that_answered_is_told() {
    let (_world, gateway) = World::new(json!({})).await;
    let gone: OwnedRoomId = format!("!gone:{DEAD}").try_into().unwrap();
    for via in [[LM, DEAD], [DEAD, LM]] {
        let via = via.map(|server| server.try_into().unwrap());
        let refusal = gateway.bridge.portal_from_lm(&gone, &via, None, Cause::Admin).await.unwrap_err();
        assert!(!refusal.is_transient() && refusal.to_string().contains(LM), "{refusal}");
    }
}

/// A portal of an LM room in which alice and carol are, and nothing waits.
async fn with_two_users(world: &World, gateway: &Gateway) -> (OwnedRoomId, Arc<Portal>, View) {
    let lm = room(world, "public").await;
    let via = [LM.try_into().unwrap()];
    let portal = gateway.bridge.portal_from_lm(&lm, &via, None, Cause::Admin).await.unwrap();
    world.matrix_join(gateway, &portal.matrix_room_id, &world.matrix_user("carol")).await.unwrap();
    let mut view = world.matrix_join(gateway, &portal.matrix_room_id, &world.matrix_user("alice")).await.unwrap();
    so("both states in step", || gateway.in_step(&portal)).await;
    world.refresh(gateway, &mut view).await;
    (lm, portal, view)
}

/// What a user of the homeserver is and says in the log, in order: names of joins, other memberships, bodies.
async fn in_log(world: &World, lm: &OwnedRoomId, user: &str) -> Vec<String> {
    let ghost = ghost(Side::Matrix, user);
    let log = world.server.log(lm).await;
    let hers = log.into_iter().filter(|event| event.event.sender.as_str() == ghost);
    hers.map(|event| {
        let content = event.event.content();
        let text = |key: &str| content.get(key).and_then(Value::as_str).map(str::to_owned);
        let joins = text("membership").filter(|membership| membership == "join").and(text("displayname"));
        text("body").or(joins).or(text("membership")).unwrap_or_default()
    })
    .collect()
}

async fn back(world: &World, gateway: &Gateway, portal: &Portal, away: &AtomicBool) {
    away.store(false, Ordering::SeqCst);
    so("both states in step", || async {
        gateway.node.context.outbound.retry(LM.try_into().unwrap());
        world.server.context.outbound.retry(OWN.try_into().unwrap());
        gateway.in_step(portal).await
    })
    .await;
    let refusals = gateway.bridge.health(&portal.portal_id).await.unwrap().refusals;
    assert!(refusals.iter().all(|refused| refused.code == "not_bridged"), "{refusals:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_leaves_and_comes_back_while_the_hub_is_away_is_in_and_heard() {
    for restarts in [false, true] {
        let (world, mut gateway) = World::new(json!({})).await;
        let (lm, portal, mut view) = with_two_users(&world, &gateway).await;
        let alice = world.matrix_user("alice");
        let away = go_away(&world);
        let leave = json!({ "membership": "leave" });
        world.matrix_send(&gateway, &mut view, &alice, "m.room.member", Some(alice.as_str()), leave).await;
        let pending = async |gateway: &Gateway| gateway.bridge.health(&portal.portal_id).await.unwrap().pending;
        so("her leave on its way", || async { pending(&gateway).await == 1 }).await;
        if restarts {
            gateway = world.kill(gateway).await;
        }
        let join = json!({ "membership": "join", "displayname": "ALICE" });
        world.matrix_send(&gateway, &mut view, &alice, "m.room.member", Some(alice.as_str()), join).await;
        so("her join on its way", || async { pending(&gateway).await == 2 }).await;
        world.matrix_say(&gateway, &mut view, &alice, "back").await;
        world.matrix_say(&gateway, &mut view, &alice, "again").await;
        so("her words on their way", || async { pending(&gateway).await == 4 }).await;
        back(&world, &gateway, &portal, &away).await;
        assert_eq!(in_log(&world, &lm, "alice").await, ["ALICE", "leave", "ALICE", "back", "again"]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_changes_a_name_and_changes_it_back_while_the_hub_is_away_has_the_last_one() {
    let (world, gateway) = World::new(json!({})).await;
    let (lm, portal, mut view) = with_two_users(&world, &gateway).await;
    let alice = world.matrix_user("alice");
    let away = go_away(&world);
    for name in ["Alicia", "ALICE"] {
        let join = json!({ "membership": "join", "displayname": name });
        world.matrix_send(&gateway, &mut view, &alice, "m.room.member", Some(alice.as_str()), join).await;
    }
    let pending = || async { gateway.bridge.health(&portal.portal_id).await.unwrap().pending };
    so("both names on their way", || async { pending().await == 2 }).await;
    back(&world, &gateway, &portal, &away).await;
    assert_eq!(in_log(&world, &lm, "alice").await, ["ALICE", "Alicia", "ALICE"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_comes_speaks_and_changes_names_before_the_hub_answers_jams_nothing() {
    let (world, gateway) = World::new(json!({})).await;
    let (lm, portal, mut view) = with_two_users(&world, &gateway).await;
    let dora = world.matrix_user("dora");
    let away = go_away(&world);
    let called = |name: &str| json!({ "membership": "join", "displayname": name });
    let key = Some(dora.as_str());
    world.matrix_send(&gateway, &mut view, &dora, "m.room.member", key, called("first")).await;
    let pending = || async { gateway.bridge.health(&portal.portal_id).await.unwrap().pending };
    so("her join on its way", || async { pending().await == 1 }).await;
    world.matrix_say(&gateway, &mut view, &dora, "one").await;
    world.matrix_send(&gateway, &mut view, &dora, "m.room.member", key, called("second")).await;
    world.matrix_send(&gateway, &mut view, &dora, "m.room.member", key, called("third")).await;
    world.matrix_say(&gateway, &mut view, &dora, "two").await;
    let waiting = || async { gateway.bridge.health(&portal.portal_id).await.unwrap().waiting[0].count };
    so("the rest waits", || async { waiting().await == 4 }).await;
    back(&world, &gateway, &portal, &away).await;
    assert_eq!(in_log(&world, &lm, "dora").await, ["first", "one", "second", "third", "two"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_that_a_hub_makes_up_lead_to_its_portal_and_leave_nothing_behind() {
    let (world, gateway) = World::new(json!({ "budgets": { "portals_per_hour": 2 } })).await;
    let lm = room(&world, "public").await;
    let portal = gateway.bridge.portal_from_lm(&lm, &[LM.try_into().unwrap()], None, Cause::Admin).await.unwrap();
    let named = lm.clone();
    *world.server.meddler.lock().unwrap() = Some(Arc::new(move |request, next| {
        let room_id = named.clone();
        Box::pin(async move {
            match request.uri().path().contains("/query/directory") {
                true => respond(http::StatusCode::OK, json!({ "room_id": room_id, "servers": [LM] })),
                false => next.run(request).await,
            }
        })
    }));
    let aliases = || async {
        let count = sqlx::query_as("SELECT COUNT(*) FROM bridge_aliases");
        let (count,): (i64,) = count.fetch_one(gateway.node.context.store.reader()).await.unwrap();
        count
    };
    let before = aliases().await;
    for number in 0..20 {
        let alias = format!("lm_x{number}_{LM}");
        let target = gateway.bridge.resolve_alias(&alias, Cause::Appservice).await.unwrap();
        assert_eq!(target.room_id, portal.matrix_room_id);
    }
    assert_eq!(aliases().await, before);
    let by_admin = gateway.bridge.portal_of_alias(&format!("#x0:{LM}")).await.unwrap();
    assert_eq!(by_admin.portal_id, portal.portal_id);
    // Who asks needs no account: of one hub's rooms only so many get a portal.
    for number in 0..3 {
        let lm = room(&world, "public").await;
        let alias = format!("lm_{}_{LM}", lm.as_str().split(':').next().unwrap());
        let made = gateway.bridge.resolve_alias(&alias, Cause::Appservice).await;
        assert_eq!(made.as_ref().err().map(Refusal::code), (number == 2).then_some("budget"), "{made:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_32_a_hub_that_misbehaves_is_named_in_the_portals_health_and_in_the_matrix_room() {
    for (settings, expected) in [(json!({}), 1), (json!({ "portals": { "notices": false } }), 0)] {
        let (world, gateway) = World::new(settings).await;
        let lm = room(&world, "public").await;
        let via = [LM.try_into().unwrap()];
        let portal = gateway.bridge.portal_from_lm(&lm, &via, None, Cause::Admin).await.unwrap();
        so("both states in step", || gateway.in_step(&portal)).await;
        assert_eq!(gateway.bridge.health(&portal.portal_id).await.unwrap().hub_faults.count, 0);
        let last = world.server.log(&lm).await.pop().unwrap();
        for ts in [5, 6] {
            let mut changed = last.event.json.clone();
            changed["origin_server_ts"] = json!(ts);
            let changed = serde_json::value::to_raw_value(&changed).unwrap();
            let received = gateway.node.lm.receive(LM.try_into().unwrap(), vec![changed]).await.pop().unwrap();
            assert!(received.result.is_err(), "{received:?}");
        }
        let faults = gateway.bridge.health(&portal.portal_id).await.unwrap().hub_faults;
        assert_eq!((faults.count, faults.lost_since), (2, None));
        assert!(faults.newest.iter().all(|fault| fault.kind == "rewritten"), "{faults:?}");
        // What is said later comes after a notice.
        let notices = || async {
            let bodies = gateway.matrix_bodies(&portal.matrix_room_id).await;
            bodies.iter().filter(|(by, body)| *by == gateway.bot() && body.contains(LM)).count()
        };
        if expected > 0 {
            so("the notice", || async { notices().await > 0 }).await;
        }
        hub_says(&world, &lm, "hubert", "later").await;
        let later = (ghost(Side::Lm, "hubert"), "later".to_owned());
        so("what came later", || async { gateway.matrix_bodies(&portal.matrix_room_id).await.contains(&later) }).await;
        assert_eq!(notices().await, expected);
        assert!(!gateway.node.bodies(&lm).await.iter().any(|(_, body)| body.contains("which keeps")));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_said_in_the_log_before_is_said_again_in_the_graph() {
    let (world, gateway) = World::new(json!({ "portals": { "import_history": 4 } })).await;
    let lm = room(&world, "public").await;
    for name in ["bob", "carol"] {
        world.lm_join_own(&lm, name).await;
    }
    world.lm_say(&lm, "bob", "too long ago").await;
    world.lm_say(&lm, "carol", "from carol").await;
    let carol = world.lm_user("carol");
    world.lm_send(&lm, draft(&carol, "m.room.member", Some(carol.as_str()), json!({ "membership": "leave" }))).await;
    world.lm_say(&lm, "bob", "one").await;
    world.lm_say(&lm, "bob", "two").await;
    let via = [LM.try_into().unwrap()];
    let portal = gateway.bridge.portal_from_lm(&lm, &via, None, Cause::Admin).await.unwrap();
    let matrix = &portal.matrix_room_id;
    let (bob, carol) = (ghost(Side::Lm, "bob"), ghost(Side::Lm, "carol"));
    let said = [(carol.clone(), "from carol"), (bob.clone(), "one"), (bob, "two")];
    let said = said.map(|(by, body)| (by, body.to_owned()));
    assert_eq!(gateway.matrix_bodies(matrix).await, said);
    assert_eq!(gateway.matrix_member(matrix, &carol).await.unwrap()["membership"], "leave");
    // It is not said back, and stays what it is.
    let alice = world.matrix_user("alice");
    let mut view = world.matrix_join(&gateway, matrix, &alice).await.unwrap();
    world.matrix_say(&gateway, &mut view, &alice, "hello").await;
    let hello = (ghost(Side::Matrix, "alice"), "hello".to_owned());
    so("hello at the hub", || async { world.server.bodies(&lm).await.last() == Some(&hello) }).await;
    assert_eq!(world.server.bodies(&lm).await.len(), 5);
    so("both states in step", || gateway.in_step(&portal)).await;
}
