//! The Python virtual environment with Synapse: made once under the target directory, shared by the tests and the demo.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use super::packages::{self, run, succeeds};
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
    let log = environment.with_extension("log");
    let there = || succeeds(Command::new("python3").args(["-c", "import ensurepip, venv"]));
    packages::install(&["python3", "python3-venv"], there, progress)
        .context("Synapse needs Python 3.9 or later with its venv module, in Debian `python3-venv`")?;
    progress(&format!("making the virtual environment {}", environment.display()));
    let mut venv = Command::new("python3");
    venv.args(["-m", "venv", "--clear"]).arg(environment);
    run(venv, &log, progress).context("`python3 -m venv`")?;
    let mut pip = Command::new(environment.join("bin/python"));
    pip.args(["-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar=off"]);
    pip.arg("--only-binary=:all:").arg(format!("matrix-synapse=={VERSION}"));
    run(pip, &log, progress).context("installing Synapse from the Python package index")
}
