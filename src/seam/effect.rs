//! What is written in the same transaction as events. Effects of several events that belong together are written together,
//! so that what hangs on a batch costs a few statements and not a few for each event.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use futures::FutureExt as _;
use ruma::OwnedEventId;
use sqlx::Executor as _;

use crate::store::{StoreError, Tx, TxFuture};

/// What is written with some events.
#[async_trait]
pub trait Effects: Send + Sync {
    /// Writes it for these of them: which they are, and what their IDs came to be (as a participant of an LM room: the
    /// LPDU's ID). May be asked again after what it has written was taken back.
    async fn write(&self, tx: &mut Tx, events: &[(usize, OwnedEventId)]) -> Result<(), StoreError>;
}

/// What is written in the same transaction as one event.
#[derive(Clone)]
pub struct EventEffect {
    effects: Arc<dyn Effects>,
    index: usize,
}

type Work = Box<dyn for<'c> FnOnce(&'c mut Tx, OwnedEventId) -> TxFuture<'c, ()> + Send>;

/// One event's own.
struct Once(Mutex<Option<Work>>);

#[async_trait]
impl Effects for Once {
    async fn write(&self, tx: &mut Tx, events: &[(usize, OwnedEventId)]) -> Result<(), StoreError> {
        for (_, event_id) in events {
            let work = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
            let work = work.ok_or(StoreError::Withdrawn("what was to be written with an event is gone"))?;
            work(tx, event_id.clone()).await?;
        }
        Ok(())
    }
}

impl EventEffect {
    /// What is written with one event.
    pub fn new(work: impl for<'c> FnOnce(&'c mut Tx, OwnedEventId) -> TxFuture<'c, ()> + Send + 'static) -> Self {
        Self { effects: Arc::new(Once(Mutex::new(Some(Box::new(work))))), index: 0 }
    }

    /// What is written with each of `count` events, in their order.
    pub fn together(effects: Arc<dyn Effects>, count: usize) -> impl Iterator<Item = Self> {
        (0..count).map(move |index| Self { effects: effects.clone(), index })
    }

    fn goes_with(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.effects, &other.effects)
    }
}

/// The effects of events, in the order of the events.
pub type EffectsOf = Vec<(EventEffect, OwnedEventId)>;

/// Writes all effects, or fails.
pub async fn write_effects(tx: &mut Tx, effects: &[(EventEffect, OwnedEventId)]) -> Result<(), StoreError> {
    for group in groups(effects) {
        write(tx, group).await?;
    }
    Ok(())
}

/// Writes the effects up to the first that fails, of which nothing stays; says how many were written, and what failed.
pub async fn write_effects_until_one_fails(
    tx: &mut Tx,
    effects: &[(EventEffect, OwnedEventId)],
) -> Result<(usize, Option<StoreError>), StoreError> {
    let mut written = 0_usize;
    for group in groups(effects) {
        let Some(failure) = attempt(tx, group).await? else {
            written = written.saturating_add(group.len());
            continue;
        };
        if group.len() == 1 {
            return Ok((written, Some(failure)));
        }
        // Which of them it was.
        for single in group.chunks(1) {
            if let Some(failure) = attempt(tx, single).await? {
                return Ok((written, Some(failure)));
            }
            written = written.saturating_add(1);
        }
    }
    Ok((written, None))
}

/// Writes effects that belong together, or nothing: then what failed. One that panics has failed, too: it would panic again
/// whenever its batch is tried again, and all that share the batch with it would never be written.
async fn attempt(tx: &mut Tx, group: &[(EventEffect, OwnedEventId)]) -> Result<Option<StoreError>, StoreError> {
    tx.execute("SAVEPOINT effect").await?;
    let written = AssertUnwindSafe(write(tx, group)).catch_unwind().await;
    let failure = written.unwrap_or(Err(StoreError::Panicked)).err();
    if failure.is_some() {
        tx.execute("ROLLBACK TO SAVEPOINT effect").await?;
    }
    tx.execute("RELEASE SAVEPOINT effect").await?;
    Ok(failure)
}

