//! The registration file: what makes a Synapse take the gateway for its appservice. Written by `isthmus register`, loaded by
//! Synapse unchanged and by the gateway for the two tokens in it.
//! <https://spec.matrix.org/v1.17/application-service-api/#registration>

use std::collections::BTreeMap;
use std::io::{ErrorKind, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use ruma::{OwnedUserId, ServerName, UserId};
use serde::{Deserialize, Serialize};
use url::Url;

use super::Token;
use crate::config::{Appservice, Config};

/// The appservice's ID.
pub const ID: &str = "isthmus";
/// The localpart of the user at the Synapse through which the gateway acts.
pub const SENDER_LOCALPART: &str = "_isthmus";
/// The protocol that third-party look-ups name.
pub const PROTOCOL: &str = "linearized";

/// What the file says.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Registration {
    /// The appservice's ID.
    pub id: String,
    /// Where the Synapse reaches the gateway; null would turn the appservice off.
    pub url: Option<String>,
    /// What the gateway shows to the Synapse.
    pub as_token: Token,
    /// What the Synapse shows to the gateway.
    pub hs_token: Token,
    /// The localpart of the appservice's own user.
    pub sender_localpart: String,
    /// Whether requests with the token are limited.
    #[serde(default)]
    pub rate_limited: bool,
    /// Whether typing, receipts and presence are wanted: bridged rooms get them over federation.
    #[serde(default)]
    pub receive_ephemeral: bool,
    /// The protocols of third-party look-ups.
    #[serde(default)]
    pub protocols: Vec<String>,
    /// The names that are the appservice's.
    pub namespaces: Namespaces,
    /// What else an admin has written into it.
    #[serde(flatten)]
    pub others: BTreeMap<String, serde_yaml_ng::Value>,
}

/// The names that are the appservice's.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Namespaces {
    /// Users of the Synapse.
    pub users: Vec<Namespace>,
    /// Aliases of the Synapse.
    pub aliases: Vec<Namespace>,
    /// Rooms.
    pub rooms: Vec<Namespace>,
}

/// Names that match a regular expression from their beginning.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Namespace {
    /// Whether nobody else may make such names.
    pub exclusive: bool,
    /// The regular expression.
    pub regex: String,
}

/// Why the registration could not be used or written.
#[derive(Debug, thiserror::Error)]
pub enum RegistrationError {
    /// There is no file.
    #[error("there is no registration file {}: write it with `isthmus register --config FILE`", path.display())]
    Absent {
        /// The file.
        path: PathBuf,
    },
    /// It could not be read or written.
    #[error("the registration file {} could not be {what} ({source}): correct the path or its permissions", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// `read` or `written`.
        what: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is no registration.
    #[error("the registration file {} is not one ({problem}): delete it and run `isthmus register` again", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// No Synapse could call this.
    #[error("--url is {0:?}, but it must begin with http:// or https://")]
    Url(String),
    /// The configuration has no `[appservice]`.
    #[error(
        "the configuration has no section [appservice]: add it with homeserver_url, homeserver_name and registration"
    )]
    NoAppservice,
}

impl Registration {
    /// A new registration with fresh tokens.
    pub fn new(homeserver_name: &ServerName, url: &str) -> Self {
        let mut registration = Self {
            id: String::new(),
            url: Some(url.to_owned()),
            as_token: Token::generate(),
            hs_token: Token::generate(),
            sender_localpart: String::new(),
            rate_limited: false,
            receive_ephemeral: false,
            protocols: Vec::new(),
            namespaces: Namespaces::default(),
            others: BTreeMap::new(),
        };
        registration.describe(homeserver_name);
        registration
    }

    /// Reads the file.
    pub fn load(path: &Path) -> Result<Self, RegistrationError> {
        let text = std::fs::read_to_string(path).map_err(|source| match source.kind() {
            ErrorKind::NotFound => RegistrationError::Absent { path: path.to_owned() },
            _ => RegistrationError::Io { path: path.to_owned(), what: "read", source },
        })?;
        let format = |problem: String| RegistrationError::Format { path: path.to_owned(), problem };
        let registration: Self = serde_yaml_ng::from_str(&text).map_err(|error| format(error.to_string()))?;
        for (name, token) in [("as_token", &registration.as_token), ("hs_token", &registration.hs_token)] {
            if token.expose().is_empty() || !token.expose().chars().all(|c| c.is_ascii_graphic()) {
                return Err(format(format!("{name} is empty or holds spaces")));
            }
        }
        if registration.as_token == registration.hs_token {
            return Err(format("as_token and hs_token are the same".to_owned()));
        }
        Ok(registration)
    }

