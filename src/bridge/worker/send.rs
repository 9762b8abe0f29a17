//! Doing what was decided: images are sent together with what is written with them, in batches where nothing must come
//! first.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures::FutureExt as _;
use ruma::OwnedEventId;

use super::{Done, ECHO_PATIENCE_MS, Worker};
use crate::bridge::carry::{Before, Crossing, Outcome};
use crate::bridge::effect;
use crate::bridge::inbox::Item;
use crate::bridge::portal::{Portal, PortalState};
use crate::bridge::side::Made;
use crate::identity::Side;
use crate::refusal::Refusal;
use crate::seam::{Draft, Outgoing};
use crate::store::images;

impl Worker {
    /// Sends a batch of images; false when one of them failed.
    pub(super) async fn flush(&mut self, portal: &Arc<Portal>, batch: Vec<(i64, Crossing)>) -> Result<bool, Refusal> {
        if batch.is_empty() {
            return Ok(true);
        }
        let (mut drafts, mut seqs, mut items) = (Vec::new(), Vec::new(), Vec::new());
        for (seq, crossing) in batch {
            let Some(item) = self.inbox.get(seq) else { continue };
            drafts.push(crossing.image);
            seqs.push(seq);
            items.push((item, crossing.note));
        }
        let effects = effect::crossed_all(&self.core, portal, self.source, items);
        let outgoing =
            drafts.into_iter().zip(effects).map(|(draft, effect)| Outgoing { draft, effect: Some(effect) }).collect();
        let far = self.source.other();
        let results = self.core.sides()?.rooms(far).send(portal.room(far), outgoing).await;
        let mut all = true;
        for (seq, result) in seqs.into_iter().zip(results) {
            match result {
                Ok(_) => {
                    self.finish(portal, seq, Done::Crossed).await?;
                }
                // What comes after a failure that may pass failed with it, and is tried again right after it.
                Err(refusal) if refusal.is_transient() && !all => {}
                Err(refusal) => {
                    all = false;
                    let done = if refusal.is_transient() { Done::Later(refusal) } else { Done::Refused(refusal) };
                    self.finish(portal, seq, done).await?;
                }
            }
        }
        Ok(all)
    }

    /// Does with one event what is to be done with it.
    pub(super) async fn single(&mut self, portal: &Arc<Portal>, seq: i64, outcome: Outcome) -> Result<Done, Refusal> {
        let Some(item) = self.inbox.get(seq) else { return Ok(Done::Gone) };
        Ok(match outcome {
            Outcome::Cross(crossing) => self.cross(portal, item, *crossing).await?,
            Outcome::Refuse(refusal) => Done::Refused(refusal),
            Outcome::Nothing(_) => {
                effect::drop_row(&self.core, seq).await?;
                Done::Gone
            }
            Outcome::Adopt(image) => {
                effect::adopt(&self.core, portal, self.source, item, image).await?;
                Done::Gone
            }
            Outcome::Suspend(reason) => {
                self.core.set_state(&self.entry, PortalState::Suspended, Some(reason)).await?;
                effect::drop_row(&self.core, seq).await?;
                Done::Gone
            }
        })
    }

    async fn cross(&self, portal: &Arc<Portal>, item: &Item, crossing: Crossing) -> Result<Done, Refusal> {
        let Crossing { before, image, instead, asks_server, note } = crossing;
        let far = self.source.other();
        let rooms = self.core.sides()?.rooms(far);
        let room = portal.room(far);
        if self.on_its_way(&before).await? {
            return Ok(Done::Waits);
        }
        for Before { draft, source } in before {
            let effect = match source {
                Some(source) => effect::joined(&self.core, portal, self.source, source).await?,
                None => effect::prepared(&self.core, self.source, &item.event),
            };
            let result = rooms.send(room, vec![Outgoing { draft, effect }]).await.pop();
            if let Some(Err(refusal)) = result {
                return Ok(if refusal.is_transient() { Done::Later(refusal) } else { Done::Refused(refusal) });
            }
        }
        if asks_server {
            self.ask(portal, item, image, note);
            return Ok(Done::Asked);
        }
        let send = async |draft: Draft| -> Result<Made, Refusal> {
            let effect = effect::crossed(&self.core, portal, self.source, item, note.clone());
            let outgoing = Outgoing { draft, effect };
            let nothing = || Refusal::Internal("nothing came of an event".to_owned());
            rooms.send(room, vec![outgoing]).await.pop().unwrap_or_else(|| Err(nothing()))
        };
        Ok(match (send(image).await, instead) {
            (Ok(_), _) => Done::Crossed,
            (Err(refusal), _) if refusal.is_transient() => Done::Later(refusal),
            (Err(_), Some(instead)) => match send(instead).await {
                Ok(_) => Done::Crossed,
                Err(refusal) if refusal.is_transient() => Done::Later(refusal),
                Err(refusal) => Done::Refused(refusal),
            },
            (Err(refusal), None) => Done::Refused(refusal),
        })
    }

    /// Invites a user of another server, which may be slow or dead: on a task of its own.
    fn ask(&self, portal: &Arc<Portal>, item: &Item, invite: Draft, note: Option<String>) {
        let effect = effect::crossed(&self.core, portal, self.source, item, note);
        let (core, entry, portal, source) = (self.core.clone(), self.entry.clone(), portal.clone(), self.source);
        let (seq, asked) = (item.row.seq, self.asked.clone());
        self.core.spawn(async move {
            let outgoing = Outgoing { draft: invite, effect };
            let inviting =
                async { core.sides()?.rooms(source.other()).invite(portal.room(source.other()), outgoing).await };
            // Whatever happens, the item must hear of it.
            let invited = AssertUnwindSafe(inviting).catch_unwind().await;
            let invited = invited.unwrap_or_else(|_| Err(Refusal::Internal("inviting panicked".to_owned())));
            let done = match invited {
                Ok(_) => Done::Crossed,
                Err(refusal) if refusal.is_transient() => Done::Later(refusal),
                Err(refusal) => Done::Refused(refusal),
            };
            // The task that asked stays as long as the item does.
            let _ = asked.send((seq, done));
            entry.direction(source).wake.notify_one();
        });
    }

    /// Whether a join that would be sent first is already on its way to the hub.
    async fn on_its_way(&self, before: &[Before]) -> Result<bool, Refusal> {
        let sources: Vec<OwnedEventId> = before.iter().filter_map(|before| before.source.clone()).collect();
        if sources.is_empty() || self.source == Side::Lm {
            return Ok(false);
        }
        let now = self.core.now_ms();
        let images = images::of_sources(&self.core.context.store, self.source, &sources).await?;
        Ok(images.values().any(|row| row.pending && now.saturating_sub(row.made_ts) < ECHO_PATIENCE_MS))
    }
}
