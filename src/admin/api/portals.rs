//! `/portals`

use axum::Json;
use axum::extract::{Path, State};
use http::StatusCode;
use ruma::{OwnedRoomId, OwnedServerName, OwnedUserId};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{ApiError, Body, Parameters};
use crate::admin::Admin;
use crate::bridge::{self, Cause, NewPortal};
use crate::config::EncryptionPolicy;
use crate::event::{Object, RoomVersion};
use crate::identity::Side;
use crate::lm::Position;
use crate::refusal::Refusal;

/// How many portals a page has when nothing is said, and at most.
const PAGE: usize = 100;
const LONGEST_PAGE: usize = 1000;

/// The portal that is wanted.
#[derive(Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Make {
    /// Two new rooms, with the gateway as the LM room's hub and the Matrix room's creator.
    Create {
        /// The name of both.
        name: Option<String>,
        /// The localpart of their alias at the gateway, or the alias.
        alias: Option<String>,
        /// `public`, `invite` or `knock`; `invite` when absent.
        join_rule: Option<String>,
        /// What is done when somebody turns encryption on.
        #[schema(value_type = Option<String>)]
        encryption: Option<EncryptionPolicy>,
        /// The Matrix room's version.
        matrix_room_version: Option<String>,
        /// The LM room's version.
        lm_room_version: Option<String>,
    },
    /// One new room, hubbed here, that LM servers share with Matrix homeservers that speak its version.
    Shared {
        /// Its name.
        name: Option<String>,
        /// The localpart of its alias at the gateway, or the alias.
        alias: Option<String>,
        /// `public`, `invite` or `knock`; `invite` when absent.
        join_rule: Option<String>,
        /// Its version, one of those of LM.
        lm_room_version: Option<String>,
    },
    /// A Matrix room for an LM room that lives elsewhere.
    FromLm {
        /// The LM room.
        #[schema(value_type = Option<String>)]
        lm_room_id: Option<OwnedRoomId>,
        /// Servers through which it can be joined.
        #[schema(value_type = Vec<String>)]
        #[serde(default)]
        via: Vec<OwnedServerName>,
        /// The localpart of an alias at the gateway, or the alias.
        alias: Option<String>,
        /// Instead of these: its alias at its hub, `#NAME:HUB`.
        lm_alias: Option<String>,
    },
    /// An LM room, hubbed here, for a Matrix room that lives elsewhere.
    FromMatrix {
        /// The Matrix room.
        #[schema(value_type = Option<String>)]
        matrix_room_id: Option<OwnedRoomId>,
        /// Instead of it: its alias, `#NAME:SERVER`.
        matrix_alias: Option<String>,
        /// Servers through which it can be joined.
        #[schema(value_type = Vec<String>)]
        #[serde(default)]
        via: Vec<OwnedServerName>,
        /// The localpart of an alias at the gateway, or the alias, by which LM users find the LM room.
        alias: Option<String>,
    },
}

