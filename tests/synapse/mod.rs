//! Scenarios with stock Synapses: a Matrix user and an LM user in one portal.

mod alias_join;
mod bot;
mod browser;
mod created;
mod crossing;
mod declining;
mod direct;
mod directory;
mod eigen;
mod ends;
mod ephemeral;
mod fork;
mod from_matrix;
mod gate;
mod kill;
mod media;
mod outage;
mod pair;
mod poison;
mod settings;
mod spaces;
mod upgrades;
