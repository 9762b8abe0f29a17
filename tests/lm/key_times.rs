//! Events that say they were made when their signer's key was not valid, and servers whose keys do not come.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use http::StatusCode;
use isthmus::clock::{Clock as _, SystemClock};
use isthmus::event::{Completion, Lpdu, Object, Pdu, VerifyKey, VerifyKeys, sign_object};
use isthmus::identity::SigningKey;
use isthmus::refusal::Refusal;
use isthmus::seam::{Draft, Outgoing, Received};
use ruma::{OwnedRoomId, RoomId};
use serde_json::json;

use super::log_hub::{deafen, respond};
use super::shared::{does_lm_alone, shared_room};
use super::world::{Node, World, member, message, raw};

/// Between two looks at something.
const PAUSE: Duration = Duration::from_millis(20);
const DAY_MS: i64 = 24 * 3600 * 1000;

async fn give(to: &Node, origin: &Node, event: &Object) -> Received {
    to.lm.receive(&origin.name, vec![raw(event)]).await.pop().unwrap()
}

/// A message that says it was made in thirty days.
fn ahead(node: &Node, body: &str) -> Draft {
    let origin_server_ts = SystemClock.now_ms() + 30 * DAY_MS;
    Draft { origin_server_ts, ..message(&node.user("alice"), body) }
}

/// Before anything of these tests was made.
const EXPIRED_TS: i64 = 1_600_000_000_000;

/// Has a server say that a key went out of use then.
fn retire(node: &Node, old: &SigningKey) {
    let mut keys = node.context.keyring.own_keys();
    keys.remove("signatures");
    keys.insert(
        "old_verify_keys".to_owned(),
        json!({ old.id(): { "key": old.public_base64(), "expired_ts": EXPIRED_TS } }),
    );
    sign_object(&mut keys, node.name.as_str(), &node.context.signing_key);
    node.meddle(move |request, next| {
        let answer = request.uri().path().contains("/key/").then(|| respond(StatusCode::OK, json!(keys)));
        async move {
            match answer {
                Some(answer) => answer,
                None => next.run(request).await,
            }
        }
    });
}

/// What a server has said with another of its keys.
fn signed_with(key: &SigningKey, node: &Node, hub: &Node, room: &RoomId, draft: &Draft) -> Lpdu {
    let mut template = node.lpdu(room, &hub.name, draft).json;
    for added in ["signatures", "hashes", "hub_server"] {
        template.remove(added);
    }
    Lpdu::build(template, &hub.name, &node.name, key).unwrap()
}

/// An LPDU as a hub puts it at the end of its log that looks at no times.
async fn finished(hub: &Node, room: &RoomId, lpdu: Lpdu, key: &SigningKey) -> Pdu {
    let log = hub.log(room).await;
    let sender = lpdu.sender.clone();
    let of_kind = |kind: &str, state_key: &str| {
        let is_it = |event: &&isthmus::lm::Appended| {
            event.event.kind == kind && event.event.state_key.as_deref() == Some(state_key)
        };
        log.iter().rev().find(is_it).unwrap().event.event_id.clone()
    };
    let auth_events = vec![
        of_kind("m.room.create", ""),
        of_kind("m.room.power_levels", ""),
        of_kind("m.room.member", sender.as_str()),
    ];
    let public = VerifyKey::from_base64(&key.public_base64()).unwrap();
    let keys = VerifyKeys::from([(sender.server_name().to_owned(), [(key.id().to_owned(), public)].into())]);
    let completion = Completion { auth_events, prev_event: Some(log.last().unwrap().event.event_id.clone()) };
    Pdu::complete(lpdu.verify(&keys).unwrap(), completion, &hub.name, &hub.context.signing_key).unwrap()
}

async fn room_of(hub: &Node, others: [&Node; 2]) -> OwnedRoomId {
    let room = hub.create_room("public").await;
    for node in others {
        node.join(&room, "alice", hub).await;
    }
    room
}

/// In a log the hub decides what comes after what: a clock that is ahead keeps nobody's words out of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_06_an_event_dated_beyond_its_signers_keys_is_taken_into_a_log_and_from_it() {
    let (_world, [hub, part, third]) = World::new(["hub.example", "part.example", "third.example"]).await;
    let room = room_of(&hub, [&part, &third]).await;
    let lpdu = part.lpdu(&room, &hub.name, &ahead(&part, "tomorrow's"));
    assert_eq!(give(&hub, &part, &lpdu.json).await.result, Ok(()));
    third.wait_for_body(&room, "tomorrow's").await;
    hub.say(&room, "bot", "goes on").await;
    third.wait_for_body(&room, "goes on").await;
    assert_eq!(third.bodies(&room).await, ["tomorrow's", "goes on"]);
    assert_eq!(third.lm.room(&room).await.unwrap().unwrap().complaints, Vec::<String>::new());
    assert_eq!(third.fault_kinds(&room).await, [""; 0]);
}

