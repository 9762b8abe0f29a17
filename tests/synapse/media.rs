//! Files in a portal of a real Synapse: what users of one side send is read on the other, byte for byte.

use serde_json::{Value, json};

use crate::support::world::on_both;

/// A picture of one dot, which Synapse can make smaller.
const DOT: &[u8] =
    b"\x89\x50\x4e\x47\x0d\x0a\x1a\x0a\x00\x00\x00\x0d\x49\x48\x44\x52\x00\x00\x00\x01\x00\x00\x00\x01\x08\x06\x00\x00\
    \x00\x1f\x15\xc4\x89\x00\x00\x00\x0d\x49\x44\x41\x54\x78\x9c\x63\xf8\xcf\xc0\xf0\x1f\x00\x05\x00\x01\xff\x89\x99\
    \x3d\x1d\x00\x00\x00\x00\x49\x45\x4e\x44\xae\x42\x60\x82";

/// A file of this length, without any form.
fn noise(length: usize) -> Vec<u8> {
    let mut state: u32 = 7;
    let byte = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    (0..length).map(byte).collect()
}

/// It is told by its body, which stays as it is.
fn picture(uri: &str) -> Value {
    json!({ "msgtype": "m.image", "body": uri, "url": uri, "info": { "mimetype": "image/png" } })
}

#[test]
fn hc_59_files_are_read_on_the_other_side_byte_for_byte() {
    on_both(async |world| {
        let (bob, lm_room) = world.lm_room("media");
        let alice = world.user(world.a, "alice-media", "Alice").await;
        let room = alice.join(&world.alias("media", &world.a.server_name), &[]).await.unwrap();
        alice.wait_for_member(&room, &world.image_of(&bob), "join").await.unwrap();
        let gateway = format!("mxc://{}/", world.gateway.server_name);

        // What Alice sends, Bob's server fetches from the gateway, also a file of some length.
        for bytes in [DOT.to_vec(), noise(3_000_000)] {
            let own = alice.upload("image/png", "cat.png", &bytes).await.unwrap();
            alice.send(&room, "m.room.message", picture(&own)).await.unwrap();
            let sent = own.clone();
            let is_it = move |event: &isthmus::event::Pdu| event.content().get("body") == Some(&json!(sent));
            let event = world.hub.wait_for(&lm_room, "the picture", is_it).await.unwrap();
            let uri = event.content()["url"].as_str().unwrap().to_owned();
            assert!(uri.starts_with(&gateway), "{uri}");
            let file = world.hub.download(&uri).await.unwrap();
            assert_eq!(file.content_type, "image/png");
            assert!(file.bytes == bytes, "{} bytes of {}", file.bytes.len(), bytes.len());
            // Bob shows it again: Alice gets it under its own name.
            world.hub.send(&bob, &lm_room, "m.room.message", None, picture(&uri)).unwrap();
            let shown = |event: &Value| event["sender"] == world.image_of(&bob) && event["content"]["url"] == own;
            alice.wait_for(&room, "her own picture", shown).await.unwrap();
        }

        // What Bob sends, Alice's homeserver fetches from the gateway, and makes smaller by itself.
        for bytes in [DOT.to_vec(), noise(3_000_000)] {
            let own = world.hub.upload("image/png", &bytes);
            world.hub.send(&bob, &lm_room, "m.room.message", None, picture(&own)).unwrap();
            let event = alice.wait_for(&room, &own, |event| event["content"]["body"] == own).await.unwrap();
            let uri = event["content"]["url"].as_str().unwrap();
            assert!(uri.starts_with(&gateway), "{uri}");
            let (kind, found) = alice.download(uri, false).await.unwrap();
            assert!(kind == "image/png" && found == bytes, "{kind}: {} bytes of {}", found.len(), bytes.len());
            if bytes == DOT {
                let (kind, _) = alice.download(uri, true).await.unwrap();
                assert!(kind.starts_with("image/"), "{kind}");
            }
        }

        // Avatars are files too.
        let face = alice.upload("image/png", "face.png", DOT).await.unwrap();
        alice.set_avatar(&face).await.unwrap();
        let ghost = world.ghost_of(&alice.user_id);
        let faced = move |event: &isthmus::event::Pdu| {
            event.state_key.as_deref() == Some(&ghost) && event.content().contains_key("avatar_url")
        };
        let event = world.hub.wait_for(&lm_room, "the avatar", faced).await.unwrap();
        let uri = event.content()["avatar_url"].as_str().unwrap();
        assert_eq!(world.hub.download(uri).await.unwrap().bytes, DOT);
        assert!(world.hub.download(&format!("{gateway}forged")).await.unwrap_err().to_string().contains("404"));
    });
}
