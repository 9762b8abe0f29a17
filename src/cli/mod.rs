//! Commands that talk to the admin API of a running gateway.

mod conformance;

use std::io::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Subcommand;
use isthmus::config::Config;
use isthmus::federation::crypto_provider;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::Method;
use ruma::{OwnedRoomOrAliasId, OwnedServerName, OwnedUserId};
use serde_json::{Map, Value, json};

pub use self::conformance::Conformance;

/// How long the gateway may take: making a portal asks other servers.
const TIMEOUT: Duration = Duration::from_secs(120);

/// `isthmus portal …`
#[derive(Subcommand)]
pub enum Portal {
    /// Make a Matrix room and an LM room that are kept in step.
    Create {
        /// The name of both rooms.
        #[arg(long)]
        name: Option<String>,
        /// The localpart of their alias at this gateway.
        #[arg(long)]
        alias: Option<String>,
        /// Who can join; by default who is invited, for instance by `isthmus portal invite`.
        #[arg(long, value_parser = ["public", "invite", "knock"])]
        join_rule: Option<String>,
        /// The Matrix room's version.
        #[arg(long)]
        matrix_room_version: Option<String>,
        /// The LM room's version.
        #[arg(long)]
        lm_room_version: Option<String>,
    },
    /// Make one room that LM servers share with Matrix homeservers that speak its version (stock Synapse does not).
    Shared {
        /// Its name.
        #[arg(long)]
        name: Option<String>,
        /// The localpart of its alias at this gateway.
        #[arg(long)]
        alias: Option<String>,
        /// Who can join; by default who is invited, for instance by `isthmus portal invite`.
        #[arg(long, value_parser = ["public", "invite", "knock"])]
        join_rule: Option<String>,
        /// Its version.
        #[arg(long)]
        lm_room_version: Option<String>,
    },
    /// Join an LM room that lives elsewhere and make a Matrix room of it.
    FromLm {
        /// The LM room's ID, or its alias as its hub has it, `#NAME:HUB`.
        room: OwnedRoomOrAliasId,
        /// A server through which the room of an ID can be joined, by default the one in the ID; may be given more than once.
        #[arg(long, value_name = "SERVER")]
        via: Vec<OwnedServerName>,
        /// The localpart of an alias at this gateway.
        #[arg(long)]
        alias: Option<String>,
    },
    /// Join a Matrix room that lives elsewhere, and make the LM room for it.
    FromMatrix {
        /// The Matrix room's ID, or its alias, `#NAME:SERVER`.
        room: OwnedRoomOrAliasId,
        /// A server through which the room can be joined, by default the one in the ID, if it has one; may be given more than once.
        #[arg(long, value_name = "SERVER")]
        via: Vec<OwnedServerName>,
        /// The localpart of an alias at this gateway, by which LM users find the LM room.
        #[arg(long)]
        alias: Option<String>,
    },
    /// List all portals.
    List {
        /// As JSON, with all that is known of each.
        #[arg(long)]
        json: bool,
    },
    /// Show one portal with its health, members and refusals.
    Show {
        /// Its ID, as in the list.
        portal_id: String,
    },
    /// End a portal: a goodbye in both rooms, and the gateway's users leave them.
    Remove {
        /// Its ID, as in the list.
        portal_id: String,
    },
    /// Take a suspended portal up again: the gateway's bot must be in both rooms, or be let in.
    Resume {
        /// Its ID, as in the list.
        portal_id: String,
    },
    /// Hand the log of a portal's LM room over to another LM server in it, which agrees to that.
    TransferHub {
        /// The portal's ID.
        portal_id: String,
        /// The LM server that is to keep the log.
        server: OwnedServerName,
        /// Do it although servers in the room do not show that they know of changes of the hub: these are cut off.
        #[arg(long)]
        force: bool,
    },
    /// Invite a user by the gateway's bot.
    Invite {
        /// The portal's ID.
        portal_id: String,
        /// A Matrix or LM user.
        user_id: OwnedUserId,
        /// On which side the user is at home, when it is not clear.
        #[arg(long, value_parser = ["matrix", "lm"])]
        side: Option<String>,
    },
}

impl Portal {
    /// Does it and prints the answer.
    pub async fn run(self, config: &Config) -> anyhow::Result<()> {
        let api = Api::new(config)?;
        match self {
            Self::Create { name, alias, join_rule, matrix_room_version, lm_room_version } => {
                let fields = [
                    ("name", name),
                    ("alias", alias),
                    ("join_rule", join_rule),
                    ("matrix_room_version", matrix_room_version),
                    ("lm_room_version", lm_room_version),
                ];
                print(&api.call(Method::POST, "/portals", Some(made("create", fields))).await?)
            }
            Self::Shared { name, alias, join_rule, lm_room_version } => {
                let fields =
                    [("name", name), ("alias", alias), ("join_rule", join_rule), ("lm_room_version", lm_room_version)];
                print(&api.call(Method::POST, "/portals", Some(made("shared", fields))).await?)
            }
            Self::FromLm { room, mut via, alias } => {
                if via.is_empty() && room.is_room_id() {
                    via.extend(room.server_name().map(ToOwned::to_owned));
                }
                let named = if room.is_room_id() { "lm_room_id" } else { "lm_alias" };
                let body = json!({ "kind": "from_lm", named: room, "via": via, "alias": alias });
                print(&api.call(Method::POST, "/portals", Some(body)).await?)
            }
            Self::FromMatrix { room, via, alias } => {
                let named = if room.is_room_id() { "matrix_room_id" } else { "matrix_alias" };
                let body = json!({ "kind": "from_matrix", named: room, "via": via, "alias": alias });
                print(&api.call(Method::POST, "/portals", Some(body)).await?)
            }
            Self::List { json } => list(&api, json).await,
            Self::Show { portal_id } => {
                print(&api.call(Method::GET, &format!("/portals/{}", segment(&portal_id)), None).await?)
            }
            Self::Remove { portal_id } => {
                print(&api.call(Method::DELETE, &format!("/portals/{}", segment(&portal_id)), None).await?)
            }
            Self::Resume { portal_id } => {
                print(&api.call(Method::POST, &format!("/portals/{}/resume", segment(&portal_id)), None).await?)
            }
            Self::TransferHub { portal_id, server, force } => {
                let path = format!("/portals/{}/hub", segment(&portal_id));
                let done = api.call(Method::POST, &path, Some(json!({ "server": server, "force": force }))).await?;
                if done.get("taken") == Some(&Value::Bool(false)) {
                    eprintln!(
                        "{server} does not say yet that it keeps the log. Do not stop this gateway for good before it does \
                         (`isthmus portal show` at {server} says so under `lm_hub`)."
                    );
                }
                print(&done)
            }
            Self::Invite { portal_id, user_id, side } => {
                let path = format!("/portals/{}/invite", segment(&portal_id));
                print(&api.call(Method::POST, &path, Some(json!({ "user_id": user_id, "side": side }))).await?)
            }
        }
    }
}

