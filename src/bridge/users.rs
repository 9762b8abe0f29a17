//! Users and their ghosts: who a user ID is, seen from one side, and how it is called on the other.

use std::collections::HashMap;

use ruma::{OwnedUserId, ServerName, UserId, user_id};

use crate::identity::{Ghost, GhostNames, Side};
use crate::refusal::Refusal;
use crate::store::Store;

/// The localpart of the bot, on both sides.
const BOT: &str = "isthmus";
/// The localpart of the appservice's sender at the Synapse.
const APPSERVICE_SENDER: &str = "_isthmus";

/// What a user ID is on one side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Who {
    /// A user at home on this side; `ghost` stands for them across.
    Native { ghost: OwnedUserId },
    /// A ghost; `user` is at home across.
    Ghost { user: OwnedUserId },
    /// The gateway's own bot, the same on both sides.
    Bot,
    /// The appservice's sender: in Matrix rooms, but nobody across.
    Appservice,
    /// A user of the gateway's name that does not exist on this side.
    Stranger,
}

/// The users named in an event, looked up.
pub(super) type Known = HashMap<OwnedUserId, Who>;

/// Names of users, bots and ghosts.
#[derive(Debug, Clone)]
pub(super) struct Users {
    names: GhostNames,
    bot: OwnedUserId,
    appservice: Option<OwnedUserId>,
}

impl Users {
    pub(super) fn new(server_name: &ServerName, homeserver: Option<&ServerName>) -> Self {
        Self {
            names: GhostNames::new(server_name.to_owned()),
            // A server name is at most 230 bytes long, so that this is a user ID.
            bot: UserId::parse(format!("@{BOT}:{server_name}"))
                .unwrap_or_else(|_| user_id!("@isthmus:invalid").to_owned()),
            appservice: homeserver.and_then(|name| UserId::parse(format!("@{APPSERVICE_SENDER}:{name}")).ok()),
        }
    }

    /// The gateway's bot.
    pub(super) fn bot(&self) -> &OwnedUserId {
        &self.bot
    }

    /// Who `user` is on `side`. A name that had to be hashed is stored on the way.
    pub(super) async fn who(&self, store: &Store, side: Side, user: &UserId) -> Result<Who, Refusal> {
        if *user == self.bot {
            return Ok(Who::Bot);
        }
        if side == Side::Matrix && self.appservice.as_deref() == Some(user) {
            return Ok(Who::Appservice);
        }
        if let Some((ghost, hashed)) = self.names.of_user(side, user) {
            if hashed {
                remember(store, side, user, &ghost).await?;
            }
            return Ok(Who::Native { ghost });
        }
        Ok(match self.names.parse(side, user) {
            Ghost::Of(user) => Who::Ghost { user },
            Ghost::Hashed => match behind(store, user).await? {
                Some(user) => Who::Ghost { user },
                None => Who::Stranger,
            },
            Ghost::No => Who::Stranger,
        })
    }

    /// The same for many.
    pub(super) async fn all<'a>(
        &self,
        store: &Store,
        side: Side,
        users: impl IntoIterator<Item = &'a OwnedUserId>,
    ) -> Result<Known, Refusal> {
        let mut known = Known::new();
        for user in users {
            if !known.contains_key(user) {
                known.insert(user.clone(), self.who(store, side, user).await?);
            }
        }
        Ok(known)
    }
}

async fn remember(_store: &Store, _side: Side, _user: &UserId, _ghost: &UserId) -> Result<(), Refusal> {
    Err(Refusal::Internal("names that are too long are not stored yet".to_owned()))
}

async fn behind(_store: &Store, _ghost: &UserId) -> Result<Option<OwnedUserId>, Refusal> {
    Ok(None)
}
