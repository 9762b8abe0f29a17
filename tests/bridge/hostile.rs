//! Hostile and faulty input from the Matrix side, as it meets a portal; by the numbers of the list of cases where it has one.

use isthmus::bridge::{Cause, Explanation, PortalState};
use isthmus::event::{Object, RoomVersion};
use isthmus::federation::{Call, Client, ClientOptions};
use isthmus::identity::Side;
use isthmus::seam::Outgoing;
use ruma::{OwnedEventId, RoomId};
use serde_json::{Value, json};

use super::from_matrix::{Home, at_home, image, in_log, is_state, user, via};
use super::world::{Gateway, OTHER, World, draft, ghost, in_each_version, message, so, until};
use crate::dag::peer::{Peer, View};
use crate::dag::{NOW, OWN};

const NAME: &str = "m.room.name";
const LEVELS: &str = "m.room.power_levels";

/// What has become of an event that is not to cross.
async fn refused(gateway: &Gateway, event: &OwnedEventId) -> Explanation {
    until("the refusal", || async {
        gateway.bridge.explain(event).await.unwrap().filter(|found| found.status == "refused")
    })
    .await
}

/// The content of the room's power levels with one user's changed.
async fn levels_with(gateway: &Gateway, room: &RoomId, user: &str, level: i64) -> Value {
    let mut levels = Value::Object(gateway.matrix_state(room, LEVELS).await.unwrap());
    levels["users"][user] = json!(level);
    levels
}

