//! Users and their ghosts: who a user ID is, seen from one side, and how it is called on the other.

use std::collections::HashMap;

use ruma::{OwnedUserId, ServerName, UserId, user_id};

use crate::identity::{Ghost, GhostNames, Side};
use crate::refusal::Refusal;
use crate::store::Store;
use crate::store::ghosts::{self, Hashed};

/// The localpart of the bot, on both sides; every gateway's bot is called like this.
pub(super) const BOT: &str = "isthmus";
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

/// The bot of a gateway.
pub fn bot_of(server_name: &ServerName) -> OwnedUserId {
    // A server name is at most 230 bytes long, so that this is a user ID.
    UserId::parse(format!("@{BOT}:{server_name}")).unwrap_or_else(|_| user_id!("@isthmus:invalid").to_owned())
}

impl Users {
    pub(super) fn new(server_name: &ServerName, homeserver: Option<&ServerName>) -> Self {
        Self {
            names: GhostNames::new(server_name.to_owned()),
            bot: bot_of(server_name),
            appservice: homeserver.and_then(|name| UserId::parse(format!("@{APPSERVICE_SENDER}:{name}")).ok()),
        }
    }

    /// The gateway's bot.
    pub(super) fn bot(&self) -> &OwnedUserId {
        &self.bot
    }

    /// Who `user` is on `side`. That they are named somewhere writes nothing: a ghost whose name had to be hashed is kept
    /// with what it does first.
    pub(super) async fn who(&self, store: &Store, side: Side, user: &UserId) -> Result<Who, Refusal> {
        if *user == self.bot {
            return Ok(Who::Bot);
        }
        if side == Side::Matrix && self.appservice.as_deref() == Some(user) {
            return Ok(Who::Appservice);
        }
        if let Some((ghost, _)) = self.names.of_user(side, user) {
            return Ok(Who::Native { ghost });
        }
        Ok(match self.names.parse(side, user) {
            Ghost::Of(user) => Who::Ghost { user },
            Ghost::Hashed => match ghosts::behind(store, user, side.other()).await? {
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

    /// Those of `users`, at home on `side`, whose ghosts' names had to be hashed: what must be stored before they are used.
    pub(super) fn hashed<'a>(&self, side: Side, users: impl IntoIterator<Item = &'a OwnedUserId>) -> Vec<Hashed> {
        let hashed = |user: &OwnedUserId| {
            let (ghost, hashed) = self.names.of_user(side, user)?;
            hashed.then(|| Hashed { ghost, home: side, user: user.clone() })
        };
        users.into_iter().filter_map(hashed).collect()
    }

    /// Stores what must be before the ghosts of `users` are used.
    pub(super) async fn keep<'a>(
        &self,
        store: &Store,
        side: Side,
        users: impl IntoIterator<Item = &'a OwnedUserId>,
    ) -> Result<(), Refusal> {
        let hashed = self.hashed(side, users);
        if !hashed.is_empty() {
            store.write(move |tx| Box::pin(async move { ghosts::remember(tx, &hashed).await })).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use ruma::server_name;

    use super::*;
    use crate::store::testing::both_stores;

    #[tokio::test]
    async fn who_is_who_on_each_side() {
        both_stores(|store| async move {
            let users = Users::new(server_name!("g.example"), Some(server_name!("h.example")));
            let native = |ghost: &str| Who::Native { ghost: ghost.try_into().unwrap() };
            let ghost = |user: &str| Who::Ghost { user: user.try_into().unwrap() };
            for (side, user, expected) in [
                (Side::Matrix, "@alice:h.example", native("@mx_alice_h.example:g.example")),
                (Side::Lm, "@bob:l.example", native("@lm_bob_l.example:g.example")),
                (Side::Matrix, "@lm_bob_l.example:g.example", ghost("@bob:l.example")),
                (Side::Lm, "@mx_alice_h.example:g.example", ghost("@alice:h.example")),
                // A ghost exists on one side only, and is never made of a ghost or of a bot.
                (Side::Lm, "@lm_bob_l.example:g.example", Who::Stranger),
                (Side::Matrix, "@mx_alice_h.example:g.example", Who::Stranger),
                (Side::Matrix, "@someone:g.example", Who::Stranger),
                (Side::Matrix, "@isthmus:g.example", Who::Bot),
                (Side::Lm, "@isthmus:g.example", Who::Bot),
                (Side::Matrix, "@_isthmus:h.example", Who::Appservice),
                (Side::Lm, "@_isthmus:h.example", native("@lm__isthmus_h.example:g.example")),
            ] {
                let user = UserId::parse(user).unwrap();
                assert_eq!(users.who(&store, side, &user).await.unwrap(), expected, "{user} on {}", side.as_str());
            }
        })
        .await;
    }

    #[tokio::test]
    async fn a_name_that_had_to_be_hashed_leads_back() {
        both_stores(|store| async move {
            let users = Users::new(server_name!("g.example"), None);
            let user = UserId::parse(format!("@{}:h.example", "x".repeat(240))).unwrap();
            let Who::Native { ghost } = users.who(&store, Side::Matrix, &user).await.unwrap() else { panic!() };
            assert!(ghost.localpart().starts_with("mx_=_") && ghost.as_str().len() <= 255, "{ghost}");
            // That it is asked for is no reason to store it.
            assert_eq!(users.who(&store, Side::Lm, &ghost).await.unwrap(), Who::Stranger);
            users.keep(&store, Side::Matrix, [&user]).await.unwrap();
            let found = users.who(&store, Side::Lm, &ghost).await.unwrap();
            assert_eq!(found, Who::Ghost { user });
            assert_eq!(users.who(&store, Side::Matrix, &ghost).await.unwrap(), Who::Stranger);
        })
        .await;
    }
}
