//! A PostgreSQL for the tests of the store: the one at `ISTHMUS_TEST_POSTGRES`, or a private one from Debian's package, which is
//! installed where it is missing, started once a test process and stopped with it. Each test gets a database of its own.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use sqlx::{Connection as _, Executor as _, PgConnection};

use super::packages::{self, say};
use super::process::{Process, Program, free_port, target_dir};

/// The variable of the environment that names a server, or `none`.
const SERVER: &str = "ISTHMUS_TEST_POSTGRES";

/// A PostgreSQL server in which databases can be made.
pub struct Postgres {
    /// Everything of the URL up to the name of the database, and what follows it.
    url: url::Url,
    /// The private server, which runs as long as this process.
    _server: Option<Process>,
}

/// The server of this test process; none, and a line that says so, where `ISTHMUS_TEST_POSTGRES=none` asks for none.
pub fn shared() -> Result<Option<&'static Postgres>> {
    static SHARED: OnceLock<Result<Option<Postgres>, String>> = OnceLock::new();
    match SHARED.get_or_init(|| start().map_err(|error| format!("{error:#}"))) {
        Ok(postgres) => Ok(postgres.as_ref()),
        Err(error) => bail!("PostgreSQL for tests: {error}"),
    }
}

impl Postgres {
    /// Makes an empty database and returns its URL.
    pub async fn create_database(&self) -> Result<String> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("isthmus_test_{}_{}", std::process::id(), NUMBER.fetch_add(1, Ordering::SeqCst));
        let mut admin = PgConnection::connect(self.url.as_str()).await?;
        // The name is made here, of letters and digits.
        admin.execute(sqlx::AssertSqlSafe(format!("CREATE DATABASE {name} TEMPLATE template0"))).await?;
        admin.close().await?;
        let mut url = self.url.clone();
        url.set_path(&name);
        Ok(url.into())
    }

    /// Removes a database made by [`Postgres::create_database`].
    pub async fn drop_database(&self, url: &str) -> Result<()> {
        let url = url::Url::parse(url)?;
        let name = url.path().trim_start_matches('/');
        ensure!(name.starts_with("isthmus_test_"), "{name} is not a database of the tests");
        let mut admin = PgConnection::connect(self.url.as_str()).await?;
        admin.execute(sqlx::AssertSqlSafe(format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)"))).await?;
        admin.close().await?;
        Ok(())
    }
}

fn start() -> Result<Option<Postgres>> {
    match std::env::var(SERVER).unwrap_or_default().as_str() {
        "" => {}
        "none" => {
            ensure!(std::env::var_os("CI").is_none(), "{SERVER}=none is not for CI, which tests on both databases");
            say(&format!("{SERVER}=none: the tests of the store run on SQLite alone"));
            return Ok(None);
        }
        url => return Ok(Some(Postgres { url: url.parse().context(SERVER)?, _server: None })),
    }
    let there = || binaries().is_some() && has_setpriv();
    packages::install(&["postgresql", "util-linux"], there, &mut say).with_context(|| {
        format!(
            "it is not on this machine: install Debian's package `postgresql` (or have `initdb` and `postgres` on the PATH), \
             or name a server by {SERVER}=postgres://…, or test on SQLite alone by {SERVER}=none"
        )
    })?;
    let binaries = binaries().context("`initdb` is gone again")?;
    for attempt in 1.. {
        match start_private(&binaries) {
            Ok(postgres) => return Ok(Some(postgres)),
            // Somebody may have taken the free port meanwhile.
            Err(error) if attempt == 3 => return Err(error),
            Err(_) => {}
        }
    }
    Ok(None)
}

/// Whether there is what runs PostgreSQL as another user, where that is needed.
fn has_setpriv() -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    !nix::unistd::geteuid().is_root() || std::env::split_paths(&path).any(|bin| bin.join("setpriv").exists())
}

/// Where `initdb` and `postgres` are.
fn binaries() -> Option<PathBuf> {
    let debian = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten().map(|entry| entry.path());
    let mut found: Vec<PathBuf> = debian.map(|version| version.join("bin")).collect();
    found.sort();
    let path = std::env::var_os("PATH").unwrap_or_default();
    found.into_iter().rev().chain(std::env::split_paths(&path)).find(|bin| bin.join("initdb").exists())
}

