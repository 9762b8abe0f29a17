//! Where aliases lead, and portals that come about because somebody named one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use moka::Expiry;
use moka::future::Cache;
use ruma::{OwnedRoomId, OwnedServerName, RoomId, ServerName};

use super::alias::{self, Named};
use super::core::Core;
use super::portal::{Cause, Portal, PortalKind, PortalState};
use super::{access, create, space};
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::seam::AliasTarget;
use crate::store::overview;

/// How long a negative answer is kept, and one that may be another soon: the hub did not answer, or not as it should.
const NEGATIVE: Duration = Duration::from_secs(600);
const TRANSIENT: Duration = Duration::from_secs(30);

/// How long a homeserver may take to say where an alias of its own leads.
const DIRECTORY: Duration = Duration::from_secs(10);

/// Negative answers, by localpart.
pub(super) type Negative = Cache<String, Refusal>;

/// What hubs said of their aliases, by localpart.
pub(super) type Leads = Cache<String, AliasTarget>;

/// An empty cache of what hubs said.
pub(super) fn leads() -> Leads {
    Cache::builder().max_capacity(10_000).time_to_live(TRANSIENT).build()
}

/// An empty cache of negative answers.
pub(super) fn negative() -> Negative {
    Cache::builder().max_capacity(10_000).expire_after(Keeping).build()
}

struct Keeping;

impl Expiry<String, Refusal> for Keeping {
    fn expire_after_create(&self, _: &String, refusal: &Refusal, _: Instant) -> Option<Duration> {
        Some(if refusal.is_transient() { TRANSIENT } else { NEGATIVE })
    }

    fn expire_after_update(
        &self,
        key: &String,
        refusal: &Refusal,
        at: Instant,
        _: Option<Duration>,
    ) -> Option<Duration> {
        self.expire_after_create(key, refusal, at)
    }
}

/// Where the localpart of an alias leads.
pub(super) async fn resolve(core: &Arc<Core>, localpart: &str, cause: &Cause) -> Result<AliasTarget, Refusal> {
    portal(core, localpart, cause).await.map(|portal| target(core, &portal.matrix_room_id))
}

/// Where the localpart of an alias leads that a portal has already; nobody is asked, and nothing is made.
pub(super) fn known(core: &Core, localpart: &str) -> Option<AliasTarget> {
    let portal = core.registry.of_alias(localpart)?.portal();
    portal.state.carries().then(|| target(core, &portal.matrix_room_id))
}

/// Where an alias of the gateway's name leads for the server that asks: an LM server is told the LM room.
pub(super) async fn asked(
    core: &Arc<Core>,
    alias: &str,
    by: Option<&ServerName>,
    side: Option<Side>,
) -> Result<AliasTarget, Refusal> {
    let unknown = || Refusal::NotFound(format!("the alias {alias}"));
    let localpart = alias::localpart_at(alias, &core.context.server_name).ok_or_else(unknown)?;
    if let Some(space) = space_of(core, localpart).filter(|_| side != Some(Side::Lm)) {
        return Ok(target(core, &space));
    }
    let Some(by) = by else {
        let entry = core.registry.of_alias(localpart).ok_or_else(unknown)?;
        return Ok(target(core, &entry.portal().matrix_room_id));
    };
    if let Some(entry) = core.registry.of_alias(localpart) {
        let side = match side {
            Some(side) => side,
            None => side_of(core, by).await?,
        };
        return Ok(room_of(core, &entry.portal(), side));
    }
    if let Some((matrix_alias, server)) = alias::matrix_alias(localpart) {
        let portal = of_matrix_alias(core, localpart, &matrix_alias, &server).await?;
        let side = match side {
            Some(side) => side,
            None => side_of(core, by).await?,
        };
        return Ok(room_of(core, &portal, side));
    }
    if side == Some(Side::Lm) {
        // What an alias makes is a Matrix room.
        return Err(unknown());
    }
    let homeserver = core.context.config.appservice.as_ref().map(|appservice| appservice.homeserver_name.as_ref());
    let cause = if homeserver == Some(by) { Cause::Appservice } else { Cause::Server(by.to_owned()) };
    resolve(core, localpart, &cause).await
}

/// The space that an alias leads to, unless somebody gave it to a portal.
fn space_of(core: &Core, localpart: &str) -> Option<OwnedRoomId> {
    let space = core.spaces.of(&alias::hub(localpart)?)?;
    core.registry.of_alias(localpart).is_none().then_some(space)
}

/// A portal's room on a side, and who lets others in there.
fn room_of(core: &Core, portal: &Portal, side: Side) -> AliasTarget {
    let found = target(core, portal.room(side));
    let handed_over = side == Side::Lm && matches!(portal.kind, PortalKind::Created | PortalKind::FromMatrix);
    // A log that was handed over is joined at its hub; its room's ID does not say where that is.
    let servers = if handed_over { vec![portal.lm_hub.clone()] } else { found.servers };
    AliasTarget { servers, ..found }
}

