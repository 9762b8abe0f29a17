//! The bridge: portals, the mapping of events and users, translation, the linearizer, the gate and repair. The only place
//! that knows both sides.
//!
//! An accepted event waits in `inbox`, is put in order by `linearize`, `carry` (with `member` and `translate`, all pure)
//! says what becomes of it, and `worker` does that with the writes of `effect`. `gate` asks the other side before anybody
//! joins; `plan` and `repair` bring the two states in step again; `create` makes portals, as far as there is `space`
//! (`from_lm` and `from_matrix`, with `populate` and `history`, of rooms that exist already; `pending` those of rooms into which ghosts
//! are invited), and `ends` ends them. Typing, receipts and presence go by `ephemeral`, with nothing stored.

mod access;
mod acl;
mod admin;
mod alias;
mod budget;
mod carry;
mod core;
mod create;
mod decline;
mod effect;
mod ends;
mod ephemeral;
mod explain;
mod from_lm;
mod from_matrix;
mod gate;
mod history;
mod home;
mod inbox;
mod left;
mod linearize;
mod listed;
mod loops;
mod member;
mod notice;
mod one_room;
mod pause;
mod pending;
mod pins;
mod plan;
mod populate;
mod portal;
mod power;
mod read_up_to;
mod registry;
mod repair;
mod resolve;
mod rooms;
mod seat;
mod side;
mod space;
mod spaces;
mod translate;
mod upgrade;
mod users;
mod worker;

use std::sync::Arc;

use ruma::{EventId, OwnedEventId, OwnedServerName, OwnedUserId, UserId};

pub use self::admin::{Health, HubFault, HubFaults, Members, OpenInvite, Refused, Uncorrected, Waiting};
pub use self::alias::{lm_alias, of_alias};
use self::core::Core;
pub use self::ends::{GHOSTS_STAY_MS, UNUSED_MS};
pub use self::explain::Explanation;
pub use self::listed::Listed;
pub use self::pending::PENDING_MS;
pub use self::portal::{Cause, NewPortal, Portal, PortalKind, PortalState};
use self::seat::Seat;
use self::side::Sides;
pub use self::upgrade::LET_IN_MS;
use self::users::Who;
pub use self::users::bot_of;
use crate::federation::Context;
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::seam::{AliasTarget, SharedBetween};
use crate::store::{inbox as store_inbox, portals};

/// What the bot is called.
const BOT_NAME: &str = "isthmus";

/// The bridge; clones share it.
#[derive(Clone)]
pub struct Bridge {
    core: Arc<Core>,
}

/// What was found when the portals were loaded.
#[must_use = "what was being made is to be taken up"]
pub struct Loaded {
    /// Portals that were being made.
    making: Vec<portals::PortalRow>,
}

impl Bridge {
    /// The bridge over `context`. `lm` and `dag` are made with [`Bridge::between`] and given to [`Bridge::load`].
    pub fn new(context: Context) -> Self {
        Self { core: Arc::new(Core::new(context)) }
    }

    /// What `lm` and `dag` ask of the bridge.
    pub fn between(&self) -> SharedBetween {
        Arc::new(Seat(self.core.clone()))
    }

    /// Loads the portals and carries on from there: [`Self::load`] and [`Self::resume`].
    pub async fn start(&self, lm: crate::lm::Lm, dag: crate::dag::Dag) -> Result<(), Refusal> {
        let loaded = self.load(lm, dag).await?;
        self.resume(loaded).await
    }

    /// Loads the portals. Before this nothing may be accepted in any room: nobody would keep it for its portal.
    pub async fn load(&self, lm: crate::lm::Lm, dag: crate::dag::Dag) -> Result<Loaded, Refusal> {
        let core = &self.core;
        let mut making = Vec::new();
        core.context.store.write(|tx| Box::pin(portals::set_all_hubs(tx))).await?;
        for row in portals::open(&core.context.store).await? {
            if row.state == create::CREATING {
                create::watch(core, &row);
                making.push(row);
            } else if let Some(portal) = Portal::from_row(&row, &core.context.server_name)? {
                core.registry.put(row.number, portal);
            }
        }
        for (localpart, number) in portals::aliases(&core.context.store).await? {
            core.registry.set_alias(&localpart, number);
        }
        pending::load(core).await?;
        spaces::load(core).await?;
        core.set_sides(Sides { lm, dag });
        Ok(Loaded { making })
    }

