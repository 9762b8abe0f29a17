//! Telling a sender that an event of theirs did not cross: a notice by the gateway's bot in the room where it was sent, not
//! more often than anybody wants to read it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use ruma::{OwnedUserId, UserId};
use serde_json::json;

use super::core::Core;
use super::loops;
use super::portal::Portal;
use super::side::{Event, MEMBER};
use super::translate::MAPPED_STATE;
use crate::clock::is_recent;
use crate::event::Object;
use crate::identity::Side;
use crate::refusal::Refusal;

/// How often one sender is told the same in one portal.
const SAME_EVERY_MS: i64 = 600_000;
/// How many notices a portal gets in a minute.
const A_MINUTE: usize = 5;
/// How many senders are remembered; with more, everything is forgotten.
const REMEMBERED: usize = 10_000;
/// How often a room is told of its hub's faults.
const HUB_EVERY_MS: i64 = 3_600_000;
/// The longest reason in a notice, in characters.
const REASON_LIMIT: usize = 300;

/// Who was told what, and when.
#[derive(Debug, Default)]
pub(super) struct Notices {
    told: Mutex<Told>,
}

#[derive(Debug, Default)]
struct Told {
    senders: HashMap<(i64, OwnedUserId, &'static str), i64>,
    portals: HashMap<i64, Vec<i64>>,
    /// When the room of a portal was told of a kind of its hub's faults, and how many there were since.
    hubs: HashMap<(i64, &'static str), (i64, u64)>,
}

impl Notices {
    /// Tells the sender of `event`, unless the configuration is against it, it is nothing that a person would miss, or they
    /// were told of late.
    pub(super) fn tell(&self, core: &Arc<Core>, portal: &Arc<Portal>, source: Side, event: &Event, refusal: &Refusal) {
        // All of a second gateway are one: it carries the notices too.
        let who = loops::bot_of(&event.sender).filter(|_| matches!(refusal, Refusal::Loop(_)));
        let key = (portal.number(), who.unwrap_or_else(|| event.sender.clone()), refusal.code());
        if !core.context.config.portals.notices || !missed(event, refusal) || !self.due(key, core.now_ms()) {
            return;
        }
        let body = notice(event, refusal);
        let (core, portal) = (core.clone(), portal.clone());
        core.clone().spawn(async move {
            if let Err(refusal) = say(&core, &portal, source, body).await {
                tracing::warn!(portal = portal.portal_id, %refusal, "a notice could not be sent");
            }
        });
    }

    /// Tells the Matrix room of a portal that its hub misbehaves: at once, and then once in an hour how often.
    pub(super) fn hub(&self, core: &Arc<Core>, portal: &Arc<Portal>, fault: &'static str) {
        if !core.context.config.portals.notices || portal.is_one_room() {
            return;
        }
        let Some(count) = self.hub_due((portal.number(), fault), core.now_ms()) else { return };
        let body = hub_notice(portal.lm_hub.as_str(), fault, count);
        let (core, portal) = (core.clone(), portal.clone());
        core.clone().spawn(async move {
            if let Err(refusal) = say(&core, &portal, Side::Matrix, body).await {
                tracing::warn!(portal = portal.portal_id, %refusal, "a notice could not be sent");
            }
        });
    }

    /// How many faults of a kind are to be told now, if any are.
    fn hub_due(&self, key: (i64, &'static str), now: i64) -> Option<u64> {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.hubs.len() > REMEMBERED {
            *told = Told::default();
        }
        let (at, count) = told.hubs.entry(key).or_insert((i64::MIN, 0));
        *count = count.saturating_add(1);
        if *at != i64::MIN && is_recent(*at, now, HUB_EVERY_MS) {
            return None;
        }
        *at = now;
        Some(std::mem::take(count))
    }

    fn due(&self, key: (i64, OwnedUserId, &'static str), now: i64) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.senders.len() > REMEMBERED {
            *told = Told::default();
        }
        if told.senders.get(&key).is_some_and(|at| is_recent(*at, now, SAME_EVERY_MS)) {
            return false;
        }
        let minute = told.portals.entry(key.0).or_default();
        minute.retain(|at| is_recent(*at, now, 60_000));
        if minute.len() >= A_MINUTE {
            return false;
        }
        minute.push(now);
        told.senders.insert(key, now);
        true
    }
}

/// Whether a person would miss the event on the other side.
fn missed(event: &Event, refusal: &Refusal) -> bool {
    let kind = event.kind.as_str();
    let said = matches!(kind, "m.room.message" | "m.room.encrypted" | "m.sticker");
    let done = MAPPED_STATE.contains(&kind) || matches!(kind, MEMBER | "m.room.redaction");
    said || (done && !matches!(refusal, Refusal::NotBridged(_)))
}

fn notice(event: &Event, refusal: &Refusal) -> Object {
    let what = match event.kind.as_str() {
        "m.room.message" | "m.room.encrypted" | "m.sticker" => "A message",
        "m.room.redaction" => "A redaction",
        _ => "A change",
    };
    let reason: String = refusal.to_string().chars().take(REASON_LIMIT).collect();
    let mut content =
        text("m.notice", &format!("{what} by {} was not carried to the other side: {reason}", event.sender));
    content.insert("m.mentions".to_owned(), json!({}));
    content
}

fn hub_notice(hub: &str, fault: &str, count: u64) -> Object {
    let what = match fault {
        "went_back" => "does not know any more what was said here last: nothing is sent to it until it does",
        "forked" => "lets this room's log fork: messages may come late, or in another order than elsewhere",
        "rewritten" => "gave events of this room that are not as they were signed",
        "forbidden" => "took events into this room that its rules forbid: they are left out here",
        "reordered" => {
            "gives this room's log in another order than its own: messages may stand in another order than elsewhere"
        }
        "unlinked" => "took events into this room that do not say what they follow",
        "incomplete" => "does not name all that allows what is said in this room",
        "moved" => {
            "is said to keep it no more, and nobody shows who does: what is said here does not get there until somebody does"
        }
        "skipped" => "does not give all of this room's log: messages may be missing here",
        _ => "does not keep this room's log as it should",
    };
    let times = if count > 1 { format!(" ({count} times since this was said last)") } else { String::new() };
    let mut content =
        text("m.notice", &format!("The server {hub}, which keeps the room on the other side, {what}{times}."));
    content.insert("m.mentions".to_owned(), json!({}));
    content
}

/// The content of a message.
pub(super) fn text(msgtype: &str, body: &str) -> Object {
    let mut content = Object::new();
    content.insert("msgtype".to_owned(), msgtype.into());
    content.insert("body".to_owned(), body.into());
    content
}

/// The bot says something in one room of a portal; where ghosts alone are, one of them does, in the gateway's name.
pub(super) async fn say(
    core: &Core,
    portal: &Portal,
    side: Side,
    mut content: Object,
) -> Result<ruma::OwnedEventId, Refusal> {
    let bot = core.users.bot();
    let speaker = match portal.has_ghosts_alone(side) {
        false => bot.clone(),
        true => {
            let nobody = || Refusal::Forbidden(format!("nobody of the gateway is in {}", portal.room(side)));
            speaker(core, portal, side).await?.ok_or_else(nobody)?
        }
    };
    if speaker != *bot
        && let Some(body) = content.get("body").and_then(|body| body.as_str())
    {
        let body = format!("[{}] {body}", core.context.server_name);
        content.insert("body".to_owned(), body.into());
    }
    core.send(portal, side, core.draft(&speaker, "m.room.message", None, content)).await
}

/// Who speaks for the gateway in one room of a portal: the bot, or a ghost where ghosts may be alone; none when nobody is there.
pub(super) async fn speaker(core: &Core, portal: &Portal, side: Side) -> Result<Option<OwnedUserId>, Refusal> {
    let (rooms, room_id, bot) = (core.sides()?.rooms(side), portal.room(side), core.users.bot());
    let own = [(MEMBER.to_owned(), bot.to_string())];
    // A room that ghosts were only invited into is not known here.
    match rooms.pick(room_id, &own).await {
        Ok(state) if state.membership(bot) == "join" => return Ok(Some(bot.clone())),
        Ok(_) if portal.has_ghosts_alone(side) => {}
        Ok(_) | Err(Refusal::UnknownRoom(_)) => return Ok(None),
        Err(refusal) => return Err(refusal),
    }
    let state = rooms.state(room_id).await?;
    let joined = state.members().into_iter().filter(|entry| entry.membership() == "join");
    let mut own = joined.filter_map(|entry| <&UserId>::try_from(entry.state_key).ok());
    Ok(own.find(|user| *user.server_name() == core.context.server_name).map(ToOwned::to_owned))
}

#[cfg(test)]
mod tests {
    use ruma::user_id;

    use super::*;

    #[test]
    fn a_room_is_told_of_its_hub_at_once_and_then_once_in_an_hour() {
        let notices = Notices::default();
        assert_eq!(notices.hub_due((1, "forked"), 5), Some(1));
        for _ in 0..7 {
            assert_eq!(notices.hub_due((1, "forked"), HUB_EVERY_MS), None);
        }
        assert_eq!(notices.hub_due((1, "went_back"), 6), Some(1));
        assert_eq!(notices.hub_due((2, "forked"), 6), Some(1));
        assert_eq!(notices.hub_due((1, "forked"), HUB_EVERY_MS + 5), Some(8));
        let body = hub_notice("hub.example", "forked", 8)["body"].as_str().unwrap().to_owned();
        assert!(body.contains("hub.example") && body.contains("fork") && body.contains('8'), "{body}");
    }

    #[test]
    fn a_sender_is_told_the_same_once_in_a_while_and_a_room_not_flooded() {
        let notices = Notices::default();
        let key = |user: &str, code| (1, OwnedUserId::try_from(user).unwrap(), code);
        assert!(notices.due(key("@a:h", "lm_rule"), 0));
        assert!(!notices.due(key("@a:h", "lm_rule"), SAME_EVERY_MS - 1));
        assert!(notices.due(key("@a:h", "policy"), 1));
        assert!(notices.due(key("@a:h", "lm_rule"), SAME_EVERY_MS));
        for user in 0..A_MINUTE + 3 {
            let due = notices.due(key(&format!("@u{user}:h"), "policy"), 3 * SAME_EVERY_MS);
            assert_eq!(due, user < A_MINUTE);
        }
        assert!(notices.due((2, user_id!("@a:h").to_owned(), "policy"), 3 * SAME_EVERY_MS));
    }
}
