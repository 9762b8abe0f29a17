//! The environment as a source of configuration: every key can be given as `ISTHMUS_…`, sections set apart by two
//! underscores (`listen.address` is `ISTHMUS_LISTEN__ADDRESS`).

use figment::value::{Dict, Map, Value};
use figment::{Error, Metadata, Profile, Provider, providers};

use super::ConfigError;
use super::error::similar;

/// How the text of a variable is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// As it stands.
    Text,
    /// A whole number.
    Number,
    /// `true` or `false`.
    Switch,
    /// Parts set apart by commas, or a TOML array.
    List,
    /// `NAME=VALUE` set apart by commas, or a TOML inline table.
    Table,
}

/// Every key of the configuration.
pub(super) const KEYS: &[(&str, Kind)] = &[
    ("server_name", Kind::Text),
    ("signing_key", Kind::Text),
    ("listen.address", Kind::Text),
    ("listen.tls_certificate", Kind::Text),
    ("listen.tls_private_key", Kind::Text),
    ("listen.well_known", Kind::Text),
    ("listen.connections_per_address", Kind::Number),
    ("database.url", Kind::Text),
    ("database.keep_days", Kind::Number),
    ("appservice.homeserver_url", Kind::Text),
    ("appservice.homeserver_name", Kind::Text),
    ("appservice.registration", Kind::Text),
    ("federation.custom_ca", Kind::List),
    ("federation.leaked_keys", Kind::List),
    ("federation.notaries", Kind::List),
    ("federation.allow_private_networks", Kind::Switch),
    ("federation.resolve", Kind::Table),
    ("access.hubs", Kind::List),
    ("access.matrix_servers", Kind::List),
    ("access.create_by_alias", Kind::Text),
    ("access.create_by_invite", Kind::List),
    ("access.create_by_matrix_invite", Kind::List),
    ("access.create_by_ghost_invite", Kind::List),
    ("access.admins", Kind::List),
    ("access.max_portals", Kind::Number),
    ("hub_transfer.give", Kind::Switch),
    ("hub_transfer.accept", Kind::List),
    ("portals.matrix_room_version", Kind::Text),
    ("portals.encryption", Kind::Text),
    ("portals.notices", Kind::Switch),
    ("portals.import_history", Kind::Number),
    ("portals.hub_spaces", Kind::Switch),
    ("bridge.typing", Kind::Switch),
    ("bridge.receipts", Kind::Switch),
    ("bridge.presence", Kind::Switch),
    ("budgets.events_per_second", Kind::Number),
    ("budgets.bytes_per_day", Kind::Number),
    ("budgets.ghosts_per_hour", Kind::Number),
    ("budgets.backlog", Kind::Number),
    ("budgets.portals_per_hour", Kind::Number),
    ("budgets.open_invites_per_user", Kind::Number),
    ("budgets.open_invites_per_server", Kind::Number),
    ("budgets.edus_per_second", Kind::Number),
    ("media.max_bytes", Kind::Number),
    ("media.cache_bytes", Kind::Number),
    ("media.cache_dir", Kind::Text),
    ("admin.address", Kind::Text),
    ("admin.token", Kind::Text),
    ("caches.events", Kind::Number),
    ("caches.rooms", Kind::Number),
];

/// What all variables begin with.
const PREFIX: &str = "ISTHMUS_";
/// Beginnings of variables that are no keys: the command line's own, those of the tests, and those by which Kubernetes and
/// container links tell of a service that is called isthmus.
const NO_KEYS: [&str; 4] = ["ISTHMUS_CONFIG", "ISTHMUS_TEST_", "ISTHMUS_SERVICE_", "ISTHMUS_PORT_"];
/// Of those, one that is a beginning of a section's name.
const SERVICE: &str = "ISTHMUS_PORT";

/// The name of the variable for a key.
pub(super) fn variable(key: &str) -> String {
    format!("{PREFIX}{}", key.replace('.', "__").to_ascii_uppercase())
}

/// The variables that were found, as a provider for figment.
pub(super) struct Environment {
    values: Dict,
}

impl Environment {
    /// How the source is called in figment's metadata.
    pub(super) const NAME: &str = "environment";

    /// Picks the configuration out of all variables. Empty ones count as absent.
    pub(super) fn collect(variables: impl Iterator<Item = (String, String)>) -> Result<Self, ConfigError> {
        let mut values = Dict::new();
        for (name, text) in variables {
            let Some(rest) = name.strip_prefix(PREFIX) else { continue };
            if name == SERVICE || NO_KEYS.iter().any(|other| name.starts_with(other)) {
                continue;
            }
            let key = rest.to_ascii_lowercase().replace("__", ".");
            let Some((key, kind)) = KEYS.iter().find(|(known, _)| *known == key) else {
                let hint = similar(&key, KEYS.iter().map(|(known, _)| *known)).map(variable);
                return Err(ConfigError::UnknownVariable { name, hint });
            };
            if !text.trim().is_empty() {
                insert(&mut values, key, read(*kind, text.trim()));
            }
        }
        Ok(Self { values })
    }
}

impl Provider for Environment {
    fn metadata(&self) -> Metadata {
        Metadata::named(Self::NAME)
    }

    fn data(&self) -> Result<Map<Profile, Dict>, Error> {
        Ok(Profile::Default.collect(self.values.clone()))
    }
}

/// A text of the wrong form stays a text: the deserializer then says what was expected in its place.
fn read(kind: Kind, text: &str) -> Value {
    let as_text = || Value::from(text);
    match kind {
        Kind::Text => as_text(),
        Kind::Number => text.parse::<u64>().map_or_else(|_| as_text(), Value::from),
        Kind::Switch => text.parse::<bool>().map_or_else(|_| as_text(), Value::from),
        Kind::List if text.starts_with('[') => toml(text).unwrap_or_else(as_text),
        Kind::List => {
            let parts: Vec<&str> = text.split(',').map(str::trim).filter(|part| !part.is_empty()).collect();
            Value::from(parts)
        }
        Kind::Table if text.starts_with('{') => toml(text).unwrap_or_else(as_text),
        Kind::Table => {
            let pairs = text.split(',').map(|pair| {
                let (name, value) = pair.split_once('=')?;
                Some((name.trim().to_owned(), Value::from(value.trim())))
            });
            pairs.collect::<Option<Dict>>().map_or_else(as_text, Value::from)
        }
    }
}

fn toml(text: &str) -> Option<Value> {
    use providers::Format as _;
    let data = providers::Toml::string(&format!("value = {text}")).data().ok()?;
    data.into_values().next()?.remove("value")
}

fn insert(values: &mut Dict, key: &str, value: Value) {
    match key.split_once('.') {
        None => drop(values.insert(key.to_owned(), value)),
        Some((section, rest)) => {
            let inner = values.entry(section.to_owned()).or_insert_with(|| Value::from(Dict::new()));
            if let Value::Dict(_, inner) = inner {
                insert(inner, rest, value);
            }
        }
    }
}
