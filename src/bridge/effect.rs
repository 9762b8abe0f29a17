//! What is written together with an image, or instead of one: the mapping, the end of the inbox row, the refusal.

use std::sync::Arc;

use async_trait::async_trait;
use ruma::{OwnedEventId, OwnedRoomId, OwnedServerName};

use super::core::Core;
use super::decline::decline;
use super::inbox::{Item, Out};
use super::portal::Portal;
use super::registry::Entry;
use super::side::Event;
use super::{repair, translate};
use crate::admin::metrics;
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::seam::{Effects, EventEffect};
use crate::store::ghosts::{self, Hashed};
use crate::store::images::{self, ImageRow, RefusalRow};
use crate::store::inbox::{self, InboxRow};
use crate::store::lm;
use crate::store::{StoreError, Tx};

/// The log of a portal. Who keeps it may change until an image is written, and decides what the image is: an event, or an LPDU
/// of which the hub is yet to make one.
struct Log {
    room_id: OwnedRoomId,
    own: OwnedServerName,
}

impl Log {
    fn of(core: &Core, portal: &Portal) -> Self {
        Self { room_id: portal.lm_room_id.clone(), own: core.context.server_name.clone() }
    }

    /// Whether images of what is on `source` wait for another server, which keeps the log.
    async fn is_away(&self, tx: &mut Tx, source: Side) -> Result<bool, StoreError> {
        Ok(source == Side::Matrix && !lm::is_kept_here(tx, &self.room_id, &self.own).await?)
    }
}

/// What is written with the image of `item`: its mapping and the end of its row.
pub(super) fn crossed(
    core: &Arc<Core>,
    portal: &Portal,
    source: Side,
    item: &Item,
    note: Option<String>,
) -> Option<EventEffect> {
    crossed_all(core, portal, source, vec![(item, note)]).next()
}

/// The same for several, written together. It fails only if an event has crossed already, which the portal's locks rule
/// out: a last resort, since some of what is committed with it fails with it.
pub(super) fn crossed_all<'a>(
    core: &Arc<Core>,
    portal: &Portal,
    source: Side,
    items: Vec<(&'a Item, Option<String>)>,
) -> impl Iterator<Item = EventEffect> + use<'a> {
    let crossing = |(item, note): (&'a Item, Option<String>)| Crossing {
        seq: item.row.seq,
        row: ImageRow { note, ..image_row(core, portal, source, &item.event) },
        profile: profile(&item.event),
        ghosts: ghosts_of(core, source, &item.event),
    };
    let items: Vec<Crossing> = items.into_iter().map(crossing).collect();
    let count = items.len();
    EventEffect::together(Arc::new(Crossed { source, log: Log::of(core, portal), items }), count)
}

struct Crossing {
    seq: i64,
    row: ImageRow,
    profile: Called,
    ghosts: Vec<Hashed>,
}

struct Crossed {
    source: Side,
    log: Log,
    items: Vec<Crossing>,
}

#[async_trait]
impl Effects for Crossed {
    async fn write(&self, tx: &mut Tx, events: &[(usize, OwnedEventId)]) -> Result<(), StoreError> {
        let items: Vec<_> = events.iter().filter_map(|(index, image)| Some((self.items.get(*index)?, image))).collect();
        let seqs: Vec<i64> = items.iter().map(|(item, _)| item.seq).collect();
        if !inbox::take(tx, &seqs).await? {
            return Err(StoreError::Withdrawn("the event has crossed already"));
        }
        let pending = self.log.is_away(tx, self.source).await?;
        let rows = items.iter().map(|(item, image)| ImageRow { image: (*image).clone(), pending, ..item.row.clone() });
        images::insert(tx, &rows.collect::<Vec<_>>()).await?;
        for (item, _) in items {
            remember(tx, self.source, item.profile.clone()).await?;
            ghosts::remember(tx, &item.ghosts).await?;
        }
        Ok(())
    }
}

/// What must be stored with what `event` makes across: the ghosts that do it or to whom it is done, and those it gives power.
fn ghosts_of(core: &Core, source: Side, event: &Event) -> Vec<Hashed> {
    core.users.hashed(source, &translate::concerned(event))
}

