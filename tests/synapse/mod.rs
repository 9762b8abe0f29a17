//! Scenarios with stock Synapses: a Matrix user and an LM user in one portal.

mod alias_join;
mod created;
mod crossing;
mod directory;
mod eigen;
mod ends;
mod ephemeral;
mod fork;
mod gate;
mod kill;
mod outage;
mod pair;
mod poison;
