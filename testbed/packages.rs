//! Debian packages that the tests and the demo need and a fresh machine lacks: installed once, where that needs no password.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use super::process::target_dir;

/// Installs `packages`, unless `there` says that they are there. One process at a time: whoever else wants them meanwhile waits.
/// `progress` gets a line for each thing done.
pub fn install(packages: &[&str], there: impl Fn() -> bool, progress: &mut dyn FnMut(&str)) -> Result<()> {
    if there() {
        return Ok(());
    }
    let directory = target_dir()?.join("tmp");
    std::fs::create_dir_all(&directory)?;
    let lock = File::create(directory.join("packages.lock"))?;
    lock.lock().context("waiting for another process that installs packages")?;
    if there() {
        return Ok(());
    }
    let root = as_root()?;
    let names = packages.join(" ");
    progress(&format!("installing {names} with apt-get, since this machine lacks what is in them"));
    let log = directory.join("packages.log");
    // Others may be installing something on this machine, too.
    let wait = ["-q", "-o", "DPkg::Lock::Timeout=600"];
    let update = apt_get(&root).args(wait).arg("update").stdin(Stdio::null()).output()?;
    ensure!(update.status.success(), "`apt-get update`: {}", String::from_utf8_lossy(&update.stderr));
    let mut install = apt_get(&root);
    install.args(wait).args(["install", "-y", "--no-install-recommends"]).args(packages);
    run(install, &log, &mut |line| {
        if ["Need to get", "Unpacking", "Setting up"].iter().any(|shown| line.starts_with(shown)) {
            progress(line);
        }
    })
    .with_context(|| format!("`apt-get install {names}`"))?;
    ensure!(there(), "{names}: installed, and still not found; see {}", log.display());
    Ok(())
}

/// Writes a line where it is seen although the output of tests is captured.
pub fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Runs a command and reports each line that it prints; what it says of errors goes into the file `log`.
pub fn run(mut command: Command, log: &Path, progress: &mut dyn FnMut(&str)) -> Result<()> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(File::create(log)?);
    let mut child = command.spawn()?;
    for line in child.stdout.take().into_iter().flat_map(|out| BufReader::new(out).lines()).map_while(Result::ok) {
        progress(line.trim());
    }
    let status = child.wait()?;
    ensure!(status.success(), "{status}:\n{}", std::fs::read_to_string(log).unwrap_or_default());
    Ok(())
}

/// What stands before a command that only root may run: nothing for root, `sudo` where it asks for no password.
fn as_root() -> Result<Vec<&'static str>> {
    ensure!(succeeds(Command::new("apt-get").arg("--version")), "there is no `apt-get` that could install it");
    if nix::unistd::geteuid().is_root() {
        return Ok(Vec::new());
    }
    ensure!(succeeds(Command::new("sudo").args(["-n", "true"])), "only root may install, and `sudo` does not let us");
    Ok(vec!["sudo", "-n"])
}

/// Whether a command can be run, and ends well.
pub fn succeeds(command: &mut Command) -> bool {
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}

fn apt_get(root: &[&str]) -> Command {
    let mut words = root.iter().copied().chain(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]);
    let mut command = Command::new(words.next().unwrap_or("env"));
    command.args(words);
    command
}
