//! What health and metrics show of the store.

use super::{Store, StoreError};

/// How much of the bridge waits, and how many portals there are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overview {
    /// Accepted events that wait to be carried over.
    pub inbox_waiting: i64,
    /// When the oldest of them was accepted, in milliseconds.
    pub inbox_oldest_ts: Option<i64>,
    /// How many portals are in each state.
    pub portals: Vec<(String, i64)>,
}

/// Reads it; that it can be read shows that the store is there.
pub async fn overview(store: &Store) -> Result<Overview, StoreError> {
    let (inbox_waiting, inbox_oldest_ts): (i64, Option<i64>) =
        sqlx::query_as("SELECT COUNT(*), MIN(received_ts) FROM bridge_inbox").fetch_one(store.reader()).await?;
    let portals = sqlx::query_as("SELECT state, COUNT(*) FROM bridge_portals GROUP BY state ORDER BY COUNT(*) DESC")
        .fetch_all(store.reader())
        .await?;
    Ok(Overview { inbox_waiting, inbox_oldest_ts, portals })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::testing::both_stores;

    #[tokio::test]
    async fn an_empty_store_has_nothing_waiting() {
        both_stores(|store| async move {
            assert_eq!(overview(&store).await.unwrap(), Overview::default());
        })
        .await;
    }
}
