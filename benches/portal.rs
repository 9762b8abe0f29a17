//! What a portal costs: messages a second through a portal that isthmus made, each way and both ways at once, durably
//! (SQLite, `synchronous=FULL`), between a homeserver and an LM participant that do as little as they can; then how long a
//! message takes when there is little to do. The clock runs from the first message sent until the last has arrived. The
//! homeserver sends as Synapse does: one transaction of at most 50 events in flight. The gateway is a process of its own,
//! so that its CPU time and its memory are its own too. Machines are noisy: trust the ratios.
//!
//! `cargo bench --bench portal` (`-- --seconds 2` for a quick look, `-- --only in` for one line: `in`, `out`, `both`, `in-paced`,
//! `out-paced`).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::time::{Duration, Instant};

use self::support::ear::Ear;
use self::support::gateway::Gateway;
use self::support::homeserver::Homeserver;
use self::support::participant::Participant;
use self::support::{percentile, portal};

/// Events are trees of many small pieces, made by one thread and often dropped by another.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What a stock Synapse accepts of one server's events in one room, a second.
const SYNAPSE: f64 = 100.0;
/// How many messages a second are prepared for: more than can be carried.
const MOST: u64 = 8_000;
/// How many messages a second there are where there is little to do.
const UNLOADED: u32 = 100;
const BATCH: usize = 50;

fn main() {
    let _ = (*isthmus::federation::crypto_provider()).clone().install_default();
    let arguments: Vec<String> = std::env::args().collect();
    let after = |flag: &str| arguments.iter().skip_while(|argument| *argument != flag).nth(1);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    if let Some(directory) = after("--serve-portal") {
        return runtime.block_on(portal::serve(directory.as_ref()));
    }
    let seconds = after("--seconds").map_or(5, |text| text.parse().unwrap());
    let only = after("--only").cloned();
    runtime.block_on(measure(seconds, only.as_deref()));
}

/// A portal with somebody on either side.
struct World {
    _directory: tempfile::TempDir,
    gateway: Gateway,
    participant: Participant,
    homeserver: Homeserver,
}

/// Which way messages go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    In,
    Out,
    Both,
}

