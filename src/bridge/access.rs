//! The policy of `[access]`: with which servers portals are made and whose users take part.

use ruma::{ServerName, UserId};

use super::portal::Cause;
use crate::config::{Access, CreateByAlias};
use crate::identity::Side;
use crate::refusal::Refusal;

/// Whether users of `server`, which is at home on `side`, may take part; also when another server, a hub, has let them in.
pub(super) fn takes_part(access: &Access, side: Side, server: &ServerName) -> Result<(), Refusal> {
    let (patterns, key) = match side {
        Side::Matrix => (&access.matrix_servers, "matrix_servers"),
        Side::Lm => (&access.hubs, "hubs"),
    };
    if patterns.iter().any(|pattern| matches(pattern, server.as_str())) {
        return Ok(());
    }
    Err(Refusal::Policy(format!("{server} is not among the {key} {patterns:?}")))
}

/// Whether somebody may have a portal made.
pub(super) fn may_create(access: &Access, cause: &Cause) -> Result<(), Refusal> {
    let allowed = match cause {
        Cause::Invite(user) => return may_invite(access, user, "create_by_invite", &access.create_by_invite),
        Cause::MatrixInvite(user) => {
            return may_invite(access, user, "create_by_matrix_invite", &access.create_by_matrix_invite);
        }
        Cause::GhostInvite(user) => {
            return may_invite(access, user, "create_by_ghost_invite", &access.create_by_ghost_invite);
        }
        Cause::Admin => true,
        Cause::Appservice => access.create_by_alias != CreateByAlias::Off,
        Cause::Server(_) => access.create_by_alias == CreateByAlias::Anyone,
    };
    if allowed {
        return Ok(());
    }
    Err(Refusal::Policy(format!("create_by_alias is {:?}, the asker is {cause:?}", access.create_by_alias)))
}

/// Whether a user makes a portal by inviting the bot: an admin, or one of those whom a key names.
fn may_invite(access: &Access, user: &UserId, key: &str, named: &[String]) -> Result<(), Refusal> {
    let allowed = |pattern: &String| match pattern.starts_with('@') {
        // Localparts that differ in case are different users.
        true => matches_exactly(pattern, user.as_str()),
        false => matches(pattern, user.server_name().as_str()),
    };
    if access.admins.iter().any(|admin| *admin == *user) || named.iter().any(allowed) {
        return Ok(());
    }
    Err(Refusal::Policy(format!("{user} is not among those of {key}, {named:?}")))
}

/// Whether `text` matches a pattern in which `*` is any run of characters and `?` any one, without regard to case.
pub(super) fn matches(pattern: &str, text: &str) -> bool {
    matches_exactly(&pattern.to_ascii_lowercase(), &text.to_ascii_lowercase())
}

/// The same with regard to case. The work is bounded by the product of both lengths.
fn matches_exactly(pattern: &str, text: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let text: Vec<char> = text.chars().collect();
    let (mut at, mut read) = (0_usize, 0_usize);
    // Where the last star stands, and up to where it has eaten so far.
    let mut star: Option<(usize, usize)> = None;
    while let Some(&character) = text.get(read) {
        match pattern.get(at) {
            Some('*') => {
                star = Some((at, read));
                at += 1;
            }
            Some(&wanted) if wanted == '?' || wanted == character => {
                at += 1;
                read += 1;
            }
            _ => match star.as_mut() {
                Some((star_at, eaten)) => {
                    *eaten += 1;
                    (at, read) = (*star_at + 1, *eaten);
                }
                None => return false,
            },
        }
    }
    pattern.iter().skip(at).all(|&character| character == '*')
}

#[cfg(test)]
mod tests {
    use ruma::server_name;

    use super::*;

    #[test]
    fn patterns() {
        for (pattern, text, expected) in [
            ("*", "anything:1", true),
            ("*", "", true),
            ("a.example", "A.example", true),
            ("a.example", "b.example", false),
            ("*.example", "a.b.example", true),
            ("*.example", "example", false),
            ("?.example", "a.example", true),
            ("?.example", "aa.example", false),
            ("a*b*c", "axxbyybzc", true),
            ("a*b*c", "axxbyybz", false),
            ("a*", "a", true),
            ("", "a", false),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn who_may_take_part_and_who_may_cause_a_portal() {
        let mut access = Access { hubs: vec!["*.hub".to_owned()], ..Access::default() };
        assert!(takes_part(&access, Side::Lm, server_name!("a.hub")).is_ok());
        assert_eq!(takes_part(&access, Side::Lm, server_name!("b.example")).unwrap_err().code(), "policy");
        assert!(takes_part(&access, Side::Matrix, server_name!("b.example")).is_ok());

        let server = Cause::Server(server_name!("b.example").to_owned());
        for (setting, appservice, anyone) in [
            (CreateByAlias::Appservice, true, false),
            (CreateByAlias::Anyone, true, true),
            (CreateByAlias::Off, false, false),
        ] {
            access.create_by_alias = setting;
            assert_eq!(may_create(&access, &Cause::Appservice).is_ok(), appservice);
            assert_eq!(may_create(&access, &server).is_ok(), anyone);
            assert!(may_create(&access, &Cause::Admin).is_ok());
        }
    }

    #[test]
    fn who_makes_a_portal_by_inviting_the_bot() {
        let user = |id: &str| Cause::Invite(UserId::parse(id).unwrap());
        let mut access = Access::default();
        assert_eq!(may_create(&access, &user("@bob:hub.example")).unwrap_err().code(), "policy");
        access.admins.push(UserId::parse("@root:lm.example").unwrap());
        access.create_by_invite = ["HUB.example", "@*:other.example", "@Carol:third.example"].map(str::to_owned).into();
        for (id, expected) in [
            ("@bob:hub.example", true),
            ("@bob:other.example", true),
            ("@Carol:third.example", true),
            ("@carol:third.example", false),
            ("@dave:third.example", false),
            ("@root:lm.example", true),
            ("@hub.example:evil.example", false),
            ("@a:hub.example.evil", false),
        ] {
            assert_eq!(may_create(&access, &user(id)).is_ok(), expected, "{id}");
        }
        // Who may it from LM may not therefore from Matrix.
        let from_matrix = |id: &str| Cause::MatrixInvite(UserId::parse(id).unwrap());
        assert!(may_create(&access, &from_matrix("@root:lm.example")).is_ok());
        let refusal = may_create(&access, &from_matrix("@bob:hub.example")).unwrap_err();
        assert!(refusal.to_string().contains("create_by_matrix_invite"), "{refusal}");
        access.create_by_matrix_invite.push("hub.example".to_owned());
        assert!(may_create(&access, &from_matrix("@bob:hub.example")).is_ok());
    }
}
