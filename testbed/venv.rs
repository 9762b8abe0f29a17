//! The Python virtual environment with Synapse: made once under the target directory, shared by the tests and the demo.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use super::process::target_dir;

/// The version of the Python package `matrix-synapse`.
pub const VERSION: &str = "1.163.2";

/// The environment's Python, with Synapse installed. Makes the environment when it is not there, which takes about a minute;
/// `progress` gets a line for each thing done. Whoever else wants it meanwhile waits.
pub fn python(progress: &mut dyn FnMut(&str)) -> Result<PathBuf> {
    let environment = target_dir()?.join(format!("synapse-venv-{VERSION}"));
    let python = environment.join("bin/python");
    let ready = environment.join("ready");
    if ready.exists() {
        return Ok(python);
    }
    let lock = File::create(environment.with_extension("lock"))?;
    lock.lock().context("waiting for another process that makes the virtual environment")?;
    if !ready.exists() {
        make(&environment, progress)?;
        File::create(&ready)?;
    }
    Ok(python)
}

fn make(environment: &Path, progress: &mut dyn FnMut(&str)) -> Result<()> {
    progress(&format!("making the virtual environment {}", environment.display()));
    let mut venv = Command::new("python3");
    venv.args(["-m", "venv", "--clear"]).arg(environment);
    run(venv, progress).context("`python3 -m venv` failed: Python 3.9 or later with its venv module is needed")?;
    let mut pip = Command::new(environment.join("bin/python"));
    pip.args(["-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar=off"]);
    pip.arg("--only-binary=:all:").arg(format!("matrix-synapse=={VERSION}"));
    run(pip, progress).context("installing Synapse from the Python package index")
}

/// Runs a command and reports each line that it prints.
fn run(mut command: Command, progress: &mut dyn FnMut(&str)) -> Result<()> {
    let log = target_dir()?.join("tmp/synapse-venv.log");
    std::fs::create_dir_all(target_dir()?.join("tmp"))?;
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(File::create(&log)?);
    let mut child = command.spawn()?;
    for line in child.stdout.take().into_iter().flat_map(|out| BufReader::new(out).lines()).map_while(Result::ok) {
        progress(line.trim());
    }
    let status = child.wait()?;
    ensure!(status.success(), "{status}:\n{}", std::fs::read_to_string(&log).unwrap_or_default());
    Ok(())
}
