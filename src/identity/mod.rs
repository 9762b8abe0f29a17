//! Server names, ghost names, signing keys, and the keys of other servers.

mod ghost;
mod keyring;
mod media_names;
mod server_keys;
mod signing_key;

pub use self::ghost::{Ghost, GhostNames, Side};
pub use self::keyring::{KeyFetcher, KeyQuery, Keyring, KeyringError, Trust};
pub use self::media_names::{MediaNames, Medium};
pub use self::server_keys::{ServerKeys, Validity};
pub use self::signing_key::{SigningKey, SigningKeyError};
