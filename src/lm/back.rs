//! Follows a copy of a log back by what each event follows. Mostly that is what stands before it; where the copy is out of order the
//! event is looked up. However long the log is, a few of its events are in memory at once.

use ruma::{OwnedEventId, OwnedRoomId};
use serde::Deserialize;

use crate::store::lm::{self as stored, EventRow};
use crate::store::{Store, StoreError};

/// How many events are read together: few where it was just seen that the copy is out of order, ever more while it is not.
const FEW: i64 = 8;
const MANY: i64 = 128;

#[derive(Deserialize)]
struct Links {
    #[serde(default)]
    prev_events: Vec<OwnedEventId>,
}

/// A way back through a copy.
pub(super) struct Back<'a> {
    store: &'a Store,
    room_id: OwnedRoomId,
    /// The first position of what is looked at, and the one after its last.
    within: (i64, i64),
    /// What the last event that was given follows.
    next: Option<OwnedEventId>,
    /// What was read and not given yet, in the copy's order; what stands before it, from `below` on, was not read.
    read: Vec<EventRow>,
    below: i64,
    /// How many are read next.
    size: i64,
}

impl<'a> Back<'a> {
    /// Begins before an event; `within` are the first position that is looked at and the one after the last.
    pub fn before(store: &'a Store, event: &EventRow, within: (i64, i64)) -> Result<Self, StoreError> {
        let (room_id, next) = (event.room_id.clone(), prev_of(event)?);
        Ok(Self { store, room_id, within, next, read: Vec::new(), below: event.position, size: MANY })
    }

    /// The event before the last one in the log: none where that was the first, or where it is not within what is looked at.
    pub async fn step(&mut self) -> Result<Option<EventRow>, StoreError> {
        let Some(wanted) = self.next.take() else { return Ok(None) };
        if self.read.is_empty() && self.below > self.within.0 {
            let first = self.below.saturating_sub(self.size).max(self.within.0);
            let last = self.below.saturating_sub(1);
            self.read = stored::range(self.store, &self.room_id, first, last, self.size).await?;
            (self.below, self.size) = (first, self.size.saturating_mul(2).min(MANY));
        }
        let row = match self.read.iter().rposition(|row| row.event_id == wanted) {
            Some(place) => self.read.remove(place),
            None => {
                let row = stored::event(self.store, &wanted).await?;
                let Some(row) = row.filter(|row| row.room_id == self.room_id && self.has(row.position)) else {
                    return Ok(None);
                };
                (self.read, self.below, self.size) = (Vec::new(), row.position, FEW);
                row
            }
        };
        self.next = prev_of(&row)?;
        Ok(Some(row))
    }

    fn has(&self, position: i64) -> bool {
        (self.within.0..self.within.1).contains(&position)
    }
}

/// What an event of a log follows.
fn prev_of(row: &EventRow) -> Result<Option<OwnedEventId>, StoreError> {
    let mut prev_events = links_of(row)?.into_iter();
    Ok(prev_events.next().filter(|_| prev_events.next().is_none()))
}

/// The same of an event that may follow several.
pub(super) fn links_of(row: &EventRow) -> Result<Vec<OwnedEventId>, StoreError> {
    let links: Links = serde_json::from_slice(&row.json).map_err(|error| StoreError::corrupt("event", error))?;
    Ok(links.prev_events)
}

/// Some of the positions of a stretch of a log; a bit for each.
#[derive(Debug, Default)]
pub(super) struct Places {
    first: i64,
    end: i64,
    words: Vec<u64>,
}

impl Places {
    /// None of those from `first` on and before `end`.
    pub fn between(first: i64, end: i64) -> Self {
        let length = usize::try_from(end.saturating_sub(first)).unwrap_or_default();
        Self { first, end, words: vec![0; length.div_ceil(64)] }
    }

    /// Whether the stretch has no positions at all.
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// Where the stretch begins.
    pub fn first(&self) -> i64 {
        self.first
    }

    /// Adds a position; whether it is of the stretch, and is new.
    pub fn insert(&mut self, position: i64) -> bool {
        let Some((word, bit)) = self.place(position) else { return false };
        let Some(word) = self.words.get_mut(word) else { return false };
        let is_new = *word & bit == 0;
        *word |= bit;
        is_new
    }

    /// Whether a position was added.
    pub fn holds(&self, position: i64) -> bool {
        let place = self.place(position);
        place.is_some_and(|(word, bit)| self.words.get(word).is_some_and(|word| word & bit != 0))
    }

