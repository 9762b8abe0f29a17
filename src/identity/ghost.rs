//! Ghost names: how a user of one side is called on the other. `@mx_LOCALPART_SERVER:G` stands for a Matrix user on LM,
//! `@lm_LOCALPART_SERVER:G` for an LM user on Matrix.

use data_encoding::BASE32_NOPAD;
use ruma::{OwnedServerName, OwnedUserId, UserId};
use sha2::{Digest as _, Sha256};

/// How long a user ID may be, in bytes.
const MAX_USER_ID: usize = 255;
/// What stands for the localpart in a name that had to be hashed; no localpart is encoded like this.
const HASHED: &str = "=";

/// One of the two sides of the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Side {
    /// Full Matrix: rooms are graphs.
    Matrix,
    /// Linearized Matrix: rooms are logs.
    Lm,
}

impl Side {
    /// The side across.
    pub fn other(self) -> Self {
        match self {
            Self::Matrix => Self::Lm,
            Self::Lm => Self::Matrix,
        }
    }

    /// `matrix` or `lm`: in the store, in logs and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Matrix => "matrix",
            Self::Lm => "lm",
        }
    }

    /// What the ghosts of this side's users begin with.
    fn prefix(self) -> &'static str {
        match self {
            Self::Matrix => "mx",
            Self::Lm => "lm",
        }
    }
}

/// The mapping of user IDs to ghost names and back, for one gateway. Pure, but for names that are too long: those are
/// hashed, and [`GhostNames::of_user`] says so, for the mapping to be stored before its first use.
#[derive(Debug, Clone)]
pub struct GhostNames {
    server_name: OwnedServerName,
}

/// What a user of the gateway's own name is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ghost {
    /// It stands for this user of the side across.
    Of(OwnedUserId),
    /// It stands for a user whose name was too long; the store knows for whom.
    Hashed,
    /// It is no ghost of that side.
    No,
}

impl GhostNames {
    /// The names at the gateway `server_name`.
    pub fn new(server_name: OwnedServerName) -> Self {
        Self { server_name }
    }

    /// The ghost that stands on the side across for `user`, who is at home on `home`; and whether its name had to be
    /// hashed. None for users of the gateway itself: a ghost is never made of a ghost or of a bot.
    pub fn of_user(&self, home: Side, user: &UserId) -> Option<(OwnedUserId, bool)> {
        if user.server_name() == self.server_name {
            return None;
        }
        let mut name = format!("@{}_", home.prefix());
        encode(user.localpart(), in_localpart, &mut name);
        name.push('_');
        encode(user.server_name().as_str(), in_server, &mut name);
        name.push(':');
        name.push_str(self.server_name.as_str());
        if name.len() <= MAX_USER_ID {
            return Some((name.try_into().ok()?, false));
        }
        let hash = BASE32_NOPAD.encode(&Sha256::digest(user.as_str())).to_ascii_lowercase();
        let name = format!("@{}_{HASHED}_{hash}:{}", home.prefix(), self.server_name);
        Some((name.try_into().ok()?, true))
    }

    /// For whom the ghost `ghost`, met on the side `met_on`, stands.
    pub fn parse(&self, met_on: Side, ghost: &UserId) -> Ghost {
        if ghost.server_name() != self.server_name {
            return Ghost::No;
        }
        let home = met_on.other();
        let Some(name) = ghost.localpart().strip_prefix(home.prefix()).and_then(|rest| rest.strip_prefix('_')) else {
            return Ghost::No;
        };
        // Server names hold no underscore, so the last one parts the two.
        let Some((localpart, server)) = name.rsplit_once('_') else { return Ghost::No };
        if localpart == HASHED {
            return Ghost::Hashed;
        }
        let (Some(localpart), Some(server)) = (decode(localpart), decode(server)) else { return Ghost::No };
        let Ok(user) = OwnedUserId::try_from(format!("@{localpart}:{server}")) else { return Ghost::No };
        // A user has exactly one ghost: other spellings of the same name are nobody.
        match self.of_user(home, &user) {
            Some((name, false)) if name == *ghost => Ghost::Of(user),
            _ => Ghost::No,
        }
    }
}

fn in_localpart(byte: u8) -> bool {
    matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-' | b'/' | b'+')
}

fn in_server(byte: u8) -> bool {
    matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-')
}

fn encode(text: &str, kept: fn(u8) -> bool, out: &mut String) {
    for byte in text.bytes() {
        if kept(byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("={byte:02x}"));
        }
    }
}

fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'=' => {
                let high = char::from(rest.next()?).to_digit(16)?;
                let low = char::from(rest.next()?).to_digit(16)?;
                u8::try_from(high * 16 + low).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use ruma::{server_name, user_id};

    use super::*;

    fn names() -> GhostNames {
        GhostNames::new(server_name!("lm.example.org:8448").to_owned())
    }

    #[test]
    fn ghosts_are_named_as_the_design_says() {
        for (home, user, ghost) in [
            (Side::Matrix, "@alice:hs.example", "@mx_alice_hs.example:lm.example.org:8448"),
            (Side::Lm, "@bob:hub.example", "@lm_bob_hub.example:lm.example.org:8448"),
            (Side::Lm, "@A=b_c:hub.example:3000", "@lm_=41=3db_c_hub.example=3a3000:lm.example.org:8448"),
            (Side::Matrix, "@x:[::1]:80", "@mx_x_=5b=3a=3a1=5d=3a80:lm.example.org:8448"),
        ] {
            let user = UserId::parse(user).unwrap();
            let (name, hashed) = names().of_user(home, &user).unwrap();
            assert_eq!((name.as_str(), hashed), (ghost, false));
            assert_eq!(names().parse(home.other(), &name), Ghost::Of(user));
            // On the user's own side the ghost is nobody.
            assert_eq!(names().parse(home, &name), Ghost::No);
        }
    }

    #[test]
    fn no_ghost_is_made_of_the_gateways_own_users() {
        for user in [user_id!("@isthmus:lm.example.org:8448"), user_id!("@lm_bob_hub.example:lm.example.org:8448")] {
            assert_eq!(names().of_user(Side::Matrix, user), None);
            assert_eq!(names().of_user(Side::Lm, user), None);
        }
    }

    #[test]
    fn other_spellings_of_a_ghost_are_nobody() {
        for name in [
            "@lm_=61lice_hub.example:lm.example.org:8448",
            "@lm_=4A_hub.example:lm.example.org:8448",
            "@lm_a_hub=2eexample:lm.example.org:8448",
            "@lm_a=_hub.example:lm.example.org:8448",
            "@lm_a:lm.example.org:8448",
            "@lm_:lm.example.org:8448",
            "@lm_a_lm.example.org=3a8448:lm.example.org:8448",
            "@lm_a_hub.example:elsewhere.example",
            "@isthmus:lm.example.org:8448",
        ] {
            assert_eq!(names().parse(Side::Matrix, &UserId::parse(name).unwrap()), Ghost::No, "{name}");
        }
    }

    #[test]
    fn a_name_that_would_be_too_long_is_hashed() {
        let user = UserId::parse(format!("@{}:hub.example", "A".repeat(200))).unwrap();
        let (name, hashed) = names().of_user(Side::Lm, &user).unwrap();
        assert!(hashed && name.as_str().len() <= MAX_USER_ID && name.localpart().starts_with("lm_=_"), "{name}");
        assert_eq!(names().parse(Side::Matrix, &name), Ghost::Hashed);
        assert_eq!(names().of_user(Side::Lm, &user).unwrap().0, name);
    }

    proptest! {
        #[test]
        fn every_legal_name_comes_back(
            localpart in "([!-9;-~]{1,60}|[^:\u{0}]{0,60})",
            server in "([a-zA-Z0-9][a-zA-Z0-9.-]{0,20}|\\[[0-9a-f:]{2,20}\\]|[0-9]{1,3}\\.[0-9]{1,3}\\.1\\.2)(:[0-9]{1,5})?",
            matrix in any::<bool>(),
        ) {
            let Ok(user) = UserId::parse(format!("@{localpart}:{server}")) else { return Ok(()) };
            let home = if matrix { Side::Matrix } else { Side::Lm };
            let (ghost, hashed) = names().of_user(home, &user).unwrap();
            prop_assert!(ghost.as_str().len() <= MAX_USER_ID);
            let expected = if hashed { Ghost::Hashed } else { Ghost::Of(user) };
            prop_assert_eq!(names().parse(home.other(), &ghost), expected);
        }

        #[test]
        fn no_two_ghosts_stand_for_one_user(localpart in "(lm|mx)_[a-z0-9=._-]{0,20}_[a-z0-9=.-]{1,12}") {
            let Ok(ghost) = UserId::parse(format!("@{localpart}:lm.example.org:8448")) else { return Ok(()) };
            for met_on in [Side::Matrix, Side::Lm] {
                if let Ghost::Of(user) = names().parse(met_on, &ghost) {
                    prop_assert_eq!(&names().of_user(met_on.other(), &user).unwrap().0, &ghost);
                }
            }
        }
    }
}
