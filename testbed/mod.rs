//! Everything that the scenario tests and the demo start on one machine, on loopback, with a certificate authority of their
//! own: Synapses from their Python package, isthmus itself, and Matrix clients. Included by `#[path]`.

#![allow(dead_code)]

pub mod certificates;
pub mod client;
pub mod gateway;
pub mod packages;
pub mod postgres;
pub mod process;
pub mod synapse;
pub mod venv;
