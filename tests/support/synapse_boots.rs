//! Tests of the testbed itself: what is started really is what it should be.

use super::testbed::{certificates::Authority, synapse};

#[tokio::test]
async fn two_stock_synapses_federate_under_the_test_authority() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new(directory.path()).unwrap();
    let plans = ["a", "b"].map(|name| synapse::Plan::new(&directory.path().join(name)).unwrap());
    let [a, b] = plans.map(|plan| plan.start(&authority, None));
    let (a, b) = tokio::try_join!(a, b).unwrap();
    let alice = a.register("alice", "secret").await.unwrap();
    let bob = b.register("bob", "secret").await.unwrap();

    let body = serde_json::json!({ "preset": "public_chat", "room_alias_name": "cafe" });
    let room = alice.create_room(body).await.unwrap();
    let joined = bob.join(&format!("#cafe:{}", a.server_name), &[]).await.unwrap();
    assert_eq!(joined, room);
    alice.wait_for_member(&room, &bob.user_id, "join").await.unwrap();
    let sent = bob.send_text(&room, "hello").await.unwrap();
    let seen = alice.wait_for_text(&room, "hello").await.unwrap();
    assert_eq!(seen["event_id"], sent.as_str());
    assert_eq!(alice.event(&room, &sent).await.unwrap()["sender"], bob.user_id.as_str());
}
