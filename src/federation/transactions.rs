//! Transaction IDs of other servers: a used one gets its first answer, across restarts, and its body is processed once.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use moka::future::Cache;
use ruma::ServerName;
use serde_json::Value;
use tokio::sync::OwnedMutexGuard;

use crate::admin::metrics::CacheMeter;
use crate::clock::SharedClock;
use crate::refusal::Refusal;
use crate::store::transactions::{self, TransactionKey};
use crate::store::{Effect, Store};

/// For how long answers are kept: a day, and some time for clocks that disagree.
const KEPT_MS: i64 = 26 * 3_600_000;
const KEPT: Duration = Duration::from_secs(26 * 3600);
/// How often old answers are looked for.
const PRUNE_EVERY_MS: i64 = 60_000;
/// How many answers are kept in memory.
const CACHED: u64 = 10_000;
/// How many transactions are known again in memory alone.
const REMEMBERED: u64 = 20_000;
/// How long a transaction ID may be.
const MAX_TXN_ID: usize = 255;

/// Answers to transactions, kept for at least a day; clones share them.
#[derive(Clone)]
pub struct Transactions {
    inner: Arc<Inner>,
}

struct Inner {
    store: Store,
    clock: SharedClock,
    answers: Cache<TransactionKey, Arc<Value>>,
    /// Answers that say nothing of any event: not in the store.
    remembered: Cache<TransactionKey, Arc<Value>>,
    answers_meter: CacheMeter,
    in_process: Mutex<HashMap<TransactionKey, InProcess>>,
    pruned_at: AtomicI64,
}

/// The requests with one transaction ID that are here now.
#[derive(Default)]
struct InProcess {
    turn: Arc<tokio::sync::Mutex<()>>,
    places: usize,
}

/// What is to be done with a transaction.
pub enum Begun {
    /// Nothing: this was its answer.
    Answered(Value),
    /// It is to be processed. Requests with the same ID wait until this is finished or dropped.
    Process(Processing),
}

/// A transaction that is being processed. Dropped without an answer, the next request with its ID is processed.
#[must_use]
pub struct Processing {
    transactions: Transactions,
    place: Place,
    _turn: OwnedMutexGuard<()>,
}

