//! Rooms that are being joined: by one at a time, and what comes for them meanwhile waits.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ruma::{OwnedRoomId, RoomId};
use tokio::sync::Mutex as Turn;

use super::Shared;
use crate::refusal::Refusal;

/// How long events wait for the join of their room. Then their server is told to send them again, which it may do after
/// minutes only.
const PATIENCE: Duration = Duration::from_secs(20);

/// The rooms. A server may send events of one before it answers the join.
#[derive(Default)]
pub(super) struct Joining(Mutex<HashMap<OwnedRoomId, Arc<Turn<()>>>>);

impl Joining {
    fn rooms(&self) -> MutexGuard<'_, HashMap<OwnedRoomId, Arc<Turn<()>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether somebody joins the room.
    pub fn contains(&self, room_id: &RoomId) -> bool {
        self.rooms().contains_key(room_id)
    }
}

/// A place among those who wait for their turn at a room.
pub(super) struct Place {
    shared: Arc<Shared>,
    room_id: OwnedRoomId,
    turn: Arc<Turn<()>>,
}

impl Place {
    /// Waits for the turn, which lasts until what this gives is dropped.
    pub async fn turn(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.turn.lock().await
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut rooms = self.shared.joining.rooms();
        // One in the map, one here; nobody gets another without the lock.
        if Arc::strong_count(&self.turn) <= 2 {
            rooms.remove(&self.room_id);
        }
    }
}

impl Shared {
    /// Lines up for joining a room.
    pub(super) fn line_up(self: &Arc<Self>, room_id: &RoomId) -> Place {
        let turn = self.joining.rooms().entry(room_id.to_owned()).or_default().clone();
        Place { shared: self.clone(), room_id: room_id.to_owned(), turn }
    }

    /// Waits until the room is not being joined any more; true when it was.
    pub(super) async fn wait_for_join(self: &Arc<Self>, room_id: &RoomId) -> Result<bool, Refusal> {
        let Some(turn) = self.joining.rooms().get(room_id).cloned() else { return Ok(false) };
        let place = Place { shared: self.clone(), room_id: room_id.to_owned(), turn };
        match tokio::time::timeout(PATIENCE, place.turn()).await {
            Ok(_turn) => Ok(true),
            Err(_) => Err(Refusal::Internal(format!("room {room_id} is still being joined"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use ruma::room_id;

    use super::*;
    use crate::dag::Dag;
    use crate::federation::{Context, KeysOf};
    use crate::seam::Alone;

    #[tokio::test]
    async fn what_comes_for_a_room_waits_for_the_last_join_in_line() {
        let directory = tempfile::tempdir().unwrap();
        let context = Context::of_test(&directory, "gateway.example", Arc::<KeysOf>::default()).await;
        let dag = Dag::new(context, Arc::new(Alone));
        let (shared, room) = (&dag.shared, room_id!("!room:other.example"));
        assert!(!shared.wait_for_join(room).await.unwrap());
        let place = shared.line_up(room);
        let turn = place.turn().await;
        let (waiting, room_id) = (shared.clone(), room.to_owned());
        let waiting = tokio::spawn(async move { waiting.wait_for_join(&room_id).await });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished() && shared.joining.contains(room));
        drop(turn);
        drop(place);
        assert!(waiting.await.unwrap().unwrap());
        assert!(!shared.joining.contains(room), "the last one takes the place away");
        dag.shared.context.store.close().await;
    }
}
