//! What is to be done with an event that waits, with all that this depends on looked up.

use std::collections::HashMap;

use ruma::{OwnedEventId, OwnedUserId, UserId};

use super::Worker;
use crate::bridge::carry::{self, Case, Outcome};
use crate::bridge::pins::{self, Counterparts, PINNED};
use crate::bridge::portal::Portal;
use crate::bridge::power::{self, POWER_LEVELS};
use crate::bridge::side::{Event, Key, MEMBER, State};
use crate::bridge::users::{Known, Who};
use crate::bridge::{acl, translate};
use crate::identity::Side;
use crate::lm::Coming;
use crate::refusal::Refusal;
use crate::store::images;

/// What is to be done with an event.
pub(super) struct Decision {
    pub(super) outcome: Outcome,
    /// Whether the state must be looked at when it is done.
    pub(super) unsure: bool,
    /// The budget that it is over.
    pub(super) over: Option<Refusal>,
    /// Whether this is decided only when the hub has answered a join.
    pub(super) waits: bool,
}

/// How long a message waits for the hub's answer to its sender's join: longer than a hub is asked.
const JOIN_PATIENCE_MS: i64 = 3_600_000;

impl Worker {
    /// What is to be done with an event, with all that this depends on looked up.
    pub(super) async fn decide(&self, portal: &Portal, event: &Event) -> Result<Decision, Refusal> {
        let core = &self.core;
        let far = self.source.other();
        let store = &core.context.store;
        let references = translate::references(event);
        let users = core.users.all(store, self.source, &references.users).await?;
        let named: Vec<OwnedEventId> = references.events.into_iter().chain(references.needs).collect();
        let mut events = HashMap::new();
        if !named.is_empty() {
            // What crossed in another portal is not in the room across.
            let here = |row: &images::ImageRow| !row.pending && row.portal == self.entry.number;
            let images = images::of_sources(store, self.source, &named).await?;
            events.extend(images.into_iter().filter(|(_, row)| here(row)).map(|(source, row)| (source, row.image)));
            let sources = images::of_images(store, self.source.other(), &named).await?;
            events.extend(sources.into_iter().filter(|(_, row)| here(row)).map(|(image, row)| (image, row.source)));
        }
        let redacted = match &event.redacts {
            Some(target) => core.sides()?.rooms(self.source).event(target).await?,
            None => None,
        };
        let redacted = match (redacted, &event.redacts) {
            (None, Some(target)) => self.said_before(portal, target, &events).await?,
            (redacted, _) => redacted,
        };
        // An event of another room is not this room's to redact.
        let redacted = redacted.filter(|redacted| redacted.room_id == event.room_id);
        let (reads_near, reads_far) = carry::reads(event, &users, core.users.bot());
        // Before the state, which holds what came back meanwhile.
        let ahead = self.ahead(portal, &reads_far).await?;
        let near_state = core.sides()?.rooms(self.source).pick(portal.room(self.source), &reads_near).await?;
        let far_state = core.sides()?.rooms(far).pick(portal.room(far), &reads_far).await?;
        let unsure = self.source == portal.authority() && may_be_reset(&near_state, event);
        if let Err(refusal) = acl::crosses(core, &near_state, &far_state, event).await {
            return Ok(Decision { outcome: Outcome::Refuse(refusal), unsure, over: None, waits: false });
        }
        if self.is_out_again(&near_state, event).await? {
            let outcome = Outcome::Nothing("it was taken out since, and that has crossed already");
            return Ok(Decision { outcome, unsure, over: None, waits: false });
        }
        let far_users = self.far_users(portal, event, &far_state).await?;
        let pins = match event.kind == PINNED && event.state_key.is_some() {
            true => pins::counterparts(core, self.entry.number, self.source, Some(&event.content), &far_state).await?,
            false => Counterparts::new(),
        };
        let outcome = carry::outcome(&Case {
            event,
            source: self.source,
            authority: portal.authority(),
            lets_in: portal.lets_in(far),
            bot_is_there: !portal.has_ghosts_alone(far) || far_state.membership(core.users.bot()) == "join",
            asks: !portal.lets_in(self.source),
            is_elsewhere: portal.elsewhere() == Some(self.source),
            replaceable: portal.is_replaceable(),
            far_users: &far_users,
            near: &near_state,
            far: &far_state,
            // What a foreign hub's log will be, its copy here does not say while LPDUs are on their way.
            settled: far == Side::Matrix || portal.lm_hub == core.context.server_name,
            ahead: &ahead,
            users: &users,
            events: &events,
            aliases: core.aliases(portal.address()),
            pins: &pins,
            redacted: redacted.as_ref(),
            far_room: portal.room(far),
            bot: core.users.bot(),
            media: &core.context.media,
            now_ms: core.now_ms(),
        });
        let refused = matches!(outcome, Outcome::Refuse(_));
        let waits = (refused && self.sender_is_on_its_way(event, &far_state, &users).await?)
            || self.is_joining(event, &far_state, &users, &ahead).await?;
        let over = match makes_ghost(&outcome, &far_state) {
            true => {
                let (limits, server) = (&core.context.config.budgets, event.sender.server_name());
                core.budgets.ghost(limits, self.entry.number, server, core.now_ms(), false).err()
            }
            false => None,
        };
        Ok(Decision { outcome, unsure, over, waits })
    }

