//! One world for all scenarios: two stock Synapses, of which one has the gateway as its appservice, the gateway, and two LM
//! providers. Started when a scenario first needs it; each scenario has its own users and rooms.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use isthmus::identity::{GhostNames, Side};
use ruma::{OwnedRoomId, OwnedServerName, OwnedUserId, UserId};
use tokio::runtime::Runtime;
use tokio::sync::OnceCell;
use url::Url;

use super::provider::{NewRoom, Options, Provider};
use super::testbed::certificates::Authority;
use super::testbed::client::Client;
use super::testbed::gateway::{self, Gateway};
use super::testbed::process::{free_port, target_dir};
use super::testbed::synapse::{self, Synapse};

/// The binary under test.
pub const BINARY: &str = env!("CARGO_BIN_EXE_isthmus");

/// What the scenarios share.
pub struct World {
    pub directory: PathBuf,
    pub authority: Authority,
    /// The Synapse that has the gateway as its appservice.
    pub a: Synapse,
    /// A Synapse that knows nothing of the gateway.
    pub b: Synapse,
    pub gateway: Gateway,
    /// The LM provider `hub.example`.
    pub hub: Provider,
    /// The LM provider `spoke.example`.
    pub spoke: Provider,
    /// The port of `phoenix.example`, which the gateway knows, and which a scenario may start and stop.
    pub phoenix: u16,
    /// Where servers are that cannot be found by their names.
    resolve: BTreeMap<OwnedServerName, Url>,
}

/// Runs a scenario. All of them share one runtime, because what is in the world outlives each of them.
pub fn run<F: Future>(scenario: F) -> F::Output {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| Runtime::new().unwrap()).block_on(scenario)
}

/// The world.
pub async fn world() -> &'static World {
    static WORLD: OnceCell<World> = OnceCell::const_new();
    WORLD.get_or_init(World::begin).await
}

impl World {
    async fn begin() -> Self {
        let directory = scratch("world");
        let authority = Authority::new(&directory).unwrap();
        let [a, b] = ["a", "b"].map(|name| synapse::Plan::new(&directory.join(name)).unwrap());
        let mut gateway = gateway::Plan::new(&directory.join("g"), Path::new(BINARY), &authority).unwrap();
        let names = ["hub.example", "spoke.example", "phoenix.example"];
        let ports = names.map(|_| free_port().unwrap());
        let mut resolve = BTreeMap::from([(server(&gateway.server_name), gateway.url.parse().unwrap())]);
        for (name, port) in names.into_iter().zip(ports) {
            let url = format!("http://127.0.0.1:{port}");
            gateway.resolve(name, &url);
            resolve.insert(server(name), url.parse().unwrap());
        }
        let start = |index: usize| provider(names[index], ports[index], &authority.file, &resolve, None);
        let (hub, spoke) = tokio::join!(start(0), start(1));
        let registration = gateway.register_with(&a).unwrap();
        let (a, b) = tokio::try_join!(a.start(&authority, Some(&registration)), b.start(&authority, None)).unwrap();
        let gateway = gateway.start().await.unwrap();
        Self { directory, authority, a, b, gateway, hub, spoke, phoenix: ports[2], resolve }
    }

    /// Starts `phoenix.example`, with everything that it had when it was stopped.
    pub async fn start_phoenix(&self) -> Provider {
        let journal = self.directory.join("phoenix.jsonl");
        provider("phoenix.example", self.phoenix, &self.authority.file, &self.resolve, Some(journal)).await
    }

    /// A room of `bob` at `hub.example`, with the alias `#NAME:hub.example`.
    pub fn lm_room(&self, name: &str) -> (OwnedUserId, OwnedRoomId) {
        let bob = self.hub.user(&format!("bob-{name}")).unwrap();
        self.hub.set_display_name(&bob, "Bob");
        let new = NewRoom { alias: Some(name.to_owned()), name: Some(format!("The {name}")), ..NewRoom::default() };
        let room = self.hub.create_room(&bob, new).unwrap();
        (bob, room)
    }

    /// The alias of such a room at `at`.
    pub fn alias(&self, name: &str, at: &str) -> String {
        format!("#lm_{name}_hub.example:{at}")
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