    /// Takes up what waits in the inbox, what was being made and what was being ended.
    pub async fn resume(&self, loaded: Loaded) -> Result<(), Refusal> {
        let core = &self.core;
        for (side, room_id) in store_inbox::rooms(&core.context.store).await? {
            core.call(side, &room_id);
        }
        repair::at_start(core);
        create::resume(core, loaded.making);
        pending::at_start(core);
        ends::at_start(core);
        spaces::at_start(core);
        core.spawn(ephemeral::run(core.clone()));
        Ok(())
    }

    /// Stops carrying. What is under way ends where it is and is taken up at the next start.
    pub async fn stop(&self) {
        self.core.stop.cancel();
        self.core.tasks.close();
        self.core.tasks.wait().await;
    }

    /// Makes both rooms and the portal between them.
    pub async fn create_portal(&self, portal: NewPortal) -> Result<Arc<Portal>, Refusal> {
        // In a box, as below: futures inside each other get too deep for the compiler.
        Box::pin(create::create_portal(&self.core, portal)).await
    }

    /// Makes one room that LM servers and graph servers that speak LM share, with the gateway as its hub.
    pub async fn shared_room(&self, portal: NewPortal) -> Result<Arc<Portal>, Refusal> {
        Box::pin(create::shared_room(&self.core, portal)).await
    }

    /// Joins an LM room at its hub and makes the Matrix room of it. One at a time for each room; an existing portal is
    /// returned as it is.
    pub async fn portal_from_lm(
        &self,
        lm_room_id: &ruma::RoomId,
        via: &[OwnedServerName],
        alias: Option<&str>,
        cause: Cause,
    ) -> Result<Arc<Portal>, Refusal> {
        Box::pin(create::portal_from_lm(&self.core, lm_room_id, via, alias, &cause)).await
    }

    /// Joins a Matrix room that lives elsewhere, through the servers `via`, and makes the LM room of it, hubbed here. One at a time for each
    /// room; an existing portal is returned as it is. `alias` is the localpart of an alias at the gateway.
    pub async fn portal_from_matrix(
        &self,
        matrix_room_id: &ruma::RoomId,
        via: &[OwnedServerName],
        alias: Option<&str>,
        cause: Cause,
    ) -> Result<Arc<Portal>, Refusal> {
        Box::pin(create::portal_from_matrix(&self.core, matrix_room_id, via, alias, &cause)).await
    }

    /// The same of the room that a Matrix alias (`#NAME:SERVER`) leads to.
    pub async fn portal_of_matrix_alias(
        &self,
        matrix_alias: &str,
        via: &[OwnedServerName],
        alias: Option<&str>,
    ) -> Result<Arc<Portal>, Refusal> {
        let parsed = <&ruma::RoomAliasId>::try_from(matrix_alias);
        let parsed = parsed.map_err(|error| Refusal::malformed("matrix_alias", error.to_string()))?;
        let target = self.core.sides()?.dag.query_directory(parsed.server_name(), matrix_alias).await?;
        let via: Vec<_> = via.iter().cloned().chain(target.servers).collect();
        self.portal_from_matrix(&target.room_id, &via, alias, Cause::Admin).await
    }

    /// Where the localpart of an alias leads (`lm_NAME_SERVER`, or one that an admin gave); makes the portal when there
    /// is none and `[access]` allows it. Negative answers are kept for ten minutes,
    /// and for half a minute when the hub could not be asked.
    pub async fn resolve_alias(&self, localpart: &str, cause: Cause) -> Result<AliasTarget, Refusal> {
        resolve::resolve(&self.core, localpart, &cause).await
    }

    /// Where such a localpart leads by the portals that are there. Nobody is asked, and nothing is made.
    pub fn known_alias(&self, localpart: &str) -> Option<AliasTarget> {
        resolve::known(&self.core, localpart)
    }

    /// The portal of the room that an LM alias (`#NAME:SERVER`) leads to; for an admin, who wants no old answer.
    pub async fn portal_of_alias(&self, alias: &str) -> Result<Arc<Portal>, Refusal> {
        let parsed = <&ruma::RoomAliasId>::try_from(alias);
        let parsed = parsed.map_err(|error| Refusal::malformed("lm_alias", error.to_string()))?;
        let localpart = alias::of_alias(parsed.alias(), parsed.server_name());
        self.core.negative.invalidate(&localpart).await;
        resolve::portal(&self.core, &localpart, &Cause::Admin).await
    }

    /// Why the localpart of an alias led nowhere when it was last resolved, while that answer is kept.
    pub async fn why_not(&self, localpart: &str) -> Option<Refusal> {
        self.core.negative.get(localpart).await
    }