    /// An event of the time before the gateway came, of which its image alone is here: whose it is the image's sender tells.
    async fn said_before(
        &self,
        portal: &Portal,
        target: &OwnedEventId,
        images: &HashMap<OwnedEventId, OwnedEventId>,
    ) -> Result<Option<Event>, Refusal> {
        let (core, far) = (&self.core, self.source.other());
        let Some(image) = images.get(target) else { return Ok(None) };
        let Some(image) = core.sides()?.rooms(far).event(image).await? else { return Ok(None) };
        match core.users.who(&core.context.store, far, &image.sender).await? {
            Who::Ghost { user: sender } => {
                let room_id = portal.room(self.source).to_owned();
                Ok(Some(Event { event_id: target.clone(), room_id, sender, ..image }))
            }
            _ => Ok(None),
        }
    }

    /// Who those are to whom a room that lives elsewhere gives power, where that is to be changed.
    async fn far_users(&self, portal: &Portal, event: &Event, far: &State) -> Result<Known, Refusal> {
        if portal.lets_in(self.source.other()) || event.kind != POWER_LEVELS {
            return Ok(Known::new());
        }
        let named = far.content(POWER_LEVELS).and_then(|content| content.get("users")?.as_object());
        let named = named.into_iter().flatten().filter_map(|(user, _)| UserId::parse(user.as_str()).ok());
        let creator = far.get("m.room.create", "").map(|entry| entry.sender.to_owned());
        let users: Vec<OwnedUserId> = named.chain(power::sovereigns(far)).chain(creator).collect();
        self.core.users.all(&self.core.context.store, self.source.other(), &users).await
    }

    /// What of the members that a decision depends on is on its way to a foreign hub.
    async fn ahead(&self, portal: &Portal, keys: &[Key]) -> Result<HashMap<OwnedUserId, Coming>, Refusal> {
        if self.source == Side::Lm || portal.lm_hub == self.core.context.server_name {
            return Ok(HashMap::new());
        }
        let members: Vec<Key> = keys.iter().filter(|(kind, _)| kind == MEMBER).cloned().collect();
        let coming = self.core.sides()?.lm.on_its_way(&portal.lm_room_id, &members).await?;
        let coming = coming.into_iter().filter_map(|((_, user), coming)| Some((UserId::parse(user).ok()?, coming)));
        Ok(coming.collect())
    }