fn start_private(binaries: &Path) -> Result<Postgres> {
    let data = data_directory()?;
    let output = as_postgres(&binaries.join("initdb"))
        .args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync", "-D"])
        .arg(&data)
        .current_dir("/")
        .stdin(Stdio::null())
        .output()
        .context("running initdb")?;
    ensure!(output.status.success(), "initdb: {}", String::from_utf8_lossy(&output.stderr));
    let port = free_port()?;
    let server = as_postgres(&binaries.join("postgres"));
    let program = Program::new("PostgreSQL", server.get_program(), &target_dir()?.join("tmp/postgresql.log"))
        .args(server.get_args())
        .args(["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "max_connections=1000"])
        .args(["-c", "fsync=off", "-c", "autovacuum=off", "-p"])
        .args([port.to_string(), "-D".to_owned()])
        .args([&data])
        .directory(Path::new("/"))
        .remove_at_end(&data)
        .stop_signal("INT");
    let mut server = program.start()?;
    let deadline = Instant::now() + Duration::from_secs(60);
    let url = url::Url::parse(&format!("postgres://postgres@127.0.0.1:{port}/postgres"))?;
    while !is_ready(binaries, port)? {
        server.check()?;
        ensure!(Instant::now() < deadline, "not ready after a minute:\n{}", server.log_tail());
        std::thread::sleep(Duration::from_millis(30));
    }
    Ok(Postgres { url, _server: Some(server) })
}

fn is_ready(binaries: &Path, port: u16) -> Result<bool> {
    let mut command = Command::new(binaries.join("pg_isready"));
    command.args(["-q", "-h", "127.0.0.1", "-p"]).arg(port.to_string());
    Ok(command.stdin(Stdio::null()).status()?.success())
}

/// PostgreSQL refuses to run as root: then it runs as the user that Debian's package made.
fn as_postgres(program: &Path) -> Command {
    if !nix::unistd::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--init-groups", "--"]).arg(program);
    command
}

/// A directory that the user who runs PostgreSQL can write: under `target/` where that user can get there, else in one of
/// the system's places for such things, since a clone and `TMPDIR` may both be closed to other users.
fn data_directory() -> Result<PathBuf> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let name = format!("isthmus-postgres-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::SeqCst));
    let user = if nix::unistd::geteuid().is_root() {
        Some(nix::unistd::User::from_name("postgres")?.context("there is no user `postgres`")?)
    } else {
        None
    };
    let mut parents = vec![target_dir()?.join("tmp"), std::env::temp_dir()];
    parents.extend(["/tmp", "/var/tmp", "/dev/shm"].map(PathBuf::from));
    parents.extend(user.as_ref().map(|user| user.dir.clone()));
    let mut tried = Vec::new();
    for parent in parents {
        match try_directory(&parent.join(&name), user.as_ref()) {
            Ok(directory) => return Ok(directory),
            Err(error) => tried.push(format!("{}: {error:#}", parent.display())),
        }
    }
    bail!("no directory for PostgreSQL's data: {}", tried.join("; "))
}

/// Makes `directory` and tells whether `user`, or who runs this, can write there.
fn try_directory(directory: &Path, user: Option<&nix::unistd::User>) -> Result<PathBuf> {
    std::fs::create_dir_all(directory)?;
    let usable = || -> Result<()> {
        if let Some(user) = user {
            nix::unistd::chown(directory, Some(user.uid), Some(user.gid))?;
        }
        let mut probe = as_postgres(Path::new("test"));
        let probe = probe.arg("-w").arg(directory).current_dir("/").stdin(Stdio::null()).output()?;
        ensure!(probe.status.success(), "not open to PostgreSQL's user {}", String::from_utf8_lossy(&probe.stderr));
        Ok(())
    };
    if let Err(error) = usable() {
        std::fs::remove_dir(directory)?;
        return Err(error);
    }
    Ok(directory.to_owned())
}
