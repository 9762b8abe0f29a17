//! Space for one more portal. Where there are as many as may be, the oldest that nobody uses and no admin wants gives way, so
//! that nobody keeps others out with portals that are of no use to anybody.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use ruma::UserId;

use super::core::Core;
use super::ends;
use super::portal::Portal;
use super::registry::Entry;
use super::users::Who;
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::store::portals;

/// How long a portal is young: who asked for it is on the way. In milliseconds.
const YOUNG_MS: i64 = 300_000;
/// How long it counts that a user was asked to come in, or has asked, in milliseconds after the portal was made.
const ASKED_MS: i64 = 24 * 3_600_000;
/// How many portals are looked at for one that is to be made. The next one goes on from there.
const LOOKED_AT: i64 = 100;

const WHY: &str = "nobody uses it, and there are as many portals as there may be";

/// Up to which number all portals were in use when it was looked.
#[derive(Default)]
pub(super) struct LookedAt(AtomicI64);

/// Refuses what cannot be made, before anything is done for it.
pub(super) async fn room_for_one_more(core: &Core) -> Result<(), Refusal> {
    match is_full(core).await? {
        Some(refusal) if unused(core).await?.is_none() => Err(refusal),
        _ => Ok(()),
    }
}

/// Ends a portal that nobody uses when there are as many as may be. Whether there is space then is for the caller to see.
pub(super) async fn make_space(core: &Arc<Core>) -> Result<(), Refusal> {
    let Some(full) = is_full(core).await? else { return Ok(()) };
    let Some(entry) = unused(core).await? else { return Err(full) };
    tracing::info!(portal = entry.portal().portal_id, "a portal that nobody uses gives way to a new one");
    if let Err(refusal) = ends::end(core, &entry, WHY).await {
        // It is tried again by whoever failed; who needs the space is told that there is none.
        tracing::warn!(portal = entry.portal().portal_id, %refusal, "a portal could not be ended");
    }
    Ok(())
}

async fn is_full(core: &Core) -> Result<Option<Refusal>, Refusal> {
    let count = portals::count_open(core.context.store.reader()).await?;
    Ok(one_more_of(count, core.context.config.access.max_portals).err())
}

/// Whether there may be one more portal than `count`.
pub(super) fn one_more_of(count: i64, limit: u32) -> Result<(), Refusal> {
    if count < i64::from(limit) {
        return Ok(());
    }
    Err(Refusal::Policy(format!("there are {count} portals, max_portals is {limit}")))
}

async fn unused(core: &Core) -> Result<Option<Arc<Entry>>, Refusal> {
    let looked_at = &core.creations.looked_at.0;
    let (old, after) = (core.now_ms().saturating_sub(YOUNG_MS), looked_at.load(Ordering::Relaxed));
    let numbers = portals::nobodys(&core.context.store, old, after, LOOKED_AT).await?;
    let asked_since = core.now_ms().saturating_sub(ASKED_MS);
    for (number, created_ts) in &numbers {
        if let Some(entry) = core.registry.get(*number)
            && entry.portal().state.may_give_way()
            && !is_used(core, &entry.portal(), *created_ts > asked_since).await?
        {
            return Ok(Some(entry));
        }
    }
    // The next time on from here, or from the start again.
    let is_all = i64::try_from(numbers.len()).is_ok_and(|count| count < LOOKED_AT);
    looked_at.store(if is_all { 0 } else { numbers.last().map_or(0, |(number, _)| *number) }, Ordering::Relaxed);
    Ok(None)
}

/// Whether a user is in whom the portal is for; or may be about to come in, where `asked` says that this counts.
async fn is_used(core: &Core, portal: &Portal, asked: bool) -> Result<bool, Refusal> {
    let (sides, side) = (core.sides()?, portal.is_for());
    if side == Side::Matrix {
        for user in &sides.dag.joined(&portal.matrix_room_id).await? {
            if is_native(core, side, user).await? {
                return Ok(true);
            }
        }
        if !asked {
            return Ok(false);
        }
    }
    // Of a graph only when nobody is in the whole state is read.
    let state = sides.rooms(side).state(portal.room(side)).await?;
    let counts = |membership: &str| membership == "join" || (asked && matches!(membership, "invite" | "knock"));
    for entry in state.members().into_iter().filter(|entry| counts(entry.membership())) {
        let Ok(user) = <&UserId>::try_from(entry.state_key) else { continue };
        if is_native(core, side, user).await? {
            return Ok(true);
        }
    }
    Ok(false)
}

async fn is_native(core: &Core, side: Side, user: &UserId) -> Result<bool, Refusal> {
    Ok(matches!(core.users.who(&core.context.store, side, user).await?, Who::Native { .. }))
}
