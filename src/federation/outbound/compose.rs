//! What goes into a transaction: events of the feeds that have news for the destination, in the order of each feed, within
//! bounds.

use std::collections::HashSet;
use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use ruma::OwnedServerName;
use tokio::time::Instant;

use super::edus::MAX_EDUS;
use super::slot::{News, Slot};
use super::{Feed, FeedKind, FeedSource, Shared};
use crate::event::Edu;
use crate::identity::Side;
use crate::store::StoreError;
use crate::store::outbound::{self as rows, Cursor, InflightRow, PartRow};

/// How many events a transaction has at most.
const MAX_PDUS: usize = 50;
/// How many feeds are looked at for one transaction.
const MAX_FEEDS: usize = 50;
/// How few events of one feed are taken at once when many feeds wait.
const MIN_SHARE: usize = 5;
/// An LM transaction ends before the event that would make its body longer than this: a peer refuses 102,400 bytes.
const MAX_LM_BYTES: usize = 90_000;
/// The same for Matrix servers, which take 50 events of any size.
const MAX_MATRIX_BYTES: usize = 4 << 20;

/// Composes the transactions of one destination.
pub(super) struct Composer<'a> {
    pub shared: &'a Shared,
    pub destination: &'a OwnedServerName,
    pub slot: &'a Slot,
}

pub(super) struct Transaction {
    pub txn_id: String,
    pub composed_ts: i64,
    /// By which protocol's `send` it goes.
    pub protocol: Side,
    pub parts: Vec<Part>,
    /// What goes along once, and is not repeated when that fails.
    pub edus: Vec<Edu>,
    /// Whether some of it may have arrived already.
    pub uncertain: bool,
}

pub(super) struct Part {
    pub feed: Feed,
    pub after: i64,
    pub through: i64,
    pub positions: Vec<i64>,
    /// Whether the feed ends here for the destination.
    pub is_last: bool,
    /// The events at the positions, as long as they need not be read again.
    pub events: Option<Vec<Bytes>>,
}

pub(super) enum Composed {
    Nothing,
    /// There was nothing to send, but the destination is further now.
    Passed(Vec<Part>),
    Transaction(Transaction),
    /// Nothing but EDUs that are worth nothing later: not kept.
    Edus(Transaction),
}

impl Transaction {
    /// As it is stored.
    pub(super) fn row(&self) -> InflightRow {
        InflightRow { txn_id: self.txn_id.clone(), parts: part_rows(&self.parts), composed_ts: self.composed_ts }
    }
}

