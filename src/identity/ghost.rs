//! Ghost names: how a user of one side is called on the other. `@mx_LOCALPART_SERVER:G` stands for a Matrix user on LM,
//! `@lm_LOCALPART_SERVER:G` for an LM user on Matrix.

use ruma::{OwnedServerName, OwnedUserId, UserId};

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
    pub fn of_user(&self, _home: Side, _user: &UserId) -> Option<(OwnedUserId, bool)> {
        let _ = &self.server_name;
        unimplemented!()
    }

    /// For whom the ghost `ghost`, met on the side `met_on`, stands.
    pub fn parse(&self, _met_on: Side, _ghost: &UserId) -> Ghost {
        unimplemented!()
    }
}
