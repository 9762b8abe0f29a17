//! The graph side alone, in this process, against stock Synapses.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum_server::tls_rustls::RustlsConfig;
use isthmus::clock::{Clock as _, SystemClock};
use isthmus::dag::{Dag, NewRoom};
use isthmus::event::RoomVersion;
use isthmus::federation::Context;
use isthmus::gateway::{Federation, context, federation_routes};
use isthmus::identity::Side;
use isthmus::lm::Lm;
use isthmus::seam::{AliasTarget, Draft, Outgoing};
use isthmus::store::inbox;
use ruma::{OwnedEventId, OwnedRoomId, OwnedUserId, RoomId};
use serde_json::{Value, json};

use super::object;
use crate::support::between::Watcher;
use crate::support::testbed::certificates::Authority;
use crate::support::testbed::process::free_port;
use crate::support::testbed::synapse::{self, Synapse};

struct House {
    context: Context,
    dag: Dag,
    town: Arc<Watcher>,
    name: String,
    _directory: tempfile::TempDir,
    handle: axum_server::Handle<SocketAddr>,
}

impl House {
    async fn open(authority: &Authority) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let port = free_port().unwrap();
        let name = format!("localhost:{port}");
        let config = json!({
            "server_name": name, "signing_key": directory.path().join("key"),
            "database": { "url": format!("sqlite://{}", directory.path().join("db").display()) },
            "federation": { "custom_ca": [authority.file], "allow_private_networks": true },
        });
        let context = context(serde_json::from_value(config).unwrap(), Arc::new(SystemClock)).await.unwrap();
        let town = Arc::new(Watcher::default());
        let dag = Dag::new(context.clone(), town.clone());
        let lm = Lm::new(context.clone(), town.clone());
        let routes = federation_routes(Federation::new(context.clone(), lm, dag.clone(), town.clone()));
        let tls = authority.issue(directory.path()).unwrap();
        let tls = RustlsConfig::from_pem_file(tls.certificate, tls.key).await.unwrap();
        let handle = axum_server::Handle::new();
        let server = axum_server::bind_rustls(([127, 0, 0, 1], port).into(), tls).handle(handle.clone());
        tokio::spawn(server.serve(routes.into_make_service()));
        handle.listening().await.unwrap();
        context.outbound.start().await.unwrap();
        Self { context, dag, town, name, _directory: directory, handle }
    }

    fn user(&self, name: &str) -> OwnedUserId {
        format!("@{name}:{}", self.name).try_into().unwrap()
    }

    fn draft(&self, sender: &str, kind: &str, state_key: Option<&str>, content: Value) -> Draft {
        Draft {
            sender: self.user(sender),
            kind: kind.to_owned(),
            state_key: state_key.map(str::to_owned),
            content: object(content),
            origin_server_ts: SystemClock.now_ms(),
        }
    }

    async fn room(&self, version: RoomVersion, alias: &str, join_rule: &str) -> OwnedRoomId {
        let alias = format!("#{alias}:{}", self.name);
        let initial_state = vec![
            self.draft("isthmus", "m.room.join_rules", Some(""), json!({ "join_rule": join_rule })),
            self.draft("isthmus", "m.room.name", Some(""), json!({ "name": "Across" })),
            self.draft("isthmus", "m.room.canonical_alias", Some(""), json!({ "alias": alias })),
        ];
        let new = NewRoom { creator: self.user("isthmus"), version, initial_state };
        let room = self.dag.create_room(new).await.unwrap();
        let target = AliasTarget { room_id: room.clone(), servers: vec![self.name.as_str().try_into().unwrap()] };
        self.town.aliases.lock().unwrap().push((alias, target));
        room
    }

    async fn send(&self, room: &RoomId, draft: Draft) -> OwnedEventId {
        let results = self.dag.send(room, vec![Outgoing { draft, effect: None }]).await;
        results.into_iter().next().unwrap().unwrap().event_id.clone()
    }

    async fn member(&self, room: &RoomId, user: &str, membership: &str) {
        let target = if user.starts_with('@') { user.to_owned() } else { self.user(user).to_string() };
        let sender = if user.starts_with('@') { "isthmus" } else { user };
        let content = json!({ "membership": membership, "displayname": "Bob" });
        self.send(room, self.draft(sender, "m.room.member", Some(&target), content)).await;
    }

    async fn say(&self, room: &RoomId, sender: &str, body: &str) -> OwnedEventId {
        self.send(room, self.draft(sender, "m.room.message", None, json!({ "msgtype": "m.text", "body": body }))).await
    }

    /// Waits until an event is in the inbox; the inbox is what the bridge sees.
    async fn wait_for(&self, room: &RoomId, event_id: &str) {
        self.eventually(&format!("event {event_id}"), async || self.inbox(room).await.iter().any(|id| id == event_id))
            .await;
    }

    async fn inbox(&self, room: &RoomId) -> Vec<OwnedEventId> {
        let rows = inbox::waiting(&self.context.store, Side::Matrix, room, 0, 10_000).await.unwrap();
        rows.into_iter().map(|row| row.event_id).collect()
    }

    async fn eventually(&self, what: &str, mut holds: impl AsyncFnMut() -> bool) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
        while !holds().await {
            assert!(tokio::time::Instant::now() < deadline, "waited in vain for {what}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn same_state_as(&self, room: &RoomId, client: &crate::support::testbed::client::Client) {
        self.eventually("the same state", async || {
            let theirs = client.full_state(room.as_str()).await.unwrap();
            let mut theirs: Vec<_> =
                theirs.iter().map(|event| event["event_id"].as_str().unwrap().to_owned()).collect();
            let ours = self.dag.state(room).await.unwrap();
            let mut ours: Vec<_> = ours.values().map(|event| event.event_id.to_string()).collect();
            theirs.sort();
            ours.sort();
            ours == theirs
        })
        .await;
    }
}

