//! The bot in Element: what users of a Synapse and the gateway's admins ask it in a direct chat, and what the room directory shows.

use std::time::Duration;

use reqwest::Method;
use ruma::OwnedRoomId;
use serde_json::{Value, json};

use crate::support::testbed::client::{Client, segment, string};
use crate::support::world::{World, on_both};

/// A direct chat with the bot.
struct Chat<'a> {
    client: &'a Client,
    bot: String,
    room: String,
    answers: usize,
}

impl<'a> Chat<'a> {
    async fn begin(world: &World, client: &'a Client) -> Self {
        let bot = format!("@_isthmus:{}", world.a.server_name);
        let body = json!({ "invite": [bot], "is_direct": true, "preset": "trusted_private_chat" });
        let room = client.create_room(body).await.unwrap();
        let mut chat = Self { client, bot, room, answers: 0 };
        assert!(chat.answer().await.starts_with("I am the bot of a gateway"));
        chat
    }

    async fn ask(&mut self, body: &str) -> String {
        self.client.send_text(&self.room, body).await.unwrap();
        self.answer().await
    }

    async fn answer(&mut self) -> String {
        self.answers += 1;
        let is_answer = |event: &Value| event["sender"] == self.bot && event["type"] == "m.room.message";
        let all = self.client.wait_for_many(&self.room, self.answers, is_answer).await.unwrap();
        let last = all.last().unwrap();
        assert_eq!(last["content"]["msgtype"], "m.notice");
        last["content"]["body"].as_str().unwrap().to_owned()
    }
}

/// The admin, of whom there is one for all tests.
async fn boss(world: &World) -> Client {
    let name = format!("boss{}", world.name(""));
    match world.a.register(&name, "secret").await {
        Ok(client) => client,
        Err(_) => Client::login(&world.a.client_url, &name, "secret").await.unwrap(),
    }
}

#[test]
fn a_user_joins_by_the_bot_and_an_admin_ends_the_bridge_by_it() {
    on_both(async |world| {
        let (bob, lm_room) = world.lm_room("office");
        let alice = world.user(world.a, "alice-office", "Alice").await;
        let mut chat = Chat::begin(world, &alice).await;
        assert!(chat.ask("what can you do?").await.contains("join #NAME:SERVER"));
        let nowhere = chat.ask("join #nowhere-at-all:hub.example").await;
        assert!(nowhere.starts_with("That did not work: "), "{nowhere}");

        let answer = chat.ask(&format!("join #{}:hub.example", world.name("office"))).await;
        assert_eq!(answer, format!("You are invited into {}.", world.alias("office", &world.a.server_name)));
        let room = alice.wait_for_invite().await.unwrap();
        alice.join(&room, &[]).await.unwrap();
        world.hub.wait_for_member(&lm_room, &world.ghost_of(&alice.user_id), "join").await.unwrap();
        let said = alice.send_text(&room, "good morning").await.unwrap();
        world.hub.wait_for_text(&lm_room, "good morning").await.unwrap();
        world.hub.send_text(&bob, &lm_room, "and to you").unwrap();
        alice.wait_for_text(&room, "and to you").await.unwrap();

        let explained = chat.ask(&format!("explain {said}")).await;
        assert!(explained.starts_with("It crossed: $"), "{explained}");
        assert!(chat.ask("list").await.contains("The office (3 members)"));
        assert_eq!(chat.ask("status").await, "This is for the gateway's admins alone.");
        is_in_the_directory(world, &alice, &room).await;

        let boss = boss(world).await;
        let mut office = Chat::begin(world, &boss).await;
        assert!(office.ask("status").await.starts_with(&world.gateway.server_name));
        let list = office.ask("list").await;
        let line = list.lines().find(|line| line.contains(&room)).unwrap_or_else(|| panic!("{room} is not in {list}"));
        let portal = line.split(' ').next().unwrap();
        let shown = office.ask(&format!("show {portal}")).await;
        assert!(shown.contains("LM hub: hub.example") && shown.contains("members: 1 of Matrix, 1 of LM"), "{shown}");
        assert_eq!(office.ask(&format!("unbridge {portal}")).await, format!("{portal} has ended."));
        let ended = alice.wait_for(&room, "the goodbye", |event| {
            event["content"]["body"].as_str().is_some_and(|body| body.starts_with("Goodbye") && body.contains("boss"))
        });
        ended.await.unwrap();
    });
}

