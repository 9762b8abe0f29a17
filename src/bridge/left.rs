//! Whose rows of the inbox are left in the store for now. Rows that wait while others pass are held in memory, but only so
//! many of one sender and of one server: what comes after those is passed over when it is read, and read again from there
//! when some of them are gone. So nobody fills the memory, and nobody's rows keep those of others from being read. Pure.

use std::collections::{BTreeMap, HashMap};

use ruma::{OwnedServerName, OwnedUserId, UserId};

/// How many waiting rows of one sender, and of one server, are held in memory.
pub(super) const OF_A_SENDER: usize = 50;
const OF_A_SERVER: usize = 1_000;
/// With more in all, nothing more is read of those of whom something waits.
const IN_ALL: usize = 5_000;

/// Those of whom so much waits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Whose {
    Sender(OwnedUserId),
    Server(OwnedServerName),
}

impl Whose {
    fn of(sender: &UserId) -> [Self; 2] {
        [Self::Sender(sender.to_owned()), Self::Server(sender.server_name().to_owned())]
    }
}

/// Those whose rows are read again.
#[derive(Debug, Clone)]
pub(super) struct Again {
    pub(super) whose: Whose,
    /// After which row.
    pub(super) after: i64,
}

/// Whose rows are left in the store, and from where on.
#[derive(Debug, Default)]
pub(super) struct Left {
    /// After which row theirs were passed over.
    after: BTreeMap<Whose, i64>,
    /// How much of theirs waits in memory.
    waits: HashMap<Whose, usize>,
    in_all: usize,
}

