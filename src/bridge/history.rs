//! What was said before a portal was made is said again in the new room across, once, when the portal is made and before anybody else
//! comes into that room: the last events that everybody who comes in may read, with their times and senders.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use ruma::{OwnedEventId, OwnedUserId, UserId};
use serde_json::Value;

use super::core::Core;
use super::notice::text;
use super::portal::Portal;
use super::side::{Event, MEMBER, State};
use super::translate::{self, Lookups};
use super::users::Who;
use super::{access, acl, carry, effect};
use crate::event::Object;
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::seam::{Draft, EventEffect, Outgoing};
use crate::store::images;

/// The type of the events that say who may read what was said.
const VISIBILITY: &str = "m.room.history_visibility";

/// How many events are said again.
pub(super) fn limit(core: &Core) -> usize {
    usize::try_from(core.context.config.portals.import_history).unwrap_or(usize::MAX)
}

/// Says `events`, which are of the room on `home` and oldest first, again across. `state` is that room's state now.
pub(super) async fn import(
    core: &Arc<Core>,
    portal: &Portal,
    home: Side,
    state: &State,
    events: Vec<Event>,
) -> Result<(), Refusal> {
    let events = shown(state, events);
    if events.is_empty() {
        return Ok(());
    }
    let (total, far) = (events.len(), home.other());
    let list = acl::of(core, state).await;
    let mut import = Import { core, portal, home, state, visitors: BTreeSet::new() };
    let mut done = 0_usize;
    for event in &events {
        let server = event.sender.server_name();
        let is_out = access::takes_part(&core.context.config.access, home, server).is_err()
            || list.as_ref().is_some_and(|list| !list.allows(server));
        if is_out || translate::crosses(event).is_err() || event.state_key.is_some() || event.redacts.is_some() {
            continue;
        }
        match import.say(event).await {
            Ok(said) => done = done.saturating_add(usize::from(said)),
            Err(refusal) if refusal.is_transient() => return Err(refusal),
            Err(refusal) => tracing::debug!(event = %event.event_id, %refusal, "an old event is left out"),
        }
    }
    for visitor in import.visitors {
        core.send(portal, far, core.member(&visitor, &visitor, "leave")).await?;
    }
    tracing::info!(portal = portal.portal_id, done, total, "old events were said again");
    Ok(())
}

/// The events that everybody may read who comes into the room: those since its history was made visible, or what was given begins.
fn shown(state: &State, mut events: Vec<Event>) -> Vec<Event> {
    let visibility = state.content(VISIBILITY).and_then(|content| content.get("history_visibility")?.as_str());
    if !matches!(visibility.unwrap_or("shared"), "shared" | "world_readable") {
        return Vec::new();
    }
    // What held before that is not known here.
    let changed = |event: &Event| event.kind == VISIBILITY && event.state_key.as_deref() == Some("");
    match events.iter().rposition(changed) {
        Some(place) => events.split_off(place.saturating_add(1)),
        None => events,
    }
}

struct Import<'a> {
    core: &'a Arc<Core>,
    portal: &'a Portal,
    home: Side,
    state: &'a State,
    /// The ghosts of those who have left: they come to speak.
    visitors: BTreeSet<OwnedUserId>,
}

