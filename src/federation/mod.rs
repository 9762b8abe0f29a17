//! What both sides share of federation: discovery, the dialler, X-Matrix, the HTTP client, outbound queues, limits.

mod answers;
mod asked;
mod askers;
mod client;
mod connector;
mod context;
mod dialler;
mod discovery;
mod download;
mod large;
mod limits;
#[cfg(test)]
mod loopback_tests;
mod outbound;
mod pace;
mod peer_address;
mod probe;
mod rates;
mod srv;
mod transactions;
mod well_known;
mod x_matrix;

pub use self::answers::HeldAnswer;
pub use self::asked::{Asked, Asking};
pub use self::askers::{Asker, Askers};
pub use self::client::{Call, Client, ClientOptions, RemoteError};
pub use self::context::Context;
#[cfg(test)]
pub(crate) use self::context::KeysOf;
pub use self::dialler::crypto_provider;
pub use self::download::{Bytewise, Opened};
pub use self::large::Large;
pub use self::limits::{ByteBudget, Counted, Held, LineLimits, Lines, Reserved, Shares, Turn, Underway};
pub use self::outbound::{Delivery, Feed, FeedKind, FeedSource, HeldFeed, OutboundQueues, QueueStatus};
pub use self::pace::Pace;
pub use self::peer_address::peer_address;
pub use self::probe::{Probe, ProbeAnswer, TlsFacts};
pub use self::rates::{Rate, Rates};
pub use self::transactions::{Begun, Processing, Transactions};
pub use self::x_matrix::{Authenticated, Claimed, Claims, authenticate, authorization_header};
