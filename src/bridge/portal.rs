//! A portal: a pair of rooms kept in step, and what can be asked for when one is made.

use ruma::{OwnedRoomId, OwnedServerName, OwnedUserId, RoomId, ServerName};
use serde::{Deserialize, Serialize};

use crate::event::RoomVersion;
use crate::identity::Side;
use crate::store::StoreError;
use crate::store::portals::PortalRow;

/// How a portal came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortalKind {
    /// The gateway made both rooms. The graph's resolved state has authority.
    Created,
    /// The LM room lives at a remote hub, and the gateway made the Matrix room. The log has authority.
    FromLm,
    /// The Matrix room lives elsewhere, and the gateway made the LM room as its hub. The graph has authority, and the gateway's
    /// bot may have no power in it.
    FromMatrix,
    /// One room for LM servers and graph servers that speak LM, hubbed here: nothing crosses, since it is the same room.
    Shared,
}

impl PortalKind {
    /// As in the store and the admin API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::FromLm => "from_lm",
            Self::FromMatrix => "from_matrix",
            Self::Shared => "shared",
        }
    }

    /// The kind that is written like this.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Created, Self::FromLm, Self::FromMatrix, Self::Shared].into_iter().find(|kind| kind.as_str() == text)
    }
}

/// How a portal is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortalState {
    /// A ghost is invited into a room that the gateway is not in, and its user into the room across: nobody has come in yet.
    Pending,
    /// Events cross.
    Active,
    /// Events cross, but the two states cannot be brought together.
    Degraded,
    /// Nothing crosses.
    Suspended,
    /// Nothing crosses any more, and the gateway's users are leaving.
    Ending,
    /// It is over.
    Ended,
}

impl PortalState {
    /// As in the store and the admin API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Active => "active",
            Self::Degraded => "degraded",
            Self::Suspended => "suspended",
            Self::Ending => "ending",
            Self::Ended => "ended",
        }
    }

    /// The state that is written like this.
    pub fn parse(text: &str) -> Option<Self> {
        let all = [Self::Pending, Self::Active, Self::Degraded, Self::Suspended, Self::Ending, Self::Ended];
        all.into_iter().find(|state| state.as_str() == text)
    }

    /// Whether events cross.
    pub fn carries(self) -> bool {
        matches!(self, Self::Active | Self::Degraded)
    }

    /// Whether one that nobody uses may be ended for another.
    pub(super) fn may_give_way(self) -> bool {
        self.carries() || matches!(self, Self::Suspended | Self::Pending)
    }
}

/// A pair of rooms kept in step.
#[derive(Debug, Clone)]
pub struct Portal {
    /// Its ID: `p` and a number.
    pub portal_id: String,
    /// How it came about.
    pub kind: PortalKind,
    /// How it is.
    pub state: PortalState,
    /// The Matrix room.
    pub matrix_room_id: OwnedRoomId,
    /// The LM room.
    pub lm_room_id: OwnedRoomId,
    /// The LM room's hub.
    pub lm_hub: OwnedServerName,
    /// The alias at the gateway, when it has one.
    pub alias: Option<String>,
    /// Why it is not active.
    pub reason: Option<String>,
    /// Whether the gateway came into the room that lives elsewhere by an invite of a ghost, so that its bot need not be there.
    pub ghosts_alone: bool,
}

impl Portal {
    /// The side whose room others have made.
    pub fn elsewhere(&self) -> Option<Side> {
        match self.kind {
            PortalKind::FromLm => Some(Side::Lm),
            PortalKind::FromMatrix => Some(Side::Matrix),
            PortalKind::Created | PortalKind::Shared => None,
        }
    }

    /// Whether ghosts may be in its room on a side without the bot.
    pub(super) fn has_ghosts_alone(&self, side: Side) -> bool {
        self.ghosts_alone && self.elsewhere() == Some(side)
    }

    /// Whether both sides are the same room.
    pub fn is_one_room(&self) -> bool {
        self.kind == PortalKind::Shared
    }

