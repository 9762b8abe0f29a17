//! Tests that run on SQLite and on PostgreSQL.

#[path = "../../testbed/stores.rs"]
mod stores;

use isthmus::store::Store;

pub use self::stores::{both_databases, both_stores};
// What runs the tests finds this beside it.
use crate::support::testbed::postgres;
