//! The bridge's seat between the two sides: what `lm` and `dag` ask of it.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ruma::{OwnedEventId, RoomId, ServerName, UserId};

use super::core::Core;
use super::decline::decline;
use super::notice::speaker;
use super::portal::{Cause, Portal, PortalKind, PortalState};
use super::registry::Entry;
use super::side::Event;
use super::users::Who;
use super::{access, create, effect, ends, from_matrix, gate, pending, repair, resolve, space, spaces, upgrade};
use crate::event::Edu;
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::seam::{AliasTarget, Between, EventEffect, Handshake, Invite, Profile, Uninvited};
use crate::store::{images, portals};

/// How long after an invite into a Matrix room the bot follows it.
const AFTER_INVITE: Duration = Duration::from_secs(1);

/// What is given to `lm` and `dag`.
pub(super) struct Seat(pub(super) Arc<Core>);

#[async_trait]
impl Between for Seat {
    async fn gate(&self, handshake: &Handshake) -> Result<(), Refusal> {
        gate::gate(&self.0, handshake).await
    }

    fn watches(&self, side: Side, room_id: &RoomId) -> bool {
        self.0.registry.watches(side, room_id)
    }

    fn paused(&self, room_id: &RoomId) -> bool {
        let is_paused = || Some(self.0.pauses.is_paused(self.0.registry.of_room(Side::Lm, room_id)?.number));
        self.0.pauses.any() && is_paused().unwrap_or_default()
    }

    fn accepted(&self, side: Side, room_id: &RoomId) {
        self.0.call(side, room_id);
        if let Some(entry) = self.0.registry.of_room(side, room_id) {
            pending::look_at(&self.0, &entry);
        }
        self.0.ephemeral.look_at(&self.0, side, room_id);
    }

    fn edu(&self, side: Side, edu: Edu) {
        self.0.ephemeral.take(&self.0, side, edu);
    }

    async fn invited(&self, invite: Invite) -> Result<(), Refusal> {
        invited(&self.0, &invite).await
    }

    async fn is_user(&self, side: Side, user_id: &UserId) -> Result<bool, Refusal> {
        let who = self.0.users.who(&self.0.context.store, side, user_id).await?;
        Ok(matches!(who, Who::Ghost { .. } | Who::Bot))
    }

    fn invited_into(&self, room_id: &RoomId) -> Option<Side> {
        self.0.pending.side_of(room_id)
    }

    async fn uninvited(&self, ended: Uninvited) -> Result<(), Refusal> {
        pending::uninvited(&self.0, &ended).await
    }

    async fn alias(
        &self,
        alias: &str,
        asked_by: Option<&ServerName>,
        side: Option<Side>,
    ) -> Result<AliasTarget, Refusal> {
        resolve::asked(&self.0, alias, asked_by, side).await
    }

    async fn profile(&self, side: Side, user_id: &UserId) -> Result<Profile, Refusal> {
        profile(&self.0, side, user_id).await
    }

    fn hub_misbehaves(&self, room_id: &RoomId, fault: &'static str) {
        if let Some(entry) = self.0.registry.of_room(Side::Lm, room_id) {
            self.0.notices.hub(&self.0, &entry.portal(), fault);
        }
    }

    async fn lpdu_refused(&self, room_id: &RoomId, lpdu_id: &OwnedEventId, error: &str) -> Result<(), Refusal> {
        lpdu_refused(&self.0, room_id, lpdu_id, error).await
    }

    fn lpdu_replaced(&self, lpdu_id: &OwnedEventId, by_lpdu: bool) -> Option<EventEffect> {
        let lpdu_id = lpdu_id.clone();
        Some(EventEffect::new(move |tx, by| {
            Box::pin(async move { images::replaced(tx, &lpdu_id, &by, by_lpdu).await })
        }))
    }

    async fn may_take_hub(&self, room_id: &RoomId) -> Result<(), Refusal> {
        match self.0.registry.of_room(Side::Lm, room_id).map(|entry| entry.portal().state) {
            Some(state) if state.carries() => Ok(()),
            Some(state) => Err(Refusal::Forbidden(format!("the portal of {room_id} is {}", state.as_str()))),
            None => Err(Refusal::Forbidden(format!("{room_id} has no portal here, and no other logs are kept"))),
        }
    }

    fn hub_changed(&self, room_id: &RoomId, hub: &ServerName) {
        hub_changed(&self.0, room_id, hub);
    }
}

