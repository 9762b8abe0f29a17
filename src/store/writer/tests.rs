//! The writer with jobs that fail, and with databases that do.

use std::time::Duration;

use sqlx::Row as _;
use tokio::sync::oneshot;

use crate::store::testing::{both_databases, both_stores};
use crate::store::{Store, StoreError, Tx, TxFuture};

async fn table(store: &Store) {
    store
        .write(|tx| {
            Box::pin(async move {
                sqlx::query("CREATE TABLE thing (id BIGINT NOT NULL PRIMARY KEY)").execute(tx).await?;
                Ok(())
            })
        })
        .await
        .unwrap();
}

async fn insert(tx: &mut Tx, id: i64) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO thing (id) VALUES ($1)").bind(id).execute(tx).await?;
    Ok(())
}

async fn things(store: &Store) -> Vec<i64> {
    let rows = sqlx::query("SELECT id FROM thing ORDER BY id").fetch_all(store.reader()).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// Keeps the writer busy until the sender is used, so that what is submitted meanwhile shares a transaction.
async fn hold(store: &Store) -> (oneshot::Sender<()>, tokio::task::JoinHandle<Result<(), StoreError>>) {
    let (started, has_started) = oneshot::channel();
    let (release, released) = oneshot::channel::<()>();
    let store = store.clone();
    let job = tokio::spawn(async move {
        store
            .write(|_| {
                Box::pin(async move {
                    let _ = started.send(());
                    let _ = released.await;
                    Ok(())
                })
            })
            .await
    });
    has_started.await.unwrap();
    (release, job)
}

/// Submits a job to a writer that is held and returns after it is queued; jobs run in the order of their submission.
async fn submit<F>(store: &Store, job: F) -> tokio::task::JoinHandle<Result<(), StoreError>>
where
    F: for<'c> FnOnce(&'c mut Tx) -> TxFuture<'c, ()> + Send + 'static,
{
    let queued = store.writer.jobs.capacity();
    let task = tokio::spawn({
        let store = store.clone();
        async move { store.write(job).await }
    });
    while store.writer.jobs.capacity() == queued {
        tokio::task::yield_now().await;
    }
    task
}

#[tokio::test]
async fn a_failing_and_a_panicking_job_fail_alone() {
    both_stores(|store| async move {
        table(&store).await;
        let (release, holder) = hold(&store).await;
        let first = submit(&store, |tx| Box::pin(insert(tx, 1))).await;
        let failing = submit(&store, |tx| {
            Box::pin(async move {
                insert(tx, 2).await?;
                insert(tx, 2).await
            })
        })
        .await;
        let panicking = submit(&store, |tx| {
            Box::pin(async move {
                insert(tx, 3).await?;
                panic!("on purpose")
            })
        })
        .await;
        let last = submit(&store, |tx| Box::pin(insert(tx, 4))).await;
        release.send(()).unwrap();
        holder.await.unwrap().unwrap();
        first.await.unwrap().unwrap();
        assert!(matches!(failing.await.unwrap(), Err(StoreError::Database(_))));
        assert!(matches!(panicking.await.unwrap(), Err(StoreError::Panicked)));
        last.await.unwrap().unwrap();
        assert_eq!(things(&store).await, [1, 4]);
    })
    .await;
}

#[tokio::test]
async fn inv_6_nothing_is_called_written_that_is_not() {
    both_stores(|store| async move {
        table(&store).await;
        let told = store.write(|tx| {
            Box::pin(async move {
                insert(tx, 1).await?;
                // What a job should not do.
                let _ = insert(tx, 1).await;
                Ok(())
            })
        });
        let told = told.await;
        assert_eq!(told.is_ok(), things(&store).await == [1], "{told:?}");
        store.write(|tx| Box::pin(insert(tx, 2))).await.unwrap();
        assert!(things(&store).await.contains(&2));
    })
    .await;
}

#[tokio::test]
async fn inv_6_a_job_is_answered_only_after_its_group_is_committed() {
    both_databases(|url| async move {
        let store = Store::open(&url).await.unwrap();
        table(&store).await;
        let (release, holder) = hold(&store).await;
        let mut first = submit(&store, |tx| Box::pin(insert(tx, 1))).await;
        let (reached, has_reached) = oneshot::channel();
        let (go_on, may_go_on) = oneshot::channel::<()>();
        let second = submit(&store, |tx| {
            Box::pin(async move {
                let _ = reached.send(());
                let _ = may_go_on.await;
                insert(tx, 2).await
            })
        })
        .await;
        release.send(()).unwrap();
        holder.await.unwrap().unwrap();
        has_reached.await.unwrap();
        // The first job's part is done, the transaction is still open.
        tokio::time::timeout(Duration::from_millis(50), &mut first).await.expect_err("answered before the commit");
        assert_eq!(things(&store).await, [0_i64; 0]);
        go_on.send(()).unwrap();
        first.await.unwrap().unwrap();
        // Whoever opens the database now finds it, also if this process died at once.
        let other = Store::open(&url).await.unwrap();
        assert_eq!(things(&other).await, [1, 2]);
        second.await.unwrap().unwrap();
        other.close().await;
        store.close().await;
    })
    .await;
}

