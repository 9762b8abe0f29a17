//! The gateway dies by SIGKILL at random moments while many messages cross both ways: each arrives once, in order per sender
//! (INV-5, INV-6). It is a participant of the LM room, or its hub.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use isthmus::event::Pdu;
use isthmus::identity::Side;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::provider::NewRoom;
use crate::support::testbed::process::free_port;
use crate::support::testbed::{gateway, postgres};
use crate::support::world::{BINARY, ghost, provider, run, server, world};

#[test]
fn inv_5_each_message_arrives_once_and_in_order_although_the_gateway_is_killed_again_and_again() {
    run(storm("sqlite", 500, 8, None, Role::Participant));
}

#[test]
fn inv_5_the_same_with_postgresql() {
    run(async {
        let Some(postgres) = postgres::shared().unwrap() else { return };
        let url = postgres.create_database().await.unwrap();
        storm("postgres", 100, 3, Some(&url), Role::Participant).await;
        postgres.drop_database(&url).await.unwrap();
    });
}

#[test]
fn inv_5_the_same_with_the_gateway_as_hub() {
    run(storm("hub-sqlite", 500, 8, None, Role::Hub));
}

#[test]
fn inv_5_the_same_with_the_gateway_as_hub_and_postgresql() {
    run(async {
        let Some(postgres) = postgres::shared().unwrap() else { return };
        let url = postgres.create_database().await.unwrap();
        storm("hub-postgres", 100, 3, Some(&url), Role::Hub).await;
        postgres.drop_database(&url).await.unwrap();
    });
}

#[test]
fn inv_5_the_same_in_a_room_of_a_synapse() {
    run(storm("of-matrix", 200, 4, None, Role::HubOfMatrix));
}

/// What the gateway is in the LM room.
#[derive(PartialEq)]
enum Role {
    Hub,
    /// The same, of a Matrix room that lives elsewhere.
    HubOfMatrix,
    Participant,
}

/// A Matrix user and an LM user who send `messages` messages each, while the gateway between them is killed `kills` times.
async fn storm(name: &str, messages: usize, kills: usize, database: Option<&str>, role: Role) {
    let seed: u64 = std::env::var("ISTHMUS_TEST_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    eprintln!("ISTHMUS_TEST_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let world = world().await;
    let directory = world.directory.join(name);
    let mut plan = gateway::Plan::new(&directory, Path::new(BINARY), world.authority).unwrap();
    let port = free_port().unwrap();
    plan.resolve("mortal.example", &format!("http://127.0.0.1:{port}"));
    plan.set("access", "create_by_alias", "anyone");
    if let Some(url) = database {
        plan.set("database", "url", url);
    }
    let resolve = BTreeMap::from([(server(&plan.server_name), plan.url.parse().unwrap())]);
    let provider = provider("mortal.example", port, &world.authority.file, &resolve, None).await;
    let mut gateway = plan.start().await.unwrap();
    let bob = provider.user("bob").unwrap();
    let carol = world.user(world.b, &format!("carol-{name}"), "Carol").await;
    let (alias, lm_room) = if role == Role::Hub {
        let made = json!({ "kind": "create", "alias": "storm", "join_rule": "public" });
        gateway.admin(Method::POST, "/portals", Some(made)).await.unwrap();
        let alias = format!("#storm:{}", gateway.server_name);
        let lm_room = provider.join(&bob, &alias, &[]).await.unwrap();
        (alias, lm_room)
    } else if role == Role::HubOfMatrix {
        let room = carol.create_room(json!({ "preset": "public_chat" })).await.unwrap();
        let via = [&world.b.server_name];
        let made = json!({ "kind": "from_matrix", "matrix_room_id": room, "via": via, "alias": "storm" });
        gateway.admin(Method::POST, "/portals", Some(made)).await.unwrap();
        let alias = format!("#storm:{}", gateway.server_name);
        let lm_room = provider.join(&bob, &alias, &[]).await.unwrap();
        (room, lm_room)
    } else {
        let new = NewRoom { alias: Some("storm".to_owned()), ..NewRoom::default() };
        let lm_room = provider.create_room(&bob, new).unwrap();
        (format!("#lm_storm_mortal.example:{}", gateway.server_name), lm_room)
    };
    let room = carol.join(&alias, &[]).await.unwrap();

    let mut moments: Vec<usize> = (0..kills).map(|_| random.gen_range(0..messages)).collect();
    moments.sort_unstable();
    let (progress, mut reached) = tokio::sync::watch::channel(0);
    let talking = async {
        for number in 0..messages {
            carol.send_text(&room, &format!("carol {number}")).await.unwrap();
            provider.send_text(&bob, &lm_room, &format!("bob {number}")).unwrap();
            progress.send_replace(number);
        }
    };
    let killing = async {
        for moment in moments {
            reached.wait_for(|number| *number >= moment).await.unwrap();
            // Not something to wait for: it is to be any moment.
            tokio::time::sleep(Duration::from_millis(random.gen_range(0..200))).await;
            gateway.kill().unwrap();
            gateway.start().await.unwrap();
        }
    };
    tokio::join!(talking, killing);

    let theirs = ghost(&gateway.server_name, Side::Matrix, &carol.user_id);
    let from_carol = |event: &Pdu| event.kind == "m.room.message" && event.sender == theirs;
    let in_log = provider.wait_for_many(&lm_room, "Carol's messages", messages, from_carol).await.unwrap();
    let image = ghost(&gateway.server_name, Side::Lm, bob.as_str());
    let from_bob = |event: &Value| event["type"] == "m.room.message" && event["sender"] == image.as_str();
    carol.wait_for_many(&room, messages, from_bob).await.unwrap();
    // The history, not what the client saw: it has everything, also what was never sent to it.
    let history = carol.history(&room).await.unwrap();
    let in_history: Vec<&str> =
        history.iter().filter(|event| from_bob(event)).filter_map(|event| event["content"]["body"].as_str()).collect();
    let in_log: Vec<&str> =
        in_log.iter().filter_map(|event| event.content().get("body").and_then(Value::as_str)).collect();
    let said = |who: &str| (0..messages).map(|number| format!("{who} {number}")).collect::<Vec<_>>();
    assert_eq!(in_log, said("carol"));
    assert_eq!(in_history, said("bob"));
    assert_eq!(provider.complaints(&lm_room), [""; 0]);
}
