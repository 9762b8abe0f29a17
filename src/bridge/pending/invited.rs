//! An invite of a ghost arrives, or is taken back. It is written down before it is signed.

use std::sync::Arc;

use ruma::UserId;

use super::{PENDING_MS, Shown, lock, refusal_row, soon};
use crate::bridge::carry::ENCRYPTION;
use crate::bridge::core::Core;
use crate::bridge::portal::Cause;
use crate::bridge::side::MEMBER;
use crate::bridge::{access, create, from_matrix, space};
use crate::config::EncryptionPolicy;
use crate::event::Object;
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::seam::{Invite, Uninvited};
use crate::store::images::{self, RefusalRow};
use crate::store::invitations::{self, Invitation, Next, Stage};
use crate::store::{StoreError, Tx};

/// The longest invite content that is kept, in bytes, and the longest text in it that means something.
const CONTENT_LIMIT: usize = 8_192;
/// What of a room is shown before it is joined.
const SHOWN: [&str; 3] = ["m.room.name", "m.room.topic", "m.room.avatar"];

/// A ghost, which stands for `user`, is invited into a room that has no portal, or a pending one.
pub(in crate::bridge) async fn invited(core: &Arc<Core>, invite: &Invite, user: &UserId) -> Result<(), Refusal> {
    let (policy, limits) = (&core.context.config.access, &core.context.config.budgets);
    let (side, server) = (invite.side, invite.sender.server_name());
    access::takes_part(policy, side, server)?;
    access::takes_part(policy, side, &invite.via)?;
    access::takes_part(policy, side.other(), user.server_name())?;
    access::may_create(policy, &Cause::GhostInvite(invite.sender.clone()))?;
    create::may_be_elsewhere(core, side, &invite.room_id).await?;
    let EncryptionPolicy::Refuse = core.context.config.portals.encryption;
    let encrypted = algorithm(invite);
    let store = &core.context.store;
    if let Some(algorithm) = encrypted.as_ref().filter(|_| side == Side::Lm) {
        // Who invited is told by the hub, and an operator by `explain`.
        let refused = refused(core, &row(core, invite, user, encrypted.clone()));
        store.write(move |tx| Box::pin(write_refusal(tx, refused))).await?;
        return Err(Refusal::Encryption(algorithm.clone()));
    }
    if let Some(known) = invitations::one(store, side, &invite.room_id, user).await? {
        if known.event_id == invite.event_id {
            // It is signed again.
            return Ok(());
        }
    } else {
        let (of_user, of_server) = invitations::count(store, &invite.sender).await?;
        let who = invite.sender.as_str();
        for (count, limit, who) in
            [(of_user, limits.open_invites_per_user, who), (of_server, limits.open_invites_per_server, server.as_str())]
        {
            if limit > 0 && count >= i64::from(limit) {
                let problem = format!("{count} invites of {who} wait for an answer, and there may be {limit}");
                return Err(Refusal::Policy(problem));
            }
        }
    }
    if core.registry.of_room(side, &invite.room_id).is_none() {
        space::room_for_one_more(core).await?;
        core.budgets.portal(limits, server, core.now_ms())?;
    }
    let row = row(core, invite, user, encrypted);
    let refused = refused(core, &row);
    let write = store.write(move |tx| {
        Box::pin(async move {
            invitations::put(tx, &row).await?;
            write_refusal(tx, refused).await
        })
    });
    write.await?;
    lock(&core.pending.rooms).insert(invite.room_id.clone(), side);
    soon(core, side, &invite.room_id);
    Ok(())
}

/// What is written of an invite that is refused from the start.
fn refused(core: &Core, row: &Invitation) -> Option<RefusalRow> {
    Some(refusal_row(core, row, row.code.as_deref()?, row.reason.as_deref()?))
}

async fn write_refusal(tx: &mut Tx, refused: Option<RefusalRow>) -> Result<(), StoreError> {
    match refused {
        Some(refused) => images::refuse(tx, &refused).await,
        None => Ok(()),
    }
}

