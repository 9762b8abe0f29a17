//! What two servers of a shared room do at once, and what the log says of it.

use super::*;

struct Two {
    hub: Hub,
    room: OwnedRoomId,
    peer: Peer,
    alice: OwnedUserId,
    carol: OwnedUserId,
    base: View,
}

async fn two(real: bool) -> Two {
    let peer = Peer::start("graph.example").await;
    let hub = if real { Hub::real(&[&peer]).await } else { Hub::start(&[&peer]).await };
    let room = hub.room().await;
    let (alice, carol) = (peer.user("alice"), peer.user("carol"));
    peer.join(&hub.gateway, &room, &alice).await.unwrap();
    peer.join(&hub.gateway, &room, &carol).await.unwrap();
    let base = hub.view(&room).await;
    Two { hub, room, peer, alice, carol, base }
}

fn at(ts: i64, draft: Draft) -> Draft {
    Draft { origin_server_ts: ts, ..draft }
}

#[tokio::test]
async fn of_two_topics_the_log_has_the_one_that_the_graph_has_in_either_order() {
    for (late_first, real) in [(false, false), (true, false), (false, true), (true, true)] {
        let two = two(real).await;
        let topic =
            |user: &UserId, ts, topic: &str| at(ts, draft(user, "m.room.topic", Some(""), json!({ "topic": topic })));
        let mut topics = [topic(&two.alice, NOW - 10, "early"), topic(&two.carol, NOW - 5, "late")];
        if late_first {
            topics.reverse();
        }
        for topic in &topics {
            assert!(two.hub.pdu(&two.peer, &mut two.base.clone(), topic).await);
        }
        two.hub.assert_in_step(&two.room).await;
        assert_eq!(two.hub.says(&two.room, "m.room.topic", "").await["topic"], "late");
        // Only where the log's last word was the other one is anything said.
        let (last, _) = two.hub.log(&two.room).await.events.last().unwrap().clone();
        assert_eq!(last.sender == bot(), late_first, "{:?}", last.content());
    }
}

#[tokio::test]
async fn a_ban_and_what_the_banned_says_at_once() {
    let two = two(true).await;
    let users = json!({ (bot().as_str()): (1_i64 << 53) - 1, (two.alice.as_str()): 60 });
    let levels = json!({ "users": users, "users_default": 50, "ban": 50 });
    two.hub.gateway.send(&two.room, state("m.room.power_levels", "", levels)).await.unwrap();
    let mut here = two.hub.view(&two.room).await;
    let mut there = here.clone();
    assert!(two.hub.pdu(&two.peer, &mut here, &message(&two.carol, "before")).await);
    assert!(two.hub.pdu(&two.peer, &mut here, &member(&two.alice, &two.carol, "ban")).await);
    // Allowed where it stands, and not by what the room is now.
    assert!(!two.hub.pdu(&two.peer, &mut there, &message(&two.carol, "too late")).await);
    two.hub.assert_in_step(&two.room).await;
    assert_eq!(two.hub.says(&two.room, "m.room.member", two.carol.as_str()).await["membership"], "ban");
}

