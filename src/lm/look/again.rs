//! Sending again what a hub took and did not put into its log.

use std::sync::Arc;
use std::time::Duration;

use ruma::{OwnedEventId, RoomId, ServerName};

use super::{Certainty, ECHO_MS, QUIET, SETTLED, TAKEN, millis_of};
use crate::federation::{Feed, FeedKind, OutboundQueues};
use crate::lm::Lm;
use crate::lm::lpdus::is_for;
use crate::lm::rooms::RoomCell;
use crate::refusal::Refusal;
use crate::store::lm::{self as stored, TakenRow};

/// After how long what a hub took is lost though others' events come.
const LONG: Duration = Duration::from_secs(30 * 60);

impl Lm {
    /// Queues again what the hub took, and what is certain not to be in its log: before all that waits where nothing was sent. Where the
    /// hub does not tell its log's end, what it took last is lost when nothing came for a while, or for very long; it knows the same
    /// LPDU again if it is not. It goes in a transaction of its own: for the one it came in, a hub that remembers those would but
    /// repeat its answer.
    pub(super) async fn send_again(
        &self,
        cell: &Arc<RoomCell>,
        hub: &ServerName,
        certainty: Certainty,
        was_lost: bool,
    ) -> Result<(), Refusal> {
        let (store, room_id) = (&self.context().store, cell.room_id.clone());
        let now = self.context().clock.now_ms();
        let mut taken = stored::taken_lpdus(store, &room_id, TAKEN).await?;
        taken.retain(|row| {
            let looks = self.looks();
            let endless = matches!(certainty, Certainty::SilentSince(_));
            let waits = if was_lost { millis_of(looks.pace(SETTLED)) } else { looks.patience(row, endless) };
            let since = now.saturating_sub(row.taken_ts);
            let is_lost = row.passed
                || match certainty {
                    Certainty::Whole => true,
                    Certainty::SilentSince(heard) => {
                        now.saturating_sub(heard) >= millis_of(looks.pace(QUIET))
                            || since >= millis_of(looks.pace(LONG))
                    }
                    Certainty::Partial => false,
                };
            is_lost && since >= waits
        });
        let (superseded, taken): (Vec<TakenRow>, Vec<TakenRow>) = taken.into_iter().partition(|row| row.superseded);
        self.forget(&room_id, superseded.iter().map(|row| row.position).collect()).await?;
        self.were_superseded(cell, superseded.into_iter().map(|row| row.lpdu_id).collect());
        let most = i64::try_from(ECHO_MS.len()).unwrap_or(i64::MAX);
        let (given_up, again): (Vec<TakenRow>, Vec<TakenRow>) =
            taken.into_iter().partition(|row| !was_lost && row.resent.saturating_add(1) >= most);
        for row in &given_up {
            let why = "the hub took it again and again, and did not put it into its log";
            cell.settle(&row.lpdu_id, &Err(Refusal::Forbidden(format!("{hub}: {why}"))));
            self.between().lpdu_refused(&room_id, &row.lpdu_id, why).await?;
        }
        self.forget(&room_id, given_up.iter().map(|row| row.position).collect()).await?;
        let feed = Feed { kind: FeedKind::Lpdus, room_id: room_id.clone() };
        if !again.is_empty() {
            tracing::warn!(room = %room_id, %hub, events = again.len(), "the hub took events and lost them: they are sent again");
            let is_on_its_way = self.context().outbound.is_on_its_way(hub, &feed).await?;
            let (ids, feed, to_hub) = (store.clone(), feed.clone(), hub.to_owned());
            let job = store.write(move |tx| {
                Box::pin(async move {
                    let mut moved: Vec<i64> = again.iter().map(|row| row.position).collect();
                    if was_lost && !is_on_its_way {
                        moved.extend(stored::waiting_lpdus(tx, &feed.room_id).await?);
                    }
                    let mut last = None;
                    for from in moved {
                        let to = ids.next_id();
                        if stored::requeue_lpdu(tx, &feed.room_id, from, to).await? && last.is_none() {
                            OutboundQueues::subscribe(tx, &to_hub, &feed, to.saturating_sub(1)).await?;
                        }
                        last = Some(to);
                    }
                    match last {
                        Some(last) => OutboundQueues::advance(tx, &feed, last).await,
                        None => Ok(()),
                    }
                })
            });
            job.await?;
            let waiting = stored::lpdus_after(&self.context().store, &room_id, 0, TAKEN).await?;
            if waiting.iter().any(|row| !is_for(hub, &row.json)) {
                // A hub of before took it.
                cell.strand();
                self.replace_in_background(cell);
            }
        }
        Ok(())
    }

    /// What our users said of their memberships, and what is not in the log, is told to be lost: something newer is there instead.
    pub(in crate::lm) fn were_superseded(&self, cell: &Arc<RoomCell>, lpdu_ids: Vec<OwnedEventId>) {
        if lpdu_ids.is_empty() {
            return;
        }
        let (lm, cell) = (self.clone(), cell.clone());
        tokio::spawn(async move {
            for lpdu_id in lpdu_ids {
                let why = "the hub did not put it into its log, and has something newer of the same user there";
                cell.settle(&lpdu_id, &Err(Refusal::Forbidden(why.to_owned())));
                if let Err(refusal) = lm.between().lpdu_refused(&cell.room_id, &lpdu_id, why).await {
                    tracing::warn!(room = %cell.room_id, event = %lpdu_id, %refusal, "that it was lost was not told");
                }
            }
        });
    }

    pub(super) async fn forget(&self, room_id: &RoomId, positions: Vec<i64>) -> Result<(), Refusal> {
        if positions.is_empty() {
            return Ok(());
        }
        let room_id = room_id.to_owned();
        let job = self
            .context()
            .store
            .write(move |tx| Box::pin(async move { stored::forget_lpdus(tx, &room_id, &positions).await }));
        Ok(job.await?)
    }
}
