//! What can be checked on this machine alone: files and the database.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use nix::sys::statvfs::statvfs;
use sqlx::{Connection as _, Executor as _};

use super::Finding;
use crate::appservice::{Registration, RegistrationError, misses_tls};
use crate::config::{self, Config};
use crate::gateway::descriptors;
use crate::identity::SigningKey;
use crate::store::{self, Backend, StoreError, sqlite_file};

/// The key, when there is one, and what is to be said of its file.
pub(super) fn signing_key(config: &Config) -> (Option<SigningKey>, Finding) {
    const CHECK: &str = "signing key";
    let path = &config.signing_key;
    if !path.exists() {
        let writable = path.parent().is_some_and(|folder| {
            folder.metadata().is_ok_and(|folder| folder.is_dir() && !folder.permissions().readonly())
        });
        let found = format!("{} is not there yet", path.display());
        return (
            None,
            if writable {
                Finding::pass(CHECK, format!("{found} and is made at the first start"))
            } else {
                Finding::fail(CHECK, format!("{found} and its folder cannot be written"), "make the folder writable")
            },
        );
    }
    match SigningKey::load_or_generate(path) {
        Ok(key) if is_open_to_all(path) => {
            let found = format!("{} can be read by everybody on this machine", path.display());
            (Some(key), Finding::warn(CHECK, found, format!("chmod 600 {}", path.display())))
        }
        Ok(key) => {
            let found = format!("{} holds the key {}", path.display(), key.id());
            (Some(key), Finding::pass(CHECK, found))
        }
        Err(error) => (None, Finding::fail(CHECK, error.to_string(), error.advice())),
    }
}

/// Whether the database can be opened. Nothing is changed in it.
pub(super) async fn database(config: &Config) -> Finding {
    const CHECK: &str = "database";
    let url = &config.database.url;
    let backend = Backend::of(url);
    let file = sqlite_file(url);
    if backend == Backend::Sqlite && !file.exists() {
        return Finding::pass(CHECK, format!("{} is not there yet and is made at the first start", file.display()));
    }
    let ask = async {
        let mut connection = store::connect(url).await?;
        match backend {
            // Writing begins here, and nothing is written.
            Backend::Sqlite => connection.execute("PRAGMA busy_timeout = 10000; BEGIN IMMEDIATE; ROLLBACK").await?,
            Backend::Postgres => connection.execute("SELECT 1").await?,
        };
        Ok::<_, StoreError>(connection.close().await?)
    };
    match ask.await {
        Ok(()) if backend == Backend::Sqlite && is_open_to_all(&file) => {
            let found = format!("{} can be read by everybody on this machine, with all that is said", file.display());
            Finding::warn(CHECK, found, format!("chmod 600 {}*", file.display()))
        }
        Ok(()) => Finding::pass(
            CHECK,
            if backend == Backend::Sqlite { format!("{url} answers") } else { "PostgreSQL answers".to_owned() },
        ),
        Err(StoreError::Unopened { problem, advice }) => {
            Finding::fail(CHECK, format!("the database cannot be opened: {problem}"), advice)
        }
        Err(error) => Finding::fail(CHECK, error.to_string(), backend.advice(&error.to_string())),
    }
}

/// Below this little space, in bytes, nothing can soon be accepted any more.
const SPACE_FAIL: u64 = 64 << 20;
/// Below this little it is time to do something.
const SPACE_WARN: u64 = 1 << 30;

/// How much space the disk has on which the database is; none where that is on another machine, or not known.
pub(super) fn space(config: &Config) -> Option<Finding> {
    if Backend::of(&config.database.url) != Backend::Sqlite {
        return None;
    }
    let file = sqlite_file(&config.database.url);
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let disk = statvfs(folder).ok()?;
    Some(space_left(folder, disk.blocks_available().saturating_mul(disk.fragment_size())))
}

fn space_left(folder: &Path, left: u64) -> Finding {
    const CHECK: &str = "disk";
    let found = format!("{} MiB are left where the database is ({})", left >> 20, folder.display());
    let fix = "make space: what cannot be written is not accepted";
    match left {
        left if left < SPACE_FAIL => Finding::fail(CHECK, found, fix),
        left if left < SPACE_WARN => Finding::warn(CHECK, found, fix),
        _ => Finding::pass(CHECK, found),
    }
}

