//! Two worlds for all scenarios, of the same two stock Synapses and two LM providers: in each another Synapse has the gateway
//! of that world as its appservice. One gateway lives on SQLite, the other on PostgreSQL. Started when a scenario first needs
//! them; each scenario has its own users and rooms.

use std::collections::BTreeMap;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use futures::FutureExt as _;
use isthmus::identity::{GhostNames, Side};
use ruma::{OwnedRoomId, OwnedServerName, OwnedUserId, UserId};
use tokio::runtime::Runtime;
use tokio::sync::OnceCell;
use url::Url;

use super::provider::{NewRoom, Options, Provider};
use super::testbed::certificates::Authority;
use super::testbed::client::Client;
use super::testbed::gateway::{self, Gateway};
use super::testbed::postgres;
use super::testbed::process::{free_port, target_dir};
use super::testbed::synapse::{self, Synapse};

/// What makes names of each world its own.
const SUFFIXES: [&str; 2] = ["", "-pg"];
/// The binary under test.
pub const BINARY: &str = env!("CARGO_BIN_EXE_isthmus");

/// What the scenarios share.
pub struct World {
    pub directory: PathBuf,
    pub authority: &'static Authority,
    /// The Synapse that has the gateway as its appservice.
    pub a: &'static Synapse,
    /// A Synapse that knows nothing of the gateway.
    pub b: &'static Synapse,
    /// The database of that one.
    pub database_of_b: PathBuf,
    pub gateway: Gateway,
    /// The LM provider `hub.example`.
    pub hub: &'static Provider,
    /// The LM provider `spoke.example`.
    pub spoke: &'static Provider,
    /// The port of `phoenix.example`, which the gateway knows, and which a scenario may start and stop.
    pub phoenix: u16,
    /// Where servers are that cannot be found by their names.
    resolve: BTreeMap<OwnedServerName, Url>,
    /// What tells names at the providers from those in the other world.
    suffix: &'static str,
}

/// The world whose gateway lives on SQLite, and, unless the tests leave it out, the one whose gateway lives on PostgreSQL.
struct Worlds {
    sqlite: World,
    postgres: Option<World>,
}

/// Runs a scenario. All of them share one runtime, because what is in the world outlives each of them.
pub fn run<F: Future>(scenario: F) -> F::Output {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| Runtime::new().unwrap()).block_on(scenario)
}

/// The world whose gateway lives on SQLite.
pub async fn world() -> &'static World {
    &worlds().await.sqlite
}

async fn worlds() -> &'static Worlds {
    static WORLDS: OnceCell<Worlds> = OnceCell::const_new();
    WORLDS.get_or_init(Worlds::begin).await
}