async fn write(tx: &mut Tx, group: &[(EventEffect, OwnedEventId)]) -> Result<(), StoreError> {
    let Some((first, _)) = group.first() else { return Ok(()) };
    let events: Vec<_> = group.iter().map(|(effect, event_id)| (effect.index, event_id.clone())).collect();
    first.effects.write(tx, &events).await
}

fn groups(effects: &[(EventEffect, OwnedEventId)]) -> impl Iterator<Item = &[(EventEffect, OwnedEventId)]> {
    effects.chunk_by(|(one, _), (other, _)| one.goes_with(other))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::testing::both_stores;
    use crate::store::{Store, StoreError};

    /// Notes how it is asked, and refuses one of its events.
    struct Noting {
        asked: Mutex<Vec<Vec<usize>>>,
        refuses: Option<usize>,
        panics: bool,
    }

    #[async_trait]
    impl Effects for Noting {
        async fn write(&self, tx: &mut Tx, events: &[(usize, OwnedEventId)]) -> Result<(), StoreError> {
            let indexes: Vec<usize> = events.iter().map(|(index, _)| *index).collect();
            self.asked.lock().unwrap().push(indexes.clone());
            for (index, event_id) in events {
                sqlx::query("INSERT INTO sequence (name, value) VALUES ($1, $2)")
                    .bind(event_id.as_str())
                    .bind(i64::try_from(*index).unwrap())
                    .execute(&mut *tx)
                    .await?;
            }
            match self.refuses.filter(|refused| indexes.contains(refused)) {
                Some(_) if self.panics => panic!("on purpose"),
                Some(_) => Err(StoreError::Withdrawn("meant to fail")),
                None => Ok(()),
            }
        }
    }

    fn noting(refuses: Option<usize>) -> Arc<Noting> {
        Arc::new(Noting { asked: Mutex::default(), refuses, panics: false })
    }

    fn of(effects: &Arc<Noting>, ids: &[&str]) -> EffectsOf {
        let ids = ids.iter().map(|id| OwnedEventId::try_from(*id).unwrap());
        EventEffect::together(effects.clone(), ids.len()).zip(ids).collect()
    }

    async fn written(store: &Store) -> Vec<String> {
        let sql = "SELECT name FROM sequence WHERE name LIKE '$%' ORDER BY value";
        let rows: Vec<(String,)> = sqlx::query_as(sql).fetch_all(store.reader()).await.unwrap();
        rows.into_iter().map(|row| row.0).collect()
    }

    #[tokio::test]
    async fn what_belongs_together_is_written_at_once() {
        both_stores(|store| async move {
            let (one, other) = (noting(None), noting(None));
            let effects = [of(&one, &["$a", "$b"]), of(&other, &["$c"]), of(&one, &["$d"])].concat();
            let done = store
                .write(move |tx| Box::pin(async move { write_effects_until_one_fails(tx, &effects).await }))
                .await
                .unwrap();
            assert!(matches!(done, (4, None)));
            assert_eq!(*one.asked.lock().unwrap(), [vec![0, 1], vec![0]]);
            assert_eq!(written(&store).await.len(), 4);
        })
        .await;
    }

    #[tokio::test]
    async fn of_a_group_in_which_one_fails_only_those_before_it_stay() {
        both_stores(|store| async move {
            let effects = noting(Some(2));
            let all = of(&effects, &["$a", "$b", "$c", "$d"]);
            let done = store
                .write(move |tx| Box::pin(async move { write_effects_until_one_fails(tx, &all).await }))
                .await
                .unwrap();
            assert!(matches!(done, (2, Some(StoreError::Withdrawn(_)))));
            assert_eq!(written(&store).await, ["$a", "$b"]);
        })
        .await;
    }

    #[tokio::test]
    async fn one_that_panics_fails_alone() {
        both_stores(|store| async move {
            let effects = Arc::new(Noting { asked: Mutex::default(), refuses: Some(1), panics: true });
            let all = of(&effects, &["$a", "$b", "$c"]);
            let done = store
                .write(move |tx| Box::pin(async move { write_effects_until_one_fails(tx, &all).await }))
                .await
                .unwrap();
            assert!(matches!(done, (1, Some(StoreError::Panicked))), "{done:?}");
            assert_eq!(written(&store).await, ["$a"]);
        })
        .await;
    }
}