/// The portal's kind stays, and with it the side that has authority: that is how the two states have come to be, and the bot has the
/// power for it. What differs where another server keeps the log goes by `lm_hub`.
fn hub_changed(core: &Arc<Core>, room_id: &RoomId, hub: &ServerName) {
    let Some(entry) = core.registry.of_room(Side::Lm, room_id) else { return };
    let before = entry.portal().lm_hub.clone();
    let portal = Portal { lm_hub: hub.to_owned(), ..Portal::clone(&entry.portal()) };
    tracing::info!(portal = portal.portal_id, room = %room_id, %hub, "the log of a portal has another hub");
    core.registry.put(entry.number, portal);
    for hub in [&*before, hub] {
        spaces::soon(core, hub);
    }
    // Whoever kept the log before is told to wait no more.
    core.pauses.waiting(entry.number, hub, 0, 0);
    let (inner, number, hub) = (core.clone(), entry.number, hub.to_owned());
    core.spawn(async move {
        let written = inner
            .context
            .store
            .write(move |tx| Box::pin(async move { portals::set_hub(tx, number, &hub).await }))
            .await;
        if let Err(error) = written {
            // The next start writes it.
            tracing::warn!(portal = number, %error, "the hub of a portal was not written down");
        }
        inner.call_entry(&entry, Side::Matrix);
        inner.call_entry(&entry, Side::Lm);
    });
}

/// An invite of a ghost is signed when its room has a portal: it comes by the room itself too, and is carried over then. An
/// invite of the bot to an LM room makes a portal of it.
async fn invited(core: &Arc<Core>, invite: &Invite) -> Result<(), Refusal> {
    let who = core.users.who(&core.context.store, invite.side, &invite.target).await?;
    let policy = &core.context.config.access;
    match who {
        Who::Ghost { user } => match core.registry.of_room(invite.side, &invite.room_id) {
            Some(entry) if is_carried(core, invite, &entry).await? => {
                access::takes_part(policy, invite.side, invite.sender.server_name())?;
                access::takes_part(policy, invite.side.other(), user.server_name())
            }
            _ => pending::invited(core, invite, &user).await,
        },
        Who::Bot if invite.side == Side::Lm => {
            let encrypted = invite.stripped_state.iter().any(|event| {
                event.get("type").and_then(|kind| kind.as_str()) == Some("m.room.create")
                    && event.get("content").is_some_and(|content| content.get("encryption").is_some())
            });
            if encrypted {
                return Err(Refusal::Encryption(invite.room_id.to_string()));
            }
            let server = invite.sender.server_name();
            access::takes_part(policy, Side::Lm, server)?;
            if upgrade::waits_for(core, Side::Lm, &invite.room_id) {
                upgrade::comes(core, Side::Lm, &invite.room_id, Some(&server.to_owned()));
                return Ok(());
            }
            let cause = Cause::Invite(invite.sender.clone());
            access::may_create(policy, &cause)?;
            if core.registry.of_room(Side::Lm, &invite.room_id).is_none() {
                space::room_for_one_more(core).await?;
                core.budgets.portal(&core.context.config.budgets, server, core.now_ms())?;
            }
            // What an admin has made stays, whether it is used or not.
            let cause = if policy.admins.contains(&invite.sender) { Cause::Admin } else { cause };
            let (making, room_id, via) = (core.clone(), invite.room_id.clone(), vec![server.to_owned()]);
            core.spawn(async move {
                if let Err(refusal) = create::portal_of_lm_invite(&making, &room_id, &via, &cause).await {
                    tracing::warn!(room = %room_id, %refusal, "no portal was made of the room that the bot was invited to");
                }
            });
            Ok(())
        }
        Who::Bot => bot_invited(core, invite).await,
        Who::Native { .. } | Who::Appservice | Who::Stranger => {
            Err(Refusal::NotFound(format!("the user {}", invite.target)))
        }
    }
}

/// Whether an invite comes by its room itself as well, and is carried over then; not where the gateway is not in the room.
async fn is_carried(core: &Core, invite: &Invite, entry: &Entry) -> Result<bool, Refusal> {
    let portal = entry.portal();
    if portal.elsewhere() != Some(invite.side) {
        return Ok(true);
    }
    Ok(match portal.state {
        PortalState::Pending | PortalState::Ending | PortalState::Ended => false,
        _ if portal.has_ghosts_alone(invite.side) => speaker(core, &portal, invite.side).await?.is_some(),
        _ => true,
    })
}

