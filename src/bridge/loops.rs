//! A second gateway that connects the same two rooms: each would carry the other's images back, without end. It is known by
//! its bot, `@isthmus:SERVER`, being in both rooms; then nothing of that bot's and of that gateway's ghosts crosses here.
//! Everybody else's events do, also those of other users of its server: anybody can be called like a bot and join two public
//! rooms, which must not stop what others say.

use ruma::{OwnedUserId, UserId};

use super::side::{Key, MEMBER, State};
use super::users::BOT;
use crate::refusal::Refusal;

/// What the names of ghosts begin with, on either side.
const GHOSTS: [&str; 2] = ["mx_", "lm_"];

/// The bot of the gateway that `user` belongs to by its name.
pub(super) fn bot_of(user: &UserId) -> Option<OwnedUserId> {
    let localpart = user.localpart();
    let named = localpart == BOT || GHOSTS.iter().any(|prefix| localpart.starts_with(prefix));
    named.then(|| UserId::parse(format!("@{BOT}:{}", user.server_name())).ok()).flatten()
}

/// What of both rooms' states tells whether `user` is part of a loop.
pub(super) fn key(user: &UserId) -> Option<Key> {
    Some((MEMBER.to_owned(), bot_of(user)?.to_string()))
}

/// Whether what `user`, who is no user of this gateway, does is not carried back by another one.
pub(super) fn crosses(near: &State, far: &State, user: &UserId) -> Result<(), Refusal> {
    match bot_of(user).filter(|bot| [near, far].iter().all(|state| state.membership(bot) == "join")) {
        Some(bot) => Err(Refusal::Loop(bot.server_name().to_string())),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::power::tests::state;
    use super::*;

    #[test]
    fn a_gateway_in_both_rooms_is_a_loop_for_its_own_and_for_nobody_else() {
        let with =
            |membership: &str| state(&[(MEMBER, "@isthmus:two", "@isthmus:two", json!({ "membership": membership }))]);
        for (near, far, user, expected) in [
            ("join", "join", "@mx_alice_h:two", false),
            ("join", "join", "@lm_bob_l:two", false),
            ("join", "join", "@isthmus:two", false),
            ("join", "join", "@carol:two", true),
            ("join", "join", "@mx_alice_h:three", true),
            ("join", "leave", "@mx_alice_h:two", true),
            ("invite", "join", "@isthmus:two", true),
        ] {
            let user = UserId::parse(user).unwrap();
            assert_eq!(crosses(&with(near), &with(far), &user).is_ok(), expected, "{near} {far} {user}");
        }
        assert_eq!(crosses(&with("join"), &with("join"), ruma::user_id!("@isthmus:two")).unwrap_err().code(), "loop");
    }
}