/// A portal.
#[derive(Serialize, ToSchema)]
pub(super) struct Portal {
    /// Its ID.
    portal_id: String,
    /// `created`, `from_lm`, `from_matrix` or `shared`: then both rooms are the same.
    kind: &'static str,
    /// `pending` (a ghost is invited, and nobody has come yet), `active`, `degraded`, `suspended`, `ending` or `ended`.
    state: &'static str,
    /// The Matrix room.
    #[schema(value_type = String)]
    matrix_room_id: OwnedRoomId,
    /// The LM room.
    #[schema(value_type = String)]
    lm_room_id: OwnedRoomId,
    /// The LM room's hub.
    #[schema(value_type = String)]
    lm_hub: OwnedServerName,
    /// Its alias at the gateway.
    alias: Option<String>,
    /// Why it is not active.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

impl From<&bridge::Portal> for Portal {
    fn from(portal: &bridge::Portal) -> Self {
        Self {
            portal_id: portal.portal_id.clone(),
            kind: portal.kind.as_str(),
            state: portal.state.as_str(),
            matrix_room_id: portal.matrix_room_id.clone(),
            lm_room_id: portal.lm_room_id.clone(),
            lm_hub: portal.lm_hub.clone(),
            alias: portal.alias.clone(),
            reason: portal.reason.clone(),
        }
    }
}

/// A page of portals.
#[derive(Serialize, ToSchema)]
pub(super) struct Page {
    /// The portals, in the order of their making.
    portals: Vec<Portal>,
    /// The value of `from` for the next page, when there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct PageQuery {
    /// The ID of the portal after which the page begins.
    from: Option<String>,
    /// How many portals, at most 1000.
    limit: Option<usize>,
}

/// The portals.
#[utoipa::path(get, path = "/portals", params(PageQuery), responses((status = 200, body = Page)))]
pub(super) async fn list(
    State(admin): State<Admin>,
    Parameters(query): Parameters<PageQuery>,
) -> Result<Json<Page>, Refusal> {
    let limit = query.limit.unwrap_or(PAGE).clamp(1, LONGEST_PAGE);
    let portals = admin.bridge.portals(query.from.as_deref(), limit).await?;
    let last = portals.last().map(|portal| portal.portal_id.clone());
    let next = last.filter(|_| portals.len() == limit);
    Ok(Json(Page { portals: portals.iter().map(|portal| Portal::from(&**portal)).collect(), next }))
}

/// Makes a portal; one of a room that has one already is returned as it is.
#[utoipa::path(
    post, path = "/portals", request_body = Make,
    responses((status = 201, body = Portal), (status = "4XX", body = ApiError), (status = "5XX", body = ApiError))
)]
pub(super) async fn make(
    State(admin): State<Admin>,
    Body(make): Body<Make>,
) -> Result<(StatusCode, Json<Portal>), Refusal> {
    let bridge = &admin.bridge;
    let localpart = |alias: Option<String>| alias.map(|alias| localpart(&admin, alias)).transpose();
    let portal = match make {
        Make::Create { name, alias, join_rule, encryption, matrix_room_version, lm_room_version } => {
            // There is only one policy, which every portal has.
            let (None | Some(EncryptionPolicy::Refuse)) = encryption;
            check_join_rule(join_rule.as_deref())?;
            let portal = NewPortal {
                name,
                alias: localpart(alias)?,
                join_rule,
                matrix_room_version: version("matrix_room_version", matrix_room_version)?,
                lm_room_version: version("lm_room_version", lm_room_version)?,
            };
            bridge.create_portal(portal).await?
        }
        Make::Shared { name, alias, join_rule, lm_room_version } => {
            check_join_rule(join_rule.as_deref())?;
            let lm_room_version = version("lm_room_version", lm_room_version)?;
            let alias = localpart(alias)?;
            bridge.shared_room(NewPortal { name, alias, join_rule, matrix_room_version: None, lm_room_version }).await?
        }
        Make::FromLm { lm_room_id: Some(lm_room_id), lm_alias: None, via, alias } => {
            bridge.portal_from_lm(&lm_room_id, &via, localpart(alias)?.as_deref(), Cause::Admin).await?
        }
        Make::FromLm { lm_room_id: None, lm_alias: Some(lm_alias), via, alias: None } if via.is_empty() => {
            bridge.portal_of_alias(&lm_alias).await?
        }
        Make::FromMatrix { matrix_room_id: Some(room_id), matrix_alias: None, via, alias } => {
            bridge.portal_from_matrix(&room_id, &via, localpart(alias)?.as_deref(), Cause::Admin).await?
        }
        Make::FromMatrix { matrix_room_id: None, matrix_alias: Some(matrix_alias), via, alias } => {
            bridge.portal_of_matrix_alias(&matrix_alias, &via, localpart(alias)?.as_deref()).await?
        }
        Make::FromMatrix { .. } => {
            let either = "a room is named by `matrix_room_id` or by `matrix_alias`, with `via` and perhaps `alias`";
            return Err(Refusal::malformed("matrix_room_id", either));
        }
        Make::FromLm { .. } => {
            let either = "a room is named by `lm_room_id`, with `via` and perhaps `alias`, or by `lm_alias` alone";
            return Err(Refusal::malformed("lm_room_id", either));
        }
    };
    Ok((StatusCode::CREATED, Json(Portal::from(&*portal))))
}

fn check_join_rule(join_rule: Option<&str>) -> Result<(), Refusal> {
    match join_rule {
        None | Some("public" | "invite" | "knock") => Ok(()),
        Some(_) => Err(Refusal::malformed("join_rule", "it must be public, invite or knock")),
    }
}

/// The localpart of an alias at the gateway, which may be given in full.
fn localpart(admin: &Admin, alias: String) -> Result<String, Refusal> {
    let Some(full) = alias.strip_prefix('#') else { return Ok(alias) };
    let at = format!(":{}", admin.context.server_name);
    full.strip_suffix(&at)
        .map(str::to_owned)
        .ok_or_else(|| Refusal::malformed("alias", format!("{alias} is not an alias of {}", admin.context.server_name)))
}

fn version(what: &str, version: Option<String>) -> Result<Option<RoomVersion>, Refusal> {
    let parse = |version: String| {
        RoomVersion::parse(&version).ok_or_else(|| Refusal::malformed(what, format!("{version:?} is not known")))
    };
    version.map(parse).transpose()
}

