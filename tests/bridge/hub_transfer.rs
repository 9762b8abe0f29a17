//! The log of a portal's LM room goes to another server and comes back, and both rooms stay in step.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::response::IntoResponse as _;
use http::StatusCode;
use isthmus::bridge::NewPortal;
use isthmus::lm::Role;
use serde_json::json;

use super::world::{LM, World, ghost, so};
use crate::dag::OWN;
use isthmus::identity::Side;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_portal_goes_on_when_its_log_goes_away_and_comes_back() {
    let on = json!({ "hub_transfer": { "give": true, "accept": [LM] } });
    let (world, gateway) = World::new(on).await;
    let new = NewPortal { join_rule: Some("public".to_owned()), ..NewPortal::default() };
    let portal = gateway.bridge.create_portal(new).await.unwrap();
    let (id, matrix, lm) = (portal.portal_id.as_str(), &portal.matrix_room_id, &portal.lm_room_id);
    let (alice, bob) = (world.matrix_user("alice"), world.lm_user("bob"));
    let mut view = world.matrix_join(&gateway, matrix, &alice).await.unwrap();
    world.lm_join(lm, "bob").await.unwrap();
    so("everybody is everywhere", || gateway.in_step(&portal)).await;
    let levels = gateway.node.state(lm, "m.room.power_levels", "").await.unwrap();
    assert_eq!(levels["events"]["m.room.hub"], 100);
    let refused = gateway.bridge.hand_over(id, OWN.try_into().unwrap(), false).await.unwrap_err();
    assert!(refused.to_string().contains("hub.4"), "{refused}");

    let given = gateway.bridge.hand_over(id, LM.try_into().unwrap(), false).await.unwrap();
    assert_eq!(given.unaware, [] as [&str; 0]);
    assert_eq!(gateway.bridge.portal(id).await.unwrap().unwrap().lm_hub, LM);
    so("the other server keeps the log", || async {
        world.server.lm.room(lm).await.unwrap().unwrap().role == Role::Hub
    })
    .await;
    let away = world.matrix_say(&gateway, &mut view, &alice, "to another hub").await;
    let at_hub = |body: &'static str| {
        let said = (ghost(Side::Matrix, "alice"), body.to_owned());
        let world = &world;
        async move { world.server.bodies(lm).await.iter().filter(|found| **found == said).count() == 1 }
    };
    so("alice in the log", || at_hub("to another hub")).await;
    let status =
        async |gateway: &super::world::Gateway, event| gateway.bridge.explain(event).await.unwrap().unwrap().status;
    so("its echo", || async { status(&gateway, &away).await == "crossed" }).await;
    world.lm_say(lm, "bob", "from the new hub").await;
    let hi = (ghost(Side::Lm, "bob"), "from the new hub".to_owned());
    so("bob in the graph", || async { gateway.matrix_bodies(matrix).await.contains(&hi) }).await;
    // Who joins now is asked for there.
    let carol = world.matrix_user("carol");
    world.matrix_join(&gateway, matrix, &carol).await.unwrap();
    assert_eq!(world.server.membership(lm, &ghost(Side::Matrix, "carol")).await, "join");

    // The gateway starts anew, and has something on its way that the hub does not take before it hands the log back.
    let gateway = world.kill(gateway).await;
    assert_eq!(gateway.bridge.portal(id).await.unwrap().unwrap().lm_hub, LM);
    gateway.bridge.set_power(id, &bob, 100).await.unwrap();
    so("bob has the level", || async {
        let levels = world.server.state(lm, "m.room.power_levels", "").await.unwrap();
        levels["users"][bob.as_str()] == 100
    })
    .await;
    let is_cut = Arc::new(AtomicBool::new(true));
    let switch = is_cut.clone();
    *world.server.meddler.lock().unwrap() = Some(Arc::new(move |request, next| {
        let refuse = switch.load(Ordering::SeqCst) && request.uri().path().contains("/send/");
        Box::pin(async move {
            if refuse { StatusCode::SERVICE_UNAVAILABLE.into_response() } else { next.run(request).await }
        })
    }));
    let waiting = world.matrix_say(&gateway, &mut view, &alice, "on its way").await;
    so("it is on its way", || async { status(&gateway, &waiting).await == "pending" }).await;
    world.server.lm.hand_over(lm, &bob, OWN.try_into().unwrap(), false).await.unwrap();
    so("the log is back", || async { gateway.bridge.portal(id).await.unwrap().unwrap().lm_hub == OWN }).await;
    so("it is said", || async { status(&gateway, &waiting).await == "crossed" }).await;
    let home = world.matrix_say(&gateway, &mut view, &alice, "home again").await;
    so("at once", || async { status(&gateway, &home).await == "crossed" }).await;
    is_cut.store(false, Ordering::SeqCst);
    gateway.node.context.outbound.retry(LM.try_into().unwrap());
    so("alice at the other server", || at_hub("home again")).await;
    assert!(at_hub("on its way").await && at_hub("to another hub").await);
    so("both rooms in step", || gateway.in_step(&portal)).await;
    let ours: Vec<_> = gateway.node.log(lm).await.iter().map(|event| event.event.to_bytes()).collect();
    let theirs: Vec<_> = world.server.log(lm).await.iter().map(|event| event.event.to_bytes()).collect();
    // The other server has the log from its join on, after the state before that.
    assert!(ours.ends_with(&theirs[theirs.len() - 10..]), "the logs differ");
}
