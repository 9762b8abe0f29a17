//! EDUs as a server takes them in: of whom they are believed, what is kept, and that nobody's are passed on.

use std::sync::{Arc, Mutex};

use axum::body::{Body, to_bytes};
use axum::extract::Request;
use isthmus::federation::Call;
use serde_json::{Value, json};

use super::world::{World, message};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_25_hc_53_edus_in_the_name_of_others_change_nothing_and_keep_no_event_from_being_taken() {
    let (_world, [hub, part, third]) = World::new(["hub.example", "part.example", "third.example"]).await;
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    third.join(&room, "carol", &hub).await;
    let heard: Arc<Mutex<Vec<Value>>> = Arc::default();
    let hears = heard.clone();
    third.meddle(move |request, next| {
        let hears = hears.clone();
        async move {
            let (parts, body) = request.into_parts();
            let body = to_bytes(body, 1 << 20).await.unwrap();
            if parts.uri.path().contains("/send/") {
                hears.lock().unwrap().push(serde_json::from_slice(&body).unwrap());
            }
            next.run(Request::from_parts(parts, Body::from(body))).await
        }
    });

    // Users of the hub, of a third server, and of the sender itself, whose devices hold keys that nobody can use.
    let [bot, carol, alice] = [hub.user("bot"), third.user("carol"), part.user("alice")];
    let mut edus = vec![json!(null), json!(1), json!({}), json!({ "edu_type": 5, "content": [] })];
    for user in [&bot, &carol, &alice] {
        let receipt = json!({ "data": { "ts": -1 }, "event_ids": ["$x"] });
        let keys = json!({ "user_id": user, "device_id": "D", "algorithms": 5, "keys": { "ed25519:D": "AAAA" } });
        edus.extend([
            json!({ "edu_type": "m.typing", "content": { "room_id": room, "user_id": user, "typing": true } }),
            json!({ "edu_type": "m.receipt", "content": { room.as_str(): { "m.read": { user.as_str(): receipt } } } }),
            json!({ "edu_type": "m.presence", "content": { "push": [{ "user_id": user, "presence": "online" }] } }),
            json!({ "edu_type": "m.device_list_update",
                "content": { "user_id": user, "device_id": "D", "stream_id": 1, "keys": keys } }),
            json!({ "edu_type": "m.signing_key_update", "content": { "user_id": user, "master_key": {} } }),
            json!({ "edu_type": "m.direct_to_device", "content": { "sender": user, "type": "m.room_key",
                "message_id": "1", "messages": { carol.as_str(): { "*": {} } } } }),
        ]);
    }
    let count = edus.len();
    let lpdu = part.lpdu(&room, &hub.name, &message(&alice, "hello"));
    let body = json!({ "pdus": [lpdu.json], "edus": edus }).as_object().unwrap().clone();
    let call = Call::put("/_matrix/federation/v2/send/edus", body);
    assert_eq!(part.context.client.call(&hub.name, call, false).await.unwrap()["failed_pdus"], json!({}));

    third.wait_for_body(&room, "hello").await;
    let heard = std::mem::take(&mut *heard.lock().unwrap());
    assert!(!heard.is_empty() && count > 20);
    let passed_on = heard.iter().filter_map(|body| body.get("edus")?.as_array()).flatten().count();
    assert_eq!(passed_on, 0, "{heard:?}");
    // Nor does the gateway tell of devices that it was told of.
    let devices = third.get(&hub, &format!("/_matrix/federation/v1/user/devices/{bot}")).await.unwrap();
    assert_eq!(devices["devices"], json!([]));
    let query = json!({ "device_keys": { alice.as_str(): [], bot.as_str(): [] } }).as_object().unwrap().clone();
    let call = Call::post("/_matrix/federation/v1/user/keys/query", query);
    assert_eq!(third.context.client.call(&hub.name, call, false).await.unwrap()["device_keys"], json!({}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_6_messages_for_a_device_are_kept_once_in_either_shape() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let (alice, bot) = (part.user("alice"), hub.user("bot"));
    hub.watcher.devices.lock().unwrap().push((bot.clone(), "D".to_owned()));
    let put = async |txn_id: &str, edus: &[Value]| {
        let body = json!({ "pdus": [], "edus": edus }).as_object().unwrap().clone();
        let call = Call::put(format!("/_matrix/federation/v2/send/{txn_id}"), body);
        part.context.client.call(&hub.name, call, false).await.unwrap();
    };
    let of_matrix = |id: &str, device: &str| {
        let messages = json!({ bot.as_str(): { device: { "number": id } } });
        json!({ "edu_type": "m.direct_to_device",
            "content": { "sender": alice, "type": "org.example", "message_id": id, "messages": messages } })
    };
    let of_draft = |sender: &ruma::UserId, number: &str| {
        json!({ "type": "m.direct_to_device", "sender": sender, "content": { "target": bot, "target_device": "D",
            "message_type": "org.example", "message": { "number": number } } })
    };
    let edus = [
        of_matrix("1", "D"),
        of_matrix("2", "E"),
        of_draft(&alice, "3"),
        of_draft(&alice, "3"),
        of_draft(&bot, "forged"),
        json!({ "edu_type": "m.direct_to_device", "content": [] }),
    ];
    // Once each: a transaction that is repeated, and a message that comes in another one.
    put("a", &edus).await;
    put("a", &edus).await;
    put("b", &[of_matrix("1", "D")]).await;
    let kept = isthmus::store::to_device::waiting(&hub.context.store, &bot, "D", 10).await.unwrap();
    let numbers: Vec<_> = kept.iter().map(|message| message.content["number"].as_str().unwrap()).collect();
    assert_eq!(numbers, ["1", "3", "3"]);
    assert!(kept.iter().all(|message| message.sender == alice && message.kind == "org.example"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_53_the_bridge_hears_of_a_servers_own_users_alone() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    let typing = |user: &ruma::UserId| json!({ "edu_type": "m.typing", "content": { "room_id": room, "user_id": user, "typing": true } });
    let (alice, bot) = (part.user("alice"), hub.user("bot"));
    let body = json!({ "edus": [typing(&bot), typing(&alice), 5] }).as_object().unwrap().clone();
    let call = Call::put("/_matrix/federation/v2/send/typing", body);
    part.context.client.call(&hub.name, call, false).await.unwrap();
    let edus = hub.watcher.edus.lock().unwrap();
    assert_eq!(edus.iter().map(|(_, edu)| edu.user()).collect::<Vec<_>>(), [&*alice]);
}