impl World {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let gateway = portal::start(directory.path()).await;
        let room = gateway.hello["matrix_room"].as_str().unwrap().to_owned();
        let mut homeserver = Homeserver::join(0, &gateway, &room).await;
        let participant = Participant::join(1, &gateway).await;
        within(Duration::from_secs(20), homeserver.meet("@lm_")).await;
        let mut world = Self { _directory: directory, gateway, participant, homeserver };
        // The first message brings the ghost with it.
        let first = world.homeserver.prepare(&world.gateway, 1, 0..1);
        world.homeserver.flood(&world.gateway, first, far()).await;
        settle(&world.participant.ear, 1).await;
        world
    }

    /// Sends as fast as the gateway takes it.
    async fn flood(&mut self, way: Way, seconds: u64) {
        let (gateway, count) = (&self.gateway, MOST * seconds);
        let into = if way == Way::Out { Vec::new() } else { self.homeserver.prepare(gateway, BATCH, 1..count) };
        let out = if way == Way::In { Vec::new() } else { self.participant.prepare(gateway, BATCH, count) };
        let cpu = gateway.cpu();
        let start = Instant::now();
        let until = start + Duration::from_secs(seconds);
        let sending_in = async { if way == Way::Out { 0 } else { self.homeserver.flood(gateway, into, until).await } };
        let sending_out = async { if way == Way::In { 0 } else { self.participant.flood(gateway, out, until).await } };
        let (sent_in, sent_out) = tokio::join!(sending_in, sending_out);
        let accepted = start.elapsed().as_secs_f64();
        settle(&self.participant.ear, sent_in + sent_out + 1).await;
        settle(&self.homeserver.ear, sent_out).await;
        let cpu = (gateway.cpu() - cpu) / (sent_in + sent_out) as f64 * 1e6;
        if sent_in + 1 == count as usize || sent_out == count as usize {
            println!("(there was nothing left to send: the gateway is faster than this)");
        }
        // The participant gets its own messages back too.
        let ways = [("Matrix -> LM", &self.participant.ear, sent_in), ("LM -> Matrix", &self.homeserver.ear, sent_out)];
        for (name, ear, sent) in ways.into_iter().filter(|(.., sent)| *sent > 0) {
            let took = ear.last().unwrap().duration_since(start).as_secs_f64();
            let order = ear.order();
            let expected = if sent == sent_in && way != Way::Out { sent_in + sent_out + 1 } else { sent };
            println!(
                "{name}{} {:>8.0} {:>9.0} {:>9.1}x {cpu:>9.0} us {sent:>7} {:>6} {:>8} {:>10}",
                if way == Way::Both { ", both" } else { "      " },
                sent as f64 / accepted,
                sent as f64 / took,
                sent as f64 / took / SYNAPSE,
                expected as i64 - order.different as i64,
                order.doubled,
                order.misplaced
            );
        }
        println!("    peak memory of the gateway: {} MiB", gateway.peak_memory() >> 20);
    }

    /// Sends now and then, and says how long a message took.
    async fn pace(&mut self, way: Way, seconds: u64) {
        let gateway = &self.gateway;
        let pace = Duration::from_secs(1) / UNLOADED;
        let count = u64::from(UNLOADED) * seconds;
        let cpu = gateway.cpu();
        let until = |start: Instant| start + Duration::from_secs(seconds);
        let (name, sent, mut delays) = if way == Way::In {
            let prepared = self.homeserver.prepare(gateway, 1, 1..count + 1);
            let sent_at = self.homeserver.pace(gateway, prepared, pace, until(Instant::now())).await;
            settle(&self.participant.ear, sent_at.len() + 1).await;
            ("Matrix -> LM", sent_at.len(), self.participant.ear.delays(&sent_at, |_| true))
        } else {
            let prepared = self.participant.prepare(gateway, 1, count);
            let sent = self.participant.pace(gateway, prepared, (Duration::ZERO, pace), until(Instant::now())).await;
            settle(&self.homeserver.ear, sent).await;
            ("LM -> Matrix", sent, self.homeserver.ear.delays(&self.participant.sent_at(), |_| true))
        };
        delays.sort_by(f64::total_cmp);
        println!(
            "{name} at {UNLOADED}/s: p50 {:.1} ms, p99 {:.1} ms, gateway CPU {:.0} us a message, {} of {sent} arrived",
            percentile(&delays, 0.5),
            percentile(&delays, 0.99),
            (gateway.cpu() - cpu) / sent as f64 * 1e6,
            delays.len(),
        );
    }
}

async fn measure(seconds: u64, only: Option<&str>) {
    let wanted = |name: &str| only.is_none_or(|only| only == name);
    println!(
        "                            accepted/s arrived/s x Synapse    CPU/message    sent   lost  doubled  misplaced"
    );
    for (name, way) in [("in", Way::In), ("out", Way::Out), ("both", Way::Both)] {
        if wanted(name) {
            World::new().await.flood(way, seconds).await;
        }
    }
    for (name, way) in [("in-paced", Way::In), ("out-paced", Way::Out)] {
        if wanted(name) {
            World::new().await.pace(way, seconds).await;
        }
    }
}

/// Waits until so many messages have come, or nothing more comes.
async fn settle(ear: &Ear, sent: usize) {
    let (mut before, mut quiet) = (0, 0);
    while quiet < 300 {
        let received = ear.received();
        if received >= sent {
            break;
        }
        quiet = if received == before { quiet + 1 } else { 0 };
        before = received;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(limit, work).await.expect("it took too long")
}

fn far() -> Instant {
    Instant::now() + Duration::from_secs(20)
}
