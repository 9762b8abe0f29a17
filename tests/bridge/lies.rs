//! A portal of a Matrix room that lives elsewhere, in which a third homeserver takes part that lies, answers in part, and whose events
//! conflict with those of others: the log has what the room comes to, and nothing else.

use std::collections::BTreeMap;
use std::sync::Arc;

use isthmus::bridge::{Cause, Portal};
use isthmus::event::{Object, RoomVersion};
use isthmus::identity::Side;
use ruma::{OwnedEventId, OwnedRoomId, OwnedUserId, UserId};
use serde_json::{Value, json};

use super::from_matrix::{Home, at_home, image, user, via};
use super::world::{Gateway, World, ghost, object, so};
use crate::dag::VERSIONS;
use crate::dag::peer::View;

const LEVELS: &str = "m.room.power_levels";
const RULES: &str = "m.room.join_rules";
const TOPIC: &str = "m.room.topic";

/// A room of alice's at its home, mod of the third homeserver in it, and bob of LM.
struct Scene {
    world: World,
    gateway: Gateway,
    home: Home,
    room: OwnedRoomId,
    portal: Arc<Portal>,
    moderator: OwnedUserId,
    /// The room as the third homeserver sees it.
    view: View,
}

async fn scene(version: RoomVersion) -> Scene {
    eprintln!("Matrix room version {version}");
    let (world, gateway) = World::new(json!({})).await;
    let home = Home::start(&world).await;
    let room = home.public(version).await;
    let moderator = world.matrix_user("mod");
    let view = world.matrix_join(&home.0, &room, &moderator).await.unwrap();
    let portal = gateway.bridge.portal_from_matrix(&room, &via(), None, Cause::Admin).await.unwrap();
    world.lm_join(&portal.lm_room_id, "bob").await.unwrap();
    at_home(&home, &room, &ghost(Side::Lm, "bob"), "join").await;
    let mut scene = Scene { world, gateway, home, room, portal, moderator, view };
    scene.settle().await;
    scene
}

impl Scene {
    /// Both states in step, and the third homeserver sees what the gateway does.
    async fn settle(&mut self) {
        so("both states in step", || self.gateway.in_step(&self.portal)).await;
        self.world.refresh(&self.gateway, &mut self.view).await;
    }

    /// Alice gives the moderator this level, and all have heard of it.
    async fn empower(&mut self, level: i64) {
        self.home.empower(&self.room, &[(self.moderator.as_str(), level)]).await;
        so("the level here", || async {
            self.gateway.matrix_state(&self.room, LEVELS).await.unwrap()["users"][self.moderator.as_str()] == level
        })
        .await;
        self.settle().await;
    }

    /// What the gateway says to an event of the third homeserver.
    async fn put(&self, event: &Object) -> Result<(), String> {
        let received = self.world.peer.put(&self.gateway.dag, &[event]).await.remove(0);
        received.result.map_err(|refusal| refusal.code().to_owned())
    }

    /// Gives the gateway and the room's home an event of the third homeserver.
    async fn tell(&self, event: &Object) {
        self.put(event).await.unwrap();
        self.world.peer.put(&self.home.0.dag, &[event]).await.remove(0).result.unwrap();
    }

    /// What was said in the log by users of Matrix.
    async fn heard(&self) -> Vec<String> {
        let bodies = self.gateway.node.bodies(&self.portal.lm_room_id).await;
        bodies.into_iter().filter(|(by, _)| by.starts_with("@mx_")).map(|(_, body)| body).collect()
    }

    async fn hears(&self, body: &str) {
        so(&format!("{body} in the log"), || async { self.heard().await.iter().any(|said| said == body) }).await;
    }

    async fn in_log(&self, kind: &str, key: &str) -> Value {
        let content = self.gateway.node.state(&self.portal.lm_room_id, kind, key).await;
        content.map_or(Value::Null, Value::Object)
    }

    /// Both sides say something, hear it, and have the same state; the gateway and the room's home, too.
    async fn all_is_well(&self) {
        self.home.say(&self.room, "alice", "all is well").await;
        self.hears("all is well").await;
        self.world.lm_say(&self.portal.lm_room_id, "bob", "indeed").await;
        let indeed = (ghost(Side::Lm, "bob"), "indeed".to_owned());
        so("bob at home", || async { self.home.0.matrix_bodies(&self.room).await.contains(&indeed) }).await;
        so("both states in step", || self.gateway.in_step(&self.portal)).await;
        let state = async |gateway: &Gateway| -> BTreeMap<(String, String), OwnedEventId> {
            let state = gateway.dag.state(&self.room).await.unwrap();
            state.iter().map(|(key, event)| (key.clone(), event.event_id.clone())).collect()
        };
        so("the same room here and there", || async { state(&self.gateway).await == state(&self.home.0).await }).await;
    }

