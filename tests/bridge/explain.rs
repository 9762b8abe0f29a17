//! What operators are told of events and portals that are over.

use isthmus::bridge::PortalState;
use isthmus::store::pruning::{Prune, STAY, prune};
use ruma::OwnedEventId;
use serde_json::json;

use super::world::{Gateway, World, so};

/// Removes what is older than now.
async fn tidy(gateway: &Gateway) {
    let context = &gateway.node.context;
    let now = context.clock.now_ms();
    let own = context.server_name.clone();
    prune(&context.store, Prune { now, records_before: Some(now), keys_before: 0, own }).await.unwrap();
}

async fn status(gateway: &Gateway, event_id: &OwnedEventId) -> (&'static str, Option<String>) {
    let found = gateway.bridge.explain(event_id).await.unwrap().unwrap();
    (found.status, found.portal_id)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_an_event_whose_refusal_may_be_forgotten_nothing_is_said_that_may_be_wrong() {
    let (world, gateway) = World::new(json!({})).await;
    let portal = gateway.public_portal().await;
    let alice = world.matrix_user("alice");
    let mut view = world.matrix_join(&gateway, &portal.matrix_room_id, &alice).await.unwrap();
    let first = world.matrix_send(&gateway, &mut view, &alice, "im.isthmus.first", None, json!({})).await;
    so("the refusal", || async { status(&gateway, &first).await == ("refused", Some(portal.portal_id.clone())) }).await;
    world.advance(60_000);
    let mut last = first.clone();
    for _ in 0..STAY {
        last = world.matrix_send(&gateway, &mut view, &alice, "im.isthmus.later", None, json!({})).await;
    }
    so("all refusals", || async { status(&gateway, &last).await.0 == "refused" }).await;
    tidy(&gateway).await;
    assert_eq!(status(&gateway, &first).await, ("unknown", Some(portal.portal_id.clone())));
    assert_eq!(status(&gateway, &last).await.0, "refused");
    // What the gateway's own users say was never refused.
    let own = gateway.matrix_events(&portal.matrix_room_id).await.into_iter();
    let own = own.filter(|(_, event)| event["sender"] == gateway.bot().as_str()).map(|(id, _)| id).next().unwrap();
    assert_eq!(status(&gateway, &own).await.0, "local");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_is_found_by_the_name_under_which_its_senders_server_knows_it() {
    let (world, gateway) = World::new(json!({})).await;
    let portal = gateway.public_portal().await;
    world.lm_join(&portal.lm_room_id, "bob").await.unwrap();
    world.lm_say(&portal.lm_room_id, "bob", "hello").await;
    so("hello", || async { !gateway.node.bodies(&portal.lm_room_id).await.is_empty() }).await;
    let said = gateway.node.log(&portal.lm_room_id).await.pop().unwrap().event;
    let lpdu_id = said.lpdu_id.clone().unwrap();
    assert_ne!(lpdu_id, said.event_id);
    so("hello to cross", || async { status(&gateway, &lpdu_id).await.0 == "crossed" }).await;
    let found = gateway.bridge.explain(&lpdu_id).await.unwrap().unwrap();
    assert_eq!((found.event_id, found.portal_id), (said.event_id.clone(), Some(portal.portal_id.clone())));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn portals_that_have_ended_are_shown_for_a_time() {
    let (world, gateway) = World::new(json!({})).await;
    let [first, second, third] =
        [gateway.public_portal().await, gateway.public_portal().await, gateway.public_portal().await];
    let alice = world.matrix_user("alice");
    let mut view = world.matrix_join(&gateway, &second.matrix_room_id, &alice).await.unwrap();
    let hello = world.matrix_say(&gateway, &mut view, &alice, "hello").await;
    let strange = world.matrix_send(&gateway, &mut view, &alice, "im.isthmus.strange", None, json!({})).await;
    so("the refusal", || async { status(&gateway, &strange).await.0 == "refused" }).await;
    so("all carried", || gateway.in_step(&second)).await;
    gateway.bridge.remove_portal(&second.portal_id, "enough").await.unwrap();
    let told = async |gateway: &Gateway| {
        let portals = gateway.bridge.portals(None, 10).await.unwrap();
        let ids: Vec<_> = portals.iter().map(|portal| (&portal.portal_id, portal.state)).collect();
        let (active, ended) = (PortalState::Active, PortalState::Ended);
        assert_eq!(ids, [(&first.portal_id, active), (&second.portal_id, ended), (&third.portal_id, active)]);
        let page = gateway.bridge.portals(Some(&first.portal_id), 1).await.unwrap();
        assert_eq!(page.iter().map(|portal| &portal.portal_id).collect::<Vec<_>>(), [&second.portal_id]);
        let shown = gateway.bridge.portal(&second.portal_id).await.unwrap().unwrap();
        assert_eq!((shown.state, shown.reason.as_deref()), (ended, Some("enough")));
        let health = gateway.bridge.health(&second.portal_id).await.unwrap();
        assert!(health.refusals.iter().any(|refused| refused.kind == "im.isthmus.strange"));
        assert_eq!(gateway.bridge.out_of_step(&second.portal_id).await.unwrap(), 0);
        assert_eq!(status(gateway, &hello).await, ("unknown", Some(second.portal_id.clone())));
        assert_eq!(status(gateway, &strange).await.0, "refused");
        let refusal = gateway.bridge.resume_portal(&second.portal_id).await.unwrap_err();
        assert_eq!((refusal.code(), refusal.to_string().contains("enough")), ("forbidden", true), "{refusal}");
    };
    told(&gateway).await;
    let gateway = world.kill(gateway).await;
    told(&gateway).await;

    // A hundred later ones end, and housekeeping comes by after the first time.
    tidy(&gateway).await;
    world.advance(1);
    let more = gateway.node.context.store.write(|tx| {
        Box::pin(async move {
            for number in 4..4 + STAY {
                let row = "INSERT INTO bridge_portals (number, kind, state, lm_hub, request, created_ts) \
                           VALUES ($1, 'created', 'ended', 'g.example', '', 0)";
                sqlx::query(row).bind(number).execute(&mut *tx).await?;
            }
            Ok(())
        })
    });
    more.await.unwrap();
    tidy(&gateway).await;
    assert!(gateway.bridge.portal(&second.portal_id).await.unwrap().is_none());
    assert_eq!(gateway.bridge.portals(None, 10).await.unwrap().len(), 2);
    for event in [&hello, &strange] {
        assert_eq!(status(&gateway, event).await, ("local", None));
    }
    assert_eq!(gateway.bridge.health(&second.portal_id).await.unwrap_err().code(), "not_found");
}
