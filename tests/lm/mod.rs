//! The linear side: hubs and participants that talk to each other over loopback HTTP, and what misbehaves there.

mod edus;
mod holes;
mod hostile_hub;
mod hostile_participant;
mod http;
mod hub_and_participant;
pub mod log_hub;
mod own_events;
mod schedules;
mod unreadable;
pub mod world;
