//! Invites on their way: those that another server is asked to sign, and those that another server has made.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ruma::{OwnedRoomId, OwnedUserId, RoomId, UserId};
use tokio::sync::{Notify, Semaphore, watch};

/// How long an invited user's answer waits for the invite to be in the room.
const ANSWER_WAITS: Duration = Duration::from_secs(5);

/// How long who answers an invite waits for it to come from the server that has made it.
const INVITE_COMES: Duration = Duration::from_secs(3);
/// How many may wait so at once: those who ask need not have been invited.
const HOPEFUL: usize = 64;

/// The invites that their targets' servers are being asked about, how many of each room and user. A server may show an invite to its
/// user while it signs, and that user may answer before the signature is here: the answer waits. Clones share it.
#[derive(Clone)]
pub struct Asked {
    counts: Arc<Mutex<Counts>>,
    hopeful: Arc<Semaphore>,
}

impl Default for Asked {
    fn default() -> Self {
        Self { counts: Arc::default(), hopeful: Arc::new(Semaphore::new(HOPEFUL)) }
    }
}

type Counts = HashMap<(OwnedRoomId, OwnedUserId), Count>;
type Count = Arc<watch::Sender<usize>>;

/// One invite, until it is in the room or will not be.
pub struct Asking {
    asked: Asked,
    key: (OwnedRoomId, OwnedUserId),
    count: Count,
}

impl Asked {
    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that an invite is on its way until what this gives is dropped.
    pub fn begin(&self, room_id: &RoomId, user: &UserId) -> Asking {
        let key = (room_id.to_owned(), user.to_owned());
        let mut counts = self.lock();
        let count = counts.entry(key.clone()).or_insert_with(|| Arc::new(watch::Sender::new(0))).clone();
        count.send_modify(|count| *count = count.saturating_add(1));
        drop(counts);
        Asking { asked: self.clone(), key, count }
    }

    /// Waits until no invite of a user is on its way into a room. Not for long, since the server that is asked may be waiting for our
    /// answer before it signs.
    pub async fn settled(&self, room_id: &RoomId, user: &UserId) {
        self.settled_within(ANSWER_WAITS, room_id, user).await;
    }

    async fn settled_within(&self, time: Duration, room_id: &RoomId, user: &UserId) {
        let key = (room_id.to_owned(), user.to_owned());
        let Some(count) = self.lock().get(&key).cloned() else { return };
        let mut changes = count.subscribe();
        if tokio::time::timeout(time, changes.wait_for(|count| *count == 0)).await.is_err() {
            // Once is enough.
            self.forget(&key, &count);
        }
    }

    /// Forgets those that are counted so, not those that were begun since.
    fn forget(&self, key: &(OwnedRoomId, OwnedUserId), count: &Count) {
        let mut counts = self.lock();
        if counts.get(key).is_some_and(|current| Arc::ptr_eq(current, count)) {
            counts.remove(key);
        }
    }

    /// Waits a moment for an invite that another server of the room may have made: its user hears of it before this server does, and may
    /// answer at once. `is_there` is asked with each of `changes` of the room.
    pub async fn comes(&self, changes: &Notify, is_there: impl Fn() -> bool) {
        let Ok(_hopeful) = self.hopeful.try_acquire() else { return };
        let coming = async {
            loop {
                let changed = changes.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if is_there() {
                    return;
                }
                changed.await;
            }
        };
        // Then there is none, or it is too late.
        let _ = tokio::time::timeout(INVITE_COMES, coming).await;
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        // Who begins one counts it under the same lock.
        let mut counts = self.asked.lock();
        self.count.send_modify(|count| *count = count.saturating_sub(1));
        if *self.count.borrow() == 0 && counts.get(&self.key).is_some_and(|count| Arc::ptr_eq(count, &self.count)) {
            counts.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use ruma::{room_id, user_id};

    use super::*;

    #[tokio::test]
    async fn an_invite_that_is_waited_for_no_more_ends_no_other_ones_wait() {
        let (asked, room, user) = (Asked::default(), room_id!("!r:g.example"), user_id!("@u:p.example"));
        let first = asked.begin(room, user);
        asked.settled_within(Duration::ZERO, room, user).await;
        assert!(asked.settled(room, user).now_or_never().is_some(), "once is enough");
        let second = asked.begin(room, user);
        drop(first);
        assert!(asked.settled(room, user).now_or_never().is_none(), "the second is on its way");
        drop(second);
        assert!(asked.settled(room, user).now_or_never().is_some());
        assert!(asked.lock().is_empty());
    }
}