/// What is written with an event that comes before the image of `event`, and is the image of none.
pub(super) fn prepared(core: &Core, source: Side, event: &Event) -> Option<EventEffect> {
    let ghosts = ghosts_of(core, source, event);
    (!ghosts.is_empty())
        .then(|| EventEffect::new(move |tx, _| Box::pin(async move { ghosts::remember(tx, &ghosts).await })))
}

/// What is said of a member event whose image was not made in its turn.
const BROUGHT_IN: &str = "the ghost was brought in because its user is in the room, not when this event had its turn";

/// What is written with a ghost's join that is sent because the ghost speaks, or is missing: the mapping to the member event that it is
/// the image of, unless that has one.
pub(super) async fn joined(
    core: &Arc<Core>,
    portal: &Portal,
    source: Side,
    member: OwnedEventId,
) -> Result<Option<EventEffect>, Refusal> {
    let known = images::of_sources(&core.context.store, source, std::slice::from_ref(&member)).await?;
    if !known.is_empty() {
        return Ok(None);
    }
    let event = match source {
        // Of the state of a room that was joined nothing else may be known.
        Side::Matrix => core.sides()?.dag.event_of_state(&member).await?.map(|event| Event::from(&*event)),
        Side::Lm => core.sides()?.rooms(source).event(&member).await?,
    };
    let Some(event) = event else { return Ok(None) };
    let row = ImageRow { note: Some(BROUGHT_IN.to_owned()), ..image_row(core, portal, source, &event) };
    let (log, profile) = (Log::of(core, portal), profile(&event));
    let ghosts = ghosts_of(core, source, &event);
    Ok(Some(EventEffect::new(move |tx, image| {
        Box::pin(async move {
            let pending = log.is_away(tx, source).await?;
            images::insert(tx, &[ImageRow { image, pending, ..row }]).await?;
            ghosts::remember(tx, &ghosts).await?;
            remember(tx, source, profile).await
        })
    })))
}

/// What is written with an old event that is said again across.
pub(super) fn said_again(
    core: &Core,
    portal: &Portal,
    source: Side,
    event: &Event,
    note: Option<String>,
) -> EventEffect {
    let row = ImageRow { note, ..image_row(core, portal, source, event) };
    let (log, ghosts) = (Log::of(core, portal), ghosts_of(core, source, event));
    EventEffect::new(move |tx, image| {
        Box::pin(async move {
            let pending = log.is_away(tx, source).await?;
            images::insert(tx, &[ImageRow { image, pending, ..row }]).await?;
            ghosts::remember(tx, &ghosts).await
        })
    })
}

/// An event of the room across is what this one asks for: its image, unless it has a source.
pub(super) async fn adopt(
    core: &Arc<Core>,
    portal: &Portal,
    source: Side,
    item: &Item,
    image: OwnedEventId,
) -> Result<(), Refusal> {
    let seq = item.row.seq;
    let free = images::of_images(&core.context.store, source, std::slice::from_ref(&image)).await?.is_empty();
    let row = ImageRow { image, ..image_row(core, portal, source, &item.event) };
    let profile = profile(&item.event);
    core.context
        .store
        .write(move |tx| {
            Box::pin(async move {
                if inbox::take(tx, &[seq]).await? && free {
                    images::insert(tx, &[row]).await?;
                }
                remember(tx, source, profile).await
            })
        })
        .await?;
    Ok(())
}

/// Ends a row for which there is nothing to be done.
pub(super) async fn drop_row(core: &Core, seq: i64) -> Result<(), Refusal> {
    core.context.store.write(move |tx| Box::pin(async move { inbox::remove(tx, seq).await })).await?;
    Ok(())
}

/// Records that an event does not cross, and why.
pub(super) async fn refused(
    core: &Core,
    portal: &Portal,
    source: Side,
    item: &Item,
    refusal: &Refusal,
) -> Result<(), Refusal> {
    let seq = item.row.seq;
    let row = refusal_row(core, portal, source, &item.event, refusal);
    core.context
        .store
        .write(move |tx| {
            Box::pin(async move {
                images::refuse(tx, &row).await?;
                inbox::remove(tx, seq).await
            })
        })
        .await?;
    Ok(())
}

