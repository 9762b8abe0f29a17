//! What waits to be carried over, within bounds, and who is typing.

use std::collections::{BTreeMap, HashMap};

use ruma::{OwnedRoomId, OwnedServerName, OwnedUserId, RoomId, ServerName, UserId};

use crate::admin::metrics;
use crate::event::{Edu, EduKey, Ignored, Typing};
use crate::identity::Side;

/// How many EDUs wait, and beside them how many of servers of which nothing has crossed of late: anybody can invent those.
const MAX_WAITING: usize = 20_000;
const MAX_STRANGERS: usize = 1_000;
/// Whoever is not said again to be typing within this time has stopped, in milliseconds. Synapse says it again after 40 s, and
/// takes as long as this for the end itself.
pub(super) const TYPING_MS: i64 = 60_000;
/// Typing that goes on is not said again before this.
const TYPING_AGAIN_MS: i64 = 20_000;

#[derive(Default)]
pub(super) struct Waiting {
    /// When what is due, in milliseconds, with a number that tells those of the same time apart.
    pub(super) order: BTreeMap<(i64, u64), (Side, EduKey)>,
    pub(super) jobs: HashMap<(Side, EduKey), Job>,
    pub(super) next: u64,
    /// Who is typing, by room on the side that they are at home on.
    pub(super) typing: HashMap<(Side, OwnedRoomId), HashMap<OwnedUserId, Typer>>,
    /// How many jobs there are for each server's users.
    pub(super) shares: [Shares; 2],
}

/// How many jobs there are for each server's users, and for all.
#[derive(Default)]
pub(super) struct Shares {
    pub(super) all: usize,
    pub(super) each: HashMap<OwnedServerName, usize>,
}

/// Whose EDU it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum From {
    /// Somebody's of whose server something crossed of late.
    Known,
    /// Somebody's of whom nothing is known yet.
    Stranger,
}

impl From {
    fn limit(self) -> usize {
        match self {
            Self::Known => MAX_WAITING,
            Self::Stranger => MAX_STRANGERS,
        }
    }
}

#[derive(Debug, Clone)]
pub(super) struct Job {
    /// Under which it stands in the order.
    pub(super) at: (i64, u64),
    pub(super) what: What,
    from: From,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum What {
    /// It is carried over; it was tried so often.
    Carry(Edu, usize),
    /// It is looked whether somebody still types.
    Look,
}

/// Somebody who is typing.
#[derive(Debug, Clone)]
pub(super) struct Typer {
    pub(super) ghost: OwnedUserId,
    /// When that was last said across.
    pub(super) said: i64,
    /// When it ends unless it is said again.
    pub(super) until: i64,
}

impl Waiting {
    /// Puts a job in the place of an older one of the same; false when there is no room. Where there is none, the server whose
    /// users have most of it makes some for others; strangers have a room of their own.
    pub(super) fn put(&mut self, key: (Side, EduKey), due: i64, what: What, from: From) -> bool {
        if self.remove(&key).is_none() && self.shares(from).all >= from.limit() && !self.make_room(server(&key), from) {
            return false;
        }
        let shares = self.shares(from);
        shares.all = shares.all.saturating_add(1);
        let share = shares.each.entry(server(&key).to_owned()).or_default();
        *share = share.saturating_add(1);
        let at = (due, self.next);
        self.next = self.next.wrapping_add(1);
        self.order.insert(at, key.clone());
        self.jobs.insert(key, Job { at, what, from });
        true
    }

    fn shares(&mut self, from: From) -> &mut Shares {
        let [known, strangers] = &mut self.shares;
        match from {
            From::Known => known,
            From::Stranger => strangers,
        }
    }

    pub(super) fn remove(&mut self, key: &(Side, EduKey)) -> Option<Job> {
        let job = self.jobs.remove(key)?;
        self.order.remove(&job.at);
        let shares = self.shares(job.from);
        shares.all = shares.all.saturating_sub(1);
        if let Some(share) = shares.each.get_mut(server(key)) {
            *share = share.saturating_sub(1);
            if *share == 0 {
                shares.each.remove(server(key));
            }
        }
        Some(job)
    }

