//! Repair (INV-4): what must be sent so that the following side's state is the image of the authority's again. It is
//! computed from both current states, never from the event that set it off.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ruma::UserId;

use super::core::Core;
use super::pins::{self, PINNED};
use super::plan::{self, Fix, Plan};
use super::portal::{Portal, PortalKind, PortalState};
use super::registry::Entry;
use super::side::State;
use super::users::{Known, Who};
use super::{access, acl, effect, ends, loops, populate, spaces};
use crate::admin::metrics;
use crate::clock::is_recent;
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::seam::{Draft, Outgoing};
use crate::store::ghosts::{self, Hashed};
use crate::store::{images, inbox};

/// How many repairs of one (type, state key) a minute may have.
const A_MINUTE: usize = 3;
/// How long after a cause the states are compared.
const SOON: Duration = Duration::from_millis(300);
/// After what time it is looked again when not everything could be repaired, at first and at most.
const AGAIN: Duration = Duration::from_secs(60);
const AGAIN_AT_MOST: Duration = Duration::from_secs(900);
/// How often it is looked whether the queues are empty, and how many times.
const QUEUES_EVERY: Duration = Duration::from_secs(1);
const QUEUES_TRIES: usize = 30;
/// The pause between two portals at the start, which has other things to do.
const AT_START: Duration = Duration::from_millis(20);
/// What the reason of a degraded portal begins with when repair made it so.
const OUT_OF_STEP: &str = "the two states cannot be brought together: ";

/// What is under way, and what was done of late.
#[derive(Debug, Default)]
pub(super) struct Repairs {
    planned: Mutex<HashSet<i64>>,
    /// Those that are not in step yet, and when they are looked at again.
    again: Mutex<HashMap<i64, Again>>,
    done: Mutex<HashMap<(i64, String, String), Vec<i64>>>,
}

#[derive(Debug, Default)]
struct Again {
    is_planned: bool,
    pause: Duration,
}

impl Repairs {
    fn plan(&self, number: i64) -> bool {
        self.planned.lock().unwrap_or_else(PoisonError::into_inner).insert(number)
    }

    fn started(&self, number: i64) {
        self.planned.lock().unwrap_or_else(PoisonError::into_inner).remove(&number);
    }

    /// After what time a portal is to be looked at again; none when that is planned already.
    fn plan_again(&self, number: i64) -> Option<Duration> {
        let mut again = self.again.lock().unwrap_or_else(PoisonError::into_inner);
        let again = again.entry(number).or_default();
        if again.is_planned {
            return None;
        }
        let pause = again.pause.saturating_mul(2).clamp(AGAIN, AGAIN_AT_MOST);
        *again = Again { is_planned: true, pause };
        Some(pause)
    }

    fn is_due_again(&self, number: i64) {
        let mut all = self.again.lock().unwrap_or_else(PoisonError::into_inner);
        match all.get_mut(&number) {
            Some(again) if again.pause > Duration::ZERO => again.is_planned = false,
            // It came into step meanwhile, and nothing is to be remembered of it.
            _ => drop(all.remove(&number)),
        }
    }

    /// Everything is in step: what was planned does no harm, and the next time it goes quicker again.
    fn is_done(&self, number: i64) {
        let mut all = self.again.lock().unwrap_or_else(PoisonError::into_inner);
        match all.get_mut(&number) {
            Some(again) if again.is_planned => again.pause = Duration::ZERO,
            _ => drop(all.remove(&number)),
        }
    }

    /// Whether one more repair of a (type, state key) is within bounds; counts it.
    fn allow(&self, number: i64, draft: &Draft, now: i64) -> bool {
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        done.retain(|_, times| {
            times.retain(|at| is_recent(*at, now, 60_000));
            !times.is_empty()
        });
        let key = (number, draft.kind.clone(), draft.state_key.clone().unwrap_or_default());
        let times = done.entry(key).or_default();
        if times.len() >= A_MINUTE {
            return false;
        }
        times.push(now);
        true
    }
}

