//! Invites of ghosts into Matrix rooms that have no portal, as for a direct chat: the LM user is invited on their own server, and the ghost
//! joins when they do.

use std::sync::Arc;

use axum::extract::Request;
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::IntoResponse as _;
use isthmus::bridge::{Cause, PENDING_MS, Portal, PortalKind, PortalState};
use isthmus::event::RoomVersion;
use isthmus::identity::Side;
use isthmus::refusal::Refusal;
use isthmus::seam::Outgoing;
use ruma::{OwnedEventId, OwnedRoomId, RoomId};
use serde_json::{Value, json};

use super::from_matrix::{Home, at_home, image, in_log, is_state, user, via};
use super::world::{DEAD, Gateway, World, draft, ghost, so, until};
use crate::dag::OWN;

/// A private room of alice's in which nobody else is.
async fn chat(home: &Home, version: RoomVersion) -> OwnedRoomId {
    home.room(version, json!({ "join_rule": "invite" }), Vec::new()).await
}

/// Alice invites a user of the gateway to a direct chat; the invite.
async fn invite(home: &Home, room: &RoomId, target: &str) -> Result<OwnedEventId, Refusal> {
    let content = json!({ "membership": "invite", "is_direct": true });
    let draft = draft(&user("alice"), "m.room.member", Some(target), content);
    let sent = home.0.dag.invite(room, Outgoing { draft, effect: None }).await?;
    Ok(sent.event_id.clone())
}

/// The portal of a Matrix room, when it is like this.
async fn portal_of(gateway: &Gateway, room: &RoomId, state: PortalState) -> Arc<Portal> {
    until(&format!("a portal that is {state:?}"), || async {
        let mut portals = gateway.bridge.portals(None, 100).await.unwrap().into_iter();
        portals.find(|portal| portal.matrix_room_id == room && portal.state == state)
    })
    .await
}

/// The portal of a room of alice's into which bob's ghost is invited, when bob is invited on his own server.
async fn pending(gateway: &Gateway, room: &RoomId, bob: &str) -> Arc<Portal> {
    let portal = portal_of(gateway, room, PortalState::Pending).await;
    in_log(gateway, &portal.lm_room_id, bob, "invite").await;
    portal
}

/// Why an invite came to nothing, as `explain` tells.
async fn refused(gateway: &Gateway, event: &OwnedEventId) -> (String, String) {
    until("the refusal", || async {
        let found = gateway.bridge.explain(event).await.unwrap()?;
        found.refusal.map(|refusal| (refusal.code, refusal.reason))
    })
    .await
}

