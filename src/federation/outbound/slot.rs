//! What is in memory of one destination: the feeds that have news for it, and who waits for what.

use std::collections::{HashSet, VecDeque};
use std::future::Future;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use ruma::ServerName;
use tokio::sync::Notify;

use super::{Feed, lock};
use crate::store::Store;
use crate::store::outbound as rows;

#[derive(Default)]
pub(super) struct Slot {
    dirty: Mutex<Dirty>,
    news: Notify,
    was_heard: AtomicBool,
    heard: Notify,
}

/// The feeds that may have events for the destination, the one that has waited longest first.
#[derive(Default)]
struct Dirty {
    order: VecDeque<Feed>,
    known: HashSet<Feed>,
}

impl Slot {
    /// A feed has news.
    pub(super) fn add(&self, feed: Feed) {
        let mut dirty = lock(&self.dirty);
        if dirty.known.insert(feed.clone()) {
            dirty.order.push_back(feed);
        }
        drop(dirty);
        self.news.notify_one();
    }

    /// Puts feeds back to the front, in their order.
    pub(super) fn put_back(&self, feeds: impl DoubleEndedIterator<Item = Feed>) {
        let mut dirty = lock(&self.dirty);
        for feed in feeds.rev() {
            if !dirty.known.insert(feed.clone()) {
                dirty.order.retain(|known| *known != feed);
            }
            dirty.order.push_front(feed);
        }
    }

    /// Takes up to `limit` feeds that go by the protocol of the first one.
    pub(super) fn take(&self, limit: usize) -> Vec<Feed> {
        let mut dirty = lock(&self.dirty);
        let Some(protocol) = dirty.order.front().map(|feed| feed.kind.protocol()) else { return Vec::new() };
        let mut taken = Vec::new();
        let mut left = VecDeque::new();
        while taken.len() < limit {
            match dirty.order.pop_front() {
                Some(feed) if feed.kind.protocol() == protocol => {
                    dirty.known.remove(&feed);
                    taken.push(feed);
                }
                Some(feed) => left.push_back(feed),
                None => break,
            }
        }
        left.append(&mut dirty.order);
        dirty.order = left;
        taken
    }

    pub(super) fn is_clean(&self) -> bool {
        lock(&self.dirty).order.is_empty()
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
    pub(super) async fn everything_again(&self, store: &Store, destination: &ServerName) {
        match rows::unfinished(store).await {
            Ok(keys) => {
                for key in keys.into_iter().filter(|key| key.destination == destination.as_str()) {
                    if let Ok(feed) = Feed::parse(&key.kind, key.room_id) {
                        self.add(feed);
                    }
                }
            }
            Err(error) => tracing::error!(%error, server = %destination, "an outbound queue could not be read"),
        }
    }
}
