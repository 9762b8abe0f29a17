//! Times in the future. A clock that was set back finds what was stored before that put off for hours or days, or young for as
//! long. Nobody knows how long it really was: nothing is put off for longer than it may be, and nothing is younger than now.

use super::{Store, StoreError};

/// For how long things are put off at most, in milliseconds.
#[derive(Debug, Clone, Copy)]
pub struct Longest {
    /// What is missing of a hub's log, by how often it was asked for; as the last one from then on.
    pub holes: &'static [i64],
    /// What a homeserver's event asks for.
    pub appservice: i64,
    /// The ghosts' leaving of a suspended portal.
    pub ghosts_leave: i64,
    /// The end of a portal that nobody uses.
    pub unused: i64,
    /// The end of an invite that nobody answers.
    pub invitations: i64,
    /// The leave of who came into a room for nothing.
    pub owed: i64,
}

/// Brings what is in the future back to `now_ms`. Returns how many rows.
pub async fn bring_back(store: &Store, now_ms: i64, longest: Longest) -> Result<u64, StoreError> {
    let write = store.write(move |tx| {
        Box::pin(async move {
            // Each by what is the latest that it may say now, and what it says instead.
            let rows = [
                ("UPDATE bridge_inbox SET received_ts = $2 WHERE received_ts > $1", 0, 0),
                ("UPDATE bridge_images SET made_ts = $2 WHERE pending = 1 AND made_ts > $1", 0, 0),
                ("UPDATE lm_holes SET noticed_ts = $2 WHERE noticed_ts > $1", 0, 0),
                ("UPDATE lm_gaps SET noticed_ts = $2 WHERE noticed_ts > $1", 0, 0),
                // It is gone on with at once, whatever it waited for.
                ("UPDATE lm_gaps SET retry_at = $2 WHERE retry_at > $1", 0, 0),
                ("UPDATE dag_gaps SET noticed_ts = $2 WHERE noticed_ts > $1", 0, 0),
                ("UPDATE dag_gaps SET retry_at = $2 WHERE retry_at > $1", 0, 0),
                ("UPDATE appservice_work SET due_ts = $2 WHERE failed IS NULL AND attempts = 0 AND due_ts > $1", 0, 0),
                ("UPDATE appservice_work SET due_ts = $2 WHERE failed IS NULL AND due_ts > $1", longest.appservice, 0),
                (
                    "UPDATE bridge_portals SET ghosts_leave_ts = $2 WHERE ghosts_leave_ts > $1",
                    longest.ghosts_leave,
                    longest.ghosts_leave,
                ),
                (
                    "UPDATE bridge_portals SET empty_until_ts = $2 WHERE empty_until_ts > $1",
                    longest.ghosts_leave,
                    longest.ghosts_leave,
                ),
                (
                    "UPDATE bridge_portals SET unused_until_ts = $2 WHERE unused_until_ts > $1",
                    longest.unused,
                    longest.unused,
                ),
                ("UPDATE owed_leaves SET made_ts = $2 WHERE made_ts > $1", 0, 0),
                ("UPDATE owed_leaves SET next_ts = $2 WHERE next_ts > $1", longest.owed, 0),
                ("UPDATE owed_leaves SET given_up_ts = $2 WHERE given_up_ts > $1", 0, 0),
                ("UPDATE bridge_invitations SET retry_ts = $2 WHERE retry_ts > $1", 0, 0),
                ("UPDATE bridge_invitations SET stage_ts = $2 WHERE stage_ts > $1", 0, 0),
                (
                    "UPDATE bridge_invitations SET expires_ts = $2 WHERE expires_ts > $1",
                    longest.invitations,
                    longest.invitations,
                ),
            ];
            let mut brought = 0_u64;
            for (sql, latest, instead) in rows {
                let query = sqlx::query(sql).bind(now_ms.saturating_add(latest)).bind(now_ms.saturating_add(instead));
                brought = brought.saturating_add(query.execute(&mut *tx).await?.rows_affected());
            }
            for (tries, delay) in (0_i64..).zip(longest.holes) {
                // Those that were asked for more often wait as long as the last, which comes last.
                let sql = "UPDATE lm_holes SET retry_at = $2 WHERE retry_at > $1 AND tries >= $3 AND tries <= $4";
                let is_last = usize::try_from(tries).is_ok_and(|tries| tries.saturating_add(1) == longest.holes.len());
                let query = sqlx::query(sql)
                    .bind(now_ms.saturating_add(*delay))
                    .bind(now_ms)
                    .bind(tries)
                    .bind(if is_last { i64::MAX } else { tries });
                brought = brought.saturating_add(query.execute(&mut *tx).await?.rows_affected());
            }
            Ok(brought)
        })
    });
    write.await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::testing::both_stores;

    const LONGEST: Longest =
        Longest { holes: &[2, 10, 100], appservice: 50, ghosts_leave: 60, unused: 70, invitations: 80, owed: 90 };
    const NOW: i64 = 1_000;

    async fn run(store: &Store, sql: String) {
        let write = store.write(move |tx| {
            Box::pin(async move {
                sqlx::query(sqlx::AssertSqlSafe(sql)).execute(tx).await?;
                Ok(())
            })
        });
        write.await.unwrap();
    }

    async fn read(store: &Store, sql: &'static str) -> Vec<i64> {
        let rows: Vec<(i64,)> = sqlx::query_as(sql).fetch_all(store.reader()).await.unwrap();
        rows.into_iter().map(|row| row.0).collect()
    }

    #[tokio::test]
    async fn what_was_stored_before_the_clock_was_set_back_waits_no_longer_than_it_may() {
        both_stores(|store| async move {
            for (number, ts) in [(1, NOW), (2, NOW + 1), (3, i64::MAX)] {
                run(
                    &store,
                    format!(
                        "INSERT INTO bridge_inbox (seq, side, room_id, event_id, received_ts) \
                         VALUES ({number}, 'lm', '!r:h', '${number}', {ts})"
                    ),
                )
                .await;
                for (side, pending) in [("matrix", 1), ("lm", 0)] {
                    run(
                        &store,
                        format!(
                            "INSERT INTO bridge_images \
                             (side, source_event_id, image_event_id, pending, portal, made_ts) \
                             VALUES ('{side}', '${number}', '$image{number}', {pending}, 1, {ts})"
                        ),
                    )
                    .await;
                }
            }
            // By how often it was tried: what is at its latest stays, what is later goes now.
            for (number, (tries, late)) in [(0, 2), (1, 10), (2, 100), (9, 100)].into_iter().enumerate() {
                for after in [0, 1] {
                    run(
                        &store,
                        format!(
                            "INSERT INTO lm_holes \
                             (room_id, event_id, seq, given, noticed_ts, tries, retry_at, last_error) \
                             VALUES ('!r:h', '${number}.{after}', {after}, 0, {NOW} - 1 + {after} * 2, {tries}, \
                             {NOW} + {late} + {after}, '')"
                        ),
                    )
                    .await;
                }
            }
            for (seq, attempts, due) in [(1, 0, NOW + 1), (2, 3, NOW + 50), (3, 3, NOW + 51)] {
                run(
                    &store,
                    format!(
                        "INSERT INTO appservice_work (seq, work, attempts, due_ts) VALUES ({seq}, '', {attempts}, {due})"
                    ),
                )
                .await;
            }
            for (number, leave, unused) in [(1, NOW + 60, NOW + 70), (2, NOW + 61, NOW + 71)] {
                run(
                    &store,
                    format!(
                        "INSERT INTO bridge_portals (number, kind, state, lm_hub, request, created_ts, ghosts_leave_ts, \
                         unused_until_ts) VALUES ({number}, 'created', 'active', 'h', '', 0, {leave}, {unused})"
                    ),
                )
                .await;
            }

            // Two in the inbox, two pending images, of the holes four times two, two things to do, one portal twice.
            assert_eq!(bring_back(&store, NOW, LONGEST).await.unwrap(), 2 + 2 + 4 + 4 + 2 + 2);
            assert_eq!(bring_back(&store, NOW, LONGEST).await.unwrap(), 0);
            assert_eq!(read(&store, "SELECT received_ts FROM bridge_inbox").await, [NOW; 3]);
            assert_eq!(read(&store, "SELECT made_ts FROM bridge_images WHERE pending = 1").await, [NOW; 3]);
            assert_eq!(
                read(&store, "SELECT retry_at FROM lm_holes ORDER BY event_id").await,
                [NOW + 2, NOW, NOW + 10, NOW, NOW + 100, NOW, NOW + 100, NOW]
            );
            assert_eq!(read(&store, "SELECT MAX(noticed_ts) FROM lm_holes").await, [NOW]);
            assert_eq!(read(&store, "SELECT due_ts FROM appservice_work ORDER BY seq").await, [NOW, NOW + 50, NOW]);
            assert_eq!(read(&store, "SELECT ghosts_leave_ts FROM bridge_portals").await, [NOW + 60; 2]);
            assert_eq!(read(&store, "SELECT unused_until_ts FROM bridge_portals").await, [NOW + 70; 2]);
        })
        .await;
    }
}
