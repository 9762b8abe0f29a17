//! Where an event is on both sides, and why it is not.

use ruma::{EventId, OwnedEventId, OwnedUserId, UserId};
use serde::Serialize;

use super::admin::{Refused, find};
use super::core::Core;
use super::plan::REPAIR;
use super::side::{Event, MEMBER};
use crate::event::event_id;
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::store::images::{self, ImageRow};
use crate::store::{inbox, invitations, portals};

/// Where an event is on both sides, and why not.
#[derive(Debug, Clone, Serialize)]
pub struct Explanation {
    /// The event.
    pub event_id: OwnedEventId,
    /// `matrix` or `lm`.
    pub side: &'static str,
    /// Its room.
    pub room_id: ruma::OwnedRoomId,
    /// Its sender.
    pub sender: OwnedUserId,
    /// Its type.
    pub kind: String,
    /// The portal of the room, when there is one; else the last that has ended, as long as its row is kept.
    pub portal_id: Option<String>,
    /// What has become of it, as one word: `image` (it is one), `crossed`, `pending`, `refused`, `waiting`, `local`
    /// (nothing is to become of it), `repair` (the gateway sent it so that the room is as the one across), `shared` (both sides have the one room that it is of), or `unknown` (what became of it is forgotten: its portal has ended, or it is so old that
    /// the record of its refusal may be gone).
    pub status: &'static str,
    /// The event across: its image, or the source that it is the image of, or from which it follows.
    pub across: Option<OwnedEventId>,
    /// What was left out on the way, or why there is a repair.
    pub note: Option<String>,
    /// Why it did not cross.
    pub refusal: Option<Refused>,
    /// When it was accepted, while it waits.
    pub waiting_since: Option<i64>,
}

/// Where an event is on both sides, and why not.
pub(super) async fn explain(core: &Core, event_id: &EventId) -> Result<Option<Explanation>, Refusal> {
    let store = &core.context.store;
    // Of a room that is on both sides the log is what portals are of.
    for side in [Side::Lm, Side::Matrix] {
        let Some(event) = core.sides()?.rooms(side).event(event_id).await? else { continue };
        let id = [event_id.to_owned()];
        let image = images::of_sources(store, side, &id).await?.remove(event_id);
        let source = images::of_images(store, side.other(), &id).await?.remove(event_id);
        let refusal = images::refusal(store, side, event_id).await?;
        let waiting_since = inbox::waits(store, side, event_id).await?;
        let open = core.registry.of_room(side, &event.room_id).or_else(|| core.registry.of_one_room(&event.room_id));
        let is_one_room = open.as_ref().is_some_and(|entry| entry.portal().is_one_room());
        let open = open.map(|entry| entry.number);
        let ended = match open {
            Some(_) => None,
            None => portals::last_ended_of(store, side, &event.room_id).await?,
        };
        let repair = Repair::read(core, &event).filter(|_| !is_one_room);
        let status = match (&image, &source, &refusal, waiting_since) {
            (Some(ImageRow { pending: true, .. }), ..) => "pending",
            (Some(_), ..) => "crossed",
            (None, Some(_), ..) => "image",
            (None, None, _, Some(_)) => "waiting",
            (None, None, Some(_), None) => "refused",
            (None, None, None, None) if is_one_room => "shared",
            (None, None, None, None) if repair.is_some() => "repair",
            // With the portal its mappings are forgotten.
            (None, None, None, None) if ended.is_some() => "unknown",
            (None, None, None, None) if may_be_forgotten(core, open, &event).await? => "unknown",
            (None, None, None, None) => "local",
        };
        let note = image.as_ref().and_then(|row| row.note.clone());
        let note = note.or_else(|| repair.as_ref().map(|repair| repair.note(side)));
        return Ok(Some(Explanation {
            event_id: event.event_id,
            side: side.as_str(),
            portal_id: open.or(ended).map(|number| format!("p{number}")),
            room_id: event.room_id,
            sender: event.sender,
            kind: event.kind,
            status,
            across: image.map(|row| row.image).or(source.map(|row| row.source)).or(repair.and_then(|repair| repair.of)),
            note,
            refusal: refusal.map(Refused::from),
            waiting_since,
        }));
    }
    match core.sides()?.lm.event_of_lpdu(event_id).await? {
        // By the name under which its sender's server knows it.
        Some(appended) => Box::pin(explain(core, &appended.event.event_id)).await,
        None => explain_invite(core, event_id).await,
    }
}

