//! Stores for this crate's own tests: [`both_stores`] runs a test on SQLite and on PostgreSQL. The files live in `testbed/`,
//! which the integration tests and the demo include too.
#![allow(dead_code, missing_docs, clippy::expect_used, clippy::panic)]

#[path = "../../testbed/packages.rs"]
mod packages;
#[path = "../../testbed/postgres.rs"]
mod postgres;
#[path = "../../testbed/process.rs"]
mod process;
#[path = "../../testbed/stores.rs"]
mod stores;

use super::Store;

pub(crate) use self::stores::{both_databases, both_stores};
