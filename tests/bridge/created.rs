//! A portal with both rooms at the gateway: the graph has authority.

use isthmus::bridge::{NewPortal, Portal};
use isthmus::identity::Side;
use serde_json::{Value, json};

use crate::dag::databases::both_databases;

use super::world::{Gateway, World, draft, ghost, in_each_version, so, until};

async fn public(gateway: &Gateway) -> std::sync::Arc<Portal> {
    let new = NewPortal {
        name: Some("Tea".to_owned()),
        alias: Some("tea".to_owned()),
        join_rule: Some("public".to_owned()),
        ..NewPortal::default()
    };
    gateway.bridge.create_portal(new).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_messages_and_names_cross_both_ways() {
    in_each_version(members_messages_and_names).await;
}

async fn members_messages_and_names(world: World, gateway: Gateway) {
    let portal = public(&gateway).await;
    let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
    let alice = world.matrix_user("alice");
    let mut view = world.matrix_join(&gateway, matrix, &alice).await.unwrap();
    so("the ghost of alice", || async {
        let content = gateway.node.state(lm, "m.room.member", &ghost(Side::Matrix, "alice")).await;
        content.is_some_and(|content| content["membership"] == "join" && content["displayname"] == "ALICE")
    })
    .await;
    world.lm_join(lm, "bob").await.unwrap();
    so("the ghost of bob", || async {
        let content = gateway.matrix_member(matrix, &ghost(Side::Lm, "bob")).await;
        content.is_some_and(|content| content["membership"] == "join" && content["displayname"] == "BOB")
    })
    .await;

    let hello = world.matrix_say(&gateway, &mut view, &alice, "hello").await;
    let at_bob = || async { world.server.bodies(lm).await };
    so("hello in the log", || async { at_bob().await == [(ghost(Side::Matrix, "alice"), "hello".to_owned())] }).await;
    world.lm_say(lm, "bob", "hi").await;
    let hi = (ghost(Side::Lm, "bob"), "hi".to_owned());
    so("hi in the graph", || async { gateway.matrix_bodies(matrix).await.contains(&hi) }).await;

    // A reply and a mention name what is there, and where they come from.
    let answer = json!({
        "msgtype": "m.text", "body": "yes",
        "m.relates_to": { "m.in_reply_to": { "event_id": hello } },
        "m.mentions": { "user_ids": [ghost(Side::Lm, "bob")] },
    });
    let reply = world.matrix_send(&gateway, &mut view, &alice, "m.room.message", None, answer).await;
    let image = until("the reply", || async { gateway.bridge.explain(&reply).await.unwrap()?.across }).await;
    let image = gateway.node.lm.event(&image).await.unwrap().unwrap();
    let source = gateway.bridge.explain(&hello).await.unwrap().unwrap();
    assert_eq!(source.status, "crossed");
    let content = Value::Object(image.event.content().clone());
    assert_eq!(content["m.relates_to"]["m.in_reply_to"]["event_id"], json!(source.across.unwrap()));
    assert_eq!(content["m.mentions"]["user_ids"], json!([world.lm_user("bob")]));
    assert_eq!(content["im.isthmus.source"]["sender"], json!(alice));
    assert_eq!(gateway.bridge.explain(&image.event.event_id).await.unwrap().unwrap().status, "image");

    // Those with the level change the room on both sides.
    gateway.bridge.set_power(&portal.portal_id, &alice, 50).await.unwrap();
    gateway.bridge.set_power(&portal.portal_id, &world.lm_user("bob"), 50).await.unwrap();
    world.refresh(&gateway, &mut view).await;
    world.matrix_send(&gateway, &mut view, &alice, "m.room.topic", Some(""), json!({ "topic": "green" })).await;
    so("the topic in the log", || async {
        gateway.node.state(lm, "m.room.topic", "").await.is_some_and(|content| content["topic"] == "green")
    })
    .await;
    world.lm_send(lm, draft(&world.lm_user("bob"), "m.room.name", Some(""), json!({ "name": "Coffee" }))).await;
    so("the name in the graph", || async {
        gateway.matrix_state(matrix, "m.room.name").await.is_some_and(|content| content["name"] == "Coffee")
    })
    .await;
    so("both states in step", || gateway.in_step(&portal)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaves_kicks_and_bans_cross_both_ways() {
    in_each_version(leaves_kicks_and_bans).await;
}

async fn leaves_kicks_and_bans(world: World, gateway: Gateway) {
    let portal = public(&gateway).await;
    let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
    let (alice, carol) = (world.matrix_user("alice"), world.matrix_user("carol"));
    world.matrix_join(&gateway, matrix, &carol).await.unwrap();
    let mut view = world.matrix_join(&gateway, matrix, &alice).await.unwrap();
    for name in ["bob", "dave", "erin"] {
        world.lm_join(lm, name).await.unwrap();
    }
    so("all members everywhere", || gateway.in_step(&portal)).await;
    gateway.bridge.set_power(&portal.portal_id, &alice, 50).await.unwrap();
    gateway.bridge.set_power(&portal.portal_id, &world.lm_user("bob"), 50).await.unwrap();
    world.refresh(&gateway, &mut view).await;

    // Matrix to LM: a kick, then a ban.
    for (membership, name) in [("leave", "dave"), ("ban", "erin")] {
        let target = ghost(Side::Lm, name);
        let content = json!({ "membership": membership, "reason": "enough" });
        world.matrix_send(&gateway, &mut view, &alice, "m.room.member", Some(&target), content).await;
        so(membership, || async { gateway.node.membership(lm, world.lm_user(name).as_str()).await == membership })
            .await;
    }
    let event = gateway.node.state(lm, "m.room.member", world.lm_user("erin").as_str()).await.unwrap();
    assert_eq!(event["reason"], "enough");
    // LM to Matrix.
    let bob = world.lm_user("bob");
    let kick = draft(&bob, "m.room.member", Some(&ghost(Side::Matrix, "carol")), json!({ "membership": "ban" }));
    world.lm_send(lm, kick).await;
    so("carol banned", || async {
        gateway.matrix_member(matrix, carol.as_str()).await.is_some_and(|content| content["membership"] == "ban")
    })
    .await;
    // She cannot come back, nor can erin, on whichever side they try.
    assert!(world.matrix_join(&gateway, matrix, &carol).await.is_err());
    assert!(world.lm_join(lm, "erin").await.is_err());
    // Leaving.
    world.lm_send(lm, draft(&bob, "m.room.member", Some(bob.as_str()), json!({ "membership": "leave" }))).await;
    so("the ghost of bob gone", || async {
        let content = gateway.matrix_member(matrix, &ghost(Side::Lm, "bob")).await;
        content.is_some_and(|content| content["membership"] == "leave")
    })
    .await;
    world.refresh(&gateway, &mut view).await;
    let leave = json!({ "membership": "leave" });
    world.matrix_send(&gateway, &mut view, &alice, "m.room.member", Some(alice.as_str()), leave).await;
    so("the ghost of alice gone", || async {
        gateway.node.membership(lm, &ghost(Side::Matrix, "alice")).await == "leave"
    })
    .await;
    so("both states in step", || gateway.in_step(&portal)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_4_what_the_authority_does_not_allow_is_refused_told_and_repaired() {
    in_each_version(repaired).await;
}

async fn repaired(world: World, gateway: Gateway) {
    let portal = public(&gateway).await;
    let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
    world.matrix_join(&gateway, matrix, &world.matrix_user("alice")).await.unwrap();
    world.lm_join(lm, "bob").await.unwrap();
    so("all members everywhere", || gateway.in_step(&portal)).await;
    // Bob has the level in the log alone, by an event that the bridge never saw.
    let mut levels = gateway.node.state(lm, "m.room.power_levels", "").await.unwrap();
    levels["users"][world.lm_user("bob").as_str()] = json!(50);
    let raise = draft(&gateway.bot(), "m.room.power_levels", Some(""), Value::Object(levels));
    let raise = isthmus::seam::Outgoing { draft: raise, effect: None };
    gateway.node.lm.send(lm, vec![raise]).await.pop().unwrap().unwrap();
    // His server may not know of it yet.
    world.lm_send_unjudged(lm, draft(&world.lm_user("bob"), "m.room.name", Some(""), json!({ "name": "Mine" }))).await;
    so("the name is repaired", || async {
        let name = gateway.node.state(lm, "m.room.name", "").await.unwrap();
        name["name"] == "Tea" && name.contains_key("im.isthmus.repair")
    })
    .await;
    so("bob is told", || async {
        let bodies = world.server.bodies(lm).await;
        bodies.iter().any(|(sender, body)| *sender == gateway.bot() && body.contains("not carried"))
    })
    .await;
    let health = gateway.bridge.health(&portal.portal_id).await.unwrap();
    assert_eq!(health.refusals.len(), 1);
    assert_eq!(health.refusals[0].kind, "m.room.name");
    so("both states in step", || gateway.in_step(&portal)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_not_invited_comes_into_neither_room() {
    let (world, gateway) = World::new(json!({})).await;
    let portal = gateway.bridge.create_portal(NewPortal::default()).await.unwrap();
    let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
    let alice = world.matrix_user("alice");
    assert!(world.matrix_join(&gateway, matrix, &alice).await.is_err());
    assert!(world.lm_join(lm, "bob").await.is_err());
    world.peer.signs_invites(isthmus::event::RoomVersion::V12);
    gateway.bridge.invite(&portal.portal_id, &alice).await.unwrap();
    world.matrix_join(&gateway, matrix, &alice).await.unwrap();
    so("the ghost of alice", || async { gateway.node.membership(lm, &ghost(Side::Matrix, "alice")).await == "join" })
        .await;
    // This LM server is another gateway, of whose users nothing says on which side they are at home.
    let invite = json!({ "membership": "invite" });
    let invite = draft(&gateway.bot(), "m.room.member", Some(world.lm_user("bob").as_str()), invite);
    gateway.node.lm.invite(lm, isthmus::seam::Outgoing { draft: invite, effect: None }).await.unwrap();
    world.lm_join(lm, "bob").await.unwrap();
    so("both states in step", || gateway.in_step(&portal)).await;
    let members = gateway.bridge.health(&portal.portal_id).await.unwrap().members;
    assert_eq!((members.matrix, members.lm), (vec![alice], vec![world.lm_user("bob")]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_that_the_policy_does_not_name_stay_outside() {
    let access = json!({ "matrix_servers": ["other.example"], "hubs": ["other.example"] });
    let (world, gateway) = World::new(json!({ "access": access })).await;
    let portal = public(&gateway).await;
    let refused = world.matrix_join(&gateway, &portal.matrix_room_id, &world.matrix_user("alice")).await;
    assert_eq!(refused.unwrap_err().code(), "policy");
    assert!(world.lm_join(&portal.lm_room_id, "bob").await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_lm_server_is_told_the_lm_room_of_an_alias() {
    let (world, gateway) = World::new(json!({})).await;
    let portal = public(&gateway).await;
    let own: ruma::OwnedServerName = crate::dag::OWN.try_into().unwrap();
    let alias = format!("#tea:{own}");
    // Under the LM prefix it is certain what is meant, though the server says that it does both.
    let found = world.server.lm.query_directory(&own, &alias).await.unwrap();
    assert_eq!((&found.room_id, &found.servers), (&portal.lm_room_id, &vec![own.clone()]));
    let stable = || async {
        let uri = format!("/_matrix/federation/v1/query/directory?room_alias=%23tea%3A{own}");
        let call = isthmus::federation::Call::get(uri);
        world.server.context.client.call(&own, call, false).await.unwrap()["room_id"].clone()
    };
    assert_eq!(stable().await, portal.matrix_room_id.as_str());
    // A server with which LM rooms alone are shared means the LM room.
    world.lm_join(&portal.lm_room_id, "bob").await.unwrap();
    so("the LM server known", || async { stable().await == portal.lm_room_id.as_str() }).await;
    // Nobody causes a portal by that.
    assert!(world.server.lm.query_directory(&own, &format!("#lm_tea_lm.example:{own}")).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_whose_side_is_not_certain_are_refused_until_it_is_said() {
    let (world, gateway) = World::new(json!({})).await;
    let other = world.other_server().await;
    let portal = public(&gateway).await;
    let mut peer = crate::dag::peer::Peer::start(super::world::OTHER).await;
    peer.key = other.context.signing_key.clone();
    let both = ruma::UserId::parse(format!("@both:{}", super::world::OTHER)).unwrap();
    World::matrix_join_from(&peer, &gateway, &portal.matrix_room_id, &both).await.unwrap();
    // One side: it is certain.
    gateway.bridge.set_power(&portal.portal_id, &both, 10).await.unwrap();
    let via = [crate::dag::OWN.try_into().unwrap()];
    other.lm.join(&portal.lm_room_id, &both, &via, Default::default()).await.unwrap();
    let refused = gateway.bridge.set_power(&portal.portal_id, &both, 20).await.unwrap_err();
    assert!(refused.to_string().contains("is in both rooms"), "{refused}");
    gateway.bridge.set_power_of(&portal.portal_id, &both, 30, Some(Side::Lm)).await.unwrap();
    let levels = gateway.node.state(&portal.lm_room_id, "m.room.power_levels", "").await.unwrap();
    assert_eq!(levels["users"][both.as_str()], 30);
    // Another user of a server that does both, and one whose server cannot be asked.
    for (user, why) in [(format!("@third:{}", super::world::OTHER), "does both"), ("@x:nowhere.invalid".into(), "keys")]
    {
        let user = ruma::UserId::parse(user).unwrap();
        let refused = gateway.bridge.invite(&portal.portal_id, &user).await.unwrap_err();
        assert!(refused.to_string().contains(why), "{refused}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ghost_whose_name_is_hashed_is_kept_when_it_does_something_and_not_when_it_is_named() {
    let (world, gateway) = World::new(json!({})).await;
    let portal = public(&gateway).await;
    let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
    let long = |letter: &str| letter.repeat(235);
    let kept = || async {
        let rows: Vec<(String,)> = sqlx::query_as("SELECT user_id FROM bridge_ghosts")
            .fetch_all(gateway.node.context.store.reader())
            .await
            .unwrap();
        rows.into_iter().map(|(user,)| user).collect::<Vec<_>>()
    };
    let alice = world.matrix_user("alice");
    let mut view = world.matrix_join(&gateway, matrix, &alice).await.unwrap();
    world.lm_join(lm, "bob").await.unwrap();
    so("all members everywhere", || gateway.in_step(&portal)).await;
    world.refresh(&gateway, &mut view).await;

    let named: Vec<_> = ["x", "y"].iter().map(|letter| world.matrix_user(&long(letter))).collect();
    let body = format!("https://matrix.to/#/@{}:h.example", long("z"));
    let content = json!({ "msgtype": "m.text", "body": body, "m.mentions": { "user_ids": named } });
    world.matrix_send(&gateway, &mut view, &alice, "m.room.message", None, content).await;
    world.matrix_say(&gateway, &mut view, &alice, "after").await;
    so("the message", || async { gateway.node.bodies(lm).await.iter().any(|(_, body)| body == "after") }).await;
    let mentioned = gateway.node.log(lm).await.into_iter().rev().nth(1).unwrap().event.json.clone();
    let mentioned = mentioned["content"]["m.mentions"]["user_ids"].as_array().unwrap().clone();
    assert_eq!(mentioned.len(), 2, "they are mentioned all the same");
    assert_eq!(kept().await, Vec::<String>::new());

    let carol = world.matrix_user(&long("c"));
    let mut view = world.matrix_join(&gateway, matrix, &carol).await.unwrap();
    so("she is in both rooms", || gateway.in_step(&portal)).await;
    assert_eq!(kept().await, [carol.to_string()]);
    world.matrix_say(&gateway, &mut view, &carol, "I am long").await;
    let said = || async { gateway.node.bodies(lm).await.into_iter().find(|(_, body)| body == "I am long") };
    so("what she says", || async { said().await.is_some() }).await;
    let ghost = ruma::UserId::parse(said().await.unwrap().0).unwrap();
    assert_eq!(gateway.bridge.user_behind(&ghost).await.unwrap(), Some(carol));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_portals_made_at_once_with_one_alias_one_is_refused_at_once() {
    both_databases(|url| async move {
        let (world, gateway) = World::new(json!({ "database": { "url": url } })).await;
        let tea = || NewPortal { alias: Some("tea".to_owned()), ..NewPortal::default() };
        let made = futures::future::join_all((0..4).map(|_| gateway.bridge.create_portal(tea()))).await;
        let (made, refused): (Vec<_>, Vec<_>) = made.into_iter().partition(Result::is_ok);
        assert_eq!((made.len(), refused.len()), (1, 3));
        for refusal in refused.into_iter().map(Result::unwrap_err) {
            assert_eq!((refusal.code(), refusal.status().as_u16()), ("alias_taken", 409), "{refusal}");
        }
        let [made] = &made[..] else { unreachable!() };
        let made = made.as_ref().unwrap();
        assert_eq!(gateway.bridge.portals(None, 10).await.unwrap().len(), 1, "nothing was made of the others");
        let found = gateway.bridge.resolve_alias("tea", isthmus::bridge::Cause::Admin).await.unwrap();
        assert_eq!(found.room_id, made.matrix_room_id);

        // An alias is free again when nothing came of its portal.
        let nowhere = ruma::room_id!("!nowhere:lm.example");
        let via = [super::world::LM.try_into().unwrap()];
        let admin = isthmus::bridge::Cause::Admin;
        gateway.bridge.portal_from_lm(nowhere, &via, Some("coffee"), admin).await.unwrap_err();
        gateway.bridge.create_portal(NewPortal { alias: Some("coffee".to_owned()), ..tea() }).await.unwrap();
        drop(world);
        gateway.node.context.store.close().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn portals_that_are_being_made_count() {
    both_databases(|url| async move {
        let settings = json!({ "database": { "url": url }, "access": { "max_portals": 2 } });
        let (world, gateway) = World::new(settings).await;
        let make = || gateway.bridge.create_portal(NewPortal::default());
        let made = futures::future::join_all((0..6).map(|_| make())).await;
        let (made, refused): (Vec<_>, Vec<_>) = made.into_iter().partition(Result::is_ok);
        assert_eq!((made.len(), refused.len()), (2, 4));
        for refusal in refused.into_iter().map(Result::unwrap_err) {
            assert!(refusal.code() == "policy" && refusal.to_string().contains("max_portals is 2"), "{refusal}");
        }
        // One that has ended makes room.
        let id = &made[0].as_ref().unwrap().portal_id;
        gateway.bridge.remove_portal(id, "enough").await.unwrap();
        so("the end", || async {
            gateway.bridge.portal(id).await.unwrap().unwrap().state == isthmus::bridge::PortalState::Ended
        })
        .await;
        make().await.unwrap();
        drop(world);
        gateway.node.context.store.close().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_51_hc_54_nobody_learns_more_of_a_user_than_that_the_gateway_has_met_them() {
    let (world, gateway) = World::new(json!({})).await;
    let portal = public(&gateway).await;
    let own: ruma::OwnedServerName = crate::dag::OWN.try_into().unwrap();
    let get = |path: &str, of: &str| {
        let (context, own) = (world.server.context.clone(), own.clone());
        let call = isthmus::federation::Call::get(format!("/_matrix/federation/v1/{path}{of}"));
        async move { context.client.call(&own, call, false).await }
    };
    let ask = |of: &str| get("query/profile?user_id=", of);
    let (alices, bobs) = (&*ghost(Side::Matrix, "alice"), &*ghost(Side::Lm, "bob"));
    // Their servers would say what they are called, and what devices they have.
    let (alice, bob) = (world.matrix_user("alice"), world.lm_user("bob"));
    for of in [alices, bobs, alice.as_str(), bob.as_str()] {
        for path in ["query/profile?user_id=", "user/devices/"] {
            let refused = get(path, of).await.unwrap_err();
            assert!(refused.to_string().starts_with("404"), "{path}{of}: {refused}");
        }
    }
    // Nor is anything said of rooms by the ways that need no membership at some servers, but what the directory says of public ones.
    let secret = gateway.bridge.create_portal(NewPortal::default()).await.unwrap();
    for portal in [&portal, &secret] {
        for room in [&portal.matrix_room_id, &portal.lm_room_id] {
            let refused = get(&format!("timestamp_to_event/{room}?ts=0&dir=f"), "").await.unwrap_err().to_string();
            assert!(refused.starts_with("404") && refused.contains("M_UNRECOGNIZED"), "{room}: {refused}");
        }
    }
    for room in [&portal.lm_room_id, &secret.matrix_room_id, &secret.lm_room_id] {
        let refused = get(&format!("hierarchy/{room}?suggested_only=false"), "").await.unwrap_err().to_string();
        assert!(refused.starts_with("404") && refused.contains("M_NOT_FOUND"), "{room}: {refused}");
    }
    let told = get(&format!("hierarchy/{}", portal.matrix_room_id), "").await.unwrap();
    assert_eq!((&told["room"]["name"], &told["children"]), (&json!("Tea"), &json!([])));
    world.matrix_join(&gateway, &portal.matrix_room_id, &world.matrix_user("alice")).await.unwrap();
    world.lm_join(&portal.lm_room_id, "bob").await.unwrap();
    so("all members everywhere", || gateway.in_step(&portal)).await;
    assert_eq!(ask(alices).await.unwrap()["displayname"], "ALICE");
    assert_eq!(ask(bobs).await.unwrap()["displayname"], "BOB");
    assert_eq!(get("user/devices/", bobs).await.unwrap()["devices"], json!([]));
    for of in [alice, bob] {
        assert!(get("user/devices/", of.as_str()).await.is_err(), "{of} is not the gateway's");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn senders_are_told_why_something_did_not_cross_unless_that_is_off() {
    for (settings, expected) in [(json!({}), true), (json!({ "portals": { "notices": false } }), false)] {
        let (world, gateway) = World::new(settings).await;
        let portal = public(&gateway).await;
        let lm = &portal.lm_room_id;
        let bob = world.lm_user("bob");
        world.lm_join(lm, "bob").await.unwrap();
        so("all members everywhere", || gateway.in_step(&portal)).await;
        world.lm_send(lm, draft(&bob, "m.room.encrypted", None, json!({ "ciphertext": "x" }))).await;
        let told = || async {
            let bodies = gateway.node.bodies(lm).await;
            bodies.iter().any(|(by, body)| *by == gateway.bot() && body.contains("was not carried"))
        };
        so("the refusal", || async { !gateway.bridge.health(&portal.portal_id).await.unwrap().refusals.is_empty() })
            .await;
        match expected {
            true => so("the notice", told).await,
            // What is said later has come across: a notice would have been sent before.
            false => {
                world.lm_say(lm, "bob", "later").await;
                let later = (ghost(Side::Lm, "bob"), "later".to_owned());
                so("what came later", || async {
                    gateway.matrix_bodies(&portal.matrix_room_id).await.contains(&later)
                })
                .await;
                assert!(!told().await);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_names_an_event_of_another_portal_does_not_name_its_image() {
    let (world, gateway) = World::new(json!({})).await;
    let alice = world.matrix_user("alice");
    let new = || NewPortal { join_rule: Some("public".to_owned()), ..NewPortal::default() };
    let one = gateway.bridge.create_portal(new()).await.unwrap();
    let other = gateway.bridge.create_portal(new()).await.unwrap();
    let mut in_one = world.matrix_join(&gateway, &one.matrix_room_id, &alice).await.unwrap();
    let mut in_other = world.matrix_join(&gateway, &other.matrix_room_id, &alice).await.unwrap();
    let said = world.matrix_say(&gateway, &mut in_one, &alice, "in one").await;
    so("it crossed", || gateway.in_step(&one)).await;
    let image = gateway.bridge.explain(&said).await.unwrap().unwrap().across.unwrap();
    let reply =
        json!({ "msgtype": "m.text", "body": "reply", "m.relates_to": { "m.in_reply_to": { "event_id": said } } });
    world.matrix_send(&gateway, &mut in_other, &alice, "m.room.message", None, reply).await;
    let redaction = json!({ "redacts": said });
    let redaction = world.matrix_send(&gateway, &mut in_other, &alice, "m.room.redaction", None, redaction).await;
    so("all is done", || gateway.in_step(&other)).await;
    let log = gateway.node.log(&other.lm_room_id).await;
    let bodies = log.iter().filter_map(|event| event.event.content().get("body")?.as_str());
    assert!(bodies.into_iter().any(|body| body.contains("reply")));
    for event in log {
        assert!(!serde_json::to_string(&event.event.json).unwrap().contains(image.as_str()), "{:?}", event.event.json);
    }
    assert_eq!(gateway.bridge.explain(&redaction).await.unwrap().unwrap().status, "refused");
}