impl Composer<'_> {
    /// The next transaction, of one event when it is to be `single`. `done` has arrived, but is not kept yet; what is
    /// `held` has to wait.
    pub(super) async fn compose(
        &self,
        single: bool,
        done: Option<&[PartRow]>,
        held: &HashSet<Feed>,
    ) -> Result<Composed, StoreError> {
        let mut feeds = self.slot.take(MAX_FEEDS);
        feeds.retain(|(feed, _)| !held.contains(feed));
        let Some((first, _)) = feeds.first() else { return Ok(self.edus_alone()) };
        let protocol = first.kind.protocol();
        let one = single || self.takes_one_by_one(&feeds).await;
        let mut room = Room::new(protocol, one, feeds.len());
        let mut parts = Vec::new();
        for (feed, news) in feeds {
            if room.is_full() {
                self.slot.add(feed, news);
                continue;
            }
            if let Some(part) = self.part(feed, news, &mut room, done.unwrap_or_default()).await? {
                parts.push(part);
            }
        }
        if parts.iter().all(|part| part.positions.is_empty()) {
            return Ok(Composed::Passed(parts));
        }
        // Where an event may be to blame for a failure, nothing else is. Nor may what is refused with EDUs be one for a hub: without
        // them it would be another transaction, and there are hubs that know nothing but that again and take twice what they took.
        let kept = parts.iter().filter(|part: &&Part| part.feed.kind.is_edus()).map(|part| part.positions.len()).sum();
        let alone = single || parts.iter().any(|part| part.feed.kind == FeedKind::Lpdus && !part.positions.is_empty());
        let space = if alone { 0 } else { MAX_EDUS.saturating_sub(kept) };
        let edus = self.slot.edus().take(protocol, space, Instant::now());
        let (txn_id, composed_ts) = self.txn_id();
        Ok(Composed::Transaction(Transaction { txn_id, composed_ts, protocol, parts, edus, uncertain: single }))
    }

    fn edus_alone(&self) -> Composed {
        let mut waiting = self.slot.edus();
        let Some(protocol) = waiting.first_side() else { return Composed::Nothing };
        let edus = waiting.take(protocol, MAX_EDUS, Instant::now());
        if edus.is_empty() {
            return Composed::Passed(Vec::new());
        }
        let (txn_id, composed_ts) = self.txn_id();
        let parts = Vec::new();
        Composed::Edus(Transaction { txn_id, composed_ts, protocol, parts, edus, uncertain: false })
    }

    /// Whether the destination must not get several events at once. One that stops at the first that it does not like keeps those
    /// before it. As a hub it hands each event round before it takes the next, which lasts as long as a dead server in the room
    /// has it wait: of several, nobody could tell which it will still take.
    async fn takes_one_by_one(&self, feeds: &[(Feed, News)]) -> bool {
        let is_lm = |(feed, _): &(Feed, News)| matches!(feed.kind, FeedKind::Log | FeedKind::Lpdus);
        feeds.iter().any(is_lm) && self.shared.sender.stops_at_first(&*self.shared.wire, self.destination).await
    }

    /// A fresh transaction ID, and when it was made.
    pub(super) fn txn_id(&self) -> (String, i64) {
        let now_ms = self.shared.clock.now_ms();
        (format!("{now_ms}.{}", self.shared.store.next_id()), now_ms)
    }

    /// What a feed has for the destination, as far as there is room. A feed that has more is put to the end of the line.
    async fn part(
        &self,
        feed: Feed,
        news: News,
        room: &mut Room,
        done: &[PartRow],
    ) -> Result<Option<Part>, StoreError> {
        let source = self.source(&feed)?;
        let Some(cursor) = self.cursor(&feed, news).await? else { return Ok(None) };
        let is_this = |row: &&PartRow| row.kind == feed.kind.as_str() && row.room_id == feed.room_id.as_str();
        let sent = done.iter().filter(is_this).map(|row| row.through).fold(cursor.sent, i64::max);
        self.slot.set_place(&feed, cursor.open.then_some(sent));
        if sent >= cursor.target {
            return Ok(None);
        }
        if source.holds_back(&feed, self.destination).await? {
            return Ok(None);
        }
        let limit = room.share();
        let found = source.read(&feed, self.destination, sent, Some(cursor.target), limit).await?;
        let mut part =
            Part { feed, after: sent, through: sent, positions: Vec::new(), is_last: false, events: Some(Vec::new()) };
        if found.is_empty() {
            // The room's task has committed what it has not shown yet: it wakes this queue when it has.
            return Ok(None);
        }
        for delivery in found {
            if delivery.position <= part.through || delivery.position > cursor.target {
                let (position, through, target) = (delivery.position, part.through, cursor.target);
                tracing::error!(feed = ?part.feed, position, through, target, "a feed is out of order");
                return Ok(None);
            }
            if let Some(event) = delivery.event {
                if !room.takes(event.len()) {
                    break;
                }
                part.positions.push(delivery.position);
                part.events.get_or_insert_default().push(event);
            }
            part.through = delivery.position;
        }
        self.slot.set_place(&part.feed, cursor.open.then_some(part.through));
        if part.through < cursor.target {
            let news = if cursor.open { News::Head(cursor.target) } else { News::Ask };
            self.slot.add(part.feed.clone(), news);
        }
        part.is_last = cursor.ends && part.through == cursor.target;
        Ok(Some(part))
    }

    /// Where the destination is in a feed; from memory where only the head has moved.
    async fn cursor(&self, feed: &Feed, news: News) -> Result<Option<Cursor>, StoreError> {
        if let (News::Head(target), Some(sent)) = (news, self.slot.place(feed)) {
            return Ok(Some(Cursor { sent, target, ends: false, open: true }));
        }
        let cursor = rows::cursor(&self.shared.store, &feed.key(self.destination)).await?;
        if cursor.is_none() {
            self.slot.set_place(feed, None);
        }
        Ok(cursor)
    }

    pub(super) fn source(&self, feed: &Feed) -> Result<Arc<dyn FeedSource>, StoreError> {
        let sources = self.shared.sources.read().unwrap_or_else(PoisonError::into_inner);
        let source = sources.get(&feed.kind).cloned();
        source.ok_or_else(|| StoreError::corrupt("feed", format!("nobody has registered for {:?}", feed.kind)))
    }

    /// Tells the sources that the destination is back.
    pub(super) fn tell_back(&self) {
        let sources = self.shared.sources.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(source) = sources.get(&FeedKind::Lpdus) {
            source.is_back(self.destination);
        }
    }

    /// The events of a transaction and its EDUs that must not be lost, read again when they are not at hand.
    pub(super) async fn load(&self, transaction: &mut Transaction) -> Result<(Vec<Bytes>, Vec<Edu>), StoreError> {
        let (mut pdus, mut edus) = (Vec::new(), Vec::new());
        for part in &mut transaction.parts {
            if let Some(events) = part.events.take() {
                self.put_loaded(&part.feed, events, &mut pdus, &mut edus);
                continue;
            }
            if part.positions.is_empty() {
                continue;
            }
            let source = self.source(&part.feed)?;
            let found = source.read(&part.feed, self.destination, part.after, Some(part.through), MAX_PDUS).await?;
            let wanted = found.into_iter().filter(|delivery| part.positions.contains(&delivery.position));
            let events = wanted.filter_map(|delivery| delivery.event).collect();
            self.put_loaded(&part.feed, events, &mut pdus, &mut edus);
        }
        Ok((pdus, edus))
    }

    fn put_loaded(&self, feed: &Feed, events: Vec<Bytes>, pdus: &mut Vec<Bytes>, edus: &mut Vec<Edu>) {
        if !feed.kind.is_edus() {
            pdus.extend(events);
            return;
        }
        for edu in events.iter().filter_map(|edu| std::str::from_utf8(edu).ok()) {
            edus.extend(Edu::read(edu, self.shared.sender.server_name()).into_iter().flatten());
        }
    }
}

