//! What a configuration must fulfil beyond its types. Each check answers with the key and with what to change.

use std::net::IpAddr;
use std::path::Path;

use url::{Host, Url};

use super::Config;
use crate::event::VerifyKey;

/// How many notaries there may be: they are asked one after the other.
const NOTARIES: usize = 5;

type Problem = (&'static str, String);

/// The first thing that is wrong with `config`, whose paths are absolute.
pub(super) fn check(config: &Config) -> Result<(), Problem> {
    if config.server_name.is_ip_literal() {
        let problem =
            format!("is {}, but LM knows no names that are addresses: give the gateway one of DNS", config.server_name);
        return Err(("server_name", problem));
    }
    let small = config.server_name.as_str().to_ascii_lowercase();
    if small != config.server_name.as_str() {
        let problem = format!("is {}, but servers compare names letter by letter: write {small}", config.server_name);
        return Err(("server_name", problem));
    }
    listeners(config)?;
    database(&config.database.url)?;
    appservice(config)?;
    federation(config)?;
    access(config)?;
    let version = config.portals.matrix_room_version.as_str();
    if !matches!(version, "10" | "11" | "12") {
        let problem =
            format!("is {version:?}, but isthmus makes Matrix rooms of version \"10\", \"11\" and \"12\" only");
        return Err(("portals.matrix_room_version", problem));
    }
    media(config)?;
    for (key, size) in [("caches.events", config.caches.events), ("caches.rooms", config.caches.rooms)] {
        if size < 16 {
            return Err((key, format!("is {size}, but a cache must hold at least 16 things")));
        }
    }
    Ok(())
}

/// How many files of the largest size the cache holds at least, so that one server's files leave room for others'.
const LARGEST_FILES: u64 = 4;
/// The smallest limit of files.
const SMALLEST_LIMIT: u64 = 65_536;

fn media(config: &Config) -> Result<(), Problem> {
    let media = &config.media;
    if media.max_bytes < SMALLEST_LIMIT {
        let problem = format!("is {}, but must be at least {SMALLEST_LIMIT}, or no picture crosses", media.max_bytes);
        return Err(("media.max_bytes", problem));
    }
    let least = media.max_bytes.saturating_mul(LARGEST_FILES);
    if media.cache_bytes < least {
        let problem = format!(
            "is {}, but must be at least {least}, which is {LARGEST_FILES} times `media.max_bytes`",
            media.cache_bytes
        );
        return Err(("media.cache_bytes", problem));
    }
    Ok(())
}

fn listeners(config: &Config) -> Result<(), Problem> {
    let listen = &config.listen;
    match (&listen.tls_certificate, &listen.tls_private_key) {
        (Some(certificate), Some(key)) => {
            is_file("listen.tls_certificate", certificate)?;
            is_file("listen.tls_private_key", key)?;
        }
        (Some(_), None) => {
            let problem = "is missing although `listen.tls_certificate` is set: give both, or neither when a reverse \
                           proxy does TLS";
            return Err(("listen.tls_private_key", problem.to_owned()));
        }
        (None, Some(_)) => {
            let problem = "is missing although `listen.tls_private_key` is set: give both, or neither when a reverse \
                           proxy does TLS";
            return Err(("listen.tls_certificate", problem.to_owned()));
        }
        (None, None) => {}
    }
    if listen.address.port() != 0 && config.admin.address == listen.address {
        let problem = format!("is {}, which `listen.address` has already: give it another port", listen.address);
        return Err(("admin.address", problem));
    }
    let is_wrong = |token: &String| token.is_empty() || !token.chars().all(|c| c.is_ascii_graphic());
    if config.admin.token.as_ref().is_some_and(is_wrong) {
        let problem = "must be of visible ASCII characters without spaces: take for instance the output of `openssl \
                       rand -hex 32`";
        return Err(("admin.token", problem.to_owned()));
    }
    Ok(())
}

fn database(url: &str) -> Result<(), Problem> {
    let is_wrong = |problem: &str| Err(("database.url", problem.to_owned()));
    if url.starts_with("postgres://") || url.starts_with("postgresql://") {
        return match Url::parse(url) {
            Ok(_) => Ok(()),
            Err(error) => is_wrong(&format!("is no URL ({error}): write postgres://USER:PASSWORD@HOST/DATABASE")),
        };
    }
    match url.strip_prefix("sqlite://") {
        None if url.contains(":memory:") => is_wrong("must name a file, because a database in memory loses everything"),
        None => is_wrong("must begin with sqlite:// or postgres://"),
        Some("" | ":memory:") => is_wrong("must name a file, as in sqlite://isthmus.db"),
        Some(file) => {
            let file = file.split('?').next().unwrap_or_default();
            let file = percent_encoding::percent_decode_str(file).decode_utf8_lossy().into_owned();
            match Path::new(&file).parent() {
                Some(folder) if !folder.is_dir() => {
                    is_wrong(&format!("names a file in {}, which is no folder: make it first", folder.display()))
                }
                _ => Ok(()),
            }
        }
    }
}

fn appservice(config: &Config) -> Result<(), Problem> {
    let Some(appservice) = &config.appservice else { return Ok(()) };
    if appservice.homeserver_name == config.server_name {
        let problem = format!(
            "is {}, the same as `server_name`: the gateway needs a server name of its own, for instance lm.{}",
            config.server_name, config.server_name
        );
        return Err(("appservice.homeserver_name", problem));
    }
    base_url("appservice.homeserver_url", &appservice.homeserver_url)
}

fn federation(config: &Config) -> Result<(), Problem> {
    for file in &config.federation.custom_ca {
        is_file("federation.custom_ca", file)?;
    }
    for key in &config.federation.leaked_keys {
        if let Err(error) = VerifyKey::from_base64(key) {
            let problem = format!(
                "holds {key:?}, which is no public key ({error}): write ed25519 keys in unpadded base64, as they stand in \
                 the server's answer at /_matrix/key/v2/server"
            );
            return Err(("federation.leaked_keys", problem));
        }
    }
    if config.federation.notaries.contains(&config.server_name) {
        let problem = format!("holds {}, which is this gateway: name other servers only", config.server_name);
        return Err(("federation.notaries", problem));
    }
    if config.federation.notaries.len() > NOTARIES {
        let problem =
            format!("names {} servers, of which at most {NOTARIES} can be asked", config.federation.notaries.len());
        return Err(("federation.notaries", problem));
    }
    for (server, url) in &config.federation.resolve {
        base_url("federation.resolve", url)?;
        if url.scheme() == "http" && !is_loopback(url) {
            let problem = format!("leads {server} to {url}, but plain http is for loopback addresses only: use https");
            return Err(("federation.resolve", problem));
        }
    }
    Ok(())
}

fn access(config: &Config) -> Result<(), Problem> {
    let access = &config.access;
    for (key, patterns) in [("access.hubs", &access.hubs), ("access.matrix_servers", &access.matrix_servers)] {
        if let Some(pattern) = patterns.iter().find(|pattern| !is_pattern(pattern)) {
            let problem = format!("holds {pattern:?}, but it must hold server names, in which * and ? are wildcards");
            return Err((key, problem));
        }
    }
    let of_user = |c: char| c.is_ascii_graphic() && c != ',';
    let is_wrong = |pattern: &&String| match pattern.strip_prefix('@') {
        Some(rest) => !rest.contains(':') || !rest.chars().all(of_user),
        None => !is_pattern(pattern),
    };
    for (key, patterns) in [
        ("access.create_by_invite", &access.create_by_invite),
        ("access.create_by_matrix_invite", &access.create_by_matrix_invite),
        ("access.create_by_ghost_invite", &access.create_by_ghost_invite),
    ] {
        if let Some(pattern) = patterns.iter().find(is_wrong) {
            let problem = format!(
                "holds {pattern:?}, but it must hold server names or user IDs (@user:server), in which * and ? are wildcards"
            );
            return Err((key, problem));
        }
    }
    let is_wrong = |name: &&String| match name.strip_prefix('!') {
        Some(rest) => rest.is_empty(),
        None => name.as_str() != "*" && ruma::ServerName::parse(name.as_str()).is_err(),
    };
    if let Some(name) = config.hub_transfer.accept.iter().find(is_wrong) {
        let problem = format!("holds {name:?}, but it must hold server names or room IDs (!room:server), or \"*\"");
        return Err(("hub_transfer.accept", problem));
    }
    if access.max_portals == 0 {
        let problem = "is 0, so there could be no portal: set at least 1, or `access.create_by_alias` to \"off\"";
        return Err(("access.max_portals", problem.to_owned()));
    }
    Ok(())
}

/// Whether it may stand for server names.
fn is_pattern(pattern: &str) -> bool {
    let of_name = |c: char| c.is_ascii_alphanumeric() || "-.:[]*?".contains(c);
    !pattern.is_empty() && pattern.chars().all(of_name)
}

fn base_url(key: &'static str, url: &Url) -> Result<(), Problem> {
    let problem = if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
        "but it must begin with http:// or https://"
    } else if !url.username().is_empty() || url.password().is_some() {
        return Err((key, "holds a user name or password: take it out".to_owned()));
    } else if url.query().is_some() || url.fragment().is_some() {
        "but it must end after the host, port and perhaps a path"
    } else {
        return Ok(());
    };
    Err((key, format!("is \"{url}\", {problem}")))
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(address)) => IpAddr::from(address).is_loopback(),
        Some(Host::Ipv6(address)) => IpAddr::from(address).is_loopback(),
        Some(Host::Domain(name)) => name == "localhost",
        None => false,
    }
}

fn is_file(key: &'static str, path: &Path) -> Result<(), Problem> {
    match std::fs::File::open(path).and_then(|file| file.metadata()) {
        Ok(metadata) if metadata.is_file() => Ok(()),
        Ok(_) => Err((key, format!("is {}, which is no file: correct the path", path.display()))),
        Err(error) => Err((key, format!("is {}, which cannot be read ({error}): correct the path", path.display()))),
    }
}
