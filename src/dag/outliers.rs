//! How much a room keeps of what others give to authorize their events, the events themselves apart: it is stored before
//! anybody knows whether an event that needs it will ever be accepted. When there is no space for more, all goes on which the
//! room does not stand by then; whoever needs it later gives it again.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use ruma::{OwnedEventId, OwnedServerName, ServerName};

use super::Shared;
use super::pdu::Verified;
use super::room::Room;
use crate::refusal::Refusal;
use crate::store::outliers;

/// How many bytes of them a room keeps. The whole state of one with 100,000 members is about a tenth of that.
const ALL: usize = 1 << 30;
/// How many it takes from one server, until it is loaded again or what it does not need is gone.
const OF_SERVER: usize = 256 << 20;
/// How often a room looks for what it does not need, in milliseconds.
const PRUNE_EVERY: i64 = 600_000;
/// How many events go at once.
const PAGE: i64 = 1000;

/// What was taken in a room that is loaded.
#[derive(Debug, Default)]
pub struct Outliers {
    all: usize,
    of: HashMap<OwnedServerName, usize>,
    pruned_at: Option<i64>,
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
    /// Those of the events that are not here, if there is room for them. `keep` says what is about to be needed.
    pub(super) async fn new_outliers(
        self: &Arc<Self>,
        room: &Arc<Room>,
        origin: &ServerName,
        mut events: Vec<Verified>,
        keep: impl FnOnce() -> Vec<OwnedEventId>,
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
            none => none.insert(Outliers { all: self.bytes_of_outliers(room).await?, ..Outliers::default() }),
        };
        let bytes = events.iter().map(|event| event.pdu().raw.get().len()).sum();
        let Err(refusal) = outliers.take(origin, bytes) else { return Ok(events) };
        let now = self.context.clock.now_ms();
        if outliers.pruned_at.is_some_and(|at| now.saturating_sub(at) < PRUNE_EVERY) {
            return Err(refusal);
        }
        let mut keep = keep();
        keep.extend(events.iter().flat_map(|event| event.pdu().auth_events.iter().cloned()));
        let gone = self.prune_outliers(room, keep).await?;
        let all = self.bytes_of_outliers(room).await?;
        tracing::warn!(room = %room.room_id, %refusal, gone, left = all, "auth events that nothing needs are gone");
        *outliers = Outliers { all, of: HashMap::new(), pruned_at: Some(now) };
        outliers.take(origin, bytes)?;
        Ok(events)
    }

    async fn bytes_of_outliers(&self, room: &Room) -> Result<usize, Refusal> {
        let all = outliers::bytes(&self.context.store, &room.room_id).await?;
        Ok(usize::try_from(all).unwrap_or_default())
    }

    /// Removes what the room does not need, but for `keep` and what allows that. Says how many events that were.
    async fn prune_outliers(self: &Arc<Self>, room: &Arc<Room>, keep: Vec<OwnedEventId>) -> Result<usize, Refusal> {
        let roots = self.events.get_many(&keep).await?.into_values().collect();
        // What stays has all that allows it.
        let mut kept: HashSet<OwnedEventId> =
            self.events.auth_chain(roots, &HashMap::new()).await?.into_keys().collect();
        kept.extend(keep);
        let (mut before, mut gone) = (i64::MAX, 0_usize);
        loop {
            let page = outliers::unneeded(&self.context.store, &room.room_id, before, PAGE).await?;
            let Some((last, _)) = page.last() else { return Ok(gone) };
            before = *last;
            let page: Vec<_> = page.into_iter().map(|(_, id)| id).filter(|id| !kept.contains(id)).collect();
            gone = gone.saturating_add(page.len());
            // By the room's task, so that nothing that is accepted meanwhile comes to stand on it.
            let remove = self.run(room, move |batch| {
                Box::pin(async move {
                    batch.pruned.extend(page);
                    Ok(())
                })
            });
            remove.await?;
        }
    }
}

#[cfg(test)]
mod tests {
    use ruma::server_name;

    use super::*;
    use crate::dag::{Dag, NewRoom};
    use crate::event::RoomVersion;
    use crate::federation::{Context, KeysOf};
    use crate::seam::{Alone, Draft};

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

    #[tokio::test]
    async fn what_a_room_does_not_need_goes_when_there_is_no_space() {
        let directory = tempfile::tempdir().unwrap();
        let context = Context::of_test(&directory, "gateway.example", Arc::<KeysOf>::default()).await;
        let dag = Dag::new(context, Arc::new(Alone));
        let bot = ruma::owned_user_id!("@isthmus:gateway.example");
        let new = NewRoom { creator: bot.clone(), version: RoomVersion::V11, initial_state: Vec::new() };
        let room_id = dag.create_room(new).await.unwrap();
        let shared = &dag.shared;
        let room = shared.room(&room_id).await.unwrap();
        let building = shared.run(&room, move |batch| {
            Box::pin(async move {
                let mut built = Vec::new();
                for kind in ["m.needed", "m.kept", "m.idle", "m.new", "m.newer"] {
                    let (state_key, content, origin_server_ts) = (None, Default::default(), 1_704_067_200_000);
                    let kind = kind.to_owned();
                    built.push(
                        batch.build(&Draft { sender: bot.clone(), kind, state_key, content, origin_server_ts }).await?,
                    );
                }
                Ok(built)
            })
        });
        let built = building.await.unwrap();
        let ids: Vec<OwnedEventId> = built.iter().map(|event| event.pdu().event_id.clone()).collect();
        let [needed, kept, idle, new, newer] = built.try_into().ok().unwrap();
        let stands_on = ids[0].clone();
        let taking = shared.run(&room, move |batch| {
            Box::pin(async move {
                for event in [needed, kept, idle] {
                    batch.accept_outlier(event).await?.unwrap();
                }
                batch.need(vec![stands_on]).await?;
                Ok(())
            })
        });
        taking.await.unwrap();
        *room.outliers.lock().await = Some(Outliers { all: ALL, ..Outliers::default() });
        let origin = server_name!("other.example");
        let keep = || vec![ids[1].clone()];
        let taken = shared.new_outliers(&room, origin, vec![new], keep).await.unwrap();
        assert_eq!(taken[0].pdu().event_id, ids[3]);
        let left = shared.events.get_many(&ids).await.unwrap();
        assert_eq!(left.keys().collect::<HashSet<_>>(), ids[..2].iter().collect());
        assert!(room.outliers.lock().await.as_ref().unwrap().all < 10_000);
        // Who fills it at once again does not have the room look each time.
        room.outliers.lock().await.as_mut().unwrap().all = ALL;
        let refusal = shared.new_outliers(&room, origin, vec![newer], Vec::new).await.unwrap_err();
        assert_eq!(refusal.code(), "too_large");
        assert_eq!(shared.events.get_many(&ids).await.unwrap().len(), 2);
        dag.shared.context.store.close().await;
    }
}
