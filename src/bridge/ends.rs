//! How portals end: on request, when nobody uses them, and, as far as ghosts go, an hour after they were suspended. The end
//! is written down first and each step looks at what is still there, so that a crash in the middle is taken up at the next
//! start.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ruma::{OwnedRoomId, UserId};

use super::acl::{self, SERVER_ACL};
use super::carry::ENCRYPTION;
use super::core::Core;
use super::notice::{say, speaker, text};
use super::portal::{Portal, PortalKind, PortalState};
use super::registry::Entry;
use super::side::{Event, MEMBER, State};
use super::upgrade::{self, TOMBSTONE};
use super::users::Who;
use super::{from_matrix, pending, repair, spaces};
use crate::event::Object;
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::seam::Outgoing;
use crate::store::{appservice, images, inbox, portals};

/// How long the ghosts stay in a suspended portal, in milliseconds.
pub const GHOSTS_STAY_MS: i64 = 3_600_000;
/// How long a portal that no admin asked for may go unused, in milliseconds.
pub const UNUSED_MS: i64 = 86_400_000;
/// The same for one that came about because somebody named an alias, which takes no account anywhere.
pub(super) const UNUSED_ALIAS_MS: i64 = 3_600_000;
/// When an end that failed is tried again, at first and at last.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// How often it is looked what is due.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// How many events are sent in one call.
const BATCH: usize = 50;
/// How long what waits may still cross before the end.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// How long the hub may take to answer that the bot has left.
const HUB_PATIENCE: Duration = Duration::from_secs(20);
/// How often it is looked whether something has come.
const POLL: Duration = Duration::from_millis(100);
/// How long somebody who asks for a portal's room waits for its end.
const END_PATIENCE: Duration = Duration::from_secs(40);

/// Ends a portal. Whoever asked may go away; what was begun is finished.
pub(super) async fn end(core: &Arc<Core>, entry: &Arc<Entry>, reason: &str) -> Result<Arc<Portal>, Refusal> {
    let portal = entry.portal();
    if portal.state.carries() {
        let _ = tokio::time::timeout(LAST_WORDS, drained(core, &portal)).await;
    }
    if portal.state != PortalState::Ended {
        core.set_state(entry, PortalState::Ending, Some(reason.to_owned())).await?;
    }
    let (inner, ending) = (core.clone(), entry.clone());
    let ended = core.in_task(async move { finish(&inner, &ending).await }).await;
    if ended.is_err() {
        // It is written down, and nobody may ask again.
        finish_later(core, entry);
    }
    ended.map(|()| entry.portal())
}

/// Sees to it that one task brings about an end that failed.
fn finish_later(core: &Arc<Core>, entry: &Arc<Entry>) {
    if !entry.is_ending.swap(true, Ordering::SeqCst) {
        core.spawn(finish_again(core.clone(), entry.clone()));
    }
}

/// Brings about an end that failed, however often it fails.
async fn finish_again(core: Arc<Core>, entry: Arc<Entry>) {
    let mut pause = FIRST_PAUSE;
    loop {
        tokio::time::sleep(pause).await;
        let Err(refusal) = finish(&core, &entry).await else { return };
        tracing::warn!(portal = entry.portal().portal_id, %refusal, "a portal could not be ended");
        pause = pause.saturating_mul(2).min(LONGEST_PAUSE);
    }
}