#[tokio::test]
async fn two_who_ban_each_other_are_to_the_log_what_they_are_to_the_graph() {
    for (reverse, real) in [(false, false), (true, false), (false, true), (true, true)] {
        let two = two(real).await;
        let mut bans =
            [at(NOW - 10, member(&two.alice, &two.carol, "ban")), at(NOW - 5, member(&two.carol, &two.alice, "ban"))];
        // Each is judged by the levels of before, at which they are equal and cannot; so one is raised first.
        let levels = json!({
            "users": { (bot().as_str()): (1_i64 << 53) - 1, (two.alice.as_str()): 60, (two.carol.as_str()): 60 },
            "users_default": 50, "ban": 50, "kick": 50,
        });
        two.hub.gateway.send(&two.room, state("m.room.power_levels", "", levels)).await.unwrap();
        let base = two.hub.view(&two.room).await;
        let lower = |user: &UserId, of: &UserId| {
            let mut users = object(json!({ (bot().as_str()): (1_i64 << 53) - 1 }));
            users.insert(user.to_string(), json!(60));
            users.insert(of.to_string(), json!(60));
            users.insert(user.to_string(), json!(if user == two.alice { 60 } else { 59 }));
            draft(user, "m.room.power_levels", Some(""), json!({ "users": users, "users_default": 50, "ban": 50 }))
        };
        let _ = two.hub.pdu(&two.peer, &mut base.clone(), &at(NOW - 20, lower(&two.alice, &two.carol))).await;
        let _ = two.hub.pdu(&two.peer, &mut base.clone(), &at(NOW - 19, lower(&two.carol, &two.alice))).await;
        let now = two.hub.view(&two.room).await;
        if reverse {
            bans.reverse();
        }
        // Who is above the other bans them; the other's ban is none.
        let dag = &two.hub.gateway.dag;
        for ban in &bans {
            let key = ban.state_key.as_deref();
            let event = now.next(&ban.sender, &ban.kind, key, Value::Object(ban.content.clone()));
            let (id, event) = two.peer.sign(LM, event);
            two.peer.keep(&id, &event);
            two.peer.put(dag, &[&event]).await;
        }
        two.hub.assert_in_step(&two.room).await;
    }
}

#[tokio::test]
async fn levels_set_at_once_are_resolved_and_said() {
    for (reverse, real) in [(false, false), (true, false), (false, true), (true, true)] {
        let two = two(real).await;
        let levels = |user: &UserId, ts, ban: i64| {
            let users = json!({ (bot().as_str()): (1_i64 << 53) - 1 });
            let levels =
                json!({ "users": users, "users_default": 50, "ban": ban, "events": { "m.room.power_levels": 50 } });
            at(ts, draft(user, "m.room.power_levels", Some(""), levels))
        };
        let mut both = [levels(&two.alice, NOW - 10, 10), levels(&two.carol, NOW - 5, 20)];
        if reverse {
            both.reverse();
        }
        for levels in &both {
            assert!(two.hub.pdu(&two.peer, &mut two.base.clone(), levels).await);
        }
        two.hub.assert_in_step(&two.room).await;
        // Which of them it is hangs on the IDs of their senders' joins.
        let ban = two.hub.says(&two.room, "m.room.power_levels", "").await["ban"].as_i64().unwrap();
        assert!([10, 20].contains(&ban), "{ban}");
    }
}

/// Of the server with nobody else in the room, to which the graph has nothing to tell any more.
#[tokio::test]
async fn who_is_taken_out_because_the_graph_forgot_the_join_is_told_so() {
    for real in [false, true] {
        let (peer, other) = (Peer::start("graph.example").await, Peer::start("other.example").await);
        let hub = if real { Hub::real(&[&peer, &other]).await } else { Hub::start(&[&peer, &other]).await };
        let room = hub.room().await;
        let (alice, dora) = (peer.user("alice"), other.user("dora"));
        peer.join(&hub.gateway, &room, &alice).await.unwrap();
        let base = hub.view(&room).await;
        let close = draft(&alice, "m.room.join_rules", Some(""), json!({ "join_rule": "invite" }));
        assert!(hub.pdu(&other, &mut base.clone(), &member(&dora, &dora, "join")).await);
        assert!(hub.pdu(&peer, &mut base.clone(), &close).await);
        hub.assert_in_step(&room).await;
        let (last, _) = hub.log(&room).await.events.last().unwrap().clone();
        assert_eq!((last.state_key.as_deref(), &last.sender), (Some(dora.as_str()), &bot()));
        assert_eq!(outbox(&hub, &room, &other).await, std::slice::from_ref(&last.event_id));
        assert_eq!(outbox(&hub, &room, &peer).await.last(), Some(&last.event_id));
        // And of nothing else after that.
        hub.gateway.send(&room, message(&bot(), "among us")).await.unwrap();
        assert_eq!(outbox(&hub, &room, &other).await, std::slice::from_ref(&last.event_id));
    }
}