/// Repairs a portal soon, when its queues are empty. Asked for again before that, it is done once.
pub(super) fn soon(core: &Arc<Core>, entry: &Arc<Entry>) {
    if !core.repairs.plan(entry.number) {
        return;
    }
    let (core, entry) = (core.clone(), entry.clone());
    core.clone().spawn(async move {
        tokio::time::sleep(SOON).await;
        let mut tries = QUEUES_TRIES;
        let done = loop {
            tries = tries.saturating_sub(1);
            if queues_are_empty(&core, &entry.portal()).await.unwrap_or(false) || tries == 0 {
                core.repairs.started(entry.number);
                match bring_together(&core, &entry, tries == 0).await {
                    Ok(None) if core.repairs.plan(entry.number) => {}
                    // It is planned again by others.
                    Ok(None) => return,
                    Ok(Some(done)) => break Ok(done),
                    Err(refusal) => break Err(refusal),
                }
            }
            tokio::time::sleep(QUEUES_EVERY).await;
        };
        match done {
            // What was sent may have met something that came meanwhile.
            Ok(Done { sent: 1.., .. }) => soon(&core, &entry),
            Ok(Done { is_all: true, .. }) => core.repairs.is_done(entry.number),
            Ok(_) => later(&core, &entry),
            Err(refusal) => {
                tracing::warn!(portal = entry.portal().portal_id, %refusal, "repair failed");
                later(&core, &entry);
            }
        }
    });
}

/// Repairs a portal a while later, though nobody asks for it again.
fn later(core: &Arc<Core>, entry: &Arc<Entry>) {
    if !entry.portal().state.carries() {
        return;
    }
    let Some(pause) = core.repairs.plan_again(entry.number) else { return };
    let (core, entry) = (core.clone(), entry.clone());
    core.clone().spawn(async move {
        tokio::time::sleep(pause).await;
        core.repairs.is_due_again(entry.number);
        soon(&core, &entry);
    });
}

/// Compares all portals, one after the other: while the gateway was away, others may have changed.
pub(super) fn at_start(core: &Arc<Core>) {
    let inner = core.clone();
    core.spawn(async move {
        let mut last = 0;
        while let Some(entry) = inner.registry.after(last, 1).pop() {
            last = entry.number;
            if entry.portal().state.carries() && !entry.portal().is_one_room() {
                soon(&inner, &entry);
                tokio::time::sleep(AT_START).await;
            }
        }
    });
}

/// Whether nothing waits to cross, and nothing is on its way to a hub.
pub(super) async fn queues_are_empty(core: &Core, portal: &Portal) -> Result<bool, Refusal> {
    let store = &core.context.store;
    for side in [Side::Matrix, Side::Lm] {
        if inbox::backlog(store, side, portal.room(side)).await?.0 > 0 {
            return Ok(false);
        }
    }
    Ok(images::pending(store, portal.number()).await?.0 == 0)
}

/// What a repair has done.
pub(super) struct Done {
    /// How many events were sent.
    pub(super) sent: usize,
    /// Whether nothing is left that may be repaired later.
    is_all: bool,
}

/// Compares both states at once and sends what brings them together; if anything was sent, they are soon compared again.
pub(super) async fn run(core: &Arc<Core>, entry: &Arc<Entry>) -> Result<Done, Refusal> {
    let done = bring_together(core, entry, true).await?.unwrap_or(Done { sent: 0, is_all: false });
    if done.sent > 0 {
        soon(core, entry);
    }
    Ok(done)
}

