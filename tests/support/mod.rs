//! What the tests share: everything of `testbed/`, the small LM provider of the examples, and a bridge that bridges nothing.

pub mod between;
pub mod browser;
#[path = "../../examples/lm_provider/provider/mod.rs"]
pub mod provider;
#[path = "../../testbed/mod.rs"]
pub mod testbed;
pub mod world;

mod provider_talks;
mod synapse_boots;
