//! Tests that run on SQLite and on PostgreSQL.

#[path = "../../testbed/postgres.rs"]
mod postgres;
#[path = "../../testbed/process.rs"]
mod process;
#[path = "../../testbed/stores.rs"]
mod stores;

use isthmus::store::Store;

pub use self::stores::both_stores;