/// Graph servers check the same events after the hub, by Matrix' rule.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_a_shared_room_an_event_dated_beyond_its_signers_keys_is_refused_and_both_times_are_named() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    does_lm_alone(&part);
    let room = shared_room(&hub, "public").await;
    part.join(&room, "alice", &hub).await;
    let draft = ahead(&part, "tomorrow's");
    let refused = give(&hub, &part, &part.lpdu(&room, &hub.name, &draft).json).await.result.unwrap_err();
    let text = refused.to_string();
    assert_eq!((refused.code(), refused.errcode(), refused.is_transient()), ("key_out_of_time", "M_FORBIDDEN", false));
    let valid_until = hub.context.keyring.server_keys(&part.name).await.unwrap().valid_until_ts;
    for named in ["part.example", &draft.origin_server_ts.to_string(), &valid_until.to_string()] {
        assert!(text.contains(named), "{text} does not name {named}");
    }
    let now = part.lpdu(&room, &hub.name, &message(&part.user("alice"), "today's")).json;
    assert_eq!(give(&hub, &part, &now).await.result, Ok(()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hc_06_a_key_out_of_use_signs_nothing_new_and_the_hub_is_not_blamed_for_it() {
    let (_world, [hub, part, third]) = World::new(["hub.example", "part.example", "third.example"]).await;
    let old = SigningKey::generate();
    retire(&part, &old);
    let room = room_of(&hub, [&part, &third]).await;
    let draft = message(&part.user("alice"), "late");
    let lpdu = signed_with(&old, &part, &hub, &room, &draft);
    let is_named = |refused: &Refusal| {
        let text = refused.to_string();
        assert_eq!(refused.code(), "key_out_of_time", "{text}");
        for named in ["part.example", old.id(), &draft.origin_server_ts.to_string(), &EXPIRED_TS.to_string()] {
            assert!(text.contains(named), "{text} does not name {named}");
        }
    };
    is_named(&give(&hub, &part, &lpdu.json).await.result.unwrap_err());
    // Another hub may have taken it.
    let pdu = finished(&hub, &room, lpdu.clone(), &old).await;
    is_named(&give(&third, &hub, &pdu.json).await.result.unwrap_err());
    let seen = third.lm.room(&room).await.unwrap().unwrap().complaints;
    assert!(seen.len() == 1 && seen[0].contains("part.example"), "{seen:?}");
    assert_eq!(third.fault_kinds(&room).await, [""; 0]);
    hub.say(&room, "bot", "goes on").await;
    third.wait_for_body(&room, "goes on").await;
    // What such a key has not signed is forged like anything else.
    let mut forged = finished(&hub, &room, lpdu, &old).await.json;
    let signature = "A".repeat(86);
    forged["signatures"][part.name.as_str()][old.id()] = json!(signature);
    let refused = give(&third, &hub, &forged).await.result;
    assert!(matches!(refused, Err(Refusal::BadSignature { .. })), "{refused:?}");
    assert_eq!(third.fault_kinds(&room).await, ["rewritten"]);
}

/// Counts when it is dropped.
struct GivenUp(Arc<AtomicUsize>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// Servers that are silent when they are asked for their keys.
#[derive(Clone, Default)]
struct Silence {
    /// How often they were asked.
    asked: Arc<AtomicUsize>,
    /// How often somebody has waited for the answer in vain.
    given_up: Arc<AtomicUsize>,
    is_over: Arc<AtomicBool>,
}

impl Silence {
    fn over(&self, node: &Node) {
        let silence = self.clone();
        node.meddle(move |request, next| {
            let silence = silence.clone();
            async move {
                if request.uri().path().contains("/key/") && !silence.is_over.load(Ordering::SeqCst) {
                    let _given_up = GivenUp(silence.given_up.clone());
                    silence.asked.fetch_add(1, Ordering::SeqCst);
                    while !silence.is_over.load(Ordering::SeqCst) {
                        tokio::time::sleep(PAUSE).await;
                    }
                }
                next.run(request).await
            }
        });
    }

    /// Nobody has waited for as long as somebody who asks for keys does at most.
    #[track_caller]
    fn nobody_waited(&self) {
        assert!(self.asked.load(Ordering::SeqCst) > 0);
        assert_eq!(self.given_up.load(Ordering::SeqCst), 0, "the answer to the hub waited for the keys of others");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_does_not_answer_who_asks_for_its_keys_holds_up_no_other_room_of_the_hub() {
    let (_world, [hub, part, third]) = World::new(["hub.example", "part.example", "third.example"]).await;
    let (room, other) = (hub.create_room("public").await, hub.create_room("public").await);
    for room in [&room, &other] {
        part.join(room, "alice", &hub).await;
    }
    // The hub knows its keys, and nobody else is to have them.
    third.join(&hub.create_room("public").await, "carol", &hub).await;
    let silence = Silence::default();
    silence.over(&third);
    third.join(&room, "carol", &hub).await;
    let waiting = async {
        while silence.asked.load(Ordering::SeqCst) == 0 {
            tokio::time::sleep(PAUSE).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), waiting).await.expect("the keys are asked for");
    // The transaction that has the join goes before this.
    hub.say(&other, "bot", "elsewhere").await;
    part.wait_for_body(&other, "elsewhere").await;
    silence.nobody_waited();
    // What waits for them is taken when they come.
    silence.is_over.store(true, Ordering::SeqCst);
    third.say(&room, "carol", "back").await;
    part.wait_for_body(&room, "back").await;
    assert_eq!(part.fault_kinds(&room).await, [""; 0]);
}

/// Has a hub give one event at once, whatever is asked for.
fn gives_one_at_once(hub: &Node) {
    hub.meddle(|request, next| async move {
        let is_page = request.uri().path().contains("/backfill/");
        let response = next.run(request).await;
        if !is_page || !response.status().is_success() {
            return response;
        }
        let bytes = axum::body::to_bytes(response.into_body(), 1 << 24).await.unwrap();
        let mut page: Object = serde_json::from_slice(&bytes).unwrap();
        let last = page["pdus"].as_array().unwrap().last().cloned();
        page.insert("pdus".to_owned(), json!(last.as_slice()));
        respond(StatusCode::OK, json!(page))
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gap_does_not_wait_for_each_of_the_silent_servers_that_signed_it() {
    const NAMES: [&str; 16] = [
        "hub.example",
        "part.example",
        "a.example",
        "b.example",
        "c.example",
        "d.example",
        "e.example",
        "f.example",
        "g.example",
        "h.example",
        "i.example",
        "j.example",
        "k.example",
        "l.example",
        "m.example",
        "n.example",
    ];
    let (_world, nodes) = World::new(NAMES).await;
    let (hub, part, others) = (&nodes[0], &nodes[1], &nodes[2..]);
    let room = hub.create_room("public").await;
    part.join(&room, "alice", hub).await;
    deafen(part);
    let silence = Silence::default();
    for other in others {
        other.join(&room, "carol", hub).await;
    }
    // From now on: who joins wants the keys of those who are there.
    for other in others {
        silence.over(other);
    }
    gives_one_at_once(hub);
    hub.say(&room, "bot", "end").await;
    let end = hub.log(&room).await.pop().unwrap();
    let _ = give(part, hub, &end.event.json).await;
    silence.nobody_waited();
    // All of it is there when they answer.
    silence.is_over.store(true, Ordering::SeqCst);
    part.wait_for_body(&room, "end").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_an_invite_that_waits_for_keys_holds_nothing_up_and_is_heard_all_the_same() {
    let (_world, [hub, part, third]) = World::new(["hub.example", "part.example", "third.example"]).await;
    let levels = json!({ "users": { hub.user("bot"): 100, third.user("carol"): 100 } });
    let room = hub.create_room_with("public", levels).await;
    third.join(&room, "carol", &hub).await;
    let bob = part.user("bob");
    let invite = Outgoing { draft: member(&hub.user("bot"), &bob, "invite"), effect: None };
    hub.lm.invite(&room, invite).await.unwrap();
    part.watcher.pending.lock().unwrap().push(room.clone());
    // It comes by hand.
    deafen(&part);
    third.send(&room, member(&third.user("carol"), &bob, "leave")).await.unwrap();
    let log = hub
        .wait(&room, "the end of the invite", |log| {
            log.last().unwrap().event.content().get("membership") == Some(&json!("leave"))
        })
        .await;
    let silence = Silence::default();
    silence.over(&third);
    let received = give(&part, &hub, &log.last().unwrap().event.json).await;
    assert_eq!(received.result, Ok(()));
    silence.nobody_waited();
    assert!(part.watcher.ended.lock().unwrap().is_empty(), "nothing is proved yet");
    silence.is_over.store(true, Ordering::SeqCst);
    part.wait_for_watcher("the end of the invite", |watcher| {
        watcher.ended.lock().unwrap().iter().any(|ended| ended.target == bob && ended.told_by == hub.name)
    })
    .await;
}

/// Those who ask for an invite do not wait for ever, and who is invited may.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_participant_whose_invite_is_not_signed_is_told_so_before_it_gives_up() {
    let (_world, [hub, part, third]) = World::new(["hub.example", "part.example", "third.example"]).await;
    let levels = json!({ "users": { hub.user("bot"): 100, part.user("alice"): 100 } });
    let room = hub.create_room_with("public", levels).await;
    part.join(&room, "alice", &hub).await;
    third.meddle(|request, next| async move {
        if request.uri().path().contains("/invite/") {
            std::future::pending::<()>().await;
        }
        next.run(request).await
    });
    let before = hub.log(&room).await.len();
    let invite = part.lpdu(&room, &hub.name, &member(&part.user("alice"), &third.user("carol"), "invite"));
    let version = "org.matrix.i-d.ralston-mimi-linearized-matrix.02";
    let body = json!({ "event": invite.json, "room_version": version, "invite_room_state": [] });
    let refused = hub.lm.invited(&part.name, body.as_object().unwrap().clone()).await.map(drop).unwrap_err();
    let text = refused.to_string();
    assert!(refused.is_transient() && text.contains("third.example") && text.contains("25 s"), "{text}");
    assert_eq!(hub.log(&room).await.len(), before);
}
