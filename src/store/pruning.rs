//! What goes in time: records for people to read, and keys that can be fetched again.

use ruma::OwnedServerName;

use super::{Store, StoreError, Tx};

/// How many refusals of a portal, complaints of a room, and portals that have ended stay whatever their age: `portal show` shows
/// the newest, and whether an event was complained of matters to the events right after it.
pub const STAY: i64 = 100;
/// How many there are at most.
const MOST: i64 = 10_000;
/// Of how many transactions of a server the answers are kept; they go after a day in any case.
const ANSWERS: i64 = 50_000;

/// What goes.
#[derive(Debug, Clone)]
pub struct Prune {
    /// What time it is, in milliseconds.
    pub now: i64,
    /// Records from before this time, in milliseconds; none when their age does not matter.
    pub records_before: Option<i64>,
    /// Keys fetched before this time, of servers with which nothing is shared.
    pub keys_before: i64,
    /// The gateway's own name, whose keys stay.
    pub own: OwnedServerName,
}

/// Removes what is too old or too much. Returns how many rows.
pub async fn prune(store: &Store, prune: Prune) -> Result<u64, StoreError> {
    let before = prune.records_before.unwrap_or(i64::MIN);
    let mut gone = 0_u64;
    // One after the other, so that others write in between.
    let portals: Vec<(i64,)> =
        sqlx::query_as("SELECT DISTINCT portal FROM bridge_refusals").fetch_all(store.reader()).await?;
    for (portal,) in portals {
        let refusals = Records { table: "bridge_refusals", of: "portal", time: "refused_ts" };
        let write =
            store.write(move |tx| Box::pin(async move { refusals.prune(tx, Of::Portal(portal), before).await }));
        gone = gone.saturating_add(write.await?);
    }
    let rooms: Vec<(String,)> =
        sqlx::query_as("SELECT DISTINCT room_id FROM lm_complaints").fetch_all(store.reader()).await?;
    for (room_id,) in rooms {
        let complaints = Records { table: "lm_complaints", of: "room_id", time: "noticed_ts" };
        let write =
            store.write(move |tx| Box::pin(async move { complaints.prune(tx, Of::Room(&room_id), before).await }));
        gone = gone.saturating_add(write.await?);
    }
    let now = prune.now;
    let ended = store.write(move |tx| Box::pin(ended_portals(tx, now, before)));
    gone = gone.saturating_add(ended.await?);
    gone = gone.saturating_add(super::transactions::prune_surplus(store, ANSWERS).await?);
    let rest = store.write(move |tx| {
        Box::pin(async move {
            let work = sqlx::query("DELETE FROM appservice_work WHERE failed IS NOT NULL AND due_ts < $1")
                .bind(before)
                .execute(&mut *tx)
                .await?;
            let given_up = sqlx::query("DELETE FROM owed_leaves WHERE given_up_ts < $1 AND joining = 0")
                .bind(before)
                .execute(&mut *tx)
                .await?;
            let keys = sqlx::query(
                "DELETE FROM server_keys WHERE fetched_ts < $1 AND server_name <> $2 \
                 AND server_name NOT IN (SELECT destination FROM outbound_cursors) \
                 AND server_name NOT IN (SELECT hub FROM lm_rooms)",
            )
            .bind(prune.keys_before)
            .bind(prune.own.as_str())
            .execute(&mut *tx)
            .await?;
            let answers =
                "DELETE FROM server_key_answers WHERE server_name NOT IN (SELECT server_name FROM server_keys)";
            sqlx::query(answers).execute(tx).await?;
            let given_up = given_up.rows_affected();
            Ok(work.rows_affected().saturating_add(given_up).saturating_add(keys.rows_affected()))
        })
    });
    Ok(gone.saturating_add(rest.await?))
}

/// Removes portals that ended long ago, with what is recorded of them. Returns how many.
async fn ended_portals(tx: &mut Tx, now: i64, before: i64) -> Result<u64, StoreError> {
    let seen = "UPDATE bridge_portals SET ended_ts = $1 WHERE state = 'ended' AND (ended_ts IS NULL OR ended_ts > $1)";
    sqlx::query(seen).bind(now).execute(&mut *tx).await?;
    let mut gone = 0_u64;
    for (stay, before) in [(STAY, before), (MOST, i64::MAX)] {
        // The newest stay: numbers go on from theirs.
        let newest = "SELECT number FROM bridge_portals WHERE state = 'ended' ORDER BY number DESC LIMIT 1 OFFSET $1";
        let newest: Option<(i64,)> =
            sqlx::query_as(newest).bind(stay.saturating_sub(1)).fetch_optional(&mut *tx).await?;
        let Some((newest,)) = newest else { continue };
        let old = "number < $1 AND state = 'ended' AND ended_ts < $2";
        for sql in [
            format!("DELETE FROM bridge_refusals WHERE portal IN (SELECT number FROM bridge_portals WHERE {old})"),
            format!("DELETE FROM bridge_portals WHERE {old}"),
        ] {
            let query = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(newest).bind(before);
            gone = gone.saturating_add(query.execute(&mut *tx).await?.rows_affected());
        }
    }
    Ok(gone)
}

