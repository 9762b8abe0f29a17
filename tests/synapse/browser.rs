//! A Matrix user in a real browser, with a web client as it is (Hydrogen), and users of LM in one room: each sees what the other
//! does, as a person would. What was seen is kept in `target/browser/`.

use isthmus::event::Pdu;
use ruma::OwnedUserId;
use serde_json::{Value, json};

use crate::support::browser::{Browser, message_with, quoted};
use crate::support::world::{run, world};

/// Whether what an event says ends like this.
fn ends_with(event: &Pdu, text: &str) -> bool {
    event.content().get("body").and_then(Value::as_str).is_some_and(|body| body.ends_with(text))
}

#[test]
fn a_web_client_joins_an_lm_room_by_its_alias_and_talks_replies_and_reacts() {
    run(async {
        let Some(mut browser) = Browser::start("talk").await.unwrap() else { return };
        let world = world().await;
        let (bob, lm_room) = world.lm_room("window");
        let carol = world.spoke.user(&world.name("carol-window")).unwrap();
        world.spoke.set_display_name(&carol, "Carol");
        world.spoke.join(&carol, lm_room.as_str(), std::slice::from_ref(world.hub.server_name())).await.unwrap();
        let alice = world.user(world.a, "alice-window", "Alice").await;
        let ghost = world.ghost_of(&alice.user_id);

        // She comes in by the alias, into a room with the LM room's name, and finds its users by their names.
        browser.log_in(&world.a.client_url, "alice-window", "secret").await.unwrap();
        browser.join(&world.alias("window", &world.a.server_name)).await.unwrap();
        browser.see(".RoomHeader:has-text('The window')").await.unwrap();
        world.hub.wait_for_member(&lm_room, &ghost, "join").await.unwrap();
        assert_eq!(world.hub.display_name(&lm_room, &ghost), "Alice");
        browser.see_members(&["Alice", "Bob", "Carol"]).await.unwrap();

        // What is said on LM is seen in the page, and what is written there is heard by both LM servers.
        let question = world.hub.send_text(&bob, &lm_room, "Is there tea?").unwrap();
        let from = |name: &str, text: &str| {
            format!("{}:has(.Timeline_messageSender:text-is({}))", message_with(text), quoted(name))
        };
        browser.see(&from("Bob", "Is there tea?")).await.unwrap();
        world.spoke.wait_for_text(&lm_room, "Is there tea?").await.unwrap();
        world.spoke.send_text(&carol, &lm_room, "And cake?").unwrap();
        browser.see(&from("Carol", "And cake?")).await.unwrap();
        browser.say("Good morning to you two").await.unwrap();
        let greeting = world.hub.wait_for_text(&lm_room, "Good morning to you two").await.unwrap();
        assert_eq!(greeting.sender, ghost);
        assert_eq!(world.spoke.wait_for_text(&lm_room, "Good morning to you two").await.unwrap().sender, ghost);

        // Her reply and her reaction are to what Bob has said, as his server knows it.
        browser.reply("Is there tea?", "There is, with milk").await.unwrap();
        for provider in [world.hub, world.spoke] {
            // The client says before it what it replies to, for those that show no replies.
            let reply = provider.wait_for(&lm_room, "the reply", |event| ends_with(event, "There is, with milk"));
            let reply = reply.await.unwrap();
            assert_eq!(reply.content()["m.relates_to"]["m.in_reply_to"]["event_id"], question.as_str());
        }
        browser.react("Is there tea?", "👍").await.unwrap();
        for provider in [world.hub, world.spoke] {
            let reacted = provider.wait_for(&lm_room, "a reaction", |event| event.kind == "m.reaction").await.unwrap();
            let relates = json!({ "rel_type": "m.annotation", "event_id": question, "key": "👍" });
            assert_eq!((&reacted.content()["m.relates_to"], reacted.sender.as_str()), (&relates, ghost.as_str()));
        }

        // Theirs are seen at what she has written.
        let to_greeting = json!({ "event_id": greeting.event_id });
        let reply = json!({ "msgtype": "m.text", "body": "Good morning, Alice",
            "m.relates_to": { "m.in_reply_to": to_greeting } });
        world.spoke.send(&carol, &lm_room, "m.room.message", None, reply).unwrap();
        let quotes = ".ReplyPreviewView:has-text('Good morning to you two')";
        browser.see(&format!("{} {quotes}", from("Carol", "Good morning, Alice"))).await.unwrap();
        let heart =
            json!({ "m.relates_to": { "rel_type": "m.annotation", "event_id": greeting.event_id, "key": "❤️" } });
        world.hub.send(&bob, &lm_room, "m.reaction", None, heart).unwrap();
        let hearts =
            format!("{} .Timeline_messageReactions button:text-is('❤️ 1')", message_with("Good morning to you two"));
        browser.see(&hearts).await.unwrap();
        browser.shot("talked").await.unwrap();

        // What is taken back is gone.
        let wrong = world.hub.send_text(&bob, &lm_room, "I meant coffee").unwrap();
        browser.see(&message_with("I meant coffee")).await.unwrap();
        world.hub.send(&bob, &lm_room, "m.room.redaction", None, json!({ "redacts": wrong })).unwrap();
        browser.see(".Timeline_message .statusMessage:has-text('deleted')").await.unwrap();
        browser.shot("deleted").await.unwrap();
        assert_eq!(world.hub.complaints(&lm_room), [""; 0]);
    });
}

