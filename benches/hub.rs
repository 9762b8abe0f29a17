//! What a hub costs: the floor for one LPDU on one core, and in the same run what isthmus as a hub accepts over loopback
//! HTTP, durably (SQLite, `synchronous=FULL`), from participants that send batches of 50 and of 1, in one room and in
//! twenty; then the time of the echo at half that load. The hub is a process of its own, so that its CPU time and its memory
//! are its own too; the participants in this process do as little as they can. Machines are noisy: trust the ratios.
//!
//! `cargo bench --bench hub` (`-- --seconds 2` for a quick look, `-- --participants 2` to see what each destination costs).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::{Duration, Instant};

use isthmus::event::{Completion, Lpdu, Pdu, Redaction, VerifyKey, VerifyKeys, parse_object};
use isthmus::identity::SigningKey;
use ruma::server_name;
use serde_json::json;

use self::support::ear::Order;
use self::support::gateway::Gateway;
use self::support::hub;
use self::support::participant::Participant;
use self::support::percentile;

/// Events are trees of many small pieces, made by one thread and often dropped by another.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How many servers take part, unless told otherwise.
const PARTICIPANTS: usize = 4;
/// How many LPDUs each signs in advance, out of the clock's sight.
const PREPARED: u64 = 60_000;

fn main() {
    let _ = (*isthmus::federation::crypto_provider()).clone().install_default();
    let arguments: Vec<String> = std::env::args().collect();
    let after = |flag: &str| arguments.iter().skip_while(|argument| *argument != flag).nth(1);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    if let Some(directory) = after("--serve-hub") {
        return runtime.block_on(support::hub::serve(directory.as_ref()));
    }
    let seconds = after("--seconds").map_or(5, |text| text.parse().unwrap());
    let servers = after("--participants").map_or(PARTICIPANTS, |text| text.parse().unwrap());
    let floor = floor();
    println!("floor, one LPDU on one core       {:>8.0} us   {:>8.0} LPDU/s", floor.one, 1e6 / floor.one);
    println!("floor, batches of 50              {:>8.0} us   {:>8.0} LPDU/s", floor.batch, 1e6 / floor.batch);
    runtime.block_on(measure(seconds, servers, &floor));
}

struct Floor {
    one: f64,
    batch: f64,
}

/// Parse, hash, verify, complete, both hashes, sign, serialize: what nobody can leave out.
fn floor() -> Floor {
    let (hub, origin) = (server_name!("hub.example"), server_name!("part.example"));
    let (hub_key, key) = (SigningKey::generate(), SigningKey::generate());
    let public = VerifyKey::from_base64(&key.public_base64()).unwrap();
    let keys = VerifyKeys::from([(origin.to_owned(), BTreeMap::from([(key.id().to_owned(), public)]))]);
    let texts: Vec<Vec<u8>> = (0..50)
        .map(|number| {
            let template = support::message("!room:hub.example", "@bob:part.example", number);
            serde_json::to_vec(&Lpdu::build(template, hub, origin, &key).unwrap().json).unwrap()
        })
        .collect();
    let completion = Completion {
        auth_events: ["$nKHVqt3iyLA_HEE8lT1yUaaVjjBRR-fAqpN4t7opadc"; 3].map(|id| id.try_into().unwrap()).into(),
        prev_event: Some("$nKHVqt3iyLA_HEE8lT1yUaaVjjBRR-fAqpN4t7opadc".try_into().unwrap()),
    };
    let finish = |lpdu| Pdu::complete(lpdu, completion.clone(), hub, &hub_key).unwrap().to_bytes();
    let parse = |text: &Vec<u8>| Lpdu::parse(parse_object(text).unwrap()).unwrap();
    let one = best_of(|| {
        for text in &texts {
            black_box(finish(parse(text).verify(&keys).unwrap()));
        }
    });
    let batch = best_of(|| {
        for lpdu in Lpdu::verify_all(texts.iter().map(parse).collect(), &keys) {
            black_box(finish(lpdu.unwrap()));
        }
    });
    // What was measured is what a participant accepts.
    let pdu = parse_object(&finish(parse(&texts[0]).verify(&keys).unwrap())).unwrap();
    assert_eq!(Pdu::parse(pdu, Redaction::Draft).unwrap().json["content"]["n"], json!(0));
    Floor { one, batch }
}

/// Microseconds for one of the fifty, in the median of many runs.
fn best_of(mut run: impl FnMut()) -> f64 {
    let mut runs: Vec<f64> = (0..60)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64() * 1e6 / 50.0
        })
        .collect();
    runs.sort_by(f64::total_cmp);
    runs[runs.len() / 2]
}

