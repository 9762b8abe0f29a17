//! Portals in one process: a gateway, an LM server and a Matrix homeserver that lives in the test, over loopback HTTP.

mod budgets;
mod clock;
mod created;
mod direct;
mod direct_to_matrix;
mod doors;
mod edus;
mod encrypted;
mod ends;
mod explain;
mod faults;
mod from_lm;
mod from_matrix;
mod hostile;
mod hub_transfer;
mod invites;
mod knocks;
mod lies;
mod loops;
mod mapping;
mod media;
mod pins;
mod poison;
mod random;
mod shared;
mod world;