    fn place(&self, position: i64) -> Option<(usize, u64)> {
        let offset = u64::try_from(position.checked_sub(self.first)?).ok().filter(|_| position < self.end)?;
        Some((usize::try_from(offset / 64).ok()?, 1 << (offset % 64)))
    }
}

#[cfg(test)]
mod tests {
    use ruma::{owned_room_id, server_name};
    use serde_json::json;

    use super::*;
    use crate::event::{Redaction, RoomVersion};
    use crate::store::lm::{NewEvent, RoomRow, append, insert_room};
    use crate::store::testing::both_stores;

    const EVENTS: i64 = 1_000;

    fn id(of: i64) -> OwnedEventId {
        OwnedEventId::try_from(format!("$event{of}")).unwrap()
    }

    /// Writes a copy in which the events of a log, told by their numbers, stand in this order.
    async fn write(store: &Store, copy: Vec<i64>) {
        let room_id = owned_room_id!("!room:hub.example");
        let hub = server_name!("hub.example").to_owned();
        let (version, redaction) = (RoomVersion::Lm02, Redaction::Draft);
        let row = RoomRow { room_id, version, hub, redaction, shared: false, head: 0 };
        let event = |(position, of): (usize, i64)| NewEvent {
            position: i64::try_from(position).unwrap(),
            event_id: id(of),
            lpdu_id: None,
            state: None,
            json: match of {
                0 => json!({ "prev_events": [] }),
                of => json!({ "prev_events": [id(of - 1)], "content": { "body": "x".repeat(100) } }),
            }
            .to_string()
            .into_bytes(),
        };
        let events: Vec<NewEvent> = copy.into_iter().enumerate().map(event).collect();
        let job = store.write(move |tx| {
            Box::pin(async move {
                insert_room(tx, &row).await?;
                append(tx, &row.room_id, &events).await
            })
        });
        job.await.unwrap();
    }

    /// Which events of the copy are met on the way back from the last of the log, and how many were in memory at most.
    async fn follow(store: &Store, first: i64) -> (Vec<String>, usize) {
        let last = stored::event(store, &id(EVENTS - 1)).await.unwrap().unwrap();
        let mut back = Back::before(store, &last, (first, EVENTS)).unwrap();
        let (mut met, mut most) = (Vec::new(), 0);
        while let Some(row) = back.step().await.unwrap() {
            most = most.max(back.read.len() + 1);
            met.push(row.event_id.to_string());
        }
        (met, most)
    }

    #[tokio::test]
    async fn a_long_copy_is_followed_back_with_a_part_of_it_in_memory() {
        both_stores(|store| async move {
            write(&store, (0..EVENTS).collect()).await;
            let (met, most) = follow(&store, 0).await;
            assert_eq!(met, (0..EVENTS - 1).rev().map(|of| id(of).to_string()).collect::<Vec<_>>());
            assert!(most <= usize::try_from(MANY).unwrap(), "{most} events in memory");
            let (met, _) = follow(&store, 990).await;
            assert_eq!(met.len(), 9, "what is before where the stay began is not looked at: {met:?}");
        })
        .await;
    }

    #[tokio::test]
    async fn a_copy_that_is_out_of_order_is_followed_back_in_the_order_of_the_log() {
        both_stores(|store| async move {
            // A hundred came late; of the rest two of three stand in pairs the wrong way round.
            let mut copy: Vec<i64> = (0..500).chain(600..EVENTS - 1).chain(500..600).chain([EVENTS - 1]).collect();
            copy[1..400].chunks_mut(3).for_each(|three| three[..2].reverse());
            write(&store, copy).await;
            let (met, most) = follow(&store, 0).await;
            assert_eq!(met, (0..EVENTS - 1).rev().map(|of| id(of).to_string()).collect::<Vec<_>>());
            assert!(most <= usize::try_from(MANY).unwrap(), "{most} events in memory");
        })
        .await;
    }

    #[test]
    fn places_take_a_bit_each() {
        let mut places = Places::between(3, 1_000_003);
        assert!(places.words.len() <= 1_000_000 / 64);
        for position in [3, 66, 67, 1_000_002] {
            assert!(!places.holds(position));
            assert!(places.insert(position) && places.holds(position));
            assert!(!places.insert(position), "{position} is there already");
        }
        for position in [i64::MIN, -1, 2, 1_000_003, i64::MAX] {
            assert!(!places.insert(position) && !places.holds(position), "{position} is not of it");
        }
        assert!(!places.holds(4) && !Places::default().holds(0) && Places::default().is_empty());
    }
}
