//! Leaves that are owed: a foreign hub may have taken a join of a user of ours whose answer could not be used here. Nobody here is in
//! that room, and there the user would be for good. So the user leaves it again, across restarts, for a day: at once where the join
//! can come to nothing, and otherwise when nobody has tried again for a while, since a leave also ends the invite that the next try needs.

use std::time::Duration;

use ruma::{RoomId, ServerName, UserId};
use serde_json::json;

use super::Lm;
use crate::event::Object;
use crate::federation::RemoteError;
use crate::refusal::Refusal;
use crate::seam::Membership;
use crate::store::StoreError;
use crate::store::lm::{self as stored, OwedLeave};

/// How many leaves may be owed.
const OWED: i64 = 1_000;
/// How long who could not be told of a join may try again.
const ANOTHER_TRY: Duration = Duration::from_secs(60);
/// How long a leave waits for a join into the same room that is under way.
const JOINING: Duration = Duration::from_secs(5);
/// How long is waited after each failure.
const BACKOFF: [Duration; 4] =
    [Duration::from_secs(30), Duration::from_secs(5 * 60), Duration::from_secs(15 * 60), Duration::from_secs(3600)];
/// For how long it is tried.
const PATIENCE_MS: i64 = 24 * 3_600_000;

/// Whether a server that answered a join so may have taken it: it has not where it says that the request is at fault.
pub(super) fn may_have_taken(error: &RemoteError) -> bool {
    !matches!(error, RemoteError::Status { status, .. }
        if status.is_client_error() && *status != http::StatusCode::REQUEST_TIMEOUT)
}

impl Lm {
    /// A user's join was sent to a server, and what came of it cannot be used here: `refusal` says why.
    pub(super) async fn owe_leave(&self, server: &ServerName, room_id: &RoomId, user: &UserId, refusal: &Refusal) {
        tracing::warn!(
            room = %room_id, %server, %user, %refusal,
            "a join that the hub may have taken cannot be used: the user leaves again"
        );
        let now = self.context().clock.now_ms();
        let leave = OwedLeave {
            server: server.to_owned(),
            room_id: room_id.to_owned(),
            user_id: user.to_owned(),
            made_ts: now,
            tries: 0,
        };
        let next = match refusal.is_transient() {
            true => self.after(now, ANOTHER_TRY),
            false => now,
        };
        let write = self
            .context()
            .store
            .write(move |tx| Box::pin(async move { stored::owe_leave(tx, &leave, next, OWED).await }));
        match write.await {
            // It is looked for when the join has ended.
            Ok(true) => {}
            Ok(false) => {
                tracing::warn!(room = %room_id, %server, %user, "the user does not leave again: too many are to leave already");
            }
            Err(error) => {
                tracing::warn!(room = %room_id, %server, %user, %error, "that the user is to leave again could not be kept");
            }
        }
    }

    /// A user has come in after all.
    pub(super) async fn owes_no_leave(&self, room_id: &RoomId, user: &UserId) {
        let (room, who) = (room_id.to_owned(), user.to_owned());
        let store = &self.context().store;
        let forgotten =
            store.write(move |tx| Box::pin(async move { stored::forget_owed_leaves(tx, &room, &who).await })).await;
        if let Err(error) = forgotten {
            // When it is due it is seen that they are in the room.
            tracing::info!(room = %room_id, %user, %error, "a leave is owed that is not");
        }
    }

