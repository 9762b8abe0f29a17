//! What operators do with portals: invites, power, announcements, health.

use std::collections::BTreeMap;
use std::sync::Arc;

use ruma::{OwnedEventId, OwnedUserId, UserId};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::access;
use super::core::Core;
use super::home::home;
use super::notice::{say, text};
use super::one_room;
use super::portal::{Portal, PortalKind, PortalState, number_of};
use super::power::{POWER_LEVELS, USER_LIMIT};
use super::registry::Entry;
use super::users::Who;
use crate::event::Object;
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::seam::Outgoing;
use crate::store::images::{self, RefusalRow};
use crate::store::{gaps, inbox, invitations as invites, lm, portals as stored};

/// How many refusals are shown.
const REFUSALS: i64 = 50;
/// How many faults of a hub are shown.
const FAULTS: i64 = 10;
/// From when on what waits is a sign that something is wrong.
const OVERDUE_MS: i64 = 600_000;

/// How a portal is doing.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
#[schema(as = PortalHealth)]
pub struct Health {
    /// Events that wait to cross to LM, and to Matrix.
    pub waiting: [Waiting; 2],
    /// Images on their way to a foreign hub whose echo has not come.
    pub pending: i64,
    /// What of the hub's log could not be had, or not be checked, so far.
    pub missing: Missing,
    /// What of the Matrix room could not be had so far.
    pub graph_missing: GraphMissing,
    /// What the hub did wrong with its log.
    pub hub_faults: HubFaults,
    /// Whether the hub is told to wait, because too much waits already.
    pub paused: bool,
    /// Whether something has waited for more than ten minutes, or did not come back for that long from a hub that took it.
    pub overdue: bool,
    /// Invites of ghosts into the room that lives elsewhere, of which nothing has come yet.
    pub invitations: Vec<OpenInvite>,
    /// Members at home on each side.
    pub members: Members,
    /// The newest refusals.
    pub refusals: Vec<Refused>,
    /// Of a room that LM servers and other homeservers share: state of which the log has something else than the room, and what is in
    /// the way of correcting it.
    pub uncorrected: Vec<Uncorrected>,
}

/// An invite of a ghost into a room that has no portal in use yet.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct OpenInvite {
    /// Who is invited.
    #[schema(value_type = String)]
    pub user_id: OwnedUserId,
    /// Who invites.
    #[schema(value_type = String)]
    pub inviter: OwnedUserId,
    /// The invite.
    #[schema(value_type = String)]
    pub event_id: OwnedEventId,
    /// What is next: `asked` (the user is to be invited), `open` (the user was invited), `entering` (the user is coming in), `refused` (it is
    /// to be declined), `retracted` (the user's invite is to be taken back).
    pub stage: &'static str,
    /// Why it is refused or retracted.
    pub reason: Option<String>,
    /// When it came, in milliseconds.
    pub since: i64,
    /// Until when the user may answer, in milliseconds.
    pub until: i64,
    /// How often what is next has failed.
    pub tries: i64,
}

/// State that the log of a shared room does not have as the room has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Uncorrected {
    /// The event type.
    #[serde(rename = "type")]
    pub kind: String,
    /// The state key.
    pub state_key: String,
    /// Why it could not be corrected.
    pub reason: String,
}

/// What waits on one side.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
#[schema(as = PortalWaiting)]
pub struct Waiting {
    /// `matrix` or `lm`: where the events are from.
    pub side: &'static str,
    /// How many.
    pub count: i64,
    /// When the oldest was accepted, in milliseconds.
    pub since: Option<i64>,
}

/// What a foreign hub did wrong with its log.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
#[schema(as = PortalHubFaults)]
pub struct HubFaults {
    /// How many faults are on record.
    pub count: i64,
    /// Since when the hub does not know the log's end as it is here, in milliseconds. Nothing is sent to it until it does.
    pub lost_since: Option<i64>,
    /// The newest.
    pub newest: Vec<HubFault>,
}

/// One fault of a hub.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct HubFault {
    /// The event with which it was noticed.
    pub event_id: String,
    /// `forked`, `rewritten`, `reordered`, `forbidden`, `skipped`, `went_back`, `unlinked`, `incomplete` or `moved`.
    pub kind: String,
    /// What is wrong.
    pub problem: String,
    /// When it was noticed, in milliseconds.
    pub noticed_ts: i64,
}

