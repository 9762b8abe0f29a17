//! What the bot answers to a command.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ruma::{EventId, OwnedServerName, OwnedUserId, RoomId, ServerName, UserId};

use super::Homeserver;
use super::aliases::Aliases;
use super::commands::{self, Command};
use super::event::Chat;
use super::portals::Portals;
use crate::bridge::{Explanation, Health, Listed, Portal, of_alias};
use crate::refusal::Refusal;

/// How many rooms are listed.
const LISTED: usize = 50;
/// How many refusals of a portal are shown.
const REFUSALS: usize = 5;
/// How long somebody waits for an answer.
const PATIENCE: Duration = Duration::from_secs(45);

/// How the gateway is doing, as text.
#[async_trait]
pub trait Summary: Send + Sync + 'static {
    /// A few lines.
    async fn summary(&self) -> String;
}

/// What gives the answers.
pub(super) struct Answers {
    pub(super) portals: Arc<dyn Portals>,
    pub(super) aliases: Arc<Aliases>,
    pub(super) homeserver: Homeserver,
    pub(super) homeserver_name: OwnedServerName,
    /// The gateway's own, by federation.
    pub(super) gateway_bot: OwnedUserId,
    pub(super) admins: Vec<OwnedUserId>,
    pub(super) summary: Arc<dyn Summary>,
}

/// An answer.
pub(super) struct Answer {
    pub(super) text: String,
    /// Whether the bot has nothing more to do in the room.
    pub(super) leaves: bool,
}

impl From<String> for Answer {
    fn from(text: String) -> Self {
        Self { text, leaves: false }
    }
}

impl Answers {
    /// Whether somebody is one of those whom `[access] admins` names.
    pub(super) fn is_admin(&self, user: &UserId) -> bool {
        self.admins.iter().any(|admin| admin == user)
    }

    /// The answer to a command that was given in `room_id`. There always is one: who asks is told at once what does not work, and
    /// asks again when it may.
    pub(super) async fn to(&self, room_id: &RoomId, chat: &Chat, command: Command) -> Answer {
        if command.is_for_admins() && !self.is_admin(&chat.with) {
            return "This is for the gateway's admins alone.".to_owned().into();
        }
        match tokio::time::timeout(PATIENCE, self.answer(room_id, chat, command)).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(refusal)) => refused(&refusal).into(),
            Err(_) => "This takes longer than I wait for it. It may still come about.".to_owned().into(),
        }
    }

    async fn answer(&self, room_id: &RoomId, chat: &Chat, command: Command) -> Result<Answer, Refusal> {
        let sender = &chat.with;
        let text = match command {
            Command::Help => commands::help(self.is_admin(sender)),
            Command::Misused(usage) => format!("It is said so: {usage}"),
            Command::Join { name, server } => self.join(sender, &name, &server).await?,
            Command::List => self.list(sender).await?,
            Command::Show { portal_id } => {
                let (portal, health) = self.portals.show(&portal_id).await?;
                show(&portal, &health)
            }
            Command::Invite { portal_id, user_id } => {
                self.portals.invite_into(&portal_id, &user_id).await?;
                format!("{user_id} is invited.")
            }
            Command::Unbridge { portal_id } => {
                let portal_id = match portal_id {
                    Some(portal_id) => portal_id,
                    None => match self.portals.of_room(room_id).await {
                        Err(Refusal::UnknownRoom(_)) => {
                            return Ok("This room is not bridged: name the portal, as `list` shows it."
                                .to_owned()
                                .into());
                        }
                        found => found?,
                    },
                };
                self.portals.end(&portal_id, sender).await?;
                format!("{portal_id} has ended.")
            }
            Command::Expose => return self.expose(room_id, chat).await,
            Command::Status => self.summary.summary().await,
            Command::Explain { event_id } => self.explain(sender, &event_id).await?,
        };
        Ok(text.into())
    }

    /// The gateway's bot is asked in, which makes a portal of the room.
    async fn expose(&self, room_id: &RoomId, chat: &Chat) -> Result<Answer, Refusal> {
        if chat.is_direct {
            return Ok("Invite me into the room, and say !expose there.".to_owned().into());
        }
        if let Err(error) = self.homeserver.invite(room_id, &self.gateway_bot).await {
            // It may be in already, or need no invite; else the join tells.
            tracing::info!(room = %room_id, %error, "the gateway's bot could not be invited");
        }
        let portal = self.portals.expose(room_id, &self.homeserver_name).await?;
        let Portal { portal_id, lm_room_id, alias, .. } = &*portal;
        let alias = alias.as_deref().map(|alias| format!(" {alias}")).unwrap_or_default();
        let text = format!("This room is connected with the LM room {lm_room_id}{alias} ({portal_id}).");
        Ok(Answer { text, leaves: true })
    }

    async fn join(&self, sender: &UserId, name: &str, server: &ServerName) -> Result<String, Refusal> {
        let localpart = of_alias(name, server);
        let alias = format!("#{localpart}:{}", self.homeserver_name);
        if let Err(error) = self.aliases.query(&alias).await {
            return Ok(match self.portals.why_not(&localpart).await {
                Some(refusal) => refused(&refusal),
                None => format!("That did not work: {error}"),
            });
        }
        let target = self.portals.resolve_alias(&localpart).await?;
        Ok(match self.portals.invite_if_public(&target.room_id, sender).await? {
            true => format!("You are invited into {alias}."),
            false => format!("The room is {alias}. Only who is invited or let in there may join it."),
        })
    }

    async fn list(&self, sender: &UserId) -> Result<String, Refusal> {
        let mut lines: Vec<String> = match self.is_admin(sender) {
            true => self.portals.first(LISTED.saturating_add(1)).await?.iter().map(|portal| line(portal)).collect(),
            false => self.portals.listed(LISTED.saturating_add(1)).await?.iter().map(listed).collect(),
        };
        if lines.is_empty() {
            return Ok("There are no bridged rooms.".to_owned());
        }
        if lines.len() > LISTED {
            lines.truncate(LISTED);
            lines.push("and more".to_owned());
        }
        Ok(lines.join("\n"))
    }

    async fn explain(&self, sender: &UserId, event_id: &EventId) -> Result<String, Refusal> {
        let found = self.portals.explain(event_id).await?;
        // Of others' messages nothing is said, not even whether they are there.
        let found = found.filter(|found| found.sender == sender || self.is_admin(sender));
        Ok(found.map_or_else(|| format!("I know nothing of {event_id}."), |found| explanation(&found)))
    }
}

