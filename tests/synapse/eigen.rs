//! A portal of a room whose hub has the manners of the LM server that others know: it knows no LPDU again, sends each event
//! once, many at a time and in any order, and loses what does not arrive.

use std::collections::BTreeMap;
use std::path::Path;

use isthmus::event::Pdu;
use isthmus::identity::Side;
use serde_json::Value;

use crate::support::provider::{NewRoom, Options, Provider};
use crate::support::testbed::gateway;
use crate::support::testbed::process::free_port;
use crate::support::world::{BINARY, ghost, run, server, world};

/// How many messages each says before, while, and after the gateway is away.
const MESSAGES: usize = 25;
/// How often it is killed when the hub has taken an event.
const KILLS: usize = 4;

#[test]
fn inv_5_a_hub_that_repeats_nothing_and_takes_everything_twice_loses_and_doubles_nothing() {
    run(async {
        let world = world().await;
        let mut plan = gateway::Plan::new(&world.directory.join("eigen"), Path::new(BINARY), world.authority).unwrap();
        let port = free_port().unwrap();
        plan.resolve("eigen.example", &format!("http://127.0.0.1:{port}"));
        plan.set("access", "create_by_alias", "anyone");
        let options = Options {
            server_name: server("eigen.example"),
            listen: ([127, 0, 0, 1], port).into(),
            ca: Some(world.authority.file.clone()),
            resolve: BTreeMap::from([(server(&plan.server_name), plan.url.parse().unwrap())]),
            journal: None,
            eigen: true,
        };
        let provider = Provider::start(options).await.unwrap();
        let mut gateway = plan.start().await.unwrap();
        let bob = provider.user("bob").unwrap();
        let lm_room = provider.create_room(&bob, NewRoom::default()).unwrap();
        let opaque = lm_room.as_str().split(':').next().unwrap();
        let carol = world.user(world.b, "carol-eigen", "Carol").await;
        // It has no aliases: the room's ID is in the one that the gateway gives.
        let room = carol.join(&format!("#lm_{opaque}_eigen.example:{}", gateway.server_name), &[]).await.unwrap();
        let image = ghost(&gateway.server_name, Side::Lm, bob.as_str());

        let mut said = 0;
        let mut both_talk = async || {
            for _ in 0..MESSAGES {
                carol.send_text(&room, &format!("carol {said}")).await.unwrap();
                provider.send_text(&bob, &lm_room, &format!("bob {said}")).unwrap();
                said += 1;
            }
        };
        both_talk().await;
        gateway.kill().unwrap();
        both_talk().await;
        gateway.start().await.unwrap();
        both_talk().await;
        // Just when the hub has taken an event, and before it answers.
        for kill in 0..KILLS {
            let body = format!("carol at kill {kill}");
            carol.send_text(&room, &body).await.unwrap();
            provider.wait_for_text(&lm_room, &body).await.unwrap();
            gateway.kill().unwrap();
            gateway.start().await.unwrap();
        }

        let theirs = ghost(&gateway.server_name, Side::Matrix, &carol.user_id);
        let from_carol = |event: &Pdu| event.kind == "m.room.message" && event.sender == theirs;
        let in_log = provider.wait_for_many(&lm_room, "Carol's messages", 3 * MESSAGES, from_carol).await.unwrap();
        let from_bob = |event: &Value| event["type"] == "m.room.message" && event["sender"] == image.as_str();
        carol.wait_for_many(&room, 3 * MESSAGES, from_bob).await.unwrap();
        // All has arrived; what is doubled would come before these.
        carol.send_text(&room, "carol ends").await.unwrap();
        provider.wait_for_text(&lm_room, "carol ends").await.unwrap();
        provider.send_text(&bob, &lm_room, "bob ends").unwrap();
        carol.wait_for_text(&room, "bob ends").await.unwrap();
        let history = carol.history(&room).await.unwrap();
        let in_history = history.iter().filter(|event| from_bob(event));
        let in_history: Vec<&str> = in_history.filter_map(|event| event["content"]["body"].as_str()).collect();
        let log = provider.log(&lm_room);
        let bodies = log.iter().filter(|event| from_carol(event)).filter_map(|event| event.content().get("body"));
        let expected = |who: &str| {
            let said = (0..3 * MESSAGES).map(|number| format!("{who} {number}"));
            let kills = (0..if who == "carol" { KILLS } else { 0 }).map(|kill| format!("carol at kill {kill}"));
            said.chain(kills).chain([format!("{who} ends")]).collect::<Vec<_>>()
        };
        assert!(in_log.len() >= 3 * MESSAGES);
        assert_eq!(bodies.filter_map(Value::as_str).collect::<Vec<_>>(), expected("carol"));
        assert_eq!(in_history, expected("bob"));

        // It knows no make_leave either: the last user leaves all the same.
        carol.leave(&room).await.unwrap();
        provider.wait_for_member(&lm_room, &theirs, "leave").await.unwrap();
        provider.stop().await;
    });
}