/// What is missing of a foreign hub's log.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
#[schema(as = PortalMissing)]
pub struct Missing {
    /// How many events.
    pub count: i64,
    /// Since when the first of them is known to be missing, in milliseconds.
    pub since: Option<i64>,
    /// What was in the way of that one last.
    pub last_error: Option<String>,
    /// Of a part of the log that is too long to be fetched at once: how many events of it were fetched so far.
    pub fetched: i64,
    /// How many of these are in the log here.
    pub taken: i64,
}

/// What is missing of a Matrix room.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
#[schema(as = PortalGraphMissing)]
pub struct GraphMissing {
    /// Before how many events others are missing.
    pub count: i64,
    /// How many of them wait for these; the others were taken without.
    pub waiting: i64,
    /// Since when the first of these is known to be missing, in milliseconds.
    pub since: Option<i64>,
    /// The server that sent what stands after it.
    pub server: Option<String>,
    /// What was in the way of that one last.
    pub last_error: Option<String>,
}

/// How many members there are.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub struct Members {
    /// At home on Matrix.
    #[schema(value_type = Vec<String>)]
    pub matrix: Vec<OwnedUserId>,
    /// At home on LM.
    #[schema(value_type = Vec<String>)]
    pub lm: Vec<OwnedUserId>,
    /// In a Matrix room that lives elsewhere: those whom the policy keeps out of the LM room, and whom the gateway cannot send out there.
    #[schema(value_type = Vec<String>)]
    pub kept_out: Vec<OwnedUserId>,
}

/// One refusal.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Refused {
    /// `matrix` or `lm`: where the event is from.
    pub side: &'static str,
    /// The event.
    #[schema(value_type = String)]
    pub event_id: OwnedEventId,
    /// Its sender.
    pub sender: String,
    /// Its type.
    pub kind: String,
    /// The reason as one word.
    pub code: String,
    /// The reason as a sentence.
    pub reason: String,
    /// When, in milliseconds.
    pub refused_ts: i64,
}

/// The portal with this ID, if it has not ended.
pub(super) async fn entry(core: &Core, portal_id: &str) -> Result<Arc<Entry>, Refusal> {
    let found = number_of(portal_id).and_then(|number| core.registry.get(number));
    if let Some(entry) = found {
        return Ok(entry);
    }
    let portal = known(core, portal_id).await?;
    let reason = portal.reason.as_deref().unwrap_or("no reason is recorded");
    Err(Refusal::Forbidden(format!("the portal {portal_id} has ended: {reason}")))
}

/// The portal with this ID, also one that has ended, as long as its row is kept.
pub(super) async fn known(core: &Core, portal_id: &str) -> Result<Arc<Portal>, Refusal> {
    find(core, portal_id).await?.ok_or_else(|| Refusal::NotFound(format!("the portal {portal_id}")))
}

/// The same, if there is one.
pub(super) async fn find(core: &Core, portal_id: &str) -> Result<Option<Arc<Portal>>, Refusal> {
    let Some(number) = number_of(portal_id) else { return Ok(None) };
    let found = portals(core, number.saturating_sub(1), 1).await?.pop();
    Ok(found.filter(|portal| portal.number() == number))
}

/// The portals after a number, in the order of their making. Those that have ended are in the store alone.
pub(super) async fn portals(core: &Core, after: i64, limit: usize) -> Result<Vec<Arc<Portal>>, Refusal> {
    let open = core.registry.after(after, limit);
    let mut portals: BTreeMap<i64, Arc<Portal>> = open.iter().map(|entry| (entry.number, entry.portal())).collect();
    let most = i64::try_from(limit).unwrap_or(i64::MAX);
    // After the others: one that ends meanwhile is found twice, and not never.
    for row in stored::ended_after(&core.context.store, after, most).await? {
        if let Some(portal) = Portal::from_row(&row, &core.context.server_name)? {
            portals.insert(row.number, Arc::new(portal));
        }
    }
    Ok(portals.into_values().take(limit).collect())
}