/// Compares both states and sends what brings them together. Nothing is done, and none returned, when one of them has something that
/// is still to cross, unless `in_haste`: what would be sent then may undo that on the one side before it is done on the other.
async fn bring_together(core: &Arc<Core>, entry: &Arc<Entry>, in_haste: bool) -> Result<Option<Done>, Refusal> {
    let _from_matrix = entry.from_matrix.making.lock().await;
    let _from_lm = entry.from_lm.making.lock().await;
    let portal = entry.portal();
    if !portal.state.carries() || ends::look_at(core, entry).await? {
        return Ok(Some(Done { sent: 0, is_all: true }));
    }
    let Comparison { fixes, ghosts } = compare(core, &portal).await?;
    // Nothing crosses while this is under way, so that all that the states have has crossed when nothing waits now.
    if !in_haste && !fixes.is_empty() && !queues_are_empty(core, &portal).await? {
        return Ok(None);
    }
    if !fixes.is_empty() && !ghosts.is_empty() {
        let store = &core.context.store;
        store.write(move |tx| Box::pin(async move { ghosts::remember(tx, &ghosts).await })).await?;
    }
    let mut sent = 0;
    let mut stuck = None;
    let mut is_all = true;
    for fix in fixes {
        if is_on_its_way(core, &portal, &fix).await? {
            // What the hub makes of it is not known yet.
            is_all = false;
            continue;
        }
        if fix.source.is_some() && ghost_over_budget(core, entry, &fix).await? {
            // Whoever is over the budget for ghosts gets none by repair either.
            is_all = false;
            continue;
        }
        if !core.repairs.allow(entry.number, &fix.draft, core.now_ms()) {
            stuck =
                Some(format!("{} {:?} was repaired {A_MINUTE} times in a minute", fix.draft.kind, fix.draft.state_key));
            continue;
        }
        let (side, kind, state_key) = (fix.side, fix.draft.kind.clone(), fix.draft.state_key.clone());
        match apply(core, &portal, fix).await {
            Ok(()) => {
                if kind == "m.room.join_rules" {
                    spaces::soon(core, &portal.lm_hub);
                }
                sent += 1;
                metrics::repair(side);
            }
            Err(refusal) if refusal.is_transient() => return Err(refusal),
            Err(refusal) => stuck = Some(format!("{kind} {state_key:?}: {refusal}")),
        }
    }
    is_all &= stuck.is_none();
    match stuck {
        Some(stuck) => {
            core.set_state(entry, PortalState::Degraded, Some(format!("{OUT_OF_STEP}{stuck}"))).await?;
        }
        None if sent == 0 && portal.reason.as_ref().is_some_and(|reason| reason.starts_with(OUT_OF_STEP)) => {
            core.set_state(entry, PortalState::Active, None).await?;
        }
        None => {}
    }
    if sent > 0 {
        tracing::info!(portal = portal.portal_id, sent, "repaired");
    }
    Ok(Some(Done { sent, is_all }))
}

/// Whether something in the place of a repair is on its way to a foreign hub already.
async fn is_on_its_way(core: &Core, portal: &Portal, fix: &Fix) -> Result<bool, Refusal> {
    if fix.side == Side::Matrix || portal.lm_hub == core.context.server_name {
        return Ok(false);
    }
    let key = (fix.draft.kind.clone(), fix.draft.state_key.clone().unwrap_or_default());
    Ok(!core.sides()?.lm.on_its_way(&portal.lm_room_id, &[key]).await?.is_empty())
}

/// Whether the budget for ghosts does not let a ghost join; counts it.
async fn ghost_over_budget(core: &Core, entry: &Entry, fix: &Fix) -> Result<bool, Refusal> {
    let who = core.users.who(&core.context.store, fix.side, &fix.draft.sender).await?;
    let Who::Ghost { user } = who else { return Ok(false) };
    let limits = &core.context.config.budgets;
    Ok(core.budgets.ghost(limits, entry.number, user.server_name(), core.now_ms(), false).is_err())
}

/// What must be sent, by the states as they are now.
pub(super) async fn fixes(core: &Core, portal: &Portal) -> Result<Vec<Fix>, Refusal> {
    compare(core, portal).await.map(|comparison| comparison.fixes)
}

struct Comparison {
    fixes: Vec<Fix>,
    /// Those who are in the states, as far as their ghosts' names had to be hashed.
    ghosts: Vec<Hashed>,
}