impl Import<'_> {
    /// Says one event again; false when it was said already, or is not to be.
    async fn say(&mut self, event: &Event) -> Result<bool, Refusal> {
        let (core, store, far) = (self.core, &self.core.context.store, self.home.other());
        let id = std::slice::from_ref(&event.event_id);
        if !images::of_sources(store, self.home, id).await?.is_empty() {
            return Ok(false);
        }
        let references = translate::references(event);
        let users = core.users.all(store, self.home, &references.users).await?;
        let named: Vec<OwnedEventId> = references.events.into_iter().chain(references.needs).collect();
        let known = images::of_sources(store, self.home, &named).await?;
        let known = known.into_iter().filter(|(_, row)| row.portal == self.portal.number());
        let known: HashMap<_, _> = known.map(|(source, row)| (source, row.image)).collect();
        let rooms = (self.portal.room(self.home), self.portal.room(far));
        let image =
            translate::message(event, &Lookups { users: &users, events: &known, rooms, media: core.media(far) })?;
        let Some(Who::Native { ghost }) = users.get(&event.sender) else { return Ok(false) };
        if self.state.membership(&event.sender) == "ban" {
            return self.quote(event, image.content).await;
        }
        self.come(ghost).await?;
        let draft = self.draft(ghost, &image.kind, image.content, event);
        let said = self.send(draft, Some(effect::said_again(core, self.portal, self.home, event, image.note))).await;
        said.map(|()| true)
    }

    /// What somebody said who is banned now, by the bot.
    async fn quote(&self, event: &Event, mut content: Object) -> Result<bool, Refusal> {
        let Some(body) = content.get("body").and_then(Value::as_str) else { return Ok(false) };
        let source = content.get(translate::SOURCE).cloned();
        content = text("m.notice", &format!("{} said: {body}", event.sender));
        content.insert("m.mentions".to_owned(), Value::Object(Object::new()));
        content.extend(source.map(|source| (translate::SOURCE.to_owned(), source)));
        let draft = self.draft(self.core.users.bot(), "m.room.message", content, event);
        let effect = effect::said_again(self.core, self.portal, self.home, event, Some("said by the bot".to_owned()));
        self.send(draft, Some(effect)).await.map(|()| true)
    }

    /// The ghost comes in, if it is not there, and leaves again when all is said.
    async fn come(&mut self, ghost: &UserId) -> Result<(), Refusal> {
        let (core, far) = (self.core, self.home.other());
        let rooms = core.sides()?.rooms(far);
        let keys = [(MEMBER.to_owned(), ghost.to_string()), ("m.room.join_rules".to_owned(), String::new())];
        let there = rooms.pick(self.portal.room(far), &keys).await?;
        if there.membership(ghost) == "join" {
            return Ok(());
        }
        if !carry::is_public(&there) && there.membership(ghost) != "invite" {
            self.send(core.member(core.users.bot(), ghost, "invite"), None).await?;
        }
        self.send(core.member(ghost, ghost, "join"), None).await?;
        self.visitors.insert(ghost.to_owned());
        Ok(())
    }

    fn draft(&self, sender: &UserId, kind: &str, content: Object, event: &Event) -> Draft {
        Draft {
            sender: sender.to_owned(),
            kind: kind.to_owned(),
            state_key: None,
            content,
            origin_server_ts: translate::time(event.origin_server_ts, self.core.now_ms()),
        }
    }

    async fn send(&self, draft: Draft, effect: Option<EventEffect>) -> Result<(), Refusal> {
        let far = self.home.other();
        let sent =
            self.core.sides()?.rooms(far).send(self.portal.room(far), vec![Outgoing { draft, effect }]).await.pop();
        sent.unwrap_or_else(|| Err(Refusal::Internal("nothing came of an old event".to_owned()))).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::power::tests::state;
    use super::*;

    fn event(id: &str, kind: &str, state_key: Option<&str>) -> Event {
        Event {
            event_id: format!("${id}").try_into().unwrap(),
            lpdu_id: None,
            room_id: "!r:h".try_into().unwrap(),
            sender: "@a:h".try_into().unwrap(),
            kind: kind.to_owned(),
            state_key: state_key.map(str::to_owned),
            origin_server_ts: 1,
            content: Object::new(),
            redacts: None,
            order: 1,
        }
    }

    #[test]
    fn only_what_everybody_may_read_who_comes_in_is_said_again() {
        let events = || {
            let said = |id: &str| event(id, "m.room.message", None);
            vec![said("a"), event("v", VISIBILITY, Some("")), said("b"), event("w", VISIBILITY, Some("no")), said("c")]
        };
        for (visibility, expected) in [
            (Some("shared"), &["$b", "$w", "$c"][..]),
            (Some("world_readable"), &["$b", "$w", "$c"]),
            (None, &["$b", "$w", "$c"]),
            (Some("joined"), &[]),
            (Some("invited"), &[]),
            (Some("odd"), &[]),
        ] {
            let content = visibility.map(|visibility| json!({ "history_visibility": visibility }));
            let entries: Vec<_> = content.into_iter().map(|content| (VISIBILITY, "", "@a:h", content)).collect();
            let shown = shown(&state(&entries), events());
            assert_eq!(
                shown.iter().map(|event| event.event_id.as_str()).collect::<Vec<_>>(),
                expected,
                "{visibility:?}"
            );
        }
    }
}
