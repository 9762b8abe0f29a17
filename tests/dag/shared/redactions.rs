//! Redactions in shared rooms: what the graph has redacted nobody reads in the log.

use super::*;

#[tokio::test]
async fn what_comes_after_its_redaction_is_redacted_in_the_log_too() {
    let peer = Peer::start("graph.example").await;
    let hub = Hub::real(&[&peer]).await;
    let room = hub.room().await;
    let alice = peer.user("alice");
    let base = peer.join(&hub.gateway, &room, &alice).await.unwrap();
    let (target, event) = base.clone().say(&peer, &alice, "secret");
    let redacts = json!({ "redacts": target });
    let (redaction, redacting) = base.clone().add(&peer, &alice, "m.room.redaction", None, redacts);
    for event in [&redacting, &event] {
        assert_eq!(peer.put(&hub.gateway.dag, &[event]).await[0].result, Ok(()));
    }
    let said = async |hub: &Hub| {
        assert!(hub.gateway.dag.event(&target).await.unwrap().unwrap().content.is_empty());
        let log = hub.log(&room).await;
        let place = log.ids().iter().position(|id| *id == target).unwrap();
        assert_eq!(log.ids()[place - 1], redaction);
        assert_eq!(log.events[place].0.content(), &Object::new());
    };
    said(&hub).await;
    hub.assert_in_step(&room).await;
    let hub = hub.restart(&[&peer]);
    said(&hub).await;
    // In its order it is redacted as well.
    let mut view = hub.view(&room).await;
    let (again, event) = view.say(&peer, &alice, "another");
    assert_eq!(peer.put(&hub.gateway.dag, &[&event]).await[0].result, Ok(()));
    hub.gateway.send(&room, draft(&bot(), "m.room.redaction", None, json!({ "redacts": again }))).await.unwrap();
    let log = hub.log(&room).await;
    assert!(
        log.events.iter().filter(|(event, _)| event.event_id == again).all(|(event, _)| event.content().is_empty())
    );
}
