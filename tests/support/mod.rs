//! What the scenario tests share: everything of `testbed/`, and the small LM provider of the examples.

#[path = "../../examples/lm_provider/provider/mod.rs"]
pub mod provider;
#[path = "../../testbed/mod.rs"]
pub mod testbed;
pub mod world;

mod provider_talks;
mod synapse_boots;
