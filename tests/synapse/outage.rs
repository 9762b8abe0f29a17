//! A homeserver or a hub that is down for a while gets everything when it is back, once and in order; others do not wait.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use isthmus::event::Pdu;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::support::provider::NewRoom;
use crate::support::testbed::process::free_port;
use crate::support::testbed::{gateway, synapse};
use crate::support::world::{BINARY, provider, run, server, world};

#[test]
fn a_synapse_that_was_down_catches_up_and_others_do_not_wait_for_it() {
    run(async {
        let world = world().await;
        let (bob, lm_room) = world.lm_room("night");
        let plan = synapse::Plan::new(&world.directory.join("c")).unwrap();
        let mut c = plan.start(world.authority, None).await.unwrap();
        let alice = world.user(world.a, "alice-night", "Alice").await;
        let dave = world.user(&c, "dave-night", "Dave").await;
        let room = alice.join(&world.alias("night", &world.a.server_name), &[]).await.unwrap();
        dave.join(&world.alias("night", &world.gateway.server_name), &[]).await.unwrap();
        world.hub.send_text(&bob, &lm_room, "all here").unwrap();
        dave.wait_for_text(&room, "all here").await.unwrap();

        c.stop();
        for number in 0..60 {
            world.hub.send_text(&bob, &lm_room, &format!("night {number}")).unwrap();
        }
        alice.wait_for_text(&room, "night 59").await.unwrap();
        c.start().await.unwrap();
        dave.wait_for_text(&room, "night 59").await.unwrap();
        let history = dave.history(&room).await.unwrap();
        let bodies: Vec<&str> = history.iter().filter_map(|event| event["content"]["body"].as_str()).collect();
        let said: Vec<String> = (0..60).map(|number| format!("night {number}")).collect();
        assert_eq!(bodies, [vec!["all here".to_owned()], said].concat());
    });
}

#[test]
fn a_hub_that_was_down_catches_up() {
    run(async {
        let world = world().await;
        let phoenix = world.start_phoenix().await;
        let bob = phoenix.user("bob").unwrap();
        let new = NewRoom { alias: Some("ashes".to_owned()), ..NewRoom::default() };
        let lm_room = phoenix.create_room(&bob, new).unwrap();
        let alice = world.user(world.a, "alice-ashes", "Alice").await;
        let room = alice.join(&format!("#lm_ashes_phoenix.example:{}", world.a.server_name), &[]).await.unwrap();
        alice.send_text(&room, "before").await.unwrap();
        phoenix.wait_for_text(&lm_room, "before").await.unwrap();

        phoenix.stop().await;
        for number in 0..60 {
            alice.send_text(&room, &format!("while it is down {number}")).await.unwrap();
        }
        let phoenix = world.start_phoenix().await;
        phoenix.wait_for_text(&lm_room, "while it is down 59").await.unwrap();
        let log = phoenix.log(&lm_room);
        let bodies: Vec<&str> = log.iter().filter_map(|event| event.content().get("body")?.as_str()).collect();
        let said: Vec<String> = (0..60).map(|number| format!("while it is down {number}")).collect();
        assert_eq!(bodies, [vec!["before".to_owned()], said].concat());
        phoenix.send_text(&bob, &lm_room, "risen").unwrap();
        let risen = alice.wait_for_text(&room, "risen").await.unwrap();
        assert_eq!(risen["sender"], world.image_of(&bob).as_str());
        let is_refused = |event: &Value| event["content"]["msgtype"] == "m.notice";
        assert_eq!(alice.history(&room).await.unwrap().iter().filter(|event| is_refused(event)).count(), 0);
    });
}

