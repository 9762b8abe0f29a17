//! The whole thing on one machine: a real Synapse, isthmus and a small LM provider on loopback, a user of each, a conversation,
//! and a gateway that is killed in the middle of it.
//!
//! `cargo run --release --example demo`, with `-- --once` to end after the conversation.

#[path = "lm_provider/provider/mod.rs"]
mod provider;
#[path = "../testbed/mod.rs"]
mod testbed;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use indicatif::ProgressBar;
use ruma::{OwnedRoomId, OwnedUserId};
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use self::provider::{NewRoom, News, Options, Provider};
use self::testbed::certificates::Authority;
use self::testbed::client::Client;
use self::testbed::gateway::{self, Gateway};
use self::testbed::process::{free_port, target_dir};
use self::testbed::{synapse, venv};

/// The LM provider's server name.
const HUB: &str = "hub.example";
/// The password of the Matrix user.
const PASSWORD: &str = "isthmus";

/// A Matrix user on a real Synapse and a user of an LM provider talk through isthmus.
#[derive(Parser)]
struct Arguments {
    /// Ends after the conversation.
    #[arg(long)]
    once: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let show = Show::new();
    let result = tokio::select! {
        // In this order, since the play takes the signal for its regular end when it is over and just stays up.
        biased;
        result = play(&show, arguments.once) => result,
        result = told_to_stop() => result.and_then(|()| bail!("stopped before the end")),
    };
    show.end();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            error.chain().skip(1).for_each(|cause| eprintln!("  because: {cause}"));
            ExitCode::FAILURE
        }
    }
}

/// Returns at Ctrl-C or SIGTERM. What was started is stopped when the rest is dropped.
async fn told_to_stop() -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        result = tokio::signal::ctrl_c() => result?,
        _ = terminate.recv() => {}
    }
    Ok(())
}

async fn play(show: &Show, once: bool) -> Result<()> {
    show.step("Python environment with Synapse");
    let python = {
        let show = show.clone();
        tokio::task::spawn_blocking(move || venv::python(&mut |line| show.detail(line))).await??
    };
    show.step(&format!("Synapse {} is in {}", venv::VERSION, python.display()));
    let binary = build_isthmus(show)?;
    let mut stage = Stage::set(show, &binary).await?;
    stage.talk(show).await?;
    show.end();
    stage.print();
    stage.judge()?;
    println!("\nNothing is missing, nothing is doubled, although isthmus was killed in the middle.");
    if once { Ok(()) } else { stage.stay().await }
}

/// Builds the binary, with the optimization that this example itself was built with.
fn build_isthmus(show: &Show) -> Result<PathBuf> {
    let target = target_dir()?;
    let (profile, directory) = if cfg!(debug_assertions) { ("dev", "debug") } else { ("release", "release") };
    show.step("building isthmus");
    show.end();
    let mut cargo = Command::new(env!("CARGO"));
    // Together with this example, which is built already: so the dependencies keep the features that they were built with.
    cargo.args(["build", "--bin", "isthmus", "--example", "demo", "--profile", profile, "--manifest-path"]);
    cargo.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml")).arg("--target-dir").arg(&target);
    ensure!(cargo.status()?.success(), "isthmus could not be built");
    Ok(target.join(directory).join("isthmus"))
}

/// All who take part.
struct Stage {
    /// Held while the demo's folder is in use.
    _lock: File,
    synapse: synapse::Synapse,
    gateway: Gateway,
    provider: Provider,
    alice: Client,
    bob: OwnedUserId,
    /// The room as Synapse knows it.
    matrix_room: String,
    /// The room as the LM provider knows it.
    lm_room: OwnedRoomId,
    /// What was said, in order: whether by Alice, and the text.
    said: Vec<(bool, String)>,
    /// What each side saw of it.
    seen_by_alice: Vec<(String, String)>,
    seen_by_bob: Vec<(String, String)>,
}

