//! The configuration: what an admin can set, how it is read, and its generated example.

mod check;
mod environment;
mod error;
mod example;
mod load;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::PathBuf;

use ruma::{OwnedServerName, OwnedUserId};
use serde::Deserialize;
use url::Url;

pub use self::error::ConfigError;
pub use self::example::{Example, example};

/// Everything that an admin can set. Unknown keys are errors.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// G: the gateway's server name on both sides.
    pub server_name: OwnedServerName,
    /// The signing key file, made when absent.
    #[serde(default = "default_signing_key")]
    pub signing_key: PathBuf,
    /// The listener for other servers.
    #[serde(default)]
    pub listen: Listen,
    /// The store.
    #[serde(default)]
    pub database: Database,
    /// The Synapse that the gateway is an appservice of.
    pub appservice: Option<Appservice>,
    /// How other servers are reached.
    #[serde(default)]
    pub federation: Federation,
    /// Who may do what.
    #[serde(default)]
    pub access: Access,
    /// Whether the logs of LM rooms change hands.
    #[serde(default)]
    pub hub_transfer: HubTransfer,
    /// How portals are made.
    #[serde(default)]
    pub portals: Portals,
    /// What crosses besides events.
    #[serde(default)]
    pub bridge: Bridge,
    /// How much may cross.
    #[serde(default)]
    pub budgets: Budgets,
    /// What is done with media.
    #[serde(default)]
    pub media: Media,
    /// The admin listener.
    #[serde(default)]
    pub admin: Admin,
    /// Sizes of caches.
    #[serde(default)]
    pub caches: Caches,
}

/// `[listen]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Listen {
    /// Address and port.
    pub address: std::net::SocketAddr,
    /// PEM file with the certificate chain; goes with `tls_private_key`.
    pub tls_certificate: Option<PathBuf>,
    /// PEM file with the private key.
    pub tls_private_key: Option<PathBuf>,
    /// What `/.well-known/matrix/server` says: the name and port at which other servers reach the gateway.
    pub well_known: Option<OwnedServerName>,
    /// How many connections one public address may have; with 0 what comes is not told apart by addresses.
    pub connections_per_address: usize,
}

/// `[database]`. Debug shows no password.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Database {
    /// `sqlite://PATH` or `postgres://…`
    pub url: String,
    /// How many days records of what went wrong, and of portals that have ended, are kept; 0 is for ever.
    pub keep_days: u32,
}

/// `[appservice]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Appservice {
    /// Where the Synapse's client API is.
    pub homeserver_url: Url,
    /// The Synapse's server name.
    pub homeserver_name: OwnedServerName,
    /// The registration file, shared with the Synapse.
    pub registration: PathBuf,
}

/// `[federation]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Federation {
    /// PEM files of certificate authorities trusted besides the system's.
    pub custom_ca: Vec<PathBuf>,
    /// Whether private and loopback addresses may be dialled.
    pub allow_private_networks: bool,
    /// Public keys (ed25519, unpadded base64) that are known to have leaked: nothing signed with them is believed.
    pub leaked_keys: Vec<String>,
    /// Servers that are believed about the keys of others that cannot be asked themselves, in the order in which they are asked.
    pub notaries: Vec<OwnedServerName>,
    /// Servers whose base URL is given, without discovery.
    pub resolve: BTreeMap<OwnedServerName, Url>,
}

/// Who can cause a portal by naming an alias.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CreateByAlias {
    /// Users of the Synapse, through the appservice.
    Appservice,
    /// Any server that asks for the alias.
    Anyone,
    /// Nobody.
    Off,
}

/// `[access]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Access {
    /// LM servers with which portals may be made; `*` and `?` are wildcards.
    pub hubs: Vec<String>,
    /// Matrix servers whose users may take part; `*` and `?` are wildcards.
    pub matrix_servers: Vec<String>,
    /// Who can cause a portal by naming an alias. The Synapse asks for whoever asks it, also without an account.
    pub create_by_alias: CreateByAlias,
    /// LM servers whose users, and LM users (`@user:server`) who, make a portal of a room by inviting the gateway's bot to
    /// it; `*` and `?` are wildcards.
    pub create_by_invite: Vec<String>,
    /// The same for Matrix servers and users, who make a portal of a Matrix room.
    pub create_by_matrix_invite: Vec<String>,
    /// Servers whose users, and users who, of either side, make a portal of their room by inviting users of the other side into it.
    pub create_by_ghost_invite: Vec<String>,
    /// Who may ask the Synapse's bot for the portals and have it invite into them, and whose portals stay.
    pub admins: Vec<OwnedUserId>,
    /// How many portals there may be; where there are as many, the oldest that nobody uses gives way, but no admin's.
    pub max_portals: u32,
}

/// `[hub_transfer]`: whether the logs of LM rooms change hands. Both are off.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HubTransfer {
    /// Whether an admin may hand the logs that the gateway keeps over to other servers.
    pub give: bool,
    /// From which servers the gateway takes over logs, or which rooms' (`!room:server`); `*` is any.
    pub accept: Vec<String>,
}

impl HubTransfer {
    /// Whether the log of a room is taken over from a server.
    pub fn accepts(&self, server: &ruma::ServerName, room_id: &ruma::RoomId) -> bool {
        let is_named = |name: &String| name == "*" || name.eq_ignore_ascii_case(server.as_str()) || name == room_id;
        self.accept.iter().any(is_named)
    }
}

/// What is done with encrypted rooms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EncryptionPolicy {
    /// They get no portal.
    Refuse,
}

