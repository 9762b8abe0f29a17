//! Names as the strictest participant takes them. A hub puts no others into its log: whoever drops an event for its sender's name
//! lacks it before every later one. What a foreign hub has in its log is taken with any name.
//! Source: draft-ralston-mimi-linearized-matrix-04, sections "Users" (`int-user-id`) and "Server Names" (`int-server-names`).

use ruma::{ServerName, UserId};
use serde_json::Value;

use crate::event::Lpdu;
use crate::refusal::Refusal;

/// Refuses an LPDU that names users who cannot exist.
pub(super) fn check(lpdu: &Lpdu) -> Result<(), Refusal> {
    check_user("sender", lpdu.sender.as_str())?;
    match (lpdu.kind.as_str(), &lpdu.state_key) {
        ("m.room.member", Some(target)) => check_user("state_key of m.room.member", target),
        ("m.room.power_levels", Some(_)) => {
            let users = lpdu.json.get("content").and_then(|content| content.get("users"));
            let users = users.and_then(Value::as_object).into_iter().flatten();
            users.into_iter().try_for_each(|(user, _)| check_user("users of m.room.power_levels", user))
        }
        _ => Ok(()),
    }
}

/// Refuses users who cannot exist, or whom no log has.
pub(super) fn check_user(what: &str, user: &str) -> Result<(), Refusal> {
    let wrong = |problem: &str| {
        let shown: String = user.chars().take(60).collect();
        Refusal::malformed(what, format!("{shown:?}: {problem}"))
    };
    let parsed = <&UserId>::try_from(user).map_err(|error| wrong(&error.to_string()))?;
    let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'=' | b'_' | b'/' | b'+');
    if parsed.localpart().is_empty() || !parsed.localpart().bytes().all(allowed) {
        return Err(wrong("the name of a user is made of a-z, 0-9 and -.=_/+"));
    }
    check_server(parsed.server_name()).map_err(wrong)
}

fn check_server(server: &ServerName) -> Result<(), &'static str> {
    if server.is_ip_literal() {
        return Err("the name of a server is no address");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hc_43_only_users_that_every_participant_takes_are_let_into_a_log() {
        for good in ["@a:b.example", "@a-z.0=9_/+:b.example:8448", "@a:B.example", "@x:localhost"] {
            assert_eq!(check_user("sender", good), Ok(()), "{good}");
        }
        for bad in [
            "@:b.example",
            "@Alice:b.example",
            "@a b:b.example",
            "@\u{e9}:b.example",
            "@a:1.2.3.4",
            "@a:1.2.3.4:8448",
            "@a:[::1]",
            "a:b.example",
            "@a",
        ] {
            assert_eq!(check_user("sender", bad).unwrap_err().errcode(), "M_BAD_JSON", "{bad}");
        }
    }
}
