//! `isthmus conformance`: runs the conformance suite against an LM server.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use clap::Args;
use isthmus::clock::SystemClock;
use isthmus::conformance::{self, Options, Role};
use ruma::{OwnedRoomId, OwnedServerName, OwnedUserId};
use url::Url;

use super::say;

/// What `isthmus conformance` takes.
#[derive(Args)]
pub struct Conformance {
    /// The server that is examined.
    #[arg(long, value_name = "NAME", required_unless_present = "list")]
    target: Option<OwnedServerName>,
    /// Where it is, when it is not to be looked up by its name.
    #[arg(long, value_name = "URL")]
    url: Option<Url>,
    /// A room that the server is the hub of, and that the suite may join.
    #[arg(long, value_name = "ROOM")]
    room: Option<OwnedRoomId>,
    /// Play the hub instead, and invite a user of the server.
    #[arg(long, requires = "invite", conflicts_with = "room")]
    as_hub: bool,
    /// Whom to invite.
    #[arg(long, value_name = "USER")]
    invite: Option<OwnedUserId>,
    /// The suite's own server name, under which the server must find `--listen`.
    #[arg(long = "as", value_name = "NAME", required_unless_present = "list")]
    name: Option<OwnedServerName>,
    /// A second name of the same listener, for what takes two participants.
    #[arg(long, value_name = "NAME")]
    second: Option<OwnedServerName>,
    /// The localpart of the suite's users; with power in the room more can be looked at.
    #[arg(long, default_value = "conformance")]
    user: String,
    /// Where the suite listens.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8449")]
    listen: SocketAddr,
    /// Its certificate (PEM), when no reverse proxy does TLS for it.
    #[arg(long, value_name = "FILE", requires = "tls_private_key")]
    tls_certificate: Option<PathBuf>,
    /// The key of its certificate.
    #[arg(long, value_name = "FILE", requires = "tls_certificate")]
    tls_private_key: Option<PathBuf>,
    /// Its signing key, made when the file is not there, and with `.second` at the end of its name that of the second server; by
    /// default keys are made for the run, which a server that has seen others of these names may not take.
    #[arg(long, value_name = "FILE")]
    signing_key: Option<PathBuf>,
    /// A certificate authority to trust, PEM; may be given more than once.
    #[arg(long, value_name = "FILE")]
    ca: Vec<PathBuf>,
    /// Dial addresses of private networks too.
    #[arg(long)]
    allow_private_networks: bool,
    /// For how many seconds people at the server are waited for.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    patience: u64,
    /// How many seconds the server may take for an answer, and for sending an event on.
    #[arg(long, value_name = "SECONDS", default_value_t = 20)]
    limit: u64,
    /// Run only the checks whose numbers begin so, and what they stand on; may be given more than once.
    #[arg(long, value_name = "NUMBER")]
    only: Vec<String>,
    /// Print one JSON object at the end instead of a line for each check.
    #[arg(long)]
    json: bool,
    /// Print the list of checks and do nothing.
    #[arg(long)]
    list: bool,
}

impl Conformance {
    /// Runs it; the exit code is 0 when something passed and nothing failed.
    pub async fn run(self) -> anyhow::Result<ExitCode> {
        if self.list {
            for check in conformance::catalogue() {
                say(format_args!("{}  {} ({})", check.id, check.title, check.section));
            }
            return Ok(ExitCode::SUCCESS);
        }
        let json = self.json;
        let options = self.options()?;
        eprintln!("{}\n", conformance::warning(&options));
        let target = options.target.clone();
        let report = conformance::run(options, Arc::new(SystemClock), |row| {
            if !json {
                say(row);
            }
        });
        let report = report.await?;
        if json {
            say(serde_json::to_string_pretty(&report.json(target.as_str()))?);
        } else {
            say(format_args!("\n{}", report.summary()));
        }
        Ok(if report.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    fn options(self) -> anyhow::Result<Options> {
        let (Some(target), Some(name)) = (self.target, self.name) else { bail!("--target and --as are needed") };
        let role = match (self.room, self.invite) {
            (Some(room), _) => Role::Participant { room },
            (None, Some(invite)) if self.as_hub => Role::Hub { invite },
            _ => bail!("--room ROOM is needed, or --as-hub --invite USER"),
        };
        Ok(Options {
            target,
            url: self.url,
            role,
            name,
            second: self.second,
            user: self.user,
            listen: self.listen,
            tls: self.tls_certificate.zip(self.tls_private_key),
            signing_key: self.signing_key,
            custom_ca: self.ca,
            allow_private_networks: self.allow_private_networks,
            patience: Duration::from_secs(self.patience),
            limit: Duration::from_secs(self.limit),
            only: self.only,
        })
    }
}
