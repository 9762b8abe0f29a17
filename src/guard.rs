//! What one event cannot do to others: a check that panics is a verdict on its event. It would panic again whenever the event
//! is sent again, and would hold up all that its server sends.

use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use futures::FutureExt as _;
use ruma::{EventId, OwnedRoomId, RoomId};

use crate::refusal::Refusal;

/// In how many rooms events go one by one, and for how long: those of the failed batch come again within that time.
const CAREFUL: u64 = 1_000;
const CAREFUL_FOR: Duration = Duration::from_secs(24 * 3600);

/// A check of the event `id`.
pub async fn guarded<T>(id: &impl Display, check: impl Future<Output = Result<T, Refusal>>) -> Result<T, Refusal> {
    AssertUnwindSafe(check).catch_unwind().await.unwrap_or_else(|_| Err(fails_on(id)))
}

/// The same without waiting for anything.
pub fn guarded_now<T>(id: &impl Display, check: impl FnOnce() -> Result<T, Refusal>) -> Result<T, Refusal> {
    catch_unwind(AssertUnwindSafe(check)).unwrap_or_else(|_| Err(fails_on(id)))
}

/// The verdict.
pub fn fails_on(id: &impl Display) -> Refusal {
    tracing::error!(event = %id, "this gateway failed on an event");
    Refusal::Fails(id.to_string())
}

/// Rooms in which what is done for many events together has panicked. There each is done alone, so that the next panic is the
/// verdict on one event.
pub struct Careful(moka::sync::Cache<OwnedRoomId, ()>);

impl Default for Careful {
    fn default() -> Self {
        Self(moka::sync::Cache::builder().max_capacity(CAREFUL).time_to_live(CAREFUL_FOR).build())
    }
}

impl Careful {
    /// Whether events of a room are to go one by one.
    pub fn is(&self, room_id: &RoomId) -> bool {
        self.0.contains_key(room_id)
    }

    /// Something panicked that was done for `events`. The verdict is the one event's, if it is one.
    pub fn panicked(&self, room_id: &RoomId, events: &[&EventId]) -> Refusal {
        if let [event_id] = events {
            self.0.invalidate(room_id);
            return fails_on(event_id);
        }
        tracing::error!(room = %room_id, events = events.len(), "this gateway failed on one of several events");
        self.0.insert(room_id.to_owned(), ());
        Refusal::Internal("this gateway failed on one of several events".to_owned())
    }
}

/// Where this crate's own tests have a check panic: at the place that an event's type names.
#[cfg(test)]
pub fn trip(place: &str, kind: &impl Display) {
    assert!(kind.to_string().strip_prefix("test.panic.") != Some(place), "as a test wants");
}

/// Nothing: only tests have checks panic.
#[cfg(not(test))]
#[inline]
pub fn trip(_: &str, _: &impl Display) {}
