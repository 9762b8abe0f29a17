//! The seam between the two sides: what `lm` and `dag` have in common, and what they ask of the bridge, which stands between
//! them and which neither of them knows.

mod both;
mod devices;
mod effect;
mod errands;
mod owed;

use std::sync::Arc;

use async_trait::async_trait;
use ruma::{OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId, RoomId, ServerName, UserId};

pub use self::both::{Graphs, JoinShared, LogBatch, LogOrigin, Logs, NewLog, NewShared, Next, NextEvent, SHARED};
pub use self::devices::{Device, Devices, NoDevices, SharedDevices};
pub use self::effect::{Effects, EffectsOf, EventEffect, write_effects, write_effects_until_one_fails};
pub use self::errands::{Errands, Runner, again};
pub use self::owed::{LONGEST_OWED_MS, Leaver, OwedLeave, OwedLeaves};
use crate::event::{Edu, Object};
use crate::identity::Side;
use crate::refusal::Refusal;

/// An event that a user of this gateway is to send: everything but what the room's side adds.
#[derive(Debug, Clone, PartialEq)]
pub struct Draft {
    /// A ghost or a bot of this gateway.
    pub sender: OwnedUserId,
    /// The event type.
    pub kind: String,
    /// The state key of a state event.
    pub state_key: Option<String>,
    /// The content.
    pub content: Object,
    /// Milliseconds since the epoch; never in the future.
    pub origin_server_ts: i64,
}

/// A draft with what is to be written together with it.
#[derive(Clone)]
pub struct Outgoing {
    /// The event.
    pub draft: Draft,
    /// What is written with it.
    pub effect: Option<EventEffect>,
}

/// One event of a transaction as it came: its raw text.
pub type Raw = Box<serde_json::value::RawValue>;

/// What became of one event of a transaction.
#[derive(Debug, Clone)]
pub struct Received {
    /// Its ID, of the event as received; none when it could not be parsed.
    pub event_id: Option<OwnedEventId>,
    /// Ok when it was accepted or dropped silently.
    pub result: Result<(), Refusal>,
}

/// The membership that a handshake is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Membership {
    /// `join`
    Join,
    /// `leave`
    Leave,
    /// `invite`
    Invite,
    /// `knock`
    Knock,
    /// `ban`
    Ban,
}

impl Membership {
    /// As it stands in `content.membership`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Join => "join",
            Self::Leave => "leave",
            Self::Invite => "invite",
            Self::Knock => "knock",
            Self::Ban => "ban",
        }
    }

    /// The membership that is written like this.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Join, Self::Leave, Self::Invite, Self::Knock, Self::Ban].into_iter().find(|m| m.as_str() == text)
    }

    /// Whether nothing but an invite would allow a user whose membership is `current` to change it to this one.
    pub fn needs_invite(self, current: Option<&str>, join_rule: &str) -> bool {
        match self {
            Self::Join => matches!(current, None | Some("leave" | "knock")) && matches!(join_rule, "invite" | "knock"),
            Self::Leave => matches!(current, None | Some("leave")),
            _ => false,
        }
    }
}

/// How far a handshake is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// A template was asked for: nothing may be changed, only checked.
    Make,
    /// The signed event is here and passed its own side's rules: the other side may be asked for good, before it is
    /// accepted.
    Send,
}

/// A change of membership that a foreign server makes through this gateway.
#[derive(Debug, Clone)]
pub struct Handshake {
    /// On which side.
    pub side: Side,
    /// In which room.
    pub room_id: OwnedRoomId,
    /// Whose membership.
    pub user_id: OwnedUserId,
    /// To what.
    pub membership: Membership,
    /// How far it is.
    pub stage: Stage,
    /// The member event's content at [`Stage::Send`].
    pub content: Object,
}

/// A foreign server invites a user of this gateway's name.
#[derive(Debug, Clone)]
pub struct Invite {
    /// On which side.
    pub side: Side,
    /// Into which room.
    pub room_id: OwnedRoomId,
    /// The room's version identifier.
    pub room_version: String,
    /// The ID of the invite event.
    pub event_id: OwnedEventId,
    /// Who invites.
    pub sender: OwnedUserId,
    /// Who is invited: a user of this gateway.
    pub target: OwnedUserId,
    /// The server that asks for the signature: one through which the room can be joined.
    pub via: OwnedServerName,
    /// The invite's content.
    pub content: Object,
    /// The stripped state that came with it, not verified.
    pub stripped_state: Vec<Object>,
}

/// An invite of a user of this gateway into a room that the gateway is not in has ended: somebody there has taken it back.
#[derive(Debug, Clone)]
pub struct Uninvited {
    /// On which side.
    pub side: Side,
    /// Into which room.
    pub room_id: OwnedRoomId,
    /// Who was invited.
    pub target: OwnedUserId,
    /// Who ended it; signed by that user's server.
    pub sender: OwnedUserId,
    /// The server that says so.
    pub told_by: OwnedServerName,
    /// The reason given.
    pub reason: Option<String>,
}

impl Uninvited {
    /// What a member event about a user of `own` ends, if it does.
    pub fn of(
        side: Side,
        told_by: &ServerName,
        own: &ServerName,
        event: (&RoomId, &UserId, Option<&str>, &Object),
    ) -> Option<Self> {
        let (room_id, sender, state_key, content) = event;
        let target = OwnedUserId::try_from(state_key?).ok()?;
        let ends = matches!(content.get("membership")?.as_str()?, "leave" | "ban");
        let by_others = target != *sender && sender.server_name() != own && target.server_name() == own;
        let reason = content.get("reason").and_then(|reason| reason.as_str()).map(str::to_owned);
        (ends && by_others).then(|| Self {
            side,
            room_id: room_id.to_owned(),
            target,
            sender: sender.to_owned(),
            told_by: told_by.to_owned(),
            reason,
        })
    }
}

