//! Which servers take part: access control lists of the rooms, the policy; and rooms that are replaced.

use std::sync::Arc;

use isthmus::bridge::{Cause, PortalState};
use isthmus::event::RoomVersion;
use isthmus::federation::Call;
use isthmus::identity::Side;
use isthmus::lm::NewRoom;
use isthmus::seam::Outgoing;
use ruma::UserId;
use serde_json::{Value, json};
use tokio::sync::Notify;

use super::from_lm::room;
use super::world::{LM, MATRIX, OTHER, World, draft, ghost, message, so, until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whom_a_rooms_list_keeps_out_does_not_come_in_behind_a_ghost() {
    let (world, gateway) = World::new(json!({})).await;
    let (portal, mut view) = world.portal_of_two(&gateway).await;
    let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
    let alice = world.matrix_user("alice");
    gateway.bridge.set_power(&portal.portal_id, &alice, 100).await.unwrap();
    world.refresh(&gateway, &mut view).await;

    let acl = json!({ "allow": ["*"], "deny": [LM] });
    world.matrix_send(&gateway, &mut view, &alice, "m.room.server_acl", Some(""), acl).await;
    world.lm_say(lm, "bob", "kept out").await;
    let refused = until("the refusal", || async {
        let refusals = gateway.bridge.health(&portal.portal_id).await.unwrap().refusals;
        refusals.into_iter().find(|refused| refused.kind == "m.room.message")
    })
    .await;
    assert_eq!((refused.code.as_str(), refused.sender), ("server_acl", world.lm_user("bob").to_string()));
    let refused = world.lm_join(lm, "eve").await.unwrap_err();
    assert!(refused.to_string().contains("access control list"), "{refused}");
    // Other servers' users are heard, and who is denied may leave.
    world.matrix_say(&gateway, &mut view, &alice, "we are among us").await;
    so("alice in the log", || async { gateway.node.bodies(lm).await.iter().any(|(_, body)| body.contains("us")) })
        .await;
    let bob = world.lm_user("bob");
    world.lm_send(lm, draft(&bob, "m.room.member", Some(bob.as_str()), json!({ "membership": "leave" }))).await;
    so("the ghost of bob gone", || async {
        gateway
            .matrix_member(matrix, &ghost(Side::Lm, "bob"))
            .await
            .is_some_and(|content| content["membership"] == "leave")
    })
    .await;
    so("both states in step", || gateway.in_step(&portal)).await;

    world.refresh(&gateway, &mut view).await;
    let acl = json!({ "allow": ["*"], "deny": ["elsewhere"] });
    world.matrix_send(&gateway, &mut view, &alice, "m.room.server_acl", Some(""), acl).await;
    world.lm_join(lm, "bob").await.unwrap();
    world.lm_say(lm, "bob", "back again").await;
    let back = (ghost(Side::Lm, "bob"), "back again".to_owned());
    so("bob is heard", || async { gateway.matrix_bodies(matrix).await.contains(&back) }).await;
    assert!(!gateway.matrix_bodies(matrix).await.iter().any(|(_, body)| body == "kept out"));

    // A list that denies the gateway ends the portal.
    world.refresh(&gateway, &mut view).await;
    let acl = json!({ "allow": [MATRIX] });
    world.matrix_send(&gateway, &mut view, &alice, "m.room.server_acl", Some(""), acl).await;
    let ended = until("the end", || async {
        let portal = gateway.bridge.portal(&portal.portal_id).await.unwrap().unwrap();
        (portal.state == PortalState::Ended).then_some(portal)
    })
    .await;
    assert!(ended.reason.as_ref().unwrap().contains("access control list"));
    so("the goodbye at bob's", || async {
        world.server.bodies(lm).await.iter().any(|(_, body)| body.contains("access control list"))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lm_servers_that_the_policy_does_not_name_take_no_part_though_the_hub_lets_them() {
    let (world, gateway) = World::new(json!({ "access": { "hubs": [LM] } })).await;
    let other = world.other_server().await;
    let lm = room(&world, "public").await;
    let mallory = UserId::parse(format!("@mallory:{OTHER}")).unwrap();
    let via = [LM.try_into().unwrap()];
    other.lm.join(&lm, &mallory, &via, Default::default()).await.unwrap();
    let portal = gateway.bridge.portal_from_lm(&lm, &via, None, Cause::Admin).await.unwrap();
    let matrix = &portal.matrix_room_id;
    let alice = world.matrix_user("alice");
    world.matrix_join(&gateway, matrix, &alice).await.unwrap();
    // One who was there before, one who comes later; neither has a ghost.
    let second = UserId::parse(format!("@second:{OTHER}")).unwrap();
    other.lm.join(&lm, &second, &via, Default::default()).await.unwrap();
    for user in [&mallory, &second] {
        let said = Outgoing { draft: message(user, "let me in"), effect: None };
        other.lm.send(&lm, vec![said]).await.pop().unwrap().unwrap();
    }
    so("the refusals", || async {
        let refusals = gateway.bridge.health(&portal.portal_id).await.unwrap().refusals;
        let count = |kind| refusals.iter().filter(|refused| refused.code == "policy" && refused.kind == kind).count();
        count("m.room.message") == 2 && count("m.room.member") == 2
    })
    .await;
    world.lm_say(&lm, "hubert", "hello").await;
    let hello = (ghost(Side::Lm, "hubert"), "hello".to_owned());
    so("hubert is heard", || async { gateway.matrix_bodies(matrix).await.contains(&hello) }).await;
    so("both states in step", || gateway.in_step(&portal)).await;
    let members = gateway.dag.joined(matrix).await.unwrap();
    assert!(!members.iter().any(|user| user.as_str().contains(OTHER)), "{members:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_room_that_a_hub_replaces_is_replaced_on_matrix() {
    let (world, gateway) = World::new(json!({})).await;
    let (old, new) = (room(&world, "public").await, room(&world, "public").await);
    let via = [LM.try_into().unwrap()];
    let first = gateway.bridge.portal_from_lm(&old, &via, None, Cause::Admin).await.unwrap();
    let alice = world.matrix_user("alice");
    world.matrix_join(&gateway, &first.matrix_room_id, &alice).await.unwrap();
    let hubert = world.lm_user("hubert");
    let tombstone = json!({ "body": "moved", "replacement_room": new });
    world.lm_send(&old, draft(&hubert, "m.room.tombstone", Some(""), tombstone)).await;
    let ended = until("the end", || async {
        let portal = gateway.bridge.portal(&first.portal_id).await.unwrap().unwrap();
        (portal.state == PortalState::Ended).then_some(portal)
    })
    .await;
    assert!(ended.reason.as_ref().unwrap().contains(new.as_str()));
    let second = gateway.bridge.portals(None, 10).await.unwrap().pop().unwrap();
    assert_eq!((second.state, &second.lm_room_id), (PortalState::Active, &new));
    let tombstone = gateway.matrix_state(&first.matrix_room_id, "m.room.tombstone").await.unwrap();
    assert_eq!(tombstone["replacement_room"], second.matrix_room_id.as_str());
    world.matrix_join(&gateway, &second.matrix_room_id, &alice).await.unwrap();
    so("alice in the new room", || async {
        world.server.membership(&new, &ghost(Side::Matrix, "alice")).await == "join"
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tombstone_without_a_room_ends_and_aliases_and_others_disturb_nothing() {
    let (world, gateway) = World::new(json!({})).await;
    let hubert = world.lm_user("hubert");
    let state = |kind: &str, content: Value| draft(&hubert, kind, Some(""), content);
    let rules = state("m.room.join_rules", json!({ "join_rule": "public" }));
    let alias = state("m.room.canonical_alias", json!({ "alias": format!("#tea:{LM}") }));
    let new = NewRoom { creator: hubert.clone(), version: RoomVersion::Lm02, initial_state: vec![rules, alias] };
    let lm = world.server.lm.create_room(new).await.unwrap();
    let via = [LM.try_into().unwrap()];
    let portal = gateway.bridge.portal_from_lm(&lm, &via, None, Cause::Admin).await.unwrap();
    for (kind, content) in [
        ("m.room.canonical_alias", json!({ "alias": format!("#coffee:{LM}"), "alt_aliases": [7] })),
        ("m.room.pinned_events", json!({ "pinned": ["$x"] })),
        ("m.room.server_acl", json!({ "allow": "everybody", "deny": { "a": 1 } })),
        ("m.room.server_acl", json!({ "allow": ["*"], "deny": ["*.evil.example"] })),
    ] {
        world.lm_send(&lm, state(kind, content)).await;
    }
    world.lm_say(&lm, "hubert", "still here").await;
    let said = (ghost(Side::Lm, "hubert"), "still here".to_owned());
    so("hubert is heard", || async { gateway.matrix_bodies(&portal.matrix_room_id).await.contains(&said) }).await;
    so("both states in step", || gateway.in_step(&portal)).await;

    world.lm_send(&lm, state("m.room.tombstone", json!({ "replacement_room": 7 }))).await;
    let ended = until("the end", || async {
        let portal = gateway.bridge.portal(&portal.portal_id).await.unwrap().unwrap();
        (portal.state == PortalState::Ended).then_some(portal)
    })
    .await;
    assert_eq!(ended.reason.as_deref(), Some("the LM room was closed"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_the_name_is_delegated_to_is_said_as_it_is_configured() {
    isthmus::federation::crypto_provider();
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let delegating = json!({ "listen": { "well_known": "proxy.example:443" } });
    for (settings, expected) in [(json!({}), None), (delegating, Some("proxy.example:443"))] {
        let (world, _gateway) = World::new(settings).await;
        let url = world.url_of(crate::dag::OWN).join("/.well-known/matrix/server").unwrap();
        let answer = http.get(url).send().await.unwrap();
        assert_eq!(answer.status().as_u16(), if expected.is_some() { 200 } else { 404 });
        let body: serde_json::Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
        assert_eq!(body["m.server"].as_str(), expected);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_denied_and_comes_in_by_another_server_is_kicked() {
    for created in [true, false] {
        let (world, gateway) = World::new(json!({ "access": { "matrix_servers": [MATRIX] } })).await;
        let portal = match created {
            true => gateway.public_portal().await,
            false => {
                let (lm, via) = (room(&world, "public").await, [LM.try_into().unwrap()]);
                gateway.bridge.portal_from_lm(&lm, &via, None, Cause::Admin).await.unwrap()
            }
        };
        let matrix = &portal.matrix_room_id;
        let mut view = world.matrix_join(&gateway, matrix, &world.matrix_user("alice")).await.unwrap();
        so("both states in step", || gateway.in_step(&portal)).await;
        let other = world.other_server().await;
        let mut peer = crate::dag::peer::Peer::start(OTHER).await;
        peer.key = other.context.signing_key.clone();
        let mallory = peer.user("mallory");
        assert!(World::matrix_join_from(&peer, &gateway, matrix, &mallory).await.is_err());
        world.refresh(&gateway, &mut view).await;
        let join = json!({ "membership": "join" });
        let (_, join) = view.add(&peer, &mallory, "m.room.member", Some(mallory.as_str()), join);
        peer.put(&gateway.dag, &[&join]).await.pop().unwrap().result.unwrap();
        so("mallory kicked", || async {
            let member = gateway.matrix_member(matrix, mallory.as_str()).await;
            member.is_some_and(|content| content["membership"] == "leave")
        })
        .await;
        so("both states in step", || gateway.in_step(&portal)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_that_calls_its_room_like_a_matrix_room_takes_nothing_from_it() {
    let (world, gateway) = World::new(json!({})).await;
    let portal = gateway.public_portal().await;
    let matrix = portal.matrix_room_id.clone();
    let other = world.other_server().await;
    let mut peer = crate::dag::peer::Peer::start(OTHER).await;
    peer.key = other.context.signing_key.clone();
    let carol = peer.user("carol");
    let mut view = World::matrix_join_from(&peer, &gateway, &matrix, &carol).await.unwrap();

    let via = [LM.try_into().unwrap()];
    let refusal = gateway.bridge.portal_from_lm(&matrix, &via, None, Cause::Admin).await.unwrap_err();
    assert!(!refusal.is_transient() && refusal.to_string().contains("LM room"), "{refusal}");

    // Nor does it while somebody tries to join it at that hub, which takes its time.
    let (asked, release) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (hears, waits) = (asked.clone(), release.clone());
    *world.server.meddler.lock().unwrap() = Some(Arc::new(move |request, next| {
        let (asked, release) = (hears.clone(), waits.clone());
        Box::pin(async move {
            if request.uri().path().contains("/make_join/") {
                asked.notify_one();
                release.notified().await;
            }
            next.run(request).await
        })
    }));
    let (lm, room, bot) = (gateway.node.lm.clone(), matrix.clone(), gateway.bot());
    let join = tokio::spawn(async move { lm.join(&room, &bot, &via, Default::default()).await });
    asked.notified().await;
    let (id, event) = view.say(&peer, &carol, "still here");
    let body = json!({ "origin": OTHER, "origin_server_ts": crate::dag::NOW, "pdus": [event] });
    let call = Call::put("/_matrix/federation/v1/send/one".to_owned(), super::world::object(body));
    let own: ruma::OwnedServerName = crate::dag::OWN.try_into().unwrap();
    let answer = other.context.client.call(&own, call, false).await.unwrap();
    assert_eq!(answer["pdus"], json!({ id.as_str(): {} }));
    assert!(gateway.dag.event(&id).await.unwrap().is_some());
    release.notify_waiters();
    release.notify_one();
    *world.server.meddler.lock().unwrap() = None;
    assert!(join.await.unwrap().is_err());
}
