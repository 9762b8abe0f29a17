//! Tests of the store, each run on both databases. The module that includes this file brings `Store` into scope, since the
//! crate's own tests and the integration tests call it by different names.

use std::future::Future;

use anyhow::Context as _;

use super::{Store, postgres};

/// Runs `test` with a fresh store on SQLite, then on PostgreSQL.
pub async fn both_stores<F, Fut>(test: F)
where
    F: Fn(Store) -> Fut,
    Fut: Future<Output = ()>,
{
    let test = &test;
    both_databases(|url| async move {
        let store = Store::open(&url).await.expect("a fresh store opens");
        test(store.clone()).await;
        store.close().await;
    })
    .await;
}

/// Runs `test` with the URL of an empty database of each kind: for tests that open a store more than once.
pub async fn both_databases<F, Fut>(test: F)
where
    F: Fn(String) -> Fut,
    Fut: Future<Output = ()>,
{
    // Shown only when the test fails.
    eprintln!("on SQLite");
    let directory = tempfile::tempdir().expect("a temporary directory");
    test(format!("sqlite://{}", directory.path().join("isthmus.db").display())).await;

    let Some(postgres) = postgres::shared().unwrap_or_else(|error| panic!("{error}")) else { return };
    eprintln!("on PostgreSQL");
    let url = postgres.create_database().await.context("creating a database").expect("PostgreSQL");
    test(url.clone()).await;
    postgres.drop_database(&url).await.expect("PostgreSQL");
}