/// The portal of the Matrix room to which a Matrix alias leads, as its server says. None is made for it.
async fn of_matrix_alias(
    core: &Core,
    localpart: &str,
    matrix_alias: &str,
    server: &ServerName,
) -> Result<Arc<Portal>, Refusal> {
    let unknown = || Refusal::NotFound(format!("a portal of the Matrix alias {matrix_alias}"));
    access::takes_part(&core.context.config.access, Side::Matrix, server)?;
    if *server == core.context.server_name {
        return Err(unknown());
    }
    if let Some(refusal) = core.negative.get(localpart).await {
        return Err(refusal);
    }
    let led = match core.leads.get(localpart).await {
        Some(led) => led,
        None => {
            let asked = core.sides()?.dag.query_directory(server, matrix_alias);
            let late = || Refusal::Remote { server: server.to_string(), problem: "it does not answer".to_owned() };
            match tokio::time::timeout(DIRECTORY, asked).await.unwrap_or_else(|_| Err(late())) {
                Ok(led) => {
                    core.leads.insert(localpart.to_owned(), led.clone()).await;
                    led
                }
                Err(refusal) => {
                    core.negative.insert(localpart.to_owned(), refusal.clone()).await;
                    return Err(refusal);
                }
            }
        }
    };
    let entry = core.registry.of_room(Side::Matrix, &led.room_id).ok_or_else(unknown)?;
    Some(entry.portal()).filter(|portal| portal.state.carries()).ok_or_else(unknown)
}

/// On which side a server asks that does not say it: one that does LM alone says so in its key document, or shares LM rooms
/// with the gateway and no others. Who does both and means the LM room asks under the LM endpoint's own name.
async fn side_of(core: &Core, server: &ServerName) -> Result<Side, Refusal> {
    let says_so = core.context.keyring.server_keys(server).await.is_ok_and(|keys| keys.linearized);
    let linear = says_so || overview::is_lm_only(&core.context.store, server).await?;
    Ok(if linear { Side::Lm } else { Side::Matrix })
}

fn target(core: &Core, room_id: &RoomId) -> AliasTarget {
    AliasTarget { room_id: room_id.to_owned(), servers: vec![core.context.server_name.clone()] }
}

/// The portal that the localpart of an alias leads to.
pub(super) async fn portal(core: &Arc<Core>, localpart: &str, cause: &Cause) -> Result<Arc<Portal>, Refusal> {
    if let Some(entry) = core.registry.of_alias(localpart) {
        return Ok(entry.portal());
    }
    let named = alias::parse(localpart).ok_or_else(|| Refusal::NotFound(format!("the alias {localpart:?}")))?;
    let (Named::Alias { server, .. } | Named::Room { server, .. }) = &named;
    // Whoever may not have a portal made is still led to one that is there.
    let may_create = access::may_create(&core.context.config.access, cause);
    if !core.registry.has_hub(server) {
        may_create.clone()?;
    }
    if let Some(refusal) = core.negative.get(localpart).await {
        return Err(refusal);
    }
    let (room_id, via) = match lead(core, localpart, &named).await {
        Ok(led) => led,
        Err(refusal) => {
            core.negative.insert(localpart.to_owned(), refusal.clone()).await;
            return Err(refusal);
        }
    };
    match core.registry.of_room(Side::Lm, &room_id) {
        // What a hub says of a name holds as long as it says so: a row for each name would be for it to fill the store with.
        Some(entry)
            if !matches!(entry.portal().state, PortalState::Pending | PortalState::Ending | PortalState::Ended) =>
        {
            return Ok(entry.portal());
        }
        Some(_) => may_create.clone()?,
        None => {
            may_create.clone()?;
            space::room_for_one_more(core).await?;
            if *cause != Cause::Admin {
                core.budgets.portal(&core.context.config.budgets, server, core.now_ms())?;
            }
        }
    }
    let made = create::portal_from_lm(core, &room_id, &via, Some(localpart), cause).await;
    // One who may not ask does not spoil it for one who may.
    if let (Err(refusal), Ok(())) = (&made, may_create) {
        core.negative.insert(localpart.to_owned(), refusal.clone()).await;
    }
    made
}

/// The LM room that is meant, and servers through which it can be joined.
async fn lead(
    core: &Arc<Core>,
    localpart: &str,
    named: &Named,
) -> Result<(OwnedRoomId, Vec<OwnedServerName>), Refusal> {
    let (Named::Alias { server, .. } | Named::Room { server, .. }) = named;
    if *server == core.context.server_name {
        return Err(Refusal::NotFound(format!("an LM room of this gateway by the alias {localpart:?}")));
    }
    access::takes_part(&core.context.config.access, Side::Lm, server)?;
    match named {
        Named::Room { room_id, server } => Ok((room_id.clone(), vec![server.clone()])),
        Named::Alias { alias, server } => {
            // Not asked again at once where it leads to a room that the asker may not have bridged.
            let answer = core
                .leads
                .try_get_with_by_ref(localpart, async { core.sides()?.lm.query_directory(server, alias).await });
            let target = answer.await.map_err(|refusal| Refusal::clone(&refusal))?;
            let mut via = target.servers;
            if !via.contains(server) {
                via.push(server.clone());
            }
            via.retain(|server| *server != core.context.server_name);
            via.truncate(10);
            Ok((target.room_id, via))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_better_soon_is_asked_again_soon() {
        let kept = |refusal: Refusal| {
            let now = Instant::now();
            let created = Keeping.expire_after_create(&"a".to_owned(), &refusal, now);
            assert_eq!(Keeping.expire_after_update(&"a".to_owned(), &refusal, now, Some(NEGATIVE)), created);
            created
        };
        let server = "hub.example".to_owned();
        assert_eq!(kept(Refusal::NotFound("the alias".to_owned())), Some(NEGATIVE));
        assert_eq!(kept(Refusal::Encryption("mls".to_owned())), Some(NEGATIVE));
        assert_eq!(kept(Refusal::Remote { server, problem: "502".to_owned() }), Some(TRANSIENT));
        assert_eq!(kept(Refusal::Internal("the database is away".to_owned())), Some(TRANSIENT));
    }
}
