//! Encrypted rooms, and what is said at all: what INV-8 promises as long as nothing is decrypted.

use std::io::Write;
use std::sync::{Arc, Mutex};

use isthmus::bridge::Cause;
use isthmus::clock::{Clock as _, SystemClock};
use serde_json::{Value, json};
use tracing_subscriber::fmt::MakeWriter;

use super::world::{LM, OTHER, World, draft, so};
use crate::dag::NOW;
use crate::support::provider::{NewRoom, Options, Provider};

/// Nobody says this but for these tests.
const SECRET: &str = "the cat sleeps at noon";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_8_an_lm_room_that_is_encrypted_gets_no_portal() {
    let access = json!({ "create_by_invite": [format!("*:{OTHER}")] });
    let (mut world, gateway) = World::new(json!({ "access": access })).await;
    // The provider lives in the present.
    world.advance(SystemClock.now_ms() - NOW);
    let options = Options {
        server_name: OTHER.try_into().unwrap(),
        listen: world.give_up_other(),
        ca: None,
        resolve: world.resolve(),
        journal: None,
        eigen: false,
    };
    let hub = Provider::start(options).await.unwrap();
    let carol = hub.user("carol").unwrap();
    let encryption = json!({ "algorithm": "m.mls.v1.dhkemx25519-aes128gcm-sha256-ed25519" });
    let new = NewRoom { alias: Some("dark".to_owned()), encryption: Some(encryption), ..NewRoom::default() };
    let room = hub.create_room(&carol, new).unwrap();
    hub.send(&carol, &room, "m.room.encrypted", None, json!({ "ciphertext": SECRET })).unwrap();

    let via = [OTHER.try_into().unwrap()];
    let by_admin = gateway.bridge.portal_from_lm(&room, &via, None, Cause::Admin).await.map(drop);
    let by_alias = gateway.bridge.resolve_alias(&format!("lm_dark_{OTHER}"), Cause::Appservice).await.map(drop);
    for refused in [by_admin, by_alias] {
        let refusal = refused.unwrap_err();
        assert_eq!(refusal.code(), "encryption", "{refusal}");
        assert!(refusal.to_string().contains("m.mls.v1"), "{refusal}");
    }
    // By an invite of the bot it is no other.
    assert!(hub.invite(&carol, &room, &gateway.bot()).await.is_err());
    assert!(gateway.bridge.portals(None, 10).await.unwrap().is_empty());
    for table in ["dag_rooms", "bridge_inbox", "bridge_images"] {
        let count = format!("SELECT COUNT(*) FROM {table}");
        let count: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(count))
            .fetch_one(gateway.node.context.store.reader())
            .await
            .unwrap();
        assert_eq!(count, 0, "{table}");
    }
    // The same room in the clear has one.
    let open = hub.create_room(&carol, NewRoom::default()).unwrap();
    gateway.bridge.portal_from_lm(&open, &via, None, Cause::Admin).await.unwrap();
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_8_what_is_encrypted_does_not_cross_and_no_user_turns_encryption_on() {
    let (world, gateway) = World::new(json!({})).await;
    let (portal, mut view) = world.portal_of_two(&gateway).await;
    let (matrix, lm) = (&portal.matrix_room_id, &portal.lm_room_id);
    let (alice, bob) = (world.matrix_user("alice"), &world.lm_user("bob"));
    // As much power as users can have.
    for user in [&alice, bob] {
        gateway.bridge.set_power(&portal.portal_id, user, 100).await.unwrap();
    }
    so("their power everywhere", || gateway.in_step(&portal)).await;
    world.refresh(&gateway, &mut view).await;

    let sealed = json!({ "algorithm": "m.megolm.v1.aes-sha2", "ciphertext": SECRET });
    let from_alice = world.matrix_send(&gateway, &mut view, &alice, "m.room.encrypted", None, sealed.clone()).await;
    world.lm_send(lm, draft(bob, "m.room.encrypted", None, sealed.clone())).await;
    world.lm_send(lm, draft(bob, "m.mls.commit", None, sealed)).await;
    let mut forked = view.clone();
    let on = json!({ "algorithm": "m.megolm.v1.aes-sha2" });
    let (_, event) = forked.add(&world.peer, &alice, "m.room.encryption", Some(""), on.clone());
    let refused = world.peer.put(&gateway.dag, &[&event]).await.remove(0).result.unwrap_err();
    assert_eq!(refused.code(), "matrix_rule", "{refused}");
    world.lm_send(lm, draft(bob, "m.room.encryption", Some(""), on)).await;

    world.last_words(&gateway, &portal, &mut view).await;
    let ours = format!(":{}", crate::dag::OWN);
    let sealed =
        |sender: &str, kind: &str| sender.ends_with(&ours) && (kind.contains("encrypt") || kind.contains("mls"));
    for event in world.server.log(lm).await {
        assert!(!sealed(event.event.sender.as_str(), &event.event.kind), "{:?}", event.event.json);
    }
    for (_, event) in gateway.matrix_events(matrix).await {
        assert!(!sealed(event["sender"].as_str().unwrap(), event["type"].as_str().unwrap()), "{event:?}");
    }
    assert_eq!(gateway.bridge.explain(&from_alice).await.unwrap().unwrap().status, "refused");
    assert_eq!(gateway.matrix_state(matrix, "m.room.encryption").await, None);
}