    /// Writes the file: readable by its owner and group (the Synapse). The mode of a file that is there stays.
    pub fn save(&self, path: &Path) -> Result<(), RegistrationError> {
        let io = |source| RegistrationError::Io { path: path.to_owned(), what: "written", source };
        let yaml = serde_yaml_ng::to_string(self)
            .map_err(|error| RegistrationError::Format { path: path.to_owned(), problem: error.to_string() })?;
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(io)?;
        }
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o640).open(path).map_err(io)?;
        let head = "# Written by `isthmus register`. The tokens are secret; the homeserver must be restarted when they change.\n";
        file.write_all(head.as_bytes()).and_then(|()| file.write_all(yaml.as_bytes())).map_err(io)
    }

    /// The appservice's own user at the Synapse.
    pub fn sender(&self, homeserver_name: &ServerName) -> Result<OwnedUserId, ruma::IdParseError> {
        UserId::parse(format!("@{}:{homeserver_name}", self.sender_localpart))
    }

    /// Everything but the tokens and the URL.
    fn describe(&mut self, homeserver_name: &ServerName) {
        let host = escape(homeserver_name.as_str());
        let own = |regex: String| vec![Namespace { exclusive: true, regex }];
        ID.clone_into(&mut self.id);
        SENDER_LOCALPART.clone_into(&mut self.sender_localpart);
        self.protocols = vec![PROTOCOL.to_owned()];
        self.namespaces = Namespaces {
            users: own(format!("@{SENDER_LOCALPART}:{host}")),
            aliases: own(format!("#lm_.*:{host}")),
            rooms: Vec::new(),
        };
    }
}

/// What `register` did.
#[derive(Debug)]
pub struct Registered {
    /// The file.
    pub path: PathBuf,
    /// The URL in it.
    pub url: String,
    /// Whether it was there before, with its tokens.
    pub kept: bool,
}

/// Writes the registration that the configuration names. Tokens of a file that is there are kept, and so is its URL when none
/// is given, unless it is that of an own listener: whether the listener for other servers does TLS decides which of the two.
pub fn register(config: &Config, url: Option<&Url>) -> Result<Registered, RegistrationError> {
    let Appservice { homeserver_name, registration: path, .. } =
        config.appservice.as_ref().ok_or(RegistrationError::NoAppservice)?;
    if let Some(url) = url.filter(|url| !matches!(url.scheme(), "http" | "https") || url.host().is_none()) {
        return Err(RegistrationError::Url(url.to_string()));
    }
    let before = match Registration::load(path) {
        Ok(before) => Some(before),
        Err(RegistrationError::Absent { .. }) => None,
        Err(error) => return Err(error),
    };
    let kept = before.is_some();
    let given = url.map(|url| url.as_str().trim_end_matches('/').to_owned());
    let mut registration = before.unwrap_or_else(|| Registration::new(homeserver_name, &own_url(config)));
    registration.describe(homeserver_name);
    let is_own = |url: &String| own_urls(config).contains(url);
    let url = given.or(registration.url.filter(|url| !is_own(url))).unwrap_or_else(|| own_url(config));
    registration.url = Some(url.clone());
    registration.save(path)?;
    Ok(Registered { path: path.clone(), url, kept })
}

/// Where a Synapse on the same machine reaches the endpoints of the appservice, which both listeners have: over the one for
/// other servers, or where that does TLS, over the admin listener, because Synapse checks certificates of appservices against
/// the system's authorities alone.
pub fn own_url(config: &Config) -> String {
    let [listen, admin] = own_urls(config);
    if config.listen.tls_certificate.is_some() { admin } else { listen }
}

/// What a URL without TLS is by which a program on this machine reaches the listener for other servers, and the admin listener.
fn own_urls(config: &Config) -> [String; 2] {
    [config.listen.address, config.admin.address].map(|mut address| {
        if address.ip().is_unspecified() {
            address.set_ip(match address.ip() {
                IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            });
        }
        format!("http://{address}")
    })
}