impl Stage {
    async fn set(show: &Show, binary: &Path) -> Result<Self> {
        let lock = File::create(target_dir()?.join("demo.lock"))?;
        ensure!(lock.try_lock().is_ok(), "a demo is running already: end it first");
        let directory = target_dir()?.join("demo");
        if directory.exists() {
            std::fs::remove_dir_all(&directory)?;
        }
        std::fs::create_dir_all(&directory)?;
        let authority = Authority::new(&directory)?;
        let synapse = synapse::Plan::at(&directory.join("synapse"), [port(8448)?, port(8008)?])?;
        let ports = [port(8449)?, port(9090)?];
        let mut gateway = gateway::Plan::at(&directory.join("isthmus"), binary, &authority, ports)?;

        show.step("starting the LM provider");
        let provider = Provider::start(Options {
            server_name: HUB.try_into()?,
            listen: ([127, 0, 0, 1], port(3000)?).into(),
            ca: Some(authority.file.clone()),
            resolve: BTreeMap::from([(gateway.server_name.as_str().try_into()?, gateway.url.parse()?)]),
            journal: None,
            eigen: false,
        })
        .await?;
        gateway.resolve(HUB, provider.url());

        show.step("registering isthmus with Synapse");
        let registration = gateway.register_with(&synapse)?;
        show.step("starting Synapse and isthmus");
        let (synapse, gateway) = tokio::try_join!(synapse.start(&authority, Some(&registration)), gateway.start())?;

        let bob = provider.user("bob")?;
        provider.set_display_name(&bob, "Bob");
        let new = NewRoom { alias: Some("cafe".to_owned()), name: Some("Café".to_owned()), ..NewRoom::default() };
        let lm_room = provider.create_room(&bob, new)?;
        let alice = synapse.register("alice", PASSWORD).await?;
        alice.set_display_name("Alice").await?;
        let alias = format!("#lm_cafe_{HUB}:{}", synapse.server_name);
        show.step(&format!("Alice joins {alias}"));
        let matrix_room = alice.join(&alias, &[]).await?;
        let (said, seen_by_alice, seen_by_bob) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self {
            _lock: lock,
            synapse,
            gateway,
            provider,
            alice,
            bob,
            matrix_room,
            lm_room,
            said,
            seen_by_alice,
            seen_by_bob,
        })
    }

    async fn talk(&mut self, show: &Show) -> Result<()> {
        show.step("they talk");
        self.say(true, "Hello from Matrix! Is this really a room of yours?").await?;
        self.heard().await?;
        self.say(false, "It is. I am on a server that knows nothing of event graphs.").await?;
        self.heard().await?;
        self.say(true, "And I am in Element. Shall we pull the plug?").await?;
        self.heard().await?;

        show.step("killing isthmus with SIGKILL; both go on talking");
        self.say(false, "Go on.").await?;
        self.gateway.kill()?;
        for number in 1..=5 {
            self.say(true, &format!("Alice, with nobody in between, {number} of 5")).await?;
            self.say(false, &format!("Bob, with nobody in between, {number} of 5")).await?;
        }
        show.step("starting isthmus again");
        self.gateway.start().await?;
        self.heard().await?;
        self.say(true, "Did everything arrive?").await?;
        self.heard().await?;
        self.say(false, "Everything, once.").await?;
        self.heard().await?;
        self.look().await
    }

    async fn say(&mut self, is_alice: bool, text: &str) -> Result<()> {
        if is_alice {
            self.alice.send_text(&self.matrix_room, text).await?;
        } else {
            self.provider.send_text(&self.bob, &self.lm_room, text)?;
        }
        self.said.push((is_alice, text.to_owned()));
        Ok(())
    }

    /// Waits until both have everything that was said.
    async fn heard(&self) -> Result<()> {
        for (is_alice, text) in &self.said {
            if *is_alice {
                self.provider.wait_for_text(&self.lm_room, text).await?;
            } else {
                self.alice.wait_for_text(&self.matrix_room, text).await?;
            }
        }
        Ok(())
    }

    /// Reads the conversation from Synapse's own history and from the provider's log.
    async fn look(&mut self) -> Result<()> {
        let members = self.alice.members(&self.matrix_room).await?;
        let name = |user: &str| {
            let content = members.get(user).and_then(|content| content["displayname"].as_str());
            content.unwrap_or(user).to_owned()
        };
        let text = |content: Option<&Value>| content.and_then(|body| body.as_str()).unwrap_or_default().to_owned();
        for event in self.alice.history(&self.matrix_room).await? {
            if event["type"] == "m.room.message" {
                let sender = event["sender"].as_str().unwrap_or_default();
                self.seen_by_alice.push((name(sender), text(event["content"].get("body"))));
            }
        }
        for event in self.provider.log(&self.lm_room) {
            if event.kind == "m.room.message" {
                let sender = self.provider.display_name(&self.lm_room, event.sender.as_str());
                self.seen_by_bob.push((sender, text(event.content().get("body"))));
            }
        }
        Ok(())
    }

    fn print(&self) {
        println!("\nWhat Alice ({}) saw in her Matrix room {}:", self.alice.user_id, self.matrix_room);
        self.seen_by_alice.iter().for_each(|(name, text)| println!("  <{name}> {text}"));
        println!("\nWhat Bob ({}) saw in his LM room {}:", self.bob, self.lm_room);
        self.seen_by_bob.iter().for_each(|(name, text)| println!("  <{name}> {text}"));
    }

    /// Whether each saw everything once, and what each of the two said in the order in which it was said.
    fn judge(&self) -> Result<()> {
        for (who, seen) in [("Alice", &self.seen_by_alice), ("Bob", &self.seen_by_bob)] {
            for (is_alice, speaker) in [(true, "Alice"), (false, "Bob")] {
                let said = self.said.iter().filter(|(alice, _)| *alice == is_alice).map(|(_, text)| text);
                let heard = seen.iter().filter(|(name, _)| name == speaker).map(|(_, text)| text);
                let (said, heard): (Vec<_>, Vec<_>) = (said.collect(), heard.collect());
                ensure!(said == heard, "{who} heard {speaker} say {heard:#?}, and it was {said:#?}");
            }
            ensure!(seen.len() == self.said.len(), "{who} saw {} messages, not {}", seen.len(), self.said.len());
        }
        Ok(())
    }

    /// Lets people go on.
    async fn stay(&mut self) -> Result<()> {
        println!("\nNow it is your turn.");
        println!("  In Element: homeserver {}, user alice, password {PASSWORD}.", self.synapse.client_url);
        println!("  Any other user may register there and /join #lm_cafe_{HUB}:{}", self.synapse.server_name);
        println!("  Here you are Bob: type a line and press Enter. Ctrl-C ends everything.\n");
        let mut news = self.provider.news();
        let mut lines = lines();
        let mut typing = true;
        let stop = told_to_stop();
        tokio::pin!(stop);
        loop {
            tokio::select! {
                // First, so that Ctrl-C is the regular end here.
                biased;
                stopped = &mut stop => {
                    println!("\nStopped.");
                    return stopped;
                }
                line = lines.recv(), if typing => match line {
                    Some(line) if line.trim().is_empty() => {}
                    Some(line) => drop(self.provider.send_text(&self.bob, &self.lm_room, line.trim())?),
                    // Without a terminal it stays up all the same.
                    None => typing = false,
                },
                happened = news.recv() => {
                    if let Ok(News::Event(room, event)) = happened
                        && let Some(Value::String(body)) = event.content().get("body")
                    {
                        println!("  <{}> {body}", self.provider.display_name(&room, event.sender.as_str()));
                    }
                }
            }
        }
    }
}

/// What is typed, line by line. It is read by a thread of its own, which nobody waits for at the end.
fn lines() -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

/// A port that people remember, when it is free.
fn port(wanted: u16) -> Result<u16> {
    match std::net::TcpListener::bind(("127.0.0.1", wanted)) {
        Ok(_) => Ok(wanted),
        Err(_) => free_port().context("looking for a free port"),
    }
}

/// What is being done: a line that moves on a terminal, else a line for each thing.
#[derive(Clone)]
struct Show {
    bar: Option<ProgressBar>,
}

impl Show {
    fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(ProgressBar::new_spinner);
        Self { bar }
    }

    fn step(&self, what: &str) {
        match &self.bar {
            Some(bar) => {
                bar.println(format!("- {what}"));
                bar.set_message(what.to_owned());
                bar.enable_steady_tick(Duration::from_millis(100));
            }
            None => eprintln!("- {what}"),
        }
    }

    fn detail(&self, what: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(what.chars().take(100).collect::<String>()),
            None => eprintln!("  {what}"),
        }
    }

    /// Leaves the terminal to others.
    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.disable_steady_tick();
            bar.finish_and_clear();
        }
    }
}