impl Transactions {
    /// The transactions in this store.
    pub fn new(store: Store, clock: SharedClock) -> Self {
        let answers = Cache::new(CACHED);
        let inner = Inner {
            store,
            clock,
            answers_meter: CacheMeter::watch("transactions", &answers),
            answers,
            remembered: Cache::builder().max_capacity(REMEMBERED).time_to_live(KEPT).build(),
            in_process: Mutex::default(),
            pruned_at: AtomicI64::new(0),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Begins a transaction: it was answered before, also while this waited for another request with the same ID, or it
    /// is now the caller's to process.
    pub async fn begin(&self, origin: &ServerName, endpoint: &str, txn_id: &str) -> Result<Begun, Refusal> {
        if txn_id.len() > MAX_TXN_ID {
            let problem = format!("{} bytes long, the limit is {MAX_TXN_ID}", txn_id.len());
            return Err(Refusal::malformed("transaction ID", problem));
        }
        let key =
            TransactionKey { origin: origin.to_string(), endpoint: endpoint.to_owned(), txn_id: txn_id.to_owned() };
        let place = Place::take(&self.inner, key);
        let turn = place.turn.clone().lock_owned().await;
        if let Some(answer) = self.answer(&place.key).await? {
            return Ok(Begun::Answered(Value::clone(&answer)));
        }
        Ok(Begun::Process(Processing { transactions: self.clone(), place, _turn: turn }))
    }

    async fn answer(&self, key: &TransactionKey) -> Result<Option<Arc<Value>>, Refusal> {
        if let Some(answer) = self.inner.answers_meter.count(self.inner.answers.get(key).await) {
            return Ok(Some(answer));
        }
        if let Some(answer) = self.inner.remembered.get(key).await {
            return Ok(Some(answer));
        }
        let Some(stored) = transactions::answer(&self.inner.store, key).await? else { return Ok(None) };
        let answer: Value = serde_json::from_slice(&stored).map_err(|error| Refusal::Internal(error.to_string()))?;
        let answer = Arc::new(answer);
        self.inner.answers.insert(key.clone(), answer.clone()).await;
        Ok(Some(answer))
    }
}

impl Processing {
    /// The write that records the answer, for whoever can put it into the transaction of what was accepted.
    pub fn record(&self, answer: &Value) -> Effect {
        let inner = &self.transactions.inner;
        let (key, answer, now) = (self.place.key.clone(), answer.to_string().into_bytes(), inner.clock.now_ms());
        let due = now.saturating_sub(inner.pruned_at.load(Ordering::Relaxed)) >= PRUNE_EVERY_MS;
        if due {
            inner.pruned_at.store(now, Ordering::Relaxed);
        }
        Box::new(move |tx| {
            Box::pin(async move {
                transactions::record(tx, &key, &answer, now).await?;
                if due {
                    transactions::prune(tx, now.saturating_sub(KEPT_MS)).await?;
                }
                Ok(())
            })
        })
    }

    /// Keeps an answer that says nothing of any event in memory alone: forgotten at a restart, or for many newer ones, its transaction
    /// is processed when it comes again.
    pub async fn remember(self, answer: Value) -> Value {
        self.transactions.inner.remembered.insert(self.place.key.clone(), Arc::new(answer.clone())).await;
        answer
    }

    /// Records the answer; after this the transaction is answered for good.
    pub async fn finish(self, answer: Value) -> Result<Value, Refusal> {
        let inner = &self.transactions.inner;
        inner.store.write(self.record(&answer)).await?;
        inner.answers.insert(self.place.key.clone(), Arc::new(answer.clone())).await;
        Ok(answer)
    }
}

/// A place among the requests with the same transaction ID; with the last one the transaction is forgotten here.
struct Place {
    inner: Arc<Inner>,
    key: TransactionKey,
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl Place {
    fn take(inner: &Arc<Inner>, key: TransactionKey) -> Self {
        let mut in_process = lock(&inner.in_process);
        let entry = in_process.entry(key.clone()).or_default();
        entry.places = entry.places.saturating_add(1);
        Self { inner: inner.clone(), key, turn: entry.turn.clone() }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut in_process = lock(&self.inner.in_process);
        if let Some(entry) = in_process.get_mut(&self.key) {
            entry.places = entry.places.saturating_sub(1);
            if entry.places == 0 {
                in_process.remove(&self.key);
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is inside is whole between any two statements, so a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use ruma::server_name;
    use serde_json::json;

    use super::*;
    use crate::clock::ManualClock;

    async fn open(directory: &tempfile::TempDir) -> Store {
        Store::open(&format!("sqlite://{}", directory.path().join("t.db").display())).await.unwrap()
    }

    async fn begin(transactions: &Transactions, txn_id: &str) -> Begun {
        transactions.begin(server_name!("a.example"), "v1/send", txn_id).await.unwrap()
    }

    #[tokio::test]
    async fn hc_35_a_used_id_gets_its_first_answer_after_a_restart_too() {
        let directory = tempfile::tempdir().unwrap();
        let store = open(&directory).await;
        let clock = ManualClock::new(1_000_000_000);
        let transactions = Transactions::new(store.clone(), clock.clone());
        let odd = "a/b\u{0}\u{1}c";
        for txn_id in ["1", odd] {
            let Begun::Process(processing) = begin(&transactions, txn_id).await else { panic!("processed already") };
            processing.finish(json!({ "failed_pdus": { txn_id: { "error": "no" } } })).await.unwrap();
        }
        store.close().await;

        let store = open(&directory).await;
        let transactions = Transactions::new(store.clone(), clock.clone());
        for txn_id in ["1", odd] {
            let Begun::Answered(answer) = begin(&transactions, txn_id).await else { panic!("forgotten") };
            assert_eq!(answer["failed_pdus"][txn_id]["error"], "no");
        }
        // Another endpoint, or another server, has other transactions.
        for (origin, endpoint) in [("a.example", "v2/send"), ("b.example", "v1/send")] {
            let begun = transactions.begin(origin.try_into().unwrap(), endpoint, "1").await.unwrap();
            assert!(matches!(begun, Begun::Process(_)));
        }
        let too_long = transactions.begin(server_name!("a.example"), "v1/send", &"x".repeat(256)).await;
        assert!(too_long.is_err());
    }

    #[tokio::test]
    async fn answers_are_kept_for_a_day_and_not_for_ever() {
        let directory = tempfile::tempdir().unwrap();
        let store = open(&directory).await;
        let clock = ManualClock::new(1_000_000_000);
        let answer = async |txn_id: &str| {
            // A new object has an empty cache.
            match begin(&Transactions::new(store.clone(), clock.clone()), txn_id).await {
                Begun::Answered(_) => true,
                Begun::Process(processing) => {
                    processing.finish(json!({})).await.unwrap();
                    false
                }
            }
        };
        assert!(!answer("1").await);
        clock.advance(24 * 3_600_000);
        assert!(!answer("2").await);
        assert!(answer("1").await);
        clock.advance(3 * 3_600_000);
        assert!(!answer("3").await);
        assert!(answer("2").await);
        assert!(!answer("1").await);
    }

    #[tokio::test]
    async fn hc_61_the_same_transaction_at_the_same_time_is_processed_once() {
        let directory = tempfile::tempdir().unwrap();
        let transactions = Transactions::new(open(&directory).await, ManualClock::new(1));
        let Begun::Process(first) = begin(&transactions, "1").await else { panic!("processed already") };
        let waiting: Vec<_> = (0..5)
            .map(|_| {
                let transactions = transactions.clone();
                tokio::spawn(async move { begin(&transactions, "1").await })
            })
            .collect();
        tokio::task::yield_now().await;
        assert!(waiting.iter().all(|task| !task.is_finished()));
        // Another ID does not wait.
        assert!(matches!(begin(&transactions, "2").await, Begun::Process(_)));
        first.finish(json!({ "n": 1 })).await.unwrap();
        for task in waiting {
            let Begun::Answered(answer) = task.await.unwrap() else { panic!("processed twice") };
            assert_eq!(answer, json!({ "n": 1 }));
        }
        assert!(lock(&transactions.inner.in_process).is_empty());
    }

    #[tokio::test]
    async fn a_transaction_that_was_given_up_is_processed_by_the_next() {
        let directory = tempfile::tempdir().unwrap();
        let transactions = Transactions::new(open(&directory).await, ManualClock::new(1));
        let Begun::Process(first) = begin(&transactions, "1").await else { panic!("processed already") };
        let again = {
            let transactions = transactions.clone();
            tokio::spawn(async move { matches!(begin(&transactions, "1").await, Begun::Process(_)) })
        };
        tokio::task::yield_now().await;
        drop(first);
        assert!(again.await.unwrap());
        assert!(lock(&transactions.inner.in_process).is_empty());
    }
}
