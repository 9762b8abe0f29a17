//! Child processes that never outlive the program that started them: each runs under a small guardian shell, which stops it
//! when this program closes the guardian's standard input, and that happens however this program ends.

use std::ffi::OsString;
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Starts the command in the background, says its process ID, and waits for whatever ends first: the command or our standard
/// input. Arguments: the log, a directory to remove at the end or nothing, the signal that asks the command to stop.
const GUARDIAN: &str = r#"
log=$1; clean=$2; signal=$3; shift 3
exec 3<&0
"$@" </dev/null >>"$log" 2>&1 3<&- &
child=$!
echo "$child"
exec >/dev/null 2>&1
(
    read -r _ <&3
    kill -"$signal" "$child"
    for _ in 1 2 3 4 5 6 7 8 9 10; do kill -0 "$child" || exit; sleep 1; done
    kill -KILL "$child"
) &
guard=$!
wait "$child"; status=$?
kill "$guard"
[ -z "$clean" ] || rm -rf -- "$clean"
exit "$status"
"#;

/// What is to be run.
pub struct Program {
    name: String,
    command: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    directory: Option<PathBuf>,
    log: PathBuf,
    remove: Option<PathBuf>,
    stop_signal: &'static str,
}

impl Program {
    /// The program `path`, whose output is appended to the file `log`.
    pub fn new(name: &str, path: impl Into<OsString>, log: &Path) -> Self {
        Self {
            name: name.to_owned(),
            command: vec![path.into()],
            environment: Vec::new(),
            directory: None,
            log: log.to_owned(),
            remove: None,
            stop_signal: "TERM",
        }
    }

    /// Adds arguments.
    pub fn args<A: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.command.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Sets a variable of the environment.
    pub fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Runs it in this directory.
    pub fn directory(mut self, directory: &Path) -> Self {
        self.directory = Some(directory.to_owned());
        self
    }

    /// Removes this directory after the program ended.
    pub fn remove_at_end(mut self, directory: &Path) -> Self {
        self.remove = Some(directory.to_owned());
        self
    }

    /// The signal, as `INT`, that asks the program to stop.
    pub fn stop_signal(mut self, signal: &'static str) -> Self {
        self.stop_signal = signal;
        self
    }

    /// Starts it.
    pub fn start(self) -> Result<Process> {
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", GUARDIAN, "guardian"]).arg(&self.log);
        shell.arg(self.remove.unwrap_or_default()).arg(self.stop_signal).args(&self.command);
        shell.envs(self.environment);
        if let Some(directory) = self.directory {
            shell.current_dir(directory);
        }
        // A group of its own, so that Ctrl-C reaches this program alone, which then stops the others in order.
        shell.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut guardian = shell.spawn().with_context(|| format!("starting {}", self.name))?;
        let mut line = String::new();
        if let Some(stdout) = guardian.stdout.take() {
            BufReader::new(stdout).read_line(&mut line)?;
        }
        let pid = line.trim().parse().with_context(|| format!("{} did not start: {line:?}", self.name))?;
        Ok(Process { name: self.name, pid: Pid::from_raw(pid), guardian, log: self.log })
    }
}

/// A running child process; stopped when dropped.
pub struct Process {
    name: String,
    pid: Pid,
    guardian: Child,
    log: PathBuf,
}

impl Process {
    /// Its process ID.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// Fails, with the end of its log, when it is not running any more.
    pub fn check(&mut self) -> Result<()> {
        if let Some(status) = self.guardian.try_wait()? {
            bail!("{} ended ({status}); the end of {}:\n{}", self.name, self.log.display(), self.log_tail());
        }
        Ok(())
    }

    /// Kills it with SIGKILL and waits until it is gone.
    pub fn kill(mut self) -> Result<()> {
        if self.guardian.try_wait()?.is_none() {
            // The guardian has not waited for its child yet, so the number still belongs to it.
            let _ = kill(self.pid, Signal::SIGKILL);
        }
        self.guardian.wait()?;
        Ok(())
    }

    /// Asks it to stop, kills it after ten seconds, and waits until it is gone.
    pub fn stop(&mut self) {
        drop(self.guardian.stdin.take());
        let _ = self.guardian.wait();
    }

    /// The last lines of its log.
    pub fn log_tail(&self) -> String {
        let log = std::fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        lines.iter().skip(lines.len().saturating_sub(40)).copied().collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Cargo's target directory, in which this program was built.
pub fn target_dir() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    let tagged = program.ancestors().find(|directory| directory.join("CACHEDIR.TAG").exists());
    // Where the tag was not restored with a cached directory: the profile's directory is one below.
    let profile = |directory: &&Path| directory.ends_with("debug") || directory.ends_with("release");
    let found = tagged.or_else(|| program.ancestors().find(profile).and_then(Path::parent));
    found.map(Path::to_owned).with_context(|| format!("{} is not in a target directory", program.display()))
}

/// A loopback port that was free a moment ago.
pub fn free_port() -> Result<u16> {
    Ok(std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}