async fn compare(core: &Core, portal: &Portal) -> Result<Comparison, Refusal> {
    let sides = core.sides()?;
    let authority = portal.authority();
    let leading = sides.rooms(authority).state(portal.room(authority)).await?;
    let following = sides.rooms(authority.other()).state(portal.room(authority.other())).await?;
    let leading_users = users(core, authority, &leading).await?;
    let following_users = users(core, authority.other(), &following).await?;
    let lists = [acl::of(core, &leading).await, acl::of(core, &following).await];
    let barred =
        |home: Side, user: &UserId| access::takes_part(&core.context.config.access, home, user.server_name()).is_err();
    let joining = core.joining.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let mut ghosts = core.users.hashed(authority, leading_users.keys());
    ghosts.extend(core.users.hashed(authority.other(), following_users.keys()));
    let pins = pins::counterparts(core, portal.number(), authority, leading.content(PINNED), &following).await?;
    let fixes = plan::plan(&Plan {
        authority,
        owns_leading: portal.kind == PortalKind::Created,
        replaceable: portal.is_replaceable(),
        lets_in: portal.lets_in(authority)
            && (!portal.has_ghosts_alone(authority) || leading.membership(core.users.bot()) == "join"),
        leading: &leading,
        following: &following,
        leading_users: &leading_users,
        following_users: &following_users,
        bot: core.users.bot(),
        media: &core.context.media,
        aliases: core.aliases(portal.address()),
        pins: &pins,
        spared: &|side, user| joining.contains_key(&(portal.room(side).to_owned(), user.to_owned())),
        denied: &|home, user| {
            let server = user.server_name();
            barred(home, user)
                || lists.iter().flatten().any(|list| !list.allows(server))
                || loops::crosses(&leading, &following, user).is_err()
        },
        barred: &barred,
        now_ms: core.now_ms(),
    });
    Ok(Comparison { fixes, ghosts })
}

async fn users(core: &Core, side: Side, state: &State) -> Result<Known, Refusal> {
    core.users.all(&core.context.store, side, &populate::users(state)).await
}

async fn apply(core: &Arc<Core>, portal: &Portal, fix: Fix) -> Result<(), Refusal> {
    let rooms = core.sides()?.rooms(fix.side);
    let room = portal.room(fix.side);
    let mut outgoing: Vec<Outgoing> = fix.before.into_iter().map(|draft| Outgoing { draft, effect: None }).collect();
    let effect = match fix.source {
        Some(source) => effect::joined(core, portal, fix.side.other(), source).await?,
        None => None,
    };
    outgoing.push(Outgoing { draft: fix.draft, effect });
    let last = rooms.send(room, outgoing).await.pop();
    match (last, fix.instead) {
        (Some(Err(refusal)), Some(instead)) if !refusal.is_transient() => {
            let side = fix.side.other();
            let other = core.sides()?.rooms(side);
            let outgoing = vec![Outgoing { draft: instead, effect: None }];
            other.send(portal.room(side), outgoing).await.pop().unwrap_or(Err(refusal)).map(drop)
        }
        (Some(result), _) => result.map(drop),
        (None, _) => Err(Refusal::Internal("nothing came of a repair".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use ruma::user_id;

    use super::*;
    use crate::event::Object;

    #[test]
    fn at_most_three_repairs_of_the_same_state_in_a_minute() {
        let repairs = Repairs::default();
        let draft = |kind: &str| Draft {
            sender: user_id!("@isthmus:g").to_owned(),
            kind: kind.to_owned(),
            state_key: Some(String::new()),
            content: Object::new(),
            origin_server_ts: 0,
        };
        for now in [0, 1, 2] {
            assert!(repairs.allow(1, &draft("m.room.name"), now));
        }
        assert!(!repairs.allow(1, &draft("m.room.name"), 59_999));
        assert!(repairs.allow(1, &draft("m.room.topic"), 59_999));
        assert!(repairs.allow(2, &draft("m.room.name"), 59_999));
        assert!(repairs.allow(1, &draft("m.room.name"), 60_000));
        assert!(repairs.plan(1));
        assert!(!repairs.plan(1));
        repairs.started(1);
        assert!(repairs.plan(1));
        // What could not be repaired is looked at again, ever more seldom.
        assert_eq!(repairs.plan_again(1), Some(AGAIN));
        assert_eq!(repairs.plan_again(1), None);
        repairs.is_due_again(1);
        assert_eq!(repairs.plan_again(1), Some(AGAIN * 2));
        for _ in 0..9 {
            repairs.is_due_again(1);
            assert!(repairs.plan_again(1).is_some_and(|pause| pause <= AGAIN_AT_MOST));
        }
        repairs.is_due_again(1);
        repairs.is_done(1);
        assert_eq!(repairs.plan_again(1), Some(AGAIN));
        repairs.is_done(1);
        repairs.is_due_again(1);
        assert!(repairs.again.lock().unwrap().is_empty(), "nothing stays of a portal that is in step");
    }
}
