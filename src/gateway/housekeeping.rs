//! Keeps tables from growing without bound: what is recorded only for people to read, or can be had again, goes in time. And
//! sees to it that nothing waits for a time that is far off because the clock was set back.

use std::time::Duration;

use crate::clock::Clock;
use crate::federation::Context;
use crate::store::pruning::{self, Prune};
use crate::store::times::{self, Longest};
use crate::store::{Store, StoreError};
use crate::{appservice, bridge, lm, seam};

/// How often it is looked.
const EVERY: Duration = Duration::from_secs(3_600);
/// How often it is looked whether the clock was set back.
const CLOCK_EVERY: Duration = Duration::from_secs(10);
const DAY_MS: i64 = 86_400_000;
/// For how long things may be put off.
const LONGEST: Longest = Longest {
    holes: &lm::HOLES_AGAIN_MS,
    appservice: appservice::LONGEST_PAUSE_MS,
    ghosts_leave: bridge::GHOSTS_STAY_MS,
    unused: bridge::UNUSED_MS,
    invitations: bridge::PENDING_MS,
    owed: seam::LONGEST_OWED_MS,
};
/// After how many days the keys of a server are forgotten with which no room is shared any more. What it signed and is in a
/// room here was checked long ago; when it says something again its keys are fetched again.
const KEYS_DAYS: i64 = 180;

/// Tidies up now and then, for ever.
pub(super) async fn run(context: Context) {
    loop {
        tidy(&context).await;
        tokio::time::sleep(EVERY).await;
    }
}

/// Looks for ever whether the clock was set back.
pub(super) async fn watch_clock(context: Context) {
    let mut last = context.clock.now_ms();
    loop {
        tokio::time::sleep(CLOCK_EVERY).await;
        last = look_at_clock(&context, last).await;
    }
}

/// Looks whether the clock was set back since it showed `last`. Returns what it is compared with next.
async fn look_at_clock(context: &Context, last: i64) -> i64 {
    let now = context.clock.now_ms();
    if now >= last || bring_back(&context.store, &*context.clock).await.is_ok() {
        return now;
    }
    // What could not be written is tried again in the next round.
    last
}

/// Brings back what is stored with times in the future.
pub(super) async fn bring_back(store: &Store, clock: &dyn Clock) -> Result<(), StoreError> {
    match times::bring_back(store, clock.now_ms(), LONGEST).await {
        Ok(0) => Ok(()),
        Ok(rows) => {
            tracing::warn!(
                rows,
                "the clock was set back: what was put off until a time that is far off waits no longer"
            );
            Ok(())
        }
        Err(error) => {
            tracing::warn!(%error, "times in the future could not be brought back");
            Err(error)
        }
    }
}

async fn tidy(context: &Context) {
    let ago = |days: i64| context.clock.now_ms().saturating_sub(days.saturating_mul(DAY_MS));
    let days = i64::from(context.config.database.keep_days);
    let prune = Prune {
        now: context.clock.now_ms(),
        records_before: (days > 0).then(|| ago(days)),
        keys_before: ago(KEYS_DAYS),
        own: context.server_name.clone(),
    };
    match pruning::prune(&context.store, prune).await {
        Ok(0) => {}
        Ok(rows) => tracing::info!(rows, "old records are gone"),
        Err(error) => tracing::warn!(%error, "old records could not be removed"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::clock::{ManualClock, SharedClock};

    #[tokio::test]
    async fn records_go_in_time_unless_they_are_kept_for_ever() {
        for (keep_days, left) in [(30, 0), (0, 1)] {
            let directory = tempfile::tempdir().unwrap();
            let url = format!("sqlite://{}", directory.path().join("db").display());
            let config = serde_json::from_value(json!({
                "server_name": "g.example",
                "signing_key": directory.path().join("key"),
                "database": { "url": url, "keep_days": keep_days },
            }));
            let clock: SharedClock = ManualClock::new(31 * DAY_MS);
            let context = super::super::context(config.unwrap(), clock).await.unwrap();
            let work = "INSERT INTO appservice_work (seq, work, attempts, due_ts, failed) VALUES (1, $1, 12, $2, 'no')";
            let write = context.store.write(move |tx| {
                Box::pin(async move {
                    sqlx::query(work).bind(&b"{}"[..]).bind(DAY_MS - 1).execute(tx).await?;
                    Ok(())
                })
            });
            write.await.unwrap();
            tidy(&context).await;
            let (count,): (i64,) =
                sqlx::query_as("SELECT COUNT(*) FROM appservice_work").fetch_one(context.store.reader()).await.unwrap();
            assert_eq!(count, left, "{keep_days}");
        }
    }

    #[tokio::test]
    async fn what_was_put_off_before_the_clock_was_set_back_is_due_after_it() {
        let directory = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}", directory.path().join("db").display());
        let config = json!({
            "server_name": "g.example",
            "signing_key": directory.path().join("key"),
            "database": { "url": url },
        });
        let clock = ManualClock::new(31 * DAY_MS);
        let context = super::super::context(serde_json::from_value(config).unwrap(), clock.clone()).await.unwrap();
        let write = context.store.write(move |tx| {
            Box::pin(async move {
                let work = "INSERT INTO appservice_work (seq, work, attempts, due_ts) VALUES (1, $1, 0, $2)";
                sqlx::query(work).bind(&b"{}"[..]).bind(31 * DAY_MS).execute(tx).await?;
                Ok(())
            })
        });
        write.await.unwrap();
        let is_due = async |now: i64| !crate::store::appservice::due(&context.store, now, 1).await.unwrap().is_empty();
        let last = look_at_clock(&context, 31 * DAY_MS).await;
        assert!(!is_due(30 * DAY_MS).await, "the clock has not gone back");
        clock.advance(-DAY_MS);
        assert_eq!(look_at_clock(&context, last).await, 30 * DAY_MS);
        assert!(is_due(30 * DAY_MS).await);
    }
}
