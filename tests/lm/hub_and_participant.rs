//! A hub and a participant that behave.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::response::IntoResponse as _;
use http::StatusCode;
use isthmus::event::RoomVersion;
use isthmus::identity::Side;
use isthmus::lm::rules::{Before, Judged, Slot, check};
use isthmus::lm::{Appended, Role, Sent, State};
use isthmus::refusal::Refusal;
use isthmus::seam::{Membership, Outgoing, Stage};
use ruma::RoomId;
use serde_json::{Value, json};

use super::world::{World, assert_dense, bodies, draft, ids, member, message, raw};
use crate::support::between::Hook;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_participant_joins_and_both_sides_talk() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    let joined = part.join(&room, "alice", &hub).await;
    assert_eq!(joined.event.sender, part.user("alice"));
    assert_eq!(part.lm.room(&room).await.unwrap().unwrap().role, Role::Participant { hub: hub.name.clone() });

    let Sent::Appended(hello) = hub.say(&room, "bot", "hello").await else { panic!("a hub appends") };
    let Sent::Queued { lpdu_id } = part.say(&room, "alice", "hi").await else { panic!("a participant queues") };
    let at_hub = hub.wait_for_body(&room, "hi").await;
    let at_part = part.wait_for_body(&room, "hi").await;
    assert_dense(&at_hub);
    // The participant holds the state at its join, the join, and everything after it.
    assert_eq!(ids(&at_part), ids(&at_hub));
    assert!(ids(&at_part).contains(&hello.event.event_id));
    let echo = part.lm.event_of_lpdu(&lpdu_id).await.unwrap().unwrap();
    assert_eq!(Some(&echo.event.event_id), ids(&at_hub).last());
    assert_eq!(bodies(&at_part), ["hello", "hi"]);
    assert_eq!(part.lm.room(&room).await.unwrap().unwrap().complaints, Vec::<String>::new());

    let gates = hub.watcher.gates.lock().unwrap();
    let stages: Vec<Stage> = gates.iter().map(|gate| gate.stage).collect();
    assert_eq!(stages, [Stage::Make, Stage::Send]);
    assert!(gates.iter().all(|gate| gate.side == Side::Lm && gate.membership == Membership::Join));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_user_of_a_participant_joins_by_lpdu() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    let joined = part.join(&room, "bob", &hub).await;
    assert_eq!(joined.event.sender, part.user("bob"));
    part.say(&room, "bob", "me too").await;
    hub.wait_for_body(&room, "me too").await;
    // Both asked the gate: once by the handshake, once for the LPDU.
    let gated = hub.watcher.gates.lock().unwrap().iter().filter(|gate| gate.stage == Stage::Send).count();
    assert_eq!(gated, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_gate_keeps_users_out_whom_the_other_side_would_not_have() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    hub.watcher.unwanted.lock().unwrap().push(part.user("mallory"));
    let via = [hub.name.clone()];
    let refused = part.lm.join(&room, &part.user("mallory"), &via, Default::default()).await;
    assert!(matches!(refused, Err(Refusal::Forbidden(_))), "{refused:?}");
    part.join(&room, "alice", &hub).await;
    let refused = part.lm.join(&room, &part.user("mallory"), &via, Default::default()).await;
    assert!(matches!(refused, Err(Refusal::Forbidden(_))), "{refused:?}");
    assert_eq!(part.watcher.refused.lock().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kick_and_a_ban_reach_the_server_whose_last_user_they_hit_and_nothing_after() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    for membership in ["leave", "ban"] {
        let room = hub.create_room("public").await;
        part.join(&room, "alice", &hub).await;
        hub.say(&room, "bot", "before").await;
        hub.send(&room, member(&hub.user("bot"), &part.user("alice"), membership)).await.unwrap();
        hub.say(&room, "bot", "after").await;
        let log = part
            .wait(&room, membership, |log| {
                log.last().unwrap().event.content().get("membership") == Some(&json!(membership))
            })
            .await;
        assert_eq!(bodies(&log), ["before"]);
        // What comes after is not for that server: it sees the room up to its end.
        let end = &log.last().unwrap().event.event_id;
        let at_hub = hub.log(&room).await;
        let after = &at_hub.last().unwrap().event.event_id;
        let unstable = "/_matrix/federation/unstable/org.matrix.i-d.ralston-mimi-linearized-matrix.02";
        part.get(&hub, &format!("{unstable}/event/{end}")).await.unwrap();
        assert!(part.get(&hub, &format!("{unstable}/event/{after}")).await.is_err());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_comes_back_gets_nothing_of_what_was_said_meanwhile() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    part.lm.leave(&room, &part.user("alice"), &[]).await.unwrap();
    let left = |log: &[Appended]| log.last().unwrap().event.content().get("membership") == Some(&json!("leave"));
    hub.wait(&room, "the leave", left).await;
    part.wait(&room, "the echo of the leave", left).await;
    hub.say(&room, "bot", "among us").await;
    hub.send(&room, draft(&hub.user("bot"), "m.room.name", Some(""), json!({ "name": "new" }))).await.unwrap();
    part.join(&room, "alice", &hub).await;
    hub.say(&room, "bot", "welcome back").await;
    let log = part.wait_for_body(&room, "welcome back").await;
    assert_eq!(bodies(&log), ["welcome back"]);
    let state = part.lm.state(&room).await.unwrap();
    assert_eq!(state.get("m.room.name", "").unwrap().content()["name"], "new");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invite_is_signed_by_the_invited_server() {
    let (_world, [hub, part, third]) = World::new(["hub.example", "part.example", "third.example"]).await;
    let room = hub.create_room("invite").await;
    let alice = part.user("alice");
    let invite = |draft| Outgoing { draft, effect: None };
    let sent = hub.lm.invite(&room, invite(member(&hub.user("bot"), &alice, "invite"))).await.unwrap();
    let Sent::Appended(invited) = sent else { panic!("a hub appends") };
    assert!(invited.event.json["signatures"].get("part.example").is_some());
    assert_eq!(part.watcher.invites.lock().unwrap()[0].target, alice);
    part.join(&room, "alice", &hub).await;

    // A participant invites through the hub.
    let carol = third.user("carol");
    let sent = part.lm.invite(&room, invite(member(&alice, &carol, "invite"))).await.unwrap();
    let Sent::Queued { lpdu_id } = sent else { panic!("a participant asks the hub") };
    let log = part.wait(&room, "the invite", |log| log.last().unwrap().event.lpdu_id.as_ref() == Some(&lpdu_id)).await;
    let signatures = &log.last().unwrap().event.json["signatures"];
    for server in ["hub.example", "part.example", "third.example"] {
        assert!(signatures.get(server).is_some(), "{server} did not sign");
    }
    third.join(&room, "carol", &hub).await;
    third.say(&room, "carol", "thanks").await;
    assert_dense(&hub.wait_for_body(&room, "thanks").await);
    part.wait_for_body(&room, "thanks").await;

    // A refusal comes back with its reason, and nothing is appended.
    let dave = third.user("dave");
    third.watcher.unwanted.lock().unwrap().push(dave.clone());
    let head = hub.lm.room(&room).await.unwrap().unwrap().head;
    for (node, sender) in [(&hub, hub.user("bot")), (&part, alice.clone())] {
        // From a server that is not in the room.
        let eve = draft(&sender, "m.room.member", Some("@dave:third.example"), json!({ "membership": "invite" }));
        third.lm.leave(&room, &carol, &[]).await.ok();
        node.wait(&room, "carol's leave", |log| {
            let left = |event: &Appended| event.event.content().get("membership") == Some(&json!("leave"));
            log.iter().any(|event| event.event.sender == carol && left(event))
        })
        .await;
        let refused = node.lm.invite(&room, invite(eve)).await;
        assert!(matches!(&refused, Err(Refusal::Forbidden(why)) if why.contains("does not want")), "{refused:?}");
    }
    let now = hub.lm.room(&room).await.unwrap().unwrap().head;
    assert_eq!(now.0, head.0 + 1, "only carol's leave was appended");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_answers_an_invite_before_it_is_in_the_log_waits_for_that() {
    for (join_rule, joins) in [("public", true), ("invite", true), ("invite", false)] {
        let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
        let room = hub.create_room(join_rule).await;
        let alice = part.user("alice");
        let (answers, mut answered) = tokio::sync::mpsc::unbounded_channel();
        let (lm, hub_name, kept, user) = (part.lm.clone(), hub.name.clone(), room.clone(), alice.clone());
        part.meddle(move |request, next| {
            let is_invite = request.uri().path().contains("/invite/");
            let (lm, hub_name, room, user, answers) =
                (lm.clone(), hub_name.clone(), kept.clone(), user.clone(), answers.clone());
            async move {
                let response = next.run(request).await;
                if is_invite {
                    let mut answer = tokio::spawn(async move {
                        let via = std::slice::from_ref(&hub_name);
                        match joins {
                            true => lm.join(&room, &user, via, Default::default()).await.map(drop),
                            false => lm.leave(&room, &user, via).await,
                        }
                    });
                    // As if this were a slow connection.
                    let early = tokio::time::timeout(std::time::Duration::from_millis(300), &mut answer).await;
                    let _ = answers.send((early.is_ok(), answer));
                }
                response
            }
        });
        let invite = Outgoing { draft: member(&hub.user("bot"), &alice, "invite"), effect: None };
        let Sent::Appended(invited) = hub.lm.invite(&room, invite).await.unwrap() else { panic!("a hub appends") };
        let (early, answer) = answered.recv().await.unwrap();
        assert!(!early, "it is answered before it is in the log");
        answer.await.unwrap().unwrap();
        let log = hub.log(&room).await;
        let membership = if joins { "join" } else { "leave" };
        assert_eq!(log.last().unwrap().event.content()["membership"], membership);
        assert_eq!(log[log.len() - 2].event.event_id, invited.event.event_id);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_joins_before_signing_an_invite_is_not_held_up_for_long_and_the_inviter_is_told() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    let alice = part.user("alice");
    let (lm, hub_name, kept, user) = (part.lm.clone(), hub.name.clone(), room.clone(), alice.clone());
    part.meddle(move |request, next| {
        let is_invite = request.uri().path().contains("/invite/");
        let (lm, hub_name, room, user) = (lm.clone(), hub_name.clone(), kept.clone(), user.clone());
        async move {
            if is_invite {
                lm.join(&room, &user, std::slice::from_ref(&hub_name), Default::default()).await.unwrap();
            }
            next.run(request).await
        }
    });
    let invite = Outgoing { draft: member(&hub.user("bot"), &alice, "invite"), effect: None };
    let refused = hub.lm.invite(&room, invite).await;
    assert!(matches!(&refused, Err(Refusal::Forbidden(why)) if why.contains("has joined by now")), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invite_is_declined_through_the_hub() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("invite").await;
    let alice = part.user("alice");
    let invite = Outgoing { draft: member(&hub.user("bot"), &alice, "invite"), effect: None };
    hub.lm.invite(&room, invite).await.unwrap();
    part.lm.leave(&room, &alice, std::slice::from_ref(&hub.name)).await.unwrap();
    let last = hub.log(&room).await.pop().unwrap();
    assert_eq!((last.event.sender.clone(), &last.event.content()["membership"]), (alice.clone(), &json!("leave")));
    let refused = part.lm.join(&room, &alice, std::slice::from_ref(&hub.name), Default::default()).await;
    assert!(matches!(refused, Err(Refusal::Forbidden(_))), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_1_inv_6_a_restart_of_either_keeps_everything() {
    let (world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    part.say(&room, "alice", "one").await;
    hub.wait_for_body(&room, "one").await;
    part.wait_for_body(&room, "one").await;
    let before = hub.log(&room).await;
    let state = hub.lm.state(&room).await.unwrap();

    let hub = world.restart(hub).await;
    assert_eq!(ids(&hub.log(&room).await), ids(&before));
    let restored = hub.lm.state(&room).await.unwrap();
    let keys = |state: &State| -> Vec<(String, String)> {
        state.iter().map(|(kind, key, _)| (kind.to_owned(), key.to_owned())).collect()
    };
    assert_eq!(keys(&restored), keys(&state));
    hub.say(&room, "bot", "two").await;
    part.wait_for_body(&room, "two").await;

    let part = world.restart(part).await;
    part.say(&room, "alice", "three").await;
    let at_hub = hub.wait_for_body(&room, "three").await;
    let at_part = part.wait_for_body(&room, "three").await;
    assert_dense(&at_hub);
    assert_eq!(ids(&at_hub), ids(&at_part));
    assert_eq!(ids(&at_hub)[..before.len()], ids(&before));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_missed_is_fetched_from_the_hub() {
    let (world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    // Events that the participant never gets: the hub believes that they were delivered.
    let name = hub.name.to_string();
    hub.context.outbound.stop().await;
    for number in 0..130 {
        hub.say(&room, "bot", &format!("missed {number}")).await;
    }
    let last = hub.lm.send(&room, vec![Outgoing { draft: message(&hub.user("bot"), "last"), effect: None }]).await;
    let Some(Ok(Sent::Appended(last))) = last.into_iter().next() else { panic!("a hub appends") };
    let received = part.lm.receive(&hub.name, vec![super::world::raw(&last.event.json)]).await;
    assert_eq!(received[0].result, Ok(()));
    assert_eq!(ids(&part.log(&room).await), ids(&hub.log(&room).await), "{name}");
    assert_eq!(part.lm.room(&room).await.unwrap().unwrap().complaints, Vec::<String>::new());
    drop(world);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invite_holds_a_room_that_moves_faster_than_it_is_signed() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("invite").await;
    let asked = Arc::new(AtomicUsize::new(0));
    let hook: Hook = {
        let (lm, room, asked, bot) = (hub.lm.clone(), room.clone(), asked.clone(), hub.user("bot"));
        Box::new(move || {
            let number = asked.fetch_add(1, Ordering::SeqCst);
            let (lm, room, draft) = (lm.clone(), room.clone(), message(&bot, &format!("meanwhile {number}")));
            Box::pin(async move {
                let saying = tokio::spawn(async move {
                    lm.send(&room, vec![Outgoing { draft, effect: None }]).await.pop().unwrap().unwrap();
                });
                // The fourth time the room stands still, and what is said waits for the invite.
                if number < 3 {
                    saying.await.unwrap();
                }
            })
        })
    };
    *part.watcher.before_signing.lock().unwrap() = Some(hook);
    let draft = member(&hub.user("bot"), &part.user("alice"), "invite");
    let sent = hub.lm.invite(&room, Outgoing { draft, effect: None }).await.unwrap();
    let Sent::Appended(invite) = sent else { panic!("a hub appends") };
    assert!(invite.event.json["signatures"].get("part.example").is_some());
    assert_eq!(asked.load(Ordering::SeqCst), 4);
    let log = hub.wait_for_body(&room, "meanwhile 3").await;
    assert_dense(&log);
    let order: Vec<bool> = log[4..].iter().map(|event| event.event.kind == "m.room.member").collect();
    assert_eq!(order, [false, false, false, true, false]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invite_that_a_participant_sends_like_any_event_reaches_the_invited_server() {
    let (_world, [hub, part, third]) = World::new(["hub.example", "part.example", "third.example"]).await;
    let room = hub.create_room("public").await;
    part.join(&room, "alice", &hub).await;
    let carol = third.user("carol");
    part.send(&room, member(&part.user("alice"), &carol, "invite")).await.unwrap();
    third.wait_for_watcher("the invite", |watcher| !watcher.invites.lock().unwrap().is_empty()).await;
    assert_eq!(third.watcher.invites.lock().unwrap()[0].target, carol);
}

/// The invited server is away while it is invited, and the hub is stopped before it is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_was_away_learns_of_an_invite_and_of_its_end() {
    let (world, [hub, part, third]) = World::new(["hub.example", "part.example", "third.example"]).await;
    let room = hub
        .create_room_with("public", json!({ "users": { "@bot:hub.example": 100, "@alice:part.example": 60 } }))
        .await;
    part.join(&room, "alice", &hub).await;
    let (alice, carol) = (part.user("alice"), third.user("carol"));
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    third.meddle(move |_, _| {
        count.fetch_add(1, Ordering::SeqCst);
        async { StatusCode::BAD_GATEWAY.into_response() }
    });
    part.send(&room, member(&alice, &carol, "invite")).await.unwrap();
    while asked.load(Ordering::SeqCst) == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    third.meddle(|request, next| next.run(request));
    let hub = world.restart(hub).await;
    third.wait_for_watcher("the invite", |watcher| !watcher.invites.lock().unwrap().is_empty()).await;
    assert_eq!(third.watcher.invites.lock().unwrap()[0].target, carol);

    // It does not answer, once, when it is told that the invite is taken back.
    let (failed, told) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (fails, tells) = (failed.clone(), told.clone());
    third.meddle(move |request, next| {
        let is_send = request.uri().path().contains("/send/");
        let fail = is_send && fails.fetch_add(1, Ordering::SeqCst) == 0;
        tells.fetch_add(usize::from(is_send && !fail), Ordering::SeqCst);
        async move { if fail { StatusCode::BAD_GATEWAY.into_response() } else { next.run(request).await } }
    });
    hub.lm.hasten_looks(1000);
    part.send(&room, member(&alice, &carol, "leave")).await.unwrap();
    let again = async {
        while told.load(Ordering::SeqCst) == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), again).await.expect("it is told again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_knock_is_taken_where_the_room_takes_knocks() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let alice = part.user("alice");
    for (join_rule, taken) in [("knock", true), ("invite", false)] {
        let room = hub.create_room(join_rule).await;
        let versions = ["org.matrix.i-d.ralston-mimi-linearized-matrix.02".to_owned()];
        let made = hub.lm.make_knock(&part.name, &room, &alice, &versions).await;
        assert_eq!(made.is_ok(), taken);
        let knock = part.lpdu(&room, &hub.name, &member(&alice, &alice, "knock")).json;
        let answer = hub.lm.send_knock(&part.name, knock).await;
        assert_eq!(answer.is_ok(), taken);
        if let Ok(answer) = answer {
            assert_eq!(answer["stripped_state"].as_array().unwrap().len(), 2);
        }
    }
}

/// Some participants put the state that answers their join through the rules, event by event, in the order in which it
/// comes. Members whose invites are no longer in the state pass only when the invites are there too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_state_that_answers_a_join_passes_a_replay() {
    let (_world, [hub, part, third]) = World::new(["hub.example", "part.example", "third.example"]).await;
    let bot = hub.user("bot");
    let levels = json!({ "users": { bot.clone(): 100 } });
    for join_rule in ["public", "invite"] {
        let room = hub.create_room_with(join_rule, levels.clone()).await;
        for (node, name) in [(&part, "alice"), (&part, "bob"), (&third, "carol")] {
            let draft = member(&bot, &node.user(name), "invite");
            hub.lm.invite(&room, Outgoing { draft, effect: None }).await.unwrap();
            if name != "carol" {
                node.join(&room, name, &hub).await;
            }
        }
        hub.send(&room, draft(&bot, "m.room.topic", Some(""), json!({ "topic": "x" }))).await.unwrap();
        hub.send(&room, member(&bot, &part.user("bob"), "ban")).await.unwrap();
        let join = third.lpdu(&room, &hub.name, &member(&third.user("carol"), &third.user("carol"), "join"));
        let answer = hub.lm.send_join(&third.name, join.json).await.unwrap();
        let state = answer["state"].as_array().unwrap();
        replay(&room, state);
        if join_rule == "public" {
            let kinds: Vec<&str> = state.iter().take(4).map(|event| event["type"].as_str().unwrap()).collect();
            assert_eq!(kinds, ["m.room.create", "m.room.member", "m.room.power_levels", "m.room.join_rules"]);
            assert_eq!(state.len(), 8, "the current state and nothing more");
        }
    }
}

/// Each event is allowed by those before it.
#[track_caller]
fn replay(room: &RoomId, state: &[Value]) {
    let mut current: BTreeMap<(String, String), &Value> = BTreeMap::new();
    let text = |event: &Value, name: &str| event[name].as_str().unwrap().to_owned();
    let mut last = String::new();
    for event in state {
        let (kind, state_key, sender) = (text(event, "type"), text(event, "state_key"), text(event, "sender"));
        let content = |kind: &str, key: &str| {
            current.get(&(kind.to_owned(), key.to_owned())).map(|event| event["content"].as_object().unwrap())
        };
        let membership = |user: &str| content("m.room.member", user).and_then(|content| content["membership"].as_str());
        let creator = current.get(&("m.room.create".to_owned(), String::new())).map(|create| text(create, "sender"));
        let judged = Judged {
            version: RoomVersion::Lm02,
            room_id: room,
            sender: sender.as_str().try_into().unwrap(),
            kind: &kind,
            state_key: Some(&state_key),
            content: event["content"].as_object().unwrap(),
            signed_by_sender: true,
            signed_by_hub: None,
            signed_by_next_hub: false,
            has_prev_events: !current.is_empty(),
            auth_events: &[Slot { kind: "m.room.create", state_key: "" }],
            before: Before {
                creator: creator.as_deref().map(|creator| creator.try_into().unwrap()),
                follows_create: last == "m.room.create",
                power_levels: content("m.room.power_levels", ""),
                join_rules: content("m.room.join_rules", ""),
                sender_membership: membership(&sender),
                target_membership: membership(&state_key),
                hub: None,
                was_handed_over: false,
                next_hub_is_in: false,
            },
        };
        check(&judged).unwrap_or_else(|refusal| panic!("{kind} {state_key}: {refusal}"));
        last.clone_from(&kind);
        current.insert((kind, state_key), event);
    }
}

/// What a server that comes later reads of a log: all of it, or what was said without it redacted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_not_visible_to_a_server_is_served_redacted() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let alice = part.user("alice");
    for (visibility, expected) in [
        (None, [true, true, true]),
        (Some("shared"), [true, true, true]),
        (Some("world_readable"), [true, true, true]),
        (Some("invited"), [false, true, true]),
        (Some("joined"), [false, false, true]),
    ] {
        let room = hub.create_room("public").await;
        if let Some(visibility) = visibility {
            let content = json!({ "history_visibility": visibility });
            hub.send(&room, draft(&hub.user("bot"), "m.room.history_visibility", Some(""), content)).await.unwrap();
        }
        hub.say(&room, "bot", "before").await;
        // Without the commits of before nobody could read what comes.
        hub.send(&room, draft(&hub.user("bot"), "m.mls.commit", None, json!({ "commit": "x" }))).await.unwrap();
        let invite = Outgoing { draft: member(&hub.user("bot"), &alice, "invite"), effect: None };
        hub.lm.invite(&room, invite).await.unwrap();
        hub.say(&room, "bot", "invited").await;
        part.join(&room, "alice", &hub).await;
        hub.say(&room, "bot", "joined").await;
        let log = part.wait_for_body(&room, "joined").await;
        let last = &log.last().unwrap().event.event_id;
        let uri = format!(
            "/_matrix/federation/unstable/org.matrix.i-d.ralston-mimi-linearized-matrix.02/backfill/{room}?v={last}&limit=100"
        );
        let answer = part.get(&hub, &uri).await.unwrap();
        let pdus = answer["pdus"].as_array().unwrap();
        assert_eq!(pdus.len(), hub.log(&room).await.len(), "nothing is left out");
        let messages: Vec<&Value> = pdus.iter().filter(|pdu| pdu["type"] == "m.room.message").collect();
        let seen: Vec<bool> = messages.iter().map(|pdu| pdu["content"].get("body").is_some()).collect();
        assert_eq!(seen, expected, "{visibility:?}");
        let commit = pdus.iter().find(|pdu| pdu["type"] == "m.mls.commit").unwrap();
        assert_eq!(commit["content"]["commit"], "x", "{visibility:?}");
        assert!(pdus.iter().filter(|pdu| pdu.get("state_key").is_some()).all(|pdu| pdu["content"] != json!({})));
        // One event alone is served in the same way, and its redacted form is signed as the whole is.
        let first = hub.log(&room).await.into_iter().find(|event| event.event.kind == "m.room.message").unwrap();
        let uri = format!(
            "/_matrix/federation/unstable/org.matrix.i-d.ralston-mimi-linearized-matrix.02/event/{}",
            first.event.event_id
        );
        let served = part.get(&hub, &uri).await.unwrap();
        assert_eq!(served["content"].get("body").is_some(), expected[0], "{visibility:?}");
        assert_eq!(served["signatures"], first.event.json["signatures"]);
    }
}

/// A crash before the join is stored would lose it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_6_what_a_hub_sends_before_its_answer_to_a_join_is_not_acknowledged_and_not_lost() {
    let (_world, [hub, part]) = World::new(["hub.example", "part.example"]).await;
    let room = hub.create_room("public").await;
    let (told, mut answers) = tokio::sync::mpsc::unbounded_channel();
    let (at_hub, at_part, name, draft) =
        (hub.lm.clone(), part.lm.clone(), hub.name.clone(), message(&hub.user("bot"), "early"));
    let kept = room.clone();
    hub.meddle(move |request, next| {
        let (at_hub, at_part, name, draft) = (at_hub.clone(), at_part.clone(), name.clone(), draft.clone());
        let (room, told) = (kept.clone(), told.clone());
        async move {
            let is_join = request.uri().path().contains("/send_join/");
            let response = next.run(request).await;
            if is_join {
                let sent = at_hub.send(&room, vec![Outgoing { draft, effect: None }]).await.pop().unwrap().unwrap();
                let Sent::Appended(early) = sent else { panic!("a hub appends") };
                let _ = told.send(at_part.receive(&name, vec![raw(&early.event.json)]).await.pop().unwrap());
            }
            response
        }
    });
    part.join(&room, "alice", &hub).await;
    let told = answers.recv().await.unwrap();
    assert!(matches!(told.result, Err(Refusal::Internal(_))), "{told:?}");
    // Whether the hub sends it again or not.
    part.wait_for_body(&room, "early").await;
    hub.say(&room, "bot", "later").await;
    assert_eq!(bodies(&part.wait_for_body(&room, "later").await), ["early", "later"]);
}