/// `[portals]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Portals {
    /// The version of Matrix rooms that the gateway makes.
    pub matrix_room_version: String,
    /// What is done with encrypted rooms.
    pub encryption: EncryptionPolicy,
    /// Whether the bot tells senders in the room why something of theirs did not cross.
    pub notices: bool,
    /// How many of the last events of a room that lives elsewhere are said again in the room that is made of it.
    pub import_history: u32,
    /// Whether each LM hub has a space that holds its public rooms.
    pub hub_spaces: bool,
}

/// `[bridge]`: what crosses besides events.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Bridge {
    /// Whether it is seen who is typing.
    pub typing: bool,
    /// Whether it is seen up to where somebody has read, as far as the user's own client says it publicly.
    pub receipts: bool,
    /// Whether it is seen who is online.
    pub presence: bool,
}

/// `[budgets]`: how much of one server's users may cross in one portal, and how many portals they may make; 0 is no limit.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Budgets {
    /// Events a second; a server that was quiet may send those of a minute at once.
    pub events_per_second: u32,
    /// Bytes of content a day.
    pub bytes_per_day: u64,
    /// Users who come in an hour.
    pub ghosts_per_hour: u32,
    /// Events of a foreign hub that may wait in a portal; with more, the hub is told to wait.
    pub backlog: u32,
    /// Portals that are made in an hour of one LM server's rooms by naming aliases, or because one server's users invite the gateway's bot or
    /// a user of the other side.
    pub portals_per_hour: u32,
    /// Invites of one user into rooms without a portal that nobody has answered yet.
    pub open_invites_per_user: u32,
    /// The same of all users of one server.
    pub open_invites_per_server: u32,
    /// EDUs of one server a second, in all rooms together; what is over is dropped.
    pub edus_per_second: u32,
}

/// `[media]`: files that users of one side send, and that the other side reads through the gateway.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Media {
    /// How large a file may be, in bytes.
    pub max_bytes: u64,
    /// How much of them is kept on disk, in bytes.
    pub cache_bytes: u64,
    /// The folder where they are kept; made when absent.
    pub cache_dir: PathBuf,
}

/// `[admin]`. Debug does not show the token.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Admin {
    /// Address and port of the admin API, metrics and health.
    pub address: std::net::SocketAddr,
    /// The bearer token of the admin API; without one the API is off.
    pub token: Option<String>,
}

/// `[caches]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Caches {
    /// Events kept in memory, on each side; a large event of a graph counts as several.
    pub events: u64,
    /// Rooms whose state is kept in memory, on each side.
    pub rooms: u64,
}

fn default_signing_key() -> PathBuf {
    "isthmus.signing.key".into()
}

impl Default for Listen {
    fn default() -> Self {
        Self {
            address: ([127, 0, 0, 1], 8448).into(),
            tls_certificate: None,
            tls_private_key: None,
            well_known: None,
            connections_per_address: 256,
        }
    }
}

impl Config {
    /// What `/.well-known/matrix/server` says. Without a setting: the listener's own port where the listener does TLS for
    /// the name itself; behind a proxy nothing, since nobody here knows the proxy's port, and servers then try 8448.
    pub fn delegated(&self) -> Option<String> {
        if let Some(name) = &self.listen.well_known {
            return Some(name.to_string());
        }
        if self.server_name.port().is_some() {
            // Where a name has a port nobody asks; it is true all the same.
            return Some(self.server_name.to_string());
        }
        let port = self.listen.address.port();
        let own = self.listen.tls_certificate.is_some() && port != 0;
        own.then(|| format!("{}:{port}", self.server_name))
    }
}

impl Default for Database {
    fn default() -> Self {
        Self { url: "sqlite://isthmus.db".to_owned(), keep_days: 30 }
    }
}

impl std::fmt::Debug for Database {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Only what stands before a user name can be shown without parsing.
        let shown = if self.url.starts_with("sqlite:") { self.url.as_str() } else { "postgres://…" };
        formatter.debug_struct("Database").field("url", &shown).field("keep_days", &self.keep_days).finish()
    }
}

impl std::fmt::Debug for Admin {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let token = self.token.as_ref().map(|_| "…");
        formatter.debug_struct("Admin").field("address", &self.address).field("token", &token).finish()
    }
}

impl Default for Access {
    fn default() -> Self {
        Self {
            hubs: vec!["*".to_owned()],
            matrix_servers: vec!["*".to_owned()],
            create_by_alias: CreateByAlias::Appservice,
            create_by_invite: Vec::new(),
            create_by_matrix_invite: Vec::new(),
            create_by_ghost_invite: vec!["*".to_owned()],
            admins: Vec::new(),
            max_portals: 10_000,
        }
    }
}

impl Default for Portals {
    fn default() -> Self {
        Self {
            matrix_room_version: "12".to_owned(),
            encryption: EncryptionPolicy::Refuse,
            notices: true,
            import_history: 100,
            hub_spaces: false,
        }
    }
}

impl Default for Bridge {
    fn default() -> Self {
        Self { typing: true, receipts: true, presence: false }
    }
}

impl Default for Budgets {
    fn default() -> Self {
        Self {
            events_per_second: 1_000,
            bytes_per_day: 4_294_967_296,
            ghosts_per_hour: 5_000,
            backlog: 20_000,
            portals_per_hour: 60,
            open_invites_per_user: 50,
            open_invites_per_server: 1_000,
            edus_per_second: 100,
        }
    }
}

impl Default for Media {
    fn default() -> Self {
        Self { max_bytes: 104_857_600, cache_bytes: 2_147_483_648, cache_dir: "isthmus.media".into() }
    }
}

impl Default for Admin {
    fn default() -> Self {
        Self { address: ([127, 0, 0, 1], 9090).into(), token: None }
    }
}

impl Default for Caches {
    fn default() -> Self {
        Self { events: 50_000, rooms: 2_000 }
    }
}
