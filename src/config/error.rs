//! What is wrong with a configuration, in one sentence: which key, which value, where from, and what to change.

use std::path::PathBuf;

use figment::error::Kind;
use figment::value::Value;
use figment::{Figment, Metadata};

use super::environment::{Environment, KEYS, Kind as Expected, variable};

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// There is no such file.
    #[error(
        "there is no configuration file {}: write one with `isthmus generate-config --server-name NAME --output {}`, or \
         name the right one with --config", path.display(), path.display()
    )]
    Absent {
        /// The file.
        path: PathBuf,
    },
    /// The file is there and cannot be read.
    #[error("the configuration file {} cannot be read ({problem}): correct the path or its permissions", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        problem: String,
    },
    /// The file is no text.
    #[error("the configuration file {} is not UTF-8 text: save it as UTF-8", path.display())]
    NoText {
        /// The file.
        path: PathBuf,
    },
    /// The file is no TOML.
    #[error("the configuration file {} is not valid TOML: {problem}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and what.
        problem: String,
    },
    /// An environment variable looks like ours and is none.
    #[error("the environment variable {name} sets no key of the configuration: {}",
        hint.as_ref().map_or_else(|| "take it out".to_owned(), |hint| format!("did you mean {hint}?")))]
    UnknownVariable {
        /// The variable.
        name: String,
        /// One that is similar.
        hint: Option<String>,
    },
    /// A key is wrong.
    #[error("{origin}: `{key}` {problem}")]
    Key {
        /// The file or the environment variable.
        origin: String,
        /// The key, with its section.
        key: String,
        /// What is wrong and what to change.
        problem: String,
    },
}

/// Keys whose values are not shown.
const SECRET: [&str; 2] = ["admin.token", "database.url"];

/// What figment could not make a configuration of.
pub(super) fn explain(error: figment::Error, figment: &Figment, path: &std::path::Path) -> ConfigError {
    let mut key = error.path.clone();
    let field = match &error.kind {
        Kind::MissingField(name) => Some(name.to_string()),
        Kind::UnknownField(name, _) => Some(name.clone()),
        _ => None,
    };
    if field.is_some() && key.last() != field.as_ref() {
        key.extend(field);
    }
    if key.is_empty() {
        return ConfigError::Syntax { path: path.to_owned(), problem: syntax(&error.kind.to_string()) };
    }
    let key = key.join(".");
    let shown = value(figment, &key);
    let problem = match &error.kind {
        Kind::MissingField(_) => {
            format!("is missing: add it, or set {} in the environment", variable(&key))
        }
        Kind::UnknownField(..) => {
            let sections = KEYS.iter().filter_map(|(known, _)| Some(known.split_once('.')?.0));
            let hint = match similar(&key, KEYS.iter().map(|(known, _)| *known).chain(sections)) {
                None => "take it out".to_owned(),
                Some(known) if KEYS.iter().any(|(key, _)| *key == known) => format!("did you mean `{known}`?"),
                Some(section) => format!("did you mean the section [{section}]?"),
            };
            format!("is not a key of the configuration: {hint}")
        }
        Kind::UnknownVariant(_, [only]) => format!("{shown}, but it must be {only}, the only one that there is"),
        Kind::UnknownVariant(_, expected) => format!("{shown}, but it must be one of {}", expected.join(", ")),
        // What is expected is called by its type in Rust.
        Kind::InvalidType(..) | Kind::InvalidValue(..) => format!("{shown}: {}", advice(&key)),
        other => format!("{shown}, which is not valid ({}): {}", other.to_string().replace('\n', " "), advice(&key)),
    };
    ConfigError::Key { origin: origin(error.metadata.as_ref(), &key, path), key, problem }
}

/// What to write instead of a value that is none for its key.
fn advice(key: &str) -> &'static str {
    let is_in = |known: &str| key.strip_prefix(known).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
    let Some((known, kind)) = KEYS.iter().find(|(known, _)| is_in(known)) else {
        return "write it as a section, in brackets on a line of its own, and its keys in the lines below";
    };
    match (*known, kind) {
        ("listen.address" | "admin.address", _) => {
            "write \"IP:PORT\", as in \"127.0.0.1:8448\", with 0.0.0.0 for all addresses of this machine"
        }
        ("server_name" | "listen.well_known" | "appservice.homeserver_name", _) => {
            "write a server name, as in \"lm.example.org\" or \"lm.example.org:8449\", without https://"
        }
        ("appservice.homeserver_url", _) => "write a URL, as in \"http://127.0.0.1:8008\"",
        ("federation.resolve", _) => "write server names and URLs, as in \"hub.example\" = \"https://192.0.2.7:8448\"",
        ("access.admins", _) => "write a list of user IDs, as in [\"@admin:example.org\"]",
        (_, Expected::Number) => "write a whole number from 0 to 4294967295 without quotes",
        (_, Expected::Switch) => "write true or false without quotes",
        (_, Expected::List) => "write a list of texts, as in [\"one\", \"two\"]",
        (_, Expected::Text | Expected::Table) => "write a text in quotes",
    }
}

/// A key whose value was read and is no good.
pub(super) fn wrong(figment: &Figment, path: &std::path::Path, key: &str, problem: String) -> ConfigError {
    let metadata = figment.find_metadata(key);
    ConfigError::Key { origin: origin(metadata, key, path), key: key.to_owned(), problem }
}

/// The known word that is nearest to `word`, if one is near.
pub(super) fn similar<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known
        .map(|known| (strsim::jaro_winkler(word, known), known))
        .filter(|(likeness, _)| *likeness > 0.85)
        .max_by(|(one, _), (other, _)| one.total_cmp(other))
        .map(|(_, known)| known)
}

fn origin(metadata: Option<&Metadata>, key: &str, path: &std::path::Path) -> String {
    match metadata {
        Some(metadata) if metadata.name == Environment::NAME => variable(key),
        _ => path.display().to_string(),
    }
}

fn value(figment: &Figment, key: &str) -> String {
    if SECRET.contains(&key) {
        return "has a value that is not shown here".to_owned();
    }
    // The last part of a key may be an index into a list.
    let (list, index) = key.rsplit_once('.').unwrap_or((key, ""));
    let found = figment
        .find_value(key)
        .ok()
        .or_else(|| figment.find_value(list).ok()?.into_array()?.into_iter().nth(index.parse().ok()?));
    match &found {
        Some(Value::String(_, text)) => format!("is {text:?}"),
        Some(Value::Num(_, number)) => match (number.to_i128(), number.to_u128()) {
            (Some(number), _) => format!("is {number}"),
            (_, Some(number)) => format!("is {number}"),
            _ => "is a number with a fraction".to_owned(),
        },
        Some(Value::Bool(_, truth)) => format!("is {truth}"),
        Some(value) => {
            format!("is {} {}", if matches!(value, Value::Array(..)) { "an" } else { "a" }, value.to_actual())
        }
        None => "is wrong".to_owned(),
    }
}

/// Position and reason, without the excerpt between them, which may hold a secret.
fn syntax(message: &str) -> String {
    let mut lines = message.lines().filter(|line| !line.trim().is_empty());
    let first = lines.next().unwrap_or_default().trim_start_matches("TOML parse error ");
    match lines.next_back() {
        Some(last) => format!("{first}: {}", last.trim()),
        None => first.to_owned(),
    }
}
