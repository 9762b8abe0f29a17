//! The command line of isthmus.

mod cli;

use std::io::{ErrorKind, IsTerminal as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use isthmus::clock::SystemClock;
use isthmus::config::{Config, Example, example};
use isthmus::doctor::{self, Outcome};
use isthmus::{appservice, gateway};
use ruma::OwnedServerName;
use tracing_subscriber::EnvFilter;
use url::Url;

/// Events are trees of many small pieces, made by one thread and often dropped by another.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A bridging gateway between full Matrix and Linearized Matrix.
#[derive(Parser)]
#[command(name = "isthmus", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write a commented configuration.
    GenerateConfig(GenerateConfig),
    /// Write the registration that makes a Synapse take this gateway for its appservice.
    Register {
        #[command(flatten)]
        config: ConfigFile,
        /// Where the Synapse reaches this gateway; by default its own listener.
        #[arg(long)]
        url: Option<Url>,
    },
    /// Run the gateway.
    Serve {
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Check the deployment: what is wrong, and what to do about it.
    Doctor {
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Make portals and look at them; the gateway must be running.
    Portal {
        #[command(flatten)]
        config: ConfigFile,
        #[command(subcommand)]
        command: cli::Portal,
    },
    /// Say where an event is on both sides, or why it is not; the gateway must be running.
    Explain {
        #[command(flatten)]
        config: ConfigFile,
        /// The event's ID, of either side.
        event_id: String,
    },
    /// Examine an LM server: numbered checks, as a participant of one of its rooms or as the hub of a room.
    Conformance(Box<cli::Conformance>),
}

#[derive(Args)]
struct ConfigFile {
    /// The configuration file.
    #[arg(long = "config", value_name = "FILE", env = "ISTHMUS_CONFIG", default_value = "isthmus.toml", global = true)]
    path: PathBuf,
}

#[derive(Args)]
struct GenerateConfig {
    /// The gateway's own server name.
    #[arg(long, value_name = "NAME")]
    server_name: OwnedServerName,
    /// Where the Synapse's client API is.
    #[arg(long, value_name = "URL", requires = "homeserver_name")]
    homeserver_url: Option<Url>,
    /// The Synapse's server name.
    #[arg(long, value_name = "NAME", requires = "homeserver_url")]
    homeserver_name: Option<OwnedServerName>,
    /// The file to write, which must not be there yet; by default it is printed.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

impl ConfigFile {
    fn load(&self) -> anyhow::Result<Config> {
        Ok(Config::load(&self.path)?)
    }
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("isthmus: {}", told(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error with its causes, each said once, and with what to do about it.
fn told(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    match error.downcast_ref::<gateway::GatewayError>().and_then(|error| error.advice()) {
        Some(advice) => format!("{text}: {advice}"),
        None => text,
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::GenerateConfig(arguments) => generate_config(arguments)?,
        Command::Register { config, url } => register(&config.load()?, url.as_ref())?,
        Command::Serve { config } => {
            let config = config.load()?;
            log()?;
            runtime()?.block_on(gateway::serve(config))?;
        }
        Command::Doctor { config } => return doctor(&config.load()?),
        Command::Portal { config, command } => runtime()?.block_on(command.run(&config.load()?))?,
        Command::Conformance(conformance) => return runtime()?.block_on(conformance.run()),
        Command::Explain { config, event_id } => runtime()?.block_on(cli::explain(&config.load()?, &event_id))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn generate_config(arguments: GenerateConfig) -> anyhow::Result<()> {
    let text = example(&Example {
        server_name: arguments.server_name,
        homeserver: arguments.homeserver_url.zip(arguments.homeserver_name),
        token: appservice::Token::generate().expose().to_owned(),
    });
    // What `serve` would refuse is not written.
    Config::from_text(Path::new("isthmus.toml"), &text, std::iter::empty())?;
    match &arguments.output {
        None => cli::say(text.trim_end()),
        Some(path) => {
            write_new(path, &text).map_err(|error| {
                let advice = match error.kind() {
                    ErrorKind::AlreadyExists => "delete it, or name another file with --output",
                    ErrorKind::NotFound => "make its folder first",
                    _ => "correct the path or its permissions",
                };
                anyhow::anyhow!("{} cannot be written ({error}): {advice}", path.display())
            })?;
            eprintln!("wrote {}", path.display());
        }
    }
    Ok(())
}

/// Writes a file that only its owner can read, and none that is there.
fn write_new(path: &Path, text: &str) -> std::io::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())
}

fn register(config: &Config, url: Option<&Url>) -> anyhow::Result<()> {
    let registered = appservice::register(config, url)?;
    let kept = if registered.kept { ", with the tokens that it had" } else { "" };
    eprintln!(
        "Wrote {}{kept}. The homeserver will call {}; --url changes that.",
        registered.path.display(),
        registered.url
    );
    eprintln!("Add these lines to homeserver.yaml and restart Synapse:\n");
    cli::say(format_args!("app_service_config_files:\n  - {}", registered.path.display()));
    Ok(())
}

fn doctor(config: &Config) -> anyhow::Result<ExitCode> {
    let findings = runtime()?.block_on(doctor::examine(config, Arc::new(SystemClock), |finding| cli::say(finding)));
    let failed = findings.iter().filter(|finding| finding.outcome == Outcome::Fail).count();
    cli::say(if failed == 0 {
        "\nNothing is wrong.".to_owned()
    } else {
        format!("\n{failed} of {} checks failed.", findings.len())
    });
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What is logged where RUST_LOG does not say otherwise. ruma tells of each check that an event passes, at INFO, and of each event
/// that loses a resolution, at WARN: lines for every event, which isthmus writes itself where they matter.
const LOGGED: &str = "info,ruma_state_res=error";

/// Logs go to standard error: for people on a terminal, as JSON elsewhere. RUST_LOG adds to [`LOGGED`].
fn log() -> anyhow::Result<()> {
    let asked = std::env::var(EnvFilter::DEFAULT_ENV).unwrap_or_default();
    let filter = EnvFilter::builder().parse(format!("{LOGGED},{asked}")).context("RUST_LOG is not valid")?;
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let started = if std::io::stderr().is_terminal() { logs.try_init() } else { logs.json().try_init() };
    started.map_err(|error| anyhow::anyhow!("the log cannot be started: {error}"))
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)
}