/// Where an alias leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AliasTarget {
    /// The room.
    pub room_id: OwnedRoomId,
    /// Servers through which it can be joined.
    pub servers: Vec<OwnedServerName>,
}

/// What is shown of a user.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Profile {
    /// `displayname`
    pub displayname: Option<String>,
    /// `avatar_url`
    pub avatar_url: Option<String>,
}

/// What `lm` and `dag` ask of the bridge. Every method may be called from many tasks at once.
#[async_trait]
pub trait Between: Send + Sync + 'static {
    /// The gate of handshakes: whether the other side has the user too. In a from-LM portal this waits, at
    /// [`Stage::Send`], for the hub.
    async fn gate(&self, handshake: &Handshake) -> Result<(), Refusal>;

    /// Whether what is accepted in this room goes into the bridge's inbox. Called for every batch: from memory.
    fn watches(&self, side: Side, room_id: &RoomId) -> bool;

    /// Whether the hub of an LM room has to wait with what it sends there. Called for every event: from memory.
    fn paused(&self, _room_id: &RoomId) -> bool {
        false
    }

    /// New rows for this room were committed to the inbox.
    fn accepted(&self, side: Side, room_id: &RoomId);

    /// A foreign server's invite for a user of this gateway. Ok means that the invite is signed and taken; what follows
    /// from it follows later.
    async fn invited(&self, invite: Invite) -> Result<(), Refusal>;

    /// Whether a user of this gateway is somebody on a side: its bot, or who stands for somebody of the other side.
    async fn is_user(&self, _side: Side, _user_id: &UserId) -> Result<bool, Refusal> {
        Ok(true)
    }

    /// On which side a room is that the gateway is not in and into which one of its users is invited. Called for every event of a
    /// room that is not known: from memory.
    fn invited_into(&self, _room_id: &RoomId) -> Option<Side> {
        None
    }

    /// Such an invite has ended. What is said by somebody who cannot have ended it is to be ignored.
    async fn uninvited(&self, _ended: Uninvited) -> Result<(), Refusal> {
        Ok(())
    }

    /// Where an alias of this gateway's name leads; `asked_by` is the server that asks, and `side` the one that it asks for
    /// when that is said. May make a portal.
    async fn alias(
        &self,
        alias: &str,
        asked_by: Option<&ServerName>,
        side: Option<Side>,
    ) -> Result<AliasTarget, Refusal>;

    /// The profile of a user of this gateway as the given side sees it: of ghosts of that side and of bots only.
    async fn profile(&self, side: Side, user_id: &UserId) -> Result<Profile, Refusal>;

    /// What a user of another server does besides events: typing, reading, being there. It is about a user of the server that said
    /// so; whether that user is in the room is for the bridge to see. Nothing waits for what becomes of it, and it may be lost.
    fn edu(&self, _side: Side, _edu: Edu) {}

    /// Whether a user of this gateway has such a device, for which messages are to be kept.
    fn has_device(&self, _user_id: &UserId, _device: &str) -> bool {
        false
    }

    /// The hub of an LM room misbehaves; what it did is said by one word. Called from where its events are taken: from memory.
    fn hub_misbehaves(&self, _room_id: &RoomId, _fault: &'static str) {}

    /// A participant of an LM room is told how the hub judged an LPDU that it sent; again when it could not be recorded.
    async fn lpdu_refused(&self, room_id: &RoomId, lpdu_id: &OwnedEventId, error: &str) -> Result<(), Refusal>;

    /// An LPDU that its hub had not taken when another server took over the log is replaced, by an LPDU for that server or by
    /// the event itself where the gateway is it: what is written with what replaces it, by its new ID.
    fn lpdu_replaced(&self, _lpdu_id: &OwnedEventId, _by_lpdu: bool) -> Option<EventEffect> {
        None
    }

    /// Whether the gateway may take over the log of a room.
    async fn may_take_hub(&self, _room_id: &RoomId) -> Result<(), Refusal> {
        Ok(())
    }

    /// Another server keeps the log of a room now. After the commit.
    fn hub_changed(&self, _room_id: &RoomId, _hub: &ServerName) {}
}

/// The bridge as `lm` and `dag` hold it.
pub type SharedBetween = Arc<dyn Between>;

/// A bridge that bridges nothing: for tests of one side, and for an LM server without a Matrix side.
#[derive(Debug, Default)]
pub struct Alone;

#[async_trait]
impl Between for Alone {
    async fn gate(&self, _handshake: &Handshake) -> Result<(), Refusal> {
        Ok(())
    }

    fn watches(&self, _side: Side, _room_id: &RoomId) -> bool {
        false
    }

    fn accepted(&self, _side: Side, _room_id: &RoomId) {}

    async fn invited(&self, _invite: Invite) -> Result<(), Refusal> {
        Ok(())
    }

    async fn alias(
        &self,
        alias: &str,
        _asked_by: Option<&ServerName>,
        _side: Option<Side>,
    ) -> Result<AliasTarget, Refusal> {
        Err(Refusal::NotFound(format!("alias {alias}")))
    }

    async fn profile(&self, _side: Side, user_id: &UserId) -> Result<Profile, Refusal> {
        Err(Refusal::NotFound(format!("user {user_id}")))
    }

    async fn lpdu_refused(&self, _room_id: &RoomId, _lpdu_id: &OwnedEventId, _error: &str) -> Result<(), Refusal> {
        Ok(())
    }
}