impl Drop for House {
    fn drop(&mut self) {
        self.handle.shutdown();
    }
}

async fn start(directory: &std::path::Path, authority: &Authority) -> Synapse {
    synapse::Plan::new(directory).unwrap().start(authority, None).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stock_synapse_joins_by_alias_and_talks_in_each_version() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new(directory.path()).unwrap();
    let house = House::open(&authority).await;
    let synapse = start(&directory.path().join("a"), &authority).await;
    let alice = synapse.register("alice", "secret").await.unwrap();
    for version in super::VERSIONS {
        let room = house.room(version, &format!("room{version}"), "public").await;
        house.say(&room, "isthmus", "earlier").await;
        let joined = alice.join(&format!("#room{version}:{}", house.name), &[]).await.unwrap();
        assert_eq!(joined, room.as_str());
        house.member(&room, "bob", "join").await;
        house.say(&room, "bob", "hello from bob").await;
        alice.wait_for_text(room.as_str(), "hello from bob").await.unwrap();
        let sent = alice.send_text(room.as_str(), "hello from alice").await.unwrap();
        house.wait_for(&room, &sent).await;
        let topic = alice.state(room.as_str(), "m.room.name", "").await.unwrap().unwrap();
        assert_eq!(topic["name"], "Across");
        house.same_state_as(&room, &alice).await;

        house.member(&room, &alice.user_id, "leave").await;
        alice.wait_for_member(room.as_str(), &alice.user_id, "leave").await.unwrap();
        alice.join(&format!("#room{version}:{}", house.name), &[]).await.unwrap();
        alice.leave(room.as_str()).await.unwrap();
        let user: OwnedUserId = alice.user_id.as_str().try_into().unwrap();
        house.eventually("alice to leave", async || !house.dag.joined(&room).await.unwrap().contains(&user)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn invites_go_both_ways() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new(directory.path()).unwrap();
    let house = House::open(&authority).await;
    let synapse = start(&directory.path().join("a"), &authority).await;
    let alice = synapse.register("alice", "secret").await.unwrap();
    for version in super::VERSIONS {
        let room = house.room(version, &format!("room{version}"), "invite").await;
        assert!(alice.join(room.as_str(), &[&house.name]).await.is_err());
        let invite = house.draft("isthmus", "m.room.member", Some(&alice.user_id), json!({ "membership": "invite" }));
        house.dag.invite(&room, Outgoing { draft: invite, effect: None }).await.unwrap();
        assert_eq!(alice.wait_for_invite().await.unwrap(), room.as_str());
        house.member(&room, &alice.user_id, "leave").await;
        alice.wait_for_member(room.as_str(), &alice.user_id, "leave").await.unwrap();
        let invite = house.draft("isthmus", "m.room.member", Some(&alice.user_id), json!({ "membership": "invite" }));
        house.dag.invite(&room, Outgoing { draft: invite, effect: None }).await.unwrap();
        assert_eq!(alice.wait_for_invite().await.unwrap(), room.as_str());
        alice.join(room.as_str(), &[&house.name]).await.unwrap();
        alice.wait_for_member(room.as_str(), &alice.user_id, "join").await.unwrap();
        house.same_state_as(&room, &alice).await;
    }
    let there = alice.create_room(json!({ "preset": "private_chat" })).await.unwrap();
    alice.invite(&there, house.user("bob").as_str()).await.unwrap();
    let invite = house.town.invites.lock().unwrap().pop().unwrap();
    assert_eq!((invite.room_id.as_str(), invite.target), (there.as_str(), house.user("bob")));
    assert!(!invite.stripped_state.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn two_synapses_and_the_gateway_speak_and_decide_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new(directory.path()).unwrap();
    let house = House::open(&authority).await;
    let (one, two) = (directory.path().join("a"), directory.path().join("b"));
    let (one, two) = tokio::join!(start(&one, &authority), start(&two, &authority));
    let alice = one.register("alice", "secret").await.unwrap();
    let carol = two.register("carol", "secret").await.unwrap();
    let room = house.room(RoomVersion::V12, "busy", "public").await;
    let levels = json!({ "users": { (alice.user_id.as_str()): 50, (carol.user_id.as_str()): 50 },
        "state_default": 50, "events": { "m.room.tombstone": 150 } });
    house.send(&room, house.draft("isthmus", "m.room.power_levels", Some(""), levels)).await;
    let alias = format!("#busy:{}", house.name);
    alice.join(&alias, &[]).await.unwrap();
    carol.join(&alias, &[]).await.unwrap();
    alice.wait_for_member(room.as_str(), &carol.user_id, "join").await.unwrap();

    let mut ids = Vec::new();
    for round in 0..15 {
        let text = format!("round {round}");
        let (a, c, _) = tokio::join!(
            alice.send_text(room.as_str(), &text),
            carol.send_text(room.as_str(), &text),
            house.say(&room, "isthmus", &text),
        );
        ids.extend([a.unwrap(), c.unwrap()]);
        if round % 3 == 0 {
            let topic = |who: &str| json!({ "topic": format!("{who} {round}") });
            let (a, c) = tokio::join!(
                alice.set_state(room.as_str(), "m.room.topic", "", topic("alice")),
                carol.set_state(room.as_str(), "m.room.topic", "", topic("carol")),
            );
            ids.extend([a.unwrap(), c.unwrap()]);
        }
    }
    for id in &ids {
        house.wait_for(&room, id).await;
    }
    let inbox = house.inbox(&room).await;
    for (place, id) in inbox.iter().enumerate() {
        let event = house.dag.event(id).await.unwrap().unwrap();
        for prev in &event.prev_events {
            assert!(inbox.iter().position(|other| other == prev).is_none_or(|other| other < place));
        }
    }
    let last = house.say(&room, "isthmus", "the end").await;
    alice.wait_for_text(room.as_str(), "the end").await.unwrap();
    carol.wait_for_text(room.as_str(), "the end").await.unwrap();
    house.same_state_as(&room, &alice).await;
    house.same_state_as(&room, &carol).await;
    assert!(house.dag.event(&last).await.unwrap().is_some());
    // Who comes later reads what was said before.
    let dora = two.register("dora", "secret").await.unwrap();
    dora.join(&alias, &[]).await.unwrap();
    let history = dora.history(room.as_str()).await.unwrap();
    assert!(history.iter().any(|event| event["content"]["body"] == "round 0"));
}

/// The versions in which the gateway joins the rooms of others.
const JOINED: [&str; 7] = ["6", "7", "8", "9", "10", "11", "12"];

#[tokio::test(flavor = "multi_thread")]
async fn rooms_of_a_stock_synapse_are_joined_in_each_version() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new(directory.path()).unwrap();
    let house = House::open(&authority).await;
    let (one, two) = (directory.path().join("a"), directory.path().join("b"));
    let (one, two) = tokio::join!(start(&one, &authority), start(&two, &authority));
    let alice = one.register("alice", "secret").await.unwrap();
    let carol = two.register("carol", "secret").await.unwrap();
    let via: Vec<ruma::OwnedServerName> = vec![one.server_name.as_str().try_into().unwrap()];
    let bob = house.user("bob");
    for version in JOINED {
        let body = json!({ "room_version": version, "preset": "public_chat", "name": format!("of version {version}") });
        let there = alice.create_room(body).await.unwrap();
        let room: OwnedRoomId = there.as_str().try_into().unwrap();
        carol.join(&there, &[&one.server_name]).await.unwrap();
        alice.send_text(&there, "earlier").await.unwrap();
        let content = object(json!({ "displayname": "Bob" }));
        let joined = house.dag.join(&room, &via, &bob, content).await.unwrap();
        assert_eq!(joined.version.as_str(), version);
        alice.wait_for_member(&there, bob.as_str(), "join").await.unwrap();
        house.same_state_as(&room, &alice).await;
        house.say(&room, "bob", "hello from bob").await;
        // It goes to all servers of the room, by itself.
        tokio::try_join!(alice.wait_for_text(&there, "hello from bob"), carol.wait_for_text(&there, "hello from bob"),)
            .unwrap();
        for client in [&alice, &carol] {
            let sent = client.send_text(&there, "hello back").await.unwrap();
            house.wait_for(&room, &sent).await;
        }
        // A second user needs nobody's help; one who left comes back to a room that went on.
        house.dag.join(&room, &[], &house.user("dave"), object(json!({}))).await.unwrap();
        alice.wait_for_member(&there, house.user("dave").as_str(), "join").await.unwrap();
        for user in ["bob", "dave"] {
            house.dag.leave(&room, &house.user(user), &[], None).await.unwrap();
            alice.wait_for_member(&there, house.user(user).as_str(), "leave").await.unwrap();
        }
        alice.set_state(&there, "m.room.topic", "", json!({ "topic": "without you" })).await.unwrap();
        house.dag.join(&room, &via, &bob, object(json!({}))).await.unwrap();
        house.same_state_as(&room, &alice).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn invites_conditions_and_knocks_of_a_stock_synapse() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new(directory.path()).unwrap();
    let house = House::open(&authority).await;
    let synapse = start(&directory.path().join("a"), &authority).await;
    let alice = synapse.register("alice", "secret").await.unwrap();
    let via: Vec<ruma::OwnedServerName> = vec![synapse.server_name.as_str().try_into().unwrap()];
    let (bob, dave) = (house.user("bob"), house.user("dave"));

    let there = alice.create_room(json!({ "preset": "private_chat" })).await.unwrap();
    let room: OwnedRoomId = there.as_str().try_into().unwrap();
    let refusal = house.dag.join(&room, &via, &bob, object(json!({}))).await.unwrap_err();
    assert_eq!(refusal.code(), "forbidden", "{refusal}");
    for user in [&bob, &dave] {
        alice.invite(&there, user.as_str()).await.unwrap();
    }
    house.dag.decline(&room, &dave, Some("no, thanks")).await.unwrap();
    alice.wait_for_member(&there, dave.as_str(), "leave").await.unwrap();
    house.dag.join(&room, &[], &bob, object(json!({}))).await.unwrap();
    house.same_state_as(&room, &alice).await;

    let rules = json!({ "join_rule": "restricted", "allow": [{ "type": "m.room_membership", "room_id": there }] });
    let rules = json!([{ "type": "m.room.join_rules", "state_key": "", "content": rules }]);
    let inner = alice.create_room(json!({ "preset": "private_chat", "initial_state": rules })).await.unwrap();
    let inner: OwnedRoomId = inner.as_str().try_into().unwrap();
    let refusal = house.dag.join(&inner, &via, &dave, object(json!({}))).await.unwrap_err();
    assert_eq!(refusal.code(), "forbidden", "{refusal}");
    let joined = house.dag.join(&inner, &via, &bob, object(json!({}))).await.unwrap();
    assert_eq!(joined.join.content["join_authorised_via_users_server"], alice.user_id.as_str());
    house.same_state_as(&inner, &alice).await;
    house.dag.join(&room, &via, &dave, object(json!({}))).await.unwrap_err();

    let rules = json!([{ "type": "m.room.join_rules", "state_key": "", "content": { "join_rule": "knock" } }]);
    let closed = alice.create_room(json!({ "preset": "private_chat", "initial_state": rules })).await.unwrap();
    let closed_id: OwnedRoomId = closed.as_str().try_into().unwrap();
    let told = house.dag.knock(&closed_id, &via, &dave, object(json!({ "reason": "let me in" }))).await.unwrap();
    assert!(!told.is_empty());
    alice.wait_for_member(&closed, dave.as_str(), "knock").await.unwrap();
    alice.invite(&closed, dave.as_str()).await.unwrap();
    house.dag.join(&closed_id, &[], &dave, object(json!({}))).await.unwrap();
    alice.wait_for_member(&closed, dave.as_str(), "join").await.unwrap();
}
