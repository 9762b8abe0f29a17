//! The bridge: portals, the mapping of events and users, translation, the linearizer, the gate and repair. The only place
//! that knows both sides.
#![allow(dead_code)]

mod access;
mod alias;
mod linearize;
mod portal;
mod power;
mod side;
mod translate;
mod users;

use std::sync::Arc;

use ruma::{OwnedServerName, OwnedUserId, UserId};

pub use self::alias::of_alias;
pub use self::portal::{Cause, NewPortal, Portal, PortalKind, PortalState};
use crate::federation::Context;
use crate::refusal::Refusal;
use crate::seam::{AliasTarget, SharedBetween};

/// The bridge; clones share it.
#[derive(Clone)]
pub struct Bridge {
    context: Context,
}

impl Bridge {
    /// The bridge over `context`. `lm` and `dag` are made with [`Bridge::between`] and given to [`Bridge::start`].
    pub fn new(context: Context) -> Self {
        Self { context }
    }

    /// What `lm` and `dag` ask of the bridge.
    pub fn between(&self) -> SharedBetween {
        let _ = &self.context;
        unimplemented!()
    }

    /// Loads the portals, takes up what waits in the inbox, and carries on from there.
    pub async fn start(&self, _lm: crate::lm::Lm, _dag: crate::dag::Dag) -> Result<(), Refusal> {
        unimplemented!()
    }

    /// Makes both rooms and the portal between them.
    pub async fn create_portal(&self, _portal: NewPortal) -> Result<Arc<Portal>, Refusal> {
        unimplemented!()
    }

    /// Joins an LM room at its hub and makes the Matrix room of it. One at a time for each room; an existing portal is
    /// returned as it is.
    pub async fn portal_from_lm(
        &self,
        _lm_room_id: &ruma::RoomId,
        _via: &[OwnedServerName],
        _alias: Option<&str>,
        _cause: Cause,
    ) -> Result<Arc<Portal>, Refusal> {
        unimplemented!()
    }

    /// Where the localpart of an alias leads (`lm_NAME_SERVER`, or one that an admin gave); makes the portal when there
    /// is none and `[access]` allows it. Negative answers are kept for ten minutes.
    pub async fn resolve_alias(&self, _localpart: &str, _cause: Cause) -> Result<AliasTarget, Refusal> {
        unimplemented!()
    }

    /// The portals after the one with the ID `from`, in the order of their making.
    pub async fn portals(&self, _from: Option<&str>, _limit: usize) -> Result<Vec<Arc<Portal>>, Refusal> {
        unimplemented!()
    }

    /// One portal.
    pub async fn portal(&self, _portal_id: &str) -> Result<Option<Arc<Portal>>, Refusal> {
        unimplemented!()
    }

    /// Invites a Matrix or LM user on their own side, by the gateway's bot.
    pub async fn invite(&self, _portal_id: &str, _user_id: &UserId) -> Result<(), Refusal> {
        unimplemented!()
    }

    /// Takes back the bot's invite for a user who has not joined.
    pub async fn withdraw_invite(&self, _portal_id: &str, _user_id: &UserId) -> Result<(), Refusal> {
        unimplemented!()
    }

    /// The ghost's or bot's owner: for `/users` of the appservice and for operators.
    pub async fn user_behind(&self, _ghost: &UserId) -> Result<Option<OwnedUserId>, Refusal> {
        unimplemented!()
    }
}
