//! Invites of users whose server does not answer, or says no: nobody is mute for that, and in the end the inviter is told and the
//! ghost declines.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::response::IntoResponse as _;
use http::StatusCode;
use isthmus::event::Lpdu;
use isthmus::federation::Call;
use isthmus::identity::Side;
use serde_json::json;
use tokio::sync::Semaphore;

use super::world::{DEAD, Node, OTHER, World, draft, ghost, object, so};
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

/// Has a server say no to each invite, in this way, when there is a permit for that; how often it was asked.
fn declines(server: &Node, (status, errcode): (StatusCode, &'static str)) -> (Arc<AtomicUsize>, Arc<Semaphore>) {
    let (asked, answers) = (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)));
    let (count, permits) = (asked.clone(), answers.clone());
    *server.meddler.lock().unwrap() = Some(Arc::new(move |request, next| {
        let (count, permits) = (count.clone(), permits.clone());
        Box::pin(async move {
            if !request.uri().path().contains("/invite/") {
                return next.run(request).await;
            }
            count.fetch_add(1, Ordering::SeqCst);
            permits.acquire().await.unwrap().forget();
            let no = json!({ "errcode": errcode, "error": "no visitors" });
            (status, axum::Json(no)).into_response()
        })
    }));
    (asked, answers)
}

/// Others speak while it is asked, so that they pass the invite. What the ghost says when that cannot be written at first it says later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_ghost_of_who_says_no_declines_whatever_passed_the_invite_and_when_the_database_is_back() {
    let forbidden = (StatusCode::FORBIDDEN, "M_FORBIDDEN");
    // As servers answer that take no second invite into a room in which their user was.
    let unknown = (StatusCode::BAD_REQUEST, "M_UNKNOWN");
    for (fails, no) in [(false, forbidden), (true, forbidden), (false, unknown)] {
        let (world, gateway) = World::new(json!({})).await;
        let other = world.other_server().await;
        let (asked, answers) = declines(&other, no);
        let portal = gateway.public_portal().await;
        let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
        let alice = world.matrix_user("alice");
        let mut view = world.matrix_join(&gateway, matrix, &alice).await.unwrap();
        world.lm_join(lm, "bob").await.unwrap();
        so("all members everywhere", || gateway.in_step(&portal)).await;
        world.refresh(&gateway, &mut view).await;

        let dave = format!("@lm_dave_{OTHER}:{OWN}");
        let invite = json!({ "membership": "invite" });
        world.matrix_send(&gateway, &mut view, &alice, "m.room.member", Some(&dave), invite).await;
        so("the question", || async { asked.load(Ordering::SeqCst) == 1 }).await;
        for body in ["one", "two"] {
            world.matrix_say(&gateway, &mut view, &alice, body).await;
            let said = (ghost(Side::Matrix, "alice"), body.to_owned());
            so("what she says meanwhile", || async { gateway.node.bodies(lm).await.contains(&said) }).await;
        }
        let refusals = async || gateway.bridge.health(&portal.portal_id).await.unwrap().refusals.len();
        if fails {
            world.break_inserts("dag_outbox").await;
            answers.add_permits(1);
            so("another try, or none", || async {
                world.advance(1_000);
                asked.load(Ordering::SeqCst) > 1 || refusals().await > 0
            })
            .await;
            assert_eq!(refusals().await, 0, "nothing is settled before the invite is declined");
            world.mend_inserts("dag_outbox").await;
        }
        answers.add_permits(1);
        so("the ghost declines, and says why", || async {
            let member = gateway.matrix_member(matrix, &dave).await.unwrap();
            let text = |key: &str| member.get(key).and_then(|value| value.as_str()).unwrap_or_default();
            text("membership") == "leave" && text("reason").contains("no visitors")
        })
        .await;
        so("the refusal", || async { refusals().await == 1 }).await;
    }
}