    /// The sides of which each has a room of its own.
    pub(super) fn sides(&self) -> &'static [Side] {
        if self.is_one_room() { &[Side::Lm] } else { &[Side::Matrix, Side::Lm] }
    }

    /// The address of a Matrix room that was made for an LM room.
    pub(super) fn address(&self) -> Option<&str> {
        self.alias.as_deref().filter(|_| self.kind == PortalKind::FromLm && !self.ghosts_alone)
    }

    /// Its room on one side.
    pub fn room(&self, side: Side) -> &RoomId {
        match side {
            Side::Matrix => &self.matrix_room_id,
            Side::Lm => &self.lm_room_id,
        }
    }

    /// The side whose state the other side follows.
    pub fn authority(&self) -> Side {
        match self.kind {
            PortalKind::Created | PortalKind::FromMatrix | PortalKind::Shared => Side::Matrix,
            PortalKind::FromLm => Side::Lm,
        }
    }

    /// Whether the bot lets ghosts into the room on a side by inviting them, as where the gateway decides who comes in. A Matrix room that
    /// lives elsewhere decides for itself.
    pub(super) fn lets_in(&self, side: Side) -> bool {
        self.kind != PortalKind::FromMatrix || side == Side::Lm
    }

    /// The side whose users a portal is made for: in the room of the other one somebody was before.
    pub(super) fn is_for(&self) -> Side {
        if self.kind == PortalKind::FromMatrix { Side::Lm } else { Side::Matrix }
    }

    /// Whether who has the level on both sides may replace the rooms of it that the gateway made. A foreign hub's room is replaced there.
    pub(super) fn is_replaceable(&self) -> bool {
        matches!(self.kind, PortalKind::Created | PortalKind::FromMatrix)
    }

    /// Whether the Matrix room may be in the gateway's public directory. No homeserver that reads it could join a shared room, and whether
    /// a room of others is shown is theirs to say.
    pub(super) fn may_be_listed(&self) -> bool {
        matches!(self.kind, PortalKind::Created | PortalKind::FromLm)
    }

    /// Its number in the store.
    pub(super) fn number(&self) -> i64 {
        number_of(&self.portal_id).unwrap_or(0)
    }

    /// The portal of a stored row whose rooms are both there; none while it is being made.
    pub(super) fn from_row(row: &PortalRow, server_name: &ServerName) -> Result<Option<Self>, StoreError> {
        let Some(state) = PortalState::parse(&row.state) else { return Ok(None) };
        let (Some(matrix_room_id), Some(lm_room_id)) = (row.matrix_room_id.clone(), row.lm_room_id.clone()) else {
            return Ok(None);
        };
        let kind = PortalKind::parse(&row.kind).ok_or_else(|| StoreError::corrupt("portal kind", &row.kind))?;
        // The LM room's ID leads to its portal in any case.
        let by_room = if kind == PortalKind::FromLm { super::alias::of_room(&lm_room_id) } else { None };
        Ok(Some(Self {
            portal_id: format!("p{}", row.number),
            kind,
            state,
            matrix_room_id,
            lm_room_id,
            lm_hub: row.lm_hub.clone(),
            alias: row.alias.clone().or(by_room).map(|localpart| format!("#{localpart}:{server_name}")),
            reason: row.reason.clone(),
            ghosts_alone: Request::of(row).ghosts_alone,
        }))
    }
}

/// The number in a portal's ID.
pub(super) fn number_of(portal_id: &str) -> Option<i64> {
    portal_id.strip_prefix('p')?.parse().ok()
}

/// A portal that the gateway is to make with both rooms.
#[derive(Debug, Clone, Default)]
pub struct NewPortal {
    /// The name of both rooms.
    pub name: Option<String>,
    /// The localpart of an alias at the gateway, for both sides.
    pub alias: Option<String>,
    /// `public`, `invite` or `knock`; `invite` when absent.
    pub join_rule: Option<String>,
    /// The Matrix room's version; the configured one when absent.
    pub matrix_room_version: Option<RoomVersion>,
    /// The LM room's version; `.02` when absent.
    pub lm_room_version: Option<RoomVersion>,
}

/// What was asked for, as it is stored until the portal is made.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Request {
    pub(super) name: Option<String>,
    pub(super) join_rule: Option<String>,
    pub(super) matrix_room_version: Option<String>,
    pub(super) lm_room_version: Option<String>,
    #[serde(default)]
    pub(super) via: Vec<OwnedServerName>,
    /// Whether the bot was invited, of which the room may hear a moment later.
    #[serde(default)]
    pub(super) invited: bool,
    /// Whether a ghost was invited, and not the bot: the portal is pending until the ghost's user comes.
    #[serde(default)]
    pub(super) ghosts_alone: bool,
    /// The room that the one follows which is to be made.
    #[serde(default)]
    pub(super) predecessor: Option<OwnedRoomId>,
}

impl Request {
    /// What was asked for with a portal.
    pub(super) fn of(row: &PortalRow) -> Self {
        serde_json::from_slice(&row.request).unwrap_or_default()
    }
}

/// Who has a portal made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// A user of the Synapse who names an alias, through the appservice.
    Appservice,
    /// A server that asks for an alias, over federation.
    Server(OwnedServerName),
    /// An LM user who invites the gateway's bot.
    Invite(OwnedUserId),
    /// A Matrix user who invites it.
    MatrixInvite(OwnedUserId),
    /// A user of either side who invites a ghost.
    GhostInvite(OwnedUserId),
    /// An admin.
    Admin,
}