    /// Ends a portal: says goodbye in both rooms, has the ghosts and the bot leave both, and forgets the mappings. Returns
    /// when it is done; of a portal that has ended it does nothing.
    pub async fn remove_portal(&self, portal_id: &str, reason: &str) -> Result<Arc<Portal>, Refusal> {
        match admin::entry(&self.core, portal_id).await {
            Ok(entry) => ends::end(&self.core, &entry, reason).await,
            Err(refusal) => {
                let portal = admin::find(&self.core, portal_id).await?;
                portal.filter(|portal| portal.state == PortalState::Ended).ok_or(refusal)
            }
        }
    }

    /// Makes a portal that was suspended active again. The bot comes back into the rooms that it is not in, where it is let
    /// in; of a portal that is active this does nothing.
    pub async fn resume_portal(&self, portal_id: &str) -> Result<Arc<Portal>, Refusal> {
        let entry = admin::entry(&self.core, portal_id).await?;
        ends::resume(&self.core, &entry).await
    }

    /// Does what is due by the clock: ghosts leave portals that have been suspended for an hour, portals that were
    /// made a day ago, by an alias or an invite, and that nobody has used end. Done every half a minute by itself.
    pub async fn look_for_ends(&self) -> Result<(), Refusal> {
        ends::due(&self.core).await
    }

    /// The portals after the one with the ID `from`, in the order of their making.
    pub async fn portals(&self, from: Option<&str>, limit: usize) -> Result<Vec<Arc<Portal>>, Refusal> {
        let from = match from {
            Some(id) => {
                portal::number_of(id).ok_or_else(|| Refusal::malformed("from", format!("{id:?} is no portal")))?
            }
            None => 0,
        };
        admin::portals(&self.core, from, limit).await
    }

    /// The first portals that have not ended, in the order of their making.
    pub fn open_portals(&self, limit: usize) -> Vec<Arc<Portal>> {
        self.core.registry.after(0, limit).iter().map(|entry| entry.portal()).collect()
    }

    /// One portal.
    pub async fn portal(&self, portal_id: &str) -> Result<Option<Arc<Portal>>, Refusal> {
        admin::find(&self.core, portal_id).await
    }

    /// How a portal is doing: what waits, what was refused, who is in it.
    pub async fn health(&self, portal_id: &str) -> Result<Health, Refusal> {
        admin::health(&self.core, portal_id).await
    }

    /// Where an event is on both sides, and why not; none when it is on neither.
    pub async fn explain(&self, event_id: &EventId) -> Result<Option<Explanation>, Refusal> {
        explain::explain(&self.core, event_id).await
    }

    /// Compares the two states of a portal and sends what brings them together. Returns how many repairs were sent.
    pub async fn repair(&self, portal_id: &str) -> Result<usize, Refusal> {
        let entry = admin::entry(&self.core, portal_id).await?;
        Ok(repair::run(&self.core, &entry).await?.sent)
    }

    /// How many repairs it would take now: none when the two states are in step (INV-4), or will not be any more.
    pub async fn out_of_step(&self, portal_id: &str) -> Result<usize, Refusal> {
        match admin::known(&self.core, portal_id).await? {
            portal if matches!(portal.state, PortalState::Ended | PortalState::Pending) => Ok(0),
            portal if portal.is_one_room() => one_room::out_of_step(&self.core, &portal).await,
            portal => Ok(repair::fixes(&self.core, &portal).await?.len()),
        }
    }

    /// Has the bot say something in both rooms. Returns the Matrix event and the LM event.
    pub async fn announce(&self, portal_id: &str, body: &str) -> Result<(OwnedEventId, OwnedEventId), Refusal> {
        admin::announce(&self.core, portal_id, body).await
    }

    /// Hands the log of a portal's LM room over to another server, which agrees to it. Where servers in the room do not show that they
    /// know what this is, only with `force`.
    pub async fn hand_over(
        &self,
        portal_id: &str,
        server: &ruma::ServerName,
        force: bool,
    ) -> Result<crate::lm::HandedOver, Refusal> {
        let portal = admin::entry(&self.core, portal_id).await?.portal();
        if !portal.state.carries() {
            let state = portal.state.as_str();
            return Err(Refusal::Forbidden(format!("the portal {portal_id} is {state}: its log stays where it is")));
        }
        let lm = &self.core.sides()?.lm;
        lm.hand_over(&portal.lm_room_id, self.core.users.bot(), server, force).await
    }

