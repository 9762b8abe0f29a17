//! The end of a schedule: all that was said comes everywhere, every server is in the room again, and two things happen whose outcome is
//! known: a fork that must be corrected in the log, and a gap in which somebody comes.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use isthmus::clock::Clock as _;
use isthmus::seam::Draft;
use ruma::{OwnedEventId, OwnedUserId, UserId};
use serde_json::json;

use super::{GRAPH, HUB, NAMES, PARTS, PATIENCE, Schedule};
use crate::lm::world::{draft, member, message};

/// How often it may turn out at the end that somebody is out of the room.
const ROUNDS: usize = 4;

impl Schedule {
    /// Waits until nothing is on its way.
    async fn quiet(&mut self) {
        let start = Instant::now();
        let mut still = 0;
        while still < 5 {
            let mut waiting = Vec::new();
            for node in self.nodes.iter().flatten() {
                let queues = node.context.outbound.status().await.unwrap().into_iter();
                waiting.extend(queues.filter(|queue| queue.waiting > 0).map(|queue| (node.name.clone(), queue)));
            }
            self.deliver().await;
            let is_still = waiting.is_empty() && self.home.waiting.is_empty();
            still = if is_still { still + 1 } else { 0 };
            let home = &self.home.waiting;
            assert!(start.elapsed() < PATIENCE, "waits for ever: {waiting:#?} {home:?}\n{:#?}", self.told);
            self.hurry();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until all that was said is everywhere, with one user of every server in the room.
    pub(super) async fn settle(&mut self) {
        self.heal();
        self.quiet().await;
        self.clock.0.fetch_add(61_000, Ordering::SeqCst);
        let bot = self.node(HUB).user("bot");
        // What was corrected too often in a minute is tried again with the next event.
        self.send(vec![(HUB, message(&bot, "settling"))]).await;
        self.quiet().await;
        let all: Vec<OwnedUserId> =
            (1..=NAMES.len()).map(|server| UserId::parse(format!("@u0:{}", self.name(server))).unwrap()).collect();
        // Also of whom the hub says that they are in: their server may have lost the answer to their join.
        self.bring_in(&all, true).await;
        self.have_in(&all).await;
        self.open().await;
        self.fork().await;
        self.open().await;
        self.come_in_a_gap().await;
        for _ in 0..ROUNDS {
            // Each with all that is there before it, so that nothing is left that only one of them goes by.
            self.home.look(self.nodes[GRAPH].as_ref().unwrap(), &self.room).await;
            for server in [NAMES.len(), GRAPH, HUB, PARTS[0], PARTS[1]] {
                let sender = if server == HUB { bot.clone() } else { all[server - 1].clone() };
                self.clock.0.fetch_add(61_000, Ordering::SeqCst);
                self.send(vec![(server, message(&sender, &format!("{sender} at the end, {}", self.told.len())))]).await;
                self.quiet().await;
            }
            // What waited for others may have come only now, and thrown somebody out.
            if !self.bring_in(&all, false).await {
                return;
            }
        }
        panic!("somebody is thrown out again and again: {:#?}", self.told);
    }

    /// Has everybody may come in. Of two branches the one wins in which who has the lower level has said it, however old that is, so what
    /// comes late can close the room again.
    async fn open(&mut self) {
        for _ in 0..ROUNDS {
            let state = self.node(HUB).dag.state(&self.room).await.unwrap();
            let rule = state.get(&("m.room.join_rules".to_owned(), String::new()));
            if rule.is_some_and(|event| event.content["join_rule"] == "public") {
                return;
            }
            self.told.push(format!("the room is not open, by {:?}", rule.map(|event| &event.event_id)));
            self.clock.0.fetch_add(61_000, Ordering::SeqCst);
            let bot = self.node(HUB).user("bot");
            self.send(vec![(HUB, draft(&bot, "m.room.join_rules", Some(""), json!({ "join_rule": "public" })))]).await;
            self.quiet().await;
        }
        panic!("the room is closed again and again: {:#?}", self.told);
    }

    /// Has everybody in the room. Who comes has their server say what it has, by which others can be thrown out; and of who is out
    /// nobody can say that they see what happens next.
    async fn have_in(&mut self, all: &[OwnedUserId]) {
        for _ in 0..ROUNDS {
            if !self.bring_in(all, false).await {
                return;
            }
        }
        panic!("somebody is thrown out again and again: {:#?}", self.told);
    }

    /// Whoever is out of the room comes in, or everybody; whether somebody was out.
    async fn bring_in(&mut self, all: &[OwnedUserId], everybody: bool) -> bool {
        let mut was_out = false;
        for (server, user) in all.iter().enumerate().map(|(index, user)| (index + 1, user)) {
            let state = self.node(HUB).dag.state(&self.room).await.unwrap();
            let is = state.get(&("m.room.member".to_owned(), user.to_string()));
            let is = is.and_then(|event| event.content["membership"].as_str());
            if is == Some("join") && !everybody {
                continue;
            }
            self.told.push(format!("{user} is out, by {is:?}, and comes in"));
            was_out = true;
            if is == Some("ban") {
                let bot = self.node(HUB).user("bot");
                self.send(vec![(HUB, member(&bot, user, "leave"))]).await;
            }
            self.quiet().await;
            self.open().await;
            if server < NAMES.len() {
                if let Err(why) = self.join(server, user).await {
                    panic!("{user} cannot join: {why} {:#?}", self.told);
                }
            } else {
                self.home.view = self.home.peer.join_at(&self.node(HUB).dag, &self.room, user).await.unwrap();
            }
        }
        self.quiet().await;
        was_out
    }

    /// A fork, of which what comes to the log last is not what the graph comes to.
    async fn fork(&mut self) {
        self.clock.0.fetch_add(61_000, Ordering::SeqCst);
        let (bot, home, now) = (self.node(HUB).user("bot"), self.home.user("u0"), self.clock.now_ms());
        self.home.look(self.nodes[HUB].as_ref().unwrap(), &self.room).await;
        let topic = |sender: &UserId, topic: &str, age: i64| Draft {
            origin_server_ts: now - age,
            ..draft(sender, "m.room.topic", Some(""), json!({ "topic": topic }))
        };
        self.node(HUB).send(&self.room, topic(&bot, "the newer", 0)).await.unwrap();
        self.quiet().await;
        self.home.send(&topic(&home, "the older", 30_000), &[HUB, GRAPH]);
        self.quiet().await;
        for node in [HUB, GRAPH] {
            let state = self.node(node).dag.state(&self.room).await.unwrap();
            let topic = &state[&("m.room.topic".to_owned(), String::new())];
            assert_eq!(topic.content["topic"], "the newer", "{:#?}", self.told);
        }
    }

    /// Somebody comes while nobody hears of it, says something, and is in the room.
    async fn come_in_a_gap(&mut self) {
        let (home, late) = (self.home.user("u0"), self.home.user("late"));
        self.home.look(self.nodes[HUB].as_ref().unwrap(), &self.room).await;
        self.home.send(&message(&home, "lost for ever"), &[]);
        let join = self.home.send(&member(&late, &late, "join"), &[]);
        // What the state is made of is given, and the way there is not.
        self.home.peer.memory.hidden.lock().unwrap().remove(&join);
        self.home.send(&message(&home, "lost as well"), &[]);
        let said = self.home.send(&message(&late, "after the gap"), &[HUB, GRAPH]);
        self.quiet().await;
        let log = self.node(HUB).log(&self.room).await;
        let place = |id: &OwnedEventId| log.iter().position(|one| one.event.event_id == *id);
        assert!(place(&join).is_some() && place(&join) < place(&said), "{:#?}", self.told);
    }
}
