//! What the bot understands of what is said to it. Pure.

use ruma::{OwnedEventId, OwnedServerName, OwnedUserId, ServerName, UserId};

/// A command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Command {
    /// `help`, and everything that is no command.
    Help,
    /// A command whose words are not those that it takes: how it is written.
    Misused(&'static str),
    /// `join #NAME:SERVER`
    Join {
        /// What stands between `#` and `:`.
        name: String,
        /// The LM server.
        server: OwnedServerName,
    },
    /// `list`
    List,
    /// `show PORTAL`
    Show {
        /// The portal's ID.
        portal_id: String,
    },
    /// `invite PORTAL USER`
    Invite {
        /// The portal's ID.
        portal_id: String,
        /// A Matrix or LM user.
        user_id: OwnedUserId,
    },
    /// `unbridge [PORTAL]`
    Unbridge {
        /// The portal's ID; that of the room in which it is said when absent.
        portal_id: Option<String>,
    },
    /// `expose`
    Expose,
    /// `status`
    Status,
    /// `explain EVENT`
    Explain {
        /// The event, on either side.
        event_id: OwnedEventId,
    },
}

/// A word that the bot knows, what follows it, who may say it, and what it does.
struct Word {
    word: &'static str,
    usage: &'static str,
    for_admins: bool,
    does: &'static str,
}

const WORDS: [Word; 9] = [
    Word { word: "help", usage: "help", for_admins: false, does: "says this" },
    Word {
        word: "join",
        usage: "join #NAME:SERVER",
        for_admins: false,
        does: "brings you into the LM room with that alias",
    },
    Word { word: "list", usage: "list", for_admins: false, does: "the bridged rooms that anybody may join" },
    Word {
        word: "explain",
        usage: "explain $EVENT",
        for_admins: false,
        does: "what became of a message of yours on the other side: its ID, or a link to it",
    },
    Word { word: "show", usage: "show PORTAL", for_admins: true, does: "how a bridged room is doing" },
    Word {
        word: "invite",
        usage: "invite PORTAL @USER:SERVER",
        for_admins: true,
        does: "invites a user of either side into a bridged room",
    },
    Word {
        word: "unbridge",
        usage: "unbridge PORTAL",
        for_admins: true,
        does: "ends a bridge for good: everybody of the other side leaves",
    },
    Word {
        word: "expose",
        usage: "expose",
        for_admins: true,
        does: "connects a room of this homeserver with LM: invite me there, and say !expose there",
    },
    Word { word: "status", usage: "status", for_admins: true, does: "how the gateway is doing" },
];

/// The answer to encrypted messages.
pub(super) const ENCRYPTED: &str = "I cannot read encrypted messages: please talk to me in a chat without encryption.";

/// What the bot says about itself, to an admin or to somebody else.
pub(super) fn help(to_admin: bool) -> String {
    let mut lines = vec!["I am the bot of a gateway between Matrix and Linearized Matrix (LM).".to_owned()];
    lines.extend(
        WORDS
            .iter()
            .filter(|word| to_admin || !word.for_admins)
            .map(|Word { usage, does, .. }| format!("{usage} – {does}")),
    );
    lines.push("In rooms with others, put ! before it.".to_owned());
    lines.join("\n")
}

impl Command {
    /// What is meant by a message. The `!` before a command may be left out.
    pub(super) fn parse(body: &str) -> Self {
        let body = body.trim();
        let words: Vec<&str> = body.strip_prefix('!').unwrap_or(body).split_whitespace().take(4).collect();
        let Some((first, rest)) = words.split_first() else { return Self::Help };
        let Some(word) = WORDS.iter().find(|word| word.word.eq_ignore_ascii_case(first)) else { return Self::Help };
        Self::of(word.word, rest).unwrap_or(Self::Misused(word.usage))
    }

