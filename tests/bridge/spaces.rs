//! A space for each LM hub, where the configuration wishes for them.

use isthmus::bridge::{Cause, PortalState};
use isthmus::federation::Call;
use ruma::{OwnedRoomId, OwnedServerName, RoomId};
use serde_json::{Value, json};

use super::from_lm::room;
use super::from_matrix::is_state;
use super::world::{Gateway, LM, MATRIX, World, draft, so, until};
use crate::dag::OWN;

/// Where the space of a hub is.
async fn space(gateway: &Gateway, hub: &str) -> Option<OwnedRoomId> {
    let between = gateway.bridge.between();
    let asker: OwnedServerName = MATRIX.try_into().unwrap();
    let led = between.alias(&format!("#hub_{hub}:{OWN}"), Some(&asker), None).await;
    led.ok().map(|led| led.room_id)
}

/// Whether a space holds a room, and the room says so.
async fn holds(gateway: &Gateway, space: &RoomId, room: &RoomId) -> (bool, bool) {
    let names = async |at: &RoomId, kind: &str, about: &RoomId| {
        let event = gateway.dag.state_event(at, kind, about.as_str()).await.unwrap();
        event.is_some_and(|event| event.content.get("via").is_some_and(Value::is_array))
    };
    (names(space, "m.space.child", room).await, names(room, "m.space.parent", space).await)
}

/// What another homeserver is told of a room and those in it.
async fn hierarchy(world: &World, room: &RoomId) -> Result<Value, String> {
    let path = format!(
        "/_matrix/federation/v1/hierarchy/{}?suggested_only=false",
        room.as_str().replace('!', "%21").replace(':', "%3A")
    );
    let own: OwnedServerName = OWN.try_into().unwrap();
    let answer = world.server.context.client.call(&own, Call::get(path), false).await;
    answer.map(Value::Object).map_err(|error| error.to_string())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hubs_space_holds_its_open_rooms_as_long_as_they_have_portals() {
    let (world, gateway) = World::new(json!({ "portals": { "hub_spaces": true } })).await;
    let via = [LM.try_into().unwrap()];
    let (open, second) = (room(&world, "public").await, room(&world, "public").await);
    let hubert = world.lm_user("hubert");
    let first = gateway.bridge.portal_from_lm(&open, &via, None, Cause::Admin).await.unwrap();
    let space_id = until("the space", || space(&gateway, LM)).await;
    so("the room in the space", || async { holds(&gateway, &space_id, &first.matrix_room_id).await == (true, true) })
        .await;
    let create = gateway.matrix_state(&space_id, "m.room.create").await.unwrap();
    assert_eq!(create["type"], "m.space");
    let address = gateway.matrix_state(&space_id, "m.room.canonical_alias").await.unwrap();
    assert_eq!(address["alias"], format!("#hub_{LM}:{OWN}"));
    let listed = gateway.bridge.listed(10).await.unwrap();
    assert!(listed.iter().any(|listed| listed.room_id == space_id), "{listed:?}");

    // A room that only the invited may join is not shown any more.
    let lm = second;
    let second = gateway.bridge.portal_from_lm(&lm, &via, None, Cause::Admin).await.unwrap();
    so("the second room in the space", || async {
        holds(&gateway, &space_id, &second.matrix_room_id).await == (true, true)
    })
    .await;
    world.lm_send(&lm, draft(&hubert, "m.room.join_rules", Some(""), json!({ "join_rule": "invite" }))).await;
    so("the second room out of the space", || async {
        holds(&gateway, &space_id, &second.matrix_room_id).await == (false, false)
    })
    .await;

    // Other servers are told of what is in it.
    let told = hierarchy(&world, &space_id).await.unwrap();
    assert_eq!((&told["room"]["room_type"], &told["room"]["room_id"]), (&json!("m.space"), &json!(space_id)));
    let children = told["children"].as_array().unwrap();
    assert_eq!((children.len(), &children[0]["room_id"]), (1, &json!(first.matrix_room_id)), "{told}");
    assert_eq!(told["room"]["children_state"][0]["state_key"], json!(first.matrix_room_id));
    let told = hierarchy(&world, &first.matrix_room_id).await.unwrap();
    assert_eq!((&told["room"]["name"], &told["children"]), (&json!("Tea"), &json!([])));
    let refusal = hierarchy(&world, &second.matrix_room_id).await.unwrap_err();
    assert!(refusal.contains("404"), "{refusal}");

    // What a restart finds is kept up too.
    let gateway = world.kill(gateway).await;
    assert_eq!(space(&gateway, LM).await.as_ref(), Some(&space_id));
    gateway.bridge.remove_portal(&first.portal_id, "it was asked for").await.unwrap();
    assert!(is_state(&gateway, &first, PortalState::Ended).await);
    so("the room out of the space", || async { !holds(&gateway, &space_id, &first.matrix_room_id).await.0 }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_wish_there_is_no_space() {
    let (world, gateway) = World::new(json!({})).await;
    let lm = room(&world, "public").await;
    gateway.bridge.portal_from_lm(&lm, &[LM.try_into().unwrap()], None, Cause::Admin).await.unwrap();
    assert_eq!(space(&gateway, LM).await, None);
    let rows: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM bridge_spaces")
        .fetch_one(gateway.node.context.store.reader())
        .await
        .unwrap();
    assert_eq!(rows, 0);
}
