//! How many files and connections the process may have open. Systems give a process few by default, for the sake of programs that
//! cannot have many, and let it ask for more.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// With fewer than this many, connections of peers are turned away before the listener is full.
pub(crate) const ENOUGH: u64 = 4_096;

/// How many may be open: as many as the process may ask for.
pub(crate) fn most() -> std::io::Result<u64> {
    Ok(getrlimit(Resource::RLIMIT_NOFILE)?.1)
}

/// Asks for as many as the process may have, and says in the log how many that are.
pub(super) fn raise() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        Ok((soft, hard))
    });
    match raised {
        Ok((before, limit)) if limit < ENOUGH => {
            tracing::warn!(limit, before, "few files and connections may be open at once: raise LimitNOFILE to 16384");
        }
        Ok((before, limit)) => tracing::info!(limit, before, "so many files and connections may be open at once"),
        Err(error) => tracing::warn!(%error, "the limit of open files and connections could not be raised"),
    }
}
