//! A Matrix room that lives elsewhere, and the LM room that the gateway made of it: the graph has authority, and the gateway's bot may
//! have no power in it.

use std::sync::Arc;

use isthmus::bridge::{Cause, Portal, PortalKind, PortalState};
use isthmus::dag::NewRoom;
use isthmus::event::{Object, RoomVersion};
use isthmus::identity::Side;
use isthmus::refusal::Refusal;
use isthmus::seam::{Draft, Outgoing};
use ruma::{OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId, RoomId, UserId};
use serde_json::{Value, json};

use super::world::{Gateway, OTHER, World, draft, ghost, message, so, until};
use crate::dag::VERSIONS;

const HOUR: i64 = 3_600_000;

pub(super) fn user(name: &str) -> OwnedUserId {
    UserId::parse(format!("@{name}:{OTHER}")).unwrap()
}

/// The ghost in logs of a user of the homeserver.
pub(super) fn image(name: &str) -> String {
    format!("@mx_{name}_{OTHER}:{}", crate::dag::OWN)
}

pub(super) fn via() -> Vec<OwnedServerName> {
    vec![OTHER.try_into().unwrap()]
}

/// A homeserver: a graph side with the routes of a server, whose users are only those whom a test speaks for.
pub(super) struct Home(pub(super) Gateway);

impl Home {
    pub(super) async fn start(world: &World) -> Self {
        Self(world.other_gateway().await)
    }

    /// A room of alice's.
    pub(super) async fn room(&self, version: RoomVersion, join_rule: Value, more: Vec<Draft>) -> OwnedRoomId {
        let alice = user("alice");
        let rules = draft(&alice, "m.room.join_rules", Some(""), join_rule);
        let name = draft(&alice, "m.room.name", Some(""), json!({ "name": "Tea" }));
        let initial_state = [vec![rules, name], more].concat();
        self.0.dag.create_room(NewRoom { creator: alice, version, initial_state }).await.unwrap()
    }

    pub(super) async fn public(&self, version: RoomVersion) -> OwnedRoomId {
        self.room(version, json!({ "join_rule": "public" }), Vec::new()).await
    }

    pub(super) async fn try_send(&self, room: &RoomId, draft: Draft) -> Result<OwnedEventId, Refusal> {
        let sent = self.0.dag.send(room, vec![Outgoing { draft, effect: None }]).await.remove(0);
        sent.map(|event| event.event_id.clone())
    }

    pub(super) async fn send(
        &self,
        room: &RoomId,
        by: &str,
        kind: &str,
        state_key: Option<&str>,
        content: Value,
    ) -> OwnedEventId {
        self.try_send(room, draft(&user(by), kind, state_key, content)).await.unwrap()
    }

    pub(super) async fn say(&self, room: &RoomId, by: &str, body: &str) -> OwnedEventId {
        self.try_send(room, message(&user(by), body)).await.unwrap()
    }

    pub(super) async fn member(&self, room: &RoomId, by: &str, target: &str, membership: &str) {
        self.send(room, by, "m.room.member", Some(target), json!({ "membership": membership })).await;
    }

    pub(super) async fn join(&self, room: &RoomId, name: &str) {
        let content = json!({ "membership": "join", "displayname": name.to_uppercase() });
        self.send(room, name, "m.room.member", Some(user(name).as_str()), content).await;
    }

    /// Gives these levels, and leaves the others as they are.
    pub(super) async fn empower(&self, room: &RoomId, levels: &[(&str, i64)]) {
        let mut content = Value::Object(self.0.matrix_state(room, "m.room.power_levels").await.unwrap());
        for (user, level) in levels {
            content["users"][user] = json!(level);
        }
        self.send(room, "alice", "m.room.power_levels", Some(""), content).await;
    }

    pub(super) async fn membership(&self, room: &RoomId, user: &str) -> String {
        let content = self.0.matrix_member(room, user).await.unwrap_or_default();
        content.get("membership").and_then(Value::as_str).unwrap_or("leave").to_owned()
    }

