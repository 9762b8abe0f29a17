//! A clock that is set back: what was stored before that with later times holds nothing up until they come.

use std::sync::atomic::Ordering;

use isthmus::bridge::Cause;
use isthmus::identity::Side;
use serde_json::json;

use super::from_lm::{go_away, room};
use super::world::{LM, World, ghost, so};

const DAY: i64 = 86_400_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_both_sides_say_arrives_after_a_restart_with_an_earlier_clock() {
    let (world, gateway) = World::new(json!({})).await;
    let lm = room(&world, "public").await;
    let via = [LM.try_into().unwrap()];
    let portal = gateway.bridge.portal_from_lm(&lm, &via, None, Cause::Admin).await.unwrap();
    let matrix = &portal.matrix_room_id;
    let alice = world.matrix_user("alice");
    let mut view = world.matrix_join(&gateway, matrix, &alice).await.unwrap();
    so("both states in step", || gateway.in_step(&portal)).await;
    world.advance(DAY);
    // With the later clock one message is on its way to the hub, which is away, and another waits for its echo.
    let away = go_away(&world);
    let first = world.matrix_say(&gateway, &mut view, &alice, "first").await;
    let answer = json!({ "body": "second", "m.relates_to": { "m.in_reply_to": { "event_id": first } } });
    let second = world.matrix_send(&gateway, &mut view, &alice, "m.room.message", None, answer).await;
    so("the hub asked in vain", || async {
        gateway.node.context.outbound.status().await.unwrap().iter().any(|queue| queue.failures > 0)
    })
    .await;
    so("the answer waiting", || async {
        gateway.bridge.explain(&second).await.unwrap().is_some_and(|found| found.status == "waiting")
    })
    .await;

    world.advance(-DAY);
    let gateway = world.kill(gateway).await;
    away.store(false, Ordering::SeqCst);
    let alices = ghost(Side::Matrix, "alice");
    let says = |body: &str| (alices.clone(), body.to_owned());
    so("both at the hub", || async { world.server.bodies(&lm).await == [says("first"), says("second")] }).await;
    world.lm_say(&lm, "hubert", "hello").await;
    let hello = (ghost(Side::Lm, "hubert"), "hello".to_owned());
    so("hubert in the graph", || async { gateway.matrix_bodies(matrix).await.contains(&hello) }).await;
    so("both states in step", || gateway.in_step(&portal)).await;
}
