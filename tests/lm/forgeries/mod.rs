//! No sequence of LPDUs, PDUs and forged requests gets an event of another server's user into a log. An adversary who owns the keys of
//! two LM servers and of a graph server does what it likes, by a seed (`ISTHMUS_SEED=N`), against a hub and its participant, and as the
//! hub of a room, and in a shared room as a server of its graph; servers that are honest talk in between. Afterwards every event of every
//! honest server's log, and of every graph, is one that its sender's server has really made: the test knows all that honest servers were
//! asked to say.

mod adversary;
mod nearly_right;
mod shared;

use std::collections::BTreeSet;

use isthmus::event::{Object, Pdu, Redaction, VerifyKey, canonical_json, content_hash, lpdu_hash, redact};
use isthmus::lm::{Appended, Sent};
use rand::Rng as _;
use ruma::{OwnedEventId, OwnedUserId, RoomId};
use serde_json::{Value, json};

use self::adversary::{Adversary, Target};
use super::world::{Node, World, message};

/// How many steps a sequence has.
const STEPS: usize = 120;
/// With this begins what is said in events that are right but for one thing, and in those that are right.
const AIMED: &str = "aimed";
const RIGHT: &str = "right";
/// What is said of an event of an honest server that it was not asked for.
const UNASKED: &str = "not what its server was asked to say";

/// What honest servers were asked to say.
#[derive(Default)]
pub struct Genuine {
    /// The IDs of events, and of LPDUs.
    ids: BTreeSet<OwnedEventId>,
    /// Who was to join or leave by a handshake, whose event the server makes.
    moves: BTreeSet<(OwnedUserId, &'static str)>,
}

impl Genuine {
    fn knows(&self, event: &Pdu) -> bool {
        let membership = event.content().get("membership").and_then(Value::as_str);
        let moves = |(user, wanted): &(OwnedUserId, &str)| {
            event.kind == "m.room.member"
                && event.sender == *user
                && event.state_key.as_deref() == Some(user.as_str())
                && membership == Some(*wanted)
        };
        let is_known = |id: &OwnedEventId| self.ids.contains(id);
        is_known(&event.event_id) || event.lpdu_id.as_ref().is_some_and(is_known) || self.moves.iter().any(moves)
    }

    /// An honest server is asked to say something.
    pub async fn say(&mut self, node: &Node, room: &RoomId, localpart: &str, body: &str) {
        match node.send(room, message(&node.user(localpart), body)).await {
            Ok(Sent::Appended(event)) => drop(self.ids.insert(event.event.event_id.clone())),
            Ok(Sent::Queued { lpdu_id }) => drop(self.ids.insert(lpdu_id)),
            Err(refusal) => println!("{} may not speak: {refusal}", node.name),
        }
    }

    /// An honest server is asked to join; whether it did.
    async fn join(&mut self, node: &Node, room: &RoomId, localpart: &str, hub: &Node) -> bool {
        let user = node.user(localpart);
        self.moves.insert((user.clone(), "join"));
        let joined = node.lm.join(room, &user, std::slice::from_ref(&hub.name), Object::new()).await;
        if let Err(refusal) = &joined {
            println!("{user} does not join: {refusal}");
            // Where the hub may have taken it all the same, the server takes it back.
            self.moves.insert((user, "leave"));
        }
        joined.is_ok()
    }
}

/// Those of a log's events that nobody has made who is said to have made them, and why.
fn forgeries(log: &[Appended], servers: &[&Node], honest: &[&Node], genuine: &Genuine) -> Vec<String> {
    log.iter()
        .filter_map(|event| {
            Some(format!("{}: {:?}", forged(&event.event, servers, honest, genuine)?, event.event.json))
        })
        .collect()
}

fn forged(event: &Pdu, servers: &[&Node], honest: &[&Node], genuine: &Genuine) -> Option<&'static str> {
    let body = event.content().get("body").and_then(Value::as_str);
    if body.is_some_and(|body| body.starts_with(AIMED)) {
        return Some("wrong in one thing");
    }
    let sender = event.sender.server_name();
    let Some(server) = servers.iter().find(|server| server.name == sender) else {
        return Some("of a server that is not there");
    };
    let json = &event.json;
    let mut signed = redact(json, Redaction::Draft);
    let signatures = signed.remove("signatures").unwrap_or_default();
    let is_copy = [Redaction::Draft, Redaction::GraphServer].into_iter().any(|table| redact(json, table) == *json);
    if json.contains_key("hub_server") {
        for hubs in ["auth_events", "prev_events"] {
            signed.remove(hubs);
        }
        let hash = json["hashes"]["lpdu"]["sha256"].clone();
        signed.insert("hashes".to_owned(), json!({ "lpdu": { "sha256": hash } }));
        if !is_copy && hash != lpdu_hash(json) {
            return Some("changed after it was made");
        }
    } else if !is_copy && json["hashes"]["sha256"] != content_hash(json) {
        return Some("changed after it was made");
    }
    let key = &server.context.signing_key;
    let signature = signatures[server.name.as_str()][key.id()].as_str().unwrap_or_default().to_owned();
    let key = VerifyKey::from_base64(&key.public_base64()).unwrap();
    if key.verify(&canonical_json(&signed), &signature).is_err() {
        return Some("not signed by its sender's server");
    }
    let is_honest = honest.iter().any(|honest| honest.name == server.name);
    (is_honest && !genuine.knows(event)).then_some(UNASKED)
}

