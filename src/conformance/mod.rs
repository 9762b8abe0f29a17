//! A conformance suite for LM servers: numbered checks that are run against any server, as a participant of one of its rooms or as the hub
//! of a room into which one of its users is invited. It shares with the gateway how events are hashed, signed and redacted, and how servers
//! are found; everything else is its own, so that it sees the gateway as a stranger does. `docs/conformance.md` says what is checked.

mod checks;
mod ear;
mod hub;
mod judge;
mod report;
mod session;
mod wire;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures::future::BoxFuture;
use rand::Rng as _;
use ruma::{OwnedRoomId, OwnedServerName, OwnedUserId, RoomId, UserId};
use url::Url;

use self::ear::{Ear, Listening};
use self::session::Session;
use self::wire::Identity;
use crate::clock::SharedClock;
use crate::federation::{Client, ClientOptions};
use crate::identity::SigningKey;

pub use self::report::{Outcome, Report, Row, Unmet};

/// How long one check may take beside what it waits for people.
const CHECK: Duration = Duration::from_secs(90);
/// How long everything may take beside that.
const ALL: Duration = Duration::from_secs(30 * 60);

/// What is examined, and as whom.
#[derive(Debug, Clone)]
pub struct Options {
    /// The server that is examined.
    pub target: OwnedServerName,
    /// Where it is, when it is not to be looked up.
    pub url: Option<Url>,
    /// In which role.
    pub role: Role,
    /// The suite's own server name.
    pub name: OwnedServerName,
    /// A second one, at the same listener.
    pub second: Option<OwnedServerName>,
    /// The localpart of the suite's users.
    pub user: String,
    /// Where the suite listens.
    pub listen: SocketAddr,
    /// Its certificate and key, PEM; without them it speaks plain HTTP, as behind a proxy.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// Its signing key, beside which `.second` has that of the second server; without it keys are made for the run.
    pub signing_key: Option<PathBuf>,
    /// Certificate authorities to trust besides the system's.
    pub custom_ca: Vec<PathBuf>,
    /// Whether addresses of private networks may be dialled.
    pub allow_private_networks: bool,
    /// How long people at the target are waited for.
    pub patience: Duration,
    /// How long the target may take for an answer, and for sending an event on.
    pub limit: Duration,
    /// The beginnings of the numbers of the checks that are wanted; all when empty. What they stand on is run too.
    pub only: Vec<String>,
}

impl Options {
    fn wants(&self, id: &str) -> bool {
        self.only.is_empty() || STOOD_ON.contains(&id) || self.only.iter().any(|beginning| id.starts_with(beginning))
    }
}

/// What nearly everything else stands on: the join, the invite.
const STOOD_ON: [&str; 3] = ["LM-M-010", "LM-M-020", "LM-H-010"];

/// What the suite plays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// A participant of a room of which the target is the hub.
    Participant {
        /// The room.
        room: OwnedRoomId,
    },
    /// The hub of a room into which a user of the target is invited.
    Hub {
        /// Whom to invite.
        invite: OwnedUserId,
    },
}

/// One check.
pub struct Check {
    /// Its number, which never changes.
    pub id: &'static str,
    /// The draft's section.
    pub section: &'static str,
    /// What must hold.
    pub title: &'static str,
    run: Run,
}

type Run = for<'a> fn(&'a Session, &'static str) -> BoxFuture<'a, Outcome>;

/// Every check, those of the participant first, in the order in which they are run.
pub fn catalogue() -> Vec<Check> {
    checks::as_participant().into_iter().chain(checks::as_hub()).collect()
}

/// What a run is going to do to the room and to the server, for whoever starts it.
pub fn warning(options: &Options) -> String {
    let Options { target, name, user, .. } = options;
    match &options.role {
        Role::Participant { room } => format!(
            "This joins {room} at {target} as @{user}:{name} and others of that server, sends some hundred messages into it, good and bad, \
             and where @{user}:{name} has the power, changes the history visibility, the join rules, the power levels and who is banned for a moment. \
             It leaves the room at its end. Use a room in which nobody is disturbed."
        ),
        Role::Hub { invite } => format!(
            "This makes a room at {name} and invites {invite}, who is to accept (and to say something) within {:?}. \
             Good and bad events are sent to {target}; at its end {invite} is removed from the room.",
            options.patience
        ),
    }
}