/// A portal with its health.
#[derive(Serialize, ToSchema)]
pub(super) struct Shown {
    #[serde(flatten)]
    portal: Portal,
    /// What waits, who is in it, what was refused.
    health: bridge::Health,
    /// How many repairs it would take to bring the two states in step.
    out_of_step: usize,
}

/// One portal with its health, members and refusals.
#[utoipa::path(
    get, path = "/portals/{portal_id}", params(("portal_id" = String, Path)),
    responses((status = 200, body = Shown), (status = 404, body = ApiError))
)]
pub(super) async fn show(State(admin): State<Admin>, Path(portal_id): Path<String>) -> Result<Json<Shown>, Refusal> {
    let portal = found(&admin, &portal_id).await?;
    let health = admin.bridge.health(&portal_id).await?;
    let out_of_step = admin.bridge.out_of_step(&portal_id).await?;
    Ok(Json(Shown { portal: Portal::from(&*portal), health, out_of_step }))
}

/// Ends a portal: a goodbye in both rooms, the ghosts and the bot leave both, aliases and mappings are forgotten.
#[utoipa::path(
    delete, path = "/portals/{portal_id}", params(("portal_id" = String, Path)),
    responses((status = 200, body = Portal), (status = 404, body = ApiError), (status = "5XX", body = ApiError))
)]
pub(super) async fn remove(State(admin): State<Admin>, Path(portal_id): Path<String>) -> Result<Json<Portal>, Refusal> {
    let portal = admin.bridge.remove_portal(&portal_id, "an admin has ended the connection").await?;
    if let Some(appservice) = &admin.appservice {
        appservice.wake();
    }
    Ok(Json(Portal::from(&*portal)))
}

/// Makes a suspended portal active again. The gateway's bot must be in both rooms, or be let in.
#[utoipa::path(
    post, path = "/portals/{portal_id}/resume", params(("portal_id" = String, Path)),
    responses((status = 200, body = Portal), (status = "4XX", body = ApiError), (status = "5XX", body = ApiError))
)]
pub(super) async fn resume(State(admin): State<Admin>, Path(portal_id): Path<String>) -> Result<Json<Portal>, Refusal> {
    Ok(Json(Portal::from(&*admin.bridge.resume_portal(&portal_id).await?)))
}

async fn found(admin: &Admin, portal_id: &str) -> Result<std::sync::Arc<bridge::Portal>, Refusal> {
    let portal = admin.bridge.portal(portal_id).await?;
    portal.ok_or_else(|| Refusal::NotFound(format!("the portal {portal_id}")))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Invite {
    /// A Matrix or LM user.
    #[schema(value_type = String)]
    user_id: OwnedUserId,
    /// On which side they are at home, when it is not clear.
    side: Option<Home>,
}

/// A side.
#[derive(Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Home {
    Matrix,
    Lm,
}

impl From<Home> for Side {
    fn from(home: Home) -> Self {
        match home {
            Home::Matrix => Self::Matrix,
            Home::Lm => Self::Lm,
        }
    }
}

/// What was done, when there is no more to say of it.
#[derive(Serialize, ToSchema)]
pub(super) struct Done {}