fn row(core: &Core, invite: &Invite, user: &UserId, encrypted: Option<String>) -> Invitation {
    let now = core.now_ms();
    let reason = encrypted.map(|algorithm| Refusal::Encryption(algorithm).to_string());
    let json = |content: &Object| {
        let json = serde_json::to_vec(content).unwrap_or_default();
        if json.len() > CONTENT_LIMIT { b"{}".to_vec() } else { json }
    };
    Invitation {
        side: invite.side,
        room_id: invite.room_id.clone(),
        user: user.to_owned(),
        inviter: invite.sender.clone(),
        via: invite.via.clone(),
        event_id: invite.event_id.clone(),
        content: json(&invite.content),
        shown: serde_json::to_vec(&shown(invite)).unwrap_or_default(),
        stage: if reason.is_some() { Stage::Refused } else { Stage::Asked },
        code: reason.as_ref().map(|_| "encryption".to_owned()),
        reason,
        image: None,
        made_ts: now,
        expires_ts: now.saturating_add(PENDING_MS),
        stage_ts: now,
        tries: 0,
        retry_ts: 0,
    }
}

/// What the invite says of the room and of who invites; nothing of it that is too long.
fn shown(invite: &Invite) -> Shown {
    let content = |kind: &str, key: &str| {
        let is_it = |event: &&Object| text(event, "type") == Some(kind) && text(event, "state_key") == Some(key);
        let content = invite.stripped_state.iter().find(is_it)?.get("content")?.as_object()?.clone();
        serde_json::to_vec(&content).is_ok_and(|json| json.len() <= CONTENT_LIMIT).then_some(content)
    };
    Shown {
        room: SHOWN.into_iter().filter_map(|kind| Some((kind.to_owned(), content(kind, "")?))).collect(),
        inviter: content(MEMBER, invite.sender.as_str()).unwrap_or_default(),
    }
}

/// By which algorithm the room is encrypted, as far as the invite says.
fn algorithm(invite: &Invite) -> Option<String> {
    let of_kind = |kind: &str| {
        let is_it = |event: &&Object| text(event, "type") == Some(kind) && text(event, "state_key") == Some("");
        invite.stripped_state.iter().find(is_it)?.get("content")?.as_object()
    };
    let encryption = match invite.side {
        Side::Matrix => of_kind(ENCRYPTION)?,
        Side::Lm => of_kind("m.room.create")?.get("encryption")?.as_object()?,
    };
    Some(from_matrix::encrypted(encryption))
}

fn text<'a>(event: &'a Object, key: &str) -> Option<&'a str> {
    event.get(key)?.as_str()
}

/// An invite was taken back where it was made. Only who invited is believed, or, on LM, whoever the hub says has done it.
pub(in crate::bridge) async fn uninvited(core: &Arc<Core>, ended: &Uninvited) -> Result<(), Refusal> {
    let store = &core.context.store;
    let across = core.users.who(store, ended.side, &ended.target).await?;
    let super::Who::Ghost { user } = across else { return Ok(()) };
    let Some(row) = invitations::one(store, ended.side, &ended.room_id, &user).await? else { return Ok(()) };
    let is_believed = match ended.side {
        Side::Matrix => ended.sender == row.inviter,
        Side::Lm => ended.told_by == row.via,
    };
    if !is_believed {
        tracing::info!(room = %ended.room_id, sender = %ended.sender, by = %ended.told_by, "who ends this invite is not who invited");
        return Ok(());
    }
    if matches!(row.stage, Stage::Refused | Stage::Retracted) {
        return Ok(());
    }
    let reason = ended.reason.as_ref().map(|reason| reason.chars().take(300).collect());
    let next = Next { stage: Stage::Retracted, code: None, reason, image: None, now_ms: core.now_ms() };
    store.write(move |tx| Box::pin(async move { invitations::set_stage(tx, &row, &next).await })).await?;
    soon(core, ended.side, &ended.room_id);
    Ok(())
}
