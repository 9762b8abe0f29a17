//! IDs and texts that no database, or not every one, can hold: nothing that a peer says stops what is said after it. On SQLite
//! and on PostgreSQL, whose TEXT refuses U+0000.

use std::sync::Arc;

use isthmus::bridge::Portal;
use isthmus::federation::{Call, RemoteError};
use isthmus::identity::Side;
use ruma::OwnedUserId;
use serde_json::{Value, json};

use super::world::{Gateway, LM, MATRIX, World, draft, ghost, object, so};
use crate::dag::OWN;
use crate::dag::databases::both_databases;
use crate::dag::peer::View;

/// No event ID: U+0000, as it is and as a link hides it, and a length that no index takes.
fn no_ids() -> Vec<String> {
    vec!["$\u{0}".to_owned(), "$a\u{0}b".to_owned(), "$\u{1}".to_owned(), "$a b".to_owned(), noise(4000)]
}

/// `$` and text that does not compress, so that it is as long in an index.
fn noise(length: usize) -> String {
    let mut state = 7_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        char::from(b'a' + u8::try_from((state >> 16) % 26).unwrap())
    };
    std::iter::once('$').chain((0..length).map(|_| next())).collect()
}

/// Message-like contents that name such IDs wherever the bridge looks for some.
fn contents() -> Vec<(&'static str, Value)> {
    let mut contents = Vec::new();
    let text = |body: &str| json!({ "msgtype": "m.text", "body": body });
    for id in no_ids() {
        let link = id.replace('\u{0}', "%00").replace('\u{1}', "%01").replace(' ', "%20");
        contents.push(("m.room.message", text(&format!("see https://matrix.to/#/!r:s/{link}"))));
        contents.push((
            "m.room.message",
            json!({ "body": "b", "m.relates_to": { "rel_type": "m.thread", "event_id": id } }),
        ));
        contents
            .push(("m.room.message", json!({ "body": "b", "m.relates_to": { "m.in_reply_to": { "event_id": id } } })));
        contents.push((
            "m.reaction",
            json!({ "m.relates_to": { "rel_type": "m.annotation", "event_id": id, "key": "x" } }),
        ));
        contents.push((
            "org.example.deep",
            json!({ "a": [{ "b": { "event_id": id, "user_id": format!("@\u{0}:{MATRIX}") } }] }),
        ));
        contents.push(("m.room.redaction", json!({ "redacts": id })));
    }
    // The note of what was left out, and the reason of a refusal.
    let unknown = json!({ "rel_type": "m.\u{0}thread", "event_id": "$unknown" });
    contents.push(("m.room.message", json!({ "body": "b", "m.relates_to": unknown })));
    contents.push(("m.sticker", json!({ "m.relates_to": unknown })));
    contents.push(("org.example.\u{0}nul", json!({ "\u{0}": "\u{0}" })));
    contents
        .push(("m.room.message", text("\u{0} \u{1} https://matrix.to/#/@\u{0}:a/%00 https://matrix.to/#/%40%00%3Aa")));
    contents
}

/// A portal of which users of the homeserver are members, and bob of the LM server, who may send state.
struct Scene<const N: usize> {
    world: World,
    gateway: Gateway,
    portal: Arc<Portal>,
    users: [OwnedUserId; N],
    /// The Matrix room, as the homeserver sees it.
    view: View,
}

async fn scene<const N: usize>(settings: Value, names: [&str; N]) -> Scene<N> {
    let (world, gateway) = World::new(settings).await;
    let portal = gateway.public_portal().await;
    let users = names.map(|name| world.matrix_user(name));
    let mut view = None;
    for user in &users {
        view = Some(world.matrix_join(&gateway, &portal.matrix_room_id, user).await.unwrap());
    }
    let mut view = view.expect("at least one user");
    world.lm_join(&portal.lm_room_id, "bob").await.unwrap();
    so("all members everywhere", || gateway.in_step(&portal)).await;
    gateway.bridge.set_power(&portal.portal_id, &world.lm_user("bob"), 50).await.unwrap();
    so("bob's power everywhere", || gateway.in_step(&portal)).await;
    world.refresh(&gateway, &mut view).await;
    Scene { world, gateway, portal, users, view }
}

