//! What one event on which the gateway fails does to others: nothing.

use std::sync::Arc;

use ruma::{OwnedRoomId, OwnedServerName, RoomId, UserId};
use serde_json::{Value, json};

use super::actor::template;
use super::batch::Batch;
use super::intake::Taking;
use super::room::{Facts, Snapshot};
use super::weight::FULL;
use super::{Lm, NewRoom, Position};
use crate::event::{Completion, Lpdu, Object, Pdu, Redaction, RoomVersion};
use crate::federation::{Context, KeysOf};
use crate::refusal::Refusal;
use crate::seam::{Alone, Draft, Outgoing, Raw, Received};

const NOW: i64 = 1_704_067_200_000;

/// A hub with a public room, and a participant with a user in it.
pub(super) struct World {
    _directory: tempfile::TempDir,
    hub: Lm,
    pub(super) part: Lm,
    pub(super) room: OwnedRoomId,
}

impl World {
    pub(super) async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let keys = Arc::new(KeysOf::default());
        let mut nodes = Vec::new();
        for name in ["hub.example", "part.example"] {
            let context = Context::of_test(&directory, name, keys.clone()).await;
            keys.0.lock().unwrap().push(context.clone());
            nodes.push(Lm::new(context, Arc::new(Alone)));
        }
        let (part, hub) = (nodes.pop().unwrap(), nodes.pop().unwrap());
        let bot: ruma::OwnedUserId = "@bot:hub.example".try_into().unwrap();
        let rules = json!({ "join_rule": "public" });
        let initial_state = vec![draft(&bot, "m.room.join_rules", Some(""), rules)];
        let new = NewRoom { creator: bot, version: RoomVersion::Lm02, initial_state };
        let room = hub.create_room(new).await.unwrap();
        let world = Self { _directory: directory, hub, part, room };
        let alice = json!({ "membership": "join" });
        let join = world.lpdu(&draft(&world.alice(), "m.room.member", Some("@alice:part.example"), alice));
        world.hub.send_join(&world.name(&world.part), join.json).await.unwrap();
        world
    }

    fn name(&self, of: &Lm) -> OwnedServerName {
        of.context().server_name.clone()
    }

    fn alice(&self) -> ruma::OwnedUserId {
        "@alice:part.example".try_into().unwrap()
    }

    fn lpdu(&self, draft: &Draft) -> Lpdu {
        let part = self.part.context();
        let hub = self.name(&self.hub);
        Lpdu::build(template(&self.room, draft), &hub, &part.server_name, &part.signing_key).unwrap()
    }

    /// LPDUs of these types, as the participant sends them.
    fn raw(&self, kinds: &[&str]) -> Vec<Raw> {
        let lpdu = |(index, kind): (usize, &&str)| {
            let lpdu = self.lpdu(&draft(&self.alice(), kind, None, json!({ "index": index })));
            serde_json::value::to_raw_value(&lpdu.json).unwrap()
        };
        kinds.iter().enumerate().map(lpdu).collect()
    }

    async fn receive(&self, events: &[Raw]) -> Vec<Received> {
        self.hub.receive(&self.name(&self.part), events.to_vec()).await
    }

    /// The types of the events of the log that tests sent.
    async fn kinds(&self, of: &Lm) -> Vec<String> {
        let log = of.log(&self.room, Position(0), 1000).await.unwrap();
        assert!(log.iter().enumerate().all(|(index, event)| event.position.0 == i64::try_from(index).unwrap()));
        let kinds = log.into_iter().map(|event| event.event.kind.clone());
        kinds.filter(|kind| !kind.starts_with("m.room.")).collect()
    }

    /// Gives the participant the hub's log, as if it had joined.
    pub(super) async fn copy_log(&self) {
        let log = self.hub.log(&self.room, Position(0), 100).await.unwrap();
        let facts =
            Facts { room_id: self.room.clone(), version: RoomVersion::Lm02, hub: self.name(&self.hub), shared: false };
        let mut taking = Taking::new(&self.part, Batch::of_new_room(Snapshot::empty(facts, Redaction::Draft)));
        let objects = log.iter().map(|event| event.event.json.clone()).collect();
        taking.adopt(self.part.check_finished(objects, Redaction::Draft).await).await.unwrap();
        taking.finish(None).await.unwrap();
    }

    async fn close(self) {
        self.hub.context().store.close().await;
        self.part.context().store.close().await;
    }
}

