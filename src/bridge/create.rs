//! Making portals. What is asked for is written down before anything is made, and each room as soon as it is there, so that
//! a crash in the middle is taken up at the next start.

mod elsewhere;

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use ruma::OwnedRoomId;

use self::elsewhere::place_of;
pub(super) use self::elsewhere::{
    may_be_elsewhere, portal_from_lm, portal_from_matrix, portal_of_ghost_invite, portal_of_invite,
    portal_of_lm_invite, portal_of_next,
};
use super::core::Core;
use super::portal::{NewPortal, Portal, PortalKind, PortalState, Request};
use super::rooms;
use super::space::{LookedAt, make_space, one_more_of};
use super::{from_lm, from_matrix, pending, repair, spaces, upgrade};
use crate::config::EncryptionPolicy;
use crate::event::{Family, RoomVersion};
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::store::portals::{self, PortalRow};

type Outcome = Result<Arc<Portal>, Refusal>;
type Running = Shared<BoxFuture<'static, Outcome>>;

/// When it is tried again to write down how a making came out, at first and at last.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// A room that lives elsewhere, of which a portal is made.
type Place = (Side, OwnedRoomId);

/// The portals that are being made of rooms that live elsewhere: one creation in flight for each.
#[derive(Default)]
pub(super) struct Creations {
    running: Mutex<HashMap<Place, Running>>,
    pub(super) looked_at: LookedAt,
}

/// Makes both rooms and the portal between them.
pub(super) async fn create_portal(core: &Arc<Core>, new: NewPortal) -> Outcome {
    create(core, new, PortalKind::Created).await
}

async fn create(core: &Arc<Core>, new: NewPortal, kind: PortalKind) -> Outcome {
    let request = request(core, &new)?;
    let alias = new.alias.clone();
    if let Some(alias) = &alias {
        check_alias(core, alias)?;
    }
    let row = PortalRow {
        number: 0,
        kind: kind.as_str().to_owned(),
        state: CREATING.to_owned(),
        matrix_room_id: None,
        lm_room_id: None,
        lm_hub: core.context.server_name.clone(),
        alias,
        reason: None,
        request: serde_json::to_vec(&request).map_err(|error| Refusal::Internal(error.to_string()))?,
        created_ts: core.now_ms(),
        unused_until_ts: None,
    };
    let row = begin(core, row).await?;
    let making = core.clone();
    // Whoever asked may go away; what was begun is finished.
    core.in_task(async move { finish(&making, row).await }).await
}

/// Makes one room that LM servers and graph servers share.
pub(super) async fn shared_room(core: &Arc<Core>, new: NewPortal) -> Outcome {
    create(core, new, PortalKind::Shared).await
}

/// Takes up what was being made when the gateway stopped.
pub(super) fn resume(core: &Arc<Core>, rows: Vec<PortalRow>) {
    for row in rows {
        tracing::info!(portal = row.number, "taking up the making of a portal");
        match place_of(&row) {
            Some(place) => {
                // Who asks for the same room meanwhile gets this one.
                let outcome = in_task(core, place.clone(), row);
                lock(core).insert(place, outcome.clone());
                core.spawn(outcome.map(drop));
            }
            None => {
                let making = core.clone();
                core.spawn(async move { drop(finish(&making, row).await) });
            }
        }
    }
}

/// What is accepted in the rooms of a portal that is being made is kept for it.
pub(super) fn watch(core: &Core, row: &PortalRow) {
    for (side, room) in [(Side::Matrix, &row.matrix_room_id), (Side::Lm, &row.lm_room_id)] {
        if let Some(room) = room {
            core.registry.watch(side, room);
        }
    }
}

/// The state of a portal that is being made, in the store alone.
pub(super) const CREATING: &str = "creating";

/// Makes an alias lead to a portal.
pub(super) async fn add_alias(core: &Core, localpart: &str, number: i64) -> Result<(), Refusal> {
    if core.registry.of_alias(localpart).is_some_and(|entry| entry.number == number) {
        return Ok(());
    }
    check_alias(core, localpart)?;
    let stored = localpart.to_owned();
    let claim =
        core.context.store.write(move |tx| Box::pin(async move { portals::claim_alias(tx, &stored, number).await }));
    if let Some(other) = claim.await? {
        return Err(taken(localpart, other));
    }
    core.registry.set_alias(localpart, number);
    Ok(())
}