/// Invites a user on their own side, by the gateway's bot.
#[utoipa::path(
    post, path = "/portals/{portal_id}/invite", params(("portal_id" = String, Path)), request_body = Invite,
    responses((status = 200, body = Done), (status = "4XX", body = ApiError), (status = "5XX", body = ApiError))
)]
pub(super) async fn invite(
    State(admin): State<Admin>,
    Path(portal_id): Path<String>,
    Body(invite): Body<Invite>,
) -> Result<Json<Done>, Refusal> {
    admin.bridge.invite_on(&portal_id, &invite.user_id, invite.side.map(Side::from)).await?;
    Ok(Json(Done {}))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Power {
    /// A member.
    #[schema(value_type = String)]
    user_id: OwnedUserId,
    /// The member's power level.
    level: i64,
    /// On which side they are at home, when it is not clear.
    side: Option<Home>,
}

/// Sets a member's power on both sides, by the gateway's bot.
#[utoipa::path(
    put, path = "/portals/{portal_id}/power", params(("portal_id" = String, Path)), request_body = Power,
    responses((status = 200, body = Done), (status = "4XX", body = ApiError), (status = "5XX", body = ApiError))
)]
pub(super) async fn power(
    State(admin): State<Admin>,
    Path(portal_id): Path<String>,
    Body(power): Body<Power>,
) -> Result<Json<Done>, Refusal> {
    admin.bridge.set_power_of(&portal_id, &power.user_id, power.level, power.side.map(Side::from)).await?;
    Ok(Json(Done {}))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Announce {
    /// What the bot says.
    body: String,
}

#[derive(Serialize, ToSchema)]
pub(super) struct Announced {
    matrix_event_id: String,
    lm_event_id: String,
}

/// Has the gateway's bot say something in both rooms.
#[utoipa::path(
    post, path = "/portals/{portal_id}/announce", params(("portal_id" = String, Path)), request_body = Announce,
    responses((status = 200, body = Announced), (status = "4XX", body = ApiError), (status = "5XX", body = ApiError))
)]
pub(super) async fn announce(
    State(admin): State<Admin>,
    Path(portal_id): Path<String>,
    Body(announce): Body<Announce>,
) -> Result<Json<Announced>, Refusal> {
    let (matrix, lm) = admin.bridge.announce(&portal_id, &announce.body).await?;
    Ok(Json(Announced { matrix_event_id: matrix.to_string(), lm_event_id: lm.to_string() }))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct HandOver {
    /// The LM server that is to keep the log.
    #[schema(value_type = String)]
    server: OwnedServerName,
    /// Whether it is done although servers in the room do not show that they know of changes of the hub: these are cut off.
    #[serde(default)]
    force: bool,
}

/// What was done.
#[derive(Serialize, ToSchema)]
pub(super) struct HandedOver {
    /// The event that handed the log over.
    event_id: String,
    /// The server that keeps the log now.
    #[schema(value_type = String)]
    lm_hub: OwnedServerName,
    /// Whether that server has said since that it does. Until then the gateway must not be stopped for good.
    taken: bool,
    /// The servers in the room that do not show that they know of changes of the hub.
    #[schema(value_type = Vec<String>)]
    unaware: Vec<OwnedServerName>,
}

/// Hands the log of the portal's LM room over to another LM server in it, which agrees to that.
#[utoipa::path(
    post, path = "/portals/{portal_id}/hub", params(("portal_id" = String, Path)), request_body = HandOver,
    responses((status = 200, body = HandedOver), (status = "4XX", body = ApiError), (status = "5XX", body = ApiError))
)]
pub(super) async fn hand_over(
    State(admin): State<Admin>,
    Path(portal_id): Path<String>,
    Body(HandOver { server, force }): Body<HandOver>,
) -> Result<Json<HandedOver>, Refusal> {
    let done = admin.bridge.hand_over(&portal_id, &server, force).await?;
    let (event_id, taken) = (done.event_id.to_string(), done.taken);
    Ok(Json(HandedOver { event_id, lm_hub: server, taken, unaware: done.unaware }))
}

#[derive(Serialize, ToSchema)]
pub(super) struct Repaired {
    /// How many repairs were sent.
    repairs: usize,
}

/// Compares the two states and sends what brings them in step.
#[utoipa::path(
    post, path = "/portals/{portal_id}/repair", params(("portal_id" = String, Path)),
    responses((status = 200, body = Repaired), (status = "4XX", body = ApiError), (status = "5XX", body = ApiError))
)]
pub(super) async fn repair(
    State(admin): State<Admin>,
    Path(portal_id): Path<String>,
) -> Result<Json<Repaired>, Refusal> {
    Ok(Json(Repaired { repairs: admin.bridge.repair(&portal_id).await? }))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct LogQuery {
    /// The first position; 0 when absent.
    from: Option<i64>,
    /// How many events, at most 1000.
    limit: Option<i64>,
    /// Whether the PDUs are shown.
    full: Option<bool>,
}

/// A stretch of an LM room's log.
#[derive(Serialize, ToSchema)]
pub(super) struct Log {
    events: Vec<Line>,
}

/// An event in its place in the log.
#[derive(Serialize, ToSchema)]
pub(super) struct Line {
    position: i64,
    event_id: String,
    #[serde(rename = "type")]
    kind: String,
    sender: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pdu: Option<Object>,
}

/// The log of the portal's LM room.
#[utoipa::path(
    get, path = "/portals/{portal_id}/log", params(("portal_id" = String, Path), LogQuery),
    responses((status = 200, body = Log), (status = 404, body = ApiError))
)]
pub(super) async fn log(
    State(admin): State<Admin>,
    Path(portal_id): Path<String>,
    Parameters(query): Parameters<LogQuery>,
) -> Result<Json<Log>, Refusal> {
    let portal = found(&admin, &portal_id).await?;
    let limit = query.limit.unwrap_or(100).clamp(1, 1000);
    let from = Position(query.from.unwrap_or_default().max(0));
    let full = query.full.unwrap_or_default();
    let events = admin.lm.log(&portal.lm_room_id, from, limit).await?.into_iter().map(|appended| Line {
        position: appended.position.0,
        event_id: appended.event.event_id.to_string(),
        kind: appended.event.kind.clone(),
        sender: appended.event.sender.to_string(),
        pdu: full.then(|| appended.event.json.clone()),
    });
    Ok(Json(Log { events: events.collect() }))
}
