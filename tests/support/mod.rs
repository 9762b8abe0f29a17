//! What the scenario tests share: a directory a test, and everything of `testbed/`.

#[path = "../../testbed/mod.rs"]
pub mod testbed;

#[cfg(test)]
mod synapse_boots;