/// How a portal is doing.
pub(super) async fn health(core: &Core, portal_id: &str) -> Result<Health, Refusal> {
    let portal = known(core, portal_id).await?;
    let number = portal.number();
    let store = &core.context.store;
    let now = core.now_ms();
    let (from_matrix, since_matrix) = inbox::backlog(store, Side::Matrix, &portal.matrix_room_id).await?;
    let (from_lm, since_lm) = inbox::backlog(store, Side::Lm, &portal.lm_room_id).await?;
    let (pending, since_pending) = images::pending(store, number).await?;
    let lm::Missing { count, since, last_error, gaps: _, fetched, taken } =
        lm::missing(store, Some(&portal.lm_room_id)).await?;
    let graph = gaps::missing(store, Some(&portal.matrix_room_id)).await?;
    let members = match portal.is_one_room() {
        // Nobody is in it yet.
        _ if portal.state == PortalState::Pending => Members::default(),
        true => one_room::members(core, &portal).await?,
        false => {
            let (matrix, lm) = (natives(core, &portal, Side::Matrix).await?, natives(core, &portal, Side::Lm).await?);
            let access = &core.context.config.access;
            let is_kept_out = |user: &&OwnedUserId| {
                portal.kind == PortalKind::FromMatrix
                    && access::takes_part(access, Side::Matrix, user.server_name()).is_err()
            };
            let kept_out = matrix.iter().filter(is_kept_out).cloned().collect();
            Members { matrix, lm, kept_out }
        }
    };
    // Announcements and repairs too, of which nothing else tells that they wait.
    let since_taken = lm::taken_since(store, &portal.lm_room_id).await?;
    let late = |since: Option<i64>| since.is_some_and(|since| now.saturating_sub(since) > OVERDUE_MS);
    Ok(Health {
        waiting: [
            Waiting { side: Side::Matrix.as_str(), count: from_matrix, since: since_matrix },
            Waiting { side: Side::Lm.as_str(), count: from_lm, since: since_lm },
        ],
        pending,
        missing: Missing { count, since, last_error, fetched, taken },
        hub_faults: hub_faults(core, &portal).await?,
        paused: core.pauses.is_paused(number),
        graph_missing: GraphMissing {
            count: graph.count,
            waiting: graph.waiting,
            since: graph.since,
            server: graph.server,
            last_error: graph.last_error,
        },
        overdue: [since_matrix, since_lm, since_pending, since, since_taken, graph.since].into_iter().any(late),
        invitations: invitations(core, &portal).await?,
        members,
        refusals: images::refusals(store, number, REFUSALS).await?.into_iter().map(Refused::from).collect(),
        uncorrected: match portal.is_one_room() && portal.state != PortalState::Ended {
            true => one_room::uncorrected(core, &portal).await?,
            false => Vec::new(),
        },
    })
}

async fn invitations(core: &Core, portal: &Portal) -> Result<Vec<OpenInvite>, Refusal> {
    let Some(side) = portal.elsewhere().filter(|_| portal.state != PortalState::Ended) else { return Ok(Vec::new()) };
    let open = invites::of_room(&core.context.store, side, portal.room(side)).await?;
    let shown = open.into_iter().map(|row| OpenInvite {
        user_id: row.user,
        inviter: row.inviter,
        event_id: row.event_id,
        stage: row.stage.as_str(),
        reason: row.reason,
        since: row.made_ts,
        until: row.expires_ts,
        tries: row.tries,
    });
    Ok(shown.collect())
}

async fn hub_faults(core: &Core, portal: &Portal) -> Result<HubFaults, Refusal> {
    let (store, room) = (&core.context.store, &portal.lm_room_id);
    let (count, newest) = lm::faults(store, room, FAULTS).await?;
    let fault = |row: lm::FaultRow| {
        let lm::FaultRow { event_id, kind, problem, noticed_ts } = row;
        HubFault { event_id, kind, problem, noticed_ts }
    };
    let lost_since = lm::lost_since(store, room).await?;
    Ok(HubFaults { count, lost_since, newest: newest.into_iter().map(fault).collect() })
}

async fn natives(core: &Core, portal: &Portal, side: Side) -> Result<Vec<OwnedUserId>, Refusal> {
    let state = core.sides()?.rooms(side).state(portal.room(side)).await?;
    let mut natives = Vec::new();
    for entry in state.members().into_iter().filter(|entry| entry.membership() == "join") {
        if let Ok(user) = UserId::parse(entry.state_key)
            && matches!(core.users.who(&core.context.store, side, &user).await?, Who::Native { .. })
        {
            natives.push(user);
        }
    }
    Ok(natives)
}

