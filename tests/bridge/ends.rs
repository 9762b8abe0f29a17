//! Portals end: on request, when nobody uses them; and ghosts leave a suspended one.

use std::time::Duration;

use isthmus::bridge::{Cause, NewPortal, Portal, PortalState};
use isthmus::identity::Side;
use isthmus::seam::{Invite, Outgoing};
use serde_json::json;

use super::from_lm::room;
use super::world::{Gateway, LM, World, draft, ghost, so, until};

const HOUR: i64 = 3_600_000;

/// Nobody of the gateway is left in either room.
async fn deserted(gateway: &Gateway, portal: &Portal) -> bool {
    let own = |user: &str| user.ends_with(":g.example");
    let matrix = gateway.dag.joined(&portal.matrix_room_id).await.unwrap();
    let lm = gateway.node.lm.state(&portal.lm_room_id).await.unwrap();
    let in_log = lm.iter().any(|(kind, key, event)| {
        kind == "m.room.member"
            && own(key)
            && event.content().get("membership").is_some_and(|membership| membership != "leave")
    });
    !matrix.iter().any(|user| own(user.as_str())) && !in_log
}

fn state(gateway: &Gateway, portal: &Portal) -> impl Future<Output = (PortalState, Option<String>)> {
    let (bridge, id) = (gateway.bridge.clone(), portal.portal_id.clone());
    async move {
        let portal = bridge.portal(&id).await.unwrap().unwrap();
        (portal.state, portal.reason.clone())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_portal_that_is_removed_says_goodbye_and_leaves_nobody_behind() {
    let (world, gateway) = World::new(json!({})).await;
    let new = NewPortal { alias: Some("tea".to_owned()), join_rule: Some("public".to_owned()), ..NewPortal::default() };
    let portal = gateway.bridge.create_portal(new).await.unwrap();
    let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
    let alice = world.matrix_user("alice");
    let mut view = world.matrix_join(&gateway, matrix, &alice).await.unwrap();
    world.lm_join(lm, "bob").await.unwrap();
    so("all members everywhere", || gateway.in_step(&portal)).await;
    world.peer.signs_invites(isthmus::event::RoomVersion::V12);
    gateway.bridge.invite(&portal.portal_id, &world.matrix_user("carol")).await.unwrap();
    let hello = world.matrix_say(&gateway, &mut view, &alice, "hello").await;

    let ended = gateway.bridge.remove_portal(&portal.portal_id, "we are done").await.unwrap();
    assert_eq!(ended.state, PortalState::Ended);
    assert!(deserted(&gateway, &portal).await);
    let carol = gateway.matrix_member(matrix, world.matrix_user("carol").as_str()).await.unwrap();
    assert_eq!(carol["membership"], "leave", "the bot's invite was taken back");
    // What was said before it was carried over, then both were told.
    so("the goodbye at bob's", || async {
        let said = world.server.bodies(lm).await;
        said.first().is_some_and(|(_, body)| body == "hello")
            && said.iter().any(|(_, body)| body.contains("we are done"))
    })
    .await;
    assert!(gateway.matrix_bodies(matrix).await.iter().any(|(by, body)| *by == gateway.bot() && body.contains("done")));
    so("the ghost of alice gone at bob's", || async {
        world.server.membership(lm, &ghost(Side::Matrix, "alice")).await == "leave"
    })
    .await;
    // Nothing is kept, and nothing crosses any more.
    let found = gateway.bridge.explain(&hello).await.unwrap().unwrap();
    assert_eq!((found.status, &found.portal_id), ("unknown", &Some(portal.portal_id.clone())));
    assert!(world.matrix_join(&gateway, matrix, &world.matrix_user("dora")).await.is_err());
    assert!(gateway.bridge.resolve_alias("tea", Cause::Admin).await.is_err());
    world.lm_say(lm, "bob", "anybody there?").await;
    so("bob's words in the log", || async {
        gateway.node.bodies(lm).await.iter().any(|(_, body)| body == "anybody there?")
    })
    .await;
    assert!(!gateway.matrix_bodies(matrix).await.iter().any(|(_, body)| body == "anybody there?"));
    let health = gateway.bridge.health(&portal.portal_id).await.unwrap();
    assert!(health.waiting.iter().all(|waiting| waiting.count == 0));
    // Once more it does nothing, also after a restart.
    let before = gateway.matrix_events(matrix).await.len();
    let gateway = world.kill(gateway).await;
    let again = gateway.bridge.remove_portal(&portal.portal_id, "again").await.unwrap();
    assert_eq!((again.state, again.reason.as_deref()), (PortalState::Ended, Some("we are done")));
    assert_eq!(gateway.matrix_events(matrix).await.len(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_lm_room_whose_portal_was_removed_can_have_another() {
    let (world, gateway) = World::new(json!({})).await;
    let lm = room(&world, "public").await;
    let via = [LM.try_into().unwrap()];
    let first = gateway.bridge.portal_from_lm(&lm, &via, None, Cause::Admin).await.unwrap();
    let alice = world.matrix_user("alice");
    world.matrix_join(&gateway, &first.matrix_room_id, &alice).await.unwrap();
    gateway.bridge.remove_portal(&first.portal_id, "a new start").await.unwrap();
    assert_eq!(world.server.membership(&lm, &ghost(Side::Matrix, "alice")).await, "leave");
    assert_eq!(world.server.membership(&lm, gateway.bot().as_str()).await, "leave");

    let second = gateway.bridge.portal_from_lm(&lm, &via, None, Cause::Admin).await.unwrap();
    assert_ne!(first.portal_id, second.portal_id);
    assert_ne!(first.matrix_room_id, second.matrix_room_id);
    let mut view = world.matrix_join(&gateway, &second.matrix_room_id, &alice).await.unwrap();
    world.matrix_say(&gateway, &mut view, &alice, "hello again").await;
    so("hello at the hub", || async { world.server.bodies(&lm).await.iter().any(|(_, body)| body == "hello again") })
        .await;
    world.lm_say(&lm, "hubert", "welcome back").await;
    let welcome = (ghost(Side::Lm, "hubert"), "welcome back".to_owned());
    so("the answer", || async { gateway.matrix_bodies(&second.matrix_room_id).await.contains(&welcome) }).await;
    so("both states in step", || gateway.in_step(&second)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_end_that_is_broken_off_is_taken_up() {
    for pause in [0, 4, 15, 40] {
        let (world, gateway) = World::new(json!({})).await;
        let lm = room(&world, "public").await;
        for number in 0..60 {
            world.lm_join_own(&lm, &format!("user{number}")).await;
        }
        let via = [LM.try_into().unwrap()];
        let portal = gateway.bridge.portal_from_lm(&lm, &via, None, Cause::Admin).await.unwrap();
        so("all members everywhere", || gateway.in_step(&portal)).await;
        let (bridge, id) = (gateway.bridge.clone(), portal.portal_id.clone());
        let removing = tokio::spawn(async move { bridge.remove_portal(&id, "enough").await });
        tokio::time::sleep(Duration::from_millis(pause)).await;
        let gateway = world.kill(gateway).await;
        let _ = removing.await;
        if state(&gateway, &portal).await.0 == PortalState::Active {
            // It was broken off before it was written down.
            gateway.bridge.remove_portal(&portal.portal_id, "enough").await.unwrap();
        }
        so("the end", || async { state(&gateway, &portal).await.0 == PortalState::Ended }).await;
        assert!(deserted(&gateway, &portal).await);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_end_that_fails_is_tried_again() {
    let (world, mut gateway) = World::new(json!({})).await;
    let mut portals = Vec::new();
    for _ in 0..2 {
        let lm = room(&world, "public").await;
        let via = [LM.try_into().unwrap()];
        portals.push(gateway.bridge.portal_from_lm(&lm, &via, None, Cause::Admin).await.unwrap());
    }
    for (portal, with_restart) in portals.iter().zip([false, true]) {
        so("both states in step", || gateway.in_step(portal)).await;
        world.break_inserts("lm_lpdu_queue").await;
        gateway.bridge.remove_portal(&portal.portal_id, "enough").await.unwrap_err();
        assert_eq!(state(&gateway, portal).await.0, PortalState::Ending);
        if with_restart {
            // At the start it fails once more.
            gateway = world.kill(gateway).await;
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        world.mend_inserts("lm_lpdu_queue").await;
        so("the end", || async { state(&gateway, portal).await.0 == PortalState::Ended }).await;
        assert!(deserted(&gateway, portal).await);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ghosts_leave_a_suspended_portal_after_an_hour() {
    let (world, gateway) = World::new(json!({})).await;
    let lm = room(&world, "public").await;
    let via = [LM.try_into().unwrap()];
    let portal = gateway.bridge.portal_from_lm(&lm, &via, None, Cause::Admin).await.unwrap();
    let alice = world.matrix_user("alice");
    world.matrix_join(&gateway, &portal.matrix_room_id, &alice).await.unwrap();
    so("both states in step", || gateway.in_step(&portal)).await;
    let kick = json!({ "membership": "leave", "reason": "no bots" });
    world.lm_send(&lm, draft(&world.lm_user("hubert"), "m.room.member", Some(gateway.bot().as_str()), kick)).await;
    let (_, reason) = until("the suspension", || async {
        Some(state(&gateway, &portal).await).filter(|(state, _)| *state == PortalState::Suspended)
    })
    .await;
    assert!(reason.unwrap().contains("hubert"));

    world.advance(HOUR - 60_000);
    gateway.bridge.look_for_ends().await.unwrap();
    let alices = ghost(Side::Matrix, "alice");
    assert_eq!(gateway.node.membership(&lm, &alices).await, "join");
    // The hour is in the store.
    let gateway = world.kill(gateway).await;
    world.advance(120_000);
    gateway.bridge.look_for_ends().await.unwrap();
    so("the ghost of alice gone", || async { world.server.membership(&lm, &alices).await == "leave" }).await;
    let hubert = gateway.matrix_member(&portal.matrix_room_id, &ghost(Side::Lm, "hubert")).await.unwrap();
    assert_eq!(hubert["membership"], "leave");
    assert_eq!(state(&gateway, &portal).await.0, PortalState::Suspended);
    // An admin takes it up again: the bot is let in, and everybody's ghost comes back.
    let resumed = gateway.bridge.resume_portal(&portal.portal_id).await.unwrap();
    assert_eq!((resumed.state, resumed.reason.clone()), (PortalState::Active, None));
    so("both states in step", || gateway.in_step(&portal)).await;
    assert_eq!(world.server.membership(&lm, &alices).await, "join");
    world.lm_say(&lm, "hubert", "welcome back").await;
    so("what is said now", || async { gateway.matrix_bodies(&portal.matrix_room_id).await.len() == 1 }).await;
    // It can be removed.
    gateway.bridge.remove_portal(&portal.portal_id, "enough").await.unwrap();
    so("nobody there", || deserted(&gateway, &portal)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_portal_that_an_alias_made_ends_after_an_hour_unless_somebody_came() {
    let (world, gateway) = World::new(json!({})).await;
    let mut portals = Vec::new();
    for _ in 0..3 {
        let lm = room(&world, "public").await;
        let alias = format!("lm_{}_{LM}", lm.as_str().split(':').next().unwrap());
        gateway.bridge.resolve_alias(&alias, Cause::Appservice).await.unwrap();
        portals.push(gateway.bridge.portals(None, 10).await.unwrap().pop().unwrap());
    }
    let [unused, used, wanted] = &portals[..] else { panic!() };
    let alice = world.matrix_user("alice");
    world.matrix_join(&gateway, &used.matrix_room_id, &alice).await.unwrap();
    let via = [LM.try_into().unwrap()];
    gateway.bridge.portal_from_lm(&wanted.lm_room_id, &via, None, Cause::Admin).await.unwrap();
    // One ban of somebody who never came is no use.
    let stranger = ghost(Side::Matrix, "stranger");
    let ban = draft(&world.lm_user("hubert"), "m.room.member", Some(&stranger), json!({ "membership": "ban" }));
    world.lm_send(&unused.lm_room_id, ban).await;
    let stranger = world.matrix_user("stranger");
    so("the ban", || async { gateway.matrix_member(&unused.matrix_room_id, stranger.as_str()).await.is_some() }).await;

    world.advance(HOUR / 2);
    gateway.bridge.look_for_ends().await.unwrap();
    assert_eq!(state(&gateway, unused).await.0, PortalState::Active);
    world.advance(HOUR);
    gateway.bridge.look_for_ends().await.unwrap();
    let (ended, reason) = state(&gateway, unused).await;
    assert_eq!((ended, reason.as_deref()), (PortalState::Ended, Some("nobody has used it")));
    assert_eq!(world.server.membership(&unused.lm_room_id, gateway.bot().as_str()).await, "leave");
    for portal in [used, wanted] {
        assert_eq!(state(&gateway, portal).await.0, PortalState::Active);
    }
    // It is looked at once: who came keeps it.
    world.advance(24 * HOUR);
    gateway.bridge.look_for_ends().await.unwrap();
    assert_eq!(state(&gateway, used).await.0, PortalState::Active);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unused_portal_whose_end_fails_is_ended_by_one_task_however_often_it_is_due() {
    let (world, gateway) = World::new(json!({})).await;
    let lm = room(&world, "public").await;
    let alias = format!("lm_{}_{LM}", lm.as_str().split(':').next().unwrap());
    gateway.bridge.resolve_alias(&alias, Cause::Appservice).await.unwrap();
    let portal = gateway.bridge.portals(None, 10).await.unwrap().pop().unwrap();
    world.break_inserts("lm_lpdu_queue").await;
    world.advance(2 * HOUR);
    for _ in 0..3 {
        // That one fails keeps nothing else that is due from being done.
        gateway.bridge.look_for_ends().await.unwrap();
        assert_eq!(state(&gateway, &portal).await.0, PortalState::Ending);
    }
    world.mend_inserts("lm_lpdu_queue").await;
    so("the end", || async { state(&gateway, &portal).await.0 == PortalState::Ended }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_there_is_no_space_the_oldest_portal_that_nobody_uses_gives_way_but_no_admins() {
    let (world, gateway) = World::new(json!({ "access": { "max_portals": 3 } })).await;
    let alias = |room: &ruma::RoomId| format!("lm_{}_{LM}", room.as_str().split(':').next().unwrap());
    let mut portals = Vec::new();
    for cause in [Cause::Admin, Cause::Appservice, Cause::Appservice] {
        let lm = room(&world, "public").await;
        gateway.bridge.resolve_alias(&alias(&lm), cause).await.unwrap();
        portals.push(gateway.bridge.portals(None, 10).await.unwrap().pop().unwrap());
    }
    let [wanted, used, unused] = &portals[..] else { panic!() };
    let alice = world.matrix_user("alice");
    world.matrix_join(&gateway, &used.matrix_room_id, &alice).await.unwrap();
    // Who asked for it may be on the way.
    let lm = room(&world, "public").await;
    let refusal = gateway.bridge.resolve_alias(&alias(&lm), Cause::Appservice).await.unwrap_err();
    assert!(refusal.to_string().contains("max_portals is 3"), "{refusal}");
    world.advance(HOUR / 6);
    gateway.bridge.resolve_alias(&alias(&lm), Cause::Appservice).await.unwrap();
    assert_eq!(state(&gateway, unused).await.0, PortalState::Ended);
    for portal in [wanted, used] {
        assert_eq!(state(&gateway, portal).await.0, PortalState::Active);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_portal_is_made_by_an_invite_only_of_those_who_may_and_ends_after_a_day_too() {
    let invited = async |world: &World, gateway: &Gateway, by: &str| {
        let lm = room(world, "public").await;
        world.lm_join_own(&lm, by).await;
        let invite =
            draft(&world.lm_user(by), "m.room.member", Some(gateway.bot().as_str()), json!({ "membership": "invite" }));
        world.server.lm.invite(&lm, Outgoing { draft: invite, effect: None }).await.map(drop)
    };
    let made = |gateway: &Gateway, count: usize| {
        let bridge = gateway.bridge.clone();
        async move { so("the portals", || async { bridge.portals(None, 10).await.unwrap().len() == count }).await }
    };
    let (world, gateway) = World::new(json!({})).await;
    let refusal = invited(&world, &gateway, "bob").await.unwrap_err();
    assert!(refusal.to_string().contains("create_by_invite"), "{refusal}");
    assert!(gateway.bridge.portals(None, 10).await.unwrap().is_empty());

    let access = json!({ "create_by_invite": [format!("@b*:{LM}")], "admins": [format!("@root:{LM}")] });
    let settings = json!({ "access": access, "budgets": { "portals_per_hour": 2 } });
    let (world, gateway) = World::new(settings).await;
    let refusal = invited(&world, &gateway, "carol").await.unwrap_err();
    assert!(refusal.to_string().contains("create_by_invite"), "{refusal}");
    invited(&world, &gateway, "bob").await.unwrap();
    made(&gateway, 1).await;
    invited(&world, &gateway, "root").await.unwrap();
    made(&gateway, 2).await;
    let refusal = invited(&world, &gateway, "bob").await.unwrap_err();
    assert!(refusal.to_string().contains("new portals an hour"), "{refusal}");
    assert_eq!(gateway.bridge.portals(None, 10).await.unwrap().len(), 2);

    world.advance(25 * HOUR);
    gateway.bridge.look_for_ends().await.unwrap();
    let portals = gateway.bridge.portals(None, 10).await.unwrap();
    assert_eq!(
        portals.iter().map(|portal| portal.state).collect::<Vec<_>>(),
        [PortalState::Ended, PortalState::Active]
    );
    invited(&world, &gateway, "bob").await.unwrap();
    made(&gateway, 3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_that_lets_the_bot_in_a_moment_after_the_invite_gets_its_portal() {
    let access = json!({ "create_by_invite": [format!("@*:{LM}")] });
    let (world, gateway) = World::new(json!({ "access": access })).await;
    let lm = room(&world, "invite").await;
    let hubert = world.lm_user("hubert");
    let invite = Invite {
        side: Side::Lm,
        room_id: lm.clone(),
        room_version: "org.matrix.i-d.ralston-mimi-linearized-matrix.02".to_owned(),
        event_id: "$not_written_down_yet".try_into().unwrap(),
        sender: hubert.clone(),
        target: gateway.bot(),
        via: LM.try_into().unwrap(),
        content: Default::default(),
        stripped_state: Vec::new(),
    };
    gateway.bridge.between().invited(invite).await.unwrap();
    // Long enough to be refused once; nothing of that is to be seen.
    tokio::time::sleep(Duration::from_millis(300)).await;
    world.lm_send(&lm, draft(&hubert, "m.room.join_rules", Some(""), json!({ "join_rule": "public" }))).await;
    so("the portal", || async { gateway.bridge.open_portals(10).iter().any(|portal| portal.lm_room_id == lm) }).await;
}