    fn of(word: &str, rest: &[&str]) -> Option<Self> {
        match (word, rest) {
            ("help", _) => Some(Self::Help),
            ("list", []) => Some(Self::List),
            ("status", []) => Some(Self::Status),
            ("expose", []) => Some(Self::Expose),
            ("join", [alias]) => join(alias),
            ("show", [portal]) => Some(Self::Show { portal_id: portal_id(portal)? }),
            ("unbridge", []) => Some(Self::Unbridge { portal_id: None }),
            ("unbridge", [portal]) => Some(Self::Unbridge { portal_id: Some(portal_id(portal)?) }),
            ("explain", [event]) => Some(Self::Explain { event_id: event_id(event)? }),
            ("invite", [portal, user]) => {
                Some(Self::Invite { portal_id: portal_id(portal)?, user_id: UserId::parse(*user).ok()? })
            }
            _ => None,
        }
    }

    /// Whether it is for those alone whom `[access] admins` names.
    pub(super) fn is_for_admins(&self) -> bool {
        matches!(self, Self::Show { .. } | Self::Invite { .. } | Self::Unbridge { .. } | Self::Expose | Self::Status)
    }
}

fn join(alias: &str) -> Option<Command> {
    let (name, server) = alias.strip_prefix('#')?.split_once(':')?;
    let server = ServerName::parse(server).ok()?;
    (!name.is_empty()).then(|| Command::Join { name: name.to_owned(), server })
}

fn portal_id(word: &str) -> Option<String> {
    let digits = word.strip_prefix('p')?;
    (!digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())).then(|| word.to_owned())
}

/// An event's ID, alone or at the end of a link as clients share it.
fn event_id(word: &str) -> Option<OwnedEventId> {
    let link = word.split('?').next().unwrap_or(word);
    let last = link.rsplit('/').next().unwrap_or(link);
    let id = percent_encoding::percent_decode_str(last).decode_utf8().ok()?;
    crate::event::event_id(&id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_understood() {
        let user_id = UserId::parse("@a:b").unwrap();
        let tea = || Command::Join { name: "tea".to_owned(), server: "hub.example:8448".try_into().unwrap() };
        let explain = |id: &str| Command::Explain { event_id: id.try_into().unwrap() };
        for (body, expected) in [
            ("!list", Command::List),
            ("list", Command::List),
            ("List", Command::List),
            ("status", Command::Status),
            ("!expose", Command::Expose),
            ("  !invite  p7 @a:b ", Command::Invite { portal_id: "p7".to_owned(), user_id }),
            ("!join #tea:hub.example:8448", tea()),
            ("join #tea:hub.example:8448", tea()),
            ("show p12", Command::Show { portal_id: "p12".to_owned() }),
            ("unbridge p12", Command::Unbridge { portal_id: Some("p12".to_owned()) }),
            ("!unbridge", Command::Unbridge { portal_id: None }),
            ("explain $abc", explain("$abc")),
            ("explain https://matrix.to/#/!r:h/$abc?via=h", explain("$abc")),
            ("explain https://matrix.to/#/%21r%3Ah/%24abc?via=h&via=i", explain("$abc")),
            ("help me", Command::Help),
            ("hello", Command::Help),
            ("!", Command::Help),
            ("", Command::Help),
        ] {
            assert_eq!(Command::parse(body), expected, "{body}");
        }
        for (body, word) in [
            ("!invite p7 a", "invite"),
            ("!invite p7 @a:b now", "invite"),
            ("!invite 7 @a:b", "invite"),
            ("!join tea", "join"),
            ("!join #:x", "join"),
            ("show", "show"),
            ("show p", "show"),
            ("show p-1", "show"),
            ("unbridge p1 p2", "unbridge"),
            ("list all", "list"),
            ("explain this", "explain"),
            ("explain https://matrix.to/#/!r:h", "explain"),
            ("explain %24%ff", "explain"),
        ] {
            let Command::Misused(usage) = Command::parse(body) else { panic!("{body}: it is misused") };
            assert!(usage.starts_with(word), "{body}: {usage}");
        }
    }

    #[test]
    fn help_names_what_one_may_say() {
        let (all, mine) = (help(true), help(false));
        for word in WORDS {
            assert!(all.contains(word.usage), "{}", word.word);
            assert_eq!(mine.contains(word.usage), !word.for_admins, "{}", word.word);
            let said = Command::parse(
                &word.usage.replace("PORTAL", "p1").replace("@USER:SERVER", "@a:b").replace("#NAME:SERVER", "#a:b"),
            );
            assert_eq!(said.is_for_admins(), word.for_admins, "{}", word.word);
        }
    }
}
