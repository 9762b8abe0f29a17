//! The composition root: builds the rooms of the house, gives each what it needs, and puts the listeners in front of them.

mod routes;
mod signed;
mod transaction;

pub use self::routes::{Federation, federation_routes};
