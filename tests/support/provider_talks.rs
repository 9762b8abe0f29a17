//! Tests of the LM provider itself: two of them, one the hub, the other a participant.

use std::collections::BTreeMap;

use ruma::{OwnedServerName, RoomId, server_name};
use serde_json::json;

use super::provider::{NewRoom, Options, Provider};
use super::testbed::process::free_port;

struct Pair {
    directory: tempfile::TempDir,
    ports: [u16; 2],
}

impl Pair {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap(), ports: [free_port().unwrap(), free_port().unwrap()] }
    }

    async fn start(&self, which: usize) -> Provider {
        let names = [server_name!("hub.example"), server_name!("spoke.example")].map(OwnedServerName::from);
        let urls = self.ports.map(|port| format!("http://127.0.0.1:{port}").parse().unwrap());
        let options = Options {
            server_name: names[which].clone(),
            listen: ([127, 0, 0, 1], self.ports[which]).into(),
            ca: None,
            resolve: BTreeMap::from_iter(names.into_iter().zip(urls)),
            journal: Some(self.directory.path().join(format!("{which}.jsonl"))),
            eigen: false,
        };
        Provider::start(options).await.unwrap()
    }
}

/// The IDs of both logs, which must be the same from the participant's join on.
fn same_logs(hub: &Provider, spoke: &Provider, room: &RoomId) {
    let ids = |provider: &Provider| provider.log(room).iter().map(|event| event.event_id.clone()).collect::<Vec<_>>();
    let (all, part) = (ids(hub), ids(spoke));
    assert!(!part.is_empty());
    assert!(all.ends_with(&part), "{all:?} does not end with {part:?}");
    assert_eq!(spoke.complaints(room), [""; 0]);
}

#[tokio::test]
async fn two_providers_talk_as_hub_and_participant() {
    let pair = Pair::new();
    let (hub, spoke) = (pair.start(0).await, pair.start(1).await);
    let [bob, carol] = [hub.user("bob").unwrap(), spoke.user("carol").unwrap()];
    spoke.set_display_name(&carol, "Carol");
    let room = hub.create_room(&bob, NewRoom { alias: Some("cafe".to_owned()), ..NewRoom::default() }).unwrap();
    assert_eq!(spoke.join(&carol, "#cafe:hub.example", &[]).await.unwrap(), room);
    assert_eq!(hub.display_name(&room, carol.as_str()), "Carol");
    hub.send_text(&bob, &room, "from the hub").unwrap();
    spoke.wait_for_text(&room, "from the hub").await.unwrap();
    spoke.send_text(&carol, &room, "from the spoke").unwrap();
    hub.wait_for_text(&room, "from the spoke").await.unwrap();
    spoke.wait_for_text(&room, "from the spoke").await.unwrap();

    let dave = spoke.user("dave").unwrap();
    hub.invite(&bob, &room, &dave).await.unwrap();
    spoke.wait_for_member(&room, dave.as_str(), "invite").await.unwrap();
    spoke.join(&dave, room.as_str(), &[]).await.unwrap();
    hub.set_membership(&bob, &room, &carol, "ban", Some("noise")).unwrap();
    spoke.wait_for_member(&room, carol.as_str(), "ban").await.unwrap();
    same_logs(&hub, &spoke, &room);

    // Nobody who is banned is heard.
    let mut news = spoke.news();
    let refused = spoke.send_text(&carol, &room, "still here").unwrap();
    let told = async {
        loop {
            if let super::provider::News::Refused(_, id, error) = news.recv().await.unwrap() {
                return (id, error);
            }
        }
    };
    let (id, error) = tokio::time::timeout(std::time::Duration::from_secs(30), told).await.unwrap();
    assert_eq!(id, refused);
    assert!(error.contains("not joined"), "{error}");
}

#[tokio::test]
async fn an_invite_brings_a_server_in_and_can_be_declined() {
    let pair = Pair::new();
    let (hub, spoke) = (pair.start(0).await, pair.start(1).await);
    let [bob, carol, dave] = [hub.user("bob"), spoke.user("carol"), spoke.user("dave")].map(Result::unwrap);
    let new = NewRoom { join_rule: Some("invite".to_owned()), ..NewRoom::default() };
    let room = hub.create_room(&bob, new).unwrap();
    assert!(spoke.join(&carol, room.as_str(), std::slice::from_ref(hub.server_name())).await.is_err());
    hub.invite(&bob, &room, &dave).await.unwrap();
    assert_eq!(spoke.wait_for_invite(&dave).await.unwrap(), room);
    spoke.leave(&dave, &room).await.unwrap();
    assert_eq!(hub.membership(&room, dave.as_str()), "leave");
    hub.invite(&bob, &room, &carol).await.unwrap();
    spoke.wait_for_invite(&carol).await.unwrap();
    spoke.join(&carol, room.as_str(), &[]).await.unwrap();
    spoke.send(&carol, &room, "m.room.topic", Some(""), json!({ "topic": "no power" })).unwrap();
    spoke.send_text(&carol, &room, "here").unwrap();
    hub.wait_for_text(&room, "here").await.unwrap();
    assert_eq!(hub.state(&room, "m.room.topic", ""), None);
}

#[tokio::test]
async fn rooms_and_what_is_under_way_survive_a_restart() {
    let pair = Pair::new();
    let (hub, spoke) = (pair.start(0).await, pair.start(1).await);
    let [bob, carol] = [hub.user("bob").unwrap(), spoke.user("carol").unwrap()];
    let room = hub.create_room(&bob, NewRoom { alias: Some("cafe".to_owned()), ..NewRoom::default() }).unwrap();
    spoke.join(&carol, "#cafe:hub.example", &[]).await.unwrap();
    hub.stop().await;
    for number in 0..120 {
        spoke.send_text(&carol, &room, &format!("{number}")).unwrap();
    }
    spoke.stop().await;
    // What could not be sent is sent after both came back.
    let spoke = pair.start(1).await;
    let hub = pair.start(0).await;
    hub.wait_for_text(&room, "119").await.unwrap();
    spoke.wait_for_text(&room, "119").await.unwrap();
    let texts: Vec<_> = hub.log(&room).iter().filter_map(|event| event.content().get("body").cloned()).collect();
    assert_eq!(texts, (0..120).map(|number| json!(format!("{number}"))).collect::<Vec<_>>());
    same_logs(&hub, &spoke, &room);
}
