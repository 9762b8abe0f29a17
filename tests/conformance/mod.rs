//! The conformance suite: isthmus passes it in both roles, and each check fails for a server that does the one thing wrong that
//! it looks for.

mod command;
mod each_check_can_fail;
mod faulty;
mod isthmus_passes;
mod nobody_there;
mod table;
mod tls;
mod world;
