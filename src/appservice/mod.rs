//! The appservice: the control plane between the gateway and its Synapse. Bridged events never come from here; what does is
//! the aliases in the Synapse's own namespace, third-party look-ups, and the bot's direct chats.

mod homeserver;
mod registration;
mod token;

pub use self::homeserver::{Homeserver, HomeserverError};
pub use self::registration::{Registered, Registration, RegistrationError, own_url, register};
pub use self::token::{Bearer, Token};