/// Invites a user on their own side.
pub(super) async fn invite(core: &Core, portal_id: &str, user: &UserId, side: Option<Side>) -> Result<(), Refusal> {
    let portal = entry(core, portal_id).await?.portal();
    if portal.is_one_room() {
        return one_room::invite(core, &portal, user).await;
    }
    let (side, state) = home(core, &portal, user, side).await?;
    if matches!(state.membership(user), "invite" | "join") {
        return Ok(());
    }
    let rooms = core.sides()?.rooms(side);
    let draft = core.member(core.users.bot(), user, "invite");
    rooms.invite(portal.room(side), Outgoing { draft, effect: None }).await.map(drop)
}

/// Takes back an invite for a user who has not joined.
pub(super) async fn withdraw_invite(core: &Core, portal_id: &str, user: &UserId) -> Result<(), Refusal> {
    let portal = entry(core, portal_id).await?.portal();
    // Whoever asks knows no side, and only an open invite is withdrawn.
    let matrix = core.sides()?.rooms(Side::Matrix).state(&portal.matrix_room_id).await?;
    let side = if matrix.membership(user) == "invite" { Side::Matrix } else { Side::Lm };
    let state = core.sides()?.rooms(side).state(portal.room(side)).await?;
    if state.membership(user) != "invite" {
        return Ok(());
    }
    core.send(&portal, side, core.member(core.users.bot(), user, "leave")).await.map(drop)
}

/// Says something in both rooms: the Matrix event and the LM event.
pub(super) async fn announce(
    core: &Core,
    portal_id: &str,
    body: &str,
) -> Result<(OwnedEventId, OwnedEventId), Refusal> {
    let portal = entry(core, portal_id).await?.portal();
    if portal.is_one_room() {
        let said = say(core, &portal, Side::Lm, text("m.text", body)).await?;
        return Ok((said.clone(), said));
    }
    let matrix = say(core, &portal, Side::Matrix, text("m.text", body)).await?;
    let lm = say(core, &portal, Side::Lm, text("m.text", body)).await?;
    Ok((matrix, lm))
}

/// Sets a member's power on both sides, the authority's first.
pub(super) async fn set_power(
    core: &Core,
    portal_id: &str,
    user: &UserId,
    level: i64,
    side: Option<Side>,
) -> Result<(), Refusal> {
    let portal = entry(core, portal_id).await?.portal();
    if portal.is_one_room() {
        return grant(core, &portal, Side::Lm, user, level).await;
    }
    let (side, _) = home(core, &portal, user, side).await?;
    let who = core.users.who(&core.context.store, side, user).await?;
    let Who::Native { ghost } = who else {
        return Err(Refusal::Forbidden(format!("{user} is of this gateway's own name")));
    };
    core.users.keep(&core.context.store, side, [&user.to_owned()]).await?;
    for at in [portal.authority(), portal.authority().other()] {
        let name = if at == side { user } else { ghost.as_ref() };
        grant(core, &portal, at, name, level).await?;
    }
    Ok(())
}

/// Sets a user's power on one side.
async fn grant(core: &Core, portal: &Portal, side: Side, user: &UserId, level: i64) -> Result<(), Refusal> {
    let state = core.sides()?.rooms(side).state(portal.room(side)).await?;
    let mut content: Object = state.content(POWER_LEVELS).cloned().unwrap_or_default();
    content.retain(|key, _| !key.starts_with(super::translate::OWN_PREFIX));
    let users = content.entry("users").or_insert_with(|| Value::Object(Object::new()));
    let Some(users) = users.as_object_mut() else {
        return Err(Refusal::malformed("m.room.power_levels", "users is no object"));
    };
    users.insert(user.to_string(), json!(level.clamp(-USER_LIMIT, USER_LIMIT)));
    core.send(portal, side, core.draft(core.users.bot(), POWER_LEVELS, Some(""), content)).await.map(drop)
}

impl From<RefusalRow> for Refused {
    fn from(row: RefusalRow) -> Self {
        Self {
            side: row.side.as_str(),
            event_id: row.source,
            sender: row.sender,
            kind: row.kind,
            code: row.code,
            reason: row.reason,
            refused_ts: row.refused_ts,
        }
    }
}
