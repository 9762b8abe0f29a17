//! What is in memory of one destination: the feeds that have news for it, and who waits for what.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use ruma::ServerName;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::edus::Waiting;
use super::{Feed, HeldFeed, lock};
use crate::event::Edu;
use crate::identity::Side;
use crate::store::outbound as rows;
use crate::store::{Store, StoreError};

/// How many feeds' places a destination's worker keeps in memory.
const PLACES: usize = 1024;

#[derive(Default)]
pub(super) struct Slot {
    dirty: Mutex<Dirty>,
    places: Mutex<HashMap<Feed, i64>>,
    held: Mutex<BTreeMap<Feed, HeldFeed>>,
    /// The feeds of which the destination takes nothing, and since when, also when single events of them are given up.
    refused: Mutex<BTreeMap<Feed, i64>>,
    edus: Mutex<Waiting>,
    news: Notify,
    was_heard: AtomicBool,
    heard: Notify,
}

/// The feeds that may have events for the destination, the one that has waited longest first.
#[derive(Default)]
struct Dirty {
    order: VecDeque<Feed>,
    known: HashMap<Feed, News>,
}

/// What is known of a feed that has news.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    /// Only its head has moved, to here: who gets the feed, and up to where, is as it was.
    Head(i64),
    /// The store knows.
    Ask,
}

impl News {
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Head(one), Self::Head(other)) => Self::Head(one.max(other)),
            _ => Self::Ask,
        }
    }
}

impl Slot {
    /// A feed has news.
    pub(super) fn add(&self, feed: Feed, news: News) {
        let mut dirty = lock(&self.dirty);
        match dirty.known.get_mut(&feed) {
            Some(known) => *known = known.and(news),
            None => {
                dirty.known.insert(feed.clone(), news);
                dirty.order.push_back(feed);
            }
        }
        drop(dirty);
        self.news.notify_one();
    }

    /// Puts feeds back to the front, in their order.
    pub(super) fn put_back(&self, feeds: impl DoubleEndedIterator<Item = Feed>) {
        let mut dirty = lock(&self.dirty);
        for feed in feeds.rev() {
            if dirty.known.insert(feed.clone(), News::Ask).is_some() {
                dirty.order.retain(|known| *known != feed);
            }
            dirty.order.push_front(feed);
        }
    }

    /// Up to where the destination has a feed that has no end for it, or has it in what is on its way.
    pub(super) fn place(&self, feed: &Feed) -> Option<i64> {
        lock(&self.places).get(feed).copied()
    }

    /// Remembers that, or forgets it.
    pub(super) fn set_place(&self, feed: &Feed, place: Option<i64>) {
        let mut places = lock(&self.places);
        let Some(place) = place else {
            places.remove(feed);
            return;
        };
        if places.len() >= PLACES && !places.contains_key(feed) {
            places.clear();
        }
        places.insert(feed.clone(), place);
    }

    /// The destination failed on an event of a feed, which is left alone for a while. It did so before where it has taken nothing else.
    pub(super) fn hold(&self, mut held: HeldFeed) {
        held.since = *lock(&self.refused).entry(held.feed.clone()).or_insert(held.since);
        lock(&self.held).insert(held.feed.clone(), held);
    }

    /// The destination has taken something of these feeds, or has said that it does not want it.
    pub(super) fn takes<'a>(&self, feeds: impl IntoIterator<Item = &'a Feed>) {
        let mut refused = lock(&self.refused);
        if refused.is_empty() {
            return;
        }
        for feed in feeds {
            refused.remove(feed);
        }
    }

    /// It is not any more: the event has arrived, or was given up.
    pub(super) fn release<'a>(&self, feeds: impl IntoIterator<Item = &'a Feed>) {
        let mut held = lock(&self.held);
        for feed in feeds {
            held.remove(feed);
        }
    }

    /// The feeds of which an event is tried again and again.
    pub(super) fn held(&self) -> Vec<HeldFeed> {
        lock(&self.held).values().cloned().collect()
    }

    /// What was composed was given up: the store knows where the destination is.
    pub(super) fn forget_places(&self) {
        lock(&self.places).clear();
    }

    /// Takes up to `limit` feeds that go by the protocol of the first one.
    pub(super) fn take(&self, limit: usize) -> Vec<(Feed, News)> {
        let mut dirty = lock(&self.dirty);
        let Some(protocol) = dirty.order.front().map(|feed| feed.kind.protocol()) else { return Vec::new() };
        let mut taken = Vec::new();
        let mut left = VecDeque::new();
        while taken.len() < limit {
            match dirty.order.pop_front() {
                Some(feed) if feed.kind.protocol() == protocol => {
                    let news = dirty.known.remove(&feed).unwrap_or(News::Ask);
                    taken.push((feed, news));
                }
                Some(feed) => left.push_back(feed),
                None => break,
            }
        }
        left.append(&mut dirty.order);
        dirty.order = left;
        taken
    }

    /// An EDU that is worth nothing later.
    pub(super) fn add_edu(&self, side: Side, edu: &Edu) {
        if lock(&self.edus).add(side, edu, Instant::now()) {
            self.news.notify_one();
        }
    }

    /// The EDUs that wait.
    pub(super) fn edus(&self) -> MutexGuard<'_, Waiting> {
        lock(&self.edus)
    }

    /// Whether there may be events for the destination.
    pub(super) fn has_events(&self) -> bool {
        !lock(&self.dirty).order.is_empty()
    }

    pub(super) fn is_clean(&self) -> bool {
        lock(&self.dirty).order.is_empty() && lock(&self.edus).is_empty()
    }

    /// Waits until there may be news.
    pub(super) fn news(&self) -> impl Future<Output = ()> + '_ {
        self.news.notified()
    }

    /// The destination was heard of.
    pub(super) fn heard(&self) {
        self.was_heard.store(true, Ordering::SeqCst);
        self.heard.notify_waiters();
    }

    /// What was heard before this does not count.
    pub(super) fn listen(&self) {
        self.was_heard.store(false, Ordering::SeqCst);
    }

    /// Waits until the destination has been heard of since the last [`Self::listen`].
    pub(super) async fn until_heard(&self) {
        loop {
            let notified = self.heard.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            if self.was_heard.load(Ordering::SeqCst) {
                return;
            }
            notified.await;
        }
    }

    /// After a worker has lost its place: every feed that has something for the destination.
    pub(super) async fn everything_again(&self, store: &Store, destination: &ServerName) -> Result<(), StoreError> {
        self.forget_places();
        let keys = rows::unfinished(store).await?;
        for key in keys.into_iter().filter(|key| key.destination == destination.as_str()) {
            self.add(Feed::parse(&key.kind, key.room_id)?, News::Ask);
        }
        Ok(())
    }
}