/// A table of records, each about one portal or room.
#[derive(Clone, Copy)]
struct Records {
    table: &'static str,
    of: &'static str,
    time: &'static str,
}

#[derive(Clone, Copy)]
enum Of<'a> {
    Portal(i64),
    Room(&'a str),
}

impl Records {
    async fn prune(self, tx: &mut Tx, of: Of<'_>, before: i64) -> Result<u64, StoreError> {
        let mut gone = 0_u64;
        // What is too old, but for the newest; and what is too much.
        for (stay, before) in [(STAY, before), (MOST, i64::MAX)] {
            let Some(newest) = self.time_of(tx, of, stay).await? else { continue };
            let Self { table, of: key, time } = self;
            // Of the same time all or none, so that as many stay as are said to.
            let sql = format!("DELETE FROM {table} WHERE {key} = $1 AND {time} < $2");
            let query = sqlx::query(sqlx::AssertSqlSafe(sql));
            let query = match of {
                Of::Portal(portal) => query.bind(portal),
                Of::Room(room_id) => query.bind(room_id),
            };
            let done = query.bind(newest.min(before)).execute(&mut *tx).await?;
            gone = gone.saturating_add(done.rows_affected());
        }
        Ok(gone)
    }

    /// The time of the last of the newest `stay`.
    async fn time_of(self, tx: &mut Tx, of: Of<'_>, stay: i64) -> Result<Option<i64>, StoreError> {
        let Self { table, of: key, time } = self;
        let sql = format!("SELECT {time} FROM {table} WHERE {key} = $1 ORDER BY {time} DESC LIMIT 1 OFFSET $2");
        let query = sqlx::query_as(sqlx::AssertSqlSafe(sql));
        let query = match of {
            Of::Portal(portal) => query.bind(portal),
            Of::Room(room_id) => query.bind(room_id),
        };
        let row: Option<(i64,)> = query.bind(stay.saturating_sub(1)).fetch_optional(tx).await?;
        Ok(row.map(|(time,)| time))
    }
}

#[cfg(test)]
mod tests {
    use ruma::server_name;

    use super::*;
    use crate::store::testing::both_stores;

    /// Runs statements, each once for every number of its range.
    async fn fill(store: &Store, sql: &'static str, numbers: std::ops::Range<i64>) {
        let write = store.write(move |tx| {
            Box::pin(async move {
                for number in numbers {
                    sqlx::query(sql).bind(number).bind(format!("${number}")).execute(&mut *tx).await?;
                }
                Ok(())
            })
        });
        write.await.unwrap();
    }

    async fn count(store: &Store, sql: &'static str) -> i64 {
        sqlx::query_as::<_, (i64,)>(sql).fetch_one(store.reader()).await.unwrap().0
    }