impl Left {
    /// Rows of these senders wait in memory while others pass them.
    pub(super) fn count<'a>(&mut self, senders: impl IntoIterator<Item = &'a UserId>) {
        self.waits.clear();
        self.in_all = 0;
        for sender in senders {
            self.in_all = self.in_all.saturating_add(1);
            for whose in Whose::of(sender) {
                let waits = self.waits.entry(whose).or_default();
                *waits = waits.saturating_add(1);
            }
        }
    }

    /// Whether nothing was passed over.
    pub(super) fn is_empty(&self) -> bool {
        self.after.is_empty()
    }

    /// Somebody whose rows may be read again.
    pub(super) fn due(&self) -> Option<Again> {
        // When half of them are gone, so that it is worth it.
        let due = self.after.iter().find(|(whose, _)| self.waits(whose) <= self.limit(whose) / 2);
        due.map(|(whose, after)| Again { whose: whose.clone(), after: *after })
    }

    /// Whether a row is read now; if not, it is passed over. `again` are those whose rows are being read again.
    pub(super) fn takes(&mut self, seq: i64, sender: &UserId, again: Option<&Again>) -> bool {
        let both = Whose::of(sender);
        let is_again = |whose: &Whose| again.is_some_and(|again| again.whose == *whose);
        if again.is_some_and(|again| !both.contains(&again.whose) || !self.goes_on(again)) {
            return false;
        }
        let left = |whose: &Whose| !is_again(whose) && self.after.get(whose).is_some_and(|after| *after < seq);
        if both.iter().any(left) {
            return false;
        }
        let full = both.iter().find(|whose| self.waits(whose) >= self.limit(whose));
        if let Some(full) = full.cloned() {
            self.after.insert(full, seq.saturating_sub(1));
            return false;
        }
        for whose in both {
            // Of whom nothing waits, as much is read as there is room for: it will go.
            if is_again(&whose) || self.waits.contains_key(&whose) {
                let waits = self.waits.entry(whose).or_default();
                *waits = waits.saturating_add(1);
            }
        }
        true
    }

    /// Rows were read again, up to this one or, when there is none, to the end.
    pub(super) fn was_read(&mut self, again: &Again, up_to: Option<i64>) {
        if self.goes_on(again) {
            match up_to {
                Some(seq) => self.after.insert(again.whose.clone(), seq),
                None => self.after.remove(&again.whose),
            };
        }
    }

    /// Whether nothing of theirs was passed over since it was begun to read them again.
    fn goes_on(&self, again: &Again) -> bool {
        self.after.get(&again.whose) == Some(&again.after)
    }

    fn waits(&self, whose: &Whose) -> usize {
        self.waits.get(whose).copied().unwrap_or(0)
    }

    fn limit(&self, whose: &Whose) -> usize {
        match whose {
            _ if self.in_all >= IN_ALL => 1,
            Whose::Sender(_) => OF_A_SENDER,
            Whose::Server(_) => OF_A_SERVER,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The store's rows, and what is in memory of them, read as the inbox does.
    struct Reading {
        rows: BTreeMap<i64, OwnedUserId>,
        memory: BTreeMap<i64, OwnedUserId>,
        cursor: i64,
        left: Left,
    }

    const CHUNK: usize = 100;

    impl Reading {
        fn new(senders: impl IntoIterator<Item = String>) -> Self {
            let rows = (1..).zip(senders.into_iter().map(|sender| sender.try_into().unwrap())).collect();
            Self { rows, memory: BTreeMap::new(), cursor: 0, left: Left::default() }
        }

        fn read(&mut self) {
            let again = self.left.due();
            let after = again.as_ref().map_or(self.cursor, |again| again.after);
            let chunk: Vec<_> = self.rows.range(after + 1..).take(CHUNK).map(|(seq, by)| (*seq, by.clone())).collect();
            for (seq, by) in &chunk {
                let known = again.is_some() && (self.memory.contains_key(seq) || *seq > self.cursor);
                if !known && self.left.takes(*seq, by, again.as_ref()) {
                    self.memory.insert(*seq, by.clone());
                }
            }
            let last = chunk.last().map(|(seq, _)| *seq);
            match again {
                Some(again) => self.left.was_read(&again, last.filter(|last| *last < self.cursor)),
                None => self.cursor = last.unwrap_or(self.cursor),
            }
        }

        /// What goes goes, except that of `stuck`; these are returned.
        fn go(&mut self, stuck: impl Fn(&UserId) -> bool) -> Vec<i64> {
            let gone: Vec<i64> = self.memory.iter().filter(|(_, by)| !stuck(by)).map(|(seq, _)| *seq).collect();
            for seq in &gone {
                self.memory.remove(seq);
                self.rows.remove(seq);
            }
            self.left.count(self.memory.values().map(|user| &**user));
            gone
        }
    }

    #[test]
    fn who_is_stuck_keeps_nobody_from_being_read_and_loses_nothing() {
        // Two who are stuck say much, and so do many of one server; among them others say something now and then.
        let sender = |index: usize| match index % 10 {
            0..4 => "@stuck:a".to_owned(),
            4 => "@too:a".to_owned(),
            5..9 => format!("@u{}:b", index % 97),
            _ => format!("@well:{}", if index % 20 == 9 { "a" } else { "c" }),
        };
        let mut reading = Reading::new((0..20_000).map(sender));
        let is_stuck = |user: &UserId| matches!(user.localpart(), "stuck" | "too") || user.server_name() == "b";
        let mut went = Vec::new();
        for _ in 0..300 {
            reading.read();
            went.extend(reading.go(is_stuck));
            assert!(reading.memory.len() <= 2 * OF_A_SENDER + OF_A_SERVER + 5 * CHUNK, "{}", reading.memory.len());
        }
        assert_eq!(went.len(), 2_000, "all of those who are well");
        // One of them is well again, then all are: what was passed over comes, once and in order.
        let still = |user: &UserId| is_stuck(user) && user.localpart() != "stuck";
        for _ in 0..1_000 {
            reading.read();
            went.extend(reading.go(still));
        }
        assert_eq!(went.len(), 10_000);
        for _ in 0..2_000 {
            reading.read();
            went.extend(reading.go(|_| false));
        }
        assert!(reading.rows.is_empty() && reading.left.is_empty());
        let mut last: HashMap<String, i64> = HashMap::new();
        for seq in went {
            let by = sender(usize::try_from(seq).unwrap() - 1);
            assert!(last.insert(by.clone(), seq).is_none_or(|before| before < seq), "{by} in order");
        }
    }

    #[test]
    fn when_too_much_waits_in_all_nothing_more_is_read_of_those_of_whom_something_waits() {
        let mut left = Left::default();
        let users: Vec<OwnedUserId> = (0..IN_ALL).map(|n| format!("@u:s{n}").try_into().unwrap()).collect();
        left.count(users.iter().map(|user| &**user));
        assert!(!left.takes(1, &users[0], None) && !left.takes(2, &users[0], None));
        assert!(left.takes(3, ruma::user_id!("@u:else"), None));
        assert!(left.due().is_none());
        left.count([]);
        assert_eq!(left.due().unwrap().after, 0);
    }
}
