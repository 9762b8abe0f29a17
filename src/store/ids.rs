//! Numbers that grow for ever, across restarts too: taken from the database in blocks, so that handing one out costs nothing.

use std::sync::atomic::{AtomicI64, Ordering};

use sqlx::AnyConnection;

use super::StoreError;

/// How many numbers are reserved at once. What is left of a block at a restart is skipped.
const BLOCK: i64 = 1 << 20;
/// A new block is reserved before a transaction when fewer numbers than this are left; far more than one group can use.
const LOW: i64 = 1 << 18;

#[derive(Default)]
pub(super) struct Ids {
    next: AtomicI64,
    end: AtomicI64,
}

impl Ids {
    /// The next number.
    pub(super) fn next(&self) -> i64 {
        self.next.fetch_add(1, Ordering::SeqCst)
    }

    /// Makes sure, outside any transaction that could be rolled back, that enough numbers are reserved.
    pub(super) async fn reserve(&self, connection: &mut AnyConnection) -> Result<(), StoreError> {
        let left = self.end.load(Ordering::SeqCst) - self.next.load(Ordering::SeqCst);
        if left >= LOW {
            return Ok(());
        }
        let (end,): (i64,) = sqlx::query_as("UPDATE sequence SET value = value + $1 WHERE name = 'id' RETURNING value")
            .bind(BLOCK)
            .fetch_one(connection)
            .await?;
        // Only this process takes blocks, so a following block joins on to the one before it.
        if self.end.swap(end, Ordering::SeqCst) != end - BLOCK {
            self.next.store(end - BLOCK, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Whether nobody has taken numbers since this process did. Where the fate of its own last block is not known it may say
    /// that somebody has.
    pub(super) async fn are_the_last(&self, connection: &mut AnyConnection) -> Result<bool, StoreError> {
        let (end,): (i64,) =
            sqlx::query_as("SELECT value FROM sequence WHERE name = 'id'").fetch_one(connection).await?;
        Ok(end == self.end.load(Ordering::SeqCst))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Store;
    use super::super::testing::both_databases;
    use super::BLOCK;

    #[tokio::test]
    async fn ids_grow_across_restarts() {
        both_databases(|url| async move {
            let mut last = 0;
            for _ in 0..3 {
                let store = Store::open(&url).await.unwrap();
                for _ in 0..10 {
                    let id = store.next_id();
                    assert!(id > last, "{id} after {last}");
                    last = id;
                }
                store.close().await;
            }
        })
        .await;
    }

    #[tokio::test]
    async fn ids_go_on_from_block_to_block_and_grow_after_a_restart_in_the_middle() {
        both_databases(|url| async move {
            let store = Store::open(&url).await.unwrap();
            let first = store.next_id();
            // Every write makes sure that enough are left, so a block can be used up between two of them.
            for _ in 0..3 {
                store.ids.next.fetch_add(BLOCK - BLOCK / 8, std::sync::atomic::Ordering::SeqCst);
                store.write(|_| Box::pin(async { Ok(()) })).await.unwrap();
                assert!(store.ids.next.load(std::sync::atomic::Ordering::SeqCst) > first);
                let left = store.ids.end.load(std::sync::atomic::Ordering::SeqCst) - store.next_id();
                assert!(left > 0, "handed out {left} more than were reserved");
            }
            let last = store.next_id();
            assert!(last > first + 2 * BLOCK);
            store.close().await;
            let again = Store::open(&url).await.unwrap();
            assert!(again.next_id() > last);
            again.close().await;
        })
        .await;
    }
}