    /// Has a user leave that is to, unless they have come in meanwhile or are coming in.
    pub(super) async fn leave_owed(&self, leave: OwedLeave) -> Result<(), StoreError> {
        let (now, store) = (self.context().clock.now_ms(), &self.context().store);
        if self.joining().contains(&leave.room_id) {
            let (tries, next) = (leave.tries, self.after(now, JOINING));
            return store
                .write(move |tx| Box::pin(async move { stored::put_off_leave(tx, &leave, tries, next).await }))
                .await;
        }
        let left = self.in_turn(&leave.room_id, self.leave_if_due(&leave, now)).await;
        let OwedLeave { server, room_id, user_id, made_ts, tries } = &leave;
        let again = match left {
            Ok(false) => return Ok(()),
            Ok(true) => {
                tracing::info!(room = %room_id, %server, user = %user_id, "what followed from a join of no use is settled");
                None
            }
            Err(refusal) if refusal.is_transient() && now.saturating_sub(*made_ts) < PATIENCE_MS => {
                tracing::info!(room = %room_id, %server, user = %user_id, tries, %refusal, "a room is not left again yet");
                let pause = usize::try_from(*tries).ok().and_then(|tries| BACKOFF.get(tries)).or(BACKOFF.last());
                Some(self.after(now, pause.copied().unwrap_or_default()))
            }
            Err(refusal) => {
                tracing::warn!(
                    room = %room_id, %server, user = %user_id, %refusal,
                    "a room is not left again: its hub may have the user in it"
                );
                None
            }
        };
        let tries = tries.saturating_add(1);
        let write = store.write(move |tx| {
            Box::pin(async move {
                match again {
                    Some(next) => stored::put_off_leave(tx, &leave, tries, next).await,
                    None => stored::forget_owed_leave(tx, &leave).await,
                }
            })
        });
        write.await
    }

    /// Whether it is settled; not, where it is not due any more. Nobody joins the room meanwhile.
    async fn leave_if_due(&self, leave: &OwedLeave, now: i64) -> Result<bool, Refusal> {
        let OwedLeave { server, room_id, user_id, .. } = leave;
        if stored::owed_leave(&self.context().store, leave).await?.is_none_or(|next| next > now) {
            return Ok(false);
        }
        match self.find(room_id).await {
            Ok((_, room)) if room.membership(user_id.as_str()) == Some(Membership::Join.as_str()) => return Ok(true),
            Ok(_) | Err(Refusal::UnknownRoom(_)) => {}
            Err(refusal) => return Err(refusal),
        }
        let content = Object::from_iter([("membership".to_owned(), json!(Membership::Leave.as_str()))]);
        let draft = self.own_member(user_id, content);
        match self.leave_through(server, room_id, &draft, true).await {
            Ok(()) => Ok(true),
            // It says that there is nobody who could leave.
            Err(refusal @ (Refusal::Forbidden(_) | Refusal::NotFound(_))) => {
                tracing::info!(room = %room_id, %server, user = %user_id, %refusal, "there is nothing to leave again");
                Ok(true)
            }
            Err(refusal) => Err(refusal),
        }
    }

    /// A time that is `pause` after another, in milliseconds.
    fn after(&self, now: i64, pause: Duration) -> i64 {
        let pause = self.looks().pace(pause);
        now.saturating_add(i64::try_from(pause.as_millis()).unwrap_or(i64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use http::StatusCode;

    use super::*;

    #[test]
    fn a_join_was_not_taken_where_the_request_is_refused() {
        let status = |status| {
            let (errcode, error) = (String::new(), String::new());
            may_have_taken(&RemoteError::Status { status, errcode, error, retry_after: None, hub_server: None })
        };
        for refused in
            [StatusCode::BAD_REQUEST, StatusCode::FORBIDDEN, StatusCode::NOT_FOUND, StatusCode::TOO_MANY_REQUESTS]
        {
            assert!(!status(refused), "{refused}");
        }
        for uncertain in [StatusCode::INTERNAL_SERVER_ERROR, StatusCode::GATEWAY_TIMEOUT, StatusCode::REQUEST_TIMEOUT] {
            assert!(status(uncertain), "{uncertain}");
        }
        assert!(may_have_taken(&RemoteError::BadAnswer("no JSON".to_owned())));
        assert!(may_have_taken(&RemoteError::Unreachable("timed out".to_owned())));
    }
}
