//! The same in a shared room: the adversary takes part in it by its log, and with a server that keeps its graph.

use isthmus::event::{Pdu, Redaction};
use isthmus::lm::Role;
use rand::Rng as _;
use ruma::RoomId;
use serde_json::json;

use super::adversary::{Adversary, Target};
use super::{AIMED, Genuine, RIGHT, STEPS, UNASKED, forged, seeds, world};
use crate::lm::shared::{does_lm_alone, shared_room};
use crate::lm::world::{Node, message};

/// All that a server keeps of a room's graph, in the room or not.
async fn graph_of(node: &Node, room: &RoomId) -> Vec<Pdu> {
    let query = sqlx::query_scalar("SELECT json FROM dag_events WHERE room_id = $1").bind(room.as_str().to_owned());
    let rows: Vec<Vec<u8>> = query.fetch_all(node.context.store.reader()).await.unwrap();
    let events = rows.iter().map(|row| serde_json::from_slice(row).unwrap());
    events.map(|event| Pdu::parse(event, Redaction::GraphServer).unwrap()).collect()
}

impl Genuine {
    /// What servers of a graph say of themselves: that they join branches, and that the hub takes somebody of the adversary's out whose
    /// branches have parted.
    fn expects(event: &Pdu, hub: &Node, honest: &[&Node]) -> bool {
        let of_honest = |user: &str| honest.iter().any(|node| user.ends_with(&format!(":{}", node.name)));
        let takes_out = event.sender == hub.user("bot")
            && event.content().get("im.isthmus.repair") == Some(&json!(true))
            && event.state_key.as_deref().is_some_and(|user| !of_honest(user));
        takes_out || (event.kind == "org.matrix.dummy_event" && event.content().is_empty())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_sequence_of_requests_gets_an_event_of_another_servers_user_into_a_shared_room() {
    for seed in seeds([5, 6]) {
        let (_world, nodes) = world().await;
        let [hub, part, late, evil, worse, graph] = &nodes;
        let servers: Vec<&Node> = nodes.iter().collect();
        let honest = [hub, part, late];
        let mut genuine = Genuine::default();
        for node in [part, evil, worse] {
            does_lm_alone(node);
        }
        let room = shared_room(hub, "public").await;
        genuine.ids.extend(hub.log(&room).await.iter().map(|event| event.event.event_id.clone()));
        assert!(genuine.join(part, &room, "alice", hub).await);
        evil.join(&room, "eve", hub).await;
        worse.join(&room, "mallory", hub).await;
        graph.join(&room, "grace", hub).await;
        let role = graph.lm.room(&room).await.unwrap().unwrap().role;
        assert!(matches!(role, Role::GraphServer { .. }), "{role:?}");
        let mut adversary = Adversary::new([evil, worse, graph], &honest, seed);
        adversary.takes_part_in_a_graph();
        adversary.lie_about_keys();
        // What has got into its hands and never to the hub.
        for number in 0..5 {
            let kept = part.lpdu(&room, &hub.name, &message(&part.user("alice"), &format!("{AIMED} {number}")));
            adversary.finds(kept.json);
        }
        adversary.look(&hub.log(&room).await);
        adversary.do_right(Target { to: hub, hub, room: &room }).await;
        let (mut taken, mut has_come) = (0, false);
        for step in 0..STEPS {
            match adversary.random.gen_range(0..10) {
                0 => genuine.say(hub, &room, "bot", &format!("hub {step}")).await,
                1 => genuine.say(part, &room, "alice", &format!("part {step}")).await,
                2 if has_come => genuine.say(late, &room, "lucy", &format!("late {step}")).await,
                2 if step > STEPS / 4 => has_come = genuine.join(late, &room, "lucy", hub).await,
                3 => taken += usize::from(adversary.speak(hub, &room).await),
                _ => {
                    adversary.look(&hub.log(&room).await);
                    let to = honest[adversary.random.gen_range(0..honest.len())];
                    adversary.attack(Target { to, hub, room: &room }).await;
                }
            }
        }
        println!("seed {seed}: {:?} {:#?}", adversary.answered, adversary.reasons);
        assert!(has_come && taken > 0, "nothing of what the adversary may say was taken, seed {seed}");
        assert!(adversary.reasons.iter().any(|reason| reason.contains("signature")), "{:?}", adversary.reasons);
        assert!(adversary.aimed > 20, "hardly anything was nearly right, seed {seed}");
        genuine.say(hub, &room, "bot", "last").await;
        for node in [part, late] {
            node.wait_for_body(&room, "last").await;
        }
        let by_graph = |body: &String| body.starts_with(RIGHT);
        assert!(hub.bodies(&room).await.iter().any(by_graph), "nothing was even nearly right, seed {seed}");
        for server in honest {
            let log = server.log(&room).await.into_iter().map(|event| Pdu::clone(&event.event));
            let graph = graph_of(server, &room).await;
            assert!(graph.len() > 20 || server.name == part.name, "hardly anything is in the graph, seed {seed}");
            for event in log.chain(graph) {
                let why = forged(&event, &servers, &honest, &genuine);
                let why = why.filter(|why| *why != UNASKED || !Genuine::expects(&event, hub, &honest));
                assert_eq!(why, None, "seed {seed}, at {}: {:?}", server.name, event.json);
            }
        }
    }
}