fn draft(sender: &UserId, kind: &str, state_key: Option<&str>, content: Value) -> Draft {
    Draft {
        sender: sender.to_owned(),
        kind: kind.to_owned(),
        state_key: state_key.map(str::to_owned),
        content: content.as_object().unwrap().clone(),
        origin_server_ts: NOW,
    }
}

/// Of each event whether it is refused because the gateway fails on it; all others are taken.
fn fails(received: &[Received]) -> Vec<bool> {
    let fails = |received: &Received| match &received.result {
        Ok(()) => false,
        Err(Refusal::Fails(_)) => true,
        Err(refusal) => panic!("{refusal:?}"),
    };
    received.iter().map(fails).collect()
}

#[tokio::test]
async fn an_lpdu_on_which_the_hub_fails_is_refused_alone() {
    let world = World::new().await;
    let mut kinds = vec!["m.one", "test.panic.verify", "test.panic.judge", "m.two", "test.panic.apply", "m.three"];
    let mut expected = vec![false, true, true, false, true, false];
    // So many that they are checked by several threads.
    kinds.extend(["m.more"; 40]);
    expected.extend([false; 40]);
    let events = world.raw(&kinds);
    let received = world.receive(&events[..6]).await;
    assert_eq!(fails(&received), expected[..6]);
    for _ in 0..2 {
        // It is no failure of the transaction, which would be repeated.
        assert_eq!(fails(&world.receive(&events).await), expected);
    }
    let taken: Vec<&str> = kinds.into_iter().filter(|kind| kind.starts_with("m.")).collect();
    assert_eq!(world.kinds(&world.hub).await, taken);

    let bot = UserId::parse("@bot:hub.example").unwrap();
    let own = |kind| Outgoing { draft: draft(&bot, kind, None, json!({})), effect: None };
    let sent = world.hub.send(&world.room, vec![own("test.panic.judge"), own("m.own")]).await;
    assert!(matches!(sent[0], Err(Refusal::Fails(_))) && sent[1].is_ok(), "{sent:?}");
    world.close().await;
}

#[tokio::test]
async fn a_room_is_read_anew_after_its_task_panicked() {
    let world = World::new().await;
    let events = world.raw(&["m.one", "test.panic.commit"]);
    for received in world.receive(&events).await {
        assert!(matches!(received.result, Err(Refusal::Internal(_))), "{received:?}");
    }
    assert_eq!(world.kinds(&world.hub).await, Vec::<String>::new());
    let cell = world.hub.rooms().find(&world.room).await.unwrap().unwrap();
    let read = cell.snapshot(&world.hub.context().store).await.unwrap();
    assert_eq!(fails(&world.receive(&events[..1]).await), [false]);
    assert_eq!(world.kinds(&world.hub).await, ["m.one"]);
    assert_eq!(read.head + 1, cell.snapshot(&world.hub.context().store).await.unwrap().head);
    // The whole again: now each goes alone, so that it is known which one it is, and the others are taken.
    let events = world.raw(&["m.two", "test.panic.commit", "m.three"]);
    for _ in 0..2 {
        assert_eq!(fails(&world.receive(&events).await), [false, true, false]);
    }
    assert_eq!(world.kinds(&world.hub).await, ["m.one", "m.two", "m.three"]);
    world.close().await;
}