/// In a portal: who is asked says no at home, and the ghost says so across.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_declines_an_invite_into_a_portal_declines_on_the_other_side_too() {
    let (world, gateway) = World::new(json!({})).await;
    let (portal, mut view) = world.portal_of_two(&gateway).await;
    let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
    world.refresh(&gateway, &mut view).await;
    let (alice, bob) = (world.matrix_user("alice"), world.lm_user("bob"));
    let invite = json!({ "membership": "invite" });
    let in_log = async |user: &str, membership: &str| {
        so(&format!("{user} to be {membership} in the log"), || async {
            gateway.node.membership(lm, user).await == membership
        })
        .await;
    };
    let in_graph = async |user: &str, membership: &str| {
        so(&format!("{user} to be {membership} in the graph"), || async {
            gateway.matrix_member(matrix, user).await.is_some_and(|content| content["membership"] == membership)
        })
        .await;
    };

    let (dave, daves_ghost) = (world.lm_user("dave"), ghost(Side::Lm, "dave"));
    world.matrix_send(&gateway, &mut view, &alice, "m.room.member", Some(&daves_ghost), invite.clone()).await;
    in_log(dave.as_str(), "invite").await;
    so("the invite at dave's server", || async { world.server.membership(lm, dave.as_str()).await == "invite" }).await;
    world.server.lm.leave_because(lm, &dave, &[OWN.try_into().unwrap()], Some("not today")).await.unwrap();
    in_graph(&daves_ghost, "leave").await;
    assert_eq!(gateway.matrix_member(matrix, &daves_ghost).await.unwrap()["reason"], "not today");

    let (carol, carols_ghost) = (world.matrix_user("carol"), ghost(Side::Matrix, "carol"));
    let version = gateway.dag.room(matrix).await.unwrap().unwrap().version;
    world.peer.signs_invites(version);
    world.lm_send_unjudged(lm, draft(&bob, "m.room.member", Some(&carols_ghost), invite)).await;
    in_graph(carol.as_str(), "invite").await;
    let made = gateway.dag.make_leave(&world.peer.name, matrix, &carol).await.unwrap();
    let (id, event) = world.peer.sign(version, made["event"].clone());
    gateway.dag.send_leave(&world.peer.name, matrix, &id, event).await.unwrap();
    in_log(&carols_ghost, "leave").await;
    assert!(gateway.bridge.health(&portal.portal_id).await.unwrap().refusals.is_empty());
}

/// The gateway is the hub and the invited server in one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_39_nobody_is_invited_who_cannot_exist() {
    let (world, gateway) = World::new(json!({})).await;
    let (portal, _view) = world.portal_of_two(&gateway).await;
    let lm = &portal.lm_room_id;
    let bob = world.lm_user("bob");
    let (hub, context) = (ruma::OwnedServerName::try_from(OWN).unwrap(), &world.server.context);
    let version = "org.matrix.i-d.ralston-mimi-linearized-matrix.02";
    let invite = async |user: &str| {
        let event = json!({
            "type": "m.room.member", "state_key": user, "content": { "membership": "invite" }, "room_id": lm,
            "sender": bob, "origin_server_ts": context.clock.now_ms(),
        });
        let lpdu = Lpdu::build(object(event), &hub, &context.server_name, &context.signing_key).unwrap();
        let body = json!({ "event": lpdu.json, "room_version": version, "invite_room_state": [] });
        let uri = format!("/_matrix/federation/unstable/{version}/invite/{}", lpdu.lpdu_id);
        context.client.call(&hub, Call::post(uri, object(body)), false).await
    };
    for nobody in [format!("@nobody:{OWN}"), format!("@mx_:{OWN}"), ghost(Side::Lm, "dave")] {
        let refused = invite(&nobody).await.unwrap_err().to_string();
        assert!(refused.starts_with("404") && refused.contains("M_NOT_FOUND"), "{nobody}: {refused}");
        assert!(gateway.node.state(lm, "m.room.member", &nobody).await.is_none(), "{nobody}");
    }
    invite(&ghost(Side::Matrix, "carol")).await.unwrap();
}