fn lock(core: &Core) -> MutexGuard<'_, HashMap<Place, Running>> {
    core.creations.running.lock().unwrap_or_else(PoisonError::into_inner)
}

fn in_task(core: &Arc<Core>, place: Place, row: PortalRow) -> Running {
    let (making, waiting) = (core.clone(), core.clone());
    let task = async move {
        let begun = if row.number == 0 { begin(&making, row).await } else { Ok(row) };
        let made = match begun {
            Ok(row) => make(&making, row).await,
            Err(refusal) => {
                lock(&making).remove(&place);
                return Err(refusal);
            }
        };
        let outcome = conclude(&making, &made).await;
        let again = outcome.is_err().then(|| again(&making, made.clone()));
        let mut running = lock(&making);
        match again {
            // Who asks for the same room meanwhile waits for that.
            Some(again) => running.insert(place, again),
            None => running.remove(&place),
        };
        outcome.unwrap_or_else(|failure| Err(made.refusal.unwrap_or(failure)))
    };
    async move { waiting.in_task(task).await }.boxed().shared()
}

/// Writes down what is to be made, if there is room for it. Its alias is its own from now on.
async fn begin(core: &Arc<Core>, row: PortalRow) -> Result<PortalRow, Refusal> {
    make_space(core).await?;
    let stored = row.clone();
    let limit = core.context.config.access.max_portals;
    let write = core.context.store.write(move |tx| {
        Box::pin(async move {
            // Here those are counted too that are being made.
            if let Err(refusal) = one_more_of(portals::count_open(&mut *tx).await?, limit) {
                return Ok(Err(refusal));
            }
            let Some(alias) = &stored.alias else { return Ok(Ok(portals::insert(tx, &stored).await?)) };
            if let Some(other) = portals::alias_owner(tx, alias).await? {
                return Ok(Err(taken(alias, other)));
            }
            let number = portals::insert(tx, &stored).await?;
            portals::claim_alias(tx, alias, number).await?;
            Ok(Ok(number))
        })
    });
    let number = write.await??;
    // What is sent of the room between the join and the end of the making is kept.
    watch(core, &row);
    Ok(PortalRow { number, ..row })
}

/// How a making came out, which is to be written down.
#[derive(Clone)]
struct Made {
    row: PortalRow,
    /// Why there is no portal. The row ends then, and the next who asks begins anew.
    refusal: Option<Refusal>,
}

/// Makes what is still missing.
async fn make(core: &Arc<Core>, row: PortalRow) -> Made {
    let mut row = row;
    // In boxes, here and below: futures inside each other get too deep for the compiler.
    let making = AssertUnwindSafe(Box::pin(async {
        match row.kind.as_str() {
            _ if Request::of(&row).ghosts_alone => pending::make(core, &mut row).await,
            "from_lm" => from_lm::make(core, &mut row).await,
            "from_matrix" => from_matrix::make(core, &mut row).await,
            "shared" => make_shared(core, &mut row).await,
            _ => make_both(core, &mut row).await,
        }
    }));
    let made = making.catch_unwind().await;
    let refusal = made.unwrap_or_else(|_| Err(Refusal::Internal("the making of a portal panicked".to_owned()))).err();
    if let Some(refusal) = &refusal {
        tracing::warn!(portal = row.number, %refusal, "a portal could not be made");
    }
    Made { row, refusal }
}

/// Writes down how a making came out; an error when it could not be written.
async fn conclude(core: &Arc<Core>, made: &Made) -> Result<Outcome, Refusal> {
    let row = made.row.clone();
    match &made.refusal {
        None => Box::pin(activate(core, row)).await.map(Ok),
        Some(refusal) => Box::pin(end(core, row, refusal)).await.map(|()| Err(refusal.clone())),
    }
}