/// Runs all checks of the role; `tell` hears of each when it has ended.
pub async fn run(options: Options, clock: SharedClock, tell: impl FnMut(&Row)) -> anyhow::Result<Report> {
    let socket = std::net::TcpListener::bind(options.listen)
        .with_context(|| format!("--listen {} cannot be used", options.listen))?;
    run_on(socket, options, clock, tell).await
}

/// The same over a socket that listens already.
pub async fn run_on(
    socket: std::net::TcpListener,
    options: Options,
    clock: SharedClock,
    mut tell: impl FnMut(&Row),
) -> anyhow::Result<Report> {
    let mut checks = match &options.role {
        Role::Participant { .. } => checks::as_participant(),
        Role::Hub { .. } => checks::as_hub(),
    };
    checks.retain(|check| options.wants(check.id));
    let (session, _listening) = begin(socket, options, clock).await?;
    session.learn_signing().await;
    session.learn_names().await;
    let deaf = session.is_not_found().await;
    let (begun, mut report) = (Instant::now(), Report::default());
    for Check { id, section, title, run } in checks {
        let since = Instant::now();
        let limit = CHECK.saturating_add(session.patience);
        let outcome = if let Some(why) = deaf.as_ref().filter(|_| !checks::stands_alone(id)) {
            Err(report::skip(why.clone()))
        } else if begun.elapsed() > ALL.saturating_add(session.patience) {
            Err(report::skip(format!("the whole run has taken {ALL:?} already")))
        } else {
            match tokio::time::timeout(limit, run(&session, id)).await {
                Ok(outcome) => outcome,
                Err(_) => Err(report::fail(format!("an end within {limit:?}"), "none")),
            }
        };
        let row = Row { id, section, title, outcome, took_ms: since.elapsed().as_millis() };
        tell(&row);
        report.rows.push(row);
    }
    let _ = tokio::time::timeout(CHECK, checks::leave(&session)).await;
    Ok(report)
}

async fn begin(
    socket: std::net::TcpListener,
    options: Options,
    clock: SharedClock,
) -> anyhow::Result<(Session, Listening)> {
    let Options { target, url, role, name, second, user, tls, signing_key, custom_ca, .. } = options;
    anyhow::ensure!(target != name && second.as_ref() != Some(&target), "the suite needs a name other than {target}");
    let resolve = url.map(|url| (target.clone(), url)).into_iter().collect::<BTreeMap<_, _>>();
    let client = ClientOptions { custom_ca, allow_private_networks: options.allow_private_networks, resolve };
    let key_in = |path: Option<PathBuf>| match path {
        Some(path) => SigningKey::load_or_generate(&path),
        None => Ok(SigningKey::generate()),
    };
    let of_second = signing_key.as_ref().map(|path| {
        let mut name = path.clone().into_os_string();
        name.push(".second");
        PathBuf::from(name)
    });
    let key = Arc::new(key_in(signing_key)?);
    let identity =
        |name: OwnedServerName, key: Arc<SigningKey>| Arc::new(Identity { name, key, old: SigningKey::generate() });
    let first = identity(name.clone(), key.clone());
    let second = match second {
        Some(name) => Some(identity(name, Arc::new(key_in(of_second)?))),
        None => None,
    };
    let run: String = (0..6).map(|_| char::from(rand::rngs::OsRng.gen_range(b'a'..=b'z'))).collect();
    let ear = Ear::new(std::iter::once(first.clone()).chain(second.clone()).collect(), target.clone(), clock.clone());
    let listening = Listening::open(ear.clone(), socket, tls).await.context("the suite cannot listen")?;
    let (room, invitee) = match role {
        Role::Participant { room } => (room, None),
        Role::Hub { invite } => (RoomId::parse(format!("!conformance-{run}:{name}"))?, Some(invite)),
    };
    let named = |localpart: String| UserId::parse(format!("@{localpart}:{name}"));
    let session = Session {
        client: Client::new(name.clone(), key, client)?,
        user: named(user.clone())?,
        low: named(format!("{user}_low"))?,
        target,
        room,
        first,
        second,
        patience: options.patience,
        limit: options.limit,
        ear,
        clock,
        invitee,
        run,
        counter: AtomicU64::new(1),
        notes: Mutex::default(),
    };
    Ok((session, listening))
}