/// What a repair says of itself.
struct Repair {
    /// The event across from which it follows.
    of: Option<OwnedEventId>,
}

impl Repair {
    /// Nothing when an event is none: what others mark like that says nothing.
    fn read(core: &Core, event: &Event) -> Option<Self> {
        let own = event.sender.server_name() == core.context.server_name;
        let mark = event.content.get(REPAIR).filter(|_| own)?;
        Some(Self { of: mark.get("event_id").and_then(|id| id.as_str()).and_then(event_id) })
    }

    /// Why there is one in the room on `side`.
    fn note(&self, side: Side) -> String {
        let (here, across) = match side {
            Side::Lm => ("LM", "Matrix"),
            Side::Matrix => ("Matrix", "LM"),
        };
        let there = match &self.of {
            Some(of) => format!("{of} was in force"),
            None => "nothing of the kind was in force".to_owned(),
        };
        format!("sent by the gateway, since the {here} room was not as the {across} room has it: there {there}")
    }
}

/// What has become of an invite into a room that the gateway was not in, of which the event itself is not here.
async fn explain_invite(core: &Core, event_id: &EventId) -> Result<Option<Explanation>, Refusal> {
    let store = &core.context.store;
    if let Some(row) = invitations::of_event(store, event_id).await? {
        let refusal = images::refusal(store, row.side, event_id).await?.map(Refused::from);
        return Ok(Some(Explanation {
            event_id: row.event_id,
            side: row.side.as_str(),
            portal_id: core.registry.of_room(row.side, &row.room_id).map(|entry| format!("p{}", entry.number)),
            room_id: row.room_id,
            sender: row.inviter,
            kind: MEMBER.to_owned(),
            status: if refusal.is_some() { "refused" } else { "waiting" },
            across: row.image,
            note: None,
            refusal,
            waiting_since: Some(row.made_ts),
        }));
    }
    for side in [Side::Matrix, Side::Lm] {
        let Some(refusal) = images::refusal(store, side, event_id).await? else { continue };
        let portal = find(core, &format!("p{}", refusal.portal)).await?;
        let of_portal = || portal.as_ref().map(|portal| portal.room(side).to_owned());
        let (Some(room_id), Ok(sender)) = (refusal.room_id.clone().or_else(of_portal), UserId::parse(&refusal.sender))
        else {
            continue;
        };
        return Ok(Some(Explanation {
            event_id: event_id.to_owned(),
            side: side.as_str(),
            portal_id: portal.map(|portal| portal.portal_id.clone()),
            room_id,
            sender,
            kind: refusal.kind.clone(),
            status: "refused",
            across: None,
            note: None,
            refusal: Some(refusal.into()),
            waiting_since: None,
        }));
    }
    Ok(None)
}

/// Whether an event of which nothing is known may have been refused, and the record of that removed.
async fn may_be_forgotten(core: &Core, portal: Option<i64>, event: &Event) -> Result<bool, Refusal> {
    // What the gateway's own users say was never refused here.
    let own = event.sender.server_name() == core.context.server_name;
    let Some(portal) = portal.filter(|_| !own) else { return Ok(false) };
    let gone_until = images::refusals_gone_until(&core.context.store, portal).await?;
    Ok(gone_until.is_some_and(|until| event.origin_server_ts <= until))
}