/// Whether a row is still in the inbox, and what it holds has not crossed. The row ends of an LPDU that has crossed with
/// another event, because its hub has appended it twice, and of a join that has crossed because its sender spoke.
pub(super) async fn still_waits(core: &Core, source: Side, portal: &Portal, item: &Item) -> Result<bool, Refusal> {
    let (store, seq) = (&core.context.store, item.row.seq);
    let rows = inbox::waiting(store, source, portal.room(source), seq.saturating_sub(1), 1).await?;
    if rows.first().is_none_or(|row| row.seq != seq) {
        return Ok(false);
    }
    let crossed = images::of_sources(store, source, std::slice::from_ref(&item.event.event_id)).await?;
    let twice = match &item.event.lpdu_id {
        Some(lpdu_id) => !images::of_lpdus(store, std::slice::from_ref(lpdu_id)).await?.is_empty(),
        None => false,
    };
    if crossed.is_empty() && !twice {
        return Ok(true);
    }
    drop_row(core, seq).await?;
    Ok(false)
}

/// Ends the rows that were sorted out when they were read, and tells the senders of what is refused. What of that is state
/// is in one room and not in the other, so that there is something to repair.
pub(super) async fn sorted_out(
    core: &Arc<Core>,
    entry: &Arc<Entry>,
    portal: &Arc<Portal>,
    source: Side,
    out: Vec<(InboxRow, Out)>,
) -> Result<(), Refusal> {
    if out.is_empty() {
        return Ok(());
    }
    let mut told = Vec::new();
    let out: Vec<_> = out
        .into_iter()
        .map(|(row, out)| match out {
            Out::Refused(event, refusal) => {
                tracing::debug!(portal = portal.portal_id, event = %row.event_id, %refusal, "an event does not cross");
                metrics::image_refused(source.other(), &refusal);
                let refused = refusal_row(core, portal, source, &event, &refusal);
                told.push((event, refusal));
                (row, None, Some(refused))
            }
            Out::Echo(lpdu) => (row, Some(lpdu), None),
            Out::Done | Out::Lost => (row, None, None),
        })
        .collect();
    for (event, refusal) in &told {
        decline(core, portal, source, event, refusal).await?;
    }
    core.context
        .store
        .write(move |tx| {
            Box::pin(async move {
                for (row, echo, refusal) in out {
                    if let Some(lpdu) = echo {
                        images::echoed(tx, &lpdu, &row.event_id).await?;
                    }
                    if let Some(refusal) = refusal {
                        images::refuse(tx, &refusal).await?;
                    }
                    inbox::remove(tx, row.seq).await?;
                }
                Ok(())
            })
        })
        .await?;
    if told.iter().any(|(event, _)| event.state_key.is_some() && translate::crosses(event).is_ok()) {
        repair::soon(core, entry);
    }
    for (event, refusal) in told {
        core.notices.tell(core, portal, source, &event, &refusal);
    }
    Ok(())
}

/// The mapping of an event to an image that is not made yet.
pub(super) fn image_row(core: &Core, portal: &Portal, source: Side, event: &Event) -> ImageRow {
    ImageRow {
        side: source,
        source: event.event_id.clone(),
        source_lpdu: event.lpdu_id.clone().filter(|_| source == Side::Lm),
        image: event.event_id.clone(),
        pending: false,
        portal: portal.number(),
        note: None,
        made_ts: core.now_ms(),
    }
}

pub(super) fn refusal_row(core: &Core, portal: &Portal, source: Side, event: &Event, refusal: &Refusal) -> RefusalRow {
    RefusalRow {
        side: source,
        source: event.event_id.clone(),
        portal: portal.number(),
        sender: event.sender.to_string(),
        kind: event.kind.clone(),
        code: refusal.code().to_owned(),
        reason: refusal.to_string(),
        refused_ts: core.now_ms(),
        room_id: Some(event.room_id.clone()),
    }
}

/// What a user calls itself, by its join.
pub(super) type Called = Option<(ruma::OwnedUserId, Option<String>, Option<String>)>;

pub(super) fn profile(event: &Event) -> Called {
    let (user, membership) = event.membership()?;
    if membership != "join" || user != event.sender {
        return None;
    }
    let text = |key: &str| event.content.get(key).and_then(|value| value.as_str()).map(str::to_owned);
    Some((user, text("displayname"), text("avatar_url")))
}

pub(super) async fn remember(tx: &mut Tx, side: Side, profile: Called) -> Result<(), StoreError> {
    let Some((user, displayname, avatar_url)) = profile else { return Ok(()) };
    images::set_profile(tx, side, &user, displayname.as_deref(), avatar_url.as_deref()).await
}
