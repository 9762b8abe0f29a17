//! How much a room keeps of what others give to authorize their events, the events themselves apart: it is stored before
//! anybody knows whether an event that needs it will ever be accepted, and stays.

use std::collections::HashMap;

use ruma::{OwnedServerName, ServerName};

use super::Shared;
use super::pdu::Verified;
use super::room::Room;
use crate::refusal::Refusal;
use crate::store::dag;

/// How many bytes of them a room keeps. The whole state of one with 100,000 members is about a tenth of that.
const ALL: usize = 1 << 30;
/// How many it takes from one server, until it is loaded again.
const OF_SERVER: usize = 256 << 20;

/// What was taken in a room that is loaded.
#[derive(Debug, Default)]
pub struct Outliers {
    all: usize,
    of: HashMap<OwnedServerName, usize>,
}

impl Outliers {
    /// Counts what a server gives; says what is too much of it, and then counts nothing.
    fn take(&mut self, server: &ServerName, bytes: usize) -> Result<(), Refusal> {
        let own = self.of.get(server).copied().unwrap_or_default().saturating_add(bytes);
        let all = self.all.saturating_add(bytes);
        let too_large = |what, size, limit| Err(Refusal::TooLarge { what, size, limit });
        if own > OF_SERVER {
            return too_large("what a server gave to authorize events of the room", own, OF_SERVER);
        }
        if all > ALL {
            return too_large("what is kept to authorize events of the room", all, ALL);
        }
        self.all = all;
        self.of.insert(server.to_owned(), own);
        Ok(())
    }
}

impl Shared {
    /// Those of the events that are not here, if there is room for them.
    pub(super) async fn new_outliers(
        &self,
        room: &Room,
        origin: &ServerName,
        mut events: Vec<Verified>,
    ) -> Result<Vec<Verified>, Refusal> {
        let ids: Vec<_> = events.iter().map(|event| event.pdu().event_id.clone()).collect();
        let known = self.events.get_many(&ids).await?;
        events.retain(|event| !known.contains_key(&event.pdu().event_id));
        if events.is_empty() {
            return Ok(events);
        }
        let mut outliers = room.outliers.lock().await;
        let outliers = match &mut *outliers {
            Some(outliers) => outliers,
            none => {
                let all = dag::bytes_of_outliers(&self.context.store, &room.room_id).await?;
                none.insert(Outliers { all: usize::try_from(all).unwrap_or_default(), of: HashMap::new() })
            }
        };
        outliers.take(origin, events.iter().map(|event| event.pdu().raw.get().len()).sum())?;
        Ok(events)
    }
}

#[cfg(test)]
mod tests {
    use ruma::server_name;

    use super::*;

    #[test]
    fn what_a_room_keeps_is_bounded_for_one_server_and_for_all() {
        let mut outliers = Outliers::default();
        let a = server_name!("a.example");
        outliers.take(a, OF_SERVER).unwrap();
        assert_eq!(outliers.take(a, 1).unwrap_err().code(), "too_large");
        for server in ["b.example", "c.example", "d.example"] {
            outliers.take(&ServerName::parse(server).unwrap(), OF_SERVER).unwrap();
        }
        assert_eq!(outliers.all, ALL);
        let refusal = outliers.take(server_name!("e.example"), 1).unwrap_err().to_string();
        assert!(refusal.contains("is kept to authorize"), "{refusal}");
        assert_eq!(outliers.all, ALL, "nothing of it was counted");
    }
}