/// Runs a scenario in both worlds at once. Without PostgreSQL on the machine, which CI does not allow, in one.
pub fn on_both(scenario: impl AsyncFn(&'static World)) {
    run(async {
        let worlds = worlds().await;
        let on_sqlite = told("SQLite", scenario(&worlds.sqlite));
        match &worlds.postgres {
            Some(world) => drop(tokio::join!(on_sqlite, told("PostgreSQL", scenario(world)))),
            None => on_sqlite.await,
        }
    });
}

/// Runs a scenario with both gateways, the one on SQLite first. Without PostgreSQL on the machine, which CI does not allow, not at all.
pub fn with_two(scenario: impl AsyncFn(&'static World, &'static World)) {
    run(async {
        let worlds = worlds().await;
        if let Some(second) = &worlds.postgres {
            scenario(&worlds.sqlite, second).await;
        }
    });
}

/// Says on which database a scenario failed.
async fn told(database: &str, scenario: impl Future<Output = ()>) {
    if let Err(panic) = AssertUnwindSafe(scenario).catch_unwind().await {
        eprintln!("the gateway's database is {database}");
        std::panic::resume_unwind(panic);
    }
}

impl Worlds {
    async fn begin() -> Self {
        let directory = scratch("world");
        let authority: &'static Authority = Box::leak(Box::new(Authority::new(&directory).unwrap()));
        let synapses = ["a", "b"].map(|name| synapse::Plan::new(&directory.join(name)).unwrap());
        let database = match postgres::shared().unwrap() {
            Some(postgres) => Some(postgres.create_database().await.unwrap()),
            None => None,
        };
        let mut gateways = vec![gateway::Plan::new(&directory.join("g"), Path::new(BINARY), authority).unwrap()];
        if let Some(url) = &database {
            let mut plan = gateway::Plan::new(&directory.join("p"), Path::new(BINARY), authority).unwrap();
            plan.set("database", "url", url);
            gateways.push(plan);
        }
        let names = ["hub.example", "spoke.example", "phoenix.example"];
        let ports = names.map(|_| free_port().unwrap());
        let mut resolve = BTreeMap::new();
        for gateway in &mut gateways {
            gateway.set_raw("access", "create_by_invite", "[\"hub.example\"]");
            gateway.set_raw("access", "create_by_matrix_invite", "[\"@bridger*:*\"]");
            gateway.set_raw("portals", "hub_spaces", "true");
            resolve.insert(server(&gateway.server_name), gateway.url.parse().unwrap());
        }
        for (name, port) in names.into_iter().zip(ports) {
            let url = format!("http://127.0.0.1:{port}");
            gateways.iter_mut().for_each(|gateway| gateway.resolve(name, &url));
            resolve.insert(server(name), url.parse().unwrap());
        }
        let start = |index: usize| provider(names[index], ports[index], &authority.file, &resolve, None);
        let (hub, spoke) = tokio::join!(start(0), start(1));
        let (hub, spoke): (&'static Provider, &'static Provider) =
            (Box::leak(Box::new(hub)), Box::leak(Box::new(spoke)));
        for ((gateway, synapse), suffix) in gateways.iter_mut().zip(&synapses).zip(SUFFIXES) {
            gateway.set_raw("access", "admins", &format!("[\"@boss{suffix}:{}\"]", synapse.server_name));
        }
        let mut registrations =
            gateways.iter_mut().zip(&synapses).map(|(g, synapse)| g.register_with(synapse).unwrap());
        let registrations = [registrations.next(), registrations.next()];
        let [a, b] = synapses;
        let (a, b) = tokio::try_join!(
            a.start(authority, registrations[0].as_deref()),
            b.start(authority, registrations[1].as_deref())
        )
        .unwrap();
        let (a, b): (&'static Synapse, &'static Synapse) = (Box::leak(Box::new(a)), Box::leak(Box::new(b)));
        let mut worlds = Vec::new();
        for (gateway, (a, b, name_of_b, suffix)) in
            gateways.into_iter().zip([(a, b, "b", SUFFIXES[0]), (b, a, "a", SUFFIXES[1])])
        {
            worlds.push(World {
                directory: directory.clone(),
                authority,
                a,
                b,
                database_of_b: directory.join(name_of_b).join("homeserver.db"),
                gateway: gateway.start().await.unwrap(),
                hub,
                spoke,
                phoenix: ports[2],
                resolve: resolve.clone(),
                suffix,
            });
        }
        let mut worlds = worlds.into_iter();
        Self { sqlite: worlds.next().unwrap(), postgres: worlds.next() }
    }
}

impl World {
    /// A name for a user or a room at a provider, which the other world does not use.
    pub fn name(&self, name: &str) -> String {
        format!("{name}{}", self.suffix)
    }

    /// Starts `phoenix.example`, with everything that it had when it was stopped.
    pub async fn start_phoenix(&self) -> Provider {
        let journal = self.directory.join("phoenix.jsonl");
        provider("phoenix.example", self.phoenix, &self.authority.file, &self.resolve, Some(journal)).await
    }

    /// A room of `bob` at `hub.example`, with the alias `#NAME:hub.example`.
    pub fn lm_room(&self, name: &str) -> (OwnedUserId, OwnedRoomId) {
        let bob = self.hub.user(&self.name(&format!("bob-{name}"))).unwrap();
        self.hub.set_display_name(&bob, "Bob");
        let new = NewRoom { alias: Some(self.name(name)), name: Some(format!("The {name}")), ..NewRoom::default() };
        let room = self.hub.create_room(&bob, new).unwrap();
        (bob, room)
    }

    /// The alias of such a room at `at`.
    pub fn alias(&self, name: &str, at: &str) -> String {
        format!("#lm_{}_hub.example:{at}", self.name(name))
    }

    /// A new user of a Synapse, with a display name.
    pub async fn user(&self, synapse: &Synapse, localpart: &str, name: &str) -> Client {
        let client = synapse.register(localpart, "secret").await.unwrap();
        client.set_display_name(name).await.unwrap();
        client
    }

    /// The ghost on LM of a Matrix user.
    pub fn ghost_of(&self, user: &str) -> String {
        ghost(&self.gateway.server_name, Side::Matrix, user)
    }

    /// The ghost on Matrix of an LM user.
    pub fn image_of(&self, user: &UserId) -> String {
        ghost(&self.gateway.server_name, Side::Lm, user.as_str())
    }
}

/// Starts an LM provider on a port of its own.
pub async fn provider(
    name: &str,
    port: u16,
    ca: &Path,
    resolve: &BTreeMap<OwnedServerName, Url>,
    journal: Option<PathBuf>,
) -> Provider {
    let options = Options {
        server_name: server(name),
        listen: ([127, 0, 0, 1], port).into(),
        ca: Some(ca.to_owned()),
        resolve: resolve.clone(),
        journal,
        eigen: false,
    };
    Provider::start(options).await.unwrap()
}

/// The ghost of `user`, who is at home on `home`.
pub fn ghost(gateway: &str, home: Side, user: &str) -> String {
    let user = <&UserId>::try_from(user).unwrap();
    GhostNames::new(server(gateway)).of_user(home, user).unwrap().0.to_string()
}

/// A server name.
pub fn server(name: &str) -> OwnedServerName {
    name.try_into().unwrap()
}

/// A fresh directory that stays after the run, for its logs, until another run finds that its process is gone.
pub fn scratch(name: &str) -> PathBuf {
    let parent = target_dir().unwrap().join("tmp/scenarios");
    std::fs::create_dir_all(&parent).unwrap();
    for entry in std::fs::read_dir(&parent).unwrap().flatten() {
        let pid = entry.file_name().to_string_lossy().rsplit('-').next().map(str::to_owned).unwrap_or_default();
        if !Path::new("/proc").join(pid).exists() {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
    let directory = parent.join(format!("{name}-{}", std::process::id()));
    std::fs::create_dir(&directory).unwrap();
    directory
}
