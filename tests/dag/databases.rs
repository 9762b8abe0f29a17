//! Tests that run on SQLite and on PostgreSQL.

#[path = "../../testbed/postgres.rs"]
mod postgres;
#[path = "../../testbed/stores.rs"]
mod stores;

use isthmus::store::Store;

// What starts PostgreSQL finds this beside it.
use crate::support::testbed::process;

pub use self::stores::both_stores;