async fn reason(home: &Home, room: &RoomId, user: &str) -> String {
    let content = home.0.matrix_member(room, user).await.unwrap_or_default();
    content.get("reason").and_then(Value::as_str).unwrap_or_default().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_matrix_user_begins_a_direct_chat_with_an_lm_user() {
    for version in [RoomVersion::V10, RoomVersion::V12] {
        let (world, gateway) = World::new(json!({})).await;
        let home = Home::start(&world).await;
        let (bob, bobs_ghost) = (world.lm_user("bob"), ghost(Side::Lm, "bob"));
        let room = chat(&home, version).await;
        home.say(&room, "alice", "before").await;
        let event = invite(&home, &room, &bobs_ghost).await.unwrap();
        let portal = pending(&gateway, &room, bob.as_str()).await;
        let lm = &portal.lm_room_id;
        assert_eq!((portal.kind, portal.alias.as_ref()), (PortalKind::FromMatrix, None));
        // Bob sees who invites him, into what, and that it is a direct chat; the gateway is not in alice's room.
        let member = gateway.node.lm.state(lm).await.unwrap().get("m.room.member", bob.as_str()).unwrap().clone();
        assert_eq!((member.sender.as_str(), &member.content()["is_direct"]), (image("alice").as_str(), &json!(true)));
        assert_eq!(gateway.node.state(lm, "m.room.name", "").await.unwrap()["name"], "Tea");
        assert_eq!(home.membership(&room, &bobs_ghost).await, "invite");
        assert_eq!(home.membership(&room, gateway.bot().as_str()).await, "leave");
        let health = gateway.bridge.health(&portal.portal_id).await.unwrap();
        let open: Vec<_> = health.invitations.iter().map(|invite| (invite.user_id.as_str(), invite.stage)).collect();
        assert_eq!(open, [(bob.as_str(), "open")]);
        let found = gateway.bridge.explain(&event).await.unwrap().unwrap();
        assert_eq!((found.status, found.portal_id.as_ref()), ("waiting", Some(&portal.portal_id)));
        assert_eq!(found.across, Some(member.event_id.clone()));
        // Nobody else comes in.
        assert!(world.lm_join(lm, "eve").await.is_err());

        world.lm_join(lm, "bob").await.unwrap();
        // The ghost was there before him, the bot is not, and what was said before is there.
        assert_eq!(gateway.matrix_member(&room, &bobs_ghost).await.unwrap()["membership"], "join");
        at_home(&home, &room, &bobs_ghost, "join").await;
        assert_eq!(home.membership(&room, gateway.bot().as_str()).await, "leave");
        assert!(gateway.node.bodies(lm).await.contains(&(image("alice"), "before".to_owned())));
        assert!(is_state(&gateway, &portal, PortalState::Active).await);
        let levels = Value::Object(world.server.state(lm, "m.room.power_levels", "").await.unwrap());
        assert!(levels["users"][image("alice")].as_i64().unwrap() >= 100, "{levels}");

        home.say(&room, "alice", "hello").await;
        let hello = (image("alice"), "hello".to_owned());
        so("hello in the log", || async { world.server.bodies(lm).await.contains(&hello) }).await;
        world.lm_say(lm, "bob", "hi").await;
        let hi = (bobs_ghost.clone(), "hi".to_owned());
        so("hi at home", || async { home.0.matrix_bodies(&room).await.contains(&hi) }).await;
        home.send(&room, "alice", "m.room.name", Some(""), json!({ "name": "Coffee" })).await;
        so("the name in the log", || async {
            world.server.state(lm, "m.room.name", "").await.is_some_and(|content| content["name"] == "Coffee")
        })
        .await;
        so("both states in step", || gateway.in_step(&portal)).await;
        assert!(gateway.bridge.health(&portal.portal_id).await.unwrap().invitations.is_empty());

        // When he goes nobody of LM is left, and nothing dangles.
        let leave = json!({ "membership": "leave" });
        world.lm_send(lm, draft(&bob, "m.room.member", Some(bob.as_str()), leave)).await;
        at_home(&home, &room, &bobs_ghost, "leave").await;
        let ended = portal_of(&gateway, &room, PortalState::Ended).await;
        assert!(ended.reason.as_ref().unwrap().contains("nobody of LM"), "{ended:?}");
        // And alice may ask him again.
        invite(&home, &room, &bobs_ghost).await.unwrap();
        let again = pending(&gateway, &room, bob.as_str()).await;
        world.lm_join(&again.lm_room_id, "bob").await.unwrap();
        at_home(&home, &room, &bobs_ghost, "join").await;
        home.say(&room, "alice", "again").await;
        let said = (image("alice"), "again".to_owned());
        so("alice again", || async { world.server.bodies(&again.lm_room_id).await.contains(&said) }).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_declines_declines_on_the_other_side_too() {
    let (world, gateway) = World::new(json!({})).await;
    let home = Home::start(&world).await;
    let (bob, bobs_ghost) = (world.lm_user("bob"), ghost(Side::Lm, "bob"));
    let room = chat(&home, RoomVersion::V11).await;
    let event = invite(&home, &room, &bobs_ghost).await.unwrap();
    let portal = pending(&gateway, &room, bob.as_str()).await;
    world.server.lm.leave_because(&portal.lm_room_id, &bob, &[OWN.try_into().unwrap()], Some("no time")).await.unwrap();
    at_home(&home, &room, &bobs_ghost, "leave").await;
    assert_eq!(reason(&home, &room, &bobs_ghost).await, "no time");
    let ended = portal_of(&gateway, &room, PortalState::Ended).await;
    assert!(ended.reason.as_ref().unwrap().contains("no time"), "{ended:?}");
    assert_eq!(refused(&gateway, &event).await, ("declined".to_owned(), "no time".to_owned()));
    assert_eq!(gateway.node.membership(&portal.lm_room_id, gateway.bot().as_str()).await, "leave");
    assert!(gateway.bridge.portal(&portal.portal_id).await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invite_that_is_taken_back_is_taken_back_on_the_other_side_too() {
    let (world, gateway) = World::new(json!({})).await;
    let home = Home::start(&world).await;
    let (bob, bobs_ghost) = (world.lm_user("bob"), ghost(Side::Lm, "bob"));
    let room = chat(&home, RoomVersion::V11).await;
    invite(&home, &room, &bobs_ghost).await.unwrap();
    let portal = pending(&gateway, &room, bob.as_str()).await;
    home.member(&room, "alice", &bobs_ghost, "leave").await;
    in_log(&gateway, &portal.lm_room_id, bob.as_str(), "leave").await;
    let member = gateway.node.lm.state(&portal.lm_room_id).await.unwrap();
    // By who invited: what homeservers ask for, and what it is.
    assert_eq!(member.get("m.room.member", bob.as_str()).unwrap().sender, image("alice"));
    portal_of(&gateway, &room, PortalState::Ended).await;
    assert!(world.lm_join(&portal.lm_room_id, "bob").await.is_err());
    // Whoever says so that did not invite is not believed.
    let room = chat(&home, RoomVersion::V11).await;
    invite(&home, &room, &bobs_ghost).await.unwrap();
    let portal = pending(&gateway, &room, bob.as_str()).await;
    home.send(&room, "alice", "m.room.join_rules", Some(""), json!({ "join_rule": "public" })).await;
    home.join(&room, "mallory").await;
    home.empower(&room, &[(user("mallory").as_str(), 50)]).await;
    home.member(&room, "mallory", &bobs_ghost, "leave").await;
    home.send(&room, "alice", "m.room.join_rules", Some(""), json!({ "join_rule": "invite" })).await;
    home.say(&room, "alice", "after that").await;
    assert!(is_state(&gateway, &portal, PortalState::Pending).await);
    // But the room's own word is, when bob comes: then nothing is left to wait for.
    let refusal = world.lm_join(&portal.lm_room_id, "bob").await.unwrap_err();
    assert_eq!(refusal.code(), "forbidden", "{refusal}");
    in_log(&gateway, &portal.lm_room_id, bob.as_str(), "leave").await;
    portal_of(&gateway, &room, PortalState::Ended).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_pending_outlives_the_gateway() {
    let (world, gateway) = World::new(json!({})).await;
    let home = Home::start(&world).await;
    let (bob, bobs_ghost) = (world.lm_user("bob"), ghost(Side::Lm, "bob"));
    // Broken off before there is a portal, and while bob has not answered.
    world.break_portals("pending").await;
    let room = chat(&home, RoomVersion::V12).await;
    let event = invite(&home, &room, &bobs_ghost).await.unwrap();
    so("the invite to wait", || async {
        gateway.bridge.explain(&event).await.unwrap().is_some_and(|found| found.status == "waiting")
    })
    .await;
    let gateway = world.kill(gateway).await;
    assert!(gateway.bridge.portals(None, 10).await.unwrap().iter().all(|portal| portal.state != PortalState::Pending));
    world.mend_inserts("bridge_portals").await;
    let portal = pending(&gateway, &room, bob.as_str()).await;
    let gateway = world.kill(gateway).await;
    assert!(is_state(&gateway, &portal, PortalState::Pending).await);
    world.lm_join(&portal.lm_room_id, "bob").await.unwrap();
    at_home(&home, &room, &bobs_ghost, "join").await;
    let gateway = world.kill(gateway).await;
    home.say(&room, "alice", "still here").await;
    let said = (image("alice"), "still here".to_owned());
    so("alice in the log", || async { world.server.bodies(&portal.lm_room_id).await.contains(&said) }).await;
    so("both states in step", || gateway.in_step(&portal)).await;

    // What was decided and not told is told after it.
    let room = chat(&home, RoomVersion::V12).await;
    let eves_ghost = ghost(Side::Lm, "eve");
    invite(&home, &room, &eves_ghost).await.unwrap();
    let portal = pending(&gateway, &room, world.lm_user("eve").as_str()).await;
    *home.0.node.meddler.lock().unwrap() = Some(Arc::new(|request: Request, next: Next| {
        Box::pin(async move {
            match request.uri().path().contains("make_leave") {
                true => StatusCode::BAD_GATEWAY.into_response(),
                false => next.run(request).await,
            }
        })
    }));
    world.server.lm.leave(&portal.lm_room_id, &world.lm_user("eve"), &[OWN.try_into().unwrap()]).await.unwrap();
    so("eve's answer to be known", || async {
        let health = gateway.bridge.health(&portal.portal_id).await.unwrap();
        health.invitations.iter().any(|invite| invite.stage == "refused" && invite.tries > 0)
    })
    .await;
    let _gateway = world.kill(gateway).await;
    *home.0.node.meddler.lock().unwrap() = None;
    at_home(&home, &room, &eves_ghost, "leave").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invite_that_nobody_answers_ends_after_a_week() {
    let (world, gateway) = World::new(json!({})).await;
    let home = Home::start(&world).await;
    let (bob, bobs_ghost) = (world.lm_user("bob"), ghost(Side::Lm, "bob"));
    let room = chat(&home, RoomVersion::V11).await;
    let event = invite(&home, &room, &bobs_ghost).await.unwrap();
    let portal = pending(&gateway, &room, bob.as_str()).await;
    world.advance(PENDING_MS - 60_000);
    gateway.bridge.look_for_ends().await.unwrap();
    assert!(is_state(&gateway, &portal, PortalState::Pending).await);
    world.advance(61_000);
    gateway.bridge.look_for_ends().await.unwrap();
    at_home(&home, &room, &bobs_ghost, "leave").await;
    in_log(&gateway, &portal.lm_room_id, bob.as_str(), "leave").await;
    portal_of(&gateway, &room, PortalState::Ended).await;
    assert_eq!(refused(&gateway, &event).await.0, "expired");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invite_of_a_user_whose_server_is_gone_is_declined_in_the_end() {
    let (world, gateway) = World::new(json!({})).await;
    let home = Home::start(&world).await;
    let room = chat(&home, RoomVersion::V11).await;
    let gone = format!("@lm_gone_{DEAD}:{OWN}");
    let event = invite(&home, &room, &gone).await.unwrap();
    portal_of(&gateway, &room, PortalState::Pending).await;
    for _ in 0..60 {
        if home.membership(&room, &gone).await == "leave" {
            break;
        }
        world.advance(301_000);
        gateway.bridge.look_for_ends().await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    at_home(&home, &room, &gone, "leave").await;
    let (code, why) = refused(&gateway, &event).await;
    assert!(code == "remote" && why.contains("given up after") && why.contains(DEAD), "{code}: {why}");
    portal_of(&gateway, &room, PortalState::Ended).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_so_many_invites_wait_for_an_answer() {
    let budgets = json!({ "open_invites_per_user": 2, "open_invites_per_server": 3, "portals_per_hour": 4 });
    let (world, gateway) = World::new(json!({ "budgets": budgets })).await;
    let home = Home::start(&world).await;
    let ghosts = ["bob", "eve", "mia", "joe"].map(|name| ghost(Side::Lm, name));
    let room = chat(&home, RoomVersion::V11).await;
    for name in &ghosts[..2] {
        invite(&home, &room, name).await.unwrap();
    }
    let refusal = invite(&home, &room, &ghosts[2]).await.unwrap_err();
    assert!(refusal.to_string().contains("there may be 2"), "{refusal}");
    assert_eq!(home.membership(&room, &ghosts[2]).await, "leave");
    // They share a portal, and when one is over there is space for another.
    let portal = pending(&gateway, &room, world.lm_user("eve").as_str()).await;
    in_log(&gateway, &portal.lm_room_id, world.lm_user("bob").as_str(), "invite").await;
    home.member(&room, "alice", &ghosts[1], "leave").await;
    in_log(&gateway, &portal.lm_room_id, world.lm_user("eve").as_str(), "leave").await;
    until("space", || async { invite(&home, &room, &ghosts[2]).await.ok() }).await;
    assert!(is_state(&gateway, &portal, PortalState::Pending).await);
    assert_eq!(gateway.bridge.portals(None, 100).await.unwrap().len(), 1);
    // Another user of the same server has but one left.
    let carols = {
        let carol = user("carol");
        let initial_state = vec![draft(&carol, "m.room.join_rules", Some(""), json!({ "join_rule": "invite" }))];
        let new = isthmus::dag::NewRoom { creator: carol, version: RoomVersion::V11, initial_state };
        home.0.dag.create_room(new).await.unwrap()
    };
    let by_carol = async |target: &str| {
        let draft = draft(&user("carol"), "m.room.member", Some(target), json!({ "membership": "invite" }));
        home.0.dag.invite(&carols, Outgoing { draft, effect: None }).await.map(drop)
    };
    by_carol(&ghosts[3]).await.unwrap();
    let refusal = by_carol(&ghosts[0]).await.unwrap_err();
    assert!(refusal.to_string().contains("there may be 3"), "{refusal}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whom_the_policy_keeps_out_is_not_invited() {
    for (access, why) in [
        (json!({ "hubs": ["elsewhere"] }), "hubs"),
        (json!({ "matrix_servers": ["elsewhere"] }), "matrix_servers"),
        (json!({ "create_by_ghost_invite": ["elsewhere"] }), "create_by_ghost_invite"),
    ] {
        let (world, gateway) = World::new(json!({ "access": access })).await;
        let home = Home::start(&world).await;
        let room = chat(&home, RoomVersion::V11).await;
        let refusal = invite(&home, &room, &ghost(Side::Lm, "bob")).await.unwrap_err();
        assert!(refusal.to_string().contains(why), "{refusal}");
        assert!(gateway.bridge.portals(None, 10).await.unwrap().is_empty());
    }
    let (world, gateway) = World::new(json!({ "budgets": { "portals_per_hour": 1 } })).await;
    let home = Home::start(&world).await;
    invite(&home, &chat(&home, RoomVersion::V11).await, &ghost(Side::Lm, "bob")).await.unwrap();
    let refusal = invite(&home, &chat(&home, RoomVersion::V11).await, &ghost(Side::Lm, "bob")).await.unwrap_err();
    assert!(refusal.to_string().contains("new portals an hour"), "{refusal}");
    drop((world, gateway));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_invites_into_an_encrypted_room_is_told_at_once_why_nobody_comes() {
    let (world, gateway) = World::new(json!({})).await;
    let home = Home::start(&world).await;
    let (bob, bobs_ghost) = (world.lm_user("bob"), ghost(Side::Lm, "bob"));
    let room = chat(&home, RoomVersion::V12).await;
    let encryption = json!({ "algorithm": "m.megolm.v1.aes-sha2" });
    home.send(&room, "alice", "m.room.encryption", Some(""), encryption.clone()).await;
    let event = invite(&home, &room, &bobs_ghost).await.unwrap();
    let told = |body: &str| body.contains("encrypted") && body.contains(bob.as_str()) && body.contains(&bobs_ghost);
    so("the notice", || async {
        home.0.matrix_bodies(&room).await.iter().any(|(by, body)| *by == bobs_ghost && told(body))
    })
    .await;
    at_home(&home, &room, &bobs_ghost, "leave").await;
    assert!(reason(&home, &room, &bobs_ghost).await.contains("encrypted"));
    assert!(gateway.bridge.portals(None, 10).await.unwrap().is_empty());
    let (code, reason) = refused(&gateway, &event).await;
    assert!(code == "encryption" && reason.contains("m.megolm.v1.aes-sha2"), "{code}: {reason}");
    // That is known also when nothing waits any more.
    so("nothing to be left", || async { gateway.invitations().await == 0 }).await;
    let found = gateway.bridge.explain(&event).await.unwrap().unwrap();
    assert_eq!((found.status, found.portal_id, &found.room_id), ("refused", None, &room));

    // Encrypted while bob thinks about it: he does not come in, and both know.
    let room = chat(&home, RoomVersion::V12).await;
    invite(&home, &room, &bobs_ghost).await.unwrap();
    let portal = pending(&gateway, &room, bob.as_str()).await;
    home.send(&room, "alice", "m.room.encryption", Some(""), encryption).await;
    let refusal = world.lm_join(&portal.lm_room_id, "bob").await.unwrap_err();
    assert!(refusal.to_string().contains("encrypted"), "{refusal}");
    so("the notice", || async { home.0.matrix_bodies(&room).await.iter().any(|(_, body)| told(body)) }).await;
    at_home(&home, &room, &bobs_ghost, "leave").await;
    in_log(&gateway, &portal.lm_room_id, bob.as_str(), "leave").await;
    portal_of(&gateway, &room, PortalState::Ended).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_are_invited_into_a_group_and_come_or_do_not() {
    let (world, gateway) = World::new(json!({})).await;
    let home = Home::start(&world).await;
    let names = ["bob", "eve", "mia"];
    let room = chat(&home, RoomVersion::V11).await;
    home.member(&room, "alice", user("carol").as_str(), "invite").await;
    home.join(&room, "carol").await;
    for name in names {
        home.invite(&room, &ghost(Side::Lm, name)).await.unwrap();
    }
    let portal = pending(&gateway, &room, world.lm_user("mia").as_str()).await;
    let lm = &portal.lm_room_id;
    for name in names {
        in_log(&gateway, lm, world.lm_user(name).as_str(), "invite").await;
    }
    assert_eq!(gateway.bridge.portals(None, 100).await.unwrap().len(), 1);
    let (bob, eve) = tokio::join!(world.lm_join(lm, "bob"), world.lm_join(lm, "eve"));
    bob.unwrap();
    eve.unwrap();
    for name in ["bob", "eve"] {
        at_home(&home, &room, &ghost(Side::Lm, name), "join").await;
    }
    assert_eq!(world.server.membership(lm, &image("carol")).await, "join");
    world.server.lm.leave(lm, &world.lm_user("mia"), &[]).await.unwrap();
    at_home(&home, &room, &ghost(Side::Lm, "mia"), "leave").await;
    // From now on the room is like any other.
    home.invite(&room, &ghost(Side::Lm, "joe")).await.unwrap();
    in_log(&gateway, lm, world.lm_user("joe").as_str(), "invite").await;
    world.lm_join(lm, "joe").await.unwrap();
    at_home(&home, &room, &ghost(Side::Lm, "joe"), "join").await;
    home.say(&room, "carol", "welcome").await;
    let welcome = (image("carol"), "welcome".to_owned());
    so("the welcome", || async { world.server.bodies(lm).await.contains(&welcome) }).await;
    so("both states in step", || gateway.in_step(&portal)).await;
    assert!(is_state(&gateway, &portal, PortalState::Active).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_portal_of_the_whole_room_takes_over_from_a_pending_one() {
    let (world, gateway) = World::new(json!({})).await;
    let home = Home::start(&world).await;
    let (bob, bobs_ghost) = (world.lm_user("bob"), ghost(Side::Lm, "bob"));
    let room = home.public(RoomVersion::V11).await;
    invite(&home, &room, &bobs_ghost).await.unwrap();
    let first = pending(&gateway, &room, bob.as_str()).await;
    let portal = gateway.bridge.portal_from_matrix(&room, &via(), None, Cause::Admin).await.unwrap();
    assert_eq!(portal.state, PortalState::Active);
    assert!(is_state(&gateway, &first, PortalState::Ended).await);
    in_log(&gateway, &first.lm_room_id, bob.as_str(), "leave").await;
    world.advance(60_000);
    gateway.bridge.look_for_ends().await.unwrap();
    in_log(&gateway, &portal.lm_room_id, bob.as_str(), "invite").await;
    assert_eq!(home.membership(&room, &bobs_ghost).await, "invite");
    world.lm_join(&portal.lm_room_id, "bob").await.unwrap();
    at_home(&home, &room, &bobs_ghost, "join").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_portal_that_is_removed_while_it_is_pending_declines() {
    let (world, gateway) = World::new(json!({})).await;
    let home = Home::start(&world).await;
    let (bob, bobs_ghost) = (world.lm_user("bob"), ghost(Side::Lm, "bob"));
    let room = chat(&home, RoomVersion::V11).await;
    invite(&home, &room, &bobs_ghost).await.unwrap();
    let portal = pending(&gateway, &room, bob.as_str()).await;
    let ended = gateway.bridge.remove_portal(&portal.portal_id, "an admin wants it").await.unwrap();
    assert_eq!(ended.state, PortalState::Ended);
    in_log(&gateway, &portal.lm_room_id, bob.as_str(), "leave").await;
    at_home(&home, &room, &bobs_ghost, "leave").await;
    assert!(reason(&home, &room, &bobs_ghost).await.contains("an admin wants it"));
}
