//! An invite of a ghost that comes to nothing: whom it stands for cannot be invited, or their server says no. The gateway is the
//! ghost's server, so the ghost declines where it was invited, and everybody there sees that nobody will come.

use ruma::OwnedUserId;

use super::core::Core;
use super::portal::Portal;
use super::side::{Event, MEMBER};
use super::users::Who;
use crate::identity::Side;
use crate::refusal::Refusal;

/// The longest reason, in characters.
const REASON_LIMIT: usize = 300;

/// Has the ghost that `event` invites decline, because of `refusal`. Before that is recorded, so that a crash in between repeats
/// both, and so does a failure that may pass, which is the error here. Where the room's rules do not let the ghost decline the
/// invite stays open.
pub(super) async fn decline(
    core: &Core,
    portal: &Portal,
    source: Side,
    event: &Event,
    refusal: &Refusal,
) -> Result<(), Refusal> {
    let Some((ghost, "invite")) = event.membership() else { return Ok(()) };
    if portal.is_one_room() {
        return Ok(());
    }
    match leave(core, portal, source, event, ghost, refusal).await {
        Err(refusal) if refusal.is_transient() => Err(refusal),
        Err(refusal) => {
            tracing::warn!(portal = portal.portal_id, event = %event.event_id, %refusal, "an invite stays open");
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

async fn leave(
    core: &Core,
    portal: &Portal,
    source: Side,
    event: &Event,
    ghost: OwnedUserId,
    refusal: &Refusal,
) -> Result<(), Refusal> {
    if !matches!(core.users.who(&core.context.store, source, &ghost).await?, Who::Ghost { .. }) {
        return Ok(());
    }
    let key = (MEMBER.to_owned(), ghost.to_string());
    let state = core.sides()?.rooms(source).pick(portal.room(source), &[key]).await?;
    // Another invite may have come since, which is another matter.
    if state.member(&ghost).is_none_or(|entry| *entry.event_id != event.event_id) {
        return Ok(());
    }
    let mut draft = core.member(&ghost, &ghost, "leave");
    let reason: String = refusal.to_string().chars().take(REASON_LIMIT).collect();
    draft.content.insert("reason".to_owned(), reason.into());
    core.send(portal, source, draft).await.map(drop)
}