    #[tokio::test]
    async fn the_newest_records_stay_and_what_is_needed() {
        both_stores(|store| async move {
            let old = "INSERT INTO bridge_refusals \
                       (side, source_event_id, portal, sender, kind, code, reason, refused_ts) \
                       VALUES ('lm', $2, 1, '@a:b', 'm', 'c', 'r', $1)";
            fill(&store, old, 0..STAY + 20).await;
            let few = "INSERT INTO bridge_refusals \
                       (side, source_event_id, portal, sender, kind, code, reason, refused_ts) \
                       VALUES ('matrix', $2, 2, '@a:b', 'm', 'c', 'r', $1)";
            fill(&store, few, 0..5).await;
            let complaint = "INSERT INTO lm_complaints (room_id, event_id, problem, noticed_ts, settled) \
                             VALUES ('!r:h', $2, 'p', $1, 1)";
            fill(&store, complaint, 0..MOST + 20).await;
            let given_up = "INSERT INTO appservice_work (seq, work, attempts, due_ts, failed) VALUES ($1, '', 1, $1, $2)";
            fill(&store, given_up, 1..3).await;
            let waits = store.write(|tx| {
                Box::pin(async move {
                    let waits = "INSERT INTO appservice_work (seq, work, attempts, due_ts) VALUES (11, '', 1, 1)";
                    sqlx::query(waits).execute(tx).await?;
                    Ok(())
                })
            });
            waits.await.unwrap();
            for server in ["g.example", "shared.example", "hub.example", "gone.example"] {
                super::super::server_keys::save(&store, &ruma::ServerName::parse(server).unwrap(), Vec::new(), Vec::new(), 5).await.unwrap();
            }
            let shared = "INSERT INTO outbound_cursors (destination, kind, room_id, sent) \
                          VALUES ('shared.example', $2, '!r:h', $1)";
            fill(&store, shared, 0..1).await;
            let hub = "INSERT INTO lm_rooms (room_id, version, hub, redaction, head) VALUES ($2, 'v', 'hub.example', 'd', $1)";
            fill(&store, hub, 0..1).await;

            let own = server_name!("g.example").to_owned();
            let all = Prune { now: 7, records_before: None, keys_before: 5, own: own.clone() };
            assert_eq!(prune(&store, all).await.unwrap(), 20, "only what is too much");
            let some = Prune { now: 7, records_before: Some(10), keys_before: 6, own };
            // Ten refusals of the first portal, two things that were given up, one server.
            assert_eq!(prune(&store, some.clone()).await.unwrap(), 13);
            assert_eq!(count(&store, "SELECT MIN(refused_ts) FROM bridge_refusals WHERE portal = 1").await, 10);
            assert_eq!(count(&store, "SELECT COUNT(*) FROM bridge_refusals WHERE portal = 2").await, 5);
            assert_eq!(count(&store, "SELECT COUNT(*) FROM lm_complaints").await, MOST);
            assert_eq!(count(&store, "SELECT COUNT(*) FROM appservice_work").await, 1);
            assert_eq!(count(&store, "SELECT COUNT(*) FROM server_keys").await, 3);
            let later = Prune { records_before: Some(i64::MAX), ..some };
            prune(&store, later).await.unwrap();
            assert_eq!(count(&store, "SELECT COUNT(*) FROM bridge_refusals WHERE portal = 1").await, STAY);
            assert_eq!(count(&store, "SELECT COUNT(*) FROM lm_complaints").await, STAY);
        })
        .await;
    }

    #[tokio::test]
    async fn portals_that_ended_long_ago_go_but_the_newest() {
        both_stores(|store| async move {
            let portal = "INSERT INTO bridge_portals (number, kind, state, lm_hub, alias, request, created_ts) \
                          VALUES ($1, 'created', 'ended', 'h', $2, '', 0)";
            fill(&store, portal, 1..STAY + 6).await;
            let open = "INSERT INTO bridge_portals (number, kind, state, lm_hub, alias, request, created_ts) \
                        VALUES ($1 - $1, 'created', 'active', 'h', $2, '', 0)";
            fill(&store, open, 1..2).await;
            let refusal = "INSERT INTO bridge_refusals \
                           (side, source_event_id, portal, sender, kind, code, reason, refused_ts) \
                           VALUES ('lm', $2, $1, '@a:b', 'm', 'c', 'r', $1)";
            fill(&store, refusal, 0..7).await;
            let own = server_name!("g.example").to_owned();
            let at = |now: i64| Prune { now, records_before: Some(now - 30), keys_before: 0, own: own.clone() };
            // From when they are first seen to have ended; a clock that is set back does not make it longer.
            assert_eq!(prune(&store, at(1_000)).await.unwrap(), 0);
            assert_eq!(prune(&store, at(500)).await.unwrap(), 0);
            assert_eq!(prune(&store, at(530)).await.unwrap(), 0);
            let for_ever = Prune { records_before: None, ..at(531) };
            assert_eq!(prune(&store, for_ever).await.unwrap(), 0);
            assert_eq!(prune(&store, at(531)).await.unwrap(), 10, "five portals and their refusals");
            assert_eq!(count(&store, "SELECT COUNT(*) FROM bridge_portals").await, STAY + 1);
            assert_eq!(count(&store, "SELECT MIN(number) FROM bridge_portals WHERE state = 'ended'").await, 6);
            assert_eq!(
                count(&store, "SELECT COUNT(*) FROM bridge_refusals").await,
                2,
                "of one that is open, and of one that stays"
            );
        })
        .await;
    }
}
