//! Invites of users whose server does not answer: nobody is mute for that, and in the end the inviter is told.

use isthmus::identity::Side;
use serde_json::json;

use super::world::{DEAD, World, draft, ghost, so};
use crate::dag::OWN;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invite_that_no_server_answers_mutes_nobody_and_is_refused_in_the_end() {
    let (world, gateway) = World::new(json!({})).await;
    let portal = gateway.public_portal().await;
    let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
    let [alice, carol] = ["alice", "carol"].map(|name| world.matrix_user(name));
    world.matrix_join(&gateway, matrix, &alice).await.unwrap();
    let mut view = world.matrix_join(&gateway, matrix, &carol).await.unwrap();
    world.lm_join(lm, "bob").await.unwrap();
    so("all members everywhere", || gateway.in_step(&portal)).await;
    world.refresh(&gateway, &mut view).await;

    // Of each side somebody invites somebody of a server that is gone.
    let invite = json!({ "membership": "invite" });
    let gone = format!("@lm_gone_{DEAD}:{OWN}");
    let from_matrix =
        world.matrix_send(&gateway, &mut view, &alice, "m.room.member", Some(&gone), invite.clone()).await;
    let bob = world.lm_user("bob");
    let gone = format!("@mx_gone_{DEAD}:{OWN}");
    world.lm_send_unjudged(lm, draft(&bob, "m.room.member", Some(&gone), invite)).await;
    let (alices, carols, bobs) = (ghost(Side::Matrix, "alice"), ghost(Side::Matrix, "carol"), ghost(Side::Lm, "bob"));
    let mut refused = Vec::new();
    for round in 0..60 {
        let body = format!("round {round}");
        world.matrix_say(&gateway, &mut view, &alice, &body).await;
        world.matrix_say(&gateway, &mut view, &carol, &body).await;
        world.lm_say(lm, "bob", &body).await;
        so("what the inviters and others say", || async {
            let (log, graph) = (gateway.node.bodies(lm).await, gateway.matrix_bodies(matrix).await);
            [&alices, &carols].iter().all(|by| log.contains(&((*by).clone(), body.clone())))
                && graph.contains(&(bobs.clone(), body.clone()))
        })
        .await;
        refused = gateway.bridge.health(&portal.portal_id).await.unwrap().refusals;
        if refused.len() >= 2 {
            break;
        }
        assert!(refused.is_empty() || round > 5, "tried several times: {refused:?}");
        world.advance(301_000);
    }
    assert_eq!(refused.len(), 2, "{refused:?}");
    for refused in &refused {
        assert_eq!((refused.code.as_str(), refused.kind.as_str()), ("remote", "m.room.member"));
        assert!(refused.reason.contains(DEAD) && refused.reason.contains("given up after "), "{refused:?}");
    }
    assert!(refused.iter().any(|refused| refused.event_id == from_matrix));
    // Both are told where they did it.
    so("the notices", || async {
        let (log, graph) = (gateway.node.bodies(lm).await, gateway.matrix_bodies(matrix).await);
        let told = |bodies: &[(String, String)], user: &str| bodies.iter().any(|(_, body)| body.contains(user));
        told(&graph, alice.as_str()) && told(&log, bob.as_str())
    })
    .await;
    // Nobody waits for who will not come.
    so("the ghosts decline, and say why", || async {
        let graph = gateway.matrix_member(matrix, &format!("@lm_gone_{DEAD}:{OWN}")).await.unwrap();
        let log = gateway.node.state(lm, "m.room.member", &format!("@mx_gone_{DEAD}:{OWN}")).await.unwrap();
        [graph, log].iter().all(|content| {
            let text = |key: &str| content.get(key).and_then(|value| value.as_str()).unwrap_or_default();
            text("membership") == "leave" && text("reason").contains(DEAD)
        })
    })
    .await;
    // In each room each of them was heard in order.
    let rounds = |bodies: Vec<(String, String)>, by: &str| {
        let said = bodies.into_iter().filter(|(sender, _)| *sender == *by);
        said.filter_map(|(_, body)| body.strip_prefix("round ").map(|n| n.parse().unwrap())).collect::<Vec<usize>>()
    };
    for heard in [rounds(gateway.node.bodies(lm).await, &alices), rounds(gateway.matrix_bodies(matrix).await, &bobs)] {
        assert!(heard.is_sorted() && heard.len() > 5, "{heard:?}");
    }
}