/// Goes on writing that down, until it is written: until then a portal is neither made nor may it be made again.
fn again(core: &Arc<Core>, made: Made) -> Running {
    let (inner, waiting) = (core.clone(), core.clone());
    let task = async move {
        let mut pause = FIRST_PAUSE;
        let outcome = loop {
            tokio::time::sleep(pause).await;
            match conclude(&inner, &made).await {
                Ok(outcome) => break outcome,
                Err(refusal) => {
                    tracing::warn!(portal = made.row.number, %refusal, "how a portal came out could not be written down");
                }
            }
            pause = pause.saturating_mul(2).min(LONGEST_PAUSE);
        };
        if let Some(place) = place_of(&made.row) {
            lock(&inner).remove(&place);
        }
        outcome
    };
    let running = async move { waiting.in_task(task).await }.boxed().shared();
    core.spawn(running.clone().map(drop));
    running
}

/// Makes what is still missing of a portal that nobody else asks for.
async fn finish(core: &Arc<Core>, row: PortalRow) -> Outcome {
    let made = make(core, row).await;
    conclude(core, &made).await.unwrap_or_else(|failure| {
        drop(again(core, made.clone()));
        Err(made.refusal.unwrap_or(failure))
    })
}

async fn make_both(core: &Arc<Core>, row: &mut PortalRow) -> Result<(), Refusal> {
    let request: Request = serde_json::from_slice(&row.request).unwrap_or_default();
    let sides = core.sides()?;
    let alias = row.alias.clone();
    let both = rooms::Both { core, request: &request, alias: alias.as_deref() };
    if row.lm_room_id.is_none() {
        let room_id = sides.lm.create_room(both.lm()?).await?;
        save(core, row, |row| row.lm_room_id = Some(room_id)).await?;
    }
    if row.matrix_room_id.is_none() {
        let room_id = sides.dag.create_room(both.matrix()?).await?;
        save(core, row, |row| row.matrix_room_id = Some(room_id)).await?;
    }
    Ok(())
}

async fn make_shared(core: &Arc<Core>, row: &mut PortalRow) -> Result<(), Refusal> {
    let request: Request = serde_json::from_slice(&row.request).unwrap_or_default();
    let alias = row.alias.clone();
    let room = rooms::Both { core, request: &request, alias: alias.as_deref() };
    if row.lm_room_id.is_none() {
        let room_id = core.sides()?.lm.create_shared(room.shared()?).await?;
        (row.lm_room_id, row.matrix_room_id) = (Some(room_id.clone()), Some(room_id));
        let stored = row.clone();
        core.context.store.write(move |tx| Box::pin(async move { portals::update(tx, &stored).await })).await?;
    }
    Ok(())
}

/// Changes a row, and what is watched, before anything else is made.
pub(super) async fn save(core: &Core, row: &mut PortalRow, change: impl FnOnce(&mut PortalRow)) -> Result<(), Refusal> {
    change(row);
    for (side, room) in [(Side::Matrix, &row.matrix_room_id), (Side::Lm, &row.lm_room_id)] {
        if let Some(room) = room {
            core.registry.watch(side, room);
        }
    }
    let stored = row.clone();
    core.context.store.write(move |tx| Box::pin(async move { portals::update(tx, &stored).await })).await?;
    Ok(())
}