/// Everything that is logged on this thread.
#[derive(Clone, Default)]
struct Logged(Arc<Mutex<Vec<u8>>>);

impl Write for Logged {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Logged {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// All on one thread, so that the one thread's log has it all.
#[tokio::test]
async fn inv_8_nothing_that_is_said_is_in_the_log() {
    let logged = Logged::default();
    let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_ansi(false);
    // With one dispatcher alone, a line that another test's thread, which has none, reaches first would be off for all.
    let _second = tracing::Dispatch::new(tracing_subscriber::fmt().with_writer(std::io::sink).finish());
    let _logging = tracing::subscriber::set_default(subscriber.with_writer(logged.clone()).finish());
    let (world, gateway) = World::new(json!({})).await;
    let (portal, mut view) = world.portal_of_two(&gateway).await;
    world.refresh(&gateway, &mut view).await;
    let (alice, bob) = (world.matrix_user("alice"), world.lm_user("bob"));
    let said: Vec<(&str, Value)> = vec![
        ("m.room.message", json!({ "msgtype": "m.text", "body": SECRET })),
        ("m.room.encrypted", json!({ "ciphertext": SECRET })),
        ("m.room.message", json!({ "body": [SECRET], "m.relates_to": SECRET })),
        ("m.room.message", json!({ "msgtype": "m.text", "body": SECRET.repeat(2_500) })),
    ];
    for (kind, content) in said {
        world.matrix_send(&gateway, &mut view, &alice, kind, None, content.clone()).await;
        world.lm_send(&portal.lm_room_id, draft(&bob, kind, None, content)).await;
    }
    // What is wrong is complained of, without its words.
    let (_, mut broken) = view.clone().say(&world.peer, &alice, "as it was signed");
    broken["content"]["body"] = json!(SECRET);
    broken["signatures"] = json!({});
    assert!(world.peer.put(&gateway.dag, &[&broken]).await.remove(0).result.is_err());
    world.last_words(&gateway, &portal, &mut view).await;

    let log = String::from_utf8(logged.0.lock().unwrap().clone()).unwrap();
    let own = |line: &&str| line.contains(" isthmus::");
    assert!(log.lines().filter(own).count() > 10, "this log would show it");
    assert!(log.contains(portal.matrix_room_id.as_str()) && log.contains(LM));
    if let Some(line) = log.lines().find(|line| line.contains(SECRET)) {
        panic!("{line}");
    }
}