    /// Drops the last EDU of the server whose users have most of the jobs, when that has more than `asker`.
    fn make_room(&mut self, asker: &ServerName, from: From) -> bool {
        let shares = &self.shares(from).each;
        let own = shares.get(asker).copied().unwrap_or(0);
        let Some((most, _)) = shares.iter().max_by_key(|(_, share)| **share).filter(|(_, share)| **share > own) else {
            return false;
        };
        let most = most.clone();
        let may_go = |key: &&(Side, EduKey)| {
            let is_carried = |job: &Job| job.what != What::Look && job.from == from;
            server(key) == most && self.jobs.get(*key).is_some_and(is_carried)
        };
        let Some(last) = self.order.values().rev().find(may_go).cloned() else { return false };
        if let Some(Job { what: What::Carry(edu, _), .. }) = self.remove(&last) {
            metrics::edu_received(edu.kind(), Ignored::Budget.code());
        }
        true
    }

    /// Takes what is due; else how long it is until something is.
    pub(super) fn take(&mut self, now: i64) -> Result<((Side, EduKey), What), Option<i64>> {
        let Some((&at, key)) = self.order.first_key_value() else { return Err(None) };
        // What is further off than anything can be was put off before the clock was set back.
        let left = at.0.saturating_sub(now);
        if left > 0 && left <= TYPING_MS {
            return Err(Some(left));
        }
        let key = key.clone();
        match self.remove(&key) {
            Some(job) => Ok((key, job.what)),
            None => {
                self.order.remove(&at);
                Err(Some(0))
            }
        }
    }

    /// Somebody types: whether that is to be said across. None when there is no room to look after it.
    pub(super) fn types(&mut self, side: Side, typing: &Typing, ghost: &UserId, now: i64) -> Option<bool> {
        let until = now.saturating_add(TYPING_MS);
        let key = (side, typing.key());
        // Something newer may have come meanwhile, like the end of it.
        if !self.jobs.contains_key(&key) && !self.put(key, until, What::Look, From::Known) {
            return None;
        }
        if let Some(typer) =
            self.typer(side, typing).filter(|typer| now.abs_diff(typer.said) < TYPING_AGAIN_MS.unsigned_abs())
        {
            typer.until = until;
            return Some(false);
        }
        let typer = Typer { ghost: ghost.to_owned(), said: now, until };
        let typers = self.typing.entry((side, typing.room_id.clone())).or_default();
        typers.insert(typing.user_id.clone(), typer);
        Some(true)
    }

    pub(super) fn typer(&mut self, side: Side, typing: &Typing) -> Option<&mut Typer> {
        self.typing.get_mut(&(side, typing.room_id.clone()))?.get_mut(&typing.user_id)
    }