#[tokio::test]
async fn a_join_that_the_graph_forgets_is_a_kick_in_the_log() {
    let two = two(true).await;
    let dora = two.peer.user("dora");
    let mut open = two.base.clone();
    // On one branch the room is closed, earlier than dora comes on the other.
    let close = draft(&two.alice, "m.room.join_rules", Some(""), json!({ "join_rule": "invite" }));
    assert!(two.hub.pdu(&two.peer, &mut open, &member(&dora, &dora, "join")).await);
    assert_eq!(two.hub.says(&two.room, "m.room.member", dora.as_str()).await["membership"], "join");
    assert!(two.hub.pdu(&two.peer, &mut two.base.clone(), &close).await);
    two.hub.assert_in_step(&two.room).await;
    let view = two.hub.view(&two.room).await;
    let is_in = two.hub.gateway.membership(&two.room, &dora).await;
    let said = two.hub.says(&two.room, "m.room.member", dora.as_str()).await;
    assert_eq!(said["membership"], is_in.as_deref().unwrap_or("leave"));
    assert_eq!(is_in.as_deref(), Some("leave"), "{said:?}");
    assert_eq!(said["im.isthmus.repair"], true);
    assert!(view.state.contains_key(&("m.room.member".to_owned(), dora.to_string())));
    // She may come again when she is asked.
    two.hub.gateway.send(&two.room, member(&bot(), &dora, "invite")).await.unwrap();
    let mut view = two.hub.view(&two.room).await;
    assert!(two.hub.pdu(&two.peer, &mut view, &member(&dora, &dora, "join")).await);
    two.hub.assert_in_step(&two.room).await;
}

#[tokio::test]
async fn lpdus_and_pdus_by_turns_are_one_log() {
    let two = two(true).await;
    let linear = Peer::start("linear.example").await;
    let lena = linear.user("lena");
    two.hub.lpdu(&linear, &two.room, member(&lena, &lena, "join")).await.unwrap();
    let mut view = two.base.clone();
    for round in 0..8 {
        assert!(two.hub.pdu(&two.peer, &mut view, &message(&two.alice, &format!("a{round}"))).await);
        two.hub.lpdu(&linear, &two.room, message(&lena, &format!("l{round}"))).await.unwrap();
        if round % 3 == 0 {
            let topic = draft(&lena, "m.room.topic", Some(""), json!({ "topic": round }));
            two.hub.lpdu(&linear, &two.room, topic).await.unwrap();
            let topic = draft(&two.carol, "m.room.topic", Some(""), json!({ "topic": format!("c{round}") }));
            assert!(two.hub.pdu(&two.peer, &mut view, &topic).await);
            view = two.hub.view(&two.room).await;
        }
    }
    two.hub.assert_in_step(&two.room).await;
    let bodies =
        two.hub.log(&two.room).await.events.into_iter().filter(|(event, _)| event.kind == "m.room.message").count();
    assert_eq!(bodies, 16);
}

#[tokio::test]
async fn a_join_and_a_ban_at_once_end_as_a_ban() {
    for (join_first, real) in [(false, false), (true, false), (false, true), (true, true)] {
        let two = two(real).await;
        let dora = two.peer.user("dora");
        let users = json!({ (bot().as_str()): (1_i64 << 53) - 1, (two.alice.as_str()): 60 });
        let levels = json!({ "users": users, "users_default": 50, "ban": 50 });
        two.hub.gateway.send(&two.room, state("m.room.power_levels", "", levels)).await.unwrap();
        let base = two.hub.view(&two.room).await;
        let (join, ban) = (member(&dora, &dora, "join"), member(&two.alice, &dora, "ban"));
        let mut hers = base.clone();
        if join_first {
            assert!(two.hub.pdu(&two.peer, &mut hers, &join).await);
            assert!(two.hub.pdu(&two.peer, &mut base.clone(), &ban).await);
        } else {
            assert!(two.hub.pdu(&two.peer, &mut base.clone(), &ban).await);
            assert!(!two.hub.pdu(&two.peer, &mut hers, &join).await);
        }
        two.hub.assert_in_step(&two.room).await;
        let dora_is = two.hub.says(&two.room, "m.room.member", dora.as_str()).await;
        assert_eq!(dora_is["membership"], "ban", "{join_first} {real}");
        // What she says on the branch on which she came is not taken by either.
        assert!(!two.hub.pdu(&two.peer, &mut hers, &message(&dora, "hello")).await);
        two.hub.assert_in_step(&two.room).await;
    }
}
