//! Leaves that are owed: another server may have taken a join of a user of ours whose answer could not be used here. Nobody here is in
//! that room, and there the user would be for good. So that a join may be under way is written down before it is sent, and where it
//! comes to nothing, or the gateway ends meanwhile, the user leaves that room again, across restarts, for a day. Not before nobody
//! has tried again for a while, where another try may help: a leave also ends the invite that it needs.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use futures::future::join_all;
use ruma::{RoomId, ServerName, UserId};

use super::errands::{Errands, LONGEST_PAUSE_MS, Runner, again};
use crate::clock::SharedClock;
use crate::event::RoomVersion;
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::store::owed as stored;
pub use crate::store::owed::OwedLeave;
use crate::store::{Store, StoreError};

/// How many leaves may be owed.
const OWED: i64 = 1_000;
/// How many users leave at once, each another server's room.
const AT_ONCE: i64 = 32;
/// How long who could not be told of a join may try again: longer than anybody here waits between two tries. By then a server that was
/// slow to take it has done so, and is believed when it says that there is nobody to leave.
const ANOTHER_TRY: Duration = Duration::from_secs(90 * 60);
const ANOTHER_TRY_MS: i64 = 90 * 60 * 1000;
/// How long a leave is put off at most, in milliseconds.
pub const LONGEST_OWED_MS: i64 = if ANOTHER_TRY_MS > LONGEST_PAUSE_MS { ANOTHER_TRY_MS } else { LONGEST_PAUSE_MS };
/// How long a leave waits for a join into the same room that is under way.
const JOINING: Duration = Duration::from_secs(5);

/// The leaves that are owed on one side.
pub struct OwedLeaves {
    side: Side,
    store: Store,
    clock: SharedClock,
    errands: Errands,
    /// By how much all is done sooner.
    haste: AtomicU32,
}

/// The side whose users leave.
#[async_trait]
pub trait Leaver: Send + Sync + Sized + 'static {
    /// What is owed.
    fn owed(&self) -> &OwedLeaves;

    /// Whether somebody joins a room.
    fn is_joining(&self, room_id: &RoomId) -> bool;

    /// Has a user leave by [`OwedLeaves::settle`], while nobody joins the room.
    async fn leave_in_turn(&self, leave: &OwedLeave) -> Result<(), StoreError>;
}

impl OwedLeaves {
    /// Those of a side.
    pub fn new(side: Side, store: Store, clock: SharedClock) -> Self {
        Self { side, store, clock, errands: Errands::default(), haste: AtomicU32::new(1) }
    }

    /// A user's join is about to be sent to a server: by which version, where the leave is made by it too. Nobody else joins the room
    /// until it is said what came of it.
    pub async fn begin(
        &self,
        server: &ServerName,
        room_id: &RoomId,
        user_id: &UserId,
        version: Option<RoomVersion>,
    ) -> Result<OwedLeave, StoreError> {
        let leave = OwedLeave {
            side: self.side,
            server: server.to_owned(),
            room_id: room_id.to_owned(),
            user_id: user_id.to_owned(),
            version,
            made_ts: self.clock.now_ms(),
            tries: 0,
        };
        let join = leave.clone();
        self.store.write(move |tx| Box::pin(async move { stored::begin_join(tx, &join).await })).await?;
        Ok(leave)
    }

    /// The server has not taken the join.
    pub async fn refused(&self, join: OwedLeave) {
        let OwedLeave { server, room_id, user_id: user, .. } = join.clone();
        let write = self.store.write(move |tx| Box::pin(async move { stored::join_refused(tx, &join).await }));
        if let Err(error) = write.await {
            // After the next start it is seen that there is nothing to leave.
            tracing::info!(room = %room_id, %server, %user, %error, "a leave may be owed that is not");
        }
    }

    /// What came of the join cannot be used here, and the server may have taken it: `refusal` says why. The user leaves `at_once`, or
    /// when nobody has tried again for a while.
    pub async fn owe(&self, join: OwedLeave, refusal: &Refusal, at_once: bool) {
        let OwedLeave { server, room_id, user_id: user, .. } = join.clone();
        tracing::warn!(
            room = %room_id, %server, %user, %refusal,
            "a join that the server may have taken cannot be used: the user leaves again"
        );
        let now = self.clock.now_ms();
        let next = if at_once { now } else { self.after(now, ANOTHER_TRY) };
        let leave = OwedLeave { made_ts: now, ..join };
        let write =
            self.store.write(move |tx| Box::pin(async move { stored::owe_leave(tx, &leave, next, OWED).await }));
        match write.await {
            // It is looked for when the join has ended.
            Ok(true) => {}
            Ok(false) => {
                tracing::warn!(room = %room_id, %server, %user, "the user does not leave again: too many are to leave already");
            }
            Err(error) => {
                // After the next start it is seen that the join was broken off.
                tracing::warn!(room = %room_id, %server, %user, %error, "that the user is to leave again could not be kept");
            }
        }
    }

    /// A user has come in.
    pub async fn came_in(&self, room_id: &RoomId, user: &UserId) {
        let (room, who) = (room_id.to_owned(), user.to_owned());
        let forgotten =
            self.store.write(move |tx| Box::pin(async move { stored::forget_owed_leaves(tx, &room, &who).await }));
        if let Err(error) = forgotten.await {
            // When it is due it is seen that they are in the room.
            tracing::info!(room = %room_id, %user, %error, "a leave is owed that is not");
        }
    }