    pub(super) fn forget_typer(&mut self, side: Side, room_id: &RoomId, user_id: &UserId) -> Option<Typer> {
        let key = (side, room_id.to_owned());
        let typers = self.typing.get_mut(&key)?;
        let typer = typers.remove(user_id);
        if typers.is_empty() {
            self.typing.remove(&key);
        }
        typer
    }
}

/// The server whose user it is about.
pub(super) fn server((_, key): &(Side, EduKey)) -> &ServerName {
    match key {
        EduKey::Typing(_, user) | EduKey::Receipt(_, user, _) | EduKey::Presence(user) => user.server_name(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typing(user: usize) -> (EduKey, Edu) {
        let user_id = format!("@u{user}:h.example").try_into().unwrap();
        let typing = Typing { room_id: "!r:h.example".try_into().unwrap(), user_id, typing: true };
        (typing.key(), Edu::Typing(typing))
    }

    #[test]
    fn what_is_newer_replaces_what_waits_and_what_is_due_comes_in_order() {
        let mut waiting = Waiting::default();
        let mut put = |user, due, tries| {
            let (key, edu) = typing(user);
            assert!(waiting.put((Side::Matrix, key), due, What::Carry(edu, tries), From::Known));
        };
        put(1, 10, 0);
        put(2, 5, 0);
        put(1, 7, 1);
        assert_eq!(waiting.take(4).unwrap_err(), Some(1));
        assert_eq!(waiting.take(8).unwrap().0.1, typing(2).0);
        assert_eq!(waiting.take(8).unwrap().1, What::Carry(typing(1).1, 1));
        assert_eq!(waiting.take(8).unwrap_err(), None);
        // A clock that was set back puts nothing off for longer than anything can be.
        let (key, edu) = typing(3);
        waiting.put((Side::Lm, key), 1_000_000, What::Carry(edu, 0), From::Known);
        assert!(waiting.take(0).is_ok());
    }

    #[test]
    fn the_end_of_typing_that_comes_while_the_beginning_is_carried_is_carried_too() {
        let mut waiting = Waiting::default();
        let (key, edu) = typing(1);
        let key = (Side::Matrix, key);
        let Edu::Typing(begins) = edu else { panic!() };
        let ends = What::Carry(Edu::Typing(Typing { typing: false, ..begins.clone() }), 0);
        waiting.put(key.clone(), 5, ends.clone(), From::Known);
        let ghost: OwnedUserId = "@ghost:g.example".try_into().unwrap();
        assert_eq!(waiting.types(Side::Matrix, &begins, &ghost, 5), Some(true));
        assert_eq!(waiting.take(5).unwrap(), (key.clone(), ends));
        assert_eq!(waiting.types(Side::Matrix, &begins, &ghost, 6), Some(false));
        assert_eq!(waiting.take(6 + TYPING_MS).unwrap(), (key, What::Look));
        // Who cannot be looked after does not begin.
        for user in 0..MAX_WAITING {
            waiting.put((Side::Lm, typing(user).0), 0, What::Look, From::Known);
        }
        assert_eq!(waiting.types(Side::Matrix, &begins, &ghost, 7), None);
    }

    #[test]
    fn hc_53_who_fills_the_line_leaves_room_for_others() {
        let mut waiting = Waiting::default();
        let line = |server: &str, user: usize| {
            let user_id = format!("@u{user}:{server}").try_into().unwrap();
            let room_id = "!r:h.example".try_into().unwrap();
            let typing = Typing { room_id, user_id, typing: true };
            ((Side::Lm, typing.key()), What::Carry(Edu::Typing(typing), 0))
        };
        for user in 0..MAX_WAITING {
            let (key, what) = line(&format!("flood{}.example", user % 4), user);
            assert!(waiting.put(key, 0, what, From::Known));
        }
        for user in 0..100 {
            let (key, what) = line("quiet.example", user);
            assert!(waiting.put(key, 0, what, From::Known), "{user}");
        }
        let (key, what) = line("flood0.example", MAX_WAITING);
        assert!(!waiting.put(key, 0, what, From::Known));
        assert_eq!((waiting.jobs.len(), waiting.order.len()), (MAX_WAITING, MAX_WAITING));
        let mut quiet = 0;
        while let Ok((key, _)) = waiting.take(0) {
            quiet += usize::from(server(&key) == "quiet.example");
        }
        assert_eq!((quiet, waiting.shares[0].each.len()), (100, 0));
    }

    #[test]
    fn hc_53_servers_that_somebody_invents_push_out_nobody_who_is_known() {
        let mut waiting = Waiting::default();
        let job = |server: &str| {
            let user_id = format!("@u:{server}").try_into().unwrap();
            let typing = Typing { room_id: "!r:h.example".try_into().unwrap(), user_id, typing: true };
            ((Side::Lm, typing.key()), What::Carry(Edu::Typing(typing), 0))
        };
        let mut put = |server: &str, from| {
            let (key, what) = job(server);
            waiting.put(key, 0, what, from)
        };
        for known in 0..MAX_WAITING {
            assert!(put(&format!("known{known}.example"), From::Known));
        }
        for made_up in 0..2 * MAX_STRANGERS {
            put(&format!("made-up{made_up}.example"), From::Stranger);
        }
        assert_eq!(waiting.jobs.len(), MAX_WAITING + MAX_STRANGERS);
        let mut known = 0;
        while let Ok((key, _)) = waiting.take(0) {
            known += usize::from(server(&key).as_str().starts_with("known"));
        }
        assert_eq!((known, waiting.shares[1].all), (MAX_WAITING, 0));
    }

    #[test]
    fn what_waits_is_bounded() {
        let mut waiting = Waiting::default();
        for user in 0..MAX_WAITING {
            assert!(waiting.put((Side::Lm, typing(user).0), 0, What::Look, From::Known));
        }
        assert!(!waiting.put((Side::Lm, typing(MAX_WAITING).0), 0, What::Look, From::Known));
        assert!(waiting.put((Side::Lm, typing(0).0), 0, What::Look, From::Known));
        assert_eq!((waiting.jobs.len(), waiting.order.len()), (MAX_WAITING, MAX_WAITING));
    }
}