impl<const N: usize> Scene<N> {
    /// The first user and bob say something, and each is heard on the other side.
    async fn last_words(&mut self) {
        let (matrix, lm) = (&self.portal.matrix_room_id, &self.portal.lm_room_id);
        self.world.matrix_say(&self.gateway, &mut self.view, &self.users[0], "last of alice").await;
        self.world.lm_say(lm, "bob", "last of bob").await;
        let alices = (ghost(Side::Matrix, "alice"), "last of alice".to_owned());
        let bobs = (ghost(Side::Lm, "bob"), "last of bob".to_owned());
        so("alice's last word in the log", || async { self.world.server.bodies(lm).await.contains(&alices) }).await;
        so("bob's last word in the graph", || async { self.gateway.matrix_bodies(matrix).await.contains(&bobs) }).await;
        so("both states in step", || self.gateway.in_step(&self.portal)).await;
        let refusals = self.gateway.bridge.health(&self.portal.portal_id).await.unwrap().refusals;
        assert!(refusals.iter().all(|refused| refused.code != "internal"), "{refusals:?}");
    }

    /// Sends from both sides: what alice and bob say.
    async fn send_both(&mut self, kind: &str, content: Value) {
        let alice = &self.users[0];
        self.world.matrix_send(&self.gateway, &mut self.view, alice, kind, None, content.clone()).await;
        let draft = draft(&self.world.lm_user("bob"), kind, None, content);
        self.world.lm_send_unjudged(&self.portal.lm_room_id, draft).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_19_no_id_and_no_text_stops_what_is_said_after_it() {
    both_databases(|url| async move {
        let mut scene = scene(json!({ "database": { "url": url } }), ["alice"]).await;
        for (kind, content) in contents() {
            scene.send_both(kind, content).await;
        }
        let (alice, bob, lm) = (scene.users[0].clone(), scene.world.lm_user("bob"), &scene.portal.lm_room_id);
        let name = json!({ "name": "\u{0}" });
        let member =
            json!({ "membership": "join", "displayname": "\u{0}bob", "avatar_url": "\u{0}", "reason": "\u{0}" });
        let world = &scene.world;
        world.lm_send_unjudged(lm, draft(&bob, "m.room.member", Some(bob.as_str()), member.clone())).await;
        world.lm_send_unjudged(lm, draft(&bob, "m.room.name", Some(""), name)).await;
        let (gateway, view) = (&scene.gateway, &mut scene.view);
        world.matrix_send(gateway, view, &alice, "m.room.member", Some(alice.as_str()), member).await;
        scene.last_words().await;
        scene.gateway.node.context.store.close().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_84_statements_in_fields_are_text() {
    const STATEMENTS: [&str; 5] = [
        "'); DROP TABLE lm_events; --",
        "'; DELETE FROM bridge_inbox; --",
        "\" OR \"\"=\"",
        "$1 ? :id @x {} %s %27",
        "\\'; UPDATE portals SET state = 'ended'; /*",
    ];
    both_databases(|url| async move {
        let mut scene = scene(json!({ "database": { "url": url } }), ["alice"]).await;
        let (alice, bob, lm) = (scene.users[0].clone(), scene.world.lm_user("bob"), scene.portal.lm_room_id.clone());
        let own: ruma::OwnedServerName = OWN.try_into().unwrap();
        for text in STATEMENTS {
            let mentions = json!({ "user_ids": [text] });
            let relates = json!({ "rel_type": text, "event_id": format!("${text}"), "key": text });
            let content = json!({ "msgtype": text, "body": text, "m.relates_to": relates, "m.mentions": mentions });
            scene.send_both("m.room.message", content.clone()).await;
            scene.send_both(text, json!({ text: text })).await;
            scene.send_both("m.room.redaction", json!({ "redacts": format!("${text}"), "reason": text })).await;
            let member = json!({ "membership": "join", "displayname": text, "avatar_url": text, "reason": text });
            let Scene { world, gateway, view, .. } = &mut scene;
            world.lm_send_unjudged(&lm, draft(&bob, "m.room.member", Some(bob.as_str()), member.clone())).await;
            world.lm_send_unjudged(&lm, draft(&bob, "org.example.state", Some(text), json!({ "x": text }))).await;
            world.lm_send_unjudged(&lm, draft(&bob, text, Some(text), json!({}))).await;
            world.matrix_send(gateway, view, &alice, "m.room.member", Some(alice.as_str()), member).await;

            // What is looked up by other servers, and the ID of a transaction.
            let client = &world.server.context.client;
            let encoded: String = text.bytes().map(|byte| format!("%{byte:02X}")).collect();
            for path in [
                format!("v1/query/directory?room_alias=%23{encoded}:{OWN}"),
                format!("v1/query/profile?user_id=%40{encoded}:{OWN}"),
                format!("v1/user/devices/%40{encoded}:{OWN}"),
                format!("v1/event/%24{encoded}"),
                format!("v1/state/%21{encoded}:{OWN}?event_id=%24{encoded}"),
                format!("v1/make_join/{lm}/%40{encoded}:{LM}?ver={encoded}"),
            ] {
                let answer = client.call(&own, Call::get(format!("/_matrix/federation/{path}")), false).await;
                let Err(RemoteError::Status { status, .. }) = answer else { panic!("{path}: {answer:?}") };
                assert!(status.is_client_error(), "{path}: {status}");
            }
            let call = Call::put(format!("/_matrix/federation/v2/send/{encoded}"), object(json!({ "pdus": [] })));
            client.call(&own, call, false).await.unwrap();
        }
        scene.last_words().await;
        // They crossed as what they are.
        let Scene { world, gateway, portal, .. } = &scene;
        for text in STATEMENTS {
            let said = |of| (ghost(of, if of == Side::Lm { "bob" } else { "alice" }), text.to_owned());
            let (log, graph) = (world.server.bodies(&lm).await, gateway.matrix_bodies(&portal.matrix_room_id).await);
            assert!(log.contains(&said(Side::Matrix)), "{text}: {log:?}");
            assert!(graph.contains(&said(Side::Lm)), "{text}: {graph:?}");
        }
        let member = gateway.node.state(&lm, "m.room.member", &ghost(Side::Matrix, "alice")).await.unwrap();
        assert_eq!(member["displayname"], STATEMENTS[4]);
        gateway.node.context.store.close().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_19_requests_for_what_is_no_event_id_are_the_askers_fault() {
    both_databases(|url| async move {
        let (world, gateway) = World::new(json!({ "database": { "url": url } })).await;
        let portal = gateway.public_portal().await;
        world.lm_join(&portal.lm_room_id, "bob").await.unwrap();
        let context = &world.server.context;
        let own: ruma::OwnedServerName = OWN.try_into().unwrap();
        let mut calls = Vec::new();
        let long = noise(4000);
        for id in ["%24%00", "%24a%01", "%24a%20b", "%24a%3Ab.example", long.as_str()] {
            calls.extend(["v1/event", "v2/event"].map(|path| Call::get(format!("/_matrix/federation/{path}/{id}"))));
            for room in [&portal.matrix_room_id, &portal.lm_room_id] {
                for path in [
                    format!("v1/event_auth/{room}/{id}"),
                    format!("v1/state/{room}?event_id={id}"),
                    format!("v1/state_ids/{room}?event_id={id}"),
                    format!("v1/backfill/{room}?limit=5&v={id}"),
                    format!("v2/backfill/{room}?limit=5&v={id}"),
                ] {
                    calls.push(Call::get(format!("/_matrix/federation/{path}")));
                }
                for path in ["v2/send_join", "v2/send_leave", "v1/send_knock", "v2/invite"] {
                    calls.push(Call::put(format!("/_matrix/federation/{path}/{room}/{id}"), object(json!({}))));
                }
            }
        }
        let missing = json!({ "earliest_events": ["$\u{0}"], "latest_events": [long], "limit": 5 });
        let path = format!("/_matrix/federation/v1/get_missing_events/{}", portal.matrix_room_id);
        calls.push(Call::post(path, object(missing)));
        for call in calls {
            let uri = call.uri.clone();
            let answer = context.client.call(&own, call, false).await;
            let Err(RemoteError::Status { status, .. }) = answer else { panic!("{uri}: {answer:?}") };
            assert!(status.is_client_error(), "{uri}: {status}");
        }
        gateway.node.context.store.close().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_71_an_event_that_always_fails_is_refused_and_holds_nobody_up_for_ever() {
    let Scene { world, gateway, portal, users: [alice, carol], mut view } = scene(json!({}), ["alice", "carol"]).await;
    let lm = &portal.lm_room_id;

    let broken = "INSERT INTO bridge_images (side, source_event_id, image_event_id, pending, portal, made_ts) \
                  VALUES ('matrix', '$broken', 'no event ID', 0, 0, 0)";
    let store = &gateway.node.context.store;
    store
        .write(move |tx| {
            Box::pin(async move {
                sqlx::query(broken).execute(tx).await?;
                Ok(())
            })
        })
        .await
        .unwrap();
    let reply = json!({ "msgtype": "m.text", "body": "b", "see": { "event_id": "$broken" } });
    let poison = world.matrix_send(&gateway, &mut view, &alice, "m.room.message", None, reply).await;
    world.matrix_say(&gateway, &mut view, &carol, "after it").await;
    let said = (ghost(Side::Matrix, "carol"), "after it".to_owned());
    so("what was said after it", || async {
        world.advance(1_000);
        world.server.bodies(lm).await.contains(&said)
    })
    .await;
    let mut refused = None;
    for round in 0..200 {
        // Each message is a reason to look again, so that only the clock of the test is waited for.
        world.advance(301_000);
        world.matrix_say(&gateway, &mut view, &carol, &format!("round {round}")).await;
        let said = (ghost(Side::Matrix, "carol"), format!("round {round}"));
        so("the round's message", || async { world.server.bodies(lm).await.contains(&said) }).await;
        let refusals = gateway.bridge.health(&portal.portal_id).await.unwrap().refusals;
        refused = refusals.into_iter().find(|refused| refused.event_id == poison);
        if refused.is_some() {
            break;
        }
    }
    let refused = refused.expect("it is refused in the end");
    assert_eq!(refused.code, "internal");
    // Her own later messages wait for it, to stay in their order, but not for ever.
    world.matrix_say(&gateway, &mut view, &alice, "and alice again").await;
    let said = (ghost(Side::Matrix, "alice"), "and alice again".to_owned());
    so("what its sender says later", || async { world.server.bodies(lm).await.contains(&said) }).await;
    assert!(refused.reason.contains("given up after 10 tries"), "{}", refused.reason);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_71_a_task_that_panics_starts_again_and_a_row_that_makes_it_panic_is_refused_in_the_end() {
    // Functions are told by their files, since not all frames name them in full.
    const DECIDE: &str = "bridge/worker/decide.rs";
    let Scene { world, gateway, portal, users: [alice, carol], mut view } = scene(json!({}), ["alice", "carol"]).await;
    let lm = &portal.lm_room_id;
    let heard = async |body: &str| {
        let said = (ghost(Side::Matrix, "carol"), body.to_owned());
        so("what carol says", || async { world.server.bodies(lm).await.contains(&said) }).await;
    };

    // The whole task: it starts again by itself.
    world.panic_inside("bridge/worker/mod.rs", Some(DECIDE));
    world.matrix_say(&gateway, &mut view, &carol, "after the panic").await;
    heard("after the panic").await;
    assert!(!world.will_panic());

    // One row, each time that it is its turn: the oldest row is decided on first. It has its turn only when the clock is moved,
    // however slow all this is.
    world.stop_clock();
    world.panic_inside(DECIDE, None);
    let poison = world.matrix_say(&gateway, &mut view, &alice, "poison").await;
    so("the first panic", || async { !world.will_panic() }).await;
    let mut tries = 1;
    let refused = loop {
        world.panic_inside(DECIDE, None);
        world.advance(301_000);
        world.matrix_say(&gateway, &mut view, &carol, &format!("round {tries}")).await;
        heard(&format!("round {tries}")).await;
        let refusals = gateway.bridge.health(&portal.portal_id).await.unwrap().refusals;
        if let Some(refused) = refusals.into_iter().find(|refused| refused.event_id == poison) {
            break refused;
        }
        tries += 1;
        assert!(tries < 50, "it is tried for ever");
    };
    assert_eq!(refused.code, "internal");
    assert!(refused.reason.contains("given up after 10 tries") && refused.reason.contains("panicked"), "{refused:?}");
    let poison = (ghost(Side::Matrix, "alice"), "poison".to_owned());
    assert!(!world.server.bodies(lm).await.contains(&poison));
}