fn seeds(own: [u64; 2]) -> Vec<u64> {
    std::env::var("ISTHMUS_SEED").map_or(own.to_vec(), |text| vec![text.parse().unwrap()])
}

/// The names: a hub and a participant that are honest, one that comes later, two LM servers and a graph server of the adversary, one
/// of them everybody's notary.
const NAMES: [&str; 6] =
    ["hub.example", "part.example", "late.example", "evil.example", "worse.example", "graph.example"];

async fn world() -> (World, [Node; 6]) {
    World::with_notary(NAMES, std::sync::Arc::new(isthmus::clock::SystemClock), Some("worse.example")).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_sequence_of_requests_gets_an_event_of_another_servers_user_into_the_log_of_a_hub() {
    for seed in seeds([1, 2]) {
        let (_world, nodes) = world().await;
        let [hub, part, late, evil, worse, graph] = &nodes;
        let servers: Vec<&Node> = nodes.iter().collect();
        let honest = [hub, part, late];
        let mut genuine = Genuine::default();
        let room = hub.create_room("public").await;
        genuine.ids.extend(hub.log(&room).await.iter().map(|event| event.event.event_id.clone()));
        assert!(genuine.join(part, &room, "alice", hub).await);
        evil.join(&room, "eve", hub).await;
        worse.join(&room, "mallory", hub).await;
        let mut adversary = Adversary::new([evil, worse, graph], &honest, seed);
        adversary.lie_about_keys();
        // What has got into its hands and never to the hub.
        for number in 0..5 {
            let kept = part.lpdu(&room, &hub.name, &message(&part.user("alice"), &format!("{AIMED} {number}")));
            adversary.finds(kept.json);
        }
        let mut taken = 0;
        for step in 0..STEPS {
            match adversary.random.gen_range(0..10) {
                0 => genuine.say(hub, &room, "bot", &format!("hub {step}")).await,
                1 => genuine.say(part, &room, "alice", &format!("part {step}")).await,
                2 if step > STEPS / 2 => drop(genuine.join(late, &room, "lucy", hub).await),
                // What it may do, it does too.
                3 => taken += usize::from(adversary.speak(hub, &room).await),
                _ => {
                    adversary.look(&hub.log(&room).await);
                    let to = honest[adversary.random.gen_range(0..honest.len())];
                    adversary.attack(Target { to, hub, room: &room }).await;
                }
            }
        }
        assert!(taken > 0, "nothing of what the adversary may say was taken, seed {seed}");
        assert!(!adversary.reasons.is_empty(), "nothing that was sent was looked at, seed {seed}");
        assert!(adversary.answered.len() > 2, "all requests had one answer: {:?}", adversary.answered);
        println!("seed {seed}: {:?}", adversary.answered);
        genuine.say(hub, &room, "bot", "last").await;
        part.wait_for_body(&room, "last").await;
        for server in [hub, part] {
            let found = forgeries(&server.log(&room).await, &servers, &honest, &genuine);
            assert!(found.is_empty(), "seed {seed}, in the log of {}: {found:#?}", server.name);
        }
        assert!(adversary.aimed > 20, "hardly anything was nearly right, seed {seed}");
        // Nor is anything believed that it said of others in passing.
        for server in honest {
            for (_, edu) in server.watcher.edus.lock().unwrap().iter() {
                assert!(!honest.iter().any(|honest| honest.name == edu.user().server_name()), "seed {seed}: {edu:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_hub_gets_an_event_of_another_servers_user_into_the_logs_of_its_participants() {
    for seed in seeds([3, 4]) {
        let (_world, nodes) = world().await;
        let [hub, part, late, evil, worse, graph] = &nodes;
        let servers: Vec<&Node> = nodes.iter().collect();
        let honest = [hub, part, late];
        let mut genuine = Genuine::default();
        let room = evil.create_room("public").await;
        assert!(genuine.join(part, &room, "alice", evil).await);
        assert!(genuine.join(hub, &room, "henry", evil).await);
        worse.join(&room, "mallory", evil).await;
        let mut adversary = Adversary::new([evil, worse, graph], &honest, seed);
        adversary.lie_about_keys();
        adversary.lie_in_answers(&room);
        adversary.look(&part.log(&room).await);
        adversary.do_right(Target { to: part, hub: evil, room: &room }).await;
        for step in 0..STEPS {
            match adversary.random.gen_range(0..10) {
                0 => genuine.say(hub, &room, "henry", &format!("henry {step}")).await,
                1 => genuine.say(part, &room, "alice", &format!("alice {step}")).await,
                2 if step > STEPS / 2 => drop(genuine.join(late, &room, "lucy", evil).await),
                3 => drop(evil.send(&room, message(&evil.user("bot"), &format!("bot {step}"))).await),
                _ => {
                    let to = [hub, part][adversary.random.gen_range(0..2)];
                    adversary.look(&to.log(&room).await);
                    adversary.attack(Target { to, hub: evil, room: &room }).await;
                }
            }
        }
        println!("seed {seed}: {:?}", adversary.answered);
        assert!(adversary.reasons.iter().any(|reason| reason.contains("signature")), "{:?}", adversary.reasons);
        let mut events = 0;
        for server in honest {
            let Ok(Some(_)) = server.lm.room(&room).await else { continue };
            let log = server.log(&room).await;
            events += log.len();
            let found = forgeries(&log, &servers, &honest, &genuine);
            assert!(found.is_empty(), "seed {seed}, in the log of {}: {found:#?}", server.name);
        }
        assert!(events > 20, "hardly anything is in the logs, seed {seed}");
        let (one, other) = (hub.bodies(&room).await, part.bodies(&room).await);
        assert!(
            one.iter().chain(&other).any(|body| body.starts_with(RIGHT)),
            "nothing was even nearly right, seed {seed}"
        );
    }
}

/// What the two tests above look for is found when it is there: an event that an honest server's key signs behind its back, one whose
/// content is changed in the log, and one that another server has signed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_planted_in_a_log_is_found() {
    let (_world, nodes) = world().await;
    let [hub, part, _, evil, ..] = &nodes;
    let servers: Vec<&Node> = nodes.iter().collect();
    let honest = [hub, part];
    let mut genuine = Genuine::default();
    let room = hub.create_room("public").await;
    genuine.ids.extend(hub.log(&room).await.iter().map(|event| event.event.event_id.clone()));
    assert!(genuine.join(part, &room, "alice", hub).await);
    evil.join(&room, "eve", hub).await;
    genuine.say(part, &room, "alice", "said").await;
    hub.wait_for_body(&room, "said").await;
    let found = async || forgeries(&hub.log(&room).await, &servers, &honest, &genuine);
    assert_eq!(found().await, Vec::<String>::new());
    // As if its key were stolen.
    let stolen = part.lpdu(&room, &hub.name, &message(&part.user("alice"), "stolen"));
    part.transact(hub, "stolen", &[Value::Object(stolen.json)]).await.unwrap();
    let all = found().await;
    assert!(matches!(&all[..], [one] if one.starts_with("not what its server")), "{all:#?}");
    // As if the hub did not look at what is signed.
    let log = hub.log(&room).await;
    let event = log.iter().find(|event| event.event.content().get("body") == Some(&json!("said"))).unwrap();
    let mut changed = event.event.json.clone();
    changed.insert("content".to_owned(), json!({ "msgtype": "m.text", "body": "sold" }));
    let mut forged = evil.lpdu(&room, &hub.name, &message(&part.user("alice"), "forged")).json;
    for hubs in ["auth_events", "prev_events"] {
        forged.insert(hubs.to_owned(), event.event.json[hubs].clone());
    }
    forged["hashes"]["sha256"] = json!("AAAA");
    // One of the hub's own, in which there is no LPDU.
    let own = log.iter().find(|event| event.event.kind == "m.room.join_rules").unwrap();
    let mut hubs_own = own.event.json.clone();
    hubs_own.insert("content".to_owned(), json!({ "join_rule": "public", "more": "changed" }));
    let planted = [
        (event, changed, "changed after"),
        (event, forged, "not signed by"),
        (event, event.event.json.clone(), ""),
        (own, hubs_own, "changed after"),
        (own, own.event.json.clone(), ""),
    ];
    for (event, planted, why) in planted {
        let (room, position) = (room.clone(), event.position.0);
        let write = hub.context.store.write(move |tx| {
            Box::pin(async move {
                let query = "UPDATE lm_events SET json = $1 WHERE room_id = $2 AND position = $3";
                let query = sqlx::query(query).bind(canonical_json(&planted)).bind(room.as_str()).bind(position);
                query.execute(tx).await?;
                Ok(())
            })
        });
        write.await.unwrap();
        let all = found().await;
        assert_eq!(all.len(), 1 + usize::from(!why.is_empty()), "{all:#?}");
        assert!(all.iter().any(|one| one.starts_with(why)), "{all:#?}");
    }
}
