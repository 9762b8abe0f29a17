//! What the bot understands of what begins with `!` and is said by who invited it. Pure.

use ruma::{OwnedUserId, UserId};

/// A command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Command {
    /// `!help`, and every other command that is not understood.
    Help,
    /// `!portals`
    Portals,
    /// `!alias #NAME:SERVER`
    Alias {
        /// What stands between `#` and `:`.
        name: String,
        /// The server.
        server: ruma::OwnedServerName,
    },
    /// `!invite PORTAL USER`
    Invite {
        /// The portal's ID.
        portal_id: String,
        /// A Matrix or LM user.
        user_id: OwnedUserId,
    },
}

/// What the bot says about itself.
pub(super) const HELP: &str = "I am the bot of a gateway between Matrix and Linearized Matrix.\n\
    !alias #NAME:SERVER – how to join the LM room with that alias from here\n\
    !portals – the rooms that are bridged (admins)\n\
    !invite PORTAL @USER:SERVER – invites a user into a bridged room (admins)";

/// The answer to encrypted messages.
pub(super) const ENCRYPTED: &str = "I cannot read encrypted messages: please talk to me in a chat without encryption.";

impl Command {
    /// What is meant by a message.
    pub(super) fn parse(body: &str) -> Self {
        let words: Vec<&str> = body.split_whitespace().take(4).collect();
        match words.as_slice() {
            ["!portals"] => Self::Portals,
            ["!alias", alias] => parse_alias(alias).unwrap_or(Self::Help),
            ["!invite", portal_id, user_id] => match UserId::parse(*user_id) {
                Ok(user_id) => Self::Invite { portal_id: (*portal_id).to_owned(), user_id },
                Err(_) => Self::Help,
            },
            _ => Self::Help,
        }
    }

    /// Whether it is for those alone whom `[access] admins` names.
    pub(super) fn is_for_admins(&self) -> bool {
        matches!(self, Self::Portals | Self::Invite { .. })
    }
}

fn parse_alias(alias: &str) -> Option<Command> {
    let (name, server) = alias.strip_prefix('#')?.split_once(':')?;
    let server = ruma::ServerName::parse(server).ok()?;
    (!name.is_empty()).then(|| Command::Alias { name: name.to_owned(), server })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_understood() {
        let user_id = UserId::parse("@a:b").unwrap();
        for (body, expected) in [
            ("!portals", Command::Portals),
            ("  !invite  p7 @a:b ", Command::Invite { portal_id: "p7".to_owned(), user_id }),
            (
                "!alias #tea:hub.example:8448",
                Command::Alias { name: "tea".to_owned(), server: "hub.example:8448".try_into().unwrap() },
            ),
            ("!invite p7 a", Command::Help),
            ("!invite p7 @a:b now", Command::Help),
            ("!alias tea", Command::Help),
            ("!alias #:x", Command::Help),
            ("hello", Command::Help),
            ("", Command::Help),
        ] {
            assert_eq!(Command::parse(body), expected, "{body}");
        }
    }
}