async fn measure(seconds: u64, servers: usize, floor: &Floor) {
    println!("\n{servers} participants       LPDU/s    hub CPU/LPDU   x floor   sent   lost  doubled  misplaced");
    let mut half = 0.0;
    for (rooms, batch) in [(1, 50), (20, 50), (1, 1), (20, 1)] {
        let directory = tempfile::tempdir().unwrap();
        let hub = hub::start(directory.path(), rooms).await;
        let participants = join_all(&hub, servers).await;
        let most = if batch == 1 { PREPARED / 4 } else { PREPARED };
        let prepared: Vec<_> = participants.iter().map(|participant| participant.prepare(&hub, batch, most)).collect();
        let cpu = hub.cpu();
        let start = Instant::now();
        let until = start + Duration::from_secs(seconds);
        let sending =
            participants.iter().zip(prepared).map(|(participant, prepared)| participant.flood(&hub, prepared, until));
        let sent: usize = futures::future::join_all(sending).await.into_iter().sum();
        let elapsed = start.elapsed().as_secs_f64();
        settle(&participants, sent).await;
        let cpu = (hub.cpu() - cpu) / sent as f64 * 1e6;
        let rate = sent as f64 / elapsed;
        let per_floor = cpu / if batch == 1 { floor.one } else { floor.batch };
        let order = participants.iter().map(|participant| participant.ear.order()).fold(Order::default(), Order::and);
        println!(
            "{rooms:>2} rooms, batches of {batch:<2} {rate:>9.0} {cpu:>12.0} us {per_floor:>9.2} {sent:>6} {:>6} {:>8} {:>10}",
            sent * servers - order.different,
            order.doubled,
            order.misplaced
        );
        if order.different < sent * servers {
            println!("    of {sent} messages, the hub's log has {}", messages_in_log(directory.path()).await);
        }
        if batch == 50 && rooms == 1 {
            half = rate / 2.0;
        }
        println!("    peak memory of the hub: {} MiB", hub.peak_memory() >> 20);
    }
    let directory = tempfile::tempdir().unwrap();
    let hub = hub::start(directory.path(), 1).await;
    let participants = join_all(&hub, servers).await;
    let pace = Duration::from_secs_f64(50.0 * servers as f64 / half);
    let prepared: Vec<_> = participants.iter().map(|participant| participant.prepare(&hub, 50, PREPARED)).collect();
    let until = Instant::now() + Duration::from_secs(seconds);
    let sending = participants.iter().zip(prepared).enumerate().map(|(number, (participant, prepared))| {
        // Servers that know nothing of each other do not send at the same moment.
        let phase = pace * number as u32 / servers as u32;
        participant.pace(&hub, prepared, (phase, pace), until)
    });
    let sent: usize = futures::future::join_all(sending).await.into_iter().sum();
    settle(&participants, sent).await;
    let mut echoes: Vec<f64> = participants.iter().flat_map(Participant::echoes).collect();
    echoes.sort_by(f64::total_cmp);
    println!(
        "\necho at {half:.0} LPDU/s in batches of 50: p50 {:.1} ms, p99 {:.1} ms, {} echoes of {sent}",
        percentile(&echoes, 0.5),
        percentile(&echoes, 0.99),
        echoes.len()
    );
}

async fn join_all(hub: &Gateway, servers: usize) -> Vec<Participant> {
    let mut participants = Vec::new();
    for number in 0..servers {
        participants.push(Participant::join(number, hub).await);
    }
    participants
}

/// How many messages the hub has in its logs: what is there and did not arrive was lost on the way out.
async fn messages_in_log(directory: &std::path::Path) -> i64 {
    let database = sqlx::SqlitePool::connect(&format!("sqlite://{}", directory.join("isthmus.db").display())).await;
    let count = sqlx::query_scalar("SELECT COUNT(*) FROM lm_events WHERE state_key IS NULL");
    count.fetch_one(&database.unwrap()).await.unwrap()
}

/// Waits until everybody has got everything, or nothing more comes.
async fn settle(participants: &[Participant], sent: usize) {
    let (mut before, mut quiet) = (0, 0);
    while quiet < 30 {
        let received: usize = participants.iter().map(|participant| participant.ear.received()).sum();
        if received >= sent * participants.len() {
            break;
        }
        quiet = if received == before { quiet + 1 } else { 0 };
        before = received;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