/// How often the log has been repaired of something.
async fn repairs(gateway: &Gateway, room: &RoomId, kind: &str) -> usize {
    let log = gateway.node.log(room).await;
    let is_repair = |event: &&isthmus::lm::Appended| {
        event.event.kind == kind && event.event.content().contains_key("im.isthmus.repair")
    };
    log.iter().filter(is_repair).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_45_what_a_resolution_takes_back_without_an_event_is_taken_back_in_the_log() {
    in_each_version(async |world, gateway| {
        let (portal, mut view) = world.portal_of_two(&gateway).await;
        let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
        let alice = world.matrix_user("alice");
        let dave = world.matrix_user("dave");
        world.matrix_join(&gateway, matrix, &dave).await.unwrap();
        so("dave in both", || gateway.in_step(&portal)).await;
        for (user, level) in [(&alice, 50), (&dave, 100)] {
            gateway.bridge.set_power(&portal.portal_id, user, level).await.unwrap();
        }
        so("their power everywhere", || gateway.in_step(&portal)).await;
        world.refresh(&gateway, &mut view).await;
        let first = world.matrix_send(&gateway, &mut view, &dave, NAME, Some(""), json!({ "name": "first" })).await;
        let fork = view.clone();
        world.matrix_send(&gateway, &mut view, &alice, NAME, Some(""), json!({ "name": "second" })).await;
        let name = async || gateway.node.state(lm, NAME, "").await.and_then(|content| content.get("name").cloned());
        so("the second name in the log", || async { name().await == Some(json!("second")) }).await;

        // Dave took alice's power away before that, and nobody heard of it until now. No event says that the name is the first again.
        let mut fork = fork;
        let demoted = levels_with(&gateway, matrix, alice.as_str(), 0).await;
        world.matrix_send(&gateway, &mut fork, &dave, LEVELS, Some(""), demoted).await;
        assert_eq!(gateway.matrix_state(matrix, NAME).await.unwrap()["name"], "first");
        so("the first name in the log again", || async { name().await == Some(json!("first")) }).await;
        assert!(repairs(&gateway, lm, NAME).await >= 1);
        so("both states in step", || gateway.in_step(&portal)).await;
        // It said everything that it was given, and took nothing of that back.
        let log = gateway.node.log(lm).await;
        let names = log.iter().filter(|event| event.event.kind == NAME);
        let names: Vec<_> = names.map(|event| event.event.content()["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["first", "second", "first"]);
        let last = log.iter().rfind(|event| event.event.kind == NAME).unwrap();
        is_explained(&gateway, &last.event.event_id, Some(&first)).await;
    })
    .await;
}

/// Dave closed the room before alice came in, and invited her since; nobody heard of either until now.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_45_a_join_that_a_resolution_takes_back_is_taken_back_in_the_log() {
    in_each_version(async |world, gateway| {
        let portal = gateway.public_portal().await;
        let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
        let (alice, dave) = (world.matrix_user("alice"), world.matrix_user("dave"));
        let mut view = world.matrix_join(&gateway, matrix, &dave).await.unwrap();
        so("dave in both", || gateway.in_step(&portal)).await;
        gateway.bridge.set_power(&portal.portal_id, &dave, 90).await.unwrap();
        so("his power everywhere", || gateway.in_step(&portal)).await;
        world.refresh(&gateway, &mut view).await;
        world.matrix_join(&gateway, matrix, &alice).await.unwrap();
        in_log(&gateway, lm, &ghost(Side::Matrix, "alice"), "join").await;
        so("alice in both", || gateway.in_step(&portal)).await;

        let rule = json!({ "join_rule": "invite" });
        let (_, closes) = view.add(&world.peer, &dave, "m.room.join_rules", Some(""), rule);
        let invite = json!({ "membership": "invite" });
        let mut invites = view.next(&dave, "m.room.member", Some(alice.as_str()), invite);
        // Later than her join.
        invites["origin_server_ts"] = json!(NOW + 3_600_000);
        let (invite, invites) = world.peer.sign(view.version, invites);
        for received in world.peer.put(&gateway.dag, &[&closes, &invites]).await {
            received.result.unwrap();
        }
        assert_eq!(gateway.matrix_member(matrix, alice.as_str()).await.unwrap()["membership"], "invite");
        so("the ghost to be out again", || async {
            gateway.node.membership(lm, &ghost(Side::Matrix, "alice")).await != "join"
        })
        .await;
        so("both states in step", || gateway.in_step(&portal)).await;
        assert_eq!(gateway.node.state(lm, "m.room.join_rules", "").await.unwrap()["join_rule"], "invite");
        let state = gateway.node.lm.state(lm).await.unwrap();
        let out = state.get("m.room.member", &ghost(Side::Matrix, "alice")).unwrap();
        is_explained(&gateway, &out.event_id, Some(&invite)).await;
    })
    .await;
}

/// A repair says that it is one, and from which event of the room across it follows.
async fn is_explained(gateway: &Gateway, repair: &OwnedEventId, of: Option<&OwnedEventId>) {
    let found = gateway.bridge.explain(repair).await.unwrap().unwrap();
    assert!(matches!(found.status, "repair" | "image"), "{found:?}");
    assert_eq!(found.across.as_ref(), of, "{found:?}");
    let note = found.note.unwrap_or_default();
    assert!(note.contains("sent by the gateway") && of.is_none_or(|of| note.contains(of.as_str())), "{note}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_49_nobody_redacts_by_the_domain_that_all_ghosts_share() {
    in_each_version(async |world, gateway| {
        let (portal, mut view) = world.portal_of_two(&gateway).await;
        let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
        world.lm_join(lm, "carol").await.unwrap();
        let (alice, mallory) = (world.matrix_user("alice"), world.matrix_user("mallory"));
        world.matrix_join(&gateway, matrix, &mallory).await.unwrap();
        so("all members everywhere", || gateway.in_step(&portal)).await;
        world.refresh(&gateway, &mut view).await;

        // On LM: bob redacts what carol said. On Matrix both are ghosts of one server, to which that server's word would do.
        world.lm_say(lm, "carol", "carol's own").await;
        let carols = (ghost(Side::Lm, "carol"), "carol's own".to_owned());
        so("carol is heard", || async { gateway.matrix_bodies(matrix).await.contains(&carols) }).await;
        let log = gateway.node.log(lm).await;
        let said = log.iter().find(|event| event.event.content().get("body") == Some(&json!("carol's own"))).unwrap();
        let redaction = json!({ "redacts": said.event.event_id });
        world.lm_send(lm, draft(&world.lm_user("bob"), "m.room.redaction", None, redaction)).await;
        let redaction = until("bob's redaction", || async {
            let log = gateway.node.log(lm).await;
            log.into_iter()
                .find(|event| event.event.kind == "m.room.redaction")
                .map(|event| event.event.event_id.clone())
        })
        .await;
        let why = refused(&gateway, &redaction).await.refusal.unwrap();
        assert_eq!(why.code, "forbidden", "{why:?}");

        // On Matrix: mallory redacts what alice said, as their server may. In the log both are ghosts.
        world.refresh(&gateway, &mut view).await;
        let said = world.matrix_say(&gateway, &mut view, &alice, "alice's own").await;
        until("its image", || async { gateway.bridge.explain(&said).await.unwrap()?.across }).await;
        let mut event = view.next(&mallory, "m.room.redaction", None, json!({ "redacts": said }));
        event["redacts"] = json!(said);
        let (redaction, event) = world.peer.sign(view.version, event);
        view.note(redaction.clone(), &event);
        world.peer.put(&gateway.dag, &[&event]).await.remove(0).result.unwrap();
        let why = refused(&gateway, &redaction).await.refusal.unwrap();
        assert_eq!(why.code, "forbidden", "{why:?}");

        world.last_words(&gateway, &portal, &mut view).await;
        assert!(gateway.matrix_bodies(matrix).await.contains(&carols));
        let ghosts = |sender: &str| sender.ends_with(&format!(":{OWN}"));
        let graph = gateway.matrix_events(matrix).await;
        let redacts = |event: &Object| event["type"] == "m.room.redaction" && ghosts(event["sender"].as_str().unwrap());
        assert!(!graph.iter().any(|(_, event)| redacts(event)));
        let log = gateway.node.log(lm).await;
        let by_ghosts = |event: &isthmus::lm::Appended| {
            event.event.kind == "m.room.redaction" && ghosts(event.event.sender.as_str())
        };
        assert!(!log.iter().any(by_ghosts));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_52_what_an_allowed_server_relays_of_a_denied_one_does_not_cross() {
    let (world, gateway) = World::new(json!({})).await;
    let (portal, mut view) = world.portal_of_two(&gateway).await;
    let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
    let other = world.other_server().await;
    let mut denied = Peer::start(OTHER).await;
    denied.key = other.context.signing_key.clone();
    let (alice, mallory) = (world.matrix_user("alice"), denied.user("mallory"));
    World::matrix_join_from(&denied, &gateway, matrix, &mallory).await.unwrap();
    gateway.bridge.set_power(&portal.portal_id, &alice, 100).await.unwrap();
    so("both states in step", || gateway.in_step(&portal)).await;
    world.refresh(&gateway, &mut view).await;
    let acl = json!({ "allow": ["*"], "deny": [OTHER] });
    world.matrix_send(&gateway, &mut view, &alice, "m.room.server_acl", Some(""), acl).await;

    let (said, event) = view.clone().say(&denied, &mallory, "by the back door");
    let by_itself = denied.put(&gateway.dag, &[&event]).await.remove(0).result.unwrap_err();
    assert_eq!(by_itself.code(), "server_acl", "{by_itself}");
    // Of the graph it is a part then, as it is everywhere.
    world.peer.put(&gateway.dag, &[&event]).await.remove(0).result.unwrap();
    assert!(gateway.dag.event(&said).await.unwrap().is_some());
    let why = refused(&gateway, &said).await.refusal.unwrap();
    assert_eq!(why.code, "server_acl", "{why:?}");
    world.refresh(&gateway, &mut view).await;
    world.last_words(&gateway, &portal, &mut view).await;
    let log = gateway.node.bodies(lm).await;
    assert!(!log.iter().any(|(_, body)| body == "by the back door"), "{log:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_61_hc_62_a_transaction_that_comes_twice_and_after_a_crash_crosses_once_but_for_its_poison() {
    let (world, gateway) = World::new(json!({})).await;
    let (portal, mut view) = world.portal_of_two(&gateway).await;
    let (portal_id, lm) = (portal.portal_id.clone(), portal.lm_room_id.clone());
    world.refresh(&gateway, &mut view).await;
    let alice = world.matrix_user("alice");
    let said: Vec<_> = (0..49).map(|number| view.say(&world.peer, &alice, &number.to_string())).collect();
    let mut pdus: Vec<Value> = said.iter().map(|(_, event)| json!(event)).collect();
    let (poison, mut event) = view.clone().say(&world.peer, &alice, "poison");
    event["signatures"][world.peer.name.as_str()][world.peer.key.id()] = json!("A".repeat(86));
    pdus.insert(37, json!(event));
    let options = ClientOptions { allow_private_networks: true, resolve: world.resolve(), ..Default::default() };
    let client = Client::new(world.peer.name.clone(), world.peer.key.clone(), options).unwrap();
    let own = ruma::OwnedServerName::try_from(OWN).unwrap();
    let put = || {
        let body = json!({ "origin": world.peer.name, "origin_server_ts": NOW, "pdus": pdus });
        let call = Call::put("/_matrix/federation/v1/send/again".to_owned(), body.as_object().unwrap().clone());
        client.call(&own, call, false)
    };
    let (one, two) = tokio::join!(put(), put());
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_eq!(one["pdus"], two["pdus"]);
    let answers = one["pdus"].as_object().unwrap();
    let errors: Vec<_> = answers.iter().filter(|(_, answer)| answer.get("error").is_some()).map(|(id, _)| id).collect();
    assert_eq!(errors, [poison.as_str()], "{one:?}");
    // The homeserver never got the answer, and sends it again to whoever comes up.
    let gateway = world.kill(gateway).await;
    assert_eq!(put().await.unwrap()["pdus"], one["pdus"]);
    let expected: Vec<String> = (0..49).map(|number| number.to_string()).collect();
    let bodies = async || {
        let bodies = gateway.node.bodies(&lm).await;
        bodies
            .into_iter()
            .filter(|(by, _)| *by == ghost(Side::Matrix, "alice"))
            .map(|(_, body)| body)
            .collect::<Vec<_>>()
    };
    so("all of it in the log", || async { bodies().await.len() >= expected.len() }).await;
    let portal = gateway.bridge.portal(&portal_id).await.unwrap().unwrap();
    so("nothing waits", || gateway.in_step(&portal)).await;
    assert_eq!(bodies().await, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_63_a_bot_that_is_sent_out_while_much_waits_comes_back_to_a_room_that_goes_on() {
    let settings = json!({ "access": { "admins": [user("alice")] }, "budgets": { "events_per_second": 1 } });
    let (world, gateway) = World::new(settings).await;
    let home = Home::start(&world).await;
    let room = home.public(RoomVersion::V12).await;
    let portal = gateway.bridge.portal_from_matrix(&room, &via(), None, Cause::Admin).await.unwrap();
    let lm = &portal.lm_room_id;
    world.lm_join(lm, "bob").await.unwrap();
    at_home(&home, &room, &ghost(Side::Lm, "bob"), "join").await;
    let moderator = world.matrix_user("mod");
    let mut view = world.matrix_join(&home.0, &room, &moderator).await.unwrap();
    home.empower(&room, &[(moderator.as_str(), 100)]).await;
    in_log(&gateway, lm, &ghost(Side::Matrix, "mod"), "join").await;
    so("both states in step", || gateway.in_step(&portal)).await;
    world.stop_clock();
    for number in 0..100 {
        home.say(&room, "alice", &number.to_string()).await;
    }
    let hundredth = home.say(&room, "alice", "100").await;
    so("all of it here", || async { gateway.dag.event(&hundredth).await.unwrap().is_some() }).await;
    so("the budget to hold some back", || async {
        let waiting = gateway.bridge.health(&portal.portal_id).await.unwrap().waiting[0].count;
        waiting > 0 && gateway.node.bodies(lm).await.len() > 40
    })
    .await;
    // By somebody of another server, whose budget is not spent.
    world.refresh(&gateway, &mut view).await;
    let leave = json!({ "membership": "leave" });
    let (_, kick) = view.add(&world.peer, &moderator, "m.room.member", Some(gateway.bot().as_str()), leave);
    for dag in [&gateway.dag, &home.0.dag] {
        world.peer.put(dag, &[&kick]).await.remove(0).result.unwrap();
    }
    so("the portal to be suspended", || is_state(&gateway, &portal, PortalState::Suspended)).await;
    home.invite(&room, gateway.bot().as_str()).await.unwrap();
    so("the portal to be active", || is_state(&gateway, &portal, PortalState::Active)).await;
    world.advance(120_000);
    home.say(&room, "alice", "on we go").await;
    let last = (image("alice"), "on we go".to_owned());
    so("alice in the log", || async {
        world.advance(1_000);
        gateway.node.bodies(lm).await.contains(&last)
    })
    .await;
    world.lm_say(lm, "bob", "hello").await;
    so("bob at home", || async {
        home.0.matrix_bodies(&room).await.contains(&(ghost(Side::Lm, "bob"), "hello".to_owned()))
    })
    .await;
    so("both states in step", || gateway.in_step(&portal)).await;
    // Of what was said before the portal was suspended there is what had crossed, in its order, each once.
    let said: Vec<i64> = gateway.node.bodies(lm).await.iter().filter_map(|(_, body)| body.parse().ok()).collect();
    assert!(said.is_sorted_by(|one, other| one < other), "{said:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_64_hc_65_what_cannot_be_read_is_said_and_no_ghost_has_keys_to_run_out_of() {
    let (world, gateway) = World::new(json!({})).await;
    let (portal, mut view) = world.portal_of_two(&gateway).await;
    world.refresh(&gateway, &mut view).await;
    let alice = world.matrix_user("alice");
    let sealed = json!({ "algorithm": "m.megolm.v1.aes-sha2", "ciphertext": "x", "session_id": "s", "device_id": "D" });
    let sealed = world.matrix_send(&gateway, &mut view, &alice, "m.room.encrypted", None, sealed).await;
    refused(&gateway, &sealed).await;
    so("the notice in the Matrix room", || async {
        let said = gateway.matrix_bodies(&portal.matrix_room_id).await;
        said.iter().any(|(by, body)| *by == gateway.bot() && body.contains("not carried"))
    })
    .await;
    let options = ClientOptions { allow_private_networks: true, resolve: world.resolve(), ..Default::default() };
    let client = Client::new(world.peer.name.clone(), world.peer.key.clone(), options).unwrap();
    let own = ruma::OwnedServerName::try_from(OWN).unwrap();
    let bobs = ghost(Side::Lm, "bob");
    for _ in 0..2 {
        for (path, asked) in [("claim", json!({ "D": "signed_curve25519" })), ("query", json!([]))] {
            let body =
                json!({ if path == "claim" { "one_time_keys" } else { "device_keys" }: { bobs.as_str(): asked } });
            let uri = format!("/_matrix/federation/v1/user/keys/{path}");
            let answer = client.call(&own, Call::post(uri, body.as_object().unwrap().clone()), false).await.unwrap();
            let text = serde_json::to_string(&answer).unwrap();
            assert!(!text.contains("signed_curve25519") && !text.contains("\"algorithms\""), "{path}: {text}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_66_the_redaction_of_a_redaction_goes_round_no_circle() {
    in_each_version(async |world, gateway| {
        let (portal, mut view) = world.portal_of_two(&gateway).await;
        let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
        world.refresh(&gateway, &mut view).await;
        let alice = world.matrix_user("alice");
        let crossed = async |id: &OwnedEventId| {
            until("an image", || async { gateway.bridge.explain(id).await.unwrap()?.across }).await
        };
        let mut target = world.matrix_say(&gateway, &mut view, &alice, "once").await;
        crossed(&target).await;
        let mut all = vec![target.clone()];
        for _ in 0..3 {
            let mut event = view.next(&alice, "m.room.redaction", None, json!({ "redacts": target }));
            event["redacts"] = json!(target);
            let (id, event) = world.peer.sign(view.version, event);
            view.note(id.clone(), &event);
            world.peer.put(&gateway.dag, &[&event]).await.remove(0).result.unwrap();
            if all.len() == 1 {
                crossed(&id).await;
            }
            target = id;
            all.push(target.clone());
        }
        // One that redacts itself cannot be made; one that redacts its own image can.
        let across = crossed(&all[1]).await;
        let mut event = view.next(&alice, "m.room.redaction", None, json!({ "redacts": across }));
        event["redacts"] = json!(across);
        let (id, event) = world.peer.sign(view.version, event);
        view.note(id, &event);
        world.peer.put(&gateway.dag, &[&event]).await.remove(0).result.unwrap();
        world.last_words(&gateway, &portal, &mut view).await;
        so("both states in step", || gateway.in_step(&portal)).await;
        let graph = gateway.matrix_events(matrix).await;
        let by_ghosts = graph.iter().filter(|(_, event)| {
            event["type"] == "m.room.redaction" && event["sender"].as_str().unwrap().ends_with(&format!(":{OWN}"))
        });
        assert_eq!(by_ghosts.count(), 0);
        let log = gateway.node.log(lm).await;
        let redactions: Vec<_> = log.iter().filter(|event| event.event.kind == "m.room.redaction").collect();
        assert!((1..=4).contains(&redactions.len()), "{redactions:?}");
        assert!(redactions.iter().all(|event| event.event.sender.as_str() == ghost(Side::Matrix, "alice")));
        assert!(!gateway.node.bodies(lm).await.iter().any(|(_, body)| body == "once"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_provenance_that_somebody_wrote_themselves_decides_nothing() {
    let (world, gateway) = World::new(json!({})).await;
    let (portal, mut view) = world.portal_of_two(&gateway).await;
    let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
    world.refresh(&gateway, &mut view).await;
    let (alice, bob) = (world.matrix_user("alice"), world.lm_user("bob"));
    let forged = |body: &str, room: &RoomId, sender: &str, event: &OwnedEventId| {
        let source = json!({ "room_id": room, "event_id": event, "sender": sender, "origin_server_ts": 1 });
        json!({ "msgtype": "m.text", "body": body, "im.isthmus.source": source, "im.isthmus.repair": true,
            "im.isthmus.other": { "im.isthmus.source": source } })
    };
    let before = gateway.node.log(lm).await.pop().unwrap().event.event_id.clone();
    // As if it were the image of what bob said, and so nothing to carry.
    let content = forged("alice's", lm, bob.as_str(), &before);
    let of_alice = world.matrix_send(&gateway, &mut view, &alice, "m.room.message", None, content).await;
    let tip = view.tips[0].clone();
    world.lm_send(lm, draft(&bob, "m.room.message", None, forged("bob's", matrix, alice.as_str(), &tip))).await;
    world.last_words(&gateway, &portal, &mut view).await;

    let log = gateway.node.log(lm).await;
    let find = |body: &str| {
        let mut found = log.iter().filter(|event| event.event.content().get("body") == Some(&json!(body)));
        let first = found.next().unwrap().event.clone();
        assert!(found.next().is_none(), "{body} is there twice");
        first
    };
    let image = find("alice's");
    assert_eq!(image.sender.as_str(), ghost(Side::Matrix, "alice"));
    let source = &image.content()["im.isthmus.source"];
    assert_eq!((&source["event_id"], &source["sender"]), (&json!(of_alice), &json!(alice)));
    assert!(!image.content().contains_key("im.isthmus.repair") && !image.content().contains_key("im.isthmus.other"));
    let of_bob = find("bob's").event_id.clone();
    let across = gateway.bridge.explain(&of_bob).await.unwrap().unwrap().across.unwrap();
    let across = gateway.dag.event(&across).await.unwrap().unwrap();
    assert_eq!(across.sender.as_str(), ghost(Side::Lm, "bob"));
    let source = &across.content["im.isthmus.source"];
    assert_eq!((&source["event_id"], &source["sender"]), (&json!(of_bob), &json!(bob)));
    assert!(!across.content.contains_key("im.isthmus.repair"));
    assert_eq!(gateway.bridge.explain(&of_alice).await.unwrap().unwrap().status, "crossed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_join_that_names_the_gateway_as_its_voucher_is_none() {
    in_each_version(async |world, gateway| {
        let (portal, mut view) = world.portal_of_two(&gateway).await;
        let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
        let (alice, mallory) = (world.matrix_user("alice"), world.matrix_user("mallory"));
        gateway.bridge.set_power(&portal.portal_id, &alice, 100).await.unwrap();
        so("alice's power everywhere", || gateway.in_step(&portal)).await;
        world.refresh(&gateway, &mut view).await;
        let rule = json!({ "join_rule": "restricted", "allow": [{ "type": "m.room_membership", "room_id": "!s:x" }] });
        world.matrix_send(&gateway, &mut view, &alice, "m.room.join_rules", Some(""), rule).await;
        world.matrix_join(&gateway, matrix, &mallory).await.map(drop).unwrap_err();
        for voucher in [gateway.bot().to_string(), ghost(Side::Lm, "bob")] {
            let content = json!({ "membership": "join", "join_authorised_via_users_server": voucher });
            let next = view.next(&mallory, "m.room.member", Some(mallory.as_str()), content.clone());
            let (id, event) = world.peer.sign(view.version, next);
            let refused = world.peer.put(&gateway.dag, &[&event]).await.remove(0).result.unwrap_err();
            assert_eq!(refused.code(), "bad_signature", "{refused}");
            let refused = gateway.dag.send_join(&world.peer.name, matrix, &id, event.clone(), false).await.unwrap_err();
            assert!(["forbidden", "bad_signature"].contains(&refused.code()), "{refused}");
            // Signed in the gateway's name, but not by it.
            let mut event = event;
            let own = event["signatures"][world.peer.name.as_str()].clone();
            event["signatures"][OWN] = own;
            let refused = world.peer.put(&gateway.dag, &[&event]).await.remove(0).result.unwrap_err();
            assert!(["bad_signature", "keys_unavailable"].contains(&refused.code()), "{refused}");
            assert!(gateway.dag.event(&id).await.unwrap().is_none());
        }
        world.last_words(&gateway, &portal, &mut view).await;
        assert!(gateway.matrix_member(matrix, mallory.as_str()).await.is_none());
        assert_eq!(gateway.node.membership(lm, &ghost(Side::Matrix, "mallory")).await, "leave");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_dated_in_the_future_are_of_now_across() {
    let (world, gateway) = World::new(json!({})).await;
    let (portal, mut view) = world.portal_of_two(&gateway).await;
    let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
    world.refresh(&gateway, &mut view).await;
    world.stop_clock();
    let (alice, bob) = (world.matrix_user("alice"), world.lm_user("bob"));
    let now = gateway.node.context.clock.now_ms();
    // As far as the homeserver's key is valid, and beyond.
    let dated = |view: &View, ts: i64, body: &str| {
        let mut event = view.next(&alice, "m.room.message", None, json!({ "msgtype": "m.text", "body": body }));
        event["origin_server_ts"] = json!(ts);
        world.peer.sign(view.version, event)
    };
    let (id, event) = dated(&view, now + 3_600_000, "in an hour");
    world.peer.put(&gateway.dag, &[&event]).await.remove(0).result.unwrap();
    view.note(id, &event);
    for ts in [now + 365 * 86_400_000, (1 << 53) - 1] {
        let (id, event) = dated(&view, ts, "in a year");
        let refused = world.peer.put(&gateway.dag, &[&event]).await.remove(0).result.unwrap_err();
        assert!(gateway.dag.event(&id).await.unwrap().is_none(), "{refused}");
    }
    let mut later = message(&bob, "this evening");
    later.origin_server_ts = now + 6 * 3_600_000;
    world.lm_send_unjudged(lm, later).await;
    world.last_words(&gateway, &portal, &mut view).await;
    let log = gateway.node.log(lm).await;
    let ts = |event: &Object| event["origin_server_ts"].as_i64().unwrap();
    let own = format!(":{OWN}");
    let mut seen = 0;
    for event in log.iter().filter(|event| event.event.sender.as_str().ends_with(&own)) {
        assert!(ts(&event.event.json) <= now, "{:?}", event.event.json);
        seen += usize::from(event.event.content().get("body") == Some(&json!("in an hour")));
    }
    for (_, event) in gateway.matrix_events(matrix).await {
        if event["sender"].as_str().unwrap().ends_with(&own) {
            assert!(ts(&event) <= now, "{event:?}");
            seen += usize::from(event["content"].get("body") == Some(&json!("this evening")));
        }
    }
    assert_eq!(seen, 2, "both are there");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_flood_of_new_users_of_one_server_few_come_across_and_other_servers_users_all() {
    let (world, gateway) = World::new(json!({ "budgets": { "ghosts_per_hour": 5 } })).await;
    let home = Home::start(&world).await;
    let room = home.public(RoomVersion::V11).await;
    let portal = gateway.bridge.portal_from_matrix(&room, &via(), None, Cause::Admin).await.unwrap();
    let lm = &portal.lm_room_id;
    let mut view = None;
    for number in 0..20 {
        let user = world.matrix_user(&format!("flood{number}"));
        view = Some(world.matrix_join(&home.0, &room, &user).await.unwrap());
    }
    let last = world.matrix_user("flood19");
    world.matrix_say(&home.0, &mut view.unwrap(), &last, "spam").await;
    home.join(&room, "dave").await;
    home.say(&room, "dave", "excuse me").await;
    let said = (image("dave"), "excuse me".to_owned());
    so("dave is heard", || async { gateway.node.bodies(lm).await.contains(&said) }).await;
    let flooders = async || {
        let state = gateway.node.lm.state(lm).await.unwrap();
        state.of_kind("m.room.member").filter(|(user, _)| user.starts_with("@mx_flood")).count()
    };
    so("the last of the flood in the graph", || async { gateway.matrix_member(&room, last.as_str()).await.is_some() })
        .await;
    assert!((1..=6).contains(&flooders().await), "{}", flooders().await);
    assert!(!gateway.node.bodies(lm).await.iter().any(|(_, body)| body == "spam"));
    assert!(is_state(&gateway, &portal, PortalState::Active).await);
    in_log(&gateway, lm, &image("dave"), "join").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repair_that_somebody_always_undoes_is_given_up_for_a_while_and_says_so() {
    let (world, gateway) = World::new(json!({})).await;
    let (portal, mut view) = world.portal_of_two(&gateway).await;
    let lm = &portal.lm_room_id;
    let alice = world.matrix_user("alice");
    gateway.bridge.set_power(&portal.portal_id, &alice, 50).await.unwrap();
    so("alice's power everywhere", || gateway.in_step(&portal)).await;
    world.refresh(&gateway, &mut view).await;
    world.matrix_send(&gateway, &mut view, &alice, NAME, Some(""), json!({ "name": "Tea" })).await;
    let name = async || gateway.node.state(lm, NAME, "").await.and_then(|content| content.get("name").cloned());
    so("the name in the log", || async { name().await == Some(json!("Tea")) }).await;
    so("both states in step", || gateway.in_step(&portal)).await;
    world.stop_clock();
    // By events of which the bridge hears nothing, as another program with this gateway's name might say them.
    let undo = async |number: usize| {
        let name = draft(&gateway.bot(), NAME, Some(""), json!({ "name": format!("Coffee {number}") }));
        gateway.node.lm.send(lm, vec![Outgoing { draft: name, effect: None }]).await.pop().unwrap().unwrap();
    };
    for number in 0..3 {
        undo(number).await;
        so("the repair", || async {
            gateway.bridge.repair(&portal.portal_id).await.unwrap();
            name().await == Some(json!("Tea"))
        })
        .await;
    }
    undo(3).await;
    so("the portal to be degraded", || async {
        gateway.bridge.repair(&portal.portal_id).await.unwrap();
        is_state(&gateway, &portal, PortalState::Degraded).await
    })
    .await;
    let reason = gateway.bridge.portal(&portal.portal_id).await.unwrap().unwrap().reason.clone().unwrap();
    assert!(reason.contains(NAME) && reason.contains("3 times in a minute"), "{reason}");
    assert_eq!((repairs(&gateway, lm, NAME).await, name().await), (3, Some(json!("Coffee 3"))));
    // What is said still crosses, and in a minute it is tried again.
    world.last_words(&gateway, &portal, &mut view).await;
    assert_eq!(repairs(&gateway, lm, NAME).await, 3);
    world.advance(61_000);
    so("the name again", || async {
        gateway.bridge.repair(&portal.portal_id).await.unwrap();
        name().await == Some(json!("Tea")) && is_state(&gateway, &portal, PortalState::Active).await
    })
    .await;
    so("both states in step", || gateway.in_step(&portal)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_43_creators_of_a_room_of_version_12_have_their_power_in_the_log_and_no_levels_take_it() {
    let (world, gateway) = World::new(json!({})).await;
    let home = Home::start(&world).await;
    let create = draft(&user("alice"), "m.room.create", Some(""), json!({ "additional_creators": [user("dave")] }));
    let room = home.room(RoomVersion::V12, json!({ "join_rule": "public" }), vec![create]).await;
    home.join(&room, "dave").await;
    let portal = gateway.bridge.portal_from_matrix(&room, &via(), None, Cause::Admin).await.unwrap();
    let lm = &portal.lm_room_id;
    let level = async |user: &str| {
        let levels = gateway.node.state(lm, LEVELS, "").await.unwrap();
        levels["users"].get(image(user)).cloned().unwrap_or_default()
    };
    let highest = json!((1_i64 << 53) - 2);
    assert_eq!((level("alice").await, level("dave").await), (highest.clone(), highest.clone()));
    // Creators stand in no levels; whatever is written there is against the rules, and their power stays.
    let mut content = Value::Object(home.0.matrix_state(&room, LEVELS).await.unwrap());
    for bad in [user("alice"), user("dave")] {
        let mut levels = content.clone();
        levels["users"][bad.as_str()] = json!(0);
        home.try_send(&room, draft(&user("alice"), LEVELS, Some(""), levels)).await.unwrap_err();
    }
    content["users"][user("carol").as_str()] = json!((1_i64 << 53) - 1);
    home.send(&room, "alice", LEVELS, Some(""), content).await;
    home.join(&room, "carol").await;
    in_log(&gateway, lm, &image("carol"), "join").await;
    so("both states in step", || gateway.in_step(&portal)).await;
    assert_eq!((level("alice").await, level("dave").await), (highest.clone(), highest));
    assert_eq!(level("carol").await, json!((1_i64 << 53) - 3), "nobody else is as high");
}
