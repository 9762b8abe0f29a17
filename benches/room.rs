//! What a large room costs: a stock Synapse hosts one of many members and events (5,000 and 20,000), and isthmus, as it is shipped,
//! makes a portal of it. Shown are the time until the portal is made, until all members are in the LM room's log, and until a
//! message has crossed; the most memory that isthmus had (300 MiB is the promise); and what it asked of the Synapse. Beside it a
//! second stock Synapse joins the same room, which is what a Matrix homeserver takes for the same. Machines are noisy: trust the
//! ratios.
//!
//! `cargo bench --bench room` (`-- --members 500 --events 2000` for a quick look). The Synapse with its room is made once, which
//! takes some minutes, and kept in `target/bench-room/`; each run has a copy.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "../testbed/mod.rs"]
mod testbed;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use futures::StreamExt as _;
use reqwest::Method;
use serde_json::{Value, json};

use self::testbed::certificates::Authority;
use self::testbed::client::Client;
use self::testbed::process::{free_port, target_dir};
use self::testbed::{gateway, synapse};

/// How many clients speak at once.
const AT_ONCE: usize = 4;
/// A pause between two looks, also how exact the times are.
const LOOK: Duration = Duration::from_millis(20);
/// How long each part may take.
const LIMIT: Duration = Duration::from_secs(600);
const PASSWORD: &str = "isthmus";

#[derive(Parser)]
struct Arguments {
    /// How many members the room has.
    #[arg(long, default_value_t = 5_000)]
    members: usize,
    /// How many events the room has, the joins among them.
    #[arg(long, default_value_t = 20_000)]
    events: usize,
    /// What cargo adds.
    #[arg(long, hide = true)]
    bench: bool,
}

#[tokio::main]
async fn main() {
    let arguments = Arguments::parse();
    let kept = target_dir().unwrap().join(format!("bench-room/{}x{}", arguments.members, arguments.events));
    let made = made(&kept, &arguments).await;
    let scratch = tempfile::tempdir_in(target_dir().unwrap()).unwrap();
    measure(&kept, scratch.path(), &made, arguments.members).await;
}

/// What is known of the Synapse that is kept.
struct Made {
    room: String,
    ports: [u16; 2],
    token_of: String,
}

/// The Synapse with its room, made unless it is there.
async fn made(kept: &Path, arguments: &Arguments) -> Made {
    let note = kept.join("made.json");
    if let Ok(text) = std::fs::read(&note) {
        let note: Value = serde_json::from_slice(&text).unwrap();
        let port = |key: &str| u16::try_from(note[key].as_u64().unwrap()).unwrap();
        let text = |key: &str| note[key].as_str().unwrap().to_owned();
        return Made { room: text("room"), ports: [port("federation"), port("client")], token_of: text("creator") };
    }
    let _ = std::fs::remove_dir_all(kept);
    std::fs::create_dir_all(kept).unwrap();
    let ports = [free_port().unwrap(), free_port().unwrap()];
    let authority = Authority::new(kept).unwrap();
    let plan = synapse::Plan::at(&kept.join("synapse"), ports).unwrap();
    let synapse = plan.start(&authority, None).await.unwrap();
    let creator = synapse.register("creator", PASSWORD).await.unwrap();
    let room = json!({ "preset": "public_chat", "name": "The crowd", "room_version": "11" });
    let room = creator.create_room(room).await.unwrap();
    let (done, begun) = (AtomicUsize::new(0), Instant::now());
    let progress = |what: &str, all: usize| {
        let done = done.fetch_add(1, Ordering::Relaxed) + 1;
        if done % 500 == 0 {
            eprintln!("the Synapse's room: {what} {done} of {all} after {} s", begun.elapsed().as_secs());
        }
    };
    let crowd: Vec<Client> = futures::stream::iter(1..arguments.members)
        .map(|number| {
            let (synapse, room, progress) = (&synapse, &room, &progress);
            async move {
                let client = synapse.register(&format!("member-{number}"), PASSWORD).await.unwrap();
                client.join(room, &[]).await.unwrap();
                progress("member", arguments.members);
                client
            }
        })
        .buffer_unordered(AT_ONCE)
        .collect()
        .await;
    done.store(0, Ordering::Relaxed);
    let messages = arguments.events.saturating_sub(arguments.members);
    futures::stream::iter((0..messages).zip(crowd.iter().cycle()))
        .for_each_concurrent(AT_ONCE, |(number, client)| {
            let (room, progress) = (&room, &progress);
            async move {
                client.send_text(room, &format!("message {number} of the crowd")).await.unwrap();
                progress("message", messages);
            }
        })
        .await;
    drop(synapse);
    let [federation, client] = ports;
    let text = json!({ "room": room, "federation": federation, "client": client, "creator": "creator" });
    std::fs::write(note, text.to_string()).unwrap();
    Made { room, ports, token_of: "creator".to_owned() }
}