    /// Before anybody joins: nobody knows what came of what was under way when the gateway ended.
    pub async fn resume(&self) -> Result<(), StoreError> {
        let (side, now) = (self.side, self.clock.now_ms());
        let next = self.after(now, ANOTHER_TRY);
        let write =
            self.store.write(move |tx| Box::pin(async move { stored::owe_broken_off(tx, side, (now, next)).await }));
        match write.await? {
            0 => {}
            joins => tracing::warn!(
                joins,
                side = side.as_str(),
                "joins were broken off: where nobody tries again, the users leave"
            ),
        }
        Ok(())
    }

    /// Somebody may have to leave; `find` gives the side, as long as it is there.
    pub fn attend<L: Leaver>(&self, find: impl Fn() -> Option<L> + Send + 'static) {
        self.errands.run_soon(move || find().map(Leaving));
    }

    /// Does all of this so many times faster: for tests.
    pub fn hasten(&self, times: u32) {
        self.haste.store(times, Ordering::Relaxed);
        self.errands.look_again();
    }

    /// Sees to a leave, if it is still due: `leaving` has the user leave, unless there is nothing to leave any more.
    pub async fn settle(
        &self,
        leave: &OwedLeave,
        leaving: impl Future<Output = Result<(), Refusal>> + Send,
    ) -> Result<(), StoreError> {
        let now = self.clock.now_ms();
        if stored::owed_leave(&self.store, leave).await?.is_none_or(|next| next > now) {
            return Ok(());
        }
        let left = leaving.await;
        let OwedLeave { server, room_id, user_id: user, made_ts, tries, .. } = leave;
        let pause = again(*made_ts, *tries, now);
        match (&left, pause) {
            (Ok(()), _) => {
                tracing::info!(room = %room_id, %server, %user, "what followed from a join of no use is settled");
            }
            (Err(refusal), Some(_)) => {
                tracing::info!(room = %room_id, %server, %user, tries, %refusal, "a room is not left again yet");
            }
            (Err(refusal), None) => {
                tracing::warn!(
                    room = %room_id, %server, %user, %refusal,
                    "a room is not left again: the user may be in it there for good"
                );
            }
        }
        let (settled, tries) = (left.is_ok(), tries.saturating_add(1));
        let next = pause.map(|pause| self.after(now, pause));
        let leave = leave.clone();
        let write = self.store.write(move |tx| {
            Box::pin(async move {
                match next {
                    _ if settled => stored::forget_owed_leave(tx, &leave).await,
                    Some(next) => stored::put_off_leave(tx, &leave, tries, (now, next)).await,
                    None => stored::give_up_leave(tx, &leave, now).await,
                }
            })
        });
        write.await
    }

    /// A time that is `pause` after another, in milliseconds.
    fn after(&self, now: i64, pause: Duration) -> i64 {
        let pause = pause.checked_div(self.haste.load(Ordering::Relaxed)).unwrap_or(pause);
        now.saturating_add(i64::try_from(pause.as_millis()).unwrap_or(i64::MAX))
    }
}

/// A side whose users leave.
struct Leaving<L>(L);

#[async_trait]
impl<L: Leaver> Runner for Leaving<L> {
    fn errands(&self) -> &Errands {
        &self.0.owed().errands
    }

    fn store(&self) -> &Store {
        &self.0.owed().store
    }

    async fn run_due(&self) -> Result<Option<Duration>, StoreError> {
        let owed = self.0.owed();
        loop {
            let now = owed.clock.now_ms();
            let due = stored::owed_leaves_due(&owed.store, owed.side, now, AT_ONCE).await?;
            if due.is_empty() {
                let next = stored::next_owed_leave(&owed.store, owed.side).await?;
                let left = |next: i64| u64::try_from(next.saturating_sub(now)).unwrap_or(0);
                return Ok(next.map(|next| Duration::from_millis(left(next))));
            }
            for done in join_all(due.into_iter().map(|leave| self.see_to(leave))).await {
                done?;
            }
        }
    }
}

impl<L: Leaver> Leaving<L> {
    async fn see_to(&self, leave: OwedLeave) -> Result<(), StoreError> {
        let owed = self.0.owed();
        if !self.0.is_joining(&leave.room_id) {
            return self.0.leave_in_turn(&leave).await;
        }
        let (tries, now) = (leave.tries, owed.clock.now_ms());
        let next = owed.after(now, JOINING);
        // Another of ours joins, or who does again: then that is known now.
        let write = owed
            .store
            .write(move |tx| Box::pin(async move { stored::put_off_leave(tx, &leave, tries, (now, next)).await }));
        write.await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is put off for longer is taken for what a clock has done that was set back, and is done at once after a start.
    #[test]
    fn a_leave_is_put_off_no_longer_than_is_said() {
        assert_eq!(ANOTHER_TRY.as_millis(), u128::try_from(ANOTHER_TRY_MS).unwrap());
        assert!(ANOTHER_TRY.as_millis() <= u128::try_from(LONGEST_OWED_MS).unwrap());
        assert!(again(0, i64::MAX, 0).unwrap().as_millis() <= u128::try_from(LONGEST_OWED_MS).unwrap());
    }
}
