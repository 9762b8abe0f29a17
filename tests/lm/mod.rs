//! The linear side: hubs and participants that talk to each other over loopback HTTP, and what misbehaves there.

mod devices;
mod edus;
mod errors;
mod faulty_hub;
mod forgeries;
mod full_disk;
mod graph_server;
mod holes;
mod hostile_hub;
mod hostile_participant;
pub mod http;
mod hub_and_participant;
mod hub_transfer;
mod knocks;
pub mod log_hub;
mod long_gaps;
mod looks;
mod memberships;
mod notary;
mod own_events;
mod redactions;
mod schedules;
mod shared;
mod transactions;
mod unreadable;
pub mod world;