#[tokio::test]
async fn an_event_of_a_hub_on_which_the_participant_fails_is_refused_alone() {
    let world = World::new().await;
    let (hub, part, room_id): (&Lm, &Lm, &RoomId) = (&world.hub, &world.part, &world.room);
    world.copy_log().await;

    let bot = UserId::parse("@bot:hub.example").unwrap();
    let room = hub.rooms().find(room_id).await.unwrap().unwrap();
    let room = room.snapshot(&hub.context().store).await.unwrap();
    let auth = ["m.room.create", "m.room.member"].map(|kind| {
        let state_key = if kind == "m.room.member" { bot.as_str() } else { "" };
        room.state_event(kind, state_key).unwrap().event_id.clone()
    });
    let mut last = room.last_id().cloned();
    let mut finished = |kind: &str| -> Object {
        let completion = Completion { auth_events: auth.to_vec(), prev_event: last.clone() };
        let template = template(room_id, &draft(&bot, kind, None, json!({})));
        let pdu = Pdu::build(template, completion, &world.name(hub), &hub.context().signing_key).unwrap();
        last = Some(pdu.event_id.clone());
        pdu.json
    };
    let mut kinds = vec!["m.one", "test.panic.judge", "m.two", "test.panic.apply", "m.three", "test.panic.commit"];
    kinds.extend(["m.four", "test.panic.verify"]);
    let events: Vec<Object> = kinds.iter().map(|kind| finished(kind)).collect();
    for _ in 0..2 {
        let received = part.receive_in_room(&world.name(hub), room_id, events.clone()).await;
        let refused: Vec<bool> = received.iter().map(|received| received.result.is_err()).collect();
        assert!(received.iter().all(|received| !matches!(received.result, Err(Refusal::Internal(_)))), "{received:?}");
        // What was refused for good is known when it comes again.
        assert!(refused[7] && !refused[0] && !refused[2] && !refused[4] && !refused[6], "{received:?}");
        // Also what was found of others of the batch.
        let complaints = part.room(room_id).await.unwrap().unwrap().complaints;
        assert_eq!(complaints.iter().filter(|complaint| complaint.contains("fails on")).count(), 3, "{complaints:?}");
    }
    assert_eq!(world.kinds(part).await, ["m.one", "m.two", "m.three", "m.four"]);
    world.close().await;
}

#[tokio::test]
async fn a_hub_cannot_have_a_participant_keep_state_without_end() {
    let world = World::new().await;
    world.copy_log().await;
    let cell = world.part.rooms().find(&world.room).await.unwrap().unwrap();
    let store = &world.part.context().store;
    let weight = cell.snapshot(store).await.unwrap().weight;
    cell.forget();
    let read = cell.snapshot(store).await.unwrap();
    assert_eq!(read.weight, weight, "it is the same when it is counted as events come");
    assert_eq!(weight.slots, read.state().iter().count());

    let mut full = Snapshot::clone(&read);
    full.weight = FULL;
    cell.publish(Arc::new(full));
    let bot = UserId::parse("@bot:hub.example").unwrap();
    let sent = [
        ("m.filler", Some("one"), json!({}), Some("too_many_events")),
        ("m.message", None, json!({}), None),
        ("m.room.power_levels", Some(""), json!({ "users": { "@bot:hub.example": 100 } }), None),
        ("m.room.member", Some("@alice:part.example"), json!({ "membership": "ban" }), None),
        ("m.room.member", Some("@new:hub.example"), json!({ "membership": "ban" }), Some("too_many_events")),
    ];
    for (kind, state_key, content, refused) in sent {
        let draft = draft(&bot, kind, state_key, content);
        let sent = world.hub.send(&world.room, vec![Outgoing { draft, effect: None }]).await.remove(0).unwrap();
        let super::Sent::Appended(sent) = sent else { panic!("{sent:?}") };
        let hub = world.name(&world.hub);
        let received = world.part.receive_in_room(&hub, &world.room, vec![sent.event.json.clone()]).await.remove(0);
        assert_eq!(received.result.as_ref().err().map(Refusal::code), refused, "{kind}: {received:?}");
    }
    let complaints = world.part.room(&world.room).await.unwrap().unwrap().complaints;
    assert_eq!(
        complaints.iter().filter(|complaint| complaint.contains("another server keeps")).count(),
        2,
        "{complaints:?}"
    );
    world.close().await;
}
