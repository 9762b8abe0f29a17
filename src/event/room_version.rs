//! Room versions as a table of values.

/// Which kind of room a version makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// A Matrix event graph.
    Graph,
    /// A Linearized Matrix log.
    Log,
}

/// A room version that isthmus knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RoomVersion {
    /// Matrix room version 6.
    V6,
    /// Matrix room version 7.
    V7,
    /// Matrix room version 8.
    V8,
    /// Matrix room version 9.
    V9,
    /// Matrix room version 10.
    V10,
    /// Matrix room version 11.
    V11,
    /// Matrix room version 12.
    V12,
    /// `org.matrix.i-d.ralston-mimi-linearized-matrix.02`, which the peers speak.
    Lm02,
    /// `I.1`, the draft's own name for the same rules.
    LmI1,
}

impl RoomVersion {
    /// Every version, in the order of this enum.
    pub const ALL: [Self; 9] =
        [Self::V6, Self::V7, Self::V8, Self::V9, Self::V10, Self::V11, Self::V12, Self::Lm02, Self::LmI1];

    /// The identifier as it stands in `m.room.create`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V6 => "6",
            Self::V7 => "7",
            Self::V8 => "8",
            Self::V9 => "9",
            Self::V10 => "10",
            Self::V11 => "11",
            Self::V12 => "12",
            Self::Lm02 => "org.matrix.i-d.ralston-mimi-linearized-matrix.02",
            Self::LmI1 => "I.1",
        }
    }

    /// The version with this identifier, if isthmus knows it.
    pub fn parse(identifier: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|version| version.as_str() == identifier)
    }

    /// Whether its rooms are graphs or logs.
    pub fn family(self) -> Family {
        match self {
            Self::Lm02 | Self::LmI1 => Family::Log,
            _ => Family::Graph,
        }
    }

    /// The versions of one family, oldest first.
    pub fn of(family: Family) -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(move |version| version.family() == family)
    }
}

impl std::fmt::Display for RoomVersion {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.as_str())
    }
}