    /// Whether what somebody says has to wait for their ghost's join to come back from the hub, which may refuse it.
    async fn is_joining(
        &self,
        event: &Event,
        far: &State,
        users: &Known,
        ahead: &HashMap<OwnedUserId, Coming>,
    ) -> Result<bool, Refusal> {
        let Some(Who::Native { ghost }) = users.get(&event.sender) else { return Ok(false) };
        let Some(join) = ahead.get(ghost).filter(|coming| coming.membership() == Some("join")) else {
            return Ok(false);
        };
        let is_own = event.membership().is_some_and(|(target, _)| target == event.sender);
        if is_own || far.membership(ghost) == "join" {
            return Ok(false);
        }
        let lpdu = std::slice::from_ref(&join.lpdu_id);
        let images = images::of_images(&self.core.context.store, Side::Matrix, lpdu).await?;
        let now = self.core.now_ms();
        Ok(images.values().any(|row| row.pending && now.saturating_sub(row.made_ts) < JOIN_PATIENCE_MS))
    }

    /// Whether a join is of somebody whom another has taken out since, and that has crossed: who ends a flood passes it.
    async fn is_out_again(&self, near: &State, event: &Event) -> Result<bool, Refusal> {
        let joins = event.membership().is_some_and(|(user, membership)| user == event.sender && membership == "join");
        let now = near.member(&event.sender).filter(|_| joins);
        let Some(now) = now.filter(|now| now.sender != event.sender && matches!(now.membership(), "leave" | "ban"))
        else {
            return Ok(false);
        };
        let taken_out = [now.event_id.to_owned()];
        Ok(!images::of_sources(&self.core.context.store, self.source, &taken_out).await?.is_empty())
    }

    /// Whether the sender was in the room by a join whose image is on its way to the hub: what it said goes after that image,
    /// as it would if the hub were quicker, also when it has left since, or was taken out of the log before it joined again.
    async fn sender_is_on_its_way(&self, event: &Event, far: &State, users: &Known) -> Result<bool, Refusal> {
        let Some(Who::Native { ghost }) = users.get(&event.sender) else { return Ok(false) };
        if far.membership(ghost) == "join" || self.source == Side::Lm || event.membership().is_some() {
            return Ok(false);
        }
        let Some(said) = self.core.sides()?.dag.event(&event.event_id).await? else { return Ok(false) };
        let now = self.core.now_ms();
        let images = images::of_sources(&self.core.context.store, Side::Matrix, &said.auth_events).await?;
        let on_their_way = |row: &&images::ImageRow| row.pending && now.saturating_sub(row.made_ts) < JOIN_PATIENCE_MS;
        for row in images.values().filter(on_their_way) {
            let named = self.core.sides()?.rooms(Side::Matrix).event(&row.source).await?;
            if named.as_ref().and_then(Event::membership) == Some((event.sender.clone(), "join")) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Whether what is to be done brings a ghost into the room across that was never in it.
fn makes_ghost(outcome: &Outcome, far: &State) -> bool {
    let Outcome::Cross(crossing) = outcome else { return false };
    let drafts = crossing.before.iter().map(|before| &before.draft).chain([&crossing.image]);
    drafts.into_iter().any(|draft| {
        let joins = draft.content.get("membership").is_some_and(|membership| membership == "join");
        draft.kind == MEMBER && joins && far.member(&draft.sender).is_none()
    })
}

/// Whether an event that was accepted into a graph may have changed more of its state than itself, or nothing: where forks
/// meet, state resolution decides, and no event says so.
fn may_be_reset(near: &State, event: &Event) -> bool {
    let (State::Graph(_), Some(state_key)) = (near, &event.state_key) else { return false };
    let current = near.get(&event.kind, state_key).is_some_and(|entry| *entry.event_id == event.event_id);
    let decides = match event.membership() {
        Some((target, _)) => target != event.sender,
        None => matches!(event.kind.as_str(), "m.room.power_levels" | "m.room.join_rules"),
    };
    !current || decides
}