/// The bot is invited into a Matrix room: it makes a portal of it.
async fn bot_invited(core: &Arc<Core>, invite: &Invite) -> Result<(), Refusal> {
    let policy = &core.context.config.access;
    let encryption = invite.stripped_state.iter().find(|event| {
        event.get("type").and_then(|kind| kind.as_str()) == Some(super::carry::ENCRYPTION)
            && event.get("state_key").and_then(|key| key.as_str()) == Some("")
    });
    if encryption.is_some() {
        return Err(Refusal::Encryption(invite.room_id.to_string()));
    }
    let server = invite.sender.server_name();
    access::takes_part(policy, Side::Matrix, server)?;
    if upgrade::waits_for(core, Side::Matrix, &invite.room_id) {
        let (inner, room_id, by) = (core.clone(), invite.room_id.clone(), server.to_owned());
        core.spawn(async move {
            tokio::time::sleep(AFTER_INVITE).await;
            upgrade::comes(&inner, Side::Matrix, &room_id, Some(&by));
        });
        return Ok(());
    }
    let entry = core.registry.of_room(Side::Matrix, &invite.room_id);
    if entry.as_ref().is_some_and(|entry| entry.portal().kind != PortalKind::FromMatrix) {
        return Err(Refusal::Forbidden(format!("{} has its portal", invite.room_id)));
    }
    // The appservice's sender does what an admin wants, or what the homeserver's own admin does.
    let by_appservice = core.users.who(&core.context.store, Side::Matrix, &invite.sender).await? == Who::Appservice;
    let is_admin = by_appservice || policy.admins.contains(&invite.sender);
    let cause = if is_admin { Cause::Admin } else { Cause::MatrixInvite(invite.sender.clone()) };
    access::may_create(policy, &cause)?;
    if entry.is_none() {
        space::room_for_one_more(core).await?;
        if !is_admin {
            core.budgets.portal(&core.context.config.budgets, server, core.now_ms())?;
        }
    }
    let (making, room_id, via) = (core.clone(), invite.room_id.clone(), vec![server.to_owned()]);
    core.spawn(async move {
        // The inviting server has its invite when it is signed. Who is in a public room before that makes it fail there.
        tokio::time::sleep(AFTER_INVITE).await;
        let made = async {
            match making.registry.of_room(Side::Matrix, &room_id) {
                // It was sent out, and is asked back.
                Some(entry) if entry.portal().state == PortalState::Suspended => ends::resume(&making, &entry).await,
                // Ghosts alone were there, and now somebody wants the bot as well.
                Some(entry) if entry.portal().state.carries() => {
                    let dag = &making.sides()?.dag;
                    dag.join(&room_id, &via, making.users.bot(), from_matrix::bot_content())
                        .await
                        .map(|_| entry.portal())
                }
                _ => create::portal_of_invite(&making, &room_id, &via, &cause).await,
            }
        };
        if let Err(refusal) = made.await {
            tracing::warn!(room = %room_id, %refusal, "no portal was made of the room that the bot was invited to");
        }
    });
    Ok(())
}

/// What a ghost is called: only of users who have been in a portal, as they called themselves there. Nobody is asked for
/// others, or any server could have the gateway ask any other.
async fn profile(core: &Core, side: Side, user_id: &UserId) -> Result<Profile, Refusal> {
    let unknown = || Refusal::NotFound(format!("the user {user_id}"));
    let user = match core.users.who(&core.context.store, side, user_id).await? {
        Who::Bot => return Ok(Profile { displayname: Some(super::BOT_NAME.to_owned()), avatar_url: None }),
        Who::Ghost { user } => user,
        Who::Native { .. } | Who::Appservice | Who::Stranger => return Err(unknown()),
    };
    let home = side.other();
    if home == Side::Matrix {
        access::takes_part(&core.context.config.access, home, user.server_name()).map_err(|_| unknown())?;
    }
    let known = images::profile(&core.context.store, home, &user).await?;
    let (displayname, avatar_url) = known.ok_or_else(unknown)?;
    // As whoever asks can read it.
    let avatar_url = avatar_url.map(|uri| core.context.media.across(&uri, side).into_owned());
    Ok(Profile { displayname, avatar_url })
}

/// The hub did not take an LPDU: its source is refused.
async fn lpdu_refused(core: &Arc<Core>, room_id: &RoomId, lpdu_id: &OwnedEventId, error: &str) -> Result<(), Refusal> {
    let Some(entry) = core.registry.of_room(Side::Lm, room_id) else { return Ok(()) };
    let portal = entry.portal();
    let known = images::of_images(&core.context.store, Side::Matrix, std::slice::from_ref(lpdu_id)).await?;
    let Some(image) = known.get(lpdu_id).filter(|image| image.pending) else {
        // An LPDU without a source: the bot's own, or a ghost's that came before an image.
        repair::soon(core, &entry);
        return Ok(());
    };
    let Some(event) = core.sides()?.rooms(Side::Matrix).event(&image.source).await? else { return Ok(()) };
    let error: String = error.chars().take(500).collect();
    let refusal = Refusal::Forbidden(format!("the hub {} refused it: {error}", portal.lm_hub));
    decline(core, &portal, Side::Matrix, &event, &refusal).await?;
    record(core, &entry.portal(), &event, lpdu_id, &refusal).await?;
    core.notices.tell(core, &portal, Side::Matrix, &event, &refusal);
    if event.state_key.is_some() {
        repair::soon(core, &entry);
    }
    core.call_entry(&entry, Side::Matrix);
    Ok(())
}

async fn record(
    core: &Core,
    portal: &super::portal::Portal,
    event: &Event,
    lpdu_id: &OwnedEventId,
    refusal: &Refusal,
) -> Result<(), Refusal> {
    let row = effect::refusal_row(core, portal, Side::Matrix, event, refusal);
    let lpdu_id = lpdu_id.clone();
    core.context
        .store
        .write(move |tx| {
            Box::pin(async move {
                if images::take_pending(tx, &lpdu_id).await?.is_some() {
                    images::refuse(tx, &row).await?;
                }
                Ok(())
            })
        })
        .await?;
    Ok(())
}