#[tokio::test]
async fn a_transaction_that_does_not_end_is_given_up_and_seen_meanwhile() {
    both_databases(|url| async move {
        let store = Store::open_with(&url, Duration::from_secs(2)).await.unwrap();
        table(&store).await;
        assert_eq!(store.write_lasts(), Duration::ZERO);
        let (_release, stuck) = hold(&store).await;
        assert!(store.write_lasts() > Duration::ZERO);
        let behind = submit(&store, |tx| Box::pin(insert(tx, 1))).await;
        assert!(matches!(stuck.await.unwrap(), Err(StoreError::Silent(_))));
        behind.await.unwrap().unwrap();
        assert_eq!(things(&store).await, [1]);
        store.close().await;
    })
    .await;
}

#[tokio::test]
async fn a_commit_that_fails_fails_its_whole_group_and_nothing_after_it() {
    both_stores(|store| async move {
        table(&store).await;
        store
            .write(|tx| {
                Box::pin(async move {
                    let sql = "CREATE TABLE part (thing BIGINT NOT NULL REFERENCES thing (id) \
                               DEFERRABLE INITIALLY DEFERRED)";
                    sqlx::query(sql).execute(tx).await?;
                    Ok(())
                })
            })
            .await
            .unwrap();
        let (release, holder) = hold(&store).await;
        let innocent = submit(&store, |tx| Box::pin(insert(tx, 1))).await;
        let orphan = submit(&store, |tx| {
            Box::pin(async move {
                sqlx::query("INSERT INTO part (thing) VALUES (99)").execute(tx).await?;
                Ok(())
            })
        })
        .await;
        release.send(()).unwrap();
        holder.await.unwrap().unwrap();
        assert!(matches!(innocent.await.unwrap(), Err(StoreError::Database(_))));
        assert!(matches!(orphan.await.unwrap(), Err(StoreError::Database(_))));
        assert_eq!(things(&store).await, [0_i64; 0]);

        store.write(|tx| Box::pin(insert(tx, 2))).await.unwrap();
        assert_eq!(things(&store).await, [2]);
    })
    .await;
}

#[tokio::test]
async fn close_waits_for_what_was_submitted_and_refuses_what_comes_after() {
    both_databases(|url| async move {
        let store = Store::open(&url).await.unwrap();
        table(&store).await;
        let (release, holder) = hold(&store).await;
        let last = submit(&store, |tx| Box::pin(insert(tx, 1))).await;
        let closing = tokio::spawn({
            let store = store.clone();
            async move { store.close().await }
        });
        release.send(()).unwrap();
        closing.await.unwrap();
        holder.await.unwrap().unwrap();
        last.await.unwrap().unwrap();
        assert!(matches!(store.write(|tx| Box::pin(insert(tx, 2))).await, Err(StoreError::Closed)));

        let again = Store::open(&url).await.unwrap();
        assert_eq!(things(&again).await, [1]);
        again.close().await;
    })
    .await;
}

/// Writes more than fits where nothing may grow.
fn big(id: i64) -> impl for<'c> FnOnce(&'c mut Tx) -> TxFuture<'c, ()> + Send + 'static {
    move |tx| {
        Box::pin(async move {
            insert(tx, id).await?;
            sqlx::query("CREATE TABLE IF NOT EXISTS big (text TEXT)").execute(&mut *tx).await?;
            sqlx::query("INSERT INTO big (text) VALUES ($1)").bind("x".repeat(4 << 20)).execute(tx).await?;
            Ok(())
        })
    }
}

/// A disk that is full fails what does not fit, whoever it shares a transaction with, and nothing that failed is there.
#[tokio::test]
async fn inv_6_hc_82_on_a_full_disk_nothing_is_called_written_that_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&format!("sqlite://{}/test.db", directory.path().display())).await.unwrap();
    table(&store).await;
    for alone in [true, false] {
        let (release, holder) = hold(&store).await;
        let full = submit(&store, |tx| {
            Box::pin(async move {
                sqlx::query("PRAGMA max_page_count = 1").execute(tx).await?;
                Ok(())
            })
        })
        .await;
        if alone {
            release.send(()).unwrap();
            holder.await.unwrap().unwrap();
            full.await.unwrap().unwrap();
            let refused = store.write(big(10)).await;
            assert!(matches!(&refused, Err(error) if error.is_of_the_database()), "{refused:?}");
            assert_eq!(things(&store).await, [] as [i64; 0]);
            assert!(store.writer.failed().is_some());
            continue;
        }
        let jobs = [submit(&store, |tx| Box::pin(insert(tx, 1))).await, submit(&store, big(11)).await];
        let last = submit(&store, |tx| Box::pin(insert(tx, 2))).await;
        release.send(()).unwrap();
        holder.await.unwrap().ok();
        full.await.unwrap().ok();
        let mut told = Vec::new();
        for (id, job) in [1, 11, 2].into_iter().zip(jobs.into_iter().chain([last])) {
            if job.await.unwrap().is_ok() {
                told.push(id);
            }
        }
        assert!(!told.contains(&11));
        assert_eq!(things(&store).await, told);
    }
    // When there is space again all goes on.
    let space = store.write(|tx| {
        Box::pin(async move {
            sqlx::query("PRAGMA max_page_count = 1000000").execute(tx).await?;
            Ok(())
        })
    });
    space.await.unwrap();
    store.write(big(20)).await.unwrap();
    assert!(things(&store).await.contains(&20));
}
