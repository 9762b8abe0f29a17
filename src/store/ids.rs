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
}