#[test]
fn an_admin_exposes_a_room_of_the_synapse_by_the_bot() {
    on_both(async |world| {
        let boss = boss(world).await;
        let bot = format!("@_isthmus:{}", world.a.server_name);
        let room = boss.create_room(json!({ "preset": "private_chat", "name": "The terrace" })).await.unwrap();
        boss.invite(&room, &bot).await.unwrap();
        boss.wait_for_member(&room, &bot, "join").await.unwrap();
        boss.send_text(&room, "hello everybody").await.unwrap();
        boss.send_text(&room, "!expose").await.unwrap();
        let is_answer = |event: &Value| {
            let body = event["content"]["body"].as_str().unwrap_or_default();
            event["sender"] == bot && body.starts_with("This room is connected with the LM room !")
        };
        let answer = boss.wait_for(&room, "the answer", is_answer).await.unwrap();
        boss.wait_for_member(&room, &bot, "leave").await.unwrap();
        let lm_room =
            answer["content"]["body"].as_str().unwrap().split(' ').find(|word| word.starts_with('!')).unwrap();

        let eve = world.spoke.user(&world.name("eve-terrace")).unwrap();
        boss.invite(&room, &world.image_of(&eve)).await.unwrap();
        world.spoke.wait_for_invite(&eve).await.unwrap();
        let via = [crate::support::world::server(&world.gateway.server_name)];
        world.spoke.join(&eve, lm_room, &via).await.unwrap();
        boss.send_text(&room, "a fine view").await.unwrap();
        let lm_room: OwnedRoomId = lm_room.try_into().unwrap();
        world.spoke.wait_for_text(&lm_room, "a fine view").await.unwrap();
    });
}

#[test]
fn an_admin_invites_by_the_bot_and_ends_the_bridge_in_the_room_itself() {
    on_both(async |world| {
        let boss = boss(world).await;
        let mut chat = Chat::begin(world, &boss).await;
        let made = json!({ "kind": "create", "name": "The vault", "join_rule": "invite" });
        let made = world.gateway.admin(Method::POST, "/portals", Some(made)).await.unwrap();
        let [portal, room, lm_room] =
            ["portal_id", "matrix_room_id", "lm_room_id"].map(|key| string(&made, key).unwrap());
        let lm_room: OwnedRoomId = lm_room.try_into().unwrap();
        // A user of either side, on their own server.
        let eve = world.spoke.user(&world.name("eve-vault")).unwrap();
        assert_eq!(chat.ask(&format!("invite {portal} {eve}")).await, format!("{eve} is invited."));
        world.spoke.wait_for_invite(&eve).await.unwrap();
        let alice = world.user(world.a, "alice-vault", "Alice").await;
        let answer = chat.ask(&format!("invite {portal} {}", alice.user_id)).await;
        assert_eq!(answer, format!("{} is invited.", alice.user_id));
        assert_eq!(alice.wait_for_invite().await.unwrap(), room);
        assert!(chat.ask("invite p0 @x:y").await.starts_with("That did not work: "));
        assert_eq!(chat.ask(&format!("invite {portal}")).await, "It is said so: invite PORTAL @USER:SERVER");

        alice.join(&room, &[&world.gateway.server_name]).await.unwrap();
        let via = [crate::support::world::server(&world.gateway.server_name)];
        world.spoke.join(&eve, lm_room.as_str(), &via).await.unwrap();
        chat.ask(&format!("invite {portal} {}", boss.user_id)).await;
        boss.join(&room, &[&world.gateway.server_name]).await.unwrap();
        // Said in a room that is not bridged it names none; in the room itself it ends that one.
        assert_eq!(chat.ask("!unbridge").await, "This room is not bridged: name the portal, as `list` shows it.");
        let bot = format!("@_isthmus:{}", world.a.server_name);
        boss.invite(&room, &bot).await.unwrap();
        boss.wait_for_member(&room, &bot, "join").await.unwrap();
        alice.send_text(&room, "!unbridge").await.unwrap();
        boss.send_text(&room, "!unbridge").await.unwrap();
        let ended = boss.wait_for(&room, "the answer", |event| {
            event["sender"] == bot && event["content"]["body"] == format!("{portal} has ended.")
        });
        ended.await.unwrap();
        let goodbye = alice.wait_for(&room, "the goodbye", |event| {
            event["content"]["body"].as_str().is_some_and(|body| body.starts_with("Goodbye") && body.contains("boss"))
        });
        goodbye.await.unwrap();
    });
}