/// What is asked for, with what was said of it.
fn made<const N: usize>(kind: &str, fields: [(&str, Option<String>); N]) -> Value {
    let said = fields.into_iter().filter_map(|(key, value)| Some((key.to_owned(), Value::String(value?))));
    Value::Object(Map::from_iter([("kind".to_owned(), json!(kind))].into_iter().chain(said)))
}

/// Writes a line to standard output. Who reads it may have seen enough, as `head` has; then nothing is left to do.
pub fn say(line: impl std::fmt::Display) {
    if writeln!(std::io::stdout(), "{line}").is_err() {
        std::process::exit(0);
    }
}

/// `isthmus explain EVENT_ID`
pub async fn explain(config: &Config, event_id: &str) -> anyhow::Result<()> {
    let api = Api::new(config)?;
    print(&api.call(Method::GET, &format!("/events/{}", segment(event_id)), None).await?)
}

async fn list(api: &Api, json: bool) -> anyhow::Result<()> {
    let mut portals: Vec<Value> = Vec::new();
    let mut from = String::new();
    loop {
        let page = api.call(Method::GET, &format!("/portals?limit=100{from}"), None).await?;
        portals.extend(page.get("portals").and_then(Value::as_array).cloned().unwrap_or_default());
        match page.get("next").and_then(Value::as_str) {
            Some(next) => from = format!("&from={}", segment(next)),
            None => break,
        }
    }
    if json {
        return print(&Value::Array(portals));
    }
    say(table(&portals).trim_end());
    Ok(())
}

/// The columns of the list: what stands above them, and the key in the API.
const COLUMNS: [(&str, &str); 7] = [
    ("PORTAL", "portal_id"),
    ("KIND", "kind"),
    ("STATE", "state"),
    ("MATRIX ROOM", "matrix_room_id"),
    ("LM ROOM", "lm_room_id"),
    ("LM HUB", "lm_hub"),
    ("ALIAS", "alias"),
];

/// A line for each portal under a line that says what is what.
fn table(portals: &[Value]) -> String {
    let cell = |portal: &Value, key: &str| portal.get(key).and_then(Value::as_str).unwrap_or("-").to_owned();
    let head = COLUMNS.iter().map(|(name, _)| (*name).to_owned()).collect::<Vec<_>>();
    let rows = portals.iter().map(|portal| COLUMNS.iter().map(|(_, key)| cell(portal, key)).collect::<Vec<_>>());
    let lines: Vec<Vec<String>> = std::iter::once(head).chain(rows).collect();
    let width = |column: usize| lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..COLUMNS.len()).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for line in &lines {
        let cells = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect::<Vec<_>>();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// The admin API of the gateway that runs with this configuration.
struct Api {
    http: reqwest::Client,
    base: String,
    token: String,
}

impl Api {
    fn new(config: &Config) -> anyhow::Result<Self> {
        let token = config.admin.token.clone().context(
            "the configuration has no `admin.token`, without which the gateway has no admin API: set one and restart it",
        )?;
        let mut address: SocketAddr = config.admin.address;
        if address.ip().is_unspecified() {
            address.set_ip(if address.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() });
        }
        crypto_provider();
        let http = reqwest::Client::builder().timeout(TIMEOUT).no_proxy().tls_certs_only([]).build()?;
        Ok(Self { http, base: format!("http://{address}"), token })
    }

    async fn call(&self, method: Method, path: &str, body: Option<Value>) -> anyhow::Result<Value> {
        let url = format!("{}/_isthmus/admin/v1{path}", self.base);
        let mut request = self.http.request(method, url).bearer_auth(&self.token);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let answer = request.send().await.map_err(|error| match error.is_connect() {
            true => anyhow::anyhow!("there is no gateway at {}: start it with `isthmus serve`", self.base),
            false => anyhow::anyhow!("the gateway at {} did not answer: {error}", self.base),
        })?;
        let status = answer.status();
        let body: Value = serde_json::from_str(&answer.text().await?).unwrap_or_default();
        if !status.is_success() {
            match body.get("error").and_then(Value::as_str) {
                Some(error) => bail!("{error}"),
                None => bail!("the gateway answered {status}"),
            }
        }
        Ok(body)
    }
}

fn segment(text: &str) -> impl std::fmt::Display + '_ {
    utf8_percent_encode(text, NON_ALPHANUMERIC)
}

fn print(value: &Value) -> anyhow::Result<()> {
    say(serde_json::to_string_pretty(value)?);
    Ok(())
}
