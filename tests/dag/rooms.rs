//! Making rooms, and what is known of them.

use isthmus::dag::DirectoryQuery;
use isthmus::event::RoomVersion;
use isthmus::refusal::Refusal;
use serde_json::{Value, json};

use super::databases::both_stores;
use super::peer::Peer;
use super::*;

#[tokio::test]
async fn rooms_of_each_version_are_made_and_survive_a_restart() {
    let gateway = Gateway::start(&[]).await;
    let mut rooms = Vec::new();
    for version in VERSIONS {
        let name = state("m.room.name", "", json!({ "name": "Bridge" }));
        rooms.push((version, gateway.room_with(version, vec![name]).await));
    }
    let gateway = gateway.restart(&[]);
    for (version, room_id) in rooms {
        let room = gateway.dag.room(&room_id).await.unwrap().unwrap();
        assert_eq!(room.version, version);
        let state = gateway.dag.state(&room_id).await.unwrap();
        let create = &state[&("m.room.create".to_owned(), String::new())];
        assert_eq!(create.content["room_version"], version.as_str());
        assert_eq!(create.content.contains_key("creator"), version == RoomVersion::V10);
        assert_eq!(state[&("m.room.name".to_owned(), String::new())].content["name"], "Bridge");
        assert_eq!(gateway.membership(&room_id, &bot()).await.as_deref(), Some("join"));
        if version == RoomVersion::V12 {
            assert_eq!(room_id.as_str().replacen('!', "$", 1), create.event_id.as_str());
            let levels = &state[&("m.room.power_levels".to_owned(), String::new())];
            assert_eq!(levels.content["users"], json!({}));
        }
        gateway.send(&room_id, message(&bot(), "still here")).await.unwrap();
    }
    assert!(gateway.dag.room(RoomId::parse("!other:x").unwrap().as_ref()).await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rooms_that_are_made_in_the_same_moment_are_rooms_of_their_own() {
    let gateway = Gateway::start(&[]).await;
    // The clock stands still.
    let rooms = futures::future::join_all((0..50).map(|_| gateway.room(RoomVersion::V12, "public"))).await;
    assert_eq!(rooms.iter().collect::<std::collections::BTreeSet<_>>().len(), rooms.len());
    for room in rooms {
        assert_eq!(gateway.state(&room).await.len(), 5);
        gateway.send(&room, message(&bot(), "here")).await.unwrap();
    }
}

#[tokio::test]
async fn a_room_lives_on_either_database() {
    both_stores(|store| async move {
        let peer = Peer::start("peer.example").await;
        let gateway = Gateway::over(store, &[&peer], tempfile::tempdir().unwrap());
        let room = gateway.room(RoomVersion::V12, "public").await;
        let (alice, strange) = (peer.user("alice"), "odd \u{0}\u{1} key");
        let mut view = peer.join(&gateway, &room, &alice).await.unwrap();
        let mut branch = view.clone();
        let odd = gateway.send(&room, state("org.example.odd", strange, json!({ "odd": "\u{0}" }))).await.unwrap();
        let (one, first) = view.say(&peer, &alice, "one \u{0}");
        let (two, second) = branch.say(&peer, &alice, "two");
        for event in [&first, &second] {
            assert!(peer.put(&gateway.dag, &[event]).await[0].result.is_ok());
        }
        gateway.dag.set_listed(&room, true).await.unwrap();
        for number in 0..150 {
            gateway.send(&room, state("org.example.count", "", json!({ "count": number }))).await.unwrap();
        }
        gateway.send(&room, state("m.room.member", alice.as_str(), json!({ "membership": "ban" }))).await.unwrap();
        let state = gateway.state(&room).await;
        let gateway = gateway.restart(&[&peer]);
        assert_eq!(gateway.state(&room).await, state);
        assert_eq!(state[&("org.example.odd".to_owned(), strange.to_owned())], odd);
        assert_eq!(gateway.inbox(&room).await[1..], [one, two]);
        assert!(!gateway.dag.joined(&room).await.unwrap().contains(&alice));
        assert_eq!(listed(&gateway, DirectoryQuery::default()).await, [json!(room)]);
    })
    .await;
}

#[tokio::test]
async fn rooms_that_the_rules_forbid_are_not_made() {
    let gateway = Gateway::start(&[]).await;
    let new = |version, initial_state| NewRoom { creator: bot(), version, initial_state };
    let refused = gateway.dag.create_room(new(RoomVersion::V9, vec![])).await.unwrap_err();
    assert_eq!(refused, Refusal::IncompatibleRoomVersion("9".to_owned()));
    let encrypted = state("m.room.encryption", "", json!({ "algorithm": "m.megolm.v1.aes-sha2" }));
    let refused = gateway.dag.create_room(new(RoomVersion::V12, vec![encrypted])).await.unwrap_err();
    assert_eq!(refused.code(), "encryption");
    // HC-43: creators of version 12 must not be in the power levels.
    let levels = state("m.room.power_levels", "", json!({ "users": { (bot().as_str()): 100 } }));
    let refused = gateway.dag.create_room(new(RoomVersion::V12, vec![levels])).await.unwrap_err();
    assert_eq!(refused.code(), "matrix_rule");
}

#[tokio::test]
async fn listed_rooms_are_in_the_public_directory() {
    let gateway = Gateway::start(&[]).await;
    let rule = |rule: &str| state("m.room.join_rules", "", json!({ "join_rule": rule }));
    let mut rooms = Vec::new();
    for number in 0..4 {
        let name = state("m.room.name", "", json!({ "name": format!("Room {number}") }));
        let topic = state("m.room.topic", "", json!({ "topic": "Über alles Grüne" }));
        let room = gateway.room_with(RoomVersion::V12, vec![name, topic, rule("public")]).await;
        if number > 0 {
            gateway.dag.set_listed(&room, true).await.unwrap();
            rooms.push(room);
        }
    }
    rooms.sort();
    let page = |limit, since: Option<&str>| {
        let asked = DirectoryQuery { limit: Some(limit), since: since.map(str::to_owned), ..DirectoryQuery::default() };
        let gateway = &gateway;
        async move { gateway.dag.public_rooms(&asked).await.unwrap() }
    };
    let first = page(1, None).await;
    assert_eq!(first["chunk"][0]["room_id"], json!(rooms[0]));
    assert_eq!(first["chunk"][0]["num_joined_members"], 1);
    let rest = page(2, first["next_batch"].as_str()).await;
    assert_eq!(ids(&rest), [json!(rooms[1]), json!(rooms[2])]);
    assert_eq!(rest["next_batch"], Value::Null);

    let search = |term: &str| DirectoryQuery { term: Some(term.to_owned()), ..DirectoryQuery::default() };
    assert_eq!(listed(&gateway, search("rOOM 2")).await.len(), 1);
    assert_eq!(listed(&gateway, search("room 0")).await, Vec::<Value>::new(), "what is not listed is not found");
    assert_eq!(listed(&gateway, search("grüne")).await.len(), 3);
    assert_eq!(listed(&gateway, search("coffee")).await, Vec::<Value>::new());
    let kinds = |kinds| DirectoryQuery { room_types: Some(kinds), ..DirectoryQuery::default() };
    assert_eq!(listed(&gateway, kinds(vec![None])).await.len(), 3);
    assert_eq!(listed(&gateway, kinds(vec![Some("m.space".to_owned())])).await, Vec::<Value>::new());

    // What counts is the rule of now.
    gateway.send(&rooms[0], rule("invite")).await.unwrap();
    gateway.send(&rooms[1], rule("knock")).await.unwrap();
    gateway.dag.set_listed(&rooms[2], false).await.unwrap();
    assert_eq!(listed(&gateway, DirectoryQuery::default()).await, [json!(rooms[1])]);
    gateway.send(&rooms[0], rule("public")).await.unwrap();
    assert_eq!(listed(&gateway, DirectoryQuery::default()).await, [json!(rooms[0]), json!(rooms[1])]);
}

#[tokio::test]
async fn a_page_of_the_public_directory_loads_few_rooms_and_the_next_begins_there() {
    let gateway = Gateway::start(&[]).await;
    for _ in 0..60 {
        let room = gateway.room(RoomVersion::V12, "public").await;
        gateway.dag.set_listed(&room, true).await.unwrap();
    }
    let first = gateway.dag.public_rooms(&DirectoryQuery::default()).await.unwrap();
    assert_eq!(ids(&first).len(), 50);
    let since = first["next_batch"].as_str().map(str::to_owned);
    let rest = gateway.dag.public_rooms(&DirectoryQuery { since, ..DirectoryQuery::default() }).await.unwrap();
    assert_eq!((ids(&rest).len(), &rest["next_batch"]), (10, &Value::Null));
    // How they are listed is known now.
    assert_eq!(listed(&gateway, DirectoryQuery::default()).await, [ids(&first), ids(&rest)].concat());
}

/// The rooms that the public directory answers.
async fn listed(gateway: &Gateway, asked: DirectoryQuery) -> Vec<Value> {
    ids(&gateway.dag.public_rooms(&asked).await.unwrap())
}

fn ids(page: &Value) -> Vec<Value> {
    page["chunk"].as_array().unwrap().iter().map(|room| room["room_id"].clone()).collect()
}