async fn measure(kept: &Path, scratch: &Path, made: &Made, members: usize) {
    copy(&kept.join("synapse"), &scratch.join("host"));
    let log = scratch.join("host/homeserver.log");
    let _ = std::fs::remove_file(&log);
    let authority = Authority::new(scratch).unwrap();
    let host = synapse::Plan::at(&scratch.join("host"), made.ports).unwrap();
    let host = host.start(&authority, None).await.unwrap();
    let speaker = Client::login(&host.client_url, &made.token_of, PASSWORD).await.unwrap();

    let binary = PathBuf::from(env!("CARGO_BIN_EXE_isthmus"));
    let mut plan = gateway::Plan::new(&scratch.join("isthmus"), &binary, &authority).unwrap();
    plan.log("warn");
    // A server with so many users is a large one, for which an admin raises this.
    plan.set_raw("budgets", "ghosts_per_hour", "0");
    let gateway = plan.start().await.unwrap();
    let idle = memory(gateway.pid().unwrap(), "VmRSS");

    let before = requests(&log);
    let begun = Instant::now();
    let body =
        json!({ "kind": "from_matrix", "matrix_room_id": made.room, "via": [host.server_name], "alias": "crowd" });
    let portal = gateway.admin(Method::POST, "/portals", Some(body)).await.unwrap();
    let answered = begun.elapsed();
    let path = format!("/portals/{}", portal["portal_id"].as_str().unwrap());
    let shown = until(async || {
        let shown = gateway.admin(Method::GET, &path, None).await.unwrap();
        let there = shown["health"]["members"]["matrix"].as_array().unwrap().len() >= members;
        let waits = shown["health"]["waiting"].as_array().unwrap().iter().any(|side| side["count"] != json!(0));
        (there && !waits).then_some(shown)
    });
    let shown = shown.await;
    let settled = begun.elapsed();
    let asked = difference(&before, &requests(&log));
    let crossing = Instant::now();
    let said = speaker.send_text(&made.room, "to the other side").await.unwrap();
    until(async || {
        let event = gateway.admin(Method::GET, &format!("/events/{}", testbed::client::segment(&said)), None).await;
        event.ok().filter(|event| event["status"] == "crossed")
    })
    .await;
    let crossed = crossing.elapsed();
    let peak = memory(gateway.pid().unwrap(), "VmHWM");
    assert_eq!(shown["state"], "active");

    let other = synapse::Plan::new(&scratch.join("other")).unwrap().start(&authority, None).await.unwrap();
    let joiner = other.register("joiner", PASSWORD).await.unwrap();
    let before = requests(&log);
    let begun = Instant::now();
    joiner.join(&made.room, &[&host.server_name]).await.unwrap();
    let joined = begun.elapsed();
    until(async || {
        let there = joiner.members(&made.room).await.unwrap();
        (there.len() >= members).then_some(())
    })
    .await;
    let synced = begun.elapsed();
    let theirs = difference(&before, &requests(&log));
    let other_peak = memory(other.pid(), "VmHWM");

    println!("                                     isthmus  a second Synapse");
    println!(
        "until it answers                   {:>7.1} s        {:>7.1} s",
        answered.as_secs_f64(),
        joined.as_secs_f64()
    );
    println!(
        "until all {members:>6} members are there  {:>7.1} s        {:>7.1} s",
        settled.as_secs_f64(),
        synced.as_secs_f64()
    );
    println!("then a message crosses in          {:>7.2} s", crossed.as_secs_f64());
    println!("most memory (idle before: {} MiB)  {:>5} MiB      {:>5} MiB", idle >> 20, peak >> 20, other_peak >> 20);
    println!(
        "requests to the room's host        {:>7}          {:>7}",
        asked.values().sum::<usize>(),
        theirs.values().sum::<usize>()
    );
    for (name, asked) in [("isthmus", asked), ("Synapse", theirs)] {
        for (endpoint, count) in asked {
            println!("    {name}: {count:>5} {endpoint}");
        }
    }
}

/// Looks until something is there.
async fn until<T>(mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let looking = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(LOOK).await;
        }
    };
    tokio::time::timeout(LIMIT, looking).await.expect("it took too long")
}

/// A line of what the kernel says of a process's memory, in bytes.
fn memory(pid: i32, line: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|found| found.starts_with(line)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// What other servers have asked of a Synapse, by method and endpoint, from its log.
fn requests(log: &Path) -> BTreeMap<String, usize> {
    let mut counted = BTreeMap::new();
    for line in std::fs::read_to_string(log).unwrap().lines().filter(|line| line.contains("Processed request:")) {
        let Some(request) = line.split('"').nth(1) else { continue };
        let mut words = request.split_whitespace();
        let (Some(method), Some(path)) = (words.next(), words.next()) else { continue };
        let mut segments = path.split(['/', '?']).skip(2);
        if let (Some(api @ ("federation" | "key")), Some(version), Some(endpoint)) =
            (segments.next(), segments.next(), segments.next())
        {
            *counted.entry(format!("{method} {api}/{version}/{endpoint}")).or_default() += 1;
        }
    }
    counted
}

fn difference(before: &BTreeMap<String, usize>, after: &BTreeMap<String, usize>) -> BTreeMap<String, usize> {
    let more = |(name, count): (&String, &usize)| (name.clone(), count - before.get(name).copied().unwrap_or(0));
    after.iter().map(more).filter(|(_, count)| *count > 0).collect()
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let there = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &there),
            false => drop(std::fs::copy(entry.path(), there).unwrap()),
        }
    }
}
