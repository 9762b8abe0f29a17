//! For whose sake servers are asked for their keys: a header that names a server is enough to have it asked, so strangers fill no
//! more than a part of what is asked at once, and no address has more than a few asked.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ruma::{OwnedServerName, ServerName};

use crate::refusal::Refusal;

/// How many servers are asked at once with which nothing is shared.
const STRANGERS: usize = 128;
/// How many servers are asked at once because of one address. There are addresses from which many servers speak.
const OF_ONE_ADDRESS: usize = 32;

/// The servers that are being asked; clones share them.
#[derive(Clone)]
pub struct Askers {
    asked: Arc<Mutex<HashMap<OwnedServerName, Asked>>>,
    strangers: usize,
    of_one_address: usize,
}

impl Default for Askers {
    fn default() -> Self {
        Self::new(STRANGERS, OF_ONE_ADDRESS)
    }
}

struct Asked {
    /// Who had it asked first.
    address: Option<IpAddr>,
    is_stranger: bool,
    waiting: usize,
}

/// A request that waits for a server's keys.
#[must_use]
pub struct Asker {
    asked: Arc<Mutex<HashMap<OwnedServerName, Asked>>>,
    server: OwnedServerName,
}

impl Askers {
    /// So many servers at once with which nothing is shared, and so many because of one address.
    pub fn new(strangers: usize, of_one_address: usize) -> Self {
        Self { asked: Arc::default(), strangers, of_one_address }
    }

    /// Lets a request wait for the keys of `server`, or refuses it. Those who wait for the same server wait for one answer.
    pub fn enter(&self, server: &ServerName, address: Option<IpAddr>, is_stranger: bool) -> Result<Asker, Refusal> {
        let mut asked = lock(&self.asked);
        if let Some(already) = asked.get_mut(server) {
            already.waiting = already.waiting.saturating_add(1);
        } else {
            let strangers = asked.values().filter(|asked| asked.is_stranger).count();
            let of_one = asked.values().filter(|asked| address.is_some() && asked.address == address).count();
            if (is_stranger && strangers >= self.strangers) || of_one >= self.of_one_address {
                return Err(Refusal::Budget { what: "servers asked for their keys".to_owned(), retry_after_ms: 5_000 });
            }
            asked.insert(server.to_owned(), Asked { address, is_stranger, waiting: 1 });
        }
        Ok(Asker { asked: self.asked.clone(), server: server.to_owned() })
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        let mut asked = lock(&self.asked);
        match asked.get_mut(&self.server) {
            Some(entry) if entry.waiting > 1 => entry.waiting = entry.waiting.saturating_sub(1),
            _ => drop(asked.remove(&self.server)),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is inside is whole between any two statements.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(number: usize) -> OwnedServerName {
        ServerName::parse(format!("s{number}.example")).unwrap()
    }

    #[test]
    fn strangers_and_addresses_fill_no_more_than_their_part() {
        let askers = Askers::default();
        let strangers: Vec<_> = (0..STRANGERS).map(|n| askers.enter(&name(n), None, true).unwrap()).collect();
        assert_eq!(askers.enter(&name(999), None, true).err().unwrap().errcode(), "M_LIMIT_EXCEEDED");
        // Who waits for one that is being asked costs nothing.
        drop(askers.enter(&name(0), None, true).unwrap());
        drop(askers.enter(&name(999), None, false).unwrap());
        drop(strangers);
        assert!(lock(&askers.asked).is_empty());
        let address = Some([1, 2, 3, 4].into());
        let held: Vec<_> = (0..OF_ONE_ADDRESS).map(|n| askers.enter(&name(n), address, true).unwrap()).collect();
        assert!(askers.enter(&name(999), address, false).is_err());
        assert!(askers.enter(&name(999), Some([4, 3, 2, 1].into()), true).is_ok());
        drop(held);
        assert!(lock(&askers.asked).is_empty());
    }
}
