//! Transaction IDs of other servers: a used one gets its first answer, across restarts, and its body is processed once.

use ruma::ServerName;
use serde_json::Value;

use crate::refusal::Refusal;
use crate::store::{Effect, Store};

/// Answers to transactions, kept for at least a day.
#[derive(Clone)]
pub struct Transactions {
    _store: Store,
}

impl Transactions {
    /// The transactions in this store.
    pub fn new(store: Store) -> Self {
        Self { _store: store }
    }

    /// The answer to a transaction that was processed before. While the same transaction is being processed by another
    /// request, waits for that.
    pub async fn answered(
        &self,
        _origin: &ServerName,
        _endpoint: &str,
        _txn_id: &str,
    ) -> Result<Option<Value>, Refusal> {
        unimplemented!()
    }

    /// The write that records an answer, to go into the transaction of what was accepted.
    pub fn record(&self, _origin: &ServerName, _endpoint: &str, _txn_id: &str, _answer: &Value) -> Effect {
        unimplemented!()
    }
}