async fn activate(core: &Arc<Core>, row: PortalRow) -> Result<Arc<Portal>, Refusal> {
    let is_pending = Request::of(&row).ghosts_alone;
    // Where nobody has come in yet nobody is led.
    let by_room = row.lm_room_id.as_deref().filter(|_| row.kind == "from_lm" && !is_pending);
    let aliases: Vec<String> = row.alias.clone().into_iter().chain(by_room.and_then(super::alias::of_room)).collect();
    let state = if is_pending { PortalState::Pending } else { PortalState::Active };
    let row = PortalRow { state: state.as_str().to_owned(), ..row };
    let portal = Portal::from_row(&row, &core.context.server_name)?
        .ok_or_else(|| Refusal::Internal("a room of the portal is missing".to_owned()))?;
    let (stored, listed) = (row.clone(), portal.may_be_listed() && !is_pending);
    let write = core.context.store.write(move |tx| {
        Box::pin(async move {
            portals::update(tx, &stored).await?;
            if let Some(room) = stored.matrix_room_id.as_ref().filter(|_| listed) {
                crate::store::dag::set_listed(tx, room, true).await?;
            }
            let mut own = Vec::new();
            for alias in aliases {
                // An admin may have given the name of the LM room to another portal.
                if portals::claim_alias(tx, &alias, stored.number).await?.is_none() {
                    own.push(alias);
                }
            }
            Ok(own)
        })
    });
    let aliases = write.await?;
    let entry = core.registry.put(row.number, portal);
    for alias in &aliases {
        core.registry.set_alias(alias, row.number);
    }
    if !entry.portal().is_one_room() && !is_pending {
        for side in [Side::Matrix, Side::Lm] {
            core.call_entry(&entry, side);
        }
        repair::soon(core, &entry);
    }
    for side in [Side::Matrix, Side::Lm] {
        upgrade::comes(core, side, entry.portal().room(side), None);
    }
    spaces::soon(core, &entry.portal().lm_hub);
    tracing::info!(
        portal = entry.portal().portal_id, matrix_room = %entry.portal().matrix_room_id,
        lm_room = %entry.portal().lm_room_id, "portal made"
    );
    Ok(entry.portal())
}

async fn end(core: &Core, mut row: PortalRow, refusal: &Refusal) -> Result<(), Refusal> {
    row.state = "ended".to_owned();
    row.reason = Some(refusal.to_string());
    // First, or what is accepted meanwhile would be kept for nobody.
    for (side, room) in [(Side::Matrix, &row.matrix_room_id), (Side::Lm, &row.lm_room_id)] {
        if let Some(room) = room {
            core.registry.unwatch(side, room);
        }
    }
    core.context
        .store
        .write(move |tx| {
            Box::pin(async move {
                portals::update(tx, &row).await?;
                portals::remove_aliases(tx, row.number).await?;
                for (side, room) in [(Side::Matrix, &row.matrix_room_id), (Side::Lm, &row.lm_room_id)] {
                    if let Some(room) = room {
                        crate::store::inbox::clear(tx, side, room).await?;
                    }
                }
                Ok(())
            })
        })
        .await
        .map_err(Refusal::from)
}

fn request(core: &Core, new: &NewPortal) -> Result<Request, Refusal> {
    match core.context.config.portals.encryption {
        EncryptionPolicy::Refuse => {}
    }
    if let Some(rule) = new.join_rule.as_deref().filter(|rule| !matches!(*rule, "public" | "invite" | "knock")) {
        return Err(Refusal::malformed("join_rule", format!("is {rule:?}, not public, invite or knock")));
    }
    let version = |version: Option<RoomVersion>, family: Family| match version {
        Some(version) if version.family() != family => {
            Err(Refusal::IncompatibleRoomVersion(version.as_str().to_owned()))
        }
        version => Ok(version.map(|version| version.as_str().to_owned())),
    };
    Ok(Request {
        name: new.name.clone(),
        join_rule: new.join_rule.clone(),
        matrix_room_version: version(new.matrix_room_version, Family::Graph)?,
        lm_room_version: version(new.lm_room_version, Family::Log)?,
        ..Request::default()
    })
}

/// Refuses what is no localpart of an alias.
fn check_form(localpart: &str) -> Result<(), Refusal> {
    let bad = localpart.is_empty() || localpart.len() > 200 || localpart.contains([':', '\u{0}']);
    match bad {
        true => Err(Refusal::malformed("alias", format!("{localpart:?} is no localpart of an alias"))),
        false => Ok(()),
    }
}

fn check_alias(core: &Core, localpart: &str) -> Result<(), Refusal> {
    check_form(localpart)?;
    match core.registry.of_alias(localpart) {
        Some(entry) => Err(taken(localpart, entry.number)),
        None => Ok(()),
    }
}

fn taken(localpart: &str, number: i64) -> Refusal {
    Refusal::AliasTaken { alias: localpart.to_owned(), portal_id: format!("p{number}") }
}
