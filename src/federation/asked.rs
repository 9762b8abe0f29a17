//! Invites on their way: those that another server is asked to sign.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ruma::{OwnedRoomId, OwnedUserId, RoomId, UserId};
use tokio::sync::watch;

/// How long an invited user's answer waits for the invite to be in the room.
const ANSWER_WAITS: Duration = Duration::from_secs(5);

/// The invites that their targets' servers are being asked about, how many of each room and user. A server may show an invite to its
/// user while it signs, and that user may answer before the signature is here: the answer waits. Clones share it.
#[derive(Clone, Default)]
pub struct Asked(Arc<Mutex<Counts>>);

type Counts = HashMap<(OwnedRoomId, OwnedUserId), watch::Sender<usize>>;

/// One invite, until it is in the room or will not be.
pub struct Asking {
    asked: Asked,
    key: (OwnedRoomId, OwnedUserId),
}

impl Asked {
    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that an invite is on its way until what this gives is dropped.
    pub fn begin(&self, room_id: &RoomId, user: &UserId) -> Asking {
        let key = (room_id.to_owned(), user.to_owned());
        self.lock().entry(key.clone()).or_insert_with(|| watch::Sender::new(0)).send_modify(|count| {
            *count = count.saturating_add(1);
        });
        Asking { asked: self.clone(), key }
    }

    /// Waits until no invite of a user is on its way into a room. Not for long, since the server that is asked may be waiting for our
    /// answer before it signs.
    pub async fn settled(&self, room_id: &RoomId, user: &UserId) {
        let key = (room_id.to_owned(), user.to_owned());
        let Some(mut count) = self.lock().get(&key).map(watch::Sender::subscribe) else { return };
        if tokio::time::timeout(ANSWER_WAITS, count.wait_for(|count| *count == 0)).await.is_err() {
            // Once is enough.
            self.lock().remove(&key);
        }
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        let mut asked = self.asked.lock();
        if let Some(count) = asked.get(&self.key) {
            count.send_modify(|count| *count = count.saturating_sub(1));
            if *count.borrow() == 0 {
                asked.remove(&self.key);
            }
        }
    }
}