    pub(super) async fn invite(&self, room: &RoomId, target: &str) -> Result<(), Refusal> {
        let draft = draft(&user("alice"), "m.room.member", Some(target), json!({ "membership": "invite" }));
        self.0.dag.invite(room, Outgoing { draft, effect: None }).await.map(drop)
    }
}

async fn portal(gateway: &Gateway, room: &RoomId) -> Arc<Portal> {
    gateway.bridge.portal_from_matrix(room, &via(), None, Cause::Admin).await.unwrap()
}

pub(super) async fn is_state(gateway: &Gateway, portal: &Portal, state: PortalState) -> bool {
    gateway.bridge.portal(&portal.portal_id).await.unwrap().is_some_and(|portal| portal.state == state)
}

/// Waits until a member is like this in the log.
pub(super) async fn in_log(gateway: &Gateway, room: &RoomId, user: &str, membership: &str) {
    so(&format!("{user} to be {membership} in the log"), || async {
        gateway.node.membership(room, user).await == membership
    })
    .await;
}

/// Waits until a member is like this at the homeserver.
pub(super) async fn at_home(home: &Home, room: &RoomId, user: &str, membership: &str) {
    so(&format!("{user} to be {membership} in the graph"), || async {
        home.membership(room, user).await == membership
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_room_that_lives_elsewhere_is_bridged_both_ways() {
    let (world, gateway) = World::new(json!({})).await;
    let home = Home::start(&world).await;
    for (number, version) in VERSIONS.into_iter().enumerate() {
        let bob_name = format!("bob{number}");
        let (bob, bobs_ghost) = (world.lm_user(&bob_name), ghost(Side::Lm, &bob_name));
        let room = home.public(version).await;
        home.join(&room, "carol").await;
        let alias = format!("tea{number}");
        let portal = gateway.bridge.portal_from_matrix(&room, &via(), Some(&alias), Cause::Admin).await.unwrap();
        assert_eq!((portal.kind, portal.state), (PortalKind::FromMatrix, PortalState::Active));
        let lm = &portal.lm_room_id;
        // All members are there, the name, and who has power.
        assert_eq!(gateway.node.membership(lm, &image("alice")).await, "join");
        assert_eq!(gateway.node.state(lm, "m.room.member", &image("carol")).await.unwrap()["displayname"], "CAROL");
        assert_eq!(gateway.node.state(lm, "m.room.name", "").await.unwrap()["name"], "Tea");
        let levels = Value::Object(gateway.node.state(lm, "m.room.power_levels", "").await.unwrap());
        let highest = if version == RoomVersion::V12 { (1_i64 << 53) - 2 } else { 100 };
        assert_eq!(levels["users"][image("alice")], highest);

        // The ghost is in the Matrix room before the user is in the LM room.
        world.lm_join(lm, &bob_name).await.unwrap();
        assert_eq!(gateway.matrix_member(&room, &bobs_ghost).await.unwrap()["membership"], "join");
        at_home(&home, &room, &bobs_ghost, "join").await;
        home.join(&room, "dave").await;
        in_log(&gateway, lm, &image("dave"), "join").await;

        let hello = home.say(&room, "alice", "hello").await;
        let said = (image("alice"), "hello".to_owned());
        so("hello in the log", || async { world.server.bodies(lm).await.contains(&said) }).await;
        let across = until("its image", || async { gateway.bridge.explain(&hello).await.unwrap()?.across }).await;
        let answer = json!({
            "msgtype": "m.text", "body": "hi", "m.relates_to": { "m.in_reply_to": { "event_id": across } },
        });
        world.lm_send(lm, draft(&bob, "m.room.message", None, answer)).await;
        let hi = (bobs_ghost.clone(), "hi".to_owned());
        so("hi at home", || async { home.0.matrix_bodies(&room).await.contains(&hi) }).await;
        let events = home.0.matrix_events(&room).await;
        let reply = events.iter().find(|(_, event)| event["content"].get("body") == Some(&json!("hi"))).unwrap();
        assert_eq!(reply.1["content"]["m.relates_to"]["m.in_reply_to"]["event_id"], json!(hello));
        let redacts = json!({ "redacts": reply.0, "reason": "no" });
        home.send(&room, "alice", "m.room.redaction", None, redacts).await;
        so("it to be redacted in the log", || async {
            !world.server.bodies(lm).await.iter().any(|said| said.1 == "hi")
        })
        .await;

        // Who has no power in the Matrix room changes nothing, and what they changed in the log is taken back.
        home.empower(&room, &[(&bobs_ghost, 50)]).await;
        so("bob to have power", || async {
            let levels = world.server.state(lm, "m.room.power_levels", "").await.unwrap();
            levels["users"].get(bob.as_str()) == Some(&json!(50))
        })
        .await;
        world.lm_send(lm, draft(&bob, "m.room.topic", Some(""), json!({ "topic": "green" }))).await;
        so("the topic at home", || async {
            home.0.matrix_state(&room, "m.room.topic").await.is_some_and(|content| content["topic"] == "green")
        })
        .await;
        let kick = draft(&bob, "m.room.member", Some(&image("dave")), json!({ "membership": "leave" }));
        world.lm_send(lm, kick).await;
        at_home(&home, &room, user("dave").as_str(), "leave").await;
        so("both states in step", || gateway.in_step(&portal)).await;

        home.member(&room, "carol", user("carol").as_str(), "leave").await;
        in_log(&gateway, lm, &image("carol"), "leave").await;
        home.member(&room, "alice", &bobs_ghost, "ban").await;
        in_log(&gateway, lm, bob.as_str(), "ban").await;
        let refusal = world.lm_join(lm, &bob_name).await.unwrap_err();
        assert_eq!(refusal.code(), "forbidden", "{refusal}");
        so("both states in step", || gateway.in_step(&portal)).await;
        assert!(is_state(&gateway, &portal, PortalState::Active).await);
        // Asked for again it is the same.
        assert_eq!(self::portal(&gateway, &room).await.portal_id, portal.portal_id);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn levels_that_are_set_in_the_log_change_what_was_changed_and_nothing_else() {
    let (world, gateway) = World::new(json!({})).await;
    let home = Home::start(&world).await;
    for (number, version) in VERSIONS.into_iter().enumerate() {
        let name = format!("bob{number}");
        let (bob, bobs_ghost) = (world.lm_user(&name), ghost(Side::Lm, &name));
        let room = home.public(version).await;
        let mut content = Value::Object(home.0.matrix_state(&room, "m.room.power_levels").await.unwrap());
        content["users"][&bobs_ghost] = json!(90);
        for (kind, level) in [("m.room.power_levels", 90), ("m.room.encryption", 95), ("m.room.name", 1)] {
            content["events"][kind] = json!(level);
        }
        content["notifications"] = json!({ "room": 20 });
        home.send(&room, "alice", "m.room.power_levels", Some(""), content.clone()).await;
        let portal = portal(&gateway, &room).await;
        let lm = &portal.lm_room_id;
        world.lm_join(lm, &name).await.unwrap();
        at_home(&home, &room, &bobs_ghost, "join").await;

        let mut levels = Value::Object(gateway.node.state(lm, "m.room.power_levels", "").await.unwrap());
        assert_eq!(levels["users"][bob.as_str()], 90);
        levels["users"][image("carol")] = json!(7);
        levels["events"]["m.room.topic"] = json!(5);
        levels["kick"] = json!(60);
        levels.as_object_mut().unwrap().retain(|key, _| !key.starts_with("im.isthmus."));
        world.lm_send(lm, draft(&bob, "m.room.power_levels", Some(""), levels)).await;
        content["users"][user("carol").as_str()] = json!(7);
        content["events"]["m.room.topic"] = json!(5);
        content["kick"] = json!(60);
        so("the levels at home", || async {
            let mut there = home.0.matrix_state(&room, "m.room.power_levels").await.unwrap();
            there.retain(|key, _| !key.starts_with("im.isthmus."));
            Value::Object(there) == content
        })
        .await;
        so("both states in step", || gateway.in_step(&portal)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_not_invited_into_a_private_room_is_told_why_and_who_is_comes_in() {
    let (world, gateway) = World::new(json!({ "access": { "admins": [user("alice")] } })).await;
    let home = Home::start(&world).await;
    let room = home.room(RoomVersion::V11, json!({ "join_rule": "invite" }), Vec::new()).await;
    let refusal = gateway.bridge.portal_from_matrix(&room, &via(), None, Cause::Admin).await.unwrap_err();
    assert_eq!(refusal.code(), "forbidden", "{refusal}");
    // An admin of the gateway invites its bot.
    home.invite(&room, gateway.bot().as_str()).await.unwrap();
    let portal = until("the portal", || async {
        gateway.bridge.portals(None, 10).await.unwrap().into_iter().find(|portal| portal.state == PortalState::Active)
    })
    .await;
    assert_eq!((portal.kind, &portal.matrix_room_id), (PortalKind::FromMatrix, &room));
    let lm = &portal.lm_room_id;
    let refusal = world.lm_join(lm, "bob").await.unwrap_err();
    assert_eq!(refusal.code(), "forbidden", "{refusal}");

    let bobs_ghost = ghost(Side::Lm, "bob");
    home.invite(&room, &bobs_ghost).await.unwrap();
    in_log(&gateway, lm, world.lm_user("bob").as_str(), "invite").await;
    world.lm_join(lm, "bob").await.unwrap();
    at_home(&home, &room, &bobs_ghost, "join").await;
    // Of those who may invite there, one does so from here.
    let carol = world.lm_user("carol");
    let invite = draft(&world.lm_user("bob"), "m.room.member", Some(carol.as_str()), json!({ "membership": "invite" }));
    world.lm_send(lm, invite).await;
    at_home(&home, &room, &ghost(Side::Lm, "carol"), "invite").await;
    world.lm_join(lm, "carol").await.unwrap();
    at_home(&home, &room, &ghost(Side::Lm, "carol"), "join").await;
    so("both states in step", || gateway.in_step(&portal)).await;

    // The invite taken back in the Matrix room: the log's is too, and so nobody comes in by it.
    home.invite(&room, &ghost(Side::Lm, "dave")).await.unwrap();
    in_log(&gateway, lm, world.lm_user("dave").as_str(), "invite").await;
    home.member(&room, "alice", &ghost(Side::Lm, "dave"), "leave").await;
    in_log(&gateway, lm, world.lm_user("dave").as_str(), "leave").await;
    world.lm_join(lm, "dave").await.unwrap_err();
    assert_eq!(home.membership(&room, &ghost(Side::Lm, "dave")).await, "leave");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_those_who_may_have_a_portal_made_by_inviting_the_bot() {
    let (world, gateway) = World::new(json!({})).await;
    let home = Home::start(&world).await;
    let room = home.public(RoomVersion::V12).await;
    let refusal = home.invite(&room, gateway.bot().as_str()).await.unwrap_err();
    assert!(refusal.to_string().contains("create_by_matrix_invite"), "{refusal}");
    assert!(gateway.bridge.portals(None, 10).await.unwrap().is_empty());

    let access = json!({ "create_by_matrix_invite": [OTHER] });
    let (world, gateway) = World::new(json!({ "access": access })).await;
    let home = Home::start(&world).await;
    let room = home.public(RoomVersion::V12).await;
    home.invite(&room, gateway.bot().as_str()).await.unwrap();
    let portal = until("the portal", || async {
        gateway.bridge.portals(None, 10).await.unwrap().into_iter().find(|portal| portal.state == PortalState::Active)
    })
    .await;
    // Nobody of LM comes: it ends, though Matrix users are in.
    world.advance(25 * HOUR);
    gateway.bridge.look_for_ends().await.unwrap();
    assert!(is_state(&gateway, &portal, PortalState::Ended).await);
    at_home(&home, &room, gateway.bot().as_str(), "leave").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_room_for_a_portal_is_refused_by_name() {
    let (world, gateway) = World::new(json!({ "access": { "matrix_servers": [OTHER] } })).await;
    let home = Home::start(&world).await;
    let encryption =
        draft(&user("alice"), "m.room.encryption", Some(""), json!({ "algorithm": "m.megolm.v1.aes-sha2" }));
    let room = home.public(RoomVersion::V11).await;
    home.try_send(&room, encryption).await.unwrap();
    let refusal = gateway.bridge.portal_from_matrix(&room, &via(), None, Cause::Admin).await.unwrap_err();
    assert_eq!(refusal.code(), "encryption", "{refusal}");
    at_home(&home, &room, gateway.bot().as_str(), "leave").await;

    let denied = draft(&user("alice"), "m.room.server_acl", Some(""), json!({ "allow": [OTHER], "deny": [] }));
    let room = home.public(RoomVersion::V11).await;
    home.try_send(&room, denied).await.unwrap();
    gateway.bridge.portal_from_matrix(&room, &via(), None, Cause::Admin).await.unwrap_err();

    let own = gateway.public_portal().await;
    let same = gateway.bridge.portal_from_matrix(&own.matrix_room_id, &via(), None, Cause::Admin).await.unwrap();
    assert_eq!(same.portal_id, own.portal_id, "a room has one portal");
    gateway.bridge.remove_portal(&own.portal_id, "over").await.unwrap();
    let nowhere = home.public(RoomVersion::V12).await;
    for (room, via, code) in [
        (&own.matrix_room_id, via(), "forbidden"),
        (&own.lm_room_id, via(), "malformed"),
        (&nowhere, vec!["evil.example".try_into().unwrap()], "policy"),
    ] {
        let refusal = gateway.bridge.portal_from_matrix(room, &via, None, Cause::Admin).await.unwrap_err();
        assert_eq!(refusal.code(), code, "{refusal}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bot_that_is_sent_out_suspends_the_portal_and_comes_back_when_it_is_asked() {
    let (world, gateway) = World::new(json!({ "access": { "admins": [user("alice")] } })).await;
    let home = Home::start(&world).await;
    let room = home.public(RoomVersion::V12).await;
    let portal = portal(&gateway, &room).await;
    let lm = &portal.lm_room_id;
    world.lm_join(lm, "bob").await.unwrap();
    let bobs_ghost = ghost(Side::Lm, "bob");
    at_home(&home, &room, &bobs_ghost, "join").await;
    home.member(&room, "alice", gateway.bot().as_str(), "leave").await;
    so("the portal to be suspended", || is_state(&gateway, &portal, PortalState::Suspended)).await;
    let reason = gateway.bridge.portal(&portal.portal_id).await.unwrap().unwrap().reason.clone().unwrap();
    assert!(reason.contains("kicked"), "{reason}");
    world.advance(HOUR + 1);
    gateway.bridge.look_for_ends().await.unwrap();
    at_home(&home, &room, &bobs_ghost, "leave").await;
    in_log(&gateway, lm, &image("alice"), "leave").await;

    home.send(&room, "alice", "m.room.topic", Some(""), json!({ "topic": "meanwhile" })).await;
    home.invite(&room, gateway.bot().as_str()).await.unwrap();
    so("the portal to be active", || is_state(&gateway, &portal, PortalState::Active)).await;
    at_home(&home, &room, &bobs_ghost, "join").await;
    so("both states in step", || gateway.in_step(&portal)).await;
    assert_eq!(gateway.node.state(lm, "m.room.topic", "").await.unwrap()["topic"], "meanwhile");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_room_that_turns_encryption_on_or_denies_the_gateway_loses_its_portal() {
    let (world, gateway) = World::new(json!({})).await;
    let home = Home::start(&world).await;
    let encryption = ("m.room.encryption", json!({ "algorithm": "m.megolm.v1.aes-sha2" }));
    let denial = ("m.room.server_acl", json!({ "allow": ["*"], "deny": [crate::dag::OWN] }));
    for (number, (kind, content)) in [encryption, denial].into_iter().enumerate() {
        let name = format!("bob{number}");
        let room = home.public(RoomVersion::V12).await;
        let portal = portal(&gateway, &room).await;
        world.lm_join(&portal.lm_room_id, &name).await.unwrap();
        at_home(&home, &room, &ghost(Side::Lm, &name), "join").await;
        let event = home.send(&room, "alice", kind, Some(""), content).await;
        so("it to arrive", || async { gateway.dag.event(&event).await.unwrap().is_some() }).await;
        if kind == "m.room.encryption" {
            world.lm_say(&portal.lm_room_id, &name, "in the clear").await;
        }
        so("the portal to end", || is_state(&gateway, &portal, PortalState::Ended)).await;
        let said = gateway.matrix_bodies(&room).await;
        assert!(!said.iter().any(|(_, body)| body == "in the clear"), "{said:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_room_that_was_replaced_hands_its_portal_on() {
    let (world, gateway) = World::new(json!({})).await;
    let home = Home::start(&world).await;
    let (room, next) = (home.public(RoomVersion::V12).await, home.public(RoomVersion::V11).await);
    let portal = portal(&gateway, &room).await;
    world.lm_join(&portal.lm_room_id, "bob").await.unwrap();
    let tombstone = json!({ "body": "moved", "replacement_room": next });
    home.send(&room, "alice", "m.room.tombstone", Some(""), tombstone).await;
    so("the portal to end", || is_state(&gateway, &portal, PortalState::Ended)).await;
    let portals = gateway.bridge.portals(None, 10).await.unwrap();
    let new = portals.iter().find(|portal| portal.matrix_room_id == next).unwrap();
    assert_eq!((new.kind, new.state), (PortalKind::FromMatrix, PortalState::Active));
    let leads = gateway.node.state(&portal.lm_room_id, "m.room.tombstone", "").await.unwrap();
    assert_eq!(leads["replacement_room"], json!(new.lm_room_id));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_room_that_nobody_of_matrix_is_in_any_more_loses_its_portal_after_an_hour() {
    let (world, gateway) = World::new(json!({})).await;
    let home = Home::start(&world).await;
    let room = home.public(RoomVersion::V11).await;
    home.join(&room, "carol").await;
    let portal = portal(&gateway, &room).await;
    world.lm_join(&portal.lm_room_id, "bob").await.unwrap();
    at_home(&home, &room, &ghost(Side::Lm, "bob"), "join").await;
    home.member(&room, "carol", user("carol").as_str(), "leave").await;
    in_log(&gateway, &portal.lm_room_id, &image("carol"), "leave").await;
    let look = async |hours: i64| {
        world.advance(hours * HOUR + 1);
        gateway.bridge.look_for_ends().await.unwrap();
    };
    look(2).await;
    assert!(is_state(&gateway, &portal, PortalState::Active).await, "alice is there");
    home.member(&room, "alice", user("alice").as_str(), "leave").await;
    in_log(&gateway, &portal.lm_room_id, &image("alice"), "leave").await;
    // That it is empty is noticed a moment later, and waited for from then on.
    so("the portal to end", || async {
        look(2).await;
        is_state(&gateway, &portal, PortalState::Ended).await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_making_that_was_broken_off_is_taken_up() {
    let (world, gateway) = World::new(json!({})).await;
    let home = Home::start(&world).await;
    let room = home.public(RoomVersion::V12).await;
    for number in 0..60 {
        home.join(&room, &format!("user{number}")).await;
    }
    world.break_portals("active").await;
    let (bridge, id) = (gateway.bridge.clone(), room.clone());
    let making = tokio::spawn(async move { bridge.portal_from_matrix(&id, &via(), None, Cause::Admin).await });
    // Everything is made, and cannot be written down.
    so("the last ghost", || async {
        let rooms = sqlx::query_scalar::<_, String>("SELECT room_id FROM lm_rooms");
        let rooms = rooms.fetch_all(gateway.node.context.store.reader()).await.unwrap();
        let Some(lm) = rooms.first().map(|id| RoomId::parse(id).unwrap()) else { return false };
        gateway.node.membership(&lm, &image("user59")).await == "join"
    })
    .await;
    let gateway = world.kill(gateway).await;
    drop(making.await);
    home.say(&room, "alice", "while it was away").await;
    world.mend_inserts("bridge_portals").await;
    let portal = until("the portal", || async {
        gateway.bridge.portals(None, 10).await.unwrap().into_iter().find(|portal| portal.state == PortalState::Active)
    })
    .await;
    world.lm_join(&portal.lm_room_id, "bob").await.unwrap();
    home.say(&room, "alice", "hello").await;
    let expected = ["while it was away", "hello"].map(|body| (image("alice"), body.to_owned()));
    so("what was said in the log", || async { gateway.node.bodies(&portal.lm_room_id).await == expected }).await;
    let joins = gateway.node.log(&portal.lm_room_id).await;
    let joins = joins.iter().filter(|event| event.event.content().get("membership") == Some(&json!("join")));
    // The bot, alice, the sixty, bob: each once.
    assert_eq!(joins.count(), 63);
    so("both states in step", || gateway.in_step(&portal)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whom_the_policy_keeps_out_stays_in_the_matrix_room_and_is_counted() {
    // A portal is made by way of a server whose users take part, of a room in which others are.
    let (world, gateway) = World::new(json!({ "access": { "matrix_servers": [OTHER] } })).await;
    let home = Home::start(&world).await;
    let room = home.public(RoomVersion::V11).await;
    let portal = portal(&gateway, &room).await;
    let mallory = world.matrix_user("mallory");
    let mut view = world.matrix_join(&home.0, &room, &mallory).await.unwrap();
    world.matrix_say(&home.0, &mut view, &mallory, "let me in").await;
    let hello = home.say(&room, "alice", "hello").await;
    until("hello across", || async { gateway.bridge.explain(&hello).await.unwrap()?.across }).await;
    assert_eq!(gateway.node.bodies(&portal.lm_room_id).await, [(image("alice"), "hello".to_owned())]);
    assert_eq!(gateway.matrix_member(&room, mallory.as_str()).await.unwrap()["membership"], "join");
    let health = gateway.bridge.health(&portal.portal_id).await.unwrap();
    assert_eq!(health.members.kept_out, [mallory]);
    assert!(gateway.in_step(&portal).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_said_before_is_said_again_once_and_what_not_all_may_read_is_not() {
    let (world, gateway) = World::new(json!({ "portals": { "import_history": 6 } })).await;
    let home = Home::start(&world).await;
    for version in VERSIONS {
        let room = home.public(version).await;
        for name in ["carol", "dave", "erin"] {
            home.join(&room, name).await;
        }
        let old = home.say(&room, "alice", "too long ago").await;
        let from = home.say(&room, "dave", "from dave").await;
        home.say(&room, "erin", "from erin").await;
        home.member(&room, "dave", user("dave").as_str(), "leave").await;
        home.member(&room, "alice", user("erin").as_str(), "ban").await;
        let answer =
            json!({ "msgtype": "m.text", "body": "yes", "m.relates_to": { "m.in_reply_to": { "event_id": from } } });
        home.send(&room, "carol", "m.room.message", None, answer).await;
        let slip = home.say(&room, "carol", "a slip").await;
        let portal = portal(&gateway, &room).await;
        let lm = &portal.lm_room_id;
        let said = gateway.node.bodies(lm).await;
        let expected = [
            (image("dave"), "from dave".to_owned()),
            (gateway.bot().to_string(), format!("{} said: from erin", user("erin"))),
            (image("carol"), "yes".to_owned()),
            (image("carol"), "a slip".to_owned()),
        ];
        assert_eq!(said, expected);
        assert_eq!(gateway.node.membership(lm, &image("dave")).await, "leave");
        let log = gateway.node.log(lm).await;
        let of = |body: &str| log.iter().find(|event| event.event.content().get("body") == Some(&json!(body))).unwrap();
        let reply = of("yes").event.content().clone();
        let from_dave = of("from dave");
        assert_eq!(reply["m.relates_to"]["m.in_reply_to"]["event_id"], json!(from_dave.event.event_id));
        assert_eq!(from_dave.event.content()["im.isthmus.source"]["event_id"], json!(from));
        let source = |event: &Object| Some(event.get("im.isthmus.source")?["event_id"].clone());
        assert!(!log.iter().any(|event| source(event.event.content()) == Some(json!(old))));
        // Who said it takes it back.
        home.send(&room, "carol", "m.room.redaction", None, json!({ "redacts": slip })).await;
        let is_gone = || async { !gateway.node.bodies(lm).await.iter().any(|said| said.1 == "a slip") };
        so("the slip to be gone", is_gone).await;
        so("both states in step", || gateway.in_step(&portal)).await;
    }
    let visibility =
        draft(&user("alice"), "m.room.history_visibility", Some(""), json!({ "history_visibility": "joined" }));
    let room = home.room(RoomVersion::V11, json!({ "join_rule": "public" }), vec![visibility]).await;
    home.say(&room, "alice", "among us").await;
    let portal = portal(&gateway, &room).await;
    assert!(gateway.node.bodies(&portal.lm_room_id).await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_large_room_as_many_come_in_as_the_budget_allows_and_the_rest_by_repair() {
    let members: usize = std::env::var("ISTHMUS_TEST_MEMBERS").map_or(500, |members| members.parse().unwrap());
    let an_hour = members * 2 / 5;
    let (world, gateway) = World::new(json!({ "budgets": { "ghosts_per_hour": an_hour } })).await;
    let home = Home::start(&world).await;
    let room = home.public(RoomVersion::V11).await;
    let joins: Vec<Outgoing> = (0..members)
        .map(|number| {
            let user = user(&format!("user{number}"));
            let content = json!({ "membership": "join" });
            Outgoing { draft: draft(&user, "m.room.member", Some(user.as_str()), content), effect: None }
        })
        .collect();
    for joins in joins.chunks(100) {
        assert!(home.0.dag.send(&room, joins.to_vec()).await.iter().all(Result::is_ok));
    }
    let begun = std::time::Instant::now();
    let portal = portal(&gateway, &room).await;
    eprintln!("a room of {members} members was joined and made in {:?}", begun.elapsed());
    let ghosts = async || {
        let state = gateway.node.lm.state(&portal.lm_room_id).await.unwrap();
        let is_in = |event: &isthmus::event::Pdu| event.content().get("membership") == Some(&json!("join"));
        state.of_kind("m.room.member").filter(|(user, event)| user.starts_with("@mx_") && is_in(event)).count()
    };
    let some = ghosts().await;
    assert!((an_hour..an_hour + 10).contains(&some), "{some}");
    for _ in 0..2 {
        world.advance(HOUR);
        gateway.bridge.repair(&portal.portal_id).await.unwrap();
    }
    so("all ghosts", || async { ghosts().await == members + 1 }).await;
    let hello = home.say(&room, "user7", "hello").await;
    until("hello in the log", || async { gateway.bridge.explain(&hello).await.unwrap()?.across }).await;
}