    fn carol_joins(&self, view: &mut View) -> (OwnedUserId, OwnedEventId, Object) {
        let carol = self.world.matrix_user("carol");
        let content = json!({ "membership": "join" });
        let (id, event) = view.add(&self.world.peer, &carol, "m.room.member", Some(carol.as_str()), content);
        (carol, id, event)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_47_what_was_refused_is_taken_when_its_auth_event_arrives() {
    for version in VERSIONS {
        let scene = scene(version).await;
        let hide = |id: &OwnedEventId| {
            scene.world.peer.memory.hidden.lock().unwrap().insert(id.clone());
        };
        let mut view = scene.view.clone();
        let (carol, join, join_event) = scene.carol_joins(&mut view);
        hide(&join);
        // One stands on the join, the other only says that it is allowed by it.
        let (_, on_it) = view.clone().say(&scene.world.peer, &carol, "on it");
        let mut beside = view.next(&carol, "m.room.message", None, json!({ "msgtype": "m.text", "body": "beside" }));
        beside["prev_events"] = json!(scene.view.tips);
        let (_, beside) = scene.world.peer.sign(version, beside);
        for event in [&on_it, &beside] {
            scene.put(event).await.unwrap_err();
            scene.put(event).await.unwrap_err();
        }
        scene.home.say(&scene.room, "alice", "meanwhile").await;
        scene.hears("meanwhile").await;
        assert_eq!(scene.heard().await, ["meanwhile"]);

        // The join comes by itself; then all may.
        scene.put(&join_event).await.unwrap();
        scene.put(&on_it).await.unwrap();
        scene.hears("on it").await;
        // By the state before it she is not in the room: this was never right, and is not made so by what came.
        assert_eq!(scene.put(&beside).await.unwrap_err(), "matrix_rule");
        scene.world.peer.memory.hidden.lock().unwrap().clear();
        assert_eq!(scene.put(&on_it).await, Ok(()), "again it is the same");
        scene.all_is_well().await;
        assert_eq!(scene.heard().await, ["meanwhile", "on it", "all is well"]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_47_what_follows_a_rejected_event_crosses_and_that_event_does_not() {
    for version in VERSIONS {
        let mut scene = scene(version).await;
        let (topic, event) =
            scene.view.add(&scene.world.peer, &scene.moderator, TOPIC, Some(""), json!({ "topic": "mine" }));
        assert_eq!(scene.put(&event).await.unwrap_err(), "matrix_rule");
        // Its maker goes on as if it were part of the room; later the level is there, and the same event comes again.
        let (_, next) = scene.view.say(&scene.world.peer, &scene.moderator, "after it");
        scene.put(&next).await.unwrap();
        scene.hears("after it").await;
        scene.empower(50).await;
        assert_eq!(scene.put(&event).await.unwrap_err(), "matrix_rule");
        assert!(scene.gateway.dag.event(&topic).await.unwrap().is_none());
        assert_eq!(scene.in_log(TOPIC, "").await, Value::Null);
        // What is said with the level is another event.
        let (_, event) =
            scene.view.add(&scene.world.peer, &scene.moderator, TOPIC, Some(""), json!({ "topic": "now" }));
        scene.tell(&event).await;
        so("the topic in the log", || async { scene.in_log(TOPIC, "").await["topic"] == "now" }).await;
        scene.all_is_well().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_41_a_server_that_lies_about_the_state_before_its_event_gets_nothing_by_it() {
    for version in VERSIONS {
        let mut scene = scene(version).await;
        scene.empower(50).await;
        let with_power = scene.view.clone();
        scene.empower(0).await;
        let levels = scene.in_log(LEVELS, "").await;
        let (peer, moderator) = (&scene.world.peer, &scene.moderator);
        // Levels that the rules forbid, and a leave of alice's that her server did not sign.
        let mut mine = Value::Object(scene.gateway.matrix_state(&scene.room, LEVELS).await.unwrap());
        mine["users"][moderator.as_str()] = json!(100);
        let (forged_levels, _) = scene.view.clone().add(peer, moderator, LEVELS, Some(""), mine);
        let alice = user("alice");
        let leave = json!({ "membership": "leave" });
        let (forged_leave, _) = scene.view.clone().add(peer, &alice, "m.room.member", Some(alice.as_str()), leave);
        let honest = scene.view.state.clone();
        let key = |kind: &str, key: &str| (kind.to_owned(), key.to_owned());
        let mut lies = vec![with_power.state.clone(), honest.clone(), honest.clone(), honest.clone(), BTreeMap::new()];
        lies[1].insert(key(LEVELS, ""), forged_levels);
        lies[2].insert(key("m.room.member", alice.as_str()), forged_leave);
        lies[3].remove(&key(LEVELS, ""));
        for (number, lie) in lies.into_iter().enumerate() {
            // An event that nobody gives stands between what is known and what is said to be the state.
            let mut view = scene.view.clone();
            let (hole, _) = view.say(peer, moderator, &format!("hole {number}"));
            peer.memory.hidden.lock().unwrap().insert(hole);
            view.state = lie.clone();
            let topic = json!({ "topic": format!("lie {number}") });
            let (edge, event) = view.add(peer, moderator, TOPIC, Some(""), topic);
            peer.memory.states.lock().unwrap().insert(edge.clone(), lie.into_values().collect());
            let _ = scene.put(&event).await;
            // Nor by what comes after it.
            let kick = json!({ "membership": "leave" });
            let (_, event) = view.add(peer, moderator, "m.room.member", Some(alice.as_str()), kick);
            let _ = scene.put(&event).await;
            assert!(scene.gateway.dag.event(&edge).await.unwrap().is_none(), "lie {number}");
            let state = scene.gateway.dag.state(&scene.room).await.unwrap();
            let now: BTreeMap<_, _> = state.iter().map(|(key, event)| (key.clone(), event.event_id.clone())).collect();
            assert_eq!(now, honest, "lie {number}");
        }
        scene.all_is_well().await;
        assert_eq!(scene.in_log(LEVELS, "").await, levels);
        assert_eq!(scene.in_log(TOPIC, "").await, Value::Null);
        assert_eq!(scene.in_log("m.room.member", &image("alice")).await["membership"], "join");
        assert!(!scene.heard().await.iter().any(|body| body.starts_with("hole")));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_41_of_partial_and_false_answers_the_log_has_what_is_true_in_its_order() {
    for version in [RoomVersion::V10, RoomVersion::V12] {
        let mut scene = scene(version).await;
        let elsewhere = scene.home.public(version).await;
        let mut there = scene.world.matrix_join(&scene.home.0, &elsewhere, &scene.moderator).await.unwrap();
        let peer = &scene.world.peer;
        let foreign = there.say(peer, &scene.moderator, "of another room").1;
        let said: Vec<_> = (0..12).map(|number| scene.view.say(peer, &scene.moderator, &format!("{number}"))).collect();
        // A changed copy of one of them, a foreign one, what is no event: and of the right ones the last alone.
        let mut changed = said[3].1.clone();
        changed["content"]["body"] = json!("changed");
        let mut unsigned = said[4].1.clone();
        unsigned.remove("signatures");
        let answer = json!({ "events": [foreign, changed, unsigned, 7, {}, said[10].1] });
        *peer.memory.meddler.lock().unwrap() =
            Some(Box::new(move |path, _| path.starts_with("v1/get_missing_events").then(|| answer.clone())));
        let _ = scene.put(&said[11].1).await;
        assert!(!scene.heard().await.iter().any(|body| body == "changed" || body == "of another room"));
        // Then it answers as it should, a few at a time.
        *peer.memory.meddler.lock().unwrap() = None;
        *peer.memory.page.lock().unwrap() = Some((3, true));
        let (_, last) = scene.view.say(peer, &scene.moderator, "last");
        scene.put(&last).await.unwrap();
        scene.hears("last").await;
        // Of the changed copy, whose ID is the right one's, everybody keeps what redaction leaves: nothing to carry.
        let mut expected: Vec<String> =
            (0..12).filter(|number| *number != 3).map(|number| number.to_string()).collect();
        expected.push("last".to_owned());
        assert_eq!(scene.heard().await, expected);
        scene.all_is_well().await;
    }
}

/// Version 12 resolves state in another way than those before it (v2.1): rules that a moderator set, who has lost the power to do so,
/// count again when a branch that knows no later ones meets one that does. No event says so, and the log follows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_44_the_log_follows_what_the_rooms_version_makes_of_conflicting_state() {
    for (version, expected) in [(RoomVersion::V10, "public"), (RoomVersion::V11, "public"), (RoomVersion::V12, "knock")]
    {
        let mut scene = scene(version).await;
        scene.empower(50).await;
        let rule = json!({ "join_rule": "knock" });
        let (_, event) = scene.view.add(&scene.world.peer, &scene.moderator, RULES, Some(""), rule);
        scene.tell(&event).await;
        so("the moderator's rule in the log", || async { scene.in_log(RULES, "").await["join_rule"] == "knock" }).await;
        scene.empower(0).await;
        // Something in both branches is allowed by the levels that took the power: so these are in no conflict.
        scene.home.send(&scene.room, "alice", TOPIC, Some(""), json!({ "topic": "order" })).await;
        so("the topic in the log", || async { scene.in_log(TOPIC, "").await["topic"] == "order" }).await;
        scene.settle().await;
        let mut fork = scene.view.clone();
        scene.home.send(&scene.room, "alice", RULES, Some(""), json!({ "join_rule": "public" })).await;
        so("alice's rule in the log", || async { scene.in_log(RULES, "").await["join_rule"] == "public" }).await;
        let (_, event) = fork.say(&scene.world.peer, &scene.moderator, "meanwhile");
        scene.tell(&event).await;
        scene.hears("meanwhile").await;
        assert_eq!(scene.gateway.matrix_state(&scene.room, RULES).await.unwrap()["join_rule"], expected, "{version}");
        scene.all_is_well().await;
        assert_eq!(scene.in_log(RULES, "").await["join_rule"], expected, "{version}");
    }
}

/// Alice bans whom the moderator invites and promotes at the same time, on branches that meet only later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_44_concurrent_bans_and_demotions_end_the_same_in_the_log() {
    for version in VERSIONS {
        let mut scene = scene(version).await;
        scene.empower(50).await;
        let mut view = scene.view.clone();
        let (carol, _, event) = scene.carol_joins(&mut view);
        scene.tell(&event).await;
        so("carol in the log", || async {
            scene.in_log("m.room.member", &carols_ghost(&carol)).await["membership"] == "join"
        })
        .await;
        scene.settle().await;
        let mut fork = scene.view.clone();
        // Here: alice bans carol and takes the moderator's level.
        scene
            .home
            .send(&scene.room, "alice", "m.room.member", Some(carol.as_str()), json!({ "membership": "ban" }))
            .await;
        scene.home.empower(&scene.room, &[(scene.moderator.as_str(), 0)]).await;
        so("the ban in the log", || async {
            scene.in_log("m.room.member", &carols_ghost(&carol)).await["membership"] == "ban"
        })
        .await;
        so("the demotion here", || async {
            scene.gateway.matrix_state(&scene.room, LEVELS).await.unwrap()["users"][scene.moderator.as_str()] == 0
        })
        .await;
        // There: the moderator sets topics and rules, and carol speaks and changes her name.
        let (peer, moderator) = (&scene.world.peer, &scene.moderator);
        let mut late = vec![
            fork.add(peer, moderator, TOPIC, Some(""), json!({ "topic": "ours" })).1,
            fork.add(peer, moderator, RULES, Some(""), json!({ "join_rule": "invite" })).1,
            fork.say(peer, &carol, "I am here").1,
        ];
        let name = json!({ "membership": "join", "displayname": "Carol the unbanned" });
        late.push(fork.add(peer, &carol, "m.room.member", Some(carol.as_str()), name).1);
        late.push(fork.say(peer, moderator, "are we?").1);
        for event in &late {
            // What is soft-failed is answered like what is taken.
            scene.put(event).await.unwrap();
        }
        for event in &late {
            let _ = peer.put(&scene.home.0.dag, &[event]).await;
        }
        scene.hears("are we?").await;
        scene.all_is_well().await;
        let members = scene.gateway.matrix_member(&scene.room, carol.as_str()).await.unwrap();
        assert_eq!(members["membership"], "ban");
        assert_eq!(scene.in_log("m.room.member", &carols_ghost(&carol)).await["membership"], "ban");
        assert!(!scene.heard().await.contains(&"I am here".to_owned()));
        assert_eq!(object(scene.in_log(RULES, "").await)["join_rule"], "public");
        assert_eq!(scene.in_log(TOPIC, "").await, Value::Null);
    }
}

fn carols_ghost(carol: &UserId) -> String {
    ghost(Side::Matrix, carol.localpart())
}
