//! Whatever graph servers and LM servers do, in whatever order: the log is one, and its state is the graph's.

use proptest::prelude::*;

use super::*;

/// What somebody does, and on which of the views that there are.
#[derive(Debug, Clone)]
struct Step {
    what: usize,
    who: usize,
    whom: usize,
    age: i64,
    on: prop::sample::Index,
}

fn step() -> impl Strategy<Value = Step> {
    (0..14_usize, 0..4_usize, 0..4_usize, 0..1_000_i64, any::<prop::sample::Index>())
        .prop_map(|(what, who, whom, age, on)| Step { what, who, whom, age, on })
}

fn does(step: &Step, who: &UserId, whom: &UserId, number: usize) -> Draft {
    let event = |kind: &str, key: &str, content: Value| draft(who, kind, Some(key), content);
    let draft = match step.what {
        0 => event("m.room.topic", "", json!({ "topic": number })),
        1 => event("m.room.name", "", json!({ "name": number })),
        2 => member(who, whom, "ban"),
        3 => member(who, whom, "leave"),
        4 => member(who, whom, "invite"),
        5 | 6 => member(who, who, "join"),
        7 => member(who, who, "leave"),
        8 => event(
            "m.room.join_rules",
            "",
            json!({ "join_rule": if number.is_multiple_of(2) { "public" } else { "invite" } }),
        ),
        9 => {
            let mut users = object(json!({ (bot().as_str()): (1_i64 << 53) - 1 }));
            users.insert(whom.to_string(), json!(40 + number % 3 * 10));
            let levels = json!({ "users": users, "users_default": 50, "ban": 50, "kick": 50, "invite": 0,
                "events": { "m.room.power_levels": 50 } });
            event("m.room.power_levels", "", levels)
        }
        _ => message(who, &format!("{number}")),
    };
    Draft { origin_server_ts: NOW - step.age, ..draft }
}

async fn scenario(steps: Vec<Step>, real: bool) {
    let (peer, linear) = (Peer::start("graph.example").await, Peer::start("linear.example").await);
    let peers = [&peer, &linear];
    let hub = if real { Hub::real(&peers).await } else { Hub::start(&peers).await };
    let room = hub.room().await;
    let users: Vec<_> = ["a", "b", "c", "d"].iter().map(|name| peer.user(name)).collect();
    let others: Vec<_> = ["k", "l", "m", "n"].iter().map(|name| linear.user(name)).collect();
    for user in users.iter().take(3) {
        peer.join(&hub.gateway, &room, user).await.unwrap();
    }
    for user in others.iter().take(2) {
        hub.lpdu(&linear, &room, member(user, user, "join")).await.unwrap();
    }
    let mut views = vec![hub.view(&room).await];
    for (number, step) in steps.iter().enumerate() {
        hub.gateway.clock.advance(20_000);
        let (user, other) = (&users[step.who], &others[step.who]);
        let whom = if number % 2 == 0 { &users[step.whom] } else { &others[step.whom] };
        match step.what {
            12 => {
                let step = Step { what: number % 11, ..step.clone() };
                drop(hub.lpdu(&linear, &room, does(&step, other, whom, number)).await);
            }
            13 => views.push(hub.view(&room).await),
            // The bot stays, or nobody could correct anything.
            11 if number % 11 != 7 => {
                let step = Step { what: number % 11, ..step.clone() };
                drop(hub.gateway.send(&room, does(&step, &bot(), whom, number)).await);
            }
            _ => {
                let mut view = step.on.get(&views).clone();
                let draft = does(step, user, whom, number);
                let key = draft.state_key.as_deref();
                let mut event = view.next(user, &draft.kind, key, Value::Object(draft.content.clone()));
                event["origin_server_ts"] = json!(draft.origin_server_ts);
                let (id, event) = peer.sign(LM, event);
                peer.keep(&id, &event);
                // What the rules forbid where it stands is no event; what is soft-failed others may follow.
                if peer.put(&hub.gateway.dag, &[&event]).await[0].result.is_ok() {
                    view.note(id, &event);
                    views.push(view);
                }
            }
        }
    }
    hub.gateway.clock.advance(120_000);
    hub.gateway.send(&room, message(&bot(), "the end")).await.unwrap();
    hub.assert_in_step(&room).await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 60, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn inv_2_inv_3_inv_4_the_log_is_what_the_graph_comes_to(
        steps in prop::collection::vec(step(), 1..30),
        real in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(scenario(steps, real));
    }
}
