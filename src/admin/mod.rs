//! What operators look at: metrics, health, the admin API.

pub mod metrics;