/// Takes up the ends that were under way, and looks from now on for what is due.
pub(super) fn at_start(core: &Arc<Core>) {
    let inner = core.clone();
    core.spawn(async move {
        let mut last = 0;
        while let Some(entry) = inner.registry.after(last, 1).pop() {
            last = entry.number;
            if entry.portal().state == PortalState::Ending {
                // Each on its own: the hub of one may be slow to let go.
                let (core, entry) = (inner.clone(), entry.clone());
                inner.spawn(async move {
                    if let Err(refusal) = finish(&core, &entry).await {
                        tracing::warn!(portal = entry.portal().portal_id, %refusal, "a portal could not be ended");
                        finish_later(&core, &entry);
                    }
                });
            }
        }
        loop {
            if let Err(refusal) = due(&inner).await {
                tracing::warn!(%refusal, "it could not be looked which portals are to end");
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    });
}

/// Does what is due by now.
pub(super) async fn due(core: &Arc<Core>) -> Result<(), Refusal> {
    let store = &core.context.store;
    pending::due(core).await?;
    for number in portals::to_be_left(store, core.now_ms()).await? {
        if let Some(entry) = core.registry.get(number) {
            let portal = entry.portal();
            let left = async {
                leave(core, &portal, Side::Matrix, false).await?;
                leave(core, &portal, Side::Lm, false).await
            };
            if let Err(refusal) = left.await {
                // It is due until it is done; the others do not wait for that.
                tracing::warn!(portal = portal.portal_id, %refusal, "ghosts could not leave a suspended portal");
                continue;
            }
            tracing::info!(portal = portal.portal_id, "the ghosts have left a suspended portal");
        }
        store.write(move |tx| Box::pin(async move { portals::left(tx, number).await })).await?;
    }
    for number in portals::empty(store, core.now_ms()).await? {
        match core.registry.get(number) {
            Some(entry) if entry.portal().state.carries() && is_empty(core, &entry.portal()).await? => {
                ended(&entry, end(core, &entry, "nobody of Matrix is in the room any more").await);
            }
            _ => store.write(move |tx| Box::pin(async move { portals::set_empty(tx, number, None).await })).await?,
        }
    }
    for number in portals::unused(store, core.now_ms()).await? {
        match core.registry.get(number) {
            // A task is at it.
            Some(entry) if entry.portal().state == PortalState::Ending => {}
            // By its invites it is known how long it stays.
            Some(entry) if entry.portal().state == PortalState::Pending => seen(core, number).await?,
            Some(entry) if entry.portal().state != PortalState::Ended && !was_used(core, &entry.portal()).await? => {
                ended(&entry, end(core, &entry, "nobody has used it").await);
            }
            _ => seen(core, number).await?,
        }
    }
    Ok(())
}

/// Whether an event of `side` may end its portal, so that [`look_at`] must.
pub(super) fn may_end(portal: &Portal, side: Side, event: &Event, bot: &UserId) -> bool {
    let is_out = |user: &UserId, membership: &str| {
        let empties =
            portal.kind == PortalKind::FromMatrix && side == Side::Matrix && user.server_name() != bot.server_name();
        // A ghost that leaves by itself, or whose user has left across: what the gateway sends does not come by here.
        let is_last = portal.ghosts_alone && (user.server_name() == bot.server_name()) == portal.has_ghosts_alone(side);
        (*user == *bot && membership != "join") || ((empties || is_last) && matches!(membership, "leave" | "ban"))
    };
    event.membership().is_some_and(|(user, membership)| is_out(&user, membership))
        || (event.state_key.as_deref() == Some("")
            && matches!(event.kind.as_str(), SERVER_ACL | TOMBSTONE | ENCRYPTION))
}

/// Takes a suspended portal up again.
pub(super) async fn resume(core: &Arc<Core>, entry: &Arc<Entry>) -> Result<Arc<Portal>, Refusal> {
    let portal = entry.portal();
    if portal.state.carries() {
        return Ok(portal);
    }
    if portal.state != PortalState::Suspended {
        return Err(Refusal::Forbidden(format!("the portal {} is {}", portal.portal_id, portal.state.as_str())));
    }
    let bot = core.users.bot();
    if !is_in(core, &portal, Side::Matrix).await? {
        if portal.kind == PortalKind::FromMatrix {
            // When the last ghost has left, the way back is by the room's other servers.
            let dag = &core.sides()?.dag;
            dag.join(&portal.matrix_room_id, &[], bot, from_matrix::bot_content()).await?;
        } else {
            core.send(&portal, Side::Matrix, core.member(bot, bot, "join")).await?;
        }
    }
    if !is_in(core, &portal, Side::Lm).await? {
        let via = [portal.lm_hub.clone()];
        core.sides()?.lm.join(&portal.lm_room_id, bot, &via, Object::new()).await?;
    }
    core.set_state(entry, PortalState::Active, None).await?;
    spaces::soon(core, &portal.lm_hub);
    // What was said meanwhile is not carried; the states are.
    repair::soon(core, entry);
    Ok(entry.portal())
}

/// Ends or suspends a portal whose rooms say so by their state; true when they do.
pub(super) async fn look_at(core: &Arc<Core>, entry: &Arc<Entry>) -> Result<bool, Refusal> {
    let portal = entry.portal();
    let bot = core.users.bot();
    let keys = [SERVER_ACL, TOMBSTONE, ENCRYPTION].map(|kind| (kind.to_owned(), String::new()));
    let keys = [&keys[..], &[(MEMBER.to_owned(), bot.to_string())]].concat();
    for side in [Side::Matrix, Side::Lm] {
        let state = core.sides()?.rooms(side).pick(portal.room(side), &keys).await?;
        if portal.has_ghosts_alone(side) {
            if speaker(core, &portal, side).await?.is_none() {
                let whose = if side == Side::Matrix { "LM" } else { "Matrix" };
                let reason = format!("nobody of {whose} is in {} any more", portal.room(side));
                let (core, entry) = (core.clone(), entry.clone());
                core.clone().spawn(async move { ended(&entry, end(&core, &entry, &reason).await) });
                return Ok(true);
            }
        } else if state.membership(bot) != "join" {
            let reason = match state.member(bot) {
                Some(out) if out.sender != bot => bot_is_out(out.sender, out.membership(), bot),
                _ => format!("{bot} is not in {} any more", portal.room(side)),
            };
            core.set_state(entry, PortalState::Suspended, Some(reason)).await?;
            spaces::soon(core, &portal.lm_hub);
            return Ok(true);
        }
        // An LM room is encrypted by its first event or never, unless Matrix servers share it.
        if let Some(encryption) = state.content(ENCRYPTION)
            && (side == Side::Matrix || core.sides()?.lm.is_shared(&portal.lm_room_id).await?)
        {
            let reason = format!("{} was encrypted: {}", portal.room(side), from_matrix::encrypted(encryption));
            let (core, entry) = (core.clone(), entry.clone());
            core.clone().spawn(async move { ended(&entry, end(&core, &entry, &reason).await) });
            return Ok(true);
        }
        if acl::of(core, &state).await.is_some_and(|list| !list.allows(&core.context.server_name)) {
            let reason = format!("the access control list of {} denies this gateway", portal.room(side));
            let (core, entry) = (core.clone(), entry.clone());
            core.clone().spawn(async move { ended(&entry, end(&core, &entry, &reason).await) });
            return Ok(true);
        }
        if upgrade::look_at(core, entry, side, &state).await? {
            return Ok(true);
        }
    }
    upgrade::stays(core, entry).await?;
    if portal.kind == PortalKind::FromMatrix {
        let until = match is_empty(core, &portal).await? {
            true => Some(core.now_ms().saturating_add(GHOSTS_STAY_MS)),
            false => None,
        };
        let number = entry.number;
        core.context
            .store
            .write(move |tx| Box::pin(async move { portals::set_empty(tx, number, until).await }))
            .await?;
    }
    Ok(false)
}

/// Whether nobody but the gateway's users is in the Matrix room.
async fn is_empty(core: &Core, portal: &Portal) -> Result<bool, Refusal> {
    let servers = core.sides()?.dag.joined_servers(&portal.matrix_room_id).await?;
    Ok(servers.iter().all(|server| *server == core.context.server_name))
}

/// Why a portal is suspended whose bot somebody took out of a room.
pub(super) fn bot_is_out(by: &UserId, membership: &str, bot: &UserId) -> String {
    format!("{by} has {} {bot}", if membership == "ban" { "banned" } else { "kicked" })
}

pub(super) fn ended<T>(entry: &Entry, outcome: Result<T, Refusal>) {
    if let Err(refusal) = outcome {
        tracing::warn!(portal = entry.portal().portal_id, %refusal, "a portal could not be ended");
    }
}

/// An admin wants a portal: it stays, used or not.
pub(super) async fn keep(core: &Core, number: i64) -> Result<(), Refusal> {
    Ok(core.context.store.write(move |tx| Box::pin(async move { portals::wanted(tx, number).await })).await?)
}

async fn seen(core: &Core, number: i64) -> Result<(), Refusal> {
    Ok(core.context.store.write(move |tx| Box::pin(async move { portals::used(tx, number).await })).await?)
}

/// Whether a portal is over; of one that is ending it is waited for.
pub(super) async fn over(core: &Core, entry: &Entry) -> Result<bool, Refusal> {
    let ended = async {
        while entry.portal().state == PortalState::Ending {
            tokio::time::sleep(POLL).await;
        }
    };
    if tokio::time::timeout(END_PATIENCE, ended).await.is_err() {
        let server = core.context.server_name.to_string();
        let problem = format!("the portal {} of this room is still ending", entry.portal().portal_id);
        return Err(Refusal::Remote { server, problem });
    }
    Ok(entry.portal().state == PortalState::Ended)
}

/// Whether a user has ever come in whom the portal is for: an LM user where the Matrix room was there before, else a Matrix user. Who was
/// banned without that is in the state too.
async fn was_used(core: &Core, portal: &Portal) -> Result<bool, Refusal> {
    let side = portal.is_for();
    let state = core.sides()?.rooms(side).state(portal.room(side)).await?;
    for entry in state.members() {
        let Ok(user) = <&UserId>::try_from(entry.state_key) else { continue };
        if matches!(entry.membership(), "join" | "leave")
            && matches!(core.users.who(&core.context.store, side, user).await?, Who::Native { .. })
        {
            return Ok(true);
        }
    }
    Ok(false)
}

async fn drained(core: &Core, portal: &Portal) {
    while !repair::queues_are_empty(core, portal).await.unwrap_or(true) {
        tokio::time::sleep(POLL).await;
    }
}

/// Everything of the end that is not done yet.
async fn finish(core: &Arc<Core>, entry: &Arc<Entry>) -> Result<(), Refusal> {
    // What is being carried over is carried over before; and two who ask end it once.
    let _from_matrix = entry.from_matrix.making.lock().await;
    let _from_lm = entry.from_lm.making.lock().await;
    let portal = entry.portal();
    if portal.state == PortalState::Ended {
        return Ok(());
    }
    let reason = portal.reason.as_deref().unwrap_or("it was asked for");
    pending::close(core, &portal).await?;
    for side in portal.sides().iter().copied() {
        if is_in(core, &portal, side).await? {
            let body = match portal.is_one_room() {
                true => {
                    format!("Goodbye: the bot of {} leaves this room, because {reason}.", core.context.server_name)
                }
                false => {
                    let far = portal.room(side.other());
                    format!("Goodbye: this room is no longer connected with {far}, because {reason}.")
                }
            };
            if let Err(refusal) = say(core, &portal, side, text("m.notice", &body)).await {
                tracing::info!(portal = portal.portal_id, side = side.as_str(), %refusal, "nobody hears the goodbye");
            }
        }
        leave(core, &portal, side, true).await?;
    }
    core.sides()?.dag.set_listed(&portal.matrix_room_id, false).await?;
    if portal.lm_hub != core.context.server_name {
        // Who makes a portal of the room again must find the bot outside of it.
        let left = async {
            while is_in(core, &portal, Side::Lm).await.unwrap_or(false) {
                tokio::time::sleep(POLL).await;
            }
        };
        let _ = tokio::time::timeout(HUB_PATIENCE, left).await;
    }
    write_down(core, entry, &portal).await?;
    core.registry.put(entry.number, Portal { state: PortalState::Ended, ..portal.as_ref().clone() });
    spaces::soon(core, &portal.lm_hub);
    tracing::info!(portal = portal.portal_id, reason, "portal ended");
    Ok(())
}

async fn write_down(core: &Core, entry: &Entry, portal: &Portal) -> Result<(), Refusal> {
    let (number, reason) = (entry.number, portal.reason.clone());
    let (matrix, lm): (OwnedRoomId, OwnedRoomId) = (portal.matrix_room_id.clone(), portal.lm_room_id.clone());
    let write = core.context.store.write(move |tx| {
        Box::pin(async move {
            portals::set_state(tx, number, PortalState::Ended.as_str(), reason.as_deref(), None).await?;
            portals::used(tx, number).await?;
            portals::remove_aliases(tx, number).await?;
            inbox::clear(tx, Side::Matrix, &matrix).await?;
            inbox::clear(tx, Side::Lm, &lm).await?;
            images::forget(tx, number).await?;
            appservice::end_room(tx, &matrix).await
        })
    });
    Ok(write.await?)
}

async fn is_in(core: &Core, portal: &Portal, side: Side) -> Result<bool, Refusal> {
    Ok(speaker(core, portal, side).await?.is_some())
}

/// Has the ghosts of a side leave its room; and with `bot` the bot after them, when it has taken back its invites.
async fn leave(core: &Arc<Core>, portal: &Portal, side: Side, bot: bool) -> Result<(), Refusal> {
    let rooms = core.sides()?.rooms(side);
    let room_id = portal.room(side);
    let state = match rooms.state(room_id).await {
        // Ghosts were invited there, and nobody came.
        Err(Refusal::UnknownRoom(_)) if portal.has_ghosts_alone(side) => return Ok(()),
        state => state?,
    };
    let mut drafts = Vec::new();
    for user in ghosts(core, side, &state).await? {
        drafts.push(core.member(&user, &user, "leave"));
    }
    let own = core.users.bot();
    if bot && state.membership(own) == "join" {
        // Of a room that is the gateway's own nobody else takes back what ghosts have offered.
        let is_own = |sender: &UserId| {
            sender == own || (portal.elsewhere() != Some(side) && *sender.server_name() == core.context.server_name)
        };
        let invited =
            state.members().into_iter().filter(|entry| entry.membership() == "invite" && is_own(entry.sender));
        for entry in invited {
            let Ok(user) = <&UserId>::try_from(entry.state_key) else { continue };
            if user.server_name() != core.context.server_name {
                drafts.push(core.member(own, user, "leave"));
            }
        }
    }
    if bot && matches!(state.membership(own), "join" | "invite") {
        drafts.push(core.member(own, own, "leave"));
    }
    let mut drafts = drafts.into_iter().peekable();
    while drafts.peek().is_some() {
        let batch = drafts.by_ref().take(BATCH).map(|draft| Outgoing { draft, effect: None }).collect();
        for refusal in rooms.send(room_id, batch).await.into_iter().filter_map(Result::err) {
            if refusal.is_transient() {
                return Err(refusal);
            }
            tracing::info!(portal = portal.portal_id, side = side.as_str(), %refusal, "somebody could not leave");
        }
    }
    Ok(())
}

/// The ghosts in a room, or on their way into it.
async fn ghosts(core: &Core, side: Side, state: &State) -> Result<Vec<ruma::OwnedUserId>, Refusal> {
    let mut ghosts = Vec::new();
    for entry in state.members() {
        let Ok(user) = <&UserId>::try_from(entry.state_key) else { continue };
        if matches!(entry.membership(), "join" | "invite" | "knock")
            && matches!(core.users.who(&core.context.store, side, user).await?, Who::Ghost { .. })
        {
            ghosts.push(user.to_owned());
        }
    }
    Ok(ghosts)
}