#[test]
fn a_web_client_is_let_in_by_an_invite_of_an_lm_user_and_pictures_are_seen() {
    run(async {
        let Some(mut browser) = Browser::start("invite").await.unwrap() else { return };
        let world = world().await;
        let (bob, lm_room) = world.lm_room("balcony");
        let bot: OwnedUserId = format!("@isthmus:{}", world.gateway.server_name).try_into().unwrap();
        // The bot may be in the room before its hub has put the invite there.
        let invited = world.hub.invite(&bob, &lm_room, &bot).await;
        assert!(
            invited.as_ref().err().is_none_or(|error| error.to_string().contains("(join) cannot make")),
            "{invited:?}"
        );
        world.hub.wait_for_member(&lm_room, bot.as_str(), "join").await.unwrap();
        let alice = world.user(world.a, "alice-balcony", "Alice").await;
        browser.log_in(&world.a.client_url, "alice-balcony", "secret").await.unwrap();
        let ghost = world.ghost_of(&alice.user_id);
        world.hub.invite(&bob, &lm_room, ghost.as_str().try_into().unwrap()).await.unwrap();

        // She is asked with the name of the room and of who invites her.
        browser.click(".RoomList li:has-text('The balcony')").await.unwrap();
        browser.see(".InviteView:has-text('The balcony'):has-text('Bob')").await.unwrap();
        let file = browser.shot("invited").await.unwrap();
        browser.click(".InviteView button:text-is('Accept')").await.unwrap();
        world.hub.wait_for_member(&lm_room, &ghost, "join").await.unwrap();

        // What is sent is a screenshot, which is a picture that somebody can recognize.
        let bytes = std::fs::read(&file).unwrap();
        let uri = world.hub.upload("image/png", &bytes);
        let picture = json!({ "msgtype": "m.image", "body": "balcony.png", "url": uri,
            "info": { "mimetype": "image/png", "w": 1200, "h": 800, "size": bytes.len() } });
        world.hub.send(&bob, &lm_room, "m.room.message", None, picture).unwrap();
        browser.see_picture(".Timeline_message:not(.own) .media img").await.unwrap();
        browser.send_picture(&file).await.unwrap();
        let sent = world.hub.wait_for(&lm_room, "her picture", |event| {
            event.sender == ghost && event.content().get("msgtype") == Some(&json!("m.image"))
        });
        let sent = sent.await.unwrap();
        let had = world.hub.download(sent.content()["url"].as_str().unwrap()).await.unwrap();
        assert!(had.bytes.starts_with(b"\x89PNG"), "{sent:?}");
        browser.see_picture(".Timeline_message.own:not(.unsent) .media img").await.unwrap();
        browser.shot("pictures").await.unwrap();
        assert_eq!(world.hub.complaints(&lm_room), [""; 0]);
    });
}