/// The room that is left in a transaction.
struct Room {
    events: usize,
    bytes: usize,
    share: usize,
    is_empty: bool,
}

impl Room {
    fn new(protocol: Side, single: bool, feeds: usize) -> Self {
        let events = if single { 1 } else { MAX_PDUS };
        let bytes = match protocol {
            Side::Lm => MAX_LM_BYTES,
            Side::Matrix => MAX_MATRIX_BYTES,
        };
        let share = MAX_PDUS.checked_div(feeds).unwrap_or(MAX_PDUS).max(MIN_SHARE).min(events);
        Self { events, bytes, share, is_empty: true }
    }

    fn is_full(&self) -> bool {
        self.events == 0
    }

    /// How many events the next feed may add.
    fn share(&self) -> usize {
        self.share.min(self.events)
    }

    /// Whether there is room for an event of so many bytes: for the first one always.
    fn takes(&mut self, bytes: usize) -> bool {
        let Some(events) = self.events.checked_sub(1) else { return false };
        let Some(bytes) = self.bytes.checked_sub(bytes.saturating_add(1)) else {
            let first = self.is_empty;
            (self.events, self.bytes, self.is_empty) = (0, 0, false);
            return first;
        };
        (self.events, self.bytes, self.is_empty) = (events, bytes, false);
        true
    }
}

pub(super) fn part_rows(parts: &[Part]) -> Vec<PartRow> {
    let row = |part: &Part| PartRow {
        kind: part.feed.kind.as_str().to_owned(),
        room_id: part.feed.room_id.to_string(),
        after: part.after,
        through: part.through,
        positions: part.positions.clone(),
        is_last: part.is_last,
        doubtful: false,
    };
    parts.iter().map(row).collect()
}
