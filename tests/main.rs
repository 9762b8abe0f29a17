//! All integration tests: one binary, a module a file.
// The futures of whole gateways in one test lie deep in each other.
#![recursion_limit = "256"]
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod bridge;
mod cli;
mod conformance;
mod dag;
mod docker;
mod doctor;
mod fuzz;
mod lm;
mod support;
mod synapse;
mod vectors;