#[test]
fn a_client_finds_lm_rooms_and_users_by_third_party_look_ups() {
    on_both(async |world| {
        let (bob, _) = world.lm_room("pantry");
        let alice = world.user(world.a, "alice-pantry", "Alice").await;
        let here = world.alias("pantry", &world.a.server_name);
        let there = format!("#{}:hub.example", world.name("pantry"));
        let ask = async |path: &str, key: &str, value: &str| {
            let path = format!("/_matrix/client/v3/thirdparty/{path}?{key}={}", segment(value));
            alice.call(Method::GET, &path, None).await.unwrap()
        };
        let place = json!([{ "alias": here, "protocol": "linearized", "fields": { "alias": there } }]);
        assert_eq!(ask("location/linearized", "alias", &there).await, place);
        // The room that is found so can be joined.
        let room = alice.join(&here, &[]).await.unwrap();
        let image = world.image_of(&bob);
        alice.wait_for_member(&room, &image, "join").await.unwrap();
        let person = json!([{ "userid": image, "protocol": "linearized", "fields": { "user_id": bob } }]);
        assert_eq!(ask("user/linearized", "user_id", bob.as_str()).await, person);
        assert_eq!(ask("user/linearized", "user_id", "no user").await, json!([]));
    });
}

#[test]
fn who_says_what_cannot_cross_is_told_in_the_room_and_not_again_at_once() {
    on_both(async |world| {
        let (bob, lm_room) = world.lm_room("scullery");
        let alice = world.user(world.a, "alice-scullery", "Alice").await;
        let room = alice.join(&world.alias("scullery", &world.a.server_name), &[]).await.unwrap();
        let bot = format!("@isthmus:{}", world.gateway.server_name);
        // In a room made by the gateway the bot has a name.
        let member = alice.wait_for_member(&room, &bot, "join").await.unwrap();
        assert_eq!(member["content"]["displayname"], "isthmus");
        let sealed = json!({ "algorithm": "m.megolm.v1.aes-sha2", "ciphertext": "x" });
        let said = alice.send(&room, "m.room.encrypted", sealed.clone()).await.unwrap();
        let is_notice = |event: &Value| {
            event["sender"] == bot
                && event["content"]["msgtype"] == "m.notice"
                && event["content"]["body"].as_str().is_some_and(|body| body.contains("was not carried"))
        };
        let notice = alice.wait_for(&room, "the notice", is_notice).await.unwrap();
        assert!(notice["content"]["body"].as_str().unwrap().contains(&alice.user_id), "{notice}");
        let mut chat = Chat::begin(world, &alice).await;
        assert!(chat.ask(&format!("explain {said}")).await.starts_with("It did not cross"));
        // The same again so soon is not worth telling; what comes after it crosses.
        alice.send(&room, "m.room.encrypted", sealed).await.unwrap();
        alice.send_text(&room, "in the clear").await.unwrap();
        world.hub.wait_for_text(&lm_room, "in the clear").await.unwrap();
        world.hub.send_text(&bob, &lm_room, "I see").unwrap();
        alice.wait_for_text(&room, "I see").await.unwrap();
        let told = alice.history(&room).await.unwrap().into_iter().filter(|event| is_notice(event)).count();
        assert_eq!(told, 1);
    });
}

/// Under the hub's own name, as Element asks for it.
async fn is_in_the_directory(world: &World, client: &Client, room: &str) {
    let protocols = client.call(Method::GET, "/_matrix/client/v3/thirdparty/protocols", None).await.unwrap();
    let instances = protocols["linearized"]["instances"].as_array().unwrap();
    let hub = instances.iter().find(|instance| instance["network_id"] == "hub.example");
    let instance = string(hub.unwrap_or_else(|| panic!("{protocols}")), "instance_id").unwrap();
    let body = json!({ "third_party_instance_id": instance });
    // The Synapse counts who is in a room in the background.
    for _ in 0..60 {
        let page = client.call(Method::POST, "/_matrix/client/v3/publicRooms", Some(body.clone())).await.unwrap();
        if page["chunk"].as_array().unwrap().iter().any(|listed| listed["room_id"] == room) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    panic!("{room} is not in the directory of {}", world.a.server_name);
}