/// Whether the URL of a registration leads to the listener for other servers without TLS although that does TLS.
pub fn misses_tls(config: &Config, url: &str) -> bool {
    let [listen, _] = own_urls(config);
    config.listen.tls_certificate.is_some() && url.trim_end_matches('/') == listen
}

/// A server name as a part of a regular expression.
fn escape(name: &str) -> String {
    let mut escaped = String::with_capacity(name.len());
    for character in name.chars() {
        if matches!(character, '.' | '[' | ']') {
            escaped.push('\\');
        }
        escaped.push(character);
    }
    escaped
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn config(folder: &Path) -> Config {
        let path = folder.join("isthmus.toml");
        let text = "server_name = \"lm.example.org\"\n[appservice]\nhomeserver_url = \"http://127.0.0.1:8008\"\n\
                    homeserver_name = \"example.org:8449\"\nregistration = \"registration/isthmus.yaml\"\n";
        std::fs::write(&path, text).unwrap();
        Config::load_with(&path, std::iter::empty()).unwrap()
    }

    #[test]
    fn tokens_and_url_are_kept_and_the_rest_is_renewed() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        let first = register(&config, None).unwrap();
        assert_eq!((first.url.as_str(), first.kept), ("http://127.0.0.1:8448", false));
        let mode = std::fs::metadata(&first.path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777 & !0o640, 0, "{mode:o}");

        let before = Registration::load(&first.path).unwrap();
        let text = std::fs::read_to_string(&first.path).unwrap();
        std::fs::write(&first.path, text.replace("#lm_", "#old_") + "org.example.extra: 1\n").unwrap();
        let moved = register(&config, Some(&"https://as.example.org/".parse().unwrap())).unwrap();
        assert_eq!((moved.url.as_str(), moved.kept), ("https://as.example.org", true));
        let again = register(&config, None).unwrap();
        assert_eq!(again.url, "https://as.example.org");
        let after = Registration::load(&first.path).unwrap();
        assert_eq!((after.as_token, after.hs_token), (before.as_token, before.hs_token));
        assert_eq!(after.namespaces.aliases[0].regex, r"#lm_.*:example\.org:8449");
        assert_eq!(after.namespaces.users[0].regex, r"@_isthmus:example\.org:8449");
        assert!(after.others.contains_key("org.example.extra"));
    }

    #[test]
    fn a_file_that_is_no_registration_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        std::fs::create_dir(folder.path().join("registration")).unwrap();
        let path = folder.path().join("registration/isthmus.yaml");
        for (text, problem) in [
            ("id: isthmus\n", "missing field"),
            ("- 1\n", "is not one"),
            ("{id: a, url: b, as_token: same, hs_token: same, sender_localpart: c, namespaces: {}}", "are the same"),
            ("{id: a, url: b, as_token: a b, hs_token: s, sender_localpart: c, namespaces: {}}", "holds spaces"),
        ] {
            std::fs::write(&path, text).unwrap();
            let message = register(&config, None).unwrap_err().to_string();
            assert!(message.contains(problem), "{message}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
    }

    #[test]
    fn the_url_is_one_that_a_synapse_can_reach() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = config(folder.path());
        config.listen.address = "0.0.0.0:8448".parse().unwrap();
        assert_eq!(own_url(&config), "http://127.0.0.1:8448");
        config.listen.tls_certificate = Some("tls.pem".into());
        config.admin.address = "[::]:9090".parse().unwrap();
        assert_eq!(own_url(&config), "http://[::1]:9090");
    }

    #[test]
    fn its_own_url_is_renewed_when_the_listener_does_tls_and_when_it_no_longer_does() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = config(folder.path());
        for (tls, url) in
            [(false, "http://127.0.0.1:8448"), (true, "http://127.0.0.1:9090"), (false, "http://127.0.0.1:8448")]
        {
            config.listen.tls_certificate = tls.then(|| "tls.pem".into());
            assert_eq!(register(&config, None).unwrap().url, url);
            assert!(!misses_tls(&config, url));
        }
        config.listen.tls_certificate = Some("tls.pem".into());
        assert!(misses_tls(&config, "http://127.0.0.1:8448") && !misses_tls(&config, "https://127.0.0.1:8448"));
    }
}