    /// Sets a member's power on both sides, by the gateway's bot.
    pub async fn set_power(&self, portal_id: &str, user_id: &UserId, level: i64) -> Result<(), Refusal> {
        admin::set_power(&self.core, portal_id, user_id, level, None).await
    }

    /// The same for a user who is at home on this side.
    pub async fn set_power_of(
        &self,
        portal_id: &str,
        user_id: &UserId,
        level: i64,
        side: Option<Side>,
    ) -> Result<(), Refusal> {
        admin::set_power(&self.core, portal_id, user_id, level, side).await
    }

    /// Invites a Matrix or LM user on their own side, by the gateway's bot.
    pub async fn invite(&self, portal_id: &str, user_id: &UserId) -> Result<(), Refusal> {
        admin::invite(&self.core, portal_id, user_id, None).await
    }

    /// Invites a Matrix user into the Matrix room if anybody may join it: whether they are invited, or in it, now.
    pub async fn invite_if_public(&self, portal_id: &str, user_id: &UserId) -> Result<bool, Refusal> {
        listed::invite_if_public(&self.core, portal_id, user_id).await
    }

    /// The rooms of the public directory, at most `limit`.
    pub async fn listed(&self, limit: usize) -> Result<Vec<Listed>, Refusal> {
        listed::listed(&self.core, limit).await
    }

    /// The same for a user who is at home on this side.
    pub async fn invite_on(&self, portal_id: &str, user_id: &UserId, side: Option<Side>) -> Result<(), Refusal> {
        admin::invite(&self.core, portal_id, user_id, side).await
    }

    /// Takes back the bot's invite for a user who has not joined.
    pub async fn withdraw_invite(&self, portal_id: &str, user_id: &UserId) -> Result<(), Refusal> {
        admin::withdraw_invite(&self.core, portal_id, user_id).await
    }

    /// The ghost of a user who is at home on `home`, on the other side; none of users of the gateway's own name.
    pub async fn ghost_of(&self, user: &UserId, home: Side) -> Result<Option<OwnedUserId>, Refusal> {
        match self.core.users.who(&self.core.context.store, home, user).await? {
            Who::Native { ghost } => Ok(Some(ghost)),
            _ => Ok(None),
        }
    }

    /// The ghost's or bot's owner: for `/users` of the appservice and for operators.
    pub async fn user_behind(&self, ghost: &UserId) -> Result<Option<OwnedUserId>, Refusal> {
        for side in [Side::Matrix, Side::Lm] {
            if let Who::Ghost { user } = self.core.users.who(&self.core.context.store, side, ghost).await? {
                return Ok(Some(user));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ruma::{room_id, server_name};
    use serde_json::json;

    use super::*;
    use crate::clock::SystemClock;
    use crate::identity::Side;
    use crate::store::portals::PortalRow;

    #[tokio::test]
    async fn what_comes_before_all_is_taken_up_is_kept_for_its_portal() {
        let directory = tempfile::tempdir().unwrap();
        let config = serde_json::from_value(json!({
            "server_name": "g.example",
            "signing_key": directory.path().join("key"),
            "database": { "url": format!("sqlite://{}", directory.path().join("db").display()) },
        }));
        let context = crate::gateway::context(config.unwrap(), Arc::new(SystemClock)).await.unwrap();
        let (lm_room, matrix_room) = (room_id!("!a:hub.example"), room_id!("!b:g.example"));
        let row = PortalRow {
            number: 0,
            kind: "from_lm".to_owned(),
            state: create::CREATING.to_owned(),
            matrix_room_id: Some(matrix_room.to_owned()),
            lm_room_id: Some(lm_room.to_owned()),
            lm_hub: server_name!("hub.example").to_owned(),
            alias: None,
            reason: None,
            request: b"{}".to_vec(),
            created_ts: 7,
            unused_until_ts: None,
        };
        let insert = context.store.write(move |tx| Box::pin(async move { portals::insert(tx, &row).await }));
        insert.await.unwrap();
        let bridge = Bridge::new(context.clone());
        let between = bridge.between();
        let lm = crate::lm::Lm::new(context.clone(), between.clone());
        let dag = crate::dag::Dag::new(context, between.clone());
        let loaded = bridge.load(lm, dag).await.unwrap();
        // Nothing of the bridge is at work yet, and what other servers send now may be accepted.
        assert!(between.watches(Side::Lm, lm_room) && between.watches(Side::Matrix, matrix_room));
        assert_eq!(loaded.making.len(), 1);
    }
}
