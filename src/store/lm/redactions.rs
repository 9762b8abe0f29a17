//! What was redacted in a log. The log itself stays as it was written (INV-1); who reads it asks here what of it to leave out.

use std::collections::BTreeSet;

use ruma::{EventId, OwnedEventId, OwnedUserId, RoomId, ServerName, UserId};
use sqlx::AssertSqlSafe;
use sqlx::any::AnyRow;

use super::super::rows::{chunks, placeholders};
use super::EventRow;
use super::chains::chain_event_now;
use super::read::{event_row, parsed};
use crate::store::{Store, StoreError, Tx};

/// From how many events on it is asked first whether anything at all was redacted.
const MANY: usize = 100;

/// An event with its sender, of which it is asked whether it was redacted.
pub type Asked = (OwnedEventId, OwnedUserId);

/// Whose an event must be so that it is redacted.
#[derive(Debug, Clone, Copy)]
pub enum By<'a> {
    /// Anybody's.
    Anybody,
    /// A user's of this server.
    Neighbours(&'a ServerName),
    /// This user's.
    Sender(&'a UserId),
    /// Nobody's: the redaction stands in the log, and redacts nothing here.
    Nobody,
}

impl By<'_> {
    fn to_text(self) -> String {
        match self {
            Self::Anybody => String::new(),
            // No user ID begins so.
            Self::Neighbours(server) => format!(":{server}"),
            Self::Sender(user) => user.to_string(),
            Self::Nobody => "!".to_owned(),
        }
    }
}

/// Records that `redaction` redacts `target` when that is whose it must be.
pub async fn redact(
    tx: &mut Tx,
    room_id: &RoomId,
    target: &EventId,
    by: By<'_>,
    redaction: &EventId,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO lm_redactions (room_id, target, by_user, redaction) VALUES ($1, $2, $3, $4) \
         ON CONFLICT (room_id, target, by_user) DO NOTHING",
    )
    .bind(room_id.as_str())
    .bind(target.as_str())
    .bind(by.to_text())
    .bind(redaction.as_str())
    .execute(tx)
    .await?;
    Ok(())
}

/// Those of the events of a room that were redacted.
pub async fn redacted(store: &Store, room_id: &RoomId, events: &[Asked]) -> Result<BTreeSet<OwnedEventId>, StoreError> {
    let mut found = BTreeSet::new();
    if events.len() >= MANY {
        let any = sqlx::query("SELECT target FROM lm_redactions WHERE room_id = $1 LIMIT 1").bind(room_id.as_str());
        if any.fetch_optional(store.reader()).await?.is_none() {
            return Ok(found);
        }
    }
    for chunk in chunks(events) {
        let sql = targets(chunk.len());
        let rows = bound(&sql, room_id, chunk).fetch_all(store.reader()).await?;
        add(&mut found, &rows)?;
    }
    Ok(found)
}

/// The same as [`redacted`], seen from within a transaction.
pub async fn redacted_now(
    tx: &mut Tx,
    room_id: &RoomId,
    events: &[Asked],
) -> Result<BTreeSet<OwnedEventId>, StoreError> {
    let mut found = BTreeSet::new();
    for chunk in chunks(events) {
        let sql = targets(chunk.len());
        let rows = bound(&sql, room_id, chunk).fetch_all(&mut *tx).await?;
        add(&mut found, &rows)?;
    }
    Ok(found)
}

/// An event of a room, in its log or what allows its state, seen from within a transaction.
pub async fn target(tx: &mut Tx, room_id: &RoomId, event_id: &EventId) -> Result<Option<EventRow>, StoreError> {
    let row =
        sqlx::query("SELECT room_id, position, event_id, json FROM lm_events WHERE event_id = $1 AND room_id = $2")
            .bind(event_id.as_str())
            .bind(room_id.as_str())
            .fetch_optional(&mut *tx)
            .await?;
    match row {
        Some(row) => event_row(&row).map(Some),
        None => chain_event_now(tx, room_id, event_id).await,
    }
}

fn targets(events: usize) -> String {
    // Each event for all that `By` can be.
    let pairs = placeholders(events.saturating_mul(3), 2, 1);
    format!("SELECT target FROM lm_redactions WHERE room_id = $1 AND (target, by_user) IN (VALUES {pairs})")
}

type Query<'q> = sqlx::query::Query<'q, sqlx::Any, sqlx::any::AnyArguments>;

fn bound<'q>(sql: &'q str, room_id: &'q RoomId, events: &'q [Asked]) -> Query<'q> {
    let query = sqlx::query(AssertSqlSafe(sql)).bind(room_id.as_str());
    events.iter().fold(query, |query, (event_id, sender)| {
        let whose = [By::Anybody, By::Neighbours(sender.server_name()), By::Sender(sender)];
        whose.into_iter().fold(query, |query, by| query.bind(event_id.as_str()).bind(by.to_text()))
    })
}

fn add(found: &mut BTreeSet<OwnedEventId>, rows: &[AnyRow]) -> Result<(), StoreError> {
    for row in rows {
        found.insert(parsed(row, "target")?);
    }
    Ok(())
}