/// Synapse tries an appservice that fails again after 2, 4, 8, 16 … seconds; a ping makes it try at once.
#[test]
fn a_gateway_that_was_down_gets_what_waits_as_soon_as_it_starts() {
    run(async {
        let world = world().await;
        let mut plan =
            gateway::Plan::new(&world.directory.join("sleeper"), Path::new(BINARY), world.authority).unwrap();
        let own = synapse::Plan::new(&world.directory.join("d")).unwrap();
        let registration = plan.register_with(&own).unwrap();
        let own = own.start(world.authority, Some(&registration)).await.unwrap();
        let mut sleeper = plan.start().await.unwrap();
        let alice = world.user(&own, "alice-sleeper", "Alice").await;
        let bot = format!("@_isthmus:{}", own.server_name);
        let chat = serde_json::json!({ "preset": "private_chat", "invite": [bot], "is_direct": true });
        let room = alice.create_room(chat).await.unwrap();
        let says = |event: &Value| event["sender"] == bot.as_str() && event["type"] == "m.room.message";
        alice.wait_for(&room, "the greeting", says).await.unwrap();

        sleeper.kill().unwrap();
        let address = sleeper.plan().admin_url.strip_prefix("http://").unwrap().to_owned();
        let silence = TcpListener::bind(&address).await.unwrap();
        alice.send_text(&room, "!help").await.unwrap();
        // The next try is 16 seconds after the fourth.
        for _ in 0..4 {
            drop(silence.accept().await.unwrap());
        }
        drop(silence);
        sleeper.start().await.unwrap();
        let answer = tokio::time::timeout(Duration::from_secs(8), alice.wait_for_many(&room, 2, says)).await;
        answer.expect("the gateway did not ping when it started").unwrap();
    });
}

/// A Synapse that is restarted forgets what it had to send, and sends the newest event of each room alone.
#[test]
fn a_gateway_that_was_down_gets_all_of_a_synapse_that_was_restarted_meanwhile() {
    run(async {
        let world = world().await;
        let mut plan = gateway::Plan::new(&world.directory.join("wide"), Path::new(BINARY), world.authority).unwrap();
        let port = free_port().unwrap();
        plan.resolve("wide.example", &format!("http://127.0.0.1:{port}"));
        let resolve = BTreeMap::from([(server(&plan.server_name), plan.url.parse().unwrap())]);
        let provider = provider("wide.example", port, &world.authority.file, &resolve, None).await;
        let mut gateway = plan.start().await.unwrap();
        let own = synapse::Plan::new(&world.directory.join("e")).unwrap();
        let mut own = own.start(world.authority, None).await.unwrap();
        let made = json!({ "kind": "create", "alias": "wide", "join_rule": "public" });
        gateway.admin(Method::POST, "/portals", Some(made)).await.unwrap();
        let alias = format!("#wide:{}", gateway.server_name);
        let bob = provider.user("bob").unwrap();
        let lm_room = provider.join(&bob, &alias, &[]).await.unwrap();
        let carol = world.user(&own, "carol-wide", "Carol").await;
        let room = carol.join(&alias, &[]).await.unwrap();
        carol.send_text(&room, "before").await.unwrap();
        provider.wait_for_text(&lm_room, "before").await.unwrap();

        gateway.kill().unwrap();
        for number in 0..300 {
            carol.send_text(&room, &format!("away {number}")).await.unwrap();
        }
        own.stop();
        own.start().await.unwrap();
        gateway.start().await.unwrap();
        provider.send_text(&bob, &lm_room, "back").unwrap();
        carol.wait_for_text(&room, "back").await.unwrap();
        carol.send_text(&room, "after").await.unwrap();
        provider.wait_for_text(&lm_room, "after").await.unwrap();
        let says = |event: &Pdu| event.kind == "m.room.message" && event.sender != bob;
        let log = provider.log(&lm_room);
        let bodies: Vec<&str> =
            log.iter().filter(|event| says(event)).filter_map(|event| event.content().get("body")?.as_str()).collect();
        let away = (0..300).map(|number| format!("away {number}"));
        let said: Vec<String> = ["before".to_owned()].into_iter().chain(away).chain(["after".to_owned()]).collect();
        assert_eq!(bodies, said);
        assert_eq!(gateway.health().await.unwrap()["graph_missing"]["waiting"], 0);
    });
}