fn refused(refusal: &Refusal) -> String {
    let later = if refusal.is_transient() { " It may work later." } else { "" };
    format!("That did not work: {refusal}.{later}")
}

fn line(portal: &Portal) -> String {
    let Portal { portal_id, kind, state, matrix_room_id, lm_room_id, alias, .. } = portal;
    let alias = alias.as_deref().map(|alias| format!(" {alias}")).unwrap_or_default();
    format!("{portal_id} {} ({}): {matrix_room_id} – {lm_room_id}{alias}", state.as_str(), kind.as_str())
}

fn listed(room: &Listed) -> String {
    let Listed { room_id, alias, name, members, join_rule } = room;
    let name = name.as_deref().map(|name| format!(" {name}")).unwrap_or_default();
    let ask = if join_rule.as_deref() == Some("public") { "" } else { ", who wants in knocks" };
    let members = if *members == 1 { "1 member".to_owned() } else { format!("{members} members") };
    format!("{}{name} ({members}{ask})", alias.as_deref().unwrap_or(room_id))
}

fn show(portal: &Portal, health: &Health) -> String {
    let mut lines = vec![line(portal), format!("LM hub: {}", portal.lm_hub)];
    lines.extend(portal.reason.as_ref().map(|reason| format!("because {reason}")));
    lines.push(format!("members: {} of Matrix, {} of LM", health.members.matrix.len(), health.members.lm.len()));
    for invite in health.invitations.iter().take(REFUSALS) {
        lines.push(format!("invited by {} and not there yet: {} ({})", invite.inviter, invite.user_id, invite.stage));
    }
    for waiting in health.waiting.iter().filter(|waiting| waiting.count > 0) {
        lines.push(format!("waiting to cross from {}: {}", waiting.side, waiting.count));
    }
    for (count, what) in [
        (health.pending, "sent to the hub and not back yet"),
        (health.missing.count, "missing of the hub's log"),
        (health.hub_faults.count, "faults of the hub"),
    ] {
        if count > 0 {
            lines.push(format!("{what}: {count}"));
        }
    }
    lines.extend(health.overdue.then(|| "something has waited for more than ten minutes".to_owned()));
    lines.extend(health.paused.then(|| "the hub is told to wait, because too much waits already".to_owned()));
    for refused in health.refusals.iter().take(REFUSALS) {
        lines.push(format!(
            "not carried: {} of {} ({}): {}",
            refused.kind, refused.sender, refused.event_id, refused.reason
        ));
    }
    lines.join("\n")
}

fn explanation(found: &Explanation) -> String {
    let what = match found.status {
        "crossed" => "It crossed",
        "image" => "It is the image of an event of the other side",
        "pending" => "It was sent to the hub, which has not taken it into its log yet",
        "waiting" => "It waits to cross",
        "refused" => "It did not cross",
        "local" => "It is of this room alone",
        "repair" => "It brought the room back to what the other side has",
        "shared" => "It is in the one room that both sides have",
        _ => "What became of it is not known any more",
    };
    let across = found.across.as_ref().map(|across| format!(": {across}")).unwrap_or_default();
    let mut lines = vec![format!("{what}{across}.")];
    lines.extend(found.refusal.as_ref().map(|refusal| format!("The reason: {}.", refusal.reason)));
    lines.extend(found.note.as_ref().map(|note| format!("Note: {note}.")));
    lines.join("\n")
}