/// Whether files of media can be kept where the configuration says.
pub(super) fn media(config: &Config) -> Finding {
    const CHECK: &str = "media";
    let settings = &config.media;
    let folder = settings.cache_dir.display();
    match crate::media::usable(&settings.cache_dir) {
        Ok(left) if left < settings.max_bytes => {
            let found = format!("{} MiB are left for files of media in {folder}", left >> 20);
            Finding::warn(CHECK, found, "make space, or name a folder on another disk in `media.cache_dir`")
        }
        Ok(_) => Finding::pass(CHECK, format!("files of media can be kept in {folder}")),
        Err(error) => {
            let found = format!("files of media cannot be kept in {folder}: {error}");
            Finding::fail(CHECK, found, "make the folder writable, or name another in `media.cache_dir`")
        }
    }
}

/// Whether a gateway that is started as this is may have as many connections open as it needs.
pub(super) fn open_files() -> Finding {
    const CHECK: &str = "open files";
    let fix = "raise the limit for the gateway: LimitNOFILE=16384 under systemd, `ulimit -Hn` in a shell";
    match descriptors::most() {
        Ok(limit) if limit < descriptors::ENOUGH => {
            let needed = descriptors::ENOUGH;
            let found =
                format!("only {limit} files and connections may be open at once, {needed} are the least for peers");
            Finding::warn(CHECK, found, fix)
        }
        Ok(limit) => Finding::pass(CHECK, format!("a process may have {limit} files and connections open at once")),
        Err(error) => Finding::warn(CHECK, format!("their limit is not known: {error}"), fix),
    }
}

/// What is to be said of the registration file, which could be read.
pub(super) fn registration(
    config: &Config,
    settings: &config::Appservice,
    registration: &Registration,
) -> Vec<Finding> {
    const CHECK: &str = "registration";
    let path = settings.registration.display();
    let mut findings = Vec::new();
    let again = "run `isthmus register` again and restart Synapse";
    if is_open_to_all(&settings.registration) {
        let found = format!("{path} holds secret tokens and can be read by everybody on this machine");
        findings.push(Finding::warn(CHECK, found, format!("chmod 640 {path}, with the Synapse's group")));
    }
    let fresh = Registration::new(&settings.homeserver_name, "");
    let patterns = |registration: &Registration| {
        registration.namespaces.aliases.iter().map(|namespace| namespace.regex.clone()).collect::<Vec<_>>()
    };
    if fresh.id != registration.id || fresh.sender_localpart != registration.sender_localpart {
        findings.push(Finding::fail(CHECK, format!("{path} was not written by this isthmus"), again));
    } else if patterns(&fresh).iter().any(|pattern| !patterns(registration).contains(pattern)) {
        let found = format!("{path} does not give the aliases #lm_…:{} to isthmus", settings.homeserver_name);
        findings.push(Finding::fail(CHECK, found, again));
    } else if let Some(url) = registration.url.as_deref().filter(|url| misses_tls(config, url)) {
        let found = format!("{path} has Synapse call {url}, where isthmus does TLS and answers nothing else");
        findings.push(Finding::fail(CHECK, found, again));
    } else if findings.is_empty() {
        findings.push(Finding::pass(CHECK, format!("{path} can be read")));
    }
    findings
}

/// Why the registration could not be read.
pub(super) fn unusable(error: &RegistrationError) -> Finding {
    Finding { check: "registration", outcome: super::Outcome::Fail, found: error.to_string(), fix: None }
}

fn is_open_to_all(path: &Path) -> bool {
    path.metadata().is_ok_and(|file| file.permissions().mode() & 0o004 != 0)
}

#[cfg(test)]
mod tests {
    use super::super::Outcome;
    use super::*;

    #[test]
    fn a_disk_that_fills_up_is_told_of_in_time() {
        let outcome = |left| space_left(Path::new("/data"), left).outcome;
        assert_eq!([0, SPACE_FAIL, SPACE_WARN].map(outcome), [Outcome::Fail, Outcome::Warn, Outcome::Pass]);
        assert!(space_left(Path::new("/data"), 5 << 20).found.starts_with("5 MiB are left"));
    }
}
